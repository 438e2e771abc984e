//! What is done to a sandbox while it runs, and what it is told as when it ends of it.

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::net::{SocketAddrV4, connect};
use sandbox_core::{
    client::Client,
    protocol::{Answer, Cause, FailureKind, Family, IoLimits, KillReason, Limit, Medium, NewLimits, NewTime, Request, Sample, SandboxId},
};

use crate::{
    harness::{Node, Run, failure, kill, node, output, shell, wait, wait_for_text, written},
    upgrade::{until, upgrade, wait_across},
};

fn done(client: &mut Client, request: &Request) {
    assert_eq!(client.call(request, &[]).unwrap(), Answer::Done, "{request:?}");
}

fn start(client: &mut Client, run: &Run) {
    let answer = run.launch(client);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
}

/// Launches it and waits until it has said that it is ready.
fn start_ready(node: &Node, client: &mut Client, run: &Run) {
    start(client, run);
    wait_for_text(&node.log_path(run.id), "ready");
}

fn forget(client: &mut Client, id: SandboxId) {
    done(client, &Request::Forget { id });
}

fn stop(id: SandboxId, grace_ms: u64) -> Request {
    Request::Stop { id, signal: 15, grace_ms, reason: KillReason::Expired }
}

fn sample(client: &mut Client, id: SandboxId) -> Sample {
    let answer = client.call(&Request::Sample { id }, &[]).unwrap();
    let Answer::Sample(sample) = answer else { panic!("the keeper answered {answer:?}") };
    *sample
}

#[test]
fn a_signal_goes_to_the_first_process_alone() {
    let mut client = node().client();
    let run = shell(
        "(trap 'echo child' USR1; while :; do sleep 0.05; done) & trap 'echo first; exit 5' USR1; echo ready; while :; do sleep 0.05; done",
    );
    start_ready(node(), &mut client, &run);
    done(&mut client, &Request::Signal { id: run.id, signal: 10 });
    let ending = wait(&mut client, run.id);
    assert_eq!(ending.cause, Cause::Exited { code: 5 });
    assert_eq!(output(&node().log_path(run.id)).0, "ready\nfirst\n");
    // It is over: nothing is left to be done.
    done(&mut client, &Request::Signal { id: run.id, signal: 10 });
    forget(&mut client, run.id);
    let gone = failure(client.call(&Request::Signal { id: run.id, signal: 10 }, &[]).unwrap());
    assert_eq!(gone.kind, FailureKind::Gone);
}

#[test]
fn what_is_no_signal_is_refused() {
    let mut client = node().client();
    let run = shell("sleep 100");
    start(&mut client, &run);
    for signal in [0, -1, 65, i32::MIN] {
        let refused = failure(client.call(&Request::Signal { id: run.id, signal }, &[]).unwrap());
        assert_eq!(refused.kind, FailureKind::Refused, "{signal}");
    }
    // The last one that there is, which no name of a signal stands for.
    done(&mut client, &Request::Signal { id: run.id, signal: 64 });
    assert_eq!(wait(&mut client, run.id).cause, Cause::Signaled { signal: 64 });
    forget(&mut client, run.id);
}

#[test]
fn a_stop_is_told_as_what_came_of_it() {
    let mut client = node().client();
    for (script, cause) in [
        ("echo ready; exec sleep 100", Cause::Killed(KillReason::Expired)),
        ("trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done", Cause::Exited { code: 3 }),
        ("trap 'kill -INT $$' TERM; echo ready; while :; do sleep 0.01; done", Cause::Signaled { signal: 2 }),
    ] {
        let run = shell(script);
        start_ready(node(), &mut client, &run);
        done(&mut client, &stop(run.id, 9000));
        let ending = wait(&mut client, run.id);
        assert_eq!(ending.cause, cause, "{script}");
        assert!(ending.usage.wall_us < 5_000_000, "the grace was not waited for: {ending:?}");
        forget(&mut client, run.id);
    }
}

