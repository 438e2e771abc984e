//! Further processes in a sandbox that runs: what they are given, how they end, and that they are no way to more.

use std::{
    fs::File,
    io::Write,
    time::{Duration, Instant},
};

use sandbox_core::{
    client::Client,
    fence::Fence::{self, *},
    protocol::{Answer, Cause, Ending, Exec, FailureKind, KillReason, Limit, OutputPolicy, Request, SandboxId, Stdin},
};

use crate::{
    harness::{Node, Run, failure, kill, node, output, records, shell, wait, wait_for_text, weak_node, written},
    upgrade::{until, upgrade, wait_across},
};

/// A shell script in the sandbox of `run`, with limits that suit a test.
pub(crate) fn script(run: &Run, script: &str) -> Exec {
    arguments(run, &["/bin/sh", "-c", script])
}

pub(crate) fn arguments(run: &Run, args: &[&str]) -> Exec {
    Exec {
        id: SandboxId(uuid::Uuid::new_v4()),
        sandbox: run.id,
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: Stdin::Null,
        terminal: None,
        wall_ms: Some(10_000),
        output_bytes: 1 << 20,
        output_policy: OutputPolicy::Truncate,
    }
}

pub(crate) fn begin(client: &mut Client, exec: &Exec) {
    let answer = client.call(&Request::Exec(Box::new(exec.clone())), &[]).unwrap();
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
}

fn done(client: &mut Client, request: &Request) {
    assert_eq!(client.call(request, &[]).unwrap(), Answer::Done, "{request:?}");
}

/// Runs one to its end: its ending, and what it wrote.
pub(crate) fn run_exec(node: &Node, client: &mut Client, exec: &Exec) -> (Ending, String, String) {
    let answer = client.call(&Request::Exec(Box::new(exec.clone())), &[]).unwrap();
    assert!(matches!(answer, Answer::Launched(_) | Answer::Ended(_)), "{answer:?}");
    let ending = wait(client, exec.id);
    let (stdout, stderr) = output(&node.log_path(exec.id));
    done(client, &Request::Forget { id: exec.id });
    (ending, stdout, stderr)
}

/// A sandbox that runs until it is ended.
fn host(client: &mut Client) -> Run {
    host_of(client, "exec sleep 1000")
}

fn host_of(client: &mut Client, script: &str) -> Run {
    let mut run = shell(script);
    run.supervision.wall_ms = Some(60_000);
    let answer = run.launch(client);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    run
}

fn end(client: &mut Client, run: &Run) {
    kill(client, run.id);
    wait(client, run.id);
    done(client, &Request::Forget { id: run.id });
}

fn pids(client: &mut Client, id: SandboxId) -> u64 {
    let Answer::Sample(sample) = client.call(&Request::Sample { id }, &[]).unwrap() else { panic!("there is no sample") };
    sample.pids
}

#[test]
fn an_exec_has_an_ending_and_a_log_of_its_own() {
    let mut client = node().client();
    let run = host(&mut client);
    let exec = script(&run, "echo out; echo err >&2; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exit 7");
    begin(&mut client, &exec);
    let record = |client: &mut Client, id| records(client).into_iter().find(|record| record.id == id).unwrap();
    assert!(record(&mut client, exec.id).launched.is_some());
    let ending = wait(&mut client, exec.id);
    assert_eq!(ending.cause, Cause::Exited { code: 7 });
    assert!(ending.launched.is_some() && ending.limits_hit.is_empty(), "{ending:?}");
    assert_eq!((ending.usage.stdout_bytes, ending.usage.stderr_bytes), (4, 4));
    assert!(ending.usage.cpu_us > 5000 && ending.usage.cpu_us <= ending.usage.wall_us + 20_000, "{ending:?}");
    assert_eq!(output(&node().log_path(exec.id)), ("out\n".to_owned(), "err\n".to_owned()));
    assert!(record(&mut client, exec.id).is_ended && !record(&mut client, run.id).is_ended);
    done(&mut client, &Request::Forget { id: exec.id });
    assert!(!node().log_path(exec.id).exists());
    assert_eq!(written(&node().log_path(run.id)), "");
    end(&mut client, &run);
}

