//! Table `webhook_deliveries`: what is to be sent to webhooks, who tries it until when, and how it went.

use std::{collections::HashMap, time::Duration};

use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Act, Position, Store, StoreError, Told, damaged, events, pool::Transaction, unsigned, webhooks::disabled_data};
use crate::sandbox::TenantId;

/// Events of which deliveries are made in one transaction.
const BATCH: i64 = 500;
/// Deliveries that may wait for one webhook; of what comes while so many do, none is made.
const WAITING_MAX: i64 = 10_000;

/// A delivery as its tenant sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    pub id: Uuid,
    /// Of the event; `None`: it is a test.
    pub event: Option<u64>,
    pub kind: String,
    pub state: DeliveryState,
    pub created_at: OffsetDateTime,
    /// When it is tried again; `None`: it is not.
    pub next_at: Option<OffsetDateTime>,
    pub ended_at: Option<OffsetDateTime>,
    /// How many attempts were begun.
    pub attempt_count: u32,
    /// The last of them, as far as their end is known.
    pub attempts: Vec<Attempt>,
    /// The beginning of the last answer's body.
    pub response: Option<String>,
}

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryState {
    /// It is tried, or will be.
    Pending,
    /// It was taken.
    Delivered,
    /// It was given up.
    Failed,
}

/// How one attempt went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = DeliveryAttempt)]
pub struct Attempt {
    /// Counted from one.
    pub number: u32,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    pub at: OffsetDateTime,
    /// Up to the head of the answer.
    pub ms: u64,
    /// Of the answer, if there was one.
    #[schema(required)]
    pub status: Option<u16>,
    /// Why it did not do; null: it was taken.
    #[schema(required)]
    pub error: Option<String>,
}

/// An attempt that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    pub delivery: Uuid,
    pub webhook: Uuid,
    pub tenant: String,
    pub url: String,
    pub body: String,
    /// Counted from one, and how many of them were before it was begun anew.
    pub number: u32,
    pub numbers_before: u32,
    pub give_up_at: OffsetDateTime,
    pub secret_version: u32,
    /// Whether it is signed with the secret before, too.
    pub is_former_secret_good: bool,
}

/// Whose attempts are under way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Busy {
    /// None is to begin for these.
    pub webhooks: Vec<Uuid>,
    /// How many are, and how many may be.
    pub tenants: Vec<(String, u32)>,
    pub of_tenant_max: u32,
}

/// What a tenant may ask of a delivery that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redelivery {
    Begun,
    /// It is being tried anyway.
    Pending,
    /// Nothing is sent to its webhook.
    Inactive,
}

/// Which deliveries of a webhook to list.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeliveryFilter {
    pub state: Option<DeliveryState>,
    /// Older than this one.
    pub before: Option<Uuid>,
    pub limit: u32,
}

struct Row {
    id: Uuid,
    event: Option<i64>,
    kind: String,
    state: String,
    created_at: OffsetDateTime,
    next_at: OffsetDateTime,
    ended_at: Option<OffsetDateTime>,
    attempt_count: i32,
    attempts: Json<Vec<Attempt>>,
    response: Option<String>,
}

impl DeliveryState {
    const ALL: [Self; 3] = [Self::Pending, Self::Delivered, Self::Failed];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
        }
    }

    /// The state of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl Row {
    fn read(self) -> Result<Delivery, StoreError> {
        let state = DeliveryState::named(&self.state).ok_or_else(|| damaged(format_args!("the state {}", self.state)))?;
        Ok(Delivery {
            id: self.id,
            event: self.event.map(unsigned),
            kind: self.kind,
            state,
            created_at: self.created_at,
            next_at: Some(self.next_at).filter(|_| state == DeliveryState::Pending),
            ended_at: self.ended_at,
            attempt_count: self.attempt_count.unsigned_abs(),
            attempts: self.attempts.0,
            response: self.response,
        })
    }
}

