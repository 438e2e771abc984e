//! `loadtest bench`: ours beside other runtimes, and beside what we promise, in one go on one machine.

mod contender;
mod crowd;
mod docker;
mod document;
mod peer;
mod promise;
mod rounds;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use self::{
    contender::{Contender, Program},
    document::Document,
    promise::Promises,
    rounds::Row,
};
use crate::{plot, service::Service, tally::Tally, work::Runs};

/// Compares a service with other container runtimes on this machine, and with what it promises.
///
/// As root, on the service's own machine, which nothing else uses meanwhile. The service is left with a million rows more than it had: `make bench` starts one for this.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the service listens
    #[arg(long, env = "MAYFLY_URL")]
    url: String,
    /// A token with the scopes `runs`, `sandboxes:read` and `sandboxes:write`
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: String,
    /// Data folder of the service, with its private Postgres
    #[arg(long, value_name = "PATH")]
    data_dir: PathBuf,
    /// The image `busybox` unpacked, for the other runtimes
    #[arg(long, value_name = "PATH")]
    busybox_root: PathBuf,
    /// The image `python` unpacked, likewise
    #[arg(long, value_name = "PATH")]
    python_root: PathBuf,
    /// Socket of a Docker Engine
    #[arg(long, value_name = "PATH")]
    docker_socket: PathBuf,
    /// Runs one after another of each program and runtime; of slow ones a part of it, of our own alone several times as many
    #[arg(long, value_name = "COUNT", default_value_t = 400, value_parser = clap::value_parser!(u32).range(5..=100_000))]
    runs: u32,
    /// The runtimes take turns so often
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Runs at one time, where many run at once
    #[arg(long, value_name = "COUNT", default_value_t = 8)]
    at_once: u32,
    /// Idle sandboxes
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    sandboxes: u32,
    /// Finished rows
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000)]
    rows: u32,
    /// Machine, date and command, for the head of the report
    #[arg(long, value_name = "TEXT", default_value = "")]
    about: String,
    /// The page to renew; what stands in it between the marks of the part by hand stays
    #[arg(long, value_name = "PATH")]
    markdown: Option<PathBuf>,
    /// Folder for pictures of our own runs
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Fail if a target is missed
    #[arg(long)]
    strict: bool,
}

/// What is run: the least there can be, and what people really run. A slower one is run less often: one run in so many.
const PROGRAMS: [Program; 2] = [
    Program { name: "static true", image: "busybox", command: &["/bin/true"], one_in: 1 },
    Program { name: "Python hello", image: "python", command: &["/usr/bin/python3", "-c", "print('hello')"], one_in: 4 },
];

/// The longest that a request may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Measures, tells, and says whether what had to be met was.
pub(crate) async fn bench(arguments: &Arguments) -> Result<bool> {
    let service = Service::new(&arguments.url, &arguments.token, TIMEOUT)?;
    // Read before anything is measured: a page that cannot be renewed is told at once.
    let mut document = Document::new(&arguments.about, arguments.markdown.as_deref(), arguments.at_once)?;
    let mut rows = Vec::new();
    for program in &PROGRAMS {
        let root = if program.image == "python" { &arguments.python_root } else { &arguments.busybox_root };
        let contenders = Contender::all(&service, program, root, &arguments.docker_socket).await?;
        rows.extend(rounds::measure(program, contenders, arguments).await?);
    }
    let mut promises = Promises::default();
    beside_others(&rows, &mut promises)?;
    let control = Contender::bubblewrap(&PROGRAMS[0], &arguments.busybox_root)?;
    promise::measure(arguments, &service, control, &mut promises).await?;
    document.add(rows, promises);
    std::io::stdout().write_all(document.text().as_bytes())?;
    if let Some(path) = &arguments.markdown {
        std::fs::write(path, document.markdown()).with_context(|| path.display().to_string())?;
    }
    Ok(!arguments.strict || document.is_met())
}

/// What is promised as a ratio to another runtime, by the smallest program's median.
fn beside_others(rows: &[Row], promises: &mut Promises) -> Result<()> {
    let p50 = |name: &str| {
        let row = rows.iter().find(|row| row.program == PROGRAMS[0].name && row.contender == name);
        row.map(|row| row.one.latency_ms(0.5)).with_context(|| format!("{name} was not measured"))
    };
    let ours = p50(contender::OURS)?;
    let how = "p50 of static true one at a time, both in the table below, in rounds that take turns";
    let docker = p50(docker::NAME)?;
    promises.at_most("latency, of Docker Engine's by its API", 1.0 / 40.0, ours / docker, "×", how);
    let crun = p50(peer::Peer::Crun.name())?;
    promises.below("latency, of `crun run` alone", 1.0, ours / crun, "×", how);
    let bubblewrap = p50(peer::Peer::Bubblewrap.name())?;
    promises.at_most("latency, of `bwrap` alone", 1.0, ours / bubblewrap, "×", how);
    Ok(())
}

/// Runs of the smallest program by the API, with the limits that all contenders are given.
fn smallest(service: &Service) -> Runs {
    Runs::of(service, contender::request(&PROGRAMS[0]))
}

/// A measurement in which anything failed is none.
fn well(what: &str, tally: Tally) -> Result<Tally> {
    ensure_well(what, &tally)?;
    Ok(tally)
}

fn ensure_well(what: &str, tally: &Tally) -> Result<()> {
    if let Some((code, errors)) = tally.errors.iter().next() {
        let (count, example) = (errors.count, &errors.example);
        anyhow::bail!("{what}: {count} of {} failed: {code}: {example}", tally.sent);
    }
    ensure!(tally.sent > 0, "{what}: nothing was run");
    Ok(())
}

fn picture(out: Option<&Path>, name: &str, about: &str, tally: &Tally) -> Result<()> {
    let Some(out) = out else { return Ok(()) };
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    plot::draw(&out.join(format!("{name}.svg")), &format!("{name} — {about}"), tally)
}
