//! The queue: rows of `sandboxes` that wait for room on a node, with what they will be given in `inputs`.

use std::{fmt, time::Duration};

use sqlx::{postgres::PgListener, types::Json};
use time::OffsetDateTime;

use super::{
    NodeId, Store, StoreError, bigint,
    sandboxes::{Row, policy_name, select_sandboxes},
    unsigned,
};
use crate::sandbox::{Sandbox, SandboxId, TenantId};

/// The channel that every node listens on for new work.
const CHANNEL: &str = "mayfly_queue";

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

/// A queued sandbox and the room that it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: SandboxId,
    pub tenant: TenantId,
    pub memory_bytes: u64,
    pub cpu_millis: u64,
}

impl Store {
    /// Puts the sandbox, which must be `queued`, at the end of its tenant's queue, and wakes the nodes. False: its image was removed.
    pub async fn enqueue(&self, sandbox: &Sandbox, input: &Input) -> Result<bool, StoreError> {
        let told = sqlx::query!(
            "with known as (
                insert into tenants (id, created_at) values ($2, $16) on conflict do nothing
            ), added as (
                insert into sandboxes (
                    id, tenant, principal, kind, state, name, image_reference, image_digest, image_root, program, limits, output_policy,
                    labels, memory_bytes, cpu_millis, created_at, expires_at
                )
                select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17
                where exists (select 1 from images where root = $9)
                returning id
            ), given as (
                insert into inputs (sandbox, files, stdin)
                select id, $18, $19 from added where $18::bytea is not null or $19::bytea is not null
            )
            select pg_notify($20, '') from added",
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
            bigint(sandbox.limits.memory_bytes()),
            bigint(sandbox.limits.cpu_millis()),
            sandbox.created_at,
            sandbox.expires_at as _,
            input.files as _,
            input.stdin as _,
            CHANNEL,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(told.is_some())
    }

    /// The next sandboxes to be started, fairest first: every tenant's oldest, then every tenant's second, and so on. None of these tenants.
    pub async fn next_queued(&self, limit: u32, without: &[TenantId]) -> Result<Vec<Candidate>, StoreError> {
        let without: Vec<String> = without.iter().map(|tenant| tenant.as_str().to_owned()).collect();
        let rows = sqlx::query!(
            "select id, tenant, memory_bytes, cpu_millis
            from (
                select id, tenant, memory_bytes, cpu_millis, created_at,
                    row_number() over (partition by tenant order by created_at, id) as turn
                from sandboxes
                where state = 'queued' and tenant <> all($2)
            ) as queue
            order by turn, created_at, id
            limit $1",
            i64::from(limit),
            &without,
        )
        .fetch_all(&self.pool)
        .await?;
        let candidates = rows.into_iter().map(|row| Candidate {
            id: SandboxId(row.id),
            tenant: TenantId::proven(row.tenant),
            memory_bytes: unsigned(row.memory_bytes),
            cpu_millis: unsigned(row.cpu_millis),
        });
        Ok(candidates.collect())
    }

    /// How many sandboxes wait.
    pub async fn queue_depth(&self) -> Result<u64, StoreError> {
        let count =
            sqlx::query_scalar!(r#"select count(*) as "count!" from sandboxes where state = 'queued'"#).fetch_one(&self.pool).await?;
        Ok(unsigned(count))
    }

    /// Takes this sandbox from the queue for this node, with what it is to be given. `None` if someone was faster.
    pub async fn claim(&self, id: SandboxId, node: NodeId, now: OffsetDateTime) -> Result<Option<(Sandbox, Input)>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let claimed = sqlx::query!(
            "with picked as (
                select id from sandboxes
                where id = $1 and state = 'queued'
                for update skip locked  -- several nodes may claim at once
            )
            update sandboxes set state = 'starting', node = $2, claimed_at = $3
            from picked where sandboxes.id = picked.id",
            id.0,
            node.0,
            now,
        )
        .execute(&mut *transaction)
        .await?;
        if claimed.rows_affected() == 0 {
            return Ok(None);
        }
        let sandbox = select_sandboxes!("id = $1", id.0).fetch_one(&mut *transaction).await?.read()?;
        let input = sqlx::query_as!(Input, "delete from inputs where sandbox = $1 returning files, stdin", id.0)
            .fetch_optional(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(Some((sandbox, input.unwrap_or_default())))
    }

    /// Queued sandboxes whose time to live is over.
    pub async fn overdue_queued(&self, now: OffsetDateTime) -> Result<Vec<Sandbox>, StoreError> {
        let rows = select_sandboxes!("state = 'queued' and expires_at <= $1", now).fetch_all(&self.pool).await?;
        rows.into_iter().map(Row::read).collect()
    }

