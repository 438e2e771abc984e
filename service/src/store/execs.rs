//! Table `execs`: further processes of sandboxes, each row written with its event.

use serde_json::Value;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{HeldKey, NodeId, Store, StoreError, StoredLog, bigint, bytes_at_most, damaged, events::Act, unsigned};
use crate::sandbox::{
    DefaultQuotas, EXECS_MAX, Exceeded, Exec, ExecState, Finish, LogTail, QuotaScope, Sandbox, SandboxId, State, TenantId,
};

/// What became of an exec that somebody wants.
#[derive(Debug, Clone, PartialEq)]
pub enum ExecAdmitted {
    Yes,
    /// There is no such sandbox, or it is in this state.
    NotRunning(Option<State>),
    /// As many live in the sandbox as may.
    Exceeded(Exceeded),
    /// The key is somebody else's by now, or has its exec.
    KeyLost,
}

/// An end, to be stored.
#[derive(Debug, Clone, Copy)]
pub struct ExecEnded<'a> {
    pub finish: &'a Finish,
    pub log_tail: &'a LogTail,
    /// Whether the node keeps the whole log.
    pub has_log_file: bool,
}

struct Row {
    id: Uuid,
    sandbox: Uuid,
    tenant: String,
    principal: String,
    state: String,
    plan: Value,
    created_at: OffsetDateTime,
    started_at: Option<OffsetDateTime>,
    finished_at: Option<OffsetDateTime>,
    outcome: Option<Value>,
}

/// Reads whole rows; the condition and what follows it are the caller's.
macro_rules! select_execs {
    ($condition:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            "select id, sandbox, tenant, principal, state, plan, created_at, started_at, finished_at, outcome
            from execs
            where " + $condition
            $(, $argument)*
        )
    };
}

impl Row {
    fn read(self) -> Result<Exec, StoreError> {
        let unreadable = |column: &str, error: serde_json::Error| damaged(format_args!("a {column} that cannot be read: {error}"));
        Ok(Exec {
            id: SandboxId(self.id),
            sandbox: SandboxId(self.sandbox),
            tenant: TenantId::proven(self.tenant),
            principal: self.principal,
            state: ExecState::named(&self.state).ok_or_else(|| damaged(format_args!("the state {}", self.state)))?,
            plan: serde_json::from_value(self.plan).map_err(|error| unreadable("plan", error))?,
            created_at: self.created_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            outcome: self
                .outcome
                .map(|outcome| serde_json::from_value(outcome).map_err(|error| unreadable("outcome", error)))
                .transpose()?,
        })
    }
}

