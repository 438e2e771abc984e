//! Images come in: an archive that somebody sent, or that was put together from a registry, or what a sandbox's files are, becomes checked blobs, an unpacked root in the keeper's store, and a row.

mod archive;
mod blob;
mod collect;
mod commit;
mod export;
mod inspect;
mod layout;
mod login;
mod part;
mod place;
mod pull;
mod push;
mod registry;
mod seal;
mod spool;
mod tag;

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use futures_util::{Stream, StreamExt};
use oci_spec::image::Sha256Digest;
use sandbox_core::{
    fail_point,
    protocol::{FailureKind, ImageId, UnpackLimits},
};
use tokio::{
    io::AsyncWriteExt,
    sync::{RwLock, Semaphore},
};

use crate::{
    clock::Clock,
    metrics::Metrics,
    runtime::{CallError, Keeper, TreeError},
    sandbox::{Exceeded, ImageReference, Owner, Quotas, TenantId},
    store::{Act, Image, NewImage, Origin, Recorded, Store, StoreError},
};
pub(crate) use archive::ARCHIVE_BYTES_MAX;
use archive::Archive;
use blob::Blobs;
pub use collect::Collecting;
pub use export::Export;
pub use inspect::{Damage, DamageKind, History, Part as ImagePart, Step, StepLayer, Verified};
use layout::{Found, manifest_type};
use part::Parts;
use place::{Place, Places};
use pull::Pulls;
pub use pull::{LayerProgress, Progress, Pull, Pulling, Stage};
pub use push::Push;
use registry::Registries;
pub use registry::{Credentials, HostRule, ImageSource, Mirror, RegistryName, Settings as RegistrySettings};
pub use seal::SealingKey;

/// Archives that come in at one time, to this node and from a tenant. Each may fill as much disk as an archive may have.
const UPLOADS_MAX: usize = 8;
const UPLOADS_OF_TENANT_MAX: usize = 4;
/// Archives that are read at one time. The keeper unpacks one after the other anyway.
const IMPORTS_MAX: usize = 2;
/// An upload that brings nothing for so long was given up.
const UPLOAD_IDLE: Duration = Duration::from_secs(60);

/// What an image may be at the most, unpacked, and how much larger than its layers.
const UNPACKED_BYTES_MAX: u64 = 16 << 30;
const UNPACKED_BYTES_FREE: u64 = 64 << 20;
const UNPACKED_RATIO_MAX: u64 = 200;
const UNPACKED_ENTRIES_MAX: u64 = 1_000_000;
const UNPACK_MS: u64 = 600_000;
/// What is told at the most of why something is refused: that may quote what a stranger wrote.
const TOLD_CHARACTERS_MAX: usize = 500;
/// Between the first two looks for what is left of images; each further pause is twice as long.
const SWEEP_AGAIN: Duration = Duration::from_secs(1);

/// The images of this node.
#[derive(Debug)]
pub struct Images {
    store: Store,
    keeper: Keeper,
    clock: Clock,
    /// A tenant's, where it has none of its own.
    quotas: Quotas,
    uploads: PathBuf,
    blobs: Arc<Blobs>,
    places: Arc<Places>,
    importing: Semaphore,
    exporting: Arc<Places>,
    verifying: Arc<Places>,
    registries: Registries,
    sealing: SealingKey,
    collecting: Collecting,
    metrics: Arc<Metrics>,
    pulls: Pulls,
    parts: Parts,
    /// Whose images are being pushed, each as often as there are such.
    pushing: Mutex<Vec<TenantId>>,
    /// Held for reading by who adds blobs and roots, for writing by who takes them away.
    content: RwLock<()>,
    /// Roots that no reference named any more while a sandbox still needed them.
    leftover: Mutex<HashSet<ImageId>>,
}

