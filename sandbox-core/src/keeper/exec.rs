//! Execs: further processes in sandboxes that run. Each has a record, a log and an ending of its own, and ends with its sandbox at the latest.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::epoll,
    process::{Signal, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use super::{
    Keeper, START_WITHIN_NS, Source,
    connection::{Asker, failed, failed_at},
    control::{Named, Paused, Stopping, input_pipe},
    end::TELL_WITHIN_NS,
    launch::{is_stream, output_pipe},
    monotonic_ns,
    output::{Output, Sink, is_no_room},
    sandbox::Decision,
    terminal::{Master, Terminal},
    timer::Due,
    unix_us, warn,
};
use crate::{
    error::Kind as ErrorKind,
    fail_point::reached,
    log::{self, Kind},
    policy,
    protocol::{
        self, Answer, Cause, Ending, FailureKind, KillReason, Launched, Limit, SandboxId, Start, Stdin, Usage,
        init::{self, Order, User, WaitStatus},
    },
};

/// Of one sandbox at a time.
const ALIVE_MAX: usize = 64;
/// How long init has to report one that was killed before its end is told without.
const REPORT_WITHIN_NS: u64 = 2_000_000_000;

/// One of them, until its ending is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Exec {
    pub(super) id: SandboxId,
    /// The serial number of its sandbox.
    pub(super) sandbox: u64,
    pub(super) output: Output,
    wall_ms: Option<u64>,
    /// `CLOCK_MONOTONIC` at the receipt of the request, in nanoseconds.
    received_at_ns: u64,
    pub(super) launched: Option<Launched>,
    /// `CLOCK_MONOTONIC` of its execve, of its kill by the keeper, and of its death as far as that was seen, in nanoseconds.
    started_at_ns: Option<u64>,
    killed_at_ns: Option<u64>,
    pub(super) dead_at_ns: Option<u64>,
    decision: Option<Decision>,
    pub(super) stopping: Option<Stopping>,
    /// The writing end of its standard input, if the keeper holds it.
    #[serde(with = "crate::handover")]
    pub(super) input: Option<OwnedFd>,
    /// pidfd_open(2), once it runs.
    #[serde(with = "crate::handover")]
    pub(super) process: Option<OwnedFd>,
    pub(super) ending: Option<Ending>,
    /// `CLOCK_MONOTONIC` until which the ending may wait for room in the log before it is told, in nanoseconds.
    tell_by_ns: u64,
    /// Connections do not outlive an upgrade.
    #[serde(skip)]
    pub(super) launch_asker: Option<Asker>,
    #[serde(skip)]
    pub(super) waiters: Vec<Asker>,
}

/// What init said of the end of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) status: WaitStatus,
    pub(super) at_ns: u64,
    pub(super) cpu_us: u64,
}

/// What is made for one before it is started.
struct Parts {
    sink: Sink,
    input: Option<OwnedFd>,
    /// In the order of [`Order::Exec`].
    theirs: Vec<OwnedFd>,
    /// The reading ends of its stdout and stderr, unless it has a terminal.
    ours: Option<(OwnedFd, OwnedFd)>,
}

