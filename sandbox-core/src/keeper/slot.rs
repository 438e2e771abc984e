//! The parts of a sandbox that do not depend on its request, made when the keeper has nothing else to do.

use std::{collections::VecDeque, io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use super::layer::Held;
use crate::{
    cgroup::{Group, Limits, Tree},
    ids::{self, Ranges},
    network::Networks,
    protocol::IoLimits,
};

/// One sandbox's id range, namespaces and cgroups: fresh, used once, never by two.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) id_base: u32,
    #[serde(with = "crate::handover")]
    pub(super) user_namespace: OwnedFd,
    #[serde(with = "crate::handover")]
    pub(super) network: OwnedFd,
    pub(super) group: Group,
}

/// Makes slots, keeps a few ready, and takes their id ranges back.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Slots {
    ranges: Ranges,
    pub(super) networks: Networks,
    ready: VecDeque<Slot>,
    made: u64,
    /// Ranges that nobody is given: layers have them that are kept.
    #[serde(default)]
    held: Held,
    /// What the latest request wanted: the next one probably wants the same.
    io: Option<IoLimits>,
    #[serde(default)]
    limits: Option<Limits>,
}

/// How many are kept ready.
const READY_MAX: usize = 16;

impl Slots {
    pub(super) fn new(ranges: Ranges) -> io::Result<Self> {
        Ok(Self { ranges, networks: Networks::new()?, ready: VecDeque::new(), made: 0, held: Held::default(), io: None, limits: None })
    }

    /// One that was made ahead.
    pub(super) fn take_ready(&mut self) -> Option<Slot> {
        self.ready.pop_front()
    }

    /// Has those that are made from now on hold what runs in them to `io`, and what is built ahead in them to `limits` once it stands ready. That saves the writes at a launch
    /// that wants just that.
    pub(super) fn expect(&mut self, io: IoLimits, limits: Limits) {
        (self.io, self.limits) = (Some(io), Some(limits));
    }

    /// These were none that can be set.
    pub(super) fn expect_no_limits(&mut self) {
        self.limits = None;
    }

    /// What the next launch probably wants.
    pub(super) fn expected_limits(&self) -> Option<Limits> {
        self.limits
    }

    /// A new one; `None` when every id range is in use.
    pub(super) fn make(&mut self, tree: &Tree) -> io::Result<Option<Slot>> {
        let Some(id_base) = self.ranges.take() else { return Ok(None) };
        let made = self.make_on(tree, id_base);
        if made.is_err() {
            self.ranges.give_back(id_base);
        }
        made.map(Some)
    }

    /// A new one on a range that is held.
    pub(super) fn make_on_held(&mut self, tree: &Tree, id_base: u32) -> io::Result<Slot> {
        self.make_on(tree, id_base)
    }

    /// Gives this range to nobody else, whoever gives it back.
    pub(super) fn hold(&mut self, id_base: u32) {
        self.held.insert(id_base);
    }

    /// It can be given back again.
    pub(super) fn let_go(&mut self, id_base: u32) {
        self.held.remove(&id_base);
    }

    /// Takes a range back that was held.
    pub(super) fn release(&mut self, id_base: u32) {
        self.let_go(id_base);
        self.give_back(id_base);
    }

    fn make_on(&mut self, tree: &Tree, id_base: u32) -> io::Result<Slot> {
        self.made += 1;
        let user_namespace = ids::new_user_namespace(id_base)?;
        let network = self.networks.make()?;
        let mut group = tree.make(format!("s{}", self.made))?;
        if let Some(io) = self.io
            && let Err(error) = group.limit_io(io)
        {
            group.remove()?;
            return Err(error);
        }
        Ok(Slot { id_base, user_namespace, network, group })
    }

    /// Makes one ahead; `false` when there are enough.
    pub(super) fn refill(&mut self, tree: &Tree) -> io::Result<bool> {
        if self.ready.len() >= READY_MAX {
            return Ok(false);
        }
        match self.make(tree)? {
            Some(slot) => self.ready.push_back(slot),
            None => return Ok(false),
        }
        Ok(true)
    }

    /// How many stand ready.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Takes back a slot in which nothing was started.
    pub(super) fn put_back(&mut self, mut slot: Slot) -> io::Result<()> {
        // A group that something still sits in keeps its id range for good: better a range less than one with two owners.
        if slot.group.remove()? {
            self.give_back(slot.id_base);
        }
        Ok(())
    }

    /// Takes the id range of a slot of which nothing is left but, perhaps, a layer.
    pub(super) fn give_back(&mut self, id_base: u32) {
        if !self.held.contains(&id_base) {
            self.ranges.give_back(id_base);
        }
    }

    /// Removes those that were never used.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        while let Some(slot) = self.ready.pop_front() {
            self.put_back(slot)?;
        }
        Ok(())
    }
}
