//! Who may do what on the host: the service holds no privilege, and the keeper hears the service alone.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::Command,
};

use mayfly_tests::{
    host::{descendants, status_field},
    service::shared,
};
use serde_json::json;

#[tokio::test]
async fn the_process_that_speaks_http_is_not_root_and_has_no_capability() {
    let pid = shared().place.pid;

    let uids = status_field(pid, "Uid").unwrap();
    let gids = status_field(pid, "Gid").unwrap();
    let groups = status_field(pid, "Groups").unwrap();

    assert!(uids.split('\t').all(|uid| uid != "0"), "{uids}");
    assert!(gids.split('\t').all(|gid| gid != "0"), "{gids}");
    assert_eq!(groups, "");
    assert_eq!(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| status_field(pid, set).unwrap()), ["0000000000000000"; 5]);
    assert_eq!(status_field(pid, "NoNewPrivs").unwrap(), "1");
}

#[tokio::test]
async fn every_thread_of_it_is_without_privilege() {
    let pid = shared().place.pid;

    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let status = fs::read_to_string(thread.path().join("status")).unwrap();
        assert!(status.contains("CapEff:\t0000000000000000") && !status.contains("Uid:\t0"), "{status}");
    }
}

#[tokio::test]
async fn the_keeper_is_root_and_has_one_thread() {
    let keeper = shared().place.keeper_pid();

    assert!(status_field(keeper, "Uid").unwrap().starts_with("0\t"));
    assert_eq!(status_field(keeper, "Threads").unwrap(), "1");
}

#[tokio::test]
async fn the_keepers_socket_is_for_root_and_the_services_group() {
    let service = shared();
    let socket = service.place.data_dir.join("keeper.sock");

    let meta = fs::metadata(&socket).unwrap();

    assert_eq!(meta.permissions().mode() & 0o777, 0o660);
    assert_eq!(meta.uid(), 0);
    assert_ne!(meta.gid(), 0);
    let script = "use Socket; socket(my $s, AF_UNIX, SOCK_SEQPACKET, 0) or die; connect($s, sockaddr_un($ARGV[0])) or die $!";
    let stranger = Command::new("setpriv")
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--", "perl", "-e", script])
        .arg(&socket)
        .output()
        .unwrap();
    let control = Command::new("perl").args(["-e", script]).arg(&socket).output().unwrap();
    assert!(control.status.success(), "the control failed: {}", String::from_utf8_lossy(&control.stderr));
    assert!(String::from_utf8_lossy(&stranger.stderr).contains("Permission denied"), "{stranger:?}");
}

#[tokio::test]
async fn folders_are_for_those_who_need_them() {
    let data_dir = shared().place.data_dir.clone();

    let mode = |name: &str| fs::metadata(data_dir.join(name)).unwrap().permissions().mode() & 0o7777;

    assert_eq!(mode("images"), 0o700);
    assert_eq!(fs::metadata(data_dir.join("images")).unwrap().uid(), 0);
    assert_eq!(mode("logs"), 0o750);
    assert_eq!(mode("blobs"), 0o700);
    assert_eq!(mode("uploads"), 0o700);
    assert_eq!(mode("pulls"), 0o700);
    assert_eq!(mode("postgres") & 0o077, 0);
    assert_eq!(mode("jwt-secret"), 0o600);
    assert_eq!(mode("registry-key"), 0o600);
    assert_eq!(mode("."), 0o751);
}

#[tokio::test]
async fn the_database_listens_on_no_address() {
    let service = shared();

    let listening = fs::read_to_string("/proc/net/tcp").unwrap() + &fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    let postgres: Vec<u32> = mayfly_tests::host::processes_with(&service.place.data_dir.join("postgres").display().to_string());

    assert!(!postgres.is_empty(), "the private Postgres runs");
    let inodes: Vec<&str> = listening.lines().filter(|l| l.contains(" 0A ")).filter_map(|l| l.split_whitespace().nth(9)).collect();
    for pid in postgres {
        for descriptor in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(descriptor.path()).unwrap_or_default().display().to_string();
            assert!(!inodes.iter().any(|inode| target == format!("socket:[{inode}]")), "postgres {pid} listens on TCP");
        }
    }
}

#[tokio::test]
async fn a_payload_holds_nothing_of_the_keepers() {
    let service = shared();
    let client = service.client();
    let seconds = 200_000 + uuid::Uuid::new_v4().as_u128() % 100_000;
    let made = client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", seconds.to_string()] })).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    client.until(&path, |s| s["state"] == "running").await;
    let sleeper = mayfly_tests::host::processes_with(&format!("sleep {seconds}"))
        .into_iter()
        .find(|pid| descendants(service.place.keeper_pid()).contains(pid))
        .unwrap();

    let mut descriptors: Vec<String> =
        fs::read_dir(format!("/proc/{sleeper}/fd")).unwrap().flatten().map(|d| d.file_name().into_string().unwrap()).collect();
    descriptors.sort();
    let environment = fs::read_to_string(format!("/proc/{sleeper}/environ")).unwrap();

    assert_eq!(descriptors, ["0", "1", "2"]);
    assert_eq!(
        environment.split('\0').filter(|v| !v.is_empty() && !v.starts_with("PATH=") && !v.starts_with("HOME=")).count(),
        0,
        "{environment:?}"
    );
    assert_eq!(client.delete(&path).await.status, 204);
}