#[test]
fn who_ignores_a_stop_is_killed_when_the_grace_is_over_whoever_is_connected() {
    let mut client = node().client();
    let run = shell("trap '' TERM; echo ready; while :; do sleep 0.01; done");
    start_ready(node(), &mut client, &run);
    let begun = Instant::now();
    done(&mut client, &stop(run.id, 300));
    drop(client);
    let mut client = node().client();
    assert_eq!(wait(&mut client, run.id).cause, Cause::Killed(KillReason::Expired));
    assert!((300..3000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    forget(&mut client, run.id);
}

#[test]
fn the_first_reason_of_a_stop_stands() {
    let mut client = node().client();
    let run = shell("trap '' TERM; echo ready; while :; do sleep 0.01; done");
    start_ready(node(), &mut client, &run);
    done(&mut client, &stop(run.id, 60_000));
    kill(&mut client, run.id);
    assert_eq!(wait(&mut client, run.id).cause, Cause::Killed(KillReason::Expired));
    forget(&mut client, run.id);
}

#[test]
fn a_stop_and_a_pause_survive_an_upgrade() {
    let node = Node::start();
    let mut client = node.client();
    let stopped = shell("trap '' TERM; echo ready; while :; do sleep 0.01; done");
    let paused = shell("echo ready; while :; do echo -n .; sleep 0.01; done");
    start_ready(&node, &mut client, &stopped);
    start_ready(&node, &mut client, &paused);
    done(&mut client, &stop(stopped.id, 400));
    done(&mut client, &Request::Pause { id: paused.id });
    upgrade(&node);
    assert_eq!(wait_across(&node, stopped.id).cause, Cause::Killed(KillReason::Expired));
    let mut client = node.client();
    assert!(sample(&mut client, paused.id).is_paused);
    let before = written(&node.log_path(paused.id));
    done(&mut client, &Request::Resume { id: paused.id });
    until(|| (written(&node.log_path(paused.id)).len() > before.len()).then_some(()));
    kill(&mut client, paused.id);
    wait(&mut client, paused.id);
}

#[test]
fn a_paused_sandbox_does_nothing_until_it_is_resumed() {
    let mut client = node().client();
    let run = shell("echo ready; while :; do echo -n .; sleep 0.005; done");
    start_ready(node(), &mut client, &run);
    let log = node().log_path(run.id);
    done(&mut client, &Request::Pause { id: run.id });
    done(&mut client, &Request::Pause { id: run.id });
    // What is in the pipe may still come.
    std::thread::sleep(Duration::from_millis(50));
    let (still, used) = (written(&log), sample(&mut client, run.id));
    assert!(used.is_paused);
    std::thread::sleep(Duration::from_millis(300));
    let after = sample(&mut client, run.id);
    assert_eq!((written(&log), after.cpu_us), (still.clone(), used.cpu_us));
    done(&mut client, &Request::Resume { id: run.id });
    done(&mut client, &Request::Resume { id: run.id });
    until(|| (written(&log).len() > still.len()).then_some(()));
    assert!(!sample(&mut client, run.id).is_paused);
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    forget(&mut client, run.id);
}

#[test]
fn whatever_ends_a_paused_sandbox_ends_it_at_once() {
    let mut client = node().client();
    let endless = "trap '' INT; echo ready; while :; do sleep 0.01; done";
    type End = fn(SandboxId) -> Option<Request>;
    let ends: [(End, Cause); 5] = [
        (|id| Some(Request::Kill { id, reason: KillReason::StoppedByUser }), Cause::Killed(KillReason::StoppedByUser)),
        (|id| Some(stop(id, 60_000)), Cause::Killed(KillReason::Expired)),
        (|id| Some(Request::Signal { id, signal: 9 }), Cause::Signaled { signal: 9 }),
        (|id| Some(Request::Update { id, limits: NewLimits { wall_ms: NewTime::Ms(1), ..NewLimits::default() } }), Cause::WallTimeout),
        (|_| None, Cause::WallTimeout),
    ];
    for (end, cause) in ends {
        let mut run = shell(endless);
        run.supervision.wall_ms = Some(if end(run.id).is_none() { 1500 } else { 60_000 });
        start_ready(node(), &mut client, &run);
        done(&mut client, &Request::Pause { id: run.id });
        let begun = Instant::now();
        if let Some(request) = end(run.id) {
            done(&mut client, &request);
        }
        assert_eq!(wait(&mut client, run.id).cause, cause);
        assert!(begun.elapsed() < Duration::from_secs(4), "{cause:?}: {:?}", begun.elapsed());
        forget(&mut client, run.id);
    }
}

/// A sandbox, and a process in its groups that no freezer reaches: a pause of it waits until that is dead, or until it took too long.
struct NeverStill {
    node: Node,
    run: Run,
    process: Child,
}

impl NeverStill {
    fn start() -> Self {
        let node = Node::start();
        let run = shell("trap '' INT TERM; echo ready; while :; do echo -n .; sleep 0.01; done");
        start_ready(&node, &mut node.client(), &run);
        let attack = Command::new(node.attack_on_host()).arg("never_freeze").stdout(Stdio::piped()).spawn().unwrap();
        let mut never = Self { node, run, process: attack };
        let mut said = [0; 5];
        never.process.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        let holds_sandbox = |group: &PathBuf| std::fs::read_to_string(group.join("cgroup.procs")).unwrap().lines().count() > 1;
        let has_freezer = |group: &PathBuf| group.join("cgroup.freeze").exists() || group.join("freezer.state").exists();
        let group = crate::leaks::groups(&never.node).into_iter().find(|group| has_freezer(group) && holds_sandbox(group)).unwrap();
        std::fs::write(group.join("cgroup.procs"), never.process.id().to_string()).unwrap();
        never
    }

    /// What a pause is told that meets this request.
    fn pause_and(&self, request: &Request) -> Answer {
        let mut pauser = self.node.client();
        let pause = pauser.send(&Request::Pause { id: self.run.id }, &[]).unwrap();
        // On the same connection: the keeper takes requests in their order.
        done(&mut pauser, request);
        pauser.receive(pause).unwrap()
    }
}

#[test]
fn a_pause_that_meets_an_end_is_told_so() {
    for end in [|id| Request::Kill { id, reason: KillReason::StoppedByUser }, |id| Request::Signal { id, signal: 9 }] {
        let never = NeverStill::start();
        let refused = failure(never.pause_and(&end(never.run.id)));
        assert_eq!(refused.kind, FailureKind::Gone, "{refused:?}");
    }
}

#[test]
fn a_pause_that_is_undone_is_no_want_of_room() {
    let never = NeverStill::start();
    for undo in [Request::Resume { id: never.run.id }, stop(never.run.id, 60_000)] {
        let refused = failure(never.pause_and(&undo));
        assert_eq!(refused.kind, FailureKind::Refused, "{undo:?}: {refused:?}");
        assert!(!sample(&mut never.node.client(), never.run.id).is_paused);
    }
}

#[test]
fn a_sandbox_that_does_not_come_to_stand_still_goes_on() {
    let never = NeverStill::start();
    // It ignores this one.
    let refused = failure(never.pause_and(&Request::Signal { id: never.run.id, signal: 2 }));
    assert_eq!(refused.kind, FailureKind::Busy, "{refused:?}");
    let log = never.node.log_path(never.run.id);
    let before = written(&log).len();
    until(|| (written(&log).len() > before).then_some(()));
}

impl Drop for NeverStill {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
fn a_paused_sandbox_leaves_nothing_when_its_keeper_is_killed() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("echo ready; while :; do sleep 0.01; done");
    start_ready(&node, &mut client, &run);
    done(&mut client, &Request::Pause { id: run.id });
    let inits = crate::leaks::children(&node);
    let next = Node::start_after(node.kill());
    assert!(matches!(wait(&mut next.client(), run.id).cause, Cause::InfraError { .. }));
    until(|| {
        inits
            .iter()
            .all(|pid| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_or(true, |groups| !groups.contains("/mayfly/")))
            .then_some(())
    });
}

#[test]
fn a_sample_tells_what_is_used_now() {
    let mut client = node().client();
    let run = shell(
        "dd if=/dev/zero of=/dev/shm/held bs=1M count=20 2>/dev/null; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 100 & sleep 100 & echo ready; wait",
    );
    start_ready(node(), &mut client, &run);
    let used = sample(&mut client, run.id);
    assert!(used.memory_bytes > 20 << 20 && used.memory_peak_bytes >= used.memory_bytes, "{used:?}");
    assert!(used.cpu_us > 10_000, "{used:?}");
    assert_eq!(used.pids, 3, "{used:?}");
    assert!(used.pids_peak >= 3 && !used.is_paused && used.at_us > 1_700_000_000_000_000, "{used:?}");
    assert_eq!((used.network_received_bytes, used.network_sent_bytes), (0, 0), "there is loopback alone");
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    let gone = failure(client.call(&Request::Sample { id: run.id }, &[]).unwrap());
    assert_eq!(gone.kind, FailureKind::Gone);
    forget(&mut client, run.id);
}

fn socket(client: &mut Client, id: SandboxId) -> OwnedFd {
    let (answer, socket) = client.call_with(&Request::Connect { id, family: Family::V4 }, &[]).unwrap();
    assert_eq!(answer, Answer::Descriptor);
    let socket = socket.unwrap();
    rustix::io::ioctl_fionbio(&socket, false).unwrap();
    socket
}

#[test]
fn a_socket_reaches_the_sandboxs_own_loopback_and_no_other() {
    let mut client = node().client();
    let [one, other] = ["one", "other"].map(|name| {
        let run = shell(&format!("echo ready; while :; do echo {name} | /bin/busybox nc -l -p 7070; done"));
        start_ready(node(), &mut client, &run);
        run
    });
    let address = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 7070);
    for (run, name) in [(&one, "one\n"), (&other, "other\n")] {
        // Its program may not listen yet.
        let stream = until(|| {
            let socket = socket(&mut client, run.id);
            connect(&socket, &address).is_ok().then(|| TcpStream::from(socket))
        });
        let mut said = String::new();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        { stream }.read_to_string(&mut said).unwrap();
        assert_eq!(said, name);
    }
    assert!(TcpStream::connect("127.0.0.1:7070").is_err(), "the control: nobody listens there outside");
    for run in [one, other] {
        kill(&mut client, run.id);
        wait(&mut client, run.id);
        forget(&mut client, run.id);
    }
}

fn input(client: &mut Client, id: SandboxId) -> File {
    let (answer, input) = client.call_with(&Request::Input { id }, &[]).unwrap();
    assert_eq!(answer, Answer::Descriptor);
    input.unwrap().into()
}

#[test]
fn a_held_input_stays_open_whoever_comes_and_goes() {
    let mut client = node().client();
    let mut run = shell("cat; echo end");
    run.is_held = true;
    start(&mut client, &run);
    let log = node().log_path(run.id);
    input(&mut client, run.id).write_all(b"first\n").unwrap();
    wait_for_text(&log, "first\n");
    drop(client);
    let mut client = node().client();
    let mut held = input(&mut client, run.id);
    held.write_all(b"second\n").unwrap();
    wait_for_text(&log, "second\n");
    done(&mut client, &Request::EndInput { id: run.id });
    let gone = failure(client.call(&Request::Input { id: run.id }, &[]).unwrap());
    assert_eq!(gone.kind, FailureKind::Gone);
    // Not over before everybody who was given it has let go.
    held.write_all(b"third\n").unwrap();
    drop(held);
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&log).0, "first\nsecond\nthird\nend\n");
    done(&mut client, &Request::EndInput { id: run.id });
    forget(&mut client, run.id);
}

