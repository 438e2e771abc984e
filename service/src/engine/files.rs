//! Files of a sandbox: whose they are, and whether they can be worked on now.

use std::time::Duration;

use sandbox_core::protocol::FailureKind;
use tokio::time::Instant;

use super::{Engine, EngineError};
use crate::{
    runtime::{CallError, Tree},
    sandbox::{IDLE_TIMEOUT_MS, Kind, SandboxId, State, TenantId},
    store::StoreError,
};

/// How long what is left of a sandbox that has ended, or of who worked on its files before, is waited for.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(5);
const LEFTOVER_PAUSE: Duration = Duration::from_millis(20);
/// How often it is said of a sandbox in long use that it is not idle: twice in the shortest time after which one can be.
const USE_BEAT: Duration = Duration::from_millis(500);
const _: () = assert!(USE_BEAT.as_millis() * 2 <= IDLE_TIMEOUT_MS.min as u128, "who is used would be idle between two beats");

impl Engine {
    /// Somebody inside the tenant's sandbox who works on its files: it runs, or has ended and kept its layer. `None` if there is no such sandbox.
    pub async fn files(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Tree>, EngineError> {
        let deadline = Instant::now() + LEFTOVER_PATIENCE;
        loop {
            match self.files_now(tenant, id).await? {
                Now::There(tree) => return Ok(tree),
                Now::Soon(why) if Instant::now() >= deadline => return Err(EngineError::Busy(why)),
                Now::Soon(_) => tokio::time::sleep(LEFTOVER_PAUSE).await,
            }
        }
    }

    /// Does something that takes its time with what is inside a sandbox, which is not idle meanwhile.
    pub async fn in_use<T>(&self, id: SandboxId, work: impl Future<Output = T>) -> T {
        with_beat(|| self.touch(id), work).await
    }

    async fn files_now(&self, tenant: &TenantId, id: SandboxId) -> Result<Now, EngineError> {
        let Some(sandbox) = self.find(tenant, Kind::Sandbox, id).await? else { return Ok(Now::There(None)) };
        match sandbox.state {
            // On another node, if nobody here knows of it.
            State::Running if self.live.get(id).is_none() => return Err(EngineError::KeeperUnavailable),
            State::Running | State::Exited | State::Failed => {}
            // What stands still cannot work on its files either.
            state @ (State::Queued | State::Starting | State::Paused) => return Err(EngineError::WrongState(state)),
        }
        let (tree, socket) = Tree::pair().map_err(|error| EngineError::Busy(format!("this node has no socket for that: {error}")))?;
        match self.in_time(self.keeper.tree(id, socket)).await {
            Ok(()) => {
                self.touch(id);
                Ok(Now::There(Some(tree)))
            }
            Err(CallError::Lost) => Err(EngineError::KeeperUnavailable),
            Err(CallError::Failed(failure)) => match failure.kind {
                FailureKind::Gone => self.gone(tenant, id).await,
                FailureKind::Busy if sandbox.state.is_final() => Ok(Now::Soon(failure.message)),
                FailureKind::Busy => Err(EngineError::Busy(failure.message)),
                FailureKind::Refused => Err(EngineError::Refused(failure.message)),
                FailureKind::Host => Err(EngineError::Store(StoreError::Other(failure.into()))),
            },
        }
    }

    /// The keeper has it no more, or not its layer. What is told is its state now: it may have ended since.
    async fn gone(&self, tenant: &TenantId, id: SandboxId) -> Result<Now, EngineError> {
        match self.find(tenant, Kind::Sandbox, id).await?.map(|sandbox| sandbox.state) {
            None => Ok(Now::There(None)),
            Some(State::Running) => Ok(Now::Soon("the sandbox is ending".to_owned())),
            Some(state @ (State::Queued | State::Starting | State::Paused | State::Exited | State::Failed)) => {
                Err(EngineError::WrongState(state))
            }
        }
    }
}

/// Says so, again and again, until the work is done.
async fn with_beat<T>(say: impl Fn(), work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut beat = tokio::time::interval(USE_BEAT);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = beat.tick() => say(),
        }
    }
}

enum Now {
    There(Option<Tree>),
    /// Not yet, and why.
    Soon(String),
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_used_for_long_is_said_to_be_used_all_the_time_and_not_afterwards() {
        let (said, last) = (Cell::new(0), Cell::new(Instant::now()));
        let say = || {
            assert!(last.replace(Instant::now()).elapsed() < Duration::from_millis(IDLE_TIMEOUT_MS.min));
            said.set(said.get() + 1);
        };

        let done = with_beat(say, async {
            tokio::time::sleep(Duration::from_secs(100)).await;
            7
        });
        let done = done.await;

        let during = said.get();
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!((done, said.get()), (7, during));
        assert!(during >= 200, "{during}");
    }
}
