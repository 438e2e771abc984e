//! Volumes: made, mounted, let go of and removed by processes of their own, so that the keeper waits for no disk.
//!
//! One that sandboxes use is mounted once, for all of them, as long as one of them is there; each init makes a mount of its own of the same, mapped to its own ids.
//! What there is of volumes is the files in their folder: the next keeper finds those, and nothing else has to be remembered.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use super::{
    Keeper, Source,
    connection::{Asker, failed, failed_at},
    warn,
    worker::Worker,
};
use crate::{
    disk::volume::{Loop, Manner, Size},
    fail_point::reached,
    policy,
    protocol::{Answer, Cause, CgroupMode, FailureKind, Launch, VolumeId, init},
    transport,
};

/// Volumes that are made or removed at one time.
const ORDERS_MAX: usize = 32;

/// Those that are more than a file just now.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Volumes {
    used: HashMap<VolumeId, Used>,
    /// Those that are being made or removed, by the serial number of who does it.
    orders: HashMap<u64, Order>,
}

/// One that sandboxes use, or have used a moment ago.
#[derive(Debug, Serialize, Deserialize)]
struct Used {
    /// The serial numbers of the sandboxes.
    users: HashSet<u64>,
    state: State,
}

#[derive(Debug, Serialize, Deserialize)]
enum State {
    /// It is not mounted, and nobody is at it.
    Idle,
    Mounting(Work),
    Mounted(Mounted),
    LettingGo(Work),
}

#[derive(Debug, Serialize, Deserialize)]
struct Mounted {
    /// Attached nowhere; it keeps the loop device.
    #[serde(with = "crate::handover")]
    mount: OwnedFd,
    device: Loop,
}

/// Somebody who is at one.
#[derive(Debug, Serialize, Deserialize)]
struct Work {
    serial: u64,
    worker: Worker,
}

/// One that is being made or removed.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    volume: VolumeId,
    worker: Worker,
    kind: OrderKind,
    /// Connections do not outlive an upgrade.
    #[serde(skip)]
    asker: Option<Asker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum OrderKind {
    Make,
    Remove,
}

/// What a worker says: what it has mounted, or that it is done; or why it failed.
type Said = Result<Option<Loop>, String>;

impl Volumes {
    /// Whether nothing of any is left but its file.
    pub(super) fn is_empty(&self) -> bool {
        self.used.is_empty() && self.orders.is_empty()
    }

    /// The sockets of all who are at one.
    pub(super) fn workers(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        let of_used = self.used.values().filter_map(|used| used.work().map(|work| (work.serial, work.worker.as_fd())));
        of_used.chain(self.orders.iter().map(|(serial, order)| (*serial, order.worker.as_fd())))
    }

    fn mounted(&self, volume: VolumeId) -> Option<Loop> {
        match self.used.get(&volume)?.state {
            State::Mounted(Mounted { device, .. }) => Some(device),
            State::Idle | State::Mounting(_) | State::LettingGo(_) => None,
        }
    }

    fn order_of(&self, volume: VolumeId) -> Option<OrderKind> {
        self.orders.values().find(|order| order.volume == volume).map(|order| order.kind)
    }

    fn by_worker(&mut self, serial: u64) -> Option<(VolumeId, &mut Used)> {
        self.used.iter_mut().find(|(_, used)| used.work().is_some_and(|work| work.serial == serial)).map(|(volume, used)| (*volume, used))
    }
}

impl Used {
    const fn work(&self) -> Option<&Work> {
        match &self.state {
            State::Mounting(work) | State::LettingGo(work) => Some(work),
            State::Idle | State::Mounted(_) => None,
        }
    }
}

