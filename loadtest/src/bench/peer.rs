//! Other runtimes on the same machine and the same root folder, given the same limits where they can have limits.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::contender::{CPU_MILLIS, MEMORY_BYTES, PIDS};

/// A runtime to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// Has no limits at all: a floor rather than an equal.
    Bubblewrap,
    Crun,
    Runc,
    /// gVisor: a kernel of its own in between.
    Runsc,
}

impl Peer {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Bubblewrap => "bubblewrap (no limits)",
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Runsc => "runsc (gVisor)",
        }
    }

    const fn program(self) -> &'static str {
        match self {
            Self::Bubblewrap => "bwrap",
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Runsc => "runsc",
        }
    }

    /// A slower one is run less often: one run in so many.
    pub(super) const fn one_in(self) -> u32 {
        match self {
            Self::Bubblewrap | Self::Crun => 1,
            Self::Runc => 2,
            Self::Runsc => 8,
        }
    }

    /// As it tells of itself, without its name.
    pub(super) fn version(self) -> String {
        let said = Command::new(self.program()).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        said.lines().next().and_then(|line| line.split(' ').next_back()).unwrap_or("unknown").to_owned()
    }
}

/// One program, ready to be run by one peer.
#[derive(Debug)]
pub(super) struct Bundle {
    pub(super) peer: Peer,
    folder: TempDir,
    root: PathBuf,
    command: Vec<String>,
    started: AtomicU64,
}

impl Bundle {
    pub(super) fn new(peer: Peer, root: &Path, command: &[&str]) -> Result<Self> {
        let root = root.canonicalize().with_context(|| root.display().to_string())?;
        let folder = tempfile::Builder::new().prefix("mayfly-bench.").tempdir()?;
        let command = command.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        fs::write(folder.path().join("config.json"), config(&root, &command).to_string())?;
        Ok(Self { peer, folder, root, command, started: AtomicU64::new(0) })
    }

    /// Runs the program once, to its end.
    pub(super) fn run(&self) -> Result<()> {
        let name = format!("mayfly-bench-{}-{}", std::process::id(), self.started.fetch_add(1, Ordering::Relaxed));
        let mut command = match self.peer {
            Peer::Bubblewrap => self.bubblewrap(),
            Peer::Crun => self.oci(&["--cgroup-manager=cgroupfs"], &name),
            Peer::Runc => self.oci(&[], &name),
            Peer::Runsc => self.oci(&["--network=none"], &name),
        };
        let output =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).output().with_context(|| format!("{command:?}"))?;
        ensure!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn bubblewrap(&self) -> Command {
        let mut command = Command::new(self.peer.program());
        command.args(["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind"]).arg(&self.root).arg("/");
        command.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--"]).args(&self.command);
        command
    }

    fn oci(&self, options: &[&str], name: &str) -> Command {
        let mut command = Command::new(self.peer.program());
        command
            .args(options)
            .arg("--root")
            .arg(self.folder.path().join("state"))
            .arg("run")
            .arg("--bundle")
            .arg(self.folder.path())
            .arg(name);
        command
    }
}

/// What an OCI runtime is told: the namespaces that ours has, no capability, the same limits.
fn config(root: &Path, command: &[String]) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": command, "cwd": "/", "noNewPrivileges": true,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "capabilities": { "bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": [] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 256, "soft": 256 }],
        },
        "root": { "path": root, "readonly": true },
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/tmp", "tmpfs", &["nosuid", "nodev", "size=65536k"]),
        ],
        "linux": {
            "resources": {
                "memory": { "limit": MEMORY_BYTES, "swap": MEMORY_BYTES },
                "cpu": { "quota": CPU_MILLIS * 100, "period": 100_000 },
                "pids": { "limit": PIDS },
            },
            "namespaces": namespaces,
        },
    })
}
