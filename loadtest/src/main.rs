//! Measures the service from outside: the same programs through `POST /v1/runs` and through other container runtimes, in one go.

mod contender;
mod measure;
mod peers;
mod report;

use std::{io::Write, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::{contender::Contender, peers::Peer, report::Report};

#[derive(Debug, Parser)]
#[command(about = "Measures a running Mayfly from outside")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the same programs through the service, bubblewrap, crun and runc, and prints medians and ratios
    Bench(Bench),
}

#[derive(Debug, clap::Args)]
struct Bench {
    /// Where the service listens, as in http://127.0.0.1:8080
    #[arg(long)]
    url: String,
    /// A token with the scope `runs`
    #[arg(long)]
    token: String,
    /// Folder with the image `busybox` unpacked, for the other runtimes
    #[arg(long)]
    busybox_root: PathBuf,
    /// Folder with the image `python` unpacked, for the other runtimes
    #[arg(long)]
    python_root: PathBuf,
    /// Runs one after another, for each program and runtime
    #[arg(long, default_value_t = 200)]
    runs: u32,
    /// Runs at a time, where many run at once
    #[arg(long, default_value_t = 8)]
    at_once: u32,
    /// Machine and date, for the report
    #[arg(long, default_value = "")]
    about: String,
    /// Where to write the report as Markdown too
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// What is run: the least there can be, and what people really run.
struct Program {
    name: &'static str,
    image: &'static str,
    command: &'static [&'static str],
    /// A slower program is run less often: one run in so many.
    one_in: u32,
}

const PROGRAMS: [Program; 2] = [
    Program { name: "static true", image: "busybox", command: &["/bin/true"], one_in: 1 },
    Program { name: "Python hello", image: "python", command: &["/usr/bin/python3", "-c", "print('hello')"], one_in: 4 },
];

#[tokio::main]
async fn main() -> Result<()> {
    let Command::Bench(bench) = Arguments::parse().command;
    let report = measure_all(&bench).await?;
    std::io::stdout().write_all(report.table().as_bytes())?;
    if let Some(path) = &bench.markdown {
        std::fs::write(path, report.markdown()).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

async fn measure_all(bench: &Bench) -> Result<Report> {
    let mut report = Report::new(&bench.about, bench.at_once);
    for program in &PROGRAMS {
        let root = if program.image == "python" { &bench.python_root } else { &bench.busybox_root };
        let mut contenders = vec![Contender::service(&bench.url, &bench.token, program.image, program.command)?];
        for peer in [Peer::Bubblewrap, Peer::Crun, Peer::Runc] {
            contenders.push(Contender::peer(peer, root, program.command)?);
        }
        let runs = (bench.runs / program.one_in).max(10);
        for contender in contenders {
            let figures = measure::measure(&contender, program.name, runs, bench.at_once).await?;
            report.add(program.name, contender.name(), figures);
        }
    }
    Ok(report)
}
