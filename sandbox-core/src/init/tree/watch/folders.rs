//! The folders that are watched, by the numbers that inotify(7) has for them.
//!
//! inotify takes paths alone. So that no link or race has a say in what is watched, this process goes into the folder that it has opened, and watches `.`.

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat,
        inotify::{CreateFlags, ReadFlags, WatchFlags, add_watch, init, remove_watch},
        openat, openat2, readlinkat, statat,
    },
    io::Errno,
    process::fchdir,
};

use super::super::{
    Place, fault,
    files::{is_proc, names},
    too_large, wrong_kind,
};
use crate::tree::{DEPTH_MAX, Fault, FaultKind, PATH_BYTES_MAX, TreePath, WATCHED_FOLDERS_MAX};

/// What happens to the entries of a folder, and to its own attributes.
const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    // A file without a name is nobody's to ask for.
    .union(WatchFlags::EXCL_UNLINK)
    .union(ALWAYS);
/// A folder that is seen in two places is watched for both.
const ALWAYS: WatchFlags = WatchFlags::ONLYDIR.union(WatchFlags::MASK_ADD);
/// What takes the topmost folder away. Its own `IN_DELETE_SELF` comes when nobody has it open any more, which we have.
const OWN_END: WatchFlags = WatchFlags::DELETE.union(WatchFlags::MOVED_FROM).union(ALWAYS);

/// Folders are entered one by one, each below the topmost.
const BELOW: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// Not every folder is watched.
#[derive(Debug)]
pub(super) struct Unwatched;

/// Why a folder is not watched that somebody misses.
#[derive(Debug)]
enum Hindrance {
    TooMany,
    TooDeep,
    /// The kernel has none to give.
    NoWatch,
    /// It could not be looked at.
    Failed(Fault),
}

pub(super) struct Folders {
    inotify: OwnedFd,
    /// The topmost, and the root, which this process goes back to.
    top: OwnedFd,
    root: OwnedFd,
    /// The folder that the topmost is in, with the number that it has and the name that it has there; none of the root.
    above: Option<Above>,
    /// The one name in it that was asked for.
    only: Option<Vec<u8>>,
    is_recursive: bool,
    /// From the topmost on.
    paths: HashMap<i32, Vec<u8>>,
}

struct Above {
    folder: OwnedFd,
    watch: i32,
    name: Vec<u8>,
}

impl AsFd for Folders {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl Folders {
    /// Watches what is at `path`: a folder, with those below it if that is asked, or one name in a folder.
    pub(super) fn watch(place: &Place, path: &TreePath, is_recursive: bool) -> Result<Self, Fault> {
        let found = place.open(path, OFlags::PATH)?;
        let is_folder = FileType::from_raw_mode(fstat(&found).map_err(fault)?.st_mode) == FileType::Directory;
        let (top, only) = match path.names().split_last() {
            Some((name, folders)) if !is_folder => {
                let folder = TreePath::parse(&folders.join(&b'/')).map_err(|error| wrong_kind(&error.to_string()))?;
                (place.open(&folder, OFlags::PATH | OFlags::DIRECTORY)?, Some(name.clone()))
            }
            Some(_) | None => (found, None),
        };
        if is_proc(&top)? {
            return Err(wrong_kind("what lies in /proc is not told of"));
        }
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|errno| match errno {
            // The limit of a user, which the sandbox is to the host (inotify(7), max_user_instances).
            Errno::MFILE => busy("the programs in the sandbox use all of its inotify instances"),
            other => fault(other),
        })?;
        let root = place.root.try_clone().map_err(|error| super::super::io_fault(&error))?;
        let is_recursive = is_recursive && only.is_none();
        let mut folders = Self { inotify, top, root, above: None, only, is_recursive, paths: HashMap::new() };
        folders.above = folders.look_above(place)?;
        let done = folders.walk_top();
        folders.go_back();
        match done {
            Ok(()) => {}
            Err(Hindrance::TooMany) => return Err(too_large(format!("there are more than {WATCHED_FOLDERS_MAX} folders"))),
            Err(Hindrance::TooDeep) => return Err(too_large(format!("folders are nested deeper than {DEPTH_MAX}"))),
            Err(Hindrance::NoWatch) => return Err(busy("what is watched in the sandbox is as much as its kernel allows")),
            Err(Hindrance::Failed(fault)) => return Err(fault),
        }
        // It had its name when all this stood, so what takes it from there is heard.
        if folders.is_there() { Ok(folders) } else { Err(fault(Errno::NOENT)) }
    }

