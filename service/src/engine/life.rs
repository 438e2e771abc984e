//! What a sandbox is told between its start and its end: to stand still, to go on, to stop; and when it has done nothing for too long.
//!
//! The keeper does it first, then the row says so. Who dies in between leaves a sandbox that is not as its row says; the next service holds it to
//! the row ([`Engine::hold_to_row`]).

use std::{sync::Arc, time::Duration};

use sandbox_core::{
    fail_point,
    protocol::{Cause, FailureKind, KillReason, NewLimits},
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tracing::Instrument as _;

use super::{Engine, EngineError, Followed, Owner, Progress, capacity::Room, live::Changeable, live::Live};
use crate::{
    clock::at_us,
    runtime::CallError,
    sandbox::{Finish, Kind, Limits, Phases, Sandbox, SandboxId, Signal, State, TenantId, check_name, new_limits},
    store::{Act, StoreError},
};

/// How long the keeper has for what takes it a moment.
pub(super) const KEEPER_DEADLINE: Duration = Duration::from_secs(5);
/// Between two orders to end a sandbox, should the first have been lost with the connection, and how often it is ordered.
const REPEAT: Duration = Duration::from_secs(1);
const ATTEMPTS: u32 = 20;
/// How long after its grace the end of one that was told to stop is waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts to have the keeper hold one to its row.
const HOLD_AGAIN: Duration = Duration::from_millis(200);
/// How many are removed at a time.
const BATCH: u32 = 500;

/// Where a sandbox is to be found.
pub(super) enum Place {
    /// This process follows it.
    Here(Arc<Live>),
    /// Its row is all that is known of it here.
    InRow(Box<Sandbox>),
}

/// Does it in a task of its own: who asked may go away in the middle.
pub(super) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::spawn(work.in_current_span()).await.unwrap_or_else(|panic| Err(EngineError::Store(StoreError::Other(panic.into()))))
}

impl Engine {
    /// What this text names: by id, or a sandbox by its name.
    pub async fn named(&self, tenant: &TenantId, text: &str) -> Result<Option<SandboxId>, EngineError> {
        match text.parse() {
            Ok(id) => Ok(Some(id)),
            // What cannot be a name names nothing.
            Err(_no_id) if check_name(text.to_owned()).is_err() => Ok(None),
            Err(_no_id) => Ok(self.store.find_named(tenant, text).await?),
        }
    }

    /// Somebody uses what is inside this sandbox: it is not idle.
    pub fn touch(&self, id: SandboxId) {
        if let Some(live) = self.live.get(id) {
            live.touch(self.clock.now());
        }
    }

