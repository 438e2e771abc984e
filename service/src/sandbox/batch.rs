//! What a caller asks for who wants many runs at once: a list whose members are read one by one, so that a bad one is no fault of the others.

use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{Invalid, RunRequest, WAIT_MS};

/// The most runs of one request, and of one answer.
pub const RUNS_MAX: usize = 100;
const _: () = assert!(RUNS_MAX == 100, "the contract of `runs` says so too, and takes nothing but a literal");

/// Body of `POST /v1/runs/batch`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchRequest {
    /// Each as the body of `POST /v1/runs`; its `wait_ms` counts for nothing. What is wrong with one is told in its place of the answer, and is no fault of the others.
    #[schema(value_type = Vec<RunRequest>, min_items = 1, max_items = 100)]
    runs: Vec<Box<RawValue>>,
    /// How long to wait for the end of all of them, in milliseconds.
    #[schema(extensions(("x-bound" = json!(WAIT_MS))))]
    wait_ms: Option<u64>,
}

impl BatchRequest {
    /// The runs, unread, and how long to wait for their ends, in milliseconds; or the first field that is wrong.
    pub fn parse(self) -> Result<(Vec<Box<RawValue>>, u64), Invalid> {
        if !(1..=RUNS_MAX).contains(&self.runs.len()) {
            return Err(Invalid::new("runs", format!("{} runs are not 1 to {RUNS_MAX}", self.runs.len())));
        }
        let wait_ms = match self.wait_ms {
            Some(ms) => WAIT_MS.check(ms)?,
            None => WAIT_MS.default.unwrap_or(WAIT_MS.min),
        };
        Ok((self.runs, wait_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(runs: usize, wait_ms: Option<u64>) -> Result<(usize, u64), Invalid> {
        let runs = (0..runs).map(|number| RawValue::from_string(number.to_string()).unwrap()).collect();
        BatchRequest { runs, wait_ms }.parse().map(|(runs, wait_ms)| (runs.len(), wait_ms))
    }

    #[test]
    fn a_batch_has_one_run_to_a_hundred() {
        assert_eq!(parsed(1, Some(0)), Ok((1, 0)));
        assert_eq!(parsed(RUNS_MAX, None), Ok((100, 30_000)));
        assert_eq!(parsed(0, None).unwrap_err().field, "runs");
        assert_eq!(parsed(101, None).unwrap_err().field, "runs");
    }

    #[test]
    fn its_waiting_has_the_bound_of_a_runs() {
        assert_eq!(parsed(1, Some(WAIT_MS.max + 1)).unwrap_err().bound, Some(&WAIT_MS));
    }
}
