//! The cases of a run: its program is run once for each, one after another.
//!
//! The end of a case is stored before the keeper forgets it, and only then is the next begun. So whoever takes the run over, after whatever death, finds the first case without a stored end
//! either with the keeper, and goes on from there, or not begun: none is run twice, and none is lost. Two names are enough to tell one case from the next ([`case_id`]).

use std::{future::Pending, io, sync::Arc, time::Duration};

use sandbox_core::{
    fail_point,
    protocol::{Cause, Ending, Failure, Launch, Launched, Layering, Record},
};
use tracing::Instrument as _;

use super::{
    Engine, EngineError,
    capacity::Reservation,
    carry::{Course, Started, launch_span, supervision},
    input,
    live::Live,
    settle::{After, phases},
};
use crate::{
    clock::at_us,
    runtime::CallError,
    sandbox::{
        self, Case, CaseEnd, CaseOutput, CaseReader, Comparer, Comparison, Finish, Judged, Judging, Mount, Reason, Sandbox, SandboxId,
        ToldCase, case_id, case_ids, step_id,
    },
    store::{Input, Return, StoreError},
    telemetry::TRACE,
};

const SUCCESS: Cause = Cause::Exited { code: 0 };
/// Between two tries to have a case forgotten, or its log read.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a log is tried that cannot be read.
const READ_ATTEMPTS: u32 = 20;
/// How often the keeper is asked to forget a case that it refuses to.
const FORGET_ATTEMPTS: u32 = 200;

impl Engine {
    /// What came of the cases of this run so far, with at most so many bytes of each stream of all of them together; `None` if it has none.
    pub async fn cases_of(&self, run: &Sandbox, stream_bytes: usize) -> Result<Option<Vec<ToldCase>>, EngineError> {
        if run.judging.is_none() {
            return Ok(None);
        }
        Ok(Some(self.store.told_cases(run.id, stream_bytes).await?))
    }

    /// Runs the cases from the first on whose end is not stored; that one may be with the keeper already, started like that.
    pub(super) async fn judge(
        &self,
        live: &Arc<Live>,
        judging: Judging,
        input: &Arc<Input>,
        mut adopted: Option<Option<Launched>>,
    ) -> Course {
        let id = live.sandbox.id;
        let mut cases = self.until_heard(id, || self.store.cases_of(id)).await;
        // Its end was stored by a service that had no time to say so.
        let mut over = adopted.as_ref().and_then(|_| judging.next(&cases)?.checked_sub(1));
        loop {
            live.note_judged(judging.of(&cases));
            let next = judging.next(&cases);
            if let Some(before) = over
                && let Err(failure) = self.forget_case(live, before).await
                && next.is_some()
            {
                return Course::Ended(self.infra_error(format!("what its node has of case {before} cannot be dropped: {failure}")));
            }
            let Some(index) = next else { return Course::Ended(self.ending_of(&cases)) };
            let ended = match adopted.take() {
                Some(launched) => Ok(self.follow_adopted(live, index, launched).await),
                None => {
                    let span = tracing::debug_span!(target: TRACE, "case", case.index = index);
                    self.run_case(live, index, input).instrument(span).await
                }
            };
            let ending = match ended {
                Ok(ending) => ending,
                Err(course) => return course,
            };
            fail_point::reached("service.case.ended");
            let (end, output) = self.end_of_case(live, judging, index, &ending).await;
            if !self.until_clear(live, |hold| self.store.finish_case(id, hold, index, &end, &output)).await {
                return Course::NotOurs;
            }
            fail_point::reached("service.case.stored");
            if let Some(case) = cases.get_mut(index) {
                case.end = Some(end);
            }
            over = Some(index);
        }
    }

