//! Watching one sandbox: its progress, and its log to the end.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{Engine, EngineError, ExecProgress, Finished, Progress, live::Live};
use crate::{
    logs::{Beginning, LogItem, LogReader, Wanted, last_lines_of},
    sandbox::{Exec, Outcome, Sandbox, SandboxId, TenantId},
};

/// A sandbox of this process, watched.
#[derive(Debug)]
pub struct Followed {
    live: Arc<Live>,
    progress: watch::Receiver<Progress>,
}

impl Followed {
    pub(super) fn new(live: Arc<Live>) -> Self {
        Self { progress: live.subscribe(), live }
    }

    pub fn id(&self) -> SandboxId {
        self.live.sandbox.id
    }

    /// Whether its row is known to be there, and on disk.
    pub(super) fn is_kept(&self) -> bool {
        self.live.keeping().load(Ordering::Relaxed) && !matches!(self.live.progress(), Progress::Gone)
    }

    /// The sandbox as it is now.
    pub fn sandbox(&self) -> Sandbox {
        self.live.now()
    }

    /// Returns when its progress is one of those.
    pub async fn until(&mut self, is_reached: impl Fn(&Progress) -> bool) -> Progress {
        match self.progress.wait_for(is_reached).await {
            Ok(progress) => progress.clone(),
            Err(_no_more_news) => Progress::Gone,
        }
    }

    /// Returns when its end is stored; `None` if it was deleted before it began.
    pub async fn ended(&mut self) -> Option<Arc<Finished>> {
        match self.until(|progress| matches!(progress, Progress::Ended(_) | Progress::Gone)).await {
            Progress::Ended(finished) => Some(finished),
            Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) | Progress::Gone => None,
        }
    }
}

/// What a log shows next.
#[derive(Debug, Clone, PartialEq)]
pub enum Followup {
    Item(LogItem),
    /// The last: how it ended.
    End(Box<Outcome>),
}

/// What a reader wants of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogQuery {
    pub wanted: Wanted,
    /// Of what there is when the reading begins, no more than so many lines.
    pub last_lines: Option<usize>,
    /// To the end, or as far as it is written.
    pub is_following: bool,
}

/// The log of one sandbox, as far as it is wanted.
#[derive(Debug)]
pub struct LogStream {
    engine: Arc<Engine>,
    tenant: TenantId,
    id: SandboxId,
    query: LogQuery,
    /// The sequence number to go on at.
    from: u64,
    /// Of a chunk that is wanted in part: from which byte on.
    begins_within: Option<Beginning>,
    /// The attempt whose log is read: each writes its own, from the beginning.
    claims: u64,
    source: Source,
    reader: Option<LogReader>,
    ready: VecDeque<Followup>,
    is_over: bool,
}

impl Engine {
    /// The tenant's sandbox once it is so, or as it is when the patience is over or the service stops; `None` if there is none. For one that
    /// somebody else made: another process, or another node.
    pub async fn wait_until(
        &self,
        tenant: &TenantId,
        id: SandboxId,
        patience: Duration,
        is_so: impl Fn(&Sandbox) -> bool,
    ) -> Result<Option<Sandbox>, EngineError> {
        /// Between two looks at a row that others change.
        const LOOK: Duration = Duration::from_millis(200);
        let deadline = Instant::now() + patience;
        loop {
            // Before the look, so that what changes after it is heard.
            let progress = self.live.get(id).map(|live| live.subscribe());
            let Some(sandbox) = self.find_any(tenant, id).await? else { return Ok(None) };
            if is_so(&sandbox) || Instant::now() >= deadline || self.stopping.is_cancelled() {
                return Ok(Some(sandbox));
            }
            let look_at = deadline.min(Instant::now() + LOOK);
            match progress {
                Some(mut progress) => drop(tokio::time::timeout_at(look_at, progress.changed()).await),
                None => tokio::time::sleep_until(look_at).await,
            }
        }
    }

