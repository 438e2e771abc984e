//! Tables `volumes` and `mounts`: what there is on which node, and which sandboxes hold it.

use std::collections::BTreeMap;

use sandbox_core::protocol::VolumeId;
use serde_json::{Value, json};
use sqlx::{PgConnection, types::Json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Act, NodeId, Store, StoreError, bigint, damaged, events, unsigned};
use crate::sandbox::{Exceeded, NewVolume, QuotaScope, Quotas, SandboxId, TenantId, Volume};

/// What became of the wish for a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeBegun {
    /// It has a row, and is to be made.
    Now,
    /// It was made by an earlier call with the same id.
    Already(Box<Volume>),
    /// An earlier call with the same id is to make it, on this node.
    Elsewhere(NodeId),
    NameTaken,
    Exceeded(Exceeded),
}

/// What became of the wish that there be none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeEnd {
    /// It has no name any more; this node is to remove it.
    Of(VolumeId, NodeId),
    /// By these.
    InUse(Vec<SandboxId>),
    None,
}

/// Which volumes of a tenant to list.
#[derive(Debug, Clone, Default)]
pub struct VolumeFilter {
    /// All of these labels with these values.
    pub labels: BTreeMap<String, String>,
    /// And all of these, whatever their values.
    pub label_keys: Vec<String>,
    /// Behind this name.
    pub behind: Option<String>,
    pub limit: u32,
}

/// A volume that is not there yet, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    Making,
    Removing,
}

struct Row {
    id: Uuid,
    tenant: String,
    name: String,
    node: Uuid,
    size_bytes: i64,
    labels: Value,
    created_at: OffsetDateTime,
    used_by: Vec<Uuid>,
}

impl Row {
    fn read(self) -> Result<Volume, StoreError> {
        Ok(Volume {
            id: VolumeId(self.id),
            tenant: TenantId::proven(self.tenant),
            name: self.name,
            node: self.node,
            size_bytes: unsigned(self.size_bytes),
            labels: serde_json::from_value(self.labels).map_err(damaged)?,
            created_at: self.created_at,
            used_by: self.used_by.into_iter().map(SandboxId).collect(),
        })
    }
}

/// Reads whole rows of volumes that are ready; the further condition and what follows it are the caller's.
macro_rules! volumes {
    ($condition:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"select id, tenant, name, node, size_bytes, labels, created_at, array(
                    select sandboxes.id from mounts join sandboxes on sandboxes.id = mounts.sandbox
                    where mounts.volume = volumes.id and (sandboxes.state not in ('exited', 'failed') or sandboxes.keep_layer)
                    order by sandboxes.id
                    limit 100
                ) as "used_by!"
            from volumes
            where state = 'ready' and "# + $condition
            $(, $argument)*
        )
    };
}

impl Store {
    /// Gives a volume its row, unless its tenant has as much as it may, in the transaction that counts. It is `making` until [`Store::volume_made`].
    pub async fn begin_volume(
        &self,
        id: VolumeId,
        new: &NewVolume,
        node: NodeId,
        defaults: &Quotas,
        (tenant, act): (&TenantId, &Act<'_>),
    ) -> Result<VolumeBegun, StoreError> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query!("insert into tenants (id, created_at) values ($1, $2) on conflict do nothing", tenant.as_str(), act.at)
            .execute(&mut *transaction)
            .await?;
        let quotas = lock(&mut transaction, tenant).await?.over(defaults);
        if let Some(row) = sqlx::query!("select state, node from volumes where id = $1", id.0).fetch_optional(&mut *transaction).await? {
            transaction.rollback().await?;
            let made = self.volume_of(tenant, id).await?.filter(|_| row.state == "ready");
            return Ok(made.map_or(VolumeBegun::Elsewhere(NodeId(row.node)), |volume| VolumeBegun::Already(Box::new(volume))));
        }
        let used = sqlx::query!(
            r#"select count(*) as "count!", coalesce(sum(size_bytes), 0)::bigint as "bytes!",
                count(*) filter (where name = $2 and state <> 'removing') as "named!"
            from volumes where tenant = $1"#,
            tenant.as_str(),
            new.name,
        )
        .fetch_one(&mut *transaction)
        .await?;
        if used.named > 0 {
            transaction.rollback().await?;
            return Ok(VolumeBegun::NameTaken);
        }
        for (quota, used, more) in [("volumes", unsigned(used.count), 1), ("volume_bytes", unsigned(used.bytes), new.size_bytes)] {
            if let Some(limit) = quotas.number(quota)
                && used.saturating_add(more) > limit
            {
                transaction.rollback().await?;
                return Ok(VolumeBegun::Exceeded(Exceeded {
                    scope: QuotaScope::Tenant,
                    quota: quota.to_owned(),
                    limit: limit.into(),
                    used: used.into(),
                    retry_after_s: None,
                }));
            }
        }
        sqlx::query!(
            "insert into volumes (id, tenant, principal, name, node, state, size_bytes, labels, created_at)
            values ($1, $2, $3, $4, $5, 'making', $6, $7, $8)",
            id.0,
            tenant.as_str(),
            act.actor.map_or("", |actor| actor.principal.as_str()),
            new.name,
            node.0,
            bigint(new.size_bytes),
            Json(&new.labels) as _,
            act.at,
        )
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(VolumeBegun::Now)
    }

