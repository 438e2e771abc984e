//! `/v1/sandboxes/{id}/execs`: further processes in a running sandbox.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Path, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use sandbox_core::protocol::{OutputPolicy, WindowSize};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{
    App, answers,
    attach::{self, Subject},
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::Keyed,
    json,
    logs::{self, LogFrame},
    observe, query,
    sandboxes::{cursor, position},
    view::OutputView,
};
use crate::{
    engine::{EngineError, FollowedExec},
    sandbox::{
        Exec, ExecRequest, ExecState, Invalid, Kind, LIST_LIMIT, Outcome, Sandbox, SandboxId, Signal, SignalRequest, SizeRequest, TenantId,
        WAIT_MS, words,
    },
    token::Scope,
};

/// How long an exec that is being started is waited for beyond `wait_ms`.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take, behind all waiting, to tell of one that has ended.
const TELL_PATIENCE: Duration = Duration::from_secs(10);
/// Until when, from the beginning of a request on, its end is waited for at the latest: there is time then to tell of it before the router gives the request up.
const WAITED_WITHIN: Duration = Duration::from_millis(WAIT_MS.max).saturating_add(Duration::from_secs(35));

/// A process that was started in a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Exec)]
pub(super) struct ExecView {
    #[schema(value_type = Uuid)]
    id: SandboxId,
    #[schema(value_type = Uuid)]
    sandbox_id: SandboxId,
    state: ExecState,
    command: Vec<String>,
    /// Null: where the sandbox's own program was started.
    #[schema(required)]
    workdir: Option<String>,
    /// Null: whom the sandbox's own program was started as.
    #[schema(required)]
    user: Option<String>,
    stdin_open: bool,
    /// Null: it has no terminal.
    #[schema(required)]
    tty: Option<TtyView>,
    limits: ExecLimitsView,
    #[schema(value_type = words::OutputPolicy)]
    output_policy: OutputPolicy,
    /// Once it has ended, where one exec is shown.
    #[serde(flatten)]
    output: Option<OutputView>,
    /// Null while it goes on.
    #[schema(required)]
    outcome: Option<Outcome>,
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

/// The size of a terminal, in characters.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TerminalSize)]
struct TtyView {
    rows: u16,
    columns: u16,
}

/// What an exec may use by itself.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExecLimits)]
struct ExecLimitsView {
    /// Null: as long as its sandbox.
    #[schema(required)]
    wall_ms: Option<u64>,
    output_bytes: u64,
}

/// Some of a sandbox's execs, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ExecPage {
    items: Vec<ExecView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Which signal an exec is sent.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExecKillRequest)]
pub(super) struct KillRequest {
    /// SIGKILL, without one: it ends the exec and all that it started, with `stopped_by_user`. Any other goes to its first process alone.
    #[schema(value_type = Option<words::SignalGiven>)]
    signal: Option<SignalRequest>,
}

impl ExecView {
    fn new(exec: Exec, output: Option<OutputView>) -> Self {
        let plan = exec.plan;
        Self {
            id: exec.id,
            sandbox_id: exec.sandbox,
            state: exec.state,
            command: plan.command,
            workdir: plan.workdir,
            user: plan.user,
            stdin_open: plan.has_open_stdin,
            tty: plan.terminal.map(|WindowSize { rows, columns }| TtyView { rows, columns }),
            limits: ExecLimitsView { wall_ms: plan.wall_ms, output_bytes: plan.output_bytes },
            output_policy: plan.output_policy,
            output,
            outcome: exec.outcome,
            created_at: exec.created_at,
            started_at: exec.started_at,
            finished_at: exec.finished_at,
        }
    }
}

/// Start a further process in a running sandbox
///
/// Waits for its end up to `wait_ms`: 200 with its output, or 202. It goes on whoever goes away, ends with its sandbox at the latest, and is kept with it.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/execs",
    operation_id = "createExec",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = ExecRequest, description = "At most 16 MiB.", example = json!({ "command": ["sh", "-c", "cat; echo done"], "stdin": "hello\n", "limits": { "wall_ms": 5000 } })),
    responses(
        (status = 200, description = "It has ended.", body = ExecView),
        (status = 202, description = "It goes on; or it has ended, and its output is to be asked for.", body = ExecView, headers(("Location" = String, description = "Where it is found."))),
        refusal::OfLife,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    // However long the body takes: what was started is told of before the router gives the request up.
    let latest = Instant::now() + WAITED_WITHIN;
    let sandbox = sandbox(&app, &caller, &id).await?;
    let (asked, wait_ms) = json::read::<ExecRequest>(body).await?.parse()?;
    let deadline = latest.min(Instant::now() + Duration::from_millis(wait_ms));
    // By an earlier attempt at the same request.
    if let Some(made) = keyed.made {
        if let Some(followed) = app.engine.follow_exec(made) {
            return answer(&app, followed, deadline).await;
        }
        let exec = app.engine.find_exec_anywhere(&caller.tenant, made).await?.ok_or(ApiError::NotFound)?;
        return shown(&app, exec).await;
    }
    app.engine.touch(sandbox.id);
    let followed = app.engine.exec(caller.owner(), sandbox, asked, keyed.key).await?;
    answer(&app, followed, deadline).await
}

