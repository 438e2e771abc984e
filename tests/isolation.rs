//! What code in a sandbox cannot do, see or reach. Where it can be had, a control shows that the attack works outside.
//!
//! Controls run as root on the host, in a pid, mount and host-name namespace of their own so that they change nothing there.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    process::{Command, Stdio},
};

use mayfly_tests::{
    outcome::{assert_exit, stdout},
    service::{self, Shared, program, shared},
};
use serde_json::json;

/// Tries an attack inside, as root of the sandbox and as a plain user, and outside. Returns what each said.
async fn attack(name: &str) -> (String, String, String) {
    let service = shared();
    let client = service.client();
    let root = client.run(&json!({ "image": "busybox", "command": ["attack", name] })).await;
    let user = client.run(&json!({ "image": "busybox-user", "command": ["attack", name] })).await;
    (told(&root), told(&user), outside(&service, name))
}

/// What the attack printed, or the signal that it died of.
fn told(run: &serde_json::Value) -> String {
    let signal = run["outcome"]["signal"].as_str().unwrap_or_default();
    format!("{}{signal}", stdout(run).trim())
}

/// The control: the same program as root of the host.
fn outside(service: &Shared, name: &str) -> String {
    let binary = service.place.busybox_root.join("bin/attack");
    // A shell stays as process 1 of the new namespace: some attacks aim at process 1.
    let script = format!("{} {name}; exit 0", binary.display());
    let output = Command::new("unshare")
        .args(["--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "sh", "-c", &script])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[track_caller]
fn assert_stopped(attempt: &(String, String, String)) {
    let (root, user, control) = attempt;
    assert_eq!(control, "done", "the control failed, so this test proves nothing");
    assert!(root != "done" && !root.is_empty(), "root of the sandbox could do it");
    assert!(user != "done" && !user.is_empty(), "a user of the sandbox could do it");
}

macro_rules! attacks {
    ($($name:ident: $attack:literal;)*) => {$(
        #[tokio::test]
        async fn $name() {
            assert_stopped(&attack($attack).await);
        }
    )*};
}

attacks! {
    a_sandbox_makes_no_user_namespace: "unshare_user";
    a_sandbox_makes_no_mount_namespace: "unshare_mount";
    a_sandbox_makes_no_network_namespace: "unshare_net";
    a_sandbox_clones_no_user_namespace: "clone_user";
    a_sandbox_clones_no_user_namespace_by_the_newer_call: "clone3_user";
    a_sandbox_joins_no_namespace: "join_namespace";
    a_sandbox_mounts_nothing: "mount_tmpfs";
    a_sandbox_clones_no_mount: "open_tree";
    a_sandbox_opens_no_file_system: "fsopen";
    a_sandbox_makes_no_device: "make_device";
    a_sandbox_changes_no_root: "chroot";
    a_sandbox_changes_no_host_name: "sethostname";
    a_sandbox_sets_no_clock: "set_clock";
    a_sandbox_takes_no_priority: "nice_up";
    a_sandbox_loads_no_bpf: "load_bpf";
    a_sandbox_counts_no_events: "perf";
    a_sandbox_has_no_io_uring: "io_uring";
    a_sandbox_has_no_keyring: "add_key";
    a_sandbox_handles_no_page_faults: "userfault";
    a_sandbox_opens_no_file_by_handle: "handle_at";
    a_sandbox_traces_no_process: "ptrace_child";
    a_sandbox_does_not_trace_its_init: "ptrace_init";
    a_sandbox_does_not_read_its_inits_memory: "read_init_memory";
    a_sandbox_has_no_packet_socket: "packet_socket";
    a_sandbox_has_no_raw_socket: "raw_socket";
    a_sandbox_has_no_socket_to_the_hypervisor: "vsock_socket";
    a_sandbox_writes_no_sysctl: "write_sysctl";
    a_sandbox_reads_no_kernel_log: "read_kmsg";
    a_sandbox_does_not_reboot: "reboot";
}

#[tokio::test]
async fn the_kernels_crypto_socket_is_refused_before_the_kernel_is_asked_for_it() {
    // No control: whether the host has AF_ALG at all depends on its modules, and EAFNOSUPPORT would be its answer then.
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["attack", "alg_socket"] })).await;

    assert!(["EPERM", "EACCES", "EAFNOSUPPORT", "SIGSYS"].contains(&told(&run).as_str()), "{run:#}");
}

