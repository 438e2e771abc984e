//! Volumes: made and removed on the node that they are on, held by the sandboxes that they stand in.
//!
//! The row comes first and goes last: a file without a row is nobody's and is removed, and a row whose file is not made yet, or is to be removed, is finished by
//! whoever looks next. In between the keeper is asked, which does everything at once or not at all.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sandbox_core::{
    fail_point,
    protocol::{Failure, FailureKind, VolumeId},
};
use serde_json::Value;
use tokio::time::Instant;

use super::{Engine, EngineError, Owner, life::detached};
use crate::{
    runtime::CallError,
    sandbox::{Mount, MountRequest, NewVolume, Sandbox, TenantId, Volume},
    store::{Act, NodeId, StoreError, Unfinished, VolumeBegun, VolumeEnd},
};

/// How long a keeper may be busy with others, or away, before it is given up on.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two attempts at what the keeper is too busy for.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Volumes that this process is making: nobody else is to finish them.
#[derive(Debug, Default)]
pub(super) struct Making(Mutex<HashSet<VolumeId>>);

impl Making {
    fn lock(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that one is being made until it is dropped.
struct Maker {
    engine: Arc<Engine>,
    id: VolumeId,
}

impl Maker {
    fn begin(engine: &Arc<Engine>, id: VolumeId) -> Self {
        engine.making.lock().insert(id);
        Self { engine: Arc::clone(engine), id }
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.engine.making.lock().remove(&self.id);
    }
}

impl Engine {
    /// Makes a volume on this node. One of the same id that was made before is left as it is. A caller who goes away changes nothing.
    pub async fn create_volume(self: &Arc<Self>, owner: Owner, id: VolumeId, new: NewVolume) -> Result<Volume, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.create_volume_now(&owner, id, &new).await }).await
    }

    async fn create_volume_now(self: &Arc<Self>, owner: &Owner, id: VolumeId, new: &NewVolume) -> Result<Volume, EngineError> {
        self.keeper.hello().filter(|_| !self.is_closing()).ok_or(EngineError::KeeperUnavailable)?;
        let _maker = Maker::begin(self, id);
        let act = Act { actor: Some(owner), at: self.clock.now(), data: Value::Null };
        match self.store.begin_volume(id, new, self.node, &self.tenancy.defaults.tenant, (&owner.tenant, &act)).await? {
            VolumeBegun::Now => {}
            VolumeBegun::Already(volume) => return Ok(*volume),
            VolumeBegun::Elsewhere(node) => {
                let why = format!("an earlier attempt at this request was begun on node {}, which has not said how it ended", node.0);
                return Err(EngineError::Busy(why));
            }
            VolumeBegun::NameTaken => return Err(EngineError::NameTaken),
            VolumeBegun::Exceeded(exceeded) => return Err(EngineError::QuotaExceeded(Box::new(exceeded))),
        }
        fail_point::reached("service.volume.begun");
        let made = self.patiently(|| self.keeper.make_volume(id, new.size_bytes, new.inodes())).await;
        fail_point::reached("service.volume.made");
        if let Err(error) = made {
            // What is known to have failed is over now; what is not is looked at later.
            if !matches!(error, CallError::Lost) && self.keeper.remove_volume(id).await.is_ok() {
                self.store.forget_volume(id).await?;
            }
            return Err(refused(error));
        }
        let made = self.store.volume_made(&owner.tenant, id, &act).await?;
        fail_point::reached("service.volume.stored");
        made.ok_or_else(|| EngineError::Busy("the volume was given up meanwhile".to_owned()))
    }

    /// Removes the tenant's volume of this name. False: there is none. One on another node loses its name now, and is removed there.
    pub async fn remove_volume(self: &Arc<Self>, owner: Owner, name: String) -> Result<bool, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.remove_volume_now(&owner, &name).await }).await
    }

    async fn remove_volume_now(self: &Arc<Self>, owner: &Owner, name: &str) -> Result<bool, EngineError> {
        let act = Act { actor: Some(owner), at: self.clock.now(), data: Value::Null };
        let (id, node) = match self.store.end_volume(&owner.tenant, name, &act).await? {
            VolumeEnd::None => return Ok(false),
            VolumeEnd::InUse(by) => {
                let by: Vec<String> = by.iter().take(5).map(ToString::to_string).collect();
                return Err(EngineError::VolumeInUse(format!("the volume {name} stands in {}", by.join(", "))));
            }
            VolumeEnd::Of(id, node) => (id, node),
        };
        fail_point::reached("service.volume.ended");
        if node == self.node
            && let Err(error) = self.finish_removal(id).await
        {
            // It has no name any more; what is left is removed later.
            tracing::warn!(volume.id = %id, %error, "a volume is not removed yet");
        }
        Ok(true)
    }

    async fn finish_removal(&self, id: VolumeId) -> Result<(), EngineError> {
        // What is left of a sandbox that had it may still be going.
        self.patiently(|| self.keeper.remove_volume(id)).await.map_err(refused)?;
        fail_point::reached("service.volume.removed");
        Ok(self.store.forget_volume(id).await?)
    }

    /// Asks the keeper until it is neither too busy nor away.
    async fn patiently<F: Future<Output = Result<(), CallError>>>(&self, ask: impl Fn() -> F) -> Result<(), CallError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = tokio::time::timeout_at(deadline, async {
                self.keeper.connected().await;
                ask().await
            });
            let answer = answer.await.unwrap_or(Err(CallError::Lost));
            let may_come = matches!(&answer, Err(CallError::Lost | CallError::Failed(Failure { kind: FailureKind::Busy, .. })));
            if !may_come || Instant::now() >= deadline {
                return answer;
            }
            tokio::time::sleep(BUSY_PAUSE).await;
        }
    }

    /// Removes what this node has of volumes that were not made to the end, or are to be removed, or that no row knows.
    pub(super) async fn tend_volumes(self: &Arc<Self>) -> anyhow::Result<()> {
        // In this order: one that had a file had a row before.
        let files = self.keeper.volumes().await?;
        let rows = self.store.unfinished_volumes(self.node).await?;
        let in_work: HashSet<VolumeId> = self.making.lock().clone();
        for (id, unfinished) in rows {
            // Nobody was told that it is there. Whoever makes it all the same hears of this.
            if unfinished == Unfinished::Making && (in_work.contains(&id) || !self.store.give_up_volume(id).await?) {
                continue;
            }
            if self.keeper.remove_volume(id).await.is_ok() {
                self.store.forget_volume(id).await?;
            }
        }
        for id in self.store.unknown_volumes(&files).await? {
            if !in_work.contains(&id) {
                tracing::info!(volume.id = %id, "removing a volume that nobody knows");
                self.keeper.remove_volume(id).await?;
            }
        }
        Ok(())
    }

    /// What these requests mean, and the node that all of it is on.
    pub(super) async fn mounts(&self, tenant: &TenantId, asked: &[MountRequest]) -> Result<(Vec<Mount>, Option<NodeId>), EngineError> {
        if asked.is_empty() {
            return Ok((Vec::new(), None));
        }
        let names: BTreeSet<String> = asked.iter().map(|mount| mount.name.clone()).collect();
        let names: Vec<String> = names.into_iter().collect();
        let found: HashMap<String, Volume> =
            self.store.volumes_named(tenant, &names).await?.into_iter().map(|volume| (volume.name.clone(), volume)).collect();
        let mut node = None;
        let mut mounts = Vec::new();
        for MountRequest { name, path, read_only } in asked.iter().cloned() {
            let volume = found.get(&name).ok_or_else(|| EngineError::VolumeNotFound(name.clone()))?;
            if node.replace(NodeId(volume.node)).is_some_and(|other| other != NodeId(volume.node)) {
                return Err(EngineError::VolumeElsewhere(format!("the volume {name} is on another node than others of them")));
            }
            mounts.push(Mount { volume: volume.id, name, path, read_only });
        }
        if let Some(node) = node.filter(|node| *node != self.node)
            && !self.store.is_node_there(node).await?
        {
            return Err(EngineError::VolumeElsewhere(format!("the node {} that the volumes are on is away, or is drained", node.0)));
        }
        Ok((mounts, node))
    }

    /// Whether what stood in a sandbox can stand in it again, here.
    pub(super) async fn check_mounts(&self, sandbox: &Sandbox) -> Result<(), EngineError> {
        let names: Vec<String> = sandbox.program.volumes.iter().map(|mount| mount.name.clone()).collect();
        if names.is_empty() {
            return Ok(());
        }
        let found = self.store.volumes_named(&sandbox.tenant, &names).await?;
        for mount in &sandbox.program.volumes {
            let Some(volume) = found.iter().find(|volume| volume.id == mount.volume) else {
                return Err(EngineError::VolumeNotFound(mount.name.clone()));
            };
            if NodeId(volume.node) != self.node {
                return Err(EngineError::VolumeElsewhere(format!("the volume {} is on another node", mount.name)));
            }
        }
        Ok(())
    }
}

/// What a caller hears of a keeper that did not do it.
fn refused(error: CallError) -> EngineError {
    match error {
        CallError::Lost => EngineError::KeeperUnavailable,
        CallError::Failed(failure) => match failure.kind {
            // The disk is full, above all.
            FailureKind::Busy | FailureKind::Host => EngineError::Busy(failure.message),
            FailureKind::Refused => EngineError::Refused(failure.message),
            FailureKind::Gone => EngineError::Store(StoreError::Other(failure.into())),
        },
    }
}
