//! Table `nodes`: the machines that run sandboxes, and who may write for each.
//!
//! A process takes a node's lease and holds it by renewing it. Its epoch stands in every row that it claims; what it writes of such a row is
//! held against that, so one that lost the lease, and does not know it, changes nothing. Leases go by the database's clock, the one that all
//! nodes have in common.

use std::{sync::Arc, time::Duration};

use sqlx::{
    Connection as _, PgConnection, PgExecutor,
    postgres::{PgConnectOptions, types::PgInterval},
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Act, Store, StoreError, bigint, events, sandboxes::Row, unsigned};
use crate::sandbox::Sandbox;

/// Names a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub Uuid);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// The right to write for a node, for as long as nobody took it since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub node: NodeId,
    pub epoch: u64,
}

/// A sandbox that was claimed under a lease, for the so-manieth time: who writes of it says for which claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    pub lease: Lease,
    pub claims: u64,
}

/// The lease of some node as it was last renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewed {
    pub lease: Lease,
    pub until: OffsetDateTime,
}

/// What a node has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub memory_bytes: u64,
    pub cpu_millis: u64,
}

/// What an operator wants of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Orders {
    /// It takes no more work.
    pub is_drained: bool,
    /// What lives on it then is to be ended.
    pub evict_at: Option<OffsetDateTime>,
}

/// A node as operators see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    /// For people.
    pub name: String,
    pub capacity: Capacity,
    pub epoch: u64,
    pub started_at: OffsetDateTime,
    pub lease_until: OffsetDateTime,
    /// Whether its lease holds.
    pub is_alive: bool,
    pub drained_at: Option<OffsetDateTime>,
    pub evict_at: Option<OffsetDateTime>,
    /// Sandboxes and runs that it claimed and that have not ended.
    pub live: u64,
}

/// A sandbox that was claimed for a node under a lease which nobody holds any more.
#[derive(Debug, Clone, PartialEq)]
pub struct Abandoned {
    pub sandbox: Sandbox,
    pub hold: Hold,
    pub node_name: String,
}