#[test]
fn an_exec_begins_as_the_payload_did_but_for_what_it_says() {
    let mut client = node().client();
    let tell = "echo $ONE $TWO $HOME; id -u; id -G; pwd";
    let run = shell("cd /tmp; export ONE=changed; sleep 1000")
        .with("/process/env", vec!["ONE=1".to_owned(), "TWO=2".to_owned()])
        .with("/process/user/username", "ann")
        .with("/process/cwd", "/work");
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let (ending, stdout, stderr) = run_exec(node(), &mut client, &script(&run, tell));
    assert_eq!((ending.cause, stdout.as_str()), (Cause::Exited { code: 0 }, "1 2 /home\n1000\n1000 29\n/work\n"), "{stderr}");
    let exec =
        Exec { env: vec!["TWO=three".to_owned()], cwd: Some("/etc".to_owned()), user: Some("0:29".to_owned()), ..script(&run, tell) };
    let (_, stdout, stderr) = run_exec(node(), &mut client, &exec);
    assert_eq!(stdout, "1 three /root\n0\n29\n/etc\n", "{stderr}");
    end(&mut client, &run);
}

#[test]
fn an_exec_has_no_more_than_the_payload() {
    let tell = "cd /; busybox grep -E '^(Cap|Seccomp|NoNewPrivs|Uid|Gid|Groups|Sig[BI])' /proc/self/status; \
                for n in /proc/self/ns/*; do busybox readlink $n; done; cat /proc/self/cgroup /proc/self/oom_score_adj; \
                umask; ulimit -a; ls /proc/self/fd; busybox nice; busybox env | busybox sort";
    let mut client = node().client();
    for user in [0, 1000] {
        let run = shell(&format!("{tell}; echo told; sleep 1000")).with("/process/user/uid", user).with("/process/user/gid", user);
        assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
        let of_payload = wait_for_text(&node().log_path(run.id), "told\n");
        let (_, of_exec, stderr) = run_exec(node(), &mut client, &script(&run, &format!("{tell}; echo told")));
        assert_eq!(of_exec, of_payload, "{stderr}");
        assert!(of_exec.contains("CapEff:\t0000000000000000") && of_exec.contains("NoNewPrivs:\t1"), "{of_exec}");
        end(&mut client, &run);
    }
}

#[test]
fn an_exec_leads_a_session_of_its_own() {
    let mut client = node().client();
    let run = host(&mut client);
    let (_, stdout, _) = run_exec(
        node(),
        &mut client,
        &script(&run, "read pid comm state ppid pgrp session rest </proc/$$/stat; echo $((pid-session)) $((pid-pgrp)) $ppid"),
    );
    assert_eq!(stdout, "0 0 1\n");
    end(&mut client, &run);
}

#[test]
fn what_cannot_be_started_is_named_and_harms_nothing() {
    let mut client = node().client();
    let run = host(&mut client);
    for (exec, named) in [
        (arguments(&run, &["no-such-program"]), "no-such-program"),
        (arguments(&run, &["/bin/not-executable"]), "not-executable"),
        (Exec { cwd: Some("/no/such/folder".to_owned()), ..script(&run, "true") }, "/no/such/folder"),
        (Exec { cwd: Some("/bin/sh".to_owned()), ..script(&run, "true") }, "/bin/sh"),
        (Exec { user: Some("nobody-here".to_owned()), ..script(&run, "true") }, "nobody-here"),
    ] {
        let Answer::Ended(ending) = client.call(&Request::Exec(Box::new(exec.clone())), &[]).unwrap() else { panic!("it runs") };
        let Cause::StartFailed { message } = &ending.cause else { panic!("{ending:?}") };
        assert!(message.contains(named) && ending.launched.is_none(), "{message}");
        assert_eq!(wait(&mut client, exec.id), *ending);
        assert_eq!(output(&node().log_path(exec.id)), (String::new(), String::new()));
        done(&mut client, &Request::Forget { id: exec.id });
    }
    assert_eq!(run_exec(node(), &mut client, &script(&run, "exit 3")).0.cause, Cause::Exited { code: 3 });
    assert_eq!(pids(&mut client, run.id), 1);
    end(&mut client, &run);
}

