//! The queue: rows of `sandboxes` that wait for room on a node, with what they will be given in `inputs`.

use std::fmt;

use time::OffsetDateTime;

use super::{
    Hold, Lease, NodeId, Store, StoreError, bigint,
    sandboxes::{readable, select_sandboxes},
    unsigned,
};
use crate::sandbox::{Owner, Sandbox, SandboxId, TenantId};

/// The channel that every node listens on for new work.
pub(super) const CHANNEL: &str = "mayfly_queue";

/// What a queued sandbox is given at its start: files, in the format that the keeper takes, and standard input.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Input {
    pub files: Option<Vec<u8>>,
    pub stdin: Option<Vec<u8>>,
}

impl fmt::Debug for Input {
    /// Lengths alone: what a tenant sends belongs in no log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(Vec::len);
        f.debug_struct("Input").field("files_bytes", &len(&self.files)).field("stdin_bytes", &len(&self.stdin)).finish()
    }
}

/// Why a claimed sandbox goes back into the queue.
#[derive(Debug, Clone, Copy)]
pub enum Return<'a> {
    /// This attempt failed by no fault of its own, and one of its retries is used for another. Until then its node leaves it to others.
    Failed { message: &'a str, until: OffsetDateTime },
    /// It was not begun, for want of something. This is what it is to be given, unless that is kept anyway. With a time, its node leaves it to others
    /// until then.
    NotBegun { input: &'a Input, until: Option<OffsetDateTime> },
}

/// A queued sandbox, whose it is, and the room that it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: SandboxId,
    pub owner: Owner,
    /// Its tenant's.
    pub weight: u32,
    pub memory_bytes: u64,
    pub cpu_millis: u64,
    pub created_at: OffsetDateTime,
}

