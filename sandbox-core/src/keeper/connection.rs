//! One connected service: who it is, and the answers that it has not taken yet.

use std::{collections::VecDeque, io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use crate::{
    error::shortage,
    protocol::{Answer, Call, Failure, FailureKind, Reply},
    transport::{Datagram, Socket},
};

/// Answers that may wait for one slow reader. A service that leaves more is disconnected; it finds everything again in the records.
const PENDING_MAX: usize = 8192;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Socket,
    pending: VecDeque<Reply>,
}

/// Where an answer is to go: a connection and the tag of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asker {
    pub(super) connection: u64,
    pub(super) tag: u64,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket: socket.into(), pending: VecDeque::new() }
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

    /// Sends an answer, or keeps it until the other side reads. Returns whether some now wait.
    pub(super) fn answer(&mut self, tag: u64, answer: Answer) -> io::Result<bool> {
        self.pending.push_back(Reply { tag, answer });
        self.flush()
    }

    /// Sends what waits, as far as it can. Returns whether some still wait.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while let Some(reply) = self.pending.front() {
            match self.socket.send(reply, &[]) {
                Ok(()) => {
                    self.pending.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.pending.len() <= PENDING_MAX => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
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
