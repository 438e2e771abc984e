//! Control groups: what a sandbox may use, what it has used, in both of the kernel's worlds.
//!
//! cgroups-rs finds the hierarchies. Limits are our own writes through descriptors, each read back: a limit that is not set as asked is
//! an error, never a sandbox without it.

mod blkio;
mod change;
mod counters;
mod freezer;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use cgroups_rs::fs::hierarchies::{UNIFIED_MOUNTPOINT, V1, is_cgroup2_unified_mode};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, unlinkat};
use serde::{Deserialize, Serialize};

pub(crate) use blkio::{Device, Devices};
pub(crate) use change::{Before, Change, Lowering};
pub(crate) use counters::Counters;

use crate::{
    error::at,
    protocol::{CgroupMode, IoLimits},
};

/// The parent of everything that is ours, in every hierarchy.
pub(crate) const PARENT: &str = "mayfly";

/// What a sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    /// CPU time in each period, in microseconds.
    pub(crate) cpu_quota_us: u64,
    pub(crate) cpu_period_us: u64,
    /// Processes and threads, our own init not counted.
    pub(crate) pids: u64,
}

/// The node's hierarchies, with this keeper's parent group made in each.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Tree {
    mode: CgroupMode,
    devices: Devices,
    #[serde(with = "crate::handover")]
    parents: Vec<OwnedFd>,
    /// The folders of `parents`, for the last act.
    paths: Vec<PathBuf>,
    places: Places,
}

/// Which of the hierarchies has which controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Places {
    memory: usize,
    cpu: usize,
    cpuacct: usize,
    pids: usize,
    io: usize,
    /// The cgroup2 tree: the only one on v2; beside the others, without controllers, on a hybrid host. It can kill.
    unified: Option<usize>,
    /// The freezer of v1, where there is no cgroup2 tree: every group of that can freeze.
    #[serde(default)]
    freezer: Option<usize>,
}

/// The group of one sandbox, in every hierarchy.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Group {
    name: String,
    mode: CgroupMode,
    devices: Devices,
    places: Places,
    #[serde(with = "crate::handover")]
    folders: Vec<OwnedFd>,
    /// How fast it may use every disk of the node, if that was set.
    io: Option<IoLimits>,
    /// What it is held to, if that was set and nothing else since.
    #[serde(default)]
    limits: Option<Limits>,
    own_device: Option<Device>,
    /// The most memory that it had before its limit was lowered, in bytes.
    #[serde(default)]
    peak_before: u64,
    /// Those of its volumes, which others may use, too.
    #[serde(default)]
    shared_devices: Vec<Device>,
}

/// Which hierarchies this machine has, by controller. `None` for a controller that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) mode: CgroupMode,
    /// `memory`, `cpu`, `cpuacct`, `pids`, `io` (which v1 calls `blkio`).
    pub(crate) controllers: [(&'static str, Option<PathBuf>); 5],
    pub(crate) unified: Option<PathBuf>,
    /// The freezer of v1, if it is needed.
    pub(crate) freezer: Option<PathBuf>,
}

/// Looks at the machine's mounts.
pub(crate) fn discover() -> Found {
    const NAMES: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "io"];
    if is_cgroup2_unified_mode() {
        let root = PathBuf::from(UNIFIED_MOUNTPOINT);
        let available = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        // On v2 the cpu controller counts, too.
        let has = |name: &str| available.split_whitespace().any(|found| found == name.trim_end_matches("acct"));
        let controllers = NAMES.map(|name| (name, has(name).then(|| root.clone())));
        return Found { mode: CgroupMode::V2, controllers, unified: Some(root), freezer: None };
    }
    use cgroups_rs::fs::Controllers;
    let v1 = V1::new();
    let at = |controller| v1.get_mount_point(controller).map(|(point, _)| point);
    let points = [at(Controllers::Mem), at(Controllers::Cpu), at(Controllers::CpuAcct), at(Controllers::Pids), at(Controllers::BlkIo)];
    let unified = cgroup2_mount_point();
    let mode = if unified.is_some() { CgroupMode::Hybrid } else { CgroupMode::V1 };
    let freezer = if unified.is_none() { at(Controllers::Freezer) } else { None };
    let mut names = NAMES.into_iter();
    Found { mode, controllers: points.map(|point| (names.next().expect("five points for five names"), point)), unified, freezer }
}

/// cgroups-rs looks for v1 mounts only on a hybrid host.
fn cgroup2_mount_point() -> Option<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

