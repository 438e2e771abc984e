//! The cases of a run: what each is given, what is expected of it, and what came of it.

use sandbox_core::{
    log::{Kind, Record},
    protocol::Usage,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{Comparer, Content, Finish, LogTail, Outcome, Reason, State, compile::together};

/// How the output of a case is held against what is expected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(default = "trimmed")]
pub enum Comparison {
    /// Byte by byte.
    Exact,
    /// White space at the ends of lines and empty lines at the end do not count.
    #[default]
    Trimmed,
}

/// How the cases of a run are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judging {
    pub comparison: Comparison,
    /// Whether the first case that is not accepted is the last that is run.
    pub stop_at_failure: bool,
}

/// A case as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCase {
    pub name: Option<String>,
    pub stdin: Option<Content>,
    pub expected_stdout: Option<Content>,
}

/// What came of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The program exited with 0, and wrote what was expected, if anything was.
    Accepted,
    /// It exited with 0, and wrote something else to its standard output, or more than was kept.
    WrongOutput,
    /// It did not exit with 0: its outcome says why.
    Failed,
    /// It is not over, or was never begun.
    NotRun,
}

/// One case of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    pub name: Option<String>,
    /// `None`: it is not over, or was never begun.
    pub end: Option<CaseEnd>,
}

/// How a case ended: what a run goes on by. What it wrote is not here: of all cases together, that is megabytes.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseEnd {
    pub verdict: Verdict,
    pub outcome: Outcome,
    /// Exact usage, for the ledger.
    pub used: Usage,
    pub started_at: Option<OffsetDateTime>,
    /// Bytes of its output that are stored.
    pub stored_bytes: u64,
}

/// What is stored of what a case wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaseOutput {
    pub stdout: Beginning,
    pub stderr: Beginning,
}

/// One case of a run, with what it wrote: nothing, before its end.
#[derive(Debug, Clone, PartialEq)]
pub struct ToldCase {
    /// Its place among all of its run's, from 0 on.
    pub index: usize,
    pub case: Case,
    pub output: CaseOutput,
}

/// The beginning of what was written to a stream and kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Beginning {
    pub bytes: Vec<u8>,
    /// Kept bytes that stand behind.
    pub omitted_bytes: u64,
}

impl CaseOutput {
    /// With at most so many bytes of each stream.
    #[must_use]
    pub fn shortened(mut self, most: usize) -> Self {
        self.stdout.shorten(most);
        self.stderr.shorten(most);
        self
    }

    fn stored_bytes(&self) -> u64 {
        (self.stdout.bytes.len() + self.stderr.bytes.len()) as u64
    }
}

impl Beginning {
    /// Not in the middle of a character, if one byte more than that is here.
    fn shorten(&mut self, most: usize) {
        let is_inside = |at: usize| self.bytes.get(at).is_some_and(|byte| byte & 0xc0 == 0x80);
        let nearest = most.saturating_sub(3);
        let end = (nearest..=most).rev().find(|at| !is_inside(*at)).unwrap_or(most);
        self.omitted_bytes += self.bytes.len().saturating_sub(end) as u64;
        self.bytes.truncate(end);
    }
}

/// What came of the cases of a run so far, in one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Judged {
    /// That of the run: there once no further case is to be begun.
    pub outcome: Option<Outcome>,
    /// Of all cases together.
    pub used: Usage,
    pub started_at: Option<OffsetDateTime>,
    /// Bytes of output that are stored.
    pub stored_bytes: u64,
}

/// Takes the records of a case's log one by one.
#[derive(Debug)]
pub struct CaseReader {
    comparer: Option<Comparer>,
    stdout: Beginning,
    stderr: Beginning,
}

impl Judging {
    /// The case to be run next; `None` if none is.
    pub fn next(self, cases: &[Case]) -> Option<usize> {
        let is_over = cases.iter().filter_map(|case| case.end.as_ref()).any(|end| end.ends_run(self));
        if is_over { None } else { cases.iter().position(|case| case.end.is_none()) }
    }

