//! Folders and files of this machine as tar.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::Context;
use tar::{Builder, EntryType, Header};

/// An archive in the making.
pub(super) struct Packer<W: Write> {
    archive: Builder<W>,
    /// Whose everything is to be; `None`: whose it is here.
    owner: Option<Owner>,
    /// Files with several names, by device and inode, and the name that they were packed under.
    seen: HashMap<(u64, u64), PathBuf>,
    left_out: Vec<PathBuf>,
}

/// User and group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u64,
    pub(super) gid: u64,
}

impl<W: Write> Packer<W> {
    pub(super) fn new(to: W, owner: Option<Owner>) -> Self {
        Self { archive: Builder::new(to), owner, seen: HashMap::new(), left_out: Vec::new() }
    }

    /// Adds what is at `path` under this name; of a folder with all in it. An empty name is that of the root, which only a folder has.
    pub(super) fn add(&mut self, path: &Path, name: &Path) -> anyhow::Result<()> {
        if name.as_os_str().is_empty() { self.folder(path, name) } else { self.entry(path, name) }
    }

    /// What was written to, and what was left out: devices, sockets, pipes.
    pub(super) fn finish(self) -> io::Result<(W, Vec<PathBuf>)> {
        Ok((self.archive.into_inner()?, self.left_out))
    }

    /// Adds a folder with all in it, in the order of names, so that the same folder makes the same layer.
    fn folder(&mut self, path: &Path, name: &Path) -> anyhow::Result<()> {
        let shown = || path.display().to_string();
        let meta = fs::symlink_metadata(path).with_context(shown)?;
        let own_name = if name.as_os_str().is_empty() { Path::new("./") } else { name };
        self.archive.append_data(&mut self.header(&meta, EntryType::Directory), own_name, io::empty()).with_context(shown)?;
        let mut entries: Vec<_> = fs::read_dir(path).with_context(shown)?.collect::<io::Result<_>>().with_context(shown)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            self.entry(&entry.path(), &name.join(entry.file_name()))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, name: &Path) -> anyhow::Result<()> {
        let shown = || path.display().to_string();
        let meta = fs::symlink_metadata(path).with_context(shown)?;
        if meta.is_dir() {
            return self.folder(path, name);
        }
        if !meta.is_file() && !meta.is_symlink() {
            self.left_out.push(path.to_owned());
            return Ok(());
        }
        if meta.nlink() > 1 {
            if let Some(first) = self.seen.get(&(meta.dev(), meta.ino())) {
                return self.archive.append_link(&mut self.header(&meta, EntryType::Link), name, first).with_context(shown);
            }
            self.seen.insert((meta.dev(), meta.ino()), name.to_owned());
        }
        if meta.is_symlink() {
            let target = fs::read_link(path).with_context(shown)?;
            let mut header = self.header(&meta, EntryType::Symlink);
            // Byte for byte, where the library would tidy it up.
            if target.as_os_str().len() <= 100 {
                header.set_link_name_literal(target.as_os_str().as_bytes()).with_context(shown)?;
                return self.archive.append_data(&mut header, name, io::empty()).with_context(shown);
            }
            return self.archive.append_link(&mut header, name, &target).with_context(shown);
        }
        let mut file = File::open(path).with_context(shown)?;
        let len = meta.len();
        let mut header = self.header(&meta, EntryType::Regular);
        header.set_size(len);
        self.archive.append_data(&mut header, name, &mut Exactly::new(&mut file, len)).with_context(shown)
    }

    fn header(&self, meta: &Metadata, kind: EntryType) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        let Owner { uid, gid } = self.owner.unwrap_or(Owner { uid: meta.uid().into(), gid: meta.gid().into() });
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mode(meta.mode() & 0o7777);
        // The format knows no time before 1970.
        header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
        header
    }
}

/// Reads as many bytes as a header has promised: a file that shrinks meanwhile is an error, and one that grows is cut.
pub(super) struct Exactly<'a> {
    from: io::Take<&'a mut File>,
}

impl<'a> Exactly<'a> {
    pub(super) fn new(file: &'a mut File, len: u64) -> Self {
        Self { from: file.take(len) }
    }
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let have = self.from.read(buffer)?;
        if have == 0 && self.from.limit() > 0 && !buffer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read"));
        }
        Ok(have)
    }
}
