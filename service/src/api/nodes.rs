//! `/v1/admin/nodes`: the machines, and having one take no more work.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{App, admin::Admin, error::ApiError, json};
use crate::{
    sandbox::EVICT_AFTER_MS,
    store::{Act, Node, NodeId},
};

pub(super) fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/admin/nodes", get(list))
        .route("/v1/admin/nodes/{node}", get(read))
        .route("/v1/admin/nodes/{node}/drain", post(drain))
        .route("/v1/admin/nodes/{node}/resume", post(resume))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DrainRequest {
    /// What still lives by then is ended; absent: nothing is.
    evict_after_ms: Option<u64>,
}

/// Whether a node takes work.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum NodeState {
    Serving,
    Drained,
    /// Its lease is over.
    Away,
}

#[derive(Debug, Serialize)]
struct NodeView {
    id: Uuid,
    name: String,
    state: NodeState,
    memory_bytes: u64,
    cpu_millis: u64,
    /// Sandboxes and runs that it has and that have not ended.
    live: u64,
    epoch: u64,
    #[serde(with = "time::serde::rfc3339")]
    started_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    lease_until: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    drained_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    evict_at: Option<OffsetDateTime>,
}

#[derive(Debug, Serialize)]
struct Nodes {
    items: Vec<NodeView>,
}

async fn list(State(app): State<Arc<App>>, _admin: Admin) -> Result<Json<Nodes>, ApiError> {
    Ok(Json(Nodes { items: app.store.list_nodes(None).await?.into_iter().map(NodeView::from).collect() }))
}

async fn read(State(app): State<Arc<App>>, _admin: Admin, Path(node): Path<String>) -> Result<Json<NodeView>, ApiError> {
    view(&app, id(&node)?).await
}

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