#[tokio::test]
async fn a_payload_has_no_capability_and_no_way_to_one() {
    let run = shared().client().shell("grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status").await;

    let said = stdout(&run);
    let capabilities: Vec<_> = said.lines().filter(|l| l.starts_with("Cap")).map(|l| l.split('\t').next_back().unwrap()).collect();
    assert_eq!(capabilities, ["0000000000000000"; 5]);
    assert!(said.contains("NoNewPrivs:\t1"), "{said}");
    assert!(said.contains("Seccomp:\t2"), "{said}");
}

#[tokio::test]
async fn a_set_user_id_program_gives_nothing() {
    let script = "cp /bin/busybox /tmp/id && chmod 4755 /tmp/id && ls -l /tmp/id | cut -c1-10 && grep -c nosuid /proc/mounts";

    let run = shared().client().shell(script).await;

    let lines: Vec<_> = stdout(&run).lines().collect();
    assert_eq!(lines.first(), Some(&"-rwsr-xr-x"), "{run:#}");
    assert!(lines[1].parse::<u32>().unwrap() > 3, "{run:#}");
}

#[tokio::test]
async fn processes_run_under_ids_that_are_nobodys_on_the_host() {
    let service = shared();
    let client = service.client();
    let (first, first_host) = running_sandbox(&service, &client).await;
    let (second, second_host) = running_sandbox(&service, &client).await;

    // 65,536 ids each, far from those that accounts have.
    assert!(first_host >= 1 << 20 && second_host >= 1 << 20, "{first_host} {second_host}");
    assert!(first_host.abs_diff(second_host) >= 65_536, "{first_host} {second_host}");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{first}")).await.status, 204);
    assert_eq!(client.delete(&format!("/v1/sandboxes/{second}")).await.status, 204);
}

/// A sandbox whose payload sleeps, with the host's id of that payload's user.
async fn running_sandbox(service: &Shared, client: &mayfly_tests::Client) -> (String, u32) {
    let seconds = 100_000 + uuid::Uuid::new_v4().as_u128() % 100_000;
    let made = client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", seconds.to_string()] })).await.expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    client.until(&format!("/v1/sandboxes/{id}"), |s| s["state"] == "running").await;
    let sleepers = mayfly_tests::host::processes_with(&format!("sleep {seconds}"));
    let ours = mayfly_tests::host::descendants(service.place.keeper_pid());
    let payload = sleepers.iter().find(|pid| ours.contains(pid)).expect("the payload is a descendant of the keeper");
    let uid = mayfly_tests::host::status_field(*payload, "Uid").unwrap();
    (id, uid.split('\t').next().unwrap().parse().unwrap())
}

#[tokio::test]
async fn only_its_own_processes_are_there() {
    let run = shared().client().shell("ls /proc | grep -E '^[0-9]+$' | wc -l; cat /proc/1/comm").await;

    let mut lines = stdout(&run).lines();
    // init, the shell, ls, grep and wc, as far as they still live.
    assert!(lines.next().unwrap().parse::<u32>().unwrap() <= 6, "{run:#}");
    assert!(lines.next().unwrap().contains("sandbox-i"), "{run:#}");
}

#[tokio::test]
async fn only_loopback_is_there() {
    let run = shared().client().shell("ls /proc/self/net >/dev/null; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '; wget -q -T 2 -O- http://192.0.2.1/ 2>&1; echo $?").await;

    let said = stdout(&run);
    assert_eq!(said.lines().next(), Some("lo"), "{run:#}");
    assert_ne!(said.lines().last(), Some("0"), "{run:#}");
}

#[tokio::test]
async fn loopback_works_inside() {
    // 4000 is 0FA0, and it takes a moment until somebody listens there.
    let listens = "for i in $(seq 100); do grep -q :0FA0 /proc/net/tcp && break; sleep 0.05; done";
    let script = format!("echo through loopback | nc -l -p 4000 127.0.0.1 & {listens}; nc 127.0.0.1 4000 </dev/null; true");
    let run = shared().client().shell(&script).await;

    assert_eq!(stdout(&run), "through loopback\n", "{run:#}");
}

#[tokio::test]
async fn the_hosts_own_services_are_not_reachable() {
    let service = shared();
    let port = service.place.url.rsplit(':').next().unwrap().to_owned();
    let script = format!("wget -q -T 2 -O- http://127.0.0.1:{port}/healthz && echo reached");

    let run = service.client().shell(&script).await;
    let control = reqwest::get(format!("{}/healthz", service.place.url)).await.unwrap();

    assert!(control.status().is_success());
    assert!(!stdout(&run).contains("reached"), "{run:#}");
}

#[tokio::test]
async fn no_descriptor_of_ours_reaches_the_payload() {
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["ls", "/proc/self/fd"] })).await;

    // The fourth is the folder that `ls` itself has open.
    assert_eq!(stdout(&run), "0\n1\n2\n3\n");
}