    /// The folder that the topmost is in; which name it has there, `/proc` says, for links may have led to it.
    fn look_above(&self, place: &Place) -> Result<Option<Above>, Fault> {
        let own = readlinkat(&place.proc, format!("self/fd/{}", self.top.as_raw_fd()), Vec::new()).map_err(fault)?.into_bytes();
        let Some(name) = own.rsplit(|byte| *byte == b'/').next().filter(|name| !name.is_empty()) else { return Ok(None) };
        let folder = openat(&self.top, "..", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(fault)?;
        let watch = self.add(&folder, OWN_END);
        self.go_back();
        let watch = watch.map_err(|errno| match errno {
            Errno::NOSPC => busy("what is watched in the sandbox is as much as its kernel allows"),
            other => fault(other),
        })?;
        Ok(Some(Above { folder, watch, name: name.to_vec() }))
    }

    pub(super) fn only(&self) -> Option<&[u8]> {
        self.only.as_deref()
    }

    pub(super) fn count(&self) -> usize {
        self.paths.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.paths.len() >= WATCHED_FOLDERS_MAX
    }

    /// Of a watched folder.
    pub(super) fn path(&self, watch: i32) -> Option<&[u8]> {
        self.paths.get(&watch).map(Vec::as_slice)
    }

    /// Whether this takes the topmost folder from its place.
    pub(super) fn is_own_end(&self, watch: i32, what: ReadFlags, name: Option<&[u8]>) -> bool {
        let is_taken = what.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) && what.contains(ReadFlags::ISDIR);
        self.above.as_ref().is_some_and(|above| above.watch == watch && name == Some(&above.name)) && is_taken
    }

    /// Whether the topmost folder is where it was.
    pub(super) fn is_there(&self) -> bool {
        let Some(Above { folder, name, .. }) = &self.above else { return true };
        let (Ok(there), Ok(own)) = (statat(folder, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW), fstat(&self.top)) else { return false };
        (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
    }

    /// Whether something has this name, or that cannot be known.
    pub(super) fn has(&self, path: &[u8]) -> bool {
        // Of the one file that was asked for the path is empty.
        let path = self.only.as_deref().unwrap_or(path);
        let found = openat2(&self.top, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), BELOW);
        !found.is_err_and(is_nobodys)
    }

    /// A new folder at this path, with those below it. What is in them is told, unless they were watched before.
    pub(super) fn follow(&mut self, path: &[u8], mut tell: impl FnMut(Vec<u8>, bool)) -> Result<(), Unwatched> {
        if !self.is_recursive {
            return Ok(());
        }
        let done = match openat2(&self.top, path, FOLDER, Mode::empty(), BELOW) {
            Ok(folder) => self.walk(&folder, path.to_vec(), &mut tell),
            Err(Errno::NAMETOOLONG) => Err(Hindrance::TooDeep),
            // Gone again, or something else by now: what it is then is told, too.
            Err(errno) => unless_nobodys(errno),
        };
        self.go_back();
        done.map_err(|_| Unwatched)
    }

    /// Those that there are now, after it was not told which came and went. Without the topmost there is none.
    pub(super) fn anew(&mut self) -> Result<(), Unwatched> {
        let before = std::mem::take(&mut self.paths);
        let done = self.walk_top();
        self.go_back();
        let gone: Vec<i32> = before.into_keys().filter(|watch| !self.paths.contains_key(watch)).collect();
        gone.into_iter().for_each(|watch| self.unwatch(watch));
        done.map_err(|_| Unwatched)
    }

    /// This folder and those below it, as far as they are watched as such.
    pub(super) fn below(&self, path: &[u8]) -> Vec<i32> {
        if !self.is_recursive {
            return Vec::new();
        }
        let is_below = |other: &[u8]| other.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
        self.paths.iter().filter(|(_, other)| is_below(other)).map(|(watch, _)| *watch).collect()
    }

    /// They lie elsewhere by now, but for what became of them since. Those that lie too deep there are watched no more.
    pub(super) fn rename(&mut self, watches: &[i32], from: &[u8], to: &[u8]) -> Result<(), Unwatched> {
        let mut whole = Ok(());
        for watch in watches {
            let Some(rest) = self.paths.get(watch).and_then(|path| path.strip_prefix(from)) else { continue };
            let path = [to, rest].concat();
            if is_too_deep(&path) {
                self.unwatch(*watch);
                whole = Err(Unwatched);
            } else {
                self.paths.insert(*watch, path);
            }
        }
        whole
    }

    pub(super) fn forget(&mut self, watch: i32) {
        self.paths.remove(&watch);
    }

    pub(super) fn unwatch(&mut self, watch: i32) {
        self.forget(watch);
        // One whose folder is gone is gone already.
        let _gone = remove_watch(&self.inotify, watch);
    }

    fn walk_top(&mut self) -> Result<(), Hindrance> {
        let top = openat(&self.top, ".", FOLDER, Mode::empty()).map_err(|errno| Hindrance::Failed(fault(errno)))?;
        self.walk(&top, Vec::new(), &mut |_, _| {})
    }

