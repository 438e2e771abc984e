//! What the keeper accepts in an OCI runtime spec. The rest is refused, by name.
//!
//! The service is not trusted with the host: a spec that asks for a mount, a hook, a device, a capability, a namespace to join, or that
//! leaves a limit out, is refused here whoever sends it. Accepted (runtime-spec, `config.md` and `config-linux.md`):
//! `process.{user,args,env,cwd,rlimits,noNewPrivileges}`, `process.capabilities` up to [`privileges::OF_ROOT_IMAGE`], `root.{path,readonly}`, `hostname`, `mounts` that are
//! a `destination` and nothing else,
//! `linux.resources.{memory.limit,memory.swap,cpu.quota,cpu.period,pids.limit}`.

use std::{collections::HashMap, path::Path};

use oci_spec::runtime::{Capabilities, Capability, LinuxResources, PosixRlimitType, Process, Spec};
use serde_json::Value;

use crate::{
    cgroup::Limits,
    fence::{Fence, FenceUnknown, Fences},
    files::PATH_BYTES_MAX,
    keeper::{Weakening, gvisor},
    privileges,
    protocol::{
        Exec, FOLDERS_MAX, IoLimits, Isolation, Launch, Medium, NewLimits, NewTime, Supervision, VOLUMES_MAX, VolumeMount, init::User,
    },
};

/// A launch that was checked: everything in it is within the node's policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    /// Folders of the writable layer that are there when it starts.
    pub(crate) folders: Vec<String>,
    pub(crate) user: User,
    pub(crate) rlimits: Vec<(u32, u64)>,
    pub(crate) hostname: Option<String>,
    pub(crate) limits: Limits,
    /// What user 0 may do, as a bit mask.
    pub(crate) capabilities: u64,
    /// Fences that are to be left out: none, except in tests of what each is for.
    pub(crate) without: Fences,
}

/// What the spec asks for against the policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

/// The least memory that our own init and an exec can live in.
const MEMORY_BYTES_MIN: u64 = 4 << 20;

/// What a file system of its own is worth the effort for.
const DISK_BYTES_MIN: u64 = 4 << 20;
const DISK_BYTES_MAX: u64 = 1 << 40;
/// A layer on disk may have so many inodes, and one more for so many bytes: more than ext4 has room for in each of its groups cannot be had.
const INODES_MAX_BASE: u64 = 16_384;
const BYTES_FOR_INODE: u64 = 8192;

/// The longest name of a file that Linux knows (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;

/// Every field that a spec may have, by its path. Fields that are absent, `null`, `false` or empty ask for nothing and pass.
const ACCEPTED: [&str; 21] = [
    "ociVersion",
    "hostname",
    "root.path",
    "mounts.destination",
    "process.user.uid",
    "process.user.gid",
    "process.user.additionalGids",
    "process.user.username",
    "process.args",
    "process.env",
    "process.cwd",
    "process.rlimits",
    "process.noNewPrivileges",
    "process.capabilities.bounding",
    "process.capabilities.effective",
    "process.capabilities.permitted",
    "linux.resources.memory.limit",
    "linux.resources.memory.swap",
    "linux.resources.cpu.quota",
    "linux.resources.cpu.period",
    "linux.resources.pids.limit",
];

/// Refuses the first field of `value` that [`ACCEPTED`] does not name, also one that no version of the standard has.
fn check_fields(value: &Value, path: &str, weakening: Weakening) -> Result<(), Refused> {
    if ACCEPTED.contains(&path) || weakening == Weakening::Allowed && path == "annotations.without" {
        return Ok(());
    }
    match value {
        Value::Null | Value::Bool(false) => Ok(()),
        Value::Array(items) if items.is_empty() => Ok(()),
        Value::String(text) if text.is_empty() => Ok(()),
        // One without a source is a folder of the writable layer's own.
        Value::Array(mounts) if path == "mounts" => mounts.iter().try_for_each(|mount| check_fields(mount, path, weakening)),
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            check_fields(value, &path, weakening)
        }),
        Value::Bool(true) | Value::Number(_) | Value::Array(_) | Value::String(_) => Err(Refused(format!("{path} may not be set"))),
    }
}

