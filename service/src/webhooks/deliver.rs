//! Delivering: deliveries are made of events, attempts are taken, sent, and recorded. Any number of nodes do so beside each other.
//!
//! An attempt is taken for a time, in the row itself. Whoever is killed between sending and recording leaves it to be taken again when that time is
//! over: a receiver may hear a thing twice, under the same `webhook-id`, and never not at all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sandbox_core::fail_point;
use time::OffsetDateTime;
use tokio::{
    sync::{Notify, broadcast},
    task::{self, JoinHandle, JoinSet},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Settings, SigningKey,
    send::{DEADLINE, Message, Sender},
};
use crate::{
    clock::Clock,
    metrics::Metrics,
    outbox::Outbox,
    store::{Attempt, Busy, Claimed, News, Store, StoreError, Told},
};

/// Between two looks that nobody asked for: pauses end, and other nodes make deliveries.
const POLL: Duration = Duration::from_secs(1);
/// Between two looks for events of which deliveries are still to be made, should who began it have died.
const POLL_EVENTS: Duration = Duration::from_secs(5);
/// How long an attempt is its taker's alone: longer than it may last, with its record.
const HELD_FOR: Duration = Duration::from_secs(60);
/// Attempts under way, of this node: together, of a tenant, and of one webhook. Who is slow fills its own share.
const ATTEMPTS_MAX: usize = 256;
const ATTEMPTS_OF_TENANT: u32 = 16;
const ATTEMPTS_OF_WEBHOOK: u32 = 4;
/// The longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(6 * 3600);
/// How long attempts under way have when the service stops.
const LAST: Duration = Duration::from_secs(1);

/// What deliveries are made with.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) store: Store,
    pub(super) sender: Sender,
    pub(super) key: SigningKey,
    pub(super) settings: Settings,
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    /// What is sent of an event.
    pub(super) body: fn(Told) -> String,
}

/// The tasks that deliver.
#[derive(Debug)]
pub(super) struct Dispatcher(Mutex<Option<JoinHandle<()>>>);

impl Dispatcher {
    pub(super) fn start(work: Work, outbox: &Arc<Outbox>, due: Arc<Notify>) -> Self {
        let (work, stopping) = (Arc::new(work), outbox.stopping());
        let making = make_deliveries(Arc::clone(&work), outbox.subscribe(), Arc::clone(&due));
        let until = stopping.clone();
        tokio::spawn(async move { until.run_until_cancelled(making).await });
        Self(Mutex::new(Some(tokio::spawn(attempt_deliveries(work, due, stopping)))))
    }

    /// Returns when the last attempt is over or given back, after the service was told to stop.
    pub(super) async fn ended(&self) {
        let task = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // Should it have panicked, that is in the log.
            drop(task.await);
        }
    }
}

/// Makes deliveries of events as they come.
async fn make_deliveries(work: Arc<Work>, mut news: broadcast::Receiver<Arc<News>>, due: Arc<Notify>) {
    loop {
        match work.make_deliveries().await {
            Ok(0) => {}
            Ok(_) => {
                due.notify_one();
                continue;
            }
            Err(error) => tracing::debug!(%error, "making deliveries failed"),
        }
        // Whichever it is, there may be something.
        drop(tokio::time::timeout(POLL_EVENTS, news.recv()).await);
    }
}

impl Work {
    async fn make_deliveries(&self) -> Result<usize, StoreError> {
        let now = self.clock.now();
        self.store.make_deliveries(now, now + self.settings.retry_for, self.body).await
    }

    /// Sends it once, and records how that went.
    async fn attempt(&self, claimed: Claimed) {
        let Claimed { delivery, webhook, .. } = &claimed;
        let began_at = self.clock.now();
        let mut secrets = vec![self.key.secret(*webhook, claimed.secret_version)];
        if claimed.is_former_secret_good && claimed.secret_version > 1 {
            secrets.push(self.key.secret(*webhook, claimed.secret_version - 1));
        }
        let message =
            Message { url: &claimed.url, id: *delivery, timestamp_s: began_at.unix_timestamp(), body: claimed.body.clone(), secrets };
        let sent = self.sender.send(message).await;
        fail_point::reached("service.webhook.sent");
        let next_at = self.next_attempt(&claimed, sent.error.is_none());
        let attempt = Attempt {
            number: claimed.number,
            at: began_at,
            ms: u64::try_from(sent.took.as_millis()).unwrap_or(u64::MAX),
            status: sent.status,
            error: sent.error,
        };
        self.metrics.webhook_attempt(attempt.error.is_none());
        self.record(&claimed, &attempt, sent.response.as_deref(), next_at).await;
    }

    /// When it is tried again; `None`: never.
    fn next_attempt(&self, claimed: &Claimed, is_taken: bool) -> Option<OffsetDateTime> {
        let random = Uuid::new_v4().as_u128();
        let pause = pause_after(claimed.number - claimed.numbers_before, self.settings.first_retry, random);
        Some(self.clock.now() + pause).filter(|next_at| !is_taken && *next_at < claimed.give_up_at)
    }

