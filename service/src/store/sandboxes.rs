//! Table `sandboxes`, with the ledger and the outbox that are written together with it.

use std::collections::BTreeMap;

use sandbox_core::{fence::Fences, protocol::OutputPolicy};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Hold, Lease, NodeId, Store, StoreError, admission::day_of, bigint, bytes_at_most, damaged, events::Act, unsigned};
use crate::sandbox::{Compile, CompileEnd, Finish, FromPool, ImageUsed, Kind, LogTail, Sandbox, SandboxId, State, TenantId};

/// Which sandboxes of a tenant to list.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub states: Vec<State>,
    /// All of these labels with these values.
    pub labels: BTreeMap<String, String>,
    /// And all of these, whatever their values.
    pub label_keys: Vec<String>,
    /// Made of the image of this reference.
    pub image: Option<String>,
    /// With a name that begins like this.
    pub name_prefix: Option<String>,
    /// Made at this time or later, and made before that.
    pub created: (Option<OffsetDateTime>, Option<OffsetDateTime>),
    /// Ended at this time or later, and ended before that.
    pub finished: (Option<OffsetDateTime>, Option<OffsetDateTime>),
    pub order: Order,
    /// Behind this one, in that order.
    pub behind: Option<SandboxId>,
    pub limit: u32,
}

/// In which order of their making.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    NewestFirst,
    OldestFirst,
}

/// Which sandboxes of all tenants to list.
#[derive(Debug, Clone, Default)]
pub struct Everyones {
    pub tenant: Option<TenantId>,
    pub principal: Option<String>,
    pub kind: Option<Kind>,
    pub states: Vec<State>,
    /// Older than this one.
    pub before: Option<SandboxId>,
    pub limit: u32,
}

/// A sandbox and the node that has it, if one has.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    pub sandbox: Sandbox,
    pub node: Option<NodeId>,
}

/// An end, to be stored.
#[derive(Debug, Clone)]
pub struct Ended<'a> {
    pub finish: &'a Finish,
    pub log_tail: &'a LogTail,
    /// That of its compile step, if it had one and that is known.
    pub compile: Option<&'a CompileEnd>,
    /// How much is stored of what its cases wrote.
    pub case_bytes: u64,
    pub log_file: LogKept,
}

/// Who says how a sandbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// Whoever takes it from the queue.
    Queue,
    /// The one that has, or had, claimed it.
    Holder(Hold),
}

/// Where a sandbox stands, and who has it, if it was claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whereabouts {
    pub state: State,
    pub hold: Option<Hold>,
}

/// How long the node keeps the whole log of an ended sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogKept {
    /// Not at all: what is stored with the outcome is everything.
    No,
    Until(OffsetDateTime),
    UntilDeleted,
}

/// What is stored of the log of a sandbox that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLog {
    pub tail: LogTail,
    /// Whether its node still has all of it.
    pub has_file: bool,
}

/// What a deleted row said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    pub state: State,
    pub has_log_file: bool,
}

/// A row of `sandboxes` without its log. What is JSON is read with the rest, so that one row that cannot be read is no fault of the others.
pub(super) struct Row {
    pub(super) id: Uuid,
    pub(super) tenant: String,
    pub(super) principal: String,
    pub(super) kind: String,
    pub(super) state: String,
    pub(super) name: Option<String>,
    pub(super) image_reference: String,
    pub(super) image_digest: String,
    pub(super) image_root: String,
    pub(super) program: Value,
    pub(super) compile: Option<Value>,
    pub(super) judging: Option<Value>,
    pub(super) compile_outcome: Option<Value>,
    pub(super) compile_log_tail: Option<Vec<u8>>,
    pub(super) compile_stdout_omitted_bytes: i64,
    pub(super) compile_stderr_omitted_bytes: i64,
    pub(super) limits: Value,
    pub(super) output_policy: String,
    pub(super) labels: Value,
    pub(super) created_at: OffsetDateTime,
    pub(super) claimed_at: Option<OffsetDateTime>,
    pub(super) started_at: Option<OffsetDateTime>,
    pub(super) finished_at: Option<OffsetDateTime>,
    pub(super) ttl_ms: Option<i64>,
    pub(super) expires_at: Option<OffsetDateTime>,
    pub(super) idle_timeout_ms: Option<i64>,
    pub(super) auto_remove: bool,
    pub(super) keep_layer: bool,
    pub(super) starts: i32,
    pub(super) outcome: Option<Value>,
    pub(super) fences: Option<i32>,
    pub(super) attempt: i32,
    pub(super) retries_left: i32,
    pub(super) claims: i64,
    pub(super) keeps_input: bool,
    pub(super) from_pool: Option<String>,
    pub(super) waited_ms: i64,
}

