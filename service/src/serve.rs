//! `mayfly serve`: from root to an unprivileged process that serves, and back to nothing.

mod door;
mod folders;
mod helpers;
mod node;
mod revive;
mod tls;

use std::{
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use axum::Router;
use door::Bounds;
use helpers::Helpers;
use rustix::process::{Resource, Rlimit};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tls::Certificate;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    api,
    clock::Clock,
    config::{Account, Settings, Tenants},
    engine::{self, Engine, Reserves, Tenancy},
    images::{self, Images, SealingKey},
    metrics::{Metrics, Statements},
    outbox::Outbox,
    postgres::Cluster,
    runtime::Keeper,
    store::{NodeId, Store},
    telemetry::{self, Collected, Exporter},
    token::{Key, Keyring, Secret, Verifier},
    webhooks::{SigningKey, Webhooks},
};

/// How long sandboxes have to end when they are told to.
const END_SANDBOXES: Duration = Duration::from_secs(10);
/// How long the answers have that tell of those ends.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long connections to the database have to be given back.
const CLOSE: Duration = Duration::from_secs(2);

/// For whoever reads the metrics.
const METRICS_BOUNDS: Bounds = Bounds { connections: 64, head_deadline: Duration::from_secs(10), write_deadline: Duration::from_secs(60) };

/// Serves until it is told to stop, and stops what it started. Started as root it becomes an unprivileged user before it listens to
/// anybody; the order of its steps is this function's.
pub fn run(settings: Settings) -> anyhow::Result<()> {
    let collected = telemetry::start(settings.log_format, settings.traces.as_ref());
    let is_root = rustix::process::geteuid().is_root();
    let account = if is_root { service_account(&settings.user)? } else { Account::current()? };
    let doors = Doors { api: listen(settings.listen)?, metrics: listen(settings.metrics_listen)? };
    let folder = settings.data_dir.as_path();
    // Before anything is made: what is missing on this machine should leave no trace.
    let cluster = match &settings.database_url {
        None => Some(Cluster::find(&folder.join("postgres"), &account, settings.postgres_bin_dir.as_deref())?),
        Some(_) => None,
    };
    let keeper = helpers::look_for_keeper(&settings, is_root)?;
    folders::prepare(folder, &account, is_root)?;
    let _alone = folders::lock(folder)?;
    let keys = keys(&settings, is_root.then_some(&account))?;
    let webhook_key = SigningKey::read(own_key(&settings, &settings.webhooks.key_file, is_root.then_some(&account))?)?;
    let registry_key = SealingKey::read(own_key(&settings, &settings.registries.key_file, is_root.then_some(&account))?)?;
    let node = node::id(folder, is_root.then_some(&account))?;
    raise_descriptor_limit();
    hold_signals(settings.door.tls.is_some())?;

    let helpers = Helpers::start(&settings, keeper, cluster, &account)?;
    let identity = Identity { node, keys: &keys, webhook_key: &webhook_key, registry_key: &registry_key };
    let served = serve_unprivileged(&settings, &account, is_root, doors, identity, &helpers, collected);
    let stopped = match &served {
        Ok(_) => helpers.stop(),
        Err(_) => helpers.stop_started(),
    };
    match served? {
        Ended::Told => stopped,
        Ended::WithoutKeeper => {
            stopped?;
            bail!("the keeper is gone, and its sandboxes with it; start the service again")
        }
    }
}

/// What this service is known by as a node, and by which keys it knows its callers.
#[derive(Clone, Copy)]
struct Identity<'a> {
    node: NodeId,
    keys: &'a [Key],
    /// What the secrets of webhooks are made of.
    webhook_key: &'a SigningKey,
    /// What passwords for registries are sealed with.
    registry_key: &'a SealingKey,
}

/// Where requests come in.
struct Doors {
    api: TcpListener,
    metrics: TcpListener,
}

/// Why the service stopped serving.
enum Ended {
    Told,
    WithoutKeeper,
}

