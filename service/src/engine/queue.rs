//! The scheduler: takes queued sandboxes, in fair order, whenever there is room.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sandbox_core::{
    fail_point,
    protocol::{Cause, KillReason},
};
use time::OffsetDateTime;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Engine, capacity::Room, fair::Head};
use crate::{
    sandbox::{Finish, Phases, SandboxId},
    store::{Candidate, Ears, StoreError, Writer},
};

/// Between two looks that nobody asked for: a message can be lost, a time to live can be over.
const POLL: Duration = Duration::from_secs(1);
/// How many are fetched of each principal that waits.
const OF_EACH: u32 = 16;

/// The first of every principal that waits, as they were when the queue was last looked at.
#[derive(Debug, Default)]
struct Lines {
    lines: Vec<Line>,
    /// Whether one has been used up that has more behind it.
    has_run_out: bool,
    /// Whether one was left out that this node must not claim yet.
    has_left_out: bool,
    looked_at: Option<Instant>,
}

#[derive(Debug)]
struct Line {
    known: VecDeque<Candidate>,
    /// Whether there may be more than is known.
    is_cut: bool,
}

impl Engine {
    /// Schedules until the engine stops, or its keeper is gone.
    pub(super) async fn schedule(self: Arc<Self>) {
        let mut listener = None;
        let mut lines = Lines::default();
        // Made once: whatever else wakes us, and however often, must not put it off.
        let mut look = tokio::time::interval(POLL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.stopping.is_cancelled() {
                return;
            }
            if let Err(error) = self.claim_what_fits(&mut lines).await {
                tracing::warn!(%error, "looking at the queue failed");
            }
            if listener.is_none() {
                listener = self.store.listen().await.ok();
            }
            tokio::select! {
                () = self.stopping.cancelled() => return,
                // Nothing can be started any more, and what was running is over.
                () = self.keeper_gone() => self.stopping.cancel(),
                () = self.wake.notified() => {}
                () = heard(&mut listener) => {
                    lines.outdate();
                    self.stop_suspended_or_log().await;
                }
                _ = look.tick() => {
                    lines.looked_at = None;
                    self.pressure.look();
                    self.look_around().await;
                    self.stop_suspended_or_log().await;
                }
            }
        }
    }

    /// Whether somebody waits, as far as this node knows.
    pub(super) fn has_queue(&self) -> bool {
        self.has_queue.load(Ordering::SeqCst)
    }

    /// Somebody waits.
    pub(super) fn note_queue(&self) {
        self.has_queue.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }

