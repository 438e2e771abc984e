//! What other processes say over the database: hints that something is worth a look. One connection hears them all.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::PgListener;
use tokio::{sync::Notify, task::JoinHandle};

use super::{Store, StoreError, events, queue};

/// Ears on the database. What is heard of the queue is told by these, what is heard of events by [`Store::events_came`].
#[derive(Debug)]
pub struct Ears {
    came: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Store {
    /// Listens from now on: to work that others put into the queue, and to events. Hints only: a message can be lost, so poll as well.
    pub async fn listen(&self) -> Result<Ears, StoreError> {
        let listener = self.pool.in_time(listener(self)).await?;
        let came = Arc::new(Notify::new());
        let task = tokio::spawn(listen(self.clone(), listener, Arc::clone(&came)));
        Ok(Ears { came, task })
    }
}

impl Ears {
    /// Returns when something may have come into the queue. A lost connection counts as such, and is made again by itself.
    pub async fn heard(&mut self) {
        self.came.notified().await;
    }
}

impl Drop for Ears {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listener(store: &Store) -> Result<PgListener, StoreError> {
    let mut listener = PgListener::connect_with(&store.pool).await?;
    listener.listen_all([queue::CHANNEL, events::CHANNEL]).await?;
    Ok(listener)
}

/// Listens for good, in a task of its own: a listener that is given up in the middle of connecting leaves a connection in the pool on which
/// messages come that no statement expects.
async fn listen(store: Store, mut ears: PgListener, came: Arc<Notify>) {
    /// Between two attempts to reach a database that is away.
    const RETRY: Duration = Duration::from_secs(1);
    loop {
        let heard = ears.try_recv().await;
        let channel = heard.as_ref().ok().and_then(Option::as_ref).map(|message| message.channel().to_owned());
        if channel.as_deref() != Some(events::CHANNEL) {
            came.notify_one();
        }
        if channel.as_deref() != Some(queue::CHANNEL) {
            store.pool.came().notify_one();
        }
        let Err(error) = heard else { continue };
        tracing::debug!(%error, "listening to other nodes failed");
        ears = loop {
            tokio::time::sleep(RETRY).await;
            match listener(&store).await {
                Ok(ears) => break ears,
                Err(error) => tracing::debug!(%error, "listening to other nodes failed"),
            }
        };
    }
}
