//! The file tree of a sandbox, built by its init before the payload exists.
//!
//! Everything is mounted by descriptor, in a mount namespace that nobody else can see, onto targets that are opened without
//! following symlinks: what an image holds cannot lead a mount astray (CVE-2025-31133, CVE-2025-52565, CVE-2026-41579).

pub(crate) mod hull;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    mount::{MntFlags, umount2},
    unistd::{fchdir, pivot_root},
};
use rustix::{
    fs::{CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, makedev, mkdirat, mknodat, openat2, symlinkat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen, move_mount, open_tree,
    },
};

use crate::{
    disk,
    error::{LaunchError, Step},
    fence::{Fence, Fences},
    protocol::{
        Isolation,
        init::{Layer, Place},
    },
    sys::{self, MountAttributes},
};

/// What is particular about one sandbox's tree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout<'a> {
    /// Host id that is 0 inside.
    pub(crate) id_base: u32,
    pub(crate) layer: Layer,
    pub(crate) disk_bytes: u64,
    pub(crate) inodes: u64,
    pub(crate) shm_bytes: u64,
    pub(crate) isolation: Isolation,
    pub(crate) fences: Fences,
    /// The SELinux label of its files.
    pub(crate) label: Option<&'a str>,
    /// Of the volumes, in their order.
    pub(crate) volumes: &'a [Place],
}

/// The parts that the keeper prepares: detached mounts, read-only, mapped into the sandbox's ids.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) image: OwnedFd,
    /// Lies over the image: the mount points and the few files in `/etc` that are ours (see [`base`]).
    pub(crate) base: OwnedFd,
    /// Mounted read-write on `/image`, for unpacking.
    pub(crate) target: Option<OwnedFd>,
    /// The writable layer, with [`FOLDERS`] in it ([`crate::disk`]). Without it, it is made in memory.
    pub(crate) layer: Option<OwnedFd>,
    /// What another sandbox has written, to lie between that and the base layer ([`below_of`]).
    pub(crate) below: Option<OwnedFd>,
    /// One for each place, mapped and as writable as it may be.
    pub(crate) volumes: Vec<OwnedFd>,
}

/// What the writable layer's own file system has: the upper and the working folder of the overlay, and mount points.
pub(crate) const FOLDERS: [&str; 5] = [UPPER, "work", "merged", "image", "base"];

/// The folder of the payload's files, which belongs to the sandbox.
pub(crate) const UPPER: &str = "upper";

/// Names in the base layer. A folder in an upper layer hides a symlink below it, so these are folders in every sandbox.
pub(crate) mod base {
    pub(crate) const FOLDERS: [&str; 4] = ["proc", "dev", "etc", "image"];
    pub(crate) const HOSTNAME: &str = "sandbox";
    pub(crate) const FILES: [(&str, &str); 3] = [
        ("etc/hostname", "sandbox\n"),
        ("etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost\n"),
        ("etc/resolv.conf", "# this sandbox has no name server\n"),
    ];
}