impl Keeper {
    /// Answers when the volume is there for good, or why it is not.
    pub(super) fn make_volume(&mut self, asker: Asker, volume: VolumeId, bytes: u64, inodes: u64) {
        if let Err(refused) = policy::check_volume(bytes, inodes) {
            return self.answer(asker, failed(FailureKind::Refused, refused.to_string()));
        }
        let size = Size { bytes, inodes };
        match self.volume_files.is_of_size(volume, size) {
            Ok(Some(true)) => self.answer(asker, Answer::Done),
            Ok(Some(false)) => self.answer(asker, failed(FailureKind::Refused, format!("volume {volume} is there with another size"))),
            Ok(None) => {
                let files = self.volume_files.clone();
                self.order(asker, volume, OrderKind::Make, move || files.make(volume, size));
            }
            Err(error) => self.answer(asker, failed_at("looking for the volume", &error)),
        }
    }

    /// Answers when nothing of the volume is left, unless somebody has it.
    pub(super) fn remove_volume(&mut self, asker: Asker, volume: VolumeId) {
        if self.volumes.used.get(&volume).is_some_and(|used| !used.users.is_empty()) {
            return self.answer(asker, failed(FailureKind::Busy, format!("a sandbox has volume {volume}")));
        }
        match self.volume_files.has(volume) {
            // One that is being made has no name yet.
            Ok(false) if self.volumes.order_of(volume).is_none() => self.answer(asker, Answer::Done),
            Ok(_) => {
                let files = self.volume_files.clone();
                self.order(asker, volume, OrderKind::Remove, move || files.remove(volume));
            }
            Err(error) => self.answer(asker, failed_at("looking for the volume", &error)),
        }
    }

    pub(super) fn list_volumes(&self) -> Answer {
        match self.volume_files.list() {
            Ok(volumes) => Answer::Volumes(volumes),
            Err(error) => failed_at("listing the volumes", &error),
        }
    }

    /// Has a process of its own do this, and answers when it has.
    fn order(&mut self, asker: Asker, volume: VolumeId, kind: OrderKind, work: impl FnOnce() -> io::Result<()>) {
        if self.shutdown.is_some() {
            return self.answer(asker, failed(FailureKind::Busy, "the keeper is stopping"));
        }
        if self.volumes.order_of(volume).is_some() {
            return self.answer(asker, failed(FailureKind::Busy, format!("volume {volume} is being made or removed")));
        }
        if self.volumes.orders.len() >= ORDERS_MAX {
            return self.answer(asker, failed(FailureKind::Busy, format!("{ORDERS_MAX} volumes are being made or removed")));
        }
        let begun = self.begin_work(|socket| match work() {
            Ok(()) => transport::send(socket, &Said::Ok(None), &[]),
            Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
        });
        match begun {
            Ok(Work { serial, worker }) => {
                self.volumes.orders.insert(serial, Order { volume, worker, kind, asker: Some(asker) });
                reached("keeper.volume.begun");
            }
            Err(error) => self.answer(asker, failed_at("starting to make or remove the volume", &error)),
        }
    }

