//! `/v1/limits`: what every numeric field of a request may be, for whoever asks.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;

use super::{App, account, caller::Caller, error::ApiError};
use crate::sandbox::{Bound, bound_within, bounds};

#[derive(Debug, Serialize)]
pub(super) struct LimitsView {
    fields: Vec<Bound>,
}

/// Any valid token will do: it holds nothing but the caller's own.
pub(super) async fn read(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<LimitsView>, ApiError> {
    let accounts = account::of(&app, &caller).await?;
    let (tenant, principal) = (accounts.tenant_quotas(&app), accounts.principal_quotas(&app));
    let within = |bound: &Bound| bound_within(&bound_within(bound, &tenant), &principal);
    Ok(Json(LimitsView { fields: bounds().into_iter().map(within).collect() }))
}
