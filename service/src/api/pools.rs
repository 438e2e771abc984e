//! `/v1/pools`: sandboxes that a tenant has ready before it asks for them.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use sandbox_core::protocol::{Isolation, OutputPolicy, WindowSize};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    App,
    account::list_limit,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::{Keyed, keyed_uuid},
    json, query,
};
use crate::{
    sandbox::{
        Capabilities, Invalid, Limits, Network, NewSandbox, Pool, PoolFailure, PoolId, PoolRequest, PoolSizeRequest, Signal, User,
        check_name, words,
    },
    token::Scope,
};

/// The routes below `/v1/pools`.
pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(read, update, remove))
}

/// A pool as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Pool)]
struct PoolView {
    id: Uuid,
    name: String,
    /// How many sandboxes it is to keep ready.
    size: u32,
    /// How many it has: of all nodes together, and of each node only requests that come to it are given some.
    ready: u64,
    /// How many are on their way.
    starting: u64,
    /// How many were taken so far.
    taken: u64,
    /// How many requests for what it keeps found none ready, and were given a sandbox that was started for them.
    missed: u64,
    /// How many came to nothing before they could be taken: their program ended, was not ready in time, or could not be started. After each the pool waits for twice as long as before.
    failures: u64,
    /// The last of them: why the pool does not fill.
    #[schema(required)]
    last_failure: Option<PoolFailure>,
    template: TemplateView,
    #[schema(required)]
    ready_output: Option<String>,
    ready_within_ms: u64,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
}

/// What each sandbox of a pool is, with the limits in force. What is in its files, its input and its environment is not told.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = PoolTemplateInForce)]
struct TemplateView {
    image: String,
    /// Null: the image's.
    #[schema(required)]
    entrypoint: Option<Vec<String>>,
    /// Null: the image's.
    #[schema(required)]
    command: Option<Vec<String>>,
    /// Null: the image's.
    #[schema(required)]
    workdir: Option<String>,
    /// Null: the image's.
    #[schema(required)]
    user: Option<String>,
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
    ttl_ms: Option<u64>,
    #[schema(required)]
    idle_timeout_ms: Option<u64>,
    auto_remove: bool,
    stdin_open: bool,
    /// The size of its terminal, if it has one.
    #[schema(required, value_type = Option<words::TerminalSize>)]
    tty: Option<WindowSize>,
    /// Null: the image's, or SIGTERM.
    #[schema(required, value_type = Option<String>, pattern = "^SIG")]
    stop_signal: Option<Signal>,
    stop_grace_ms: u64,
}

/// Some of a tenant's pools, by name.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = PoolPage)]
struct Page {
    items: Vec<PoolView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Have sandboxes ready
///
/// They are started before anybody asks for them, so that a request for a sandbox that is just like the `template` is answered with one whose program has its start behind it. What may differ is
/// `name`, `labels`, `ttl_ms` and `idle_timeout_ms`; a request may also name the `pool` instead. Whoever takes one is its owner, and it is in every way as if it had been made then: its
/// times and its limit of real time begin, and another is started in its place.
///
/// What waits counts against the quotas of the tenant, and of the principal who made the pool. It is in no list and has no address; it is given up before any request has to wait for its room, when the image's
/// name means another one, and after an hour.
#[utoipa::path(
    post,
    path = "/v1/pools",
    operation_id = "createPool",
    tag = "pools",
    security(("bearer" = ["sandboxes:write"])),
    request_body(content = PoolRequest, description = "At most 16 MiB.", example = json!({
        "name": "notebooks",
        "size": 2,
        "template": {
            "image": "busybox",
            "command": ["sh", "-c", "echo ready; exec sleep 3600"],
            "limits": { "memory_bytes": 67_108_864 },
        },
        "ready_output": "ready",
    })),
    responses(
        (status = 201, description = "The pool is there, and fills.", body = PoolView, headers(("Location" = String, description = "Where the pool is found."))),
        refusal::ImageNotFound,
        refusal::PoolExists,
        refusal::QuotaExceeded,
        refusal::NoCapacity,
    ),
)]
async fn create(State(app): State<Arc<App>>, caller: Caller, keyed: Keyed, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let bytes = json::bytes(body).await?;
    let new = json::parse::<PoolRequest>(&bytes)?.parse()?;
    let template = template_in(&bytes)?;
    let id = match keyed_uuid(&caller, &keyed) {
        None => Uuid::now_v7(),
        // Made by a request of so long ago that its key is forgotten: the key is a new one.
        Some(id) => match app.store.find_pool(&caller.tenant, &new.name).await? {
            Some(earlier) if earlier.id.0 == id && earlier.created_at + app.idempotency.retention() < app.clock.now() => Uuid::now_v7(),
            Some(_) | None => id,
        },
    };
    let pool = app.engine.create_pool(caller.owner(), PoolId(id), new, template).await?;
    let location = format!("/v1/pools/{}", pool.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(PoolView::new(pool)?)).into_response())
}

/// The template of the request, to be kept as it is.
fn template_in(bytes: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut request: Value = serde_json::from_slice(bytes).map_err(|error| ApiError::Internal(error.into()))?;
    let mut template = request["template"].take();
    json::make_whole(&mut template);
    Ok(template.to_string().into_bytes())
}