#[test]
fn a_payload_cannot_write_into_its_held_input_and_so_keep_it_open() {
    let mut client = node().client();
    let mut run = shell("cat <&0 & (: >/proc/self/fd/0) 2>/dev/null && echo wrote; cat /dev/stdin; wait");
    run.is_held = true;
    start(&mut client, &run);
    done(&mut client, &Request::EndInput { id: run.id });
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node().log_path(run.id)).0, "");
    forget(&mut client, run.id);
}

#[test]
fn a_held_input_is_handed_over() {
    let node = Node::start();
    let mut client = node.client();
    let mut run = shell("cat");
    run.is_held = true;
    start(&mut client, &run);
    upgrade(&node);
    let mut client = node.client();
    input(&mut client, run.id).write_all(b"after\n").unwrap();
    done(&mut client, &Request::EndInput { id: run.id });
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node.log_path(run.id)).0, "after\n");
}

fn update(id: SandboxId, limits: NewLimits) -> Request {
    Request::Update { id, limits }
}

const NONE: NewLimits =
    NewLimits { memory_bytes: None, cpu_millis: None, pids: None, wall_ms: NewTime::Same, cpu_ms: NewTime::Same, io: None };

#[test]
fn a_limit_in_time_that_is_changed_holds_from_then_on() {
    let mut client = node().client();
    // Shorter.
    let mut run = shell("echo ready; sleep 100");
    run.supervision.wall_ms = Some(60_000);
    start_ready(node(), &mut client, &run);
    done(&mut client, &update(run.id, NewLimits { wall_ms: NewTime::Ms(700), ..NONE }));
    let ending = wait(&mut client, run.id);
    assert_eq!((ending.cause, ending.limits_hit), (Cause::WallTimeout, vec![Limit::Wall]));
    assert!((700_000..2_000_000).contains(&ending.usage.wall_us), "{:?}", ending.usage);
    forget(&mut client, run.id);
    // Longer: the deadline that it had passes.
    let mut run = shell("echo ready; sleep 1; exit 4");
    run.supervision.wall_ms = Some(600);
    start_ready(node(), &mut client, &run);
    done(&mut client, &update(run.id, NewLimits { wall_ms: NewTime::Ms(60_000), ..NONE }));
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 4 });
    forget(&mut client, run.id);
}

