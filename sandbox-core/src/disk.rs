//! A writable layer on the node's disk: a file system of exactly the size that was promised, with its space set aside.
//!
//! Made and removed by processes of their own ([`crate::keeper`] waits for nothing). Where the file system below has project quotas
//! (ext4 and xfs, mounted with `prjquota`) and cgroup v2 is in use, a layer is a folder that is a project; elsewhere it is an ext4 in a file without a name, behind a
//! loop device.

mod image;
mod quota;
pub(crate) mod volume;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use serde::{Deserialize, Serialize};

use crate::{cgroup::Device, error::at, protocol::CgroupMode, rootfs, sys};

/// The folder on the node's disk, and how layers are made in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Disks {
    folder: PathBuf,
    kind: Kind,
}

/// How layers are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Quota,
    Image,
}

/// The layer of one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// The first id of the sandbox's range.
    pub(crate) id_base: u32,
    /// An id of that range, by which the layer is known: no other layer of this machine has it.
    pub(crate) project: u32,
    /// Whether a write is on its way to the disk before it returns: what else the kernel writes back on its own, it writes at no one's rate on cgroup v1.
    pub(crate) is_synchronous: bool,
}

/// What came of an order, beside the descriptor of its detached mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// The block device that is the layer's own.
    pub(crate) device: Option<Device>,
}

/// Nobody is given the last twentieth of a disk, or of a large one these bytes: logs, images and perhaps the database go on in them.
const KEPT_PART: u64 = 20;
const KEPT_BYTES_MAX: u64 = 2 << 30;

/// What everything on such a layer is counted in. Promises are rounded down to it.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// What the overlay itself takes of a layer: `work/work`, `work/incompat`, `volatile` and `dirty` in it, the last of which is an empty file.
pub(crate) const OWN_INODES: u64 = 4;
pub(crate) const OWN_BLOCKS: u64 = 3;

impl Disks {
    /// Makes the folder, and finds out what its file system can do.
    pub(crate) fn open(folder: &Path, cgroup: CgroupMode) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        // On cgroup v1 only a file system of its own, mounted `sync`, is held to its rate.
        let is_v2 = cgroup == CgroupMode::V2;
        let has_quotas = is_v2 && sys::has_project_quotas(open(folder)?.as_fd()).unwrap_or(false);
        let kind = if has_quotas { Kind::Quota } else { Kind::Image };
        Ok(Self { folder: folder.canonicalize()?, kind })
    }

    /// The folders of layers whose sandboxes had a range that `is_over` names.
    pub(crate) fn left(&self, is_over: impl Fn(u32) -> bool) -> io::Result<Vec<PathBuf>> {
        quota::left(&self.folder, is_over)
    }

    /// Makes a layer. Takes milliseconds to seconds.
    pub(crate) fn make(&self, order: Order) -> io::Result<(OwnedFd, Made)> {
        self.leave_some(order.bytes)?;
        match self.kind {
            Kind::Quota => Ok((quota::make(&self.folder, order)?, Made { device: None })),
            Kind::Image => image::make(&self.folder, order),
        }
    }

    /// Whether a layer that is not finished leaves something behind when its maker is killed.
    pub(crate) fn leaves_names(&self) -> bool {
        self.kind == Kind::Quota
    }

    /// Removes what a maker that was killed left.
    pub(crate) fn discard(&self, project: u32) -> io::Result<()> {
        match self.kind {
            Kind::Quota => quota::remove(&self.folder, project),
            Kind::Image => Ok(()),
        }
    }

    /// Refuses a layer that would take the last of the disk, on which logs, images and perhaps the database are too: whoever asks for much is
    /// told so, and the others go on.
    fn leave_some(&self, bytes: u64) -> io::Result<()> {
        leave_some(&self.folder, bytes)
    }

    /// Removes what there is of a layer; the last step is to let go of `mount`.
    pub(crate) fn remove(&self, project: u32, mount: OwnedFd) -> io::Result<()> {
        match self.kind {
            Kind::Quota => {
                drop(mount);
                quota::remove(&self.folder, project)
            }
            Kind::Image => {
                // Without this all that is not written yet would be, at the sandbox's own rate, only to be thrown away.
                let root = openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
                let shut = sys::shut_down_file_system(root.as_fd());
                drop(root);
                drop(mount);
                shut
            }
        }
    }
}

fn leave_some(folder: &Path, bytes: u64) -> io::Result<()> {
    if Space::of(open(folder)?.as_fd())?.leaves_enough(bytes) {
        return Ok(());
    }
    let step = format!("setting {bytes} bytes aside in {} and leaving the node its share", folder.display());
    Err(at(step)(io::ErrorKind::StorageFull.into()))
}

/// What a disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    pub(crate) free_bytes: u64,
    pub(crate) total_bytes: u64,
}

impl Space {
    /// Of the disk below a folder.
    pub(crate) fn of(folder: BorrowedFd<'_>) -> io::Result<Self> {
        let space = rustix::fs::fstatfs(folder)?;
        let block = u64::try_from(space.f_bsize).map_err(io::Error::other)?;
        Ok(Self { free_bytes: space.f_bavail.saturating_mul(block), total_bytes: space.f_blocks.saturating_mul(block) })
    }

    /// What nobody is given.
    pub(crate) const fn kept_bytes(self) -> u64 {
        let part = self.total_bytes / KEPT_PART;
        if part < KEPT_BYTES_MAX { part } else { KEPT_BYTES_MAX }
    }

    /// Whether it keeps its share when `taken` bytes go.
    pub(crate) const fn leaves_enough(self, taken: u64) -> bool {
        matches!(self.free_bytes.checked_sub(taken), Some(left) if left >= self.kept_bytes())
    }
}

fn open(folder: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes the folders that a sandbox's tree is built on.
fn make_folders(root: BorrowedFd<'_>, id_base: u32) -> io::Result<()> {
    for name in rootfs::FOLDERS {
        mkdirat(root, name, Mode::from_raw_mode(0o755))?;
    }
    Ok(rootfs::chown(root, rootfs::UPPER, id_base)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_layer_takes_the_last_of_a_disk() {
        let half_full = Space { free_bytes: 1000, total_bytes: 2000 };
        assert!(half_full.leaves_enough(900));
        assert!(!half_full.leaves_enough(901), "the last twentieth is the node's");
        assert!(!half_full.leaves_enough(1001));
        assert!(!Space { free_bytes: 99, total_bytes: 2000 }.leaves_enough(0), "it is gone already");
        let large = Space { free_bytes: 3 << 30, total_bytes: 1 << 40 };
        assert!(large.leaves_enough(1 << 30), "a twentieth of a large disk is more than it needs");
        assert!(!large.leaves_enough((1 << 30) + 1));
    }
}
