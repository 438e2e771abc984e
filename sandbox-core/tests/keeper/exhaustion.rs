//! A node that runs out of something refuses what is new, says of what, and harms nothing that runs.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit};
use sandbox_core::{
    client::Client,
    protocol::{Answer, Cause, Exec, FailureKind, KillReason, Layering, Request, SandboxId, Stdin},
    transport::Socket,
};

use crate::{
    exec::{begin, script},
    harness::{KEEPER, Node, Run, kill, output, records, refusal_of, shell, wait},
    layers::{self, on_disk},
    leaks::{Snapshot, children},
    upgrade::{until, upgrade, wait_across},
};

/// A keeper with a disk of its own for its logs, in memory, of this size.
fn with_small_disk(size: &str) -> Node {
    let folder = tempfile::Builder::new().prefix("mfk").tempdir().unwrap();
    let mut keeper = Command::new("unshare");
    let script = "mount -t tmpfs -o size=$SIZE none \"$LOGS\" && exec \"$0\" \"$@\"";
    keeper.args(["--mount", "--propagation", "private", "sh", "-c", script, KEEPER]);
    keeper.env("SIZE", size).env("LOGS", folder.path().join("logs"));
    let disks = folder.path().join("disks");
    Node::start_in(keeper, folder, &disks)
}

/// Where a log lies on that disk, which only the keeper has mounted.
fn log_of(node: &Node, id: SandboxId) -> PathBuf {
    Path::new(&format!("/proc/{}/root", node.pid())).join(node.log_path(id).strip_prefix("/").unwrap())
}

/// Takes all that is left of the disk of logs. What this returns is the file to be removed.
fn fill(node: &Node) -> PathBuf {
    let path = log_of(node, SandboxId(uuid::Uuid::nil())).with_file_name("filler");
    let mut filler = File::create(&path).unwrap();
    for size in [1 << 16, 1 << 12, 1] {
        while filler.write_all(&vec![0; size]).is_ok() {}
    }
    path
}

/// Launches it with a pipe as its standard input.
fn launch_with_pipe(run: &Run, client: &mut Client) -> OwnedFd {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let answer = run.launch_with_stdin(client, read.as_fd());
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    write
}

fn busy(answer: Answer) -> String {
    let Answer::Failed(failure) = answer else { panic!("it was not refused: {answer:?}") };
    assert_eq!(failure.kind, FailureKind::Busy, "{}", failure.message);
    failure.message
}

fn numbers(count: u32) -> String {
    (1..=count).map(|n| format!("{n}\n")).collect()
}

/// What its script does when it is told to: fill its pipe and more, and end.
fn writer(output_bytes: u64) -> Run {
    let mut run = shell("read line; seq 1 50000; exit 6");
    run.supervision.wall_ms = Some(60_000);
    run.supervision.output_bytes = output_bytes;
    run
}

#[test]
fn output_waits_for_room_on_the_disk_and_none_is_lost() {
    for is_upgraded in [false, true] {
        let node = with_small_disk("32m");
        let mut client = node.client();
        let run = writer(1 << 20);
        let stdin = launch_with_pipe(&run, &mut client);
        let mut hog = shell("read line; while :; do echo more; done");
        hog.supervision.wall_ms = Some(700);
        let hogs_stdin = launch_with_pipe(&hog, &mut client);
        let filler = fill(&node);
        rustix::io::write(&stdin, b"\n").unwrap();
        rustix::io::write(&hogs_stdin, b"\n").unwrap();

        // Both write more than their pipes hold; time goes on for both.
        let begun = Instant::now();
        if is_upgraded {
            upgrade(&node);
        }
        while begun.elapsed() < Duration::from_millis(1200) {
            assert!(records(&mut node.client()).iter().all(|record| !record.is_ended));
            std::thread::sleep(Duration::from_millis(50));
        }
        std::fs::remove_file(filler).unwrap();
        let ending = wait_across(&node, run.id);
        assert_eq!(ending.cause, Cause::Exited { code: 6 }, "{ending:?}");
        assert!(ending.usage.wall_us > 1_100_000, "it did not wait: {ending:?}");
        assert_eq!(output(&log_of(&node, run.id)).0, numbers(50_000));
        let ending = wait_across(&node, hog.id);
        assert_eq!(ending.cause, Cause::WallTimeout);
        assert!((700_000..900_000).contains(&ending.usage.wall_us), "{ending:?}");
        let (stdout, _) = output(&log_of(&node, hog.id));
        assert_eq!(stdout.len() as u64, ending.usage.stdout_bytes);
    }
}

