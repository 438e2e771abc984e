//! Pools: what a tenant keeps ready is there before it is asked for, is given to one who may have it and to nobody else, and is in nobody's way.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeSet, time::Duration};

use mayfly_tests::{
    Answer, Client, Service, image,
    outcome::{assert_exit, assert_reason},
    service::{self, Place, shared},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(90);
const SANDBOXES: &str = "/v1/sandboxes";

/// A small sandbox that runs this script.
fn template(script: &str) -> Value {
    json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": { "memory_bytes": 16 << 20, "cpu_millis": 50 } })
}

/// One that lasts.
fn lasting() -> Value {
    template("echo started; exec sleep 1000")
}

/// The same request with more in it.
fn with(mut request: Value, more: Value) -> Value {
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

async fn make(client: &Client, name: &str, size: u64, template: &Value) -> Value {
    client.post("/v1/pools", &json!({ "name": name, "size": size, "template": template })).await.expect(201)
}

async fn pool(client: &Client, name: &str) -> Value {
    client.get(&format!("/v1/pools/{name}")).await.expect(200)
}

/// The pool as soon as it is so.
async fn until(client: &Client, name: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + SOON;
    loop {
        let pool = pool(client, name).await;
        if is_it(&pool) {
            return pool;
        }
        assert!(Instant::now() < deadline, "waited in vain: {pool:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn filled(client: &Client, name: &str) -> Value {
    until(client, name, |pool| pool["ready"] == pool["size"]).await
}

/// All that waits for this client's tenant, as an operator sees it.
async fn waiting(client: &Client) -> BTreeSet<String> {
    let path = format!("/v1/admin/sandboxes?kind=pooled&tenant={}", tenant_of(client));
    let found = Client::admin(client.place()).get(&path).await.expect(200);
    let lives = |sandbox: &&Value| sandbox["outcome"].is_null();
    found["items"].as_array().unwrap().iter().filter(lives).map(|sandbox| text(&sandbox["id"])).collect()
}

/// Waits until this is what waits.
async fn until_waiting(client: &Client, is_it: impl Fn(&BTreeSet<String>) -> bool) -> BTreeSet<String> {
    let deadline = Instant::now() + SOON;
    loop {
        let now = waiting(client).await;
        if is_it(&now) {
            return now;
        }
        assert!(Instant::now() < deadline, "waited in vain: {now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn tenant_of(client: &Client) -> String {
    let claims = client.token().unwrap().split('.').nth(1).unwrap();
    let claims = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, claims).unwrap();
    text(&serde_json::from_slice::<Value>(&claims).unwrap()["tenant"])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn at(value: &Value) -> OffsetDateTime {
    OffsetDateTime::parse(value.as_str().unwrap(), &Rfc3339).unwrap()
}

async fn take(client: &Client, request: &Value) -> Value {
    client.post(SANDBOXES, request).await.expect(201)
}

async fn post(client: &Client, key: &str, request: &Value) -> Answer {
    client.send(client.request(Method::POST, SANDBOXES).header("idempotency-key", key).json(request), "POST", SANDBOXES).await
}

async fn delete(client: &Client, sandbox: &Value) {
    let path = format!("{SANDBOXES}/{}", text(&sandbox["id"]));
    assert_eq!(client.delete(&path).await.status, 204);
}

async fn gone(client: &Client, name: &str) {
    assert_eq!(client.delete(&format!("/v1/pools/{name}")).await.status, 204);
}

async fn used(client: &Client, scope: &str) -> Value {
    client.get("/v1/quota").await.expect(200)[scope]["used"].clone()
}

/// A tenant with these quotas, and two of its principals.
async fn principals(place: &Place, quotas: Value, of_principals: Value) -> [Client; 2] {
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let request = json!({ "id": tenant, "quotas": quotas, "principal_quotas": of_principals });
    Client::admin(place).post("/v1/admin/tenants", &request).await.expect(201);
    ["alice", "bob"].map(|principal| Client::of_principal(place, &tenant, principal))
}

/// A service of one's own with `busybox`.
fn own(args: &[&str]) -> Service {
    let service = Service::start_with(args).unwrap();
    service.import("busybox").unwrap();
    service
}

async fn series(service: &Service, name: &str) -> f64 {
    let text = reqwest::get(format!("{}/metrics", service.place().metrics_url)).await.unwrap().text().await.unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap()
}

#[tokio::test]
async fn a_pool_fills_and_what_it_keeps_is_taken_by_a_request_that_is_like_it() {
    let client = shared().client();
    let made = client.post("/v1/pools", &json!({ "name": "p", "size": 2, "template": lasting(), "ready_output": "started" })).await;
    assert_eq!(made.header("location"), "/v1/pools/p");
    made.expect(201);
    filled(&client, "p").await;
    let waited = waiting(&client).await;
    assert_eq!(waited.len(), 2);

    let own = json!({ "name": "mine", "labels": { "a": "b" }, "ttl_ms": 600_000 });
    let taken = take(&client, &with(lasting(), own)).await;

    assert!(waited.contains(&text(&taken["id"])), "{taken}");
    assert_eq!((&taken["from_pool"]["name"], &taken["state"], &taken["kind"]), (&json!("p"), &json!("running"), &json!("sandbox")));
    assert_eq!((&taken["name"], &taken["labels"]), (&json!("mine"), &json!({ "a": "b" })));
    assert!(at(&taken["started_at"]) < at(&taken["created_at"]), "nothing was started for it: {taken}");
    let list = client.get(SANDBOXES).await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1, "what waits is in no list");
    let logged = client.get(&format!("{SANDBOXES}/mine/logs?follow=false")).await;
    assert!(logged.text.contains("started"), "what it wrote before stays in its log: {}", logged.text);
    // Another is started in its place.
    let refilled = until(&client, "p", |pool| pool["ready"] == 2).await;
    assert_eq!((&refilled["taken"], &refilled["missed"], &refilled["last_failure"]), (&json!(1), &json!(0), &Value::Null));
    assert!(waiting(&client).await.is_disjoint(&BTreeSet::from([text(&taken["id"])])));
    let events = client.get("/v1/events?kind=sandbox.created").await.expect(200);
    assert_eq!(events["items"].as_array().unwrap().len(), 1, "{events}");
    assert_eq!((&events["items"][0]["data"]["pool"], &events["items"][0]["actor"]["principal"]), (&json!("p"), &json!("tester")));
    gone(&client, "p").await;
}

#[tokio::test]
async fn a_request_that_differs_in_what_cannot_be_given_later_is_served_by_a_sandbox_of_its_own() {
    let client = shared().client();
    make(&client, "p", 1, &lasting()).await;
    filled(&client, "p").await;

    for other in
        [json!({ "env": { "A": "b" } }), json!({ "limits": { "memory_bytes": 32 << 20, "cpu_millis": 50 } }), json!({ "stdin": "x" })]
    {
        let made = take(&client, &with(lasting(), other.clone())).await;
        assert_eq!(made["from_pool"], Value::Null, "{other}");
        delete(&client, &made).await;
    }
    // The control.
    assert_eq!(take(&client, &lasting()).await["from_pool"]["name"], "p");
    gone(&client, "p").await;
}

#[tokio::test]
async fn a_pool_can_be_named_and_is_left_for_a_new_sandbox_when_it_has_none() {
    let client = shared().client();
    make(&client, "p", 1, &with(lasting(), json!({ "labels": { "of": "template", "a": "1" }, "ttl_ms": 300_000 }))).await;
    filled(&client, "p").await;

    let request = json!({ "pool": "p", "labels": { "a": "2" } });
    let ready = take(&client, &request).await;
    client.patch("/v1/pools/p", &json!({ "size": 0 })).await.expect(200);
    until_waiting(&client, BTreeSet::is_empty).await;
    let fresh = take(&client, &request).await;

    assert_eq!(ready["from_pool"]["name"], "p");
    assert_eq!(fresh["from_pool"], Value::Null);
    for sandbox in [&ready, &fresh] {
        assert_eq!((&sandbox["labels"], &sandbox["ttl_ms"]), (&json!({ "of": "template", "a": "2" }), &json!(300_000)));
        assert_eq!(sandbox["command"], json!(["sh", "-c", "echo started; exec sleep 1000"]));
    }
    until(&client, "p", |pool| pool["missed"] == 1).await;
    client.post(SANDBOXES, &json!({ "pool": "none" })).await.problem(404, "pool_not_found");
    client.post(SANDBOXES, &json!({ "pool": "p", "command": ["true"] })).await.problem(422, "invalid_request");
    gone(&client, "p").await;
}

#[tokio::test]
async fn an_interpreter_has_its_imports_done_before_anybody_asks_for_it() {
    let client = shared().client();
    let script = "import json, decimal, email, http.client\nprint('imported', flush=True)\nimport time\ntime.sleep(1000)";
    let request = json!({ "image": "python", "command": ["python3", "-c", script], "limits": { "memory_bytes": 64 << 20 } });
    client.post("/v1/pools", &json!({ "name": "py", "size": 1, "template": request, "ready_output": "imported" })).await.expect(201);
    filled(&client, "py").await;

    let taken = take(&client, &request).await;

    assert_eq!(taken["from_pool"]["name"], "py");
    let path = format!("{SANDBOXES}/{}/logs?follow=false&stream=stdout", text(&taken["id"]));
    let log = client.send(client.request(Method::GET, &path).header("accept", "application/x-ndjson"), "GET", &path).await;
    let logged: Value = serde_json::from_str(log.text.lines().next().unwrap()).unwrap();
    assert_eq!(logged["data"], "imported\n", "{}", log.text);
    assert!(at(&logged["at"]) < at(&taken["created_at"]), "its start-up was paid before the request: {logged} {taken}");
    gone(&client, "py").await;
    delete(&client, &taken).await;
}

#[tokio::test]
async fn what_is_not_ready_is_not_taken() {
    let client = shared().client();
    let request = template("while [ ! -e /go ]; do sleep 0.05; done; echo ready; exec sleep 1000");
    client.post("/v1/pools", &json!({ "name": "p", "size": 1, "template": request, "ready_output": "ready" })).await.expect(201);
    until(&client, "p", |pool| pool["starting"] == 1).await;

    let made = take(&client, &request).await;

    assert_eq!(made["from_pool"], Value::Null);
    assert_eq!(until(&client, "p", |pool| pool["missed"] == 1).await["ready"], 0);
    gone(&client, "p").await;
    until_waiting(&client, BTreeSet::is_empty).await;
}

#[tokio::test]
async fn a_template_that_comes_to_nothing_says_why_and_is_tried_less_and_less_often() {
    let (client, begun) = (shared().client(), Instant::now());
    make(&client, "bad", 3, &template("echo no such module >&2; exit 7")).await;
    let slow = json!({ "name": "slow", "size": 1, "template": lasting(), "ready_output": "never written", "ready_within_ms": 300 });
    client.post("/v1/pools", &slow).await.expect(201);

    let bad = until(&client, "bad", |pool| pool["failures"].as_u64() >= Some(3)).await;
    let slow = until(&client, "slow", |pool| pool["failures"].as_u64() >= Some(1)).await;

    assert!(begun.elapsed() > Duration::from_secs(2), "between the first three are a second and two: {:?}", begun.elapsed());
    assert_eq!((&bad["last_failure"]["reason"], &bad["last_failure"]["stderr"]), (&json!("exited"), &json!("no such module\n")));
    assert_eq!((&slow["last_failure"]["reason"], &slow["ready"]), (&json!("not_ready"), &json!(0)));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(
        pool(&client, "bad").await["failures"].as_u64() <= Some(4),
        "the fourth comes four seconds after the third, the fifth eight after that"
    );
    // Nobody was told of them, and they are billed.
    assert_eq!(client.get("/v1/events?kind=sandbox.*").await.expect(200)["items"], json!([]));
    for name in ["bad", "slow"] {
        gone(&client, name).await;
    }
    until_waiting(&client, BTreeSet::is_empty).await;
    let usage = client.get("/v1/usage?group_by=kind").await.expect(200);
    assert_eq!(usage["items"][0]["kind"], "pooled", "{usage}");
}

#[tokio::test]
async fn none_is_given_to_two_however_many_ask_at_once() {
    let client = shared().client();
    make(&client, "p", 8, &lasting()).await;
    let before = filled(&client, "p").await;
    assert_eq!(before["ready"], 8);

    let asked = (0..50).map(|_| {
        let client = client.clone();
        tokio::spawn(async move { take(&client, &lasting()).await })
    });
    let asked: Vec<_> = asked.collect();
    let mut made = Vec::new();
    for answer in asked {
        made.push(answer.await.unwrap());
    }

    let ids: BTreeSet<String> = made.iter().map(|sandbox| text(&sandbox["id"])).collect();
    assert_eq!(ids.len(), 50);
    let pooled = made.iter().filter(|sandbox| !sandbox["from_pool"].is_null()).count();
    assert!(pooled >= 8, "{pooled}");
    let after = until(&client, "p", |pool| pool["taken"].as_u64().unwrap() + pool["missed"].as_u64().unwrap() == 50).await;
    assert_eq!(after["taken"], json!(pooled));
    gone(&client, "p").await;
    until_waiting(&client, BTreeSet::is_empty).await;
    assert_eq!(used(&client, "tenant").await["sandboxes"], 50, "each is counted once");
    for sandbox in &made {
        delete(&client, sandbox).await;
    }
    assert_eq!(used(&client, "tenant").await["sandboxes"], 0);
}

#[tokio::test]
async fn what_waits_counts_and_a_pool_is_no_way_around_a_quota() {
    let place = shared().place;
    let [alice, bob] = principals(&place, json!({ "sandboxes": 3, "pools": 1, "pool_sandboxes": 2 }), json!({ "sandboxes": 2 })).await;
    make(&alice, "p", 2, &lasting()).await;
    filled(&alice, "p").await;
    for (scope, client) in [("tenant", &bob), ("principal", &alice)] {
        let used = used(client, scope).await;
        assert_eq!((&used["sandboxes"], &used["memory_bytes"], &used["cpu_millis"]), (&json!(2), &json!(32 << 20), &json!(100)), "{scope}");
    }
    let quota = alice.get("/v1/quota").await.expect(200);
    assert_eq!((&quota["tenant"]["used"]["pools"], &quota["tenant"]["used"]["pool_sandboxes"]), (&json!(1), &json!(2)));

    let second = alice.post("/v1/pools", &json!({ "name": "q", "size": 0, "template": lasting() })).await.problem(429, "quota_exceeded");
    let larger = alice.patch("/v1/pools/p", &json!({ "size": 3 })).await.problem(429, "quota_exceeded");
    let third = take(&bob, &template("exec sleep 1000")).await;
    let fourth = bob.post(SANDBOXES, &template("exec sleep 1001")).await.problem(429, "quota_exceeded");

    assert_eq!((&second["quota"], &larger["quota"]), (&json!("pools"), &json!("pool_sandboxes")));
    assert_eq!((&fourth["quota"], &fourth["scope"]), (&json!("sandboxes"), &json!("tenant")));
    // What is taken was counted for the tenant already, and is bob's from then on.
    let taken = take(&bob, &lasting()).await;
    assert_eq!(taken["from_pool"]["name"], "p");
    assert_eq!((&used(&bob, "principal").await["sandboxes"], &used(&bob, "tenant").await["sandboxes"]), (&json!(2), &json!(3)));
    assert_eq!(used(&alice, "principal").await["sandboxes"], 1);
    // As many as he may have: what is ready is none of his.
    let refused = bob.post(SANDBOXES, &lasting()).await.problem(429, "quota_exceeded");
    assert_eq!(refused["quota"], "sandboxes");
    assert_eq!(pool(&alice, "p").await["taken"], 1);
    // The pool cannot be filled, and says why.
    let short = until(&alice, "p", |pool| !pool["last_failure"].is_null()).await;
    assert_eq!((&short["last_failure"]["reason"], &short["ready"]), (&json!("quota_exceeded"), &json!(1)));
    gone(&alice, "p").await;
    until_waiting(&alice, BTreeSet::is_empty).await;
    for sandbox in [&third, &taken] {
        delete(&bob, sandbox).await;
    }
    for (scope, client) in [("tenant", &bob), ("principal", &alice), ("principal", &bob)] {
        assert_eq!(used(client, scope).await["sandboxes"], 0, "{scope}");
    }
}

#[tokio::test]
async fn rates_and_largest_values_hold_for_whoever_takes() {
    let place = shared().place;
    let [alice, bob] = principals(&place, json!({}), json!({})).await;
    make(&alice, "p", 1, &lasting()).await;
    filled(&alice, "p").await;
    assert_eq!(used(&alice, "tenant").await["runs_per_day"], 0, "nobody has asked for anything");
    let admin = Client::admin(&place);
    let path = format!("/v1/admin/tenants/{}/principals/bob", tenant_of(&bob));
    bob.get("/v1/quota").await.expect(200);
    for (quota, value) in [("runs_per_minute", json!(0)), ("largest_memory_bytes", json!(8 << 20)), ("isolations", json!(["gvisor"]))] {
        admin.patch(&path, &json!({ "quotas": { quota: value } })).await.expect(200);
        let answer = bob.post(SANDBOXES, &lasting()).await;
        assert_eq!((answer.status, &answer.body["quota"]), (429, &json!(quota)), "{}", answer.text);
        admin.patch(&path, &json!({ "quotas": { quota: "default" } })).await.expect(200);
    }

    let taken = take(&bob, &lasting()).await;

    assert_eq!(taken["from_pool"]["name"], "p", "and it was there all the time");
    assert_eq!((&used(&bob, "tenant").await["runs_per_day"], &used(&bob, "principal").await["runs_per_day"]), (&json!(1), &json!(1)));
    gone(&alice, "p").await;
}

#[tokio::test]
async fn what_waits_is_nobodys_and_is_never_another_tenants() {
    let service = shared();
    let (client, stranger) = (service.client(), service.client());
    make(&client, "p", 1, &lasting()).await;
    filled(&client, "p").await;
    let hidden = waiting(&client).await.pop_first().unwrap();

    for client in [&client, &stranger] {
        for path in ["", "/logs", "/stats", "/execs", "/wait"] {
            client.get(&format!("{SANDBOXES}/{hidden}{path}")).await.problem(404, "not_found");
        }
        client.delete(&format!("{SANDBOXES}/{hidden}")).await.problem(404, "not_found");
        client.patch(&format!("{SANDBOXES}/{hidden}"), &json!({ "name": "x" })).await.problem(404, "not_found");
        client.post(&format!("{SANDBOXES}/{hidden}/kill"), &json!({})).await.problem(404, "not_found");
        client.post(&format!("{SANDBOXES}/{hidden}/execs"), &json!({ "command": ["true"] })).await.problem(404, "not_found");
        client.get(&format!("/v1/runs/{hidden}")).await.problem(404, "not_found");
    }
    stranger.get("/v1/pools/p").await.problem(404, "pool_not_found");
    assert_eq!(stranger.get("/v1/pools").await.expect(200)["items"], json!([]));
    stranger.post(SANDBOXES, &json!({ "pool": "p" })).await.problem(404, "pool_not_found");
    let theirs = take(&stranger, &lasting()).await;
    assert_eq!(theirs["from_pool"], Value::Null);

    // The control.
    let taken = take(&client, &lasting()).await;
    assert_eq!(taken["id"], json!(hidden));
    client.get(&format!("{SANDBOXES}/{hidden}")).await.expect(200);
    gone(&client, "p").await;
}

#[tokio::test]
async fn every_time_of_a_sandbox_begins_when_it_is_taken() {
    let client = shared().client();
    let limits = json!({ "limits": { "memory_bytes": 16 << 20, "cpu_millis": 50, "wall_ms": 2500 } });
    make(&client, "p", 1, &with(lasting(), limits.clone())).await;
    filled(&client, "p").await;
    // Longer than all of its wall limit.
    tokio::time::sleep(Duration::from_secs(3)).await;

    let taken = take(&client, &with(with(lasting(), limits), json!({ "ttl_ms": 60_000 }))).await;

    assert!(taken["from_pool"]["waited_ms"].as_u64() >= Some(2900), "{taken}");
    assert_eq!(at(&taken["expires_at"]) - at(&taken["created_at"]), time::Duration::minutes(1));
    assert!(at(&taken["created_at"]) - at(&taken["started_at"]) >= time::Duration::milliseconds(2900), "{taken}");
    let ended = client.until(&format!("{SANDBOXES}/{}", text(&taken["id"])), |sandbox| !sandbox["outcome"].is_null()).await;
    assert_reason(&ended, "wall_timeout");
    let wall_ms = ended["outcome"]["usage"]["wall_ms"].as_u64().unwrap();
    assert!((2490..3500).contains(&wall_ms), "{wall_ms}");
    assert!(at(&ended["finished_at"]) - at(&ended["created_at"]) >= time::Duration::milliseconds(2480));
    gone(&client, "p").await;

    let idle = with(lasting(), json!({ "idle_timeout_ms": 1000 }));
    make(&client, "q", 1, &idle).await;
    filled(&client, "q").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let taken = take(&client, &idle).await;
    assert_eq!(taken["from_pool"]["name"], "q", "nobody is idle who waits");
    let ended = client.until(&format!("{SANDBOXES}/{}", text(&taken["id"])), |sandbox| !sandbox["outcome"].is_null()).await;
    assert_reason(&ended, "idle_timeout");
    gone(&client, "q").await;
}

#[tokio::test]
async fn what_is_taken_is_in_every_way_a_sandbox() {
    let client = shared().client();
    make(&client, "p", 1, &lasting()).await;
    filled(&client, "p").await;
    let taken = take(&client, &with(lasting(), json!({ "name": "own" }))).await;
    assert_eq!(taken["from_pool"]["name"], "p");

    let exec = client.post(&format!("{SANDBOXES}/own/execs"), &json!({ "command": ["echo", "hi"] })).await.expect(200);
    assert_exit(&exec, 0);
    client.post(&format!("{SANDBOXES}/own/pause"), &json!({})).await.expect(200);
    client.post(&format!("{SANDBOXES}/own/resume"), &json!({})).await.expect(200);
    let changed =
        client.patch(&format!("{SANDBOXES}/own"), &json!({ "limits": { "memory_bytes": 32 << 20 }, "ttl_ms": 90_000 })).await.expect(200);
    assert_eq!(changed["limits"]["memory_bytes"], 32 << 20);
    client.post(SANDBOXES, &with(lasting(), json!({ "name": "own" }))).await.problem(409, "conflict");
    let stopped = client.post(&format!("{SANDBOXES}/own/stop"), &json!({ "grace_ms": 0 })).await.expect(200);
    assert_reason(&stopped, "stopped_by_user");
    assert!(stopped["outcome"]["usage"]["wall_ms"].as_u64().unwrap() < 60_000);
    assert_eq!(client.delete(&format!("{SANDBOXES}/own")).await.status, 204);
    let ended = client.get("/v1/events?kind=sandbox.ended").await.expect(200);
    assert_eq!(ended["items"].as_array().unwrap().len(), 1, "{ended}");
    gone(&client, "p").await;
    until_waiting(&client, BTreeSet::is_empty).await;
    assert_eq!(used(&client, "tenant").await["memory_bytes"], 0);
}

#[tokio::test]
async fn a_repeated_request_is_answered_with_the_sandbox_that_the_first_one_took() {
    let client = shared().client();
    make(&client, "p", 2, &lasting()).await;
    filled(&client, "p").await;
    let key = uuid::Uuid::new_v4().to_string();

    let first = post(&client, &key, &lasting()).await.expect(201);
    let again = post(&client, &key, &lasting()).await;

    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.expect(201)["id"], first["id"]);
    assert_eq!(pool(&client, "p").await["taken"], 1);
    let body = json!({ "name": "q", "size": 0, "template": lasting() });
    let made = |key: &'static str| {
        client.send(client.request(Method::POST, "/v1/pools").header("idempotency-key", key).json(&body), "POST", "/v1/pools")
    };
    let (one, same) = (made("k").await.expect(201), made("k").await.expect(201));
    assert_eq!(one["id"], same["id"]);
    made("l").await.problem(409, "pool_exists");
    gone(&client, "p").await;
    gone(&client, "q").await;
}

#[tokio::test]
async fn a_smaller_pool_gives_up_what_it_has_too_much_and_none_keeps_anything() {
    let client = shared().client();
    make(&client, "p", 3, &lasting()).await;
    filled(&client, "p").await;

    assert_eq!(client.patch("/v1/pools/p", &json!({ "size": 1 })).await.expect(200)["size"], 1);
    let left = until_waiting(&client, |left| left.len() == 1).await;
    assert_eq!(pool(&client, "p").await["failures"], 0, "what is given up is no failure");
    gone(&client, "p").await;

    until_waiting(&client, BTreeSet::is_empty).await;
    assert_eq!(left.len(), 1);
    client.get("/v1/pools/p").await.problem(404, "pool_not_found");
    client.delete("/v1/pools/p").await.problem(404, "pool_not_found");
    let events = client.get("/v1/events?kind=pool.*").await.expect(200);
    let kinds: Vec<_> = events["items"].as_array().unwrap().iter().rev().map(|event| event["kind"].clone()).collect();
    assert_eq!(kinds, ["pool.created", "pool.changed", "pool.removed"]);
    let footing = used(&client, "tenant").await;
    assert_eq!((&footing["sandboxes"], &footing["memory_bytes"], &footing["pools"]), (&json!(0), &json!(0), &json!(0)));
}

#[tokio::test]
async fn pools_are_listed_by_name_page_by_page() {
    let client = shared().client();
    for name in ["b", "a", "c"] {
        make(&client, name, 0, &lasting()).await;
    }
    let first = client.get("/v1/pools?limit=2").await.expect(200);
    let second = client.get(&format!("/v1/pools?limit=2&cursor={}", text(&first["next_cursor"]))).await.expect(200);
    let names = |page: &Value| page["items"].as_array().unwrap().iter().map(|pool| text(&pool["name"])).collect::<Vec<_>>();
    assert_eq!((names(&first), names(&second), &second["next_cursor"]), (vec!["a".into(), "b".into()], vec!["c".into()], &Value::Null));
    let shown = &first["items"][0]["template"];
    assert_eq!((&shown["image"], &shown["limits"]["pids"], &shown["files"]), (&json!("busybox"), &json!(64), &Value::Null));
    client.post("/v1/pools", &json!({ "name": "d", "size": 1, "template": { "image": "none" } })).await.problem(404, "image_not_found");
    let refused = json!({ "name": "d", "size": 1, "template": with(lasting(), json!({ "volumes": [] })) });
    assert_eq!(client.post("/v1/pools", &refused).await.problem(422, "invalid_request")["field"], "template.volumes");
    for name in ["a", "b", "c"] {
        gone(&client, name).await;
    }
}

#[tokio::test]
async fn what_waits_is_of_the_image_that_its_name_means_now() {
    let client = shared().client();
    let (folder, archive) = (service::folder().unwrap(), image::archive("busybox").unwrap());
    let import = async |path: &std::path::Path| {
        let bytes = std::fs::read(path).unwrap();
        client.post_raw("/v1/images/import?reference=mine", "application/x-tar", bytes).await.expect(201)["digest"].clone()
    };
    let before = import(&archive).await;
    let request = with(lasting(), json!({ "image": "mine" }));
    make(&client, "p", 1, &request).await;
    filled(&client, "p").await;
    let old = waiting(&client).await;

    let layout = folder.path().join("other");
    image::variant(&archive, &layout, &["--config.env", "A=b"]).unwrap();
    let other = folder.path().join("other.tar");
    image::run(std::process::Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&other).arg(".")).unwrap();
    let now = import(&other).await;
    let at_once = take(&client, &request).await;
    until_waiting(&client, |waiting| waiting.len() == 1 && waiting.is_disjoint(&old)).await;
    filled(&client, "p").await;
    let later = take(&client, &request).await;

    assert_ne!(before, now);
    assert_eq!(at_once["image"]["digest"], now, "{at_once}");
    assert_eq!((&later["image"]["digest"], &later["from_pool"]["name"]), (&now, &json!("p")));
    gone(&client, "p").await;
    for sandbox in [&at_once, &later] {
        delete(&client, sandbox).await;
    }
}

#[tokio::test]
async fn a_suspended_tenant_keeps_nothing_ready() {
    let service = shared();
    let client = service.client();
    make(&client, "p", 1, &lasting()).await;
    filled(&client, "p").await;
    let (admin, path) = (Client::admin(&service.place), format!("/v1/admin/tenants/{}", tenant_of(&client)));

    admin.post(&format!("{path}/suspend"), &json!({})).await.expect(200);
    client.post(SANDBOXES, &lasting()).await.problem(403, "suspended");
    client.post(SANDBOXES, &json!({ "pool": "p" })).await.problem(403, "suspended");
    until_waiting(&client, BTreeSet::is_empty).await;
    admin.post(&format!("{path}/resume"), &json!({})).await.expect(200);

    filled(&client, "p").await;
    gone(&client, "p").await;
}

#[tokio::test]
async fn what_dies_while_it_waits_is_replaced() {
    let service = own(&[]);
    let client = service.client();
    make(&client, "p", 1, &template("echo $$; exec sleep 987654")).await;
    filled(&client, "p").await;
    let before = waiting(&client).await;
    let payloads = mayfly_tests::host::processes_with("sleep 987654");

    for pid in payloads {
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).ok();
    }
    let after = until_waiting(&client, |now| now.len() == 1 && now.is_disjoint(&before)).await;

    let pool = filled(&client, "p").await;
    assert_eq!(pool["last_failure"]["reason"], "signaled");
    assert_eq!(take(&client, &json!({ "pool": "p" })).await["id"], json!(after.first()));
}

#[tokio::test]
async fn what_waits_is_given_up_before_a_request_has_to_wait_for_its_room() {
    let service = own(&["--capacity-memory-bytes", "134217728", "--capacity-cpu-millis", "4000"]);
    let client = service.client();
    let half = with(lasting(), json!({ "limits": { "memory_bytes": 64 << 20, "cpu_millis": 50 } }));
    make(&client, "p", 2, &half).await;
    filled(&client, "p").await;

    let run = json!({ "image": "busybox", "command": ["true"], "limits": { "memory_bytes": 128 << 20 }, "when_full": "refuse" });
    assert_exit(&client.run(&run).await, 0);
    let given_up = series(&service, "sandbox_pool_given_up_total").await;
    assert_eq!(given_up, 2.0);
    assert_eq!(pool(&client, "p").await["failures"], 0);
    // When nobody needs it any more the room is the pool's again, and less than all of it costs it less.
    filled(&client, "p").await;
    let stays = json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "memory_bytes": 64 << 20 }, "when_full": "refuse" });
    let made = take(&client, &stays).await;
    assert_eq!(made["state"], "running");
    assert_eq!(waiting(&client).await.len(), 1);
    // What no giving up makes room for gives up nothing.
    client
        .post(
            "/v1/runs",
            &json!({ "image": "busybox", "command": ["true"], "limits": { "memory_bytes": 128 << 20 }, "when_full": "refuse" }),
        )
        .await
        .problem(503, "no_capacity");
    assert_eq!(waiting(&client).await.len(), 1);
}

