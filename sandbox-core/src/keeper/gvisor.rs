//! The second runtime class, where the node has gVisor's `runsc`.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
};

use super::Options;
use crate::{
    fence::{Fence, Fences},
    protocol::{Isolation, Launch},
};

/// Where `runsc` is looked for if nobody says.
const FOLDERS: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];

/// The least memory that gVisor's kernel, its file server and a small payload live in.
pub(crate) const MEMORY_BYTES_MIN: u64 = 64 << 20;

/// Threads that gVisor's kernel has besides one for each process and thread of the guest.
const OWN_THREADS: u64 = 64;
/// Threads of everything else in the sandbox: `runsc`, its file server, our init.
const OTHER_THREADS: u64 = 1024;
/// The most threads of the host that one sandbox may have. What they take is charged to its memory, which is often less than so many need.
const HOST_PIDS_MAX: u64 = 32_768;

/// The program, open since the keeper's start: what is executed is what was there then, whatever is installed later.
#[derive(Debug)]
pub(super) struct Gvisor {
    pub(super) program: OwnedFd,
}

/// Where `runsc` is, if this machine has it.
pub(crate) fn find() -> Option<PathBuf> {
    FOLDERS.iter().map(|folder| Path::new(folder).join("runsc")).find(|path| path.is_file())
}

impl Gvisor {
    /// The one that the options name, or the one that is installed, if any.
    pub(super) fn open(options: &Options) -> io::Result<Option<Self>> {
        // Landlock and AppArmor forbid the mounts that gVisor's processes hide behind: a node that insists on one of those has no gVisor.
        let missing = options.required.without(fences(Fences::everywhere()));
        let Some(path) = options.runsc.clone().or_else(|| if missing.is_empty() { find() } else { None }) else { return Ok(None) };
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        if !missing.is_empty() {
            return Err(named(io::Error::other(format!("sandboxes under gVisor lack the required {missing:?}"))));
        }
        let file = File::open(&path).map_err(named)?;
        let metadata = file.metadata().map_err(named)?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err(named(io::Error::other("it is not a program")));
        }
        Ok(Some(Self { program: file.into() }))
    }
}

/// Which of a node's fences stand around a sandbox under gVisor. The filter of system calls is gVisor's own.
pub(super) fn fences(of_node: Fences) -> Fences {
    of_node.without(Fence::OF_SOME_HOSTS.into_iter().collect())
}

/// What a launch under gVisor asks for against what there is; a message for people if it cannot be had.
pub(super) fn check(launch: &Launch, offered: &[Isolation], memory_bytes: u64) -> Result<(), String> {
    if !offered.contains(&launch.isolation) {
        return Err("this node has no gVisor: its program runsc is not installed".to_owned());
    }
    if launch.isolation == Isolation::Gvisor && launch.terminal.is_some() {
        return Err("there are no terminals under gVisor".to_owned());
    }
    if launch.isolation == Isolation::Gvisor && memory_bytes < MEMORY_BYTES_MIN {
        return Err(format!("memory.limit must be at least {MEMORY_BYTES_MIN} bytes under gVisor, whose kernel counts as well"));
    }
    Ok(())
}

/// The pids limit of the cgroup on the host for `pids` processes in the guest, whose own limit is exact and is held inside.
///
/// With ptrace, each address space of the guest gets a thread on the host for each thread of gVisor's kernel that ever ran in it. A kernel that
/// is refused one ends, so this is what it can come to at the worst.
pub(super) fn host_pids(pids: u64) -> u64 {
    pids.saturating_mul(pids.saturating_add(OWN_THREADS)).saturating_add(OTHER_THREADS).min(HOST_PIDS_MAX)
}
