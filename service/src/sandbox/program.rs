//! The program of a sandbox: what the image says, overridden by what the request says, as the standard's `config.json`.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::image::ImageConfiguration;
use sandbox_core::{
    files::PATH_BYTES_MAX,
    protocol::{FOLDERS_MAX, Isolation, Stdin, WindowSize},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{ImageId, Invalid, Limits, Mount, NewCompile, NewSandbox, SandboxId, Signal};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The last id of a sandbox is its init's.
const INIT_ID: u32 = 65_535;

/// The period that `cpu.quota` counts in, in microseconds; a thousandth of a core is a hundred of them.
const CPU_PERIOD_US: u64 = 100_000;

/// The longest name of one folder (`NAME_MAX` of path_resolution(7)).
const NAME_BYTES_MAX: usize = 255;

/// What is executed, where, with which environment, as whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub args: Vec<String>,
    /// `NAME=value`, each name once.
    pub env: Vec<String>,
    pub cwd: String,
    /// What the image calls its volumes: folders of the sandbox's own writable layer, made where the image lacks them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub folders: Vec<String>,
    pub user: User,
    #[serde(default)]
    pub capabilities: Capabilities,
    #[serde(default = "container")]
    pub isolation: Isolation,
    /// Whether its input stays open for whoever attaches.
    #[serde(default)]
    pub stdin_open: bool,
    /// Of this size, if it has one.
    #[serde(default)]
    pub terminal: Option<WindowSize>,
    #[serde(default)]
    pub stop: StopOrder,
    /// What of its tenant's stands in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Mount>,
}

/// How its end is asked for where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopOrder {
    pub signal: Signal,
    /// Before it is killed.
    pub grace_ms: u64,
}

impl Default for StopOrder {
    fn default() -> Self {
        Self { signal: Signal::TERM, grace_ms: 10_000 }
    }
}

const fn container() -> Isolation {
    Isolation::Container
}

/// What user 0 may do in the sandbox. `none`: no more than any other user. `root_image`: what images expect that are built to run as root — change owners,
/// become other users, signal them (CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, NET_BIND_SERVICE, SETGID, SETUID), over the sandbox's own ids alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(default = "none")]
pub enum Capabilities {
    /// Nothing that any other user may not.
    #[default]
    None,
    /// What images expect that are built to run as root: change owners, become other users, signal them. Over the sandbox's own ids alone.
    RootImage,
}

/// Who runs the program inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum User {
    Ids {
        uid: u32,
        gid: u32,
    },
    /// `name`, `uid`, or either with `:group` or `:gid`, looked up in the image's own files at the start.
    Named(String),
}

impl Program {
    /// Puts the request over the image's configuration, as Docker does. A given command replaces the image's, and goes to the image's entry point as
    /// its arguments; a given entry point replaces that and the image's command. Of the environment, names of the request win. Fails when neither
    /// side names a program, or when the image's user is none.
    pub fn resolve(image: &ImageConfiguration, asked: &NewSandbox) -> Result<Self, Invalid> {
        let config = image.config().as_ref();
        let entrypoint = asked.entrypoint.clone().or_else(|| config.and_then(|c| c.entrypoint().clone()));
        // The image's command was written for the image's entry point.
        let command = match (&asked.command, &asked.entrypoint) {
            (Some(command), _) => Some(command.clone()),
            (None, Some(_)) => None,
            (None, None) => config.and_then(|c| c.cmd().clone()),
        };
        let args: Vec<String> = entrypoint.into_iter().chain(command).flatten().collect();
        if args.first().is_none_or(String::is_empty) {
            return Err(Invalid::new("command", "the image names no program, so the request must"));
        }
        let of_image = config.and_then(|c| c.stop_signal().clone()).and_then(|name| Signal::try_from(name).ok());
        let mut env = BTreeMap::from([("PATH", DEFAULT_PATH)]);
        let from_image = config.and_then(|c| c.env().as_ref());
        env.extend(from_image.into_iter().flatten().filter_map(|entry| entry.split_once('=')));
        env.extend(asked.env.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let workdir = config.and_then(|c| c.working_dir().as_deref()).filter(|path| !path.is_empty());
        let user = match &asked.user {
            Some(user) => user.clone(),
            None => User::parse("image", config.and_then(|c| c.user().as_deref()).unwrap_or_default())?,
        };
        Ok(Self {
            args,
            env: env.into_iter().map(|(key, value)| format!("{key}={value}")).collect(),
            cwd: asked.workdir.as_deref().or(workdir).unwrap_or("/").to_owned(),
            folders: config.map(folders_of).unwrap_or_default(),
            user,
            capabilities: asked.capabilities,
            isolation: asked.isolation,
            stdin_open: asked.stdin_open,
            terminal: asked.terminal,
            // What an image says that is no signal is as good as nothing.
            stop: StopOrder { signal: asked.stop_signal.or(of_image).unwrap_or(Signal::TERM), grace_ms: asked.stop_grace_ms },
            volumes: Vec::new(),
        })
    }
}

/// What an image says that is no place is as good as nothing.
fn folders_of(config: &oci_spec::image::Config) -> Vec<String> {
    let is_fit = |name: &str| name != ".." && name.len() <= NAME_BYTES_MAX;
    let is_place =
        |path: &&String| path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\0') && path.split('/').all(is_fit);
    // An image has them in no order.
    let places: BTreeSet<_> = config.volumes().iter().flatten().filter(is_place).collect();
    places.into_iter().take(FOLDERS_MAX).cloned().collect()
}

impl Program {
    /// The program of a compile step: its own command and environment, and all else as the run's.
    pub fn of_step(image: &ImageConfiguration, asked: &NewSandbox, step: &NewCompile) -> Result<Self, Invalid> {
        // The image's entry point would stand before it.
        let (entrypoint, command) = (Some(vec![]), Some(step.command.clone()));
        Self::resolve(image, &NewSandbox { entrypoint, command, env: step.env.clone(), stdin_open: false, terminal: None, ..asked.clone() })
    }

