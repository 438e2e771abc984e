//! Events as they come, in every form: in order, each once, whoever wrote them where, and however often the reader comes again.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _};
use mayfly_tests::{Client, Service, client::Answer, postgres::Database, service::shared, stream};
use reqwest::{Method, Response};
use serde_json::{Value, json};

/// Long enough to notice by, and for a loaded machine.
const SOON: Duration = Duration::from_secs(30);

/// Lines of a body as they come.
struct Lines {
    body: std::pin::Pin<Box<dyn Stream<Item = reqwest::Result<Vec<u8>>> + Send>>,
    rest: Vec<u8>,
}

impl Lines {
    fn of(response: Response) -> Self {
        Self { body: Box::pin(response.bytes_stream().map(|chunk| chunk.map(|bytes| bytes.to_vec()))), rest: Vec::new() }
    }

    /// The next line without its end; `None` after the last.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line = self.rest.drain(..=at).collect::<Vec<_>>();
                return Some(String::from_utf8(line).unwrap().trim_end().to_owned());
            }
            let chunk = tokio::time::timeout(SOON, self.body.next()).await.expect("a line in time")?;
            self.rest.extend(chunk.unwrap());
        }
    }

    async fn frame(&mut self) -> Option<Value> {
        Some(serde_json::from_str(&self.next().await?).unwrap())
    }

    /// The next event that tells of this: what came a moment before the beginning may be in front of it.
    async fn event_of(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        loop {
            let frame = self.frame().await.expect("the stream goes on");
            if is_it(&frame) {
                return frame;
            }
        }
    }
}

async fn open(client: &Client, form: &str, query: &str) -> Lines {
    let request = client.request(Method::GET, &format!("/v1/events?{query}")).header("accept", form);
    let response = request.send().await.unwrap();
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(response.headers()["content-type"], form);
    Lines::of(response)
}

/// Makes an event of the tenant, the cheapest that there is.
async fn make(admin: &Client, tenant: &str, weight: u32) {
    admin.patch(&format!("/v1/admin/tenants/{tenant}"), &json!({ "weight": weight })).await.expect(200);
}

async fn tenant(service: &mayfly_tests::service::Place) -> (Client, Client, String) {
    let name = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let admin = Client::admin(service);
    admin.post("/v1/admin/tenants", &json!({ "id": name })).await.expect(201);
    (Client::of(service, &name), admin, name)
}

/// The weights that the events of a stream tell of, until so many came.
async fn weights(lines: &mut Lines, count: usize) -> (Vec<u64>, String) {
    let (mut weights, mut cursor) = (Vec::new(), String::new());
    while weights.len() < count {
        let frame = lines.frame().await.expect("the stream goes on");
        if frame["kind"] == "tenant.changed" {
            weights.push(frame["data"]["weight"].as_u64().unwrap());
            frame["cursor"].as_str().unwrap().clone_into(&mut cursor);
        }
    }
    (weights, cursor)
}

#[tokio::test]
async fn a_run_is_told_of_while_it_happens_in_every_form() {
    let service = shared();
    let client = service.client();
    client.shell("true").await;
    let mut lines = open(&client, "application/x-ndjson", "kind=sandbox.*").await;
    let mut sent = open(&client, "text/event-stream", "kind=sandbox.ended").await;
    let url = format!("{}/v1/events?kind=sandbox.created", service.place.url);
    let mut socket = stream::open(&url, client.token()).await.unwrap();
    // The first frame says where the stream begins: what comes now is in it.
    assert!(lines.frame().await.unwrap()["heartbeat"]["cursor"].is_string());
    assert_eq!(sent.next().await.unwrap(), ": nothing came");
    assert!(socket.next().await.unwrap()["heartbeat"]["cursor"].is_string());

    let run = client.shell("exit 3").await;

    let object = format!("sandbox/{}", run["id"].as_str().unwrap());
    let (created, ended) = (lines.event_of(|event| event["object"] == object).await, lines.frame().await.unwrap());
    assert_eq!((&created["kind"], &created["object"]), (&json!("sandbox.created"), &json!(object)));
    assert_eq!((&ended["kind"], &ended["object"]), (&json!("sandbox.ended"), &json!(object)));
    assert_eq!(ended["data"]["outcome"]["exit_code"], 3);
    let mut message = socket.next().await.unwrap();
    while message["object"] != object {
        message = socket.next().await.unwrap();
    }
    assert_eq!(message, created);
    let (mut id, mut data) = (String::new(), None);
    while data.as_ref().is_none_or(|event: &Value| event["object"] != object) {
        let line = sent.next().await.unwrap();
        if let Some(text) = line.strip_prefix("id: ") {
            text.clone_into(&mut id);
        }
        if let Some(text) = line.strip_prefix("data: ") {
            data = Some(serde_json::from_str(text).unwrap());
        }
    }
    assert_eq!((data.unwrap(), json!(id)), (ended.clone(), ended["cursor"].clone()));
}

