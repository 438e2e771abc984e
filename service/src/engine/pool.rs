//! Pools: sandboxes that wait, started, until somebody asks for what they are; and the step by which one becomes theirs.
//!
//! A sandbox that waits is one of this node's like every other, with a row and a follower, but of the kind `pooled`: it counts as its pool's maker's, is found by nobody, and is
//! given up before anybody's request has to wait for its room. Who takes it is decided by Postgres, in the statement that makes it theirs.

mod fill;
mod known;

use std::{sync::Arc, time::Duration};

pub(super) use known::Pools;
use sandbox_core::{
    fail_point,
    protocol::{KillReason, Launched, NewLimits, NewTime},
};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{
    Engine, EngineError, Followed, Making, Owner, Progress,
    capacity::{Reservation, Room},
    life::{detached, room_of},
    live::Live,
};
use crate::{
    clock::at_us,
    runtime::CallError,
    sandbox::{
        FromPool, Kind, NewPool, NewSandbox, Personal, Pool, PoolId, Program, Sandbox, State, Template, TenantId, WhenFull, asked,
        in_template,
    },
    store::{Act, HeldKey, PoolMade, StoreError, TakeOver, TakenOver},
};

/// How long one that is given up is waited for where its room is needed.
const ROOM_PATIENCE: Duration = Duration::from_secs(2);
/// What is asked for while nobody's is taken: two attempts, since a principal may be new.
const ATTEMPTS: u32 = 2;

impl Engine {
    /// Makes a pool. One of the same id that was made before is left as it is. `template` is what was asked for, as JSON.
    pub async fn create_pool(self: &Arc<Self>, owner: Owner, id: PoolId, new: NewPool, template: Vec<u8>) -> Result<Pool, EngineError> {
        self.check_template(&owner.tenant, &new.template).await?;
        let act = Act { actor: Some(&owner), at: self.clock.now(), data: Value::Null };
        match self.store.create_pool(id, (&new, &template), &owner, &self.tenancy.defaults.tenant, &act).await? {
            PoolMade::Yes(pool) => {
                self.pools.look();
                Ok(*pool)
            }
            PoolMade::NameTaken => Err(EngineError::PoolExists(new.name)),
            PoolMade::Exceeded(exceeded) => Err(EngineError::QuotaExceeded(Box::new(exceeded))),
        }
    }

    /// Whether a sandbox of this template could be started here, as things are.
    async fn check_template(&self, tenant: &TenantId, template: &NewSandbox) -> Result<(), EngineError> {
        let reference = template.image.as_str();
        let image = self.store.find_image(tenant, reference).await?.ok_or_else(|| EngineError::ImageNotFound(reference.to_owned()))?;
        Program::resolve(&image.config, template).map_err(in_template)?;
        self.capacity.could_hold(room_of(&template.limits)).map_err(EngineError::NoCapacity)
    }

    /// Gives the tenant's pool another size; `None` if there is none.
    pub async fn resize_pool(&self, owner: &Owner, name: &str, size: u32) -> Result<Option<Pool>, EngineError> {
        let act = Act { actor: Some(owner), at: self.clock.now(), data: Value::Null };
        let resized = self.store.resize_pool(&owner.tenant, name, size, &self.tenancy.defaults.tenant, &act).await?;
        self.pools.look();
        resized.transpose().map_err(|exceeded| EngineError::QuotaExceeded(Box::new(exceeded)))
    }

    /// Removes the tenant's pool; what waits in it is given up. False: there is none.
    pub async fn remove_pool(&self, owner: &Owner, name: &str) -> Result<bool, EngineError> {
        let act = Act { actor: Some(owner), at: self.clock.now(), data: serde_json::json!({}) };
        let is_gone = self.store.remove_pool(&owner.tenant, name, &act).await?;
        self.pools.look();
        Ok(is_gone)
    }

    /// Whether something of the tenant's waits here.
    pub fn has_ready_of(&self, tenant: &TenantId) -> bool {
        self.pools.has_ready_of(tenant)
    }

