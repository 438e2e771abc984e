//! What changes in files of a sandbox, told over HTTP as it happens.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fmt::Debug,
    fs, io,
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _};
use mayfly_tests::{
    Client, Service, contract, host,
    service::shared,
    stream::{self, Socket},
};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
};

/// A running sandbox with a folder `/work`, once its script is through.
async fn sandbox(client: &Client, script: &str) -> String {
    let script = format!("mkdir -p /work/in; {script}\necho ready; exec sleep 1000");
    let asked = json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": { "inodes": 100_000, "cpu_millis": 500 } });
    let id = client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap().to_owned();
    let mut log = client.follow(&id, "from=0").await;
    while log.next().await.unwrap()["data"] != "ready\n" {}
    format!("/v1/sandboxes/{id}")
}

async fn put(client: &Client, path: &str) {
    client.send(client.request(Method::PUT, path).body("text"), "PUT", path).await.expect(200);
}

async fn gone(client: &Client, sandbox: &str) {
    assert_eq!(client.delete(sandbox).await.status, 204);
}

/// The kind and the path of a change.
fn change(frame: &Value) -> (&str, &str) {
    (frame["kind"].as_str().unwrap_or_else(|| panic!("no change: {frame}")), frame["path"].as_str().unwrap())
}

/// The first frame of a watch, and the rest.
async fn watching(client: &Client, path: &str) -> (Value, Socket) {
    let mut socket = client.attach(path).await;
    (socket.next().await.unwrap(), socket)
}

