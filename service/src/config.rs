//! What an operator can set: flags, environment and one TOML file, which say the same things.

mod account;
mod door;
mod keys;
mod peers;
mod registry;
mod traces;
mod webhooks;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use account::Account;
pub(crate) use account::finish;
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
pub use door::{DoorSettings, TlsFiles};
pub use keys::KeySettings;
pub use peers::PeerSettings;
use sandbox_core::{
    fence::{Fence, Fences},
    selinux::Labels,
};
use serde::Deserialize;
pub use traces::TraceSettings;

use crate::{
    sandbox::{DefaultQuotas, Languages, QuotaScope, Quotas},
    token::Rules,
};

/// Connections to Postgres: fewer starve the hot path, more than this no server takes by default.
const CONNECTIONS_MIN: u32 = 2;
const CONNECTIONS_MAX: u32 = 1000;

/// Everything that `serve` can be told, each given or not. The keys of the TOML file are the flags without their dashes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// TOML file with any of these settings, named as the flags. A flag goes before the environment, and that before the file
    #[arg(long, env = "MAYFLY_CONFIG", value_name = "PATH")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Address and port of the API; port 0 is any free one [default: 127.0.0.1:8080]
    #[arg(long, env = "MAYFLY_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address and port of the metrics; port 0 is any free one [default: 127.0.0.1:9464]
    #[arg(long, env = "MAYFLY_METRICS_LISTEN", value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// Tenants that have series of their own in the metrics, 0 to 1000; all others have one together [default: 0]
    #[arg(long, env = "MAYFLY_METRICS_TENANTS", value_name = "COUNT")]
    pub metrics_tenants: Option<u32>,
    /// Folder for everything that must survive a restart [default: /var/lib/mayfly]
    #[arg(long, env = "MAYFLY_DATA_DIR", value_name = "PATH")]
    pub data_dir: Option<PathBuf>,
    /// URL of a Postgres database (also DATABASE_URL) [default: a private cluster in the data folder]
    #[arg(long, env = "MAYFLY_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// The name that many hosts give to the same thing.
    #[arg(long, env = "DATABASE_URL", hide = true, hide_env_values = true)]
    #[serde(skip)]
    pub usual_database_url: Option<String>,
    /// Connections to Postgres, 2 to 1000 [default: 16]
    #[arg(long, env = "MAYFLY_DATABASE_CONNECTIONS", value_name = "COUNT")]
    pub database_connections: Option<u32>,
    /// Folder with Postgres's programs [default: the newest in /usr/lib/postgresql, else in /usr/local/pgsql/bin, /usr/local/bin or /usr/bin]
    #[arg(long, env = "MAYFLY_POSTGRES_BIN_DIR", value_name = "PATH")]
    pub postgres_bin_dir: Option<PathBuf>,
    /// User that the service becomes when it is started as root [default: mayfly]
    #[arg(long, env = "MAYFLY_USER", value_name = "NAME")]
    pub user: Option<String>,
    /// TOML file with languages for runs, beside those that are built in or in place of them; see `GET /v1/languages`
    #[arg(long, env = "MAYFLY_LANGUAGES", value_name = "PATH")]
    pub languages: Option<PathBuf>,
    /// The keeper's program [default: sandbox-keeper beside this program]
    #[arg(long, env = "MAYFLY_KEEPER_BIN", value_name = "PATH")]
    pub keeper_bin: Option<PathBuf>,
    /// Socket of a keeper that somebody else starts and stops [default: keeper.sock in the data folder, started as needed]
    #[arg(long, env = "MAYFLY_KEEPER_SOCKET", value_name = "PATH")]
    pub keeper_socket: Option<PathBuf>,
    /// Fences that this node must have, else it does not start: `landlock`, `apparmor`, `selinux` (comma between)
    #[arg(long, env = "MAYFLY_REQUIRE_FENCE", value_name = "FENCE", value_delimiter = ',')]
    pub require_fence: Option<Vec<Fence>>,
    /// SELinux label of what runs in sandboxes, for a keeper of our own
    #[arg(long, env = "MAYFLY_SELINUX_LABEL", value_name = "LABEL")]
    pub selinux_label: Option<String>,
    /// SELinux label of the files in sandboxes, for a keeper of our own
    #[arg(long, env = "MAYFLY_SELINUX_MOUNT_LABEL", value_name = "LABEL", requires = "selinux_label")]
    pub selinux_mount_label: Option<String>,
    /// PEM file with the certificate of the API and those between it and its authority; without it the API speaks plain HTTP. Read
    /// again when it changes, and on SIGHUP, by the service's user
    #[arg(long, env = "MAYFLY_TLS_CERT", value_name = "PATH")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the private key to that certificate
    #[arg(long, env = "MAYFLY_TLS_KEY", value_name = "PATH")]
    pub tls_key: Option<PathBuf>,
    /// Origin, as in `https://app.example.com`, whose pages may call the API from a browser; several with commas between [default: none]
    #[arg(long, env = "MAYFLY_CORS_ORIGIN", value_name = "ORIGIN", value_delimiter = ',')]
    pub cors_origin: Option<Vec<String>>,
    /// Connections to the API at one time; one more waits [default: 4096, or half of the open files allowed if that is less]
    #[arg(long, env = "MAYFLY_CONNECTIONS_MAX", value_name = "COUNT")]
    pub connections_max: Option<u32>,
    /// Seconds that a client may take for the head of a request, 1 to 300 [default: 10]
    #[arg(long, env = "MAYFLY_HEAD_TIMEOUT_S", value_name = "SECONDS")]
    pub head_timeout_s: Option<u32>,
    /// Seconds that a client may take for a body, 1 to 3600; it has one more for each 16 KiB of it [default: 60]
    #[arg(long, env = "MAYFLY_BODY_TIMEOUT_S", value_name = "SECONDS")]
    pub body_timeout_s: Option<u32>,
    /// Seconds for which a client may take nothing of what is sent to it, 1 to 3600; then it is disconnected [default: 60]
    #[arg(long, env = "MAYFLY_WRITE_TIMEOUT_S", value_name = "SECONDS")]
    pub write_timeout_s: Option<u32>,
    /// Memory that answers with output of runs and execs may take together until they are read, in bytes, at least 1 MiB; a tenant has a fourth of it. Without room an
    /// answer is refused with 503, or comes without output [default: a sixteenth of this machine's, but at most 1 GiB]
    #[arg(long, env = "MAYFLY_ANSWER_MEMORY_BYTES", value_name = "BYTES")]
    pub answer_memory_bytes: Option<u64>,
    /// File with the secret that tokens are signed with (HS256), at least 32 bytes [default, if no other key is given: jwt-secret in the data folder, made as needed]
    #[arg(long, env = "MAYFLY_JWT_SECRET_FILE", value_name = "PATH")]
    pub jwt_secret_file: Option<PathBuf>,
    /// PEM file with a public key for tokens: RSA (RS256), P-256 (ES256) or Ed25519 (EdDSA); as KID=PATH it proves only tokens of that
    /// `kid`. Several with commas between
    #[arg(long, env = "MAYFLY_JWT_PUBLIC_KEY_FILE", value_name = "[KID=]PATH", value_delimiter = ',')]
    pub jwt_public_key_file: Option<Vec<String>>,
    /// JSON Web Key Set with keys for tokens, which may be secrets; read again and again, by the service's user
    #[arg(long, env = "MAYFLY_JWT_JWKS_FILE", value_name = "PATH")]
    pub jwt_jwks_file: Option<PathBuf>,
    /// Where an issuer publishes its JSON Web Key Set, http or https
    #[arg(long, env = "MAYFLY_JWT_JWKS_URL", hide_env_values = true, value_name = "URL")]
    pub jwt_jwks_url: Option<String>,
    /// PEM file with the only authorities that may vouch for that issuer's certificate [default: the system's]
    #[arg(long, env = "MAYFLY_JWT_JWKS_CA_FILE", value_name = "PATH")]
    pub jwt_jwks_ca_file: Option<PathBuf>,
    /// Seconds after which a JSON Web Key Set is read again, 1 to 86400 [default: 300]
    #[arg(long, env = "MAYFLY_JWT_JWKS_REFRESH_S", value_name = "SECONDS")]
    pub jwt_jwks_refresh_s: Option<u32>,
    /// Seconds that an issuer's clock may be wrong by, 0 to 300 [default: 30]
    #[arg(long, env = "MAYFLY_JWT_LEEWAY_S", value_name = "SECONDS")]
    pub jwt_leeway_s: Option<u32>,
    /// The only `iss` that a token may have [default: any]
    #[arg(long, env = "MAYFLY_JWT_ISSUER", value_name = "TEXT")]
    pub jwt_issuer: Option<String>,
    /// The `aud` that a token must have [default: mayfly]
    #[arg(long, env = "MAYFLY_JWT_AUDIENCE", value_name = "TEXT")]
    pub jwt_audience: Option<String>,
    /// Name of the claim that holds the tenant [default: tenant]
    #[arg(long, env = "MAYFLY_TENANT_CLAIM", value_name = "NAME")]
    pub tenant_claim: Option<String>,
    /// Name of the claim that holds the user inside the tenant [default: sub]
    #[arg(long, env = "MAYFLY_SUBJECT_CLAIM", value_name = "NAME")]
    pub subject_claim: Option<String>,
    /// Name of the claim that holds the scopes: words in a text, or a list of them, as in `scp` or `permissions` [default: scope]
    #[arg(long, env = "MAYFLY_SCOPE_CLAIM", value_name = "NAME")]
    pub scope_claim: Option<String>,
    /// Memory that sandboxes together may be promised, in bytes [default: 80 % of this machine's]
    #[arg(long, env = "MAYFLY_CAPACITY_MEMORY_BYTES", value_name = "BYTES")]
    pub capacity_memory_bytes: Option<u64>,
    /// CPU that sandboxes together may be promised, in thousandths of a core [default: 8 times this machine's]
    #[arg(long, env = "MAYFLY_CAPACITY_CPU_MILLIS", value_name = "MILLIS")]
    pub capacity_cpu_millis: Option<u64>,
    /// Memory that sandboxes together may be promised, in percent of this machine's [default: 80]
    #[arg(long, env = "MAYFLY_OVERCOMMIT_MEMORY_PERCENT", value_name = "PERCENT")]
    pub overcommit_memory_percent: Option<u64>,
    /// CPU that sandboxes together may be promised, in percent of this machine's [default: 800]
    #[arg(long, env = "MAYFLY_OVERCOMMIT_CPU_PERCENT", value_name = "PERCENT")]
    pub overcommit_cpu_percent: Option<u64>,
    /// Memory that is kept free, in percent of this machine's: with less, no sandbox is started [default: 5]
    #[arg(long, env = "MAYFLY_MEMORY_RESERVE_PERCENT", value_name = "PERCENT")]
    pub memory_reserve_percent: Option<u64>,
    /// The same of the disk that the data folder is on [default: 5, but at most 2 GiB]
    #[arg(long, env = "MAYFLY_DISK_RESERVE_PERCENT", value_name = "PERCENT")]
    pub disk_reserve_percent: Option<u64>,
    /// How long this node counts as alive without being heard of by the others, in seconds; then what it runs is settled by them [default: 15]
    #[arg(long, env = "MAYFLY_NODE_LEASE_S", value_name = "SECONDS")]
    pub node_lease_s: Option<u32>,
    /// URL at which the other nodes on the same database reach this one's API, as in `https://10.0.0.1:8080`. With it, whatever node is asked for a sandbox of another has that one answer [default: none, and each node answers for its own]
    #[arg(long, env = "MAYFLY_PEER_ADDRESS", value_name = "URL")]
    pub peer_address: Option<String>,
    /// Whether requests, and the tokens in them, may go from node to node by plain HTTP [default: false]
    #[arg(long, env = "MAYFLY_PEER_HTTP", value_name = "BOOL")]
    pub peer_http: Option<bool>,
    /// PEM file with the only authorities that may vouch for other nodes [default: the system's]
    #[arg(long, env = "MAYFLY_PEER_CA_FILE", value_name = "PATH")]
    pub peer_ca_file: Option<PathBuf>,
    /// Name that the certificate of every node bears [default: the host of its address]
    #[arg(long, env = "MAYFLY_PEER_TLS_NAME", value_name = "NAME")]
    pub peer_tls_name: Option<String>,
    /// How long requests and runs in progress may take to end by themselves when the service is told to stop, in seconds [default: 10]
    #[arg(long, env = "MAYFLY_STOP_GRACE_S", value_name = "SECONDS")]
    pub stop_grace_s: Option<u32>,
    /// How long the service goes on for what lives here when it is told to stop, in seconds, 0 to 86400: it takes no more work, stops as soon as nothing lives here
    /// any more, and evicts what does in the end. For a node whose keeper is stopped, too [default: 0]
    #[arg(long, env = "MAYFLY_DRAIN_S", value_name = "SECONDS")]
    pub drain_s: Option<u32>,
    /// Whether a tenant appears with its first valid token, or must be registered before [default: auto]
    #[arg(long, env = "MAYFLY_TENANTS", value_name = "HOW")]
    pub tenants: Option<Tenants>,
    /// Quotas of a tenant that has none of its own, as a JSON object over the built-in ones; null is no limit
    #[arg(long, env = "MAYFLY_TENANT_QUOTAS", value_name = "JSON")]
    pub tenant_quotas: Option<String>,
    /// Quotas of each principal of a tenant, likewise
    #[arg(long, env = "MAYFLY_PRINCIPAL_QUOTAS", value_name = "JSON")]
    pub principal_quotas: Option<String>,
    /// Sandboxes and runs that may wait for room, all tenants' together [default: 10000]
    #[arg(long, env = "MAYFLY_QUEUE_MAX", value_name = "COUNT")]
    pub queue_max: Option<u64>,
    /// How long sandboxes and runs are kept after their end, in hours [default: 720]
    #[arg(long, env = "MAYFLY_RETENTION_HOURS", value_name = "HOURS")]
    pub retention_hours: Option<u32>,
    /// How long events are kept, in hours [default: 2160]
    #[arg(long, env = "MAYFLY_EVENT_RETENTION_HOURS", value_name = "HOURS")]
    pub event_retention_hours: Option<u32>,
    /// Hours for which the answer to a request with an `Idempotency-Key` is kept, 1 to 720 [default: 24]
    #[arg(long, env = "MAYFLY_IDEMPOTENCY_RETENTION_HOURS", value_name = "HOURS")]
    pub idempotency_retention_hours: Option<u32>,
    /// File with the key that the secrets of webhooks are made of, at least 32 bytes, the same on every node [default: webhook-key in the data folder, made as needed]
    #[arg(long, env = "MAYFLY_WEBHOOK_KEY_FILE", value_name = "PATH")]
    pub webhook_key_file: Option<PathBuf>,
    /// Network, as in `10.1.0.0/16`, that is not public and that webhooks may lead into all the same; several with commas between [default: none]
    #[arg(long, env = "MAYFLY_WEBHOOK_ALLOW", value_name = "CIDR", value_delimiter = ',')]
    pub webhook_allow: Option<Vec<String>>,
    /// Whether webhooks may be plain HTTP [default: false]
    #[arg(long, env = "MAYFLY_WEBHOOK_HTTP", value_name = "BOOL")]
    pub webhook_http: Option<bool>,
    /// PEM file with authorities that may vouch for the targets of webhooks, beside the system's
    #[arg(long, env = "MAYFLY_WEBHOOK_CA_FILE", value_name = "PATH")]
    pub webhook_ca_file: Option<PathBuf>,
    /// Seconds from the first attempt at a delivery to the second, 1 to 3600; each pause is twice the one before, up to six hours [default: 5]
    #[arg(long, env = "MAYFLY_WEBHOOK_RETRY_S", value_name = "SECONDS")]
    pub webhook_retry_s: Option<u32>,
    /// Hours for which a delivery is tried, 1 to 168 [default: 72]
    #[arg(long, env = "MAYFLY_WEBHOOK_RETRY_HOURS", value_name = "HOURS")]
    pub webhook_retry_hours: Option<u32>,
    /// Hours for which every attempt must fail before a webhook is made inactive, 1 to 720 [default: 120]
    #[arg(long, env = "MAYFLY_WEBHOOK_DISABLE_HOURS", value_name = "HOURS")]
    pub webhook_disable_hours: Option<u32>,
    /// Registry that images may be pulled from, as in `registry.example`, `*.example` or `registry.example:5000`; several with commas between [default: any]
    #[arg(long, env = "MAYFLY_REGISTRY_HOSTS", value_name = "HOST", value_delimiter = ',')]
    pub registry_hosts: Option<Vec<String>>,
    /// Registry and who is asked before it, as in `registry.example=mirror.example:5000`, without credentials; several with commas between [default: none]
    #[arg(long, env = "MAYFLY_REGISTRY_MIRROR", value_name = "REGISTRY=HOST", value_delimiter = ',')]
    pub registry_mirror: Option<Vec<String>>,
    /// Network, as in `10.1.0.0/16`, that is not public and that registries, and what they lead to, may be in all the same; several with commas between [default: none]
    #[arg(long, env = "MAYFLY_REGISTRY_ALLOW", value_name = "CIDR", value_delimiter = ',')]
    pub registry_allow: Option<Vec<String>>,
    /// PEM file with authorities that may vouch for registries, beside the system's
    #[arg(long, env = "MAYFLY_REGISTRY_CA_FILE", value_name = "PATH")]
    pub registry_ca_file: Option<PathBuf>,
    /// File with the key that the passwords for registries are sealed with, at least 32 bytes, the same on every node [default: registry-key in the data folder, made as needed]
    #[arg(long, env = "MAYFLY_REGISTRY_KEY_FILE", value_name = "PATH")]
    pub registry_key_file: Option<PathBuf>,
    /// Seconds for which a registry may bring nothing before it is asked again, 1 to 600 [default: 30]
    #[arg(long, env = "MAYFLY_REGISTRY_STALL_S", value_name = "SECONDS")]
    pub registry_stall_s: Option<u32>,
    /// Percent of the data folder's disk from which on pulled images go that nothing uses, 0 to 100; 100: never [default: 85]
    #[arg(long, env = "MAYFLY_IMAGE_GC_HIGH_WATER", value_name = "PERCENT")]
    pub image_gc_high_water: Option<u32>,
    /// Hours for which nothing must have been made of a pulled image before it may go, 0 to 8760 [default: 24]
    #[arg(long, env = "MAYFLY_IMAGE_GC_IDLE_HOURS", value_name = "HOURS")]
    pub image_gc_idle_hours: Option<u32>,
    /// URL of a collector of traces that speaks OTLP over HTTP, as in `http://127.0.0.1:4318`; `/v1/traces` is added [default: none, and no traces]
    #[arg(long, env = "MAYFLY_OTLP_ENDPOINT", hide_env_values = true, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Of a hundred requests that belong to no trace yet so many begin one, 0 to 100 [default: 100]
    #[arg(long, env = "MAYFLY_TRACE_PERCENT", value_name = "PERCENT")]
    pub trace_percent: Option<u32>,
    /// How log lines on stderr look [default: text]
    #[arg(long, env = "MAYFLY_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How tenants come to be known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tenants {
    /// With their first valid token.
    #[default]
    Auto,
    /// When an administrator makes them.
    Registered,
}

