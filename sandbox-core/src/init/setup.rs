//! From a fresh process of root's to the unprivileged PID 1 of a finished sandbox.

use std::{
    collections::VecDeque,
    io::Write,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::{Disks, next, own_cpu_us};
use crate::{
    apparmor,
    error::{LaunchError, Step},
    fence::{Fence, Fences},
    ids, landlock,
    privileges::{self, disarm_root, limit_bounding_set},
    protocol::init::{Place, Setup},
    rootfs::{self, Layout, Parts, Tree},
    sys,
};

/// How readily the kernel kills a sandbox when the whole machine runs out of memory: before anything of the host (proc_pid_oom_score_adj(5)).
const OOM_SCORE_ADJ: &str = "500";

/// Limits of setrlimit(2) that are the same for every payload, soft and hard, unless the keeper was started with a lower hard one.
pub(super) const RESOURCES: [(u32, u64, u64); 11] = [
    // Not 0: that is ignored for a core_pattern that starts a helper on the host, and 1 is what switches the helper off (core(5)).
    (libc::RLIMIT_CORE, 1, 1),
    (libc::RLIMIT_RTPRIO, 0, 0),
    (libc::RLIMIT_NICE, 0, 0),
    // The kernel's own default. What is locked counts as memory like the rest.
    (libc::RLIMIT_MEMLOCK, 8 << 20, 8 << 20),
    (libc::RLIMIT_MSGQUEUE, 819_200, 819_200),
    // Queued signals and POSIX timers, which live in the kernel.
    (libc::RLIMIT_SIGPENDING, 4096, 4096),
    // What programs expect; a request may say more.
    (libc::RLIMIT_STACK, 8 << 20, libc::RLIM_INFINITY),
    // What cgroups count is limited there.
    (libc::RLIMIT_AS, libc::RLIM_INFINITY, libc::RLIM_INFINITY),
    (libc::RLIMIT_CPU, libc::RLIM_INFINITY, libc::RLIM_INFINITY),
    (libc::RLIMIT_DATA, libc::RLIM_INFINITY, libc::RLIM_INFINITY),
    (libc::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY),
];

/// Init's nice value. What it starts has the ordinary one.
const NICE: i32 = -11;

/// Puts this process, and so all that it starts, under the limits. Returns the CPU time it had used before, in microseconds.
///
/// Descriptors in front: user namespace, image, base layer, then the `tasks` files. A process of one thread that writes 0 into `tasks` moves
/// itself without waiting for a grace period of the whole machine, which a parent that writes a pid has to.
pub(super) fn join_cgroups(hierarchies: u32, fences: Fences, descriptors: &mut VecDeque<OwnedFd>) -> Result<u64, LaunchError> {
    let first = 3;
    for n in 0..hierarchies {
        let tasks =
            descriptors.remove(first).ok_or_else(super::unexpected).step_on("joining the cgroups", format_args!("hierarchy {n}"))?;
        std::fs::File::from(tasks).write_all(b"0").step_on("joining the cgroups", format_args!("hierarchy {n}"))?;
    }
    // Without v1 hierarchies it was born in its group, which then has all its time.
    let before_us = if hierarchies == 0 { 0 } else { own_cpu_us() };
    // From here on the sandbox's own cgroups are the root that it sees in /proc/self/cgroup.
    if fences.has(Fence::CgroupNamespace) {
        unshare(CloneFlags::CLONE_NEWCGROUP).step("making the cgroup namespace")?;
    }
    Ok(before_us)
}

/// Builds the sandbox around this process and gives up all privilege but [`privileges::OF_INIT`] over the sandbox's own ids.
///
/// The order is the kernel's: what needs the host's root first, then init's own id, the user namespace after the last mount, capabilities
/// after the namespace, the filter last.
pub(super) fn enter(setup: &Setup, disks: Disks, descriptors: &mut VecDeque<OwnedFd>) -> Result<Tree, LaunchError> {
    let fences = setup.fences;
    let (tree, user_namespace) = build(setup, disks, descriptors)?;
    // As the host's root still, which may set any limit.
    for (resource, soft, hard) in RESOURCES {
        sys::bound_rlimit(resource, soft, hard).step_on("setting a resource limit", resource)?;
    }
    become_inits_user(setup)?;
    if fences.has(Fence::UserNamespace) {
        setns(user_namespace.as_fd(), CloneFlags::CLONE_NEWUSER).step("entering the user namespace")?;
    }
    drop(user_namespace);
    limit_bounding_set(setup.payload_capabilities).step("limiting the bounding set")?;
    if setup.payload_capabilities == 0 {
        disarm_root().step("taking root's privileges from user id 0")?;
    }
    if fences.has(Fence::SessionKeyring) {
        // Now, because a key counts against the id that makes it.
        sys::join_new_session_keyring().step("making a session keyring")?;
    }
    sys::set_capabilities(privileges::OF_INIT | setup.payload_capabilities).step("dropping capabilities")?;
    if fences.has(Fence::Apparmor) {
        // Before no_new_privs, under which only some changes of a profile are taken.
        apparmor::enter(own_attribute(&tree, "apparmor/current")?).step("entering the AppArmor profile")?;
    }
    if fences.has(Fence::NoNewPrivs) {
        rustix::thread::set_no_new_privs(true).step("setting no_new_privs")?;
    }
    // Both are reset by the change of ids above (PR_SET_PDEATHSIG(2const), PR_SET_DUMPABLE(2const)).
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).step("binding this life to the keeper's")?;
    nix::sys::prctl::set_dumpable(!fences.has(Fence::InitShield)).step("forbidding traces")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    default_signals().step("resetting signals")?;
    if fences.has(Fence::Landlock) {
        let listed: Vec<_> = std::iter::once(&tree.upper).chain(&tree.lower).map(AsFd::as_fd).collect();
        landlock::restrict(&listed).step("setting up Landlock")?;
    }
    if fences.has(Fence::Seccomp) {
        let program: Vec<libc::sock_filter> =
            setup.seccomp.iter().map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k }).collect();
        sys::set_seccomp_filter(&program).step("loading the seccomp filter")?;
    }
    Ok(tree)
}

