//! Does a work many times: in a closed loop, each as soon as one before it has ended, or in an open one, each when it is due.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    tally::{Sample, Tally},
    work::Work,
};

/// How long a closed loop goes on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    Count(u64),
    Over(Duration),
}

/// From the decision on a schedule to its first arrival: the thread that keeps it must be there by then.
const LEAD: Duration = Duration::from_millis(20);

/// So many at a time, one after another in each place. How many come is up to how fast answers come: a service that stops is asked by so many, and no more.
pub(crate) async fn closed<W: Work>(work: &Arc<W>, at_once: u32, until: Until, bar: &ProgressBar) -> Result<Tally> {
    let begun = Instant::now();
    let taken = Arc::new(AtomicU64::new(0));
    let (samples, mut received) = mpsc::unbounded_channel();
    for _ in 0..at_once {
        let (work, taken, samples) = (work.clone(), taken.clone(), samples.clone());
        tokio::spawn(async move {
            loop {
                let number = taken.fetch_add(1, Ordering::Relaxed);
                let is_over = match until {
                    Until::Count(count) => number >= count,
                    Until::Over(lasting) => begun.elapsed() >= lasting,
                };
                if is_over || samples.send(sample(&*work, number, Instant::now()).await).is_err() {
                    return;
                }
            }
        });
    }
    drop(samples);
    let mut tally = Tally::new(begun)?;
    while let Some(sample) = received.recv().await {
        tally.add(sample)?;
        match until {
            Until::Count(_) => bar.inc(1),
            Until::Over(_) => bar.set_position(milliseconds(begun.elapsed())),
        }
    }
    Ok(tally)
}

/// Each when it is due, whatever became of those before, and measured from then: who waits for a service that has stopped is counted with all of the wait.
pub(crate) async fn open<W: Work>(work: &Arc<W>, arrivals: Vec<Duration>, bar: &ProgressBar) -> Result<Tally> {
    let begun = Instant::now() + LEAD;
    let (samples, mut received) = mpsc::unbounded_channel();
    let (work, runtime) = (work.clone(), Handle::current());
    // A thread of its own: the runtime's timers are good to a millisecond only, and what else the runtime does would hold them up.
    let keeper = thread::Builder::new().name("schedule".to_owned()).spawn(move || {
        for (number, at) in (0..).zip(arrivals) {
            let due = begun + at;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let (work, samples) = (work.clone(), samples.clone());
            runtime.spawn(async move { samples.send(sample(&*work, number, due).await) });
        }
    })?;
    let mut tally = Tally::new(begun)?;
    while let Some(sample) = received.recv().await {
        tally.add(sample)?;
        bar.inc(1);
    }
    keeper.join().ok().context("the thread that keeps the schedule panicked")?;
    Ok(tally)
}

async fn sample<W: Work>(work: &W, number: u64, due: Instant) -> Sample {
    let sent = Instant::now();
    let result = work.once(number).await;
    Sample { label: work.label(number), due, sent, ended: Instant::now(), result }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
