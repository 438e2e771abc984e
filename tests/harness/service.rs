//! Starting, killing and stopping the real service, with a data folder of its own.

use std::{
    fs::{self, File, Permissions},
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::{Client, host, image, token};

/// How long a service may take to serve, with a first start's `initdb` and the import of an image on a loaded machine.
const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Where a running service is found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Place {
    pub url: String,
    pub metrics_url: String,
    pub data_dir: PathBuf,
    pub pid: u32,
    /// The `busybox` image as a plain folder, for controls outside of any sandbox. Only the shared service has it.
    pub busybox_root: PathBuf,
}

impl Place {
    #[must_use]
    pub fn secret_file(&self) -> PathBuf {
        self.data_dir.join("jwt-secret")
    }

    /// A client as a tenant that nobody else is.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::of(self, &format!("tenant-{}", uuid::Uuid::new_v4().simple()))
    }

    /// The process that owns this service's sandboxes.
    #[must_use]
    pub fn keeper_pid(&self) -> u32 {
        self.try_keeper_pid().expect("a keeper runs")
    }

    /// The same; `None` while there is no keeper.
    #[must_use]
    pub fn try_keeper_pid(&self) -> Option<u32> {
        let socket = self.data_dir.join("keeper.sock");
        let keepers = host::processes_with(&format!("sandbox-keeper --socket {} ", socket.display()));
        // While it starts, `setsid` says the same; what it clones does until it has become something else.
        let is_keeper = |pid: &u32| host::status_field(*pid, "Name").is_some_and(|name| name.starts_with("sandbox-keeper"));
        let is_clone =
            |pid: &u32| host::status_field(*pid, "PPid").and_then(|pid| pid.parse().ok()).is_some_and(|pid| keepers.contains(&pid));
        keepers.iter().copied().find(|pid| is_keeper(pid) && !is_clone(pid))
    }

    /// What this service has on the host now.
    #[must_use]
    pub fn footprint(&self) -> host::Footprint {
        host::Footprint::of(self.keeper_pid(), &self.data_dir)
    }
}

/// The service that tests share, and this test's share of the machine.
#[derive(Debug)]
pub struct Shared {
    pub place: Place,
    _load: File,
}

impl Shared {
    #[must_use]
    pub fn client(&self) -> Client {
        self.place.client()
    }
}

/// The service that all tests share which do not kill theirs. Beside other tests.
#[must_use]
pub fn shared() -> Shared {
    Shared { place: shared_place().clone(), _load: host::busy() }
}

/// The same, with no other test at work: for what is measured in milliseconds.
#[must_use]
pub fn shared_and_quiet() -> Shared {
    Shared { place: shared_place().clone(), _load: host::quiet() }
}

fn shared_place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    // Its stdin is never written to: it is closed when this process ends, however that happens, and then the service stops.
    static LEASH: OnceLock<Child> = OnceLock::new();
    PLACE.get_or_init(|| {
        #[expect(clippy::disallowed_methods, reason = "this is how `make test` says that it has started one")]
        if let Ok(text) = std::env::var("MAYFLY_TEST_SERVICE") {
            return serde_json::from_str(&text).expect("MAYFLY_TEST_SERVICE holds a place");
        }
        let mut child = Command::new(program("mayfly-test-service"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("mayfly-test-service is built: cargo build --workspace");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line of UTF-8");
        LEASH.get_or_init(|| child);
        serde_json::from_str(&line).expect("mayfly-test-service started")
    })
}

/// A program of this workspace, as built for this profile: beside the folder of the running test.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("/proc is mounted");
    let folder = own.parent().expect("a program lies in a folder");
    let folder = if folder.ends_with("deps") { folder.parent().expect("deps lies in the profile's folder") } else { folder };
    folder.join(name)
}

