//! The two processes beside the service: a keeper and a private Postgres, started or taken over, and stopped.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use sandbox_core::{client::Client, protocol::Request, transport::Socket};

use crate::{
    config::{Account, Settings},
    postgres::{Cluster, Start},
};

/// How long a keeper may take to listen, and to clean up.
const KEEPER_START: Duration = Duration::from_secs(30);
const KEEPER_STOP: Duration = Duration::from_secs(20);
/// What `sun_path` of unix(7) holds, with its end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What runs beside the service.
#[derive(Debug)]
pub(super) struct Helpers {
    keeper_socket: PathBuf,
    keeper: Owner,
    cluster: Option<(Cluster, Start)>,
}

/// Whose the keeper is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// Somebody else starts and stops it.
    Other,
    /// Ours, from a service before this one.
    Adopted,
    /// Ours.
    Started,
}

/// The keeper that runs, or is to be started.
#[derive(Debug)]
pub(super) struct KeeperFound {
    socket: PathBuf,
    owner: Owner,
}

/// Looks whether a keeper answers. Fails if none does and we may not start one. Changes nothing.
pub(super) fn look_for_keeper(settings: &Settings, is_root: bool) -> anyhow::Result<KeeperFound> {
    let is_given = settings.keeper_socket.is_some();
    let socket = settings.keeper_socket.clone().unwrap_or_else(|| settings.data_dir.join("keeper.sock"));
    let len = socket.as_os_str().len();
    ensure!(len <= SOCKET_PATH_BYTES_MAX, "the path of the keeper's socket is {} bytes too long", len - SOCKET_PATH_BYTES_MAX);
    let owner = match Socket::connect(&socket) {
        Ok(_) if is_given || !is_root => Owner::Other,
        Ok(_) => Owner::Adopted,
        Err(error) if is_given => return Err(error).with_context(|| format!("no keeper answers on {}", socket.display())),
        Err(_) if !is_root => {
            bail!("no keeper answers on {}: start mayfly as root, or a sandbox-keeper as root beforehand", socket.display())
        }
        Err(_) => Owner::Started,
    };
    Ok(KeeperFound { socket, owner })
}

impl Helpers {
    /// Starts what does not run yet. What was started is stopped again if the rest fails.
    pub(super) fn start(settings: &Settings, keeper: KeeperFound, cluster: Option<Cluster>, account: &Account) -> anyhow::Result<Self> {
        let KeeperFound { socket, owner } = keeper;
        match owner {
            Owner::Started => start_keeper(settings, &socket, account)?,
            Owner::Adopted => tracing::info!("taking over the keeper that runs"),
            Owner::Other => {}
        }
        let mut helpers = Self { keeper_socket: socket, keeper: owner, cluster: None };
        if let Some(cluster) = cluster {
            match cluster.start(settings.database_connections) {
                Ok(start) => helpers.cluster = Some((cluster, start)),
                Err(error) => {
                    return Err(match helpers.stop_started() {
                        Ok(()) => error,
                        Err(other) => error.context(format!("{other:#}; and before that")),
                    });
                }
            }
        }
        Ok(helpers)
    }

    pub(super) fn keeper_socket(&self) -> &Path {
        &self.keeper_socket
    }

    /// Whether the keeper is started and stopped with the service.
    pub(super) fn is_keeper_ours(&self) -> bool {
        self.keeper != Owner::Other
    }

    /// The private cluster, if there is one.
    pub(super) fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref().map(|(cluster, _)| cluster)
    }

    /// Stops what is ours. Needs no privilege.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.stop_if(|_| true)
    }

    /// Stops what this process started; what it took over goes on, for the next one.
    pub(super) fn stop_started(self) -> anyhow::Result<()> {
        self.stop_if(|start| start == Start::Fresh)
    }

    fn stop_if(self, is_to_stop: impl Fn(Start) -> bool) -> anyhow::Result<()> {
        let keeper = match self.keeper {
            Owner::Started if is_to_stop(Start::Fresh) => stop_keeper(&self.keeper_socket),
            Owner::Adopted if is_to_stop(Start::Adopted) => stop_keeper(&self.keeper_socket),
            Owner::Other | Owner::Adopted | Owner::Started => Ok(()),
        };
        let cluster = match self.cluster {
            Some((cluster, start)) if is_to_stop(start) => cluster.stop(),
            _ => Ok(()),
        };
        // Both were tried; one error tells of both failures.
        match (keeper, cluster) {
            (Err(keeper), Err(cluster)) => Err(cluster.context(format!("{keeper:#}; and after that"))),
            (keeper, cluster) => keeper.and(cluster),
        }
    }
}

fn start_keeper(settings: &Settings, socket: &Path, account: &Account) -> anyhow::Result<()> {
    let program = match &settings.keeper_bin {
        Some(given) => given.clone(),
        None => std::env::current_exe().context("where this program lies")?.with_file_name("sandbox-keeper"),
    };
    ensure!(program.exists(), "the keeper's program is not at {}; say where with --keeper-bin", program.display());
    // A session of its own, so that Ctrl-C and a closed terminal reach the service alone.
    let mut command = Command::new("setsid");
    command.arg(&program).arg("--socket").arg(socket).arg("--images").arg(settings.data_dir.join("images"));
    command.arg("--disks").arg(settings.data_dir.join("disks"));
    command.arg("--logs").arg(settings.data_dir.join("logs")).arg("--group").arg(account.gid.to_string());
    for fence in settings.required_fences.iter() {
        command.arg("--require-fence").arg(fence.name());
    }
    if let Some(labels) = &settings.selinux_labels {
        command.arg("--selinux-label").arg(&labels.process);
        command.args(labels.mount.iter().flat_map(|label| ["--selinux-mount-label", label]));
    }
    let mut keeper = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting the keeper with setsid")?;
    let listening = wait_until_ready(&mut keeper);
    if listening.is_err() {
        // It may have ended already; then there is nothing to end.
        drop(keeper.kill());
        drop(keeper.wait());
    }
    listening
}

fn wait_until_ready(keeper: &mut Child) -> anyhow::Result<()> {
    let stdout = keeper.stdout.take().context("it was asked for")?;
    ensure!(is_readable(&stdout, KEEPER_START)?, "the keeper did not come to listen within {} s", KEEPER_START.as_secs());
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).context("hearing from the keeper")?;
    if line.trim() != "ready" {
        let status = keeper.wait()?;
        bail!("the keeper did not start ({status}); it has said why above");
    }
    Ok(())
}

fn stop_keeper(socket: &Path) -> anyhow::Result<()> {
    let (mut client, hello) = match Client::connect(socket) {
        Ok(connected) => connected,
        // There is none any more, which is what is wanted.
        Err(_) => return Ok(()),
    };
    let pid = i32::try_from(hello.pid).ok().and_then(Pid::from_raw).context("the keeper has no process id")?;
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => File::from(process),
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error).context("watching the keeper"),
    };
    client.send(&Request::Shutdown, &[]).context("telling the keeper to stop")?;
    ensure!(is_readable(&process, KEEPER_STOP)?, "the keeper (process {}) did not stop within {} s", hello.pid, KEEPER_STOP.as_secs());
    Ok(())
}

/// Whether there is something to read, or an end, before the deadline. A descriptor of a process is readable when that has ended.
fn is_readable(what: impl std::os::fd::AsFd, deadline: Duration) -> anyhow::Result<bool> {
    let deadline = Timespec { tv_sec: i64::try_from(deadline.as_secs())?, tv_nsec: 0 };
    let ready = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&what, PollFlags::IN)], Some(&deadline)))?;
    Ok(ready > 0)
}
