//! What a caller asks for, parsed into a sandbox that can be made.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use sandbox_core::{
    files::PATH_BYTES_MAX,
    protocol::{Isolation, OutputPolicy, WindowSize},
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use utoipa::ToSchema;

use super::{
    Bound, Capabilities, Comparison, Judging, Kind, Languages, Limits, MountRequest, NewCase, NewCompile, RequestedCompileLimits,
    RequestedLimits, SandboxId, Signal, SignalRequest, Template, User, Wanted, volume, words,
};

/// How long `POST /v1/runs` waits for the end before it answers 202.
pub const WAIT_MS: Bound = Bound { field: "wait_ms", unit: "milliseconds", min: 0, default: Some(30_000), max: 300_000 };
/// How often a run that this service failed is tried again.
pub const RETRY: Bound = Bound { field: "retry", unit: "attempts", min: 0, default: Some(0), max: 10 };
/// How long a sandbox lives from its creation.
pub const TTL_MS: Bound = Bound { field: "ttl_ms", unit: "milliseconds", min: 1000, default: None, max: 604_800_000 };
/// How long a sandbox may do nothing: write no output, be given no input, be asked for nothing inside.
pub const IDLE_TIMEOUT_MS: Bound = Bound { field: "idle_timeout_ms", unit: "milliseconds", min: 1000, default: None, max: 604_800_000 };
/// How long a sandbox that is to stop has for that before it is killed.
pub const STOP_GRACE_MS: Bound = Bound { field: "stop_grace_ms", unit: "milliseconds", min: 0, default: Some(10_000), max: 300_000 };
/// The same where it is told to stop; without it, its own holds.
pub const GRACE_MS: Bound = Bound { field: "grace_ms", default: None, ..STOP_GRACE_MS };
/// How long `GET /v1/sandboxes/{id}/wait` waits.
pub const UNTIL_MS: Bound = Bound { field: "timeout_ms", unit: "milliseconds", min: 0, default: Some(30_000), max: 3_600_000 };
/// The size of a terminal.
pub(super) const TTY_ROWS: Bound = Bound { field: "tty.rows", unit: "characters", min: 1, default: Some(24), max: 1000 };
pub(super) const TTY_COLUMNS: Bound = Bound { field: "tty.columns", unit: "characters", min: 1, default: Some(80), max: 1000 };
/// How long what lives on a node that is drained may go on.
pub const EVICT_AFTER_MS: Bound = Bound { field: "evict_after_ms", unit: "milliseconds", min: 0, default: None, max: 604_800_000 };
/// How many entries a page of a list has.
pub const LIST_LIMIT: Bound = Bound { field: "limit", unit: "entries", min: 1, default: Some(50), max: 200 };
/// How many lines of a log are asked for at its end.
pub const TAIL_LINES: Bound = Bound { field: "tail", unit: "lines", min: 0, default: None, max: 100_000 };
/// Between two samples of what a sandbox uses.
pub const INTERVAL_MS: Bound = Bound { field: "interval_ms", unit: "milliseconds", min: 100, default: Some(1000), max: 60_000 };

const STOP_GRACE_DEFAULT_MS: u64 = 10_000;
const CASES_MAX: usize = 64;
const _: () = assert!(CASES_MAX == 64, "the contract of `cases` says so too, and takes nothing but a literal");
const CASE_NAME_CHARACTERS_MAX: usize = 64;
/// The largest body of a request that is JSON, and so the longest text in one.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Entry point and command, each by itself.
pub(super) const ARGS_MAX: usize = 1024;
pub(super) const ENV_MAX: usize = 512;
const FILES_MAX: usize = 1024;
const _: () = assert!(FILES_MAX == 1024, "the contract of `files` says so too, and takes nothing but a literal");
/// `args` and `env` travel in one message with the rest of the description.
pub(super) const ARGS_ENV_BYTES_MAX: usize = 64 * 1024;
pub(super) const LABELS_MAX: usize = 64;
const LABEL_KEY_BYTES_MAX: usize = 63;
pub(super) const LABEL_VALUE_BYTES_MAX: usize = 256;
const REFERENCE_BYTES_MAX: usize = 256;
/// What stands in the place of a reference in the paths of some routes.
const ROUTES: [&str; 5] = ["import", "pull", "push", "tag", "verify"];
const NAME_BYTES_MAX: usize = 63;
/// Stands for an image where none is asked for.
const NO_IMAGE: &str = "none";

/// For the contract: what an operator may call a language.
const LANGUAGE_PATTERN: &str = "^[a-z][a-z0-9+-]{0,31}$";
/// For the contract: parts with slashes between, none of them `..`, the last neither that nor `.`.
const FILE_PATTERN: &str = "^/*(([^/.\\u0000][^/\\u0000]*|\\.[^/.\\u0000][^/\\u0000]*|\\.\\.[^/\\u0000]+|\\.)/+)*([^/.\\u0000][^/\\u0000]*|\\.[^/.\\u0000][^/\\u0000]*|\\.\\.[^/\\u0000]+)$";
/// For the contract: what [`User::parse`] takes, but for names that begin with a digit.
pub(super) const USER_PATTERN: &str = "^(|([A-Za-z._$-][A-Za-z0-9._$-]{0,63}|[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-4])\
                            (:([A-Za-z._$-][A-Za-z0-9._$-]{0,63}|[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-4]))?)$";

/// A field of a request that cannot be accepted, and what it may hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {detail}")]
pub struct Invalid {
    /// Dotted path, as in `limits.pids` or `files[2].path`. Empty: the body as a whole.
    pub field: String,
    pub detail: String,
    pub bound: Option<&'static Bound>,
}

impl Invalid {
    pub fn new(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { field: field.into(), detail: detail.into(), bound: None }
    }

