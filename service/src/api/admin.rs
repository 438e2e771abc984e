//! `/v1/admin`: tenants and principals with their quotas, and everyone's sandboxes, usage and events. All of it needs the scope `admin`.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{FromRequestParts, Path, State},
    http::{StatusCode, Uri, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App,
    account::{self, UsageView},
    caller::Caller,
    contract::{
        parameter::{self, EventParameters, OfTenant, UsageParameters},
        refusal,
    },
    error::ApiError,
    events::{self, EventPage},
    json, query, sandboxes,
    view::SandboxView,
};
use crate::{
    sandbox::{Invalid, Kind, PrincipalQuotaChanges, QuotaChanges, QuotaScope, Quotas, State as SandboxState, TenantId},
    store::{Account, Act, Change, Everyones, Suspension, Used, Who},
    token::{Scope, is_name},
};

const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;

pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(read, change))
        .routes(routes!(suspend))
        .routes(routes!(resume))
        .routes(routes!(list_principals))
        .routes(routes!(read_principal, change_principal))
        .routes(routes!(suspend_principal))
        .routes(routes!(resume_principal))
        .routes(routes!(list_sandboxes))
        .routes(routes!(usage))
        .routes(routes!(list_events))
}

/// A caller whose token has the scope `admin`.
pub(super) struct Admin(pub(super) Caller);

impl FromRequestParts<Arc<App>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, app).await?;
        caller.require(Scope::Admin)?;
        Ok(Self(caller))
    }
}

/// A tenant to be registered.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewTenant {
    #[schema(pattern = "^[A-Za-z0-9._@:|+-]{1,128}$")]
    id: String,
    /// Its share of a full node, beside those of others. A new tenant has 100.
    #[schema(extensions(("x-schema" = json!(weight()))))]
    weight: Option<u32>,
    #[serde(default)]
    #[schema(value_type = QuotaChanges)]
    quotas: Map<String, Value>,
    /// Of each of its principals.
    #[serde(default)]
    #[schema(value_type = PrincipalQuotaChanges)]
    principal_quotas: Map<String, Value>,
}

/// What is to become of what a suspended account has.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Suspension)]
struct SuspendRequest {
    /// Whether what runs and what waits is ended, with `stopped_by_admin`.
    #[serde(default)]
    #[schema(default = false)]
    stop_sandboxes: bool,
}

/// A tenant as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Tenant)]
struct TenantView {
    id: String,
    #[schema(extensions(("x-schema" = json!(weight()))))]
    weight: u32,
    suspended: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    suspended_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    /// What differs from the defaults.
    quotas: Quotas,
    /// Of each of its principals, where they differ from the defaults.
    principal_quotas: Quotas,
    /// In force.
    effective_quotas: Quotas,
    used: Used,
}

/// A principal as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Principal)]
struct PrincipalView {
    #[schema(value_type = String)]
    tenant: TenantId,
    name: String,
    suspended: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    suspended_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    /// What differs from those of the tenant's other principals.
    quotas: Quotas,
    /// In force.
    effective_quotas: Quotas,
    used: Used,
}

