//! The tree around a sandbox of gVisor's: what `runsc` sees of the world. The sandbox's own tree is one folder in it.
//!
//! It holds nothing of the host's but the kernel's `/proc`, `/dev/null` and its like. The payload never sees it: `runsc` serves it the folder
//! [`ROOT`] alone, from a process that has that folder as its root.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2, statat, unlinkat},
    mount::MountAttrFlags,
};

use super::{Layout, NOSUID_NODEV, attach, chown, clone_mount, devices, mount_new, open_folder, pivot, tmpfs};
use crate::{
    error::{LaunchError, Step},
    ids,
    sys::{self, MountAttributes},
};

/// The sandbox's tree: image, base layer and writable layer.
pub(crate) const ROOT: &str = "/root";
/// Our own program, for inside.
pub(crate) const TOOLS: &str = "/tools";
/// Its name there.
pub(crate) const PROGRAM: &str = "init";
/// What `runsc` is to run, as the OCI runtime spec has it.
pub(crate) const BUNDLE: &str = "/bundle";
/// What `runsc` notes for itself.
pub(crate) const STATE: &str = "/run";

/// Room for our own program, `config.json` and the notes of `runsc`. Charged to the sandbox's memory like everything else.
const BYTES: u64 = 32 << 20;
const INODES: u64 = 128;

/// Builds it around `root`, the sandbox's tree that is attached nowhere yet, and makes it this process's root. Returns its `/proc` and its `/dev/pts`.
pub(super) fn enter(layout: Layout<'_>, root: &OwnedFd) -> Result<(OwnedFd, OwnedFd), LaunchError> {
    let Layout { id_base, shm_bytes, label, .. } = layout;
    let hull = tmpfs(&[("size", BYTES), ("nr_inodes", INODES), ("mode", 0o755)], NOSUID_NODEV, label).step("mounting gVisor's root")?;
    attach(&hull, open_folder(CWD, "merged")?.as_fd()).step("attaching gVisor's root")?;
    for folder in ["proc", "dev", "tmp", ROOT, TOOLS, BUNDLE, STATE] {
        let name = folder.trim_start_matches('/');
        mkdirat(&hull, name, Mode::from_raw_mode(0o755)).step_on("making a folder for gVisor", name)?;
        chown(hull.as_fd(), name, id_base).step_on("making a folder for gVisor", name)?;
    }
    // Whole, with nothing mounted over its parts: in the namespaces that runsc makes, the kernel lets it mount a /proc of its own only where
    // it sees a whole one already (mount_too_revealing of fs/namespace.c).
    let proc = mount_new("proc", &[], NOSUID_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC, None).step("mounting /proc")?;
    attach(&proc, open_folder(hull.as_fd(), "proc")?.as_fd()).step("attaching /proc")?;
    let (_, terminals) = devices(hull.as_fd(), id_base, shm_bytes, label)?;
    attach(root, open_folder(hull.as_fd(), ROOT.trim_start_matches('/'))?.as_fd()).step("attaching the sandbox's tree")?;
    pivot(&hull)?;
    Ok((proc, terminals))
}

/// Inodes of the writable layer that `runsc` takes: where the image has no `/sys`, it makes one, and holds it open when it is removed.
pub(super) fn own_inodes(image: BorrowedFd<'_>) -> u64 {
    u64::from(statat(image, "sys", AtFlags::SYMLINK_NOFOLLOW).is_err())
}

/// Puts our own program and what `runsc` is to run where it looks for them, once the tree is entered and while this is the host's root.
pub(crate) fn furnish(program: &[u8], config: &[u8], id_base: u32) -> Result<Furniture, LaunchError> {
    write(&format!("{BUNDLE}/config.json"), config, 0o644)?;
    write(&format!("{TOOLS}/{PROGRAM}"), program, 0o755)?;
    let folder = openat2(CWD, TOOLS, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .step_on("opening a folder for gVisor", TOOLS)?;
    chown(folder.as_fd(), ".", id_base + ids::OF_GUEST).step_on("giving a folder to init", TOOLS)?;
    // Read-only for good from where the payload could come: the namespaces of runsc cannot take that back (mount_namespaces(7)).
    let cover = clone_mount(&folder, "").step_on("making read-only", TOOLS)?;
    sys::set_mount_attributes(cover.as_fd(), MountAttributes { read_only: true, nosuid: true, nodev: true, ..MountAttributes::default() })
        .step_on("making read-only", TOOLS)?;
    attach(&cover, folder.as_fd()).step_on("making read-only", TOOLS)?;
    Ok(Furniture { folder })
}

/// What lies ready for `runsc`.
#[derive(Debug)]
pub(crate) struct Furniture {
    /// The folder of our own program, below the read-only mount.
    folder: OwnedFd,
}

impl Furniture {
    /// Removes our own program, which runs: the folder that it came from stays in the payload's sight.
    pub(crate) fn clear(self) -> rustix::io::Result<()> {
        unlinkat(&self.folder, PROGRAM, AtFlags::empty())
    }
}

fn write(path: &str, content: &[u8], mode: u32) -> Result<(), LaunchError> {
    let file = File::options().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(content)).step_on("writing", path)
}
