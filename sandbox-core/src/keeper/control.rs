//! What is done to a sandbox while it runs: signals, stops, standing still, other limits, a look at its use, a socket in its network, its input.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
};
use serde::{Deserialize, Serialize};

use super::{
    Keeper,
    connection::{Asker, failed, failed_at},
    exec::output_of,
    monotonic_ns,
    records::State,
    requests::WAITERS_MAX,
    sandbox::{Decision, Sandbox},
    supervise::AGAIN_AFTER_NS,
    timer::Due,
    unix_us,
};
use crate::{
    cgroup::Change,
    error::shortage,
    fail_point::reached,
    fence::Fence,
    network, policy,
    protocol::{
        Answer, FailureKind, Family, KillReason, NewLimits, NewTime, Sample, SandboxId, WindowSize,
        init::{Order, WaitStatus},
    },
    sys,
};

/// How long the processes of a sandbox may take to stand still.
const FREEZE_WITHIN_NS: u64 = 2_000_000_000;
/// The longest time between two looks at whether they do.
const LOOK_AT_LEAST_EVERY_NS: u64 = 100_000_000;
/// The longest grace of a stop, in milliseconds: a day.
const GRACE_MS_MAX: u64 = 86_400_000;

/// The largest number of a signal (signal(7), `SIGRTMAX`).
const SIGNAL_MAX: i32 = 64;

/// A stop that was asked for, noted before its signal is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stopping {
    /// The first one's.
    pub(super) reason: KillReason,
    /// The signals that were sent, bit n for signal n + 1.
    signals: u64,
    /// `CLOCK_MONOTONIC` of the kill that follows, in nanoseconds: the earliest that was asked for.
    #[serde(default)]
    kill_at_ns: Option<u64>,
}

/// Whether a sandbox stands still.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Paused {
    #[default]
    No,
    /// It was begun, and is given up at this time of `CLOCK_MONOTONIC`, in nanoseconds.
    Freezing {
        until_ns: u64,
    },
    Yes,
}

/// Where a name leads.
pub(super) enum Named {
    Nothing,
    Over,
    /// The serial number of what has not ended.
    Alive(u64),
}

impl Stopping {
    /// A first stop, or one more.
    pub(super) fn note(before: Option<Self>, signal: i32, reason: KillReason) -> Self {
        let before = before.unwrap_or(Self { reason, signals: 0, kill_at_ns: None });
        Self { signals: before.signals | bit(signal), ..before }
    }

    /// Whether a kill at this time is to be remembered: there is none that comes earlier.
    fn is_earlier(&mut self, at_ns: u64) -> bool {
        let is_earlier = self.kill_at_ns.is_none_or(|before_ns| at_ns < before_ns);
        if is_earlier {
            self.kill_at_ns = Some(at_ns);
        }
        is_earlier
    }

    /// Whether a process ended by a signal of this stop, and not by itself.
    pub(super) fn ended(self, status: WaitStatus) -> bool {
        matches!(status, WaitStatus::Signaled { signal } if self.signals & bit(signal) != 0)
    }
}

fn bit(signal: i32) -> u64 {
    u32::try_from(signal - 1).ok().and_then(|place| 1_u64.checked_shl(place)).unwrap_or(0)
}

fn check_signal(signal: i32) -> Result<(), Answer> {
    let is_one = (1..=SIGNAL_MAX).contains(&signal);
    is_one.then_some(()).ok_or_else(|| failed(FailureKind::Refused, format!("{signal} is no signal: they are 1 to {SIGNAL_MAX}")))
}

/// Why a sandbox that stands still, or is about to, goes on.
#[derive(Clone, Copy)]
pub(super) enum Thaw {
    Ending,
    /// It is to hear the signal that asks it to end.
    Stopped,
    Resumed,
    TooSlow,
}

