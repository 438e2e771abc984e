//! Layers on their way here, each in a file of its own: gone on with by whoever pulls them next, also after a crash, and fetched once by several who pull them at one time.
//!
//! A part is its tenant's, and of one repository: whoever names a digest must have had its content from there.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use anyhow::Context as _;
use oci_spec::image::Sha256Digest;
use sha2::{Digest as _, Sha256};
use time::{Duration, OffsetDateTime};
use tokio::sync::OwnedMutexGuard;

use super::ImageSource;
use crate::sandbox::TenantId;

/// How long a part is kept that nobody goes on with, and how many bytes of such there are at the most.
const KEPT_FOR: Duration = Duration::hours(24);
const KEPT_BYTES_MAX: u64 = 16 << 30;

type Lock = tokio::sync::Mutex<()>;

/// The folder of parts.
#[derive(Debug)]
pub(super) struct Parts {
    folder: PathBuf,
    /// Who fills one holds its lock.
    filling: Mutex<HashMap<String, Weak<Lock>>>,
}

/// Whose parts, and where from.
#[derive(Debug, Clone)]
pub(super) struct Shelf(String);

/// A layer that is being filled from its beginning on, and hashed on the way. Nobody else fills it meanwhile.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    file: Arc<File>,
    bytes: u64,
    done: u64,
    sum: Sha256,
    _held: OwnedMutexGuard<()>,
}

impl Shelf {
    /// For all tenants: `None`.
    pub(super) fn of(tenant: Option<&TenantId>, source: &ImageSource) -> Self {
        let names = serde_json::json!([tenant.map(TenantId::as_str), source.registry(), source.repository()]);
        Self(hex::encode(&Sha256::digest(names.to_string())[..16]))
    }

    fn name_of(&self, digest: &Sha256Digest) -> String {
        format!("{}-{}", self.0, digest.digest())
    }
}

impl Parts {
    pub(super) fn open(folder: PathBuf) -> Self {
        Self { folder, filling: Mutex::default() }
    }

    /// What is here of a layer of this size, to be gone on with; waits for whoever fills it now.
    pub(super) async fn begin(&self, shelf: &Shelf, digest: &Sha256Digest, bytes: u64) -> anyhow::Result<Part> {
        let name = shelf.name_of(digest);
        let held = self.lock_of(&name).lock_owned().await;
        let path = self.folder.join(&name);
        tokio::task::spawn_blocking(move || Part::open(path, bytes, held)).await?
    }

    fn lock_of(&self, name: &str) -> Arc<Lock> {
        let mut filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        filling.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = filling.get(name).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        filling.insert(name.to_owned(), Arc::downgrade(&lock));
        lock
    }

    /// Deletes these parts. Whoever has one open goes on with it.
    pub(super) fn forget<'a>(&self, shelf: &Shelf, digests: impl IntoIterator<Item = &'a Sha256Digest>) {
        for digest in digests {
            delete(&self.folder.join(shelf.name_of(digest)));
        }
    }

    /// Deletes what nobody has gone on with for too long, and the oldest of too much.
    pub(super) fn sweep(&self, now: OffsetDateTime) -> io::Result<()> {
        let is_filled = |name: &str| {
            let filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
            filling.get(name).is_some_and(|lock| lock.strong_count() > 0)
        };
        let mut idle = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            // One that is gone by now needs no sweeping.
            let Ok(meta) = entry.metadata() else { continue };
            if !is_filled(&entry.file_name().to_string_lossy()) {
                idle.push((OffsetDateTime::from(meta.modified()?), meta.len(), entry.path()));
            }
        }
        idle.sort();
        let mut bytes: u64 = idle.iter().map(|(_, bytes, _)| bytes).sum();
        for (changed_at, part_bytes, path) in &idle {
            if *changed_at + KEPT_FOR < now || bytes > KEPT_BYTES_MAX {
                delete(path);
                bytes -= part_bytes;
            }
        }
        Ok(())
    }
}

fn delete(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "what is left of a pull could not be deleted");
    }
}

