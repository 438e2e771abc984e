//! What payloads write: from the pipe, under the output limit, into the log file.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSlice, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::terminal::{Master, Terminal};
use crate::{
    log::{self, Kind, Record},
    protocol::{Ending, OutputPolicy, SandboxId},
};

/// Where output goes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Sink {
    /// The log file of a sandbox, with the number of the next record and the file's length.
    Log {
        #[serde(with = "crate::handover")]
        file: File,
        next_seq: u64,
        len: u64,
        /// Whether a part of a record stands behind that length, which could not be cut off.
        #[serde(default)]
        is_torn: bool,
    },
    /// A program of our own: what it says is for the keeper. Standard output and error.
    Memory { stdout: Vec<u8>, stderr: Vec<u8> },
}

/// The two streams of one sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Output {
    sink: Sink,
    limit_bytes: u64,
    policy: OutputPolicy,
    stdout: Stream,
    stderr: Stream,
    /// Records that the disk had no room for, in order. While there are any, nothing more is read, and the payload waits in its write.
    #[serde(default)]
    held: VecDeque<Held>,
    /// The pause before the next look for room in the log, in nanoseconds.
    #[serde(default)]
    room_pause_ns: u64,
    /// Read in place of the first one's pipe, while it stands.
    #[serde(default)]
    terminal: Option<Terminal>,
    /// Both streams are one terminal's.
    #[serde(default)]
    is_terminal: bool,
    /// When something was last read, kept or not.
    #[serde(default)]
    written_at_us: Option<u64>,
}

/// A record that is not written yet.
#[derive(Debug, Serialize, Deserialize)]
struct Held {
    kind: Kind,
    at_us: u64,
    data: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stream {
    /// `None` once every writer has closed it.
    #[serde(with = "crate::handover")]
    pipe: Option<OwnedFd>,
    written_bytes: u64,
    /// Within the limit: kept, held, or lost.
    kept_bytes: u64,
    /// What could not be written to the log.
    #[serde(default)]
    lost_bytes: u64,
}

/// How far [`Output::pump`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// There may be more.
    More,
    /// The pipe is empty for now.
    Empty,
    /// Every writer has closed it.
    Closed,
    /// What was read before waits for room on the disk ([`Output::write_held`]).
    Held,
}

/// The time between the first two looks for room on the disk of the logs, and the longest between any two.
const ROOM_AGAIN_AFTER_NS: u64 = 50_000_000;
const ROOM_AGAIN_AT_LEAST_EVERY_NS: u64 = 1_000_000_000;

/// Reads of one stream before the others get their turn.
const READS_PER_TURN: usize = 8;
/// Reads that empty the largest pipe (`/proc/sys/fs/pipe-max-size`, 1 MiB), with room to spare.
const READS_TO_DRAIN: usize = 32;

impl Sink {
    /// Makes the log file of a sandbox, readable by `group`.
    pub(super) fn log(folder: &Path, id: SandboxId, group: u32) -> io::Result<Self> {
        let path = log::path(folder, id);
        let file = File::options().append(true).create_new(true).mode(0o640).open(&path)?;
        if let Err(error) = std::os::unix::fs::fchown(&file, None, Some(group)) {
            // Left there it would say that the sandbox was started.
            std::fs::remove_file(&path)?;
            return Err(error);
        }
        Ok(Self::Log { file, next_seq: 0, len: 0, is_torn: false })
    }
}

impl Output {
    /// Reads from these reading ends of pipes, which must not block; or without them from a terminal, whose master comes later ([`Output::attach`]).
    pub(super) fn new(sink: Sink, limit_bytes: u64, policy: OutputPolicy, pipes: Option<(OwnedFd, OwnedFd)>) -> Self {
        let stream = |pipe| Stream { pipe, written_bytes: 0, kept_bytes: 0, lost_bytes: 0 };
        let is_terminal = pipes.is_none();
        let (stdout, stderr) = pipes.unzip();
        let (stdout, stderr) = (stream(stdout), stream(stderr));
        Self {
            sink,
            limit_bytes,
            policy,
            stdout,
            stderr,
            held: VecDeque::new(),
            room_pause_ns: 0,
            terminal: None,
            is_terminal,
            written_at_us: None,
        }
    }

    /// Reads from this terminal. Nothing, if it is not one's.
    pub(super) fn attach(&mut self, master: Master) {
        if self.is_terminal {
            self.terminal = Some(Terminal::new(master));
        }
    }

    /// While it stands.
    pub(super) fn terminal(&self) -> Option<&Terminal> {
        self.terminal.as_ref()
    }