/// Why an image did not come in, or did not go.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The archive is at fault. The text says how.
    #[error("{0}")]
    Invalid(String),
    #[error("the archive has more than {ARCHIVE_BYTES_MAX} bytes")]
    TooLarge,
    /// What was to be read in a sandbox could not be.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Later it may work.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    QuotaExceeded(Box<Exceeded>),
    /// The registry says that it has no such image.
    #[error("{0}")]
    NotAtRegistry(String),
    /// The registry wants other credentials.
    #[error("{0}")]
    RegistryDenied(String),
    /// The registry cannot be reached, breaks off, or does not send what it promised.
    #[error("{0}")]
    RegistryFailed(String),
    /// Content of an image that has a name.
    #[error("a part of this image is missing on this node: import or pull it again")]
    PartMissing,
    #[error("the keeper of this node is not available")]
    KeeperUnavailable,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Internal(anyhow::Error),
}

/// What stops the reading of an archive.
#[derive(Debug)]
enum Fault {
    /// The archive's fault.
    Invalid(String),
    /// This machine's.
    Host(anyhow::Error),
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Self::Host(error)
    }
}

impl ImportError {
    /// Whether the same may work later, without more room than there was.
    const fn may_pass(&self) -> bool {
        matches!(self, Self::RegistryFailed(_) | Self::KeeperUnavailable | Self::Store(_) | Self::Internal(_))
    }

    /// Whether it is who was asked that lacks the image, does not give it, fails, or answers what is none.
    const fn is_of_who_was_asked(&self) -> bool {
        matches!(self, Self::Invalid(_) | Self::NotAtRegistry(_) | Self::RegistryDenied(_) | Self::RegistryFailed(_))
    }
}

impl From<Fault> for ImportError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Invalid(why) => Self::invalid(&why),
            Fault::Host(error) => Self::of_host(error),
        }
    }
}

impl ImportError {
    /// The fault of what a stranger sent, of whose words this tells no more than a person reads.
    fn invalid(why: &str) -> Self {
        Self::Invalid(for_people(why))
    }

    /// What an image is made of could not be read.
    fn of_content(error: anyhow::Error) -> Self {
        if blob::is_missing(&error) {
            tracing::info!(error = format!("{error:#}"), "a part of an image is missing");
            return Self::PartMissing;
        }
        Self::Internal(error)
    }

    /// What this machine could not do. A full disk may have room again.
    fn of_host(error: anyhow::Error) -> Self {
        let is_full = |cause: &io::Error| matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        if error.chain().filter_map(|cause| cause.downcast_ref()).any(is_full) {
            tracing::warn!(error = format!("{error:#}"), "an image does not fit on this node's disk");
            return Self::Busy("the disk of this node is full".to_owned());
        }
        Self::Internal(error)
    }
}

impl From<CallError> for ImportError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Lost => Self::KeeperUnavailable,
            CallError::Failed(failure) => match failure.kind {
                FailureKind::Refused => Self::invalid(&format!("the image cannot be unpacked: {failure}")),
                FailureKind::Busy => Self::Busy(failure.message),
                FailureKind::Gone | FailureKind::Host => Self::Internal(failure.into()),
            },
        }
    }
}

/// An archive as it was sent: a file without a name, gone when this is dropped, however that happens.
#[derive(Debug)]
pub struct Upload {
    file: File,
    place: Place,
}

/// What is to become of an image that comes in.
#[derive(Debug)]
struct Naming {
    reference: ImageReference,
    /// `None`: it is for all.
    tenant: Option<TenantId>,
    actor: Owner,
    origin: Origin,
}

/// What an operator decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A tenant's, where it has none of its own.
    pub quotas: Quotas,
    pub registries: RegistrySettings,
    /// What the passwords that tenants keep for registries are sealed with.
    pub sealing: SealingKey,
    pub collecting: Collecting,
    pub data_dir: PathBuf,
}

