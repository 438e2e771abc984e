//! What a sandbox has changed of its image: the writable layer by itself, held against what lies below it and what is seen of both.

use std::{
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, openat, statat},
    io::Errno,
};

use super::{Place, fault, files::names, io_fault, too_large};
use crate::tree::{Change, ChangeKind, DEPTH_MAX, Fault, Reply, write_frame};

/// The most of one answer, in bytes of paths: far below what a frame holds.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// Changes on their way out.
struct Teller<W> {
    to: W,
    changes: Vec<Change>,
    bytes: usize,
}

/// A folder that is in the writable layer: there, below, and as the payload sees it.
struct Level<'a> {
    upper: BorrowedFd<'a>,
    /// Those layers that have it, too.
    lower: &'a [OwnedFd],
    /// `None`: something else is seen in its place by now.
    merged: Option<&'a OwnedFd>,
    path: &'a [u8],
    depth: usize,
}

impl Place {
    /// All of them, but for the last answer, which is returned.
    pub(super) fn changes(&self, to: impl Write) -> Result<Reply, Fault> {
        let mut teller = Teller { to, changes: Vec::new(), bytes: 0 };
        let lower: Vec<OwnedFd> = self.lower.iter().filter_map(|layer| open(layer.as_fd(), b".").transpose()).collect::<Result<_, _>>()?;
        let merged = open(self.root.as_fd(), b".")?;
        let upper = open(self.upper.as_fd(), b".")?.ok_or_else(|| fault(Errno::NOENT))?;
        teller.compare(&Level { upper: upper.as_fd(), lower: &lower, merged: merged.as_ref(), path: b"", depth: 0 })?;
        Ok(Reply::Changes { changes: teller.changes, is_more: false })
    }
}

impl<W: Write> Teller<W> {
    fn compare(&mut self, level: &Level<'_>) -> Result<(), Fault> {
        let Level { upper, lower, merged, path, depth } = *level;
        if depth > DEPTH_MAX {
            return Err(too_large(format!("folders are nested deeper than {DEPTH_MAX}")));
        }
        for name in names(&upper.try_clone_to_owned().map_err(|e| io_fault(&e))?).map_err(fault)? {
            let name = name.map_err(fault)?;
            let Some(kind) = kind_of(upper, &name)? else { continue };
            // A whiteout: what it hides is missed below.
            if kind == FileType::CharacterDevice {
                continue;
            }
            let is_below = lower.iter().map(|layer| kind_of(layer.as_fd(), &name)).find_map(Result::transpose).transpose()?.is_some();
            let below = [path, b"/", &name].concat();
            self.tell(below.clone(), if is_below { ChangeKind::Changed } else { ChangeKind::Added })?;
            if kind == FileType::Directory
                && let Some(upper) = open(upper, &name)?
            {
                let lower: Vec<OwnedFd> =
                    lower.iter().filter_map(|layer| open(layer.as_fd(), &name).transpose()).collect::<Result<_, _>>()?;
                let merged = merged.map(|merged| open(merged.as_fd(), &name)).transpose()?.flatten();
                self.compare(&Level { upper: upper.as_fd(), lower: &lower, merged: merged.as_ref(), path: &below, depth: depth + 1 })?;
            }
        }
        // What was there and is not seen any more, whether a whiteout hides it or the whole folder is a new one: the kernel's mark for
        // that is not for this process to read (overlayfs.rst, «whiteouts and opaque directories»).
        let Some(merged) = merged else { return Ok(()) };
        for (number, layer) in lower.iter().enumerate() {
            for name in names(layer).map_err(fault)? {
                let name = name.map_err(fault)?;
                let is_told = lower[..number].iter().any(|layer| kind_of(layer.as_fd(), &name).is_ok_and(|kind| kind.is_some()));
                if !is_told && kind_of(merged.as_fd(), &name)?.is_none() {
                    self.tell([path, b"/", &name].concat(), ChangeKind::Deleted)?;
                }
            }
        }
        Ok(())
    }

    fn tell(&mut self, path: Vec<u8>, kind: ChangeKind) -> Result<(), Fault> {
        self.bytes += path.len() + 8;
        self.changes.push(Change { path, kind });
        if self.bytes > ANSWER_BYTES_MAX {
            self.bytes = 0;
            let reply = Reply::Changes { changes: std::mem::take(&mut self.changes), is_more: true };
            write_frame(&mut self.to, &reply).map_err(|e| io_fault(&e))?;
        }
        Ok(())
    }
}

fn kind_of(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<FileType>, Fault> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(fault(errno)),
    }
}

/// A folder of this name, if there is one.
fn open(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<OwnedFd>, Fault> {
    match openat(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(folder) => Ok(Some(folder)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(errno) => Err(fault(errno)),
    }
}
