//! How the database answers, as the pool of connections sees it.

use prometheus::{Histogram, IntCounterVec};

use super::shelf::Shelf;

/// What the pool tells of. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Statements {
    /// How long a statement or transaction waited for a connection.
    pub(crate) acquire_seconds: Histogram,
    /// A statement on its own, from its sending to its last row.
    pub(crate) statement_seconds: Histogram,
    /// From `begin` to the answer to its end.
    pub(crate) transaction_seconds: Histogram,
    refusals: IntCounterVec,
}

/// Why nothing was sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NotSent {
    Away,
    Crowded,
    NoConnection,
}

/// The connections at one time.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    pub idle: u64,
    pub busy: u64,
    pub max: u64,
    /// Statements that wait for one.
    pub waiting: u64,
    /// Whether the database answers.
    pub is_up: bool,
}

impl Statements {
    pub(super) fn new(shelf: &Shelf) -> anyhow::Result<Self> {
        const SECONDS: [f64; 14] = [0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0];
        let times = shelf.histograms("mayfly_postgres_seconds", "How long Postgres took for it", &["what"], &SECONDS)?;
        let this = Self {
            acquire_seconds: shelf
                .histograms("mayfly_postgres_acquire_seconds", "How long a connection was waited for", &[], &SECONDS)?
                .with_label_values::<&str>(&[]),
            statement_seconds: times.with_label_values(&["statement"]),
            transaction_seconds: times.with_label_values(&["transaction"]),
            refusals: shelf.counters("mayfly_postgres_refusals_total", "Statements that were not sent, by why", &["reason"])?,
        };
        for reason in [NotSent::Away, NotSent::Crowded, NotSent::NoConnection] {
            this.refusals.with_label_values(&[reason.as_str()]);
        }
        Ok(this)
    }

    pub(crate) fn refused(&self, reason: NotSent) {
        self.refusals.with_label_values(&[reason.as_str()]).inc();
    }
}

impl NotSent {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Crowded => "crowded",
            Self::NoConnection => "no_connection",
        }
    }
}

#[cfg(test)]
impl Statements {
    /// Ones that nobody reads.
    pub(crate) fn unread() -> Self {
        Self::new(&Shelf::default()).unwrap()
    }
}
