//! Writable layers on disk, made and removed by processes of their own: the keeper itself waits for no disk.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use super::{Keeper, Source, layer::Lent, warn, worker::Worker};
use crate::{
    disk::{Disks, Made, Order},
    error::at,
    protocol::{Cause, Medium, init},
    rootfs, transport,
};

/// The layer of one sandbox, and how far it is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Disk {
    Making(Worker),
    /// One that was kept is made ready again. Its only mount is with the worker, which so is not stopped: all that was written would go with it.
    Reusing(Worker),
    /// Its mount, which this keeps alive.
    Ready(#[serde(with = "crate::handover")] OwnedFd),
    Removing(Worker),
    Gone,
}

/// What a worker says: what it made, or why it failed.
type Said = Result<Option<Made>, String>;

impl Disk {
    /// Has somebody stand ready to make a layer, who waits for [`Disk::let_begin`]. The worker dies with the keeper.
    pub(super) fn begin(disks: &Disks, order: Order) -> io::Result<Self> {
        let worker = Worker::waiting(None, |socket, _| match disks.make(order) {
            Ok((mount, made)) => transport::send(socket, &Said::Ok(Some(made)), &[mount.as_fd()]),
            Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
        });
        worker.map(Self::Making)
    }

    /// The same for a layer that is to be kept, or one that was and is to be made ready: what comes of it are two mounts, the second of them to be kept.
    pub(super) fn begin_kept(disks: &Disks, medium: Medium, order: Order, label: Option<&str>, lent: Option<&Lent>) -> io::Result<Self> {
        let device = lent.and_then(|lent| lent.device);
        let work = |socket: BorrowedFd<'_>, used: Option<OwnedFd>| {
            let make = || -> io::Result<([OwnedFd; 2], Made)> {
                let (mount, made) = match (used, medium) {
                    (Some(used), _) => {
                        // Killed for want of memory, it would take the layer along.
                        super::claim::protect_child_from_oom();
                        (used, Made { device })
                    }
                    (None, Medium::Memory) => {
                        (rootfs::memory_layer(order.bytes, order.inodes, order.id_base, label)?, Made { device: None })
                    }
                    (None, Medium::Disk) => disks.make(order)?,
                };
                Ok((rootfs::two_of(&mount).map_err(at("making the layer one that stays"))?, made))
            };
            match make() {
                Ok(([own, kept], made)) => transport::send(socket, &Said::Ok(Some(made)), &[own.as_fd(), kept.as_fd()]),
                Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
            }
        };
        match lent {
            Some(lent) => Worker::waiting(Some(lent.mount.as_fd()), work).map(Self::Reusing),
            None => Worker::waiting(None, work).map(Self::Making),
        }
    }

    /// Has it be made: from here on there may be something by its name, and one that was kept is the worker's.
    pub(super) fn let_begin(&self) -> io::Result<()> {
        match self {
            Self::Making(worker) | Self::Reusing(worker) => worker.begin(),
            Self::Ready(_) | Self::Removing(_) | Self::Gone => Ok(()),
        }
    }

    /// Whether it is on its way, and nobody knows yet what comes of it.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Self::Making(_) | Self::Reusing(_))
    }

    /// What its worker says: `None` if it has ended, and else why it failed, if that is it.
    pub(super) fn said(&self) -> io::Result<Option<Option<String>>> {
        let (Self::Making(worker) | Self::Reusing(worker) | Self::Removing(worker)) = self else { return Ok(None) };
        match worker.said::<Said>() {
            Ok(said) => Ok(said.map(|datagram| datagram.message.err())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(None)),
            Err(error) => Err(error),
        }
    }

    /// Whether there is nothing of it any more, not even a process.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Gone)
    }

    /// Stops making it. What there is of it goes with the worker, or is removed when that has ended.
    pub(super) fn stop(&self) -> io::Result<()> {
        match self {
            Self::Making(worker) => worker.stop(),
            Self::Reusing(_) | Self::Ready(_) | Self::Removing(_) | Self::Gone => Ok(()),
        }
    }

    /// Starts to remove one that is ready. The worker outlives the keeper if it must.
    pub(super) fn remove(&mut self, disks: &Disks, project: u32, medium: Medium) -> io::Result<()> {
        let Self::Ready(mount) = self else { return Ok(()) };
        let worker = Worker::start(Some(mount.as_fd()), |socket, mount| {
            // Whoever lets go last has all the work of unmounting: not the keeper, which says when it has. If it dies, it has, too.
            Worker::wait_for_word(socket)?;
            let Some(mount) = mount.filter(|_| medium == Medium::Disk) else { return Ok(()) };
            match disks.remove(project, mount) {
                Ok(()) => Ok(()),
                Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
            }
        })?;
        let mount = std::mem::replace(self, Self::Gone);
        drop(mount);
        worker.begin()?;
        *self = Self::Removing(worker);
        Ok(())
    }

    /// Starts to remove what there is on disk by the name of one that has no mount any more.
    pub(super) fn discard(disks: &Disks, project: u32) -> io::Result<Self> {
        let worker = Worker::start(None, |socket, _| match disks.discard(project) {
            Ok(()) => Ok(()),
            Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
        });
        worker.map(Self::Removing)
    }

    /// The socket to be watched.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Making(worker) | Self::Reusing(worker) | Self::Removing(worker) => Some(worker.as_fd()),
            Self::Ready(_) | Self::Gone => None,
        }
    }
}

