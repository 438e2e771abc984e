//! The unpacked images: one folder each, named by [`ImageId`], owned by root, shared read-only by all sandboxes.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use serde::{Deserialize, Serialize};

use crate::{protocol::ImageId, rootfs::base, sys};

/// The folder of images.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Store {
    folder: PathBuf,
    /// Mount points and our own files, over every image.
    #[serde(with = "crate::handover")]
    base: OwnedFd,
    /// An image with nothing in it, for programs of our own.
    #[serde(with = "crate::handover")]
    empty: OwnedFd,
    made: u64,
}

/// Folders that are not images: no [`ImageId`] looks like them.
const BASE: &str = "base";
const EMPTY: &str = "empty";
const NEW: &str = "new-";
const TRASH: &str = "trash-";

/// How often a tree is tried to be deleted, and the time between.
const REMOVE_ATTEMPTS: u32 = 100;
const REMOVE_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_millis(20);

impl Store {
    /// Opens the store at `folder`, after removing what an interrupted unpacking or removal left.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut trash = 0;
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if [BASE, EMPTY].contains(&name.as_str()) || name.starts_with(NEW) || name.starts_with(TRASH) {
                // Only renamed here: however large or deep it is, it does not hold up the start.
                trash += 1;
                let away = folder.join(format!("{TRASH}{}-{trash}", std::process::id()));
                fs::rename(folder.join(&name), &away)?;
                remove_in_background(&away)?;
            }
        }
        make_folder(&folder.join(EMPTY))?;
        make_folder(&folder.join(BASE))?;
        for name in base::FOLDERS {
            make_folder(&folder.join(BASE).join(name))?;
        }
        for (name, content) in base::FILES {
            let path = folder.join(BASE).join(name);
            fs::write(&path, content)?;
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        }
        Ok(Self { folder: folder.to_owned(), base: open(&folder.join(BASE))?, empty: open(&folder.join(EMPTY))?, made: 0 })
    }

    pub(super) fn base(&self) -> &OwnedFd {
        &self.base
    }

    pub(super) fn empty(&self) -> &OwnedFd {
        &self.empty
    }

    /// The folder of an image; an error of `NotFound` if the store has it not.
    pub(super) fn image(&self, id: &ImageId) -> io::Result<OwnedFd> {
        open(&self.folder.join(id.to_string()))
    }

    pub(super) fn images(&self) -> io::Result<Vec<ImageId>> {
        let names = fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        Ok(names.collect::<io::Result<Vec<String>>>()?.into_iter().filter_map(|name| name.try_into().ok()).collect())
    }

    /// A new folder to unpack an image into, and its name for [`Store::place`] or [`Store::discard`].
    pub(super) fn begin(&mut self) -> io::Result<(String, OwnedFd)> {
        self.made += 1;
        let name = format!("{NEW}{}", self.made);
        make_folder(&self.folder.join(&name))?;
        let folder = open(&self.folder.join(&name))?;
        Ok((name, folder))
    }

    /// Where what was unpacked into `name` is to become the image `id`.
    pub(super) fn place(&self, name: &str, id: &ImageId) -> Place {
        Place { folder: self.folder.clone(), from: self.folder.join(name), to: self.folder.join(id.to_string()) }
    }

    /// Removes a folder of [`Store::begin`].
    pub(super) fn discard(&mut self, name: &str) -> io::Result<()> {
        self.made += 1;
        let trash = self.folder.join(format!("{TRASH}{}", self.made));
        fs::rename(self.folder.join(name), &trash)?;
        remove_in_background(&trash)
    }

    /// Removes an image that no sandbox runs on.
    pub(super) fn remove(&mut self, id: &ImageId) -> io::Result<()> {
        match self.discard(&id.to_string()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// The place of an image that is new.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    from: PathBuf,
    to: PathBuf,
}

impl Place {
    /// Gives the image its name. Its content is already on disk (the unpacker's syncfs); after this, its name is too. Waits for the disk.
    pub(super) fn take(&self) -> io::Result<()> {
        match fs::rename(&self.from, &self.to) {
            // Somebody else was faster with the same content.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => fs::remove_dir_all(&self.from)?,
            done => done?,
        }
        fs::File::open(&self.folder)?.sync_all()
    }
}

/// Deletes a tree in a process of its own: a large one takes longer than any sandbox may wait for the keeper.
pub(super) fn remove_in_background(path: &Path) -> io::Result<()> {
    match sys::clone3(nix::sched::CloneFlags::empty(), false, None)? {
        sys::Cloned::Child => {
            super::claim::expose_to_oom();
            // A copy of a descriptor that the keeper closes would keep it alive, and watched.
            let is_removed = sys::close_from(3).is_ok() && remove(path);
            std::process::exit(if is_removed { 0 } else { 1 });
        }
        // Reaped by the keeper's loop at its SIGCHLD. What is not deleted is found at the next start.
        sys::Cloned::Parent(_) => Ok(()),
    }
}

/// Deletes a tree that others may still be at: an unpacker of a keeper that was just killed dies a moment after it, and what that one had begun to
/// delete goes on being deleted.
fn remove(path: &Path) -> bool {
    for _ in 0..REMOVE_ATTEMPTS {
        match fs::remove_dir_all(path) {
            Ok(()) => return true,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => return true,
            Err(_) => std::thread::sleep(REMOVE_AGAIN_AFTER),
        }
    }
    false
}

/// A folder with exactly these permissions, whatever the umask is: payloads see them.
fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_folder_that_somebody_still_writes_to_is_deleted_when_that_is_over() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("trash");
        fs::create_dir(&folder).unwrap();
        let busy = folder.clone();
        let (begun, is_begun) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            let until = Instant::now() + Duration::from_millis(200);
            for n in 0_u64.. {
                // The folder is gone, or it is time to stop.
                if fs::write(busy.join(n.to_string()), "").is_err() || Instant::now() > until {
                    return;
                }
                if n == 100 {
                    begun.send(()).unwrap();
                }
            }
        });
        is_begun.recv().unwrap();

        assert!(remove(&folder));

        writer.join().unwrap();
        assert!(!folder.exists());
    }
}
