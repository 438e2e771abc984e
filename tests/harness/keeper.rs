//! A keeper that is started apart from its service, as a supervisor does it that looks after both.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::service;

/// How long a keeper may take to listen, with what its predecessor left; and to end what it has.
const START_DEADLINE: Duration = Duration::from_secs(30);
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// Runs until it is dropped, or dies.
#[derive(Debug)]
pub struct Keeper {
    child: Child,
}

impl Keeper {
    /// Starts one over a data folder that a service has prepared. It kills itself at these steps, and writes what it says to `log`.
    ///
    /// # Errors
    /// It did not come to listen.
    pub fn start(data_dir: &Path, fail_points: &str, log: &Path) -> Result<Self> {
        let group = fs::metadata(data_dir.join("logs")).context("a service has made its folders")?.gid();
        let mut command = Command::new(service::program("sandbox-keeper"));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("MAYFLY_FAIL_POINTS", fail_points);
        for (flag, name) in [("--socket", "keeper.sock"), ("--images", "images"), ("--disks", "disks"), ("--logs", "logs")] {
            command.arg(flag).arg(data_dir.join(name));
        }
        command.arg("--group").arg(group.to_string());
        Self::start_by(command, log)
    }

    /// Starts one by this command, and writes what it says to `log`.
    ///
    /// # Errors
    /// It did not come to listen.
    pub fn start_by(mut command: Command, log: &Path) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(File::options().create(true).append(true).open(log)?).spawn()?;
        let stdout = child.stdout.take().context("piped")?;
        let (lines, said) = mpsc::channel();
        std::thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        match said.recv_timeout(START_DEADLINE).as_deref() {
            Ok("ready") => Ok(Self { child }),
            said => {
                child.kill()?;
                let status = child.wait()?;
                bail!("the keeper did not start: it said {said:?} and ended with {status}")
            }
        }
    }

    /// Whether its process runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as an operator would (SIGTERM).
    ///
    /// # Errors
    /// It did not end in time.
    pub fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let started = Instant::now();
        while self.is_running() {
            if started.elapsed() > STOP_DEADLINE {
                bail!("the keeper is still there {} s after SIGTERM", STOP_DEADLINE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to do.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