fn serve_unprivileged(
    settings: &Settings,
    account: &Account,
    is_root: bool,
    doors: Doors,
    identity: Identity<'_>,
    helpers: &Helpers,
    collected: Option<Collected>,
) -> anyhow::Result<Ended> {
    if is_root {
        sandbox_core::privileges::become_user(account.uid, account.gid).with_context(|| format!("becoming the user {}", account.name))?;
    }
    // What we write from here on is for us alone. Not earlier: whom we started would have it too.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Only now may there be a second thread: capabilities belong to threads.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting threads")?;
    let ended = runtime.block_on(serve(settings, doors, identity, helpers, collected));
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

async fn serve(
    settings: &Settings,
    doors: Doors,
    identity: Identity<'_>,
    helpers: &Helpers,
    collected: Option<Collected>,
) -> anyhow::Result<Ended> {
    let mut signals = Signals::new()?;
    let started = tokio::select! {
        started = start(settings, doors, identity, helpers, collected) => started?,
        () = signals.next() => return Ok(Ended::Told),
    };
    let Started { app, api, metrics, exporter, addresses, stopping } = started;
    let scheme = if settings.door.tls.is_some() { "https" } else { "http" };
    say(&format!("mayfly is ready on {scheme}://{}, metrics on http://{}/metrics", addresses.0, addresses.1));

    let ended = tokio::select! {
        () = signals.next() => Ended::Told,
        () = app.engine.keeper_gone() => Ended::WithoutKeeper,
    };
    match ended {
        Ended::Told => {
            tracing::info!("stopping");
            let last = async {
                // Whoever waits here hears how it ended, and whoever comes is told what there is.
                app.engine.drain(settings.drain).await;
                stopping.cancel();
                let mut api = api;
                let grace = settings.stop_grace;
                if helpers.is_keeper_ours() || !settings.drain.is_zero() {
                    // Sandboxes end with their keeper, which is ours, or will be stopped when we have.
                    let (_, answered) = tokio::join!(app.engine.close(grace), tokio::time::timeout(grace, &mut api));
                    app.engine.stop(END_SANDBOXES).await;
                    if answered.is_ok() {
                        return;
                    }
                } else {
                    app.engine.close(Duration::ZERO).await;
                    let answered = tokio::time::timeout(grace, &mut api).await;
                    app.engine.hand_over().await;
                    if answered.is_ok() {
                        return;
                    }
                }
                drop(tokio::time::timeout(LAST_ANSWERS, &mut api).await);
            };
            tokio::select! {
                () = last => {}
                () = signals.next() => tracing::warn!("told twice: not waiting for requests and sandboxes in progress"),
            }
        }
        Ended::WithoutKeeper => {
            tracing::error!("the keeper is gone: no sandbox of this node can run or be started");
            stopping.cancel();
            // What lived ended with it, and no end of a sandbox will be heard of.
            app.engine.give_up().await;
            drop(tokio::time::timeout(LAST_ANSWERS, api).await);
        }
    }
    drop(tokio::time::timeout(CLOSE, app.webhooks.close()).await);
    metrics.abort();
    if let Some(exporter) = exporter {
        drop(tokio::time::timeout(CLOSE, exporter.finish()).await);
    }
    if tokio::time::timeout(CLOSE, app.store.close()).await.is_err() {
        tracing::warn!("a connection to the database is still in use");
    }
    Ok(ended)
}

/// The service at work.
struct Started {
    app: Arc<api::App>,
    api: JoinHandle<()>,
    metrics: JoinHandle<()>,
    exporter: Option<Exporter>,
    addresses: (SocketAddr, SocketAddr),
    stopping: CancellationToken,
}

async fn start(
    settings: &Settings,
    doors: Doors,
    identity: Identity<'_>,
    helpers: &Helpers,
    collected: Option<Collected>,
) -> anyhow::Result<Started> {
    let addresses = (doors.api.local_addr()?, doors.metrics.local_addr()?);
    let keeper = Keeper::connect(helpers.keeper_socket(), settings.required_fences).await?;
    let options = match (&settings.database_url, helpers.cluster()) {
        (Some(url), _) => url.parse().context("database-url")?,
        (None, Some(cluster)) => cluster.connect_options(),
        (None, None) => bail!("there is no database"),
    };
    let certificate = settings.door.tls.as_ref().map(Certificate::follow).transpose()?;
    let tls = certificate.map(|certificate| certificate.acceptor()).transpose()?;
    let keyring = Keyring::follow(identity.keys.to_vec(), settings.keys.sources()?, settings.keys.jwks_refresh).await?;
    let figures = Arc::new(Metrics::new(settings.metrics_tenants)?);
    let exporter = collected.map(|collected| Exporter::start(collected, identity.node, Arc::clone(&figures))).transpose()?;
    let store = connect(options, settings.database_connections, figures.statements()).await?;
    store.migrate().await.context("bringing the database's schema up to date")?;
    let clock = Clock::System;
    let engine_settings = engine::Settings {
        node: identity.node,
        node_name: node_name(&settings.data_dir),
        lease: settings.node_lease,
        peer_address: settings.peers.as_ref().map(|peers| peers.address.clone()),
        does_keeper_return: !helpers.is_keeper_ours(),
        data_dir: settings.data_dir.clone(),
        reserves: Reserves { memory_percent: settings.memory_reserve_percent, disk_percent: settings.disk_reserve_percent },
        logs_dir: settings.data_dir.join("logs"),
        capacity_memory_bytes: settings.capacity_memory_bytes.unwrap_or_else(|| memory_to_give(settings.overcommit_memory_percent)),
        capacity_cpu_millis: settings.capacity_cpu_millis.unwrap_or_else(|| cpu_to_give(settings.overcommit_cpu_percent)),
        tenancy: Tenancy {
            is_registered_only: settings.tenants == Tenants::Registered,
            defaults: settings.quotas.clone(),
            queue_max: settings.queue_max,
            retention: settings.retention,
            event_retention: settings.event_retention,
        },
        clock: clock.clone(),
        metrics: Arc::clone(&figures),
    };
    let engine = Engine::start(store.clone(), keeper.clone(), engine_settings).await?;
    let images = Images::open(
        store.clone(),
        keeper.clone(),
        clock.clone(),
        Arc::clone(&figures),
        images::Settings {
            quotas: settings.quotas.tenant.clone(),
            registries: settings.registries.clone(),
            sealing: identity.registry_key.clone(),
            collecting: settings.collecting,
            data_dir: settings.data_dir.clone(),
        },
    )?;
    {
        let images = Arc::clone(&images);
        tokio::spawn(async move { images.sweep().await });
    }
    {
        let images = Arc::clone(&images);
        tokio::spawn(async move { images.collect().await });
    }
    let verifier = Verifier::new(keyring, settings.token_rules.clone());
    let idempotency = api::Idempotency::new(identity.node, settings.idempotency_retention);
    let stopping = CancellationToken::new();
    let outbox = Outbox::start(store.clone(), stopping.clone());
    let webhooks = Webhooks::start(
        settings.webhooks.clone(),
        identity.webhook_key.clone(),
        store.clone(),
        &outbox,
        clock.clone(),
        Arc::clone(&figures),
        api::webhook_body,
    )?;
    let courier = settings.peers.as_ref().map(api::Courier::new).transpose()?;
    let app = Arc::new(api::App {
        engine,
        store,
        keeper,
        verifier,
        images,
        clock,
        metrics: figures,
        idempotency,
        answers: api::Answers::new(settings.answer_memory_bytes.unwrap_or_else(memory_for_answers)),
        languages: settings.languages.clone(),
        outbox,
        webhooks,
        courier,
    });
    if let (None, Some(cluster)) = (&settings.database_url, helpers.cluster()) {
        let (cluster, store) = (cluster.clone(), app.store.clone());
        tokio::spawn(revive::keep_running(cluster, settings.database_connections, store, stopping.clone()));
    }
    let metrics = open(doors.metrics, api::metrics_router(Arc::clone(&app)), METRICS_BOUNDS, None, stopping.clone())?;
    let bounds = Bounds {
        connections: connections_max(settings.door.connections_max),
        head_deadline: settings.door.head_deadline,
        write_deadline: settings.door.write_deadline,
    };
    let api = open(doors.api, api::router(Arc::clone(&app), &settings.door), bounds, tls, stopping.clone())?;
    Ok(Started { app, api, metrics, exporter, addresses, stopping })
}

/// Serves in a task of its own, as [`door::serve`] does.
fn open(
    listener: TcpListener,
    router: Router,
    bounds: Bounds,
    tls: Option<TlsAcceptor>,
    stopping: CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Ok(tokio::spawn(door::serve(listener, router, bounds, tls, stopping)))
}

/// As many as are wanted and there are descriptors for, with as many again for what requests need.
fn connections_max(wanted: usize) -> usize {
    let descriptors = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(descriptors / 2).unwrap_or(usize::MAX).min(wanted)
}

/// Brings the schema of a database up to this program's version, and serves nobody.
pub fn migrate(url: &str) -> anyhow::Result<()> {
    /// The least that a pool has; what migrates has a connection of its own.
    const CONNECTIONS: u32 = 2;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(async {
        let statements = Metrics::new(0)?.statements();
        let store = connect(url.parse().context("database-url")?, CONNECTIONS, statements).await?;
        store.migrate().await.context("bringing the database's schema up to date")?;
        store.close().await;
        Ok(())
    })
}

/// Tries once by hand: a pool would only say that it had to wait for too long.
async fn connect(options: PgConnectOptions, connections: u32, statements: Statements) -> anyhow::Result<Store> {
    let place = format!("the database {} of {} at {}", options.get_database().unwrap_or("(unnamed)"), options.get_username(), at(&options));
    let first = PgConnection::connect_with(&options).await.with_context(|| format!("{place} cannot be reached"))?;
    // Its end is all the same to us.
    drop(first.close().await);
    Store::connect(options, connections, statements).await.with_context(|| format!("{place} cannot be reached"))
}

fn at(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(folder) => folder.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    }
}

