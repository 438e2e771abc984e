//! Many runs by one request: each is accepted or refused for itself, all are waited for, and none is made twice.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeSet, time::Duration};

use mayfly_tests::{
    Answer, Client, Service,
    outcome::{assert_exit, stdout},
    service::{Place, shared},
};
use reqwest::Method;
use serde_json::{Value, json};

const BATCH: &str = "/v1/runs/batch";

fn shell(script: &str) -> Value {
    json!({ "image": "busybox", "command": ["sh", "-c", script] })
}

fn batch(runs: &[Value]) -> Value {
    json!({ "runs": runs, "wait_ms": 60_000 })
}

fn key() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// A tenant that nobody else is, with these quotas of its own; and where an administrator changes them.
async fn tenant_with(place: &Place, quotas: Value) -> (Client, String) {
    let name = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    Client::admin(place).post("/v1/admin/tenants", &json!({ "id": name, "quotas": quotas })).await.expect(201);
    (Client::of(place, &name), format!("/v1/admin/tenants/{name}"))
}

async fn post(client: &Client, key: &str, body: &Value) -> Answer {
    client.send(client.request(Method::POST, BATCH).header("idempotency-key", key).json(body), "POST", BATCH).await
}

/// The ids of its runs in their places; of what was refused none.
fn ids(batch: &Value) -> Vec<Option<String>> {
    batch["items"].as_array().unwrap().iter().map(|item| item["run"]["id"].as_str().map(ToOwned::to_owned)).collect()
}

#[track_caller]
fn assert_refused(item: &Value, status: u16, code: &str) {
    let problem = &item["problem"];
    assert_eq!((&problem["status"], &problem["code"]), (&json!(status), &json!(code)), "{item:#}");
    assert!(problem["request_id"].as_str().is_some_and(|id| !id.is_empty()), "{item:#}");
}

/// How many runs of the tenant there ever were.
async fn made(place: &Place, tenant: &str) -> usize {
    let page = Client::admin(place).get(&format!("/v1/admin/sandboxes?kind=run&limit=200&tenant={tenant}")).await.expect(200);
    page["items"].as_array().unwrap().len()
}

