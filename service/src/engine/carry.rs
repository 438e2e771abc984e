//! One sandbox from its claim to its stored outcome.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sandbox_core::{
    fail_point,
    protocol::{Cause, Ending, FailureKind, KillReason, Launch, Launched, Layering, OutputPolicy, Supervision},
};
use time::OffsetDateTime;
use tokio::{sync::MutexGuard, time::Instant};
use tracing::{Instrument as _, Span, field::Empty};

use super::{
    Engine, Progress,
    capacity::Reservation,
    input,
    lease::LEFT_TO_OTHERS,
    live::Live,
    settle::{After, phases},
    unix_us,
};
use crate::{
    clock::at_us,
    runtime::{CallError, LaunchAnswer},
    sandbox::{self, Kind, Limits, Mount, Sandbox, SandboxId, State, step_id},
    store::{Input, Return},
    telemetry::{self, TRACE},
};

/// How long a launch is tried while the keeper is busy or away.
const LAUNCH_PATIENCE: Duration = Duration::from_secs(10);
/// How long after its creation a node is searched for that has what a sandbox needs.
const SEARCHED_FOR: Duration = Duration::from_secs(120);
/// Between two tries of a launch that the keeper was too busy for.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Between two looks at whether a payload runs of whose launch nobody will hear: first this, then doubled up to the other.
const LAUNCH_LOOK_MIN: Duration = Duration::from_millis(20);
const LAUNCH_LOOK_MAX: Duration = Duration::from_secs(1);
/// A run that ends before is never written as running: its row goes from its claim to its outcome.
const MARK_RUNNING_AFTER: Duration = Duration::from_millis(200);

/// What is done for this sandbox until its end is stored: longer than the request takes that it comes from.
pub(super) fn span_of(live: &Live) -> Span {
    let Sandbox { id, tenant, .. } = &live.sandbox;
    let span = tracing::info_span!(target: TRACE, parent: None, "sandbox", trace.id = Empty, sandbox.id = %id, %tenant);
    telemetry::detached(span, live.origin.as_ref())
}

/// From the order to the keeper's answer.
pub(super) fn launch_span() -> Span {
    tracing::debug_span!(target: TRACE, "launch")
}

/// Shows in the trace what the sandbox waited for before anything was done for it here.
fn note_wait(live: &Live) {
    let Sandbox { created_at, claimed_at, starts: 1, attempt: 1, .. } = live.sandbox else { return };
    let room_at = claimed_at.map_or(created_at, |at| at - live.image_took);
    telemetry::past("queue", created_at, room_at);
    telemetry::past("image", room_at, room_at + live.image_took);
}

/// What came of following a sandbox.
pub(super) enum Course {
    Ended(Box<Ending>),
    /// The keeper took it never. With `Some`, this node cannot run it, but another may.
    NotBegun(Option<Box<Ending>>),
    /// Its row is somebody else's by now, or says already how it ended.
    NotOurs,
}

/// Where the payload stands after the attempt to start it.
pub(super) enum Started<W> {
    /// It is with the keeper. `wait` brings its end.
    WithKeeper {
        launched: Option<Launched>,
        wait: W,
    },
    Over(Box<Ending>),
    /// The keeper is away, or could not for want of something, for as long as was waited.
    NotBegun,
    /// This node cannot run it: it would end like this.
    NotHere(Box<Ending>),
}

impl Engine {
    /// Starts the sandbox, follows it, stores its end, gives its room back.
    pub(super) async fn carry(self: Arc<Self>, live: Arc<Live>, input: Input, reservation: Reservation) {
        let span = span_of(&live);
        let carried = async move {
            note_wait(&live);
            let known = self.live.known(Arc::clone(&live));
            let input = Arc::new(input);
            live.give_room(reservation);
            let Some((course, _turn)) = self.while_it_waits(&live, self.launch_and_follow(&live, &input)).await else { return };
            let after = self.conclude(&live, course, &input).await;
            if after == After::Waits {
                known.keep();
            }
        };
        carried.instrument(span).await;
    }

