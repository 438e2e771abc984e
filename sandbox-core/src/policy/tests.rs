//! What passes, and that each thing beyond it does not.

use serde_json::{Value, json};

use super::*;
use crate::protocol::{OutputPolicy, SandboxId, Stdin};

const IMAGE: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fn spec() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": IMAGE, "readonly": false },
        "hostname": "box",
        "process": {
            "terminal": false, "user": { "uid": 1000, "gid": 100 }, "args": ["/bin/true"], "env": ["A=b"], "cwd": "/",
            "noNewPrivileges": true,
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 64, "hard": 64 }, { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }],
        },
        "linux": { "resources": {
            "memory": { "limit": 67_108_864, "swap": 67_108_864 },
            "cpu": { "quota": 50_000, "period": 100_000 },
            "pids": { "limit": 32 },
        } },
    })
}

fn check(spec: &Value) -> Result<Plan, Refused> {
    check_by(spec, Weakening::Refused)
}

fn check_by(spec: &Value, weakening: Weakening) -> Result<Plan, Refused> {
    let launch = Launch {
        id: SandboxId(uuid::Uuid::nil()),
        image: IMAGE.parse().unwrap(),
        spec: serde_json::to_vec(spec).unwrap(),
        isolation: Isolation::Container,
        supervision: Supervision {
            wall_ms: Some(1000),
            cpu_ms: None,
            output_bytes: 0,
            output_policy: OutputPolicy::Truncate,
            medium: Medium::Memory,
            disk_bytes: 1 << 20,
            inodes: 64,
            io: IoLimits::MAX,
        },
        stdin: Stdin::Null,
        has_files: false,
        terminal: None,
        layer: crate::protocol::Layering::Fresh,
        keeps_layer: false,
        volumes: Vec::new(),
    };
    Plan::check(&launch, weakening)
}

/// The refusal of a spec in which the field at `pointer` (RFC 6901) is `value`.
fn refusal_with(pointer: &str, value: Value) -> String {
    let mut spec = spec();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[name] = value;
    check(&spec).unwrap_err().to_string()
}

#[test]
fn an_ordinary_spec_passes_with_all_its_values() {
    let plan = check(&spec()).unwrap();
    assert_eq!(plan.limits, Limits { memory_bytes: 64 << 20, cpu_quota_us: 50_000, cpu_period_us: 100_000, pids: 32 });
    assert_eq!(plan.user, User::Ids { uid: 1000, gid: 100, groups: vec![] });
    assert_eq!(plan.rlimits, [(libc::RLIMIT_NOFILE, 64)]);
    assert_eq!(plan.folders, [""; 0]);
}

#[test]
fn a_mount_without_a_source_is_a_folder_of_which_there_may_be_some() {
    let with = |folders: usize| {
        let mut spec = spec();
        spec["mounts"] = (0..folders).map(|number| json!({ "destination": format!("/data/{number}") })).collect();
        check(&spec)
    };
    assert_eq!(with(2).unwrap().folders, ["/data/0", "/data/1"]);
    assert_eq!(with(FOLDERS_MAX).unwrap().folders.len(), FOLDERS_MAX);
    assert!(with(FOLDERS_MAX + 1).unwrap_err().to_string().starts_with("mounts: "));
}

#[test]
fn whatever_reaches_out_of_the_sandbox_is_refused_by_name() {
    assert_eq!(refusal_with("/mounts", json!([{ "destination": "/host", "source": "/" }])), "mounts.source may not be set");
    assert_eq!(refusal_with("/mounts", json!([{ "destination": "/host", "options": ["rbind"] }])), "mounts.options may not be set");
    assert_eq!(refusal_with("/mounts", json!([{ "destination": "/host", "type": "tmpfs" }])), "mounts.type may not be set");
    assert_eq!(refusal_with("/mounts", json!([{ "destination": "host" }])), "mounts: a destination is an absolute path");
    assert_eq!(refusal_with("/hooks", json!({ "prestart": [{ "path": "/bin/sh" }] })), "hooks.prestart may not be set");
    assert_eq!(
        refusal_with("/process/capabilities", json!({ "inheritable": ["CAP_CHOWN"] })),
        "process.capabilities.inheritable may not be set"
    );
    assert_eq!(refusal_with("/linux/namespaces", json!([{ "type": "pid", "path": "/proc/1/ns/pid" }])), "linux.namespaces may not be set");
    assert_eq!(refusal_with("/linux/devices", json!([{ "path": "/dev/sda", "type": "b" }])), "linux.devices may not be set");
    assert_eq!(refusal_with("/linux/sysctl", json!({ "kernel.core_pattern": "x" })), "linux.sysctl.kernel.core_pattern may not be set");
    assert_eq!(refusal_with("/process/oomScoreAdj", json!(-1000)), "process.oomScoreAdj may not be set");
    assert_eq!(refusal_with("/linux/fieldOfTheFuture", json!(1)), "linux.fieldOfTheFuture may not be set");
}

