//! The second runtime class: the same requests under gVisor's kernel, with the same limits and the same endings.

use std::{
    io::Write,
    os::fd::AsFd,
    process::{Command, Stdio},
};

use sandbox_core::{
    client::Client,
    protocol::{Answer, Cause, FailureKind, Family, Isolation, KillReason, Limit, Medium, NewLimits, OutputPolicy, Request, Start},
};

use crate::harness::{Done, Node, Run, busybox_layer, command, failure, header, kill, node, output, shell, wait, wait_for_text};

/// What a limit in time may be overshot by, in microseconds: the payload's death is that of a whole kernel.
const OVERSHOOT_US: u64 = 30_000;

/// The same request, under gVisor, with room for its kernel.
fn under(run: Run) -> Run {
    let bytes: i64 = 256 << 20;
    let mut run = run.with("/linux/resources/memory/limit", bytes).with("/linux/resources/memory/swap", bytes);
    run.isolation = Isolation::Gvisor;
    run
}

/// What a script printed under gVisor, which must have ended well.
fn said(script: &str) -> String {
    let done = under(shell(script)).run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    done.stdout
}

fn why_not_started(done: &Done) -> &str {
    assert_eq!(done.launched, None);
    let Cause::StartFailed { message } = &done.ending.cause else { panic!("{:?}", done.ending.cause) };
    message
}

#[test]
fn the_node_says_that_it_has_it() {
    let Answer::Hello(hello) = node().client().call(&Request::Hello { version: sandbox_core::protocol::VERSION }, &[]).unwrap() else {
        panic!()
    };
    assert_eq!(hello.isolation, [Isolation::Container, Isolation::Gvisor], "is runsc (Debian's package of that name) installed?");
}

#[test]
fn the_kernel_is_gvisors_where_a_container_has_the_hosts() {
    let script = "busybox dmesg 2>&1 | head -n 1";
    let inside = said(script);
    assert!(inside.contains("Starting gVisor"), "{inside}");
    let container = shell(script).run().stdout;
    assert!(!container.contains("gVisor"), "{container}");
    // It makes up a version of Linux of its own.
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    assert_ne!(said("busybox uname -r").trim_end(), host);
    assert_eq!(shell("busybox uname -r").run().stdout.trim_end(), host);
}

#[test]
fn hello_world_exits_with_its_output_and_plausible_usage() {
    let done = under(shell("echo hello; echo problem >&2")).run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("hello\n", "problem\n"));
    let usage = done.ending.usage;
    assert_eq!((usage.stdout_bytes, usage.stderr_bytes, usage.pids_peak), (6, 8, 1));
    assert!(usage.wall_us > 0 && usage.cpu_us > 0 && usage.memory_peak_bytes > 0, "{usage:?}");
    assert!(done.ending.limits_hit.is_empty(), "{:?}", done.ending.limits_hit);
    let launched = done.launched.unwrap();
    assert_eq!(launched.start, Start::Cold);
    // Booting the kernel is not the payload's time.
    assert!(usage.wall_us < 1_000_000, "{usage:?} {launched:?}");
}

#[test]
fn exit_codes_and_signals_are_told_apart() {
    assert_eq!(under(shell("exit 3")).run().ending.cause, Cause::Exited { code: 3 });
    assert_eq!(under(shell("exit 139")).run().ending.cause, Cause::Exited { code: 139 });
    assert_eq!(under(shell("kill -SEGV $$")).run().ending.cause, Cause::Signaled { signal: 11 });
    assert_eq!(under(shell("kill -KILL $$")).run().ending.cause, Cause::Signaled { signal: 9 });
}

#[test]
fn what_cannot_start_says_the_same_as_in_a_container() {
    for args in [&["no-such-program"][..], &["/bin/no-such-program"], &["/bin/not-executable"]] {
        assert_eq!(why_not_started(&under(command(args)).run()), why_not_started(&command(args).run()));
    }
    let nobody = |run: Run| run.with("/process/user/username", "nobody-here");
    assert_eq!(why_not_started(&under(nobody(shell("id"))).run()), why_not_started(&nobody(shell("id")).run()));
}

