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
/// By so much the memory over the last part may differ from that over the first, in hundredths.
const TOLERANCE_PERCENT: u64 = 10;

/// What a process has in memory, in KiB. Its proportional share of what it has in common with others would change with them.
fn resident_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).expect("a field of proc(5)");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// What service and keeper have in memory after each portion of runs.
type Samples = Vec<[u64; 2]>;

/// The middle one of each. A single look says little: an allocator gives memory back now and then, and takes it again.
fn medians(samples: &[[u64; 2]]) -> [u64; 2] {
    [0, 1].map(|of| {
        let mut all: Vec<u64> = samples.iter().map(|sample| sample[of]).collect();
        all.sort_unstable();
        all[all.len() / 2]
    })
}

/// Makes so many runs. After the first of them, which fill what fills once, compares the memory over the next with that over the last.
pub(crate) async fn runs(count: u64) {
    let mut node = Node::start(KeeperOf::Service, AT_ONCE).expect("a node starts");
    let place = node.place();
    let early = (count / 5).max(EARLY.min(count / 2));
    let pids = [place.pid, place.keeper_pid()];
    run(&mut node, early, pids).await;
    let first = node.first_snapshot().await.expect("it comes to rest");

    let later = run(&mut node, count - early, pids).await;
    let differences = node.compare(&first).await.expect("a snapshot");
    let part = later.len().div_ceil(4);
    let before = medians(&later[..part]);
    let after = medians(&later[later.len() - part..]);

    assert_eq!(differences, Vec::<String>::new());
    assert_eq!(books::contradictions(&node.database).expect("an answer"), Vec::<String>::new());
    let mut counts = Counts::default();
    let line = counts.line("nobody", "short runs");
    (line.accepted, line.snapshots) = (count, 1);
    line.reasons.insert("exited".to_owned(), count);
    for (name, (before, after)) in ["service", "keeper"].into_iter().zip(before.into_iter().zip(after)) {
        let is_flat = after.abs_diff(before) * 100 <= before * TOLERANCE_PERCENT;
        assert!(is_flat, "the {name} has {before} KiB over the runs from {early} on and {after} KiB over the last of {count}");
        line.reasons.insert(format!("{name} KiB from {early} on"), before);
        line.reasons.insert(format!("{name} KiB at the end"), after);
    }
    counts.hand_in();
}

/// Makes so many runs, and the image anew for some of them each: what takes memory once has taken it before memory is looked at.
async fn run(node: &mut Node, count: u64, pids: [u32; 2]) -> Samples {
    let mut samples = Samples::new();
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
        samples.push(pids.map(resident_kib));
    }
    samples
}

async fn some(place: Place, number: u64, count: u64) {
    let client = Client::of(&place, &super::load::tenant(number));
    for n in 0..count {
        let request =
            super::payload::Payload::Echo(0).request(&format!("many-{}-{number}-{n}", uuid::Uuid::new_v4().simple()), "busybox", 60_000);
        assert_exit(&client.run(&request).await, 0);
    }
}