/// Reads whole rows; the condition and what follows it are the caller's.
macro_rules! select_sandboxes {
    ($condition:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            crate::store::sandboxes::Row,
            r#"select id, tenant, principal, kind, state, name, image_reference, image_digest, image_root,
                program, limits, output_policy, labels, created_at, claimed_at, started_at, finished_at, expires_at, outcome, fences, attempt, retries_left,
                claims, keeps_input, ttl_ms, idle_timeout_ms, auto_remove, keep_layer, starts, compile, compile_outcome, compile_log_tail,
                compile_stdout_omitted_bytes, compile_stderr_omitted_bytes, judging, from_pool, waited_ms
            from sandboxes
            where "# + $condition
            $(, $argument)*
        )
    };
}
pub(super) use select_sandboxes;

impl Row {
    pub(super) fn read(mut self) -> Result<Sandbox, StoreError> {
        let compile = self.read_compile()?;
        Ok(Sandbox {
            id: SandboxId(self.id),
            tenant: TenantId::proven(self.tenant),
            principal: self.principal,
            kind: Kind::named(&self.kind).ok_or_else(|| damaged(format_args!("the kind {}", self.kind)))?,
            state: state_of(&self.state)?,
            name: self.name,
            image: ImageUsed {
                reference: self.image_reference,
                digest: self.image_digest,
                root: self.image_root.try_into().map_err(damaged)?,
            },
            program: json("program", self.program)?,
            compile,
            judging: self.judging.map(|judging| json("judging", judging)).transpose()?,
            limits: json("limits", self.limits)?,
            output_policy: match self.output_policy.as_str() {
                "truncate" => OutputPolicy::Truncate,
                "kill" => OutputPolicy::Kill,
                "discard" => OutputPolicy::Discard,
                other => return Err(damaged(format_args!("the output policy {other}"))),
            },
            labels: json("labels", self.labels)?,
            created_at: self.created_at,
            claimed_at: self.claimed_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            ttl_ms: self.ttl_ms.map(unsigned),
            expires_at: self.expires_at,
            idle_timeout_ms: self.idle_timeout_ms.map(unsigned),
            auto_remove: self.auto_remove,
            keep_layer: self.keep_layer,
            starts: self.starts.unsigned_abs(),
            outcome: self.outcome.map(|outcome| json("outcome", outcome)).transpose()?,
            fences: self.fences.map(|bits| Fences::from_bits(bits.cast_unsigned())),
            attempt: self.attempt.unsigned_abs(),
            retries_left: self.retries_left.unsigned_abs(),
            claims: unsigned(self.claims),
            keeps_input: self.keeps_input,
            from_pool: self.from_pool.map(|name| FromPool { name, waited_ms: unsigned(self.waited_ms) }),
        })
    }
}

impl Row {
    fn read_compile(&mut self) -> Result<Option<Box<Compile>>, StoreError> {
        let Some(compile) = self.compile.take() else { return Ok(None) };
        let mut compile: Box<Compile> = json("compile step", compile)?;
        if let Some(outcome) = self.compile_outcome.take() {
            let log_tail = LogTail {
                bytes: self.compile_log_tail.take().unwrap_or_default(),
                stdout_omitted_bytes: unsigned(self.compile_stdout_omitted_bytes),
                stderr_omitted_bytes: unsigned(self.compile_stderr_omitted_bytes),
            };
            compile.end = Some(CompileEnd { outcome: json("compile step's outcome", outcome)?, log_tail });
        }
        Ok(Some(compile))
    }
}

