//! The end of a sandbox: stored first, then told, then forgotten by the keeper.

use std::{sync::Arc, time::Duration};

use sandbox_core::protocol::Ending;
use time::OffsetDateTime;

use super::{Engine, Finished, live::Live};
use crate::{
    clock::at_us,
    sandbox::{Finish, Kind, LogTail, Phases, Sandbox, State},
    store::{Ended, LogKept},
};

/// How long the whole log of a run is kept when it does not fit beside the outcome.
const RUN_LOG_RETENTION: Duration = Duration::from_secs(3600);
/// Between two rounds of housekeeping.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(30);
/// Between two attempts to store an outcome: first this, then doubled up to the other.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

impl Engine {
    /// Stores the end, however long that takes — the keeper has the record until then — and tells everyone who waits.
    pub(super) async fn settle(&self, live: &Live, ending: &Ending) {
        let finish = Finish::of(ending, &live.sandbox.limits, phases(live, at_us(ending.ended_at_us)));
        let id = live.sandbox.id;
        let log_tail = self.logs.tail(id, LogTail::STORED_BYTES).await.unwrap_or_else(|error| {
            tracing::error!(sandbox.id = %id, %error, "reading its log failed");
            LogTail::default()
        });
        let log_file = match live.sandbox.kind {
            _ if log_tail.is_complete() => LogKept::No,
            Kind::Run => LogKept::Until(finish.finished_at + RUN_LOG_RETENTION),
            Kind::Sandbox => LogKept::UntilDeleted,
        };
        let ended = Ended { finish: &finish, log_tail: &log_tail, log_file };
        if self.store_end(live, &[State::Starting, State::Running], &ended).await {
            self.metrics.ended(live.sandbox.kind, &finish.outcome);
        }
        live.ended(finished(&live.sandbox, finish, log_tail));
        self.live.remove(id);
        if log_file == LogKept::No {
            self.forget(id).await;
        }
    }

    /// Stores and tells the end of a sandbox that never left the queue.
    pub(super) async fn settle_queued(&self, sandbox: &Sandbox, finish: Finish) {
        let ended = Ended { finish: &finish, log_tail: &LogTail::default(), log_file: LogKept::No };
        match self.store.finish(sandbox.id, &[State::Queued], &ended).await {
            Ok(true) => {
                self.metrics.ended(sandbox.kind, &finish.outcome);
                if let Some(live) = self.live.get(sandbox.id) {
                    live.ended(finished(sandbox, finish, LogTail::default()));
                    self.live.remove(sandbox.id);
                }
            }
            // Claimed in the meantime.
            Ok(false) => {}
            Err(error) => tracing::warn!(sandbox.id = %sandbox.id, %error, "its end could not be stored; the next look tries again"),
        }
    }

    /// Now and then, for good: has the keeper drop logs whose time is over, and looks for sandboxes that nobody follows.
    pub(super) async fn keep_house(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(HOUSEKEEPING_PERIOD) => {}
            }
            if let Err(error) = self.drop_overdue_logs().await {
                tracing::warn!(%error, "dropping old logs failed");
            }
            if let Err(error) = self.recover_strays().await {
                tracing::warn!(error = format!("{error:#}"), "looking for sandboxes that nobody follows failed");
            }
        }
    }

    async fn drop_overdue_logs(&self) -> Result<(), crate::store::StoreError> {
        let overdue = self.store.kept_logs(self.node, Some(self.clock.now())).await?;
        for id in &overdue {
            self.forget(*id).await;
        }
        if overdue.is_empty() {
            return Ok(());
        }
        self.store.drop_kept_logs(&overdue).await
    }

    /// Tries until it works. False: it was stored before.
    async fn store_end(&self, live: &Live, from: &[State], ended: &Ended<'_>) -> bool {
        let mut pause = RETRY_MIN;
        loop {
            match self.store.finish(live.sandbox.id, from, ended).await {
                Ok(is_first) => return is_first,
                Err(error) => tracing::error!(sandbox.id = %live.sandbox.id, %error, "storing its end failed; it is tried again"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}

/// Where the time of this sandbox went, as far as the service knows.
fn phases(live: &Live, ended_at: OffsetDateTime) -> Phases {
    let Sandbox { created_at, claimed_at, .. } = live.sandbox;
    let since_created = |at: OffsetDateTime| Duration::try_from(at - created_at).unwrap_or(Duration::ZERO);
    Phases {
        queue: Phases::ms(claimed_at.map_or(Duration::ZERO, since_created).saturating_sub(live.image_took)),
        image: Phases::ms(live.image_took),
        launch: 0.0,
        total: Phases::ms(since_created(ended_at)),
    }
}

fn finished(sandbox: &Sandbox, finish: Finish, log_tail: LogTail) -> Finished {
    let sandbox = Sandbox {
        state: finish.state,
        started_at: finish.started_at,
        finished_at: Some(finish.finished_at),
        outcome: Some(finish.outcome),
        ..sandbox.clone()
    };
    Finished { sandbox, log_tail }
}
