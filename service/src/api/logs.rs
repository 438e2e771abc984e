//! `/v1/sandboxes/{id}/logs`: output as it comes.

use std::{convert::Infallible, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::{Path, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use sandbox_core::log::Kind as Stream;
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::ToSchema;

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    query,
    stream::{self, END_ID, EVENTS, Form, Frame, Frames, LINES},
};
use crate::{
    clock::at_us,
    engine::{Followup, LogQuery, LogStream},
    logs::LogItem,
    sandbox::{Invalid, Kind, Outcome, TAIL_LINES, words::StreamName},
    token::Scope,
};

const TEXT: &str = "text/plain";

/// One piece of a log.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum LogFrame<'a> {
    /// What was written at one time, as text or, if it is none, as base64.
    #[schema(title = "Chunk")]
    Chunk {
        /// Rises by one with each chunk of the log; `from` begins here.
        seq: u64,
        #[schema(value_type = StreamName)]
        stream: &'static str,
        /// When it was read from the program.
        #[schema(format = DateTime)]
        at: String,
        /// The bytes, where they are UTF-8.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schema(value_type = String)]
        data: Option<&'a str>,
        /// The bytes, where they are not.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schema(value_type = String, content_encoding = "base64")]
        data_base64: Option<String>,
    },
    /// These pieces cannot be had any more.
    #[schema(title = "Gap")]
    Gap { gap: Gap },
    /// The last.
    #[schema(title = "End")]
    End {
        #[schema(value_type = Outcome)]
        end: &'a Outcome,
    },
}

/// From the first piece that is missing to the last.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LogGap)]
pub(super) struct Gap {
    from: u64,
    to: u64,
}

/// What a reader asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) query: LogQuery,
    has_timestamps: bool,
}

/// What a sandbox or a run writes, as it comes
///
/// By WebSocket, each message a `LogFrame`; without a handshake in the form that `Accept` likes best: one `LogFrame` a line (`application/x-ndjson`, also where nothing else
/// will do), as server-sent events, or the bytes themselves as plain text, which holds neither gaps nor the end. The last frame is `end`, with the outcome, once that is stored.
/// Where nothing comes for 20 seconds there is a sign of life: a ping, an empty line, a comment. Any number of readers may read, each at its own pace; one that
/// has stopped reading is disconnected after a minute in which there was something for it, and can go on where it was.
///
/// The id of an event is its sequence number, and a reader that comes again with `Last-Event-ID` goes on behind it; after `end` it is answered 204, which has browsers
/// come no more. A browser, which cannot set headers on a WebSocket, offers the subprotocols `mayfly.v1` and `mayfly.bearer.<token>`; the service answers with `mayfly.v1`.
/// For the log of a run the scope `runs` will do.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/logs",
    operation_id = "readLog",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"]), ("bearer" = ["runs"])),
    params(parameter::Named, parameter::LogParameters, parameter::LastEventId),
    responses(
        (status = 101, description = "The stream begins, over WebSocket."),
        (status = 200, description = "The frames, in the form that was asked for.", content(
            (LogFrame = "application/x-ndjson"),
            (String = "text/event-stream"),
            (String = "text/plain"),
        )),
        (status = 204, description = "The end was seen before."),
        refusal::NotFound,
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
    if !caller.scopes.allow(Scope::Runs) {
        caller.require(Scope::SandboxesRead)?;
    }
    let asked = asked(query::pairs(&uri)?)?;
    let sandbox = app.engine.find_any(&caller.tenant, query::object(&app, &caller, &id).await?).await?.ok_or(ApiError::NotFound)?;
    if sandbox.kind == Kind::Sandbox {
        caller.require(Scope::SandboxesRead)?;
    }
    respond(asked, &headers, upgrade, |query| app.engine.read_log(&sandbox, query))
}

