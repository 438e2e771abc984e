//! The command line for people, as they use it: the real binary, a real service, and for a terminal a real one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "cli/copy.rs"]
mod copy;
#[path = "cli/pull.rs"]
mod pull;
#[path = "cli/relay.rs"]
mod relay;
#[path = "cli/terminal.rs"]
mod terminal;
#[path = "cli/typed.rs"]
mod typed;

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use mayfly_tests::{
    Client, Service,
    service::{self, mayfly, shared},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use relay::Relay;
use serde_json::{Value, json};
use typed::{Begun, said};

/// The command line as this client's tenant uses it.
fn cli(client: &Client, words: &[&str]) -> Command {
    let mut command = mayfly();
    command.env("HOME", "/nonexistent").env("MAYFLY_URL", &client.place().url).env("MAYFLY_TOKEN", client.token().unwrap()).args(words);
    command
}

async fn sandboxes(client: &Client) -> Vec<Value> {
    client.get("/v1/sandboxes").await.expect(200)["items"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_program_runs_as_if_it_ran_here() {
    let client = shared().client();

    let said = said(&mut cli(&client, &["run", "busybox", "--", "sh", "-c", "echo out; echo err >&2; printf '\\377'; exit 7"]), b"");

    assert_eq!((said.code, said.stdout.as_slice(), said.stderr.as_str()), (Some(7), &b"out\n\xff"[..], "err\n"));
    assert!(sandboxes(&client).await.is_empty(), "its sandbox is left");
}

#[tokio::test]
async fn output_comes_while_the_program_runs_and_input_goes_in() {
    let client = shared().client();
    let script = "echo ready; while read line; do echo \"<$line>\"; done; echo over";
    let mut begun = Begun::new(&mut cli(&client, &["run", "-i", "busybox", "sh", "-c", script]));

    begun.until("ready\n");
    begun.give(b"one\n");
    begun.until("<one>\n");
    begun.give(b"two\n");
    begun.until("<two>\n");
    let said = begun.end_input().finish();

    assert_eq!((said.code, said.text()), (Some(0), "ready\n<one>\n<two>\nover\n"));
}

#[tokio::test]
async fn large_input_comes_out_as_it_went_in() {
    let client = shared().client();
    let input: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();

    let said = said(&mut cli(&client, &["run", "-i", "--output", "64m", "busybox", "cat"]), &input);

    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
    assert!(said.stdout == input, "{} of {} bytes", said.stdout.len(), input.len());
}

#[tokio::test]
async fn how_a_program_ended_is_an_exit_code() {
    let client = shared().client();
    let code = |words: &[&str]| {
        let said = said(&mut cli(&client, words), b"");
        (said.code, said.stderr)
    };

    assert_eq!(code(&["run", "busybox", "sh", "-c", "kill -SEGV $$"]).0, Some(139));
    let (late, told) = code(&["run", "--wall", "200ms", "busybox", "sleep", "1000"]);
    assert!(late == Some(124) && told.contains("wall_timeout"), "{late:?} {told}");
    let (hungry, told) = code(&["run", "-m", "16m", "busybox", "hog", "200"]);
    assert!(hungry == Some(137) && told.contains("oom_killed"), "{hungry:?} {told}");
    let (missing, told) = code(&["run", "busybox", "no-such-program"]);
    assert!(missing == Some(127) && told.contains("no-such-program"), "{missing:?} {told}");
    assert_eq!(code(&["run", "busybox", "/no/such/program"]).0, Some(127));
    assert_eq!(code(&["run", "busybox", "/etc/passwd"]).0, Some(126));
    assert!(sandboxes(&client).await.is_empty());
}

#[tokio::test]
async fn a_fault_of_ours_is_no_exit_code_of_the_programs_and_says_what_to_do() {
    let client = shared().client();
    let failed = |command: &mut Command, code: i32, words: &str| {
        let said = said(command, b"");
        assert!(said.code == Some(code) && said.stderr.contains(words), "{command:?}: {:?} {}", said.code, said.stderr);
    };

    failed(&mut cli(&client, &["run", "no-such-image"]), 125, "mayfly images");
    failed(&mut cli(&client, &["run", "--pids", "0", "busybox"]), 125, "limits.pids");
    failed(&mut cli(&client, &["run", "--no-such-flag", "busybox"]), 125, "--no-such-flag");
    failed(&mut cli(&client, &["run", "-it", "busybox"]), 125, "no terminal");
    failed(&mut cli(&client, &["exec", "no-such-sandbox", "true"]), 125, "mayfly ps");
    failed(cli(&client, &["run", "busybox"]).env("MAYFLY_TOKEN", "nonsense"), 125, "mayfly token");
    failed(cli(&client, &["run", "busybox"]).env_remove("MAYFLY_TOKEN"), 125, "--token");
    failed(cli(&client, &["ps"]).env("MAYFLY_URL", "http://127.0.0.1:1"), 1, "mayfly serve");
    failed(&mut cli(&client, &["ps", "--no-such-flag"]), 2, "--no-such-flag");
    failed(&mut cli(&client, &["logs", "no-such-sandbox"]), 1, "mayfly ps");
}

#[tokio::test]
async fn a_signal_is_passed_on_and_the_program_decides() {
    let client = shared().client();
    let script = "trap 'echo asked; exit 5' TERM; echo on; while :; do sleep 0.05; done";
    let mut begun = Begun::new(&mut cli(&client, &["run", "busybox", "sh", "-c", script]));
    begun.until("on\n");

    kill(begun.pid(), Signal::SIGTERM).unwrap();
    let said = begun.finish();

    assert_eq!((said.code, said.text()), (Some(5), "on\nasked\n"));
}

#[tokio::test]
async fn a_signal_overtakes_input_that_nobody_reads() {
    let client = shared().client();
    let script = "trap 'exit 5' TERM; echo on; while :; do sleep 0.05; done";
    let mut begun = Begun::new(&mut cli(&client, &["run", "-i", "busybox", "sh", "-c", script]));
    begun.give_meanwhile(vec![b'a'; 4 << 20]);
    begun.until("on\n");

    kill(begun.pid(), Signal::SIGTERM).unwrap();
    let said = begun.finish();

    assert_eq!(said.code, Some(5), "{}", said.stderr);
}

#[tokio::test]
async fn whoever_insists_ends_a_program_that_does_not_listen() {
    let client = shared().client();
    let script = "trap 'echo heard' INT; echo on; while :; do sleep 0.05; done";
    let mut begun = Begun::new(&mut cli(&client, &["run", "busybox", "sh", "-c", script]));
    begun.until("on\n");

    for _ in 0..2 {
        kill(begun.pid(), Signal::SIGINT).unwrap();
        begun.until("heard\n");
    }
    kill(begun.pid(), Signal::SIGINT).unwrap();
    let said = begun.finish();

    assert_eq!(said.code, Some(130), "{}", said.stderr);
    assert!(sandboxes(&client).await.is_empty());
}

#[tokio::test]
async fn who_has_nobody_to_write_to_ends() {
    let client = shared().client();
    let mut begun = Begun::new(&mut cli(&client, &["run", "busybox", "sh", "-c", "while :; do echo y; sleep 0.02; done"]));
    begun.until("y\n");

    let said = begun.stop_reading().finish();

    assert_eq!((said.code, said.stderr.as_str()), (Some(141), ""));
    assert!(sandboxes(&client).await.is_empty());
}

#[tokio::test]
async fn output_that_cannot_be_written_is_a_fault_of_ours() {
    let client = shared().client();
    let mut command = cli(&client, &["run", "busybox", "echo", "hello"]);
    let full = fs::File::options().write(true).open("/dev/full").unwrap();

    let output = command.stdin(std::process::Stdio::null()).stdout(full).output().unwrap();

    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(125) && told.contains("No space left"), "{:?} {told}", output.status);
    assert!(sandboxes(&client).await.is_empty());
}

#[tokio::test]
async fn a_connection_that_breaks_costs_neither_output_nor_input() {
    let client = shared().client();
    let relay = Relay::to(&client.place().url);
    let script = "while read line; do echo \"<$line>\"; done; echo over";
    let mut begun = Begun::new(cli(&client, &["run", "-i", "busybox", "sh", "-c", script]).env("MAYFLY_URL", relay.url()));

    for line in ["one", "two", "three"] {
        begun.give(format!("{line}\n").as_bytes());
        begun.until(&format!("<{line}>\n"));
        relay.cut();
    }
    let said = begun.end_input().finish();

    assert_eq!((said.code, said.text()), (Some(0), "<one>\n<two>\n<three>\nover\n"), "{}", said.stderr);
    assert!(said.stderr.contains("trying again"), "{}", said.stderr);
}

#[tokio::test]
async fn what_was_made_by_a_request_whose_answer_is_lost_is_made_once_and_known() {
    let client = shared().client();
    let relay = Relay::to(&client.place().url);
    let through = |words: &[&str]| said(cli(&client, words).env("MAYFLY_URL", relay.url()), b"");
    relay.lose_an_answer();
    let made = through(&["run", "-d", "--name", "once", "busybox", "sleep", "1000"]);
    relay.lose_an_answer();
    let entered = through(&["exec", "once", "sh", "-c", "echo entered; echo x >> /tmp/times; wc -l < /tmp/times"]);

    let all = sandboxes(&client).await;
    assert_eq!((all.len(), all[0]["id"].as_str()), (1, Some(made.text().trim_end())), "{}", made.stderr);
    assert_eq!((entered.code, entered.text()), (Some(0), "entered\n1\n"), "{}", entered.stderr);
    assert_eq!(said(&mut cli(&client, &["rm", "--force", "once"]), b"").code, Some(0));
}

#[tokio::test]
async fn a_service_that_is_killed_and_started_again_is_found_again() {
    let mut service = Service::start();
    let client = service.client();
    let relay = Relay::to(&client.place().url);
    let script = "while read line; do echo \"<$line>\"; done; echo over; exit 6";
    let words = ["run", "-i", "--json", "busybox", "sh", "-c", script];
    let mut begun = Begun::new(cli(&client, &words).env("MAYFLY_URL", relay.url()));
    begun.give(b"one\n");
    // What is on its way when a service dies may have arrived or not; of this it is known.
    begun.until("{\"written_bytes\":4}");

    service.kill();
    service.start_again().unwrap();
    relay.lead_to(&service.place().url);
    begun.give(b"two\n");
    begun.until("<two>");
    let said = begun.end_input().finish();

    let frames: Vec<Value> = said.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let output: String = frames.iter().filter_map(|frame| frame["data"].as_str()).collect();
    assert_eq!((said.code, output.as_str()), (Some(6), "<one>\n<two>\nover\n"), "{}", said.stderr);
    let after = Client::with_token(service.place(), client.token().map(ToOwned::to_owned));
    assert!(sandboxes(&after).await.is_empty());
}

#[tokio::test]
async fn flags_and_files_reach_the_sandbox() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let tool = folder.path().join("tool");
    fs::write(&tool, "#!/bin/sh\necho \"$GREETING from $(pwd)\"\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let file = format!("{}:/opt/tool", tool.display());

    let greeted = said(&mut cli(&client, &["run", "-e", "GREETING=hi", "-w", "/tmp", "--file", &file, "busybox", "/opt/tool"]), b"");
    let made = said(
        &mut cli(
            &client,
            &[
                "run", "-d", "--json", "--name", "shown", "-l", "a=b", "-m", "64m", "--cpus", "0.5", "--pids", "9", "busybox", "sleep",
                "1000",
            ],
        ),
        b"",
    );

    assert_eq!((greeted.code, greeted.text()), (Some(0), "hi from /tmp\n"), "{}", greeted.stderr);
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!((&made["name"], &made["labels"]), (&json!("shown"), &json!({ "a": "b" })));
    let limits = &made["limits"];
    assert_eq!((&limits["memory_bytes"], &limits["cpu_millis"], &limits["pids"]), (&json!(64 << 20), &json!(500), &json!(9)));
    assert_eq!(said(&mut cli(&client, &["rm", "--force", "shown"]), b"").code, Some(0));
}

#[tokio::test]
async fn a_sandbox_is_left_alone_listed_entered_stopped_and_removed() {
    let client = shared().client();
    let run = |words: &[&str]| said(&mut cli(&client, words), b"");
    let script = "trap 'echo bye; exit 3' TERM; echo hello; while :; do sleep 0.05; done";

    let made = run(&["run", "-d", "--name", "web", "busybox", "sh", "-c", script]);
    let id = made.text().trim_end().to_owned();
    let listed = run(&["ps"]);
    let entered = run(&["exec", "web", "sh", "-c", "echo inside; exit 4"]);
    let refused = run(&["rm", "web"]);
    let mut followed = Begun::new(&mut cli(&client, &["logs", "-f", "web"]));
    followed.until("hello\n");
    let stopped = run(&["stop", "--time", "20s", "web"]);
    let followed = followed.finish();
    let (none, all) = (run(&["ps", "-q"]), run(&["ps", "-a"]));
    let as_json: Value = serde_json::from_slice(&run(&["ps", "-a", "--json"]).stdout).unwrap();
    let removed = run(&["rm", "web", "no-such"]);

    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert!(listed.text().starts_with("ID ") && listed.text().contains(&id) && listed.text().contains("running"), "{}", listed.text());
    assert_eq!((entered.code, entered.text()), (Some(4), "inside\n"));
    assert!(refused.code == Some(1) && refused.stderr.contains("mayfly stop"), "{}", refused.stderr);
    assert_eq!((stopped.code, stopped.text()), (Some(0), "web\n"), "{}", stopped.stderr);
    assert_eq!((followed.code, followed.text()), (Some(0), "hello\nbye\n"));
    assert_eq!(none.text(), "");
    assert!(all.text().contains("exited (3)"), "{}", all.text());
    assert_eq!((&as_json["id"], &as_json["outcome"]["exit_code"]), (&json!(id), &json!(3)));
    assert!(removed.code == Some(1) && removed.text() == "web\n" && removed.stderr.contains("no-such"), "{}", removed.stderr);
    assert!(sandboxes(&client).await.is_empty());
}

#[tokio::test]
async fn a_log_is_shown_from_where_it_is_wanted_and_in_the_form_that_is_wanted() {
    let client = shared().client();
    let run = |words: &[&str]| said(&mut cli(&client, words), b"");
    let id =
        run(&["run", "-d", "busybox", "sh", "-c", "echo one; sleep 0.3; echo two >&2; sleep 0.3; echo three"]).text().trim_end().to_owned();
    client.until(&format!("/v1/sandboxes/{id}"), |sandbox| !sandbox["outcome"].is_null()).await;

    let all = run(&["logs", &id]);
    let last = run(&["logs", "--tail", "1", &id]);
    let stamped = run(&["logs", "-t", "--stream", "stdout", &id]);
    let old = run(&["logs", "--since", "2100-01-01T00:00:00Z", &id]);
    let frames = run(&["logs", "--json", &id]);

    assert_eq!((all.text(), all.stderr.as_str()), ("one\nthree\n", "two\n"));
    assert_eq!((last.text(), last.stderr.as_str()), ("three\n", ""));
    assert!(stamped.text().lines().all(|line| line.starts_with("20") && line.contains("Z ")), "{}", stamped.text());
    assert_eq!(stamped.text().lines().count(), 2);
    assert_eq!(old.text(), "");
    let frames: Vec<Value> = frames.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(frames.last().unwrap()["end"]["exit_code"], 0, "{frames:#?}");
    assert_eq!(run(&["rm", &id]).code, Some(0));
}

#[tokio::test]
async fn what_is_kept_is_there_after_the_end() {
    let client = shared().client();
    let run = |words: &[&str]| said(&mut cli(&client, words), b"");

    let ended = run(&["run", "--keep-files", "--name", "kept", "busybox", "sh", "-c", "echo made > /work/file; exit 2"]);
    let copied = run(&["cp", "kept:/work/file", "-"]);

    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(copied.code == Some(0) && copied.stdout.windows(5).any(|part| part == b"made\n"), "{}", copied.stderr);
    assert_eq!(run(&["rm", "kept"]).code, Some(0));
}

#[tokio::test]
async fn images_are_listed() {
    let client = shared().client();

    let table = said(&mut cli(&client, &["images"]), b"");
    let names = said(&mut cli(&client, &["images", "-q"]), b"");
    let as_json = said(&mut cli(&client, &["images", "--json"]), b"");

    assert!(
        table.text().lines().any(|line| line.starts_with("busybox ") && line.contains("sha256:") && line.contains("iB")),
        "{}",
        table.text()
    );
    assert!(names.text().lines().any(|line| line == "busybox"), "{}", names.text());
    let image =
        as_json.text().lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).find(|image| image["reference"] == "busybox");
    assert!(image.unwrap()["config"].is_object());
}

#[tokio::test]
async fn the_place_and_the_token_may_stand_in_a_file() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let home = folder.path().join("home");
    fs::create_dir_all(home.join(".config/mayfly")).unwrap();
    let file = home.join(".config/mayfly/client.toml");
    fs::write(&file, format!("url = {:?}\ntoken = {:?}\n", client.place().url, client.token().unwrap())).unwrap();
    let run = || said(mayfly().env("HOME", &home).args(["run", "busybox", "echo", "hello"]), b"");

    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let open = run();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let shut = run();

    assert!(open.code == Some(125) && open.stderr.contains("chmod 600"), "{}", open.stderr);
    assert_eq!((shut.code, shut.text()), (Some(0), "hello\n"), "{}", shut.stderr);
}

