//! Sandboxes that stand ready before their request: built, unprivileged, filtered, and waiting for what to run.
//!
//! Nothing in one of them was ever a tenant's; each is used once. How many are kept follows what was asked for lately.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::sandbox::Body;
use crate::{fence::Fences, protocol::ImageId};

/// What a sandbox is built from before anything is known of its payload. Requests that agree in this can take the same parked one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Class {
    pub(super) image: ImageId,
    pub(super) disk_bytes: u64,
    pub(super) inodes: u64,
    pub(super) capabilities: u64,
    pub(super) fences: Fences,
}

/// One that is being built or stands ready.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Parked {
    pub(super) class: Class,
    pub(super) body: Body,
    /// Its init has said that it waits.
    pub(super) is_ready: bool,
    /// It is not to be used any more.
    pub(super) is_doomed: bool,
}

/// All of them, and what was asked for.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Lot {
    parked: HashMap<u64, Parked>,
    /// When the latest launches of each class were, in `CLOCK_MONOTONIC` nanoseconds, at most [`OF_CLASS_MAX`] of them.
    #[serde(with = "pairs")]
    demand: HashMap<Class, VecDeque<u64>>,
}

/// The most that stand ready of one class.
const OF_CLASS_MAX: usize = 8;
/// The most classes that are kept.
const CLASSES_MAX: usize = 8;
/// Launches in this time are expected again in this time.
const RECENT_NS: u64 = 1_000_000_000;
/// A class that nobody asked for in this time is given up.
const FORGOTTEN_AFTER_NS: u64 = 60_000_000_000;

impl Lot {
    /// Notes that one of this class is asked for, and hands out the serial number and body of one that stands ready.
    pub(super) fn take(&mut self, class: &Class, now_ns: u64) -> Option<(u64, Body)> {
        self.note(class, now_ns);
        let serial = *self.parked.iter().find(|(_, parked)| parked.is_ready && !parked.is_doomed && parked.class == *class)?.0;
        self.parked.remove(&serial).map(|parked| (serial, parked.body))
    }

    fn note(&mut self, class: &Class, now_ns: u64) {
        if !self.demand.contains_key(class) && self.demand.len() >= CLASSES_MAX {
            let oldest = self.demand.iter().min_by_key(|(_, times)| times.back().copied()).map(|(class, _)| class.clone());
            if let Some(oldest) = oldest {
                self.demand.remove(&oldest);
            }
        }
        let times = self.demand.entry(class.clone()).or_default();
        if times.len() >= OF_CLASS_MAX {
            times.pop_front();
        }
        times.push_back(now_ns);
    }

    /// A class of which too few stand ready.
    pub(super) fn wanted(&self, now_ns: u64) -> Option<Class> {
        self.stock(now_ns).find(|(_, standing, recent)| *standing < *recent.max(&1)).map(|(class, ..)| class.clone())
    }

    /// Whether less than half of what was asked for lately stands ready of some class: where requests come one behind the other there is no pause in which nothing happens, and
    /// soon each would have to wait until its own is built.
    pub(super) fn is_short(&self, now_ns: u64) -> bool {
        self.stock(now_ns).any(|(_, standing, recent)| standing < recent / 2)
    }

    /// Of each class how many stand ready or are being built, and how many were asked for lately.
    fn stock(&self, now_ns: u64) -> impl Iterator<Item = (&Class, usize, usize)> {
        self.demand.iter().map(move |(class, times)| {
            let recent = times.iter().filter(|time| now_ns.saturating_sub(**time) < RECENT_NS).count();
            let standing = self.parked.values().filter(|parked| parked.class == *class && !parked.is_doomed).count();
            (class, standing, recent)
        })
    }

    /// Forgets classes that nobody asks for any more, and names what stands ready for them: it is to be killed.
    pub(super) fn expire(&mut self, now_ns: u64) -> Vec<u64> {
        self.demand.retain(|_, times| times.back().is_some_and(|last| now_ns.saturating_sub(*last) < FORGOTTEN_AFTER_NS));
        let demand = &self.demand;
        let unwanted = self.parked.iter_mut().filter(|(_, parked)| !parked.is_doomed && !demand.contains_key(&parked.class));
        unwanted
            .map(|(serial, parked)| {
                parked.is_doomed = true;
                *serial
            })
            .collect()
    }

    /// Stops to prepare this class: building one failed, or its image goes. What stands ready goes at the next [`Lot::expire`].
    pub(super) fn give_up(&mut self, gone: impl Fn(&Class) -> bool) {
        self.demand.retain(|class, _| !gone(class));
    }

    /// Gives up all that stand ready, and names them: they are to be killed. What is asked for stays known, and is built anew.
    pub(super) fn discard(&mut self) -> Vec<u64> {
        let is_new = |(serial, parked): (&u64, &mut Parked)| (!std::mem::replace(&mut parked.is_doomed, true)).then_some(*serial);
        self.parked.iter_mut().filter_map(is_new).collect()
    }

    pub(super) fn insert(&mut self, serial: u64, parked: Parked) {
        self.parked.insert(serial, parked);
    }

    pub(super) fn get_mut(&mut self, serial: u64) -> Option<&mut Parked> {
        self.parked.get_mut(&serial)
    }

    pub(super) fn remove(&mut self, serial: u64) -> Option<Parked> {
        self.parked.remove(&serial)
    }

    pub(super) fn len(&self) -> usize {
        self.parked.len()
    }

    pub(super) fn bodies(&self) -> impl Iterator<Item = (u64, &Body)> {
        self.parked.iter().map(|(serial, parked)| (*serial, &parked.body))
    }
}

/// A map in a format whose maps have only text for keys.
mod pairs {
    use serde::{Deserializer, Serializer};

    use super::{Class, Deserialize, HashMap, VecDeque};

    type Demand = HashMap<Class, VecDeque<u64>>;

    pub(super) fn serialize<S: Serializer>(demand: &Demand, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(demand)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Demand, D::Error> {
        Vec::<(Class, VecDeque<u64>)>::deserialize(from).map(|pairs| pairs.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_are_left_only_where_many_were_asked_for_lately() {
        let class = |bytes| Class {
            image: "0".repeat(64).parse().unwrap(),
            disk_bytes: bytes,
            inodes: 1,
            capabilities: 0,
            fences: Fences::everywhere(),
        };
        let mut lot = Lot::default();
        assert!(lot.take(&class(1), 1000).is_none());
        assert!(lot.wanted(1000).is_some());
        assert!(!lot.is_short(1000), "one was asked for, and is made in the next pause");
        assert!(lot.take(&class(2), 1000).is_none());
        assert!(!lot.is_short(1000), "each was asked for once");
        assert!(lot.take(&class(1), 1000).is_none());
        assert!(lot.is_short(1000));
        assert!(!lot.is_short(1000 + RECENT_NS), "that was long ago");
        assert!(lot.wanted(1000 + RECENT_NS).is_some());
    }
}
