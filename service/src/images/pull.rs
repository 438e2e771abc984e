//! Images come in from registries: what is there is put together as the archive that somebody could have sent, and then imported as one.
//!
//! So quotas, checks and sweeping are those of an import; layers that are on their way are gone on with after a crash. No layer is left out for being here already, unless its tenant may use it anyway:
//! a manifest is the word of whoever runs a registry.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, Sha256Digest};
use sandbox_core::fail_point;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    ARCHIVE_BYTES_MAX, Credentials, ImageSource, Images, ImportError, Naming,
    archive::Archive,
    blob::hash,
    digest_of_root,
    layout::{self, platform},
    part::Shelf,
    registry::{DOCUMENT_BYTES_MAX, Fetched, Session},
    root_of,
    spool::Spool,
};
use crate::{
    metrics::Direction,
    sandbox::{ImageId, ImageReference, Owner, TenantId},
    store::{Image, Origin},
};

/// Pulls that go on at one time, of this node, of all tenants and of one: operators have room left, whatever registries tenants pull from. Each may fill as much disk as an archive may have, for as long as its registry takes.
const PULLS_MAX: usize = 8;
const PULLS_OF_TENANTS_MAX: usize = 6;
const PULLS_OF_TENANT_MAX: usize = 4;
/// Layers of one image that are fetched at one time.
const LAYERS_AT_ONCE: usize = 4;
/// However much a registry brings now and then.
const DEADLINE: Duration = Duration::from_secs(45 * 60);
/// Indexes inside indexes.
const DEPTH_MAX: usize = 4;

/// What is to be pulled, for whom, and what it is to be called. Whoever asks for the same while it is being done waits for that.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pull {
    pub source: ImageSource,
    pub credentials: Option<Credentials>,
    /// Its name here.
    pub reference: ImageReference,
    /// `None`: for all tenants.
    pub tenant: Option<TenantId>,
}

/// How far a pull or a push has come.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub stage: Stage,
    /// Each once, the bottom one first.
    pub layers: Vec<LayerProgress>,
    outcome: Option<Result<Image, Arc<ImportError>>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stage {
    /// The registry is asked what there is.
    #[default]
    Resolving,
    Downloading,
    /// It is all here, and waits for its turn or is being unpacked.
    Unpacking,
    /// Of a push: it is on its way there.
    Uploading,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerProgress {
    /// As in `sha256:…`.
    pub digest: String,
    /// Here by now, packed as they are. Fewer than before where a registry had to begin again.
    pub bytes: u64,
    pub total_bytes: u64,
    /// Whether it need not go anywhere: where it is to be, it is.
    pub is_there: bool,
}

/// A pull or a push that goes on, whoever looks on or goes away.
#[derive(Debug, Clone)]
pub struct Pulling {
    progress: watch::Receiver<Progress>,
    stop: CancellationToken,
}

/// Those that go on.
#[derive(Debug, Default)]
pub(super) struct Pulls(Mutex<HashMap<Pull, Pulling>>);

/// What came from a registry.
enum Brought {
    /// An archive, and the layers that belong into it.
    Archive(File, Vec<(Sha256Digest, File, u64)>),
    /// The reference names that image already.
    Nothing(Box<Image>),
}

/// One of them; gone when this is dropped, be it by a panic.
struct Place {
    images: Arc<Images>,
    pull: Pull,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.images.pulls.lock().remove(&self.pull);
    }
}

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, HashMap<Pull, Pulling>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Of layers, as far as they had to go anywhere.
    pub(super) fn moved_bytes(&self) -> u64 {
        self.layers.iter().filter(|layer| !layer.is_there).map(|layer| layer.bytes).sum()
    }

    /// Tells the end.
    pub(super) fn end(&mut self, outcome: Result<Image, Arc<ImportError>>) {
        self.outcome = Some(outcome);
    }
}

impl Pulling {
    pub(super) fn of(progress: watch::Receiver<Progress>) -> Self {
        Self { progress, stop: CancellationToken::new() }
    }

