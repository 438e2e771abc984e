//! Tables `tenants` and `principals`: who may come, with what quotas, and what they use.

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, types::Json};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{NodeId, Store, StoreError, admission::day_of, events::Act, queue::CHANNEL, unsigned};
use crate::sandbox::{Invalid, Owner, QuotaScope, Quotas, SandboxId, TenantId};

/// Whether somebody with a valid token may do anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Good,
    Suspended,
    /// The tenant was never seen.
    Unknown,
}

/// A tenant, or one of its principals, with what it uses.
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    pub name: String,
    pub created_at: OffsetDateTime,
    pub suspended_at: Option<OffsetDateTime>,
    /// What differs from the defaults.
    pub quotas: Quotas,
    pub used: Used,
    /// A tenant's own.
    pub of_tenant: Option<OfTenant>,
}

/// What a tenant has and a principal has not.
#[derive(Debug, Clone, PartialEq)]
pub struct OfTenant {
    pub weight: u32,
    /// Of each of its principals, where they differ from the defaults.
    pub principal_quotas: Quotas,
}

/// What is used of the quotas that are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = QuotaUse)]
pub struct Used {
    pub sandboxes: u64,
    pub memory_bytes: u64,
    pub cpu_millis: u64,
    pub queued: u64,
    pub runs_per_minute: u64,
    pub runs_per_day: u64,
    pub cpu_seconds_per_day: u64,
    pub log_bytes: u64,
    /// A tenant's alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub image_bytes: Option<u64>,
    /// A tenant's alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub volume_bytes: Option<u64>,
    /// A tenant's alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub volumes: Option<u64>,
    /// A tenant's alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub webhooks: Option<u64>,
    /// A tenant's alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub pools: Option<u64>,
    /// A tenant's alone: what the sizes of its pools come to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64)]
    pub pool_sandboxes: Option<u64>,
}

/// What is to be changed of a tenant or a principal, with the names of quotas checked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    pub weight: Option<u32>,
    #[serde(default)]
    pub quotas: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    pub principal_quotas: serde_json::Map<String, serde_json::Value>,
}

/// Whose account.
#[derive(Debug, Clone, Copy)]
pub struct Who<'a> {
    pub tenant: &'a TenantId,
    /// `None`: the tenant's own.
    pub principal: Option<&'a str>,
}

/// Whether an account may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspension {
    Lifted,
    /// From now on it may not; with `stops`, what runs and waits is ended too.
    Imposed {
        stops: bool,
    },
}

/// One of the two tables has all of it.
struct Row {
    name: String,
    created_at: OffsetDateTime,
    suspended_at: Option<OffsetDateTime>,
    quotas: Json<Quotas>,
    weight: Option<i32>,
    principal_quotas: Option<Json<Quotas>>,
    live: i64,
    live_memory_bytes: i64,
    live_cpu_millis: i64,
    queued: i64,
    bucket_micros: i64,
    bucket_at: Option<OffsetDateTime>,
    day: time::Date,
    day_runs: i64,
    day_cpu_us: i64,
    log_bytes: i64,
    image_bytes: Option<i64>,
    volume_bytes: Option<i64>,
    volumes: Option<i64>,
    webhooks: Option<i64>,
    pools: Option<i64>,
    pool_sandboxes: Option<i64>,
}

impl Row {
    /// `base`: the quotas that stand behind its own.
    fn read(self, base: &Quotas, now: OffsetDateTime) -> Account {
        let is_today = self.day >= day_of(now);
        let today = |number: i64| if is_today { unsigned(number) } else { 0 };
        let quotas = self.quotas.0;
        let rate = quotas.over(base).number("runs_per_minute").unwrap_or(0);
        Account {
            name: self.name,
            created_at: self.created_at,
            suspended_at: self.suspended_at,
            used: Used {
                sandboxes: unsigned(self.live),
                memory_bytes: unsigned(self.live_memory_bytes),
                cpu_millis: unsigned(self.live_cpu_millis),
                queued: unsigned(self.queued),
                runs_per_minute: self.bucket_at.map_or(0, |at| taken(rate, unsigned(self.bucket_micros), now - at)),
                runs_per_day: today(self.day_runs),
                cpu_seconds_per_day: today(self.day_cpu_us) / 1_000_000,
                log_bytes: unsigned(self.log_bytes),
                image_bytes: self.image_bytes.map(unsigned),
                volume_bytes: self.volume_bytes.map(unsigned),
                volumes: self.volumes.map(unsigned),
                webhooks: self.webhooks.map(unsigned),
                pools: self.pools.map(unsigned),
                pool_sandboxes: self.pool_sandboxes.map(unsigned),
            },
            quotas,
            of_tenant: self
                .weight
                .zip(self.principal_quotas)
                .map(|(weight, quotas)| OfTenant { weight: u32::try_from(weight).unwrap_or(1), principal_quotas: quotas.0 }),
        }
    }
}

