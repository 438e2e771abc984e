//! Every limit holds, ends what it must end, is reported by its name, and the figures beside it are true.

use mayfly_tests::{
    outcome::{assert_exit, assert_limits_hit, assert_reason, assert_within, stdout, usage},
    service::{shared, shared_and_quiet},
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Real time past a wall limit before the payload is gone, at the most. The keeper's timer and one kill lie in it.
const WALL_OVERSHOOT_MS: u64 = 10;

/// CPU time past a CPU limit, at the most.
const CPU_OVERSHOOT_MS: u64 = 10;

#[tokio::test]
async fn memory_beyond_the_limit_is_an_oom_kill() {
    let request = json!({ "image": "busybox", "command": ["hog", "200"], "limits": { "memory_bytes": 64 * MIB } });

    let run = shared().client().run(&request).await;

    assert_reason(&run, "oom_killed");
    assert_eq!(run["outcome"]["signal"], "SIGKILL");
    assert_eq!(run["outcome"]["exit_code"], Value::Null);
    assert_eq!(run["state"], "exited");
    assert_limits_hit(&run, &["memory"]);
    assert_within(&run, "memory_peak_bytes", 62 * MIB..=64 * MIB);
    assert_eq!(stdout(&run), "");
    assert!(run["outcome"]["message"].as_str().unwrap().contains("64 MiB"), "{run:#}");
}

#[tokio::test]
async fn memory_below_the_limit_is_measured() {
    let request = json!({ "image": "busybox", "command": ["hog", "100"], "limits": { "memory_bytes": 128 * MIB } });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "took 100 MiB\n");
    assert_limits_hit(&run, &[]);
    assert_within(&run, "memory_peak_bytes", 100 * MIB..=112 * MIB);
}

#[tokio::test]
async fn a_child_killed_for_memory_is_told_though_its_parent_exits_well() {
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", "hog 200; echo the parent goes on; exit 0"],
        "limits": { "memory_bytes": 32 * MIB },
    });

    let run = shared().client().run(&request).await;

    assert_limits_hit(&run, &["memory"]);
    assert_reason(&run, "oom_killed");
}

#[tokio::test]
async fn files_in_the_sandbox_count_as_its_memory() {
    let request = json!({
        "image": "busybox", "command": ["dd", "if=/dev/zero", "of=/tmp/big", "bs=1M", "count=100"],
        "limits": { "memory_bytes": 32 * MIB, "disk_bytes": 32 * MIB },
    });

    let run = shared().client().run(&request).await;

    assert_reason(&run, "oom_killed");
    assert_within(&run, "memory_peak_bytes", 30 * MIB..=32 * MIB);
}

#[tokio::test]
async fn a_fork_bomb_is_held_and_reported() {
    let request = json!({ "image": "busybox", "command": ["forkbomb", "700"], "limits": { "pids": 32 } });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "survived, refused\n");
    assert_limits_hit(&run, &["pids"]);
    assert_within(&run, "pids_peak", 31..=32);
    assert_within(&run, "wall_ms", 700..=5_000);
}

#[tokio::test]
async fn a_program_that_stays_below_the_process_limit_hits_nothing() {
    let request = json!({ "image": "busybox", "command": ["sh", "-c", "sleep 0.2 & sleep 0.2 & wait"], "limits": { "pids": 32 } });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_limits_hit(&run, &[]);
    assert_within(&run, "pids_peak", 3..=3);
}

#[tokio::test]
async fn an_endless_loop_ends_at_the_wall_limit() {
    let request = json!({ "image": "busybox", "command": ["burn", "0"], "limits": { "wall_ms": 500 } });

    let run = shared_and_quiet().client().run(&request).await;

    assert_reason(&run, "wall_timeout");
    assert_eq!(run["outcome"]["signal"], "SIGKILL");
    assert_limits_hit(&run, &["wall"]);
    assert_within(&run, "wall_ms", 500..=500 + WALL_OVERSHOOT_MS);
    // How much of a core it got meanwhile is the machine's affair; `the_figures_of_a_known_program_are_true` holds the figure itself.
    assert_within(&run, "cpu_ms", 100..=500 + WALL_OVERSHOOT_MS);
    assert!(run["outcome"]["message"].as_str().unwrap().contains("500 ms"), "{run:#}");
}

#[tokio::test]
async fn a_sleeper_ends_at_the_wall_limit_without_cpu_time() {
    let request = json!({ "image": "busybox", "command": ["sleep", "60"], "limits": { "wall_ms": 200 } });

    let run = shared_and_quiet().client().run(&request).await;

    assert_reason(&run, "wall_timeout");
    assert_within(&run, "wall_ms", 200..=200 + WALL_OVERSHOOT_MS);
    assert_within(&run, "cpu_ms", 0..=20);
}

#[tokio::test]
async fn a_loop_that_ignores_every_signal_ends_at_the_wall_limit() {
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", "trap '' TERM INT HUP QUIT; while true; do sleep 0.01; done"],
        "limits": { "wall_ms": 300 },
    });

    let run = shared_and_quiet().client().run(&request).await;

    assert_reason(&run, "wall_timeout");
    assert_within(&run, "wall_ms", 300..=300 + WALL_OVERSHOOT_MS);
}