/// As a browser does it, and as any client can.
#[tokio::test]
async fn a_reader_that_comes_again_misses_nothing_and_hears_nothing_twice() {
    let service = shared();
    let (client, admin, name) = tenant(&service.place).await;
    let mut first = open(&client, "application/x-ndjson", "cursor=oldest").await;
    let writer = async {
        for weight in 1..=60 {
            make(&admin, &name, weight).await;
        }
    };
    let reader = async {
        let (mut heard, mut cursor) = weights(&mut first, 7).await;
        drop(first);
        for (count, is_header) in [(1, true), (13, false), (20, true), (19, false)] {
            let path = if is_header { "/v1/events".to_owned() } else { format!("/v1/events?cursor={cursor}") };
            let mut request = client.request(Method::GET, &path).header("accept", "application/x-ndjson");
            if is_header {
                request = request.header("last-event-id", &cursor);
            }
            let (more, last) = weights(&mut Lines::of(request.send().await.unwrap()), count).await;
            heard.extend(more);
            cursor = last;
        }
        heard
    };
    let (heard, ()) = tokio::join!(reader, writer);

    assert_eq!(heard, (1..=60).collect::<Vec<u64>>());
    // What is there now, without waiting for more: all of it, and the end.
    let mut all = open(&client, "application/x-ndjson", "follow=false&kind=tenant.changed").await;
    let mut frames = Vec::new();
    while let Some(frame) = all.frame().await {
        frames.push(frame);
    }
    assert!(frames.first().unwrap()["heartbeat"].is_object() && frames.last().unwrap()["heartbeat"].is_object());
    assert_eq!(frames.len(), 62);
}

#[tokio::test]
async fn an_event_that_is_committed_late_holds_up_those_behind_it_and_is_not_skipped() {
    let database = Database::start();
    let service = Service::start_with(&["--database-url", &database.url]).unwrap();
    let (client, admin, name) = tenant(service.place()).await;
    let mut lines = open(&client, "application/x-ndjson", "kind=test.made&kind=tenant.changed").await;
    lines.next().await.unwrap();
    let insert = format!("insert into events (tenant, kind, object, at, data) values ('{name}', 'test.made', 'test', now(), '{{}}')");
    let mut slow = Command::new("psql")
        .args(["-Xq", &database.url, "-c", &format!("begin; {insert}; notify begun; select pg_sleep(3); commit")])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begun =
        "select count(*) from pg_stat_activity where query like '%pg_sleep(3)%' and pid <> pg_backend_pid() and backend_xid is not null";
    while database.ask(begun) != "1" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    make(&admin, &name, 9).await;
    let listed = client.get("/v1/events?limit=1").await.expect(200);
    let (first, second) = (lines.frame().await.unwrap(), lines.frame().await.unwrap());
    let is_slow_done = slow.wait().unwrap().success();

    assert!(is_slow_done);
    // The page shows what there is, the stream what nothing can come before any more.
    assert_eq!(listed["items"][0]["kind"], "tenant.changed");
    assert_eq!((&first["kind"], &second["kind"]), (&json!("test.made"), &json!("tenant.changed")));
    assert!(first["id"].as_str().unwrap().parse::<u64>().unwrap() < second["id"].as_str().unwrap().parse::<u64>().unwrap());
}

