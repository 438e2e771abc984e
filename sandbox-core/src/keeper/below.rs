//! A fresh layer over a kept one: a process of its own makes the kept one ready to lie below, read-only, and hands it back at once.
//!
//! Its id range is the new sandbox's, so every owner stays right, and it has one such user at a time. What stays with the keeper is a mount of the whole; what the sandbox gets is
//! one of the files alone, through which nobody can write, and which dies with its namespace.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::event::epoll;

use super::{Keeper, layer::Lent, worker::Worker};
use crate::{
    protocol::{Cause, init},
    rootfs, transport,
};

/// What the process says, beside the two mounts: the sandbox's and the keeper's; or why there are none.
type Said = Result<(), String>;

/// Has a kept layer be made ready, once [`Worker::begin`] says so. From then on its only mount is with that process, which so is never stopped.
pub(super) fn make_ready(lent: &Lent) -> io::Result<Worker> {
    Worker::waiting(Some(lent.mount.as_fd()), |socket, mount| {
        // Killed for want of memory, it would take the layer along.
        super::claim::protect_child_from_oom();
        let mount = mount.ok_or_else(|| io::Error::other("it came without its mount"));
        match mount.and_then(|mount| rootfs::below_of(&mount)) {
            Ok([below, kept]) => transport::send(socket, &Said::Ok(()), &[below.as_fd(), kept.as_fd()]),
            Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
        }
    })
}

impl Keeper {
    /// Whoever makes a layer ready has said something, or has ended.
    pub(super) fn on_below(&mut self, serial: u64) -> io::Result<()> {
        let Some(body) = self.body(serial) else { return Ok(()) };
        let Some(worker) = &body.below else { return Ok(()) };
        let said = match worker.said::<Said>() {
            Ok(said) => said,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let done = body.below.take();
        let failure = match said {
            Some(datagram) => {
                let mut brought = datagram.descriptors.into_iter();
                match (datagram.message, brought.next(), brought.next()) {
                    (Ok(()), Some(below), Some(kept)) => {
                        body.kept = Some(kept);
                        self.unwatch_worker(done)?;
                        return self.give_below(serial, &below);
                    }
                    (Err(message), ..) => message,
                    (Ok(()), ..) => "it came without its mounts".to_owned(),
                }
            }
            None => "that was ended".to_owned(),
        };
        self.unwatch_worker(done)?;
        self.end(serial, None, Some(Cause::InfraError { message: format!("making the layer below ready failed: {failure}") }));
        self.kill_by_force(serial)?;
        self.clean_up(serial)
    }

    fn unwatch_worker(&self, worker: Option<Worker>) -> io::Result<()> {
        worker.map_or(Ok(()), |worker| Ok(epoll::delete(&self.epoll, &worker)?))
    }

    /// Gives it to init, under the limits of its sandbox.
    fn give_below(&mut self, serial: u64, below: &OwnedFd) -> io::Result<()> {
        let io = self.sandboxes.get(&serial).map(|sandbox| sandbox.supervision.io);
        let device = self.layers.device_of(serial);
        let Some(body) = self.body(serial) else { return Ok(()) };
        if let (Some(device), Some(io)) = (device, io) {
            body.slot.group.limit_io_on_shared(device, io)?;
        }
        if body.init.is_dead {
            return self.clean_up(serial);
        }
        match body.init.control.send(&init::Order::Below, &[below.as_fd()]) {
            // Its death is told by its pidfd.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }
}
