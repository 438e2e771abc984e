//! Tenants share a node: quotas hold and say so, room is shared fairly, suspensions take effect at once, and everything used or done is told.

use std::time::{Duration, Instant};

use mayfly_tests::{
    Client, Service,
    outcome::{assert_exit, assert_reason, usage},
    service::{self, Place, shared},
};
use serde_json::{Value, json};

fn hello() -> Value {
    json!({ "image": "busybox", "command": ["true"] })
}

fn sleeping(seconds: &str) -> Value {
    json!({ "image": "busybox", "command": ["sleep", seconds], "wait_ms": 0 })
}

/// A tenant that nobody else is, with these quotas of its own, and its name.
async fn tenant_with(place: &Place, quotas: Value) -> (Client, String) {
    let name = format!("tenant-{}", uuid::Uuid::new_v4());
    Client::admin(place).post("/v1/admin/tenants", &json!({ "id": name, "quotas": quotas })).await.expect(201);
    (Client::of(place, &name), name)
}

#[track_caller]
fn assert_told(problem: &Value, quota: &str, limit: &Value, used: &Value) {
    assert_eq!((&problem["quota"], &problem["limit"], &problem["used"]), (&json!(quota), limit, used), "{problem:#}");
    assert_eq!(problem["scope"], "tenant");
}

#[tokio::test]
async fn names_that_tokens_may_have_can_be_registered() {
    let service = shared();
    let name = format!("auth0|{}+1", uuid::Uuid::new_v4());

    let made = Client::admin(&service.place).post("/v1/admin/tenants", &json!({ "id": name })).await;

    let location = made.header("location").to_owned();
    made.expect(201);
    assert_eq!(Client::admin(&service.place).get(&location).await.expect(200)["id"], json!(name));
    Client::of_principal(&service.place, &name, "google|me+2").run(&hello()).await;
}

#[tokio::test]
async fn one_more_than_the_quota_is_told_by_name_value_and_use() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "sandboxes": 1 })).await;
    let first = client.post("/v1/runs", &sleeping("5")).await.expect(202);

    let answer = client.post("/v1/runs", &hello()).await;

    let headers = ["retry-after", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"].map(|name| answer.header(name).to_owned());
    assert_eq!(headers, ["1", "1", "0", "1"]);
    let problem = answer.problem(429, "quota_exceeded");
    assert_told(&problem, "sandboxes", &json!(1), &json!(1));
    assert_eq!(problem["retryable"], true);
    assert!(first["id"].is_string());
}

#[tokio::test]
async fn a_rate_that_is_used_up_says_when_there_is_more() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "runs_per_minute": 2 })).await;
    for _ in 0..2 {
        client.run(&hello()).await;
    }

    let answer = client.post("/v1/runs", &hello()).await;

    let retry_after: u64 = answer.header("retry-after").parse().unwrap();
    assert!((1..=30).contains(&retry_after), "{retry_after}");
    assert_eq!((answer.header("ratelimit-limit"), answer.header("ratelimit-remaining")), ("2", "0"));
    assert_told(&answer.problem(429, "rate_limited"), "runs_per_minute", &json!(2), &json!(2));
}

#[tokio::test]
async fn what_will_never_do_is_not_to_be_tried_again() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "largest_pids": 10 })).await;

    let mut request = hello();
    request["limits"] = json!({ "pids": 11 });
    let answer = client.post("/v1/runs", &request).await;

    assert_eq!(answer.header("retry-after"), "");
    let problem = answer.problem(429, "quota_exceeded");
    assert_told(&problem, "largest_pids", &json!(10), &json!(11));
    assert_eq!(problem["retryable"], false);
}

#[tokio::test]
async fn an_isolation_that_is_not_allowed_is_a_quota_too() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "isolations": ["container"] })).await;
    client.run(&hello()).await;

    let mut request = hello();
    request["isolation"] = json!("gvisor");
    let problem = client.post("/v1/runs", &request).await.problem(429, "quota_exceeded");

    assert_eq!((&problem["quota"], &problem["retryable"]), (&json!("isolations"), &json!(false)), "{problem:#}");
}

