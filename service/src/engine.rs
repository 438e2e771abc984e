//! What can be done to a sandbox: admit, schedule, follow, end, recover. Speaks no HTTP.

mod admit;
mod capacity;
mod carry;
mod cases;
mod compile;
mod crowd;
mod exec;
mod fair;
mod files;
mod follow;
mod input;
mod kept;
mod lease;
mod life;
mod live;
mod output;
mod peers;
mod pool;
mod pressure;
mod queue;
mod recovery;
mod settle;
mod start;
mod stdin;
mod update;
mod upkeep;
mod volume;
mod wait;
mod watch;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub use crate::{sandbox::Owner, store::Promise};
pub use admit::Making;
use anyhow::Context as _;
use capacity::{Capacity, Room};
pub use exec::{ExecFinished, ExecProgress, FollowedExec};
pub use follow::{Followed, Followup, LogQuery, LogStream};
use lease::{Identity, Tenure};
pub use live::{Finished, Progress};
use live::{Live, Registry};
pub use output::{Output, Shown};
use pressure::Pressure;
pub use pressure::Reserves;
use sandbox_core::{fail_point, protocol::KillReason};
pub use stdin::{InputFault, OpenInput};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
pub use wait::{Until, Waited};
pub use watch::{FileWatch, FileWatchEnd, WatchError, Watched};

use crate::{
    clock::Clock,
    logs::Logs,
    metrics::Metrics,
    runtime::{CallError, Keeper},
    sandbox::{DefaultQuotas, Event, Exceeded, Invalid, Kind, NewSandbox, Sandbox, SandboxId, State, TenantId},
    store::{Act, Filter, NodeCapacity, NodeId, PeerDoor, Store, StoreError},
};

/// How long a new sandbox is waited for before its creator hears that it is still starting.
pub const START_PATIENCE: Duration = Duration::from_secs(10);

/// What an engine is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Names this node for good.
    pub node: NodeId,
    /// For people.
    pub node_name: String,
    /// How long this node counts as alive without being heard of.
    pub lease: Duration,
    /// Where other nodes reach it; `None`: nowhere, and it reaches none.
    pub peer_address: Option<String>,
    /// Whether a keeper that went away may come back: it is not ours.
    pub does_keeper_return: bool,
    pub data_dir: PathBuf,
    /// Where the keeper writes logs.
    pub logs_dir: PathBuf,
    pub reserves: Reserves,
    /// The most that the limits of this node's live sandboxes may come to.
    pub capacity_memory_bytes: u64,
    pub capacity_cpu_millis: u64,
    pub tenancy: Tenancy,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
}

/// What holds for all tenants of this node.
#[derive(Debug, Clone)]
pub struct Tenancy {
    /// Whether a tenant must be registered before it may come.
    pub is_registered_only: bool,
    pub defaults: DefaultQuotas,
    /// The most that may wait, all tenants' together.
    pub queue_max: u64,
    /// How long ended sandboxes and runs are kept, and how long events.
    pub retention: Duration,
    pub event_retention: Duration,
}

/// The owner of every sandbox of this node that has not ended.
#[derive(Debug)]
pub struct Engine {
    store: Store,
    keeper: Keeper,
    logs: Logs,
    clock: Clock,
    metrics: Arc<Metrics>,
    node: NodeId,
    tenure: Tenure,
    pressure: Pressure,
    does_keeper_return: bool,
    capacity: Arc<Capacity>,
    live: Registry,
    execs: exec::Execs,
    inputs: stdin::Inputs,
    waits: wait::Waits,
    watches: watch::Watches,
    /// The room of layers that are kept here of what has ended.
    kept: kept::KeptRooms,
    /// Volumes that are being made.
    making: volume::Making,
    /// What is kept ready, and what of it waits here.
    pools: pool::Pools,
    /// Wakes the scheduler.
    wake: Arc<Notify>,
    /// Wakes who renews the lease: what is wanted of this node has changed.
    renewal: Notify,
    /// Whether something waits in the queue, as far as this node knows.
    has_queue: Arc<AtomicBool>,
    /// Takes no more work, and serves on until what there is has come to its end.
    is_draining: AtomicBool,
    /// Takes no more work, and lets what there is come to its end.
    closing: CancellationToken,
    /// What lives goes on without us.
    is_handed_over: AtomicBool,
    stopping: CancellationToken,
    /// The lease is let go.
    over: CancellationToken,
    tenancy: Tenancy,
    peers: peers::Peers,
    images: admit::KnownImages,
    undecided: admit::Undecided,
}

