//! Watching files of a sandbox that runs, to the end of whichever ends first.

use std::time::Duration;

use sandbox_core::tree::{Notice, TreePath, WatchEnd};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::{
    Engine, EngineError, Progress,
    crowd::{Crowd, Place},
    wait::crowded,
};
use crate::{
    runtime::{Noticed, Notices, TreeError},
    sandbox::{Kind, SandboxId, State, TenantId, WATCHES, WATCHES_IN_SANDBOX_MAX, WATCHES_MAX},
};

/// How long the end of a sandbox is waited for in which nobody watches any more.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Who watches here, by tenant and by sandbox.
#[derive(Debug, Default)]
pub(super) struct Watches {
    tenants: Crowd<TenantId>,
    sandboxes: Crowd<SandboxId>,
}

/// Why nothing is watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Files that are watched, until this is dropped.
#[derive(Debug)]
pub struct FileWatch {
    notices: Notices,
    progress: watch::Receiver<Progress>,
    closing: CancellationToken,
    is_over: bool,
    _places: (Place<TenantId>, Place<SandboxId>),
}

/// What comes next.
#[derive(Debug)]
pub enum Watched {
    Notice(Notice),
    /// The last.
    End(FileWatchEnd),
}

/// Why files are not watched any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileWatchEnd {
    /// Nothing happens in it any more.
    SandboxEnded,
    /// The folder was removed or renamed; of a file, the folder that it is in.
    PathRemoved,
    /// What was mounted there is not any more.
    Unmounted,
    /// The service is about to stop, and somebody else is to be asked.
    ServiceStops,
    /// The process that watched went away, for want of memory or by the program's doing.
    Lost,
}

impl Engine {
    /// Watches what is at `path` in the tenant's sandbox, which must run. `None` if there is no such sandbox.
    ///
    /// # Errors
    /// It does not run, too much is watched already, or the path cannot be watched.
    pub async fn watch_files(
        &self,
        tenant: &TenantId,
        id: SandboxId,
        path: TreePath,
        is_recursive: bool,
    ) -> Result<Option<FileWatch>, WatchError> {
        let Some(sandbox) = self.find(tenant, Kind::Sandbox, id).await? else { return Ok(None) };
        if sandbox.state != State::Running {
            return Err(EngineError::WrongState(sandbox.state).into());
        }
        let of_tenant = self
            .watches
            .tenants
            .join(tenant, WATCHES_MAX)
            .ok_or_else(|| EngineError::QuotaExceeded(crowded(WATCHES, WATCHES_MAX).into()))?;
        let of_sandbox =
            self.watches.sandboxes.join(&id, WATCHES_IN_SANDBOX_MAX).ok_or_else(|| {
                EngineError::Busy(format!("the files of a sandbox are watched {WATCHES_IN_SANDBOX_MAX} times at the most"))
            })?;
        // Before anybody is let in, so that an end that comes meanwhile is heard. On another node, if nobody here knows of it.
        let progress = self.live.get(id).ok_or(EngineError::KeeperUnavailable)?.subscribe();
        let Some(tree) = self.files(tenant, id).await? else { return Ok(None) };
        let notices = tree.watch(path, is_recursive).await?;
        Ok(Some(FileWatch { notices, progress, closing: self.closing.clone(), is_over: false, _places: (of_tenant, of_sandbox) }))
    }
}

impl FileWatch {
    /// Whether it is a folder that is watched; else it is one name in a folder.
    pub const fn is_folder(&self) -> bool {
        self.notices.is_folder
    }

    /// How many folders are watched.
    pub const fn folders(&self) -> u32 {
        self.notices.folders
    }

    /// What happens next; `None` behind the end. Not to be given up half-way and called again.
    pub async fn next(&mut self) -> Option<Watched> {
        if self.is_over {
            return None;
        }
        let end = tokio::select! {
            biased;
            () = self.closing.cancelled() => FileWatchEnd::ServiceStops,
            noticed = self.notices.next() => match noticed {
                Ok(Noticed::Notice(notice)) => return Some(Watched::Notice(notice)),
                Ok(Noticed::Over(WatchEnd::Removed)) => FileWatchEnd::PathRemoved,
                Ok(Noticed::Over(WatchEnd::Unmounted)) => FileWatchEnd::Unmounted,
                Err(error) => self.lost(&error).await,
            },
            () = ended(&mut self.progress) => FileWatchEnd::SandboxEnded,
        };
        self.is_over = true;
        Some(Watched::End(end))
    }

    /// Nobody watches any more: with the sandbox, of whose end the word may still be on its way, or without it.
    async fn lost(&mut self, error: &TreeError) -> FileWatchEnd {
        tokio::select! {
            () = ended(&mut self.progress) => FileWatchEnd::SandboxEnded,
            () = self.closing.cancelled() => FileWatchEnd::ServiceStops,
            () = tokio::time::sleep(END_PATIENCE) => {
                tracing::debug!(%error, "the process that watched a sandbox's files went away");
                FileWatchEnd::Lost
            }
        }
    }
}

/// Returns when the sandbox has ended.
async fn ended(progress: &mut watch::Receiver<Progress>) {
    let is_over = |progress: &Progress| matches!(progress, Progress::Ended(_) | Progress::Gone | Progress::Queued);
    // Known no more, it has ended, too.
    drop(progress.wait_for(is_over).await);
}
