//! What this process tells of its work: lines of a log, and spans for a collector of traces where there is one.

mod spans;

use std::{
    io::{self, IsTerminal},
    sync::atomic::{AtomicBool, Ordering},
};

use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::{Span as _, SpanContext, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SdkTracerProvider};
pub(crate) use spans::{Collected, Exporter};
use time::OffsetDateTime;
use tracing::{Level, Metadata, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry,
    filter::dynamic_filter_fn,
    layer::{self, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use crate::config::{LogFormat, TraceSettings};

/// The target of every span that a collector is sent. Those of [`Level::INFO`] stand in lines of the log, too.
pub(crate) const TRACE: &str = "mayfly::trace";

/// Whether there is a collector. Where there is none, traces cost no more than a look at this.
static IS_COLLECTED: AtomicBool = AtomicBool::new(false);

/// A place in a trace that outlasts its span.
#[derive(Debug, Clone)]
pub(crate) struct Origin(SpanContext);

/// Begins to log, and to collect spans if they are wanted: whoever exports them has them from what this returns. Starts no thread.
pub(crate) fn start(format: LogFormat, traces: Option<&TraceSettings>) -> Option<Collected> {
    let (layer, collected) = traces.map(collect::<Registry>).unzip();
    // RUST_LOG is for who looks for a fault; sqlx calls every notice of Postgres's an information.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    // Whatever is logged says to which request and sandbox it belongs; the finer spans are for a collector.
    let filter = filter.add_directive(format!("{TRACE}={}", Level::INFO).parse().expect("a target and a level are a directive"));
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
    IS_COLLECTED.store(true, Ordering::Relaxed);
    let layer = tracing_opentelemetry::layer::<S>()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_level(false)
        .with_tracked_inactivity(false)
        .with_filter(dynamic_filter_fn(is_for_collector).with_max_level_hint(Level::DEBUG));
    (layer, collected)
}

/// Looked at for each span: what is decided once and for all is not asked again, and another's question whether a line would be logged, of which no line comes, would answer for the next span of
/// that thread (tracing-subscriber keeps the answers of its layers there).
fn is_for_collector<S>(metadata: &Metadata<'_>, _context: &layer::Context<'_, S>) -> bool {
    metadata.target() == TRACE && *metadata.level() <= Level::DEBUG
}

/// Has this span, which was not entered yet, belong to the trace that a caller's `traceparent` names (W3C Trace Context), and say which trace that is, or which it begins.
pub(crate) fn join(span: &Span, headers: &axum::http::HeaderMap) {
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
    if !is_collected() {
        return;
    }
    let given = TraceContextPropagator::new().extract_with_context(&Context::new(), &Given(headers));
    if given.span().span_context().is_valid() {
        set_parent(span, given);
    }
    name_trace(span);
}

/// Has whoever is asked by these headers go on with the trace that the present span belongs to. Without a collector the caller's `traceparent` is left as it is.
pub(crate) fn continue_in(headers: &mut axum::http::HeaderMap) {
    struct Told<'a>(&'a mut axum::http::HeaderMap);
    impl Injector for Told<'_> {
        fn set(&mut self, key: &str, value: String) {
            if let (true, Ok(value)) = (key == "traceparent", value.parse()) {
                self.0.insert("traceparent", value);
            }
        }
    }
    if is_collected() {
        TraceContextPropagator::new().inject_context(&Span::current().context(), &mut Told(headers));
    }
}

/// Where the present span is; `None` if nobody collects it.
pub(crate) fn here() -> Option<Origin> {
    if !is_collected() {
        return None;
    }
    let context = Span::current().context();
    let here = context.span().span_context().clone();
    here.is_valid().then_some(Origin(here))
}

/// Has this span, which was not entered yet and outlasts what it comes from, belong to the same trace, and say which that is, or which it begins.
pub(crate) fn detached(span: Span, from: Option<&Origin>) -> Span {
    if is_collected() {
        if let Some(Origin(from)) = from {
            set_parent(&span, Context::new().with_remote_span_context(from.clone()));
        }
        name_trace(&span);
    }
    span
}

/// Adds to the present span one that is over already.
pub(crate) fn past(name: &'static str, began_at: OffsetDateTime, ended_at: OffsetDateTime) {
    if !is_collected() {
        return;
    }
    let context = Span::current().context();
    if !context.span().span_context().is_valid() {
        return;
    }
    let tracer = opentelemetry::global::tracer("mayfly");
    let builder = tracer.span_builder(name).with_start_time(began_at);
    builder.start_with_context(&tracer, &context).end_with_timestamp(ended_at.max(began_at).into());
}

fn is_collected() -> bool {
    IS_COLLECTED.load(Ordering::Relaxed)
}

fn set_parent(span: &Span, parent: Context) {
    if let Err(error) = span.set_parent(parent) {
        tracing::debug!(%error, "a span belongs to no trace");
    }
}

/// Lines of the log name the trace, too.
fn name_trace(span: &Span) {
    let context = span.context();
    let own = context.span().span_context().clone();
    if own.is_valid() {
        span.record("trace.id", tracing::field::display(own.trace_id()));
    }
}
