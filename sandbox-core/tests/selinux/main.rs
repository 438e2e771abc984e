//! The keeper with a label for payloads, on a kernel that enforces the SELinux policy beside this file. There is none on most machines, so this
//! is no part of `cargo test`: `tools/test-vm.sh` boots one and loads the policy. Elsewhere every test here fails.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "../keeper/fenced.rs"]
mod fenced;
#[expect(dead_code, reason = "what the other tests of the keeper need")]
#[path = "../keeper/harness.rs"]
mod harness;

use std::process::Command;

use sandbox_core::{
    fence::Fence::{self, *},
    probe::{self, Status},
    protocol::{Answer, Cause, Medium},
    selinux::Labels,
};

use fenced::{assert_stopped, attack, by};
use harness::{KEEPER, Node, Run, busybox_layer, fences, header, kill, refusal, shell, wait, wait_for_line, weak_keeper};

const HOST: &str = "system_u:system_r:host_t:s0";
/// With two categories, whose comma must not end an option of a mount.
const PAYLOAD: &str = "system_u:system_r:mayfly_sandbox_t:s0:c0,c1";
const FILES: &str = "system_u:object_r:mayfly_file_t:s0:c0,c1";
/// To which the policy lets nobody change under no_new_privs.
const STUCK: &str = "system_u:system_r:mayfly_stuck_t:s0";
const ENFORCE: &str = "/sys/fs/selinux/enforce";

fn labelled(process: &str) -> Node {
    start_labelled(Command::new(KEEPER), process)
}

/// With which a control may leave out fences.
fn weak() -> Node {
    start_labelled(Command::new(weak_keeper()), PAYLOAD)
}

fn start_labelled(mut keeper: Command, process: &str) -> Node {
    assert_eq!(std::fs::read_to_string(ENFORCE).unwrap(), "1", "SELinux does not enforce a policy here");
    keeper.args(["--require-fence", "selinux", "--selinux-label", process, "--selinux-mount-label", FILES]);
    Node::start_as(keeper)
}

fn said(run: Run, node: &Node) -> String {
    let done = run.run_on(node);
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    assert_eq!(done.stderr, "");
    done.stdout
}

/// The kernel ends a label with a NUL.
fn own_label() -> Run {
    shell("cat /proc/self/attr/current")
}

#[test]
fn a_payload_and_what_it_starts_have_the_label_in_spite_of_no_new_privs() {
    let node = labelled(PAYLOAD);
    assert!(fences(&node).has(Selinux));
    assert_eq!(said(own_label(), &node), format!("{PAYLOAD}\0"));
    assert_eq!(said(own_label().with("/process/user/uid", 1000), &node), format!("{PAYLOAD}\0"));
    let done = own_label().run_on(&node);
    assert!(done.launched.unwrap().fences.has(Selinux), "the record does not say so");
    // The control, and why nothing else here can be taken for the label's work.
    assert_eq!(said(own_label().without(&[Selinux]), &weak()), format!("{HOST}\0"));
}

#[test]
fn init_keeps_the_keepers_label_and_files_have_the_mounts() {
    assert_labels(Medium::Memory);
}

#[test]
fn files_in_a_layer_on_disk_have_the_mounts_label_as_well() {
    assert_labels(Medium::Disk);
}

fn assert_labels(medium: Medium) {
    let node = labelled(PAYLOAD);
    let mut client = node.client();
    let mut run = shell("echo made > /tmp/made; echo made > /dev/shm/made; echo here; exec sleep 100");
    run.supervision.medium = medium;
    let Answer::Launched(_) = run.launch(&mut client) else { panic!("it did not start") };
    wait_for_line(&node.log_path(run.id));
    let label = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/attr/current")).unwrap();
    let (init, payload) = children(&node.pid().to_string())
        .into_iter()
        .find_map(|init| Some((children(&init).pop()?, init)))
        .map(|(payload, init)| (init, payload))
        .expect("a payload runs");
    assert_eq!((label(&init), label(&payload)), (format!("{HOST}\0"), format!("{PAYLOAD}\0")));
    for file in ["tmp/made", "dev/shm/made", "dev/null", "dev/pts", "bin/busybox", "etc/hosts"] {
        let mut value = [0; 256];
        let size = rustix::fs::getxattr(format!("/proc/{payload}/root/{file}"), "security.selinux", &mut value[..]).unwrap();
        assert_eq!(str::from_utf8(&value[..size]).unwrap(), format!("{FILES}\0"), "{file}");
    }
    kill(&mut client, run.id);
    wait(&mut client, run.id);
}

