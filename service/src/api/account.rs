//! `/v1/quota`, `/v1/usage`, `/v1/metrics`: what a caller may have, and has used.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{Uri, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use serde_json::Number;
use time::{Date, Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::ToSchema;

use super::{App, caller::Caller, contract::parameter::UsageParameters, error::ApiError, query};
use crate::{
    metrics,
    sandbox::{Invalid, Kind, LIST_LIMIT, QuotaScope, Quotas, TenantId},
    store::{Account, GroupBy, TimeUnit, UsageLine, UsageQuery, Used, Who},
    token::Scope,
};

/// Lines of usage in one answer, at the most.
const USAGE_LINES_MAX: u32 = 10_000;

/// The caller's tenant and principal. One that was not stored yet has used nothing.
#[derive(Debug)]
pub(super) struct Accounts {
    tenant: Option<Account>,
    principal: Option<Account>,
}

/// What the caller may have, and what of it is in use.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = QuotaReport)]
pub(super) struct QuotaView {
    tenant: AccountQuota,
    principal: AccountQuota,
}

/// Quotas in force, and their use.
#[derive(Debug, Serialize, ToSchema)]
struct AccountQuota {
    name: String,
    quotas: Quotas,
    used: Used,
}

/// Usage by line and in all.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UsageReport)]
pub(super) struct UsageView {
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    from: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    to: OffsetDateTime,
    items: Vec<LineView>,
    total: LineView,
}

/// `tenant`, `principal`, `kind` and `at` are there where lines are told apart by them.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UsageLine)]
struct LineView {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    principal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Kind)]
    kind: Option<String>,
    /// Beginning of the hour or day.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, format = DateTime)]
    at: Option<OffsetDateTime>,
    /// Sandboxes and runs that ended.
    runs: u64,
    wall_ms: u64,
    cpu_ms: u64,
    /// Memory limit times wall time.
    #[schema(value_type = u64)]
    memory_byte_seconds: Number,
    /// Written, kept or not.
    output_bytes: u64,
    /// Kept.
    log_bytes: u64,
    network_bytes: u64,
}

pub(super) async fn of(app: &App, caller: &Caller) -> Result<Accounts, ApiError> {
    let now = app.clock.now();
    let defaults = app.engine.default_quotas();
    let tenant = app.store.account(Who { tenant: &caller.tenant, principal: None }, &defaults.tenant, now).await?;
    let accounts = Accounts { tenant, principal: None };
    let base = accounts.behind_principal(app);
    let principal = app.store.account(Who { tenant: &caller.tenant, principal: Some(&caller.principal) }, &base, now).await?;
    Ok(Accounts { principal, ..accounts })
}

impl Accounts {
    pub(super) fn tenant_quotas(&self, app: &App) -> Quotas {
        let defaults = &app.engine.default_quotas().tenant;
        self.tenant.as_ref().map_or_else(|| defaults.clone(), |tenant| tenant.quotas.over(defaults))
    }

    pub(super) fn principal_quotas(&self, app: &App) -> Quotas {
        let base = self.behind_principal(app);
        self.principal.as_ref().map_or_else(|| base.clone(), |principal| principal.quotas.over(&base))
    }

    fn behind_principal(&self, app: &App) -> Quotas {
        let defaults = &app.engine.default_quotas().principal;
        let own = self.tenant.as_ref().and_then(|tenant| tenant.of_tenant.as_ref());
        own.map_or_else(|| defaults.clone(), |own| own.principal_quotas.over(defaults))
    }
}

