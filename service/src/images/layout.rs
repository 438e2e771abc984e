//! The one image of an archive that is meant: an OCI image layout or what `docker save` writes, told apart by content.

use std::collections::{HashMap, HashSet};

use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, ImageManifestBuilder, MediaType, OciLayout, Os, Platform, RootFs,
    Sha256Digest,
};
use sandbox_core::protocol::DESCRIPTORS_MAX;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    Fault,
    archive::{Archive, Packing, Section},
    blob::{digest_of, hash},
};

/// Manifests in one archive, in all its indexes together, and those indexes.
const MANIFESTS_MAX: usize = 1000;
/// Indexes inside indexes.
const DEPTH_MAX: usize = 4;
/// What a launch can carry of the image's command and environment, and what a row should hold of its labels.
const CONFIG_BYTES_MAX: usize = 64 * 1024;
/// All that a row holds of an image's configuration, as JSON. Each of a tenant's images has such a row, and a list of them reads them all.
const ROW_BYTES_MAX: usize = 128 * 1024;

const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LAYERS: [&str; 3] = [
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
const REFERENCE_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// An image in an archive. Its documents are read and checked; its layers are there, with the right size, not yet read.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) manifest: Document,
    pub(super) config: Document,
    pub(super) configuration: ImageConfiguration,
    /// Bottom first.
    pub(super) layers: Vec<Layer>,
}

/// A small blob.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) digest: Sha256Digest,
    pub(super) bytes: Vec<u8>,
}

/// A large blob.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) digest: Sha256Digest,
    pub(super) section: Section,
}

/// Finds the image for this machine that `reference` means, or the only one that there is.
pub(super) fn find(archive: &Archive, reference: &str) -> Result<Found, Fault> {
    // Newer Dockers save both forms in one archive; the standard's is the richer one.
    if archive.find("index.json").is_some() {
        from_layout(archive, reference)
    } else if archive.find("manifest.json").is_some() {
        from_docker(archive, reference)
    } else {
        invalid("the archive is no image: it has neither index.json (OCI image layout) nor manifest.json (docker save) at its top")
    }
}

fn from_layout(archive: &Archive, reference: &str) -> Result<Found, Fault> {
    let layout: OciLayout = parse("oci-layout", &archive.document("oci-layout", archive.section("oci-layout")?)?)?;
    if !layout.image_layout_version().starts_with("1.") {
        return invalid(format!("oci-layout: version {} is not supported; 1.0.0 is", layout.image_layout_version()));
    }
    let index: ImageIndex = parse("index.json", &archive.document("index.json", archive.section("index.json")?)?)?;
    let mut collector = Collector { archive, left: MANIFESTS_MAX, manifests: Vec::new() };
    for descriptor in index.manifests() {
        let name = descriptor.annotations().as_ref().and_then(|all| all.get(REFERENCE_ANNOTATION)).map_or("", String::as_str);
        collector.collect(name, descriptor, 1)?;
    }
    let mut ours = Vec::new();
    for (name, descriptor) in collector.manifests {
        if is_for_us(archive, &descriptor)? && !ours.iter().any(|(_, known): &(_, Descriptor)| known.digest() == descriptor.digest()) {
            ours.push((name, descriptor));
        }
    }
    let named: Vec<_> = ours.iter().filter(|(name, _)| is_meant(name, reference)).collect();
    let descriptor = match (&ours[..], &named[..]) {
        ([(_, only)], _) | (_, [(_, only)]) => only,
        ([], _) => return invalid(format!("the archive has no image for {}", platform())),
        _ => {
            return invalid(format!("the archive has {} images for {}, and no single one is called {reference:?}", ours.len(), platform()));
        }
    };
    let document = blob(archive, descriptor)?;
    let manifest: ImageManifest = parse("the manifest", &document.bytes)?;
    if manifest.schema_version() != 2 {
        return invalid(format!("the manifest: schemaVersion {} is not supported; 2 is", manifest.schema_version()));
    }
    let config = blob(archive, manifest.config())?;
    let configuration = configuration(&config.bytes, manifest.layers().len())?;
    let layers = manifest.layers().iter().map(|layer| layer_of(archive, layer)).collect::<Result<_, _>>()?;
    Ok(Found { manifest: document, config, configuration, layers })
}

