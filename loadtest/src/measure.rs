//! Runs a contender and takes its times: one after another for latency, many at once for throughput.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};

use crate::contender::Contender;

/// Runs before the clock starts: caches fill, connections open.
const WARM_UP: u32 = 10;

/// What was measured of one contender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) p50_ms: f64,
    pub(crate) p90_ms: f64,
    pub(crate) p99_ms: f64,
    /// Runs in a second, many at once.
    pub(crate) rate: f64,
}

pub(crate) async fn measure(contender: &Contender, program: &str, runs: u32, at_once: u32) -> Result<Figures> {
    // Draws only where a person looks: indicatif writes nothing when stderr is no terminal.
    let bar = ProgressBar::new(u64::from(WARM_UP + 2 * runs))
        .with_style(ProgressStyle::with_template("{msg:40} {bar:30} {pos}/{len}").context("the template of the progress bar")?);
    bar.set_message(format!("{program}: {}", contender.name()));
    for _ in 0..WARM_UP {
        contender.once().await?;
        bar.inc(1);
    }
    let times = one_after_another(contender, runs, &bar).await?;
    let rate = many_at_once(contender, runs, at_once, &bar).await?;
    bar.finish_and_clear();
    let quantile = |q: f64| Duration::from_micros(times.value_at_quantile(q)).as_secs_f64() * 1e3;
    Ok(Figures { p50_ms: quantile(0.5), p90_ms: quantile(0.9), p99_ms: quantile(0.99), rate })
}

async fn one_after_another(contender: &Contender, runs: u32, bar: &ProgressBar) -> Result<Histogram<u64>> {
    let mut times = Histogram::<u64>::new(3)?;
    for _ in 0..runs {
        let started = Instant::now();
        contender.once().await?;
        times.record(u64::try_from(started.elapsed().as_micros())?)?;
        bar.inc(1);
    }
    Ok(times)
}

async fn many_at_once(contender: &Contender, runs: u32, at_once: u32, bar: &ProgressBar) -> Result<f64> {
    let taken = Arc::new(AtomicU32::new(0));
    let started = Instant::now();
    let workers: Vec<_> = (0..at_once)
        .map(|_| {
            let (contender, taken, bar) = (contender.clone(), taken.clone(), bar.clone());
            tokio::spawn(async move {
                while taken.fetch_add(1, Ordering::Relaxed) < runs {
                    contender.once().await?;
                    bar.inc(1);
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }
    Ok(f64::from(runs) / started.elapsed().as_secs_f64())
}
