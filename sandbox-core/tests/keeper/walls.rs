//! The walls of a sandbox, tried from inside.

use std::os::fd::AsFd;

use sandbox_core::protocol::{Answer, Cause, FailureKind, Request};

use crate::harness::{Done, kill, node, output, shell, wait};

/// What a script printed, which must have ended well.
fn said(script: &str) -> String {
    let done = shell(script).run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    done.stdout
}

/// Runs an attack that prints `breached` if it works.
fn attack(script: &str) -> Done {
    let done = shell(&format!("({script}) && echo breached; true")).run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    done
}

fn assert_refused(script: &str) {
    let done = attack(script);
    assert_eq!(done.stdout, "", "{script}: {}", done.stderr);
}

#[test]
fn the_only_processes_are_its_own() {
    let names = said("ls /proc");
    let processes: Vec<&str> = names.lines().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect();
    assert_eq!(processes.first(), Some(&"1"));
    assert!(processes.len() <= 3, "init, the shell and ls: {processes:?}");
}

#[test]
fn it_has_no_privilege_of_any_kind() {
    let status = said("cat /proc/self/status");
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is missing in\n{status}");
    }
}

#[test]
fn every_namespace_is_its_own() {
    let names = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    let script = names.map(|name| format!("readlink /proc/self/ns/{name}")).join("; ").replace("readlink", "busybox readlink");
    // The first one lives on beside the second: the kernel gives the numbers of dead namespaces to new ones.
    let mut client = node().client();
    let living = shell(&format!("{script}; sleep 100"));
    living.launch(&mut client);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while String::from_utf8_lossy(&std::fs::read(node().log_path(living.id)).unwrap()).matches(":[").count() < names.len() {
        assert!(std::time::Instant::now() < deadline, "the first sandbox says nothing");
        std::thread::yield_now();
    }
    let second = said(&script);
    kill(&mut client, living.id);
    wait(&mut client, living.id);
    let (first, _) = output(&node().log_path(living.id));
    client.call(&Request::Forget { id: living.id }, &[]).unwrap();
    assert_eq!(first.lines().count(), names.len(), "{first}");
    for ((name, first), second) in names.into_iter().zip(first.lines()).zip(second.lines()) {
        let host = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(first, host.to_str().unwrap(), "{name} is the host's");
        assert_ne!(first, second, "{name} is shared by two sandboxes");
    }
}

#[test]
fn its_ids_are_unprivileged_ids_of_the_host() {
    let map = said("cat /proc/self/uid_map");
    let fields: Vec<u32> = map.split_whitespace().map(|field| field.parse().unwrap()).collect();
    assert_eq!((fields[0], fields[2]), (0, 65_536));
    assert!(fields[1] >= 0x7000_0000, "{map}");
}

#[test]
fn mounts_namespaces_and_host_names_cannot_be_changed() {
    assert_refused("mount -t tmpfs none /tmp");
    assert_refused("mount -o remount,rw /proc/sys");
    assert_refused("umount /proc");
    assert_refused("unshare -U true");
    assert_refused("unshare -r true");
    assert_refused("unshare -m true");
    assert_refused("hostname changed");
    assert_refused("chroot / true");
}

#[test]
fn devices_can_neither_be_made_nor_added() {
    assert_refused("mknod /tmp/sda b 8 0");
    assert_refused("touch /dev/new");
    assert_eq!(said("ls /dev"), "fd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n");
}

#[test]
fn the_hosts_side_of_proc_is_hidden_or_read_only() {
    assert_refused("echo h > /proc/sysrq-trigger");
    assert_refused("echo core > /proc/sys/kernel/core_pattern");
    assert_refused("head -c 1 /proc/kcore | grep -q .");
    assert_refused("ls /sys/* 2>/dev/null");
    assert_eq!(said("cat /proc/keys /proc/timer_list /proc/interrupts; ls /proc/acpi 2>/dev/null; true"), "");
}

#[test]
fn inits_memory_and_descriptors_are_out_of_reach() {
    for file in ["mem", "environ", "maps"] {
        assert_refused(&format!("cat /proc/1/{file} | grep -q ."));
    }
    assert_refused("ls /proc/1/fd");
    assert_refused("ls /proc/1/root/");
    assert_refused("kill -9 1; sleep 0.1; kill -STOP 1; sleep 0.1; exit 1");
}