/// A command of ours, with nothing from the environment that could configure it.
#[must_use]
pub fn mayfly() -> Command {
    let mut command = Command::new(program("mayfly"));
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// A port of 127.0.0.1 that nobody has, and that the kernel gives to nobody who does not ask for it.
///
/// # Panics
/// There is none.
#[must_use]
pub fn free_port() -> u16 {
    // Below those that connections have from the kernel (ip(7), `ip_local_port_range`).
    let begin = 20_000 + u16::try_from(uuid::Uuid::new_v4().as_u128() % 10_000).expect("less than 10000");
    (begin..32_000).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

/// A folder that the service's own user can reach, on a disk: an image store on tmpfs is refused on older kernels.
///
/// # Errors
/// It cannot be made.
pub fn folder() -> Result<tempfile::TempDir> {
    #[expect(clippy::disallowed_methods, reason = "this is how `make test` says where all of its services live")]
    let parent = std::env::var("MAYFLY_TEST_FOLDER").unwrap_or_else(|_| "/var/tmp".to_owned());
    let folder = tempfile::Builder::new().prefix("mayfly-test.").tempdir_in(parent)?;
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    Ok(folder)
}

/// A service of one's own, to be killed and started again. Stopped and cleaned up when dropped.
#[derive(Debug)]
pub struct Service {
    folder: tempfile::TempDir,
    args: Vec<String>,
    /// What it logs, in the words of RUST_LOG.
    log_filter: String,
    /// At which steps it kills itself, in the words of `sandbox_core::fail_point`.
    fail_points: String,
    environment: Vec<(String, String)>,
    child: Option<Child>,
    place: Place,
    /// `None`: it serves other tests, which hold their own shares of the machine.
    _load: Option<File>,
}

impl Service {
    /// Starts one and imports the `busybox` image.
    #[must_use]
    pub fn start() -> Self {
        let service = Self::start_with(&[]).expect("the service starts");
        service.import("busybox").expect("the image is imported");
        service
    }

    /// Starts one while no other test starts any: for a look at what it leaves. Numbers of keepers, which name cgroups, are given again.
    #[must_use]
    pub fn start_alone() -> Self {
        let service = Self::launch(&[], Some(host::quiet())).expect("the service starts");
        service.import("busybox").expect("the image is imported");
        service
    }

    /// Starts one that tests share. What they leave behind only sleeps: more of it than usual is promised processors, so that nobody waits in the queue for that.
    ///
    /// # Errors
    /// As [`Self::start_with`].
    pub fn start_shared() -> Result<Self> {
        // Tests stop reading to see what that does to others: on a loaded machine that may last.
        // Whatever is pulled or pushed there, nobody is asked.
        let registries = ["--registry-hosts", "nowhere.example"];
        Self::launch(&[&["--overcommit-cpu-percent", "2400", "--write-timeout-s", "600"][..], &registries].concat(), None)
    }

    /// Starts one without images, with further arguments of `serve`.
    ///
    /// # Errors
    /// It did not come to serve; the text holds what it said.
    pub fn start_with(args: &[&str]) -> Result<Self> {
        Self::launch(args, Some(host::busy()))
    }

    /// Starts one that logs what this says, in the words of `RUST_LOG`, and imports the `busybox` image.
    #[must_use]
    pub fn start_logging(filter: &str) -> Self {
        let mut service = Self::start_with(&[]).expect("the service starts");
        service.stop().expect("it stops");
        filter.clone_into(&mut service.log_filter);
        service.start_again().expect("it starts again");
        service.import("busybox").expect("the image is imported");
        service
    }

    /// Starts one that shares a database with others, which reach it, and imports the `busybox` image. It takes the tokens of `tokens_of`, or else its own.
    ///
    /// # Panics
    /// It did not come to serve.
    #[must_use]
    pub fn start_node(database_url: &str, tokens_of: Option<&Self>, more: &[&str]) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let url = format!("http://{address}");
        let secret = tokens_of.map(|other| other.place().secret_file().display().to_string());
        let mut args = vec!["--database-url", database_url, "--listen", &address, "--peer-address", &url, "--peer-http", "true"];
        args.extend(secret.iter().flat_map(|secret| ["--jwt-secret-file", secret]));
        args.extend(more);
        Self::start_as(&args, tokens_of)
    }

    /// Starts one that was told to take the tokens of `tokens_of`, and imports the `busybox` image.
    ///
    /// # Panics
    /// It did not come to serve.
    #[must_use]
    pub fn start_as(args: &[&str], tokens_of: Option<&Self>) -> Self {
        let service = Self::start_with(args).expect("the service starts");
        if let Some(other) = tokens_of {
            // Where those look for it who sign tokens for this service.
            fs::copy(other.place().secret_file(), service.place().secret_file()).expect("both are ours");
        }
        service.import("busybox").expect("the image is imported");
        service
    }

    fn launch(args: &[&str], load: Option<File>) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "these tests start sandboxes: they need root");
        let folder = folder()?;
        let place = Place {
            url: String::new(),
            metrics_url: String::new(),
            data_dir: folder.path().join("data"),
            pid: 0,
            busybox_root: PathBuf::new(),
        };
        let args = args.iter().map(|&a| a.to_owned()).collect();
        let mut service = Self {
            folder,
            args,
            log_filter: "info,sqlx=warn".to_owned(),
            fail_points: String::new(),
            environment: Vec::new(),
            child: None,
            place,
            _load: load,
        };
        service.start_again()?;
        Ok(service)
    }

    /// Starts the service after it was killed or stopped, over the same data folder.
    ///
    /// # Errors
    /// As [`Self::start_with`].
    pub fn start_again(&mut self) -> Result<()> {
        let log_path = self.log_path();
        let log = File::options().create(true).append(true).open(&log_path)?;
        // At any free port, but where somebody else must know it beforehand.
        let listen: &[&str] = if self.args.iter().any(|arg| arg == "--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let mut child = mayfly()
            .arg("serve")
            .args(listen)
            .args(["--metrics-listen", "127.0.0.1:0", "--data-dir"])
            .arg(&self.place.data_dir)
            .args(&self.args)
            .env("RUST_LOG", &self.log_filter)
            .env("MAYFLY_FAIL_POINTS", &self.fail_points)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("mayfly is built: cargo build --workspace")?;
        let stdout = child.stdout.take().context("piped")?;
        self.place.pid = child.id();
        self.child = Some(child);
        let (lines, said) = mpsc::channel();
        std::thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let started = Instant::now();
        let mut all = Vec::new();
        while let Ok(line) = said.recv_timeout(START_DEADLINE.saturating_sub(started.elapsed())) {
            let is_ready = line.starts_with("mayfly is ready on ");
            all.push(line);
            if is_ready {
                (self.place.url, self.place.metrics_url) = addresses(&all.join(" "))?;
                return Ok(());
            }
        }
        bail!("the service did not come to serve: {}\n{}", all.join("\n"), fs::read_to_string(&log_path).unwrap_or_default())
    }

    /// Has it kill itself at these steps from its next start on, and a keeper that it starts then; empty: at none.
    pub fn arm(&mut self, fail_points: &str) {
        fail_points.clone_into(&mut self.fail_points);
    }

    /// Has its next starts say this, too, after `serve`.
    pub fn add_arguments(&mut self, args: &[&str]) {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
    }

    /// Has its next starts say this, instead of what was said, after `serve`.
    pub fn set_arguments(&mut self, args: &[&str]) {
        self.args = args.iter().map(|&arg| arg.to_owned()).collect();
    }

    /// Has its next starts have this in their environment.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Whether its process runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    #[must_use]
    pub fn client(&self) -> Client {
        self.place.client()
    }

    /// Everything the service wrote to stderr.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Where all that it and its keeper write to stderr goes.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.folder.path().join("service.log")
    }

    /// Imports a starter image, for all tenants.
    ///
    /// # Errors
    /// What the command said.
    pub fn import(&self, name: &str) -> Result<()> {
        import(&self.place, &image::archive(name)?, name)
    }

    /// `kill -9`, of the service alone.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it is ours");
        child.wait().expect("it is our child");
    }

    /// Ends it as an operator would (SIGTERM), and says how it went.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let mut child = self.child.take().context("it runs")?;
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        match wait(&mut child, STOP_DEADLINE)? {
            Some(status) => Ok(status),
            None => {
                child.kill()?;
                bail!("still there {} s after SIGTERM\n{}", STOP_DEADLINE.as_secs(), self.log())
            }
        }
    }

    /// Waits for the service to end by itself.
    ///
    /// # Errors
    /// It did not.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let mut child = self.child.take().context("it runs")?;
        let status = wait(&mut child, STOP_DEADLINE)?;
        if status.is_none() {
            self.child = Some(child);
        }
        status.context("it is still there")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.child.is_some()
            && let Err(error) = self.stop()
        {
            eprintln!("stopping the service: {error:#}");
        }
        // A test that failed may leave a keeper and a Postgres behind. They carry our folder in their arguments.
        let marker = self.folder.path().display().to_string();
        for signal in [Signal::SIGTERM, Signal::SIGQUIT, Signal::SIGKILL] {
            for pid in host::processes_with(&marker) {
                // One that has ended since it was listed is what we want.
                kill(Pid::from_raw(pid.cast_signed()), signal).ok();
            }
            let started = Instant::now();
            while !host::processes_with(&marker).is_empty() && started.elapsed() < Duration::from_secs(3) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Imports an archive for all tenants, by the command that people use.
///
/// # Errors
/// What the command said.
pub fn import(place: &Place, archive: &Path, reference: &str) -> Result<()> {
    let admin = token::sign(&token::claims("operator", "admin"), &place.secret_file());
    image::run(mayfly().args(["image", "import"]).arg(archive).args(["--reference", reference, "--url", &place.url, "--token", &admin]))
}

/// Waits for a child's end, or says `None`.
///
/// # Errors
/// It is not our child.
pub fn wait(child: &mut Child, deadline: Duration) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    while started.elapsed() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(None)
}