#[test]
fn what_an_exec_wrote_waits_for_room_and_the_end_of_its_sandbox_waits_for_its_own() {
    let node = with_small_disk("16m");
    let mut client = node.client();
    let run = shell("exec sleep 1000");
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let exec = Exec { stdin: Stdin::Held, ..script(&run, "read line; seq 1 50000; sleep 1000") };
    begin(&mut client, &exec);
    let (_, input) = client.call_with(&Request::Input { id: exec.id }, &[]).unwrap();
    let filler = fill(&node);
    rustix::io::write(input.unwrap(), b"\n").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill(&mut client, run.id);
    std::thread::sleep(Duration::from_millis(300));
    assert!(records(&mut client).iter().all(|record| !record.is_ended));
    std::fs::remove_file(filler).unwrap();
    let ended = Cause::Killed(KillReason::StoppedByUser);
    assert_eq!(wait(&mut client, run.id).cause, ended);
    let (stdout, _) = output(&log_of(&node, exec.id));
    let ending = wait(&mut client, exec.id);
    assert_eq!((ending.cause, ending.usage.stdout_bytes), (ended, stdout.len() as u64));
    assert!(stdout.len() > 60_000 && numbers(50_000).starts_with(&stdout), "{}", stdout.len());
}

#[test]
fn an_end_that_finds_no_room_in_time_is_told_as_it_was_with_what_is_lost() {
    let node = with_small_disk("16m");
    let mut client = node.client();
    let mut run = shell("read line; echo last words; exit 3");
    run.supervision.output_bytes = 1 << 16;
    let stdin = launch_with_pipe(&run, &mut client);
    let filler = fill(&node);
    rustix::io::write(&stdin, b"\n").unwrap();
    let begun = Instant::now();
    let ending = wait(&mut client, run.id);
    assert_eq!(ending.cause, Cause::Exited { code: 3 }, "{ending:?}");
    assert_eq!((ending.stdout_truncated, ending.stderr_truncated), (true, false));
    assert_eq!((ending.usage.stdout_bytes, ending.limits_hit.len()), (11, 0), "{ending:?}");
    assert!((25..40).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    std::fs::remove_file(filler).unwrap();
    assert_eq!(wait(&mut client, run.id), ending);
    assert_eq!(client.call(&Request::Forget { id: run.id }, &[]).unwrap(), Answer::Done);
}

#[test]
fn a_launch_for_whose_output_the_disk_has_no_room_is_refused_until_there_is() {
    let node = with_small_disk("32m");
    let mut client = node.client();
    let wide = || {
        let mut run = shell("sleep 100");
        run.supervision.output_bytes = 8 << 20;
        run
    };
    // What others may write, and do not, takes nothing from anybody.
    let others: Vec<Run> = (0..4).map(|_| wide()).collect();
    for run in &others {
        let answer = run.launch(&mut client);
        assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    }
    // What has been written does.
    let filler = log_of(&node, SandboxId(uuid::Uuid::nil())).with_file_name("filler");
    std::fs::write(&filler, vec![1; 18 << 20]).unwrap();
    let why = busy(wide().launch(&mut client));
    assert!(why.contains("the disk of") && why.contains("logs"), "{why}");
    // One that keeps nothing needs nothing; one that keeps little fits.
    let mut small = shell("echo fits");
    small.supervision.output_bytes = 1000;
    assert!(matches!(small.launch(&mut client), Answer::Launched(_)));
    assert_eq!(wait(&mut client, small.id).cause, Cause::Exited { code: 0 });

    std::fs::remove_file(filler).unwrap();
    assert!(matches!(wide().launch(&mut client), Answer::Launched(_)));
}

#[test]
fn a_keeper_that_cannot_have_a_single_sandbox_does_not_start() {
    let logs = tempfile::tempdir().unwrap();
    let refused = std::thread::spawn({
        let logs = logs.path().to_owned();
        move || {
            rustix::thread::remove_capability_from_bounding_set(rustix::thread::CapabilitySet::SYS_RESOURCE).unwrap();
            let mut keeper = Command::new("prlimit");
            keeper.args(["--nofile=250:250", KEEPER]);
            refusal_of(keeper, &logs, &[])
        }
    });
    let said = refused.join().unwrap();
    assert!(said.contains("limit of descriptors"), "{said}");

    let group = PidsGroup::new();
    group.limit("1");
    let mut keeper = Command::new("sh");
    keeper.args(["-c", "echo 0 > \"$GROUP/cgroup.procs\" && exec \"$0\" \"$@\"", KEEPER]).env("GROUP", &group.0);
    let said = refusal_of(keeper, logs.path(), &[]);
    assert!(said.contains("of a first sandbox"), "{said}");
}

/// A keeper with descriptors for a few sandboxes.
fn with_few_descriptors() -> Node {
    let mut keeper = Command::new("prlimit");
    keeper.args(["--nofile=512:512", KEEPER]);
    // One that may raise its limit does so. What this thread has dropped, its children have not (capabilities(7), «bounding set»).
    let started = std::thread::spawn(move || {
        rustix::thread::remove_capability_from_bounding_set(rustix::thread::CapabilitySet::SYS_RESOURCE).unwrap();
        Node::start_as(keeper)
    });
    started.join().unwrap()
}

/// Launches it as soon as there is room for it.
fn launch_when_there_is_room(run: &Run, client: &mut Client) {
    until(|| {
        let answer = run.launch(client);
        let is_launched = matches!(answer, Answer::Launched(_));
        if !is_launched {
            busy(answer);
        }
        is_launched.then_some(())
    });
}

#[test]
fn a_kept_layer_and_who_goes_on_with_it_are_counted_once() {
    let node = with_few_descriptors();
    let mut client = node.client();
    let mut first = shell("echo left > /left");
    first.keeps_layer = true;
    assert!(matches!(first.launch(&mut client), Answer::Launched(_)));
    wait(&mut client, first.id);
    let others: Vec<Run> = (1..node.hello().unwrap().sandboxes_max).map(|_| shell("sleep 100")).collect();
    others.iter().for_each(|run| launch_when_there_is_room(run, &mut client));
    busy(shell("true").launch(&mut client));

    let mut next = shell("cat /left");
    (next.layer, next.keeps_layer) = (Layering::Of(first.id), true);
    launch_when_there_is_room(&next, &mut client);

    assert_eq!(wait(&mut client, next.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node.log_path(next.id)).0, "left\n");
}

#[test]
fn a_keeper_with_few_descriptors_runs_as_many_sandboxes_as_they_are_for() {
    let node = with_few_descriptors();
    let mut client = node.client();
    let max = node.hello().unwrap().sandboxes_max;
    assert!((5..20).contains(&max), "{max}");
    let neighbour = shell("read line; echo well; exit 4");
    let stdin = launch_with_pipe(&neighbour, &mut client);
    let others: Vec<Run> = (1..max).map(|_| shell("sleep 100")).collect();
    for run in &others {
        let answer = run.launch(&mut client);
        assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    }
    let one_more = shell("exit 5");
    let why = busy(one_more.launch(&mut client));
    assert!(why.contains("descriptors"), "{why}");
    assert!(!node.log_path(one_more.id).exists());

    rustix::io::write(&stdin, b"\n").unwrap();
    assert_eq!(wait(&mut client, neighbour.id).cause, Cause::Exited { code: 4 });
    assert_eq!(output(&node.log_path(neighbour.id)).0, "well\n");
    launch_when_there_is_room(&one_more, &mut client);
    assert_eq!(wait(&mut client, one_more.id).cause, Cause::Exited { code: 5 });
}

/// CPU time of a process so far, in clock ticks of a hundredth of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_keeper_without_a_descriptor_for_a_connection_does_not_spin() {
    let node = Node::start();
    let mut client = node.client();
    let neighbour = shell("read line; exit 4");
    let stdin = launch_with_pipe(&neighbour, &mut client);
    let open = Snapshot::at_rest(&node).descriptors as u64;
    let pid = rustix::process::Pid::from_raw(node.pid().cast_signed());
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", node.pid())).unwrap();
    let hard: u64 =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().nth(4).unwrap().parse().unwrap();
    let limit = |current| rustix::process::prlimit(pid, Resource::Nofile, Rlimit { current: Some(current), maximum: Some(hard) }).unwrap();
    limit(open);
    let knocking: Vec<Socket> = (0..3).map(|_| Socket::connect(&node.socket()).unwrap()).collect();
    let ticks = cpu_ticks(node.pid());
    std::thread::sleep(Duration::from_secs(1));
    let used = cpu_ticks(node.pid()) - ticks;
    assert!(used < 20, "{used} hundredths of a second in a second");

    limit(hard);
    drop(knocking);
    until(|| node.hello().ok());
    rustix::io::write(&stdin, b"\n").unwrap();
    assert_eq!(wait(&mut client, neighbour.id).cause, Cause::Exited { code: 4 });
}

