//! What this process knows of pools and of what waits in them here. A guess that is a moment old: rows have the last word.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::sandbox::{NewSandbox, Personal, PoolId, SandboxId, Template, TenantId};

/// After a first failure nothing is started in a pool for so long, after each further one for twice as long, up to the other.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// One that waited for so long came to something.
const PROVEN_AFTER: Duration = Duration::from_secs(60);
/// For so long one that was started, and is not ready, keeps others from being started.
const FRESH: Duration = Duration::from_secs(2);
/// For so long nothing is filled where room was short.
const CALM: Duration = Duration::from_secs(5);

/// All pools of all tenants, and what waits on this node.
#[derive(Debug, Default)]
pub(in crate::engine) struct Pools {
    known: Mutex<Known>,
    /// Rung when something is to be looked after.
    bell: Notify,
}

#[derive(Debug, Default)]
struct Known {
    pools: HashMap<PoolId, KnownPool>,
    members: HashMap<SandboxId, Member>,
    room_was_short_at: Option<Instant>,
}

#[derive(Debug)]
struct KnownPool {
    tenant: TenantId,
    name: String,
    template: Template,
    of_template: OfTemplate,
    /// Here, the one that has waited for longest first.
    ready: VecDeque<SandboxId>,
    missed: u64,
    failures: u32,
    not_before: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    pool: PoolId,
    since: Instant,
    is_ready: bool,
}

/// What a template says of what may differ.
#[derive(Debug, Clone)]
pub(super) struct OfTemplate(Personal);

impl OfTemplate {
    /// The same under one's own.
    pub(super) fn complete(&self, own: Personal) -> Personal {
        let Personal { labels, ttl_ms, idle_timeout_ms, .. } = self.0.clone();
        let mut labels = labels;
        labels.extend(own.labels);
        Personal { name: own.name, labels, ttl_ms: own.ttl_ms.or(ttl_ms), idle_timeout_ms: own.idle_timeout_ms.or(idle_timeout_ms) }
    }
}

impl Pools {
    /// Something has changed.
    pub(in crate::engine) fn look(&self) {
        self.bell.notify_one();
    }

    pub(super) async fn rung(&self) {
        self.bell.notified().await;
    }

    /// Whether the tenant has a pool. Costs nobody anything who has none.
    pub(super) fn has_some_of(&self, tenant: &TenantId) -> bool {
        self.lock().pools.values().any(|pool| pool.tenant == *tenant)
    }

    /// Whether something of the tenant's waits here.
    pub(super) fn has_ready_of(&self, tenant: &TenantId) -> bool {
        self.lock().pools.values().any(|pool| pool.tenant == *tenant && !pool.ready.is_empty())
    }

    /// The tenant's pool of what is like this, one with something ready if there is such.
    pub(super) fn like(&self, tenant: &TenantId, template: &Template) -> Option<PoolId> {
        let known = self.lock();
        let alike = known.pools.iter().filter(|(_, pool)| pool.tenant == *tenant && pool.template == *template);
        alike.max_by_key(|(id, pool)| (pool.ready.len(), **id)).map(|(id, _)| *id)
    }

    pub(super) fn named(&self, tenant: &TenantId, name: &str) -> Option<(PoolId, OfTemplate)> {
        let known = self.lock();
        let found = known.pools.iter().find(|(_, pool)| pool.tenant == *tenant && pool.name == name);
        found.map(|(id, pool)| (*id, pool.of_template.clone()))
    }

    pub(super) fn name_of(&self, id: PoolId) -> Option<String> {
        self.lock().pools.get(&id).map(|pool| pool.name.clone())
    }

    /// What this pool's images are called.
    pub(super) fn references(&self) -> BTreeMap<PoolId, String> {
        self.lock().pools.iter().map(|(id, pool)| (*id, pool.template.image().to_owned())).collect()
    }

    /// Begins to know a pool.
    pub(super) fn learn(&self, id: PoolId, tenant: TenantId, name: String, template: &NewSandbox) {
        let known = KnownPool {
            tenant,
            name,
            template: Template::of(template),
            of_template: OfTemplate(template.personal()),
            ready: VecDeque::new(),
            missed: 0,
            failures: 0,
            not_before: None,
        };
        self.lock().pools.entry(id).or_insert(known);
    }

    /// Knows no others than these any more.
    pub(super) fn retain(&self, is_there: impl Fn(PoolId) -> bool) {
        self.lock().pools.retain(|id, _| is_there(*id));
    }

