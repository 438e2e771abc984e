//! Table `nodes`: the machines that run sandboxes.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError, bigint};

/// Names a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub(super) Uuid);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl Store {
    /// Says that the node of this name serves now, with so much to give. The same name is the same node for good.
    pub async fn register_node(&self, name: &str, memory_bytes: u64, cpu_millis: u64, now: OffsetDateTime) -> Result<NodeId, StoreError> {
        let id = sqlx::query_scalar!(
            "insert into nodes (id, name, memory_bytes, cpu_millis, started_at)
             values ($1, $2, $3, $4, $5)
             on conflict (name) do update
             set memory_bytes = excluded.memory_bytes, cpu_millis = excluded.cpu_millis, started_at = excluded.started_at
             returning id",
            Uuid::now_v7(),
            name,
            bigint(memory_bytes),
            bigint(cpu_millis),
            now,
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(NodeId(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[sqlx::test(migrations = "../migrations")]
    async fn a_node_that_comes_back_is_the_same_node(pool: sqlx::PgPool) {
        let store = Store { pool };
        let first = store.register_node("host:/var/lib/mayfly", 1, 1, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        let again = store.register_node("host:/var/lib/mayfly", 2, 2, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        let other = store.register_node("host:/srv/mayfly", 1, 1, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
    }
}
