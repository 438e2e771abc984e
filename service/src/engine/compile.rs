//! The compile step of a run: a sandbox before the program's, whose layer the program is started on.
//!
//! The keeper knows it by a name that follows from the run's, so it is found, and what it left is given up, without a word in Postgres. Its record and its layer stay until the end of the run is
//! stored: whoever takes the run over learns from the record how it was compiled. A service that dies before the program is begun leaves a run that was not begun, which is compiled anew.

use std::{os::fd::OwnedFd, time::Duration};

use sandbox_core::{
    fail_point,
    protocol::{Cause, Ending, Launch, Layering, OutputPolicy, Stdin},
};
use tracing::Instrument as _;

use super::{
    Engine,
    carry::{Course, Started, launch_span, supervision},
    live::Live,
    settle::phases,
};
use crate::{
    clock::at_us,
    sandbox::{self, Compile, CompileEnd, Finish, LogTail, Mount, Records, SandboxId, step_id},
};

/// How long the end of a step, and of what it left, is waited for where it is to be cleared away.
const CLEAR_PATIENCE: Duration = Duration::from_secs(10);

impl Engine {
    /// Runs the step before the program. `Some`: the program is not to be started.
    pub(super) async fn compile(&self, live: &Live, step: &Compile, files: &[OwnedFd]) -> Option<Course> {
        let id = step_id(live.sandbox.id);
        let ending = match self.launch(launch_of_step(live, step, !files.is_empty()), files).instrument(launch_span()).await {
            Started::Over(ending) => ending,
            Started::NotBegun => return Some(Course::NotBegun(None)),
            Started::NotHere(ending) => return Some(Course::NotBegun(Some(ending))),
            Started::WithKeeper { launched, wait } => {
                if let Some(launched) = launched {
                    self.note_launch(live, &launched);
                }
                if let Some(reason) = live.ordered_kill() {
                    // Ordered while the keeper may not have known of it.
                    self.kill(live, reason).await;
                }
                self.wait_for_end(live, id, wait).await
            }
        };
        fail_point::reached("service.compile.ended");
        self.note_step(live, step, &ending).await;
        let cause = match (ending.cause, live.ordered_kill()) {
            (Cause::Exited { code: 0 }, None) => return None,
            // Who ordered that spoke of the run, whatever of it there was then.
            (_, Some(reason)) | (Cause::Killed(reason), None) => Cause::Killed(reason),
            (Cause::InfraError { message }, None) => Cause::InfraError { message: format!("its compile step failed: {message}") },
            (
                Cause::Exited { .. }
                | Cause::Signaled { .. }
                | Cause::OomKilled
                | Cause::CpuTimeout
                | Cause::WallTimeout
                | Cause::OutputLimit
                | Cause::StartFailed { .. },
                None,
            ) => Cause::StartFailed { message: "it was not compiled".to_owned() },
        };
        Some(Course::Ended(self.ending(cause)))
    }

    /// Learns how the step ended before a program that is taken over.
    pub(super) async fn recall_step(&self, live: &Live) {
        let Some(step) = &live.sandbox.compile else { return };
        let id = step_id(live.sandbox.id);
        match self.in_time(async { self.keeper.wait(id).await?.await }).await {
            Ok(ending) => self.note_step(live, step, &ending).await,
            Err(error) => tracing::warn!(sandbox.id = %live.sandbox.id, %error, "how it was compiled is not known any more"),
        }
    }

    async fn note_step(&self, live: &Live, step: &Compile, ending: &Ending) {
        let finish = Finish::of(ending, &step.limits, phases(live, at_us(ending.ended_at_us)));
        let log_tail = self.read_tail(step_id(live.sandbox.id), Records::Joined).await.unwrap_or_else(|| LogTail {
            bytes: vec![],
            stdout_omitted_bytes: ending.usage.stdout_bytes.min(step.limits.output_bytes()),
            stderr_omitted_bytes: ending.usage.stderr_bytes.min(step.limits.output_bytes()),
        });
        live.note_compiled(CompileEnd { outcome: finish.outcome, log_tail }, ending.usage);
    }

    /// [`Engine::clear_parts`] of a run that needs them no more. What cannot be done now is done by the next look at what nobody follows.
    pub(super) async fn clear_parts_of(&self, live: &Live) {
        let cleared = tokio::time::timeout(CLEAR_PATIENCE, self.clear_parts(live)).await;
        if cleared != Ok(true) {
            tracing::debug!(sandbox.id = %live.sandbox.id, "its compile step, or a case, is not cleared away yet");
        }
    }

    /// Clears away what there may be of this run beside itself: its cases, and then the step that they are over. False if that cannot be done now.
    pub(super) async fn clear_parts(&self, live: &Live) -> bool {
        let id = live.sandbox.id;
        (live.sandbox.judging.is_none() || self.clear_cases(&live.sandbox).await)
            && (live.sandbox.compile.is_none() || self.clear_step(id).await)
    }

    /// Has the keeper end what there may be of this run's compile step, give up what that wrote, and then forget it. False if that cannot be done now.
    pub(super) async fn clear_step(&self, run: SandboxId) -> bool {
        let id = step_id(run);
        self.end_leftover(id).await;
        // The record last: by that it is found, should we die here.
        let is_given_up = self.drop_layer(id).await.is_ok();
        fail_point::reached("service.compile.given_up");
        is_given_up && self.forget(id).await
    }
}

fn launch_of_step(live: &Live, step: &Compile, has_files: bool) -> Launch {
    let run = &live.sandbox;
    let id = step_id(run.id);
    Launch {
        id,
        image: run.image.root.clone(),
        spec: sandbox::spec(id, &run.image.root, &step.program, &step.limits),
        isolation: step.program.isolation,
        supervision: supervision(&step.limits, OutputPolicy::Truncate),
        stdin: Stdin::Null,
        has_files,
        terminal: None,
        layer: Layering::Fresh,
        keeps_layer: true,
        volumes: step.program.volumes.iter().map(Mount::order).collect(),
    }
}