    /// Takes over a run with cases, of which the keeper has these records of this claim.
    pub(super) async fn adopt_cases(
        self: Arc<Self>,
        live: Arc<Live>,
        judging: Judging,
        records: [Option<Record>; 2],
        is_same_keeper: bool,
        reservation: Reservation,
    ) {
        let known = self.live.known(Arc::clone(&live));
        let id = live.sandbox.id;
        live.give_room(reservation);
        let cases = self.until_heard(id, || self.store.cases_of(id)).await;
        let next = judging.next(&cases);
        let [even, odd] = records;
        let record = next.and_then(|index| if index % 2 == 0 { even } else { odd });
        // Where there is a step, its files were for that.
        let input = match live.sandbox.compile {
            None => self.until_heard(id, || self.store.kept_input(id)).await,
            Some(_) => Input::default(),
        };
        let input = Arc::new(input);
        let after = if next.is_some() && record.is_none() && is_same_keeper {
            // It would know the case if it had been begun. What came of those before is stored, and compiling again harms nobody.
            live.free_room();
            self.give_back(&live, Return::NotBegun { input: &input, until: None }).await
        } else {
            self.recall_step(&live).await;
            let course = if next.is_some() && record.is_none() {
                live.note_judged(judging.of(&cases));
                Course::Ended(
                    self.infra_error("its node's keeper never got the order to start its next case, or has lost the record".to_owned()),
                )
            } else {
                self.judge(&live, judging, &input, record.map(|record| record.launched)).await
            };
            self.conclude(&live, course, &input).await
        };
        if after == After::Waits {
            known.keep();
        }
    }

    /// This end of a sandbox that nobody follows, with what was stored of its cases, if it is a run that has some; and how much of their output is stored.
    pub(super) async fn behind_cases(&self, sandbox: &Sandbox, finish: Finish) -> Result<(Finish, u64), StoreError> {
        let Some(judging) = sandbox.judging else { return Ok((finish, 0)) };
        let so_far = judging.of(&self.store.cases_of(sandbox.id).await?);
        // Whatever they came to, this is what ends it.
        let judged = Judged { outcome: None, ..so_far };
        Ok((finish.judged(&judged), judged.stored_bytes))
    }

    /// Knows what was stored of the cases of a run that is gone on with, whatever ends it before the next.
    pub(super) async fn recall_cases(&self, live: &Live) {
        if let Some(judging) = live.sandbox.judging.filter(|_| live.sandbox.claims > 1) {
            let cases = self.until_heard(live.sandbox.id, || self.store.cases_of(live.sandbox.id)).await;
            live.note_judged(Judged { outcome: None, ..judging.of(&cases) });
        }
    }

    /// Has the keeper end and forget what it may still have of this run's cases, by whichever claim. False if that cannot be done now.
    pub(super) async fn clear_cases(&self, run: &Sandbox) -> bool {
        let mut is_cleared = true;
        for id in case_ids(run.id, run.claims) {
            self.end_leftover(id).await;
            is_cleared &= self.forget(id).await;
        }
        is_cleared
    }

    async fn run_case(&self, live: &Live, index: usize, input: &Arc<Input>) -> Result<Box<Ending>, Course> {
        if let Some(reason) = live.ordered_kill() {
            return Err(Course::Ended(self.ending(Cause::Killed(reason))));
        }
        let run = &live.sandbox;
        let stdin = self.until_heard(run.id, || self.store.case_stdin(run.id, index)).await;
        let has_stdin = stdin.is_some();
        let files = if run.compile.is_none() { Some(Arc::clone(input)) } else { None };
        let descriptors = async {
            let mut descriptors = input::descriptors(Arc::new(Input { files: None, stdin })).await?;
            if let Some(files) = files {
                descriptors.extend(input::descriptors(files).await?);
            }
            Ok::<_, io::Error>(descriptors)
        };
        let descriptors = match descriptors.await {
            Ok(descriptors) => descriptors,
            Err(error) => return Ok(self.infra_error(format!("its input could not be handed over: {error}"))),
        };
        let has_files = descriptors.len() > usize::from(has_stdin);
        match self.launch(launch_of_case(live, index, has_stdin, has_files), &descriptors).instrument(launch_span()).await {
            Started::Over(ending) => Ok(ending),
            Started::NotBegun => Err(Course::NotBegun(None)),
            Started::NotHere(ending) => Err(Course::NotBegun(Some(ending))),
            Started::WithKeeper { launched, wait } => {
                drop(descriptors);
                fail_point::reached("service.case.begun");
                if let Some(launched) = launched {
                    self.note_running(live, launched);
                    self.note_launch(live, &launched);
                }
                if let Some(reason) = live.ordered_kill() {
                    // Ordered while the keeper may not have known of it.
                    self.kill(live, reason).await;
                }
                Ok(self.follow(live, case_id(run.id, run.claims, index), wait).await)
            }
        }
    }

    async fn follow_adopted(&self, live: &Live, index: usize, launched: Option<Launched>) -> Box<Ending> {
        if let Some(launched) = launched {
            self.note_running(live, launched);
        }
        let run = &live.sandbox;
        self.follow(live, case_id(run.id, run.claims, index), None::<Pending<_>>).await
    }

