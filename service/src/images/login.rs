//! As whom tenants are known to registries.

use super::{Credentials, ImageSource, Images, ImportError, registry::RegistryName, seal::Place};
use crate::{
    sandbox::{Owner, TenantId},
    store::RegistryLogin,
};

impl Images {
    /// Keeps what the tenant of `actor` is known by there, in the place of what it was before. `None`: it has as many as it may.
    pub async fn keep_login(
        &self,
        registry: &RegistryName,
        credentials: &Credentials,
        actor: &Owner,
    ) -> Result<Option<RegistryLogin>, ImportError> {
        let Credentials { username, password } = credentials;
        let place = Place { tenant: &actor.tenant, registry: registry.as_str(), username };
        let login = RegistryLogin {
            registry: registry.as_str().to_owned(),
            username: username.clone(),
            sealed: self.sealing.seal(place, password).map_err(ImportError::Internal)?,
            key_id: self.sealing.id().to_owned(),
            changed_at: self.clock.now(),
        };
        let is_kept = self.store.set_registry_login(&actor.tenant, &login, &self.act_of(actor)).await?;
        Ok(is_kept.then_some(login))
    }

    /// What tells one request that holds a password from another, and can be kept.
    pub fn sum_of(&self, request: &[u8]) -> [u8; 32] {
        self.sealing.sum(request)
    }

    /// Forgets it. False: nothing is kept.
    pub async fn forget_login(&self, registry: &RegistryName, actor: &Owner) -> Result<bool, ImportError> {
        Ok(self.store.remove_registry_login(&actor.tenant, registry.as_str(), &self.act_of(actor)).await?)
    }

    /// What the tenant is known by to the registry of an image, if anything is kept.
    pub async fn kept_credentials(&self, tenant: &TenantId, source: &ImageSource) -> Result<Option<Credentials>, ImportError> {
        let Some(login) = self.store.find_registry_login(tenant, source.registry()).await? else { return Ok(None) };
        let RegistryLogin { registry, username, sealed, key_id, changed_at: _ } = login;
        match self.sealing.open(Place { tenant, registry: &registry, username: &username }, &sealed) {
            Some(password) => Ok(Some(Credentials { username, password })),
            None => {
                tracing::warn!(
                    registry,
                    tenant = tenant.as_str(),
                    key_id,
                    "a password for a registry cannot be opened with this node's key"
                );
                Err(ImportError::RegistryDenied(format!(
                    "the credentials that are kept for {registry} cannot be read any more: give them again"
                )))
            }
        }
    }
}
