//! Every limit: met by a program that wants more, exact, and truthfully told.

use std::time::{Duration, Instant};

use sandbox_core::protocol::{Cause, Limit, OutputPolicy, Start};

use crate::{
    harness::{Node, command, shell},
    leaks::Snapshot,
};

/// What a limit in time may be overshot by, in microseconds (the design's bound).
const OVERSHOOT_US: u64 = 10_000;

#[test]
fn memory_beyond_the_limit_ends_the_whole_sandbox() {
    // A child takes the memory; its parent would go on if only the child died.
    let done = shell("(dd if=/dev/zero of=/dev/null bs=200M count=1); echo survived; sleep 5").run();
    assert_eq!(done.ending.cause, Cause::OomKilled, "{} {}", done.stdout, done.stderr);
    assert_eq!(done.ending.limits_hit, [Limit::Memory]);
    assert!(done.ending.oom_kills >= 1);
    let peak = done.ending.usage.memory_peak_bytes;
    assert!((60 << 20..=64 << 20).contains(&peak), "{peak}");
    assert!(done.ending.usage.wall_us < 4_000_000);
}

#[test]
fn files_in_memory_count_as_memory() {
    let mut run = shell("dd if=/dev/zero of=/fill bs=1M count=200; echo survived");
    run.supervision.disk_bytes = 512 << 20;
    let done = run.run();
    assert_eq!(done.ending.cause, Cause::OomKilled, "{} {}", done.stdout, done.stderr);
}

#[test]
fn a_fork_bomb_is_held_to_its_pids_and_told() {
    let done = shell("for i in $(seq 100); do sleep 1 & done; echo done").run();
    assert!(matches!(done.ending.cause, Cause::Exited { .. }), "{:?}", done.ending.cause);
    assert_eq!(done.ending.limits_hit, [Limit::Pids]);
    assert_eq!(done.ending.usage.pids_peak, 32);
}

#[test]
fn what_stood_ready_for_other_limits_is_held_to_its_own() {
    let node = Node::start();
    shell("true").run_on(&node);
    let of_other_limits = |pids: u64, memory_bytes: u64| {
        // One that stands ready is held to the limits of the launch before.
        Snapshot::at_rest(&node);
        let limits = |script: &str| {
            let memory = serde_json::json!({ "limit": memory_bytes, "swap": memory_bytes });
            shell(script).with("/linux/resources/pids/limit", pids).with("/linux/resources/memory", memory)
        };
        let bomb = limits("for i in $(seq 100); do sleep 1 & done; echo done").run_on(&node);
        assert_eq!((bomb.ending.limits_hit, bomb.ending.usage.pids_peak), (vec![Limit::Pids], pids));
        Snapshot::at_rest(&node);
        let hog = limits("(dd if=/dev/zero of=/dev/null bs=200M count=1); echo survived; sleep 5").run_on(&node);
        let peak = hog.ending.usage.memory_peak_bytes;
        assert_eq!(hog.ending.cause, Cause::OomKilled, "{} {}", hog.stdout, hog.stderr);
        assert!((memory_bytes - (4 << 20)..=memory_bytes).contains(&peak), "{peak}");
        // All of it ends, also where the kernel kills one process alone.
        assert!(hog.ending.usage.wall_us < 4_000_000, "{:?}", hog.ending);
        [bomb.ending.launched, hog.ending.launched].map(|launched| launched.map(|launched| launched.start))
    };
    for (pids, memory_bytes) in [(32, 64 << 20), (8, 24 << 20), (40, 96 << 20)] {
        assert_eq!(of_other_limits(pids, memory_bytes), [Some(Start::Warm); 2]);
    }
}

#[test]
fn launches_stay_warm_while_limits_in_time_come_up_of_what_ended_long_ago() {
    const FIRST: Duration = Duration::from_secs(12);
    const EVERY: Duration = Duration::from_millis(20);
    const COUNT: u32 = 250;
    let node = Node::start();
    let begun = Instant::now();
    for n in 0..COUNT {
        let mut run = shell("true");
        run.supervision.wall_ms = Some((FIRST + EVERY * n).saturating_sub(begun.elapsed()).as_millis().try_into().unwrap());
        assert_eq!(run.run_on(&node).ending.cause, Cause::Exited { code: 0 });
    }
    assert!(begun.elapsed() < FIRST, "this machine is too slow for this: {:?}", begun.elapsed());
    std::thread::sleep(FIRST - begun.elapsed());

    let starts = (0..40).map(|_| {
        std::thread::sleep(EVERY);
        shell("true").run_on(&node).ending.launched.map(|launched| launched.start)
    });
    let warm = starts.filter(|start| *start == Some(Start::Warm)).count();

    assert!(begun.elapsed() < FIRST + EVERY * COUNT, "this machine is too slow for this: {:?}", begun.elapsed());
    // No more than eight of a kind stand ready at any time.
    assert!(warm > 20, "only {warm} of 40 were warm");
}

#[test]
fn an_endless_loop_ends_at_the_wall_limit() {
    let mut run = shell("while :; do :; done");
    run.supervision.wall_ms = Some(300);
    let done = run.run();
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::WallTimeout, vec![Limit::Wall]));
    let wall_us = done.ending.usage.wall_us;
    assert!((300_000..=300_000 + OVERSHOOT_US).contains(&wall_us), "{wall_us}");
}