impl Store {
    /// The first sandboxes of every principal that waits, oldest first, so many of each. None of a tenant or principal that is suspended, and
    /// none that this node could not begin just now, or failed just now while another could take it.
    pub async fn next_queued(&self, of_each: u32, node: NodeId, now: OffsetDateTime) -> Result<Vec<Candidate>, StoreError> {
        let rows = sqlx::query!(
            r#"with recursive line as (
                -- from one who waits to the next, along the index: what stands behind the first ones is not read
                (select tenant, principal from sandboxes where state = 'queued' order by tenant, principal limit 1)
                union all
                select next.tenant, next.principal
                from line, lateral (
                    select tenant, principal from sandboxes
                    where state = 'queued' and (tenant, principal) > (line.tenant, line.principal)
                    order by tenant, principal
                    limit 1
                ) as next
            )
            select head.id, line.tenant as "tenant!", line.principal as "principal!", tenants.weight, head.memory_bytes, head.cpu_millis,
                head.created_at
            from line
                join tenants on tenants.id = line.tenant
                join principals on principals.tenant = line.tenant and principals.name = line.principal,
                lateral (
                    select id, memory_bytes, cpu_millis, created_at from sandboxes
                    where state = 'queued' and tenant = line.tenant and principal = line.principal
                        and (wanted_node is null or wanted_node = $2)
                        and (failed_node is distinct from $2 or failed_until <= $3 or attempt > 1 and not exists (
                            select 1 from nodes where id <> $2 and lease_until >= now() and drained_at is null
                        ))
                    order by created_at, id
                    limit $1
                ) as head
            where tenants.suspended_at is null and principals.suspended_at is null
            order by line.tenant, line.principal, head.created_at, head.id"#,
            i64::from(of_each),
            node.0,
            now,
        )
        .fetch_all(&self.pool)
        .await?;
        let candidates = rows.into_iter().map(|row| Candidate {
            id: SandboxId(row.id),
            owner: Owner { tenant: TenantId::proven(row.tenant), principal: row.principal },
            weight: u32::try_from(row.weight).unwrap_or(1),
            memory_bytes: unsigned(row.memory_bytes),
            cpu_millis: unsigned(row.cpu_millis),
            created_at: row.created_at,
        });
        Ok(candidates.collect())
    }

    /// How many would be started up to this one, itself included, if nothing changed: those of its tenant before it, and of each other tenant
    /// as many as fall to its weight meanwhile. `None` if it does not wait.
    pub async fn queue_position(&self, id: SandboxId) -> Result<Option<u64>, StoreError> {
        let position = sqlx::query_scalar!(
            r#"with own as (
                select tenants.weight, sandboxes.tenant, (
                    select count(*) from sandboxes as other
                    where other.state = 'queued' and other.tenant = sandboxes.tenant
                        and (other.created_at, other.id) <= (sandboxes.created_at, sandboxes.id)
                ) as turn
                from sandboxes join tenants on tenants.id = sandboxes.tenant
                where sandboxes.id = $1 and sandboxes.state = 'queued'
            )
            select turn + (
                select coalesce(sum(least(tenants.queued, own.turn * tenants.weight / own.weight)), 0)
                from tenants
                where tenants.queued > 0 and tenants.id <> own.tenant and tenants.suspended_at is null
            )::bigint as "position!"
            from own"#,
            id.0,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(position.map(unsigned))
    }

    /// How many sandboxes wait.
    pub async fn queue_depth(&self) -> Result<u64, StoreError> {
        let count =
            sqlx::query_scalar!(r#"select count(*) as "count!" from sandboxes where state = 'queued'"#).fetch_one(&self.pool).await?;
        Ok(unsigned(count))
    }

    /// Takes this sandbox from the queue, with what it is to be given. `None` if someone was faster, or the node may not: it is drained, or its
    /// lease is lost.
    pub async fn claim(&self, id: SandboxId, lease: Lease, now: OffsetDateTime) -> Result<Option<(Sandbox, Input)>, StoreError> {
        self.pool.in_time(self.claim_at_last(id, lease, now)).await
    }

    async fn claim_at_last(&self, id: SandboxId, lease: Lease, now: OffsetDateTime) -> Result<Option<(Sandbox, Input)>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let claimed = sqlx::query!(
            "with picked as (
                select id from sandboxes
                where id = $1 and state = 'queued' and (wanted_node is null or wanted_node = $2)
                    and exists (select 1 from nodes where id = $2 and epoch = $4 and drained_at is null)
                for update skip locked  -- several nodes may claim at once
            ), claimed as (
                update sandboxes set state = 'starting', node = $2, claimed_at = $3, epoch = $4, claims = claims + 1
                from picked where sandboxes.id = picked.id
                returning sandboxes.id, tenant, principal
            ), tenant_counted as (
                update tenants set queued = queued - 1 from claimed where tenants.id = claimed.tenant
                returning claimed.id, claimed.tenant, claimed.principal
            ), principal_counted as (
                -- after the tenant, always
                update principals set queued = queued - 1 from tenant_counted as claimed
                where principals.tenant = claimed.tenant and principals.name = claimed.principal
            )
            select id from claimed",
            id.0,
            lease.node.0,
            now,
            bigint(lease.epoch),
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if claimed.is_none() {
            transaction.rollback().await?;
            return Ok(None);
        }
        let sandbox = select_sandboxes!("id = $1", id.0).fetch_one(&mut *transaction).await?.read()?;
        // Kept until the end: whoever claimed it may die before it is begun.
        let input =
            sqlx::query_as!(Input, "select files, stdin from inputs where sandbox = $1", id.0).fetch_optional(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(Some((sandbox, input.unwrap_or_default())))
    }

    /// Puts a sandbox that was claimed like this back into the queue, where its age gives it its place. False if it is somebody else's by now, has
    /// ended, or has no retry left.
    pub async fn give_back(&self, id: SandboxId, hold: Hold, why: Return<'_>, now: OffsetDateTime) -> Result<bool, StoreError> {
        let none = Input::default();
        let (is_failure, message, until, input) = match why {
            Return::Failed { message, until } => (true, message, Some(until), &none),
            Return::NotBegun { input, until } => (false, "", until, input),
        };
        let again = sqlx::query!(
            "with again as (
                update sandboxes
                set state = 'queued', node = null, epoch = 0, claimed_at = null, started_at = null, fences = null,
                    attempt = attempt + $4, retries_left = retries_left - $4,
                    failed_node = case when $5::timestamptz is null then failed_node else $2 end, failed_until = coalesce($5, failed_until),
                    keeps_input = true
                where id = $1 and state in ('starting', 'running', 'paused') and node = $2 and epoch = $3 and claims = $11 and retries_left >= $4
                returning id, tenant, principal, kind, labels, attempt
            ), tenant_counted as (
                update tenants set queued = queued + 1 from again where tenants.id = again.tenant
                returning again.id, again.tenant, again.principal
            ), principal_counted as (
                -- after the tenant, always
                update principals set queued = queued + 1 from tenant_counted as again
                where principals.tenant = again.tenant and principals.name = again.principal
            ), kept as (
                insert into inputs (sandbox, files, stdin)
                select id, $6, $7 from again where $6::bytea is not null or $7::bytea is not null
                on conflict (sandbox) do nothing
            ), unjudged as (
                -- another attempt begins anew; one that was only not begun goes on where it was
                update run_cases
                set verdict = null, outcome = null, used = null, started_at = null, stdout = null, stderr = null,
                    stdout_omitted_bytes = 0, stderr_omitted_bytes = 0
                from again where $4 = 1 and run_cases.run = again.id
            ), told as (
                insert into events (tenant, sandbox, kind, at, data)
                select tenant, id, 'sandbox.retried', $8,
                    jsonb_build_object('kind', kind, 'labels', labels, 'attempt', attempt, 'message', $9::text)
                from again
                where $4 = 1
            )
            select pg_notify($10, '')::text as told from again",
            id.0,
            hold.lease.node.0,
            bigint(hold.lease.epoch),
            i32::from(is_failure),
            until as _,
            input.files.as_deref() as _,
            input.stdin.as_deref() as _,
            now,
            message,
            CHANNEL,
            bigint(hold.claims),
        )
        .fetch_optional(&self.pool)
        .await?;
        self.told();
        Ok(again.is_some())
    }

    /// Queued sandboxes whose time to live is over.
    pub async fn overdue_queued(&self, now: OffsetDateTime) -> Result<Vec<Sandbox>, StoreError> {
        let rows = select_sandboxes!("state = 'queued' and expires_at <= $1", now).fetch_all(&self.pool).await?;
        Ok(readable(rows))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::PgPool;

    use super::{super::sandboxes::tests::*, *};
    use crate::{
        sandbox::{Kind, State},
        store::{Suspension, Who},
    };

    fn queued(tenant: &str) -> Sandbox {
        Sandbox { state: State::Queued, claimed_at: None, ..sandbox(tenant, Kind::Run, None) }
    }

    async fn enqueue(store: &Store, sandbox: &Sandbox) -> bool {
        admit(store, sandbox, Lease { node: NodeId(uuid::Uuid::nil()), epoch: 0 }).await
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_queued_sandbox_is_claimed_once_with_its_input(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        let sandbox = queued("acme");
        let input = Input { files: Some(vec![1]), stdin: None };
        assert!(admit_with(&store, &sandbox, lease, &input).await);
        assert_eq!(store.queue_depth().await.unwrap(), 1);

        let (claimed, given) = store.claim(sandbox.id, lease, OffsetDateTime::UNIX_EPOCH).await.unwrap().unwrap();
        assert_eq!((claimed.id, claimed.state, given), (sandbox.id, State::Starting, input));
        assert!(store.claim(sandbox.id, lease, OffsetDateTime::UNIX_EPOCH).await.unwrap().is_none());
        assert_eq!(store.queue_depth().await.unwrap(), 0);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn nobody_overtakes_the_queue(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        enqueue(&store, &queued("acme")).await;
        let late = sandbox("other", Kind::Run, None);
        assert!(!admit(&store, &late, lease).await);
        assert_eq!(store.find(&late.tenant, late.id).await.unwrap(), None);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn the_first_of_everyone_who_waits_are_found(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        let (first, second, third, other) = (queued("acme"), queued("acme"), queued("acme"), queued("other"));
        let colleague = Sandbox { principal: "bob".into(), ..queued("acme") };
        for sandbox in [&first, &second, &third, &colleague, &other] {
            assert!(enqueue(&store, sandbox).await);
        }
        let found: Vec<_> =
            store.next_queued(2, lease.node, OffsetDateTime::UNIX_EPOCH).await.unwrap().into_iter().map(|candidate| candidate.id).collect();
        assert_eq!(found, [first.id, second.id, colleague.id, other.id]);
        assert_eq!(store.queue_position(third.id).await.unwrap(), Some(4));
        assert_eq!(store.queue_position(other.id).await.unwrap(), Some(2));

        store.suspend(Who { tenant: &first.tenant, principal: None }, Suspension::Imposed { stops: false }, &act()).await.unwrap();
        assert_eq!(store.next_queued(2, lease.node, OffsetDateTime::UNIX_EPOCH).await.unwrap().len(), 1);
        assert_eq!(store.queue_position(other.id).await.unwrap(), Some(1));
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn no_sandbox_is_made_of_an_image_that_was_removed(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        store.remove_image(None, "python", &act()).await.unwrap().unwrap();
        assert!(!admit(&store, &sandbox("acme", Kind::Run, None), lease).await);
        assert!(!enqueue(&store, &queued("acme")).await);
        assert_eq!(store.queue_depth().await.unwrap(), 0);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_listener_hears_of_new_work(pool: PgPool) {
        let (store, _lease) = store_with_node(pool).await;
        let mut listener = store.listen().await.unwrap();
        enqueue(&store, &queued("acme")).await;
        tokio::time::timeout(Duration::from_secs(5), listener.heard()).await.unwrap();
    }
}
