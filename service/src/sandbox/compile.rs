//! The compile step of a run: what is run before the program, how that ended, and what the keeper calls it.

use std::collections::BTreeMap;

use sandbox_core::protocol::{SandboxId, Usage};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Finish, Limits, LogTail, Outcome, Program, Reason, RequestedLimits};

/// A compile step as a run has it. The program is started on what it leaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compile {
    pub program: Program,
    /// Its own, but for the writable layer, which both have.
    pub limits: Limits,
    /// How it ended, if it has.
    #[serde(skip)]
    pub end: Option<CompileEnd>,
}

/// How a compile step ended.
#[derive(Debug, Clone, PartialEq)]
pub struct CompileEnd {
    pub outcome: Outcome,
    /// All that it wrote and was kept: no more is kept than is stored.
    pub log_tail: LogTail,
}

/// A compile step as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCompile {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Over the image's.
    pub env: BTreeMap<String, String>,
    /// As they were asked for.
    pub requested: RequestedLimits,
    /// Where nothing was asked for: those of its language.
    pub defaults: RequestedLimits,
    /// With defaults where nothing was asked for.
    pub limits: Limits,
}

impl CompileEnd {
    /// Whether the program can be started.
    pub fn is_success(&self) -> bool {
        self.outcome.is_success()
    }
}

impl Finish {
    /// This end of a run whose compile step ended like that: what both used is in the ledger, and a program that was not started for it says so.
    #[must_use]
    pub fn behind(mut self, step: &CompileEnd, used: &Usage) -> Self {
        self.used = together(&self.used, used);
        if self.outcome.reason == Reason::StartFailed && !step.is_success() {
            self.outcome.reason = Reason::CompileFailed;
            self.outcome.message = format!("the compile step did not succeed: {}", step.outcome.message);
        }
        self
    }
}

/// What two used, one after the other.
pub(super) fn together(one: &Usage, other: &Usage) -> Usage {
    Usage {
        wall_us: one.wall_us.saturating_add(other.wall_us),
        cpu_us: one.cpu_us.saturating_add(other.cpu_us),
        memory_peak_bytes: one.memory_peak_bytes.max(other.memory_peak_bytes),
        pids_peak: one.pids_peak.max(other.pids_peak),
        throttled_us: one.throttled_us.saturating_add(other.throttled_us),
        stdout_bytes: one.stdout_bytes.saturating_add(other.stdout_bytes),
        stderr_bytes: one.stderr_bytes.saturating_add(other.stderr_bytes),
        io_read_bytes: one.io_read_bytes.saturating_add(other.io_read_bytes),
        io_written_bytes: one.io_written_bytes.saturating_add(other.io_written_bytes),
        io_reads: one.io_reads.saturating_add(other.io_reads),
        io_writes: one.io_writes.saturating_add(other.io_writes),
    }
}

/// Where the version stands in an id, and that of the ids of compile steps: all others are of version 7 (RFC 9562, sections 5.7 and 5.8).
const VERSION_SHIFT: u32 = 76;
const OF_STEP: u128 = 8;
const OF_RUN: u128 = 7;
/// Two are enough for all cases of a claim: they come one after another, and one is begun only when the one before the last is forgotten. The next claim has two others: a node that was taken
/// for dead, or that could not clear away what it began, may still have that when it claims the run again. All that are left: who comes back to the first is the eighth.
const OF_CASES: [[u128; 2]; 7] = [[9, 10], [11, 12], [13, 14], [15, 0], [1, 2], [3, 4], [5, 6]];

/// What the keeper calls the compile step of this run: each can be told from the other, so nobody has to write down what belongs together.
pub fn step_id(run: SandboxId) -> SandboxId {
    with_version(run, OF_STEP)
}

/// What the keeper calls this case, and the second after it, of a run that was claimed so many times.
pub fn case_id(run: SandboxId, claims: u64, index: usize) -> SandboxId {
    let nth = claims.saturating_sub(1) % OF_CASES.len() as u64;
    let of_claim = OF_CASES[usize::try_from(nth).expect("it is less than there are")];
    with_version(run, of_claim[index % of_claim.len()])
}

/// All that the keeper may call a case of a run that was claimed so many times, by whichever claim.
pub fn case_ids(run: SandboxId, claims: u64) -> impl Iterator<Item = SandboxId> {
    let of_claims = OF_CASES.into_iter().take(usize::try_from(claims).unwrap_or(usize::MAX));
    of_claims.flatten().map(move |version| with_version(run, version))
}

