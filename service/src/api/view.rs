//! Sandboxes as the API shows them.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use sandbox_core::{
    fence::Fence,
    protocol::{Isolation, OutputPolicy, WindowSize},
};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{
    engine::Output,
    sandbox::{
        Capabilities, CaseOutput, Compile, Encoding, FromPool, Kind, Limits, Mount, MountRequest, Network, Outcome, Sandbox, SandboxId,
        Signal, State, ToldCase, Verdict, words,
    },
};

/// What was asked for, and the content that this named then.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageUsed)]
pub(super) struct ImageView {
    reference: String,
    #[schema(value_type = words::Digest)]
    digest: String,
}

/// A run as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Run)]
pub(super) struct RunView {
    #[schema(value_type = Uuid)]
    id: SandboxId,
    state: State,
    /// How many would be started up to this one, itself included, if nobody came or went: those of its tenant before it, and of each other tenant as many as fall to
    /// its weight meanwhile. An estimate. Only where `state` is `queued`, in answers about one run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    queue_position: Option<u64>,
    image: ImageView,
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
    #[serde(flatten)]
    output: Option<OutputView>,
    #[schema(required)]
    outcome: Option<Outcome>,
    /// Null where nothing is run before the program.
    #[schema(required)]
    compile: Option<CompileView>,
    /// Its cases, in their order; null where it has none.
    #[schema(required)]
    cases: Option<Vec<CaseView>>,
    /// `accepted` if every case is; else that of the first that is not. Null before the end, and where there are no cases.
    #[schema(required)]
    verdict: Option<Verdict>,
    /// What stands around the program; null before it runs, if it never did, and for those of older versions.
    #[schema(required, value_type = Option<Vec<words::FenceName>>)]
    fences: Option<Vec<Fence>>,
    limits: Limits,
    /// Which attempt this is; more than 1 only where `retry` was asked for and used.
    #[schema(minimum = 1)]
    attempt: u32,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    finished_at: Option<OffsetDateTime>,
}

/// What is run before the program of a run. While it does, the run is `starting`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Compile)]
struct CompileView {
    /// Program and arguments in force.
    #[schema(min_items = 1)]
    command: Vec<String>,
    limits: Limits,
    /// What it wrote: all that was kept.
    #[serde(flatten)]
    output: Option<OutputView>,
    /// How it ended, with what it used. Null before that; if it never ran; and where a fault of this service's made it unknown.
    #[schema(required)]
    outcome: Option<Outcome>,
}

/// What came of one case of a run.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Case)]
struct CaseView {
    /// From 0 on, as they were given.
    index: usize,
    #[schema(required)]
    name: Option<String>,
    verdict: Verdict,
    /// How it ended, with what it used. Null while it is not over, or if it was never begun.
    #[schema(required)]
    outcome: Option<Outcome>,
    #[serde(flatten)]
    output: Option<CaseOutputView>,
}

/// The beginning of what a case of a run wrote: at most 64 KiB of each stream. There once it is over.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CaseOutput)]
struct CaseOutputView {
    stdout: String,
    #[schema(value_type = Encoding)]
    stdout_encoding: &'static str,
    /// Bytes behind `stdout` that were compared, and are not kept.
    stdout_omitted_bytes: u64,
    stderr: String,
    #[schema(value_type = Encoding)]
    stderr_encoding: &'static str,
    stderr_omitted_bytes: u64,
}

/// A sandbox as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Sandbox)]
pub(super) struct SandboxView {
    #[schema(value_type = Uuid)]
    id: SandboxId,
    kind: Kind,
    state: State,
    /// As that of a run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    queue_position: Option<u64>,
    #[schema(required)]
    name: Option<String>,
    image: ImageView,
    /// Program and arguments in force.
    #[schema(min_items = 1)]
    command: Vec<String>,
    workdir: String,
    user: String,
    capabilities: Capabilities,
    #[schema(value_type = words::Isolation)]
    isolation: Isolation,
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
    limits: Limits,
    #[schema(value_type = words::OutputPolicy)]
    output_policy: OutputPolicy,
    #[schema(value_type = Network)]
    network: &'static str,
    #[schema(required)]
    outcome: Option<Outcome>,
    /// As those of a run.
    #[schema(required, value_type = Option<Vec<words::FenceName>>)]
    fences: Option<Vec<Fence>>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    finished_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    expires_at: Option<OffsetDateTime>,
    /// Counted from its creation, or from when this was changed.
    #[schema(required)]
    ttl_ms: Option<u64>,
    /// How long it may do nothing.
    #[schema(required)]
    idle_timeout_ms: Option<u64>,
    /// Whether it is removed when it has ended.
    auto_remove: bool,
    /// Whether what it wrote stays when it ends.
    keep_layer: bool,
    /// From one on; more where it was started again.
    #[schema(minimum = 1)]
    starts: u32,
    stdin_open: bool,
    /// The size of its terminal at its start, if it has one.
    #[schema(required, value_type = Option<words::TerminalSize>)]
    tty: Option<WindowSize>,
    /// What it is told where nothing else is said, and how long it then has.
    #[schema(value_type = String, pattern = "^SIG")]
    stop_signal: Signal,
    stop_grace_ms: u64,
    /// The volumes that stand in it.
    volumes: Vec<MountRequest>,
    /// The pool in which it waited until it was asked for; `started_at` is then before `created_at`, what its program wrote until then is in its log, and `launch` in its outcome tells of its start. Null: it
    /// was started because it was asked for.
    #[schema(required)]
    from_pool: Option<FromPool>,
}

