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

/// Bytes that came in and went out over all interfaces but loopback, in the namespace of a process.
pub(crate) fn traffic(pid: libc::pid_t) -> io::Result<(u64, u64)> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    sum(&table).ok_or_else(|| io::Error::other("the table of interfaces cannot be read"))
}

/// Lines like `eth0: 1296 16 0 0 0 0 0 0 1296 16 0 0 0 0 0 0` below two of headings (proc_pid_net(5)): first what came in, and from the ninth number on what went out.
fn sum(table: &str) -> Option<(u64, u64)> {
    let mut sum = (0, 0);
    for line in table.lines().skip(2) {
        let (name, numbers) = line.split_once(':')?;
        if name.trim() != "lo" {
            let mut numbers = numbers.split_whitespace().map(|number| number.parse::<u64>().ok());
            sum.0 += numbers.next()??;
            sum.1 += numbers.nth(7)??;
        }
    }
    Some(sum)
}

fn current() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Makes a network namespace in a thread of its own, to see whether it can be done.
pub(crate) fn try_new() -> io::Result<()> {
    let tried = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)).join();
    tried.unwrap_or_else(|_| Err(io::Error::other("the thread that tried it panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_is_that_of_every_interface_but_loopback() {
        let table = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo:    5       1    0    0    0     0          0         0     5       1    0    0    0     0       0          0\n  eth0:  100       2    0    0    0     0          0         0   200       3    0    0    0     0       0          0\n  eth1:    1       2    0    0    0     0          0         0     2       3    0    0    0     0       0          0\n";
        assert_eq!(sum(table), Some((101, 202)));
        assert_eq!(sum("a\nb\nnonsense\n"), None);
        assert!(traffic(std::process::id().cast_signed()).is_ok());
    }
}
