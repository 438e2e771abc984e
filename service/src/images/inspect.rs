//! What images are made of, and whether it is still what it was.

use std::{collections::HashSet, fs::File, sync::Arc};

use anyhow::Context as _;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest, Sha256Digest};

use super::{
    Fault, Images, ImportError,
    blob::{Blobs, hash, is_missing},
    digest_of_root,
};
use crate::{sandbox::TenantId, store::Image};

/// Images that are looked through at one time, of this node and of a tenant: each is as much work as its bytes.
pub(super) const VERIFIED_AT_ONCE: usize = 2;
pub(super) const VERIFIED_OF_TENANT_AT_ONCE: usize = 1;

/// How an image was built, the first step first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    pub steps: Vec<Step>,
    /// As whoever built it wrote it.
    pub author: Option<String>,
    pub created: Option<String>,
}

/// One step. All but the layer is the word of whoever built the image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    pub created: Option<String>,
    pub created_by: Option<String>,
    pub comment: Option<String>,
    /// What it added to the files.
    pub layer: Option<StepLayer>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepLayer {
    /// As in `sha256:…`.
    pub digest: String,
    /// Packed as it is.
    pub size_bytes: u64,
    pub media_type: String,
}

/// What was found where an image's content is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// How many bytes were read.
    pub bytes: u64,
    pub damaged: Vec<Damage>,
    /// Whether the root is there that sandboxes are made of.
    pub is_unpacked: bool,
}

/// A part that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// As in `sha256:…`.
    pub digest: String,
    pub part: Part,
    pub kind: DamageKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Manifest,
    Config,
    Layer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DamageKind {
    Missing,
    /// It has other bytes than its digest says.
    Changed,
    /// The disk does not give it out.
    Unreadable,
}

impl Images {
    /// How the image was built, as far as whoever built it says so.
    pub async fn history(&self, image: &Image) -> Result<History, ImportError> {
        let (blobs, manifest) = (Arc::clone(&self.blobs), digest_of_root(&image.root));
        let read = tokio::task::spawn_blocking(move || {
            let parsed = blobs.manifest(&manifest)?;
            anyhow::Ok(history(&parsed, &blobs.configuration(&manifest)?))
        });
        read.await.map_err(|panic| ImportError::Internal(panic.into()))?.map_err(ImportError::of_content)
    }

    /// Reads all that the image is made of, for this tenant, and holds it against its digests. What has other bytes is put away, so that whoever imports or pulls the image again has it as it was.
    /// What was begun is finished.
    pub async fn verify(self: &Arc<Self>, image: Image, tenant: &TenantId) -> Result<Verified, ImportError> {
        let place = self.verifying.take(Some(tenant)).map_err(ImportError::Busy)?;
        let images = Arc::clone(self);
        // Nothing ends what reads the files, so nothing but its end frees the place.
        let work = place.hold(async move { images.verify_now(&image).await });
        work.await.unwrap_or_else(|panic| Err(ImportError::Internal(panic.into())))
    }

    async fn verify_now(&self, image: &Image) -> Result<Verified, ImportError> {
        let (blobs, manifest) = (Arc::clone(&self.blobs), digest_of_root(&image.root));
        let read = tokio::task::spawn_blocking(move || verify(&blobs, &manifest));
        let (mut verified, changed) = read.await.map_err(|panic| ImportError::Internal(panic.into()))?.map_err(ImportError::of_content)?;
        if !changed.is_empty() {
            // Nobody keeps it anew meanwhile.
            let _taking = self.content.write().await;
            let blobs = Arc::clone(&self.blobs);
            let put_away = move || changed.iter().try_for_each(|(digest, read)| blobs.put_away(digest, read));
            let put_away = tokio::task::spawn_blocking(put_away).await.map_err(|panic| ImportError::Internal(panic.into()))?;
            put_away.context("putting away what is damaged").map_err(ImportError::Internal)?;
        }
        verified.is_unpacked = self.keeper.images().await?.contains(&image.root);
        for Damage { digest, part, kind } in &verified.damaged {
            tracing::warn!(image.digest = image.digest, blob = digest, ?part, ?kind, "a part of an image is damaged");
        }
        Ok(verified)
    }
}

