//! Keeping pools filled: what is missing is started where there is room that nobody asks for, what is not wanted any more is given up.

use std::{collections::HashSet, sync::Arc, time::Duration};

use sandbox_core::{fail_point, log};
use tokio::time::MissedTickBehavior;
use uuid::Uuid;

use super::super::{Engine, EngineError, Progress, follow::Followup, follow::LogQuery, input, life::room_of, live::Live};
use crate::{
    logs::LogItem,
    sandbox::{
        ImageUsed, Kind, LogTail, NewSandbox, Outcome, Owner, Pool, PoolFailure, PoolId, Program, Readiness, Reason, Sandbox, SandboxId,
        State, asked,
    },
    store::{MemberAdmitted, NewMember, POOLED_FOR_MAX, PoolWanted, StoreError},
};

/// Between two looks that nobody asked for.
const LOOK: Duration = Duration::from_secs(1);
/// Every so many of these looks what others may have left behind is looked for where there are no pools.
const THOROUGH_EVERY: u32 = 30;
/// How many of one pool are on their way at a time.
const IN_POOL_MAX: usize = 4;
/// Rows that are removed in one transaction.
const BATCH: u32 = 500;
/// How much of its last words is told of one that failed.
const STDERR_BYTES: usize = 1024;

/// Why none was started just now.
enum Obstacle {
    /// There is no room, or no turn: it is nobody's fault.
    NotNow,
    /// It will not do before something is changed.
    Failure { reason: &'static str, message: String },
}

impl Engine {
    /// Keeps pools filled until the engine stops.
    pub(in crate::engine) async fn tend_pools(self: Arc<Self>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = 0_u32;
        loop {
            let is_thorough = tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.pools.rung() => true,
                _ = look.tick() => {
                    looks = looks.wrapping_add(1);
                    looks % THOROUGH_EVERY == 1
                }
            };
            if let Err(error) = self.tend_pools_once(is_thorough).await {
                tracing::warn!(error = format!("{error:#}"), "looking after pools failed");
            }
            self.metrics.pool_members(self.pools.ready_count(), self.pools.starting());
        }
    }

    /// `is_thorough`: also where there seems to be nothing to do.
    async fn tend_pools_once(self: &Arc<Self>, is_thorough: bool) -> anyhow::Result<()> {
        for (pool, count) in self.pools.take_misses() {
            if let Err(error) = self.store.note_pool_misses(pool, count).await {
                tracing::debug!(%error, "what a pool lacked is not counted");
            }
        }
        let wanted = self.know_pools().await?;
        if wanted.is_empty() && !is_thorough {
            return Ok(());
        }
        self.watch_members(&wanted).await?;
        self.give_up_unwanted(&wanted).await;
        while self.store.remove_ended_members(BATCH).await? == u64::from(BATCH) {}
        for pool in &wanted {
            // One that cannot be filled holds up no other.
            if let Err(error) = self.fill(pool).await {
                self.pools.failed(pool.id);
                tracing::warn!(error = format!("{error:#}"), "filling a pool failed");
            }
        }
        Ok(())
    }

    /// All pools that there are. Templates of new ones are read once.
    async fn know_pools(&self) -> anyhow::Result<Vec<PoolWanted>> {
        let mut references = self.pools.references();
        let mut wanted = self.store.pools_wanted(&references).await?;
        let new: Vec<PoolId> = wanted.iter().map(|pool| pool.id).filter(|id| !references.contains_key(id)).collect();
        if !new.is_empty() {
            for pool in self.store.pools_of(&new).await? {
                match pool.asked() {
                    Ok(template) => self.pools.learn(pool.id, pool.tenant, pool.name, &template),
                    Err(error) => tracing::warn!(pool = pool.name, %error, "a pool that this version cannot fill is left alone"),
                }
            }
            references = self.pools.references();
            // Once more, with what their images are.
            wanted = self.store.pools_wanted(&references).await?;
        }
        let there: HashSet<PoolId> = wanted.iter().map(|pool| pool.id).collect();
        self.pools.retain(|id| there.contains(&id));
        wanted.retain(|pool| references.contains_key(&pool.id));
        Ok(wanted)
    }