/// The end, if it comes in time; else what there is, as soon as it is past its start.
async fn answer(app: &Arc<App>, mut followed: FollowedExec, deadline: Instant) -> Result<Response, ApiError> {
    let in_time = tokio::select! {
        biased;
        ended = tokio::time::timeout_at(deadline, followed.ended()) => ended.is_ok(),
        () = app.engine.stopping() => false,
    };
    if !in_time {
        // Too late is an answer too: the state says so.
        drop(tokio::time::timeout(START_PATIENCE, followed.started()).await);
    }
    shown(app, followed.exec()).await
}

/// 200 with its output if it has ended, else 202; so too where its output cannot be told now: it was started, and who hears of a failure would start it again.
async fn shown(app: &Arc<App>, exec: Exec) -> Result<Response, ApiError> {
    let (has_ended, location) = (exec.state.is_final(), format!("/v1/sandboxes/{}/execs/{}", exec.sandbox, exec.id));
    if has_ended {
        let deadline = Instant::now() + TELL_PATIENCE;
        let told = tokio::time::timeout_at(deadline, ended(app, exec.clone(), deadline)).await;
        match told.unwrap_or(Err(ApiError::Timeout)) {
            Ok(told) => return Ok(told),
            Err(error) => tracing::warn!(exec.id = %exec.id, %error, "what an exec wrote is not told"),
        }
    }
    let mut response = (StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(ExecView::new(exec, None))).into_response();
    if has_ended {
        // Whoever comes again with the same key is to hear all of it.
        observe::mark_as_passing(&mut response);
    }
    Ok(response)
}

/// The answer of which nothing but its exec was kept.
pub(super) async fn told_again(app: &Arc<App>, tenant: &TenantId, id: SandboxId) -> Result<Response, ApiError> {
    let exec = app.engine.find_exec_anywhere(tenant, id).await?.ok_or(ApiError::NotFound)?;
    if exec.state.is_final() { ended(app, exec, Instant::now() + answers::PATIENCE).await } else { shown(app, exec).await }
}

/// One that has ended, with its output.
async fn ended(app: &Arc<App>, exec: Exec, deadline: Instant) -> Result<Response, ApiError> {
    let bytes = app.engine.exec_told_bytes(exec.id).await?;
    let room = app.answers.room(&exec.tenant, 1, bytes, deadline).await?;
    let app = Arc::clone(app);
    let work = async move {
        let output = app.engine.exec_output(exec.id).await?;
        room.answer(StatusCode::OK, ExecView::new(exec, Some(output.into()))).await
    };
    answers::to_its_end(work).await
}

/// The processes that were started in a sandbox, newest first
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/execs",
    operation_id = "listExecs",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Named, parameter::Page),
    responses(
        (status = 200, description = "A page, without output.", body = ExecPage),
        refusal::NotFound,
    ),
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Json<ExecPage>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let (mut before, mut limit) = (None, LIST_LIMIT.default.unwrap_or(LIST_LIMIT.max));
    for (name, text) in query::pairs(&uri)? {
        match name.as_str() {
            "limit" => {
                let asked = query::value::<u64>("limit", &text)
                    .map_err(|_| Invalid { bound: Some(&LIST_LIMIT), ..Invalid::new("limit", "not a number") })?;
                limit = LIST_LIMIT.check(asked)?;
            }
            "cursor" => before = Some(position(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?),
            _ => return Err(query::unknown(&name)),
        }
    }
    let sandbox = sandbox(&app, &caller, &id).await?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    // One more than asked for tells whether there is another page.
    let mut execs = app.engine.list_execs(&caller.tenant, sandbox.id, before, u32::try_from(limit + 1).unwrap_or(u32::MAX)).await?;
    let has_more = execs.len() > limit;
    execs.truncate(limit);
    let next_cursor = if has_more { execs.last().map(|exec| cursor(exec.id)) } else { None };
    Ok(Json(ExecPage { items: execs.into_iter().map(|exec| ExecView::new(exec, None)).collect(), next_cursor }))
}

/// A process that was started in a sandbox, as it is now
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/execs/{eid}",
    operation_id = "readExec",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Exec),
    responses(
        (status = 200, description = "The exec as it is now; with its output, if it has ended.", body = ExecView),
        refusal::NotFound,
        refusal::NoCapacity,
    ),
)]
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((id, eid)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let (_, exec) = exec(&app, &caller, &id, &eid).await?;
    if exec.state.is_final() {
        return ended(&app, exec, Instant::now() + answers::PATIENCE).await;
    }
    Ok(Json(ExecView::new(exec, None)).into_response())
}

