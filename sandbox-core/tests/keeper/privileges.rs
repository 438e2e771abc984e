//! What a payload may do as its user 0: nothing by default; what root images need, where the request says so.

use sandbox_core::protocol::Cause;
use serde_json::json;

use crate::harness::{Node, Run, command, refusal, shell};

const OF_ROOT_IMAGE: [&str; 8] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID"];

fn as_root_image(run: Run) -> Run {
    let names = json!(OF_ROOT_IMAGE);
    run.with("/process/capabilities", json!({ "bounding": names, "effective": names, "permitted": names }))
}

/// A file that belongs to somebody else is read all the same and given to a third; a process becomes another user.
const WORK_OF_ROOT: &str = "cat /home/of-another && chown 7:8 /home/of-another && stat -c '%u:%g' /home/of-another && /bin/attack become_another_user && echo done";

#[test]
fn a_root_image_can_do_what_package_managers_do() {
    let done = as_root_image(shell(WORK_OF_ROOT)).run();
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 0 }, "7:8\ndone\n"), "{}", done.stderr);
    // The control: by default it cannot.
    let done = shell(WORK_OF_ROOT).run();
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 1 }, ""), "{}", done.stderr);
}

#[test]
fn a_root_image_has_these_capabilities_and_its_other_users_have_none() {
    let sets = |run: Run| run.run().stdout;
    let script = "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status";
    let expected = [
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000000004fb",
        "CapEff:\t00000000000004fb",
        "CapBnd:\t00000000000004fb",
        "CapAmb:\t0000000000000000",
    ];
    assert_eq!(sets(as_root_image(shell(script))).lines().collect::<Vec<_>>(), expected);
    let of_user = sets(as_root_image(shell(script)).with("/process/user/uid", 1000));
    assert!(of_user.contains("CapPrm:\t0000000000000000") && of_user.contains("CapEff:\t0000000000000000"), "{of_user}");
}

#[test]
fn a_root_image_is_behind_the_same_walls() {
    for attack in [
        "mount_over",
        "umount_proc",
        "join_namespace",
        "change_host_name",
        "raw_socket",
        "packet_socket",
        "make_device",
        "change_root",
        "trace_init",
    ] {
        let done = as_root_image(command(&["/bin/attack", attack])).run();
        assert_eq!(done.ending.cause, Cause::Exited { code: 1 }, "{attack}: {}", done.stderr);
    }
    for file in ["/proc/1/mem", "/proc/1/environ", "/proc/1/exe"] {
        let done = as_root_image(command(&["/bin/attack", "read_file", file])).run();
        assert_eq!(done.ending.cause, Cause::Exited { code: 1 }, "{file}: {}", done.stderr);
    }
    let kept = as_root_image(shell("kill -9 1; kill -STOP 1; kill -TERM 1; echo here")).run();
    assert_eq!((kept.ending.cause, kept.stdout.as_str()), (Cause::Exited { code: 0 }, "here\n"));
}

#[test]
fn anybody_may_listen_on_any_port_of_his_own_network() {
    let done = command(&["/bin/attack", "listen_on_port_80"]).with("/process/user/uid", 1000).run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
}

#[test]
fn a_keeper_refuses_to_start_without_a_fence_that_it_must_have() {
    let said = refusal(&["--require-fence", "selinux", "--require-fence", "seccomp"]);
    assert!(said.contains("lacks a fence") && said.contains("selinux") && !said.contains("seccomp"), "{said}");
    let said = refusal(&["--require-fence", "moat"]);
    assert!(said.contains("there is no fence \"moat\""), "{said}");
    // The control: one that every host has.
    let mut keeper = std::process::Command::new(crate::harness::KEEPER);
    keeper.args(["--require-fence", "seccomp"]);
    drop(Node::start_as(keeper));
}

#[test]
fn a_label_that_this_host_cannot_give_is_refused_and_not_ignored() {
    let unknown = "system_u:system_r:mayfly_nobody_knows_t:s0";
    let said = refusal(&["--selinux-label", unknown]);
    assert!(said.contains(unknown), "{said}");
    assert_eq!(said.contains("no SELinux"), !std::path::Path::new("/sys/fs/selinux").is_dir(), "{said}");
}
