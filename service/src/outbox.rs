//! Events as they come, on whichever node: one look at the table for all who follow here.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    sync::broadcast::{self, error::RecvError},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    sandbox::TenantId,
    store::{EventFilter, News, Position, Store, StoreError, Told},
};

/// Between two looks that nobody asked for: a message can be lost.
const POLL: Duration = Duration::from_secs(1);
/// The same while events stand behind a transaction that still runs.
const POLL_HELD_UP: Duration = Duration::from_millis(20);
/// Between two signs of life to a reader for whom nothing comes.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How long a reader is served: then it comes again, from where it was, with a token that still holds.
const STREAM_MAX: Duration = Duration::from_secs(3600);
/// Events that are read at a time.
const BATCH: u32 = 200;

/// Who tells readers that there is something to read.
#[derive(Debug)]
pub struct Outbox {
    store: Store,
    news: broadcast::Sender<Arc<News>>,
    stopping: CancellationToken,
}

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// With what comes from now on, and perhaps what came in the last moment: behind a transaction that still runs it waits for its turn.
    Now,
    Behind(Position),
}

/// A tenant's events in order, each once.
#[derive(Debug)]
pub struct EventStream {
    outbox: Arc<Outbox>,
    tenant: TenantId,
    filter: EventFilter,
    beginning: Option<Beginning>,
    at: Position,
    is_following: bool,
    news: broadcast::Receiver<Arc<News>>,
    ready: VecDeque<Told>,
    /// Whether there may be something that was not read.
    is_behind: bool,
    is_over: bool,
    until: Instant,
}

/// What an event stream says next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    Event(Box<Told>),
    /// What was between the beginning and this position is not kept any more.
    Gap(Position),
    /// Nothing came; everything up to here was said.
    Nothing(Position),
}

impl Outbox {
    /// Looks for events, and tells other nodes of this one's, until the service stops.
    pub fn start(store: Store, stopping: CancellationToken) -> Arc<Self> {
        let (news, _) = broadcast::channel(64);
        let outbox = Arc::new(Self { store, news, stopping });
        let (ringing, looking) = (Arc::clone(&outbox), Arc::clone(&outbox));
        tokio::spawn(async move { ringing.stopping.run_until_cancelled(ringing.store.ring()).await });
        tokio::spawn(async move { looking.stopping.run_until_cancelled(looking.look_out()).await });
        outbox
    }

    /// Is cancelled when the service stops.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// Hears of whatever comes from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<News>> {
        self.news.subscribe()
    }

    /// The tenant's events that the filter takes; with `is_following` for as long as the service runs, else those that are there now.
    pub fn follow(self: &Arc<Self>, tenant: TenantId, filter: EventFilter, beginning: Beginning, is_following: bool) -> EventStream {
        EventStream {
            // Before the first look, so that what comes after it is heard.
            news: self.subscribe(),
            outbox: Arc::clone(self),
            tenant,
            filter,
            beginning: Some(beginning),
            at: Position::OLDEST,
            is_following,
            ready: VecDeque::new(),
            is_behind: true,
            is_over: false,
            until: Instant::now() + STREAM_MAX,
        }
    }

    async fn look_out(&self) {
        let mut seen = None;
        let mut pause = POLL;
        loop {
            tokio::select! {
                () = self.store.events_came() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = POLL;
            if self.news.receiver_count() == 0 {
                seen = None;
                continue;
            }
            match self.news_behind(seen).await {
                Ok(news) => {
                    if news.is_held_up {
                        pause = POLL_HELD_UP;
                    }
                    // A crash of Postgres took back what nobody was told of, and its numbers come again.
                    let has_gone_back = seen.is_some_and(|seen| news.horizon < seen);
                    seen = (!has_gone_back).then_some(news.horizon);
                    if news.are_tenants_cut || !news.tenants.is_empty() {
                        // Nobody may be left to hear it.
                        drop(self.news.send(Arc::new(news)));
                    }
                }
                Err(error) => tracing::debug!(%error, "looking for events failed"),
            }
        }
    }

    /// Without a position: whoever subscribed before the first look may have missed anything, and what that was is not looked for in all that there is.
    async fn news_behind(&self, seen: Option<Position>) -> Result<News, StoreError> {
        match seen {
            Some(seen) => self.store.event_news(seen).await,
            None => Ok(News { horizon: self.store.event_horizon().await?, tenants: Vec::new(), are_tenants_cut: true, is_held_up: true }),
        }
    }
}

impl EventStream {
    /// Whose events.
    pub const fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    /// What comes next; `None` after the last. The first says where the stream begins. An error is for good.
    pub async fn next(&mut self) -> Result<Option<Next>, StoreError> {
        loop {
            if let Some(told) = self.ready.pop_front() {
                return Ok(Some(Next::Event(Box::new(told))));
            }
            if self.is_over {
                return Ok(None);
            }
            match self.look().await {
                Ok(Some(next)) => return Ok(Some(next)),
                Ok(None) => {}
                // It comes back, and what was written until then with it.
                Err(error @ (StoreError::Unreached(_) | StoreError::Unavailable(_))) if self.is_following => {
                    tracing::debug!(%error, "following events is held up");
                    tokio::time::sleep(POLL).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn look(&mut self) -> Result<Option<Next>, StoreError> {
        match self.beginning {
            Some(Beginning::Now) => self.at = self.outbox.store.event_horizon().await?,
            Some(Beginning::Behind(position)) => {
                self.at = position;
                let kept = self.outbox.store.kept_events().await?;
                // Who asks for the oldest asks for what there is.
                if position != Position::OLDEST && position < kept {
                    (self.at, self.beginning) = (kept, None);
                    return Ok(Some(Next::Gap(kept)));
                }
            }
            None if self.is_behind => {
                let followed = self.outbox.store.follow_events(&self.tenant, self.at, BATCH).await?;
                (self.at, self.is_behind) = (followed.next, followed.is_cut);
                self.ready.extend(followed.events.into_iter().filter(|told| self.filter.takes(told)));
                return Ok(None);
            }
            None if self.is_following => return Ok(self.wait().await),
            None => {
                self.is_over = true;
                return Ok(Some(Next::Nothing(self.at)));
            }
        }
        self.beginning = None;
        Ok(Some(Next::Nothing(self.at)))
    }

    /// Waits for something to read; `None`: there may be.
    async fn wait(&mut self) -> Option<Next> {
        let heartbeat = tokio::time::sleep(HEARTBEAT);
        tokio::pin!(heartbeat);
        loop {
            tokio::select! {
                news = self.news.recv() => match news {
                    Ok(news) if !news.are_tenants_cut && !news.tenants.contains(&self.tenant) => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => {
                        self.is_behind = true;
                        return None;
                    }
                    Err(RecvError::Closed) => self.is_over = true,
                },
                () = &mut heartbeat => {
                    // Others' transactions went on meanwhile: who comes again from here need not pass over what is not theirs.
                    self.is_behind = true;
                    return Some(Next::Nothing(self.at));
                }
                () = tokio::time::sleep_until(self.until) => self.is_over = true,
                () = self.outbox.stopping.cancelled() => self.is_over = true,
            }
            if self.is_over {
                return Some(Next::Nothing(self.at));
            }
        }
    }
}