/// Makes this process's root the sandbox's, with nothing of the host left in its mount namespace.
///
/// The working folder must be an empty folder that exists in this mount namespace: the tree is built on it.
pub(crate) fn enter(layout: Layout<'_>, parts: Parts) -> Result<Tree, LaunchError> {
    let Layout { id_base, layer, disk_bytes, inodes, shm_bytes, isolation, fences, label, volumes } = layout;
    // Modes below are meant as they stand; init sets the payload's umask later.
    rustix::process::umask(Mode::empty());
    let of_runsc = if isolation == Isolation::Gvisor { hull::own_inodes(parts.image.as_fd()) } else { 0 };
    let is_new = parts.layer.is_none();
    let writable = match parts.layer {
        Some(kept) if layer == Layer::Kept => kept,
        Some(new) => check_layer(new, disk_bytes, inodes)?,
        None => sized_tmpfs(disk_bytes, inodes + OWN_INODES + of_runsc, 0o755, NOSUID_NODEV, label)
            .step_on("mounting the writable layer", format_args!("{disk_bytes} bytes, {inodes} inodes"))?,
    };
    move_mount(&writable, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step("attaching the writable layer")?;
    fchdir(&writable).step("entering the writable layer")?;
    if is_new {
        for folder in FOLDERS {
            mkdirat(CWD, folder, Mode::from_raw_mode(0o755)).step_on("making a folder of the writable layer", folder)?;
        }
        chown(CWD, UPPER, id_base).step("giving the writable layer to the sandbox")?;
    }
    if layer == Layer::Kept {
        clear_work()?;
    }
    let upper = open_folder(CWD, UPPER)?;
    attach(&parts.image, open_folder(CWD, "image")?.as_fd()).step("attaching the image")?;
    attach(&parts.base, open_folder(CWD, "base")?.as_fd()).step("attaching the base layer")?;
    let lowerdir = match &parts.below {
        Some(below) => {
            // The place of the overlay, which is put over it when it has been made.
            attach(below, open_folder(CWD, "merged")?.as_fd()).step("attaching the layer below")?;
            take_after(below.as_fd()).step("making the root folder like the one below")?;
            "merged:base:image"
        }
        None => "base:image",
    };
    let root = overlay(lowerdir, fences, label).step("mounting the overlay")?;
    let lower = match parts.below {
        Some(_) => vec![lower_alone(lowerdir, label).step("mounting what lies below as one")?],
        None => vec![parts.base, parts.image],
    };
    if isolation == Isolation::Gvisor {
        let (proc, terminals) = hull::enter(layout, &root)?;
        return Ok(Tree { upper, lower, writable, proc, terminals, of_runsc });
    }
    attach(&root, open_folder(CWD, "merged")?.as_fd()).step("attaching the overlay")?;

    let proc = mount_new("proc", &[], NOSUID_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC, None).step("mounting /proc")?;
    attach(&proc, open_folder(root.as_fd(), "proc")?.as_fd()).step("attaching /proc")?;
    let (dev, terminals) = devices(root.as_fd(), id_base, shm_bytes, label)?;
    if fences.has(Fence::MaskedProc) {
        restrict_proc(proc.as_fd(), dev.as_fd())?;
    }
    if let Some(target) = parts.target {
        attach(&target, open_folder(root.as_fd(), "image")?.as_fd()).step("attaching the image that is being made")?;
    }
    for (place, volume) in volumes.iter().zip(&parts.volumes) {
        let folder = make_place(root.as_fd(), &place.path, id_base).spec("making the place of a volume", &place.path)?;
        attach(volume, folder.as_fd()).step_on("attaching a volume", &place.path)?;
    }

    pivot(&root)?;
    Ok(Tree { upper, lower, writable, proc, terminals, of_runsc })
}

/// Makes `root`, which is attached somewhere, this process's root, and lets go of the one that it had.
fn pivot(root: &OwnedFd) -> Result<(), LaunchError> {
    fchdir(root).step("entering the new root")?;
    // Both arguments "." stack the old root over the new one, where the next line finds it (pivot_root(2), NOTES).
    pivot_root(".", ".").step("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).step("letting go of the host's root")?;
    nix::unistd::chdir("/").step("entering the new root")
}

/// What init needs of the tree later.
#[derive(Debug)]
pub(crate) struct Tree {
    /// The writable layer, for [`rustix::fs::fstatfs`].
    pub(crate) writable: OwnedFd,
    /// The upper folder of the overlay by itself.
    pub(crate) upper: OwnedFd,
    /// What lies below it, the topmost first: the base layer and the image, each by itself; or, with a layer of another sandbox's above them, all three as one.
    pub(crate) lower: Vec<OwnedFd>,
    /// Inodes of the writable layer that were `runsc`'s.
    pub(crate) of_runsc: u64,
    /// `/proc` itself, whatever an image or a payload puts in its way.
    pub(crate) proc: OwnedFd,
    /// `/dev/pts`, in the same way.
    pub(crate) terminals: OwnedFd,
}

/// Inodes of the writable layer that are ours and not the payload's: its root, the five folders, and what the overlay makes below `work`
/// (`work`, `incompat/volatile/dirty`), and one for the overlay's extended attributes, which tmpfs charges to the inodes from Linux 6.6 on.
/// Before that the payload has this one as well.
const OWN_INODES: u64 = 11;

pub(crate) const NOSUID_NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

fn overlay(lower: &str, fences: Fences, label: Option<&str>) -> rustix::io::Result<OwnedFd> {
    let fs = new_overlay(lower, label)?;
    fsconfig_set_string(&fs, "upperdir", UPPER)?;
    fsconfig_set_string(&fs, "workdir", "work")?;
    fsconfig_set_flag(&fs, "volatile")?; // the upper layer dies with the sandbox: nothing to sync
    fsconfig_create(&fs)?;
    let mut attributes = NOSUID_NODEV;
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, fences.has(Fence::Nosuid));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, fences.has(Fence::Nodev));
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The same without the upper folder, read-only. What hides something in a layer that was another sandbox's upper folder is not all for an unprivileged process to see: the
/// kernel's mark of a folder that replaces the one below is not.
fn lower_alone(lower: &str, label: Option<&str>) -> rustix::io::Result<OwnedFd> {
    let fs = new_overlay(lower, label)?;
    fsconfig_create(&fs)?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, NOSUID_NODEV | MountAttrFlags::MOUNT_ATTR_RDONLY)
}