    /// The first that is ready; nobody else is given it.
    pub(super) fn pop(&self, pool: PoolId) -> Option<SandboxId> {
        self.lock().pools.get_mut(&pool)?.ready.pop_front()
    }

    /// It was not taken after all.
    pub(super) fn put_back(&self, pool: PoolId, id: SandboxId) {
        let mut known = self.lock();
        if known.members.contains_key(&id)
            && let Some(pool) = known.pools.get_mut(&pool)
        {
            pool.ready.push_front(id);
        }
    }

    /// One more is to wait in this pool.
    pub(super) fn joined(&self, pool: PoolId, id: SandboxId) {
        self.lock().members.insert(id, Member { pool, since: Instant::now(), is_ready: false });
    }

    pub(super) fn pool_of(&self, id: SandboxId) -> Option<PoolId> {
        self.lock().members.get(&id).map(|member| member.pool)
    }

    pub(super) fn is_ready(&self, id: SandboxId) -> bool {
        self.lock().members.get(&id).is_some_and(|member| member.is_ready)
    }

    /// From now on it can be taken.
    pub(super) fn ready(&self, id: SandboxId) {
        let mut known = self.lock();
        let Some(member) = known.members.get_mut(&id) else { return };
        (member.is_ready, member.since) = (true, Instant::now());
        let pool = member.pool;
        if let Some(pool) = known.pools.get_mut(&pool) {
            pool.ready.push_back(id);
        }
        drop(known);
        self.look();
    }

    /// It cannot be taken any more.
    pub(super) fn not_ready(&self, id: SandboxId) {
        self.lock().pools.values_mut().for_each(|pool| pool.ready.retain(|ready| *ready != id));
    }

    /// Knows nobody else who waits here.
    pub(super) fn retain_members(&self, is_there: impl Fn(SandboxId) -> bool) {
        let mut known = self.lock();
        known.members.retain(|id, _| is_there(*id));
        known.pools.values_mut().for_each(|pool| pool.ready.retain(|id| is_there(*id)));
    }

    /// It is somebody's: its pool does what it is for.
    pub(super) fn taken(&self, id: SandboxId) {
        self.leave(id, |pool, _| pool.succeeded());
    }

    /// It has ended while it waited, by itself or not.
    pub(super) fn ended(&self, id: SandboxId, by_itself: bool) {
        self.leave(id, |pool, member| {
            if member.is_ready && member.since.elapsed() >= PROVEN_AFTER {
                pool.succeeded();
            }
            if by_itself {
                pool.failed();
            }
        });
    }

    /// None could be made.
    pub(super) fn failed(&self, id: PoolId) {
        if let Some(pool) = self.lock().pools.get_mut(&id) {
            pool.failed();
        }
    }

    /// Whether another one may be started in this pool now.
    pub(super) fn may_start(&self, id: PoolId) -> bool {
        self.lock().pools.get(&id).is_some_and(|pool| pool.not_before.is_none_or(|at| at <= Instant::now()))
    }

    /// How many here have been started just now and are not ready. One that takes its time is nobody else's concern.
    pub(super) fn fresh(&self) -> usize {
        self.lock().members.values().filter(|member| !member.is_ready && member.since.elapsed() < FRESH).count()
    }

    /// How many of this pool are not ready here.
    pub(super) fn starting_in(&self, pool: PoolId) -> usize {
        self.lock().members.values().filter(|member| !member.is_ready && member.pool == pool).count()
    }

    /// How many here are not ready yet.
    pub(super) fn starting(&self) -> usize {
        self.lock().members.values().filter(|member| !member.is_ready).count()
    }

    /// A request found none ready.
    pub(super) fn missed(&self, id: PoolId) {
        if let Some(pool) = self.lock().pools.get_mut(&id) {
            pool.missed += 1;
        }
        self.look();
    }

    /// How many requests found none ready since somebody asked.
    pub(super) fn take_misses(&self) -> Vec<(PoolId, u64)> {
        let mut known = self.lock();
        let misses = known.pools.iter_mut().map(|(id, pool)| (*id, std::mem::take(&mut pool.missed)));
        misses.filter(|(_, count)| *count > 0).collect()
    }

    /// What waits stood in the way of a request.
    pub(super) fn room_is_needed(&self) {
        self.lock().room_was_short_at = Some(Instant::now());
    }