impl Exec {
    /// The final word. In order: it never started; it wrote too much; it took too long; somebody ended it; its sandbox ended; it ended by itself.
    fn judge(&self, ended: Option<Ended>, failure: Option<Cause>, of_sandbox: Option<KillReason>, now_ns: u64) -> Ending {
        let killed = WaitStatus::Signaled { signal: libc::SIGKILL };
        let status = ended.map_or(killed, |ended| ended.status);
        let is_killed = status == killed;
        let ended_at_ns = match self.killed_at_ns.filter(|_| is_killed) {
            Some(killed_at_ns) => killed_at_ns,
            None => ended.map_or(now_ns, |ended| ended.at_ns).min(self.dead_at_ns.unwrap_or(u64::MAX)),
        };
        let wall_us = self.started_at_ns.map_or(0, |started| ended_at_ns.saturating_sub(started) / 1000);
        let is_over_wall = self.launched.is_some() && self.wall_ms.is_some_and(|limit| wall_us > limit.saturating_mul(1000));
        let cause = match (failure, self.decision, of_sandbox) {
            (_, Some(Decision::Killed(reason)), _) if self.launched.is_none() => Cause::Killed(reason),
            (Some(failure), ..) => failure,
            _ if self.output.is_over_limit() => Cause::OutputLimit,
            _ if is_over_wall => Cause::WallTimeout,
            (_, Some(Decision::LogFailed(errno)), _) if is_killed => {
                Cause::InfraError { message: format!("writing the log failed: {}", io::Error::from_raw_os_error(errno)) }
            }
            (_, Some(Decision::Killed(reason)), _) if is_killed => Cause::Killed(reason),
            (_, Some(Decision::WallTimeout), _) if is_killed => Cause::WallTimeout,
            _ if let Some(stopping) = self.stopping.filter(|stopping| stopping.ended(status)) => Cause::Killed(stopping.reason),
            (_, _, Some(reason)) if is_killed => Cause::Killed(reason),
            _ => match status {
                WaitStatus::Exited { code } => Cause::Exited { code },
                WaitStatus::Signaled { signal } => Cause::Signaled { signal },
            },
        };
        let limits_hit = [
            (Limit::Wall, cause == Cause::WallTimeout || is_over_wall),
            (Limit::Output, self.output.exceeds_limit()),
            (Limit::FileSize, cause == Cause::Signaled { signal: libc::SIGXFSZ }),
        ];
        let usage = Usage {
            wall_us,
            cpu_us: ended.map_or(0, |ended| ended.cpu_us),
            stdout_bytes: self.output.written_bytes(Kind::Stdout),
            stderr_bytes: self.output.written_bytes(Kind::Stderr),
            ..Usage::default()
        };
        let since_end_us = now_ns.saturating_sub(ended_at_ns) / 1000;
        Ending {
            cause,
            launched: self.launched,
            ended_at_us: unix_us().saturating_sub(since_end_us),
            usage,
            limits_hit: limits_hit.into_iter().filter_map(|(limit, is_hit)| is_hit.then_some(limit)).collect(),
            oom_kills: 0,
            stdout_truncated: self.output.is_truncated(Kind::Stdout),
            stderr_truncated: self.output.is_truncated(Kind::Stderr),
        }
    }
}

impl Keeper {
    /// Starts a further process in a sandbox, or answers why not.
    pub(super) fn exec(&mut self, asker: Asker, exec: protocol::Exec, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let received_at_ns = monotonic_ns();
        reached("keeper.exec.received");
        match self.begin_exec(asker, exec, descriptors, received_at_ns) {
            Ok(serial) => self.watch_exec_from_now(serial, received_at_ns),
            Err(answer) => {
                self.answer(asker, *answer);
                Ok(())
            }
        }
    }