/// How much is missing in a bucket that had so much so long ago.
fn taken(rate: u64, micros: u64, ago: time::Duration) -> u64 {
    let ago_us = u64::try_from(ago.whole_microseconds()).unwrap_or(0).min(60_000_000);
    let level = (micros + ago_us.saturating_mul(rate) / 60).min(rate.saturating_mul(1_000_000));
    rate - level / 1_000_000
}

impl Store {
    /// Whether this principal may do anything now.
    pub async fn standing(&self, who: &Owner) -> Result<Standing, StoreError> {
        let row = sqlx::query!(
            r#"select tenants.suspended_at is not null or principals.suspended_at is not null as "is_suspended!"
            from tenants left join principals on principals.tenant = tenants.id and principals.name = $2
            where tenants.id = $1"#,
            who.tenant.as_str(),
            who.principal,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(match row {
            None => Standing::Unknown,
            Some(row) if row.is_suspended => Standing::Suspended,
            Some(_) => Standing::Good,
        })
    }

    /// Makes the principal known, and its tenant if it is not yet.
    pub async fn introduce(&self, who: &Owner, now: OffsetDateTime) -> Result<(), StoreError> {
        sqlx::query!(
            "with tenant as (
                insert into tenants (id, created_at) values ($1, $3) on conflict do nothing returning id
            ), told as (
                insert into events (tenant, kind, object, at, data, actor_tenant, actor)
                select id, 'tenant.created', 'tenant/' || id, $3, '{}', $1, $2 from tenant
            )
            insert into principals (tenant, name, created_at) values ($1, $2, $3) on conflict do nothing",
            who.tenant.as_str(),
            who.principal,
            now,
        )
        .execute(&self.pool)
        .await?;
        self.told();
        Ok(())
    }

    /// Makes the principal known to a tenant that is. False: the tenant is not.
    pub async fn introduce_principal(&self, who: Who<'_>, now: OffsetDateTime) -> Result<bool, StoreError> {
        let known = sqlx::query_scalar!(
            r#"with tenant as (
                select id from tenants where id = $1
            ), added as (
                insert into principals (tenant, name, created_at) select id, $2::text, $3 from tenant where $2 is not null on conflict do nothing
            )
            select exists (select 1 from tenant) as "is_known!""#,
            who.tenant.as_str(),
            who.principal as _,
            now,
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(known)
    }

    /// Registers a tenant with weight and quotas as they are wanted: with all of them or not at all. False: it is there already.
    pub async fn create_tenant(&self, id: &TenantId, change: &Change, act: &Act<'_>) -> Result<Result<bool, Invalid>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let done = sqlx::query!("insert into tenants (id, created_at) values ($1, $2) on conflict do nothing", id.as_str(), act.at)
            .execute(&mut *transaction)
            .await?;
        if done.rows_affected() == 0 {
            return Ok(Ok(false));
        }
        super::events::tell(&mut transaction, Some(id), "tenant.created", Some(&format!("tenant/{id}")), act).await?;
        if *change != Change::default()
            && let Some(Err(invalid)) = change_in(&mut transaction, Who { tenant: id, principal: None }, change, act).await?
        {
            return Ok(Err(invalid));
        }
        transaction.commit().await?;
        Ok(Ok(true))
    }

    /// The account as it is now; `base` holds the quotas behind its own.
    pub async fn account(&self, who: Who<'_>, base: &Quotas, now: OffsetDateTime) -> Result<Option<Account>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        Ok(row_of(&mut connection, who).await?.map(|row| row.read(base, now)))
    }

