//! Log streams over WebSocket, put together again on the reader's side.

use std::time::Duration;

use anyhow::{Context, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue},
};

use crate::{contract, host};

/// The longest that a test waits for the next frame.
const FRAME_DEADLINE: Duration = Duration::from_secs(60);

/// What a client says beside the first line to have a connection become a WebSocket.
pub const HANDSHAKE: &str =
    "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// Reads from a connection until this has come; what came with it.
pub async fn read_until(stream: &mut TcpStream, text: &str) -> Vec<u8> {
    let mut seen = Vec::new();
    while !seen.windows(text.len()).any(|part| part == text.as_bytes()) {
        let read = tokio::time::timeout(FRAME_DEADLINE, stream.read_buf(&mut seen)).await;
        let is_more = read.is_ok_and(|read| read.is_ok_and(|count| count > 0));
        assert!(is_more, "{text:?} never came, but {}", String::from_utf8_lossy(&seen));
    }
    seen
}

/// Reads from a connection whose other end is to close it. A reset is an end, too.
pub async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut seen = Vec::new();
    let read = tokio::time::timeout(FRAME_DEADLINE, stream.read_to_end(&mut seen)).await;
    assert!(read.is_ok(), "the connection is open, and brought {}", String::from_utf8_lossy(&seen));
    seen
}

/// Waits until the service has closed its end of this connection, however the other end stands.
pub async fn until_let_go(stream: &TcpStream) {
    // Whose ends are both closed has no peer any more (getpeername(2)).
    let client = stream.local_addr().expect("it has one to its end");
    let deadline = tokio::time::Instant::now() + FRAME_DEADLINE;
    while host::holds_connection(client) {
        assert!(tokio::time::Instant::now() < deadline, "the service holds the connection from {client}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An open log stream.
#[derive(Debug)]
pub struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

/// Opens `url` (http://…) as a WebSocket, with a token as the header has it.
///
/// # Errors
/// The service answered the handshake with something else; the text names the status.
pub async fn open(url: &str, token: Option<&str>) -> Result<Socket> {
    let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
    if let Some(token) = token {
        request.headers_mut().insert("authorization", HeaderValue::from_str(&format!("Bearer {token}"))?);
    }
    open_request(request).await
}

/// Opens a handshake of the caller's own making.
///
/// # Errors
/// As [`open`].
pub async fn open_request(request: tokio_tungstenite::tungstenite::http::Request<()>) -> Result<Socket> {
    let (socket, _response) = tokio_tungstenite::connect_async(request).await.context("the handshake failed")?;
    Ok(Socket(socket))
}

impl Socket {
    /// The next frame, or `None` when the service closed the stream. Panics if nothing comes for a minute.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            let message = tokio::time::timeout(FRAME_DEADLINE, self.0.next()).await.expect("a frame within a minute");
            match message? {
                Ok(Message::Text(text)) => return Some(serde_json::from_str(&text).expect("frames are JSON")),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                Ok(Message::Binary(bytes)) => panic!("a binary frame of {} bytes", bytes.len()),
            }
        }
    }

    /// Sends a text message.
    ///
    /// # Errors
    /// The service is gone.
    pub async fn send(&mut self, frame: &Value) -> Result<()> {
        Ok(self.0.send(Message::text(frame.to_string())).await?)
    }

    /// Sends whatever message.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_message(&mut self, message: Message) -> Result<()> {
        Ok(self.0.send(message).await?)
    }

    /// The next message, whatever it is, but for signs of life. Panics if nothing comes for a minute.
    pub async fn next_message(&mut self) -> Option<Message> {
        loop {
            let message = tokio::time::timeout(FRAME_DEADLINE, self.0.next()).await.expect("a message within a minute");
            match message?.ok()? {
                Message::Ping(_) | Message::Pong(_) => {}
                message @ (Message::Text(_) | Message::Binary(_) | Message::Close(_) | Message::Frame(_)) => return Some(message),
            }
        }
    }

    /// Reads on until the service closes, and says with which code and words.
    pub async fn closed(&mut self) -> Option<(u16, String)> {
        loop {
            if let Message::Close(frame) = self.next_message().await? {
                return frame.map(|frame| (frame.code.into(), frame.reason.to_string()));
            }
        }
    }

    /// The frames of an attached stream up to the first for which `is_it` says yes, with that one.
    pub async fn until(&mut self, is_it: impl Fn(&Attached) -> bool) -> Attached {
        let mut seen = Attached::default();
        while !is_it(&seen) {
            let frame = self.next().await.unwrap_or_else(|| panic!("the stream ended before: {seen:?}"));
            seen.add(&frame);
        }
        seen
    }

    /// Reads an attached stream to its end.
    pub async fn collect_attached(mut self) -> Attached {
        let mut seen = Attached::default();
        while let Some(frame) = self.next().await {
            seen.add(&frame);
        }
        seen
    }

    /// Reads to the end of the stream.
    pub async fn collect(mut self) -> Frames {
        let mut frames = Frames::default();
        while let Some(frame) = self.next().await {
            frames.add(&frame);
        }
        frames
    }
}

