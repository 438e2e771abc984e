//! An archive that is written while its parts arrive in any order: an OCI image layout in a tar, as an import reads it.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path, sync::Arc};

use anyhow::Context as _;
use oci_spec::image::Sha256Digest;
use sha2::{Digest as _, Sha256};

/// The unit of a tar archive (tar(5)).
pub(super) const BLOCK_BYTES: u64 = 512;

/// An archive in a file without a name, gone when this is dropped, however that happens.
#[derive(Debug)]
pub(super) struct Spool {
    file: Arc<File>,
    end: u64,
}

/// The room of one file in it, filled from its beginning on and hashed on the way.
#[derive(Debug)]
pub(super) struct Part {
    file: Arc<File>,
    offset: u64,
    bytes: u64,
    done: u64,
    sum: Sha256,
}

impl Spool {
    pub(super) fn new(folder: &Path) -> anyhow::Result<Self> {
        let file = tempfile::tempfile_in(folder).with_context(|| folder.display().to_string())?;
        Ok(Self { file: Arc::new(file), end: 0 })
    }

    /// Adds a file that is there.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let part = self.reserve(name, content.len() as u64)?;
        self.file.write_all_at(content, part.offset).context("writing a pulled image")
    }

    /// Adds a file of this size that is to come.
    pub(super) fn reserve(&mut self, name: &str, bytes: u64) -> anyhow::Result<Part> {
        self.file.write_all_at(header(name, bytes)?.as_bytes(), self.end).context("writing a pulled image")?;
        let offset = self.end + BLOCK_BYTES;
        self.end = offset + bytes.next_multiple_of(BLOCK_BYTES);
        Ok(Part { file: Arc::clone(&self.file), offset, bytes, done: 0, sum: Sha256::new() })
    }

    /// The archive, with all that its parts hold by now.
    pub(super) fn finish(self) -> anyhow::Result<File> {
        let ended = self.file.set_len(self.end + 2 * BLOCK_BYTES).and_then(|()| self.file.try_clone());
        ended.context("writing a pulled image")
    }
}

/// What stands before a file in an archive.
pub(super) fn header(name: &str, bytes: u64) -> anyhow::Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).context("a name in an archive")?;
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(bytes);
    header.set_cksum();
    Ok(header)
}

impl Part {
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
        let (file, at, mut sum, len) = (Arc::clone(&self.file), self.offset + self.done, self.sum.clone(), content.len() as u64);
        let written = tokio::task::spawn_blocking(move || {
            sum.update(&content);
            file.write_all_at(&content, at).map(|()| sum)
        });
        self.sum = written.await?.map_err(|error: io::Error| anyhow::Error::new(error).context("writing a pulled image"))?;
        self.done += len;
        Ok(())
    }

    /// Forgets what came.
    pub(super) fn begin_again(&mut self) {
        self.done = 0;
        self.sum = Sha256::new();
    }

    /// Of what came.
    pub(super) fn digest(&self) -> Sha256Digest {
        hex::encode(self.sum.clone().finalize()).parse().expect("32 bytes are 64 hex digits")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::images::{archive::Archive, blob::digest_of};

    #[tokio::test]
    async fn an_import_reads_what_came_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path()).unwrap();
        spool.add("oci-layout", b"{}").unwrap();
        let (mut first, mut second) = (spool.reserve("blobs/a", 5).unwrap(), spool.reserve("blobs/b", 600).unwrap());
        second.write(vec![b'b'; 300]).await.unwrap();
        first.write(b"wrong".to_vec()).await.unwrap();
        first.begin_again();
        second.write(vec![b'b'; 300]).await.unwrap();
        first.write(b"right".to_vec()).await.unwrap();
        assert!(second.write(vec![b'b']).await.is_err());
        assert_eq!((first.digest(), first.left(), second.left()), (digest_of(b"right"), 0, 0));

        let archive = Archive::open(spool.finish().unwrap(), folder.path()).unwrap();

        let content = |name: &str| {
            let mut text = String::new();
            archive.reader(archive.section(name).unwrap()).read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!((content("oci-layout"), content("blobs/a")), ("{}".to_owned(), "right".to_owned()));
        assert_eq!(content("blobs/b"), "b".repeat(600));
    }
}