/// Each step with its layer: those that say that they have none have none, and the others one after the other. Where that does not come out even, layers alone are told.
fn history(manifest: &ImageManifest, config: &ImageConfiguration) -> History {
    let layer = |layer: &Descriptor| StepLayer {
        digest: layer.digest().to_string(),
        size_bytes: layer.size(),
        media_type: layer.media_type().to_string(),
    };
    let mut layers = manifest.layers().iter().map(layer);
    let told = config.history().as_deref().unwrap_or_default();
    let is_even = told.iter().filter(|step| step.empty_layer() != Some(true)).count() == manifest.layers().len();
    let steps = if is_even {
        let step = |step: &oci_spec::image::History| Step {
            created: step.created().clone(),
            created_by: step.created_by().clone(),
            comment: step.comment().clone(),
            layer: if step.empty_layer() == Some(true) { None } else { layers.next() },
        };
        told.iter().map(step).collect()
    } else {
        layers.map(|layer| Step { layer: Some(layer), ..Step::default() }).collect()
    };
    History { steps, author: config.author().clone(), created: config.created().clone() }
}

/// Files that have other bytes than their digests say: those that were read, open still.
type Changed = Vec<(Sha256Digest, File)>;

fn verify(blobs: &Blobs, manifest: &Sha256Digest) -> anyhow::Result<(Verified, Changed)> {
    let (mut verified, mut changed) = (Verified::default(), Vec::new());
    if !check(blobs, manifest, Part::Manifest, &mut verified, &mut changed)? {
        return Ok((verified, changed));
    }
    let parsed = blobs.manifest(manifest)?;
    let mut seen = HashSet::new();
    let parts = [(parsed.config(), Part::Config)].into_iter().chain(parsed.layers().iter().map(|layer| (layer, Part::Layer)));
    for (descriptor, part) in parts {
        let digest: Option<Sha256Digest> = descriptor.as_digest_sha256().and_then(|digest| digest.parse().ok());
        let digest = digest.with_context(|| format!("the digest {} was kept", descriptor.digest()))?;
        if seen.insert(digest.clone()) {
            check(blobs, &digest, part, &mut verified, &mut changed)?;
        }
    }
    Ok((verified, changed))
}

