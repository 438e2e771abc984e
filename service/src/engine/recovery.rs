//! What a service does that finds the rows and the keeper's records of the one before it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use sandbox_core::{
    fail_point,
    protocol::{KillReason, Record},
};
use tracing::Instrument as _;

use super::{Engine, Progress, capacity::Room, carry::span_of, settle::After, unix_us};
use crate::{
    metrics::Leak,
    sandbox::{Sandbox, SandboxId, State, case_id, case_ids, is_part, is_step, run_id, step_id},
    store::{Input, Return, StoreError, Writer},
};

/// How long after its claim a sandbox that nobody follows counts as left behind.
const STRAY_AFTER: Duration = Duration::from_secs(30);

impl Engine {
    /// Follows what lives, settles what ended, reports what is lost, and drops what nobody knows.
    pub(super) async fn recover(self: &Arc<Self>) -> anyhow::Result<()> {
        let rows = self.store.live_of(self.node).await.context("reading this node's sandboxes failed")?;
        let records = self.keeper.list().await.context("asking the keeper for its sandboxes failed")?;
        fail_point::reached("service.recover.listed");
        let mut leftover = self.take_over(rows, records).await;
        self.know_kept_layers().await?;
        if let Err(error) = self.tend_volumes().await {
            tracing::warn!(error = format!("{error:#}"), "what is left of volumes may stay; the next look removes it");
        }
        fail_point::reached("service.recover.taken");
        self.take_over_execs(None).await.context("reading this node's execs failed")?;
        let execs = self.sort_out_execs(&leftover).await?;
        leftover.retain(|id| !execs.contains(id));
        let kept: HashSet<SandboxId> = self.store.kept_logs(self.node, None).await?.into_iter().collect();
        if let Err(error) = self.remove_overdue().await {
            tracing::warn!(%error, "what was to be removed at its end may be left; the next look removes it");
        }
        if let Err(error) = self.drop_stray_logs(&leftover).await {
            tracing::warn!(error = format!("{error:#}"), "logs that nobody needs may be left; the next start looks again");
        }
        for id in leftover {
            if kept.contains(&id) {
                // Its end is stored; the service before this one had no time to say so.
                self.forget_record(id).await;
                continue;
            }
            tracing::info!(sandbox.id = %id, "the keeper has a sandbox that nobody asked for any more");
            tokio::spawn(Arc::clone(self).drop_leftover(id));
        }
        Ok(self.settle_unreadable().await?)
    }

    /// Ends what this node has live by rows that nobody can read: no look at them will ever say more.
    async fn settle_unreadable(&self) -> Result<(), StoreError> {
        for (id, fault) in self.store.unreadable_of(self.node).await? {
            // One that was read before is followed to its end.
            if self.live.get(id).is_none()
                && let Some(hold) = self.store.whereabouts(id).await?.and_then(|now| now.hold)
            {
                self.settle_damaged(id, Writer::Holder(hold), &fault).await?;
            }
        }
        Ok(())
    }

    /// Has the keeper drop logs whose rows are gone or have all of it: the keeper that wrote them died, or the service that was to say so.
    /// Not those of the sandboxes in `others`.
    async fn drop_stray_logs(self: &Arc<Self>, others: &[SandboxId]) -> anyhow::Result<()> {
        let written = self.logs.list().context("looking for logs failed")?;
        // The log of a compile step, or of a case, is needed for as long as its run lives.
        let runs: Vec<SandboxId> = written.iter().map(|id| run_id(*id)).collect();
        let mut needed: HashSet<SandboxId> = self.store.with_log(&runs).await?.into_iter().collect();
        needed.extend(self.store.execs_among(&written, true).await?);
        for id in written.into_iter().filter(|id| !needed.contains(&run_id(*id)) && !others.contains(id)) {
            self.metrics.leaked(Leak::Log);
            tokio::spawn(Arc::clone(self).forget_log(id));
        }
        Ok(())
    }

    /// Takes over rows of this node that are live and followed by nobody: the answer to their claim was lost on the way from Postgres, or
    /// their task panicked.
    pub(super) async fn recover_strays(self: &Arc<Self>) -> anyhow::Result<()> {
        let claimed_before = self.clock.now() - STRAY_AFTER;
        self.store.adopt_late_claims(self.lease()).await?;
        let mut strays = self.store.live_of(self.node).await?;
        // One that is still thought to be queued was claimed without our hearing of it.
        let is_followed = |row: &Sandbox| self.live.get(row.id).is_some_and(|live| !matches!(live.progress(), Progress::Queued));
        // What its creator may yet be told was not made is ended by who tells so.
        strays.retain(|row| !is_followed(row) && !self.undecided.contains(row.id) && row.claimed_at.is_some_and(|at| at < claimed_before));
        for _stray in &strays {
            self.metrics.leaked(Leak::Row);
        }
        if !strays.is_empty() {
            let records = self.keeper.list().await?;
            self.take_over(strays, records).await;
        }
        self.settle_unreadable().await?;
        self.recover_stray_execs().await?;
        self.drop_unfollowed().await
    }