/// End an exec, or send a signal to it
///
/// SIGKILL ends it and all that it started, with `stopped_by_user`. Any other signal goes to its first process alone, and is not sent twice: where nobody heard whether it was, the answer is
/// 409 (`outcome_unknown`).
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/execs/{eid}/kill",
    operation_id = "killExec",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Exec),
    request_body(content = Option<KillRequest>, description = "May be left out.", example = json!({ "signal": "SIGTERM" })),
    responses(
        (status = 204, description = "The signal was sent."),
        refusal::NotFound,
        refusal::WrongState,
        refusal::Conflict,
        refusal::OutcomeUnknown,
        refusal::KeeperUnavailable,
    ),
)]
pub(super) async fn kill(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    Path((id, eid)): Path<(String, String)>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let (sandbox, exec) = exec(&app, &caller, &id, &eid).await?;
    let asked: KillRequest = json::read_or_default(body).await?;
    let signal = asked.signal.map_or(Ok(Signal::KILL), |signal| signal.parse("signal"))?;
    app.engine.touch(sandbox.id);
    // As of a sandbox.
    let is_killed_again = signal == Signal::KILL && keyed.is_begun;
    if !is_killed_again {
        keyed.begin(&app).await?;
    }
    match app.engine.signal_exec(&caller.owner(), &sandbox, &exec, signal).await {
        Err(EngineError::WrongState(state)) if is_killed_again && state.is_final() => {}
        signaled => signaled?,
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Tell an exec the size of its terminal
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/execs/{eid}/resize",
    operation_id = "resizeExec",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Exec),
    request_body(content = SizeRequest, description = "In characters.", example = json!({ "rows": 24, "columns": 80 })),
    responses(
        (status = 204, description = "It knows."),
        refusal::NotFound,
        refusal::WrongState,
        refusal::Conflict,
        refusal::KeeperUnavailable,
    ),
)]
pub(super) async fn resize(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((id, eid)): Path<(String, String)>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let (_, exec) = exec(&app, &caller, &id, &eid).await?;
    let size = json::read::<SizeRequest>(body).await?.parse()?;
    if exec.plan.terminal.is_none() {
        return Err(ApiError::Conflict("it has no terminal".to_owned()));
    }
    app.engine.resize_exec(&exec, size).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What an exec writes, as it comes
///
/// As the log of a sandbox.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/execs/{eid}/logs",
    operation_id = "readExecLog",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Exec, parameter::LogParameters, parameter::LastEventId),
    responses(
        (status = 101, description = "The stream begins, over WebSocket."),
        (status = 200, description = "The frames, in the form that was asked for.", content(
            (LogFrame = "application/x-ndjson"),
            (String = "text/event-stream"),
            (String = "text/plain"),
        )),
        (status = 204, description = "The end was seen before."),
        refusal::NotFound,
    ),
)]
pub(super) async fn log(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((id, eid)): Path<(String, String)>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let asked = logs::asked(query::pairs(&uri)?)?;
    let (_, exec) = exec(&app, &caller, &id, &eid).await?;
    logs::respond(asked, &headers, upgrade, |query| app.engine.read_exec_log(&exec, query))
}

/// Input, output and terminal of an exec, over WebSocket
///
/// As of a sandbox's own program.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/execs/{eid}/attach",
    operation_id = "attachExec",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Exec, parameter::LogParameters),
    responses(
        (status = 101, description = "The stream begins."),
        refusal::NotFound,
    ),
)]
pub(super) async fn attach(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((id, eid)): Path<(String, String)>,
    uri: Uri,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let asked = logs::asked(query::pairs(&uri)?)?;
    let (sandbox, exec) = exec(&app, &caller, &id, &eid).await?;
    let subject = Subject { id: exec.id, sandbox: sandbox.id, is_terminal: exec.plan.terminal.is_some() };
    let log = app.engine.read_exec_log(&exec, asked.query);
    attach::attach(app, subject, log, upgrade)
}

async fn sandbox(app: &App, caller: &Caller, id: &str) -> Result<Sandbox, ApiError> {
    app.engine.find(&caller.tenant, Kind::Sandbox, query::object(app, caller, id).await?).await?.ok_or(ApiError::NotFound)
}

async fn exec(app: &App, caller: &Caller, id: &str, eid: &str) -> Result<(Sandbox, Exec), ApiError> {
    let sandbox = sandbox(app, caller, id).await?;
    let exec = app.engine.find_exec(&caller.tenant, sandbox.id, query::id(eid)?).await?.ok_or(ApiError::NotFound)?;
    Ok((sandbox, exec))
}