    /// Has the tenant's sandbox stand still, or go on. `None` if there is none. Nothing happens to one of which that is true already.
    pub async fn set_paused(self: &Arc<Self>, owner: Owner, id: SandboxId, is_paused: bool) -> Result<Option<Sandbox>, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.set_paused_now(&owner, id, is_paused).await }).await
    }

    async fn set_paused_now(self: &Arc<Self>, owner: &Owner, id: SandboxId, is_paused: bool) -> Result<Option<Sandbox>, EngineError> {
        let live = match self.place(&owner.tenant, Kind::Sandbox, id).await? {
            None => return Ok(None),
            Some(Place::InRow(sandbox)) => return Err(not_here(sandbox.state)),
            Some(Place::Here(live)) => live,
        };
        let _turn = live.turn().await;
        let launched = match live.progress() {
            Progress::Running(launched) if is_paused => launched,
            Progress::Paused(launched) if !is_paused => launched,
            Progress::Running(_) | Progress::Paused(_) => return Ok(Some(live.now())),
            progress @ (Progress::Queued | Progress::Starting | Progress::Ended(_) | Progress::Gone) => {
                return Err(EngineError::WrongState(progress.state()));
            }
        };
        let told = if is_paused { self.in_time(self.keeper.pause(id)).await } else { self.in_time(self.keeper.resume(id)).await };
        if let Err(error) = told {
            self.hold_to_row_later(&live);
            return Err(refused(&live, error));
        }
        fail_point::reached("service.pause.held");
        let act = Act { actor: Some(owner), at: self.clock.now(), data: Value::Null };
        let started = (at_us(launched.started_at_us), launched.fences);
        let noted = loop {
            match self.store.mark_paused(id, live.hold(), is_paused, started, &act).await {
                // This node may have lost its lease and taken it again, and the sandbox with it.
                Ok(false) => match self.is_ours_again(&live).await {
                    Ok(true) => {}
                    Ok(false) => break Ok(false),
                    Err(error) => break Err(error),
                },
                noted => break noted,
            }
        };
        match noted {
            Ok(true) => {}
            Ok(false) => {
                self.hold_to_row_later(&live);
                return Err(not_here(live.progress().state()));
            }
            Err(error) => {
                self.hold_to_row_later(&live);
                return Err(error.into());
            }
        }
        live.touch(self.clock.now());
        live.paused(is_paused);
        fail_point::reached("service.pause.stored");
        Ok(Some(live.now()))
    }

    /// Asks for the end of the tenant's sandbox, by this signal, or by its own, and kills it after the grace. Returns when it has ended, or should
    /// have; `None` if there is none.
    pub async fn stop_sandbox(
        self: &Arc<Self>,
        owner: Owner,
        id: SandboxId,
        signal: Option<Signal>,
        grace: Option<Duration>,
    ) -> Result<Option<Sandbox>, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.stop_sandbox_now(&owner, id, signal, grace).await }).await
    }

    async fn stop_sandbox_now(
        self: &Arc<Self>,
        owner: &Owner,
        id: SandboxId,
        signal: Option<Signal>,
        grace: Option<Duration>,
    ) -> Result<Option<Sandbox>, EngineError> {
        let Some(place) = self.place(&owner.tenant, Kind::Sandbox, id).await? else { return Ok(None) };
        let Place::Here(live) = place else { return self.end_now(owner, Kind::Sandbox, id).await };
        let stop = live.sandbox.program.stop;
        let (signal, grace) = (signal.unwrap_or(stop.signal), grace.unwrap_or(Duration::from_millis(stop.grace_ms)));
        match live.progress() {
            Progress::Ended(finished) => return Ok(Some(finished.sandbox.clone())),
            Progress::Running(_) | Progress::Paused(_) if signal != Signal::KILL => {}
            Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) | Progress::Gone => {
                return self.end_now(owner, Kind::Sandbox, id).await;
            }
        }
        // What stands still hears no signal.
        match self.set_paused_now(owner, id, false).await {
            Ok(_) => {}
            Err(EngineError::WrongState(state)) if state.is_final() => return Ok(Some(live.now())),
            Err(error) => return Err(error),
        }
        let data = json!({ "signal": signal, "grace_ms": u64::try_from(grace.as_millis()).unwrap_or(u64::MAX) });
        self.tell(owner, id, "sandbox.stopped", data).await?;
        fail_point::reached("service.stop.told");
        match self.in_time(self.keeper.stop(id, signal.number(), grace, KillReason::StoppedByUser)).await {
            // It has ended by itself, and its end is on the way.
            Ok(()) | Err(CallError::Failed(sandbox_core::protocol::Failure { kind: FailureKind::Gone, .. })) => {}
            Err(error) => return Err(refused(&live, error)),
        }
        fail_point::reached("service.stop.ordered");
        let mut followed = Followed::new(Arc::clone(&live));
        drop(tokio::time::timeout(grace + STOP_PATIENCE, followed.ended()).await);
        Ok(Some(live.now()))
    }

    /// Sends a signal to the first process of the tenant's sandbox; SIGKILL ends the sandbox, in whatever state it is. `None` if there is none.
    pub async fn signal(self: &Arc<Self>, owner: Owner, id: SandboxId, signal: Signal) -> Result<Option<Sandbox>, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.signal_now(&owner, id, signal).await }).await
    }

    async fn signal_now(self: &Arc<Self>, owner: &Owner, id: SandboxId, signal: Signal) -> Result<Option<Sandbox>, EngineError> {
        let Some(place) = self.place(&owner.tenant, Kind::Sandbox, id).await? else { return Ok(None) };
        let (state, live) = match place {
            Place::Here(live) => (live.progress().state(), Some(live)),
            Place::InRow(sandbox) => (sandbox.state, None),
        };
        if state.is_final() {
            return Err(EngineError::WrongState(state));
        }
        if signal == Signal::KILL {
            return self.end_now(owner, Kind::Sandbox, id).await;
        }
        let Some(live) = live.filter(|_| matches!(state, State::Running | State::Paused)) else { return Err(not_here(state)) };
        // First: what could not be told of would be sent again.
        self.tell(owner, id, "sandbox.signaled", json!({ "signal": signal })).await?;
        match self.in_time(self.keeper.signal(id, signal.number())).await {
            Ok(()) => {}
            Err(CallError::Lost) => return Err(EngineError::OutcomeUnknown),
            Err(error) => return Err(refused(&live, error)),
        }
        live.touch(self.clock.now());
        Ok(Some(live.now()))
    }

    /// Ends the tenant's run, whether it waits or runs. Returns it as it ended; `None` if there is none.
    pub async fn cancel(self: &Arc<Self>, owner: Owner, id: SandboxId) -> Result<Option<Sandbox>, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.end_now(&owner, Kind::Run, id).await }).await
    }

    /// Kills it for its owner, wherever it stands. Returns it as it ended.
    async fn end_now(self: &Arc<Self>, owner: &Owner, kind: Kind, id: SandboxId) -> Result<Option<Sandbox>, EngineError> {
        let mut is_told = false;
        for _ in 0..ATTEMPTS {
            let Some(sandbox) = self.find(&owner.tenant, kind, id).await? else { return Ok(None) };
            if sandbox.state.is_final() {
                return Ok(Some(sandbox));
            }
            let live = self.live.get(id).filter(|live| !matches!(live.progress(), Progress::Queued));
            // One that another node has is not ended from here.
            let can_be_ended = live.is_some() || sandbox.state == State::Queued;
            if can_be_ended && !std::mem::replace(&mut is_told, true) {
                self.tell(owner, id, "sandbox.killed", json!({})).await?;
                fail_point::reached("service.stop.told");
            }
            match live {
                Some(live) => {
                    self.kill(&live, KillReason::StoppedByUser).await;
                    fail_point::reached("service.stop.ordered");
                    let mut followed = Followed::new(Arc::clone(&live));
                    if let Ok(Some(finished)) = tokio::time::timeout(REPEAT, followed.ended()).await {
                        return Ok(Some(finished.sandbox.clone()));
                    }
                }
                None if sandbox.state == State::Queued => {
                    let at = self.clock.now();
                    let total = Phases::ms((at - sandbox.created_at).unsigned_abs());
                    let phases = Phases { queue: total, total, ..Phases::default() };
                    let finish = Finish::without_usage(Cause::Killed(KillReason::StoppedByUser), at, &sandbox.limits, phases);
                    self.settle_queued(&sandbox, finish).await;
                }
                // Just taken from the queue, or its end is being stored.
                None => tokio::time::sleep(REPEAT / 20).await,
            }
        }
        Err(EngineError::KeeperUnavailable)
    }

    /// Where the tenant's sandbox of this kind is to be found; `None` if there is none.
    pub(super) async fn place(&self, tenant: &TenantId, kind: Kind, id: SandboxId) -> Result<Option<Place>, EngineError> {
        if let Some(live) = self.live.get(id)
            && live.sandbox.tenant == *tenant
            && live.sandbox.kind == kind
            && !matches!(live.progress(), Progress::Queued)
        {
            return Ok(Some(Place::Here(live)));
        }
        let found = self.store.find(tenant, id).await?;
        Ok(found.filter(|sandbox| sandbox.kind == kind).map(|sandbox| Place::InRow(sandbox.into())))
    }

    async fn tell(&self, owner: &Owner, id: SandboxId, kind: &str, data: Value) -> Result<(), EngineError> {
        let act = Act { actor: Some(owner), at: self.clock.now(), data };
        Ok(self.store.tell_of_sandbox(&owner.tenant, id, kind, &act).await?)
    }

    /// What the keeper says, if it says it soon.
    pub(super) async fn in_time<T>(&self, asked: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
        tokio::time::timeout(KEEPER_DEADLINE, asked).await.unwrap_or(Err(CallError::Lost))
    }

    /// Returns when it has done nothing for so long. What stands still is not idle.
    pub(super) async fn idle_for(&self, live: &Live, timeout_ms: Option<u64>) {
        let Some(timeout) = timeout_ms.map(Duration::from_millis) else { return std::future::pending().await };
        let mut progress = live.subscribe();
        let mut written_at = None;
        loop {
            let is_paused = matches!(*progress.borrow_and_update(), Progress::Paused(_));
            let last = live.active_at().max(written_at);
            let until = last.filter(|_| !is_paused).map(|last| last + timeout);
            if until.is_some_and(|until| until <= self.clock.now()) {
                // Only now: nobody tells the service of what is written.
                written_at = self.written_at(live.sandbox.id).await;
                let stands_still = matches!(*progress.borrow(), Progress::Paused(_));
                if !stands_still && live.active_at().max(written_at) <= last {
                    return;
                }
                continue;
            }
            tokio::select! {
                () = self.sleep_until(until) => {}
                Ok(()) = progress.changed() => {}
            }
        }
    }

    /// When its payload last wrote something, kept or not, as soon as the keeper says so. Of one that is over never.
    async fn written_at(&self, id: SandboxId) -> Option<OffsetDateTime> {
        loop {
            self.keeper.connected().await;
            match self.in_time(self.keeper.sample(id)).await {
                Ok(sample) => return sample.output_at_us.map(at_us),
                Err(CallError::Failed(failure)) if failure.kind == FailureKind::Gone => return std::future::pending().await,
                Err(error) => tracing::debug!(sandbox.id = %id, %error, "whether it writes is not known yet"),
            }
            tokio::time::sleep(HOLD_AGAIN).await;
        }
    }

    /// Has the keeper hold a long-lived sandbox to what its row says: a service died, or lost the database, between the one and the other.
    ///
    /// # Errors
    /// The keeper may hold it to something else. It is worth another try.
    pub(super) async fn hold_to_row(&self, live: &Live, row: &Sandbox) -> Result<(), CallError> {
        if row.kind != Kind::Sandbox || live.launched().is_none() {
            return Ok(());
        }
        let id = row.id;
        let is_paused = row.state == State::Paused;
        let limits = new_limits(&row.limits, row.program.isolation, row.waited_ms());
        let mut limited = self.in_time(self.keeper.update(id, limits)).await;
        if matches!(&limited, Err(CallError::Failed(failure)) if failure.kind == FailureKind::Refused) {
            // As what it was given more of is in use by now. What ends it by its time is taken back all the same.
            let times = NewLimits { wall_ms: limits.wall_ms, cpu_ms: limits.cpu_ms, ..NewLimits::default() };
            limited = self.in_time(self.keeper.update(id, times)).await.and(limited);
        }
        let moved = if is_paused { self.in_time(self.keeper.pause(id)).await } else { self.in_time(self.keeper.resume(id)).await };
        for told in [limited, moved] {
            match told {
                Ok(()) => {}
                Err(CallError::Failed(failure)) if matches!(failure.kind, FailureKind::Refused | FailureKind::Gone) => {
                    tracing::warn!(sandbox.id = %id, error = %failure, "the keeper does not hold it to what its row says");
                }
                Err(error) => return Err(error),
            }
        }
        live.changed(Changeable::of(row));
        live.resize_room(room_of(&row.limits));
        live.paused(is_paused);
        Ok(())
    }

    /// [`Engine::hold_to_row`], as soon as Postgres tells what the row says.
    pub(super) fn hold_to_row_later(self: &Arc<Self>, live: &Arc<Live>) {
        let (engine, live) = (Arc::clone(self), Arc::clone(live));
        tokio::spawn(async move {
            let _turn = live.turn().await;
            let (tenant, id) = (&live.sandbox.tenant, live.sandbox.id);
            while live.launched().is_some() {
                // A call while the connection is down would be lost like the one that this makes good.
                engine.keeper.connected().await;
                let row = engine.until_heard(id, || engine.store.find(tenant, id)).await;
                let Some(row) = row.filter(|row| !row.state.is_final()) else { return };
                match engine.hold_to_row(&live, &row).await {
                    Ok(()) => return,
                    Err(error) => tracing::warn!(sandbox.id = %id, %error, "not held to what its row says yet"),
                }
                tokio::time::sleep(HOLD_AGAIN).await;
            }
        });
    }

    /// Removes one that has ended, as its creator wished.
    pub(super) async fn remove_ended(self: &Arc<Self>, tenant: &TenantId, id: SandboxId) {
        let act = Act { actor: None, at: self.clock.now(), data: json!({}) };
        let exec_logs = self.store.exec_logs_of(id).await.unwrap_or_default();
        match self.store.delete(tenant, id, &act).await {
            Ok(Some(deleted)) => {
                let own = deleted.has_log_file.then_some(id);
                exec_logs.into_iter().chain(own).for_each(|log| drop(tokio::spawn(Arc::clone(self).forget_log(log))));
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(sandbox.id = %id, %error, "it is not removed yet"),
        }
    }

    /// Removes what should have been removed at its end: who stored that died, or could not.
    pub(super) async fn remove_overdue(self: &Arc<Self>) -> Result<(), StoreError> {
        for (tenant, id) in self.store.to_be_removed(self.clock.now(), BATCH).await? {
            self.remove_ended(&tenant, id).await;
        }
        Ok(())
    }
}

/// What a sandbox of these limits takes up.
pub(super) const fn room_of(limits: &Limits) -> Room {
    Room { memory_bytes: limits.memory_bytes(), cpu_millis: limits.cpu_millis(), sandboxes: 1 }
}

/// Why nothing can be done here to a sandbox that this process does not follow.
pub(super) const fn not_here(state: State) -> EngineError {
    match state {
        State::Queued | State::Starting | State::Exited | State::Failed => EngineError::WrongState(state),
        // Another node has it, or the next service.
        State::Running | State::Paused => EngineError::KeeperUnavailable,
    }
}

/// Why the keeper did not do it.
pub(super) fn refused(live: &Live, error: CallError) -> EngineError {
    let CallError::Failed(failure) = error else { return EngineError::KeeperUnavailable };
    match failure.kind {
        FailureKind::Gone => {
            let state = live.progress().state();
            EngineError::WrongState(if state.is_final() { state } else { State::Exited })
        }
        FailureKind::Busy => EngineError::Busy(failure.message),
        FailureKind::Refused => EngineError::Refused(failure.message),
        FailureKind::Host => EngineError::Store(StoreError::Other(failure.into())),
    }
}
