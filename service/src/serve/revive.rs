//! Starts the private Postgres again when it has died: nobody else would.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    postgres::{Cluster, Revival},
    store::Store,
};

/// Between two attempts: first this, then doubled up to the other.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// One that ran for so long did not die of how it was started.
const STEADY: Duration = Duration::from_secs(60);

/// Until the service stops.
pub(super) async fn keep_running(cluster: Cluster, connections: u32, store: Store, stopping: CancellationToken) {
    let mut pause = PAUSE_MIN;
    let mut told = String::new();
    let mut started_at: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            _reason = store.away() => {}
        }
        if started_at.take().is_some_and(|at| at.elapsed() > STEADY) {
            pause = PAUSE_MIN;
            told.clear();
        }
        let cluster = cluster.clone();
        match tokio::task::spawn_blocking(move || cluster.revive(connections)).await {
            Ok(Ok(Revival::Started)) => {
                tracing::warn!("the private Postgres had died; it was started again");
                started_at = Some(Instant::now());
            }
            // It recovers, or hangs: to end it might cost what it is doing.
            Ok(Ok(Revival::Runs)) => {}
            Ok(Ok(Revival::Stopping)) => return,
            Ok(Err(error)) => {
                let text = format!("{error:#}");
                if text != told {
                    tracing::error!(error = text, "the private Postgres has died and does not start; it is tried again");
                    told = text;
                }
            }
            Err(error) => tracing::error!(%error, "starting the private Postgres again broke off"),
        }
        tokio::select! {
            () = stopping.cancelled() => return,
            () = store.there() => {}
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}
