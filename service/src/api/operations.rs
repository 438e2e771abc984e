//! What operators and their machines ask: health, readiness, metrics, the contract.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::{App, OPENAPI, error::ApiError};

#[derive(Debug, Serialize)]
pub(super) struct Status {
    status: &'static str,
}

/// The process answers.
pub(super) async fn health() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// Sandboxes can be made: Postgres and the keeper answer.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Status>, ApiError> {
    app.store.ping().await?;
    if app.keeper.hello().is_none() {
        return Err(ApiError::KeeperUnavailable);
    }
    if !app.engine.is_ready() {
        return Err(ApiError::Busy("this node is drained, or its service is stopping".to_owned()));
    }
    Ok(Json(Status { status: "ready" }))
}

pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/yaml")], OPENAPI)
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.metrics.jwks(&app.verifier.freshness());
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], app.metrics.text()?).into_response())
}
