//! Answers that go on: frames by WebSocket, as server-sent events, or as lines of JSON.

use std::{convert::Infallible, pin::Pin, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{
        WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket, close_code, rejection::WebSocketUpgradeRejection},
    },
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use futures_util::{
    SinkExt as _, Stream, StreamExt as _,
    stream::{SplitSink, SplitStream},
};

use super::{caller::SUBPROTOCOL, error::ApiError};
use crate::{engine::EngineError, sandbox::Invalid};

pub(super) const LINES: &str = "application/x-ndjson";
pub(super) const EVENTS: &str = "text/event-stream";

/// Between two signs of life to a reader for whom nothing comes.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// How long a reader that was told of the end has to close its side. Closed before it has, the connection would be reset, and what is on its
/// way to the reader lost (RFC 9112, 9.6, tells of the same).
const LINGER: Duration = Duration::from_secs(5);
/// A reader has nothing to say.
const READER_MESSAGE_BYTES_MAX: usize = 4096;

/// The last id of a stream that has ended. A browser that comes again with it is told not to.
pub(super) const END_ID: &str = "end";

/// One JSON document of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) json: String,
    /// What a reader that comes again says that it has seen.
    pub(super) id: Option<String>,
}

pub(super) type Frames = Pin<Box<dyn Stream<Item = Result<Frame, EngineError>> + Send>>;

/// The form in which frames leave.
#[derive(Debug)]
pub(super) enum Form {
    Socket(WebSocketUpgrade),
    Events,
    Lines,
}

impl Form {
    /// WebSocket for whoever shakes hands; else what `Accept` likes best, and lines for whom neither will do.
    pub(super) fn asked(headers: &HeaderMap, upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>) -> Result<Self, ApiError> {
        if headers.contains_key(header::UPGRADE) {
            return Ok(Self::Socket(handshake(upgrade)?));
        }
        Ok(if preferred(headers, &[LINES, EVENTS]) == Some(EVENTS) { Self::Events } else { Self::Lines })
    }

    pub(super) fn respond(self, frames: Frames) -> Response {
        match self {
            Self::Lines => ([(header::CONTENT_TYPE, LINES)], lines(frames)).into_response(),
            Self::Events => ([(header::CONTENT_TYPE, EVENTS)], events(frames)).into_response(),
            Self::Socket(upgrade) => {
                let bounded = upgrade.max_message_size(READER_MESSAGE_BYTES_MAX).max_frame_size(READER_MESSAGE_BYTES_MAX);
                // What a reader sends is of no interest, but must be read: pings, and the close.
                let listen = async |receiver: &mut SplitStream<WebSocket>| {
                    while let Some(Ok(_)) = receiver.next().await {}
                    None
                };
                bounded.on_upgrade(move |socket| serve(socket, frames, listen))
            }
        }
    }
}

/// The handshake, if it is one.
pub(super) fn handshake(upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>) -> Result<WebSocketUpgrade, ApiError> {
    let upgrade = upgrade.map_err(|error| Invalid::new("", format!("this is no WebSocket handshake: {error}")))?;
    Ok(upgrade.protocols([SUBPROTOCOL]))
}

