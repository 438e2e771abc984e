//! What the keeper knows of each sandbox of a request, until it is told to forget: numbered, so that a reader can ask for what has changed.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::protocol::{Ending, Launched, Record, SandboxId};

/// The records of one keeper, found by id and by the number of their latest change.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Records {
    by_id: HashMap<SandboxId, Entry>,
    by_seq: BTreeMap<u64, SandboxId>,
    last_seq: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    seq: u64,
    launched: Option<Launched>,
    state: State,
}

/// Where a sandbox is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum State {
    /// It has not ended. Its serial number.
    Alive(u64),
    Ended(Box<Ending>),
}

/// Records in one answer: with some dozens of bytes each, far below what a message holds.
const PAGE_MAX: usize = 1000;

impl Records {
    /// A sandbox is being started.
    pub(super) fn accept(&mut self, id: SandboxId, serial: u64) {
        self.change(id, None, State::Alive(serial));
    }

    /// Its payload runs.
    pub(super) fn launched(&mut self, id: SandboxId, launched: Launched) {
        if let Some(State::Alive(serial)) = self.get(id) {
            let serial = *serial;
            self.change(id, Some(launched), State::Alive(serial));
        }
    }

    /// It is over.
    pub(super) fn ended(&mut self, id: SandboxId, ending: Ending) {
        self.change(id, ending.launched, State::Ended(Box::new(ending)));
    }

    pub(super) fn get(&self, id: SandboxId) -> Option<&State> {
        self.by_id.get(&id).map(|entry| &entry.state)
    }

    pub(super) fn forget(&mut self, id: SandboxId) {
        if let Some(entry) = self.by_id.remove(&id) {
            self.by_seq.remove(&entry.seq);
        }
    }

    /// The records that changed after number `after`, in the order of their numbers, as many as go into one answer, and whether there are more.
    pub(super) fn page(&self, after: u64) -> (Vec<Record>, bool) {
        let mut later = after.checked_add(1).into_iter().flat_map(|first| self.by_seq.range(first..));
        let record = |(seq, id): (&u64, &SandboxId)| {
            let entry = self.by_id.get(id)?;
            Some(Record { id: *id, seq: *seq, launched: entry.launched, is_ended: matches!(entry.state, State::Ended(_)) })
        };
        let records = later.by_ref().take(PAGE_MAX).filter_map(record).collect();
        (records, later.next().is_some())
    }

    fn change(&mut self, id: SandboxId, launched: Option<Launched>, state: State) {
        self.last_seq += 1;
        let before = self.by_id.insert(id, Entry { seq: self.last_seq, launched, state });
        if let Some(before) = before {
            self.by_seq.remove(&before.seq);
        }
        self.by_seq.insert(self.last_seq, id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> SandboxId {
        SandboxId(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn pages_hold_every_record_once_in_the_order_of_its_latest_change() {
        let mut records = Records::default();
        let count = PAGE_MAX as u128 * 2 + 1;
        (0..count).for_each(|n| records.accept(id(n), 1));
        records.accept(id(0), 1);
        let (mut after, mut seen) = (0, Vec::new());
        loop {
            let (page, is_more) = records.page(after);
            after = page.last().unwrap().seq;
            seen.extend(page.into_iter().map(|record| record.id));
            if !is_more {
                break;
            }
        }
        assert_eq!(seen, (1..count).chain([0]).map(id).collect::<Vec<_>>());
        assert_eq!(records.page(after), (vec![], false));
        assert_eq!(records.page(u64::MAX), (vec![], false));
    }

    #[test]
    fn what_is_forgotten_is_in_no_page() {
        let mut records = Records::default();
        records.accept(id(1), 1);
        records.forget(id(1));
        assert_eq!(records.page(0), (vec![], false));
        assert!(records.get(id(1)).is_none());
    }
}
