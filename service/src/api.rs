//! The door: REST and WebSocket over the engine. It translates; it decides nothing.

mod account;
mod admin;
mod bounds;
mod browser;
pub mod caller;
pub mod error;
mod files;
mod idempotency;
pub mod images;
pub mod json;
mod life;
mod limits;
mod logs;
mod nodes;
mod observe;
mod operations;
pub mod query;
mod runs;
mod sandboxes;
mod view;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    http::{StatusCode, header},
    middleware,
    routing::{get, post},
};
use error::ApiError;
pub use idempotency::Idempotency;
use tower_http::{
    catch_panic::CatchPanicLayer, sensitive_headers::SetSensitiveRequestHeadersLayer, set_header::SetResponseHeaderLayer,
    timeout::TimeoutLayer,
};

use crate::{
    clock::Clock,
    config::DoorSettings,
    engine::Engine,
    images::Images,
    metrics::Metrics,
    runtime::Keeper,
    sandbox::{GRACE_MS, UNTIL_MS, WAIT_MS},
    store::Store,
    token::Verifier,
};

/// The contract, as it is served.
pub const OPENAPI: &str = include_str!("../../openapi.yaml");

/// From a request's head to its answer's head, body included, where nothing is waited for.
const QUICK_DEADLINE: Duration = Duration::from_secs(60);

/// The same where the end of a sandbox is waited for that was told to stop.
const STOP_DEADLINE: Duration = Duration::from_millis(GRACE_MS.max).saturating_add(QUICK_DEADLINE);

/// What every handler can ask.
#[derive(Debug)]
pub struct App {
    pub engine: Arc<Engine>,
    pub store: Store,
    pub keeper: Keeper,
    pub verifier: Verifier,
    pub images: Arc<Images>,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub idempotency: Idempotency,
}

/// The whole API.
pub fn router(app: Arc<App>, door: &DoorSettings) -> Router {
    let deadline = |duration| TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, duration);
    let waiting = Router::new().route("/v1/runs", post(runs::create)).layer(deadline(Duration::from_millis(WAIT_MS.max) + QUICK_DEADLINE));
    let stopping = Router::new().route("/v1/sandboxes/{id}/stop", post(life::stop)).layer(deadline(STOP_DEADLINE));
    let waiting = waiting.merge(stopping).merge(
        Router::new()
            .route("/v1/sandboxes/{id}/wait", get(life::wait))
            .layer(deadline(Duration::from_millis(UNTIL_MS.max) + QUICK_DEADLINE)),
    );
    let quick = Router::new()
        .route("/v1/runs/{id}", get(runs::read).delete(runs::cancel))
        .route("/v1/sandboxes", post(sandboxes::create).get(sandboxes::list))
        .route("/v1/sandboxes/{id}", get(sandboxes::read).patch(sandboxes::update).delete(sandboxes::delete))
        .route("/v1/sandboxes/{id}/kill", post(life::kill))
        .route("/v1/sandboxes/{id}/pause", post(life::pause))
        .route("/v1/sandboxes/{id}/resume", post(life::resume))
        .route("/v1/sandboxes/{id}/logs", get(logs::read))
        .route("/v1/limits", get(limits::read))
        .route("/v1/quota", get(account::quota))
        .route("/v1/usage", get(account::usage))
        .route("/v1/events", get(account::events))
        .merge(admin::router())
        .merge(nodes::router())
        .route("/healthz", get(operations::health))
        .route("/readyz", get(operations::ready))
        .route("/openapi.yaml", get(operations::openapi))
        .layer(deadline(QUICK_DEADLINE));
    // An import lasts as long as its archive; it keeps its own bounds.
    let routes = waiting.merge(quick).merge(images::router()).merge(files::router()).fallback(async || ApiError::NotFound);
    let mut routes = routes
        .layer(CatchPanicLayer::custom(|_panic| axum::response::IntoResponse::into_response(ApiError::panicked())))
        // Around every operation, that of panics included: what one leaves behind is known to nobody else.
        .layer(middleware::from_fn_with_state(Arc::clone(&app), idempotency::once))
        .layer(middleware::from_fn_with_state(door.body_deadline, bounds::bound_body))
        .layer(middleware::from_fn(bounds::bound_head))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), observe::observe))
        .layer(SetSensitiveRequestHeadersLayer::new([header::AUTHORIZATION, header::SEC_WEBSOCKET_PROTOCOL]));
    for (name, value) in browser::safety(door) {
        routes = routes.layer(SetResponseHeaderLayer::if_not_present(name, value));
    }
    // Outermost: a preflight has no token, and a page must be able to read refusals too.
    if let Some(cors) = browser::cors(&door.cors_origins) {
        routes = routes.layer(cors);
    }
    routes.with_state(app)
}

/// The listener of its own that Prometheus reads.
pub fn metrics_router(app: Arc<App>) -> Router {
    let routes = Router::new().route("/metrics", get(operations::metrics)).fallback(async || ApiError::NotFound);
    routes.layer(middleware::from_fn(observe::tell_problems)).with_state(app)
}
