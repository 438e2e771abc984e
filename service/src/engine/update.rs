//! Changes of a sandbox that is there: quota, room, keeper and row together, or nothing.

use std::{sync::Arc, time::Duration};

use sandbox_core::fail_point;

use super::{
    Engine, EngineError, Owner, Progress,
    capacity::Room,
    life::{detached, not_here, refused, room_of},
    live::{Changeable, Live},
};
use crate::{
    runtime::CallError,
    sandbox::{Change, Sandbox, SandboxId, State},
    store::{Act, Changing},
};

/// How long the keeper has for a change: the row of the tenant is locked meanwhile, and everything that is its waits.
const HELD_DEADLINE: Duration = Duration::from_secs(1);

impl Engine {
    /// Changes the tenant's sandbox, and answers with what it is then; `None` if there is none. What is refused anywhere leaves it as it was.
    pub async fn update(self: &Arc<Self>, owner: Owner, id: SandboxId, change: Change) -> Result<Option<Sandbox>, EngineError> {
        let engine = Arc::clone(self);
        detached(async move { engine.update_now(&owner, id, &change).await }).await
    }

    async fn update_now(self: &Arc<Self>, owner: &Owner, id: SandboxId, change: &Change) -> Result<Option<Sandbox>, EngineError> {
        // Of others' there is none in the transaction.
        let live = self.live.get(id).filter(|live| live.sandbox.tenant == owner.tenant && !matches!(live.progress(), Progress::Queued));
        let _turn = match &live {
            Some(live) => Some(live.turn().await),
            None => None,
        };
        let Some(changing) = self.store.begin_change(&owner.tenant, id).await? else { return Ok(None) };
        let next = self.update_in(owner, live.as_ref(), changing, change).await?;
        Ok(Some(live.as_ref().map_or(next, |live| live.now())))
    }

    async fn update_in(
        self: &Arc<Self>,
        owner: &Owner,
        live: Option<&Arc<Live>>,
        mut changing: Changing,
        change: &Change,
    ) -> Result<Sandbox, EngineError> {
        let now = self.clock.now();
        let before = changing.sandbox.clone();
        let planned = change.apply(&before, now).map_err(EngineError::from).and_then(|next| {
            self.may_change(live, &changing, change)?;
            Ok(next)
        });
        let next = match planned {
            Ok(next) if next != before => next,
            // Dropped would do, but would cost the connection.
            same_or_error => {
                changing.rollback().await?;
                return same_or_error;
            }
        };
        let (had, wanted) = (room_of(&before.limits), room_of(&next.limits));
        if let Some(live) = live
            && change.has_limits()
            && let Err(error) = self.take_room(live, had, wanted).await
        {
            changing.rollback().await?;
            return Err(error);
        }
        let changed = self.write_and_hold(owner, live, &mut changing, (change, &next)).await;
        let committed = match changed {
            Ok(()) => changing.commit().await.map_err(EngineError::from),
            Err(error) => {
                // Should the connection break now, the transaction is over all the same.
                drop(changing.rollback().await);
                if let Some(live) = live {
                    live.resize_room(had);
                }
                return Err(error);
            }
        };
        if let Some(live) = live {
            match &committed {
                Ok(()) => {
                    fail_point::reached("service.update.stored");
                    live.changed(Changeable::of(&next));
                    live.resize_room(wanted);
                }
                // The keeper has it, and whether the row has it Postgres will say.
                Err(_) => self.hold_to_row_later(live),
            }
        }
        committed.map(|()| next)
    }

    /// Whether it is in a state in which that can be changed, here.
    fn may_change(&self, live: Option<&Arc<Live>>, changing: &Changing, change: &Change) -> Result<(), EngineError> {
        // The row is a moment behind.
        let state = live.map_or(changing.sandbox.state, |live| live.progress().state());
        let is_held_here = live.is_some_and(|live| changing.whereabouts.hold == Some(live.hold()));
        match state {
            State::Running | State::Paused | State::Starting if !is_held_here => Err(not_here(State::Running)),
            State::Queued | State::Starting | State::Exited | State::Failed if change.has_limits() => Err(EngineError::WrongState(state)),
            State::Queued | State::Starting | State::Running | State::Paused | State::Exited | State::Failed => Ok(()),
        }
    }

    /// Takes what it needs more. What it needs less it keeps until nothing can go wrong any more.
    async fn take_room(self: &Arc<Self>, live: &Live, had: Room, wanted: Room) -> Result<(), EngineError> {
        self.capacity.could_hold(wanted).map_err(EngineError::NoCapacity)?;
        let both = Room {
            memory_bytes: had.memory_bytes.max(wanted.memory_bytes),
            cpu_millis: had.cpu_millis.max(wanted.cpu_millis),
            sandboxes: had.sandboxes,
        };
        let mut is_had = both == had || live.resize_room(both);
        if !is_had && let Some(more) = self.reserve(both.minus(had)).await {
            drop(more);
            is_had = live.resize_room(both);
        }
        is_had.then_some(()).ok_or_else(|| EngineError::Busy("its node has no room for that now".to_owned()))
    }

    async fn write_and_hold(
        self: &Arc<Self>,
        owner: &Owner,
        live: Option<&Arc<Live>>,
        changing: &mut Changing,
        (change, next): (&Change, &Sandbox),
    ) -> Result<(), EngineError> {
        let act = Act { actor: Some(owner), at: self.clock.now(), data: change.told() };
        let written = changing.write(next, &change.asked(), &self.tenancy.defaults, &act).await?;
        written.map_err(EngineError::QuotaExceeded)?;
        let Some(live) = live.filter(|live| change.has_limits() && live.launched().is_some()) else { return Ok(()) };
        let id = next.id;
        let told = tokio::time::timeout(HELD_DEADLINE, self.keeper.update(id, change.for_keeper(&next.limits, next.waited_ms()))).await;
        if let Err(error) = told.unwrap_or(Err(CallError::Lost)) {
            if matches!(error, CallError::Lost) {
                // It may have been done.
                self.hold_to_row_later(live);
            }
            return Err(refused(live, error));
        }
        fail_point::reached("service.update.held");
        Ok(())
    }
}
