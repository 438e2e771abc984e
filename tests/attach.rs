//! Input, output and terminal of what runs, over WebSocket: no byte lost, whoever comes, goes, sleeps or talks nonsense.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use futures_util::StreamExt as _;
use mayfly_tests::{Client, service::shared, stream::Socket};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::Message;

/// An idle sandbox with a client of its own.
struct Sandbox {
    client: Client,
    id: String,
}

impl Sandbox {
    async fn new() -> Self {
        let client = shared().client();
        let id = client.sandbox("exec sleep 1000").await;
        Self { client, id }
    }

    /// The path of an exec that is not waited for.
    async fn exec(&self, mut request: Value) -> String {
        request["wait_ms"] = json!(0);
        let path = format!("/v1/sandboxes/{}/execs", self.id);
        let made = self.client.post(&path, &request).await;
        // One that is over at once is told whole.
        assert!(matches!(made.status, 200 | 202), "{}", made.text);
        format!("{path}/{}", made.body["id"].as_str().unwrap())
    }

    async fn shell(&self, script: &str) -> String {
        self.exec(json!({ "command": ["sh", "-c", script], "stdin_open": true })).await
    }

    async fn attach(&self, exec: &str) -> Socket {
        self.client.attach(&format!("{exec}/attach")).await
    }

    async fn end(self) {
        assert_eq!(self.client.delete(&format!("/v1/sandboxes/{}", self.id)).await.status, 204);
    }
}

#[tokio::test]
async fn a_thousand_short_processes_lose_no_byte() {
    let sandbox = Sandbox::new().await;
    let round = |number: usize| {
        let sandbox = &sandbox;
        async move {
            let text = format!("{number}: {}", "x".repeat(number % 500));
            let exec = sandbox.exec(json!({ "command": ["echo", text], "stdin_open": true })).await;
            let seen = sandbox.attach(&exec).await.collect_attached().await;
            assert_eq!(seen.log.stdout_text(), format!("{text}\n"), "round {number}: {seen:?}");
            assert_eq!((seen.log.gaps.len(), &seen.log.end.as_ref().unwrap()["exit_code"]), (0, &json!(0)), "round {number}: {seen:?}");
        }
    };

    let rounds = futures_util::stream::iter(0..1000).map(round).buffer_unordered(8).count().await;

    assert_eq!(rounds, 1000);
    sandbox.end().await;
}

#[tokio::test]
async fn input_arrives_byte_by_byte_and_ends() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat; echo over >&2").await;
    let mut socket = sandbox.attach(&exec).await;
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();

    socket.send(&json!({ "stdin": "grün\n" })).await.unwrap();
    socket.send(&json!({ "stdin_base64": "//4A" })).await.unwrap();
    socket.send_message(Message::binary(bytes.clone())).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    let expected = ["grün\n".as_bytes(), &[255, 254, 0], &bytes].concat();
    assert_eq!(seen.log.stdout, expected);
    assert_eq!(seen.log.stderr, b"over\n");
    assert_eq!(seen.written_bytes, Some(expected.len() as u64));
    assert_eq!((seen.codes(), &seen.log.end.as_ref().unwrap()["exit_code"]), (vec![], &json!(0)));
    sandbox.end().await;
}

