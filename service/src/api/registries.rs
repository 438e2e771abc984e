//! `/v1/registries`: as whom a tenant is known to registries, for its pulls and pushes.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    images::{CREDENTIAL_BYTES_MAX, CREDENTIAL_NAME, CREDENTIAL_PASSWORD, GivenCredentials},
    json,
};
use crate::{
    images::RegistryName,
    sandbox::Invalid,
    store::{LOGINS_MAX, RegistryLogin},
    token::Scope,
};

/// The routes below `/v1/registries`.
pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list, keep)).routes(routes!(read, forget))
}

/// As whom the tenant is to be known to a registry.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewRegistryLogin)]
struct LoginRequest {
    /// Its host as images are named by it, with its port if that is not the usual one.
    #[schema(extensions(("x-schema" = json!({ "maxLength": 255, "pattern": "^[A-Za-z0-9][A-Za-z0-9.:-]*$" }))))]
    registry: String,
    #[schema(extensions(("x-schema" = json!({ "minLength": 1, "maxLength": CREDENTIAL_BYTES_MAX, "pattern": CREDENTIAL_NAME }))))]
    username: String,
    #[schema(extensions(("x-schema" = json!({ "maxLength": CREDENTIAL_BYTES_MAX, "pattern": CREDENTIAL_PASSWORD }))))]
    password: String,
}

/// As whom the tenant is known to a registry. The password is told to nobody.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RegistryLogin)]
struct LoginView {
    /// Its host, with its port if that is not the usual one.
    registry: String,
    username: String,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    changed_at: OffsetDateTime,
}

/// All that are kept for a tenant, by the names of the registries.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RegistryLoginList)]
struct Page {
    items: Vec<LoginView>,
}

/// The registries that the tenant has credentials for
#[utoipa::path(
    get,
    path = "/v1/registries",
    operation_id = "listRegistryLogins",
    tag = "images",
    security(("bearer" = ["images:write"])),
    responses((status = 200, description = "As whom the tenant is known to them.", body = Page)),
)]
async fn list(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<Page>, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let logins = app.store.list_registry_logins(&caller.tenant).await?;
    Ok(Json(Page { items: logins.into_iter().map(LoginView::from).collect() }))
}

/// As whom the tenant is known to a registry
#[utoipa::path(
    get,
    path = "/v1/registries/{registry}",
    operation_id = "readRegistryLogin",
    tag = "images",
    security(("bearer" = ["images:write"])),
    params(parameter::Registry),
    responses((status = 200, description = "What is kept.", body = LoginView), refusal::NotFound),
)]
async fn read(State(app): State<Arc<App>>, caller: Caller, Path(registry): Path<String>) -> Result<Json<LoginView>, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let registry = RegistryName::parse(&registry).map_err(|_| ApiError::NotFound)?;
    let login = app.store.find_registry_login(&caller.tenant, registry.as_str()).await?;
    Ok(Json(login.ok_or(ApiError::NotFound)?.into()))
}

/// Keep credentials for a registry
///
/// Whatever the tenant pulls from that registry or pushes to it, it does with these, unless a request has its own. The password is kept encrypted, and no answer holds it.
/// What was kept for that registry before is forgotten.
#[utoipa::path(
    post,
    path = "/v1/registries",
    operation_id = "keepRegistryLogin",
    tag = "images",
    security(("bearer" = ["images:write"])),
    request_body(content = LoginRequest, example = json!({ "registry": "registry.example", "username": "robot", "password": "a token" })),
    responses((status = 201, description = "They are kept.", body = LoginView, headers(("Location" = String, description = "Where this is found.")))),
)]
async fn keep(State(app): State<Arc<App>>, caller: Caller, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let LoginRequest { registry, username, password } = json::read(body).await?;
    let registry = RegistryName::parse(&registry).map_err(|why| Invalid::new("registry", why))?;
    let credentials = GivenCredentials { username, password }.parse("")?;
    let kept = app.images.keep_login(&registry, &credentials, &caller.owner()).await?;
    let login = kept.ok_or_else(|| Invalid::new("registry", format!("a tenant has credentials for at most {LOGINS_MAX} registries")))?;
    let location = format!("/v1/registries/{}", login.registry);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(LoginView::from(login))).into_response())
}

/// Forget the credentials for a registry
#[utoipa::path(
    delete,
    path = "/v1/registries/{registry}",
    operation_id = "forgetRegistryLogin",
    tag = "images",
    security(("bearer" = ["images:write"])),
    params(parameter::Registry),
    responses((status = 204, description = "They are forgotten."), refusal::NotFound),
)]
async fn forget(State(app): State<Arc<App>>, caller: Caller, Path(registry): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let registry = RegistryName::parse(&registry).map_err(|_| ApiError::NotFound)?;
    let is_forgotten = app.images.forget_login(&registry, &caller.owner()).await?;
    if is_forgotten { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NotFound) }
}

impl From<RegistryLogin> for LoginView {
    fn from(login: RegistryLogin) -> Self {
        let RegistryLogin { registry, username, sealed: _, key_id: _, changed_at } = login;
        Self { registry, username, changed_at }
    }
}
