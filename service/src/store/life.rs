//! Table `sandboxes` between start and end: pauses, changes, removal after the end, and names. Each step with its event.

use serde_json::Value;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::{
    HeldKey, Hold, Lease, NodeId, Store, StoreError,
    admission::day_of,
    bigint, damaged,
    events::Act,
    pool::Transaction,
    sandboxes::{Whereabouts, readable, select_sandboxes},
    unsigned,
};
use crate::sandbox::{DefaultQuotas, Exceeded, QuotaScope, Sandbox, SandboxId, TenantId};

/// A change of a sandbox in the middle of its transaction: its row is locked until this is committed, or dropped.
pub struct Changing {
    transaction: Transaction,
    /// As it was.
    pub sandbox: Sandbox,
    pub whereabouts: Whereabouts,
}

impl std::fmt::Debug for Changing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changing").field("sandbox", &self.sandbox.id).finish_non_exhaustive()
    }
}

impl Store {
    /// The tenant's sandbox or run of this name.
    pub async fn find_named(&self, tenant: &TenantId, name: &str) -> Result<Option<SandboxId>, StoreError> {
        let id = sqlx::query_scalar!("select id from sandboxes where tenant = $1 and name = $2", tenant.as_str(), name)
            .fetch_optional(&self.pool)
            .await?;
        Ok(id.map(SandboxId))
    }

