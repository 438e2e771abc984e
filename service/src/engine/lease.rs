//! This node's lease: taken at the start, renewed, taken anew when it was lost. And what becomes of nodes that let theirs lapse.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sandbox_core::protocol::{Cause, KillReason};
use tokio::time::Instant;

use super::{Engine, Progress};
use crate::{
    sandbox::{Finish, Kind, LogTail, Phases},
    store::{Abandoned, Ended, Lease, LogKept, NodeCapacity, NodeId, Orders, Return, Store, StoreError, Writer},
};

/// How often a lease is renewed before it would end.
const RENEWALS: u32 = 5;
/// How long others leave a node alone whose service ended and left its sandboxes to the next one.
const HANDED_OVER_FOR: Duration = Duration::from_secs(60);
/// How long a run that failed here is left to other nodes.
pub(super) const LEFT_TO_OTHERS: Duration = Duration::from_secs(10);

/// What a node is known by.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) node: NodeId,
    /// For people.
    pub(super) name: String,
    pub(super) capacity: NodeCapacity,
    /// How long it counts as alive without being heard of.
    pub(super) held_for: Duration,
}

/// The lease and what came with its last renewal.
#[derive(Debug)]
pub(super) struct Tenure {
    pub(super) identity: Identity,
    now: Mutex<(Lease, Orders)>,
}

impl Tenure {
    /// Takes the node, from whomever had it.
    pub(super) async fn begin(store: &Store, identity: Identity, now: time::OffsetDateTime) -> Result<Self, StoreError> {
        let lease = store.take_node(identity.node, &identity.name, identity.capacity, now, identity.held_for).await?;
        // Not earlier than the first renewal is it known what is wanted of it, so that is done at once.
        let orders = store.renew(lease, identity.held_for).await?.unwrap_or_default();
        Ok(Self { identity, now: Mutex::new((lease, orders)) })
    }

    pub(super) fn lease(&self) -> Lease {
        self.lock().0
    }

    pub(super) fn orders(&self) -> Orders {
        self.lock().1
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Lease, Orders)> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// What this process may write by.
    pub(super) fn lease(&self) -> Lease {
        self.tenure.lease()
    }

    /// Holds the lease until the engine is over. One that Postgres's absence let lapse is still held if nobody took it meanwhile.
    pub(super) async fn hold_lease(self: Arc<Self>) {
        let held_for = self.tenure.identity.held_for;
        // Since when the database has been there: who looks for dead nodes right after an outage finds everybody dead.
        let mut steady_since = Instant::now();
        loop {
            tokio::select! {
                () = self.over.cancelled() => return,
                () = tokio::time::sleep(held_for / RENEWALS) => {}
            }
            if let Err(error) = self.renew_lease().await {
                tracing::warn!(%error, "renewing the lease of this node failed");
                steady_since = Instant::now();
                continue;
            }
            self.evict_if_told().await;
            if steady_since.elapsed() > held_for
                && !self.stopping.is_cancelled()
                && let Err(error) = self.take_care_of_the_abandoned().await
            {
                tracing::warn!(%error, "looking after the sandboxes of dead nodes failed");
            }
        }
    }

    async fn renew_lease(&self) -> Result<(), StoreError> {
        let lease = self.lease();
        match self.store.renew(lease, self.tenure.identity.held_for).await? {
            Some(orders) => {
                let before = std::mem::replace(&mut self.tenure.lock().1, orders);
                if before.is_drained && !orders.is_drained {
                    self.note_queue();
                }
                Ok(())
            }
            None => self.rejoin().await,
        }
    }

    /// The lease was lost: others took this node for dead. What it still has stays; what was given to others is ended here.
    async fn rejoin(&self) -> Result<(), StoreError> {
        let Identity { node, name, capacity, held_for } = &self.tenure.identity;
        let lease = self.store.take_node(*node, name, *capacity, self.clock.now(), *held_for).await?;
        let kept = self.store.live_of(*node).await?;
        self.tenure.lock().0 = lease;
        let mut lost = 0_u32;
        for live in self.live.all() {
            if matches!(live.progress(), Progress::Queued) {
                continue;
            }
            if kept.iter().any(|row| row.id == live.sandbox.id) {
                live.hold(lease);
            } else {
                lost += 1;
                self.kill(&live, KillReason::Evicted).await;
            }
        }
        tracing::warn!(lost, "this node was taken for dead; it has its lease again");
        Ok(())
    }

    async fn evict_if_told(&self) {
        if self.tenure.orders().evict_at.is_none_or(|at| at > self.clock.now()) {
            return;
        }
        for live in self.live.all() {
            if !matches!(live.progress(), Progress::Queued) && live.ordered_kill().is_none() {
                self.kill(&live, KillReason::Evicted).await;
            }
        }
    }

    /// Settles what dead nodes had: runs that may be tried again go back into the queue.
    async fn take_care_of_the_abandoned(&self) -> Result<(), StoreError> {
        let deposed = self.store.depose_dead_nodes(self.tenure.identity.node).await?;
        if deposed > 0 {
            tracing::warn!(deposed, "nodes were not heard of for too long; what they had live is settled");
        }
        for Abandoned { sandbox, lease, node_name } in self.store.abandoned().await? {
            let now = self.clock.now();
            let message = format!("its node {node_name} was not heard of for too long");
            if sandbox.kind == Kind::Run && sandbox.retries_left > 0 {
                let failed = Return::Failed { message: &message, until: now + LEFT_TO_OTHERS };
                if self.store.give_back(sandbox.id, lease, failed, now).await? {
                    self.note_queue();
                }
                continue;
            }
            let total = Phases::ms((now - sandbox.created_at).unsigned_abs());
            let finish = Finish::without_usage(Cause::InfraError { message }, now, &sandbox.limits, Phases { total, ..Phases::default() });
            let ended = Ended { finish: &finish, log_tail: &LogTail::default(), log_file: LogKept::No };
            if self.store.finish(sandbox.id, Writer::Holder(lease), &ended).await? {
                self.metrics.ended(sandbox.kind, &finish.outcome);
            }
        }
        Ok(())
    }

    /// Lets the node go: at once, or after the next service had time to take it.
    pub(super) async fn let_go(&self, is_handed_over: bool) {
        self.over.cancel();
        let lease = self.lease();
        let done = if is_handed_over { self.store.renew(lease, HANDED_OVER_FOR).await.map(drop) } else { self.store.release(lease).await };
        if let Err(error) = done {
            tracing::debug!(%error, "the lease of this node ends by itself");
        }
    }
}
