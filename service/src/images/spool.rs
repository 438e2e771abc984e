//! An archive that is put together here: an OCI image layout in a tar, as an import reads it, or the pieces of one.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use anyhow::Context as _;

/// The unit of a tar archive (tar(5)).
pub(super) const BLOCK_BYTES: u64 = 512;

/// An archive in a file without a name, gone when this is dropped, however that happens.
#[derive(Debug)]
pub(super) struct Spool {
    file: File,
    end: u64,
}

impl Spool {
    pub(super) fn new(folder: &Path) -> anyhow::Result<Self> {
        let file = tempfile::tempfile_in(folder).with_context(|| folder.display().to_string())?;
        Ok(Self { file, end: 0 })
    }

    /// Adds a file.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let bytes = content.len() as u64;
        let written = self.file.write_all_at(header(name, bytes)?.as_bytes(), self.end);
        written.and_then(|()| self.file.write_all_at(content, self.end + BLOCK_BYTES)).context("writing a pulled image")?;
        self.end += BLOCK_BYTES + bytes.next_multiple_of(BLOCK_BYTES);
        Ok(())
    }

    /// The archive.
    pub(super) fn finish(self) -> anyhow::Result<File> {
        self.file.set_len(self.end + 2 * BLOCK_BYTES).context("writing a pulled image")?;
        Ok(self.file)
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::images::archive::Archive;

    #[test]
    fn an_import_reads_what_was_put_together_and_what_was_laid_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path()).unwrap();
        spool.add("oci-layout", b"{}").unwrap();
        spool.add("blobs/a", &[b'a'; 600]).unwrap();
        let mut beside = tempfile::tempfile().unwrap();
        beside.write_all(b"beside it, and more").unwrap();

        let mut archive = Archive::open(spool.finish().unwrap(), folder.path()).unwrap();
        archive.lay_beside("blobs/b".to_owned(), beside, 9);

        let content = |name: &str| {
            let mut text = String::new();
            archive.reader(archive.section(name).unwrap()).read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!((content("oci-layout"), content("blobs/a")), ("{}".to_owned(), "a".repeat(600)));
        assert_eq!(content("blobs/b"), "beside it");
    }
}
