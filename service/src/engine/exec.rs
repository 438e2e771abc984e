//! Further processes in a running sandbox, each from its row to its stored outcome.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sandbox_core::protocol::{Cause, Ending, Exec as Order, FailureKind, KillReason, OutputPolicy, Record, Stdin, WindowSize};
use time::OffsetDateTime;
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument as _, Span, field::Empty};
use uuid::Uuid;

use super::{Engine, EngineError, Owner, input, life::detached, settle::Waiting};
use crate::{
    clock::at_us,
    runtime::{CallError, LaunchAnswer},
    sandbox::{Exec, ExecPlan, ExecState, Finish, Limits, LogTail, NewExec, Phases, Records, Sandbox, SandboxId, Signal, State, TenantId},
    store::{Act, ExecAdmitted, ExecEnded, HeldKey, Input, StoreError},
    telemetry::{self, TRACE},
};

/// How long a start is tried while the keeper is busy, and while it is away.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);
const START_PATIENCE: Duration = Duration::from_secs(10);
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Between two attempts to store an end: first this, then doubled up to the other.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long after its creation an exec that nobody follows counts as left behind; after the end of its sandbox, as one whose end nobody will tell.
const STRAY_AFTER: Duration = Duration::from_secs(30);
const ORPHAN_AFTER: Duration = Duration::from_secs(60);
const ORPHANS: u32 = 500;

/// How far an exec has come.
#[derive(Debug, Clone)]
pub enum ExecProgress {
    Starting,
    /// Since then.
    Running(OffsetDateTime),
    /// Its outcome is stored.
    Ended(Arc<ExecFinished>),
    /// Its row went with its sandbox's.
    Gone,
}

/// An exec that ended, as its row has it.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecFinished {
    pub exec: Exec,
    pub log_tail: LogTail,
}

/// An exec whose end is not stored.
#[derive(Debug)]
pub(super) struct LiveExec {
    /// As it was admitted.
    exec: Exec,
    limits: Limits,
    progress: watch::Sender<ExecProgress>,
}

/// All such execs of this process.
#[derive(Debug, Default)]
pub(super) struct Execs(Mutex<HashMap<SandboxId, Arc<LiveExec>>>);

/// An exec of this process, watched.
#[derive(Debug)]
pub struct FollowedExec {
    live: Arc<LiveExec>,
    progress: watch::Receiver<ExecProgress>,
}

impl LiveExec {
    pub(super) fn subscribe(&self) -> watch::Receiver<ExecProgress> {
        self.progress.subscribe()
    }

    /// The exec as it is now.
    fn now(&self) -> Exec {
        match &*self.progress.borrow() {
            ExecProgress::Starting | ExecProgress::Gone => self.exec.clone(),
            ExecProgress::Running(at) => Exec { state: ExecState::Running, started_at: Some(*at), ..self.exec.clone() },
            ExecProgress::Ended(finished) => finished.exec.clone(),
        }
    }
}

impl Execs {
    fn insert(&self, exec: Exec, limits: Limits) -> Arc<LiveExec> {
        let progress = match exec.started_at {
            Some(at) if exec.state == ExecState::Running => ExecProgress::Running(at),
            Some(_) | None => ExecProgress::Starting,
        };
        let live = Arc::new(LiveExec { exec, limits, progress: watch::channel(progress).0 });
        self.lock().insert(live.exec.id, Arc::clone(&live));
        live
    }

    pub(super) fn get(&self, id: SandboxId) -> Option<Arc<LiveExec>> {
        self.lock().get(&id).cloned()
    }

    fn remove(&self, id: SandboxId) {
        self.lock().remove(&id);
    }

