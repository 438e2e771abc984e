//! Measures a running service from outside: alone, under load of many shapes, and beside other container runtimes.

mod bench;
mod drive;
mod host;
mod plot;
mod report;
mod run;
mod schedule;
mod service;
mod shape;
mod tally;
mod target;
mod work;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures a running Mayfly from outside.
///
/// `run` puts load on a service, in the shapes that callers have, and tells how long they waited and what was refused; `bench` compares it with other container runtimes on
/// this machine and with what it promises. `make load` and `make bench` start a service of their own for them.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Arguments),
    Bench(bench::Arguments),
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    host::allow_many_connections()?;
    let is_met = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments).await?,
        Command::Bench(arguments) => bench::bench(&arguments).await?,
    };
    Ok(if is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
