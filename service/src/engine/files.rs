//! Files of a sandbox: whose they are, and whether they can be worked on now.

use sandbox_core::protocol::FailureKind;

use super::{Engine, EngineError};
use crate::{
    runtime::{CallError, Tree},
    sandbox::{Kind, SandboxId, State, TenantId},
    store::StoreError,
};

impl Engine {
    /// Somebody inside the tenant's sandbox who works on its files: it runs, or has ended and kept its layer. `None` if there is no such sandbox.
    pub async fn files(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Tree>, EngineError> {
        let Some(sandbox) = self.find(tenant, Kind::Sandbox, id).await? else { return Ok(None) };
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
                Ok(Some(tree))
            }
            Err(CallError::Lost) => Err(EngineError::KeeperUnavailable),
            Err(CallError::Failed(failure)) => match failure.kind {
                FailureKind::Gone => self.gone(tenant, id).await,
                FailureKind::Busy => Err(EngineError::Busy(failure.message)),
                FailureKind::Refused => Err(EngineError::Refused(failure.message)),
                FailureKind::Host => Err(EngineError::Store(StoreError::Other(failure.into()))),
            },
        }
    }

    /// The keeper has it no more, or not its layer. What is told is its state now: it may have ended since.
    async fn gone(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Tree>, EngineError> {
        match self.find(tenant, Kind::Sandbox, id).await?.map(|sandbox| sandbox.state) {
            None => Ok(None),
            Some(State::Running) => Err(EngineError::Busy("the sandbox is ending".to_owned())),
            Some(state @ (State::Queued | State::Starting | State::Paused | State::Exited | State::Failed)) => {
                Err(EngineError::WrongState(state))
            }
        }
    }
}
