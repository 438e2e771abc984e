//! One sandbox in the keeper: what it is, what was decided about it, and how it ended.

use std::{collections::VecDeque, io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use super::{
    connection::Asker,
    control::{Paused, Stopping},
    disk::Disk,
    lowering::Lowering,
    output::Output,
    slot::Slot,
    worker::Worker,
};
use crate::{
    cgroup::{Counters, Limits},
    error::at,
    fence::Fences,
    log::Kind,
    protocol::{
        Cause, Ending, ImageId, KillReason, Launched, Limit, SandboxId, Supervision, Unpacked, Usage, VolumeMount,
        init::{self, Processes, WaitStatus},
    },
    sys::Child,
    transport::Socket,
};

/// Whom a sandbox is for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Purpose {
    /// A request's payload, kept in the records until it is forgotten.
    Payload { id: SandboxId },
    /// The keeper's own unpacker, making the image `image` in the store's folder `folder`.
    Unpack { image: ImageId, folder: String, asker: Asker },
    /// Nobody's payload: work on the files of the layer that sandbox `id` left behind.
    Visit {
        id: SandboxId,
        /// How many sockets its init was given, and those that it is to be given.
        sent: u64,
        #[serde(with = "crate::handover")]
        waiting: Vec<OwnedFd>,
    },
}

/// What the keeper decided to do to a sandbox, noted before it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Decision {
    CpuTimeout,
    WallTimeout,
    OutputLimit,
    OutOfMemory,
    Killed(KillReason),
    /// The log could not be written: going on would lose output.
    LogFailed(i32),
}

/// The life of a sandbox, from the request until nothing is left of it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Sandbox {
    pub(super) purpose: Purpose,
    pub(super) image: Option<ImageId>,
    pub(super) supervision: Supervision,
    /// `CLOCK_MONOTONIC` at the receipt of the request, in nanoseconds.
    pub(super) received_at_ns: u64,
    pub(super) start: crate::protocol::Start,
    pub(super) fences: Fences,
    /// Under gVisor: what its kernel says of its processes. The cgroup on the host counts the threads of that kernel.
    pub(super) processes: Option<Processes>,
    pub(super) output: Output,
    /// Refusals in the group's counter that were of processes of ours.
    #[serde(default)]
    pub(super) own_refusals: u64,
    pub(super) decision: Option<Decision>,
    /// Whether its end was asked for by a signal.
    #[serde(default)]
    pub(super) stopping: Option<Stopping>,
    #[serde(default)]
    pub(super) paused: Paused,
    /// Who waits for it to stand still.
    #[serde(skip)]
    pub(super) pausers: Vec<Asker>,
    /// A lower memory limit on its way.
    #[serde(default)]
    pub(super) lowering: Option<Lowering>,
    /// The writing end of the payload's standard input, if the keeper holds it.
    #[serde(default, with = "crate::handover")]
    pub(super) input: Option<OwnedFd>,
    /// `CLOCK_MONOTONIC` when the payload was killed for it, in nanoseconds.
    pub(super) killed_at_ns: Option<u64>,
    /// `CLOCK_MONOTONIC` when the payload's first process was seen to be dead, in nanoseconds.
    pub(super) dead_at_ns: Option<u64>,
    /// The last CPU time seen, in microseconds, and how long to wait before the next look, in nanoseconds.
    pub(super) cpu_look: (u64, u64),
    /// `CLOCK_MONOTONIC` of that next look, in nanoseconds: one that comes earlier was set before the limit was changed.
    #[serde(default)]
    pub(super) cpu_look_at_ns: u64,
    /// How often a counter was looked at for the OOM that was announced last.
    pub(super) oom_looks: u32,
    pub(super) launched: Option<Launched>,
    /// `CLOCK_MONOTONIC` of the payload's execve, in nanoseconds.
    pub(super) started_at_ns: Option<u64>,
    /// CPU time of init in the group before the payload, and of gVisor's start, in microseconds.
    pub(super) init_cpu_us: u64,
    pub(super) ending: Option<Ending>,
    /// `CLOCK_MONOTONIC` until which the ending may wait for room in the log before it is told, in nanoseconds.
    pub(super) tell_by_ns: u64,
    /// Whether the ending is in the record, and told.
    pub(super) is_told: bool,
    /// Connections do not outlive an upgrade.
    #[serde(skip)]
    pub(super) launch_asker: Option<Asker>,
    #[serde(skip)]
    pub(super) waiters: Vec<Asker>,
    /// What is to be given to init when it is ready.
    pub(super) pending: Option<Pending>,
    #[serde(default)]
    pub(super) volumes: Vec<VolumeMount>,
    /// Whether its init was told where they are.
    #[serde(default)]
    pub(super) are_volumes_given: bool,
    /// `None` once everything of it is gone but its record, which is in [`super::records`].
    pub(super) body: Option<Body>,
}

