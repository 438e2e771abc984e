//! What a measurement is held to: bounds given as flags, and whether they were met.

use clap::Args;
use serde::Serialize;

use crate::report::ShapeReport;

/// Bounds that each shape of a run must keep; where one does not, the program fails.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Targets (missed: exit status 1)")]
pub(crate) struct Targets {
    /// Half of the requests may take so long at the most, in milliseconds
    #[arg(long, value_name = "MS")]
    p50_ms: Option<f64>,
    /// 99 of a hundred requests may take so long at the most, in milliseconds
    #[arg(long, value_name = "MS")]
    p99_ms: Option<f64>,
    /// No request may take longer, in milliseconds
    #[arg(long, value_name = "MS")]
    max_ms: Option<f64>,
    /// So many requests must go well in a second
    #[arg(long, value_name = "PER_SECOND")]
    min_rate: Option<f64>,
    /// So many megabytes of log must reach a reader in a second (shape `logs`)
    #[arg(long, value_name = "MB")]
    min_log_mb_per_s: Option<f64>,
    /// So many MiB may an idle sandbox take of all the machine's memory (shape `idle`, with --data-dir)
    #[arg(long, value_name = "MIB")]
    max_idle_mib: Option<f64>,
    /// So many requests may fail
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    max_errors: u64,
}

/// One bound and what was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    pub(crate) target: String,
    /// Nothing, where there was nothing to measure it by.
    pub(crate) measured: Option<f64>,
    pub(crate) is_met: bool,
}

/// The fact that [`Targets::min_log_mb_per_s`] is held against.
pub(crate) const LOG_MB_PER_S: &str = "log_mb_per_s";
/// And [`Targets::max_idle_mib`].
pub(crate) const IDLE_MIB: &str = "mib_per_idle_sandbox";

impl Targets {
    /// What became of each that was given. Those of shapes that this is none of are left out.
    pub(crate) fn judge(&self, report: &ShapeReport) -> Vec<Verdict> {
        let latency = |of: f64| (report.succeeded > 0).then_some(of);
        let mut verdicts = Vec::new();
        let mut at_most = |name: &str, bound: Option<f64>, measured: Option<f64>| {
            if let Some(bound) = bound {
                let is_met = measured.is_some_and(|measured| measured <= bound);
                verdicts.push(Verdict { target: format!("{name} at most {bound}"), measured, is_met });
            }
        };
        at_most("p50 in ms", self.p50_ms, latency(report.latency_ms.p50));
        at_most("p99 in ms", self.p99_ms, latency(report.latency_ms.p99));
        at_most("slowest in ms", self.max_ms, latency(report.latency_ms.max));
        at_most("errors", Some(crate::tally::count(self.max_errors)), Some(crate::tally::count(report.failed)));
        if report.shape == "idle" {
            at_most("MiB for each idle sandbox", self.max_idle_mib, report.facts.get(IDLE_MIB).copied());
        }
        let mut at_least = |name: &str, bound: Option<f64>, measured: Option<f64>| {
            if let Some(bound) = bound {
                let is_met = measured.is_some_and(|measured| measured >= bound);
                verdicts.push(Verdict { target: format!("{name} at least {bound}"), measured, is_met });
            }
        };
        at_least("requests in a second", self.min_rate, Some(report.rate_per_s));
        if report.shape == "logs" {
            at_least("MB of log in a second", self.min_log_mb_per_s, report.facts.get(LOG_MB_PER_S).copied());
        }
        verdicts
    }
}
