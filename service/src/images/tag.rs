//! Images get further names: the same content, counted once more.

use std::{collections::HashSet, sync::Arc};

use super::{Images, ImportError};
use crate::{
    sandbox::{ImageReference, Owner, TenantId},
    store::{Image, NewImage, Origin, Recorded},
};

impl Images {
    /// Makes `name` mean, for this tenant or — `None` — for all, what `reference` means to the tenant of `actor` now. `None`: that is nothing. What was begun is finished.
    pub async fn tag(
        self: &Arc<Self>,
        reference: String,
        name: ImageReference,
        tenant: Option<TenantId>,
        actor: Owner,
    ) -> Result<Option<Image>, ImportError> {
        let images = Arc::clone(self);
        let work = tokio::spawn(async move { images.tag_now(&reference, &name, tenant, &actor).await });
        work.await.unwrap_or_else(|panic| Err(ImportError::Internal(panic.into())))
    }

    async fn tag_now(
        &self,
        reference: &str,
        name: &ImageReference,
        tenant: Option<TenantId>,
        actor: &Owner,
    ) -> Result<Option<Image>, ImportError> {
        let Some(image) = self.store.find_image(&actor.tenant, reference).await? else { return Ok(None) };
        let new = NewImage {
            tenant,
            reference: name.as_str().to_owned(),
            digest: image.digest,
            root: image.root,
            config: image.config,
            size_bytes: image.size_bytes,
            created_at: self.clock.now(),
            origin: Origin::Image(image.reference),
        };
        let recorded = self.store.record_image(&new, &self.quotas, &self.act_of(actor)).await?;
        match recorded {
            Recorded::Exceeded(exceeded) => Err(ImportError::QuotaExceeded(Box::new(exceeded))),
            Recorded::Yes { image: tagged, replaced } => {
                if let Some(root) = replaced {
                    self.unlink(root, HashSet::new()).await;
                }
                Ok(Some(*tagged))
            }
            Recorded::Gone => Ok(None),
        }
    }
}