impl Part {
    fn open(path: PathBuf, bytes: u64, held: OwnedMutexGuard<()>) -> anyhow::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        let mut part = Self { path, file: Arc::new(file), bytes, done: 0, sum: Sha256::new(), _held: held };
        let len = part.file.metadata().context("a part's size")?.len();
        if len > bytes {
            part.begin_again()?;
            return Ok(part);
        }
        let mut buffer = vec![0; 1 << 18];
        let mut from = &*part.file;
        loop {
            match from.read(&mut buffer).context("reading a part")? {
                0 => return Ok(part),
                have => {
                    part.sum.update(&buffer[..have]);
                    part.done += have as u64;
                }
            }
        }
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) const fn done(&self) -> u64 {
        self.done
    }

    pub(super) const fn left(&self) -> u64 {
        self.bytes - self.done
    }

    /// Adds what came; the caller sees to it that there is room for it.
    pub(super) async fn write(&mut self, content: Vec<u8>) -> anyhow::Result<()> {
        anyhow::ensure!(content.len() as u64 <= self.left(), "more than the part has room for");
        let (file, at, mut sum, len) = (Arc::clone(&self.file), self.done, self.sum.clone(), content.len() as u64);
        let written = tokio::task::spawn_blocking(move || {
            sum.update(&content);
            file.write_all_at(&content, at).map(|()| sum)
        });
        self.sum = written.await?.map_err(|error: io::Error| anyhow::Error::new(error).context("writing a pulled image"))?;
        self.done += len;
        Ok(())
    }

    /// Forgets what came.
    pub(super) fn begin_again(&mut self) -> anyhow::Result<()> {
        self.file.set_len(0).context("emptying a part")?;
        self.done = 0;
        self.sum = Sha256::new();
        Ok(())
    }

    /// Of what came.
    pub(super) fn digest(&self) -> Sha256Digest {
        hex::encode(self.sum.clone().finalize()).parse().expect("32 bytes are 64 hex digits")
    }

    /// What came, for whoever reads it; it may lose its name meanwhile.
    pub(super) fn content(&self) -> anyhow::Result<File> {
        self.file.try_clone().context("a part")
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Nothing to go on with.
        if self.done == 0 {
            delete(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::blob::digest_of;

    fn shelf(tenant: Option<&str>, reference: &str) -> Shelf {
        let tenant = tenant.map(|tenant| TenantId::proven(tenant.to_owned()));
        Shelf::of(tenant.as_ref(), &ImageSource::parse(reference).unwrap())
    }

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[tokio::test]
    async fn what_was_broken_off_is_gone_on_with_by_its_tenant_from_there_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (own, digest) = (shelf(Some("acme"), "registry.example/app:1"), digest_of(b"first second"));
        let parts = Parts::open(folder.path().to_owned());
        let mut part = parts.begin(&own, &digest, 12).await.unwrap();
        part.write(b"first".to_vec()).await.unwrap();
        drop(part);

        // Of another process, for all that it knows.
        let parts = Parts::open(folder.path().to_owned());
        for other in
            [shelf(Some("other"), "registry.example/app"), shelf(None, "registry.example/app"), shelf(Some("acme"), "registry.example/b")]
        {
            assert_eq!(parts.begin(&other, &digest, 12).await.unwrap().done(), 0);
        }
        let mut part = parts.begin(&shelf(Some("acme"), "registry.example/app:2"), &digest, 12).await.unwrap();
        assert_eq!((part.done(), part.left()), (5, 7));
        part.write(b" second".to_vec()).await.unwrap();

        assert_eq!(part.digest(), digest);
        let mut content = Vec::new();
        let file = part.content().unwrap();
        drop(part);
        parts.forget(&own, [&digest]);
        let mut at = [0; 12];
        file.read_exact_at(&mut at, 0).unwrap();
        content.extend_from_slice(&at);
        assert_eq!((content.as_slice(), names(folder.path())), (&b"first second"[..], 0));
    }

    #[tokio::test]
    async fn what_cannot_be_the_beginning_is_begun_again_and_nothing_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let parts = Parts::open(folder.path().to_owned());
        let (shelf, digest) = (shelf(None, "registry.example/app"), digest_of(b"four"));
        let mut part = parts.begin(&shelf, &digest, 100).await.unwrap();
        part.write(vec![7; 100]).await.unwrap();
        assert!(part.write(vec![7]).await.is_err());
        drop(part);

        let part = parts.begin(&shelf, &digest, 4).await.unwrap();

        assert_eq!((part.done(), part.left()), (0, 4));
        drop(part);
        assert_eq!(names(folder.path()), 0);
    }

    #[tokio::test]
    async fn one_at_a_time_fills_a_part() {
        let folder = tempfile::tempdir().unwrap();
        let parts = Arc::new(Parts::open(folder.path().to_owned()));
        let (shelf, digest) = (shelf(None, "registry.example/app"), digest_of(b"four"));
        let mut part = parts.begin(&shelf, &digest, 4).await.unwrap();
        let second = tokio::spawn({
            let (parts, shelf, digest) = (Arc::clone(&parts), shelf.clone(), digest.clone());
            async move { parts.begin(&shelf, &digest, 4).await.unwrap().left() }
        });
        tokio::task::yield_now().await;
        part.write(b"four".to_vec()).await.unwrap();
        drop(part);

        assert_eq!(second.await.unwrap(), 0, "it waited, and has nothing left to fetch");
    }

    #[tokio::test]
    async fn what_nobody_goes_on_with_is_swept_and_what_is_filled_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let parts = Parts::open(folder.path().to_owned());
        let shelf = shelf(None, "registry.example/app");
        let mut left = parts.begin(&shelf, &digest_of(b"left"), 4).await.unwrap();
        left.write(b"le".to_vec()).await.unwrap();
        drop(left);
        let mut filled = parts.begin(&shelf, &digest_of(b"filled"), 6).await.unwrap();
        filled.write(b"fi".to_vec()).await.unwrap();
        let now = OffsetDateTime::from(fs::metadata(&filled.path).unwrap().modified().unwrap());

        parts.sweep(now + KEPT_FOR / 2).unwrap();
        assert_eq!(names(folder.path()), 2);
        parts.sweep(now + KEPT_FOR * 2).unwrap();

        assert_eq!(names(folder.path()), 1);
        assert!(filled.path.exists());
    }
}
