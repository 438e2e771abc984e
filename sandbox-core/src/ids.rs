//! Id ranges and user namespaces: 65,536 host ids for each sandbox, shared with nobody while it lives.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
};

use nix::{
    sched::CloneFlags,
    unistd::{Gid, Uid},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::at,
    privileges,
    sys::{self, Cloned},
};

/// Ids in one range (what a 16-bit user id can name).
pub(crate) const RANGE: u32 = 65_536;

/// The first host id that is handed out: above what distributions give to users and container engines (systemd's UIDS-GIDS document).
pub(crate) const FIRST: u32 = 0x7000_0000;

/// The host ids of inits: one for each range, in none of them.
const FIRST_OF_INITS: u32 = 0x6ffe_0000;

/// The host id of the init of the sandbox with this range. Its namespace does not map it, so nobody inside can become it, whatever
/// capabilities he has there: calls that ask only whether two ids are the same (setpriority(2), prlimit(2), sched_setaffinity(2)) do not reach init.
pub(crate) const fn of_init(base: u32) -> u32 {
    FIRST_OF_INITS + (base - FIRST) / RANGE
}

/// The last id of a sandbox. No payload is started as it: it is gVisor's guest's, which has no ids but those inside.
pub(crate) const OF_GUEST: u32 = RANGE - 1;

/// Ranges of one keeper, handed out and taken back.
#[derive(Debug, Serialize, Deserialize)]
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
    let (ready, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let child = match sys::clone3(CloneFlags::empty(), false, None)? {
        Cloned::Child => hold_open(keeper, base, &tell),
        Cloned::Parent(child) => child,
    };
    drop(tell);
    let made = (|| {
        let mut said = [0; 4];
        if rustix::io::retry_on_intr(|| rustix::io::read(&ready, &mut said))? != said.len() {
            return Err(io::Error::other("the process that was to make a user namespace ended"));
        }
        match i32::from_le_bytes(said) {
            0 => {}
            errno => return Err(at("making a user namespace")(io::Error::from_raw_os_error(errno))),
        }
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

/// Makes the namespace, and keeps it alive until the keeper has a descriptor for it and kills this process, or dies.
fn hold_open(keeper: nix::unistd::Pid, base: u32, tell: &OwnedFd) -> ! {
    let errno = enter_new_namespace(base).map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
    let is_made = rustix::io::write(tell, &errno.to_le_bytes()).is_ok() && errno == 0;
    // A keeper that died before this process was bound to it sends no signal any more.
    while is_made && nix::unistd::getppid() == keeper {
        nix::unistd::pause();
    }
    std::process::exit(1)
}

/// The kernel charges what happens in a user namespace to its maker, too (inotify instances, pending signals, message queues). Made by
/// root, all sandboxes would share root's own limits; made by the sandbox's first id, each has its own.
fn enter_new_namespace(base: u32) -> io::Result<()> {
    nix::sys::prctl::set_keepcaps(true)?;
    nix::unistd::setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(base), Gid::from_raw(base));
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    // Where only the privileged may make user namespaces, this process still may.
    sys::set_capabilities(privileges::SYS_ADMIN)?;
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER)?;
    // Last: a change of ids takes it back.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_init_has_an_id_of_its_own_that_is_in_no_range() {
        let last = FIRST + (u32::MAX - FIRST) / RANGE * RANGE;
        assert_ne!(of_init(FIRST), of_init(FIRST + RANGE));
        assert!(of_init(FIRST) < FIRST && of_init(last) < 0x6fff_0000, "it would be in the range that a probe takes");
    }

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
