//! `/v1/sandboxes/{id}/start`, `stop`, `kill`, `pause`, `resume` and `wait`: what a sandbox is told between its creation and its removal.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::Uri,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::Keyed,
    json, query,
    sandboxes::view,
    view::SandboxView,
};
use crate::{
    engine::{EngineError, Until, Waited},
    sandbox::{GRACE_MS, Invalid, Kind, Sandbox, Signal, SignalRequest, UNTIL_MS, words},
    token::Scope,
};

/// Body of `POST /v1/sandboxes/{id}/stop`. May be absent.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StopRequest {
    /// Instead of the sandbox's own `stop_signal`.
    #[schema(value_type = Option<words::SignalGiven>)]
    signal: Option<SignalRequest>,
    /// How long it has after the signal before it is killed, instead of the sandbox's own `stop_grace_ms`.
    #[schema(extensions(("x-bound" = json!(GRACE_MS))))]
    grace_ms: Option<u64>,
}

/// Body of `POST /v1/sandboxes/{id}/kill`. May be absent.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct KillRequest {
    /// By name or by number. SIGKILL, which is the default, ends the sandbox; any other goes to its first process alone.
    #[schema(value_type = Option<words::SignalGiven>)]
    signal: Option<SignalRequest>,
}

/// Body of `POST /v1/sandboxes/{id}/start`. May be absent.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StartRequest {
    /// Without what it wrote before, which is given up; also without the files that it was made with.
    #[serde(default)]
    fresh: bool,
}

/// Body of operations that need nothing to be said. May be absent.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// How a waiting ended.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = WaitResult)]
pub(super) struct WaitView {
    /// `reached`: it is so. `timed_out`: not yet. `ended`: it has ended, or is gone, and will not be so. `stopping`: this service stops; ask again.
    result: Waited,
    /// As it was seen last; null: it is gone, and nobody saw how it ended.
    #[schema(required)]
    sandbox: Option<SandboxView>,
}

/// Start a sandbox again
///
/// One that has ended begins another life, on what it wrote in those before if it was made with `keep_layer`; its log begins anew, and its input is empty. What its limits
/// take is counted as for a new one, and it does not wait for room. Where what it wrote is not kept any more, the answer is 409 (`layer_lost`), unless it is to begin `fresh`. Nothing
/// happens to one that runs, or is about to.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/start",
    operation_id = "startSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = Option<StartRequest>, description = "May be absent.", example = json!({ "fresh": true })),
    responses(
        (status = 200, description = "It runs, has failed to start, or is still starting: `state` says which.", body = SandboxView),
        refusal::OfLife,
        refusal::LayerLost,
        refusal::VolumeNotFound,
        refusal::VolumeElsewhere,
        refusal::RateLimited,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn start(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let StartRequest { fresh } = json::read_or_default(body).await?;
    // By an earlier attempt at the same request.
    if let Some(started) = keyed.made {
        return answer(&app, app.engine.find(&caller.tenant, Kind::Sandbox, started).await?).await;
    }
    let id = query::object(&app, &caller, &id).await?;
    answer(&app, app.engine.start_again(caller.owner(), id, fresh, keyed.key).await?).await
}

/// Ask a sandbox to end
///
/// It is told its stop signal, and killed when its grace is over. Answers when it has ended.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/stop",
    operation_id = "stopSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = Option<StopRequest>, example = json!({ "signal": "SIGTERM", "grace_ms": 5000 })),
    responses(
        (status = 200, description = "The sandbox as it is now.", body = SandboxView),
        refusal::OfLife,
    ),
)]
pub(super) async fn stop(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let StopRequest { signal, grace_ms } = json::read_or_default(body).await?;
    let signal = signal.map(|signal| signal.parse("signal")).transpose()?;
    let grace = grace_ms.map(|ms| GRACE_MS.check(ms)).transpose()?.map(Duration::from_millis);
    let id = query::object(&app, &caller, &id).await?;
    answer(&app, app.engine.stop_sandbox(caller.owner(), id, signal, grace).await?).await
}