fn new_overlay(lower: &str, label: Option<&str>) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "lowerdir", lower)?;
    fsconfig_set_string(&fs, "xino", "off")?;
    fsconfig_set_string(&fs, "redirect_dir", "off")?;
    fsconfig_set_string(&fs, "metacopy", "off")?;
    fsconfig_set_string(&fs, "index", "off")?;
    if let Some(label) = label {
        fsconfig_set_string(&fs, "context", label)?;
    }
    Ok(fs)
}

/// Gives the upper folder the owner and the mode of the one `below` it: the root of what is seen has them of the topmost.
fn take_after(below: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let stat = rustix::fs::fstat(below)?;
    chownat(CWD, UPPER, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    rustix::fs::chmodat(CWD, UPPER, Mode::from_raw_mode(stat.st_mode & 0o7777), rustix::fs::AtFlags::empty())
}

/// Terminals of one sandbox at a time. All that there are on a machine are in one count (`kernel.pty.max`).
pub(crate) const TERMINALS_MAX: u64 = 16;

/// `/dev`: the six devices every program expects, terminals, shared memory. Read-only itself, so it can hold nothing else. Returned with its `pts`.
fn devices(root: BorrowedFd<'_>, id_base: u32, shm_bytes: u64, label: Option<&str>) -> Result<(OwnedFd, OwnedFd), LaunchError> {
    let noexec = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev = tmpfs(&[("size", 64 * 1024), ("nr_inodes", 32), ("mode", 0o755)], noexec, label).step("mounting /dev")?;
    attach(&dev, open_folder(root, "dev")?.as_fd()).step("attaching /dev")?;
    let all = Mode::from_raw_mode(0o666);
    for (name, major, minor) in [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)] {
        mknodat(&dev, name, FileType::CharacterDevice, all, makedev(major, minor)).step_on("making a device", name)?;
        chown(dev.as_fd(), name, id_base).step_on("making a device", name)?;
    }
    for (name, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlinkat(to, &dev, name).step_on("making a link in /dev", name)?;
    }
    for folder in ["pts", "shm"] {
        mkdirat(&dev, folder, Mode::from_raw_mode(0o755)).step_on("making a folder in /dev", folder)?;
    }
    chown(dev.as_fd(), ".", id_base).step("giving /dev to the sandbox")?;
    let terminal_group = u64::from(id_base) + 5;
    let mut options = vec![("ptmxmode", 0o666), ("mode", 0o620), ("max", TERMINALS_MAX)];
    // Older kernels take it for a signed number (6.1 does). Without one a terminal has the group of whoever opens it.
    if i32::try_from(terminal_group).is_ok() {
        options.push(("gid", terminal_group));
    }
    let terminals = mount_new("devpts", &options, noexec, label).step("mounting /dev/pts")?;
    attach(&terminals, open_folder(dev.as_fd(), "pts")?.as_fd()).step("attaching /dev/pts")?;
    let shared = sized_tmpfs(shm_bytes, 4096, 0o1777, noexec | NOSUID_NODEV, label).step("mounting /dev/shm")?;
    attach(&shared, open_folder(dev.as_fd(), "shm")?.as_fd()).step("attaching /dev/shm")?;
    sys::set_mount_attributes(dev.as_fd(), MountAttributes { read_only: true, ..MountAttributes::default() })
        .step("making /dev read-only")?;
    Ok((dev, terminals))
}