    /// A run has run since the first of its cases does.
    fn note_running(&self, live: &Live, launched: Launched) {
        if live.launched().is_none() {
            live.running(launched);
        }
    }

    /// What came of a case that ended like this. One whose output cannot be read was failed by us.
    async fn end_of_case(&self, live: &Live, judging: Judging, index: usize, ending: &Ending) -> (CaseEnd, CaseOutput) {
        let id = live.sandbox.id;
        let expected = self.until_heard(id, || self.store.case_expected(id, index)).await.map(Arc::new);
        let finish = |ending: &Ending| Finish::of(ending, &live.limits(), phases(live, at_us(ending.ended_at_us)));
        match self.read_case(case_id(id, live.sandbox.claims, index), judging.comparison, expected).await {
            // What a full disk of ours lost is no fault of the program's.
            Ok(read) if ending.cause == SUCCESS && read.stdout_bytes() < ending.usage.stdout_bytes.min(live.limits().output_bytes()) => {
                CaseEnd::of(finish(&failed_by_us(ending, "its node lost some of its output")), read)
            }
            Ok(read) => CaseEnd::of(finish(ending), read),
            Err(error) => {
                tracing::error!(sandbox.id = %id, index, %error, "reading the log of a case failed");
                CaseEnd::of(finish(&failed_by_us(ending, "its output could not be read")), CaseReader::new(None))
            }
        }
    }

    async fn read_case(&self, id: SandboxId, comparison: Comparison, expected: Option<Arc<Vec<u8>>>) -> io::Result<CaseReader> {
        let mut attempt = 0;
        loop {
            let reader = CaseReader::new(expected.as_ref().map(|expected| Comparer::new(comparison, expected)));
            match self.logs.read_into(id, reader, CaseReader::push).await {
                Err(error) if attempt >= READ_ATTEMPTS => return Err(error),
                Err(_) => attempt += 1,
                Ok(read) => return Ok(read),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Has the keeper forget a case whose end is stored: the second after it has the same name. Tried until it is done, or the keeper is gone for good; fails where the keeper is there and
    /// does not do it, however often it is asked.
    async fn forget_case(&self, live: &Live, index: usize) -> Result<(), Failure> {
        let id = case_id(live.sandbox.id, live.sandbox.claims, index);
        let mut refusals = 0;
        loop {
            match self.keeper.forget(id).await {
                Ok(()) => return Ok(()),
                Err(CallError::Failed(failure)) => {
                    refusals += 1;
                    if refusals == FORGET_ATTEMPTS {
                        tracing::error!(sandbox.id = %live.sandbox.id, index, %failure, "the keeper does not forget a case");
                        return Err(failure);
                    }
                }
                Err(CallError::Lost) => {}
            }
            tokio::time::sleep(PAUSE).await;
            if self.keeper_back().await.is_none() {
                return Ok(());
            }
        }
    }

    /// Under which end a run is settled whose cases are over: what they came to says the rest ([`Finish::judged`]).
    fn ending_of(&self, cases: &[Case]) -> Box<Ending> {
        let outcomes = cases.iter().filter_map(|case| case.end.as_ref()).map(|end| &end.outcome);
        match outcomes.into_iter().find(|outcome| outcome.reason == Reason::InfraError) {
            Some(fault) => self.infra_error(fault.message.clone()),
            None => self.ending(SUCCESS),
        }
    }
}

/// It ran, and used what it did; what it came to nobody can say.
fn failed_by_us(ending: &Ending, message: &str) -> Ending {
    Ending { cause: Cause::InfraError { message: message.to_owned() }, ..ending.clone() }
}

fn launch_of_case(live: &Live, index: usize, has_stdin: bool, has_files: bool) -> Launch {
    let run = &live.sandbox;
    let id = case_id(run.id, run.claims, index);
    Launch {
        id,
        image: run.image.root.clone(),
        spec: sandbox::spec(id, &run.image.root, &run.program, &run.limits),
        isolation: run.program.isolation,
        supervision: supervision(&run.limits, run.output_policy),
        stdin: run.program.stdin(has_stdin),
        has_files,
        terminal: None,
        layer: if run.compile.is_some() { Layering::Over(step_id(run.id)) } else { Layering::Fresh },
        keeps_layer: false,
        volumes: run.program.volumes.iter().map(Mount::order).collect(),
    }
}