    /// Starts a process that dies with the keeper, and watches what it says.
    fn begin_work(&mut self, work: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<Work> {
        let worker = Worker::bound(None, |socket, _| work(socket))?;
        let serial = self.serial();
        self.watch(worker.as_fd(), Source::Volume, serial)?;
        Ok(Work { serial, worker })
    }

    /// Whether a launch can have the volumes that it wants, as far as that can be told before it is begun.
    pub(super) fn check_volumes(&self, launch: &Launch) -> Result<(), Box<Answer>> {
        let wanted: HashSet<VolumeId> = launch.volumes.iter().map(|mount| mount.volume).collect();
        for &volume in &wanted {
            if self.volumes.order_of(volume) == Some(OrderKind::Remove) {
                return Err(Box::new(failed(FailureKind::Busy, format!("volume {volume} is being removed"))));
            }
            match self.volume_files.has(volume) {
                Ok(true) => {}
                Ok(false) => return Err(Box::new(failed(FailureKind::Refused, format!("this node has no volume {volume}")))),
                Err(error) => return Err(Box::new(failed_at("looking for the volume", &error))),
            }
        }
        let more = wanted.iter().filter(|volume| !self.volumes.used.contains_key(volume)).count();
        if self.volumes.used.len() + more > self.volumes_max {
            let max = self.volumes_max;
            return Err(Box::new(failed(FailureKind::Busy, format!("this keeper has descriptors for {max} volumes in use at a time"))));
        }
        Ok(())
    }

    /// Gives a sandbox that is being built its volumes: now, or when they are mounted.
    pub(super) fn use_volumes(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get(&serial).filter(|sandbox| !sandbox.volumes.is_empty()) else { return Ok(()) };
        let wanted: Vec<VolumeId> = sandbox.volumes.iter().map(|mount| mount.volume).collect();
        for volume in wanted {
            let used = self.volumes.used.entry(volume).or_insert_with(|| Used { users: HashSet::new(), state: State::Idle });
            used.users.insert(serial);
            if matches!(used.state, State::Idle) {
                self.begin_mount(volume)?;
            }
        }
        self.give_volumes(serial)
    }

    fn begin_mount(&mut self, volume: VolumeId) -> io::Result<()> {
        let files = self.volume_files.clone();
        let manner = Manner {
            is_synchronous: self.tree.mode() != CgroupMode::V2,
            label: self.labels.as_ref().and_then(|labels| labels.mount.clone()),
        };
        let work = self.begin_work(|socket| match files.mount(volume, &manner) {
            Ok((mount, device)) => transport::send(socket, &Said::Ok(Some(device)), &[mount.as_fd()]),
            Err(error) => transport::send(socket, &Said::Err(error.to_string()), &[]),
        })?;
        if let Some(used) = self.volumes.used.get_mut(&volume) {
            used.state = State::Mounting(work);
        }
        Ok(())
    }

    /// Tells init where its volumes are, once all of them are mounted.
    fn give_volumes(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| !sandbox.are_volumes_given) else { return Ok(()) };
        let Some(mounted) = sandbox.volumes.iter().map(|mount| self.volumes.mounted(mount.volume)).collect::<Option<Vec<_>>>() else {
            return Ok(());
        };
        let Some(body) = sandbox.body.as_mut().filter(|body| !body.init.is_dead) else { return Ok(()) };
        sandbox.are_volumes_given = true;
        for device in &mounted {
            body.slot.group.limit_io_on_shared(device.device, sandbox.supervision.io)?;
        }
        let order = init::Order::Volumes { devices: mounted.iter().map(|device| device.number).collect() };
        match body.init.control.send(&order, &[]) {
            // Its death is told by its pidfd.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }

    /// Nothing is left of a sandbox: what nobody else uses is let go of.
    pub(super) fn volumes_freed(&mut self, serial: u64) {
        let of_it = |(volume, used): (&VolumeId, &mut Used)| used.users.remove(&serial).then_some(*volume);
        let freed: Vec<VolumeId> = self.volumes.used.iter_mut().filter_map(of_it).collect();
        freed.into_iter().for_each(|volume| self.let_go_if_unused(volume));
    }

    fn let_go_if_unused(&mut self, volume: VolumeId) {
        let Some(used) = self.volumes.used.get_mut(&volume).filter(|used| used.users.is_empty()) else { return };
        match &used.state {
            State::Idle => drop(self.volumes.used.remove(&volume)),
            State::Mounted(_) => self.let_go(volume),
            // They come back here.
            State::Mounting(_) | State::LettingGo(_) => {}
        }
    }

    /// Whoever lets go last has all the work of unmounting, and waits for what is not written yet: not the keeper.
    fn let_go(&mut self, volume: VolumeId) {
        let Some(Used { state: State::Mounted(Mounted { mount, .. }), .. }) = self.volumes.used.remove(&volume) else { return };
        // It outlives the keeper if it must.
        let begun = Worker::start(Some(mount.as_fd()), |socket, mount| {
            // Told, or left alone: it lets go.
            let _told = Worker::wait_for_word(socket)?;
            drop(mount);
            Ok(())
        });
        drop(mount);
        let serial = self.serial();
        let watched = begun.and_then(|worker| {
            worker.begin()?;
            self.watch(worker.as_fd(), Source::Volume, serial)?;
            Ok(worker)
        });
        match watched {
            Ok(worker) => {
                let state = State::LettingGo(Work { serial, worker });
                self.volumes.used.insert(volume, Used { users: HashSet::new(), state });
            }
            // It is gone, or goes; whoever wants it next waits for that by the lock of its file.
            Err(error) => warn(format_args!("letting go of volume {volume} is not followed: {error}")),
        }
    }

    /// Who is at a volume says something, or has ended.
    pub(super) fn on_volume(&mut self, serial: u64) -> io::Result<()> {
        if self.volumes.orders.contains_key(&serial) {
            return self.on_volume_order(serial);
        }
        let Some((volume, used)) = self.volumes.by_worker(serial) else { return Ok(()) };
        let Some(work) = used.work() else { return Ok(()) };
        let said = work.worker.said::<Said>();
        if said.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return Ok(());
        }
        let before = std::mem::replace(&mut used.state, State::Idle);
        if let State::Mounting(work) | State::LettingGo(work) = &before {
            epoll::delete(&self.epoll, work.worker.as_fd())?;
        }
        if matches!(before, State::LettingGo(_)) {
            return self.volume_let_go(volume);
        }
        let (message, mount) = match said {
            Ok(Some(datagram)) => (datagram.message, datagram.descriptors.into_iter().next()),
            Ok(None) => (Err("mounting it was ended".to_owned()), None),
            Err(error) => (Err(error.to_string()), None),
        };
        match (message, mount) {
            (Ok(Some(device)), Some(mount)) => {
                if let Some(used) = self.volumes.used.get_mut(&volume) {
                    used.state = State::Mounted(Mounted { mount, device });
                }
                reached("keeper.volume.mounted");
                for user in self.users_of(volume) {
                    let given = self.give_volumes(user);
                    self.contain(Source::Control, user, given)?;
                }
            }
            (Ok(_), _) => self.fail_users(volume, "it came without its mount")?,
            (Err(message), _) => self.fail_users(volume, &message)?,
        }
        self.let_go_if_unused(volume);
        Ok(())
    }

    fn users_of(&self, volume: VolumeId) -> Vec<u64> {
        self.volumes.used.get(&volume).map(|used| used.users.iter().copied().collect()).unwrap_or_default()
    }

    /// It is let go of; somebody may want it by now.
    fn volume_let_go(&mut self, volume: VolumeId) -> io::Result<()> {
        if self.users_of(volume).is_empty() {
            self.volumes.used.remove(&volume);
            return Ok(());
        }
        match self.begin_mount(volume) {
            Ok(()) => Ok(()),
            Err(error) => self.fail_users(volume, &error.to_string()),
        }
    }

    /// Ends those that wait for a volume that could not be mounted.
    fn fail_users(&mut self, volume: VolumeId, why: &str) -> io::Result<()> {
        for user in self.users_of(volume) {
            self.end(user, None, Some(Cause::InfraError { message: format!("mounting volume {volume} failed: {why}") }));
            self.kill_by_force(user)?;
        }
        Ok(())
    }

    fn on_volume_order(&mut self, serial: u64) -> io::Result<()> {
        let Some(order) = self.volumes.orders.get(&serial) else { return Ok(()) };
        let said = order.worker.said::<Said>();
        if said.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return Ok(());
        }
        let Some(Order { volume, worker, kind, asker }) = self.volumes.orders.remove(&serial) else { return Ok(()) };
        epoll::delete(&self.epoll, worker.as_fd())?;
        drop(worker);
        let failure = match said {
            Ok(Some(datagram)) => datagram.message.err(),
            Ok(None) => Some("it was ended".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        reached("keeper.volume.done");
        let answer = match (failure, kind) {
            (None, _) => Answer::Done,
            (Some(why), OrderKind::Make) => failed(FailureKind::Host, format!("making volume {volume} failed: {why}")),
            (Some(why), OrderKind::Remove) => failed(FailureKind::Host, format!("removing volume {volume} failed: {why}")),
        };
        if let Some(asker) = asker {
            self.answer(asker, answer);
        }
        Ok(())
    }
}
