//! `Idempotency-Key`: a POST that is sent again has one effect and one answer, also while the first goes on, and after a crash.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use mayfly_tests::{
    Answer, Client, Service,
    contract::{self, Operation},
    image,
    outcome::{assert_exit, assert_reason, stdout},
    service::{Shared, shared},
};
use reqwest::Method;
use serde_json::{Value, json};

const RUNS: &str = "/v1/runs";

fn key() -> String {
    uuid::Uuid::new_v4().to_string()
}

async fn post(client: &Client, path: &str, key: &str, body: &Value) -> Answer {
    client.send(client.request(Method::POST, path).header("idempotency-key", key).json(body), "POST", path).await
}

fn shell(script: &str) -> Value {
    json!({ "image": "busybox", "command": ["sh", "-c", script] })
}

/// Everything of an answer that the second has to have, too.
#[track_caller]
fn assert_replayed(first: &Answer, second: &Answer) {
    assert_eq!((first.status, &first.text), (second.status, &second.text));
    for name in ["content-type", "location"] {
        assert_eq!(first.header(name), second.header(name), "{name}");
    }
    assert_eq!((first.header("idempotency-replayed"), second.header("idempotency-replayed")), ("", "true"));
}

/// All runs and sandboxes of the client's tenant that there ever were.
async fn made(client: &Client, kind: &str) -> BTreeSet<String> {
    let claims = client.token().unwrap().split('.').nth(1).unwrap();
    let claims = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    let path = format!("/v1/admin/sandboxes?kind={kind}&limit=200&tenant={}", claims["tenant"].as_str().unwrap());
    let page = Client::admin(client.place()).get(&path).await.expect(200);
    page["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

/// Waits until the client's tenant has had a run, and says which.
async fn until_made(client: &Client) -> String {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(run) = made(client, "run").await.pop_first() {
            return run;
        }
        assert!(tokio::time::Instant::now() < deadline, "it is never made");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_run_that_is_asked_for_again_is_answered_with_the_first() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let request = shell("cat /proc/sys/kernel/random/uuid; echo told >&2; exit 3");

    let first = post(&client, RUNS, &key, &request).await;
    let second = post(&client, RUNS, &key, &request).await;

    assert_exit(&first.clone().expect(200), 3);
    assert_replayed(&first, &second);
    assert_eq!(made(&client, "run").await.len(), 1);
}

#[tokio::test]
async fn a_sandbox_that_is_asked_for_again_is_the_first() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let request = json!({ "image": "busybox", "command": ["sleep", "100"], "name": "only" });

    let first = post(&client, "/v1/sandboxes", &key, &request).await;
    let second = post(&client, "/v1/sandboxes", &key, &request).await;

    assert_eq!(first.status, 201);
    assert_replayed(&first, &second);
    assert_eq!(second.header("location"), format!("/v1/sandboxes/{}", first.body["id"].as_str().unwrap()));
    assert_eq!(made(&client, "sandbox").await.len(), 1);
    let path = format!("/v1/sandboxes/{}", first.body["id"].as_str().unwrap());
    assert_eq!(client.delete(&path).await.status, 204);
    // Also after what it made is gone.
    assert_replayed(&first, &post(&client, "/v1/sandboxes", &key, &request).await);
    assert_eq!(made(&client, "sandbox").await.len(), 0);
}

#[tokio::test]
async fn twenty_requests_at_once_make_one_run_and_get_one_answer() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let request = shell("sleep 1; cat /proc/sys/kernel/random/uuid");

    let asking: Vec<_> = (0..20)
        .map(|_| {
            let (client, key, request) = (client.clone(), key.clone(), request.clone());
            tokio::spawn(async move { post(&client, RUNS, &key, &request).await })
        })
        .collect();
    let mut answers = Vec::new();
    for asked in asking {
        answers.push(asked.await.unwrap());
    }

    assert_eq!(answers[0].status, 200, "{}", answers[0].text);
    let texts: BTreeSet<_> = answers.iter().map(|answer| &answer.text).collect();
    assert_eq!(texts.len(), 1, "{texts:#?}");
    assert_eq!(answers.iter().filter(|answer| answer.header("idempotency-replayed").is_empty()).count(), 1);
    assert_eq!(made(&client, "run").await.len(), 1);
}