impl Plan {
    /// Checks `launch` against the policy.
    pub(crate) fn check(launch: &Launch, weakening: Weakening) -> Result<Self, Refused> {
        let not_a_spec = |e: serde_json::Error| Refused(format!("the spec is not an OCI runtime spec: {e}"));
        check_fields(&serde_json::from_slice(&launch.spec).map_err(not_a_spec)?, "", weakening)?;
        let spec: Spec = serde_json::from_slice(&launch.spec).map_err(not_a_spec)?;
        let root = spec.root().as_ref().ok_or_else(|| missing("root"))?;
        if root.path().to_str() != Some(&launch.image.to_string()) {
            return Err(Refused("root.path is not the image of the request".to_owned()));
        }
        let linux = spec.linux().as_ref().ok_or_else(|| missing("linux"))?;
        let limits = limits(linux.resources().as_ref().ok_or_else(|| missing("linux.resources"))?)?;
        check_layer(launch.supervision)?;
        check_io(launch.supervision.io)?;
        check_volumes(launch)?;
        let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
        let without = match weakening {
            Weakening::Allowed => without(spec.annotations().as_ref())?,
            Weakening::Refused => Fences::default(),
        };
        let folders = spec.mounts().iter().flatten().map(|mount| mount.destination().as_path());
        let folders = folders.map(folder).collect::<Result<Vec<_>, _>>()?;
        if folders.len() > FOLDERS_MAX {
            return Err(Refused(format!("mounts: there may be {FOLDERS_MAX}")));
        }
        Ok(Self { folders, ..Self::of_process(process, spec.hostname().clone(), limits, without)? })
    }

    fn of_process(process: &Process, hostname: Option<String>, limits: Limits, without: Fences) -> Result<Self, Refused> {
        if process.no_new_privileges() != Some(true) {
            return Err(Refused("process.noNewPrivileges must be true".to_owned()));
        }
        let args = process.args().clone().filter(|args| !args.is_empty()).ok_or_else(|| missing("process.args"))?;
        let user = process.user();
        let user = match user.username() {
            Some(name) => User::Named(name.clone()),
            None => User::Ids { uid: user.uid(), gid: user.gid(), groups: user.additional_gids().clone().unwrap_or_default() },
        };
        if hostname.as_ref().is_some_and(|name| name.is_empty() || name.len() > 63) {
            return Err(Refused("hostname must have 1 to 63 bytes".to_owned()));
        }
        let mut rlimits = Vec::new();
        for limit in process.rlimits().iter().flatten() {
            const SETTABLE: [(PosixRlimitType, u32); 4] = [
                (PosixRlimitType::RlimitNofile, libc::RLIMIT_NOFILE),
                (PosixRlimitType::RlimitFsize, libc::RLIMIT_FSIZE),
                (PosixRlimitType::RlimitStack, libc::RLIMIT_STACK),
                (PosixRlimitType::RlimitCore, libc::RLIMIT_CORE),
            ];
            let resource = SETTABLE.iter().find(|(kind, _)| *kind == limit.typ()).map(|(_, resource)| *resource);
            let resource = resource.ok_or_else(|| Refused(format!("process.rlimits: {} is not for a request to set", limit.typ())))?;
            if resource != libc::RLIMIT_CORE {
                rlimits.push((resource, limit.hard()));
            } else if limit.hard() != 0 {
                return Err(Refused("process.rlimits: RLIMIT_CORE must be 0".to_owned()));
            }
        }
        if rlimits.iter().all(|(resource, _)| *resource != libc::RLIMIT_NOFILE) {
            return Err(missing("process.rlimits: RLIMIT_NOFILE"));
        }
        Ok(Self {
            args,
            env: process.env().clone().unwrap_or_default(),
            cwd: process.cwd().to_str().ok_or_else(|| Refused("process.cwd is not UTF-8".to_owned()))?.to_owned(),
            folders: Vec::new(),
            user,
            rlimits,
            hostname,
            limits,
            capabilities: capabilities(process, without)?,
            without,
        })
    }
}

/// The place of a folder inside the sandbox.
fn folder(destination: &Path) -> Result<String, Refused> {
    let text = destination.to_str().filter(|text| text.starts_with('/') && text.len() <= PATH_BYTES_MAX && !text.contains('\0'));
    text.map(str::to_owned).ok_or_else(|| Refused("mounts: a destination is an absolute path".to_owned()))
}

