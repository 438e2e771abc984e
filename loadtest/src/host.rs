//! What this machine and the processes of a service on it take, as the kernel tells it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Each request in flight is a connection, and an open loop has as many of them as a slow service makes it have.
pub(crate) fn allow_many_connections() -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("the limit of open files cannot be raised")
}

/// Memory in use, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// What the machine could still give to programs. All there is counts in it: processes, the kernel's own, caches that cannot be given up.
    pub(crate) available: u64,
    /// The service, resident.
    pub(crate) service: u64,
    /// The keeper, resident.
    pub(crate) keeper: u64,
    /// Its Postgres: each page shared by its processes counted once.
    pub(crate) postgres: u64,
    /// All processes in sandboxes, likewise.
    pub(crate) sandboxes: u64,
    /// The kernel's: objects, stacks, page tables, counters of each processor.
    pub(crate) kernel: u64,
    /// Files in memory, as the sandboxes' own are.
    pub(crate) shared: u64,
}

impl Memory {
    /// Of the service over this data folder, which must be on this machine and be read by root.
    pub(crate) fn of(data_dir: &Path) -> Result<Self> {
        let info = fs::read_to_string("/proc/meminfo")?;
        let kib = |name: &str| field(&info, name).with_context(|| format!("no {name} in /proc/meminfo"));
        let kernel = kib("Slab")? + kib("KernelStack")? + kib("PageTables")? + kib("Percpu")?;
        let mut memory = Self { available: kib("MemAvailable")?, kernel, shared: kib("Shmem")?, ..Self::default() };
        let marker = data_dir.display().to_string();
        let mut keeper = None;
        let processes = processes();
        for process in processes.iter().filter(|process| process.command.contains(&marker)) {
            match process.name.as_str() {
                "mayfly" => memory.service += process.resident(),
                // The keeper's children bear its command line until they have become something else.
                "sandbox-keeper" if keeper.is_none() => {
                    memory.keeper = process.resident();
                    keeper = Some(process.pid);
                }
                "postgres" => memory.postgres += tree(&processes, process.pid).map(Process::proportional).sum::<u64>(),
                _ => {}
            }
        }
        let keeper = keeper.with_context(|| format!("no keeper runs over {marker}"))?;
        memory.sandboxes = tree(&processes, keeper).filter(|process| process.pid != keeper).map(Process::proportional).sum();
        Ok(memory)
    }
}

#[derive(Debug)]
struct Process {
    pid: u32,
    parent: u32,
    name: String,
    /// Its arguments.
    command: String,
    folder: PathBuf,
}

impl Process {
    fn resident(&self) -> u64 {
        self.read("status", "VmRSS")
    }

    /// Of each page that it shares with others its part.
    fn proportional(&self) -> u64 {
        self.read("smaps_rollup", "Pss")
    }

    /// Nothing, once it has ended.
    fn read(&self, file: &str, name: &str) -> u64 {
        fs::read_to_string(self.folder.join(file)).ok().and_then(|text| field(&text, name)).unwrap_or(0)
    }
}

/// By rising number: the keeper comes before what it started.
fn processes() -> Vec<Process> {
    let mut found: Vec<Process> = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| process(entry.path())).collect();
    found.sort_by_key(|process| process.pid);
    found
}

fn process(folder: PathBuf) -> Option<Process> {
    let pid = folder.file_name()?.to_str()?.parse().ok()?;
    let status = fs::read_to_string(folder.join("status")).ok()?;
    let word = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()));
    let command = fs::read(folder.join("cmdline")).ok()?;
    Some(Process {
        pid,
        parent: word("PPid")?.parse().ok()?,
        name: word("Name")?.to_owned(),
        command: String::from_utf8_lossy(&command).into_owned(),
        folder,
    })
}

/// A process and all that it started, and they.
fn tree(of: &[Process], root: u32) -> impl Iterator<Item = &Process> {
    let mut members = vec![root];
    let mut next = 0;
    while let Some(parent) = members.get(next).copied() {
        members.extend(of.iter().filter(|process| process.parent == parent).map(|process| process.pid));
        next += 1;
    }
    of.iter().filter(move |process| members.contains(&process.pid))
}

/// The field of this name in a file of `/proc` that has one a line, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_read_in_bytes_and_no_other_for_it() {
        let text = "VmRSSx:\t 1 kB\nVmRSS:\t  2048 kB\nName:\tkeeper\n";

        assert_eq!(field(text, "VmRSS"), Some(2 << 20));
        assert_eq!(field(text, "Name"), None);
    }

    #[test]
    fn this_process_is_found_below_its_parent() {
        let own = std::process::id();
        let all = processes();
        let parent = all.iter().find(|process| process.pid == own).map(|process| process.parent).unwrap();

        assert!(tree(&all, parent).any(|process| process.pid == own && process.resident() > 0));
    }
}
