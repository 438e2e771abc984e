//! A layer in a file without a name, behind a loop device: when its mount is gone, so are the device, the file and its space.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, FallocateFlags, FileType, Mode, OFlags, fallocate, fstatfs, mkdirat, mknodat, openat},
    mount::{
        FsMountFlags, FsOpenFlags, FsPickFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount,
        fsopen, fspick,
    },
};

use super::{BLOCK_BYTES, Made, OWN_BLOCKS, OWN_INODES, Order, make_folders};
use crate::{cgroup::Device, error::at, rootfs::NOSUID_NODEV, sys};

pub(super) fn make(folder: &Path, order: Order) -> io::Result<(OwnedFd, Made)> {
    let image = set_aside(folder, image_bytes(order.bytes / BLOCK_BYTES + OWN_BLOCKS, order.inodes))?;
    format(image.as_fd(), order.inodes, Journal::None)?;
    let Attached { device, number } = attach(image.as_fd())?;
    let stat = rustix::fs::fstat(&device)?;
    // Nothing in it has to outlast a crash, and a payload's flushes would become the node's.
    let mount = mount(number, &[("nobarrier", None)]).map_err(at("mounting the layer's file system"))?;
    // From here on the mount alone holds the device, and the device the file.
    drop((device, image));
    let root = openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    make_folders(root.as_fd(), order.id_base).map_err(at("making the layer's folders"))?;
    let (blocks, inodes) = (order.bytes / BLOCK_BYTES + OWN_BLOCKS, order.inodes + OWN_INODES);
    trim(root.as_fd(), blocks, inodes).map_err(at("giving the layer its size"))?;
    if order.is_synchronous {
        let fs = fspick(&mount, "", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
        fsconfig_set_flag(&fs, "sync")?;
        fsconfig_reconfigure(&fs).map_err(|e| at("making the layer synchronous")(e.into()))?;
    }
    let device = Device { major: rustix::fs::major(stat.st_rdev), minor: rustix::fs::minor(stat.st_rdev) };
    Ok((mount, Made { device: Some(device) }))
}

/// Blocks of one group (a bitmap of one block).
const GROUP_BLOCKS: u64 = 8 * BLOCK_BYTES;
/// Inodes whose table fills one block.
const BLOCK_INODES: u64 = 16;

/// A file without a name, with its space set aside.
pub(super) fn set_aside(folder: &Path, bytes: u64) -> io::Result<OwnedFd> {
    let image = openat(CWD, folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))
        .map_err(|e| at(format_args!("making a file in {}", folder.display()))(e.into()))?;
    fallocate(&image, FallocateFlags::empty(), 0, bytes)
        .map_err(|e| at(format_args!("setting {bytes} bytes aside in {}", folder.display()))(e.into()))?;
    Ok(image)
}

/// How large a file must be for a file system that has room for at least so many blocks and inodes. What is too much is taken away by [`trim`].
pub(super) fn image_bytes(blocks: u64, inodes: u64) -> u64 {
    // Root, lost+found (four), the folders, the overlay's, and those of `spare`.
    let content = blocks + 32;
    let tables = inodes / BLOCK_INODES + 4;
    // Of each group: two bitmaps, a block of inodes that rounding may add. Of some: the superblock and descriptors of 32 bytes.
    let groups = (content + tables) / GROUP_BLOCKS + 2;
    let descriptors = groups * 32 / BLOCK_BYTES + 1;
    let blocks = content + tables + groups * 4 + groups.min(24) * (1 + descriptors);
    // ext4 keeps a fiftieth for itself, and never more than this (`s_resv_clusters`).
    let blocks = blocks + (blocks / 49 + 1).min(4096);
    // A last group too small for its own tables would be left out.
    let last = blocks % GROUP_BLOCKS;
    let least = tables / groups.saturating_sub(1).max(1) + 128;
    let blocks = if blocks > GROUP_BLOCKS && last < least { blocks + least - last } else { blocks };
    blocks * BLOCK_BYTES
}

/// Whether somebody looks at a file system after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Journal {
    None,
    /// Of so many MiB.
    Of(u64),
}

/// Makes the file system. No table is written, since the file reads as zeroes.
pub(super) fn format(image: BorrowedFd<'_>, inodes: u64, journal: Journal) -> io::Result<()> {
    const FEATURES: &str =
        "none,dir_index,dir_nlink,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super,uninit_bg,verity";
    let (features, size) = match journal {
        Journal::None => (FEATURES.to_owned(), None),
        Journal::Of(mib) => (format!("{FEATURES},has_journal"), Some(format!("size={mib}"))),
    };
    let inodes = (inodes + 64).to_string();
    let mut arguments =
        vec!["mke2fs", "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-e", "remount-ro", "-N", &inodes, "-O", &features];
    arguments.extend(size.iter().flat_map(|size| ["-J", size]));
    // Discarding would give back the space that was set aside.
    arguments.extend(["-E", "nodiscard,assume_storage_prezeroed=1", "/proc/self/fd/3"]);
    let said = run(&["/usr/sbin/mke2fs", "/sbin/mke2fs"], &arguments, image)?;
    if let Some(said) = said { Err(io::Error::other(format!("mke2fs failed: {}", said.trim()))) } else { Ok(()) }
}