    /// Watches a folder first, so that nothing that comes later is missed, and then looks at what is there. One that cannot be watched does not keep the others from it.
    fn walk(&mut self, folder: &OwnedFd, path: Vec<u8>, tell: &mut impl FnMut(Vec<u8>, bool)) -> Result<(), Hindrance> {
        if is_too_deep(&path) {
            return Err(Hindrance::TooDeep);
        }
        if is_proc(folder).map_err(Hindrance::Failed)? {
            return Ok(());
        }
        let watch = match self.add(folder, EVENTS) {
            Ok(watch) => watch,
            Err(Errno::NOSPC) => return Err(Hindrance::NoWatch),
            // Without the topmost nothing is told at all.
            Err(errno) if path.is_empty() => return Err(Hindrance::Failed(fault(errno))),
            Err(errno) => return unless_nobodys(errno),
        };
        let is_known = self.paths.get(&watch) == Some(&path);
        if !is_known && self.is_full() && !self.paths.contains_key(&watch) {
            self.unwatch(watch);
            return Err(Hindrance::TooMany);
        }
        self.paths.insert(watch, path.clone());
        // What is in it was told, or will be.
        if is_known || !self.is_recursive {
            return Ok(());
        }
        let entries = match names(folder) {
            Ok(entries) => entries,
            Err(errno) => return unless_nobodys(errno),
        };
        let mut whole = Ok(());
        for name in entries {
            let done = match name {
                Ok(name) => self.enter(folder, &name, join(&path, &name), tell),
                Err(errno) => unless_nobodys(errno),
            };
            whole = done.and(whole);
            // There will be no room for the rest either.
            if matches!(whole, Err(Hindrance::TooMany | Hindrance::NoWatch)) {
                break;
            }
        }
        whole
    }

    /// Tells of something in a folder. If it is a folder itself, walks on there.
    fn enter(&mut self, folder: &OwnedFd, name: &[u8], path: Vec<u8>, tell: &mut impl FnMut(Vec<u8>, bool)) -> Result<(), Hindrance> {
        let is_folder = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode) == FileType::Directory,
            Err(errno) => return unless_nobodys(errno),
        };
        tell(path.clone(), is_folder);
        if !is_folder {
            return Ok(());
        }
        match openat(folder, name, FOLDER, Mode::empty()) {
            Ok(below) => self.walk(&below, path, tell),
            Err(errno) => unless_nobodys(errno),
        }
    }

    fn add(&self, folder: &OwnedFd, events: WatchFlags) -> Result<i32, Errno> {
        fchdir(folder)?;
        add_watch(&self.inotify, ".", events)
    }

    /// Whoever stays in a folder keeps it alive.
    fn go_back(&self) {
        // Where that fails, it is another folder that is kept, and the next that is watched is gone into anew.
        let _stays = fchdir(&self.root);
    }
}

/// Deeper than is followed, or of a longer path than is told.
fn is_too_deep(path: &[u8]) -> bool {
    path.len() > PATH_BYTES_MAX || path.split(|byte| *byte == b'/').count() > DEPTH_MAX
}

/// Whether it is gone, has become something else, or is not the sandbox's own to see: nobody misses that.
fn is_nobodys(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS)
}

fn unless_nobodys(errno: Errno) -> Result<(), Hindrance> {
    if is_nobodys(errno) { Ok(()) } else { Err(Hindrance::Failed(fault(errno))) }
}

fn busy(message: &str) -> Fault {
    Fault { kind: FaultKind::Busy, message: message.to_owned() }
}

/// A name in a folder, as a path.
pub(super) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{apart, place, refuse},
        *,
    };

    /// Follows a new folder with another in it, while this call fails; whether it says that not all is watched.
    fn is_told(call: libc::c_long, errno: Errno) -> bool {
        apart(|folder| {
            std::fs::create_dir(folder.join("work")).unwrap();
            let mut folders = Folders::watch(&place(folder), &TreePath::parse(b"work").unwrap(), true).unwrap();
            std::fs::create_dir_all(folder.join("work/new/in")).unwrap();
            refuse(call, errno);
            folders.follow(b"new", |_, _| {}).is_err()
        })
    }

    #[test]
    fn whatever_keeps_a_folder_from_being_watched_is_told() {
        assert!(is_told(libc::SYS_openat2, Errno::MFILE), "finding it");
        assert!(is_told(libc::SYS_fstatfs, Errno::IO), "what it lies on");
        assert!(is_told(libc::SYS_fchdir, Errno::NOMEM), "entering it");
        assert!(is_told(libc::SYS_inotify_add_watch, Errno::NOMEM), "watching it");
        assert!(is_told(libc::SYS_openat, Errno::NFILE), "opening it for what is in it");
        assert!(is_told(libc::SYS_getdents64, Errno::IO), "what is in it");
        assert!(is_told(libc::SYS_newfstatat, Errno::NOMEM), "what that is");
        assert!(!is_told(libc::SYS_mkdirat, Errno::NOMEM), "the control: a call that is not made");
    }

    #[test]
    fn what_is_gone_or_not_ours_to_see_is_missed_by_nobody() {
        assert!(!is_told(libc::SYS_openat2, Errno::NOENT));
        assert!(!is_told(libc::SYS_openat2, Errno::NOTDIR));
        assert!(!is_told(libc::SYS_openat2, Errno::LOOP));
        assert!(!is_told(libc::SYS_inotify_add_watch, Errno::ACCESS));
        assert!(!is_told(libc::SYS_newfstatat, Errno::NOENT));
    }
}
