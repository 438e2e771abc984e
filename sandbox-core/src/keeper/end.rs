//! How a sandbox ends: the last output and the counters are read, the verdict is written and told, and what is left is taken apart.

use std::{io, os::fd::AsFd};

use rustix::process::pidfd_send_signal;

use super::{
    Keeper,
    control::Thaw,
    monotonic_ns,
    output::is_no_room,
    sandbox::{self, Ended, Evidence, Purpose},
    supervise::AGAIN_AFTER_NS,
    timer::Due,
    unix_us, warn,
};
use crate::{
    fail_point::reached,
    log::{self, Kind},
    protocol::{Answer, Cause},
};

/// The time between two attempts at a cgroup that cannot be removed.
const REMOVE_AGAIN_AFTER_NS: u64 = 1_000_000_000;
/// Reports that are read of an init that is dead.
const REPORTS_MAX: u32 = 1000;
/// How long an ending waits for room in its log.
pub(super) const TELL_WITHIN_NS: u64 = 30_000_000_000;

impl Keeper {
    /// The sandbox is over: reads the last output and the counters, notes the verdict, and answers. It is taken apart later.
    pub(super) fn end(&mut self, serial: u64, ended: Option<Ended>, failure: Option<Cause>) {
        if self.sandboxes.get(&serial).is_none_or(|sandbox| sandbox.ending.is_some() || sandbox.body.is_none()) {
            return;
        }
        if let Err(error) = self.unwatch_output(serial) {
            warn(format_args!("what a payload wrote is still watched: {error}"));
        }
        self.end_execs_of(serial);
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return };
        let Some(body) = &sandbox.body else { return };
        for kind in [Kind::Stdout, Kind::Stderr] {
            // The ending says what is lost. How it ended is known all the same.
            if let Err(error) = sandbox.output.drain(kind, &mut self.buffer, unix_us()) {
                warn(format_args!("writing the last output to a log failed: {error}"));
            }
        }
        reached("keeper.end.pumped");
        let mut failure = failure;
        let counters = body.slot.group.counters().unwrap_or_else(|error| {
            failure.get_or_insert(Cause::InfraError { message: format!("reading the usage failed: {error}") });
            crate::cgroup::Counters::default()
        });
        reached("keeper.end.counted");
        let evidence = Evidence { ended, counters, now_ns: monotonic_ns(), now_us: unix_us(), failure };
        let mut ending = sandbox.judge(evidence);
        log::bound_ending(&mut ending);
        sandbox.input = None;
        sandbox.ending = Some(ending);
        sandbox.tell_by_ns = monotonic_ns() + TELL_WITHIN_NS;
        self.give_up_lowering(serial);
        self.tell_end(serial);
    }

    /// Writes the ending to the log and tells it. If the disk has no room for it, or for what the payload wrote last, it waits a while for some.
    /// Then that output is given up, and the ending says so: how it ended is told as it was, or it would run again.
    pub(super) fn tell_end(&mut self, serial: u64) {
        // Theirs come first; the last of them comes back here.
        if self.has_execs(serial) {
            return;
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| !sandbox.is_told) else { return };
        let Some(mut ending) = sandbox.ending.clone() else { return };
        // Before anybody is told: what was said must hold after a kill of the keeper, too.
        if let Err(error) = sandbox.output.finish(&ending) {
            let now_ns = monotonic_ns();
            let may_wait = is_no_room(&error) && now_ns < sandbox.tell_by_ns && self.shutdown.is_none();
            if may_wait && self.timer.set(now_ns + sandbox.output.next_room_pause_ns(), serial, Due::Room).is_ok() {
                return;
            }
            warn(format_args!("ending a log failed: {error}"));
            sandbox.output.lose_held();
            ending.stdout_truncated |= sandbox.output.is_truncated(Kind::Stdout);
            ending.stderr_truncated |= sandbox.output.is_truncated(Kind::Stderr);
            sandbox.ending = Some(ending.clone());
            if let Err(error) = sandbox.output.finish(&ending) {
                warn(format_args!("how a sandbox ended is not in its log: {error}"));
            }
            sandbox.output.close();
        }
        reached("keeper.end.logged");
        sandbox.is_told = true;
        let is_taken_apart = sandbox.body.is_none();
        let askers = sandbox.take_askers();
        if let Purpose::Payload { id } = sandbox.purpose {
            self.records.ended(id, ending.clone());
            for asker in askers {
                self.answer(asker, Answer::Ended(Box::new(ending.clone())));
            }
            reached("keeper.end.answered");
        } else {
            self.unpacked(serial);
        }
        if is_taken_apart {
            self.sandboxes.remove(&serial);
        }
    }

    pub(super) fn on_init_death(&mut self, serial: u64) -> io::Result<()> {
        // All that it had said, before what is made of its silence.
        for _ in 0..REPORTS_MAX {
            self.on_report(serial)?;
            let said = self.body(serial).map(|body| rustix::io::ioctl_fionread(&body.init.control));
            if !matches!(said, Some(Ok(1..))) {
                break;
            }
        }
        // On v1 what is frozen does not die with its init.
        self.thaw(serial, Thaw::Ending)?;
        let Some(body) = self.body(serial) else { return Ok(()) };
        body.init.is_dead = true;
        self.unwatch(serial, |init| init.child.pidfd.as_fd())?;
        // Killed for want of memory, as the first of all that this machine has.
        self.lose_parked(serial, &"its init was killed");
        if let Some(sandbox) = self.sandboxes.get(&serial).filter(|sandbox| sandbox.ending.is_none()) {
            let is_started = sandbox.launched.is_some() || sandbox.decision.is_some();
            let never = || Cause::InfraError { message: "the sandbox's init ended before the payload started".to_owned() };
            self.end(serial, None, (!is_started).then(never));
        }
        self.clean_up(serial)
    }

    /// Takes apart what is left, off the reply path, again and again until the kernel has let go of all of it.
    pub(super) fn clean_up(&mut self, serial: u64) -> io::Result<()> {
        let Some(body) = self.body(serial) else { return Ok(()) };
        // Removing the group would wait for who writes to it, and who makes the layer below ready has the only mount of it; when they have ended, this is gone on with.
        if !body.init.is_dead || body.below.is_some() || self.is_being_lowered(serial) {
            return Ok(());
        }
        self.keep_layer(serial);
        // First of all: what its files have in memory is charged to its group.
        match self.remove_disk(serial) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => {
                warn(format_args!("removing a writable layer failed, and is tried again: {error}"));
                return self.timer.set(monotonic_ns() + REMOVE_AGAIN_AFTER_NS, serial, Due::Remove);
            }
        }
        if self.body(serial).is_some_and(|body| body.disk.is_some()) {
            reached("keeper.remove.disk");
        }
        let (has_layer, has_grown) = (self.layers.has_user(serial), self.layers.has_grown(serial));
        let Some(body) = self.body(serial) else { return Ok(()) };
        // What cannot be read is there.
        let has_any = |bytes: io::Result<u64>| bytes.map_or(true, |bytes| bytes > 0);
        let has_files = has_layer && if body.is_over { has_grown } else { has_any(body.slot.group.files_bytes()) };
        let removed = match body.slot.group.remove() {
            Ok(false) => body.slot.group.kill().map(|()| false),
            other => other,
        };
        match removed {
            Ok(true) => {}
            // Again and again: what is given up here would be left behind.
            Ok(false) => return self.timer.set(monotonic_ns() + AGAIN_AFTER_NS, serial, Due::Remove),
            Err(error) => {
                warn(format_args!("removing a cgroup failed, and is tried again: {error}"));
                return self.timer.set(monotonic_ns() + REMOVE_AGAIN_AFTER_NS, serial, Due::Remove);
            }
        }
        reached("keeper.remove.group");
        let id_base = body.slot.id_base;
        self.slots.give_back(id_base);
        self.layer_freed(serial, has_files);
        self.volumes_freed(serial);
        if self.lot.remove(serial).is_some() {
            return Ok(());
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        sandbox.body = None;
        sandbox.pending = None;
        if sandbox.is_told {
            self.sandboxes.remove(&serial);
        }
        reached("keeper.remove.done");
        Ok(())
    }
}

/// Init, and the making of its layer.
pub(super) fn kill_init(body: &sandbox::Body) -> io::Result<()> {
    if let Some(disk) = &body.disk {
        disk.stop()?;
    }
    if body.init.is_dead {
        return Ok(());
    }
    match pidfd_send_signal(&body.init.child.pidfd, rustix::process::Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
