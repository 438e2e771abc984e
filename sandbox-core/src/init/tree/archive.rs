//! Files and folders as tar, out and in.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat},
    io::Errno,
};

use super::{
    Place, fault,
    files::{is_proc, names},
    io_fault, too_large,
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
}

/// Tar on its way out, and how much of it may still come.
struct Packer<'a, W: Write> {
    place: &'a Place,
    builder: tar::Builder<Bounded<W>>,
}

impl Place {
    pub(super) fn begin_pack(&self, path: &TreePath) -> Result<Packing<'_>, Fault> {
        let found = self.open(path, OFlags::PATH)?;
        Ok(Packing { place: self, found, name: path.names().last().cloned().unwrap_or_default() })
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
        let Self { place, found, name } = self;
        let mut packer = Packer { place, builder: tar::Builder::new(Bounded { to, left: bytes_max, is_over: false }) };
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
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.add_folder(found, stat, path, depth),
            FileType::RegularFile => {
                let Ok(file) = self.place.open_regular(found) else { return Ok(()) };
                let stat = fstat(&file).map_err(fault)?;
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                let mut header = header(&stat, tar::EntryType::Regular, size);
                // What is cut meanwhile is filled up, what grows is cut: the length was said before.
                let content = file.chain(io::repeat(0)).take(size);
                self.builder.append_data(&mut header, as_path(path), content).map_err(|e| io_fault(&e))
            }
            FileType::Symlink => {
                let target = readlinkat(found, "", Vec::new()).map_err(fault)?;
                let mut header = header(stat, tar::EntryType::Symlink, 0);
                self.builder.append_link(&mut header, as_path(path), as_path(target.to_bytes())).map_err(|e| io_fault(&e))
            }
            FileType::Fifo => {
                let mut header = header(stat, tar::EntryType::Fifo, 0);
                self.builder.append_data(&mut header, as_path(path), io::empty()).map_err(|e| io_fault(&e))
            }
            FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => Ok(()),
        }
    }

    fn add_folder(&mut self, found: &OwnedFd, stat: &Stat, path: &[u8], depth: usize) -> Result<(), Fault> {
        if depth > DEPTH_MAX {
            return Err(too_large(format!("folders are nested deeper than {DEPTH_MAX}")));
        }
        // The root has no name to be packed below.
        if !path.is_empty() {
            let mut header = header(stat, tar::EntryType::Directory, 0);
            self.builder.append_data(&mut header, as_path(path), io::empty()).map_err(|e| io_fault(&e))?;
        }
        if is_proc(found)? {
            return Ok(());
        }
        let folder = openat(found, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(fault)?;
        for name in names(&folder).map_err(fault)? {
            let name = name.map_err(fault)?;
            let Some((found, stat)) = find(folder.as_fd(), &name)? else { continue };
            let below = if path.is_empty() { name } else { [path, &name].join(&b'/') };
            self.add(&found, &stat, &below, depth + 1)?;
        }
        Ok(())
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

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
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
