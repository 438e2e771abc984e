//! Every attack with its controls: it works when all that stops it is left out, and each of those fences stops it alone.
//!
//! So a fence that is named here does something, and one that fails is not missed: the others stand. `docs/security.md` is this table for
//! readers. What a host lacks (AppArmor) is tried where it is there: this suite also runs in a virtual machine that has it.

use std::{
    io::{BufRead, BufReader},
    os::{fd::AsFd, linux::net::SocketAddrExt, unix::net::UnixListener},
    process::{Command, Stdio},
};

use sandbox_core::{
    fence::Fence::{self, *},
    protocol::{Answer, Cause, Request},
    seccomp::{Check, Verdict, rules},
};

use crate::{
    fenced::{Fenced, assert_stopped, attack, by, went},
    harness::{Done, Node, Run, command, kill, node, output, wait, wait_for_line, weak_keeper, weak_node},
};

fn assert_attack_stopped(arguments: &[&str], fenced: &Fenced<'_>) {
    assert_stopped(weak_node(), || attack(arguments), fenced);
}

macro_rules! attacks {
    ($($test:ident: $arguments:expr, $fenced:expr;)*) => {
        $(#[test]
        fn $test() {
            assert_attack_stopped(&$arguments, &$fenced);
        })*
    };
}

/// What takes a capability of the host's own.
const PRIVILEGED: [Fence; 4] = [Seccomp, Capabilities, UserNamespace, Apparmor];

attacks! {
    no_user_namespace_by_unshare: ["unshare_user"], by(&[Seccomp]);
    no_user_namespace_by_clone: ["clone_user"], by(&[Seccomp]);
    no_user_namespace_by_clone3: ["clone3_user"], by(&[Seccomp]);
    no_mount_in_a_namespace_of_its_own: ["mount_in_new_namespace"], by(&[Seccomp, Landlock, Apparmor]);
    cve_2022_0492_no_cgroup_of_its_own_to_write_release_agent: ["mount_cgroup"], by(&[Seccomp, Landlock, Apparmor]);
    no_mount_over_its_tree: ["mount_over"], by(&[Seccomp, Capabilities, UserNamespace, Landlock, Apparmor]);
    no_umount_of_what_hides_the_host: ["umount_proc"], by(&[Seccomp, Capabilities, UserNamespace, Landlock, Apparmor]);
    no_joining_of_namespaces: ["join_namespace"], by(&PRIVILEGED);
    no_change_of_the_host_name: ["change_host_name"], by(&PRIVILEGED);
    no_raw_socket: ["raw_socket"], by(&PRIVILEGED);
    no_packet_socket: ["packet_socket"], by(&PRIVILEGED);
    no_change_of_root: ["change_root"], by(&[Seccomp, Capabilities, Apparmor]);
    no_device_made: ["make_device"], by(&[Capabilities, UserNamespace, Apparmor]);
    no_socket_to_the_hypervisor: ["vsock_socket"], by(&[Seccomp, Apparmor]);
    no_reading_of_other_processes_memory: ["read_childs_memory"], by(&[Seccomp, Apparmor]);
    no_typing_into_terminals: ["type_into_terminal"], by(&[Seccomp]);
    no_core_dump: ["allow_core_dumps"], by(&[Seccomp]);

    pid_1_cannot_be_traced: ["trace_init"], by(&[Seccomp, InitShield, Capabilities, Apparmor]);
    pid_1_keeps_its_memory: ["read_file", "/proc/1/mem"], by(&[InitShield, Capabilities, Apparmor]);
    pid_1_keeps_its_environment: ["read_file", "/proc/1/environ"], by(&[InitShield, Capabilities]);
    pid_1_keeps_its_descriptors: ["read_link", "/proc/1/fd/3"], by(&[InitShield, Capabilities]);
    pid_1_keeps_its_root: ["read_link", "/proc/1/root"], by(&[InitShield, Capabilities]);
    cve_2019_5736_pid_1_keeps_its_program: ["read_file", "/proc/1/exe"], by(&[InitShield, Capabilities]);

    the_core_pattern_stays: ["write_file", "/proc/sys/kernel/core_pattern"], by(&[MaskedProc, UserNamespace, Apparmor]);
    keys_are_hidden: ["read_file", "/proc/keys"], by(&[MaskedProc]);
    interrupts_are_hidden: ["read_file", "/proc/interrupts"], by(&[MaskedProc]);

    cve_2024_21626_no_folder_of_the_hosts_is_left_open: ["open_through_leak"], by(&[Descriptors, Landlock]);
}

