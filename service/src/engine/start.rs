//! Another life for a sandbox that has ended, on what it wrote in the one before; and the room of the layers that are kept for that.
//!
//! A layer is kept by this node's keeper under the sandbox's id, and goes with that keeper. What is in memory stays in memory: it takes up room of the node
//! for as long as it is kept. It is given up before its row is deleted; where another node does that, this one gives it up when it sees that nobody will ask for it.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use sandbox_core::{
    fail_point,
    protocol::{Cause, Ending, FailureKind, Layering, Medium},
};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    Engine, EngineError, Followed, Owner, Progress, START_PATIENCE,
    capacity::{Reservation, Room},
    kept::Turn,
    life::{Place, detached, room_of},
    live::Live,
};
use crate::{
    runtime::CallError,
    sandbox::{Kind, Limits, Sandbox, SandboxId, State, TenantId, is_step},
    store::{Act, HeldKey, Input, StartedAgain, StoreError},
};

/// How long a layer that is to be given up may still be somebody's: what is left of its sandbox, or who looks at its files.
const LAYER_PATIENCE: Duration = Duration::from_secs(5);
const LAYER_PAUSE: Duration = Duration::from_millis(20);

impl Engine {
    /// Starts the tenant's sandbox that has ended once more, on what it wrote before, or on nothing. Returns it when it runs, has failed to, or has kept who asks
    /// waiting for long enough; `None` if there is none. Nothing happens to one that runs, or is about to.
    pub async fn start_again(
        self: &Arc<Self>,
        owner: Owner,
        id: SandboxId,
        is_fresh: bool,
        key: Option<HeldKey>,
    ) -> Result<Option<Sandbox>, EngineError> {
        let engine = Arc::clone(self);
        let begun = detached(async move { engine.start_again_now(&owner, id, is_fresh, key.as_ref()).await }).await?;
        match begun {
            None => Ok(None),
            Some(Begun::Already(sandbox)) => Ok(Some(*sandbox)),
            Some(Begun::Now(mut followed)) => {
                let started = followed.until(|progress| !matches!(progress, Progress::Starting));
                // Too late is an answer too: the state says so.
                drop(tokio::time::timeout(START_PATIENCE, started).await);
                Ok(Some(followed.sandbox()))
            }
        }
    }

    async fn start_again_now(
        self: &Arc<Self>,
        owner: &Owner,
        id: SandboxId,
        is_fresh: bool,
        key: Option<&HeldKey>,
    ) -> Result<Option<Begun>, EngineError> {
        if let ControlFlow::Break(found) = self.find_ended(owner, id).await? {
            return Ok(found);
        }
        // Whoever else decides about its layer has done so by then: another who starts it, or who gives the layer up.
        let turn = self.kept.turn(id).await;
        let sandbox = match self.find_ended(owner, id).await? {
            ControlFlow::Break(found) => return Ok(found),
            ControlFlow::Continue(sandbox) => sandbox,
        };
        if let Some(why) = self.hindrance() {
            return Err(EngineError::Busy(why));
        }
        self.check_mounts(&sandbox).await?;
        let keeper = self.keeper.hello().filter(|_| !self.is_closing()).ok_or(EngineError::KeeperUnavailable)?.started_at_us;
        // The keeper has the last word: whoever gave a layer up may not have heard that it was done, and who died while he began the next life told nobody.
        if !is_fresh && !self.layers_of_keeper().await?.contains(&id) {
            turn.free();
            return Err(self.without_layer(&sandbox).await?);
        }
        let kept = turn.take(keeper).or_else(|| (!is_fresh).then(|| self.capacity.reserve_for_live(room_of_layer(&sandbox.limits))));
        let mut room =
            RoomTaken { engine: self, turn: &turn, keeper, kept: kept.as_ref().map(|_| room_of_layer(&sandbox.limits)), reservation: kept };
        room.grow(room_of(&sandbox.limits)).await?;
        fail_point::reached("service.start.taken");
        let Some(mut changing) = self.store.begin_change(&owner.tenant, id).await? else { return Ok(None) };
        if !changing.sandbox.state.is_final() {
            // Another node was faster.
            let sandbox = changing.sandbox.clone();
            changing.rollback().await?;
            return Ok(Some(Begun::Already(sandbox.into())));
        }
        if !is_fresh && changing.whereabouts.hold.is_some_and(|hold| hold.lease.node != self.node) {
            // It has had another life there since: what is kept here is older than that.
            changing.rollback().await?;
            return Err(EngineError::KeeperUnavailable);
        }
        let lease = self.lease();
        let act = Act { actor: Some(owner), at: self.clock.now(), data: Value::Null };
        let started = match changing.start(lease, &self.tenancy.defaults, &act).await? {
            StartedAgain::Yes { weight } => Ok(weight),
            StartedAgain::Exceeded(exceeded) => Err(EngineError::QuotaExceeded(exceeded)),
            StartedAgain::Suspended => Err(EngineError::Suspended),
            StartedAgain::Behind => Err(EngineError::Busy("others wait for room on this node".to_owned())),
        };
        let weight = match started {
            Ok(weight) => weight,
            Err(refused) => {
                changing.rollback().await?;
                return Err(refused);
            }
        };
        if let Some(key) = key
            && !changing.tie(key).await?
        {
            changing.rollback().await?;
            return Err(EngineError::KeyLost);
        }
        let next = changing.reread().await?;
        changing.commit().await?;
        fail_point::reached("service.start.claimed");
        let mut reservation = room.give();
        reservation.count_for_if_nobody(owner, weight);
        let live = self.live.insert(next, lease, Duration::ZERO);
        let followed = Followed::new(Arc::clone(&live));
        drop(turn);
        if is_fresh {
            // Only now: what is refused has lost nothing.
            if let Err(error) = self.drop_layer(id).await {
                let ending = self.infra_error(format!("what it wrote before could not be given up: {error}"));
                self.settle_alone(live, ending);
                return Ok(Some(Begun::Now(followed)));
            }
        } else {
            live.go_on_from(Layering::Of(id));
        }
        tokio::spawn(Arc::clone(self).carry(live, Input::default(), reservation));
        Ok(Some(Begun::Now(followed)))
    }

