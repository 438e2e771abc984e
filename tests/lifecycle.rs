//! What happens to a run and to a sandbox from the request to its end.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use mayfly_tests::{
    Client,
    outcome::{assert_exit, assert_limits_hit, assert_reason, assert_within, stdout, usage},
    service::shared,
};
use serde_json::{Value, json};

#[tokio::test]
async fn a_python_program_prints_hello() {
    let service = shared();

    let run = service.client().run(&json!({ "image": "python", "command": ["python3", "-c", "print('hello')"] })).await;

    assert_exit(&run, 0);
    assert_eq!(run["state"], "exited");
    assert_eq!(stdout(&run), "hello\n");
    assert_eq!(run["stderr"], "");
    assert_limits_hit(&run, &[]);
    assert_within(&run, "wall_ms", 3..=5_000);
    assert_within(&run, "cpu_ms", 3..=2_000);
    assert_within(&run, "memory_peak_bytes", (1 << 20)..=(64 << 20));
    assert_within(&run, "pids_peak", 1..=1);
    assert_within(&run, "stdout_bytes", 6..=6);
    assert_within(&run, "stderr_bytes", 0..=0);
}

#[tokio::test]
async fn files_stdin_environment_and_folder_reach_the_program() {
    let service = shared();
    let request = json!({
        "image": "python", "command": ["python3", "main.py"], "workdir": "/work/deep/er",
        "files": [
            { "path": "main.py", "content": "import os, sys; print(input(), os.environ['COLOUR'], os.getcwd(), open('data/raw', 'rb').read())" },
            { "path": "data/raw", "content": BASE64_STANDARD.encode([0, 255, 10]), "encoding": "base64" },
        ],
        "stdin": "from stdin", "env": { "COLOUR": "blue" },
    });

    let run = service.client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "from stdin blue /work/deep/er b'\\x00\\xff\\n'\n");
}

#[tokio::test]
async fn stdin_of_a_run_without_stdin_is_at_its_end() {
    let run = shared().client().shell("cat; echo after").await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "after\n");
}

#[tokio::test]
async fn an_exit_code_comes_back_as_it_was() {
    let run = shared().client().shell("echo said; echo failed >&2; exit 3").await;

    assert_exit(&run, 3);
    assert_eq!(run["state"], "exited");
    assert_eq!((stdout(&run), &run["stderr"]), ("said\n", &json!("failed\n")));
    assert_within(&run, "stderr_bytes", 7..=7);
    assert_eq!(run["outcome"]["signal"], Value::Null);
}

#[tokio::test]
async fn the_highest_exit_code_comes_back_as_it_was() {
    let run = shared().client().shell("exit 255").await;

    assert_exit(&run, 255);
}

#[tokio::test]
async fn a_crash_is_a_signal() {
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["crash"] })).await;

    assert_reason(&run, "signaled");
    assert_eq!(run["outcome"]["signal"], "SIGSEGV");
    assert_eq!(run["outcome"]["exit_code"], Value::Null);
    assert_eq!(run["state"], "exited");
}

#[tokio::test]
async fn a_program_that_kills_itself_was_not_killed_by_us() {
    let run = shared().client().shell("kill -9 $$").await;

    assert_reason(&run, "signaled");
    assert_eq!(run["outcome"]["signal"], "SIGKILL");
    assert_limits_hit(&run, &[]);
}

#[tokio::test]
async fn a_command_that_does_not_exist_is_named() {
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["no-such-program", "x"] })).await;

    assert_reason(&run, "start_failed");
    assert_eq!(run["state"], "failed");
    let message = run["outcome"]["message"].as_str().unwrap();
    assert!(message.contains("no-such-program"), "{message}");
}

#[tokio::test]
async fn a_file_that_is_no_program_is_named() {
    let request = json!({ "image": "busybox", "command": ["/work/text"], "files": [{ "path": "/work/text", "content": "not a program" }] });

    let run = shared().client().run(&request).await;

    assert_reason(&run, "start_failed");
    assert!(run["outcome"]["message"].as_str().unwrap().contains("/work/text"), "{run:#}");
}

