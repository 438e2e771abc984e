//! Handing sockets to sandboxes, on which the service works on their files ([`crate::tree`]). What is said there the keeper neither reads nor knows.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::{
    Keeper,
    connection::{failed, failed_at},
    control::Paused,
    records::State,
};
use crate::protocol::{Answer, FailureKind, SandboxId, init::Order};

impl Keeper {
    /// Passes the socket that came along to the init of a sandbox.
    pub(super) fn tree(&mut self, id: SandboxId, descriptors: Vec<OwnedFd>) -> Answer {
        let socket = match descriptors.into_iter().next() {
            // Anything else of the host's would be a way out for whoever is inside.
            Some(socket) if is_connected_stream(&socket) => socket,
            Some(_) | None => return failed(FailureKind::Refused, "a connected unix stream socket must come along"),
        };
        let Some(&State::Alive(serial)) = self.records.get(id) else {
            return failed(FailureKind::Gone, format!("no sandbox {id} runs"));
        };
        let Some(sandbox) = self.sandboxes.get(&serial) else { return failed(FailureKind::Gone, format!("no sandbox {id} runs")) };
        if sandbox.processes.is_some() {
            // What gVisor's kernel knows of its files it believes to be alone in changing.
            return failed(FailureKind::Refused, "the files of a sandbox under gVisor are gVisor's alone");
        }
        let Some(body) = sandbox.body.as_ref().filter(|body| sandbox.ending.is_none() && !body.init.is_dead) else {
            return failed(FailureKind::Gone, "the sandbox is over");
        };
        if sandbox.launched.is_none() {
            return failed(FailureKind::Busy, "the sandbox does not run yet");
        }
        // Whoever worked there would stand still, too.
        if sandbox.paused != Paused::No {
            return failed(FailureKind::Busy, "the sandbox is paused");
        }
        match body.init.control.send(&Order::Tree, &[socket.as_fd()]) {
            Ok(()) => Answer::Done,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => failed(FailureKind::Busy, "the sandbox's init has too much to do"),
            // Its death is told by its pidfd.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => failed(FailureKind::Gone, "the sandbox is over"),
            Err(error) => failed_at("handing the socket in", &error),
        }
    }
}

fn is_connected_stream(socket: &OwnedFd) -> bool {
    sockopt::socket_domain(socket).is_ok_and(|domain| domain == AddressFamily::UNIX)
        && sockopt::socket_type(socket).is_ok_and(|kind| kind == SocketType::STREAM)
        && rustix::net::getpeername(socket).is_ok()
}
