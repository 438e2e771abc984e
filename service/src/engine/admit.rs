//! The way in: from what somebody asks for to a sandbox that is stored, and carried or queued. One transaction where nothing is in the way.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sandbox_core::{fail_point, protocol::Hello};
use uuid::Uuid;

use super::{Engine, EngineError, Followed, Owner, capacity::Room, input};
use crate::{
    sandbox::{
        Compile, ImageUsed, Invalid, Kind, Limits, NewCase, NewSandbox, Program, Quotas, Sandbox, SandboxId, State, TenantId, WhenFull,
        asked, asked_of_steps, defaults_within,
    },
    store::{Admission, Admitted, HeldKey, Image, Input, Lease, NodeId, Promise, Standing, StoreError},
};

/// How long a request waits for a keeper that is away.
const KEEPER_PATIENCE: Duration = Duration::from_secs(1);

/// What references named when they were last looked up. Only a guess: the statement that inserts a sandbox checks it.
#[derive(Debug, Default)]
pub(super) struct KnownImages(Mutex<HashMap<(TenantId, String), Arc<Image>>>);

impl KnownImages {
    /// More are not kept at one time.
    const MAX: usize = 1024;

    fn get(&self, tenant: &TenantId, reference: &str) -> Option<Arc<Image>> {
        self.lock().get(&(tenant.clone(), reference.to_owned())).cloned()
    }

    fn learn(&self, tenant: &TenantId, image: &Arc<Image>) {
        let mut known = self.lock();
        if known.len() >= Self::MAX {
            known.clear();
        }
        known.insert((tenant.clone(), image.reference.clone()), Arc::clone(image));
    }

