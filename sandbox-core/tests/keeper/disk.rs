//! Writable layers on the node's disk: of the promised size, the sandbox's alone, and gone with it.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::mount::{MsFlags, mount, umount};
use sandbox_core::protocol::{Answer, Cause, FailureKind, Limit, Medium, Start};

use crate::harness::{Node, Run, kill, shell, wait};

/// A script on a layer that is on disk.
fn on_disk(script: &str) -> Run {
    let mut run = shell(script);
    run.supervision.medium = Medium::Disk;
    run.supervision.wall_ms = Some(60_000);
    run
}

/// A keeper for each way in which this machine can make layers: in images, and under project quotas where a file system has them.
pub(crate) fn nodes() -> Vec<Node> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let with_quotas = mounts.lines().filter(|line| line.contains("prjquota")).filter_map(|line| line.split(' ').nth(1));
    let nodes = with_quotas.map(|point| Node::start_with_disks(&Path::new(point).join(format!("disks-{}", uuid::Uuid::new_v4()))));
    std::iter::once(Node::start()).chain(nodes).collect()
}

/// What layers leave on this machine while they live: loop devices on files of `folder`, and what is in it.
fn traces(folder: &Path) -> (Vec<PathBuf>, Vec<String>) {
    let folder = folder.to_str().unwrap();
    let devices = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    // A file without a name is shown as `FOLDER/#NUMBER (deleted)`.
    let is_ours = |device: &PathBuf| std::fs::read_to_string(device.join("loop/backing_file")).is_ok_and(|file| file.starts_with(folder));
    let content = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    (devices.filter(is_ours).collect(), content.collect())
}

pub(crate) fn wait_until_gone(folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while traces(folder) != (vec![], vec![]) {
        assert!(Instant::now() < deadline, "something is left: {:?}", traces(folder));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Takes its files away from the one layer that is in `folder`: nothing can be made of it any more.
pub(crate) fn spoil_layer(folder: &Path) {
    let (devices, content) = traces(folder);
    match (devices.as_slice(), content.as_slice()) {
        ([], [project]) => std::fs::remove_dir_all(folder.join(project).join("upper")).unwrap(),
        ([device], []) => {
            let at = tempfile::tempdir().unwrap();
            let device = Path::new("/dev").join(device.file_name().unwrap());
            // The same file system once more.
            mount(Some(&device), at.path(), Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
            let removed = std::fs::remove_dir_all(at.path().join("upper"));
            umount(at.path()).unwrap();
            removed.unwrap();
        }
        other => panic!("not one layer: {other:?}"),
    }
}

fn free_bytes(folder: &Path) -> u64 {
    let space = rustix::fs::statvfs(folder).unwrap();
    space.f_bavail * space.f_frsize
}

#[test]
fn it_has_exactly_the_promised_room() {
    for node in nodes() {
        for (bytes, inodes) in [(4 << 20, 64), (5_000_000, 1), (16 << 20, 4096), (100 << 20, 20_000), (130 << 20, 100)] {
            let mut run = on_disk("stat -f -c '%a %S %d' /");
            (run.supervision.disk_bytes, run.supervision.inodes) = (bytes, inodes);
            let done = run.run_on(&node);
            let numbers: Vec<u64> = done.stdout.split_whitespace().map(|number| number.parse().unwrap()).collect();
            assert_eq!((numbers[0] * numbers[1], numbers[2]), (bytes / 4096 * 4096, inodes), "{done:?}");
            assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::Exited { code: 0 }, vec![]));
        }
    }
}

#[test]
fn a_full_one_is_an_error_inside_and_told_and_a_nearly_full_one_is_not() {
    for node in nodes() {
        let full = on_disk("dd if=/dev/zero of=/fill bs=4k 2>/dev/null; echo $?; stat -c %s /fill").run_on(&node);
        let written: u64 = full.stdout.strip_prefix("1\n").unwrap_or_else(|| panic!("{full:?}")).trim().parse().unwrap();
        // What the map of the file takes is the file's.
        assert!(((15 << 20)..=(16 << 20)).contains(&written), "{written}");
        assert_eq!((full.ending.cause, full.ending.limits_hit), (Cause::Exited { code: 0 }, vec![Limit::Disk]));
        let nearly = on_disk("dd if=/dev/zero of=/fill bs=1k count=15900 2>/dev/null; echo $?").run_on(&node);
        assert_eq!((nearly.stdout.as_str(), nearly.ending.limits_hit), ("0\n", vec![]), "{}", nearly.stderr);
    }
}

#[test]
fn it_has_as_many_inodes_as_promised_and_used_up_ones_are_told() {
    for node in nodes() {
        let count = "i=0; while touch /tmp/f$i 2>/dev/null; do i=$((i+1)); done; echo $i";
        let mut run = on_disk(count).with("/process/cwd", "/tmp");
        run.supervision.inodes = 64;
        let done = run.run_on(&node);
        // One is the copy of /tmp itself.
        assert_eq!((done.stdout.as_str(), done.ending.limits_hit), ("63\n", vec![Limit::Inodes]), "{}", done.stderr);
    }
}

#[test]
fn it_holds_more_than_memory_does_and_belongs_to_the_sandbox() {
    for node in nodes() {
        let script = "dd if=/dev/zero of=/fill bs=1M count=100 2>/dev/null; echo $?; stat -c '%u %s' /fill; rm /fill";
        let mut run = on_disk(script);
        run.supervision.disk_bytes = 120 << 20;
        let done = run.run_on(&node);
        assert_eq!(done.stdout, "0\n0 104857600\n", "{done:?}");
    }
}

#[test]
fn a_limit_of_its_own_project_cannot_be_left() {
    for node in nodes() {
        let done = on_disk("mkdir /a && dd if=/dev/zero of=/a/fill bs=1M count=30 2>/dev/null; dd if=/dev/zero of=/tmp/more bs=1M count=1")
            .run_on(&node);
        assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::Exited { code: 1 }, vec![Limit::Disk]), "{}", done.stderr);
    }
}

