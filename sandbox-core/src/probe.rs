//! What this machine can and cannot do for sandboxes, found by trying it.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use serde::Serialize;

use crate::{
    apparmor, cgroup, ids, keeper,
    protocol::CgroupMode,
    rootfs,
    selinux::{self, Labels},
};

/// Whether something that sandboxes need is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    /// It runs, with less.
    Warn,
    /// It does not run.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub status: Status,
    /// What is there.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
}

/// The oldest kernel on which everything here works (idmapped overlay layers, `memory.peak`, `pids.peak`).
const KERNEL_MIN: (u32, u32) = (6, 1);

/// The first id of a range that is only looked at for the moment of the probe.
const PROBE_ID: u32 = 0x6fff_0000;

/// Looks at everything. `data_dir` is where images will lie, `labels` are those that payloads are to have. Needs root for the checks that try something, and says so without it.
pub fn run(data_dir: &Path, labels: Option<&Labels>) -> Vec<Check> {
    let is_root = rustix::process::geteuid().is_root();
    let mut checks = vec![kernel(), cgroups(), swap(), landlock(), apparmor(), selinux(labels), gvisor()];
    if is_root {
        // The one that starts a thread comes last: the others clone, which takes a process of one thread.
        checks.extend([idmapped_mounts(data_dir), seccomp(), namespaces()]);
    } else {
        checks.push(Check {
            name: "namespaces, idmapped mounts",
            status: Status::Warn,
            found: "not tried".to_owned(),
            advice: "run this as root to try them".to_owned(),
        });
    }
    checks
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check { name, status: Status::Ok, found: found.into(), advice: String::new() }
}

fn problem(name: &'static str, status: Status, found: impl Into<String>, advice: impl Into<String>) -> Check {
    Check { name, status, found: found.into(), advice: advice.into() }
}

fn kernel() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL_MIN => ok("kernel", release),
        _ => problem("kernel", Status::Fail, release, "Linux 6.1 or newer is needed (Debian 12 has it)"),
    }
}

fn cgroups() -> Check {
    let found = cgroup::discover();
    let world = match found.mode {
        CgroupMode::V1 => "cgroup v1",
        CgroupMode::Hybrid => "cgroup v1 with an unused cgroup2 (hybrid)",
        CgroupMode::V2 => "cgroup v2",
    };
    let missing: Vec<&str> = found.controllers.iter().filter(|(_, point)| point.is_none()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        let names: Vec<&str> = found.controllers.iter().map(|(name, _)| *name).collect();
        ok("cgroups", format!("{world}: {}", names.join(", ")))
    } else {
        let advice = "mount the missing controllers, or boot with systemd.unified_cgroup_hierarchy=1 and without cgroup_disable=";
        problem("cgroups", Status::Fail, format!("{world}, without {}", missing.join(", ")), advice)
    }
}

fn swap() -> Check {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if cgroup::has_swap(&swaps) { ok("swap", "on; sandboxes are kept out of it by their memory limit") } else { ok("swap", "none") }
}

fn landlock() -> Check {
    if crate::landlock::is_available() {
        ok("landlock", "enabled")
    } else {
        problem("landlock", Status::Warn, "not enabled", "boot with landlock in lsm= for a second fence around files")
    }
}

fn apparmor() -> Check {
    if !apparmor::is_enabled() {
        return problem("apparmor", Status::Warn, "not enabled", "boot with apparmor in lsm= for a further fence");
    }
    match apparmor::has_parser() {
        true => ok("apparmor", "enabled"),
        false => {
            problem("apparmor", Status::Warn, "enabled, but nothing to load a profile with", "install apparmor_parser (package apparmor)")
        }
    }
}

/// What SELinux does for payloads with these labels, as a keeper that is started with them sees it.
pub fn selinux(labels: Option<&Labels>) -> Check {
    let Some(labels) = labels else {
        return match selinux::is_enabled() {
            true => ok("selinux", "enabled; payloads have no label of their own (--selinux-label)"),
            false => ok("selinux", "not enabled"),
        };
    };
    match selinux::check(labels) {
        Ok(()) => ok("selinux", format!("enforced; payloads get the label {}", labels.process)),
        Err(error) => {
            problem("selinux", Status::Fail, error.to_string(), "leave out --selinux-label, or have the host enforce a policy with it")
        }
    }
}

/// A node does without it as well.
fn gvisor() -> Check {
    match keeper::gvisor::find() {
        Some(path) => ok("gvisor", format!("{}; sandboxes may ask for it", path.display())),
        None => problem(
            "gvisor",
            Status::Ok,
            "not installed",
            "install runsc (Debian's package runsc) to offer sandboxes with a kernel of their own",
        ),
    }
}

fn namespaces() -> Check {
    match ids::new_user_namespace(PROBE_ID).and_then(|_| crate::network::try_new()) {
        Ok(()) => ok("namespaces", "user and network namespaces can be made"),
        Err(error) => problem(
            "namespaces",
            Status::Fail,
            error.to_string(),
            "raise user.max_user_namespaces and user.max_net_namespaces; in a container, run it privileged",
        ),
    }
}

/// Maps the folder of images as a launch would.
fn idmapped_mounts(data_dir: &Path) -> Check {
    // The nearest folder that exists says which file system it will be.
    let folder = data_dir.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let mapped = || -> io::Result<OwnedFd> {
        let namespace = ids::new_user_namespace(PROBE_ID)?;
        let folder: OwnedFd = File::open(folder)?.into();
        rootfs::map_layer(folder.as_fd(), namespace.as_fd(), true)
    };
    match mapped() {
        Ok(_) => ok("idmapped mounts", format!("the file system of {} takes them", folder.display())),
        Err(error) => problem(
            "idmapped mounts",
            Status::Fail,
            format!("the file system of {} does not take them: {error}", folder.display()),
            "put --data-dir on ext4, xfs, btrfs or, from Linux 6.3, tmpfs",
        ),
    }
}

fn seccomp() -> Check {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions.contains("kill_process") && actions.contains("errno") {
        ok("seccomp", format!("{} instructions", crate::seccomp::program().len()))
    } else {
        problem("seccomp", Status::Fail, "no filters", "a kernel with CONFIG_SECCOMP_FILTER is needed")
    }
}