/// Waits until there are so many runs of the tenant `vanishing`.
async fn until_made(service: &Service, count: usize) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while made(service.place(), "vanishing").await < count {
        assert!(tokio::time::Instant::now() < deadline, "{count} runs are never there\n{}", service.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn each_run_is_told_in_its_place_and_a_bad_one_refuses_only_itself() {
    let client = shared().client();
    let mut unknown_field = shell("true");
    unknown_field["limits"] = json!({ "colour": 1 });
    let mut out_of_range = shell("true");
    out_of_range["limits"] = json!({ "pids": 0 });
    let runs = [
        shell("sleep 0.5; echo first"),
        json!({ "image": "no-such-image" }),
        shell("echo third; exit 3"),
        unknown_field,
        out_of_range,
        json!("no object"),
        shell("echo last"),
    ];

    let answer = client.post(BATCH, &batch(&runs)).await.expect(200);

    let items = answer["items"].as_array().unwrap();
    assert_eq!(items.len(), 7);
    assert_eq!([0, 2, 6].map(|place| stdout(&items[place]["run"])), ["first\n", "third\n", "last\n"]);
    assert_exit(&items[2]["run"], 3);
    assert_refused(&items[1], 404, "image_not_found");
    for place in [3, 4, 5] {
        assert_refused(&items[place], 422, "invalid_request");
    }
    let fields = [3, 4, 5].map(|place: usize| items[place]["problem"]["field"].as_str().unwrap());
    assert_eq!(fields, ["runs[3].limits.colour", "runs[4].limits.pids", "runs[5]"]);
    assert_eq!(items[4]["problem"]["bound"]["min"], 1);
}

#[tokio::test]
async fn a_batch_is_answered_before_its_end_when_its_patience_is_over_and_followed_by_its_ids() {
    let client = shared().client();
    let request = json!({ "runs": [shell("echo early"), shell("sleep 2; echo late")], "wait_ms": 0 });

    let accepted = client.post(BATCH, &request).await.expect(202);
    let all: Vec<String> = ids(&accepted).into_iter().flatten().collect();
    let path = format!("/v1/runs?ids={},{}", all[1], all[0]);
    let told = client.until(&path, |batch| batch["items"].as_array().unwrap().iter().all(|item| item["run"]["state"] == "exited")).await;

    assert_eq!(all.len(), 2);
    assert_eq!(ids(&told), [Some(all[1].clone()), Some(all[0].clone())]);
    assert_eq!((stdout(&told["items"][0]["run"]), stdout(&told["items"][1]["run"])), ("late\n", "early\n"));
    assert_eq!(told["items"][1]["run"], client.get(&format!("/v1/runs/{}", all[0])).await.expect(200));
}

#[tokio::test]
async fn all_of_a_batch_are_waited_for_at_the_same_time() {
    let client = shared().client();
    let runs: Vec<_> = (0..8).map(|number| shell(&format!("sleep 1; echo {number}"))).collect();

    let answer = client.post(BATCH, &batch(&runs)).await.expect(200);

    let told: Vec<_> = answer["items"].as_array().unwrap().iter().map(|item| stdout(&item["run"]).to_owned()).collect();
    assert_eq!(told, (0..8).map(|number| format!("{number}\n")).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_one_of_many_says_of_waiting_is_held_to_its_bound_and_waited_for_by_nobody() {
    let (mut patient, mut too_patient) = (shell("sleep 1"), shell("true"));
    (patient["wait_ms"], too_patient["wait_ms"]) = (json!(60_000), json!(300_001));

    let answer = shared().client().post(BATCH, &json!({ "runs": [patient, too_patient], "wait_ms": 0 })).await.expect(202);

    assert_ne!(answer["items"][0]["run"]["state"], "exited");
    assert_refused(&answer["items"][1], 422, "invalid_request");
    assert_eq!(answer["items"][1]["problem"]["field"], "runs[1].wait_ms");
}

#[tokio::test]
async fn a_quota_in_the_middle_refuses_what_is_beyond_it() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "sandboxes": 2 })).await;
    let runs = [shell("sleep 3"), shell("sleep 3"), shell("true"), json!({ "image": "no-such-image" })];

    let answer = client.post(BATCH, &batch(&runs)).await.expect(200);

    assert_exit(&answer["items"][0]["run"], 0);
    assert_exit(&answer["items"][1]["run"], 0);
    assert_refused(&answer["items"][2], 429, "quota_exceeded");
    assert_refused(&answer["items"][3], 404, "image_not_found");
    let problem = &answer["items"][2]["problem"];
    assert_eq!((&problem["quota"], &problem["limit"], &problem["used"]), (&json!("sandboxes"), &json!(2), &json!(2)));
}

#[tokio::test]
async fn each_run_of_a_batch_counts_against_the_rate() {
    let service = shared();
    let (client, _) = tenant_with(&service.place, json!({ "runs_per_minute": 2 })).await;

    let answer = client.post(BATCH, &batch(&[shell("true"), shell("true"), shell("true")])).await.expect(200);

    assert_exit(&answer["items"][1]["run"], 0);
    assert_refused(&answer["items"][2], 429, "rate_limited");
}

#[tokio::test]
async fn a_batch_of_another_shape_is_refused_as_a_whole() {
    let service = shared();
    let (client, admin) = tenant_with(&service.place, json!({})).await;
    let tenant = admin.rsplit('/').next().unwrap();
    let many = |count: usize| batch(&vec![shell("true"); count]);
    let mut coloured = many(1);
    coloured["colour"] = json!("red");

    for (body, field) in [
        (many(0), "runs"),
        (many(101), "runs"),
        (coloured, "colour"),
        (json!({ "runs": "many" }), "runs"),
        (json!({ "wait_ms": 0 }), "runs"),
        (json!({ "runs": [shell("true")], "wait_ms": 300_001 }), "wait_ms"),
    ] {
        let problem = client.post(BATCH, &body).await.problem(422, "invalid_request");
        assert_eq!(problem["field"], field, "{problem:#}");
    }
    let mut large = shell("true");
    large["stdin"] = json!("x".repeat(17 << 20));
    client.post(BATCH, &batch(&[large])).await.problem(413, "payload_too_large");
    assert_eq!(made(&service.place, tenant).await, 0);
}