#[tokio::test]
async fn a_script_that_came_as_an_executable_file_runs() {
    let request = json!({
        "image": "busybox", "command": ["./hello"], "workdir": "/work",
        "files": [{ "path": "hello", "content": "#!/bin/sh\necho from a script\n", "mode": "0755" }],
    });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "from a script\n");
}

#[tokio::test]
async fn without_a_command_the_images_own_runs() {
    let run = shared().client().run(&json!({ "image": "python", "stdin": "print(6 * 7)" })).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "42\n");
}

#[tokio::test]
async fn the_path_of_a_program_is_searched_as_the_image_says() {
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["sh", "-c", "echo $PATH $HOME $PWD"] })).await;

    assert_eq!(stdout(&run), "/bin /root /work\n");
}

#[tokio::test]
async fn output_that_is_not_text_comes_as_base64() {
    let run = shared().client().shell(r"printf '\377\000\n'").await;

    assert_exit(&run, 0);
    assert_eq!(run["stdout_encoding"], "base64");
    assert_eq!(BASE64_STANDARD.decode(run["stdout"].as_str().unwrap()).unwrap(), [255, 0, 10]);
}

#[tokio::test]
async fn what_the_program_leaves_running_is_ended_with_it() {
    let service = shared();
    let started = tokio::time::Instant::now();

    let run = service.client().shell("sleep 1000 & sleep 1000 & echo done").await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "done\n");
    assert!(started.elapsed() < Duration::from_secs(60), "took {:?}", started.elapsed());
}

#[tokio::test]
async fn a_run_that_outlasts_the_wait_is_found_later() {
    let client = shared().client();

    let answer =
        client.post("/v1/runs", &json!({ "image": "busybox", "command": ["sh", "-c", "sleep 0.5; echo late"], "wait_ms": 50 })).await;
    let path = answer.header("location").to_owned();
    let early = answer.expect(202);
    let run = client.until(&path, |run| !run["outcome"].is_null()).await;

    assert_eq!(path, format!("/v1/runs/{}", early["id"].as_str().unwrap()));
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "late\n");
    assert_within(&run, "wall_ms", 500..=10_000);
}

#[tokio::test]
async fn a_finished_run_reads_back_as_it_was_answered() {
    let client = shared().client();
    let answered = client.shell("echo once; exit 4").await;

    let read = client.get(&format!("/v1/runs/{}", answered["id"].as_str().unwrap())).await.expect(200);

    assert_eq!(read, answered);
}

#[tokio::test]
async fn a_run_goes_on_when_its_client_goes_away() {
    let service = shared();
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let (client, admin) = (Client::of(&service.place, &tenant), Client::admin(&service.place));
    // Only an operator is told of a run whose id nobody was told.
    let all = format!("/v1/admin/sandboxes?kind=run&tenant={tenant}");
    let request = json!({ "image": "busybox", "command": ["sh", "-c", "sleep 2; exit 6"] });
    let asking = tokio::spawn(client.request(reqwest::Method::POST, "/v1/runs").json(&request).send());
    admin.until(&all, |page| page["items"][0].is_object()).await;

    asking.abort();
    assert!(asking.await.is_err(), "it was answered before it went");
    let ended = admin.until(&all, |page| page["items"][0]["state"] == "exited").await;

    assert_exit(&ended["items"][0], 6);
}

#[tokio::test]
async fn thirty_two_runs_at_once_keep_their_output_apart() {
    let client = shared().client();
    let runs = (0..32).map(|i| {
        let client = client.clone();
        async move { (i, client.shell(&format!("echo run {i}; exit {i}")).await) }
    });

    let answers = futures_util::future::join_all(runs).await;

    for (i, run) in answers {
        assert_exit(&run, i);
        assert_eq!(stdout(&run), format!("run {i}\n"));
    }
}

#[tokio::test]
async fn nothing_that_a_run_writes_is_there_in_the_next() {
    let client = shared().client();
    let script = "ls /work /tmp; touch /work/mine /tmp/mine /etc/mine; cat /etc/mine && echo written";

    let first = client.shell(script).await;
    let second = client.shell(script).await;

    assert_exit(&first, 0);
    assert!(stdout(&first).contains("written"));
    assert_eq!(stdout(&second), stdout(&first));
}