/// What the caller may have, and what of it is in use
///
/// Of the tenant and of the principal; both hold.
#[utoipa::path(
    get,
    path = "/v1/quota",
    operation_id = "readQuota",
    tag = "account",
    security(("bearer" = [])),
    responses((status = 200, description = "Quotas and use.", body = QuotaView)),
)]
pub(super) async fn quota(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<QuotaView>, ApiError> {
    let accounts = of(&app, &caller).await?;
    let (tenant_quotas, principal_quotas) = (accounts.tenant_quotas(&app), accounts.principal_quotas(&app));
    let used = |account: Option<Account>| account.map(|account| account.used).unwrap_or_default();
    Ok(Json(QuotaView {
        tenant: AccountQuota {
            name: caller.tenant.to_string(),
            quotas: tenant_quotas.in_full(QuotaScope::Tenant),
            used: used(accounts.tenant),
        },
        principal: AccountQuota {
            name: caller.principal,
            quotas: principal_quotas.in_full(QuotaScope::Principal),
            used: used(accounts.principal),
        },
    }))
}

/// What the tenant's sandboxes and runs used
///
/// Counted when they end, exactly.
#[utoipa::path(
    get,
    path = "/v1/usage",
    operation_id = "readUsage",
    tag = "account",
    security(("bearer" = ["sandboxes:read"])),
    params(UsageParameters),
    responses((status = 200, description = "Usage by line and in all.", body = UsageView)),
)]
pub(super) async fn usage(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<UsageView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let pairs = query::pairs(&uri)?;
    if let Some((name, _)) = pairs.iter().find(|(name, _)| name == "tenant") {
        return Err(query::unknown(name));
    }
    usage_of(&app, usage_query(pairs, Some(caller.tenant), app.clock.now())?).await
}

/// Figures of the tenant for Prometheus
///
/// The quotas of tenant and principal with what is in use of each, what ended in the last minute by its reason, and what was used in this month of UTC: those counters begin anew with each
/// month, as counters of a process do with its restart. All is read from the database, so that every node tells the same: scrape one address, not each node.
#[utoipa::path(
    get,
    path = "/v1/metrics",
    operation_id = "readMetrics",
    tag = "account",
    security(("bearer" = ["metrics:read"])),
    responses((status = 200, description = "Every series, in the text format.", body = String, content_type = "text/plain")),
)]
pub(super) async fn metrics(State(app): State<Arc<App>>, caller: Caller) -> Result<Response, ApiError> {
    /// What is recent.
    const RECENTLY: Duration = Duration::MINUTE;
    caller.require(Scope::MetricsRead)?;
    let now = app.clock.now();
    let series = metrics::Account::new()?;
    let accounts = of(&app, &caller).await?;
    let (tenant, principal) = (accounts.tenant_quotas(&app), accounts.principal_quotas(&app));
    let used = |account: Option<Account>| account.map(|account| account.used).unwrap_or_default();
    for (scope, quotas, used) in
        [(QuotaScope::Tenant, tenant, used(accounts.tenant)), (QuotaScope::Principal, principal, used(accounts.principal))]
    {
        let counted = serde_json::to_value(used).map_err(|error| ApiError::Internal(error.into()))?;
        for (quota, count) in counted.as_object().into_iter().flatten() {
            series.quota(scope, quota, count.as_u64().unwrap_or_default(), quotas.number(quota));
        }
    }
    let month = now.to_offset(time::UtcOffset::UTC).replace_day(1).unwrap_or(now).replace_time(time::Time::MIDNIGHT);
    let by = GroupBy { kind: true, ..GroupBy::default() };
    let query = UsageQuery { tenant: Some(caller.tenant.clone()), from: month, to: now + Duration::HOUR, by, limit: USAGE_LINES_MAX };
    for line in app.store.usage(&query).await? {
        series.used(&line);
    }
    for ends in app.store.recent_ends(&caller.tenant, now - RECENTLY).await? {
        series.ended(&ends);
    }
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], series.text()?).into_response())
}

/// What was used, by this query.
pub(super) async fn usage_of(app: &App, query: UsageQuery) -> Result<Json<UsageView>, ApiError> {
    let lines = app.store.usage(&UsageQuery { limit: USAGE_LINES_MAX + 1, ..query.clone() }).await?;
    if lines.len() > usize::try_from(USAGE_LINES_MAX).unwrap_or(usize::MAX) {
        return Err(
            Invalid::new("group_by", format!("that is more than {USAGE_LINES_MAX} lines: ask for less time or fewer groups")).into()
        );
    }
    let total = lines.iter().fold(UsageLine::default(), |total, line| total.plus(line));
    let items = lines.into_iter().map(LineView::from).collect();
    Ok(Json(UsageView { from: query.from, to: query.to, items, total: total.into() }))
}

