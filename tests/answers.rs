//! Answers with much output: how much memory they take together, whom they keep from being answered, and what becomes of those that nobody reads.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use mayfly_tests::{Client, Service, host, outcome::stdout};
use reqwest::{Method, Response};
use serde_json::{Value, json};

const MIB: u64 = 1024 * 1024;
/// What a run of these tests writes, in control characters: six times as much in JSON, which no buffer of the kernel's holds, and which is given back to it when it is freed (`M_MMAP_THRESHOLD`, mallopt(3)).
const WRITTEN: u64 = 6 * MIB;
const ANSWER: u64 = 6 * WRITTEN;
/// What a service may take beyond what is counted: 64 connections, and whatever else grows when there is much to do.
const SLACK: u64 = 32 * MIB;
/// How long the service waits for a client to take something, where that is tried.
const WRITE_TIMEOUT_S: u64 = 20;

/// A program that writes so many bytes of one character, which `tr` knows as this.
fn writing(bytes: u64, character: &str) -> Value {
    let script = format!("head -c {bytes} /dev/zero | tr '\\0' '{character}'");
    json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": { "output_bytes": bytes, "wall_ms": 60_000 }, "wait_ms": 0 })
}

/// Where a run is found that has written much. Of the answers that told so nothing is read.
async fn large_run(client: &Client) -> String {
    let made = client.post("/v1/runs", &writing(WRITTEN, "\\001")).await;
    let path = format!("/v1/runs/{}", made.body["id"].as_str().unwrap());
    let deadline = Instant::now() + Duration::from_secs(30);
    while ask(client, &path).await.content_length().is_none_or(|length| length < ANSWER) {
        assert!(Instant::now() < deadline, "it did not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    path
}

/// The head of an answer, whose body is not read while this is held.
async fn ask(client: &Client, path: &str) -> Response {
    client.request(Method::GET, path).send().await.unwrap()
}

async fn ask_often(client: &Client, path: &str, often: usize) -> Vec<Response> {
    join_all((0..often).map(|_| ask(client, path))).await
}

/// A figure of the service's memory, in bytes: what it has now (`VmRSS`), or the most that it ever had (`VmHWM`, proc_pid_status(5)).
fn memory(service: &Service, figure: &str) -> u64 {
    let field = host::status_field(service.place().pid, figure).unwrap();
    field.trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn service_with(arguments: &[&str]) -> Service {
    let service = Service::start_with(arguments).unwrap();
    service.import("busybox").unwrap();
    service
}

#[tokio::test]
async fn answers_that_nobody_reads_take_no_more_memory_than_is_set_aside_and_keep_no_other_tenant_waiting() {
    let set_aside = 256 * MIB;
    // Of which a tenant has a fourth: one such answer, and not another.
    let bound = set_aside / 4 + SLACK;
    let mut service = service_with(&["--answer-memory-bytes", &set_aside.to_string()]);
    let reader = Client::of(service.place(), "reader");
    let before = memory(&service, "VmRSS");
    let path = large_run(&reader).await;

    let unread = ask_often(&reader, &path, 64).await;
    let grown = memory(&service, "VmHWM") - before;
    let (answered, mut refused): (Vec<_>, Vec<_>) = unread.into_iter().partition(|answer| answer.status() == 200);
    let mut request = writing(MIB, "x");
    request["wait_ms"] = json!(60_000);
    let others = Client::of(service.place(), "other").run(&request).await;
    assert_eq!(stdout(&others).len() as u64, MIB);
    let one = refused.pop().unwrap();
    assert_eq!(one.headers()["retry-after"], "1");
    let problem: Value = one.json().await.unwrap();
    assert_eq!((&problem["code"], &problem["retryable"]), (&json!("no_capacity"), &json!(true)));

    assert!(!answered.is_empty() && refused.iter().all(|answer| answer.status() == 503), "{answered:?}");
    assert!(grown < bound, "{} MiB with {} answers", grown / MIB, answered.len());

    // The control: with much set aside, a few take more than all of them did.
    drop((answered, refused));
    assert!(service.stop().unwrap().success());
    service.set_arguments(&["--answer-memory-bytes", &(4096 * MIB).to_string()]);
    service.start_again().unwrap();
    let reader = Client::of(service.place(), "reader");
    let before = memory(&service, "VmRSS");
    let unread = ask_often(&reader, &path, 7).await;
    let grown = memory(&service, "VmHWM") - before;
    assert!(unread.iter().all(|answer| answer.status() == 200) && grown > 2 * bound, "{} MiB", grown / MIB);
}

#[tokio::test]
async fn who_makes_a_run_hears_of_it_though_there_is_no_room_for_its_output() {
    let service = service_with(&["--write-timeout-s", "600", "--answer-memory-bytes", &(256 * MIB).to_string()]);
    let client = Client::of(service.place(), "reader");
    let path = large_run(&client).await;
    // The answers that told that it has ended are given up when their connections are seen to be closed.
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut unread = ask(&client, &path).await;
    while unread.status() != 200 {
        assert!(Instant::now() < deadline, "{unread:?}");
        unread = ask(&client, &path).await;
    }
    let mut request = writing(5 * MIB, "x");
    request["wait_ms"] = json!(60_000);
    let post = async || {
        let keyed = client.request(Method::POST, "/v1/runs").header("idempotency-key", "once").json(&request);
        client.send(keyed, "POST", "/v1/runs").await
    };

    let first = post().await;
    let batch = json!({ "runs": [writing(MIB, "x"), { "image": "no-such-image" }], "wait_ms": 60_000 });
    let many = client.post("/v1/runs/batch", &batch).await.expect(200);
    drop(unread);
    let second = post().await;

    let location = first.header("location").to_owned();
    let run = first.expect(202);
    assert_eq!((&run["state"], &run["outcome"]["reason"], &run["stdout"]), (&json!("exited"), &json!("exited"), &Value::Null));
    assert_eq!(location, format!("/v1/runs/{}", run["id"].as_str().unwrap()));
    assert_eq!(stdout(&many["items"][0]["run"]).len(), 64 * 1024);
    assert_eq!(many["items"][1]["problem"]["code"], "image_not_found");
    let again = second.expect(200);
    assert_eq!((&again["id"], stdout(&again).len()), (&run["id"], 5 * 1024 * 1024));
}

#[tokio::test]
async fn a_client_that_does_not_read_is_disconnected_and_its_answer_freed() {
    let service = service_with(&["--write-timeout-s", &WRITE_TIMEOUT_S.to_string(), "--answer-memory-bytes", &(4096 * MIB).to_string()]);
    let client = Client::of(service.place(), "reader");
    let path = large_run(&client).await;
    let before = memory(&service, "VmRSS");

    let unread = ask_often(&client, &path, 5).await;
    let (held, begun_at) = (memory(&service, "VmRSS"), Instant::now());
    let deadline = begun_at + Duration::from_secs(60);
    assert!(held > before + 3 * ANSWER, "{} MiB, then {} MiB", before / MIB, held / MIB);
    // The last of them has stood still for as long by then, and whoever reads before would be in time.
    tokio::time::sleep_until((begun_at + Duration::from_secs(WRITE_TIMEOUT_S + 3)).into()).await;

    while memory(&service, "VmRSS") > before + 2 * ANSWER {
        assert!(Instant::now() < deadline, "still {} MiB, after {} MiB", memory(&service, "VmRSS") / MIB, held / MIB);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for answer in unread {
        assert_eq!(answer.status(), 200);
        answer.bytes().await.expect_err("the rest of it came");
    }
    // Who reads is answered, as before.
    let read = ask(&client, &path).await.bytes().await.unwrap();
    assert!(read.len() as u64 > ANSWER);
}

/// How many bytes the service has read from files so far.
fn read_from_files(service: &Service) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", service.place().pid)).unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[tokio::test]
async fn no_whole_log_is_read_where_many_runs_are_told_of() {
    let service = service_with(&[]);
    let client = service.client();
    let runs: Vec<_> = (0..4).map(|_| writing(4 * MIB, "x")).collect();
    let batch = client.post("/v1/runs/batch", &json!({ "runs": runs, "wait_ms": 60_000 })).await.expect(200);
    let ids: Vec<_> = batch["items"].as_array().unwrap().iter().map(|item| item["run"]["id"].as_str().unwrap()).collect();

    let at_first = read_from_files(&service);
    let many = client.get(&format!("/v1/runs?ids={}", ids.join(","))).await.expect(200);
    let for_many = read_from_files(&service) - at_first;
    let one = client.get(&format!("/v1/runs/{}", ids[0])).await.expect(200);
    let for_one = read_from_files(&service) - at_first - for_many;

    assert!(
        many["items"].as_array().unwrap().iter().all(|item| stdout(&item["run"]).len() == 64 * 1024),
        "{:?}",
        many["items"][0]["run"]["state"]
    );
    assert_eq!(stdout(&one).len() as u64, 4 * MIB);
    assert!(for_many < 2 * MIB, "{for_many} bytes of logs are read for four shares");
    assert!(for_one >= 4 * MIB, "the control failed: {for_one} bytes");
}
