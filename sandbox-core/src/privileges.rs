//! Giving up root: for the service, for init, and for the payload.

use std::io;

use nix::unistd::{Gid, Uid};
use rustix::thread::CapabilitiesSecureBits;

use crate::sys;

/// Capabilities of capabilities(7) as a bit mask, bit n for capability number n.
pub const CHOWN: u64 = 1;
pub const DAC_OVERRIDE: u64 = 1 << 1;
pub const FOWNER: u64 = 1 << 3;
pub const FSETID: u64 = 1 << 4;
pub const KILL: u64 = 1 << 5;
pub const SETGID: u64 = 1 << 6;
pub const SETUID: u64 = 1 << 7;
pub const SETPCAP: u64 = 1 << 8;
pub const NET_BIND_SERVICE: u64 = 1 << 10;
const DAC_READ_SEARCH: u64 = 1 << 2;
const SYS_CHROOT: u64 = 1 << 18;
pub const SYS_ADMIN: u64 = 1 << 21;

/// What init keeps inside its user namespace: to prepare the payload's folder, to become its user, to end it. They reach
/// only what the sandbox's own ids own.
pub const OF_INIT: u64 = CHOWN | DAC_OVERRIDE | FOWNER | KILL | SETGID | SETUID;

/// What is kept by a child of init's that works on the sandbox's files: those of any of its owners, and nothing but files.
pub const OF_TREE: u64 = CHOWN | DAC_OVERRIDE | FOWNER;

/// The most that a payload may ask for, as its user 0: Docker's default set without MKNOD, NET_RAW, SYS_CHROOT, AUDIT_WRITE, SETPCAP and SETFCAP.
/// What package managers and servers that drop root need; over the sandbox's own ids alone.
pub const OF_ROOT_IMAGE: u64 = CHOWN | DAC_OVERRIDE | FOWNER | FSETID | KILL | NET_BIND_SERVICE | SETGID | SETUID;

/// What unpacking an image needs: files of any owner inside its id range, with their set-id bits.
pub const OF_UNPACK: u64 = CHOWN | DAC_OVERRIDE | FOWNER | FSETID;

/// What `runsc` needs inside the sandbox's user namespace: to put its two processes into namespaces and roots of their own, and to serve
/// files of any of the sandbox's owners. It owns no namespace of ours, so none of this reaches past the mounts that it makes itself.
pub const OF_RUNSC: u64 = CHOWN | DAC_OVERRIDE | DAC_READ_SEARCH | FOWNER | FSETID | SETGID | SETUID | SYS_CHROOT | SYS_ADMIN;

/// What our own program has under gVisor's kernel until it has prepared the payload's surroundings. None of it is the host's.
pub const OF_GUEST: u64 = OF_INIT | OF_ROOT_IMAGE | SETPCAP | SYS_ADMIN;

/// Makes this process an ordinary user for good: no groups, the ids, no capabilities in any set, `no_new_privs`.
///
/// Call it while the process has one thread: capabilities belong to threads, and one that is left behind would keep them.
pub fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    nix::unistd::setgroups(&[])?;
    limit_bounding_set(0)?;
    let gid = Gid::from_raw(gid);
    nix::unistd::setresgid(gid, gid, gid)?;
    let uid = Uid::from_raw(uid);
    nix::unistd::setresuid(uid, uid, uid)?;
    sys::set_capabilities(0)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// Takes every capability that is not in `mask` out of the bounding set, so that no execve can ever bring it back.
pub fn limit_bounding_set(mask: u64) -> io::Result<()> {
    sys::capabilities_known().filter(|number| mask & (1 << number) == 0).try_for_each(sys::drop_from_bounding_set)
}

/// User id 0 gets no capabilities from being 0, neither at execve nor at set*uid, and nothing undoes that.
pub fn disarm_root() -> io::Result<()> {
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits)?;
    Ok(())
}