impl Images {
    /// Takes over the folders `blobs`, `pulls` and `uploads` of the data folder.
    pub fn open(store: Store, keeper: Keeper, clock: Clock, metrics: Arc<Metrics>, settings: Settings) -> anyhow::Result<Arc<Self>> {
        let Settings { quotas, registries, sealing, collecting, data_dir } = settings;
        let (blobs, uploads) = (data_dir.join("blobs"), data_dir.join("uploads"));
        // Where a file system knows no files without a name, they have one for a moment.
        for entry in fs::read_dir(&uploads).with_context(|| uploads.display().to_string())? {
            fs::remove_file(entry?.path()).with_context(|| uploads.display().to_string())?;
        }
        Ok(Arc::new(Self {
            store,
            keeper,
            clock,
            quotas,
            uploads,
            blobs: Arc::new(Blobs::open(&blobs).with_context(|| blobs.display().to_string())?),
            places: Places::new("uploads", UPLOADS_MAX, UPLOADS_OF_TENANT_MAX),
            importing: Semaphore::new(IMPORTS_MAX),
            exporting: Places::new("exports", export::EXPORTS_MAX, export::EXPORTS_OF_TENANT_MAX),
            verifying: Places::new("verifications", inspect::VERIFIED_AT_ONCE, inspect::VERIFIED_OF_TENANT_AT_ONCE),
            registries: Registries::new(&registries)?,
            sealing,
            collecting,
            metrics,
            pulls: Pulls::default(),
            parts: Parts::open(data_dir.join("pulls")),
            pushing: Mutex::default(),
            content: RwLock::default(),
            leftover: Mutex::default(),
        }))
    }

    /// How many layers, configurations and manifests this node keeps, and their bytes together.
    pub async fn blobs(&self) -> anyhow::Result<(u64, u64)> {
        let blobs = Arc::clone(&self.blobs);
        Ok(tokio::task::spawn_blocking(move || blobs.sum()).await??)
    }