/// Some of a list.
#[derive(Debug, Serialize, ToSchema)]
struct Page<T> {
    items: Vec<T>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// A sandbox or run, with whose it is and which node has it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = HeldSandbox)]
struct HeldView {
    #[schema(value_type = String)]
    tenant: TenantId,
    principal: String,
    #[schema(required, value_type = Option<String>, format = "uuid")]
    node: Option<String>,
    #[serde(flatten)]
    sandbox: SandboxView,
}

/// Body of a change of a tenant, for the contract: [`Change`] is read. One that is absent stays as it is.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(description = "What is to be changed; what is absent stays as it is.")]
#[expect(dead_code, reason = "a `Change` is read, and checked for what it is to change")]
struct TenantChange {
    /// Its share of a full node, beside those of others.
    #[schema(extensions(("x-schema" = json!(weight()))))]
    weight: Option<u32>,
    #[serde(default)]
    #[schema(value_type = QuotaChanges)]
    quotas: Map<String, Value>,
    /// Of each of its principals.
    #[serde(default)]
    #[schema(value_type = PrincipalQuotaChanges)]
    principal_quotas: Map<String, Value>,
}

/// Body of a change of a principal, for the contract likewise.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(description = "What is to be changed; what is absent stays as it is.")]
#[expect(dead_code, reason = "a `Change` is read, and checked for what it is to change")]
struct PrincipalChange {
    #[serde(default)]
    #[schema(value_type = PrincipalQuotaChanges)]
    quotas: Map<String, Value>,
}

/// Bounds of a weight, for the contract.
fn weight() -> Value {
    json!({ "minimum": WEIGHTS.start(), "maximum": WEIGHTS.end() })
}

/// Register a tenant
#[utoipa::path(
    post,
    path = "/v1/admin/tenants",
    operation_id = "adminCreateTenant",
    tag = "admin",
    security(("bearer" = ["admin"])),
    request_body(content = NewTenant, example = json!({ "id": "acme", "weight": 200, "quotas": { "sandboxes": 50 } })),
    responses(
        (status = 201, description = "The tenant is there.", body = TenantView, headers(("Location" = String, description = "Where the tenant is found."))),
        refusal::Conflict,
    ),
)]
async fn create(State(app): State<Arc<App>>, Admin(admin): Admin, body: Body) -> Result<Response, ApiError> {
    let NewTenant { id, weight, quotas, principal_quotas } = json::read(body).await?;
    let change = Change { weight, quotas, principal_quotas };
    let tenant = TenantId::proven(name("id", id)?);
    check(&change, QuotaScope::Tenant)?;
    let (owner, data) = (admin.owner(), json!({}));
    let act = Act { actor: Some(&owner), at: app.clock.now(), data };
    if !app.store.create_tenant(&tenant, &change, &act).await?? {
        return Err(ApiError::Conflict(format!("there is a tenant {tenant}")));
    }
    // The one sign of names that may not stand in a URI as it is (RFC 3986).
    let location = format!("/v1/admin/tenants/{}", tenant.as_str().replace('|', "%7C"));
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(tenant_view(&app, &tenant).await?)).into_response())
}

/// All tenants, by id
#[utoipa::path(
    get,
    path = "/v1/admin/tenants",
    operation_id = "adminListTenants",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Page),
    responses((status = 200, description = "A page.", body = Page<TenantView>)),
)]
async fn list(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<Page<TenantView>>, ApiError> {
    let (limit, after) = page(query::pairs(&uri)?)?;
    let base = &app.engine.default_quotas().tenant;
    let tenants = app.store.list_tenants(&after, limit + 1, base, app.clock.now()).await?;
    Ok(Json(paged(tenants, limit, |tenant| hex::encode(&tenant.name), |tenant| TenantView::new(tenant, base))))
}

/// One tenant
#[utoipa::path(
    get,
    path = "/v1/admin/tenants/{tenant}",
    operation_id = "adminReadTenant",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Tenant),
    responses((status = 200, description = "The tenant as it is now.", body = TenantView), refusal::NotFound),
)]
async fn read(State(app): State<Arc<App>>, _admin: Admin, Path(tenant): Path<String>) -> Result<Json<TenantView>, ApiError> {
    Ok(Json(tenant_view(&app, &TenantId::proven(tenant)).await?))
}

/// Change a tenant's weight and quotas
///
/// Holds from the next request on.
#[utoipa::path(
    patch,
    path = "/v1/admin/tenants/{tenant}",
    operation_id = "adminChangeTenant",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Tenant),
    request_body(content = TenantChange, example = json!({ "weight": 200 })),
    responses((status = 200, description = "The tenant as it is now.", body = TenantView), refusal::NotFound),
)]
async fn change(
    State(app): State<Arc<App>>,
    Admin(admin): Admin,
    Path(tenant): Path<String>,
    body: Body,
) -> Result<Json<TenantView>, ApiError> {
    let change: Change = json::read(body).await?;
    check(&change, QuotaScope::Tenant)?;
    let tenant = TenantId::proven(tenant);
    apply(&app, &admin, Who { tenant: &tenant, principal: None }, change).await?;
    Ok(Json(tenant_view(&app, &tenant).await?))
}

