//! What a service does that finds the rows and the keeper's records of the one before it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use sandbox_core::protocol::KillReason;

use super::{Engine, capacity::Room};
use crate::sandbox::SandboxId;

impl Engine {
    /// Follows what lives, settles what ended, reports what is lost, and drops what nobody knows.
    pub(super) async fn recover(self: &Arc<Self>) -> anyhow::Result<()> {
        let keeper = self.keeper.connected().await;
        let records = self.keeper.list().await.context("asking the keeper for its sandboxes failed")?;
        let mut records: HashMap<_, _> = records.into_iter().map(|record| (record.id, record)).collect();
        let rows = self.store.live_of(self.node).await.context("reading this node's sandboxes failed")?;
        let (mut adopted, mut lost) = (0_u32, 0_u32);
        for sandbox in rows {
            let room = Room { memory_bytes: sandbox.limits.memory_bytes(), cpu_millis: sandbox.limits.cpu_millis(), sandboxes: 1 };
            let record = records.remove(&sandbox.id);
            let live = self.live.insert(sandbox, Duration::ZERO);
            match record {
                Some(record) => {
                    adopted += 1;
                    let reservation = self.capacity.reserve_for_live(room);
                    tokio::spawn(Arc::clone(self).adopt(live, keeper.started_at_us, record.launched, reservation));
                }
                None => {
                    lost += 1;
                    let message = "its node's keeper was started anew, or never got the order to start it";
                    let ending = self.infra_error(message.to_owned());
                    let engine = Arc::clone(self);
                    tokio::spawn(async move { engine.settle(&live, &ending).await });
                }
            }
        }
        let kept: HashSet<SandboxId> = self.store.kept_logs(self.node, None).await?.into_iter().collect();
        let leftover: Vec<_> = records.into_keys().filter(|id| !kept.contains(id)).collect();
        if adopted + lost > 0 || !leftover.is_empty() {
            tracing::info!(adopted, lost, leftover = leftover.len(), "took over what the last service left behind");
        }
        for id in leftover {
            tokio::spawn(Arc::clone(self).drop_leftover(id));
        }
        Ok(())
    }

    /// Ends and forgets a sandbox whose row is final or gone.
    async fn drop_leftover(self: Arc<Self>, id: SandboxId) {
        if let Err(error) = self.keeper.kill(id, KillReason::Evicted).await {
            tracing::warn!(sandbox.id = %id, %error, "ending a leftover sandbox failed");
        }
        if let Ok(ended) = self.keeper.wait(id).await {
            // However it ended, nobody asks.
            drop(ended.await);
        }
        self.forget(id).await;
    }
}