    /// Deletes roots and blobs that nothing needs: a service that was killed had no time to. Returns when all that the keeper was unpacking
    /// for that one must have come to its end. What fails is logged.
    pub async fn sweep(&self) {
        let mut pause = SWEEP_AGAIN;
        while pause < Duration::from_millis(UNPACK_MS) {
            if let Err(error) = self.try_to_sweep().await {
                tracing::warn!(error = format!("{error:#}"), "looking for what is left of images failed; it is tried again");
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    async fn try_to_sweep(&self) -> anyhow::Result<()> {
        // What comes in has no name until the end, and would be waited for.
        if self.content.try_write().is_err() {
            return Ok(());
        }
        for root in self.keeper.images().await? {
            if !self.store.needs_root(&root).await? {
                self.unlink(root, HashSet::new()).await;
            }
        }
        // An import that goes on is not held up for it: the next sweep comes soon.
        let Ok(_taking) = self.content.try_write() else { return Ok(()) };
        let roots = self.keeper.images().await?;
        let blobs = Arc::clone(&self.blobs);
        tokio::task::spawn_blocking(move || blobs.release(blobs.all()?, roots.iter().map(digest_of_root))).await?
    }

    /// Receives an archive of at most 8 GiB, from this tenant or — `None` — from an operator.
    pub async fn receive<B, E>(&self, tenant: Option<&TenantId>, body: impl Stream<Item = Result<B, E>>) -> Result<Upload, ImportError>
    where
        B: AsRef<[u8]>,
        E: std::error::Error,
    {
        let place = self.places.take(tenant).map_err(ImportError::Busy)?;
        let body = body.map(|chunk| chunk.map_err(|error| ImportError::Invalid(format!("the upload broke off: {error}"))));
        let silence = ImportError::Invalid(format!("the upload brought nothing for {} s", UPLOAD_IDLE.as_secs()));
        let file = self.spool(body, ARCHIVE_BYTES_MAX, silence).await?.ok_or(ImportError::TooLarge)?;
        fail_point::reached("service.import.received");
        Ok(Upload { file, place })
    }

    /// Puts what comes into a file without a name; `None` if it is more than so many bytes. `silence` is the error if nothing comes for too long.
    async fn spool<B: AsRef<[u8]>>(
        &self,
        body: impl Stream<Item = Result<B, ImportError>>,
        bytes_max: u64,
        silence: ImportError,
    ) -> Result<Option<File>, ImportError> {
        let file = tempfile::tempfile_in(&self.uploads).context("making a file for an upload").map_err(ImportError::of_host)?;
        let mut to = tokio::io::BufWriter::with_capacity(1 << 20, tokio::fs::File::from_std(file));
        let mut body = std::pin::pin!(body);
        let mut len = 0;
        loop {
            let Ok(next) = tokio::time::timeout(UPLOAD_IDLE, body.next()).await else { return Err(silence) };
            let Some(chunk) = next.transpose()? else { break };
            len += chunk.as_ref().len() as u64;
            if len > bytes_max {
                return Ok(None);
            }
            to.write_all(chunk.as_ref()).await.context("keeping an upload").map_err(ImportError::of_host)?;
        }
        to.flush().await.context("keeping an upload").map_err(ImportError::of_host)?;
        Ok(Some(to.into_inner().into_std().await))
    }

    /// Makes `reference` name the image in the archive, for this tenant or — `None` — for all. A caller who goes away after the upload
    /// changes nothing: what was begun is finished.
    pub async fn import(
        self: &Arc<Self>,
        upload: Upload,
        reference: ImageReference,
        tenant: Option<TenantId>,
        actor: Owner,
    ) -> Result<Image, ImportError> {
        let Upload { file, place } = upload;
        let read = self.reading(file, &reference);
        self.take_in(place, read, Naming { reference, tenant, actor, origin: Origin::Archive }).await
    }

    /// What finds the image in an archive that is to have this name.
    fn reading(&self, file: File, reference: &ImageReference) -> impl FnOnce() -> Result<(Archive, Found), Fault> + Send + use<> {
        let (scratch, name) = (self.uploads.clone(), reference.as_str().to_owned());
        move || {
            let archive = Archive::open(file, &scratch)?;
            let found = layout::find(&archive, &name)?;
            Ok((archive, found))
        }
    }

    /// Takes in what `read` finds. Goes on to its end, whoever waits for it.
    async fn take_in(
        self: &Arc<Self>,
        place: Place,
        read: impl FnOnce() -> Result<(Archive, Found), Fault> + Send + 'static,
        naming: Naming,
    ) -> Result<Image, ImportError> {
        let images = Arc::clone(self);
        let work = place.hold(async move { images.take_in_now(read, naming).await });
        work.await.unwrap_or_else(|panic| Err(ImportError::Internal(panic.into())))
    }

    /// Takes a reference away, the tenant's own or — `None` — the shared one, and its content when nothing else needs it. Answers what it
    /// named.
    pub async fn remove(&self, tenant: Option<&TenantId>, reference: &str, actor: &Owner) -> Result<Option<Image>, ImportError> {
        let removed = self.store.remove_image(tenant, reference, &self.act_of(actor)).await?;
        if let Some(image) = &removed {
            fail_point::reached("service.image.unnamed");
            self.unlink(image.root.clone(), HashSet::new()).await;
        }
        Ok(removed)
    }

    fn pushing(&self) -> MutexGuard<'_, Vec<TenantId>> {
        self.pushing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act_of<'a>(&self, actor: &'a Owner) -> Act<'a> {
        Act { actor: Some(actor), at: self.clock.now(), data: serde_json::json!({}) }
    }

    async fn take_in_now(
        &self,
        read: impl FnOnce() -> Result<(Archive, Found), Fault> + Send + 'static,
        naming: Naming,
    ) -> Result<Image, ImportError> {
        let _turn = self.importing.acquire().await.context("nobody closes this").map_err(ImportError::Internal)?;
        let (archive, found) = tokio::task::spawn_blocking(read).await.map_err(|panic| ImportError::Internal(panic.into()))??;
        fail_point::reached("service.import.read");
        let (digests, manifest, blobs) = (found.digests(), found.manifest.digest.clone(), Arc::clone(&self.blobs));

        let adding = self.content.read().await;
        let kept = tokio::task::spawn_blocking(move || keep(&blobs, &archive, &found).map(|layers| (found, layers))).await;
        let imported = match kept.unwrap_or_else(|panic| Err(Fault::Host(panic.into()))) {
            Ok((found, layers)) => self.unpack_and_record(&found, layers, naming).await,
            Err(fault) => Err(fault.into()),
        };
        drop(adding);
        match imported {
            Ok((image, replaced)) => {
                if let Some(root) = replaced {
                    self.unlink(root, HashSet::new()).await;
                }
                Ok(image)
            }
            Err(error) => {
                tracing::info!(%error, image.digest = %manifest, "an image was not imported");
                self.unlink(root_of(&manifest), digests).await;
                Err(error)
            }
        }
    }

    /// The row as it is now, and the root that its reference named before, if that was another.
    async fn unpack_and_record(
        &self,
        found: &Found,
        layers: Vec<OwnedFd>,
        Naming { reference, tenant, actor, origin }: Naming,
    ) -> Result<(Image, Option<ImageId>), ImportError> {
        let root = root_of(&found.manifest.digest);
        let size_bytes = found.size_bytes();
        let bytes = (size_bytes.saturating_mul(UNPACKED_RATIO_MAX).saturating_add(UNPACKED_BYTES_FREE)).min(UNPACKED_BYTES_MAX);
        let limits = UnpackLimits { bytes, entries: UNPACKED_ENTRIES_MAX, wall_ms: UNPACK_MS };
        fail_point::reached("service.import.kept");
        self.keeper.unpack(root.clone(), layers, limits).await?;
        fail_point::reached("service.import.unpacked");

        let image = NewImage {
            tenant,
            reference: reference.as_str().to_owned(),
            digest: format!("sha256:{}", found.manifest.digest),
            root,
            config: layout::for_row(&found.configuration),
            size_bytes,
            created_at: self.clock.now(),
            origin,
        };
        let (image, replaced) = match self.store.record_image(&image, &self.quotas, &self.act_of(&actor)).await? {
            Recorded::Yes { image, replaced } => (*image, replaced),
            Recorded::Exceeded(exceeded) => return Err(ImportError::QuotaExceeded(Box::new(exceeded))),
            Recorded::Gone => return Err(ImportError::Internal(anyhow::anyhow!("what comes in needs no name before"))),
        };
        fail_point::reached("service.import.recorded");
        tracing::info!(image.reference = image.reference, image.digest = image.digest, "an image was imported");
        Ok((image, replaced))
    }

    /// The image that a reference of exactly this owner names.
    async fn named_image(&self, tenant: Option<&TenantId>, reference: &str) -> Result<Option<Image>, ImportError> {
        // No tenant has an empty name, so with it none but the shared image is found.
        let nobody = TenantId::proven(String::new());
        let image = self.store.find_image(tenant.unwrap_or(&nobody), reference).await?;
        Ok(image.filter(|image| image.is_shared == tenant.is_none()))
    }

    /// Deletes a root that has no name, or lost one, with the blobs it is made of and these, unless something still needs them; and
    /// the roots that something still needed when it was tried before. What fails is logged: the caller's own work is done.
    async fn unlink(&self, root: ImageId, mut blobs: HashSet<Sha256Digest>) {
        let candidates: Vec<_> = {
            let mut leftover = self.leftover.lock().unwrap_or_else(PoisonError::into_inner);
            leftover.insert(root);
            leftover.iter().cloned().collect()
        };
        for root in candidates {
            self.unlink_and_tell(&root, std::mem::take(&mut blobs)).await;
        }
    }

    /// Deletes those of which something has ended meanwhile that still needed them.
    async fn unlink_leftover(&self) {
        let candidates: Vec<_> = self.leftover.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        for root in candidates {
            // Looked at without holding up imports; it is looked at again.
            if matches!(self.store.needs_root(&root).await, Ok(false)) {
                self.unlink_and_tell(&root, HashSet::new()).await;
            }
        }
    }

    async fn unlink_and_tell(&self, root: &ImageId, blobs: HashSet<Sha256Digest>) {
        if let Err(error) = self.unlink_one(root, blobs).await {
            tracing::warn!(error = format!("{error:#}"), image.root = %root, "an image that nothing names could not be deleted");
        }
    }

    async fn unlink_one(&self, root: &ImageId, mut digests: HashSet<Sha256Digest>) -> anyhow::Result<()> {
        let _taking = self.content.write().await;
        if !self.store.needs_root(root).await? {
            self.keeper.remove_image(root.clone()).await?;
            fail_point::reached("service.image.removed");
            self.leftover.lock().unwrap_or_else(PoisonError::into_inner).remove(root);
            // An image that never came so far has no manifest here.
            digests.extend(self.blobs.references(&digest_of_root(root)).unwrap_or_default());
        }
        let roots = self.keeper.images().await?;
        let blobs = Arc::clone(&self.blobs);
        tokio::task::spawn_blocking(move || blobs.release(digests, roots.iter().map(digest_of_root))).await?
    }
}

/// Checks every byte against its digest, keeps it all, and opens the layers, bottom first.
fn keep(blobs: &Blobs, archive: &Archive, found: &Found) -> Result<Vec<OwnedFd>, Fault> {
    let mut layers = Vec::new();
    let mut kept = HashSet::new();
    for layer in &found.layers {
        if kept.insert(&layer.digest) {
            blobs.keep(&layer.digest, layer.section.bytes, archive.reader(layer.section))?;
        }
        layers.push(blobs.open_blob(&layer.digest)?.into());
    }
    for document in [&found.config, &found.manifest] {
        blobs.keep(&document.digest, document.bytes.len() as u64, &document.bytes[..])?;
    }
    Ok(layers)
}

/// What somebody may see in an answer or in the log: on one line, and of what is long the beginning, and the end, where the cause stands.
fn for_people(text: &str) -> String {
    let half = TOLD_CHARACTERS_MAX / 2;
    let left_out = if text.chars().nth(TOLD_CHARACTERS_MAX).is_none() { 0..0 } else { half..text.chars().count() - half };
    let mut told = String::new();
    for (place, character) in text.chars().enumerate() {
        match character {
            _ if place == half && !left_out.is_empty() => told.push('…'),
            _ if left_out.contains(&place) => {}
            // What is quoted is escaped once already.
            '"' | '\'' | '\\' => told.push(character),
            _ => told.extend(character.escape_debug()),
        }
    }
    told
}

/// An image's root is called by its manifest's digest.
fn root_of(manifest: &Sha256Digest) -> ImageId {
    manifest.digest().parse().expect("both are 64 lower-case hex digits")
}

fn digest_of_root(root: &ImageId) -> Sha256Digest {
    root.to_string().parse().expect("both are 64 lower-case hex digits")
}

/// The configuration of the image in an archive, checked as an import checks it, but for its layers.
#[cfg(test)]
pub(crate) fn configuration_in(archive: File, reference: &str) -> anyhow::Result<oci_spec::image::ImageConfiguration> {
    let archive = Archive::open(archive, &std::env::temp_dir()).map_err(ImportError::from)?;
    Ok(layout::find(&archive, reference).map_err(ImportError::from)?.configuration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stranger_wrote_is_told_on_one_line_and_not_without_end() {
        let told = |why: &str| ImportError::from(Fault::Invalid(why.to_owned())).to_string();

        assert_eq!(told("no single one is called \"größer\""), "no single one is called \"größer\"");
        assert_eq!(told("an\nERROR \u{1b}[2J\u{202e}"), "an\\nERROR \\u{1b}[2J\\u{202e}");
        assert_eq!(told(&"x".repeat(4 << 20)), format!("{0}…{0}", "x".repeat(TOLD_CHARACTERS_MAX / 2)));
    }

    #[test]
    fn a_disk_that_is_full_is_no_fault_of_the_services() {
        let of = |kind: io::ErrorKind| ImportError::from(Fault::Host(anyhow::Error::new(io::Error::from(kind)).context("keeping a blob")));

        assert!(matches!(of(io::ErrorKind::StorageFull), ImportError::Busy(_)));
        assert!(matches!(of(io::ErrorKind::QuotaExceeded), ImportError::Busy(_)));
        assert!(matches!(of(io::ErrorKind::NotFound), ImportError::Internal(_)));
    }
}
