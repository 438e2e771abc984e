//! What the service counts, in the text format of Prometheus. All series and what to do about them: `docs/operations.md`.

mod account;
mod process;
mod shelf;
mod statements;
mod tenants;

use std::time::Duration;

pub(crate) use account::Account;
use process::Process;
use prometheus::{Counter, GaugeVec, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use sandbox_core::protocol::{Ending, Launched, Start};
use shelf::Shelf;
pub(crate) use statements::NotSent;
pub use statements::{Connections, Statements};
use tenants::Tenants;

use crate::{
    sandbox::{Kind, Outcome, Phases, QuotaScope, Reason, Sandbox, State},
    token::Freshness,
};

/// Every series of this process. Labels have few values, never ids; tenants are named only where the operator asked for it, and no more than so many.
#[derive(Debug)]
pub struct Metrics {
    shelf: Shelf,
    process: Process,
    statements: Statements,
    tenants: Option<Tenants>,
    http_requests: IntCounterVec,
    http_request_seconds: HistogramVec,
    problems: IntCounterVec,
    quota_refusals: IntCounterVec,
    runs: IntCounterVec,
    live: IntGaugeVec,
    launch_seconds: HistogramVec,
    start_seconds: HistogramVec,
    output_bytes: IntCounterVec,
    output_truncated: IntCounterVec,
    log_gaps: IntCounter,
    cpu_seconds: Counter,
    throttled_seconds: Counter,
    oom_kills: IntCounter,
    image_lookups: IntCounterVec,
    image_blobs: IntGauge,
    image_blob_bytes: IntGauge,
    /// Endings that the keeper keeps because they are not stored yet.
    pub(crate) records_waiting: IntGauge,
    pub(crate) store_retries: IntCounter,
    leaks: IntCounterVec,
    pub(crate) queue_depth: IntGauge,
    pub(crate) committed_memory_bytes: IntGauge,
    pub(crate) committed_cpu_millis: IntGauge,
    pub(crate) committed_sandboxes: IntGauge,
    pub(crate) capacity_memory_bytes: IntGauge,
    pub(crate) capacity_cpu_millis: IntGauge,
    pub(crate) capacity_sandboxes: IntGauge,
    keeper_up: IntGauge,
    node_ready: IntGauge,
    node_short: IntGauge,
    pub(crate) lease_failures: IntCounter,
    pub(crate) leases_lost: IntCounter,
    pub(crate) nodes_lost: IntCounter,
    keeper_reconnects: IntCounter,
    postgres_up: IntGauge,
    postgres_connections: IntGaugeVec,
    jwks_age_seconds: GaugeVec,
    jwks_loads: IntCounterVec,
    webhook_attempts: IntCounterVec,
    image_transfers: IntCounterVec,
    image_transfer_bytes: IntCounterVec,
    images_collected: IntCounter,
    spans: IntCounterVec,
    forwarded: IntCounterVec,
    pool_takes: IntCounterVec,
    pool_starts: IntCounterVec,
    pool_members: IntGaugeVec,
    pool_given_up: IntCounter,
}

/// Which way an image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    Out,
}

/// What was left behind by a process that died, or by an answer that was lost, and had to be found and cleared away.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Leak {
    /// A sandbox that the keeper has and nobody asked for any more.
    Sandbox,
    /// A row that was live and followed by nobody.
    Row,
    /// A log without a row.
    Log,
}

/// How this node does, as whoever reads the metrics finds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    pub(crate) has_keeper: bool,
    pub(crate) is_ready: bool,
    /// Nothing is started: the machine lacks memory or disk.
    pub(crate) is_short: bool,
    pub(crate) connections: Connections,
}