    /// Notes that a sandbox which runs stands still, or, paused, goes on. `started` is what may not have been noted yet: when it was started and by
    /// which fences. False if it is not so, or not the holder's to say.
    pub async fn mark_paused(
        &self,
        id: SandboxId,
        hold: Hold,
        is_paused: bool,
        started: (OffsetDateTime, sandbox_core::fence::Fences),
        act: &Act<'_>,
    ) -> Result<bool, StoreError> {
        let (actor_tenant, actor) = act.names();
        let count = sqlx::query_scalar!(
            r#"with moved as (
                update sandboxes
                set state = case when $5 then 'paused' else 'running' end, started_at = coalesce(started_at, $6), fences = coalesce(fences, $7)
                where id = $1 and node = $2 and epoch = $3 and claims = $4
                    and case when $5 then state in ('starting', 'running') else state = 'paused' end
                returning id, tenant, labels
            ), told as (
                insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor)
                select tenant, id, case when $5 then 'sandbox.paused' else 'sandbox.resumed' end, $8, jsonb_build_object('labels', labels), $9, $10
                from moved
            )
            select count(*) as "count!" from moved"#,
            id.0,
            hold.lease.node.0,
            bigint(hold.lease.epoch),
            bigint(hold.claims),
            is_paused,
            started.0,
            started.1.bits().cast_signed(),
            act.at,
            actor_tenant as _,
            actor as _,
        )
        .fetch_one(&self.pool)
        .await?;
        self.told();
        Ok(count == 1)
    }

    /// Begins to change the tenant's long-lived sandbox; `None` if there is none.
    pub async fn begin_change(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Changing>, StoreError> {
        self.pool.in_time(self.begin_change_at_last(tenant, id)).await
    }

    async fn begin_change_at_last(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Changing>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let row = select_sandboxes!("id = $1 and tenant = $2 and kind = 'sandbox' for no key update", id.0, tenant.as_str())
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(row) = row else {
            transaction.rollback().await?;
            return Ok(None);
        };
        let sandbox = row.read()?;
        let place = sqlx::query!("select node, epoch, claims from sandboxes where id = $1", id.0).fetch_one(&mut *transaction).await?;
        let lease = place.node.map(|node| Lease { node: NodeId(node), epoch: unsigned(place.epoch) });
        let hold = lease.map(|lease| Hold { lease, claims: unsigned(place.claims) });
        let whereabouts = Whereabouts { state: sandbox.state, hold };
        Ok(Some(Changing { transaction, sandbox, whereabouts }))
    }

    /// What has ended on this node with a layer that may still be kept there, and when.
    pub async fn with_kept_layers(&self, node: NodeId) -> Result<Vec<(Sandbox, OffsetDateTime)>, StoreError> {
        let rows = select_sandboxes!("keep_layer and node = $1 and state in ('exited', 'failed')", node.0).fetch_all(&self.pool).await?;
        let ended = readable(rows).into_iter().filter_map(|sandbox| sandbox.finished_at.map(|at| (sandbox, at)));
        Ok(ended.collect())
    }

    /// Of these layers, which this node's keeper has, those that nobody will ask for here: their sandboxes are gone, belong to another node by now, or have ended with nothing kept.
    pub async fn unwanted_layers(&self, node: NodeId, ids: &[SandboxId]) -> Result<Vec<SandboxId>, StoreError> {
        let ids: Vec<uuid::Uuid> = ids.iter().map(|id| id.0).collect();
        let unwanted = sqlx::query_scalar!(
            r#"select id as "id!" from unnest($2::uuid[]) as asked (id)
            where not exists (
                select 1 from sandboxes
                -- without a node it waits, and may come here
                where sandboxes.id = asked.id and (node = $1 or node is null) and (keep_layer or state not in ('exited', 'failed'))
            )"#,
            node.0,
            &ids,
        );
        Ok(unwanted.fetch_all(&self.pool).await?.into_iter().map(SandboxId).collect())
    }

    /// Notes that these layers are kept no more.
    pub async fn give_up_layers(&self, ids: &[SandboxId]) -> Result<(), StoreError> {
        let ids: Vec<uuid::Uuid> = ids.iter().map(|id| id.0).collect();
        sqlx::query!("update sandboxes set keep_layer = false where id = any($1) and state in ('exited', 'failed')", &ids)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Of nodes that were not heard of since this time: what has ended there before it, and the layers of which nobody will ever ask for.
    pub async fn layers_of_gone_nodes(&self, before: OffsetDateTime) -> Result<Vec<SandboxId>, StoreError> {
        let ids = sqlx::query_scalar!(
            "select sandboxes.id from sandboxes left join nodes on nodes.id = sandboxes.node
            where keep_layer and finished_at < $1 and (node is null or lease_until < $1)
            limit 500",
            before,
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Ended sandboxes that were to be removed then, and that were not in time: they ended before this.
    pub async fn to_be_removed(&self, before: OffsetDateTime, limit: u32) -> Result<Vec<(TenantId, SandboxId)>, StoreError> {
        let rows = sqlx::query!(
            "select id, tenant from sandboxes where auto_remove and state in ('exited', 'failed') and finished_at < $1 limit $2",
            before,
            i64::from(limit),
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (TenantId::proven(row.tenant), SandboxId(row.id))).collect())
    }
}

/// What became of a new start.
#[derive(Debug, Clone, PartialEq)]
pub enum StartedAgain {
    /// With its tenant's weight.
    Yes {
        weight: u32,
    },
    /// Others wait for room, or the node may take nothing more.
    Behind,
    Suspended,
    Exceeded(Box<Exceeded>),
}

impl Changing {
    /// Begins another life of one that has ended, claimed by the holder of this lease: everything is counted against the quotas as for a new one. What is
    /// refused leaves the transaction without effect.
    pub async fn start(&mut self, lease: Lease, defaults: &DefaultQuotas, act: &Act<'_>) -> Result<StartedAgain, StoreError> {
        let before = &self.sandbox;
        let (actor_tenant, actor) = act.names();
        let expires_at = before.ttl_ms.map(|ms| act.at + std::time::Duration::from_millis(ms));
        let row = sqlx::query!(
            r#"with tenant as (
                select * from tenants where id = $2 for no key update
            ), principal as (
                -- after the tenant, always
                select * from principals where tenant = $2 and name = $3 and exists (select 1 from tenant) for no key update
            ), scope as (
                select 1 as turn, 'tenant' as name, suspended_at, live, live_memory_bytes, live_cpu_millis, log_bytes, bucket_micros, bucket_at, day,
                    day_runs, day_cpu_us, jsonb_strip_nulls($4::jsonb || quotas) as quotas
                from tenant
                union all
                select 2, 'principal', p.suspended_at, p.live, p.live_memory_bytes, p.live_cpu_millis, p.log_bytes, p.bucket_micros, p.bucket_at,
                    p.day, p.day_runs, p.day_cpu_us, jsonb_strip_nulls($5::jsonb || t.principal_quotas || p.quotas)
                from principal p, tenant t
            ), used as (
                select s.turn, s.name, s.suspended_at, s.live, s.live_memory_bytes, s.live_cpu_millis, s.log_bytes,
                    greatest(s.day, $6::date) as day,
                    case when s.day >= $6::date then s.day_runs else 0 end as day_runs,
                    case when s.day >= $6::date then s.day_cpu_us else 0 end as day_cpu_us,
                    extract(epoch from (greatest(s.day, $6::date) + 1)::timestamp at time zone 'UTC' - $7::timestamptz)::bigint + 1 as day_left_s,
                    -- as for a new one
                    case when s.bucket_at is null then q.runs_per_minute * 1000000 else least(q.runs_per_minute * 1000000,
                        s.bucket_micros + (extract(epoch from least(greatest($7::timestamptz - s.bucket_at, '0 s'), '60 s')) * 1000000)::bigint
                            * q.runs_per_minute / 60) end as bucket_micros,
                    greatest(s.bucket_at, $7::timestamptz) as bucket_at,
                    q.sandboxes, q.memory_bytes, q.cpu_millis, q.log_bytes as log_bytes_max, q.runs_per_minute, q.runs_per_day, q.cpu_seconds_per_day
                from scope s, jsonb_to_record(s.quotas) as q(
                    sandboxes bigint, memory_bytes bigint, cpu_millis bigint, log_bytes bigint, runs_per_minute bigint, runs_per_day bigint,
                    cpu_seconds_per_day bigint
                )
            ), exceeded as (
                select u.turn, c.turn as quota_turn, u.name as scope, c.quota, to_jsonb(c.allowed) as allowed, to_jsonb(c.used) as used,
                    c.retry_after_s
                from used u, lateral (values
                    (11, 'sandboxes', u.live + 1 > u.sandboxes, u.sandboxes, u.live, 1),
                    (12, 'memory_bytes', u.live_memory_bytes + $8 > u.memory_bytes, u.memory_bytes, u.live_memory_bytes, 1),
                    (13, 'cpu_millis', u.live_cpu_millis + $9 > u.cpu_millis, u.cpu_millis, u.live_cpu_millis, 1),
                    (15, 'log_bytes', u.log_bytes >= u.log_bytes_max, u.log_bytes_max, u.log_bytes, 60),
                    (16, 'runs_per_day', u.day_runs + 1 > u.runs_per_day, u.runs_per_day, u.day_runs, u.day_left_s),
                    (17, 'cpu_seconds_per_day', u.day_cpu_us >= u.cpu_seconds_per_day * 1000000, u.cpu_seconds_per_day,
                        u.day_cpu_us / 1000000, u.day_left_s),
                    (18, 'runs_per_minute', u.bucket_micros < 1000000, u.runs_per_minute,
                        u.runs_per_minute - u.bucket_micros / 1000000,
                        case when u.runs_per_minute > 0 then ((1000000 - u.bucket_micros) * 60 / u.runs_per_minute + 999999) / 1000000 end)
                ) as c(turn, quota, is_exceeded, allowed, used, retry_after_s)
                where c.is_exceeded
            ), first as (
                select * from exceeded order by quota_turn, turn limit 1
            ), was as (
                select id, log_bytes from sandboxes where id = $1
            ), started as (
                update sandboxes
                set state = 'starting', node = $10, epoch = $11, claims = claims + 1, starts = starts + 1, claimed_at = $7, started_at = null,
                    finished_at = null, expires_at = $12, outcome = null, reason = null, fences = null, log_tail = null, stdout_omitted_bytes = 0,
                    stderr_omitted_bytes = 0, has_log_file = false, log_expires_at = null, log_bytes = 0, keeps_input = false
                from was
                where sandboxes.id = was.id and state in ('exited', 'failed')
                    and not exists (select 1 from used where suspended_at is not null)
                    and not exists (select 1 from first)
                    and not exists (select 1 from tenants where queued > 0 and suspended_at is null)
                    and exists (select 1 from nodes where id = $10 and epoch = $11 and drained_at is null)
                returning sandboxes.id, labels, starts, was.log_bytes as had
            ), tenant_counted as (
                update tenants
                set live = tenants.live + 1, live_memory_bytes = tenants.live_memory_bytes + $8,
                    live_cpu_millis = tenants.live_cpu_millis + $9, log_bytes = tenants.log_bytes - started.had,
                    bucket_micros = coalesce(used.bucket_micros - 1000000, 0),
                    bucket_at = case when used.bucket_micros is not null then used.bucket_at end,
                    day = used.day, day_runs = used.day_runs + 1, day_cpu_us = used.day_cpu_us
                from started, used
                where tenants.id = $2 and used.turn = 1
            ), principal_counted as (
                update principals
                set live = principals.live + 1, live_memory_bytes = principals.live_memory_bytes + $8,
                    live_cpu_millis = principals.live_cpu_millis + $9, log_bytes = principals.log_bytes - started.had,
                    bucket_micros = coalesce(used.bucket_micros - 1000000, 0),
                    bucket_at = case when used.bucket_micros is not null then used.bucket_at end,
                    day = used.day, day_runs = used.day_runs + 1, day_cpu_us = used.day_cpu_us
                from started, used
                where principals.tenant = $2 and principals.name = $3 and used.turn = 2
            ), told as (
                insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor)
                select $2, id, 'sandbox.started', $7, jsonb_build_object('starts', starts, 'labels', labels), $13, $14 from started
            )
            select
                case
                    when exists (select 1 from started) then 'started'
                    when exists (select 1 from used where suspended_at is not null) then 'suspended'
                    when exists (select 1 from first) then 'exceeded'
                    else 'behind'
                end as "verdict!",
                (select weight from tenant) as weight, first.scope, first.quota, first.allowed, first.used, first.retry_after_s
            from (select 1) as one left join first on true"#,
            before.id.0,
            before.tenant.as_str(),
            before.principal,
            Json(&defaults.tenant) as _,
            Json(&defaults.principal) as _,
            day_of(act.at),
            act.at,
            bigint(before.limits.memory_bytes()),
            bigint(before.limits.cpu_millis()),
            lease.node.0,
            bigint(lease.epoch),
            expires_at as _,
            actor_tenant as _,
            actor as _,
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        Ok(match row.verdict.as_str() {
            "started" => StartedAgain::Yes { weight: row.weight.and_then(|weight| u32::try_from(weight).ok()).unwrap_or(1) },
            "suspended" => StartedAgain::Suspended,
            "exceeded" => StartedAgain::Exceeded(Box::new(Exceeded {
                scope: if row.scope.as_deref() == Some("tenant") { QuotaScope::Tenant } else { QuotaScope::Principal },
                quota: row.quota.ok_or_else(|| damaged("no name of a quota"))?,
                limit: row.allowed.unwrap_or_default(),
                used: row.used.unwrap_or_default(),
                retry_after_s: row.retry_after_s.map(unsigned),
            })),
            _ => StartedAgain::Behind,
        })
    }

    /// Ties it to the key of the request that starts it: no second attempt at that starts it again. False: the attempt does not hold the key any more.
    pub async fn tie(&mut self, attempt: &HeldKey) -> Result<bool, StoreError> {
        let HeldKey { name, holder } = attempt;
        let tied = sqlx::query!(
            "update idempotency_keys set sandbox = $5
            where tenant = $1 and principal = $2 and key = $3 and holder = $4 and sandbox is null",
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            holder,
            self.sandbox.id.0,
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(tied.rows_affected() == 1)
    }

    /// What it is by now.
    pub async fn reread(&mut self) -> Result<Sandbox, StoreError> {
        select_sandboxes!("id = $1", self.sandbox.id.0).fetch_one(&mut *self.transaction).await?.read()
    }

    /// Writes what can be changed of `next`, if no quota is in the way. `asked` holds what was asked of fields that a quota can bound. A change that is
    /// refused leaves the transaction without effect.
    pub async fn write(
        &mut self,
        next: &Sandbox,
        asked: &Value,
        defaults: &DefaultQuotas,
        act: &Act<'_>,
    ) -> Result<Result<(), Box<Exceeded>>, StoreError> {
        let before = &self.sandbox;
        let is_live = !before.state.is_final();
        let grown = |now: u64, was: u64| if is_live { bigint(now) - bigint(was) } else { 0 };
        let (actor_tenant, actor) = act.names();
        let row = sqlx::query!(
            r#"with tenant as (
                select * from tenants where id = $2 for no key update
            ), principal as (
                -- after the tenant, always
                select * from principals where tenant = $2 and name = $3 and exists (select 1 from tenant) for no key update
            ), scope as (
                select 1 as turn, 'tenant' as name, live_memory_bytes, live_cpu_millis, jsonb_strip_nulls($4::jsonb || quotas) as quotas from tenant
                union all
                select 2, 'principal', p.live_memory_bytes, p.live_cpu_millis, jsonb_strip_nulls($5::jsonb || t.principal_quotas || p.quotas)
                from principal p, tenant t
            ), exceeded as (
                select s.turn, 1 as quota_turn, s.name as scope, q.key as quota, q.value as allowed, $6::jsonb -> substr(q.key, 9) as used,
                    null::bigint as retry_after_s
                from scope s, jsonb_each(s.quotas) as q
                where starts_with(q.key, 'largest_') and $6::jsonb ? substr(q.key, 9)
                    and coalesce(($6::jsonb ->> substr(q.key, 9))::numeric > (q.value #>> '{}')::numeric, true)
                union all
                select s.turn, c.turn, s.name, c.quota, to_jsonb(c.allowed), to_jsonb(c.used), 1
                from scope s, jsonb_to_record(s.quotas) as q(memory_bytes bigint, cpu_millis bigint), lateral (values
                    (12, 'memory_bytes', $7::bigint > 0 and s.live_memory_bytes + $7 > q.memory_bytes, q.memory_bytes, s.live_memory_bytes),
                    (13, 'cpu_millis', $8::bigint > 0 and s.live_cpu_millis + $8 > q.cpu_millis, q.cpu_millis, s.live_cpu_millis)
                ) as c(turn, quota, is_exceeded, allowed, used)
                where c.is_exceeded
            ), first as (
                select * from exceeded order by quota_turn, turn limit 1
            ), written as (
                update sandboxes
                set name = $9, labels = $10, limits = $11, memory_bytes = $12, cpu_millis = $13, ttl_ms = $14, expires_at = $15,
                    idle_timeout_ms = $16
                where id = $1 and not exists (select 1 from first)
                returning id
            ), tenant_counted as (
                update tenants set live_memory_bytes = tenants.live_memory_bytes + $7, live_cpu_millis = tenants.live_cpu_millis + $8
                from written
                where tenants.id = $2 and ($7 <> 0 or $8 <> 0)
            ), principal_counted as (
                update principals set live_memory_bytes = principals.live_memory_bytes + $7, live_cpu_millis = principals.live_cpu_millis + $8
                from written
                where principals.tenant = $2 and principals.name = $3 and ($7 <> 0 or $8 <> 0)
            ), told as (
                insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor)
                select $2, id, 'sandbox.updated', $17, $18, $19, $20 from written
            )
            select (select count(*) from written) as "count!", first.scope, first.quota, first.allowed, first.used, first.retry_after_s
            from (select 1) as one left join first on true"#,
            before.id.0,
            before.tenant.as_str(),
            before.principal,
            Json(&defaults.tenant) as _,
            Json(&defaults.principal) as _,
            asked,
            grown(next.limits.memory_bytes(), before.limits.memory_bytes()),
            grown(next.limits.cpu_millis(), before.limits.cpu_millis()),
            next.name.as_deref() as _,
            Json(&next.labels) as _,
            Json(&next.limits) as _,
            bigint(next.limits.memory_bytes()),
            bigint(next.limits.cpu_millis()),
            next.ttl_ms.map(bigint) as _,
            next.expires_at as _,
            next.idle_timeout_ms.map(bigint) as _,
            act.at,
            act.data,
            actor_tenant as _,
            actor as _,
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        if row.count == 1 {
            return Ok(Ok(()));
        }
        Ok(Err(Box::new(Exceeded {
            scope: if row.scope.as_deref() == Some("tenant") { QuotaScope::Tenant } else { QuotaScope::Principal },
            quota: row.quota.ok_or_else(|| damaged("no name of a quota"))?,
            limit: row.allowed.unwrap_or_default(),
            used: row.used.unwrap_or_default(),
            retry_after_s: row.retry_after_s.map(unsigned),
        })))
    }

    /// Makes what was written lasting.
    pub async fn commit(self) -> Result<(), StoreError> {
        Ok(self.transaction.commit().await?)
    }

    /// Takes back what was written.
    pub async fn rollback(self) -> Result<(), StoreError> {
        Ok(self.transaction.rollback().await?)
    }
}

#[cfg(test)]
mod tests;
