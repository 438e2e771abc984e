//! What is told to Prometheus: to the operator of every node what it does, to a tenant what is its own.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use mayfly_tests::{
    Client, Service,
    prometheus::Prometheus,
    service::{self, Place, shared},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

/// How long Prometheus may take to know enough for every panel: rates need two values, and a loaded machine is slow.
const PATIENCE: Duration = Duration::from_secs(180);
/// What `rate` looks back, in place of what Grafana fills in.
const RATE_INTERVAL: &str = "30s";
/// How long one call of `promtool` may take.
const TOOL_DEADLINE: Duration = Duration::from_secs(120);

fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/dashboards").canonicalize().unwrap()
}

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&fs::read_to_string(dashboards().join(name)).unwrap()).unwrap()
}

/// The rules of `alerts.yaml`.
fn alerts() -> Vec<Value> {
    yaml("alerts.yaml")["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

/// Every expression of every panel, with the names of its board and of itself.
fn panels() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut boards: Vec<_> = fs::read_dir(dashboards()).unwrap().map(|entry| entry.unwrap().path()).collect();
    boards.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    assert_eq!(boards.len(), 4, "{boards:?}");
    for path in boards {
        let board: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for panel in board["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row") {
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{panel:#}");
            let name = format!("{}: {}", board["title"].as_str().unwrap(), panel["title"].as_str().unwrap());
            found.extend(targets.iter().map(|target| (name.clone(), target["expr"].as_str().unwrap().to_owned())));
        }
    }
    found
}

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
    let cases = json!([{ "stdin": "one" }, { "stdin": "two" }]);
    client.run(&json!({ "image": "busybox", "command": ["cat"], "cases": cases, "limits": { "memory_bytes": 16 << 20 } })).await;
    let refused = limited("true", json!({ "memory_bytes": 128 << 20 }));
    client.post("/v1/runs", &refused).await.problem(429, "quota_exceeded");
    let keyed = client.request(Method::POST, "/v1/runs").header("idempotency-key", "a-refused-run").json(&refused);
    client.send(keyed, "POST", "/v1/runs").await.problem(429, "quota_exceeded");
    client.post("/v1/runs", &json!({})).await.problem(422, "invalid_request");

    let told = of_node(place).await;
    let is = |series: &str| value(&told, series).unwrap_or_else(|| panic!("{series} is not in {told}"));
    assert!(is("sandbox_oom_kills_total") >= 1.0, "{told}");
    assert!(is("sandbox_cpu_throttled_seconds_total") > 0.1, "{told}");
    assert!(is("sandbox_cpu_seconds_total") > 0.03, "{told}");
    assert_eq!(is(r#"sandbox_output_truncated_total{stream="stdout"}"#), 1.0);
    assert_eq!(is(r#"mayfly_quota_refusals_total{quota="largest_memory_bytes",scope="tenant"}"#), 2.0);
    assert_eq!(is(r#"mayfly_problems_total{code="quota_exceeded"}"#), 2.0);
    assert_eq!(is(r#"mayfly_problems_total{code="invalid_request"}"#), 1.0);
    assert_eq!(is(r#"sandbox_image_lookups_total{result="miss"}"#), 1.0);
    assert!(is(r#"sandbox_image_lookups_total{result="hit"}"#) >= 2.0, "{told}");
    let of_both = |warm: &str, cold: &str| is(warm) + is(cold);
    let started = |launch: &str| format!(r#"sandbox_start_seconds_count{{launch="{launch}",phase="total"}}"#);
    assert_eq!(of_both(&started("warm"), &started("cold")), 4.0, "cases are no starts of their own: {told}");
    let launched = |launch: &str| format!(r#"sandbox_launch_seconds_count{{launch="{launch}"}}"#);
    assert_eq!(of_both(&launched("warm"), &launched("cold")), 5.0, "{told}");
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

#[tokio::test]
async fn what_a_program_answers_is_no_failure_of_the_service() {
    const FAILING: &str = "
import http.server
class Failing(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_error(500)
server = http.server.HTTPServer(('127.0.0.1', 8080), Failing)
print('ready', flush=True)
server.serve_forever()
";
    let service = shared();
    let client = service.client();
    let made = client.post("/v1/sandboxes", &json!({ "image": "python", "command": ["python3", "-c", FAILING] })).await.expect(201);
    let id = made["id"].as_str().unwrap();
    client.follow(id, "from=0").await.next().await.unwrap();

    let answer = client.request(Method::GET, &format!("/v1/sandboxes/{id}/ports/8080/")).send().await.unwrap();

    assert_eq!(answer.status(), 500);
    let told = of_node(&service.place).await;
    let of_ports: Vec<_> =
        told.lines().filter(|line| line.starts_with("mayfly_http_requests_total{") && line.contains("/ports/")).collect();
    assert!(of_ports.iter().any(|line| line.contains(r#"status="proxied""#)), "{of_ports:#?}");
    assert!(!of_ports.iter().any(|line| line.contains(r#"status="500""#)), "{of_ports:#?}");
}

/// Does what makes every figure move, until it is dropped.
async fn load(client: Client) {
    let limited = |script: &str, limits: Value| json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": limits });
    let small = 16 << 20;
    loop {
        client.shell("echo hello").await;
        client.run(&limited("hog 64", json!({ "memory_bytes": small }))).await;
        client.run(&limited("while :; do :; done", json!({ "memory_bytes": small, "cpu_millis": 100, "wall_ms": 300 }))).await;
        client.run(&limited("yes", json!({ "memory_bytes": small, "output_bytes": 1024, "wall_ms": 100 }))).await;
        client.post("/v1/runs", &limited("true", json!({ "memory_bytes": 1u64 << 30 }))).await.problem(429, "quota_exceeded");
        let made = client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", "60"] })).await.expect(201);
        client.delete(&format!("/v1/sandboxes/{}", made["id"].as_str().unwrap())).await;
    }
}

#[tokio::test]
async fn every_panel_shows_what_a_loaded_service_does_and_no_alert_fires() {
    let service = Service::start_with(&["--metrics-tenants", "3"]).unwrap();
    service.import("busybox").unwrap();
    let (mine, place) = (name(), service.place());
    let quotas = json!({ "sandboxes": 10, "queued": 10, "largest_memory_bytes": 512 << 20 });
    Client::admin(place).post("/v1/admin/tenants", &json!({ "id": mine, "quotas": quotas })).await.expect(201);
    let client = Client::of(place, &mine);
    let host = |url: &str| url.trim_start_matches("http://").to_owned();
    let scraped = json!([
        { "job_name": "mayfly", "static_configs": [{ "targets": [host(&place.metrics_url)] }] },
        {
            "job_name": "mayfly-tenant", "metrics_path": "/v1/metrics", "authorization": { "credentials": client.token() },
            "static_configs": [{ "targets": [host(&place.url)] }],
        },
    ]);
    let prometheus = Prometheus::start(&scraped, &dashboards().join("alerts.yaml")).unwrap();

    let showing = async {
        let deadline = Instant::now() + PATIENCE;
        for (panel, expression) in panels() {
            let asked = expression.replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*");
            assert!(!asked.contains('$'), "{panel}: {asked}");
            while !prometheus.query(&asked).await.unwrap().iter().any(|value| value.is_finite()) {
                assert!(Instant::now() < deadline, "{panel} shows nothing: {asked}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        let rules = prometheus.rules().await.unwrap();
        assert_eq!(rules.len(), alerts().len());
        for rule in rules {
            assert_eq!((&rule["health"], rule["state"] == "firing"), (&json!("ok"), false), "{rule:#}");
        }
    };
    tokio::select! {
        () = showing => {}
        () = load(client) => unreachable!("it goes on until it is dropped"),
    }
}

#[tokio::test]
async fn every_series_is_shown_by_a_panel_or_wakes_somebody() {
    let service = shared();
    let client = service.client();
    client.shell("true").await;
    let told = of_node(&service.place).await + &of_tenant(&client).await;
    let mut looked_at: String = panels().into_iter().map(|(_, expression)| expression + "\n").collect();
    looked_at.extend(alerts().iter().map(|alert| alert["expr"].as_str().unwrap().to_owned() + "\n"));

    let types = told.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let ours: BTreeSet<_> = types.filter(|name| name.starts_with("mayfly_") || name.starts_with("sandbox_")).collect();

    assert!(ours.len() > 40, "{ours:?}");
    // `mayfly_build_info` is what boards and alerts know nodes by.
    let unseen: Vec<_> = ours.into_iter().filter(|name| !looked_at.contains(name)).collect();
    assert!(unseen.is_empty(), "nobody looks at {unseen:?}");
}

#[test]
fn every_alert_fires_for_its_cause_and_not_without_it() {
    for tool in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]] {
        let mut promtool = Command::new("promtool");
        let (status, said) = service::finish(promtool.args(tool).current_dir(dashboards()), TOOL_DEADLINE).unwrap();
        assert!(status.success(), "{said}");
    }

    let tests = yaml("alerts.test.yaml");
    let tested: Vec<&Value> =
        tests["tests"].as_array().unwrap().iter().flat_map(|test| test["alert_rule_test"].as_array().unwrap()).collect();
    for alert in alerts() {
        let of_it: Vec<_> = tested.iter().filter(|test| test["alertname"] == alert["alert"]).collect();
        let fires = |test: &&&Value| !test["exp_alerts"].as_array().unwrap().is_empty();
        assert!(of_it.iter().any(&fires) && !of_it.iter().all(fires), "{}", alert["alert"]);
    }
}

#[test]
fn every_alert_leads_to_its_runbook_and_every_runbook_has_its_alert() {
    let page = include_str!("../docs/operations.md");
    let runbooks: BTreeSet<_> =
        page.lines().filter_map(|line| line.strip_prefix("### ")).filter(|title| title.starts_with("Mayfly")).collect();
    let alerts = alerts();

    let names: BTreeSet<_> = alerts.iter().map(|alert| alert["alert"].as_str().unwrap()).collect();

    assert_eq!(names, runbooks);
    for alert in &alerts {
        let anchor = format!("docs/operations.md#{}", alert["alert"].as_str().unwrap().to_lowercase());
        assert_eq!(alert["annotations"]["runbook_url"], json!(anchor));
        assert!(["critical", "warning"].map(Value::from).contains(&alert["labels"]["severity"]), "{alert:#}");
    }
}
