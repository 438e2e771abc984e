//! Table `nodes`: the machines that run sandboxes.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError, bigint};

/// Names a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub Uuid);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl Store {
    /// Says that this node serves now, with so much to give. Its name is for people.
    pub async fn register_node(
        &self,
        id: NodeId,
        name: &str,
        memory_bytes: u64,
        cpu_millis: u64,
        now: OffsetDateTime,
    ) -> Result<(), StoreError> {
        sqlx::query!(
            "insert into nodes (id, name, memory_bytes, cpu_millis, started_at)
             values ($1, $2, $3, $4, $5)
             on conflict (id) do update
             set name = excluded.name, memory_bytes = excluded.memory_bytes, cpu_millis = excluded.cpu_millis,
                 started_at = excluded.started_at",
            id.0,
            name,
            bigint(memory_bytes),
            bigint(cpu_millis),
            now,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[sqlx::test(migrations = "../migrations")]
    async fn a_node_whose_host_is_renamed_is_the_same_node(pool: sqlx::PgPool) {
        let store = Store { pool: pool.clone() };
        let (node, other) = (NodeId(Uuid::now_v7()), NodeId(Uuid::now_v7()));
        store.register_node(node, "old:/var/lib/mayfly", 1, 1, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        store.register_node(node, "new:/var/lib/mayfly", 2, 2, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        store.register_node(other, "new:/var/lib/mayfly", 1, 1, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        let count = sqlx::query_scalar!(r#"select count(*) as "count!" from nodes"#).fetch_one(&pool).await.unwrap();
        assert_eq!(count, 2);
    }
}
