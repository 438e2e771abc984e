//! Series of single tenants, for an operator who asks for them: of so many, and one more of all others.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use prometheus::{Counter, CounterVec, IntCounterVec, Opts};

use super::shelf::Shelf;
use crate::sandbox::{Outcome, TenantId};

/// What those are called together that came too late for series of their own. No label is empty otherwise: a tenant has a name.
const OTHERS: &str = "";

/// Made only where the operator wants them: the names of tenants are nobody else's business.
#[derive(Debug)]
pub(super) struct Tenants {
    max: usize,
    named: Mutex<HashSet<TenantId>>,
    runs: IntCounterVec,
    cpu_seconds: CounterVec,
}

impl Tenants {
    /// `None` for no tenant.
    pub(super) fn new(shelf: &Shelf, max: usize) -> anyhow::Result<Option<Self>> {
        if max == 0 {
            return Ok(None);
        }
        let cpu_seconds = Opts::new("mayfly_tenant_cpu_seconds_total", "CPU time of what ended, by tenant");
        Ok(Some(Self {
            max,
            named: Mutex::default(),
            runs: shelf.counters(
                "mayfly_tenant_runs_total",
                "Runs and sandboxes that ended, by tenant and by why",
                &["tenant", "reason"],
            )?,
            cpu_seconds: shelf.keep(CounterVec::new(cpu_seconds, &["tenant"])?)?,
        }))
    }

    pub(super) fn ended(&self, tenant: &TenantId, outcome: &Outcome) {
        let name = self.name_of(tenant);
        self.runs.with_label_values(&[name, outcome.reason.as_str()]).inc();
        let cpu: Counter = self.cpu_seconds.with_label_values(&[name]);
        cpu.inc_by(std::time::Duration::from_millis(outcome.usage.cpu_ms).as_secs_f64());
    }

    fn name_of<'a>(&self, tenant: &'a TenantId) -> &'a str {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if named.contains(tenant) {
            return tenant.as_str();
        }
        if named.len() >= self.max {
            return OTHERS;
        }
        named.insert(tenant.clone());
        tenant.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(max: usize, tenants: &[&str]) -> String {
        let shelf = Shelf::default();
        let series = Tenants::new(&shelf, max).unwrap();
        for tenant in tenants {
            if let Some(series) = &series {
                series.ended(&TenantId::proven((*tenant).to_owned()), &Outcome::of_fault(String::new()));
            }
        }
        String::from_utf8(shelf.text().unwrap()).unwrap()
    }

    #[test]
    fn no_tenant_is_named_where_nobody_asked_for_it() {
        assert_eq!(of(0, &["acme"]), "");
    }

    #[test]
    fn those_above_the_cap_are_counted_together() {
        let text = of(2, &["a", "b", "c", "d", "a"]);
        assert!(text.contains(r#"mayfly_tenant_runs_total{reason="infra_error",tenant="a"} 2"#), "{text}");
        assert!(text.contains(r#"mayfly_tenant_runs_total{reason="infra_error",tenant=""} 2"#), "{text}");
        assert!(!text.contains(r#"tenant="c""#), "{text}");
    }
}
