//! What was measured, as JSON for programs and as text for people.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::Result;
use hdrhistogram::serialization::{Serializer as _, V2DeflateSerializer};
use serde::Serialize;

use crate::{
    tally::{Errors, Tally, Times, at_ms},
    target::{Targets, Verdict},
};

pub(crate) const OPEN: &str = "open";
pub(crate) const CLOSED: &str = "closed";

/// All shapes of one go.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) about: String,
    pub(crate) url: String,
    pub(crate) shapes: Vec<ShapeReport>,
    /// Whether every shape met every target.
    pub(crate) is_met: bool,
}

/// One shape.
#[derive(Debug, Serialize)]
pub(crate) struct ShapeReport {
    pub(crate) shape: &'static str,
    /// `open`: each request when it was due. `closed`: each after one before it.
    #[serde(rename = "loop")]
    pub(crate) kind: &'static str,
    pub(crate) sent: u64,
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) errors: BTreeMap<String, ErrorReport>,
    pub(crate) seconds: f64,
    /// Requests that went well.
    pub(crate) rate_per_s: f64,
    /// Of requests that went well; in an open loop from when they were due.
    pub(crate) latency_ms: Summary,
    /// In an open loop: how long after they were due requests were sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) late_ms: Option<Summary>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) by_label: BTreeMap<&'static str, Summary>,
    /// From the keeper's receipt to the program's start, as the answers tell it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) launch_ms: BTreeMap<String, Summary>,
    /// What only this shape has.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) facts: BTreeMap<&'static str, f64>,
    pub(crate) targets: Vec<Verdict>,
    /// All latencies, in microseconds: an HDR histogram, version 2, compressed, in hexadecimal digits.
    pub(crate) histogram_us: String,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ErrorReport {
    count: u64,
    example: String,
}

/// A distribution in the figures that people ask for.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) min: f64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
}

impl Summary {
    pub(crate) fn of(times: &Times) -> Self {
        let at = |quantile| at_ms(times, quantile);
        let mean = if times.is_empty() { 0.0 } else { times.mean() / 1e3 };
        Self { count: times.len(), min: at(0.0), mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), max: at(1.0) }
    }
}

impl ShapeReport {
    pub(crate) fn new(
        shape: &'static str,
        kind: &'static str,
        tally: &Tally,
        facts: BTreeMap<&'static str, f64>,
        targets: &Targets,
    ) -> Result<Self> {
        let each = |times: &Times| Summary::of(times);
        let mut histogram = Vec::new();
        V2DeflateSerializer::new().serialize(&tally.latency, &mut histogram)?;
        let errors = tally.errors.iter().map(|(code, errors)| {
            let Errors { count, example } = errors;
            (code.clone(), ErrorReport { count: *count, example: example.clone() })
        });
        let mut report = Self {
            shape,
            kind,
            sent: tally.sent,
            succeeded: tally.succeeded(),
            failed: tally.failed(),
            errors: errors.collect(),
            seconds: tally.lasted.as_secs_f64(),
            rate_per_s: tally.rate(),
            latency_ms: each(&tally.latency),
            late_ms: (kind == OPEN).then(|| each(&tally.late)),
            by_label: tally.by_label.iter().map(|(label, times)| (*label, each(times))).collect(),
            launch_ms: tally.launches.iter().map(|(launch, times)| (launch.clone(), each(times))).collect(),
            facts,
            targets: Vec::new(),
            histogram_us: hex::encode(histogram),
        };
        report.targets = targets.judge(&report);
        Ok(report)
    }

    pub(crate) fn is_met(&self) -> bool {
        self.targets.iter().all(|verdict| verdict.is_met)
    }

    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let mut line = |words: String| writeln!(text, "{words}").ok();
        line(format!(
            "{} ({} loop): {} sent, {} well, {} failed, in {:.2} s: {:.1} a second",
            self.shape, self.kind, self.sent, self.succeeded, self.failed, self.seconds, self.rate_per_s
        ));
        for (code, errors) in &self.errors {
            line(format!("  failed: {} × {code}, as in: {}", errors.count, errors.example));
        }
        line(format!("  {:22} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}", "ms", "count", "min", "p50", "p90", "p99", "p99.9", "max"));
        let mut row = |name: &str, s: &Summary| {
            line(format!(
                "  {name:22} {:>8} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
                s.count, s.min, s.p50, s.p90, s.p99, s.p99_9, s.max
            ));
        };
        row("latency", &self.latency_ms);
        for (label, summary) in &self.by_label {
            row(&format!("  {label}"), summary);
        }
        for (launch, summary) in &self.launch_ms {
            row(&format!("launch, {launch}"), summary);
        }
        if let Some(late) = &self.late_ms {
            row("sent after it was due", late);
        }
        for (name, value) in &self.facts {
            line(format!("  {} {value:.2}", name.replace('_', " ")));
        }
        for Verdict { target, measured, is_met } in &self.targets {
            let measured = measured.map_or_else(|| "not measured".to_owned(), |measured| format!("{measured:.2}"));
            line(format!("  {}: {target}: {measured}", if *is_met { "met" } else { "MISSED" }));
        }
        text
    }
}
