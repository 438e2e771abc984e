//! Payloads that take all they can get, one kind of thing each, while a neighbour goes on within its own limits as if they were not there.

use std::time::{Duration, Instant};

use sandbox_core::{
    fence::Fence,
    protocol::{Cause, Limit, Medium},
};
use serde_json::json;

use crate::{
    harness::{Done, Run, command, shell},
    walls::{processes_with, wait_until},
};

/// By how much a neighbour's wake-ups may be late, 19 times out of 20, in microseconds. Schedulers keep promises of this order to a sleeper
/// beside busy ones; a machine that swaps, thrashes or holds a lock for a hog misses it by far.
const LATE_US: u64 = 50_000;

fn hog(arguments: &[&str]) -> Run {
    let mut run = command(&[&["/bin/attack"], arguments].concat())
        .with("/linux/resources/memory", json!({ "limit": 32 << 20, "swap": 32 << 20 }))
        .with("/process/cwd", "/tmp");
    run.supervision.wall_ms = Some(2_000);
    run
}

/// Runs a hog again and again for as long as a neighbour lives, and hands out how the last one ended.
fn beside_neighbour(hog: impl Fn() -> Run) -> Done {
    let neighbour = std::thread::spawn(|| command(&["/bin/attack", "beat", "120"]).with("/process/cwd", "/tmp").run());
    let mut done = hog().run();
    while !neighbour.is_finished() {
        done = hog().run();
    }
    let neighbour = neighbour.join().unwrap();
    assert_eq!(neighbour.ending.cause, Cause::Exited { code: 0 }, "the neighbour: {}", neighbour.stderr);
    assert_eq!(neighbour.ending.limits_hit, [], "the neighbour");
    let late: Vec<u64> = neighbour.stdout.split_whitespace().map(|number| number.parse().unwrap()).collect();
    assert!(late[1] <= LATE_US, "the neighbour was late by (median, 19 of 20, worst): {late:?} µs");
    // The keeper is as it was, too.
    assert_eq!(shell("echo well").run().stdout, "well\n");
    done
}

fn assert_out_of_memory(done: &Done) {
    assert_eq!(done.ending.cause, Cause::OomKilled, "{}", done.stderr);
    assert_eq!(done.ending.limits_hit, [Limit::Memory]);
    assert!(done.ending.usage.memory_peak_bytes <= 32 << 20, "{:?}", done.ending.usage);
}

macro_rules! memory_hogs {
    ($($test:ident: $name:expr;)*) => {
        $(#[test]
        fn $test() {
            assert_out_of_memory(&beside_neighbour(|| hog(&[$name])));
        })*
    };
}

memory_hogs! {
    memory_is_bounded_beside_a_neighbour: "hog_memory";
    files_in_memory_are_bounded_beside_a_neighbour: "hog_memfd";
    shared_memory_is_bounded_beside_a_neighbour: "hog_shared_memory";
    page_tables_are_bounded_beside_a_neighbour: "hog_page_tables";
    socket_buffers_are_bounded_beside_a_neighbour: "hog_sockets";
    pipe_buffers_are_bounded_beside_a_neighbour: "hog_pipes";
}

#[test]
fn a_stack_is_bounded_by_memory_beside_a_neighbour() {
    let huge = json!([
        { "type": "RLIMIT_NOFILE", "soft": 256, "hard": 256 },
        { "type": "RLIMIT_STACK", "soft": 1_u64 << 30, "hard": 1_u64 << 30 },
    ]);
    assert_out_of_memory(&beside_neighbour(|| hog(&["hog_stack"]).with("/process/rlimits", huge.clone())));
}

#[test]
fn dev_shm_is_bounded_by_memory_beside_a_neighbour() {
    let fill = || {
        let mut run = hog(&[]).with("/process/args", json!(["dd", "if=/dev/zero", "of=/dev/shm/fill", "bs=1M"]));
        run.supervision.wall_ms = Some(5_000);
        run
    };
    assert_out_of_memory(&beside_neighbour(fill));
}

#[test]
fn threads_are_bounded_beside_a_neighbour() {
    let done = beside_neighbour(|| hog(&["hog_threads"]));
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 1 }, "32\n"), "{}", done.stderr);
    assert_eq!(done.ending.limits_hit, [Limit::Pids]);
    assert_eq!(done.ending.usage.pids_peak, 32);
}