#[tokio::test]
async fn another_request_with_the_same_key_is_refused() {
    let service = shared();
    let (client, key) = (service.client(), key());
    post(&client, RUNS, &key, &shell("true")).await.expect(200);

    post(&client, RUNS, &key, &shell("false")).await.problem(409, "idempotency_key_reused");
    post(&client, &format!("{RUNS}?a=b"), &key, &shell("true")).await.problem(409, "idempotency_key_reused");
    let problem = post(&client, "/v1/sandboxes", &key, &shell("true")).await.problem(409, "idempotency_key_reused");

    assert_eq!(problem["retryable"], false);
    assert_eq!((made(&client, "run").await.len(), made(&client, "sandbox").await.len()), (1, 0));
}

#[tokio::test]
async fn another_request_with_the_key_of_one_that_goes_on_is_refused_at_once() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let mut request = shell("sleep 60");
    request["limits"] = json!({ "wall_ms": 120_000 });
    let first = tokio::spawn({
        let (client, key) = (client.clone(), key.clone());
        async move { post(&client, RUNS, &key, &request).await }
    });
    let run = format!("/v1/runs/{}", until_made(&client).await);
    client.until(&run, |run| run["state"] == "running").await;

    post(&client, RUNS, &key, &shell("true")).await.problem(409, "idempotency_key_reused");

    assert!(!first.is_finished(), "it was waited for");
    client.delete(&run).await.expect(200);
    assert_reason(&first.await.unwrap().expect(200), "stopped_by_user");
}

#[tokio::test]
async fn one_key_of_two_tenants_and_of_two_principals_are_different_keys() {
    let service = shared();
    let (one, other, key) = (service.client(), service.client(), key());
    let friend = {
        let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
        [Client::of_principal(&service.place, &tenant, "alice"), Client::of_principal(&service.place, &tenant, "bob")]
    };
    let mut ids = BTreeSet::new();
    for client in [&one, &other, &friend[0], &friend[1]] {
        let answer = post(client, RUNS, &key, &shell("true")).await;
        assert_eq!(answer.header("idempotency-replayed"), "");
        ids.insert(answer.expect(200)["id"].to_string());
    }
    assert_eq!(ids.len(), 4);
}

#[tokio::test]
async fn a_key_that_is_none_is_named() {
    let service = shared();
    let client = service.client();
    for bad in ["", "a b", &"k".repeat(256), "gr\u{fc}n"] {
        let problem = post(&client, RUNS, bad, &shell("true")).await.problem(422, "invalid_request");
        assert_eq!(problem["field"], "Idempotency-Key", "{bad}");
    }
    let twice = client.request(Method::POST, RUNS).header("idempotency-key", "a").header("idempotency-key", "b").json(&shell("true"));
    assert_eq!(client.send(twice, "POST", RUNS).await.problem(422, "invalid_request")["field"], "Idempotency-Key");
    assert_eq!(made(&client, "run").await.len(), 0);
}

#[tokio::test]
async fn a_refusal_that_stays_one_is_told_again_word_by_word() {
    let service = shared();
    let client = service.client();
    let (key, request) = (key(), json!({ "image": "busybox", "color": 1 }));

    let (first, second) = (post(&client, RUNS, &key, &request).await, post(&client, RUNS, &key, &request).await);

    assert_eq!(first.status, 422);
    assert_replayed(&first, &second);
    assert_eq!(second.body["request_id"], first.header("x-request-id"));
    assert_ne!(second.header("x-request-id"), first.header("x-request-id"));
}