/// Let a tenant do nothing any more
///
/// Holds from the next request on, on every node. What waits is not started before it is lifted; what runs goes on, unless `stop_sandboxes` is true, which ends both.
#[utoipa::path(
    post,
    path = "/v1/admin/tenants/{tenant}/suspend",
    operation_id = "adminSuspendTenant",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Tenant),
    request_body(content = SuspendRequest, example = json!({ "stop_sandboxes": true })),
    responses(
        (status = 200, description = "The tenant as it is now.", body = TenantView),
        refusal::NotFound,
        refusal::Conflict,
    ),
)]
async fn suspend(
    State(app): State<Arc<App>>,
    Admin(admin): Admin,
    Path(tenant): Path<String>,
    body: Body,
) -> Result<Json<TenantView>, ApiError> {
    let SuspendRequest { stop_sandboxes } = json::read(body).await?;
    let tenant = TenantId::proven(tenant);
    if tenant == admin.tenant {
        return Err(ApiError::Conflict("nobody suspends the tenant of their own token".to_owned()));
    }
    let who = Who { tenant: &tenant, principal: None };
    set_suspension(&app, &admin, who, Suspension::Imposed { stops: stop_sandboxes }).await?;
    Ok(Json(tenant_view(&app, &tenant).await?))
}

/// Lift a tenant's suspension
#[utoipa::path(
    post,
    path = "/v1/admin/tenants/{tenant}/resume",
    operation_id = "adminResumeTenant",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Tenant),
    responses((status = 200, description = "The tenant as it is now.", body = TenantView), refusal::NotFound),
)]
async fn resume(State(app): State<Arc<App>>, Admin(admin): Admin, Path(tenant): Path<String>) -> Result<Json<TenantView>, ApiError> {
    let tenant = TenantId::proven(tenant);
    set_suspension(&app, &admin, Who { tenant: &tenant, principal: None }, Suspension::Lifted).await?;
    Ok(Json(tenant_view(&app, &tenant).await?))
}

/// A tenant's principals, by name
///
/// Those that are known: who never came is not, and who has had nothing for a day and differs in nothing is forgotten.
#[utoipa::path(
    get,
    path = "/v1/admin/tenants/{tenant}/principals",
    operation_id = "adminListPrincipals",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Tenant, parameter::Page),
    responses((status = 200, description = "A page.", body = Page<PrincipalView>), refusal::NotFound),
)]
async fn list_principals(
    State(app): State<Arc<App>>,
    _admin: Admin,
    Path(tenant): Path<String>,
    uri: Uri,
) -> Result<Json<Page<PrincipalView>>, ApiError> {
    let tenant = TenantId::proven(tenant);
    let (limit, after) = page(query::pairs(&uri)?)?;
    let base = behind_principals(&app, &tenant).await?;
    let principals = app.store.list_principals(&tenant, &after, limit + 1, &base, app.clock.now()).await?;
    Ok(Json(paged(principals, limit, |one| hex::encode(&one.name), |one| PrincipalView::new(&tenant, one, &base))))
}

type PrincipalPath = Path<(String, String)>;

/// One principal
#[utoipa::path(
    get,
    path = "/v1/admin/tenants/{tenant}/principals/{principal}",
    operation_id = "adminReadPrincipal",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Principal),
    responses((status = 200, description = "The principal as it is now.", body = PrincipalView), refusal::NotFound),
)]
async fn read_principal(State(app): State<Arc<App>>, _admin: Admin, path: PrincipalPath) -> Result<Json<PrincipalView>, ApiError> {
    let Path((tenant, principal)) = path;
    Ok(Json(principal_view(&app, &TenantId::proven(tenant), &principal).await?))
}

