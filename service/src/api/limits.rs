//! `/v1/limits`: what every numeric field of a request may be.

use axum::Json;
use serde::Serialize;

use super::caller::Caller;
use crate::sandbox::{Bound, bounds};

#[derive(Debug, Serialize)]
pub(super) struct LimitsView {
    fields: [&'static Bound; 15],
}

/// Any valid token will do: it holds nothing of anybody's.
pub(super) async fn read(_caller: Caller) -> Json<LimitsView> {
    Json(LimitsView { fields: bounds() })
}