/// How a line of the service's own log looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// The settings in force: every one decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub listen: SocketAddr,
    pub metrics_listen: SocketAddr,
    /// So many tenants are named in the metrics.
    pub metrics_tenants: usize,
    pub data_dir: PathBuf,
    /// `None`: the private cluster.
    pub database_url: Option<String>,
    pub database_connections: u32,
    pub postgres_bin_dir: Option<PathBuf>,
    pub user: String,
    pub keeper_bin: Option<PathBuf>,
    /// `None`: a keeper of our own.
    pub keeper_socket: Option<PathBuf>,
    pub required_fences: Fences,
    pub selinux_labels: Option<Labels>,
    pub door: DoorSettings,
    pub keys: KeySettings,
    pub token_rules: Rules,
    /// `None`: a part of what this machine has.
    pub answer_memory_bytes: Option<u64>,
    pub capacity_memory_bytes: Option<u64>,
    pub capacity_cpu_millis: Option<u64>,
    pub overcommit_memory_percent: u64,
    pub overcommit_cpu_percent: u64,
    pub memory_reserve_percent: u64,
    pub disk_reserve_percent: Option<u64>,
    pub node_lease: Duration,
    /// `None`: this node reaches no other, and is not reached.
    pub peers: Option<PeerSettings>,
    pub stop_grace: Duration,
    /// Zero: what lives is left to the keeper, if that is somebody else's.
    pub drain: Duration,
    pub languages: Languages,
    pub tenants: Tenants,
    pub quotas: DefaultQuotas,
    pub queue_max: u64,
    pub retention: Duration,
    pub event_retention: Duration,
    pub idempotency_retention: Duration,
    pub webhooks: crate::webhooks::Settings,
    pub registries: crate::images::RegistrySettings,
    pub collecting: crate::images::Collecting,
    /// `None`: nobody collects traces.
    pub traces: Option<TraceSettings>,
    pub log_format: LogFormat,
}