    /// A sandbox that waits here and is what is asked for, made theirs. `None`: there is none, or they may not have it and will hear why when they ask for one of their own.
    pub async fn take_like(
        self: &Arc<Self>,
        owner: &Owner,
        asked: &NewSandbox,
        key: Option<&HeldKey>,
    ) -> Result<Option<Sandbox>, EngineError> {
        if !self.pools.has_some_of(&owner.tenant) || !asked.can_wait() {
            return Ok(None);
        }
        let Some(pool) = self.pools.like(&owner.tenant, &Template::of(asked)) else { return Ok(None) };
        self.take_counted(owner, pool, asked.personal(), key).await
    }

    /// A sandbox of the tenant's pool of this name: one that waits here, or a new one of its template. `None`: there is no such pool.
    pub async fn take_or_create(
        self: &Arc<Self>,
        owner: Owner,
        name: &str,
        (personal, when_full): (Personal, WhenFull),
        how: Making,
    ) -> Result<Option<Sandbox>, EngineError> {
        // What waits has its name already. Where another name was given, nothing else may be made of the request.
        if how.id.is_none()
            && let Some((pool, of_template)) = self.pools.named(&owner.tenant, name)
            && let Some(sandbox) = self.take_counted(&owner, pool, of_template.complete(personal.clone()), how.key.as_ref()).await?
        {
            return Ok(Some(sandbox));
        }
        let Some(pool) = self.store.find_pool(&owner.tenant, name).await? else { return Ok(None) };
        let asked = NewSandbox { when_full, ..pool.asked()?.with(personal) };
        self.create_and_start(owner, asked, how).await.map(Some)
    }

    async fn take_counted(
        self: &Arc<Self>,
        owner: &Owner,
        pool: PoolId,
        personal: Personal,
        key: Option<&HeldKey>,
    ) -> Result<Option<Sandbox>, EngineError> {
        if self.is_draining() || self.is_closing() {
            return Ok(None);
        }
        let (engine, owner, key) = (Arc::clone(self), owner.clone(), key.cloned());
        // In a task of its own: who asked may go away between the commit and what follows it.
        let taken = detached(async move { engine.take(&owner, pool, &personal, key.as_ref()).await }).await?;
        self.metrics.pool_asked(taken.is_some());
        if taken.is_none() {
            self.pools.missed(pool);
        }
        Ok(taken)
    }