/// Reads `from`, `to`, `group_by` and `tenant`; the last month by default, in one line.
pub(super) fn usage_query(pairs: Vec<(String, String)>, tenant: Option<TenantId>, now: OffsetDateTime) -> Result<UsageQuery, ApiError> {
    let this_hour = now - Duration::nanoseconds(i64::try_from(now.unix_timestamp_nanos().rem_euclid(3_600_000_000_000)).unwrap_or(0));
    let (mut from, mut to) = (None, this_hour + Duration::HOUR);
    let mut query = UsageQuery { tenant, from: this_hour, to, by: GroupBy::default(), limit: 0 };
    for (name, text) in pairs {
        match name.as_str() {
            "from" => from = Some(hour("from", &text)?),
            "to" => to = hour("to", &text)?,
            "tenant" => query.tenant = Some(TenantId::proven(text)),
            "group_by" => {
                for word in text.split(',') {
                    match word {
                        "hour" if query.by.time.is_none() => query.by.time = Some(TimeUnit::Hour),
                        "day" if query.by.time.is_none() => query.by.time = Some(TimeUnit::Day),
                        "principal" => query.by.principal = true,
                        "kind" => query.by.kind = true,
                        "tenant" => query.by.tenant = true,
                        _ => {
                            return Err(Invalid::new("group_by", "one or more of day or hour, principal, kind, tenant, with commas").into());
                        }
                    }
                }
            }
            _ => return Err(query::unknown(&name)),
        }
    }
    let from = from.unwrap_or(to - Duration::days(30));
    if from >= to {
        return Err(Invalid::new("from", "it is not before `to`").into());
    }
    Ok(UsageQuery { from, to, ..query })
}

/// A whole hour, or a day's first.
fn hour(name: &str, text: &str) -> Result<OffsetDateTime, ApiError> {
    let at = OffsetDateTime::parse(text, &Rfc3339).ok().or_else(|| {
        let format = time::format_description::parse_borrowed::<2>("[year]-[month]-[day]").ok()?;
        Date::parse(text, &format).ok().map(|date| date.midnight().assume_utc())
    });
    at.filter(|at| at.unix_timestamp_nanos().rem_euclid(3_600_000_000_000) == 0)
        .map(|at| at.to_offset(time::UtcOffset::UTC))
        .ok_or_else(|| Invalid::new(name, "a whole hour as in 2030-01-31T15:00:00Z, or a day of UTC as in 2030-01-31").into())
}

pub(super) fn list_limit(text: &str) -> Result<u32, ApiError> {
    let limit =
        query::value::<u64>("limit", text).map_err(|_| Invalid { bound: Some(&LIST_LIMIT), ..Invalid::new("limit", "not a number") })?;
    Ok(u32::try_from(LIST_LIMIT.check(limit)?).unwrap_or(u32::MAX))
}

impl From<UsageLine> for LineView {
    fn from(line: UsageLine) -> Self {
        // Sums are rounded once, here: what is kept is exact.
        let rounded = |us: u64| us.saturating_add(500) / 1000;
        Self {
            tenant: line.tenant,
            principal: line.principal,
            kind: line.kind,
            at: line.at,
            runs: line.runs,
            wall_ms: rounded(line.wall_us),
            cpu_ms: rounded(line.cpu_us),
            memory_byte_seconds: Number::from_u128(line.memory_byte_us / 1_000_000).unwrap_or_else(|| u64::MAX.into()),
            output_bytes: line.output_bytes,
            log_bytes: line.log_bytes,
            network_bytes: line.network_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(query: &str) -> Result<UsageQuery, ApiError> {
        usage_query(query::pairs(&format!("/v1/usage?{query}").parse().unwrap())?, None, OffsetDateTime::UNIX_EPOCH + Duration::minutes(90))
    }

    #[test]
    fn usage_is_of_the_last_month_up_to_this_hour() {
        let query = parsed("group_by=day,principal").unwrap();
        assert_eq!(query.to, OffsetDateTime::UNIX_EPOCH + Duration::hours(2));
        assert_eq!(query.from, query.to - Duration::days(30));
        assert_eq!((query.by.time, query.by.principal, query.by.kind), (Some(TimeUnit::Day), true, false));
    }

    #[test]
    fn only_whole_hours_and_days_are_taken() {
        assert_eq!(parsed("from=1969-12-31&to=1970-01-01T01:00:00%2B01:00").unwrap().to, OffsetDateTime::UNIX_EPOCH);
        for query in ["from=1969-12-31T00:30:00Z", "from=yesterday", "from=1970-01-01T02:00:00Z", "group_by=colour", "tint=1"] {
            assert!(matches!(parsed(query), Err(ApiError::Invalid(_))), "{query}");
        }
    }
}