#[test]
fn where_no_exec_can_be_it_is_said_why() {
    let mut client = node().client();
    let run = host(&mut client);
    let mut refused = |exec: &Exec| failure(client.call(&Request::Exec(Box::new(exec.clone())), &[]).unwrap()).kind;
    let fine = script(&run, "true");
    assert_eq!(refused(&Exec { sandbox: SandboxId(uuid::Uuid::nil()), ..fine.clone() }), FailureKind::Gone);
    assert_eq!(refused(&Exec { args: Vec::new(), ..fine.clone() }), FailureKind::Refused);
    assert_eq!(refused(&Exec { cwd: Some("bin".to_owned()), ..fine.clone() }), FailureKind::Refused);
    assert_eq!(refused(&Exec { env: vec!["no-value".to_owned()], ..fine.clone() }), FailureKind::Refused);
    assert_eq!(refused(&Exec { stdin: Stdin::Descriptor, ..fine.clone() }), FailureKind::Refused);
    assert_eq!(refused(&Exec { id: run.id, ..fine.clone() }), FailureKind::Refused);
    done(&mut client, &Request::Pause { id: run.id });
    let mut refused = |exec: &Exec| failure(client.call(&Request::Exec(Box::new(exec.clone())), &[]).unwrap()).kind;
    assert_eq!(refused(&fine), FailureKind::Busy);
    assert!(!node().log_path(fine.id).exists(), "what was refused left a log");
    done(&mut client, &Request::Resume { id: run.id });
    // In an exec there is no other.
    let first = script(&run, "sleep 100");
    begin(&mut client, &first);
    let answer = client.call(&Request::Exec(Box::new(Exec { sandbox: first.id, ..fine.clone() })), &[]).unwrap();
    assert_eq!(failure(answer).kind, FailureKind::Gone);
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    let answer = client.call(&Request::Exec(Box::new(fine)), &[]).unwrap();
    assert_eq!(failure(answer).kind, FailureKind::Gone);
    for id in [first.id, run.id] {
        done(&mut client, &Request::Forget { id });
    }
}

#[test]
fn the_number_of_execs_is_bounded() {
    let mut client = node().client();
    let run = shell("sleep 1000")
        .with("/linux/resources/pids/limit", 200)
        .with("/linux/resources/memory", serde_json::json!({ "limit": 256 << 20, "swap": 256 << 20 }));
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let execs: Vec<Exec> = (0..64).map(|_| arguments(&run, &["/bin/sleep", "100"])).collect();
    execs.iter().for_each(|exec| begin(&mut client, exec));
    let one_more = arguments(&run, &["/bin/sleep", "100"]);
    let answer = client.call(&Request::Exec(Box::new(one_more.clone())), &[]).unwrap();
    assert_eq!(failure(answer).kind, FailureKind::Busy);
    kill(&mut client, execs[0].id);
    wait(&mut client, execs[0].id);
    begin(&mut client, &one_more);
    end(&mut client, &run);
    for exec in execs.iter().chain([&one_more]) {
        done(&mut client, &Request::Forget { id: exec.id });
    }
}