    fn all(&self) -> Vec<Arc<LiveExec>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Arc<LiveExec>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FollowedExec {
    /// The exec as it is now.
    pub fn exec(&self) -> Exec {
        self.live.now()
    }

    /// Returns when its end is stored; `None` if its row is gone.
    pub async fn ended(&mut self) -> Option<Arc<ExecFinished>> {
        let reached = self.progress.wait_for(|progress| matches!(progress, ExecProgress::Ended(_) | ExecProgress::Gone)).await;
        match reached.as_deref() {
            Ok(ExecProgress::Ended(finished)) => Some(Arc::clone(finished)),
            Ok(ExecProgress::Starting | ExecProgress::Running(_) | ExecProgress::Gone) | Err(_) => None,
        }
    }

    /// Returns when it is not starting any more.
    pub async fn started(&mut self) {
        // Without more news there is nothing to wait for.
        drop(self.progress.wait_for(|progress| !matches!(progress, ExecProgress::Starting)).await);
    }
}

/// What is done for this exec until its end is stored: longer than the request takes that it comes from.
fn span_of(exec: &Exec) -> Span {
    let Exec { id, sandbox, tenant, .. } = exec;
    let span = tracing::info_span!(target: TRACE, parent: None, "exec", trace.id = Empty, exec.id = %id, sandbox.id = %sandbox, %tenant);
    telemetry::detached(span, telemetry::here().as_ref())
}

impl Engine {
    /// Starts a further process in a running sandbox. What was promised by the answer is in Postgres; a caller who goes away changes nothing.
    /// With a key it is started only if that is still held, and is tied to it from then on.
    pub async fn exec(
        self: &Arc<Self>,
        owner: Owner,
        sandbox: Sandbox,
        asked: NewExec,
        key: Option<HeldKey>,
    ) -> Result<FollowedExec, EngineError> {
        let engine = Arc::clone(self);
        // A request that is given up between commit and start would leave a row that nobody follows.
        detached(async move { engine.begin_exec(owner, sandbox, asked, key).await }).await
    }

    async fn begin_exec(
        self: Arc<Self>,
        owner: Owner,
        sandbox: Sandbox,
        asked: NewExec,
        key: Option<HeldKey>,
    ) -> Result<FollowedExec, EngineError> {
        if sandbox.state != State::Running {
            return Err(EngineError::WrongState(sandbox.state));
        }
        // Another node has it.
        if self.live.get(sandbox.id).is_none() || self.is_closing() {
            return Err(EngineError::KeeperUnavailable);
        }
        let NewExec { plan, stdin } = asked;
        let limits = sandbox.limits.of_exec(plan.wall_ms, plan.output_bytes);
        let exec = Exec {
            id: SandboxId(Uuid::now_v7()),
            sandbox: sandbox.id,
            tenant: owner.tenant,
            principal: owner.principal,
            state: ExecState::Starting,
            plan,
            created_at: self.clock.now(),
            started_at: None,
            finished_at: None,
            outcome: None,
        };
        match self.store.admit_exec(&exec, &self.tenancy.defaults, key.as_ref()).await? {
            ExecAdmitted::Yes => {}
            ExecAdmitted::NotRunning(state) => return Err(EngineError::WrongState(state.unwrap_or(State::Exited))),
            ExecAdmitted::Exceeded(exceeded) => return Err(EngineError::QuotaExceeded(Box::new(exceeded))),
            ExecAdmitted::KeyLost => return Err(EngineError::KeyLost),
        }
        let live = self.execs.insert(exec, limits);
        let progress = live.subscribe();
        let input = Input { files: None, stdin: stdin.map(|content| content.0) };
        let span = span_of(&live.exec);
        tokio::spawn(Arc::clone(&self).carry_exec(Arc::clone(&live), input).instrument(span));
        Ok(FollowedExec { live, progress })
    }

    async fn carry_exec(self: Arc<Self>, live: Arc<LiveExec>, input: Input) {
        let ending = match self.start_exec(&live, input).await {
            Ok(started_at) => {
                self.exec_runs(&live, started_at);
                self.await_exec(&live).await
            }
            Err(ending) => ending,
        };
        self.settle_exec(&live, &ending).await;
    }

    /// When it was started, or how it ended without ever running.
    async fn start_exec(&self, live: &LiveExec, input: Input) -> Result<OffsetDateTime, Box<Ending>> {
        let has_stdin = input.stdin.is_some();
        let stdin = input::descriptors(Arc::new(input)).await;
        let stdin = stdin.map_err(|error| self.infra_error(format!("its input could not be handed over: {error}")))?.pop();
        let order = order_of(&live.exec, has_stdin);
        let (began, id) = (Instant::now(), live.exec.id);
        loop {
            match self.keeper.exec(order.clone(), copy_of(stdin.as_ref())).await {
                Ok(LaunchAnswer::Launched(launched)) => return Ok(at_us(launched.started_at_us)),
                Ok(LaunchAnswer::Ended(ending)) => return Err(ending),
                Err(CallError::Failed(failure)) => match failure.kind {
                    FailureKind::Busy if began.elapsed() < BUSY_PATIENCE => tokio::time::sleep(BUSY_PAUSE).await,
                    FailureKind::Refused => return Err(self.ending(Cause::StartFailed { message: failure.message })),
                    FailureKind::Busy | FailureKind::Gone | FailureKind::Host => return Err(self.infra_error(failure.message)),
                },
                // Whether the order arrived is in the keeper's records.
                Err(CallError::Lost) => match tokio::time::timeout(START_PATIENCE, self.exec_records()).await {
                    Ok(Some(records)) => match records.get(&id) {
                        Some(record) => {
                            return Ok(record.launched.map_or_else(|| self.clock.now(), |launched| at_us(launched.started_at_us)));
                        }
                        None if began.elapsed() < START_PATIENCE => {}
                        None => return Err(self.infra_error("the keeper of this node did not answer".to_owned())),
                    },
                    Ok(None) | Err(_) => return Err(self.infra_error("the keeper of this node did not answer".to_owned())),
                },
            }
        }
    }

