//! What a layer of an image tells beyond any archive: the tree without what is mounted in it, further names of one file, extended attributes.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::BorrowedFd,
};

use rustix::{
    fs::{AtFlags, Stat, StatxFlags, fgetxattr, flistxattr, statx},
    io::Errno,
};

use super::{fault, too_large};
use crate::tree::{Fault, FaultKind, PATH_BYTES_MAX};

/// The most that is remembered of names of files that have several, in bytes. Who works here lives in the sandbox's memory.
const LINK_NAMES_BYTES_MAX: usize = 8 << 20;
/// The most of extended attributes of one file, in bytes.
const EXTENDED_BYTES_MAX: usize = 1 << 20;
/// The longest list of their names, and the longest value, that the kernel gives (xattr(7), «Limits»).
const ATTRIBUTE_BYTES_MAX: usize = 64 * 1024;
/// How a name begins that means a deletion (image-spec, `layer.md`, «Whiteouts»).
const WHITEOUT: &[u8] = b".wh.";

/// A layer on its way out.
#[derive(Debug)]
pub(super) struct Layer {
    /// All folders of an overlay are of its own device, and what is mounted in it is of others (overlayfs.rst, «Inode properties»).
    device: u64,
    entries_max: u64,
    entries: u64,
    /// The name under which a file was packed that has more than one.
    first_names: HashMap<Identity, Vec<u8>>,
    name_bytes: usize,
}

/// Which file it is, as long as the tree is read.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    inode: u64,
    /// When it was made, where its file system knows: the number of one that goes meanwhile is given to the next.
    made: Option<(i64, u32)>,
}

impl Identity {
    fn of(found: BorrowedFd<'_>, stat: &Stat) -> Result<Self, Fault> {
        let more = statx(found, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).map_err(fault)?;
        let has_time = more.stx_mask & StatxFlags::BTIME.bits() != 0;
        let made = has_time.then_some((more.stx_btime.tv_sec, more.stx_btime.tv_nsec));
        Ok(Self { device: stat.st_dev, inode: stat.st_ino, made })
    }
}

impl Layer {
    /// Of the tree with this root, which is an entry, too.
    pub(super) fn new(root: &Stat, entries_max: u64) -> Self {
        Self { device: root.st_dev, entries_max, entries: 1, first_names: HashMap::new(), name_bytes: 0 }
    }

    /// Whether something of this name, at this path, can be told.
    pub(super) fn admit(&mut self, name: &[u8], path: &[u8]) -> Result<(), Fault> {
        if name.starts_with(WHITEOUT) {
            return Err(named(path, FaultKind::WrongKind, "names that begin with .wh. mean deletions in an image"));
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(named(path, FaultKind::TooLarge, "its path is too long for an image"));
        }
        self.entries += 1;
        if self.entries > self.entries_max {
            return Err(too_large(format!("there are more than {} files and folders", self.entries_max)));
        }
        Ok(())
    }

    /// The name under which this very file was packed before. If there is none, this is remembered as the one.
    pub(super) fn first_name(&mut self, found: BorrowedFd<'_>, stat: &Stat, path: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
        if stat.st_nlink < 2 {
            return Ok(None);
        }
        match self.first_names.entry(Identity::of(found, stat)?) {
            Entry::Occupied(first) => Ok(Some(first.get().clone())),
            Entry::Vacant(vacant) => {
                self.name_bytes += path.len();
                if self.name_bytes > LINK_NAMES_BYTES_MAX {
                    return Err(too_large("there are too many files that have several names".to_owned()));
                }
                vacant.insert(path.to_vec());
                Ok(None)
            }
        }
    }

    /// Whether a folder is where something else is mounted.
    pub(super) const fn is_mounted(&self, folder: &Stat) -> bool {
        folder.st_dev != self.device
    }
}

/// The name of the root, with which a layer begins: names that are somebody else's choice could make it look packed to who reads it.
pub(super) const ROOT: &[u8] = b"./";

/// A folder that is nobody's to shape: in the place of what is mounted there, as one is made for a volume, for what it says of itself is not what lies below it; and the root,
/// which every sandbox makes its own.
pub(super) fn plain_folder(mut header: tar::Header) -> tar::Header {
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Those that an import takes, but for what the records of tar cannot hold or nobody could read from them (pax(1)).
pub(super) fn extended_attributes(file: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<(String, Vec<u8>)>, Fault> {
    let mut list = vec![0; ATTRIBUTE_BYTES_MAX];
    let length = match flistxattr(file, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(fault(errno)),
    };
    let (mut found, mut bytes) = (Vec::new(), 0);
    for name in list[..length].split(|byte| *byte == 0) {
        let Some(name) = std::str::from_utf8(name).ok().filter(|name| is_told(name)) else { continue };
        let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
        match fgetxattr(file, name, &mut value[..]) {
            Ok(length) => value.truncate(length),
            // Taken away meanwhile.
            Err(Errno::NODATA) => continue,
            Err(errno) => return Err(fault(errno)),
        }
        if value.contains(&b'\n') {
            continue;
        }
        bytes += name.len() + value.len();
        if bytes > EXTENDED_BYTES_MAX {
            return Err(named(path, FaultKind::TooLarge, "its extended attributes are too large for an image"));
        }
        value.shrink_to_fit();
        found.push((format!("SCHILY.xattr.{name}"), value));
    }
    Ok(found)
}

fn is_told(name: &str) -> bool {
    name.starts_with("user.") && !name.starts_with("user.overlay.") && !name.contains(['=', '\n'])
}

/// A fault that says of what it is.
pub(super) fn named(path: &[u8], kind: FaultKind, message: &str) -> Fault {
    Fault { kind, message: format!("/{}: {message}", String::from_utf8_lossy(path)) }
}

#[cfg(test)]
mod tests;
