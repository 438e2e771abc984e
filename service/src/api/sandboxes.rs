//! `/v1/sandboxes`: containers that live until they end or are deleted.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    App,
    caller::{Caller, Creator},
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::Keyed,
    images::pull_for,
    json, observe,
    pass::Bid,
    query,
    view::SandboxView,
};
use crate::{
    engine::{EngineError, START_PATIENCE},
    sandbox::{
        ChangeRequest, ImageReference, Invalid, Kind, LIST_LIMIT, LabelFault, Sandbox, SandboxId, SandboxRequest, State as SandboxState,
        TenantId, Wanted, check_label, check_name_prefix, words,
    },
    store::{Filter, Order},
    token::Scope,
};

/// Some of a tenant's sandboxes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SandboxPage)]
pub(super) struct Page {
    items: Vec<SandboxView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Make and start a sandbox
///
/// Answers when the program runs, has failed to start, or waits for room: `state` says which. The sandbox stays, also after its end, until it is deleted. Where the tenant has a pool of such sandboxes, one
/// that is ready is taken from there: `from_pool`.
#[utoipa::path(
    post,
    path = "/v1/sandboxes",
    operation_id = "createSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    request_body(content = SandboxRequest, description = "At most 16 MiB.", example = json!({
        "image": "busybox",
        "name": "worker-1",
        "command": ["sleep", "600"],
        "labels": { "job": "nightly" },
        "limits": { "memory_bytes": 67_108_864 },
        "ttl_ms": 3_600_000,
    })),
    responses(
        (status = 201, description = "The sandbox was made.", body = SandboxView, headers(("Location" = String, description = "Where the sandbox is found."))),
        refusal::OfCreation,
        refusal::OfRegistries,
        refusal::PoolNotFound,
        refusal::Conflict,
    ),
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Creator(caller): Creator,
    keyed: Keyed,
    bid: Bid,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let wanted = json::read::<SandboxRequest>(body).await?.parse()?;
    let sandbox = match bid.made(&app, &caller, &keyed).await? {
        None => make(&app, &caller, wanted, keyed, bid).await?,
        // By an earlier attempt at the same request, or by another node.
        Some(id) => started(&app, &caller, id).await?,
    };
    observe::note_sandbox(sandbox.id);
    let location = format!("/v1/sandboxes/{}", sandbox.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], view(&app, sandbox).await).into_response())
}

/// One that somebody else made, once it has started.
async fn started(app: &App, caller: &Caller, id: SandboxId) -> Result<Sandbox, ApiError> {
    let has_started = |sandbox: &Sandbox| sandbox.state != SandboxState::Starting;
    app.engine.wait_until(&caller.tenant, id, START_PATIENCE, has_started).await?.ok_or(ApiError::NotFound)
}

async fn make(app: &App, caller: &Caller, wanted: Wanted, keyed: Keyed, bid: Bid) -> Result<Sandbox, ApiError> {
    let made = match wanted {
        Wanted::Like(asked) => {
            pull_for(app, caller, &asked, &bid).await?;
            // What waits has its name already. Where another name was given, nothing else may be made of the request.
            if bid.id().is_none()
                && let Some(ready) = app.engine.take_like(&caller.owner(), &asked, keyed.key.as_ref()).await?
            {
                return Ok(ready);
            }
            app.engine.create_and_start(caller.owner(), *asked, bid.making(keyed)).await
        }
        Wanted::OfPool { pool, personal, when_full } => {
            match app.engine.take_or_create(caller.owner(), &pool, (personal, when_full), bid.making(keyed)).await {
                Ok(Some(made)) => Ok(made),
                Ok(None) => {
                    // Who may do nothing hears that first.
                    app.engine.check_standing(&caller.owner(), caller.scopes.allow(Scope::Admin)).await?;
                    return Err(ApiError::PoolNotFound(pool));
                }
                Err(error) => Err(error),
            }
        }
    };
    match (made, bid.id()) {
        (Err(EngineError::MadeAlready), Some(id)) => started(app, caller, id).await,
        (made, _) => Ok(made?),
    }
}

