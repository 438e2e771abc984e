//! How many are at something, each counted by whose it is, in this process alone.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

/// All of them.
#[derive(Debug)]
pub(super) struct Crowd<K: Eq + Hash>(Arc<Mutex<HashMap<K, u64>>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Place<K: Eq + Hash> {
    counts: Arc<Mutex<HashMap<K, u64>>>,
    key: K,
}

impl<K: Eq + Hash> Default for Crowd<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash + Clone> Crowd<K> {
    /// One more, unless there are `max` already.
    pub(super) fn join(&self, key: &K, max: u64) -> Option<Place<K>> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key.clone()).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Place { counts: Arc::clone(&self.0), key: key.clone() })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_so_many_and_whoever_leaves_makes_room() {
        let crowd = Crowd::default();
        let mut places: Vec<Place<&str>> = (0..3).map(|_| crowd.join(&"acme", 3).unwrap()).collect();
        assert!(crowd.join(&"acme", 3).is_none());
        assert!(crowd.join(&"other", 3).is_some());
        places.pop();
        assert!(crowd.join(&"acme", 3).is_some());
        places.clear();
        assert!(crowd.0.lock().unwrap().is_empty());
    }
}