#[test]
fn a_file_that_does_not_fit_the_disk_is_a_failed_start_that_names_it() {
    let mut run = under(shell("true"));
    run.supervision.disk_bytes = 64 * 1024;
    sandbox_core::files::write(&mut run.files, "big.bin", 0o644, &vec![7; 256 * 1024]).unwrap();
    let done = run.run();
    assert!(why_not_started(&done).contains("big.bin"), "{:?}", done.ending.cause);
}

#[test]
fn user_folder_files_stdin_environment_and_host_name_arrive() {
    let script =
        "cat; cat a/b.txt; stat -c '%a %u' a/b.txt; pwd; touch mine && stat -c %u mine; id -u; id -G; echo $HOME $GREETING; hostname";
    let mut run = under(shell(script)).with("/process/cwd", "/work/deep").with("/process/user/username", "ann");
    run = run.with("/process/env", vec!["GREETING=hi"]).with("/hostname", "chosen");
    run.stdin = Some(b"from stdin\n".to_vec());
    sandbox_core::files::write(&mut run.files, "a/b.txt", 0o640, b"from a file\n").unwrap();
    let done = run.run();
    let expected = "from stdin\nfrom a file\n640 1000\n/work/deep\n1000\n1000\n1000 29\n/home hi\nchosen\n";
    assert_eq!(done.stdout, expected, "{} {:?}", done.stderr, done.ending.cause);
}

#[test]
fn standard_input_can_be_a_pipe_that_is_written_to_later() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut client = node().client();
    let run = under(shell("read line; echo got $line; cat"));
    assert!(matches!(run.launch_with_stdin(&mut client, reader.as_fd()), Answer::Launched(_)));
    drop(reader);
    (&writer).write_all(b"one\ntwo\n").unwrap();
    drop(writer);
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node().log_path(run.id)).0, "got one\ntwo\n");
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
}

#[test]
fn standard_input_that_nobody_gives_is_empty() {
    assert_eq!(said("cat; echo end"), "end\n");
}

#[test]
fn the_tree_is_the_images_own() {
    // The container's folders, and nothing of what gVisor would mount by itself or of the program that starts the payload.
    let list = "ls -a /; ls -a /image /tmp; ls /dev/null /dev/shm >/dev/null && echo devices";
    assert_eq!(said(list), shell(list).run().stdout);
    assert!(said("echo changed > /etc/passwd; cat /etc/passwd").starts_with("changed"));
    assert!(said("cat /etc/passwd").starts_with("root:"));
    assert_eq!(said("echo x 2>/dev/null > /image/x; ls /image; busybox df -k /dev/shm | grep -c 65536"), "1\n");
    assert_eq!(said("stat -c '%u %g %a' /home/of-another"), "1000 42 4751\n");
}

#[test]
fn folders_that_an_image_lacks_stay_away() {
    let node = node();
    let image = "7".repeat(64);
    // Whiteouts of the OCI image specification: this layer takes /tmp and /home away.
    let mut layer = tar::Builder::new(Vec::new());
    for gone in [".wh.tmp", ".wh.home"] {
        layer.append_data(&mut header(tar::EntryType::Regular, 0o644), gone, &[][..]).unwrap();
    }
    assert!(matches!(node.unpack(&image, vec![busybox_layer(), layer.into_inner().unwrap()]), Answer::Unpacked(_)));
    let list = || shell("ls -a /; touch /tmp/x 2>/dev/null || echo none").with("/root/path", image.as_str());
    assert_eq!(under(list()).run().stdout, list().run().stdout);
}

#[test]
fn the_payload_has_no_privilege_in_there_either() {
    let status = said("cat /proc/self/status");
    for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"] {
        assert!(status.contains(line), "{line} is missing in\n{status}");
    }
    for attack in ["mount -t tmpfs none /tmp", "umount /proc", "hostname changed", "chroot / true", "kill -9 1", "mknod /tmp/sda b 8 0"] {
        assert_eq!(said(&format!("({attack}) 2>/dev/null && echo breached; true")), "", "{attack}");
    }
    assert_eq!(said("ls /proc/self/fd"), "0\n1\n2\n3\n");
    assert_eq!(said("ls /proc/1/root/ 2>/dev/null; ls /proc | head -n 1"), "1\n");
}

