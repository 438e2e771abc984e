//! Table `nodes` as one node looks at the others: where each is reached, how much room it has, and what lives there.

use super::{Lease, NodeCapacity, NodeId, Renewer, Store, StoreError, bigint, damaged, unsigned};
use crate::sandbox::{SandboxId, State, TenantId};

/// Where other nodes reach a node, and what proves to it that one of them asks.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerDoor {
    pub address: String,
    pub key: String,
}

impl std::fmt::Debug for PeerDoor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerDoor").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Another node whose lease holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub id: NodeId,
    pub door: PeerDoor,
    pub is_drained: bool,
    pub capacity: NodeCapacity,
    /// What of that is promised, as it last said.
    pub committed: NodeCapacity,
}

/// Where a sandbox lives, or lived: what is needed to know who can answer for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    pub id: SandboxId,
    pub state: State,
    /// Whether it can go on, once it has ended, on its node alone: what it wrote, or its volumes, are there.
    pub is_bound: bool,
    /// Whether its node has more of its log than is stored.
    pub has_log_file: bool,
    /// `None`: it waits for one.
    pub node: Option<HomeNode>,
}

/// The node that has it, or had it last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HomeNode {
    pub id: NodeId,
    /// Whether its lease holds.
    pub is_alive: bool,
    /// `None`: other nodes do not reach it.
    pub door: Option<PeerDoor>,
}

impl Store {
    /// Says where other nodes reach this one, or that they do not.
    pub async fn open_to_peers(&self, lease: Lease, door: Option<&PeerDoor>) -> Result<(), StoreError> {
        sqlx::query!(
            "update nodes set peer_address = $3, peer_key = $4 where id = $1 and epoch = $2",
            lease.node.0,
            bigint(lease.epoch),
            door.map(|door| door.address.as_str()) as _,
            door.map(|door| door.key.as_str()) as _,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Where the tenant's sandbox or run lives that is called this, by id or by name.
    pub async fn home(&self, tenant: &TenantId, id: Option<SandboxId>, name: &str) -> Result<Option<Home>, StoreError> {
        let row = sqlx::query!(
            r#"select sandboxes.id, state, keep_layer or wanted_node is not null as "is_bound!", has_log_file, node,
                lease_until >= now() as "is_alive?", peer_address as "peer_address?", peer_key as "peer_key?"
            from sandboxes left join nodes on nodes.id = node
            where tenant = $1 and (sandboxes.id = $2 or $2 is null and sandboxes.name = $3)"#,
            tenant.as_str(),
            id.map(|id| id.0) as _,
            name,
        )
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let door = door(row.peer_address, row.peer_key);
        let node = row.node.map(|id| HomeNode { id: NodeId(id), is_alive: row.is_alive.unwrap_or(false), door });
        let state = State::named(&row.state).ok_or_else(|| damaged(format!("the state {}", row.state)))?;
        Ok(Some(Home { id: SandboxId(row.id), state, is_bound: row.is_bound, has_log_file: row.has_log_file, node }))
    }
}

impl Renewer {
    /// Says how much of this node is promised, and looks who the others are that are reached and alive. By the connection that leases are renewed by.
    pub async fn meet(&mut self, lease: Lease, committed: NodeCapacity) -> Result<Vec<Peer>, StoreError> {
        let mut connection = self.take_connection().await?;
        let rows = sqlx::query!(
            r#"with said as (
                update nodes set committed_memory_bytes = $3, committed_cpu_millis = $4 where id = $1 and epoch = $2
            )
            select id, peer_address as "address!", peer_key as "key!", drained_at is not null as "is_drained!", memory_bytes, cpu_millis,
                committed_memory_bytes, committed_cpu_millis
            from nodes
            where id <> $1 and peer_address is not null and lease_until >= now()
            order by id"#,
            lease.node.0,
            bigint(lease.epoch),
            bigint(committed.memory_bytes),
            bigint(committed.cpu_millis),
        )
        .fetch_all(&mut connection)
        .await?;
        self.give_connection(connection);
        let peers = rows.into_iter().map(|row| Peer {
            id: NodeId(row.id),
            door: PeerDoor { address: row.address, key: row.key },
            is_drained: row.is_drained,
            capacity: NodeCapacity { memory_bytes: unsigned(row.memory_bytes), cpu_millis: unsigned(row.cpu_millis) },
            committed: NodeCapacity { memory_bytes: unsigned(row.committed_memory_bytes), cpu_millis: unsigned(row.committed_cpu_millis) },
        });
        Ok(peers.collect())
    }
}

fn door(address: Option<String>, key: Option<String>) -> Option<PeerDoor> {
    address.zip(key).map(|(address, key)| PeerDoor { address, key })
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;
    use uuid::Uuid;

    use super::{super::sandboxes::tests::*, *};
    use crate::sandbox::{Kind, Sandbox};

    fn opened(number: u32) -> PeerDoor {
        PeerDoor { address: format!("https://node-{number}.example"), key: format!("key-{number}") }
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn where_something_lives_is_told_to_its_tenant_alone(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        let sandbox = Sandbox { name: Some("mine".into()), ..sandbox("acme", Kind::Sandbox, None) };
        assert!(admit(&store, &sandbox, lease).await);
        let stranger = TenantId::proven("other".into());

        let alone = store.home(&sandbox.tenant, Some(sandbox.id), "").await.unwrap().unwrap();
        store.open_to_peers(lease, Some(&opened(1))).await.unwrap();
        let named = store.home(&sandbox.tenant, None, "mine").await.unwrap().unwrap();

        let node = HomeNode { id: lease.node, is_alive: true, door: None };
        assert_eq!(alone, Home { id: sandbox.id, state: State::Starting, is_bound: false, has_log_file: false, node: Some(node.clone()) });
        assert_eq!(named.node, Some(HomeNode { door: Some(opened(1)), ..node }));
        for (id, name) in [(Some(sandbox.id), ""), (None, "mine")] {
            assert_eq!(store.home(&stranger, id, name).await.unwrap(), None);
        }
        store.release(lease).await.unwrap();
        let dead = store.home(&sandbox.tenant, Some(sandbox.id), "").await.unwrap().unwrap();
        assert!(!dead.node.unwrap().is_alive);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn nodes_meet_that_are_alive_and_reached(pool: PgPool) {
        let (store, own) = store_with_node(pool).await;
        let [reached, shut, dead] = [
            take_node(&store, NodeId(Uuid::now_v7())).await,
            take_node(&store, NodeId(Uuid::now_v7())).await,
            take_node(&store, NodeId(Uuid::now_v7())).await,
        ];
        for (lease, number) in [(own, 0), (reached, 1), (dead, 3)] {
            store.open_to_peers(lease, Some(&opened(number))).await.unwrap();
        }
        store.open_to_peers(shut, None).await.unwrap();
        store.release(dead).await.unwrap();
        let committed = NodeCapacity { memory_bytes: 7, cpu_millis: 8 };

        let met = store.renewer().meet(reached, committed).await.unwrap();
        let seen = store.renewer().meet(own, NodeCapacity { memory_bytes: 0, cpu_millis: 0 }).await.unwrap();

        assert_eq!(met.iter().map(|peer| peer.id).collect::<Vec<_>>(), [own.node]);
        assert_eq!(
            seen.iter().map(|peer| (peer.id, peer.door.clone(), peer.committed)).collect::<Vec<_>>(),
            [(reached.node, opened(1), committed)]
        );
    }
}