#[tokio::test]
async fn an_image_that_came_since_can_be_run_and_tagged_with_the_same_key() {
    let client = shared().client();
    let (asked, request) = (key(), json!({ "image": "mine", "command": ["true"] }));
    let (named, name) = (key(), json!({ "reference": "mine", "name": "again" }));
    post(&client, RUNS, &asked, &request).await.problem(404, "image_not_found");
    post(&client, "/v1/images/tag", &named, &name).await.problem(404, "image_not_found");

    import(&client, "mine", &key(), std::fs::read(image::archive("busybox").unwrap()).unwrap()).await.expect(201);

    assert_exit(&post(&client, RUNS, &asked, &request).await.expect(200), 0);
    post(&client, "/v1/images/tag", &named, &name).await.expect(201);
}

#[tokio::test]
async fn a_refusal_that_passes_leaves_the_key_free() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let full = json!({ "image": "busybox", "command": ["true"], "limits": { "memory_bytes": 64 << 20 } });
    let tenant = client.get("/v1/quota").await.expect(200)["tenant"]["name"].clone();
    let path = format!("/v1/admin/tenants/{}", tenant.as_str().unwrap());
    let admin = Client::admin(&service.place);
    admin.patch(&path, &json!({ "quotas": { "sandboxes": 0 } })).await.expect(200);
    post(&client, RUNS, &key, &full).await.problem(429, "quota_exceeded");

    admin.patch(&path, &json!({ "quotas": { "sandboxes": 10 } })).await.expect(200);
    let answer = post(&client, RUNS, &key, &full).await;

    assert_eq!(answer.header("idempotency-replayed"), "");
    assert_exit(&answer.expect(200), 0);
}

#[tokio::test]
async fn a_token_that_may_not_do_it_hears_nothing_of_the_answer() {
    let service = shared();
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let (client, key) = (Client::of(&service.place, &tenant), key());
    let first = post(&client, RUNS, &key, &shell("echo secret")).await;

    let weaker = Client::with_scope(&service.place, &tenant, "sandboxes:read");
    post(&weaker, RUNS, &key, &shell("echo secret")).await.problem(403, "forbidden");
    let nobody = Client::with_token(&service.place, None);
    post(&nobody, RUNS, &key, &shell("echo secret")).await.problem(401, "unauthenticated");
    let admin = Client::admin(&service.place);
    admin.post(&format!("/v1/admin/tenants/{tenant}/suspend"), &json!({})).await.expect(200);
    post(&client, RUNS, &key, &shell("echo secret")).await.problem(403, "suspended");
    admin.post(&format!("/v1/admin/tenants/{tenant}/resume"), &json!({})).await.expect(200);

    assert_replayed(&first, &post(&client, RUNS, &key, &shell("echo secret")).await);
}

#[tokio::test]
async fn the_answer_to_a_run_with_much_output_is_told_again() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let request = shell("head -c 500000 /dev/zero | tr '\\0' x; echo end");

    let first = post(&client, RUNS, &key, &request).await;
    let second = post(&client, RUNS, &key, &request).await;

    assert_eq!(stdout(&first.clone().expect(200)).len(), 500_004);
    assert_replayed(&first, &second);
}

#[tokio::test]
async fn a_run_that_goes_on_is_accepted_with_the_same_words() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let mut request = shell("sleep 1");
    request["wait_ms"] = json!(0);

    let first = post(&client, RUNS, &key, &request).await;
    client.until(first.header("location"), |run| run["state"] == "exited").await;
    let second = post(&client, RUNS, &key, &request).await;

    assert_eq!(first.status, 202);
    assert_replayed(&first, &second);
}

#[tokio::test]
async fn a_client_that_goes_away_gets_its_answer_at_the_next_attempt() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let request = shell("sleep 2; echo done");
    let asked = tokio::spawn(client.request(Method::POST, RUNS).header("idempotency-key", &key).json(&request).send());
    until_made(&client).await;
    asked.abort();
    assert!(asked.await.is_err(), "it was answered before it went");

    let answer = post(&client, RUNS, &key, &request).await;

    assert_eq!(answer.header("idempotency-replayed"), "true");
    assert_eq!(stdout(&answer.expect(200)), "done\n");
    assert_eq!(made(&client, "run").await.len(), 1);
}

