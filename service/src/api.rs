//! The door: REST and WebSocket over the engine. It translates; it decides nothing.

mod account;
mod admin;
mod answers;
mod attach;
mod bounds;
mod browser;
pub mod caller;
mod commit;
mod contract;
pub mod error;
mod events;
mod execs;
mod files;
mod hops;
mod idempotency;
pub mod images;
pub mod json;
mod languages;
mod life;
mod limits;
mod logs;
mod nodes;
mod observe;
mod operations;
mod pass;
mod pools;
pub mod ports;
pub mod query;
mod registries;
mod runs;
mod sandboxes;
mod stats;
mod stream;
mod view;
mod volumes;
mod watch;
mod webhooks;

use std::{any::Any, sync::Arc, time::Duration};

pub use answers::Answers;
use axum::{
    Router,
    http::{StatusCode, header},
    middleware,
    response::{IntoResponse as _, Response},
};
pub use contract::openapi;
use error::ApiError;
pub use idempotency::Idempotency;
pub use pass::Courier;
use tower_http::{
    catch_panic::CatchPanicLayer, sensitive_headers::SetSensitiveRequestHeadersLayer, set_header::SetResponseHeaderLayer,
    timeout::TimeoutLayer,
};
use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use webhooks::webhook_body;

use crate::{
    clock::Clock,
    config::DoorSettings,
    engine::Engine,
    images::Images,
    metrics::Metrics,
    outbox::Outbox,
    runtime::Keeper,
    sandbox::{GRACE_MS, Languages, UNTIL_MS, WAIT_MS},
    store::Store,
    token::Verifier,
    webhooks::Webhooks,
};

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
    pub answers: Answers,
    pub languages: Languages,
    pub outbox: Arc<Outbox>,
    pub webhooks: Arc<Webhooks>,
    /// `None`: this node reaches no other.
    pub courier: Option<Courier>,
}

/// The whole API.
pub fn router(app: Arc<App>, door: &DoorSettings) -> Router {
    let (routes, _described) = routes().split_for_parts();
    let routes = routes.fallback(async || ApiError::NotFound);
    let mut routes = routes
        .layer(contained())
        // Around every operation, that of panics included: what one leaves behind is known to nobody else.
        .layer(middleware::from_fn_with_state(Arc::clone(&app), idempotency::once))
        // Around that: of what goes to another node, that one takes the key.
        .layer(middleware::from_fn_with_state(Arc::clone(&app), pass::pass))
        .layer(middleware::from_fn_with_state(door.body_deadline, bounds::bound_body))
        // What goes into a sandbox is neither read nor kept, and is as slow as its ends like.
        .merge(ports::router().layer(contained()).layer(middleware::from_fn_with_state(Arc::clone(&app), pass::pass)))
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

/// A panic ends one request.
fn contained() -> CatchPanicLayer<fn(Box<dyn Any + Send>) -> Response> {
    CatchPanicLayer::custom(|_panic| ApiError::panicked().into_response())
}

/// Every operation, each with what it says of itself.
fn routes() -> OpenApiRouter<Arc<App>> {
    let waiting = OpenApiRouter::new()
        .routes(routes!(runs::create, runs::batch::list))
        .routes(routes!(runs::batch::create))
        .routes(routes!(execs::create, execs::list));
    let waiting = timed(waiting, Duration::from_millis(WAIT_MS.max) + QUICK_DEADLINE)
        .merge(timed(OpenApiRouter::new().routes(routes!(life::stop)), STOP_DEADLINE))
        .merge(timed(OpenApiRouter::new().routes(routes!(life::wait)), Duration::from_millis(UNTIL_MS.max) + QUICK_DEADLINE));
    let quick = OpenApiRouter::new()
        .routes(routes!(runs::read, runs::cancel))
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(sandboxes::read, sandboxes::update, sandboxes::delete))
        .routes(routes!(life::start))
        .routes(routes!(life::kill))
        .routes(routes!(life::pause))
        .routes(routes!(life::resume))
        .routes(routes!(logs::read))
        .routes(routes!(stats::read))
        .routes(routes!(watch::read))
        .routes(routes!(attach::sandbox))
        .routes(routes!(execs::read))
        .routes(routes!(execs::attach))
        .routes(routes!(execs::kill))
        .routes(routes!(execs::log))
        .routes(routes!(execs::resize))
        .routes(routes!(limits::read))
        .routes(routes!(languages::list))
        .routes(routes!(account::quota))
        .routes(routes!(account::usage))
        .routes(routes!(account::metrics))
        .routes(routes!(events::read))
        .merge(admin::router())
        .merge(nodes::router())
        .merge(pools::router())
        .merge(volumes::router())
        .merge(webhooks::router())
        .merge(registries::router())
        .routes(routes!(operations::health))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::openapi))
        .routes(routes!(operations::docs));
    // An import lasts as long as its archive, a commit as long as the files that are read; they keep their own bounds.
    let committing = OpenApiRouter::new().routes(routes!(commit::commit));
    waiting.merge(timed(quick, QUICK_DEADLINE)).merge(images::router()).merge(committing).merge(files::router())
}

/// Ends what takes longer, and has the contract say so.
fn timed(mut routes: OpenApiRouter<Arc<App>>, deadline: Duration) -> OpenApiRouter<Arc<App>> {
    contract::promise_timeout(routes.get_openapi_mut());
    routes.layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, deadline))
}

/// What all operations say of themselves, those of the other listener included.
fn described() -> utoipa::openapi::OpenApi {
    routes().merge(metrics_routes()).into_openapi()
}

fn metrics_routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(operations::metrics))
}

/// The listener of its own that Prometheus reads.
pub fn metrics_router(app: Arc<App>) -> Router {
    let (routes, _described) = metrics_routes().split_for_parts();
    routes.fallback(async || ApiError::NotFound).layer(middleware::from_fn(observe::tell_problems)).with_state(app)
}
