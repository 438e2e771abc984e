//! Signals that are meant for the program in the sandbox.

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// What ends us if it comes again and again, as with Docker.
const INSISTING: u32 = 3;

/// A signal that we got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// For the program, by its name and number.
    Forward(&'static str, u8),
    /// The third wish in a row that it ended: it is to end now.
    Insist(u8),
    /// The terminal has another size.
    Resized,
}

impl Told {
    /// The number of the signal, if it is a wish that all of this ended.
    pub(super) fn ending(self) -> Option<u8> {
        match self {
            Self::Forward("SIGINT" | "SIGTERM" | "SIGHUP" | "SIGQUIT", number) | Self::Insist(number) => Some(number),
            Self::Forward(..) | Self::Resized => None,
        }
    }
}

/// Catches them from now on, for as long as this process lives.
pub(super) fn catch() -> std::io::Result<mpsc::UnboundedReceiver<Told>> {
    let forwarded = [
        (SignalKind::hangup(), "SIGHUP", 1),
        (SignalKind::interrupt(), "SIGINT", 2),
        (SignalKind::quit(), "SIGQUIT", 3),
        (SignalKind::user_defined1(), "SIGUSR1", 10),
        (SignalKind::user_defined2(), "SIGUSR2", 12),
        (SignalKind::terminate(), "SIGTERM", 15),
    ];
    let (to, from) = mpsc::unbounded_channel();
    for (kind, name, number) in forwarded {
        let (mut signals, to) = (signal(kind)?, to.clone());
        tokio::spawn(async move {
            let mut count = 0;
            while signals.recv().await.is_some() {
                count += 1;
                let is_insisting = matches!(name, "SIGINT" | "SIGTERM") && count >= INSISTING;
                if to.send(if is_insisting { Told::Insist(number) } else { Told::Forward(name, number) }).is_err() {
                    return;
                }
            }
        });
    }
    let mut sizes = signal(SignalKind::window_change())?;
    tokio::spawn(async move {
        while sizes.recv().await.is_some() {
            if to.send(Told::Resized).is_err() {
                return;
            }
        }
    });
    Ok(from)
}