/// The log in the form that the headers ask for.
pub(super) fn respond(
    mut asked: Asked,
    headers: &HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    open: impl FnOnce(LogQuery) -> LogStream,
) -> Result<Response, ApiError> {
    if let Some(seen) = stream::last_event_id(headers) {
        if seen == END_ID {
            // What has browsers come again no more.
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        let seen: u64 = query::value("Last-Event-ID", seen)?;
        (asked.query.wanted.from, asked.query.last_lines) = (seen.saturating_add(1), None);
    }
    if !headers.contains_key(header::UPGRADE) && stream::preferred(headers, &[LINES, EVENTS, TEXT]) == Some(TEXT) {
        let log = open(asked.query);
        return Ok(([(header::CONTENT_TYPE, TEXT)], text(log, asked.has_timestamps)).into_response());
    }
    let form = Form::asked(headers, upgrade)?;
    Ok(form.respond(frames(open(asked.query))))
}

pub(super) fn asked(pairs: Vec<(String, String)>) -> Result<Asked, ApiError> {
    let mut query = LogQuery { is_following: true, ..LogQuery::default() };
    let mut has_timestamps = false;
    for (name, text) in pairs {
        match name.as_str() {
            "from" => query.wanted.from = query::value("from", &text)?,
            "follow" => query.is_following = query::value("follow", &text)?,
            "timestamps" => has_timestamps = query::value("timestamps", &text)?,
            "tail" => {
                let lines = query::value::<u64>("tail", &text)
                    .map_err(|_| Invalid { bound: Some(&TAIL_LINES), ..Invalid::new("tail", "not a number") })?;
                query.last_lines = Some(usize::try_from(TAIL_LINES.check(lines)?).unwrap_or(usize::MAX));
            }
            "since" => {
                let at = OffsetDateTime::parse(&text, &Rfc3339)
                    .map_err(|_| Invalid::new("since", "not a time of RFC 3339, as in 2026-01-02T03:04:05Z"))?;
                query.wanted.since_us = u64::try_from(at.unix_timestamp_nanos() / 1000).unwrap_or(0);
            }
            "stream" => {
                query.wanted.stream = Some(match text.as_str() {
                    "stdout" => Stream::Stdout,
                    "stderr" => Stream::Stderr,
                    _ => return Err(Invalid::new("stream", "a stream is stdout or stderr").into()),
                });
            }
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok(Asked { query, has_timestamps })
}

pub(super) fn frames(log: LogStream) -> Frames {
    Box::pin(futures_util::stream::unfold(log, async |mut log| {
        let next = log.next().await.transpose()?;
        Some((next.map(|next| frame(&next)), log))
    }))
}

/// The bytes of both streams as they came. A failure in the middle ends them.
fn text(log: LogStream, has_timestamps: bool) -> Body {
    let lines = Lines { is_within: !has_timestamps };
    Body::from_stream(futures_util::stream::unfold((log, lines), move |(mut log, mut lines)| async move {
        loop {
            let next = log.next().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "following a log failed");
                None
            })?;
            let Followup::Item(LogItem::Chunk { at_us, data, .. }) = next else { continue };
            let bytes = if has_timestamps { lines.stamped(at_us, &data) } else { data };
            return Some((Ok::<_, Infallible>(Bytes::from(bytes)), (log, lines)));
        }
    }))
}

/// Where a text stands between its lines.
struct Lines {
    is_within: bool,
}

impl Lines {
    /// These bytes, each line of them with its time before it.
    fn stamped(&mut self, micros: u64, data: &[u8]) -> Vec<u8> {
        let stamp = time_of(micros);
        let mut text = Vec::with_capacity(data.len() + stamp.len() + 1);
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            if !self.is_within {
                text.extend_from_slice(stamp.as_bytes());
                text.push(b' ');
            }
            text.extend_from_slice(line);
            self.is_within = !line.ends_with(b"\n");
        }
        text
    }
}

fn time_of(micros: u64) -> String {
    at_us(micros).format(&Rfc3339).expect("the years that microseconds of u64 reach have four digits or are cut to such")
}

