//! What we promise, each beside what was measured of the service alone.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    Arguments,
    contender::{self, Contender},
    crowd, ensure_well, picture, smallest, well,
};
use crate::{
    drive::{self, Until},
    host::Memory,
    schedule::{self, Spacing},
    service::Service,
    shape::{self, Idle, Starts, bar},
    tally::{Tally, at_ms, count},
    work::{Runs, Work as _},
};

/// One target of ours.
#[derive(Debug)]
pub(super) struct Promise {
    pub(super) what: String,
    pub(super) wanted: String,
    pub(super) measured: String,
    pub(super) is_met: bool,
    /// How it was measured.
    pub(super) how: String,
}

/// All of them, in the order in which they were measured.
#[derive(Debug, Default)]
pub(super) struct Promises {
    pub(super) all: Vec<Promise>,
    /// What the memory of idle sandboxes consists of.
    pub(super) memory: Vec<(&'static str, String)>,
}

impl Promises {
    pub(super) fn at_most(&mut self, what: &str, bound: f64, measured: f64, unit: &str, how: &str) {
        self.add(what, format!("≤ {}", figure(bound, unit)), figure(measured, unit), measured <= bound, how);
    }

    pub(super) fn below(&mut self, what: &str, bound: f64, measured: f64, unit: &str, how: &str) {
        self.add(what, format!("< {}", figure(bound, unit)), figure(measured, unit), measured < bound, how);
    }

    fn at_least(&mut self, what: &str, bound: f64, measured: f64, unit: &str, how: &str) {
        self.add(what, format!("≥ {}", figure(bound, unit)), figure(measured, unit), measured >= bound, how);
    }