#[tokio::test]
async fn an_endless_loop_ends_at_the_cpu_limit() {
    let request = json!({ "image": "busybox", "command": ["burn", "0"], "limits": { "cpu_ms": 300 } });

    let run = shared_and_quiet().client().run(&request).await;

    assert_reason(&run, "cpu_timeout");
    assert_limits_hit(&run, &["cpu"]);
    assert_within(&run, "cpu_ms", 300..=300 + CPU_OVERSHOOT_MS);
}

#[tokio::test]
async fn the_cpu_limit_counts_all_processes_together() {
    let request = json!({ "image": "busybox", "command": ["burn", "0", "4"], "limits": { "cpu_ms": 400, "cpu_millis": 2000 } });

    let run = shared_and_quiet().client().run(&request).await;

    assert_reason(&run, "cpu_timeout");
    assert_within(&run, "cpu_ms", 400..=400 + 2 * CPU_OVERSHOOT_MS);
    assert_within(&run, "wall_ms", 150..=900);
}

#[tokio::test]
async fn half_a_core_takes_twice_as_long() {
    let request = json!({ "image": "busybox", "command": ["burn", "300"], "limits": { "cpu_millis": 500 } });

    let run = shared_and_quiet().client().run(&request).await;

    assert_exit(&run, 0);
    assert_within(&run, "cpu_ms", 295..=340);
    assert_within(&run, "wall_ms", 500..=900);
}

#[tokio::test]
async fn endless_output_is_ended_where_that_is_the_policy() {
    let request = json!({
        "image": "busybox", "command": ["flood"], "output_policy": "kill", "limits": { "output_bytes": 100_000 },
    });

    let run = shared().client().run(&request).await;

    assert_reason(&run, "output_limit");
    assert_limits_hit(&run, &["output"]);
    assert_eq!(run["outcome"]["truncated"], json!({ "stdout": true, "stderr": false }));
    assert_eq!(stdout(&run), pattern(100_000));
}

#[tokio::test]
async fn too_much_output_is_cut_and_the_program_goes_on() {
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", "flood 300000; echo on >&2"], "output_policy": "truncate",
        "limits": { "output_bytes": 100_000 },
    });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(run["outcome"]["truncated"], json!({ "stdout": true, "stderr": false }));
    assert_eq!(stdout(&run), pattern(100_000));
    assert_eq!(run["stderr"], "on\n");
    assert_within(&run, "stdout_bytes", 300_000..=300_000);
    assert_limits_hit(&run, &["output"]);
}

#[tokio::test]
async fn output_of_exactly_the_limit_is_whole() {
    let request =
        json!({ "image": "busybox", "command": ["flood", "100000"], "output_policy": "kill", "limits": { "output_bytes": 100_000 } });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(run["outcome"]["truncated"], json!({ "stdout": false, "stderr": false }));
    assert_eq!(stdout(&run), pattern(100_000));
    assert_limits_hit(&run, &[]);
}

#[tokio::test]
async fn discarded_output_is_counted() {
    let request = json!({ "image": "busybox", "command": ["flood", "123456"], "output_policy": "discard" });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "");
    assert_within(&run, "stdout_bytes", 123_456..=123_456);
}

#[tokio::test]
async fn endless_output_that_is_cut_ends_at_the_wall_limit_with_its_start_kept() {
    let request = json!({
        "image": "busybox", "command": ["flood"], "output_policy": "truncate", "limits": { "output_bytes": 5_000, "wall_ms": 400 },
    });

    let run = shared().client().run(&request).await;

    assert_reason(&run, "wall_timeout");
    assert_eq!(stdout(&run), pattern(5_000));
    assert!(usage(&run, "stdout_bytes") > 5_000, "{run:#}");
    assert_limits_hit(&run, &["wall", "output"]);
}

#[tokio::test]
async fn a_full_disk_is_reported_and_the_program_goes_on() {
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", "dd if=/dev/zero of=/work/big bs=64k 2>/dev/null; wc -c < /work/big; exit 5"],
        "limits": { "disk_bytes": 4 * MIB },
    });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 5);
    assert_limits_hit(&run, &["disk"]);
    let written: u64 = stdout(&run).trim().parse().unwrap();
    assert!((3 * MIB..=4 * MIB).contains(&written), "{written}");
}

#[tokio::test]
async fn too_many_files_are_refused_and_reported() {
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", "i=0; while touch /work/$i 2>/dev/null; do i=$((i+1)); done; echo $i"],
        "limits": { "inodes": 64 },
    });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_limits_hit(&run, &["inodes"]);
    let made: u64 = stdout(&run).trim().parse().unwrap();
    assert!((32..=64).contains(&made), "{made}");
}

#[tokio::test]
async fn open_files_are_bounded() {
    let program = "import os\nn = 0\ntry:\n    while True:\n        os.open('/', os.O_RDONLY); n += 1\nexcept OSError as e:\n    print(n + 3, e.errno)\n";
    let request = json!({ "image": "python", "command": ["python3", "-c", program], "limits": { "open_files": 32 } });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "32 24\n");
}

