//! Whether Postgres answers: one task asks it, so that nobody else has to find out by waiting.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::{Connection as _, PgConnection, PgPool, postgres::PgConnectOptions};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};

/// Between two questions to a database that answers.
const PERIOD: Duration = Duration::from_secs(1);
/// Between two questions to one that does not: first this, then doubled up to [`PERIOD`].
const RETRY_MIN: Duration = Duration::from_millis(50);
/// How long an answer may take. A machine under load takes its time, and a checkpoint holds up everyone.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is known of it.
#[derive(Debug)]
pub(super) struct Health {
    /// Why it is away.
    away: watch::Sender<Option<Arc<str>>>,
    last_away: Mutex<Option<Instant>>,
    doubted: Notify,
}

impl Health {
    pub(super) fn new() -> Self {
        Self { away: watch::channel(None).0, last_away: Mutex::default(), doubted: Notify::new() }
    }

    /// Returns as soon as it is known to be away, with the reason.
    pub(super) async fn away(&self) -> Arc<str> {
        let mut news = self.away.subscribe();
        loop {
            if let Some(reason) = news.borrow_and_update().clone() {
                return reason;
            }
            if news.changed().await.is_err() {
                // The sender is ours: this does not happen while we are asked.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether it is known to be away.
    pub(super) fn is_away(&self) -> bool {
        self.away.borrow().is_some()
    }

    /// Returns as soon as it is not known to be away.
    pub(super) async fn there(&self) {
        drop(self.away.subscribe().wait_for(Option::is_none).await);
    }

    /// Somebody could not use it: it is asked at once.
    pub(super) fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Whether it was away within this time.
    pub(super) fn was_away_within(&self, time: Duration) -> bool {
        self.last_away.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| at.elapsed() <= time)
    }

    /// Asks until the pool is closed. By a connection of its own: that of the pool's none is free is no sign.
    pub(super) async fn watch(self: Arc<Self>, pool: PgPool) {
        let options = pool.connect_options();
        let mut connection = None;
        let mut retry = RETRY_MIN;
        while !pool.is_closed() {
            let asked = timeout(PATIENCE, ask(&options, &mut connection)).await;
            let fault = match asked {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_late) => Some(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            let is_away = fault.is_some();
            if is_away {
                connection = None;
            }
            self.note(fault.map(Into::into));
            let pause = if is_away { retry } else { PERIOD };
            retry = if is_away { (retry * 2).min(PERIOD) } else { RETRY_MIN };
            tokio::select! {
                () = pool.close_event() => break,
                () = tokio::time::sleep(pause) => {}
                () = self.doubted.notified(), if !is_away => {}
            }
        }
    }

    /// It is away for this reason, or there.
    pub(super) fn note(&self, fault: Option<Arc<str>>) {
        let before = self.away.borrow().clone();
        // Else everybody who waits would be woken by every answer.
        if before.is_some() != fault.is_some() {
            self.away.send_replace(fault.clone());
        }
        let mut last_away = self.last_away.lock().unwrap_or_else(PoisonError::into_inner);
        match (&before, &fault) {
            (None, Some(reason)) => tracing::error!(%reason, "the database is away: new work is refused until it is back"),
            (Some(_), None) => tracing::info!("the database is back"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        if before.is_some() || fault.is_some() {
            *last_away = Some(Instant::now());
        }
    }
}

/// By the connection that there is; if that is broken, by a new one: an administrator may have ended it.
async fn ask(options: &PgConnectOptions, connection: &mut Option<PgConnection>) -> Result<(), sqlx::Error> {
    if let Some(mut held) = connection.take()
        && held.ping().await.is_ok()
    {
        *connection = Some(held);
        return Ok(());
    }
    match PgConnection::connect_with(options).await {
        Ok(new) => {
            *connection = Some(new);
            Ok(())
        }
        // All its connections are in use, which is an answer.
        Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code == "53300") => Ok(()),
        Err(error) => Err(error),
    }
}
