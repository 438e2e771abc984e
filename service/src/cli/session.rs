//! A person or a script attached to a program: both streams of output, input, signals and terminal, until the program's end.

use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _, stream::SplitSink};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

use super::{
    frame::{End, Frame, Stream},
    input::{self, UnderWay},
    output::{Output, note},
    remote::{Connection, Refused, code_of},
    signals::Told,
    socket::{self, Socket},
    terminal,
};

/// The service gives a sign of life every 20 seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a service that cannot be reached is asked again.
const RETRY_FOR: Duration = Duration::from_secs(180);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);

/// What there is to attach to.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) connection: &'a Connection,
    /// Of the program, without `attach`.
    pub(super) place: Vec<&'a str>,
    /// Whether it is given our standard input.
    pub(super) has_input: bool,
    pub(super) is_terminal: bool,
    /// Whether frames are shown as they are, one a line.
    pub(super) is_json: bool,
}

/// How it went.
#[derive(Debug)]
pub(super) enum Left {
    /// The program has ended.
    Ended(End),
    /// We were told to let go of it, by the signal of this number.
    Insisted(u8),
}

/// What lasts from one connection to the next.
struct State<'a> {
    output: Output,
    input: Option<mpsc::Receiver<Vec<u8>>>,
    signals: &'a mut mpsc::UnboundedReceiver<Told>,
    under_way: UnderWay,
    /// Our input has ended, and the program is to know.
    is_input_over: bool,
    /// The first piece of output that was not seen.
    next_seq: u64,
    /// When the service was heard last.
    heard_at: Instant,
}

impl State<'_> {
    /// Whether there is input, or its end, of which nobody has said that it was taken.
    fn owes_input(&self) -> bool {
        self.is_input_over || !self.under_way.is_empty()
    }
}

/// Why a connection was left.
enum Parted {
    Left(Left),
    /// It broke; another may do.
    Broken(anyhow::Error),
}

type Sender = SplitSink<Socket, Message>;