    /// Tenants by id, behind this one.
    pub async fn list_tenants(&self, after: &str, limit: u32, base: &Quotas, now: OffsetDateTime) -> Result<Vec<Account>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            r#"select id as name, created_at, suspended_at, quotas as "quotas: Json<Quotas>", weight as "weight?",
                principal_quotas as "principal_quotas?: Json<Quotas>", live, live_memory_bytes, live_cpu_millis, queued, bucket_micros,
                bucket_at, day, day_runs, day_cpu_us, log_bytes, image_bytes as "image_bytes?",
                (select coalesce(sum(size_bytes), 0)::bigint from volumes where tenant = tenants.id) as "volume_bytes?",
                (select count(*) from volumes where tenant = tenants.id) as "volumes?",
                (select count(*) from webhooks where tenant = tenants.id) as "webhooks?",
                (select count(*) from pools where tenant = tenants.id) as "pools?",
                (select coalesce(sum(size), 0)::bigint from pools where tenant = tenants.id) as "pool_sandboxes?"
            from tenants where id > $1 order by id limit $2"#,
            after,
            i64::from(limit),
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| row.read(base, now)).collect())
    }

    /// The tenant's principals by name, behind this one.
    pub async fn list_principals(
        &self,
        tenant: &TenantId,
        after: &str,
        limit: u32,
        base: &Quotas,
        now: OffsetDateTime,
    ) -> Result<Vec<Account>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            r#"select name, created_at, suspended_at, quotas as "quotas: Json<Quotas>", null::integer as weight,
                null::jsonb as "principal_quotas: Json<Quotas>", live, live_memory_bytes, live_cpu_millis, queued, bucket_micros,
                bucket_at, day, day_runs, day_cpu_us, log_bytes, null::bigint as image_bytes,
                null::bigint as volume_bytes, null::bigint as volumes, null::bigint as webhooks, null::bigint as pools, null::bigint as pool_sandboxes
            from principals where tenant = $1 and name > $2 order by name limit $3"#,
            tenant.as_str(),
            after,
            i64::from(limit),
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| row.read(base, now)).collect())
    }

    /// Changes weight and quotas. `None`: there is no such account.
    pub async fn change_account(&self, who: Who<'_>, change: &Change, act: &Act<'_>) -> Result<Option<Result<(), Invalid>>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let changed = change_in(&mut transaction, who, change, act).await?;
        if let Some(Ok(())) = changed {
            transaction.commit().await?;
        }
        Ok(changed)
    }

    /// Suspends the account or lets it go on, and wakes the nodes. False: there is no such account.
    pub async fn suspend(&self, who: Who<'_>, suspension: Suspension, act: &Act<'_>) -> Result<bool, StoreError> {
        let (at, stops, verb) = match suspension {
            Suspension::Lifted => (None, false, "resumed"),
            Suspension::Imposed { stops } => (Some(act.at), stops, "suspended"),
        };
        let mut transaction = self.pool.begin().await?;
        let found = match who.principal {
            None => {
                sqlx::query!(
                    "update tenants set suspended_at = case when $2::timestamptz is null then null else coalesce(suspended_at, $2) end, stops = $3
                    where id = $1",
                    who.tenant.as_str(),
                    at as _,
                    stops,
                )
                .execute(&mut *transaction)
                .await?
            }
            Some(name) => {
                sqlx::query!(
                    "update principals set suspended_at = case when $3::timestamptz is null then null else coalesce(suspended_at, $3) end, stops = $4
                    where tenant = $1 and name = $2",
                    who.tenant.as_str(),
                    name,
                    at as _,
                    stops,
                )
                .execute(&mut *transaction)
                .await?
            }
        };
        if found.rows_affected() == 0 {
            return Ok(false);
        }
        super::events::tell(&mut transaction, Some(who.tenant), who.event(verb), Some(&who.object()), act).await?;
        sqlx::query!("select pg_notify($1, '')", CHANNEL).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// What this node runs, and what waits anywhere, of those whose suspension is to end it.
    pub async fn to_be_stopped(&self, node: NodeId) -> Result<Vec<(SandboxId, TenantId)>, StoreError> {
        let rows = sqlx::query!(
            "with stopped as (
                select id as tenant, null as principal from tenants where stops
                union all
                select tenant, name from principals where stops
            )
            select sandboxes.id, sandboxes.tenant
            from stopped join sandboxes on sandboxes.tenant = stopped.tenant
                and sandboxes.principal = coalesce(stopped.principal, sandboxes.principal)
            where state = 'queued' or (state in ('starting', 'running', 'paused') and node = $1 and kind <> 'pooled')",
            node.0,
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (SandboxId(row.id), TenantId::proven(row.tenant))).collect())
    }

    /// Takes out principals that nobody would miss: nothing differs for them and nothing of theirs is counted. Answers how many.
    pub async fn forget_principals(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from principals using (
                select tenant, name from principals
                where day < $1 and created_at < $2 and quotas = '{}' and suspended_at is null and live = 0 and log_bytes = 0
                order by tenant, name limit $3
                for update skip locked
            ) as idle
            where principals.tenant = idle.tenant and principals.name = idle.name",
            day_of(now),
            now - time::Duration::DAY,
            i64::from(limit),
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }
}