#[tokio::test]
async fn a_default_that_is_larger_than_the_quota_gives_way_to_it() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "largest_pids": 10, "largest_wall_ms": 3000 })).await;

    let run = client.run(&hello()).await;
    let told = client.get("/v1/limits").await.expect(200);

    assert_exit(&run, 0);
    assert_eq!((&run["limits"]["pids"], &run["limits"]["wall_ms"]), (&json!(10), &json!(3000)));
    let bound = told["fields"].as_array().unwrap().iter().find(|bound| bound["field"] == "limits.pids").unwrap();
    assert_eq!((&bound["max"], &bound["default"]), (&json!(10), &json!(10)));
}

#[tokio::test]
async fn images_are_held_to_their_quota() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "image_bytes": 1000 })).await;
    let archive = std::fs::read(mayfly_tests::image::archive("busybox").unwrap()).unwrap();

    let answer = client.post_raw("/v1/images/import?reference=mine", "application/x-tar", archive).await;

    assert_told(&answer.problem(429, "quota_exceeded"), "image_bytes", &json!(1000), &json!(0));
    client.get("/v1/images/mine").await.problem(404, "image_not_found");
}

#[tokio::test]
async fn what_a_caller_may_have_and_has_is_told() {
    let service = shared();
    let (client, name) = tenant_with(&service.place, json!({ "sandboxes": 7 })).await;
    let principal = format!("/v1/admin/tenants/{name}/principals/tester");
    Client::admin(&service.place).patch(&principal, &json!({ "quotas": { "sandboxes": 3 } })).await.expect(200);
    client.post("/v1/runs", &sleeping("5")).await.expect(202);

    let quota = client.get("/v1/quota").await.expect(200);

    assert_eq!((&quota["tenant"]["quotas"]["sandboxes"], &quota["principal"]["quotas"]["sandboxes"]), (&json!(7), &json!(3)));
    assert_eq!((&quota["tenant"]["used"]["sandboxes"], &quota["principal"]["used"]["sandboxes"]), (&json!(1), &json!(1)));
    assert_eq!(quota["tenant"]["used"]["runs_per_day"], 1);
}

#[tokio::test]
async fn one_principal_does_not_use_up_what_is_anothers() {
    let service = shared();
    let (_, name) = tenant_with(&service.place, json!({})).await;
    let tenant = format!("/v1/admin/tenants/{name}");
    Client::admin(&service.place).patch(&tenant, &json!({ "principal_quotas": { "sandboxes": 1 } })).await.expect(200);
    let [alice, bob] = ["alice", "bob"].map(|principal| Client::of_principal(&service.place, &name, principal));
    alice.post("/v1/runs", &sleeping("5")).await.expect(202);

    let refused = alice.post("/v1/runs", &hello()).await.problem(429, "quota_exceeded");
    let run = bob.run(&hello()).await;

    assert_eq!(refused["scope"], "principal");
    assert_exit(&run, 0);
}

#[tokio::test]
async fn a_suspension_holds_from_the_next_request_on() {
    let service = shared();
    let (client, name) = tenant_with(&service.place, json!({})).await;
    let admin = Client::admin(&service.place);
    client.run(&hello()).await;

    for path in [format!("/v1/admin/tenants/{name}"), format!("/v1/admin/tenants/{name}/principals/tester")] {
        for _ in 0..10 {
            admin.post(&format!("{path}/suspend"), &json!({})).await.expect(200);
            client.post("/v1/runs", &hello()).await.problem(403, "suspended");
            client.get("/v1/sandboxes").await.problem(403, "suspended");
            admin.post(&format!("{path}/resume"), &json!({})).await.expect(200);
            client.get("/v1/sandboxes").await.expect(200);
        }
    }
    client.run(&hello()).await;
}