#[tokio::test]
async fn a_sandbox_lives_until_it_is_deleted() {
    let client = shared().client();

    let made = client
        .post(
            "/v1/sandboxes",
            &json!({ "image": "busybox", "command": ["sh", "-c", "echo up; exec sleep 1000"], "name": "longer", "labels": { "a": "b" } }),
        )
        .await;
    let made = made.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    let running = client.until(&path, |sandbox| sandbox["state"] == "running").await;
    let listed = client.get("/v1/sandboxes").await.expect(200);
    let deleted = client.delete(&path).await;
    let after = client.get(&path).await;

    assert_eq!((&running["name"], &running["labels"]), (&json!("longer"), &json!({ "a": "b" })));
    assert_eq!(listed["items"][0]["id"], made["id"], "{listed:#}");
    assert_eq!(deleted.status, 204);
    assert_eq!(after.problem(404, "not_found")["retryable"], false);
}

#[tokio::test]
async fn a_deleted_sandboxs_log_ends_with_who_stopped_it() {
    let client = shared().client();
    let made =
        client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sh", "-c", "echo up; exec sleep 1000"] })).await.expect(201);
    let id = made["id"].as_str().unwrap();
    let mut log = client.follow(id, "from=0").await;
    let first = log.next().await.expect("the sandbox says up");

    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    let end = log.collect().await.end.expect("the log ends");

    assert_eq!(first["data"], "up\n");
    assert_eq!(end["reason"], "stopped_by_user", "{end:#}");
}

#[tokio::test]
async fn lists_filter_by_label_and_go_on_at_a_cursor() {
    let client = shared().client();
    for i in 0..3 {
        let request = json!({ "image": "busybox", "command": ["sleep", "1000"], "labels": { "n": i.to_string(), "set": "three" } });
        client.post("/v1/sandboxes", &request).await.expect(201);
    }

    let one = client.get("/v1/sandboxes?label=n%3D1").await.expect(200);
    let first_two = client.get("/v1/sandboxes?limit=2&label=set%3Dthree").await.expect(200);
    let cursor = first_two["next_cursor"].as_str().expect("there is more");
    let last = client.get(&format!("/v1/sandboxes?limit=2&label=set%3Dthree&cursor={cursor}")).await.expect(200);

    assert_eq!(one["items"].as_array().unwrap().len(), 1);
    assert_eq!(one["items"][0]["labels"]["n"], "1");
    assert_eq!(first_two["items"].as_array().unwrap().len(), 2);
    assert_eq!(last["items"].as_array().unwrap().len(), 1);
    assert_eq!(last["next_cursor"], Value::Null);
    for sandbox in first_two["items"].as_array().unwrap().iter().chain(last["items"].as_array().unwrap()) {
        assert_eq!(client.delete(&format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())).await.status, 204);
    }
}

#[tokio::test]
async fn another_tenants_run_is_not_found() {
    let service = shared();
    let run = service.client().shell("true").await;

    let answer = service.client().get(&format!("/v1/runs/{}", run["id"].as_str().unwrap())).await;

    answer.problem(404, "not_found");
}

#[tokio::test]
async fn the_figures_of_a_known_program_are_true() {
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["burn", "200"] })).await;

    assert_exit(&run, 0);
    assert_within(&run, "cpu_ms", 195..=400);
    assert_within(&run, "wall_ms", 195..=10_000);
    assert_within(&run, "pids_peak", 1..=1);
    assert!(usage(&run, "memory_peak_bytes") < 16 << 20, "{run:#}");
    let phases = &run["outcome"]["phases_ms"];
    assert!(phases["total"].as_f64().unwrap() >= f64::from(u32::try_from(usage(&run, "wall_ms")).unwrap()), "{phases}");
}

/// A sandbox of a shell script, and where it is found.
async fn sandbox(client: &Client, script: &str, more: &Value) -> String {
    let mut request = json!({ "image": "busybox", "command": ["sh", "-c", script] });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    format!("/v1/sandboxes/{}", made["id"].as_str().unwrap())
}

/// What it has written to stdout until now.
async fn written(client: &Client, path: &str) -> String {
    let id = path.rsplit('/').next().unwrap();
    let frames = client.follow(id, "from=0&follow=false").await.collect().await;
    frames.stdout_text()
}