#[tokio::test]
async fn a_body_that_broke_off_is_no_request() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let pieces = futures_util::stream::iter([Ok("{\"image\":"), Err(std::io::Error::other("gone"))]);
    let asked = client.request(Method::POST, RUNS).header("idempotency-key", &key).body(reqwest::Body::wrap_stream(pieces));
    assert!(asked.send().await.is_err());

    assert_exit(&post(&client, RUNS, &key, &shell("true")).await.expect(200), 0);
}

async fn import(client: &Client, reference: &str, key: &str, archive: Vec<u8>) -> Answer {
    let path = format!("/v1/images/import?reference={reference}");
    // In pieces, as something large comes.
    let pieces: Vec<_> = archive.chunks(64 * 1024).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let request = client.request(Method::POST, &path).header("content-type", "application/x-tar").header("idempotency-key", key);
    client.send(request.body(body), "POST", &path).await
}

async fn imports(client: &Client) -> usize {
    let page = client.get("/v1/events?kind=image.imported").await.expect(200);
    page["items"].as_array().unwrap().len()
}

#[tokio::test]
async fn an_import_that_is_sent_again_is_compared_to_its_last_byte() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let archive = std::fs::read(image::archive("busybox").unwrap()).unwrap();
    let mut other = archive.clone();
    *other.last_mut().unwrap() ^= 1;

    let first = import(&client, "mine", &key, archive.clone()).await;
    let imported = imports(&client).await;
    let second = import(&client, "mine", &key, archive.clone()).await;

    assert_eq!(first.status, 201, "{}", first.text);
    assert_replayed(&first, &second);
    import(&client, "mine", &key, other).await.problem(409, "idempotency_key_reused");
    import(&client, "other", &key, archive).await.problem(409, "idempotency_key_reused");
    assert_eq!((imported, imports(&client).await), (1, 1));
}

#[tokio::test]
async fn two_imports_at_once_are_one() {
    let service = shared();
    let (client, key) = (service.client(), key());
    let archive = std::fs::read(image::archive("busybox").unwrap()).unwrap();

    let (one, other) = tokio::join!(import(&client, "mine", &key, archive.clone()), import(&client, "mine", &key, archive));

    assert_eq!((one.status, &one.text), (201, &other.text));
    assert_eq!(imports(&client).await, 1);
}

/// The operation's path with what it names, as far as this test knows how to make it: what is not there is told again, too.
fn path_of(operation: &Operation, tenant: &str) -> String {
    operation.template.replace("{tenant}", tenant).replace("{principal}", "tester")
}

