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
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::protocol::init::WaitStatus;

/// Which side of a [`clone3`] this is.
#[derive(Debug)]
pub(crate) enum Cloned {
    Parent(Child),
    Child,
}

/// A child process that only its parent can reap, so its id cannot be anybody else's until then.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Child {
    pub(crate) pid: libc::pid_t,
    /// Readable when the child is dead (pidfd_open(2)).
    #[serde(with = "crate::handover")]
    pub(crate) pidfd: OwnedFd,
}

impl Child {
    /// Whether it is not dead yet.
    pub(crate) fn lives(&self) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut looked_at = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut looked_at, Some(&now)).is_ok_and(|dead| dead == 0)
    }
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
    clone_this(libc::CLONE_VFORK)
}

/// The same, but both run at once.
pub(crate) fn fork() -> io::Result<Option<libc::pid_t>> {
    clone_this(0)
}

/// clone(2) by an older call than [`clone3`], with a copy of the memory.
fn clone_this(flags: libc::c_int) -> io::Result<Option<libc::pid_t>> {
    debug_assert_eq!(flags & !libc::CLONE_VFORK, 0, "others have arguments, or share what must not be shared");
    if thread_count()? != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a process with several threads must not clone"));
    }
    // SAFETY: without CLONE_VM the child has its own copy of this stack and heap, so both sides may return from here, and there is one
    // thread (checked above). A stack of 0 means "this one"; the other arguments are not used without their flags.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
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
/// Only for a process that has no owner of such a descriptor yet, or a child that works by path and then exits: what it copied from its parent
/// stays open for as long as it lives otherwise. Nothing in it may use an owner of one of these again.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: takes numbers only. That no owner of a closed descriptor acts any more is what this function's contract asks.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Marks every descriptor from `first` up close-on-exec (close_range(2)).
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // The highest number that a descriptor can have. gVisor's kernel takes no higher one, Linux any.
    const HIGHEST: libc::c_int = libc::c_int::MAX;
    // SAFETY: takes numbers only, and closes nothing now.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, HIGHEST, libc::CLOSE_RANGE_CLOEXEC) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has descriptor `number` stay open across execve(2).
pub(crate) fn keep_on_exec(number: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes a number and changes nothing but a flag of the descriptor's; it fails with EBADF when the number is not open.
    let rc = unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
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
    let reaped = reap_with_cpu(pid, is_blocking)?;
    Ok(reaped.map(|(pid, status, _)| (pid, status)))
}

/// [`reap`], and the CPU time that the child used, with that of the children it waited for, in microseconds.
pub(crate) fn reap_with_cpu(pid: libc::pid_t, is_blocking: bool) -> io::Result<Option<(libc::pid_t, WaitStatus, u64)>> {
    let mut status = 0;
    // SAFETY: rusage is integers, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let options = libc::__WALL | if is_blocking { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: the kernel writes one int to `status` and one rusage to `usage`, which outlive the call.
        let rc = unsafe { libc::wait4(pid, &raw mut status, options, &raw mut usage) };
        match rc {
            0 => return Ok(None),
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            pid => return Ok(Some((pid, WaitStatus::from_raw(status), microseconds(usage.ru_utime) + microseconds(usage.ru_stime)))),
        }
    }
}

/// pidfd_send_signal(2), also for the signals that have no name.
pub(crate) fn send_signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the third argument is a null pointer, which asks for what kill(2) sends; the rest is numbers.
    let rc = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// kill(2), also for the signals that have no name. `pid` must be a child that is not reaped yet.