/// Change a principal's quotas
///
/// It need not have come yet.
#[utoipa::path(
    patch,
    path = "/v1/admin/tenants/{tenant}/principals/{principal}",
    operation_id = "adminChangePrincipal",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Principal),
    request_body(content = PrincipalChange, example = json!({ "quotas": { "sandboxes": 5 } })),
    responses((status = 200, description = "The principal as it is now.", body = PrincipalView), refusal::NotFound),
)]
async fn change_principal(
    State(app): State<Arc<App>>,
    Admin(admin): Admin,
    path: PrincipalPath,
    body: Body,
) -> Result<Json<PrincipalView>, ApiError> {
    let Path((tenant, principal)) = path;
    let change: Change = json::read(body).await?;
    check(&change, QuotaScope::Principal)?;
    let tenant = TenantId::proven(tenant);
    let who = known_principal(&app, &tenant, &principal).await?;
    apply(&app, &admin, who, change).await?;
    Ok(Json(principal_view(&app, &tenant, &principal).await?))
}

/// Let a principal do nothing any more
///
/// It need not have come yet. Holds from the next request on, on every node. What waits is not started before it is lifted; what runs goes on, unless `stop_sandboxes` is true, which ends both.
#[utoipa::path(
    post,
    path = "/v1/admin/tenants/{tenant}/principals/{principal}/suspend",
    operation_id = "adminSuspendPrincipal",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Principal),
    request_body(content = SuspendRequest, example = json!({ "stop_sandboxes": true })),
    responses(
        (status = 200, description = "The principal as it is now.", body = PrincipalView),
        refusal::NotFound,
        refusal::Conflict,
    ),
)]
async fn suspend_principal(
    State(app): State<Arc<App>>,
    Admin(admin): Admin,
    path: PrincipalPath,
    body: Body,
) -> Result<Json<PrincipalView>, ApiError> {
    let Path((tenant, principal)) = path;
    let SuspendRequest { stop_sandboxes } = json::read(body).await?;
    let tenant = TenantId::proven(tenant);
    if tenant == admin.tenant && principal == admin.principal {
        return Err(ApiError::Conflict("nobody suspends themselves".to_owned()));
    }
    let who = known_principal(&app, &tenant, &principal).await?;
    set_suspension(&app, &admin, who, Suspension::Imposed { stops: stop_sandboxes }).await?;
    Ok(Json(principal_view(&app, &tenant, &principal).await?))
}

/// Lift a principal's suspension
#[utoipa::path(
    post,
    path = "/v1/admin/tenants/{tenant}/principals/{principal}/resume",
    operation_id = "adminResumePrincipal",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Principal),
    responses((status = 200, description = "The principal as it is now.", body = PrincipalView), refusal::NotFound),
)]
async fn resume_principal(State(app): State<Arc<App>>, Admin(admin): Admin, path: PrincipalPath) -> Result<Json<PrincipalView>, ApiError> {
    let Path((tenant, principal)) = path;
    let tenant = TenantId::proven(tenant);
    set_suspension(&app, &admin, Who { tenant: &tenant, principal: Some(&principal) }, Suspension::Lifted).await?;
    Ok(Json(principal_view(&app, &tenant, &principal).await?))
}