    fn add(&mut self, what: &str, wanted: String, measured: String, is_met: bool, how: &str) {
        self.all.push(Promise { what: what.to_owned(), wanted, measured, is_met, how: how.to_owned() });
    }
}

/// As many digits as such a figure is good to.
fn figure(of: f64, unit: &str) -> String {
    let digits = if of == 0.0 || of >= 100.0 || (of.fract() == 0.0 && of >= 1.0) {
        0
    } else if of < 1.0 {
        3
    } else {
        2
    };
    format!("{of:.digits$} {unit}")
}

const BURST: u32 = 100;
const BURSTS: u32 = 5;
/// Between bursts, and where launches are to be warm: what is prepared ahead is there again.
const PAUSE: Duration = Duration::from_secs(2);
const WARM_PER_SECOND: f64 = 40.0;
const LOGS: u32 = 5;
const LOG_MIB: u64 = 64;
const MIB: f64 = 1_048_576.0;

/// Measures everything that is promised of the service alone. `control` tells how fast the machine was meanwhile.
pub(super) async fn measure(arguments: &Arguments, service: &Service, control: Arc<Contender>, to: &mut Promises) -> Result<()> {
    let runs = Arc::new(smallest(service));
    one_at_a_time(arguments, &runs, to).await?;
    many_at_once(arguments, &runs, to).await?;
    launches(arguments, service, &runs, to).await?;
    bursts(&runs, to).await?;
    logs(service, to).await?;
    crowded(arguments, service, &runs, &control, to).await
}

async fn one_at_a_time(arguments: &Arguments, runs: &Arc<Runs>, to: &mut Promises) -> Result<()> {
    let count = u64::from(arguments.runs) * 5;
    let tally = closed("one at a time", runs, 1, count).await?;
    picture(arguments.out.as_deref(), "one-at-a-time", &arguments.about, &tally)?;
    let how = format!("{count} runs of static true, one after another, by `POST /v1/runs`");
    to.at_most("one at a time, p50", 3.0, tally.latency_ms(0.5), "ms", &how);
    to.at_most("one at a time, p99", 10.0, tally.latency_ms(0.99), "ms", &how);
    Ok(())
}

async fn many_at_once(arguments: &Arguments, runs: &Arc<Runs>, to: &mut Promises) -> Result<()> {
    let number = u64::from(arguments.runs) * 10;
    let bar = bar("many at once", number)?;
    // Here errors are what is measured.
    let tally = drive::closed(runs, arguments.at_once, Until::Count(number), &bar).await?;
    picture(arguments.out.as_deref(), "many-at-once", &arguments.about, &tally)?;
    let (places, how) = (arguments.at_once, format!("{number} runs, {} at a time", arguments.at_once));
    to.at_least(&format!("{places} at a time"), 500.0, tally.rate(), "runs/s", &how);
    to.at_most(&format!("{places} at a time, p99"), 60.0, tally.latency_ms(0.99), "ms", &how);
    to.at_most(&format!("{places} at a time, errors"), 0.0, count(tally.failed()), "runs", &how);
    Ok(())
}

/// From the keeper's receipt of a launch to the program's start, as each answer tells it.
async fn launches(arguments: &Arguments, service: &Service, runs: &Arc<Runs>, to: &mut Promises) -> Result<()> {
    let lasting = Duration::from_secs_f64(f64::from(arguments.runs) / WARM_PER_SECOND);
    let arrivals = schedule::steady(WARM_PER_SECOND, lasting, Spacing::Even, 1);
    let bar = bar("warm launches", u64::try_from(arrivals.len())?)?;
    let staggered = well("warm launches", drive::open(runs, arrivals, &bar).await?)?;
    let cold = Arc::new(Runs::cold(service, contender::request(&super::PROGRAMS[0])));
    let varied = closed("cold launches", &cold, 1, arguments.runs.into()).await?;
    let mut told = |launch: &str, bound: f64, of: &Tally, how: &str| -> Result<()> {
        let times = of.launches.get(launch).with_context(|| format!("no launch was {launch}"))?;
        let how = format!("{how}; `phases_ms.launch` of the {} that were {launch}: p99 {:.2} ms", times.len(), at_ms(times, 0.99));
        to.at_most(&format!("keeper to exec, {launch}, p50"), bound, at_ms(times, 0.5), "ms", &how);
        Ok(())
    };
    told("warm", 1.0, &staggered, &format!("open loop, {WARM_PER_SECOND} runs a second"))?;
    told("cold", 2.0, &varied, "one after another, each with another limit of files, for which nothing stands ready")
}

async fn bursts(runs: &Arc<Runs>, to: &mut Promises) -> Result<()> {
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..BURSTS {
        tokio::time::sleep(PAUSE).await;
        let arrivals = schedule::bursts(BURST, 1, PAUSE);
        let noted = Arc::new(Starts::new(runs.clone()));
        let tally = well("burst", drive::open(&noted, arrivals.clone(), &bar("burst", BURST.into())?).await?)?;
        starts.push(noted.slowest_ms(&tally, &arrivals));
        ends.push(tally.latency_ms(1.0));
    }
    let (start, end) = (median(&mut starts), median(&mut ends));
    let how = format!(
        "{BURST} runs due at one moment, until the last one's `started_at`; the median of {BURSTS} bursts, the slowest {:.0} ms; all had ended after {end:.0} ms",
        starts.iter().copied().fold(0.0, f64::max)
    );
    to.at_most(&format!("burst of {BURST}, all started"), 250.0, start, "ms", &how);
    Ok(())
}

async fn logs(service: &Service, to: &mut Promises) -> Result<()> {
    let bar = bar("logs", LOGS.into())?;
    let (mut rates, mut faults) = (Vec::new(), Vec::new());
    for _ in 0..LOGS {
        match shape::stream(service, super::PROGRAMS[0].image, LOG_MIB).await {
            Ok(rate) => rates.push(rate),
            Err(failure) => faults.push(failure.to_string()),
        }
        bar.inc(1);
    }
    let how = format!(
        "{LOG_MIB} MiB of text that `cat` writes, followed by one WebSocket client from the first piece to the last; the median of {LOGS}"
    );
    to.at_least("log to one WebSocket client", 200.0, if rates.is_empty() { 0.0 } else { median(&mut rates) }, "MB/s", &how);
    let how = faults.first().map_or_else(|| "sequence numbers, length and SHA-256 of what came, of each stream".to_owned(), Clone::clone);
    to.at_most("log, streams with a byte missing or another", 0.0, count(u64::try_from(faults.len())?), "streams", &how);
    Ok(())
}

/// Idle sandboxes, their memory, and how fast runs are beside them and a million finished ones.
async fn crowded(arguments: &Arguments, service: &Service, runs: &Arc<Runs>, control: &Arc<Contender>, to: &mut Promises) -> Result<()> {
    let Arguments { data_dir, sandboxes, rows, .. } = arguments;
    let number = u64::from(arguments.runs);
    let alone = closed("alone", runs, 1, number).await?;
    let control_alone = closed("bubblewrap, for comparison", control, 1, number).await?;
    let before = shape::settled(data_dir).await?;
    let idle = Idle::create(service, super::PROGRAMS[0].image, *sandboxes).await?;
    ensure_well("idle sandboxes", &idle.created)?;
    let after = shape::settled(data_dir).await?;
    memory(&before, &after, *sandboxes, to);
    let folder = data_dir.clone();
    let rows = *rows;
    let filled = tokio::task::spawn_blocking(move || crowd::finished(&folder, rows));
    filled.await?.context("rows of finished runs")?;
    for number in 0..number.min(50) {
        runs.once(number).await?;
    }
    let crowded = closed("beside a crowd", runs, 1, number).await?;
    let control_crowded = closed("bubblewrap, for comparison", control, 1, number).await?;
    idle.delete(service).await?;
    let p50 = |tally: &Tally| tally.latency_ms(0.5);
    let how = format!(
        "p50 of {number} runs before ({:.2} ms) and beside them ({:.2} ms); bubblewrap at the same times: {:.2} and {:.2} ms",
        p50(&alone),
        p50(&crowded),
        p50(&control_alone),
        p50(&control_crowded)
    );
    let what = format!("p50 beside {} idle sandboxes and {} finished rows, of that without", thousands(*sandboxes), thousands(rows));
    to.at_most(&what, 1.3, p50(&crowded) / p50(&alone), "×", &how);
    Ok(())
}

fn memory(before: &Memory, after: &Memory, sandboxes: u32, to: &mut Promises) {
    let mib = |bytes: u64| count(bytes) / MIB;
    let more = |of: fn(&Memory) -> u64| (mib(of(after)) - mib(of(before))) / f64::from(sandboxes);
    let taken = (mib(before.available) - mib(after.available)) / f64::from(sandboxes);
    let how = format!("what `MemAvailable` fell by while {} were made that sleep, shared out", thousands(sandboxes));
    to.at_most("memory of an idle sandbox", 1.0, taken, "MiB", &how);
    let how = format!("`VmRSS` at {} sandboxes, pages of its program's file included", thousands(sandboxes));
    to.at_most("service, resident", 80.0, count(after.service) / 1e6, "MB", &how);
    to.at_most("keeper, resident", 16.0, count(after.keeper) / 1e6, "MB", &how);
    let parts: [(&str, Part); 6] = [
        ("init and payload (PSS)", |memory| memory.sandboxes),
        ("kernel: slab, stacks, page tables, counters of each processor", |memory| memory.kernel),
        ("files in memory", |memory| memory.shared),
        ("service", |memory| memory.service),
        ("keeper", |memory| memory.keeper),
        ("Postgres (PSS)", |memory| memory.postgres),
    ];
    let sum: f64 = parts.iter().map(|(_, of)| more(*of)).sum();
    to.memory = parts.into_iter().map(|(name, of)| (name, format!("{:.3}", more(of)))).collect();
    to.memory.push(("sum of these", format!("{sum:.3}")));
    to.memory.push(("by `MemAvailable`", format!("{taken:.3}")));
}

async fn closed<W: crate::work::Work>(what: &str, work: &Arc<W>, places: u32, number: u64) -> Result<Tally> {
    well(what, drive::closed(work, places, Until::Count(number), &bar(what, number)?).await?)
}

/// One of the parts that memory is in, in bytes.
type Part = fn(&Memory) -> u64;

fn median(of: &mut [f64]) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// With commas, as people read it.
fn thousands(number: u32) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_as_people_read_them() {
        assert_eq!([7, 1000, 1_000_000].map(thousands), ["7", "1,000", "1,000,000"]);
        assert_eq!(
            [(250.0, "ms"), (3.0, "ms"), (2.954, "ms"), (0.025, "×"), (0.0, "runs")].map(|(of, unit)| figure(of, unit)),
            ["250 ms", "3 ms", "2.95 ms", "0.025 ×", "0 runs"]
        );
    }
}