impl Options {
    /// Decides every setting: what is given here, else in the file, else the default. Fails when the file cannot be read, holds a
    /// key that is none, or a value that cannot be.
    pub fn settle(self) -> anyhow::Result<Settings> {
        let file = match &self.config {
            Some(path) => read(path)?,
            None => Self::default(),
        };
        let token_rules = keys::rules(&self, &file)?;
        let door = DoorSettings::settle(&self, &file)?;
        let data_dir = self.data_dir.as_ref().or(file.data_dir.as_ref()).map_or(Path::new("/var/lib/mayfly"), PathBuf::as_path);
        let data_dir = std::path::absolute(data_dir).with_context(|| format!("data-dir: {}", data_dir.display()))?;
        let keys = KeySettings::settle(&self, &file, &data_dir)?;
        let webhooks = webhooks::settle(&self, &file, &data_dir)?;
        let registries = registry::settle(&self, &file, &data_dir)?;
        let collecting = registry::collecting(&self, &file)?;
        let traces = traces::settle(&self, &file)?;
        let peers = peers::settle(&self, &file)?;
        let nearer = self.database_url.or(self.usual_database_url);
        let languages = languages(self.languages.or(file.languages).as_deref())?;
        let database_connections = self.database_connections.or(file.database_connections).unwrap_or(16);
        within("database-connections", database_connections, CONNECTIONS_MIN, CONNECTIONS_MAX)?;
        let mount = given(self.selinux_mount_label).or(given(file.selinux_mount_label));
        let process = given(self.selinux_label).or(given(file.selinux_label));
        ensure!(process.is_some() || mount.is_none(), "selinux-mount-label: it needs selinux-label");
        Ok(Settings {
            listen: self.listen.or(file.listen).unwrap_or(loopback(8080)),
            metrics_listen: self.metrics_listen.or(file.metrics_listen).unwrap_or(loopback(9464)),
            metrics_tenants: usize::try_from(within(
                "metrics-tenants",
                self.metrics_tenants.or(file.metrics_tenants).unwrap_or(0),
                0,
                1000,
            )?)?,
            data_dir,
            database_url: given(nearer).or(given(file.database_url)),
            database_connections,
            postgres_bin_dir: self.postgres_bin_dir.or(file.postgres_bin_dir),
            user: self.user.or(file.user).unwrap_or_else(|| "mayfly".into()),
            keeper_bin: self.keeper_bin.or(file.keeper_bin),
            keeper_socket: self.keeper_socket.or(file.keeper_socket),
            required_fences: {
                let asked = self.require_fence.or(file.require_fence).unwrap_or_default();
                // Who names a label relies on it, whoever started the keeper.
                asked.into_iter().chain(process.is_some().then_some(Fence::Selinux)).collect()
            },
            selinux_labels: process.map(|process| Labels { process, mount }),
            door,
            keys,
            token_rules,
            answer_memory_bytes: {
                let bytes = self.answer_memory_bytes.or(file.answer_memory_bytes);
                ensure!(bytes.is_none_or(|bytes| bytes >= 1 << 20), "answer-memory-bytes: less than 1 MiB");
                bytes
            },
            capacity_memory_bytes: positive("capacity-memory-bytes", self.capacity_memory_bytes.or(file.capacity_memory_bytes))?,
            capacity_cpu_millis: positive("capacity-cpu-millis", self.capacity_cpu_millis.or(file.capacity_cpu_millis))?,
            overcommit_memory_percent: positive(
                "overcommit-memory-percent",
                self.overcommit_memory_percent.or(file.overcommit_memory_percent),
            )?
            .unwrap_or(80),
            overcommit_cpu_percent: positive("overcommit-cpu-percent", self.overcommit_cpu_percent.or(file.overcommit_cpu_percent))?
                .unwrap_or(800),
            memory_reserve_percent: percent("memory-reserve-percent", self.memory_reserve_percent.or(file.memory_reserve_percent))?
                .unwrap_or(5),
            disk_reserve_percent: percent("disk-reserve-percent", self.disk_reserve_percent.or(file.disk_reserve_percent))?,
            node_lease: seconds(within("node-lease-s", self.node_lease_s.or(file.node_lease_s).unwrap_or(15), 2, 3600)?),
            peers,
            stop_grace: seconds(within("stop-grace-s", self.stop_grace_s.or(file.stop_grace_s).unwrap_or(10), 0, 3600)?),
            drain: seconds(within("drain-s", self.drain_s.or(file.drain_s).unwrap_or(0), 0, 86_400)?),
            languages,
            tenants: self.tenants.or(file.tenants).unwrap_or_default(),
            quotas: quotas(given(self.tenant_quotas).or(file.tenant_quotas), given(self.principal_quotas).or(file.principal_quotas))?,
            queue_max: self.queue_max.or(file.queue_max).unwrap_or(10_000),
            retention: hours(self.retention_hours.or(file.retention_hours).unwrap_or(720)),
            event_retention: hours(self.event_retention_hours.or(file.event_retention_hours).unwrap_or(2160)),
            idempotency_retention: hours(within(
                "idempotency-retention-hours",
                self.idempotency_retention_hours.or(file.idempotency_retention_hours).unwrap_or(24),
                1,
                720,
            )?),
            webhooks,
            registries,
            collecting,
            traces,
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
        })
    }
}