    /// One of this pool's that waits here, the one that has waited for longest.
    async fn take(
        self: &Arc<Self>,
        owner: &Owner,
        pool: PoolId,
        personal: &Personal,
        key: Option<&HeldKey>,
    ) -> Result<Option<Sandbox>, EngineError> {
        let mut attempts = ATTEMPTS;
        while let Some(id) = self.pools.pop(pool) {
            let Some(live) = self.live.get(id) else { continue };
            let turn = live.turn().await;
            let Some(launched) = self.launched_member(&live) else { continue };
            let started_at = at_us(launched.started_at_us);
            let now = self.clock.now();
            let waited_ms = u64::try_from((now - started_at).whole_milliseconds()).unwrap_or(0);
            match self.begin_wall(&live, waited_ms).await {
                Ok(()) => {}
                // Nobody is there to say it to; when somebody is, it is as it was.
                Err(CallError::Lost) => {
                    drop(turn);
                    self.pools.put_back(pool, id);
                    return Ok(None);
                }
                Err(CallError::Failed(_)) => {
                    drop(turn);
                    self.give_up_member(&live).await;
                    continue;
                }
            }
            let next = owned(&live.sandbox, owner, personal, (now, launched, waited_ms), self.pools.name_of(pool).unwrap_or_default());
            let took = self.ask_to_take(&live, pool, personal, &next, key).await;
            match took {
                Ok(TakenOver::Yes { weight }) => {
                    fail_point::reached("service.pool.taken");
                    let sandbox = self.hand_over_member(&live, next, owner, weight, launched);
                    drop(turn);
                    return Ok(Some(sandbox));
                }
                // This node may have lost its lease and taken it again, and what waits here with it.
                Ok(TakenOver::Gone) if attempts > 1 && self.is_ours_again(&live).await? => {}
                Ok(TakenOver::Gone | TakenOver::ImageMoved) => {
                    drop(turn);
                    self.give_up_member(&live).await;
                    continue;
                }
                Ok(TakenOver::Unknown | TakenOver::KeyLost | TakenOver::Refused) | Err(_) => {}
            }
            // It goes on waiting.
            self.end_wall(&live).await;
            drop(turn);
            self.pools.put_back(pool, id);
            match took {
                Ok(TakenOver::Gone) => attempts -= 1,
                Ok(TakenOver::Unknown) if attempts > 1 => {
                    attempts -= 1;
                    self.introduce(owner).await?;
                }
                Ok(TakenOver::KeyLost) => return Err(EngineError::KeyLost),
                Ok(_) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    async fn ask_to_take(
        self: &Arc<Self>,
        live: &Arc<Live>,
        pool: PoolId,
        personal: &Personal,
        next: &Sandbox,
        key: Option<&HeldKey>,
    ) -> Result<TakenOver, StoreError> {
        let owner = Owner { tenant: next.tenant.clone(), principal: next.principal.clone() };
        let Some(launched) = live.launched() else { return Ok(TakenOver::Gone) };
        let asked = asked(&next.limits, Some(personal.ttl_ms));
        let (network, isolation) = words(next);
        let take = TakeOver {
            id: next.id,
            hold: live.hold(),
            pool,
            owner: &owner,
            personal,
            expires_at: next.expires_at,
            started: (at_us(launched.started_at_us), launched.fences),
            waited_ms: next.waited_ms(),
            at: next.created_at,
            asked: &asked,
            network,
            isolation,
            defaults: &self.tenancy.defaults,
            key,
        };
        let took = self.store.take_member(take).await;
        if !took.as_ref().is_err_and(StoreError::is_unclear) {
            return took;
        }
        // The connection may have broken between the commit and its answer: the row tells, and nobody else changes it.
        // The statement may be under way still.
        self.until_heard(next.id, || self.store.settled(next.id)).await;
        let row = self.until_heard(next.id, || self.store.find(&next.tenant, next.id)).await;
        match row {
            Some(row) if row.kind == Kind::Sandbox && row.claims == next.claims => Ok(TakenOver::Yes { weight: 1 }),
            Some(row) if row.kind == Kind::Pooled => took,
            Some(_) | None => Ok(TakenOver::Gone),
        }
    }

    /// How a sandbox that waits was launched, if it can still be taken. Whoever asks has its turn.
    fn launched_member(&self, live: &Arc<Live>) -> Option<Launched> {
        let waits = live.sandbox.kind == Kind::Pooled && self.live.is_current(live) && live.ordered_kill().is_none();
        match live.progress() {
            Progress::Running(launched) if waits => Some(launched),
            Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) | Progress::Ended(_) | Progress::Gone => {
                None
            }
        }
    }

    /// Its limit of real time begins now: the keeper counts from the start.
    async fn begin_wall(&self, live: &Live, waited_ms: u64) -> Result<(), CallError> {
        let Some(wall_ms) = live.sandbox.limits.wall_ms() else { return Ok(()) };
        let limits = NewLimits { wall_ms: NewTime::Ms(wall_ms.saturating_add(waited_ms)), ..NewLimits::default() };
        self.in_time(self.keeper.update(live.sandbox.id, limits)).await
    }

    /// It has none any more, or is not kept.
    pub(super) async fn end_wall(&self, live: &Live) {
        if live.sandbox.limits.wall_ms().is_none() {
            return;
        }
        let limits = NewLimits { wall_ms: NewTime::Unlimited, ..NewLimits::default() };
        if self.in_time(self.keeper.update(live.sandbox.id, limits)).await.is_err() {
            self.kill(live, KillReason::Evicted).await;
        }
    }

    /// What waited is a sandbox like every other from now on, followed as such.
    fn hand_over_member(self: &Arc<Self>, live: &Arc<Live>, next: Sandbox, owner: &Owner, weight: u32, launched: Launched) -> Sandbox {
        let id = next.id;
        self.pools.taken(id);
        let sandbox = next.clone();
        let taken = self.live.taken(live, next, launched);
        let mut reservation = live.take_room().unwrap_or_else(|| self.capacity.reserve_for_live(room_of(&sandbox.limits)));
        reservation.count_for(owner, weight);
        taken.give_room(reservation);
        live.release();
        tokio::spawn(Arc::clone(self).follow_taken(taken));
        sandbox
    }

    /// Ends one that waits, so that nobody takes it any more. One that is somebody's by now is left alone.
    pub(super) async fn give_up_member(&self, live: &Arc<Live>) {
        // Whoever has the turn for longer is about to take it, or stores its end.
        let Ok(_turn) = tokio::time::timeout(ROOM_PATIENCE, live.turn()).await else { return };
        if self.live.is_current(live) && live.sandbox.kind == Kind::Pooled {
            self.pools.not_ready(live.sandbox.id);
            self.kill(live, KillReason::Evicted).await;
        }
    }

    /// Room for this, if it is free or can be made so by giving up what waits.
    pub(super) async fn reserve(self: &Arc<Self>, room: Room) -> Option<Reservation> {
        if let Some(reservation) = self.capacity.reserve(room) {
            return Some(reservation);
        }
        let deadline = Instant::now() + ROOM_PATIENCE;
        while self.can_make(room) {
            let victim = self.next_to_give_up()?;
            self.pools.room_is_needed();
            self.give_up_member(&victim).await;
            self.metrics.pool_given_up();
            let mut followed = Followed::new(victim);
            drop(tokio::time::timeout_at(deadline, followed.ended()).await);
            if let Some(reservation) = self.capacity.reserve(room) {
                return Some(reservation);
            }
            if Instant::now() >= deadline {
                return None;
            }
        }
        None
    }

    /// Gives up what waits until the first of those in the queue would find room, and as much as that takes at once.
    pub(super) async fn make_room_for(&self, room: Room) {
        let mut freed = Room::default();
        while !self.capacity.would_hold(room, freed) && self.can_make(room) {
            let Some(victim) = self.next_to_give_up() else { return };
            self.pools.room_is_needed();
            freed = freed.plus(room_of(&victim.limits()));
            self.give_up_member(&victim).await;
            self.metrics.pool_given_up();
        }
    }

    /// Whether there is none for this, and would be without what waits.
    pub(super) fn would_make_room_for(&self, room: Room) -> bool {
        !self.capacity.would_hold(room, Room::default()) && self.can_make(room)
    }

    /// Whether there is room for this once all that waits is gone.
    fn can_make(&self, room: Room) -> bool {
        let all = self.waiting_members().iter().fold(Room::default(), |sum, live| sum.plus(room_of(&live.limits())));
        all != Room::default() && self.capacity.would_hold(room, all)
    }

    /// What waits here and is not to end yet.
    fn waiting_members(&self) -> Vec<Arc<Live>> {
        let mut all = self.members();
        all.retain(|live| live.ordered_kill().is_none() && !matches!(live.progress(), Progress::Ended(_) | Progress::Gone));
        all
    }

    pub(super) fn members(&self) -> Vec<Arc<Live>> {
        let mut all = self.live.all();
        all.retain(|live| live.sandbox.kind == Kind::Pooled);
        all
    }

    /// The youngest: it costs the least to have it again. First what is not ready.
    fn next_to_give_up(&self) -> Option<Arc<Live>> {
        let mut all = self.waiting_members();
        all.sort_by_key(|live| (self.pools.is_ready(live.sandbox.id), std::cmp::Reverse(live.sandbox.id)));
        all.into_iter().next()
    }
}

/// What one that waited is once it is theirs.
fn owned(
    member: &Sandbox,
    owner: &Owner,
    personal: &Personal,
    (now, launched, waited_ms): (OffsetDateTime, Launched, u64),
    pool: String,
) -> Sandbox {
    let Personal { name, labels, ttl_ms, idle_timeout_ms } = personal.clone();
    Sandbox {
        kind: Kind::Sandbox,
        principal: owner.principal.clone(),
        state: State::Running,
        name,
        labels,
        ttl_ms,
        expires_at: ttl_ms.map(|ms| now + Duration::from_millis(ms)),
        idle_timeout_ms,
        created_at: now,
        claimed_at: Some(now),
        started_at: Some(at_us(launched.started_at_us)),
        fences: Some(launched.fences),
        claims: member.claims + 1,
        from_pool: Some(FromPool { name: pool, waited_ms }),
        ..member.clone()
    }
}

/// Its network and its isolation, as quotas name them.
const fn words(sandbox: &Sandbox) -> (&'static str, &'static str) {
    let isolation = match sandbox.program.isolation {
        sandbox_core::protocol::Isolation::Container => "container",
        sandbox_core::protocol::Isolation::Gvisor => "gvisor",
    };
    ("none", isolation)
}
