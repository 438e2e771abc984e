//! `/v1/runs/batch`: many runs by one request, each accepted or refused for itself; and many runs in one answer.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use axum::{
    body::Body,
    extract::State,
    http::{StatusCode, Uri, request::Parts},
    response::{IntoResponse as _, Response},
};
use futures_util::future::join_all;
use sandbox_core::fail_point;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};
use tokio::time::Instant;
use tracing::Instrument as _;
use utoipa::ToSchema;

use super::{
    super::{
        App,
        answers::{self, Room},
        caller::Caller,
        contract::{parameter, refusal},
        error::{ApiError, Problem},
        idempotency::{self, Keyed},
        json, observe, query,
        view::RunView,
    },
    tell::{self, Times, Told},
    wait,
};
use crate::{
    engine::{Followed, Shown},
    sandbox::{BatchRequest, Invalid, Kind, RUNS_MAX, RunRequest, Sandbox, SandboxId, TenantId},
    token::Scope,
};

/// How long runs are accepted. What is not reached by then is refused: the answer is to come in time.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(30);

/// Many runs, in the order in which they were asked for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Batch)]
pub(in crate::api) struct Batch {
    items: Vec<Item>,
}

/// One of many: the run as it is now, or why there is none.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchItem)]
struct Item {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = RunView)]
    run: Option<Box<RunView>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Problem)]
    problem: Option<Box<Problem>>,
}

impl Item {
    fn told(run: RunView) -> Self {
        Self { run: Some(Box::new(run)), problem: None }
    }

    fn refused(problem: Problem) -> Self {
        Self { run: None, problem: Some(Box::new(problem)) }
    }
}

/// A run that was accepted.
enum Accepted {
    New(Followed),
    /// By an earlier attempt at the same request.
    Earlier(SandboxId),
}

/// Run many programs
///
/// As many `POST /v1/runs` at once: each run is accepted or refused for itself, in the order of the request, counts against quotas and rates for itself, and is told in its place of the answer. All of
/// them are waited for up to `wait_ms`; those that outlast it go on, and `GET /v1/runs` tells of all of them. Of the output of each it tells the last 64 KiB of each stream.
///
/// With an `Idempotency-Key` none is made twice, whatever happened in between. An answer with a refusal that may be none later (`retryable`, or 404, 429) is not kept: the same request with
/// the same key tells of those that were accepted, and tries the others again.
#[utoipa::path(
    post,
    path = "/v1/runs/batch",
    operation_id = "createRuns",
    tag = "runs",
    security(("bearer" = ["runs"])),
    request_body(content = BatchRequest, description = "At most 16 MiB.", example = json!({
        "runs": [
            { "image": "busybox", "command": ["echo", "one"] },
            { "image": "busybox", "command": ["sh", "-c", "read line; echo $line"], "stdin": "two\n", "limits": { "wall_ms": 2000 } },
        ],
        "wait_ms": 20_000,
    })),
    responses(
        (status = 200, description = "None goes on: each has ended, or was refused.", body = Batch),
        (status = 202, description = "Some go on, or wait for room; or have ended, and their output is to be asked for.", body = Batch),
        refusal::NotFound,
        refusal::NoCapacity,
    ),
)]
pub(in crate::api) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    parts: Parts,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::Runs)?;
    let times = Times::begin();
    let (runs, wait_ms) = json::read::<BatchRequest>(body).await?.parse()?;
    let (request_id, tenant) = (observe::request_id(&parts), caller.tenant.clone());
    // In a task of its own: a client who goes away changes nothing.
    let accepting = tokio::spawn(accept(Arc::clone(&app), caller, keyed, runs).in_current_span());
    let accepted = accepting.await.map_err(|_panic| ApiError::panicked())?;
    let patience = times.patience(wait_ms);
    let waited = join_all(accepted.into_iter().map(|one| wait_for(&app, &tenant, one, patience))).await;

    let (deadline, shown) = (times.told_by(), Shown::among(waited.len()));
    let made: Vec<&Told> = waited.iter().filter_map(|one| one.as_ref().ok()).collect();
    let room = tell::room_if_any(&app, &tenant, &made, shown, deadline).await;
    let work = async move {
        let (mut goes_on, mut is_passing) = (false, false);
        let mut items = Vec::with_capacity(waited.len());
        for one in waited {
            items.push(match one {
                Ok(told) => {
                    let has_ended = told.has_ended();
                    let (view, is_whole) = tell::view_in_time(&app, room.as_ref(), told, shown, deadline).await;
                    goes_on |= !(has_ended && is_whole);
                    is_passing |= has_ended && !is_whole;
                    Item::told(view)
                }
                Err(error) => {
                    let problem = error.problem(request_id.clone());
                    problem.count(&app.metrics);
                    is_passing |= may_be_none_later(&problem);
                    Item::refused(problem)
                }
            });
        }
        let status = if goes_on { StatusCode::ACCEPTED } else { StatusCode::OK };
        let mut response = room.unwrap_or_else(Room::uncounted).answer(status, Batch { items }).await?;
        if is_passing {
            observe::mark_as_passing(&mut response);
        }
        Ok(response)
    };
    answers::to_its_end(work).await
}