#[test]
fn an_execs_standard_input_is_null_or_a_descriptor_or_held() {
    let mut client = node().client();
    let run = host(&mut client);
    assert_eq!(run_exec(node(), &mut client, &script(&run, "cat; echo end")).1, "end\n");

    let exec = Exec { stdin: Stdin::Descriptor, ..script(&run, "cat; echo end") };
    let (read, write) = rustix::pipe::pipe().unwrap();
    File::from(write).write_all(b"brought\n").unwrap();
    let answer = client.call(&Request::Exec(Box::new(exec.clone())), &[std::os::fd::AsFd::as_fd(&read)]).unwrap();
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    wait(&mut client, exec.id);
    assert_eq!(output(&node().log_path(exec.id)).0, "brought\nend\n");

    let exec = Exec { stdin: Stdin::Held, ..script(&run, "cat; echo end") };
    begin(&mut client, &exec);
    let (answer, input) = client.call_with(&Request::Input { id: exec.id }, &[]).unwrap();
    assert_eq!(answer, Answer::Descriptor);
    File::from(input.unwrap()).write_all(b"held\n").unwrap();
    wait_for_text(&node().log_path(exec.id), "held\n");
    done(&mut client, &Request::EndInput { id: exec.id });
    assert_eq!(wait(&mut client, exec.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node().log_path(exec.id)).0, "held\nend\n");
    let gone = failure(client.call(&Request::Input { id: run.id }, &[]).unwrap());
    assert_eq!(gone.kind, FailureKind::Gone);
    end(&mut client, &run);
}

#[test]
fn a_wall_limit_ends_the_execs_session_and_nothing_else() {
    let mut client = node().client();
    let run = host(&mut client);
    // Of its session, one of another group; and one that has left it, which is the sandbox's.
    let exec = Exec { wall_ms: Some(400), ..script(&run, "sleep 100 & (set -m; sleep 100 & :) ; setsid sleep 100 & echo ready; wait") };
    begin(&mut client, &exec);
    wait_for_text(&node().log_path(exec.id), "ready");
    until(|| (pids(&mut client, run.id) == 5).then_some(()));
    let ending = wait(&mut client, exec.id);
    assert_eq!((&ending.cause, ending.limits_hit.as_slice()), (&Cause::WallTimeout, [Limit::Wall].as_slice()));
    assert!((400_000..600_000).contains(&ending.usage.wall_us), "{ending:?}");
    until(|| (pids(&mut client, run.id) == 2).then_some(()));
    end(&mut client, &run);
}

#[test]
fn what_an_exec_leaves_behind_belongs_to_the_sandbox() {
    let mut client = node().client();
    let run = host(&mut client);
    let (ending, stdout, _) = run_exec(node(), &mut client, &script(&run, "sleep 100 & echo left"));
    assert_eq!((ending.cause, stdout.as_str()), (Cause::Exited { code: 0 }, "left\n"));
    assert_eq!(pids(&mut client, run.id), 2);
    end(&mut client, &run);
}

#[test]
fn an_output_limit_ends_the_exec_alone() {
    let mut client = node().client();
    let run = host(&mut client);
    let limited = |policy| Exec { output_bytes: 1000, output_policy: policy, ..script(&run, "seq 1 5000; echo end >&2") };
    let (ending, stdout, _) = run_exec(node(), &mut client, &limited(OutputPolicy::Kill));
    assert_eq!((ending.cause, ending.limits_hit, stdout.len()), (Cause::OutputLimit, vec![Limit::Output], 1000));
    let (ending, stdout, stderr) = run_exec(node(), &mut client, &limited(OutputPolicy::Truncate));
    assert_eq!((ending.cause, stdout.len(), stderr.as_str()), (Cause::Exited { code: 0 }, 1000, "end\n"));
    assert!(ending.stdout_truncated && !ending.stderr_truncated);
    assert_eq!(run_exec(node(), &mut client, &limited(OutputPolicy::Discard)).1, "");
    end(&mut client, &run);
}