/// The tenant's pools
///
/// By name.
#[utoipa::path(
    get,
    path = "/v1/pools",
    operation_id = "listPools",
    tag = "pools",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Page),
    responses((status = 200, description = "A page.", body = Page)),
)]
async fn list(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<Page>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let (mut limit, mut behind) = (50, None);
    for (name, text) in query::pairs(&uri)? {
        match name.as_str() {
            "limit" => limit = list_limit(&text)?,
            "cursor" => behind = Some(position(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?),
            _ => return Err(query::unknown(&name)),
        }
    }
    // One more than asked for tells whether there is another page.
    let mut items = app.store.list_pools(&caller.tenant, behind.as_deref(), limit + 1).await?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_more = items.len() > limit;
    items.truncate(limit);
    let next_cursor = items.last().filter(|_| has_more).map(|pool| BASE64.encode(&pool.name));
    Ok(Json(Page { items: items.into_iter().map(PoolView::new).collect::<Result<_, _>>()?, next_cursor }))
}

/// One pool
#[utoipa::path(
    get,
    path = "/v1/pools/{name}",
    operation_id = "readPool",
    tag = "pools",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Pool),
    responses(
        (status = 200, description = "The pool as it is now.", body = PoolView),
        refusal::PoolNotFound,
    ),
)]
async fn read(State(app): State<Arc<App>>, caller: Caller, Path(name): Path<String>) -> Result<Json<PoolView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let name = named(name)?;
    let pool = app.store.find_pool(&caller.tenant, &name).await?.ok_or(ApiError::PoolNotFound(name))?;
    Ok(Json(PoolView::new(pool)?))
}

/// Give a pool another size
///
/// What it has too much is given up. With 0 it is there, and keeps nothing.
#[utoipa::path(
    patch,
    path = "/v1/pools/{name}",
    operation_id = "changePool",
    tag = "pools",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Pool),
    request_body(content = PoolSizeRequest, example = json!({ "size": 1 })),
    responses(
        (status = 200, description = "The pool as it is now.", body = PoolView),
        refusal::PoolNotFound,
        refusal::QuotaExceeded,
    ),
)]
async fn update(State(app): State<Arc<App>>, caller: Caller, Path(name): Path<String>, body: Body) -> Result<Json<PoolView>, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let size = json::read::<PoolSizeRequest>(body).await?.parse()?;
    let name = named(name)?;
    let pool = app.engine.resize_pool(&caller.owner(), &name, size).await?.ok_or(ApiError::PoolNotFound(name))?;
    Ok(Json(PoolView::new(pool)?))
}

/// Delete a pool
///
/// What waits in it is given up. What was taken from it is nothing of its own any more, and stays.
#[utoipa::path(
    delete,
    path = "/v1/pools/{name}",
    operation_id = "deletePool",
    tag = "pools",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Pool),
    responses(
        (status = 204, description = "It is gone."),
        refusal::PoolNotFound,
    ),
)]
async fn remove(State(app): State<Arc<App>>, caller: Caller, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let name = named(name)?;
    if app.engine.remove_pool(&caller.owner(), &name).await? { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::PoolNotFound(name)) }
}

/// The name in a path. What cannot be one names nothing.
fn named(name: String) -> Result<String, ApiError> {
    check_name(name.clone()).map_err(|_| ApiError::PoolNotFound(name))
}

fn position(cursor: &str) -> Option<String> {
    String::from_utf8(BASE64.decode(cursor).ok()?).ok().filter(|name| !name.contains('\0'))
}

impl PoolView {
    fn new(pool: Pool) -> Result<Self, ApiError> {
        let template = pool.asked().map_err(|error| ApiError::Internal(error.into()))?;
        let Pool { id, name, size, readiness, ready, starting, taken, missed, failures, last_failure, created_at, .. } = pool;
        Ok(Self {
            id: id.0,
            name,
            size,
            ready,
            starting,
            taken,
            missed,
            failures,
            last_failure,
            template: template.into(),
            ready_output: readiness.output,
            ready_within_ms: readiness.within_ms,
            created_at,
        })
    }
}

impl From<NewSandbox> for TemplateView {
    fn from(template: NewSandbox) -> Self {
        Self {
            network: template.network(),
            image: template.image.as_str().to_owned(),
            entrypoint: template.entrypoint,
            command: template.command,
            workdir: template.workdir,
            user: template.user.as_ref().map(User::text),
            capabilities: template.capabilities,
            isolation: template.isolation,
            labels: template.labels,
            limits: template.limits,
            output_policy: template.output_policy,
            ttl_ms: template.ttl_ms,
            idle_timeout_ms: template.idle_timeout_ms,
            auto_remove: template.auto_remove,
            stdin_open: template.stdin_open,
            tty: template.terminal,
            stop_signal: template.stop_signal,
            stop_grace_ms: template.stop_grace_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_kept_with_whole_numbers_however_they_were_written() {
        let kept = template_in(br#"{"name":"p","size":1.0,"template":{"image":"a","limits":{"pids":9.0}}}"#).unwrap();
        assert_eq!(kept, br#"{"image":"a","limits":{"pids":9}}"#);
        assert!(template_in(b"").is_err());
    }

    #[test]
    fn a_cursor_that_no_page_gave_is_none() {
        assert_eq!(position(&BASE64.encode("a")).as_deref(), Some("a"));
        assert_eq!((position("!"), position(&BASE64.encode("\0"))), (None, None));
    }
}