/// Why a sandbox was not made, or could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("there is no image {0}")]
    ImageNotFound(String),
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// It is larger than the node.
    #[error("{0}")]
    NoCapacity(String),
    /// There is no room now, and it may not wait.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    QuotaExceeded(Box<Exceeded>),
    #[error("the tenant or the principal is suspended")]
    Suspended,
    #[error("the tenant is not registered here")]
    UnknownTenant,
    #[error("the name is taken")]
    NameTaken,
    #[error("there is a pool {0}")]
    PoolExists(String),
    /// It is in this state, in which that cannot be done to it.
    #[error("it is {}", .0.as_str())]
    WrongState(State),
    /// As it is now, that cannot be done to it.
    #[error("{0}")]
    Refused(String),
    #[error("what it wrote is not kept any more")]
    LayerLost,
    #[error("there is no volume {0}")]
    VolumeNotFound(String),
    #[error("{0}")]
    VolumeInUse(String),
    /// It is on a node that cannot do what is asked for.
    #[error("{0}")]
    VolumeElsewhere(String),
    /// Another attempt at the same request goes on with it.
    #[error("the key of this request is held by another attempt")]
    KeyLost,
    /// Another node made it, which was thought not to have.
    #[error("it is made already")]
    MadeAlready,
    /// Another node offered it, and this one does not take it.
    #[error("{0}")]
    Declined(String),
    /// It was offered by another node, and there is no room for it here now.
    #[error("{0}")]
    Engaged(String),
    /// It must not be done twice, and may have been done.
    #[error("nobody heard whether it was done")]
    OutcomeUnknown,
    #[error("the keeper of this node is not available")]
    KeeperUnavailable,
    #[error(transparent)]
    Store(StoreError),
}

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NameTaken => Self::NameTaken,
            StoreError::MadeAlready => Self::MadeAlready,
            StoreError::Unreached(_)
            | StoreError::Unavailable(_)
            | StoreError::ZeroByte
            | StoreError::Damaged(_)
            | StoreError::Other(_) => Self::Store(error),
        }
    }
}

