//! What this process tells of its work: lines of a log, and spans for a collector of traces where there is one.

mod spans;

use std::io::{self, IsTerminal};

use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{Span as _, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SdkTracerProvider};
pub(crate) use spans::{Collected, Exporter};
use time::OffsetDateTime;
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::{LogFormat, TraceSettings};

/// The target of every span that a collector is sent. Those of [`Level::INFO`] stand in lines of the log, too.
pub(crate) const TRACE: &str = "mayfly::trace";

/// Begins to log, and to collect spans if they are wanted: whoever exports them has them from what this returns. Starts no thread.
pub(crate) fn start(format: LogFormat, traces: Option<&TraceSettings>) -> Option<Collected> {
    let (layer, collected) = traces.map(collect::<Registry>).unzip();
    // RUST_LOG is for who looks for a fault; sqlx calls every notice of Postgres's an information.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(layer);
    match format {
        LogFormat::Text => registry.with(lines.with_filter(filter)).init(),
        // A program reads these: what an event says stands side by side, and below `span` what it belongs to.
        LogFormat::Json => registry.with(lines.json().flatten_event(true).with_span_list(false).with_filter(filter)).init(),
    }
    collected
}

/// A layer that collects spans, no events: what a line of the log says is for the log.
fn collect<S>(settings: &TraceSettings) -> (impl tracing_subscriber::Layer<S> + use<S>, Collected)
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a> + Send + Sync,
{
    let (queue, collected) = spans::queue(settings.endpoint.clone());
    let provider = SdkTracerProvider::builder().with_span_processor(queue).with_sampler(spans::sampler(settings.percent)).build();
    let tracer = provider.tracer("mayfly");
    opentelemetry::global::set_tracer_provider(provider);
    let layer = tracing_opentelemetry::layer::<S>()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_level(false)
        .with_tracked_inactivity(false)
        .with_filter(Targets::new().with_target(TRACE, Level::DEBUG));
    (layer, collected)
}

/// Has this span, which was not entered yet, belong to the trace that a caller's `traceparent` names (W3C Trace Context), and tells which trace that is or it has begun. `None`: nobody
/// collects it.
pub(crate) fn join(span: &Span, headers: &axum::http::HeaderMap) -> Option<String> {
    struct Given<'a>(&'a axum::http::HeaderMap);
    impl Extractor for Given<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            // What else a vendor would have carried along is the caller's text, and nothing of ours.
            (key == "traceparent").then(|| self.0.get(key)?.to_str().ok()).flatten()
        }

        fn keys(&self) -> Vec<&str> {
            vec!["traceparent"]
        }
    }
    let given = TraceContextPropagator::new().extract_with_context(&Context::new(), &Given(headers));
    if given.span().span_context().is_valid() {
        // It fails where nobody collects.
        drop(span.set_parent(given));
    }
    let context = span.context();
    let is_collected = context.span().span_context().is_valid();
    is_collected.then(|| context.span().span_context().trace_id().to_string())
}

/// A span of what outlasts the one that it comes from: that one ends without it, and the trace is the same.
pub(crate) fn detached(span: Span, from: &Span) -> Span {
    let context = from.context();
    if context.span().span_context().is_valid() {
        // It fails where nobody collects.
        drop(span.set_parent(context));
    }
    span
}

/// Adds to the present span one that is over already.
pub(crate) fn past(name: &'static str, began_at: OffsetDateTime, ended_at: OffsetDateTime) {
    let context = Span::current().context();
    if !context.span().span_context().is_valid() {
        return;
    }
    let tracer = opentelemetry::global::tracer("mayfly");
    let builder = tracer.span_builder(name).with_start_time(began_at);
    builder.start_with_context(&tracer, &context).end_with_timestamp(ended_at.max(began_at).into());
}
