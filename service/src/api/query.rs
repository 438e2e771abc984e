//! Query strings, with every parameter known and told when it is wrong.

use std::fmt::Display;

use axum::{extract::Query, http::Uri};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{App, caller::Caller, error::ApiError, observe};
use crate::sandbox::{Bound, Invalid, SandboxId};

/// The parameters in their order; a name may come more than once.
pub fn pairs(uri: &Uri) -> Result<Vec<(String, String)>, ApiError> {
    let Query(pairs) = Query::try_from_uri(uri).map_err(|error| Invalid::new("", error.to_string()))?;
    Ok(pairs)
}

/// The value of a parameter, or what is wrong with it.
pub(super) fn value<T: std::str::FromStr<Err: Display>>(name: &str, text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|error| Invalid::new(name, format!("{text:?} will not do: {error}")).into())
}

/// The value of a parameter that is a number within this bound.
pub(super) fn bounded(bound: &'static Bound, text: &str) -> Result<u64, ApiError> {
    let number =
        value::<u64>(bound.field, text).map_err(|_| Invalid { bound: Some(bound), ..Invalid::new(bound.field, "not a number") })?;
    Ok(bound.check(number)?)
}

/// The value of a parameter that is an instant, as RFC 3339 writes it.
pub(super) fn time(name: &str, text: &str) -> Result<OffsetDateTime, ApiError> {
    OffsetDateTime::parse(text, &Rfc3339).map_err(|_| Invalid::new(name, "not a time as in 2026-01-31T12:00:00Z").into())
}

/// A parameter that we do not have.
pub fn unknown(name: &str) -> ApiError {
    Invalid::new(name, "there is no such parameter").into()
}

/// The id in a path. What is no id names nothing.
pub(super) fn id(text: &str) -> Result<SandboxId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound)
}

/// What a path names, by id or by name. What is neither names nothing.
pub(super) async fn object(app: &App, caller: &Caller, text: &str) -> Result<SandboxId, ApiError> {
    let id = app.engine.named(&caller.tenant, text).await?.ok_or(ApiError::NotFound)?;
    observe::note_sandbox(id);
    Ok(id)
}