impl Thaw {
    /// What those hear who still wait for it to stand still.
    fn told_to_pausers(self) -> Answer {
        match self {
            Self::Ending => gone("the sandbox is being ended".to_owned()),
            Self::Stopped => failed(FailureKind::Refused, "the sandbox was asked to end before it stood still"),
            Self::Resumed => failed(FailureKind::Refused, "the sandbox was resumed before it stood still"),
            Self::TooSlow => failed(FailureKind::Busy, "the sandbox goes on: it did not come to stand still in time"),
        }
    }
}

pub(super) fn gone(message: String) -> Answer {
    failed(FailureKind::Gone, message)
}

impl Keeper {
    /// What `id` names.
    pub(super) fn named(&self, id: SandboxId) -> Named {
        match self.records.get(id) {
            None => Named::Nothing,
            Some(State::Ended(_)) => Named::Over,
            Some(State::Alive(serial)) => {
                let of_sandbox = self.sandboxes.get(serial).map(|sandbox| sandbox.ending.is_none());
                let is_alive = of_sandbox.or_else(|| self.execs.get(serial).map(|exec| exec.ending.is_none()));
                if is_alive == Some(true) { Named::Alive(*serial) } else { Named::Over }
            }
        }
    }

    /// The sandbox `id`, which runs and is not being ended; an answer if there is none.
    pub(super) fn running(&mut self, id: SandboxId) -> Result<(u64, &mut Sandbox), Answer> {
        let serial = match self.named(id) {
            Named::Nothing => return Err(gone(format!("no sandbox {id}"))),
            Named::Over => return Err(gone(format!("sandbox {id} has ended"))),
            Named::Alive(serial) => serial,
        };
        match self.sandboxes.get_mut(&serial) {
            None => Err(gone(format!("no sandbox {id}"))),
            Some(sandbox) if sandbox.decision.is_some() => Err(gone(format!("sandbox {id} is being ended"))),
            Some(sandbox) if sandbox.launched.is_none() => Err(failed(FailureKind::Busy, format!("sandbox {id} does not run yet"))),
            Some(sandbox) => Ok((serial, sandbox)),
        }
    }