    /// The tenant's sandbox, if it has ended; else what comes of its start.
    async fn find_ended(&self, owner: &Owner, id: SandboxId) -> Result<ControlFlow<Option<Begun>, Sandbox>, EngineError> {
        let sandbox = match self.place(&owner.tenant, Kind::Sandbox, id).await? {
            None => return Ok(ControlFlow::Break(None)),
            Some(Place::Here(live)) => live.now(),
            Some(Place::InRow(sandbox)) => *sandbox,
        };
        match sandbox.state {
            State::Queued | State::Starting | State::Running => Ok(ControlFlow::Break(Some(Begun::Already(sandbox.into())))),
            State::Paused => Err(EngineError::WrongState(State::Paused)),
            State::Exited | State::Failed => Ok(ControlFlow::Continue(sandbox)),
        }
    }

    /// Why one of which no layer is kept here cannot go on.
    async fn without_layer(&self, sandbox: &Sandbox) -> Result<EngineError, StoreError> {
        let hold = self.store.whereabouts(sandbox.id).await?.and_then(|place| place.hold);
        let is_elsewhere = sandbox.keep_layer && hold.is_some_and(|hold| hold.lease.node != self.node);
        Ok(if is_elsewhere { EngineError::KeeperUnavailable } else { EngineError::LayerLost })
    }

    /// The end of this sandbox leaves its layer: that keeps its room.
    pub(super) fn keep_room(&self, live: &Live, ending: &Ending) {
        let has_run = ending.launched.is_some() || live.launched().is_some();
        let is_left = match ending.cause {
            // With its keeper, if it ran there; else it was never taken from where it was.
            Cause::InfraError { .. } => !has_run && live.layer() != Layering::Fresh,
            Cause::Exited { .. }
            | Cause::Signaled { .. }
            | Cause::OomKilled
            | Cause::CpuTimeout
            | Cause::WallTimeout
            | Cause::OutputLimit
            | Cause::Killed(_)
            | Cause::StartFailed { .. } => has_run || live.layer() != Layering::Fresh,
        };
        if !live.sandbox.keep_layer || !is_left {
            return;
        }
        let (Some(hello), Some(mut room)) = (self.keeper.hello(), live.take_room()) else { return };
        // One whose memory limit was lowered below the size of its layer keeps what it has.
        room.resize(room_of_layer(&live.limits()));
        self.kept.insert(live.sandbox.id, room, hello.started_at_us);
    }