/// A user who is not root inside.
fn as_user(run: Run) -> Run {
    run.with("/process/user/uid", 1000).with("/process/user/gid", 1000)
}

/// Without `no_new_privs`, filters and Landlock cannot be set up by a process without capabilities.
const NEED_NO_NEW_PRIVS: &[Fence] = &[Seccomp, Landlock];

#[test]
fn set_user_id_programs_give_nothing() {
    let fenced = Fenced { by: &[Nosuid, NoNewPrivs], also_without: NEED_NO_NEW_PRIVS };
    assert_stopped(weak_node(), || as_user(attack(&["exec_set_user_id"])), &fenced);
}

#[test]
fn programs_with_file_capabilities_give_nothing() {
    let node = Node::start_weak();
    // Version 2 of vfs_cap_data (capabilities(7)), effective and permitted: those over other users' files, which no layer can bring along.
    let all: Vec<u8> = [0x0200_0001_u32, 0xff, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    let program = node.image_path(crate::harness::IMAGE, "bin/attack-file-caps");
    rustix::fs::setxattr(&program, "security.capability", &all, rustix::fs::XattrFlags::empty()).unwrap();
    let fenced = Fenced { by: &[Nosuid, NoNewPrivs, Capabilities], also_without: NEED_NO_NEW_PRIVS };
    assert_stopped(&node, || as_user(attack(&["exec_with_file_capabilities"])), &fenced);
}

#[test]
fn device_nodes_in_an_image_open_nothing() {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let node = Node::start_weak();
    let device = node.image_path(crate::harness::IMAGE, "bin/zero");
    mknodat(CWD, &device, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 5)).unwrap();
    rustix::fs::chmod(&device, Mode::from_raw_mode(0o666)).unwrap();
    assert_stopped(&node, || attack(&["read_file", "/bin/zero"]), &by(&[Nodev]));
}

/// For what not every kernel has: where it is, the controls must work; where it is not, there is nothing to attack, and no way in either.
fn assert_stopped_where_it_exists(is_there: bool, arguments: &[&str], fenced: &Fenced<'_>) {
    if is_there {
        return assert_attack_stopped(arguments, fenced);
    }
    let (worked, said) = went(&attack(arguments).run());
    assert!(!worked, "{said}");
}

#[test]
fn sysrq_is_not_to_be_triggered() {
    let trigger = "/proc/sysrq-trigger";
    let fenced = by(&[MaskedProc, UserNamespace, Apparmor]);
    assert_stopped_where_it_exists(std::path::Path::new(trigger).exists(), &["write_file", trigger], &fenced);
}

#[test]
fn the_kernels_memory_is_hidden() {
    let memory = "/proc/kcore";
    let fenced = by(&[MaskedProc, UserNamespace, Capabilities, Apparmor]);
    assert_stopped_where_it_exists(std::path::Path::new(memory).exists(), &["read_file", memory], &fenced);
}

#[test]
fn cve_2026_31431_no_socket_to_the_kernels_ciphers() {
    let works_here = Command::new(node().attack_on_host()).arg("alg_socket").status().unwrap().success();
    assert_stopped_where_it_exists(works_here, &["alg_socket"], &by(&[Seccomp, Apparmor]));
}

/// Kernels without core scheduling, and machines without siblings, refuse it themselves.
#[test]
fn nobody_else_is_kept_off_a_core() {
    let works_here = Command::new(node().attack_on_host()).arg("take_a_core").status().unwrap().success();
    assert_stopped_where_it_exists(works_here, &["take_a_core"], &by(&[Seccomp]));
}

#[test]
fn services_of_the_host_are_out_of_reach() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    assert_attack_stopped(&["connect_tcp", &port], &by(&[NetworkNamespace]));
}

#[test]
fn abstract_sockets_of_the_host_are_out_of_reach() {
    let name = format!("mayfly-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    // Landlock ends abstract sockets at the sandbox from its sixth version on (landlock(7)).
    let scoped: &[Fence] = if landlock_version() >= 6 { &[NetworkNamespace, Landlock] } else { &[NetworkNamespace] };
    assert_attack_stopped(&["connect_abstract", &name], &by(scoped));
}

/// The sixth came with Linux 6.12; what matters here is on which side of it this kernel is (landlock(7), HISTORY).
fn landlock_version() -> u32 {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) >= (Some(6), Some(12)) { 6 } else { 2 }
}