async fn until_written(client: &Client, path: &str, what: &str) -> String {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let text = written(client, path).await;
        if text.contains(what) {
            return text;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what:?} was never written: {text:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn wait(client: &Client, path: &str, query: &str) -> Value {
    client.get(&format!("{path}/wait?{query}")).await.expect(200)
}

#[tokio::test]
async fn a_paused_sandbox_stands_still_until_it_is_resumed() {
    let client = shared().client();
    let path =
        sandbox(&client, "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done", &json!({ "limits": { "output_bytes": 1 << 20 } })).await;
    until_written(&client, &path, "3\n").await;

    let paused = client.post(&format!("{path}/pause"), &json!({})).await.expect(200);
    // What was written before may still be on its way.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    let mut still = written(&client, &path).await;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = written(&client, &path).await;
        if now == still {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "it writes on and on");
        still = now;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let later = written(&client, &path).await;
    let again = client.post(&format!("{path}/pause"), &json!({})).await.expect(200);
    let listed = client.get("/v1/sandboxes?state=paused").await.expect(200);
    let resumed = client.post(&format!("{path}/resume"), &json!({})).await.expect(200);
    let next: u32 = still.lines().last().unwrap().parse::<u32>().unwrap() + 3;
    until_written(&client, &path, &format!("{next}\n")).await;

    assert_eq!((&paused["state"], &again["state"], &resumed["state"]), (&json!("paused"), &json!("paused"), &json!("running")));
    assert_eq!(still, later, "something was written in the meantime");
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    assert_eq!(client.delete(&path).await.status, 204);
}

#[tokio::test]
async fn a_paused_sandbox_is_ended_like_any_other() {
    let client = shared().client();
    let (deleted, stopped, killed) = (
        sandbox(&client, "sleep 1000", &json!({})).await,
        sandbox(&client, "sleep 1000", &json!({})).await,
        sandbox(&client, "sleep 1000", &json!({})).await,
    );
    for path in [&deleted, &stopped, &killed] {
        client.post(&format!("{path}/pause"), &json!({})).await.expect(200);
    }

    let gone = client.delete(&deleted).await.status;
    let stop = client.post(&format!("{stopped}/stop"), &json!({})).await.expect(200);
    let kill = client.post(&format!("{killed}/kill"), &json!({})).await.expect(200);

    assert_eq!(gone, 204);
    for ended in [&stop, &kill] {
        assert_reason(ended, "stopped_by_user");
        assert_eq!(ended["state"], "exited");
    }
}

#[tokio::test]
async fn a_program_that_heeds_the_stop_signal_ends_by_itself() {
    let client = shared().client();
    let script = "trap 'echo bye; exit 7' INT; echo up; while :; do sleep 0.05; done";
    let path = sandbox(&client, script, &json!({ "stop_signal": "int" })).await;
    until_written(&client, &path, "up\n").await;

    let stopped = client.post(&format!("{path}/stop"), &json!({})).await.expect(200);
    let again = client.post(&format!("{path}/stop"), &json!({})).await.expect(200);

    assert_exit(&stopped, 7);
    assert_eq!(stopped["stop_signal"], "SIGINT");
    assert_eq!(written(&client, &path).await, "up\nbye\n");
    assert_eq!(again["outcome"], stopped["outcome"]);
}

#[tokio::test]
async fn a_program_that_ignores_the_stop_signal_is_killed_after_its_grace() {
    let client = shared().client();
    let path = sandbox(&client, "trap '' TERM; echo up; while :; do sleep 0.05; done", &json!({})).await;
    until_written(&client, &path, "up\n").await;
    let started = tokio::time::Instant::now();

    let stopped = client.post(&format!("{path}/stop"), &json!({ "grace_ms": 400 })).await.expect(200);

    assert_reason(&stopped, "stopped_by_user");
    assert_eq!(stopped["outcome"]["signal"], "SIGKILL");
    assert!(started.elapsed() >= Duration::from_millis(400), "{:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_signal_reaches_the_program_and_sigkill_ends_the_sandbox() {
    let client = shared().client();
    let path = sandbox(&client, "trap 'echo heard' USR1; echo up; while :; do sleep 0.05; done", &json!({})).await;
    until_written(&client, &path, "up\n").await;

    let signaled = client.post(&format!("{path}/kill"), &json!({ "signal": 10 })).await.expect(200);
    until_written(&client, &path, "heard\n").await;
    let killed = client.post(&format!("{path}/kill"), &json!({})).await.expect(200);
    let too_late = client.post(&format!("{path}/kill"), &json!({})).await.problem(409, "wrong_state");
    let nonsense = client.post(&format!("{path}/kill"), &json!({ "signal": "SIGNOPE" })).await.problem(422, "invalid_request");

    assert_eq!(signaled["state"], "running");
    assert_reason(&killed, "stopped_by_user");
    assert_eq!((&too_late["state"], &too_late["retryable"]), (&json!("exited"), &json!(false)));
    assert_eq!(nonsense["field"], "signal");
}

#[tokio::test]
async fn what_cannot_be_done_in_a_state_is_refused_with_that_state() {
    let client = shared().client();
    let exited = sandbox(&client, "true", &json!({})).await;
    wait(&client, &exited, "until=exited").await;
    let failed = client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["no-such-program"] })).await.expect(201);
    let failed = format!("/v1/sandboxes/{}", failed["id"].as_str().unwrap());

    for (path, state) in [(&exited, "exited"), (&failed, "failed")] {
        for (verb, body) in [("pause", json!({})), ("resume", json!({})), ("kill", json!({ "signal": "TERM" }))] {
            let problem = client.post(&format!("{path}/{verb}"), &body).await.problem(409, "wrong_state");
            assert_eq!(problem["state"], state, "{verb}");
        }
    }
    let problem = client.patch(&failed, &json!({ "limits": { "pids": 3 } })).await.problem(409, "wrong_state");
    assert_eq!(problem["state"], "failed");
}

