//! The raw system calls that no library of ours offers, each behind a small safe function.
#![expect(unsafe_code, reason = "the one place for system calls that rustix and nix lack")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    sched::CloneFlags,
    sys::signal::{SigAction, SigHandler, Signal},
};

use crate::protocol::init::WaitStatus;

/// Which side of a [`clone3`] this is.
#[derive(Debug)]
pub(crate) enum Cloned {
    Parent(Child),
    Child,
}

/// A child process that only its parent can reap, so its id cannot be anybody else's until then.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: libc::pid_t,
    /// Readable when the child is dead (pidfd_open(2)).
    pub(crate) pidfd: OwnedFd,
}

/// clone3(2) with fork semantics: the child goes on from here with a copy of the memory.
///
/// The caller must have one thread. A child of a threaded process would inherit locks that nobody will ever release; this is
/// checked, and such a call fails with [`io::ErrorKind::Unsupported`]. `cgroup` is the folder of a cgroup v2 to be born in.
pub(crate) fn clone3(flags: CloneFlags, is_vfork: bool, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    let namespaces = u64::try_from(flags.bits()).map_err(io::Error::other)?;
    let mut flags = namespaces | libc::CLONE_PIDFD as u64;
    if is_vfork {
        flags |= libc::CLONE_VFORK as u64;
    }
    let mut cgroup_fd = 0;
    if let Some(cgroup) = cgroup {
        flags |= CLONE_INTO_CGROUP;
        cgroup_fd = u64::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?;
    }
    // SAFETY: clone_args is plain integers, for which all zeroes is a value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup_fd;
    if thread_count()? != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a process with several threads must not clone"));
    }
    // SAFETY: without CLONE_VM the child has its own copy of this stack and heap, so both sides may return from here. There is
    // one thread (checked above), so no lock of the allocator is held by a thread that the child lacks. `args` and `pidfd`
    // outlive the call; the kernel writes to `pidfd` before it returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => {
            let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
            // SAFETY: the kernel stored a new descriptor here (CLONE_PIDFD), and nothing else knows its number.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent(Child { pid, pidfd }))
        }
    }
}

/// clone(2) with a copy of the memory, like fork(2), but the caller sleeps until the child has called execve or ended (`CLONE_VFORK`).
///
/// For a process under our own filter, which refuses clone3. Returns the child's id, and `None` in the child. Fails like [`clone3`] with
/// several threads.
pub(crate) fn clone_and_sleep() -> io::Result<Option<libc::pid_t>> {
    if thread_count()? != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a process with several threads must not clone"));
    }
    // SAFETY: without CLONE_VM the child has its own copy of this stack and heap, so both sides may return from here, and there is one
    // thread (checked above). A stack of 0 means "this one"; the other arguments are not used without their flags.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => libc::pid_t::try_from(pid).map(Some).map_err(io::Error::other),
    }
}

/// `CLONE_INTO_CGROUP` of linux/sched.h; the constant of the libc crate overflows its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// How many threads this process has: the links of `/proc/self/task`, less the folder's own two (proc_pid_task(5)).
fn thread_count() -> io::Result<u64> {
    let task = rustix::fs::stat("/proc/self/task").map_err(io::Error::from)?;
    Ok(task.st_nlink.saturating_sub(2))
}

/// Attributes for [`set_mount_attributes`], by the names of mount_setattr(2).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MountAttributes<'a> {
    pub(crate) read_only: bool,
    pub(crate) nosuid: bool,
    pub(crate) nodev: bool,
    pub(crate) noexec: bool,
    /// Shift ids by the maps of this user namespace (`MOUNT_ATTR_IDMAP`).
    pub(crate) idmap: Option<BorrowedFd<'a>>,
}

/// mount_setattr(2) on the mount behind `mount`, made private too: a detached clone of a shared mount stays shared
/// otherwise, and what is mounted on it would appear on the host.
pub(crate) fn set_mount_attributes(mount: BorrowedFd<'_>, attributes: MountAttributes<'_>) -> io::Result<()> {
    let mut set = 0;
    for (is_wanted, bit) in [
        (attributes.read_only, libc::MOUNT_ATTR_RDONLY),
        (attributes.nosuid, libc::MOUNT_ATTR_NOSUID),
        (attributes.nodev, libc::MOUNT_ATTR_NODEV),
        (attributes.noexec, libc::MOUNT_ATTR_NOEXEC),
        (attributes.idmap.is_some(), libc::MOUNT_ATTR_IDMAP),
    ] {
        if is_wanted {
            set |= bit;
        }
    }
    let userns_fd = match attributes.idmap {
        Some(namespace) => u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
        None => 0,
    };
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd };
    // SAFETY: the path is a C string of no length, allowed by AT_EMPTY_PATH; the kernel reads `size_of` bytes of `attr`, which is
    // borrowed for the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Installs `program` on the calling thread, for good. `no_new_privs` must already be set.
pub(crate) fn set_seccomp_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `filter` and the `len` instructions behind it, both borrowed for the whole call. It copies them
    // and never writes through the pointer, so casting away const is sound.
    let rc = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor from `first` up (close_range(2)).
