//! The keeper: the one privileged process of a node. See `sandbox_core::keeper`.
#![expect(clippy::print_stdout, reason = "the line that says it is ready is for whoever started it")]

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use sandbox_core::keeper::{self, Options};

/// Launches, limits and supervises the sandboxes of one node.
#[derive(Debug, Parser)]
#[command(version)]
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
    /// Group, by name or number, that may connect and read logs
    #[arg(long)]
    group: String,
    /// Folder for the locks of this machine's keepers
    #[arg(long, default_value = "/run/mayfly")]
    run_dir: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "sandbox-keeper must be started as root");
    let group = match arguments.group.parse() {
        Ok(number) => number,
        Err(_) => {
            nix::unistd::Group::from_name(&arguments.group)?.with_context(|| format!("there is no group {}", arguments.group))?.gid.as_raw()
        }
    };
    let programs = std::env::current_exe()?;
    let options = Options {
        socket: arguments.socket,
        images: arguments.images,
        logs: arguments.logs,
        group,
        init: programs.with_file_name("sandbox-init"),
        unpack: programs.with_file_name("sandbox-unpack"),
        run: arguments.run_dir,
    };
    keeper::run(&options, || println!("ready")).context("the keeper stopped")
}
