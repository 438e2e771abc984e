//! `/v1/volumes`: folders that outlive sandboxes, and can stand in several of them at a time.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use sandbox_core::protocol::VolumeId;
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    idempotency::{Keyed, keyed_uuid},
    json, query,
};
use crate::{
    sandbox::{Invalid, LIST_LIMIT, LabelFault, SandboxId, Volume, VolumeRequest, check_label, words},
    store::VolumeFilter,
    token::Scope,
};

/// The routes below `/v1/volumes`.
pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(read, remove))
}

/// A volume as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Volume)]
struct VolumeView {
    id: Uuid,
    name: String,
    /// How much fits into it.
    size_bytes: u64,
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
    /// The node that it is on. Sandboxes that it stands in run there.
    node: Uuid,
    /// The sandboxes and runs that hold it, at most a hundred: those that have not ended, or can be started again. It cannot be deleted before them.
    #[schema(value_type = Vec<Uuid>, max_items = 100)]
    used_by: Vec<SandboxId>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
}

/// Some of a tenant's volumes, by name.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VolumePage)]
struct Page {
    items: Vec<VolumeView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Make a volume
///
/// Its size is set aside on the disk of the node that answers. It stands in sandboxes and runs that name it in their `volumes`, in several at a time, with the same
/// owners of files in each. New, it is empty, and whoever a sandbox runs as may write to it.
#[utoipa::path(
    post,
    path = "/v1/volumes",
    operation_id = "createVolume",
    tag = "volumes",
    security(("bearer" = ["volumes"])),
    request_body(content = VolumeRequest, example = json!({ "name": "cache", "size_bytes": 16_777_216, "labels": { "of": "builds" } })),
    responses(
        (status = 201, description = "The volume is there.", body = VolumeView, headers(("Location" = String, description = "Where the volume is found."))),
        refusal::Conflict,
        refusal::QuotaExceeded,
        refusal::OnNode,
    ),
)]
async fn create(State(app): State<Arc<App>>, caller: Caller, keyed: Keyed, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::Volumes)?;
    let new = json::read::<VolumeRequest>(body).await?.parse()?;
    let id = match keyed_uuid(&caller, &keyed) {
        None => Uuid::now_v7(),
        // Made by a request of so long ago that its key is forgotten: the key is a new one.
        Some(id) => match app.store.find_volume(&caller.tenant, &new.name).await? {
            Some(earlier) if earlier.id.0 == id && earlier.created_at + app.idempotency.retention() < app.clock.now() => Uuid::now_v7(),
            Some(_) | None => id,
        },
    };
    let volume = app.engine.create_volume(caller.owner(), VolumeId(id), new).await?;
    let location = format!("/v1/volumes/{}", volume.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(VolumeView::from(volume))).into_response())
}

/// The tenant's volumes
///
/// By name.
#[utoipa::path(
    get,
    path = "/v1/volumes",
    operation_id = "listVolumes",
    tag = "volumes",
    security(("bearer" = ["volumes"])),
    params(parameter::Page, parameter::VolumeFilter),
    responses((status = 200, description = "A page.", body = Page)),
)]
async fn list(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<Page>, ApiError> {
    caller.require(Scope::Volumes)?;
    let filter = filter(query::pairs(&uri)?)?;
    // One more than asked for tells whether there is another page.
    let asked = VolumeFilter { limit: filter.limit + 1, ..filter.clone() };
    let mut items = app.store.list_volumes(&caller.tenant, &asked).await?;
    let limit = usize::try_from(filter.limit).unwrap_or(usize::MAX);
    let has_more = items.len() > limit;
    items.truncate(limit);
    let next_cursor = items.last().filter(|_| has_more).map(|volume| BASE64.encode(&volume.name));
    Ok(Json(Page { items: items.into_iter().map(VolumeView::from).collect(), next_cursor }))
}

/// One volume
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}",
    operation_id = "readVolume",
    tag = "volumes",
    security(("bearer" = ["volumes"])),
    params(parameter::Volume),
    responses(
        (status = 200, description = "The volume as it is now.", body = VolumeView),
        refusal::VolumeNotFound,
    ),
)]
async fn read(State(app): State<Arc<App>>, caller: Caller, Path(name): Path<String>) -> Result<Json<VolumeView>, ApiError> {
    caller.require(Scope::Volumes)?;
    let name = named(name)?;
    let volume = app.store.find_volume(&caller.tenant, &name).await?.ok_or(ApiError::VolumeNotFound(name))?;
    Ok(Json(volume.into()))
}