    /// Ends and forgets what the keeper has and no row of this node needs: of an attempt whose end it could not be told in time.
    async fn drop_unfollowed(self: &Arc<Self>) -> anyhow::Result<()> {
        // In this order: what is begun meanwhile is in none of the first two.
        let records = self.keeper.list().await?;
        let live: HashSet<SandboxId> = self.store.live_of(self.node).await?.into_iter().map(|row| row.id).collect();
        let mut unfollowed: Vec<SandboxId> = records.into_iter().map(|record| record.id).collect();
        let is_carried = |id: SandboxId| live.contains(&id) || self.live.get(id).is_some();
        unfollowed.retain(|id| !is_carried(run_id(*id)) && self.execs.get(*id).is_none());
        let execs = self.sort_out_execs(&unfollowed).await?;
        for id in unfollowed.into_iter().filter(|id| !execs.contains(id)) {
            match self.store.find_log(id).await? {
                Some(stored) if stored.has_file => self.forget_record(id).await,
                Some(_) => drop(tokio::spawn(Arc::clone(self).drop_leftover(id))),
                // It waits for another attempt, which clears the way for itself, or its row is gone. Of a part that of its run says so.
                None if self.store.whereabouts(run_id(id)).await?.is_some_and(|now| !is_part(id) || !now.state.is_final()) => {}
                None => drop(tokio::spawn(Arc::clone(self).drop_leftover(id))),
            }
        }
        Ok(())
    }

    /// Follows the sandboxes of these rows that the keeper has, settles those that it has not, and answers with records that belong to no row.
    async fn take_over(self: &Arc<Self>, rows: Vec<Sandbox>, records: Vec<Record>) -> Vec<SandboxId> {
        let keeper_started_at_us = self.keeper.connected().await.started_at_us;
        let mut records: HashMap<_, _> = records.into_iter().map(|record| (record.id, record)).collect();
        let (mut adopted, mut lost) = (0_u32, 0_u32);
        for sandbox in rows {
            let room = Room { memory_bytes: sandbox.memory_bytes(), cpu_millis: sandbox.cpu_millis(), sandboxes: 1 };
            let record = records.remove(&sandbox.id);
            if sandbox.compile.is_some() {
                // Whatever has become of it, it is looked after with its run.
                records.remove(&step_id(sandbox.id));
            }
            // The keeper that there was at its claim, if that is this one.
            let is_same_keeper = sandbox.claimed_at.is_some_and(|at| unix_us(at) > keeper_started_at_us);
            if let Some(judging) = sandbox.judging {
                adopted += 1;
                let of_cases = [0, 1].map(|index| records.remove(&case_id(sandbox.id, sandbox.claims, index)));
                // What there may be of a claim before this one is cleared away with the run, or before it is begun again.
                for id in case_ids(sandbox.id, sandbox.claims) {
                    records.remove(&id);
                }
                let live = self.live.claimed(sandbox, self.lease());
                let reservation = self.capacity.reserve_for_live(room);
                let span = span_of(&live);
                tokio::spawn(Arc::clone(self).adopt_cases(live, judging, of_cases, is_same_keeper, reservation).instrument(span));
                continue;
            }
            // The keeper that there was at its claim would know it if it had been begun.
            let is_unbegun =
                record.is_none() && sandbox.keeps_input && sandbox.starts == 1 && sandbox.state == State::Starting && is_same_keeper;
            let live = self.live.claimed(sandbox, self.lease());
            if is_unbegun {
                let engine = Arc::clone(self);
                tokio::spawn(async move {
                    let known = engine.live.known(Arc::clone(&live));
                    if engine.give_back(&live, Return::NotBegun { input: &Input::default(), until: None }).await == After::Waits {
                        known.keep();
                    }
                });
                continue;
            }
            if let Some(record) = record {
                adopted += 1;
                let reservation = self.capacity.reserve_for_live(room);
                let span = span_of(&live);
                tokio::spawn(Arc::clone(self).adopt(live, record.launched, reservation).instrument(span));
            } else {
                lost += 1;
                let ending = self.infra_error("its node's keeper never got the order to start it, or has lost its record".to_owned());
                self.settle_alone(live, ending);
            }
        }
        if adopted + lost > 0 {
            tracing::info!(adopted, lost, "took over sandboxes that nobody followed");
        }
        records.into_keys().collect()
    }

    /// Ends and forgets a sandbox whose row is final or gone.
    async fn drop_leftover(self: Arc<Self>, id: SandboxId) {
        self.metrics.leaked(Leak::Sandbox);
        if let Err(error) = self.keeper.kill(id, KillReason::Evicted).await {
            tracing::warn!(sandbox.id = %id, %error, "ending a leftover sandbox failed");
        }
        if let Ok(ended) = self.keeper.wait(id).await {
            // However it ended, nobody asks.
            drop(ended.await);
        }
        if is_step(id)
            && let Err(error) = self.drop_layer(id).await
        {
            // Its record stays, and so it is found again.
            tracing::warn!(sandbox.id = %id, %error, "what a leftover compile step wrote is still there");
            return;
        }
        self.forget(id).await;
    }
}
