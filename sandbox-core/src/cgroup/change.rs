//! Other limits for a group that is in use: all of them or none.

use std::{io, os::fd::BorrowedFd};

use serde::{Deserialize, Serialize};

use super::{Group, PAGE_BYTES, counters::number, read, set, write};
use crate::{
    error::at,
    protocol::{CgroupMode, IoLimits},
};

/// The limits that are to be other ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) memory_bytes: Option<u64>,
    /// Thousandths of a core.
    pub(crate) cpu_millis: Option<u64>,
    /// Processes and threads, our own init not counted.
    pub(crate) pids: Option<u64>,
    pub(crate) io: Option<IoLimits>,
}

/// What it takes to put back what was set.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Before {
    /// Files of limits, by their hierarchy's place, with what stood in them, in the order in which they were written.
    files: Vec<(usize, String, String)>,
    /// If that was changed.
    io: Option<IoLimits>,
}

/// A memory limit below the one that stands, which is not set yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lowering {
    mode: CgroupMode,
    bytes: u64,
}

impl Group {
    /// Sets these limits one by one and reads each back. A lower memory limit is left: setting it lasts as long as the kernel has something to take
    /// back, which a busy group fills again as fast. After an error they are what they were.
    ///
    /// # Errors
    /// The kernel does not take one.
    pub(crate) fn change(&mut self, change: Change) -> io::Result<(Before, Option<Lowering>)> {
        self.limits = None;
        let mut before = Before::default();
        match self.change_all(change, &mut before) {
            Ok(lowering) => Ok((before, lowering)),
            Err(error) => match self.put_back(before) {
                Ok(()) => Err(error),
                Err(worse) => Err(io::Error::other(format!("{error}; and {worse}"))),
            },
        }
    }

    /// Has the limits be again what they were before a change.
    pub(crate) fn put_back(&mut self, before: Before) -> io::Result<()> {
        let Before { files, io } = before;
        let mut undone = Ok(());
        for (place, name, value) in files.into_iter().rev() {
            undone = undone.and(self.set_at(place, &name, &value));
        }
        if let Some(io) = io {
            undone = undone.and(self.change_io(io));
        }
        undone.map_err(at("putting back what was set"))
    }

    /// Its memory limit was lowered. What it had before says nothing of whether it meets the new one: v1 counts anew from here.
    pub(crate) fn lowered(&mut self) -> io::Result<()> {
        const PEAK: &str = "memory.max_usage_in_bytes";
        if self.mode == CgroupMode::V2 {
            return Ok(());
        }
        self.peak_before = self.peak_before.max(number(self.memory(), PEAK)?);
        write(self.memory(), PEAK, "0")
    }