    /// What came of them so far.
    pub fn of(self, cases: &[Case]) -> Judged {
        let ends = || cases.iter().filter_map(|case| case.end.as_ref());
        let decides = || {
            let broken_off = ends().find(|end| end.breaks_off());
            broken_off.or_else(|| ends().find(|end| end.verdict != Verdict::Accepted)).or_else(|| ends().next_back())
        };
        Judged {
            outcome: if self.next(cases).is_none() { decides().map(|end| end.outcome.clone()) } else { None },
            used: ends().fold(Usage::default(), |all, end| together(&all, &end.used)),
            started_at: ends().find_map(|end| end.started_at),
            stored_bytes: ends().map(|end| end.stored_bytes).sum(),
        }
    }
}

impl Verdict {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::WrongOutput => "wrong_output",
            Self::Failed => "failed",
            Self::NotRun => "not_run",
        }
    }

    /// The verdict of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Accepted, Self::WrongOutput, Self::Failed, Self::NotRun].into_iter().find(|verdict| verdict.as_str() == name)
    }

    /// That of a run with these cases: `accepted` if every one is, else that of the first that is not; `None` if none are there: nothing is said of what is not kept any more.
    pub fn of_run<'a>(cases: impl IntoIterator<Item = &'a Case>) -> Option<Self> {
        let mut verdicts = cases.into_iter().map(Case::verdict).peekable();
        verdicts.peek()?;
        Some(verdicts.find(|verdict| *verdict != Self::Accepted).unwrap_or(Self::Accepted))
    }
}

impl Case {
    pub fn verdict(&self) -> Verdict {
        self.end.as_ref().map_or(Verdict::NotRun, |end| end.verdict)
    }
}

impl CaseEnd {
    /// This end, of which so much was read, and what of that is to be stored; a program that did not succeed failed, whatever it wrote.
    pub fn of(finish: Finish, read: CaseReader) -> (Self, CaseOutput) {
        let CaseReader { comparer, stdout, stderr } = read;
        let is_expected = comparer.is_none_or(|comparer| !finish.outcome.truncated.stdout && comparer.is_equal());
        let verdict = match (finish.outcome.is_success(), is_expected) {
            (false, _) => Verdict::Failed,
            (true, false) => Verdict::WrongOutput,
            (true, true) => Verdict::Accepted,
        };
        let Finish { outcome, used, started_at, .. } = finish;
        let output = CaseOutput { stdout: stdout.cut_between_characters(), stderr: stderr.cut_between_characters() };
        (Self { verdict, outcome, used, started_at, stored_bytes: output.stored_bytes() }, output)
    }

    /// Whether somebody, or a fault of ours, ended more than this case.
    fn breaks_off(&self) -> bool {
        match self.outcome.reason {
            Reason::IdleTimeout
            | Reason::StoppedByUser
            | Reason::StoppedByAdmin
            | Reason::Expired
            | Reason::Evicted
            | Reason::InfraError => true,
            Reason::Exited
            | Reason::Signaled
            | Reason::OomKilled
            | Reason::CpuTimeout
            | Reason::WallTimeout
            | Reason::OutputLimit
            | Reason::StartFailed
            | Reason::CompileFailed => false,
        }
    }

    fn ends_run(&self, judging: Judging) -> bool {
        self.breaks_off() || judging.stop_at_failure && self.verdict != Verdict::Accepted
    }
}

impl Beginning {
    /// How much of each stream is kept.
    pub const BYTES_MAX: usize = LogTail::STORED_BYTES;

    fn push(&mut self, data: &[u8]) {
        let (kept, omitted) = data.split_at(data.len().min(Self::BYTES_MAX - self.bytes.len()));
        self.bytes.extend_from_slice(kept);
        self.omitted_bytes += omitted.len() as u64;
    }

