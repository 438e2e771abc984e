//! The scheduler: takes queued sandboxes, in fair order, whenever there is room.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sandbox_core::protocol::{Cause, KillReason};

use super::{Engine, capacity::Room};
use crate::{
    sandbox::{Finish, Phases},
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
        let mut candidates = VecDeque::new();
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
                () = tokio::time::sleep(POLL) => {
                    candidates.clear();
                    self.look_around().await;
                }
            }
        }
    }

    async fn claim_what_fits(self: &Arc<Self>, candidates: &mut VecDeque<Candidate>) -> Result<(), StoreError> {
        loop {
            // Set before looking, so that room which becomes free from now on wakes the scheduler.
            self.has_queue.store(true, Ordering::SeqCst);
            if candidates.is_empty() {
                candidates.extend(self.store.next_queued(BATCH).await?);
            }
            let Some(candidate) = candidates.front() else {
                self.has_queue.store(false, Ordering::SeqCst);
                self.metrics.queue_depth.set(0);
                return Ok(());
            };
            let room = Room { memory_bytes: candidate.memory_bytes, cpu_millis: candidate.cpu_millis, sandboxes: 1 };
            // The first in the queue is not overtaken by smaller ones behind it: it would wait for ever.
            let Some(reservation) = self.capacity.reserve(room) else { return Ok(()) };
            let claimed = self.store.claim(candidate.id, self.node, self.clock.now()).await?;
            candidates.pop_front();
            if let Some((sandbox, input)) = claimed {
                let live = self.live.claimed(sandbox);
                tokio::spawn(Arc::clone(self).carry(live, input, reservation));
            }
        }
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