    /// What is wanted of the log of this sandbox.
    pub fn read_log(self: &Arc<Self>, sandbox: &Sandbox, query: LogQuery) -> LogStream {
        LogStream {
            engine: Arc::clone(self),
            tenant: sandbox.tenant.clone(),
            id: sandbox.id,
            query,
            from: query.wanted.from,
            begins_within: None,
            claims: self.live.get(sandbox.id).map_or(sandbox.claims, |live| live.sandbox.claims),
            source: Source::Sandbox(self.live.get(sandbox.id).map(|live| live.subscribe())),
            reader: None,
            ready: VecDeque::new(),
            is_over: false,
        }
    }

    /// What is wanted of the log of this exec.
    pub fn read_exec_log(self: &Arc<Self>, exec: &Exec, query: LogQuery) -> LogStream {
        LogStream {
            engine: Arc::clone(self),
            tenant: exec.tenant.clone(),
            id: exec.id,
            query,
            from: query.wanted.from,
            begins_within: None,
            claims: 0,
            source: Source::Exec(self.execs.get(exec.id).map(|live| live.subscribe())),
            reader: None,
            ready: VecDeque::new(),
            is_over: false,
        }
    }
}

/// Whose log it is, and how to hear of its end; with `None` from its row alone.
#[derive(Debug)]
enum Source {
    Sandbox(Option<watch::Receiver<Progress>>),
    Exec(Option<watch::Receiver<ExecProgress>>),
}

/// What to do when there is nothing to show.
enum Idle {
    /// It ended like this.
    Ended(Box<Outcome>),
    /// Nothing will come.
    Over,
    Wait,
}

