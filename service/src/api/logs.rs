//! `/v1/sandboxes/{id}/logs`: output as it comes, by WebSocket or as lines of JSON.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{
        Path, State, WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    http::{HeaderMap, Uri, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use futures_util::{SinkExt as _, StreamExt as _, stream::SplitSink};
use sandbox_core::log::Kind as Stream;
use serde::Serialize;
use time::format_description::well_known::Rfc3339;
use utoipa::ToSchema;

use super::{
    App,
    caller::{Caller, SUBPROTOCOL},
    contract::{parameter, refusal},
    error::ApiError,
    query,
};
use crate::{
    clock::at_us,
    engine::{EngineError, Followup, LogStream},
    logs::LogItem,
    sandbox::{Invalid, Kind, Outcome, words::StreamName},
    token::Scope,
};

/// Between two signs of life to a reader for whom nothing comes.
const PING_PERIOD: Duration = Duration::from_secs(20);
/// A reader has nothing to say.
const READER_MESSAGE_BYTES_MAX: usize = 4096;
/// Codes of RFC 6455, section 7.4.1.
const CLOSE_NORMAL: u16 = 1000;
const CLOSE_INTERNAL: u16 = 1011;

/// One piece of a log.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = LogFrame)]
enum Frame<'a> {
    Chunk(Chunk<'a>),
    /// These pieces cannot be had any more.
    #[schema(title = "Gap")]
    Gap {
        gap: Gap,
    },
    /// The last.
    #[schema(title = "End")]
    End {
        #[schema(value_type = Outcome)]
        end: &'a Outcome,
    },
}

/// What was written at one time, as text or, if it is none, as base64.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LogChunk)]
struct Chunk<'a> {
    seq: u64,
    #[schema(value_type = StreamName)]
    stream: &'static str,
    #[schema(format = DateTime)]
    at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    data: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, content_encoding = "base64")]
    data_base64: Option<String>,
}

/// From the first piece that is missing to the one after the last.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LogGap)]
struct Gap {
    from: u64,
    to: u64,
}

/// What a sandbox or a run writes, as it comes
///
/// With a WebSocket handshake the answer is a stream of text messages, each a `LogFrame`; without one it is one `LogFrame` a line. The last frame is `end`, with the
/// outcome, once that is stored. Any number of readers may read, each at its own pace. A browser, which cannot set headers on a WebSocket, offers the subprotocols
/// `mayfly.v1` and `mayfly.bearer.<token>`; the service answers with `mayfly.v1`. For the log of a run the scope `runs` will do.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/logs",
    operation_id = "readLog",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"]), ("bearer" = ["runs"])),
    params(
        parameter::Id,
        ("follow" = Option<bool>, Query, description = "Whether to stay until the end, or to stop at what is there.", extensions(("x-schema" = json!({ "default": true })))),
        ("from" = Option<u64>, Query, description = "The sequence number to begin at.", extensions(("x-schema" = json!({ "default": 0 })))),
    ),
    responses(
        (status = 101, description = "The stream begins, over WebSocket."),
        (status = 200, description = "The frames, one a line.", body = Frame, content_type = "application/x-ndjson"),
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
    let (from, is_following) = asked(query::pairs(&uri)?)?;
    let sandbox = app.engine.find_any(&caller.tenant, query::id(&id)?).await?.ok_or(ApiError::NotFound)?;
    if sandbox.kind == Kind::Sandbox {
        caller.require(Scope::SandboxesRead)?;
    }
    let log = app.engine.read_log(&sandbox, from, is_following);
    if !headers.contains_key(header::UPGRADE) {
        return Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines(log)).into_response());
    }
    let upgrade = upgrade.map_err(|error| Invalid::new("", format!("this is no WebSocket handshake: {error}")))?;
    let bounded = upgrade.max_message_size(READER_MESSAGE_BYTES_MAX).max_frame_size(READER_MESSAGE_BYTES_MAX);
    Ok(bounded.protocols([SUBPROTOCOL]).on_upgrade(|socket| serve(socket, log)))
}

fn asked(pairs: Vec<(String, String)>) -> Result<(u64, bool), ApiError> {
    let (mut from, mut is_following) = (0, true);
    for (name, text) in pairs {
        match name.as_str() {
            "from" => from = query::value("from", &text)?,
            "follow" => is_following = query::value("follow", &text)?,
            _ => return Err(query::unknown(&name)),
        }
    }
    Ok((from, is_following))
}

/// One JSON document a line. A failure in the middle ends the lines without an `end`.
fn lines(log: LogStream) -> Body {
    Body::from_stream(futures_util::stream::unfold(log, async |mut log| {
        let next = next(&mut log).await?;
        let mut line = json(&next);
        line.push('\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), log))
    }))
}

async fn next(log: &mut LogStream) -> Option<Followup> {
    log.next().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "following a log failed");
        None
    })
}

/// Sends until the end, or until the reader goes away.
async fn serve(socket: WebSocket, log: LogStream) {
    let (mut sender, mut receiver) = socket.split();
    // What a reader sends is of no interest, but must be read: pings, and the close.
    let listen = async { while let Some(Ok(_)) = receiver.next().await {} };
    tokio::select! {
        sent = send_all(&mut sender, log) => {
            let (code, reason) = match sent {
                Ok(()) => (CLOSE_NORMAL, ""),
                Err(Stopped::ReaderGone) => return,
                Err(Stopped::Failed(error)) => {
                    tracing::warn!(%error, "following a log failed");
                    (CLOSE_INTERNAL, "the log cannot be read")
                }
            };
            // A reader that is gone already has no use for it.
            drop(sender.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await);
        }
        () = listen => {}
    }
}

/// Why sending stopped before the end.
enum Stopped {
    ReaderGone,
    Failed(EngineError),
}

async fn send_all(sender: &mut SplitSink<WebSocket, Message>, mut log: LogStream) -> Result<(), Stopped> {
    loop {
        let message = match tokio::time::timeout(PING_PERIOD, log.next()).await {
            Ok(Ok(Some(next))) => Message::Text(json(&next).into()),
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(Stopped::Failed(error)),
            Err(_nothing_came) => Message::Ping(Bytes::new()),
        };
        sender.send(message).await.map_err(|_| Stopped::ReaderGone)?;
    }
}

fn json(next: &Followup) -> String {
    let frame = match next {
        Followup::Item(LogItem::Chunk { kind, seq, at_us: micros, data }) => {
            let text = std::str::from_utf8(data).ok();
            Frame::Chunk(Chunk {
                seq: *seq,
                stream: if *kind == Stream::Stderr { "stderr" } else { "stdout" },
                at: at_us(*micros).format(&Rfc3339).expect("the years that microseconds of u64 reach have four digits or are cut to such"),
                data: text,
                data_base64: text.is_none().then(|| BASE64.encode(data)),
            })
        }
        Followup::Item(LogItem::Gap { from, to }) => Frame::Gap { gap: Gap { from: *from, to: *to } },
        Followup::End(outcome) => Frame::End { end: outcome },
    };
    serde_json::to_string(&frame).expect("a frame holds nothing that JSON cannot")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn frame(item: LogItem) -> Value {
        serde_json::from_str(&json(&Followup::Item(item))).unwrap()
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