impl Who<'_> {
    fn object(&self) -> String {
        match self.principal {
            None => format!("tenant/{}", self.tenant),
            Some(name) => format!("principal/{name}"),
        }
    }

    const fn event(&self, verb: &'static str) -> &'static str {
        match (self.principal.is_none(), verb.as_bytes()) {
            (true, b"changed") => "tenant.changed",
            (true, b"suspended") => "tenant.suspended",
            (true, _) => "tenant.resumed",
            (false, b"changed") => "principal.changed",
            (false, b"suspended") => "principal.suspended",
            (false, _) => "principal.resumed",
        }
    }
}

/// Changes weight and quotas as a part of a transaction. `None`: there is no such account.
async fn change_in(
    connection: &mut PgConnection,
    who: Who<'_>,
    change: &Change,
    act: &Act<'_>,
) -> Result<Option<Result<(), Invalid>>, StoreError> {
    sqlx::query!("select id from tenants where id = $1 for no key update", who.tenant.as_str()).fetch_optional(&mut *connection).await?;
    let Some(row) = row_of(connection, who).await? else { return Ok(None) };
    let scope = if who.principal.is_none() { QuotaScope::Tenant } else { QuotaScope::Principal };
    let (mut quotas, mut principal_quotas) = (row.quotas.0, row.principal_quotas.map(|quotas| quotas.0).unwrap_or_default());
    if let Err(invalid) = quotas.change("quotas", scope, change.quotas.clone()) {
        return Ok(Some(Err(invalid)));
    }
    if let Err(invalid) = principal_quotas.change("principal_quotas", QuotaScope::Principal, change.principal_quotas.clone()) {
        return Ok(Some(Err(invalid)));
    }
    match who.principal {
        None => {
            let weight = change.weight.and_then(|weight| i32::try_from(weight).ok());
            sqlx::query!(
                "update tenants set quotas = $2, principal_quotas = $3, weight = coalesce($4, weight) where id = $1",
                who.tenant.as_str(),
                Json(&quotas) as _,
                Json(&principal_quotas) as _,
                weight,
            )
            .execute(&mut *connection)
            .await?;
        }
        Some(name) => {
            sqlx::query!(
                "update principals set quotas = $3 where tenant = $1 and name = $2",
                who.tenant.as_str(),
                name,
                Json(&quotas) as _,
            )
            .execute(&mut *connection)
            .await?;
        }
    }
    super::events::tell(connection, Some(who.tenant), who.event("changed"), Some(&who.object()), act).await?;
    Ok(Some(Ok(())))
}

async fn row_of(connection: &mut PgConnection, who: Who<'_>) -> Result<Option<Row>, StoreError> {
    Ok(match who.principal {
        None => {
            sqlx::query_as!(
                Row,
                r#"select id as name, created_at, suspended_at, quotas as "quotas: Json<Quotas>", weight as "weight?",
                    principal_quotas as "principal_quotas?: Json<Quotas>", live, live_memory_bytes, live_cpu_millis, queued, bucket_micros,
                    bucket_at, day, day_runs, day_cpu_us, log_bytes, image_bytes as "image_bytes?",
                (select coalesce(sum(size_bytes), 0)::bigint from volumes where tenant = tenants.id) as "volume_bytes?",
                (select count(*) from volumes where tenant = tenants.id) as "volumes?",
                (select count(*) from webhooks where tenant = tenants.id) as "webhooks?",
                (select count(*) from pools where tenant = tenants.id) as "pools?",
                (select coalesce(sum(size), 0)::bigint from pools where tenant = tenants.id) as "pool_sandboxes?"
                from tenants where id = $1"#,
                who.tenant.as_str(),
            )
            .fetch_optional(connection)
            .await?
        }
        Some(name) => {
            sqlx::query_as!(
                Row,
                r#"select name, created_at, suspended_at, quotas as "quotas: Json<Quotas>", null::integer as weight,
                    null::jsonb as "principal_quotas: Json<Quotas>", live, live_memory_bytes, live_cpu_millis, queued, bucket_micros,
                    bucket_at, day, day_runs, day_cpu_us, log_bytes, null::bigint as image_bytes,
                null::bigint as volume_bytes, null::bigint as volumes, null::bigint as webhooks, null::bigint as pools, null::bigint as pool_sandboxes
                from principals where tenant = $1 and name = $2"#,
                who.tenant.as_str(),
                name,
            )
            .fetch_optional(connection)
            .await?
        }
    })
}
