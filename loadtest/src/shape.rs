//! The shapes of load: what callers do, and how each is measured.

mod idle;
mod logs;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use serde_json::{Value, json};
use time::OffsetDateTime;

pub(crate) use idle::{Idle, settled};
pub(crate) use logs::stream;

use crate::{
    drive::{self, Until, milliseconds},
    report::{CLOSED, OPEN},
    schedule::{self, Spacing},
    service::Service,
    tally::Tally,
    work::{Runs, Work},
};

/// What callers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// One run after another (closed loop)
    Sequential,
    /// Runs at a steady rate, each when it is due, however long those before take (open loop)
    Staggered,
    /// Many runs at the same moment, again and again (open loop)
    Burst,
    /// So many runs at a time, as fast as they end (closed loop); with --rate, at that rate (open loop)
    Sustained,
    /// As `sustained`, with small programs in several languages in turn
    Mixed,
    /// Programs that write as fast as they can, and a WebSocket client for each; every byte is compared
    Logs,
    /// Sandboxes that do nothing, and runs one after another beside them
    Idle,
}

impl Shape {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Staggered => "staggered",
            Self::Burst => "burst",
            Self::Sustained => "sustained",
            Self::Mixed => "mixed",
            Self::Logs => "logs",
            Self::Idle => "idle",
        }
    }
}

/// How much of each shape, and of what.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub(crate) struct Load {
    /// How long a shape lasts, but for `burst`, `logs` and `idle`
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub(crate) duration_s: f64,
    /// So many requests, in place of a duration, in closed loops
    #[arg(long, value_name = "COUNT")]
    pub(crate) requests: Option<u64>,
    /// Runs that are not counted, before each shape; they must go well
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    pub(crate) warm_up: u64,
    /// Places in a closed loop
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) at_once: u32,
    /// Requests in a second: for `staggered` in place of 20; makes open loops of `sustained` and `mixed`
    #[arg(long, value_name = "PER_SECOND", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// How arrivals of an open loop lie between each other
    #[arg(long, value_enum, default_value_t = Spacing::Even)]
    pub(crate) spacing: Spacing,
    /// Of the arrivals at random: with the same one they are the same
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Runs at the same moment
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    pub(crate) burst: u32,
    /// How often they come
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    pub(crate) bursts: u32,
    /// From one burst to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    pub(crate) pause_s: f64,
    /// Languages of `mixed`, each with an image that the service has: python, c, bash, javascript
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_values = ["python", "c", "bash", "javascript"])]
    pub(crate) languages: Vec<String>,
    /// Programs that write, and clients that read, at one time
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub(crate) streams: u32,
    /// MiB that each of them writes, at most 64
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub(crate) log_mib: u64,
    /// Sandboxes that do nothing
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub(crate) sandboxes: u32,
    /// The data folder of the service, if it is on this machine: `idle` then tells what its sandboxes take of the memory. As root
    #[arg(long, value_name = "PATH")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Image of all runs but those of `mixed`
    #[arg(long, value_name = "REFERENCE", default_value = "busybox")]
    pub(crate) image: String,
    /// Program and arguments of these runs [default: /bin/true]
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 100_000.0 => Ok(rate),
        _ => Err("a rate is above 0 and at most 100000".to_owned()),
    }
}

const STAGGERED_PER_SECOND: f64 = 20.0;

/// What was measured of a shape.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) kind: &'static str,
    pub(crate) tally: Tally,
    pub(crate) facts: BTreeMap<&'static str, f64>,
}

/// The request of a run as all shapes but `mixed` make it.
pub(crate) fn request(load: &Load) -> Value {
    let command = if load.command.is_empty() { vec!["/bin/true".to_owned()] } else { load.command.clone() };
    json!({ "image": load.image, "command": command })
}

pub(crate) async fn measure(shape: Shape, load: &Load, service: &Service) -> Result<Measured> {
    let request = request(load);
    let runs = match shape {
        Shape::Mixed => Runs::in_languages(service, &load.languages)?,
        Shape::Sequential | Shape::Staggered | Shape::Burst | Shape::Sustained | Shape::Logs | Shape::Idle => Runs::of(service, request),
    };
    // Each language once, at the least.
    let warm_up = if shape == Shape::Mixed { load.warm_up.max(u64::try_from(load.languages.len())?) } else { load.warm_up };
    let runs = Arc::new(runs);
    for number in 0..warm_up {
        runs.once(number).await.context("a first run")?;
    }
    match (shape, load.rate) {
        (Shape::Sequential, _) => closed(shape, load, &runs, 1).await,
        (Shape::Sustained | Shape::Mixed, None) => closed(shape, load, &runs, load.at_once).await,
        (Shape::Staggered, rate) => open(shape, load, &runs, rate.unwrap_or(STAGGERED_PER_SECOND)).await,
        (Shape::Sustained | Shape::Mixed, Some(rate)) => open(shape, load, &runs, rate).await,
        (Shape::Burst, _) => burst(load, runs).await,
        (Shape::Logs, _) => logs::measure(load, service).await,
        (Shape::Idle, _) => idle::measure(load, service, &runs).await,
    }
}