/// A payload that waits for its sandbox to be built.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pending {
    pub(super) start: init::Start,
    /// In the order of [`init::Order::Start`].
    #[serde(with = "crate::handover")]
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) limits: Limits,
    pub(super) hostname: String,
}

/// What exists in the kernel for a sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Body {
    pub(super) slot: Slot,
    pub(super) init: Init,
    /// Readable when the group is out of memory (v1).
    #[serde(with = "crate::handover")]
    pub(super) oom_notice: Option<OwnedFd>,
    /// The payload's first process (pidfd_open(2)), once it runs.
    #[serde(with = "crate::handover")]
    pub(super) payload: Option<OwnedFd>,
    /// The writable layer, if init did not make it.
    pub(super) disk: Option<Disk>,
    /// A mount that stays when this goes: of that layer, or of the one below it.
    #[serde(default, with = "crate::handover")]
    pub(super) kept: Option<OwnedFd>,
    /// Whether the layer lies over a kept one, whose id range this has.
    #[serde(default)]
    pub(super) is_over: bool,
    /// Who makes that one ready.
    #[serde(default)]
    pub(super) below: Option<Worker>,
}

impl Body {
    /// Sets what the next launch probably wants. One that wants something else sets that.
    pub(super) fn expect(&mut self, limits: Limits) -> io::Result<()> {
        self.slot.group.set_limits(limits).map_err(at("setting the limits"))?;
        self.watch_memory()
    }

    /// Has the kernel tell when the group is out of memory.
    pub(super) fn watch_memory(&mut self) -> io::Result<()> {
        if self.oom_notice.is_none() {
            self.oom_notice = self.slot.group.oom_notice().map_err(at("watching the memory limit"))?;
        }
        Ok(())
    }

    /// By what its own layer is known, if it is on disk.
    pub(super) const fn project(&self) -> u32 {
        project(self.slot.id_base, self.is_over)
    }
}

/// By what the layer of a sandbox with this id range is known on disk. A layer over a kept one and that one are of the same range.
pub(super) const fn project(id_base: u32, is_over: bool) -> u32 {
    if is_over { id_base + 1 } else { id_base }
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Init {
    pub(super) child: Child,
    #[serde(with = "crate::handover")]
    pub(super) control: Socket,
    pub(super) is_dead: bool,
}

/// What init said of the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) status: WaitStatus,
    pub(super) at_ns: u64,
    pub(super) own_cpu_us: u64,
    pub(super) is_disk_full: bool,
    pub(super) are_inodes_used_up: bool,
}

/// Everything that the verdict is made of.
#[derive(Debug)]
pub(super) struct Evidence {
    pub(super) ended: Option<Ended>,
    pub(super) counters: Counters,
    /// `CLOCK_MONOTONIC` now, in nanoseconds: when the end is known, if init did not say.
    pub(super) now_ns: u64,
    /// Unix time now, in microseconds.
    pub(super) now_us: u64,
    /// Why it never started, if it did not.
    pub(super) failure: Option<Cause>,
}

