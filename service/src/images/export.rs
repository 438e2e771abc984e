//! Images go out as archives that both other programs and an import of ours read: an OCI image layout, and what `docker save` writes, over the same files.

use std::{
    fs::File,
    io::{self, Read as _},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use oci_spec::image::{Descriptor, ImageManifest, Sha256Digest};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{Images, ImportError, blob::Blobs, digest_of_root, manifest_type, spool};
use crate::{sandbox::TenantId, store::Image};

/// Archives that go out at one time, of this node and of a tenant. Each holds as many files open as its image has layers.
pub(super) const EXPORTS_MAX: usize = 8;
pub(super) const EXPORTS_OF_TENANT_MAX: usize = 4;
/// A reader that takes nothing for so long has given up.
const IDLE: Duration = Duration::from_secs(60);
/// And one that takes less than this on the whole, after a while of any pace, holds a place that others need.
const BYTES_PER_S_MIN: u64 = 1 << 20;
const ANY_PACE: Duration = Duration::from_secs(600);
const CHUNK_BYTES: usize = 1 << 18;

/// An archive on its way out.
#[derive(Debug)]
pub struct Export {
    /// All of it.
    pub bytes: u64,
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
}

impl Export {
    /// What comes next. An error ends it before its end.
    pub async fn next(&mut self) -> Option<io::Result<Vec<u8>>> {
        self.pieces.recv().await
    }
}

/// A piece of an archive.
#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    /// A file of exactly this length, and what fills its last block.
    File(File, u64),
}

impl Images {
    /// Begins to send the image. What it is made of may lose its name meanwhile: it is sent all the same.
    pub async fn export(&self, image: &Image, tenant: &TenantId) -> Result<Export, ImportError> {
        let place = self.exporting.take(Some(tenant)).map_err(ImportError::Busy)?;
        let (blobs, manifest, reference) = (Arc::clone(&self.blobs), digest_of_root(&image.root), image.reference.clone());
        // What is open is sent, whoever takes it away.
        let opened = tokio::task::spawn_blocking(move || pieces(&blobs, &manifest, &reference)).await;
        let pieces = opened.map_err(|panic| ImportError::Internal(panic.into()))?.map_err(ImportError::of_content)?;
        let bytes = pieces.iter().map(Piece::bytes).sum();
        let (sender, receiver) = mpsc::channel(2);
        tokio::spawn(async move {
            // Whoever waited for it sees that it is not whole.
            if let Err(error) = send_within(time_for(bytes), pieces, &sender).await {
                tracing::warn!(%error, "an export broke off");
                drop(tokio::time::timeout(IDLE, sender.send(Err(error))).await);
            }
            drop(place);
        });
        Ok(Export { bytes, pieces: receiver })
    }
}

impl Piece {
    fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, bytes) => *bytes,
        }
    }
}