/// Many runs as they are now
///
/// Each in its place, as in the answer to a batch.
#[utoipa::path(
    get,
    path = "/v1/runs",
    operation_id = "readRuns",
    tag = "runs",
    security(("bearer" = ["runs"])),
    params(parameter::RunIds),
    responses((status = 200, description = "The runs as they are now.", body = Batch), refusal::NoCapacity),
)]
pub(in crate::api) async fn list(State(app): State<Arc<App>>, caller: Caller, parts: Parts) -> Result<Response, ApiError> {
    caller.require(Scope::Runs)?;
    let ids = ids(&parts.uri)?;
    let request_id = observe::request_id(&parts);
    let room = room(&app, &caller.tenant, &ids, Shown::among(ids.len())).await?;
    let work = async move {
        let runs = app.engine.runs(&caller.tenant, &ids).await?;
        let mut runs: HashMap<SandboxId, Sandbox> = runs.into_iter().map(|run| (run.id, run)).collect();
        let mut items = Vec::with_capacity(ids.len());
        for id in &ids {
            items.push(match runs.remove(id) {
                Some(run) => Item::told(tell::view(&app, Told::Seen(run), Shown::among(ids.len())).await?),
                None => Item::refused(ApiError::NotFound.problem(request_id.clone())),
            });
        }
        room.answer(StatusCode::OK, Batch { items }).await
    };
    answers::to_its_end(work).await
}

/// Room to tell of these, whatever they are now.
async fn room(app: &App, tenant: &TenantId, ids: &[SandboxId], shown: Shown) -> Result<Room, ApiError> {
    let bytes = app.engine.told_bytes(tenant, ids, shown).await?;
    app.answers.room(tenant, ids.len(), bytes, Instant::now() + answers::PATIENCE).await
}

/// What is kept of a large answer: which runs it tells of, and what it says of the others.
pub(in crate::api) fn without_runs(body: &[u8]) -> Vec<u8> {
    /// All else is passed over, not read.
    #[derive(Serialize, Deserialize)]
    struct Kept<'a> {
        #[serde(borrow)]
        items: Vec<KeptItem<'a>>,
    }
    #[derive(Serialize, Deserialize)]
    struct KeptItem<'a> {
        #[serde(borrow, skip_serializing_if = "Option::is_none")]
        run: Option<KeptRun<'a>>,
        #[serde(borrow, skip_serializing_if = "Option::is_none")]
        problem: Option<&'a RawValue>,
    }
    #[derive(Serialize, Deserialize)]
    struct KeptRun<'a> {
        #[serde(borrow)]
        id: &'a RawValue,
    }
    let kept = serde_json::from_slice::<Kept<'_>>(body).and_then(|kept| serde_json::to_vec(&kept));
    kept.unwrap_or_else(|_no_batch| body.to_vec())
}