pub(crate) fn send_signal_to(pid: libc::pid_t, signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    let rc = unsafe { libc::kill(pid, signal) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn microseconds(time: libc::timeval) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(time.tv_usec).unwrap_or(0)
}

/// Lowers a limit of the calling process (setrlimit(2)), both the soft and the hard one, and makes sure that the kernel took it.
pub(crate) fn set_rlimit(resource: u32, value: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the kernel reads one rlimit, borrowed for the call.
    if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit to `found`, which outlives the call.
    if unsafe { libc::getrlimit(resource, &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if (found.rlim_cur, found.rlim_max) == (value, value) {
        Ok(())
    } else {
        Err(io::Error::other(format!("it is {} and {} instead of {value}", found.rlim_cur, found.rlim_max)))
    }
}

/// Sets a limit of the calling process as far as its hard one allows, which is never raised (getrlimit(2)).
pub(crate) fn bound_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit, borrowed for the call.
    let rc = unsafe { libc::getrlimit(resource, &raw mut limit) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_max = limit.rlim_max.min(hard);
    limit.rlim_cur = limit.rlim_max.min(soft);
    // SAFETY: the kernel reads one rlimit, borrowed for the call.
    let rc = unsafe { libc::setrlimit(resource, &raw const limit) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

/// The number of a loop device that nobody uses at this moment (`LOOP_CTL_GET_FREE` of loop(4)). Somebody else may be faster.
pub(crate) fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    const GET_FREE: libc::Ioctl = 0x4c82;
    // SAFETY: takes no argument and returns a number.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Attaches `image` to the loop device (`LOOP_CONFIGURE` of linux/loop.h), with direct I/O where its file system has it. The device lets go
/// of it when its last user does. An error of [`io::ErrorKind::ResourceBusy`]: the device is somebody else's by now.
pub(crate) fn configure_loop_device(device: BorrowedFd<'_>, image: BorrowedFd<'_>, block_bytes: u32) -> io::Result<()> {
    #[repr(C)]
    struct Config {
        fd: u32,
        block_size: u32,
        /// loop_info64.
        info: [u32; 58],
        reserved: [u64; 8],
    }
    const CONFIGURE: libc::Ioctl = 0x4c0a;
    /// The place of `lo_flags`, behind five numbers of 64 bits and three of 32.
    const FLAGS: usize = 13;
    const AUTOCLEAR: u32 = 4;
    const DIRECT_IO: u32 = 16;
    let fd = u32::try_from(image.as_raw_fd()).map_err(io::Error::other)?;
    let mut info = [0; 58];
    info[FLAGS] = AUTOCLEAR | DIRECT_IO;
    let config = Config { fd, block_size: block_bytes, info, reserved: [0; 8] };
    // SAFETY: the kernel reads one loop_config, which `Config` has the layout of and which is borrowed for the call. It takes a reference
    // of its own to the file behind `fd`.
    let rc = unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, &raw const config) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the file system of `folder` drop all that it has not written yet, and refuse everything from now on (`FS_IOC_SHUTDOWN`).
pub(crate) fn shut_down_file_system(folder: BorrowedFd<'_>) -> io::Result<()> {
    const SHUTDOWN: libc::Ioctl = 0x8004_587d;
    // `EXT4_GOING_FLAGS_NOLOGFLUSH`.
    let now: u32 = 2;
    // SAFETY: the kernel reads one u32, borrowed for the call.
    let rc = unsafe { libc::ioctl(folder.as_raw_fd(), SHUTDOWN, &raw const now) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts a folder, and all that will be made in it, into the project `id` (`FS_IOC_FSSETXATTR`, xfsctl(3)).
pub(crate) fn set_project(folder: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        flags: u32,
        extsize: u32,
        nextents: u32,
        project: u32,
        cowextsize: u32,
        pad: [u8; 8],
    }
    const GET: libc::Ioctl = 0x801c_581f;
    const SET: libc::Ioctl = 0x401c_5820;
    const INHERIT: u32 = 0x200;
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes one fsxattr, which `Attributes` has the layout of and which outlives the call.
    if unsafe { libc::ioctl(folder.as_raw_fd(), GET, &raw mut attributes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= INHERIT;
    attributes.project = id;
    // SAFETY: the kernel reads one fsxattr, which `Attributes` has the layout of and which is borrowed for the call.
    let rc = unsafe { libc::ioctl(folder.as_raw_fd(), SET, &raw const attributes) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A project's use and hard limits: of space in bytes, of inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProjectQuota {
    pub(crate) used_bytes: u64,
    pub(crate) used_inodes: u64,
    pub(crate) limit_bytes: u64,
    pub(crate) limit_inodes: u64,
}

/// What `if_dqblk` of linux/quota.h counts space limits in.
const QUOTA_BLOCK_BYTES: u64 = 1024;

#[repr(C)]
#[derive(Default)]
struct QuotaBlock {
    block_hard: u64,
    block_soft: u64,
    space: u64,
    inode_hard: u64,
    inode_soft: u64,
    inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
}

/// Whether the file system of `folder` holds projects to their quotas (`Q_XGETQSTATV`, quotactl(2)).
pub(crate) fn has_project_quotas(folder: BorrowedFd<'_>) -> io::Result<bool> {
    #[repr(C)]
    struct State {
        version: u8,
        pad: u8,
        flags: u16,
        rest: [u32; 39],
    }
    const GET_STATE: u32 = 0x5808;
    /// `FS_QUOTA_PDQ_ENFD`.
    const ENFORCED: u16 = 1 << 5;
    let mut state = State { version: 1, pad: 0, flags: 0, rest: [0; 39] };
    // SAFETY: the kernel reads the version and writes one fs_quota_statv of 160 bytes, which is what `State` has and outlives the call.
    let rc = unsafe { quotactl(folder, GET_STATE, 0, (&raw mut state).cast()) };
    rc.map(|()| state.flags & ENFORCED != 0)
}

/// What a project uses and may use.
pub(crate) fn project_quota(folder: BorrowedFd<'_>, id: u32) -> io::Result<ProjectQuota> {
    const GET: u32 = 0x0080_0007;
    let mut block = QuotaBlock::default();
    // SAFETY: the kernel writes one if_dqblk, which `QuotaBlock` has the layout of and which outlives the call.
    unsafe { quotactl(folder, GET, id, (&raw mut block).cast()) }?;
    Ok(ProjectQuota {
        used_bytes: block.space,
        used_inodes: block.inodes,
        limit_bytes: block.block_hard * QUOTA_BLOCK_BYTES,
        limit_inodes: block.inode_hard,
    })
}

/// Sets a project's hard limits; 0 is none.
pub(crate) fn limit_project(folder: BorrowedFd<'_>, id: u32, bytes: u64, inodes: u64) -> io::Result<()> {
    const SET: u32 = 0x0080_0008;
    /// `QIF_LIMITS`: the limits alone, of space and inodes.
    const LIMITS: u32 = 1 | 4;
    let mut block = QuotaBlock { block_hard: bytes / QUOTA_BLOCK_BYTES, inode_hard: inodes, valid: LIMITS, ..QuotaBlock::default() };
    // SAFETY: the kernel reads one if_dqblk, which `QuotaBlock` has the layout of and which outlives the call.
    unsafe { quotactl(folder, SET, id, (&raw mut block).cast()) }
}

/// quotactl_fd(2) for project quotas.
///
/// # Safety
/// `argument` points to what `command` reads or writes (quotactl(2)), valid for the call.
unsafe fn quotactl(folder: BorrowedFd<'_>, command: u32, id: u32, argument: *mut libc::c_void) -> io::Result<()> {
    const OF_PROJECTS: u32 = 2;
    /// Of every architecture; the libc crate has it for some.
    const SYS_QUOTACTL_FD: libc::c_long = 443;
    // SAFETY: the caller vouches for `argument`; the rest is numbers.
    let rc = unsafe { libc::syscall(SYS_QUOTACTL_FD, folder.as_raw_fd(), command << 8 | OF_PROJECTS, id, argument) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