async fn closed<W: Work>(shape: Shape, load: &Load, work: &Arc<W>, at_once: u32) -> Result<Measured> {
    let lasting = Duration::from_secs_f64(load.duration_s);
    let (until, length) = load.requests.map_or((Until::Over(lasting), milliseconds(lasting)), |count| (Until::Count(count), count));
    let tally = drive::closed(work, at_once, until, &bar(shape.name(), length)?).await?;
    Ok(Measured { kind: CLOSED, tally, facts: BTreeMap::from([("at_once", f64::from(at_once))]) })
}

async fn open<W: Work>(shape: Shape, load: &Load, work: &Arc<W>, per_second: f64) -> Result<Measured> {
    let arrivals = schedule::steady(per_second, Duration::from_secs_f64(load.duration_s), load.spacing, load.seed);
    let bar = bar(shape.name(), u64::try_from(arrivals.len())?)?;
    let tally = drive::open(work, arrivals, &bar).await?;
    Ok(Measured { kind: OPEN, tally, facts: BTreeMap::from([("planned_per_s", per_second)]) })
}

async fn burst(load: &Load, runs: Arc<Runs>) -> Result<Measured> {
    let arrivals = schedule::bursts(load.burst, load.bursts, Duration::from_secs_f64(load.pause_s));
    let bar = bar(Shape::Burst.name(), u64::try_from(arrivals.len())?)?;
    let starts = Arc::new(Starts::new(runs));
    let tally = drive::open(&starts, arrivals.clone(), &bar).await?;
    let slowest = starts.slowest_ms(&tally, &arrivals);
    let facts = BTreeMap::from([("burst", f64::from(load.burst)), ("slowest_start_ms", slowest)]);
    Ok(Measured { kind: OPEN, tally, facts })
}

/// Runs whose starts are noted, beside their ends.
#[derive(Debug)]
pub(crate) struct Starts<W> {
    work: Arc<W>,
    /// One moment by both clocks: the service tells its times by the clock on the wall. It must be on this machine.
    now: (Instant, OffsetDateTime),
    started: std::sync::Mutex<Vec<(u64, OffsetDateTime)>>,
}

impl<W: Work> Starts<W> {
    pub(crate) fn new(work: Arc<W>) -> Self {
        #[expect(clippy::disallowed_methods, reason = "what the service tells is held against the clock that it reads")]
        let wall = OffsetDateTime::now_utc();
        Self { work, now: (Instant::now(), wall), started: std::sync::Mutex::default() }
    }

    /// From when one was due until its program ran, of the one for which that was longest.
    pub(crate) fn slowest_ms(&self, tally: &Tally, arrivals: &[Duration]) -> f64 {
        let started = self.started.lock().expect("nobody panics who holds it");
        let waits = started.iter().filter_map(|(number, started)| {
            let due = tally.begun + *arrivals.get(usize::try_from(*number).ok()?)?;
            let due = self.now.1 + due.duration_since(self.now.0);
            Some((*started - due).as_seconds_f64() * 1e3)
        });
        waits.fold(0.0, f64::max)
    }
}

impl<W: Work> Work for Starts<W> {
    async fn once(&self, number: u64) -> Result<crate::work::Done, crate::service::Failure> {
        let done = self.work.once(number).await?;
        if let Some(at) = done.started_at {
            self.started.lock().expect("nobody panics who holds it").push((number, at));
        }
        Ok(done)
    }
}

/// Draws only where a person looks: nothing is written where stderr is no terminal. However it ends, it leaves no line behind.
pub(crate) fn bar(name: &str, length: u64) -> Result<ProgressBar> {
    let style =
        ProgressStyle::with_template("{msg:28} [{bar:32}] {percent:>3} %, {elapsed} passed").context("the template of the progress bar")?;
    let bar = ProgressBar::new(length).with_style(style.progress_chars("#> "));
    Ok(bar.with_message(name.to_owned()).with_finish(ProgressFinish::AndClear))
}
