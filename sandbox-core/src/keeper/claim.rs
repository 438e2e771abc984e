//! What a keeper takes for itself when it starts — its number, its folders, its socket — and what it sweeps away of those that died.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use super::{Options, SANDBOXES_MAX, monotonic_ns, store, warn};
use crate::{
    cgroup::{Device, Devices, Tree},
    disk::Disks,
    fence::{Fence, Fences},
    ids,
};

/// How many keepers fit beside each other on one machine.
const KEEPERS_MAX: u32 = 16;
/// How long a keeper that is starting waits for the last of the one before to let go of the logs.
const LOGS_WITHIN_NS: u64 = 5_000_000_000;

/// The lowest number that no living keeper of this machine has. The lock goes with the process.
pub(super) fn claim_number(run: &Path) -> io::Result<(u32, OwnedFd)> {
    fs::create_dir_all(run)?;
    for number in 0..KEEPERS_MAX {
        if let Some(lock) = try_lock(run, number)? {
            return Ok((number, lock));
        }
    }
    Err(io::Error::other(format!("{KEEPERS_MAX} keepers run on this machine already")))
}

/// The lock of keeper `number`, if none is alive that holds it.
fn try_lock(run: &Path, number: u32) -> io::Result<Option<OwnedFd>> {
    let file = File::options().create(true).append(true).open(run.join(format!("keeper-{number}.lock")))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The folder of logs, made if it is missing, for this keeper alone: another one that found logs without an end there would take their sandboxes for dead.
pub(super) fn claim_logs(logs: &Path, group: u32) -> io::Result<OwnedFd> {
    match DirBuilder::new().mode(0o750).create(logs) {
        Ok(()) => chown(logs, None, Some(group))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", logs.display()))),
    }
    let folder = File::open(logs).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", logs.display())))?;
    let deadline = monotonic_ns() + LOGS_WITHIN_NS;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder.into()),
            // A keeper that was killed a moment ago may have a child left that dies of it.
            Err(Errno::WOULDBLOCK) if monotonic_ns() < deadline => std::thread::sleep(std::time::Duration::from_millis(5)),
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other(format!("another keeper writes its logs to {}", logs.display())));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The first host id of the ranges of keeper `number`.
pub(super) fn first_id(number: u32) -> u32 {
    ids::FIRST + number * SANDBOXES_MAX * ids::RANGE
}

/// What the cgroups of keeper `number` are called.
pub(super) fn name_of(number: u32) -> String {
    format!("k{number}")
}

/// Removes the cgroups and folders of keepers that were killed; their processes died with them. Lock files stay: a lock on one that
/// is deleted would be no lock.
pub(super) fn sweep_dead_keepers(run: &Path, own: u32) -> io::Result<()> {
    for number in (0..KEEPERS_MAX).filter(|number| *number != own && stage_of(run, *number).exists()) {
        if let Some(_lock) = try_lock(run, number)? {
            let swept = Tree::open(&name_of(number), Devices::default())
                .and_then(|tree| tree.remove())
                .and_then(|()| fs::remove_dir(stage_of(run, number)));
            if let Err(error) = swept {
                // Not ours: the next keeper tries again.
                warn(format_args!("what keeper {number} left could not be removed: {error}"));
            }
        }
    }
    Ok(())
}

/// Removes what is left of writable layers of keeper `own`, and of those that no living keeper has.
pub(super) fn sweep_disks(disks: &Disks, run: &Path, own: u32) -> io::Result<()> {
    for number in 0..KEEPERS_MAX {
        let first = first_id(number);
        let is_of_number = |id: u32| (first..first_id(number + 1)).contains(&id);
        let left = disks.left(is_of_number)?;
        let lock = if number == own || left.is_empty() { None } else { try_lock(run, number)? };
        if number == own || lock.is_some() {
            left.iter().try_for_each(|folder| store::remove_in_background(folder))?;
        }
    }
    Ok(())
}

/// The disks below the folders that sandboxes reach.
pub(super) fn devices(options: &Options) -> io::Result<Devices> {
    let of = |folder: &Path| {
        let device = Device::of(folder)?;
        if device.is_none() {
            warn(format_args!("{} is on no block device: what sandboxes read and write there has no limit of rate", folder.display()));
        }
        Ok::<_, io::Error>(device)
    };
    Ok(Devices { images: of(&options.images)?, disks: of(&options.disks)?, volumes: of(&options.volumes)? })
}

/// The empty folder that the sandboxes of keeper `number` build their trees on.
pub(super) fn stage_of(run: &Path, number: u32) -> PathBuf {
    run.join(format!("stage-{number}"))
}

/// A listening socket that root and the service's group may connect to. One that a dead keeper left is replaced.
pub(super) fn listen_at(options: &Options) -> io::Result<OwnedFd> {
    match fs::remove_file(&options.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let old = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = bind(&socket, &SocketAddrUnix::new(&options.socket)?);
    rustix::process::umask(old);
    bound?;
    chown(&options.socket, None, Some(options.group))?;
    fs::set_permissions(&options.socket, PermissionsExt::from_mode(0o660))?;
    listen(&socket, 64)?;
    Ok(socket)
}

/// The fences that sandboxes on this host have, once they are set up.
pub(super) fn fences(options: &Options) -> io::Result<Fences> {
    let mut fences = Fences::everywhere();
    let mut missing = String::new();
    if crate::landlock::is_available() {
        fences = fences.with(Fence::Landlock);
    }
    if crate::apparmor::is_enabled() {
        match crate::apparmor::load() {
            Ok(()) => fences = fences.with(Fence::Apparmor),
            Err(error) => {
                warn(format_args!("sandboxes run without AppArmor: {error}"));
                missing = format!(" ({error})");
            }
        }
    }
    if let Some(labels) = &options.labels {
        crate::selinux::check(labels)?;
        fences = fences.with(Fence::Selinux);
    }
    let lacking = options.required.without(fences);
    if lacking.is_empty() {
        return Ok(fences);
    }
    let names: Vec<&str> = lacking.iter().map(Fence::name).collect();
    Err(io::Error::other(format!("this host lacks a fence that it must have: {}{missing}", names.join(", "))))
}

/// What the kernel is to kill last when the machine runs out of memory (proc_pid_oom_score_adj(5)): with the keeper, every sandbox would go.
const OOM_SCORE_ADJ: &str = "-999";

/// Protects the keeper where it may: lowering the value takes CAP_SYS_RESOURCE. Where it may not, that is said.
pub(super) fn protect_from_oom() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        warn(format_args!("the kernel may kill the keeper for want of memory like anybody else: lowering oom_score_adj failed: {error}"));
    }
}

/// The same for a child that the keeper needs as itself. The keeper has said already what it may not.
pub(super) fn protect_child_from_oom() {
    drop(fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ));
}

/// Takes that protection from a child that is no keeper. No error where there is none to take.
pub(super) fn expose_to_oom() {
    drop(fs::write("/proc/self/oom_score_adj", "0"));
}
