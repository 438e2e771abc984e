//! Nothing is left behind: not by many runs, not by a keeper that stops, not by one that was killed.

use std::{
    os::unix::fs::MetadataExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sandbox_core::protocol::{Answer, Request, Start};

use crate::harness::{Node, shell};

/// What there is of a keeper in the kernel, for a comparison.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) descriptors: usize,
    children: usize,
    groups: usize,
}

impl Snapshot {
    fn of(node: &Node) -> Self {
        Self {
            descriptors: std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count(),
            children: children(node).len(),
            groups: groups(node).len(),
        }
    }

    /// What it comes to when the keeper has nothing to clean up and nothing to prepare any more.
    pub(crate) fn at_rest(node: &Node) -> Self {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut last = Self::of(node);
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_millis(300) {
            assert!(Instant::now() < deadline, "the keeper does not come to rest: {last:?}");
            std::thread::yield_now();
            let now = Self::of(node);
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        last
    }
}

pub(crate) fn children(node: &Node) -> Vec<String> {
    let pid = node.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_whitespace().map(str::to_owned).collect()
}

/// What a process is, and where it waits.
pub(crate) fn told(pid: &str) -> String {
    let read = |of: &str| std::fs::read_to_string(format!("/proc/{pid}/{of}")).unwrap_or_else(|error| error.to_string());
    format!("\n{pid}: {}{}{}", read("stat"), read("cgroup"), read("stack"))
}

/// The keeper's own parent group, in every hierarchy: one of its inits says how it is called.
fn parents(node: &Node) -> Vec<PathBuf> {
    let deadline = Instant::now() + Duration::from_secs(10);
    // One that has not joined its groups yet, or is gone by now, does not say.
    let name_of = |child: &String| {
        let groups = std::fs::read_to_string(format!("/proc/{child}/cgroup")).ok()?;
        Some(groups.split("/mayfly/").nth(1)?.split('/').next()?.to_owned())
    };
    let name = loop {
        let children = children(node);
        if let Some(name) = children.iter().find_map(name_of) {
            break name;
        }
        assert!(Instant::now() < deadline, "no sandbox stands ready: {}", children.iter().map(|child| told(child)).collect::<String>());
    };
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path());
    let points = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]);
    points.map(|point| point.join("mayfly").join(&name)).filter(|path| path.exists()).collect()
}

/// Every cgroup of a sandbox of this keeper.
pub(crate) fn groups(node: &Node) -> Vec<PathBuf> {
    let inside = |parent: &PathBuf| std::fs::read_dir(parent).unwrap().map(|entry| entry.unwrap()).collect::<Vec<_>>();
    let folders = parents(node).into_iter().flat_map(|parent| inside(&parent)).filter(|entry| entry.file_type().unwrap().is_dir());
    folders.map(|entry| entry.path()).collect()
}

#[test]
fn many_runs_and_a_keeper_that_stops_leave_nothing_behind() {
    let node = Node::start();
    // As many as it takes for the keeper to have as many sandboxes ready as it ever has.
    for _ in 0..30 {
        shell("echo first").run_on(&node);
    }
    let before = Snapshot::at_rest(&node);
    for n in 0..200 {
        let mut run = shell(if n % 10 == 0 { "sleep 100 & exit 3" } else { "echo out; echo err >&2" });
        if n % 20 == 1 {
            run = shell("no-such-program-in-the-image 2>/dev/null; exec no-such-program");
        }
        run.run_on(&node);
    }
    assert_eq!(Snapshot::at_rest(&node), before, "200 runs left something behind");

    // A keeper of another test may take the number, and so the names, at once; it makes them anew.
    let inode = |path: &PathBuf| std::fs::metadata(path).map(|metadata| metadata.ino()).ok();
    let parents: Vec<_> = parents(&node).into_iter().map(|parent| (inode(&parent), parent)).collect();
    assert!(!parents.is_empty());
    let mut client = node.client();
    let endless = shell("sleep 100");
    assert!(matches!(endless.launch(&mut client), Answer::Launched(_)));
    assert_eq!(client.call(&Request::Shutdown, &[]).unwrap(), Answer::Done);
    drop(client);
    node.wait_for_exit();
    let left: Vec<_> = parents.into_iter().filter(|(before, parent)| inode(parent).is_some_and(|now| Some(now) == *before)).collect();
    assert!(left.is_empty(), "a keeper that stopped left {left:?}");
}

/// As the kernel does it where memory is short: what stands ready goes first (`oom_score_adj`).
#[test]
fn what_stands_ready_and_is_killed_is_not_built_again_before_somebody_asks() {
    let node = Node::start();
    shell("true").run_on(&node);
    Snapshot::at_rest(&node);
    let standing = children(&node);
    assert!(!standing.is_empty(), "nothing stands ready");
    for pid in standing {
        // With the first of them, the keeper gives up the others.
        match kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => panic!("{pid}: {error}"),
        }
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while !children(&node).is_empty() {
        assert!(Instant::now() < deadline, "there is always one more");
        std::thread::yield_now();
    }

    // The keeper prepares what it wants a millisecond after it has nothing else to do.
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(300) {
        assert!(children(&node).is_empty(), "one was built that nobody asked for");
        std::thread::yield_now();
    }

    assert_eq!(shell("true").run_on(&node).launched.unwrap().start, Start::Cold);
    Snapshot::at_rest(&node);
    assert_eq!(shell("true").run_on(&node).launched.unwrap().start, Start::Warm);
}

#[test]
fn what_sits_in_a_group_of_a_dead_keepers_is_killed_by_the_next() {
    let node = Node::start();
    let mut client = node.client();
    assert!(matches!(shell("sleep 100").launch(&mut client), Answer::Launched(_)));
    let group = groups(&node).into_iter().find(|group| group.join("cgroup.kill").exists()).expect("there is a cgroup2 tree");
    let mut stray = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    std::fs::write(group.join("cgroup.procs"), stray.id().to_string()).unwrap();
    let next = Node::start_after(node.kill());
    let status = stray.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    assert!(
        !group.join("cgroup.procs").exists()
            || !std::fs::read_to_string(group.join("cgroup.procs")).unwrap().contains(&stray.id().to_string())
    );
    drop(next);
}