    pub(super) fn out_of(bound: &'static Bound, value: u64) -> Self {
        let Bound { field, unit, min, max, .. } = bound;
        Self { field: (*field).to_owned(), detail: format!("{value} is out of range: {min} to {max} {unit}"), bound: Some(bound) }
    }
}

/// Body of `POST /v1/runs`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    #[serde(default, deserialize_with = "given")]
    #[schema(required = false, value_type = words::Reference)]
    image: Option<String>,
    /// One of `GET /v1/languages`, in place of an image and a command. With it comes `source`.
    #[serde(default, deserialize_with = "given")]
    #[schema(required = false, value_type = String, extensions(("x-schema" = json!({ "pattern": LANGUAGE_PATTERN }))))]
    language: Option<String>,
    /// A program's text in that language.
    #[serde(default, deserialize_with = "given")]
    #[schema(required = false, value_type = String, extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    source: Option<String>,
    /// What is run before the program, in a sandbox of its own. A language that is compiled has one without being asked for it. Not under gVisor.
    compile: Option<CompileRequest>,
    /// In place of the image's; an empty list: none. Without one, what the image has.
    #[schema(value_type = Option<words::Entrypoint>)]
    entrypoint: Option<Vec<String>>,
    /// Arguments of the entry point; without one, program and arguments. Without a command here, the image's, if the entry point is the image's, too.
    #[schema(value_type = Option<words::Command>)]
    command: Option<Vec<String>>,
    /// Absolute path; absent, the image's. Made if it is missing.
    #[schema(pattern = "^/[^\\u0000]*$", extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX }))))]
    workdir: Option<String>,
    /// Whom to run as instead of the image's user: a name or a number, and a group behind a colon. Names are looked up in the image's own files.
    /// A number alone brings the groups that the image gives it.
    #[schema(extensions(("x-schema" = json!({ "pattern": USER_PATTERN }))))]
    user: Option<String>,
    #[serde(default)]
    capabilities: Capabilities,
    #[serde(default = "container")]
    #[schema(value_type = words::Isolation)]
    isolation: Isolation,
    /// Put into the sandbox before the start, as its user.
    #[serde(default)]
    #[schema(max_items = 1024)]
    files: Vec<FileRequest>,
    /// The program's standard input; absent, there is nothing to read. Not beside `cases`, which have their own.
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    stdin: Option<String>,
    #[serde(default)]
    stdin_encoding: Encoding,
    /// The program is run once for each, one after another, each time in a fresh sandbox with the run's files, or with what its compile step left, and with all of the run's limits.
    #[schema(min_items = 1, max_items = 64)]
    cases: Option<Vec<CaseRequest>>,
    /// How the output of a case is held against what is expected; without this word, `trimmed`. Only with `cases`.
    comparison: Option<Comparison>,
    /// Whether the cases behind the first that is not accepted are left out; without this word they are not. Only with `cases`.
    stop_at_failure: Option<bool>,
    #[serde(default)]
    #[schema(value_type = words::Env)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "object")]
    limits: RequestedLimits,
    #[serde(default = "truncate")]
    #[schema(value_type = words::OutputPolicy)]
    output_policy: OutputPolicy,
    #[serde(default)]
    network: Network,
    #[serde(default)]
    pull: PullPolicy,
    #[serde(default)]
    when_full: WhenFull,
    /// The tenant's volumes that are to stand in it. Not under gVisor.
    #[serde(default)]
    #[schema(max_items = 16)]
    volumes: Vec<MountRequest>,
    /// How long to wait for the end, in milliseconds.
    #[schema(extensions(("x-bound" = json!(WAIT_MS))))]
    wait_ms: Option<u64>,
    /// How often the run is tried again, on another node if there is one, when this service failed it (`infra_error`). Never after any other outcome. A program whose
    /// node died may then have run, in part, before.
    #[schema(extensions(("x-bound" = json!(RETRY))))]
    retry: Option<u64>,
}

/// A step before the program, in a sandbox of its own that has the run's files, image, working folder, user and capabilities. If it exits with 0, the program is started in a
/// fresh sandbox on the files as they then are, and is given the run's `stdin`; otherwise it is not started, and the run's `outcome` says `compile_failed`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewCompile)]
struct CompileRequest {
    /// Program and arguments, without the image's entry point. Needed with an image; a language has its own.
    #[schema(value_type = Option<words::Command>)]
    command: Option<Vec<String>>,
    /// Its own, over the image's; the program's is not there.
    #[serde(default)]
    #[schema(value_type = words::Env)]
    env: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "object")]
    limits: RequestedCompileLimits,
}

/// One input for the program of a run, and what is expected of it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewCase)]
struct CaseRequest {
    /// For people.
    #[schema(max_length = 64, pattern = "^[^\\u0000]*$")]
    name: Option<String>,
    /// As that of a run.
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    stdin: Option<String>,
    #[serde(default)]
    stdin_encoding: Encoding,
    /// What the program is to write to its standard output; absent, whatever it writes will do.
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    expected_stdout: Option<String>,
    #[serde(default)]
    expected_stdout_encoding: Encoding,
}