impl Metrics {
    /// All series, at zero. So many tenants have series of their own.
    pub fn new(tenants_max: usize) -> anyhow::Result<Self> {
        const REQUEST_SECONDS: [f64; 15] = [0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 60.0];
        const LAUNCH_SECONDS: [f64; 12] = [0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];
        /// A queue can be long.
        const START_SECONDS: [f64; 18] =
            [0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0];
        let shelf = Shelf::default();
        shelf.gauges("mayfly_build_info", "This program's version", &["version"])?.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let this = Self {
            process: Process::new(&shelf)?,
            statements: Statements::new(&shelf)?,
            tenants: Tenants::new(&shelf, tenants_max)?,
            http_requests: shelf.counters("mayfly_http_requests_total", "Answered requests; those that programs answered by `proxied`", &["route", "method", "status"])?,
            http_request_seconds: shelf.histograms(
                "mayfly_http_request_seconds",
                "From a request's head to its answer's head",
                &["route", "method"],
                &REQUEST_SECONDS,
            )?,
            problems: shelf.counters("mayfly_problems_total", "Refusals by the code of their problem", &["code"])?,
            quota_refusals: shelf.counters("mayfly_quota_refusals_total", "Requests beyond a quota or a rate", &["scope", "quota"])?,
            runs: shelf.counters("sandbox_runs_total", "Runs and sandboxes that ended, by why", &["kind", "reason"])?,
            live: shelf.gauges("sandbox_live_count", "Sandboxes of this node that have not ended", &["state"])?,
            launch_seconds: shelf.histograms(
                "sandbox_launch_seconds",
                "From the keeper's receipt of an order to the payload's execve, compile steps and cases too",
                &["launch"],
                &LAUNCH_SECONDS,
            )?,
            start_seconds: shelf.histograms(
                "sandbox_start_seconds",
                "What a start consists of: waiting for room, finding the image, the launch; `total` is from the request to the payload's execve",
                &["phase", "launch"],
                &START_SECONDS,
            )?,
            output_bytes: shelf.counters("sandbox_output_bytes_total", "Bytes that payloads and execs wrote, kept or not", &["stream"])?,
            output_truncated: shelf.counters("sandbox_output_truncated_total", "Ends of which not all output was kept", &["stream"])?,
            log_gaps: shelf.counter("sandbox_log_gaps_total", "Gaps that readers of logs were told of")?,
            cpu_seconds: shelf.seconds("sandbox_cpu_seconds_total", "CPU time of payloads that ended")?,
            throttled_seconds: shelf.seconds("sandbox_cpu_throttled_seconds_total", "How long limits of CPU held back payloads that ended")?,
            oom_kills: shelf.counter("sandbox_oom_kills_total", "Processes in sandboxes that the kernel killed for want of memory")?,
            image_lookups: shelf.counters("sandbox_image_lookups_total", "Images by whether this process knew them already", &["result"])?,
            image_blobs: shelf.gauge("sandbox_image_blobs_count", "Layers, configurations and manifests kept on this node")?,
            image_blob_bytes: shelf.gauge("sandbox_image_blob_bytes", "Bytes of those")?,
            records_waiting: shelf.gauge("sandbox_keeper_records_waiting_count", "Sandboxes and execs that ended here and whose end is not stored yet")?,
            store_retries: shelf.counter("sandbox_store_retries_total", "Attempts at storing an end that failed and are made again")?,
            leaks: shelf.counters("sandbox_leaks_total", "What was left behind, found and cleared away", &["what"])?,
            queue_depth: shelf.gauge("sandbox_queue_depth_count", "Sandboxes that wait for room, on whichever node")?,
            committed_memory_bytes: shelf.gauge("sandbox_committed_memory_bytes", "Memory limits of this node's live sandboxes")?,
            committed_cpu_millis: shelf.gauge("sandbox_committed_cpu_millis", "CPU limits of this node's live sandboxes")?,
            committed_sandboxes: shelf.gauge("sandbox_committed_count", "Sandboxes that take up room on this node")?,
            capacity_memory_bytes: shelf.gauge("sandbox_capacity_memory_bytes", "Memory that this node commits at the most")?,
            capacity_cpu_millis: shelf.gauge("sandbox_capacity_cpu_millis", "CPU that this node commits at the most")?,
            capacity_sandboxes: shelf.gauge("sandbox_capacity_count", "Sandboxes that the keeper of this node can run at once")?,
            keeper_up: shelf.gauge("sandbox_keeper_up", "Whether the keeper of this node answers")?,
            node_ready: shelf.gauge("mayfly_node_ready", "Whether this node takes new work: it has a keeper, and is neither drained nor stopping")?,
            node_short: shelf.gauge("mayfly_node_short", "Whether nothing is started because the machine lacks memory or disk")?,
            lease_failures: shelf.counter("mayfly_lease_failures_total", "Renewals of this node's lease that failed")?,
            leases_lost: shelf.counter("mayfly_leases_lost_total", "How often others took this node for dead")?,
            nodes_lost: shelf.counter("mayfly_nodes_lost_total", "Other nodes that this one took for dead")?,
            keeper_reconnects: shelf.counter("sandbox_keeper_reconnects_total", "Connections to the keeper that were made again")?,
            postgres_up: shelf.gauge("mayfly_postgres_up", "Whether Postgres answers")?,
            postgres_connections: shelf.gauges(
                "mayfly_postgres_connections_count",
                "Connections to Postgres, the most that there may be, and who waits for one",
                &["state"],
            )?,
            jwks_age_seconds: shelf.fractions(
                "mayfly_jwks_age_seconds",
                "Since the keys for tokens were last loaded from there; -1 if they never were",
                &["source"],
            )?,
            jwks_loads: shelf.counters("mayfly_jwks_loads_total", "Attempts to load the keys for tokens", &["source", "result"])?,
            webhook_attempts: shelf.counters("mayfly_webhook_attempts_total", "Attempts at deliveries to webhooks", &["result"])?,
            image_transfers: shelf.counters(
                "mayfly_image_transfers_total",
                "Pulls from registries and pushes to them",
                &["direction", "result"],
            )?,
            image_transfer_bytes: shelf.counters(
                "mayfly_image_transfer_bytes_total",
                "Bytes of layers that came from registries and went there",
                &["direction"],
            )?,
            images_collected: shelf.counter("mayfly_images_collected_total", "Pulled images that were given up for room")?,
            forwarded: shelf.counters(
                "mayfly_forwarded_requests_total",
                "Requests that were another node's to answer, by what came of them; answers that broke off count as `cut`, too",
                &["outcome"],
            )?,
            spans: shelf.counters("mayfly_spans_total", "Spans for the collector of traces", &["result"])?,
            pool_takes: shelf.counters("sandbox_pool_takes_total", "Requests for what a pool keeps ready, by whether it had it here", &["result"])?,
            pool_starts: shelf.counters("sandbox_pool_starts_total", "Sandboxes of pools by what came of their start", &["result"])?,
            pool_members: shelf.gauges("sandbox_pool_members_count", "Sandboxes that wait in pools of this node", &["state"])?,
            pool_given_up: shelf.counter("sandbox_pool_given_up_total", "Sandboxes of pools that were given up for the room of somebody's request")?,
            shelf,
        };
        this.begin_at_zero();
        Ok(this)
    }