/// What the payload's user 0 may do. The sets must agree: what is bounding and not permitted would come back at the first execve of root's.
fn capabilities(process: &Process, without: Fences) -> Result<u64, Refused> {
    if without.has(Fence::Capabilities) {
        let own = rustix::thread::capabilities(None).map_err(|e| Refused(e.to_string()))?;
        return Ok(own.permitted.bits());
    }
    let Some(asked) = process.capabilities() else { return Ok(0) };
    let mask = |set: &Option<Capabilities>| {
        set.iter().flatten().try_fold(0, |mask, capability| {
            let known = GRANTABLE.iter().find(|(grantable, _)| grantable == capability).map(|(_, bit)| mask | bit);
            known.ok_or_else(|| Refused(format!("process.capabilities: {capability} is not for a request to have")))
        })
    };
    let bounding = mask(asked.bounding())?;
    if mask(asked.effective())? != bounding || mask(asked.permitted())? != bounding {
        return Err(Refused("process.capabilities: bounding, effective and permitted must be the same".to_owned()));
    }
    Ok(bounding)
}

/// Capabilities that a request may ask for.
const GRANTABLE: [(Capability, u64); 8] = [
    (Capability::Chown, privileges::CHOWN),
    (Capability::DacOverride, privileges::DAC_OVERRIDE),
    (Capability::Fowner, privileges::FOWNER),
    (Capability::Fsetid, privileges::FSETID),
    (Capability::Kill, privileges::KILL),
    (Capability::NetBindService, privileges::NET_BIND_SERVICE),
    (Capability::Setgid, privileges::SETGID),
    (Capability::Setuid, privileges::SETUID),
];

/// The fences that a test of what they are for leaves out.
fn without(annotations: Option<&HashMap<String, String>>) -> Result<Fences, Refused> {
    let names = annotations.and_then(|annotations| annotations.get("without"));
    let fence = |name: &str| {
        let fence = name.parse().map_err(|e: FenceUnknown| Refused(e.to_string()))?;
        // Without these there is no sandbox.
        let is_needed = [Fence::MountNamespace, Fence::PidNamespace, Fence::UtsNamespace, Fence::Cgroup].contains(&fence);
        if is_needed { Err(Refused(format!("{name} cannot be left out"))) } else { Ok(fence) }
    };
    names.map_or(Ok(Fences::default()), |names| names.split(',').map(fence).collect())
}

fn limits(resources: &LinuxResources) -> Result<Limits, Refused> {
    let number = |name: &str, value: Option<i64>| {
        value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0).ok_or_else(|| missing(name))
    };
    let memory = resources.memory().as_ref().ok_or_else(|| missing("memory.limit"))?;
    let cpu = resources.cpu().as_ref().ok_or_else(|| missing("cpu.quota"))?;
    let pids = resources.pids().as_ref().ok_or_else(|| missing("pids.limit"))?;
    let memory_bytes = number("memory.limit", memory.limit())?;
    if memory.swap().is_some_and(|swap| Some(swap) != memory.limit()) {
        return Err(Refused("memory.swap must be equal to memory.limit: sandboxes do not swap".to_owned()));
    }
    if memory_bytes < MEMORY_BYTES_MIN {
        return Err(Refused(format!("memory.limit must be at least {MEMORY_BYTES_MIN} bytes")));
    }
    Ok(Limits {
        memory_bytes,
        cpu_quota_us: number("cpu.quota", cpu.quota())?,
        cpu_period_us: cpu.period().filter(|period| *period > 0).ok_or_else(|| missing("cpu.period"))?,
        pids: number("pids.limit", Some(pids.limit()))?,
    })
}

/// The bounds of a writable layer.
fn check_layer(supervision: Supervision) -> Result<(), Refused> {
    let Supervision { disk_bytes, inodes, medium, .. } = supervision;
    if medium == Medium::Memory {
        let is_enough = disk_bytes >= 4096 && inodes > 0;
        return is_enough.then_some(()).ok_or_else(|| Refused("the writable layer needs at least 4096 bytes and one inode".to_owned()));
    }
    if !(DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&disk_bytes) {
        return Err(Refused(format!("a writable layer on disk must have {DISK_BYTES_MIN} to {DISK_BYTES_MAX} bytes")));
    }
    let inodes_max = INODES_MAX_BASE + disk_bytes / BYTES_FOR_INODE;
    if !(1..=inodes_max).contains(&inodes) {
        return Err(Refused(format!("a writable layer of {disk_bytes} bytes on disk must have 1 to {inodes_max} inodes")));
    }
    Ok(())
}