#[tokio::test]
async fn a_drained_node_keeps_nothing_ready() {
    let service = own(&["--node-lease-s", "2"]);
    let client = service.client();
    make(&client, "p", 1, &lasting()).await;
    filled(&client, "p").await;
    let node = std::fs::read_to_string(service.place().data_dir.join("node-id")).unwrap();
    let (admin, path) = (Client::admin(service.place()), format!("/v1/admin/nodes/{}", node.trim()));

    admin.post(&format!("{path}/drain"), &json!({})).await.expect(200);
    until_waiting(&client, BTreeSet::is_empty).await;
    admin.post(&format!("{path}/resume"), &json!({})).await.expect(200);

    filled(&client, "p").await;
}

#[tokio::test]
async fn what_waits_goes_on_waiting_while_the_service_is_killed_and_ends_with_it_when_it_stops() {
    let mut service = own(&[]);
    let client = service.client();
    let tenant = tenant_of(&client);
    let body = json!({ "name": "p", "size": 2, "template": lasting(), "ready_output": "started" });
    client.post("/v1/pools", &body).await.expect(201);
    filled(&client, "p").await;
    let before = waiting(&client).await;

    service.kill();
    service.start_again().unwrap();
    let client = Client::of(service.place(), &tenant);
    let taken = until_taken(&client, &lasting()).await;

    assert!(before.contains(&text(&taken["id"])), "{taken}");
    assert!(at(&taken["started_at"]) < at(&taken["created_at"]));
    filled(&client, "p").await;
    let footprint = service.place().footprint();
    assert!(service.stop().unwrap().success());
    let left = footprint.wait_until_gone(Duration::from_secs(30));
    assert!(left.is_empty(), "{left:#?}");
    service.start_again().unwrap();
    let client = Client::of(service.place(), &tenant);
    filled(&client, "p").await;
    assert!(waiting(&client).await.is_disjoint(&before));
    assert_eq!(used(&client, "tenant").await["sandboxes"], 2);
}