    /// The folder with the files of its memory: what [`Lowering::run`] needs.
    pub(crate) fn memory_folder(&self) -> BorrowedFd<'_> {
        self.memory()
    }

    fn change_all(&mut self, change: Change, before: &mut Before) -> io::Result<Option<Lowering>> {
        if let Some(io) = change.io {
            before.io = self.io;
            self.change_io(io)?;
        }
        if let Some(pids) = change.pids {
            self.change_pids(pids, before)?;
        }
        if let Some(millis) = change.cpu_millis {
            self.change_cpu(millis, before)?;
        }
        change.memory_bytes.map_or(Ok(None), |bytes| self.change_memory(bytes, before))
    }

    fn change_io(&mut self, io: IoLimits) -> io::Result<()> {
        // Some of it may be set already: written in any case.
        self.io = None;
        self.limit_io(io)?;
        self.shared_devices.iter().try_for_each(|device| self.limit_io_on(*device, io))?;
        match self.own_device {
            Some(device) => self.limit_io_on_own(device, io),
            None => Ok(()),
        }
    }

    fn change_pids(&self, pids: u64, before: &mut Before) -> io::Result<()> {
        // As in `set_limits`: init is in the group, too.
        self.exchange(self.places.pids, "pids.max", &pids.saturating_add(1).to_string(), before)
    }

    fn change_cpu(&self, millis: u64, before: &mut Before) -> io::Result<()> {
        let quota_in = |period_us: u64| millis.saturating_mul(period_us) / 1000;
        let number = |text: &str| text.trim().parse::<u64>().map_err(|_| io::Error::other(format!("a CPU period of {text:?}")));
        if self.mode == CgroupMode::V2 {
            let found = read(self.cpu(), "cpu.max")?;
            let period_us = number(found.split_whitespace().nth(1).unwrap_or_default())?;
            return self.exchange(self.places.cpu, "cpu.max", &format!("{} {period_us}", quota_in(period_us)), before);
        }
        let period_us = number(&read(self.cpu(), "cpu.cfs_period_us")?)?;
        self.exchange(self.places.cpu, "cpu.cfs_quota_us", &quota_in(period_us).to_string(), before)
    }

    /// Raises the limit; what is to be lower is noted and left.
    fn change_memory(&self, bytes: u64, before: &mut Before) -> io::Result<Option<Lowering>> {
        let bytes = bytes / PAGE_BYTES * PAGE_BYTES;
        let files = limits_of_memory(self.mode);
        let lowering = Lowering { mode: self.mode, bytes };
        if is_more(&read(self.memory(), files[0])?, bytes)? {
            // Last what is to be put back first: of the two of v1 the second may never be the smaller one; and what is to slow the group down is taken off when it may have
            // its memory again.
            let slower = (self.mode == CgroupMode::V2).then_some("memory.high");
            for name in slower.iter().chain(files) {
                if let Some(found) = if_there(read(self.memory(), name), name)? {
                    before.files.push((self.places.memory, (*name).to_owned(), found.trim_end().to_owned()));
                }
            }
            return Ok(Some(lowering));
        }
        for name in files.iter().rev() {
            if_there(self.exchange(self.places.memory, name, &bytes.to_string(), before), name)?;
        }
        Ok(None)
    }

    fn exchange(&self, place: usize, name: &str, value: &str, before: &mut Before) -> io::Result<()> {
        let found = read(self.folder(place), name)?;
        before.files.push((place, name.to_owned(), found.trim_end().to_owned()));
        self.set_at(place, name, value)
    }

    fn set_at(&self, place: usize, name: &str, value: &str) -> io::Result<()> {
        set(self.folder(place), name, value)
    }
}

impl Lowering {
    /// Has the kernel take back what the group can do without, until it has no more than its new limit, and sets that. For a process of its own: it lasts as long as
    /// the group makes it last, and a kill ends it.
    ///
    /// # Errors
    /// The group cannot do without: what stands then is to be put back ([`Group::put_back`]).
    pub(crate) fn run(self, memory: BorrowedFd<'_>) -> io::Result<()> {
        let value = self.bytes.to_string();
        if self.mode == CgroupMode::V2 {
            // Where the group would be killed for a lower limit, and not be refused it. Until that stands the old one must not be filled again.
            write(memory, "memory.high", &value)?;
            let left = number(memory, "memory.current")?;
            if left > self.bytes {
                return Err(io::Error::other(format!("memory: {left} bytes are in use and cannot be given back")));
            }
        }
        for name in limits_of_memory(self.mode) {
            if_there(set(memory, name, &value), name)?;
        }
        if self.mode == CgroupMode::V2 { write(memory, "memory.high", "max") } else { Ok(()) }
    }
}

/// The files of the limit, in the order in which it is lowered: of the two of v1 the second may never be the smaller one.
const fn limits_of_memory(mode: CgroupMode) -> &'static [&'static str] {
    match mode {
        CgroupMode::V2 => &["memory.max"],
        CgroupMode::V1 | CgroupMode::Hybrid => &["memory.limit_in_bytes", MEMORY_AND_SWAP],
    }
}

const MEMORY_AND_SWAP: &str = "memory.memsw.limit_in_bytes";

/// `None` for a kernel that counts no swap, on a machine that has none: seen at the launch.
fn if_there<T>(done: io::Result<T>, name: &str) -> io::Result<Option<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound && name == MEMORY_AND_SWAP => Ok(None),
        done => done.map(Some),
    }
}

