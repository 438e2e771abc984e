//! Many short runs, one after the other and several at once: they leave nothing, and no more memory in use.

use std::fs;

use mayfly_tests::{Client, outcome::assert_exit, service::Place};
use tokio::task::JoinSet;

use super::{
    books,
    counts::Counts,
    node::{KeeperOf, Node},
};

/// Clients at one time.
const AT_ONCE: u64 = 8;
/// Until then caches and pools still fill: connections, prepared statements, the allocator's own.
const EARLY: u64 = 1000;
/// By so much the memory at the end may differ from that after the first part, in hundredths.
const TOLERANCE_PERCENT: u64 = 10;

/// What a process has in memory, in KiB.
#[derive(Debug, Clone, Copy)]
struct Memory {
    rss: u64,
    pss: u64,
}

impl Memory {
    fn of(pid: u32) -> Self {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a field of proc(5)");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        Self { rss: field("Rss:"), pss: field("Pss:") }
    }
}

/// Makes so many runs and compares what there is after the first of them with what there is after all.
pub(crate) async fn runs(count: u64) {
    let mut node = Node::start(KeeperOf::Service, AT_ONCE).expect("a node starts");
    let place = node.place();
    let early = (count / 5).max(EARLY.min(count / 2));
    run(&node, early).await;
    node.clear().await.expect("the images go");
    let first = node.first_snapshot().await.expect("it comes to rest");
    let before = [place.pid, place.keeper_pid()].map(Memory::of);

    run(&node, count - early).await;
    node.clear().await.expect("the images go");
    let differences = node.compare(&first).await.expect("a snapshot");
    let after = [place.pid, place.keeper_pid()].map(Memory::of);

    assert_eq!(differences, Vec::<String>::new());
    assert_eq!(books::contradictions(&node.database).expect("an answer"), Vec::<String>::new());
    let mut counts = Counts::default();
    let line = counts.line("nobody", "short runs");
    (line.accepted, line.snapshots) = (count, 1);
    line.reasons.insert("exited".to_owned(), count);
    for (name, (before, after)) in ["service", "keeper"].into_iter().zip(before.into_iter().zip(after)) {
        assert_flat(name, before, after, early, count);
        line.reasons.insert(format!("{name} KiB after {early}"), before.pss);
        line.reasons.insert(format!("{name} KiB after {count}"), after.pss);
    }
    counts.hand_in();
}

fn assert_flat(name: &str, before: Memory, after: Memory, early: u64, count: u64) {
    for (was, is) in [(before.rss, after.rss), (before.pss, after.pss)] {
        let is_flat = is.abs_diff(was) * 100 <= was * TOLERANCE_PERCENT;
        assert!(is_flat, "the {name} has {before:?} KiB after {early} runs and {after:?} KiB after {count}");
    }
}

async fn run(node: &Node, count: u64) {
    assert!(node.import().await, "the image is imported");
    let mut clients = JoinSet::new();
    for number in 0..AT_ONCE {
        let share = count / AT_ONCE + u64::from(number < count % AT_ONCE);
        clients.spawn(some(node.place(), number, share));
    }
    clients.join_all().await;
}

async fn some(place: Place, number: u64, count: u64) {
    let client = Client::of(&place, &super::load::tenant(number));
    for n in 0..count {
        let request =
            super::payload::Payload::Echo(0).request(&format!("many-{}-{number}-{n}", uuid::Uuid::new_v4().simple()), "busybox", 60_000);
        assert_exit(&client.run(&request).await, 0);
    }
}