/// How far an id's time may be from the time of creation that its row has: one from a pool was begun before somebody made it his.
const IDS_APART: time::Duration = POOLED_FOR_MAX.saturating_add(time::Duration::minutes(10));

/// Nobody waits in a pool for longer.
pub const POOLED_FOR_MAX: time::Duration = time::Duration::hours(1);

/// The least id that can be made at this time.
pub(super) fn id_at(at: OffsetDateTime) -> Uuid {
    let ms = u64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    Uuid::from_u64_pair(ms << 16, 0)
}

fn json<T: DeserializeOwned>(column: &str, value: Value) -> Result<T, StoreError> {
    serde_json::from_value(value).map_err(|error| damaged(format_args!("a {column} that cannot be read: {error}")))
}

/// Those that can be read. One that cannot holds up nobody.
pub(super) fn readable(rows: Vec<Row>) -> Vec<Sandbox> {
    let read = |row: Row| {
        let id = row.id;
        row.read().inspect_err(|error| tracing::error!(sandbox.id = %id, %error, "a sandbox is left alone")).ok()
    };
    rows.into_iter().filter_map(read).collect()
}

fn state_of(name: &str) -> Result<State, StoreError> {
    State::named(name).ok_or_else(|| damaged(format_args!("the state {name}")))
}

pub(super) const fn policy_name(policy: OutputPolicy) -> &'static str {
    match policy {
        OutputPolicy::Truncate => "truncate",
        OutputPolicy::Kill => "kill",
        OutputPolicy::Discard => "discard",
    }
}

impl Store {
    /// The sandbox of this tenant.
    pub async fn find(&self, tenant: &TenantId, id: SandboxId) -> Result<Option<Sandbox>, StoreError> {
        let row = select_sandboxes!("id = $1 and tenant = $2", id.0, tenant.as_str()).fetch_optional(&self.pool).await?;
        row.map(Row::read).transpose()
    }