/// A sandbox that was taken from a pool: what an earlier service left is known to this one a moment after it serves.
async fn until_taken(client: &Client, request: &Value) -> Value {
    let deadline = Instant::now() + SOON;
    loop {
        let made = take(client, request).await;
        if !made["from_pool"].is_null() {
            return made;
        }
        delete(client, &made).await;
        assert!(Instant::now() < deadline, "nothing is ready for it: {:#}", pool(client, "p").await);
    }
}

#[tokio::test]
async fn a_service_that_dies_while_one_is_taken_loses_nothing_and_gives_it_once() {
    let mut service = own(&[]);
    service.stop().unwrap();
    service.arm("service.pool.taken=1*return");
    service.start_again().unwrap();
    let client = service.client();
    let tenant = tenant_of(&client);
    make(&client, "p", 2, &lasting()).await;
    filled(&client, "p").await;
    let waited = waiting(&client).await;
    let request = client.request(Method::POST, SANDBOXES).header("idempotency-key", "once").json(&lasting());

    client.try_send(request, "POST", SANDBOXES).await.unwrap_err();
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();
    let client = Client::of(service.place(), &tenant);
    let taken = post(&client, "once", &lasting()).await.expect(201);

    assert!(waited.contains(&text(&taken["id"])), "{taken}");
    assert_eq!((&taken["state"], &taken["from_pool"]["name"]), (&json!("running"), &json!("p")));
    assert_eq!(pool(&client, "p").await["taken"], 1);
    assert_eq!(client.get(SANDBOXES).await.expect(200)["items"].as_array().unwrap().len(), 1);
    let other = until_taken(&client, &lasting()).await;
    assert_ne!(other["id"], taken["id"]);
    let exec = client.post(&format!("{SANDBOXES}/{}/execs", text(&taken["id"])), &json!({ "command": ["true"] })).await.expect(200);
    assert_exit(&exec, 0);
    delete(&client, &taken).await;
}