impl Store {
    /// Inserts the exec, if its sandbox runs and has room for it, tied to the key of its request; or nothing. Counted under the lock of the
    /// sandbox's row, however many ask at once.
    pub async fn admit_exec(&self, exec: &Exec, defaults: &DefaultQuotas, key: Option<&HeldKey>) -> Result<ExecAdmitted, StoreError> {
        let mut transaction = self.pool.begin().await?;
        // First, and by itself: a statement sees what was committed when it began, not when it got the lock.
        let state = sqlx::query_scalar!(
            "select state from sandboxes where id = $1 and tenant = $2 and kind = 'sandbox' for no key update",
            exec.sandbox.0,
            exec.tenant.as_str(),
        );
        let state = state.fetch_optional(&mut *transaction).await?;
        let state = state.as_deref().and_then(State::named);
        if !matches!(state, Some(State::Starting | State::Running)) {
            transaction.rollback().await?;
            return Ok(ExecAdmitted::NotRunning(state));
        }
        let row = sqlx::query!(
            r#"with allowed as (
                select least($10::bigint, (jsonb_strip_nulls($11::jsonb || tenants.quotas) ->> 'execs')::bigint) as execs
                from tenants where id = $3
            ), used as (
                select count(*) as execs from execs where sandbox = $2 and outcome is null
            ), held as (
                select 1 from idempotency_keys
                where tenant = $3 and principal = $4 and key = $8 and holder = $9 and sandbox is null
                for no key update
            ), added as (
                insert into execs (id, sandbox, tenant, principal, state, plan, created_at)
                select $1, $2, $3, $4, $5, $6, $7
                from used, allowed
                where used.execs < allowed.execs and ($8::text is null or exists (select 1 from held))
                returning id
            ), tied as (
                update idempotency_keys set sandbox = added.id from added
                where tenant = $3 and principal = $4 and key = $8 and holder = $9
            ), told as (
                insert into events (tenant, sandbox, kind, object, at, data, actor_tenant, actor)
                select $3, $2, 'exec.created', 'exec/' || id, $7, jsonb_build_object('command', $6::jsonb -> 'command'), $3, $4 from added
            )
            select (select execs from allowed) as allowed, (select execs from used) as used,
                ($8::text is not null and not exists (select 1 from held)) as "is_key_lost!",
                exists (select 1 from added) as "is_added!""#,
            exec.id.0,
            exec.sandbox.0,
            exec.tenant.as_str(),
            exec.principal,
            exec.state.as_str(),
            Json(&exec.plan) as _,
            exec.created_at,
            key.map(|key| key.name.key.as_str()) as _,
            key.map(|key| key.holder) as _,
            bigint(EXECS_MAX),
            Json(&defaults.tenant) as _,
        )
        .fetch_one(&mut *transaction)
        .await?;
        if row.is_added {
            transaction.commit().await?;
            return Ok(ExecAdmitted::Yes);
        }
        transaction.rollback().await?;
        if row.is_key_lost {
            return Ok(ExecAdmitted::KeyLost);
        }
        Ok(ExecAdmitted::Exceeded(Exceeded {
            scope: QuotaScope::Tenant,
            quota: "execs".to_owned(),
            limit: row.allowed.unwrap_or_default().into(),
            used: row.used.unwrap_or_default().into(),
            retry_after_s: Some(1),
        }))
    }

    /// The exec of this sandbox of this tenant.
    pub async fn find_exec(&self, tenant: &TenantId, sandbox: SandboxId, id: SandboxId) -> Result<Option<Exec>, StoreError> {
        let row = select_execs!("id = $1 and sandbox = $2 and tenant = $3", id.0, sandbox.0, tenant.as_str());
        row.fetch_optional(&self.pool).await?.map(Row::read).transpose()
    }

    /// The exec of this tenant, of whatever sandbox.
    pub async fn find_exec_anywhere(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Exec>, StoreError> {
        let row = select_execs!("id = $1 and tenant = $2", id.0, tenant.as_str());
        row.fetch_optional(&self.pool).await?.map(Row::read).transpose()
    }

    /// Execs of a sandbox, newest first, older than `before`.
    pub async fn list_execs(
        &self,
        tenant: &TenantId,
        sandbox: SandboxId,
        before: Option<SandboxId>,
        limit: u32,
    ) -> Result<Vec<Exec>, StoreError> {
        let rows = select_execs!(
            "sandbox = $1 and tenant = $2 and ($3::uuid is null or id < $3) order by id desc limit $4",
            sandbox.0,
            tenant.as_str(),
            before.map(|id| id.0) as _,
            i64::from(limit),
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// Every exec whose end is not stored, of sandboxes that this node has or had.
    pub async fn live_execs_of(&self, node: NodeId) -> Result<Vec<Exec>, StoreError> {
        let rows = select_execs!("outcome is null and sandbox in (select id from sandboxes where node = $1)", node.0);
        let rows = rows.fetch_all(&self.pool).await?;
        // One that cannot be read holds up nobody.
        let read = |row: Row| {
            let id = row.id;
            row.read().inspect_err(|error| tracing::error!(exec.id = %id, %error, "an exec is left alone")).ok()
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    /// Every exec whose end is not stored although its sandbox has ended before this time.
    pub async fn orphaned_execs(&self, ended_before: OffsetDateTime, limit: u32) -> Result<Vec<Exec>, StoreError> {
        let rows = select_execs!(
            "outcome is null and sandbox in (select id from sandboxes where finished_at < $1) limit $2",
            ended_before,
            i64::from(limit),
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// Notes that it runs. Nothing happens if it is not starting any more.
    pub async fn mark_exec_running(&self, id: SandboxId, started_at: OffsetDateTime) -> Result<(), StoreError> {
        sqlx::query!("update execs set state = 'running', started_at = $2 where id = $1 and state = 'starting'", id.0, started_at)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Stores the end with its event: both or nothing. False if it was stored before, or the exec went with its sandbox.
    pub async fn finish_exec(&self, id: SandboxId, ended: &ExecEnded<'_>) -> Result<bool, StoreError> {
        let ExecEnded { finish, log_tail, has_log_file } = ended;
        let state = if finish.state == State::Exited { ExecState::Exited } else { ExecState::Failed };
        let count = sqlx::query_scalar!(
            r#"with ended as (
                update execs
                set state = $2, outcome = $3, started_at = coalesce($4, started_at), finished_at = $5, log_tail = $6,
                    stdout_omitted_bytes = $7, stderr_omitted_bytes = $8, has_log_file = $9
                where id = $1 and outcome is null
                returning id, sandbox, tenant
            ), told as (
                insert into events (tenant, sandbox, kind, object, at, data)
                select tenant, sandbox, 'exec.ended', 'exec/' || id, $5, jsonb_build_object('state', $2::text, 'outcome', $3::jsonb) from ended
            )
            select count(*) as "count!" from ended"#,
            id.0,
            state.as_str(),
            Json(&finish.outcome) as _,
            finish.started_at as _,
            finish.finished_at,
            log_tail.bytes,
            bigint(log_tail.stdout_omitted_bytes),
            bigint(log_tail.stderr_omitted_bytes),
            has_log_file,
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(count == 1)
    }

    /// What is stored of the log of an exec that ended; `None` if it has not, or is unknown.
    pub async fn find_exec_log(&self, id: SandboxId) -> Result<Option<StoredLog>, StoreError> {
        let row = sqlx::query!(
            "select log_tail, stdout_omitted_bytes, stderr_omitted_bytes, has_log_file from execs where id = $1 and outcome is not null",
            id.0
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|row| StoredLog {
            tail: LogTail {
                bytes: row.log_tail.unwrap_or_default(),
                stdout_omitted_bytes: unsigned(row.stdout_omitted_bytes),
                stderr_omitted_bytes: unsigned(row.stderr_omitted_bytes),
            },
            has_file: row.has_log_file,
        }))
    }

    /// No more bytes than so many of its output are told, where so many are told of each stream.
    pub async fn exec_told_bytes(&self, id: SandboxId, output_bytes: usize) -> Result<u64, StoreError> {
        let bytes = sqlx::query_scalar!(
            r#"select least(coalesce(octet_length(log_tail), 0) + stdout_omitted_bytes + stderr_omitted_bytes, 2 * $2::bigint) as "bytes!"
            from execs where id = $1"#,
            id.0,
            bytes_at_most(output_bytes),
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(bytes.map_or(0, unsigned))
    }

    /// Execs of this sandbox whose whole log its node keeps.
    pub async fn exec_logs_of(&self, sandbox: SandboxId) -> Result<Vec<SandboxId>, StoreError> {
        let ids = sqlx::query_scalar!("select id from execs where sandbox = $1 and has_log_file", sandbox.0).fetch_all(&self.pool).await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Ended execs of this node whose whole log it still keeps and that ended before this time.
    pub async fn overdue_exec_logs(&self, node: NodeId, ended_before: OffsetDateTime) -> Result<Vec<SandboxId>, StoreError> {
        let ids = sqlx::query_scalar!(
            "select execs.id from execs join sandboxes on sandboxes.id = execs.sandbox
            where execs.has_log_file and execs.finished_at < $2 and node = $1",
            node.0,
            ended_before,
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Notes that the node keeps these logs no more.
    pub async fn drop_exec_logs(&self, ids: &[SandboxId]) -> Result<(), StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        sqlx::query!("update execs set has_log_file = false where id = any($1)", &ids).execute(&self.pool).await?;
        Ok(())
    }

    /// Those of these ids that are execs: with `are_needed`, only those whose log is still needed.
    pub async fn execs_among(&self, ids: &[SandboxId], are_needed: bool) -> Result<Vec<SandboxId>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let ids = sqlx::query_scalar!(
            "select id from execs where id = any($1) and (not $2 or outcome is null or has_log_file)",
            &ids,
            are_needed,
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Removes execs that ended before this time and whose log no node keeps. Answers how many.
    pub async fn prune_execs(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from execs using (
                select id from execs where outcome is not null and finished_at < $1 and not has_log_file
                order by finished_at limit $2
                for update skip locked
            ) as old
            where execs.id = old.id",
            before,
            i64::from(limit),
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }

    /// Tells that somebody ends an exec.
    pub async fn tell_of_exec(&self, sandbox: &Sandbox, exec: SandboxId, kind: &str, act: &Act<'_>) -> Result<(), StoreError> {
        let (actor_tenant, actor) = act.names();
        sqlx::query!(
            "insert into events (tenant, sandbox, kind, object, at, data, actor_tenant, actor) values ($1, $2, $3, $4, $5, $6, $7, $8)",
            sandbox.tenant.as_str(),
            sandbox.id.0,
            kind,
            format!("exec/{exec}"),
            act.at,
            act.data,
            actor_tenant as _,
            actor as _,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
