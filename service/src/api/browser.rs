//! What browsers are told: whose pages may call the API, and what they must not do with its answers.

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::CorsLayer;

use crate::config::DoorSettings;

/// How long a browser may rely on the answer to a preflight.
const PREFLIGHT_S: u64 = 600;

/// Lets pages of exactly these origins call the API. Without origins, none: a browser then keeps our answers from every page. Tokens are
/// no cookies, so no request needs credentials.
pub(super) fn cors(origins: &[HeaderValue]) -> Option<CorsLayer> {
    let header = HeaderName::from_static;
    let layer = CorsLayer::new()
        .allow_origin(origins.to_vec())
        .allow_methods([Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            header::ACCEPT,
            header("idempotency-key"),
            header("last-event-id"),
            header("x-request-id"),
        ])
        .expose_headers([
            header::LOCATION,
            header::RETRY_AFTER,
            header::WWW_AUTHENTICATE,
            header("x-request-id"),
            header("idempotency-replayed"),
            header("ratelimit-limit"),
            header("ratelimit-remaining"),
            header("ratelimit-reset"),
        ])
        .max_age(std::time::Duration::from_secs(PREFLIGHT_S));
    (!origins.is_empty()).then_some(layer)
}

/// Headers of every answer that does not set them itself.
pub(super) fn safety(door: &DoorSettings) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers = vec![
        // What a program printed must not become a page or a script of our origin.
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // Answers are one tenant's.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    if door.tls.is_some() {
        headers.push((header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000")));
    }
    headers
}
