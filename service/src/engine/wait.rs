//! Waiting until a sandbox is so, for as long as somebody likes.

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{
    sync::broadcast::{self, error::RecvError},
    time::Instant,
};
use utoipa::ToSchema;

use super::{
    Engine, EngineError, Progress,
    crowd::{Crowd, Place},
};
use crate::{
    sandbox::{Exceeded, Kind, QuotaScope, Sandbox, SandboxId, State, TenantId, WAITS, WAITS_MAX},
    store::News,
};

/// Between two looks at a row that others may change: first this, then doubled up to the other. What this process follows itself it hears of.
const LOOK_MIN: Duration = Duration::from_millis(250);
const LOOK_MAX: Duration = Duration::from_secs(5);
/// The most between two looks where there are news.
const LOOK_HEARD: Duration = Duration::from_secs(1);

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

impl Until {
    /// With one that has ended like this there is nothing more to wait for.
    fn over(self, finished: Sandbox) -> (Waited, Option<Sandbox>) {
        (self.judge(Some(finished.state)).unwrap_or(Waited::Ended), Some(finished))
    }
}

impl Engine {
    /// Waits until the tenant's sandbox is so, or for so long. `news` tells of what happens on other nodes. With the sandbox as it was seen last; `None` if
    /// there never was one.
    ///
    /// # Errors
    /// The tenant waits here so often already that this one is refused.
    pub async fn wait_for(
        &self,
        tenant: &TenantId,
        id: SandboxId,
        until: Until,
        patience: Duration,
        mut news: broadcast::Receiver<Arc<News>>,
    ) -> Result<Option<(Waited, Option<Sandbox>)>, EngineError> {
        let deadline = Instant::now() + patience;
        let _place = self.waits.begin(tenant)?;
        if self.find(tenant, Kind::Sandbox, id).await?.is_none() {
            return Ok(None);
        }
        let mut pause = LOOK_MIN;
        loop {
            // Before the look, so that what changes after it is heard.
            let live = self.live.get(id).filter(|live| live.sandbox.tenant == *tenant);
            let mut progress = live.as_ref().map(|live| live.subscribe());
            let here = match live.map(|live| live.progress()) {
                // One that is removed at its end is known as it ended by nobody else.
                Some(Progress::Ended(finished)) if until != Until::Removed => return Ok(Some(until.over(finished.sandbox.clone()))),
                Some(progress @ (Progress::Starting | Progress::Running(_) | Progress::Paused(_))) => Some(progress.state()),
                Some(Progress::Queued | Progress::Ended(_) | Progress::Gone) | None => None,
            };
            let state = match here {
                Some(state) => Some(state),
                None => self.store.whereabouts(id).await?.map(|place| place.state),
            };
            let verdict = until.judge(state).or_else(|| (Instant::now() >= deadline).then_some(Waited::TimedOut));
            if let Some(waited) = verdict.or_else(|| self.is_closing().then_some(Waited::Stopping)) {
                let found = if state.is_some() { self.find(tenant, Kind::Sandbox, id).await? } else { None };
                return Ok(Some((waited, found)));
            }
            let looked_at = Instant::now();
            let look_at = deadline.min(looked_at + if here.is_some() { LOOK_MAX } else { pause });
            let heard = async {
                if here.is_some() {
                    return std::future::pending().await;
                }
                news_of(tenant, &mut news).await;
                // Of a tenant who has many, most news are of others.
                tokio::time::sleep_until(looked_at + pause.min(LOOK_HEARD)).await;
            };
            tokio::select! {
                () = self.closing() => {}
                () = tokio::time::sleep_until(look_at) => {}
                () = heard => {}
                moved = moved(&mut progress) => {
                    if let Some(finished) = moved.filter(|_| until != Until::Removed) {
                        return Ok(Some(until.over(finished)));
                    }
                }
            }
            pause = (pause * 2).min(LOOK_MAX);
        }
    }
}

/// Returns when something of this tenant's may have happened.
async fn news_of(tenant: &TenantId, news: &mut broadcast::Receiver<Arc<News>>) {
    loop {
        match news.recv().await {
            Ok(news) if news.are_tenants_cut || news.tenants.contains(tenant) => return,
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => return std::future::pending().await,
        }
    }
}

/// Who waits here, by tenant.
#[derive(Debug, Default)]
pub(super) struct Waits(Crowd<TenantId>);

impl Waits {
    fn begin(&self, tenant: &TenantId) -> Result<Place<TenantId>, EngineError> {
        self.0.join(tenant, WAITS_MAX).ok_or_else(|| EngineError::QuotaExceeded(crowded(WAITS, WAITS_MAX).into()))
    }
}

/// The tenant is at this as often as it may be at this node.
pub(super) fn crowded(what: &str, max: u64) -> Exceeded {
    Exceeded { scope: QuotaScope::Tenant, quota: what.to_owned(), limit: max.into(), used: max.into(), retry_after_s: Some(1) }
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
    fn a_tenant_waits_so_often_and_another_all_the_same() {
        let waits = Waits::default();
        let [acme, other] = ["acme", "other"].map(|name| TenantId::proven(name.into()));
        let mut places: Vec<Place<TenantId>> = (0..WAITS_MAX).map(|_| waits.begin(&acme).unwrap()).collect();
        let Err(EngineError::QuotaExceeded(exceeded)) = waits.begin(&acme) else { panic!("one too many waits") };
        assert_eq!((exceeded.quota.as_str(), exceeded.retry_after_s), (WAITS, Some(1)));
        assert!(waits.begin(&other).is_ok());
        places.pop();
        assert!(waits.begin(&acme).is_ok());
    }

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
