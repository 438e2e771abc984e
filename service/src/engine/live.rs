//! What this process knows of sandboxes that have not ended: newer than their rows, and gone with the process.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sandbox_core::protocol::{KillReason, Launched, Layering, Usage};
use time::OffsetDateTime;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard, watch};

use super::{
    capacity::{Reservation, Room},
    step,
};
use crate::{
    clock::at_us,
    metrics::Metrics,
    sandbox::{CompileEnd, Event, Judged, Limits, LogTail, Sandbox, SandboxId, State, case_id, step_id},
    store::{Hold, Lease},
    telemetry::{self, Origin},
};

/// How far a sandbox has come.
#[derive(Debug, Clone)]
pub enum Progress {
    Queued,
    Starting,
    Running(Launched),
    /// It runs, and stands still.
    Paused(Launched),
    /// Its outcome is stored.
    Ended(Arc<Finished>),
    /// It was deleted before it began.
    Gone,
}

/// A sandbox that ended, as its row has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    pub sandbox: Sandbox,
    pub log_tail: LogTail,
}

/// A sandbox that has not ended.
#[derive(Debug)]
pub(super) struct Live {
    /// As it was admitted; what has changed since is in the progress, and in what can be changed.
    pub(super) sandbox: Sandbox,
    changeable: watch::Sender<Changeable>,
    /// Held by who changes it, so that one change follows the other in Postgres and at the keeper alike.
    turn: AsyncMutex<()>,
    /// What it goes on from.
    layer: Mutex<Layering>,
    /// How its compile step ended, and what that used.
    compiled: Mutex<Option<(CompileEnd, Usage)>>,
    /// What came of its cases so far.
    judged: Mutex<Option<Judged>>,
    /// Its room on this node.
    reservation: Mutex<Option<Reservation>>,
    /// When something was last asked of it.
    active_at: Mutex<Option<OffsetDateTime>>,
    /// How long its image was looked for.
    pub(super) image_took: Duration,
    /// The request that it comes from, if that is traced and was answered here.
    pub(super) origin: Option<Origin>,
    /// Whether something of it was launched.
    was_launched: AtomicBool,
    /// Whether its row is known to be on disk.
    is_kept: Arc<AtomicBool>,
    /// What it was claimed by, or last taken over; of a queued one nothing.
    lease: Mutex<Lease>,
    progress: watch::Sender<Progress>,
    killed_for: Mutex<Option<KillReason>>,
    metrics: Arc<Metrics>,
}

/// What can be changed of a sandbox that lives.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Changeable {
    pub(super) name: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) limits: Limits,
    pub(super) ttl_ms: Option<u64>,
    pub(super) expires_at: Option<OffsetDateTime>,
    pub(super) idle_timeout_ms: Option<u64>,
}

impl Changeable {
    pub(super) fn of(sandbox: &Sandbox) -> Self {
        let Sandbox { name, labels, limits, ttl_ms, expires_at, idle_timeout_ms, .. } = sandbox.clone();
        Self { name, labels, limits, ttl_ms, expires_at, idle_timeout_ms }
    }

    fn over(&self, sandbox: &Sandbox) -> Sandbox {
        let Self { name, labels, limits, ttl_ms, expires_at, idle_timeout_ms } = self.clone();
        Sandbox { name, labels, limits, ttl_ms, expires_at, idle_timeout_ms, ..sandbox.clone() }
    }
}

impl Progress {
    pub(super) fn state(&self) -> State {
        match self {
            Self::Queued => State::Queued,
            Self::Starting => State::Starting,
            Self::Running(_) => State::Running,
            Self::Paused(_) => State::Paused,
            Self::Ended(finished) => finished.sandbox.state,
            Self::Gone => State::Failed,
        }
    }
}

