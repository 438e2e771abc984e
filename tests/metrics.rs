//! What is told to Prometheus: to the operator of every node what it does, to a tenant what is its own.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use mayfly_tests::{
    Client, Service,
    service::{Place, shared},
};
use serde_json::{Value, json};

/// The operator's series, as text.
async fn of_node(place: &Place) -> String {
    reqwest::get(format!("{}/metrics", place.metrics_url)).await.unwrap().text().await.unwrap()
}

/// The series of this client's tenant, as text.
async fn of_tenant(client: &Client) -> String {
    let answer = client.get("/v1/metrics").await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.text
}

/// The value of the series that begins like this, with all its labels; `None` if there is none.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// A tenant's name that nobody else has.
fn name() -> String {
    format!("tenant-{}", uuid::Uuid::new_v4().simple())
}

#[tokio::test]
async fn a_tenant_reads_what_it_has_and_used_and_nothing_of_others() {
    let service = shared();
    let mine = name();
    Client::admin(&service.place).post("/v1/admin/tenants", &json!({ "id": mine, "quotas": { "sandboxes": 7 } })).await.expect(201);
    let (client, other) = (Client::of(&service.place, &mine), service.client());
    client.shell("echo hello").await;
    client.run(&json!({ "image": "busybox", "command": ["sleep", "9"], "limits": { "wall_ms": 100 } })).await;
    client.sandbox("exec sleep 100").await;

    let (told, told_other) = (of_tenant(&client).await, of_tenant(&other).await);

    let is = |series: &str| value(&told, series);
    assert_eq!(is(r#"mayfly_account_runs_total{kind="run"}"#), Some(2.0), "{told}");
    assert_eq!(is(r#"mayfly_account_recent_ends_count{kind="run",reason="exited"}"#), Some(1.0), "{told}");
    assert_eq!(is(r#"mayfly_account_recent_ends_count{kind="run",reason="wall_timeout"}"#), Some(1.0), "{told}");
    assert_eq!(is(r#"mayfly_account_output_bytes_total{kind="run"}"#), Some(6.0), "{told}");
    assert!(is(r#"mayfly_account_wall_seconds_total{kind="run"}"#).unwrap() >= 0.1, "{told}");
    assert_eq!(is(r#"mayfly_account_used{quota="sandboxes",scope="tenant"}"#), Some(1.0), "{told}");
    assert_eq!(is(r#"mayfly_account_limit{quota="sandboxes",scope="tenant"}"#), Some(7.0), "{told}");
    assert!(!told.contains(&mine) && !told.contains("principal="), "{told}");
    assert!(!told_other.contains("mayfly_account_runs_total{"), "{told_other}");
    assert_eq!(value(&told_other, r#"mayfly_account_used{quota="sandboxes",scope="tenant"}"#), Some(0.0), "{told_other}");
}

#[tokio::test]
async fn tenants_are_named_to_the_operator_where_wanted_and_no_more_than_wanted() {
    let service = Service::start_with(&["--metrics-tenants", "1"]).unwrap();
    service.import("busybox").unwrap();
    let names = [name(), name()];
    for name in &names {
        Client::of(service.place(), name).shell("true").await;
    }
    let unasked = shared();
    let unnamed = name();
    Client::of(&unasked.place, &unnamed).shell("true").await;

    let (told, told_unasked) = (of_node(service.place()).await, of_node(&unasked.place).await);

    let of = |name: &str| value(&told, &format!(r#"mayfly_tenant_runs_total{{reason="exited",tenant="{name}"}}"#));
    assert_eq!((of(&names[0]), of(""), of(&names[1])), (Some(1.0), Some(1.0), None), "{told}");
    assert!(!told_unasked.contains(&unnamed) && !told_unasked.contains("mayfly_tenant_"), "{told_unasked}");
}

#[tokio::test]
async fn what_runs_cost_and_why_they_are_refused_is_counted() {
    let service = Service::start_with(&[]).unwrap();
    service.import("busybox").unwrap();
    let (mine, place) = (name(), service.place());
    let quotas = json!({ "largest_memory_bytes": 64 << 20 });
    Client::admin(place).post("/v1/admin/tenants", &json!({ "id": mine, "quotas": quotas })).await.expect(201);
    let client = Client::of(place, &mine);
    let limited = |script: &str, limits: Value| json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": limits });

    client.run(&limited("hog 100", json!({ "memory_bytes": 16 << 20 }))).await;
    client.run(&limited("while :; do :; done", json!({ "memory_bytes": 16 << 20, "cpu_millis": 100, "wall_ms": 700 }))).await;
    client.run(&limited("yes", json!({ "memory_bytes": 16 << 20, "output_bytes": 1024, "wall_ms": 300 }))).await;
    client.post("/v1/runs", &limited("true", json!({ "memory_bytes": 128 << 20 }))).await.problem(429, "quota_exceeded");
    client.post("/v1/runs", &json!({})).await.problem(422, "invalid_request");

    let told = of_node(place).await;
    let is = |series: &str| value(&told, series).unwrap_or_else(|| panic!("{series} is not in {told}"));
    assert!(is("sandbox_oom_kills_total") >= 1.0, "{told}");
    assert!(is("sandbox_cpu_throttled_seconds_total") > 0.1, "{told}");
    assert!(is("sandbox_cpu_seconds_total") > 0.03, "{told}");
    assert_eq!(is(r#"sandbox_output_truncated_total{stream="stdout"}"#), 1.0);
    assert_eq!(is(r#"mayfly_quota_refusals_total{quota="largest_memory_bytes",scope="tenant"}"#), 1.0);
    assert_eq!(is(r#"mayfly_problems_total{code="quota_exceeded"}"#), 1.0);
    assert_eq!(is(r#"mayfly_problems_total{code="invalid_request"}"#), 1.0);
    assert_eq!(is(r#"sandbox_image_lookups_total{result="miss"}"#), 1.0);
    assert!(is(r#"sandbox_image_lookups_total{result="hit"}"#) >= 2.0, "{told}");
    let started = ["warm", "cold"].map(|launch| is(&format!(r#"sandbox_start_seconds_count{{launch="{launch}",phase="total"}}"#)));
    assert_eq!(started.iter().sum::<f64>(), 3.0);
    assert!(is("sandbox_image_blob_bytes") > 0.0 && is("process_resident_memory_bytes") > 0.0, "{told}");
    for up in ["sandbox_keeper_up", "mayfly_node_ready", "mayfly_postgres_up"] {
        assert_eq!(is(up), 1.0, "{up}");
    }
    for calm in
        ["mayfly_node_short", "sandbox_keeper_records_waiting_count", "sandbox_store_retries_total", r#"sandbox_leaks_total{what="row"}"#]
    {
        assert_eq!(is(calm), 0.0, "{calm}");
    }
    assert!(
        is(r#"mayfly_postgres_seconds_count{what="transaction"}"#) > 0.0 && is(r#"mayfly_postgres_connections_count{state="max"}"#) == 16.0,
        "{told}"
    );
}