/// What an attached stream said, put together.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Attached {
    pub log: Frames,
    /// Of the input.
    pub written_bytes: Option<u64>,
    pub errors: Vec<Value>,
}

impl Attached {
    /// Adds one frame; panics if it breaks what is promised.
    pub fn add(&mut self, frame: &Value) {
        if let Some(taken) = frame.get("stdin") {
            let written = taken["written_bytes"].as_u64().unwrap_or_else(|| panic!("no number in {frame}"));
            assert!(self.log.end.is_none() && self.written_bytes.is_none_or(|before| before < written), "{frame} after {self:?}");
            self.written_bytes = Some(written);
        } else if let Some(error) = frame.get("error") {
            assert!(error["code"].is_string() && error["message"].is_string(), "{frame}");
            self.errors.push(error.clone());
        } else {
            self.log.add(frame);
        }
    }

    /// The codes of what was not done.
    #[must_use]
    pub fn codes(&self) -> Vec<&str> {
        self.errors.iter().filter_map(|error| error["code"].as_str()).collect()
    }
}

/// What a stream said, put together.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Frames {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub seqs: Vec<u64>,
    pub gaps: Vec<Value>,
    /// The outcome, from the last frame.
    pub end: Option<Value>,
}

impl Frames {
    /// Adds one frame, and panics if it breaks what is promised: its form, rising numbers, known streams, nothing after the end.
    pub fn add(&mut self, frame: &Value) {
        if let Err(breach) = contract::check_frame(frame) {
            panic!("a frame breaks the contract: {breach:#}");
        }
        assert!(self.end.is_none(), "a frame after the end: {frame}");
        if let Some(end) = frame.get("end") {
            self.end = Some(end.clone());
        } else if let Some(gap) = frame.get("gap") {
            self.gaps.push(gap.clone());
        } else {
            let seq = frame["seq"].as_u64().unwrap_or_else(|| panic!("no seq in {frame}"));
            assert!(self.seqs.last().is_none_or(|last| *last < seq), "{seq} came after {:?}", self.seqs.last());
            assert!(frame["at"].is_string(), "no time in {frame}");
            self.seqs.push(seq);
            let bytes = match (frame["data"].as_str(), frame["data_base64"].as_str()) {
                (Some(text), None) => text.as_bytes().to_vec(),
                (None, Some(text)) => BASE64_STANDARD.decode(text).expect("data_base64 is base64"),
                _ => panic!("not exactly one kind of data in {frame}"),
            };
            match frame["stream"].as_str() {
                Some("stdout") => self.stdout.extend(bytes),
                Some("stderr") => self.stderr.extend(bytes),
                _ => panic!("unknown stream in {frame}"),
            }
        }
    }

    #[must_use]
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}
