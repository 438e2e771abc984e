//! Several nodes on one database, and one node that is drained, stopped, or short of something: what is accepted is done once, somewhere.
//!
//! A test that has two nodes starts two services on this machine, each with its own keeper and data folder.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fs, time::Duration};

use mayfly_tests::{
    Client, Service, host,
    outcome::{assert_exit, assert_reason, stdout},
    postgres::Database,
    service::{finish, mayfly, shared},
    stream::Frames,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        statvfs::statvfs,
    },
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};

/// Long enough to notice by, and for a loaded machine.
const SOON: Duration = Duration::from_secs(30);
/// A lease as short as it may be: the others need not wait for long.
const LEASE_S: &str = "2";
/// The size of a layer that is nothing else's.
const LAYER_BYTES: u64 = 5 << 20;

fn node(database: &Database) -> Service {
    let service = Service::start_with(&["--database-url", &database.url, "--node-lease-s", LEASE_S]).unwrap();
    service.import("busybox").unwrap();
    service
}

fn client(service: &Service) -> Client {
    Client::of(service.place(), "traveller")
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

/// Accepts a run at this node, and returns its id once it runs.
async fn begin(node: &Service, script: &str, retry: u64) -> String {
    let request = json!({ "image": "busybox", "command": ["sh", "-c", script], "stdin": "given", "wait_ms": 0, "retry": retry });
    let id = client(node).post("/v1/runs", &request).await.expect(202)["id"].as_str().unwrap().to_owned();
    client(node).until(&format!("/v1/runs/{id}"), |run| run["state"] == "running").await;
    id
}

async fn ended(node: &Service, id: &str) -> Value {
    client(node).until(&format!("/v1/runs/{id}"), |run| !run["outcome"].is_null()).await
}

fn node_id(node: &Service) -> String {
    fs::read_to_string(node.place().data_dir.join("node-id")).unwrap().trim().to_owned()
}

/// The whole machine, as far as it is this node's.
fn kill_machine(node: &mut Service) {
    let keeper = node.place().keeper_pid();
    node.kill();
    signal(keeper, Signal::SIGKILL);
}

fn endings(database: &Database, id: &str) -> String {
    database.ask(&format!("select count(*) from events where kind = 'sandbox.ended' and sandbox = '{id}'"))
}

#[tokio::test]
async fn what_a_dead_node_ran_is_done_by_another_if_it_may_be_tried_again() {
    let database = Database::start();
    let mut first = node(&database);
    let script = "read -r line; echo $line; sleep 8; echo done; exit 3";
    let (once, again) = (begin(&first, script, 0).await, begin(&first, script, 1).await);
    // Nobody else could have begun them.
    let second = node(&database);

    kill_machine(&mut first);
    let (once, again) = (ended(&second, &once).await, ended(&second, &again).await);

    assert_reason(&once, "infra_error");
    assert!(once["outcome"]["message"].as_str().unwrap().contains("not heard of"), "{once}");
    assert_exit(&again, 3);
    assert_eq!((stdout(&again), &again["attempt"]), ("given\ndone\n", &json!(2)));
    for run in [&once, &again] {
        assert_eq!(endings(&database, run["id"].as_str().unwrap()), "1");
    }
}

#[tokio::test]
async fn a_run_whose_keeper_died_is_done_under_the_next_if_it_may_be_tried_again() {
    let mut service = Service::start();
    let script = "read -r line; echo $line; sleep 2; exit 3";
    let (once, again) = (begin(&service, script, 0).await, begin(&service, script, 2).await);

    signal(service.place().keeper_pid(), Signal::SIGKILL);
    service.wait().unwrap();
    service.start_again().unwrap();
    let (once, again) = (ended(&service, &once).await, ended(&service, &again).await);

    assert_reason(&once, "infra_error");
    assert_eq!(once["attempt"], 1);
    assert_exit(&again, 3);
    assert_eq!((stdout(&again), &again["attempt"]), ("given\n", &json!(2)));
}

/// A program that ends badly is no failure of ours.
#[tokio::test]
async fn a_real_outcome_is_never_tried_again() {
    let service = shared();
    let request = |script: &str, wall_ms: u64| json!({ "image": "busybox", "command": ["sh", "-c", script], "retry": 5, "limits": { "wall_ms": wall_ms } });
    for (script, wall_ms, reason) in [
        ("exit 1", 30_000, "exited"),
        ("kill -9 $$", 30_000, "signaled"),
        ("sleep 60", 300, "wall_timeout"),
        ("nonsense; exit 127", 30_000, "exited"),
    ] {
        let run = service.client().run(&request(script, wall_ms)).await;
        assert_reason(&run, reason);
        assert_eq!(run["attempt"], 1);
    }
    let absent = json!({ "image": "busybox", "command": ["no-such-program"], "retry": 5 });
    let run = service.client().run(&absent).await;
    assert_reason(&run, "start_failed");
    assert_eq!(run["attempt"], 1);
}

#[tokio::test]
async fn a_node_that_was_taken_for_dead_writes_nothing_over_its_successors_word() {
    let database = Database::start();
    let (first, second) = (node(&database), node(&database));
    // No two attempts say the same. The first one ends while its node's service sleeps, and its keeper knows how.
    let id = begin(&first, "sleep 4; cat /proc/sys/kernel/random/uuid", 1).await;

    signal(first.place().pid, Signal::SIGSTOP);
    let done = ended(&second, &id).await;
    signal(first.place().pid, Signal::SIGCONT);
    let mine = node_id(&first);
    Client::admin(second.place()).until(&format!("/v1/admin/nodes/{mine}"), |node| node["state"] == "serving" && node["live"] == 0).await;

    assert_exit(&done, 0);
    assert_eq!(done["attempt"], 2);
    assert_eq!(client(&second).get(&format!("/v1/runs/{id}")).await.expect(200), done);
    assert_eq!(endings(&database, &id), "1");
    // And it serves again, with its keeper.
    assert_exit(&client(&first).shell("exit 5").await, 5);
    let log = first.log();
    assert!(log.contains("taken for dead"), "{log}");
}

#[tokio::test]
async fn what_a_node_still_has_of_a_case_is_not_taken_for_one_of_the_next_attempt() {
    judges_anew_after(1).await;
}

#[tokio::test]
async fn what_a_node_still_has_of_a_case_is_not_taken_for_one_of_the_attempt_after_the_next() {
    judges_anew_after(2).await;
}

/// The third case of the first attempt has ended, its keeper has the record, and its node dies as soon as it has claimed the run again: after so many attempts have failed, the second of them elsewhere.
async fn judges_anew_after(failed: u64) {
    let database = Database::start();
    let (mut first, mut second) = (node(&database), node(&database));
    first.kill();
    first.arm("service.queue.claimed=1*off->return");
    first.start_again().unwrap();
    // What comes to its door waits in the queue, and only the first node takes it.
    order(&second, "drain").await;
    let (keeper, unique) = (first.place().keeper_pid(), uuid::Uuid::new_v4().as_u128() % 1_000_000_000);
    // The shell's own arguments do not say what the sleeper's do.
    let script = format!("read n; s=3; [ $n != 3 ] || sleep $s.{unique:09}; echo $n");
    let sleeper = format!("sleep 3.{unique:09}");
    let cases: Vec<_> = ["1", "2", "3"].iter().map(|n| json!({ "stdin": format!("{n}\n"), "expected_stdout": n })).collect();
    let request = json!({ "image": "busybox", "command": ["sh", "-c", script], "cases": cases, "retry": failed, "wait_ms": 0 });
    let run = client(&second).post("/v1/runs", &request).await.expect(202);
    let path = format!("/v1/runs/{}", run["id"].as_str().unwrap());

    until_host(|| !host::processes_with(&sleeper).is_empty()).await;
    signal(first.place().pid, Signal::SIGSTOP);
    client(&second).until(&path, |run| run["attempt"] == 2).await;
    until_host(|| host::processes_with(&sleeper).is_empty()).await;
    if failed == 2 {
        order(&second, "resume").await;
        until_host(|| !host::processes_with(&sleeper).is_empty()).await;
        // It takes no third attempt.
        order(&second, "drain").await;
        signal(second.place().keeper_pid(), Signal::SIGKILL);
        second.wait().unwrap();
        second.start_again().unwrap();
        client(&second).until(&path, |run| run["attempt"] == 3).await;
    }
    // It can be told to forget nothing before its service has claimed the run and died.
    signal(keeper, Signal::SIGSTOP);
    signal(first.place().pid, Signal::SIGCONT);
    first.wait().unwrap();
    signal(keeper, Signal::SIGCONT);
    first.arm("");
    first.start_again().unwrap();
    let run = ended(&second, run["id"].as_str().unwrap()).await;

    let told: Vec<_> = run["cases"].as_array().unwrap().iter().map(|case| case["stdout"].as_str().unwrap_or_default()).collect();
    assert_eq!(told, ["1\n", "2\n", "3\n"], "{run:#}");
    assert_eq!((&run["verdict"], &run["attempt"]), (&json!("accepted"), &json!(failed + 1)), "{run:#}");
    assert_eq!(first.place().keeper_pid(), keeper);
}

/// Has a node take nothing more, or again.
async fn order(node: &Service, what: &str) {
    Client::admin(node.place()).post(&format!("/v1/admin/nodes/{}/{what}", node_id(node)), &json!({})).await.expect(200);
}

/// Its service restarts, and in between nobody can tell it; its keeper lives on.
#[tokio::test]
async fn layers_that_are_wanted_no_more_since_their_service_was_away_are_given_up_and_no_others() {
    let database = Database::start();
    let mut first = node(&database);
    let keeper = first.place().keeper_pid();
    let limits = json!({ "memory_bytes": 16 << 20, "disk_bytes": LAYER_BYTES });
    let script = "n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; exit $n";
    let request = json!({ "image": "busybox", "command": ["sh", "-c", script], "keep_layer": true, "limits": limits });
    let mut paths = Vec::new();
    for _ in 0..3 {
        let made = client(&first).post("/v1/sandboxes", &request).await.expect(201);
        let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
        assert_exit(&end_of(&first, &path).await, 1);
        paths.push(path);
    }
    let [deleted, begun_anew, kept] = &paths[..] else { panic!("three of them") };
    until_host(|| layers_of(keeper) == 3).await;
    // Nobody else could have made them.
    let second = node(&database);

    first.kill();
    assert_eq!(client(&second).delete(deleted).await.status, 204);
    client(&second).post(&format!("{begun_anew}/start"), &json!({ "fresh": true })).await.expect(200);
    let anew = end_of(&second, begun_anew).await;
    first.start_again().unwrap();

    until_host(|| layers_of(keeper) == 1).await;
    client(&first).post(&format!("{kept}/start"), &json!({})).await.expect(200);
    assert_exit(&end_of(&first, kept).await, 2);
    assert_exit(&anew, 1);
    client(&second).post(&format!("{begun_anew}/start"), &json!({})).await.expect(200);
    assert_exit(&end_of(&second, begun_anew).await, 2);
    assert_eq!(first.place().keeper_pid(), keeper);
}

async fn end_of(node: &Service, path: &str) -> Value {
    let waited = client(node).get(&format!("{path}/wait?until=exited")).await.expect(200);
    assert_eq!(waited["result"], "reached");
    waited["sandbox"].clone()
}

/// How many file systems of a layer's size a keeper holds.
fn layers_of(keeper: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().flatten();
    // One may be closed since it was listed, and not everything has a size.
    let is_layer =
        |descriptor: &fs::DirEntry| statvfs(&descriptor.path()).is_ok_and(|found| found.blocks() * found.fragment_size() == LAYER_BYTES);
    descriptors.filter(is_layer).count()
}

async fn until_host(is_so: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + SOON;
    while !is_so() {
        assert!(tokio::time::Instant::now() < deadline, "it has not come to that");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_drained_node_takes_nothing_and_what_comes_to_its_door_is_done_elsewhere() {
    let database = Database::start();
    let (first, second) = (node(&database), node(&database));
    let admin = Client::admin(first.place());
    let mine = node_id(&first);
    let running = begin(&first, "sleep 3; exit 4", 0).await;

    let drained = admin.post(&format!("/v1/admin/nodes/{mine}/drain"), &json!({})).await.expect(200);
    let refused = json!({ "image": "busybox", "command": ["true"], "when_full": "refuse" });
    let refused = client(&first).post("/v1/runs", &refused).await;
    let elsewhere = client(&first).shell("echo elsewhere").await;

    assert_eq!((&drained["state"], &drained["evict_at"]), (&json!("drained"), &Value::Null));
    let detail = refused.problem(503, "no_capacity")["detail"].clone();
    assert!(detail.as_str().unwrap().contains("drained") || detail.as_str().unwrap().contains("no room"), "{detail}");
    assert_eq!(stdout(&elsewhere), "elsewhere\n");
    let place = database.ask(&format!("select node from sandboxes where id = '{}'", elsewhere["id"].as_str().unwrap()));
    assert_eq!(place, node_id(&second));
    // What ran goes on to its end.
    assert_exit(&ended(&first, &running).await, 4);
    admin.until(&format!("/v1/admin/nodes/{mine}"), |node| node["live"] == 0).await;

    // Drained is drained, whoever serves there.
    let resumed = admin.post(&format!("/v1/admin/nodes/{mine}/resume"), &json!({})).await.expect(200);
    assert_eq!(resumed["state"], "serving");
    drop(second);
    assert_exit(&client(&first).shell("true").await, 0);
}

#[tokio::test]
async fn what_outlasts_a_drain_is_evicted_when_its_time_is_over() {
    let service = Service::start();
    let admin = Client::admin(service.place());
    let made = service.client();
    let request = json!({ "image": "busybox", "command": ["sleep", "1000"] });
    let id = made.post("/v1/sandboxes", &request).await.expect(201)["id"].as_str().unwrap().to_owned();

    let mine = node_id(&service);
    let mut command = mayfly();
    let arguments = ["node", "drain", &mine, "--evict-after-s", "1", "--url", &service.place().url];
    let (status, said) = finish(command.args(arguments).args(["--token", admin.token().unwrap()]), SOON).unwrap();
    let sandbox = made.until(&format!("/v1/sandboxes/{id}"), |sandbox| !sandbox["outcome"].is_null()).await;

    assert!(status.success() && said.contains("drained"), "{said}");
    assert_reason(&sandbox, "evicted");
    let mut command = mayfly();
    let (status, said) =
        finish(command.args(["node", "list", "--url", &service.place().url, "--token", admin.token().unwrap()]), SOON).unwrap();
    assert!(status.success() && said.contains(&mine) && said.contains("drained"), "{said}");
}

#[tokio::test]
async fn a_drained_node_stays_drained_after_a_restart() {
    let mut service = Service::start();
    let mine = node_id(&service);
    Client::admin(service.place()).post(&format!("/v1/admin/nodes/{mine}/drain"), &json!({})).await.expect(200);
    service.kill();
    service.start_again().unwrap();

    let request = json!({ "image": "busybox", "command": ["true"], "wait_ms": 0 });
    let waiting = client(&service).post("/v1/runs", &request).await.expect(202);
    let ready = client(&service).get("/readyz").await;
    Client::admin(service.place()).post(&format!("/v1/admin/nodes/{mine}/resume"), &json!({})).await.expect(200);

    assert_eq!(waiting["state"], "queued");
    ready.problem(503, "no_capacity");
    assert_exit(&ended(&service, waiting["id"].as_str().unwrap()).await, 0);
}

/// The share that is to be kept free is all of it: so is every machine short.
#[tokio::test]
async fn a_machine_that_is_short_of_disk_or_memory_starts_nothing_and_says_why() {
    for (flag, word) in [("--disk-reserve-percent", "disk"), ("--memory-reserve-percent", "memory")] {
        let service = Service::start_with(&[flag, "100"]).unwrap();
        service.import("busybox").unwrap();
        let mut request = json!({ "image": "busybox", "command": ["true"], "wait_ms": 0 });

        let waiting = client(&service).post("/v1/runs", &request).await.expect(202);
        request["when_full"] = json!("refuse");
        let refused = client(&service).post("/v1/runs", &request).await;

        assert_eq!(waiting["state"], "queued");
        let problem = refused.problem(503, "no_capacity");
        assert!(problem["detail"].as_str().unwrap().contains(word), "{problem}");
        assert_eq!(problem["retryable"], true);
    }
}

#[tokio::test]
async fn a_disk_that_is_short_takes_no_image_but_an_operators() {
    let service = Service::start_with(&["--disk-reserve-percent", "100"]).unwrap();
    let tenant = Client::with_scope(service.place(), "traveller", "images:write");

    let refused = tenant.post_raw("/v1/images/import?reference=mine", "application/x-tar", "x").await;

    let problem = refused.problem(503, "no_capacity");
    assert!(problem["detail"].as_str().unwrap().contains("disk"), "{problem}");
    service.import("busybox").unwrap();
}

#[tokio::test]
async fn a_run_in_progress_comes_to_its_end_before_the_service_stops() {
    let service = Service::start();
    let pid = service.place().pid;
    let client = client(&service);
    let request = json!({ "image": "busybox", "command": ["sh", "-c", "echo begun; sleep 2; exit 6"] });
    let run = tokio::spawn(async move { client.post("/v1/runs", &request).await });
    service.client().until("/v1/sandboxes", |_| service.place().footprint().left().iter().any(|left| left.contains("(sleep)"))).await;

    signal(pid, Signal::SIGTERM);

    assert_exit(&run.await.unwrap().expect(200), 6);
}

#[tokio::test]
async fn what_does_not_end_within_the_grace_is_evicted() {
    let mut service = Service::start_with(&["--stop-grace-s", "1"]).unwrap();
    service.import("busybox").unwrap();
    let id = begin(&service, "sleep 1000", 0).await;

    let status = service.stop().unwrap();
    service.start_again().unwrap();

    assert!(status.success(), "{}", service.log());
    assert_reason(&ended(&service, &id).await, "evicted");
}

#[tokio::test]
async fn a_service_that_drains_goes_on_to_answer_and_takes_no_more_work() {
    let mut service = Service::start_with(&["--drain-s", "600", "--stop-grace-s", "1"]).unwrap();
    service.import("busybox").unwrap();
    let running = begin(&service, "sleep 4; exit 5", 0).await;
    let client = client(&service);

    signal(service.place().pid, Signal::SIGTERM);
    while client.get("/readyz").await.status == 200 {}
    let late = client.post("/v1/runs", &json!({ "image": "busybox", "command": ["sh", "-c", "exit 6"], "wait_ms": 0 })).await.expect(202);
    let refused = client.post("/v1/runs", &json!({ "image": "busybox", "command": ["true"], "when_full": "refuse" })).await;
    let listed = client.get("/v1/sandboxes?limit=1").await;
    let status = service.wait().unwrap();
    service.start_again().unwrap();

    refused.problem(503, "no_capacity");
    listed.expect(200);
    assert!(status.success(), "{}", service.log());
    // Long before the ten minutes were over.
    assert_exit(&ended(&service, &running).await, 5);
    assert_exit(&ended(&service, late["id"].as_str().unwrap()).await, 6);
}

#[tokio::test]
async fn what_another_node_has_is_told_of_as_ended_by_nobody_who_cannot_end_it() {
    let database = Database::start();
    let (first, second) = (node(&database), node(&database));
    let made = client(&first).post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", "1000"] })).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    let run = begin(&first, "sleep 1000", 0).await;
    client(&first).until(&path, |sandbox| sandbox["state"] == "running").await;

    for verb in ["stop", "kill"] {
        client(&second).post(&format!("{path}/{verb}"), &json!({})).await.problem(503, "keeper_unavailable");
    }
    client(&second).post(&format!("{path}/kill"), &json!({ "signal": "USR1" })).await.problem(503, "keeper_unavailable");
    client(&second).delete(&path).await.problem(503, "keeper_unavailable");
    client(&second).delete(&format!("/v1/runs/{run}")).await.problem(503, "keeper_unavailable");
    let told = || {
        database.ask("select coalesce(string_agg(kind, ' '), '') from events where kind in ('sandbox.killed', 'sandbox.stopped', 'sandbox.signaled')")
    };
    let told_by_others = told();
    client(&first).delete(&format!("/v1/runs/{run}")).await.expect(200);

    assert_eq!(told_by_others, "");
    assert_eq!(told(), "sandbox.killed");
    assert_eq!(client(&first).delete(&path).await.status, 204);
}

#[tokio::test]
async fn whoever_waits_at_one_node_hears_of_what_happens_at_another() {
    let database = Database::start();
    let (first, second) = (node(&database), node(&database));
    let made = client(&first).post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", "1000"] })).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    client(&first).until(&path, |sandbox| sandbox["state"] == "running").await;
    let wait = async |until: &str| client(&second).get(&format!("{path}/wait?until={until}&timeout_ms=60000")).await.expect(200);
    // Long enough for the looks to have become rare: the fifth pause between them is of four seconds.
    let later = async || tokio::time::sleep(Duration::from_secs(5)).await;

    let started = std::time::Instant::now();
    let (paused, ()) = tokio::join!(wait("paused"), async {
        later().await;
        client(&first).post(&format!("{path}/pause"), &json!({})).await.expect(200);
    });
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let (removed, ()) = tokio::join!(wait("removed"), async {
        assert_eq!(client(&first).delete(&path).await.status, 204);
    });

    assert_eq!((&paused["result"], &paused["sandbox"]["state"]), (&json!("reached"), &json!("paused")));
    assert_eq!((&removed["result"], &removed["sandbox"]), (&json!("reached"), &Value::Null));
}

/// What was read, and what the gaps tell of, by its numbers.
fn told(frames: &Frames) -> Vec<u64> {
    let missing = frames.gaps.iter().flat_map(|gap| gap["from"].as_u64().unwrap()..=gap["to"].as_u64().unwrap());
    let mut all: Vec<_> = frames.seqs.iter().copied().chain(missing).collect();
    all.sort_unstable();
    all
}

/// What one frame says, and what comes before it: the id of an event.
fn event(text: &str) -> (&str, Value) {
    let (id, data) = text.split_once('\n').unwrap();
    (id.strip_prefix("id: ").unwrap(), serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap())
}

#[tokio::test]
async fn of_a_log_that_another_node_keeps_the_end_is_told_and_in_every_form_what_is_missing() {
    let database = Database::start();
    let first = node(&database);
    let run = client(&first).shell("echo early >&2; flood 300000; echo late").await;
    let id = run["id"].as_str().unwrap();
    // Where it ran, all of it is there.
    let whole = client(&first).log(id).await;
    let second = node(&database);
    let (elsewhere, path) = (client(&second), format!("/v1/sandboxes/{id}/logs"));
    let read = async |form: &str, seen: Option<&str>| {
        let request = elsewhere.request(Method::GET, &path).header("accept", form);
        let request = if let Some(seen) = seen { request.header("last-event-id", seen) } else { request };
        elsewhere.send(request, "GET", &path).await.text
    };

    let socket = elsewhere.log(id).await;
    let mut lines = Frames::default();
    read("application/x-ndjson", None).await.lines().for_each(|line| lines.add(&serde_json::from_str(line).unwrap()));
    let text = read("text/event-stream", None).await;
    let events: Vec<_> = text.split_terminator("\n\n").map(event).collect();
    let plain = read("text/plain", None).await;

    assert_eq!((whole.stdout.len(), &whole.gaps), (300_005, &vec![]));
    assert!(!socket.gaps.is_empty() && told(&socket) == whole.seqs, "{:?} and {:?} of {:?}", socket.seqs, socket.gaps, whole.seqs);
    assert!((64 << 10..300_005).contains(&socket.stdout.len()) && whole.stdout.ends_with(&socket.stdout), "{}", socket.stdout.len());
    assert_eq!((&socket.stderr, socket.end.as_ref()), (&whole.stderr, Some(&run["outcome"])));
    assert_eq!(lines, socket);
    let mut from_events = Frames::default();
    events.iter().for_each(|(_, frame)| from_events.add(frame));
    assert_eq!(from_events, socket);
    assert!(plain.ends_with("late\n") && plain.len() == socket.stdout.len() + socket.stderr.len());
    // A browser that has heard of the gap goes on behind it.
    let (place, (seen, gap)) = events.iter().enumerate().find(|(_, (_, frame))| frame.get("gap").is_some()).unwrap();
    assert_eq!(seen.parse(), Ok(gap["gap"]["to"].as_u64().unwrap()));
    let rest = read("text/event-stream", Some(seen)).await;
    assert_eq!(rest.split_terminator("\n\n").map(event).collect::<Vec<_>>(), events[place + 1..]);
}
