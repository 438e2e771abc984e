//! Table `idempotency_keys`: which requests are being worked on, and what was answered to them.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{NodeId, Store, StoreError, bigint};
use crate::sandbox::{Owner, SandboxId};

/// A key is its owner's: another principal's is another key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyName {
    pub owner: Owner,
    pub key: String,
}

/// A key as one attempt at its request holds it, if it does: only the holder may do the work or answer for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldKey {
    pub name: KeyName,
    pub holder: Uuid,
}

/// What a request asks for, as far as two can be told apart: SHA-256 of method and target, and of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    pub target: [u8; 32],
    /// `None`: it has not been read yet.
    pub body: Option<[u8; 32]>,
}

/// Who begins, and when.
#[derive(Debug, Clone, Copy)]
pub struct Taking {
    pub node: NodeId,
    /// Of this node only one process serves at a time: what another of its processes holds, nobody works on.
    pub process: Uuid,
    pub now: OffsetDateTime,
    pub expires_at: OffsetDateTime,
    /// What was taken before this time nobody works on, whoever holds it. `None`: it is being worked on here.
    pub orphaned_before: Option<OffsetDateTime>,
}

/// Where a key stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyState {
    /// The attempt holds it now. An earlier one may have made a sandbox, which is all that will be made, or have begun what must not be done twice.
    Ours {
        made: Option<SandboxId>,
        is_begun: bool,
    },
    /// Another attempt holds it.
    Theirs,
    /// The key was used for another request.
    Reused,
    Answered(Kept),
}

/// What an attempt leaves that gives its key back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// It has done nothing that could not be done again.
    Undone,
    /// What it began may have been done or not.
    Unknown,
}

/// An answer, to be given again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept {
    pub status: u16,
    pub content_type: Option<String>,
    pub location: Option<String>,
    /// `None`: it is told again from the sandbox.
    pub body: Option<Vec<u8>>,
    pub made: Option<SandboxId>,
}