/// Opens all that is to be sent.
fn pieces(blobs: &Blobs, digest: &Sha256Digest, reference: &str) -> anyhow::Result<Vec<Piece>> {
    let mut manifest_bytes = Vec::new();
    blobs.open_blob(digest)?.read_to_end(&mut manifest_bytes)?;
    let manifest: ImageManifest = serde_json::from_slice(&manifest_bytes)?;
    let mut archive = Pieces::default();
    archive.document("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    archive.document("index.json", index(digest, &manifest_bytes, reference).to_string().as_bytes())?;
    archive.document("manifest.json", saved(&manifest, reference).to_string().as_bytes())?;
    archive.document(&path(digest), &manifest_bytes)?;
    let mut known = Vec::new();
    for descriptor in [manifest.config()].into_iter().chain(manifest.layers()) {
        let digest = sha256(descriptor)?;
        if !known.contains(&digest) {
            let file = blobs.open_blob(&digest)?;
            let bytes = file.metadata()?.len();
            archive.file(&path(&digest), file, bytes)?;
            known.push(digest);
        }
    }
    Ok(archive.finish())
}

#[derive(Debug, Default)]
struct Pieces(Vec<Piece>);

impl Pieces {
    fn document(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let bytes = content.len() as u64;
        let mut piece = spool::header(name, bytes)?.as_bytes().to_vec();
        piece.extend_from_slice(content);
        piece.resize(piece.len() + padding(bytes), 0);
        self.0.push(Piece::Bytes(piece));
        Ok(())
    }

    fn file(&mut self, name: &str, file: File, bytes: u64) -> anyhow::Result<()> {
        self.0.push(Piece::Bytes(spool::header(name, bytes)?.as_bytes().to_vec()));
        self.0.push(Piece::File(file, bytes));
        self.0.push(Piece::Bytes(vec![0; padding(bytes)]));
        Ok(())
    }

    /// The end of an archive is two blocks of zeros (tar(5)).
    fn finish(mut self) -> Vec<Piece> {
        self.0.push(Piece::Bytes(vec![0; 1024]));
        self.0
    }
}

fn padding(bytes: u64) -> usize {
    usize::try_from(bytes.next_multiple_of(spool::BLOCK_BYTES) - bytes).expect("less than a block")
}

fn path(digest: &Sha256Digest) -> String {
    format!("blobs/sha256/{digest}")
}

fn sha256(descriptor: &Descriptor) -> anyhow::Result<Sha256Digest> {
    let digest = descriptor.as_digest_sha256().and_then(|digest| digest.parse().ok());
    digest.with_context(|| format!("the digest {} was kept", descriptor.digest()))
}

/// The layout's index. The tag alone is what other programs look for, the whole name what containerd does.
fn index(digest: &Sha256Digest, manifest: &[u8], reference: &str) -> Value {
    let tag = tagged(reference).and_then(|name| name.rsplit_once(':').map(|(_, tag)| tag.to_owned())).unwrap_or_default();
    let mut descriptor = json!({ "mediaType": manifest_type(manifest), "digest": format!("sha256:{digest}"), "size": manifest.len() });
    if let (Some(name), false) = (tagged(reference), tag.is_empty()) {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag, "io.containerd.image.name": name });
    }
    json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [descriptor] })
}

/// What `docker load` reads.
fn saved(manifest: &ImageManifest, reference: &str) -> Value {
    let path = |descriptor: &Descriptor| format!("blobs/{}", descriptor.digest().to_string().replace(':', "/"));
    let layers: Vec<_> = manifest.layers().iter().map(path).collect();
    json!([{ "Config": path(manifest.config()), "RepoTags": tagged(reference).map(|name| vec![name]), "Layers": layers }])
}

/// The reference with its tag, if it has the form of one that Docker knows.
fn tagged(reference: &str) -> Option<String> {
    let is_fit = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/:".contains(c);
    let (name, tag) = match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        Some(_) | None => (reference, "latest"),
    };
    let is_tag = tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) && !tag.is_empty();
    (name.chars().all(is_fit) && is_tag).then(|| format!("{name}:{tag}"))
}

/// How long so many bytes may take.
fn time_for(bytes: u64) -> Duration {
    ANY_PACE + Duration::from_secs(bytes / BYTES_PER_S_MIN)
}

async fn send_within(time: Duration, pieces: Vec<Piece>, to: &mpsc::Sender<io::Result<Vec<u8>>>) -> io::Result<()> {
    let slow = |_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("its reader did not take it within {} s", time.as_secs())));
    tokio::time::timeout(time, send(pieces, to)).await.unwrap_or_else(slow)
}

async fn send(pieces: Vec<Piece>, to: &mpsc::Sender<io::Result<Vec<u8>>>) -> io::Result<()> {
    for piece in pieces {
        match piece {
            Piece::Bytes(bytes) => give(to, bytes).await?,
            Piece::File(mut file, mut left) => {
                while left > 0 {
                    let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
                    let read = tokio::task::spawn_blocking(move || {
                        let mut bytes = vec![0; wanted];
                        file.read_exact(&mut bytes).map(|()| (file, bytes))
                    });
                    let bytes;
                    (file, bytes) = read.await??;
                    left -= bytes.len() as u64;
                    give(to, bytes).await?;
                }
            }
        }
    }
    Ok(())
}

