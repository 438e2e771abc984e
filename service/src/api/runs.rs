//! `/v1/runs`: code in, result out.

pub(super) mod batch;

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};

use super::{
    App,
    caller::{Caller, Creator},
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::Keyed,
    json, query,
    view::RunView,
};
use crate::{
    engine::{ANSWER_STREAM_BYTES, Finished, Followed, Progress},
    sandbox::{Kind, RunRequest, Sandbox, SandboxId, TenantId},
    token::Scope,
};

/// How long a run that is being started is waited for beyond `wait_ms`: whoever hears 202 can rely on it.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long, when the service stops, the end of a run is waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Run a program and wait for its end
///
/// Makes a sandbox, starts it, waits for its end up to `wait_ms`, and removes it. When the run outlasts the wait, the answer is 202 and the run goes on; ask
/// for it at its `Location`. A client that goes away changes nothing. How the program ended, be it by a limit, is an `outcome`, not an error.
///
/// With `compile`, or in a language that is compiled, something is run before the program, with limits, output and outcome of its own. The program is then started in a fresh sandbox on the files
/// that this left; if it did not exit with 0, the program is not started, the run is `failed`, and its outcome says `compile_failed`.
///
/// With `cases`, the program is compiled once, if it is, and run once for each case; what came of each stands in `cases`, and of all in `verdict`. The run's `outcome` is that of the first case that is
/// not accepted, or else of the last; of one that was ended before all its cases were through, it says why. The run itself then has no output of its own: its `stdout`, `stderr` and log are empty.
#[utoipa::path(
    post,
    path = "/v1/runs",
    operation_id = "createRun",
    tag = "runs",
    security(("bearer" = ["runs"])),
    request_body(content = RunRequest, description = "At most 16 MiB.", examples(
        ("hello" = (summary = "A command", value = json!({ "image": "busybox", "command": ["echo", "hello"] }))),
        ("language" = (summary = "A program's text in a language", value = json!({ "language": "python", "source": "print(input())", "stdin": "hello" }))),
        ("compile" = (summary = "A program that is compiled first", value = json!({
            "image": "gcc",
            "files": [{ "path": "main.c", "content": "int main(void) { return 0; }" }],
            "compile": { "command": ["gcc", "-o", "main", "main.c"], "limits": { "memory_bytes": 536_870_912, "wall_ms": 20_000 } },
            "command": ["./main"],
            "limits": { "memory_bytes": 67_108_864, "wall_ms": 1000 },
        }))),
        ("cases" = (summary = "A program that is judged by its output", value = json!({
            "image": "busybox",
            "files": [{ "path": "double.sh", "content": "read n; echo $((n * 2))" }],
            "command": ["sh", "double.sh"],
            "cases": [{ "name": "small", "stdin": "2\n", "expected_stdout": "4\n" }, { "stdin": "21\n", "expected_stdout": "42\n" }],
            "comparison": "trimmed",
            "stop_at_failure": true,
        }))),
        ("full" = (summary = "A program with files, input and limits", value = json!({
            "image": "python",
            "command": ["python3", "main.py"],
            "files": [{ "path": "main.py", "content": "print(input())" }],
            "stdin": "hello",
            "limits": { "memory_bytes": 67_108_864, "wall_ms": 5000 },
            "wait_ms": 10_000,
        }))),
    )),
    responses(
        (status = 200, description = "The run ended.", body = RunView),
        (status = 202, description = "The run goes on, or waits for room.", body = RunView, headers(("Location" = String, description = "Where the run is found."))),
        refusal::OfCreation,
    ),
)]
pub(super) async fn create(State(app): State<Arc<App>>, Creator(caller): Creator, keyed: Keyed, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::Runs)?;
    let (asked, wait_ms) = json::read::<RunRequest>(body).await?.parse(&app.languages)?;
    let patience = Duration::from_millis(wait_ms);
    if let Some(id) = keyed.made {
        return go_on(&app, &caller.tenant, id, patience).await;
    }
    let mut run = app.engine.create(caller.owner(), asked, keyed.key).await?;
    if let Some(finished) = wait(&app, &mut run, patience).await {
        let output = app.engine.output_of(finished.sandbox.id, &finished.log_tail).await;
        // It was made, and it ended: whoever hears of a failure would make it again.
        let Ok(cases) = app.engine.cases_of(&finished.sandbox, ANSWER_STREAM_BYTES).await else {
            return accepted(&app, finished.sandbox.clone()).await;
        };
        return Ok(Json(RunView::new(finished.sandbox.clone(), Some(output), cases, None)).into_response());
    }
    accepted(&app, run.sandbox()).await
}