    /// Text stays text where it was cut in the middle of a character.
    fn cut_between_characters(mut self) -> Self {
        if self.omitted_bytes > 0
            && let Err(error) = std::str::from_utf8(&self.bytes)
            && error.error_len().is_none()
        {
            self.omitted_bytes += (self.bytes.len() - error.valid_up_to()) as u64;
            self.bytes.truncate(error.valid_up_to());
        }
        self
    }
}

impl CaseReader {
    /// Of a case from which something is expected, if anything is.
    pub fn new(comparer: Option<Comparer>) -> Self {
        Self { comparer, stdout: Beginning::default(), stderr: Beginning::default() }
    }

    /// How much of its standard output was logged.
    pub const fn stdout_bytes(&self) -> u64 {
        self.stdout.bytes.len() as u64 + self.stdout.omitted_bytes
    }

    pub fn push(&mut self, record: Record<'_>) {
        match record.kind {
            Kind::Stdout => {
                self.stdout.push(record.data);
                if let Some(comparer) = &mut self.comparer {
                    comparer.push(record.data);
                }
            }
            Kind::Stderr => self.stderr.push(record.data),
            Kind::End => {}
        }
    }
}

impl Finish {
    /// This end of a run whose cases came to that: the outcome is theirs, if they came to one, and what all used is in the ledger.
    #[must_use]
    pub fn judged(mut self, judged: &Judged) -> Self {
        self.used = together(&self.used, &judged.used);
        self.started_at = judged.started_at.or(self.started_at);
        if let Some(outcome) = &judged.outcome {
            let is_failed = matches!(outcome.reason, Reason::StartFailed | Reason::InfraError) || outcome.launch.is_none();
            self.state = if is_failed { State::Failed } else { State::Exited };
            self.outcome = outcome.clone();
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use sandbox_core::protocol::{Cause, KillReason};

    use super::*;
    use crate::sandbox::{Kind as SandboxKind, Limits, Phases, RequestedLimits};

    fn finish(cause: Cause) -> Finish {
        let limits = Limits::of(SandboxKind::Run, RequestedLimits::default()).unwrap();
        Finish::without_usage(cause, OffsetDateTime::UNIX_EPOCH, &limits, Phases::default())
    }

    fn read(expected: Option<&[u8]>, written: &[u8]) -> CaseReader {
        let mut reader = CaseReader::new(expected.map(|expected| Comparer::new(Comparison::Trimmed, expected)));
        reader.push(Record { kind: Kind::Stdout, seq: 0, at_us: 1, data: written });
        reader
    }

    fn ended(cause: Cause, expected: Option<&[u8]>) -> Case {
        let (end, _) = CaseEnd::of(finish(cause), read(expected, b"7\n"));
        Case { name: None, end: Some(end) }
    }

    fn accepted() -> Case {
        ended(Cause::Exited { code: 0 }, Some(b"7"))
    }

    const OPEN: Case = Case { name: None, end: None };
    const ALL: Judging = Judging { comparison: Comparison::Trimmed, stop_at_failure: false };
    const UP_TO_FAILURE: Judging = Judging { stop_at_failure: true, ..ALL };

    #[test]
    fn the_verdict_is_of_the_exit_first_and_of_the_output_then() {
        assert_eq!(accepted().verdict(), Verdict::Accepted);
        assert_eq!(ended(Cause::Exited { code: 0 }, None).verdict(), Verdict::Accepted);
        assert_eq!(ended(Cause::Exited { code: 0 }, Some(b"8")).verdict(), Verdict::WrongOutput);
        assert_eq!(ended(Cause::Exited { code: 1 }, Some(b"7")).verdict(), Verdict::Failed);
        assert_eq!(ended(Cause::WallTimeout, None).verdict(), Verdict::Failed);
        assert_eq!(OPEN.verdict(), Verdict::NotRun);
    }

    #[test]
    fn output_that_was_not_kept_to_its_end_is_not_what_was_expected() {
        let mut cut = finish(Cause::Exited { code: 0 });
        cut.outcome.truncated.stdout = true;
        assert_eq!(CaseEnd::of(cut, read(Some(b"7"), b"7\n")).0.verdict, Verdict::WrongOutput);
    }

    #[test]
    fn a_run_has_the_outcome_and_the_verdict_of_the_first_case_that_is_not_accepted() {
        let cases = [accepted(), ended(Cause::Exited { code: 3 }, None), ended(Cause::WallTimeout, None)];
        let outcome = ALL.of(&cases).outcome.unwrap();
        assert_eq!((outcome.exit_code, Verdict::of_run(&cases)), (Some(3), Some(Verdict::Failed)));
        assert_eq!(ALL.of(&[accepted(), accepted()]).outcome.unwrap().exit_code, Some(0));
        assert_eq!(Verdict::of_run(&[accepted(), accepted()]), Some(Verdict::Accepted));
        assert_eq!(Verdict::of_run(&[]), None);
    }

    #[test]
    fn the_next_case_is_the_first_that_has_no_end() {
        assert_eq!(ALL.next(&[accepted(), ended(Cause::WallTimeout, None), OPEN, OPEN]), Some(2));
        assert_eq!(ALL.next(&[accepted()]), None);
        assert_eq!(ALL.of(&[accepted(), OPEN]).outcome, None);
    }

    #[test]
    fn a_failure_is_the_last_where_that_was_asked_for() {
        assert_eq!(UP_TO_FAILURE.next(&[accepted(), OPEN]), Some(1));
        assert_eq!(UP_TO_FAILURE.next(&[ended(Cause::Exited { code: 1 }, None), OPEN]), None);
    }

    #[test]
    fn whoever_ends_a_case_by_order_ends_the_run() {
        let cases = [ended(Cause::Exited { code: 0 }, Some(b"8")), ended(Cause::Killed(KillReason::StoppedByUser), None), OPEN];
        assert_eq!(ALL.next(&cases), None);
        assert_eq!(ALL.of(&cases).outcome.unwrap().reason, Reason::StoppedByUser);
        assert_eq!(ALL.next(&[ended(Cause::InfraError { message: "gone".into() }, None), OPEN]), None);
    }

    #[test]
    fn of_each_stream_the_beginning_is_kept_in_whole_characters() {
        let long = "ä".repeat(Beginning::BYTES_MAX);
        let mut reader = CaseReader::new(None);
        reader.push(Record { kind: Kind::Stdout, seq: 0, at_us: 1, data: b"x" });
        reader.push(Record { kind: Kind::Stdout, seq: 1, at_us: 1, data: long.as_bytes() });
        let (end, CaseOutput { stdout, .. }) = CaseEnd::of(finish(Cause::Exited { code: 0 }), reader);
        assert_eq!((stdout.bytes.len(), end.stored_bytes), (Beginning::BYTES_MAX - 1, stdout.bytes.len() as u64));
        assert_eq!(stdout.omitted_bytes, (long.len() + 1 - stdout.bytes.len()) as u64);
        assert!(std::str::from_utf8(&stdout.bytes).is_ok());
    }

    #[test]
    fn what_is_shown_less_of_ends_between_two_characters() {
        let of = |most| {
            let mut beginning = Beginning { bytes: "grün".into(), omitted_bytes: 7 };
            beginning.shorten(most);
            (String::from_utf8(beginning.bytes).unwrap(), beginning.omitted_bytes)
        };
        assert_eq!(
            [of(0), of(2), of(3), of(4), of(5), of(9)].map(|(text, omitted)| format!("{text} {omitted}")),
            [" 12", "gr 10", "gr 10", "grü 8", "grün 7", "grün 7"]
        );
    }
}