fn children(pid: &str) -> Vec<String> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn what_the_policy_denies_is_denied_and_by_nothing_else() {
    assert_stopped(&weak(), || attack(&["listen_on_port_80"]), &by(&[Selinux]));
}

#[test]
fn cve_2024_21626_a_folder_of_the_hosts_that_is_left_open_is_taken_away() {
    let fences: [Fence; 3] = [Descriptors, Landlock, Selinux];
    assert_stopped(&weak(), || attack(&["open_through_leak"]), &by(&fences));
}

#[test]
fn ordinary_work_is_not_denied() {
    let node = labelled(PAYLOAD);
    let mut run = shell(
        "mkdir /tmp/a && cat > /tmp/a/b && ln -s b /tmp/a/c && mv /tmp/a/b /tmp/a/d && ln -s d /tmp/a/b && cp /bin/busybox /tmp/cat && \
         /tmp/cat /tmp/a/c | head -n 1; yes | head -n 1 > /dev/null; cat /proc/self/status /proc/meminfo > /dev/null; \
         dd if=/dev/zero of=/dev/shm/z bs=1k count=4 2> /dev/null; rm -r /tmp/a /dev/shm/z; mkfifo /tmp/f; echo x > /tmp/f & \
         cat < /tmp/f; kill -0 $$; sleep 9 & kill $!; wait",
    );
    for applet in ["mkdir", "ln", "mv", "cp", "rm", "mkfifo"] {
        let script = run.spec["process"]["args"][2].as_str().unwrap().replace(&format!("{applet} "), &format!("busybox {applet} "));
        run.spec["process"]["args"][2] = script.into();
    }
    run.stdin = Some(b"one\ntwo\n".to_vec());
    assert_eq!(said(run, &node), "one\nx\n");
}

#[test]
fn cve_2025_52881_a_proc_that_the_image_brings_is_not_where_the_label_is_written() {
    let node = labelled(PAYLOAD);
    let mut layer = tar::Builder::new(Vec::new());
    for number in 1..10 {
        layer.append_data(&mut header(tar::EntryType::Regular, 0o666), format!("decoy/{number}/attr/exec"), &[][..]).unwrap();
    }
    layer.append_link(&mut header(tar::EntryType::Symlink, 0o777), "proc", "decoy").unwrap();
    let image = "e".repeat(64);
    let answer = node.unpack(&image, vec![busybox_layer(), layer.into_inner().unwrap()]);
    assert!(matches!(answer, Answer::Unpacked(_)), "{answer:?}");
    assert!(node.image_path(&image, "proc/1/attr/exec").exists(), "the image is not what it is to be");
    assert_eq!(said(own_label().with("/root/path", image), &node), format!("{PAYLOAD}\0"));
}

#[test]
fn a_label_that_the_policy_lacks_is_named_and_no_keeper_starts() {
    let unknown = "system_u:system_r:nobody_knows_t:s0";
    for labels in [vec!["--selinux-label", unknown], vec!["--selinux-label", PAYLOAD, "--selinux-mount-label", unknown]] {
        let said = refusal(&labels);
        assert!(said.contains("does not have the label") && said.contains(unknown), "{said}");
    }
}

#[test]
fn doctor_tells_which_label_payloads_get_and_that_one_is_unknown() {
    let check = |process: &str| probe::selinux(Some(&Labels { process: process.to_owned(), mount: None }));
    assert_eq!((check(PAYLOAD).status, check(PAYLOAD).found), (Status::Ok, format!("enforced; payloads get the label {PAYLOAD}")));
    let unknown = check("nobody");
    assert!(unknown.status == Status::Fail && unknown.found.contains("nobody"), "{unknown:?}");
    assert!(probe::selinux(None).found.starts_with("enabled; payloads have no label"));
}

#[test]
fn a_policy_that_denies_nothing_is_no_fence_and_no_keeper_starts() {
    std::fs::write(ENFORCE, "0").unwrap();
    let said = std::panic::catch_unwind(|| refusal(&["--selinux-label", PAYLOAD]));
    std::fs::write(ENFORCE, "1").unwrap();
    let said = said.unwrap();
    assert!(said.contains("permissive") && said.contains(PAYLOAD), "{said}");
}

#[test]
fn a_domain_that_no_new_privs_keeps_out_of_is_a_failure_of_the_host_that_says_what_the_policy_lacks() {
    let done = own_label().run_on(&labelled(STUCK));
    let Cause::InfraError { message } = &done.ending.cause else { panic!("it ended so: {:?}", done.ending.cause) };
    assert!(message.contains(STUCK) && message.contains("nnp_transition"), "{message}");
}
