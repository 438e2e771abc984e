//! Tables `pools` and `pool_members`: what is to be kept ready, what waits, and the step by which one of these becomes somebody's.

use std::collections::{BTreeMap, HashMap};

use sandbox_core::fence::Fences;
use serde_json::{Value, json};
use sqlx::{PgConnection, types::Json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Act, HeldKey, Hold, Lease, Store, StoreError, admission::day_of, bigint, damaged, events, sandboxes::policy_name, unsigned};
use crate::sandbox::{
    DefaultQuotas, Exceeded, NewPool, Owner, Personal, Pool, PoolFailure, PoolId, QuotaScope, Quotas, Readiness, Sandbox, SandboxId,
    TenantId,
};

/// What became of the wish for a pool.
#[derive(Debug, Clone, PartialEq)]
pub enum PoolMade {
    /// Now, or by an earlier call with the same id.
    Yes(Box<Pool>),
    NameTaken,
    Exceeded(Exceeded),
}

/// A pool as those see it who keep it filled.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolWanted {
    pub id: PoolId,
    pub owner: Owner,
    pub name: String,
    pub size: u32,
    pub readiness: Readiness,
    /// What its image is now, if there is one.
    pub digest: Option<String>,
    pub is_suspended: bool,
    /// All of its sandboxes that have not ended, on whichever node.
    pub members: u64,
}

/// A sandbox that is to wait in a pool.
#[derive(Debug, Clone, Copy)]
pub struct NewMember<'a> {
    pub sandbox: &'a Sandbox,
    pub pool: PoolId,
    pub lease: Lease,
    /// As of every admission.
    pub asked: &'a Value,
    pub network: &'a str,
    pub isolation: &'a str,
    pub defaults: &'a DefaultQuotas,
}

/// What became of that.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberAdmitted {
    Yes,
    /// The pool is gone, or has as many as it should; or others wait for room, or the node takes nothing.
    NotNow,
    ImageMoved,
    Unknown,
    Suspended,
    Exceeded(Exceeded),
}

/// Somebody takes a sandbox that waits here.
#[derive(Debug, Clone, Copy)]
pub struct TakeOver<'a> {
    pub id: SandboxId,
    pub hold: Hold,
    pub pool: PoolId,
    pub owner: &'a Owner,
    pub personal: &'a Personal,
    pub expires_at: Option<OffsetDateTime>,
    /// When its program was started, by which fences, and how long that is ago.
    pub started: (OffsetDateTime, Fences),
    pub waited_ms: u64,
    pub at: OffsetDateTime,
    pub asked: &'a Value,
    pub network: &'a str,
    pub isolation: &'a str,
    pub defaults: &'a DefaultQuotas,
    pub key: Option<&'a HeldKey>,
}

/// What became of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakenOver {
    /// It is theirs. With their tenant's weight.
    Yes { weight: u32 },
    /// It does not wait any more, or is not this node's.
    Gone,
    /// Its image's name means another one by now.
    ImageMoved,
    /// The principal was never seen.
    Unknown,
    /// The key is somebody else's by now, or has its sandbox.
    KeyLost,
    /// A quota is in the way, or a suspension, or the node takes no work. A sandbox of their own they cannot have either, and would hear why.
    Refused,
}

struct Row {
    id: Uuid,
    tenant: String,
    principal: String,
    name: String,
    size: i32,
    template: Vec<u8>,
    ready_output: Option<String>,
    ready_within_ms: i64,
    taken: i64,
    missed: i64,
    failures: i64,
    last_failure: Option<Value>,
    created_at: OffsetDateTime,
    ready: i64,
    starting: i64,
}

impl Row {
    fn read(self) -> Result<Pool, StoreError> {
        Ok(Pool {
            id: PoolId(self.id),
            tenant: TenantId::proven(self.tenant),
            principal: self.principal,
            name: self.name,
            size: self.size.unsigned_abs(),
            template: self.template,
            readiness: Readiness { output: self.ready_output, within_ms: unsigned(self.ready_within_ms) },
            ready: unsigned(self.ready),
            starting: unsigned(self.starting),
            taken: unsigned(self.taken),
            missed: unsigned(self.missed),
            failures: unsigned(self.failures),
            last_failure: self.last_failure.map(serde_json::from_value::<PoolFailure>).transpose().map_err(damaged)?,
            created_at: self.created_at,
        })
    }
}