/// Manifests on their way out of an archive's indexes.
struct Collector<'a> {
    archive: &'a Archive,
    /// How many more descriptors will be looked at: an index may name another one many times over.
    left: usize,
    /// With the name that the outermost descriptor has.
    manifests: Vec<(&'a str, Descriptor)>,
}

impl<'a> Collector<'a> {
    /// Adds the manifests that a descriptor leads to.
    fn collect(&mut self, name: &'a str, descriptor: &Descriptor, depth: usize) -> Result<(), Fault> {
        let Some(left) = self.left.checked_sub(1) else {
            return invalid(format!("the archive's indexes name more than {MANIFESTS_MAX} manifests"));
        };
        self.left = left;
        let kind = descriptor.media_type().as_ref();
        if [DOCKER_INDEX, MediaType::ImageIndex.as_ref()].contains(&kind) {
            return self.collect_all(name, descriptor, depth);
        }
        // What else there may be are signatures and the like.
        if [DOCKER_MANIFEST, MediaType::ImageManifest.as_ref()].contains(&kind) {
            self.manifests.push((name, descriptor.clone()));
        }
        Ok(())
    }

    fn collect_all(&mut self, name: &'a str, descriptor: &Descriptor, depth: usize) -> Result<(), Fault> {
        if depth >= DEPTH_MAX {
            return invalid(format!("the archive's indexes are nested more than {DEPTH_MAX} deep"));
        }
        let index: ImageIndex = parse("an index", &blob(self.archive, descriptor)?.bytes)?;
        index.manifests().iter().try_for_each(|inner| self.collect(name, inner, depth + 1))
    }
}

/// Whether a manifest is for this machine: by its platform, or by its configuration when it names none.
fn is_for_us(archive: &Archive, descriptor: &Descriptor) -> Result<bool, Fault> {
    if let Some(platform) = descriptor.platform() {
        return Ok(is_ours(platform));
    }
    let manifest: ImageManifest = parse("a manifest", &blob(archive, descriptor)?.bytes)?;
    if *manifest.config().media_type() != MediaType::ImageConfig && !is_docker_config(manifest.config()) {
        return Ok(false);
    }
    let config: ImageConfiguration = parse("an image's configuration", &blob(archive, manifest.config())?.bytes)?;
    Ok(*config.os() == Os::Linux && *config.architecture() == Arch::default())
}

/// Whether this is our machine's.
pub(super) fn is_ours(platform: &Platform) -> bool {
    *platform.os() == Os::Linux && *platform.architecture() == Arch::default()
}

fn is_docker_config(descriptor: &Descriptor) -> bool {
    descriptor.media_type().as_ref() == "application/vnd.docker.container.image.v1+json"
}

/// Checks all of an image that can be checked before its layers are here.
pub(super) fn check(manifest: &ImageManifest, config: &[u8]) -> Result<(), Fault> {
    configuration(config, manifest.layers().len())?;
    manifest.layers().iter().try_for_each(check_kind)
}

/// Whether a name in an archive (`1.2`, `python:1.2`) is the one that the image is to have here.
fn is_meant(name: &str, reference: &str) -> bool {
    !name.is_empty() && (name == reference || reference.rsplit_once(':').is_some_and(|(_, tag)| tag == name))
}

fn layer_of(archive: &Archive, descriptor: &Descriptor) -> Result<Layer, Fault> {
    check_kind(descriptor)?;
    let (digest, section) = locate(archive, descriptor)?;
    Ok(Layer { digest, section })
}

fn check_kind(descriptor: &Descriptor) -> Result<(), Fault> {
    let standard = [
        MediaType::ImageLayer,
        MediaType::ImageLayerGzip,
        MediaType::ImageLayerZstd,
        MediaType::ImageLayerNonDistributable,
        MediaType::ImageLayerNonDistributableGzip,
        MediaType::ImageLayerNonDistributableZstd,
    ];
    let kind = descriptor.media_type();
    let is_known = standard.contains(kind) || DOCKER_LAYERS.contains(&kind.as_ref());
    if !is_known {
        return invalid(format!("a layer is of the kind {kind}, which is not supported"));
    }
    Ok(())
}

/// Reads a small blob and holds it against its digest.
fn blob(archive: &Archive, descriptor: &Descriptor) -> Result<Document, Fault> {
    let (digest, section) = locate(archive, descriptor)?;
    let bytes = archive.document(&format!("sha256:{digest}"), section)?;
    let found = digest_of(&bytes);
    if found != digest {
        return invalid(format!("the content of sha256:{digest} has another digest: sha256:{found}"));
    }
    Ok(Document { digest, bytes })
}