    /// Its node has it: from now on it can be used. `None` if it is not being made any more.
    pub async fn volume_made(&self, tenant: &TenantId, id: VolumeId, act: &Act<'_>) -> Result<Option<Volume>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let made = sqlx::query!("update volumes set state = 'ready' where id = $1 and state = 'making' returning name, size_bytes", id.0)
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(made) = made else { return Ok(None) };
        let act = Act { data: json!({ "size_bytes": made.size_bytes }), ..act.clone() };
        events::tell(&mut transaction, Some(tenant), "volume.created", Some(&format!("volume/{}", made.name)), &act).await?;
        transaction.commit().await?;
        self.told();
        self.volume_of(tenant, id).await
    }

    async fn volume_of(&self, tenant: &TenantId, id: VolumeId) -> Result<Option<Volume>, StoreError> {
        volumes!("tenant = $1 and id = $2", tenant.as_str(), id.0).fetch_optional(&self.pool).await?.map(Row::read).transpose()
    }

    /// The tenant's volume of this name.
    pub async fn find_volume(&self, tenant: &TenantId, name: &str) -> Result<Option<Volume>, StoreError> {
        volumes!("tenant = $1 and name = $2", tenant.as_str(), name).fetch_optional(&self.pool).await?.map(Row::read).transpose()
    }

    /// The tenant's volumes of these names.
    pub async fn volumes_named(&self, tenant: &TenantId, names: &[String]) -> Result<Vec<Volume>, StoreError> {
        let rows = volumes!("tenant = $1 and name = any($2)", tenant.as_str(), names).fetch_all(&self.pool).await?;
        rows.into_iter().map(Row::read).collect()
    }

