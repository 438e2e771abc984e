//! Files and folders as tar, out and in.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat},
    io::Errno,
};

use super::{
    Place, fault,
    files::{is_proc, names},
    io_fault,
    layer::{self, Layer, named},
    too_large,
};
use crate::{
    tree::{DEPTH_MAX, Fault, FaultKind, Reply, TreePath},
    unpack::{self, Bounds, Target, UnpackError},
};

/// Something that is there to be packed.
#[derive(Debug)]
pub(super) struct Packing<'a> {
    place: &'a Place,
    found: OwnedFd,
    name: Vec<u8>,
    layer: Option<Layer>,
}

/// Tar on its way out, and how much of it may still come.
struct Packer<'a, W: Write> {
    place: &'a Place,
    builder: tar::Builder<Bounded<W>>,
    /// Of a layer, what no other archive needs.
    layer: Option<Layer>,
}

impl Place {
    pub(super) fn begin_pack(&self, path: &TreePath) -> Result<Packing<'_>, Fault> {
        let found = self.open(path, OFlags::PATH)?;
        Ok(Packing { place: self, found, name: path.names().last().cloned().unwrap_or_default(), layer: None })
    }

    /// The whole tree, for [`Ask::Layer`](crate::tree::Ask::Layer).
    pub(super) fn begin_layer(&self, entries_max: u64) -> Result<Packing<'_>, Fault> {
        let found = self.open(&TreePath::default(), OFlags::PATH)?;
        let layer = Layer::new(&fstat(&found).map_err(fault)?, entries_max);
        Ok(Packing { place: self, found, name: Vec::new(), layer: Some(layer) })
    }

    /// What an archive holds, put into a folder. No entry leads out of it ([`crate::unpack`]).
    pub(super) fn unpack(&self, path: &TreePath, archive: &mut impl Read, bytes_max: u64, entries_max: u64) -> Result<Reply, Fault> {
        let folder = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK)?;
        let mut target = Target::new(folder);
        let bounds = Bounds { bytes: bytes_max, entries: entries_max };
        let unpacked = unpack::unpack_archive(&mut *archive, &mut target, bounds).map_err(|error| unpack_fault(&error))?;
        // What pads an archive is no part of it, and is read all the same: an answer comes when all was sent.
        io::copy(archive, &mut io::sink()).map_err(|e| io_fault(&e))?;
        Ok(Reply::Unpacked { entries: unpacked.entries, bytes: unpacked.bytes })
    }
}

impl Packing<'_> {
    /// Writes all of it.
    pub(super) fn write_to(self, to: &mut impl Write, bytes_max: u64) -> Result<(), Fault> {
        let Self { place, found, name, layer } = self;
        let mut packer = Packer { place, builder: tar::Builder::new(Bounded { to, left: bytes_max, is_over: false }), layer };
        let stat = fstat(&found).map_err(fault)?;
        let packed = packer.add(&found, &stat, &name, 0).and_then(|()| packer.builder.finish().map_err(|e| io_fault(&e)));
        if packer.builder.get_ref().is_over {
            return Err(too_large(format!("the archive is larger than {bytes_max} bytes")));
        }
        packed
    }
}

