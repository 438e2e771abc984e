//! The service or the keeper is killed at any point: nothing that was promised is lost, and nothing is left behind.
//!
//! Every test here has a service of its own, since it kills it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use mayfly_tests::{
    Client, Service, host,
    outcome::{assert_exit, assert_reason, assert_within, stdout},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// How long cleaning up may go on after the answer.
const SOON: Duration = Duration::from_secs(30);

/// The same tenant, at the address that the service has now.
fn client(service: &Service) -> Client {
    Client::of(service.place(), "survivor")
}

async fn start(client: &Client, path: &str, script: &str) -> String {
    let mut request = json!({ "image": "busybox", "command": ["sh", "-c", script] });
    if path == "/v1/runs" {
        request["wait_ms"] = json!(0);
    }
    client.post(path, &request).await.body["id"].as_str().expect("it was accepted").to_owned()
}

async fn ended(client: &Client, id: &str) -> Value {
    client.until(&format!("/v1/runs/{id}"), |run| !run["outcome"].is_null()).await
}

#[tokio::test]
async fn finished_runs_are_there_after_the_service_was_killed() {
    let mut service = Service::start();
    let before = client(&service).shell("echo kept; echo kept too >&2; exit 6").await;

    service.kill();
    service.start_again().unwrap();
    let after = client(&service).get(&format!("/v1/runs/{}", before["id"].as_str().unwrap())).await.expect(200);

    assert_eq!(after, before);
}

#[tokio::test]
async fn a_finished_runs_log_is_there_after_the_service_was_killed() {
    let mut service = Service::start();
    let run = client(&service).shell("echo kept").await;
    let id = run["id"].as_str().unwrap();

    service.kill();
    service.start_again().unwrap();
    let frames = client(&service).log(id).await;

    assert_eq!(frames.stdout_text(), "kept\n");
    assert_eq!(frames.end.as_ref(), Some(&run["outcome"]));
}

#[tokio::test]
async fn a_running_sandbox_outlives_the_service_and_is_followed_again() {
    let mut service = Service::start();
    let id =
        start(&client(&service), "/v1/sandboxes", "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 7").await;
    let path = format!("/v1/sandboxes/{id}");
    client(&service).until(&path, |s| s["state"] == "running").await;

    service.kill();
    service.start_again().unwrap();
    let client = client(&service);
    let frames = client.log(&id).await;
    let sandbox = client.until(&path, |s| s["state"] == "exited").await;

    assert_eq!(frames.stdout_text(), (0..30).map(|i| format!("line {i}\n")).collect::<String>());
    assert_eq!(frames.gaps, Vec::<Value>::new());
    assert_exit(&sandbox, 7);
    assert_within(&sandbox, "wall_ms", 3_000..=30_000);
}

#[tokio::test]
async fn what_ended_while_the_service_was_dead_is_told() {
    let mut service = Service::start();
    let id = start(&client(&service), "/v1/runs", "sleep 2; echo unheard; exit 8").await;
    client(&service).until(&format!("/v1/runs/{id}"), |run| run["state"] == "running").await;

    service.kill();
    tokio::time::sleep(Duration::from_secs(10)).await;
    service.start_again().unwrap();
    let run = ended(&client(&service), &id).await;

    assert_exit(&run, 8);
    assert_eq!(stdout(&run), "unheard\n");
    // When it ended, not when somebody heard of it.
    assert_within(&run, "wall_ms", 2_000..=9_900);
}

#[tokio::test]
async fn limits_hold_while_the_service_is_dead() {
    let mut service = Service::start();
    let request = json!({ "image": "busybox", "command": ["burn", "0"], "limits": { "wall_ms": 2_000 }, "wait_ms": 0 });
    let id = client(&service).post("/v1/runs", &request).await.expect(202)["id"].as_str().unwrap().to_owned();
    client(&service).until(&format!("/v1/runs/{id}"), |run| run["state"] == "running").await;

    service.kill();
    tokio::time::sleep(Duration::from_secs(10)).await;
    service.start_again().unwrap();
    let run = ended(&client(&service), &id).await;

    assert_reason(&run, "wall_timeout");
    assert_within(&run, "wall_ms", 2_000..=9_900);
}