#[test]
fn a_sleeper_held_back_by_its_cpu_limit_still_ends_at_the_wall_limit() {
    let mut run = shell("while :; do :; done").with("/linux/resources/cpu/quota", 5_000);
    run.supervision.wall_ms = Some(300);
    let done = run.run();
    assert_eq!(done.ending.cause, Cause::WallTimeout);
    let wall_us = done.ending.usage.wall_us;
    assert!((300_000..=300_000 + OVERSHOOT_US).contains(&wall_us), "{wall_us}");
    assert!(done.ending.usage.throttled_us > 100_000, "{:?}", done.ending.usage);
}

#[test]
fn cpu_time_of_all_processes_together_ends_it() {
    let mut run = shell("(while :; do :; done) & while :; do :; done").with("/linux/resources/cpu/quota", 200_000);
    run.supervision.cpu_ms = Some(200);
    let done = run.run();
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::CpuTimeout, vec![Limit::Cpu]));
    let cpu_us = done.ending.usage.cpu_us;
    assert!((200_000..=200_000 + OVERSHOOT_US).contains(&cpu_us), "{cpu_us}");
}

#[test]
fn the_cpu_rate_is_held() {
    let mut run = shell("while :; do :; done").with("/linux/resources/cpu/quota", 20_000);
    run.supervision.wall_ms = Some(1000);
    let usage = run.run().ending.usage;
    // A fifth of a second of CPU, and at most the quota of one further period.
    assert!((150_000..=240_000).contains(&usage.cpu_us), "{usage:?}");
}

#[test]
fn endless_output_is_cut_at_its_limit_and_counted() {
    let mut run = shell("yes | head -c 300000; echo end >&2");
    run.supervision.output_bytes = 1000;
    let done = run.run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 });
    assert_eq!((done.stdout.len(), done.stderr.as_str()), (1000, "end\n"));
    assert_eq!(done.ending.usage.stdout_bytes, 300_000);
    assert!(done.ending.stdout_truncated && !done.ending.stderr_truncated);
    assert_eq!(done.ending.limits_hit, [Limit::Output]);
}

#[test]
fn the_policy_kill_ends_it_with_exactly_the_limit_kept() {
    let mut run = shell("yes");
    run.supervision.output_bytes = 1000;
    run.supervision.output_policy = OutputPolicy::Kill;
    let done = run.run();
    assert_eq!((done.ending.cause, done.stdout.len()), (Cause::OutputLimit, 1000));
}

#[test]
fn a_full_disk_is_an_error_inside_and_told() {
    let done = shell("dd if=/dev/zero of=/fill bs=1M count=40 2>/dev/null; echo $?").run();
    assert_eq!(done.stdout, "1\n");
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::Exited { code: 0 }, vec![Limit::Disk]));
}

#[test]
fn used_up_inodes_are_told_and_as_many_as_promised() {
    let mut run = shell("i=0; while touch /tmp/f$i 2>/dev/null; do i=$((i+1)); done; echo $i").with("/process/cwd", "/tmp");
    run.supervision.inodes = 64;
    let done = run.run();
    // One is the copy of /tmp itself. Before Linux 6.6 the overlay needs one less for itself.
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    let expected = if version >= (6, 6) { "63\n" } else { "64\n" };
    assert_eq!(done.stdout, expected, "{}", done.stderr);
    assert_eq!(done.ending.limits_hit, [Limit::Inodes]);
}

#[test]
fn resource_limits_are_the_same_whatever_the_keeper_was_started_with() {
    let expected = [
        ("Max core file size", "1", "1"),
        ("Max realtime priority", "0", "0"),
        ("Max nice priority", "0", "0"),
        ("Max locked memory", "8388608", "8388608"),
        ("Max msgqueue size", "819200", "819200"),
        ("Max stack size", "8388608", "unlimited"),
        ("Max cpu time", "unlimited", "unlimited"),
        ("Max data size", "unlimited", "unlimited"),
        ("Max address space", "unlimited", "unlimited"),
        ("Max open files", "256", "256"),
    ];
    let mut keeper = std::process::Command::new("prlimit");
    keeper.args(["--stack=1048576:", "--data=900000000:", crate::harness::KEEPER]);
    let node = Node::start_as(keeper);
    let limits = shell("cat /proc/self/limits").run_on(&node).stdout;
    for (name, soft, hard) in expected {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let values: Vec<&str> = line[name.len()..].split_whitespace().take(2).collect();
        assert_eq!(values, [soft, hard], "{name}");
    }
    // A small machine has fewer for everybody.
    let pending = limits.lines().find_map(|line| line.strip_prefix("Max pending signals")).unwrap();
    assert!(pending.split_whitespace().take(2).all(|value| value.parse::<u32>().unwrap() <= 4096), "{pending}");
}

#[test]
fn open_files_are_limited() {
    let limit = serde_json::json!([{ "type": "RLIMIT_NOFILE", "soft": 8, "hard": 8 }]);
    let done = shell("ulimit -n").with("/process/rlimits", limit).run();
    assert_eq!(done.stdout, "8\n");
}

#[test]
fn a_file_beyond_its_size_ends_the_payload_and_is_told() {
    let limit = serde_json::json!([
        { "type": "RLIMIT_NOFILE", "soft": 64, "hard": 64 },
        { "type": "RLIMIT_FSIZE", "soft": 65_536, "hard": 65_536 },
    ]);
    let done = command(&["/bin/dd", "if=/dev/zero", "of=/fill", "bs=4096", "count=100"]).with("/process/rlimits", limit).run();
    assert_eq!(
        (done.ending.cause, done.ending.limits_hit),
        (Cause::Signaled { signal: rustix::process::Signal::XFSZ.as_raw() }, vec![Limit::FileSize])
    );
}
