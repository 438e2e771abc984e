//! PID 1 of a sandbox: builds it, gives up privilege, starts the payload, reaps, reports.
//!
//! It is a program of its own, started afresh for each sandbox, so its memory holds nothing of another one. Payloads cannot trace or
//! signal it: it is not dumpable, runs as an id of its own, and the kernel shields PID 1 from signals of its own namespace.

mod exec;
pub mod guest;
mod gvisor;
mod payload;
mod setup;
pub(crate) mod terminal;
mod tree;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    time::{ClockId, clock_gettime},
};

use exec::Execs;
use payload::Place;
use tree::{Refused, Trees};

use crate::{
    error::{Kind, LaunchError, Step},
    protocol::{
        Isolation,
        init::{Layer, Order, Report, Setup, WaitStatus},
    },
    rootfs::Tree,
    sys, transport,
};

/// The number of the descriptor that init gets its orders on.
pub const CONTROL: i32 = 3;

/// The whole life of an init. Returns when the keeper is gone or the sandbox could not be started; the process then ends,
/// and with it everything in the sandbox (pid_namespaces(7)).
pub fn run() -> io::Result<()> {
    let control = sys::inherited(CONTROL)?;
    sys::close_on_exec_from(3)?;
    let mut descriptors = VecDeque::new();
    let failure = match live(&control, &mut descriptors) {
        Ok(()) => return Ok(()),
        Err(failure) => failure,
    };
    let report = Report::Failed { kind: failure.kind, message: failure.to_string() };
    transport::send(control.as_fd(), &report, &[])?;
    // The keeper reads the report and then kills this process; leaving first would race with the report.
    receive(&control, &mut descriptors).map(drop)
}

fn live(control: &OwnedFd, descriptors: &mut VecDeque<OwnedFd>) -> Result<(), LaunchError> {
    let Some(Order::Setup(setup)) = receive(control, descriptors).step("reading the orders")? else {
        return Err(unexpected()).step("reading the orders");
    };
    let joined_at_us = setup::join_cgroups(setup.cgroup_hierarchies, setup.fences, descriptors)?;
    let disks = Disks::receive(control, &setup, descriptors)?;
    if setup.isolation == Isolation::Gvisor {
        return gvisor::live(control, &setup, disks, descriptors);
    }
    let tree = setup::enter(&setup, disks, descriptors)?;
    transport::send(control.as_fd(), &Report::Ready, &[]).step("reporting that the sandbox is built")?;
    let start = match receive(control, descriptors).step("reading the orders")? {
        Some(Order::Start(start)) => start,
        // Nothing ever runs here.
        Some(Order::Tree) => return visit(control, &tree, descriptors).step("working on files"),
        Some(
            Order::Setup(_)
            | Order::Layer
            | Order::Volumes { .. }
            | Order::Below
            | Order::Kill
            | Order::Signal { .. }
            | Order::Exec(_)
            | Order::KillExec { .. },
        )
        | None => {
            return Err(unexpected()).step("reading the orders");
        }
    };
    let payload = payload::start(&start, &Place::of(&setup, &tree), std::mem::take(descriptors))?;
    // Still a child that nobody has reaped, so the number is its own.
    let pidfd = rustix::process::Pid::from_raw(payload.pid).ok_or_else(unexpected).step("finding the payload")?;
    let pidfd = rustix::process::pidfd_open(pidfd, rustix::process::PidfdFlags::empty()).step("finding the payload")?;
    let started_cpu_us = own_cpu_us();
    let started = Report::Started { at_ns: payload.started_at_ns, own_cpu_us: started_cpu_us.saturating_sub(joined_at_us) };
    let brought: Vec<_> = [Some(pidfd.as_fd()), payload.terminal.as_ref().map(AsFd::as_fd)].into_iter().flatten().collect();
    transport::send(control.as_fd(), &started, &brought).step("reporting the start")?;
    drop(payload.terminal);
    let mut execs = Execs::new(&start, payload.identity, Place::of(&setup, &tree), &tree);
    let (status, at_ns) = supervise(control, payload.pid, &tree, descriptors, &mut execs).step("supervising")?;
    let space = rustix::fs::fstatfs(&tree.writable).step("reading the use of the writable layer")?;
    let ended = Report::Ended {
        status,
        at_ns,
        own_cpu_us: own_cpu_us().saturating_sub(started_cpu_us),
        // Not `f_bfree`: what ext4 keeps for itself is in that.
        is_disk_full: space.f_bavail == 0,
        are_inodes_used_up: space.f_ffree == 0,
    };
    transport::send(control.as_fd(), &ended, &[]).step("reporting the end")?;
    // Nothing is left to do but to hold the namespaces until the keeper has read the counters and kills this process.
    receive(control, descriptors).step("waiting for the end").map(drop)
}