#[tokio::test]
async fn twenty_runs_in_flight_are_all_told_after_a_kill() {
    let mut service = Service::start();
    let before = client(&service);
    let mut ids = Vec::new();
    for i in 0..20 {
        ids.push(start(&before, "/v1/runs", &format!("echo {i}; sleep 0.{i:02}; exit {i}")).await);
    }

    service.kill();
    service.start_again().unwrap();
    let after = client(&service);

    for (i, id) in ids.iter().enumerate() {
        let run = ended(&after, id).await;
        assert_exit(&run, i64::try_from(i).unwrap());
        assert_eq!(stdout(&run), format!("{i}\n"));
    }
}

#[tokio::test]
async fn the_same_keeper_serves_the_next_service() {
    let mut service = Service::start();
    let keeper = service.place().keeper_pid();

    service.kill();
    service.start_again().unwrap();

    assert_eq!(service.place().keeper_pid(), keeper);
    assert_exit(&client(&service).shell("true").await, 0);
}

#[tokio::test]
async fn a_dead_keepers_sandboxes_are_dead_and_told() {
    let mut service = Service::start();
    let seconds = 300_000 + uuid::Uuid::new_v4().as_u128() % 100_000;
    let id = start(&client(&service), "/v1/runs", &format!("sleep {seconds}; true")).await;
    client(&service).until(&format!("/v1/runs/{id}"), |run| run["state"] == "running").await;

    kill(Pid::from_raw(service.place().keeper_pid().cast_signed()), Signal::SIGKILL).unwrap();
    let status = service.wait().unwrap();
    let log = service.log();
    service.start_again().unwrap();
    let run = ended(&client(&service), &id).await;

    assert!(!status.success(), "{status}");
    assert!(log.contains("keeper"), "{log}");
    assert_reason(&run, "infra_error");
    assert_eq!(run["state"], "failed");
    assert_eq!(host::processes_with(&format!("sleep {seconds}")), Vec::<u32>::new());
    assert_exit(&client(&service).shell("true").await, 0);
}

#[tokio::test]
async fn a_keeper_that_was_killed_leaves_nothing_once_the_next_has_started_and_stopped() {
    let mut service = Service::start_alone();
    for _ in 0..3 {
        start(&client(&service), "/v1/sandboxes", "exec sleep 1000").await;
    }
    let list = client(&service).until("/v1/sandboxes?state=running", |l| l["items"].as_array().unwrap().len() == 3).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 3);

    let sandboxes = service.place().footprint();
    kill(Pid::from_raw(service.place().keeper_pid().cast_signed()), Signal::SIGKILL).unwrap();
    service.wait().unwrap();
    service.start_again().unwrap();
    let next = service.place().footprint();
    let status = service.stop().unwrap();

    assert!(status.success(), "{status}\n{}", service.log());
    assert_eq!(sandboxes.wait_until_gone(SOON), Vec::<String>::new());
    assert_eq!(next.wait_until_gone(SOON), Vec::<String>::new());
}

#[tokio::test]
async fn a_stopped_service_leaves_nothing() {
    let mut service = Service::start_alone();
    assert_exit(&client(&service).shell("true").await, 0);
    let id = start(&client(&service), "/v1/sandboxes", "exec sleep 1000").await;
    client(&service).until(&format!("/v1/sandboxes/{id}"), |s| s["state"] == "running").await;

    let footprint = service.place().footprint();
    let status = service.stop().unwrap();

    assert!(status.success(), "{status}\n{}", service.log());
    assert_eq!(footprint.wait_until_gone(SOON), Vec::<String>::new());
}

#[tokio::test]
async fn ended_sandboxes_leave_nothing_while_the_service_goes_on() {
    let service = Service::start();
    twenty_runs(&service).await;
    let before = settled_traces(&service).await;

    twenty_runs(&service).await;

    assert_eq!(settled_traces(&service).await, before);
}

async fn twenty_runs(service: &Service) {
    let client = client(service);
    for _ in 0..20 {
        assert_exit(&client.shell("sleep 1000 & true").await, 0);
    }
}

