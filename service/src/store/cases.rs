//! Table `run_cases`: what the cases of a run are given, and what came of each.

use serde_json::Value;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::{Hold, Input, Store, StoreError, bigint, damaged, sandboxes::id_at, unsigned};
use crate::sandbox::{Beginning, Case, CaseEnd, NewCase, SandboxId, Verdict};

/// The cases of a new run, column by column.
pub(super) struct Columns<'a> {
    pub(super) names: Vec<Option<&'a str>>,
    pub(super) stdins: Vec<Option<&'a [u8]>>,
    pub(super) expecteds: Vec<Option<&'a [u8]>>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(cases: &'a [NewCase]) -> Self {
        Self {
            names: cases.iter().map(|case| case.name.as_deref()).collect(),
            stdins: cases.iter().map(|case| case.stdin.as_ref().map(|content| content.0.as_slice())).collect(),
            expecteds: cases.iter().map(|case| case.expected_stdout.as_ref().map(|content| content.0.as_slice())).collect(),
        }
    }
}

struct Row {
    name: Option<String>,
    verdict: Option<String>,
    outcome: Option<Value>,
    used: Option<Value>,
    started_at: Option<OffsetDateTime>,
    stdout: Option<Vec<u8>>,
    stderr: Option<Vec<u8>>,
    stdout_omitted_bytes: i64,
    stderr_omitted_bytes: i64,
}

impl Row {
    fn read(self) -> Result<Case, StoreError> {
        let Some(((verdict, outcome), used)) = self.verdict.zip(self.outcome).zip(self.used) else {
            return Ok(Case { name: self.name, end: None });
        };
        let unreadable = |column: &str, error: serde_json::Error| damaged(format_args!("a {column} that cannot be read: {error}"));
        let end = CaseEnd {
            verdict: Verdict::named(&verdict).ok_or_else(|| damaged(format_args!("the verdict {verdict}")))?,
            outcome: serde_json::from_value(outcome).map_err(|error| unreadable("case's outcome", error))?,
            used: serde_json::from_value(used).map_err(|error| unreadable("case's usage", error))?,
            started_at: self.started_at,
            stdout: Beginning { bytes: self.stdout.unwrap_or_default(), omitted_bytes: unsigned(self.stdout_omitted_bytes) },
            stderr: Beginning { bytes: self.stderr.unwrap_or_default(), omitted_bytes: unsigned(self.stderr_omitted_bytes) },
        };
        Ok(Case { name: self.name, end: Some(end) })
    }
}

impl Store {
    /// The cases of this run, in their order.
    pub async fn cases_of(&self, run: SandboxId) -> Result<Vec<Case>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select name, verdict, outcome, used, started_at, stdout, stderr, stdout_omitted_bytes, stderr_omitted_bytes
            from run_cases where run = $1 order by index",
            run.0,
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// What this case reads; `None` if there is nothing to read.
    pub async fn case_stdin(&self, run: SandboxId, index: usize) -> Result<Option<Vec<u8>>, StoreError> {
        let found = sqlx::query_scalar!("select stdin from run_cases where run = $1 and index = $2", run.0, number(index));
        Ok(found.fetch_optional(&self.pool).await?.flatten())
    }

    /// What this case is to write; `None` if that does not matter.
    pub async fn case_expected(&self, run: SandboxId, index: usize) -> Result<Option<Vec<u8>>, StoreError> {
        let found = sqlx::query_scalar!("select expected from run_cases where run = $1 and index = $2", run.0, number(index));
        Ok(found.fetch_optional(&self.pool).await?.flatten())
    }

    /// What a run that was claimed was given at its admission.
    pub async fn kept_input(&self, run: SandboxId) -> Result<Input, StoreError> {
        let input = sqlx::query_as!(Input, "select files, stdin from inputs where sandbox = $1", run.0);
        Ok(input.fetch_optional(&self.pool).await?.unwrap_or_default())
    }

    /// Stores the end of a case, however often that is said. False if the run is somebody else's by now, or has ended.
    pub async fn finish_case(&self, run: SandboxId, hold: Hold, index: usize, end: &CaseEnd) -> Result<bool, StoreError> {
        let CaseEnd { verdict, outcome, used, started_at, stdout, stderr } = end;
        let done = sqlx::query!(
            "with held as (
                select id from sandboxes
                where id = $1 and state in ('starting', 'running', 'paused') and node = $3 and epoch = $4 and claims = $5
                -- nobody takes it over, or settles it, in between
                for share
            )
            update run_cases
            set verdict = $6, outcome = $7, used = $8, started_at = $9, stdout = $10, stderr = $11, stdout_omitted_bytes = $12,
                stderr_omitted_bytes = $13
            from held where run = held.id and index = $2",
            run.0,
            number(index),
            hold.lease.node.0,
            bigint(hold.lease.epoch),
            bigint(hold.claims),
            verdict.as_str(),
            Json(outcome) as _,
            Json(used) as _,
            *started_at as _,
            stdout.bytes,
            stderr.bytes,
            bigint(stdout.omitted_bytes),
            bigint(stderr.omitted_bytes),
        )
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Removes cases of runs that ended before this time and are about to be removed, a few at a time: of one run alone they can be megabytes.
    /// Answers how many.
    pub async fn prune_cases(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from run_cases using (
                select run, index from run_cases join sandboxes on sandboxes.id = run_cases.run
                where run < $3 and state in ('exited', 'failed') and finished_at < $1 and not has_log_file and not keep_layer
                order by run, index
                limit $2
            ) as old
            where run_cases.run = old.run and run_cases.index = old.index",
            before,
            i64::from(limit),
            id_at(before),
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }
}

fn number(index: usize) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
