//! Spans on their way to a collector: queued where they end, sent together by one task (OTLP over HTTP, protobuf).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanKind, Status, TraceId},
};
use opentelemetry_otlp::{Protocol, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SamplingResult, ShouldSample, Span, SpanData, SpanExporter as _, SpanProcessor},
};
use reqwest::{Url, redirect};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, store::NodeId};

/// Spans that wait to be sent. One more is dropped, and counted: nobody waits for a collector.
const QUEUE: usize = 16 * 1024;
/// Spans of one request to the collector.
const BATCH: usize = 512;
/// Between two looks at the queue.
const PERIOD: Duration = Duration::from_millis(500);
/// How long the collector may take for one batch.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// The way in. What is over is put into the queue by whoever ended it.
#[derive(Debug)]
pub(super) struct Queue {
    sender: mpsc::Sender<SpanData>,
    dropped: Arc<AtomicU64>,
}

/// The way out, until somebody exports what comes.
#[derive(Debug)]
pub(crate) struct Collected {
    receiver: mpsc::Receiver<SpanData>,
    dropped: Arc<AtomicU64>,
    endpoint: Url,
}

pub(super) fn queue(endpoint: Url) -> (Queue, Collected) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let dropped = Arc::new(AtomicU64::new(0));
    (Queue { sender, dropped: Arc::clone(&dropped) }, Collected { receiver, dropped, endpoint })
}

/// Of the requests that come without a trace so many of a hundred begin one; who comes with one has said already.
pub(super) fn sampler(percent: u32) -> Sampler {
    let of_requests = Sampler::TraceIdRatioBased(f64::from(percent) / 100.0);
    Sampler::ParentBased(Box::new(Roots { of_requests }))
}

/// Decides about what belongs to no trace. What the service does for nobody in particular, every second, begins none.
#[derive(Debug, Clone)]
struct Roots {
    of_requests: Sampler,
}

impl ShouldSample for Roots {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let sampler = if matches!(name, "request" | "sandbox" | "exec") { &self.of_requests } else { &Sampler::AlwaysOff };
        sampler.should_sample(parent, trace, name, kind, attributes, links)
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, mut span: SpanData) {
        describe(&mut span);
        if self.sender.try_send(span).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    // Whoever exports does so to the end by himself.
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Says it in the words of OpenTelemetry's conventions for HTTP and databases.
fn describe(span: &mut SpanData) {
    if span.name.starts_with("postgres") {
        span.span_kind = SpanKind::Client;
        span.attributes.push(KeyValue::new("db.system.name", "postgresql"));
    }
    if span.name != "request" {
        return;
    }
    span.span_kind = SpanKind::Server;
    let (mut method, mut route) = (String::new(), String::new());
    for attribute in &mut span.attributes {
        match attribute.key.as_str() {
            "http.method" => {
                method = attribute.value.to_string();
                attribute.key = "http.request.method".into();
            }
            "http.status" => {
                if attribute.value.to_string().starts_with('5') {
                    span.status = Status::error("");
                }
                attribute.key = "http.response.status_code".into();
            }
            "http.route" => route = attribute.value.to_string(),
            _ => {}
        }
    }
    span.name = format!("{method} {route}").into();
}

/// The task that sends what was collected.
#[derive(Debug)]
pub(crate) struct Exporter {
    task: JoinHandle<()>,
    stopping: CancellationToken,
}

impl Exporter {
    /// Begins to send, as this node. Fails if there can be no client for it.
    pub(crate) fn start(collected: Collected, node: NodeId, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        let Collected { receiver, dropped, endpoint } = collected;
        let client = reqwest::Client::builder()
            .timeout(SEND_DEADLINE)
            // What is sent along to prove who we are is for nobody else.
            .redirect(redirect::Policy::none())
            .build()
            .context("otlp-endpoint")?;
        let mut exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(endpoint.as_str())
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(SEND_DEADLINE)
            .build()
            .context("otlp-endpoint")?;
        let named = [
            KeyValue::new("service.name", "mayfly"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", node.to_string()),
        ];
        exporter.set_resource(&Resource::builder_empty().with_attributes(named).build());
        let stopping = CancellationToken::new();
        let task = tokio::spawn(send(receiver, dropped, exporter, metrics, stopping.clone()));
        Ok(Self { task, stopping })
    }

    /// Sends what is left.
    pub(crate) async fn finish(self) {
        self.stopping.cancel();
        drop(self.task.await);
    }
}

async fn send(
    mut receiver: mpsc::Receiver<SpanData>,
    dropped: Arc<AtomicU64>,
    exporter: opentelemetry_otlp::SpanExporter,
    metrics: Arc<Metrics>,
    stopping: CancellationToken,
) {
    let mut is_failing = false;
    loop {
        let is_last = tokio::select! {
            () = tokio::time::sleep(PERIOD) => false,
            () = stopping.cancelled() => true,
        };
        loop {
            let batch: Vec<SpanData> = std::iter::from_fn(|| receiver.try_recv().ok()).take(BATCH).collect();
            metrics.spans("dropped", dropped.swap(0, Ordering::Relaxed));
            if batch.is_empty() {
                break;
            }
            let count = batch.len() as u64;
            let sent = exporter.export(batch).await;
            match (&sent, is_failing) {
                (Err(error), false) => tracing::warn!(%error, "the collector takes no spans; those of now are lost"),
                (Ok(()), true) => tracing::info!("the collector takes spans again"),
                (Err(_), true) | (Ok(()), false) => {}
            }
            is_failing = sent.is_err();
            metrics.spans(if sent.is_ok() { "sent" } else { "failed" }, count);
        }
        if is_last {
            return;
        }
    }
}