/// Delete a volume
///
/// With all that is in it. Its name is free at once. Not while a sandbox holds it: `used_by`.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}",
    operation_id = "deleteVolume",
    tag = "volumes",
    security(("bearer" = ["volumes"])),
    params(parameter::Volume),
    responses(
        (status = 204, description = "It is gone."),
        refusal::VolumeNotFound,
        refusal::VolumeInUse,
    ),
)]
async fn remove(State(app): State<Arc<App>>, caller: Caller, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::Volumes)?;
    let name = named(name)?;
    let is_gone = app.engine.remove_volume(caller.owner(), name.clone()).await?;
    if is_gone { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::VolumeNotFound(name)) }
}

/// The name in a path. What Postgres cannot hold names nothing.
fn named(name: String) -> Result<String, ApiError> {
    if name.contains('\0') { Err(ApiError::VolumeNotFound(name)) } else { Ok(name) }
}

fn filter(pairs: Vec<(String, String)>) -> Result<VolumeFilter, ApiError> {
    let mut filter = VolumeFilter { limit: 50, ..VolumeFilter::default() };
    for (name, text) in pairs {
        match name.as_str() {
            "limit" => filter.limit = u32::try_from(query::bounded(&LIST_LIMIT, &text)?).unwrap_or(u32::MAX),
            "cursor" => filter.behind = Some(position(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?),
            "label" => label(&mut filter, &text)?,
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok(filter)
}

/// `key=value`, or `key` alone for whatever value.
fn label(filter: &mut VolumeFilter, text: &str) -> Result<(), ApiError> {
    let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value)));
    check_label(key, value.unwrap_or_default())
        .map_err(|(LabelFault::Key(detail) | LabelFault::Value(detail))| Invalid::new("label", detail))?;
    match value {
        Some(value) if filter.labels.insert(key.to_owned(), value.to_owned()).is_some_and(|other| other != value) => {
            return Err(Invalid::new("label", "no volume has two values for one key").into());
        }
        Some(_) => {}
        None => filter.label_keys.push(key.to_owned()),
    }
    Ok(())
}

fn position(cursor: &str) -> Option<String> {
    String::from_utf8(BASE64.decode(cursor).ok()?).ok().filter(|name| !name.contains('\0'))
}

impl From<Volume> for VolumeView {
    fn from(volume: Volume) -> Self {
        let Volume { id, tenant: _, name, node, size_bytes, labels, created_at, used_by } = volume;
        Self { id: id.0, name, size_bytes, labels, node, used_by, created_at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(query: &str) -> Result<VolumeFilter, ApiError> {
        filter(query::pairs(&format!("/v1/volumes?{query}").parse().unwrap())?)
    }

    #[test]
    fn filters_add_up_and_what_is_wrong_is_named() {
        let filter = parsed("label=a%3Db&label=c&limit=7&cursor=ZGF0YQ").unwrap();
        assert_eq!(filter.labels.get("a").map(String::as_str), Some("b"));
        assert_eq!((filter.label_keys.as_slice(), filter.limit, filter.behind.as_deref()), (&["c".to_owned()][..], 7, Some("data")));
        for (query, field) in [
            ("limit=0", "limit"),
            ("cursor=%21", "cursor"),
            ("label=", "label"),
            ("label=a%3D1&label=a%3D2", "label"),
            ("colour=red", "colour"),
        ] {
            assert!(matches!(parsed(query), Err(ApiError::Invalid(invalid)) if invalid.field == field), "{query}");
        }
    }
}