    /// Whether nobody has needed the room for a while.
    pub(super) fn is_calm(&self) -> bool {
        self.lock().room_was_short_at.is_none_or(|at| at.elapsed() >= CALM)
    }

    /// How many are ready here.
    pub(super) fn ready_count(&self) -> usize {
        self.lock().pools.values().map(|pool| pool.ready.len()).sum()
    }

    fn leave(&self, id: SandboxId, tell: impl FnOnce(&mut KnownPool, Member)) {
        self.not_ready(id);
        let mut known = self.lock();
        if let Some(member) = known.members.remove(&id)
            && let Some(pool) = known.pools.get_mut(&member.pool)
        {
            tell(pool, member);
        }
        drop(known);
        self.look();
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KnownPool {
    const fn succeeded(&mut self) {
        (self.failures, self.not_before) = (0, None);
    }

    fn failed(&mut self) {
        let pause = PAUSE_MIN.saturating_mul(1 << self.failures.min(16)).min(PAUSE_MAX);
        (self.failures, self.not_before) = (self.failures.saturating_add(1), Some(Instant::now() + pause));
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::sandbox::{SandboxRequest, Wanted};

    fn tenant() -> TenantId {
        TenantId::proven("acme".into())
    }

    fn asked(command: &str) -> NewSandbox {
        let request = serde_json::json!({ "image": "a", "command": [command] });
        match serde_json::from_value::<SandboxRequest>(request).unwrap().parse().unwrap() {
            Wanted::Like(asked) => *asked,
            Wanted::OfPool { .. } => panic!("it names a pool"),
        }
    }

    fn with_one_pool() -> (Pools, PoolId, SandboxId) {
        let (pools, pool, id) = (Pools::default(), PoolId(Uuid::now_v7()), SandboxId(Uuid::now_v7()));
        pools.learn(pool, tenant(), "p".into(), &asked("true"));
        pools.joined(pool, id);
        (pools, pool, id)
    }

    #[tokio::test]
    async fn each_that_is_ready_is_given_once_and_in_turn() {
        let (pools, pool, first) = with_one_pool();
        let second = SandboxId(Uuid::now_v7());
        pools.joined(pool, second);
        assert_eq!((pools.pop(pool), pools.starting()), (None, 2));
        pools.ready(first);
        pools.ready(second);
        assert_eq!((pools.pop(pool), pools.pop(pool), pools.pop(pool)), (Some(first), Some(second), None));
        pools.put_back(pool, second);
        pools.put_back(pool, first);
        pools.ended(first, false);
        assert_eq!((pools.pop(pool), pools.pop(pool)), (Some(second), None));
    }

    #[tokio::test]
    async fn only_the_tenants_own_is_found_and_only_what_is_like_it() {
        let (pools, pool, _) = with_one_pool();
        let other = TenantId::proven("other".into());
        assert_eq!(pools.like(&tenant(), &Template::of(&asked("true"))), Some(pool));
        assert_eq!(pools.like(&tenant(), &Template::of(&asked("false"))), None);
        assert_eq!(pools.like(&other, &Template::of(&asked("true"))), None);
        assert!(pools.has_some_of(&tenant()) && !pools.has_some_of(&other));
        pools.retain(|_| false);
        assert!(!pools.has_some_of(&tenant()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_its_time_keeps_only_its_own_pool_waiting() {
        let (pools, pool, id) = with_one_pool();
        assert_eq!((pools.fresh(), pools.starting_in(pool)), (1, 1));
        tokio::time::advance(FRESH).await;
        assert_eq!((pools.fresh(), pools.starting_in(pool)), (0, 1));
        pools.ready(id);
        assert_eq!((pools.fresh(), pools.starting_in(pool)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_again_and_again_is_tried_less_and_less_often() {
        let (pools, pool, id) = with_one_pool();
        let mut waited = Vec::new();
        for _ in 0..12 {
            pools.failed(pool);
            let from = Instant::now();
            while !pools.may_start(pool) {
                tokio::time::advance(Duration::from_millis(500)).await;
            }
            waited.push(from.elapsed());
        }
        assert_eq!(waited[..3], [PAUSE_MIN, PAUSE_MIN * 2, PAUSE_MIN * 4]);
        assert_eq!(waited[11], PAUSE_MAX);
        pools.taken(id);
        assert!(pools.may_start(pool));
        pools.failed(pool);
        tokio::time::advance(PAUSE_MIN).await;
        assert!(pools.may_start(pool), "one that was taken came to something");
    }
}