#[tokio::test]
async fn nothing_of_the_hosts_files_is_there() {
    let folder = service::folder().unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, "host").unwrap();
    let path = secret.display();
    let script = format!(
        "cat {path}; cat /proc/1/root{path}; cat /proc/self/cwd/../../../../..{path}; cat /sys/kernel/uevent_seqnum; ls /host /mnt"
    );

    let run = shared().client().shell(&script).await;

    assert!(!stdout(&run).contains("host"), "{run:#}");
    assert!(!run["outcome"]["exit_code"].is_null() && run["outcome"]["exit_code"] != 0, "{run:#}");
}

#[tokio::test]
async fn mounts_tell_no_path_of_the_host() {
    let service = shared();

    let run = service.client().shell("cat /proc/self/mountinfo /proc/self/cgroup").await;

    assert_exit(&run, 0);
    let said = stdout(&run);
    assert!(!said.contains("/var/") && !said.contains("images"), "{said}");
    assert!(!said.contains("mayfly"), "{said}");
}

#[tokio::test]
async fn devices_are_the_few_that_every_program_expects() {
    let run = shared()
        .client()
        .shell("ls /dev; echo x > /dev/mine; cat /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c")
        .await;

    let said = stdout(&run);
    let names: Vec<_> = said.lines().take_while(|l| !l.starts_with('4')).collect();
    assert_eq!(names, ["fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"]);
    assert!(said.ends_with("4\n4\n"), "{said}");
    assert!(run["stderr"].as_str().unwrap().contains("/dev/mine"), "{run:#}");
}

#[tokio::test]
async fn kernel_facts_that_help_an_attacker_are_hidden() {
    let run = shared().client().shell("cat /proc/kcore /proc/keys /proc/kallsyms /proc/timer_list 2>/dev/null | wc -c").await;

    assert_eq!(stdout(&run).trim(), "0");
}

#[tokio::test]
async fn the_program_that_starts_payloads_cannot_be_overwritten() {
    // CVE-2019-5736: writing to the runtime's own binary through /proc/PID/exe.
    let before = fs::read(program("sandbox-init")).unwrap();

    let run = shared().client().shell("echo evil > /proc/1/exe; echo evil > /proc/self/exe; cat /proc/1/environ; true").await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "");
    assert_eq!(fs::read(program("sandbox-init")).unwrap(), before);
}

#[tokio::test]
async fn pid_one_cannot_be_ended_from_inside() {
    let run = shared().client().shell("kill -9 1; kill -TERM 1; kill -STOP 1; echo still here").await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "still here\n");
}

#[tokio::test]
async fn a_plain_user_is_that_user_with_the_groups_of_the_image() {
    let run = shared().client().run(&json!({ "image": "busybox-user", "command": ["id"] })).await;

    let said = stdout(&run);
    assert!(said.starts_with("uid=1000(user) gid=1000(user) groups="), "{said}");
    assert!(said.contains("1001(extra)"), "{said}");
}

#[tokio::test]
async fn a_plain_user_does_not_change_the_images_files() {
    let run =
        shared().client().run(&json!({ "image": "busybox-user", "command": ["sh", "-c", "echo x >> /etc/passwd && echo changed"] })).await;

    assert!(!stdout(&run).contains("changed"), "{run:#}");
}

#[tokio::test]
async fn files_with_hostile_paths_stay_inside() {
    let folder = service::folder().unwrap();
    let target = folder.path().join("escaped");
    let request = json!({
        "image": "busybox", "command": ["true"],
        "files": [{ "path": format!("../../../../../../../..{}", target.display()), "content": "x" }],
    });

    let answer = shared().client().post("/v1/runs", &request).await;

    assert!([200, 422].contains(&answer.status), "{}", answer.text);
    assert!(!target.exists());
}

#[tokio::test]
async fn two_sandboxes_do_not_see_each_others_memory_files_or_processes() {
    let client = shared().client();
    let writer =
        json!({ "image": "busybox", "command": ["sh", "-c", "echo mine > /dev/shm/x; echo mine > /tmp/x; echo up; exec sleep 1000"] });
    let made = client.post("/v1/sandboxes", &writer).await.expect(201);
    let id = made["id"].as_str().unwrap();
    let up = client.follow(id, "from=0").await.next().await.unwrap();

    let run = client.shell("ls /dev/shm /tmp; cat /dev/shm/x /tmp/x; ps | grep -c [s]leep; true").await;

    assert_eq!(up["data"], "up\n");
    assert!(!stdout(&run).contains("mine"), "{run:#}");
    assert!(stdout(&run).trim_end().ends_with('0'), "{run:#}");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}
