//! A look at the host from outside: processes, mounts and cgroups, to prove what is there and that nothing stays behind.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What one keeper and its service have on this host: what must be gone when they are.
#[derive(Debug, Clone)]
pub struct Footprint {
    /// The keeper, its service, and all that they started.
    processes: Vec<(u32, String)>,
    /// The keeper's number among those of this machine: it names its cgroups.
    number: String,
    /// Its own folders in every hierarchy. The number is the next keeper's as soon as this one is gone.
    groups: BTreeSet<(u64, u64)>,
    marker: String,
}

/// Loop devices before files below this folder, each with its file.
#[must_use]
pub fn loop_devices_of(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim()).starts_with(folder) {
            found.push(format!("{} on {}", device.file_name().display(), backing.trim()));
        }
    }
    found
}

impl Footprint {
    /// Of the keeper and service over `data_dir`. Both must run.
    #[must_use]
    pub fn of(keeper: u32, data_dir: &Path) -> Self {
        let marker = data_dir.display().to_string();
        let mut pids = processes_with(&marker);
        pids.extend(descendants(keeper));
        // A number that is used again belongs to another process, which the name tells in nearly all cases.
        let processes = pids.into_iter().map(|pid| (pid, status_field(pid, "Name").unwrap_or_default())).collect();
        let number = keeper_number(keeper);
        let groups = identities(&own_groups(&number));
        Self { processes, number, groups, marker }
    }

    /// What of it is still there: processes, cgroups in every hierarchy, mounts.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let alive = self.processes.iter().filter(|(pid, name)| status_field(*pid, "Name").as_ref() == Some(name));
        let mut left: Vec<_> = alive.map(|(pid, name)| format!("process {pid} ({name})")).collect();
        left.extend(processes_with(&self.marker).into_iter().map(|pid| format!("process {pid}: {}", command_line(pid))));
        let named_so = own_groups(&self.number);
        let (ours, others): (Vec<_>, Vec<_>) =
            named_so.into_iter().partition(|path| identity(path).is_some_and(|it| self.groups.contains(&it)));
        left.extend(
            cgroups()
                .into_iter()
                .filter(|path| ours.iter().any(|own| path.starts_with(own)))
                .map(|path| format!("cgroup {}", path.display())),
        );
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let stage = format!("/stage-{} ", self.number);
        // Where another keeper has the number, so it has the mount.
        let is_ours = |line: &str| line.contains(&self.marker) || others.is_empty() && line.contains(&stage);
        left.extend(mounts.lines().filter(|line| is_ours(line)).map(|line| format!("mount {line}")));
        left
    }

    /// Waits until nothing is left of it; returns what still is after the deadline.
    #[must_use]
    pub fn wait_until_gone(&self, deadline: Duration) -> Vec<String> {
        let started = Instant::now();
        loop {
            let left = self.left();
            if left.is_empty() || started.elapsed() > deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The number of a keeper among those of this machine. Panics if it does not run.
fn keeper_number(keeper: u32) -> String {
    try_keeper_number(keeper).expect("a keeper holds the lock of its number")
}

/// A keeper holds a lock that bears its number; `None` if it does not run.
#[must_use]
pub fn try_keeper_number(keeper: u32) -> Option<String> {
    let descriptors = fs::read_dir(format!("/proc/{keeper}/fd")).into_iter().flatten().flatten();
    let targets = descriptors.filter_map(|d| Some(fs::read_link(d.path()).ok()?.file_name()?.to_str()?.to_owned()));
    let mut numbers = targets.filter_map(|name| Some(name.strip_prefix("keeper-")?.strip_suffix(".lock")?.to_owned()));
    numbers.next()
}

/// Whether a keeper of this number lives: its lock is held. Looked up without taking it, which could keep a keeper from its number.
#[must_use]
pub fn is_keeper_alive(number: &str) -> bool {
    let Ok(lock) = fs::metadata(format!("/run/mayfly/keeper-{number}.lock")) else { return false };
    let held = fs::read_to_string("/proc/locks").unwrap_or_default();
    let inode = format!(":{} ", lock.ino());
    held.lines().any(|line| line.contains("FLOCK") && line.contains(&inode))
}

/// The folders that are named after a keeper, in every hierarchy.
fn own_groups(number: &str) -> Vec<PathBuf> {
    let own = Path::new("mayfly").join(format!("k{number}"));
    cgroups().into_iter().filter(|path| path.ends_with(&own)).collect()
}

/// What tells a folder from another of its name: device and inode.
fn identity(path: &PathBuf) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

fn identities(paths: &[PathBuf]) -> BTreeSet<(u64, u64)> {
    paths.iter().filter_map(identity).collect()
}

/// The identities of a keeper's own folders, in every hierarchy.
pub(crate) fn groups_of_keeper(number: &str) -> BTreeSet<(u64, u64)> {
    identities(&own_groups(number))
}

/// Every folder of ours below every mounted hierarchy.
pub(crate) fn cgroups() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut next = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((folder, depth)) = next.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_ours = contains(&path, Path::new("mayfly"));
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && (is_ours || depth < 2) {
                if is_ours {
                    found.push(path.clone());
                }
                next.push((path, depth + 1));
            }
        }
    }
    found
}

/// Whether `part`'s names stand in `path`, one behind the other.
fn contains(path: &Path, part: &Path) -> bool {
    let (names, wanted): (Vec<_>, Vec<_>) = (path.iter().collect(), part.iter().collect());
    names.windows(wanted.len()).any(|window| window == wanted)
}

/// Processes whose command line holds `text`, by id.
#[must_use]
pub fn processes_with(text: &str) -> Vec<u32> {
    let own = std::process::id();
    pids().filter(|pid| *pid != own && command_line(*pid).contains(text)).collect()
}

/// Every process of the host, by id.
pub fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
}

/// The arguments of a process, with blanks between them; empty if it is gone.
#[must_use]
pub fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// Whether a process runs: one that has ended and was not waited for yet does not.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    status_field(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

/// Whether somebody has the other end of the connection from `client` still open, though that one may be closed: what proc_pid_net(5) says of TCP over IPv4.
#[must_use]
pub fn holds_connection(client: SocketAddr) -> bool {
    /// `TCP_ESTABLISHED` and `TCP_CLOSE_WAIT`.
    const OPEN: [&str; 2] = ["01", "08"];
    let hex = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port()),
        IpAddr::V6(ip) => panic!("{ip} is in another table"),
    };
    let table = fs::read_to_string("/proc/net/tcp").expect("/proc is mounted");
    let client = hex(client);
    table.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().skip(1).take(3).collect();
        words.len() == 3 && words[1] == client && OPEN.contains(&words[2])
    })
}

/// A field of `/proc/PID/status`, without the blanks around it.
#[must_use]
pub fn status_field(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// The children of a process and theirs, in no order.
#[must_use]
pub fn descendants(of: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = pids().filter_map(|pid| Some((pid, status_field(pid, "PPid")?.parse().ok()?))).collect();
    let mut found = vec![of];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

/// Says that this test loads the machine as tests do. Held until dropped.
#[must_use]
pub fn busy() -> File {
    let file = lock_file();
    file.lock_shared().expect("flock works on a local file");
    file
}

/// Has the machine to itself among the tests, for what is measured in milliseconds. Held until dropped.
#[must_use]
pub fn quiet() -> File {
    let file = lock_file();
    file.lock().expect("flock works on a local file");
    file
}

fn lock_file() -> File {
    let path = std::env::temp_dir().join("mayfly-tests.lock");
    File::options().create(true).truncate(false).write(true).open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
