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
use uuid::Uuid;

use super::{
    App,
    caller::{Caller, Creator},
    error::ApiError,
    idempotency::Keyed,
    json, query,
    view::SandboxView,
};
use crate::{
    engine::START_PATIENCE,
    sandbox::{Invalid, Kind, LIST_LIMIT, LabelFault, Sandbox, SandboxId, SandboxRequest, State as SandboxState, TenantId, check_label},
    store::Filter,
    token::Scope,
};

#[derive(Debug, Serialize)]
pub(super) struct Page {
    items: Vec<SandboxView>,
    /// Null on the last page.
    next_cursor: Option<String>,
}

pub(super) async fn create(State(app): State<Arc<App>>, Creator(caller): Creator, keyed: Keyed, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let asked = json::read::<SandboxRequest>(body).await?.parse()?;
    let sandbox = match keyed.made {
        None => app.engine.create_and_start(caller.owner(), asked, keyed.key).await?,
        // By an earlier attempt at the same request.
        Some(id) => {
            let has_started = |sandbox: &Sandbox| sandbox.state != SandboxState::Starting;
            app.engine.wait_until(&caller.tenant, id, START_PATIENCE, has_started).await?.ok_or(ApiError::NotFound)?
        }
    };
    let location = format!("/v1/sandboxes/{}", sandbox.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], view(&app, sandbox).await).into_response())
}

/// The answer of which nothing but its sandbox was kept.
pub(super) async fn told_again(app: &App, tenant: &TenantId, id: SandboxId) -> Result<Response, ApiError> {
    let sandbox = app.engine.find(tenant, Kind::Sandbox, id).await?.ok_or(ApiError::NotFound)?;
    Ok(view(app, sandbox).await.into_response())
}

async fn view(app: &App, sandbox: Sandbox) -> Json<SandboxView> {
    let position = app.engine.queue_position(&sandbox).await;
    Json(SandboxView::from(sandbox).at(position))
}

pub(super) async fn read(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Json<SandboxView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let sandbox = app.engine.find(&caller.tenant, Kind::Sandbox, query::id(&id)?).await?.ok_or(ApiError::NotFound)?;
    Ok(view(&app, sandbox).await)
}

pub(super) async fn delete(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    if app.engine.delete(&caller.owner(), query::id(&id)?).await? { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NotFound) }
}

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
            "limit" => {
                let limit = query::value::<u64>("limit", &text)
                    .map_err(|_| Invalid { bound: Some(&LIST_LIMIT), ..Invalid::new("limit", "not a number") })?;
                filter.limit = u32::try_from(LIST_LIMIT.check(limit)?).unwrap_or(u32::MAX);
            }
            "cursor" => filter.before = Some(position(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?),
            "state" => {
                let state = SandboxState::named(&text)
                    .ok_or_else(|| Invalid::new("state", "a state is one of queued, starting, running, paused, exited, failed"))?;
                filter.states.push(state);
            }
            "label" => {
                let (key, value) = text.split_once('=').ok_or_else(|| Invalid::new("label", "a label is asked for as key=value"))?;
                check_label(key, value).map_err(|(LabelFault::Key(detail) | LabelFault::Value(detail))| Invalid::new("label", detail))?;
                if filter.labels.insert(key.to_owned(), value.to_owned()).is_some_and(|other| other != value) {
                    return Err(Invalid::new("label", "no sandbox has two values for one key").into());
                }
            }
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok(filter)
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
        let filter = parsed("state=running&state=exited&label=a%3Db&label=c%3D&limit=7").unwrap();
        assert_eq!(filter.states, [SandboxState::Running, SandboxState::Exited]);
        assert_eq!(filter.labels.get("a").map(String::as_str), Some("b"));
        assert_eq!(filter.labels.get("c").map(String::as_str), Some(""));
        assert_eq!(filter.limit, 7);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(field_of(&parsed("limit=0").unwrap_err()), "limit");
        assert_eq!(field_of(&parsed("limit=x").unwrap_err()), "limit");
        assert_eq!(field_of(&parsed("cursor=%00nonsense").unwrap_err()), "cursor");
        assert_eq!(field_of(&parsed("state=gone").unwrap_err()), "state");
        assert_eq!(field_of(&parsed("label=a").unwrap_err()), "label");
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