#[test]
fn a_shell_completes_commands_and_flags() {
    let complete = |word: &str, before: &str, number: usize| {
        let line = format!(
            "source /dev/stdin; COMP_WORDS=(mayfly {before} {word}); COMP_CWORD={number}; _mayfly mayfly '{word}' '{before}'; echo \"${{COMPREPLY[@]}}\""
        );
        let script = said(mayfly().args(["completions", "bash"]), b"");
        said(Command::new("bash").args(["--norc", "-c", &line]), &script.stdout).text().to_owned()
    };

    let mut commands: Vec<_> = complete("imag", "", 1).split_whitespace().map(ToOwned::to_owned).collect();
    commands.sort();
    assert_eq!(commands, ["image", "images"]);
    assert!(complete("--mem", "run", 2).contains("--memory"));
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(said(mayfly().args(["completions", shell]), b"").text().contains("mayfly"), "{shell}");
    }
}

#[test]
fn help_tells_the_exit_codes_of_what_runs_programs() {
    for command in ["run", "exec"] {
        let help = said(mayfly().args([command, "--help"]), b"");
        assert_eq!(help.code, Some(0));
        assert!(["124", "125", "126", "127", "137"].iter().all(|code| help.text().contains(code)), "{}", help.text());
    }
}

/// How long anything here may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(120);

fn pid_of(child: &std::process::Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}