    pub(super) fn signal(&mut self, id: SandboxId, signal: i32) -> io::Result<Answer> {
        if let Err(answer) = check_signal(signal) {
            return Ok(answer);
        }
        let serial = match self.named(id) {
            Named::Nothing => return Ok(gone(format!("no sandbox {id}"))),
            Named::Over => return Ok(Answer::Done),
            Named::Alive(serial) => serial,
        };
        if !self.is_launched(serial) {
            return Ok(failed(FailureKind::Busy, format!("{id} does not run yet")));
        }
        // The freezer of v1 keeps even this one for later.
        if signal == libc::SIGKILL {
            self.thaw(serial, Thaw::Ending)?;
        } else if self.sandboxes.get(&serial).is_some_and(|sandbox| sandbox.processes.is_some() && sandbox.paused != Paused::No) {
            // Its init, which would pass it on, stands still, too.
            return Ok(failed(FailureKind::Busy, format!("{id} is paused, and gVisor's kernel with it")));
        }
        match self.send_signal(serial, signal) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(failed(FailureKind::Busy, format!("{id} has not taken earlier signals yet")))
            }
            sent => sent.map(|()| Answer::Done),
        }
    }

    /// Notes the reason, sends the signal, and kills when the grace is over, whoever is connected by then.
    pub(super) fn stop_within(&mut self, id: SandboxId, signal: i32, grace_ms: u64, reason: KillReason) -> io::Result<Answer> {
        if let Err(answer) = check_signal(signal) {
            return Ok(answer);
        }
        let serial = match self.named(id) {
            Named::Nothing => return Ok(gone(format!("no sandbox {id}"))),
            Named::Over => return Ok(Answer::Done),
            Named::Alive(serial) => serial,
        };
        if !self.is_launched(serial) {
            // There is nobody yet who could heed a signal.
            self.decide(serial, Decision::Killed(reason))?;
            return Ok(Answer::Done);
        }
        let kill_at_ns = monotonic_ns().saturating_add(grace_ms.min(GRACE_MS_MAX).saturating_mul(1_000_000));
        let of_sandbox = self.sandboxes.get_mut(&serial).map(|sandbox| &mut sandbox.stopping);
        let mut is_earlier = false;
        if let Some(stopping) = of_sandbox.or_else(|| self.execs.get_mut(&serial).map(|exec| &mut exec.stopping)) {
            is_earlier = stopping.insert(Stopping::note(*stopping, signal, reason)).is_earlier(kill_at_ns);
        }
        reached("keeper.control.noted");
        // However often it is asked for: what comes later would find nobody.
        if is_earlier {
            self.timer.set(kill_at_ns, serial, Due::Grace)?;
        }
        self.thaw(serial, Thaw::Stopped)?;
        match self.send_signal(serial, signal) {
            // It hears nothing: what comes when the grace is over needs no hearing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Answer::Done),
            sent => sent.map(|()| Answer::Done),
        }
    }

    /// The grace of a stop is over.
    pub(super) fn end_grace(&mut self, serial: u64) -> io::Result<()> {
        let of_exec = || self.execs.get(&serial).and_then(|exec| exec.stopping);
        match self.sandboxes.get(&serial).map_or_else(of_exec, |sandbox| sandbox.stopping) {
            Some(stopping) => self.decide(serial, Decision::Killed(stopping.reason)),
            None => Ok(()),
        }
    }

    pub(super) fn is_launched(&self, serial: u64) -> bool {
        let of_sandbox = self.sandboxes.get(&serial).map(|sandbox| sandbox.launched.is_some());
        of_sandbox.or_else(|| self.execs.get(&serial).map(|exec| exec.launched.is_some())).unwrap_or(false)
    }

    /// To the first process of a payload or an exec. Under gVisor that is known to the kernel inside alone.
    fn send_signal(&mut self, serial: u64, signal: i32) -> io::Result<()> {
        if let Some(exec) = self.execs.get(&serial) {
            return exec.process.as_ref().map_or(Ok(()), |process| signal_one(process, signal));
        }
        let Some(sandbox) = self.sandboxes.get(&serial) else { return Ok(()) };
        let Some(body) = &sandbox.body else { return Ok(()) };
        if sandbox.processes.is_some() {
            return match body.init.control.send(&Order::Signal { signal }, &[]) {
                // It is gone, and with it all that could be signalled.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                sent => sent,
            };
        }
        body.payload.as_ref().map_or(Ok(()), |payload| signal_one(payload, signal))
    }

    /// Begins to freeze a sandbox. Answers when it stands still.
    pub(super) fn pause(&mut self, asker: Asker, id: SandboxId) -> io::Result<()> {
        let answer = match self.running(id) {
            Err(answer) => answer,
            Ok((_, sandbox)) if sandbox.paused == Paused::Yes => Answer::Done,
            Ok((_, sandbox)) if sandbox.pausers.len() >= WAITERS_MAX => failed(FailureKind::Busy, "too many wait for this sandbox"),
            Ok((_, sandbox)) if sandbox.paused != Paused::No => {
                sandbox.pausers.push(asker);
                return Ok(());
            }
            Ok((serial, sandbox)) => match sandbox.body.as_ref().map(|body| (body.slot.group.can_freeze(), body)) {
                None => gone(format!("sandbox {id} has ended")),
                Some((false, _)) => failed(FailureKind::Refused, "this node has no cgroup freezer"),
                Some((true, body)) => match body.slot.group.freeze() {
                    Err(error) => failed_at("freezing the sandbox", &error),
                    Ok(()) => {
                        sandbox.paused = Paused::Freezing { until_ns: monotonic_ns() + FREEZE_WITHIN_NS };
                        sandbox.pausers.push(asker);
                        return self.look_for_ice(serial);
                    }
                },
            },
        };
        self.answer(asker, answer);
        Ok(())
    }

    /// Whether a sandbox that is to stand still does. The kernel needs a moment to stop all its processes.
    pub(super) fn look_for_ice(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let (Paused::Freezing { until_ns }, Some(body)) = (sandbox.paused, &sandbox.body) else { return Ok(()) };
        let now_ns = monotonic_ns();
        if body.slot.group.is_frozen()? {
            sandbox.paused = Paused::Yes;
            let pausers = std::mem::take(&mut sandbox.pausers);
            reached("keeper.control.frozen");
            pausers.into_iter().for_each(|asker| self.answer(asker, Answer::Done));
            return Ok(());
        }
        if now_ns >= until_ns {
            return self.thaw(serial, Thaw::TooSlow);
        }
        // The longer it takes the rarer.
        let waited_ns = (now_ns + FREEZE_WITHIN_NS).saturating_sub(until_ns);
        self.timer.set(now_ns + (waited_ns / 4).clamp(AGAIN_AFTER_NS, LOOK_AT_LEAST_EVERY_NS), serial, Due::Freeze)
    }

    pub(super) fn resume(&mut self, id: SandboxId) -> io::Result<Answer> {
        match self.running(id) {
            Err(answer) => Ok(answer),
            Ok((serial, _)) => self.thaw(serial, Thaw::Resumed).map(|()| Answer::Done),
        }
    }

    /// Lets a sandbox go on, whoever froze it. Before every end of one: what is frozen hears no order, and on v1 no kill.
    pub(super) fn thaw(&mut self, serial: u64, why: Thaw) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.paused != Paused::No) else { return Ok(()) };
        if let Some(body) = &sandbox.body {
            body.slot.group.thaw()?;
        }
        sandbox.paused = Paused::No;
        let pausers = std::mem::take(&mut sandbox.pausers);
        for asker in pausers {
            self.answer(asker, why.told_to_pausers());
        }
        Ok(())
    }

    /// Holds a sandbox to other limits: all of them or none. `None`: the answer comes later.
    pub(super) fn update(&mut self, asker: Asker, id: SandboxId, limits: NewLimits) -> io::Result<Option<Answer>> {
        let (serial, sandbox) = match self.running(id) {
            Err(answer) => return Ok(Some(answer)),
            Ok(found) => found,
        };
        let is_gvisor = sandbox.processes.is_some();
        if let Err(refused) = policy::check_change(&limits, is_gvisor) {
            return Ok(Some(failed(FailureKind::Refused, refused)));
        }
        if sandbox.lowering.is_some() {
            return Ok(Some(failed(FailureKind::Busy, format!("the limits of sandbox {id} are being changed"))));
        }
        let Some(body) = &mut sandbox.body else { return Ok(Some(gone(format!("sandbox {id} has ended")))) };
        let NewLimits { memory_bytes, cpu_millis, pids, io, .. } = limits;
        match body.slot.group.change(Change { memory_bytes, cpu_millis, pids, io }) {
            Ok((before, Some(lowering))) => self.begin_lowering(asker, serial, limits, before, lowering),
            Ok((_, None)) => self.changed(serial, limits).map(Some),
            Err(error) => Ok(Some(match shortage(&error) {
                Some(_) => failed_at("setting the limits", &error),
                None => failed(FailureKind::Refused, format!("the kernel does not take it: {error}")),
            })),
        }
    }

    /// Its group is held to other limits: so are the keeper's own.
    pub(super) fn changed(&mut self, serial: u64, limits: NewLimits) -> io::Result<Answer> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(gone("the sandbox has ended".to_owned())) };
        let NewLimits { wall_ms, cpu_ms, io, .. } = limits;
        let supervision = &mut sandbox.supervision;
        supervision.io = io.unwrap_or(supervision.io);
        // What was set for a limit that is no more comes to nothing.
        supervision.wall_ms = wall_ms.over(supervision.wall_ms);
        supervision.cpu_ms = cpu_ms.over(supervision.cpu_ms);
        reached("keeper.control.changed");
        if let (NewTime::Ms(wall_ms), Some(started_at_ns)) = (wall_ms, sandbox.started_at_ns) {
            self.timer.set(started_at_ns.saturating_add(wall_ms.saturating_mul(1_000_000)), serial, Due::Wall)?;
        }
        if cpu_ms != NewTime::Same {
            self.check_cpu(serial)?;
        }
        Ok(Answer::Done)
    }

    /// What a sandbox uses now.
    pub(super) fn sample(&mut self, id: SandboxId) -> Answer {
        let (_, sandbox) = match self.running(id) {
            Err(answer) => return answer,
            Ok(found) => found,
        };
        let Some(body) = &sandbox.body else { return gone(format!("sandbox {id} has ended")) };
        let group = &body.slot.group;
        let looked = group.counters().and_then(|counters| Ok((counters, group.now()?, network::traffic(body.init.child.pid)?)));
        // What is read by a number is init's only if that lives: dead and reaped, its number may be another's.
        if !body.init.child.lives() {
            return gone(format!("sandbox {id} is being ended"));
        }
        let (counters, (memory_bytes, pids), (network_received_bytes, network_sent_bytes)) = match looked {
            Ok(looked) => looked,
            Err(error) => return failed_at("reading the use of the sandbox", &error),
        };
        Answer::Sample(Box::new(Sample {
            at_us: unix_us(),
            cpu_us: counters.cpu_us.saturating_sub(sandbox.init_cpu_us),
            throttled_us: counters.throttled_us,
            memory_bytes,
            memory_peak_bytes: counters.memory_peak_bytes,
            pids: sandbox.processes.map_or(pids.saturating_sub(1), |seen| seen.peak),
            pids_peak: sandbox.processes.map_or(counters.pids_peak.saturating_sub(1), |seen| seen.peak),
            io_read_bytes: counters.io.read_bytes,
            io_written_bytes: counters.io.written_bytes,
            io_reads: counters.io.reads,
            io_writes: counters.io.writes,
            network_received_bytes,
            network_sent_bytes,
            output_at_us: sandbox.output.written_at_us(unix_us()),
            is_paused: sandbox.paused == Paused::Yes,
        }))
    }

    /// A socket in the network namespace of a sandbox, where it stays wherever it is given to.
    pub(super) fn socket_in(&mut self, id: SandboxId, family: Family) -> (Answer, Option<OwnedFd>) {
        let serial = match self.running(id) {
            Err(answer) => return (answer, None),
            Ok((_, sandbox)) if sandbox.processes.is_some() => {
                return (
                    failed(
                        FailureKind::Refused,
                        "the network of a sandbox under gVisor is inside that: no socket of the host's leads there",
                    ),
                    None,
                );
            }
            Ok((_, sandbox)) if !sandbox.fences.has(Fence::NetworkNamespace) => {
                return (failed(FailureKind::Refused, "the sandbox has no network of its own"), None);
            }
            Ok((serial, _)) => serial,
        };
        let Some(body) = self.sandboxes.get(&serial).and_then(|sandbox| sandbox.body.as_ref()) else {
            return (gone(format!("sandbox {id} has ended")), None);
        };
        let family = match family {
            Family::V4 => AddressFamily::INET,
            Family::V6 => AddressFamily::INET6,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let made = self.slots.networks.inside(&body.slot.network, || Ok(socket_with(family, SocketType::STREAM, flags, None)?));
        match made {
            Ok(socket) => (Answer::Descriptor, Some(socket)),
            Err(error) => (failed_at("making a socket in the sandbox", &error), None),
        }
    }

    /// The writing end of what a payload reads.
    pub(super) fn input(&mut self, id: SandboxId) -> (Answer, Option<OwnedFd>) {
        let serial = match self.named(id) {
            Named::Nothing => return (gone(format!("no sandbox {id}")), None),
            Named::Over => return (gone(format!("sandbox {id} has ended")), None),
            Named::Alive(serial) => serial,
        };
        if output_of(&mut self.sandboxes, &mut self.execs, serial).is_some_and(|output| output.is_terminal()) {
            return self.keyboard(serial);
        }
        let of_sandbox = self.sandboxes.get(&serial).map(|sandbox| &sandbox.input);
        let Some(input) = of_sandbox.or_else(|| self.execs.get(&serial).map(|exec| &exec.input)).and_then(Option::as_ref) else {
            return (gone(format!("the input of {id} has ended")), None);
        };
        match rustix::io::fcntl_dupfd_cloexec(input, 0) {
            Ok(input) => (Answer::Descriptor, Some(input)),
            Err(error) => (failed_at("handing out the input", &error.into()), None),
        }
    }

    /// Lets go of that end; at a terminal, has somebody type what says so. `None`: the answer comes later.
    pub(super) fn end_input(&mut self, asker: Asker, id: SandboxId) -> io::Result<Option<Answer>> {
        let serial = match self.named(id) {
            Named::Nothing => return Ok(Some(gone(format!("no sandbox {id}")))),
            Named::Over => return Ok(Some(Answer::Done)),
            Named::Alive(serial) => serial,
        };
        if output_of(&mut self.sandboxes, &mut self.execs, serial).is_some_and(|output| output.is_terminal()) {
            return self.end_typing(asker, serial);
        }
        if let Some(sandbox) = self.sandboxes.get_mut(&serial) {
            sandbox.input = None;
        } else if let Some(exec) = self.execs.get_mut(&serial) {
            exec.input = None;
        }
        Ok(Some(Answer::Done))
    }

    /// Tells the programs at a terminal how large it is.
    pub(super) fn resize(&mut self, id: SandboxId, size: WindowSize) -> Answer {
        match self.named(id) {
            Named::Nothing => gone(format!("no sandbox {id}")),
            Named::Over => Answer::Done,
            Named::Alive(serial) => self.resize_terminal(serial, size),
        }
    }
}