/// The answer of which this was kept.
pub(in crate::api) async fn told_again(app: &Arc<App>, tenant: &TenantId, kept: Vec<u8>) -> Result<Response, ApiError> {
    let mut answer: Value = serde_json::from_slice(&kept).map_err(|error| ApiError::Internal(error.into()))?;
    let is_whole = |item: &Value| item.get("run").is_none_or(|run| run.get("state").is_some());
    let items = answer.get("items").and_then(Value::as_array).filter(|items| !items.iter().all(is_whole));
    let Some(items) = items else { return Ok(Body::from(kept).into_response()) };
    let shown = Shown::among(items.len());
    let id_of = |run: &Value| run["id"].as_str().and_then(|id| id.parse().ok()).ok_or(ApiError::NotFound);
    let ids = items.iter().filter_map(|item| item.get("run")).map(id_of).collect::<Result<Vec<SandboxId>, _>>()?;
    let room = room(app, tenant, &ids, shown).await?;
    let (app, tenant) = (Arc::clone(app), tenant.clone());
    let work = async move {
        let runs = answer.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten().filter_map(|item| item.get_mut("run"));
        for (run, id) in runs.zip(ids) {
            let found = app.engine.find(&tenant, Kind::Run, id).await?.ok_or(ApiError::NotFound)?;
            let view = tell::view(&app, Told::Seen(found), shown).await?;
            *run = serde_json::to_value(view).map_err(|error| ApiError::Internal(error.into()))?;
        }
        room.answer(StatusCode::OK, answer).await
    };
    answers::to_its_end(work).await
}

/// How much a run that has ended may hold of its output until the others of its batch have.
const HELD_BYTES_MAX: usize = 16 * 1024;

/// Accepts or refuses one after the other.
async fn accept(app: Arc<App>, caller: Caller, keyed: Keyed, runs: Vec<Box<RawValue>>) -> Vec<Result<Accepted, ApiError>> {
    let ends_at = Instant::now() + ACCEPT_PATIENCE;
    let mut all = Vec::with_capacity(runs.len());
    for (place, run) in runs.iter().enumerate() {
        let accepted = if Instant::now() < ends_at { accept_one(&app, &caller, &keyed, place, run).await } else { Err(ApiError::Timeout) };
        if accepted.is_ok() {
            fail_point::reached("service.batch.accepted");
        }
        all.push(accepted.map_err(|error| placed(error, place)));
    }
    all
}

async fn accept_one(app: &App, caller: &Caller, keyed: &Keyed, place: usize, run: &RawValue) -> Result<Accepted, ApiError> {
    let body = run.get().as_bytes();
    let asked = json::parse::<RunRequest>(body)?.parse_in_batch(&app.languages)?;
    let keyed = keyed.part(app, place, body).await?;
    Ok(match keyed.made {
        Some(id) => Accepted::Earlier(id),
        None => match app.engine.create(caller.owner(), asked, keyed.key.clone().into()).await {
            Ok(run) => Accepted::New(run),
            Err(error) => {
                if let Some(key) = &keyed.key {
                    idempotency::give_back(app, key).await;
                }
                return Err(error.into());
            }
        },
    })
}

/// What is wrong with one, by its place in the whole.
fn placed(mut error: ApiError, place: usize) -> ApiError {
    if let ApiError::Invalid(Invalid { field, .. }) = &mut error {
        *field = if field.is_empty() { format!("runs[{place}]") } else { format!("runs[{place}].{field}") };
    }
    error
}

