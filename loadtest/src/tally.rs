//! What was measured of one shape: how long each request took, how each failed, and when.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::{service::Failure, work::Done};

/// Times in microseconds, to three digits.
pub(crate) type Times = Histogram<u64>;

/// One request, from when it was to begin to its end.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) label: Option<&'static str>,
    /// When it was to begin. In a closed loop that is when it did.
    pub(crate) due: Instant,
    pub(crate) sent: Instant,
    pub(crate) ended: Instant,
    pub(crate) result: Result<Done, Failure>,
}

/// Failures of one code.
#[derive(Debug, Clone, Default)]
pub(crate) struct Errors {
    pub(crate) count: u64,
    /// What the first of them said.
    pub(crate) example: String,
}

impl Errors {
    pub(crate) fn add(&mut self, other: Self) {
        if self.count == 0 {
            self.example = other.example;
        }
        self.count += other.count;
    }
}

/// All samples of one shape, counted.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) begun: Instant,
    pub(crate) sent: u64,
    pub(crate) errors: BTreeMap<String, Errors>,
    /// Of requests that went well, from when they were due.
    pub(crate) latency: Times,
    /// How long after it was due each was sent: how well this program kept its own schedule.
    pub(crate) late: Times,
    pub(crate) by_label: BTreeMap<&'static str, Times>,
    /// From the keeper's receipt to the program's start, as the answers tell it, warm and cold.
    pub(crate) launches: BTreeMap<String, Times>,
    /// Of each that went well: when it ended, in seconds, and how long it took, in milliseconds.
    pub(crate) points: Vec<(f64, f64)>,
    /// From the first due to the last end.
    pub(crate) lasted: Duration,
}

impl Tally {
    pub(crate) fn new(begun: Instant) -> Result<Self> {
        Ok(Self {
            begun,
            sent: 0,
            errors: BTreeMap::new(),
            latency: times()?,
            late: times()?,
            by_label: BTreeMap::new(),
            launches: BTreeMap::new(),
            points: Vec::new(),
            lasted: Duration::ZERO,
        })
    }

    pub(crate) fn add(&mut self, sample: Sample) -> Result<()> {
        self.sent += 1;
        self.lasted = self.lasted.max(sample.ended.saturating_duration_since(self.begun));
        record(&mut self.late, sample.sent.saturating_duration_since(sample.due))?;
        let done = match sample.result {
            Ok(done) => done,
            Err(failure) => {
                self.errors.entry(failure.code).or_default().add(Errors { count: 1, example: failure.detail });
                return Ok(());
            }
        };
        let took = done.took.unwrap_or_else(|| sample.ended.saturating_duration_since(sample.due));
        record(&mut self.latency, took)?;
        if let Some(label) = sample.label {
            record(entry(&mut self.by_label, label)?, took)?;
        }
        if let Some((launch, took)) = done.launch {
            record(entry(&mut self.launches, launch)?, took)?;
        }
        self.points.push((sample.ended.saturating_duration_since(self.begun).as_secs_f64(), took.as_secs_f64() * 1e3));
        Ok(())
    }

    /// Adds what another one has, as if it had been measured by this one.
    pub(crate) fn absorb(&mut self, other: Self) -> Result<()> {
        self.sent += other.sent;
        self.latency.add(other.latency)?;
        self.late.add(other.late)?;
        for (code, errors) in other.errors {
            self.errors.entry(code).or_default().add(errors);
        }
        for (launch, times) in other.launches {
            entry(&mut self.launches, launch)?.add(times)?;
        }
        self.lasted += other.lasted;
        Ok(())
    }

    pub(crate) fn succeeded(&self) -> u64 {
        self.latency.len()
    }

    pub(crate) fn failed(&self) -> u64 {
        self.errors.values().map(|errors| errors.count).sum()
    }

    /// Requests that went well, in a second.
    pub(crate) fn rate(&self) -> f64 {
        let seconds = self.lasted.as_secs_f64();
        if seconds > 0.0 { count(self.succeeded()) / seconds } else { 0.0 }
    }

    pub(crate) fn latency_ms(&self, quantile: f64) -> f64 {
        at_ms(&self.latency, quantile)
    }
}

/// An empty histogram; it grows with what it is given.
pub(crate) fn times() -> Result<Times> {
    Ok(Histogram::new(3)?)
}

fn record(times: &mut Times, took: Duration) -> Result<()> {
    // Nothing takes no time at all, and the smallest that a histogram tells apart is one.
    Ok(times.record(u64::try_from(took.as_micros())?.max(1))?)
}

fn entry<K: Ord>(of: &mut BTreeMap<K, Times>, key: K) -> Result<&mut Times> {
    use std::collections::btree_map::Entry;
    Ok(match of.entry(key) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => place.insert(times()?),
    })
}

/// What so large a part of them took at the most, in milliseconds.
pub(crate) fn at_ms(times: &Times, quantile: f64) -> f64 {
    Duration::from_micros(times.value_at_quantile(quantile)).as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "no count of ours comes near 2^53")]
pub(crate) const fn count(of: u64) -> f64 {
    of as f64
}