    /// Does what is to be done about a sandbox that is followed no more.
    pub(super) async fn conclude(self: &Arc<Self>, live: &Arc<Live>, course: Course, input: &Input) -> After {
        match course {
            Course::NotOurs => {
                live.free_room();
                self.leave_to_others(live).await
            }
            Course::Ended(ending) => self.free_and_settle(live, &ending).await,
            // Its pool begins another.
            Course::NotBegun(ending) if live.sandbox.kind == Kind::Pooled => {
                let ending = ending.unwrap_or_else(|| self.infra_error("its node could not start it".to_owned()));
                self.free_and_settle(live, &ending).await
            }
            // It belongs here, and to no queue.
            Course::NotBegun(_) if live.sandbox.starts > 1 => {
                let ending = self.infra_error("its node could not start it again".to_owned());
                self.free_and_settle(live, &ending).await
            }
            Course::NotBegun(None) => {
                // It is the first of its line: whatever is in its way, the others get their turn.
                live.free_room();
                let until = Some(self.clock.now() + LEFT_TO_OTHERS);
                self.give_back(live, Return::NotBegun { input, until }).await
            }
            Course::NotBegun(Some(ending)) => {
                live.free_room();
                if self.could_be_elsewhere(live).await {
                    let until = Some(self.clock.now() + LEFT_TO_OTHERS);
                    self.give_back(live, Return::NotBegun { input, until }).await
                } else {
                    self.settle(live, &ending).await
                }
            }
        }
    }

    /// Takes over a sandbox that the keeper already has.
    pub(super) async fn adopt(self: Arc<Self>, live: Arc<Live>, launched: Option<Launched>, reservation: Reservation) {
        let known = self.live.known(Arc::clone(&live));
        if let Some(launched) = launched {
            live.running(launched);
        }
        live.give_room(reservation);
        self.recall_step(&live).await;
        if live.sandbox.kind == Kind::Sandbox {
            live.paused(live.sandbox.state == State::Paused);
            self.hold_to_row_later(&live);
        }
        if live.sandbox.kind == Kind::Pooled {
            // Whoever was about to take it may have died over it.
            self.end_wall(&live).await;
        }
        let followed = self.follow(&live, live.sandbox.id, None::<std::future::Pending<_>>);
        let Some((ending, _turn)) = self.while_it_waits(&live, followed).await else { return };
        if self.free_and_settle(&live, &ending).await == After::Waits {
            known.keep();
        }
    }

    /// Follows a sandbox to its end that was taken from its pool.
    pub(super) async fn follow_taken(self: Arc<Self>, live: Arc<Live>) {
        let span = span_of(&live);
        let followed = async {
            let _known = self.live.known(Arc::clone(&live));
            let ending = self.follow(&live, live.sandbox.id, None::<std::future::Pending<_>>).await;
            self.free_and_settle(&live, &ending).await
        };
        followed.instrument(span).await;
    }