    /// The turn to decide about a layer on which nobody lives, or is about to, and about which nobody else decides.
    fn turn_at_rest(&self, id: SandboxId) -> Option<Turn<'_>> {
        self.kept.try_turn(id).filter(|_| self.live.get(id).is_none())
    }

    async fn layers_of_keeper(&self) -> Result<HashSet<SandboxId>, EngineError> {
        self.in_time(self.keeper.layers()).await.map_err(|error| match error {
            CallError::Lost => EngineError::KeeperUnavailable,
            CallError::Failed(failure) => EngineError::Store(StoreError::Other(failure.into())),
        })
    }

    /// Gives the room that it takes to each layer that this node's keeper keeps of an ended sandbox, and back that of those that it has no more; and gives up those that
    /// nobody will ask for here.
    pub(super) async fn know_kept_layers(self: &Arc<Self>) -> anyhow::Result<()> {
        let keeper = self.keeper.connected().await.started_at_us;
        let (rows, layers) = self.kept_layers().await?;
        // What a compile step left is its run's to give up.
        let of_sandboxes = layers.iter().copied().filter(|id| !is_step(*id));
        let all: HashSet<SandboxId> = rows.into_keys().chain(self.kept.ids()).chain(of_sandboxes).collect();
        let is_told_wrongly = |id: &SandboxId| layers.contains(id) != self.kept.contains(*id);
        let turns: Vec<Turn<'_>> = all.into_iter().filter(is_told_wrongly).filter_map(|id| self.turn_at_rest(id)).collect();
        if turns.is_empty() {
            return Ok(());
        }
        // Anew: what was said before may have changed until it was our turn.
        let (rows, layers) = self.kept_layers().await?;
        let ids: Vec<SandboxId> = turns.iter().map(Turn::id).collect();
        let unwanted: HashSet<SandboxId> = self.store.unwanted_layers(self.node, &ids).await?.into_iter().collect();
        let mut given_up = Vec::new();
        for turn in turns {
            match (layers.contains(&turn.id()), rows.get(&turn.id())) {
                (false, _) => turn.free(),
                (true, _) if unwanted.contains(&turn.id()) => given_up.push(turn),
                (true, Some(sandbox)) if !self.kept.contains(turn.id()) => {
                    turn.put(self.capacity.reserve_for_live(room_of_layer(&sandbox.limits)), keeper);
                }
                (true, _) => {}
            }
        }
        // Last: nobody else waits for his turn meanwhile.
        for turn in given_up {
            self.drop_unwanted(&turn).await;
        }
        Ok(())
    }

    /// Gives up a layer of a sandbox that was deleted, or has had another life, elsewhere: nobody could tell this service while it was away. Asked once: what somebody still
    /// has is looked at in the next round.
    async fn drop_unwanted(&self, turn: &Turn<'_>) {
        match self.in_time(self.keeper.drop_layer(turn.id())).await {
            Ok(()) => {
                tracing::info!(sandbox.id = %turn.id(), "a layer that nobody will ask for is given up");
                turn.free();
            }
            Err(error) => tracing::debug!(sandbox.id = %turn.id(), %error, "a layer that nobody will ask for is not given up yet"),
        }
    }

    /// What has ended here with a layer, by its row, and the layers that the keeper has.
    async fn kept_layers(&self) -> anyhow::Result<(HashMap<SandboxId, Sandbox>, HashSet<SandboxId>)> {
        let rows = self.store.with_kept_layers(self.node).await?;
        let layers = self.in_time(self.keeper.layers()).await?;
        Ok((rows.into_iter().map(|(sandbox, _)| (sandbox.id, sandbox)).collect(), layers))
    }

    /// Gives up the layer of the tenant's sandbox that has ended, if it may be kept here. Nobody starts it on anything while the turn lasts.
    pub(super) async fn give_up_layer(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Turn<'_>>, EngineError> {
        if !self.may_keep_layer(tenant, id).await? {
            return Ok(None);
        }
        let turn = self.kept.turn(id).await;
        // Somebody may have started it meanwhile.
        if !self.may_keep_layer(tenant, id).await? {
            return Ok(None);
        }
        self.drop_kept(&turn).await.map_err(|error| match error {
            CallError::Lost => EngineError::KeeperUnavailable,
            CallError::Failed(failure) => EngineError::Busy(failure.message),
        })?;
        Ok(Some(turn))
    }

    /// Whether the tenant's sandbox has ended and there may be a layer of it here.
    async fn may_keep_layer(&self, tenant: &TenantId, id: SandboxId) -> Result<bool, EngineError> {
        let ended = self.find(tenant, Kind::Sandbox, id).await?.filter(|sandbox| sandbox.state.is_final());
        // The keeper may have one of which this process does not know: a service that died while it began the next life told nobody.
        Ok(ended.is_some_and(|sandbox| sandbox.keep_layer || self.kept.contains(id)))
    }

    /// Gives up the layer whose turn this is, and its room.
    async fn drop_kept(&self, turn: &Turn<'_>) -> Result<(), CallError> {
        self.drop_layer(turn.id()).await?;
        tracing::info!(sandbox.id = %turn.id(), "the layer of an ended sandbox is given up");
        fail_point::reached("service.layer.dropped");
        turn.free();
        Ok(())
    }

    pub(super) async fn drop_layer(&self, id: SandboxId) -> Result<(), CallError> {
        let deadline = Instant::now() + LAYER_PATIENCE;
        loop {
            match self.in_time(self.keeper.drop_layer(id)).await {
                Err(CallError::Failed(failure)) if failure.kind == FailureKind::Busy && Instant::now() < deadline => {
                    tokio::time::sleep(LAYER_PAUSE).await;
                }
                answer => return answer,
            }
        }
    }

    /// Gives up layers whose sandboxes are gone, or have ended too long ago.
    pub(super) async fn drop_old_layers(self: &Arc<Self>) -> anyhow::Result<()> {
        let overdue = self.clock.now() - self.tenancy.retention;
        let known = self.kept.ids();
        let rows = self.store.with_kept_layers(self.node).await?;
        let wanted: HashSet<SandboxId> = rows.iter().map(|(sandbox, _)| sandbox.id).collect();
        for id in known.into_iter().filter(|id| !wanted.contains(id)) {
            let Some(turn) = self.turn_at_rest(id) else { continue };
            // It may have had another life since, here or elsewhere.
            let hold = self.store.whereabouts(id).await?.and_then(|place| place.hold);
            if hold.is_none_or(|hold| hold.lease.node != self.node) && self.drop_kept(&turn).await.is_err() {
                tracing::debug!(sandbox.id = %id, "its layer is not given up yet");
            }
        }
        for (sandbox, _) in rows.iter().filter(|(_, finished_at)| *finished_at < overdue) {
            let Some(turn) = self.turn_at_rest(sandbox.id) else { continue };
            let now = self.store.find(&sandbox.tenant, sandbox.id).await?;
            let is_overdue = now.is_some_and(|now| now.state.is_final() && now.finished_at.is_some_and(|at| at < overdue));
            if is_overdue && self.drop_kept(&turn).await.is_ok() {
                self.store.give_up_layers(&[sandbox.id]).await?;
            }
        }
        let lost = self.store.layers_of_gone_nodes(overdue).await?;
        Ok(self.store.give_up_layers(&lost).await?)
    }
}

