//! The way in: one statement that locks the tenant, holds the request against every quota, inserts the sandbox and counts it.

use std::collections::BTreeSet;

use serde_json::Value;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    HeldKey, Input, Lease, NodeId, Store, StoreError, bigint, cases::Columns, damaged, queue::CHANNEL, sandboxes::policy_name, unsigned,
};
use crate::sandbox::{DefaultQuotas, Exceeded, NewCase, QuotaScope, Quotas, Sandbox, SandboxId, State};

/// A sandbox that somebody wants, in the state that it is to have: claimed by this node, or queued.
#[derive(Debug, Clone, Copy)]
pub struct Admission<'a> {
    pub sandbox: &'a Sandbox,
    /// Who claims it; it counts only where it does not wait.
    pub lease: Lease,
    /// What it is to be given; kept where it waits, may be tried again, or is compiled first.
    pub input: &'a Input,
    /// Kept until the end, whatever becomes of it.
    pub cases: &'a [NewCase],
    /// What was asked of each field that a quota can bound.
    pub asked: &'a Value,
    pub network: &'a str,
    pub isolation: &'a str,
    pub defaults: &'a DefaultQuotas,
    /// How many may wait in all.
    pub queue_max: u64,
    /// The node of its volumes, which alone can run it.
    pub wanted_node: Option<NodeId>,
    /// Where its request may be sent again: the key, which must be held.
    pub key: Option<&'a HeldKey>,
    pub promise: Promise,
}

/// When somebody is told of what was admitted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Promise {
    #[default]
    Now,
    /// Nobody before its end is stored, or [`Store::keep`] has said that it is kept: it is committed without waiting for the disk, and a crash of Postgres until then may lose it.
    Later,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Admitted {
    /// With its tenant's weight.
    Yes {
        weight: u32,
    },
    /// Others wait: it is to wait too.
    Behind,
    /// As many wait as may.
    QueueFull,
    /// Its reference names another image by now, or none.
    ImageMoved,
    /// One of its volumes is none any more.
    VolumeGone,
    /// There is no such tenant, or none of its principals has this name.
    Unknown,
    Suspended,
    /// The key is somebody else's by now, or has its sandbox.
    KeyLost,
    /// A quota would be exceeded; with the quotas in force for the principal, its tenant's beneath.
    Exceeded(Exceeded, Quotas),
}

impl Store {
    /// Has all that was written before come to disk, and says whether the row of this sandbox is among it.
    pub async fn keep(&self, id: SandboxId) -> Result<bool, StoreError> {
        // Something has to be in Postgres's log, or there is nothing that a commit waits for. What this statement sees stands before it there.
        let kept = sqlx::query_scalar!(
            r#"select exists (select 1 from sandboxes where id = $1) and pg_logical_emit_message(true, 'mayfly', '') is not null as "is_kept!""#,
            id.0
        );
        Ok(kept.fetch_one(&self.pool).await?)
    }