    /// Has a pull fetch no more, for the sake of this node's disk, and leave nothing on it. What was fetched before is taken in all the same.
    pub fn give_up(&self) {
        self.stop.cancel();
    }

    /// How far it has come by now.
    pub fn progress(&mut self) -> Progress {
        self.progress.borrow_and_update().clone()
    }

    /// Returns when that has changed.
    pub async fn changed(&mut self) {
        // Whoever tells of it is gone only with an outcome, or by a panic.
        drop(self.progress.changed().await);
    }

    /// The end, if it has come.
    pub fn outcome(&self) -> Option<Result<Image, Arc<ImportError>>> {
        let told = self.progress.borrow().outcome.clone();
        let is_lost = told.is_none() && self.progress.has_changed().is_err();
        told.or_else(|| is_lost.then(|| Err(Arc::new(ImportError::Internal(anyhow::anyhow!("a pull or a push panicked"))))))
    }

    /// Waits for the end.
    pub async fn ended(mut self) -> Result<Image, Arc<ImportError>> {
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            self.changed().await;
        }
    }
}

impl Images {
    /// Whether images are pulled from there. The error says why not.
    pub fn check_source(&self, source: &ImageSource) -> Result<(), String> {
        self.registries.check(source)
    }

    /// Begins to pull an image, or joins who pulls the very same. What was begun is finished.
    pub fn pull(self: &Arc<Self>, pull: Pull, actor: Owner) -> Result<Pulling, ImportError> {
        let mut pulls = self.pulls.lock();
        if let Some(pulling) = pulls.get(&pull) {
            return Ok(pulling.clone());
        }
        let pullers: Vec<_> = pulls.keys().map(|other| other.tenant.as_ref()).collect();
        check_place(pull.tenant.as_ref(), &pullers).map_err(ImportError::Busy)?;
        let (teller, progress) = watch::channel(Progress::default());
        let pulling = Pulling::of(progress);
        pulls.insert(pull.clone(), pulling.clone());
        let (place, stop) = (Place { images: Arc::clone(self), pull }, pulling.stop.clone());
        tokio::spawn(async move {
            let outcome = place.images.pull_now(&place.pull, &teller, &stop, &actor).await.map_err(Arc::new);
            let bytes = teller.borrow().moved_bytes();
            place.images.metrics.image_transfer(Direction::In, outcome.is_ok(), bytes);
            // Whoever asks from now on finds what there is at the registry then.
            drop(place);
            teller.send_modify(|progress| progress.end(outcome));
        });
        Ok(pulling)
    }