fn locate(archive: &Archive, descriptor: &Descriptor) -> Result<(Sha256Digest, Section), Fault> {
    let digest: Option<Sha256Digest> = descriptor.as_digest_sha256().and_then(|digest| digest.parse().ok());
    let Some(digest) = digest else {
        return invalid(format!("the digest {} is not of the kind sha256", descriptor.digest()));
    };
    let section = archive.section(&format!("blobs/sha256/{digest}"))?;
    if section.bytes != descriptor.size() {
        return invalid(format!("sha256:{digest} has {} bytes in the archive, but {} by its descriptor", section.bytes, descriptor.size()));
    }
    Ok((digest, section))
}

/// Parses an image's configuration and checks that it fits its manifest, this machine, a launch and a row.
fn configuration(bytes: &[u8], layers: usize) -> Result<ImageConfiguration, Fault> {
    let parsed: ImageConfiguration = parse("the image's configuration", bytes)?;
    if *parsed.os() != Os::Linux || *parsed.architecture() != Arch::default() {
        return invalid(format!("the image is for {}/{}; this machine is {}", parsed.os(), parsed.architecture(), platform()));
    }
    let diffs = parsed.rootfs().diff_ids().len();
    if diffs != layers {
        return invalid(format!("the image has {layers} layers, but its configuration tells of {diffs}"));
    }
    // A layer is a descriptor beside one message to the keeper.
    if !(1..=DESCRIPTORS_MAX).contains(&layers) {
        return invalid(format!("the image has {layers} layers; 1 to {DESCRIPTORS_MAX} are possible"));
    }
    check_fits(&parsed)?;
    Ok(parsed)
}

/// Checks that what an image says of itself fits a launch and a row.
pub(super) fn check_fits(configuration: &ImageConfiguration) -> Result<(), Fault> {
    if let Some(config) = configuration.config() {
        let lists = [config.entrypoint(), config.cmd(), config.env()];
        let texts = lists.into_iter().flatten().flatten().chain(config.user()).chain(config.working_dir());
        let labels = config.labels().iter().flatten().flat_map(|(key, value)| [key, value]);
        let len: usize = texts.chain(labels).map(|text| text.len() + 1).sum();
        if len > CONFIG_BYTES_MAX {
            return invalid(format!("command, environment and labels of the image are {len} bytes; at most {CONFIG_BYTES_MAX}"));
        }
    }
    // What a row holds: all that was understood, not only what a launch needs.
    if has_zero(&serde_json::to_value(configuration).map_err(anyhow::Error::from)?) {
        return invalid("the image's configuration holds a zero byte");
    }
    let len = serde_json::to_vec(&for_row(configuration)).map_err(anyhow::Error::from)?.len();
    if len > ROW_BYTES_MAX {
        return invalid(format!("the image's configuration without its history is {len} bytes of JSON; at most {ROW_BYTES_MAX}"));
    }
    Ok(())
}

/// What a row holds, which is read at every launch: how the image was built is in the blob.
pub(super) fn for_row(configuration: &ImageConfiguration) -> ImageConfiguration {
    let mut config = configuration.clone();
    config.set_history(None);
    config
}