    /// The keeper's records, as soon as it answers; `None` if it does not know what it has.
    async fn exec_records(&self) -> Option<HashMap<SandboxId, Record>> {
        loop {
            self.keeper.connected().await;
            match self.keeper.list().await {
                Ok(records) => return Some(records.into_iter().map(|record| (record.id, record)).collect()),
                Err(CallError::Lost) => tokio::time::sleep(BUSY_PAUSE).await,
                Err(CallError::Failed(_)) => return None,
            }
        }
    }

    fn exec_runs(&self, live: &LiveExec, started_at: OffsetDateTime) {
        live.progress.send_replace(ExecProgress::Running(started_at));
        let (store, id) = (self.store.clone(), live.exec.id);
        // Not waited for: the end, should it come first, is guarded by the row's state.
        let marked = async move {
            if let Err(error) = store.mark_exec_running(id, started_at).await {
                tracing::warn!(exec.id = %id, %error, "noting that it runs failed");
            }
        };
        tokio::spawn(marked.in_current_span());
    }

    /// Waits for the end, through broken connections.
    async fn await_exec(&self, live: &LiveExec) -> Box<Ending> {
        loop {
            let answer = match self.keeper.wait(live.exec.id).await {
                Ok(answer) => answer.await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(ending) => return ending,
                // Too many ask at once.
                Err(CallError::Failed(failure)) if failure.kind == FailureKind::Busy => tokio::time::sleep(BUSY_PAUSE).await,
                Err(CallError::Failed(failure)) => return self.infra_error(format!("the keeper does not know it: {failure}")),
                // However long it takes: the next keeper has the records of this one.
                Err(CallError::Lost) => drop(self.keeper.connected().await),
            }
        }
    }

    /// Stores the end, however long that takes — the keeper has the record until then — and tells everyone who waits.
    async fn settle_exec(self: &Arc<Self>, live: &Arc<LiveExec>, ending: &Ending) {
        let id = live.exec.id;
        let total = Phases::ms((at_us(ending.ended_at_us) - live.exec.created_at).try_into().unwrap_or(Duration::ZERO));
        let finish = Finish::of(ending, &live.limits, Phases { total, ..Phases::default() });
        if let Some(launched) = ending.launched {
            telemetry::past("run", at_us(launched.started_at_us), at_us(ending.ended_at_us));
        }
        let read = self.read_tail(id, Records::Numbered).await;
        let has_log_file = !read.as_ref().is_some_and(LogTail::is_complete);
        let log_tail = read.unwrap_or_else(|| unread(&live.exec.plan, ending));
        let ended = ExecEnded { finish: &finish, log_tail: &log_tail, has_log_file };
        let mut pause = RETRY_MIN;
        let waiting = Waiting::new(&self.metrics.records_waiting);
        let is_first = loop {
            match self.store.finish_exec(id, &ended).instrument(tracing::debug_span!(target: TRACE, "store")).await {
                Ok(is_first) => break is_first,
                Err(error) => tracing::error!(exec.id = %id, %error, "storing its end failed; it is tried again"),
            }
            self.metrics.store_retries.inc();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        };
        drop(waiting);
        let progress = if is_first {
            self.metrics.wrote(&finish.outcome);
            ExecProgress::Ended(Arc::new(ExecFinished { exec: finished(&live.exec, finish), log_tail }))
        } else {
            // By the service before this one, or its sandbox was deleted meanwhile.
            match self.store.find_exec_anywhere(&live.exec.tenant, id).await {
                Ok(Some(exec)) => ExecProgress::Ended(Arc::new(ExecFinished { exec, log_tail })),
                Ok(None) | Err(_) => ExecProgress::Gone,
            }
        };
        let is_kept = has_log_file && matches!(progress, ExecProgress::Ended(_));
        live.progress.send_replace(progress);
        self.execs.remove(id);
        if is_kept {
            self.forget_record(id).await;
        } else if !self.forget(id).await {
            tokio::spawn(Arc::clone(self).forget_log(id));
        }
    }