/// Whether this part is what it was. If not, that is noted.
fn check(blobs: &Blobs, digest: &Sha256Digest, part: Part, verified: &mut Verified, changed: &mut Changed) -> anyhow::Result<bool> {
    let kind = match blobs.open_blob(digest) {
        Err(error) if is_missing(&error) => DamageKind::Missing,
        // As for want of descriptors: that says nothing of the file.
        Err(error) => return Err(error),
        Ok(file) => match hash(&file, |_| Ok(())) {
            Ok((found, bytes)) => {
                verified.bytes += bytes;
                if found == *digest {
                    return Ok(true);
                }
                changed.push((digest.clone(), file));
                DamageKind::Changed
            }
            // It may be sound, and another time the disk may give it out.
            Err(Fault::Host(_) | Fault::Invalid(_)) => DamageKind::Unreadable,
        },
    };
    verified.damaged.push(Damage { digest: format!("sha256:{digest}"), part, kind });
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::{super::blob::digest_of, *};

    fn keep(blobs: &Blobs, content: &[u8]) -> Sha256Digest {
        let digest = digest_of(content);
        blobs.keep(&digest, content.len() as u64, content).unwrap();
        digest
    }

    fn manifest_of(config: &Sha256Digest, layers: &[&Sha256Digest]) -> Value {
        let layer = |layer: &&Sha256Digest| json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": format!("sha256:{layer}"), "size": 7 });
        let config = json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{config}"), "size": 1 });
        json!({ "schemaVersion": 2, "config": config, "layers": layers.iter().map(layer).collect::<Vec<_>>() })
    }

    fn damage(digest: &Sha256Digest, kind: DamageKind) -> Damage {
        Damage { digest: format!("sha256:{digest}"), part: Part::Layer, kind }
    }

    #[test]
    fn what_is_damaged_is_found_told_and_put_away() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path()).unwrap();
        let [config, sound, changed, lost] = [&b"config"[..], b"sound", b"changed", b"lost"].map(|content| keep(&blobs, content));
        let manifest = keep(&blobs, manifest_of(&config, &[&sound, &changed, &lost, &sound]).to_string().as_bytes());
        assert_eq!(verify(&blobs, &manifest).unwrap().0.damaged, []);
        fs::write(folder.path().join("sha256").join(changed.digest()), "ch4nged").unwrap();
        fs::remove_file(folder.path().join("sha256").join(lost.digest())).unwrap();

        let (verified, away) = verify(&blobs, &manifest).unwrap();
        for (digest, read) in &away {
            blobs.put_away(digest, read).unwrap();
        }

        assert_eq!(verified.damaged, [damage(&changed, DamageKind::Changed), damage(&lost, DamageKind::Missing)]);
        // With it out of the way, the same bytes are kept again.
        for content in [&b"changed"[..], b"lost"] {
            keep(&blobs, content);
        }
        assert_eq!(verify(&blobs, &manifest).unwrap().0.damaged, []);
        assert_eq!(verify(&blobs, &digest_of(b"none")).unwrap().0.damaged[0].part, Part::Manifest);
    }

    #[test]
    fn what_the_disk_does_not_give_out_is_told_and_left_there() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path()).unwrap();
        let [config, layer] = [&b"config"[..], b"layer"].map(|content| keep(&blobs, content));
        let manifest = keep(&blobs, manifest_of(&config, &[&layer]).to_string().as_bytes());
        let path = folder.path().join("sha256").join(layer.digest());
        fs::remove_file(&path).unwrap();

        // A folder can be opened and not be read.
        fs::create_dir(&path).unwrap();
        let (verified, away) = verify(&blobs, &manifest).unwrap();
        fs::remove_dir(&path).unwrap();
        // What cannot be opened is there all the same.
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let refused = verify(&blobs, &manifest);

        assert_eq!((verified.damaged, away.len()), (vec![damage(&layer, DamageKind::Unreadable)], 0));
        assert!(refused.is_err() && path.is_symlink());
    }

    #[test]
    fn what_was_kept_anew_since_it_was_read_stays() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path()).unwrap();
        let [config, layer] = [&b"config"[..], b"layer"].map(|content| keep(&blobs, content));
        let manifest = keep(&blobs, manifest_of(&config, &[&layer]).to_string().as_bytes());
        let path = folder.path().join("sha256").join(layer.digest());
        fs::write(&path, "l4yer").unwrap();
        let [(_, first), (_, second)] = [(); 2].map(|()| verify(&blobs, &manifest).unwrap());

        blobs.put_away(&first[0].0, &first[0].1).unwrap();
        let is_away = !path.exists();
        keep(&blobs, b"layer");
        blobs.put_away(&second[0].0, &second[0].1).unwrap();

        assert!(is_away);
        assert_eq!(verify(&blobs, &manifest).unwrap().0.damaged, []);
    }

    #[test]
    fn steps_have_their_layers_where_they_come_out_even() {
        let config = |history: Value| -> ImageConfiguration {
            let document = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] }, "history": history, "author": "me" });
            serde_json::from_value(document).unwrap()
        };
        let (one, two) = (digest_of(b"1"), digest_of(b"2"));
        let manifest: ImageManifest = serde_json::from_value(manifest_of(&digest_of(b"c"), &[&one, &two])).unwrap();
        let steps = json!([{ "created_by": "ADD" }, { "created_by": "ENV", "empty_layer": true }, { "created_by": "RUN", "comment": "x" }]);

        let even = history(&manifest, &config(steps));
        let odd = history(&manifest, &config(json!([{ "created_by": "ADD" }])));

        let digests =
            |history: &History| history.steps.iter().map(|step| step.layer.as_ref().map(|layer| layer.digest.clone())).collect::<Vec<_>>();
        let (one, two) = (Some(format!("sha256:{one}")), Some(format!("sha256:{two}")));
        assert_eq!(digests(&even), [one.clone(), None, two.clone()]);
        assert_eq!((even.steps[1].created_by.as_deref(), even.author.as_deref()), (Some("ENV"), Some("me")));
        assert_eq!(digests(&odd), [one, two]);
        assert_eq!(odd.steps[0].created_by, None);
    }
}