/// SIGTERM and SIGINT, from the moment one of these is made for the first time.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// From now on SIGTERM and SIGINT wait until somebody asks for them with [`Signals`]: whoever ends us in the middle of a start should
/// not leave half of it running. Starts no thread.
fn hold_signals(is_hangup_ours: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("catching signals")?;
    // The handlers stay installed when these are gone.
    runtime.block_on(async {
        // SIGHUP has a meaning where there is a certificate to read again; else it ends us, as it ends any program.
        let hangup = is_hangup_ours.then(|| signal(SignalKind::hangup())).transpose()?;
        Signals::new().map(|signals| drop((signals, hangup)))
    })
}

fn service_account(user: &str) -> anyhow::Result<Account> {
    let account = Account::find(user)?
        .with_context(|| format!("there is no user {user}: useradd --system --user-group {user}, or give another --user"))?;
    ensure!(account.uid != 0 && account.gid != 0, "the service must not run as root: --user {user} will not do");
    Ok(account)
}

fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("listening on {address}"))
}

/// The keys that are configured, or the data folder's own secret, which is made at the first start.
fn keys(settings: &Settings, owner: Option<&Account>) -> anyhow::Result<Vec<Key>> {
    let path = settings.keys.secret_file();
    if settings.keys.is_own_secret() && Secret::create(path, owner.map(|account| (account.uid, account.gid)))?.is_some() {
        tracing::info!("no key for tokens is configured: made one in {}", path.display());
    }
    settings.keys.fixed()
}