    /// Goes on with what an earlier process of this node left waiting.
    async fn watch_members(self: &Arc<Self>, wanted: &[PoolWanted]) -> Result<(), StoreError> {
        let members = self.members();
        let there: HashSet<SandboxId> = members.iter().map(|live| live.sandbox.id).collect();
        self.pools.retain_members(|id| there.contains(&id));
        let strangers: Vec<&Arc<Live>> = members.iter().filter(|live| self.pools.pool_of(live.sandbox.id).is_none()).collect();
        if strangers.is_empty() {
            return Ok(());
        }
        let ids: Vec<SandboxId> = strangers.iter().map(|live| live.sandbox.id).collect();
        let pools = self.store.pools_of_members(&ids).await?;
        for live in strangers {
            match pools.get(&live.sandbox.id).and_then(|id| wanted.iter().find(|pool| pool.id == *id)) {
                Some(pool) => {
                    self.pools.joined(pool.id, live.sandbox.id);
                    tokio::spawn(Arc::clone(self).await_readiness(Arc::clone(live), pool.id, pool.readiness.clone()));
                }
                // Its pool was removed.
                None => self.give_up_member(live).await,
            }
        }
        Ok(())
    }

    /// Ends what waits here for nothing: its pool is gone, smaller, or suspended; its image is another one by now; it is too old; or this node is to be empty.
    async fn give_up_unwanted(&self, wanted: &[PoolWanted]) {
        let is_to_be_empty = self.tenure.orders().is_drained || self.is_short();
        let now = self.clock.now();
        for live in self.waiting_members() {
            let Some(id) = self.pools.pool_of(live.sandbox.id) else { continue };
            let is_old = now - live.sandbox.created_at > POOLED_FOR_MAX;
            let image = Some(live.sandbox.image.digest.as_str());
            let is_wanted = wanted.iter().any(|pool| pool.id == id && !pool.is_suspended && pool.digest.as_deref() == image);
            if is_to_be_empty || is_old || !is_wanted {
                self.give_up_member(&live).await;
            }
        }
        for pool in wanted {
            let mut here: Vec<Arc<Live>> = self.waiting_members();
            here.retain(|live| self.pools.pool_of(live.sandbox.id) == Some(pool.id));
            here.sort_by_key(|live| (self.pools.is_ready(live.sandbox.id), std::cmp::Reverse(live.sandbox.id)));
            // Those that are told to end are rows until that is stored.
            let mut ending = self.members();
            ending.retain(|live| live.ordered_kill().is_some() && self.pools.pool_of(live.sandbox.id) == Some(pool.id));
            let staying = pool.members.saturating_sub(ending.len() as u64);
            let surplus = usize::try_from(staying.saturating_sub(u64::from(pool.size))).unwrap_or(usize::MAX);
            for live in here.into_iter().take(surplus) {
                self.give_up_member(&live).await;
            }
        }
    }

