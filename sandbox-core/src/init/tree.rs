//! Work on the files of a sandbox, from inside: a child of init's for each socket that the keeper hands in ([`crate::tree`]).
//!
//! It stands where the payload stands — the same root, namespaces, cgroups and fences, which it inherits — so there is nothing that a link or a
//! race could lead it out to. Towards files it is the sandbox's own root (setfsuid(2)), in everything else it keeps init's id, which no payload has: it cannot be
//! traced, and what stops or slows processes by their id does not reach it. It has no descriptor of init's but those that it works with.

mod archive;
mod changes;
mod draft;
mod files;
mod layer;
mod processes;
mod watch;

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nix::unistd::{Gid, Uid};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::{
    privileges,
    protocol::VERSION,
    rootfs::Tree,
    sys,
    tree::{AT_ONCE_MAX, Ask, BROKEN, Call, ContentReader, ContentWriter, Fault, FaultKind, Reply, read_frame, write_frame},
};

/// How long the other side may say nothing, or take nothing.
const IDLE: Duration = Duration::from_secs(60);
/// How long one of them lives at the most, in seconds.
const LIFE_S: u32 = 3600;
/// Descriptors of one: a few for each folder between it and the deepest one.
const DESCRIPTORS_MAX: u64 = 4096;

/// Those that are alive.
#[derive(Debug, Default)]
pub(super) struct Trees {
    alive: Vec<libc::pid_t>,
}

/// Why nobody was started for a socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    TooMany,
    /// The kernel refused a process, and counted that as a refusal of the sandbox's.
    NoProcess,
}