/// Runs the first of these programs that exists, with `file` as its descriptor 3. What it said, if it failed.
fn run(programs: &[&str], arguments: &[&str], file: BorrowedFd<'_>) -> io::Result<Option<String>> {
    let (said, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let maker = nix::unistd::getpid();
    let child = match sys::clone3(nix::sched::CloneFlags::empty(), true, None)? {
        sys::Cloned::Parent(child) => child,
        sys::Cloned::Child => {
            let failed = become_program(programs, arguments, file, tell.as_fd(), maker);
            drop(File::from(tell).write_all(failed.to_string().as_bytes()));
            std::process::exit(127)
        }
    };
    drop(tell);
    let mut text = Vec::new();
    File::from(said).read_to_end(&mut text)?;
    let status = sys::reap(child.pid, true)?.map(|(_, status)| status);
    let is_done = status == Some(crate::protocol::init::WaitStatus::Exited { code: 0 });
    Ok((!is_done).then(|| String::from_utf8_lossy(&text).into_owned()))
}

/// Comes back only with a failure.
fn become_program(
    programs: &[&str],
    arguments: &[&str],
    file: BorrowedFd<'_>,
    output: BorrowedFd<'_>,
    maker: nix::unistd::Pid,
) -> io::Error {
    let steps = || -> io::Result<std::convert::Infallible> {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        if nix::unistd::getppid() != maker {
            return Err(io::Error::other("the one who asked is gone"));
        }
        // Out of the way of the numbers that are given out here.
        let (file, output) = (rustix::io::fcntl_dupfd_cloexec(file, 10)?, rustix::io::fcntl_dupfd_cloexec(output, 10)?);
        for (descriptor, number) in [(&output, 1), (&output, 2), (&file, 3)] {
            sys::place_at(descriptor.as_fd(), number)?;
        }
        let c_string = |text: &str| std::ffi::CString::new(text).map_err(io::Error::other);
        let arguments = arguments.iter().map(|argument| c_string(argument)).collect::<io::Result<Vec<_>>>()?;
        let mut failed = nix::Error::ENOENT;
        for program in programs {
            // The machine's own defaults are no business of ours.
            failed = match nix::unistd::execve(&c_string(program)?, &arguments, &[c"MKE2FS_CONFIG=/dev/null"]) {
                Err(error) => error,
                Ok(never) => match never {},
            };
        }
        Err(io::Error::new(io::Error::from(failed).kind(), format!("starting {} failed: {failed}", programs.join(" or "))))
    };
    match steps() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// A loop device before an image.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) device: OwnedFd,
    pub(super) number: u32,
}

/// Puts a loop device before the image. Other keepers look for a free one at the same time, and may be faster with the one that was found.
pub(super) fn attach(image: BorrowedFd<'_>) -> io::Result<Attached> {
    const TRIES_MAX: u32 = 1000;
    let open = |path: &str| openat(CWD, path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| at(path.to_owned())(e.into()));
    let control = open("/dev/loop-control")?;
    for _ in 0..TRIES_MAX {
        let number = sys::free_loop_device(control.as_fd()).map_err(at("finding a free loop device"))?;
        let device = open(&format!("/dev/loop{number}"))?;
        match sys::configure_loop_device(device.as_fd(), image, 4096) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(at(format_args!("setting up loop device {number}"))(error)),
            Ok(()) => return Ok(Attached { device, number }),
        }
    }
    Err(io::Error::other("every free loop device was somebody else's a moment later"))
}

/// Mounts the file system behind a loop device with these options, some of which have a value.
pub(super) fn mount(number: u32, options: &[(&str, Option<&str>)]) -> io::Result<OwnedFd> {
    let fs = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", format!("/dev/loop{number}"))?;
    fsconfig_set_flag(&fs, "noinit_itable")?;
    for (name, value) in options {
        match value {
            Some(value) => fsconfig_set_string(&fs, *name, *value)?,
            None => fsconfig_set_flag(&fs, *name)?,
        }
    }
    fsconfig_create(&fs)?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, NOSUID_NODEV)?;
    // Turning a part of a reserved stretch into zeroes would tell the loop device to give the file's space back.
    let zeroing = format!("/sys/fs/ext4/loop{number}/extent_max_zeroout_kb");
    std::fs::write(&zeroing, "0").map_err(at(&zeroing))?;
    Ok(mount)
}

/// Takes away what rounding gave too much, inodes first: so many of both stay free.
pub(super) fn trim(root: BorrowedFd<'_>, blocks: u64, inodes: u64) -> io::Result<()> {
    mkdirat(root, "spare", Mode::from_raw_mode(0o700))?;
    let spare = openat(root, "spare", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let filler = openat(&spare, "filler", OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
    let surplus = fstatfs(root)?.f_ffree.checked_sub(inodes).ok_or_else(|| io::Error::other("it has too few inodes"))?;
    for number in 0..surplus {
        mknodat(&spare, format!("{number:x}"), FileType::RegularFile, Mode::from_raw_mode(0o600), 0)?;
    }
    let surplus = || fstatfs(root).map(|space| space.f_bavail.checked_sub(blocks));
    let mut taken = 0;
    // One stroke, then one by one: what the file's own map takes is not known before.
    while let Some(left) = surplus()?.filter(|left| *left > 0) {
        let more = if left > 16 { left - 8 } else { 1 };
        fallocate(&filler, FallocateFlags::empty(), taken * BLOCK_BYTES, more * BLOCK_BYTES)?;
        taken += more;
    }
    if surplus()?.is_none() && taken > 0 {
        rustix::fs::ftruncate(&filler, (taken - 1) * BLOCK_BYTES)?;
    }
    match surplus()? {
        Some(0) => Ok(()),
        other => Err(io::Error::other(format!("it has {other:?} blocks too much"))),
    }
}
