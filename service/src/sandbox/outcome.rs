//! How a sandbox ended, in the words of the API.

use std::time::Duration;

use sandbox_core::{
    fence::Fences,
    protocol::{Cause, Ending, KillReason, Limit, Start},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{Limits, State, limits::bytes_for_people, signal, words};
use crate::clock::at_us;

/// How the program ended, with what it used. The same object in every answer, event and log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Outcome {
    pub reason: Reason,
    #[schema(required)]
    pub exit_code: Option<i32>,
    /// As in `SIGKILL`.
    #[schema(required, pattern = "^SIG")]
    pub signal: Option<String>,
    /// Every limit that was reached, whether or not it ended the program. `file_size` tells of the program itself, not of its children.
    /// `open_files` is never told: the kernel keeps no count of opens that it refused, so only the process itself knows.
    #[schema(value_type = Vec<words::LimitHit>)]
    pub limits_hit: Vec<Limit>,
    /// For people. May change.
    pub message: String,
    pub usage: Usage,
    pub truncated: Truncated,
    pub phases_ms: Phases,
    /// Whether it was started in parts that were prepared ahead. Null if it never started.
    #[schema(required, value_type = Option<words::Start>)]
    pub launch: Option<Start>,
}

/// Why it ended. A promise: new ones may come, none changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Exited,
    Signaled,
    OomKilled,
    CpuTimeout,
    WallTimeout,
    IdleTimeout,
    OutputLimit,
    StoppedByUser,
    StoppedByAdmin,
    Expired,
    Evicted,
    StartFailed,
    /// The compile step did not succeed, so the program was not started. How that step ended stands in `compile`.
    CompileFailed,
    InfraError,
}

/// What the program used, by the kernel's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    pub wall_ms: u64,
    pub cpu_ms: u64,
    pub memory_peak_bytes: u64,
    pub pids_peak: u64,
    /// Written, kept or not.
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    /// What was read from the node's disks; what was in memory already is not in it. 0 for ends from before this was counted.
    #[serde(default)]
    #[schema(required)]
    pub io_read_bytes: u64,
    /// What was written to the node's disks on its behalf, as far as the kernel knows for whom.
    #[serde(default)]
    #[schema(required)]
    pub io_written_bytes: u64,
    #[serde(default)]
    #[schema(required)]
    pub io_reads: u64,
    #[serde(default)]
    #[schema(required)]
    pub io_writes: u64,
}

/// Whether the program wrote more to a stream than was kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Truncated {
    pub stdout: bool,
    pub stderr: bool,
}

/// Where the time went, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Phases {
    /// From the request to the node's claim.
    #[schema(minimum = 0)]
    pub queue: f64,
    /// Finding the image.
    #[schema(minimum = 0)]
    pub image: f64,
    /// From the keeper's receipt of the order to the program's execve.
    #[schema(minimum = 0)]
    pub launch: f64,
    /// From the request to the end.
    #[schema(minimum = 0)]
    pub total: f64,
}

/// An outcome with what is stored beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    pub outcome: Outcome,
    pub state: State,
    pub started_at: Option<OffsetDateTime>,
    pub fences: Option<Fences>,
    pub finished_at: OffsetDateTime,
    /// Exact usage, for the ledger.
    pub used: sandbox_core::protocol::Usage,
}

impl Reason {
    pub const ALL: [Self; 14] = [
        Self::Exited,
        Self::Signaled,
        Self::OomKilled,
        Self::CpuTimeout,
        Self::WallTimeout,
        Self::IdleTimeout,
        Self::OutputLimit,
        Self::StoppedByUser,
        Self::StoppedByAdmin,
        Self::Expired,
        Self::Evicted,
        Self::StartFailed,
        Self::CompileFailed,
        Self::InfraError,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Signaled => "signaled",
            Self::OomKilled => "oom_killed",
            Self::CpuTimeout => "cpu_timeout",
            Self::WallTimeout => "wall_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::OutputLimit => "output_limit",
            Self::StoppedByUser => "stopped_by_user",
            Self::StoppedByAdmin => "stopped_by_admin",
            Self::Expired => "expired",
            Self::Evicted => "evicted",
            Self::StartFailed => "start_failed",
            Self::CompileFailed => "compile_failed",
            Self::InfraError => "infra_error",
        }
    }
}

impl Outcome {
    /// Of what is known by nothing but a fault of ours.
    pub fn of_fault(message: String) -> Self {
        Self {
            reason: Reason::InfraError,
            exit_code: None,
            signal: None,
            limits_hit: Vec::new(),
            message,
            usage: Usage::default(),
            truncated: Truncated::default(),
            phases_ms: Phases::default(),
            launch: None,
        }
    }