/// Which of these media types `Accept` names with the highest weight; the first of several (RFC 9110, 12.5.1).
pub(super) fn preferred(headers: &HeaderMap, offered: &[&'static str]) -> Option<&'static str> {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let mut best: Option<(&'static str, f32)> = None;
    for range in accepted {
        let mut parts = range.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let Some(offer) = offered.iter().find(|offer| offer.eq_ignore_ascii_case(name)) else { continue };
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0_f32);
        if weight > best.map_or(0.0, |(_, weight)| weight) {
            best = Some((offer, weight));
        }
    }
    best.map(|(offer, _)| offer)
}

/// What a reader that comes again has seen last. `Last-Event-ID`, as browsers send it.
pub(super) fn last_event_id(headers: &HeaderMap) -> Option<&str> {
    headers.get("last-event-id").and_then(|value: &HeaderValue| value.to_str().ok())
}

/// One JSON document a line, and an empty line now and then. A failure in the middle ends the lines without an `end`.
fn lines(frames: Frames) -> Body {
    body(frames, "\n", |frame| frame.json + "\n")
}

/// As <https://html.spec.whatwg.org/multipage/server-sent-events.html> has it; a comment now and then.
fn events(frames: Frames) -> Body {
    body(frames, ":\n\n", |Frame { json, id }| match id {
        Some(id) => format!("id: {id}\ndata: {json}\n\n"),
        None => format!("data: {json}\n\n"),
    })
}

fn body(frames: Frames, heartbeat: &'static str, tell: fn(Frame) -> String) -> Body {
    Body::from_stream(futures_util::stream::unfold(frames, move |mut frames| async move {
        let bytes = match tokio::time::timeout(HEARTBEAT, frames.next()).await {
            Ok(Some(Ok(frame))) => Bytes::from(tell(frame)),
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "a stream failed");
                return None;
            }
            Ok(None) => return None,
            Err(_nothing_came) => Bytes::from_static(heartbeat.as_bytes()),
        };
        Some((Ok::<_, Infallible>(bytes), frames))
    }))
}

/// Why a service closes a WebSocket before its end: one of the codes of RFC 6455, 7.4.1, and words.
pub(super) type Refusal = CloseFrame;

/// Sends until the end, until the reader goes away, or until `listen` ends: with a refusal, the reader is told.
pub(super) async fn serve(socket: WebSocket, frames: Frames, listen: impl AsyncFnOnce(&mut SplitStream<WebSocket>) -> Option<Refusal>) {
    let (mut sender, mut receiver) = socket.split();
    let close = tokio::select! {
        close = send_all(&mut sender, frames) => close,
        refusal = listen(&mut receiver) => refusal,
    };
    // Without a word: the reader is gone.
    let Some(close) = close else { return };
    let part = async {
        if sender.send(Message::Close(Some(close))).await.is_ok() {
            while let Some(Ok(_)) = receiver.next().await {}
        }
    };
    // Whoever does not close has had the time to read.
    drop(tokio::time::timeout(LINGER, part).await);
}

/// Sends every frame; how to close then, unless the reader is gone.
async fn send_all(sender: &mut SplitSink<WebSocket, Message>, mut frames: Frames) -> Option<CloseFrame> {
    loop {
        let message = match tokio::time::timeout(HEARTBEAT, frames.next()).await {
            Ok(Some(Ok(frame))) => Message::Text(frame.json.into()),
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "a stream failed");
                return Some(CloseFrame { code: close_code::ERROR, reason: "what is to be shown cannot be read".into() });
            }
            Ok(None) => return Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }),
            Err(_nothing_came) => Message::Ping(Bytes::new()),
        };
        sender.send(message).await.ok()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepting(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_str(text).unwrap())])
    }

    #[test]
    fn the_form_that_weighs_most_is_taken_and_the_first_of_equals() {
        let of = |text| preferred(&accepting(text), &[LINES, EVENTS]);
        assert_eq!(of("text/event-stream"), Some(EVENTS));
        assert_eq!(of("application/x-ndjson;q=0.5, text/event-stream;q=0.8"), Some(EVENTS));
        assert_eq!(of("application/x-ndjson, TEXT/event-stream"), Some(LINES));
        assert_eq!(of("text/event-stream;q=0"), None);
        assert_eq!(of("*/*"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_for_whom_nothing_comes_sees_signs_of_life() {
        let later = futures_util::stream::once(async {
            tokio::time::sleep(HEARTBEAT * 5 / 2).await;
            Ok(Frame { json: "{}".to_owned(), id: Some("7".to_owned()) })
        });
        let bytes = axum::body::to_bytes(events(Box::pin(later)), 1000).await.unwrap();
        assert_eq!(bytes, ":\n\n:\n\nid: 7\ndata: {}\n\n");
    }
}