/// Where a key is that is configured, or the data folder's own, which is made at the first start.
fn own_key<'a>(settings: &Settings, path: &'a Path, owner: Option<&Account>) -> anyhow::Result<&'a Path> {
    if path.parent() == Some(&settings.data_dir) {
        // One that is there already is read like any other.
        Secret::create(path, owner.map(|account| (account.uid, account.gid)))?;
    }
    Ok(path)
}

/// Every connection is a descriptor, and the soft limit is what programs with select(2) can bear.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// What people know the node by.
fn node_name(data_dir: &Path) -> String {
    format!("{}:{}", rustix::system::uname().nodename().to_string_lossy(), data_dir.display())
}

fn memory_to_give(percent: u64) -> u64 {
    let info = rustix::system::sysinfo();
    let total = info.totalram.saturating_mul(u64::from(info.mem_unit));
    (total / 100).saturating_mul(percent)
}

/// Less than what is kept free of promises to sandboxes, for those who set aside no other.
fn memory_for_answers() -> u64 {
    const MOST: u64 = 1024 * 1024 * 1024;
    (memory_to_give(100) / 16).min(MOST)
}

fn cpu_to_give(percent: u64) -> u64 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores as u64 * 10).saturating_mul(percent)
}

/// A line for whoever started us. Nobody listening is no reason not to serve.
fn say(line: &str) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        tracing::warn!(%error, "stdout is closed; what was to be said is: {line}");
    }
}