#[tokio::test]
async fn a_suspension_ends_what_runs_only_if_it_is_to() {
    let service = shared();
    let (client, name) = tenant_with(&service.place, json!({})).await;
    let admin = Client::admin(&service.place);
    let run = client.post("/v1/runs", &sleeping("8")).await.expect(202);
    let path = format!("/v1/runs/{}", run["id"].as_str().unwrap());
    let tenant = format!("/v1/admin/tenants/{name}");

    admin.post(&format!("{tenant}/suspend"), &json!({})).await.expect(200);
    tokio::time::sleep(Duration::from_millis(300)).await;
    admin.post(&format!("{tenant}/resume"), &json!({})).await.expect(200);
    let meanwhile = client.get(&path).await.expect(200);
    admin.post(&format!("{tenant}/suspend"), &json!({ "stop_sandboxes": true })).await.expect(200);
    let all = format!("/v1/admin/sandboxes?tenant={name}");
    let ended = admin.until(&all, |page| page["items"][0]["state"] == "exited").await;

    assert_eq!(meanwhile["outcome"], Value::Null);
    assert_reason(&ended["items"][0], "stopped_by_admin");
    let events = admin.get(&format!("/v1/admin/events?tenant={name}&kind=sandbox.killed")).await.expect(200);
    assert_eq!(events["items"].as_array().unwrap().len(), 1, "{events:#}");
}

#[tokio::test]
async fn nobody_locks_themselves_out() {
    let service = shared();
    let admin = Client::admin(&service.place);

    admin.get("/v1/admin/tenants/operator").await.expect(200);
    admin.post("/v1/admin/tenants/operator/suspend", &json!({})).await.problem(409, "conflict");
}

#[tokio::test]
async fn usage_is_the_sum_of_the_outcomes() {
    let service = shared();
    let (client, name) = tenant_with(&service.place, json!({})).await;
    let other = Client::of_principal(&service.place, &name, "other");
    let mut outcomes = Vec::new();
    for script in ["echo some output", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done", "exit 3"] {
        outcomes.push(client.shell(script).await);
    }
    outcomes.push(other.shell("echo of another").await);

    let used = client.get("/v1/usage?group_by=principal,day").await.expect(200);
    let everyones = Client::admin(&service.place).get(&format!("/v1/admin/usage?tenant={name}&group_by=tenant,kind")).await.expect(200);

    let sum = |name: &str| outcomes.iter().map(|run| usage(run, name)).sum::<u64>();
    assert_eq!(used["items"].as_array().unwrap().len(), 2, "{used:#}");
    assert_eq!(used["total"]["runs"], 4);
    assert_eq!(used["total"]["output_bytes"], sum("stdout_bytes") + sum("stderr_bytes"));
    assert_eq!(used["total"]["log_bytes"], used["total"]["output_bytes"]);
    // Outcomes are told in whole milliseconds each, sums are rounded once.
    assert!(used["total"]["cpu_ms"].as_u64().unwrap().abs_diff(sum("cpu_ms")) <= 2, "{used:#}");
    assert!(used["total"]["wall_ms"].as_u64().unwrap().abs_diff(sum("wall_ms")) <= 2, "{used:#}");
    let memory = 256 * (1_u64 << 20) * used["total"]["wall_ms"].as_u64().unwrap() / 1000;
    assert!(used["total"]["memory_byte_seconds"].as_u64().unwrap().abs_diff(memory) <= 256 << 20, "{used:#}");
    assert_eq!((&everyones["items"][0]["tenant"], &everyones["items"][0]["runs"]), (&json!(name), &json!(4)));
}

#[tokio::test]
async fn who_did_what_is_told_to_the_tenant_and_to_administrators() {
    let service = shared();
    let (client, name) = tenant_with(&service.place, json!({})).await;
    let sandbox = client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", "60"] })).await.expect(201);
    let path = format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
    assert_eq!(client.delete(&path).await.status, 204);
    Client::admin(&service.place).patch(&format!("/v1/admin/tenants/{name}"), &json!({ "weight": 200 })).await.expect(200);

    let first = client.get("/v1/events?limit=2").await.expect(200);
    let rest = client.get(&format!("/v1/events?cursor={}", first["next_cursor"].as_str().unwrap())).await.expect(200);
    let all = Client::admin(&service.place).get(&format!("/v1/admin/events?tenant={name}&kind=tenant.changed")).await.expect(200);

    let told: Vec<_> = [&first, &rest].into_iter().flat_map(|page| page["items"].as_array().unwrap()).collect();
    let kinds: Vec<_> = told.iter().map(|event| event["kind"].as_str().unwrap()).collect();
    let expected = ["tenant.changed", "sandbox.deleted", "sandbox.ended", "sandbox.killed", "sandbox.created", "tenant.created"];
    // Asking for a client made no further event; its tenant was there.
    assert_eq!(kinds, expected);
    assert_eq!(told[4]["actor"], json!({ "tenant": name, "principal": "tester" }));
    assert_eq!(told[1]["object"], format!("sandbox/{}", sandbox["id"].as_str().unwrap()));
    // Who the operator is does not concern the tenant.
    assert_eq!(told[0]["actor"], Value::Null);
    assert_eq!(all["items"][0]["actor"]["tenant"], "operator");
    assert_eq!(all["items"][0]["data"]["weight"], 200);
}