impl Live {
    fn new(
        sandbox: Sandbox,
        (image_took, origin): (Duration, Option<Origin>),
        lease: Lease,
        progress: watch::Sender<Progress>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            changeable: watch::channel(Changeable::of(&sandbox)).0,
            turn: AsyncMutex::new(()),
            layer: Mutex::new(Layering::Fresh),
            compiled: Mutex::default(),
            judged: Mutex::default(),
            reservation: Mutex::default(),
            active_at: Mutex::default(),
            sandbox,
            image_took,
            origin,
            was_launched: AtomicBool::new(false),
            is_kept: Arc::default(),
            lease: Mutex::new(lease),
            progress,
            killed_for: Mutex::default(),
            metrics,
        }
    }

    /// Whether what is launched now is the first of all that is launched for it: of a run with a compile step that, of one with cases the first. Asked once for each.
    pub(super) fn is_first_launch(&self) -> bool {
        let was_launched = self.was_launched.swap(true, Ordering::Relaxed);
        // What came before was another life, or another attempt.
        !was_launched && self.sandbox.starts == 1 && self.sandbox.attempt == 1
    }

    /// Its row is on disk.
    pub(super) fn note_kept(&self) {
        self.is_kept.store(true, Ordering::Relaxed);
    }

    /// Whether its row is known to be on disk, for who writes it.
    pub(super) fn keeping(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_kept)
    }

    pub(super) fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The sandbox as it is now.
    pub(super) fn now(&self) -> Sandbox {
        match &*self.progress.borrow() {
            Progress::Ended(finished) => finished.sandbox.clone(),
            progress @ (Progress::Queued | Progress::Starting | Progress::Gone) => Sandbox { state: progress.state(), ..self.so_far() },
            progress @ (Progress::Running(launched) | Progress::Paused(launched)) => {
                let (started_at, fences) = (Some(at_us(launched.started_at_us)), Some(launched.fences));
                Sandbox { state: progress.state(), started_at, fences, ..self.so_far() }
            }
        }
    }

    /// As it was admitted, with what was changed since, and with how its compile step ended.
    fn so_far(&self) -> Sandbox {
        let mut sandbox = self.changeable.borrow().over(&self.sandbox);
        if let Some(compile) = &mut sandbox.compile {
            compile.end = self.compiled().map(|(end, _)| end);
        }
        sandbox
    }

    /// Its compile step has ended like this, and used so much.
    pub(super) fn note_compiled(&self, end: CompileEnd, used: Usage) {
        *self.compiled.lock().unwrap_or_else(PoisonError::into_inner) = Some((end, used));
    }

    pub(super) fn compiled(&self) -> Option<(CompileEnd, Usage)> {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its cases have come to this.
    pub(super) fn note_judged(&self, judged: Judged) {
        *self.judged.lock().unwrap_or_else(PoisonError::into_inner) = Some(judged);
    }

    pub(super) fn judged(&self) -> Option<Judged> {
        self.judged.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// By which the keeper may know something of it: its payload or the cases of that, and before them its compile step.
    pub(super) fn names(&self) -> impl Iterator<Item = SandboxId> + use<> {
        let step = self.sandbox.compile.as_ref().map(|_| step_id(self.sandbox.id));
        let cases = self.sandbox.judging.map(|_| [0, 1].map(|index| case_id(self.sandbox.id, self.sandbox.claims, index)));
        step.into_iter().chain(cases.into_iter().flatten()).chain([self.sandbox.id])
    }

    /// When and how its payload was started, if it runs.
    pub(super) fn launched(&self) -> Option<Launched> {
        match &*self.progress.borrow() {
            Progress::Running(launched) | Progress::Paused(launched) => Some(*launched),
            Progress::Queued | Progress::Starting | Progress::Ended(_) | Progress::Gone => None,
        }
    }

    /// The payload runs.
    pub(super) fn running(&self, launched: Launched) {
        self.advance(Event::Launched, Progress::Running(launched));
    }

    /// It stands still, or goes on. Nothing happens where that is known, or it has ended.
    pub(super) fn paused(&self, is_paused: bool) {
        match (self.progress(), is_paused) {
            (Progress::Running(launched), true) => self.advance(Event::Paused, Progress::Paused(launched)),
            (Progress::Paused(launched), false) => {
                self.advance(Event::Resumed, Progress::Running(launched));
            }
            (
                Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) | Progress::Ended(_) | Progress::Gone,
                _,
            ) => {}
        }
    }

    /// Waits until nobody else changes it.
    pub(super) async fn turn(&self) -> AsyncMutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// What was changed of it, as it is now.
    pub(super) fn limits(&self) -> Limits {
        self.changeable.borrow().limits
    }

    pub(super) fn changes(&self) -> watch::Receiver<Changeable> {
        self.changeable.subscribe()
    }

    /// Its row says this by now.
    pub(super) fn changed(&self, to: Changeable) {
        self.changeable.send_if_modified(|now| std::mem::replace(now, to.clone()) != to);
    }

    /// It has this room until that is freed.
    pub(super) fn give_room(&self, reservation: Reservation) {
        *self.reservation.lock().unwrap_or_else(PoisonError::into_inner) = Some(reservation);
    }

    pub(super) fn free_room(&self) {
        drop(self.take_room());
    }

    pub(super) fn take_room(&self) -> Option<Reservation> {
        self.reservation.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// It goes on from what this one left.
    pub(super) fn go_on_from(&self, layer: Layering) {
        *self.layer.lock().unwrap_or_else(PoisonError::into_inner) = layer;
    }

    pub(super) fn layer(&self) -> Layering {
        *self.layer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes other room instead of what it has. False, and nothing is changed: there is not so much.
    pub(super) fn resize_room(&self, room: Room) -> bool {
        let mut held = self.reservation.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_mut().is_none_or(|reservation| reservation.resize(room))
    }

    /// Somebody used it at this time.
    pub(super) fn touch(&self, at: OffsetDateTime) {
        *self.active_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    pub(super) fn active_at(&self) -> Option<OffsetDateTime> {
        *self.active_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its end is stored.
    pub(super) fn ended(&self, finished: Finished) {
        let before = self.progress.send_replace(Progress::Ended(Arc::new(finished)));
        // One that was deleted meanwhile is not counted any more.
        if !matches!(before, Progress::Gone) {
            self.metrics.moved(Some(before.state()), None);
        }
    }

    /// It waits for another attempt. See [`Registry::give_back`].
    fn returned(&self) {
        self.advance(Event::Returned, Progress::Queued);
    }

    /// What it is written by.
    pub(super) fn hold(&self) -> Hold {
        Hold { lease: *self.lease.lock().unwrap_or_else(PoisonError::into_inner), claims: self.sandbox.claims }
    }

    /// It was taken over with this lease.
    pub(super) fn take_over(&self, lease: Lease) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    fn advance(&self, event: Event, to: Progress) {
        self.progress.send_if_modified(|progress| {
            let from = progress.state();
            let Some(state) = step(self.sandbox.id, from, event) else { return false };
            self.metrics.moved(Some(from), Some(state));
            *progress = to;
            true
        });
    }

    /// It is somebody's: who followed it while it waited in its pool follows it no more.
    pub(super) fn release(&self) {
        self.progress.send_replace(Progress::Gone);
    }

    /// It is to end, for this reason, whether or not the keeper knows of it yet.
    pub(super) fn order_kill(&self, reason: KillReason) {
        self.killed_for.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
    }

    pub(super) fn ordered_kill(&self) -> Option<KillReason> {
        *self.killed_for.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All live sandboxes of this process.
#[derive(Debug)]
pub(super) struct Registry {
    live: Mutex<HashMap<SandboxId, Arc<Live>>>,
    metrics: Arc<Metrics>,
}

/// See [`Registry::known`].
#[derive(Debug)]
pub(super) struct Known<'a> {
    registry: &'a Registry,
    live: Option<Arc<Live>>,
}

impl Known<'_> {
    /// It goes on being known: it waits again.
    pub(super) fn keep(mut self) {
        self.live = None;
    }
}

impl Drop for Known<'_> {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            self.registry.remove_current(&live);
        }
    }
}

impl Registry {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { live: Mutex::default(), metrics }
    }

    /// Begins to know a sandbox, in the state that it has.
    pub(super) fn insert(&self, sandbox: Sandbox, lease: Lease, image_took: Duration) -> Arc<Live> {
        let (id, state) = (sandbox.id, sandbox.state);
        let progress = if state == State::Queued { Progress::Queued } else { Progress::Starting };
        self.metrics.moved(None, Some(progress.state()));
        let (progress, _) = watch::channel(progress);
        let live = Arc::new(Live::new(sandbox, (image_took, telemetry::here()), lease, progress, Arc::clone(&self.metrics)));
        self.lock().insert(id, Arc::clone(&live));
        live
    }

    /// A queued sandbox was claimed: those who wait for it go on waiting.
    pub(super) fn claimed(&self, sandbox: Sandbox, lease: Lease) -> Arc<Live> {
        let mut all = self.lock();
        let before = all.remove(&sandbox.id);
        let ordered_kill = before.as_ref().and_then(|before| before.ordered_kill());
        let (progress, asked) = before.map_or_else(
            || {
                self.metrics.moved(None, Some(State::Starting));
                (watch::channel(Progress::Starting).0, (Duration::ZERO, None))
            },
            |before| {
                // One that is claimed anew before its former follower has said so is not running any more.
                before.returned();
                before.advance(Event::Claimed, Progress::Starting);
                (before.progress.clone(), (before.image_took, before.origin.clone()))
            },
        );
        let id = sandbox.id;
        let live = Arc::new(Live::new(sandbox, asked, lease, progress, Arc::clone(&self.metrics)));
        if let Some(reason) = ordered_kill {
            live.order_kill(reason);
        }
        all.insert(id, Arc::clone(&live));
        live
    }

    /// One that waited in a pool is somebody's, as this sandbox says; it was launched like this.
    pub(super) fn taken(&self, before: &Live, sandbox: Sandbox, launched: Launched) -> Arc<Live> {
        let id = sandbox.id;
        let progress = watch::channel(Progress::Running(launched)).0;
        let live =
            Arc::new(Live::new(sandbox, (Duration::ZERO, telemetry::here()), before.hold().lease, progress, Arc::clone(&self.metrics)));
        live.was_launched.store(true, Ordering::Relaxed);
        self.lock().insert(id, Arc::clone(&live));
        live
    }

    pub(super) fn get(&self, id: SandboxId) -> Option<Arc<Live>> {
        self.lock().get(&id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Live>> {
        self.lock().values().cloned().collect()
    }

    /// Knows it no more. One that has not ended is gone.
    pub(super) fn remove(&self, id: SandboxId) {
        let removed = self.lock().remove(&id);
        if let Some(live) = removed {
            Self::gone(&live);
        }
    }

    /// [`Self::remove`], if this is what is known of it: not what has begun another life since.
    pub(super) fn remove_current(&self, live: &Arc<Live>) {
        let removed = {
            let mut all = self.lock();
            let is_current = all.get(&live.sandbox.id).is_some_and(|current| Arc::ptr_eq(current, live));
            is_current.then(|| all.remove(&live.sandbox.id)).flatten()
        };
        if let Some(live) = removed {
            Self::gone(&live);
        }
    }

    fn gone(live: &Live) {
        live.progress.send_if_modified(|progress| {
            if matches!(progress, Progress::Ended(_)) {
                return false;
            }
            live.metrics.moved(Some(progress.state()), None);
            *progress = Progress::Gone;
            true
        });
    }

    /// Whether this is what is known of its sandbox now, and not what was before it was claimed again.
    pub(super) fn is_current(&self, live: &Arc<Live>) -> bool {
        self.lock().get(&live.sandbox.id).is_some_and(|current| Arc::ptr_eq(current, live))
    }

    /// It waits again, if this is what is known of it. False: it was claimed anew meanwhile, or is known no more.
    pub(super) fn give_back(&self, live: &Arc<Live>) -> bool {
        let all = self.lock();
        let is_current = all.get(&live.sandbox.id).is_some_and(|current| Arc::ptr_eq(current, live));
        if is_current {
            live.returned();
        }
        is_current
    }

    /// Known until the guard is dropped: also one whose task panics is known no more, so that others can take it over.
    pub(super) const fn known(&self, live: Arc<Live>) -> Known<'_> {
        Known { registry: self, live: Some(live) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
