//! Supervising: what inits report, what payloads write, what is due, and what is decided about each.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    process::pidfd_send_signal,
};

use super::{
    Keeper, Source,
    control::Thaw,
    end::kill_init,
    exec::{self, output_of},
    monotonic_ns,
    output::{Output, Pumped},
    sandbox::{self, Decision, Ended, Purpose},
    terminal::{Master, Terminal},
    timer::Due,
    unix_us, warn,
};
use crate::{
    fail_point::reached,
    log::Kind,
    protocol::{
        Answer, Cause, Launched,
        init::{Order, Report},
    },
};

/// How long init has for a kill of its own before all of it is killed from outside.
const FORCE_AFTER_NS: u64 = 50_000_000;
/// The time between two looks at a counter or a group that is not ready yet.
pub(super) const AGAIN_AFTER_NS: u64 = 1_000_000;
/// How often a counter is looked at for an OOM that was announced.
const OOM_LOOKS_MAX: u32 = 20;
/// CPU time that a sandbox may use beyond its limit before it is noticed, over all cores.
const CPU_OVERSHOOT_NS: u64 = 8_000_000;

impl Keeper {
    pub(super) fn on_report(&mut self, serial: u64) -> io::Result<()> {
        let Some(body) = self.body(serial) else { return Ok(()) };
        let descriptors;
        let report = match body.init.control.recv::<Report>() {
            Ok(Some(datagram)) => {
                descriptors = datagram.descriptors;
                datagram.message
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Init is dead or talks nonsense; its pidfd tells the rest.
            Ok(None) | Err(_) => {
                self.kill_by_force(serial)?;
                return self.unwatch(serial, |init| init.control.as_fd());
            }
        };
        match report {
            Report::Ready => match self.lot.get_mut(serial) {
                Some(parked) => {
                    let expected = self.slots.expected_limits().map_or(Ok(()), |limits| parked.body.expect(limits));
                    parked.is_ready = expected.is_ok();
                    if let Err(error) = expected {
                        self.slots.expect_no_limits();
                        self.lose_parked(serial, &error);
                        return self.kill_by_force(serial);
                    }
                    Ok(())
                }
                None => {
                    reached("keeper.launch.ready");
                    self.begin(serial)
                }
            },
            // gVisor's kernel, which was killed for the decision, was missed by init before it heard of it.
            Report::Failed { .. }
                if self.sandboxes.get(&serial).is_some_and(|sandbox| sandbox.launched.is_some() && sandbox.decision.is_some()) =>
            {
                self.end(serial, None, None);
                self.kill_by_force(serial)
            }
            Report::Failed { kind, message } => {
                self.lose_parked(serial, &message);
                let cause = match kind {
                    crate::error::Kind::Spec => Cause::StartFailed { message },
                    crate::error::Kind::Host => Cause::InfraError { message },
                };
                self.end(serial, None, Some(cause));
                self.kill_by_force(serial)
            }
            Report::Started { at_ns, own_cpu_us } => self.on_started(serial, at_ns, own_cpu_us, descriptors),
            Report::TreesOver { served } => self.visit_over(serial, served),
            Report::TreeRefused => {
                if let Some(sandbox) = self.sandboxes.get_mut(&serial) {
                    sandbox.own_refusals += 1;
                }
                Ok(())
            }
            Report::ExecStarted { number, at_ns } => self.on_exec_started(serial, number, at_ns, descriptors),
            Report::ExecFailed { number, kind, message } => {
                self.on_exec_failed(serial, number, kind, message);
                Ok(())
            }
            Report::ExecEnded { number, status, at_ns, cpu_us } => {
                self.on_exec_ended(serial, number, exec::Ended { status, at_ns, cpu_us });
                Ok(())
            }
            Report::Processes(processes) => {
                if let Some(seen) = self.sandboxes.get_mut(&serial).and_then(|sandbox| sandbox.processes.as_mut()) {
                    *seen = processes;
                }
                Ok(())
            }
            Report::Ended { status, at_ns, own_cpu_us, is_disk_full, are_inodes_used_up } => {
                reached("keeper.end.reported");
                self.end(serial, Some(Ended { status, at_ns, own_cpu_us, is_disk_full, are_inodes_used_up }), None);
                self.kill_by_force(serial)?;
                reached("keeper.end.killed");
                Ok(())
            }
        }
    }

    pub(super) fn on_started(&mut self, serial: u64, at_ns: u64, own_cpu_us: u64, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let mut descriptors = descriptors.into_iter();
        let (payload, master) = (descriptors.next(), descriptors.next().map(Master::of).transpose()?);
        if let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.launched.is_none()) {
            if let Some(body) = &mut sandbox.body {
                body.payload = payload;
            }
            if let Some(master) = master {
                sandbox.output.attach(master);
            }
        }
        if let Some(master) = self.sandboxes.get(&serial).and_then(|sandbox| sandbox.output.terminal()) {
            self.watch(master.as_fd(), Source::Stdout, serial)?;
        }
        if let Some(payload) = self.sandboxes.get(&serial).and_then(|sandbox| sandbox.body.as_ref()?.payload.as_ref()) {
            self.watch(payload.as_fd(), Source::Payload, serial)?;
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return Ok(()) };
        let since_us = monotonic_ns().saturating_sub(at_ns) / 1000;
        let launched = Launched {
            started_at_us: unix_us().saturating_sub(since_us),
            launch_us: at_ns.saturating_sub(sandbox.received_at_ns) / 1000,
            start: sandbox.start,
            fences: sandbox.fences,
        };
        sandbox.launched = Some(launched);
        if let Purpose::Payload { id } = sandbox.purpose {
            self.records.launched(id, launched);
        }
        sandbox.started_at_ns = Some(at_ns);
        sandbox.init_cpu_us += own_cpu_us;
        let limits = sandbox.supervision;
        let asker = sandbox.launch_asker.take();
        reached("keeper.launch.started");
        if let Some(wall_ms) = limits.wall_ms {
            self.timer.set(at_ns.saturating_add(wall_ms.saturating_mul(1_000_000)), serial, Due::Wall)?;
        }
        if limits.cpu_ms.is_some() {
            self.check_cpu(serial)?;
        }
        match asker {
            Some(asker) => {
                self.answer(asker, Answer::Launched(launched));
                reached("keeper.launch.answered");
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(super) fn on_output(&mut self, serial: u64, kind: Kind, flags: EventFlags) -> io::Result<()> {
        if flags.contains(EventFlags::OUT) {
            self.on_typed(serial)?;
        }
        // Both pipes may have been ready when the first of them was found to be too much.
        let Some(output) = output_of(&mut self.sandboxes, &mut self.execs, serial).filter(|output| !output.is_held()) else {
            return Ok(());
        };
        let pumped = output.pump(kind, &mut self.buffer, unix_us());
        let is_over_limit = output.is_over_limit();
        match pumped {
            Ok(Pumped::Held) => self.pause_output(serial)?,
            Ok(Pumped::More | Pumped::Empty | Pumped::Closed) if output.is_held() => self.pause_output(serial)?,
            Ok(Pumped::Closed) => {
                // Before it is closed: a terminal that somebody else has, too, would be watched on.
                match output.pipe(kind).map(|pipe| epoll::delete(&self.epoll, pipe)) {
                    None | Some(Ok(()) | Err(rustix::io::Errno::NOENT)) => output.close_stream(kind),
                    Some(Err(error)) => return Err(error.into()),
                }
            }
            Ok(Pumped::More | Pumped::Empty) => {}
            Err(error) => return self.decide(serial, log_failed(&error)),
        }
        if is_over_limit { self.decide(serial, Decision::OutputLimit) } else { Ok(()) }
    }

    /// Reads nothing more until the disk has room for what was read.
    fn pause_output(&mut self, serial: u64) -> io::Result<()> {
        warn(format_args!("writing a log waits for room on the disk"));
        self.unwatch_output(serial)?;
        let Some(output) = output_of(&mut self.sandboxes, &mut self.execs, serial) else { return Ok(()) };
        self.timer.set(monotonic_ns() + output.next_room_pause_ns(), serial, Due::Room)
    }

    /// Perhaps there is room now for what was read, or for the end.
    pub(super) fn look_for_room(&mut self, serial: u64) -> io::Result<()> {
        if self.sandboxes.get(&serial).is_some_and(|sandbox| sandbox.ending.is_some()) {
            self.tell_end(serial);
            return Ok(());
        }
        if self.execs.get(&serial).is_some_and(|exec| exec.ending.is_some()) {
            self.tell_exec_end(serial);
            return Ok(());
        }
        let Some(output) = output_of(&mut self.sandboxes, &mut self.execs, serial).filter(|output| output.is_held()) else { return Ok(()) };
        match output.write_held() {
            Ok(true) => {}
            Ok(false) => return self.timer.set(monotonic_ns() + output.next_room_pause_ns(), serial, Due::Room),
            Err(error) => return self.decide(serial, log_failed(&error)),
        }
        let of_exec = || self.execs.get(&serial).map(|exec| &exec.output);
        match self.sandboxes.get(&serial).map(|sandbox| &sandbox.output).or_else(of_exec) {
            Some(output) => self.watch_output(serial, output),
            None => Ok(()),
        }
    }

    /// Watches the pipes that are still open, or the terminal and what is typed there.
    pub(super) fn watch_output(&self, serial: u64, output: &Output) -> io::Result<()> {
        for (kind, source) in [(Kind::Stdout, Source::Stdout), (Kind::Stderr, Source::Stderr)] {
            if let Some(pipe) = output.pipe(kind) {
                let interest = output.terminal().filter(|_| kind == Kind::Stdout).map_or(EventFlags::IN, Terminal::interest);
                epoll::add(&self.epoll, pipe, EventData::new_u64(source.number(serial)), interest)?;
            }
        }
        match output.terminal().and_then(Terminal::awaited) {
            Some(typed) => self.watch(typed, Source::Typed, serial),
            None => Ok(()),
        }
    }

    pub(super) fn on_oom_notice(&mut self, serial: u64) -> io::Result<()> {
        let Some(notice) = self.body(serial).and_then(|body| body.oom_notice.as_ref()) else { return Ok(()) };
        // Read in any case: it stays readable otherwise.
        match rustix::io::read(notice, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let is_being_looked_for = std::mem::replace(&mut sandbox.oom_looks, OOM_LOOKS_MAX) > 0;
        if is_being_looked_for { Ok(()) } else { self.look_for_oom(serial) }
    }

    /// The kernel announces an OOM before it kills, so the counter may still be on its way; it may also find memory after all.
    pub(super) fn look_for_oom(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return Ok(()) };
        let Some(body) = &sandbox.body else { return Ok(()) };
        if body.slot.group.oom_kills()? > 0 {
            return self.decide(serial, Decision::OutOfMemory);
        }
        sandbox.oom_looks = sandbox.oom_looks.saturating_sub(1);
        if sandbox.oom_looks == 0 { Ok(()) } else { self.timer.set(monotonic_ns() + AGAIN_AFTER_NS, serial, Due::Oom) }
    }

    pub(super) fn on_payload_death(&mut self, serial: u64) -> io::Result<()> {
        if self.execs.contains_key(&serial) {
            return self.on_exec_death(serial);
        }
        // Its init is to see it, too.
        self.thaw(serial, Thaw::Ending)?;
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        sandbox.dead_at_ns.get_or_insert_with(monotonic_ns);
        match sandbox.body.as_ref().and_then(|body| body.payload.as_ref()) {
            Some(payload) => Ok(epoll::delete(&self.epoll, payload)?),
            None => Ok(()),
        }
    }

    pub(super) fn on_timer(&mut self) -> io::Result<()> {
        // The time of this turn: what sets itself anew waits for the next one, so that the loop goes on to others in between.
        let now_ns = monotonic_ns();
        while let Some((serial, due)) = self.timer.next(now_ns)? {
            let handled = self.on_due(serial, due);
            self.contain(Source::Control, serial, handled)?;
        }
        Ok(())
    }

    pub(super) fn on_due(&mut self, serial: u64, due: Due) -> io::Result<()> {
        if self.execs.contains_key(&serial) {
            return self.on_exec_due(serial, due);
        }
        match due {
            Due::Remove => return self.clean_up(serial),
            Due::Trial => return self.give_up_trial(serial),
            Due::Accept => return self.accept_again(),
            Due::Room => return self.look_for_room(serial),
            Due::Grace => return self.end_grace(serial),
            Due::Freeze => return self.look_for_ice(serial),
            Due::Typist => {
                self.give_up_typist(serial);
                return Ok(());
            }
            Due::Lowering => {
                self.give_up_lowering(serial);
                return Ok(());
            }
            Due::Start | Due::Wall | Due::Cpu | Due::Oom | Due::Force => {}
        }
        let Some(sandbox) = self.sandboxes.get(&serial) else { return Ok(()) };
        let (is_over, is_launched) = (sandbox.ending.is_some(), sandbox.launched.is_some());
        // What was set before a limit was changed is not this one's.
        let now_ns = monotonic_ns();
        let wall_ends_at_ns =
            sandbox.started_at_ns.zip(sandbox.supervision.wall_ms).map(|(at_ns, ms)| at_ns.saturating_add(ms.saturating_mul(1_000_000)));
        let is_wall_over = wall_ends_at_ns.is_some_and(|at_ns| now_ns >= at_ns);
        let is_cpu_look = now_ns >= sandbox.cpu_look_at_ns;
        match due {
            Due::Force => {
                self.thaw(serial, Thaw::Ending)?;
                // All of it at once, where the kernel can: init may be what does not answer.
                if let Some(body) = self.body(serial) {
                    body.slot.group.kill()?;
                }
                self.kill_by_force(serial)
            }
            Due::Start if !is_launched => self.kill_by_force(serial),
            Due::Wall if !is_over && is_wall_over => self.decide(serial, Decision::WallTimeout),
            Due::Cpu if !is_over && is_cpu_look => self.check_cpu(serial),
            Due::Oom if !is_over => self.look_for_oom(serial),
            Due::Start
            | Due::Wall
            | Due::Cpu
            | Due::Oom
            | Due::Remove
            | Due::Trial
            | Due::Room
            | Due::Accept
            | Due::Grace
            | Due::Freeze
            | Due::Lowering
            | Due::Typist => Ok(()),
        }
    }

    /// Ends a sandbox that has used up its CPU time, or comes back when it could have at the earliest: all cores busy for it.
    ///
    /// One that uses none is looked at more and more rarely, as far as the allowed overshoot goes.
    pub(super) fn check_cpu(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let (Some(limit_ms), Some(body)) = (sandbox.supervision.cpu_ms, &sandbox.body) else { return Ok(()) };
        let used_us = body.slot.group.cpu_us()?.saturating_sub(sandbox.init_cpu_us);
        let left_us = limit_ms.saturating_mul(1000).saturating_sub(used_us);
        if left_us == 0 {
            return self.decide(serial, Decision::CpuTimeout);
        }
        let (last_us, last_wait_ns) = sandbox.cpu_look;
        let floor_ns = if used_us == last_us { (last_wait_ns * 2).min(CPU_OVERSHOOT_NS / self.cores) } else { 0 };
        let wait_ns = (left_us * 1000 / self.cores).max(floor_ns).max(AGAIN_AFTER_NS);
        sandbox.cpu_look = (used_us, wait_ns);
        sandbox.cpu_look_at_ns = monotonic_ns() + wait_ns;
        self.timer.set(sandbox.cpu_look_at_ns, serial, Due::Cpu)
    }

    /// Notes why, then kills. The first reason stands.
    pub(super) fn decide(&mut self, serial: u64, decision: Decision) -> io::Result<()> {
        if self.execs.contains_key(&serial) {
            return self.decide_exec(serial, decision);
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        if sandbox.ending.is_some() || sandbox.decision.is_some() {
            return Ok(());
        }
        // Whoever asked for the end first has it told as his.
        sandbox.decision = Some(match (decision, sandbox.stopping) {
            (Decision::Killed(_), Some(stopping)) => Decision::Killed(stopping.reason),
            _ => decision,
        });
        self.thaw(serial, Thaw::Ending)?;
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let Some(body) = &mut sandbox.body else { return Ok(()) };
        // The payload at once, from here, however busy its sandbox is; what it started by init, which then reports that all are dead:
        // sooner than its own death would, with all that hangs on its namespaces.
        if let Some(payload) = &body.payload {
            match pidfd_send_signal(payload, rustix::process::Signal::KILL) {
                Ok(()) => sandbox.killed_at_ns = Some(monotonic_ns()),
                Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        body.slot.group.lift_cpu_limit()?;
        if sandbox.launched.is_some() && body.init.control.send(&Order::Kill, &[]).is_ok() {
            return self.timer.set(monotonic_ns() + FORCE_AFTER_NS, serial, Due::Force);
        }
        self.kill_by_force(serial)
    }

    /// Kills init, and with it the whole pid namespace (pid_namespaces(7)).
    pub(super) fn kill_by_force(&mut self, serial: u64) -> io::Result<()> {
        // The kill comes in any case.
        if let Err(error) = self.thaw(serial, Thaw::Ending) {
            warn(format_args!("thawing a sandbox that is to be killed failed: {error}"));
        }
        self.body(serial).map_or(Ok(()), |body| kill_init(body))
    }

    /// What exists in the kernel for a sandbox, whether it has a request or not.
    pub(super) fn body(&mut self, serial: u64) -> Option<&mut sandbox::Body> {
        match self.sandboxes.get_mut(&serial) {
            Some(sandbox) => sandbox.body.as_mut(),
            None => self.lot.get_mut(serial).map(|parked| &mut parked.body),
        }
    }

    /// Watches a descriptor of an init no longer; it may be so already.
    pub(super) fn unwatch(&mut self, serial: u64, which: impl Fn(&sandbox::Init) -> BorrowedFd<'_>) -> io::Result<()> {
        let body = match self.sandboxes.get(&serial) {
            Some(sandbox) => sandbox.body.as_ref(),
            None => self.lot.get_mut(serial).map(|parked| &parked.body),
        };
        match body.map(|body| epoll::delete(&self.epoll, which(&body.init))) {
            None | Some(Ok(()) | Err(rustix::io::Errno::NOENT)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }
}

pub(super) fn log_failed(error: &io::Error) -> Decision {
    Decision::LogFailed(error.raw_os_error().unwrap_or(libc::EIO))
}
