//! A caller's side of the keeper's protocol that blocks: for tools and tests. A service with a reactor of its own uses [`crate::transport`].

use std::{
    collections::HashMap,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    protocol::{Answer, Call, Failure, FailureKind, Hello, Reply, Request, VERSION},
    transport::Socket,
};

/// A connection to a keeper.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    next_tag: u64,
    /// Answers that came before somebody asked for them.
    early: HashMap<u64, (Answer, Option<OwnedFd>)>,
}

/// A request that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag(u64);

impl Client {
    /// Connects, and makes sure that both sides speak the same version.
    pub fn connect(socket: &Path) -> io::Result<(Self, Hello)> {
        let mut client = Self { socket: Socket::connect(socket)?, next_tag: 0, early: HashMap::new() };
        let answer = client.call(&Request::Hello { version: VERSION }, &[])?;
        let Answer::Hello(hello) = answer else { return Err(io::Error::other(format!("the keeper answered {answer:?}"))) };
        Ok((client, hello))
    }

    /// Sends a request and waits for its answer. An answer of [`Answer::Failed`] is an answer, not an error.
    pub fn call(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        let tag = self.send(request, descriptors)?;
        self.receive(tag)
    }

    /// Sends a request.
    pub fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<Tag> {
        self.next_tag += 1;
        let call = Call { tag: self.next_tag, request: request.clone() };
        loop {
            match self.socket.send(&call, descriptors) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.ready(PollFlags::OUT)?,
                other => return other.map(|()| Tag(self.next_tag)),
            }
        }
    }

    /// Waits for the answer to a request that was sent.
    pub fn receive(&mut self, tag: Tag) -> io::Result<Answer> {
        self.receive_with(tag).map(|(answer, _)| answer)
    }

    /// [`Client::call`] for the answers that come with a descriptor.
    pub fn call_with(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<(Answer, Option<OwnedFd>)> {
        let tag = self.send(request, descriptors)?;
        self.receive_with(tag)
    }

    fn receive_with(&mut self, tag: Tag) -> io::Result<(Answer, Option<OwnedFd>)> {
        loop {
            if let Some(answer) = self.early.remove(&tag.0) {
                return Ok(answer);
            }
            match self.socket.recv::<Reply>() {
                Ok(Some(datagram)) => {
                    let Reply { tag, answer } = datagram.message;
                    self.early.insert(tag, (answer, datagram.descriptors.into_iter().next()));
                }
                Ok(None) => return Err(io::ErrorKind::ConnectionReset.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.ready(PollFlags::IN)?,
                Err(error) => return Err(error),
            }
        }
    }

    fn ready(&self, flags: PollFlags) -> io::Result<()> {
        rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&self.socket, flags)], None))?;
        Ok(())
    }
}

impl Answer {
    /// Turns [`Answer::Failed`] into an error.
    pub fn ok(self) -> Result<Self, Failure> {
        if let Self::Failed(failure) = self { Err(failure) } else { Ok(self) }
    }
}

impl Failure {
    /// Whether the keeper knows nothing of what was named.
    pub fn is_gone(&self) -> bool {
        self.kind == FailureKind::Gone
    }
}