#[test]
fn a_limit_in_time_that_is_taken_away_ends_nothing_and_a_change_of_others_leaves_it() {
    let mut client = node().client();
    let program = "echo ready; read go; i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done; sleep 1; exit 4";
    let start = |client: &mut Client, limits: NewLimits| {
        let mut run = shell(program);
        run.is_held = true;
        (run.supervision.wall_ms, run.supervision.cpu_ms) = (Some(900), Some(100));
        start_ready(node(), client, &run);
        done(client, &update(run.id, limits));
        input(client, run.id).write_all(b"go\n").unwrap();
        run.id
    };
    let without = start(&mut client, NewLimits { wall_ms: NewTime::Unlimited, cpu_ms: NewTime::Unlimited, ..NONE });
    let only_cpu_is_left = start(&mut client, NewLimits { wall_ms: NewTime::Unlimited, ..NONE });
    let only_wall_is_left = start(&mut client, NewLimits { cpu_ms: NewTime::Unlimited, ..NONE });
    assert_eq!(wait(&mut client, without).cause, Cause::Exited { code: 4 });
    assert_eq!(wait(&mut client, only_cpu_is_left).cause, Cause::CpuTimeout);
    assert_eq!(wait(&mut client, only_wall_is_left).cause, Cause::WallTimeout);
    for id in [without, only_cpu_is_left, only_wall_is_left] {
        forget(&mut client, id);
    }
}

