//! Network namespaces: loopback only, owned by the initial user namespace, so that nobody inside can add to them.

use std::{fs::File, io, os::fd::OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};

use crate::sys;

/// Makes network namespaces and starts processes in them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Networks {
    #[serde(with = "crate::handover")]
    own: OwnedFd,
}

impl Networks {
    /// Remembers the calling thread's own namespace.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { own: current()? })
    }

    /// A namespace with nothing but loopback, which is up.
    pub(crate) fn make(&self) -> io::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let made = sys::bring_loopback_up().and_then(|()| open_low_ports()).and_then(|()| current());
        self.come_home()?;
        made
    }

    /// Runs `action` inside `namespace`: a process that it clones is born there.
    pub(crate) fn inside<T>(&self, namespace: &OwnedFd, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let done = action();
        self.come_home()?;
        done
    }

    fn come_home(&self) -> io::Result<()> {
        Ok(setns(&self.own, CloneFlags::CLONE_NEWNET)?)
    }
}

/// Gives the host name `name` to the UTS namespace of the process behind `pidfd`, from outside: nobody inside may.
pub(crate) fn set_host_name(pidfd: &OwnedFd, own: &OwnedFd, name: &str) -> io::Result<()> {
    setns(pidfd, CloneFlags::CLONE_NEWUTS)?;
    let named = nix::unistd::sethostname(name);
    setns(own, CloneFlags::CLONE_NEWUTS)?;
    Ok(named?)
}

/// Anybody may listen on any port of a network that is his alone (ip-sysctl, `ip_unprivileged_port_start`), as under Docker. The file shows
/// the namespace of who opens it.
fn open_low_ports() -> io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
}

fn current() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Makes a network namespace in a thread of its own, to see whether it can be done.
pub(crate) fn try_new() -> io::Result<()> {
    let tried = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)).join();
    tried.unwrap_or_else(|_| Err(io::Error::other("the thread that tried it panicked")))
}