    /// Those of these that are runs of the tenant's, in no order.
    pub async fn runs(&self, tenant: &TenantId, ids: &[SandboxId]) -> Result<Vec<Sandbox>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let rows = select_sandboxes!("id = any($1) and tenant = $2 and kind = 'run'", &ids, tenant.as_str()).fetch_all(&self.pool).await?;
        rows.into_iter().map(Row::read).collect()
    }

    /// The tenant's long-lived sandboxes that are so.
    pub async fn list(&self, tenant: &TenantId, filter: &Filter) -> Result<Vec<Sandbox>, StoreError> {
        self.pool.in_time(self.list_at_last(tenant, filter)).await
    }

    async fn list_at_last(&self, tenant: &TenantId, filter: &Filter) -> Result<Vec<Sandbox>, StoreError> {
        let states: Vec<String> = filter.states.iter().map(|state| state.as_str().to_owned()).collect();
        // Of the characters that a name may have, this one alone means something else here.
        let name_like = filter.name_prefix.as_ref().map(|prefix| format!("{}%", prefix.replace('_', "\\_")));
        let (created_from, created_before) = filter.created;
        let mut transaction = self.pool.begin().await?;
        // Planned for these very values: which index serves depends on what is asked for.
        sqlx::query!("select set_config('plan_cache_mode', 'force_custom_plan', true)").fetch_one(&mut *transaction).await?;
        let rows = select_sandboxes!(
            "tenant = $1 and kind = 'sandbox'
                and (cardinality($2::text[]) = 0 or state = any($2))
                and ($3::jsonb = '{}' or labels @> $3)
                and (cardinality($4::text[]) = 0 or labels ?& $4)
                and ($5::text is null or image_reference = $5)
                and ($6::text is null or name like $6)
                and ($7::timestamptz is null or created_at >= $7) and ($8::timestamptz is null or created_at < $8)
                -- the same, as far as ids tell it, along the index
                and ($9::uuid is null or id >= $9) and ($10::uuid is null or id < $10)
                and ($11::timestamptz is null or finished_at >= $11) and ($12::timestamptz is null or finished_at < $12)
                and ($13::uuid is null or case when $14 then id > $13 else id < $13 end)
            order by case when $14 then id end, case when not $14 then id end desc
            limit $15",
            tenant.as_str(),
            &states,
            Json(&filter.labels) as _,
            &filter.label_keys,
            filter.image.as_deref() as _,
            name_like as _,
            created_from as _,
            created_before as _,
            created_from.map(|at| id_at(at - IDS_APART)) as _,
            created_before.map(|at| id_at(at + IDS_APART)) as _,
            filter.finished.0 as _,
            filter.finished.1 as _,
            filter.behind.map(|id| id.0) as _,
            filter.order == Order::OldestFirst,
            i64::from(filter.limit),
        )
        .fetch_all(&mut *transaction)
        .await?;
        transaction.commit().await?;
        rows.into_iter().map(Row::read).collect()
    }

    /// Every sandbox that this node claimed and whose end is not stored.
    pub async fn live_of(&self, node: NodeId) -> Result<Vec<Sandbox>, StoreError> {
        let rows = select_sandboxes!("node = $1 and state in ('starting', 'running', 'paused')", node.0).fetch_all(&self.pool).await?;
        Ok(readable(rows))
    }

    /// Where this sandbox stands; `None` if there is none.
    pub async fn whereabouts(&self, id: SandboxId) -> Result<Option<Whereabouts>, StoreError> {
        let row = sqlx::query!("select state, node, epoch, claims from sandboxes where id = $1", id.0).fetch_optional(&self.pool).await?;
        row.map(|row| {
            let lease = row.node.map(|node| Lease { node: NodeId(node), epoch: unsigned(row.epoch) });
            let hold = lease.map(|lease| Hold { lease, claims: unsigned(row.claims) });
            Ok(Whereabouts { state: state_of(&row.state)?, hold })
        })
        .transpose()
    }

    /// Those of these sandboxes that have ended and can be read, with the ends of their logs.
    pub async fn ended_of(&self, ids: &[SandboxId]) -> Result<Vec<(Sandbox, LogTail)>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let rows = select_sandboxes!("id = any($1) and state in ('exited', 'failed')", &ids).fetch_all(&self.pool).await?;
        let mut ended = Vec::with_capacity(rows.len());
        for sandbox in readable(rows) {
            let tail = self.find_log(sandbox.id).await?.map(|stored| stored.tail).unwrap_or_default();
            ended.push((sandbox, tail));
        }
        Ok(ended)
    }

    /// Those of these sandboxes that there are no rows of.
    pub async fn absent_of(&self, ids: &[SandboxId]) -> Result<Vec<SandboxId>, StoreError> {
        let asked: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let absent = sqlx::query_scalar!(
            r#"select asked as "asked!" from unnest($1::uuid[]) as asked where not exists (select 1 from sandboxes where id = asked)"#,
            &asked
        );
        Ok(absent.fetch_all(&self.pool).await?.into_iter().map(SandboxId).collect())
    }

    /// Those of [`Store::live_of`] whose rows cannot be read, and why.
    pub async fn unreadable_of(&self, node: NodeId) -> Result<Vec<(SandboxId, StoreError)>, StoreError> {
        let rows = select_sandboxes!("node = $1 and state in ('starting', 'running', 'paused')", node.0).fetch_all(&self.pool).await?;
        let fault = |row: Row| {
            let id = SandboxId(row.id);
            row.read().err().map(|error| (id, error))
        };
        Ok(rows.into_iter().filter_map(fault).collect())
    }

    /// Notes that the payload runs. False, and nothing happens, if the sandbox is not starting any more, or not for this claim. With true its row is on disk.
    pub async fn mark_running(&self, id: SandboxId, hold: Hold, started_at: OffsetDateTime, fences: Fences) -> Result<bool, StoreError> {
        let marked = sqlx::query!(
            "update sandboxes set state = 'running', started_at = $2, fences = $3
            where id = $1 and state = 'starting' and node = $4 and epoch = $5 and claims = $6",
            id.0,
            started_at,
            fences.bits().cast_signed(),
            hold.lease.node.0,
            bigint(hold.lease.epoch),
            bigint(hold.claims),
        )
        .execute(&self.pool)
        .await?;
        Ok(marked.rows_affected() == 1)
    }

    /// Stores the end of a sandbox that is live, with its line in the ledger and its event: all or nothing. False if it is not the writer's to
    /// say: its end was stored before, or somebody else has it.
    pub async fn finish(&self, id: SandboxId, writer: Writer, ended: &Ended<'_>) -> Result<bool, StoreError> {
        let Ended { finish, log_tail, compile, case_bytes, log_file } = ended;
        let hold = match writer {
            Writer::Queue => None,
            Writer::Holder(hold) => Some(hold),
        };
        let (has_log_file, log_expires_at) = match *log_file {
            LogKept::No => (false, None),
            LogKept::Until(at) => (true, Some(at)),
            LogKept::UntilDeleted => (true, None),
        };
        let compile_tail = compile.map(|step| &step.log_tail);
        let log_bytes = log_tail.data_bytes()
            + log_tail.stdout_omitted_bytes
            + log_tail.stderr_omitted_bytes
            + compile_tail.map_or(0, LogTail::data_bytes)
            + case_bytes;
        let count = sqlx::query_scalar!(
            r#"with before as (
                select id, state as was from sandboxes
                where id = $1
                    and case when $2::uuid is null then state = 'queued'
                        else state in ('starting', 'running', 'paused') and node = $2 and epoch = $20 and claims = $21 end
                for no key update
            ), ended as (
                update sandboxes
                set state = $3, outcome = $4, reason = $5, started_at = coalesce($6, started_at), finished_at = $7, log_tail = $8,
                    stdout_omitted_bytes = $9, stderr_omitted_bytes = $10, has_log_file = $11, log_expires_at = $12, log_bytes = $17,
                    fences = coalesce($19, fences), compile_outcome = $22, compile_log_tail = $23, compile_stdout_omitted_bytes = $24,
                    compile_stderr_omitted_bytes = $25
                from before
                where sandboxes.id = before.id
                returning sandboxes.id, tenant, principal, kind, memory_bytes, cpu_millis, labels, claims, (was = 'queued')::integer as was_queued,
                    judging is not null as is_judged
            ), tenant_counted as (
                update tenants
                set live = live - 1, live_memory_bytes = live_memory_bytes - ended.memory_bytes,
                    live_cpu_millis = live_cpu_millis - ended.cpu_millis, queued = queued - ended.was_queued,
                    log_bytes = log_bytes + $17, day = greatest(day, $18),
                    day_runs = case when day < $18 then 0 else day_runs end,
                    day_cpu_us = case when day < $18 then $14 when day = $18 then day_cpu_us + $14 else day_cpu_us end
                from ended
                where tenants.id = ended.tenant
                returning ended.*
            ), principal_counted as (
                -- after the tenant, always
                update principals
                set live = live - 1, live_memory_bytes = live_memory_bytes - ended.memory_bytes,
                    live_cpu_millis = live_cpu_millis - ended.cpu_millis, queued = queued - ended.was_queued,
                    log_bytes = log_bytes + $17, day = greatest(day, $18),
                    day_runs = case when day < $18 then 0 else day_runs end,
                    day_cpu_us = case when day < $18 then $14 when day = $18 then day_cpu_us + $14 else day_cpu_us end
                from tenant_counted as ended
                where principals.tenant = ended.tenant and principals.name = ended.principal
            ), counted as (
                insert into usage (
                    sandbox, claims, tenant, principal, kind, wall_us, cpu_us, memory_peak_bytes, memory_limit_bytes, output_bytes, log_bytes,
                    ended_at
                )
                select id, claims, tenant, principal, kind, $13, $14, $15, memory_bytes, $16, $17, $7 from ended
            ), told as (
                insert into events (tenant, sandbox, kind, at, data)
                select tenant, id, 'sandbox.ended', $7,
                    jsonb_build_object('kind', kind, 'state', $3::text, 'labels', labels, 'outcome', $4::jsonb)
                from ended
                -- nobody was told that it lived
                where kind <> 'pooled'
            ), dropped as (
                delete from inputs using ended where inputs.sandbox = ended.id
            ), emptied as (
                update run_cases set stdin = null, expected = null from ended where ended.is_judged and run_cases.run = ended.id
            )
            select count(*) as "count!" from ended"#,
            id.0,
            hold.map(|hold| hold.lease.node.0) as _,
            finish.state.as_str(),
            Json(&finish.outcome) as _,
            finish.outcome.reason.as_str(),
            finish.started_at as _,
            finish.finished_at,
            log_tail.bytes,
            bigint(log_tail.stdout_omitted_bytes),
            bigint(log_tail.stderr_omitted_bytes),
            has_log_file,
            log_expires_at as _,
            bigint(finish.used.wall_us),
            bigint(finish.used.cpu_us),
            bigint(finish.used.memory_peak_bytes),
            bigint(finish.used.stdout_bytes.saturating_add(finish.used.stderr_bytes)),
            bigint(log_bytes),
            day_of(finish.finished_at),
            finish.fences.map(|fences| fences.bits().cast_signed()) as _,
            hold.map(|hold| bigint(hold.lease.epoch)) as _,
            hold.map(|hold| bigint(hold.claims)) as _,
            compile.map(|step| Json(&step.outcome)) as _,
            compile_tail.map(|tail| tail.bytes.as_slice()) as _,
            compile_tail.map_or(0, |tail| bigint(tail.stdout_omitted_bytes)),
            compile_tail.map_or(0, |tail| bigint(tail.stderr_omitted_bytes)),
        )
        .fetch_one(&self.pool)
        .await?;
        self.told();
        Ok(count == 1)
    }

    /// Takes the name from a sandbox that failed after so many claims without having been begun.
    pub async fn free_name_of(&self, id: SandboxId, claims: u64) -> Result<(), StoreError> {
        sqlx::query!(
            "update sandboxes set name = null
            where id = $1 and name is not null and state = 'failed' and reason = 'infra_error' and started_at is null and claims = $2",
            id.0,
            bigint(claims),
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// What is stored of the log of a sandbox that ended; `None` if it has not, or is unknown.
    pub async fn find_log(&self, id: SandboxId) -> Result<Option<StoredLog>, StoreError> {
        let row = sqlx::query!(
            "select log_tail, stdout_omitted_bytes, stderr_omitted_bytes, has_log_file
            from sandboxes where id = $1 and state in ('exited', 'failed')",
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

    /// No more bytes than so many are told of these of the tenant's, where of each so many are told of each stream of its output, and of all of its cases together. With what a
    /// compile step is and wrote, and something for each case. One that has not ended may have, once it is told of: it counts for all that it can come to.
    pub async fn told_bytes(
        &self,
        tenant: &TenantId,
        ids: &[SandboxId],
        output_bytes: usize,
        cases_bytes: usize,
    ) -> Result<u64, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        // None of these lengths has the values themselves read.
        let bytes = sqlx::query_scalar!(
            r#"select coalesce(sum(
                case
                    when state in ('exited', 'failed')
                        then least(coalesce(octet_length(log_tail), 0) + stdout_omitted_bytes + stderr_omitted_bytes, 2 * $3::bigint)
                    when judging is null then 2 * $3::bigint
                    else 0
                end
                + case when compile is null then 0 else octet_length(compile::text) + coalesce(octet_length(compile_log_tail), 2 * $5::bigint) end
                + (
                    select 256 * count(*) + least(2 * $4::bigint, case
                        when sandboxes.state in ('exited', 'failed')
                            then coalesce(sum(octet_length(stdout)), 0) + coalesce(sum(octet_length(stderr)), 0)
                        else 2 * $5::bigint * count(*)
                    end)
                    from run_cases where run = sandboxes.id
                )
            ), 0)::bigint as "bytes!"
            from sandboxes where id = any($1) and tenant = $2"#,
            &ids,
            tenant.as_str(),
            bytes_at_most(output_bytes),
            bytes_at_most(cases_bytes),
            bytes_at_most(LogTail::STORED_BYTES),
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(unsigned(bytes))
    }

    /// Removes a long-lived sandbox of this tenant that does not run, and tells of it. `None` if there is none, or it runs.
    pub async fn delete(&self, tenant: &TenantId, id: SandboxId, act: &Act<'_>) -> Result<Option<Deleted>, StoreError> {
        let (actor_tenant, actor) = act.names();
        let row = sqlx::query!(
            "with gone as (
                delete from sandboxes
                where id = $1 and tenant = $2 and kind = 'sandbox' and state in ('queued', 'exited', 'failed')
                returning id, tenant, principal, state, has_log_file, labels, log_bytes,
                    case when state = 'queued' then 1 else 0 end as live, case when state = 'queued' then memory_bytes else 0 end as memory_bytes,
                    case when state = 'queued' then cpu_millis else 0 end as cpu_millis
            ), tenant_counted as (
                update tenants
                set live = tenants.live - gone.live, live_memory_bytes = live_memory_bytes - gone.memory_bytes,
                    live_cpu_millis = live_cpu_millis - gone.cpu_millis, queued = queued - gone.live,
                    log_bytes = tenants.log_bytes - gone.log_bytes
                from gone
                where tenants.id = gone.tenant
                returning gone.*
            ), principal_counted as (
                -- after the tenant, always
                update principals
                set live = principals.live - gone.live, live_memory_bytes = live_memory_bytes - gone.memory_bytes,
                    live_cpu_millis = live_cpu_millis - gone.cpu_millis, queued = queued - gone.live,
                    log_bytes = principals.log_bytes - gone.log_bytes
                from tenant_counted as gone
                where principals.tenant = gone.tenant and principals.name = gone.principal
            ), told as (
                insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor)
                select tenant, id, 'sandbox.deleted', $3, jsonb_build_object('state', state, 'labels', labels), $4, $5 from gone
            )
            select state, has_log_file from gone",
            id.0,
            tenant.as_str(),
            act.at,
            actor_tenant as _,
            actor as _,
        )
        .fetch_optional(&self.pool)
        .await?;
        self.told();
        row.map(|row| Ok(Deleted { state: state_of(&row.state)?, has_log_file: row.has_log_file })).transpose()
    }

    /// Removes sandboxes that ended before this time and whose log no node keeps, oldest first. Answers how many.
    pub async fn prune_sandboxes(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        if !super::keeps_house(&mut transaction).await? {
            transaction.rollback().await?;
            return Ok(0);
        }
        // Ids begin with the time of their making: no younger one needs to be looked at.
        let newest = id_at(before);
        let count = sqlx::query_scalar!(
            r#"with gone as (
                delete from sandboxes using (
                    select id from sandboxes
                    where id < $3 and state in ('exited', 'failed') and finished_at < $1 and not has_log_file and not keep_layer
                        -- they go first, and slowly
                        and not exists (select 1 from run_cases where run = sandboxes.id)
                    order by id
                    limit $2
                ) as old
                where sandboxes.id = old.id
                returning tenant, principal, log_bytes
            ), tenant_counted as (
                update tenants set log_bytes = tenants.log_bytes - freed.bytes
                from (select tenant, sum(log_bytes)::bigint as bytes from gone group by tenant) as freed
                where tenants.id = freed.tenant
                returning tenants.id
            ), principal_counted as (
                -- after the tenant, always
                update principals set log_bytes = principals.log_bytes - freed.bytes
                from (select tenant, principal, sum(log_bytes)::bigint as bytes from gone group by tenant, principal) as freed
                    join tenant_counted on tenant_counted.id = freed.tenant
                where principals.tenant = freed.tenant and principals.name = freed.principal
            )
            select count(*) as "count!" from gone"#,
            before,
            i64::from(limit),
            newest,
        )
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(unsigned(count))
    }

    /// Sandboxes and runs of every tenant, newest first, with whose and where they are.
    pub async fn list_everyones(&self, filter: &Everyones) -> Result<Vec<Held>, StoreError> {
        let states: Vec<String> = filter.states.iter().map(|state| state.as_str().to_owned()).collect();
        let rows = select_sandboxes!(
            "($1::text is null or tenant = $1)
                and ($2::text is null or principal = $2)
                and ($3::text is null or kind = $3)
                and (cardinality($4::text[]) = 0 or state = any($4))
                and ($5::uuid is null or id < $5)
            order by id desc
            limit $6",
            filter.tenant.as_ref().map(TenantId::as_str) as _,
            filter.principal.as_deref() as _,
            filter.kind.map(Kind::as_str) as _,
            &states,
            filter.before.map(|id| id.0) as _,
            i64::from(filter.limit),
        )
        .fetch_all(&self.pool)
        .await?;
        let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
        let places = sqlx::query!("select id, node from sandboxes where id = any($1)", &ids).fetch_all(&self.pool).await?;
        let node_of = |id| places.iter().find(|place| place.id == id).and_then(|place| place.node).map(NodeId);
        rows.into_iter().map(|row| Ok(Held { node: node_of(row.id), sandbox: row.read()? })).collect()
    }

    /// Ended sandboxes of this node whose whole log it still keeps; with `overdue`, only those whose time is over at the first instant, or
    /// that ended before the second.
    pub async fn kept_logs(&self, node: NodeId, overdue: Option<(OffsetDateTime, OffsetDateTime)>) -> Result<Vec<SandboxId>, StoreError> {
        let ids = sqlx::query_scalar!(
            "select id from sandboxes
            where node = $1 and has_log_file and ($2::timestamptz is null or log_expires_at <= $2 or finished_at < $3)",
            node.0,
            overdue.map(|(at, _)| at) as _,
            overdue.map(|(_, ended)| ended) as _,
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Those of these sandboxes whose log is still needed: they live, or what is stored of it is not all.
    pub async fn with_log(&self, ids: &[SandboxId]) -> Result<Vec<SandboxId>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let ids = sqlx::query_scalar!("select id from sandboxes where id = any($1) and (outcome is null or has_log_file)", &ids)
            .fetch_all(&self.pool)
            .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Ended sandboxes whose log is kept by a node that was not heard of since this time, and that ended before it themselves: so many at the most.
    pub async fn logs_of_gone_nodes(&self, before: OffsetDateTime, limit: u32) -> Result<Vec<SandboxId>, StoreError> {
        let ids = sqlx::query_scalar!(
            "select sandboxes.id from sandboxes join nodes on nodes.id = sandboxes.node
            where has_log_file and finished_at < $1 and lease_until < $1
            limit $2",
            before,
            i64::from(limit),
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Notes that the node keeps these logs no more.
    pub async fn drop_kept_logs(&self, ids: &[SandboxId]) -> Result<(), StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        // What was only in the file is gone with it.
        sqlx::query!(
            "with dropped as (
                update sandboxes
                set has_log_file = false, log_expires_at = null,
                    log_bytes = greatest(0, log_bytes - stdout_omitted_bytes - stderr_omitted_bytes)
                from (select id, log_bytes as had from sandboxes where id = any($1) and has_log_file order by id for no key update) as before
                where sandboxes.id = before.id
                returning tenant, principal, had - log_bytes as bytes
            ), tenant_counted as (
                update tenants set log_bytes = tenants.log_bytes - freed.bytes
                from (select tenant, sum(bytes)::bigint as bytes from dropped group by tenant) as freed
                where tenants.id = freed.tenant
                returning tenants.id
            )
            update principals set log_bytes = principals.log_bytes - freed.bytes
            from (select tenant, principal, sum(bytes)::bigint as bytes from dropped group by tenant, principal) as freed
                join tenant_counted on tenant_counted.id = freed.tenant
            where principals.tenant = freed.tenant and principals.name = freed.principal",
            &ids
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