impl Trees {
    /// Starts one for this socket. If that is refused, the other side is told.
    pub(super) fn serve(&mut self, socket: OwnedFd, tree: &Tree) -> Result<(), Refused> {
        if self.alive.len() >= AT_ONCE_MAX {
            refuse(socket, format!("{AT_ONCE_MAX} work on the files of this sandbox already"));
            return Err(Refused::TooMany);
        }
        match sys::fork() {
            Ok(Some(pid)) => {
                self.alive.push(pid);
                Ok(())
            }
            Ok(None) => {
                let done = Worker::new(&socket, tree).and_then(|mut worker| worker.work());
                std::process::exit(if done.is_ok() { 0 } else { 1 });
            }
            Err(error) => {
                refuse(socket, format!("the sandbox has no room for a process that works on its files: {error}"));
                Err(Refused::NoProcess)
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.alive.is_empty()
    }

    /// A child of init's has ended.
    pub(super) fn reaped(&mut self, pid: libc::pid_t) {
        self.alive.retain(|alive| *alive != pid);
    }
}

/// Says no. The socket is new, so that there is room for that; whoever has filled it hears nothing.
fn refuse(socket: OwnedFd, message: String) {
    let reply = Reply::Failed(Fault { kind: FaultKind::Busy, message });
    let mut socket = UnixStream::from(socket);
    drop(socket.set_nonblocking(true).and_then(|()| write_frame(&mut socket, &reply)));
}

/// One that works, and all that it has.
#[derive(Debug)]
struct Worker {
    socket: UnixStream,
    place: Place,
}

/// Where it works.
#[derive(Debug)]
struct Place {
    root: OwnedFd,
    /// `/proc` itself, whatever lies over it.
    proc: OwnedFd,
    /// The writable layer without what lies below it.
    upper: OwnedFd,
    /// What lies below it, the topmost first.
    lower: Vec<OwnedFd>,
}

impl Worker {
    /// Turns the freshly forked child into one.
    fn new(socket: &OwnedFd, tree: &Tree) -> io::Result<Self> {
        let kept: Vec<_> = [socket, &tree.proc, &tree.upper].into_iter().chain(&tree.lower).map(AsFd::as_fd).collect();
        let mut owned = keep_only(&kept)?.into_iter();
        let mut next = || owned.next().ok_or_else(|| io::Error::other("there are fewer than before"));
        let (socket, proc, upper) = (next()?, next()?, next()?);
        let lower = owned.collect();
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // Modes are meant as they stand.
        rustix::process::umask(Mode::empty());
        sys::bound_rlimit(libc::RLIMIT_NOFILE, DESCRIPTORS_MAX, DESCRIPTORS_MAX)?;
        nix::unistd::setfsgid(Gid::from_raw(0));
        nix::unistd::setfsuid(Uid::from_raw(0));
        sys::set_capabilities(privileges::OF_TREE)?;
        // A signal that nobody handles: it ends this process, whatever it waits for.
        nix::unistd::alarm::set(LIFE_S);
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(IDLE))?;
        socket.set_write_timeout(Some(IDLE))?;
        Ok(Self { socket, place: Place { root, proc, upper, lower } })
    }

    /// Answers until the other side closes.
    fn work(&mut self) -> io::Result<()> {
        while let Some(call) = read_frame::<Call>(&mut self.socket)? {
            if call.version != VERSION {
                let message = format!("version {VERSION} is spoken here, not {}", call.version);
                write_frame(&mut self.socket, &Reply::Failed(Fault { kind: FaultKind::Refused, message }))?;
                return Ok(());
            }
            self.answer(call.ask)?;
        }
        Ok(())
    }

    /// An error is one of the socket's, after which nothing can be said there.
    fn answer(&mut self, ask: Ask) -> io::Result<()> {
        let Self { socket, place } = self;
        let done = match ask {
            Ask::Stat { path, link } => place.stat(&path, link).map(Reply::Entry),
            Ask::List { path, after, max } => place.list(&path, after.as_deref(), max),
            Ask::MakeFolder { path, has_parents, mode, owner } => place.make_folder(&path, has_parents, mode, owner).map(Reply::Entry),
            Ask::Remove { path, is_recursive } => place.remove(&path, is_recursive).map(|()| Reply::Done),
            Ask::Rename { from, to, existing } => place.rename(&from, &to, existing).map(Reply::Entry),
            Ask::Read { path, span } => match place.open_content(&path, span) {
                Ok((reply, content)) => {
                    write_frame(socket, &reply)?;
                    return stream(socket, |to| content.copy_to(to));
                }
                Err(fault) => Err(fault),
            },
            Ask::Pack { path, bytes_max } => match place.begin_pack(&path) {
                Ok(packing) => {
                    write_frame(socket, &Reply::Archive)?;
                    return stream(socket, |to| packing.write_to(to, bytes_max));
                }
                Err(fault) => Err(fault),
            },
            Ask::Layer { bytes_max, entries_max } => match place.begin_layer(entries_max) {
                Ok(packing) => {
                    write_frame(socket, &Reply::Archive)?;
                    return stream(socket, |to| packing.write_to(to, bytes_max));
                }
                Err(fault) => Err(fault),
            },
            Ask::Write { path, mode, owner, existing } => {
                let mut content = ContentReader::new(socket);
                let written = place.write(&path, mode, owner, existing, &mut content).map(Reply::Entry);
                return take_to_end(socket, written);
            }
            Ask::Unpack { path, bytes_max, entries_max } => {
                let mut content = ContentReader::new(socket);
                let unpacked = place.unpack(&path, &mut content, bytes_max, entries_max);
                return take_to_end(socket, unpacked);
            }
            Ask::Changes => place.changes(&mut *socket),
            Ask::Processes => place.processes(&mut *socket),
            Ask::Watch { path, is_recursive } => return watch::serve(place, socket, &path, is_recursive),
        };
        write_frame(socket, &done.unwrap_or_else(Reply::Failed))
    }
}

/// Sends content, and how it ended.
fn stream(socket: &mut UnixStream, content: impl FnOnce(&mut ContentWriter<'_, UnixStream>) -> Result<(), Fault>) -> io::Result<()> {
    match content(&mut ContentWriter(socket)) {
        Ok(()) => socket.write_all(&0_u32.to_le_bytes()),
        Err(fault) => {
            socket.write_all(&BROKEN.to_le_bytes())?;
            write_frame(socket, &Reply::Failed(fault))
        }
    }
}

/// Says what became of content that was sent here, which may not have been read to its end. The other side hears a refusal at once; what it sends on is read
/// and dropped, for with something unread a socket that is closed takes the answer with it.
fn take_to_end(socket: &mut UnixStream, done: Result<Reply, Fault>) -> io::Result<()> {
    match done {
        // Its content was read to the end, or it would be none.
        Ok(reply) => write_frame(socket, &reply),
        Err(fault) => {
            write_frame(socket, &Reply::Failed(fault))?;
            // Where it broke off is not known here, so nothing can follow it.
            io::copy(&mut (&*socket).take(u64::MAX), &mut io::sink())?;
            Err(io::ErrorKind::ConnectionAborted.into())
        }
    }
}

/// Closes everything but these, which come from number 3 up. A copy of init's socket would keep it open when init is gone. What owns the descriptors that are
/// closed here must never be dropped: this process ends without.
fn keep_only(kept: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
    const FIRST: i32 = 3;
    let end = FIRST + i32::try_from(kept.len()).map_err(io::Error::other)?;
    // Out of the way of those numbers.
    let parked: Vec<OwnedFd> = kept.iter().map(|kept| rustix::io::fcntl_dupfd_cloexec(kept, end)).collect::<Result<_, _>>()?;
    for (number, descriptor) in (FIRST..).zip(&parked) {
        sys::place_at(descriptor.as_fd(), number)?;
    }
    drop(parked);
    sys::close_from(end.cast_unsigned())?;
    sys::close_on_exec_from(FIRST.cast_unsigned())?;
    (FIRST..end).map(sys::inherited).collect()
}

/// A file that was found by `O_PATH`, opened for its content: this one, whatever has its name by now.
fn reopen(proc: &OwnedFd, found: &OwnedFd, flags: OFlags) -> Result<File, Errno> {
    use std::os::fd::AsRawFd;
    let path = format!("self/fd/{}", found.as_raw_fd());
    rustix::fs::openat(proc, path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

/// What an error of a system call means to a caller.
fn fault(errno: Errno) -> Fault {
    let kind = match errno {
        Errno::NOENT => FaultKind::NotFound,
        Errno::EXIST => FaultKind::Exists,
        Errno::NOTDIR | Errno::ISDIR | Errno::NOTEMPTY | Errno::XDEV | Errno::LOOP | Errno::OPNOTSUPP | Errno::NXIO | Errno::NODEV => {
            FaultKind::WrongKind
        }
        Errno::ACCESS | Errno::PERM | Errno::ROFS => FaultKind::Denied,
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::MLINK => FaultKind::Full,
        Errno::NAMETOOLONG => FaultKind::TooLarge,
        Errno::AGAIN | Errno::BUSY | Errno::TXTBSY | Errno::NOMEM => FaultKind::Busy,
        Errno::INVAL => FaultKind::Refused,
        _ => FaultKind::Failed,
    };
    Fault { kind, message: said(errno.raw_os_error()) }
}

/// The same of an error that may be no system call's.
fn io_fault(error: &io::Error) -> Fault {
    match error.raw_os_error() {
        Some(number) => fault(Errno::from_raw_os_error(number)),
        None => Fault { kind: FaultKind::Failed, message: error.to_string() },
    }
}

fn said(number: i32) -> String {
    // Without its number, which is nobody's to know.
    let text = io::Error::from_raw_os_error(number).to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn wrong_kind(message: &str) -> Fault {
    Fault { kind: FaultKind::WrongKind, message: message.to_owned() }
}

fn refused(message: &str) -> Fault {
    Fault { kind: FaultKind::Refused, message: message.to_owned() }
}

fn too_large(message: String) -> Fault {
    Fault { kind: FaultKind::TooLarge, message }
}