#[test]
fn the_wall_limit_ends_a_loop_and_a_sleeper_held_back_by_its_cpu_limit() {
    for quota in [100_000, 20_000] {
        let mut run = under(shell("while :; do :; done")).with("/linux/resources/cpu/quota", quota);
        run.supervision.wall_ms = Some(500);
        let done = run.run();
        assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::WallTimeout, vec![Limit::Wall]));
        let wall_us = done.ending.usage.wall_us;
        assert!((500_000..=500_000 + OVERSHOOT_US).contains(&wall_us), "{wall_us}");
    }
}

#[test]
fn cpu_time_of_all_processes_and_their_kernel_together_ends_it() {
    let mut run = under(shell("(while :; do :; done) & while :; do :; done")).with("/linux/resources/cpu/quota", 200_000);
    run.supervision.cpu_ms = Some(300);
    let done = run.run();
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::CpuTimeout, vec![Limit::Cpu]));
    let cpu_us = done.ending.usage.cpu_us;
    assert!((300_000..=300_000 + 2 * OVERSHOOT_US).contains(&cpu_us), "{cpu_us}");
}

#[test]
fn memory_beyond_the_limit_ends_the_whole_sandbox() {
    let done = under(shell("(dd if=/dev/zero of=/dev/null bs=400M count=1); echo survived; sleep 5")).run();
    assert_eq!(done.ending.cause, Cause::OomKilled, "{} {}", done.stdout, done.stderr);
    assert_eq!(done.ending.limits_hit, [Limit::Memory]);
    // What is being killed may take a little more on its way out.
    let peak = done.ending.usage.memory_peak_bytes;
    assert!((240 << 20..=272 << 20).contains(&peak), "{peak}");
    assert_eq!(done.stdout, "");
}

#[test]
fn less_memory_than_its_kernel_takes_is_refused() {
    let mut run = shell("true").with("/linux/resources/memory/limit", 32 << 20).with("/linux/resources/memory/swap", 32 << 20);
    run.isolation = Isolation::Gvisor;
    let Answer::Failed(failure) = run.launch(&mut node().client()) else { panic!() };
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(failure.message.contains("memory.limit"), "{}", failure.message);
}

#[test]
fn the_least_memory_is_enough_for_a_small_payload() {
    let mut run = shell("echo small").with("/linux/resources/memory/limit", 64 << 20).with("/linux/resources/memory/swap", 64 << 20);
    run.isolation = Isolation::Gvisor;
    let done = run.run();
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 0 }, "small\n"), "{}", done.stderr);
}

#[test]
fn a_fork_bomb_is_held_to_its_pids_and_told() {
    let done = under(shell("for i in $(seq 100); do sleep 100 & done; echo done")).run();
    assert!(matches!(done.ending.cause, Cause::Exited { .. }), "{:?} {}", done.ending.cause, done.stderr);
    assert_eq!((done.ending.limits_hit, done.ending.usage.pids_peak), (vec![Limit::Pids], 32));
}

#[test]
fn as_many_processes_as_allowed_can_come_and_go() {
    // Each of them takes many threads of the host.
    let script = "for round in 1 2; do for i in $(seq 90); do sleep 0.2 & done; wait; done; echo done";
    let mut run = under(shell(script)).with("/linux/resources/pids/limit", 96);
    run.supervision.wall_ms = Some(60_000);
    let done = run.run();
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 0 }, "done\n"), "{}", done.stderr);
    assert_eq!(done.ending.limits_hit, []);
    // The shell is one of them. What is counted now and then misses some.
    assert!((2..=91).contains(&done.ending.usage.pids_peak), "{:?}", done.ending.usage);
}