/// The bounds of a volume.
pub(crate) fn check_volume(bytes: u64, inodes: u64) -> Result<(), Refused> {
    if !(DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&bytes) {
        return Err(Refused(format!("a volume must have {DISK_BYTES_MIN} to {DISK_BYTES_MAX} bytes")));
    }
    let inodes_max = INODES_MAX_BASE + bytes / BYTES_FOR_INODE;
    if !(1..=inodes_max).contains(&inodes) {
        return Err(Refused(format!("a volume of {bytes} bytes must have 1 to {inodes_max} inodes")));
    }
    Ok(())
}

/// Where volumes may stand. Whether there are such volumes is not decided here.
fn check_volumes(launch: &Launch) -> Result<(), Refused> {
    /// Of the sandbox's own making: nothing of anybody's is mounted there.
    const OURS: [&str; 3] = ["proc", "sys", "dev"];
    if launch.volumes.is_empty() {
        return Ok(());
    }
    if launch.isolation != Isolation::Container {
        return Err(Refused("there are no volumes under gVisor".to_owned()));
    }
    if launch.volumes.len() > VOLUMES_MAX {
        return Err(Refused(format!("a sandbox may have {VOLUMES_MAX} volumes")));
    }
    let mut paths = Vec::new();
    for VolumeMount { path, .. } in &launch.volumes {
        let parts: Vec<&str> = path.strip_prefix('/').unwrap_or_default().split('/').collect();
        let is_sound = path.len() <= PATH_BYTES_MAX
            && parts
                .iter()
                .all(|part| !part.is_empty() && part.len() <= NAME_BYTES_MAX && ![".", ".."].contains(part) && !part.contains('\0'));
        if !is_sound {
            return Err(Refused(format!("{path:?} is no absolute path of folders, without `.` and `..`")));
        }
        if parts.first().is_some_and(|first| OURS.contains(first)) {
            return Err(Refused(format!("no volume can be at {path}")));
        }
        paths.push(parts);
    }
    paths.sort_unstable();
    match paths.iter().zip(paths.iter().skip(1)).find(|(outer, inner)| inner.starts_with(outer)) {
        Some((_, inner)) => Err(Refused(format!("/{} is at or within the place of another volume", inner.join("/")))),
        None => Ok(()),
    }
}

fn check_io(io: IoLimits) -> Result<(), Refused> {
    let is_within = (1..=IoLimits::MAX.bytes_per_s).contains(&io.bytes_per_s) && (1..=IoLimits::MAX.ops_per_s).contains(&io.ops_per_s);
    let IoLimits { bytes_per_s, ops_per_s } = IoLimits::MAX;
    is_within.then_some(()).ok_or_else(|| Refused(format!("io must be 1 to {bytes_per_s} bytes and 1 to {ops_per_s} operations a second")))
}

/// The bounds of limits that a running sandbox is to have from now on.
pub(crate) fn check_change(limits: &NewLimits, is_gvisor: bool) -> Result<(), Refused> {
    let NewLimits { memory_bytes, cpu_millis, pids, wall_ms, cpu_ms, io } = *limits;
    let memory_min = if is_gvisor { gvisor::MEMORY_BYTES_MIN } else { MEMORY_BYTES_MIN };
    if memory_bytes.is_some_and(|bytes| bytes < memory_min) {
        return Err(Refused(format!("memory_bytes must be at least {memory_min}")));
    }
    let is_zero = |time| time == NewTime::Ms(0);
    for (name, is_zero) in
        [("cpu_millis", cpu_millis == Some(0)), ("pids", pids == Some(0)), ("wall_ms", is_zero(wall_ms)), ("cpu_ms", is_zero(cpu_ms))]
    {
        if is_zero {
            return Err(Refused(format!("{name} must be at least 1")));
        }
    }
    if is_gvisor && pids.is_some() {
        return Err(Refused("the pids limit under gVisor is held by its kernel, which has it from the start".to_owned()));
    }
    io.map_or(Ok(()), check_io)
}

/// What a further process may be. Whether its sandbox takes one is not decided here.
pub(crate) fn check_exec(exec: &Exec) -> Result<(), Refused> {
    if exec.args.first().is_none_or(String::is_empty) {
        return Err(missing("args"));
    }
    if exec.cwd.as_ref().is_some_and(|cwd| !cwd.starts_with('/')) {
        return Err(Refused("cwd must be an absolute path".to_owned()));
    }
    if exec.env.iter().any(|line| line.split_once('=').is_none_or(|(name, _)| name.is_empty())) {
        return Err(Refused("env must have lines of NAME=value".to_owned()));
    }
    Ok(())
}

fn missing(field: &str) -> Refused {
    Refused(format!("{field} is missing"))
}

#[cfg(test)]
mod tests;