impl<W: Write> Packer<'_, W> {
    /// One that was found, and what is in it.
    fn add(&mut self, found: &OwnedFd, stat: &Stat, path: &[u8], depth: usize) -> Result<(), Fault> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            return self.add_folder(found, stat, path, depth);
        }
        let is_packed = matches!(kind, FileType::RegularFile | FileType::Symlink | FileType::Fifo);
        if is_packed
            && let Some(layer) = &mut self.layer
            && let Some(first) = layer.first_name(found.as_fd(), stat, path)?
        {
            return self.append_link(header(stat, tar::EntryType::Link, 0), path, &first).map_err(|e| io_fault(&e));
        }
        match kind {
            FileType::RegularFile => self.add_file(found, path),
            FileType::Symlink => {
                let target = readlinkat(found, "", Vec::new()).map_err(fault)?;
                self.append_link(header(stat, tar::EntryType::Symlink, 0), path, target.to_bytes()).map_err(|e| io_fault(&e))
            }
            FileType::Fifo => self.append(header(stat, tar::EntryType::Fifo, 0), path, io::empty()).map_err(|e| io_fault(&e)),
            FileType::Directory | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => Ok(()),
        }
    }

    fn add_file(&mut self, found: &OwnedFd, path: &[u8]) -> Result<(), Fault> {
        let file = match self.place.open_regular(found) {
            Ok(file) => file,
            // Who asks for a layer asks for all of it that is there.
            Err(Fault { kind, message }) if self.layer.is_some() && kind != FaultKind::NotFound => return Err(named(path, kind, &message)),
            Err(_) => return Ok(()),
        };
        let stat = fstat(&file).map_err(fault)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let bounded = self.builder.get_mut();
        if size > bounded.left {
            // It may be nothing but a hole: nobody need read that to know.
            bounded.is_over = true;
            return Err(too_large(String::new()));
        }
        self.append_extended(file.as_fd(), path)?;
        // What is cut meanwhile is filled up, what grows is cut: the length was said before.
        let content = file.chain(io::repeat(0)).take(size);
        self.append(header(&stat, tar::EntryType::Regular, size), path, content).map_err(|e| io_fault(&e))
    }

    fn add_folder(&mut self, found: &OwnedFd, stat: &Stat, path: &[u8], depth: usize) -> Result<(), Fault> {
        if depth > DEPTH_MAX {
            return Err(too_large(format!("folders are nested deeper than {DEPTH_MAX}")));
        }
        if let Some(layer) = &self.layer
            && layer.is_mounted(stat)
        {
            return self
                .append(layer::plain_folder(header(stat, tar::EntryType::Directory, 0)), path, io::empty())
                .map_err(|e| io_fault(&e));
        }
        let folder = if is_proc(found)? {
            None
        } else {
            Some(openat(found, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(fault)?)
        };
        // The root has no name to be packed below.
        if path.is_empty() {
            if self.layer.is_some() {
                let root = layer::plain_folder(header(stat, tar::EntryType::Directory, 0));
                self.append(root, layer::ROOT, io::empty()).map_err(|e| io_fault(&e))?;
            }
        } else {
            if let Some(folder) = &folder {
                self.append_extended(folder.as_fd(), path)?;
            }
            self.append(header(stat, tar::EntryType::Directory, 0), path, io::empty()).map_err(|e| io_fault(&e))?;
        }
        let Some(folder) = folder else { return Ok(()) };
        for name in names(&folder).map_err(fault)? {
            let name = name.map_err(fault)?;
            let below = if path.is_empty() { name.clone() } else { [path, &name].join(&b'/') };
            let Some((found, stat)) = find(folder.as_fd(), &name)? else { continue };
            if let Some(layer) = &mut self.layer {
                layer.admit(&name, &below)?;
            }
            self.add(&found, &stat, &below, depth + 1)?;
        }
        Ok(())
    }

    /// Of a layer: the extended attributes of the entry that comes next.
    fn append_extended(&mut self, opened: BorrowedFd<'_>, path: &[u8]) -> Result<(), Fault> {
        if self.layer.is_none() {
            return Ok(());
        }
        let attributes = layer::extended_attributes(opened, path)?;
        let records = attributes.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        self.builder.append_pax_extensions(records).map_err(|e| io_fault(&e))
    }

    /// Writes an entry with its name byte for byte, as the kernel has it.
    fn append(&mut self, mut header: tar::Header, path: &[u8], content: impl Read) -> io::Result<()> {
        let first = self.append_long(tar::EntryType::GNULongName, path)?;
        header.as_old_mut().name[..first.len()].copy_from_slice(first);
        header.set_cksum();
        self.builder.append(&header, content)
    }

    /// Writes one that leads elsewhere. The text of a link may mean something that is no path, so none of it is tidied up.
    fn append_link(&mut self, mut header: tar::Header, path: &[u8], to: &[u8]) -> io::Result<()> {
        let first = self.append_long(tar::EntryType::GNULongLink, to)?;
        header.as_old_mut().linkname[..first.len()].copy_from_slice(first);
        self.append(header, path, io::empty())
    }

    /// Says in front of an entry what its header has no place for (tar(5), «GNU tar archives»). Answers how much of it goes there.
    fn append_long<'t>(&mut self, kind: tar::EntryType, text: &'t [u8]) -> io::Result<&'t [u8]> {
        const NAME: &[u8] = b"././@LongLink";
        const FIELD_BYTES: usize = 100;
        if text.len() <= FIELD_BYTES {
            return Ok(text);
        }
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..NAME.len()].copy_from_slice(NAME);
        header.set_entry_type(kind);
        header.set_size(text.len() as u64 + 1);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        self.builder.append(&header, text.chain(&[0][..]))?;
        Ok(&text[..FIELD_BYTES])
    }
}

/// What has this name, if it still has it.
fn find(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<(OwnedFd, Stat)>, Fault> {
    let found = match openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(found) => found,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(fault(errno)),
    };
    let stat = statat(&found, "", AtFlags::EMPTY_PATH).map_err(fault)?;
    Ok(Some((found, stat)))
}

fn header(stat: &Stat, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(u64::from(stat.st_uid));
    header.set_gid(u64::from(stat.st_gid));
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header
}

/// Something that takes so much and no more.
struct Bounded<W> {
    to: W,
    left: u64,
    is_over: bool,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            self.is_over = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let written = self.to.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn unpack_fault(error: &UnpackError) -> Fault {
    match error {
        UnpackError::TooManyBytes(_) | UnpackError::TooManyEntries(_) => too_large(error.to_string().replace("the image", "the archive")),
        UnpackError::Layer { source, .. } => as_fault(source, String::new()),
        UnpackError::Entry { path, source, .. } => as_fault(source, format!("{path:?}: ")),
    }
}

/// With the entry's name before it. What is no system call's is the archive's own, or its end.
fn as_fault(source: &io::Error, before: String) -> Fault {
    let Fault { kind, message } = io_fault(source);
    let kind = if source.raw_os_error().is_none() { FaultKind::Refused } else { kind };
    Fault { kind, message: before + &message }
}