    /// What comes of following it; of one that waits in a pool, with its turn. `None`: it was taken from there meanwhile, and is followed as somebody's.
    async fn while_it_waits<'a, T>(&self, live: &'a Arc<Live>, work: impl Future<Output = T>) -> Option<(T, Option<MutexGuard<'a, ()>>)> {
        if live.sandbox.kind != Kind::Pooled {
            return Some((work.await, None));
        }
        let mut progress = live.subscribe();
        let done = tokio::select! {
            biased;
            _ = progress.wait_for(|progress| matches!(progress, Progress::Gone)) => return None,
            done = work => done,
        };
        // Whoever takes it just now has it first, and finds its end at the keeper.
        let turn = live.turn().await;
        self.live.is_current(live).then_some((done, Some(turn)))
    }

    /// Gives its room back, but for that of a layer that is kept, and stores its end.
    async fn free_and_settle(self: &Arc<Self>, live: &Arc<Live>, ending: &Ending) -> After {
        self.keep_room(live, ending);
        live.free_room();
        self.settle(live, ending).await
    }

    async fn launch_and_follow(&self, live: &Arc<Live>, input: &Arc<Input>) -> Course {
        self.recall_cases(live).await;
        if let Some(reason) = live.ordered_kill() {
            return Course::Ended(self.ending(Cause::Killed(reason)));
        }
        let (has_stdin, has_files) = (input.stdin.is_some(), input.files.is_some());
        let mut descriptors = match input::descriptors(Arc::clone(input)).await {
            Ok(descriptors) => descriptors,
            Err(error) => return Course::Ended(self.infra_error(format!("its input could not be handed over: {error}"))),
        };
        if live.sandbox.claims > 1 && !self.clear_former_attempt(live).await {
            return Course::NotBegun(None);
        }
        if let Some(step) = &live.sandbox.compile {
            // What the files have become is in the layer; the program itself is given its input alone.
            let files = descriptors.split_off(usize::from(has_stdin));
            if let Some(course) = self.compile(live, step, &files).instrument(tracing::debug_span!(target: TRACE, "compile")).await {
                return course;
            }
            live.go_on_from(Layering::Of(step_id(live.sandbox.id)));
        }
        if let Some(judging) = live.sandbox.judging {
            drop(descriptors);
            return self.judge(live, judging, input, None).await;
        }
        fail_point::reached("service.launch.given");
        let launch = launch_of(live, has_stdin, has_files && live.sandbox.compile.is_none());
        match self.launch(launch, &descriptors).instrument(launch_span()).await {
            Started::Over(ending) => Course::Ended(ending),
            Started::NotBegun => Course::NotBegun(None),
            Started::NotHere(ending) => Course::NotBegun(Some(ending)),
            Started::WithKeeper { launched, wait } => {
                drop(descriptors);
                if let Some(launched) = launched {
                    live.running(launched);
                    self.note_launch(live, &launched);
                }
                if let Some(reason) = live.ordered_kill() {
                    // Ordered while the keeper may not have known of it.
                    self.kill(live, reason).await;
                }
                Course::Ended(self.follow(live, live.sandbox.id, wait).await)
            }
        }
    }

    /// Counts a launch and, of the first, what the start consisted of; shows in the trace what the keeper told of it.
    pub(super) fn note_launch(&self, live: &Live, launched: &Launched) {
        self.metrics.launched(launched);
        let started_at = at_us(launched.started_at_us);
        telemetry::past("keeper launch", started_at - Duration::from_micros(launched.launch_us), started_at);
        if live.is_first_launch() {
            let total = Duration::try_from(started_at - live.sandbox.created_at).unwrap_or(Duration::ZERO);
            self.metrics.started(launched, phases(live, started_at), total);
        }
    }

    /// Has the keeper end and forget what it may still have of the attempts before this one, some of whose names this one has too. False if that cannot be
    /// done now.
    async fn clear_former_attempt(&self, live: &Live) -> bool {
        let id = live.sandbox.id;
        let cleared = async {
            // However it ended, another attempt was decided on.
            self.end_leftover(id).await;
            self.forget(id).await && self.clear_parts(live).await
        };
        tokio::time::timeout(LAUNCH_PATIENCE, cleared).await.unwrap_or(false)
    }

    /// Has the keeper end what it may have by this name, and waits for that.
    pub(super) async fn end_leftover(&self, id: SandboxId) {
        if let Ok(ended) = self.keeper.wait(id).await {
            let told = self.keeper.kill(id, KillReason::Evicted).await;
            if told.is_ok() {
                drop(ended.await);
            }
        }
    }

    /// Whether another node may do what this one cannot: there is one, and not everybody has been asked for too long.
    async fn could_be_elsewhere(&self, live: &Live) -> bool {
        if !live.sandbox.program.volumes.is_empty() {
            return false;
        }
        let is_young = self.clock.now() - live.sandbox.created_at < SEARCHED_FOR;
        is_young && self.store.has_other_nodes(self.node).await.unwrap_or(false)
    }

    pub(super) async fn launch(
        &self,
        launch: Launch,
        descriptors: &[OwnedFd],
    ) -> Started<Option<impl Future<Output = Result<Box<Ending>, CallError>> + use<>>> {
        let deadline = Instant::now() + LAUNCH_PATIENCE;
        let id = launch.id;
        loop {
            // What was sent before is known not to have arrived, or to have been refused.
            let Ok(back) = tokio::time::timeout_at(deadline, self.keeper_back()).await else { return Started::NotBegun };
            if back.is_none() {
                return Started::Over(self.keeper_ended());
            }
            if self.keeper.hello().is_some_and(|hello| !hello.isolation.contains(&launch.isolation)) {
                return Started::NotHere(self.infra_error("no node offers the isolation that was asked for".to_owned()));
            }
            let (error, wait) = match self.keeper.launch(launch.clone(), descriptors).await {
                Err(error) => (error, None),
                Ok(answer) => {
                    fail_point::reached("service.launch.sent");
                    // Asked before the launch is answered, so that a short run costs one round trip.
                    let wait = self.keeper.wait(id).await.ok();
                    match answer.await {
                        Ok(LaunchAnswer::Launched(launched)) => {
                            fail_point::reached("service.launch.answered");
                            return Started::WithKeeper { launched: Some(launched), wait };
                        }
                        Ok(LaunchAnswer::Ended(ending)) => return Started::Over(ending),
                        Err(error) => (error, wait),
                    }
                }
            };
            drop(wait);
            match error {
                CallError::Failed(failure) => match failure.kind {
                    FailureKind::Busy => {
                        // Who waits for a layer lacks nothing of the node's.
                        if launch.layer == Layering::Fresh {
                            self.pressure.note(&failure.message);
                        }
                        if Instant::now() >= deadline || self.stopping.is_cancelled() {
                            return Started::NotBegun;
                        }
                        tokio::time::sleep(BUSY_PAUSE).await;
                    }
                    FailureKind::Refused => return Started::Over(self.ending(Cause::StartFailed { message: failure.message })),
                    // It has not the image.
                    FailureKind::Gone => return Started::NotHere(self.infra_error(failure.message)),
                    FailureKind::Host => return Started::Over(self.infra_error(failure.message)),
                },
                CallError::Lost => match self.find_launched(id, deadline).await {
                    Ok(Some(launched)) => return Started::WithKeeper { launched, wait: None },
                    // The order never arrived.
                    Ok(None) => {}
                    Err(ending) => return Started::Over(ending),
                },
            }
        }
    }

    /// Whether a launch whose answer was lost arrived, and how far it came. A keeper that was started since has the records of the one before.
    async fn find_launched(&self, id: SandboxId, deadline: Instant) -> Result<Option<Option<Launched>>, Box<Ending>> {
        loop {
            let asked = async {
                self.keeper_back().await?;
                Some(self.keeper.list().await)
            };
            let Ok(answer) = tokio::time::timeout_at(deadline, asked).await else { return Err(self.keeper_silent()) };
            let Some(answer) = answer else { return Err(self.keeper_ended()) };
            match answer {
                Ok(records) => return Ok(records.into_iter().find(|record| record.id == id).map(|record| record.launched)),
                Err(CallError::Lost) if Instant::now() >= deadline => return Err(self.keeper_silent()),
                Err(CallError::Lost) => {}
                Err(CallError::Failed(failure)) => return Err(self.infra_error(failure.message)),
            }
        }
    }

    /// The keeper, as soon as there is a connection to it; `None` when it is gone for good.
    pub(super) async fn keeper_back(&self) -> Option<()> {
        tokio::select! {
            _ = self.keeper.connected() => Some(()),
            () = self.keeper_gone() => None,
        }
    }

    /// Returns when the keeper will not come back.
    pub async fn keeper_gone(&self) {
        if self.does_keeper_return {
            std::future::pending::<()>().await;
        }
        self.keeper.gone().await;
    }

    /// Waits for the end of what the keeper calls so, the payload or one of its cases, through broken connections, and does what is due before it: the row's `running`, the end of the time to live, or of that in
    /// which it does nothing.
    pub(super) async fn follow(
        &self,
        live: &Live,
        id: SandboxId,
        first: Option<impl Future<Output = Result<Box<Ending>, CallError>>>,
    ) -> Box<Ending> {
        let mut ending = std::pin::pin!(self.wait_for_end(live, id, first));
        let mark_after = match live.sandbox.kind {
            Kind::Run => MARK_RUNNING_AFTER,
            Kind::Sandbox | Kind::Pooled => Duration::ZERO,
        };
        let mut mark = std::pin::pin!(tokio::time::sleep(mark_after));
        let mut changes = live.changes();
        // The answer to its launch was another service's, or was lost.
        let mut unheard = std::pin::pin!(self.until_launched(id));
        // Whoever used it before this process was cannot say so any more.
        live.touch(self.clock.now());
        let (mut is_heard, mut is_marked, mut is_told_to_end) = (false, false, false);
        loop {
            let (expires_at, idle_timeout_ms) = {
                let now = changes.borrow_and_update();
                (now.expires_at, now.idle_timeout_ms)
            };
            let overdue = async {
                tokio::select! {
                    () = self.sleep_until(expires_at) => KillReason::Expired,
                    () = self.idle_for(live, idle_timeout_ms) => KillReason::IdleTimeout,
                }
            };
            tokio::select! {
                biased;
                ending = &mut ending => return ending,
                launched = &mut unheard, if !is_heard && live.launched().is_none() => {
                    is_heard = true;
                    live.running(launched);
                }
                () = &mut mark, if !is_marked && live.launched().is_some() => {
                    is_marked = true;
                    self.mark_running(live);
                }
                Ok(()) = changes.changed() => {}
                reason = overdue, if !is_told_to_end => {
                    is_told_to_end = true;
                    self.kill(live, reason).await;
                }
            }
        }
    }

    /// How the payload of this name was started, as soon as the keeper's records say so.
    async fn until_launched(&self, id: SandboxId) -> Launched {
        let mut pause = LAUNCH_LOOK_MIN;
        loop {
            self.keeper.connected().await;
            let listed = self.keeper.list().await.unwrap_or_default();
            if let Some(launched) = listed.into_iter().find(|record| record.id == id).and_then(|record| record.launched) {
                return launched;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAUNCH_LOOK_MAX);
        }
    }

    /// Waits for the end of what the keeper calls so: the payload, or the step before it.
    pub(super) async fn wait_for_end(
        &self,
        live: &Live,
        id: SandboxId,
        first: Option<impl Future<Output = Result<Box<Ending>, CallError>>>,
    ) -> Box<Ending> {
        let mut answer = match first {
            Some(first) => first.await,
            None => Err(CallError::Lost),
        };
        loop {
            match answer {
                Ok(ending) => {
                    self.metrics.spent(&ending);
                    return ending;
                }
                // Too many ask at once.
                Err(CallError::Failed(failure)) if failure.kind == FailureKind::Busy => tokio::time::sleep(BUSY_PAUSE).await,
                Err(CallError::Failed(failure)) => return self.infra_error(format!("the keeper does not know it: {failure}")),
                Err(CallError::Lost) => {}
            }
            // However long it takes: the next keeper has the record of this one's sandbox. Should none come, this service ends, and its successor asks.
            self.keeper.connected().await;
            if let Some(reason) = live.ordered_kill() {
                // The order may have been lost with the connection.
                self.kill(live, reason).await;
            }
            answer = match self.keeper.wait(id).await {
                Ok(answer) => answer.await,
                Err(error) => Err(error),
            };
        }
    }

    fn mark_running(&self, live: &Live) {
        let Some(launched) = live.launched() else { return };
        let (store, id, hold, started_at) = (self.store.clone(), live.sandbox.id, live.hold(), at_us(launched.started_at_us));
        let is_kept = live.keeping();
        // Not waited for: the end, should it come first, is guarded by the row's state.
        let marked = async move {
            match store.mark_running(id, hold, started_at, launched.fences).await {
                Ok(is_marked) => {
                    is_kept.fetch_or(is_marked, Ordering::Relaxed);
                    fail_point::reached("service.running.stored");
                }
                Err(error) => tracing::warn!(sandbox.id = %id, %error, "noting that it runs failed"),
            }
        };
        tokio::spawn(marked.in_current_span());
    }

    pub(super) async fn sleep_until(&self, at: Option<OffsetDateTime>) {
        match at {
            Some(at) => tokio::time::sleep((at - self.clock.now()).try_into().unwrap_or(Duration::ZERO)).await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn infra_error(&self, message: String) -> Box<Ending> {
        self.ending(Cause::InfraError { message })
    }

    fn keeper_silent(&self) -> Box<Ending> {
        self.infra_error("the keeper of this node did not answer".to_owned())
    }

    fn keeper_ended(&self) -> Box<Ending> {
        self.infra_error("the keeper of this node ended, and its sandboxes with it".to_owned())
    }

    /// An end of which nothing but the cause is known.
    pub(super) fn ending(&self, cause: Cause) -> Box<Ending> {
        Box::new(Ending {
            cause,
            launched: None,
            ended_at_us: unix_us(self.clock.now()),
            usage: sandbox_core::protocol::Usage::default(),
            limits_hit: vec![],
            oom_kills: 0,
            stdout_truncated: false,
            stderr_truncated: false,
        })
    }
}

fn launch_of(live: &Live, has_stdin: bool, has_files: bool) -> Launch {
    let sandbox = &live.sandbox;
    let limits = &sandbox.limits;
    let mut supervision = supervision(limits, sandbox.output_policy);
    if sandbox.kind == Kind::Pooled {
        // It begins when it is taken.
        supervision.wall_ms = None;
    }
    Launch {
        id: sandbox.id,
        image: sandbox.image.root.clone(),
        spec: sandbox::spec(sandbox.id, &sandbox.image.root, &sandbox.program, limits),
        isolation: sandbox.program.isolation,
        supervision,
        stdin: sandbox.program.stdin(has_stdin),
        has_files,
        terminal: sandbox.program.terminal,
        layer: live.layer(),
        keeps_layer: sandbox.keep_layer,
        volumes: sandbox.program.volumes.iter().map(Mount::order).collect(),
    }
}

/// What the keeper holds something to that has these limits.
pub(super) const fn supervision(limits: &Limits, output_policy: OutputPolicy) -> Supervision {
    Supervision {
        wall_ms: limits.wall_ms(),
        cpu_ms: limits.cpu_ms(),
        output_bytes: limits.output_bytes(),
        output_policy,
        medium: limits.disk_medium(),
        disk_bytes: limits.disk_bytes(),
        inodes: limits.inodes(),
        io: limits.io(),
    }
}