#[tokio::test]
async fn every_node_tells_of_what_happens_on_any() {
    let database = Database::start();
    let node = || Service::start_with(&["--database-url", &database.url]).unwrap();
    let (here, there) = (node(), node());
    let (_, admin, name) = tenant(there.place()).await;
    let client = Client::of(here.place(), &name);
    let mut lines = open(&client, "application/x-ndjson", "kind=tenant.changed").await;
    lines.next().await.unwrap();

    for weight in 1..=20 {
        make(&admin, &name, weight).await;
    }

    assert_eq!(weights(&mut lines, 20).await.0, (1..=20).collect::<Vec<u64>>());
}

#[tokio::test]
async fn a_reader_that_comes_too_late_hears_that_it_missed_something() {
    let database = Database::start();
    let service = Service::start_with(&["--database-url", &database.url]).unwrap();
    let (client, admin, name) = tenant(service.place()).await;
    make(&admin, &name, 1).await;
    let first = client.get("/v1/events").await.expect(200)["items"][1]["cursor"].as_str().unwrap().to_owned();
    make(&admin, &name, 2).await;
    let here = async |cursor: &str| {
        let mut lines = open(&client, "application/x-ndjson", &format!("follow=false&cursor={cursor}")).await;
        lines.frame().await.unwrap()
    };
    let before = here(&first).await;

    // As pruning does it.
    database.ask("with gone as (delete from events where data @> '{\"weight\": 1}' returning xact, id) update events_pruned set xact = gone.xact, id = gone.id from gone");

    assert!(before["heartbeat"].is_object(), "{before}");
    assert!(here(&first).await["gap"]["cursor"].is_string());
    assert!(here("oldest").await["heartbeat"].is_object());
}

#[tokio::test]
async fn a_tenant_hears_of_itself_alone() {
    let service = shared();
    let ((client, admin, name), (_, _, other)) = (tenant(&service.place).await, tenant(&service.place).await);
    let mut lines = open(&client, "application/x-ndjson", "").await;
    lines.next().await.unwrap();

    make(&admin, &other, 5).await;
    make(&admin, &name, 6).await;

    let first = lines.event_of(|event| event["kind"] != "tenant.created").await;
    assert_eq!((&first["tenant"], &first["data"]["weight"]), (&json!(name), &json!(6)));
    // Who the operator is does not concern the tenant.
    assert_eq!(first["actor"], Value::Null);
}

#[tokio::test]
async fn streams_end_when_the_service_stops() {
    let mut service = Service::start_with(&[]).unwrap();
    let mut lines = open(&service.client(), "application/x-ndjson", "").await;
    lines.next().await.unwrap();

    let stopped = tokio::task::spawn_blocking(move || service.stop().map(|status| status.success()));

    lines.event_of(|frame| frame["heartbeat"].is_object()).await;
    assert_eq!(lines.next().await, None);
    assert!(stopped.await.unwrap().unwrap());
}

#[tokio::test]
async fn what_cannot_be_asked_is_refused() {
    let service = shared();
    let client = service.client();
    let ask = async |query: &str| {
        let path = format!("/v1/events?{query}");
        let answer: Answer = client.send(client.request(Method::GET, &path).header("accept", "application/x-ndjson"), "GET", &path).await;
        answer.problem(422, "invalid_request")["field"].clone()
    };
    assert_eq!(ask("cursor=AAAAAAAAAAA").await, "cursor");
    assert_eq!(ask("cursor=oldest&tenant=other").await, "tenant");
    assert_eq!(ask("limit=0").await, "limit");
    assert_eq!(ask("follow=perhaps").await, "follow");
    assert_eq!(ask("sandbox=none").await, "sandbox");
    let reader = Client::with_scope(&service.place, "somebody", "runs");
    reader.get("/v1/events").await.problem(403, "forbidden");
}