#[test]
fn an_exec_is_signalled_stopped_and_killed_by_itself() {
    let mut client = node().client();
    let run = host(&mut client);
    let stop = |id, grace_ms| Request::Stop { id, signal: 15, grace_ms, reason: KillReason::StoppedByAdmin };
    type End<'a> = &'a dyn Fn(SandboxId) -> Request;
    let ends: [(&str, End<'_>, Cause); 6] = [
        ("echo ready; exec sleep 100", &|id| Request::Signal { id, signal: 2 }, Cause::Signaled { signal: 2 }),
        (
            "trap 'exit 9' USR1; echo ready; while :; do sleep 0.01; done",
            &|id| Request::Signal { id, signal: 10 },
            Cause::Exited { code: 9 },
        ),
        ("echo ready; exec sleep 100", &|id| stop(id, 60_000), Cause::Killed(KillReason::StoppedByAdmin)),
        ("trap 'exit 4' TERM; echo ready; while :; do sleep 0.01; done", &|id| stop(id, 60_000), Cause::Exited { code: 4 }),
        ("trap '' TERM; echo ready; while :; do sleep 0.01; done", &|id| stop(id, 200), Cause::Killed(KillReason::StoppedByAdmin)),
        ("echo ready; sleep 100", &|id| Request::Kill { id, reason: KillReason::StoppedByUser }, Cause::Killed(KillReason::StoppedByUser)),
    ];
    for (text, end, cause) in ends {
        let exec = script(&run, text);
        begin(&mut client, &exec);
        wait_for_text(&node().log_path(exec.id), "ready");
        let request = end(exec.id);
        done(&mut client, &request);
        assert_eq!(wait(&mut client, exec.id).cause, cause, "{text} {request:?}");
        done(&mut client, &request);
        done(&mut client, &Request::Forget { id: exec.id });
    }
    until(|| (pids(&mut client, run.id) == 1).then_some(()));
    end(&mut client, &run);
}

#[test]
fn an_exec_ends_with_its_sandbox_and_its_ending_is_there_before() {
    let mut client = node().client();
    type Ask = fn(&mut Client, SandboxId);
    let stop = |client: &mut Client, id| done(client, &Request::Stop { id, signal: 15, grace_ms: 60_000, reason: KillReason::Expired });
    let ends: [(&str, Ask, Cause); 4] = [
        ("sleep 1000", kill, Cause::Killed(KillReason::StoppedByUser)),
        ("exec sleep 1000", stop, Cause::Killed(KillReason::Expired)),
        (
            "trap 'exit 0' TERM; while :; do sleep 0.01; done",
            |client, id| done(client, &Request::Signal { id, signal: 15 }),
            Cause::Signaled { signal: 9 },
        ),
        (
            "trap 'dd if=/dev/zero of=/dev/null bs=200M count=1' TERM; while :; do sleep 0.01; done",
            |client, id| done(client, &Request::Signal { id, signal: 15 }),
            Cause::Signaled { signal: 9 },
        ),
    ];
    for (payload, end, cause) in ends {
        let run = host_of(&mut client, payload);
        let exec = script(&run, "echo ready; while :; do echo more; sleep 0.01; done");
        begin(&mut client, &exec);
        wait_for_text(&node().log_path(exec.id), "ready");
        end(&mut client, run.id);
        wait(&mut client, run.id);
        assert!(output(&node().log_path(exec.id)).0.starts_with("ready\n"), "its log has an end");
        let ending = wait(&mut client, exec.id);
        assert_eq!(ending.cause, cause, "{payload}");
        for id in [exec.id, run.id] {
            done(&mut client, &Request::Forget { id });
        }
    }
}

#[test]
fn an_exec_survives_who_asked_and_an_upgrade() {
    let node = Node::start();
    let mut client = node.client();
    let run = host(&mut client);
    let slow = script(&run, "i=0; while [ $i -lt 100 ]; do echo line $i; echo error $i >&2; i=$((i+1)); sleep 0.01; done; exit 3");
    let limited = Exec { wall_ms: Some(1500), ..script(&run, "sleep 100") };
    let over = script(&run, "echo over; exit 5");
    let held = Exec { stdin: Stdin::Held, ..script(&run, "cat") };
    for exec in [&slow, &limited, &over, &held] {
        begin(&mut client, exec);
    }
    let before = wait(&mut client, over.id);
    drop(client);
    (0..5).for_each(|_| upgrade(&node));
    assert_eq!(wait_across(&node, slow.id).cause, Cause::Exited { code: 3 });
    let lines = |what: &str| (0..100).map(|n| format!("{what} {n}\n")).collect::<String>();
    assert_eq!(output(&node.log_path(slow.id)), (lines("line"), lines("error")));
    let ending = wait_across(&node, limited.id);
    assert_eq!(ending.cause, Cause::WallTimeout);
    assert!((1_500_000..1_700_000).contains(&ending.usage.wall_us), "{ending:?}");
    assert_eq!(wait_across(&node, over.id), before);
    let mut client = node.client();
    let (_, input) = client.call_with(&Request::Input { id: held.id }, &[]).unwrap();
    File::from(input.unwrap()).write_all(b"after\n").unwrap();
    done(&mut client, &Request::EndInput { id: held.id });
    wait(&mut client, held.id);
    assert_eq!(output(&node.log_path(held.id)).0, "after\n");
    // One more, in a sandbox of the program before.
    assert_eq!(run_exec(&node, &mut client, &script(&run, "exit 8")).0.cause, Cause::Exited { code: 8 });
    end(&mut client, &run);
}

#[test]
fn many_execs_leave_nothing_behind() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("sleep 1000");
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    run_exec(&node, &mut client, &script(&run, "true"));
    let before = crate::leaks::Snapshot::at_rest(&node);
    // That of this sandbox has the most: the others have no payload.
    let of_init = |pid: &String| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let most = || crate::leaks::children(&node).iter().map(of_init).max();
    let before_in_init = most();
    for n in 0..100 {
        let text = if n % 10 == 0 { "no-such-program; exec no-such-program" } else { "echo out; echo err >&2" };
        let exec = Exec { stdin: if n % 3 == 0 { Stdin::Held } else { Stdin::Null }, ..script(&run, text) };
        run_exec(&node, &mut client, &exec);
    }
    assert_eq!(crate::leaks::Snapshot::at_rest(&node), before);
    assert_eq!(most(), before_in_init, "init keeps descriptors");
}