#[tokio::test]
async fn every_post_of_the_contract_takes_a_key_and_replays() {
    let service: Shared = shared();
    let archive = std::fs::read(image::archive("busybox").unwrap()).unwrap();
    let posts: Vec<_> = contract::operations().into_iter().filter(|operation| operation.method == "POST").collect();
    assert!(posts.len() >= 8, "{posts:?}");
    for operation in posts {
        let parameters = operation.definition()["parameters"].as_array().cloned().unwrap_or_default();
        let takes_key = parameters.contains(&json!({ "$ref": "#/components/parameters/IdempotencyKey" }));
        assert!(takes_key, "{} does not say that it takes a key", operation.template);
        let client = Client::with_scope(&service.place, "keyed", &operation.scopes().expect("a POST needs a token").join(" "));
        let named = format!("tenant-{}", uuid::Uuid::new_v4().simple());
        Client::of(&service.place, &named).get("/v1/quota").await.expect(200);
        let (mut path, key) = (path_of(&operation, &named), key());
        let (media_type, body) = match operation.template.as_str() {
            "/v1/images/import" => {
                path += "?reference=keyed";
                ("application/x-tar", archive.clone())
            }
            // The service may ask no registry that there is here: that is said again, too.
            "/v1/images/pull" | "/v1/images/push" => {
                ("application/json", json!({ "reference": "127.0.0.1:5000/app:1" }).to_string().into_bytes())
            }
            RUNS | "/v1/sandboxes" => ("application/json", shell("true").to_string().into_bytes()),
            "/v1/admin/tenants" => ("application/json", json!({ "id": format!("{named}-new") }).to_string().into_bytes()),
            "/v1/sandboxes/{id}/files/{path}" => {
                path += "?mkdir";
                ("application/json", Vec::new())
            }
            _ => {
                let content = operation.definition()["requestBody"]["content"]["application/json"].clone();
                ("application/json", content.get("example").map(ToString::to_string).unwrap_or_default().into_bytes())
            }
        };
        let mut answers = Vec::new();
        for _ in 0..2 {
            let request = client.request(Method::POST, &path).header("content-type", media_type).header("idempotency-key", &key);
            answers.push(client.send(request.body(body.clone()), "POST", &path).await);
        }
        let is_of_registry = ["/v1/images/pull", "/v1/images/push"].contains(&path.as_str());
        let is_expected = (200..300).contains(&answers[0].status)
            || path.contains('{') && answers[0].status == 404
            || is_of_registry && answers[0].status == 422;
        assert!(is_expected, "{}: {}", operation.template, answers[0].text);
        assert_replayed(&answers[0], &answers[1]);
    }
}

/// The same tenant, at the address that the service has now.
fn survivor(service: &Service) -> Client {
    Client::of(service.place(), "survivor")
}

/// Sends it, and kills the service when what it makes runs.
async fn post_and_kill(service: &mut Service, path: &'static str, key: &str, request: &Value) {
    let asked = {
        let (client, key, request) = (survivor(service), key.to_owned(), request.clone());
        tokio::spawn(async move {
            let asked = client.request(Method::POST, path).header("idempotency-key", key).json(&request);
            asked.send().await.map(|response| response.status())
        })
    };
    let admin = Client::admin(service.place());
    let list = "/v1/admin/sandboxes?tenant=survivor";
    admin.until(list, |page| page["items"][0]["state"] == "running").await;
    service.kill();
    assert!(asked.await.unwrap().is_err(), "it was answered before the service was killed");
}

#[tokio::test]
async fn a_run_whose_service_was_killed_is_waited_for_and_answered() {
    let mut service = Service::start();
    let (key, request) = (key(), shell("sleep 3; echo done; exit 4"));
    post_and_kill(&mut service, RUNS, &key, &request).await;

    service.start_again().unwrap();
    let client = survivor(&service);
    post(&client, RUNS, &key, &shell("other")).await.problem(409, "idempotency_key_reused");
    let first = post(&client, RUNS, &key, &request).await;
    let second = post(&client, RUNS, &key, &request).await;

    let run = first.clone().expect(200);
    assert_exit(&run, 4);
    assert_eq!(stdout(&run), "done\n");
    assert_eq!((first.header("idempotency-replayed"), &first.text), ("true", &second.text));
    assert_eq!(made(&client, "run").await, BTreeSet::from([run["id"].as_str().unwrap().to_owned()]));
}

#[tokio::test]
async fn a_run_whose_service_was_killed_is_waited_for_no_longer_than_asked() {
    let mut service = Service::start();
    let key = key();
    let mut request = shell("sleep 60");
    request["wait_ms"] = json!(4000);
    post_and_kill(&mut service, RUNS, &key, &request).await;

    service.start_again().unwrap();
    let client = survivor(&service);
    let asked_at = Instant::now();
    let answer = post(&client, RUNS, &key, &request).await;

    assert!((3..30).contains(&asked_at.elapsed().as_secs()), "{:?}", asked_at.elapsed());
    assert_eq!(answer.expect(202)["state"], "running");
    assert_eq!(made(&client, "run").await.len(), 1);
}

