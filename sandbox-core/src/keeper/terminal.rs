//! Terminals of payloads and execs, as the keeper has them: who types there, how their input ends, how large they are, and who lets go of them.
//!
//! Not everything that is done to a master returns soon. Asking for a terminal's settings waits for whoever reads there or sets them, and the last close for
//! everybody who is in the middle of reading or writing (the kernel's driver-api/tty, «Locking»); what they read into may be memory that comes from a slow disk. So both are left
//! to processes of their own. Reading, writing and sizing wait for nobody inside.
//!
//! Nobody else is given a master: whoever has it could have the keeper's reads block, or read what is the log's. Who types writes to a pipe.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    fs::{FileType, makedev},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    termios::{SpecialCodeIndex, tcgetattr, tcsetwinsize},
};
use serde::{Deserialize, Serialize};

use super::{
    Keeper, Source,
    connection::{Asker, failed, failed_at},
    exec::output_of,
    monotonic_ns,
    timer::Due,
    warn,
    worker::Worker,
};
use crate::{
    handover::Descriptors,
    init::terminal,
    protocol::{Answer, FailureKind, WindowSize},
    transport,
};

/// How much of what is typed is read at once, and kept while the terminal takes no more.
const TYPED_BYTES_MAX: usize = 4096;
/// More than it takes to empty a pipe of the usual size (pipe(7)).
const READS_PER_TURN: usize = 32;
/// How long whoever ends an input waits for the terminal's settings.
const TYPE_WITHIN_NS: u64 = 1_000_000_000;

/// The master of a terminal. Dropped, it is closed by a process that has the time for it.
#[derive(Debug)]
pub(super) struct Master(Option<OwnedFd>);

/// A terminal that stands.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Terminal {
    #[serde(with = "crate::handover")]
    master: Master,
    /// Once somebody has asked for it.
    typing: Option<Typing>,
    /// Whether nobody had it open any more: it is read no more, and closed with its program's end, whom a close would hang up.
    is_left: bool,
}

/// What is typed, on its way from a pipe into the terminal.
#[derive(Debug, Serialize, Deserialize)]
struct Typing {
    #[serde(with = "crate::handover")]
    pipe: OwnedFd,
    /// Its writing end, to be given out.
    #[serde(with = "crate::handover")]
    keyboard: OwnedFd,
    /// What the terminal has not taken yet. While there is some, nothing more is read.
    waiting: Vec<u8>,
}

/// Somebody who types what ends the input of the terminal of `serial`.
#[derive(Debug)]
pub(super) struct Typist {
    serial: u64,
    worker: Worker,
    /// Who waits for it, until that is over.
    asker: Option<Asker>,
}

/// What such a one says.
#[derive(Debug, Serialize, Deserialize)]
enum Typed {
    Done,
    /// The terminal takes no more.
    Full,
    Failed(String),
}

impl Master {
    /// What an init says is one, once that is sure: whatever else it were, reading it could block.
    pub(super) fn of(descriptor: OwnedFd) -> io::Result<Self> {
        if !is_master(&descriptor)? {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an init gave something else for a terminal"));
        }
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self(Some(descriptor)))
    }
}

fn is_master(descriptor: &OwnedFd) -> io::Result<bool> {
    let stat = rustix::fs::fstat(descriptor)?;
    // `TTYAUX_MAJOR` and the number of `/dev/ptmx` (the kernel's admin-guide/devices.txt).
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == makedev(5, 2))
}

impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().expect("it is there until it is dropped").as_fd()
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        // A program on trial has something else in its place.
        let Some(master) = self.0.take().filter(|master| is_master(master).unwrap_or(true)) else { return };
        // It hears of the end of this one's socket when this one's copy is closed, and so closes the last.
        match Worker::start(Some(master.as_fd()), |socket, _master| Worker::wait_for_word(socket).map(drop)) {
            Ok(worker) => {
                drop(master);
                drop(worker);
            }
            Err(error) => {
                let number = master.into_raw_fd();
                warn(format_args!("a terminal stays open as {number}: there is no process that could close it: {error}"));
            }
        }
    }
}

impl Descriptors for Master {
    type Numbers = RawFd;
    fn numbers(&self) -> RawFd {
        self.0.as_ref().expect("it is there until it is dropped").numbers()
    }
    fn of(number: RawFd) -> io::Result<Self> {
        OwnedFd::of(number).map(|master| Self(Some(master)))
    }
}