    /// Claims for as long as somebody is next; see [`super::fair`].
    async fn claim_what_fits(self: &Arc<Self>, lines: &mut Lines) -> Result<(), StoreError> {
        if lines.has_left_out {
            // It may have been decided since.
            lines.looked_at = None;
        }
        while !self.stopping.is_cancelled() && self.hindrance().is_none() {
            // Set before looking, so that room which becomes free from now on wakes the scheduler.
            self.has_queue.store(true, Ordering::SeqCst);
            if lines.looked_at.is_none() || lines.has_run_out {
                let mut candidates = self.store.next_queued(OF_EACH, self.node, self.clock.now()).await?;
                let found = candidates.len();
                candidates.retain(|candidate| !self.undecided.contains(candidate.id));
                lines.has_left_out = candidates.len() < found;
                lines.take(candidates);
            }
            let heads = lines.heads(self.clock.now());
            let Some((next, reservation)) = self.capacity.grant(&heads) else {
                // The first that would find room so. The room that is left wakes us.
                let mut by_age: Vec<_> = heads.iter().collect();
                by_age.sort_by(|one, other| other.waited_s.total_cmp(&one.waited_s));
                if let Some(first) = by_age.into_iter().find(|head| self.would_make_room_for(head.room)) {
                    self.make_room_for(first.room).await;
                }
                if lines.lines.is_empty() {
                    // Whoever comes from now on says so.
                    lines.looked_at = None;
                    self.has_queue.store(false, Ordering::SeqCst);
                    self.metrics.queue_depth.set(0);
                }
                return Ok(());
            };
            let Some(id) = lines.pop(next) else { return Ok(()) };
            let lease = self.lease();
            match self.store.claim(id, lease, self.clock.now()).await {
                Ok(Some((sandbox, input))) => {
                    fail_point::reached("service.queue.claimed");
                    let live = self.live.claimed(sandbox, lease);
                    tokio::spawn(Arc::clone(self).carry(live, input, reservation));
                }
                // Someone was faster, or this node may not, and will hear so.
                Ok(None) if self.store.may_claim(lease).await? => {}
                Ok(None) => {
                    self.renewal.notify_one();
                    lines.looked_at = None;
                    return Ok(());
                }
                // It would be first for ever, and never be begun.
                Err(error @ StoreError::Damaged(_)) => self.settle_damaged(id, Writer::Queue, &error).await?,
                Err(error) => {
                    if matches!(error, StoreError::Unavailable(_)) {
                        self.end_unclear_claim(id).await;
                    }
                    lines.looked_at = None;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn stop_suspended_or_log(self: &Arc<Self>) {
        if let Err(error) = self.stop_suspended().await {
            tracing::warn!(%error, "ending what suspended tenants have failed");
        }
    }

    /// Ends a sandbox whose claim may have been committed or not: what it was to be given is lost with the answer. Returns when that is
    /// clear: until then it must not be claimed again.
    async fn end_unclear_claim(self: &Arc<Self>, id: SandboxId) {
        let rows = loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            match self.store.live_of(self.node).await {
                Ok(rows) => break rows,
                Err(error) => tracing::warn!(sandbox.id = %id, %error, "whether it was claimed is not known yet"),
            }
        };
        let Some(row) = rows.into_iter().find(|row| row.id == id) else { return };
        let live = self.live.claimed(row, self.lease());
        let ending = self.infra_error("the connection to the database broke while it was taken from the queue".to_owned());
        self.settle_alone(live, ending);
    }

    async fn look_around(self: &Arc<Self>) {
        self.metrics.keeper_reconnects(self.keeper.reconnects());
        if let Err(error) = self.notice_ends().await {
            tracing::warn!(%error, "looking for the ends of what others run failed");
        }
        if !self.has_queue.load(Ordering::SeqCst) {
            return;
        }
        match self.store.queue_depth().await {
            Ok(depth) => self.metrics.queue_depth.set(i64::try_from(depth).unwrap_or(i64::MAX)),
            Err(error) => tracing::warn!(%error, "counting the queue failed"),
        }
        let now = self.clock.now();
        match self.store.overdue_queued(now).await {
            Ok(overdue) => {
                for sandbox in overdue {
                    let total = Phases::ms((now - sandbox.created_at).unsigned_abs());
                    let phases = Phases { queue: total, total, ..Phases::default() };
                    let finish = Finish::without_usage(Cause::Killed(KillReason::Expired), now, &sandbox.limits, phases);
                    self.settle_queued(&sandbox, finish).await;
                }
            }
            Err(error) => tracing::warn!(%error, "looking for overdue sandboxes failed"),
        }
    }
}

impl Lines {
    /// Something may have come. Where there are many lines, what is known of them holds for a moment more: each look reads them all.
    fn outdate(&mut self) {
        const MANY: usize = 64;
        const MOMENT: Duration = Duration::from_millis(50);
        if self.lines.len() < MANY || self.looked_at.is_none_or(|at| at.elapsed() > MOMENT) {
            self.looked_at = None;
        }
    }

    fn take(&mut self, candidates: Vec<Candidate>) {
        *self = Self { looked_at: Some(Instant::now()), has_left_out: self.has_left_out, ..Self::default() };
        for candidate in candidates {
            match self.lines.last_mut() {
                Some(line) if line.known.back().is_some_and(|last| last.owner == candidate.owner) => line.known.push_back(candidate),
                Some(_) | None => self.lines.push(Line { known: VecDeque::from([candidate]), is_cut: false }),
            }
        }
        for line in &mut self.lines {
            line.is_cut = line.known.len() >= usize::try_from(OF_EACH).unwrap_or(usize::MAX);
        }
    }

    fn heads(&self, now: OffsetDateTime) -> Vec<Head> {
        let firsts = self.lines.iter().filter_map(|line| line.known.front());
        let heads = firsts.map(|first| Head {
            owner: first.owner.clone(),
            weight: first.weight,
            room: Room { memory_bytes: first.memory_bytes, cpu_millis: first.cpu_millis, sandboxes: 1 },
            waited_s: (now - first.created_at).as_seconds_f64(),
        });
        heads.collect()
    }

    /// Takes out the first of this line.
    fn pop(&mut self, at: usize) -> Option<SandboxId> {
        let line = self.lines.get_mut(at)?;
        let first = line.known.pop_front();
        if line.known.is_empty() {
            self.has_run_out |= line.is_cut;
            self.lines.remove(at);
        }
        first.map(|first| first.id)
    }
}

async fn heard(listener: &mut Option<Ears>) {
    match listener {
        Some(listener) => listener.heard().await,
        None => std::future::pending().await,
    }
}
