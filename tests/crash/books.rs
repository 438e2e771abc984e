//! What the rows say, asked of Postgres itself: every sandbox has one end, one event and one line in the ledger, and every count is that of
//! the rows.

use std::collections::HashMap;

use anyhow::{Context, Result};
use mayfly_tests::database::Database;
use serde_json::Value;

/// What contradicts what, each with a name. Every answer must be empty.
const CONTRADICTIONS: &[(&str, &str)] = &[
    (
        "a sandbox that has not exactly one event and one line in the ledger for the end of each of its lives, or has one before it",
        "select s.id, s.state, s.labels ->> 'crash' as label, coalesce(e.ended, 0) as ended, coalesce(u.lines, 0) as lines
         from sandboxes s
             left join (select sandbox, count(*) as ended from events where kind = 'sandbox.ended' group by sandbox) e on e.sandbox = s.id
             left join (select sandbox, count(*) as lines from usage group by sandbox) u on u.sandbox = s.id
         where (coalesce(e.ended, 0), coalesce(u.lines, 0)) <> (s.starts - (s.outcome is null)::integer, s.starts - (s.outcome is null)::integer)",
    ),
    (
        "a sandbox without exactly one event of its making",
        "select s.id from sandboxes s
             left join (select sandbox, count(*) as made from events where kind = 'sandbox.created' group by sandbox) e on e.sandbox = s.id
         where coalesce(e.made, 0) <> 1",
    ),
    (
        "a sandbox that is gone without exactly one deletion, or with more or less than one end if it ever left the queue",
        "select e.sandbox, e.deleted, e.ended, e.was, coalesce(u.lines, 0) as lines
         from (
             select sandbox, count(*) filter (where kind = 'sandbox.deleted') as deleted, count(*) filter (where kind = 'sandbox.ended') as ended,
                 count(*) filter (where kind in ('sandbox.created', 'sandbox.started')) as lives,
                 max(data ->> 'state') filter (where kind = 'sandbox.deleted') as was
             from events where sandbox is not null group by sandbox
         ) e
             left join (select sandbox, count(*) as lines from usage group by sandbox) u on u.sandbox = e.sandbox
         where not exists (select 1 from sandboxes s where s.id = e.sandbox)
             and (e.deleted <> 1 or (e.ended, coalesce(u.lines, 0)) <> (case when e.was = 'queued' then (0::bigint, 0::bigint) else (e.lives, e.lives) end))",
    ),
    (
        "a tenant whose counts are not those of its rows",
        "select t.id, t.live, t.queued, t.live_memory_bytes, t.live_cpu_millis, t.log_bytes, to_jsonb(c) as counted
         from tenants t, lateral (
             select count(*) filter (where outcome is null) as live, count(*) filter (where state = 'queued') as queued,
                 coalesce(sum(memory_bytes) filter (where outcome is null), 0) as memory_bytes,
                 coalesce(sum(cpu_millis) filter (where outcome is null), 0) as cpu_millis, coalesce(sum(log_bytes), 0) as log_bytes
             from sandboxes s where s.tenant = t.id
         ) c
         where (t.live, t.queued, t.live_memory_bytes, t.live_cpu_millis, t.log_bytes)
             <> (c.live, c.queued, c.memory_bytes, c.cpu_millis, c.log_bytes)",
    ),
    (
        "a principal whose counts are not those of its rows",
        "select p.tenant, p.name, p.live, p.queued, p.live_memory_bytes, p.live_cpu_millis, p.log_bytes, to_jsonb(c) as counted
         from principals p, lateral (
             select count(*) filter (where outcome is null) as live, count(*) filter (where state = 'queued') as queued,
                 coalesce(sum(memory_bytes) filter (where outcome is null), 0) as memory_bytes,
                 coalesce(sum(cpu_millis) filter (where outcome is null), 0) as cpu_millis, coalesce(sum(log_bytes), 0) as log_bytes
             from sandboxes s where s.tenant = p.tenant and s.principal = p.name
         ) c
         where (p.live, p.queued, p.live_memory_bytes, p.live_cpu_millis, p.log_bytes)
             <> (c.live, c.queued, c.memory_bytes, c.cpu_millis, c.log_bytes)",
    ),
    (
        "an exec that has not exactly one event of its making, or more than one of its end",
        "select object, count(*) filter (where kind = 'exec.created') as made, count(*) filter (where kind = 'exec.ended') as ended
         from events where starts_with(object, 'exec/') group by object
         having count(*) filter (where kind = 'exec.created') <> 1 or count(*) filter (where kind = 'exec.ended') > 1",
    ),
    (
        "an exec whose end and whose event of it are not the same",
        "select x.id, x.state, x.outcome, e.data from execs x left join events e on e.object = 'exec/' || x.id and e.kind = 'exec.ended'
         where x.outcome is distinct from e.data -> 'outcome'",
    ),
    (
        "a run that has ended and still has what its cases were given, or goes on and has it no more",
        "select c.run, c.index from run_cases c join sandboxes s on s.id = c.run
         where (s.outcome is null) <> (c.stdin is not null and c.expected is not null)",
    ),
    (
        "a case that was run although the one before it was not",
        "select later.run, later.index from run_cases later join run_cases earlier on earlier.run = later.run and earlier.index = later.index - 1
         where later.verdict is not null and earlier.verdict is null",
    ),
    (
        // Who was told that it was not made, and asked again, may have one that never ran beside it.
        "two sandboxes of one request that ran",
        "select labels ->> 'crash' as label, count(*) from sandboxes where labels ? 'crash' and (reason <> 'infra_error' or started_at is not null)
         group by 1 having count(*) > 1",
    ),
];