/// How many processes and log files of this service's keeper there are, once that does not change for half a second.
///
/// The keeper has some sandboxes prepared ahead, so it is not none.
async fn settled_traces(service: &Service) -> usize {
    let traces = || {
        let logs = std::fs::read_dir(service.place().data_dir.join("logs")).unwrap().count();
        host::descendants(service.place().keeper_pid()).len() + logs
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let (mut last, mut same) = (traces(), 0);
    while same < 10 {
        assert!(tokio::time::Instant::now() < deadline, "still changing: {last}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = traces();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

/// A long-lived sandbox of a shell script, and where it is found.
async fn sandbox(client: &Client, script: &str, more: Value) -> String {
    let mut request = json!({ "image": "busybox", "command": ["sh", "-c", script] });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    format!("/v1/sandboxes/{}", made["id"].as_str().unwrap())
}

/// What it has written until now.
async fn written(client: &Client, path: &str) -> String {
    let id = path.rsplit('/').next().unwrap();
    client.follow(id, "from=0&follow=false").await.collect().await.stdout_text()
}

const COUNTS: &str = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done";

async fn assert_stands_still(client: &Client, path: &str) {
    let before = written(client, path).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(before, written(client, path).await, "it goes on");
}

async fn assert_goes_on(client: &Client, path: &str) {
    let before = written(client, path).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while written(client, path).await == before {
        assert!(tokio::time::Instant::now() < deadline, "it stands still");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends it to a service that kills itself at this step, and starts that again.
async fn send_and_die(service: &mut Service, step: &str, method: reqwest::Method, path: &str, body: &Value) {
    service.kill();
    service.arm(&format!("{step}=return"));
    service.start_again().unwrap();
    client(service).request(method, path).json(body).send().await.expect_err("the service dies before it answers");
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();
}

#[tokio::test]
async fn a_paused_sandbox_stays_so_until_it_is_resumed_whoever_dies() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), COUNTS, json!({})).await;
    client(&service).post(&format!("{path}/pause"), &json!({})).await.expect(200);

    service.kill();
    service.start_again().unwrap();
    let client = client(&service);
    let found = client.get(&path).await.expect(200);
    assert_eq!(found["state"], "paused");
    assert_stands_still(&client, &path).await;

    let resumed = client.post(&format!("{path}/resume"), &json!({})).await.expect(200);
    assert_eq!(resumed["state"], "running");
    assert_goes_on(&client, &path).await;
}

#[tokio::test]
async fn a_pause_that_was_not_stored_is_taken_back_by_the_next_service() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), COUNTS, json!({})).await;

    send_and_die(&mut service, "service.pause.held", reqwest::Method::POST, &format!("{path}/pause"), &json!({})).await;

    let client = client(&service);
    assert_eq!(client.get(&path).await.expect(200)["state"], "running");
    assert_goes_on(&client, &path).await;
}

#[tokio::test]
async fn a_pause_that_was_stored_and_not_answered_holds() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), COUNTS, json!({})).await;

    send_and_die(&mut service, "service.pause.stored", reqwest::Method::POST, &format!("{path}/pause"), &json!({})).await;

    let client = client(&service);
    assert_eq!(client.get(&path).await.expect(200)["state"], "paused");
    assert_stands_still(&client, &path).await;
}

/// Becomes larger than its first limit, when somebody has had the time to change that.
fn grower() -> Value {
    let program = "import time\nprint('up', flush=True)\ntime.sleep(4)\nx = bytearray(100 << 20)\nprint('fits')";
    json!({ "image": "python", "command": ["python3", "-c", program], "limits": { "memory_bytes": 64 << 20, "disk_bytes": 1 << 20 } })
}

async fn grower_after(step: &str) -> Value {
    let mut service = Service::start();
    service.import("python").unwrap();
    let made = client(&service).post("/v1/sandboxes", &grower()).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    let change = json!({ "limits": { "memory_bytes": 256 << 20 } });

    send_and_die(&mut service, step, reqwest::Method::PATCH, &path, &change).await;

    let waited = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    assert_eq!(waited["result"], "reached");
    waited["sandbox"].clone()
}

#[tokio::test]
async fn a_limit_that_was_raised_and_not_stored_is_lowered_by_the_next_service() {
    let ended = grower_after("service.update.held").await;

    assert_eq!(ended["limits"]["memory_bytes"], 64 << 20);
    assert_reason(&ended, "oom_killed");
}