#[tokio::test]
async fn what_is_another_tenants_is_not_among_many() {
    let service = shared();
    let (mine, theirs) = (service.client(), service.client());
    let made = mine.post(BATCH, &batch(&[shell("echo secret")])).await.expect(200);
    let sandbox = mine.sandbox("exec sleep 1000").await;
    let id = ids(&made).remove(0).unwrap();
    let never = uuid::Uuid::new_v4();

    let told = theirs.get(&format!("/v1/runs?ids={id}&ids={never}")).await.expect(200);
    let own = mine.get(&format!("/v1/runs?ids={id}&ids={sandbox}")).await.expect(200);

    assert_refused(&told["items"][0], 404, "not_found");
    assert_eq!(told["items"][0], told["items"][1]);
    assert_eq!(stdout(&own["items"][0]["run"]), "secret\n");
    assert_refused(&own["items"][1], 404, "not_found");
    assert_eq!(mine.delete(&format!("/v1/sandboxes/{sandbox}")).await.status, 204);
}

#[tokio::test]
async fn ids_that_are_none_or_too_many_or_twice_there_are_told() {
    let client = shared().client();
    let ids: Vec<_> = (0..101).map(|_| uuid::Uuid::new_v4().to_string()).collect();
    let id = &ids[0];

    for query in ["", "?ids=", "?ids=a", &format!("?ids={id}&ids={},{id}", ids[1]), &format!("?ids={}", ids.join(","))] {
        let problem = client.get(&format!("/v1/runs{query}")).await.problem(422, "invalid_request");
        assert_eq!(problem["field"], "ids", "{query:.50}");
    }
    assert_eq!(client.get(&format!("/v1/runs?ids={id}&state=running")).await.problem(422, "invalid_request")["field"], "state");
}

#[tokio::test]
async fn a_batch_that_is_sent_again_is_answered_with_the_first() {
    let service = shared();
    let (client, admin) = tenant_with(&service.place, json!({})).await;
    let (key, random) = (key(), "cat /proc/sys/kernel/random/uuid");
    let request = batch(&[shell(random), json!({ "image": "busybox", "colour": 1 }), shell(random)]);

    let first = post(&client, &key, &request).await;
    let second = post(&client, &key, &request).await;

    assert_eq!((first.status, &first.text), (second.status, &second.text));
    assert_eq!((first.header("idempotency-replayed"), second.header("idempotency-replayed")), ("", "true"));
    assert_refused(&second.body["items"][1], 422, "invalid_request");
    assert_eq!(made(&service.place, admin.rsplit('/').next().unwrap()).await, 2);
    post(&client, &key, &batch(&[shell(random)])).await.problem(409, "idempotency_key_reused");
}

#[tokio::test]
async fn the_answer_to_a_batch_with_much_output_is_told_again() {
    let service = shared();
    let (client, admin) = tenant_with(&service.place, json!({})).await;
    let (key, much) = (key(), "head -c 100000 /dev/zero | tr '\\0' x; echo end");
    let request = batch(&[shell(much), json!({ "image": "busybox", "colour": 1 }), shell(much)]);

    let first = post(&client, &key, &request).await;
    let second = post(&client, &key, &request).await;

    // Of each of several the last 64 KiB, of one alone all.
    let told = &first.body["items"][0]["run"];
    let whole = client.get(&format!("/v1/runs/{}", told["id"].as_str().unwrap())).await.expect(200);
    assert_eq!((stdout(told).len(), &told["stdout_omitted_bytes"]), (65_536, &json!(100_004 - 65_536)));
    assert_eq!((stdout(&whole).len(), &whole["stdout_omitted_bytes"]), (100_004, &json!(0)));
    assert!(stdout(&whole).ends_with(stdout(told)) && stdout(told).ends_with("xend\n"));
    assert_eq!((first.status, &first.body), (second.status, &second.body));
    assert_eq!(second.header("idempotency-replayed"), "true");
    assert_eq!(made(&service.place, admin.rsplit('/').next().unwrap()).await, 2);
}

#[tokio::test]
async fn what_was_refused_for_now_is_tried_again_with_the_same_key_and_nothing_else() {
    let service = shared();
    let (client, admin) = tenant_with(&service.place, json!({ "sandboxes": 1 })).await;
    let (key, request) = (key(), batch(&[shell("sleep 3; echo one"), shell("echo two")]));

    let first = post(&client, &key, &request).await.expect(200);
    Client::admin(&service.place).patch(&admin, &json!({ "quotas": { "sandboxes": 2 } })).await.expect(200);
    let second = post(&client, &key, &request).await.expect(200);
    let third = post(&client, &key, &request).await;

    assert_refused(&first["items"][1], 429, "quota_exceeded");
    assert_eq!(second["items"][0]["run"], first["items"][0]["run"]);
    assert_eq!(stdout(&second["items"][1]["run"]), "two\n");
    assert_eq!((third.header("idempotency-replayed"), &third.body), ("true", &second));
    assert_eq!(made(&service.place, admin.rsplit('/').next().unwrap()).await, 2);
}