#[tokio::test]
async fn waiting_ends_with_the_state_or_with_its_time() {
    let client = shared().client();
    let path = sandbox(&client, "sleep 3; exit 5", &json!({})).await;

    let running = wait(&client, &path, "until=running").await;
    let not_yet = wait(&client, &path, "until=exited&timeout_ms=50").await;
    let exited = wait(&client, &path, "until=exited&timeout_ms=20000").await;
    let never = wait(&client, &path, "until=paused").await;
    let (removed, deleted) = tokio::join!(wait(&client, &path, "until=removed&timeout_ms=20000"), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        client.delete(&path).await.status
    });
    let unknown = client.get(&format!("{path}/wait?until=removed")).await;

    assert_eq!((&running["result"], &running["sandbox"]["state"]), (&json!("reached"), &json!("running")));
    assert_eq!((&not_yet["result"], &not_yet["sandbox"]["state"]), (&json!("timed_out"), &json!("running")));
    assert_eq!(exited["result"], "reached");
    assert_exit(&exited["sandbox"], 5);
    assert_eq!(never["result"], "ended");
    assert_eq!((deleted, &removed["result"], &removed["sandbox"]), (204, &json!("reached"), &Value::Null));
    unknown.problem(404, "not_found");
}

#[tokio::test]
async fn a_tenant_waits_so_often_at_a_time() {
    let client = shared().client();
    let path = sandbox(&client, "sleep 1000", &json!({})).await;
    let waiting: Vec<_> = (0..256)
        .map(|_| {
            let (client, path) = (client.clone(), path.clone());
            tokio::spawn(async move { wait(&client, &path, "until=exited&timeout_ms=60000").await["result"].clone() })
        })
        .collect();

    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let refused = loop {
        let answer = client.get(&format!("{path}/wait?until=exited&timeout_ms=0")).await;
        if answer.status == 429 {
            break answer;
        }
        assert_eq!(answer.expect(200)["result"], "timed_out");
        assert!(tokio::time::Instant::now() < deadline, "all may wait");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let other = shared().client();
    let others = sandbox(&other, "true", &json!({})).await;

    assert_eq!(refused.header("retry-after"), "1");
    let problem = refused.problem(429, "quota_exceeded");
    assert_eq!((&problem["quota"], &problem["retryable"]), (&json!("waits"), &json!(true)));
    assert_eq!(wait(&other, &others, "until=exited").await["result"], "reached");
    assert_eq!(client.delete(&path).await.status, 204);
    for waited in waiting {
        assert_eq!(waited.await.unwrap(), "reached");
    }
    assert_eq!(client.get(&format!("{path}/wait?until=removed&timeout_ms=0")).await.status, 404);
}

#[tokio::test]
async fn a_sandbox_is_found_by_its_name_until_that_is_changed() {
    let client = shared().client();
    let path = sandbox(&client, "sleep 1000", &json!({ "name": "first" })).await;

    let by_name = client.get("/v1/sandboxes/first").await.expect(200);
    let renamed = client.patch("/v1/sandboxes/first", &json!({ "name": "second", "labels": { "a": "b" } })).await.expect(200);
    let other = sandbox(&client, "sleep 1000", &json!({ "name": "first" })).await;
    let taken = client.patch(&other, &json!({ "name": "second" })).await;

    assert_eq!(path, format!("/v1/sandboxes/{}", by_name["id"].as_str().unwrap()));
    assert_eq!((&renamed["name"], &renamed["labels"]), (&json!("second"), &json!({ "a": "b" })));
    taken.problem(409, "conflict");
    shared().client().get("/v1/sandboxes/second").await.problem(404, "not_found");
    assert_eq!(client.delete("/v1/sandboxes/second").await.status, 204);
    client.get(&path).await.problem(404, "not_found");
    assert_eq!(client.delete(&other).await.status, 204);
}

#[tokio::test]
async fn limits_are_changed_while_it_runs() {
    let client = shared().client();
    let program = "import time\nprint('up', flush=True)\ntime.sleep(1.5)\nx = bytearray(100 << 20)\nprint('fits')";
    let request = |megabytes: u64| {
        let limits = json!({ "memory_bytes": megabytes << 20, "disk_bytes": 1 << 20 });
        json!({ "image": "python", "command": ["python3", "-c", program], "limits": limits })
    };
    let make = async |megabytes| {
        let made = client.post("/v1/sandboxes", &request(megabytes)).await.expect(201);
        let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
        wait(&client, &path, "until=running").await;
        path
    };
    let (raised, lowered, control) = (make(64).await, make(256).await, make(64).await);

    let told = client.patch(&raised, &json!({ "limits": { "memory_bytes": 256 << 20 } })).await.expect(200);
    client.patch(&lowered, &json!({ "limits": { "memory_bytes": 64 << 20 } })).await.expect(200);
    let end = async |path: &str| wait(&client, path, "until=exited").await["sandbox"].clone();

    assert_eq!(told["limits"]["memory_bytes"], 256 << 20);
    assert_exit(&end(&raised).await, 0);
    assert_reason(&end(&lowered).await, "oom_killed");
    assert_reason(&end(&control).await, "oom_killed");
}

#[tokio::test]
async fn a_wall_limit_and_a_time_to_live_can_be_given_later() {
    let client = shared().client();
    let (walled, expired) =
        (sandbox(&client, "sleep 1000", &json!({})).await, sandbox(&client, "sleep 1000", &json!({ "ttl_ms": 600_000 })).await);

    client.patch(&walled, &json!({ "limits": { "wall_ms": 800 } })).await.expect(200);
    client.patch(&expired, &json!({ "ttl_ms": 1000 })).await.expect(200);

    assert_reason(&wait(&client, &walled, "until=exited").await["sandbox"], "wall_timeout");
    assert_reason(&wait(&client, &expired, "until=exited").await["sandbox"], "expired");
}

#[tokio::test]
async fn a_sandbox_that_does_nothing_is_ended_and_one_that_writes_is_not() {
    let client = shared().client();
    let writes = "for i in 1 2 3 4 5 6 7; do echo $i; sleep 0.4; done";
    let (idle, busy, busy_in_vain, busy_beyond) = (
        sandbox(&client, "sleep 1000", &json!({ "idle_timeout_ms": 2000 })).await,
        sandbox(&client, writes, &json!({ "idle_timeout_ms": 2000 })).await,
        sandbox(&client, writes, &json!({ "idle_timeout_ms": 2000, "output_policy": "discard" })).await,
        sandbox(&client, writes, &json!({ "idle_timeout_ms": 2000, "limits": { "output_bytes": 2 } })).await,
    );
    let once = sandbox(&client, "sleep 0.5; echo; sleep 1000", &json!({ "idle_timeout_ms": 2000, "output_policy": "discard" })).await;

    assert_reason(&wait(&client, &idle, "until=exited").await["sandbox"], "idle_timeout");
    for path in [&busy, &busy_in_vain, &busy_beyond] {
        assert_exit(&wait(&client, path, "until=exited").await["sandbox"], 0);
    }
    let ended = wait(&client, &once, "until=exited").await["sandbox"].clone();
    assert_reason(&ended, "idle_timeout");
    assert_within(&ended, "wall_ms", 2500..=10_000);
}

#[tokio::test]
async fn what_is_to_be_removed_at_its_end_is_and_its_event_tells_how_it_ended() {
    let client = shared().client();
    let path = sandbox(&client, "sleep 0.3; exit 9", &json!({ "auto_remove": true })).await;

    let seen = wait(&client, &path, "until=exited").await;
    let removed = async || client.get(&path).await.status == 404;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !removed().await {
        assert!(tokio::time::Instant::now() < deadline, "it is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let events = client.get("/v1/events").await.expect(200);

    assert_exit(&seen["sandbox"], 9);
    let ended = events["items"].as_array().unwrap().iter().find(|event| event["kind"] == "sandbox.ended").expect("its end is told");
    assert_eq!(ended["data"]["outcome"]["exit_code"], 9, "{ended:#}");
}

#[tokio::test]
async fn a_run_can_be_cancelled() {
    let client = shared().client();
    let run = client
        .post("/v1/runs", &json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "wall_ms": 60_000 }, "wait_ms": 0 }))
        .await;
    let path = format!("/v1/runs/{}", run.expect(202)["id"].as_str().unwrap());

    let cancelled = client.delete(&path).await.expect(200);
    let again = client.delete(&path).await.expect(200);

    assert_reason(&cancelled, "stopped_by_user");
    assert_eq!(cancelled["outcome"], again["outcome"]);
    assert_eq!(client.get(&path).await.expect(200)["outcome"], cancelled["outcome"]);
    shared().client().delete(&path).await.problem(404, "not_found");
}