async fn give(to: &mpsc::Sender<io::Result<Vec<u8>>>, bytes: Vec<u8>) -> io::Result<()> {
    match tokio::time::timeout(IDLE, to.send(Ok(bytes))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_gone)) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "its reader is gone")),
        Err(_idle) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("its reader took nothing for {} s", IDLE.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::{
        super::{
            archive::{ARCHIVE_BYTES_MAX, Archive},
            blob::digest_of,
            layout::{self, platform},
        },
        *,
    };

    fn keep(blobs: &Blobs, content: &[u8]) -> Value {
        let digest = digest_of(content);
        blobs.keep(&digest, content.len() as u64, content).unwrap();
        json!({ "digest": format!("sha256:{digest}"), "size": content.len() })
    }

    #[test]
    fn what_leaves_is_what_an_import_would_take_in_again() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path()).unwrap();
        let architecture = platform().trim_start_matches("linux/").to_owned();
        let config = json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": ["a", "b", "a"] } });
        let mut described = [keep(&blobs, config.to_string().as_bytes()), keep(&blobs, &[7; 700]), keep(&blobs, b"second")];
        described[0]["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        for layer in &mut described[1..] {
            layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar");
        }
        let [config, first, second] = described;
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [first, second, first] }).to_string();
        keep(&blobs, manifest.as_bytes());

        let pieces = pieces(&blobs, &digest_of(manifest.as_bytes()), "team/app").unwrap();

        let bytes: u64 = pieces.iter().map(Piece::bytes).sum();
        let mut file = tempfile::tempfile().unwrap();
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) => file.write_all(&bytes).unwrap(),
                Piece::File(content, bytes) => assert_eq!(io::copy(&mut content.take(bytes), &mut file).unwrap(), bytes),
            }
        }
        assert_eq!(file.metadata().unwrap().len(), bytes);
        let archive = Archive::open(file, folder.path()).unwrap();
        let found = layout::find(&archive, "whatever").unwrap();
        assert_eq!((found.manifest.bytes.as_slice(), found.layers.len()), (manifest.as_bytes(), 3));
        let saved = archive.document("manifest.json", archive.section("manifest.json").unwrap()).unwrap();
        let saved: Value = serde_json::from_slice(&saved).unwrap();
        assert_eq!((&saved[0]["RepoTags"], saved[0]["Layers"].as_array().unwrap().len()), (&json!(["team/app:latest"]), 3));
        assert!(archive.section(saved[0]["Layers"][1].as_str().unwrap()).is_ok());
    }

    #[tokio::test]
    async fn who_takes_a_little_now_and_then_is_not_sent_it_for_ever() {
        let (sender, mut receiver) = mpsc::channel::<io::Result<Vec<u8>>>(1);
        let pieces = (0..1_000_000).map(|_| Piece::Bytes(vec![0])).collect();
        let slow = tokio::spawn(async move {
            while receiver.recv().await.is_some_and(|piece| piece.is_ok()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });

        let error = send_within(Duration::from_millis(200), pieces, &sender).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(sender);
        slow.await.unwrap();
        // Hours, and not weeks, for the largest.
        assert!(time_for(0) > IDLE && time_for(ARCHIVE_BYTES_MAX) < Duration::from_secs(3 * 3600));
    }

    #[test]
    fn a_reference_is_written_as_docker_knows_it_or_not_at_all() {
        assert_eq!(tagged("app").as_deref(), Some("app:latest"));
        assert_eq!(tagged("registry.example:5000/team/app").as_deref(), Some("registry.example:5000/team/app:latest"));
        assert_eq!(tagged("team/app:1.2-RC").as_deref(), Some("team/app:1.2-RC"));
        assert_eq!(tagged("App:1"), None);
        assert_eq!(tagged("app@sha256:abc"), None);
        assert_eq!(tagged("app:"), None);
    }
}