impl Store {
    /// Takes the node, from whomever had it: with everything that it has live. Its name is for people.
    pub async fn take_node(
        &self,
        id: NodeId,
        name: &str,
        capacity: Capacity,
        now: OffsetDateTime,
        held_for: Duration,
    ) -> Result<Lease, StoreError> {
        let epoch = sqlx::query_scalar!(
            r#"with taken as (
                insert into nodes (id, name, memory_bytes, cpu_millis, started_at, epoch, lease_until)
                values ($1, $2, $3, $4, $5, 1, clock_timestamp() + $6)
                on conflict (id) do update
                set name = excluded.name, memory_bytes = excluded.memory_bytes, cpu_millis = excluded.cpu_millis,
                    started_at = excluded.started_at, epoch = nodes.epoch + 1, lease_until = excluded.lease_until
                returning epoch
            ), adopted as (
                update sandboxes set epoch = taken.epoch from taken where node = $1 and state in ('starting', 'running', 'paused')
            )
            select epoch as "epoch!" from taken"#,
            id.0,
            name,
            bigint(capacity.memory_bytes),
            bigint(capacity.cpu_millis),
            now,
            interval(held_for),
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Lease { node: id, epoch: unsigned(epoch) })
    }

    /// Goes on holding the lease; `None`: it is lost.
    pub async fn renew(&self, lease: Lease, held_for: Duration) -> Result<Option<Orders>, StoreError> {
        renew(&self.pool, lease, held_for).await
    }

    /// Somebody who renews leases and waits for no connection that others use.
    pub fn renewer(&self) -> Renewer {
        Renewer { options: self.pool.connect_options(), connection: None }
    }

    /// Lets the lease end now: others need not wait for its time.
    pub async fn release(&self, lease: Lease) -> Result<(), StoreError> {
        sqlx::query!("update nodes set lease_until = now() where id = $1 and epoch = $2", lease.node.0, bigint(lease.epoch))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Takes over, for the holder of this lease, what was claimed under an earlier one of the same node by a statement that was still under way when
    /// the node was taken.
    pub async fn adopt_late_claims(&self, lease: Lease) -> Result<(), StoreError> {
        sqlx::query!(
            "update sandboxes set epoch = $2
            where node = $1 and epoch < $2 and state in ('starting', 'running', 'paused') and exists (select 1 from nodes where id = $1 and epoch = $2)",
            lease.node.0,
            bigint(lease.epoch),
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Whether the holder of this lease may claim: it still holds it, and the node is not drained.
    pub async fn may_claim(&self, lease: Lease) -> Result<bool, StoreError> {
        let may = sqlx::query_scalar!(
            r#"select exists (select 1 from nodes where id = $1 and epoch = $2 and drained_at is null) as "may!""#,
            lease.node.0,
            bigint(lease.epoch),
        );
        Ok(may.fetch_one(&self.pool).await?)
    }

    /// Whether another node than this could take work.
    pub async fn has_other_nodes(&self, own: NodeId) -> Result<bool, StoreError> {
        let has = sqlx::query_scalar!(
            r#"select exists (select 1 from nodes where id <> $1 and lease_until >= now() and drained_at is null) as "has!""#,
            own.0
        );
        Ok(has.fetch_one(&self.pool).await?)
    }

    /// The leases of other nodes that have something live under them.
    pub async fn leases_in_use(&self, own: NodeId) -> Result<Vec<Renewed>, StoreError> {
        let rows = sqlx::query!(
            "select id, epoch, lease_until from nodes
            where id <> $1 and exists (
                select 1 from sandboxes where node = nodes.id and state in ('starting', 'running', 'paused') and sandboxes.epoch = nodes.epoch
            )",
            own.0,
        )
        .fetch_all(&self.pool)
        .await?;
        let renewed = |id, epoch, until| Renewed { lease: Lease { node: NodeId(id), epoch: unsigned(epoch) }, until };
        Ok(rows.into_iter().map(|row| renewed(row.id, row.epoch, row.lease_until)).collect())
    }

    /// Takes the right to write from a node whose lease is over and was not renewed since it was seen like this, so that others can settle what it has
    /// live. False: it has it still, or somebody was faster.
    pub async fn depose(&self, seen: Renewed) -> Result<bool, StoreError> {
        let deposed = sqlx::query!(
            "update nodes set epoch = epoch + 1 where id = $1 and epoch = $2 and lease_until = $3 and lease_until < now()",
            seen.lease.node.0,
            bigint(seen.lease.epoch),
            seen.until,
        )
        .execute(&self.pool)
        .await?;
        Ok(deposed.rows_affected() == 1)
    }

    /// What nodes had live when they were deposed, and still nobody has taken.
    pub async fn abandoned(&self) -> Result<Vec<Abandoned>, StoreError> {
        let places = sqlx::query!(
            r#"select sandboxes.id, node as "node!", sandboxes.epoch, claims, nodes.name
            from sandboxes join nodes on nodes.id = sandboxes.node
            where state in ('starting', 'running', 'paused') and sandboxes.epoch < nodes.epoch and lease_until < now()
            limit 1000"#
        )
        .fetch_all(&self.pool)
        .await?;
        let ids: Vec<Uuid> = places.iter().map(|place| place.id).collect();
        let rows = super::sandboxes::select_sandboxes!("id = any($1) and state in ('starting', 'running', 'paused')", &ids);
        let sandboxes = rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect::<Result<Vec<_>, _>>()?;
        let place_of = |sandbox: Sandbox| {
            let place = places.iter().find(|place| place.id == sandbox.id.0)?;
            let lease = Lease { node: NodeId(place.node), epoch: unsigned(place.epoch) };
            let hold = Hold { lease, claims: unsigned(place.claims) };
            Some(Abandoned { sandbox, hold, node_name: place.name.clone() })
        };
        Ok(sandboxes.into_iter().filter_map(place_of).collect())
    }

    /// Every node that ever was, the latest started first, or the one that is asked for.
    pub async fn list_nodes(&self, only: Option<NodeId>) -> Result<Vec<Node>, StoreError> {
        let rows = sqlx::query!(
            r#"select id, name, memory_bytes, cpu_millis, epoch, started_at, lease_until, lease_until >= now() as "is_alive!", drained_at,
                evict_at, (select count(*) from sandboxes where node = nodes.id and state in ('starting', 'running', 'paused')) as "live!"
            from nodes
            where $1::uuid is null or id = $1
            order by started_at desc, id
            limit 1000"#,
            only.map(|id| id.0) as _,
        )
        .fetch_all(&self.pool)
        .await?;
        let nodes = rows.into_iter().map(|row| Node {
            id: NodeId(row.id),
            name: row.name,
            capacity: Capacity { memory_bytes: unsigned(row.memory_bytes), cpu_millis: unsigned(row.cpu_millis) },
            epoch: unsigned(row.epoch),
            started_at: row.started_at,
            lease_until: row.lease_until,
            is_alive: row.is_alive,
            drained_at: row.drained_at,
            evict_at: row.evict_at,
            live: unsigned(row.live),
        });
        Ok(nodes.collect())
    }

    /// Has the node take no more work; what lives on it then is ended at `evict_at`, if one is given. False: there is no such node.
    pub async fn drain_node(&self, id: NodeId, evict_at: Option<OffsetDateTime>, act: &Act<'_>) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let found = sqlx::query!(
            "update nodes set drained_at = coalesce(drained_at, $2), evict_at = $3 where id = $1",
            id.0,
            act.at,
            evict_at as _
        )
        .execute(&mut *transaction)
        .await?;
        if found.rows_affected() == 0 {
            return Ok(false);
        }
        events::tell(&mut transaction, None, "node.drained", Some(&format!("node/{id}")), act).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Has the node take work again. False: there is no such node.
    pub async fn resume_node(&self, id: NodeId, act: &Act<'_>) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let found =
            sqlx::query!("update nodes set drained_at = null, evict_at = null where id = $1", id.0).execute(&mut *transaction).await?;
        if found.rows_affected() == 0 {
            return Ok(false);
        }
        events::tell(&mut transaction, None, "node.resumed", Some(&format!("node/{id}")), act).await?;
        transaction.commit().await?;
        Ok(true)
    }
}

/// Renews leases by a connection of its own: however many wait for the others, a node is not taken for dead.
#[derive(Debug)]
pub struct Renewer {
    options: Arc<PgConnectOptions>,
    connection: Option<PgConnection>,
}

impl Renewer {
    /// [`Store::renew`]. One that is given up begins with a new connection the next time.
    pub async fn renew(&mut self, lease: Lease, held_for: Duration) -> Result<Option<Orders>, StoreError> {
        let mut connection = self.take_connection().await?;
        let renewed = renew(&mut connection, lease, held_for).await?;
        self.give_connection(connection);
        Ok(renewed)
    }

    /// The connection, to be given back by whoever was answered over it.
    pub(super) async fn take_connection(&mut self) -> Result<PgConnection, StoreError> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => Ok(PgConnection::connect_with(&self.options).await?),
        }
    }

    pub(super) fn give_connection(&mut self, connection: PgConnection) {
        self.connection = Some(connection);
    }
}

async fn renew(executor: impl PgExecutor<'_>, lease: Lease, held_for: Duration) -> Result<Option<Orders>, StoreError> {
    let orders = sqlx::query_as!(
        Orders,
        r#"update nodes set lease_until = greatest(lease_until, clock_timestamp() + $3) where id = $1 and epoch = $2
        returning drained_at is not null as "is_drained!", evict_at"#,
        lease.node.0,
        bigint(lease.epoch),
        interval(held_for),
    );
    Ok(orders.fetch_optional(executor).await?)
}

/// A span of time as Postgres holds it.
fn interval(span: Duration) -> PgInterval {
    PgInterval { months: 0, days: 0, microseconds: i64::try_from(span.as_micros()).unwrap_or(i64::MAX) }
}

#[cfg(test)]
mod tests;
