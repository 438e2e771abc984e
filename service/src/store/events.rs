//! Table `events`: what happened and who did it, in order; written in the transaction of what it tells.

use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError, bigint, unsigned};
use crate::sandbox::{Owner, SandboxId, TenantId};

/// Who does something, when, and what else is to be known of it.
#[derive(Debug, Clone)]
pub struct Act<'a> {
    /// `None`: the service itself.
    pub actor: Option<&'a Owner>,
    pub at: OffsetDateTime,
    pub data: Value,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    pub id: u64,
    /// `None`: it concerns all.
    pub tenant: Option<TenantId>,
    /// As in `sandbox.ended`.
    pub kind: String,
    /// As in `image/python:3`.
    pub object: String,
    pub actor_tenant: Option<String>,
    pub actor: Option<String>,
    pub at: OffsetDateTime,
    pub data: Value,
}

/// Which events to list.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// `None`: all tenants'.
    pub tenant: Option<TenantId>,
    pub kinds: Vec<String>,
    pub sandbox: Option<SandboxId>,
    pub principal: Option<String>,
    /// Older than this one.
    pub before: Option<u64>,
    pub limit: u32,
}

impl Store {
    /// Events, newest first.
    pub async fn list_events(&self, filter: &EventFilter) -> Result<Vec<Told>, StoreError> {
        let rows = sqlx::query!(
            r#"select id, tenant, kind, coalesce(object, 'sandbox/' || sandbox, '') as "object!", actor_tenant, actor, at, data
            from events
            where ($1::text is null or tenant = $1)
                and (cardinality($2::text[]) = 0 or kind = any($2))
                and ($3::uuid is null or sandbox = $3)
                and ($4::text is null or actor = $4)
                and ($5::bigint is null or id < $5)
            order by id desc
            limit $6"#,
            filter.tenant.as_ref().map(TenantId::as_str) as _,
            &filter.kinds,
            filter.sandbox.map(|id| id.0) as Option<Uuid>,
            filter.principal.as_deref() as _,
            filter.before.map(bigint) as _,
            i64::from(filter.limit),
        )
        .fetch_all(&self.pool)
        .await?;
        let told = rows.into_iter().map(|row| Told {
            id: unsigned(row.id),
            tenant: row.tenant.map(TenantId::proven),
            kind: row.kind,
            object: row.object,
            actor_tenant: row.actor_tenant,
            actor: row.actor,
            at: row.at,
            data: row.data,
        });
        Ok(told.collect())
    }

    /// Tells of something that is not done in a transaction.
    pub async fn tell_of_sandbox(&self, tenant: &TenantId, id: SandboxId, kind: &str, act: &Act<'_>) -> Result<(), StoreError> {
        let (actor_tenant, actor) = act.names();
        sqlx::query!(
            "insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor) values ($1, $2, $3, $4, $5, $6, $7)",
            tenant.as_str(),
            id.0,
            kind,
            act.at,
            act.data,
            actor_tenant as _,
            actor as _,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Removes the oldest events from before this time. Answers how many.
    pub async fn prune_events(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from events using (
                select id from events where at < $1 and id <= (select min(id) + 2 * $2::bigint from events)
                order by id limit $2
                for update skip locked
            ) as old
            where events.id = old.id",
            before,
            i64::from(limit),
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }
}

impl Act<'_> {
    pub(super) fn names(&self) -> (Option<&str>, Option<&str>) {
        (self.actor.map(|actor| actor.tenant.as_str()), self.actor.map(|actor| actor.principal.as_str()))
    }
}

pub(super) async fn tell(
    connection: &mut PgConnection,
    tenant: Option<&TenantId>,
    kind: &str,
    object: Option<&str>,
    act: &Act<'_>,
) -> Result<(), StoreError> {
    let (actor_tenant, actor) = act.names();
    sqlx::query!(
        "insert into events (tenant, kind, object, at, data, actor_tenant, actor) values ($1, $2, $3, $4, $5, $6, $7)",
        tenant.map(TenantId::as_str) as _,
        kind,
        object as _,
        act.at,
        act.data,
        actor_tenant as _,
        actor as _,
    )
    .execute(connection)
    .await?;
    Ok(())
}
