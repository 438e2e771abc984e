//! Images that are made to lead a runtime astray, each after an escape that worked somewhere.

use sandbox_core::{
    fence::Fence,
    protocol::{Answer, Cause},
};

use crate::harness::{Node, busybox_layer, fences, header, node, shell};

/// An image of busybox with a layer of links over it. Returns its name.
fn image_with(node: &Node, name: char, links: &[(&str, &str)]) -> String {
    let mut layer = tar::Builder::new(Vec::new());
    for (path, to) in links {
        let mut header = header(tar::EntryType::Symlink, 0o777);
        layer.append_link(&mut header, path, to).unwrap();
    }
    let image = name.to_string().repeat(64);
    let answer = node.unpack(&image, vec![busybox_layer(), layer.into_inner().unwrap()]);
    assert!(matches!(answer, Answer::Unpacked(_)), "{answer:?}");
    for (path, to) in links {
        let found = std::fs::read_link(node.image_path(&image, path)).unwrap();
        assert_eq!(found.to_str(), Some(*to), "the image is not what it is to be");
    }
    image
}

fn said(image: &str, script: &str) -> String {
    let done = shell(script).with("/root/path", image).run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    done.stdout
}

/// What must be so in every sandbox, whatever its image holds.
const IN_ORDER: &str = "stat -c '%F %t:%T' /dev/null; stat -f -c %T /proc /dev/pts 2>/dev/null; \
                        echo x 2>/dev/null > /proc/sys/kernel/core_pattern || echo read-only; head -c 1 /proc/timer_list | wc -c";
const AS_IT_MUST_BE: &str = "character special file 1:3\nproc\ndevpts\nread-only\n0\n";

#[test]
fn cve_2026_41579_dev_as_a_link_makes_no_device_elsewhere() {
    let image = image_with(node(), '1', &[("dev", "/etc")]);
    assert_eq!(said(&image, IN_ORDER), AS_IT_MUST_BE);
    assert_eq!(said(&image, "ls /etc"), "group\nhostname\nhosts\npasswd\nresolv.conf\n");
    let names: Vec<_> = std::fs::read_dir(node().image_path(&image, "etc")).unwrap().collect();
    assert_eq!(names.len(), 2, "something was made in the image: {names:?}");
}

#[test]
fn cve_2025_31133_the_null_device_that_hides_is_ours_and_not_the_images() {
    let image = image_with(node(), '2', &[("dev/null", "/proc/sys/kernel/core_pattern"), ("dev/zero", "/proc/sysrq-trigger")]);
    assert_eq!(said(&image, IN_ORDER), AS_IT_MUST_BE);
}

#[test]
fn cve_2025_52565_terminals_of_the_image_lead_no_mount_astray() {
    let image = image_with(node(), '3', &[("dev/pts", "/proc"), ("dev/console", "/proc/sys/kernel/core_pattern"), ("dev/ptmx", "/proc")]);
    assert_eq!(said(&image, IN_ORDER), AS_IT_MUST_BE);
    assert_eq!(said(&image, "ls /dev/console 2>/dev/null || echo none"), "none\n");
}

#[test]
fn cve_2025_52881_proc_as_a_link_redirects_no_write() {
    let image = image_with(node(), '4', &[("proc", "/home"), ("home/self", "/home"), ("home/sys", "/home")]);
    assert_eq!(said(&image, IN_ORDER), AS_IT_MUST_BE);
    assert_eq!(said(&image, "ls /home"), "of-another\nself\nsys\n");
    if fences(node()).has(Fence::Apparmor) {
        assert_eq!(said(&image, "cat /proc/self/attr/apparmor/current"), "mayfly-sandbox (enforce)\n");
    }
}

#[test]
fn the_apparmor_profile_is_on_where_it_is_said_to_be_and_cannot_be_left() {
    if fences(node()).has(Fence::Apparmor) {
        let left = "echo changeprofile unconfined > /proc/self/attr/current || echo refused; cat /proc/self/attr/current";
        let done = shell(left).run();
        assert_eq!(done.stdout, "refused\nmayfly-sandbox (enforce)\n", "{}", done.stderr);
    } else {
        let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap_or_default();
        assert_ne!(enabled.trim(), "Y", "this host has AppArmor, and sandboxes run without it");
    }
}