#[test]
fn a_full_disk_is_an_error_inside_and_told() {
    let done = under(shell("dd if=/dev/zero of=/fill bs=1M count=40 2>/dev/null; echo $?")).run();
    assert_eq!(done.stdout, "1\n");
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::Exited { code: 0 }, vec![Limit::Disk]));
    // gVisor's own choice would be a /tmp in memory, without this limit.
    assert_eq!(under(shell("dd if=/dev/zero of=/tmp/fill bs=1M count=40 2>/dev/null")).run().ending.limits_hit, [Limit::Disk]);
}

#[test]
fn a_layer_on_disk_is_as_full_and_told_as_well() {
    let mut run = under(shell("dd if=/dev/zero of=/fill bs=1M count=40 2>/dev/null; echo $?"));
    run.supervision.medium = Medium::Disk;
    let done = run.run();
    assert_eq!(done.stdout, "1\n", "{} {:?}", done.stderr, done.ending);
    assert_eq!((done.ending.cause, done.ending.limits_hit), (Cause::Exited { code: 0 }, vec![Limit::Disk]));
}

#[test]
fn used_up_inodes_are_told_and_as_many_as_in_a_container() {
    let count = |mut run: Run| {
        run.supervision.inodes = 64;
        let done = run.run();
        assert_eq!(done.ending.limits_hit, [Limit::Inodes], "{} {}", done.stdout, done.stderr);
        done.stdout
    };
    let script = "i=0; while touch /tmp/f$i; do i=$((i+1)); done; echo $i";
    assert_eq!(count(under(shell(script))), count(shell(script)));
}

#[test]
fn output_is_cut_or_ends_it() {
    let mut run = under(shell("yes | head -c 300000; echo end >&2"));
    run.supervision.output_bytes = 1000;
    let done = run.run();
    assert_eq!((done.ending.cause, done.stdout.len(), done.stderr.as_str()), (Cause::Exited { code: 0 }, 1000, "end\n"));
    assert_eq!((done.ending.usage.stdout_bytes, done.ending.limits_hit), (300_000, vec![Limit::Output]));
    let mut run = under(shell("yes"));
    run.supervision.output_bytes = 1000;
    run.supervision.output_policy = OutputPolicy::Kill;
    let done = run.run();
    assert_eq!((done.ending.cause, done.stdout.len()), (Cause::OutputLimit, 1000));
}

#[test]
fn open_files_and_file_sizes_are_limited() {
    let limits = serde_json::json!([
        { "type": "RLIMIT_NOFILE", "soft": 8, "hard": 8 },
        { "type": "RLIMIT_FSIZE", "soft": 1000, "hard": 1000 },
    ]);
    let script = "ulimit -n; head -c 2000 /dev/zero > /big; echo $?; stat -c %s /big; cat /proc/mounts >&2";
    let done = under(shell(script)).with("/process/rlimits", limits.clone()).run();
    assert_eq!(done.stdout, shell(script).with("/process/rlimits", limits).run().stdout, "{} {:?}", done.stderr, done.ending);
}

#[test]
fn a_kill_says_who_wanted_it_and_ends_everything() {
    let mut client = node().client();
    let run = under(shell("sleep 100 & sleep 100"));
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    kill(&mut client, run.id);
    assert_eq!(wait(&mut client, run.id).cause, Cause::Killed(KillReason::StoppedByUser));
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
}

#[test]
fn a_kernel_of_gvisors_that_is_killed_is_a_fault_of_the_node() {
    let node = Node::start();
    let mut client = node.client();
    let run = under(shell("sleep 100"));
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let sentry = processes_below(node.pid()).into_iter().find(|(_, command)| command.starts_with("runsc-sandbox")).expect("no sentry");
    assert!(Command::new("kill").args(["-KILL", &sentry.0.to_string()]).status().unwrap().success());
    let ending = wait(&mut client, run.id);
    assert!(matches!(&ending.cause, Cause::InfraError { message } if message.contains("gVisor")), "{:?}", ending.cause);
    drop(client);
    assert_none_is_left(&node, "after the kernel was killed");
}

