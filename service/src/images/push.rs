//! Images go out to registries, byte for byte as they came in, so that they have the same digest there.

use std::{collections::HashSet, fs::File, io::Read as _, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use oci_spec::image::{ImageManifest, Sha256Digest};
use tokio::sync::watch;

use super::{
    Credentials, ImageSource, Images, ImportError, LayerProgress, Progress, Pulling, Stage,
    blob::Blobs,
    digest_of_root, manifest_type,
    registry::{Sent, Session},
};
use crate::{
    metrics::Direction,
    sandbox::{Owner, TenantId},
    store::Image,
};

/// Pushes that go on at one time, of this node and of a tenant. Each keeps the files of its image open.
const PUSHES_MAX: usize = 8;
const PUSHES_OF_TENANT_MAX: usize = 4;
/// Blobs of one image that are brought at one time.
const BLOBS_AT_ONCE: usize = 4;
/// However slowly a registry takes it.
const DEADLINE: Duration = Duration::from_secs(45 * 60);

/// Where an image is to be brought.
#[derive(Debug, Clone)]
pub struct Push {
    /// Names a tag.
    pub target: ImageSource,
    pub credentials: Option<Credentials>,
}

/// What is brought: a file, which is still read after the image lost its name.
#[derive(Debug)]
struct Piece {
    digest: Sha256Digest,
    file: File,
    bytes: u64,
}

/// All of an image.
#[derive(Debug)]
struct Whole {
    manifest: Vec<u8>,
    pieces: Vec<Piece>,
}

/// One of those that go on; it ends when this is dropped, be it by a panic.
struct Place {
    images: Arc<Images>,
    tenant: TenantId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut pushing = self.images.pushing();
        if let Some(place) = pushing.iter().position(|tenant| *tenant == self.tenant) {
            pushing.swap_remove(place);
        }
    }
}

impl Images {
    /// Begins to bring an image that `actor` may use to a registry. What was begun is finished.
    pub async fn push(self: &Arc<Self>, image: Image, push: Push, actor: &Owner) -> Result<Pulling, ImportError> {
        let place = self.begin_to_push(actor)?;
        let tag =
            push.target.tag().ok_or_else(|| ImportError::Invalid("an image is pushed to a tag, not to a digest".to_owned()))?.to_owned();
        let (blobs, digest) = (Arc::clone(&self.blobs), digest_of_root(&image.root));
        // What is open is read, whoever takes it away.
        let opened = tokio::task::spawn_blocking(move || open(&blobs, &digest)).await;
        let whole = opened.map_err(|panic| ImportError::Internal(panic.into()))?.map_err(ImportError::of_content)?;
        let (teller, progress) = watch::channel(Progress::default());
        tokio::spawn(async move {
            let late = |_| ImportError::RegistryFailed(format!("the registry did not take the image within {} s", DEADLINE.as_secs()));
            let brought = place.images.bring(&push, &tag, whole, &teller);
            let brought = tokio::time::timeout(DEADLINE, brought).await.map_err(late).flatten();
            match &brought {
                Ok(()) => tracing::info!(image.reference = image.reference, image.digest = image.digest, "an image was pushed"),
                Err(error) => tracing::info!(%error, image.reference = image.reference, "an image was not pushed"),
            }
            let bytes = teller.borrow().moved_bytes();
            place.images.metrics.image_transfer(Direction::Out, brought.is_ok(), bytes);
            drop(place);
            teller.send_modify(|progress| progress.end(brought.map(|()| image).map_err(Arc::new)));
        });
        Ok(Pulling::of(progress))
    }

    fn begin_to_push(self: &Arc<Self>, actor: &Owner) -> Result<Place, ImportError> {
        let mut pushing = self.pushing();
        if pushing.len() >= PUSHES_MAX {
            return Err(ImportError::Busy(format!("{PUSHES_MAX} images are being pushed, which is all that this node does at one time")));
        }
        if pushing.iter().filter(|tenant| **tenant == actor.tenant).count() >= PUSHES_OF_TENANT_MAX {
            return Err(ImportError::Busy(format!(
                "{PUSHES_OF_TENANT_MAX} images are being pushed, which is all that one tenant can at one time"
            )));
        }
        pushing.push(actor.tenant.clone());
        drop(pushing);
        Ok(Place { images: Arc::clone(self), tenant: actor.tenant.clone() })
    }

    async fn bring(&self, push: &Push, tag: &str, whole: Whole, teller: &watch::Sender<Progress>) -> Result<(), ImportError> {
        let Whole { manifest, pieces } = whole;
        let session = self.registries.begin_to_push(&push.target, push.credentials.as_ref()).await;
        teller.send_modify(|progress| {
            progress.stage = Stage::Uploading;
            progress.layers = pieces.iter().map(Piece::progress).collect();
        });
        let session: &Session<'_> = &session;
        let brought = pieces.into_iter().enumerate().map(|(place, piece)| async move {
            let open = || piece.file.try_clone().context("a file of an image");
            let tell = |bytes| teller.send_modify(|progress| progress.layers[place].bytes = bytes);
            let sent = session.bring_blob(&piece.digest, piece.bytes, open, tell).await?;
            teller.send_modify(|progress| progress.layers[place].is_there = sent == Sent::WasThere);
            Ok::<_, ImportError>(())
        });
        stream::iter(brought).buffer_unordered(BLOBS_AT_ONCE).try_collect::<()>().await?;
        session.bring_manifest(tag, &manifest_type(&manifest), &manifest).await
    }
}

impl Piece {
    fn progress(&self) -> LayerProgress {
        LayerProgress { digest: format!("sha256:{}", self.digest), bytes: 0, total_bytes: self.bytes, is_there: false }
    }
}

fn open(blobs: &Blobs, digest: &Sha256Digest) -> anyhow::Result<Whole> {
    let mut manifest = Vec::new();
    blobs.open_blob(digest)?.read_to_end(&mut manifest)?;
    let parsed: ImageManifest = serde_json::from_slice(&manifest)?;
    let (mut pieces, mut known) = (Vec::new(), HashSet::new());
    for descriptor in parsed.layers().iter().chain([parsed.config()]) {
        let digest: Option<Sha256Digest> = descriptor.as_digest_sha256().and_then(|digest| digest.parse().ok());
        let digest = digest.with_context(|| format!("the digest {} was kept", descriptor.digest()))?;
        if known.insert(digest.clone()) {
            let file = blobs.open_blob(&digest)?;
            let bytes = file.metadata()?.len();
            pieces.push(Piece { digest, file, bytes });
        }
    }
    Ok(Whole { manifest, pieces })
}