#[cfg(feature = "fail-points")]
#[test]
fn a_keeper_killed_at_any_step_of_an_exec_leaves_records_that_have_ended() {
    for step in ["received", "log_made", "recorded", "ordered", "started", "answered", "reported", "logged", "told"] {
        let mut keeper = std::process::Command::new(crate::harness::KEEPER);
        keeper.env("MAYFLY_FAIL_POINTS", format!("keeper.exec.{step}=1*return"));
        let node = Node::start_as(keeper);
        let mut client = node.client();
        let run = host(&mut client);
        let exec = script(&run, "echo out; exit 5");
        // The keeper dies before it answers, or after.
        drop(client.call(&Request::Exec(Box::new(exec.clone())), &[]));
        let next = Node::start_after(node.died());
        let mut client = next.client();
        assert!(matches!(wait(&mut client, run.id).cause, Cause::InfraError { .. }), "{step}");
        match (step, client.call(&Request::Wait { id: exec.id }, &[]).unwrap()) {
            ("received", answer) => assert_eq!(failure(answer).kind, FailureKind::Gone, "{step}"),
            ("logged" | "told", Answer::Ended(ending)) => {
                assert_eq!(ending.cause, Cause::Exited { code: 5 }, "{step}");
                assert_eq!(output(&next.log_path(exec.id)).0, "out\n", "{step}");
            }
            (_, Answer::Ended(ending)) => assert!(matches!(ending.cause, Cause::InfraError { .. }), "{step}: {ending:?}"),
            (_, other) => panic!("{step}: {other:?}"),
        }
    }
}

