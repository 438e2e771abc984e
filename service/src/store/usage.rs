//! Tables `usage` and `usage_hours`: what was used. A line stands for itself until it is folded into its hour; the sum of both is exact.

use time::OffsetDateTime;

use super::{Store, StoreError, damaged, unsigned};
use crate::sandbox::TenantId;

/// Which usage, and how it is told apart.
#[derive(Debug, Clone)]
pub struct UsageQuery {
    /// `None`: all tenants'.
    pub tenant: Option<TenantId>,
    /// Whole hours: of what ended at or after the one and before the other.
    pub from: OffsetDateTime,
    pub to: OffsetDateTime,
    pub by: GroupBy,
    pub limit: u32,
}

/// What lines are told apart by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupBy {
    pub tenant: bool,
    pub principal: bool,
    pub kind: bool,
    pub time: Option<TimeUnit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeUnit {
    Hour,
    Day,
}

/// What some sandboxes used together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsageLine {
    pub tenant: Option<String>,
    pub principal: Option<String>,
    pub kind: Option<String>,
    /// Beginning of the hour or day.
    pub at: Option<OffsetDateTime>,
    pub runs: u64,
    pub wall_us: u64,
    pub cpu_us: u64,
    pub memory_byte_us: u128,
    pub output_bytes: u64,
    pub log_bytes: u64,
    pub network_bytes: u64,
}

impl Store {
    /// What was used, by time, tenant, principal and kind; never more lines than the limit.
    pub async fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageLine>, StoreError> {
        let UsageQuery { tenant, from, to, by, limit } = query;
        let rows = sqlx::query!(
            r#"select case when $4 then tenant end as tenant, case when $5 then principal end as principal, case when $6 then kind end as kind,
                case when $7::text is not null then date_trunc($7, hour, 'UTC') end as at,
                sum(runs)::bigint as "runs!", sum(wall_us)::bigint as "wall_us!", sum(cpu_us)::bigint as "cpu_us!",
                sum(memory_byte_us)::text as "memory_byte_us!", sum(output_bytes)::bigint as "output_bytes!",
                sum(log_bytes)::bigint as "log_bytes!", sum(network_bytes)::bigint as "network_bytes!"
            from (
                select tenant, hour, principal, kind, runs, wall_us, cpu_us, memory_byte_us, output_bytes, log_bytes, network_bytes
                from usage_hours
                where ($1::text is null or tenant = $1) and hour >= $2 and hour < $3
                union all
                select tenant, date_trunc('hour', ended_at, 'UTC'), principal, kind, 1, wall_us, cpu_us,
                    memory_limit_bytes::numeric * wall_us, output_bytes, log_bytes, network_bytes
                from usage
                where ($1::text is null or tenant = $1) and ended_at >= $2 and ended_at < $3
            ) as used
            group by 1, 2, 3, 4
            order by 4, 1, 2, 3
            limit $8"#,
            tenant.as_ref().map(TenantId::as_str) as _,
            from,
            to,
            by.tenant,
            by.principal,
            by.kind,
            by.time.map(TimeUnit::as_str) as _,
            i64::from(*limit),
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(UsageLine {
                    tenant: row.tenant,
                    principal: row.principal,
                    kind: row.kind,
                    at: row.at,
                    runs: unsigned(row.runs),
                    wall_us: unsigned(row.wall_us),
                    cpu_us: unsigned(row.cpu_us),
                    memory_byte_us: row.memory_byte_us.parse().map_err(|_| damaged("a sum that is no number"))?,
                    output_bytes: unsigned(row.output_bytes),
                    log_bytes: unsigned(row.log_bytes),
                    network_bytes: unsigned(row.network_bytes),
                })
            })
            .collect()
    }

    /// Folds lines of what ended before this time into their hours. Answers how many.
    pub async fn roll_up_usage(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        if !super::keeps_house(&mut transaction).await? {
            transaction.rollback().await?;
            return Ok(0);
        }
        let count = sqlx::query_scalar!(
            r#"with moved as (
                delete from usage using (select sandbox from usage where ended_at < $1 order by ended_at limit $2) as old
                where usage.sandbox = old.sandbox
                returning usage.*
            ), folded as (
                insert into usage_hours (
                    tenant, hour, principal, kind, runs, wall_us, cpu_us, memory_byte_us, output_bytes, log_bytes, network_bytes
                )
                select tenant, date_trunc('hour', ended_at, 'UTC'), principal, kind, count(*), sum(wall_us), sum(cpu_us),
                    sum(memory_limit_bytes::numeric * wall_us), sum(output_bytes), sum(log_bytes), sum(network_bytes)
                from moved
                group by 1, 2, 3, 4
                on conflict (tenant, hour, principal, kind) do update
                set runs = usage_hours.runs + excluded.runs, wall_us = usage_hours.wall_us + excluded.wall_us,
                    cpu_us = usage_hours.cpu_us + excluded.cpu_us, memory_byte_us = usage_hours.memory_byte_us + excluded.memory_byte_us,
                    output_bytes = usage_hours.output_bytes + excluded.output_bytes, log_bytes = usage_hours.log_bytes + excluded.log_bytes,
                    network_bytes = usage_hours.network_bytes + excluded.network_bytes
            )
            select count(*) as "count!" from moved"#,
            before,
            i64::from(limit),
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(unsigned(count))
    }
}

/// How many of one kind ended for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentEnds {
    pub kind: String,
    pub reason: String,
    pub count: u64,
}

impl Store {
    /// What of the tenant's ended since then, by kind and reason; of very much the newest.
    pub async fn recent_ends(&self, tenant: &TenantId, since: OffsetDateTime) -> Result<Vec<RecentEnds>, StoreError> {
        let rows = sqlx::query!(
            r#"select sandboxes.kind, sandboxes.reason as "reason!", count(*) as "count!"
            from (select sandbox from usage where tenant = $1 and ended_at >= $2 order by ended_at desc limit 10000) as ended
            join sandboxes on sandboxes.id = ended.sandbox
            where sandboxes.reason is not null
            group by 1, 2
            order by 1, 2"#,
            tenant.as_str(),
            since,
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| RecentEnds { kind: row.kind, reason: row.reason, count: unsigned(row.count) }).collect())
    }
}

impl TimeUnit {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }
}

impl UsageLine {
    /// Both together, told apart by nothing.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            runs: self.runs + other.runs,
            wall_us: self.wall_us + other.wall_us,
            cpu_us: self.cpu_us + other.cpu_us,
            memory_byte_us: self.memory_byte_us + other.memory_byte_us,
            output_bytes: self.output_bytes + other.output_bytes,
            log_bytes: self.log_bytes + other.log_bytes,
            network_bytes: self.network_bytes + other.network_bytes,
            ..Self::default()
        }
    }
}