    /// The tenant's volumes that are so, by name.
    pub async fn list_volumes(&self, tenant: &TenantId, filter: &VolumeFilter) -> Result<Vec<Volume>, StoreError> {
        let rows = volumes!(
            "tenant = $1 and labels @> $2 and (cardinality($3::text[]) = 0 or labels ?& $3)
                and ($4::text is null or name > $4)
            order by name limit $5",
            tenant.as_str(),
            Json(&filter.labels) as _,
            &filter.label_keys,
            filter.behind.as_deref() as _,
            i64::from(filter.limit),
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// Takes the tenant's volume its name, unless a sandbox holds it. Whoever would make one that does waits for this, and finds none.
    pub async fn end_volume(&self, tenant: &TenantId, name: &str, act: &Act<'_>) -> Result<VolumeEnd, StoreError> {
        let mut transaction = self.pool.begin().await?;
        // First, and by itself: what follows sees whoever was admitted before.
        sqlx::query!("select id from tenants where id = $1 for no key update", tenant.as_str()).fetch_optional(&mut *transaction).await?;
        let found = volumes!("tenant = $1 and name = $2", tenant.as_str(), name).fetch_optional(&mut *transaction).await?;
        let Some(volume) = found.map(Row::read).transpose()? else {
            transaction.rollback().await?;
            return Ok(VolumeEnd::None);
        };
        if !volume.used_by.is_empty() {
            transaction.rollback().await?;
            return Ok(VolumeEnd::InUse(volume.used_by));
        }
        sqlx::query!("update volumes set state = 'removing' where id = $1", volume.id.0).execute(&mut *transaction).await?;
        let act = Act { data: json!({ "size_bytes": volume.size_bytes }), ..act.clone() };
        events::tell(&mut transaction, Some(tenant), "volume.removed", Some(&format!("volume/{name}")), &act).await?;
        transaction.commit().await?;
        self.told();
        Ok(VolumeEnd::Of(volume.id, NodeId(volume.node)))
    }

    /// A volume that is being made is to be removed. False: it is not being made any more.
    pub async fn give_up_volume(&self, id: VolumeId) -> Result<bool, StoreError> {
        let done =
            sqlx::query!("update volumes set state = 'removing' where id = $1 and state = 'making'", id.0).execute(&self.pool).await?;
        Ok(done.rows_affected() > 0)
    }

    /// Nothing is left of a volume that was not made, or was to be removed.
    pub async fn forget_volume(&self, id: VolumeId) -> Result<(), StoreError> {
        sqlx::query!("delete from volumes where id = $1 and state <> 'ready'", id.0).execute(&self.pool).await?;
        Ok(())
    }

    /// What this node is still to make or to remove.
    pub async fn unfinished_volumes(&self, node: NodeId) -> Result<Vec<(VolumeId, Unfinished)>, StoreError> {
        let rows = sqlx::query!("select id, state from volumes where node = $1 and state <> 'ready'", node.0).fetch_all(&self.pool).await?;
        let state = |text: &str| if text == "making" { Unfinished::Making } else { Unfinished::Removing };
        Ok(rows.into_iter().map(|row| (VolumeId(row.id), state(&row.state))).collect())
    }

    /// Those of these volumes that have no row.
    pub async fn unknown_volumes(&self, ids: &[VolumeId]) -> Result<Vec<VolumeId>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let unknown = sqlx::query_scalar!(
            r#"select id as "id!" from unnest($1::uuid[]) as asked (id) where not exists (select 1 from volumes where volumes.id = asked.id)"#,
            &ids
        );
        Ok(unknown.fetch_all(&self.pool).await?.into_iter().map(VolumeId).collect())
    }

    /// Whether this node is heard of, and takes work.
    pub async fn is_node_there(&self, node: NodeId) -> Result<bool, StoreError> {
        let is_there = sqlx::query_scalar!(
            r#"select exists (select 1 from nodes where id = $1 and lease_until >= now() and drained_at is null) as "is_there!""#,
            node.0
        );
        Ok(is_there.fetch_one(&self.pool).await?)
    }
}

/// Takes the lock under which a tenant's quotas are counted. Its own quotas.
async fn lock(connection: &mut PgConnection, tenant: &TenantId) -> Result<Quotas, StoreError> {
    let quotas =
        sqlx::query_scalar!(r#"select quotas as "quotas: Json<Quotas>" from tenants where id = $1 for no key update"#, tenant.as_str());
    Ok(quotas.fetch_one(connection).await?.0)
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;

    use super::{
        super::{Admission, Admitted, Input, Lease, Promise, sandboxes::tests::*},
        *,
    };
    use crate::sandbox::{DefaultQuotas, Kind, Mount, Sandbox, State};

    fn tenant() -> TenantId {
        TenantId::proven("acme".into())
    }

    fn new(name: &str, size_bytes: u64) -> NewVolume {
        NewVolume { name: name.into(), size_bytes, labels: BTreeMap::from([("a".into(), "1".into())]) }
    }

    async fn begin(store: &Store, lease: Lease, new: &NewVolume, quotas: &Quotas) -> (VolumeId, VolumeBegun) {
        let id = VolumeId(Uuid::now_v7());
        (id, store.begin_volume(id, new, lease.node, quotas, (&tenant(), &act())).await.unwrap())
    }

    async fn make(store: &Store, lease: Lease, name: &str) -> Volume {
        let (id, begun) = begin(store, lease, &new(name, 1000), &Quotas::default()).await;
        assert_eq!(begun, VolumeBegun::Now);
        assert_eq!(store.find_volume(&tenant(), name).await.unwrap(), None, "it is not there yet");
        store.volume_made(&tenant(), id, &act()).await.unwrap().unwrap()
    }

    fn with(sandbox: Sandbox, volume: &Volume) -> Sandbox {
        let mount = Mount { volume: volume.id, name: volume.name.clone(), path: "/data".into(), read_only: false };
        let program = crate::sandbox::Program { volumes: vec![mount], ..sandbox.program };
        Sandbox { program, ..sandbox }
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_volume_is_there_once_it_is_made_and_counts_before(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        let quotas: Quotas = serde_json::from_value(json!({ "volumes": 2, "volume_bytes": 1500 })).unwrap();
        let (id, _) = begin(&store, lease, &new("a", 1000), &quotas).await;
        for (name, size, quota) in [("a", 1, None), ("b", 501, Some("volume_bytes"))] {
            match (begin(&store, lease, &new(name, size), &quotas).await.1, quota) {
                (VolumeBegun::NameTaken, None) => {}
                (VolumeBegun::Exceeded(exceeded), Some(quota)) => assert_eq!(exceeded.quota, quota),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(begin(&store, lease, &new("b", 500), &quotas).await.1, VolumeBegun::Now);
        assert!(
            matches!(begin(&store, lease, &new("c", 0), &quotas).await.1, VolumeBegun::Exceeded(exceeded) if exceeded.quota == "volumes")
        );
        let again = store.begin_volume(id, &new("a", 1000), lease.node, &quotas, (&tenant(), &act())).await.unwrap();
        assert_eq!(again, VolumeBegun::Elsewhere(lease.node));

        let made = store.volume_made(&tenant(), id, &act()).await.unwrap().unwrap();
        assert_eq!((made.name.as_str(), made.size_bytes, made.used_by.as_slice()), ("a", 1000, &[][..]));
        assert_eq!(store.find_volume(&tenant(), "a").await.unwrap().as_ref(), Some(&made));
        let again = store.begin_volume(id, &new("a", 1000), lease.node, &quotas, (&tenant(), &act())).await.unwrap();
        assert_eq!(again, VolumeBegun::Already(Box::new(made)));
        assert_eq!(store.volume_made(&tenant(), id, &act()).await.unwrap(), None, "once");
        assert_eq!(store.find_volume(&TenantId::proven("other".into()), "a").await.unwrap(), None);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn one_that_a_sandbox_holds_is_not_ended_and_one_that_is_ended_is_held_by_none(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        let volume = make(&store, lease, "data").await;
        let (first, second) = (sandbox("acme", Kind::Run, None), sandbox("acme", Kind::Run, None));
        let (first, second) = (with(first, &volume), with(second, &volume));
        assert!(admit(&store, &first, lease).await);
        let strangers = Sandbox { tenant: TenantId::proven("other".into()), ..with(sandbox("acme", Kind::Run, None), &volume) };
        assert!(!admit(&store, &strangers, lease).await, "it is not theirs");

        let held = store.end_volume(&tenant(), "data", &act()).await.unwrap();
        assert_eq!(held, VolumeEnd::InUse(vec![first.id]));
        assert!(store.forget_volume(volume.id).await.is_ok() && store.find_volume(&tenant(), "data").await.unwrap().is_some());
        sqlx::query("update sandboxes set state = 'failed', outcome = '{}', reason = 'x', finished_at = now()")
            .execute(&store.pool)
            .await
            .unwrap();
        assert_eq!(store.end_volume(&tenant(), "data", &act()).await.unwrap(), VolumeEnd::Of(volume.id, lease.node));

        let none = DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() };
        assert_eq!(ask(&store, &second, lease, &Input::default(), &none).await, Admitted::VolumeGone);
        assert_eq!(store.end_volume(&tenant(), "data", &act()).await.unwrap(), VolumeEnd::None);
        assert_eq!(store.unfinished_volumes(lease.node).await.unwrap(), [(volume.id, Unfinished::Removing)]);
        let unknown = VolumeId(Uuid::now_v7());
        assert_eq!(store.unknown_volumes(&[volume.id, unknown]).await.unwrap(), [unknown]);
        // Its name is free before it is gone.
        make(&store, lease, "data").await;
        store.forget_volume(volume.id).await.unwrap();
        assert_eq!(store.unfinished_volumes(lease.node).await.unwrap(), []);
        let kinds =
            sqlx::query_scalar!("select kind from events where kind like 'volume.%' order by id").fetch_all(&store.pool).await.unwrap();
        assert_eq!(kinds, ["volume.created", "volume.removed", "volume.created"]);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn what_has_volumes_is_claimed_where_they_are(pool: PgPool) {
        let (store, lease) = store_with_node(pool).await;
        let other = NodeId(Uuid::now_v7());
        let capacity = super::super::NodeCapacity { memory_bytes: 1, cpu_millis: 1 };
        let other = store.take_node(other, "other", capacity, OffsetDateTime::UNIX_EPOCH, HELD_FOR).await.unwrap();
        let volume = make(&store, lease, "data").await;
        let queued = Sandbox { state: State::Queued, claimed_at: None, ..with(sandbox("acme", Kind::Run, None), &volume) };
        let none = DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() };
        store.introduce(&owner(&queued), queued.created_at).await.unwrap();
        let admission = Admission {
            sandbox: &queued,
            lease: other,
            input: &Input::default(),
            cases: &[],
            asked: &json!({}),
            network: "none",
            isolation: "container",
            defaults: &none,
            queue_max: 10,
            wanted_node: Some(lease.node),
            key: None,
            promise: Promise::Now,
        };
        assert!(matches!(store.admit(admission).await.unwrap(), Admitted::Yes { .. }));

        let now = OffsetDateTime::UNIX_EPOCH;
        assert_eq!(store.next_queued(9, other.node, now).await.unwrap(), []);
        assert!(store.claim(queued.id, other, now).await.unwrap().is_none());
        assert_eq!(store.next_queued(9, lease.node, now).await.unwrap().len(), 1);
        assert_eq!(store.claim(queued.id, lease, now).await.unwrap().unwrap().0.program, queued.program);
    }
}