/// The answer of which nothing but its sandbox was kept.
pub(super) async fn told_again(app: &App, tenant: &TenantId, id: SandboxId) -> Result<Response, ApiError> {
    let sandbox = app.engine.find(tenant, Kind::Sandbox, id).await?.ok_or(ApiError::NotFound)?;
    Ok(view(app, sandbox).await.into_response())
}

pub(super) async fn view(app: &App, sandbox: Sandbox) -> Json<SandboxView> {
    let position = app.engine.queue_position(&sandbox).await;
    Json(SandboxView::from(sandbox).at(position))
}

/// A sandbox as it is now
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}",
    operation_id = "readSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Named),
    responses(
        (status = 200, description = "The sandbox as it is now.", body = SandboxView),
        refusal::NotFound,
    ),
)]
pub(super) async fn read(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let id = query::object(&app, &caller, &id).await?;
    let sandbox = app.engine.find(&caller.tenant, Kind::Sandbox, id).await?.ok_or(ApiError::NotFound)?;
    Ok(view(&app, sandbox).await)
}

/// Change a sandbox while it is there
///
/// What is absent stays as it is. New limits hold at once.
#[utoipa::path(
    patch,
    path = "/v1/sandboxes/{id}",
    operation_id = "changeSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    request_body(content = ChangeRequest, example = json!({ "labels": { "job": null, "stage": "done" } })),
    responses(
        (status = 200, description = "The sandbox as it is now.", body = SandboxView),
        refusal::OfLife,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn update(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let change = json::read::<ChangeRequest>(body).await?.parse()?;
    let id = query::object(&app, &caller, &id).await?;
    let sandbox = app.engine.update(caller.owner(), id, change).await?.ok_or(ApiError::NotFound)?;
    Ok(view(&app, sandbox).await)
}

/// End a sandbox and remove it
///
/// Whoever reads its log still gets the end.
#[utoipa::path(
    delete,
    path = "/v1/sandboxes/{id}",
    operation_id = "deleteSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named),
    responses(
        (status = 204, description = "It is gone."),
        refusal::NotFound,
        refusal::OnNode,
    ),
)]
pub(super) async fn delete(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let id = query::object(&app, &caller, &id).await?;
    if app.engine.delete(&caller.owner(), id).await? { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NotFound) }
}

/// The tenant's sandboxes, newest first
///
/// Runs are not among them.
#[utoipa::path(
    get,
    path = "/v1/sandboxes",
    operation_id = "listSandboxes",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(
        parameter::Page,
        ("state" = Option<Vec<SandboxState>>, Query, description = "Only those in one of these states."),
        ("image" = Option<words::Reference>, Query, description = "Only those of this image."),
        parameter::SandboxFilter,
    ),
    responses((status = 200, description = "A page.", body = Page)),
)]
pub(super) async fn list(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<Page>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let filter = filter(query::pairs(&uri)?)?;
    // One more than asked for tells whether there is another page.
    let asked = Filter { limit: filter.limit + 1, ..filter.clone() };
    let mut items = app.engine.list(&caller.tenant, &asked).await?;
    let limit = usize::try_from(filter.limit).unwrap_or(usize::MAX);
    let has_more = items.len() > limit;
    items.truncate(limit);
    let next_cursor = if has_more { items.last().map(|sandbox| cursor(sandbox.id)) } else { None };
    Ok(Json(Page { items: items.into_iter().map(SandboxView::from).collect(), next_cursor }))
}