    pub(super) fn terminal_mut(&mut self) -> Option<&mut Terminal> {
        self.terminal.as_mut()
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// How long to wait before the next look for room in the log: longer each time, until there was some.
    pub(super) fn next_room_pause_ns(&mut self) -> u64 {
        self.room_pause_ns = (self.room_pause_ns * 2).clamp(ROOM_AGAIN_AFTER_NS, ROOM_AGAIN_AT_LEAST_EVERY_NS);
        self.room_pause_ns
    }

    /// Reads nothing more from a stream whose writers have closed it. It must not be watched any more.
    pub(super) fn close_stream(&mut self, kind: Kind) {
        self.stream_mut(kind).pipe = None;
        if let Some(terminal) = self.terminal.as_mut().filter(|_| kind == Kind::Stdout) {
            terminal.leave();
        }
    }

    pub(super) fn pipe(&self, kind: Kind) -> Option<BorrowedFd<'_>> {
        match &self.terminal {
            Some(terminal) if kind == Kind::Stdout => (!terminal.is_left()).then(|| terminal.as_fd()),
            Some(_) | None => self.stream(kind).pipe.as_ref().map(AsFd::as_fd),
        }
    }

    /// Bytes that the payload wrote to a stream, kept or not.
    pub(super) fn written_bytes(&self, kind: Kind) -> u64 {
        self.stream(kind).written_bytes
    }

    /// When the payload last wrote something. One that waits for our disk would write now, if it could.
    pub(super) fn written_at_us(&self, now_us: u64) -> Option<u64> {
        if self.is_held() { Some(now_us) } else { self.written_at_us }
    }

    /// Whether something of a stream was not kept.
    pub(super) fn is_truncated(&self, kind: Kind) -> bool {
        let stream = self.stream(kind);
        stream.lost_bytes > 0 || stream.written_bytes > stream.kept_bytes
    }

    /// Whether the payload wrote more to one of them than is kept.
    pub(super) fn exceeds_limit(&self) -> bool {
        [&self.stdout, &self.stderr].into_iter().any(|stream| stream.written_bytes > stream.kept_bytes)
    }

    /// Whether the payload wrote more than it may and is to be ended for it.
    pub(super) fn is_over_limit(&self) -> bool {
        self.policy == OutputPolicy::Kill && self.exceeds_limit()
    }

    /// What was written to [`Sink::Memory`].
    pub(super) fn memory(&self) -> Option<(&[u8], &[u8])> {
        match &self.sink {
            Sink::Memory { stdout, stderr } => Some((stdout, stderr)),
            Sink::Log { .. } => None,
        }
    }

    /// Moves what is in the pipe to the sink, for one turn. `buffer` holds at most [`log::DATA_BYTES_MAX`] bytes.
    pub(super) fn pump(&mut self, kind: Kind, buffer: &mut [u8], at_us: u64) -> io::Result<Pumped> {
        for _ in 0..READS_PER_TURN {
            if self.is_held() {
                return Ok(Pumped::Held);
            }
            match self.read(kind, buffer, at_us)? {
                Pumped::More => {}
                end @ (Pumped::Empty | Pumped::Closed | Pumped::Held) => return Ok(end),
            }
        }
        Ok(Pumped::More)
    }

    /// Takes in all that is left in the pipe of one that is over, room or not. Every writer is dead or about to die; more than a pipe holds
    /// can only come from one that is not dead yet. After an error, too, the rest is taken in and counted.
    pub(super) fn drain(&mut self, kind: Kind, buffer: &mut [u8], at_us: u64) -> io::Result<()> {
        let mut drained = Ok(());
        for _ in 0..READS_TO_DRAIN {
            match self.read(kind, buffer, at_us) {
                Ok(Pumped::More | Pumped::Held) => {}
                Ok(Pumped::Empty | Pumped::Closed) => break,
                Err(error) => drained = drained.and(Err(error)),
            }
        }
        drained
    }