#[test]
fn a_spec_without_a_limit_is_refused_by_its_name() {
    for (pointer, name) in [
        ("/linux/resources/memory/limit", "memory.limit"),
        ("/linux/resources/cpu/quota", "cpu.quota"),
        ("/linux/resources/cpu/period", "cpu.period"),
    ] {
        assert_eq!(refusal_with(pointer, Value::Null), format!("{name} is missing"));
    }
    assert_eq!(refusal_with("/linux/resources/pids", Value::Null), "pids.limit is missing");
    assert_eq!(refusal_with("/linux/resources/pids/limit", json!(-1)), "pids.limit is missing");
}

#[test]
fn no_fence_is_left_out_but_where_a_test_may() {
    let mut spec = spec();
    spec["annotations"] = json!({ "without": "seccomp,landlock" });
    assert_eq!(check(&spec).unwrap_err().to_string(), "annotations.without may not be set");
    let plan = check_by(&spec, Weakening::Allowed).unwrap();
    assert_eq!(plan.without, [Fence::Seccomp, Fence::Landlock].into_iter().collect());
    spec["annotations"] = json!({ "without": "pid_namespace" });
    assert_eq!(check_by(&spec, Weakening::Allowed).unwrap_err().to_string(), "pid_namespace cannot be left out");
}

#[test]
fn capabilities_go_as_far_as_a_root_image_needs_and_no_further() {
    let sets = |names: &[&str]| json!({ "bounding": names, "effective": names, "permitted": names });
    let mut spec = spec();
    spec["process"]["capabilities"] = sets(&["CAP_CHOWN", "CAP_SETUID"]);
    assert_eq!(check(&spec).unwrap().capabilities, privileges::CHOWN | privileges::SETUID);
    for refused in
        ["CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_AUDIT_WRITE", "CAP_SETPCAP", "CAP_SETFCAP", "CAP_SYS_PTRACE"]
    {
        let said = refusal_with("/process/capabilities", sets(&["CAP_CHOWN", refused]));
        assert!(said.contains(refused.trim_start_matches("CAP_")) && said.contains("not for a request"), "{said}");
    }
    let uneven = json!({ "bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] });
    assert!(refusal_with("/process/capabilities", uneven).contains("must be the same"));
}

#[test]
fn a_spec_without_a_limit_of_open_files_is_refused() {
    assert_eq!(refusal_with("/process/rlimits", json!([])), "process.rlimits: RLIMIT_NOFILE is missing");
}

#[test]
fn another_root_than_the_image_is_refused() {
    assert_eq!(refusal_with("/root/path", json!("/")), "root.path is not the image of the request");
}

#[test]
fn new_privileges_cannot_be_allowed() {
    assert_eq!(refusal_with("/process/noNewPrivileges", json!(false)), "process.noNewPrivileges must be true");
}

#[test]
fn limits_of_a_running_sandbox_have_the_bounds_of_a_launch() {
    use crate::protocol::{NewLimits, NewTime};
    let none = NewLimits::default();
    assert_eq!(check_change(&none, false), Ok(()));
    let fitting = NewLimits {
        memory_bytes: Some(4 << 20),
        cpu_millis: Some(1),
        pids: Some(1),
        wall_ms: NewTime::Ms(1),
        cpu_ms: NewTime::Ms(1),
        io: Some(IoLimits::MAX),
    };
    assert_eq!(check_change(&fitting, false), Ok(()));
    assert_eq!(check_change(&NewLimits { wall_ms: NewTime::Unlimited, cpu_ms: NewTime::Unlimited, ..none }, true), Ok(()));
    for (limits, named) in [
        (NewLimits { memory_bytes: Some((4 << 20) - 1), ..none }, "memory_bytes"),
        (NewLimits { cpu_millis: Some(0), ..none }, "cpu_millis"),
        (NewLimits { pids: Some(0), ..none }, "pids"),
        (NewLimits { wall_ms: NewTime::Ms(0), ..none }, "wall_ms"),
        (NewLimits { cpu_ms: NewTime::Ms(0), ..none }, "cpu_ms"),
        (NewLimits { io: Some(IoLimits { bytes_per_s: 0, ops_per_s: 1 }), ..none }, "io"),
    ] {
        let refused = check_change(&limits, false).unwrap_err().to_string();
        assert!(refused.starts_with(named), "{refused}");
    }
    assert!(check_change(&NewLimits { pids: Some(5), ..none }, true).is_err());
    assert!(check_change(&NewLimits { memory_bytes: Some(4 << 20), ..none }, true).is_err());
}
