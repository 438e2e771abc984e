//! This node's lease: taken at the start, renewed, taken anew when it was lost. And what becomes of nodes that let theirs lapse.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sandbox_core::protocol::{Cause, KillReason};
use tokio::time::Instant;

use super::{Engine, Progress};
use crate::{
    sandbox::{Finish, Kind, LogTail, Phases},
    store::{Abandoned, Ended, Lease, LogKept, NodeCapacity, NodeId, Orders, PeerDoor, Renewed, Return, Store, StoreError, Writer},
};

/// How often a lease is renewed before it would end, at the least, and after what time at the most.
const RENEWALS: u32 = 5;
const RENEWED_AFTER: Duration = Duration::from_secs(3);
/// How long the keeper is waited for where others wait meanwhile.
const KEEPER_PATIENCE: Duration = Duration::from_secs(2);
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
    /// Where other nodes reach it.
    pub(super) door: Option<PeerDoor>,
}

/// The lease and what came with its last renewal.
#[derive(Debug)]
pub(super) struct Tenure {
    pub(super) identity: Identity,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    lease: Lease,
    orders: Orders,
    /// Since when every renewal came through in time.
    steady_since: Instant,
}

impl Tenure {
    /// Takes the node, from whomever had it.
    pub(super) async fn begin(store: &Store, identity: Identity, now: time::OffsetDateTime) -> Result<Self, StoreError> {
        let lease = store.take_node(identity.node, &identity.name, identity.capacity, now, identity.held_for).await?;
        // Not before the first renewal is it known what is wanted of it, so that is done at once.
        let orders = store.renew(lease, identity.held_for).await?.unwrap_or_default();
        store.open_to_peers(lease, identity.door.as_ref()).await?;
        Ok(Self { identity, now: Mutex::new(Now { lease, orders, steady_since: Instant::now() }) })
    }

    pub(super) fn lease(&self) -> Lease {
        self.lock().lease
    }

    pub(super) fn orders(&self) -> Orders {
        self.lock().orders
    }

    /// Something was late, or failed.
    fn doubt(&self) {
        self.lock().steady_since = Instant::now();
    }