    /// Whether the program exited with 0.
    pub fn is_success(&self) -> bool {
        self.reason == Reason::Exited && self.exit_code == Some(0)
    }
}

impl Phases {
    /// Three decimals are microseconds; more would be noise.
    pub fn ms(duration: Duration) -> f64 {
        (duration.as_secs_f64() * 1_000_000.0).round() / 1000.0
    }
}

impl Finish {
    /// Tells the keeper's record in the words of the API. `phases` holds what the service measured; the launch is the keeper's.
    pub fn of(ending: &Ending, limits: &Limits, phases: Phases) -> Self {
        let reason = reason(&ending.cause);
        let (exit_code, signal) = match &ending.cause {
            Cause::Exited { code } => (Some(*code), None),
            Cause::Signaled { signal } => (None, Some(signal::name_of(*signal))),
            Cause::OomKilled | Cause::CpuTimeout | Cause::WallTimeout | Cause::OutputLimit | Cause::Killed(_) => {
                // A sandbox that we ended before its payload ran was not killed by a signal.
                (None, ending.launched.map(|_| "SIGKILL".to_owned()))
            }
            Cause::StartFailed { .. } | Cause::InfraError { .. } => (None, None),
        };
        let used = ending.usage;
        let outcome = Outcome {
            reason,
            exit_code,
            signal,
            limits_hit: ending.limits_hit.clone(),
            message: message(ending, limits),
            usage: Usage {
                wall_ms: ms(used.wall_us),
                cpu_ms: ms(used.cpu_us),
                memory_peak_bytes: used.memory_peak_bytes,
                pids_peak: used.pids_peak,
                stdout_bytes: used.stdout_bytes,
                stderr_bytes: used.stderr_bytes,
                io_read_bytes: used.io_read_bytes,
                io_written_bytes: used.io_written_bytes,
                io_reads: used.io_reads,
                io_writes: used.io_writes,
            },
            truncated: Truncated { stdout: ending.stdout_truncated, stderr: ending.stderr_truncated },
            phases_ms: Phases {
                launch: ending.launched.map_or(0.0, |launched| Phases::ms(Duration::from_micros(launched.launch_us))),
                ..phases
            },
            launch: ending.launched.map(|launched| launched.start),
        };
        let state = if matches!(reason, Reason::StartFailed | Reason::InfraError) || ending.launched.is_none() {
            State::Failed
        } else {
            State::Exited
        };
        let started_at = ending.launched.map(|launched| at_us(launched.started_at_us));
        let fences = ending.launched.map(|launched| launched.fences);
        Self { outcome, state, started_at, fences, finished_at: at_us(ending.ended_at_us), used }
    }

    /// The end of a sandbox of which only the cause is known.
    pub fn without_usage(cause: Cause, at: OffsetDateTime, limits: &Limits, phases: Phases) -> Self {
        let ended_at_us = u64::try_from(at.unix_timestamp_nanos() / 1000).unwrap_or(0);
        let ending = Ending {
            cause,
            launched: None,
            ended_at_us,
            usage: sandbox_core::protocol::Usage::default(),
            limits_hit: vec![],
            oom_kills: 0,
            stdout_truncated: false,
            stderr_truncated: false,
        };
        Self::of(&ending, limits, phases)
    }
}

const fn reason(cause: &Cause) -> Reason {
    match cause {
        Cause::Exited { .. } => Reason::Exited,
        Cause::Signaled { .. } => Reason::Signaled,
        Cause::OomKilled => Reason::OomKilled,
        Cause::CpuTimeout => Reason::CpuTimeout,
        Cause::WallTimeout => Reason::WallTimeout,
        Cause::OutputLimit => Reason::OutputLimit,
        Cause::Killed(KillReason::StoppedByUser) => Reason::StoppedByUser,
        Cause::Killed(KillReason::StoppedByAdmin) => Reason::StoppedByAdmin,
        Cause::Killed(KillReason::Expired) => Reason::Expired,
        Cause::Killed(KillReason::IdleTimeout) => Reason::IdleTimeout,
        Cause::Killed(KillReason::Evicted) => Reason::Evicted,
        Cause::StartFailed { .. } => Reason::StartFailed,
        Cause::InfraError { .. } => Reason::InfraError,
    }
}