/// Send a signal
///
/// A signal is not sent twice: where nobody heard whether it was, the answer is 409 (`outcome_unknown`), also to a request that is sent again with its `Idempotency-Key`.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/kill",
    operation_id = "killSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = Option<KillRequest>, example = json!({ "signal": "SIGUSR1" })),
    responses(
        (status = 200, description = "The sandbox as it is now.", body = SandboxView),
        refusal::OfLife,
        refusal::OutcomeUnknown,
    ),
)]
pub(super) async fn kill(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let KillRequest { signal } = json::read_or_default(body).await?;
    let signal = signal.map_or(Ok(Signal::KILL), |signal| signal.parse("signal"))?;
    let id = query::object(&app, &caller, &id).await?;
    // What is dead dies no second time: of all signals this one may be sent again.
    let is_killed_again = signal == Signal::KILL && keyed.is_begun;
    if !is_killed_again {
        keyed.begin(&app).await?;
    }
    match app.engine.signal(caller.owner(), id, signal).await {
        Err(EngineError::WrongState(state)) if is_killed_again && state.is_final() => {
            answer(&app, app.engine.find(&caller.tenant, Kind::Sandbox, id).await?).await
        }
        signaled => answer(&app, signaled?).await,
    }
}

/// Let a sandbox stand still
///
/// Its time goes on; it uses no CPU.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/pause",
    operation_id = "pauseSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = Option<Nothing>, example = json!({})),
    responses(
        (status = 200, description = "The sandbox as it is now.", body = SandboxView),
        refusal::OfLife,
    ),
)]
pub(super) async fn pause(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SandboxView>, ApiError> {
    set_paused(&app, &caller, &id, body, true).await
}

/// Let a sandbox go on
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/resume",
    operation_id = "resumeSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = Option<Nothing>, example = json!({})),
    responses(
        (status = 200, description = "The sandbox as it is now.", body = SandboxView),
        refusal::OfLife,
    ),
)]
pub(super) async fn resume(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SandboxView>, ApiError> {
    set_paused(&app, &caller, &id, body, false).await
}

async fn set_paused(app: &App, caller: &Caller, id: &str, body: Body, is_paused: bool) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let Nothing {} = json::read_or_default(body).await?;
    let id = query::object(app, caller, id).await?;
    answer(app, app.engine.set_paused(caller.owner(), id, is_paused).await?).await
}

async fn answer(app: &App, sandbox: Option<Sandbox>) -> Result<Json<SandboxView>, ApiError> {
    Ok(view(app, sandbox.ok_or(ApiError::NotFound)?).await)
}

/// Wait for a sandbox
///
/// Until it is so, or will not be so any more, or the time is over. Of 256 waits of a tenant at one node at one time any other is refused (429, quota `waits`).
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/wait",
    operation_id = "waitForSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(
        parameter::Named,
        ("until" = Option<String>, Query, description = "What is waited for.",
            extensions(("x-schema" = json!({ "enum": ["running", "paused", "exited", "removed"], "default": "exited" })))),
        ("timeout_ms" = Option<u64>, Query, description = "For how long, in milliseconds.", extensions(("x-bound" = json!(UNTIL_MS)))),
    ),
    responses(
        (status = 200, description = "How the waiting ended.", body = WaitView),
        refusal::NotFound,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn wait(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Json<WaitView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let (until, patience) = asked(query::pairs(&uri)?)?;
    let id = query::object(&app, &caller, &id).await?;
    let waited = app.engine.wait_for(&caller.tenant, id, until, patience, app.outbox.subscribe()).await?;
    let (result, sandbox) = waited.ok_or(ApiError::NotFound)?;
    Ok(Json(WaitView { result, sandbox: sandbox.map(SandboxView::from) }))
}

fn asked(pairs: Vec<(String, String)>) -> Result<(Until, Duration), ApiError> {
    let (mut until, mut timeout_ms) = (Until::Exited, 30_000);
    for (name, text) in pairs {
        match name.as_str() {
            "until" => {
                until = Until::named(&text)
                    .ok_or_else(|| Invalid::new("until", "what can be waited for is one of running, paused, exited, removed"))?;
            }
            "timeout_ms" => timeout_ms = query::bounded(&UNTIL_MS, &text)?,
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok((until, Duration::from_millis(timeout_ms)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(query: &str) -> Result<(Until, Duration), ApiError> {
        asked(query::pairs(&format!("/v1/sandboxes/a/wait?{query}").parse().unwrap())?)
    }

    #[test]
    fn an_end_is_waited_for_unless_something_else_is() {
        assert_eq!(parsed("").unwrap(), (Until::Exited, Duration::from_secs(30)));
        assert_eq!(parsed("until=paused&timeout_ms=3600000").unwrap(), (Until::Paused, Duration::from_secs(3600)));
    }

    #[test]
    fn what_cannot_be_waited_for_is_named() {
        for (query, field) in
            [("until=queued", "until"), ("timeout_ms=3600001", "timeout_ms"), ("timeout_ms=-1", "timeout_ms"), ("for=1", "for")]
        {
            let Err(ApiError::Invalid(invalid)) = parsed(query) else { panic!("{query} is taken") };
            assert_eq!(invalid.field, field, "{query}");
        }
    }
}
