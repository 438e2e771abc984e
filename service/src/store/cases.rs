//! Table `run_cases`: what the cases of a run are given, and what came of each.

use sandbox_core::protocol::Usage;
use serde_json::Value;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::{Hold, Input, Store, StoreError, bigint, bytes_at_most, sandboxes::id_at, unsigned};
use crate::sandbox::{Beginning, Case, CaseEnd, CaseOutput, NewCase, Outcome, SandboxId, ToldCase, Verdict};

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
    stored_bytes: i64,
}

impl Row {
    /// Whatever it holds: nobody would ever read more of it, and what waits for that would wait for good.
    fn read(self) -> Case {
        let Some(((verdict, outcome), used)) = self.verdict.zip(self.outcome).zip(self.used) else {
            return Case { name: self.name, end: None };
        };
        let verdict = Verdict::named(&verdict);
        let read = || -> Result<(Outcome, Usage), String> {
            let unreadable = |column: &str, error: serde_json::Error| format!("{column} of a case cannot be read: {error}");
            let outcome = serde_json::from_value(outcome).map_err(|error| unreadable("the outcome", error))?;
            let used = serde_json::from_value(used).map_err(|error| unreadable("the usage", error))?;
            verdict.is_some().then_some((outcome, used)).ok_or_else(|| "the verdict of a case cannot be read".to_owned())
        };
        let (outcome, used) = read().unwrap_or_else(|fault| (Outcome::of_fault(fault), Usage::default()));
        let (verdict, stored_bytes) = (verdict.unwrap_or(Verdict::Failed), unsigned(self.stored_bytes));
        Case { name: self.name, end: Some(CaseEnd { verdict, outcome, used, started_at: self.started_at, stored_bytes }) }
    }
}

/// The beginning of a stream that begins with these bytes, and of which so many are stored and so many more were written.
fn beginning(bytes: Option<Vec<u8>>, stored_bytes: i32, omitted_bytes: i64) -> Beginning {
    let bytes = bytes.unwrap_or_default();
    let unread = unsigned(stored_bytes.into()).saturating_sub(bytes.len() as u64);
    Beginning { bytes, omitted_bytes: unsigned(omitted_bytes) + unread }
}

impl Store {
    /// The cases of this run, in their order, and how those ended that have. One whose end cannot be read ended by a fault of ours, which ends its run.
    pub async fn cases_of(&self, run: SandboxId) -> Result<Vec<Case>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            r#"select name, verdict, outcome, used, started_at,
                (coalesce(octet_length(stdout), 0) + coalesce(octet_length(stderr), 0))::bigint as "stored_bytes!"
            from run_cases where run = $1 order by index"#,
            run.0,
        );
        Ok(rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect())
    }

    /// The same with what they wrote: of all of them together at most so many bytes of each stream, to each its share.
    pub async fn told_cases(&self, run: SandboxId, stream_bytes: usize) -> Result<Vec<ToldCase>, StoreError> {
        let rows = sqlx::query!(
            r#"select index, name, verdict, outcome, used, started_at,
                coalesce(octet_length(stdout), 0) as "stdout_bytes!", coalesce(octet_length(stderr), 0) as "stderr_bytes!",
                stdout_omitted_bytes, stderr_omitted_bytes,
                -- by the byte behind it is known whether that is the end of a character
                substring(stdout from 1 for ($2::bigint / count(*) over () + 1)::integer) as stdout,
                substring(stderr from 1 for ($2::bigint / count(*) over () + 1)::integer) as stderr
            from run_cases where run = $1 order by index"#,
            run.0,
            bytes_at_most(stream_bytes),
        )
        .fetch_all(&self.pool)
        .await?;
        let share = stream_bytes / rows.len().max(1);
        let told = rows.into_iter().map(|row| {
            let output = CaseOutput {
                stdout: beginning(row.stdout, row.stdout_bytes, row.stdout_omitted_bytes),
                stderr: beginning(row.stderr, row.stderr_bytes, row.stderr_omitted_bytes),
            };
            let stored_bytes = i64::from(row.stdout_bytes) + i64::from(row.stderr_bytes);
            let (verdict, outcome, used) = (row.verdict, row.outcome, row.used);
            let case = Row { name: row.name, verdict, outcome, used, started_at: row.started_at, stored_bytes }.read();
            ToldCase { index: usize::try_from(row.index).unwrap_or_default(), case, output: output.shortened(share) }
        });
        Ok(told.collect())
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
    pub async fn finish_case(
        &self,
        run: SandboxId,
        hold: Hold,
        index: usize,
        end: &CaseEnd,
        output: &CaseOutput,
    ) -> Result<bool, StoreError> {
        let CaseEnd { verdict, outcome, used, started_at, .. } = end;
        let CaseOutput { stdout, stderr } = output;
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

    /// Removes the cases of runs that ended before this time and are about to be removed, a few at a time: of one run alone they can be megabytes. Of a run all go at once: what is
    /// left of some would be told as if it were all. Answers how many, which is fewer than the limit if none are left.
    pub async fn prune_cases(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from run_cases where run in (
                select run from run_cases join sandboxes on sandboxes.id = run_cases.run
                where run < $3 and state in ('exited', 'failed') and finished_at < $1 and not has_log_file and not keep_layer
                order by run
                limit $2
            )",
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
