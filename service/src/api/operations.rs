//! What operators and their machines ask: health, readiness, metrics, the contract.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    App,
    contract::{self, refusal},
    error::ApiError,
};
use crate::metrics::Standing;

/// That it answers.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Health)]
pub(super) struct Alive {
    #[schema(extensions(("x-schema" = json!({ "const": OK }))))]
    status: &'static str,
}

/// That sandboxes can be made.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Readiness)]
pub(super) struct Ready {
    #[schema(extensions(("x-schema" = json!({ "const": READY }))))]
    status: &'static str,
}

const OK: &str = "ok";
const READY: &str = "ready";

/// The process answers
#[utoipa::path(get, path = "/healthz", operation_id = "health", tag = "operations", security(()), responses((status = 200, description = "It does.", body = Alive)))]
pub(super) async fn health() -> Json<Alive> {
    Json(Alive { status: OK })
}

/// Sandboxes can be made
///
/// Postgres and the keeper answer.
#[utoipa::path(
    get,
    path = "/readyz",
    operation_id = "ready",
    tag = "operations",
    security(()),
    responses(
        (status = 200, description = "They can.", body = Ready),
        refusal::OnNode,
        refusal::DatabaseUnavailable,
    ),
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Ready>, ApiError> {
    app.store.ping().await?;
    if app.keeper.hello().is_none() {
        return Err(ApiError::KeeperUnavailable);
    }
    if !app.engine.is_ready() {
        return Err(ApiError::Busy("this node is drained, or its service is stopping".to_owned()));
    }
    Ok(Json(Ready { status: READY }))
}

/// This document
#[utoipa::path(
    get,
    path = "/openapi.yaml",
    operation_id = "contract",
    tag = "operations",
    security(()),
    responses((status = 200, description = "The document.", body = serde_json::Value, content_type = "application/yaml")),
)]
pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/yaml")], contract::openapi())
}

/// This document for people
///
/// A page that loads nothing from elsewhere.
#[utoipa::path(
    get,
    path = "/docs",
    operation_id = "docs",
    tag = "operations",
    security(()),
    responses((status = 200, description = "The page.", body = String, content_type = "text/html")),
)]
pub(super) async fn docs() -> impl IntoResponse {
    let page = contract::page();
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, &page.policy)], page.html.as_str())
}

/// Figures for Prometheus
///
/// On a listener of its own.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    tag = "operations",
    security(()),
    responses(
        (status = 200, description = "Every series, in the text format.", body = String, content_type = "text/plain"),
        refusal::Internal,
    ),
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.metrics.jwks(&app.verifier.freshness());
    app.metrics.keeper_reconnects(app.keeper.reconnects());
    // Of this process and its disk alone: what is wrong elsewhere must not keep anybody from hearing of it.
    app.metrics.stands(Standing {
        has_keeper: app.keeper.hello().is_some(),
        is_ready: app.engine.is_ready(),
        is_short: app.engine.is_short(),
        connections: app.store.connections(),
    });
    match app.images.blobs().await {
        Ok((count, bytes)) => app.metrics.images_kept(count, bytes),
        Err(error) => tracing::warn!(error = format!("{error:#}"), "counting the blobs of images failed"),
    }
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], app.metrics.text()?).into_response())
}
