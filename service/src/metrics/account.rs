//! What one tenant is told of itself: made anew for each who asks, from what Postgres holds, so that every node tells the same.

use prometheus::{CounterVec, IntCounterVec, IntGaugeVec, Opts};

use super::shelf::Shelf;
use crate::{
    sandbox::QuotaScope,
    store::{RecentEnds, UsageLine},
};

/// The series of one tenant. None names it: who asks knows who it is.
#[derive(Debug)]
pub(crate) struct Account {
    shelf: Shelf,
    used: IntGaugeVec,
    limits: IntGaugeVec,
    ended: IntCounterVec,
    recent: IntGaugeVec,
    wall_seconds: CounterVec,
    cpu_seconds: CounterVec,
    memory_byte_seconds: CounterVec,
    output_bytes: IntCounterVec,
    log_bytes: IntCounterVec,
}

impl Account {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let shelf = Shelf::default();
        let seconds =
            |name: &str, help: &str| -> anyhow::Result<CounterVec> { shelf.keep(CounterVec::new(Opts::new(name, help), &["kind"])?) };
        Ok(Self {
            used: shelf.gauges("mayfly_account_used", "What is in use of each quota, by its name and its unit", &["scope", "quota"])?,
            limits: shelf.gauges(
                "mayfly_account_limit",
                "Each quota that is a number; one that is no limit is absent",
                &["scope", "quota"],
            )?,
            ended: shelf.counters("mayfly_account_runs_total", "Runs and sandboxes that ended in this month of UTC", &["kind"])?,
            recent: shelf.gauges(
                "mayfly_account_recent_ends_count",
                "Runs and sandboxes that ended in the last minute",
                &["kind", "reason"],
            )?,
            wall_seconds: seconds("mayfly_account_wall_seconds_total", "Real time that they took, in this month of UTC")?,
            cpu_seconds: seconds("mayfly_account_cpu_seconds_total", "CPU time that they took, in this month of UTC")?,
            memory_byte_seconds: seconds("mayfly_account_memory_byte_seconds_total", "Memory limit times real time, in this month of UTC")?,
            output_bytes: shelf.counters("mayfly_account_output_bytes_total", "Bytes that they wrote, in this month of UTC", &["kind"])?,
            log_bytes: shelf.counters(
                "mayfly_account_log_bytes_total",
                "Bytes of those that were kept, in this month of UTC",
                &["kind"],
            )?,
            shelf,
        })
    }

    /// So much of this quota is in use, of so much. One whose limit is `None` has none.
    pub(crate) fn quota(&self, scope: QuotaScope, quota: &str, used: u64, limit: Option<u64>) {
        let labels = [scope.as_str(), quota];
        self.used.with_label_values(&labels).set(i64::try_from(used).unwrap_or(i64::MAX));
        if let Some(limit) = limit {
            self.limits.with_label_values(&labels).set(i64::try_from(limit).unwrap_or(i64::MAX));
        }
    }

    /// What those of one kind used in this month.
    pub(crate) fn used(&self, line: &UsageLine) {
        let Some(kind) = line.kind.as_deref() else { return };
        self.ended.with_label_values(&[kind]).inc_by(line.runs);
        self.wall_seconds.with_label_values(&[kind]).inc_by(super::seconds(line.wall_us));
        self.cpu_seconds.with_label_values(&[kind]).inc_by(super::seconds(line.cpu_us));
        let byte_seconds = u64::try_from(line.memory_byte_us / 1_000_000).unwrap_or(u64::MAX);
        self.memory_byte_seconds.with_label_values(&[kind]).inc_by(whole(byte_seconds));
        self.output_bytes.with_label_values(&[kind]).inc_by(line.output_bytes);
        self.log_bytes.with_label_values(&[kind]).inc_by(line.log_bytes);
    }

    /// So many ended in the last minute like this.
    pub(crate) fn ended(&self, ends: &RecentEnds) {
        let RecentEnds { kind, reason, count } = ends;
        self.recent.with_label_values(&[kind, reason]).set(i64::try_from(*count).unwrap_or(i64::MAX));
    }

    pub(crate) fn text(&self) -> anyhow::Result<Vec<u8>> {
        self.shelf.text()
    }
}

/// The nearest number of the kind that Prometheus has.
fn whole(number: u64) -> f64 {
    std::time::Duration::from_secs(number).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_that_is_no_limit_is_told_by_its_use_alone() {
        let account = Account::new().unwrap();
        account.quota(QuotaScope::Tenant, "sandboxes", 3, None);
        account.quota(QuotaScope::Principal, "queued", 1, Some(5));
        let text = String::from_utf8(account.text().unwrap()).unwrap();
        assert!(text.contains(r#"mayfly_account_used{quota="sandboxes",scope="tenant"} 3"#), "{text}");
        assert!(text.contains(r#"mayfly_account_limit{quota="queued",scope="principal"} 5"#), "{text}");
        assert!(!text.contains(r#"mayfly_account_limit{quota="sandboxes""#), "{text}");
    }
}