#[tokio::test]
async fn an_entry_point_goes_before_the_command() {
    let request = json!({ "image": "busybox", "entrypoint": ["echo", "-n"], "command": ["a", "b"] });

    let run = shared().client().run(&request).await;

    assert_eq!(stdout(&run), "a b");
}

#[tokio::test]
async fn lists_are_filtered_by_name_image_label_and_time_in_both_orders() {
    let client = shared().client();
    let first = sandbox(&client, "true", &json!({ "name": "web_1", "labels": { "tier": "web" } })).await;
    let second = sandbox(&client, "sleep 1000", &json!({ "name": "webb", "labels": { "tier": "", "other": "x" } })).await;
    wait(&client, &first, "until=exited").await;
    let created = client.get(&second).await.expect(200)["created_at"].as_str().unwrap().to_owned();
    let listed = async |query: &str| -> Vec<String> {
        let page = client.get(&format!("/v1/sandboxes?{query}")).await.expect(200);
        page["items"].as_array().unwrap().iter().map(|item| format!("/v1/sandboxes/{}", item["id"].as_str().unwrap())).collect()
    };

    assert_eq!(listed("").await, [second.clone(), first.clone()]);
    assert_eq!(listed("order=oldest_first").await, [first.clone(), second.clone()]);
    assert_eq!(listed("name=web_").await, std::slice::from_ref(&first));
    assert_eq!(listed("label=tier&order=oldest_first").await, [first.clone(), second.clone()]);
    assert_eq!(listed("label=tier%3Dweb&label=tier").await, std::slice::from_ref(&first));
    assert_eq!(listed("label=other&state=exited").await, [] as [String; 0]);
    assert_eq!(listed("image=busybox&state=running").await, std::slice::from_ref(&second));
    assert_eq!(listed("image=python").await, [] as [String; 0]);
    assert_eq!(listed(&format!("created_before={created}")).await, std::slice::from_ref(&first));
    assert_eq!(listed(&format!("created_after={created}")).await, std::slice::from_ref(&second));
    assert_eq!(listed("finished_after=2020-01-01T00:00:00Z").await, std::slice::from_ref(&first));
    client.get("/v1/sandboxes?created_after=yesterday").await.problem(422, "invalid_request");
    assert_eq!(client.delete(&second).await.status, 204);
}