/// Every tenant's sandboxes and runs, newest first
#[utoipa::path(
    get,
    path = "/v1/admin/sandboxes",
    operation_id = "adminListSandboxes",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(
        parameter::Page,
        OfTenant,
        ("principal" = Option<String>, Query, description = "Only this principal's.", extensions(("x-schema" = json!({ "pattern": "^[^\\u0000]*$" })))),
        ("kind" = Option<Kind>, Query, description = "Only of this kind."),
        ("state" = Option<Vec<SandboxState>>, Query, description = "Only those in one of these states."),
    ),
    responses((status = 200, description = "A page.", body = Page<HeldView>)),
)]
async fn list_sandboxes(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<Page<HeldView>>, ApiError> {
    let mut filter = Everyones { limit: 50, ..Everyones::default() };
    for (name, text) in query::pairs(&uri)? {
        match name.as_str() {
            "limit" => filter.limit = account::list_limit(&text)?,
            "cursor" => {
                filter.before = Some(sandboxes::position(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?);
            }
            "tenant" => filter.tenant = Some(TenantId::proven(text)),
            "principal" => filter.principal = Some(text),
            "kind" => {
                let kind = Kind::named(&text);
                filter.kind = Some(kind.ok_or_else(|| Invalid::new("kind", "a kind is run, sandbox or pooled"))?);
            }
            "state" => {
                let state = SandboxState::named(&text);
                filter.states.push(
                    state.ok_or_else(|| Invalid::new("state", "a state is one of queued, starting, running, paused, exited, failed"))?,
                );
            }
            _ => return Err(query::unknown(&name)),
        }
    }
    let held = app.store.list_everyones(&Everyones { limit: filter.limit + 1, ..filter.clone() }).await?;
    let view = |held: crate::store::Held| HeldView {
        tenant: held.sandbox.tenant.clone(),
        principal: held.sandbox.principal.clone(),
        node: held.node.map(|node| node.to_string()),
        sandbox: held.sandbox.into(),
    };
    Ok(Json(paged(held, filter.limit, |held| sandboxes::cursor(held.sandbox.id), view)))
}

/// What all tenants used
#[utoipa::path(
    get,
    path = "/v1/admin/usage",
    operation_id = "adminReadUsage",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(UsageParameters, OfTenant),
    responses((status = 200, description = "Usage by line and in all.", body = UsageView)),
)]
async fn usage(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<UsageView>, ApiError> {
    account::usage_of(&app, account::usage_query(query::pairs(&uri)?, None, app.clock.now())?).await
}

/// What happened anywhere, newest first
#[utoipa::path(
    get,
    path = "/v1/admin/events",
    operation_id = "adminListEvents",
    tag = "admin",
    security(("bearer" = ["admin"])),
    params(parameter::Page, EventParameters, OfTenant),
    responses((status = 200, description = "A page.", body = EventPage)),
)]
async fn list_events(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<EventPage>, ApiError> {
    events::page(&app, events::filter(query::pairs(&uri)?, None)?, None).await
}

/// Of the form that tokens have.
fn name(field: &str, text: String) -> Result<String, ApiError> {
    is_name(&text).then_some(text).ok_or_else(|| Invalid::new(field, "a name is 1 to 128 letters, digits and ._@:|+-").into())
}

fn check(change: &Change, scope: QuotaScope) -> Result<(), ApiError> {
    let Change { weight, quotas, principal_quotas } = change;
    if weight.is_some_and(|weight| scope == QuotaScope::Principal || !WEIGHTS.contains(&weight)) {
        let detail = "a tenant's weight is 1 to 10000; its principals have none";
        return Err(Invalid::new("weight", detail).into());
    }
    if scope == QuotaScope::Principal && !principal_quotas.is_empty() {
        return Err(Invalid::new("principal_quotas", "only a tenant has these").into());
    }
    Quotas::parse("quotas", scope, quotas.clone())?;
    Quotas::parse("principal_quotas", QuotaScope::Principal, principal_quotas.clone())?;
    Ok(())
}

async fn apply(app: &App, admin: &Caller, who: Who<'_>, change: Change) -> Result<(), ApiError> {
    let data = json!({ "weight": change.weight, "quotas": change.quotas, "principal_quotas": change.principal_quotas });
    let owner = admin.owner();
    let act = Act { actor: Some(&owner), at: app.clock.now(), data };
    Ok(app.store.change_account(who, &change, &act).await?.ok_or(ApiError::NotFound)??)
}

async fn set_suspension(app: &App, admin: &Caller, who: Who<'_>, suspension: Suspension) -> Result<(), ApiError> {
    let data = match suspension {
        Suspension::Lifted => json!({}),
        Suspension::Imposed { stops } => json!({ "stop_sandboxes": stops }),
    };
    let owner = admin.owner();
    let act = Act { actor: Some(&owner), at: app.clock.now(), data };
    if app.store.suspend(who, suspension, &act).await? { Ok(()) } else { Err(ApiError::NotFound) }
}

/// A principal need not have come yet to be given quotas, or to be kept from coming.
async fn known_principal<'a>(app: &App, tenant: &'a TenantId, principal: &'a str) -> Result<Who<'a>, ApiError> {
    name("principal", principal.to_owned())?;
    let who = Who { tenant, principal: Some(principal) };
    if app.store.introduce_principal(who, app.clock.now()).await? { Ok(who) } else { Err(ApiError::NotFound) }
}

async fn tenant_view(app: &App, tenant: &TenantId) -> Result<TenantView, ApiError> {
    let base = &app.engine.default_quotas().tenant;
    let account = app.store.account(Who { tenant, principal: None }, base, app.clock.now()).await?;
    Ok(TenantView::new(account.ok_or(ApiError::NotFound)?, base))
}

async fn principal_view(app: &App, tenant: &TenantId, principal: &str) -> Result<PrincipalView, ApiError> {
    let base = behind_principals(app, tenant).await?;
    let account = app.store.account(Who { tenant, principal: Some(principal) }, &base, app.clock.now()).await?;
    Ok(PrincipalView::new(tenant, account.ok_or(ApiError::NotFound)?, &base))
}

/// The quotas of the tenant's principals that have none of their own.
async fn behind_principals(app: &App, tenant: &TenantId) -> Result<Quotas, ApiError> {
    let defaults = app.engine.default_quotas();
    let account = app.store.account(Who { tenant, principal: None }, &defaults.tenant, app.clock.now()).await?.ok_or(ApiError::NotFound)?;
    let own = account.of_tenant.map(|own| own.principal_quotas).unwrap_or_default();
    Ok(own.over(&defaults.principal))
}

fn page(pairs: Vec<(String, String)>) -> Result<(u32, String), ApiError> {
    let (mut limit, mut after) = (50, String::new());
    for (key, text) in pairs {
        match key.as_str() {
            "limit" => limit = account::list_limit(&text)?,
            "cursor" => after = after_cursor(&text)?,
            _ => return Err(query::unknown(&key)),
        }
    }
    Ok((limit, after))
}

/// The name that a page ended with. In a cursor it is written so that it stands in a URL as it is.
fn after_cursor(text: &str) -> Result<String, ApiError> {
    let name = hex::decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok()).filter(|name| is_name(name));
    name.ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave").into())
}

