//! The folder that an image is unpacked into. No path, link or earlier entry leads out of it.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    hash::{BuildHasher as _, RandomState},
    io::{self, Read},
    ops::Bound,
    os::fd::{AsFd, OwnedFd},
};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr,
    fstat, futimens, linkat, mkdirat, mknodat, openat2, statat, symlinkat, unlinkat, utimensat,
};

use super::Attributes;

/// An open folder, and what is to be done to its folders at the end of a layer.
#[derive(Debug)]
pub struct Target {
    root: OwnedFd,
    /// Times of folders, by path: set last, because every entry made in a folder changes them. Later ones win.
    folder_times: BTreeMap<Vec<Vec<u8>>, u64>,
    /// Folders that no entry named but that entries needed.
    implied_folders: u64,
    /// What this layer has put where, since what it hides is below it alone (image-spec, `layer.md`, «Whiteouts»): of each folder's inode and a name in it.
    made: HashSet<u64>,
    /// Nobody can know of two names that are one in `made`.
    keys: RandomState,
}

type Names<'a> = &'a [Vec<u8>];

impl Target {
    /// Unpacks into `root`, a folder opened for reading.
    pub fn new(root: OwnedFd) -> Self {
        Self { root, folder_times: BTreeMap::new(), implied_folders: 0, made: HashSet::new(), keys: RandomState::new() }
    }

    /// How many folders were made that no entry named.
    pub(super) fn implied_folders(&self) -> u64 {
        self.implied_folders
    }