    /// Where its standard input comes from.
    pub const fn stdin(&self, has_content: bool) -> Stdin {
        match (has_content, self.terminal, self.stdin_open) {
            (true, ..) => Stdin::Descriptor,
            // What is typed at a terminal comes through that.
            (false, None, true) => Stdin::Held,
            (false, Some(_), _) | (false, None, false) => Stdin::Null,
        }
    }
}

impl User {
    /// The forms of the image specification: nothing, `uid`, `uid:gid`, `name`, `name:group`, and mixtures. `field` is named if it is none.
    pub fn parse(field: &str, text: &str) -> Result<Self, Invalid> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let id = |part: &str| part.parse().ok().filter(|id| *id < INIT_ID);
        let is_name =
            |part: &str| (1..=64).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-$".contains(&b));
        let is_sound = |part: &str| if is_digits(part) { id(part).is_some() } else { is_name(part) };
        match (user, group) {
            ("", None) => Ok(Self::Ids { uid: 0, gid: 0 }),
            (user, Some(group)) if is_digits(user) && is_digits(group) => match (id(user), id(group)) {
                (Some(uid), Some(gid)) => Ok(Self::Ids { uid, gid }),
                _ => Err(Invalid::new(field, "user and group ids go from 0 to 65534")),
            },
            (user, group) if is_sound(user) && group.is_none_or(is_sound) => Ok(Self::Named(text.to_owned())),
            _ => Err(Invalid::new(field, "a user is a name or a number up to 65534, and so is a group behind a colon")),
        }
    }

    /// As a request would say it.
    pub fn text(&self) -> String {
        match self {
            Self::Ids { uid, gid } => format!("{uid}:{gid}"),
            Self::Named(text) => text.clone(),
        }
    }
}

/// The description of the sandbox that the keeper takes: an OCI runtime-spec `config.json` that holds what the service decides and nothing
/// else. Namespaces, mounts, devices and filters are the keeper's own.
pub fn spec(id: SandboxId, image: &ImageId, program: &Program, limits: &Limits) -> Vec<u8> {
    let user = match &program.user {
        User::Ids { uid, gid } => json!({ "uid": uid, "gid": gid }),
        User::Named(name) => json!({ "uid": 0, "gid": 0, "username": name }),
    };
    let rlimit = |kind: &str, value: u64| json!({ "type": kind, "soft": value, "hard": value });
    let capabilities = match program.capabilities {
        Capabilities::None => Value::Null,
        Capabilities::RootImage => json!({ "bounding": OF_ROOT_IMAGE, "effective": OF_ROOT_IMAGE, "permitted": OF_ROOT_IMAGE }),
    };
    let spec: Value = json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": user,
            "args": program.args,
            "env": program.env,
            "cwd": program.cwd,
            "capabilities": capabilities,
            "rlimits": [
                rlimit("RLIMIT_NOFILE", limits.open_files()),
                rlimit("RLIMIT_FSIZE", limits.file_size_bytes()),
                rlimit("RLIMIT_CORE", 0),
            ],
            "noNewPrivileges": true,
        },
        "root": { "path": image, "readonly": false },
        "hostname": hostname(id),
        "mounts": program.folders.iter().map(|folder| json!({ "destination": folder })).collect::<Vec<_>>(),
        "linux": { "resources": {
            "memory": { "limit": limits.memory_bytes(), "swap": limits.memory_bytes() },
            "cpu": { "quota": limits.cpu_millis() * CPU_PERIOD_US / 1000, "period": CPU_PERIOD_US },
            "pids": { "limit": limits.pids() },
        } },
    });
    spec.to_string().into_bytes()
}

