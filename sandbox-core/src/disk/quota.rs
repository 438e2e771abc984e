//! A layer in a folder of its own that is a project, on a file system that holds projects to their quotas.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{BLOCK_BYTES, OWN_BLOCKS, OWN_INODES, Order, make_folders, open};
use crate::{
    error::at,
    rootfs,
    sys::{self, MountAttributes},
};

/// What the names of folders begin with. The number of the project follows, which is an id of the sandbox's range.
const PREFIX: &str = "project-";

fn path(folder: &Path, project: u32) -> PathBuf {
    folder.join(format!("{PREFIX}{project}"))
}

/// The folders of projects that `is_over` names.
pub(super) fn left(folder: &Path, is_over: impl Fn(u32) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut left = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let project = entry.file_name().to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
        if project.is_some_and(&is_over) {
            left.push(entry.path());
        }
    }
    Ok(left)
}

pub(super) fn make(folder: &Path, order: Order) -> io::Result<OwnedFd> {
    let project = order.project;
    let path = path(folder, project);
    // A keeper that was killed may have left one: what is in it would count against this one.
    while let Err(error) = std::fs::create_dir(&path) {
        if error.kind() != io::ErrorKind::AlreadyExists {
            return Err(at(path.display())(error));
        }
        remove(folder, project)?;
    }
    let root = open(&path)?;
    // A quota is no reservation. What is not there now is at least not promised.
    let space = rustix::fs::fstatfs(&root)?;
    if space.f_bavail.saturating_mul(u64::try_from(space.f_bsize).map_err(io::Error::other)?) < order.bytes {
        return Err(at(format_args!("setting {} bytes aside in {}", order.bytes, folder.display()))(io::ErrorKind::StorageFull.into()));
    }
    sys::set_project(root.as_fd(), project).map_err(at("making the folder a project"))?;
    make_folders(root.as_fd(), order.id_base).map_err(at("making the layer's folders"))?;
    let used = sys::project_quota(root.as_fd(), project).map_err(at("reading the project's use"))?;
    let bytes = used.used_bytes + (order.bytes / BLOCK_BYTES + OWN_BLOCKS) * BLOCK_BYTES;
    let inodes = used.used_inodes + order.inodes + OWN_INODES;
    sys::limit_project(root.as_fd(), project, bytes, inodes).map_err(at("setting the project's quota"))?;
    let found = sys::project_quota(root.as_fd(), project).map_err(at("reading the project's quota"))?;
    if (found.limit_bytes, found.limit_inodes) != (bytes, inodes) {
        return Err(io::Error::other(format!("the project's quota is {found:?} instead of {bytes} bytes and {inodes} inodes")));
    }
    let mount = rootfs::clone_mount(&root, "")?;
    let attributes = MountAttributes { nosuid: true, nodev: true, ..MountAttributes::default() };
    sys::set_mount_attributes(mount.as_fd(), attributes)?;
    Ok(mount)
}

pub(super) fn remove(folder: &Path, project: u32) -> io::Result<()> {
    match std::fs::remove_dir_all(path(folder, project)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::limit_project(open(folder)?.as_fd(), project, 0, 0)
}