impl Engine {
    /// Takes over what this node left behind — lives on with what lives, settles what ended — and begins to schedule.
    pub async fn start(store: Store, keeper: Keeper, settings: Settings) -> anyhow::Result<Arc<Self>> {
        let Settings { node, node_name, lease, data_dir, logs_dir, capacity_memory_bytes, capacity_cpu_millis, clock, metrics, .. } =
            settings;
        let door = settings.peer_address.map(|address| PeerDoor { address, key: peers::new_key() });
        let hello = keeper.connected().await;
        let capacity = NodeCapacity { memory_bytes: capacity_memory_bytes, cpu_millis: capacity_cpu_millis };
        let identity = Identity { node, name: node_name, capacity, held_for: lease, door };
        let tenure = Tenure::begin(&store, identity, clock.now()).await.context("taking this node's lease failed")?;
        let total =
            Room { memory_bytes: capacity_memory_bytes, cpu_millis: capacity_cpu_millis, sandboxes: u64::from(hello.sandboxes_max) };
        let (wake, has_queue) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(true)));
        let freed = {
            let (wake, has_queue) = (Arc::clone(&wake), Arc::clone(&has_queue));
            move || {
                if has_queue.load(Ordering::SeqCst) {
                    wake.notify_one();
                }
            }
        };
        let engine = Arc::new(Self {
            logs: Logs::new(&logs_dir)?,
            capacity: Capacity::new(total, Arc::clone(&metrics), freed),
            live: Registry::new(Arc::clone(&metrics)),
            execs: exec::Execs::default(),
            inputs: stdin::Inputs::default(),
            waits: wait::Waits::default(),
            watches: watch::Watches::default(),
            kept: kept::KeptRooms::default(),
            making: volume::Making::default(),
            pools: pool::Pools::default(),
            store,
            keeper,
            clock,
            metrics,
            node,
            tenure,
            pressure: Pressure::new(settings.reserves, data_dir),
            does_keeper_return: settings.does_keeper_return,
            wake,
            renewal: Notify::new(),
            has_queue,
            is_draining: AtomicBool::new(false),
            closing: CancellationToken::new(),
            is_handed_over: AtomicBool::new(false),
            stopping: CancellationToken::new(),
            over: CancellationToken::new(),
            tenancy: settings.tenancy,
            peers: peers::Peers::default(),
            images: admit::KnownImages::default(),
            undecided: admit::Undecided::default(),
        });
        engine.pressure.look();
        tokio::spawn(Arc::clone(&engine).hold_lease());
        tokio::spawn(Arc::clone(&engine).settle_dead_nodes());
        engine.recover().await?;
        tokio::spawn(Arc::clone(&engine).schedule());
        tokio::spawn(Arc::clone(&engine).keep_house());
        tokio::spawn(Arc::clone(&engine).tend_pools());
        Ok(engine)
    }

    /// Makes a sandbox and starts it, now or when there is room. What was promised by the answer is in Postgres; a caller who goes away
    /// changes nothing. With a key it is made only if that is still held, and is tied to it from then on. What is promised later is told of only with its stored end, or behind
    /// [`Engine::keep`].
    pub async fn create(self: &Arc<Self>, owner: Owner, asked: NewSandbox, how: Making) -> Result<Followed, EngineError> {
        let engine = Arc::clone(self);
        // In a task of its own: a request that is given up between commit and launch would leave a sandbox that nobody starts.
        let created = tokio::spawn(async move { engine.admit(owner, asked, how).await }.in_current_span());
        match created.await {
            Ok(created) => created,
            Err(panic) => Err(EngineError::Store(StoreError::Other(panic.into()))),
        }
    }

    /// Returns when this one can be told of. A crash of the database may have lost what was to be promised later: then nobody can say how far it came.
    pub async fn keep(&self, followed: &Followed) -> Result<(), EngineError> {
        /// How long a database that is away is waited for.
        const PATIENCE: Duration = Duration::from_secs(5);
        const PAUSE: Duration = Duration::from_millis(100);
        if followed.is_kept() {
            return Ok(());
        }
        let asked = async {
            loop {
                match self.store.keep(followed.id()).await {
                    Ok(is_kept) => return is_kept,
                    Err(error) => tracing::debug!(sandbox.id = %followed.id(), %error, "whether it is kept is asked again"),
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        if tokio::time::timeout(PATIENCE, asked).await == Ok(true) {
            return Ok(());
        }
        tracing::error!(sandbox.id = %followed.id(), "a run that was begun is lost, or may be");
        Err(EngineError::OutcomeUnknown)
    }

    /// [`Engine::create`], and then the sandbox as it is when it runs, has failed to, or has kept its creator waiting for long enough.
    pub async fn create_and_start(self: &Arc<Self>, owner: Owner, asked: NewSandbox, how: Making) -> Result<Sandbox, EngineError> {
        let mut followed = self.create(owner, asked, how).await?;
        let started = followed.until(|progress| !matches!(progress, Progress::Starting));
        // Too late is an answer too: the state says so.
        drop(tokio::time::timeout(START_PATIENCE, started).await);
        Ok(followed.sandbox())
    }

    /// The tenant's sandbox of this kind as it is now.
    pub async fn find(&self, tenant: &TenantId, kind: Kind, id: SandboxId) -> Result<Option<Sandbox>, EngineError> {
        Ok(self.find_any(tenant, id).await?.filter(|sandbox| sandbox.kind == kind))
    }

    /// The tenant's sandbox or run as it is now, not what waits in a pool. What this node knows of a live one is newer than its row.
    pub async fn find_any(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Sandbox>, EngineError> {
        if let Some(live) = self.live.get(id)
            && live.sandbox.tenant == *tenant
            && !matches!(live.progress(), Progress::Queued)
        {
            return Ok(Some(live.now()).filter(is_somebodys));
        }
        Ok(self.store.find(tenant, id).await?.filter(is_somebodys))
    }

    /// Those of these that are runs of the tenant's, as they are now, in no order.
    pub async fn runs(&self, tenant: &TenantId, ids: &[SandboxId]) -> Result<Vec<Sandbox>, EngineError> {
        let mut runs = self.store.runs(tenant, ids).await?;
        for run in &mut runs {
            if let Some(live) = self.live.get(run.id)
                && !matches!(live.progress(), Progress::Queued)
            {
                *run = live.now();
            }
        }
        Ok(runs)
    }

    /// How many are started up to this one, if it waits. An estimate, and no reason to fail an answer: who hears of a failure believes that
    /// nothing was made.
    pub async fn queue_position(&self, sandbox: &Sandbox) -> Option<u64> {
        if sandbox.state != State::Queued {
            return None;
        }
        let position = self.store.queue_position(sandbox.id).await;
        position.unwrap_or_else(|error| {
            tracing::warn!(sandbox.id = %sandbox.id, %error, "its place in the queue is not known");
            None
        })
    }

    /// What a tenant and a principal have where nothing of their own is set.
    pub const fn default_quotas(&self) -> &DefaultQuotas {
        &self.tenancy.defaults
    }

    /// The tenant's long-lived sandboxes, newest first.
    pub async fn list(&self, tenant: &TenantId, filter: &Filter) -> Result<Vec<Sandbox>, EngineError> {
        let mut sandboxes = self.store.list(tenant, filter).await?;
        for sandbox in &mut sandboxes {
            // What the row says of the end is final; of a live one this node knows better.
            if matches!(sandbox.state, State::Starting | State::Running | State::Paused)
                && let Some(live) = self.live.get(sandbox.id)
            {
                *sandbox = live.now();
            }
        }
        Ok(sandboxes)
    }

    /// Ends the tenant's long-lived sandbox if it lives, and removes it. False if there is none.
    pub async fn delete(self: &Arc<Self>, owner: &Owner, id: SandboxId) -> Result<bool, EngineError> {
        /// Between two orders to end it, should the first have been lost with the connection.
        const REPEAT: Duration = Duration::from_secs(1);
        const ATTEMPTS: u32 = 20;
        let tenant = &owner.tenant;
        let mut is_told = false;
        for _ in 0..ATTEMPTS {
            let act = Act { actor: Some(owner), at: self.clock.now(), data: serde_json::json!({}) };
            let exec_logs = self.store.exec_logs_of(id).await?;
            // Until the row is gone: nobody begins another life in between.
            let turn = self.give_up_layer(tenant, id).await?;
            if let Some(deleted) = self.store.delete(tenant, id, &act).await? {
                self.live.remove(id);
                for exec in exec_logs {
                    tokio::spawn(Arc::clone(self).forget_log(exec));
                }
                fail_point::reached("service.delete.stored");
                if deleted.has_log_file {
                    tokio::spawn(Arc::clone(self).forget_log(id));
                }
                return Ok(true);
            }
            drop(turn);
            let Some(sandbox) = self.find(tenant, Kind::Sandbox, id).await? else { return Ok(false) };
            // What another node has is not ended from here.
            match self.live.get(id).filter(|live| !matches!(live.progress(), Progress::Queued)) {
                Some(live) => {
                    if !std::mem::replace(&mut is_told, true) {
                        self.store.tell_of_sandbox(tenant, id, "sandbox.killed", &act).await?;
                        fail_point::reached("service.delete.told");
                    }
                    self.kill(&live, KillReason::StoppedByUser).await;
                    fail_point::reached("service.delete.ordered");
                    let mut followed = Followed::new(live);
                    drop(tokio::time::timeout(REPEAT, followed.ended()).await);
                }
                // Its end is being stored, or it was just taken from the queue.
                None if !sandbox.state.is_final() => tokio::time::sleep(REPEAT / 20).await,
                None => {}
            }
        }
        Err(EngineError::KeeperUnavailable)
    }

    /// Returns when [`Engine::stop`] was called.
    pub async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// Whether new sandboxes can be made here: the keeper is there, and nobody drains the node or stops the service.
    pub fn is_ready(&self) -> bool {
        let is_ending = self.is_draining() || self.is_closing() || self.stopping.is_cancelled();
        self.keeper.hello().is_some() && !is_ending && !self.tenure.orders().is_drained
    }

    /// Whether this service will stop when nothing lives here any more.
    fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::SeqCst)
    }

    /// Whether this service is about to stop.
    pub fn is_closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// Returns when this service is about to stop.
    pub async fn closing(&self) {
        self.closing.cancelled().await;
    }

    /// Whether what lives goes on, without this service.
    pub fn is_handed_over(&self) -> bool {
        self.is_handed_over.load(Ordering::SeqCst)
    }

    /// Takes no more work, and leaves everything else as it is. Returns when nothing lives here any more, or `deadline` is over.
    pub async fn drain(&self, deadline: Duration) {
        self.is_draining.store(true, Ordering::SeqCst);
        // Who needs longer is treated as one that lives when a service stops.
        drop(tokio::time::timeout(deadline, self.ended(|_| true)).await);
    }

    /// Takes no more work. Returns when every run has ended, or `deadline` is over.
    pub async fn close(&self, deadline: Duration) {
        self.closing.cancel();
        // Who needs longer is ended, or left to the next service.
        drop(tokio::time::timeout(deadline, self.ended(|live| live.sandbox.kind == Kind::Run)).await);
    }

    /// Returns when none of these lives here any more.
    async fn ended(&self, is_meant: impl Fn(&Live) -> bool) {
        while let Some(live) = self.carried().into_iter().find(|live| is_meant(live)) {
            Followed::new(live).until(|progress| matches!(progress, Progress::Ended(_) | Progress::Gone | Progress::Queued)).await;
            // Its follower takes a moment to let go of it.
            tokio::task::yield_now().await;
        }
    }

    /// Makes no more sandboxes, ends those that live, and returns when their ends are stored or `deadline` is over.
    pub async fn stop(&self, deadline: Duration) {
        self.closing.cancel();
        self.stopping.cancel();
        let ended = async {
            let all = self.carried();
            for live in &all {
                self.kill(live, KillReason::Evicted).await;
            }
            for live in all {
                Followed::new(live).until(|progress| matches!(progress, Progress::Ended(_) | Progress::Gone | Progress::Queued)).await;
            }
            self.execs_ended().await;
        };
        if tokio::time::timeout(deadline, ended).await.is_err() {
            tracing::warn!("not every sandbox ended in time; the next start settles the rest");
        }
        // What is not stored yet, the next service finds in the keeper's records: nobody else should speak of it before.
        self.let_go(!self.carried().is_empty()).await;
    }

    /// Makes no more sandboxes and asks for the end of none: they ended with their keeper, and whoever asked for it would be told as the cause. What is
    /// not stored of that yet, the next service tells.
    pub async fn give_up(&self) {
        self.closing.cancel();
        self.stopping.cancel();
        self.let_go(!self.carried().is_empty()).await;
    }

    /// Makes no more sandboxes and leaves those that live to the keeper and to the next service.
    pub async fn hand_over(&self) {
        self.is_handed_over.store(true, Ordering::SeqCst);
        self.closing.cancel();
        self.stopping.cancel();
        self.let_go(true).await;
    }

    /// What this process follows.
    fn carried(&self) -> Vec<Arc<Live>> {
        let mut all = self.live.all();
        all.retain(|live| !matches!(live.progress(), Progress::Queued));
        all
    }

    /// Records that it is to end, and tells the keeper. One that is not with the keeper yet ends as soon as it is.
    async fn kill(&self, live: &Live, reason: KillReason) {
        live.order_kill(reason);
        for id in live.names() {
            if let Err(error) = self.keeper.kill(id, reason).await {
                tracing::debug!(sandbox.id = %id, %error, "the keeper did not take the order to end it");
            }
        }
    }

    /// Has the keeper drop record and log; false if it did not.
    async fn forget(&self, id: SandboxId) -> bool {
        is_done(id, self.keeper.forget(id).await)
    }

    /// Has the keeper drop the record; the log stays.
    async fn forget_record(&self, id: SandboxId) {
        is_done(id, self.keeper.forget_record(id).await);
    }

    /// Has the keeper drop a log that no row speaks of any more: nobody else will think of it.
    async fn forget_log(self: Arc<Self>, id: SandboxId) {
        loop {
            tokio::select! {
                _ = self.keeper.connected() => {}
                () = self.keeper_gone() => return,
            }
            if self.live.get(id).is_some() {
                // It lives again, and has a log anew.
                return;
            }
            match self.keeper.forget(id).await {
                Err(CallError::Lost) => tokio::time::sleep(Duration::from_millis(100)).await,
                answer @ (Ok(()) | Err(CallError::Failed(_))) => {
                    fail_point::reached("service.delete.forgotten");
                    is_done(id, answer);
                    return;
                }
            }
        }
    }
}

fn is_done(id: SandboxId, answer: Result<(), CallError>) -> bool {
    match answer {
        Ok(()) => true,
        // The next start finds the record and drops it.
        Err(CallError::Lost) => false,
        Err(CallError::Failed(failure)) => {
            tracing::warn!(sandbox.id = %id, %failure, "the keeper did not drop a record");
            false
        }
    }
}

/// Whether it does not wait in a pool.
fn is_somebodys(sandbox: &Sandbox) -> bool {
    sandbox.kind != Kind::Pooled
}

/// Unix time in whole microseconds.
fn unix_us(at: OffsetDateTime) -> u64 {
    u64::try_from(at.unix_timestamp_nanos() / 1000).unwrap_or(0)
}

/// Whether the step is one of the diagram's; logged where it is not, since the facts have the last word.
fn step(id: SandboxId, from: State, event: Event) -> Option<State> {
    let to = from.after(event);
    if to.is_none() {
        tracing::debug!(sandbox.id = %id, ?from, ?event, "nothing changes");
    }
    to
}
