//! Volumes on the node's disk: each an ext4 in a file of its own, with its space set aside, behind a loop device while somebody uses it.
//!
//! Unlike a layer it outlives whoever wrote to it, and crashes: it has a journal. A file gets its name when all of it is there, so that one with a name is whole.
//! Whoever mounts one holds a lock on its file, which goes with the last trace of the loop device: no two devices are ever put before the same file.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, chmodat, flock, fsync, linkat, mkdirat, openat, syncfs},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{
    BLOCK_BYTES,
    image::{Attached, Journal, attach, format, image_bytes, mount, set_aside, trim},
    leave_some, open,
};
use crate::{cgroup::Device, error::at, protocol::VolumeId};

/// The folder in a volume's file system that sandboxes see; what makes up its size lies beside it.
pub(crate) const CONTENT: &str = "content";

/// What the name of each file ends with.
const SUFFIX: &str = ".ext4";
/// Of each: the least that ext4 takes.
const JOURNAL_MIB: u64 = 4;
const JOURNAL_BLOCKS: u64 = (JOURNAL_MIB << 20) / BLOCK_BYTES;
/// How long whoever had it before has to let go of it: a keeper that was killed, or a process of this one.
const FREE_WITHIN: Duration = Duration::from_secs(20);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// The files of this node's volumes.
#[derive(Debug, Clone)]
pub(crate) struct VolumeFiles {
    folder: PathBuf,
}

/// How much is to fit into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// How one is mounted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Manner {
    /// Whether a write is on its way to the disk before it returns: as with layers, what else the kernel writes back it writes at no one's rate on cgroup v1.
    pub(crate) is_synchronous: bool,
    /// The SELinux label of its files.
    pub(crate) label: Option<String>,
}

/// The loop device that one is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Loop {
    pub(crate) number: u32,
    pub(crate) device: Device,
}

impl VolumeFiles {
    /// Makes the folder.
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(named)?;
        Ok(Self { folder: folder.canonicalize().map_err(named)? })
    }

    fn name(volume: VolumeId) -> String {
        format!("{volume}{SUFFIX}")
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.folder.join(Self::name(volume))
    }

    /// Every volume that there is, whole.
    pub(crate) fn list(&self) -> io::Result<Vec<VolumeId>> {
        let mut volumes = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let volume = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)?.parse().ok());
            // A UUID can be written in other ways; no file of ours is.
            volumes.extend(volume.filter(|volume| name == *Self::name(*volume)));
        }
        Ok(volumes)
    }

    /// Whether there is such a volume, and if so, whether it is of this size.
    pub(crate) fn is_of_size(&self, volume: VolumeId, size: Size) -> io::Result<Option<bool>> {
        Ok(self.len(volume)?.map(|len| len == size.file_bytes()))
    }

    pub(crate) fn has(&self, volume: VolumeId) -> io::Result<bool> {
        Ok(self.len(volume)?.is_some())
    }

    fn len(&self, volume: VolumeId) -> io::Result<Option<u64>> {
        match std::fs::symlink_metadata(self.path(volume)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes one, for good when this returns. Takes milliseconds to seconds. Whoever is killed meanwhile leaves nothing.
    pub(crate) fn make(&self, volume: VolumeId, size: Size) -> io::Result<()> {
        leave_some(&self.folder, size.bytes)?;
        let image = set_aside(&self.folder, size.file_bytes())?;
        format(image.as_fd(), size.inodes, Journal::Of(JOURNAL_MIB))?;
        // Nobody else can have it, for it has no name; what the device keeps of it when this process has gone is locked, too.
        flock(&image, FlockOperation::NonBlockingLockExclusive)?;
        let Attached { device, number } = attach(image.as_fd())?;
        let mount = mount(number, &[]).map_err(at("mounting the volume's file system"))?;
        drop(device);
        let root = openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        mkdirat(&root, CONTENT, Mode::from_raw_mode(0o755))?;
        // For whatever users the sandboxes of a tenant run as, like /tmp; whatever the umask is.
        chmodat(&root, CONTENT, Mode::from_raw_mode(0o1777), AtFlags::empty())?;
        trim(root.as_fd(), size.bytes / BLOCK_BYTES, size.inodes).map_err(at("giving the volume its size"))?;
        syncfs(&root)?;
        drop((root, mount));
        fsync(&image)?;
        let folder = open(&self.folder)?;
        linkat(&image, "", &folder, Self::name(volume), AtFlags::EMPTY_PATH).map_err(|e| at("giving the volume its name")(e.into()))?;
        Ok(fsync(&folder)?)
    }

    /// Mounts one, attached nowhere; while there is a mount of it, there is the loop device, and nobody else can mount it.
    pub(crate) fn mount(&self, volume: VolumeId, manner: &Manner) -> io::Result<(OwnedFd, Loop)> {
        let image = openat(CWD, self.path(volume), OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        lock(&image)?;
        let Attached { device, number } = attach(image.as_fd())?;
        let stat = rustix::fs::fstat(&device)?;
        let mut options = Vec::new();
        if manner.is_synchronous {
            options.push(("sync", None));
        }
        if let Some(label) = &manner.label {
            options.push(("context", Some(label.as_str())));
        }
        let mount = mount(number, &options).map_err(at("mounting the volume's file system"))?;
        let device = Device { major: rustix::fs::major(stat.st_rdev), minor: rustix::fs::minor(stat.st_rdev) };
        Ok((mount, Loop { number, device }))
    }

    /// Removes one that nobody uses. No error if there is none.
    pub(crate) fn remove(&self, volume: VolumeId) -> io::Result<()> {
        match std::fs::remove_file(self.path(volume)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(fsync(open(&self.folder)?)?)
    }
}

impl Size {
    /// How large the file of such a volume is.
    fn file_bytes(self) -> u64 {
        image_bytes(self.bytes / BLOCK_BYTES + JOURNAL_BLOCKS, self.inodes)
    }
}

/// Waits until nothing is left of whoever had this file.
fn lock(image: &OwnedFd) -> io::Result<()> {
    let deadline = Instant::now() + FREE_WITHIN;
    loop {
        match flock(image, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN_AFTER),
            Err(Errno::WOULDBLOCK) => return Err(io::Error::other("somebody else has it: another keeper, or what is left of one")),
            other => return Ok(other?),
        }
    }
}