/// Body of `POST /v1/sandboxes`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SandboxRequest {
    /// Needed, unless a `pool` is named.
    #[serde(default, deserialize_with = "given")]
    #[schema(required = false, value_type = words::Reference)]
    image: Option<String>,
    /// Take a sandbox that is ready from the tenant's pool of this name; if none is, make one of its template. Beside it may stand `name`, `labels`, `ttl_ms`, `idle_timeout_ms` and `when_full`:
    /// they go over what the template says.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pool: Option<String>,
    /// Given once to a tenant.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    name: Option<String>,
    /// In place of the image's; an empty list: none. Without one, what the image has.
    #[schema(value_type = Option<words::Entrypoint>)]
    entrypoint: Option<Vec<String>>,
    /// Arguments of the entry point; without one, program and arguments. Without a command here, the image's, if the entry point is the image's, too.
    #[schema(value_type = Option<words::Command>)]
    command: Option<Vec<String>>,
    /// Absolute path; absent, the image's. Made if it is missing.
    #[schema(pattern = "^/[^\\u0000]*$", extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX }))))]
    workdir: Option<String>,
    /// Whom to run as instead of the image's user: a name or a number, and a group behind a colon. Names are looked up in the image's own files.
    /// A number alone brings the groups that the image gives it.
    #[schema(extensions(("x-schema" = json!({ "pattern": USER_PATTERN }))))]
    user: Option<String>,
    #[serde(default)]
    capabilities: Capabilities,
    #[serde(default = "container")]
    #[schema(value_type = words::Isolation)]
    isolation: Isolation,
    /// Put into the sandbox before the start, as its user.
    #[serde(default)]
    #[schema(max_items = 1024)]
    files: Vec<FileRequest>,
    /// The program's standard input; absent, there is nothing to read.
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    stdin: Option<String>,
    #[serde(default)]
    stdin_encoding: Encoding,
    #[serde(default)]
    #[schema(value_type = words::Env)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "object")]
    limits: RequestedLimits,
    #[serde(default = "truncate")]
    #[schema(value_type = words::OutputPolicy)]
    output_policy: OutputPolicy,
    #[serde(default)]
    network: Network,
    #[serde(default)]
    pull: PullPolicy,
    #[serde(default)]
    when_full: WhenFull,
    /// The tenant's volumes that are to stand in it. Not under gVisor.
    #[serde(default)]
    #[schema(max_items = 16)]
    volumes: Vec<MountRequest>,
    /// How long it lives from its creation, in milliseconds; absent, until its end or its deletion.
    #[schema(extensions(("x-bound" = json!(TTL_MS))))]
    ttl_ms: Option<u64>,
    /// It is ended when it has written no output, was given no input and was asked for nothing inside for so long. Not while it is paused.
    #[schema(extensions(("x-bound" = json!(IDLE_TIMEOUT_MS))))]
    idle_timeout_ms: Option<u64>,
    /// Remove it, with its log, when it has ended. How it ended is told by its event.
    #[serde(default)]
    auto_remove: bool,
    /// Keep what it wrote when it ends, until it is deleted: it can be started again, and its files can be worked on.
    #[serde(default)]
    keep_layer: bool,
    /// Keep its standard input open for whoever attaches.
    #[serde(default)]
    stdin_open: bool,
    /// Give it a terminal: `true`, or with its size.
    #[serde(default)]
    tty: TtyRequest,
    /// Instead of the image's, or SIGTERM.
    #[schema(value_type = Option<words::SignalGiven>)]
    stop_signal: Option<SignalRequest>,
    /// How long it has after that signal before it is killed, in milliseconds.
    #[schema(extensions(("x-bound" = json!(STOP_GRACE_MS))))]
    stop_grace_ms: Option<u64>,
}

/// What each sandbox of a pool is: a request for a sandbox, without what only one of them can have, and without what depends on when it is asked for. `labels`, `ttl_ms` and `idle_timeout_ms` are for
/// requests that name the pool and say nothing else; times count from the taking.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PoolTemplate)]
pub struct TemplateRequest {
    #[schema(value_type = words::Reference)]
    image: String,
    /// In place of the image's; an empty list: none. Without one, what the image has.
    #[schema(value_type = Option<words::Entrypoint>)]
    entrypoint: Option<Vec<String>>,
    /// Arguments of the entry point; without one, program and arguments. Without a command here, the image's, if the entry point is the image's, too.
    #[schema(value_type = Option<words::Command>)]
    command: Option<Vec<String>>,
    /// Absolute path; absent, the image's. Made if it is missing.
    #[schema(pattern = "^/[^\\u0000]*$", extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX }))))]
    workdir: Option<String>,
    /// As that of a sandbox.
    #[schema(extensions(("x-schema" = json!({ "pattern": USER_PATTERN }))))]
    user: Option<String>,
    #[serde(default)]
    capabilities: Capabilities,
    #[serde(default = "container")]
    #[schema(value_type = words::Isolation)]
    isolation: Isolation,
    /// Put into the sandbox before the start, as its user.
    #[serde(default)]
    #[schema(max_items = 1024)]
    files: Vec<FileRequest>,
    /// The program's standard input; absent, there is nothing to read.
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    stdin: Option<String>,
    #[serde(default)]
    stdin_encoding: Encoding,
    #[serde(default)]
    #[schema(value_type = words::Env)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "object")]
    limits: RequestedLimits,
    #[serde(default = "truncate")]
    #[schema(value_type = words::OutputPolicy)]
    output_policy: OutputPolicy,
    #[serde(default)]
    network: Network,
    /// From the taking on, in milliseconds.
    #[schema(extensions(("x-bound" = json!(TTL_MS))))]
    ttl_ms: Option<u64>,
    /// Likewise.
    #[schema(extensions(("x-bound" = json!(IDLE_TIMEOUT_MS))))]
    idle_timeout_ms: Option<u64>,
    /// Remove it, with its log, when it has ended.
    #[serde(default)]
    auto_remove: bool,
    /// Keep its standard input open for whoever attaches.
    #[serde(default)]
    stdin_open: bool,
    /// Give it a terminal: `true`, or with its size.
    #[serde(default)]
    tty: TtyRequest,
    /// Instead of the image's, or SIGTERM.
    #[schema(value_type = Option<words::SignalGiven>)]
    stop_signal: Option<SignalRequest>,
    /// How long it has after that signal before it is killed, in milliseconds.
    #[schema(extensions(("x-bound" = json!(STOP_GRACE_MS))))]
    stop_grace_ms: Option<u64>,
}