/// A page of these, of which there is one more than asked for if there is another page.
fn paged<T, V>(mut items: Vec<T>, limit: u32, cursor: impl Fn(&T) -> String, view: impl FnMut(T) -> V) -> Page<V> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_more = items.len() > limit;
    items.truncate(limit);
    let next_cursor = if has_more { items.last().map(cursor) } else { None };
    Page { items: items.into_iter().map(view).collect(), next_cursor }
}

impl TenantView {
    fn new(account: Account, base: &Quotas) -> Self {
        let effective_quotas = account.quotas.over(base).in_full(QuotaScope::Tenant);
        let (weight, principal_quotas) = account.of_tenant.map(|own| (own.weight, own.principal_quotas)).unwrap_or_default();
        Self {
            id: account.name,
            weight,
            suspended: account.suspended_at.is_some(),
            suspended_at: account.suspended_at,
            created_at: account.created_at,
            quotas: account.quotas,
            principal_quotas,
            effective_quotas,
            used: account.used,
        }
    }
}

impl PrincipalView {
    fn new(tenant: &TenantId, account: Account, base: &Quotas) -> Self {
        Self {
            tenant: tenant.clone(),
            name: account.name,
            suspended: account.suspended_at.is_some(),
            suspended_at: account.suspended_at,
            created_at: account.created_at,
            effective_quotas: account.quotas.over(base).in_full(QuotaScope::Principal),
            quotas: account.quotas,
            used: account.used,
        }
    }
}