/// One sandbox as Postgres has it.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) tenant: String,
    pub(crate) kind: String,
    pub(crate) label: String,
    /// `None` while it lives.
    pub(crate) reason: Option<String>,
    /// Whether what it wrote is kept for another start.
    pub(crate) keeps_layer: bool,
    /// Of the whole end: state, times, outcome, output.
    pub(crate) digest: String,
}

/// Every contradiction that the rows hold.
pub(crate) fn contradictions(database: &Database) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (what, query) in CONTRADICTIONS {
        for row in database.ask(query).context(*what)? {
            found.push(format!("{what}: {row}"));
        }
    }
    Ok(found)
}

/// The sandboxes whose label begins with this.
pub(crate) fn rows(database: &Database, label: &str) -> Result<Vec<Row>> {
    let rows = database.ask(&format!(
        "select id, tenant, kind, labels ->> 'crash' as label, reason, keep_layer,
             md5(concat_ws('|', state, started_at, finished_at, outcome::text, encode(log_tail, 'hex'))) as digest
         from sandboxes where starts_with(labels ->> 'crash', '{label}') order by id"
    ))?;
    let text = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
    let read = |row: &Value| Row {
        id: text(row, "id"),
        tenant: text(row, "tenant"),
        kind: text(row, "kind"),
        label: text(row, "label"),
        reason: row["reason"].as_str().map(str::to_owned),
        keeps_layer: row["keep_layer"].as_bool().unwrap_or_default(),
        digest: text(row, "digest"),
    };
    Ok(rows.iter().map(read).collect())
}

/// Every end that was ever seen, to see that none changes.
#[derive(Debug, Default)]
pub(crate) struct History(HashMap<String, String>);

impl History {
    /// Learns the ends of these rows; answers with those that were others before.
    pub(crate) fn learn(&mut self, rows: &[Row]) -> Vec<String> {
        let mut changed = Vec::new();
        for row in rows {
            if row.reason.is_none() {
                if self.0.contains_key(&row.id) {
                    changed.push(format!("{} had ended and lives again", row.label));
                }
                continue;
            }
            let before = self.0.insert(row.id.clone(), row.digest.clone());
            if before.is_some_and(|before| before != row.digest) {
                changed.push(format!("the end of {} ({}) has changed", row.label, row.id));
            }
        }
        changed
    }
}