    fn forget(&self, tenant: &TenantId, reference: &str) {
        self.lock().remove(&(tenant.clone(), reference.to_owned()));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(TenantId, String), Arc<Image>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sandboxes that are being put into the queue: they may stand there already, but whoever asked for them has not been told so, and may yet be
/// told that they were not made. This node claims none of them.
#[derive(Debug, Default)]
pub(super) struct Undecided(Mutex<HashSet<SandboxId>>);

impl Undecided {
    fn insert(&self, id: SandboxId) {
        self.lock().insert(id);
    }

    pub(super) fn remove(&self, id: SandboxId) {
        self.lock().remove(&id);
    }

    pub(super) fn contains(&self, id: SandboxId) -> bool {
        self.lock().contains(&id)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<SandboxId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a sandbox is to be made.
#[derive(Debug, Clone, Default)]
pub struct Making {
    /// The key of its request, which must be held.
    pub key: Option<HeldKey>,
    /// What it is called, where another node may have made it under that already.
    pub id: Option<SandboxId>,
    /// At once, or not at all: another node offers it, and sees to it otherwise.
    pub is_offered: bool,
    /// When it is told of.
    pub promise: Promise,
}

impl From<Option<HeldKey>> for Making {
    fn from(key: Option<HeldKey>) -> Self {
        Self { key, ..Self::default() }
    }
}

/// What is in the way of a sandbox, and may be out of it at the next attempt.
enum Obstacle {
    ImageMoved,
    /// The next attempt says which.
    VolumeGone,
    Unknown,
    /// Nobody asked for a limit as large as its default: with these it will do.
    DefaultTooLarge(Box<NewSandbox>),
}

impl Engine {
    pub(super) async fn admit(self: Arc<Self>, owner: Owner, mut asked: NewSandbox, how: Making) -> Result<Followed, EngineError> {
        /// Each obstacle may be met once, and once more if others move images at the same time.
        const ATTEMPTS: u32 = 6;
        let cases = std::mem::take(&mut asked.cases);
        let input = input::encode(&std::mem::take(&mut asked.files), asked.stdin.take());
        let mut input = Some(input);
        for _ in 0..ATTEMPTS {
            match self.try_to_admit(&owner, &asked, &how, (&cases, &mut input)).await? {
                Ok(followed) => return Ok(followed),
                Err(Obstacle::VolumeGone) => {}
                Err(Obstacle::ImageMoved) => self.images.forget(&owner.tenant, asked.image.as_str()),
                Err(Obstacle::Unknown) => self.introduce(&owner).await?,
                Err(Obstacle::DefaultTooLarge(less)) => asked = *less,
            }
        }
        Err(EngineError::ImageNotFound(asked.image.as_str().to_owned()))
    }

    async fn try_to_admit(
        self: &Arc<Self>,
        owner: &Owner,
        asked: &NewSandbox,
        how: &Making,
        (cases, input): (&[NewCase], &mut Option<Input>),
    ) -> Result<Result<Followed, Obstacle>, EngineError> {
        let key = how.key.as_ref();
        let created_at = self.clock.now();
        let image = self.image(&owner.tenant, asked.image.as_str()).await?;
        let image_found_at = self.clock.now();
        if let Some(why) = self.hindrance().filter(|_| how.is_offered) {
            return Err(EngineError::Engaged(why));
        }
        // One that is upgraded is away for a moment.
        let keeper = tokio::time::timeout(KEEPER_PATIENCE, self.keeper.connected()).await.ok();
        let keeper = keeper.filter(|_| !self.stopping.is_cancelled()).ok_or(EngineError::KeeperUnavailable)?;
        if how.is_offered {
            self.check_offer(&image, &keeper, asked).await?;
        }
        if !keeper.isolation.contains(&asked.isolation) {
            return Err(Invalid::new("isolation", "this node does not offer it: `mayfly doctor` there says what is missing").into());
        }
        let (mounts, wanted_node) = self.mounts(&owner.tenant, &asked.volumes).await?;
        let compile = asked.compile.as_ref().map(|step| {
            let program = Program { volumes: mounts.clone(), ..Program::of_step(&image.config, asked, step)? };
            Ok::<_, Invalid>(Box::new(Compile { program, limits: step.limits, end: None }))
        });
        let sandbox = Sandbox {
            id: how.id.unwrap_or_else(|| SandboxId(Uuid::now_v7())),
            tenant: owner.tenant.clone(),
            principal: owner.principal.clone(),
            kind: asked.kind,
            state: State::Starting,
            name: asked.name.clone(),
            image: ImageUsed { reference: image.reference.clone(), digest: image.digest.clone(), root: image.root.clone() },
            compile: compile.transpose()?,
            judging: asked.judging,
            program: Program { volumes: mounts, ..Program::resolve(&image.config, asked)? },
            limits: asked.limits,
            output_policy: asked.output_policy,
            labels: asked.labels.clone(),
            created_at,
            claimed_at: Some(image_found_at),
            started_at: None,
            fences: None,
            finished_at: None,
            ttl_ms: asked.ttl_ms,
            expires_at: asked.ttl_ms.map(|ms| created_at + Duration::from_millis(ms)),
            idle_timeout_ms: asked.idle_timeout_ms,
            auto_remove: asked.auto_remove,
            keep_layer: asked.keep_layer,
            starts: 1,
            outcome: None,
            attempt: 1,
            retries_left: asked.retries,
            claims: 1,
            keeps_input: true,
            from_pool: None,
        };
        let room = Room { memory_bytes: sandbox.memory_bytes(), cpu_millis: sandbox.cpu_millis(), sandboxes: 1 };
        self.capacity.could_hold(room).map_err(if how.is_offered { EngineError::Declined } else { EngineError::NoCapacity })?;
        let image_took = (image_found_at - created_at).unsigned_abs();

        let empty = Input::default();
        let lease = self.lease();
        let hindrance = self.hindrance();
        let is_for_here = wanted_node.is_none_or(|node| node == self.node);
        if is_for_here
            && hindrance.is_none()
            && !self.has_queue()
            && let Some(mut reservation) = self.reserve(room).await
        {
            let answer = self
                .ask_store((&sandbox, wanted_node), lease, asked, (key, how.promise), (cases, input.as_ref().unwrap_or(&empty)))
                .await?;
            if let Admitted::Yes { weight } = answer {
                fail_point::reached("service.admit.claimed");
                reservation.count_for(owner, weight);
                let live = self.live.insert(sandbox, lease, image_took);
                if how.promise == Promise::Now {
                    live.note_kept();
                }
                let input = input.take().unwrap_or_default();
                tokio::spawn(Arc::clone(self).carry(Arc::clone(&live), input, reservation));
                return Ok(Ok(Followed::new(live)));
            }
            if answer != Admitted::Behind {
                return refuse(answer, asked).map(Err);
            }
        }
        if how.is_offered {
            return Err(EngineError::Engaged("it would have to wait here".to_owned()));
        }
        if asked.when_full == WhenFull::Refuse {
            return Err(EngineError::Busy(hindrance.unwrap_or_else(|| "there is no room now, and it is not to wait".to_owned())));
        }
        let queued = Sandbox { state: State::Queued, claimed_at: None, claims: 0, ..sandbox };
        // Known before it can be claimed, so that whoever claims it finds those who wait for it; and before that, that it has no row yet.
        self.undecided.insert(queued.id);
        let live = self.live.insert(queued.clone(), lease, image_took);
        let answer =
            self.ask_store((&queued, wanted_node), lease, asked, (key, Promise::Now), (cases, input.as_ref().unwrap_or(&empty))).await;
        if !matches!(answer, Ok(Admitted::Yes { .. })) {
            self.live.remove(queued.id);
            return refuse(answer?, asked).map(Err);
        }
        live.note_kept();
        fail_point::reached("service.admit.queued");
        self.note_queue();
        Ok(Ok(Followed::new(live)))
    }

    async fn ask_store(
        self: &Arc<Self>,
        (sandbox, wanted_node): (&Sandbox, Option<NodeId>),
        lease: Lease,
        new: &NewSandbox,
        (key, promise): (Option<&HeldKey>, Promise),
        (cases, input): (&[NewCase], &Input),
    ) -> Result<Admitted, EngineError> {
        let asked = match new.kind {
            Kind::Run => asked_of_steps(&sandbox.limits, sandbox.compile.as_ref().map(|step| &step.limits)),
            Kind::Sandbox | Kind::Pooled => asked(&sandbox.limits, Some(new.ttl_ms)),
        };
        let admission = Admission {
            sandbox,
            lease,
            input,
            cases,
            asked: &asked,
            network: new.network(),
            isolation: new.isolation(),
            defaults: &self.tenancy.defaults,
            queue_max: self.tenancy.queue_max,
            wanted_node,
            key,
            promise,
        };
        self.undecided.insert(sandbox.id);
        let answer = self.store.admit(admission).await;
        if answer.as_ref().is_err_and(StoreError::is_unclear) {
            // The connection may have broken between the commit and its answer.
            self.settle_unclear(sandbox.clone(), lease, key.cloned());
        } else {
            self.undecided.remove(sandbox.id);
        }
        Ok(answer?)
    }

    /// Whether this node could begin at once what another one offers it: else that one does it, and nothing is lost by the offer.
    async fn check_offer(&self, image: &Image, keeper: &Hello, asked: &NewSandbox) -> Result<(), EngineError> {
        if !keeper.isolation.contains(&asked.isolation) {
            return Err(EngineError::Declined("this isolation is not offered here".to_owned()));
        }
        let roots = tokio::time::timeout(KEEPER_PATIENCE, self.keeper.images()).await;
        match roots {
            Ok(Ok(roots)) if roots.contains(&image.root) => Ok(()),
            Ok(_) | Err(_) => Err(EngineError::Declined("the image is not here".to_owned())),
        }
    }

    /// What the tenant means by this reference; the same as at the last time unless [`KnownImages::forget`] was told otherwise.
    async fn image(&self, tenant: &TenantId, reference: &str) -> Result<Arc<Image>, EngineError> {
        let known = self.images.get(tenant, reference);
        self.metrics.image_looked_up(known.is_some());
        if let Some(known) = known {
            return Ok(known);
        }
        let found = self.store.find_image(tenant, reference).await?;
        let image = Arc::new(found.ok_or_else(|| EngineError::ImageNotFound(reference.to_owned()))?);
        self.images.learn(tenant, &image);
        Ok(image)
    }

    /// Whether somebody with a valid token may do anything; a tenant that was never seen may, where tenants need no registration.
    pub async fn check_standing(&self, owner: &Owner, is_admin: bool) -> Result<(), EngineError> {
        match self.store.standing(owner).await? {
            Standing::Good => Ok(()),
            Standing::Suspended => Err(EngineError::Suspended),
            // Somebody must be able to register the first.
            Standing::Unknown if is_admin => Ok(self.store.introduce(owner, self.clock.now()).await?),
            Standing::Unknown => self.introduce(owner).await,
        }
    }

    pub(super) async fn introduce(&self, owner: &Owner) -> Result<(), EngineError> {
        if self.tenancy.is_registered_only && self.store.standing(owner).await? == Standing::Unknown {
            return Err(EngineError::UnknownTenant);
        }
        Ok(self.store.introduce(owner, self.clock.now()).await?)
    }
}

/// What is to be done about a sandbox that was not let in, or what its creator hears.
fn refuse(refused: Admitted, asked: &NewSandbox) -> Result<Obstacle, EngineError> {
    match refused {
        Admitted::ImageMoved => Ok(Obstacle::ImageMoved),
        Admitted::VolumeGone => Ok(Obstacle::VolumeGone),
        Admitted::Unknown => Ok(Obstacle::Unknown),
        Admitted::Suspended => Err(EngineError::Suspended),
        Admitted::KeyLost => Err(EngineError::KeyLost),
        Admitted::QueueFull => Err(EngineError::Busy("there is no room now, and as many wait as may".to_owned())),
        Admitted::Exceeded(exceeded, quotas) => {
            // What is asked for is too much, or nothing is as little as the quota.
            let less = with_defaults_within(asked, &quotas).ok_or_else(|| EngineError::QuotaExceeded(Box::new(exceeded)))?;
            Ok(Obstacle::DefaultTooLarge(Box::new(less)))
        }
        // Neither is an answer to one that is to wait, nor a refusal.
        Admitted::Yes { .. } | Admitted::Behind => Err(EngineError::Busy("there is no room now".to_owned())),
    }
}

/// The same with lower limits where none were asked for, so that these quotas permit the defaults. `None`: that changes nothing, or cannot be.
fn with_defaults_within(asked: &NewSandbox, quotas: &Quotas) -> Option<NewSandbox> {
    let mut less = asked.clone();
    less.requested = defaults_within(asked.requested, &asked.limits, quotas);
    let step = less.compile.as_mut().map(|step| {
        step.requested = defaults_within(step.requested, &step.limits, quotas);
        step.requested.or(step.defaults)
    });
    let (limits, step_limits) = match asked.kind {
        Kind::Run => Limits::of_steps(less.requested.or(less.defaults), step).ok()?,
        Kind::Sandbox | Kind::Pooled => (Limits::of(asked.kind, less.requested.or(less.defaults)).ok()?, None),
    };
    less.limits = limits;
    if let Some((step, limits)) = less.compile.as_mut().zip(step_limits) {
        step.limits = limits;
    }
    (less != *asked).then_some(less)
}
