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
/// Runs of one import of the image.
const PORTION: usize = 250;
/// Until then caches and pools still fill: connections, prepared statements, the allocator's own.
const EARLY: u64 = 1000;
/// By so much the memory at the end may differ from that after the first part, in hundredths.
const TOLERANCE_PERCENT: u64 = 10;

/// What a process has in memory, in KiB. Its proportional share of what it has in common with others would change with them.
fn resident_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).expect("a field of proc(5)");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Makes so many runs and compares what there is after the first of them with what there is after all.
pub(crate) async fn runs(count: u64) {
    let mut node = Node::start(KeeperOf::Service, AT_ONCE).expect("a node starts");
    let place = node.place();
    let early = (count / 5).max(EARLY.min(count / 2));
    run(&mut node, early).await;
    let first = node.first_snapshot().await.expect("it comes to rest");
    let before = [place.pid, place.keeper_pid()].map(resident_kib);

    run(&mut node, count - early).await;
    let differences = node.compare(&first).await.expect("a snapshot");
    let after = [place.pid, place.keeper_pid()].map(resident_kib);

    assert_eq!(differences, Vec::<String>::new());
    assert_eq!(books::contradictions(&node.database).expect("an answer"), Vec::<String>::new());
    let mut counts = Counts::default();
    let line = counts.line("nobody", "short runs");
    (line.accepted, line.snapshots) = (count, 1);
    line.reasons.insert("exited".to_owned(), count);
    for (name, (before, after)) in ["service", "keeper"].into_iter().zip(before.into_iter().zip(after)) {
        let is_flat = after.abs_diff(before) * 100 <= before * TOLERANCE_PERCENT;
        assert!(is_flat, "the {name} has {before} KiB after {early} runs and {after} KiB after {count}");
        line.reasons.insert(format!("{name} KiB after {early}"), before);
        line.reasons.insert(format!("{name} KiB after {count}"), after);
    }
    counts.hand_in();
}

/// Makes so many runs, and the image anew for some of them each: what takes memory once has taken it before memory is looked at.
async fn run(node: &mut Node, count: u64) {
    for begun in (0..count).step_by(PORTION) {
        assert!(node.import().await, "the image is imported");
        let portion = (count - begun).min(PORTION as u64);
        let mut clients = JoinSet::new();
        for number in 0..AT_ONCE {
            let share = portion / AT_ONCE + u64::from(number < portion % AT_ONCE);
            clients.spawn(some(node.place(), number, share));
        }
        clients.join_all().await;
        node.clear().await.expect("the images go");
    }
}

async fn some(place: Place, number: u64, count: u64) {
    let client = Client::of(&place, &super::load::tenant(number));
    for n in 0..count {
        let request =
            super::payload::Payload::Echo(0).request(&format!("many-{}-{number}-{n}", uuid::Uuid::new_v4().simple()), "busybox", 60_000);
        assert_exit(&client.run(&request).await, 0);
    }
}