/// The run of which this is the compile step or a case, or what it is itself.
pub fn run_id(of: SandboxId) -> SandboxId {
    if is_part(of) { with_version(of, OF_RUN) } else { of }
}

/// Whether the keeper calls a compile step like this.
pub fn is_step(id: SandboxId) -> bool {
    version(id) == OF_STEP
}

/// Whether the keeper calls a compile step or a case of a run like this.
pub fn is_part(id: SandboxId) -> bool {
    is_step(id) || OF_CASES.as_flattened().contains(&version(id))
}

const fn version(id: SandboxId) -> u128 {
    (id.0.as_u128() >> VERSION_SHIFT) & 0xf
}

const fn with_version(id: SandboxId, version: u128) -> SandboxId {
    SandboxId(Uuid::from_u128((id.0.as_u128() & !(0xf << VERSION_SHIFT)) | (version << VERSION_SHIFT)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use sandbox_core::protocol::Cause;
    use time::OffsetDateTime;

    use super::*;
    use crate::sandbox::{Kind, Phases};

    fn finish(cause: Cause) -> Finish {
        let limits = Limits::of(Kind::Run, RequestedLimits::default()).unwrap();
        Finish::without_usage(cause, OffsetDateTime::UNIX_EPOCH, &limits, Phases::default())
    }

    fn step(cause: Cause) -> CompileEnd {
        CompileEnd { outcome: finish(cause).outcome, log_tail: LogTail::default() }
    }

    #[test]
    fn a_run_and_its_step_are_known_by_each_other() {
        let run = SandboxId(Uuid::now_v7());
        let step = step_id(run);
        assert_eq!((run_id(step), run_id(run)), (run, run));
        assert_eq!((is_step(step), is_step(run)), (true, false));
        assert_eq!((step.0.get_version_num(), step.0.get_variant()), (8, run.0.get_variant()));
    }

    #[test]
    fn one_case_is_told_from_the_next_and_from_those_of_the_claims_before_by_its_name() {
        let run = SandboxId(Uuid::now_v7());
        let names: Vec<_> = (1..=7).flat_map(|claims| [case_id(run, claims, 0), case_id(run, claims, 1)]).collect();
        assert_eq!((case_id(run, 1, 2), case_id(run, 2, 3)), (names[0], names[3]));
        assert_eq!(names.iter().copied().collect::<BTreeSet<_>>().len(), 14);
        for name in names {
            assert_eq!((run_id(name), is_part(name), is_step(name)), (run, true, false));
        }
        assert!(!is_part(run));
    }

    #[test]
    fn what_a_case_may_be_called_is_known_for_every_claim_so_far() {
        let run = SandboxId(Uuid::now_v7());
        let names = |claims: u64| case_ids(run, claims).collect::<BTreeSet<_>>();
        let up_to = |claims: u64| (1..=claims).flat_map(|claim| [0, 1].map(|index| case_id(run, claim, index))).collect::<BTreeSet<_>>();
        for claims in [0, 1, 3, 7, 100] {
            assert_eq!(names(claims), up_to(claims), "{claims}");
        }
    }

    #[test]
    fn a_program_that_was_not_compiled_says_why() {
        let never_begun = || finish(Cause::StartFailed { message: "not begun".into() });
        let failed = never_begun().behind(&step(Cause::Exited { code: 1 }), &Usage::default());
        assert_eq!((failed.outcome.reason, failed.state), (Reason::CompileFailed, crate::sandbox::State::Failed));
        assert_eq!(failed.outcome.message, "the compile step did not succeed: exited with code 1");
        let compiled = never_begun().behind(&step(Cause::Exited { code: 0 }), &Usage::default());
        assert_eq!(compiled.outcome.reason, Reason::StartFailed);
    }

    #[test]
    fn how_the_program_itself_ended_is_left_alone_and_both_are_paid_for() {
        let (own, other) =
            (Usage { cpu_us: 3, memory_peak_bytes: 5, ..Usage::default() }, Usage { cpu_us: 4, memory_peak_bytes: 9, ..Usage::default() });
        let run = Finish { used: own, ..finish(Cause::Exited { code: 1 }) };
        let behind = run.clone().behind(&step(Cause::Exited { code: 0 }), &other);
        assert_eq!(behind.outcome, run.outcome);
        assert_eq!((behind.used.cpu_us, behind.used.memory_peak_bytes), (7, 9));
    }
}