    /// A rate is known from the second value on: what will be counted is there before it happens, where it is known what that can be.
    fn begin_at_zero(&self) {
        for kind in Kind::ALL {
            for reason in Reason::ALL {
                self.runs.with_label_values(&[kind.as_str(), reason.as_str()]);
            }
        }
        for state in [State::Queued, State::Starting, State::Running, State::Paused] {
            self.live.with_label_values(&[state.as_str()]);
        }
        for stream in ["stdout", "stderr"] {
            self.output_bytes.with_label_values(&[stream]);
            self.output_truncated.with_label_values(&[stream]);
        }
        for launch in ["warm", "cold"] {
            self.launch_seconds.with_label_values(&[launch]);
            for phase in ["queue", "image", "launch", "total"] {
                self.start_seconds.with_label_values(&[phase, launch]);
            }
        }
        for result in ["hit", "miss"] {
            self.image_lookups.with_label_values(&[result]);
        }
        for what in [Leak::Sandbox, Leak::Row, Leak::Log] {
            self.leaks.with_label_values(&[what.as_str()]);
        }
        for result in ["delivered", "failed"] {
            self.webhook_attempts.with_label_values(&[result]);
        }
        for direction in ["pull", "push"] {
            self.image_transfer_bytes.with_label_values(&[direction]);
            for result in ["done", "failed"] {
                self.image_transfers.with_label_values(&[direction, result]);
            }
        }
        for outcome in ["answered", "declined", "unreached", "broken", "away", "cut"] {
            self.forwarded.with_label_values(&[outcome]);
        }
        for result in ["hit", "miss"] {
            self.pool_takes.with_label_values(&[result]);
        }
        for result in ["ready", "failed"] {
            self.pool_starts.with_label_values(&[result]);
        }
        self.pool_members(0, 0);
        for result in ["sent", "failed", "dropped"] {
            self.spans.with_label_values(&[result]);
        }
        // Those that somebody is woken for.
        for code in
            ["internal", "no_capacity", "database_unavailable", "keeper_unavailable", "node_unavailable", "quota_exceeded", "rate_limited"]
        {
            self.problems.with_label_values(&[code]);
        }
    }

