//! `openapi.yaml` says what the service does: every operation exists, and every answer that any test gets is one that it promises.
//!
//! The second half is done by the client that all tests use; see `mayfly_tests::contract`.

use mayfly_tests::{contract, service::shared, token};
use reqwest::Method;
use serde_json::json;

#[tokio::test]
async fn the_service_sends_the_contract_that_it_was_built_from() {
    let service = shared();
    let on_disk = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi.yaml")).unwrap();

    let sent = reqwest::get(format!("{}/openapi.yaml", service.place.url)).await.unwrap().text().await.unwrap();

    assert_eq!(sent, on_disk);
}

#[tokio::test]
async fn every_operation_of_the_contract_exists() {
    let service = shared();
    let client = service.client();
    let mut missing = Vec::new();
    for operation in contract::operations() {
        let path = operation
            .template
            .replace("{id}", "0190b5a4-0000-7000-8000-000000000000")
            .replace("{reference}", "no-such-image")
            .replace("{tenant}", "no-such-tenant")
            .replace("{principal}", "nobody");
        // Metrics have a listener of their own.
        let base = if path == "/metrics" { &service.place.metrics_url } else { &service.place.url };
        let method: Method = operation.method.parse().unwrap();
        let mut request = reqwest::Client::new().request(method.clone(), format!("{base}{path}")).bearer_auth(client.token().unwrap());
        if method == Method::POST {
            request = request.header("content-type", "application/json").body("{}");
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let content_type = response.headers().get("content-type").map_or("", |v| v.to_str().unwrap()).to_owned();
        let body = response.text().await.unwrap();
        let is_unknown = status == 405 || status == 404 && !body.contains("not_found");
        if is_unknown {
            missing.push(format!("{} {}: {status}", operation.method, operation.template));
        } else if let Err(breach) = contract::check(&operation.method, &path, status, &content_type, &body) {
            missing.push(format!("{breach:#}"));
        }
    }

    assert!(missing.is_empty(), "{missing:#?}");
}

#[tokio::test]
async fn every_operation_but_the_open_ones_wants_a_token() {
    let service = shared();
    let open = ["/healthz", "/readyz", "/metrics", "/openapi.yaml", "/docs"];
    let mut unguarded = Vec::new();
    for operation in contract::operations().into_iter().filter(|o| !open.contains(&o.template.as_str())) {
        let path = operation
            .template
            .replace("{id}", "0190b5a4-0000-7000-8000-000000000000")
            .replace("{reference}", "busybox")
            .replace("{tenant}", "no-such-tenant")
            .replace("{principal}", "nobody");
        let method: Method = operation.method.parse().unwrap();
        let status = reqwest::Client::new().request(method, format!("{}{path}", service.place.url)).send().await.unwrap().status().as_u16();
        if status != 401 {
            unguarded.push(format!("{} {}: {status}", operation.method, operation.template));
        }
    }

    assert!(unguarded.is_empty(), "{unguarded:#?}");
}

#[tokio::test]
async fn the_limits_told_are_the_limits_held() {
    let client = shared().client();

    let told = client.get("/v1/limits").await.expect(200);

    let text = told.to_string();
    for field in [
        "memory_bytes",
        "cpu_millis",
        "pids",
        "wall_ms",
        "cpu_ms",
        "output_bytes",
        "disk_bytes",
        "inodes",
        "open_files",
        "file_size_bytes",
        "io_bytes_per_s",
        "io_ops_per_s",
    ] {
        assert!(text.contains(field), "{field} is not told: {told:#}");
    }
}

#[tokio::test]
async fn health_and_readiness_are_open_to_everybody() {
    let service = shared();

    let alive = reqwest::get(format!("{}/healthz", service.place.url)).await.unwrap().status();
    let ready = reqwest::get(format!("{}/readyz", service.place.url)).await.unwrap().status();

    assert_eq!((alive.as_u16(), ready.as_u16()), (200, 200));
}

#[tokio::test]
async fn metrics_count_runs_and_requests() {
    let service = shared();
    let client = service.client();
    client.shell("exit 1").await;
    client.post("/v1/runs", &json!({})).await;

    let metrics = reqwest::get(format!("{}/metrics", service.place.metrics_url)).await.unwrap();

    assert!(metrics.headers()["content-type"].to_str().unwrap().starts_with("text/plain"));
    let text = metrics.text().await.unwrap();
    let has = |name: &str, label: &str| text.lines().any(|l| l.starts_with(name) && l.contains(label) && !l.ends_with(" 0"));
    assert!(has("sandbox_runs_total", "reason=\"exited\""), "{text}");
    assert!(has("mayfly_http_requests_total", "status=\"422\""), "{text}");
    assert!(has("mayfly_http_request_seconds_count", ""), "{text}");
    assert!(has("sandbox_launch_seconds_count", ""), "{text}");
}

#[tokio::test]
async fn the_api_shows_no_metrics() {
    let service = shared();

    let answer = reqwest::get(format!("{}/metrics", service.place.url)).await.unwrap();

    assert_eq!(answer.status().as_u16(), 404);
}

#[tokio::test]
async fn no_answer_or_metric_or_log_holds_a_token() {
    let service = shared();
    let client = service.client();
    client.shell("echo quiet").await;
    let bad = token::sign_with(&token::claims("tenant", "runs"), &[1; 32], jsonwebtoken::Algorithm::HS256);
    let refused = mayfly_tests::Client::with_token(&service.place, Some(bad.clone())).post("/v1/runs", &json!({})).await;
    let metrics = reqwest::get(format!("{}/metrics", service.place.metrics_url)).await.unwrap().text().await.unwrap();
    let log = std::fs::read_to_string(service.place.data_dir.parent().unwrap().join("service.log")).unwrap();

    assert!(!refused.text.contains(&bad));
    for text in [&metrics, &log] {
        assert!(!text.contains(client.token().unwrap()) && !text.contains(&bad) && !text.contains("eyJ"));
    }
}
