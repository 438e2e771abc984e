//! Further processes in a running sandbox: each with its own outcome, whoever goes away meanwhile.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use mayfly_tests::{
    Client, Service,
    outcome::{assert_exit, assert_limits_hit, assert_reason, stdout},
    service::shared,
};
use reqwest::Method;
use serde_json::{Value, json};

const IDLE: &str = "exec sleep 1000";

async fn exec(client: &Client, id: &str, request: Value) -> Value {
    client.post(&format!("/v1/sandboxes/{id}/execs"), &request).await.expect(200)
}

async fn shell(client: &Client, id: &str, script: &str) -> Value {
    exec(client, id, json!({ "command": ["sh", "-c", script] })).await
}

/// Starts one that is not waited for, and waits until it runs.
async fn begun(client: &Client, id: &str, mut request: Value) -> String {
    request["wait_ms"] = json!(0);
    let answer = client.post(&format!("/v1/sandboxes/{id}/execs"), &request).await;
    let location = answer.header("location").to_owned();
    let path = format!("/v1/sandboxes/{id}/execs/{}", answer.expect(202)["id"].as_str().unwrap());
    assert_eq!(location, path);
    client.until(&path, |exec| exec["state"] != "starting").await;
    path
}

async fn ended(client: &Client, path: &str) -> Value {
    client.until(path, |exec| !exec["outcome"].is_null()).await
}

async fn remove(client: &Client, id: &str) {
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn an_exec_answers_like_a_run_and_sees_the_sandboxes_files() {
    let client = shared().client();
    let id = client.sandbox(&format!("echo made by the sandbox > /work/file; {IDLE}")).await;
    client.until(&format!("/v1/sandboxes/{id}"), |sandbox| sandbox["state"] == "running").await;

    let done = exec(
        &client,
        &id,
        json!({
            "command": ["sh", "-c", "cat; cat /work/file; pwd; id -u; echo $COLOUR; printf '\\377' >&2; exit 7"],
            "stdin": "given\n", "workdir": "/tmp", "user": "1000:1000", "env": { "COLOUR": "red" },
        }),
    )
    .await;

    assert_exit(&done, 7);
    assert_eq!(stdout(&done), "given\nmade by the sandbox\n/tmp\n1000\nred\n");
    assert_eq!((done["stderr"].as_str(), done["stderr_encoding"].as_str()), (Some("/w=="), Some("base64")));
    assert_eq!((done["state"].as_str(), done["sandbox_id"].as_str()), (Some("exited"), Some(id.as_str())));
    let again = client.get(&format!("/v1/sandboxes/{id}/execs/{}", done["id"].as_str().unwrap())).await.expect(200);
    assert_eq!(again, done);
    remove(&client, &id).await;
}

#[tokio::test]
async fn a_limit_ends_the_exec_and_not_its_sandbox() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;

    let late = exec(&client, &id, json!({ "command": ["sleep", "1000"], "limits": { "wall_ms": 200 } })).await;
    let loud = exec(&client, &id, json!({ "command": ["flood"], "output_policy": "kill", "limits": { "output_bytes": 5000 } })).await;
    let cut = exec(&client, &id, json!({ "command": ["flood", "9000"], "limits": { "output_bytes": 5000 } })).await;

    assert_reason(&late, "wall_timeout");
    assert_limits_hit(&late, &["wall"]);
    assert_reason(&loud, "output_limit");
    assert_eq!(stdout(&loud).len(), 5000);
    assert_exit(&cut, 0);
    assert_eq!((stdout(&cut).len(), &cut["outcome"]["truncated"]["stdout"]), (5000, &json!(true)));
    assert_exit(&shell(&client, &id, "true").await, 0);
    assert_eq!(client.get(&format!("/v1/sandboxes/{id}")).await.expect(200)["state"], "running");
    remove(&client, &id).await;
}

#[tokio::test]
async fn what_cannot_be_started_says_so_and_is_no_fault_of_ours() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;

    let missing = exec(&client, &id, json!({ "command": ["no-such-program"] })).await;
    let nowhere = exec(&client, &id, json!({ "command": ["true"], "workdir": "/no/such/folder" })).await;

    for failed in [missing, nowhere] {
        assert_reason(&failed, "start_failed");
        assert_eq!(failed["state"], "failed");
    }
    remove(&client, &id).await;
}

