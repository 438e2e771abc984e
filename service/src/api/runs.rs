//! `/v1/runs`: code in, result out.

pub(super) mod batch;
mod tell;

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, State},
    http::{StatusCode, header},
    response::Response,
};
use tell::{START_PATIENCE, Times, Told};
use tokio::time::Instant;

use super::{
    App,
    answers::{self, Room},
    caller::{Caller, Creator},
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::Keyed,
    images::pull_for,
    json, observe,
    pass::Bid,
    query,
    view::RunView,
};
use crate::{
    engine::{EngineError, Finished, Followed, Progress, Promise, Shown},
    sandbox::{Kind, RunRequest, Sandbox, SandboxId, TenantId},
    token::Scope,
};

/// How long, when the service stops, the end of a run is waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Run a program and wait for its end
///
/// Makes a sandbox, starts it, waits for its end up to `wait_ms`, and removes it. When the run outlasts the wait, the answer is 202 and the run goes on; ask
/// for it at its `Location`. A client that goes away changes nothing. How the program ended, be it by a limit, is an `outcome`, not an error. So it is too where the run has ended and there is no
/// memory for its output, or no time: then `state` says so, and `stdout` is not there yet.
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
        (status = 202, description = "The run goes on, or waits for room; or has ended, and its output is to be asked for.", body = RunView, headers(("Location" = String, description = "Where the run is found."))),
        refusal::OfCreation,
        refusal::OutcomeUnknown,
        refusal::OfRegistries,
    ),
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Creator(caller): Creator,
    keyed: Keyed,
    bid: Bid,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::Runs)?;
    let times = Times::begin();
    let (asked, wait_ms) = json::read::<RunRequest>(body).await?.parse(&app.languages)?;
    // By an earlier attempt, or by another node.
    if let Some(id) = bid.made(&app, &caller, &keyed).await? {
        return waited(&app, &caller, id, (times, wait_ms)).await;
    }
    pull_for(&app, &caller, &asked, &bid).await?;
    let patience = times.patience(wait_ms);
    let tenant = caller.tenant.clone();
    let mut how = bid.making(keyed);
    // Whoever waits for the end, and could not ask again for the same, hears of nothing before. What it leaves in a volume is not to be by nobody.
    if how.key.is_none() && how.id.is_none() && !patience.is_zero() && asked.volumes.is_empty() {
        how.promise = Promise::Later;
    }
    let mut run = match (app.engine.create(caller.owner(), asked, how).await, bid.id()) {
        (Err(EngineError::MadeAlready), Some(id)) => return waited(&app, &caller, id, (times, wait_ms)).await,
        (created, _) => created?,
    };
    observe::note_sandbox(run.id());
    let told = match wait(&app, &mut run, patience).await {
        Some(finished) => Told::Ended(finished),
        None => {
            app.engine.keep(&run).await?;
            Told::GoesOn(run.sandbox())
        }
    };
    answer(&app, &tenant, told, times).await
}

/// The same of a run that somebody else made, waited for as they would have.
async fn waited(app: &Arc<App>, caller: &Caller, id: SandboxId, (times, wait_ms): (Times, u64)) -> Result<Response, ApiError> {
    let patience = times.patience(wait_ms);
    let run = app.engine.wait_until(&caller.tenant, id, patience, |run| run.state.is_final()).await?.ok_or(ApiError::NotFound)?;
    answer(app, &caller.tenant, Told::Seen(run), times).await
}

/// The answer to who had it made: of what was made, whatever fails.
async fn answer(app: &Arc<App>, tenant: &TenantId, told: Told, times: Times) -> Result<Response, ApiError> {
    let (deadline, has_ended) = (times.told_by(), told.has_ended());
    let location = format!("/v1/runs/{}", told.run().id);
    let position = app.engine.queue_position(told.run()).await;
    let room = tell::room_if_any(app, tenant, &[&told], Shown::ALONE, deadline).await;
    let app = Arc::clone(app);
    let work = async move {
        let (view, is_whole) = tell::view_in_time(&app, room.as_ref(), told, Shown::ALONE, deadline).await;
        let is_told = has_ended && is_whole;
        let status = if is_told { StatusCode::OK } else { StatusCode::ACCEPTED };
        let mut response = room.unwrap_or_else(Room::uncounted).answer(status, view.at(position)).await?;
        if !is_told {
            response.headers_mut().insert(header::LOCATION, location.parse().expect("a path of ours is ASCII"));
        }
        if has_ended && !is_whole {
            // Whoever comes again with the same key is to hear all of it.
            observe::mark_as_passing(&mut response);
        }
        Ok(response)
    };
    answers::to_its_end(work).await
}

/// The answer of which nothing but its run was kept.
pub(super) async fn told_again(app: &Arc<App>, tenant: &TenantId, id: SandboxId) -> Result<Response, ApiError> {
    let run = app.engine.find(tenant, Kind::Run, id).await?.ok_or(ApiError::NotFound)?;
    seen(app, run).await
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
        refusal::NoCapacity,
    ),
)]
pub(super) async fn read(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Response, ApiError> {
    caller.require(Scope::Runs)?;
    let run = app.engine.find(&caller.tenant, Kind::Run, named(&id)?).await?.ok_or(ApiError::NotFound)?;
    seen(&app, run).await
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
        refusal::OnNode,
    ),
)]
pub(super) async fn cancel(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Response, ApiError> {
    caller.require(Scope::Runs)?;
    let run = app.engine.cancel(caller.owner(), named(&id)?).await?.ok_or(ApiError::NotFound)?;
    seen(&app, run).await
}

/// The run that a path names.
fn named(id: &str) -> Result<SandboxId, ApiError> {
    let id = query::id(id)?;
    observe::note_sandbox(id);
    Ok(id)
}

/// The run as it is now, to who can ask again.
async fn seen(app: &Arc<App>, run: Sandbox) -> Result<Response, ApiError> {
    let position = app.engine.queue_position(&run).await;
    let (tenant, told) = (run.tenant.clone(), Told::Seen(run));
    let room = tell::room(app, &tenant, &[&told], Shown::ALONE, Instant::now() + answers::PATIENCE).await?;
    let app = Arc::clone(app);
    answers::to_its_end(async move { room.answer(StatusCode::OK, tell::view(&app, told, Shown::ALONE).await?.at(position)).await }).await
}
