//! Waiting until a sandbox is so, for as long as somebody likes.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{Engine, EngineError, Progress};
use crate::sandbox::{Kind, Sandbox, SandboxId, State, TenantId};

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Its payload runs, and does not stand still.
    Running,
    Paused,
    /// It has ended, however.
    Exited,
    /// There is no such sandbox any more.
    Removed,
}

/// How the waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Waited {
    /// It is so.
    Reached,
    /// It is not so yet.
    TimedOut,
    /// It has ended, or was removed, and will not be so.
    Ended,
    /// The service is about to stop, and somebody else is to be asked.
    Stopping,
}

impl Until {
    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        [("running", Self::Running), ("paused", Self::Paused), ("exited", Self::Exited), ("removed", Self::Removed)]
            .into_iter()
            .find_map(|(known, until)| (known == name).then_some(until))
    }

    /// Whether there is nothing more to wait for, with a sandbox in this state; `None`: removed.
    fn judge(self, state: Option<State>) -> Option<Waited> {
        let Some(state) = state else {
            return Some(if self == Self::Removed { Waited::Reached } else { Waited::Ended });
        };
        match (self, state) {
            (Self::Running, State::Running) | (Self::Paused, State::Paused) | (Self::Exited, State::Exited | State::Failed) => {
                Some(Waited::Reached)
            }
            (Self::Running | Self::Paused, State::Exited | State::Failed) => Some(Waited::Ended),
            (Self::Running, State::Queued | State::Starting | State::Paused)
            | (Self::Paused, State::Queued | State::Starting | State::Running)
            | (Self::Exited, State::Queued | State::Starting | State::Running | State::Paused)
            | (Self::Removed, _) => None,
        }
    }
}

impl Engine {
    /// Waits until the tenant's sandbox is so, or for so long. With the sandbox as it was seen last; `None` if there never was one.
    pub async fn wait_for(
        &self,
        tenant: &TenantId,
        id: SandboxId,
        until: Until,
        patience: Duration,
    ) -> Result<Option<(Waited, Option<Sandbox>)>, EngineError> {
        /// Between two looks at a row that others may change, and at one that only its removal changes.
        const LOOK: Duration = Duration::from_millis(250);
        /// And where this process hears of each change.
        const LOOK_HERE: Duration = Duration::from_secs(5);
        let deadline = Instant::now() + patience;
        let mut is_known = false;
        loop {
            // Before the look, so that what changes after it is heard.
            let live = self.live.get(id).filter(|live| live.sandbox.tenant == *tenant);
            let mut progress = live.as_ref().map(|live| live.subscribe());
            let found = self.find(tenant, Kind::Sandbox, id).await?;
            if found.is_none() && !is_known {
                return Ok(None);
            }
            is_known = true;
            let verdict = until.judge(found.as_ref().map(|sandbox| sandbox.state));
            let verdict = verdict.or_else(|| (Instant::now() >= deadline).then_some(Waited::TimedOut));
            if let Some(waited) = verdict.or_else(|| self.is_closing().then_some(Waited::Stopping)) {
                return Ok(Some((waited, found)));
            }
            let is_here = live.as_ref().is_some_and(|live| !matches!(live.progress(), Progress::Queued));
            let look_at = deadline.min(Instant::now() + if is_here { LOOK_HERE } else { LOOK });
            tokio::select! {
                () = self.closing() => {}
                () = tokio::time::sleep_until(look_at) => {}
                moved = moved(&mut progress) => {
                    // One that is removed at its end is known as it ended by nobody else.
                    if let Some(finished) = moved.filter(|_| until != Until::Removed) {
                        let waited = until.judge(Some(finished.state)).unwrap_or(Waited::Ended);
                        return Ok(Some((waited, Some(finished))));
                    }
                }
            }
        }
    }
}

/// Returns when something has happened to it; with what it was at its end, if it was that.
async fn moved(progress: &mut Option<tokio::sync::watch::Receiver<Progress>>) -> Option<Sandbox> {
    let Some(progress) = progress else { return std::future::pending().await };
    if progress.changed().await.is_err() {
        // It is known no more; a look at the row follows, but not in a tight loop.
        tokio::time::sleep(Duration::from_millis(50)).await;
        return None;
    }
    match &*progress.borrow_and_update() {
        Progress::Ended(finished) => Some(finished.sandbox.clone()),
        Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) | Progress::Gone => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_ends_every_waiting_but_for_its_removal() {
        for state in [State::Exited, State::Failed] {
            assert_eq!(Until::Exited.judge(Some(state)), Some(Waited::Reached));
            assert_eq!(Until::Running.judge(Some(state)), Some(Waited::Ended));
            assert_eq!(Until::Paused.judge(Some(state)), Some(Waited::Ended));
            assert_eq!(Until::Removed.judge(Some(state)), None);
        }
        assert_eq!(Until::Removed.judge(None), Some(Waited::Reached));
        assert_eq!(Until::Exited.judge(None), Some(Waited::Ended));
    }

    #[test]
    fn what_may_still_come_is_waited_for() {
        for state in [State::Queued, State::Starting] {
            for until in [Until::Running, Until::Paused, Until::Exited, Until::Removed] {
                assert_eq!(until.judge(Some(state)), None);
            }
        }
        assert_eq!(Until::Running.judge(Some(State::Paused)), None);
        assert_eq!(Until::Running.judge(Some(State::Running)), Some(Waited::Reached));
    }
}