impl Store {
    /// Takes the key for this attempt, unless it is answered, held by another, or used for another request. Says also whether the owner
    /// is suspended. `None`: somebody else took it in this very moment; ask again.
    pub async fn take_key(
        &self,
        attempt: &HeldKey,
        fingerprint: &Fingerprint,
        taking: &Taking,
    ) -> Result<Option<(KeyState, bool)>, StoreError> {
        let HeldKey { name, holder } = attempt;
        let row = sqlx::query!(
            r#"with taken as (
                insert into idempotency_keys as held (tenant, principal, key, target, body, node, process, holder, taken_at, expires_at)
                values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
                on conflict (tenant, principal, key) do update
                set target = excluded.target, body = excluded.body, node = excluded.node, process = excluded.process,
                    holder = excluded.holder, taken_at = excluded.taken_at,
                    sandbox = case when held.expires_at > excluded.taken_at then held.sandbox end,
                    begun_by = case when held.expires_at > excluded.taken_at then held.begun_by end,
                    expires_at = case when held.expires_at > excluded.taken_at and held.sandbox is not null then held.expires_at
                        else excluded.expires_at end,
                    status = null, content_type = null, location = null, answer = null
                where held.expires_at <= excluded.taken_at
                    -- given back, and nothing was made
                    or held.status is null and held.holder is null and held.sandbox is null and held.begun_by is null
                    or held.status is null and held.target = excluded.target
                        and coalesce(held.body = excluded.body, true)
                        and (held.holder is null or held.taken_at < $11
                            or held.node = excluded.node and held.process <> excluded.process
                            -- whoever held it is not heard of any more, unless it is this process
                            or $11::timestamptz is not null
                                and exists (select 1 from nodes where nodes.id = held.node and lease_until < now()))
                returning sandbox, begun_by
            ), standing as (
                select tenants.suspended_at is not null or principals.suspended_at is not null as is_suspended
                from tenants left join principals on principals.tenant = tenants.id and principals.name = $2
                where tenants.id = $1
            ), found as (
                select true as is_ours, sandbox, begun_by is not null as is_begun, null::bytea as target, null::bytea as body, null::smallint as status,
                    null as content_type, null as location, null::bytea as answer
                from taken
                union all
                select false, sandbox, false, target, body, status, content_type, location, answer
                from idempotency_keys
                where tenant = $1 and principal = $2 and key = $3 and not exists (select 1 from taken)
                    -- as it was when the statement began: one that was free then was taken since
                    and expires_at > $9 and (status is not null or holder is not null or sandbox is not null or begun_by is not null)
            )
            select is_ours as "is_ours!", sandbox as "sandbox?", is_begun as "is_begun!", target as "target?", body as "body?", status as "status?",
                content_type as "content_type?", location as "location?", answer as "answer?",
                coalesce((select is_suspended from standing), false) as "is_suspended!"
            from found"#,
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            &fingerprint.target[..],
            fingerprint.body.as_ref().map(|body| &body[..]) as _,
            taking.node.0,
            taking.process,
            holder,
            taking.now,
            taking.expires_at,
            taking.orphaned_before as _,
        )
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let made = row.sandbox.map(SandboxId);
        let state = if row.is_ours {
            KeyState::Ours { made, is_begun: row.is_begun }
        } else {
            let kept = row.status.map(|status| Kept {
                status: status.cast_unsigned(),
                content_type: row.content_type,
                location: row.location,
                body: row.answer,
                made,
            });
            state_of(row.target.as_deref(), row.body.as_deref(), fingerprint, kept)
        };
        Ok(Some((state, row.is_suspended)))
    }

    /// Where the key stands, without taking it: never [`KeyState::Ours`]. `None`: it is nobody's.
    pub async fn look_at_key(
        &self,
        name: &KeyName,
        fingerprint: &Fingerprint,
        now: OffsetDateTime,
    ) -> Result<Option<KeyState>, StoreError> {
        let row = sqlx::query!(
            "select target, body, status, content_type, location, answer, sandbox
            from idempotency_keys
            where tenant = $1 and principal = $2 and key = $3 and expires_at > $4 and (status is not null or holder is not null)",
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            now,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|row| {
            let kept = row.status.map(|status| Kept {
                status: status.cast_unsigned(),
                content_type: row.content_type,
                location: row.location,
                body: row.answer,
                made: row.sandbox.map(SandboxId),
            });
            state_of(Some(&row.target), row.body.as_deref(), fingerprint, kept)
        }))
    }

    /// Notes that this attempt begins what must not be done twice. False: it does not hold the key any more, and has no business to begin.
    pub async fn begin_keyed(&self, attempt: &HeldKey) -> Result<bool, StoreError> {
        let HeldKey { name, holder } = attempt;
        let begun = sqlx::query!(
            "update idempotency_keys set begun_by = holder
            where tenant = $1 and principal = $2 and key = $3 and holder = $4 and begun_by is null",
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            holder,
        )
        .execute(&self.pool)
        .await?;
        Ok(begun.rows_affected() == 1)
    }

    /// Keeps the answer of this attempt, with what its body turned out to be. Nothing happens if it does not hold the key any more.
    pub async fn keep_answer(&self, attempt: &HeldKey, body: Option<[u8; 32]>, kept: &Kept) -> Result<(), StoreError> {
        let HeldKey { name, holder } = attempt;
        sqlx::query!(
            "update idempotency_keys
            set holder = null, body = coalesce($5, body), status = $6, content_type = $7, location = $8, answer = $9
            where tenant = $1 and principal = $2 and key = $3 and holder = $4",
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            holder,
            body.as_ref().map(|body| &body[..]) as _,
            kept.status.cast_signed(),
            kept.content_type.as_deref() as _,
            kept.location.as_deref() as _,
            kept.body.as_deref() as _,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Gives the key back without an answer: the next attempt does the work, or goes on with the sandbox that this one made, or hears that nobody
    /// knows. One that made and left nothing is not kept for longer than until then.
    pub async fn give_key_back(&self, attempt: &HeldKey, left: Left, until: OffsetDateTime) -> Result<(), StoreError> {
        let HeldKey { name, holder } = attempt;
        // No deletion: one that waits for the row while a sandbox is tied to it would have to look twice.
        sqlx::query!(
            "update idempotency_keys
            set holder = null, begun_by = case when $6 and begun_by = holder then null else begun_by end,
                expires_at = case when sandbox is null and (begun_by is null or $6 and begun_by = holder) then least(expires_at, $5)
                    else expires_at end
            where tenant = $1 and principal = $2 and key = $3 and holder = $4",
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            holder,
            until,
            left == Left::Undone,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Frees the key of a sandbox whose creator was told that it was not made, and which ended after so many claims without having been begun: unless
    /// another attempt answers for it by now.
    pub async fn free_key_of(&self, attempt: &HeldKey, sandbox: SandboxId, claims: u64) -> Result<(), StoreError> {
        let HeldKey { name, holder } = attempt;
        sqlx::query!(
            "delete from idempotency_keys
            where tenant = $1 and principal = $2 and key = $3 and sandbox = $4 and status is null and (holder is null or holder = $5)
                and exists (select 1 from sandboxes where id = $4 and state = 'failed' and reason = 'infra_error' and claims = $6)",
            name.owner.tenant.as_str(),
            name.owner.principal,
            name.key,
            sandbox.0,
            holder,
            bigint(claims),
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Removes keys whose time is over. Answers how many.
    pub async fn prune_keys(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from idempotency_keys using (
                select tenant, principal, key from idempotency_keys
                where expires_at <= $1
                order by expires_at
                limit $2
                for update skip locked
            ) as old
            where (idempotency_keys.tenant, idempotency_keys.principal, idempotency_keys.key) = (old.tenant, old.principal, old.key)",
            now,
            i64::from(limit),
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }
}

fn state_of(target: Option<&[u8]>, body: Option<&[u8]>, asked: &Fingerprint, kept: Option<Kept>) -> KeyState {
    let is_other_body = matches!((body, &asked.body), (Some(had), Some(has)) if had != has);
    match kept {
        _ if target != Some(&asked.target[..]) || is_other_body => KeyState::Reused,
        Some(kept) => KeyState::Answered(kept),
        None => KeyState::Theirs,
    }
}

#[cfg(test)]
mod tests;
