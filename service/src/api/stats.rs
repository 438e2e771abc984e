//! `/v1/sandboxes/{id}/stats`: what a sandbox uses, once or again and again.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    http::{HeaderMap, Uri, header},
    response::{IntoResponse as _, Response},
};
use sandbox_core::protocol::{FailureKind, Sample};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::{Interval, MissedTickBehavior};
use utoipa::ToSchema;

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    query,
    stream::{self, EVENTS, Form, Frame, Frames, LINES},
};
use crate::{
    clock::at_us,
    engine::EngineError,
    runtime::CallError,
    sandbox::{INTERVAL_MS, Invalid, Kind, Outcome, Sandbox, State as SandboxState},
    token::Scope,
};

/// How long the outcome of a sandbox is waited for that the keeper knows no more.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// What a sandbox uses at one time.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Stats)]
pub(super) struct StatsView {
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    at: OffsetDateTime,
    state: SandboxState,
    cpu: CpuView,
    memory: MemoryView,
    pids: PidsView,
    io: IoView,
    network: NetworkView,
}

/// CPU time.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsCpu)]
struct CpuView {
    /// CPU time of all its processes since its start, in milliseconds.
    usage_ms: u64,
    /// How long its rate limit held it back, in milliseconds.
    throttled_ms: u64,
    /// Of one whole core, 100 is one: since the sample before this in a stream; in the first, and in a single one, since its start.
    percent: f64,
    /// Its rate limit, in thousandths of a core.
    limit_millis: u64,
}

/// Memory, with what the kernel keeps for it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsMemory)]
struct MemoryView {
    usage_bytes: u64,
    peak_bytes: u64,
    limit_bytes: u64,
    /// Usage of its limit.
    percent: f64,
}

/// Processes and threads.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsPids)]
struct PidsView {
    current: u64,
    peak: u64,
    limit: u64,
}

/// What reached the node's disks, since its start.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsIo)]
struct IoView {
    read_bytes: u64,
    written_bytes: u64,
    reads: u64,
    writes: u64,
}

/// Over all interfaces but loopback, since its start.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsNetwork)]
struct NetworkView {
    received_bytes: u64,
    sent_bytes: u64,
}

/// One piece of a stream of samples.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum StatsFrame {
    Sample(Box<StatsView>),
    /// The last: how it ended.
    #[schema(title = "End")]
    End {
        end: Box<Outcome>,
    },
}

/// What a sandbox uses
///
/// One sample; or a stream of them, by WebSocket, as lines of JSON or as server-sent events, which ends with `{"end": …}`, the outcome. A reader that is slow gets fewer
/// samples, not old ones.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/stats",
    operation_id = "readStats",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Named, parameter::StatsParameters),
    responses(
        (status = 101, description = "The stream begins, over WebSocket."),
        (status = 200, description = "A sample, or samples.", content(
            (StatsView = "application/json"),
            (StatsFrame = "application/x-ndjson"),
            (String = "text/event-stream"),
        )),
        refusal::NotFound,
        refusal::WrongState,
        refusal::KeeperUnavailable,
    ),
)]
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let (is_streaming, interval) = asked(query::pairs(&uri)?)?;
    let sandbox =
        app.engine.find(&caller.tenant, Kind::Sandbox, query::object(&app, &caller, &id).await?).await?.ok_or(ApiError::NotFound)?;
    if !matches!(sandbox.state, SandboxState::Running | SandboxState::Paused) {
        return Err(ApiError::WrongState(sandbox.state));
    }
    // Whoever shakes hands, or takes nothing but frames, wants a stream without saying so.
    let wants_frames = headers.contains_key(header::UPGRADE)
        || stream::preferred(&headers, &["application/json", LINES, EVENTS]).is_some_and(|name| name != "application/json");
    let mut watch = Watch { app, sandbox, before: None, ticks: ticks(interval), is_over: false };
    // Asked first, so that what is wrong is told by the status.
    let first = watch.sample().await?;
    if !is_streaming.unwrap_or(wants_frames) {
        return Ok(Json(first).into_response());
    }
    Ok(Form::asked(&headers, upgrade)?.respond(frames(watch, first)))
}