#[tokio::test]
async fn only_administrators_look_after_tenants() {
    let client = shared().client();

    client.get("/v1/admin/tenants").await.problem(403, "forbidden");
    client.get("/v1/admin/sandboxes").await.problem(403, "forbidden");
    client.post("/v1/admin/tenants", &json!({ "id": "mine" })).await.problem(403, "forbidden");
}

#[tokio::test]
async fn tenants_are_listed_in_pages() {
    let service = shared();
    let admin = Client::admin(&service.place);
    let (_, name) = tenant_with(&service.place, json!({})).await;
    admin.post("/v1/admin/tenants", &json!({ "id": name })).await.problem(409, "conflict");

    let (mut cursor, mut found) = (String::new(), 0);
    loop {
        let page = admin.get(&format!("/v1/admin/tenants?limit=2{cursor}")).await.expect(200);
        found += page["items"].as_array().unwrap().iter().filter(|tenant| tenant["id"] == name).count();
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(found, 1);
}

#[tokio::test]
async fn bad_quotas_are_named() {
    let service = shared();
    let admin = Client::admin(&service.place);
    let (_, name) = tenant_with(&service.place, json!({})).await;
    let path = format!("/v1/admin/tenants/{name}");

    let unknown = admin.patch(&path, &json!({ "quotas": { "sandboxs": 1 } })).await.problem(422, "invalid_request");
    let negative = admin.patch(&path, &json!({ "principal_quotas": { "queued": -1 } })).await.problem(422, "invalid_request");
    let weight = admin.patch(&path, &json!({ "weight": 0 })).await.problem(422, "invalid_request");

    assert_eq!(
        (&unknown["field"], &negative["field"], &weight["field"]),
        (&json!("quotas.sandboxs"), &json!("principal_quotas.queued"), &json!("weight"))
    );
    admin.patch("/v1/admin/tenants/no-such-tenant", &json!({ "weight": 1 })).await.problem(404, "not_found");
}

#[tokio::test]
async fn where_tenants_are_registered_the_others_are_refused() {
    let service = Service::start_with(&["--tenants", "registered"]).unwrap();
    service.import("busybox").unwrap();
    let client = Client::of(service.place(), "acme");
    client.post("/v1/runs", &hello()).await.problem(403, "unknown_tenant");
    client.get("/v1/quota").await.problem(403, "unknown_tenant");

    let tenant = |arguments: &[&str]| {
        let mut command = service::mayfly();
        command.arg("tenant").args(arguments).args(["--url", &service.place().url, "--data-dir"]).arg(&service.place().data_dir);
        let (status, said) = service::finish(&mut command, Duration::from_secs(20)).unwrap();
        assert!(status.success(), "{said}");
        said
    };
    tenant(&["create", "acme", "--quota", "sandboxes=5", "--weight", "50"]);
    client.run(&hello()).await;
    let shown: Value =
        serde_json::from_str(&tenant(&["set", "acme", "--quota", "sandboxes=default", "--principal-quota", "queued=1"])).unwrap();
    assert_eq!((&shown["weight"], &shown["quotas"], &shown["principal_quotas"]), (&json!(50), &json!({}), &json!({ "queued": 1 })));
    tenant(&["suspend", "acme", "--principal", "tester"]);
    client.post("/v1/runs", &hello()).await.problem(403, "suspended");
    tenant(&["resume", "acme", "--principal", "tester"]);
    client.run(&hello()).await;
    assert!(tenant(&["list"]).contains("acme"));
    assert!(tenant(&["get", "acme"]).contains("\"weight\": 50"));
}

/// A node with room for one sandbox of the default size.
fn narrow(more: &[&str]) -> Service {
    let service = Service::start_with(&[&["--capacity-memory-bytes", "268435456"], more].concat()).expect("it starts");
    service.import("busybox").expect("the image is imported");
    service
}

#[tokio::test]
async fn who_waits_knows_the_place_and_who_may_not_wait_is_refused() {
    let service = narrow(&["--queue-max", "2"]);
    let client = service.client();
    client.post("/v1/runs", &sleeping("9")).await.expect(202);
    let second = client.post("/v1/runs", &sleeping("0")).await.expect(202);
    let third = client.post("/v1/runs", &sleeping("0")).await.expect(202);

    let mut not_waiting = hello();
    not_waiting["when_full"] = "refuse".into();
    let refused = client.post("/v1/runs", &not_waiting).await;
    let full = client.post("/v1/runs", &hello()).await;

    assert_eq!((&second["state"], &second["queue_position"], &third["queue_position"]), (&json!("queued"), &json!(1), &json!(2)));
    assert_eq!((refused.header("retry-after"), full.header("retry-after")), ("1", "1"));
    assert_eq!(refused.problem(503, "no_capacity")["retryable"], true);
    assert_eq!(full.problem(503, "no_capacity")["retryable"], true);
}

/// How long a run takes, to its end.
async fn timed(client: &Client, request: &Value) -> Duration {
    let began = Instant::now();
    assert_exit(&client.run(request).await, 0);
    began.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_runs_of_one_tenant_hardly_delay_one_of_another() {
    const RUNS: usize = 10_000;
    const AT_ONCE: usize = 16;
    let service = narrow(&["--queue-max", "20000", "--tenant-quotas", r#"{"sandboxes":null,"queued":null}"#]);
    let (flood, single) = (Client::of(service.place(), "flood"), Client::of(service.place(), "single"));
    let (mut idle, mut one_run) = (Vec::new(), Vec::new());
    for _ in 0..7 {
        idle.push(timed(&single, &hello()).await);
        one_run.push(timed(&flood, &json!({ "image": "busybox", "command": ["sleep", "0.2"] })).await);
    }
    let submitting: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let flood = flood.clone();
            tokio::spawn(async move {
                for _ in 0..RUNS / AT_ONCE {
                    flood.post("/v1/runs", &sleeping("0.2")).await.expect(202);
                }
            })
        })
        .collect();
    for submitting in submitting {
        submitting.await.unwrap();
    }

    let mut delayed = Vec::new();
    for _ in 0..7 {
        delayed.push(timed(&single, &hello()).await);
    }

    let (idle, one_run, delayed) = (median(idle), median(one_run), median(delayed));
    let waiting = Client::admin(service.place()).get("/v1/admin/tenants/flood").await.expect(200)["used"]["queued"].as_u64().unwrap();
    println!("idle {idle:?}, one run {one_run:?}, beside {waiting} that wait {delayed:?}");
    assert!(waiting > 5000, "{waiting}");
    assert!(delayed <= 2 * idle + one_run, "idle {idle:?}, one run {one_run:?}, beside {waiting} that wait {delayed:?}");
}

#[tokio::test]
async fn a_large_one_gets_its_room_while_small_ones_keep_coming() {
    let service = Service::start_with(&["--capacity-memory-bytes", "268435456"]).unwrap();
    service.import("busybox").unwrap();
    let of =
        |memory_bytes: u64, command: &[&str]| json!({ "image": "busybox", "command": command, "limits": { "memory_bytes": memory_bytes } });
    let small = Client::of(service.place(), "small");
    let stream: Vec<_> = (0..6)
        .map(|_| {
            let (small, request) = (small.clone(), of(64 << 20, &["sleep", "0.3"]));
            tokio::spawn(async move {
                loop {
                    small.post("/v1/runs", &request).await.expect(200);
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;

    let large =
        tokio::time::timeout(Duration::from_secs(60), timed(&Client::of(service.place(), "large"), &of(256 << 20, &["true"]))).await;

    for one in stream {
        one.abort();
    }
    assert!(large.is_ok(), "it waited for a minute in vain");
}