/// A cgroup of the test's own that limits processes; removed when this is dropped.
struct PidsGroup(PathBuf);

impl PidsGroup {
    fn new() -> Self {
        let v1 = Path::new("/sys/fs/cgroup/pids");
        let root = if v1.exists() { v1 } else { Path::new("/sys/fs/cgroup") };
        let path = root.join(format!("mayfly-test-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn used(&self) -> u32 {
        std::fs::read_to_string(self.0.join("pids.current")).unwrap().trim().parse().unwrap()
    }

    fn limit(&self, pids: &str) {
        std::fs::write(self.0.join("pids.max"), pids).unwrap();
    }
}

impl Drop for PidsGroup {
    fn drop(&mut self) {
        until(|| std::fs::remove_dir(&self.0).ok());
    }
}

/// A keeper in this group.
fn within(group: &PidsGroup) -> Node {
    let mut keeper = Command::new("sh");
    keeper.args(["-c", "echo 0 > \"$GROUP/cgroup.procs\" && exec \"$0\" \"$@\"", KEEPER]).env("GROUP", &group.0);
    Node::start_as(keeper)
}

#[test]
fn a_layer_that_there_is_no_process_to_remove_stays() {
    let group = PidsGroup::new();
    let node = within(&group);
    let mut client = node.client();
    let mut run = shell("echo left > /left");
    run.keeps_layer = true;
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    wait(&mut client, run.id);
    group.limit("1");
    until(|| busy(client.call(&Request::DropLayer { id: run.id }, &[]).unwrap()).contains("starting to remove").then_some(()));
    group.limit("max");
    let mut next = shell("cat /left");
    (next.layer, next.keeps_layer) = (Layering::Of(run.id), true);
    launch_when_there_is_room(&next, &mut client);
    wait(&mut client, next.id);
    assert_eq!(output(&node.log_path(next.id)).0, "left\n");
    until(|| (client.call(&Request::DropLayer { id: next.id }, &[]).unwrap() == Answer::Done).then_some(()));
    drop(client);
    drop(node);
    drop(group);
}

#[test]
fn a_start_over_a_layer_for_which_a_process_is_lacking_leaves_that_as_it_is() {
    let group = PidsGroup::new();
    let node = within(&group);
    let (base, _) = layers::run(&node, on_disk(shell("echo left > /left")), Layering::Fresh);
    let over = |script: &str| {
        let mut run = on_disk(shell(script));
        run.layer = Layering::Over(base);
        run
    };
    // In another place than the layer: told so as soon as nobody has that any more.
    let mut misfit = shell("true");
    misfit.layer = Layering::Of(base);
    let mut client = node.client();
    for spare in 0..5 {
        // Init, who makes the layer below ready, who makes its own: each time there is room for one more of them.
        let tried = over("true");
        until(|| layers::is(&misfit.launch(&mut client), FailureKind::Refused).then_some(()));
        group.limit(&(group.used() + spare).to_string());
        let answer = tried.launch(&mut client);
        group.limit("max");
        if matches!(answer, Answer::Launched(_)) {
            wait(&mut client, tried.id);
        }

        let next = over("cat /left");
        let answer = layers::launch(&node, &next);

        assert!(matches!(answer, Answer::Launched(_) | Answer::Ended(_)), "{answer:?}");
        assert_eq!(wait(&mut client, next.id).cause, Cause::Exited { code: 0 });
        assert_eq!(output(&node.log_path(next.id)).0, "left\n");
    }
    drop(client);
    drop(node);
    drop(group);
}

#[test]
fn a_node_without_processes_left_says_so_and_what_runs_goes_on() {
    let group = PidsGroup::new();
    let node = within(&group);
    let mut client = node.client();
    let neighbour = shell("read line; echo well; exit 4");
    let stdin = launch_with_pipe(&neighbour, &mut client);

    group.limit("1");
    // What stands ready needs no new process of the keeper's; what comes after it does.
    let mut launched = Vec::new();
    let why = loop {
        assert!(launched.len() < 50, "there is no end of sandboxes");
        let run = shell("true");
        let answer = run.launch(&mut client);
        if !matches!(answer, Answer::Launched(_)) {
            break busy(answer);
        }
        launched.push(run);
    };
    assert!(why.contains("out of processes"), "{why}");
    rustix::io::write(&stdin, b"\n").unwrap();
    assert_eq!(wait(&mut client, neighbour.id).cause, Cause::Exited { code: 4 });
    for run in launched {
        assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    }
    group.limit("max");
    assert_eq!(shell("exit 5").run_on(&node).ending.cause, Cause::Exited { code: 5 });
    drop(client);
    drop(node);
    drop(group);
}

#[test]
fn for_want_of_memory_the_kernel_takes_sandboxes_before_the_keeper() {
    const SYS_RESOURCE: u32 = 24;
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("stderr");
    let mut keeper = Command::new(KEEPER);
    keeper.stderr(File::create(&said).unwrap());
    let node = Node::start_as(keeper);
    let score = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse::<i32>().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let may_lower = u64::from_str_radix(capabilities.trim(), 16).unwrap() >> SYS_RESOURCE & 1 == 1;
    let own = score(&node.pid().to_string());
    let warnings = std::fs::read_to_string(&said).unwrap().matches("oom_score_adj").count();
    if may_lower {
        assert_eq!((own, warnings), (-999, 0));
    } else {
        assert_eq!(warnings, 1);
    }
    let mut client = node.client();
    let run = shell("sleep 100");
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let of_inits = until(|| {
        let scores: Vec<i32> = children(&node).iter().map(|pid| score(pid)).collect();
        (!scores.is_empty() && scores.iter().all(|score| *score == 500)).then_some(scores)
    });
    assert!(of_inits.iter().all(|score| *score > own));
}