#[tokio::test]
async fn a_service_that_dies_while_one_is_started_leaves_nothing_of_it() {
    let mut service = own(&[]);
    service.stop().unwrap();
    service.arm("service.pool.admitted=1*return");
    service.start_again().unwrap();
    let client = service.client();
    let tenant = tenant_of(&client);
    client.try_post("/v1/pools", &json!({ "name": "p", "size": 1, "template": lasting() })).await.ok();
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();

    let client = Client::of(service.place(), &tenant);
    filled(&client, "p").await;
    assert_eq!(waiting(&client).await.len(), 1);
    assert_eq!(used(&client, "tenant").await["sandboxes"], 1, "what was begun is not counted any more");
    gone(&client, "p").await;
    until_waiting(&client, BTreeSet::is_empty).await;
}

#[tokio::test]
async fn the_command_line_makes_lists_and_removes_them() {
    let place = shared().place;
    let client = place.client();
    let folder = service::folder().unwrap();
    let file = folder.path().join("template.json");
    std::fs::write(&file, lasting().to_string()).unwrap();
    let pool = |args: &[&str]| {
        let mut command = service::mayfly();
        command.arg("pool").args(args).args(["--url", &place.url, "--token", client.token().unwrap()]);
        let (status, said) = service::finish(&mut command, SOON).unwrap();
        assert!(status.success(), "{args:?}: {said}");
        said
    };

    pool(&["create", "cli", "--size", "0", "--template", file.to_str().unwrap(), "--ready-output", "started"]);
    let resized: Value = serde_json::from_str(&pool(&["resize", "cli", "1"])).unwrap();
    filled(&client, "cli").await;
    let listed = pool(&["list"]);
    let shown: Value = serde_json::from_str(&pool(&["get", "cli"])).unwrap();
    pool(&["remove", "cli"]);

    assert_eq!((&resized["size"], &shown["ready_output"]), (&json!(1), &json!("started")));
    let line = listed.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(line[..5], ["cli", "1", "1", "0", "0"], "{listed}");
    client.get("/v1/pools/cli").await.problem(404, "pool_not_found");
}