/// What became of the wish.
enum Begun {
    Already(Box<Sandbox>),
    Now(Followed),
}

/// Room for another life: that of the layer, and what there is more; given back as it was unless it is used.
struct RoomTaken<'a> {
    engine: &'a Arc<Engine>,
    turn: &'a Turn<'a>,
    keeper: u64,
    /// Room of the layer alone, if one is kept.
    kept: Option<Room>,
    reservation: Option<Reservation>,
}

impl RoomTaken<'_> {
    async fn grow(&mut self, room: Room) -> Result<(), EngineError> {
        let has_grown = match &mut self.reservation {
            Some(reservation) => reservation.resize(room),
            None => {
                self.reservation = self.engine.reserve(room).await;
                self.reservation.is_some()
            }
        };
        has_grown.then_some(()).ok_or_else(|| EngineError::Busy("there is no room now".to_owned()))
    }

    fn give(mut self) -> Reservation {
        self.reservation.take().expect("it has grown")
    }
}

impl Drop for RoomTaken<'_> {
    fn drop(&mut self) {
        if let Some((mut reservation, kept)) = self.reservation.take().zip(self.kept) {
            reservation.resize(kept);
            self.turn.put(reservation, self.keeper);
        }
    }
}

/// What a layer takes up of its node while nobody runs on it.
const fn room_of_layer(limits: &Limits) -> Room {
    let memory_bytes = match limits.disk_medium() {
        Medium::Memory => limits.disk_bytes(),
        Medium::Disk => 0,
    };
    Room { memory_bytes, cpu_millis: 0, sandboxes: 1 }
}
