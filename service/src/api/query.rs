//! Query strings, with every parameter known and told when it is wrong.

use std::fmt::Display;

use axum::{extract::Query, http::Uri};

use super::error::ApiError;
use crate::sandbox::{Invalid, SandboxId};

/// The parameters in their order; a name may come more than once.
pub fn pairs(uri: &Uri) -> Result<Vec<(String, String)>, ApiError> {
    let Query(pairs) = Query::try_from_uri(uri).map_err(|error| Invalid::new("", error.to_string()))?;
    Ok(pairs)
}

/// The value of a parameter, or what is wrong with it.
pub(super) fn value<T: std::str::FromStr<Err: Display>>(name: &str, text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|error| Invalid::new(name, format!("{text:?} will not do: {error}")).into())
}

/// A parameter that we do not have.
pub fn unknown(name: &str) -> ApiError {
    Invalid::new(name, "there is no such parameter").into()
}

/// The id in a path. What is no id names nothing.
pub(super) fn id(text: &str) -> Result<SandboxId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound)
}
