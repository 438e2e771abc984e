//! One connected service: who it is, and the answers that it has not taken yet.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::{
    error::shortage,
    protocol::{Answer, Call, Failure, FailureKind, Reply},
    transport::{Datagram, Socket},
};

/// Answers that may wait for one slow reader. A service that leaves more is disconnected; it finds everything again in the records.
const PENDING_MAX: usize = 8192;
/// The same, in bytes.
const PENDING_BYTES_MAX: usize = 16 << 20;

/// Descriptors among them.
const PENDING_DESCRIPTORS_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Socket,
    /// With what goes beside them, and their sizes as messages.
    pending: VecDeque<(Reply, Option<OwnedFd>, usize)>,
    pending_bytes: usize,
}

/// Where an answer is to go: a connection and the tag of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asker {
    pub(super) connection: u64,
    pub(super) tag: u64,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket: socket.into(), pending: VecDeque::new(), pending_bytes: 0 }
    }

    /// The next request; `None` when there is none now.
    pub(super) fn receive(&self) -> io::Result<Option<Datagram<Call>>> {
        match self.socket.recv() {
            Ok(Some(datagram)) => Ok(Some(datagram)),
            Ok(None) => Err(io::ErrorKind::ConnectionReset.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the other side is gone. What it sent before can still be read.
    pub(super) fn is_left(&self) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        // A hang-up and an error are told unasked (poll(2)).
        let mut looked_at = [PollFd::new(&self.socket, PollFlags::empty())];
        poll(&mut looked_at, Some(&now)).is_ok_and(|count| count > 0)
    }

    /// Sends an answer, or keeps it until the other side reads. Returns whether some now wait.
    pub(super) fn answer(&mut self, tag: u64, answer: Answer, descriptor: Option<OwnedFd>) -> io::Result<bool> {
        // One that does not read must not have the keeper hold descriptors without end.
        let is_one_too_many =
            descriptor.is_some() && self.pending.iter().filter(|(_, held, _)| held.is_some()).count() >= PENDING_DESCRIPTORS_MAX;
        let (answer, descriptor) = if is_one_too_many {
            (failed(FailureKind::Busy, "too many descriptors wait to be taken here"), None)
        } else {
            (answer, descriptor)
        };
        let reply = Reply { tag, answer };
        if self.pending.is_empty() {
            match send(&self.socket, &reply, descriptor.as_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done.map(|()| false),
            }
        }
        let bytes = postcard::to_stdvec(&reply).map_err(io::Error::other)?.len();
        self.pending.push_back((reply, descriptor, bytes));
        self.pending_bytes += bytes;
        if self.pending.len() > PENDING_MAX || self.pending_bytes > PENDING_BYTES_MAX {
            return Err(io::Error::other("more answers wait for it than the keeper keeps"));
        }
        self.flush()
    }

    /// Sends what waits, as far as it can. Returns whether some still wait.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while let Some((reply, descriptor, bytes)) = self.pending.front() {
            match send(&self.socket, reply, descriptor.as_ref()) {
                Ok(()) => {
                    self.pending_bytes -= bytes;
                    self.pending.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

fn send(socket: &Socket, reply: &Reply, descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let descriptors: Vec<_> = descriptor.map(AsFd::as_fd).into_iter().collect();
    socket.send(reply, &descriptors)
}

/// An answer that says at which step this machine failed, and of what it is out, if that was it: then it may work later.
pub(super) fn failed_at(step: &str, error: &io::Error) -> Answer {
    match shortage(error) {
        Some(what) => failed(FailureKind::Busy, format!("this node is out of {what}: {step} failed: {error}")),
        None => failed(FailureKind::Host, format!("{step} failed: {error}")),
    }
}

/// An answer that says no.
pub(super) fn failed(kind: FailureKind, message: impl ToString) -> Answer {
    Answer::Failed(Failure { kind, message: message.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_wait_in_order_for_a_slow_reader_and_not_without_bound() {
        let (ours, theirs) = Socket::pair().unwrap();
        let theirs = Socket::from(theirs);
        let mut connection = Connection { socket: ours, pending: VecDeque::new(), pending_bytes: 0 };
        let large = || failed(FailureKind::Host, "x".repeat(100_000));
        let mut asked = 0;
        let refused = loop {
            asked += 1;
            match connection.answer(asked, large(), None) {
                Ok(_) => assert!(asked < 1000, "there is no bound"),
                Err(error) => break error,
            }
        };
        assert!(refused.to_string().contains("more answers"), "{refused}");
        assert!(connection.pending_bytes < PENDING_BYTES_MAX + 200_000);
        for tag in 1..asked {
            let reply = theirs.recv::<Reply>().unwrap().unwrap().message;
            assert_eq!(reply.tag, tag);
            connection.flush().unwrap();
        }
        connection.flush().unwrap();
        drop(theirs.recv::<Reply>().unwrap());
        assert_eq!((connection.pending.len(), connection.pending_bytes), (0, 0));
    }
}