impl From<TemplateRequest> for SandboxRequest {
    fn from(template: TemplateRequest) -> Self {
        let TemplateRequest { image, entrypoint, command, workdir, user, capabilities, isolation, files, stdin, stdin_encoding, .. } =
            template;
        Self {
            image: Some(image),
            pool: None,
            name: None,
            entrypoint,
            command,
            workdir,
            user,
            capabilities,
            isolation,
            files,
            stdin,
            stdin_encoding,
            env: template.env,
            labels: template.labels,
            limits: template.limits,
            output_policy: template.output_policy,
            network: template.network,
            pull: PullPolicy::Never,
            when_full: WhenFull::Queue,
            volumes: Vec::new(),
            ttl_ms: template.ttl_ms,
            idle_timeout_ms: template.idle_timeout_ms,
            auto_remove: template.auto_remove,
            keep_layer: false,
            stdin_open: template.stdin_open,
            tty: template.tty,
            stop_signal: template.stop_signal,
            stop_grace_ms: template.stop_grace_ms,
        }
    }
}

impl TemplateRequest {
    /// What each sandbox is, or the first field that is wrong.
    pub fn parse(self) -> Result<NewSandbox, Invalid> {
        SandboxRequest::from(self).parse_like()
    }
}

/// Whether a program gets a terminal, and of which size.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = Terminal)]
#[serde(untagged, expecting = "a terminal is true, false, or its size: {\"rows\": 24, \"columns\": 80}")]
pub(super) enum TtyRequest {
    Wanted(bool),
    Sized(TtySize),
}

/// In characters.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TerminalAsked)]
pub(super) struct TtySize {
    #[schema(extensions(("x-bound" = json!(Bound { default: None, ..TTY_ROWS }))))]
    rows: u64,
    #[schema(extensions(("x-bound" = json!(Bound { default: None, ..TTY_COLUMNS }))))]
    columns: u64,
}

impl Default for TtyRequest {
    fn default() -> Self {
        Self::Wanted(false)
    }
}

impl TtyRequest {
    /// The terminal's size, if there is to be one.
    pub(super) fn parse(self) -> Result<Option<WindowSize>, Invalid> {
        let size = |rows, columns| Some(WindowSize { rows, columns });
        let narrow = |bound: &'static Bound, value| bound.check(value).map(|value| u16::try_from(value).unwrap_or(u16::MAX));
        match self {
            Self::Wanted(false) => Ok(None),
            Self::Wanted(true) => Ok(size(24, 80)),
            Self::Sized(TtySize { rows, columns }) => Ok(size(narrow(&TTY_ROWS, rows)?, narrow(&TTY_COLUMNS, columns)?)),
        }
    }
}

/// A file to be put into a sandbox before its start.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewFile)]
struct FileRequest {
    /// Absolute, or relative to the working folder; through no `..`. Missing folders are made.
    #[schema(min_length = 1, extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX, "pattern": FILE_PATTERN }))))]
    path: String,
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    content: String,
    #[serde(default)]
    encoding: Encoding,
    /// Permission bits, octal.
    #[schema(pattern = "^0?[0-7]{3}$", default = "0644")]
    mode: Option<String>,
}

/// What is there is no null: an absent field is the way to say nothing.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    String::deserialize(deserializer).map(Some)
}

/// An object. For serde a list would do, too: of the fields' values in their order.
pub(super) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Members<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(members))
        }
    }

    deserializer.deserialize_map(Members(PhantomData))
}

/// What a run is made of: an image, or what its language says.
struct Made {
    image: ImageReference,
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    source: Option<File>,
    limits: RequestedLimits,
    compile: Option<Step>,
}

/// A compile step before its limits are held against those of the run.
struct Step {
    command: Vec<String>,
    env: BTreeMap<String, String>,
    requested: RequestedLimits,
    defaults: RequestedLimits,
}

/// How bytes stand in the text beside it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(default = "utf-8")]
pub enum Encoding {
    #[default]
    #[serde(rename = "utf-8")]
    Utf8,
    #[serde(rename = "base64")]
    Base64,
}

const fn container() -> Isolation {
    Isolation::Container
}

/// What of the network it reaches. `none` is its own loopback alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(default = "none")]
pub enum Network {
    #[default]
    None,
}

/// What becomes of the request when there is no room now, or others wait: it waits its turn, or is refused with `no_capacity`. Room is shared by weight between
/// tenants and evenly between a tenant's principals; what does not fit is passed over for a while, and then room is held free for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(default = "queue")]
pub enum WhenFull {
    /// It waits its turn.
    #[default]
    Queue,
    Refuse,
}

/// Whether the image is pulled from its registry first: `never`, so that it must be here; where it is `missing`; or `always`. It becomes the caller's tenant's own, and is pulled with
/// what the tenant is known by there, if it keeps that (`/v1/registries`). That needs the scope `images:write`, too. What is being pulled when the answer must come goes on, and is joined by who asks again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(default = "never")]
pub enum PullPolicy {
    #[default]
    Never,
    Missing,
    Always,
}

pub(super) const fn truncate() -> OutputPolicy {
    OutputPolicy::Truncate
}

/// Bytes for the payload.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Content(pub Vec<u8>);

impl fmt::Debug for Content {
    /// The length alone: what a tenant sends belongs in no log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// A file to be put into the sandbox before its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub path: String,
    pub mode: u32,
    pub content: Content,
}

/// The name of an image, with a form that it may have.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference(String);