impl LogStream {
    /// What comes next; `None` after the last. May be given up and called again.
    pub async fn next(&mut self) -> Result<Option<Followup>, EngineError> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                return Ok(Some(next));
            }
            if self.is_over {
                return Ok(None);
            }
            self.turn_to_the_attempt_that_is_made_now();
            // Asked before the file is read: what was written before the end was seen is then in the file.
            let idle = self.look().await?;
            self.fill(matches!(idle, Idle::Ended(_))).await?;
            if !self.ready.is_empty() {
                continue;
            }
            match idle {
                Idle::Ended(outcome) => {
                    self.is_over = true;
                    return Ok(Some(Followup::End(outcome)));
                }
                Idle::Over => self.is_over = true,
                Idle::Wait => self.more().await,
            }
        }
    }

    /// A sandbox that is tried again begins its log anew.
    fn turn_to_the_attempt_that_is_made_now(&mut self) {
        if let Some(live) = self.engine.live.get(self.id)
            && live.sandbox.claims > self.claims
        {
            // One that is claimed for the first time had none before.
            if self.claims > 0 {
                (self.reader, self.from, self.begins_within) = (None, 0, None);
                self.query.wanted.from = 0;
            }
            self.claims = live.sandbox.claims;
        }
    }

    async fn look(&mut self) -> Result<Idle, EngineError> {
        let ended = match &mut self.source {
            Source::Sandbox(Some(progress)) => match progress.borrow_and_update().clone() {
                Progress::Ended(finished) => Some(finished.sandbox.outcome.clone()),
                Progress::Gone => Some(None),
                Progress::Queued | Progress::Starting | Progress::Running(_) | Progress::Paused(_) => None,
            },
            Source::Exec(Some(progress)) => match progress.borrow_and_update().clone() {
                ExecProgress::Ended(finished) => Some(finished.exec.outcome.clone()),
                ExecProgress::Gone => Some(None),
                ExecProgress::Starting | ExecProgress::Running(_) => None,
            },
            Source::Sandbox(None) => {
                let sandbox = self.engine.store.find(&self.tenant, self.id).await?;
                sandbox.map_or(Some(None), |sandbox| sandbox.outcome.map(Some))
            }
            Source::Exec(None) => {
                let exec = self.engine.store.find_exec_anywhere(&self.tenant, self.id).await?;
                exec.map_or(Some(None), |exec| exec.outcome.map(Some))
            }
        };
        Ok(match ended {
            Some(Some(outcome)) => Idle::Ended(outcome.into()),
            Some(None) => Idle::Over,
            None => self.idle(),
        })
    }

    const fn idle(&self) -> Idle {
        if self.query.is_following { Idle::Wait } else { Idle::Over }
    }

    /// Takes in what the log has now.
    async fn fill(&mut self, has_ended: bool) -> Result<(), EngineError> {
        if self.reader.is_none() {
            if let Some(lines) = self.query.last_lines {
                let found = self.engine.logs.last_lines(self.id, lines, self.wanted()).await;
                if let Some(beginning) = found.map_err(|error| self.unreadable(error))? {
                    self.begin_at(beginning);
                }
            }
            self.reader = self.engine.logs.open(self.id, self.from).map_err(|error| self.unreadable(error))?;
        }
        loop {
            let items = match &mut self.reader {
                Some(reader) => {
                    let read = reader.read().await;
                    let items = read.map_err(|error| self.unreadable(error))?;
                    self.from = self.reader.as_ref().map_or(self.from, LogReader::next_seq);
                    items
                }
                // The whole log is gone with its file; what is stored beside the outcome is left.
                None if has_ended => self.stored().await?,
                None => vec![],
            };
            let is_all = items.is_empty();
            for _gap in items.iter().filter(|item| matches!(item, LogItem::Gap { .. })) {
                self.engine.metrics.log_gap();
            }
            let wanted: Vec<_> = items.into_iter().filter_map(|item| self.cut(item)).map(Followup::Item).collect();
            self.ready.extend(wanted);
            // What was read and is not wanted says nothing of what follows it.
            if is_all || !self.ready.is_empty() {
                return Ok(());
            }
        }
    }

    async fn stored(&mut self) -> Result<Vec<LogItem>, EngineError> {
        let stored = match self.source {
            Source::Sandbox(_) => self.engine.store.find_log(self.id).await?,
            Source::Exec(_) => self.engine.store.find_exec_log(self.id).await?,
        };
        let Some(stored) = stored else { return Ok(vec![]) };
        if let Some(lines) = self.query.last_lines {
            self.begin_at(last_lines_of(&stored.tail, lines, self.wanted()));
        }
        let items = LogItem::of_tail(&stored.tail, self.from);
        if let Some(LogItem::Chunk { seq, .. }) = items.last() {
            self.from = seq + 1;
        }
        Ok(items)
    }

    fn wanted(&self) -> Wanted {
        Wanted { from: self.from, ..self.query.wanted }
    }

    /// Only of what was there at first: all that comes is shown.
    fn begin_at(&mut self, beginning: Beginning) {
        (self.query.last_lines, self.from, self.begins_within) = (None, beginning.seq, Some(beginning));
    }

    /// What is wanted of it.
    fn cut(&self, item: LogItem) -> Option<LogItem> {
        let LogItem::Chunk { kind, seq, at_us, mut data } = item else { return Some(item) };
        if !self.query.wanted.holds(kind, seq, at_us) {
            return None;
        }
        if let Some(beginning) = self.begins_within.filter(|beginning| beginning.seq == seq) {
            data.drain(..beginning.byte.min(data.len()));
        }
        Some(LogItem::Chunk { kind, seq, at_us, data })
    }

    fn unreadable(&self, error: io::Error) -> EngineError {
        let error = anyhow::Error::new(error).context(format!("reading the log of {} failed", self.id));
        EngineError::Store(crate::store::StoreError::Other(error))
    }

    /// Returns when something may have changed.
    async fn more(&mut self) {
        /// Between two looks at a sandbox that this process does not follow, or that has no file yet.
        const LOOK: Duration = Duration::from_secs(1);
        let has_file = self.reader.is_some();
        let is_followed = !matches!(self.source, Source::Sandbox(None) | Source::Exec(None));
        let has_read_all = self.reader.as_ref().is_some_and(LogReader::has_ended);
        let written = async {
            match &mut self.reader {
                Some(reader) if !has_read_all => reader.changed().await,
                Some(_) | None => std::future::pending().await,
            }
        };
        let moved = async {
            let news = async {
                match &mut self.source {
                    Source::Sandbox(Some(progress)) => drop(progress.changed().await),
                    Source::Exec(Some(progress)) => drop(progress.changed().await),
                    Source::Sandbox(None) | Source::Exec(None) => std::future::pending().await,
                }
            };
            if has_file && is_followed {
                news.await;
            } else {
                drop(tokio::time::timeout(LOOK, news).await);
            }
        };
        tokio::select! {
            () = written => {}
            () = moved => {}
        }
    }
}
