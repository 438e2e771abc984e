//! `mayfly logs`: what a sandbox or run wrote, and goes on to write.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use futures_util::StreamExt as _;
use reqwest::{Method, header};
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use super::{
    frame::{Frame, Stream},
    output::{Output, OutputClosed, note},
    quantity,
    remote::{Connection, Refused, Remote},
};
use crate::clock::Clock;

/// The service gives a sign of life every 20 seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const RETRY_FOR: Duration = Duration::from_secs(180);
const RETRY_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The sandbox, by id or name, or a run by its id
    sandbox: String,
    /// Go on until its end
    #[arg(short, long)]
    follow: bool,
    /// Begin with so many lines before the end
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<u64>,
    /// Only what is younger: a time of RFC 3339, or as in 10m
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    since: Option<String>,
    /// Each line with its time before it
    #[arg(short, long)]
    timestamps: bool,
    /// Only this stream
    #[arg(long, value_parser = ["stdout", "stderr"])]
    stream: Option<String>,
    /// Print what the service sends, one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
}

/// What lasts from one connection to the next.
struct State {
    output: Output,
    /// Where the next connection begins, if there was one before.
    next_seq: Option<u64>,
    /// The service has answered once: what does not answer now is a connection that broke.
    is_reached: bool,
    /// Since when it does not.
    lost_at: Option<Instant>,
    /// Of stdout and stderr: whether a line was begun.
    is_within_line: [bool; 2],
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<()> {
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut state = State { output: Output::start(), next_seq: None, is_reached: false, lost_at: None, is_within_line: [false; 2] };
        let read = arguments.read(&connection, &mut state).await;
        let written = state.output.finish().await;
        // Why nothing more could be written is told by who wrote.
        written.and(read)
    })
}

impl Arguments {
    /// To the end of the log, over as many connections as it takes if it is followed.
    async fn read(&self, connection: &Connection, state: &mut State) -> anyhow::Result<()> {
        loop {
            let error = match self.read_once(connection, state).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let is_final = error.downcast_ref::<Refused>().is_some_and(Refused::is_final)
                || error.is::<OutputClosed>()
                || !self.follow
                || !state.is_reached;
            if is_final || state.lost_at.is_some_and(|at| at.elapsed() > RETRY_FOR) {
                return Err(error);
            }
            if state.lost_at.is_none() {
                note(&format!("the connection broke ({error:#}); trying again"));
                state.lost_at = Some(Instant::now());
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    async fn read_once(&self, connection: &Connection, state: &mut State) -> anyhow::Result<()> {
        let from = state.next_seq.map(|seq| seq.to_string());
        let tail = self.tail.filter(|_| from.is_none()).map(|lines| lines.to_string());
        let mut query = vec![("follow", if self.follow { "true" } else { "false" })];
        let others =
            [("from", from.as_deref()), ("tail", tail.as_deref()), ("since", self.since.as_deref()), ("stream", self.stream.as_deref())];
        query.extend(others.into_iter().filter_map(|(name, value)| Some((name, value?))));
        let request = connection.request(Method::GET, &["v1", "sandboxes", &self.sandbox, "logs"], &query);
        let response = connection.send(request.header(header::ACCEPT, "application/x-ndjson")).await?;
        (state.is_reached, state.lost_at) = (true, None);
        let mut stream = response.bytes_stream();
        let mut line = Vec::new();
        loop {
            let bytes = tokio::select! {
                bytes = tokio::time::timeout(SILENCE_MAX, stream.next()) => bytes.context("no sign of life")?,
                () = state.output.closed() => return Err(OutputClosed.into()),
            };
            let Some(bytes) = bytes else { break };
            for part in bytes.context("reading the log")?.split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(part);
                if line.ends_with(b"\n") {
                    let text = String::from_utf8(std::mem::take(&mut line)).context("the service sent what is no text")?;
                    if self.show(state, text.trim_end())? {
                        return Ok(());
                    }
                }
            }
        }
        // Without `follow` the log ends where it ends.
        anyhow::ensure!(!self.follow, "the service closed it");
        Ok(())
    }

    /// Shows a line; whether it was the last.
    fn show(&self, state: &mut State, json: &str) -> anyhow::Result<bool> {
        // A sign of life.
        if json.is_empty() {
            return Ok(false);
        }
        let frame = Frame::parse(json)?;
        if let Some(seq) = frame.seq {
            state.next_seq = Some(seq.saturating_add(1));
        }
        if let Some(gap) = frame.gap {
            state.next_seq = Some(gap.to.saturating_add(1));
            note(&format!("output is missing here: pieces {} to {} are not kept any more", gap.from, gap.to));
        }
        if self.json {
            state.output.write(Stream::Stdout, format!("{json}\n").into_bytes())?;
        } else if let Some((stream, bytes)) = frame.output()? {
            let bytes = match &frame.at {
                Some(at) if self.timestamps => stamped(at, &bytes, &mut state.is_within_line[usize::from(stream == Stream::Stderr)]),
                _ => bytes,
            };
            state.output.write(stream, bytes)?;
        }
        Ok(frame.end.is_some())
    }
}

/// These bytes, each line that begins in them with a time before it.
fn stamped(at: &str, bytes: &[u8], is_within: &mut bool) -> Vec<u8> {
    let mut stamped = Vec::with_capacity(bytes.len() + at.len() + 1);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if !*is_within {
            stamped.extend_from_slice(at.as_bytes());
            stamped.push(b' ');
        }
        stamped.extend_from_slice(line);
        *is_within = !line.ends_with(b"\n");
    }
    stamped
}

/// An instant as the API takes it.
fn parse_since(text: &str) -> anyhow::Result<String> {
    if time::OffsetDateTime::parse(text, &Rfc3339).is_ok() {
        return Ok(text.to_owned());
    }
    let millis = quantity::millis(text).context("a time as in 2026-01-02T03:04:05Z, or how long ago as in 10m")?;
    let ago = time::Duration::milliseconds(i64::try_from(millis).unwrap_or(i64::MAX));
    let at = Clock::System.now().checked_sub(ago).context("that is too long ago")?;
    Ok(at.format(&Rfc3339)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_stamped_once_however_it_is_cut() {
        let mut is_within = false;
        let mut all = stamped("T1", b"a\nb", &mut is_within);
        all.extend(stamped("T2", b"b\nc", &mut is_within));
        assert_eq!(all, b"T1 a\nT1 bb\nT2 c");
    }

    #[test]
    fn since_is_an_instant_or_how_long_ago() {
        assert_eq!(parse_since("2026-01-02T03:04:05Z").unwrap(), "2026-01-02T03:04:05Z");
        assert!(parse_since("10m").unwrap().ends_with('Z'));
        assert!(parse_since("yesterday").is_err());
    }
}
