//! The end of a sandbox: stored first, then told, then forgotten by the keeper.

use std::{sync::Arc, time::Duration};

use sandbox_core::protocol::{Cause, Ending, OutputPolicy, Usage};
use time::OffsetDateTime;

use super::{Engine, Finished, live::Live};
use crate::{
    clock::at_us,
    sandbox::{Finish, Kind, LogTail, Phases, Sandbox, SandboxId, State},
    store::{Ended, LogKept},
};

/// How long the whole log of a run is kept when it does not fit beside the outcome.
const RUN_LOG_RETENTION: Duration = Duration::from_secs(3600);
/// Between two attempts to store an outcome: first this, then doubled up to the other.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often a log that cannot be read is tried, with the same pauses, before its sandbox's end is stored without it.
const READ_ATTEMPTS: u32 = 10;

impl Engine {
    /// Stores the end, however long that takes — the keeper has the record until then — and tells everyone who waits.
    pub(super) async fn settle(&self, live: &Live, ending: &Ending) {
        // What was known before its keeper was lost is true all the same.
        let ending = Ending { launched: ending.launched.or_else(|| live.launched()), ..ending.clone() };
        let finish = Finish::of(&ending, &live.sandbox.limits, phases(live, at_us(ending.ended_at_us)));
        let id = live.sandbox.id;
        let read = self.read_tail(id).await;
        let is_whole = read.as_ref().is_some_and(LogTail::is_complete);
        let log_tail = read.unwrap_or_else(|| unread(&live.sandbox, &ending.usage));
        let log_file = match live.sandbox.kind {
            _ if is_whole => LogKept::No,
            Kind::Run => LogKept::Until(finish.finished_at + RUN_LOG_RETENTION),
            Kind::Sandbox => LogKept::UntilDeleted,
        };
        let ended = Ended { finish: &finish, log_tail: &log_tail, log_file };
        if self.store_end(id, &[State::Starting, State::Running], &ended).await {
            self.metrics.ended(live.sandbox.kind, &finish.outcome);
        }
        live.ended(finished(&live.sandbox, finish, log_tail));
        self.live.remove(id);
        match log_file {
            LogKept::No => {
                self.forget(id).await;
            }
            LogKept::Until(_) | LogKept::UntilDeleted => self.forget_record(id).await,
        }
    }

    /// Ends a sandbox whose insertion may have been committed or not: whoever asked for it was told that it was not made.
    pub(super) fn settle_unclear(self: &Arc<Self>, sandbox: Sandbox) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let now = engine.clock.now();
            let total = Phases::ms((now - sandbox.created_at).unsigned_abs());
            let cause = Cause::InfraError { message: "the connection to the database broke while it was made".to_owned() };
            let finish = Finish::without_usage(cause, now, &sandbox.limits, Phases { total, ..Phases::default() });
            let ended = Ended { finish: &finish, log_tail: &LogTail::default(), log_file: LogKept::No };
            if engine.store_end(sandbox.id, &[sandbox.state], &ended).await {
                engine.metrics.ended(sandbox.kind, &finish.outcome);
            }
        });
    }

    /// The end of its log; `None` if that stays unreadable.
    async fn read_tail(&self, id: SandboxId) -> Option<LogTail> {
        let mut pause = RETRY_MIN;
        for _ in 0..READ_ATTEMPTS {
            match self.logs.tail(id, LogTail::STORED_BYTES).await {
                Ok(tail) => return Some(tail),
                Err(error) => tracing::error!(sandbox.id = %id, %error, "reading its log failed"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
        tracing::error!(sandbox.id = %id, "its end is stored without its log, which stays where it is");
        None
    }

    /// Stores and tells the end of a sandbox that never left the queue.
    pub(super) async fn settle_queued(&self, sandbox: &Sandbox, finish: Finish) {
        let ended = Ended { finish: &finish, log_tail: &LogTail::default(), log_file: LogKept::No };
        match self.store.finish(sandbox.id, &[State::Queued], &ended).await {
            Ok(true) => {
                self.metrics.ended(sandbox.kind, &finish.outcome);
                if let Some(live) = self.live.get(sandbox.id) {
                    live.ended(finished(sandbox, finish, LogTail::default()));
                    self.live.remove(sandbox.id);
                }
            }
            // Claimed in the meantime.
            Ok(false) => {}
            Err(error) => tracing::warn!(sandbox.id = %sandbox.id, %error, "its end could not be stored; the next look tries again"),
        }
    }

    /// Tries until it works. False: it was stored before.
    async fn store_end(&self, id: SandboxId, from: &[State], ended: &Ended<'_>) -> bool {
        let mut pause = RETRY_MIN;
        loop {
            match self.store.finish(id, from, ended).await {
                Ok(is_first) => return is_first,
                Err(error) => tracing::error!(sandbox.id = %id, %error, "storing its end failed; it is tried again"),
            }
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
fn phases(live: &Live, ended_at: OffsetDateTime) -> Phases {
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
