//! The program of a sandbox: what the image says, overridden by what the request says, as the standard's `config.json`.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{ImageId, Invalid, Limits, NewSandbox, SandboxId};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The period that `cpu.quota` counts in, in microseconds; a thousandth of a core is a hundred of them.
const CPU_PERIOD_US: u64 = 100_000;

/// What is executed, where, with which environment, as whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub args: Vec<String>,
    /// `NAME=value`, each name once.
    pub env: Vec<String>,
    pub cwd: String,
    pub user: User,
}

/// Who runs the program inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum User {
    Ids {
        uid: u32,
        gid: u32,
    },
    /// `name` or `name:group`, looked up in the image's own files at the start.
    Named(String),
}

impl Program {
    /// Puts the request over the image's configuration. A given command replaces entry point and command of the image; of the
    /// environment, names of the request win. Fails when neither side names a command, or when the image's user is none.
    pub fn resolve(image: &ImageConfiguration, asked: &NewSandbox) -> Result<Self, Invalid> {
        let config = image.config().as_ref();
        let args = asked.command.clone().unwrap_or_else(|| {
            let entrypoint = config.and_then(|c| c.entrypoint().clone()).unwrap_or_default();
            let command = config.and_then(|c| c.cmd().clone()).unwrap_or_default();
            entrypoint.into_iter().chain(command).collect()
        });
        if args.first().is_none_or(String::is_empty) {
            return Err(Invalid::new("command", "the image names no command, so the request must"));
        }
        let mut env = BTreeMap::from([("PATH", DEFAULT_PATH)]);
        let from_image = config.and_then(|c| c.env().as_ref());
        env.extend(from_image.into_iter().flatten().filter_map(|entry| entry.split_once('=')));
        env.extend(asked.env.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let workdir = config.and_then(|c| c.working_dir().as_deref()).filter(|path| !path.is_empty());
        let user = config.and_then(|c| c.user().as_deref()).unwrap_or_default();
        Ok(Self {
            args,
            env: env.into_iter().map(|(key, value)| format!("{key}={value}")).collect(),
            cwd: asked.workdir.as_deref().or(workdir).unwrap_or("/").to_owned(),
            user: User::parse(user)?,
        })
    }
}

impl User {
    /// The forms of the image specification: nothing, `uid`, `uid:gid`, `name`, `name:group`, and mixtures.
    fn parse(text: &str) -> Result<Self, Invalid> {
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        let id = |text: &str| match text {
            "" => Some(0),
            digits => digits.parse::<u16>().ok().map(u32::from),
        };
        if let (Some(uid), Some(gid)) = (id(user), id(group)) {
            return Ok(Self::Ids { uid, gid });
        }
        let is_name = |part: &str| part.len() <= 64 && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-$".contains(&b));
        let is_sound = !user.is_empty() && is_name(user) && is_name(group);
        is_sound
            .then(|| Self::Named(text.to_owned()))
            .ok_or_else(|| Invalid::new("image", "the image's user is neither a name nor a number up to 65535"))
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
    let spec: Value = json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": user,
            "args": program.args,
            "env": program.env,
            "cwd": program.cwd,
            "rlimits": [
                rlimit("RLIMIT_NOFILE", limits.open_files()),
                rlimit("RLIMIT_FSIZE", limits.file_size_bytes()),
                rlimit("RLIMIT_CORE", 0),
            ],
            "noNewPrivileges": true,
        },
        "root": { "path": image, "readonly": false },
        "hostname": hostname(id),
        "linux": { "resources": {
            "memory": { "limit": limits.memory_bytes(), "swap": limits.memory_bytes() },
            "cpu": { "quota": limits.cpu_millis() * CPU_PERIOD_US / 1000, "period": CPU_PERIOD_US },
            "pids": { "limit": limits.pids() },
        } },
    });
    spec.to_string().into_bytes()
}

/// The random end of the id, so that neighbours in time do not look alike.
fn hostname(id: SandboxId) -> String {
    let mut name = id.0.simple().to_string();
    name.split_off(name.len() - 12)
}

#[cfg(test)]
mod tests {
    use sandbox_core::protocol::OutputPolicy;

    use super::*;
    use crate::sandbox::{ImageReference, Kind, RequestedLimits};

    fn image(config: Value) -> ImageConfiguration {
        let rootfs = json!({ "type": "layers", "diff_ids": [] });
        serde_json::from_value(json!({ "architecture": "amd64", "os": "linux", "rootfs": rootfs, "config": config })).unwrap()
    }

    fn asked() -> NewSandbox {
        NewSandbox {
            kind: Kind::Run,
            image: ImageReference::parse("image", "a".into()).unwrap(),
            name: None,
            command: None,
            workdir: None,
            files: vec![],
            stdin: None,
            env: BTreeMap::new(),
            labels: BTreeMap::new(),
            limits: Limits::of(Kind::Run, RequestedLimits::default()).unwrap(),
            output_policy: OutputPolicy::Truncate,
            ttl_ms: None,
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
    fn a_given_command_replaces_both() {
        let image = image(json!({ "Entrypoint": ["/entry"], "Cmd": ["serve"] }));
        let program = Program::resolve(&image, &NewSandbox { command: Some(vec!["true".into()]), ..asked() }).unwrap();
        assert_eq!(program.args, ["true"]);
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
        assert_eq!(User::parse(""), Ok(User::Ids { uid: 0, gid: 0 }));
        assert_eq!(User::parse("1000"), Ok(User::Ids { uid: 1000, gid: 0 }));
        assert_eq!(User::parse("1000:100"), Ok(User::Ids { uid: 1000, gid: 100 }));
        assert_eq!(User::parse("web:staff"), Ok(User::Named("web:staff".into())));
        assert!(User::parse("a/b").is_err());
        assert!(User::parse(":group").is_err());
    }

    #[test]
    fn the_spec_is_the_standards_and_holds_nothing_of_the_keepers() {
        let image_id: ImageId = "a".repeat(64).parse().unwrap();
        let program = Program::resolve(&image(json!({ "Cmd": ["a"] })), &asked()).unwrap();
        let bytes = spec(SandboxId(uuid::Uuid::nil()), &image_id, &program, &asked().limits);
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&bytes).unwrap();
        assert!(spec.mounts().is_none() && spec.hooks().is_none() && spec.annotations().is_none());
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.namespaces().is_none() && linux.seccomp().is_none());
        let resources = linux.resources().as_ref().unwrap();
        assert_eq!(resources.memory().as_ref().unwrap().swap(), Some(256 << 20));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(100_000));
    }
}