/// What takes longer to make ready than an init to start.
#[derive(Debug)]
struct Disks {
    /// The writable layer, if it is not init's to make.
    layer: Option<OwnedFd>,
    /// What lies below it.
    below: Option<OwnedFd>,
    /// For each place of a volume, the number of the loop device that it is behind.
    volumes: Vec<u32>,
}

impl Disks {
    /// Waits for all that the setup says will come, in whatever order it comes.
    fn receive(control: &OwnedFd, setup: &Setup, descriptors: &mut VecDeque<OwnedFd>) -> Result<Self, LaunchError> {
        let has_layer = match setup.layer {
            Layer::Own => false,
            Layer::New | Layer::Kept => true,
        };
        let mut disks = Self { layer: None, below: None, volumes: Vec::new() };
        while disks.layer.is_some() != has_layer || disks.below.is_some() != setup.has_below || disks.volumes.len() != setup.volumes.len() {
            match receive(control, descriptors).step("reading the orders")? {
                Some(Order::Layer) if has_layer => {
                    disks.layer = Some(descriptors.pop_back().ok_or_else(unexpected).step_on("reading the orders", "writable layer")?);
                }
                Some(Order::Below) if setup.has_below => {
                    disks.below = Some(descriptors.pop_back().ok_or_else(unexpected).step_on("reading the orders", "layer below")?);
                }
                Some(Order::Volumes { devices }) if devices.len() == setup.volumes.len() => disks.volumes = devices,
                Some(
                    Order::Setup(_)
                    | Order::Layer
                    | Order::Volumes { .. }
                    | Order::Below
                    | Order::Start(_)
                    | Order::Kill
                    | Order::Signal { .. }
                    | Order::Tree
                    | Order::Exec(_)
                    | Order::KillExec { .. },
                )
                | None => return Err(unexpected()).step("reading the orders"),
            }
        }
        Ok(disks)
    }
}

/// Waits until the payload has ended and everything else in the sandbox is dead too.
///
/// What outlives the payload — daemons that left its session, processes stopped or traced — becomes init's child and is killed.
fn supervise(
    control: &OwnedFd,
    payload: libc::pid_t,
    tree: &Tree,
    descriptors: &mut VecDeque<OwnedFd>,
    execs: &mut Execs<'_>,
) -> io::Result<(WaitStatus, u64)> {
    let children = setup::child_signals()?;
    let mut trees = Trees::default();
    let mut ended = None;
    loop {
        // Before any child is reaped: who is to be killed with all that he started must still be found by his number.
        while is_ordered(control)? {
            match receive(control, descriptors)? {
                Some(Order::Kill) => kill_all()?,
                Some(Order::Exec(order)) if ended.is_none() => execs.start(control, *order, std::mem::take(descriptors))?,
                // Its end is that of the sandbox.
                Some(Order::Exec(_)) => descriptors.clear(),
                Some(Order::KillExec { number }) => execs.kill(number)?,
                // When the payload is dead nobody is to be born any more.
                Some(Order::Tree) if ended.is_some() => drop(descriptors.pop_back()),
                Some(Order::Tree) => {
                    let socket = descriptors.pop_back().ok_or_else(unexpected)?;
                    if trees.serve(socket, tree) == Err(Refused::NoProcess) {
                        transport::send(control.as_fd(), &Report::TreeRefused, &[])?;
                    }
                }
                // The keeper is gone. Without it nothing holds this sandbox to its limits.
                None => std::process::exit(1),
                Some(Order::Setup(_) | Order::Layer | Order::Volumes { .. } | Order::Below | Order::Start(_) | Order::Signal { .. }) => {
                    return Err(unexpected());
                }
            }
        }
        loop {
            match sys::reap_with_cpu(-1, false) {
                Ok(Some((pid, status, _))) if pid == payload => {
                    ended = Some((status, monotonic_ns()));
                    kill_all()?;
                }
                Ok(Some((pid, status, cpu_us))) => {
                    trees.reaped(pid);
                    execs.ended(control, pid, status, cpu_us)?;
                }
                Ok(None) => break,
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                    return ended.ok_or_else(|| io::Error::other("the payload vanished"));
                }
                Err(error) => return Err(error),
            }
        }
        let mut ready = vec![PollFd::new(control, PollFlags::IN), PollFd::new(&children, PollFlags::IN)];
        ready.extend(execs.starting().map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut ready, None))?;
        drop(ready);
        execs.listen(control)?;
        while children.read_signal()?.is_some() {}
    }
}