/// What an attack comes to in an exec of a sandbox without these fences.
fn attack_in_exec(arguments_of: &[&str], without: &[Fence]) -> i32 {
    let node = if without.is_empty() { node() } else { weak_node() };
    let mut client = node.client();
    let run = shell("sleep 1000").without(without);
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let (ending, stdout, stderr) = run_exec(node, &mut client, &arguments(&run, &[&["/bin/attack"], arguments_of].concat()));
    end(&mut client, &run);
    let Cause::Exited { code: code @ (0 | 1) } = ending.cause else { panic!("{arguments_of:?}: {ending:?} {stdout} {stderr}") };
    code
}

#[test]
fn an_exec_is_no_way_to_init_nor_past_any_fence() {
    let of_init: &[Fence] = &[Seccomp, InitShield, Capabilities, Apparmor];
    let attacks: [(&[&str], &[Fence]); 8] = [
        (&["trace_init"], of_init),
        (&["read_file", "/proc/1/mem"], &[InitShield, Capabilities, Apparmor]),
        (&["read_file", "/proc/1/environ"], &[InitShield, Capabilities]),
        (&["read_link", "/proc/1/fd/3"], &[InitShield, Capabilities]),
        (&["read_link", "/proc/1/root"], &[InitShield, Capabilities]),
        (&["unshare_user"], &[Seccomp]),
        (&["raw_socket"], &[Seccomp, Capabilities, UserNamespace, Apparmor]),
        (&["open_through_leak"], &[Descriptors, Landlock]),
    ];
    for (arguments, fences) in attacks {
        assert_eq!(attack_in_exec(arguments, &[]), 1, "{arguments:?} works");
        assert_eq!(attack_in_exec(arguments, fences), 0, "the control: {arguments:?} does not work without {fences:?} either");
    }
}

#[test]
fn an_exec_cannot_signal_init() {
    let mut client = node().client();
    let run = host(&mut client);
    let exec = script(&run, "for s in 1 2 3 9 15 19 17; do kill -$s 1; done; echo tried");
    assert_eq!(run_exec(node(), &mut client, &exec).1, "tried\n");
    assert_eq!(run_exec(node(), &mut client, &script(&run, "exit 3")).0.cause, Cause::Exited { code: 3 }, "init heeds its orders still");
    end(&mut client, &run);
}

#[test]
fn what_a_payload_puts_in_the_way_of_an_exec_leads_nowhere() {
    let mut client = node().client();
    let traps = "rm /etc/passwd /etc/group; busybox mkfifo /etc/passwd /etc/group; \
                 busybox ln -s /proc/1/root /out; busybox ln -s /proc/self/fd/3 /leak; busybox ln -s /proc/1/cwd /in; busybox ln -s /tmp /fine; \
                 busybox ln -s /etc/passwd /fifo; busybox chmod 755 /etc/passwd; echo ready; sleep 1000";
    let run = host_of(&mut client, traps);
    wait_for_text(&node().log_path(run.id), "ready");
    let begun = Instant::now();
    for exec in [
        Exec { user: Some("ann".to_owned()), ..script(&run, "true") },
        Exec { cwd: Some("/out".to_owned()), ..script(&run, "true") },
        Exec { cwd: Some("/leak".to_owned()), ..script(&run, "true") },
        Exec { cwd: Some("/in/etc".to_owned()), ..script(&run, "true") },
        arguments(&run, &["/fifo"]),
    ] {
        let (ending, ..) = run_exec(node(), &mut client, &exec);
        assert!(matches!(ending.cause, Cause::StartFailed { .. }), "{exec:?}: {ending:?}");
    }
    // The control: an ordinary link is followed, and a user by number needs no file.
    let exec = Exec { cwd: Some("/fine".to_owned()), user: Some("1000".to_owned()), ..script(&run, "pwd; busybox stat -c %u /proc/self/") };
    assert_eq!(run_exec(node(), &mut client, &exec).1, "/tmp\n1000\n");
    assert!(begun.elapsed() < Duration::from_secs(5), "something waited: {:?}", begun.elapsed());
    end(&mut client, &run);
}

