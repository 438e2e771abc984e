//! Table `webhooks`: where tenants want to be told what happens.

use serde_json::json;
use sqlx::{PgConnection, types::Json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Act, Store, StoreError, events, unsigned};
use crate::sandbox::{Exceeded, QuotaScope, Quotas, TenantId};

/// A webhook as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    pub id: Uuid,
    pub tenant: TenantId,
    pub url: String,
    /// As in `sandbox.ended` or `sandbox.*`; empty: all.
    pub kinds: Vec<String>,
    pub description: String,
    pub is_active: bool,
    /// Counted from one.
    pub secret_version: u32,
    /// Until when the secret before is good too.
    pub former_secret_until: Option<OffsetDateTime>,
    /// Of what its secrets are made.
    pub key_id: String,
    pub created_at: OffsetDateTime,
    /// Since when every attempt has failed.
    pub failing_since: Option<OffsetDateTime>,
    /// When it was made inactive for that.
    pub disabled_at: Option<OffsetDateTime>,
    /// Events of which no delivery was made because too many were waiting.
    pub dropped: u64,
}

/// A webhook that is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewWebhook {
    pub id: Uuid,
    pub tenant: TenantId,
    pub url: String,
    pub kinds: Vec<String>,
    pub description: String,
    pub is_active: bool,
    pub key_id: String,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// By this call, or by an earlier one with the same id.
    Yes(Box<Webhook>),
    Exceeded(Exceeded),
}

/// What is to be changed of a webhook.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WebhookChange {
    pub url: Option<String>,
    pub kinds: Option<Vec<String>>,
    pub description: Option<String>,
    pub is_active: Option<bool>,
}

/// Gives a webhook its next secret.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Until when the one before is good.
    pub former_until: OffsetDateTime,
    pub key_id: &'a str,
    /// Names the request: a second one of this name changes nothing.
    pub request: Option<&'a str>,
}

struct Row {
    id: Uuid,
    tenant: String,
    url: String,
    kinds: Vec<String>,
    description: String,
    is_active: bool,
    secret_version: i32,
    former_secret_until: Option<OffsetDateTime>,
    key_id: String,
    created_at: OffsetDateTime,
    failing_since: Option<OffsetDateTime>,
    disabled_at: Option<OffsetDateTime>,
    dropped: i64,
}

impl Row {
    fn read(self) -> Webhook {
        Webhook {
            id: self.id,
            tenant: TenantId::proven(self.tenant),
            url: self.url,
            kinds: self.kinds,
            description: self.description,
            is_active: self.is_active,
            secret_version: self.secret_version.unsigned_abs(),
            former_secret_until: self.former_secret_until,
            key_id: self.key_id,
            created_at: self.created_at,
            failing_since: self.failing_since,
            disabled_at: self.disabled_at,
            dropped: unsigned(self.dropped),
        }
    }
}

/// Reads whole rows; where from, and which, the caller says.
macro_rules! webhooks {
    ($before:literal, $after:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            $before + " id, tenant, url, kinds, description, is_active, secret_version, former_secret_until, key_id, created_at, failing_since, disabled_at, dropped "
                + $after
            $(, $argument)*
        )
    };
}