/// Whether an order waits to be read, or the keeper is gone.
fn is_ordered(control: &OwnedFd) -> io::Result<bool> {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ready = [PollFd::new(control, PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut ready, Some(&now)))? > 0)
}

/// The life of an init that never has a payload: it has others work on files, until the keeper kills it.
fn visit(control: &OwnedFd, tree: &Tree, descriptors: &mut VecDeque<OwnedFd>) -> io::Result<()> {
    let children = setup::child_signals()?;
    let mut trees = Trees::default();
    let (mut served, mut told) = (0, 0);
    loop {
        // The first came before this was begun.
        while let Some(socket) = descriptors.pop_front() {
            served += 1;
            drop(trees.serve(socket, tree));
        }
        while let Ok(Some((pid, _))) = sys::reap(-1, false) {
            trees.reaped(pid);
        }
        if trees.is_empty() && told < served {
            told = served;
            transport::send(control.as_fd(), &Report::TreesOver { served }, &[])?;
        }
        let mut ready = [PollFd::new(control, PollFlags::IN), PollFd::new(&children, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut ready, None))?;
        if !ready[1].revents().is_empty() {
            while children.read_signal()?.is_some() {}
        }
        if !ready[0].revents().is_empty() {
            match receive(control, descriptors)? {
                Some(Order::Tree) => {}
                Some(Order::Kill) => kill_all()?,
                None => std::process::exit(1),
                Some(
                    Order::Setup(_)
                    | Order::Layer
                    | Order::Volumes { .. }
                    | Order::Below
                    | Order::Start(_)
                    | Order::Signal { .. }
                    | Order::Exec(_)
                    | Order::KillExec { .. },
                ) => return Err(unexpected()),
            }
        }
    }
}

/// SIGKILL to everything in the pid namespace but this process; the kernel walks its list under a lock, so no fork escapes (kill(2)).
fn kill_all() -> io::Result<()> {
    match nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), nix::sys::signal::Signal::SIGKILL) {
        Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The next order; its descriptors join the queue. `None`: the keeper closed its end.
fn receive(control: &OwnedFd, descriptors: &mut VecDeque<OwnedFd>) -> io::Result<Option<Order>> {
    Ok(transport::recv(control.as_fd())?.map(|datagram| {
        descriptors.extend(datagram.descriptors);
        datagram.message
    }))
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an order came out of order")
}

/// Takes the next descriptor that came with the orders.
fn next(descriptors: &mut VecDeque<OwnedFd>, what: &'static str) -> Result<OwnedFd, LaunchError> {
    descriptors.pop_front().ok_or_else(unexpected).step_on("reading the orders", what)
}

fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

fn own_cpu_us() -> u64 {
    nanoseconds(ClockId::ProcessCPUTime) / 1000
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// An error of a request that can never work, in words of our own.
fn never(step: &'static str, target: impl std::fmt::Display, why: impl Into<String>) -> LaunchError {
    LaunchError { kind: Kind::Spec, step, target: target.to_string(), source: io::Error::other(why.into()) }
}