/// Files of proc(5) that tell about the host or reach it. The first are hidden behind `/dev/null`, the folders behind an
/// empty one; the last stay readable, since programs ask them for facts.
fn restrict_proc(proc: BorrowedFd<'_>, dev: BorrowedFd<'_>) -> Result<(), LaunchError> {
    const HIDDEN_FILES: [&str; 8] =
        ["kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "interrupts", "kallsyms"];
    const HIDDEN_FOLDERS: [&str; 3] = ["acpi", "asound", "scsi"];
    const READ_ONLY: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];
    for name in HIDDEN_FILES {
        if let Some(file) = open_existing(proc, name)? {
            let null = clone_mount(dev, "null").step_on("hiding a file of /proc", name)?;
            attach(&null, file.as_fd()).step_on("hiding a file of /proc", name)?;
        }
    }
    let mut empty = None;
    for name in HIDDEN_FOLDERS {
        let Some(folder) = open_existing(proc, name)? else { continue };
        let cover = match &empty {
            None => tmpfs(&[("size", 4096), ("nr_inodes", 1), ("mode", 0o555)], NOSUID_NODEV | MountAttrFlags::MOUNT_ATTR_RDONLY, None),
            Some(first) => clone_mount(first, ""),
        };
        let cover = cover.step_on("hiding a folder of /proc", name)?;
        attach(&cover, folder.as_fd()).step_on("hiding a folder of /proc", name)?;
        empty = Some(cover);
    }
    for name in READ_ONLY {
        let Some(target) = open_existing(proc, name)? else { continue };
        let same = clone_mount(&target, "").step_on("making a part of /proc read-only", name)?;
        let attributes = MountAttributes { read_only: true, nosuid: true, nodev: true, noexec: true, idmap: None };
        sys::set_mount_attributes(same.as_fd(), attributes).step_on("making a part of /proc read-only", name)?;
        attach(&same, target.as_fd()).step_on("making a part of /proc read-only", name)?;
    }
    Ok(())
}

/// A detached clone of one mount, mapped to the ids of `namespace`, with nothing of it writable, executable as root, or a device.
pub(crate) fn map_layer(folder: BorrowedFd<'_>, namespace: BorrowedFd<'_>, read_only: bool) -> std::io::Result<OwnedFd> {
    let mount = clone_mount(folder, "")?;
    let attributes = MountAttributes { read_only, nosuid: true, nodev: true, noexec: false, idmap: Some(namespace) };
    sys::set_mount_attributes(mount.as_fd(), attributes)?;
    Ok(mount)
}

/// The files of the volume behind loop device `number`, mapped to the ids of `namespace`: as they are numbered in its file system they are numbered in every sandbox.
/// It is mounted already; this is one more mount of the same, which passes over the working folder of the calling process.
pub(crate) fn map_volume(number: u32, label: Option<&str>, namespace: BorrowedFd<'_>, read_only: bool) -> std::io::Result<OwnedFd> {
    let fs = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", format!("/dev/loop{number}"))?;
    if let Some(label) = label {
        fsconfig_set_string(&fs, "context", label)?;
    }
    fsconfig_create(&fs)?;
    let whole = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, NOSUID_NODEV)?;
    // Of what is attached nowhere no part can be cloned before Linux 6.15. Here it stays until this process lets go of the host's root.
    move_mount(&whole, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let content = clone_mount(&whole, disk::volume::CONTENT)?;
    let attributes = MountAttributes { read_only, nosuid: true, nodev: true, noexec: false, idmap: Some(namespace) };
    sys::set_mount_attributes(content.as_fd(), attributes)?;
    Ok(content)
}