/// Whether a text in it holds a zero byte, which no program can be given and no row can hold.
fn has_zero(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(has_zero),
        Value::Object(fields) => fields.iter().any(|(key, value)| key.contains('\0') || has_zero(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// An image in `manifest.json` of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn from_docker(archive: &Archive, reference: &str) -> Result<Found, Fault> {
    let all: Vec<Saved> = parse("manifest.json", &archive.document("manifest.json", archive.section("manifest.json")?)?)?;
    let is_tagged = |saved: &&Saved| {
        let tags = saved.repo_tags.iter().flatten();
        tags.into_iter().any(|tag| tag == reference || tag.strip_suffix(":latest") == Some(reference))
    };
    let named: Vec<_> = all.iter().filter(is_tagged).collect();
    let saved = match (&all[..], &named[..]) {
        ([only], _) => only,
        (_, [only]) => only,
        ([], _) => return invalid("manifest.json names no image"),
        _ => return invalid(format!("the archive has {} images, and no single one is called {reference:?}", all.len())),
    };
    let bytes = archive.document(&saved.config, archive.section(&saved.config)?)?;
    let configuration = configuration(&bytes, saved.layers.len())?;
    let config = Document { digest: digest_of(&bytes), bytes };
    let mut layers = Vec::new();
    let mut descriptors = Vec::new();
    // A layer that occurs twice is hashed once.
    let mut known: HashMap<&str, (Layer, MediaType)> = HashMap::new();
    for (name, diff_id) in saved.layers.iter().zip(configuration.rootfs().diff_ids()) {
        if !known.contains_key(name.as_str()) {
            known.insert(name, saved_layer(archive, name)?);
        }
        let (layer, media_type) = &known[name.as_str()];
        // These archives name no digests of layers; a layer that is not packed has the one that the configuration names.
        if *media_type == MediaType::ImageLayer && *diff_id != format!("sha256:{}", layer.digest) {
            return invalid(format!("the layer {name:?} has the digest sha256:{}, but {diff_id} by the configuration", layer.digest));
        }
        descriptors.push(Descriptor::new(media_type.clone(), layer.section.bytes, layer.digest.clone()));
        layers.push(layer.clone());
    }
    Ok(Found { manifest: manifest_of(&config, descriptors)?, config, configuration, layers })
}

/// An image of one layer, which was read in a sandbox and is neither packed nor named by anybody.
pub(super) fn of_layer(archive: &Archive, section: Section, mut configuration: ImageConfiguration) -> Result<Found, Fault> {
    let (digest, _) = hash(archive.reader(section), |_| Ok(()))?;
    let mut rootfs = RootFs::default();
    rootfs.set_diff_ids(vec![format!("sha256:{digest}")]);
    configuration.set_rootfs(rootfs);
    let bytes = serde_json::to_vec(&configuration).map_err(anyhow::Error::from)?;
    let configuration = self::configuration(&bytes, 1)?;
    let config = Document { digest: digest_of(&bytes), bytes };
    let descriptor = Descriptor::new(MediaType::ImageLayer, section.bytes, digest.clone());
    Ok(Found { manifest: manifest_of(&config, vec![descriptor])?, config, configuration, layers: vec![Layer { digest, section }] })
}

/// What a manifest says that it is; those of OCI need not say it.
pub(super) fn manifest_type(manifest: &[u8]) -> String {
    let said: Option<Value> = serde_json::from_slice(manifest).ok();
    said.and_then(|said| said["mediaType"].as_str().map(str::to_owned)).unwrap_or_else(|| MediaType::ImageManifest.to_string())
}

/// The manifest of an image that came without one.
fn manifest_of(config: &Document, layers: Vec<Descriptor>) -> Result<Document, Fault> {
    let manifest = ImageManifestBuilder::default()
        .schema_version(2_u32)
        .media_type(MediaType::ImageManifest)
        .config(Descriptor::new(MediaType::ImageConfig, config.bytes.len() as u64, config.digest.clone()))
        .layers(layers)
        .build()
        .map_err(anyhow::Error::from)?;
    let bytes = serde_json::to_vec(&manifest).map_err(anyhow::Error::from)?;
    Ok(Document { digest: digest_of(&bytes), bytes })
}

fn saved_layer(archive: &Archive, name: &str) -> Result<(Layer, MediaType), Fault> {
    let section = archive.section(name)?;
    let packing = Packing::of(archive.reader(section)).map_err(anyhow::Error::from)?;
    let media_type = match packing {
        Packing::None => MediaType::ImageLayer,
        Packing::Gzip => MediaType::ImageLayerGzip,
        Packing::Zstd => MediaType::ImageLayerZstd,
    };
    let (digest, _) = hash(archive.reader(section), |_| Ok(()))?;
    Ok((Layer { digest, section }, media_type))
}

impl Found {
    /// Every blob of the image.
    pub(super) fn digests(&self) -> HashSet<Sha256Digest> {
        let documents = [&self.manifest.digest, &self.config.digest];
        self.layers.iter().map(|layer| &layer.digest).chain(documents).cloned().collect()
    }

    /// Bytes of its layers, as they were sent.
    pub(super) fn size_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.section.bytes).sum()
    }
}

pub(super) fn platform() -> String {
    format!("linux/{}", Arch::default())
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(bytes).map_err(|error| Fault::Invalid(format!("{what}: {error}")))
}

fn invalid<T>(why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Invalid(why.into()))
}

#[cfg(test)]
mod tests;