/// How one without limits in time ends that is given some by a service which dies at this step. It takes more than five seconds.
async fn timed_after(step: &str, limits: &Value) -> Value {
    let mut service = Service::start();
    let path = sandbox(&client(&service), "sleep 5; i=0; while [ $i -lt 500000 ]; do i=$((i+1)); done; exit 4", json!({})).await;

    send_and_die(&mut service, step, reqwest::Method::PATCH, &path, &json!({ "limits": limits })).await;

    let waited = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    assert_eq!(waited["result"], "reached");
    waited["sandbox"].clone()
}

#[tokio::test]
async fn a_limit_in_time_that_was_not_stored_is_taken_back_by_the_next_service() {
    let ended = timed_after("service.update.held", &json!({ "wall_ms": 4800, "cpu_ms": 100 })).await;

    assert_eq!((&ended["limits"]["wall_ms"], &ended["limits"]["cpu_ms"]), (&Value::Null, &Value::Null));
    assert_exit(&ended, 4);
}

#[tokio::test]
async fn a_limit_in_time_that_was_stored_holds() {
    let ended = timed_after("service.update.stored", &json!({ "wall_ms": 4000 })).await;

    assert_reason(&ended, "wall_timeout");
}

#[tokio::test]
async fn a_limit_that_was_raised_and_stored_holds() {
    let ended = grower_after("service.update.stored").await;

    assert_eq!(ended["limits"]["memory_bytes"], 256 << 20);
    assert_exit(&ended, 0);
}

#[tokio::test]
async fn what_ends_a_sandbox_in_time_does_so_under_the_next_service_too() {
    let mut service = Service::start();
    let before = client(&service);
    let expired = sandbox(&before, "sleep 1000", json!({})).await;
    let idle = sandbox(&before, "sleep 1000", json!({ "idle_timeout_ms": 1000 })).await;
    before.patch(&expired, &json!({ "ttl_ms": 1500 })).await.expect(200);

    service.kill();
    service.start_again().unwrap();

    for (path, reason) in [(&expired, "expired"), (&idle, "idle_timeout")] {
        let waited = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
        assert_reason(&waited["sandbox"], reason);
    }
}

#[tokio::test]
async fn what_was_to_be_removed_at_its_end_is_removed_by_the_next_service() {
    let mut service = Service::start();
    service.kill();
    service.arm("service.settle.told=return");
    service.start_again().unwrap();
    let path = sandbox(&client(&service), "sleep 0.5", json!({ "auto_remove": true })).await;
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();

    client(&service).get(&path).await.problem(404, "not_found");
}

#[tokio::test]
async fn whoever_waits_hears_that_the_service_stops() {
    let mut service = Service::start();
    let client = client(&service);
    let path = sandbox(&client, "sleep 1000", json!({})).await;
    let waiting = tokio::spawn(async move { client.get(&format!("{path}/wait?until=exited&timeout_ms=60000")).await });
    tokio::time::sleep(Duration::from_millis(300)).await;

    tokio::task::spawn_blocking(move || service.stop().unwrap()).await.unwrap();

    let waited = waiting.await.unwrap().expect(200);
    assert_eq!((&waited["result"], &waited["sandbox"]["state"]), (&json!("stopping"), &json!("running")));
}

/// The files in folders of the service's and the keeper's own that images are made of.
fn image_files(service: &Service) -> Vec<String> {
    let names = |folder: &str| {
        let entries = std::fs::read_dir(service.place().data_dir.join(folder)).unwrap();
        entries.map(move |entry| format!("{folder}/{}", entry.unwrap().file_name().display())).collect::<Vec<_>>()
    };
    let mut all = [names("blobs/sha256"), names("images"), names("uploads")].concat();
    all.sort();
    all
}

