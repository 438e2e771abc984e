//! A lower memory limit for a sandbox that runs: set by a process of its own, since the kernel first takes back what is too much, and a busy sandbox makes more of it meanwhile.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use super::{
    Keeper, Source,
    connection::{Asker, failed, failed_at},
    control::gone,
    monotonic_ns,
    timer::Due,
    warn,
    worker::Worker,
};
use crate::{
    cgroup,
    fail_point::reached,
    protocol::{Answer, FailureKind, NewLimits},
    transport,
};

/// How long the kernel may take.
const WITHIN_NS: u64 = 1_000_000_000;

/// One that is under way, after the other limits were set that came with it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Lowering {
    worker: Worker,
    limits: NewLimits,
    before: cgroup::Before,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    until_ns: u64,
    /// Connections do not outlive an upgrade.
    #[serde(skip)]
    asker: Option<Asker>,
}

/// What the process says: that it is done, or why not.
type Said = Result<(), String>;

impl Lowering {
    /// The socket to be watched.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.worker.as_fd()
    }
}

impl Keeper {
    /// Begins to lower it. Answers when it is lower, or when the limits are again what they were.
    pub(super) fn begin_lowering(
        &mut self,
        asker: Asker,
        serial: u64,
        limits: NewLimits,
        before: cgroup::Before,
        memory: cgroup::Lowering,
    ) -> io::Result<Option<Answer>> {
        let Some(body) = self.sandboxes.get(&serial).and_then(|sandbox| sandbox.body.as_ref()) else { return Ok(None) };
        let worker = Worker::waiting(Some(body.slot.group.memory_folder()), |socket, folder| {
            let folder = folder.ok_or_else(|| io::Error::other("it was given no folder"))?;
            transport::send(socket, &memory.run(folder.as_fd()).map_err(|error| error.to_string()), &[])
        });
        let until_ns = monotonic_ns() + WITHIN_NS;
        let begun = worker.and_then(|worker| {
            self.watch(worker.as_fd(), Source::Memory, serial)?;
            self.timer.set(until_ns, serial, Due::Lowering)?;
            worker.begin()?;
            Ok(worker)
        });
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(None) };
        match (begun, &mut sandbox.body) {
            (Ok(worker), _) => {
                sandbox.lowering = Some(Lowering { worker, limits, before, until_ns, asker: Some(asker) });
                reached("keeper.control.lowering");
                Ok(None)
            }
            (Err(error), Some(body)) => {
                body.slot.group.put_back(before)?;
                Ok(Some(failed_at("starting to lower the memory limit", &error)))
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Who lowers a limit has said how it went, or has ended.
    pub(super) fn on_lowered(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let Some(lowering) = &sandbox.lowering else { return Ok(()) };
        let said = match lowering.worker.said::<Said>() {
            Ok(Some(datagram)) => datagram.message,
            Ok(None) => Err("the kernel found too little that could be given back".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(Lowering { worker, limits, before, asker, .. }) = sandbox.lowering.take() else { return Ok(()) };
        epoll::delete(&self.epoll, &worker)?;
        drop(worker);
        let (is_over, Some(body)) = (sandbox.ending.is_some(), &mut sandbox.body) else { return Ok(()) };
        if is_over {
            return self.clean_up(serial);
        }
        let answer = match said {
            Ok(()) => {
                body.slot.group.lowered()?;
                self.changed(serial, limits)?
            }
            Err(why) => match body.slot.group.put_back(before) {
                Ok(()) => failed(FailureKind::Refused, format!("the kernel does not take it: {why}")),
                Err(worse) => failed_at(&format!("lowering the memory limit ({why})"), &worse),
            },
        };
        if let Some(asker) = asker {
            self.answer(asker, answer);
        }
        Ok(())
    }

    /// If its time is over, or its sandbox, it is ended, which [`Keeper::on_lowered`] then hears.
    pub(super) fn give_up_lowering(&mut self, serial: u64) {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return };
        let is_over = sandbox.ending.is_some();
        // The time that has come may be that of one before.
        let is_due = |lowering: &&mut Lowering| is_over || monotonic_ns() >= lowering.until_ns;
        let Some(lowering) = sandbox.lowering.as_mut().filter(is_due) else { return };
        if let Err(error) = lowering.worker.stop() {
            warn(format_args!("who lowers a memory limit cannot be stopped: {error}"));
        }
        if is_over && let Some(asker) = lowering.asker.take() {
            self.answer(asker, gone("the sandbox has ended".to_owned()));
        }
    }

    /// Whether somebody is still about to write to a file of its group, which so cannot be removed.
    pub(super) fn is_being_lowered(&self, serial: u64) -> bool {
        self.sandboxes.get(&serial).is_some_and(|sandbox| sandbox.lowering.is_some())
    }
}