fn asked(pairs: Vec<(String, String)>) -> Result<(Option<bool>, Duration), ApiError> {
    let (mut is_streaming, mut interval_ms) = (None, 1000);
    for (name, text) in pairs {
        match name.as_str() {
            "stream" => is_streaming = Some(query::value("stream", &text)?),
            "interval_ms" => {
                let asked = query::value::<u64>("interval_ms", &text)
                    .map_err(|_| Invalid { bound: Some(&INTERVAL_MS), ..Invalid::new("interval_ms", "not a number") })?;
                interval_ms = INTERVAL_MS.check(asked)?;
            }
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok((is_streaming, Duration::from_millis(interval_ms)))
}

/// The first tick comes when the period is over once: the first sample is there already.
fn ticks(period: Duration) -> Interval {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    // A reader that is slow gets fewer samples, not old ones.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

fn frames(watch: Watch, first: StatsView) -> Frames {
    Box::pin(futures_util::stream::unfold((watch, Some(first)), move |(mut watch, first)| async move {
        let next = match first {
            Some(first) => Ok(StatsFrame::Sample(Box::new(first))),
            None => watch.next().await?,
        };
        let json = |frame: &StatsFrame| serde_json::to_string(frame).expect("a sample holds nothing that JSON cannot");
        Some((next.map(|frame| Frame { json: json(&frame), id: None }), (watch, None)))
    }))
}

/// One sandbox, looked at again and again.
struct Watch {
    app: Arc<App>,
    sandbox: Sandbox,
    before: Option<Sample>,
    ticks: Interval,
    is_over: bool,
}

impl Watch {
    async fn sample(&mut self) -> Result<StatsView, ApiError> {
        let sample = self.app.keeper.sample(self.sandbox.id).await;
        let sample = sample.map_err(|error| self.refused(error))?;
        Ok(self.view(sample))
    }

    /// The next sample, or the end; `None` behind it. May be given up and called again.
    async fn next(&mut self) -> Option<Result<StatsFrame, EngineError>> {
        if self.is_over {
            return None;
        }
        loop {
            self.ticks.tick().await;
            match self.app.keeper.sample(self.sandbox.id).await {
                Ok(sample) => return Some(Ok(StatsFrame::Sample(Box::new(self.view(sample))))),
                // It is upgraded, or started anew: a sample is missing.
                Err(CallError::Lost) => {}
                Err(CallError::Failed(_)) => break,
            }
        }
        self.is_over = true;
        let Sandbox { tenant, id, .. } = &self.sandbox;
        let ended = self.app.engine.wait_until(tenant, *id, END_PATIENCE, |sandbox| sandbox.state.is_final()).await;
        // Deleted, it has no outcome any more.
        ended
            .map(|sandbox| sandbox.and_then(|sandbox| sandbox.outcome).map(|outcome| StatsFrame::End { end: Box::new(outcome) }))
            .transpose()
    }

    fn refused(&self, error: CallError) -> ApiError {
        match error {
            CallError::Failed(failure) if matches!(failure.kind, FailureKind::Gone | FailureKind::Busy) => {
                ApiError::WrongState(self.sandbox.state)
            }
            CallError::Failed(_) | CallError::Lost => error.into(),
        }
    }

    fn view(&mut self, sample: Sample) -> StatsView {
        let limits = &self.sandbox.limits;
        let started_us = self.sandbox.started_at.map_or(sample.at_us, |at| u64::try_from(at.unix_timestamp_nanos() / 1000).unwrap_or(0));
        let (cpu_before, at_before) = self.before.replace(sample).map_or((0, started_us), |before| (before.cpu_us, before.at_us));
        StatsView {
            at: at_us(sample.at_us),
            state: if sample.is_paused { SandboxState::Paused } else { SandboxState::Running },
            cpu: CpuView {
                usage_ms: sample.cpu_us / 1000,
                throttled_ms: sample.throttled_us / 1000,
                percent: percent(sample.cpu_us.saturating_sub(cpu_before), sample.at_us.saturating_sub(at_before)),
                limit_millis: limits.cpu_millis(),
            },
            memory: MemoryView {
                usage_bytes: sample.memory_bytes,
                peak_bytes: sample.memory_peak_bytes,
                limit_bytes: limits.memory_bytes(),
                percent: percent(sample.memory_bytes, limits.memory_bytes()),
            },
            pids: PidsView { current: sample.pids, peak: sample.pids_peak, limit: limits.pids() },
            io: IoView {
                read_bytes: sample.io_read_bytes,
                written_bytes: sample.io_written_bytes,
                reads: sample.io_reads,
                writes: sample.io_writes,
            },
            network: NetworkView { received_bytes: sample.network_received_bytes, sent_bytes: sample.network_sent_bytes },
        }
    }
}

/// To two decimals; of nothing nothing.
#[expect(clippy::cast_precision_loss, reason = "a percentage of two decimals is exact enough by far")]
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    (part as f64 / whole as f64 * 10_000.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentage_has_two_decimals_and_none_is_of_nothing() {
        assert_eq!((percent(1, 3), percent(3, 2), percent(1, 0)), (33.33, 150.0, 0.0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let pairs = |query: &str| query::pairs(&format!("/x?{query}").parse().unwrap()).unwrap();
        assert_eq!(asked(pairs("stream=true&interval_ms=100")).unwrap(), (Some(true), Duration::from_millis(100)));
        for (query, name) in [("interval_ms=99", "interval_ms"), ("interval_ms=60001", "interval_ms"), ("stream=1", "stream"), ("x=1", "x")]
        {
            let Err(ApiError::Invalid(invalid)) = asked(pairs(query)) else { panic!("{query}") };
            assert_eq!(invalid.field, name);
        }
    }
}