#[tokio::test]
async fn an_order_that_is_sent_again_is_answered_with_the_first() {
    let client = shared().client();
    let path = sandbox(&client, "sleep 1000", &json!({})).await;
    let post = async |verb: &str, key: &str| {
        let path = format!("{path}/{verb}");
        client.send(client.request(reqwest::Method::POST, &path).header("idempotency-key", key).json(&json!({})), "POST", &path).await
    };
    for verb in ["pause", "resume", "stop", "kill"] {
        let key = uuid::Uuid::new_v4().to_string();
        let (first, second) = (post(verb, &key).await, post(verb, &key).await);
        assert_eq!((first.status, &first.text), (second.status, &second.text), "{verb}");
        assert_eq!(second.header("idempotency-replayed"), "true", "{verb}");
    }
}

/// Counts its lives in a file, and exits with their number.
const LIVES: &str = "n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; echo life $n; exit $n";

#[tokio::test]
async fn a_sandbox_is_started_again_on_what_it_wrote() {
    let client = shared().client();
    let path = sandbox(&client, LIVES, &json!({ "keep_layer": true })).await;
    let first = wait(&client, &path, "until=exited").await;

    client.post(&format!("{path}/start"), &json!({})).await.expect(200);
    let second = wait(&client, &path, "until=exited").await;
    let log = written(&client, &path).await;
    client.post(&format!("{path}/start"), &json!({ "fresh": true })).await.expect(200);
    let third = wait(&client, &path, "until=exited").await;
    let events = client.get("/v1/events?kind=sandbox.ended").await.expect(200);

    assert_exit(&first["sandbox"], 1);
    assert_exit(&second["sandbox"], 2);
    assert_eq!(log, "life 2\n");
    assert_exit(&third["sandbox"], 1);
    assert_eq!(third["sandbox"]["starts"], 3);
    assert_eq!(events["items"].as_array().unwrap().len(), 3, "{events:#}");
    assert_eq!(client.delete(&path).await.status, 204);
}