#[test]
fn nothing_is_left_behind() {
    let node = Node::start();
    under(shell("sleep 100 & echo out")).run_on(&node);
    assert_none_is_left(&node, "after a normal end");
    let mut client = node.client();
    let run = under(shell("sleep 100"));
    run.launch(&mut client);
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    assert_none_is_left(&node, "after a kill");

    let endless = under(shell("sleep 100"));
    assert!(matches!(endless.launch(&mut client), Answer::Launched(_)));
    let below = processes_below(node.pid());
    assert!(below.iter().any(|(_, command)| command.starts_with("runsc")), "{below:?}");
    drop(client);
    // Kills the keeper, and nothing else.
    drop(node);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while let Some(left) = below.iter().find(|(pid, command)| command_of(*pid).as_ref() == Some(command)) {
        assert!(std::time::Instant::now() < deadline, "{left:?} outlives its keeper");
        std::thread::yield_now();
    }
}

/// Waits until no process of gVisor's is left below a keeper that runs nothing.
fn assert_none_is_left(node: &Node, when: &str) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let left: Vec<_> = processes_below(node.pid()).into_iter().filter(|(_, command)| command.starts_with("runsc")).collect();
        if left.is_empty() {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{when}: {left:?}");
        std::thread::yield_now();
    }
}

/// The processes below `pid`, with what they call themselves.
fn processes_below(pid: u32) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
        let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok()).collect::<Vec<_>>().join(" ");
        for child in children.split_whitespace().map(|child| child.parse().unwrap()) {
            found.extend(command_of(child).map(|command| (child, command)));
            parents.push(child);
        }
    }
    found
}

fn command_of(pid: u32) -> Option<String> {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&command).replace('\0', " "))
}

#[test]
fn what_runs_is_none_of_the_hosts_users_and_has_no_capability_of_the_host() {
    let node = Node::start();
    let mut client = node.client();
    let run = under(shell("sleep 100"));
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let own = std::fs::read_link("/proc/self/ns/user").unwrap();
    let below = processes_below(node.pid());
    let gvisor: Vec<_> = below.iter().filter(|(_, command)| command.starts_with("runsc")).collect();
    assert_eq!(gvisor.len(), 3, "runsc, its file server and its kernel: {below:?}");
    for (pid, command) in gvisor {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:\t")).unwrap().split('\t').next().unwrap().parse::<u32>().unwrap();
        assert!(uid >= 0x7000_0000, "{command}: {uid}");
        assert!(status.contains("NoNewPrivs:\t1"), "{command}: {status}");
        assert_ne!(std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap(), own, "{command}");
    }
    kill(&mut client, run.id);
    wait(&mut client, run.id);
}

#[test]
fn a_node_without_it_refuses_and_one_that_is_told_a_wrong_path_does_not_start() {
    let keeper = env!("CARGO_BIN_EXE_sandbox-keeper");
    let mut wrong = Command::new(keeper);
    let folder = tempfile::tempdir().unwrap();
    wrong.args(["--runsc", "/nonexistent/runsc", "--group", "0"]);
    for option in ["--socket", "--images", "--logs", "--disks"] {
        wrong.arg(option).arg(folder.path().join(option));
    }
    let output = wrong.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/runsc"), "{output:?}");

    // The null device is no program: to this keeper, runsc is not installed.
    let hide = "for folder in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin; do
        if [ -e $folder/runsc ]; then mount --bind /dev/null $folder/runsc || exit; fi; done; exec \"$@\"";
    let mut without = Command::new("unshare");
    without.args(["--mount", "sh", "-c", hide, "sh", keeper]);
    let node = Node::start_as(without);
    let mut client = node.client();
    let Answer::Hello(hello) = client.call(&Request::Hello { version: sandbox_core::protocol::VERSION }, &[]).unwrap() else { panic!() };
    assert_eq!(hello.isolation, [Isolation::Container]);
    let Answer::Failed(failure) = under(shell("true")).launch(&mut client) else { panic!() };
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(failure.message.contains("gVisor") && failure.message.contains("runsc"), "{}", failure.message);
}