#[tokio::test]
async fn of_a_commit_that_its_service_died_over_nothing_is_left_and_it_can_be_asked_for_again() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), "echo committed > /tmp/file; exec sleep 1000", json!({})).await;
    client(&service).until(&path, |sandbox| sandbox["state"] == "running").await;
    let (commit, body, before) = (format!("{path}/commit"), json!({ "reference": "made" }), image_files(&service));

    for step in ["service.commit.read", "service.import.kept", "service.import.unpacked"] {
        send_and_die(&mut service, step, reqwest::Method::POST, &commit, &body).await;

        client(&service).get("/v1/images/made").await.problem(404, "image_not_found");
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while image_files(&service) != before {
            assert!(tokio::time::Instant::now() < deadline, "{step}: {:?} is not {before:?}", image_files(&service));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let client = client(&service);
    client.post(&commit, &body).await.expect(201);
    let run = client.run(&json!({ "image": "made", "command": ["cat", "/tmp/file"] })).await;
    assert_eq!(stdout(&run), "committed\n");
}

#[tokio::test]
async fn a_commit_that_was_stored_and_not_answered_is_an_image() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), "exec sleep 1000", json!({})).await;
    client(&service).until(&path, |sandbox| sandbox["state"] == "running").await;
    let body = json!({ "reference": "made", "command": ["echo", "made"] });

    send_and_die(&mut service, "service.import.recorded", reqwest::Method::POST, &format!("{path}/commit"), &body).await;

    let run = client(&service).run(&json!({ "image": "made" })).await;
    assert_eq!(stdout(&run), "made\n");
}

/// Counts its lives in a file, and exits with their number.
const LIVES: &str = "n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; exit $n";

#[tokio::test]
async fn what_a_sandbox_wrote_outlives_the_service_but_not_the_keeper() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), LIVES, json!({ "keep_layer": true })).await;
    client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);

    service.kill();
    service.start_again().unwrap();
    client(&service).post(&format!("{path}/start"), &json!({})).await.expect(200);
    let second = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    assert_exit(&second["sandbox"], 2);

    // Its keeper goes with it.
    service.stop().unwrap();
    service.start_again().unwrap();
    client(&service).post(&format!("{path}/start"), &json!({})).await.problem(409, "layer_lost");
    client(&service).post(&format!("{path}/start"), &json!({ "fresh": true })).await.expect(200);
    let third = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    assert_exit(&third["sandbox"], 1);
}

#[tokio::test]
async fn a_start_that_a_crash_interrupted_is_told_and_can_be_made_again() {
    let mut service = Service::start();
    let path = sandbox(&client(&service), LIVES, json!({ "keep_layer": true })).await;
    client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);

    send_and_die(&mut service, "service.start.claimed", reqwest::Method::POST, &format!("{path}/start"), &json!({})).await;
    let lost = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    // Nothing was started: what was written before is still there.
    client(&service).post(&format!("{path}/start"), &json!({})).await.expect(200);
    let second = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    client(&service).post(&format!("{path}/start"), &json!({ "fresh": true })).await.expect(200);
    let first = client(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);

    assert_reason(&lost["sandbox"], "infra_error");
    assert_exit(&second["sandbox"], 2);
    assert_exit(&first["sandbox"], 1);
}

#[tokio::test]
async fn a_sandbox_that_was_still_being_started_is_told_to_run_by_the_next_service() {
    let mut service = Service::start();
    let logs = service.place().data_dir.join("logs");
    let count = move || std::fs::read_dir(&logs).unwrap().count();
    let before = count();
    // So many files take their time at a fiftieth of a core: the next service finds that the keeper has it, and that it does not run yet.
    let files: Vec<Value> = (0..1024).map(|i| json!({ "path": format!("/work/{i}"), "content": "x".repeat(512) })).collect();
    let request = json!({ "image": "busybox", "command": ["sleep", "1000"], "files": files, "limits": { "cpu_millis": 20 } });
    let asked = {
        let client = client(&service);
        tokio::spawn(async move { client.request(reqwest::Method::POST, "/v1/sandboxes").json(&request).send().await })
    };
    // A launch that lies unread when its sender dies is nobody's: only once it has a log is it the keeper's.
    while count() == before {
        assert!(!asked.is_finished(), "it was answered before the keeper had it");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    service.kill();
    asked.await.unwrap().expect_err("the service dies before it answers");
    service.start_again().unwrap();

    let client = client(&service);
    let list = client.get("/v1/sandboxes").await.expect(200);
    let path = format!("/v1/sandboxes/{}", list["items"][0]["id"].as_str().unwrap());
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    assert_eq!(client.post(&format!("{path}/pause"), &json!({})).await.expect(200)["state"], "paused");
}