/// Gives up the host's root for an id that the sandbox's namespace does not map, but not yet what it takes to enter that namespace, which gives
/// all capabilities of its own.
fn become_inits_user(setup: &Setup) -> Result<(), LaunchError> {
    let has_namespace = setup.fences.has(Fence::UserNamespace);
    setgroups(&[]).step("leaving all groups")?;
    nix::sys::prctl::set_keepcaps(true).step("keeping capabilities")?;
    let id = match setup.fences.has(Fence::InitShield) {
        true => ids::of_init(setup.id_base),
        false if has_namespace => setup.id_base,
        false => 0,
    };
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    setresgid(gid, gid, gid).step("becoming init's group")?;
    setresuid(uid, uid, uid).step("becoming init's user")?;
    let kept = if has_namespace {
        privileges::SYS_ADMIN
    } else {
        rustix::thread::capabilities(None).step("reading capabilities")?.permitted.bits()
    };
    sys::set_capabilities(kept).step("keeping capabilities")
}

/// Builds the tree around this process, as the host's root still. Returns it with the user namespace that is to be entered.
pub(super) fn build(setup: &Setup, disks: Disks, descriptors: &mut VecDeque<OwnedFd>) -> Result<(Tree, OwnedFd), LaunchError> {
    let user_namespace = next(descriptors, "user namespace")?;
    let label = setup.labels.as_ref().and_then(|labels| labels.mount.as_deref());
    let volume = |(place, device): (&Place, &u32)| {
        rootfs::map_volume(*device, label, user_namespace.as_fd(), place.is_read_only).step_on("mounting a volume", &place.path)
    };
    let parts = Parts {
        image: next(descriptors, "image")?,
        base: next(descriptors, "base layer")?,
        target: if setup.has_target { Some(next(descriptors, "target")?) } else { None },
        layer: disks.layer,
        below: disks.below,
        volumes: setup.volumes.iter().zip(&disks.volumes).map(volume).collect::<Result<_, _>>()?,
    };
    // Its orders are the limits: among busy processes of its group it comes first.
    sys::prefer_this_process(NICE).step("raising init's priority")?;
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ).step("raising oom_score_adj")?;
    let layout = Layout {
        id_base: setup.id_base,
        layer: setup.layer,
        disk_bytes: setup.disk_bytes,
        inodes: setup.inodes,
        shm_bytes: setup.shm_bytes,
        isolation: setup.isolation,
        fences: setup.fences,
        label,
        volumes: &setup.volumes,
    };
    if !setup.fences.has(Fence::Descriptors) {
        leak_the_hosts_root().step("leaking the host's root")?;
    }
    let tree = rootfs::enter(layout, parts)?;
    take_null()?;
    Ok((tree, user_namespace))
}

/// A security attribute of the calling process, in the `/proc` that this process mounted: what an image or a payload mounts or links over it
/// is not looked at (CVE-2025-52881).
pub(super) fn own_attribute(tree: &Tree, name: &str) -> Result<std::fs::File, LaunchError> {
    let path = format!("{}/attr/{name}", std::process::id());
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(&tree.proc, path.as_str(), flags, Mode::empty(), resolve)
        .map(std::fs::File::from)
        .step_on("opening", format_args!("/proc/{path}"))
}

/// What CVE-2024-21626 was: a folder of the host's stays open, and nothing closes it at execve. For tests of what stops that.
fn leak_the_hosts_root() -> rustix::io::Result<()> {
    let root = rustix::fs::openat(rustix::fs::CWD, "/", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    let _number_that_stays_open = std::os::fd::IntoRawFd::into_raw_fd(root);
    Ok(())
}

/// Standard input, output and error become the sandbox's own `/dev/null`: those of the keeper are the host's.
fn take_null() -> Result<(), LaunchError> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").step_on("opening", "/dev/null")?;
    for number in 0..=2 {
        sys::place_at(null.as_fd(), number).step_on("opening", "/dev/null")?;
    }
    Ok(())
}

/// The keeper's blocked and ignored signals are not the payload's: execve(2) would hand both on.
pub(super) fn default_signals() -> nix::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    sys::set_signal_action(Signal::SIGPIPE, &default)?;
    SigSet::all().thread_unblock()
}

/// A descriptor that is readable when a child has died.
pub(super) fn child_signals() -> std::io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    Ok(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}
