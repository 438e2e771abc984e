//! Both streams of output on their way out, written by a thread of their own: who reads us slowly holds up nothing else.

use std::io::{self, Write as _};

use tokio::sync::{mpsc, oneshot};

use super::frame::Stream;

/// Nobody reads what is written any more. Nothing to tell anyone: whoever ended the pipe knows.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output any more")]
pub(super) struct OutputClosed;

/// What is to be written, in order. Unbounded here; a program's output is bounded by its `output_bytes`.
#[derive(Debug)]
pub(super) struct Output {
    to: mpsc::UnboundedSender<(Stream, Vec<u8>)>,
    /// How the thread ended. It is not joined: one that nobody reads from need not hold us up.
    written: oneshot::Receiver<io::Result<()>>,
}

impl Output {
    pub(super) fn start() -> Self {
        let (to, from) = mpsc::unbounded_channel();
        let (tell, written) = oneshot::channel();
        std::thread::spawn(move || {
            // Nobody waits for it any more: then nobody needs to know.
            tell.send(write_all(from)).ok();
        });
        Self { to, written }
    }

    /// To be written behind all that was given before.
    pub(super) fn write(&self, stream: Stream, bytes: Vec<u8>) -> Result<(), OutputClosed> {
        self.to.send((stream, bytes)).map_err(|_| OutputClosed)
    }

    /// Resolves when nobody reads any more.
    pub(super) async fn closed(&self) {
        self.to.closed().await;
    }

    /// Returns when all of it is written.
    pub(super) async fn finish(self) -> anyhow::Result<()> {
        let Self { to, written } = self;
        drop(to);
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
            Ok(Err(error)) => Err(anyhow::Error::new(error).context("writing the output")),
            Err(_) => anyhow::bail!("writing the output failed"),
        }
    }
}

/// Until nothing more is given.
fn write_all(mut from: mpsc::UnboundedReceiver<(Stream, Vec<u8>)>) -> io::Result<()> {
    while let Some((stream, bytes)) = from.blocking_recv() {
        match stream {
            Stream::Stdout => write(io::stdout().lock(), &bytes)?,
            Stream::Stderr => write(io::stderr().lock(), &bytes)?,
        }
    }
    Ok(())
}

fn write(mut to: impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    // What has no line end yet is to be seen, too.
    to.flush()
}

/// Tells a person something, apart from all output. Some of it a stranger may have written. Where stderr is closed nobody hears it.
pub(super) fn note(text: &str) {
    // A terminal in raw mode goes back to the first column only when told to; others do not mind.
    let end = if super::terminal::is_raw() { "\r\n" } else { "\n" };
    drop(write!(io::stderr(), "mayfly: {}{end}", super::table::plain(text)));
}
