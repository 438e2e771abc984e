//! Who is next when there is room: by weight between tenants, then evenly between a tenant's principals. Pure: told what there is and when.
//!
//! Every tenant has a clock of its own that runs by what its sandboxes hold — the larger of their shares of the node's memory and CPU (dominant
//! resource) times the time they hold it, over the tenant's weight — and the one whose clock shows the least is next. Who begins to wait takes
//! over the time of who was served last, so that nobody saves up (start-time fair queueing). A sandbox that lives counts as if it were to live for
//! [`EXPECTED_S`] more; when it ends, what it really held stands for it.
//!
//! What does not fit is passed over by those behind it, but not for ever: once it has waited for [`PATIENCE_S`], or its tenant has been passed over for
//! more than [`LAG_S`], room is held free for it, for a while; then the others go on for as long; then room is held for twice as long, and so on. However
//! long those live who have the room, a large one gets it, and small ones wait for half of the time at the most.

use std::collections::{HashMap, HashSet};

use super::capacity::Room;
use crate::sandbox::{Owner, TenantId};

/// How long a sandbox that lives is expected to go on, in seconds.
const EXPECTED_S: f64 = 1.0;
/// A sandbox counts for as long as it was there, in seconds, but for no less and no more than this: a start costs something too, and who used
/// what nobody else wanted is not made to pay for it later.
const HELD_S: std::ops::RangeInclusive<f64> = 0.001..=10.0;
/// How long a sandbox that does not fit is passed over, in seconds.
const PATIENCE_S: f64 = 1.0;
/// How far behind others a tenant may fall by what does not fit, in seconds of the whole node.
const LAG_S: f64 = 0.5;
/// How long room is first held for it, and at the most: as long as a wall limit can be.
const RESERVE_S: std::ops::RangeInclusive<f64> = 5.0..=3600.0;

/// One that waits, at the head of its principal's line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Head {
    pub(super) owner: Owner,
    pub(super) weight: u32,
    pub(super) room: Room,
    pub(super) waited_s: f64,
}

/// What everybody has had, and has.
#[derive(Debug)]
pub(super) struct Shares {
    /// All that there is.
    total: Room,
    tenants: HashMap<TenantId, Tenant>,
    /// The clock of who was served last, when it was.
    now: f64,
    /// Sandboxes that live.
    count: u32,
}

/// Of tenants, or principals of one: with more than so many, those that have nothing now are forgotten, with what they had.
const REMEMBERED_MAX: usize = 4096;

#[derive(Debug, Default)]
struct Tenant {
    line: Line,
    principals: HashMap<String, Line>,
    now: f64,
}

/// A clock and what drives it.
#[derive(Debug, Default, Clone, Copy)]
struct Line {
    clock: f64,
    /// Dominant shares of the sandboxes that live, over the weight.
    live: f64,
    count: u32,
    is_waiting: bool,
}

/// What a sandbox was counted as, to be given back when it ends.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Held {
    owner: Owner,
    tenant_cost: f64,
    principal_cost: f64,
}

impl Line {
    fn shows(self) -> f64 {
        self.live.mul_add(EXPECTED_S, self.clock)
    }

    fn begin(&mut self, cost: f64, now: &mut f64) {
        if self.count == 0 && !self.is_waiting {
            self.clock = self.clock.max(*now);
        }
        *now = now.max(self.shows());
        self.live += cost;
        self.count += 1;
    }

    fn end(&mut self, cost: f64, held_s: f64) {
        self.clock = cost.mul_add(held_s, self.clock);
        self.count = self.count.saturating_sub(1);
        // Rounding must not add up.
        self.live = if self.count == 0 { 0.0 } else { (self.live - cost).max(0.0) };
    }

    fn waits(&mut self, is_waiting: bool, now: f64) {
        if is_waiting && !self.is_waiting {
            self.clock = self.clock.max(now - self.live * EXPECTED_S);
        }
        self.is_waiting = is_waiting;
    }
}

impl Shares {
    pub(super) fn new(total: Room) -> Self {
        Self { total, tenants: HashMap::new(), now: 0.0, count: 0 }
    }