    fn begin_exec(
        &mut self,
        asker: Asker,
        exec: protocol::Exec,
        descriptors: Vec<OwnedFd>,
        received_at_ns: u64,
    ) -> Result<u64, Box<Answer>> {
        let refused = |kind: FailureKind, why: String| Box::new(failed(kind, why));
        policy::check_exec(&exec).map_err(|e| refused(FailureKind::Refused, e.to_string()))?;
        if self.records.get(exec.id).is_some() {
            return Err(refused(FailureKind::Refused, format!("{} exists already", exec.id)));
        }
        let sandbox = self.place_for_exec(exec.sandbox).map_err(Box::new)?;
        let Parts { sink, input, theirs, ours } = self.parts_of_exec(&exec, descriptors).map_err(Box::new)?;
        let serial = self.serial();
        let order = init::Exec {
            number: serial,
            args: exec.args,
            env: exec.env,
            cwd: exec.cwd,
            user: exec.user.map(User::Named),
            has_stdin: exec.stdin != Stdin::Null && exec.terminal.is_none(),
            terminal: exec.terminal,
        };
        let output = Output::new(sink, exec.output_bytes, exec.output_policy, ours);
        let entry = Exec {
            id: exec.id,
            sandbox,
            output,
            wall_ms: exec.wall_ms,
            received_at_ns,
            launched: None,
            started_at_ns: None,
            killed_at_ns: None,
            dead_at_ns: None,
            decision: None,
            stopping: None,
            input,
            process: None,
            ending: None,
            tell_by_ns: 0,
            launch_asker: Some(asker),
            waiters: Vec::new(),
        };
        self.execs.insert(serial, entry);
        self.records.accept(exec.id, serial);
        reached("keeper.exec.recorded");
        let theirs: Vec<BorrowedFd<'_>> = theirs.iter().map(AsFd::as_fd).collect();
        let control = self.sandboxes.get(&sandbox).and_then(|sandbox| sandbox.body.as_ref()).map(|body| &body.init.control);
        let sent = control.map_or(Err(io::ErrorKind::BrokenPipe.into()), |control| control.send(&Order::Exec(Box::new(order)), &theirs));
        if let Err(error) = sent {
            // As if nobody had asked.
            self.execs.remove(&serial);
            self.records.forget(exec.id);
            if let Err(error) = std::fs::remove_file(log::path(&self.logs, exec.id)) {
                warn(format_args!("removing the log of an exec that was not begun failed: {error}"));
            }
            return Err(match (error.kind(), error.raw_os_error()) {
                (io::ErrorKind::WouldBlock, _) => refused(FailureKind::Busy, "the sandbox has not taken earlier orders yet".to_owned()),
                (io::ErrorKind::InvalidInput, _) | (_, Some(libc::EMSGSIZE)) => {
                    refused(FailureKind::Refused, "the command and its environment are too large".to_owned())
                }
                (io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset, _) => {
                    refused(FailureKind::Gone, format!("sandbox {} has ended", exec.sandbox))
                }
                _ => Box::new(failed_at("ordering the process", &error)),
            });
        }
        reached("keeper.exec.ordered");
        Ok(serial)
    }

    /// The serial number of a sandbox that takes one more.
    fn place_for_exec(&self, id: SandboxId) -> Result<u64, Answer> {
        let sandbox = match self.named(id) {
            Named::Alive(serial) => self.sandboxes.get(&serial).map(|sandbox| (serial, sandbox)),
            Named::Nothing | Named::Over => None,
        };
        let runs = sandbox.filter(|(_, sandbox)| sandbox.launched.is_some() && sandbox.decision.is_none());
        let Some((serial, sandbox)) = runs else { return Err(failed(FailureKind::Gone, format!("sandbox {id} does not run"))) };
        if sandbox.processes.is_some() {
            return Err(failed(
                FailureKind::Refused,
                "a sandbox under gVisor takes no further processes: its kernel starts the payload alone",
            ));
        }
        if sandbox.paused != Paused::No {
            return Err(failed(FailureKind::Busy, format!("sandbox {id} is paused")));
        }
        let alive = self.execs.values().filter(|exec| exec.sandbox == serial && exec.ending.is_none()).count();
        if alive >= ALIVE_MAX {
            return Err(failed(FailureKind::Busy, format!("sandbox {id} has {ALIVE_MAX} further processes already")));
        }
        if self.execs.len() >= self.execs_max {
            return Err(failed(
                FailureKind::Busy,
                format!("this keeper has descriptors for {} further processes at a time", self.execs_max),
            ));
        }
        Ok(serial)
    }