#[test]
fn what_is_done_to_a_sandbox_that_runs_works_here_too_or_is_refused() {
    let mut client = node().client();
    let start = |client: &mut Client, script: &str| {
        let run = under(shell(script));
        let answer = run.launch(client);
        assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
        wait_for_text(&node().log_path(run.id), "ready");
        run.id
    };
    let done = |client: &mut Client, request: &Request| assert_eq!(client.call(request, &[]).unwrap(), Answer::Done, "{request:?}");
    let stop = |id, grace_ms| Request::Stop { id, signal: 15, grace_ms, reason: KillReason::Expired };

    let id = start(&mut client, "trap 'exit 5' USR1; echo ready; while :; do sleep 0.05; done");
    done(&mut client, &Request::Pause { id });
    done(&mut client, &Request::Resume { id });
    let Answer::Sample(sample) = client.call(&Request::Sample { id }, &[]).unwrap() else { panic!("there is no sample") };
    assert!(sample.memory_bytes > 0 && sample.pids > 0 && sample.pids <= 8, "{sample:?}");
    let refused = |client: &mut Client, request: &Request| {
        assert_eq!(failure(client.call(request, &[]).unwrap()).kind, FailureKind::Refused, "{request:?}");
    };
    refused(&mut client, &Request::Connect { id, family: Family::V4 });
    refused(&mut client, &Request::Update { id, limits: NewLimits { pids: Some(5), ..NewLimits::default() } });
    done(
        &mut client,
        &Request::Update { id, limits: NewLimits { memory_bytes: Some(300 << 20), cpu_millis: Some(900), ..NewLimits::default() } },
    );
    done(&mut client, &Request::Signal { id, signal: 10 });
    assert_eq!(wait(&mut client, id).cause, Cause::Exited { code: 5 });

    for (script, grace_ms, cause) in [
        ("echo ready; exec sleep 100", 60_000, Cause::Killed(KillReason::Expired)),
        ("trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done", 60_000, Cause::Exited { code: 3 }),
        ("trap '' TERM; echo ready; while :; do sleep 0.05; done", 300, Cause::Killed(KillReason::Expired)),
    ] {
        let id = start(&mut client, script);
        done(&mut client, &stop(id, grace_ms));
        assert_eq!(wait(&mut client, id).cause, cause, "{script}");
        done(&mut client, &Request::Forget { id });
    }

    let id = start(&mut client, "echo ready; sleep 100");
    done(&mut client, &Request::Pause { id });
    kill(&mut client, id);
    assert_eq!(wait(&mut client, id).cause, Cause::Killed(KillReason::StoppedByUser));
    done(&mut client, &Request::Forget { id });
}

#[test]
fn one_that_is_paused_takes_no_signal_but_the_last() {
    let mut client = node().client();
    let mut run = under(shell("trap 'echo heard' USR1; echo ready; while :; do sleep 0.01; done"));
    run.supervision.wall_ms = Some(60_000);
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let log = node().log_path(run.id);
    wait_for_text(&log, "ready");
    let done = |client: &mut Client, request: Request| assert_eq!(client.call(&request, &[]).unwrap(), Answer::Done, "{request:?}");
    done(&mut client, Request::Pause { id: run.id });
    for _ in 0..2000 {
        let busy = failure(client.call(&Request::Signal { id: run.id, signal: 10 }, &[]).unwrap());
        assert_eq!(busy.kind, FailureKind::Busy, "{busy:?}");
    }
    done(&mut client, Request::Resume { id: run.id });
    done(&mut client, Request::Signal { id: run.id, signal: 10 });
    wait_for_text(&log, "heard");
    done(&mut client, Request::Pause { id: run.id });
    done(&mut client, Request::Signal { id: run.id, signal: 9 });
    assert_eq!(wait(&mut client, run.id).cause, Cause::Signaled { signal: 9 });
    done(&mut client, Request::Forget { id: run.id });
}
