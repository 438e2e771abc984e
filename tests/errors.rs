//! Bad input gets a clear error that names what is wrong, and nothing is left behind.

use jsonwebtoken::Algorithm;
use mayfly_tests::{
    Answer, Client,
    service::{Shared, shared},
    token,
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

fn hello() -> Value {
    json!({ "image": "busybox", "command": ["echo", "hello"] })
}

async fn with_token(service: &Shared, token: Option<String>) -> Answer {
    Client::with_token(&service.place, token).post("/v1/runs", &hello()).await
}

async fn with_claims(service: &Shared, bend: impl FnOnce(&mut Value)) -> Answer {
    let mut claims = token::claims("tenant", token::TENANT_SCOPES);
    bend(&mut claims);
    with_token(service, Some(token::sign(&claims, &service.place.secret_file()))).await
}

#[track_caller]
fn unauthenticated(answer: Answer) {
    let challenge = answer.header("www-authenticate").to_owned();
    let problem = answer.problem(401, "unauthenticated");
    assert!(challenge.starts_with("Bearer"), "no challenge: {challenge:?}");
    assert!(problem["request_id"].is_string(), "{problem:#}");
}

#[tokio::test]
async fn no_token_is_unauthenticated() {
    unauthenticated(with_token(&shared(), None).await);
}

#[tokio::test]
async fn a_token_that_is_none_is_unauthenticated() {
    unauthenticated(with_token(&shared(), Some("not.a.token".to_owned())).await);
}

#[tokio::test]
async fn an_expired_token_is_unauthenticated() {
    unauthenticated(with_claims(&shared(), |c| c["exp"] = json!(token::now_unix_s() - 60)).await);
}

#[tokio::test]
async fn a_token_that_expired_within_the_leeway_is_good() {
    let answer = with_claims(&shared(), |c| c["exp"] = json!(token::now_unix_s() - 5)).await;

    assert_eq!(answer.status, 200, "{}", answer.text);
}

#[tokio::test]
async fn a_token_that_is_not_valid_yet_is_unauthenticated() {
    unauthenticated(with_claims(&shared(), |c| c["nbf"] = json!(token::now_unix_s() + 600)).await);
}

#[tokio::test]
async fn a_token_without_an_end_is_unauthenticated() {
    unauthenticated(with_claims(&shared(), |c| drop(c.as_object_mut().unwrap().remove("exp"))).await);
}

#[tokio::test]
async fn a_token_for_another_audience_is_unauthenticated() {
    unauthenticated(with_claims(&shared(), |c| c["aud"] = json!("another-service")).await);
}

#[tokio::test]
async fn a_token_without_an_audience_is_unauthenticated() {
    unauthenticated(with_claims(&shared(), |c| drop(c.as_object_mut().unwrap().remove("aud"))).await);
}

#[tokio::test]
async fn a_token_without_a_tenant_is_unauthenticated() {
    unauthenticated(with_claims(&shared(), |c| drop(c.as_object_mut().unwrap().remove("tenant"))).await);
}

#[tokio::test]
async fn a_token_signed_with_another_secret_is_unauthenticated() {
    let forged = token::sign_with(&token::claims("tenant", token::TENANT_SCOPES), &[7; 32], Algorithm::HS256);

    unauthenticated(with_token(&shared(), Some(forged)).await);
}

#[tokio::test]
async fn a_token_signed_by_another_algorithm_is_unauthenticated() {
    let service = shared();
    let secret = std::fs::read(service.place.secret_file()).unwrap();
    let signed = token::sign_with(&token::claims("tenant", token::TENANT_SCOPES), secret.trim_ascii_end(), Algorithm::HS512);

    unauthenticated(with_token(&service, Some(signed)).await);
}

#[tokio::test]
async fn a_token_that_says_it_needs_no_signature_is_unauthenticated() {
    let service = shared();
    let good = token::sign(&token::claims("tenant", token::TENANT_SCOPES), &service.place.secret_file());
    let payload = good.split('.').nth(1).unwrap();
    // {"alg":"none","typ":"JWT"}
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.");

    unauthenticated(with_token(&service, Some(unsigned)).await);
}

#[tokio::test]
async fn a_missing_scope_is_forbidden_and_named() {
    let service = shared();
    let client = Client::with_scope(&service.place, "tenant", "sandboxes:read");

    let problem = client.post("/v1/runs", &hello()).await.problem(403, "forbidden");

    assert!(problem["detail"].as_str().unwrap().contains("runs"), "{problem:#}");
}

#[tokio::test]
async fn a_reader_may_not_delete() {
    let service = shared();
    let client = Client::with_scope(&service.place, "tenant", "sandboxes:read");

    let problem = client.delete("/v1/sandboxes/0190b5a4-0000-7000-8000-000000000000").await.problem(403, "forbidden");

    assert!(problem["detail"].as_str().unwrap().contains("sandboxes:write"), "{problem:#}");
}

#[tokio::test]
async fn an_unknown_image_is_named() {
    let problem = shared().client().post("/v1/runs", &json!({ "image": "no-such-image" })).await.problem(404, "image_not_found");

    assert!(problem["detail"].as_str().unwrap().contains("no-such-image"), "{problem:#}");
}

#[tokio::test]
async fn an_unknown_run_is_not_found() {
    let answer = shared().client().get("/v1/runs/0190b5a4-0000-7000-8000-000000000000").await;

    answer.problem(404, "not_found");
}

#[tokio::test]
async fn an_id_that_is_none_is_not_found() {
    let answer = shared().client().get("/v1/runs/not-an-id").await;

    answer.problem(404, "not_found");
}

#[tokio::test]
async fn an_unknown_path_is_not_found() {
    let answer = shared().client().get("/v1/no/such/thing").await;

    answer.problem(404, "not_found");
}

#[tokio::test]
async fn a_method_that_a_path_does_not_have_is_told() {
    let client = shared().client();

    let answer = client.send(client.request(Method::PUT, "/v1/runs"), "PUT", "/v1/runs").await;

    let allowed = answer.header("allow").to_owned();
    answer.problem(405, "method_not_allowed");
    assert!(allowed.contains("POST"), "{allowed:?}");
}

#[tokio::test]
async fn malformed_json_is_told() {
    let answer = shared().client().post_raw("/v1/runs", "application/json", r#"{"image": "busybox","#).await;

    answer.problem(422, "invalid_request");
}

#[tokio::test]
async fn an_empty_body_is_told() {
    let answer = shared().client().post_raw("/v1/runs", "application/json", "").await;

    answer.problem(422, "invalid_request");
}

/// The problem that a run with one more member gets.
async fn refused(member: &str, value: Value) -> Value {
    let mut request = hello();
    request[member] = value;
    shared().client().post("/v1/runs", &request).await.problem(422, "invalid_request")
}

#[tokio::test]
async fn an_unknown_field_is_named() {
    let problem = refused("comand", json!([])).await;

    assert!(problem["field"].as_str() == Some("comand") || problem["detail"].as_str().unwrap().contains("comand"), "{problem:#}");
}

#[tokio::test]
async fn an_unknown_limit_is_named() {
    let problem = refused("limits", json!({ "memory": 1 })).await;

    assert!(problem.to_string().contains("memory"), "{problem:#}");
    assert!(problem["field"].as_str().unwrap().starts_with("limits"), "{problem:#}");
}

#[tokio::test]
async fn a_limit_above_its_bound_names_both() {
    let problem = refused("limits", json!({ "pids": 4097 })).await;

    assert_eq!(problem["field"], "limits.pids");
    assert_eq!((&problem["bound"]["min"], &problem["bound"]["max"]), (&json!(1), &json!(4096)), "{problem:#}");
}

#[tokio::test]
async fn a_limit_below_its_bound_names_both() {
    let problem = refused("limits", json!({ "memory_bytes": 1024 })).await;

    assert_eq!(problem["field"], "limits.memory_bytes");
    assert_eq!(problem["bound"]["min"], 8 << 20, "{problem:#}");
}

#[tokio::test]
async fn a_negative_limit_names_the_bound() {
    let problem = refused("limits", json!({ "wall_ms": -1 })).await;

    assert_eq!(problem["field"], "limits.wall_ms");
    assert_eq!(problem["bound"]["min"], 1, "{problem:#}");
}

#[tokio::test]
async fn a_limit_that_is_a_word_names_the_field() {
    let problem = refused("limits", json!({ "cpu_millis": "many" })).await;

    assert_eq!(problem["field"], "limits.cpu_millis");
}

#[tokio::test]
async fn a_wait_beyond_its_bound_is_named() {
    let problem = refused("wait_ms", json!(300_001)).await;

    assert_eq!(problem["field"], "wait_ms");
    assert_eq!(problem["bound"]["max"], 300_000, "{problem:#}");
}

#[tokio::test]
async fn a_command_that_is_no_list_is_named() {
    let problem = refused("command", json!("echo hello")).await;

    assert_eq!(problem["field"], "command");
}

#[tokio::test]
async fn an_empty_command_is_named() {
    let problem = refused("command", json!([])).await;

    assert!(problem["field"].as_str().unwrap().starts_with("command"), "{problem:#}");
}

#[tokio::test]
async fn an_argument_with_a_zero_byte_is_named() {
    let problem = refused("command", json!(["echo", "a\0b"])).await;

    assert!(problem["field"].as_str().unwrap().starts_with("command"), "{problem:#}");
}

#[tokio::test]
async fn arguments_that_are_too_long_are_named() {
    let problem = refused("command", json!(["echo", "x".repeat(70_000)])).await;

    assert!(problem["field"].as_str().unwrap().starts_with("command"), "{problem:#}");
}

#[tokio::test]
async fn an_environment_name_that_is_none_is_named() {
    let problem = refused("env", json!({ "A=B": "c" })).await;

    assert!(problem["field"].as_str().unwrap().starts_with("env"), "{problem:#}");
}

#[tokio::test]
async fn a_relative_working_folder_is_named() {
    let problem = refused("workdir", json!("work")).await;

    assert_eq!(problem["field"], "workdir");
}

#[tokio::test]
async fn a_file_whose_content_is_not_the_base64_it_claims_is_named() {
    let problem = refused("files", json!([{ "path": "a", "content": "%%%", "encoding": "base64" }])).await;

    assert_eq!(problem["field"], "files[0].content");
}

#[tokio::test]
async fn a_network_that_there_is_not_is_named() {
    let problem = refused("network", json!("host")).await;

    assert_eq!(problem["field"], "network");
}

#[tokio::test]
async fn a_body_that_may_be_left_out_is_not_null_for_that() {
    let client = shared().client();
    let path = "/v1/sandboxes/0190b5a4-0000-7000-8000-000000000000/resume";

    client.post_raw(path, "application/json", "null").await.problem(422, "invalid_request");
    client.post_raw(path, "application/json", "").await.problem(404, "not_found");
}

#[tokio::test]
async fn a_path_that_leads_out_or_is_none_is_named() {
    let long = "d/".repeat(2048) + "f";
    assert_eq!(long.len(), 4097);
    for path in ["../a", "a/../../b", "a\0b", "", long.as_str()] {
        let problem = refused("files", json!([{ "path": "fine", "content": "" }, { "path": path, "content": "" }])).await;
        assert_eq!(problem["field"], "files[1].path", "{path:.20}");
    }
    for path in ["/a\0b", "a", &format!("/{long}")] {
        assert_eq!(refused("workdir", json!(path)).await["field"], "workdir", "{path:.20}");
    }
}

#[tokio::test]
async fn a_zero_byte_is_named_wherever_the_system_would_end_a_word_at_it() {
    for (member, value) in [
        ("env", json!({ "A": "a\0b" })),
        ("env", json!({ "A\0": "b" })),
        ("user", json!("a\0")),
        ("labels", json!({ "a": "\0" })),
        ("entrypoint", json!(["sh\0"])),
        ("image", json!("busy\0box")),
    ] {
        let problem = refused(member, value.clone()).await;
        assert!(problem["field"].as_str().unwrap().starts_with(member), "{value}: {problem:#}");
    }
}

#[tokio::test]
async fn ten_thousand_files_are_too_many_for_one_request_and_a_thousand_are_not() {
    let files = |count: usize| (0..count).map(|n| json!({ "path": format!("f{n}"), "content": "" })).collect::<Value>();

    let refused = refused("files", files(10_000)).await;
    let run = shared().client().run(&json!({ "image": "busybox", "command": ["sh", "-c", "ls | wc -l"], "files": files(1024) })).await;

    assert_eq!(refused["field"], "files");
    assert_eq!(run["stdout"], "1024\n", "{run:#}");
}

#[tokio::test]
async fn what_is_no_text_is_told() {
    let client = shared().client();
    let body = [&br#"{"image":"busybox","command":["echo",""#[..], &[0xff, 0xfe], br#""]}"#].concat();

    client.post_raw("/v1/runs", "application/json", body).await.problem(422, "invalid_request");
    client.get("/v1/runs/%ff").await.problem(422, "invalid_request");
    client.get("/v1/sandboxes/%ff").await.problem(422, "invalid_request");
    client.get("/v1/sandboxes?name=%ff").await.problem(422, "invalid_request");
    client.get("/v1/sandboxes?%ff=1").await.problem(422, "invalid_request");
}

/// Sends this and closes our side; what is answered until the other side is closed, too.
async fn half_closed(service: &Shared, sent: &str) -> String {
    let mut stream = TcpStream::connect(service.place.url.trim_start_matches("http://")).await.expect("it listens");
    stream.write_all(sent.as_bytes()).await.expect("it takes what it is sent");
    stream.shutdown().await.expect("it is our side");
    let mut answer = Vec::new();
    // A reset is an end, too.
    let reading = tokio::time::timeout(std::time::Duration::from_secs(20), stream.read_to_end(&mut answer));
    drop(reading.await.expect("a connection that brings no more is not kept"));
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_request_that_was_cut_off_makes_nothing_and_one_whose_sender_closed_its_side_is_done_once() {
    let service = shared();
    let client = service.client();
    let body = json!({ "image": "busybox", "command": ["sleep", "1000"] });
    let head = format!(
        "POST /v1/sandboxes HTTP/1.1\r\nhost: mayfly\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\nidempotency-key: half\r\n\
        content-length: {}\r\n\r\n",
        client.token().expect("it has one"),
        body.to_string().len()
    );
    let whole = format!("{head}{body}");

    for length in [10, head.len() - 1, head.len(), whole.len() - 1] {
        let answer = half_closed(&service, &whole[..length]).await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{length} of {} bytes: {answer}", whole.len());
    }
    assert_eq!(client.get("/v1/sandboxes").await.expect(200)["items"], json!([]));
    half_closed(&service, &whole).await;
    let again = client.request(Method::POST, "/v1/sandboxes").header("idempotency-key", "half").json(&body);
    let made = client.send(again, "POST", "/v1/sandboxes").await.expect(201);

    assert_eq!(client.get("/v1/sandboxes").await.expect(200)["items"].as_array().unwrap().len(), 1);
    assert_eq!(client.delete(&format!("/v1/sandboxes/{}", made["id"].as_str().unwrap())).await.status, 204);
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let mut request = hello();
    request["stdin"] = json!("x".repeat(17 << 20));

    let answer = shared().client().post("/v1/runs", &request).await;

    answer.problem(413, "payload_too_large");
}

#[tokio::test]
async fn a_body_of_fifteen_megabytes_is_taken() {
    let mut request = json!({ "image": "busybox", "command": ["wc", "-c"] });
    request["stdin"] = json!("x".repeat(15_000_000));

    let run = shared().client().run(&request).await;

    assert_eq!(run["stdout"], "15000000\n", "{}", run["outcome"]);
}

#[tokio::test]
async fn a_list_with_a_bad_cursor_is_told() {
    let answer = shared().client().get("/v1/sandboxes?cursor=%00nonsense").await;

    answer.problem(422, "invalid_request");
}

#[tokio::test]
async fn an_error_carries_the_callers_request_id() {
    let client = shared().client();
    let request = client.request(Method::GET, "/v1/runs/not-an-id").header("x-request-id", "from-the-caller-1");

    let answer = client.send(request, "GET", "/v1/runs/not-an-id").await;

    assert_eq!(answer.header("x-request-id"), "from-the-caller-1");
    assert_eq!(answer.problem(404, "not_found")["request_id"], "from-the-caller-1");
}

#[tokio::test]
async fn refused_requests_leave_nothing_behind() {
    let client = shared().client();
    let bad = json!({ "image": "busybox", "command": ["true"], "limits": { "pids": 0 } });
    client.post("/v1/sandboxes", &bad).await.problem(422, "invalid_request");
    let unknown = json!({ "image": "no-such-image" });
    client.post("/v1/sandboxes", &unknown).await.problem(404, "image_not_found");

    let list = client.get("/v1/sandboxes").await.expect(200);

    assert_eq!(list["items"], json!([]));
}
