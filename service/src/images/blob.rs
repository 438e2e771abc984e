//! Content by its digest, in the data folder: manifests, configurations and layers of the images that were imported.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context;
use oci_spec::image::{ImageConfiguration, ImageManifest, Sha256Digest};
use sha2::{Digest as _, Sha256};

use super::Fault;

/// The folder of blobs. A file in it holds what its name says.
#[derive(Debug)]
pub(super) struct Blobs {
    folder: PathBuf,
}

impl Blobs {
    /// Opens the folder, after removing what an interrupted import left.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let folder = folder.join("sha256");
        fs::create_dir_all(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let is_blob = entry.file_name().to_str().is_some_and(|name| name.parse::<Sha256Digest>().is_ok());
            if !is_blob {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { folder })
    }

    /// Every blob that is kept.
    pub(super) fn all(&self) -> io::Result<HashSet<Sha256Digest>> {
        let names = fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<io::Result<Vec<_>>>()?;
        Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
    }

    /// How many blobs are kept, and their bytes together.
    pub(super) fn sum(&self) -> io::Result<(u64, u64)> {
        let mut sum = (0, 0);
        for entry in fs::read_dir(&self.folder)? {
            // One that goes away meanwhile does not count.
            if let Ok(found) = entry?.metadata() {
                sum = (sum.0 + 1, sum.1 + found.len());
            }
        }
        Ok(sum)
    }

    /// Keeps what `from` holds, if it has this size and this digest. It is read to its end even if it is here already: who names a
    /// digest must have its content.
    pub(super) fn keep(&self, digest: &Sha256Digest, bytes: u64, from: impl Read) -> Result<(), Fault> {
        let path = self.path(digest);
        let mut to = None;
        // One of another length lost some of itself: it is kept anew.
        if !fs::metadata(&path).is_ok_and(|kept| kept.len() == bytes) {
            to = Some(tempfile::NamedTempFile::new_in(&self.folder).context("keeping a blob")?);
        }
        let (found, len) = hash(from, |chunk| to.as_mut().map_or(Ok(()), |to| to.write_all(chunk)))?;
        if found != *digest || len != bytes {
            return Err(Fault::Invalid(format!(
                "the content of sha256:{digest} ({bytes} bytes) has another digest: sha256:{found} ({len} bytes)"
            )));
        }
        if let Some(to) = to {
            to.as_file().sync_all().context("keeping a blob")?;
            to.persist(&path).map_err(|error| error.error).with_context(|| path.display().to_string())?;
            File::open(&self.folder).and_then(|folder| folder.sync_all()).context("keeping a blob")?;
        }
        Ok(())
    }

    /// Opens what was kept.
    pub(super) fn open_blob(&self, digest: &Sha256Digest) -> anyhow::Result<File> {
        let path = self.path(digest);
        File::open(&path).with_context(|| path.display().to_string())
    }

    /// Deletes a manifest and what it refers to, less what one of the manifests in `kept` refers to. All that could not be deleted is
    /// in the error.
    pub(super) fn release(&self, blobs: HashSet<Sha256Digest>, kept: impl IntoIterator<Item = Sha256Digest>) -> anyhow::Result<()> {
        let mut needed = HashSet::new();
        for digest in kept {
            // One whose blobs were lost holds on to nothing.
            needed.extend(self.references(&digest).unwrap_or_default());
            needed.insert(digest);
        }
        let mut faults = Vec::new();
        for digest in blobs.difference(&needed) {
            if let Err(error) = fs::remove_file(self.path(digest))
                && error.kind() != io::ErrorKind::NotFound
            {
                faults.push(format!("{digest}: {error}"));
            }
        }
        anyhow::ensure!(faults.is_empty(), "blobs that could not be deleted: {}", faults.join(", "));
        Ok(())
    }

    /// The manifest of this digest. Fails if it is not here.
    pub(super) fn manifest(&self, digest: &Sha256Digest) -> anyhow::Result<ImageManifest> {
        Ok(serde_json::from_reader(io::BufReader::new(self.open_blob(digest)?))?)
    }

    /// Whether all is here that the manifest of this digest refers to, and it itself.
    pub(super) fn has_all(&self, manifest: &Sha256Digest) -> bool {
        self.references(manifest).is_ok_and(|all| all.iter().all(|digest| self.path(digest).exists()))
    }

    /// Takes away what is not what it was, if that is still the file that was read. Nobody may keep it anew meanwhile.
    pub(super) fn put_away(&self, digest: &Sha256Digest, read: &File) -> io::Result<()> {
        let (path, read) = (self.path(digest), read.metadata()?);
        match fs::metadata(&path) {
            Ok(there) if (there.dev(), there.ino()) == (read.dev(), read.ino()) => fs::remove_file(&path),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// What the manifest of this digest refers to, and itself. Fails if it is not here.
    pub(super) fn references(&self, manifest: &Sha256Digest) -> anyhow::Result<HashSet<Sha256Digest>> {
        let parsed = self.manifest(manifest)?;
        let descriptors = parsed.layers().iter().chain([parsed.config()]);
        let mut all: HashSet<_> = descriptors.filter_map(|descriptor| descriptor.as_digest_sha256()?.parse().ok()).collect();
        all.insert(manifest.clone());
        Ok(all)
    }

    /// The configuration of the image whose manifest this is. Fails if the one or the other is not here.
    pub(super) fn configuration(&self, manifest: &Sha256Digest) -> anyhow::Result<ImageConfiguration> {
        let parsed = self.manifest(manifest)?;
        let config: Option<Sha256Digest> = parsed.config().as_digest_sha256().and_then(|digest| digest.parse().ok());
        let config = config.with_context(|| format!("the manifest {manifest} names no configuration"))?;
        Ok(serde_json::from_reader(io::BufReader::new(self.open_blob(&config)?))?)
    }

    fn path(&self, digest: &Sha256Digest) -> PathBuf {
        self.folder.join(digest.digest())
    }
}

/// Whether it failed for want of a file.
pub(super) fn is_missing(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|cause| cause.kind() == io::ErrorKind::NotFound)
}

/// Reads to the end, shows each part to `see`, and says digest and length of it all.
pub(super) fn hash(mut from: impl Read, mut see: impl FnMut(&[u8]) -> io::Result<()>) -> Result<(Sha256Digest, u64), Fault> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut len = 0;
    loop {
        let have = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(have) => have,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Host(anyhow::Error::new(error).context("reading an upload"))),
        };
        hasher.update(&buffer[..have]);
        see(&buffer[..have]).context("keeping a blob")?;
        len += have as u64;
    }
    Ok((hex_digest(hasher), len))
}