#[tokio::test]
async fn a_sandbox_whose_service_was_killed_before_the_answer_is_answered_with() {
    // Its answer is what the service dies before: the program runs, and the key has no answer yet.
    let mut service = Service::start();
    let key = key();
    let request = shell("sleep 60");
    service.stop().unwrap();
    service.arm("service.idempotency.worked=return");
    service.start_again().unwrap();
    service.arm("");
    let client = survivor(&service);
    let asked = client.request(Method::POST, "/v1/sandboxes").header("idempotency-key", &key).json(&request);
    assert!(asked.send().await.is_err());
    service.wait().unwrap();

    service.start_again().unwrap();
    let client = survivor(&service);
    let answer = post(&client, "/v1/sandboxes", &key, &request).await;

    assert_eq!(answer.header("idempotency-replayed"), "true");
    let id = answer.expect(201)["id"].as_str().unwrap().to_owned();
    assert_eq!(made(&client, "sandbox").await, BTreeSet::from([id]));
}

#[tokio::test]
async fn what_a_killed_service_had_answered_is_answered_again() {
    let mut service = Service::start();
    let (key, request) = (key(), shell("cat /proc/sys/kernel/random/uuid"));
    let first = post(&survivor(&service), RUNS, &key, &request).await;

    service.kill();
    service.start_again().unwrap();

    assert_replayed(&first, &post(&survivor(&service), RUNS, &key, &request).await);
}

#[tokio::test]
async fn an_operation_that_a_crash_interrupted_is_done_again() {
    let mut service = Service::start_with(&[]).unwrap();
    service.stop().unwrap();
    service.arm("service.idempotency.worked=return");
    service.start_again().unwrap();
    service.arm("");
    let key = key();
    let (path, body) = ("/v1/admin/tenants/survivor/suspend", json!({}));
    survivor(&service).get("/v1/quota").await.expect(200);
    let admin = Client::admin(service.place());
    assert!(admin.request(Method::POST, path).header("idempotency-key", &key).json(&body).send().await.is_err());
    service.wait().unwrap();

    service.start_again().unwrap();
    let admin = Client::admin(service.place());
    let first = post(&admin, path, &key, &body).await;
    let second = post(&admin, path, &key, &body).await;

    assert_eq!(first.clone().expect(200)["suspended"], true);
    assert_replayed(&first, &second);
}

/// Sends it to a service that dies at this step, and starts that again.
async fn post_and_die(service: &mut Service, step: &str, path: &str, key: &str, body: &Value) {
    service.kill();
    service.arm(&format!("{step}=return"));
    service.start_again().unwrap();
    let asked = survivor(service).request(Method::POST, path).header("idempotency-key", key).json(body);
    asked.send().await.expect_err("the service dies before it answers");
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();
}

/// A sandbox of the survivor's that runs this, once it has said that it is up.
async fn sandbox_that_is_up(service: &Service, script: &str) -> String {
    let made = survivor(service).post("/v1/sandboxes", &shell(script)).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    until_written(service, &path, "up\n").await;
    path
}

