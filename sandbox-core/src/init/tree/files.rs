//! Single files and folders: looked at, read, written, made, removed, renamed.

use std::{
    collections::BinaryHeap,
    ffi::CStr,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Uid, fchmod, fchown, fstat, fstatfs, mkdirat, openat,
        openat2, readlinkat, renameat_with, statat, unlinkat,
    },
    io::Errno,
};

use super::{Place, draft::Draft, fault, io_fault, refused, reopen, too_large, wrong_kind};
use crate::tree::{
    DEPTH_MAX, Entry, EntryKind, Existing, Fault, FaultKind, Link, Owner, PAGE_ENTRIES_MAX, PIECE_BYTES_MAX, Reply, Span, TreePath,
};

/// What a new file and a new folder may be used for, unless somebody says.
const FILE_MODE: u32 = 0o644;
const FOLDER_MODE: u32 = 0o755;
/// How often a folder is gone through that fills while it is emptied.
const EMPTYINGS_MAX: usize = 16;
/// The most of a page of names and of where links lead, in bytes: far below what a frame holds.
const PAGE_BYTES_MAX: usize = 512 * 1024;

/// Links are followed as the payload would follow them, from the same root; what the kernel makes up in `/proc` is not.
const SAFE: ResolveFlags = ResolveFlags::NO_MAGICLINKS;

/// A part of a file, to be sent.
#[derive(Debug)]
pub(super) struct Content {
    file: File,
    offset: u64,
    length: u64,
}

impl Content {
    /// Exactly so many bytes, or a fault.
    pub(super) fn copy_to(&self, to: &mut impl Write) -> Result<(), Fault> {
        let mut buffer = vec![0; PIECE_BYTES_MAX];
        let (mut at, end) = (self.offset, self.offset + self.length);
        while at < end {
            let wanted = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let read = self.file.read_at(&mut buffer[..wanted], at).map_err(|e| io_fault(&e))?;
            if read == 0 {
                return Err(Fault { kind: FaultKind::Failed, message: "the file was cut while it was read".to_owned() });
            }
            to.write_all(&buffer[..read]).map_err(|e| io_fault(&e))?;
            at += read as u64;
        }
        Ok(())
    }
}

