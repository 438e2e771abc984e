//! The other nodes that share the database: who they are, and on which of them something lives.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use super::{Engine, EngineError, Progress, capacity::Room};
use crate::{
    sandbox::{SandboxId, TenantId, check_name},
    store::{Home, NodeCapacity, NodeId, Peer, PeerDoor, Renewer},
};

/// What this node knows of the others, as of its last look.
#[derive(Debug)]
pub(super) struct Peers {
    known: watch::Sender<Arc<[Peer]>>,
    /// What was offered to each since that look.
    since: Mutex<HashMap<NodeId, Since>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Since {
    offers: u64,
    has_declined: bool,
}

impl Default for Peers {
    fn default() -> Self {
        Self { known: watch::Sender::new(Arc::new([])), since: Mutex::default() }
    }
}

impl Peers {
    fn since(&self) -> MutexGuard<'_, HashMap<NodeId, Since>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much freer another node must be than this one for work to go there, in thousandths of what each has: the way there costs more than a little more room is worth.
const FREER_BY: u64 = 250;

impl Engine {
    /// Where other nodes reach this one; `None`: it is alone.
    pub fn own_door(&self) -> Option<&PeerDoor> {
        self.tenure.identity.door.as_ref()
    }

    /// Names this node.
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// The other nodes that are alive and reached.
    pub fn peers(&self) -> Arc<[Peer]> {
        Arc::clone(&self.peers.known.borrow())
    }

    /// Where the tenant's sandbox or run lives that is called this, by id or by name. `None`: here, or nowhere.
    pub async fn home_elsewhere(&self, tenant: &TenantId, named: &str) -> Result<Option<Home>, EngineError> {
        let id: Option<SandboxId> = named.parse().ok();
        if let Some(live) = id.and_then(|id| self.live.get(id))
            && live.sandbox.tenant == *tenant
            && !matches!(live.progress(), Progress::Queued)
        {
            return Ok(None);
        }
        // What cannot be a name names nothing.
        if id.is_none() && check_name(named.to_owned()).is_err() {
            return Ok(None);
        }
        let home = self.store.home(tenant, id, named).await?;
        Ok(home.filter(|home| home.node.as_ref().is_none_or(|node| node.id != self.node)))
    }

    /// Returns when this node is not among those any more that are alive and reached; at once, if it never was for as long as two looks take.
    pub fn peer_gone(&self, id: NodeId) -> impl Future<Output = ()> + Send + use<> {
        let mut known = self.peers.known.subscribe();
        async move {
            // It may have come since the last look.
            let mut looks = u32::from(!is_among(&known.borrow_and_update(), id));
            while looks < 2 {
                if known.changed().await.is_err() {
                    return;
                }
                looks = if is_among(&known.borrow_and_update(), id) { 0 } else { looks + 1 };
            }
        }
    }

    /// The node that has clearly more room than this one, if one has, as far as is known; work that it is offered counts as taken until it says otherwise.
    pub fn freer_peer(&self) -> Option<Peer> {
        let known = Arc::clone(&self.peers.known.borrow());
        if known.is_empty() {
            return None;
        }
        let (total, committed) = self.capacity.use_now();
        let own = if self.hindrance().is_some() { 0 } else { free(total, committed) };
        let mut since = self.peers.since();
        let room_of = |peer: &Peer| {
            let Since { offers, has_declined } = since.get(&peer.id).copied().unwrap_or_default();
            let offered = Room {
                memory_bytes: TYPICAL.memory_bytes.saturating_mul(offers),
                cpu_millis: TYPICAL.cpu_millis.saturating_mul(offers),
                sandboxes: 0,
            };
            if peer.is_drained || has_declined { 0 } else { free(room(peer.capacity), room(peer.committed).plus(offered)) }
        };
        let (room, freest) = known.iter().map(|peer| (room_of(peer), peer)).max_by_key(|(room, _)| *room)?;
        if room < own + FREER_BY {
            return None;
        }
        since.entry(freest.id).or_default().offers += 1;
        Some(freest.clone())
    }

    /// A node takes no more of what it is offered, until it is looked at again.
    pub fn note_declined(&self, id: NodeId) {
        self.peers.since().entry(id).or_default().has_declined = true;
    }

    /// Says what room this node has left, and looks who the others are.
    pub(super) async fn meet_peers(&self, renewer: &mut Renewer, patience: Duration) {
        if self.own_door().is_none() {
            return;
        }
        let (total, committed) = self.capacity.use_now();
        // Whoever can take nothing has no room.
        let committed = if self.hindrance().is_some() { total } else { committed };
        let committed = NodeCapacity { memory_bytes: committed.memory_bytes, cpu_millis: committed.cpu_millis };
        match tokio::time::timeout(patience, renewer.meet(self.lease(), committed)).await {
            // Told each time: whoever counts the looks in which a node is missing hears of them all.
            Ok(Ok(peers)) => {
                self.peers.since().clear();
                self.peers.known.send_replace(peers.into());
            }
            Ok(Err(error)) => tracing::warn!(%error, "looking for other nodes failed"),
            Err(_late) => tracing::warn!("looking for other nodes took too long"),
        }
    }
}

/// What is taken for the room of what is offered, whose request nobody has read yet.
const TYPICAL: Room = Room { memory_bytes: 128 << 20, cpu_millis: 500, sandboxes: 1 };

const fn room(capacity: NodeCapacity) -> Room {
    Room { memory_bytes: capacity.memory_bytes, cpu_millis: capacity.cpu_millis, sandboxes: 0 }
}

/// What is free of a node, in thousandths of what it has, by what is scarcer there.
fn free(total: Room, committed: Room) -> u64 {
    let left = total.minus(committed);
    let part = |left: u64, total: u64| u64::try_from(u128::from(left) * 1000 / u128::from(total.max(1))).unwrap_or(0);
    part(left.memory_bytes, total.memory_bytes).min(part(left.cpu_millis, total.cpu_millis))
}

/// What proves to this process that a node asks: nobody else reads it where it is kept.
pub(super) fn new_key() -> String {
    // Each from the kernel's source of randomness, but for six bits.
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

fn is_among(peers: &[Peer], id: NodeId) -> bool {
    peers.iter().any(|peer| peer.id == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_scarcer_says_how_free_a_node_is() {
        let total = Room { memory_bytes: 1 << 40, cpu_millis: 8000, sandboxes: 100 };
        let committed = |memory_bytes, cpu_millis| Room { memory_bytes, cpu_millis, sandboxes: 0 };
        assert_eq!(free(total, committed(0, 0)), 1000);
        assert_eq!(free(total, committed(1 << 38, 0)), 750);
        assert_eq!(free(total, committed(1 << 38, 6000)), 250);
        assert_eq!(free(total, committed(2 << 40, 0)), 0);
    }
}
