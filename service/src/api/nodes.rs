//! `/v1/admin/nodes`: the machines, and having one take no more work.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    App,
    admin::Admin,
    contract::{parameter, refusal},
    error::ApiError,
    json,
};
use crate::{
    sandbox::EVICT_AFTER_MS,
    store::{Act, Node, NodeId},
};

pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(read)).routes(routes!(drain)).routes(routes!(resume))
}

/// What becomes of the sandboxes of a node that takes no more.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Drain)]
struct DrainRequest {
    /// What still lives then is ended with the reason `evicted`. Null or absent, nothing is.
    #[schema(extensions(("x-bound" = json!(EVICT_AFTER_MS))))]
    evict_after_ms: Option<u64>,
}

/// Whether a node takes work. `away`: it was not heard of for so long that others settle what it ran.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum NodeState {
    Serving,
    Drained,
    /// Its lease is over.
    Away,
}

/// A machine that runs sandboxes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Node)]
struct NodeView {
    id: Uuid,
    /// For people: host and data folder.
    name: String,
    state: NodeState,
    /// That the limits of its sandboxes may come to.
    #[schema(minimum = 1)]
    memory_bytes: u64,
    #[schema(minimum = 1)]
    cpu_millis: u64,
    /// Sandboxes and runs that it has and that have not ended.
    live: u64,
    /// One more with each service that took the node over.
    #[schema(minimum = 1)]
    epoch: u64,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    started_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    lease_until: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    drained_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    evict_at: Option<OffsetDateTime>,
}

/// Every machine that there ever was.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = NodeList)]
struct Nodes {
    items: Vec<NodeView>,
}

/// The machines that run sandboxes
///
/// Every one that ever was, the latest started first.
#[utoipa::path(
    get,
    path = "/v1/admin/nodes",
    operation_id = "adminListNodes",
    tag = "admin",
    security(("bearer" = ["admin"])),
    responses((status = 200, description = "The nodes.", body = Nodes)),
)]
async fn list(State(app): State<Arc<App>>, _admin: Admin) -> Result<Json<Nodes>, ApiError> {
    Ok(Json(Nodes { items: app.store.list_nodes(None).await?.into_iter().map(NodeView::from).collect() }))
}

/// One machine
#[utoipa::path(
    get,
    path = "/v1/admin/nodes/{node}",
    operation_id = "adminGetNode",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Node),
    responses((status = 200, description = "The node as it is now.", body = NodeView), refusal::NotFound),
)]
async fn read(State(app): State<Arc<App>>, _admin: Admin, Path(node): Path<String>) -> Result<Json<NodeView>, ApiError> {
    view(&app, id(&node)?).await
}

/// Have a machine take no more work
///
/// From now on nothing is started there, also after a restart, until it is resumed: what comes waits for another node. What runs goes on, and is done when `live` is
/// 0; with `evict_after_ms` what is left then is ended. Repeated, it sets that time anew.
#[utoipa::path(
    post,
    path = "/v1/admin/nodes/{node}/drain",
    operation_id = "adminDrainNode",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Node),
    request_body(content = DrainRequest, example = json!({ "evict_after_ms": 600_000 })),
    responses((status = 200, description = "The node as it is now.", body = NodeView), refusal::NotFound),
)]
async fn drain(State(app): State<Arc<App>>, Admin(admin): Admin, Path(node): Path<String>, body: Body) -> Result<Json<NodeView>, ApiError> {
    let DrainRequest { evict_after_ms } = json::read(body).await?;
    let evict_after_ms = evict_after_ms.map(|ms| EVICT_AFTER_MS.check(ms)).transpose()?;
    let (node, now) = (id(&node)?, app.clock.now());
    let evict_at = evict_after_ms.map(|ms| now + Duration::from_millis(ms));
    let owner = admin.owner();
    let act = Act { actor: Some(&owner), at: now, data: json!({ "evict_after_ms": evict_after_ms }) };
    if !app.store.drain_node(node, evict_at, &act).await? {
        return Err(ApiError::NotFound);
    }
    view(&app, node).await
}

/// Have a machine take work again
#[utoipa::path(
    post,
    path = "/v1/admin/nodes/{node}/resume",
    operation_id = "adminResumeNode",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Node),
    responses((status = 200, description = "The node as it is now.", body = NodeView), refusal::NotFound),
)]
async fn resume(State(app): State<Arc<App>>, Admin(admin): Admin, Path(node): Path<String>) -> Result<Json<NodeView>, ApiError> {
    let (node, owner) = (id(&node)?, admin.owner());
    let act = Act { actor: Some(&owner), at: app.clock.now(), data: json!({}) };
    if !app.store.resume_node(node, &act).await? {
        return Err(ApiError::NotFound);
    }
    view(&app, node).await
}

async fn view(app: &App, node: NodeId) -> Result<Json<NodeView>, ApiError> {
    let found = app.store.list_nodes(Some(node)).await?.pop();
    found.map(|node| Json(node.into())).ok_or(ApiError::NotFound)
}

fn id(text: &str) -> Result<NodeId, ApiError> {
    text.parse().map(NodeId).map_err(|_| ApiError::NotFound)
}

impl From<Node> for NodeView {
    fn from(node: Node) -> Self {
        let state = match node {
            Node { is_alive: false, .. } => NodeState::Away,
            Node { drained_at: Some(_), .. } => NodeState::Drained,
            Node { .. } => NodeState::Serving,
        };
        Self {
            id: node.id.0,
            name: node.name,
            state,
            memory_bytes: node.capacity.memory_bytes,
            cpu_millis: node.capacity.cpu_millis,
            live: node.live,
            epoch: node.epoch,
            started_at: node.started_at,
            lease_until: node.lease_until,
            drained_at: node.drained_at,
            evict_at: node.evict_at,
        }
    }
}