#[test]
fn no_mount_honours_set_uid_bits_and_devices_are_in_dev_alone() {
    let mounts = said("cat /proc/self/mounts");
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let options: Vec<&str> = fields[3].split(',').collect();
        // What is mounted over a file of /proc is the null device of /dev.
        let is_of_dev = fields[1].starts_with("/dev") || fields[2] == "tmpfs" && fields[1].starts_with("/proc/");
        assert!(options.contains(&"nosuid"), "{line}");
        assert!(options.contains(&"nodev") || is_of_dev, "{line}");
    }
}

#[test]
fn it_starts_with_three_descriptors_and_no_other() {
    // The fourth is the one that ls itself reads the folder with.
    assert_eq!(said("ls /proc/self/fd"), "0\n1\n2\n3\n");
}

#[test]
fn the_image_below_is_not_changed_by_what_a_sandbox_writes() {
    assert_eq!(said("echo changed > /etc/passwd; cat /etc/passwd"), "changed\n");
    assert!(said("cat /etc/passwd").starts_with("root:"));
}

#[test]
fn an_image_keeps_its_owners_and_modes() {
    assert_eq!(said("stat -c '%u %g %a' /home/of-another"), "1000 42 4751\n");
}

#[test]
fn the_network_is_loopback_alone_and_up() {
    let devices = said("cat /proc/net/dev");
    assert_eq!(devices.lines().count(), 3, "{devices}");
    assert!(devices.contains("lo:"));
    assert_eq!(said("busybox ping -c 1 -W 1 127.0.0.1 >/dev/null 2>&1; busybox ip -o link show lo | grep -c UP"), "1\n");
}

#[test]
fn a_keeper_that_is_killed_leaves_no_process_behind() {
    let node = crate::harness::Node::start();
    let mut client = node.client();
    let marker = format!("{}", 100_000 + std::process::id());
    let run = shell(&format!("sleep {marker}"));
    run.launch(&mut client);
    // The kernel shows the new command line a moment after it has closed what execve(2) closes.
    wait_until("the payload is not there to begin with", || processes_with(&marker) > 0);
    drop(node);
    wait_until("a process outlives its keeper", || processes_with(&marker) == 0);
}

pub(crate) fn wait_until(otherwise: &str, is_so: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "{otherwise}");
        std::thread::yield_now();
    }
}

pub(crate) fn processes_with(text: &str) -> usize {
    let commands = std::fs::read_dir("/proc").unwrap().filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
    commands.filter(|command| command.windows(text.len()).any(|part| part == text.as_bytes())).count()
}

#[test]
fn a_hostile_layer_is_refused_with_the_reason_and_leaves_nothing() {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..9].copy_from_slice(b"../escape");
    header.set_size(1);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    layer.append(&header, &b"x"[..]).unwrap();
    let answer = node().unpack(&"e".repeat(64), vec![layer.into_inner().unwrap()]);
    let Answer::Failed(failure) = answer else { panic!("{answer:?}") };
    assert!(failure.message.contains("../escape"), "{}", failure.message);
}

#[test]
fn a_folder_of_the_hosts_is_refused_as_standard_input() {
    let run = shell("ls /proc/self/fd/0/");
    let host = std::fs::File::open("/").unwrap();
    let answer = run.launch_with_stdin(&mut node().client(), host.as_fd());
    let Answer::Failed(failure) = answer else { panic!("{answer:?}") };
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Refused, "stdin must be a regular file or a pipe"));
}

#[test]
fn the_standard_streams_can_be_opened_by_name() {
    let run = shell("echo out > /dev/stdout; echo err > /dev/stderr").with("/process/user/uid", 1000);
    let done = run.run();
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
}

#[test]
fn what_a_stream_holds_cannot_be_read_back() {
    let done = attack("head -n 1 < /dev/stdout");
    assert_eq!(done.stdout, "", "{}", done.stderr);
    assert!(done.stderr.contains("Permission denied"), "{}", done.stderr);
}