    fn is_steady(&self, for_so_long: Duration) -> bool {
        self.lock().steady_since.elapsed() >= for_so_long
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// What this process may write by.
    pub(super) fn lease(&self) -> Lease {
        self.tenure.lease()
    }

    /// Holds the lease until the engine is over, and waits for nothing else. One that Postgres's absence let lapse is still held if nobody took it
    /// meanwhile.
    pub(super) async fn hold_lease(self: Arc<Self>) {
        let held_for = self.tenure.identity.held_for;
        let period = period(held_for);
        let mut renewer = self.store.renewer();
        loop {
            tokio::select! {
                () = self.over.cancelled() => return,
                () = tokio::time::sleep(period) => {}
                () = self.renewal.notified() => {}
            }
            let renewed = match tokio::time::timeout(period, renewer.renew(self.lease(), held_for)).await {
                Ok(Ok(Some(orders))) => {
                    self.heed(orders);
                    Ok(())
                }
                Ok(Ok(None)) => self.rejoin().await.map_err(|error| error.to_string()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_late) => Err("no answer".to_owned()),
            };
            if let Err(error) = renewed {
                self.tenure.doubt();
                self.metrics.lease_failures.inc();
                tracing::warn!(%error, "renewing the lease of this node failed");
                continue;
            }
            self.meet_peers(&mut renewer, period).await;
        }
    }

    fn heed(&self, orders: Orders) {
        let before = std::mem::replace(&mut self.tenure.lock().orders, orders);
        if before.is_drained && !orders.is_drained {
            self.note_queue();
        }
    }

    /// The lease was lost: others took this node for dead. What nobody took meanwhile stays its own; what was given to others is ended here.
    async fn rejoin(&self) -> Result<(), StoreError> {
        let Identity { node, name, capacity, held_for, .. } = &self.tenure.identity;
        let lease = self.store.take_node(*node, name, *capacity, self.clock.now(), *held_for).await?;
        // First: who has something to store finds out whether it is still its own.
        self.tenure.lock().lease = lease;
        self.tenure.doubt();
        let kept = self.store.live_of(*node).await?;
        let mut lost = 0_u32;
        for live in self.live.all() {
            if matches!(live.progress(), Progress::Queued) || kept.iter().any(|row| row.id == live.sandbox.id) {
                continue;
            }
            lost += 1;
            // Not an order that another attempt here would inherit.
            for id in live.names() {
                let keeper = self.keeper.clone();
                tokio::spawn(async move { drop(tokio::time::timeout(KEEPER_PATIENCE, keeper.kill(id, KillReason::Evicted)).await) });
            }
        }
        self.metrics.leases_lost.inc();
        tracing::warn!(lost, "this node was taken for dead; it has its lease again");
        Ok(())
    }

    /// Sees to it that what nodes have live comes to an end: what this one is to evict, and what dead ones had.
    pub(super) async fn settle_dead_nodes(self: Arc<Self>) {
        let held_for = self.tenure.identity.held_for;
        let mut seen = Observations::default();
        loop {
            tokio::select! {
                () = self.over.cancelled() => return,
                () = tokio::time::sleep(period(held_for)) => {}
            }
            self.evict_if_told().await;
            if self.stopping.is_cancelled() {
                continue;
            }
            if let Err(error) = self.depose_and_settle(&mut seen, held_for).await {
                tracing::warn!(%error, "looking after the sandboxes of dead nodes failed");
                self.tenure.doubt();
            }
        }
    }

    async fn evict_if_told(&self) {
        if self.tenure.orders().evict_at.is_none_or(|at| at > self.clock.now()) {
            return;
        }
        for live in self.carried() {
            if live.ordered_kill().is_none() {
                // Ordered in any case: one that the keeper does not hear of now ends as soon as it does.
                drop(tokio::time::timeout(KEEPER_PATIENCE, self.kill(&live, KillReason::Evicted)).await);
            }
        }
    }

    async fn depose_and_settle(&self, seen: &mut Observations, held_for: Duration) -> Result<(), StoreError> {
        // Who could not renew in time must not judge others by that: the fault may be the database's.
        if !self.tenure.is_steady(held_for) {
            seen.0.clear();
            return Ok(());
        }
        for dead in seen.unchanged(self.store.leases_in_use(self.node).await?, held_for) {
            if self.store.depose(dead).await? {
                self.metrics.nodes_lost.inc();
                tracing::warn!(node = %dead.lease.node, "a node was not heard of for too long: what it has live is settled");
            }
        }
        for abandoned in self.store.abandoned().await? {
            if let Err(error) = self.settle_abandoned(&abandoned).await {
                tracing::warn!(sandbox.id = %abandoned.sandbox.id, %error, "settling what a dead node had failed; it is tried again");
            }
        }
        Ok(())
    }

    /// What may be tried again goes back into the queue.
    async fn settle_abandoned(&self, Abandoned { sandbox, hold, node_name }: &Abandoned) -> Result<(), StoreError> {
        let now = self.clock.now();
        let message = format!("its node {node_name} was not heard of for too long");
        if sandbox.kind == Kind::Run && sandbox.retries_left > 0 {
            let failed = Return::Failed { message: &message, until: now + LEFT_TO_OTHERS };
            if self.store.give_back(sandbox.id, *hold, failed, now).await? {
                self.note_queue();
            }
            return Ok(());
        }
        let total = Phases::ms((now - sandbox.created_at).unsigned_abs());
        let finish = Finish::without_usage(Cause::InfraError { message }, now, &sandbox.limits, Phases { total, ..Phases::default() });
        let (finish, case_bytes) = self.behind_cases(sandbox, finish).await?;
        let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes, log_file: LogKept::No };
        if self.store.finish(sandbox.id, Writer::Holder(*hold), &ended).await? {
            self.metrics.ended(sandbox, &finish.outcome);
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

/// Other nodes' leases as they were last seen to change, and when that was by our own clock: the database's may jump.
#[derive(Debug, Default)]
struct Observations(HashMap<NodeId, (Renewed, Instant)>);

impl Observations {
    /// Takes in what is seen now. Answers with those that have not changed for so long.
    fn unchanged(&mut self, now: Vec<Renewed>, for_so_long: Duration) -> Vec<Renewed> {
        self.0.retain(|node, _| now.iter().any(|renewed| renewed.lease.node == *node));
        let mut unchanged = Vec::new();
        for renewed in now {
            let (seen, since) = self.0.entry(renewed.lease.node).or_insert((renewed, Instant::now()));
            if *seen != renewed {
                (*seen, *since) = (renewed, Instant::now());
            } else if since.elapsed() >= for_so_long {
                unchanged.push(renewed);
            }
        }
        unchanged
    }
}

/// Between two renewals: orders to a node come with them, so it is not long even where leases are.
fn period(held_for: Duration) -> Duration {
    (held_for / RENEWALS).min(RENEWED_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Duration = Duration::from_secs(15);

    fn renewed(node: NodeId, until: i64) -> Renewed {
        Renewed { lease: Lease { node, epoch: 1 }, until: time::OffsetDateTime::from_unix_timestamp(until).unwrap() }
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_lease_that_does_not_change_for_its_whole_length_is_dead() {
        let (dead, alive) = (NodeId(uuid::Uuid::now_v7()), NodeId(uuid::Uuid::now_v7()));
        let mut seen = Observations::default();
        for second in (0..15).step_by(3) {
            assert_eq!(seen.unchanged(vec![renewed(dead, 0), renewed(alive, second)], SPAN), []);
            tokio::time::advance(Duration::from_secs(3)).await;
        }
        assert_eq!(seen.unchanged(vec![renewed(dead, 0), renewed(alive, 15)], SPAN), [renewed(dead, 0)]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_seen_again_is_watched_anew() {
        let node = NodeId(uuid::Uuid::now_v7());
        let mut seen = Observations::default();
        seen.unchanged(vec![renewed(node, 0)], SPAN);
        tokio::time::advance(SPAN).await;
        seen.unchanged(vec![], SPAN);
        assert_eq!(seen.unchanged(vec![renewed(node, 0)], SPAN), []);
    }
}
