//! What a collector of traces is sent, and what lines of the log say to a program.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use mayfly_tests::{Client, Service};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value as AnyValue},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::Instant,
};

const SOON: Duration = Duration::from_secs(30);
/// How long requests may take together of which none waits for anything: were they to wait for a collector, each would for seconds.
const ALL_SOON: Duration = Duration::from_secs(120);
/// So many requests have more spans than a service has time to wait for when it ends, batch after batch.
const MANY: usize = 1000;
/// A trace of the caller's, and its span in it.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A collector of our own on 127.0.0.1, which keeps what it is sent.
struct Collector {
    url: String,
    received: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    served: JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.served.abort();
    }
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let received = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&received);
        let served = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&kept)));
            }
        });
        Self { url, received, served }
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.received.lock().unwrap();
        let resources = received.iter().flat_map(|request| &request.resource_spans);
        resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| scope.spans.clone()).collect()
    }

    /// Waits until it has a span of each of these names.
    async fn until(&self, names: &[&str]) -> Vec<Span> {
        let deadline = Instant::now() + SOON;
        loop {
            let spans = self.spans();
            let missing: Vec<_> = names.iter().filter(|name| !spans.iter().any(|span| span.name == **name)).collect();
            if missing.is_empty() {
                return spans;
            }
            let there: Vec<_> = spans.iter().map(|span| &span.name).collect();
            assert!(Instant::now() < deadline, "{missing:?} did not come, but {there:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Takes what is posted over one connection, one request after the other.
async fn serve(stream: TcpStream, kept: Arc<Mutex<Vec<ExportTraceServiceRequest>>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut length, mut line) = (0, String::new());
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
            assert!(!line.starts_with("POST ") || line.starts_with("POST /v1/traces "), "{line}");
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        kept.lock().unwrap().push(ExportTraceServiceRequest::decode(&body[..]).unwrap());
        let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value?;
    if let AnyValue::StringValue(text) = value {
        return Some(text);
    }
    if let AnyValue::IntValue(number) = value { Some(number.to_string()) } else { Some(format!("{value:?}")) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_run_is_one_trace_from_its_request_to_the_store_of_its_end() {
    let collector = Collector::start().await;
    let service = traced_by(&collector);
    let client = service.client();
    client.shell("echo not traced").await;
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", "cat; echo secret-output"], "stdin": "secret-input", "env": { "KEY": "secret-value" },
    });
    let run = post_traced(&client, "/v1/runs", &request).await;

    let names = ["POST /v1/runs", "sandbox", "queue", "image", "launch", "keeper launch", "run", "store", "postgres statement", "keeper"];
    let spans = collector.until(&names).await;

    let of = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let (request, sandbox) = (of("POST /v1/runs"), of("sandbox"));
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE), "{spans:#?}");
    assert_eq!((hex(&request.parent_span_id), request.kind), (PARENT.to_owned(), SpanKind::Server as i32));
    assert_eq!(text(&request.attributes, "http.response.status_code").as_deref(), Some("200"));
    assert_eq!(sandbox.parent_span_id, request.span_id);
    for phase in ["queue", "image", "launch", "keeper launch", "run", "store"] {
        assert_eq!(of(phase).parent_span_id, sandbox.span_id, "{phase}");
    }
    assert!(spans.iter().any(|span| span.name.starts_with("postgres") && span.parent_span_id == request.span_id), "{spans:#?}");
    for span in [request, sandbox] {
        assert_eq!(text(&span.attributes, "sandbox.id").as_deref(), run["id"].as_str());
        assert!(text(&span.attributes, "tenant").is_some_and(|tenant| tenant.starts_with("tenant-")), "{span:#?}");
    }
    let (launched, ran) = (of("keeper launch"), of("run"));
    assert_eq!(launched.end_time_unix_nano, ran.start_time_unix_nano);
    assert!(launched.start_time_unix_nano < ran.start_time_unix_nano && ran.start_time_unix_nano < ran.end_time_unix_nano);
    let resource = collector.received.lock().unwrap()[0].resource_spans[0].resource.clone().unwrap();
    assert_eq!(text(&resource.attributes, "service.name").as_deref(), Some("mayfly"));
    let all = format!("{:?}", collector.received.lock().unwrap());
    for secret in ["secret-", client.token().unwrap(), "eyJ"] {
        assert!(!all.contains(secret), "{secret}: {all}");
    }
}

/// A service that traces what comes with a trace, and nothing else.
fn traced_by(collector: &Collector) -> Service {
    let service = Service::start_with(&["--otlp-endpoint", &collector.url, "--trace-percent", "0"]).unwrap();
    service.import("busybox").unwrap();
    service
}

/// Sends this as a part of the caller's trace.
async fn post_traced(client: &Client, path: &str, body: &Value) -> Value {
    let traced = client.request(Method::POST, path).header("traceparent", format!("00-{TRACE}-{PARENT}-01")).json(body);
    client.send(traced, "POST", path).await.expect(200)
}

