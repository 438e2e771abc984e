//! What is done now and then, for good: dropping what is too old to be kept, folding usage, ending what suspended tenants have.

use std::{sync::Arc, time::Duration};

use sandbox_core::protocol::{Cause, KillReason};
use serde_json::json;
use time::OffsetDateTime;

use super::{Engine, Progress};
use crate::{
    sandbox::{Finish, Phases},
    store::{Act, StoreError},
};

/// Between two rounds of housekeeping.
const PERIOD: Duration = Duration::from_secs(30);
/// Rows that are removed in one transaction, and how many such at a time: nobody else should notice.
const BATCH: u32 = 500;
const BATCHES: u32 = 40;
/// How long a line of the ledger stands for itself: whatever is of the present hour may still get company.
const ROLL_UP_AFTER: Duration = Duration::from_secs(2 * 3600);
/// How long deliveries to webhooks are kept after their end.
const DELIVERY_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);

impl Engine {
    /// Keeps house until the engine stops.
    pub(super) async fn keep_house(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            if let Err(error) = self.drop_overdue_logs().await {
                tracing::warn!(%error, "dropping old logs failed");
            }
            if let Err(error) = self.drop_overdue_exec_logs().await {
                tracing::warn!(%error, "dropping old logs of execs failed");
            }
            if let Err(error) = self.recover_strays().await {
                tracing::warn!(error = format!("{error:#}"), "looking for sandboxes that nobody follows failed");
            }
            if let Err(error) = self.remove_overdue().await {
                tracing::warn!(%error, "removing what has ended failed");
            }
            if let Err(error) = self.drop_old_layers().await {
                tracing::warn!(error = format!("{error:#}"), "dropping layers that nobody needs failed");
            }
            if let Err(error) = self.know_kept_layers().await {
                tracing::warn!(error = format!("{error:#}"), "counting the layers that are kept failed");
            }
            if let Err(error) = self.tend_volumes().await {
                tracing::warn!(error = format!("{error:#}"), "removing what is left of volumes failed");
            }
            if let Err(error) = self.drop_old_rows().await {
                tracing::warn!(%error, "dropping old rows failed");
            }
        }
    }

    async fn drop_overdue_logs(&self) -> Result<(), StoreError> {
        let now = self.clock.now();
        let overdue = self.store.kept_logs(self.node, Some((now, now - self.tenancy.retention))).await?;
        let mut dropped = Vec::new();
        for id in overdue {
            if self.forget(id).await {
                dropped.push(id);
            }
        }
        if dropped.is_empty() {
            return Ok(());
        }
        self.store.drop_kept_logs(&dropped).await
    }

    async fn drop_overdue_exec_logs(&self) -> Result<(), StoreError> {
        let mut dropped = Vec::new();
        for id in self.store.overdue_exec_logs(self.node, self.clock.now() - self.tenancy.retention).await? {
            if self.forget(id).await {
                dropped.push(id);
            }
        }
        self.store.drop_exec_logs(&dropped).await
    }

    async fn drop_old_rows(&self) -> Result<(), StoreError> {
        let now = self.clock.now();
        let (ended, told) = (now - self.tenancy.retention, now - self.tenancy.event_retention);
        let lost = self.store.logs_of_gone_nodes(ended, BATCH).await?;
        if !lost.is_empty() {
            self.store.drop_kept_logs(&lost).await?;
        }
        // Each whether or not the one before came through: what is dropped nowhere grows without end.
        let done = [
            in_batches(|| self.store.roll_up_usage(beginning_of_hour(now - ROLL_UP_AFTER), BATCH)).await,
            in_batches(|| self.store.prune_cases(ended, BATCH)).await,
            in_batches(|| self.store.prune_sandboxes(ended, BATCH)).await,
            in_batches(|| self.store.prune_execs(ended, BATCH)).await,
            in_batches(|| self.store.prune_events(told, BATCH)).await,
            in_batches(|| self.store.prune_keys(now, BATCH)).await,
            in_batches(|| self.store.forget_principals(now, BATCH)).await,
            in_batches(|| self.store.give_up_deliveries(now, BATCH)).await,
            in_batches(|| self.store.prune_deliveries(now - DELIVERY_RETENTION, BATCH)).await,
        ];
        done.into_iter().collect()
    }

    /// Ends what suspended tenants and principals have, where their suspension says so.
    pub(super) async fn stop_suspended(self: &Arc<Self>) -> Result<(), StoreError> {
        for (id, tenant) in self.store.to_be_stopped(self.node).await? {
            let at = self.clock.now();
            let live = self.live.get(id).filter(|live| !matches!(live.progress(), Progress::Queued));
            if let Some(live) = live {
                if live.ordered_kill().is_none() {
                    let act = Act { actor: None, at, data: json!({ "reason": "suspended" }) };
                    self.store.tell_of_sandbox(&tenant, id, "sandbox.killed", &act).await?;
                }
                self.kill(&live, KillReason::StoppedByAdmin).await;
            } else if let Some(sandbox) = self.store.find(&tenant, id).await?
                && sandbox.state == crate::sandbox::State::Queued
            {
                let total = Phases::ms((at - sandbox.created_at).unsigned_abs());
                let phases = Phases { queue: total, total, ..Phases::default() };
                let finish = Finish::without_usage(Cause::Killed(KillReason::StoppedByAdmin), at, &sandbox.limits, phases);
                self.settle_queued(&sandbox, finish).await;
            }
        }
        Ok(())
    }
}

async fn in_batches<F: Future<Output = Result<u64, StoreError>>>(mut batch: impl FnMut() -> F) -> Result<(), StoreError> {
    /// A database that vanished says nothing, and the other rounds are to come.
    const PATIENCE: Duration = Duration::from_secs(60);
    for _ in 0..BATCHES {
        let done = tokio::time::timeout(PATIENCE, batch()).await;
        if done.unwrap_or_else(|_late| Err(anyhow::anyhow!("no answer within {} s", PATIENCE.as_secs()).into()))? < u64::from(BATCH) {
            break;
        }
    }
    Ok(())
}

fn beginning_of_hour(at: OffsetDateTime) -> OffsetDateTime {
    let seconds = at.unix_timestamp();
    OffsetDateTime::from_unix_timestamp(seconds - seconds.rem_euclid(3600)).unwrap_or(at)
}