#[test]
fn cpu_time_is_limited_where_it_was_not_and_less_or_more_than_it_was() {
    let mut client = node().client();
    for (before, now) in [(None, 300), (Some(60_000), 300), (Some(100), 400)] {
        let mut run = shell("echo ready; read go; while :; do :; done");
        run.is_held = true;
        run.supervision.cpu_ms = before;
        start_ready(node(), &mut client, &run);
        done(&mut client, &update(run.id, NewLimits { cpu_ms: NewTime::Ms(now), ..NONE }));
        input(&mut client, run.id).write_all(b"go\n").unwrap();
        let ending = wait(&mut client, run.id);
        assert_eq!(ending.cause, Cause::CpuTimeout, "{before:?}");
        assert!((now * 1000..now * 1000 + 200_000).contains(&ending.usage.cpu_us), "{before:?}: {:?}", ending.usage);
        forget(&mut client, run.id);
    }
}

#[test]
fn memory_and_processes_are_limited_otherwise_from_then_on() {
    let mut client = node().client();
    let fill = "echo ready; read go; dd if=/dev/zero of=/dev/shm/held bs=1M count=60 2>/dev/null && echo filled; sleep 0.2; for i in 1 2 3 4 5; do sleep 5 & done; echo forked; sleep 100";
    let start_with = |client: &mut Client, limits: NewLimits| {
        let mut run = shell(fill).with("/linux/resources/memory", serde_json::json!({ "limit": 48 << 20, "swap": 48 << 20 }));
        run.is_held = true;
        start_ready(node(), client, &run);
        done(client, &update(run.id, limits));
        input(client, run.id).write_all(b"go\n").unwrap();
        run.id
    };
    // The control: with the limit of its launch it is out of memory.
    let id = start_with(&mut client, NewLimits { pids: Some(30), ..NONE });
    assert_eq!(wait(&mut client, id).cause, Cause::OomKilled);
    forget(&mut client, id);

    let id = start_with(&mut client, NewLimits { memory_bytes: Some(128 << 20), cpu_millis: Some(500), ..NONE });
    wait_for_text(&node().log_path(id), "forked");
    // It is in use by now.
    let refused = failure(client.call(&update(id, NewLimits { memory_bytes: Some(16 << 20), ..NONE }), &[]).unwrap());
    assert_eq!(refused.kind, FailureKind::Refused, "{refused:?}");
    assert!(sample(&mut client, id).memory_bytes > 60 << 20, "it goes on");
    kill(&mut client, id);
    assert_eq!(wait(&mut client, id).cause, Cause::Killed(KillReason::StoppedByUser));
    forget(&mut client, id);

    let id = start_with(&mut client, NewLimits { memory_bytes: Some(128 << 20), pids: Some(3), ..NONE });
    let ending = wait(&mut client, id);
    assert!(ending.limits_hit.contains(&Limit::Pids), "{ending:?}");
    assert!(ending.usage.pids_peak <= 3, "{ending:?}");
    forget(&mut client, id);
}

