//! `…/attach`: the input, the output and the terminal of a running program, over WebSocket.
//!
//! The service sends what a log shows, and how much input was taken: `{"stdin":{"written_bytes":12}}`, first of all and whenever it has grown.
//! The client sends binary messages, which are input, and text messages, each a JSON object with one member:
//! `{"stdin":"…"}`, `{"stdin_base64":"…"}`, `{"stdin_at":12}`, `{"stdin_end":true}`, `{"resize":{"rows":24,"columns":80}}`, `{"signal":"SIGINT"}`.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{
        Path, State, WebSocketUpgrade,
        ws::{Message, WebSocket, close_code, rejection::WebSocketUpgradeRejection},
    },
    http::Uri,
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use futures_util::{StreamExt as _, stream::SplitStream};
use sandbox_core::protocol::KillReason;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    logs, query,
    stream::{self, Frame, Frames, Refusal},
};
use crate::{
    engine::{EngineError, InputFault, LogStream, OpenInput},
    runtime::CallError,
    sandbox::{Kind, SandboxId, Signal, SignalRequest, SizeRequest},
    token::Scope,
};

/// The most input in one message, and the largest message: base64 and escapes make it longer.
const INPUT_BYTES_MAX: usize = 256 * 1024;
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// Faults that a client has not read yet.
const FAULTS_MAX: usize = 16;

/// What a client says in a text message.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ClientFrame {
    Stdin(String),
    StdinBase64(String),
    /// Where what follows stands in all of the input: of what has that place already nothing goes in again.
    StdinAt(u64),
    StdinEnd(bool),
    Resize(SizeRequest),
    Signal(SignalRequest),
}

/// What the service says beside the log.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ServiceFrame {
    /// How much input was taken.
    Stdin { written_bytes: u64 },
    /// Something that was asked for was not done. The stream goes on.
    Error { code: &'static str, message: String },
}

/// What is attached to.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    /// The keeper's name for it.
    pub(super) id: SandboxId,
    /// The sandbox that it is or is in.
    pub(super) sandbox: SandboxId,
    pub(super) is_terminal: bool,
}

/// Input, output and terminal of a sandbox's program, over WebSocket
///
/// The service sends text messages: `LogFrame`s, and `{"stdin":{"written_bytes":12}}`, first of all and whenever more input was taken, from all clients together; what was not
/// done is told as `{"error":{"code":"stdin_closed","message":"…"}}` (or `stdin_gap`, `no_terminal`, `not_running`, `keeper_unavailable`), and the stream goes on. The last is `end`.
///
/// The client sends binary messages, which are input, at most 256 KiB each, and text messages, each a JSON object with one member: `{"stdin":"…"}`, `{"stdin_base64":"…"}`,
/// `{"stdin_end":true}`, `{"resize":{"rows":24,"columns":80}}`, `{"signal":"SIGINT"}`. What is no such message is answered by the close code 1007, input behind its end by 1008,
/// what is too large by 1009. While the program does not read its input, nothing more is read from the client.
///
/// Several may be attached at once; whoever comes again goes on with `from`, and knows from the first message how much of its input arrived. What a connection that broke had
/// brought may go in later than that: whoever alone gives input says `{"stdin_at":12}` first, with the number of that message, over each connection, and then nothing goes in twice.
/// Input before which some is missing is told as `stdin_gap` and does not go in.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/attach",
    operation_id = "attachSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(parameter::Named, parameter::LogParameters),
    responses(
        (status = 101, description = "The stream begins."),
        refusal::NotFound,
    ),
)]
pub(super) async fn sandbox(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    uri: Uri,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let asked = logs::asked(query::pairs(&uri)?)?;
    let sandbox =
        app.engine.find(&caller.tenant, Kind::Sandbox, query::object(&app, &caller, &id).await?).await?.ok_or(ApiError::NotFound)?;
    let subject = Subject { id: sandbox.id, sandbox: sandbox.id, is_terminal: sandbox.program.terminal.is_some() };
    let log = app.engine.read_log(&sandbox, asked.query);
    attach(app, subject, log, upgrade)
}

pub(super) fn attach(
    app: Arc<App>,
    subject: Subject,
    log: LogStream,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = stream::handshake(upgrade)?.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
    let input = app.engine.input_of(subject.id);
    let (faults, to_tell) = mpsc::channel(FAULTS_MAX);
    let frames = frames(log, input.written(), to_tell);
    let listener = Listener { app, subject, input, faults, at: None, has_ended: false, is_closed: false };
    Ok(upgrade.on_upgrade(|socket| stream::serve(socket, frames, async move |receiver| listener.listen(receiver).await)))
}