impl Sandbox {
    /// The final word on a sandbox, from what the kernel counted and what was decided.
    ///
    /// In order: it could never start; the kernel killed for memory; this machine failed; a limit was exceeded, whether or not our kill came first; somebody ended it;
    /// it ended by itself.
    pub(super) fn judge(&self, evidence: Evidence) -> Ending {
        let Evidence { ended, counters, now_ns, now_us, failure } = evidence;
        let by_itself = ended.filter(|ended| ended.status != WaitStatus::Signaled { signal: libc::SIGKILL });
        // What was killed runs no instruction of its own any more; how long the kernel takes to bury it is not its time.
        let ended_at_ns = match (by_itself, self.killed_at_ns) {
            (None, Some(killed_at_ns)) => killed_at_ns,
            // Init, which shares the payload's CPU limit, may have noticed later than the keeper.
            _ => ended.map_or(now_ns, |ended| ended.at_ns).min(self.dead_at_ns.unwrap_or(u64::MAX)),
        };
        let wall_us = self.started_at_ns.map_or(0, |started| ended_at_ns.saturating_sub(started) / 1000);
        let own_cpu_us = self.init_cpu_us + ended.map_or(0, |ended| ended.own_cpu_us);
        let usage = Usage {
            wall_us,
            cpu_us: if self.launched.is_some() { counters.cpu_us.saturating_sub(own_cpu_us) } else { 0 },
            memory_peak_bytes: counters.memory_peak_bytes,
            // The one that is to become the payload counts only if it does.
            pids_peak: if self.launched.is_some() {
                self.processes.map_or(counters.pids_peak.saturating_sub(1), |seen| seen.peak)
            } else {
                0
            },
            throttled_us: counters.throttled_us,
            stdout_bytes: self.output.written_bytes(Kind::Stdout),
            stderr_bytes: self.output.written_bytes(Kind::Stderr),
            io_read_bytes: counters.io.read_bytes,
            io_written_bytes: counters.io.written_bytes,
            io_reads: counters.io.reads,
            io_writes: counters.io.writes,
        };
        let is_over_wall = self.launched.is_some() && self.supervision.wall_ms.is_some_and(|limit| wall_us > limit.saturating_mul(1000));
        let is_over_cpu = self.supervision.cpu_ms.is_some_and(|limit| usage.cpu_us > limit.saturating_mul(1000));
        let cause = match (failure, self.decision) {
            (_, Some(Decision::Killed(reason))) if self.launched.is_none() => Cause::Killed(reason),
            (Some(failure @ Cause::StartFailed { .. }), _) => failure,
            _ if counters.oom_kills > 0 && !counters.is_at_memory_limit => {
                Cause::InfraError { message: "this machine ran out of memory and the kernel chose the sandbox".to_owned() }
            }
            _ if counters.oom_kills > 0 || self.decision == Some(Decision::OutOfMemory) => Cause::OomKilled,
            (Some(_), _) if self.processes.is_some() && counters.pids_refused > 0 => {
                Cause::InfraError { message: "gVisor needed more threads of the host than it may have".to_owned() }
            }
            (Some(failure), _) => failure,
            _ if self.output.is_over_limit() => Cause::OutputLimit,
            _ if is_over_cpu => Cause::CpuTimeout,
            _ if is_over_wall => Cause::WallTimeout,
            (_, Some(Decision::LogFailed(errno))) if by_itself.is_none() => {
                Cause::InfraError { message: format!("writing the log failed: {}", io::Error::from_raw_os_error(errno)) }
            }
            (_, Some(Decision::Killed(reason))) if by_itself.is_none() => Cause::Killed(reason),
            (_, Some(Decision::CpuTimeout)) if by_itself.is_none() => Cause::CpuTimeout,
            (_, Some(Decision::WallTimeout)) if by_itself.is_none() => Cause::WallTimeout,
            _ if let (Some(stopping), Some(ended)) = (self.stopping, ended)
                && stopping.ended(ended.status) =>
            {
                Cause::Killed(stopping.reason)
            }
            _ => match ended.map(|ended| ended.status) {
                Some(WaitStatus::Exited { code }) => Cause::Exited { code },
                Some(WaitStatus::Signaled { signal }) => Cause::Signaled { signal },
                None => Cause::InfraError { message: "the sandbox's init was killed from outside".to_owned() },
            },
        };
        let is_truncated = |kind| self.output.is_truncated(kind);
        let limits_hit = [
            (Limit::Memory, cause == Cause::OomKilled),
            (Limit::Pids, self.processes.map_or(counters.pids_refused > self.own_refusals, |seen| seen.is_at_limit)),
            (Limit::Cpu, cause == Cause::CpuTimeout || is_over_cpu),
            (Limit::Wall, cause == Cause::WallTimeout || is_over_wall),
            (Limit::Disk, ended.is_some_and(|ended| ended.is_disk_full)),
            (Limit::Inodes, ended.is_some_and(|ended| ended.are_inodes_used_up)),
            (Limit::Output, self.output.exceeds_limit()),
            (Limit::FileSize, cause == Cause::Signaled { signal: libc::SIGXFSZ }),
        ];
        let since_end_us = now_ns.saturating_sub(ended_at_ns) / 1000;
        Ending {
            cause,
            launched: self.launched,
            ended_at_us: now_us.saturating_sub(since_end_us),
            usage,
            limits_hit: limits_hit.into_iter().filter_map(|(limit, is_hit)| is_hit.then_some(limit)).collect(),
            oom_kills: counters.oom_kills,
            stdout_truncated: is_truncated(Kind::Stdout),
            stderr_truncated: is_truncated(Kind::Stderr),
        }
    }

    /// Everybody who waits for the end.
    pub(super) fn take_askers(&mut self) -> VecDeque<Asker> {
        self.launch_asker.take().into_iter().chain(self.waiters.drain(..)).collect()
    }

    /// What the unpacker said, if it ended well; else why not, for people.
    pub(super) fn unpacked(&self) -> Result<Unpacked, String> {
        let (stdout, stderr) = self.output.memory().unwrap_or_default();
        let said = String::from_utf8_lossy(stderr);
        match self.ending.as_ref().map(|ending| &ending.cause) {
            Some(Cause::Exited { code: 0 }) => {
                serde_json::from_slice(stdout).map_err(|e| format!("the unpacker's answer cannot be read: {e}"))
            }
            Some(Cause::Exited { .. }) => Err(said.trim_end().to_owned()),
            Some(Cause::OomKilled) => Err("unpacking needs more memory than it may have".to_owned()),
            Some(Cause::WallTimeout | Cause::CpuTimeout) => Err("unpacking takes longer than it may".to_owned()),
            Some(Cause::StartFailed { message } | Cause::InfraError { message }) => Err(message.clone()),
            Some(Cause::Signaled { .. } | Cause::OutputLimit | Cause::Killed(_)) | None => Err("unpacking was ended".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests;
