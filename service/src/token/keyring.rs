//! All keys that prove tokens: fixed ones, and sets that are followed as their issuers change them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, Semaphore, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{
    key::{Key, Signed},
    source::Source,
};

/// From the end of a load to one that a token caused: tokens with made-up ids cause no more than this.
const LOAD_GAP: Duration = Duration::from_secs(5);
/// After a load that failed. It doubles with each further one, up to the time between loads that succeed.
const RETRY: Duration = Duration::from_secs(5);
/// How long a token with an unknown id is kept waiting: for a load that goes on, for the gap's end, and for a load.
const KEY_PATIENCE: Duration = Duration::from_secs(16);
/// How many tokens wait so at one time; one more is refused at once.
const WAITING_MAX: usize = 256;

/// The keys in force.
#[derive(Debug)]
pub struct Keyring {
    fixed: Vec<Key>,
    followed: Vec<Arc<Followed>>,
    followers: Vec<JoinHandle<()>>,
    waiting: Semaphore,
}

/// How old a followed set is, and how following it went.
#[derive(Debug, Clone, Copy)]
pub struct Freshness {
    /// `file` or `url`.
    pub source: &'static str,
    /// `None`: it never was loaded.
    pub age: Option<Duration>,
    pub loads: u64,
    pub failures: u64,
}

/// A set that one task loads and others read.
#[derive(Debug)]
struct Followed {
    source: Source,
    refresh: Duration,
    state: watch::Sender<State>,
    /// Somebody wants a load that begins after now.
    wanted: Notify,
}

#[derive(Debug, Clone, Default)]
struct State {
    keys: Arc<[Key]>,
    loaded_at: Option<Instant>,
    /// Loads that were begun, and how many of them ended so or so. They follow one another.
    begun: u64,
    loads: u64,
    failures: u64,
}

impl Keyring {
    /// Keys that never change.
    pub fn fixed(keys: Vec<Key>) -> Self {
        Self { fixed: keys, followed: Vec::new(), followers: Vec::new(), waiting: Semaphore::new(WAITING_MAX) }
    }

    /// With sets that are loaded now and then every `refresh`, in the background. Fails if a file cannot be loaded now; an issuer that does not
    /// answer is asked again and again.
    pub async fn follow(fixed: Vec<Key>, sources: Vec<Source>, refresh: Duration) -> anyhow::Result<Self> {
        let mut keyring = Self::fixed(fixed);
        for source in sources {
            let is_file = matches!(source, Source::File(_));
            let followed = Arc::new(Followed { source, refresh, state: watch::Sender::default(), wanted: Notify::new() });
            let loaded = followed.load().await;
            match loaded {
                Err(error) if is_file => return Err(error),
                Err(error) => tracing::warn!("no keys for tokens yet, going on without: {error:#}"),
                Ok(()) => {}
            }
            keyring.followers.push(tokio::spawn(Arc::clone(&followed).keep_loading()));
            keyring.followed.push(followed);
        }
        Ok(keyring)
    }

    /// Whether one of the keys that may prove this token does.
    pub(super) async fn proves(&self, token: &Signed<'_>) -> bool {
        match self.known(token) {
            Some(is_proven) => is_proven,
            None => self.wait_for_key(token).await && self.known(token).unwrap_or(false),
        }
    }

    /// `None`: no key that is known here has the token's id, but one may come.
    fn known(&self, token: &Signed<'_>) -> Option<bool> {
        let sets: Vec<_> = self.followed.iter().map(|followed| Arc::clone(&followed.state.borrow().keys)).collect();
        let mut keys = self.fixed.iter().chain(sets.iter().flat_map(|set| set.iter()));
        let is_nameless = |key: &Key| key.id.is_none();
        let Some(kid) = &token.kid else {
            return Some(keys.any(|key| is_nameless(key) && key.proves(token)));
        };
        let mut is_known = false;
        let is_proven = keys.any(|key| {
            let is_named = key.id.as_ref().is_some_and(|id| id.as_str() == kid);
            is_known |= is_named;
            (is_named || is_nameless(key)) && key.proves(token)
        });
        (is_proven || is_known || self.followed.is_empty()).then_some(is_proven)
    }

    /// Until a key of the token's id is there, or is not after a load that began later than this: false. One load is for all who wait.
    async fn wait_for_key(&self, token: &Signed<'_>) -> bool {
        let Ok(_place) = self.waiting.try_acquire() else { return false };
        let Some(kid) = &token.kid else { return false };
        let found = self.followed.iter().map(|followed| Box::pin(async { if followed.find(kid).await { Ok(()) } else { Err(()) } }));
        let any = futures_util::future::select_ok(found);
        timeout(KEY_PATIENCE, any).await.is_ok_and(|found| found.is_ok())
    }

    /// How old each followed set is.
    pub(super) fn freshness(&self) -> Vec<Freshness> {
        let of = |followed: &Arc<Followed>| {
            let State { loaded_at, loads, failures, .. } = *followed.state.borrow();
            Freshness { source: followed.source.kind(), age: loaded_at.map(|at| at.elapsed()), loads, failures }
        };
        self.followed.iter().map(of).collect()
    }
}

impl Drop for Keyring {
    fn drop(&mut self) {
        self.followers.iter().for_each(JoinHandle::abort);
    }
}

impl State {
    fn has(&self, kid: &str) -> bool {
        self.keys.iter().any(|key| key.id.as_ref().is_some_and(|id| id.as_str() == kid))
    }

    const fn ended(&self) -> u64 {
        self.loads + self.failures
    }
}

impl Followed {
    /// Loads once. What was loaded before stays if that fails.
    async fn load(&self) -> anyhow::Result<()> {
        self.state.send_modify(|state| state.begun += 1);
        let loaded = self.source.load().await;
        let (keys, result) = match loaded {
            Ok(keys) => (Some(keys), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.state.send_modify(|state| match keys {
            Some(keys) => {
                state.keys = keys.into();
                state.loaded_at = Some(Instant::now());
                state.loads += 1;
            }
            None => state.failures += 1,
        });
        result
    }

    async fn keep_loading(self: Arc<Self>) {
        let mut pause = if self.state.borrow().failures == 0 { self.refresh } else { RETRY };
        loop {
            let ended_at = tokio::time::Instant::now();
            // A wish that comes within the gap waits for its end.
            let wished = async {
                self.wanted.notified().await;
                tokio::time::sleep_until(ended_at + LOAD_GAP).await;
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = wished => {}
            }
            match self.load().await {
                Ok(()) => pause = self.refresh,
                Err(error) => {
                    let age_s = self.state.borrow().loaded_at.map(|at| at.elapsed().as_secs());
                    tracing::warn!(
                        jwks.source = self.source.kind(),
                        jwks.age_s = age_s,
                        "the keys for tokens stay as they were: {error:#}"
                    );
                    pause = if pause >= self.refresh { RETRY } else { pause * 2 }.min(self.refresh);
                }
            }
        }
    }

    /// Whether a key of this id is there, or after a load that began later than this.
    async fn find(&self, kid: &str) -> bool {
        let mut state = self.state.subscribe();
        let begun = state.borrow().begun;
        self.wanted.notify_one();
        let settled = state.wait_for(|state| state.has(kid) || state.ended() > begun).await;
        settled.is_ok_and(|state| state.has(kid))
    }
}

#[cfg(test)]
mod tests;