    pub(super) fn folder(&mut self, folders: Names<'_>, name: &[u8], attributes: Attributes) -> io::Result<()> {
        let parent = self.parent(folders)?;
        check_depth(&parent)?;
        match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {}
            Ok(_) => {
                unlinkat(&parent, name, AtFlags::empty())?;
                mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
            }
            Err(rustix::io::Errno::NOENT) => mkdirat(&parent, name, Mode::from_raw_mode(0o755))?,
            Err(error) => return Err(error.into()),
        }
        self.note(&parent, name)?;
        let mut path = folders.to_vec();
        path.push(name.to_vec());
        self.folder_attributes(&path, attributes)
    }

    /// Sets owner, mode and times of a folder that exists.
    pub(super) fn folder_attributes(&mut self, path: Names<'_>, attributes: Attributes) -> io::Result<()> {
        let folder = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        set_attributes(&folder, &attributes)?;
        self.folder_times.insert(path.to_vec(), attributes.modified_s);
        Ok(())
    }

    pub(super) fn file(
        &mut self,
        folders: Names<'_>,
        name: &[u8],
        attributes: Attributes,
        (size, content): (u64, &mut impl Read),
    ) -> io::Result<()> {
        let parent = self.fresh(folders, name)?;
        // O_EXCL and RESOLVE_NO_SYMLINKS: a new file here, and no other.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat2(&parent, name, flags, Mode::from_raw_mode(0o600), ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH)?;
        let mut file = File::from(file);
        // To the tar crate, the archive's end within a file is the file's.
        let copied = io::copy(content, &mut file)
            .and_then(|bytes| if bytes == size { Ok(()) } else { Err(super::invalid("the archive ends within it")) });
        if let Err(error) = copied {
            // Half of it is nothing that the archive held.
            unlinkat(&parent, name, AtFlags::empty())?;
            return Err(error);
        }
        set_attributes(&file, &attributes)?;
        futimens(&file, &times(attributes.modified_s)?)?;
        Ok(())
    }

    pub(super) fn symlink(&mut self, folders: Names<'_>, name: &[u8], to: &[u8], attributes: &Attributes) -> io::Result<()> {
        let parent = self.fresh(folders, name)?;
        symlinkat(to, &parent, name)?;
        chown(&parent, name, attributes)?;
        utimensat(&parent, name, &times(attributes.modified_s)?, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    pub(super) fn link(&mut self, folders: Names<'_>, name: &[u8], to_folders: Names<'_>, to_name: &[u8]) -> io::Result<()> {
        let source = self.parent(to_folders)?;
        let stat = statat(&source, to_name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(super::invalid("a hard link to a folder"));
        }
        if folders == to_folders && name == to_name {
            return self.note(&source, name);
        }
        let parent = self.fresh(folders, name)?;
        Ok(linkat(&source, to_name, &parent, name, AtFlags::empty())?)
    }

    pub(super) fn fifo(&mut self, folders: Names<'_>, name: &[u8], attributes: Attributes) -> io::Result<()> {
        let parent = self.fresh(folders, name)?;
        let mode = Mode::from_raw_mode(attributes.mode & 0o777);
        mknodat(&parent, name, FileType::Fifo, mode, 0)?;
        chown(&parent, name, &attributes)?;
        // Whatever the umask is. Nothing else can have the name by now.
        chmodat(&parent, name, mode, AtFlags::empty())?;
        Ok(utimensat(&parent, name, &times(attributes.modified_s)?, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Deletes what lower layers put under this name; nothing is fine, too.
    pub(super) fn remove(&mut self, folders: Names<'_>, name: &[u8]) -> io::Result<()> {
        let parent = match self.open(folders, OFlags::PATH | OFlags::DIRECTORY) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
            other => other?,
        };
        self.hide(&parent, inode(&parent)?, name).map(drop)
    }

    /// Deletes everything in a folder of the lower layers, but not the folder.
    pub(super) fn clear(&mut self, folders: Names<'_>) -> io::Result<()> {
        let folder = match self.open(folders, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        self.hide_all(&folder).map(drop)
    }

    /// Deletes what lower layers put into this folder. With it, whether anything is left.
    fn hide_all(&self, folder: &OwnedFd) -> io::Result<bool> {
        let inode = inode(folder)?;
        let mut is_left = false;
        for name in children(folder)? {
            is_left |= self.hide(folder, inode, &name)?;
        }
        Ok(is_left)
    }

    /// The same for this name in it, which nothing need have.
    fn hide(&self, parent: &OwnedFd, inode: u64, name: &[u8]) -> io::Result<bool> {
        let is_made = self.made.contains(&self.key(inode, name));
        match open_below(parent, name) {
            Ok(folder) if self.hide_all(&folder)? || is_made => Ok(true),
            Ok(_) => Ok(unlinkat(parent, name, AtFlags::REMOVEDIR).map(|()| false)?),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            // A link, or no folder.
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) if is_made => Ok(true),
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => Ok(unlinkat(parent, name, AtFlags::empty()).map(|()| false)?),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the times of folders, which no entry of this layer changes any more.
    pub(super) fn finish_layer(&mut self) -> io::Result<()> {
        for (path, modified_s) in &self.folder_times {
            match self.open(path, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(folder) => futimens(&folder, &times(*modified_s)?)?,
                // A later entry of the layer put something else there.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(error) => return Err(error),
            }
        }
        self.made.clear();
        Ok(())
    }

    /// Returns when everything is on disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.root)?)
    }

    /// Opens what is at `path`, following links as a process would whose root is this folder.
    fn open(&self, path: Names<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        let joined = if path.is_empty() { b".".to_vec() } else { path.join(&b'/') };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.root, joined, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// The folder that an entry goes into; missing ones are made, as archives may leave them out.
    fn parent(&mut self, folders: Names<'_>) -> io::Result<OwnedFd> {
        match self.open(folders, OFlags::PATH | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        for depth in 1..=folders.len() {
            match self.open(&folders[..depth], OFlags::PATH | OFlags::DIRECTORY) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let at = self.open(&folders[..depth - 1], OFlags::PATH | OFlags::DIRECTORY)?;
                    check_depth(&at)?;
                    self.implied_folders += 1;
                    mkdirat(&at, folders[depth - 1].as_slice(), Mode::from_raw_mode(0o755))?;
                    self.note(&at, &folders[depth - 1])?;
                }
                other => drop(other?),
            }
        }
        self.open(folders, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// [`Target::parent`], with nothing of this name in it any more, for what this layer puts there.
    fn fresh(&mut self, folders: Names<'_>, name: &[u8]) -> io::Result<OwnedFd> {
        let parent = self.parent(folders)?;
        let path: Vec<_> = folders.iter().cloned().chain([name.to_vec()]).collect();
        self.forget_times(&path);
        remove_tree(&parent, name)?;
        self.note(&parent, name)?;
        Ok(parent)
    }

    /// Of this folder and those in it, where something else is to be.
    fn forget_times(&mut self, path: Names<'_>) {
        let later = self.folder_times.range::<[Vec<u8>], _>((Bound::Included(path), Bound::Unbounded));
        let gone: Vec<_> = later.map(|(folder, _)| folder).take_while(|folder| folder.starts_with(path)).cloned().collect();
        for folder in gone {
            self.folder_times.remove(&folder);
        }
    }

    fn note(&mut self, parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
        let key = self.key(inode(parent)?, name);
        self.made.insert(key);
        Ok(())
    }

    fn key(&self, inode: u64, name: &[u8]) -> u64 {
        self.keys.hash_one((inode, name))
    }
}

fn inode(folder: &OwnedFd) -> io::Result<u64> {
    Ok(fstat(folder)?.st_ino)
}

/// The folder of this name, and no other.
fn open_below(parent: &OwnedFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(parent, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// Refuses to nest further in a folder that is too deep already, wherever links led: what is deeper cannot be deleted any more.
fn check_depth(folder: &OwnedFd) -> io::Result<()> {
    use std::os::{fd::AsRawFd, unix::ffi::OsStrExt};
    let path = std::fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd()))?;
    let depth = path.as_os_str().as_bytes().iter().filter(|byte| **byte == b'/').count();
    if depth > super::DEPTH_MAX { Err(super::invalid("the folders are nested too deep")) } else { Ok(()) }
}

/// Ownership first: chown(2) clears the set-id bits that the mode then sets.
fn set_attributes(file: impl AsFd, attributes: &Attributes) -> io::Result<()> {
    fchown(&file, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
    fchmod(&file, Mode::from_raw_mode(attributes.mode))?;
    for (name, value) in &attributes.extended {
        fsetxattr(&file, name.as_str(), value, XattrFlags::empty())?;
    }
    Ok(())
}

fn chown(parent: &OwnedFd, name: &[u8], attributes: &Attributes) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(modified_s: u64) -> io::Result<Timestamps> {
    let at = Timespec { tv_sec: i64::try_from(modified_s).map_err(io::Error::other)?, tv_nsec: 0 };
    Ok(Timestamps { last_access: at, last_modification: at })
}

fn children(folder: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Deletes a file, link or tree, following nothing. Its depth is bounded, as the paths that made it were.
fn remove_tree(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(rustix::io::Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let folder = open_below(parent, name)?;
    children(&folder)?.iter().try_for_each(|child| remove_tree(&folder, child))?;
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}