    /// How the database answers, told by who asks it.
    pub fn statements(&self) -> Statements {
        self.statements.clone()
    }

    /// A request was answered.
    pub(crate) fn request(&self, route: &str, method: &str, status: &str, seconds: f64) {
        self.http_requests.with_label_values(&[route, method, status]).inc();
        self.http_request_seconds.with_label_values(&[route, method]).observe(seconds);
    }

    /// Somebody was refused with this code.
    pub(crate) fn problem(&self, code: &str) {
        self.problems.with_label_values(&[code]).inc();
    }

    /// What was asked for is beyond this quota, of which there are few.
    pub(crate) fn quota_refused(&self, scope: QuotaScope, quota: &str) {
        self.quota_refusals.with_label_values(&[scope.as_str(), quota]).inc();
    }

    /// A payload runs, or a compile step, or a case.
    pub(crate) fn launched(&self, launched: &Launched) {
        self.launch_seconds.with_label_values(&[warmth(launched.start)]).observe(seconds(launched.launch_us));
    }

    /// A sandbox runs for the first time in its life, so long after it was asked for; what it waited for before its launch is in `phases`.
    pub(crate) fn started(&self, launched: &Launched, phases: Phases, total: Duration) {
        let launch = warmth(launched.start);
        let of = |phase: &str, seconds: f64| self.start_seconds.with_label_values(&[phase, launch]).observe(seconds);
        of("queue", phases.queue / 1000.0);
        of("image", phases.image / 1000.0);
        of("launch", seconds(launched.launch_us));
        of("total", total.as_secs_f64());
    }

    /// The keeper told how a payload ended, or a compile step, or a case.
    pub(crate) fn spent(&self, ending: &Ending) {
        self.cpu_seconds.inc_by(seconds(ending.usage.cpu_us));
        self.throttled_seconds.inc_by(seconds(ending.usage.throttled_us));
        self.oom_kills.inc_by(ending.oom_kills);
    }

    /// A sandbox ended and its outcome is stored.
    pub(crate) fn ended(&self, sandbox: &Sandbox, outcome: &Outcome) {
        self.runs.with_label_values(&[sandbox.kind.as_str(), outcome.reason.as_str()]).inc();
        self.wrote(outcome);
        if let Some(tenants) = &self.tenants {
            tenants.ended(&sandbox.tenant, outcome);
        }
    }

    /// A payload ended that wrote so much, or an exec.
    pub(crate) fn wrote(&self, outcome: &Outcome) {
        let streams = [
            ("stdout", outcome.usage.stdout_bytes, outcome.truncated.stdout),
            ("stderr", outcome.usage.stderr_bytes, outcome.truncated.stderr),
        ];
        for (stream, bytes, is_truncated) in streams {
            self.output_bytes.with_label_values(&[stream]).inc_by(bytes);
            self.output_truncated.with_label_values(&[stream]).inc_by(u64::from(is_truncated));
        }
    }

    /// A reader of a log was told that something is missing.
    pub(crate) fn log_gap(&self) {
        self.log_gaps.inc();
    }

    /// What a reference means was known already, or had to be asked for.
    pub(crate) fn image_looked_up(&self, was_known: bool) {
        self.image_lookups.with_label_values(&[if was_known { "hit" } else { "miss" }]).inc();
    }