///
/// Only for a child that works by path and then exits: what it copied from its parent stays open for as long as it lives otherwise, and
/// nothing in it may use an owner of one of these again.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: takes numbers only. That no owner of a closed descriptor acts any more is what this function's contract asks.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Marks every descriptor from `first` up close-on-exec (close_range(2)).
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: takes numbers only, and closes nothing now.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes `number` refer to what `descriptor` does, without close-on-exec, and gives up owning it: for a child before execve.
pub(crate) fn place_at(descriptor: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    if descriptor.as_raw_fd() == number {
        return rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).map_err(Into::into);
    }
    // SAFETY: takes numbers only. Whoever owned `number` before is on the far side of an execve that never comes back.
    let rc = unsafe { libc::dup2(descriptor.as_raw_fd(), number) };
    if rc == number { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes over the descriptor `number` that this process was started with.
///
/// # Errors
/// Nothing is open there. Call it once for a number: a second owner would close it under the first.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer and changes nothing; it fails with EBADF when the number is not open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open (checked above) and no owner of it exists in this process yet, as the contract asks.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sets the loopback device of the calling thread's network namespace up (netdevice(7)).
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: ifreq is integers and byte arrays, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, whose name ends in zeroes and whose flags are set; it is borrowed for the call.
    let rc = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Raw wait status of the child `pid` once it is dead, which is reaped; `None` while it lives. `pid` -1 stands for any child.
/// An error of `ECHILD` says that there is no child at all.
pub(crate) fn reap(pid: libc::pid_t, is_blocking: bool) -> io::Result<Option<(libc::pid_t, WaitStatus)>> {
    let mut status = 0;
    let options = libc::__WALL | if is_blocking { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: the kernel writes one int to `status`, which outlives the call.
        let rc = unsafe { libc::waitpid(pid, &raw mut status, options) };
        match rc {
            0 => return Ok(None),
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            pid => return Ok(Some((pid, WaitStatus::from_raw(status)))),
        }
    }
}

/// Lowers a limit of the calling process (setrlimit(2)): both the soft and the hard one.
pub(crate) fn set_rlimit(resource: u32, value: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the kernel reads one rlimit, borrowed for the call.
    let rc = unsafe { libc::setrlimit(resource, &raw const limit) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lowers a limit of the calling process to `value`, both the soft and the hard one; one that is lower already stays (getrlimit(2)).
pub(crate) fn lower_rlimit(resource: u32, value: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit, borrowed for the call.
    let rc = unsafe { libc::getrlimit(resource, &raw mut limit) };
    if rc == 0 { set_rlimit(resource, value.min(limit.rlim_max)) } else { Err(io::Error::last_os_error()) }
}

/// The numbers of every capability that this kernel knows, from 0 up (capabilities(7)).
pub(crate) fn capabilities_known() -> impl Iterator<Item = u32> {
    // SAFETY: PR_CAPBSET_READ takes a number and no pointer; it fails with EINVAL past the last capability.
    (0..64).take_while(|number| unsafe { libc::prctl(libc::PR_CAPBSET_READ, *number, 0, 0, 0) } >= 0)
}

/// Takes a capability out of the calling thread's bounding set.
pub(crate) fn drop_from_bounding_set(capability: u32) -> io::Result<()> {
    // SAFETY: PR_CAPBSET_DROP takes a number and no pointer.
    let rc = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the calling thread's permitted and effective capabilities to `mask`, the inheritable ones to none (capset(2)).
pub(crate) fn set_capabilities(mask: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let low = u32::try_from(mask & u64::from(u32::MAX)).map_err(io::Error::other)?;
    let high = u32::try_from(mask >> 32).map_err(io::Error::other)?;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let data = [low, high].map(|bits| Data { effective: bits, permitted: bits, inheritable: 0 });
    // SAFETY: version 3 has a header and two data words of this layout (capset(2)); both are borrowed for the call. The kernel
    // may write its version into the header, which is mutable.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// sigaction(2) with a default or ignoring disposition; one with a handler is refused.
pub(crate) fn set_signal_action(signal: Signal, action: &SigAction) -> nix::Result<()> {
    if !matches!(action.handler(), SigHandler::SigDfl | SigHandler::SigIgn) {
        return Err(nix::Error::EINVAL);
    }
    // SAFETY: without a handler (checked above) no code runs at a signal, so nothing has to be async-signal-safe.
    unsafe { nix::sys::signal::sigaction(signal, action) }.map(drop)
}

/// Gives the calling process a session keyring of its own, empty, in place of the one it inherited (`KEYCTL_JOIN_SESSION_KEYRING`
/// of keyctl(2)). A kernel without keyrings has none to leave.
pub(crate) fn join_new_session_keyring() -> io::Result<()> {
    // SAFETY: the name is a null pointer, which asks for an anonymous keyring; no memory of ours is read or written.
    let rc = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) };
    match io::Error::last_os_error() {
        _ if rc >= 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// The version of Landlock that this kernel has (landlock_create_ruleset(2)).
pub(crate) fn landlock_version() -> io::Result<i64> {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the kernel takes a null pointer and a size of 0, and returns a number instead of a descriptor.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0, VERSION) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// Runs the calling process before ordinary ones, and its children like ordinary ones (`SCHED_RESET_ON_FORK` of sched(7)).
pub(crate) fn prefer_this_process(nice: i32) -> io::Result<()> {
    let no_priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one sched_param, borrowed for the call; 0 stands for the calling thread, the only one.
    let rc = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, &raw const no_priority) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::process::setpriority_process(None, nice)?)
}