#[tokio::test]
async fn a_batch_that_a_crash_cut_off_is_completed_and_no_run_of_it_made_twice() {
    let mut service = Service::start();
    let survivor = |service: &Service| Client::of(service.place(), "survivor");
    let runs: Vec<_> = (0..5)
        .map(|number| {
            let mut run = shell(&format!("echo {number}"));
            // One that was accepted and not begun would be told as lost.
            run["retry"] = json!(3);
            run
        })
        .collect();
    let (key, request) = (key(), batch(&runs));
    service.kill();
    service.arm("service.batch.accepted=2*off->return");
    service.start_again().unwrap();
    let asked = survivor(&service).request(Method::POST, BATCH).header("idempotency-key", &key).json(&request);
    asked.timeout(Duration::from_secs(60)).send().await.expect_err("the service dies when the third is accepted");
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();
    let before = made(service.place(), "survivor").await;

    let client = survivor(&service);
    post(&client, &key, &batch(&runs[..4])).await.problem(409, "idempotency_key_reused");
    let first = post(&client, &key, &request).await;
    let second = post(&client, &key, &request).await;

    let answer = first.clone().expect(200);
    let told: Vec<_> = answer["items"].as_array().unwrap().iter().map(|item| stdout(&item["run"]).to_owned()).collect();
    assert_eq!(told, (0..5).map(|number| format!("{number}\n")).collect::<Vec<_>>());
    assert_eq!((before, made(service.place(), "survivor").await), (3, 5));
    assert_eq!(ids(&answer).into_iter().flatten().collect::<BTreeSet<_>>().len(), 5);
    assert_eq!((second.header("idempotency-replayed"), &first.text), ("true", &second.text));
}

#[tokio::test]
async fn a_batch_whose_client_vanishes_in_its_midst_is_accepted_to_its_end_and_no_run_of_it_made_twice() {
    let mut service = Service::start();
    service.kill();
    // Stands still for a while when one is accepted.
    service.arm("service.batch.accepted=sleep(2000)");
    service.start_again().unwrap();
    let client = Client::of(service.place(), "vanishing");
    let runs: Vec<_> = (0..5).map(|number| shell(&format!("echo {number}"))).collect();
    let (key, request) = (key(), batch(&runs));
    // Gone when two are there, and back when nothing was asked for any more and all are.
    let vanish = async |asked: reqwest::RequestBuilder, before: usize| {
        let asking = tokio::spawn(asked.json(&request).send());
        until_made(&service, before + 2).await;
        asking.abort();
        assert!(asking.await.is_err(), "it was answered before it went");
        let in_the_midst = made(service.place(), "vanishing").await;
        assert!(in_the_midst < before + 5, "the control: all {in_the_midst} were accepted before it went");
        until_made(&service, before + 5).await;
    };

    vanish(client.request(Method::POST, BATCH).header("idempotency-key", &key), 0).await;
    let first = post(&client, &key, &request).await;
    let second = post(&client, &key, &request).await;
    // Without a key it is the same, but for the answer.
    vanish(client.request(Method::POST, BATCH), 5).await;

    let answer = first.clone().expect(200);
    let told: Vec<_> = answer["items"].as_array().unwrap().iter().map(|item| stdout(&item["run"]).to_owned()).collect();
    assert_eq!(told, (0..5).map(|number| format!("{number}\n")).collect::<Vec<_>>());
    assert_eq!(ids(&answer).into_iter().flatten().collect::<BTreeSet<_>>().len(), 5);
    assert_eq!((first.header("idempotency-replayed"), second.header("idempotency-replayed")), ("true", "true"));
    assert_eq!(first.text, second.text);
    assert_eq!(made(service.place(), "vanishing").await, 10);
}

#[tokio::test]
async fn each_run_of_a_batch_has_an_event_of_its_own() {
    let client = shared().client();

    let answer = client.post(BATCH, &batch(&[shell("true"), shell("false")])).await.expect(200);
    let events = client.get("/v1/events?kind=sandbox.created").await.expect(200);

    let of: BTreeSet<_> = events["items"].as_array().unwrap().iter().map(|event| event["object"].as_str().unwrap().to_owned()).collect();
    let runs = ids(&answer).into_iter().flatten();
    assert_eq!(of, runs.map(|id| format!("sandbox/{id}")).collect());
}
