//! How sandboxes end, and what is said of it.

use sandbox_core::protocol::{Answer, Cause, FailureKind, KillReason, Request};

use crate::harness::{command, kill, node, output, records, shell, wait};

#[test]
fn hello_world_exits_with_its_output_and_plausible_usage() {
    let done = shell("echo hello; echo problem >&2").run();
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{}", done.stderr);
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("hello\n", "problem\n"));
    let usage = done.ending.usage;
    assert_eq!((usage.stdout_bytes, usage.stderr_bytes, usage.pids_peak), (6, 8, 1));
    assert!(usage.wall_us > 0 && usage.cpu_us > 0 && usage.memory_peak_bytes > 0, "{usage:?}");
    assert!(done.ending.limits_hit.is_empty());
}

#[test]
fn an_exit_code_is_passed_on() {
    assert_eq!(shell("exit 3").run().ending.cause, Cause::Exited { code: 3 });
}

#[test]
fn a_signal_is_named() {
    assert_eq!(shell("kill -SEGV $$").run().ending.cause, Cause::Signaled { signal: 11 });
    assert_eq!(shell("kill -KILL $$").run().ending.cause, Cause::Signaled { signal: 9 });
}

#[test]
fn a_program_that_is_not_there_is_named() {
    for (args, name) in [(["no-such-program"], "no-such-program"), (["/bin/no-such-program"], "/bin/no-such-program")] {
        let done = command(&args).run();
        let Cause::StartFailed { message } = &done.ending.cause else { panic!("{:?}", done.ending.cause) };
        assert!(message.contains(name) && message.contains("no such"), "{message}");
        assert_eq!(done.launched, None);
    }
}

#[test]
fn a_very_long_name_of_a_program_is_cut_and_holds_nothing_up() {
    let done = command(&["\u{1}".repeat(20_000).as_str()]).run();
    let Cause::StartFailed { message } = &done.ending.cause else { panic!("{:?}", done.ending.cause) };
    assert!(message.len() < 2000, "{}", message.len());
}

#[test]
fn a_program_that_may_not_be_executed_is_named() {
    let done = command(&["/bin/not-executable"]).run();
    let Cause::StartFailed { message } = &done.ending.cause else { panic!("{:?}", done.ending.cause) };
    assert!(message.contains("/bin/not-executable") && message.contains("Permission denied"), "{message}");
}

#[test]
fn a_missing_working_folder_is_made_for_the_user() {
    let run = shell("pwd; touch mine && stat -c %u mine").with("/process/cwd", "/work/deep").with("/process/user/uid", 1000);
    assert_eq!(run.run().stdout, "/work/deep\n1000\n");
}

#[test]
fn a_user_by_name_comes_from_the_image() {
    let done = shell("id -u; id -g; id -G; echo $HOME").with("/process/user/username", "ann").run();
    assert_eq!(done.stdout, "1000\n1000\n1000 29\n/home\n");
    let done = shell("id").with("/process/user/username", "nobody-here").run();
    assert!(matches!(&done.ending.cause, Cause::StartFailed { message } if message.contains("nobody-here")), "{:?}", done.ending.cause);
}

#[test]
fn stdin_and_files_arrive() {
    let mut run = shell("cat; cat a/b.txt; stat -c '%a %u' a/b.txt").with("/process/cwd", "/work").with("/process/user/uid", 1000);
    run.stdin = Some(b"from stdin\n".to_vec());
    sandbox_core::files::write(&mut run.files, "a/b.txt", 0o640, b"from a file\n").unwrap();
    let done = run.run();
    assert_eq!(done.stdout, "from stdin\nfrom a file\n640 1000\n", "{}", done.stderr);
}

#[test]
fn a_file_that_does_not_fit_the_disk_is_a_failed_start_that_names_it() {
    let mut run = shell("true");
    run.supervision.disk_bytes = 64 * 1024;
    sandbox_core::files::write(&mut run.files, "big.bin", 0o644, &vec![7; 256 * 1024]).unwrap();
    let done = run.run();
    assert!(matches!(&done.ending.cause, Cause::StartFailed { message } if message.contains("big.bin")), "{:?}", done.ending.cause);
}

#[test]
fn what_outlives_the_payload_is_killed_and_does_not_delay_the_end() {
    let done = shell("(trap '' TERM HUP; exec setsid sleep 100) >/dev/null 2>&1 & sleep 0.1; echo gone").run();
    assert_eq!((done.ending.cause, done.stdout.as_str()), (Cause::Exited { code: 0 }, "gone\n"));
    assert!(done.ending.usage.wall_us < 2_000_000);
}

#[test]
fn a_kill_says_who_wanted_it_and_ends_everything() {
    let mut client = node().client();
    let run = shell("sleep 100 & sleep 100");
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    kill(&mut client, run.id);
    assert_eq!(wait(&mut client, run.id).cause, Cause::Killed(KillReason::StoppedByUser));
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
}

#[test]
fn an_ending_is_told_to_all_who_ask_until_it_is_forgotten() {
    let mut first = node().client();
    let run = shell("exit 7");
    run.launch(&mut first);
    let ending = wait(&mut first, run.id);
    drop(first);
    let mut second = node().client();
    assert_eq!(wait(&mut second, run.id), ending);
    let records = records(&mut second);
    assert!(records.iter().any(|record| record.id == run.id && record.is_ended));
    assert_eq!(second.call(&Request::Forget { id: run.id }, &[]).unwrap(), Answer::Done);
    let Answer::Failed(failure) = second.call(&Request::Wait { id: run.id }, &[]).unwrap() else { panic!() };
    assert_eq!(failure.kind, FailureKind::Gone);
    assert!(!node().log_path(run.id).exists());
}

#[test]
fn a_log_outlives_its_record_until_it_is_forgotten_too() {
    let mut client = node().client();
    let run = shell("echo kept");
    run.launch(&mut client);
    wait(&mut client, run.id);
    assert_eq!(client.call(&Request::ForgetRecord { id: run.id }, &[]).unwrap(), Answer::Done);
    let records = records(&mut client);
    assert!(records.iter().all(|record| record.id != run.id));
    assert_eq!(output(&node().log_path(run.id)).0, "kept\n");
    assert_eq!(client.call(&Request::Forget { id: run.id }, &[]).unwrap(), Answer::Done);
    assert!(!node().log_path(run.id).exists());
}

#[test]
fn a_running_sandbox_cannot_be_forgotten_nor_its_id_used_twice() {
    let mut client = node().client();
    let run = shell("sleep 100");
    run.launch(&mut client);
    let Answer::Failed(busy) = client.call(&Request::Forget { id: run.id }, &[]).unwrap() else { panic!() };
    assert_eq!(busy.kind, FailureKind::Busy);
    let Answer::Failed(twice) = run.launch(&mut client) else { panic!() };
    assert_eq!(twice.kind, FailureKind::Refused);
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
}

#[test]
fn an_image_that_is_not_here_is_gone() {
    let run = shell("true").with("/root/path", "0".repeat(64));
    let Answer::Failed(failure) = run.launch(&mut node().client()) else { panic!() };
    assert_eq!(failure.kind, FailureKind::Gone);
    assert!(!node().log_path(run.id).exists());
}

#[test]
fn a_spec_beyond_the_policy_is_refused_whoever_sends_it() {
    let run = shell("true").with("/process/oomScoreAdj", -1000);
    let Answer::Failed(failure) = run.launch(&mut node().client()) else { panic!() };
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Refused, "process.oomScoreAdj may not be set"));
}
