//! What is known of a sandbox outlives the keeper: it stands in the log, is told by the next keeper, and is dropped when it is forgotten.

use std::{
    fs::{File, Permissions},
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use sandbox_core::{
    client::Client,
    log::{self, Kind},
    protocol::{Answer, Cause, Ending, FailureKind, KillReason, Request, SandboxId},
};

use crate::harness::{Node, kill, output, records, shell, wait, wait_for_line};

fn forget(client: &mut Client, id: SandboxId) {
    assert_eq!(client.call(&Request::Forget { id }, &[]).unwrap(), Answer::Done);
}

fn refusal(answer: Answer) -> String {
    let Answer::Failed(failure) = answer else { panic!("it was not refused: {answer:?}") };
    assert_eq!(failure.kind, FailureKind::Refused, "{}", failure.message);
    failure.message
}

fn is_gone(client: &mut Client, id: SandboxId) -> bool {
    matches!(client.call(&Request::Wait { id }, &[]).unwrap(), Answer::Failed(failure) if failure.kind == FailureKind::Gone)
}

/// The ending that a log tells.
fn told_by_log(path: &Path) -> Option<Ending> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = bytes.as_slice();
    while let Ok(Some((record, behind))) = log::parse(rest) {
        if record.kind == Kind::End {
            return log::decode_ending(record.data);
        }
        rest = behind;
    }
    None
}

fn assert_lost(ending: &Ending) {
    assert!(matches!(&ending.cause, Cause::InfraError { message } if message.contains("keeper was killed")), "{ending:?}");
}

#[test]
fn an_ending_is_the_same_in_the_answer_in_the_log_and_from_the_next_keeper() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("echo kept; exit 7");
    run.launch(&mut client);
    let ending = wait(&mut client, run.id);
    assert_eq!(ending.cause, Cause::Exited { code: 7 });
    assert_eq!(told_by_log(&node.log_path(run.id)), Some(ending.clone()));

    let next = Node::start_after(node.kill());
    let mut client = next.client();
    assert_eq!(wait(&mut client, run.id), ending);
    let listed = records(&mut client);
    assert_eq!(
        listed.iter().map(|record| (record.id, record.is_ended, record.launched)).collect::<Vec<_>>(),
        [(run.id, true, ending.launched)]
    );
    assert_eq!(output(&next.log_path(run.id)).0, "kept\n");
    forget(&mut client, run.id);
    assert!(is_gone(&mut client, run.id) && !next.log_path(run.id).exists());
    assert_eq!(records(&mut client), []);
}

#[test]
fn a_sandbox_that_died_with_its_keeper_is_told_as_that_for_good() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("echo heard; sleep 100");
    run.launch(&mut client);
    wait_for_line(&node.log_path(run.id));

    let next = Node::start_after(node.kill());
    let ending = wait(&mut next.client(), run.id);
    assert_lost(&ending);
    assert_eq!(ending.usage.stdout_bytes, 6);
    assert_eq!(output(&next.log_path(run.id)).0, "heard\n");
    let after_that = Node::start_after(next.kill());
    assert_eq!(wait(&mut after_that.client(), run.id), ending);
}

#[test]
fn half_a_record_at_the_end_of_a_log_is_cut() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("echo whole; sleep 100");
    run.launch(&mut client);
    let path = node.log_path(run.id);
    wait_for_line(&path);
    let folder = node.kill();
    let mut half = Vec::new();
    log::Record { kind: Kind::Stdout, seq: 1, at_us: 1, data: b"never finished" }.append_to(&mut half);
    half.truncate(half.len() - 3);
    File::options().append(true).open(&path).unwrap().write_all(&half).unwrap();

    let next = Node::start_after(folder);
    assert_lost(&wait(&mut next.client(), run.id));
    assert_eq!(output(&path).0, "whole\n");
}

