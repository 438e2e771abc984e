//! What is told of runs, within the memory and the time that there is for it.
//!
//! Who asked for a run and hears of a failure makes it again. So of one that was made not everything may be told, but it is told: what cannot be told now is left out, and the answer says with 202
//! that there is more to ask for.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::super::{App, answers::Room, error::ApiError, view::RunView};
use crate::{
    engine::{EngineError, Finished, Shown},
    sandbox::{Compile, Sandbox, SandboxId, TenantId, WAIT_MS},
};

/// How long a run that is being started is waited for beyond `wait_ms`: whoever hears 202 can rely on it.
pub(super) const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take, behind all waiting, to tell of runs.
const TELL_PATIENCE: Duration = Duration::from_secs(10);
/// When runs that were made are told of at the latest, from the beginning of their request on: before the router gives it up, which is no answer.
const TOLD_WITHIN: Duration = Duration::from_millis(WAIT_MS.max).saturating_add(Duration::from_secs(55));

/// A run that is to be told of.
#[derive(Debug, Clone)]
pub(super) enum Told {
    /// It ended just now, with all that it takes to tell of it.
    Ended(Arc<Finished>),
    /// It was begun by this very request and outlasts it, or ended in this moment: whoever asks again hears of that.
    GoesOn(Sandbox),
    /// As its row has it.
    Seen(Sandbox),
}

impl Told {
    pub(super) fn run(&self) -> &Sandbox {
        match self {
            Self::Ended(finished) => &finished.sandbox,
            Self::GoesOn(run) | Self::Seen(run) => run,
        }
    }

    /// Whether it is told of as one that has ended.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            Self::Ended(_) => true,
            Self::GoesOn(_) => false,
            Self::Seen(run) => run.state.is_final(),
        }
    }

    /// No more bytes than are told of it, where that is known without asking: most runs are small, and are answered without.
    fn known_bytes(&self, shown: Shown) -> Option<u64> {
        let run = self.run();
        if run.judging.is_some() || matches!(self, Self::Seen(run) if run.state.is_final()) {
            return None;
        }
        let output = if let Self::Ended(finished) = self { shown.bytes_of(&finished.log_tail) } else { 0 };
        Some(output + run.compile.as_deref().map_or(0, compile_bytes))
    }
}

fn compile_bytes(compile: &Compile) -> u64 {
    let command: usize = compile.program.args.iter().map(String::len).sum();
    let output = compile.end.as_ref().map_or(0, |end| end.log_tail.bytes.len());
    (command + output) as u64
}

/// How much time a request has that makes runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    told_by: Instant,
}

impl Times {
    /// Of one that begins now.
    pub(super) fn begin() -> Self {
        Self { told_by: Instant::now() + TOLD_WITHIN }
    }

    /// How long the end of its runs is waited for: as long as was asked for, as far as there is time to tell of them then.
    pub(super) fn patience(self, wait_ms: u64) -> Duration {
        let left = self.told_by.saturating_duration_since(Instant::now());
        Duration::from_millis(wait_ms).min(left.saturating_sub(START_PATIENCE + TELL_PATIENCE))
    }

    /// Until when they are told of, once nothing is waited for any more.
    pub(super) fn told_by(self) -> Instant {
        self.told_by.min(Instant::now() + TELL_PATIENCE)
    }
}

/// Room for an answer that tells of these.
pub(super) async fn room(app: &App, tenant: &TenantId, all: &[&Told], shown: Shown, deadline: Instant) -> Result<Room, ApiError> {
    let known: u64 = all.iter().filter_map(|told| told.known_bytes(shown)).sum();
    let unknown: Vec<SandboxId> = all.iter().filter(|told| told.known_bytes(shown).is_none()).map(|told| told.run().id).collect();
    let asked = if unknown.is_empty() { 0 } else { app.engine.told_bytes(tenant, &unknown, shown).await? };
    app.answers.room(tenant, all.len(), known + asked, deadline).await
}

/// The same for an answer that is given in any case, if need be without what takes room.
pub(super) async fn room_if_any(app: &App, tenant: &TenantId, all: &[&Told], shown: Shown, deadline: Instant) -> Option<Room> {
    let room = timeout_at(deadline, room(app, tenant, all, shown, deadline)).await.unwrap_or(Err(ApiError::Timeout));
    room.inspect_err(|error| tracing::warn!(%error, "what came of runs is not told")).ok()
}

/// All that is shown of it. There must be room.
pub(super) async fn view(app: &App, told: Told, shown: Shown) -> Result<RunView, EngineError> {
    let (run, output) = match told {
        Told::Ended(finished) => {
            let output = app.engine.output_of(finished.sandbox.id, &finished.log_tail, shown).await;
            (finished.sandbox.clone(), Some(output))
        }
        Told::Seen(run) if run.state.is_final() => {
            let output = app.engine.output(run.id, shown).await?;
            (run, Some(output))
        }
        Told::GoesOn(run) | Told::Seen(run) => (run, None),
    };
    let cases = app.engine.cases_of(&run, shown.cases).await?;
    Ok(RunView::new(run, output, cases))
}

/// [`view`] by this time, if there is room; or what is known without asking. With it, whether that is all.
pub(super) async fn view_in_time(app: &App, room: Option<&Room>, told: Told, shown: Shown, deadline: Instant) -> (RunView, bool) {
    let run = told.run().clone();
    if room.is_some() {
        match timeout_at(deadline, view(app, told, shown)).await {
            Ok(Ok(view)) => return (view, true),
            Ok(Err(error)) => tracing::warn!(sandbox.id = %run.id, %error, "what came of a run is not told"),
            Err(_late) => tracing::warn!(sandbox.id = %run.id, "it takes too long to tell what came of a run"),
        }
    }
    (RunView::bare(run), false)
}
