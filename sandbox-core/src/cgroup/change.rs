//! Other limits for a group that is in use: all of them or none.

use std::io;

use super::{Group, PAGE_BYTES, read, set, write};
use crate::protocol::{CgroupMode, IoLimits};

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

/// Files of limits, by their hierarchy's place, with what stood in them before.
type Before = Vec<(usize, &'static str, String)>;

impl Group {
    /// Sets these limits one by one and reads each back. After an error they are what they were.
    ///
    /// # Errors
    /// The kernel does not take one, as memory that is in use and cannot be given back.
    pub(crate) fn change(&mut self, change: Change) -> io::Result<()> {
        let io_before = self.io;
        let mut before = Before::new();
        // Memory last: it is what the kernel refuses.
        let changed = change
            .io
            .map_or(Ok(()), |io| self.change_io(io))
            .and_then(|()| change.pids.map_or(Ok(()), |pids| self.change_pids(pids, &mut before)))
            .and_then(|()| change.cpu_millis.map_or(Ok(()), |millis| self.change_cpu(millis, &mut before)))
            .and_then(|()| change.memory_bytes.map_or(Ok(()), |bytes| self.change_memory(bytes, &mut before)));
        let Err(error) = changed else { return Ok(()) };
        let mut undone = Ok(());
        while let Some((place, name, value)) = before.pop() {
            undone = undone.and(self.set_at(place, name, &value));
        }
        if let (Some(_), Some(io)) = (change.io, io_before) {
            undone = undone.and(self.change_io(io));
        }
        match undone {
            Ok(()) => Err(error),
            Err(worse) => Err(io::Error::other(format!("{error}; and putting back what was set failed: {worse}"))),
        }
    }

    fn change_io(&mut self, io: IoLimits) -> io::Result<()> {
        // Some of it may be set already: written in any case.
        self.io = None;
        self.limit_io(io)?;
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

    fn change_memory(&self, bytes: u64, before: &mut Before) -> io::Result<()> {
        let bytes = bytes / PAGE_BYTES * PAGE_BYTES;
        let value = bytes.to_string();
        if self.mode == CgroupMode::V2 {
            // Until the new limit stands the old one must not be filled again.
            let changed = self.give_back_memory(bytes).and_then(|()| self.exchange(self.places.memory, "memory.max", &value, before));
            return changed.and(write(self.memory(), "memory.high", "max"));
        }
        const FILES: [&str; 2] = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"];
        let now: u64 = read(self.memory(), FILES[0])?.trim_end().parse().map_err(io::Error::other)?;
        // The second may never be the smaller one.
        let [first, second] = if bytes < now { FILES } else { [FILES[1], FILES[0]] };
        for name in [first, second] {
            match self.exchange(self.places.memory, name, &value, before) {
                // A kernel that counts no swap, on a machine that has none: seen at the launch.
                Err(error) if error.kind() == io::ErrorKind::NotFound && name == FILES[1] => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Has the kernel take back what the group can do without until it has no more than `bytes`: where it would be killed for a lower limit (v2), and
    /// not be refused it.
    fn give_back_memory(&self, bytes: u64) -> io::Result<()> {
        write(self.memory(), "memory.high", &bytes.to_string())?;
        match self.now()? {
            (left, _) if left > bytes => Err(io::Error::other(format!("memory: {left} bytes are in use and cannot be given back"))),
            _ => Ok(()),
        }
    }

    fn exchange(&self, place: usize, name: &'static str, value: &str, before: &mut Before) -> io::Result<()> {
        let found = read(self.folder(place), name)?;
        before.push((place, name, found.trim_end().to_owned()));
        self.set_at(place, name, value)
    }

    fn set_at(&self, place: usize, name: &str, value: &str) -> io::Result<()> {
        set(self.folder(place), name, value)
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
        // Twenty megabytes of its own, allocated inside.
        let own = std::process::id();
        let folders: Vec<String> =
            group.folders.iter().map(|folder| format!("/proc/{own}/fd/{}/cgroup.procs", folder.as_raw_fd())).collect();
        let joins: String = folders.iter().map(|file| format!("echo $$ > {file}; ")).collect();
        let script = format!("{joins} held=$(head -c 20000000 /dev/zero | tr '\\0' x); echo ready; read end");
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();

        let refused = group.change(Change { memory_bytes: Some(8 << 20), cpu_millis: Some(500), pids: Some(5), io: None });
        assert!(refused.is_err());
        assert_eq!(found(&group), before, "{refused:?}");
        assert!(child.try_wait().unwrap().is_none(), "it lives on");

        for (memory_bytes, cpu_millis, pids) in [(40 << 20, 500, 5), (80 << 20, 1500, 50)] {
            group.change(Change { memory_bytes: Some(memory_bytes), cpu_millis: Some(cpu_millis), pids: Some(pids), io: None }).unwrap();
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