#[test]
fn what_a_payload_writes_is_not_taken_for_its_end() {
    let node = Node::start();
    let mut client = node.client();
    let honest = shell("true");
    honest.launch(&mut client);
    let ending = wait(&mut client, honest.id);
    let mut forged = Vec::new();
    let data = serde_json::to_vec(&ending).unwrap();
    log::Record { kind: Kind::End, seq: 1, at_us: 1, data: &data }.append_to(&mut forged);
    let mut run = shell("cat; sleep 100");
    run.stdin = Some(forged);
    run.launch(&mut client);
    wait_for_line(&node.log_path(run.id));

    let next = Node::start_after(node.kill());
    let mut client = next.client();
    assert_lost(&wait(&mut client, run.id));
    assert_eq!(wait(&mut client, honest.id), ending);
}

#[test]
fn a_log_that_is_kept_without_its_record_gives_none_and_no_second_payload() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("echo once");
    run.launch(&mut client);
    wait(&mut client, run.id);
    assert_eq!(client.call(&Request::ForgetRecord { id: run.id }, &[]).unwrap(), Answer::Done);
    assert_eq!(std::fs::metadata(node.log_path(run.id)).unwrap().mode() & 0o777, 0o440);
    assert!(refusal(run.launch(&mut client)).contains("log exists"));

    let next = Node::start_after(node.kill());
    let mut client = next.client();
    assert_eq!(records(&mut client), []);
    assert!(is_gone(&mut client, run.id));
    assert!(refusal(run.launch(&mut client)).contains("log exists"));
    assert_eq!(output(&next.log_path(run.id)).0, "once\n");
    forget(&mut client, run.id);
    assert!(!next.log_path(run.id).exists());
}

#[test]
fn a_launch_that_is_sent_again_to_the_next_keeper_starts_nothing() {
    let node = Node::start();
    let mut client = node.client();
    let run = shell("echo once; sleep 100");
    run.launch(&mut client);
    wait_for_line(&node.log_path(run.id));

    let next = Node::start_after(node.kill());
    let mut client = next.client();
    assert!(refusal(run.launch(&mut client)).contains("exists already"));
    assert_lost(&wait(&mut client, run.id));
    assert_eq!(output(&next.log_path(run.id)).0, "once\n");
}

#[test]
fn files_that_are_no_logs_of_the_keepers_are_left_alone() {
    let node = Node::start();
    let folder = node.kill();
    let logs = folder.path().join("logs");
    let name = || format!("{}.log", uuid::Uuid::new_v4());
    let of_another = logs.join(name());
    std::fs::write(&of_another, b"").unwrap();
    std::os::unix::fs::chown(&of_another, Some(1000), None).unwrap();
    let target = logs.join("target");
    std::fs::write(&target, b"").unwrap();
    std::os::unix::fs::symlink(&target, logs.join(name())).unwrap();
    std::fs::create_dir(logs.join(name())).unwrap();
    std::fs::write(logs.join(format!("{}.log", uuid::Uuid::new_v4().simple())), b"").unwrap();
    std::fs::write(logs.join("notes.log"), b"").unwrap();
    let sealed = logs.join(name());
    std::fs::write(&sealed, b"").unwrap();
    std::fs::set_permissions(&sealed, Permissions::from_mode(0o440)).unwrap();

    let next = Node::start_after(folder);
    assert_eq!(records(&mut next.client()), []);
    for path in [of_another, target, sealed] {
        assert_eq!(std::fs::metadata(path).unwrap().len(), 0);
    }
}

#[test]
fn a_reader_can_ask_for_what_has_changed() {
    let node = Node::start();
    let mut client = node.client();
    let runs = [shell("sleep 100"), shell("sleep 100"), shell("exit 1")];
    runs.iter().for_each(|run| drop(run.launch(&mut client)));
    wait(&mut client, runs[2].id);
    let all = records(&mut client);
    assert!(all.is_sorted_by(|a, b| a.seq < b.seq), "{all:?}");
    let last = all.last().unwrap().seq;

    kill(&mut client, runs[0].id);
    wait(&mut client, runs[0].id);
    let Answer::Records { records: changed, is_more } = client.call(&Request::List { after: last }, &[]).unwrap() else { panic!() };
    assert_eq!(changed.iter().map(|record| (record.id, record.is_ended)).collect::<Vec<_>>(), [(runs[0].id, true)]);
    assert!(!is_more && changed[0].seq > last);
    assert_eq!(records(&mut client).len(), 3);
}

