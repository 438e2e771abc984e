//! Handing sockets to sandboxes, on which the service works on their files ([`crate::tree`]). What is said there the keeper neither reads nor knows.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::{
    Keeper,
    connection::{Asker, failed, failed_at},
    control::Paused,
    layer::Standing,
    records::State,
    sandbox::Purpose,
    unix_us,
};
use crate::{
    error::at,
    protocol::{Answer, FailureKind, Launched, SandboxId, init::Order},
};

/// Sockets that may wait for a sandbox without a payload to be built.
const WAITING_MAX: usize = 8;

impl Keeper {
    /// Passes the socket that came along to the init of a sandbox, or of one that is started for it alone.
    pub(super) fn tree(&mut self, asker: Asker, id: SandboxId, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let socket = match descriptors.into_iter().next() {
            // Anything else of the host's would be a way out for whoever is inside.
            Some(socket) if is_connected_stream(&socket) => socket,
            Some(_) | None => {
                self.answer(asker, failed(FailureKind::Refused, "a connected unix stream socket must come along"));
                return Ok(());
            }
        };
        let answer = match (self.records.get(id), self.layers.standing(id)) {
            (Some(State::Alive(_)), _) | (_, Standing::None) => self.tree_of_running(id, &socket),
            (_, Standing::Taken(serial)) => self.tree_of_visit(serial, socket),
            (_, Standing::Free(shape)) => {
                match self.check_visit(id).and_then(|()| self.check_number(Some(id)).map_err(|why| failed(FailureKind::Busy, why))) {
                    Ok(()) => {
                        self.visit(asker, id, shape, socket)?;
                        // Whether it came to nothing was said.
                        if matches!(self.layers.standing(id), Standing::Taken(_)) { Answer::Done } else { return Ok(()) }
                    }
                    Err(answer) => answer,
                }
            }
        };
        self.answer(asker, answer);
        Ok(())
    }

    /// Whoever has the layer of an ended sandbox works on its files already, or is what is left of that sandbox.
    fn tree_of_visit(&mut self, serial: u64, socket: OwnedFd) -> Answer {
        let busy = || failed(FailureKind::Busy, "what used the layer before is still being taken apart");
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return busy() };
        let (Purpose::Visit { sent, waiting, .. }, Some(body)) = (&mut sandbox.purpose, &sandbox.body) else { return busy() };
        if sandbox.launched.is_none() {
            if waiting.len() >= WAITING_MAX {
                return failed(FailureKind::Busy, "too many wait for these files");
            }
            waiting.push(socket);
            return Answer::Done;
        }
        match body.init.control.send(&Order::Tree, &[socket.as_fd()]) {
            Ok(()) => {
                *sent += 1;
                Answer::Done
            }
            Err(_) => busy(),
        }
    }

    /// A sandbox without a payload is built: whoever waits for it is let in.
    pub(super) fn begin_visit(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let (Some(body), Some(pending)) = (&mut sandbox.body, sandbox.pending.take()) else { return Ok(()) };
        let Purpose::Visit { sent, waiting, .. } = &mut sandbox.purpose else { return Ok(()) };
        body.slot.group.set_limits(pending.limits).map_err(at("setting the limits"))?;
        body.slot.group.limit_io(sandbox.supervision.io).map_err(at("setting the limits of input and output"))?;
        for socket in waiting.drain(..) {
            body.init.control.send(&Order::Tree, &[socket.as_fd()])?;
            *sent += 1;
        }
        sandbox.launched = Some(Launched { started_at_us: unix_us(), launch_us: 0, start: sandbox.start, fences: sandbox.fences });
        Ok(())
    }

    /// Nobody works on files there any more. If nobody was let in since that was said, it ends.
    pub(super) fn visit_over(&mut self, serial: u64, served: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return Ok(()) };
        if !matches!(sandbox.purpose, Purpose::Visit { sent, .. } if sent == served) {
            return Ok(());
        }
        self.end(serial, None, None);
        self.kill_by_force(serial)
    }

    fn tree_of_running(&self, id: SandboxId, socket: &OwnedFd) -> Answer {
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