/// What the program of a run wrote and was kept. There once it ended.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RunOutput)]
pub(super) struct OutputView {
    stdout: String,
    #[schema(value_type = Encoding)]
    stdout_encoding: &'static str,
    /// Kept bytes before `stdout` that this answer leaves out, since it shows the last 8 MiB, and of each of several runs the last 64 KiB, or since they are not kept any more.
    stdout_omitted_bytes: u64,
    stderr: String,
    #[schema(value_type = Encoding)]
    stderr_encoding: &'static str,
    stderr_omitted_bytes: u64,
}

impl RunView {
    /// `output` belongs to a run that ended, `cases` to one that has some.
    pub(super) fn new(sandbox: Sandbox, output: Option<Output>, cases: Option<Vec<ToldCase>>) -> Self {
        let is_final = sandbox.state.is_final();
        Self {
            id: sandbox.id,
            state: sandbox.state,
            queue_position: None,
            image: ImageView { reference: sandbox.image.reference, digest: sandbox.image.digest },
            labels: sandbox.labels,
            output: output.map(OutputView::from),
            outcome: sandbox.outcome,
            compile: sandbox.compile.map(|compile| CompileView::from(*compile)),
            verdict: cases.as_ref().filter(|_| is_final).and_then(|cases| Verdict::of_run(cases.iter().map(|told| &told.case))),
            cases: cases.map(|cases| cases.into_iter().map(CaseView::from).collect()),
            fences: sandbox.fences.map(|fences| fences.iter().collect()),
            limits: sandbox.limits,
            attempt: sandbox.attempt,
            created_at: sandbox.created_at,
            started_at: sandbox.started_at,
            finished_at: sandbox.finished_at,
        }
    }

    /// A run of which is not told what it wrote, or what came of its cases.
    pub(super) fn bare(sandbox: Sandbox) -> Self {
        let mut view = Self::new(sandbox, None, None);
        if let Some(compile) = &mut view.compile {
            compile.output = None;
        }
        view
    }

    /// The same, at this place of the queue.
    pub(super) fn at(self, queue_position: Option<u64>) -> Self {
        Self { queue_position, ..self }
    }
}

impl SandboxView {
    /// The same, at this place of the queue.
    pub(super) fn at(self, queue_position: Option<u64>) -> Self {
        Self { queue_position, ..self }
    }
}

impl From<Sandbox> for SandboxView {
    fn from(sandbox: Sandbox) -> Self {
        Self {
            id: sandbox.id,
            kind: sandbox.kind,
            state: sandbox.state,
            queue_position: None,
            name: sandbox.name,
            image: ImageView { reference: sandbox.image.reference, digest: sandbox.image.digest },
            command: sandbox.program.args,
            workdir: sandbox.program.cwd,
            user: sandbox.program.user.text(),
            capabilities: sandbox.program.capabilities,
            isolation: sandbox.program.isolation,
            labels: sandbox.labels,
            limits: sandbox.limits,
            output_policy: sandbox.output_policy,
            network: "none",
            outcome: sandbox.outcome,
            fences: sandbox.fences.map(|fences| fences.iter().collect()),
            created_at: sandbox.created_at,
            started_at: sandbox.started_at,
            finished_at: sandbox.finished_at,
            expires_at: sandbox.expires_at,
            ttl_ms: sandbox.ttl_ms,
            idle_timeout_ms: sandbox.idle_timeout_ms,
            auto_remove: sandbox.auto_remove,
            keep_layer: sandbox.keep_layer,
            starts: sandbox.starts,
            stdin_open: sandbox.program.stdin_open,
            tty: sandbox.program.terminal,
            stop_signal: sandbox.program.stop.signal,
            stop_grace_ms: sandbox.program.stop.grace_ms,
            volumes: sandbox.program.volumes.iter().map(Mount::request).collect(),
            from_pool: sandbox.from_pool,
        }
    }
}

impl From<Compile> for CompileView {
    fn from(compile: Compile) -> Self {
        let Compile { program, limits, end } = compile;
        let (output, outcome) = end.map(|end| (OutputView::from(Output::of(&end.log_tail)), end.outcome)).unzip();
        Self { command: program.args, limits, output, outcome }
    }
}

impl From<ToldCase> for CaseView {
    fn from(ToldCase { index, case, output }: ToldCase) -> Self {
        let verdict = case.verdict();
        let (output, outcome) = case.end.map(|end| (CaseOutputView::from(output), end.outcome)).unzip();
        Self { index, name: case.name, verdict, outcome, output }
    }
}

impl From<CaseOutput> for CaseOutputView {
    fn from(CaseOutput { stdout, stderr }: CaseOutput) -> Self {
        let (stdout_omitted_bytes, stderr_omitted_bytes) = (stdout.omitted_bytes, stderr.omitted_bytes);
        let (stdout, stdout_encoding) = text(stdout.bytes);
        let (stderr, stderr_encoding) = text(stderr.bytes);
        Self { stdout, stdout_encoding, stdout_omitted_bytes, stderr, stderr_encoding, stderr_omitted_bytes }
    }
}

impl From<Output> for OutputView {
    fn from(output: Output) -> Self {
        let (stdout, stdout_encoding) = text(output.stdout);
        let (stderr, stderr_encoding) = text(output.stderr);
        let Output { stdout_omitted_bytes, stderr_omitted_bytes, .. } = output;
        Self { stdout, stdout_encoding, stdout_omitted_bytes, stderr, stderr_encoding, stderr_omitted_bytes }
    }
}

/// Bytes as JSON can hold them, and how.
fn text(bytes: Vec<u8>) -> (String, &'static str) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, "utf-8"),
        Err(error) => (BASE64.encode(error.as_bytes()), "base64"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_shown_as_text_and_other_bytes_as_base64() {
        assert_eq!(text("grün".into()), ("grün".to_owned(), "utf-8"));
        assert_eq!(text(vec![0xff, 0xfe]), ("//4=".to_owned(), "base64"));
    }
}