#[test]
fn two_keepers_do_not_write_to_one_folder_of_logs() {
    let node = Node::start();
    let logs = node.log_path(SandboxId(uuid::Uuid::nil())).parent().unwrap().to_owned();
    let said = crate::harness::refusal_with_logs(&logs, &[]);
    assert!(said.contains("another keeper"), "{said}");
}

/// A launch whose keeper dies at each step leaves a sandbox that never was, or one that ended: its id is told as one of the two, and nothing runs.
#[cfg(feature = "fail-points")]
#[test]
fn a_keeper_killed_at_any_step_of_a_launch_or_an_end_loses_no_ending_and_leaves_none_open() {
    // How often the keeper comes there before, when the image is unpacked.
    let steps = [
        ("keeper.launch.received", 0),
        ("keeper.launch.log_made", 0),
        ("keeper.launch.slot_taken", 1),
        ("keeper.launch.cloned", 1),
        ("keeper.launch.recorded", 1),
        ("keeper.launch.ready", 1),
        ("keeper.launch.limited", 1),
        ("keeper.launch.ordered", 1),
        ("keeper.launch.started", 1),
        ("keeper.launch.answered", 0),
        ("keeper.end.reported", 1),
        ("keeper.end.pumped", 1),
        ("keeper.end.counted", 1),
        ("keeper.end.logged", 1),
        ("keeper.end.answered", 0),
    ];
    for (step, before) in steps {
        let mut keeper = std::process::Command::new(crate::harness::KEEPER);
        keeper.env("MAYFLY_FAIL_POINTS", format!("{step}={before}*off->1*return"));
        let node = Node::start_as(keeper);
        let run = shell("echo out; exit 5");
        let mut client = node.client();
        run.begin_launch(&mut client);
        let log = node.log_path(run.id);
        let next = Node::start_after(node.died());
        let mut client = next.client();
        if step == "keeper.launch.received" {
            assert!(is_gone(&mut client, run.id) && !log.exists(), "{step}");
            continue;
        }
        let ending = wait(&mut client, run.id);
        if ["keeper.end.logged", "keeper.end.answered"].contains(&step) {
            assert_eq!(ending.cause, Cause::Exited { code: 5 }, "{step}");
            assert_eq!(output(&log).0, "out\n", "{step}");
        } else {
            assert_lost(&ending);
        }
        output(&log);
        forget(&mut client, run.id);
        assert!(!log.exists(), "{step}");
    }
}

#[test]
fn a_launch_whose_client_is_gone_before_it_is_read_does_not_begin() {
    let node = Node::start();
    let mut client = node.client();
    let running = shell("sleep 100");
    assert!(matches!(running.launch(&mut client), Answer::Launched(_)));
    let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(node.pid().cast_signed()), signal).unwrap();
    signal(nix::sys::signal::Signal::SIGSTOP);
    let unread = shell("true");
    assert!(unread.try_launch(&mut client));
    client.send(&Request::Kill { id: running.id, reason: KillReason::StoppedByUser }, &[]).unwrap();
    drop(client);
    signal(nix::sys::signal::Signal::SIGCONT);

    // What was asked behind it is done.
    let mut client = node.client();
    assert_eq!(wait(&mut client, running.id).cause, Cause::Killed(KillReason::StoppedByUser));
    assert_eq!(records(&mut client).len(), 1);
    assert!(!node.log_path(unread.id).exists());
    assert!(matches!(unread.launch(&mut client), Answer::Launched(_)));
    assert_eq!(wait(&mut client, unread.id).cause, Cause::Exited { code: 0 });
}