#[tokio::test]
async fn an_exec_is_traced_from_its_request_to_the_store_of_its_end() {
    let collector = Collector::start().await;
    let service = traced_by(&collector);
    let client = service.client();
    let id = client.sandbox("exec sleep 60").await;

    let exec = post_traced(&client, &format!("/v1/sandboxes/{id}/execs"), &json!({ "command": ["true"] })).await;

    let request = "POST /v1/sandboxes/{id}/execs";
    let spans = collector.until(&[request, "keeper", "run", "store", "exec"]).await;
    let of = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE), "{spans:#?}");
    assert_eq!(of("exec").parent_span_id, of(request).span_id);
    assert_eq!((&of("run").parent_span_id, &of("store").parent_span_id), (&of("exec").span_id, &of("exec").span_id));
    assert_eq!(text(&of("exec").attributes, "exec.id").as_deref(), exec["id"].as_str());
    for span in [of("exec"), of(request)] {
        assert_eq!(text(&span.attributes, "sandbox.id").as_deref(), Some(id.as_str()));
    }
}

#[tokio::test]
async fn every_case_of_a_run_and_its_compile_step_have_spans_of_their_own() {
    let collector = Collector::start().await;
    let service = traced_by(&collector);
    let run = json!({
        "image": "busybox", "command": ["cat"], "compile": { "command": ["true"] },
        "cases": [{ "stdin": "one" }, { "stdin": "two" }], "wait_ms": 60_000,
    });

    post_traced(&service.client(), "/v1/runs", &run).await;

    // What ends last.
    let spans = collector.until(&["sandbox"]).await;
    let sandbox = spans.iter().find(|span| span.name == "sandbox").unwrap();
    for (name, count) in [("compile", 1), ("case", 2), ("queue", 1)] {
        let of_name: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
        assert_eq!(of_name.len(), count, "{name}: {spans:#?}");
        assert!(of_name.iter().all(|span| span.parent_span_id == sandbox.span_id), "{name}: {spans:#?}");
    }
    for around in spans.iter().filter(|span| ["compile", "case"].contains(&span.name.as_str())) {
        let launches = spans.iter().filter(|span| span.name == "launch" && span.parent_span_id == around.span_id);
        assert_eq!(launches.count(), 1, "{around:#?}");
    }
}

#[tokio::test]
async fn a_collector_that_never_answers_holds_up_neither_requests_nor_the_end() {
    // Connections to it are made, and nobody takes them.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut service = Service::start_with(&["--otlp-endpoint", &format!("http://{}", silent.local_addr().unwrap())]).unwrap();
    let client = service.client();

    let asked = async {
        for _ in 0..MANY {
            client.get("/v1/quota").await.expect(200);
        }
    };
    tokio::time::timeout(ALL_SOON, asked).await.expect("no request waits for the collector");

    assert_eq!(spans_counted(&service, "sent").await, 0);
    // In time, or it fails.
    assert!(service.stop().unwrap().success());
}

/// So many spans came to this, as the service counts.
async fn spans_counted(service: &Service, result: &str) -> u64 {
    let told = reqwest::get(format!("{}/metrics", service.place().metrics_url)).await.unwrap().text().await.unwrap();
    let series = format!(r#"mayfly_spans_total{{result="{result}"}} "#);
    told.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or_else(|| panic!("no {series} in {told}"))
}

#[tokio::test]
async fn a_collector_that_is_away_holds_up_nobody() {
    let away = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let service = Service::start_with(&["--otlp-endpoint", &format!("http://{away}")]).unwrap();
    service.import("busybox").unwrap();

    let run = service.client().shell("echo hello").await;

    assert_eq!(run["stdout"], "hello\n");
    let deadline = Instant::now() + SOON;
    while spans_counted(&service, "failed").await == 0 {
        assert!(Instant::now() < deadline, "{}", service.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(service.log().matches("the collector takes no spans").count(), 1);
}

#[tokio::test]
async fn lines_of_json_name_the_request_its_tenant_and_its_sandbox() {
    let mut service = Service::start_logging("info,mayfly=debug");
    service.stop().unwrap();
    service.add_arguments(&["--log-format", "json"]);
    service.start_again().unwrap();
    let client = Client::of(service.place(), "a-tenant-of-logs");
    let request = json!({ "image": "busybox", "command": ["echo", "secret-output"], "env": { "KEY": "secret-value" } });
    let named = client.request(Method::POST, "/v1/runs").header("x-request-id", "request-of-logs").json(&request);

    let run = client.send(named, "POST", "/v1/runs").await.expect(200);

    let log = service.log();
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let answered = lines.iter().find(|line| line["message"] == "answered" && line["span"]["request.id"] == "request-of-logs");
    let span = &answered.unwrap_or_else(|| panic!("no line tells of the request: {log}"))["span"];
    assert_eq!((&span["tenant"], &span["sandbox.id"]), (&json!("a-tenant-of-logs"), &run["id"]), "{span:#}");
    assert_eq!((&span["http.route"], &span["http.status"]), (&json!("/v1/runs"), &json!(200)), "{span:#}");
    assert!(!log.contains("secret-") && !log.contains(client.token().unwrap()) && !log.contains("eyJ"), "{log}");
}