impl ImageReference {
    /// Checks the form: 1 to 256 of letters, digits and `._/:@-`, beginning with a letter or digit.
    pub fn parse(field: &str, text: String) -> Result<Self, Invalid> {
        let is_sound = (1..=REFERENCE_BYTES_MAX).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/:@-".contains(&b));
        is_sound.then_some(Self(text)).ok_or_else(|| {
            Invalid::new(field, "an image reference is 1 to 256 letters, digits and ._/:@-, beginning with a letter or digit")
        })
    }

    /// [`ImageReference::parse`] of one that an image is to be given: it could be read by no one if it had the name of a route beside it.
    pub fn parse_new(field: &str, text: String) -> Result<Self, Invalid> {
        if ROUTES.contains(&text.as_str()) {
            return Err(Invalid::new(field, "no image can have the name of a route"));
        }
        Self::parse(field, text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A sandbox as asked for, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSandbox {
    pub kind: Kind,
    pub image: ImageReference,
    pub name: Option<String>,
    /// Instead of the image's.
    pub entrypoint: Option<Vec<String>>,
    pub command: Option<Vec<String>>,
    /// What is run before that.
    pub compile: Option<NewCompile>,
    pub workdir: Option<String>,
    /// Whom to run as instead of the image's user.
    pub user: Option<User>,
    pub capabilities: Capabilities,
    pub isolation: Isolation,
    pub files: Vec<File>,
    pub stdin: Option<Content>,
    /// What its program is run with, one after another; of a run without cases none.
    pub cases: Vec<NewCase>,
    pub judging: Option<Judging>,
    /// Whether its input stays open for whoever attaches.
    pub stdin_open: bool,
    pub terminal: Option<WindowSize>,
    /// Instead of the image's.
    pub stop_signal: Option<Signal>,
    pub stop_grace_ms: u64,
    pub env: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// As they were asked for.
    pub requested: RequestedLimits,
    /// Where nothing was asked for: those of its language, which are no wish of its creator's.
    pub defaults: RequestedLimits,
    /// With defaults where nothing was asked for.
    pub limits: Limits,
    pub output_policy: OutputPolicy,
    pub ttl_ms: Option<u64>,
    pub idle_timeout_ms: Option<u64>,
    pub auto_remove: bool,
    pub keep_layer: bool,
    pub volumes: Vec<MountRequest>,
    pub pull: PullPolicy,
    pub when_full: WhenFull,
    /// How often it is tried again after an `infra_error`.
    pub retries: u32,
}

impl RunRequest {
    /// The sandbox, as one of many that are asked for together and waited for together; or the first field that is wrong.
    pub fn parse_in_batch(self, languages: &Languages) -> Result<NewSandbox, Invalid> {
        if self.pull != PullPolicy::Never {
            return Err(Invalid::new("pull", "of many runs none waits for an image: pull it before, by a request of its own"));
        }
        // Clients that were generated say every default.
        self.parse(languages).map(|(sandbox, _)| sandbox)
    }

    /// The sandbox and how long to wait for its end, in milliseconds; or the first field that is wrong.
    pub fn parse(self, languages: &Languages) -> Result<(NewSandbox, u64), Invalid> {
        let Network::None = self.network;
        let asked = (entrypoint(self.entrypoint)?, command(self.command)?);
        let compile = self.compile.map(CompileRequest::parse).transpose()?;
        let Made { image, entrypoint, command, source, limits, compile } =
            made(self.image, self.language, self.source, asked, compile, languages)?;
        let mut files = files(self.files)?;
        if let Some(source) = source {
            if let Some(at) = files.iter().position(|file| file.path == source.path) {
                return Err(Invalid::new(format!("files[{at}].path"), "that is where the source text is put"));
            }
            files.push(source);
        }
        let (in_force, compile_limits) =
            Limits::of_steps(self.limits.or(limits), compile.as_ref().map(|step| step.requested.or(step.defaults)))?;
        let compile = compile.zip(compile_limits).map(|(Step { command, env, requested, defaults }, limits)| NewCompile {
            command,
            env,
            requested,
            defaults,
            limits,
        });
        if compile.is_some() && self.isolation != Isolation::Container {
            return Err(Invalid::new("isolation", "what a compile step leaves is not kept under gVisor"));
        }
        let wait_ms = match self.wait_ms {
            Some(ms) => WAIT_MS.check(ms)?,
            None => 30_000,
        };
        let retries = RETRY.check(self.retry.unwrap_or(0))?;
        let judging = judging(self.cases.is_some(), self.comparison, self.stop_at_failure)?;
        if judging.is_some() && self.stdin.is_some() {
            return Err(Invalid::new("stdin", "a run with cases has none of its own: each case has"));
        }
        if judging.is_some() && self.output_policy == OutputPolicy::Discard {
            return Err(Invalid::new("output_policy", "what is discarded cannot be judged: a run with cases keeps its output"));
        }
        let sandbox = NewSandbox {
            kind: Kind::Run,
            image,
            name: None,
            entrypoint,
            command,
            compile,
            workdir: workdir(self.workdir)?,
            user: self.user.map(|user| User::parse("user", &user)).transpose()?,
            capabilities: self.capabilities,
            isolation: self.isolation,
            files,
            stdin: stdin(self.stdin, self.stdin_encoding)?,
            cases: self.cases.map(cases).transpose()?.unwrap_or_default(),
            judging,
            stdin_open: false,
            terminal: None,
            stop_signal: None,
            stop_grace_ms: STOP_GRACE_DEFAULT_MS,
            env: env(self.env)?,
            labels: labels(self.labels)?,
            requested: self.limits,
            defaults: limits,
            limits: in_force,
            output_policy: self.output_policy,
            ttl_ms: None,
            idle_timeout_ms: None,
            auto_remove: false,
            keep_layer: false,
            volumes: volumes(self.volumes, self.isolation)?,
            pull: self.pull,
            when_full: self.when_full,
            retries: u32::try_from(retries).unwrap_or(u32::MAX),
        };
        sandbox.args_and_env_fit().map(|()| (sandbox, wait_ms))
    }
}

impl SandboxRequest {
    /// What is wanted, or the first field that is wrong.
    pub fn parse(mut self) -> Result<Wanted, Invalid> {
        let Some(pool) = self.pool.take() else { return self.parse_like().map(|asked| Wanted::Like(Box::new(asked))) };
        let pool = check_name(pool).map_err(|invalid| Invalid { field: "pool".to_owned(), ..invalid })?;
        if self.image.is_some() {
            return Err(Invalid::new("image", "a sandbox of a pool has that of its template"));
        }
        let when_full = self.when_full;
        let asked = Self { image: Some(NO_IMAGE.to_owned()), ..self }.parse_like()?;
        // Clients that were generated say every default.
        if asked.pull != PullPolicy::Never || Template::of(&asked) != Template::of(&Self::bare().parse_like()?) {
            return Err(Invalid::new(
                "pool",
                "beside a pool stand only name, labels, ttl_ms, idle_timeout_ms and when_full: all else is its template's",
            ));
        }
        Ok(Wanted::OfPool { pool, personal: asked.personal(), when_full })
    }

    /// Nothing but an image.
    fn bare() -> Self {
        serde_json::from_value(serde_json::json!({ "image": NO_IMAGE })).expect("an image is all that is needed")
    }

    fn parse_like(self) -> Result<NewSandbox, Invalid> {
        let Network::None = self.network;
        let image = self.image.ok_or_else(|| Invalid::new("image", "this field is missing, or `pool` in its place"))?;
        let sandbox = NewSandbox {
            kind: Kind::Sandbox,
            image: ImageReference::parse("image", image)?,
            name: self.name.map(check_name).transpose()?,
            entrypoint: entrypoint(self.entrypoint)?,
            command: command(self.command)?,
            compile: None,
            workdir: workdir(self.workdir)?,
            user: self.user.map(|user| User::parse("user", &user)).transpose()?,
            capabilities: self.capabilities,
            isolation: self.isolation,
            files: files(self.files)?,
            stdin: stdin(self.stdin, self.stdin_encoding)?,
            cases: vec![],
            judging: None,
            stdin_open: self.stdin_open,
            terminal: self.tty.parse()?,
            stop_signal: self.stop_signal.map(|signal| signal.parse("stop_signal")).transpose()?,
            stop_grace_ms: self.stop_grace_ms.map_or(Ok(STOP_GRACE_DEFAULT_MS), |ms| STOP_GRACE_MS.check(ms))?,
            env: env(self.env)?,
            labels: labels(self.labels)?,
            requested: self.limits,
            defaults: RequestedLimits::default(),
            limits: Limits::of(Kind::Sandbox, self.limits)?,
            output_policy: self.output_policy,
            ttl_ms: self.ttl_ms.map(|ms| TTL_MS.check(ms)).transpose()?,
            idle_timeout_ms: self.idle_timeout_ms.map(|ms| IDLE_TIMEOUT_MS.check(ms)).transpose()?,
            auto_remove: self.auto_remove,
            keep_layer: self.keep_layer,
            volumes: volumes(self.volumes, self.isolation)?,
            pull: self.pull,
            when_full: self.when_full,
            retries: 0,
        };
        if sandbox.stdin.is_some() && (sandbox.stdin_open || sandbox.terminal.is_some()) {
            let field = if sandbox.stdin_open { "stdin_open" } else { "tty" };
            return Err(Invalid::new(field, "what is given as stdin is all that is read: it goes neither with stdin_open nor with tty"));
        }
        if sandbox.keep_layer && (sandbox.auto_remove || sandbox.isolation != Isolation::Container) {
            return Err(Invalid::new("keep_layer", "a layer is kept neither of what is removed at its end nor under gVisor"));
        }
        sandbox.args_and_env_fit().map(|()| sandbox)
    }
}

impl NewSandbox {
    /// What of the network it reaches, as quotas name it.
    pub const fn network(&self) -> &'static str {
        "none"
    }

    /// What stands between it and the kernel, as quotas name it.
    pub const fn isolation(&self) -> &'static str {
        match self.isolation {
            Isolation::Container => "container",
            Isolation::Gvisor => "gvisor",
        }
    }

    fn args_and_env_fit(&self) -> Result<(), Invalid> {
        fit("", [self.entrypoint.as_deref(), self.command.as_deref()], &self.env)?;
        self.compile.as_ref().map_or(Ok(()), |step| fit("compile.", [None, Some(&step.command)], &step.env))
    }
}

/// Whether entry point, command and environment are not too much together. What is told is the largest of the three.
pub(super) fn fit(of: &str, [entrypoint, command]: [Option<&[String]>; 2], env: &BTreeMap<String, String>) -> Result<(), Invalid> {
    let args = |args: Option<&[String]>| args.into_iter().flatten().map(|arg| arg.len() + 1).sum::<usize>();
    let env = env.iter().map(|(key, value)| key.len() + value.len() + 2).sum::<usize>();
    let parts = [("entrypoint", args(entrypoint)), ("env", env), ("command", args(command))];
    let bytes: usize = parts.iter().map(|(_, bytes)| bytes).sum();
    let largest = parts.iter().max_by_key(|(_, bytes)| bytes).map_or("command", |(field, _)| field);
    if bytes > ARGS_ENV_BYTES_MAX {
        let detail = format!("entrypoint, command and env together are {bytes} bytes; at most {ARGS_ENV_BYTES_MAX}");
        return Err(Invalid::new(format!("{of}{largest}"), detail));
    }
    Ok(())
}

/// What is asked of a compile step.
struct CompileAsked {
    command: Option<Vec<String>>,
    env: BTreeMap<String, String>,
    limits: RequestedLimits,
}

impl CompileRequest {
    fn parse(self) -> Result<CompileAsked, Invalid> {
        let of_step = |invalid: Invalid| Invalid { field: format!("compile.{}", invalid.field), ..invalid };
        Ok(CompileAsked {
            command: command(self.command).map_err(of_step)?,
            env: env(self.env).map_err(of_step)?,
            limits: self.limits.into(),
        })
    }
}

fn volumes(volumes: Vec<MountRequest>, isolation: Isolation) -> Result<Vec<MountRequest>, Invalid> {
    if !volumes.is_empty() && isolation != Isolation::Container {
        return Err(Invalid::new("volumes", "there are no volumes under gVisor"));
    }
    volume::mounts(volumes)
}

pub(super) fn entrypoint(entrypoint: Option<Vec<String>>) -> Result<Option<Vec<String>>, Invalid> {
    if entrypoint.as_ref().and_then(|args| args.first()).is_some_and(String::is_empty) {
        return Err(Invalid::new("entrypoint", "the first element names the program and cannot be empty"));
    }
    sound_args("entrypoint", entrypoint)
}

fn made(
    image: Option<String>,
    language: Option<String>,
    source: Option<String>,
    (entrypoint, command): (Option<Vec<String>>, Option<Vec<String>>),
    compile: Option<CompileAsked>,
    languages: &Languages,
) -> Result<Made, Invalid> {
    let (image, language) = match (image, language) {
        (Some(_), Some(_)) => return Err(Invalid::new("language", "a run has an image or a language, not both")),
        (None, None) => return Err(Invalid::new("image", "this field is missing, or `language` with `source` in its place")),
        both => both,
    };
    if let Some(image) = image {
        if source.is_some() {
            return Err(Invalid::new("source", "only a run in a `language` has this; with an image it is one of `files`"));
        }
        let image = ImageReference::parse("image", image)?;
        let compile = compile.map(|CompileAsked { command, env, limits }| {
            let command =
                command.ok_or_else(|| Invalid::new("compile.command", "this field is missing: the program, and its arguments"))?;
            Ok(Step { command, env, requested: limits, defaults: RequestedLimits::default() })
        });
        return Ok(Made { image, entrypoint, command, source: None, limits: RequestedLimits::default(), compile: compile.transpose()? });
    }
    let name = language.unwrap_or_default();
    let language = languages
        .get(&name)
        .ok_or_else(|| Invalid::new("language", format!("there is no such language; there are {}", languages.names())))?;
    let text = source.ok_or_else(|| Invalid::new("source", "this field is missing: the program's text"))?;
    let compile_command = compile.as_ref().and_then(|asked| asked.command.clone());
    for (field, given) in [("entrypoint", &entrypoint), ("command", &command), ("compile.command", &compile_command)] {
        if given.is_some() {
            return Err(Invalid::new(field, "a language has its own"));
        }
    }
    if compile.is_some() && language.compile.is_none() {
        return Err(Invalid::new("compile", format!("{name} is not compiled")));
    }
    let compile = language.compile.clone().map(|command| {
        let (env, limits) = compile.map(|asked| (asked.env, asked.limits)).unwrap_or_default();
        Step { command, env, requested: limits, defaults: language.compile_limits.into() }
    });
    Ok(Made {
        image: ImageReference::parse("image", language.image.clone())?,
        // The image's own would stand before it.
        entrypoint: Some(vec![]),
        command: Some(language.run.clone()),
        source: Some(File { path: language.file.clone(), mode: 0o644, content: Content(text.into_bytes()) }),
        limits: language.limits,
        compile,
    })
}

pub(super) fn command(command: Option<Vec<String>>) -> Result<Option<Vec<String>>, Invalid> {
    if command.as_ref().is_some_and(|args| args.first().is_none_or(String::is_empty)) {
        return Err(Invalid::new("command", "the first element names the program and cannot be empty"));
    }
    sound_args("command", command)
}

fn sound_args(field: &str, args: Option<Vec<String>>) -> Result<Option<Vec<String>>, Invalid> {
    let count = args.as_ref().map_or(0, Vec::len);
    if count > ARGS_MAX {
        return Err(Invalid::new(field, format!("{count} arguments; at most {ARGS_MAX}")));
    }
    match args.iter().flatten().position(|arg| arg.contains('\0')) {
        Some(at) => Err(Invalid::new(format!("{field}[{at}]"), "no argument can hold a zero byte")),
        None => Ok(args),
    }
}

pub(super) fn workdir(workdir: Option<String>) -> Result<Option<String>, Invalid> {
    let Some(path) = workdir else { return Ok(None) };
    let is_sound = path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\0');
    is_sound.then_some(Some(path)).ok_or_else(|| Invalid::new("workdir", "a working folder is an absolute path of at most 4095 bytes"))
}

pub(super) fn stdin(stdin: Option<String>, encoding: Encoding) -> Result<Option<Content>, Invalid> {
    stdin.map(|text| encoding.decode(text).map_err(|detail| Invalid::new("stdin", detail))).transpose()
}

/// How cases are judged, if there are some.
fn judging(has_cases: bool, comparison: Option<Comparison>, stop_at_failure: Option<bool>) -> Result<Option<Judging>, Invalid> {
    if has_cases {
        let judging = Judging { comparison: comparison.unwrap_or_default(), stop_at_failure: stop_at_failure.unwrap_or(false) };
        return Ok(Some(judging));
    }
    for (field, is_given) in [("comparison", comparison.is_some()), ("stop_at_failure", stop_at_failure.is_some())] {
        if is_given {
            return Err(Invalid::new(field, "only a run with cases has this"));
        }
    }
    Ok(None)
}

fn cases(cases: Vec<CaseRequest>) -> Result<Vec<NewCase>, Invalid> {
    if !(1..=CASES_MAX).contains(&cases.len()) {
        return Err(Invalid::new("cases", format!("{} cases; a run has 1 to {CASES_MAX}, or none of this field", cases.len())));
    }
    cases.into_iter().enumerate().map(|(at, case)| case.parse(at)).collect()
}

impl CaseRequest {
    fn parse(self, at: usize) -> Result<NewCase, Invalid> {
        let field = |name: &str| format!("cases[{at}].{name}");
        if self.name.as_ref().is_some_and(|name| name.chars().count() > CASE_NAME_CHARACTERS_MAX || name.contains('\0')) {
            return Err(Invalid::new(field("name"), "the name of a case is at most 64 characters, none of them zero"));
        }
        let decoded = |name: &str, text: Option<String>, encoding: Encoding| {
            text.map(|text| encoding.decode(text).map_err(|detail| Invalid::new(field(name), detail))).transpose()
        };
        Ok(NewCase {
            name: self.name,
            stdin: decoded("stdin", self.stdin, self.stdin_encoding)?,
            expected_stdout: decoded("expected_stdout", self.expected_stdout, self.expected_stdout_encoding)?,
        })
    }
}

pub(super) fn env(env: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Invalid> {
    if env.len() > ENV_MAX {
        return Err(Invalid::new("env", format!("{} variables; at most {ENV_MAX}", env.len())));
    }
    for (key, value) in &env {
        if key.is_empty() || key.contains(['=', '\0']) {
            return Err(Invalid::new("env", "the name of a variable is not empty and holds neither = nor a zero byte"));
        }
        if value.contains('\0') {
            return Err(Invalid::new(format!("env.{key}"), "no value can hold a zero byte"));
        }
    }
    Ok(env)
}

fn labels(labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Invalid> {
    check_labels(&labels).map(|()| labels)
}

/// Whether a sandbox may have all these.
pub(super) fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), Invalid> {
    if labels.len() > LABELS_MAX {
        return Err(Invalid::new("labels", format!("{} labels; at most {LABELS_MAX}", labels.len())));
    }
    for (key, value) in labels {
        check_label(key, value).map_err(|fault| match fault {
            LabelFault::Key(detail) => Invalid::new("labels", detail),
            LabelFault::Value(detail) => Invalid::new(format!("labels.{key}"), detail),
        })?;
    }
    Ok(())
}

/// What no sandbox's label is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelFault {
    Key(&'static str),
    Value(&'static str),
}

/// Whether a sandbox can have this label.
pub fn check_label(key: &str, value: &str) -> Result<(), LabelFault> {
    let is_sound = (1..=LABEL_KEY_BYTES_MAX).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b));
    if !is_sound {
        return Err(LabelFault::Key("the key of a label is 1 to 63 letters, digits and ._/-"));
    }
    if value.len() > LABEL_VALUE_BYTES_MAX || value.contains('\0') {
        return Err(LabelFault::Value("the value of a label is at most 256 bytes, none of them zero"));
    }
    Ok(())
}

/// A name that a sandbox may have. Objects are asked for by id or by name in one place, so none looks like an id.
pub fn check_name(name: String) -> Result<String, Invalid> {
    let is_sound = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.parse::<SandboxId>().is_err()
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    is_sound
        .then_some(name)
        .ok_or_else(|| Invalid::new("name", "a name is 1 to 63 letters, digits and ._-, beginning with a letter or digit, and is no id"))
}

/// The beginning of a name that a sandbox may have.
pub fn check_name_prefix(prefix: String) -> Result<String, Invalid> {
    let is_sound = (1..=NAME_BYTES_MAX).contains(&prefix.len()) && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    is_sound.then_some(prefix).ok_or_else(|| Invalid::new("name", "names begin with 1 to 63 letters, digits and ._-"))
}

fn files(files: Vec<FileRequest>) -> Result<Vec<File>, Invalid> {
    if files.len() > FILES_MAX {
        return Err(Invalid::new("files", format!("{} files; at most {FILES_MAX}", files.len())));
    }
    files.into_iter().enumerate().map(|(at, file)| file.parse(at)).collect()
}

impl FileRequest {
    fn parse(self, at: usize) -> Result<File, Invalid> {
        let is_sound = (1..=PATH_BYTES_MAX).contains(&self.path.len())
            && !self.path.contains('\0')
            && !self.path.ends_with('/')
            && self.path.split('/').all(|part| part != "..")
            && self.path != ".";
        if !is_sound {
            let detail = "the path of a file is 1 to 4095 bytes, names a file, and goes through no `..`";
            return Err(Invalid::new(format!("files[{at}].path"), detail));
        }
        let mode = match self.mode.as_deref() {
            None => 0o644,
            Some(text) => mode(text).ok_or_else(|| {
                Invalid::new(format!("files[{at}].mode"), "a mode is three octal digits with an optional leading zero, as in \"0755\"")
            })?,
        };
        let content = self.encoding.decode(self.content).map_err(|detail| Invalid::new(format!("files[{at}].content"), detail))?;
        Ok(File { path: self.path, mode, content })
    }
}

fn mode(text: &str) -> Option<u32> {
    let digits = if text.len() == 4 { text.strip_prefix('0')? } else { text };
    let is_sound = digits.len() == 3 && digits.bytes().all(|b| matches!(b, b'0'..=b'7'));
    is_sound.then(|| u32::from_str_radix(digits, 8).ok()).flatten()
}

impl Encoding {
    fn decode(self, text: String) -> Result<Content, String> {
        match self {
            Self::Utf8 => Ok(Content(text.into_bytes())),
            Self::Base64 => BASE64.decode(text).map(Content).map_err(|error| format!("not base64: {error}")),
        }
    }
}

#[cfg(test)]
mod tests;