#[tokio::test]
async fn what_runs_is_not_started_and_what_kept_nothing_only_anew() {
    let client = shared().client();
    let running = sandbox(&client, "sleep 1000", &json!({ "keep_layer": true })).await;
    let ended = sandbox(&client, LIVES, &json!({})).await;
    wait(&client, &ended, "until=exited").await;

    let same = client.post(&format!("{running}/start"), &json!({})).await.expect(200);
    client.post(&format!("{running}/pause"), &json!({})).await.expect(200);
    let paused = client.post(&format!("{running}/start"), &json!({})).await.problem(409, "wrong_state");
    client.post(&format!("{ended}/start"), &json!({})).await.problem(409, "layer_lost");
    client.post(&format!("{ended}/start"), &json!({ "fresh": true })).await.expect(200);
    let again = wait(&client, &ended, "until=exited").await;

    assert_eq!((&same["state"], &same["starts"]), (&json!("running"), &json!(1)));
    assert_eq!(paused["state"], "paused");
    assert_exit(&again["sandbox"], 1);
    for path in [&running, &ended] {
        assert_eq!(client.delete(path).await.status, 204);
    }
}

#[tokio::test]
async fn layers_are_kept_by_so_many_sandboxes_of_a_tenant() {
    let client = shared().client();
    let request =
        json!({ "image": "busybox", "command": ["true"], "keep_layer": true, "limits": { "memory_bytes": 8 << 20, "disk_bytes": 65_536 } });
    let mut paths = Vec::new();
    for _ in 0..16 {
        let made = client.post("/v1/sandboxes", &request).await.expect(201);
        paths.push(format!("/v1/sandboxes/{}", made["id"].as_str().unwrap()));
    }

    let refused = client.post("/v1/sandboxes", &request).await.problem(429, "quota_exceeded");
    assert_eq!(client.delete(&paths[0]).await.status, 204);
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    paths[0] = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());

    assert_eq!(refused["quota"], "kept_layers");
    for path in &paths {
        assert_eq!(client.delete(path).await.status, 204);
    }
}