    /// Until it is written, or the attempt is anybody's again.
    async fn record(&self, claimed: &Claimed, attempt: &Attempt, response: Option<&str>, next_at: Option<OffsetDateTime>) {
        let until = tokio::time::Instant::now() + HELD_FOR.saturating_sub(DEADLINE);
        loop {
            match self.store.record_attempt(claimed, attempt, response, next_at, self.settings.disable_after).await {
                Ok(true) => {
                    tracing::info!(webhook.id = %claimed.webhook, "a webhook is inactive now: every attempt failed for too long");
                    return;
                }
                Ok(false) => return,
                Err(error) if tokio::time::Instant::now() >= until => {
                    tracing::warn!(%error, webhook.id = %claimed.webhook, "an attempt at a delivery could not be recorded; it is made again");
                    return;
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }
}

/// Takes attempts as they are due, each in a task of its own.
async fn attempt_deliveries(work: Arc<Work>, due: Arc<Notify>, stopping: CancellationToken) {
    let mut look = tokio::time::interval(POLL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut under_way = UnderWay::default();
    loop {
        while let Some(room) = under_way.room() {
            match work.store.claim_attempts(&under_way.busy(), work.key.id(), work.clock.now(), HELD_FOR, room).await {
                Ok(claimed) if claimed.is_empty() => break,
                Ok(claimed) => claimed.into_iter().for_each(|claimed| under_way.begin(&work, claimed)),
                Err(error) => {
                    tracing::debug!(%error, "looking for deliveries failed");
                    break;
                }
            }
        }
        tokio::select! {
            () = stopping.cancelled() => break,
            () = due.notified() => {}
            _ = look.tick() => {}
            () = under_way.one_ended() => {}
        }
    }
    let ended = async {
        while !under_way.tasks.is_empty() {
            under_way.one_ended().await
        }
    };
    if tokio::time::timeout(LAST, ended).await.is_err() {
        under_way.tasks.abort_all();
        let given_back = work.store.give_attempts_back(&under_way.claims(), work.clock.now()).await;
        if let Err(error) = given_back {
            tracing::debug!(%error, "attempts under way are left until others may take them");
        }
    }
}

/// The attempts that this node makes now.
#[derive(Default)]
struct UnderWay {
    tasks: JoinSet<()>,
    claims: HashMap<task::Id, Claim>,
}

struct Claim {
    delivery: Uuid,
    number: u32,
    webhook: Uuid,
    tenant: String,
}

impl UnderWay {
    /// How many more may begin; `None`: not one.
    fn room(&self) -> Option<u32> {
        u32::try_from(ATTEMPTS_MAX.saturating_sub(self.claims.len())).ok().filter(|room| *room > 0)
    }

    /// Whose share is used up, and by how much.
    fn busy(&self) -> Busy {
        let (mut webhooks, mut tenants) = (HashMap::<Uuid, u32>::new(), HashMap::<&str, u32>::new());
        for claim in self.claims.values() {
            *webhooks.entry(claim.webhook).or_default() += 1;
            *tenants.entry(&claim.tenant).or_default() += 1;
        }
        Busy {
            webhooks: webhooks.into_iter().filter(|(_, count)| *count >= ATTEMPTS_OF_WEBHOOK).map(|(webhook, _)| webhook).collect(),
            tenants: tenants.into_iter().map(|(tenant, count)| (tenant.to_owned(), count)).collect(),
            of_tenant_max: ATTEMPTS_OF_TENANT,
        }
    }

    fn begin(&mut self, work: &Arc<Work>, claimed: Claimed) {
        let claim = Claim { delivery: claimed.delivery, number: claimed.number, webhook: claimed.webhook, tenant: claimed.tenant.clone() };
        let work = Arc::clone(work);
        let task = self.tasks.spawn(async move { work.attempt(claimed).await });
        self.claims.insert(task.id(), claim);
    }

    /// Returns when one is over; never, while there is none.
    async fn one_ended(&mut self) {
        let id = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(panic)) => {
                tracing::error!(error = %panic, "an attempt at a delivery panicked");
                panic.id()
            }
            None => std::future::pending().await,
        };
        self.claims.remove(&id);
    }

    fn claims(&self) -> Vec<(Uuid, u32)> {
        self.claims.values().map(|claim| (claim.delivery, claim.number)).collect()
    }
}

/// The pause after so many attempts: twice the one before, a fifth more or less, so that those who failed together do not come again together.
fn pause_after(attempts: u32, first: Duration, random: u128) -> Duration {
    let doubled = first.saturating_mul(1_u32.checked_shl(attempts.saturating_sub(1)).unwrap_or(u32::MAX));
    let fifths_of_percent = u32::try_from(random % 401).unwrap_or(0);
    doubled.min(PAUSE_MAX) / 1000 * (800 + fifths_of_percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_six_hours_and_are_not_all_the_same() {
        let first = Duration::from_secs(5);
        let middle = |attempts| pause_after(attempts, first, 200);
        assert_eq!([1, 2, 3].map(middle), [5, 10, 20].map(Duration::from_secs));
        assert_eq!([14, 32, 33, u32::MAX].map(middle), [PAUSE_MAX; 4]);
        assert_eq!((pause_after(1, first, 0), pause_after(1, first, 400)), (Duration::from_secs(4), Duration::from_secs(6)));
    }
}