    fn parts_of_exec(&self, exec: &protocol::Exec, descriptors: Vec<OwnedFd>) -> Result<Parts, Answer> {
        let out_of = |error: io::Error| failed_at("making pipes", &error);
        let (stdin, input) = match (exec.terminal, exec.stdin) {
            (Some(_), _) | (None, Stdin::Null) => (None, None),
            (None, Stdin::Held) => input_pipe().map(|(theirs, ours)| (Some(theirs), Some(ours))).map_err(out_of)?,
            (None, Stdin::Descriptor) => match descriptors.into_iter().next() {
                None => return Err(failed(FailureKind::Refused, "the descriptor of stdin is missing")),
                // As at a launch (CVE-2024-21626).
                Some(stdin) if !is_stream(&stdin).unwrap_or(false) => {
                    return Err(failed(FailureKind::Refused, "stdin must be a regular file or a pipe"));
                }
                Some(stdin) => (Some(stdin), None),
            },
        };
        let (ours, of_output) = match exec.terminal {
            Some(_) => (None, None),
            None => {
                let (stdout, stdout_end) = output_pipe().map_err(out_of)?;
                let (stderr, stderr_end) = output_pipe().map_err(out_of)?;
                (Some((stdout, stderr)), Some([stdout_end, stderr_end]))
            }
        };
        match self.check_log_room(exec.output_policy, exec.output_bytes) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Err(failed(FailureKind::Busy, why)),
            Err(error) => return Err(failed_at("looking for room", &error)),
        }
        let sink = Sink::log(&self.logs, exec.id, self.group).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                failed(FailureKind::Refused, format!("{} was started before: its log exists", exec.id))
            } else {
                failed_at("making the log file", &error)
            }
        })?;
        reached("keeper.exec.log_made");
        Ok(Parts { sink, input, theirs: stdin.into_iter().chain(of_output.into_iter().flatten()).collect(), ours })
    }

    fn watch_exec_from_now(&mut self, serial: u64, received_at_ns: u64) -> io::Result<()> {
        let watched = self.timer.set(received_at_ns + START_WITHIN_NS, serial, Due::Start).and_then(|()| {
            let Some(exec) = self.execs.get(&serial) else { return Ok(()) };
            self.watch_output(serial, &exec.output)
        });
        watched.or_else(|error| self.fail_exec(serial, &error))
    }

    /// The serial number of the exec that an init names, if it is one of its own.
    fn exec_of(&self, sandbox: u64, number: u64) -> Option<u64> {
        self.execs.get(&number).filter(|exec| exec.sandbox == sandbox && exec.ending.is_none()).map(|_| number)
    }

    pub(super) fn on_exec_started(&mut self, sandbox: u64, number: u64, at_ns: u64, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let mut descriptors = descriptors.into_iter();
        let (process, master) = (descriptors.next(), descriptors.next().map(Master::of).transpose()?);
        let Some(serial) = self.exec_of(sandbox, number) else {
            // Given up meanwhile: nobody looks after it.
            return self.order_kill_of_exec(sandbox, number);
        };
        let of_sandbox = self.sandboxes.get(&sandbox).map(|sandbox| sandbox.fences);
        let Some(exec) = self.execs.get_mut(&serial) else { return Ok(()) };
        let since_us = monotonic_ns().saturating_sub(at_ns) / 1000;
        let launched = Launched {
            started_at_us: unix_us().saturating_sub(since_us),
            launch_us: at_ns.saturating_sub(exec.received_at_ns) / 1000,
            start: Start::Warm,
            fences: of_sandbox.unwrap_or_default(),
        };
        exec.launched = Some(launched);
        exec.started_at_ns = Some(at_ns);
        exec.process = process;
        if let Some(master) = master {
            exec.output.attach(master);
        }
        let (id, wall_ms, is_decided) = (exec.id, exec.wall_ms, exec.decision.is_some());
        self.records.launched(id, launched);
        reached("keeper.exec.started");
        let watched = self.watch_exec(serial);
        if let Err(error) = watched {
            return self.fail_exec(serial, &error);
        }
        if let Some(wall_ms) = wall_ms {
            self.timer.set(at_ns.saturating_add(wall_ms.saturating_mul(1_000_000)), serial, Due::Wall)?;
        }
        if let Some(asker) = self.execs.get_mut(&serial).and_then(|exec| exec.launch_asker.take()) {
            self.answer(asker, Answer::Launched(launched));
            reached("keeper.exec.answered");
        }
        // Decided before there was a process to be killed.
        if is_decided { self.kill_exec(serial) } else { Ok(()) }
    }

    /// Watches its process, and its terminal if it has one; pipes are watched from the beginning.
    fn watch_exec(&self, serial: u64) -> io::Result<()> {
        let Some(exec) = self.execs.get(&serial) else { return Ok(()) };
        if let Some(process) = exec.process.as_ref().filter(|_| exec.dead_at_ns.is_none()) {
            self.watch(process.as_fd(), Source::Payload, serial)?;
        }
        match exec.output.terminal().filter(|_| !exec.output.is_held()) {
            Some(_) => self.watch_output(serial, &exec.output),
            None => Ok(()),
        }
    }

    /// Goes on watching what the program before this one did.
    pub(super) fn watch_exec_again(&self, serial: u64, exec: &Exec) -> io::Result<()> {
        if exec.ending.is_some() {
            return Ok(());
        }
        if !exec.output.is_held() && exec.output.terminal().is_none() {
            self.watch_output(serial, &exec.output)?;
        }
        self.watch_exec(serial)
    }

    pub(super) fn on_exec_failed(&mut self, sandbox: u64, number: u64, kind: ErrorKind, message: String) {
        let Some(serial) = self.exec_of(sandbox, number) else { return };
        let cause = match kind {
            ErrorKind::Spec => Cause::StartFailed { message },
            ErrorKind::Host => Cause::InfraError { message },
        };
        self.end_exec(serial, None, Some(cause));
    }

    pub(super) fn on_exec_ended(&mut self, sandbox: u64, number: u64, ended: Ended) {
        let Some(serial) = self.exec_of(sandbox, number) else { return };
        reached("keeper.exec.reported");
        self.end_exec(serial, Some(ended), None);
    }

    pub(super) fn on_exec_death(&mut self, serial: u64) -> io::Result<()> {
        let Some(exec) = self.execs.get_mut(&serial) else { return Ok(()) };
        exec.dead_at_ns.get_or_insert_with(monotonic_ns);
        match &exec.process {
            Some(process) => unwatch(&self.epoll, process.as_fd()),
            None => Ok(()),
        }
    }

    pub(super) fn on_exec_due(&mut self, serial: u64, due: Due) -> io::Result<()> {
        let Some(exec) = self.execs.get(&serial) else { return Ok(()) };
        let is_paused = self.sandboxes.get(&exec.sandbox).is_some_and(|sandbox| sandbox.paused != Paused::No);
        let (is_over, is_started, sandbox) = (exec.ending.is_some(), exec.launched.is_some(), exec.sandbox);
        match due {
            Due::Room => self.look_for_room(serial),
            Due::Grace => self.end_grace(serial),
            Due::Wall if !is_over => self.decide(serial, Decision::WallTimeout),
            // It will start, or be reported, when its sandbox goes on.
            Due::Start | Due::Force if is_paused && !is_over => self.timer.set(monotonic_ns() + REPORT_WITHIN_NS, serial, due),
            Due::Start if !is_over && !is_started => {
                // Somebody inside holds it up: it must not run later, when nobody looks after it.
                self.order_kill_of_exec(sandbox, serial)?;
                let message = "the process did not start in time".to_owned();
                self.end_exec(serial, None, Some(Cause::InfraError { message }));
                Ok(())
            }
            Due::Force if !is_over => {
                self.order_kill_of_exec(sandbox, serial)?;
                self.end_exec(serial, None, None);
                Ok(())
            }
            Due::Start
            | Due::Wall
            | Due::Force
            | Due::Cpu
            | Due::Oom
            | Due::Freeze
            | Due::Lowering
            | Due::Typist
            | Due::Remove
            | Due::Accept
            | Due::Trial => Ok(()),
        }
    }

    /// Notes why, then kills. The first reason stands.
    pub(super) fn decide_exec(&mut self, serial: u64, decision: Decision) -> io::Result<()> {
        let Some(exec) = self.execs.get_mut(&serial).filter(|exec| exec.ending.is_none() && exec.decision.is_none()) else { return Ok(()) };
        exec.decision = Some(match (decision, exec.stopping) {
            (Decision::Killed(_), Some(stopping)) => Decision::Killed(stopping.reason),
            _ => decision,
        });
        self.kill_exec(serial)
    }

    /// What is in its session by init, which then reports; and the process at once, from here, however busy its sandbox is. In this order: init must
    /// hear of it before it can have buried the process. What is frozen does that when it goes on.
    fn kill_exec(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.execs.get(&serial).map(|exec| exec.sandbox) else { return Ok(()) };
        self.order_kill_of_exec(sandbox, serial)?;
        let Some(exec) = self.execs.get_mut(&serial) else { return Ok(()) };
        if let Some(process) = &exec.process {
            match pidfd_send_signal(process, Signal::KILL) {
                Ok(()) => exec.killed_at_ns = Some(monotonic_ns()),
                Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.timer.set(monotonic_ns() + REPORT_WITHIN_NS, serial, Due::Force)
    }

    fn order_kill_of_exec(&self, sandbox: u64, number: u64) -> io::Result<()> {
        let Some(body) = self.sandboxes.get(&sandbox).and_then(|sandbox| sandbox.body.as_ref()) else { return Ok(()) };
        match body.init.control.send(&Order::KillExec { number }, &[]) {
            // It is gone, and all of them with it; or it hears nothing, and the sandbox's own end will have to do.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::WouldBlock) =>
            {
                Ok(())
            }
            sent => sent,
        }
    }

    /// Its supervision failed: it is ended for that, and nothing else is.
    pub(super) fn fail_exec(&mut self, serial: u64, error: &io::Error) -> io::Result<()> {
        warn(format_args!("an exec is ended because its supervision failed: {error}"));
        if let Err(error) = self.kill_exec(serial) {
            warn(format_args!("killing it failed: {error}"));
        }
        self.end_exec(serial, None, Some(Cause::InfraError { message: format!("supervising the process failed: {error}") }));
        Ok(())
    }

    /// The sandbox is over, and so is all that was in it. In their logs before its own end is.
    pub(super) fn end_execs_of(&mut self, sandbox: u64) {
        let alive = |(serial, exec): (&u64, &Exec)| {
            (exec.sandbox == sandbox && exec.ending.is_none()).then_some((*serial, exec.launched.is_some()))
        };
        let left: Vec<(u64, bool)> = self.execs.iter().filter_map(alive).collect();
        for (serial, is_started) in left {
            let failure = match self.why_ended(sandbox) {
                _ if is_started => None,
                Some(reason) => Some(Cause::Killed(reason)),
                None => Some(Cause::StartFailed { message: "the sandbox ended before the process started".to_owned() }),
            };
            self.end_exec(serial, None, failure);
        }
    }

    /// Who had a sandbox ended, if somebody did: what is killed in it then is killed for that.
    fn why_ended(&self, sandbox: u64) -> Option<KillReason> {
        let sandbox = self.sandboxes.get(&sandbox)?;
        match sandbox.decision {
            Some(Decision::Killed(reason)) => Some(reason),
            Some(_) => None,
            None => sandbox.stopping.map(|stopping| stopping.reason),
        }
    }

    /// It is over: reads the last output, notes the verdict, and answers.
    fn end_exec(&mut self, serial: u64, ended: Option<Ended>, failure: Option<Cause>) {
        if let Err(error) = self.unwatch_output(serial) {
            warn(format_args!("what an exec wrote is still watched: {error}"));
        }
        let Some(exec) = self.execs.get_mut(&serial).filter(|exec| exec.ending.is_none()) else { return };
        for kind in [Kind::Stdout, Kind::Stderr] {
            // The ending says what is lost.
            if let Err(error) = exec.output.drain(kind, &mut self.buffer, unix_us()) {
                warn(format_args!("writing the last output to a log failed: {error}"));
            }
        }
        if let Some(process) = exec.process.take()
            && let Err(error) = unwatch(&self.epoll, process.as_fd())
        {
            warn(format_args!("a process that has ended is still watched: {error}"));
        }
        exec.input = None;
        let sandbox = exec.sandbox;
        let of_sandbox = self.why_ended(sandbox);
        let now_ns = monotonic_ns();
        let Some(exec) = self.execs.get_mut(&serial) else { return };
        let mut ending = exec.judge(ended, failure, of_sandbox, now_ns);
        log::bound_ending(&mut ending);
        exec.ending = Some(ending);
        exec.tell_by_ns = now_ns + TELL_WITHIN_NS;
        self.tell_exec_end(serial);
    }

    /// Writes the ending to the log and tells it, as [`Keeper::tell_end`] does. Then the sandbox's own may be told.
    pub(super) fn tell_exec_end(&mut self, serial: u64) {
        let Some(exec) = self.execs.get_mut(&serial) else { return };
        let Some(mut ending) = exec.ending.clone() else { return };
        if let Err(error) = exec.output.finish(&ending) {
            let now_ns = monotonic_ns();
            let may_wait = is_no_room(&error) && now_ns < exec.tell_by_ns && self.shutdown.is_none();
            if may_wait && self.timer.set(now_ns + exec.output.next_room_pause_ns(), serial, Due::Room).is_ok() {
                return;
            }
            warn(format_args!("ending a log failed: {error}"));
            exec.output.lose_held();
            ending.stdout_truncated |= exec.output.is_truncated(Kind::Stdout);
            ending.stderr_truncated |= exec.output.is_truncated(Kind::Stderr);
            if let Err(error) = exec.output.finish(&ending) {
                warn(format_args!("how an exec ended is not in its log: {error}"));
            }
        }
        reached("keeper.exec.logged");
        let Some(exec) = self.execs.remove(&serial) else { return };
        self.records.ended(exec.id, ending.clone());
        for asker in exec.launch_asker.into_iter().chain(exec.waiters) {
            self.answer(asker, Answer::Ended(Box::new(ending.clone())));
        }
        reached("keeper.exec.told");
        if self.sandboxes.get(&exec.sandbox).is_some_and(|sandbox| sandbox.ending.is_some()) {
            self.tell_end(exec.sandbox);
        }
    }

    /// Whether the ending of an exec of this sandbox still waits for room.
    pub(super) fn has_execs(&self, sandbox: u64) -> bool {
        self.execs.values().any(|exec| exec.sandbox == sandbox)
    }

    /// Watches no longer what a payload or an exec writes: a descriptor that somebody else has, too, would be watched on when it is closed.
    pub(super) fn unwatch_output(&self, serial: u64) -> io::Result<()> {
        let output = match self.execs.get(&serial) {
            Some(exec) => Some(&exec.output),
            None => self.sandboxes.get(&serial).map(|sandbox| &sandbox.output),
        };
        let Some(output) = output else { return Ok(()) };
        let pipes = [Kind::Stdout, Kind::Stderr].into_iter().filter_map(|kind| output.pipe(kind));
        pipes.chain(output.terminal().and_then(Terminal::typed)).try_for_each(|pipe| unwatch(&self.epoll, pipe))
    }
}

/// It may be watched no longer already.
fn unwatch(epoll: &OwnedFd, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    match epoll::delete(epoll, descriptor) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What writes under this serial number: a payload or an exec.
pub(super) fn output_of<'a>(
    sandboxes: &'a mut HashMap<u64, super::sandbox::Sandbox>,
    execs: &'a mut HashMap<u64, Exec>,
    serial: u64,
) -> Option<&'a mut Output> {
    match execs.get_mut(&serial) {
        Some(exec) => Some(&mut exec.output),
        None => sandboxes.get_mut(&serial).map(|sandbox| &mut sandbox.output),
    }
}