fn read(path: &Path) -> anyhow::Result<Options> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    // The library's own message shows the line, even one with a password.
    toml::from_str(&text).map_err(|error| {
        let number = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        let line = text.lines().nth(number - 1).unwrap_or_default().trim();
        let shown = ["database-url", "jwt-jwks-url", "otlp-endpoint"].into_iter().find(|key| line.contains(key)).unwrap_or(line);
        anyhow::anyhow!("{}, line {number}: {shown}: {}", path.display(), error.message())
    })
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// An empty text is how an environment says «nothing».
fn given(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// The built-in quotas with these over them.
/// The languages that are built in, and those of this file.
fn languages(file: Option<&Path>) -> anyhow::Result<Languages> {
    let Some(path) = file else { return Languages::read(None) };
    let text = fs::read_to_string(path).with_context(|| format!("languages: {}", path.display()))?;
    Languages::read(Some(&text)).with_context(|| format!("languages: {}", path.display()))
}

fn quotas(tenant: Option<String>, principal: Option<String>) -> anyhow::Result<DefaultQuotas> {
    let parse = |name: &str, scope: QuotaScope, text: Option<String>| {
        let Some(text) = text else { return Ok(Quotas::default()) };
        let object = serde_json::from_str(&text).with_context(|| format!("{name}: not a JSON object"))?;
        Quotas::parse(name, scope, object).map_err(anyhow::Error::new)
    };
    let built_in = DefaultQuotas::default();
    Ok(DefaultQuotas {
        tenant: parse("tenant-quotas", QuotaScope::Tenant, tenant)?.over(&built_in.tenant),
        principal: parse("principal-quotas", QuotaScope::Principal, principal)?.over(&built_in.principal),
    })
}

fn hours(count: u32) -> Duration {
    Duration::from_secs(u64::from(count) * 3600)
}

fn seconds(count: u32) -> Duration {
    Duration::from_secs(u64::from(count))
}

/// A share that is kept free.
fn percent(name: &str, number: Option<u64>) -> anyhow::Result<Option<u64>> {
    ensure!(number.is_none_or(|number| number <= 100), "{name}: {} is out of range: 0 to 100", number.unwrap_or_default());
    Ok(number)
}

fn positive(name: &str, number: Option<u64>) -> anyhow::Result<Option<u64>> {
    ensure!(number != Some(0), "{name}: 0 is out of range: at least 1");
    Ok(number)
}

fn within(name: &str, number: u32, min: u32, max: u32) -> anyhow::Result<u32> {
    ensure!((min..=max).contains(&number), "{name}: {number} is out of range: {min} to {max}");
    Ok(number)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn flags(flags: &[&str]) -> Options {
        let line = Line::try_parse_from(["serve"].iter().chain(flags)).unwrap();
        line.options
    }

    /// A file with this content, and options that name it.
    fn file(content: &str) -> (tempfile::TempDir, Options) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mayfly.toml");
        fs::write(&path, content).unwrap();
        (folder, Options { config: Some(path), ..Options::default() })
    }

    #[test]
    fn what_nobody_sets_has_its_default() {
        let settings = Options::default().settle().unwrap();
        assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(settings.metrics_listen.to_string(), "127.0.0.1:9464");
        assert_eq!(settings.keys.secret_file(), Path::new("/var/lib/mayfly/jwt-secret"));
        assert_eq!(settings.user, "mayfly");
        assert_eq!(settings.database_url, None);
        assert_eq!(settings.token_rules, Rules::default());
    }

    #[test]
    fn the_file_goes_before_the_default() {
        let (_folder, options) = file("listen = \"127.0.0.1:1\"\nlog-format = \"json\"\ncapacity-cpu-millis = 500\n");
        let settings = options.settle().unwrap();
        assert_eq!(settings.listen.port(), 1);
        assert_eq!(settings.log_format, LogFormat::Json);
        assert_eq!(settings.capacity_cpu_millis, Some(500));
    }

    #[test]
    fn a_flag_goes_before_the_file() {
        let (_folder, options) = file("listen = \"127.0.0.1:1\"\nuser = \"other\"\n");
        let settings = Options { config: options.config, ..flags(&["--listen", "127.0.0.1:2"]) }.settle().unwrap();
        assert_eq!(settings.listen.port(), 2);
        assert_eq!(settings.user, "other");
    }

    #[test]
    fn every_flag_can_be_set_by_the_environment() {
        let command = Line::command();
        let without: Vec<_> = command.get_arguments().filter(|arg| arg.get_env().is_none() && arg.get_id() != "help").collect();
        assert!(without.is_empty(), "{without:?}");
    }

    #[test]
    fn every_flag_but_the_files_own_is_a_key_of_the_file() {
        for flag in
            Line::command().get_arguments().filter_map(|arg| arg.get_long()).filter(|flag| !["config", "usual-database-url"].contains(flag))
        {
            let error = toml::from_str::<Options>(&format!("{flag} = {{}}")).unwrap_err();
            assert!(!error.message().contains("unknown field"), "{flag}: {error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let (_folder, options) = file("listen = \"127.0.0.1:1\"\nlistn = \"127.0.0.1:1\"\n");
        let error = options.settle().unwrap_err().to_string();
        assert!(error.contains("listn") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_bad_value_is_named_with_its_key() {
        let (_folder, options) = file("listen = \"here\"\n");
        let error = options.settle().unwrap_err().to_string();
        assert!(error.contains("listen") && error.contains("here"), "{error}");
    }

    #[test]
    fn quotas_go_over_the_built_in_ones() {
        let options = Options { tenant_quotas: Some(r#"{"sandboxes": 3, "queued": null}"#.into()), ..Options::default() };
        let quotas = options.settle().unwrap().quotas.tenant;
        assert_eq!((quotas.number("sandboxes"), quotas.number("queued")), (Some(3), None));
        assert_eq!(quotas.number("image_bytes"), DefaultQuotas::default().tenant.number("image_bytes"));
        let error = Options { principal_quotas: Some(r#"{"sandboxs": 3}"#.into()), ..Options::default() }.settle().unwrap_err();
        assert!(format!("{error:#}").contains("principal-quotas.sandboxs"), "{error:#}");
    }

    #[test]
    fn no_error_shows_a_password() {
        let (_folder, options) = file("database-url = \"postgres://me:very-secret@host\n");
        let error = options.settle().unwrap_err().to_string();
        assert!(error.contains("database-url") && !error.contains("very-secret"), "{error}");
    }

    #[test]
    fn a_number_out_of_range_is_named_with_its_bounds() {
        let error = Options { database_connections: Some(1), ..Options::default() }.settle().unwrap_err().to_string();
        assert!(error.contains("database-connections") && error.contains("2 to 1000"), "{error}");
    }

    #[test]
    fn our_own_name_for_the_database_goes_before_the_usual_one() {
        let usual = Options { usual_database_url: Some("postgres://usual".into()), ..Options::default() };
        let both = Options { database_url: Some("postgres://ours".into()), ..usual.clone() };
        assert_eq!(usual.settle().unwrap().database_url.as_deref(), Some("postgres://usual"));
        assert_eq!(both.settle().unwrap().database_url.as_deref(), Some("postgres://ours"));
    }

    #[test]
    fn an_empty_database_url_is_none() {
        let options = Options { usual_database_url: Some(String::new()), ..Options::default() };
        assert_eq!(options.settle().unwrap().database_url, None);
    }
}