    /// Whether something waits for room on the disk.
    pub(super) fn is_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// Writes what waits for room. False: there is not enough yet.
    pub(super) fn write_held(&mut self) -> io::Result<bool> {
        while let Some(Held { kind, at_us, data }) = self.held.front() {
            match self.sink.append(*kind, data, *at_us) {
                Ok(()) => drop(self.held.pop_front()),
                Err(error) if is_no_room(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.room_pause_ns = 0;
        Ok(true)
    }

    fn read(&mut self, kind: Kind, buffer: &mut [u8], at_us: u64) -> io::Result<Pumped> {
        let Some(pipe) = self.pipe(kind) else { return Ok(Pumped::Closed) };
        if self.is_terminal {
            // The init that made it has had the same open file, and may have switched this off.
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        match rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut *buffer)) {
            // A terminal that nobody has open any more says so by an error.
            Ok(0) | Err(rustix::io::Errno::IO) => Ok(Pumped::Closed),
            Ok(len) => self.keep(kind, &buffer[..len], at_us).map(|()| Pumped::More),
            Err(rustix::io::Errno::AGAIN) => Ok(Pumped::Empty),
            Err(error) => Err(error.into()),
        }
    }

    fn keep(&mut self, kind: Kind, data: &[u8], at_us: u64) -> io::Result<()> {
        let limit_bytes = if self.policy == OutputPolicy::Discard { 0 } else { self.limit_bytes };
        self.written_at_us = Some(at_us);
        let stream = self.stream_mut(kind);
        stream.written_bytes += data.len() as u64;
        let room = usize::try_from(limit_bytes.saturating_sub(stream.kept_bytes)).unwrap_or(usize::MAX);
        let kept = &data[..data.len().min(room)];
        if kept.is_empty() {
            return Ok(());
        }
        stream.kept_bytes += kept.len() as u64;
        // Nothing follows a gap.
        if self.stdout.lost_bytes + self.stderr.lost_bytes > 0 {
            self.stream_mut(kind).lost_bytes += kept.len() as u64;
            return Ok(());
        }
        let is_behind = self.is_held();
        match if is_behind { Err(io::ErrorKind::StorageFull.into()) } else { self.sink.append(kind, kept, at_us) } {
            Err(error) if is_no_room(&error) => {
                self.held.push_back(Held { kind, at_us, data: kept.to_vec() });
                Ok(())
            }
            Err(error) => {
                self.stream_mut(kind).lost_bytes += kept.len() as u64;
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Gives up what waits for room: it is lost.
    pub(super) fn lose_held(&mut self) {
        for Held { kind, data, .. } in std::mem::take(&mut self.held) {
            self.stream_mut(kind).lost_bytes += data.len() as u64;
        }
    }

    /// Writes what is held and how it ended, behind which nothing follows. Both streams are closed from here on. After an error for want of room
    /// ([`is_no_room`]) it can be tried again, or be given up.
    pub(super) fn finish(&mut self, ending: &Ending) -> io::Result<()> {
        self.stdout.pipe = None;
        self.stderr.pipe = None;
        self.terminal = None;
        let Sink::Log { .. } = self.sink else { return Ok(()) };
        if !self.write_held()? {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.sink.append(Kind::End, &log::encode_ending(ending), ending.ended_at_us)?;
        self.close();
        Ok(())
    }

    /// Writes nothing any more.
    pub(super) fn close(&mut self) {
        self.held.clear();
        // What is left of the sandbox may take long to go; the descriptor need not.
        if let Sink::Log { .. } = self.sink {
            self.sink = Sink::Memory { stdout: Vec::new(), stderr: Vec::new() };
        }
    }

    fn stream(&self, kind: Kind) -> &Stream {
        if kind == Kind::Stderr { &self.stderr } else { &self.stdout }
    }

    fn stream_mut(&mut self, kind: Kind) -> &mut Stream {
        if kind == Kind::Stderr { &mut self.stderr } else { &mut self.stdout }
    }
}

/// Whether a write failed because the disk is full, for now.
pub(super) fn is_no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Sink {
    /// Appends one record with one write. `data` holds at most [`log::DATA_BYTES_MAX`] bytes.
    pub(super) fn append(&mut self, kind: Kind, data: &[u8], at_us: u64) -> io::Result<()> {
        match self {
            Self::Memory { stdout, .. } if kind == Kind::Stdout => stdout.extend_from_slice(data),
            Self::Memory { stderr, .. } => stderr.extend_from_slice(data),
            Self::Log { file, next_seq, len, is_torn } => {
                if *is_torn {
                    file.set_len(*len)?;
                    *is_torn = false;
                }
                let record = Record { kind, seq: *next_seq, at_us, data };
                let header = record.header();
                let whole = header.len() + data.len();
                match file.write_vectored(&[IoSlice::new(&header), IoSlice::new(data)]) {
                    Ok(written) if written == whole => {}
                    // A full disk takes a part. Readers must never see half a record with others behind it.
                    Ok(_) => {
                        *is_torn = true;
                        file.set_len(*len)?;
                        *is_torn = false;
                        return Err(io::ErrorKind::StorageFull.into());
                    }
                    Err(error) => return Err(error),
                }
                *next_seq += 1;
                *len += whole as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(limit_bytes: u64, policy: OutputPolicy) -> (Output, File, File) {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let ((stdout, stdout_writer), (stderr, stderr_writer)) = (pipe(), pipe());
        let sink = Sink::Memory { stdout: Vec::new(), stderr: Vec::new() };
        (Output::new(sink, limit_bytes, policy, Some((stdout, stderr))), stdout_writer.into(), stderr_writer.into())
    }

    #[test]
    fn the_limit_keeps_exactly_its_bytes_of_each_stream_and_counts_the_rest() {
        let (mut output, mut stdout, mut stderr) = output(4, OutputPolicy::Truncate);
        stdout.write_all(b"abcdef").unwrap();
        stderr.write_all(b"xyz").unwrap();
        output.pump(Kind::Stdout, &mut [0; 3], 0).unwrap();
        output.pump(Kind::Stderr, &mut [0; 3], 0).unwrap();
        assert_eq!(output.memory(), Some((b"abcd".as_slice(), b"xyz".as_slice())));
        assert_eq!(output.written_bytes(Kind::Stdout), 6);
        assert!(output.is_truncated(Kind::Stdout) && !output.is_truncated(Kind::Stderr));
        assert!(!output.is_over_limit());
    }

    #[test]
    fn the_policy_kill_says_so_with_the_first_byte_too_many() {
        let (mut output, mut stdout, _stderr) = output(4, OutputPolicy::Kill);
        stdout.write_all(b"abcd").unwrap();
        output.pump(Kind::Stdout, &mut [0; 8], 0).unwrap();
        assert!(!output.is_over_limit());
        stdout.write_all(b"e").unwrap();
        output.pump(Kind::Stdout, &mut [0; 8], 0).unwrap();
        assert!(output.is_over_limit());
    }

    /// An output whose log is `file`.
    fn logged(file: File, is_torn: bool) -> (Output, File) {
        let (mut output, stdout, _) = output(100, OutputPolicy::Kill);
        output.sink = Sink::Log { file, next_seq: 0, len: 0, is_torn };
        (output, stdout)
    }

    #[test]
    fn what_could_not_be_written_is_told_as_not_kept_and_not_as_over_the_limit() {
        // Nothing can be written to the one for good, to the other for now.
        let full = || File::options().append(true).open("/dev/full").unwrap();
        for (file, is_held) in [(File::open("/dev/null").unwrap(), false), (full(), true)] {
            let (mut output, mut stdout) = logged(file, false);
            stdout.write_all(b"abcd").unwrap();
            let drained = output.drain(Kind::Stdout, &mut [0; 3], 0);
            assert_eq!((drained.is_ok(), output.is_held()), (is_held, is_held));
            assert_eq!(output.is_truncated(Kind::Stdout), !is_held);
            assert_eq!(output.written_at_us(9), Some(if is_held { 9 } else { 0 }));
            output.lose_held();
            assert!(output.is_truncated(Kind::Stdout) && !output.is_truncated(Kind::Stderr) && !output.is_over_limit());
            assert_eq!((output.written_bytes(Kind::Stdout), output.stdout.lost_bytes), (4, 4));
        }
    }

    #[test]
    fn nothing_is_written_behind_half_a_record_that_cannot_be_cut_off() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        for is_stuck in [false, true] {
            let mut file = File::from(memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
            file.write_all(b"half").unwrap();
            if is_stuck {
                fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
            }
            let same = file.try_clone().unwrap();
            let (mut output, _stdout) = logged(file, true);
            rustix::fs::seek(&same, rustix::fs::SeekFrom::Start(0)).unwrap();
            let written = output.sink.append(Kind::Stdout, b"abcd", 0);
            let len = usize::try_from(same.metadata().unwrap().len()).unwrap();
            assert_eq!((written.is_err(), len), (is_stuck, if is_stuck { 4 } else { log::HEADER_BYTES + 4 }));
        }
    }

    #[test]
    fn the_policy_discard_counts_only_and_knows_when() {
        let (mut output, mut stdout, _stderr) = output(100, OutputPolicy::Discard);
        output.pump(Kind::Stdout, &mut [0; 8], 6).unwrap();
        assert_eq!(output.written_at_us(9), None);
        stdout.write_all(b"abcd").unwrap();
        output.pump(Kind::Stdout, &mut [0; 8], 7).unwrap();
        output.pump(Kind::Stdout, &mut [0; 8], 8).unwrap();
        assert_eq!(output.written_at_us(9), Some(7));
        assert_eq!(output.memory(), Some((b"".as_slice(), b"".as_slice())));
        assert_eq!(output.written_bytes(Kind::Stdout), 4);
    }
}
