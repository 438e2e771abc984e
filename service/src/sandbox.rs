//! The domain: what a sandbox is, what may be asked for it, what becomes of it. Pure.

mod batch;
mod case;
mod change;
mod commit;
mod comparer;
mod compile;
mod exec;
mod language;
mod limits;
mod log_tail;
mod outcome;
mod pool;
mod program;
mod quota;
mod request;
mod signal;
mod state;
mod volume;
pub mod words;

use std::{collections::BTreeMap, fmt};

pub use batch::{BatchRequest, RUNS_MAX};
pub use case::{Beginning, Case, CaseEnd, CaseOutput, CaseReader, Comparison, Judged, Judging, NewCase, ToldCase, Verdict};
pub use change::{Change, ChangeRequest, new_limits};
pub use commit::{Commit, CommitRequest};
pub use comparer::Comparer;
pub use compile::{Compile, CompileEnd, NewCompile, case_id, case_ids, is_part, is_step, run_id, step_id};
pub use exec::{EXECS_MAX, Exec, ExecPlan, ExecRequest, ExecState, NewExec, SizeRequest};
pub use language::{Language, Languages};
pub use limits::{Bound, Limits, RequestedCompileLimits, RequestedLimits, bound_of, bounds};
pub use log_tail::{LogTail, Records, TailCollector};
pub use outcome::{Finish, Outcome, Phases, Reason, Truncated, Usage};
pub use pool::{
    FromPool, NewPool, POOL_SIZE, Personal, Pool, PoolFailure, PoolId, PoolRequest, PoolSizeRequest, READY_WITHIN_MS, Readiness, Template,
    Wanted, in_template,
};
pub use program::{Capabilities, Program, StopOrder, User, spec};
pub use quota::{
    DefaultQuotas, Exceeded, PrincipalQuotaChanges, QuotaChanges, QuotaScope, Quotas, WAITS, WAITS_MAX, WATCHES, WATCHES_IN_SANDBOX_MAX,
    WATCHES_MAX, asked, asked_of_steps, bound_within, defaults_within, whole,
};
pub use request::{
    BODY_BYTES_MAX, Content, EVICT_AFTER_MS, Encoding, File, GRACE_MS, IDLE_TIMEOUT_MS, INTERVAL_MS, ImageReference, Invalid, LIST_LIMIT,
    LabelFault, Network, NewSandbox, PullPolicy, RETRY, RunRequest, STOP_GRACE_MS, SandboxRequest, TAIL_LINES, TTL_MS, UNTIL_MS, WAIT_MS,
    WhenFull, check_label, check_name, check_name_prefix,
};
pub use sandbox_core::protocol::{ImageId, SandboxId};
use sandbox_core::{
    fence::Fences,
    protocol::{Medium, OutputPolicy},
};
use serde::{Deserialize, Serialize};
pub use signal::{Signal, SignalRequest};
pub use state::{Event, State};
use time::OffsetDateTime;
use utoipa::ToSchema;
pub use volume::{Mount, MountRequest, NewVolume, SIZE_BYTES, Volume, VolumeRequest};

/// Names a tenant. A verified token or a row of ours is where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct TenantId(String);

impl TenantId {
    /// `text` must come from a verified token or from a row.
    pub fn proven(text: String) -> Self {
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who asks: a principal of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    pub tenant: TenantId,
    pub principal: String,
}

/// Whether a sandbox came from `POST /v1/runs` or from `POST /v1/sandboxes`, or waits in a pool until somebody takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Run,
    Sandbox,
    Pooled,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Run, Self::Sandbox, Self::Pooled];

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Sandbox => "sandbox",
            Self::Pooled => "pooled",
        }
    }
}

/// Which image a sandbox runs: the name that was asked for and the content that it named then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageUsed {
    pub reference: String,
    pub digest: String,
    /// The unpacked root in the keeper's store.
    pub root: ImageId,
}

/// One sandbox as Postgres holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sandbox {
    pub id: SandboxId,
    pub tenant: TenantId,
    pub principal: String,
    pub kind: Kind,
    pub state: State,
    pub name: Option<String>,
    pub image: ImageUsed,
    pub program: Program,
    /// What is run before it, if anything.
    pub compile: Option<Box<Compile>>,
    /// How its cases are judged, if it has some.
    pub judging: Option<Judging>,
    pub limits: Limits,
    pub output_policy: OutputPolicy,
    pub labels: BTreeMap<String, String>,
    pub created_at: OffsetDateTime,
    pub claimed_at: Option<OffsetDateTime>,
    pub started_at: Option<OffsetDateTime>,
    pub finished_at: Option<OffsetDateTime>,
    /// How long it lives, counted from its creation or from when this was changed.
    pub ttl_ms: Option<u64>,
    pub expires_at: Option<OffsetDateTime>,
    /// How long it may do nothing.
    pub idle_timeout_ms: Option<u64>,
    /// Whether it is removed when it has ended.
    pub auto_remove: bool,
    /// Whether what it wrote stays when it ends, so that it can be started again.
    pub keep_layer: bool,
    /// Which of its lives this is, from one on.
    pub starts: u32,
    pub outcome: Option<Outcome>,
    /// What stood around its payload; `None`: it has not started, or never did.
    pub fences: Option<Fences>,
    /// Which one of its attempts this is, from one on.
    pub attempt: u32,
    /// How often it may be tried again, should this node fail it.
    pub retries_left: u32,
    /// How often a node claimed it.
    pub claims: u64,
    /// Whether Postgres has what it is to be given, should it have to be begun anew.
    pub keeps_input: bool,
    /// Where it waited before it was asked for, if it did.
    pub from_pool: Option<FromPool>,
}

impl Sandbox {
    /// For how long its program had run when it was asked for, in milliseconds.
    pub fn waited_ms(&self) -> u64 {
        // Another life begins with its start.
        self.from_pool.as_ref().filter(|_| self.starts == 1).map_or(0, |from| from.waited_ms)
    }

    /// The memory that it may take up at any time of its life. Of a run with a compile step: what either needs, and beside the program what the step left in memory.
    pub fn memory_bytes(&self) -> u64 {
        let own = self.limits.memory_bytes();
        let Some(compile) = &self.compile else { return own };
        let left = match self.limits.disk_medium() {
            Medium::Memory => self.limits.disk_bytes(),
            Medium::Disk => 0,
        };
        compile.limits.memory_bytes().max(own.saturating_add(left))
    }

    /// The same for the processor.
    pub fn cpu_millis(&self) -> u64 {
        let own = self.limits.cpu_millis();
        self.compile.as_ref().map_or(own, |compile| own.max(compile.limits.cpu_millis()))
    }
}