impl Place {
    /// Opens what is at `path`; a link at its end is followed.
    pub(super) fn open(&self, path: &TreePath, flags: OFlags) -> Result<OwnedFd, Fault> {
        let path = if path.names().is_empty() { b".".to_vec() } else { path.names().join(&b'/') };
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), SAFE).map_err(fault)
    }

    /// The folder that `path` is in, and its name there.
    fn parent<'p>(&self, path: &'p TreePath) -> Result<(OwnedFd, &'p [u8]), Fault> {
        let (name, folders) = path.names().split_last().ok_or_else(|| refused("the root itself cannot be made, removed or renamed"))?;
        let folder = if folders.is_empty() { b".".to_vec() } else { folders.join(&b'/') };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok((openat2(&self.root, folder, flags, Mode::empty(), SAFE).map_err(fault)?, name))
    }

    pub(super) fn stat(&self, path: &TreePath, link: Link) -> Result<Entry, Fault> {
        let name = path.names().last().map_or(&[][..], Vec::as_slice);
        match link {
            Link::Itself if !name.is_empty() => {
                let (parent, name) = self.parent(path)?;
                entry_in(parent.as_fd(), name).map_err(fault)
            }
            Link::Itself | Link::Followed => {
                let found = self.open(path, OFlags::PATH)?;
                Ok(entry(name, &fstat(&found).map_err(fault)?, None))
            }
        }
    }

    pub(super) fn list(&self, path: &TreePath, after: Option<&[u8]>, max: u32) -> Result<Reply, Fault> {
        let max = usize::try_from(max.clamp(1, PAGE_ENTRIES_MAX)).unwrap_or(1);
        let folder = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK)?;
        // The first names behind `after`, however many there are: what is kept has a bound, and the folder may have none.
        let mut first: BinaryHeap<Vec<u8>> = BinaryHeap::with_capacity(max + 2);
        for name in names(&folder).map_err(fault)? {
            let name = name.map_err(fault)?;
            if after.is_none_or(|after| name.as_slice() > after) {
                first.push(name);
                if first.len() > max + 1 {
                    first.pop();
                }
            }
        }
        let mut first = first.into_sorted_vec();
        let mut is_more = first.len() > max;
        first.truncate(max);
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for name in first {
            // It may be gone by now.
            let Ok(entry) = entry_in(folder.as_fd(), &name) else { continue };
            bytes += name.len() + entry.target.as_ref().map_or(0, Vec::len) + 64;
            if bytes > PAGE_BYTES_MAX && !entries.is_empty() {
                is_more = true;
                break;
            }
            entries.push(entry);
        }
        Ok(Reply::Page { entries, is_more })
    }

    /// The content of a regular file, and of nothing else: opening a fifo, a device or a part of `/proc` can wait, or do something.
    pub(super) fn open_content(&self, path: &TreePath, span: Span) -> Result<(Reply, Content), Fault> {
        let found = self.open(path, OFlags::PATH)?;
        let file = self.open_regular(&found)?;
        let stat = fstat(&file).map_err(fault)?;
        let entry = entry(path.names().last().map_or(&[][..], Vec::as_slice), &stat, None);
        let (offset, length) = span.within(entry.size);
        Ok((Reply::Content { entry, offset, length }, Content { file, offset, length }))
    }

    /// For reading, what was found by `O_PATH`.
    pub(super) fn open_regular(&self, found: &OwnedFd) -> Result<File, Fault> {
        let stat = fstat(found).map_err(fault)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile if is_proc(found)? => Err(wrong_kind("what lies in /proc has no content to give")),
            FileType::RegularFile => reopen(&self.proc, found, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).map_err(fault),
            FileType::Directory => Err(wrong_kind("it is a folder")),
            FileType::Symlink
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => Err(wrong_kind("it is no regular file")),
        }
    }

    pub(super) fn write(
        &self,
        path: &TreePath,
        mode: Option<u32>,
        owner: Option<Owner>,
        existing: Existing,
        content: &mut impl Read,
    ) -> Result<Entry, Fault> {
        let (parent, name) = self.parent(path)?;
        let before = match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(fault(errno)),
        };
        let kind = before.as_ref().map(|stat| FileType::from_raw_mode(stat.st_mode));
        match (kind, existing) {
            (Some(FileType::Directory), _) => return Err(wrong_kind("it is a folder")),
            (Some(_), Existing::Keep) => return Err(fault(Errno::EXIST)),
            (Some(_) | None, _) => {}
        }
        let mut draft = Draft::in_folder(&parent)?;
        copy(content, draft.file())?;
        // What it was, it stays, unless somebody says otherwise.
        let before = before.filter(|_| kind == Some(FileType::RegularFile));
        let owner = owner.or_else(|| before.as_ref().map(|stat| Owner { uid: stat.st_uid, gid: stat.st_gid }));
        let mode = mode.or_else(|| before.as_ref().map(|stat| stat.st_mode & 0o7777)).unwrap_or(FILE_MODE);
        dress(draft.as_fd(), mode, owner)?;
        draft.name(&self.proc, name, existing)?;
        entry_in(parent.as_fd(), name).map_err(fault)
    }

    pub(super) fn make_folder(&self, path: &TreePath, has_parents: bool, mode: Option<u32>, owner: Option<Owner>) -> Result<Entry, Fault> {
        let mut last = None;
        let first = if has_parents { 1 } else { path.names().len() };
        for depth in first..=path.names().len() {
            let path = TreePath::parse(&path.names()[..depth].join(&b'/')).map_err(|e| refused(&e.to_string()))?;
            let (parent, name) = self.parent(&path)?;
            match mkdirat(&parent, name, Mode::from_raw_mode(FOLDER_MODE)) {
                Ok(()) => {
                    let made =
                        openat(&parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
                    dress(made.map_err(fault)?.as_fd(), mode.unwrap_or(FOLDER_MODE), owner)?;
                }
                Err(Errno::EXIST) if has_parents => drop(self.open(&path, OFlags::PATH | OFlags::DIRECTORY)?),
                Err(errno) => return Err(fault(errno)),
            }
            last = Some(path);
        }
        let path = last.ok_or_else(|| fault(Errno::EXIST))?;
        self.stat(&path, Link::Followed)
    }

    pub(super) fn remove(&self, path: &TreePath, is_recursive: bool) -> Result<(), Fault> {
        let (parent, name) = self.parent(path)?;
        match unlinkat(&parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) if is_recursive => empty(parent.as_fd(), name, 0),
            Err(Errno::ISDIR) => unlinkat(&parent, name, AtFlags::REMOVEDIR).map_err(fault),
            other => other.map_err(fault),
        }
    }

    pub(super) fn rename(&self, from: &TreePath, to: &TreePath, existing: Existing) -> Result<Entry, Fault> {
        let (from_parent, from_name) = self.parent(from)?;
        let (to_parent, to_name) = self.parent(to)?;
        let flags = match existing {
            Existing::Replace => RenameFlags::empty(),
            Existing::Keep => RenameFlags::NOREPLACE,
        };
        renameat_with(&from_parent, from_name, &to_parent, to_name, flags).map_err(|errno| match errno {
            Errno::XDEV => wrong_kind("it lies on another file system, or is a folder of the image, which cannot be renamed in one step"),
            other => fault(other),
        })?;
        entry_in(to_parent.as_fd(), to_name).map_err(fault)
    }
}

