//! A sandbox's files become an image: its whole tree, read from inside, is the one layer of it.

use std::{fs::File, sync::Arc};

use futures_util::{Stream, StreamExt as _};
use oci_spec::image::ImageConfiguration;
use sandbox_core::{
    fail_point,
    tree::{Ask, Reply},
};

use super::{
    ARCHIVE_BYTES_MAX, Images, ImportError, Naming, UNPACKED_ENTRIES_MAX, UPLOAD_IDLE, archive::Archive, digest_of_root, layout,
    place::Place,
};
use crate::{
    runtime::{Content, Tree},
    sandbox::{Commit, ImageId, Owner, SandboxId},
    store::{Image, Origin},
};

/// The files of a sandbox as they were read, and what the image of them is to say of itself.
#[derive(Debug)]
pub struct Read {
    file: File,
    configuration: ImageConfiguration,
    place: Place,
}

impl Images {
    /// Reads all files of a sandbox that is made of the image `base`: what `tree` gives.
    pub async fn read_tree(&self, tree: Tree, base: &ImageId, asked: &Commit, actor: &Owner) -> Result<Read, ImportError> {
        let place = self.places.take(Some(&actor.tenant)).map_err(ImportError::Busy)?;
        let (blobs, manifest) = (Arc::clone(&self.blobs), digest_of_root(base));
        let base = tokio::task::spawn_blocking(move || blobs.configuration(&manifest)).await;
        let base = base.map_err(|panic| ImportError::Internal(panic.into()))?.map_err(ImportError::of_content)?;
        let configuration = asked.over(base);
        // Before all the reading.
        layout::check_fits(&configuration)?;
        let file = self.spool_tree(tree, asked, actor).await?;
        fail_point::reached("service.commit.read");
        Ok(Read { file, configuration, place })
    }

    /// Makes an image of the tenant's of what was read. That is kept and counted as one that is imported; a caller who goes away changes nothing. Nobody else's image is touched,
    /// whoever asks.
    pub async fn commit(self: &Arc<Self>, read: Read, sandbox: SandboxId, asked: Commit, actor: Owner) -> Result<Image, ImportError> {
        let Read { file, configuration, place } = read;
        let find = move || {
            let (archive, section) = Archive::of_layer(file)?;
            let found = layout::of_layer(&archive, section, configuration)?;
            Ok((archive, found))
        };
        let tenant = Some(actor.tenant.clone());
        self.take_in(place, find, Naming { reference: asked.reference, tenant, actor, origin: Origin::Sandbox(sandbox) }).await
    }

    /// All files, as far as the largest archive and what the tenant may still have of images.
    async fn spool_tree(&self, tree: Tree, asked: &Commit, actor: &Owner) -> Result<File, ImportError> {
        let room = self.store.image_room(&actor.tenant, asked.reference.as_str(), &self.quotas).await?;
        let bytes_max = room.as_ref().map_or(ARCHIVE_BYTES_MAX, |(bytes, _)| ARCHIVE_BYTES_MAX.min(*bytes));
        let ask = Ask::Layer { bytes_max: ARCHIVE_BYTES_MAX, entries_max: UNPACKED_ENTRIES_MAX };
        let (_, content) = tree.content(ask, |reply| (*reply == Reply::Archive).then_some(ARCHIVE_BYTES_MAX)).await?;
        let silence = ImportError::Busy(format!("nothing of the sandbox's files came for {} s", UPLOAD_IDLE.as_secs()));
        let spooled = self.spool(pieces(content), bytes_max, silence).await?;
        // The sandbox itself keeps to the other bound.
        spooled.ok_or_else(|| room.map_or(ImportError::TooLarge, |(_, exceeded)| ImportError::QuotaExceeded(Box::new(exceeded))))
    }
}

fn pieces(content: Content) -> impl Stream<Item = Result<Vec<u8>, ImportError>> {
    futures_util::stream::unfold(content, async |mut content| Some((content.next().await?, content)))
        .map(|piece| piece.map_err(ImportError::Tree))
}
