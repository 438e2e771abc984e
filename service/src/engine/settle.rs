//! The end of a sandbox: stored first, then told, then forgotten by the keeper.

use std::{sync::Arc, time::Duration};

use prometheus::IntGauge;
use sandbox_core::{
    fail_point,
    protocol::{Cause, Ending, OutputPolicy, Usage},
};
use time::OffsetDateTime;
use tracing::Instrument as _;

use super::{Engine, Finished, Progress, carry::span_of, lease::LEFT_TO_OTHERS, live::Live};
use crate::{
    clock::at_us,
    sandbox::{Finish, Kind, Limits, LogTail, Phases, Records, RequestedLimits, Sandbox, SandboxId, State},
    store::{Ended, HeldKey, Hold, Lease, LogKept, Return, StoreError, Whereabouts, Writer},
    telemetry::{self, TRACE},
};

/// How long the whole log of a run is kept when it does not fit beside the outcome.
const RUN_LOG_RETENTION: Duration = Duration::from_secs(3600);
/// Between two attempts to store an outcome: first this, then doubled up to the other.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often a log that cannot be read is tried, with the same pauses, before its sandbox's end is stored without it.
const READ_ATTEMPTS: u32 = 10;

/// What is left of a sandbox once its attempt is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    Nothing,
    /// It waits for another attempt, here or on another node, and so do those who wait for it.
    Waits,
}

/// Counts as one whose end is not stored, until it is dropped.
pub(super) struct Waiting<'a>(&'a IntGauge);