/// Whether a limit, as the kernel tells it, is more than that.
fn is_more(limit: &str, bytes: u64) -> io::Result<bool> {
    match limit.trim_end() {
        "max" => Ok(true),
        number => Ok(number.parse::<u64>().map_err(io::Error::other)? > bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, process::Command};

    use super::{
        super::{Devices, Limits, Tree, discover},
        *,
    };

    const BEFORE: Limits = Limits { memory_bytes: 64 << 20, cpu_quota_us: 100_000, cpu_period_us: 100_000, pids: 32 };

    /// What the kernel says of the limits that a group has.
    fn found(group: &Group) -> Vec<String> {
        let names: &[(usize, &str)] = if group.mode == CgroupMode::V2 {
            &[
                (group.places.memory, "memory.max"),
                (group.places.memory, "memory.high"),
                (group.places.cpu, "cpu.max"),
                (group.places.pids, "pids.max"),
            ]
        } else {
            &[
                (group.places.memory, "memory.limit_in_bytes"),
                (group.places.cpu, "cpu.cfs_quota_us"),
                (group.places.cpu, "cpu.cfs_period_us"),
                (group.places.pids, "pids.max"),
            ]
        };
        names.iter().map(|(place, name)| read(group.folder(*place), name).unwrap().trim_end().to_owned()).collect()
    }

    /// Needs root and cgroups, as sandboxes do.
    #[test]
    fn limits_change_all_or_none() {
        let tree = Tree::open_in(&discover(), &format!("test-change-{}", std::process::id()), Devices::default()).unwrap();
        let mut group = tree.make("changed".to_owned()).unwrap();
        group.set_limits(BEFORE).unwrap();
        let before = found(&group);
        // Twenty megabytes of its own, allocated inside, after it had more.
        let own = std::process::id();
        let folders: Vec<String> =
            group.folders.iter().map(|folder| format!("/proc/{own}/fd/{}/cgroup.procs", folder.as_raw_fd())).collect();
        let joins: String = folders.iter().map(|file| format!("echo $$ > {file}; ")).collect();
        let more = format!("/dev/shm/test-change-{own}");
        let script = format!(
            "{joins} head -c 50000000 /dev/zero > {more}; rm {more}; held=$(head -c 20000000 /dev/zero | tr '\\0' x); echo ready; read end"
        );
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();

        let all = |memory_bytes, cpu_millis, pids| Change {
            memory_bytes: Some(memory_bytes),
            cpu_millis: Some(cpu_millis),
            pids: Some(pids),
            io: None,
        };
        let (was, lowering) = group.change(all(8 << 20, 500, 5)).unwrap();
        let refused = lowering.unwrap().run(group.memory_folder());
        assert!(refused.is_err());
        group.put_back(was).unwrap();
        assert_eq!(found(&group), before, "{refused:?}");
        assert!(child.try_wait().unwrap().is_none(), "it lives on");

        // What the kernel refuses of what is set first.
        let refused = group.change(Change { pids: Some(7), cpu_millis: Some(0), ..Change::default() });
        assert!(refused.is_err());
        assert_eq!(found(&group), before, "{refused:?}");

        for (memory_bytes, cpu_millis, pids) in [(40 << 20, 500, 5), (80 << 20, 1500, 50)] {
            let (_, lowering) = group.change(all(memory_bytes, cpu_millis, pids)).unwrap();
            if let Some(lowering) = lowering {
                lowering.run(group.memory_folder()).unwrap();
                group.lowered().unwrap();
                let counters = group.counters().unwrap();
                assert!(counters.memory_peak_bytes > 50_000_000 && !counters.is_at_memory_limit, "{counters:?}");
            }
            let now = found(&group);
            assert_eq!(now[0], memory_bytes.to_string());
            assert!(now.iter().any(|text| text.starts_with(&(cpu_millis * 100).to_string())), "{now:?}");
            assert_eq!(now[3], (pids + 1).to_string());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        while !group.remove().unwrap() {
            std::thread::yield_now();
        }
        tree.remove().unwrap();
    }
}