/// It may be dead already.
fn signal_one(process: &OwnedFd, signal: i32) -> io::Result<()> {
    match sys::send_signal(process.as_fd(), signal) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        sent => sent,
    }
}

/// A pipe for what a process is to read: its end, and ours, which does not block.
pub(super) fn input_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    // Programs open /dev/stdin, which is this pipe, as whatever user they are: for reading alone.
    rustix::fs::fchmod(&theirs, Mode::from_raw_mode(0o444))?;
    Ok((theirs, ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_ends_what_its_signals_end_and_keeps_the_first_reason() {
        let stopping = Stopping::note(None, libc::SIGTERM, KillReason::Expired);
        let stopping = Stopping::note(Some(stopping), 64, KillReason::StoppedByUser);
        assert_eq!(stopping.reason, KillReason::Expired);
        for (signal, is_ended) in
            [(libc::SIGTERM, true), (64, true), (libc::SIGINT, false), (libc::SIGSEGV, false), (0, false), (65, false)]
        {
            assert_eq!(stopping.ended(WaitStatus::Signaled { signal }), is_ended, "{signal}");
        }
        assert!(!stopping.ended(WaitStatus::Exited { code: 143 }));
    }

    #[test]
    fn only_an_earlier_kill_is_waited_for() {
        let mut stopping = Stopping::note(None, libc::SIGTERM, KillReason::Expired);
        assert_eq!([300, 500, 300, 200, 250].map(|at_ns| stopping.is_earlier(at_ns)), [true, false, false, true, false]);
        let again = Stopping::note(Some(stopping), libc::SIGINT, KillReason::Expired);
        assert_eq!(again.kill_at_ns, Some(200));
    }
}