fn filter(pairs: Vec<(String, String)>) -> Result<Filter, ApiError> {
    let mut filter = Filter { limit: 50, ..Filter::default() };
    for (name, text) in pairs {
        match name.as_str() {
            "limit" => filter.limit = u32::try_from(query::bounded(&LIST_LIMIT, &text)?).unwrap_or(u32::MAX),
            "cursor" => filter.behind = Some(position(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?),
            "order" => {
                filter.order = match text.as_str() {
                    "newest_first" => Order::NewestFirst,
                    "oldest_first" => Order::OldestFirst,
                    _ => return Err(Invalid::new("order", "an order is newest_first or oldest_first").into()),
                }
            }
            "state" => {
                let state = SandboxState::named(&text)
                    .ok_or_else(|| Invalid::new("state", "a state is one of queued, starting, running, paused, exited, failed"))?;
                filter.states.push(state);
            }
            "label" => label(&mut filter, &text)?,
            "image" => filter.image = Some(ImageReference::parse("image", text)?.as_str().to_owned()),
            "name" => filter.name_prefix = Some(check_name_prefix(text)?),
            "created_after" => filter.created.0 = Some(query::time("created_after", &text)?),
            "created_before" => filter.created.1 = Some(query::time("created_before", &text)?),
            "finished_after" => filter.finished.0 = Some(query::time("finished_after", &text)?),
            "finished_before" => filter.finished.1 = Some(query::time("finished_before", &text)?),
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok(filter)
}

/// `key=value`, or `key` alone for whatever value.
fn label(filter: &mut Filter, text: &str) -> Result<(), ApiError> {
    let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value)));
    check_label(key, value.unwrap_or_default())
        .map_err(|(LabelFault::Key(detail) | LabelFault::Value(detail))| Invalid::new("label", detail))?;
    match value {
        Some(value) if filter.labels.insert(key.to_owned(), value.to_owned()).is_some_and(|other| other != value) => {
            return Err(Invalid::new("label", "no sandbox has two values for one key").into());
        }
        Some(_) => {}
        None => filter.label_keys.push(key.to_owned()),
    }
    Ok(())
}

pub(super) fn cursor(id: SandboxId) -> String {
    BASE64.encode(id.0.as_bytes())
}

pub(super) fn position(cursor: &str) -> Option<SandboxId> {
    let bytes = BASE64.decode(cursor).ok()?;
    Some(SandboxId(Uuid::from_slice(&bytes).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of(error: &ApiError) -> &str {
        let ApiError::Invalid(invalid) = error else { panic!("{error}") };
        &invalid.field
    }

    fn parsed(query: &str) -> Result<Filter, ApiError> {
        filter(query::pairs(&format!("/v1/sandboxes?{query}").parse().unwrap())?)
    }

    #[test]
    fn filters_add_up() {
        let filter = parsed("state=running&state=exited&label=a%3Db&label=c%3D&label=d&limit=7&name=web_&order=oldest_first").unwrap();
        assert_eq!(filter.states, [SandboxState::Running, SandboxState::Exited]);
        assert_eq!(filter.labels.get("a").map(String::as_str), Some("b"));
        assert_eq!(filter.labels.get("c").map(String::as_str), Some(""));
        assert_eq!(filter.label_keys, ["d"]);
        assert_eq!((filter.limit, filter.name_prefix.as_deref(), filter.order), (7, Some("web_"), Order::OldestFirst));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        let filter = parsed("created_after=2026-01-02T03:04:05Z&finished_before=2026-01-02T03:04:05.5%2B01:00").unwrap();
        assert_eq!(filter.created.0.map(time::OffsetDateTime::unix_timestamp), Some(1_767_323_045));
        assert_eq!(filter.finished.1.map(time::OffsetDateTime::unix_timestamp), Some(1_767_319_445));
        assert_eq!(field_of(&parsed("created_before=yesterday").unwrap_err()), "created_before");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(field_of(&parsed("limit=0").unwrap_err()), "limit");
        assert_eq!(field_of(&parsed("limit=x").unwrap_err()), "limit");
        assert_eq!(field_of(&parsed("cursor=%00nonsense").unwrap_err()), "cursor");
        assert_eq!(field_of(&parsed("state=gone").unwrap_err()), "state");
        assert_eq!(field_of(&parsed("label=").unwrap_err()), "label");
        assert_eq!(field_of(&parsed("order=random").unwrap_err()), "order");
        assert_eq!(field_of(&parsed("name=a%25").unwrap_err()), "name");
        assert_eq!(field_of(&parsed("image=%00").unwrap_err()), "image");
        assert_eq!(field_of(&parsed("label=a%3D%00").unwrap_err()), "label");
        assert_eq!(field_of(&parsed("label=%00%3Db").unwrap_err()), "label");
        assert_eq!(field_of(&parsed("colour=red").unwrap_err()), "colour");
    }

    #[test]
    fn a_cursor_leads_back_to_where_it_was_made() {
        let id = SandboxId(Uuid::now_v7());
        assert_eq!(position(&cursor(id)), Some(id));
    }
}