/// Reads whole rows; the condition and what follows it are the caller's.
macro_rules! pools {
    ($condition:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"select id, tenant, principal, name, size, template, ready_output, ready_within_ms, taken, missed, failures, last_failure, created_at,
                coalesce(waiting.ready, 0) as "ready!", coalesce(waiting.starting, 0) as "starting!"
            from pools, lateral (
                select count(*) filter (where ready_at is not null) as ready, count(*) filter (where ready_at is null) as starting
                from pool_members join sandboxes on sandboxes.id = pool_members.sandbox
                where pool_members.pool = pools.id and sandboxes.state in ('starting', 'running')
            ) as waiting
            where "# + $condition
            $(, $argument)*
        )
    };
}

impl Store {
    /// Makes a pool with this id, unless its tenant has as much as it may, in the transaction that counts.
    pub async fn create_pool(
        &self,
        id: PoolId,
        (new, template): (&NewPool, &[u8]),
        owner: &Owner,
        defaults: &Quotas,
        act: &Act<'_>,
    ) -> Result<PoolMade, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let quotas = lock(&mut transaction, &owner.tenant).await?.over(defaults);
        let there = sqlx::query!(
            r#"select count(*) filter (where id = $2) as "made!", count(*) filter (where name = $3) as "named!" from pools where tenant = $1"#,
            owner.tenant.as_str(),
            id.0,
            new.name,
        )
        .fetch_one(&mut *transaction)
        .await?;
        if there.made == 0 {
            if there.named > 0 {
                transaction.rollback().await?;
                return Ok(PoolMade::NameTaken);
            }
            if let Some(exceeded) = exceeded_by(&mut transaction, &owner.tenant, &quotas, (1, u64::from(new.size))).await? {
                transaction.rollback().await?;
                return Ok(PoolMade::Exceeded(exceeded));
            }
            sqlx::query!(
                "insert into pools (id, tenant, principal, name, size, template, ready_output, ready_within_ms, created_at)
                values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                id.0,
                owner.tenant.as_str(),
                owner.principal,
                new.name,
                new.size.cast_signed(),
                template,
                new.readiness.output.as_deref() as _,
                bigint(new.readiness.within_ms),
                act.at,
            )
            .execute(&mut *transaction)
            .await?;
            let act = Act { data: json!({ "size": new.size, "image": new.template.image.as_str() }), ..act.clone() };
            events::tell(&mut transaction, Some(&owner.tenant), "pool.created", Some(&object(&new.name)), &act).await?;
        }
        let made = pools!("id = $1", id.0).fetch_one(&mut *transaction).await?.read()?;
        transaction.commit().await?;
        self.told();
        Ok(PoolMade::Yes(Box::new(made)))
    }

    /// The tenant's pool of this name.
    pub async fn find_pool(&self, tenant: &TenantId, name: &str) -> Result<Option<Pool>, StoreError> {
        pools!("tenant = $1 and name = $2", tenant.as_str(), name).fetch_optional(&self.pool).await?.map(Row::read).transpose()
    }

    /// These pools, as far as there are such.
    pub async fn pools_of(&self, ids: &[PoolId]) -> Result<Vec<Pool>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        pools!("id = any($1)", &ids).fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// The tenant's pools by name, behind this one.
    pub async fn list_pools(&self, tenant: &TenantId, behind: Option<&str>, limit: u32) -> Result<Vec<Pool>, StoreError> {
        let rows = pools!(
            "tenant = $1 and ($2::text is null or name > $2) order by name limit $3",
            tenant.as_str(),
            behind as _,
            i64::from(limit),
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// Gives the tenant's pool another size; `None` if there is none.
    pub async fn resize_pool(
        &self,
        tenant: &TenantId,
        name: &str,
        size: u32,
        defaults: &Quotas,
        act: &Act<'_>,
    ) -> Result<Option<Result<Pool, Exceeded>>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let quotas = lock(&mut transaction, tenant).await?.over(defaults);
        let had = sqlx::query_scalar!("select size from pools where tenant = $1 and name = $2 for no key update", tenant.as_str(), name)
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(had) = had.map(i32::unsigned_abs) else {
            transaction.rollback().await?;
            return Ok(None);
        };
        if size > had
            && let Some(exceeded) = exceeded_by(&mut transaction, tenant, &quotas, (0, u64::from(size - had))).await?
        {
            transaction.rollback().await?;
            return Ok(Some(Err(exceeded)));
        }
        if size != had {
            sqlx::query!("update pools set size = $3 where tenant = $1 and name = $2", tenant.as_str(), name, size.cast_signed())
                .execute(&mut *transaction)
                .await?;
            let act = Act { data: json!({ "size": size }), ..act.clone() };
            events::tell(&mut transaction, Some(tenant), "pool.changed", Some(&object(name)), &act).await?;
        }
        let pool = pools!("tenant = $1 and name = $2", tenant.as_str(), name).fetch_one(&mut *transaction).await?.read()?;
        transaction.commit().await?;
        self.told();
        Ok(Some(Ok(pool)))
    }

    /// Removes the tenant's pool. What waits in it belongs to none from then on, and is given up by its node. False: there is none.
    pub async fn remove_pool(&self, tenant: &TenantId, name: &str, act: &Act<'_>) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        // First: so do those who take.
        lock(&mut transaction, tenant).await?;
        let gone =
            sqlx::query!("delete from pools where tenant = $1 and name = $2", tenant.as_str(), name).execute(&mut *transaction).await?;
        if gone.rows_affected() == 0 {
            transaction.rollback().await?;
            return Ok(false);
        }
        events::tell(&mut transaction, Some(tenant), "pool.removed", Some(&object(name)), act).await?;
        transaction.commit().await?;
        self.told();
        Ok(true)
    }

    /// Every pool, with what is to be known of it by whoever fills it. `references`: what their images are called, where that is known.
    pub async fn pools_wanted(&self, references: &BTreeMap<PoolId, String>) -> Result<Vec<PoolWanted>, StoreError> {
        let (ids, names): (Vec<Uuid>, Vec<String>) = references.iter().map(|(id, name)| (id.0, name.clone())).unzip();
        let rows = sqlx::query!(
            r#"select pools.id, pools.tenant, pools.principal, pools.name, pools.size, ready_output, ready_within_ms,
                (
                    select digest from images
                    where reference = known.reference and coalesce(images.tenant, '') in (pools.tenant, '')
                    order by images.tenant nulls last
                    limit 1
                ) as digest,
                (tenants.suspended_at is not null or principals.suspended_at is not null) as "is_suspended!",
                (
                    select count(*) from pool_members join sandboxes on sandboxes.id = pool_members.sandbox
                    where pool_members.pool = pools.id and sandboxes.state in ('starting', 'running')
                ) as "members!"
            from pools join tenants on tenants.id = pools.tenant
                left join principals on principals.tenant = pools.tenant and principals.name = pools.principal
                left join unnest($1::uuid[], $2::text[]) as known (id, reference) on known.id = pools.id
            order by pools.id"#,
            &ids,
            &names,
        )
        .fetch_all(&self.pool)
        .await?;
        let wanted = rows.into_iter().map(|row| PoolWanted {
            id: PoolId(row.id),
            owner: Owner { tenant: TenantId::proven(row.tenant), principal: row.principal },
            name: row.name,
            size: row.size.unsigned_abs(),
            readiness: Readiness { output: row.ready_output, within_ms: unsigned(row.ready_within_ms) },
            digest: row.digest,
            is_suspended: row.is_suspended,
            members: unsigned(row.members),
        });
        Ok(wanted.collect())
    }

    /// In which pools these wait.
    pub async fn pools_of_members(&self, ids: &[SandboxId]) -> Result<HashMap<SandboxId, PoolId>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let rows = sqlx::query!("select sandbox, pool from pool_members where sandbox = any($1)", &ids).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|row| (SandboxId(row.sandbox), PoolId(row.pool))).collect())
    }

    /// Inserts a sandbox that is to wait, claimed by this node, and counts it for the principal whose pool it is. It takes nothing of what may be made in a time: whoever
    /// takes it does.
    pub async fn admit_member(&self, new: NewMember<'_>) -> Result<MemberAdmitted, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let admitted = admit_member(&mut transaction, &new).await?;
        if admitted == MemberAdmitted::Yes {
            transaction.commit().await?;
        } else {
            transaction.rollback().await?;
        }
        Ok(admitted)
    }

    /// Notes that this one is ready.
    pub async fn member_ready(&self, id: SandboxId, at: OffsetDateTime) -> Result<(), StoreError> {
        sqlx::query!("update pool_members set ready_at = $2 where sandbox = $1", id.0, at).execute(&self.pool).await?;
        Ok(())
    }

    /// Makes a sandbox that waits here somebody's own, as if it had been made for them now: everything is counted against their quotas and their tenant's as for a new
    /// one, but for what it took up of their tenant's already.
    pub async fn take_member(&self, take: TakeOver<'_>) -> Result<TakenOver, StoreError> {
        let TakeOver { id, hold, pool, owner, personal, expires_at, started, waited_ms, at, asked, network, isolation, defaults, key } =
            take;
        let row = sqlx::query!(
            r#"with member as (
                select s.id, s.principal, s.memory_bytes, s.cpu_millis, s.image_reference, s.image_digest, p.name as pool
                from sandboxes s join pool_members m on m.sandbox = s.id join pools p on p.id = m.pool
                where s.id = $1 and s.tenant = $2 and s.kind = 'pooled' and s.state in ('starting', 'running')
                    and s.node = $4 and s.epoch = $5 and s.claims = $6 and p.id = $7
                for update of s
            ), tenant as (
                select * from tenants where id = $2 and exists (select 1 from member) for no key update
            ), principal as (
                -- after the tenant, always
                select * from principals where tenant = $2 and name = $3 and exists (select 1 from tenant) for no key update
            ), image as (
                select digest from images
                where reference = (select image_reference from member) and coalesce(tenant, '') in ($2, '')
                order by tenant nulls last
                limit 1
            ), scope as (
                select 1 as turn, 0 as more, suspended_at, live, live_memory_bytes, live_cpu_millis, log_bytes, bucket_micros, bucket_at, day,
                    day_runs, day_cpu_us, jsonb_strip_nulls($14::jsonb || quotas) as quotas
                from tenant
                union all
                -- what was another principal's before
                select 2, (m.principal <> $3)::integer, p.suspended_at, p.live, p.live_memory_bytes, p.live_cpu_millis, p.log_bytes, p.bucket_micros,
                    p.bucket_at, p.day, p.day_runs, p.day_cpu_us, jsonb_strip_nulls($15::jsonb || t.principal_quotas || p.quotas)
                from principal p, tenant t, member m
            ), used as (
                select s.turn, s.more, s.suspended_at, s.live, s.live_memory_bytes, s.live_cpu_millis, s.log_bytes, s.quotas,
                    greatest(s.day, $16::date) as day,
                    case when s.day >= $16::date then s.day_runs else 0 end as day_runs,
                    case when s.day >= $16::date then s.day_cpu_us else 0 end as day_cpu_us,
                    -- as for a new one
                    case when s.bucket_at is null then q.runs_per_minute * 1000000 else least(q.runs_per_minute * 1000000,
                        s.bucket_micros + (extract(epoch from least(greatest($13::timestamptz - s.bucket_at, '0 s'), '60 s')) * 1000000)::bigint
                            * q.runs_per_minute / 60) end as bucket_micros,
                    greatest(s.bucket_at, $13::timestamptz) as bucket_at,
                    q.sandboxes, q.memory_bytes, q.cpu_millis, q.log_bytes as log_bytes_max, q.runs_per_minute, q.runs_per_day, q.cpu_seconds_per_day
                from scope s, jsonb_to_record(s.quotas) as q(
                    sandboxes bigint, memory_bytes bigint, cpu_millis bigint, log_bytes bigint, runs_per_minute bigint, runs_per_day bigint,
                    cpu_seconds_per_day bigint
                )
            ), exceeded as (
                select 1 from used u, member m
                where u.more > 0 and (u.live + 1 > u.sandboxes or u.live_memory_bytes + m.memory_bytes > u.memory_bytes
                        or u.live_cpu_millis + m.cpu_millis > u.cpu_millis)
                    or u.log_bytes >= u.log_bytes_max or u.day_runs + 1 > u.runs_per_day or u.day_cpu_us >= u.cpu_seconds_per_day * 1000000
                    or u.bucket_micros < 1000000
                    or not u.quotas -> 'networks' ? $18 or not u.quotas -> 'isolations' ? $19
                union all
                select 1 from used u, jsonb_each(u.quotas) as q
                where starts_with(q.key, 'largest_') and $17::jsonb ? substr(q.key, 9)
                    and coalesce(($17::jsonb ->> substr(q.key, 9))::numeric > (q.value #>> '{}')::numeric, true)
            ), held as (
                select 1 from idempotency_keys
                where tenant = $2 and principal = $3 and key = $23 and holder = $24 and sandbox is null
                for no key update
            ), taken as (
                update sandboxes
                set kind = 'sandbox', principal = $3, state = 'running', name = $8, labels = $9, ttl_ms = $10, expires_at = $11, idle_timeout_ms = $12,
                    created_at = $13, claimed_at = $13, started_at = coalesce(started_at, $20), fences = coalesce(fences, $21), claims = claims + 1,
                    from_pool = member.pool, waited_ms = $22
                from member, principal, image
                where sandboxes.id = member.id and image.digest = member.image_digest
                    and ($23::text is null or exists (select 1 from held))
                    and not exists (select 1 from used where suspended_at is not null)
                    and not exists (select 1 from exceeded)
                    and exists (select 1 from nodes where id = $4 and epoch = $5 and drained_at is null)
                returning sandboxes.id, sandboxes.image_reference
            ), tenant_counted as (
                update tenants
                set bucket_micros = coalesce(used.bucket_micros - 1000000, 0),
                    bucket_at = case when used.bucket_micros is not null then used.bucket_at end,
                    day = used.day, day_runs = used.day_runs + 1, day_cpu_us = used.day_cpu_us
                from taken, used
                where tenants.id = $2 and used.turn = 1
            ), principal_counted as (
                update principals
                set live = principals.live + used.more, live_memory_bytes = principals.live_memory_bytes + used.more * member.memory_bytes,
                    live_cpu_millis = principals.live_cpu_millis + used.more * member.cpu_millis,
                    bucket_micros = coalesce(used.bucket_micros - 1000000, 0),
                    bucket_at = case when used.bucket_micros is not null then used.bucket_at end,
                    day = used.day, day_runs = used.day_runs + 1, day_cpu_us = used.day_cpu_us
                from taken, used, member
                where principals.tenant = $2 and principals.name = $3 and used.turn = 2
            ), giver_counted as (
                update principals
                set live = live - 1, live_memory_bytes = live_memory_bytes - member.memory_bytes, live_cpu_millis = live_cpu_millis - member.cpu_millis
                from taken, member
                where principals.tenant = $2 and principals.name = member.principal and member.principal <> $3
            ), waited as (
                -- What it took up until now is its pool's; what it used of the processor for its start is told at its end.
                insert into usage (
                    sandbox, claims, tenant, principal, kind, wall_us, cpu_us, memory_peak_bytes, memory_limit_bytes, output_bytes, log_bytes, ended_at
                )
                select taken.id, $6, $2, member.principal, 'pooled', $22::bigint * 1000, 0, 0, member.memory_bytes, 0, 0, $13 from taken, member
            ), left_pool as (
                delete from pool_members using taken where pool_members.sandbox = taken.id
            ), pool_counted as (
                update pools set taken = pools.taken + 1 from taken where pools.id = $7
            ), tied as (
                update idempotency_keys set sandbox = taken.id from taken
                where tenant = $2 and principal = $3 and key = $23 and holder = $24
            ), told as (
                insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor)
                select $2, taken.id, 'sandbox.created', $13,
                    jsonb_build_object('kind', 'sandbox', 'image', taken.image_reference, 'labels', $9::jsonb, 'pool', member.pool), $2, $3
                from taken, member
            )
            select
                case
                    when not exists (select 1 from member) then 'gone'
                    when exists (select 1 from taken) then 'taken'
                    when not exists (select 1 from principal) then 'unknown'
                    when $23::text is not null and not exists (select 1 from held) then 'key'
                    when not exists (select 1 from image, member where image.digest = member.image_digest) then 'image'
                    else 'refused'
                end as "verdict!",
                (select weight from tenant) as weight"#,
            id.0,
            owner.tenant.as_str(),
            owner.principal,
            hold.lease.node.0,
            bigint(hold.lease.epoch),
            bigint(hold.claims),
            pool.0,
            personal.name.as_deref() as _,
            Json(&personal.labels) as _,
            personal.ttl_ms.map(bigint) as _,
            expires_at as _,
            personal.idle_timeout_ms.map(bigint) as _,
            at,
            Json(&defaults.tenant) as _,
            Json(&defaults.principal) as _,
            day_of(at),
            asked,
            network,
            isolation,
            started.0,
            started.1.bits().cast_signed(),
            bigint(waited_ms),
            key.map(|key| key.name.key.as_str()) as _,
            key.map(|key| key.holder) as _,
        )
        .fetch_one(&self.pool)
        .await?;
        self.told();
        Ok(match row.verdict.as_str() {
            "taken" => TakenOver::Yes { weight: row.weight.and_then(|weight| u32::try_from(weight).ok()).unwrap_or(1) },
            "gone" => TakenOver::Gone,
            "unknown" => TakenOver::Unknown,
            "key" => TakenOver::KeyLost,
            "image" => TakenOver::ImageMoved,
            _ => TakenOver::Refused,
        })
    }

    /// Waits for whoever is about to change this row.
    pub async fn settled(&self, id: SandboxId) -> Result<(), StoreError> {
        sqlx::query!("select 1 as one from sandboxes where id = $1 for update", id.0).fetch_optional(&self.pool).await?;
        Ok(())
    }

    /// Removes the rows of what has ended while it waited, so many at the most.
    pub async fn remove_ended_members(&self, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from sandboxes using (
                select id from sandboxes where kind = 'pooled' and state in ('exited', 'failed') order by id limit $1 for update skip locked
            ) as ended
            where sandboxes.id = ended.id",
            i64::from(limit),
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }

    /// Notes why one of the pool's sandboxes came to nothing.
    pub async fn note_pool_failure(&self, id: PoolId, failure: &PoolFailure) -> Result<(), StoreError> {
        sqlx::query!("update pools set failures = failures + 1, last_failure = $2 where id = $1", id.0, Json(failure) as _)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Notes how many requests found none ready.
    pub async fn note_pool_misses(&self, id: PoolId, count: u64) -> Result<(), StoreError> {
        sqlx::query!("update pools set missed = missed + $2 where id = $1", id.0, bigint(count)).execute(&self.pool).await?;
        Ok(())
    }
}