impl Tree {
    /// Makes the parent group `mayfly/<name>` in each hierarchy, after sweeping what an earlier keeper of that name left there.
    pub(crate) fn open(name: &str, devices: Devices) -> io::Result<Self> {
        Self::open_in(&discover(), name, devices)
    }

    fn open_in(found: &Found, name: &str, devices: Devices) -> io::Result<Self> {
        let mut points: Vec<PathBuf> = Vec::new();
        let mut place = |point: &Path| match points.iter().position(|known| known == point) {
            Some(index) => index,
            None => {
                points.push(point.to_owned());
                points.len() - 1
            }
        };
        let mut indexes = [0; 5];
        for (index, (controller, point)) in indexes.iter_mut().zip(&found.controllers) {
            let point = point.as_ref().ok_or_else(|| io::Error::other(format!("this machine has no cgroup controller {controller}")))?;
            *index = place(point);
        }
        let [memory, cpu, cpuacct, pids, io] = indexes;
        let unified = found.unified.as_deref().map(&mut place);
        let freezer = found.freezer.as_deref().map(&mut place);
        let parents = points.iter().map(|point| make_parent(point, name, found.mode)).collect::<io::Result<_>>()?;
        let paths = points.iter().map(|point| point.join(PARENT).join(name)).collect();
        let places = Places { memory, cpu, cpuacct, pids, io, unified, freezer };
        let tree = Self { mode: found.mode, devices, parents, paths, places };
        tree.sweep()?;
        Ok(tree)
    }

    pub(crate) fn mode(&self) -> CgroupMode {
        self.mode
    }

    /// How many folders a group is.
    pub(crate) fn hierarchies(&self) -> u64 {
        self.parents.len() as u64
    }

    /// A fresh group, without limits yet.
    pub(crate) fn make(&self, name: String) -> io::Result<Group> {
        let Self { mode, devices, places, .. } = *self;
        let mut group = Group {
            name,
            mode,
            devices,
            places,
            folders: Vec::new(),
            io: None,
            limits: None,
            own_device: None,
            peak_before: 0,
            shared_devices: Vec::new(),
        };
        for parent in &self.parents {
            let made = mkdirat(parent, &group.name, Mode::from_raw_mode(0o755)).and_then(|()| open_folder(parent.as_fd(), &group.name));
            match made {
                Ok(folder) => group.folders.push(folder),
                Err(error) => {
                    group.remove()?;
                    return Err(error.into());
                }
            }
        }
        if let Err(error) = group.check_burst() {
            group.remove()?;
            return Err(error);
        }
        Ok(group)
    }