impl Store {
    /// Makes a webhook, unless its tenant has as many as it may. One of the same id that is there already is left as it is.
    pub async fn create_webhook(&self, new: &NewWebhook, defaults: &Quotas, act: &Act<'_>) -> Result<Created, StoreError> {
        let tenant = new.tenant.as_str();
        let mut transaction = self.pool.begin().await?;
        sqlx::query!("insert into tenants (id, created_at) values ($1, $2) on conflict do nothing", tenant, act.at)
            .execute(&mut *transaction)
            .await?;
        let locked = sqlx::query_scalar!(r#"select quotas as "quotas: Json<Quotas>" from tenants where id = $1 for no key update"#, tenant)
            .fetch_one(&mut *transaction)
            .await?;
        if let Some(webhook) = find(&mut transaction, &new.tenant, new.id).await? {
            transaction.rollback().await?;
            return Ok(Created::Yes(Box::new(webhook)));
        }
        let used = sqlx::query_scalar!(r#"select count(*) as "count!" from webhooks where tenant = $1"#, tenant)
            .fetch_one(&mut *transaction)
            .await?;
        if let Some(limit) = locked.0.over(defaults).number("webhooks")
            && unsigned(used) >= limit
        {
            transaction.rollback().await?;
            return Ok(Created::Exceeded(Exceeded {
                scope: QuotaScope::Tenant,
                quota: "webhooks".to_owned(),
                limit: limit.into(),
                used: unsigned(used).into(),
                retry_after_s: None,
            }));
        }
        sqlx::query!(
            "insert into webhooks (id, tenant, url, kinds, description, is_active, key_id, created_at) values ($1, $2, $3, $4, $5, $6, $7, $8)",
            new.id,
            tenant,
            new.url,
            &new.kinds,
            new.description,
            new.is_active,
            new.key_id,
            act.at,
        )
        .execute(&mut *transaction)
        .await?;
        tell(&mut transaction, &new.tenant, new.id, "webhook.created", act).await?;
        let webhook = find(&mut transaction, &new.tenant, new.id).await?;
        transaction.commit().await?;
        let webhook = webhook.ok_or_else(|| anyhow::anyhow!("a webhook that was just made is gone"))?;
        Ok(Created::Yes(Box::new(webhook)))
    }

    /// The tenant's webhook.
    pub async fn find_webhook(&self, tenant: &TenantId, id: Uuid) -> Result<Option<Webhook>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        find(&mut connection, tenant, id).await
    }

    /// The tenant's webhooks in the order of their making, behind this one.
    pub async fn list_webhooks(&self, tenant: &TenantId, after: Option<Uuid>, limit: u32) -> Result<Vec<Webhook>, StoreError> {
        let rows = webhooks!(
            "select",
            "from webhooks where tenant = $1 and ($2::uuid is null or id > $2) order by id limit $3",
            tenant.as_str(),
            after as _,
            i64::from(limit),
        );
        Ok(rows.fetch_all(&self.pool).await?.into_iter().map(Row::read).collect())
    }

    /// Changes the tenant's webhook. To make it active again forgives it what failed before. `None`: there is none.
    pub async fn change_webhook(
        &self,
        tenant: &TenantId,
        id: Uuid,
        change: &WebhookChange,
        act: &Act<'_>,
    ) -> Result<Option<Webhook>, StoreError> {
        let WebhookChange { url, kinds, description, is_active } = change;
        let mut transaction = self.pool.begin().await?;
        let row = webhooks!(
            "update webhooks
            set url = coalesce($3, url), kinds = coalesce($4, kinds), description = coalesce($5, description), is_active = coalesce($6, is_active),
                failing_since = case when $6 then null else failing_since end, disabled_at = case when $6 then null else disabled_at end,
                -- what happened while it was inactive does not concern it
                xact = case when $6 and not is_active then pg_current_xact_id()::text::bigint else xact end
            where id = $1 and tenant = $2
            returning",
            "",
            id,
            tenant.as_str(),
            url.as_deref() as _,
            kinds.as_deref() as _,
            description.as_deref() as _,
            *is_active as _,
        );
        let Some(row) = row.fetch_optional(&mut *transaction).await? else { return Ok(None) };
        tell(&mut transaction, tenant, id, "webhook.changed", act).await?;
        transaction.commit().await?;
        Ok(Some(row.read()))
    }

    /// Removes the tenant's webhook and all its deliveries. False: there is none.
    pub async fn remove_webhook(&self, tenant: &TenantId, id: Uuid, act: &Act<'_>) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let gone =
            sqlx::query!("delete from webhooks where id = $1 and tenant = $2", id, tenant.as_str()).execute(&mut *transaction).await?;
        if gone.rows_affected() == 0 {
            return Ok(false);
        }
        tell(&mut transaction, tenant, id, "webhook.deleted", act).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Gives the tenant's webhook its next secret; the one before is good for a time. `None`: there is no such webhook.
    pub async fn rotate_webhook_secret(
        &self,
        tenant: &TenantId,
        id: Uuid,
        rotation: Rotation<'_>,
        act: &Act<'_>,
    ) -> Result<Option<Webhook>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let row = webhooks!(
            "update webhooks
            set secret_version = secret_version + 1, former_secret_until = $3, key_id = $4, rotated_by = $5
            where id = $1 and tenant = $2 and ($5::text is null or rotated_by is distinct from $5)
            returning",
            "",
            id,
            tenant.as_str(),
            rotation.former_until,
            rotation.key_id,
            rotation.request as _,
        );
        let Some(row) = row.fetch_optional(&mut *transaction).await? else {
            // Done before by the same request, if it is there at all.
            return find(&mut transaction, tenant, id).await;
        };
        tell(&mut transaction, tenant, id, "webhook.rotated", act).await?;
        transaction.commit().await?;
        Ok(Some(row.read()))
    }
}

async fn find(connection: &mut PgConnection, tenant: &TenantId, id: Uuid) -> Result<Option<Webhook>, StoreError> {
    let row = webhooks!("select", "from webhooks where id = $1 and tenant = $2", id, tenant.as_str());
    Ok(row.fetch_optional(connection).await?.map(Row::read))
}

async fn tell(connection: &mut PgConnection, tenant: &TenantId, id: Uuid, kind: &str, act: &Act<'_>) -> Result<(), StoreError> {
    events::tell(connection, Some(tenant), kind, Some(&format!("webhook/{id}")), act).await
}

/// What the event of a webhook that was made inactive says.
pub(super) fn disabled_data(failing_since: OffsetDateTime) -> serde_json::Value {
    let since = failing_since.format(&time::format_description::well_known::Rfc3339);
    json!({ "failing_since": since.unwrap_or_default() })
}