#[tokio::test]
async fn the_first_program_of_a_sandbox_is_attached_to_alike() {
    let client = shared().client();
    let request = json!({ "image": "busybox", "command": ["sh", "-c", "read line; echo got $line; exit 9"], "stdin_open": true });
    let id = client.post("/v1/sandboxes", &request).await.expect(201)["id"].as_str().unwrap().to_owned();
    let mut socket = client.attach(&format!("/v1/sandboxes/{id}/attach")).await;

    socket.send(&json!({ "stdin": "it\n" })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!((seen.log.stdout_text().as_str(), &seen.log.end.unwrap()["exit_code"]), ("got it\n", &json!(9)));
    assert_eq!(seen.written_bytes, Some(3));
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn several_see_and_write_at_once() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat").await;
    let (mut one, mut other) = (sandbox.attach(&exec).await, sandbox.attach(&exec).await);

    one.send(&json!({ "stdin": "one\n" })).await.unwrap();
    other.until(|seen| seen.log.stdout == b"one\n").await;
    other.send(&json!({ "stdin": "other\n" })).await.unwrap();
    one.until(|seen| seen.log.stdout == b"one\nother\n").await;
    let late = tokio::spawn(sandbox.attach(&exec).await.collect_attached());
    other.send(&json!({ "stdin_end": true })).await.unwrap();

    let (one, other, late) = (one.collect_attached().await, other.collect_attached().await, late.await.unwrap());
    assert!(one.log.end.is_some() && one.log.end == other.log.end);
    assert_eq!((late.log.stdout_text().as_str(), late.written_bytes), ("one\nother\n", Some(10)));
    sandbox.end().await;
}

#[tokio::test]
async fn who_comes_again_goes_on_where_it_was() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("while read line; do echo \"<$line>\"; done").await;
    let mut first = sandbox.attach(&exec).await;
    first.send(&json!({ "stdin": "a\nb" })).await.unwrap();
    let seen = first.until(|seen| seen.log.stdout == b"<a>\n" && seen.written_bytes == Some(3)).await;
    drop(first);

    let from = seen.log.seqs.last().unwrap() + 1;
    let mut second = sandbox.client.attach(&format!("{exec}/attach?from={from}")).await;
    let greeting = second.next().await.unwrap();
    second.send(&json!({ "stdin": "c\n" })).await.unwrap();
    second.send(&json!({ "stdin_end": true })).await.unwrap();
    let rest = second.collect_attached().await;

    assert_eq!(greeting["stdin"]["written_bytes"], 3);
    assert_eq!((rest.log.stdout_text().as_str(), rest.log.gaps.len()), ("<bc>\n", 0));
    sandbox.end().await;
}

#[tokio::test]
async fn what_is_sent_again_after_a_connection_broke_goes_in_once() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("while ! [ -e /tmp/go ]; do sleep 0.05; done; cat").await;
    let input: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut first = sandbox.attach(&exec).await;
    first.send(&json!({ "stdin_at": 0 })).await.unwrap();
    // More than a pipe takes: some is on its way to a program that does not read when the connection goes.
    for piece in input.chunks(10_000) {
        first.send_message(Message::binary(piece.to_vec())).await.unwrap();
    }
    first.until(|seen| seen.written_bytes.is_some_and(|bytes| bytes > 0)).await;
    drop(first);

    let mut second = sandbox.attach(&exec).await;
    let taken = second.next().await.unwrap()["stdin"]["written_bytes"].as_u64().unwrap();
    second.send(&json!({ "stdin_at": taken })).await.unwrap();
    for piece in input[usize::try_from(taken).unwrap()..].chunks(9_000) {
        second.send_message(Message::binary(piece.to_vec())).await.unwrap();
    }
    second.send(&json!({ "stdin_end": true })).await.unwrap();
    let go = format!("/v1/sandboxes/{}/files/tmp/go", sandbox.id);
    sandbox.client.send(sandbox.client.request(reqwest::Method::PUT, &go).body(""), "PUT", &go).await.expect(200);
    let seen = second.collect_attached().await;

    assert!(seen.log.stdout == input, "{} bytes went in, {} came out", input.len(), seen.log.stdout.len());
    assert_eq!(seen.codes(), [""; 0]);
    sandbox.end().await;
}

#[tokio::test]
async fn input_before_which_some_is_missing_does_not_go_in() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat").await;
    let mut socket = sandbox.attach(&exec).await;

    socket.send(&json!({ "stdin_at": 3 })).await.unwrap();
    socket.send(&json!({ "stdin": "late" })).await.unwrap();
    socket.send(&json!({ "stdin_at": 0 })).await.unwrap();
    socket.send(&json!({ "stdin": "in time" })).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!((seen.log.stdout_text().as_str(), seen.codes()), ("in time", vec!["stdin_gap"]));
    sandbox.end().await;
}

