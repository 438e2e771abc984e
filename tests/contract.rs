//! `openapi.yaml` says what the service does: every operation exists, and every answer that any test gets is one that it promises.
//!
//! The second half is done by the client that all tests use; see `mayfly_tests::contract`.

use std::collections::BTreeSet;

use mayfly_tests::{contract, service::shared, token};
use reqwest::{Method, header::HeaderMap};
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
        let headers = response.headers().clone();
        let body = response.text().await.unwrap();
        let is_unknown = status == 405 || status == 404 && !body.contains("not_found");
        if is_unknown {
            missing.push(format!("{} {}: {status}", operation.method, operation.template));
        } else if let Err(breach) = contract::check(&operation.method, &path, status, &headers, &body) {
            missing.push(format!("{breach:#}"));
        }
    }

    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_request_with_a_json_body_has_an_example_that_its_schema_permits() {
    let examples = contract::examples();
    let mut faults = Vec::new();
    for operation in contract::operations() {
        let has_json = !operation.definition()["requestBody"]["content"]["application/json"].is_null();
        let place = format!("{}/{}/", operation.template.replace('/', "~1"), operation.method.to_lowercase());
        if has_json && !examples.iter().any(|(schema, _)| schema.contains(&place)) {
            faults.push(format!("{} {} has none", operation.method, operation.template));
        }
    }
    for (schema, example) in &examples {
        faults.extend(contract::check_example(schema, example).err().map(|error| format!("{error:#}")));
    }

    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn every_answer_with_a_json_body_has_an_example_that_its_schema_permits() {
    let (mut held, mut faults) = (0, Vec::new());
    for operation in contract::operations() {
        for (status, answer) in operation.definition()["responses"].as_object().unwrap() {
            let place = answer["$ref"].as_str().map_or_else(
                || format!("#/paths/{}/{}/responses/{status}", operation.template.replace('/', "~1"), operation.method.to_lowercase()),
                ToOwned::to_owned,
            );
            let contents = contract::resolved(answer).unwrap()["content"].as_object().into_iter().flatten();
            for (media_type, content) in contents.filter(|(media_type, _)| media_type.ends_with("json")) {
                let at = format!("{} {} {status} {media_type}", operation.method, operation.template);
                let examples: Vec<_> = content["examples"].as_object().into_iter().flatten().collect();
                if examples.is_empty() {
                    faults.push(format!("{at} has none"));
                }
                for (_, example) in examples {
                    let schema = format!("{place}/content/{}/schema", media_type.replace('/', "~1"));
                    let value = &contract::resolved(example).unwrap()["value"];
                    faults.extend(contract::check_example(&schema, value).err().map(|error| format!("{at}: {error:#}")));
                    held += 1;
                }
            }
        }
    }

    assert!(faults.is_empty(), "{faults:#?}");
    assert!(held > 500, "only {held} examples");
}

#[test]
fn every_code_of_a_problem_is_one_that_some_operation_tells_or_that_all_may_have() {
    let document = contract::document();
    let answers =
        contract::operations().into_iter().flat_map(|operation| operation.definition()["responses"].as_object().unwrap().values());
    let told: BTreeSet<_> = answers.flat_map(|answer| contract::codes(contract::resolved(answer).unwrap()).unwrap()).collect();
    let of_all = document["info"]["description"].as_str().unwrap();

    let codes = document["components"]["schemas"]["ProblemCode"]["enum"].as_array().unwrap();
    let untold: Vec<_> = codes
        .iter()
        .map(|code| code.as_str().unwrap())
        .filter(|code| !told.contains(code) && !of_all.contains(&format!("`{code}`")))
        .collect();

    assert_eq!(untold, Vec::<&str>::new());
    assert!(told.len() > 25, "{told:?}");
}

#[test]
fn an_answer_is_refused_for_a_header_or_a_code_that_the_contract_does_not_tell_and_for_one_that_is_missing() {
    let problem = |code: &str| {
        json!({ "type": "about:blank", "title": "No", "status": 401, "code": code, "detail": "no", "request_id": "a", "retryable": false })
            .to_string()
    };
    let headers = |others: &[(&'static str, &'static str)], without: &str| {
        let usual = [
            ("content-type", "application/problem+json"),
            ("content-length", "1"),
            ("x-request-id", "a"),
            ("cache-control", "no-store"),
            ("content-security-policy", "default-src 'none'"),
            ("referrer-policy", "no-referrer"),
            ("x-content-type-options", "nosniff"),
            ("www-authenticate", "Bearer realm=\"mayfly\""),
        ];
        let kept = usual.iter().chain(others).filter(|(name, _)| *name != without);
        kept.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect::<HeaderMap>()
    };
    let fault = |headers: &HeaderMap, code: &str| {
        contract::check("GET", "/v1/limits", 401, headers, &problem(code)).err().map(|error| format!("{error:#}")).unwrap_or_default()
    };

    assert_eq!(fault(&headers(&[], ""), "unauthenticated"), "");
    assert!(fault(&headers(&[], ""), "suspended").contains("the code \"suspended\" is none of"));
    assert!(fault(&headers(&[("x-colour", "red")], ""), "unauthenticated").contains("the header x-colour is not promised"));
    assert!(fault(&headers(&[], "www-authenticate"), "unauthenticated").contains("the header WWW-Authenticate is missing"));
    assert!(fault(&headers(&[], "x-request-id"), "unauthenticated").contains("the header X-Request-Id is missing"));
    assert!(fault(&headers(&[("retry-after", "1")], ""), "unauthenticated").contains("the header retry-after is not promised"));
}

#[tokio::test]
async fn the_page_of_the_contract_is_shown_without_loading_anything() {
    let service = shared();

    let answer = reqwest::get(format!("{}/docs", service.place.url)).await.unwrap();

    let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
    let page = answer.text().await.unwrap();
    for operation in contract::operations() {
        let id = operation.definition()["operationId"].as_str().unwrap();
        assert!(page.contains(&format!("<article id=\"{id}\">")), "{id}");
    }
    assert!(!page.contains("<script") && !page.contains(" src=") && !page.contains("url("));
}

#[tokio::test]
async fn a_zero_byte_is_nothing_that_can_be_asked_for() {
    let service = shared();
    let client = mayfly_tests::Client::of(&service.place, "zero-byte");
    let admin = mayfly_tests::Client::admin(&service.place);

    client.get("/v1/events?kind=%00").await.problem(422, "invalid_request");
    client.get("/v1/events?principal=a%00b").await.problem(422, "invalid_request");
    admin.get("/v1/admin/events?tenant=%00").await.problem(422, "invalid_request");
    admin.get("/v1/admin/tenants/%00").await.problem(422, "invalid_request");
    let quotas = json!({ "quotas": { "networks": ["\0"] } });
    client.get("/v1/quota").await.expect(200);
    admin.patch("/v1/admin/tenants/zero-byte", &quotas).await.problem(422, "invalid_request");
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