impl Store {
    /// Makes deliveries of the events that came, for the webhooks that want them: of each event once, whichever node does it. Answers how many
    /// events it looked at; 0: there are none that anybody may want, or another node is at it.
    pub async fn make_deliveries(
        &self,
        now: OffsetDateTime,
        give_up_at: OffsetDateTime,
        body: fn(Told) -> String,
    ) -> Result<usize, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let position =
            sqlx::query!("select xact, id from webhook_position for update skip locked").fetch_optional(&mut *transaction).await?;
        let Some(position) = position else {
            transaction.rollback().await?;
            return Ok(0);
        };
        let horizon = sqlx::query_scalar!(r#"select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as "xact!""#)
            .fetch_one(&mut *transaction)
            .await?;
        let seen = sqlx::query!(
            "select xact, id from events where (xact, id) > ($1, $2) and xact < $3 order by xact, id limit $4",
            position.xact,
            position.id,
            horizon,
            BATCH,
        )
        .fetch_all(&mut *transaction)
        .await?;
        let Some(last) = seen.last() else {
            transaction.rollback().await?;
            return Ok(0);
        };
        let is_anybody_there = sqlx::query_scalar!(r#"select exists (select 1 from webhooks where is_active) as "is!""#);
        if !is_anybody_there.fetch_one(&mut *transaction).await? {
            return pass_over(transaction, position.xact, horizon).await;
        }
        let wanted = sqlx::query!(
            r#"select webhooks.id as webhook, webhooks.tenant, events.xact, events.id, kind,
                coalesce(object, 'sandbox/' || sandbox, '') as "object!", actor_tenant, actor, at, data
            from events join webhooks on webhooks.tenant = events.tenant and webhooks.xact < events.xact
            where (events.xact, events.id) > ($1, $2) and (events.xact, events.id) <= ($3, $4) and is_active
                and (cardinality(kinds) = 0 or kind = any(kinds) or split_part(kind, '.', 1) || '.*' = any(kinds))
            order by events.xact, events.id"#,
            position.xact,
            position.id,
            last.xact,
            last.id,
        )
        .fetch_all(&mut *transaction)
        .await?;
        let mut room = HashMap::new();
        let (mut ids, mut webhooks, mut tenants, mut of_events, mut kinds, mut bodies) = (vec![], vec![], vec![], vec![], vec![], vec![]);
        for row in wanted {
            let left = match room.entry(row.webhook) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    let waiting = sqlx::query_scalar!(
                        r#"select count(*) as "count!" from (
                            select 1 from webhook_deliveries where webhook = $1 and state = 'pending' limit $2
                        ) as waiting"#,
                        row.webhook,
                        WAITING_MAX,
                    );
                    entry.insert(WAITING_MAX - waiting.fetch_one(&mut *transaction).await?)
                }
            };
            *left -= 1;
            if *left < 0 {
                continue;
            }
            let position = Position { xact: unsigned(row.xact), id: unsigned(row.id) };
            ids.push(Uuid::now_v7());
            webhooks.push(row.webhook);
            of_events.push(row.id);
            kinds.push(row.kind.clone());
            let tenant = TenantId::proven(row.tenant.clone());
            tenants.push(row.tenant);
            bodies.push(body(Told {
                position,
                tenant: Some(tenant),
                kind: row.kind,
                object: row.object,
                actor_tenant: row.actor_tenant,
                actor: row.actor,
                at: row.at,
                data: row.data,
            }));
        }
        sqlx::query!(
            "insert into webhook_deliveries (id, webhook, tenant, event, kind, body, state, created_at, next_at, give_up_at)
            select id, webhook, tenant, event, kind, body, 'pending', $7, $7, $8
            from unnest($1::uuid[], $2::uuid[], $3::text[], $4::bigint[], $5::text[], $6::text[]) as made (id, webhook, tenant, event, kind, body)
            -- one that was deleted meanwhile wants nothing
            where exists (select 1 from webhooks where webhooks.id = made.webhook for key share)
            on conflict do nothing",
            &ids,
            &webhooks,
            &tenants,
            &of_events,
            &kinds,
            &bodies,
            now,
            give_up_at,
        )
        .execute(&mut *transaction)
        .await?;
        for (webhook, left) in room.into_iter().filter(|(_, left)| *left < 0) {
            sqlx::query!("update webhooks set dropped = dropped + $2 where id = $1", webhook, -left).execute(&mut *transaction).await?;
        }
        let id_max = seen.iter().map(|event| event.id).max().unwrap_or(0);
        sqlx::query!("update webhook_position set xact = $1, id = $2, id_max = greatest(id_max, $3)", last.xact, last.id, id_max)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(seen.len())
    }

    /// Makes a delivery that tests the webhook: one attempt, and no more.
    pub async fn make_test_delivery(
        &self,
        tenant: &TenantId,
        webhook: Uuid,
        body: &str,
        now: OffsetDateTime,
    ) -> Result<Option<Delivery>, StoreError> {
        let id = Uuid::now_v7();
        sqlx::query!(
            "insert into webhook_deliveries (id, webhook, tenant, kind, body, state, created_at, next_at, give_up_at)
            select $1, id, tenant, 'webhook.test', $4, 'pending', $5, $5, $5 from webhooks where id = $2 and tenant = $3",
            id,
            webhook,
            tenant.as_str(),
            body,
            now,
        )
        .execute(&self.pool)
        .await?;
        self.find_delivery(tenant, webhook, id).await
    }

    /// The deliveries of the tenant's webhook, newest first.
    pub async fn list_deliveries(&self, tenant: &TenantId, webhook: Uuid, filter: &DeliveryFilter) -> Result<Vec<Delivery>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            r#"select id, event, kind, state, created_at, next_at, ended_at, attempt_count, attempts as "attempts: Json<Vec<Attempt>>", response
            from webhook_deliveries
            where webhook = $1 and tenant = $2 and ($3::text is null or state = $3) and ($4::uuid is null or id < $4)
            order by id desc
            limit $5"#,
            webhook,
            tenant.as_str(),
            filter.state.map(DeliveryState::as_str) as _,
            filter.before as _,
            i64::from(filter.limit),
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect()
    }

    /// One delivery of the tenant's webhook.
    pub async fn find_delivery(&self, tenant: &TenantId, webhook: Uuid, id: Uuid) -> Result<Option<Delivery>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            r#"select id, event, kind, state, created_at, next_at, ended_at, attempt_count, attempts as "attempts: Json<Vec<Attempt>>", response
            from webhook_deliveries
            where id = $1 and webhook = $2 and tenant = $3"#,
            id,
            webhook,
            tenant.as_str(),
        );
        row.fetch_optional(&self.pool).await?.map(Row::read).transpose()
    }

    /// Has a delivery that is over be tried again, as if it were new. `None`: there is none.
    pub async fn redeliver(
        &self,
        tenant: &TenantId,
        webhook: Uuid,
        id: Uuid,
        now: OffsetDateTime,
        give_up_at: OffsetDateTime,
    ) -> Result<Option<Redelivery>, StoreError> {
        let row = sqlx::query!(
            r#"with known as (
                select deliveries.id, deliveries.state, is_active
                from webhook_deliveries as deliveries join webhooks on webhooks.id = deliveries.webhook
                where deliveries.id = $1 and webhook = $2 and deliveries.tenant = $3
            ), begun as (
                update webhook_deliveries
                set state = 'pending', next_at = $4, give_up_at = $5, ended_at = null, attempts_before = attempt_count
                from known
                where webhook_deliveries.id = known.id and webhook_deliveries.state <> 'pending' and known.is_active
                returning webhook_deliveries.id
            )
            select is_active, exists (select 1 from begun) as "is_begun!" from known"#,
            id,
            webhook,
            tenant.as_str(),
            now,
            give_up_at,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|row| match (row.is_begun, row.is_active) {
            (true, _) => Redelivery::Begun,
            (false, true) => Redelivery::Pending,
            (false, false) => Redelivery::Inactive,
        }))
    }

    /// Takes attempts that are due: of every webhook that has one, one, and none of those whose share is used up. Until `held_for` is over they are the
    /// caller's alone. Webhooks whose secret is made of another key are left to the nodes that have it.
    pub async fn claim_attempts(
        &self,
        busy: &Busy,
        key_id: &str,
        now: OffsetDateTime,
        held_for: Duration,
        limit: u32,
    ) -> Result<Vec<Claimed>, StoreError> {
        let (tenants, counts): (Vec<String>, Vec<i64>) =
            busy.tenants.iter().map(|(tenant, count)| (tenant.clone(), i64::from(*count))).unzip();
        let rows = sqlx::query!(
            r#"with recursive waiting (webhook) as (
                -- each webhook that has something, by one step in the index for each
                (select webhook from webhook_deliveries where state = 'pending' order by webhook limit 1)
                union all
                select (
                    select further.webhook from webhook_deliveries as further
                    where state = 'pending' and further.webhook > waiting.webhook order by further.webhook limit 1
                )
                from waiting where waiting.webhook is not null
            ), first as (
                select delivery.id, delivery.next_at, webhooks.tenant
                from waiting
                    join webhooks on webhooks.id = waiting.webhook and webhooks.key_id = $2 and webhooks.id <> all($3)
                    cross join lateral (
                        select id, next_at from webhook_deliveries
                        where webhook = webhooks.id and state = 'pending' and next_at <= $1 and (webhooks.is_active or event is null)
                        order by next_at
                        limit 1
                    ) as delivery
            ), ranked as (
                select first.id, first.next_at, row_number() over (partition by first.tenant order by first.next_at) + coalesce(counts.count, 0) as turn
                from first left join unnest($4::text[], $5::bigint[]) as counts (tenant, count) on counts.tenant = first.tenant
            ), picked as (
                select webhook_deliveries.id
                from webhook_deliveries join ranked on ranked.id = webhook_deliveries.id
                where ranked.turn <= $6 and state = 'pending' and webhook_deliveries.next_at <= $1
                order by ranked.next_at
                limit $7
                for update of webhook_deliveries skip locked -- several nodes may take at once
            )
            update webhook_deliveries as taken
            set next_at = $8, attempt_count = attempt_count + 1
            from picked, webhooks
            where taken.id = picked.id and webhooks.id = taken.webhook
            returning taken.id, taken.webhook, taken.tenant, taken.body, taken.attempt_count, taken.attempts_before, taken.give_up_at, webhooks.url,
                webhooks.secret_version, coalesce(webhooks.former_secret_until > $1, false) as "is_former_secret_good!""#,
            now,
            key_id,
            &busy.webhooks,
            &tenants,
            &counts,
            i64::from(busy.of_tenant_max),
            i64::from(limit),
            now + held_for,
        )
        .fetch_all(&self.pool)
        .await?;
        let claimed = rows.into_iter().map(|row| Claimed {
            delivery: row.id,
            webhook: row.webhook,
            tenant: row.tenant,
            url: row.url,
            body: row.body,
            number: row.attempt_count.unsigned_abs(),
            numbers_before: row.attempts_before.unsigned_abs(),
            give_up_at: row.give_up_at,
            secret_version: row.secret_version.unsigned_abs(),
            is_former_secret_good: row.is_former_secret_good,
        });
        Ok(claimed.collect())
    }

    /// Lets others make these attempts at once: who took them makes them no more.
    pub async fn give_attempts_back(&self, attempts: &[(Uuid, u32)], now: OffsetDateTime) -> Result<(), StoreError> {
        let (ids, numbers): (Vec<Uuid>, Vec<i32>) = attempts.iter().map(|(id, number)| (*id, number.cast_signed())).unzip();
        sqlx::query!(
            "update webhook_deliveries set next_at = $3
            from unnest($1::uuid[], $2::integer[]) as mine (id, number)
            where webhook_deliveries.id = mine.id and attempt_count = mine.number and state = 'pending'",
            &ids,
            &numbers,
            now,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Records how an attempt went, and what that says of its webhook: one that failed at every attempt for so long is made inactive, which is answered.
    /// With `next_at` the delivery is tried again then. What was taken is delivered, however late that is recorded; a failure that comes after
    /// somebody else took the delivery up is theirs to record.
    pub async fn record_attempt(
        &self,
        claimed: &Claimed,
        attempt: &Attempt,
        response: Option<&str>,
        next_at: Option<OffsetDateTime>,
        disable_after: Duration,
    ) -> Result<bool, StoreError> {
        let is_taken = attempt.error.is_none();
        let mut transaction = self.pool.begin().await?;
        // Before its deliveries, always: who removes it does so in that order.
        sqlx::query!("select id from webhooks where id = $1 for no key update", claimed.webhook).fetch_optional(&mut *transaction).await?;
        let row = sqlx::query!(
            "update webhook_deliveries
            set state = case when $3 then 'delivered' when $4::timestamptz is null then 'failed' else 'pending' end,
                next_at = coalesce($4, next_at), ended_at = case when $3 or $4 is null then $5::timestamptz end,
                attempts = (case when jsonb_array_length(attempts) >= 50 then attempts - 0 else attempts end) || $6, response = $7
            where id = $1 and state = 'pending' and ($3 or attempt_count = $2)
            returning event",
            claimed.delivery,
            claimed.number.cast_signed(),
            is_taken,
            next_at as _,
            attempt.at,
            Json(&[attempt]) as _,
            response as _,
        )
        .fetch_optional(&mut *transaction)
        .await?;
        // A test says nothing of how it is with events.
        let tells = row.is_some_and(|row| row.event.is_some());
        let is_disabled = tells && !is_taken && note_failure(&mut transaction, claimed, attempt.at, disable_after).await?;
        if tells && is_taken {
            sqlx::query!("update webhooks set failing_since = null where id = $1 and failing_since is not null", claimed.webhook)
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(is_disabled)
    }

    /// Gives up what waits for inactive webhooks beyond its time, so many at the most. Answers how many.
    pub async fn give_up_deliveries(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let given_up = sqlx::query!(
            "update webhook_deliveries as old set state = 'failed', ended_at = $1
            from (
                select webhook_deliveries.id from webhook_deliveries join webhooks on webhooks.id = webhook
                where state = 'pending' and not is_active and give_up_at < $1 and next_at < $1
                limit $2
                for update of webhook_deliveries skip locked
            ) as late
            where old.id = late.id",
            now,
            i64::from(limit),
        );
        Ok(given_up.execute(&self.pool).await?.rows_affected())
    }

    /// Removes deliveries that ended before this time. Answers how many.
    pub async fn prune_deliveries(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query!(
            "delete from webhook_deliveries using (
                select id from webhook_deliveries where state <> 'pending' and ended_at < $1 order by ended_at limit $2
                for update skip locked
            ) as old
            where webhook_deliveries.id = old.id",
            before,
            i64::from(limit),
        );
        Ok(gone.execute(&self.pool).await?.rows_affected())
    }
}

/// Goes on behind everything that nobody wants, now and then: whoever comes later has no use for it, and should not have to wait until it is looked at.
async fn pass_over(mut transaction: Transaction, done: i64, horizon: i64) -> Result<usize, StoreError> {
    /// Transactions: a look at this many events takes no time.
    const FAR: i64 = 5000;
    if horizon - done < FAR {
        transaction.rollback().await?;
        return Ok(0);
    }
    sqlx::query!("update webhook_position set xact = $1, id = 0, id_max = (select coalesce(max(id), 0) from events)", horizon)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(0)
}

/// Answers whether that made its webhook inactive.
async fn note_failure(
    connection: &mut sqlx::PgConnection,
    claimed: &Claimed,
    at: OffsetDateTime,
    disable_after: Duration,
) -> Result<bool, StoreError> {
    sqlx::query!("update webhooks set failing_since = $2 where id = $1 and failing_since is null", claimed.webhook, at)
        .execute(&mut *connection)
        .await?;
    let disabled = sqlx::query!(
        r#"update webhooks set is_active = false, disabled_at = $2
        where id = $1 and is_active and failing_since <= $3
        returning failing_since as "failing_since!""#,
        claimed.webhook,
        at,
        at - disable_after,
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = disabled else { return Ok(false) };
    let act = Act { actor: None, at, data: disabled_data(row.failing_since) };
    let tenant = TenantId::proven(claimed.tenant.clone());
    events::tell(connection, Some(&tenant), "webhook.disabled", Some(&format!("webhook/{}", claimed.webhook)), &act).await?;
    Ok(true)
}

#[cfg(test)]
mod tests;
