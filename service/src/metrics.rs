//! What the service counts, in the text format of Prometheus.

use prometheus::{
    Encoder as _, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use sandbox_core::protocol::Start;

use crate::{
    sandbox::{Kind, Outcome, State},
    token::Freshness,
};

/// Every series of this process. Labels have few values, never ids.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    http_requests: IntCounterVec,
    http_request_seconds: HistogramVec,
    runs: IntCounterVec,
    live: IntGaugeVec,
    launch_seconds: HistogramVec,
    output_bytes: IntCounterVec,
    pub(crate) queue_depth: IntGauge,
    pub(crate) committed_memory_bytes: IntGauge,
    pub(crate) committed_cpu_millis: IntGauge,
    pub(crate) capacity_memory_bytes: IntGauge,
    pub(crate) capacity_cpu_millis: IntGauge,
    keeper_reconnects: IntCounter,
    jwks_age_seconds: GaugeVec,
    jwks_loads: IntCounterVec,
    webhook_attempts: IntCounterVec,
    image_transfers: IntCounterVec,
    image_transfer_bytes: IntCounterVec,
    images_collected: IntCounter,
}

/// Which way an image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    Out,
}

impl Metrics {
    /// All series, at zero.
    pub fn new() -> anyhow::Result<Self> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| -> anyhow::Result<IntCounterVec> {
            let series = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(series.clone()))?;
            Ok(series)
        };
        let gauge = |name: &str, help: &str| -> anyhow::Result<IntGauge> {
            let series = IntGauge::new(name, help)?;
            registry.register(Box::new(series.clone()))?;
            Ok(series)
        };
        let histograms = |name: &str, help: &str, labels: &[&str], buckets: &[f64]| -> anyhow::Result<HistogramVec> {
            let series = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?;
            registry.register(Box::new(series.clone()))?;
            Ok(series)
        };
        let live = IntGaugeVec::new(Opts::new("sandbox_live_count", "Sandboxes of this node that have not ended"), &["state"])?;
        registry.register(Box::new(live.clone()))?;
        let keeper_reconnects = IntCounter::new("sandbox_keeper_reconnects_total", "Connections to the keeper that were made again")?;
        registry.register(Box::new(keeper_reconnects.clone()))?;
        let images_collected = IntCounter::new("mayfly_images_collected_total", "Pulled images that were given up for room")?;
        registry.register(Box::new(images_collected.clone()))?;
        let age = Opts::new("mayfly_jwks_age_seconds", "Since the keys for tokens were last loaded from there; -1 if they never were");
        let jwks_age_seconds = GaugeVec::new(age, &["source"])?;
        registry.register(Box::new(jwks_age_seconds.clone()))?;

        const REQUEST_SECONDS: [f64; 14] = [0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 60.0];
        const LAUNCH_SECONDS: [f64; 10] = [0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.05, 0.25, 1.0];
        Ok(Self {
            http_requests: counters("mayfly_http_requests_total", "Answered requests", &["route", "method", "status"])?,
            http_request_seconds: histograms(
                "mayfly_http_request_seconds",
                "From a request's head to its answer's head",
                &["route", "method"],
                &REQUEST_SECONDS,
            )?,
            runs: counters("sandbox_runs_total", "Runs and sandboxes that ended, by why", &["kind", "reason"])?,
            live,
            launch_seconds: histograms(
                "sandbox_launch_seconds",
                "From the keeper's receipt of an order to the payload's execve",
                &["launch"],
                &LAUNCH_SECONDS,
            )?,
            output_bytes: counters("sandbox_output_bytes_total", "Bytes that payloads wrote, kept or not", &["stream"])?,
            queue_depth: gauge("sandbox_queue_depth_count", "Sandboxes that wait for room")?,
            committed_memory_bytes: gauge("sandbox_committed_memory_bytes", "Memory limits of this node's live sandboxes")?,
            committed_cpu_millis: gauge("sandbox_committed_cpu_millis", "CPU limits of this node's live sandboxes")?,
            capacity_memory_bytes: gauge("sandbox_capacity_memory_bytes", "Memory that this node commits at the most")?,
            capacity_cpu_millis: gauge("sandbox_capacity_cpu_millis", "CPU that this node commits at the most")?,
            keeper_reconnects,
            jwks_age_seconds,
            jwks_loads: counters("mayfly_jwks_loads_total", "Attempts to load the keys for tokens", &["source", "result"])?,
            webhook_attempts: counters("mayfly_webhook_attempts_total", "Attempts at deliveries to webhooks", &["result"])?,
            image_transfers: counters(
                "mayfly_image_transfers_total",
                "Pulls from registries and pushes to them",
                &["direction", "result"],
            )?,
            image_transfer_bytes: counters(
                "mayfly_image_transfer_bytes_total",
                "Bytes of layers that came from registries and went there",
                &["direction"],
            )?,
            images_collected,
            registry,
        })
    }

    /// A request was answered.
    pub(crate) fn request(&self, route: &str, method: &str, status: &str, seconds: f64) {
        self.http_requests.with_label_values(&[route, method, status]).inc();
        self.http_request_seconds.with_label_values(&[route, method]).observe(seconds);
    }

    /// A payload runs.
    pub(crate) fn launched(&self, start: Start, seconds: f64) {
        let launch = match start {
            Start::Warm => "warm",
            Start::Cold => "cold",
        };
        self.launch_seconds.with_label_values(&[launch]).observe(seconds);
    }

    /// A sandbox ended and its outcome is stored.
    pub(crate) fn ended(&self, kind: Kind, outcome: &Outcome) {
        self.runs.with_label_values(&[kind.as_str(), outcome.reason.as_str()]).inc();
        self.output_bytes.with_label_values(&["stdout"]).inc_by(outcome.usage.stdout_bytes);
        self.output_bytes.with_label_values(&["stderr"]).inc_by(outcome.usage.stderr_bytes);
    }

    /// A live sandbox goes from one state to another; `None` is before its beginning and after its end.
    pub(crate) fn moved(&self, from: Option<State>, to: Option<State>) {
        if let Some(state) = from {
            self.live.with_label_values(&[state.as_str()]).dec();
        }
        if let Some(state) = to {
            self.live.with_label_values(&[state.as_str()]).inc();
        }
    }

    /// The connection to the keeper was made again so often in this process's life.
    pub(crate) fn keeper_reconnects(&self, count: u64) {
        self.keeper_reconnects.inc_by(count.saturating_sub(self.keeper_reconnects.get()));
    }

    /// A webhook took what it was sent, or did not.
    pub(crate) fn webhook_attempt(&self, is_taken: bool) {
        self.webhook_attempts.with_label_values(&[if is_taken { "delivered" } else { "failed" }]).inc();
    }

    /// An image was pulled or pushed, or was not, with so many bytes of its layers.
    pub(crate) fn image_transfer(&self, direction: Direction, is_done: bool, bytes: u64) {
        let direction = match direction {
            Direction::In => "pull",
            Direction::Out => "push",
        };
        self.image_transfers.with_label_values(&[direction, if is_done { "done" } else { "failed" }]).inc();
        self.image_transfer_bytes.with_label_values(&[direction]).inc_by(bytes);
    }

    /// A pulled image was given up for room.
    pub(crate) fn image_collected(&self) {
        self.images_collected.inc();
    }

    /// The sets of keys for tokens are so old, and were loaded so often in this process's life.
    pub(crate) fn jwks(&self, sets: &[Freshness]) {
        for Freshness { source, age, loads, failures } in sets {
            self.jwks_age_seconds.with_label_values(&[source]).set(age.map_or(-1.0, |age| age.as_secs_f64()));
            for (result, count) in [("ok", loads), ("failed", failures)] {
                let series = self.jwks_loads.with_label_values(&[*source, result]);
                series.inc_by(count.saturating_sub(series.get()));
            }
        }
    }

    /// Every series as text, for Prometheus.
    pub fn text(&self) -> anyhow::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_stands_in_the_text() {
        let metrics = Metrics::new().unwrap();
        metrics.request("/v1/runs", "POST", "200", 0.002);
        metrics.moved(None, Some(State::Starting));
        metrics.moved(Some(State::Starting), Some(State::Running));
        metrics.keeper_reconnects(2);
        metrics.image_transfer(Direction::Out, true, 7);
        let text = String::from_utf8(metrics.text().unwrap()).unwrap();
        assert!(text.contains(r#"mayfly_http_requests_total{method="POST",route="/v1/runs",status="200"} 1"#));
        assert!(text.contains(r#"sandbox_live_count{state="running"} 1"#));
        assert!(text.contains(r#"sandbox_live_count{state="starting"} 0"#));
        assert!(text.contains("sandbox_keeper_reconnects_total 2"));
        assert!(text.contains(r#"mayfly_image_transfers_total{direction="push",result="done"} 1"#));
        assert!(text.contains(r#"mayfly_image_transfer_bytes_total{direction="push"} 7"#));
    }
}