#[test]
fn a_fork_bomb_is_bounded_beside_a_neighbour() {
    // What ended is counted as memory a while longer, until the kernel has buried it.
    let done =
        beside_neighbour(|| hog(&["hog_processes"]).with("/linux/resources/memory", json!({ "limit": 256 << 20, "swap": 256 << 20 })));
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    assert_eq!((done.ending.limits_hit, done.ending.usage.pids_peak), (vec![Limit::Pids], 32));
}

#[test]
fn folders_and_links_are_bounded_by_inodes_beside_a_neighbour() {
    for name in ["hog_folders", "hog_links"] {
        let done = beside_neighbour(|| hog(&[name]));
        assert_eq!(done.ending.cause, Cause::Exited { code: 1 }, "{name}: {}", done.stderr);
        assert_eq!(done.ending.limits_hit, [Limit::Inodes], "{name}: {}", done.stdout);
        let made: u64 = done.stdout.trim().parse().unwrap();
        assert!((900..=1024).contains(&made), "{name}: {made}");
    }
}

#[test]
fn a_file_of_eight_exbibytes_takes_a_page() {
    let done = hog(&["sparse_file"]).run();
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::Exited { code: 0 }, vec![]), "{}", done.stderr);
}

#[test]
fn endless_output_does_not_reach_a_neighbour() {
    let done = beside_neighbour(|| {
        let mut run = hog(&["hog_output"]);
        run.supervision.wall_ms = Some(500);
        run.supervision.output_bytes = 4096;
        run
    });
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::WallTimeout, vec![Limit::Wall, Limit::Output]));
    assert_eq!(done.stdout.len(), 4096);
}

#[test]
fn a_busy_processor_does_not_reach_a_neighbour() {
    let done = beside_neighbour(|| {
        let mut run =
            command(&["/bin/sh", "-c", "for i in 1 2 3 4 5 6 7; do /bin/attack hog_processor & done; exec /bin/attack hog_processor"]);
        run.supervision.wall_ms = Some(500);
        run
    });
    assert_eq!(done.ending.cause, Cause::WallTimeout);
}

/// A word of this test's own, by which the host finds what a payload has started.
fn marker(of: &str) -> String {
    format!("{of}-{}-{}", std::process::id(), uuid::Uuid::new_v4().simple())
}

#[test]
fn daemons_that_ignore_signals_and_stopped_ones_are_gone_beside_a_neighbour() {
    let marker = marker("daemons");
    let started = Instant::now();
    let leave = || command(&["/bin/attack", "leave_daemons", &marker]).run();
    let done = leave();
    // Four of the eight have stopped themselves and four sleep, as each has said before the payload ended.
    assert_eq!((done.ending.cause, done.stdout.lines().count()), (Cause::Exited { code: 0 }, 8), "{}", done.stderr);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    wait_until("daemons outlive their sandbox", || processes_with(&marker) == 0);
    beside_neighbour(|| command(&["/bin/attack", "leave_daemons", &marker]));
    wait_until("daemons outlive their sandbox", || processes_with(&marker) == 0);
}

#[test]
fn page_cache_is_given_back_and_not_taken_from_a_neighbour() {
    // Four times its memory, on disk: what is cached of it makes room for what is not.
    let done = beside_neighbour(|| {
        let mut run =
            hog(&[]).with("/process/args", json!(["sh", "-c", "dd if=/dev/zero of=/big bs=1M count=128 2>/dev/null && cat /big | wc -c"]));
        run.supervision.medium = Medium::Disk;
        run.supervision.disk_bytes = 160 << 20;
        run.supervision.wall_ms = Some(60_000);
        run
    });
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 0 }, "134217728\n"), "{}", done.stderr);
    assert!(done.ending.usage.memory_peak_bytes <= 32 << 20, "{:?}", done.ending.usage);
    assert_eq!(done.ending.oom_kills, 0);
}

#[test]
fn a_process_that_is_traced_when_the_kill_comes_dies_beside_a_neighbour() {
    // Tracing takes some fences away; with all of them there is nothing to try.
    let marker = marker("traced");
    let done = beside_neighbour(|| {
        let mut run = command(&["/bin/attack", "trace_and_sleep", &marker]).without(&[Fence::Seccomp, Fence::Apparmor]);
        run.supervision.wall_ms = Some(300);
        run
    });
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::WallTimeout, "traced\n"), "{}", done.stderr);
    assert!(done.ending.usage.wall_us < 5_000_000, "{:?}", done.ending.usage);
    wait_until("a traced process outlives its sandbox", || processes_with(&marker) == 0);
}