    /// The exec of this sandbox as it is now. What this node knows of a live one is newer than its row.
    pub async fn find_exec(&self, tenant: &TenantId, sandbox: SandboxId, id: SandboxId) -> Result<Option<Exec>, EngineError> {
        let live = self.execs.get(id).filter(|live| live.exec.sandbox == sandbox && live.exec.tenant == *tenant);
        match live {
            Some(live) => Ok(Some(live.now())),
            None => Ok(self.store.find_exec(tenant, sandbox, id).await?),
        }
    }

    /// The exec that an earlier attempt at a request made, in whatever sandbox.
    pub async fn find_exec_anywhere(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Exec>, EngineError> {
        match self.execs.get(id).filter(|live| live.exec.tenant == *tenant) {
            Some(live) => Ok(Some(live.now())),
            None => Ok(self.store.find_exec_anywhere(tenant, id).await?),
        }
    }

    /// Execs of a sandbox, newest first.
    pub async fn list_execs(
        &self,
        tenant: &TenantId,
        sandbox: SandboxId,
        before: Option<SandboxId>,
        limit: u32,
    ) -> Result<Vec<Exec>, EngineError> {
        let mut execs = self.store.list_execs(tenant, sandbox, before, limit).await?;
        for exec in &mut execs {
            if let Some(live) = self.execs.get(exec.id)
                && !exec.state.is_final()
            {
                *exec = live.now();
            }
        }
        Ok(execs)
    }

    /// An exec of this process, to be watched.
    pub fn follow_exec(&self, id: SandboxId) -> Option<FollowedExec> {
        let live = self.execs.get(id)?;
        Some(FollowedExec { progress: live.subscribe(), live })
    }

    /// Sends a signal to an exec's first process; SIGKILL ends all of it, with `stopped_by_user`.
    pub async fn signal_exec(&self, owner: &Owner, sandbox: &Sandbox, exec: &Exec, signal: Signal) -> Result<(), EngineError> {
        if exec.state.is_final() {
            return Err(EngineError::WrongState(exec.state.into()));
        }
        let act = Act { actor: Some(owner), at: self.clock.now(), data: serde_json::json!({ "signal": signal }) };
        self.store.tell_of_exec(sandbox, exec.id, "exec.killed", &act).await?;
        if signal == Signal::KILL {
            return self.keeper.kill(exec.id, KillReason::StoppedByUser).await.map_err(|error| refused(exec, error));
        }
        match self.keeper.signal(exec.id, signal.number()).await {
            Err(CallError::Lost) => Err(EngineError::OutcomeUnknown),
            sent => sent.map_err(|error| refused(exec, error)),
        }
    }

    /// Tells an exec how large its terminal is.
    pub async fn resize_exec(&self, exec: &Exec, size: WindowSize) -> Result<(), EngineError> {
        if exec.state.is_final() {
            return Err(EngineError::WrongState(exec.state.into()));
        }
        self.keeper.resize(exec.id, size).await.map_err(|error| refused(exec, error))
    }

    /// Takes over execs of this node that nobody follows: what the keeper has of them is followed, and of the others nobody will ever know.
    pub(super) async fn take_over_execs(self: &Arc<Self>, created_before: Option<OffsetDateTime>) -> anyhow::Result<()> {
        let mut rows = self.store.live_execs_of(self.node).await?;
        rows.retain(|exec| self.execs.get(exec.id).is_none() && created_before.is_none_or(|before| exec.created_at < before));
        if rows.is_empty() {
            return Ok(());
        }
        let records: HashMap<SandboxId, Record> = self.keeper.list().await?.into_iter().map(|record| (record.id, record)).collect();
        let limits = Limits::of(crate::sandbox::Kind::Sandbox, crate::sandbox::RequestedLimits::default())?;
        for row in rows {
            let record = records.get(&row.id).cloned();
            // Of the sandbox's own limits an exec's end says nothing.
            let limits = limits.of_exec(row.plan.wall_ms, row.plan.output_bytes);
            let live = self.execs.insert(row, limits);
            let engine = Arc::clone(self);
            let span = span_of(&live.exec);
            let taken_over = async move {
                let ending = match record {
                    Some(record) => {
                        if let Some(launched) = record.launched {
                            engine.exec_runs(&live, at_us(launched.started_at_us));
                        }
                        engine.await_exec(&live).await
                    }
                    None => engine.infra_error("the keeper never got the order to start it, or has lost its record".to_owned()),
                };
                engine.settle_exec(&live, &ending).await;
            };
            tokio::spawn(taken_over.instrument(span));
        }
        Ok(())
    }

    /// [`Engine::take_over_execs`] of those that were left behind, and the end of those whose sandbox has ended on a node that tells no more.
    pub(super) async fn recover_stray_execs(self: &Arc<Self>) -> anyhow::Result<()> {
        let now = self.clock.now();
        self.take_over_execs(Some(now - STRAY_AFTER)).await?;
        let limits = Limits::of(crate::sandbox::Kind::Sandbox, crate::sandbox::RequestedLimits::default())?;
        for exec in self.store.orphaned_execs(now - ORPHAN_AFTER, ORPHANS).await? {
            if self.execs.get(exec.id).is_some() {
                continue;
            }
            let cause = Cause::InfraError { message: "its sandbox has ended, and with it who knew of this".to_owned() };
            let finish = Finish::without_usage(cause, now, &limits, Phases::default());
            let ended = ExecEnded { finish: &finish, log_tail: &LogTail::default(), has_log_file: false };
            self.store.finish_exec(exec.id, &ended).await?;
        }
        Ok(())
    }

    /// What of these records and logs of the keeper belongs to execs. Those of ended ones are dropped, as far as nobody needs them.
    pub(super) async fn sort_out_execs(self: &Arc<Self>, ids: &[SandboxId]) -> Result<HashSet<SandboxId>, StoreError> {
        let execs: HashSet<SandboxId> = self.store.execs_among(ids, false).await?.into_iter().collect();
        for id in execs.iter().filter(|id| self.execs.get(**id).is_none()) {
            match self.store.find_exec_log(*id).await? {
                Some(stored) if stored.has_file => self.forget_record(*id).await,
                Some(_) => drop(tokio::spawn(Arc::clone(self).forget_log(*id))),
                // It is taken over in a moment.
                None => {}
            }
        }
        Ok(execs)
    }

    /// Returns when the ends of all execs are stored.
    pub(super) async fn execs_ended(&self) {
        for live in self.execs.all() {
            FollowedExec { progress: live.subscribe(), live }.ended().await;
        }
    }
}

fn order_of(exec: &Exec, has_stdin: bool) -> Order {
    let ExecPlan { command, workdir, user, has_open_stdin, terminal, wall_ms, output_bytes, output_policy, .. } = exec.plan.clone();
    Order {
        id: exec.id,
        sandbox: exec.sandbox,
        args: command,
        env: exec.plan.environment(),
        cwd: workdir,
        user,
        stdin: match (has_stdin, has_open_stdin) {
            (true, _) => Stdin::Descriptor,
            (false, true) if terminal.is_none() => Stdin::Held,
            (false, _) => Stdin::Null,
        },
        terminal,
        wall_ms,
        output_bytes,
        output_policy,
    }
}

fn copy_of(descriptor: Option<&OwnedFd>) -> Option<OwnedFd> {
    descriptor.and_then(|descriptor| descriptor.try_clone().ok())
}

/// What stands for a log that cannot be read: nothing of it, and all that it must hold as omitted.
fn unread(plan: &ExecPlan, ending: &Ending) -> LogTail {
    let kept = |written: u64| match plan.output_policy {
        OutputPolicy::Truncate | OutputPolicy::Kill => written.min(plan.output_bytes),
        OutputPolicy::Discard => 0,
    };
    let usage = ending.usage;
    LogTail { bytes: vec![], stdout_omitted_bytes: kept(usage.stdout_bytes), stderr_omitted_bytes: kept(usage.stderr_bytes) }
}

fn finished(exec: &Exec, finish: Finish) -> Exec {
    Exec {
        state: if finish.state == State::Exited { ExecState::Exited } else { ExecState::Failed },
        started_at: finish.started_at.or(exec.started_at),
        finished_at: Some(finish.finished_at),
        outcome: Some(finish.outcome),
        ..exec.clone()
    }
}

/// What a keeper's refusal says of an exec that was thought to live.
fn refused(exec: &Exec, error: CallError) -> EngineError {
    let CallError::Failed(failure) = error else { return EngineError::KeeperUnavailable };
    match failure.kind {
        FailureKind::Gone => EngineError::WrongState(State::Exited),
        FailureKind::Busy => EngineError::WrongState(exec.state.into()),
        FailureKind::Refused => EngineError::Refused(failure.message),
        FailureKind::Host => EngineError::Store(StoreError::Other(failure.into())),
    }
}