/// Runs a command that is expected to end by itself, and returns how, with all it said on both streams.
///
/// # Errors
/// It did not end in time.
pub fn finish(command: &mut Command, deadline: Duration) -> Result<(ExitStatus, String)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Read while it runs: a pipe holds 64 KiB, and who writes more waits for a reader.
    let heard = [reader(child.stdout.take().context("piped")?), reader(child.stderr.take().context("piped")?)];
    let status = wait(&mut child, deadline)?;
    if status.is_none() {
        child.kill()?;
    }
    let mut said = String::new();
    for stream in heard {
        said += &stream.join().map_err(|_| anyhow::anyhow!("reading what it said panicked"))??;
    }
    Ok((status.with_context(|| format!("{command:?} is still there: {said}"))?, said))
}

fn reader(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<std::io::Result<String>> {
    std::thread::spawn(move || {
        let mut said = String::new();
        stream.read_to_string(&mut said).map(|_| said)
    })
}

/// The two addresses out of the line that says that the service is ready.
fn addresses(line: &str) -> Result<(String, String)> {
    let urls: Vec<_> = line.split([' ', ',']).filter(|word| word.starts_with("http")).collect();
    let [api, metrics] = urls[..] else { bail!("not two addresses in {line:?}") };
    Ok((api.to_owned(), metrics.trim_end_matches("/metrics").to_owned()))
}