impl<'a> Waiting<'a> {
    pub(super) fn new(count: &'a IntGauge) -> Self {
        count.inc();
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Engine {
    /// Stores the end, however long that takes — the keeper has the record until then — and tells everyone who waits. What this machine failed
    /// goes back into the queue instead, if it may be tried again.
    pub(super) async fn settle(self: &Arc<Self>, live: &Arc<Live>, ending: &Ending) -> After {
        if let Cause::InfraError { message } = &ending.cause
            && live.sandbox.kind == Kind::Run
            && live.sandbox.retries_left > 0
            && live.ordered_kill().is_none()
        {
            // First: the next attempt has the same names. Should we die in between, its row says that it is live and the keeper knows it
            // not, which is such a failure again.
            self.forget(live.sandbox.id).await;
            return self.give_back(live, Return::Failed { message, until: self.clock.now() + LEFT_TO_OTHERS }).await;
        }
        self.store_and_tell(live, ending).await
    }

    async fn store_and_tell(self: &Arc<Self>, live: &Arc<Live>, ending: &Ending) -> After {
        // What was known before its keeper was lost is true all the same.
        let mut ending = Ending { launched: ending.launched.or_else(|| live.launched()), ..ending.clone() };
        // What it did before it was asked for is its pool's.
        ending.usage.wall_us = ending.usage.wall_us.saturating_sub(live.sandbox.waited_ms().saturating_mul(1000));
        let mut finish = Finish::of(&ending, &live.limits(), phases(live, at_us(ending.ended_at_us)));
        if live.sandbox.from_pool.is_some() && live.sandbox.starts == 1 {
            finish.outcome.phases_ms.launch = 0.0;
        }
        let judged = live.judged();
        if let Some(judged) = &judged {
            finish = finish.judged(judged);
        }
        let compiled = live.compiled();
        if let Some((step, used)) = &compiled {
            finish = finish.behind(step, used);
        }
        let id = live.sandbox.id;
        if let Some(launched) = ending.launched {
            telemetry::past("run", at_us(launched.started_at_us), at_us(ending.ended_at_us));
        }
        fail_point::reached("service.settle.heard");
        let read = self.read_tail(id, Records::Numbered).await;
        let is_whole = read.as_ref().is_some_and(LogTail::is_complete);
        let mut log_tail = read.unwrap_or_else(|| unread(&live.sandbox, &ending.usage));
        let last_words = (live.sandbox.kind == Kind::Pooled).then(|| std::mem::take(&mut log_tail));
        let log_file = match live.sandbox.kind {
            _ if is_whole || live.sandbox.auto_remove => LogKept::No,
            Kind::Run => LogKept::Until(finish.finished_at + RUN_LOG_RETENTION),
            Kind::Sandbox => LogKept::UntilDeleted,
            // Nobody could read it.
            Kind::Pooled => LogKept::No,
        };
        let compile = compiled.as_ref().map(|(step, _)| step);
        let ended =
            Ended { finish: &finish, log_tail: &log_tail, compile, case_bytes: judged.map_or(0, |judged| judged.stored_bytes), log_file };
        fail_point::reached("service.settle.read");
        let stored = self.until_clear(live, |hold| self.store.finish(id, Writer::Holder(hold), &ended));
        if !stored.instrument(tracing::debug_span!(target: TRACE, "store")).await {
            return self.leave_to_others(live).await;
        }
        fail_point::reached("service.settle.stored");
        self.metrics.ended(&live.sandbox, &finish.outcome);
        let outcome = last_words.as_ref().map(|_| finish.outcome.clone());
        live.ended(finished(&live.now(), finish, log_tail));
        self.live.remove_current(live);
        fail_point::reached("service.settle.told");
        if let Some((last_words, outcome)) = last_words.zip(outcome) {
            self.member_ended(live, &outcome, &last_words).await;
        } else if live.sandbox.auto_remove {
            self.remove_ended(&live.sandbox.tenant, id).await;
            fail_point::reached("service.settle.removed");
        }
        match log_file {
            LogKept::No => {
                if !self.forget(id).await {
                    tokio::spawn(Arc::clone(self).forget_log(id));
                }
            }
            LogKept::Until(_) | LogKept::UntilDeleted => self.forget_record(id).await,
        }
        self.clear_parts_of(live).await;
        fail_point::reached("service.settle.forgotten");
        After::Nothing
    }

    /// Puts it back into the queue, however long that takes.
    pub(super) async fn give_back(&self, live: &Arc<Live>, why: Return<'_>) -> After {
        let id = live.sandbox.id;
        // Whoever has it next compiles anew, and begins the next case.
        self.clear_parts_of(live).await;
        if !self.until_clear(live, |hold| self.store.give_back(id, hold, why, self.clock.now())).await {
            return self.leave_to_others(live).await;
        }
        fail_point::reached("service.settle.returned");
        self.live.give_back(live);
        self.note_queue();
        After::Waits
    }

    /// Tries until the database has answered. False: it was not ours to say.
    pub(super) async fn until_clear<F>(&self, live: &Arc<Live>, write: impl Fn(Hold) -> F) -> bool
    where
        F: Future<Output = Result<bool, StoreError>>,
    {
        let _waiting = Waiting::new(&self.metrics.records_waiting);
        let id = live.sandbox.id;
        let mut pause = RETRY_MIN;
        loop {
            let written = match write(live.hold()).await {
                Ok(true) => return true,
                // This node may have lost its lease and taken it again, and the sandbox with it.
                Ok(false) => match self.is_ours_again(live).await {
                    Ok(true) => continue,
                    Ok(false) => return false,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            tracing::error!(sandbox.id = %id, error = %written, "storing what became of it failed; it is tried again");
            self.metrics.store_retries.inc();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Whether the sandbox was taken over by this node under a lease that its follower did not know yet.
    pub(super) async fn is_ours_again(&self, live: &Arc<Live>) -> Result<bool, StoreError> {
        let Some(Whereabouts { state, hold: Some(now) }) = self.store.whereabouts(live.sandbox.id).await? else { return Ok(false) };
        let held = live.hold();
        // The data folder is locked: whoever took this node is this process.
        let is_ours = !state.is_final() && now.claims == held.claims && now.lease.node == self.node && now.lease.epoch > held.lease.epoch;
        if is_ours {
            live.take_over(now.lease);
        }
        Ok(is_ours)
    }

    /// Its row is somebody else's, or says already how it ended: what we have of it is dropped, and who waits for it here hears of that end.
    pub(super) async fn leave_to_others(&self, live: &Arc<Live>) -> After {
        let id = live.sandbox.id;
        if !self.live.is_current(live) {
            return After::Nothing;
        }
        let log = self.until_heard(id, || self.store.find_log(id)).await;
        match log {
            // Stored by ourselves, it may be: the answer to that was lost.
            Some(stored) if stored.has_file => self.forget_record(id).await,
            Some(_) | None => drop(self.forget(id).await),
        }
        self.clear_parts_of(live).await;
        let ended = self.until_heard(id, || self.store.ended_of(std::slice::from_ref(&live.sandbox.id))).await;
        match ended.into_iter().next() {
            Some((sandbox, log_tail)) => {
                live.ended(Finished { sandbox, log_tail });
                After::Nothing
            }
            // Never promised to anybody, and lost by a crash of the database; or deleted through another node.
            None if !self.until_heard(id, || self.store.absent_of(std::slice::from_ref(&live.sandbox.id))).await.is_empty() => {
                self.live.remove_current(live);
                After::Nothing
            }
            None if self.live.give_back(live) => After::Waits,
            None => After::Nothing,
        }
    }

    /// Asks until the database answers.
    pub(super) async fn until_heard<T, F>(&self, id: SandboxId, ask: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut pause = RETRY_MIN;
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(error) => tracing::error!(sandbox.id = %id, %error, "asking what became of it failed; it is asked again"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Tells who waits here for sandboxes that others carried to their end.
    pub(super) async fn notice_ends(&self) -> Result<(), StoreError> {
        let queued = self.live.all().into_iter().filter(|live| matches!(live.progress(), Progress::Queued)).map(|live| live.sandbox.id);
        // One that is just being made has no row yet, and may have one a moment after it was looked for: that it is being made is asked before.
        let waiting: Vec<SandboxId> = queued.filter(|id| !self.undecided.contains(*id)).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        self.tell_ends(self.store.ended_of(&waiting).await?);
        // Deleted through another node.
        for id in self.store.absent_of(&waiting).await? {
            self.live.remove(id);
        }
        Ok(())
    }

    fn tell_ends(&self, ended: Vec<(Sandbox, LogTail)>) {
        for (sandbox, log_tail) in ended {
            let id = sandbox.id;
            if let Some(live) = self.live.get(id).filter(|live| matches!(live.progress(), Progress::Queued)) {
                live.ended(Finished { sandbox, log_tail });
                self.live.remove(id);
            }
        }
    }

    /// [`Engine::settle`] of a sandbox that nobody follows, in a task of its own.
    pub(super) fn settle_alone(self: &Arc<Self>, live: Arc<Live>, ending: Box<Ending>) {
        let engine = Arc::clone(self);
        let span = span_of(&live);
        let settled = async move {
            let known = engine.live.known(Arc::clone(&live));
            // It may have been begun before, and have come back to the queue since.
            engine.recall_cases(&live).await;
            if engine.settle(&live, &ending).await == After::Waits {
                known.keep();
            }
        };
        tokio::spawn(settled.instrument(span));
    }

    /// Ends a sandbox whose insertion may have been committed or not: whoever asked for it was told that it was not made, and may ask again
    /// with the same key.
    pub(super) fn settle_unclear(self: &Arc<Self>, sandbox: Sandbox, lease: Lease, key: Option<HeldKey>) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let now = engine.clock.now();
            let total = Phases::ms((now - sandbox.created_at).unsigned_abs());
            let cause = Cause::InfraError { message: "the connection to the database broke while it was made".to_owned() };
            let finish = Finish::without_usage(cause, now, &sandbox.limits, Phases { total, ..Phases::default() });
            let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
            let hold = Hold { lease, claims: sandbox.claims };
            let writer = if sandbox.state == State::Queued { Writer::Queue } else { Writer::Holder(hold) };
            if engine.store_end(sandbox.id, writer, &ended).await {
                engine.metrics.ended(&sandbox, &finish.outcome);
            }
            // Whoever asked may ask for it again by the same name.
            if let Err(error) = engine.store.free_name_of(sandbox.id, sandbox.claims).await {
                tracing::warn!(sandbox.id = %sandbox.id, %error, "its name is not free");
            }
            if let Some(key) = key
                && let Err(error) = engine.store.free_key_of(&key, sandbox.id, sandbox.claims).await
            {
                tracing::warn!(sandbox.id = %sandbox.id, %error, "its key is not free; who asks again hears of this end");
            }
            engine.undecided.remove(sandbox.id);
        });
    }

    /// The end of its log; `None` if that stays unreadable.
    pub(super) async fn read_tail(&self, id: SandboxId, records: Records) -> Option<LogTail> {
        let mut pause = RETRY_MIN;
        for _ in 0..READ_ATTEMPTS {
            match self.logs.tail(id, LogTail::STORED_BYTES, records).await {
                Ok(tail) => return Some(tail),
                Err(error) => tracing::error!(sandbox.id = %id, %error, "reading its log failed"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
        tracing::error!(sandbox.id = %id, "its end is stored without its log, which stays where it is");
        None
    }

    /// Stores and tells the end of a sandbox that is in the queue.
    pub(super) async fn settle_queued(self: &Arc<Self>, sandbox: &Sandbox, finish: Finish) {
        // It may have been begun before, and have come back.
        let (finish, case_bytes) = match self.behind_cases(sandbox, finish).await {
            Ok(behind) => behind,
            Err(error) => {
                tracing::warn!(sandbox.id = %sandbox.id, %error, "its cases cannot be read; the next look tries again");
                return;
            }
        };
        let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes, log_file: LogKept::No };
        match self.store.finish(sandbox.id, Writer::Queue, &ended).await {
            Ok(true) => {
                self.metrics.ended(sandbox, &finish.outcome);
                if let Some(live) = self.live.get(sandbox.id) {
                    live.ended(finished(sandbox, finish, LogTail::default()));
                    self.live.remove(sandbox.id);
                }
                if sandbox.auto_remove {
                    self.remove_ended(&sandbox.tenant, sandbox.id).await;
                }
            }
            // Claimed in the meantime.
            Ok(false) => {}
            Err(error) => tracing::warn!(sandbox.id = %sandbox.id, %error, "its end could not be stored; the next look tries again"),
        }
    }

    /// Stores and tells the end of a sandbox whose row cannot be read.
    pub(super) async fn settle_damaged(&self, id: SandboxId, writer: Writer, fault: &StoreError) -> Result<(), StoreError> {
        tracing::error!(sandbox.id = %id, %fault, "a sandbox that cannot be read is ended");
        let cause = Cause::InfraError { message: fault.to_string() };
        // Its own cannot be read; of them only the outcome's message would speak, which says something else.
        let limits = Limits::of(Kind::Run, RequestedLimits::default()).expect("defaults are within their bounds");
        let finish = Finish::without_usage(cause, self.clock.now(), &limits, Phases::default());
        let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
        if self.store.finish(id, writer, &ended).await?
            && let Some(live) = self.live.get(id)
        {
            self.metrics.ended(&live.sandbox, &finish.outcome);
            live.ended(finished(&live.sandbox, finish, LogTail::default()));
            self.live.remove(id);
        }
        Ok(())
    }

    /// Tries until it works. False: it was stored before.
    async fn store_end(&self, id: SandboxId, writer: Writer, ended: &Ended<'_>) -> bool {
        let mut pause = RETRY_MIN;
        loop {
            match self.store.finish(id, writer, ended).await {
                Ok(is_first) => return is_first,
                Err(error) => tracing::error!(sandbox.id = %id, %error, "storing its end failed; it is tried again"),
            }
            self.metrics.store_retries.inc();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}

/// What stands for a log that cannot be read: nothing of it, and all that it must hold as omitted.
fn unread(sandbox: &Sandbox, usage: &Usage) -> LogTail {
    let kept = |written: u64| match sandbox.output_policy {
        OutputPolicy::Truncate | OutputPolicy::Kill => written.min(sandbox.limits.output_bytes()),
        OutputPolicy::Discard => 0,
    };
    LogTail { bytes: vec![], stdout_omitted_bytes: kept(usage.stdout_bytes), stderr_omitted_bytes: kept(usage.stderr_bytes) }
}

/// Where the time of this sandbox went, as far as the service knows.
pub(super) fn phases(live: &Live, ended_at: OffsetDateTime) -> Phases {
    let Sandbox { created_at, claimed_at, .. } = live.sandbox;
    let since_created = |at: OffsetDateTime| Duration::try_from(at - created_at).unwrap_or(Duration::ZERO);
    Phases {
        queue: Phases::ms(claimed_at.map_or(Duration::ZERO, since_created).saturating_sub(live.image_took)),
        image: Phases::ms(live.image_took),
        launch: 0.0,
        total: Phases::ms(since_created(ended_at)),
    }
}

fn finished(sandbox: &Sandbox, finish: Finish, log_tail: LogTail) -> Finished {
    let sandbox = Sandbox {
        state: finish.state,
        started_at: finish.started_at.or(sandbox.started_at),
        fences: finish.fences.or(sandbox.fences),
        finished_at: Some(finish.finished_at),
        outcome: Some(finish.outcome),
        ..sandbox.clone()
    };
    Finished { sandbox, log_tail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sandbox_for_tests;

    #[test]
    fn a_log_that_cannot_be_read_is_omitted_not_empty() {
        let sandbox = sandbox_for_tests("acme", Kind::Run, None);
        let written = sandbox.limits.output_bytes() + 1;
        let tail = unread(&sandbox, &Usage { stdout_bytes: written, stderr_bytes: 7, ..Usage::default() });
        assert!(!tail.is_complete());
        assert_eq!((tail.stdout_omitted_bytes, tail.stderr_omitted_bytes), (sandbox.limits.output_bytes(), 7));
    }

    #[test]
    fn a_log_that_was_discarded_omits_nothing() {
        let sandbox = Sandbox { output_policy: OutputPolicy::Discard, ..sandbox_for_tests("acme", Kind::Run, None) };
        assert!(unread(&sandbox, &Usage { stdout_bytes: 7, ..Usage::default() }).is_complete());
    }
}