/// The folder of this path below `root`, made where it is missing. No link is followed and no other mount entered: what an image, or a payload before, put in
/// the way leads nowhere.
fn make_place(root: BorrowedFd<'_>, path: &str, id_base: u32) -> std::io::Result<OwnedFd> {
    let resolve = NO_LINKS | ResolveFlags::NO_XDEV;
    let open =
        |at: BorrowedFd<'_>, name: &str| openat2(at, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve);
    let mut folder = root.try_clone_to_owned()?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        folder = match open(folder.as_fd(), name) {
            Err(rustix::io::Errno::NOENT) => {
                mkdirat(&folder, name, Mode::from_raw_mode(0o755))?;
                chown(folder.as_fd(), name, id_base)?;
                open(folder.as_fd(), name)?
            }
            Err(rustix::io::Errno::LOOP) => return Err(std::io::Error::other(format!("{name} is a link"))),
            found => found?,
        };
    }
    Ok(folder)
}

pub(crate) fn clone_mount(folder: impl AsFd, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(folder, name, flags)
}

fn tmpfs(options: &[(&str, u64)], attributes: MountAttrFlags, label: Option<&str>) -> rustix::io::Result<OwnedFd> {
    mount_new("tmpfs", options, attributes, label)
}

/// One that a payload can fill: its limits are read back.
fn sized_tmpfs(bytes: u64, inodes: u64, mode: u64, attributes: MountAttrFlags, label: Option<&str>) -> std::io::Result<OwnedFd> {
    let mount = tmpfs(&[("size", bytes), ("nr_inodes", inodes), ("mode", mode)], attributes, label)?;
    let space = rustix::fs::fstatfs(&mount)?;
    // The kernel counts whole pages, and rounds up (tmpfs(5)).
    compare("blocks", space.f_blocks, bytes.div_ceil(u64::try_from(space.f_bsize).map_err(std::io::Error::other)?))?;
    compare("inodes", space.f_files, inodes)?;
    Ok(mount)
}

/// A layer in memory that is not the sandbox's own making: as init would make it, with [`FOLDERS`] in it.
pub(crate) fn memory_layer(bytes: u64, inodes: u64, id_base: u32, label: Option<&str>) -> std::io::Result<OwnedFd> {
    let layer = sized_tmpfs(bytes, inodes + OWN_INODES, 0o755, NOSUID_NODEV, label)?;
    for folder in FOLDERS {
        mkdirat(&layer, folder, Mode::from_raw_mode(0o755))?;
    }
    chown(layer.as_fd(), UPPER, id_base)?;
    Ok(layer)
}

/// Two mounts of the same, attached nowhere: one for a sandbox, which dies with its namespace, and one that stays. `mount` itself ends with this process: what is
/// attached nowhere cannot be cloned before Linux 6.15, so it is attached here first, in a namespace that nobody else sees.
pub(crate) fn two_of(mount: &OwnedFd) -> std::io::Result<[OwnedFd; 2]> {
    attach_unseen(mount)?;
    Ok([clone_mount(mount, "")?, clone_mount(mount, "")?])
}

/// The same for a sandbox that is to have the layer below its own: the first is what another one has written, [`UPPER`] alone, and nobody can write through it.
pub(crate) fn below_of(mount: &OwnedFd) -> std::io::Result<[OwnedFd; 2]> {
    attach_unseen(mount)?;
    let kept = clone_mount(mount, "")?;
    let below = clone_mount(mount, UPPER)?;
    let attributes = MountAttributes { read_only: true, nosuid: true, nodev: true, ..MountAttributes::default() };
    sys::set_mount_attributes(below.as_fd(), attributes)?;
    Ok([below, kept])
}

