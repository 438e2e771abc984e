//! The chart's pod on this machine: each container started with the image, command, environment, user, capabilities and mounts that the rendered objects say, by the
//! kernel's own means. What stands in for a cluster's are the network (this machine's loopback) and the folders behind volumes; seccomp's default profile, which comes with a
//! container runtime, is not there.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File, Permissions},
    io::{BufRead as _, BufReader},
    os::unix::fs::{PermissionsExt as _, chown},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{host, node_image, service};

/// How long a container may take to say that it is ready, and to end when it was told to.
const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// The address of every pod here.
const LOOPBACK: &str = "127.0.0.1";

/// A machine's part of an installation: the folders behind the volumes of its pods.
#[derive(Debug)]
pub struct Machine {
    folder: TempDir,
    /// The image's files.
    root: PathBuf,
    /// Name and key of each secret, and what it holds.
    secrets: BTreeMap<(String, String), String>,
    /// Its share of the machine among the tests.
    _load: File,
}

/// A container that runs. Told to stop when it is dropped.
#[derive(Debug)]
pub struct Container {
    child: Child,
    pid: u32,
    /// What it says on stderr.
    pub log: PathBuf,
    /// The line on stdout by which it said that it is ready.
    pub said: String,
}

impl Machine {
    /// One that has the image, and a cluster's secrets.
    ///
    /// # Errors
    /// The image cannot be built.
    pub fn new(secrets: &[(&str, &str, &str)]) -> Result<Self> {
        let secrets = secrets.iter().map(|(name, key, value)| (((*name).to_owned(), (*key).to_owned()), (*value).to_owned())).collect();
        Ok(Self { folder: service::folder()?, root: node_image::root()?, secrets, _load: host::busy() })
    }

