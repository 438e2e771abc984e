//! What happens to a run and to a sandbox from the request to its end.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use mayfly_tests::{
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
    assert!(started.elapsed() < Duration::from_secs(10), "took {:?}", started.elapsed());
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
    assert_within(&run, "wall_ms", 500..=2_000);
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
    let client = service.client();
    let request = client
        .request(reqwest::Method::POST, "/v1/runs")
        .json(&json!({ "image": "busybox", "command": ["sh", "-c", "sleep 0.7; echo finished"], "labels": { "left": "alone" } }))
        .timeout(Duration::from_millis(300));

    request.send().await.expect_err("the client gives up");

    // Only the metric of the whole service tells of a run whose id nobody was told.
    let count = || async {
        let text = reqwest::get(format!("{}/metrics", service.place.metrics_url)).await.unwrap().text().await.unwrap();
        text.lines().any(|line| line.starts_with("sandbox_runs_total") && line.contains("exited"))
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !count().await {
        assert!(tokio::time::Instant::now() < deadline, "the run was never counted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
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
    assert_within(&run, "cpu_ms", 195..=260);
    assert_within(&run, "wall_ms", 195..=3_000);
    assert_within(&run, "pids_peak", 1..=1);
    assert!(usage(&run, "memory_peak_bytes") < 16 << 20, "{run:#}");
    let phases = &run["outcome"]["phases_ms"];
    assert!(phases["total"].as_f64().unwrap() >= f64::from(u32::try_from(usage(&run, "wall_ms")).unwrap()), "{phases}");
}