#[tokio::test]
async fn an_end_before_which_input_is_missing_is_none() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat").await;
    let mut socket = sandbox.attach(&exec).await;

    socket.send(&json!({ "stdin_at": 3 })).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    socket.send(&json!({ "stdin_at": 0 })).await.unwrap();
    socket.send(&json!({ "stdin": "all" })).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!((seen.log.stdout_text().as_str(), seen.codes()), ("all", vec!["stdin_gap"]));
    sandbox.end().await;
}

#[tokio::test]
async fn a_program_that_does_not_read_stops_its_writer_and_nobody_else() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("echo on; while ! [ -e /tmp/go ]; do sleep 0.05; done; echo reading; wc -c").await;
    let mut writer = sandbox.attach(&exec).await;
    let watcher = tokio::spawn(sandbox.attach(&exec).await.collect_attached());
    const PIECE: usize = 100_000;

    // More than pipe, service and sockets together may hold of it.
    let mut sent = 0;
    while sent < 64 << 20 {
        let message = Message::binary(vec![b'x'; PIECE]);
        if tokio::time::timeout(Duration::from_secs(2), writer.send_message(message)).await.is_err() {
            break;
        }
        sent += PIECE;
    }

    assert!((PIECE..32 << 20).contains(&sent), "{sent} bytes were taken from a client for a program that reads none");
    drop(writer);
    let exec_now = sandbox.client.get(&exec).await.expect(200);
    assert_eq!(exec_now["state"], "running");
    let mut ender = sandbox.attach(&exec).await;
    let go = format!("/v1/sandboxes/{}/files/tmp/go", sandbox.id);
    sandbox.client.send(sandbox.client.request(reqwest::Method::PUT, &go).body(""), "PUT", &go).await.expect(200);
    ender.until(|seen| seen.log.stdout_text().contains("reading")).await;
    ender.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = watcher.await.unwrap();
    let counted: u64 = seen.log.stdout_text().lines().last().unwrap().trim().parse().unwrap();
    assert_eq!(Some(counted), seen.written_bytes);
    sandbox.end().await;
}

#[tokio::test]
async fn a_viewer_that_sleeps_holds_up_nobody() {
    let sandbox = Sandbox::new().await;
    let request = json!({ "command": ["sh", "-c", "sleep 0.5; flood 20000000"], "limits": { "output_bytes": 32 << 20 } });
    let exec = sandbox.exec(request).await;
    let _asleep = sandbox.attach(&exec).await;

    let awake = sandbox.attach(&exec).await.collect_attached().await;

    assert_eq!(awake.log.stdout.len(), 20_000_000);
    assert_eq!(awake.log.end.unwrap()["reason"], "exited");
    sandbox.end().await;
}