#[test]
fn nothing_is_left_after_an_end_a_kill_and_a_start_that_fails() {
    for node in nodes() {
        let folder = node.disks().to_owned();
        let done = on_disk("dd if=/dev/zero of=/fill bs=1M count=8 2>/dev/null").run_on(&node);
        assert_eq!(done.launched.unwrap().start, Start::Cold);
        wait_until_gone(&folder);

        let mut client = node.client();
        let before = free_bytes(&folder);
        let mut endless = on_disk("while :; do dd if=/dev/zero of=/fill bs=1M count=8 2>/dev/null; done");
        // So much that others who use this disk do not matter.
        endless.supervision.disk_bytes = before / 8;
        assert!(matches!(endless.launch(&mut client), Answer::Launched(_)));
        assert_ne!(traces(&folder), (vec![], vec![]));
        kill(&mut client, endless.id);
        assert!(matches!(wait(&mut client, endless.id).cause, Cause::Killed(_)));
        wait_until_gone(&folder);
        // The file system below frees what a file had in its own time.
        let deadline = Instant::now() + Duration::from_secs(10);
        while free_bytes(&folder) + before / 16 < before {
            assert!(Instant::now() < deadline, "space is missing");
            std::thread::sleep(Duration::from_millis(5));
        }

        let failed = on_disk("exec no-such-program").with("/process/args", serde_json::json!(["/no-such-program"])).run_on(&node);
        assert!(matches!(failed.ending.cause, Cause::StartFailed { .. }), "{failed:?}");
        wait_until_gone(&folder);
    }
}

#[test]
fn a_kill_while_it_is_being_made_leaves_nothing() {
    for node in nodes() {
        let folder = node.disks().to_owned();
        let mut client = node.client();
        for _ in 0..10 {
            let run = on_disk("sleep 100");
            let launch = run.begin_launch(&mut client);
            kill(&mut client, run.id);
            assert!(matches!(wait(&mut client, run.id).cause, Cause::Killed(_)));
            client.receive(launch).unwrap();
        }
        wait_until_gone(&folder);
    }
}

#[test]
fn a_keeper_that_is_killed_leaves_nothing() {
    for node in nodes() {
        let folder = node.disks().to_owned();
        let mut client = node.client();
        for n in 0..4 {
            let run = on_disk("dd if=/dev/zero of=/fill bs=1M count=8 2>/dev/null; sleep 100");
            if n < 3 {
                assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
            } else {
                run.begin_launch(&mut client);
            }
        }
        let (devices, content) = traces(&folder);
        assert!(devices.len() >= 3 || content.len() >= 3, "{devices:?} {content:?}");
        let kept = node.kill();
        // What has names is swept by the next keeper that takes this number.
        let successor = Node::start_with_disks(&folder);
        wait_until_gone(&folder);
        drop((successor, kept));
    }
}

#[test]
fn many_at_once_of_two_keepers_share_the_devices() {
    let nodes = [Node::start(), Node::start()];
    let mut clients: Vec<_> = nodes.iter().map(Node::client).collect();
    let runs: Vec<Run> = (0..12).map(|n| on_disk(&format!("echo {n} > /file; cat /file"))).collect();
    let launches: Vec<_> = runs.iter().zip([0, 1].into_iter().cycle()).map(|(run, n)| run.begin_launch(&mut clients[n])).collect();
    for (n, (run, launch)) in runs.iter().zip(launches).enumerate() {
        let answer = clients[n % 2].receive(launch).unwrap();
        assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
        assert_eq!(wait(&mut clients[n % 2], run.id).cause, Cause::Exited { code: 0 });
        let (stdout, _) = crate::harness::output(&nodes[n % 2].log_path(run.id));
        assert_eq!(stdout, format!("{n}\n"));
    }
    for node in &nodes {
        wait_until_gone(node.disks());
    }
}

#[test]
fn a_node_without_room_says_so_at_the_launch() {
    for node in nodes() {
        let mut run = on_disk("true");
        run.supervision.disk_bytes = 1 << 40;
        let Answer::Ended(ending) = run.launch(&mut node.client()) else { panic!("it was launched") };
        let Cause::InfraError { message } = ending.cause else { panic!("{ending:?}") };
        assert!(message.contains("setting") && message.contains("aside"), "{message}");
    }
}

#[test]
fn bounds_of_a_layer_on_disk_are_policy() {
    let node = crate::harness::node();
    for (bytes, inodes, words) in [(1 << 20, 64, "4194304"), (2 << 40, 64, "1099511627776"), (4 << 20, 100_000, "16896 inodes")] {
        let mut run = on_disk("true");
        (run.supervision.disk_bytes, run.supervision.inodes) = (bytes, inodes);
        let Answer::Failed(failure) = run.launch(&mut node.client()) else { panic!("it was not refused") };
        assert_eq!(failure.kind, FailureKind::Refused);
        assert!(failure.message.contains(words), "{}", failure.message);
    }
}