    /// Starts what this pool lacks, while nobody else wants the machine, and no more at a time than leaves most of it to others.
    async fn fill(self: &Arc<Self>, wanted: &PoolWanted) -> anyhow::Result<()> {
        let at_once = std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).max(1));
        let mut missing = u64::from(wanted.size).saturating_sub(wanted.members);
        while missing > 0
            && !wanted.is_suspended
            && self.pools.may_start(wanted.id)
            && self.pools.fresh() < at_once
            && self.pools.starting_in(wanted.id) < IN_POOL_MAX
            && self.pools.is_calm()
            && !self.has_queue()
            && self.hindrance().is_none()
            && !self.stopping.is_cancelled()
        {
            match self.start_member(wanted).await? {
                Ok(()) => missing -= 1,
                Err(Obstacle::NotNow) => return Ok(()),
                Err(Obstacle::Failure { reason, message }) => {
                    self.pools.failed(wanted.id);
                    self.note_failure(wanted.id, reason.to_owned(), message, String::new()).await;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn start_member(self: &Arc<Self>, wanted: &PoolWanted) -> anyhow::Result<Result<(), Obstacle>> {
        let Some(pool) = self.store.pools_of(&[wanted.id]).await?.into_iter().next() else { return Ok(Err(Obstacle::NotNow)) };
        let mut template = pool.asked()?;
        let input = input::encode(&std::mem::take(&mut template.files), template.stdin.take());
        let sandbox = match self.member_of(&pool, &template).await {
            Ok(sandbox) => sandbox,
            Err(EngineError::Store(error)) => return Err(error.into()),
            Err(EngineError::ImageNotFound(reference)) => {
                return Ok(Err(Obstacle::Failure { reason: "image_not_found", message: format!("there is no image {reference}") }));
            }
            Err(error) => return Ok(Err(Obstacle::Failure { reason: "invalid_request", message: error.to_string() })),
        };
        // Not for anybody's share: it is given up as soon as others need it.
        let Some(reservation) = self.capacity.reserve(room_of(&sandbox.limits)) else { return Ok(Err(Obstacle::NotNow)) };
        let lease = self.lease();
        let new = NewMember {
            sandbox: &sandbox,
            pool: pool.id,
            lease,
            asked: &asked(&sandbox.limits, None),
            network: template.network(),
            isolation: template.isolation(),
            defaults: &self.tenancy.defaults,
        };
        let mut admitted = self.store.admit_member(new).await?;
        if admitted == MemberAdmitted::Unknown {
            self.store.introduce(&Owner { tenant: pool.tenant.clone(), principal: pool.principal.clone() }, self.clock.now()).await?;
            admitted = self.store.admit_member(new).await?;
        }
        let obstacle = match admitted {
            MemberAdmitted::Yes => {
                fail_point::reached("service.pool.admitted");
                self.pools.joined(pool.id, sandbox.id);
                let live = self.live.insert(sandbox, lease, Duration::ZERO);
                tokio::spawn(Arc::clone(self).await_readiness(Arc::clone(&live), pool.id, pool.readiness));
                tokio::spawn(Arc::clone(self).carry(live, input, reservation));
                return Ok(Ok(()));
            }
            MemberAdmitted::NotNow | MemberAdmitted::ImageMoved | MemberAdmitted::Unknown | MemberAdmitted::Suspended => Obstacle::NotNow,
            MemberAdmitted::Exceeded(exceeded) => Obstacle::Failure { reason: "quota_exceeded", message: exceeded.to_string() },
        };
        Ok(Err(obstacle))
    }

    /// One more sandbox of this pool.
    async fn member_of(&self, pool: &Pool, template: &NewSandbox) -> Result<Sandbox, EngineError> {
        let reference = template.image.as_str();
        let image =
            self.store.find_image(&pool.tenant, reference).await?.ok_or_else(|| EngineError::ImageNotFound(reference.to_owned()))?;
        let now = self.clock.now();
        Ok(Sandbox {
            id: SandboxId(Uuid::now_v7()),
            tenant: pool.tenant.clone(),
            principal: pool.principal.clone(),
            kind: Kind::Pooled,
            state: State::Starting,
            name: None,
            program: Program::resolve(&image.config, template)?,
            image: ImageUsed { reference: image.reference, digest: image.digest, root: image.root },
            compile: None,
            judging: None,
            limits: template.limits,
            output_policy: template.output_policy,
            labels: std::collections::BTreeMap::new(),
            created_at: now,
            claimed_at: Some(now),
            started_at: None,
            fences: None,
            finished_at: None,
            // Whoever takes it says for how long.
            ttl_ms: None,
            expires_at: None,
            idle_timeout_ms: None,
            auto_remove: template.auto_remove,
            keep_layer: false,
            starts: 1,
            outcome: None,
            attempt: 1,
            retries_left: 0,
            claims: 1,
            // Its pool has it; one that was not begun is not begun again.
            keeps_input: false,
            from_pool: None,
        })
    }

    /// Has it be taken as soon as it is ready, and gives it up where that takes too long.
    async fn await_readiness(self: Arc<Self>, live: Arc<Live>, pool: PoolId, readiness: Readiness) {
        let within = Duration::from_millis(readiness.within_ms);
        let is_ready = tokio::time::timeout(within, self.becomes_ready(&live, readiness.output.as_deref())).await;
        match is_ready {
            Ok(true) => {
                self.metrics.pool_started("ready");
                self.pools.ready(live.sandbox.id);
                let noted = self.store.member_ready(live.sandbox.id, self.clock.now()).await;
                if let Err(error) = noted {
                    tracing::warn!(sandbox.id = %live.sandbox.id, %error, "noting that it is ready failed");
                }
            }
            // It has ended; whoever follows it tells why.
            Ok(false) => {}
            Err(_late) => {
                let message = format!("it was not ready within {} ms", readiness.within_ms);
                self.pools.failed(pool);
                self.note_failure(pool, "not_ready".to_owned(), message, String::new()).await;
                self.give_up_member(&live).await;
            }
        }
    }

    /// True when it runs and has written what tells that it is ready; false when it has ended.
    async fn becomes_ready(self: &Arc<Self>, live: &Arc<Live>, output: Option<&str>) -> bool {
        let mut progress = live.subscribe();
        let begun = progress.wait_for(|progress| !matches!(progress, Progress::Queued | Progress::Starting)).await;
        if !begun.is_ok_and(|progress| matches!(*progress, Progress::Running(_))) {
            return false;
        }
        let Some(output) = output else { return true };
        let mut log = self.read_log(&live.sandbox, LogQuery { is_following: true, ..LogQuery::default() });
        let mut streams = [Seen::default(), Seen::default()];
        loop {
            match log.next().await {
                Ok(Some(Followup::Item(LogItem::Chunk { kind, data, .. }))) => {
                    let stream = &mut streams[usize::from(kind == log::Kind::Stderr)];
                    if stream.has_come(&data, output.as_bytes()) {
                        return true;
                    }
                }
                Ok(Some(Followup::Item(LogItem::Gap { .. }))) => {}
                Ok(Some(Followup::End(_)) | None) => return false,
                Err(error) => {
                    tracing::warn!(sandbox.id = %live.sandbox.id, %error, "whether it is ready is not known yet");
                    return std::future::pending().await;
                }
            }
        }
    }

    /// One that waited has ended, and that is stored: its row has nothing more to say.
    pub(in crate::engine) async fn member_ended(&self, live: &Live, outcome: &Outcome, log_tail: &LogTail) {
        let (id, by_itself) = (live.sandbox.id, outcome.reason != Reason::Evicted);
        let pool = self.pools.pool_of(id);
        self.pools.ended(id, by_itself);
        if let Some(pool) = pool.filter(|_| by_itself) {
            let stderr = super::super::Output::of(log_tail).stderr;
            let last = &stderr[stderr.len().saturating_sub(STDERR_BYTES)..];
            self.note_failure(
                pool,
                outcome.reason.as_str().to_owned(),
                outcome.message.clone(),
                String::from_utf8_lossy(last).into_owned(),
            )
            .await;
        }
    }

    async fn note_failure(&self, pool: PoolId, reason: String, message: String, stderr: String) {
        self.metrics.pool_started("failed");
        // A zero byte is no text to Postgres.
        let failure = PoolFailure { at: self.clock.now(), reason, message, stderr: stderr.replace('\0', "\u{fffd}") };
        if let Err(error) = self.store.note_pool_failure(pool, &failure).await {
            tracing::warn!(%error, "noting why a pool does not fill failed");
        }
    }
}

/// What of a stream may be the beginning of what is waited for.
#[derive(Default)]
struct Seen(Vec<u8>);

impl Seen {
    /// Whether `wanted` has come, with these bytes.
    fn has_come(&mut self, data: &[u8], wanted: &[u8]) -> bool {
        self.0.extend_from_slice(data);
        if self.0.windows(wanted.len()).any(|window| window == wanted) {
            return true;
        }
        let kept = self.0.len().min(wanted.len().saturating_sub(1));
        self.0.drain(..self.0.len() - kept);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_seen_however_it_is_cut() {
        for cut in 0..=9 {
            let (first, second) = b"so ready!".split_at(cut);
            let mut seen = Seen::default();
            assert!(seen.has_come(first, b"ready") || seen.has_come(second, b"ready"), "cut at {cut}");
        }
        let mut seen = Seen::default();
        assert!(!seen.has_come(b"rea", b"ready") && !seen.has_come(b"rdy", b"ready"));
    }
}