impl Keeper {
    /// What a worker has said, or that it has ended.
    pub(super) fn on_disk(&mut self, serial: u64) -> io::Result<()> {
        let io = self.sandboxes.get(&serial).map(|sandbox| sandbox.supervision.io);
        let Some(body) = self.body(serial) else { return Ok(()) };
        let Some(disk) = &mut body.disk else { return Ok(()) };
        let (Disk::Making(worker) | Disk::Reusing(worker) | Disk::Removing(worker)) = &*disk else { return Ok(()) };
        let said = match worker.said::<Said>() {
            Ok(said) => said,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let failure = match (said, &*disk) {
            (Some(datagram), Disk::Making(_) | Disk::Reusing(_)) => match (datagram.message, Mounts::from(datagram.descriptors)) {
                (Ok(Some(made)), Mounts { own: Some(mount), kept }) => {
                    let made_of = std::mem::replace(disk, Disk::Ready(mount));
                    // What is kept of one over another is the other, which does not come from here.
                    let is_over = body.is_over;
                    if !is_over {
                        body.kept = kept;
                    }
                    epoll_delete(&self.epoll, &made_of)?;
                    if !is_over {
                        self.layers.made(serial, made.device);
                    }
                    return self.hand_over(serial, made, io);
                }
                (Err(message), _) => message,
                (Ok(_), _) => "the writable layer came without its mount".to_owned(),
            },
            // It was told to stop, or was killed.
            (None, Disk::Making(_) | Disk::Reusing(_)) => "making the writable layer was ended".to_owned(),
            (Some(datagram), _) => {
                if let Err(message) = datagram.message {
                    warn(format_args!("removing a writable layer failed: {message}"));
                }
                // Its end follows.
                return Ok(());
            }
            (None, _) => {
                let removed = std::mem::replace(disk, Disk::Gone);
                epoll_delete(&self.epoll, &removed)?;
                return self.clean_up(serial);
            }
        };
        let given_up = std::mem::replace(disk, Disk::Gone);
        epoll_delete(&self.epoll, &given_up)?;
        self.end(serial, None, Some(Cause::InfraError { message: format!("making the writable layer failed: {failure}") }));
        self.kill_by_force(serial)?;
        self.discard_disk(serial)?;
        self.clean_up(serial)
    }

    /// Starts to remove what a maker left that was killed, if that does not go by itself.
    fn discard_disk(&mut self, serial: u64) -> io::Result<()> {
        if !self.disks.leaves_names() {
            return Ok(());
        }
        let disks = self.disks.clone();
        let Some(body) = self.body(serial) else { return Ok(()) };
        body.disk = Some(Disk::discard(&disks, body.project())?);
        self.watch_disk(serial)
    }

    /// Gives the finished layer to init, under its limits.
    fn hand_over(&mut self, serial: u64, made: Made, io: Option<crate::protocol::IoLimits>) -> io::Result<()> {
        let Some(body) = self.body(serial) else { return Ok(()) };
        if let (Some(device), Some(io)) = (made.device, io) {
            body.slot.group.limit_io_on_own(device, io)?;
        }
        if body.init.is_dead {
            return self.clean_up(serial);
        }
        let Some(Disk::Ready(mount)) = &body.disk else { return Ok(()) };
        match body.init.control.send(&init::Order::Layer, &[mount.as_fd()]) {
            // Its death is told by its pidfd.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }

    /// Takes the layer of a dead sandbox apart. True: there is nothing of it any more. Else it comes back ([`Keeper::on_disk`]).
    pub(super) fn remove_disk(&mut self, serial: u64) -> io::Result<bool> {
        let disks = self.disks.clone();
        let medium = self.sandboxes.get(&serial).map_or(Medium::Disk, |sandbox| sandbox.supervision.medium);
        let Some(body) = self.body(serial) else { return Ok(true) };
        let project = body.project();
        // A second one of the same would keep all of it alive.
        body.kept = None;
        let Some(disk) = body.disk.as_mut().filter(|disk| !disk.is_gone()) else { return Ok(true) };
        if !matches!(disk, Disk::Ready(_)) {
            return Ok(false);
        }
        disk.remove(&disks, project, medium)?;
        self.watch_disk(serial)?;
        Ok(false)
    }

    /// Watches the worker of a layer.
    pub(super) fn watch_disk(&mut self, serial: u64) -> io::Result<()> {
        let body = match self.sandboxes.get(&serial) {
            Some(sandbox) => sandbox.body.as_ref(),
            None => None,
        };
        match body.and_then(|body| body.disk.as_ref()?.socket()) {
            Some(socket) => self.watch(socket, Source::Disk, serial),
            None => Ok(()),
        }
    }
}

/// What comes from who makes a layer.
struct Mounts {
    own: Option<OwnedFd>,
    kept: Option<OwnedFd>,
}

impl From<Vec<OwnedFd>> for Mounts {
    fn from(brought: Vec<OwnedFd>) -> Self {
        let mut brought = brought.into_iter();
        Self { own: brought.next(), kept: brought.next() }
    }
}

fn epoll_delete(epoll: &OwnedFd, disk: &Disk) -> io::Result<()> {
    match disk.socket() {
        Some(socket) => Ok(epoll::delete(epoll, socket)?),
        None => Ok(()),
    }
}