#[test]
fn keys_of_the_keepers_session_are_out_of_reach() {
    let mut keeper = Command::new(node().attack_on_host());
    keeper.arg("with_session_key").arg(weak_keeper());
    let node = Node::start_as(keeper);
    assert_stopped(&node, || attack(&["read_session_key"]), &by(&[Seccomp, SessionKeyring]));
}

#[test]
fn shared_memory_of_the_host_is_out_of_reach() {
    let mut holder =
        Command::new(node().attack_on_host()).args(["shared_memory", HOST_KEY, "hold"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "held\n");
    let tried = std::panic::catch_unwind(|| assert_attack_stopped(&["shared_memory", HOST_KEY], &by(&[IpcNamespace])));
    holder.kill().unwrap();
    holder.wait().unwrap();
    remove_segment(HOST_KEY);
    tried.unwrap();
}

const HOST_KEY: &str = "1835104614";
const NEIGHBOUR_KEY: &str = "1835104615";

/// A segment in the host's own namespace, which would outlive its test.
fn remove_segment(key: &str) {
    let removed = Command::new(node().attack_on_host()).args(["shared_memory", key, "remove"]).status().unwrap();
    assert!(removed.success());
}

/// Numbers of calls that every table entry refuses whatever the arguments, up to well beyond the highest.
fn refused_calls() -> Vec<(u32, i32)> {
    let allowed_or_conditional = |number: u32| {
        let rules = rules();
        let rule = rules.iter().find(|rule| rule.calls.iter().any(|call| call.number == number));
        match rule.map(|rule| &rule.check) {
            Some(Check::Always(Verdict::Errno(errno))) => Some(*errno),
            Some(Check::Always(Verdict::Allow | Verdict::Kill) | Check::Cases { .. }) => None,
            None if rules.iter().flat_map(|rule| &rule.calls).any(|call| call.number > number) => Some(libc_errno::EPERM),
            None => Some(libc_errno::ENOSYS),
        }
    };
    (0..600).filter_map(|number| Some((number, allowed_or_conditional(number)?))).collect()
}

/// errno(3) of this architecture, as the table's verdicts name them.
mod libc_errno {
    pub(super) const EPERM: i32 = 1;
    pub(super) const ENOSYS: i32 = 38;
}

/// Makes every call by number through an ABI, and what came of each.
fn calls_made(abi: &str, numbers: impl Iterator<Item = u32>, without: &[Fence]) -> Vec<(u32, String)> {
    let mut run = attack(&["make_calls", abi]).without(without);
    run.stdin = Some(numbers.map(|number| format!("{number}\n")).collect::<String>().into_bytes());
    run.supervision.wall_ms = Some(60_000);
    let done = run.run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    let line = |line: &str| {
        let (number, what) = line.split_once(' ').unwrap();
        (number.parse().unwrap(), what.to_owned())
    };
    done.stdout.lines().map(line).collect()
}

#[test]
fn the_kernel_refuses_every_call_that_the_table_refuses() {
    let expected: Vec<(u32, String)> = refused_calls().into_iter().map(|(number, errno)| (number, errno.to_string())).collect();
    assert!(expected.len() > 200, "{}", expected.len());
    let numbers = || expected.iter().map(|(number, _)| *number);
    for ((number, what), (_, expected)) in calls_made("native", numbers(), &[]).into_iter().zip(&expected) {
        // Newer kernels answer these two before any filter is asked: outside of the trampoline of a probe, with SIGILL and ENXIO.
        let is_of_probes = cfg!(target_arch = "x86_64") && [(335, "signal 4"), (336, "6")].contains(&(number, what.as_str()));
        assert!(what == *expected || is_of_probes, "call {number}: {what} instead of {expected}");
    }
    // The control: without the filter the kernel itself answers, and otherwise. Calls that could end something are not made for that.
    let harmless = ["mincore", "keyctl", "kcmp", "move_pages", "name_to_handle_at", "bpf", "io_uring_setup", "cachestat"];
    let harmless: Vec<u32> = harmless.iter().filter_map(|name| number_of(name)).filter(|number| numbers().any(|n| n == *number)).collect();
    assert!(harmless.len() >= 4, "{harmless:?}");
    for (number, errno) in calls_made("native", harmless.into_iter(), &[Seccomp]) {
        assert_ne!(errno, libc_errno::EPERM.to_string(), "call {number} is refused without the filter, too");
    }
}

/// Of calls that stand in no rule, for the control above.
fn number_of(name: &str) -> Option<u32> {
    let known: &[(&str, u32)] = if cfg!(target_arch = "x86_64") {
        &[("mincore", 27), ("keyctl", 250), ("move_pages", 279), ("kcmp", 312), ("io_uring_setup", 425)]
    } else {
        &[("mincore", 232), ("keyctl", 219), ("move_pages", 239), ("kcmp", 272), ("io_uring_setup", 425)]
    };
    known.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

#[cfg(target_arch = "x86_64")]
#[test]
fn calls_through_foreign_abis_do_not_get_through() {
    const NOT_THERE: i32 = libc_errno::ENOSYS;
    for (number, what) in calls_made("x32", 0..600, &[]) {
        assert_eq!(what, NOT_THERE.to_string(), "x32 call {number}");
    }
    for (number, what) in calls_made("i386", 0..470, &[]) {
        assert_eq!(what, "signal 31", "i386 call {number}");
    }
    // The control: getpid of i386 works without the filter.
    assert_eq!(calls_made("i386", std::iter::once(20), &[Seccomp]).len(), 1);
    assert_ne!(calls_made("i386", std::iter::once(20), &[Seccomp])[0].1, "signal 31");
}

/// Runs two attacks at the same time: one holds something until the other is done.
fn beside_holder(holder: &Run, run: Run) -> Done {
    let node = weak_node();
    let mut client = node.client();
    assert!(matches!(holder.launch(&mut client), Answer::Launched(_)));
    wait_for_line(&node.log_path(holder.id));
    let done = run.run_on(node);
    kill(&mut client, holder.id);
    wait(&mut client, holder.id);
    let (said, _) = output(&node.log_path(holder.id));
    assert!(!said.is_empty());
    client.call(&Request::Forget { id: holder.id }, &[]).unwrap();
    done
}

#[test]
fn shared_memory_of_a_neighbour_is_out_of_reach() {
    let holder = || attack(&["shared_memory", NEIGHBOUR_KEY, "hold"]);
    let (worked, said) = went(&beside_holder(&holder(), attack(&["shared_memory", NEIGHBOUR_KEY])));
    assert!(!worked, "{said}");
    let open: &[Fence] = &[IpcNamespace];
    let (worked, said) = went(&beside_holder(&holder().without(open), attack(&["shared_memory", NEIGHBOUR_KEY]).without(open)));
    remove_segment(NEIGHBOUR_KEY);
    assert!(worked, "the control: {said}");
}

#[test]
fn inotify_instances_of_a_neighbour_are_not_ours_to_use_up() {
    let (worked, said) = went(&beside_holder(&attack(&["inotify_instances", "hold"]), attack(&["inotify_instances"])));
    assert!(worked, "{said}");
    // The control: two payloads that are one user of the host's share what that user may have.
    let open: &[Fence] = &[UserNamespace];
    let run = |arguments: &[&str]| as_user(attack(arguments)).without(open);
    let (worked, said) = went(&beside_holder(&run(&["inotify_instances", "hold"]), run(&["inotify_instances"])));
    assert!(!worked, "the control: {said}");
}

/// What two sandboxes say that run at the same time, in as many lines as the holder has.
fn both_say(script: &str) -> (String, String) {
    let holder = crate::harness::shell(&format!("{script}; sleep 100"));
    let mut client = node().client();
    assert!(matches!(holder.launch(&mut client), Answer::Launched(_)));
    wait_for_line(&node().log_path(holder.id));
    let second = crate::harness::shell(script).run().stdout;
    kill(&mut client, holder.id);
    wait(&mut client, holder.id);
    let (first, _) = output(&node().log_path(holder.id));
    client.call(&Request::Forget { id: holder.id }, &[]).unwrap();
    (first, second)
}

#[test]
fn two_sandboxes_share_no_id() {
    let (first, second) = both_say("cat /proc/self/uid_map /proc/self/gid_map");
    let range = |map: &str| {
        let numbers: Vec<u64> = map.lines().next().unwrap().split_whitespace().map(|number| number.parse().unwrap()).collect();
        numbers[1]..numbers[1] + numbers[2]
    };
    let (first, second) = (range(&first), range(&second));
    assert!(first.end <= second.start || second.end <= first.start, "{first:?} {second:?}");
}

#[test]
fn abstract_sockets_of_a_neighbour_are_out_of_reach() {
    let holder = || attack(&["listen_abstract", "mayfly-neighbour"]);
    let connect = || attack(&["connect_abstract", "mayfly-neighbour"]);
    let (worked, said) = went(&beside_holder(&holder(), connect()));
    assert!(!worked, "{said}");
    let open: &[Fence] = &[NetworkNamespace, Landlock];
    let (worked, said) = went(&beside_holder(&holder().without(open), connect().without(open)));
    assert!(worked, "the control: {said}");
}

#[test]
fn keys_of_a_neighbour_are_out_of_reach() {
    let holder = || attack(&["hold_session_key"]);
    let (worked, said) = went(&beside_holder(&holder().without(&[Seccomp]), attack(&["read_session_key"]).without(&[Seccomp])));
    assert!(!worked, "{said}");
    // The control: whoever holds the key in his own session reads it.
    let (worked, said) = went(&attack(&["with_session_key", "/bin/attack", "read_session_key"]).without(&[Seccomp]).run());
    assert!(worked, "the control: {said}");
}

/// Init's id is none that anybody inside can take, so calls that ask only for the same id do not reach it.
#[test]
fn pid_1_is_nobody_that_root_of_an_image_could_become() {
    let names = serde_json::json!(["CAP_SETUID", "CAP_SETGID"]);
    let root = || {
        let sets = serde_json::json!({ "bounding": names, "effective": names, "permitted": names });
        attack(&["slow_down_init"]).with("/process/capabilities", sets)
    };
    assert_stopped(weak_node(), root, &by(&[InitShield]));
}

#[test]
fn locks_on_files_of_a_shared_image_do_not_meet() {
    let lock = ["lock_file", "/bin/busybox"];
    let holder = attack(&[lock[0], lock[1], "hold"]);
    let (worked, said) = went(&beside_holder(&holder, attack(&lock)));
    assert!(worked, "{said}");
    // The control: inside one sandbox they do meet.
    let both = command(&[
        "/bin/sh",
        "-c",
        "/bin/attack lock_file /bin/busybox hold > /tmp/held & while [ ! -s /tmp/held ]; do :; done; exec /bin/attack lock_file /bin/busybox",
    ]);
    let (worked, said) = went(&both.run());
    assert!(!worked, "the control: {said}");
}

#[test]
fn a_working_folder_behind_a_descriptor_is_refused() {
    for cwd in ["/proc/self/fd/3", "/proc/self/fd/3/../..", "/proc/1/root", "/proc/self/cwd/.."] {
        let done = attack(&["read_file", "/etc/passwd"]).with("/process/cwd", cwd).run();
        assert!(matches!(done.ending.cause, Cause::StartFailed { .. }), "{cwd}: {:?}", done.ending.cause);
    }
}

#[test]
fn cve_2019_5736_a_script_that_runs_the_runtimes_own_program_gains_nothing() {
    let mut run = command(&["/bin/sh", "-c", "chmod 755 run && exec ./run"]).with("/process/cwd", "/tmp");
    sandbox_core::files::write(&mut run.files, "run", 0o755, b"#!/proc/1/exe\n").unwrap();
    let done = run.run();
    assert!(done.stderr.contains("Permission denied"), "{:?} {}", done.ending.cause, done.stderr);
    // What is executed is a sealed copy in memory: nobody at all can write to it.
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children", pid = node().pid())).unwrap();
    let programs = children.split_whitespace().map(|child| format!("/proc/{child}/exe"));
    let init =
        programs.into_iter().find(|path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:sandbox-init")));
    let program = std::fs::File::open(init.expect("an init stands ready")).unwrap();
    let seals = rustix::fs::fcntl_get_seals(program.as_fd()).unwrap();
    assert!(seals.contains(rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::SEAL | rustix::fs::SealFlags::GROW), "{seals:?}");
}