/// The digest of bytes in memory.
pub(super) fn digest_of(bytes: &[u8]) -> Sha256Digest {
    hex_digest(Sha256::new_with_prefix(bytes))
}

fn hex_digest(hasher: Sha256) -> Sha256Digest {
    hex::encode(hasher.finalize()).parse().expect("32 bytes are 64 hex digits")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn blobs() -> (tempfile::TempDir, Blobs) {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path()).unwrap();
        (folder, blobs)
    }

    fn keep(blobs: &Blobs, content: &[u8]) -> Sha256Digest {
        let digest = digest_of(content);
        blobs.keep(&digest, content.len() as u64, content).unwrap();
        digest
    }

    fn descriptor(digest: &Sha256Digest) -> Value {
        json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": format!("sha256:{digest}"), "size": 1 })
    }

    fn manifest(blobs: &Blobs, config: &Sha256Digest, layers: &[&Sha256Digest]) -> Sha256Digest {
        let layers: Vec<_> = layers.iter().map(|layer| descriptor(layer)).collect();
        keep(blobs, json!({ "schemaVersion": 2, "config": descriptor(config), "layers": layers }).to_string().as_bytes())
    }

    #[test]
    fn what_was_kept_reads_back() {
        let (_folder, blobs) = blobs();
        let digest = keep(&blobs, b"content");
        assert_eq!(io::read_to_string(blobs.open_blob(&digest).unwrap()).unwrap(), "content");
    }

    #[test]
    fn the_configuration_of_an_image_is_found_by_its_manifest() {
        let (_folder, blobs) = blobs();
        let written =
            json!({ "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sh"] }, "rootfs": { "type": "layers", "diff_ids": [] } });
        let config = keep(&blobs, written.to_string().as_bytes());
        let manifest = manifest(&blobs, &config, &[]);

        let found = blobs.configuration(&manifest).unwrap();

        assert_eq!(found.config().as_ref().unwrap().cmd().as_deref(), Some(&["sh".to_owned()][..]));
        assert!(blobs.configuration(&config).is_err(), "that is no manifest");
        assert!(blobs.configuration(&digest_of(b"never kept")).is_err());
    }

    #[test]
    fn content_of_another_digest_is_refused_and_leaves_nothing() {
        let (folder, blobs) = blobs();
        let fault = blobs.keep(&digest_of(b"promised"), 8, &b"sent ..."[..]).unwrap_err();
        assert!(matches!(fault, Fault::Invalid(text) if text.contains("digest")));
        assert_eq!(fs::read_dir(folder.path().join("sha256")).unwrap().count(), 0);
    }

    #[test]
    fn what_lost_some_of_itself_is_kept_anew() {
        let (folder, blobs) = blobs();
        let digest = keep(&blobs, b"content");
        fs::write(folder.path().join("sha256").join(digest.digest()), "cont").unwrap();

        assert!(blobs.keep(&digest, 7, &b"cuntent"[..]).is_err());
        keep(&blobs, b"content");

        assert_eq!(io::read_to_string(blobs.open_blob(&digest).unwrap()).unwrap(), "content");
    }

    #[test]
    fn to_know_a_digest_is_not_to_have_its_content() {
        let (_folder, blobs) = blobs();
        let digest = keep(&blobs, b"another tenant's layer");
        assert!(blobs.keep(&digest, 22, &b"guessed"[..]).is_err());
    }

    #[test]
    fn what_an_interrupted_import_left_is_removed() {
        let (folder, blobs) = blobs();
        keep(&blobs, b"content");
        fs::write(folder.path().join("sha256/.tmpAbCdEf"), "half").unwrap();
        Blobs::open(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path().join("sha256")).unwrap().count(), 1);
    }

    #[test]
    fn a_released_image_leaves_what_another_one_shares() {
        let (_folder, blobs) = blobs();
        let [shared, own, config, other_config] = [&b"shared"[..], b"own", b"config", b"other"].map(|content| keep(&blobs, content));
        let released = manifest(&blobs, &config, &[&shared, &own]);
        let stays = manifest(&blobs, &other_config, &[&shared]);

        blobs.release(blobs.references(&released).unwrap(), [stays.clone()]).unwrap();

        assert!([&own, &config, &released].iter().all(|digest| blobs.open_blob(digest).is_err()));
        assert!([&shared, &other_config, &stays].iter().all(|digest| blobs.open_blob(digest).is_ok()));
    }
}