    /// Hears of work that others put into the queue. A hint only: a message can be lost, so poll as well.
    pub async fn listen_to_queue(&self) -> Result<QueueListener, StoreError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(CHANNEL).await?;
        Ok(QueueListener(listener))
    }
}

/// Ears on the queue.
#[derive(Debug)]
pub struct QueueListener(PgListener);

impl QueueListener {
    /// Returns when something may have come. A lost connection counts as such, and is made again by itself.
    pub async fn heard(&mut self) {
        /// Between two attempts to reach a database that is away.
        const RETRY: Duration = Duration::from_secs(1);
        if let Err(error) = self.0.try_recv().await {
            tracing::debug!(%error, "listening to the queue failed");
            tokio::time::sleep(RETRY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;

    use super::{super::sandboxes::tests::*, *};
    use crate::sandbox::{Kind, Limits, RequestedLimits, State};

    fn queued(tenant: &str) -> Sandbox {
        Sandbox { state: State::Queued, claimed_at: None, ..sandbox(tenant, Kind::Run, None) }
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_queued_sandbox_is_claimed_once_with_its_input(pool: PgPool) {
        let (store, node) = store_with_node(pool).await;
        let sandbox = queued("acme");
        let input = Input { files: Some(vec![1]), stdin: None };
        store.enqueue(&sandbox, &input).await.unwrap();
        assert_eq!(store.queue_depth().await.unwrap(), 1);

        let (claimed, given) = store.claim(sandbox.id, node, OffsetDateTime::UNIX_EPOCH).await.unwrap().unwrap();
        assert_eq!((claimed.id, claimed.state, given), (sandbox.id, State::Starting, input));
        assert!(store.claim(sandbox.id, node, OffsetDateTime::UNIX_EPOCH).await.unwrap().is_none());
        assert_eq!(store.queue_depth().await.unwrap(), 0);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn nobody_overtakes_the_queue(pool: PgPool) {
        let (store, node) = store_with_node(pool).await;
        store.enqueue(&queued("acme"), &Input::default()).await.unwrap();
        let late = sandbox("other", Kind::Run, None);
        assert!(!store.admit(&late, node).await.unwrap());
        assert_eq!(store.find(&late.tenant, late.id).await.unwrap(), None);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_tenant_with_many_waiting_does_not_hold_up_another(pool: PgPool) {
        let (store, _node) = store_with_node(pool).await;
        let (first, second, other) = (queued("acme"), queued("acme"), queued("other"));
        for sandbox in [&first, &second, &other] {
            store.enqueue(sandbox, &Input::default()).await.unwrap();
        }
        let order: Vec<_> = store.next_queued(10, &[]).await.unwrap().into_iter().map(|candidate| candidate.id).collect();
        assert_eq!(order, [first.id, other.id, second.id]);
        let others = store.next_queued(10, std::slice::from_ref(&first.tenant)).await.unwrap();
        assert_eq!(others.into_iter().map(|candidate| candidate.id).collect::<Vec<_>>(), [other.id]);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_large_one_that_waits_holds_back_its_own_tenant_alone(pool: PgPool) {
        let (store, node) = store_with_node(pool).await;
        let asked: RequestedLimits = serde_json::from_value(serde_json::json!({"memory_bytes": 4_u64 << 30})).unwrap();
        let large = Sandbox { limits: Limits::of(Kind::Run, asked).unwrap(), ..queued("acme") };
        assert!(store.enqueue(&large, &Input::default()).await.unwrap());
        assert!(!store.admit(&sandbox("acme", Kind::Run, None), node).await.unwrap());
        assert!(store.admit(&sandbox("other", Kind::Run, None), node).await.unwrap());
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn no_sandbox_is_made_of_an_image_that_was_removed(pool: PgPool) {
        let (store, node) = store_with_node(pool).await;
        store.remove_image(None, "python").await.unwrap().unwrap();
        assert!(!store.admit(&sandbox("acme", Kind::Run, None), node).await.unwrap());
        assert!(!store.enqueue(&queued("acme"), &Input::default()).await.unwrap());
        assert_eq!(store.queue_depth().await.unwrap(), 0);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_listener_hears_of_new_work(pool: PgPool) {
        let (store, _node) = store_with_node(pool).await;
        let mut listener = store.listen_to_queue().await.unwrap();
        store.enqueue(&queued("acme"), &Input::default()).await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), listener.heard()).await.unwrap();
    }
}
