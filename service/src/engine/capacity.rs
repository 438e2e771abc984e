//! How much of the node is promised, and to whom: the sum of the limits of its live sandboxes.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;

use super::fair::{Head, Held, Shares};
use crate::{metrics::Metrics, sandbox::Owner};

/// What a sandbox takes up, or a node has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) memory_bytes: u64,
    pub(super) cpu_millis: u64,
    pub(super) sandboxes: u64,
}

impl Room {
    pub(super) const fn plus(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
        }
    }

    pub(super) const fn minus(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
        }
    }

    pub(super) const fn fits_in(self, total: Self) -> bool {
        self.memory_bytes <= total.memory_bytes && self.cpu_millis <= total.cpu_millis && self.sandboxes <= total.sandboxes
    }
}

/// The node's room and what of it is promised.
pub(super) struct Capacity {
    total: Room,
    promised: Mutex<Promised>,
    metrics: Arc<Metrics>,
    /// Called whenever room was given back.
    freed: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capacity").field("total", &self.total).field("promised", &self.promised).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Promised {
    committed: Room,
    shares: Shares,
}

/// Promised room; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    room: Room,
    /// Since when it counts for whom, and with which weight.
    held: Option<(Held, Instant)>,
    counts_for: Option<(Owner, u32)>,
    capacity: Arc<Capacity>,
}

impl Capacity {
    pub(super) fn new(total: Room, metrics: Arc<Metrics>, freed: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        metrics.capacity_memory_bytes.set(gauge(total.memory_bytes));
        metrics.capacity_cpu_millis.set(gauge(total.cpu_millis));
        metrics.capacity_sandboxes.set(gauge(total.sandboxes));
        let promised = Mutex::new(Promised { committed: Room::default(), shares: Shares::new(total) });
        Arc::new(Self { total, promised, metrics, freed: Box::new(freed) })
    }

    /// Whether the node could hold it if it were empty; if not, why.
    pub(super) fn could_hold(&self, room: Room) -> Result<(), String> {
        let Room { memory_bytes, cpu_millis, .. } = self.total;
        room.fits_in(self.total)
            .then_some(())
            .ok_or_else(|| format!("no node can hold it: this one gives {memory_bytes} bytes of memory and {cpu_millis} cpu_millis in all"))
    }

    /// Whether there would be room for it, were so much given back.
    pub(super) fn would_hold(&self, room: Room, freed: Room) -> bool {
        self.lock().committed.minus(freed).plus(room).fits_in(self.total)
    }

    /// Promises the room, if it is free. It counts for nobody yet.
    pub(super) fn reserve(self: &Arc<Self>, room: Room) -> Option<Reservation> {
        let mut promised = self.lock();
        let after = promised.committed.plus(room);
        if !after.fits_in(self.total) {
            return None;
        }
        promised.committed = after;
        self.show(after);
        Some(Reservation { room, held: None, counts_for: None, capacity: Arc::clone(self) })
    }

    /// Promises the room to the one of these who is next, if anyone is; see [`Shares::next`].
    pub(super) fn grant(self: &Arc<Self>, heads: &[Head]) -> Option<(usize, Reservation)> {
        let mut promised = self.lock();
        let free = self.total.minus(promised.committed);
        let next = promised.shares.next(heads, free)?;
        let Head { owner, weight, room, .. } = &heads[next];
        promised.committed = promised.committed.plus(*room);
        self.show(promised.committed);
        let held = promised.shares.begin(owner, *weight, *room);
        let (held, counts_for) = (Some((held, Instant::now())), Some((owner.clone(), *weight)));
        Some((next, Reservation { room: *room, held, counts_for, capacity: Arc::clone(self) }))
    }

    /// Promises the room to one that has it already: it was live before this process was.
    pub(super) fn reserve_for_live(self: &Arc<Self>, room: Room) -> Reservation {
        let mut promised = self.lock();
        promised.committed = promised.committed.plus(room);
        self.show(promised.committed);
        Reservation { room, held: None, counts_for: None, capacity: Arc::clone(self) }
    }

    /// What the node has, and what of it is promised.
    pub(super) fn use_now(&self) -> (Room, Room) {
        (self.total, self.lock().committed)
    }

    fn lock(&self) -> MutexGuard<'_, Promised> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, committed: Room) {
        self.metrics.committed_memory_bytes.set(gauge(committed.memory_bytes));
        self.metrics.committed_cpu_millis.set(gauge(committed.cpu_millis));
        self.metrics.committed_sandboxes.set(gauge(committed.sandboxes));
    }
}