/// Removes the folder `name` with all that is in it, following nothing.
fn empty(parent: BorrowedFd<'_>, name: &[u8], depth: usize) -> Result<(), Fault> {
    if depth > DEPTH_MAX {
        return Err(too_large(format!("folders are nested deeper than {DEPTH_MAX}")));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..EMPTYINGS_MAX {
        let folder = openat(parent, name, flags, Mode::empty()).map_err(fault)?;
        for name in names(&folder).map_err(fault)? {
            let name = name.map_err(fault)?;
            match unlinkat(&folder, name.as_slice(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => empty(folder.as_fd(), &name, depth + 1)?,
                Err(errno) => return Err(fault(errno)),
            }
        }
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            // Somebody else fills it, or the kernel left names out that moved while others went.
            Err(Errno::NOTEMPTY) => {}
            other => return other.map_err(fault),
        }
    }
    Err(fault(Errno::NOTEMPTY))
}

/// Copies content into a file. Which of the two failed is told by the kind of the fault: a file that is full has its own.
fn copy(content: &mut impl Read, file: &mut File) -> Result<(), Fault> {
    let mut buffer = vec![0; PIECE_BYTES_MAX];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => file.write_all(&buffer[..read]).map_err(|e| io_fault(&e))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Fault { kind: FaultKind::Failed, message: format!("the content broke off: {error}") }),
        }
    }
}

/// Owner first: chown(2) takes set-id bits away.
fn dress(file: BorrowedFd<'_>, mode: u32, owner: Option<Owner>) -> Result<(), Fault> {
    if let Some(Owner { uid, gid }) = owner {
        fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(fault)?;
    }
    fchmod(file, Mode::from_raw_mode(mode & 0o7777)).map_err(fault)
}

/// The names in a folder, as they come, without its dots.
pub(super) fn names(folder: &OwnedFd) -> Result<impl Iterator<Item = Result<Vec<u8>, Errno>> + use<>, Errno> {
    let is_dot = |name: &CStr| matches!(name.to_bytes(), b"." | b"..");
    let names = Dir::read_from(folder)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    Ok(names.filter(move |name| !name.as_ref().is_ok_and(|name| is_dot(name))).map(|name| name.map(std::ffi::CString::into_bytes)))
}

/// What has this name in a folder; a link itself.
pub(super) fn entry_in(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Entry, Errno> {
    let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let target = if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        // Gone or something else by now: then it has none.
        readlinkat(folder, name, Vec::new()).ok().map(std::ffi::CString::into_bytes)
    } else {
        None
    };
    Ok(entry(name, &stat, target))
}

fn entry(name: &[u8], stat: &Stat, target: Option<Vec<u8>>) -> Entry {
    let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Entry {
        name: name.to_vec(),
        kind: match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::Unknown => EntryKind::File,
            FileType::Directory => EntryKind::Folder,
            FileType::Symlink => EntryKind::Link,
            FileType::Fifo => EntryKind::Fifo,
            FileType::Socket => EntryKind::Socket,
            FileType::CharacterDevice | FileType::BlockDevice => EntryKind::Device,
        },
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_ns: stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(nanoseconds),
        inode: stat.st_ino,
        target,
    }
}

/// Whether this is a part of a `/proc`.
pub(super) fn is_proc(found: &OwnedFd) -> Result<bool, Fault> {
    Ok(fstatfs(found).map_err(fault)?.f_type == libc::PROC_SUPER_MAGIC)
}
