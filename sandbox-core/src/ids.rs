//! Id ranges and user namespaces: 65,536 host ids for each sandbox, shared with nobody while it lives.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
};

use nix::sched::CloneFlags;

use crate::sys::{self, Cloned};

/// Ids in one range (what a 16-bit user id can name).
pub(crate) const RANGE: u32 = 65_536;

/// The id inside that init runs as; no payload may.
pub(crate) const OF_INIT: u32 = RANGE - 1;

/// Ranges of one keeper, handed out and taken back.
#[derive(Debug)]
pub(crate) struct Ranges {
    /// Those that are free, the longest unused last taken: a range rests as long as possible between two sandboxes.
    free: std::collections::VecDeque<u32>,
}

impl Ranges {
    /// `count` ranges from host id `first` up.
    pub(crate) fn new(first: u32, count: u32) -> Self {
        Self { free: (0..count).map(|n| first + n * RANGE).collect() }
    }

    /// The first host id of a range that is nobody's; `None` when all are taken.
    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop_front()
    }

    /// Gives a range back. No process, mount or file of it may be left.
    pub(crate) fn give_back(&mut self, base: u32) {
        self.free.push_back(base);
    }
}

/// A user namespace that maps its ids 0 to 65,535 to the host's from `base` up.
///
/// It maps the layers of its sandbox and is entered last of all, so it owns no other namespace: not even root inside it can change a mount, a
/// route or a host name (user_namespaces(7), «Interaction of user namespaces and other types of namespaces»).
pub(crate) fn new_user_namespace(base: u32) -> io::Result<OwnedFd> {
    let keeper = nix::unistd::getpid();
    let child = match sys::clone3(CloneFlags::CLONE_NEWUSER, false, None)? {
        Cloned::Child => hold_open(keeper),
        Cloned::Parent(child) => child,
    };
    let made = (|| {
        let map = format!("0 {base} {RANGE}\n");
        // One write each: the kernel takes a map once and whole.
        File::options().write(true).open(format!("/proc/{}/uid_map", child.pid))?.write_all(map.as_bytes())?;
        File::options().write(true).open(format!("/proc/{}/gid_map", child.pid))?.write_all(map.as_bytes())?;
        File::open(format!("/proc/{}/ns/user", child.pid)).map(OwnedFd::from)
    })();
    rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL)?;
    sys::reap(child.pid, true)?;
    made
}

/// Keeps the namespace that this process was born in alive until the keeper has a descriptor for it and kills this process, or dies.
fn hold_open(keeper: nix::unistd::Pid) -> ! {
    let is_bound = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).is_ok();
    // A keeper that died before the line above sends no signal any more.
    while is_bound && nix::unistd::getppid() == keeper {
        nix::unistd::pause();
    }
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_given_to_one_sandbox_at_a_time() {
        let mut ranges = Ranges::new(1 << 30, 2);
        let first = ranges.take().unwrap();
        let second = ranges.take().unwrap();
        assert_eq!(first.abs_diff(second), RANGE);
        assert_eq!(ranges.take(), None);
        ranges.give_back(second);
        assert_eq!(ranges.take(), Some(second));
    }
}
