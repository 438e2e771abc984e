//! `/v1/admin`: tenants and principals with their quotas, and everyone's sandboxes, usage and events. All of it needs the scope `admin`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Body,
    extract::{FromRequestParts, Path, State},
    http::{StatusCode, Uri, header, request::Parts},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::{
    App,
    account::{self, EventPage, UsageView},
    caller::Caller,
    error::ApiError,
    json, query, sandboxes,
    view::SandboxView,
};
use crate::{
    sandbox::{Invalid, Kind, QuotaScope, Quotas, State as SandboxState, TenantId},
    store::{Account, Act, Change, Everyones, Suspension, Used, Who},
    token::{Scope, is_name},
};

const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;

pub(super) fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/admin/tenants", get(list).post(create))
        .route("/v1/admin/tenants/{tenant}", get(read).patch(change))
        .route("/v1/admin/tenants/{tenant}/suspend", post(suspend))
        .route("/v1/admin/tenants/{tenant}/resume", post(resume))
        .route("/v1/admin/tenants/{tenant}/principals", get(list_principals))
        .route("/v1/admin/tenants/{tenant}/principals/{principal}", get(read_principal).patch(change_principal))
        .route("/v1/admin/tenants/{tenant}/principals/{principal}/suspend", post(suspend_principal))
        .route("/v1/admin/tenants/{tenant}/principals/{principal}/resume", post(resume_principal))
        .route("/v1/admin/sandboxes", get(list_sandboxes))
        .route("/v1/admin/usage", get(usage))
        .route("/v1/admin/events", get(events))
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

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTenant {
    id: String,
    weight: Option<u32>,
    #[serde(default)]
    quotas: Map<String, Value>,
    #[serde(default)]
    principal_quotas: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SuspendRequest {
    #[serde(default)]
    stop_sandboxes: bool,
}

#[derive(Debug, Serialize)]
struct TenantView {
    id: String,
    weight: u32,
    suspended: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    suspended_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// What differs from the defaults.
    quotas: Quotas,
    principal_quotas: Quotas,
    /// In force.
    effective_quotas: Quotas,
    used: Used,
}

#[derive(Debug, Serialize)]
struct PrincipalView {
    tenant: TenantId,
    name: String,
    suspended: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    suspended_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    quotas: Quotas,
    effective_quotas: Quotas,
    used: Used,
}

#[derive(Debug, Serialize)]
struct Page<T> {
    items: Vec<T>,
    next_cursor: Option<String>,
}

/// A sandbox or run with whose and where it is.
#[derive(Debug, Serialize)]
struct HeldView {
    tenant: TenantId,
    principal: String,
    node: Option<String>,
    #[serde(flatten)]
    sandbox: SandboxView,
}

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

async fn list(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<Page<TenantView>>, ApiError> {
    let (limit, after) = page(query::pairs(&uri)?)?;
    let base = &app.engine.default_quotas().tenant;
    let tenants = app.store.list_tenants(&after, limit + 1, base, app.clock.now()).await?;
    Ok(Json(paged(tenants, limit, |tenant| hex::encode(&tenant.name), |tenant| TenantView::new(tenant, base))))
}

async fn read(State(app): State<Arc<App>>, _admin: Admin, Path(tenant): Path<String>) -> Result<Json<TenantView>, ApiError> {
    Ok(Json(tenant_view(&app, &TenantId::proven(tenant)).await?))
}

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

async fn resume(State(app): State<Arc<App>>, Admin(admin): Admin, Path(tenant): Path<String>) -> Result<Json<TenantView>, ApiError> {
    let tenant = TenantId::proven(tenant);
    set_suspension(&app, &admin, Who { tenant: &tenant, principal: None }, Suspension::Lifted).await?;
    Ok(Json(tenant_view(&app, &tenant).await?))
}

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

async fn read_principal(State(app): State<Arc<App>>, _admin: Admin, path: PrincipalPath) -> Result<Json<PrincipalView>, ApiError> {
    let Path((tenant, principal)) = path;
    Ok(Json(principal_view(&app, &TenantId::proven(tenant), &principal).await?))
}

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

async fn resume_principal(State(app): State<Arc<App>>, Admin(admin): Admin, path: PrincipalPath) -> Result<Json<PrincipalView>, ApiError> {
    let Path((tenant, principal)) = path;
    let tenant = TenantId::proven(tenant);
    set_suspension(&app, &admin, Who { tenant: &tenant, principal: Some(&principal) }, Suspension::Lifted).await?;
    Ok(Json(principal_view(&app, &tenant, &principal).await?))
}

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
                let kind = [Kind::Run, Kind::Sandbox].into_iter().find(|kind| kind.as_str() == text);
                filter.kind = Some(kind.ok_or_else(|| Invalid::new("kind", "a kind is run or sandbox"))?);
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

async fn usage(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<UsageView>, ApiError> {
    account::usage_of(&app, account::usage_query(query::pairs(&uri)?, None, app.clock.now())?).await
}

async fn events(State(app): State<Arc<App>>, _admin: Admin, uri: Uri) -> Result<Json<EventPage>, ApiError> {
    account::events_of(&app, account::event_filter(query::pairs(&uri)?, None)?, None).await
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