/// Watches as soon as one more may.
async fn get_where_there_is_room(client: &Client, path: &str) -> Response {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let again = get(client, path, "application/x-ndjson").await;
        if again.status() == 200 {
            return again;
        }
        assert!(tokio::time::Instant::now() < deadline, "no place was ever free: {}", again.status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A stream in one of the forms of HTTP.
async fn get(client: &Client, path: &str, form: &str) -> Response {
    client.request(Method::GET, path).header("accept", form).send().await.unwrap()
}

/// The same, with the head, for a client whose side of the connection holds little: the kernel's largest holds a whole burst.
async fn get_holding_little(client: &Client, path: &str) -> impl Stream<Item = io::Result<Vec<u8>>> + use<> {
    let host = client.place().url.trim_start_matches("http://");
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut stream = socket.connect(host.parse().unwrap()).await.unwrap();
    let token = client.token().unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\naccept: application/x-ndjson\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    futures_util::stream::unfold(stream, async |mut stream| {
        let mut piece = Vec::with_capacity(16 << 10);
        let read = stream.read_buf(&mut piece).await;
        (!matches!(read, Ok(0))).then(|| (read.map(|_| piece), stream))
    })
}

/// What came of a stream up to this text, with it. All of it has this long: signs of life come for ever.
async fn until(stream: &mut (impl Stream<Item = Result<impl AsRef<[u8]>, impl Debug>> + Unpin), text: &str) -> String {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let last = |seen: &str| seen.chars().rev().take(1000).collect::<Vec<_>>().into_iter().rev().collect::<String>();
    let mut seen = String::new();
    let mut looked_at = 0;
    while !seen[looked_at..].contains(text) {
        looked_at = seen.len().saturating_sub(text.len());
        let piece = tokio::time::timeout_at(deadline, stream.next()).await;
        let piece = piece
            .unwrap_or_else(|_| panic!("{text} never came, but {} bytes: …{}", seen.len(), last(&seen)))
            .unwrap_or_else(|| panic!("the end came after {} bytes: …{}", seen.len(), last(&seen)));
        seen.push_str(std::str::from_utf8(piece.unwrap().as_ref()).unwrap());
    }
    seen
}

#[tokio::test]
async fn a_watch_stands_tells_of_changes_and_ends_with_the_sandbox() {
    let client = shared().client();
    let sandbox = sandbox(&client, "").await;
    let (stands, mut changes) = watching(&client, &format!("{sandbox}/watch?path=/work&recursive=true")).await;
    assert_eq!(stands, json!({ "watching": { "path": "/work", "is_folder": true, "recursive": true, "folders": 2 } }));

    put(&client, &format!("{sandbox}/files/work/in/a")).await;
    let created = changes.next().await.unwrap();
    let rename = format!("{sandbox}/files/work/in/a?rename=/work/b");
    client.send(client.request(Method::POST, &rename), "POST", &rename).await.expect(200);
    let moved = changes.next().await.unwrap();
    let remove = format!("{sandbox}/files/work/b");
    assert_eq!(client.delete(&remove).await.status, 204);
    let removed = changes.next().await.unwrap();
    gone(&client, &sandbox).await;
    let end = changes.next().await.unwrap();

    assert_eq!((change(&created), created["is_folder"].as_bool()), (("created", "/work/in/a"), Some(false)));
    assert_eq!((change(&moved), moved["from"].as_str()), (("moved", "/work/b"), Some("/work/in/a")));
    assert_eq!(change(&removed), ("removed", "/work/b"));
    let numbers: Vec<_> = [&created, &moved, &removed].iter().map(|frame| frame["seq"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [0, 1, 2]);
    assert_eq!(end, json!({ "end": { "reason": "sandbox_ended" } }));
    assert_eq!(changes.closed().await, Some((1000, String::new())));
}

#[tokio::test]
async fn changes_come_as_lines_and_as_events() {
    let client = shared().client();
    let sandbox = sandbox(&client, "").await;
    let path = format!("{sandbox}/watch?path=/work");
    let (lines, events) = (get(&client, &path, "application/x-ndjson").await, get(&client, &path, "text/event-stream").await);
    assert_eq!(lines.headers()["content-type"], "application/x-ndjson");
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    let (mut lines, mut events) = (Box::pin(lines.bytes_stream()), Box::pin(events.bytes_stream()));
    until(&mut lines, "watching").await;
    until(&mut events, "watching").await;

    put(&client, &format!("{sandbox}/files/work/a")).await;
    let (line, event) = (until(&mut lines, "\n").await, until(&mut events, "\n\n").await);
    gone(&client, &sandbox).await;
    let (lines, events) = (until(&mut lines, "end").await, until(&mut events, "end").await);

    assert_eq!(change(&serde_json::from_str(&line).unwrap()), ("created", "/work/a"));
    assert_eq!(change(&serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()), ("created", "/work/a"));
    assert_eq!(lines, "{\"end\":{\"reason\":\"sandbox_ended\"}}\n");
    assert_eq!(events, "data: {\"end\":{\"reason\":\"sandbox_ended\"}}\n\n");
}

#[tokio::test]
async fn every_frame_is_one_that_the_contract_promises() {
    let client = shared().client();
    let sandbox = sandbox(&client, "(while ! [ -e /tmp/go ]; do sleep 0.1; done; cd /work; echo x > a; chmod 600 a; mv a b; : > \"$(printf 'x\\377')\"; rm b; cd /; rm -r /work) &").await;
    let path = format!("{sandbox}/watch?path=/work");

    // Its head comes when nothing can be missed any more.
    let answer = get(&client, &path, "application/x-ndjson").await;
    put(&client, &format!("{sandbox}/files/tmp/go")).await;
    let headers = answer.headers().clone();
    let text = answer.text().await.unwrap();

    contract::check("GET", &path, 200, &headers, &text).unwrap();
    let frames: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |kind: &str| frames.iter().any(|frame| frame["kind"] == kind);
    for kind in ["created", "modified", "attributes", "moved", "removed"] {
        assert!(has(kind), "{kind} is missing in {text}");
    }
    assert!(frames.iter().any(|frame| frame["path_base64"] == "L3dvcmsveP8="), "{text}");
    assert_eq!(frames.last().unwrap(), &json!({ "end": { "reason": "path_removed" } }));
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn what_cannot_be_watched_is_told_by_the_status() {
    let client = shared().client();
    let sandbox = sandbox(&client, "echo x > /work/file").await;
    let refused = async |query: &str| client.get(&format!("{sandbox}/watch?{query}")).await;

    for (query, field) in [
        ("path=/a/../b", "path"),
        ("path=%00", "path"),
        (&format!("path={}", "a/".repeat(2100)), "path"),
        (&format!("path={}", "a".repeat(256)), "path"),
        ("recursive=perhaps", "recursive"),
        ("follow=true", "follow"),
    ] {
        assert_eq!(refused(query).await.problem(422, "invalid_request")["field"], field, "{query}");
    }
    refused("path=/nowhere").await.problem(404, "file_not_found");
    refused("path=/work/file/below").await.problem(409, "file_unfit");
    refused("path=/proc").await.problem(409, "file_unfit");
    client.get("/v1/sandboxes/0190b5a4-0000-7000-8000-000000000000/watch").await.problem(404, "not_found");
    shared().client().get(&format!("{sandbox}/watch")).await.problem(404, "not_found");
    let place = &shared().place;
    Client::with_scope(place, "somebody", "runs").get(&format!("{sandbox}/watch")).await.problem(403, "forbidden");
    let url = format!("{}{sandbox}/watch", place.url);
    assert!(stream::open(&url, None).await.is_err_and(|error| format!("{error:#}").contains("401")));
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn only_what_runs_is_watched() {
    let client = shared().client();
    let asked = json!({ "image": "busybox", "command": ["true"], "keep_layer": true });
    let ended = format!("/v1/sandboxes/{}", client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap());
    client.until(&ended, |sandbox| sandbox["state"] == "exited").await;
    let paused = sandbox(&client, "").await;
    client.post(&format!("{paused}/pause"), &json!({})).await.expect(200);

    let refused = [&ended, &paused].map(|sandbox| format!("{sandbox}/watch"));

    assert_eq!(client.get(&refused[0]).await.problem(409, "wrong_state")["state"], "exited");
    assert_eq!(client.get(&refused[1]).await.problem(409, "wrong_state")["state"], "paused");
    // The control: its files are there.
    client.get(&format!("{ended}/files/?list")).await.expect(200);
    gone(&client, &ended).await;
    gone(&client, &paused).await;
}

#[tokio::test]
async fn a_watch_stays_while_its_sandbox_is_paused() {
    let client = shared().client();
    let sandbox = sandbox(&client, "").await;
    let (_, mut changes) = watching(&client, &format!("{sandbox}/watch?path=/work")).await;

    client.post(&format!("{sandbox}/pause"), &json!({})).await.expect(200);
    client.post(&format!("{sandbox}/resume"), &json!({})).await.expect(200);
    put(&client, &format!("{sandbox}/files/work/after")).await;

    assert_eq!(change(&changes.next().await.unwrap()), ("created", "/work/after"));
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_file_is_watched_by_its_name() {
    let client = shared().client();
    let sandbox = sandbox(&client, "echo old > /work/a").await;
    let (stands, mut changes) = watching(&client, &format!("{sandbox}/watch?path=work/a&recursive=true")).await;
    assert_eq!(stands["watching"], json!({ "path": "/work/a", "is_folder": false, "recursive": false, "folders": 1 }));

    put(&client, &format!("{sandbox}/files/work/other")).await;
    put(&client, &format!("{sandbox}/files/work/a")).await;

    assert_eq!(change(&changes.next().await.unwrap()), ("created", "/work/a"));
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_sandbox_is_watched_so_often_and_whoever_leaves_makes_room() {
    let client = shared().client();
    let sandbox = sandbox(&client, "").await;
    let path = format!("{sandbox}/watch?path=/work");
    let mut watches = Vec::new();
    for _ in 0..4 {
        watches.push(watching(&client, &path).await);
    }

    client.get(&path).await.problem(503, "no_capacity");
    // What is watched keeps nobody from the files themselves.
    put(&client, &format!("{sandbox}/files/work/a")).await;
    for (_, changes) in &mut watches {
        assert_eq!(change(&changes.next().await.unwrap()), ("created", "/work/a"));
    }
    watches.clear();
    get_where_there_is_room(&client, &path).await;
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn readers_that_close_their_side_are_let_go_and_make_room() {
    let client = shared().client();
    let sandbox = sandbox(&client, "").await;
    let path = format!("{sandbox}/watch?path=/work");
    let forms = ["accept: application/x-ndjson\r\n", "accept: text/event-stream\r\n", stream::HANDSHAKE];

    // More than there are places.
    for form in forms.repeat(2) {
        let mut reader = client.get_by_hand(&path, form).await;
        stream::read_until(&mut reader, "watching").await;
        assert!(host::holds_connection(reader.local_addr().unwrap()), "the control");
        reader.shutdown().await.unwrap();
        stream::read_to_end(&mut reader).await;
        stream::until_let_go(&reader).await;
    }
    // Before anything is answered.
    for form in forms {
        let mut reader = client.get_by_hand(&path, form).await;
        reader.shutdown().await.unwrap();
        stream::read_to_end(&mut reader).await;
        stream::until_let_go(&reader).await;
    }

    let mut watches = Vec::new();
    for _ in 0..4 {
        watches.push(get_where_there_is_room(&client, &path).await);
    }
    gone(&client, &sandbox).await;
}

/// How much the kernel keeps at the most of what is sent over a connection (`tcp_wmem` of tcp(7)).
fn kept_of_a_connection() -> usize {
    let bounds = fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap();
    bounds.split_whitespace().nth(2).unwrap().parse().unwrap()
}

/// Waits until nobody in the sandbox computes: a second long, while its limit gives it a part of each tenth of one.
async fn at_rest(client: &Client, sandbox: &str) {
    let used_ms = async || client.get(&format!("{sandbox}/stats")).await.expect(200)["cpu"]["usage_ms"].as_u64().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let (mut before, mut looks) = (used_ms().await, 0);
    while looks < 5 {
        assert!(Instant::now() < deadline, "somebody in {sandbox} computes all the time");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = used_ms().await;
        (before, looks) = (now, if now == before { looks + 1 } else { 0 });
    }
}

#[tokio::test]
async fn a_reader_that_is_slow_holds_up_nobody_and_hears_of_the_gap() {
    let client = shared().client();
    let name = "n".repeat(240);
    let folder = [name.as_str(); 3].join("/");
    let sandbox = sandbox(&client, &format!("mkdir -p /work/{folder}")).await;
    let mut changes = Box::pin(get_holding_little(&client, &format!("{sandbox}/watch?path=/work&recursive=true")).await);
    until(&mut changes, "watching").await;

    // Nobody reads while this goes on. What lies between is then full: the service's side of the connection, and what waits in the service and in the sandbox, of which each holds less than a
    // mebibyte. As one event each they are far fewer than the kernel queues (`max_queued_events` of inotify(7)), which would be another gap.
    let count = (kept_of_a_connection() + (4 << 20)) / (4 * name.len());
    let burst = format!("cd /work/{folder}; for i in $(seq {count}); do : > {name}$i; done");
    let done = client.post(&format!("{sandbox}/execs"), &json!({ "command": ["sh", "-c", burst], "wait_ms": 100_000 })).await.expect(200);
    assert_eq!(done["outcome"]["exit_code"], 0, "{done:#}");
    put(&client, &format!("{sandbox}/files/work/after")).await;
    // Whoever watches may lag behind; were all read as fast as it is told from here on, nothing would be missed.
    at_rest(&client, &sandbox).await;

    let seen = until(&mut changes, "slow_reader").await;
    assert!(seen.lines().filter(|line| line.contains("\"created\"")).count() < count);
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_watch_ends_when_its_service_stops() {
    let mut service = Service::start();
    let client = service.client();
    let sandbox = sandbox(&client, "").await;
    let mut changes = Box::pin(get(&client, &format!("{sandbox}/watch"), "application/x-ndjson").await.bytes_stream());
    until(&mut changes, "watching").await;

    let stopped = tokio::task::spawn_blocking(move || service.stop().map(|status| status.success()));

    assert_eq!(until(&mut changes, "end").await, "{\"end\":{\"reason\":\"service_stops\"}}\n");
    assert!(stopped.await.unwrap().unwrap());
}