#[tokio::test]
async fn what_makes_no_sense_is_answered_with_a_code_and_words() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat").await;
    for (message, code) in [
        (Message::text("no JSON"), 1007),
        (Message::text(r#"{"stdin":1}"#), 1007),
        (Message::text(r#"{"stdin":"a","signal":"INT"}"#), 1007),
        (Message::text(r#"{"stdin_base64":"%%"}"#), 1007),
        (Message::text(r#"{"signal":"SIGNONE"}"#), 1007),
        (Message::text(r#"{"resize":{"rows":0,"columns":1}}"#), 1007),
        (Message::binary(vec![0; (256 << 10) + 1]), 1009),
        (Message::binary(vec![0; (1 << 20) + 1]), 1009),
        (Message::text("x".repeat((1 << 20) + 1)), 1009),
    ] {
        let mut socket = sandbox.attach(&exec).await;
        socket.send_message(message.clone()).await.unwrap();
        let (closed, words) = socket.closed().await.unwrap();
        assert_eq!(closed, code, "{words}");
        assert!(!words.is_empty());
    }
    let mut socket = sandbox.attach(&exec).await;
    socket.send(&json!({ "stdin": "taken" })).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;
    assert_eq!((seen.log.stdout_text().as_str(), seen.written_bytes), ("taken", Some(5)));
    sandbox.end().await;
}

#[tokio::test]
async fn input_behind_its_end_is_refused() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat; sleep 1000").await;
    let mut socket = sandbox.attach(&exec).await;

    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    socket.send(&json!({ "stdin": "more" })).await.unwrap();

    assert_eq!(socket.closed().await.unwrap().0, 1008);
    sandbox.end().await;
}

#[tokio::test]
async fn input_that_nobody_takes_is_told_and_costs_no_output() {
    let sandbox = Sandbox::new().await;
    let without = json!({ "command": ["sh", "-c", "sleep 3; echo all the same"] });
    let closes = json!({ "command": ["sh", "-c", "exec <&-; echo closed; sleep 3; echo all the same"], "stdin_open": true });
    for request in [without, closes] {
        let is_open = request["stdin_open"] == true;
        let exec = sandbox.exec(request).await;
        let mut socket = sandbox.attach(&exec).await;
        if is_open {
            socket.until(|seen| seen.log.stdout == b"closed\n").await;
        }
        socket.send(&json!({ "stdin": "a" })).await.unwrap();
        socket.send(&json!({ "stdin": "b" })).await.unwrap();
        socket.send(&json!({ "resize": { "rows": 1, "columns": 1 } })).await.unwrap();
        let seen = socket.collect_attached().await;
        assert_eq!(seen.codes(), ["stdin_closed", "no_terminal"], "{seen:?}");
        assert!(seen.log.stdout_text().ends_with("all the same\n"), "{seen:?}");
    }
    sandbox.end().await;
}

#[tokio::test]
async fn signals_reach_the_process() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("trap 'echo interrupted' INT; echo on; while :; do sleep 0.05; done").await;
    let mut socket = sandbox.attach(&exec).await;
    socket.until(|seen| seen.log.stdout == b"on\n").await;

    socket.send(&json!({ "signal": "SIGINT" })).await.unwrap();
    socket.until(|seen| seen.log.stdout == b"interrupted\n").await;
    socket.send(&json!({ "signal": 9 })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!(seen.log.end.unwrap()["reason"], "stopped_by_user");
    sandbox.end().await;
}

#[tokio::test]
async fn a_terminal_is_typed_at() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.exec(json!({ "command": ["sh", "-i"], "tty": { "rows": 5, "columns": 60 }, "env": { "PS1": "" } })).await;
    let mut socket = sandbox.attach(&exec).await;

    socket.send(&json!({ "stdin": "stty -echo; stty size\n" })).await.unwrap();
    socket.until(|seen| seen.log.stdout_text().contains("5 60\r\n")).await;
    socket.send(&json!({ "resize": { "rows": 7, "columns": 70 } })).await.unwrap();
    // It says that it is the one in the foreground before it sleeps: to one that is not yet, the key would mean nothing.
    socket.send(&json!({ "stdin": "stty size; sh -c 'echo asleep; exec sleep 1000'\n" })).await.unwrap();
    socket.until(|seen| seen.log.stdout_text().contains("7 70\r\nasleep\r\n")).await;
    // What Ctrl-C and Ctrl-D send.
    socket.send(&json!({ "stdin": "\u{3}" })).await.unwrap();
    socket.send(&json!({ "stdin": "echo still $((40 + 2))\n" })).await.unwrap();
    socket.until(|seen| seen.log.stdout_text().contains("still 42")).await;
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!(seen.log.end.unwrap()["reason"], "exited");
    sandbox.end().await;
}

#[tokio::test]
async fn clients_that_vanish_at_every_step_leave_the_process_alone() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("while read line; do echo \"<$line>\"; done; echo ended").await;
    let (host, handshake) = handshake(&sandbox, &exec);
    let whole = [handshake.as_bytes(), &frame(0x81, r#"{"stdin":"v\n"}"#)].concat();
    for length in [20, handshake.len() - 1, handshake.len(), handshake.len() + 1, handshake.len() + 8, whole.len()] {
        for is_half_closed in [false, true] {
            let mut stream = tokio::net::TcpStream::connect(&host).await.unwrap();
            stream.write_all(&whole[..length]).await.unwrap();
            if is_half_closed {
                stream.shutdown().await.unwrap();
                // The service has nothing to wait for: it closes too.
                let mut rest = Vec::new();
                tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await.unwrap().ok();
            }
        }
    }

    let mut socket = sandbox.attach(&exec).await;
    socket.send(&json!({ "stdin": "last\n" })).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    let lines: Vec<String> = seen.log.stdout_text().lines().map(ToOwned::to_owned).collect();
    // Whole frames count, of those that were cut off nothing does.
    assert!(lines.len() <= 4 && lines.iter().filter(|line| *line == "<v>").count() == lines.len() - 2, "{lines:?}");
    assert_eq!(lines[lines.len() - 2..], ["<last>", "ended"]);
    sandbox.end().await;
}

/// The handshake by which `exec` is attached to, word by word.
fn handshake(sandbox: &Sandbox, exec: &str) -> (String, String) {
    let host = sandbox.client.place().url.trim_start_matches("http://").to_owned();
    let head = format!(
        "GET {exec}/attach HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        sandbox.client.token().unwrap()
    );
    (host, head)
}

/// A frame as clients send it, with a mask of zeros: its first byte, and what it holds.
fn frame(first: u8, text: &str) -> Vec<u8> {
    [&[first, 0x80 | u8::try_from(text.len()).unwrap(), 0, 0, 0, 0][..], text.as_bytes()].concat()
}

#[tokio::test]
async fn frames_that_break_the_protocol_end_the_connection_and_nothing_else() {
    const INPUT: &str = r#"{"stdin":"no\n"}"#;
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("while read line; do echo \"<$line>\"; done").await;
    let (host, head) = handshake(&sandbox, &exec);
    for (fault, frames) in [
        ("the rest of a message that was not begun", frame(0x80, INPUT)),
        ("a message in the middle of another", [frame(0x01, INPUT), frame(0x81, INPUT)].concat()),
        ("a frame without a mask", [&[0x81, u8::try_from(INPUT.len()).unwrap()], INPUT.as_bytes()].concat()),
        ("a kind of frame that there is not", frame(0x83, INPUT)),
        ("a bit that nobody agreed on", frame(0xc1, INPUT)),
        ("a ping in two frames", frame(0x09, "a")),
        ("a ping of 126 bytes", [&[0x89, 0xfe, 0, 126, 0, 0, 0, 0][..], &[b'a'; 126]].concat()),
        ("a frame of more bytes than there are", [0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0].to_vec()),
        ("a text that is none", [&[0x81, 0x82, 0, 0, 0, 0][..], &[0xff, 0xfe]].concat()),
        ("a close of one byte", frame(0x88, "a")),
    ] {
        let mut stream = tokio::net::TcpStream::connect(&host).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 101", "{fault}");
        stream.write_all(&frames).await.unwrap();
        // A reset is an end, too.
        let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "{fault}");
    }

    let mut socket = sandbox.attach(&exec).await;
    socket.send(&json!({ "stdin": "yes\n" })).await.unwrap();
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!((seen.log.stdout_text().as_str(), seen.written_bytes), ("<yes>\n", Some(4)));
    sandbox.end().await;
}

#[tokio::test]
async fn only_its_tenant_may_attach_and_only_with_the_scope() {
    let sandbox = Sandbox::new().await;
    let exec = sandbox.shell("cat").await;
    let reader = Client::with_scope(sandbox.client.place(), "reader", "sandboxes:read");
    let status = async |client: &Client, path: &str| {
        let request = client.request(reqwest::Method::GET, path);
        let request = request.header("connection", "Upgrade").header("upgrade", "websocket").header("sec-websocket-version", "13");
        request.header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==").send().await.unwrap().status().as_u16()
    };
    for path in [format!("{exec}/attach"), format!("/v1/sandboxes/{}/attach", sandbox.id)] {
        assert_eq!(status(&shared().client(), &path).await, 404);
        assert_eq!(status(&reader, &path).await, 403);
        assert_eq!(status(&Client::with_token(sandbox.client.place(), None), &path).await, 401);
        assert_eq!(status(&sandbox.client, &path).await, 101);
        assert_eq!(sandbox.client.request(reqwest::Method::GET, &path).send().await.unwrap().status(), 422);
    }
    sandbox.end().await;
}