    /// A folder for what the chart keeps on machines.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The folder behind a volume of a pod, as the kubelet has it there when containers begin. Those of the pod's own (`emptyDir`, `secret`) are made as they are said to be.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn volume(&self, pod: &Value, name: &str) -> Result<PathBuf> {
        let volume = pod["volumes"].as_array().and_then(|all| all.iter().find(|volume| volume["name"] == name));
        let volume = volume.with_context(|| format!("the pod has no volume {name}"))?;
        if let Some(path) = volume["hostPath"]["path"].as_str() {
            fs::create_dir_all(path)?;
            return Ok(path.into());
        }
        let group = u32::try_from(pod["securityContext"]["fsGroup"].as_u64().context("a pod with secrets has a group for them")?)?;
        let path = self.folder.path().join("volumes").join(name);
        fs::create_dir_all(&path)?;
        chown(&path, Some(0), Some(group))?;
        if let Some(secret) = volume["secret"]["secretName"].as_str() {
            let mode = volume["secret"]["defaultMode"].as_u64().context("a mode")?;
            for ((_, key), value) in self.secrets.iter().filter(|((name, _), _)| name == secret) {
                fs::write(path.join(key), value)?;
                chown(path.join(key), Some(0), Some(group))?;
                fs::set_permissions(path.join(key), Permissions::from_mode(u32::try_from(mode)?))?;
            }
            ensure!(fs::read_dir(&path)?.next().is_some(), "there is no secret {secret}");
        } else {
            ensure!(volume["emptyDir"].is_object(), "{volume}");
            fs::set_permissions(&path, Permissions::from_mode(0o2777))?;
        }
        Ok(path)
    }

    /// The command that has this container of the pod run; `change` has a last word on its own command.
    fn command(&self, pod: &Value, container: &Value, change: impl Fn(&str) -> String) -> Result<Command> {
        let security = &container["securityContext"];
        let is_privileged = security["privileged"] == true;
        // All of a pod's are there before the first of its containers begins.
        for volume in pod["volumes"].as_array().into_iter().flatten() {
            self.volume(pod, volume["name"].as_str().context("a name")?)?;
        }
        let words: Vec<String> = texts(&container["command"]).chain(texts(&container["args"])).map(|word| change(&word)).collect();
        ensure!(!words.is_empty(), "what it runs is the chart's to say");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--", "bash", "-euc"]);
        command.arg(self.preparation(pod, container, is_privileged)?).arg("container");
        // As a runtime does it: after the mounts, and before the first instruction of the image's program.
        command.args(["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        for variable in container["env"].as_array().into_iter().flatten() {
            command.arg(format!("{}={}", variable["name"].as_str().context("a name")?, self.value(variable)?));
        }
        let number = |name: &str| security[name].as_u64().with_context(|| format!("{name} is the chart's to say"));
        command.arg("setpriv").arg(format!("--reuid={}", number("runAsUser")?)).arg(format!("--regid={}", number("runAsGroup")?));
        match pod["securityContext"]["fsGroup"].as_u64() {
            Some(group) => command.arg(format!("--groups={group}")),
            None => command.arg("--clear-groups"),
        };
        if !is_privileged {
            ensure!(security["capabilities"]["drop"] == serde_json::json!(["ALL"]), "{security}");
            let added: String = texts(&security["capabilities"]["add"]).map(|name| format!(",+{}", name.to_lowercase())).collect();
            command.arg(format!("--bounding-set=-all{added}")).arg("--inh-caps=-all");
        }
        if security["allowPrivilegeEscalation"] == false {
            command.arg("--no-new-privs");
        }
        command.arg("--").args(words).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
        Ok(command)
    }

    fn value(&self, variable: &Value) -> Result<String> {
        // The pod's network is this machine's, of which the tests have the loopback.
        if matches!(variable["name"].as_str(), Some("MAYFLY_LISTEN" | "MAYFLY_METRICS_LISTEN")) {
            return Ok("127.0.0.1:0".to_owned());
        }
        if let Some(text) = variable["value"].as_str() {
            return Ok(text.replace("$(POD_IP)", LOOPBACK));
        }
        if variable["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP" {
            return Ok(LOOPBACK.to_owned());
        }
        let reference = &variable["valueFrom"]["secretKeyRef"];
        let (name, key) = (reference["name"].as_str().unwrap_or_default(), reference["key"].as_str().unwrap_or_default());
        self.secrets.get(&(name.to_owned(), key.to_owned())).cloned().with_context(|| format!("there is no secret {name} with {key}"))
    }

    /// What a runtime does in the container's mount namespace: the image below a layer of its own, the kernel's file systems, the volumes; then the old root goes.
    fn preparation(&self, pod: &Value, container: &Value, is_privileged: bool) -> Result<String> {
        let stage = self.folder.path().join("stage");
        fs::create_dir_all(&stage)?;
        let mut script = format!("mount -t tmpfs tmpfs {0}\ncd {0}\nmkdir upper work root\n", stage.display());
        writeln!(script, "mount -t overlay overlay -o lowerdir={},upperdir=upper,workdir=work root", self.root.display())?;
        script += "cd root\nmount -t proc proc proc\nmount --rbind /sys sys\n";
        if is_privileged {
            script += "mount --rbind /dev dev\n";
        } else {
            script += "mount -o remount,bind,ro sys\nmount -t tmpfs tmpfs dev\n";
            script += "for node in 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0'; do set -- $node \"$@\"; mknod -m 666 dev/$1 c $2 $3; shift 3; done\n";
        }
        let mut mounts: Vec<&Value> = container["volumeMounts"].as_array().into_iter().flatten().collect();
        // What lies deeper comes later.
        mounts.sort_by_key(|mount| mount["mountPath"].as_str().map(str::len));
        for mount in mounts {
            let from = self.volume(pod, mount["name"].as_str().context("a name")?)?;
            let at = mount["mountPath"].as_str().and_then(|path| path.strip_prefix('/')).context("an absolute path")?;
            writeln!(script, "mkdir -p {at}\nmount --rbind {} {at}", from.display())?;
            if mount["readOnly"] == true {
                writeln!(script, "mount -o remount,bind,ro {at}")?;
            }
        }
        if container["securityContext"]["readOnlyRootFilesystem"] == true {
            script += "mount -o remount,bind,ro .\n";
        }
        // pivot_root(2), the part about `.`: the old root comes to lie on the new one, and is let go.
        script += "pivot_root . .\numount -l .\ncd /\nexec \"$@\"\n";
        Ok(script)
    }

    /// Runs a container that ends by itself, and returns how, with what it said.
    ///
    /// # Errors
    /// It cannot be started, or does not end.
    pub fn run(&self, pod: &Value, container: &Value) -> Result<(ExitStatus, String)> {
        service::finish(&mut self.command(pod, container, str::to_owned)?, START_DEADLINE)
    }

    /// Starts a container, and returns when it says that it is ready.
    ///
    /// # Errors
    /// It does not; the text holds what it said.
    pub fn start(&self, pod: &Value, container: &Value) -> Result<Container> {
        self.start_changed(pod, container, str::to_owned)
    }

    /// The same, with other words in its command.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_changed(&self, pod: &Value, container: &Value, change: impl Fn(&str) -> String) -> Result<Container> {
        let name = container["name"].as_str().context("a name")?;
        let log = self.folder.path().join(format!("{name}.log"));
        let mut command = self.command(pod, container, change)?;
        let mut child = command.stdout(Stdio::piped()).stderr(File::options().create(true).append(true).open(&log)?).spawn()?;
        let stdout = child.stdout.take().context("piped")?;
        let (lines, heard) = mpsc::channel();
        std::thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let mut container = Container { child, pid: 0, log, said: String::new() };
        let started = Instant::now();
        // The service's says where; the keeper's is one word.
        while !container.said.contains("ready") {
            match heard.recv_timeout(START_DEADLINE.saturating_sub(started.elapsed())) {
                Ok(line) => container.said = line,
                Err(error) => bail!("{name} is not ready ({error}): {}", fs::read_to_string(&container.log)?),
            }
        }
        container.pid = *host::descendants(container.child.id()).first().context("unshare has one child")?;
        Ok(container)
    }
}