/// The log, what was taken of the input, and what went wrong, as they come.
struct Feed {
    log: LogStream,
    written: watch::Receiver<u64>,
    to_tell: mpsc::Receiver<ServiceFrame>,
    /// What a log showed before which something else is to be said.
    held_back: Option<Frame>,
}

fn frames(log: LogStream, mut written: watch::Receiver<u64>, to_tell: mpsc::Receiver<ServiceFrame>) -> Frames {
    written.mark_changed();
    let feed = Feed { log, written, to_tell, held_back: None };
    Box::pin(futures_util::stream::unfold(feed, async |mut feed| {
        let next = feed.next().await.transpose()?;
        Some((next, feed))
    }))
}

impl Feed {
    async fn next(&mut self) -> Result<Option<Frame>, EngineError> {
        if let Some(frame) = self.held_back.take() {
            return Ok(Some(frame));
        }
        // First of all, so that a client knows it before it shows anything.
        if self.written.has_changed().unwrap_or(false) {
            return Ok(Some(self.taken()));
        }
        tokio::select! {
            Some(fault) = self.to_tell.recv() => Ok(Some(told(&fault))),
            Ok(()) = self.written.changed() => Ok(Some(self.taken())),
            next = self.log.next() => {
                let Some(next) = next? else { return Ok(None) };
                let frame = logs::frame(&next);
                // Nothing follows an end: what was taken until then is said before it.
                if self.written.has_changed().unwrap_or(false) {
                    self.held_back = Some(frame);
                    return Ok(Some(self.taken()));
                }
                Ok(Some(frame))
            }
        }
    }

    fn taken(&mut self) -> Frame {
        let written_bytes = *self.written.borrow_and_update();
        told(&ServiceFrame::Stdin { written_bytes })
    }
}

fn told(frame: &ServiceFrame) -> Frame {
    Frame { json: serde_json::to_string(frame).expect("a frame holds nothing that JSON cannot"), id: None }
}

/// Does what one client says, in the order in which it is said.
struct Listener {
    app: Arc<App>,
    subject: Subject,
    input: Arc<OpenInput>,
    faults: mpsc::Sender<ServiceFrame>,
    /// Where this client's next input stands in all of it, if it has said so.
    at: Option<u64>,
    /// This client has ended the input.
    has_ended: bool,
    /// Nobody takes input any more, and the client knows.
    is_closed: bool,
}