#[tokio::test]
async fn an_exec_is_listed_followed_signalled_and_killed() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;
    let script = "trap 'echo asked; exit 5' TERM; echo on; while :; do sleep 0.05; done";
    let asked = begun(&client, &id, json!({ "command": ["sh", "-c", script] })).await;
    let forced = begun(&client, &id, json!({ "command": ["sleep", "1000"] })).await;
    let mut log = client.attach(&format!("{asked}/logs?from=0")).await;
    assert_eq!(log.next().await.unwrap()["data"], "on\n");

    assert_eq!(client.post(&format!("{asked}/kill"), &json!({ "signal": "SIGTERM" })).await.status, 204);
    assert_eq!(client.post_raw(&format!("{forced}/kill"), "application/json", "").await.status, 204);
    let frames = log.collect().await;
    let (asked_end, forced_end) = (ended(&client, &asked).await, ended(&client, &forced).await);

    assert_eq!(frames.stdout_text(), "asked\n");
    assert_eq!(frames.end.as_ref(), Some(&asked_end["outcome"]));
    assert_exit(&asked_end, 5);
    assert_reason(&forced_end, "stopped_by_user");
    let refused = client.post(&format!("{asked}/kill"), &json!({})).await.problem(409, "wrong_state");
    assert_eq!(refused["state"], "exited");
    let first = client.get(&format!("/v1/sandboxes/{id}/execs?limit=1")).await.expect(200);
    let second =
        client.get(&format!("/v1/sandboxes/{id}/execs?limit=1&cursor={}", first["next_cursor"].as_str().unwrap())).await.expect(200);
    assert_eq!((&first["items"][0]["id"], &second["items"][0]["id"]), (&forced_end["id"], &asked_end["id"]));
    assert!(second["next_cursor"].is_null());
    remove(&client, &id).await;
}

#[tokio::test]
async fn an_exec_outlives_whoever_asked_for_it() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;
    let asking = client.request(Method::POST, &format!("/v1/sandboxes/{id}/execs"));
    let asking = tokio::spawn(asking.json(&json!({ "command": ["sh", "-c", "sleep 2; echo all the same"] })).send());
    let is_there = |page: &Value| page["items"].as_array().is_some_and(|items| !items.is_empty());
    let listed = client.until(&format!("/v1/sandboxes/{id}/execs"), is_there).await;
    asking.abort();
    assert!(asking.await.is_err(), "it was answered before it went");

    let done = ended(&client, &format!("/v1/sandboxes/{id}/execs/{}", listed["items"][0]["id"].as_str().unwrap())).await;

    assert_exit(&done, 0);
    assert_eq!(stdout(&done), "all the same\n");
    remove(&client, &id).await;
}

#[tokio::test]
async fn execs_end_with_their_sandbox() {
    let client = shared().client();
    let id = client.sandbox("sleep 1.5").await;
    let path = begun(&client, &id, json!({ "command": ["sh", "-c", "echo on; sleep 1000"] })).await;

    client.until(&format!("/v1/sandboxes/{id}"), |sandbox| !sandbox["outcome"].is_null()).await;
    let done = ended(&client, &path).await;

    assert_eq!(stdout(&done), "on\n");
    assert_ne!(done["outcome"]["reason"], "infra_error", "{done:#}");
    let late = client.post(&format!("/v1/sandboxes/{id}/execs"), &json!({ "command": ["true"] })).await.problem(409, "wrong_state");
    assert_eq!(late["state"], "exited");
    remove(&client, &id).await;
    client.get(&path).await.problem(404, "not_found");
}

#[tokio::test]
async fn a_request_that_is_sent_twice_starts_one_exec() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;
    let path = format!("/v1/sandboxes/{id}/execs");
    let body = json!({ "command": ["sh", "-c", "echo once >> /work/count; cat /work/count; sleep 0.3"] });
    let send = || client.send(client.request(Method::POST, &path).header("idempotency-key", "one").json(&body), "POST", &path);

    let (first, second) = tokio::join!(send(), send());
    let third = send().await;

    let ids: Vec<_> = [&first, &second, &third].iter().map(|answer| answer.body["id"].clone()).collect();
    assert!(ids.iter().all(|id| *id == ids[0] && id.is_string()), "{ids:?}");
    assert_eq!(stdout(&third.expect(200)), "once\n");
    let other = client.request(Method::POST, &path).header("idempotency-key", "one").json(&json!({ "command": ["false"] }));
    client.send(other, "POST", &path).await.problem(409, "idempotency_key_reused");
    remove(&client, &id).await;
}