/// One whose memory is filled as fast as it is taken back, so that the kernel is at it for as long as it may be.
fn filling() -> Run {
    // More than it is to have, which nobody can take back; and holes in files, which cost nothing to read and come to memory all the same.
    let script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=20 2>/dev/null; for n in 1 2 3 4; do dd if=/dev/zero of=/$n bs=1 count=0 seek=512M 2>/dev/null; \
        for reader in 1 2 3 4; do while :; do cat /$n >/dev/null; done & done; done; echo ready; wait";
    let mut run = shell(script)
        .with("/linux/resources/memory", serde_json::json!({ "limit": 256 << 20, "swap": 256 << 20 }))
        .with("/linux/resources/cpu/quota", 400_000)
        .with("/linux/resources/pids/limit", 64);
    // None like it is prepared ahead.
    run.supervision.medium = Medium::Disk;
    run.supervision.wall_ms = Some(60_000);
    run
}

#[test]
fn memory_that_is_filled_as_fast_as_it_is_taken_back_is_asked_for_a_second_and_holds_up_nobody_else() {
    let mut client = node().client();
    let run = filling();
    start_ready(node(), &mut client, &run);
    let lower = NewLimits { memory_bytes: Some(8 << 20), pids: Some(20), ..NONE };
    let tag = client.send(&update(run.id, lower), &[]).unwrap();
    let other = std::thread::spawn(move || client.receive(tag).unwrap());
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    while !other.is_finished() {
        let asked = Instant::now();
        node().hello().unwrap();
        longest = longest.max(asked.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }

    let refused = failure(other.join().unwrap());

    assert_eq!(refused.kind, FailureKind::Refused, "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(longest < Duration::from_millis(400), "{longest:?}");
    // It has what it had, and is held to others when it can be.
    let mut client = node().client();
    assert!(sample(&mut client, run.id).memory_bytes > 20 << 20);
    done(&mut client, &update(run.id, NewLimits { memory_bytes: Some(512 << 20), ..NONE }));
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    forget(&mut client, run.id);
}

#[test]
fn one_that_ends_while_its_memory_is_asked_for_leaves_nothing() {
    let node = Node::start();
    let mut client = node.client();
    // From then on one stands ready.
    shell("true").run_on(&node);
    let before = crate::leaks::Snapshot::at_rest(&node);
    let run = filling();
    start_ready(&node, &mut client, &run);
    let asked = client.send(&update(run.id, NewLimits { memory_bytes: Some(8 << 20), ..NONE }), &[]).unwrap();
    let again = client.send(&update(run.id, NewLimits { memory_bytes: Some(9 << 20), ..NONE }), &[]).unwrap();
    let killed = client.send(&Request::Kill { id: run.id, reason: KillReason::StoppedByUser }, &[]).unwrap();
    assert_eq!(client.receive(killed).unwrap(), Answer::Done);
    assert_eq!(failure(client.receive(again).unwrap()).kind, FailureKind::Busy);
    // The kernel may hear first that nobody fills it any more, and find that there is nothing to be taken back.
    let gone = failure(client.receive(asked).unwrap());
    assert!(matches!(gone.kind, FailureKind::Gone | FailureKind::Refused), "{gone:?}");
    assert_eq!(wait(&mut client, run.id).cause, Cause::Killed(KillReason::StoppedByUser));
    forget(&mut client, run.id);
    assert_eq!(crate::leaks::Snapshot::at_rest(&node), before);
}

#[test]
fn limits_out_of_bounds_are_refused_and_change_nothing() {
    let mut client = node().client();
    let run = shell("echo ready; sleep 1; exit 4");
    start_ready(node(), &mut client, &run);
    for limits in [
        NewLimits { wall_ms: NewTime::Ms(1), memory_bytes: Some(1), ..NONE },
        NewLimits { wall_ms: NewTime::Ms(1), cpu_ms: NewTime::Ms(0), ..NONE },
        NewLimits { wall_ms: NewTime::Ms(1), io: Some(IoLimits { bytes_per_s: 0, ops_per_s: 1 }), ..NONE },
        // Within the policy, but below what the kernel takes for a quota.
        NewLimits { wall_ms: NewTime::Ms(1), cpu_millis: Some(1), ..NONE },
    ] {
        let refused = failure(client.call(&update(run.id, limits), &[]).unwrap());
        assert_eq!(refused.kind, FailureKind::Refused, "{refused:?}");
    }
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 4 }, "the wall limit that came with them does not hold");
    forget(&mut client, run.id);
    let gone = failure(client.call(&update(run.id, NONE), &[]).unwrap());
    assert_eq!(gone.kind, FailureKind::Gone);
}