impl Listener {
    /// Until the client goes away, or says what makes no sense. While the program does not read, nothing more is read from the client.
    async fn listen(mut self, receiver: &mut SplitStream<WebSocket>) -> Option<Refusal> {
        loop {
            let message = match receiver.next().await? {
                Ok(message) => message,
                // The library says so in words alone.
                Err(error) if error.to_string().contains("too long") => {
                    return Some(refusal(close_code::SIZE, &format!("a message is {MESSAGE_BYTES_MAX} bytes at the most")));
                }
                Err(_broken) => return None,
            };
            let frame = match message {
                Message::Binary(bytes) => Ok(Asked::Input(bytes)),
                Message::Text(text) => parse(&text),
                Message::Ping(_) | Message::Pong(_) => continue,
                Message::Close(_) => return None,
            };
            let done = match frame {
                Ok(frame) => self.act(frame).await,
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = done {
                return Some(refusal);
            }
        }
    }

    async fn act(&mut self, asked: Asked) -> Result<(), Refusal> {
        self.app.engine.touch(self.subject.sandbox);
        match asked {
            Asked::Input(bytes) if bytes.len() > INPUT_BYTES_MAX => {
                Err(refusal(close_code::SIZE, &format!("the input of one message is {INPUT_BYTES_MAX} bytes at the most")))
            }
            Asked::Input(_) | Asked::End if self.has_ended => Err(refusal(close_code::POLICY, "the input was ended before")),
            Asked::Input(_) if self.is_closed => Ok(()),
            Asked::Input(bytes) => {
                let at = self.at;
                self.at = at.map(|at| at.saturating_add(bytes.len() as u64));
                let written = self.input.write(at, &bytes).await;
                self.note(written).await;
                Ok(())
            }
            Asked::At(at) => {
                self.at = Some(at);
                Ok(())
            }
            Asked::End => {
                let ended = self.input.end(self.at, self.subject.is_terminal).await;
                self.has_ended = !self.subject.is_terminal && matches!(ended, Ok(()) | Err(InputFault::Closed));
                self.note(ended).await;
                Ok(())
            }
            Asked::Resize(size) => {
                let size = size.parse().map_err(|invalid| refusal(close_code::INVALID, &invalid.to_string()))?;
                let resized = self.app.keeper.resize(self.subject.id, size).await;
                self.tell("no_terminal", resized).await;
                Ok(())
            }
            Asked::Signal(signal) => {
                let signal = signal.parse("signal").map_err(|invalid| refusal(close_code::INVALID, &invalid.to_string()))?;
                let sent = if signal == Signal::KILL {
                    self.app.keeper.kill(self.subject.id, KillReason::StoppedByUser).await
                } else {
                    self.app.keeper.signal(self.subject.id, signal.number()).await
                };
                self.tell("not_running", sent).await;
                Ok(())
            }
        }
    }

    async fn note(&mut self, done: Result<(), InputFault>) {
        let Err(fault) = done else { return };
        let code = match fault {
            InputFault::Closed => "stdin_closed",
            InputFault::Gap => "stdin_gap",
            InputFault::KeeperUnavailable => "keeper_unavailable",
        };
        // A program may well end, or close its input, while a client types: once is enough, and what it wrote goes on to be shown.
        self.is_closed = fault == InputFault::Closed;
        self.say(code, fault.to_string()).await;
    }

    async fn tell(&self, code: &'static str, done: Result<(), CallError>) {
        match done {
            Ok(()) => {}
            Err(CallError::Failed(failure)) => self.say(code, failure.message).await,
            Err(error @ CallError::Lost) => self.say("keeper_unavailable", error.to_string()).await,
        }
    }

    async fn say(&self, code: &'static str, message: String) {
        // Without a reader the connection is about to end.
        drop(self.faults.send(ServiceFrame::Error { code, message }).await);
    }
}

/// What a client wants.
#[derive(Debug)]
enum Asked {
    Input(Bytes),
    At(u64),
    End,
    Resize(SizeRequest),
    Signal(SignalRequest),
}

fn parse(text: &str) -> Result<Asked, Refusal> {
    let invalid = |detail: &str| refusal(close_code::INVALID, detail);
    match serde_json::from_str(text).map_err(|error| invalid(&format!("this is no frame: {error}")))? {
        ClientFrame::Stdin(text) => Ok(Asked::Input(text.into())),
        ClientFrame::StdinBase64(text) => {
            let bytes = BASE64.decode(text).map_err(|error| invalid(&format!("stdin_base64 is not base64: {error}")))?;
            Ok(Asked::Input(bytes.into()))
        }
        ClientFrame::StdinAt(at) => Ok(Asked::At(at)),
        ClientFrame::StdinEnd(true) => Ok(Asked::End),
        ClientFrame::StdinEnd(false) => Err(invalid("stdin_end is true or absent")),
        ClientFrame::Resize(size) => Ok(Asked::Resize(size)),
        ClientFrame::Signal(signal) => Ok(Asked::Signal(signal)),
    }
}

fn refusal(code: u16, reason: &str) -> Refusal {
    /// A control frame holds 125 bytes, two of them the code (RFC 6455, 5.5).
    const REASON_BYTES_MAX: usize = 123;
    Refusal { code, reason: reason[..reason.floor_char_boundary(REASON_BYTES_MAX)].into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_says_one_thing_at_a_time() {
        assert!(matches!(parse(r#"{"stdin":"grün"}"#), Ok(Asked::Input(bytes)) if bytes == "grün"));
        assert!(matches!(parse(r#"{"stdin_base64":"/w=="}"#), Ok(Asked::Input(bytes)) if bytes == [255][..]));
        assert!(matches!(parse(r#"{"stdin_at":12}"#), Ok(Asked::At(12))));
        assert!(matches!(parse(r#"{"stdin_end":true}"#), Ok(Asked::End)));
        assert!(matches!(parse(r#"{"resize":{"rows":1,"columns":2}}"#), Ok(Asked::Resize(_))));
        assert!(matches!(parse(r#"{"signal":"SIGINT"}"#), Ok(Asked::Signal(_))));
    }

    #[test]
    fn what_is_no_frame_is_refused_with_words_that_fit() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"stdin":"a","stdin_end":true}"#,
            r#"{"stdin":7}"#,
            r#"{"stdin_base64":"x"#,
            r#"{"stdin_base64":"%"}"#,
            r#"{"stdin_at":-1}"#,
            r#"{"stdin_end":false}"#,
            r#"{"resize":{"rows":1}}"#,
            r#"{"resize":{"rows":1,"columns":2,"depth":3}}"#,
            r#"{"what":1}"#,
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.code == close_code::INVALID && refused.reason.len() <= 123, "{text}: {refused:?}");
        }
        assert_eq!(refusal(close_code::SIZE, &"ü".repeat(100)).reason.len(), 122);
    }
}