    /// Which of these is to be started now, if one is: each is the first of its principal, and all who wait are among them.
    pub(super) fn next(&mut self, heads: &[Head], free: Room) -> Option<usize> {
        self.note_waiting(heads);
        let clocks = |head: &Head| {
            let tenant = self.tenants.get(&head.owner.tenant);
            let principal = tenant.and_then(|tenant| tenant.principals.get(&head.owner.principal));
            (tenant.map_or(self.now, |tenant| tenant.line.shows()), principal.map_or(0.0, |line| line.shows()))
        };
        let mut order: Vec<_> = heads.iter().enumerate().map(|(at, head)| (clocks(head), at, head)).collect();
        order.sort_by(|(left, _, one), (right, _, other)| {
            let by_tenant = left.0.total_cmp(&right.0).then_with(|| one.owner.tenant.cmp(&other.owner.tenant));
            by_tenant.then(left.1.total_cmp(&right.1)).then(other.waited_s.total_cmp(&one.waited_s))
        });
        let mut passed_over: Vec<(f64, &Head)> = Vec::new();
        for ((clock, _), at, head) in order {
            if head.room.fits_in(free) {
                let is_owed =
                    |(earlier, other): &(f64, &Head)| (clock - earlier) * f64::from(other.weight) > LAG_S && is_held_for(other.waited_s);
                return (!passed_over.iter().any(is_owed)).then_some(at);
            }
            if is_held_for(head.waited_s - PATIENCE_S) {
                return None;
            }
            passed_over.push((clock, head));
        }
        None
    }

    /// A sandbox has its room from now on.
    pub(super) fn begin(&mut self, owner: &Owner, weight: u32, room: Room) -> Held {
        let cost = self.dominant_share(room);
        let tenant_cost = cost / f64::from(weight.max(1));
        self.count += 1;
        let tenant = self.tenants.entry(owner.tenant.clone()).or_default();
        tenant.line.begin(tenant_cost, &mut self.now);
        tenant.principals.entry(owner.principal.clone()).or_default().begin(cost, &mut tenant.now);
        Held { owner: owner.clone(), tenant_cost, principal_cost: cost }
    }

    /// It gave its room back, after so long.
    pub(super) fn end(&mut self, held: &Held, held_s: f64) {
        let held_s = held_s.clamp(*HELD_S.start(), *HELD_S.end());
        self.count = self.count.saturating_sub(1);
        let Some(tenant) = self.tenants.get_mut(&held.owner.tenant) else { return };
        tenant.line.end(held.tenant_cost, held_s);
        if let Some(line) = tenant.principals.get_mut(&held.owner.principal) {
            line.end(held.principal_cost, held_s);
        }
        if self.count == 0 && self.tenants.values().all(|tenant| !tenant.line.is_waiting) {
            // Nobody has anything and nobody wants anything: everybody is even.
            *self = Self::new(self.total);
        } else if self.tenants.len() > REMEMBERED_MAX || tenant_len(&self.tenants, &held.owner.tenant) > REMEMBERED_MAX {
            self.forget();
        }
    }

    fn forget(&mut self) {
        let has_nothing = |line: &Line| line.count == 0 && !line.is_waiting;
        for tenant in self.tenants.values_mut() {
            if tenant.principals.len() > REMEMBERED_MAX {
                tenant.principals.retain(|_, line| !has_nothing(line));
            }
        }
        if self.tenants.len() > REMEMBERED_MAX {
            self.tenants.retain(|_, tenant| !has_nothing(&tenant.line));
        }
    }

    fn note_waiting(&mut self, heads: &[Head]) {
        let mut waiting: HashMap<&TenantId, HashSet<&str>> = HashMap::new();
        for head in heads {
            waiting.entry(&head.owner.tenant).or_default().insert(&head.owner.principal);
        }
        for (id, tenant) in &mut self.tenants {
            let principals = waiting.get(id);
            if principals.is_none() {
                tenant.line.waits(false, self.now);
            }
            for (name, line) in &mut tenant.principals {
                if principals.is_none_or(|waiting| !waiting.contains(name.as_str())) {
                    line.waits(false, tenant.now);
                }
            }
        }
        for (id, principals) in waiting {
            let tenant = self.tenants.entry(id.clone()).or_default();
            tenant.line.waits(true, self.now);
            for name in principals {
                tenant.principals.entry(name.to_owned()).or_default().waits(true, tenant.now);
            }
        }
    }

    /// The larger of its shares of what there is.
    fn dominant_share(&self, room: Room) -> f64 {
        let share = |part: u64, whole: u64| as_f64(part) / as_f64(whole.max(1));
        share(room.memory_bytes, self.total.memory_bytes).max(share(room.cpu_millis, self.total.cpu_millis))
    }
}

fn tenant_len(tenants: &HashMap<TenantId, Tenant>, id: &TenantId) -> usize {
    tenants.get(id).map_or(0, |tenant| tenant.principals.len())
}

/// Whether room is held free, now, for one that does not fit and could have had it for so long.
fn is_held_for(waited_s: f64) -> bool {
    if waited_s < 0.0 {
        return false;
    }
    let (mut since, mut window) = (waited_s, *RESERVE_S.start());
    while since >= 2.0 * window && window < *RESERVE_S.end() {
        since -= 2.0 * window;
        window *= 2.0;
    }
    since % (2.0 * window) < window
}

#[expect(clippy::cast_precision_loss, reason = "a share needs no more than 53 bits")]
const fn as_f64(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests;