/// Docker's default set without those that reach beyond files and processes of the sandbox's own.
const OF_ROOT_IMAGE: [&str; 8] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID"];

/// The random end of the id, so that neighbours in time do not look alike.
fn hostname(id: SandboxId) -> String {
    let mut name = id.0.simple().to_string();
    name.split_off(name.len() - 12)
}

#[cfg(test)]
mod tests {
    use sandbox_core::protocol::OutputPolicy;

    use super::*;
    use crate::sandbox::{ImageReference, Kind, PullPolicy, RequestedLimits, WhenFull};

    fn image(config: Value) -> ImageConfiguration {
        let rootfs = json!({ "type": "layers", "diff_ids": [] });
        serde_json::from_value(json!({ "architecture": "amd64", "os": "linux", "rootfs": rootfs, "config": config })).unwrap()
    }

    fn asked() -> NewSandbox {
        NewSandbox {
            kind: Kind::Run,
            image: ImageReference::parse("image", "a".into()).unwrap(),
            name: None,
            entrypoint: None,
            command: None,
            compile: None,
            cases: vec![],
            judging: None,
            workdir: None,
            user: None,
            capabilities: Capabilities::None,
            isolation: Isolation::Container,
            files: vec![],
            stdin: None,
            stdin_open: false,
            terminal: None,
            stop_signal: None,
            stop_grace_ms: 10_000,
            env: BTreeMap::new(),
            labels: BTreeMap::new(),
            requested: RequestedLimits::default(),
            defaults: RequestedLimits::default(),
            limits: Limits::of(Kind::Run, RequestedLimits::default()).unwrap(),
            output_policy: OutputPolicy::Truncate,
            ttl_ms: None,
            idle_timeout_ms: None,
            auto_remove: false,
            keep_layer: false,
            volumes: vec![],
            pull: PullPolicy::Never,
            when_full: WhenFull::Queue,
            retries: 0,
        }
    }

    #[test]
    fn without_a_command_entry_point_and_command_of_the_image_run() {
        let image = image(json!({ "Entrypoint": ["/entry", "-x"], "Cmd": ["serve"], "WorkingDir": "/srv" }));
        let program = Program::resolve(&image, &asked()).unwrap();
        assert_eq!(program.args, ["/entry", "-x", "serve"]);
        assert_eq!(program.cwd, "/srv");
    }

    #[test]
    fn entry_point_and_command_go_together_as_with_docker() {
        let image = image(json!({ "Entrypoint": ["/entry"], "Cmd": ["serve"] }));
        let list = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let args = |entrypoint, command| Program::resolve(&image, &NewSandbox { entrypoint, command, ..asked() }).unwrap().args;
        assert_eq!(args(None, list(&["true"])), ["/entry", "true"]);
        assert_eq!(args(list(&["/other", "-x"]), None), ["/other", "-x"]);
        assert_eq!(args(list(&["/other"]), list(&["true"])), ["/other", "true"]);
        assert_eq!(args(list(&[]), list(&["true"])), ["true"]);
        let nothing = Program::resolve(&image, &NewSandbox { entrypoint: list(&[]), ..asked() });
        assert_eq!(nothing.unwrap_err().field, "command");
    }

    #[test]
    fn volumes_of_the_image_are_folders_of_the_sandbox() {
        let long = format!("/{}", "a".repeat(NAME_BYTES_MAX + 1));
        let image = image(json!({ "Cmd": ["serve"], "Volumes": { "/data": {}, "relative": {}, "/a/../../b": {}, long: {} } }));

        let program = Program::resolve(&image, &asked()).unwrap();

        assert_eq!(program.folders, ["/data"]);
        let (id, root) = (SandboxId(uuid::Uuid::nil()), "0".repeat(64).parse().unwrap());
        let spec: Value = serde_json::from_slice(&spec(id, &root, &program, &asked().limits)).unwrap();
        assert_eq!(spec["mounts"], json!([{ "destination": "/data" }]));
    }