fn object(name: &str) -> String {
    format!("pool/{name}")
}

/// Takes the lock under which a tenant's quotas are counted. Its own quotas.
async fn lock(connection: &mut PgConnection, tenant: &TenantId) -> Result<Quotas, StoreError> {
    let quotas =
        sqlx::query_scalar!(r#"select quotas as "quotas: Json<Quotas>" from tenants where id = $1 for no key update"#, tenant.as_str());
    Ok(quotas.fetch_optional(connection).await?.map(|quotas| quotas.0).unwrap_or_default())
}

/// Which quota so many more pools, with so many more sandboxes, would go beyond.
async fn exceeded_by(
    connection: &mut PgConnection,
    tenant: &TenantId,
    quotas: &Quotas,
    (pools, sandboxes): (u64, u64),
) -> Result<Option<Exceeded>, StoreError> {
    let used = sqlx::query!(
        r#"select count(*) as "pools!", coalesce(sum(size), 0)::bigint as "sandboxes!" from pools where tenant = $1"#,
        tenant.as_str()
    )
    .fetch_one(connection)
    .await?;
    let first = [("pools", unsigned(used.pools), pools), ("pool_sandboxes", unsigned(used.sandboxes), sandboxes)].into_iter().find_map(
        |(quota, used, more)| quotas.number(quota).filter(|limit| used.saturating_add(more) > *limit).map(|limit| (quota, used, limit)),
    );
    Ok(first.map(|(quota, used, limit)| of_number(QuotaScope::Tenant, quota, limit.into(), used.into())))
}

fn of_number(scope: QuotaScope, quota: &str, limit: Value, used: Value) -> Exceeded {
    Exceeded { scope, quota: quota.to_owned(), limit, used, retry_after_s: None }
}

async fn admit_member(connection: &mut PgConnection, new: &NewMember<'_>) -> Result<MemberAdmitted, StoreError> {
    let NewMember { sandbox, pool, lease, asked, network, isolation, defaults } = *new;
    let tenant = sqlx::query!(
        r#"select suspended_at, live, live_memory_bytes, live_cpu_millis, quotas as "quotas: Json<Quotas>",
            log_bytes, case when day >= $2 then day_cpu_us else 0 end as "day_cpu_us!",
            principal_quotas as "principal_quotas: Json<Quotas>"
        from tenants where id = $1 for no key update"#,
        sandbox.tenant.as_str(),
        day_of(sandbox.created_at),
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(tenant) = tenant else { return Ok(MemberAdmitted::Unknown) };
    // After the tenant, always.
    let principal = sqlx::query!(
        r#"select suspended_at, live, live_memory_bytes, live_cpu_millis, quotas as "quotas: Json<Quotas>",
            log_bytes, case when day >= $3 then day_cpu_us else 0 end as "day_cpu_us!"
        from principals where tenant = $1 and name = $2 for no key update"#,
        sandbox.tenant.as_str(),
        sandbox.principal,
        day_of(sandbox.created_at),
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(principal) = principal else { return Ok(MemberAdmitted::Unknown) };
    if tenant.suspended_at.is_some() || principal.suspended_at.is_some() {
        return Ok(MemberAdmitted::Suspended);
    }
    // Under that lock: what is counted here nobody else adds to.
    let now = sqlx::query!(
        r#"select
            exists (select 1 from pools where id = $1 and size > (
                select count(*) from pool_members join sandboxes on sandboxes.id = pool_members.sandbox
                where pool_members.pool = $1 and sandboxes.state in ('starting', 'running')
            )) as "is_wanted!",
            not exists (select 1 from tenants where queued > 0 and suspended_at is null)
                and exists (select 1 from nodes where id = $2 and epoch = $3 and drained_at is null) as "has_turn!",
            (
                select digest from images where reference = $4 and coalesce(tenant, '') in ($5, '') order by tenant nulls last limit 1
            ) as digest"#,
        pool.0,
        lease.node.0,
        bigint(lease.epoch),
        sandbox.image.reference,
        sandbox.tenant.as_str(),
    )
    .fetch_one(&mut *connection)
    .await?;
    if !now.is_wanted || !now.has_turn {
        return Ok(MemberAdmitted::NotNow);
    }
    if now.digest.as_deref() != Some(sandbox.image.digest.as_str()) {
        return Ok(MemberAdmitted::ImageMoved);
    }
    let of_tenant = tenant.quotas.0.over(&defaults.tenant);
    let of_principal = principal.quotas.0.over(&tenant.principal_quotas.0.over(&defaults.principal));
    let scopes = [
        (
            QuotaScope::Tenant,
            &of_tenant,
            [tenant.live, tenant.live_memory_bytes, tenant.live_cpu_millis, tenant.log_bytes, tenant.day_cpu_us],
        ),
        (
            QuotaScope::Principal,
            &of_principal,
            [principal.live, principal.live_memory_bytes, principal.live_cpu_millis, principal.log_bytes, principal.day_cpu_us],
        ),
    ];
    for (scope, quotas, used) in scopes {
        if let Some(exceeded) = beyond(scope, quotas, used, sandbox, asked, [("networks", network), ("isolations", isolation)]) {
            return Ok(MemberAdmitted::Exceeded(exceeded));
        }
    }
    insert_member(connection, new).await?;
    Ok(MemberAdmitted::Yes)
}

/// The quota that one more sandbox like this goes beyond.
fn beyond(
    scope: QuotaScope,
    quotas: &Quotas,
    [live, memory_bytes, cpu_millis, log_bytes, day_cpu_us]: [i64; 5],
    sandbox: &Sandbox,
    asked: &Value,
    words: [(&str, &str); 2],
) -> Option<Exceeded> {
    let counted =
        [("sandboxes", live, 1), ("memory_bytes", memory_bytes, sandbox.memory_bytes()), ("cpu_millis", cpu_millis, sandbox.cpu_millis())];
    for (quota, used, more) in counted {
        let used = unsigned(used);
        if let Some(limit) = quotas.number(quota).filter(|limit| used.saturating_add(more) > *limit) {
            return Some(of_number(scope, quota, limit.into(), used.into()));
        }
    }
    // Used up, as for anybody else who would begin something.
    for (quota, used) in [("log_bytes", log_bytes), ("cpu_seconds_per_day", day_cpu_us / 1_000_000)] {
        let used = unsigned(used);
        if let Some(limit) = quotas.number(quota).filter(|limit| used >= *limit) {
            return Some(of_number(scope, quota, limit.into(), used.into()));
        }
    }
    for (field, value) in asked.as_object().into_iter().flatten() {
        let quota = format!("largest_{field}");
        if let Some(limit) = quotas.number(&quota).filter(|limit| value.as_u64().is_none_or(|value| value > *limit)) {
            return Some(of_number(scope, &quota, limit.into(), value.clone()));
        }
    }
    words.into_iter().find_map(|(quota, word)| {
        let list = quotas.list(quota).filter(|list| !list.contains(&word))?;
        Some(of_number(scope, quota, json!(list), json!(word)))
    })
}

async fn insert_member(connection: &mut PgConnection, new: &NewMember<'_>) -> Result<(), StoreError> {
    let NewMember { sandbox, pool, lease, .. } = *new;
    sqlx::query!(
        "with added as (
            insert into sandboxes (
                id, tenant, principal, kind, state, image_reference, image_digest, image_root, program, limits, output_policy, labels, memory_bytes,
                cpu_millis, created_at, node, claimed_at, epoch, claims, keeps_input, auto_remove
            )
            values ($1, $2, $3, 'pooled', 'starting', $4, $5, $6, $7, $8, $9, '{}', $10, $11, $12, $13, $12, $14, 1, false, $15)
            returning id
        ), waits as (
            insert into pool_members (sandbox, pool) select id, $16 from added
        ), tenant_counted as (
            update tenants
            set live = live + 1, live_memory_bytes = live_memory_bytes + $10, live_cpu_millis = live_cpu_millis + $11
            where id = $2
        )
        update principals set live = live + 1, live_memory_bytes = live_memory_bytes + $10, live_cpu_millis = live_cpu_millis + $11
        where tenant = $2 and name = $3",
        sandbox.id.0,
        sandbox.tenant.as_str(),
        sandbox.principal,
        sandbox.image.reference,
        sandbox.image.digest,
        sandbox.image.root.to_string(),
        Json(&sandbox.program) as _,
        Json(&sandbox.limits) as _,
        policy_name(sandbox.output_policy),
        bigint(sandbox.memory_bytes()),
        bigint(sandbox.cpu_millis()),
        sandbox.created_at,
        lease.node.0,
        bigint(lease.epoch),
        sandbox.auto_remove,
        pool.0,
    )
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests;