    /// Removes the parents, which must be empty, and what they were in if nobody else is there.
    pub(crate) fn remove(&self) -> io::Result<()> {
        for path in &self.paths {
            std::fs::remove_dir(path)?;
            if let Some(shared) = path.parent() {
                match std::fs::remove_dir(shared) {
                    Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Ends and removes every group below the parents.
    fn sweep(&self) -> io::Result<()> {
        self.thaw_strays()?;
        // First where the kernel kills a whole group at once; elsewhere they are then empty.
        let unified = self.places.unified.and_then(|index| self.parents.get(index));
        for parent in unified.into_iter().chain(&self.parents) {
            for entry in rustix::fs::Dir::read_from(parent)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type() == rustix::fs::FileType::Directory && name != "." && name != ".." {
                    remove_stray(parent.as_fd(), &name)?;
                }
            }
        }
        Ok(())
    }
}

impl Tree {
    /// What the freezer of v1 holds does not die: all of it is let go before any is killed.
    fn thaw_strays(&self) -> io::Result<()> {
        let Some(parent) = self.places.freezer.and_then(|index| self.parents.get(index)) else { return Ok(()) };
        for entry in rustix::fs::Dir::read_from(parent)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type() != rustix::fs::FileType::Directory || name == "." || name == ".." {
                continue;
            }
            match open_folder(parent.as_fd(), &name) {
                Ok(folder) => write(folder.as_fd(), "freezer.state", "THAWED")?,
                Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Kills what is in the group and removes it, waiting for the kernel as long as it takes to die (two seconds at most).
fn remove_stray(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for _ in 0..200 {
        let folder = match open_folder(parent, name) {
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            other => other?,
        };
        match write(folder.as_fd(), "cgroup.kill", "1") {
            // The hierarchies of v1 cannot. A process id that was read may be another's by the time of the kill; but nobody else forks in here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => kill_each(folder.as_fd())?,
            done => done?,
        }
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => last = error.into(),
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(last)
}

fn kill_each(group: BorrowedFd<'_>) -> io::Result<()> {
    for pid in read(group, "cgroup.procs")?.lines().filter_map(|line| line.parse().ok()) {
        match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn make_parent(point: &Path, name: &str, mode: CgroupMode) -> io::Result<OwnedFd> {
    let mut at = open_folder(CWD, point)?;
    for folder in [PARENT, name] {
        if mode == CgroupMode::V2 {
            enable_controllers(at.as_fd())?;
        }
        match mkdirat(&at, folder, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        at = open_folder(at.as_fd(), folder)?;
    }
    if mode == CgroupMode::V2 {
        enable_controllers(at.as_fd())?;
    }
    Ok(at)
}

/// Hands the controllers on to the children of a cgroup v2 group (cgroup-v2, «Enabling and Disabling»).
fn enable_controllers(folder: BorrowedFd<'_>) -> io::Result<()> {
    write(folder, "cgroup.subtree_control", "+memory +cpu +pids +io")
}

impl Group {
    /// The folder to be born in (`CLONE_INTO_CGROUP`): the whole of it on v2, its killing part on a hybrid host.
    pub(crate) fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.places.unified.and_then(|index| self.folders.get(index)).map(AsFd::as_fd)
    }

    /// The `tasks` file of each v1 hierarchy, for a process to join by writing 0.
    pub(crate) fn tasks(&self) -> io::Result<Vec<OwnedFd>> {
        let v1 = self.folders.iter().enumerate().filter(|(index, _)| Some(*index) != self.places.unified);
        v1.map(|(_, folder)| Ok(openat(folder, "tasks", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?)).collect()
    }

    /// Sets every limit and reads it back, unless they are set.
    pub(crate) fn set_limits(&mut self, limits: Limits) -> io::Result<()> {
        if self.limits != Some(limits) {
            let before = self.limits.take();
            self.write_limits(limits, before)?;
            self.limits = Some(limits);
        }
        Ok(())
    }

    fn write_limits(&self, limits: Limits, before: Option<Limits>) -> io::Result<()> {
        let Limits { memory_bytes, cpu_quota_us, cpu_period_us, pids } = limits;
        // The kernel counts whole pages and rounds down (cgroup-v1/memory; memory.max alike).
        let memory = (memory_bytes / PAGE_BYTES * PAGE_BYTES).to_string();
        // One more than the payload may have: init is in the group, too.
        set(self.pids(), "pids.max", &(pids + 1).to_string())?;
        match self.mode {
            CgroupMode::V2 => {
                set(self.memory(), "memory.max", &memory)?;
                switch_swap_off(self.memory(), "memory.swap.max", "0")?;
                set(self.memory(), "memory.oom.group", "1")?;
                set(self.cpu(), "cpu.max", &format!("{cpu_quota_us} {cpu_period_us}"))
            }
            CgroupMode::V1 | CgroupMode::Hybrid => {
                // The first of the two may never exceed the other.
                let is_raised = before.is_some_and(|before| before.memory_bytes < memory_bytes);
                if !is_raised {
                    set(self.memory(), "memory.limit_in_bytes", &memory)?;
                }
                switch_swap_off(self.memory(), "memory.memsw.limit_in_bytes", &memory)?;
                if is_raised {
                    set(self.memory(), "memory.limit_in_bytes", &memory)?;
                }
                set(self.cpu(), "cpu.cfs_period_us", &cpu_period_us.to_string())?;
                set(self.cpu(), "cpu.cfs_quota_us", &cpu_quota_us.to_string())
            }
        }
    }

    /// A new group may not save up CPU time for later: where the kernel knows that at all, it must be off.
    fn check_burst(&self) -> io::Result<()> {
        let name = if self.mode == CgroupMode::V2 { "cpu.max.burst" } else { "cpu.cfs_burst_us" };
        match read(self.cpu(), name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Ok(found) if found.trim_end() == "0" => Ok(()),
            Ok(found) => Err(io::Error::other(format!("{name} is {} instead of 0", found.trim_end()))),
            Err(error) => Err(error),
        }
    }

    /// Lets what is about to die run at full speed: a process that the CPU limit holds back would die that much later.
    pub(crate) fn lift_cpu_limit(&mut self) -> io::Result<()> {
        self.limits = None;
        match self.mode {
            CgroupMode::V2 => write(self.cpu(), "cpu.max", "max"),
            CgroupMode::V1 | CgroupMode::Hybrid => write(self.cpu(), "cpu.cfs_quota_us", "-1"),
        }
    }

    /// SIGKILL to every process in it, by the kernel and at once, where it has a cgroup2 (cgroup-v2, `cgroup.kill`).
    pub(crate) fn kill(&self) -> io::Result<()> {
        match self.birthplace() {
            Some(folder) => write(folder, "cgroup.kill", "1"),
            None => Ok(()),
        }
    }

    /// A descriptor that is readable when the group runs out of memory, where the kernel does not kill the whole group by itself (v1).
    pub(crate) fn oom_notice(&self) -> io::Result<Option<OwnedFd>> {
        if self.mode == CgroupMode::V2 {
            return Ok(None);
        }
        let notice = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK)?;
        let control = openat(self.memory(), "memory.oom_control", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let line = format!("{} {}", raw(&notice), raw(&control));
        write(self.memory(), "cgroup.event_control", &line)?;
        Ok(Some(notice))
    }

    /// Removes the group everywhere. `Ok(false)`: something in it is still dying; ask again.
    pub(crate) fn remove(&mut self) -> io::Result<bool> {
        while let Some(folder) = self.folders.pop() {
            let parent = openat(&folder, "..", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
            match parent.and_then(|parent| unlinkat(parent, &self.name, AtFlags::REMOVEDIR)) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(rustix::io::Errno::BUSY) => {
                    self.folders.push(folder);
                    return Ok(false);
                }
                Err(error) => {
                    self.folders.push(folder);
                    return Err(error.into());
                }
            }
        }
        Ok(true)
    }

    fn folder(&self, place: usize) -> BorrowedFd<'_> {
        self.folders[place].as_fd()
    }
    fn memory(&self) -> BorrowedFd<'_> {
        self.folders[self.places.memory].as_fd()
    }
    fn cpu(&self) -> BorrowedFd<'_> {
        self.folders[self.places.cpu].as_fd()
    }
    fn cpuacct(&self) -> BorrowedFd<'_> {
        self.folders[self.places.cpuacct].as_fd()
    }
    fn pids(&self) -> BorrowedFd<'_> {
        self.folders[self.places.pids].as_fd()
    }
    fn blkio(&self) -> BorrowedFd<'_> {
        self.folders[self.places.io].as_fd()
    }
}

const PAGE_BYTES: u64 = 4096;

fn raw(descriptor: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(descriptor)
}

fn open_folder(at: BorrowedFd<'_>, path: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn write(folder: BorrowedFd<'_>, name: &str, value: &str) -> io::Result<()> {
    let file = openat(folder, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| named(e, name))?;
    rustix::io::write(file, value.as_bytes()).map_err(|e| named(e, name))?;
    Ok(())
}

fn read(folder: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| named(e, name))?;
    io::read_to_string(std::fs::File::from(file))
}

/// Writes a limit and makes sure that the kernel took it as it was meant.
fn set(folder: BorrowedFd<'_>, name: &str, value: &str) -> io::Result<()> {
    write(folder, name, value)?;
    let found = read(folder, name)?;
    if found.trim_end() == value { Ok(()) } else { Err(io::Error::other(format!("{name} is {} instead of {value}", found.trim_end()))) }
}

/// [`set`] for the files of swap accounting, which a kernel may lack (`swapaccount=0`): that is harmless as long as the machine has no swap.
fn switch_swap_off(folder: BorrowedFd<'_>, name: &str, value: &str) -> io::Result<()> {
    match set(folder, name, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let swaps = match std::fs::read_to_string("/proc/swaps") {
                // A kernel that knows no swap at all.
                Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
                other => other?,
            };
            if has_swap(&swaps) { Err(io::Error::other(format!("this machine swaps, and its kernel lacks {name}"))) } else { Ok(()) }
        }
        other => other,
    }
}

/// Whether `/proc/swaps` (proc_swaps(5)) lists any, below its header.
pub(crate) fn has_swap(swaps: &str) -> bool {
    swaps.lines().skip(1).any(|line| !line.trim().is_empty())
}

fn named(error: rustix::io::Errno, name: &str) -> io::Error {
    at(name)(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_swaps_is_more_than_its_header() {
        let header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert!(!has_swap("") && !has_swap(header));
        assert!(has_swap(&format!("{header}/dev/zram0                              partition\t1024\t\t0\t\t100\n")));
    }
}