    /// Inserts the sandbox, or nothing. A row that is locked is read as it is now, not as it was when the statement began: what is counted
    /// in the tenant's and the principal's row is exact, however many ask at once.
    pub async fn admit(&self, admission: Admission<'_>) -> Result<Admitted, StoreError> {
        let Admission { sandbox, lease, input, cases, asked, network, isolation, defaults, queue_max, wanted_node, key, promise } =
            admission;
        let volumes: BTreeSet<Uuid> = sandbox.program.volumes.iter().map(|mount| mount.volume.0).collect();
        let volumes: Vec<Uuid> = volumes.into_iter().collect();
        let claimed = sandbox.state != State::Queued;
        // A service that dies while it is compiled leaves one that was not begun; one with cases goes on where it was.
        let is_kept = !claimed || sandbox.retries_left > 0 || sandbox.compile.is_some() || sandbox.judging.is_some();
        let cases = Columns::of(cases);
        let has_input = input.files.is_some() || input.stdin.is_some();
        let row = sqlx::query!(
            r#"with image as (
                select id, digest, pulled_from is not null as is_pulled from images
                where reference = $7 and coalesce(tenant, '') in ($2, '')
                order by tenant nulls last
                limit 1
            ), tenant as (
                select * from tenants where id = $2 for no key update
            ), held_image as (
                -- after the tenant, always. Only what was pulled is given up while nobody looks; whoever does that waits for this, and then sees the sandbox.
                -- It costs a lock of a row more, and makes admissions wait for nobody else than that.
                select id from images
                where id = (select id from image where is_pulled) and exists (select 1 from tenant) for key share
            ), principal as (
                -- after the tenant, always
                select * from principals where tenant = $2 and name = $3 and exists (select 1 from tenant) for no key update
            ), volume as (
                -- after the tenant, always: whoever ends one has that lock, too
                select id from volumes where id = any($42) and tenant = $2 and state = 'ready' and exists (select 1 from tenant) for share
            ), scope as (
                select 1 as turn, 'tenant' as name, suspended_at, live, live_memory_bytes, live_cpu_millis, queued, log_bytes,
                    bucket_micros, bucket_at, day, day_runs, day_cpu_us, jsonb_strip_nulls($28::jsonb || quotas) as quotas
                from tenant
                union all
                select 2, 'principal', p.suspended_at, p.live, p.live_memory_bytes, p.live_cpu_millis, p.queued, p.log_bytes,
                    p.bucket_micros, p.bucket_at, p.day, p.day_runs, p.day_cpu_us,
                    jsonb_strip_nulls($29::jsonb || t.principal_quotas || p.quotas)
                from principal p, tenant t
            ), used as (
                select s.turn, s.name, s.suspended_at, s.live, s.live_memory_bytes, s.live_cpu_millis, s.queued, s.log_bytes, s.quotas,
                    greatest(s.day, $30::date) as day,
                    case when s.day >= $30::date then s.day_runs else 0 end as day_runs,
                    case when s.day >= $30::date then s.day_cpu_us else 0 end as day_cpu_us,
                    extract(epoch from (greatest(s.day, $30::date) + 1)::timestamp at time zone 'UTC' - $16::timestamptz)::bigint + 1 as day_left_s,
                    -- What flowed in since then; a bucket holds a minute's.
                    case when s.bucket_at is null then q.runs_per_minute * 1000000 else least(q.runs_per_minute * 1000000,
                        s.bucket_micros + (extract(epoch from least(greatest($16::timestamptz - s.bucket_at, '0 s'), '60 s')) * 1000000)::bigint
                            * q.runs_per_minute / 60) end as bucket_micros,
                    greatest(s.bucket_at, $16::timestamptz) as bucket_at,
                    q.sandboxes, q.memory_bytes, q.cpu_millis, q.queued as queued_max, q.log_bytes as log_bytes_max, q.runs_per_minute,
                    q.runs_per_day, q.cpu_seconds_per_day
                from scope s, jsonb_to_record(s.quotas) as q(
                    sandboxes bigint, memory_bytes bigint, cpu_millis bigint, queued bigint, log_bytes bigint, runs_per_minute bigint,
                    runs_per_day bigint, cpu_seconds_per_day bigint
                )
            ), exceeded as (
                select u.turn, c.turn as quota_turn, u.name as scope, c.quota, to_jsonb(c.allowed) as allowed, to_jsonb(c.used) as used,
                    c.retry_after_s
                from used u, lateral (values
                    (11, 'sandboxes', u.live + 1 > u.sandboxes, u.sandboxes, u.live, 1),
                    (12, 'memory_bytes', u.live_memory_bytes + $14 > u.memory_bytes, u.memory_bytes, u.live_memory_bytes, 1),
                    (13, 'cpu_millis', u.live_cpu_millis + $15 > u.cpu_millis, u.cpu_millis, u.live_cpu_millis, 1),
                    (14, 'queued', $5 = 'queued' and u.queued + 1 > u.queued_max, u.queued_max, u.queued, 1),
                    (15, 'log_bytes', u.log_bytes >= u.log_bytes_max, u.log_bytes_max, u.log_bytes, 60),
                    (16, 'runs_per_day', u.day_runs + 1 > u.runs_per_day, u.runs_per_day, u.day_runs, u.day_left_s),
                    (17, 'cpu_seconds_per_day', u.day_cpu_us >= u.cpu_seconds_per_day * 1000000, u.cpu_seconds_per_day,
                        u.day_cpu_us / 1000000, u.day_left_s),
                    (18, 'runs_per_minute', u.bucket_micros < 1000000, u.runs_per_minute,
                        u.runs_per_minute - u.bucket_micros / 1000000,
                        case when u.runs_per_minute > 0 then ((1000000 - u.bucket_micros) * 60 / u.runs_per_minute + 999999) / 1000000 end)
                ) as c(turn, quota, is_exceeded, allowed, used, retry_after_s)
                where c.is_exceeded
                union all
                select u.turn, 1, u.name, q.key, q.value, $27::jsonb -> substr(q.key, 9), null
                from used u, jsonb_each(u.quotas) as q
                where starts_with(q.key, 'largest_') and $27::jsonb ? substr(q.key, 9)
                    and coalesce(($27::jsonb ->> substr(q.key, 9))::numeric > (q.value #>> '{}')::numeric, true)
                union all
                select u.turn, 19, u.name, 'kept_layers', u.quotas -> 'kept_layers', to_jsonb(k.used), null
                from used u, lateral (select count(*) as used from sandboxes where $41 and tenant = $2 and keep_layer) as k
                where $41 and u.turn = 1 and k.used >= (u.quotas ->> 'kept_layers')::bigint
                union all
                select u.turn, 2, u.name, 'networks', u.quotas -> 'networks', to_jsonb($31::text), null
                from used u where not u.quotas -> 'networks' ? $31
                union all
                select u.turn, 3, u.name, 'isolations', u.quotas -> 'isolations', to_jsonb($32::text), null
                from used u where not u.quotas -> 'isolations' ? $32
            ), first as (
                select * from exceeded order by quota_turn, turn limit 1
            ), held as (
                select 1 from idempotency_keys
                where tenant = $2 and principal = $3 and key = $35 and holder = $36 and sandbox is null
                for no key update
            ), added as (
                insert into sandboxes (
                    id, tenant, principal, kind, state, name, image_reference, image_digest, image_root, program, limits, output_policy,
                    labels, memory_bytes, cpu_millis, created_at, expires_at, node, claimed_at, epoch, retries_left, claims, keeps_input,
                    ttl_ms, idle_timeout_ms, auto_remove, keep_layer, wanted_node, compile, judging
                )
                select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $33, $34, case when $5 = 'queued' then 0 else 1 end, $37,
                    $38, $39, $40, $41, $43, $44, $45
                from principal, image
                where image.digest = $8
                    and (not image.is_pulled or exists (select 1 from held_image))
                    and (select count(*) from volume) = cardinality($42)
                    and ($35::text is null or exists (select 1 from held))
                    and not exists (select 1 from used where suspended_at is not null)
                    and not exists (select 1 from first)
                    and case when $5 = 'queued' then (select coalesce(sum(queued), 0) from tenants where queued > 0) < $20
                        else not exists (select 1 from tenants where queued > 0 and suspended_at is null)
                            and exists (select 1 from nodes where id = $18 and epoch = $33 and drained_at is null) end
                returning id
            ), tenant_counted as (
                update tenants
                set live = tenants.live + 1, live_memory_bytes = tenants.live_memory_bytes + $14,
                    live_cpu_millis = tenants.live_cpu_millis + $15, queued = tenants.queued + $21,
                    bucket_micros = coalesce(used.bucket_micros - 1000000, 0),
                    bucket_at = case when used.bucket_micros is not null then used.bucket_at end,
                    day = used.day, day_runs = used.day_runs + 1, day_cpu_us = used.day_cpu_us
                from added, used
                where tenants.id = $2 and used.turn = 1
            ), principal_counted as (
                update principals
                set live = principals.live + 1, live_memory_bytes = principals.live_memory_bytes + $14,
                    live_cpu_millis = principals.live_cpu_millis + $15, queued = principals.queued + $21,
                    bucket_micros = coalesce(used.bucket_micros - 1000000, 0),
                    bucket_at = case when used.bucket_micros is not null then used.bucket_at end,
                    day = used.day, day_runs = used.day_runs + 1, day_cpu_us = used.day_cpu_us
                from added, used
                where principals.tenant = $2 and principals.name = $3 and used.turn = 2
            ), tied as (
                update idempotency_keys set sandbox = added.id from added
                where tenant = $2 and principal = $3 and key = $35 and holder = $36
            ), given as (
                insert into inputs (sandbox, files, stdin)
                select id, $22, $23 from added where ($22::bytea is not null or $23::bytea is not null)
            ), to_be_judged as (
                insert into run_cases (run, index, name, stdin, expected)
                select added.id, (c.number - 1)::integer, c.name, c.stdin, c.expected
                from added, unnest($46::text[], $47::bytea[], $48::bytea[]) with ordinality as c(name, stdin, expected, number)
            ), mounted as (
                insert into mounts (sandbox, volume) select added.id, volume.id from added, volume
            ), told as (
                insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor)
                select $2, id, 'sandbox.created', $16, $24, $2, $3 from added
            )
            select
                case
                    when not exists (select 1 from principal) then 'unknown'
                    when $35::text is not null and not exists (select 1 from held) then 'key'
                    when exists (select 1 from used where suspended_at is not null) then 'suspended'
                    when exists (select 1 from added) then 'added'
                    when not exists (select 1 from image where digest = $8 and (not is_pulled or exists (select 1 from held_image))) then 'image'
                    when (select count(*) from volume) <> cardinality($42) then 'volume'
                    when exists (select 1 from first) then 'exceeded'
                    when $5 = 'queued' then 'full'
                    else 'behind'
                end as "verdict!",
                (select weight from tenant) as weight, first.scope, first.quota, first.allowed, first.used, first.retry_after_s,
                case when first.quota is not null then (
                    select t.quotas || p.quotas from used t, used p where t.turn = 1 and p.turn = 2
                ) end as "in_force: Json<Quotas>",
                case when $5 = 'queued' then (select pg_notify($25, $26) from added)::text end as told,
                case when $49 then set_config('synchronous_commit', 'off', true) end as not_flushed
            from (select 1) as one left join first on true"#,
            sandbox.id.0,
            sandbox.tenant.as_str(),
            sandbox.principal,
            sandbox.kind.as_str(),
            sandbox.state.as_str(),
            sandbox.name.as_deref() as _,
            sandbox.image.reference,
            sandbox.image.digest,
            sandbox.image.root.to_string(),
            Json(&sandbox.program) as _,
            Json(&sandbox.limits) as _,
            policy_name(sandbox.output_policy),
            Json(&sandbox.labels) as _,
            bigint(sandbox.memory_bytes()),
            bigint(sandbox.cpu_millis()),
            sandbox.created_at,
            sandbox.expires_at as _,
            claimed.then_some(lease.node.0) as _,
            sandbox.claimed_at as _,
            bigint(queue_max) as _,
            i64::from(!claimed),
            if is_kept { input.files.as_deref() } else { None } as _,
            if is_kept { input.stdin.as_deref() } else { None } as _,
            serde_json::json!({ "kind": sandbox.kind, "image": sandbox.image.reference, "labels": sandbox.labels }),
            CHANNEL,
            "",
            asked,
            Json(&defaults.tenant) as _,
            Json(&defaults.principal) as _,
            day_of(sandbox.created_at),
            network,
            isolation,
            bigint(if claimed { lease.epoch } else { 0 }),
            sandbox.retries_left.cast_signed(),
            key.map(|key| key.name.key.as_str()) as _,
            key.map(|key| key.holder) as _,
            is_kept || !has_input,
            sandbox.ttl_ms.map(bigint) as _,
            sandbox.idle_timeout_ms.map(bigint) as _,
            sandbox.auto_remove,
            sandbox.keep_layer,
            &volumes,
            wanted_node.map(|node| node.0) as _,
            sandbox.compile.as_ref().map(Json) as _,
            sandbox.judging.map(Json) as _,
            cases.names as _,
            cases.stdins as _,
            cases.expecteds as _,
            promise == Promise::Later,
        )
        .fetch_one(&self.pool)
        .await?;
        self.told();
        Ok(match row.verdict.as_str() {
            "added" => Admitted::Yes { weight: row.weight.and_then(|weight| u32::try_from(weight).ok()).unwrap_or(1) },
            "behind" => Admitted::Behind,
            "full" => Admitted::QueueFull,
            "image" => Admitted::ImageMoved,
            "volume" => Admitted::VolumeGone,
            "unknown" => Admitted::Unknown,
            "suspended" => Admitted::Suspended,
            "key" => Admitted::KeyLost,
            _ => {
                let exceeded = Exceeded {
                    scope: if row.scope.as_deref() == Some("tenant") { QuotaScope::Tenant } else { QuotaScope::Principal },
                    quota: row.quota.ok_or_else(|| damaged("no name of a quota"))?,
                    limit: row.allowed.unwrap_or_default(),
                    used: row.used.unwrap_or_default(),
                    retry_after_s: row.retry_after_s.map(unsigned),
                };
                Admitted::Exceeded(exceeded, row.in_force.map(|quotas| quotas.0).unwrap_or_default())
            }
        })
    }
}

/// The day of UTC that quotas of a day count.
pub(super) fn day_of(at: OffsetDateTime) -> time::Date {
    at.to_offset(time::UtcOffset::UTC).date()
}

#[cfg(test)]
mod tests;
