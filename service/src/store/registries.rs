//! Table `registry_logins`: by which name and sealed password tenants are known to registries.

use serde_json::json;
use time::OffsetDateTime;

use super::{Act, Store, StoreError, events, unsigned};
use crate::sandbox::TenantId;

/// Registries that a tenant can have credentials for.
pub const LOGINS_MAX: u64 = 64;

/// What one registry knows a tenant by.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryLogin {
    /// As people know it.
    pub registry: String,
    pub username: String,
    /// The password, for whoever has the key.
    pub sealed: Vec<u8>,
    /// Which key that is.
    pub key_id: String,
    pub changed_at: OffsetDateTime,
}

impl std::fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryLogin").field("registry", &self.registry).finish_non_exhaustive()
    }
}

impl Store {
    /// Keeps it in the place of what is there for that registry. False: the tenant has as many as it may.
    pub async fn set_registry_login(&self, tenant: &TenantId, login: &RegistryLogin, act: &Act<'_>) -> Result<bool, StoreError> {
        let RegistryLogin { registry, username, sealed, key_id, changed_at } = login;
        let mut transaction = self.pool.begin().await?;
        sqlx::query!("insert into tenants (id, created_at) values ($1, $2) on conflict do nothing", tenant.as_str(), act.at)
            .execute(&mut *transaction)
            .await?;
        sqlx::query_scalar!("select id from tenants where id = $1 for no key update", tenant.as_str()).fetch_one(&mut *transaction).await?;
        let others = sqlx::query_scalar!(
            r#"select count(*) as "count!" from registry_logins where tenant = $1 and registry <> $2"#,
            tenant.as_str(),
            registry
        )
        .fetch_one(&mut *transaction)
        .await?;
        if unsigned(others) >= LOGINS_MAX {
            transaction.rollback().await?;
            return Ok(false);
        }
        sqlx::query!(
            "insert into registry_logins (tenant, registry, username, sealed, key_id, changed_at) values ($1, $2, $3, $4, $5, $6)
            on conflict (tenant, registry) do update
            set username = excluded.username, sealed = excluded.sealed, key_id = excluded.key_id, changed_at = excluded.changed_at",
            tenant.as_str(),
            registry,
            username,
            sealed,
            key_id,
            changed_at,
        )
        .execute(&mut *transaction)
        .await?;
        let act = Act { data: json!({ "username": username }), ..act.clone() };
        events::tell(&mut transaction, Some(tenant), "registry.login_kept", Some(&format!("registry/{registry}")), &act).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// What is kept for this registry.
    pub async fn find_registry_login(&self, tenant: &TenantId, registry: &str) -> Result<Option<RegistryLogin>, StoreError> {
        let login = sqlx::query_as!(
            RegistryLogin,
            "select registry, username, sealed, key_id, changed_at from registry_logins where tenant = $1 and registry = $2",
            tenant.as_str(),
            registry,
        );
        Ok(login.fetch_optional(&self.pool).await?)
    }

    /// What is kept for all of them, by their names.
    pub async fn list_registry_logins(&self, tenant: &TenantId) -> Result<Vec<RegistryLogin>, StoreError> {
        let logins = sqlx::query_as!(
            RegistryLogin,
            "select registry, username, sealed, key_id, changed_at from registry_logins where tenant = $1 order by registry",
            tenant.as_str(),
        );
        Ok(logins.fetch_all(&self.pool).await?)
    }

    /// Forgets what is kept for this registry. False: that is nothing.
    pub async fn remove_registry_login(&self, tenant: &TenantId, registry: &str, act: &Act<'_>) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let gone = sqlx::query!("delete from registry_logins where tenant = $1 and registry = $2", tenant.as_str(), registry)
            .execute(&mut *transaction)
            .await?;
        if gone.rows_affected() == 0 {
            return Ok(false);
        }
        events::tell(&mut transaction, Some(tenant), "registry.login_removed", Some(&format!("registry/{registry}")), act).await?;
        transaction.commit().await?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(registry: &str) -> RegistryLogin {
        RegistryLogin {
            registry: registry.to_owned(),
            username: "me".to_owned(),
            sealed: vec![1, 2, 3],
            key_id: "one".to_owned(),
            changed_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    fn act() -> Act<'static> {
        Act { actor: None, at: OffsetDateTime::UNIX_EPOCH, data: json!({}) }
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn the_last_login_for_a_registry_is_the_one_and_no_other_tenants(pool: sqlx::PgPool) {
        let store = Store { pool: pool.clone().into() };
        let (acme, other) = (TenantId::proven("acme".into()), TenantId::proven("other".into()));
        let second = RegistryLogin { username: "you".to_owned(), ..login("a.example") };

        assert!(store.set_registry_login(&acme, &login("a.example"), &act()).await.unwrap());
        assert!(store.set_registry_login(&acme, &second, &act()).await.unwrap());

        assert_eq!(store.list_registry_logins(&acme).await.unwrap(), std::slice::from_ref(&second));
        assert_eq!(store.find_registry_login(&acme, "a.example").await.unwrap(), Some(second));
        assert_eq!(store.find_registry_login(&other, "a.example").await.unwrap(), None);
        assert!(!store.remove_registry_login(&other, "a.example", &act()).await.unwrap());
        assert!(store.remove_registry_login(&acme, "a.example", &act()).await.unwrap());
        let kinds = sqlx::query_scalar!("select kind from events order by id").fetch_all(&pool).await.unwrap();
        assert_eq!(kinds, ["registry.login_kept", "registry.login_kept", "registry.login_removed"]);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_tenant_has_only_so_many_logins(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        let acme = TenantId::proven("acme".into());
        for number in 0..LOGINS_MAX {
            assert!(store.set_registry_login(&acme, &login(&format!("r{number}.example")), &act()).await.unwrap());
        }
        assert!(!store.set_registry_login(&acme, &login("one-more.example"), &act()).await.unwrap());
        assert!(store.set_registry_login(&acme, &login("r0.example"), &act()).await.unwrap(), "one that is there is changed");
    }
}