impl Container {
    /// Its first process, by the machine's number.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// What a command in the container says, as its user and with its capabilities, as `kubectl exec` has it.
    ///
    /// # Errors
    /// It cannot be started, or does not end.
    pub fn exec(&self, container: &Value, command: &[&str]) -> Result<(ExitStatus, String)> {
        let security = &container["securityContext"];
        let mut enter = Command::new("nsenter");
        enter.args(["--mount", "--pid", "--target", &self.pid.to_string(), "--"]);
        if security["privileged"] != true {
            enter.args(["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--clear-groups"]);
            enter.arg(format!("--reuid={}", security["runAsUser"])).arg(format!("--regid={}", security["runAsGroup"])).arg("--");
        }
        service::finish(enter.args(command), START_DEADLINE)
    }

    /// What the kubelet says to end it: SIGTERM, to its first process.
    ///
    /// # Errors
    /// It is gone.
    pub fn terminate(&self) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGTERM)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let status = service::wait(&mut self.child, deadline)?;
        status.with_context(|| format!("still there after {} s: {}", deadline.as_secs(), fs::read_to_string(&self.log).unwrap_or_default()))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // One that never became ready has no first process that is known.
            if self.pid != 0
                && self.terminate().is_ok()
                && service::wait(&mut self.child, STOP_DEADLINE).is_ok_and(|status| status.is_some())
            {
                return;
            }
            // Its first process is killed with it (`--kill-child`), and all that it has with that.
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

fn texts(list: &Value) -> impl Iterator<Item = String> {
    list.as_array().into_iter().flatten().map(|word| word.as_str().map_or_else(|| word.to_string(), str::to_owned))
}