/// The answer to one that goes on.
async fn accepted(app: &App, run: Sandbox) -> Result<Response, ApiError> {
    let location = format!("/v1/runs/{}", run.id);
    let position = app.engine.queue_position(&run).await;
    let cases = app.engine.cases_of(&run, ANSWER_STREAM_BYTES).await.unwrap_or_else(|error| {
        tracing::warn!(sandbox.id = %run.id, %error, "what came of the cases is not told");
        None
    });
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(RunView::new(run, None, cases, position))).into_response())
}

/// The answer to a request whose run an earlier attempt made: as that would have waited for it.
async fn go_on(app: &App, tenant: &TenantId, id: SandboxId, patience: Duration) -> Result<Response, ApiError> {
    let run = app.engine.wait_until(tenant, id, patience, |run| run.state.is_final()).await?.ok_or(ApiError::NotFound)?;
    if run.state.is_final() { view(app, run).await.map(IntoResponse::into_response) } else { accepted(app, run).await }
}

/// The answer of which nothing but its run was kept.
pub(super) async fn told_again(app: &App, tenant: &TenantId, id: SandboxId) -> Result<Response, ApiError> {
    let run = app.engine.find(tenant, Kind::Run, id).await?.ok_or(ApiError::NotFound)?;
    view(app, run).await.map(IntoResponse::into_response)
}

/// The end, if it comes in time. Without it, the run is at least where a restart of the service finds it: in the queue, or with the keeper.
async fn wait(app: &App, run: &mut Followed, patience: Duration) -> Option<Arc<Finished>> {
    let in_time = tokio::select! {
        biased;
        ended = tokio::time::timeout(patience, run.ended()) => ended.ok().flatten(),
        () = app.engine.stopping() => None,
    };
    if in_time.is_some() {
        return in_time;
    }
    let is_stopping = app.engine.is_closing();
    // One that is compiled, or has cases, is in Postgres with all that it needs to be begun anew.
    let is_kept = run.sandbox().compile.is_some() || run.sandbox().judging.is_some();
    let patience = if is_stopping { STOP_PATIENCE } else { START_PATIENCE };
    let settled = run.until(|progress| match progress {
        Progress::Starting => is_kept && (!is_stopping || app.engine.is_handed_over()),
        Progress::Running(_) | Progress::Paused(_) => !is_stopping || app.engine.is_handed_over(),
        Progress::Queued | Progress::Ended(_) | Progress::Gone => true,
    });
    match tokio::time::timeout(patience, settled).await {
        Ok(Progress::Ended(finished)) => Some(finished),
        Ok(Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) | Progress::Gone) | Err(_) => None,
    }
}

/// A run as it is now
#[utoipa::path(
    get,
    path = "/v1/runs/{id}",
    operation_id = "readRun",
    tag = "runs",
    security(("bearer" = ["runs"])),
    params(parameter::Id),
    responses(
        (status = 200, description = "The run as it is now.", body = RunView),
        refusal::NotFound,
    ),
)]
pub(super) async fn read(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Json<RunView>, ApiError> {
    caller.require(Scope::Runs)?;
    let run = app.engine.find(&caller.tenant, Kind::Run, query::id(&id)?).await?.ok_or(ApiError::NotFound)?;
    view(&app, run).await
}

/// End a run
///
/// If it has not ended. Answers with how it ended.
#[utoipa::path(
    delete,
    path = "/v1/runs/{id}",
    operation_id = "cancelRun",
    tag = "runs",
    security(("bearer" = ["runs"])),
    params(parameter::Id),
    responses(
        (status = 200, description = "The run as it is now.", body = RunView),
        refusal::NotFound,
        refusal::KeeperUnavailable,
    ),
)]
pub(super) async fn cancel(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Json<RunView>, ApiError> {
    caller.require(Scope::Runs)?;
    let run = app.engine.cancel(caller.owner(), query::id(&id)?).await?.ok_or(ApiError::NotFound)?;
    view(&app, run).await
}

async fn view(app: &App, sandbox: Sandbox) -> Result<Json<RunView>, ApiError> {
    let output = if sandbox.state.is_final() { Some(app.engine.output(sandbox.id).await?) } else { None };
    let cases = app.engine.cases_of(&sandbox, ANSWER_STREAM_BYTES).await?;
    let position = app.engine.queue_position(&sandbox).await;
    Ok(Json(RunView::new(sandbox, output, cases, position)))
}
