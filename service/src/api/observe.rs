//! What surrounds every request: its id, its figures, its line in the log, and the body of its problem.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use tracing::{Instrument as _, Span, field::Empty};
use uuid::Uuid;

use super::{
    App,
    error::{ApiError, Problem},
};
use crate::{
    sandbox::{SandboxId, TenantId},
    telemetry::{self, TRACE},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Sees a request in and its answer out. Every refusal leaves as a problem that carries the request's id.
pub(super) async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let began_at = Instant::now();
    let id = sound_or_new_id(&request);
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = method_name(&request);
    // A path that we do not have is the caller's text; it is no label.
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "unknown".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!(
        target: TRACE,
        "request",
        request.id = id,
        trace.id = Empty,
        tenant = Empty,
        sandbox.id = Empty,
        http.method = method,
        http.route = route,
        http.status = Empty,
    );
    telemetry::join(&span, request.headers());

    let response = async {
        let response = with_problem(next.run(request).await, &id);
        if let Some(problem) = response.extensions().get::<Problem>() {
            problem.count(&app.metrics);
        }
        let seconds = began_at.elapsed().as_secs_f64();
        // What a program answers says nothing of how the service does, and may be any number.
        let (status, is_proxied) = (response.status(), response.extensions().get::<Proxied>().is_some());
        app.metrics.request(&route, method, if is_proxied { "proxied" } else { status.as_str() }, seconds);
        Span::current().record("http.status", status.as_u16());
        tracing::debug!(seconds, "answered");
        response
    };
    let mut response = response.instrument(span).await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Has lines of the log and the trace name who asks.
pub(super) fn note_tenant(tenant: &TenantId) {
    Span::current().record("tenant", tenant.as_str());
}

/// Has them name what was made, or is asked for by its path.
pub(super) fn note_sandbox(id: SandboxId) {
    Span::current().record("sandbox.id", tracing::field::display(id));
}

/// The part of [`observe`] that is for people: every refusal leaves as a problem.
pub(super) async fn tell_problems(request: Request, next: Next) -> Response {
    let id = sound_or_new_id(&request);
    with_problem(next.run(request).await, &id)
}

/// What names a request that [`observe`] saw in.
#[derive(Debug, Clone)]
struct RequestId(String);

/// An answer whose body is as the client is to have it.
#[derive(Debug, Clone, Copy)]
struct Told;

/// An answer of a program in a sandbox.
#[derive(Debug, Clone, Copy)]
struct Proxied;

/// An answer that may be another later, though its status does not say so.
#[derive(Debug, Clone, Copy)]
struct Passing;

/// Names the request, in answers and in the log.
pub(super) fn request_id(parts: &Parts) -> String {
    parts.extensions.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default()
}

/// Whether this is, or holds, a refusal that may be none later.
pub(super) fn is_retryable(response: &Response) -> bool {
    let extensions = response.extensions();
    extensions.get::<Passing>().is_some() || extensions.get::<Problem>().is_some_and(|problem| problem.retryable)
}

/// Says that this answer, which is no refusal, holds one that may be none later.
pub(super) fn mark_as_passing(response: &mut Response) {
    response.extensions_mut().insert(Passing);
}

/// Has the answer leave as it is: its body says already what there is to say.
pub(super) fn mark_as_told(response: &mut Response) {
    response.extensions_mut().insert(Told);
}

/// Says that this answer is a program's, which leaves as it is, too: its refusals are not ours.
pub(super) fn mark_as_proxied(response: &mut Response) {
    mark_as_told(response);
    response.extensions_mut().insert(Proxied);
}

/// The caller's, if it is fit to be repeated; else one of ours.
fn sound_or_new_id(request: &Request) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let is_sound = |id: &&str| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/@+=-".contains(&b))
    };
    given.filter(is_sound).map_or_else(|| Uuid::now_v7().to_string(), ToOwned::to_owned)
}

/// One of few: a method can be any word.
fn method_name(request: &Request) -> &'static str {
    ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]
        .into_iter()
        .find(|name| *name == request.method().as_str())
        .unwrap_or("other")
}

/// Writes the body of a refusal, where it is not written yet. What it says stays with the answer.
pub(super) fn with_problem(mut response: Response, request_id: &str) -> Response {
    if response.extensions().get::<Told>().is_some() {
        return response;
    }
    let problem = response.extensions_mut().remove::<Problem>().or_else(|| {
        // Refused by a layer or by axum itself: the status says why, and its headers (`allow`) stay.
        let error = ApiError::of_status(response.status())?;
        let mut ours = error.into_response();
        *response.status_mut() = ours.status();
        ours.extensions_mut().remove()
    });
    let Some(mut problem) = problem else { return response };
    request_id.clone_into(&mut problem.request_id);
    let body = serde_json::to_vec(&problem).expect("a problem holds nothing that JSON cannot");
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(body);
    response.extensions_mut().insert(problem);
    response
}