impl AsFd for Terminal {
    /// The master.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

impl Terminal {
    pub(super) const fn new(master: Master) -> Self {
        Self { master, typing: None, is_left: false }
    }

    /// Nobody has it open any more.
    pub(super) fn leave(&mut self) {
        (self.is_left, self.typing) = (true, None);
    }

    pub(super) const fn is_left(&self) -> bool {
        self.is_left
    }

    /// What the master is to be watched for.
    pub(super) fn interest(&self) -> EventFlags {
        if self.is_full() { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN }
    }

    /// Where what is typed is read, if somebody could type.
    pub(super) fn typed(&self) -> Option<BorrowedFd<'_>> {
        self.typing.as_ref().map(|typing| typing.pipe.as_fd())
    }

    /// The same, if the terminal takes it.
    pub(super) fn awaited(&self) -> Option<BorrowedFd<'_>> {
        self.typed().filter(|_| !self.is_full())
    }

    /// Whether something was typed that the terminal does not take now.
    fn is_full(&self) -> bool {
        self.typing.as_ref().is_some_and(|typing| !typing.waiting.is_empty())
    }

    /// Whether everything that was typed is in the terminal.
    fn has_all(&self) -> io::Result<bool> {
        match &self.typing {
            Some(typing) => Ok(typing.waiting.is_empty() && rustix::io::ioctl_fionread(&typing.pipe)? == 0),
            None => Ok(true),
        }
    }

    /// The writing end for whoever types, which does not block.
    fn keyboard(&mut self) -> io::Result<OwnedFd> {
        let typing = match &mut self.typing {
            Some(typing) => typing,
            none => {
                let (pipe, keyboard) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
                none.insert(Typing { pipe, keyboard, waiting: Vec::new() })
            }
        };
        Ok(rustix::io::fcntl_dupfd_cloexec(&typing.keyboard, 0)?)
    }

    /// Moves what was typed into the terminal, for one turn.
    fn pump(&mut self) -> io::Result<()> {
        let Some(typing) = &mut self.typing else { return Ok(()) };
        // The init that made it has had the same open file, and may have switched this off.
        rustix::io::ioctl_fionbio(&self.master, true)?;
        for _ in 0..READS_PER_TURN {
            while !typing.waiting.is_empty() {
                match rustix::io::retry_on_intr(|| rustix::io::write(&self.master, &typing.waiting)) {
                    Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                    Ok(len) => drop(typing.waiting.drain(..len)),
                    // Nobody has it open any more, so nobody will ever read it.
                    Err(Errno::IO) => typing.waiting.clear(),
                    Err(error) => return Err(error.into()),
                }
            }
            let mut typed = [0; TYPED_BYTES_MAX];
            match rustix::io::retry_on_intr(|| rustix::io::read(&typing.pipe, &mut typed)) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(len) => typing.waiting.extend_from_slice(&typed[..len]),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Keeper {
    /// Where somebody can write what is typed at the terminal of a payload or an exec.
    pub(super) fn keyboard(&mut self, serial: u64) -> (Answer, Option<OwnedFd>) {
        let is_launched = self.is_launched(serial);
        let output = output_of(&mut self.sandboxes, &mut self.execs, serial);
        let is_held = output.as_ref().is_some_and(|output| output.is_held());
        let Some(terminal) = output.and_then(|output| output.terminal_mut()).filter(|terminal| !terminal.is_left) else {
            let why = if is_launched {
                failed(FailureKind::Gone, "nobody has the terminal open any more")
            } else {
                failed(FailureKind::Busy, "it does not run yet")
            };
            return (why, None);
        };
        let is_new = terminal.typed().is_none();
        let given = terminal.keyboard().and_then(|keyboard| {
            if let Some(typed) = terminal.typed().filter(|_| is_new && !is_held) {
                epoll::add(&self.epoll, typed, EventData::new_u64(Source::Typed.number(serial)), EventFlags::IN)?;
            }
            Ok(keyboard)
        });
        match given {
            Ok(keyboard) => (Answer::Descriptor, Some(keyboard)),
            Err(error) => (failed_at("handing out the input", &error), None),
        }
    }

    /// Something was typed, or the terminal takes more.
    pub(super) fn on_typed(&mut self, serial: u64) -> io::Result<()> {
        let output = output_of(&mut self.sandboxes, &mut self.execs, serial).filter(|output| !output.is_held());
        let Some(terminal) = output.and_then(|output| output.terminal_mut()) else { return Ok(()) };
        let was_full = terminal.is_full();
        terminal.pump()?;
        if terminal.is_full() == was_full {
            return Ok(());
        }
        epoll::modify(&self.epoll, terminal.as_fd(), EventData::new_u64(Source::Stdout.number(serial)), terminal.interest())?;
        match terminal.typed() {
            Some(typed) if was_full => {
                Ok(epoll::add(&self.epoll, typed, EventData::new_u64(Source::Typed.number(serial)), EventFlags::IN)?)
            }
            Some(typed) => Ok(epoll::delete(&self.epoll, typed)?),
            None => Ok(()),
        }
    }

    /// Has somebody type what ends the input there. `None`: the answer comes later.
    pub(super) fn end_typing(&mut self, asker: Asker, serial: u64) -> io::Result<Option<Answer>> {
        // Behind what was typed before.
        self.on_typed(serial)?;
        let output = output_of(&mut self.sandboxes, &mut self.execs, serial);
        let Some(terminal) = output.and_then(|output| output.terminal_mut()).filter(|terminal| !terminal.is_left) else {
            return Ok(Some(Answer::Done));
        };
        if !terminal.has_all()? || self.typists.values().any(|typist| typist.serial == serial) {
            return Ok(Some(full()));
        }
        let begun = Worker::bound(Some(terminal.as_fd()), |socket, master| {
            let master = master.ok_or_else(|| io::Error::other("it was given no terminal"))?;
            transport::send(socket, &type_end(&master), &[])
        });
        let number = self.serial();
        let begun = begun.and_then(|worker| {
            self.watch(worker.as_fd(), Source::Typist, number)?;
            self.timer.set(monotonic_ns() + TYPE_WITHIN_NS, number, Due::Typist)?;
            Ok(worker)
        });
        match begun {
            Ok(worker) => {
                self.typists.insert(number, Typist { serial, worker, asker: Some(asker) });
                Ok(None)
            }
            Err(error) => Ok(Some(failed_at("typing the end of the input", &error))),
        }
    }

    /// A typist has said how it went, or has ended.
    pub(super) fn on_typist(&mut self, number: u64) -> io::Result<()> {
        let Some(typist) = self.typists.get(&number) else { return Ok(()) };
        let said = match typist.worker.said::<Typed>() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Ok(Some(datagram)) => datagram.message,
            Ok(None) => Typed::Failed("who was to do it has ended".to_owned()),
            Err(error) => Typed::Failed(error.to_string()),
        };
        let Some(Typist { worker, asker, .. }) = self.typists.remove(&number) else { return Ok(()) };
        epoll::delete(&self.epoll, &worker)?;
        if let Some(asker) = asker {
            let answer = match said {
                Typed::Done => Answer::Done,
                Typed::Full => full(),
                Typed::Failed(why) => failed(FailureKind::Host, format!("typing the end of the input failed: {why}")),
            };
            self.answer(asker, answer);
        }
        Ok(())
    }

    /// It waits for somebody inside: whoever asked need not.
    pub(super) fn give_up_typist(&mut self, number: u64) {
        if let Some(asker) = self.typists.get_mut(&number).and_then(|typist| typist.asker.take()) {
            self.answer(asker, full());
        }
    }

    /// Tells the programs at the terminal of a payload or an exec how large it is.
    pub(super) fn resize_terminal(&mut self, serial: u64, size: WindowSize) -> Answer {
        let is_launched = self.is_launched(serial);
        let Some(output) = output_of(&mut self.sandboxes, &mut self.execs, serial).filter(|output| output.is_terminal()) else {
            return failed(FailureKind::Refused, "it has no terminal");
        };
        match output.terminal_mut().map(|terminal| tcsetwinsize(terminal, terminal::of(size))) {
            None if is_launched => Answer::Done,
            None => failed(FailureKind::Busy, "it does not run yet"),
            Some(Ok(())) => Answer::Done,
            Some(Err(error)) => failed_at("sizing the terminal", &error.into()),
        }
    }
}

fn full() -> Answer {
    failed(FailureKind::Busy, "the terminal has input that was not read yet")
}

/// What its user types at a terminal to end the input, as its programs have set it.
fn type_end(terminal: &OwnedFd) -> Typed {
    let typed = tcgetattr(terminal).and_then(|settings| rustix::io::write(terminal, &[settings.special_codes[SpecialCodeIndex::VEOF]]));
    match typed {
        Ok(1..) => Typed::Done,
        Ok(0) | Err(Errno::AGAIN) => Typed::Full,
        Err(error) => Typed::Failed(io::Error::from(error).to_string()),
    }
}