pub(super) fn frame(next: &Followup) -> Frame {
    let (frame, id) = match next {
        Followup::Item(LogItem::Chunk { kind, seq, at_us, data }) => {
            let text = std::str::from_utf8(data).ok();
            let frame = LogFrame::Chunk {
                seq: *seq,
                stream: if *kind == Stream::Stderr { "stderr" } else { "stdout" },
                at: time_of(*at_us),
                data: text,
                data_base64: text.is_none().then(|| BASE64.encode(data)),
            };
            (frame, seq.to_string())
        }
        Followup::Item(LogItem::Gap { from, to }) => (LogFrame::Gap { gap: Gap { from: *from, to: *to } }, to.to_string()),
        Followup::End(outcome) => (LogFrame::End { end: outcome }, END_ID.to_owned()),
    };
    Frame { json: serde_json::to_string(&frame).expect("a frame holds nothing that JSON cannot"), id: Some(id) }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn frame(item: LogItem) -> Value {
        serde_json::from_str(&super::frame(&Followup::Item(item)).json).unwrap()
    }

    fn parsed(query: &str) -> Result<Asked, ApiError> {
        asked(query::pairs(&format!("/v1/sandboxes/x/logs?{query}").parse().unwrap())?)
    }

    #[test]
    fn all_that_can_be_asked_adds_up() {
        let Asked { query, has_timestamps } =
            parsed("from=3&follow=false&tail=7&since=1970-01-01T00:00:01Z&stream=stderr&timestamps=true").unwrap();
        assert_eq!((query.wanted.from, query.wanted.since_us, query.wanted.stream), (3, 1_000_000, Some(Stream::Stderr)));
        assert_eq!((query.last_lines, query.is_following, has_timestamps), (Some(7), false, true));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (query, name) in [
            ("from=-1", "from"),
            ("from=18446744073709551616", "from"),
            ("follow=1", "follow"),
            ("tail=x", "tail"),
            ("tail=100001", "tail"),
            ("since=yesterday", "since"),
            ("stream=stdin", "stream"),
            ("timestamps=", "timestamps"),
            ("lines=1", "lines"),
        ] {
            let Err(ApiError::Invalid(invalid)) = parsed(query) else { panic!("{query}") };
            assert_eq!(invalid.field, name);
        }
    }

    #[test]
    fn each_line_is_stamped_once_however_it_is_cut() {
        let mut lines = Lines { is_within: false };
        let mut all = lines.stamped(1_000_000, b"a\nb");
        all.extend(lines.stamped(2_000_000, b"b\n\xff"));
        assert_eq!(all, b"1970-01-01T00:00:01Z a\n1970-01-01T00:00:01Z bb\n1970-01-01T00:00:02Z \xff");
    }

    #[test]
    fn text_travels_as_text() {
        let chunk = LogItem::Chunk { kind: Stream::Stdout, seq: 12, at_us: 1_700_000_000_500_000, data: "grün".into() };
        assert_eq!(frame(chunk), serde_json::json!({"seq": 12, "stream": "stdout", "at": "2023-11-14T22:13:20.5Z", "data": "grün"}));
    }

    #[test]
    fn bytes_that_are_no_text_travel_as_base64() {
        let chunk = LogItem::Chunk { kind: Stream::Stderr, seq: 0, at_us: 0, data: vec![0xff] };
        assert_eq!(frame(chunk), serde_json::json!({"seq": 0, "stream": "stderr", "at": "1970-01-01T00:00:00Z", "data_base64": "/w=="}));
    }

    #[test]
    fn what_is_missing_is_told() {
        assert_eq!(frame(LogItem::Gap { from: 3, to: 9 }), serde_json::json!({"gap": {"from": 3, "to": 9}}));
    }

    #[test]
    fn a_time_beyond_the_calendar_is_shown_all_the_same() {
        assert!(frame(LogItem::Chunk { kind: Stream::Stdout, seq: 0, at_us: u64::MAX, data: vec![] })["at"].is_string());
    }
}