#[tokio::test]
async fn as_many_live_in_one_sandbox_as_may() {
    let client = shared().client();
    let request = json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "pids": 200 } });
    let id = client.post("/v1/sandboxes", &request).await.expect(201)["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}/execs");
    let body = json!({ "command": ["sleep", "1000"], "wait_ms": 0 });
    for _ in 0..64 {
        client.post(&path, &body).await.expect(202);
    }

    let refused = client.post(&path, &body).await.problem(429, "quota_exceeded");

    assert_eq!((&refused["quota"], &refused["limit"], &refused["used"]), (&json!("execs"), &json!(64), &json!(64)));
    remove(&client, &id).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;
    let path = format!("/v1/sandboxes/{id}/execs");
    for (body, field) in [
        (json!({}), "command"),
        (json!({ "command": [] }), "command"),
        (json!({ "command": ["a"], "user": "a b" }), "user"),
        (json!({ "command": ["a"], "workdir": "../x" }), "workdir"),
        (json!({ "command": ["a"], "env": { "A=B": "" } }), "env"),
        (json!({ "command": ["a"], "limits": { "wall_ms": 0 } }), "limits.wall_ms"),
        (json!({ "command": ["a"], "limits": { "memory_bytes": 1 } }), "limits.memory_bytes"),
        (json!({ "command": ["a"], "stdin": "x", "tty": true }), "stdin"),
        (json!({ "command": ["a"], "wait_ms": 300_001 }), "wait_ms"),
        (json!({ "command": ["a"], "colour": "red" }), "colour"),
    ] {
        assert_eq!(client.post(&path, &body).await.problem(422, "invalid_request")["field"], field, "{body}");
    }
    client.post("/v1/sandboxes/nothing/execs", &json!({ "command": ["a"] })).await.problem(404, "not_found");
    shared().client().post(&path, &json!({ "command": ["a"] })).await.problem(404, "not_found");
    let reader = Client::with_scope(client.place(), "reader", "sandboxes:read");
    reader.post(&path, &json!({ "command": ["a"] })).await.problem(403, "forbidden");
    assert_eq!(client.get(&path).await.expect(200)["items"], json!([]));
    remove(&client, &id).await;
}

#[tokio::test]
async fn an_exec_has_a_terminal_of_the_size_that_it_is_told() {
    let client = shared().client();
    let id = client.sandbox(IDLE).await;

    let sized = exec(&client, &id, json!({ "command": ["stty", "size"], "tty": { "rows": 11, "columns": 22 }, "wait_ms": 10_000 })).await;
    let script = "trap 'stty size; exit' WINCH; echo on; while :; do sleep 0.05; done";
    let path = begun(&client, &id, json!({ "command": ["sh", "-c", script], "tty": true })).await;
    let mut log = client.attach(&format!("{path}/logs?from=0")).await;
    log.next().await.unwrap();
    assert_eq!(client.post(&format!("{path}/resize"), &json!({ "rows": 33, "columns": 44 })).await.status, 204);
    let told = log.collect().await;

    assert_eq!(stdout(&sized), "11 22\r\n");
    assert_eq!(told.stdout_text(), "33 44\r\n");
    let plain = begun(&client, &id, json!({ "command": ["sleep", "1000"] })).await;
    client.post(&format!("{plain}/resize"), &json!({ "rows": 1, "columns": 1 })).await.problem(409, "conflict");
    let refused = client.post(&format!("{plain}/resize"), &json!({ "rows": 0, "columns": 1 })).await.problem(422, "invalid_request");
    assert_eq!(refused["field"], "rows");
    remove(&client, &id).await;
}

#[tokio::test]
async fn an_exec_goes_on_while_the_service_is_dead_and_its_end_is_told_once() {
    let mut service = Service::start();
    let survivor = |service: &Service| Client::of(service.place(), "survivor");
    let client = survivor(&service);
    let id = client.sandbox(IDLE).await;
    let short = begun(&client, &id, json!({ "command": ["sh", "-c", "echo before; sleep 1; echo meanwhile; exit 3"] })).await;
    let long = begun(&client, &id, json!({ "command": ["sh", "-c", "echo before; sleep 6; echo after"] })).await;

    service.kill();
    tokio::time::sleep(Duration::from_secs(2)).await;
    service.start_again().unwrap();
    let client = survivor(&service);
    let (short, long) = (ended(&client, &short).await, ended(&client, &long).await);
    let log = client.attach(&format!("/v1/sandboxes/{id}/execs/{}/logs", long["id"].as_str().unwrap())).await.collect().await;

    assert_exit(&short, 3);
    assert_eq!(stdout(&short), "before\nmeanwhile\n");
    assert_exit(&long, 0);
    assert_eq!((log.stdout_text().as_str(), log.gaps.len()), ("before\nafter\n", 0));
    let events = client.get("/v1/events?kind=exec.ended").await.expect(200);
    let mut told: Vec<_> = events["items"].as_array().unwrap().iter().map(|event| event["object"].as_str().unwrap()).collect();
    told.sort_unstable();
    let mut ids = [&short, &long].map(|exec| format!("exec/{}", exec["id"].as_str().unwrap()));
    ids.sort_unstable();
    assert_eq!(told, ids);
    assert_eq!(client.get(&format!("/v1/sandboxes/{id}")).await.expect(200)["state"], "running");
}