#[tokio::test]
async fn a_file_larger_than_its_limit_is_a_signal() {
    let request = json!({
        "image": "busybox", "command": ["dd", "if=/dev/zero", "of=/work/big", "bs=64k", "count=100"],
        "limits": { "file_size_bytes": MIB },
    });

    let run = shared().client().run(&request).await;

    assert_reason(&run, "signaled");
    assert_eq!(run["outcome"]["signal"], "SIGXFSZ");
}

#[tokio::test]
async fn limits_that_were_not_asked_for_are_told() {
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["true"], "limits": { "pids": 7 } })).await;

    let limits = &run["limits"];
    assert_eq!(limits["pids"], 7);
    assert_eq!(limits["memory_bytes"], 256 * MIB);
    assert_eq!(limits["cpu_millis"], 1000);
    assert_eq!(limits["wall_ms"], 10_000);
    assert_eq!(limits["output_bytes"], MIB);
    assert_eq!(limits["disk_bytes"], 64 * MIB);
    assert_eq!(limits["inodes"], 4096);
    assert_eq!(limits["open_files"], 256);
}

#[tokio::test]
async fn the_smallest_limits_still_run_a_program() {
    let limits = json!({ "memory_bytes": 8 * MIB, "pids": 1, "disk_bytes": 65536, "inodes": 16, "open_files": 8, "output_bytes": 0, "file_size_bytes": 0 });

    let run = shared().client().run(&json!({ "image": "busybox", "command": ["true"], "limits": limits })).await;

    assert_exit(&run, 0);
    assert_within(&run, "pids_peak", 1..=1);
}

#[tokio::test]
async fn the_machine_is_unharmed_by_all_hogs_at_once() {
    let service = shared();
    let client = service.client();
    let limits =
        json!({ "memory_bytes": 32 * MIB, "pids": 16, "wall_ms": 1500, "output_bytes": 1000, "disk_bytes": MIB, "cpu_millis": 200 });
    let hogs = [
        json!(["forkbomb", "1000"]),
        json!(["hog", "500"]),
        json!(["burn", "0"]),
        json!(["flood"]),
        json!(["dd", "if=/dev/zero", "of=/tmp/x"]),
    ];
    let hogs = hogs.map(|command| {
        let client = client.clone();
        let request = json!({ "image": "busybox", "command": command, "limits": limits });
        tokio::spawn(async move { client.run(&request).await })
    });

    let good = client.shell("echo unharmed").await;
    let ended = futures_util::future::join_all(hogs).await;

    assert_exit(&good, 0);
    assert_eq!(stdout(&good), "unharmed\n");
    for hog in ended {
        assert_eq!(hog.unwrap()["state"], "exited");
    }
}

/// What `flood` writes.
fn pattern(bytes: usize) -> String {
    (0..bytes).map(|at| char::from(b'a' + u8::try_from(at % 65536 % 26).expect("less than 26"))).collect()
}

#[tokio::test]
async fn a_layer_larger_than_memory_is_on_disk_and_holds_what_it_promised() {
    let client = shared().client();
    // More than all its memory, written and read back.
    let script = "dd if=/dev/zero of=/big bs=1M count=48 2>/dev/null && stat -c %s /big && cat /big | wc -c && dd if=/dev/zero of=/more bs=1M count=48 2>&1 | tail -n 1";
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", script],
        "limits": { "memory_bytes": 16 * MIB, "disk_bytes": 64 * MIB, "wall_ms": 60_000 },
    });
    let run = client.run(&request).await;
    assert_reason(&run, "exited");
    let size = (48 * MIB).to_string();
    assert!(stdout(&run).starts_with(&format!("{size}\n{size}\n")), "{run}");
    assert_eq!(run["limits"]["disk_medium"], "disk");
    assert_limits_hit(&run, &["disk"]);
    assert!(usage(&run, "io_written_bytes") >= 48 * MIB, "{run}");
    assert!(usage(&run, "memory_peak_bytes") <= 16 * MIB, "{run}");
}

#[tokio::test]
async fn the_rate_of_writing_to_disk_is_held() {
    let client = shared_and_quiet().client();
    let request = |rate: u64| {
        json!({
            "image": "busybox", "command": ["sh", "-c", "dd if=/dev/zero of=/big bs=1M count=16 conv=fsync"],
            "limits": { "memory_bytes": 16 * MIB, "disk_bytes": 32 * MIB, "io_bytes_per_s": rate, "wall_ms": 60_000 },
        })
    };
    let slow = client.run(&request(8 * MIB)).await;
    assert_exit(&slow, 0);
    // Two seconds' worth, less what the kernel lets through at the beginning of a period.
    assert!(usage(&slow, "wall_ms") >= 1_500, "{slow}");
    let fast = client.run(&request(1024 * MIB)).await;
    assert!(usage(&fast, "wall_ms") < usage(&slow, "wall_ms"), "the control: {fast}");
}