    #[test]
    fn the_image_says_by_which_signal_it_stops_unless_the_request_does() {
        let signal = |config, stop_signal| {
            let asked = NewSandbox { stop_signal, stop_grace_ms: 7, ..asked() };
            Program::resolve(&image(config), &asked).unwrap().stop
        };
        let quit = Signal::try_from("SIGQUIT".to_owned()).unwrap();
        assert_eq!(signal(json!({ "Cmd": ["a"], "StopSignal": "SIGQUIT" }), None), StopOrder { signal: quit, grace_ms: 7 });
        assert_eq!(signal(json!({ "Cmd": ["a"], "StopSignal": "SIGQUIT" }), Some(Signal::KILL)).signal, Signal::KILL);
        assert_eq!(signal(json!({ "Cmd": ["a"], "StopSignal": "no such" }), None).signal, Signal::TERM);
        assert_eq!(signal(json!({ "Cmd": ["a"] }), None).signal, Signal::TERM);
    }

    #[test]
    fn a_program_of_an_earlier_version_has_no_terminal_and_stops_by_sigterm() {
        let old = json!({ "args": ["a"], "env": [], "cwd": "/", "user": { "ids": { "uid": 0, "gid": 0 } } });
        let program: Program = serde_json::from_value(old).unwrap();
        assert_eq!((program.stdin_open, program.terminal, program.stop), (false, None, StopOrder::default()));
    }

    #[test]
    fn no_command_anywhere_is_the_requests_fault() {
        assert_eq!(Program::resolve(&image(json!({})), &asked()).unwrap_err().field, "command");
    }

    #[test]
    fn the_requests_environment_wins_and_path_has_a_default() {
        let image = image(json!({ "Cmd": ["a"], "Env": ["LANG=C", "X=1"] }));
        let program = Program::resolve(&image, &NewSandbox { env: BTreeMap::from([("X".into(), "2".into())]), ..asked() }).unwrap();
        assert_eq!(program.env, ["LANG=C".to_owned(), format!("PATH={DEFAULT_PATH}"), "X=2".to_owned()]);
    }

    #[test]
    fn users_are_numbers_or_names() {
        let parse = |text: &str| User::parse("user", text);
        assert_eq!(parse(""), Ok(User::Ids { uid: 0, gid: 0 }));
        assert_eq!(parse("1000:100"), Ok(User::Ids { uid: 1000, gid: 100 }));
        for named in ["1000", "web", "web:staff", "1000:staff", "web:100"] {
            assert_eq!(parse(named), Ok(User::Named(named.into())));
        }
        for wrong in ["a/b", ":group", ":", "web:", "65535", "0:65535", "1:2:3", "a b", "-1:/"] {
            assert_eq!(parse(wrong).unwrap_err().field, "user", "{wrong}");
        }
    }

    #[test]
    fn the_requests_user_goes_before_the_images() {
        let image = image(json!({ "Cmd": ["a"], "User": "web" }));
        assert_eq!(Program::resolve(&image, &asked()).unwrap().user, User::Named("web".into()));
        let asked = NewSandbox { user: Some(User::Ids { uid: 7, gid: 8 }), ..asked() };
        assert_eq!(Program::resolve(&image, &asked).unwrap().user, User::Ids { uid: 7, gid: 8 });
    }

    #[test]
    fn a_root_image_gets_what_the_keeper_grants_and_others_nothing() {
        let image_id: ImageId = "a".repeat(64).parse().unwrap();
        let spec_of = |capabilities| {
            let asked = NewSandbox { capabilities, ..asked() };
            let program = Program::resolve(&image(json!({ "Cmd": ["a"] })), &asked).unwrap();
            let bytes = spec(SandboxId(uuid::Uuid::nil()), &image_id, &program, &asked.limits);
            serde_json::from_slice::<Value>(&bytes).unwrap()["process"]["capabilities"].clone()
        };
        assert_eq!(spec_of(Capabilities::None), Value::Null);
        assert_eq!(spec_of(Capabilities::RootImage)["bounding"].as_array().unwrap().len(), 8);
    }

    #[test]
    fn the_spec_is_the_standards_and_holds_nothing_of_the_keepers() {
        let image_id: ImageId = "a".repeat(64).parse().unwrap();
        let program = Program::resolve(&image(json!({ "Cmd": ["a"] })), &asked()).unwrap();
        let bytes = spec(SandboxId(uuid::Uuid::nil()), &image_id, &program, &asked().limits);
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&bytes).unwrap();
        assert!(spec.mounts().iter().flatten().next().is_none() && spec.hooks().is_none() && spec.annotations().is_none());
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.namespaces().is_none() && linux.seccomp().is_none());
        let resources = linux.resources().as_ref().unwrap();
        assert_eq!(resources.memory().as_ref().unwrap().swap(), Some(256 << 20));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(100_000));
    }
}
