//! The scheduler: takes queued sandboxes, in fair order, whenever there is room.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sandbox_core::protocol::{Cause, KillReason};
use tokio::time::MissedTickBehavior;

use super::{Engine, capacity::Room};
use crate::{
    sandbox::{Finish, Phases, SandboxId, TenantId},
    store::{Candidate, QueueListener, StoreError},
};

/// Between two looks that nobody asked for: a message can be lost, a time to live can be over.
const POLL: Duration = Duration::from_secs(1);
/// How many candidates are fetched at once.
const BATCH: u32 = 32;

impl Engine {
    /// Schedules until the engine stops, or its keeper is gone.
    pub(super) async fn schedule(self: Arc<Self>) {
        let mut listener = None;
        let mut candidates = Vec::new();
        // Made once: whatever else wakes us, and however often, must not put it off.
        let mut look = tokio::time::interval(POLL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.stopping.is_cancelled() {
                return;
            }
            if let Err(error) = self.claim_what_fits(&mut candidates).await {
                tracing::warn!(%error, "looking at the queue failed");
            }
            if listener.is_none() {
                listener = self.store.listen_to_queue().await.ok();
            }
            tokio::select! {
                () = self.stopping.cancelled() => return,
                // Nothing can be started any more, and what was running is over.
                () = self.keeper.gone() => self.stopping.cancel(),
                () = self.wake.notified() => {}
                () = heard(&mut listener) => candidates.clear(),
                _ = look.tick() => {
                    candidates.clear();
                    self.look_around().await;
                }
            }
        }
    }

    /// Claims in fair order. A tenant whose first does not fit is passed over, with all that it has behind it: its order is kept, and no
    /// other tenant waits for it. `candidates` are in order; those of tenants that were passed over stay in it.
    async fn claim_what_fits(self: &Arc<Self>, candidates: &mut Vec<Candidate>) -> Result<(), StoreError> {
        let mut passed_over: Vec<TenantId> = Vec::new();
        let mut at = 0;
        while !self.stopping.is_cancelled() {
            // Set before looking, so that room which becomes free from now on wakes the scheduler.
            self.has_queue.store(true, Ordering::SeqCst);
            let Some(candidate) = candidates.get(at) else {
                let more = self.store.next_queued(BATCH, &passed_over).await?;
                if more.is_empty() {
                    if passed_over.is_empty() {
                        self.has_queue.store(false, Ordering::SeqCst);
                        self.metrics.queue_depth.set(0);
                    }
                    return Ok(());
                }
                candidates.extend(more);
                continue;
            };
            if passed_over.contains(&candidate.tenant) {
                at += 1;
                continue;
            }
            let room = Room { memory_bytes: candidate.memory_bytes, cpu_millis: candidate.cpu_millis, sandboxes: 1 };
            let Some(reservation) = self.capacity.reserve(room) else {
                passed_over.push(candidate.tenant.clone());
                continue;
            };
            let id = candidate.id;
            match self.store.claim(id, self.node, self.clock.now()).await {
                Ok(claimed) => {
                    candidates.remove(at);
                    if let Some((sandbox, input)) = claimed {
                        let live = self.live.claimed(sandbox);
                        tokio::spawn(Arc::clone(self).carry(live, input, reservation));
                    }
                }
                Err(error) => {
                    if matches!(error, StoreError::Unavailable(_)) {
                        self.end_unclear_claim(id).await;
                    }
                    candidates.clear();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Ends a sandbox whose claim may have been committed or not: what it was to be given is lost with the answer. Returns when that is
    /// clear: until then it must not be claimed again.
    async fn end_unclear_claim(self: &Arc<Self>, id: SandboxId) {
        let rows = loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            match self.store.live_of(self.node).await {
                Ok(rows) => break rows,
                Err(error) => tracing::warn!(sandbox.id = %id, %error, "whether it was claimed is not known yet"),
            }
        };
        let Some(row) = rows.into_iter().find(|row| row.id == id) else { return };
        let live = self.live.claimed(row);
        let ending = self.infra_error("the connection to the database broke while it was taken from the queue".to_owned());
        let engine = Arc::clone(self);
        tokio::spawn(async move { engine.settle(&live, &ending).await });
    }

    async fn look_around(&self) {
        self.metrics.keeper_reconnects(self.keeper.reconnects());
        if !self.has_queue.load(Ordering::SeqCst) {
            return;
        }
        match self.store.queue_depth().await {
            Ok(depth) => self.metrics.queue_depth.set(i64::try_from(depth).unwrap_or(i64::MAX)),
            Err(error) => tracing::warn!(%error, "counting the queue failed"),
        }
        let now = self.clock.now();
        match self.store.overdue_queued(now).await {
            Ok(overdue) => {
                for sandbox in overdue {
                    let total = Phases::ms((now - sandbox.created_at).unsigned_abs());
                    let phases = Phases { queue: total, total, ..Phases::default() };
                    let finish = Finish::without_usage(Cause::Killed(KillReason::Expired), now, &sandbox.limits, phases);
                    self.settle_queued(&sandbox, finish).await;
                }
            }
            Err(error) => tracing::warn!(%error, "looking for overdue sandboxes failed"),
        }
    }
}

async fn heard(listener: &mut Option<QueueListener>) {
    match listener {
        Some(listener) => listener.heard().await,
        None => std::future::pending().await,
    }
}