async fn until_written(service: &Service, path: &str, what: &str) -> String {
    let id = path.rsplit('/').next().unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let text = survivor(service).follow(id, "from=0&follow=false").await.collect().await.stdout_text();
        if text.contains(what) {
            return text;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what:?} was never written: {text:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const HEEDS: &str = "trap 'echo heard' USR1; trap 'echo last; exit' USR2; echo up; while :; do sleep 0.05; done";

#[tokio::test]
async fn a_signal_that_a_crash_cut_off_is_sent_once_or_not_at_all_and_nobody_says_which() {
    for (step, heard) in [("service.idempotency.worked", 1), ("service.idempotency.begun", 0)] {
        let mut service = Service::start();
        let path = sandbox_that_is_up(&service, HEEDS).await;
        let (key, kill, usr1) = (key(), format!("{path}/kill"), json!({ "signal": "USR1" }));

        post_and_die(&mut service, step, &kill, &key, &usr1).await;
        let first = post(&survivor(&service), &kill, &key, &usr1).await;
        let second = post(&survivor(&service), &kill, &key, &usr1).await;
        survivor(&service).until(&path, |sandbox| sandbox["state"] == "running").await;
        survivor(&service).post(&kill, &json!({ "signal": "USR2" })).await.expect(200);
        let written = until_written(&service, &path, "last\n").await;

        assert_eq!(first.clone().problem(409, "outcome_unknown")["retryable"], false);
        assert_replayed(&first, &second);
        assert_eq!(written.matches("heard\n").count(), heard, "{step}: {written}");
    }
}

#[tokio::test]
async fn a_kill_that_a_crash_cut_off_is_done() {
    for step in ["service.idempotency.worked", "service.idempotency.begun"] {
        let mut service = Service::start();
        let path = sandbox_that_is_up(&service, HEEDS).await;
        let (key, kill) = (key(), format!("{path}/kill"));

        post_and_die(&mut service, step, &kill, &key, &json!({})).await;
        let first = post(&survivor(&service), &kill, &key, &json!({})).await;
        let second = post(&survivor(&service), &kill, &key, &json!({})).await;

        assert_eq!(first.clone().expect(200)["outcome"]["reason"], "stopped_by_user", "{step}");
        assert_replayed(&first, &second);
    }
}

#[tokio::test]
async fn a_rename_and_a_new_folder_that_a_crash_cut_off_are_not_done_again() {
    let mut service = Service::start();
    let path = sandbox_that_is_up(&service, "mkdir -p /tmp/d; touch /tmp/a /tmp/c; echo up; sleep 1000").await;
    let stat = async |service: &Service, file: &str| survivor(service).get(&format!("{path}/files/tmp/{file}?stat")).await.status;
    let worked = "service.idempotency.worked";

    for (step, what) in [(worked, "a?rename=/tmp/b"), ("service.idempotency.begun", "c?rename=/tmp/e"), (worked, "new?mkdir&parents=false")]
    {
        let (key, asked) = (key(), format!("{path}/files/tmp/{what}"));
        post_and_die(&mut service, step, &asked, &key, &Value::Null).await;
        let first = post(&survivor(&service), &asked, &key, &Value::Null).await;
        let second = post(&survivor(&service), &asked, &key, &Value::Null).await;
        first.clone().problem(409, "outcome_unknown");
        assert_replayed(&first, &second);
    }
    // The control: what may be there already may be made twice.
    let (key, asked) = (key(), format!("{path}/files/tmp/deep/er?mkdir"));
    post_and_die(&mut service, worked, &asked, &key, &Value::Null).await;
    survivor(&service).until(&path, |sandbox| sandbox["state"] == "running").await;
    post(&survivor(&service), &asked, &key, &Value::Null).await.expect(201);

    for (file, status) in [("a", 404), ("b", 200), ("c", 200), ("e", 404), ("new", 200), ("deep/er", 200)] {
        assert_eq!(stat(&service, file).await, status, "{file}");
    }
}

#[tokio::test]
async fn a_start_that_a_crash_cut_off_is_one_start() {
    let mut service = Service::start();
    let mut request = shell("n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; exit $n");
    request["keep_layer"] = json!(true);
    let made = survivor(&service).post("/v1/sandboxes", &request).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    survivor(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    let (key, start) = (key(), format!("{path}/start"));

    post_and_die(&mut service, "service.idempotency.worked", &start, &key, &json!({})).await;
    survivor(&service).get(&format!("{path}/wait?until=exited")).await.expect(200);
    let first = post(&survivor(&service), &start, &key, &json!({})).await;
    let second = post(&survivor(&service), &start, &key, &json!({})).await;

    assert_eq!(first.header("idempotency-replayed"), "true");
    let started = first.clone().expect(200);
    assert_exit(&started, 2);
    assert_eq!((&started["starts"], &first.text), (&json!(2), &second.text));
}
