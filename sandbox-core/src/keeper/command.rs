//! The keeper's command line.
#![expect(clippy::print_stdout, reason = "the line that says it is ready is for whoever started it")]

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;

use super::{Invocation, Options, Weakening};
use crate::{fence::Fence, selinux::Labels};

/// Launches, limits and supervises the sandboxes of one node.
#[derive(Debug, Parser)]
#[command(name = "sandbox-keeper", version)]
struct Arguments {
    /// Unix socket to listen on
    #[arg(long)]
    socket: PathBuf,
    /// Folder of unpacked images
    #[arg(long)]
    images: PathBuf,
    /// Folder of log files
    #[arg(long)]
    logs: PathBuf,
    /// Folder of writable layers that are on disk
    #[arg(long)]
    disks: PathBuf,
    /// Folder of volumes [default: `volumes` beside the folder of writable layers]
    #[arg(long)]
    volumes: Option<PathBuf>,
    /// Group, by name or number, that may connect and read logs
    #[arg(long)]
    group: String,
    /// Folder for the locks of this machine's keepers
    #[arg(long, default_value = "/run/mayfly")]
    run_dir: PathBuf,
    /// gVisor's program, for sandboxes that ask for that isolation [default: runsc in the usual folders, if it is there]
    #[arg(long, value_name = "PATH")]
    runsc: Option<PathBuf>,
    /// Fence without which it does not start, as `landlock`, `apparmor`, `selinux` (repeatable)
    #[arg(long = "require-fence", value_name = "FENCE")]
    required: Vec<Fence>,
    /// Says whether it could take over from a keeper of another version. For that keeper alone
    #[arg(long, hide = true, conflicts_with = "take_over")]
    try_state: bool,
    /// Goes on where the keeper before it stopped in this process. For that keeper alone
    #[arg(long, hide = true, value_name = "DESCRIPTOR")]
    take_over: Option<i32>,
    /// SELinux label of what runs in sandboxes
    #[arg(long, value_name = "LABEL")]
    selinux_label: Option<String>,
    /// SELinux label of the files in sandboxes
    #[arg(long, value_name = "LABEL", requires = "selinux_label")]
    selinux_mount_label: Option<String>,
}

/// Runs a keeper as the command line says, whose other programs lie in the folder `programs`, until it is told to stop.
pub fn run(programs: &Path, weakening: Weakening) -> anyhow::Result<()> {
    crate::fail_point::arm();
    let arguments = Arguments::parse();
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "sandbox-keeper must be started as root");
    let group = match arguments.group.parse() {
        Ok(number) => number,
        Err(_) => {
            nix::unistd::Group::from_name(&arguments.group)?.with_context(|| format!("there is no group {}", arguments.group))?.gid.as_raw()
        }
    };
    let options = Options {
        socket: arguments.socket,
        images: arguments.images,
        logs: arguments.logs,
        volumes: arguments.volumes.unwrap_or_else(|| arguments.disks.parent().unwrap_or(Path::new(".")).join("volumes")),
        disks: arguments.disks,
        group,
        init: programs.join("sandbox-init"),
        unpack: programs.join("sandbox-unpack"),
        runsc: arguments.runsc,
        run: arguments.run_dir,
        labels: arguments.selinux_label.map(|process| Labels { process, mount: arguments.selinux_mount_label }),
        required: arguments.required.into_iter().collect(),
        weakening,
        program: Invocation::of_this_process()?,
    };
    if arguments.try_state {
        return super::upgrade::try_state(&options).context("this program cannot take over");
    }
    match arguments.take_over {
        Some(description) => super::go_on(&options, description).context("the keeper stopped"),
        None => super::run(&options, || println!("ready")).context("the keeper stopped"),
    }
}