#[test]
fn a_user_by_name_is_whom_the_payload_was_started_as_whatever_the_file_says_later() {
    let mut client = node().client();
    // The payload's own user may write the file here.
    let run = shell("sleep 1000").with("/process/user/username", "ann");
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    let change = "cat >/etc/passwd <<-end\nann:x:0:0::/:/bin/sh\nend\n";
    run_exec(node(), &mut client, &Exec { user: Some("0".to_owned()), ..script(&run, change) });
    assert_eq!(run_exec(node(), &mut client, &script(&run, "id -u")).1, "1000\n");
    end(&mut client, &run);
}

#[test]
fn where_there_are_as_many_processes_as_there_may_be_no_exec_starts() {
    let mut client = node().client();
    let fill = "i=0; while [ $i -lt 15 ]; do sleep 1000 & i=$((i+1)); done; echo ready; wait";
    let run = shell(fill).with("/linux/resources/pids/limit", 16);
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    wait_for_text(&node().log_path(run.id), "ready");
    let Answer::Ended(ending) = client.call(&Request::Exec(Box::new(script(&run, "true"))), &[]).unwrap() else { panic!("it runs") };
    assert!(matches!(&ending.cause, Cause::StartFailed { message } if message.contains("processes")), "{ending:?}");
    end(&mut client, &run);
}

#[test]
fn a_fork_bomb_keeps_no_exec_waiting_and_no_sandbox_alive() {
    let mut client = node().client();
    let bomb = "bomb() { bomb | bomb & }; (while :; do (bomb) 2>/dev/null; done) & echo ready; exec sleep 1000";
    let run = shell(bomb).with("/linux/resources/pids/limit", 24);
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    wait_for_text(&node().log_path(run.id), "ready");
    let begun = Instant::now();
    for _ in 0..10 {
        let exec = Exec { wall_ms: Some(500), ..script(&run, "echo ran") };
        let answer = client.call(&Request::Exec(Box::new(exec.clone())), &[]).unwrap();
        if let Answer::Ended(ending) = &answer {
            assert!(matches!(&ending.cause, Cause::StartFailed { message } if message.contains("processes")), "{ending:?}");
        } else {
            assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
            wait(&mut client, exec.id);
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    let begun = Instant::now();
    end(&mut client, &run);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[test]
fn a_payload_that_stops_every_process_it_meets_cannot_stop_its_end() {
    let mut client = node().client();
    let run = host_of(&mut client, "echo ready; while :; do busybox killall5 -19; done");
    wait_for_text(&node().log_path(run.id), "ready");
    let execs: Vec<Exec> = (0..20).map(|_| script(&run, "echo ran; sleep 100")).collect();
    let mut asked = node().client();
    for exec in &execs {
        asked.send(&Request::Exec(Box::new(exec.clone())), &[]).unwrap();
    }
    // It is up to the payload which of them ever run. The keeper has taken all of them.
    until(|| execs.iter().all(|exec| node().log_path(exec.id).exists()).then_some(()));
    let begun = Instant::now();
    kill(&mut client, run.id);
    assert_eq!(wait(&mut client, run.id).cause, Cause::Killed(KillReason::StoppedByUser));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    for exec in &execs {
        assert_eq!(wait(&mut client, exec.id).cause, Cause::Killed(KillReason::StoppedByUser));
        done(&mut client, &Request::Forget { id: exec.id });
    }
    done(&mut client, &Request::Forget { id: run.id });
}