impl Session<'_> {
    /// Returns at the program's end, when all it wrote is written. `signals` are those from [`super::signals::catch`].
    pub(super) async fn follow(&self, signals: &mut mpsc::UnboundedReceiver<Told>) -> anyhow::Result<Left> {
        // Put back, however this ends.
        let raw = if self.is_terminal && self.has_input { Some(terminal::Raw::enter().context("setting the terminal")?) } else { None };
        let mut state = State {
            output: Output::start(),
            input: self.has_input.then(input::read),
            signals,
            under_way: UnderWay::default(),
            is_input_over: false,
            next_seq: 0,
            heard_at: Instant::now(),
        };
        let left = self.reconnecting(&mut state).await;
        let State { output, signals, .. } = state;
        let written = tokio::select! {
            written = output.finish() => written,
            // Whoever does not read need not be waited for.
            () = until_insisted(signals) => Ok(()),
        };
        drop(raw);
        // Why nothing more could be written is told by who wrote.
        written?;
        left
    }

    async fn reconnecting(&self, state: &mut State<'_>) -> anyhow::Result<Left> {
        let mut pause = Duration::from_millis(100);
        let mut is_told = false;
        loop {
            let heard_before = state.heard_at;
            let error = match self.connected(state).await? {
                Parted::Left(left) => return Ok(left),
                Parted::Broken(error) => error,
            };
            if state.heard_at != heard_before {
                (pause, is_told) = (Duration::from_millis(100), false);
            }
            if state.heard_at.elapsed() > RETRY_FOR {
                return Err(error.context("the service is lost; what runs there goes on"));
            }
            if !std::mem::replace(&mut is_told, true) {
                note(&format!("the connection broke ({error:#}); trying again"));
            }
            let paused = tokio::time::sleep(pause);
            tokio::pin!(paused);
            loop {
                tokio::select! {
                    () = &mut paused => break,
                    // Nobody else hears it now. The terminal's size is told over the next connection.
                    Some(told) = state.signals.recv() => if let Some(number) = told.ending() {
                        return Ok(Left::Insisted(number));
                    },
                }
            }
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    /// One connection, to its end. An error is one that no other connection helps.
    async fn connected(&self, state: &mut State<'_>) -> anyhow::Result<Parted> {
        let path: Vec<&str> = self.place.iter().copied().chain(["attach"]).collect();
        let from = state.next_seq.to_string();
        let opened = tokio::time::timeout(SILENCE_MAX, socket::open(self.connection, &path, &[("from", &from)])).await;
        let socket = match opened {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                let is_final = error.downcast_ref::<Refused>().is_some_and(Refused::is_final);
                return if is_final { Err(error) } else { Ok(Parted::Broken(error)) };
            }
            Err(_) => return Ok(Parted::Broken(anyhow::anyhow!("no answer"))),
        };
        let (mut sender, mut receiver) = socket.split();
        state.under_way.begin_connection();
        // Until the service has told how much arrived, nothing more is sent.
        let mut may_give = false;
        if let Some(size) = self.size() {
            drop(sender.send(text(&json!({ "resize": size }))).await);
        }
        loop {
            let has_room = may_give && state.under_way.has_room();
            tokio::select! {
                message = tokio::time::timeout(SILENCE_MAX, receiver.next()) => {
                    let message = match message {
                        Ok(Some(Ok(message))) => message,
                        Ok(Some(Err(error))) => return Ok(Parted::Broken(error.into())),
                        Ok(None) => return Ok(Parted::Broken(anyhow::anyhow!("it was closed"))),
                        Err(_) => return Ok(Parted::Broken(anyhow::anyhow!("no sign of life"))),
                    };
                    state.heard_at = Instant::now();
                    let json = match message {
                        Message::Text(json) => json,
                        Message::Close(Some(close)) if matches!(close.code, CloseCode::Invalid | CloseCode::Policy | CloseCode::Size) => {
                            bail!("the service did not understand us: {}", close.reason);
                        }
                        Message::Close(_) => return Ok(Parted::Broken(anyhow::anyhow!("the service closed it"))),
                        // Pings are answered by the library.
                        Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
                    };
                    let frame = Frame::parse(&json)?;
                    if let Some(taken) = frame.stdin {
                        let again = state.under_way.take(taken.written_bytes)?;
                        if self.has_input && !std::mem::replace(&mut may_give, true) {
                            // What the connection before this one had brought may be taken only now: then it is not taken twice.
                            drop(sender.send(text(&json!({ "stdin_at": taken.written_bytes }))).await);
                            for bytes in again {
                                drop(sender.send(Message::Binary(bytes.into())).await);
                            }
                            if state.is_input_over {
                                end_input(&mut sender).await;
                            }
                        }
                    }
                    if let Some(fault) = frame.error.as_ref().filter(|fault| fault.is_passing()) && state.owes_input() {
                        return Ok(Parted::Broken(anyhow::anyhow!("{}: {}", fault.code, fault.message)));
                    }
                    if let Some(end) = self.show(state, frame, &json)? {
                        drop(sender.close().await);
                        return Ok(Parted::Left(Left::Ended(end)));
                    }
                }
                chunk = next_of(&mut state.input), if has_room => match chunk {
                    Some(bytes) => {
                        state.under_way.add(&bytes);
                        // What is not sent now is sent over the next connection.
                        drop(sender.send(Message::Binary(bytes.into())).await);
                    }
                    None => {
                        (state.input, state.is_input_over) = (None, true);
                        end_input(&mut sender).await;
                    }
                },
                Some(told) = state.signals.recv() => match told {
                    Told::Insist(number) => return Ok(Parted::Left(Left::Insisted(number))),
                    Told::Forward(name, _) => self.signal(name),
                    Told::Resized => if let Some(size) = self.size() {
                        drop(sender.send(text(&json!({ "resize": size }))).await);
                    },
                },
                () = state.output.closed() => return Err(super::output::OutputClosed.into()),
            }
        }
    }

    /// Shows a frame; the end, if it is that.
    fn show(&self, state: &mut State<'_>, frame: Frame, json: &str) -> anyhow::Result<Option<End>> {
        if let Some(seq) = frame.seq {
            state.next_seq = seq.saturating_add(1);
        }
        if let Some(gap) = frame.gap {
            state.next_seq = gap.to.saturating_add(1);
            note(&format!("output is missing here: pieces {} to {} are not kept any more", gap.from, gap.to));
        }
        if let Some(fault) = &frame.error {
            if fault.code == "stdin_closed" {
                // A program may well end before its input does.
                state.under_way.give_up();
                state.input = None;
            } else if !matches!(fault.code.as_str(), "not_running" | "no_terminal") {
                note(&format!("{}: {}", fault.code, super::table::plain(&fault.message)));
            }
        }
        if self.is_json {
            state.output.write(Stream::Stdout, format!("{json}\n").into_bytes())?;
        } else if let Some((stream, bytes)) = frame.output()? {
            state.output.write(stream, bytes)?;
        }
        Ok(frame.end)
    }

    /// Apart from the stream: there it would wait behind input that the program does not read.
    fn signal(&self, name: &'static str) {
        let path: Vec<&str> = self.place.iter().copied().chain(["kill"]).collect();
        let request = self.connection.post(&path).json(&json!({ "signal": name }));
        let connection = self.connection.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.send(request).await
                // What has ended hears nothing.
                && !matches!(code_of(&error), Some("wrong_state" | "not_found"))
            {
                note(&format!("passing on {name} failed: {error:#}"));
            }
        });
    }

    fn size(&self) -> Option<serde_json::Value> {
        if self.is_terminal { terminal::size() } else { None }
    }
}

async fn end_input(sender: &mut Sender) {
    drop(sender.send(text(&json!({ "stdin_end": true }))).await);
}

fn text(frame: &serde_json::Value) -> Message {
    Message::Text(frame.to_string().into())
}

/// The next of what comes; of what never comes, never.
async fn next_of(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

async fn until_insisted(signals: &mut mpsc::UnboundedReceiver<Told>) {
    loop {
        match signals.recv().await {
            Some(told) if told.ending().is_some() => return,
            Some(_) => {}
            None => std::future::pending::<()>().await,
        }
    }
}