async fn wait_for(app: &App, tenant: &TenantId, accepted: Result<Accepted, ApiError>, patience: Duration) -> Result<Told, ApiError> {
    match accepted? {
        Accepted::New(mut run) => Ok(match wait(app, &mut run, patience).await {
            // It may wait long for the others, and is stored: its output is read when there is room for it.
            Some(finished) if finished.log_tail.bytes.len() > HELD_BYTES_MAX => Told::Seen(finished.sandbox.clone()),
            Some(finished) => Told::Ended(finished),
            None => {
                app.engine.keep(&run).await?;
                Told::GoesOn(run.sandbox())
            }
        }),
        Accepted::Earlier(id) => {
            let run = app.engine.wait_until(tenant, id, patience, |run| run.state.is_final()).await?;
            run.map(Told::Seen).ok_or(ApiError::NotFound)
        }
    }
}

/// Whether the same may be accepted later.
fn may_be_none_later(problem: &Problem) -> bool {
    let is_kept = StatusCode::from_u16(problem.status).is_ok_and(idempotency::is_kept);
    // An image that is not here may be imported.
    problem.retryable || !is_kept || problem.status == StatusCode::NOT_FOUND.as_u16()
}

/// The ids that a query asks for.
fn ids(uri: &Uri) -> Result<Vec<SandboxId>, ApiError> {
    let mut ids = Vec::new();
    for (name, text) in query::pairs(uri)? {
        if name != "ids" {
            return Err(query::unknown(&name));
        }
        for id in text.split(',') {
            ids.push(query::value("ids", id)?);
        }
    }
    if !(1..=RUNS_MAX).contains(&ids.len()) {
        return Err(Invalid::new("ids", format!("{} ids are not 1 to {RUNS_MAX}", ids.len())).into());
    }
    let mut seen = HashSet::new();
    // What one has written is read for each place that it has.
    if let Some(twice) = ids.iter().find(|id| !seen.insert(**id)) {
        return Err(Invalid::new("ids", format!("{twice} is there more than once")).into());
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The field that is named as wrong.
    fn field_of(error: &ApiError) -> Value {
        serde_json::to_value(error.problem(String::new())).unwrap()["field"].clone()
    }

    fn parsed(query: &str) -> Result<Vec<SandboxId>, Value> {
        ids(&format!("/v1/runs?{query}").parse().unwrap()).map_err(|error| field_of(&error))
    }

    #[test]
    fn ids_come_one_by_one_or_with_commas() {
        let [a, b, c] =
            ["0190b5a4-0000-7000-8000-00000000000a", "0190b5a4-0000-7000-8000-00000000000b", "0190b5a4-0000-7000-8000-00000000000c"];
        let all: Vec<SandboxId> = [a, b, c].iter().map(|id| id.parse().unwrap()).collect();
        assert_eq!(parsed(&format!("ids={a},{b}&ids={c}")), Ok(all));
        for bad in ["", "ids=", "ids=a", &format!("ids={a},"), &format!("ids={a},{b}&ids={a}")] {
            assert_eq!(parsed(bad), Err(json!("ids")), "{bad}");
        }
        let many =
            |count: u128| (0..count).map(|number| SandboxId(uuid::Uuid::from_u128(number)).to_string()).collect::<Vec<_>>().join(",");
        assert_eq!(parsed(&format!("ids={}", many(100))).map(|ids| ids.len()), Ok(100));
        assert_eq!(parsed(&format!("ids={}", many(101))), Err(json!("ids")));
        assert_eq!(parsed("id=a"), Err(json!("id")));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        let named = |field: &str| field_of(&placed(Invalid::new(field, "").into(), 3));
        assert_eq!(named("limits.pids"), "runs[3].limits.pids");
        assert_eq!(named(""), "runs[3]");
    }

    #[test]
    fn a_large_answer_is_kept_by_its_ids_and_refusals() {
        let body = json!({ "items": [{ "run": { "id": "a", "state": "exited", "stdout": "much" } }, { "problem": { "status": 422 } }] });
        let kept: Value = serde_json::from_slice(&without_runs(body.to_string().as_bytes())).unwrap();
        assert_eq!(kept, json!({ "items": [{ "run": { "id": "a" } }, { "problem": { "status": 422 } }] }));
    }
}