    /// So many blobs are kept, of so many bytes.
    pub(crate) fn images_kept(&self, count: u64, bytes: u64) {
        self.image_blobs.set(i64::try_from(count).unwrap_or(i64::MAX));
        self.image_blob_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub(crate) fn leaked(&self, what: Leak) {
        self.leaks.with_label_values(&[what.as_str()]).inc();
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

    /// A request was another node's to answer.
    pub(crate) fn forwarded(&self, outcome: &'static str) {
        self.forwarded.with_label_values(&[outcome]).inc();
    }

    /// Somebody asked for what a pool keeps ready, and got it, or had to be given one of their own.
    pub(crate) fn pool_asked(&self, was_ready: bool) {
        self.pool_takes.with_label_values(&[if was_ready { "hit" } else { "miss" }]).inc();
    }

    /// One of a pool's is ready, or came to nothing.
    pub(crate) fn pool_started(&self, result: &'static str) {
        self.pool_starts.with_label_values(&[result]).inc();
    }

    /// So many wait here, ready or about to be.
    pub(crate) fn pool_members(&self, ready: usize, starting: usize) {
        for (state, count) in [("ready", ready), ("starting", starting)] {
            self.pool_members.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// One that waited was given up for room.
    pub(crate) fn pool_given_up(&self) {
        self.pool_given_up.inc();
    }

    /// So many spans were sent to the collector, or not.
    pub(crate) fn spans(&self, result: &'static str, count: u64) {
        self.spans.with_label_values(&[result]).inc_by(count);
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

    /// What is not counted but is so or not so now.
    pub(crate) fn stands(&self, standing: Standing) {
        let Standing { has_keeper, is_ready, is_short, connections } = standing;
        self.keeper_up.set(i64::from(has_keeper));
        self.node_ready.set(i64::from(is_ready));
        self.node_short.set(i64::from(is_short));
        self.postgres_up.set(i64::from(connections.is_up));
        let Connections { idle, busy, max, waiting, is_up: _ } = connections;
        for (state, count) in [("idle", idle), ("busy", busy), ("max", max), ("waiting", waiting)] {
            self.postgres_connections.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Every series as text, for Prometheus.
    pub fn text(&self) -> anyhow::Result<Vec<u8>> {
        self.process.look();
        self.shelf.text()
    }
}

impl Leak {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Row => "row",
            Self::Log => "log",
        }
    }
}

const fn warmth(start: Start) -> &'static str {
    match start {
        Start::Warm => "warm",
        Start::Cold => "cold",
    }
}

fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics) -> String {
        String::from_utf8(metrics.text().unwrap()).unwrap()
    }

    #[test]
    fn what_was_counted_stands_in_the_text() {
        let metrics = Metrics::new(0).unwrap();
        metrics.request("/v1/runs", "POST", "200", 0.002);
        metrics.moved(None, Some(State::Starting));
        metrics.moved(Some(State::Starting), Some(State::Running));
        metrics.keeper_reconnects(2);
        metrics.image_transfer(Direction::Out, true, 7);
        metrics.quota_refused(QuotaScope::Tenant, "runs_per_day");
        let text = text(&metrics);
        assert!(text.contains(r#"mayfly_http_requests_total{method="POST",route="/v1/runs",status="200"} 1"#));
        assert!(text.contains(r#"sandbox_live_count{state="running"} 1"#));
        assert!(text.contains(r#"sandbox_live_count{state="starting"} 0"#));
        assert!(text.contains(r#"mayfly_quota_refusals_total{quota="runs_per_day",scope="tenant"} 1"#));
        assert!(text.contains("sandbox_keeper_reconnects_total 2"));
        assert!(text.contains(r#"mayfly_image_transfers_total{direction="push",result="done"} 1"#));
        assert!(text.contains(r#"mayfly_image_transfer_bytes_total{direction="push"} 7"#));
    }

    #[test]
    fn what_can_happen_is_there_before_it_does() {
        let text = text(&Metrics::new(0).unwrap());
        assert!(text.contains(r#"sandbox_runs_total{kind="run",reason="oom_killed"} 0"#), "{text}");
        assert!(text.contains(r#"sandbox_start_seconds_bucket{launch="warm",phase="total",le="0.0005"} 0"#), "{text}");
        assert!(text.contains(r#"mayfly_problems_total{code="internal"} 0"#), "{text}");
    }
}