fn message(ending: &Ending, limits: &Limits) -> String {
    match &ending.cause {
        Cause::Exited { code } => format!("exited with code {code}"),
        Cause::Signaled { signal } => format!("ended by {}", signal::name_of(*signal)),
        Cause::OomKilled => {
            let processes = if ending.oom_kills == 1 { "process" } else { "processes" };
            format!("memory limit of {} reached; {} {processes} killed", bytes_for_people(limits.memory_bytes()), ending.oom_kills)
        }
        Cause::CpuTimeout => format!("CPU time limit of {} ms reached", limits.cpu_ms().unwrap_or_default()),
        Cause::WallTimeout => format!("wall time limit of {} ms reached", limits.wall_ms().unwrap_or_default()),
        Cause::OutputLimit => format!("output limit of {} reached", bytes_for_people(limits.output_bytes())),
        Cause::Killed(KillReason::StoppedByUser) => "stopped by its owner".to_owned(),
        Cause::Killed(KillReason::StoppedByAdmin) => "stopped by an administrator".to_owned(),
        Cause::Killed(KillReason::Expired) => "its time to live was over".to_owned(),
        Cause::Killed(KillReason::IdleTimeout) => "it was idle for too long".to_owned(),
        Cause::Killed(KillReason::Evicted) => "its node had to give it up".to_owned(),
        Cause::StartFailed { message } | Cause::InfraError { message } => message.clone(),
    }
}

/// Whole milliseconds, to the nearest one.
const fn ms(us: u64) -> u64 {
    us.saturating_add(500) / 1000
}

#[cfg(test)]
mod tests {
    use sandbox_core::protocol::Launched;
    use serde_json::json;

    use super::*;
    use crate::sandbox::{Kind, RequestedLimits};

    fn ending(cause: Cause) -> Ending {
        Ending {
            cause,
            launched: Some(Launched {
                started_at_us: 1_700_000_000_000_000,
                launch_us: 900,
                start: Start::Warm,
                fences: Fences::everywhere(),
            }),
            ended_at_us: 1_700_000_000_812_000,
            usage: sandbox_core::protocol::Usage {
                wall_us: 812_400,
                cpu_us: 639_600,
                memory_peak_bytes: 67_108_864,
                pids_peak: 3,
                throttled_us: 0,
                stdout_bytes: 20,
                stderr_bytes: 0,
                io_read_bytes: 4096,
                io_written_bytes: 8192,
                io_reads: 1,
                io_writes: 2,
            },
            limits_hit: vec![Limit::Memory],
            oom_kills: 1,
            stdout_truncated: false,
            stderr_truncated: false,
        }
    }

    fn limits() -> Limits {
        let asked: RequestedLimits = serde_json::from_value(json!({"memory_bytes": 64 << 20, "wall_ms": 1000})).unwrap();
        Limits::of(Kind::Run, asked).unwrap()
    }

    #[test]
    fn the_json_is_the_documented_one() {
        let phases = Phases { queue: 0.1, image: 0.0, launch: 0.0, total: 813.4 };
        let finish = Finish::of(&ending(Cause::OomKilled), &limits(), phases);
        assert_eq!(finish.state, State::Exited);
        let expected = json!({
            "reason": "oom_killed", "exit_code": null, "signal": "SIGKILL",
            "limits_hit": ["memory"], "message": "memory limit of 64 MiB reached; 1 process killed",
            "usage": {
                "wall_ms": 812, "cpu_ms": 640, "memory_peak_bytes": 67_108_864, "pids_peak": 3, "stdout_bytes": 20, "stderr_bytes": 0,
                "io_read_bytes": 4096, "io_written_bytes": 8192, "io_reads": 1, "io_writes": 2
            },
            "truncated": { "stdout": false, "stderr": false },
            "phases_ms": { "queue": 0.1, "image": 0.0, "launch": 0.9, "total": 813.4 }, "launch": "warm"
        });
        assert_eq!(serde_json::to_value(&finish.outcome).unwrap(), expected);
    }

    #[test]
    fn an_exit_code_is_no_signal() {
        let finish = Finish::of(&ending(Cause::Exited { code: 3 }), &limits(), Phases::default());
        assert_eq!((finish.outcome.exit_code, finish.outcome.signal), (Some(3), None));
    }

    #[test]
    fn a_crash_is_told_by_the_signals_name() {
        let finish = Finish::of(&ending(Cause::Signaled { signal: 11 }), &limits(), Phases::default());
        assert_eq!(finish.outcome.signal.as_deref(), Some("SIGSEGV"));
        assert_eq!(finish.outcome.message, "ended by SIGSEGV");
    }

    #[test]
    fn a_wall_timeout_names_the_limit() {
        let finish = Finish::of(&ending(Cause::WallTimeout), &limits(), Phases::default());
        assert_eq!(finish.outcome.message, "wall time limit of 1000 ms reached");
    }

    #[test]
    fn a_payload_that_never_ran_failed() {
        let cause = Cause::StartFailed { message: "no such program: nope".into() };
        let finish = Finish::without_usage(cause, OffsetDateTime::UNIX_EPOCH, &limits(), Phases::default());
        assert_eq!(finish.state, State::Failed);
        assert_eq!(finish.outcome.message, "no such program: nope");
        assert_eq!((finish.outcome.launch, finish.started_at), (None, None));
    }
}