    /// Whether the image is here and was pulled from there, but this node has nothing to make sandboxes of.
    pub async fn is_elsewhere(&self, image: &Image, source: &ImageSource) -> Result<bool, ImportError> {
        if image.pulled_from.as_ref() != Some(&source.name()) {
            return Ok(false);
        }
        match self.has_root(&image.root).await {
            Ok(is_here) => Ok(!is_here),
            // One that is upgraded is back in a moment, which whoever starts the sandbox waits for.
            Err(ImportError::KeeperUnavailable) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn has_root(&self, root: &ImageId) -> Result<bool, ImportError> {
        Ok(self.keeper.images().await?.contains(root))
    }

    async fn pull_now(
        &self,
        pull: &Pull,
        teller: &watch::Sender<Progress>,
        stop: &CancellationToken,
        actor: &Owner,
    ) -> Result<Image, ImportError> {
        let outcome = self.pull_all(pull, teller, stop, actor).await;
        // What may be gone on with is kept for that.
        if outcome.as_ref().err().is_none_or(|error| !error.may_pass()) {
            let digests: Vec<_> =
                teller.borrow().layers.iter().filter_map(|layer| layer.digest.strip_prefix("sha256:")?.parse().ok()).collect();
            self.parts.forget(&Shelf::of(pull.tenant.as_ref(), &pull.source), &digests);
        }
        outcome
    }

    async fn pull_all(
        &self,
        pull: &Pull,
        teller: &watch::Sender<Progress>,
        stop: &CancellationToken,
        actor: &Owner,
    ) -> Result<Image, ImportError> {
        let late = |_| ImportError::RegistryFailed(format!("the registry did not bring the image within {} s", DEADLINE.as_secs()));
        let fetched = tokio::select! {
            fetched = tokio::time::timeout(DEADLINE, self.fetch(pull, teller)) => fetched.map_err(late).flatten(),
            () = stop.cancelled() => Err(ImportError::Busy("this node's disk has no more left than it keeps".to_owned())),
        };
        let fetched =
            fetched.inspect_err(|error| tracing::info!(%error, image.reference = pull.reference.as_str(), "an image was not pulled"))?;
        let (documents, layers) = match fetched {
            Brought::Nothing(image) => return Ok(*image),
            Brought::Archive(documents, layers) => (documents, layers),
        };
        teller.send_modify(|progress| progress.stage = Stage::Unpacking);
        fail_point::reached("service.pull.fetched");
        let naming = Naming {
            reference: pull.reference.clone(),
            tenant: pull.tenant.clone(),
            actor: actor.clone(),
            origin: Origin::Registry(pull.source.name()),
        };
        let (scratch, name) = (self.uploads.clone(), pull.reference.as_str().to_owned());
        let read = move || {
            let mut archive = Archive::open(documents, &scratch)?;
            for (digest, content, bytes) in layers {
                archive.lay_beside(path_of(&digest), content, bytes);
            }
            let found = layout::find(&archive, &name)?;
            Ok((archive, found))
        };
        self.take_in_now(read, naming).await
    }

    /// The image as an archive, unless its owner has it under that very name.
    async fn fetch(&self, pull: &Pull, teller: &watch::Sender<Progress>) -> Result<Brought, ImportError> {
        if let Some(mirror) = self.registries.mirror_of(&pull.source) {
            let fetched = self.fetch_from(&self.registries.begin_at_mirror(&mirror).await, pull, teller).await;
            match &fetched {
                Err(error) if error.is_of_who_was_asked() => {
                    tracing::debug!(%error, "a mirror does not bring an image: its registry is asked")
                }
                Ok(_) | Err(_) => return fetched,
            }
        }
        let session = self.registries.begin(&pull.source, pull.credentials.as_ref()).await;
        self.fetch_from(&session, pull, teller).await
    }

    async fn fetch_from(&self, session: &Session<'_>, pull: &Pull, teller: &watch::Sender<Progress>) -> Result<Brought, ImportError> {
        let (fetched, manifest) = manifest(session).await?;
        let here = self.named_image(pull.tenant.as_ref(), pull.reference.as_str()).await?;
        // What a look at it found damaged is fetched again.
        if let Some(image) = here.filter(|image| image.root == root_of(&fetched.digest) && self.blobs.has_all(&fetched.digest))
            && self.has_root(&image.root).await?
            // It is used from now on: it does not go for room.
            && let Some(image) = self.store.touch_image(pull.tenant.as_ref(), &image.reference, &image.root, self.clock.now()).await?
        {
            return Ok(Brought::Nothing(Box::new(image)));
        }
        let config_digest = small_digest(manifest.config())?;
        let config = session.small_blob(&config_digest).await?;
        layout::check(&manifest, &config.bytes)?;

        let host = ImportError::of_host;
        let mut spool = Spool::new(&self.uploads).map_err(host)?;
        spool.add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(host)?;
        spool.add("index.json", index_of(&fetched).to_string().as_bytes()).map_err(host)?;
        for document in [&fetched, &config] {
            spool.add(&path_of(&document.digest), &document.bytes).map_err(host)?;
        }
        let mut known = HashSet::from([fetched.digest.clone(), config.digest.clone()]);
        let mut layers: Vec<(Sha256Digest, u64)> = Vec::new();
        let mut total_bytes: u64 = 0;
        for layer in manifest.layers() {
            let digest = digest_of(layer)?;
            total_bytes = total_bytes.saturating_add(layer.size());
            if total_bytes > ARCHIVE_BYTES_MAX {
                return Err(invalid(&format!("the layers of the image have more than {ARCHIVE_BYTES_MAX} bytes")));
            }
            if known.insert(digest.clone()) {
                layers.push((digest, layer.size()));
            }
        }
        self.check_room(pull, total_bytes).await?;
        teller.send_modify(|progress| {
            progress.stage = Stage::Downloading;
            progress.layers = layers.iter().map(|(digest, bytes)| layer_progress(digest, *bytes)).collect();
        });
        let shelf = Shelf::of(pull.tenant.as_ref(), &pull.source);
        let (shelf, readable) = (&shelf, &self.readable(pull.tenant.as_ref()).await?);
        let fetches = layers.into_iter().enumerate().map(|(place, (digest, bytes))| async move {
            if readable.contains(&digest)
                && let Some(content) = self.sound(&digest, bytes).await
            {
                teller.send_modify(|progress| (progress.layers[place].bytes, progress.layers[place].is_there) = (bytes, true));
                return Ok((digest, content, bytes));
            }
            let mut part = self.parts.begin(shelf, &digest, bytes).await.map_err(host)?;
            session.blob(&digest, &mut part, |bytes| teller.send_modify(|progress| progress.layers[place].bytes = bytes)).await?;
            let content = part.content().map_err(host)?;
            Ok::<_, ImportError>((digest, content, bytes))
        });
        let layers = stream::iter(fetches).buffer_unordered(LAYERS_AT_ONCE).try_collect().await?;
        Ok(Brought::Archive(spool.finish().map_err(host)?, layers))
    }

    /// All that the images are made of which the tenant may use — or for all, those that are for all: whoever names one of these gets nothing that it has not.
    async fn readable(&self, tenant: Option<&TenantId>) -> Result<HashSet<Sha256Digest>, ImportError> {
        // No tenant has an empty name, so with it there are none but the shared images.
        let nobody = TenantId::proven(String::new());
        let roots = self.store.image_roots(tenant.unwrap_or(&nobody)).await?;
        let blobs = Arc::clone(&self.blobs);
        // One that was lost is made of nothing.
        let read = move || roots.iter().filter_map(|root| blobs.references(&digest_of_root(root)).ok()).flatten().collect();
        tokio::task::spawn_blocking(read).await.map_err(|panic| ImportError::Internal(panic.into()))
    }

    /// A blob that is here, if it is what it was.
    async fn sound(&self, digest: &Sha256Digest, bytes: u64) -> Option<File> {
        let (blobs, digest) = (Arc::clone(&self.blobs), digest.clone());
        let read = move || {
            let file = blobs.open_blob(&digest).ok()?;
            let (found, len) = hash(&file, |_| Ok(())).ok()?;
            (found == digest && len == bytes).then_some(file)
        };
        tokio::task::spawn_blocking(read).await.ok().flatten()
    }

    /// What its tenant has no room for need not come.
    async fn check_room(&self, pull: &Pull, bytes: u64) -> Result<(), ImportError> {
        let Some(tenant) = &pull.tenant else { return Ok(()) };
        match self.store.image_room(tenant, pull.reference.as_str(), &self.quotas).await? {
            Some((room, exceeded)) if bytes > room => Err(ImportError::QuotaExceeded(Box::new(exceeded))),
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether this tenant, or `None`, an operator, can pull beside those who do. The error says why not.
fn check_place(tenant: Option<&TenantId>, pullers: &[Option<&TenantId>]) -> Result<(), String> {
    let full = |max: usize, whose: &str| Err(format!("{max} images are being pulled, which is all that {whose} at one time"));
    if pullers.len() >= PULLS_MAX {
        return full(PULLS_MAX, "this node takes");
    }
    if tenant.is_some() && pullers.iter().flatten().count() >= PULLS_OF_TENANTS_MAX {
        return full(PULLS_OF_TENANTS_MAX, "this node takes of tenants");
    }
    if pullers.iter().filter(|other| **other == tenant).count() >= PULLS_OF_TENANT_MAX {
        return full(PULLS_OF_TENANT_MAX, "one tenant can");
    }
    Ok(())
}

/// The manifest that is for this machine, by way of indexes if need be.
async fn manifest(session: &Session<'_>) -> Result<(Fetched, ImageManifest), ImportError> {
    let mut fetched = session.manifest().await?;
    for _ in 0..DEPTH_MAX {
        match kind_of(&fetched)? {
            Kind::Manifest => {
                let manifest = parse("the manifest", &fetched.bytes)?;
                return Ok((fetched, manifest));
            }
            Kind::Index => {
                let index: ImageIndex = parse("the index", &fetched.bytes)?;
                let chosen =
                    for_this_machine(&index).ok_or_else(|| invalid(&format!("the registry has no image of it for {}", platform())))?;
                fetched = session.manifest_of(&digest_of(chosen)?).await?;
            }
        }
    }
    Err(invalid(&format!("its indexes are nested more than {DEPTH_MAX} deep")))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Manifest,
    Index,
}

/// What a document is, by its own word and by its content; one that could be both is refused (CVE-2021-41190).
fn kind_of(fetched: &Fetched) -> Result<Kind, ImportError> {
    let document: Value = parse("the manifest", &fetched.bytes)?;
    if document["schemaVersion"] != 2 {
        return Err(invalid(&format!("the manifest: schemaVersion {} is not supported; 2 is", document["schemaVersion"])));
    }
    let has = |member: &str| document.get(member).is_some();
    let (is_manifest, is_index) = (has("layers") || has("config"), has("manifests"));
    let said = document["mediaType"].as_str().unwrap_or(&fetched.content_type);
    let says_index = said.ends_with(".index.v1+json") || said.ends_with(".list.v2+json");
    let says_manifest = said.ends_with(".manifest.v1+json") || said.ends_with(".manifest.v2+json");
    match (is_manifest, is_index) {
        (true, false) if !says_index => Ok(Kind::Manifest),
        (false, true) if !says_manifest => Ok(Kind::Index),
        _ => Err(invalid("what the registry has there is neither a manifest nor an index of images")),
    }
}

/// The one for our processor; of several the one that asks least of it. One alone need not say for which it is: its configuration does.
fn for_this_machine(index: &ImageIndex) -> Option<&Descriptor> {
    if let [only] = &index.manifests()[..]
        && only.platform().is_none()
    {
        return Some(only);
    }
    let ours = index.manifests().iter().filter(|one| one.platform().as_ref().is_some_and(layout::is_ours));
    ours.min_by_key(|one| {
        let variant = one.platform().as_ref().and_then(|platform| platform.variant().clone()).unwrap_or_default();
        (!["", "v1", "v8"].contains(&variant.as_str()), variant)
    })
}

/// An index of this one manifest.
fn index_of(manifest: &Fetched) -> Value {
    let digest = format!("sha256:{}", manifest.digest);
    let descriptor = json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": manifest.bytes.len() });
    json!({ "schemaVersion": 2, "manifests": [descriptor] })
}

fn layer_progress(digest: &Sha256Digest, total_bytes: u64) -> LayerProgress {
    LayerProgress { digest: format!("sha256:{digest}"), bytes: 0, total_bytes, is_there: false }
}

fn path_of(digest: &Sha256Digest) -> String {
    format!("blobs/sha256/{digest}")
}

fn digest_of(descriptor: &Descriptor) -> Result<Sha256Digest, ImportError> {
    let digest = descriptor.as_digest_sha256().and_then(|digest| digest.parse().ok());
    digest.ok_or_else(|| invalid(&format!("the digest {} is not of the kind sha256", descriptor.digest())))
}

/// Of what is held in memory.
fn small_digest(descriptor: &Descriptor) -> Result<Sha256Digest, ImportError> {
    if descriptor.size() > DOCUMENT_BYTES_MAX {
        return Err(invalid(&format!("the image's configuration has {} bytes; at most {DOCUMENT_BYTES_MAX}", descriptor.size())));
    }
    digest_of(descriptor)
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ImportError> {
    serde_json::from_slice(bytes).map_err(|error| invalid(&format!("{what}: {error}")))
}

fn invalid(why: &str) -> ImportError {
    ImportError::invalid(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(document: &Value, content_type: &str) -> Fetched {
        let bytes = document.to_string().into_bytes();
        Fetched { digest: crate::images::blob::digest_of(&bytes), bytes, content_type: content_type.to_owned() }
    }

    #[test]
    fn tenants_leave_a_place_for_operators() {
        let tenants = ["a", "b", "c"].map(|name| TenantId::proven(name.to_owned()));
        let [a, b, c] = tenants.each_ref().map(Some);
        let of_tenants = [a, a, a, b, b, b];

        assert_eq!(check_place(a, &[a, a, a]), Ok(()));
        assert!(check_place(a, &[a, a, a, a]).unwrap_err().contains("one tenant"));
        assert_eq!(check_place(b, &[a, a, a, a]), Ok(()));
        assert!(check_place(c, &of_tenants).unwrap_err().contains("of tenants"));
        assert_eq!(check_place(None, &of_tenants), Ok(()));
        assert!(check_place(None, &[a, a, a, b, b, b, None, None]).unwrap_err().contains("this node takes"));
        assert_eq!(check_place(c, &[a, a, a, b, b, None, None]), Ok(()));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let kind = |document: Value, content_type: &str| kind_of(&fetched(&document, content_type)).ok();
        let (manifest, index) = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json");
        assert_eq!(kind(json!({ "schemaVersion": 2, "layers": [], "config": {} }), manifest), Some(Kind::Manifest));
        assert_eq!(kind(json!({ "schemaVersion": 2, "manifests": [] }), index), Some(Kind::Index));
        // Some registries know no type.
        assert_eq!(kind(json!({ "schemaVersion": 2, "manifests": [] }), "application/json"), Some(Kind::Index));
        assert_eq!(kind(json!({ "schemaVersion": 2, "layers": [], "manifests": [] }), index), None);
        assert_eq!(kind(json!({ "schemaVersion": 2, "manifests": [] }), manifest), None);
        assert_eq!(kind(json!({ "schemaVersion": 2, "mediaType": index, "layers": [] }), manifest), None);
        assert_eq!(kind(json!({ "schemaVersion": 1, "fsLayers": [] }), manifest), None);
    }

    #[test]
    fn of_many_platforms_ours_is_taken_and_its_plainest_variant() {
        let ours = oci_spec::image::Arch::default().to_string();
        let one = |digit: &str, os: &str, architecture: &str, variant: Option<&str>| {
            let mut platform = json!({ "os": os, "architecture": architecture });
            if let Some(variant) = variant {
                platform["variant"] = variant.into();
            }
            json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{}", digit.repeat(64)), "size": 1, "platform": platform })
        };
        let chosen = |manifests: Value| {
            let index: ImageIndex = serde_json::from_value(json!({ "schemaVersion": 2, "manifests": manifests })).unwrap();
            for_this_machine(&index).map(|one| one.digest().digest()[..1].to_owned())
        };
        let all = json!([
            one("a", "windows", &ours, None),
            one("b", "linux", "s390x", None),
            one("c", "linux", &ours, Some("v3")),
            one("d", "linux", &ours, None)
        ]);
        assert_eq!(chosen(all).as_deref(), Some("d"));
        assert_eq!(chosen(json!([one("b", "linux", "s390x", None)])), None);
        assert_eq!(chosen(json!([])), None);
        let mut unnamed = one("e", "linux", &ours, None);
        unnamed.as_object_mut().unwrap().remove("platform");
        assert_eq!(chosen(json!([unnamed])).as_deref(), Some("e"));
    }
}
