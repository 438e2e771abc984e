//! `/v1/limits`: what every numeric field of a request may be, for whoever asks.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{App, account, caller::Caller, error::ApiError};
use crate::sandbox::{Bound, bound_within, bounds};

/// The bounds of every numeric field.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Bounds)]
pub(super) struct LimitsView {
    fields: Vec<Bound>,
}

/// What every numeric field of a request may be
///
/// For the caller, whose quotas may permit less than there is.
#[utoipa::path(
    get,
    path = "/v1/limits",
    operation_id = "readLimits",
    tag = "account",
    security(("bearer" = [])),
    responses((status = 200, description = "The bounds.", body = LimitsView)),
)]
pub(super) async fn read(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<LimitsView>, ApiError> {
    let accounts = account::of(&app, &caller).await?;
    let (tenant, principal) = (accounts.tenant_quotas(&app), accounts.principal_quotas(&app));
    let within = |bound: &Bound| bound_within(&bound_within(bound, &tenant), &principal);
    Ok(Json(LimitsView { fields: bounds().into_iter().map(within).collect() }))
}
