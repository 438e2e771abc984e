//! The keys that this process works on: their end is heard here at once, where another process has to look.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::store::KeyName;

type Ends = Arc<Mutex<HashMap<KeyName, watch::Receiver<()>>>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct AtWork(Ends);

/// Says by its end that the work is over.
#[derive(Debug)]
pub(super) struct End {
    ends: Ends,
    name: KeyName,
    told: watch::Sender<()>,
}

impl AtWork {
    /// Work on this key goes on until the answer is dropped.
    pub(super) fn begin(&self, name: &KeyName) -> End {
        let (told, end) = watch::channel(());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), end);
        End { ends: Arc::clone(&self.0), name: name.clone(), told }
    }

    /// What changes when the work on this key is over; `None`: nobody works on it here.
    pub(super) fn end_of(&self, name: &KeyName) -> Option<watch::Receiver<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        // Another attempt may work on it by now.
        if ends.get(&self.name).is_some_and(|end| end.same_channel(&self.told.subscribe())) {
            ends.remove(&self.name);
        }
    }
}
