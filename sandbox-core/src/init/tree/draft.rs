//! A file that nobody finds under its name until it is whole.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, RenameFlags, linkat, openat, renameat, renameat_with, unlinkat},
    io::Errno,
};

use super::fault;
use crate::tree::{Existing, Fault};

/// Written first, named last. It has no name at all where the file system can do that (`O_TMPFILE`, open(2)): then nothing is left of it
/// if this process is killed. Overlayfs of older kernels (6.1) cannot: there it has a name that nobody else has, `.mayfly-…`, which stays
/// behind if this process is killed in between.
pub(super) struct Draft<'a> {
    file: File,
    folder: &'a OwnedFd,
    /// Its name so far, to be removed unless it gets its own.
    aside: Option<Vec<u8>>,
}

impl<'a> Draft<'a> {
    pub(super) fn in_folder(folder: &'a OwnedFd) -> Result<Self, Fault> {
        let unnamed = openat(folder, ".", OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        match unnamed {
            Ok(file) => Ok(Self { file: File::from(file), folder, aside: None }),
            Err(Errno::OPNOTSUPP) => Self::aside(folder),
            Err(errno) => Err(fault(errno)),
        }
    }

    fn aside(folder: &'a OwnedFd) -> Result<Self, Fault> {
        let aside = name_of_its_own();
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(folder, aside.as_slice(), flags, Mode::from_raw_mode(0o600)).map_err(fault)?;
        Ok(Self { file: File::from(file), folder, aside: Some(aside) })
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Gives it its name, at once and as a whole. `proc` is a procfs of this process.
    pub(super) fn name(mut self, proc: &OwnedFd, name: &[u8], existing: Existing) -> Result<(), Fault> {
        if self.aside.is_none() {
            let own = format!("self/fd/{}", self.file.as_raw_fd());
            let link = |name: &[u8]| linkat(proc, own.as_str(), self.folder, name, AtFlags::SYMLINK_FOLLOW);
            match (link(name), existing) {
                // linkat(2) replaces nothing, rename(2) does.
                (Err(Errno::EXIST), Existing::Replace) => {}
                (named, _) => return named.map_err(fault),
            }
            let aside = name_of_its_own();
            link(&aside).map_err(fault)?;
            self.aside = Some(aside);
        }
        let Some(aside) = &self.aside else { return Ok(()) };
        match existing {
            Existing::Replace => renameat(self.folder, aside.as_slice(), self.folder, name),
            Existing::Keep => renameat_with(self.folder, aside.as_slice(), self.folder, name, RenameFlags::NOREPLACE),
        }
        .map_err(fault)?;
        self.aside = None;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(aside) = &self.aside {
            // The fault that brought us here is told; this one would hide it.
            let _hidden = unlinkat(self.folder, aside.as_slice(), AtFlags::empty());
        }
    }
}

fn name_of_its_own() -> Vec<u8> {
    format!(".mayfly-{}", uuid::Uuid::new_v4().simple()).into_bytes()
}