fn attach_unseen(mount: &OwnedFd) -> std::io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    Ok(move_mount(mount, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Removes what the overlay before this one left for itself: its mark of a mount without syncs among it, over which the kernel mounts no other (overlayfs.rst,
/// «Volatile mount»). The file system has been there all the time, so that nothing of it can be missing. No payload has ever seen this folder.
fn clear_work() -> Result<(), LaunchError> {
    for entry in std::fs::read_dir("work").step_on("reading", "work")? {
        let path = entry.step_on("reading", "work")?.path();
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => std::fs::remove_file(&path),
            other => other,
        }
        .step_on("removing", path.display())?;
    }
    Ok(())
}

/// A layer on disk must have exactly the room that was promised.
fn check_layer(layer: OwnedFd, bytes: u64, inodes: u64) -> Result<OwnedFd, LaunchError> {
    let check = || -> std::io::Result<()> {
        let space = rustix::fs::fstatfs(&layer)?;
        let block_bytes = u64::try_from(space.f_bsize).map_err(std::io::Error::other)?;
        compare("free bytes", space.f_bavail * block_bytes, (bytes / disk::BLOCK_BYTES + disk::OWN_BLOCKS) * disk::BLOCK_BYTES)?;
        compare("free inodes", space.f_ffree, inodes + disk::OWN_INODES)
    };
    check().step("reading back the limits of the writable layer")?;
    Ok(layer)
}

fn compare(what: &str, found: u64, wanted: u64) -> std::io::Result<()> {
    if found == wanted { Ok(()) } else { Err(std::io::Error::other(format!("it has {found} {what} instead of {wanted}"))) }
}

/// A new file system, mounted nowhere yet, its files under an SELinux label if one is given. `mode` options are octal in text, as mount(8) has them.
fn mount_new(kind: &str, options: &[(&str, u64)], attributes: MountAttrFlags, label: Option<&str>) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        let value = if key.ends_with("mode") { format!("{value:o}") } else { value.to_string() };
        fsconfig_set_string(&fs, *key, value)?;
    }
    if let Some(label) = label {
        fsconfig_set_string(&fs, "context", label)?;
    }
    fsconfig_create(&fs)?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Puts a detached mount on the file or folder that `target` refers to.
fn attach(mount: impl AsFd, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

const NO_LINKS: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

fn open_folder(at: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, LaunchError> {
    openat2(at, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), NO_LINKS).step_on("opening a mount point", name)
}

fn open_existing(at: BorrowedFd<'_>, name: &str) -> Result<Option<OwnedFd>, LaunchError> {
    match openat2(at, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), NO_LINKS) {
        Ok(found) => Ok(Some(found)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error).step_on("opening a part of /proc", name),
    }
}

pub(crate) fn chown(at: BorrowedFd<'_>, name: &str, id: u32) -> rustix::io::Result<()> {
    chownat(at, name, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use rustix::fs::openat;

    use super::*;

    /// Needs root, as what it tests does.
    #[test]
    fn the_place_of_a_volume_is_never_behind_a_link() {
        let (tree, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(outside.path(), tree.path().join("out")).unwrap();
        let root: OwnedFd = std::fs::File::open(tree.path()).unwrap().into();
        let make = |path: &str| make_place(root.as_fd(), path, 0);

        assert!(make("/out").is_err() && make("/out/below").is_err());
        assert!(make("/a/b").is_ok() && tree.path().join("a/b").is_dir());

        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        // The control: by path alone it is made outside.
        mkdirat(openat(&root, "out", OFlags::PATH, Mode::empty()).unwrap(), "below", Mode::from_raw_mode(0o755)).unwrap();
        assert!(outside.path().join("below").is_dir());
    }

    #[test]
    fn the_place_of_a_volume_is_on_no_other_mount() {
        let root: OwnedFd = std::fs::File::open("/").unwrap().into();
        assert!(make_place(root.as_fd(), "/proc/self", 0).is_err());
        assert!(openat2(&root, "proc/1", OFlags::PATH | OFlags::DIRECTORY, Mode::empty(), NO_LINKS).is_ok(), "the control: there it is");
    }
}
