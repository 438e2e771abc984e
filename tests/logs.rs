//! Output as it is read while and after a sandbox runs: whole, in order, by any number of readers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use mayfly_tests::{Client, host, outcome::assert_exit, service::shared, stream};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest, http::HeaderValue};

async fn sandbox(client: &Client, script: &str) -> String {
    let made = client.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sh", "-c", script] })).await.expect(201);
    made["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_reader_that_joins_late_gets_the_same_as_one_from_the_start() {
    let client = shared().client();
    let id = sandbox(&client, "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; echo error $i >&2; sleep 0.05; done; exit 3").await;
    let early = tokio::spawn({
        let socket = client.follow(&id, "from=0&follow=true").await;
        async move { socket.collect().await }
    });
    tokio::time::sleep(Duration::from_millis(250)).await;
    let late = client.follow(&id, "from=0").await.collect().await;
    let early = early.await.unwrap();

    assert_eq!(early, late);
    assert_eq!(early.stdout_text(), (1..=10).map(|i| format!("line {i}\n")).collect::<String>());
    assert_eq!(early.stderr, (1..=10).map(|i| format!("error {i}\n")).collect::<String>().into_bytes());
    assert_eq!(early.gaps, Vec::<Value>::new());
    assert_eq!(early.end.unwrap()["exit_code"], 3);
}

#[tokio::test]
async fn a_reader_after_the_end_gets_all_of_it() {
    let client = shared().client();
    let run = client.shell("echo first; echo second >&2").await;
    let id = run["id"].as_str().unwrap();

    let frames = client.log(id).await;

    assert_eq!((frames.stdout_text(), frames.stderr), ("first\n".to_owned(), b"second\n".to_vec()));
    assert_eq!(frames.end.as_ref(), Some(&run["outcome"]));
}

#[tokio::test]
async fn output_arrives_while_the_program_runs() {
    let client = shared().client();
    let id = sandbox(&client, "echo now; exec sleep 1000").await;

    let first = tokio::time::timeout(Duration::from_secs(30), async { client.follow(&id, "from=0").await.next().await }).await.unwrap();

    assert_eq!(first.unwrap()["data"], "now\n");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn a_reader_goes_on_where_it_stopped() {
    let client = shared().client();
    let run = client.shell("echo a; sleep 1; echo b; sleep 1; echo c").await;
    let id = run["id"].as_str().unwrap();
    let all = client.log(id).await;

    let rest = client.follow(id, &format!("from={}", all.seqs[1])).await.collect().await;

    assert_eq!(all.stdout_text(), "a\nb\nc\n");
    assert_eq!(rest.stdout_text(), "b\nc\n");
    assert_eq!(rest.seqs, all.seqs[1..]);
    assert_eq!(rest.gaps, Vec::<Value>::new());
}

#[tokio::test]
async fn without_follow_the_stream_ends_at_what_is_there() {
    let client = shared().client();
    let id = sandbox(&client, "echo so far; exec sleep 1000").await;
    let _ = client.follow(&id, "from=0").await.next().await;

    let frames = client.follow(&id, "from=0&follow=false").await.collect().await;

    assert_eq!(frames.stdout_text(), "so far\n");
    assert_eq!(frames.end, None);
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn twenty_megabytes_arrive_without_a_loss() {
    let client = shared().client();
    const BYTES: usize = 20_000_000;
    let request = json!({ "image": "busybox", "command": ["flood", BYTES.to_string()], "limits": { "output_bytes": 32 << 20 } });
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    let id = made["id"].as_str().unwrap();

    let (one, two) = tokio::join!(client.log(id), client.log(id));

    assert_eq!(one.stdout.len(), BYTES);
    assert!(one.stdout.iter().enumerate().all(|(at, byte)| usize::from(*byte - b'a') == at % 65536 % 26), "the pattern is broken");
    assert_eq!(one, two);
    assert_eq!(one.end.unwrap()["usage"]["stdout_bytes"], BYTES);
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_nobody() {
    let client = shared().client();
    let request =
        json!({ "image": "busybox", "command": ["sh", "-c", "sleep 0.5; flood 20000000"], "limits": { "output_bytes": 32 << 20 } });
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    let id = made["id"].as_str().unwrap();
    let _asleep = client.follow(id, "from=0").await;

    let awake = client.log(id).await;

    assert_eq!(awake.stdout.len(), 20_000_000);
    assert_eq!(awake.end.unwrap()["reason"], "exited");
}

#[tokio::test]
async fn readers_that_talk_too_much_or_vanish_are_gone_and_the_log_goes_on() {
    let client = shared().client();
    let id = sandbox(&client, "while ! [ -e /tmp/enough ]; do echo line; sleep 0.02; done; echo last").await;
    let mut loud = client.follow(&id, "from=0").await;
    loud.send_message(Message::text("x".repeat(5000))).await.unwrap();
    while loud.next().await.is_some() {}
    for form in ["application/x-ndjson", "text/event-stream", "text/plain"] {
        let path = format!("/v1/sandboxes/{id}/logs");
        let mut reading = client.request(reqwest::Method::GET, &path).header("accept", form).send().await.unwrap();
        assert!(!reading.chunk().await.unwrap().unwrap().is_empty(), "{form}");
    }
    drop(client.follow(&id, "from=0").await);

    let path = format!("/v1/sandboxes/{id}/files/tmp/enough");
    client.send(client.request(reqwest::Method::PUT, &path).body(""), "PUT", &path).await.expect(200);
    let frames = client.log(&id).await;

    assert!(frames.stdout_text().ends_with("line\nlast\n") && frames.gaps.is_empty(), "{frames:?}");
    assert_eq!(frames.end.unwrap()["exit_code"], 0);
}

#[tokio::test]
async fn readers_that_close_their_side_are_let_go_while_the_log_goes_on() {
    let client = shared().client();
    let id = sandbox(&client, "echo first; exec sleep 1000").await;
    let path = format!("/v1/sandboxes/{id}/logs");

    for form in ["accept: application/x-ndjson\r\n", "accept: text/event-stream\r\n", "accept: text/plain\r\n", stream::HANDSHAKE] {
        let mut reader = client.get_by_hand(&path, form).await;
        stream::read_until(&mut reader, "first").await;
        assert!(host::holds_connection(reader.local_addr().unwrap()), "the control: {form}");
        reader.shutdown().await.unwrap();
        stream::read_to_end(&mut reader).await;
        stream::until_let_go(&reader).await;
    }

    assert_eq!(client.follow(&id, "from=0").await.next().await.unwrap()["data"], "first\n");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn bytes_that_are_not_text_arrive_as_they_were() {
    let client = shared().client();
    let run = client.shell(r"printf '\377\376\000\001'; printf 'gr\303\274n' >&2").await;

    let frames = client.log(run["id"].as_str().unwrap()).await;

    assert_exit(&run, 0);
    assert_eq!(frames.stdout, [255, 254, 0, 1]);
    assert_eq!(frames.stderr, "grün".as_bytes());
}

#[tokio::test]
async fn a_program_that_says_nothing_has_a_log_that_only_ends() {
    let client = shared().client();
    let run = client.shell("true").await;

    let frames = client.log(run["id"].as_str().unwrap()).await;

    assert!(frames.seqs.is_empty() && frames.gaps.is_empty());
    assert_eq!(frames.end.unwrap()["exit_code"], 0);
}

#[tokio::test]
async fn the_log_is_to_be_had_as_lines_of_json() {
    let client = shared().client();
    let run = client.shell("echo as lines").await;
    let path = format!("/v1/sandboxes/{}/logs?from=0", run["id"].as_str().unwrap());

    let answer = client.send(client.request(reqwest::Method::GET, &path).header("accept", "application/x-ndjson"), "GET", &path).await;
    let mut frames = stream::Frames::default();
    answer.text.lines().for_each(|line| frames.add(&serde_json::from_str(line).unwrap()));

    assert_eq!(answer.status, 200);
    assert_eq!(frames.stdout_text(), "as lines\n");
    assert_eq!(frames.end.as_ref(), Some(&run["outcome"]));
}

#[tokio::test]
async fn a_browsers_token_travels_as_a_subprotocol() {
    let client = shared().client();
    let run = client.shell("echo to a browser").await;
    let url = format!("{}/v1/sandboxes/{}/logs?from=0", client.place().url.replacen("http", "ws", 1), run["id"].as_str().unwrap());
    let mut request = url.into_client_request().unwrap();
    let protocols = format!("mayfly.v1, mayfly.bearer.{}", client.token().unwrap());
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_str(&protocols).unwrap());

    let frames = stream::open_request(request).await.unwrap().collect().await;

    assert_eq!(frames.stdout_text(), "to a browser\n");
}

#[tokio::test]
async fn a_stream_needs_a_token() {
    let service = shared();
    let run = service.client().shell("true").await;
    let url = format!("{}/v1/sandboxes/{}/logs", service.place.url, run["id"].as_str().unwrap());
    let forged = format!("x.{}.y", BASE64_URL_SAFE_NO_PAD.encode("{}"));

    let none = stream::open(&url, None).await.unwrap_err();
    let bad = stream::open(&url, Some(&forged)).await.unwrap_err();

    assert!(format!("{none:#}").contains("401"), "{none:#}");
    assert!(format!("{bad:#}").contains("401"), "{bad:#}");
}

#[tokio::test]
async fn another_tenants_log_is_not_found() {
    let service = shared();
    let run = service.client().shell("echo secret").await;
    let url = format!("{}/v1/sandboxes/{}/logs", service.place.url, run["id"].as_str().unwrap());

    let refused = stream::open(&url, service.client().token()).await.unwrap_err();

    assert!(format!("{refused:#}").contains("404"), "{refused:#}");
}

/// An answer in a form of the caller's choice, as text.
async fn read_as(client: &Client, path: &str, accept: &str) -> (u16, String, String) {
    let answer = client.request(reqwest::Method::GET, path).header("accept", accept).send().await.unwrap();
    let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
    (answer.status().as_u16(), kind, answer.text().await.unwrap())
}

#[tokio::test]
async fn the_last_lines_are_to_be_had_and_what_follows_them() {
    let client = shared().client();
    let run = client.shell("printf 'one\\ntwo\\n'; sleep 0.1; printf 'three\\nfo'; sleep 0.1; printf 'ur\\n'").await;
    let id = run["id"].as_str().unwrap();

    let two = client.follow(id, "tail=2").await.collect().await;
    let none = client.follow(id, "tail=0").await.collect().await;
    let all = client.follow(id, "tail=100000").await.collect().await;

    assert_eq!(two.stdout_text(), "three\nfour\n");
    assert_eq!(none.stdout_text(), "");
    assert_eq!(all.stdout_text(), "one\ntwo\nthree\nfour\n");
    assert!([&two, &none, &all].iter().all(|frames| frames.gaps.is_empty() && frames.end.is_some()));
}

#[tokio::test]
async fn lines_that_are_written_later_follow_the_last_ones() {
    let client = shared().client();
    let id = sandbox(&client, "echo a; echo b; sleep 1; echo c").await;
    client.follow(&id, "from=0").await.next().await;

    let frames = client.follow(&id, "tail=1").await.collect().await;

    assert_eq!(frames.stdout_text(), "b\nc\n");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn one_stream_alone_is_shown_without_gaps() {
    let client = shared().client();
    let run = client.shell("for i in 1 2 3; do echo out $i; echo err $i >&2; sleep 0.05; done").await;
    let id = run["id"].as_str().unwrap();

    let out = client.follow(id, "stream=stdout").await.collect().await;
    let err = client.follow(id, "stream=stderr&tail=1").await.collect().await;

    assert_eq!((out.stdout_text().as_str(), out.stderr.as_slice()), ("out 1\nout 2\nout 3\n", &[][..]));
    assert_eq!((err.stdout.as_slice(), err.stderr.as_slice()), (&[][..], &b"err 3\n"[..]));
    assert_eq!((out.gaps, err.gaps), (vec![], vec![]));
}

#[tokio::test]
async fn nothing_is_shown_that_was_written_before_the_time_asked_for() {
    let client = shared().client();
    let run = client.shell("echo early; sleep 1; echo late").await;
    let id = run["id"].as_str().unwrap();
    let frames: Vec<Value> = {
        let mut socket = client.follow(id, "from=0").await;
        let mut all = Vec::new();
        while let Some(frame) = socket.next().await {
            all.push(frame);
        }
        all
    };
    let late = frames.iter().find(|frame| frame["data"] == "late\n").unwrap()["at"].as_str().unwrap();

    let since = client.follow(id, &format!("since={late}")).await.collect().await;

    assert_eq!(since.stdout_text(), "late\n");
}

#[tokio::test]
async fn a_log_is_plain_text_with_times_if_so_asked() {
    let client = shared().client();
    let run = client.shell("printf 'a\\nb\\n\\377'; sleep 1; echo c >&2").await;
    let path = format!("/v1/sandboxes/{}/logs", run["id"].as_str().unwrap());

    let plain = client.request(reqwest::Method::GET, &path).header("accept", "text/plain").send().await.unwrap();
    let bytes = plain.bytes().await.unwrap();
    let (status, kind, timed) = read_as(&client, &format!("{path}?timestamps=true&stream=stderr"), "text/plain").await;

    assert_eq!(&bytes[..], b"a\nb\n\xffc\n");
    assert_eq!((status, kind.as_str()), (200, "text/plain"));
    let (time, text) = timed.split_once(' ').unwrap();
    assert!(text == "c\n" && time.ends_with('Z') && time.starts_with("20"), "{timed}");
}

#[tokio::test]
async fn a_browser_goes_on_by_its_last_event_and_stops_at_the_end() {
    let client = shared().client();
    let run = client.shell("echo a; sleep 1; echo b").await;
    let path = format!("/v1/sandboxes/{}/logs", run["id"].as_str().unwrap());
    let (status, kind, all) = read_as(&client, &path, "text/event-stream").await;
    let events: Vec<(&str, Value)> = all
        .split_terminator("\n\n")
        .map(|event| {
            let (id, data) = event.split_once('\n').unwrap();
            (id.strip_prefix("id: ").unwrap(), serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap())
        })
        .collect();
    let again =
        |seen: &str| client.request(reqwest::Method::GET, &path).header("accept", "text/event-stream").header("last-event-id", seen).send();

    let rest = again(events[0].0).await.unwrap().text().await.unwrap();
    let over = again("end").await.unwrap().status().as_u16();

    assert_eq!((status, kind.as_str()), (200, "text/event-stream"));
    assert_eq!((events[0].1["data"].as_str(), events[2].0), (Some("a\n"), "end"));
    assert_eq!(events[2].1["end"], run["outcome"]);
    assert_eq!(rest, all.split_once("\n\n").unwrap().1);
    assert_eq!(over, 204);
}

#[tokio::test]
async fn what_cannot_be_asked_of_a_log_is_named() {
    let client = shared().client();
    let run = client.shell("true").await;
    let path = format!("/v1/sandboxes/{}/logs", run["id"].as_str().unwrap());
    for (query, field) in [
        ("from=x", "from"),
        ("tail=-1", "tail"),
        ("tail=100001", "tail"),
        ("since=now", "since"),
        ("stream=both", "stream"),
        ("follow=maybe", "follow"),
        ("colour=red", "colour"),
    ] {
        assert_eq!(client.get(&format!("{path}?{query}")).await.problem(422, "invalid_request")["field"], field);
    }
}
