//! `tools/dashboard.sh` beside a service of a test.

use std::{
    io::{BufRead as _, BufReader, Read},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use mayfly_tests::{Client, service};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long it may take to serve, or to end, on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The nobody of Debian.
const NOBODY: u32 = 65534;

/// The script of this tree, with nothing from the environment that could configure it. What it makes goes below `folder`.
pub(crate) fn script(root: &Path, folder: &Path) -> Command {
    let mut command = Command::new(root.join("tools/dashboard.sh"));
    command.env_clear().env("PATH", PATH).env("TMPDIR", folder).env("DATA_DIR", "/nonexistent");
    command
}

/// One that serves. Interrupted when dropped.
#[derive(Debug)]
pub(crate) struct Dashboard {
    child: Child,
    folder: tempfile::TempDir,
    /// All that it had said when it served.
    said: String,
    prometheus: String,
}

impl Dashboard {
    /// Shows what this client's service does, and this client's tenant.
    pub(crate) fn start(client: &Client, environment: &[(&str, &str)]) -> Result<Self> {
        let folder = service::folder()?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Self::wait_for(script(&root, folder.path()), client, environment, folder)
    }

    /// The same by the script of this tree, as an ordinary user.
    pub(crate) fn start_as_nobody(client: &Client, root: &Path) -> Result<Self> {
        let folder = service::folder()?;
        std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
        let mut command = script(root, folder.path());
        command.uid(NOBODY).gid(NOBODY);
        Self::wait_for(command, client, &[], folder)
    }

    fn wait_for(mut command: Command, client: &Client, environment: &[(&str, &str)], folder: tempfile::TempDir) -> Result<Self> {
        let place = client.place();
        let mut child = command
            .env("METRICS_LISTEN", place.metrics_url.trim_start_matches("http://"))
            .env("MAYFLY_URL", &place.url)
            .env("MAYFLY_TOKEN", client.token().context("a token")?)
            .env("PROMETHEUS_LISTEN", "127.0.0.1:0")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting tools/dashboard.sh")?;
        let (lines, heard) = mpsc::channel();
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().context("piped")?), Box::new(child.stderr.take().context("piped")?)];
        for stream in streams {
            let lines = lines.clone();
            std::thread::spawn(move || BufReader::new(stream).lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        }
        drop(lines);
        let mut this = Self { child, folder, said: String::new(), prometheus: String::new() };
        while !this.said.contains("Stop: Ctrl-C") {
            let line = heard.recv_timeout(DEADLINE).with_context(|| format!("it does not serve: {}", this.said))?;
            this.said += &format!("{line}\n");
        }
        let first = this.boards_told().next().with_context(|| this.said.clone())?;
        this.prometheus = first.split_once("/consoles/").with_context(|| first.to_owned())?.0.to_owned();
        Ok(this)
    }

    fn boards_told(&self) -> impl Iterator<Item = &str> {
        self.said.lines().filter_map(|line| line.strip_prefix("Board:")).map(str::trim)
    }

    /// The boards that it told of, by name.
    pub(crate) fn boards(&self) -> impl Iterator<Item = &str> {
        self.boards_told().filter_map(|url| url.rsplit_once('/')?.1.strip_suffix(".html"))
    }

    pub(crate) fn said(&self) -> &str {
        &self.said
    }

    /// Where its Prometheus is.
    pub(crate) fn prometheus(&self) -> &str {
        &self.prometheus
    }

    /// What it makes is below this.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn url(&self, board: &str) -> String {
        format!("{}/consoles/{board}.html", self.prometheus)
    }

    /// A board as it is now. Panics with what Prometheus has against it.
    pub(crate) async fn page(&self, board: &str) -> String {
        let answer = reqwest::get(self.url(board)).await.expect("Prometheus answers");
        let status = answer.status();
        let text = answer.text().await.expect("a page is text");
        assert_eq!(status, 200, "{board}: {text}");
        text
    }

    /// `kill -9`, of the script alone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is our child");
    }

    /// Ctrl-C, and how it ended.
    pub(crate) fn interrupt(&mut self) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        service::wait(&mut self.child, DEADLINE)?.context("it is still there")
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None))
            && let Err(error) = self.interrupt()
        {
            eprintln!("stopping the dashboard: {error:#}");
        }
    }
}