#[cfg(feature = "fail-points")]
#[test]
fn a_keeper_killed_at_any_step_of_these_leaves_records_that_have_ended() {
    type Ask = fn(SandboxId) -> Request;
    let steps: [(&str, Ask); 4] = [
        ("keeper.control.noted", |id| stop(id, 1000)),
        ("keeper.control.frozen", |id| Request::Pause { id }),
        ("keeper.control.lowering", |id| update(id, NewLimits { memory_bytes: Some(32 << 20), ..NONE })),
        ("keeper.control.changed", |id| update(id, NewLimits { cpu_millis: Some(700), ..NONE })),
    ];
    for (step, ask) in steps {
        let mut keeper = Command::new(crate::harness::KEEPER);
        keeper.env("MAYFLY_FAIL_POINTS", format!("{step}=1*return"));
        let node = Node::start_as(keeper);
        let mut client = node.client();
        let run = shell("echo ready; sleep 100");
        start_ready(&node, &mut client, &run);
        drop(client.call(&ask(run.id), &[]));
        let next = Node::start_after(node.died());
        let mut client = next.client();
        assert!(matches!(wait(&mut client, run.id).cause, Cause::InfraError { .. }), "{step}");
        assert_eq!(output(&next.log_path(run.id)).0, "ready\n", "{step}");
    }
}
