//! The room of layers that are kept here of what has ended, and whose turn it is to decide what becomes of one.
//!
//! A layer is taken for another life, given up, or counted by one at a time. Who has had his turn leaves a sandbox that lives and has the room, or the room here, or neither
//! room nor layer. So no layer is given up that somebody is about to start on, and the room of none is counted twice.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::capacity::Reservation;
use crate::sandbox::SandboxId;

#[derive(Debug, Default)]
pub(super) struct KeptRooms {
    known: Mutex<Known>,
    /// Somebody's turn is over.
    left: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// With the keeper that has the layer, by when it was started.
    rooms: HashMap<SandboxId, (Reservation, u64)>,
    turns: HashSet<SandboxId>,
}

/// The turn to decide about one layer: until it is dropped, nobody else does.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    all: &'a KeptRooms,
    id: SandboxId,
}

impl KeptRooms {
    /// One that lived until now leaves its layer: that takes up this room. Nobody decides about it before its end is stored.
    pub(super) fn insert(&self, id: SandboxId, room: Reservation, keeper: u64) {
        let before = self.lock().rooms.insert(id, (room, keeper));
        drop(before);
    }

    pub(super) fn contains(&self, id: SandboxId) -> bool {
        self.lock().rooms.contains_key(&id)
    }

    pub(super) fn ids(&self) -> Vec<SandboxId> {
        self.lock().rooms.keys().copied().collect()
    }

    /// The turn to decide about this layer, as soon as nobody else has it.
    pub(super) async fn turn(&self, id: SandboxId) -> Turn<'_> {
        loop {
            // Before the look: who leaves in between is heard of.
            let left = self.left.notified();
            if let Some(turn) = self.try_turn(id) {
                return turn;
            }
            left.await;
        }
    }

    /// The same, if nobody else has it.
    pub(super) fn try_turn(&self, id: SandboxId) -> Option<Turn<'_>> {
        self.lock().turns.insert(id).then(|| Turn { all: self, id })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn<'_> {
    pub(super) const fn id(&self) -> SandboxId {
        self.id
    }

    /// Takes the room of the layer, if this keeper has that.
    pub(super) fn take(&self, keeper: u64) -> Option<Reservation> {
        let (room, of) = self.all.lock().rooms.remove(&self.id)?;
        (of == keeper).then_some(room)
    }

    /// The layer takes up this room.
    pub(super) fn put(&self, room: Reservation, keeper: u64) {
        self.all.insert(self.id, room, keeper);
    }

    /// There is no layer any more.
    pub(super) fn free(&self) {
        let room = self.all.lock().rooms.remove(&self.id);
        drop(room);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.all.lock().turns.remove(&self.id);
        self.all.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        engine::capacity::{Capacity, Room},
        metrics::Metrics,
    };

    const KEEPER: u64 = 7;
    const LAYER: Room = Room { memory_bytes: 10, cpu_millis: 0, sandboxes: 1 };

    fn capacity() -> Arc<Capacity> {
        let total = Room { memory_bytes: 10, cpu_millis: 10, sandboxes: 10 };
        Capacity::new(total, Arc::new(Metrics::new(0).unwrap()), || {})
    }

    #[tokio::test]
    async fn two_who_want_the_same_layer_have_their_turns_one_after_the_other() {
        let (rooms, capacity, id) = (Arc::new(KeptRooms::default()), capacity(), SandboxId(uuid::Uuid::from_u128(1)));
        rooms.insert(id, capacity.reserve(LAYER).unwrap(), KEEPER);
        let first = rooms.turn(id).await;
        let second = tokio::spawn({
            let rooms = Arc::clone(&rooms);
            async move { rooms.turn(id).await.take(KEEPER).is_some() }
        });
        tokio::task::yield_now().await;
        let taken = first.take(KEEPER).unwrap();

        assert!(rooms.try_turn(id).is_none());
        assert!(!second.is_finished(), "it did not wait for its turn");
        drop(first);
        let has_second = tokio::time::timeout(Duration::from_secs(10), second).await.expect("it has its turn").unwrap();

        assert!(!has_second, "the room was taken twice");
        assert!(capacity.reserve(LAYER).is_none());
        drop(taken);
        assert!(capacity.reserve(LAYER).is_some());
    }

    #[test]
    fn a_turn_is_about_one_layer_and_ends_with_its_guard() {
        let (rooms, ids) = (KeptRooms::default(), [1, 2].map(|n| SandboxId(uuid::Uuid::from_u128(n))));
        let first = rooms.try_turn(ids[0]);

        assert!(first.is_some() && rooms.try_turn(ids[0]).is_none());
        assert!(rooms.try_turn(ids[1]).is_some());
        drop(first);
        assert!(rooms.try_turn(ids[0]).is_some());
    }

    #[test]
    fn the_room_of_a_layer_that_went_with_its_keeper_is_free() {
        let (rooms, capacity, id) = (KeptRooms::default(), capacity(), SandboxId(uuid::Uuid::from_u128(1)));
        rooms.insert(id, capacity.reserve(LAYER).unwrap(), KEEPER);

        assert!(rooms.try_turn(id).unwrap().take(KEEPER + 1).is_none());
        assert!(!rooms.contains(id));
        assert!(capacity.reserve(LAYER).is_some());
    }
}