impl Reservation {
    /// From now on it counts for this owner, whose tenant has this weight.
    pub(super) fn count_for(&mut self, owner: &Owner, weight: u32) {
        let held = self.capacity.lock().shares.begin(owner, weight, self.room);
        self.held = Some((held, Instant::now()));
        self.counts_for = Some((owner.clone(), weight));
    }

    /// [`Reservation::count_for`], unless it counts for somebody already.
    pub(super) fn count_for_if_nobody(&mut self, owner: &Owner, weight: u32) {
        if self.held.is_none() {
            self.count_for(owner, weight);
        }
    }

    /// Takes other room instead. False, and nothing is changed: it is larger, and there is not so much.
    pub(super) fn resize(&mut self, room: Room) -> bool {
        let is_smaller = {
            let mut promised = self.capacity.lock();
            let after = promised.committed.minus(self.room).plus(room);
            if !(room.fits_in(self.room) || after.fits_in(self.capacity.total)) {
                return false;
            }
            promised.committed = after;
            self.capacity.show(after);
            // What it was counted as until now is what it held until now.
            if let (Some((held, since)), Some((owner, weight))) = (self.held.take(), &self.counts_for) {
                promised.shares.end(&held, since.elapsed().as_secs_f64());
                self.held = Some((promised.shares.begin(owner, *weight, room), Instant::now()));
            }
            room.fits_in(self.room)
        };
        self.room = room;
        if is_smaller {
            (self.capacity.freed)();
        }
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        {
            let mut promised = self.capacity.lock();
            promised.committed = promised.committed.minus(self.room);
            self.capacity.show(promised.committed);
            if let Some((held, since)) = &self.held {
                promised.shares.end(held, since.elapsed().as_secs_f64());
            }
        }
        (self.capacity.freed)();
    }
}

fn gauge(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const ONE: Room = Room { memory_bytes: 10, cpu_millis: 10, sandboxes: 1 };

    fn capacity(total: Room) -> (Arc<Capacity>, Arc<AtomicU32>) {
        let freed = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&freed);
        let metrics = Arc::new(Metrics::new(0).unwrap());
        (Capacity::new(total, metrics, move || count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed)), freed)
    }

    #[test]
    fn the_last_room_is_given_once() {
        let (capacity, freed) = capacity(Room { memory_bytes: 20, cpu_millis: 100, sandboxes: 10 });
        let first = capacity.reserve(ONE).unwrap();
        let _second = capacity.reserve(ONE).unwrap();
        assert!(capacity.reserve(ONE).is_none());
        drop(first);
        assert_eq!(freed.load(Ordering::Relaxed), 1);
        assert!(capacity.reserve(ONE).is_some());
    }

    #[test]
    fn the_number_of_sandboxes_is_bounded_too() {
        let (capacity, _) = capacity(Room { memory_bytes: 100, cpu_millis: 100, sandboxes: 1 });
        let _first = capacity.reserve(ONE).unwrap();
        assert!(capacity.reserve(ONE).is_none());
    }

    #[test]
    fn one_that_is_larger_than_the_node_is_told_so() {
        let (capacity, _) = capacity(Room { memory_bytes: 5, cpu_millis: 100, sandboxes: 1 });
        assert!(capacity.could_hold(ONE).unwrap_err().contains("5 bytes"));
    }

    #[test]
    fn what_grows_takes_no_more_than_there_is_and_what_shrinks_gives_back() {
        let (capacity, freed) = capacity(Room { memory_bytes: 25, cpu_millis: 100, sandboxes: 10 });
        let mut first = capacity.reserve(ONE).unwrap();
        let _second = capacity.reserve(ONE).unwrap();
        assert!(!first.resize(Room { memory_bytes: 16, ..ONE }));
        assert!(first.resize(Room { memory_bytes: 15, ..ONE }));
        assert!(capacity.reserve(Room { memory_bytes: 1, ..Room::default() }).is_none());
        assert!(first.resize(Room { memory_bytes: 5, ..ONE }));
        assert_eq!(freed.load(Ordering::Relaxed), 1);
        drop(first);
        assert!(capacity.reserve(Room { memory_bytes: 15, ..ONE }).is_some());
    }

    #[test]
    fn one_that_lives_already_may_overfill_the_node() {
        let (capacity, _) = capacity(Room { memory_bytes: 5, cpu_millis: 100, sandboxes: 1 });
        let adopted = capacity.reserve_for_live(ONE);
        assert!(capacity.reserve(Room { memory_bytes: 1, ..Room::default() }).is_none());
        drop(adopted);
        assert!(capacity.reserve(Room { memory_bytes: 1, ..Room::default() }).is_some());
    }
}
