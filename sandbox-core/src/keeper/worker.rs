//! Processes of the keeper's own for what may take long: the keeper itself waits for no disk, no memory, and no terminal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::process::pidfd_send_signal;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    sys::{self, Child, Cloned},
    transport::{self, Datagram, Socket},
};

/// A process that does one thing. When it has ended, this end of the socket says so.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Worker {
    child: Child,
    #[serde(with = "crate::handover")]
    socket: Socket,
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Worker {
    /// Clones a process that does `work` with its end of a socket and, if one is given, with a copy of a descriptor, and then ends. It outlives the
    /// keeper if it must.
    pub(super) fn start(
        given: Option<BorrowedFd<'_>>,
        work: impl FnOnce(BorrowedFd<'_>, Option<OwnedFd>) -> io::Result<()>,
    ) -> io::Result<Self> {
        let (socket, theirs) = Socket::pair()?;
        match sys::clone3(nix::sched::CloneFlags::empty(), false, None)? {
            Cloned::Parent(child) => Ok(Self { child, socket }),
            Cloned::Child => {
                super::claim::expose_to_oom();
                let done = keep_only(&theirs, given).and_then(|(socket, given)| work(socket.as_fd(), given));
                std::process::exit(if done.is_ok() { 0 } else { 1 });
            }
        }
    }

    /// One that dies with the keeper.
    pub(super) fn bound(
        given: Option<BorrowedFd<'_>>,
        work: impl FnOnce(BorrowedFd<'_>, Option<OwnedFd>) -> io::Result<()>,
    ) -> io::Result<Self> {
        let keeper = nix::unistd::getpid();
        Self::start(given, |socket, given| {
            // A keeper that died before this process was bound to it sends no signal any more.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            if nix::unistd::getppid() != keeper {
                return Ok(());
            }
            work(socket, given)
        })
    }

    /// Such a one that waits for [`Worker::begin`]. Dropped before that it ends and has done nothing.
    pub(super) fn waiting(
        given: Option<BorrowedFd<'_>>,
        work: impl FnOnce(BorrowedFd<'_>, Option<OwnedFd>) -> io::Result<()>,
    ) -> io::Result<Self> {
        Self::bound(given, |socket, given| if Self::wait_for_word(socket)? { work(socket, given) } else { Ok(()) })
    }

    /// For the process itself: waits until it is told to begin. False: nobody will tell it any more.
    pub(super) fn wait_for_word(socket: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(transport::recv::<Begin>(socket)?.is_some())
    }

    /// Has it begin.
    pub(super) fn begin(&self) -> io::Result<()> {
        self.socket.send(&Begin(true), &[])
    }

    /// Kills it; its end is told by the socket.
    pub(super) fn stop(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.child.pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What it says; `None` when it has ended. Fails with [`io::ErrorKind::WouldBlock`] while it says nothing.
    pub(super) fn said<T: DeserializeOwned>(&self) -> io::Result<Option<Datagram<T>>> {
        match self.socket.recv() {
            // It ended without having read all that it was told.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            said => said,
        }
    }
}

/// The word to begin. A message of no bytes could not be told from the end of the connection.
#[derive(Debug, Serialize, Deserialize)]
struct Begin(bool);

/// Closes everything but these two. A copy of a descriptor that the keeper closes would keep it alive, and watched.
fn keep_only(socket: &OwnedFd, given: Option<BorrowedFd<'_>>) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    const SOCKET: i32 = 3;
    const GIVEN: i32 = 4;
    // Modes are meant as they stand.
    rustix::process::umask(rustix::fs::Mode::empty());
    // Out of the way of those two numbers.
    let socket = rustix::io::fcntl_dupfd_cloexec(socket, GIVEN + 1)?;
    let given = given.map(|given| rustix::io::fcntl_dupfd_cloexec(given, GIVEN + 1)).transpose()?;
    sys::place_at(socket.as_fd(), SOCKET)?;
    if let Some(given) = &given {
        sys::place_at(given.as_fd(), GIVEN)?;
    }
    let has_given = given.is_some();
    drop((socket, given));
    sys::close_from(if has_given { 5 } else { 4 })?;
    sys::close_on_exec_from(3)?;
    Ok((sys::inherited(SOCKET)?, if has_given { Some(sys::inherited(GIVEN)?) } else { None }))
}
