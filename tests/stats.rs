//! What a sandbox uses, as it is told while it runs: against programs whose use is known.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use mayfly_tests::{Client, service::shared};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

async fn sandbox(client: &Client, script: &str) -> String {
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", script], "limits": { "memory_bytes": 64 * MIB, "pids": 20, "cpu_millis": 500 },
    });
    client.post("/v1/sandboxes", &request).await.expect(201)["id"].as_str().unwrap().to_owned()
}

fn number(sample: &Value, pointer: &str) -> u64 {
    sample.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {pointer} in {sample:#}"))
}

#[tokio::test]
async fn one_sample_tells_what_is_used_and_what_may_be() {
    let client = shared().client();
    let id = sandbox(&client, "dd if=/dev/zero of=/tmp/kept bs=1048576 count=16 2>/dev/null; sleep 1000 & echo ready; wait").await;
    client.follow(&id, "from=0").await.next().await.unwrap();

    let sample = client.get(&format!("/v1/sandboxes/{id}/stats")).await.expect(200);

    assert_eq!(sample["state"], "running");
    assert_eq!(number(&sample, "/memory/limit_bytes"), 64 * MIB);
    let used = number(&sample, "/memory/usage_bytes");
    assert!((16 * MIB..64 * MIB).contains(&used) && number(&sample, "/memory/peak_bytes") >= used, "{sample:#}");
    assert!((2..=3).contains(&number(&sample, "/pids/current")) && number(&sample, "/pids/limit") == 20, "{sample:#}");
    assert_eq!(number(&sample, "/cpu/limit_millis"), 500);
    assert_eq!(number(&sample, "/network/sent_bytes"), 0);
    let percent = sample["memory"]["percent"].as_f64().unwrap();
    assert!((25.0..=100.0).contains(&percent), "{sample:#}");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn what_reaches_the_nodes_disks_is_counted_by_bytes_and_by_operations() {
    let client = shared().client();
    // More disk than memory is on disk; past the kernel's own memory it gets there at once.
    let script = "dd if=/dev/zero of=/fill bs=65536 count=128 oflag=direct 2>/dev/null && dd if=/fill of=/dev/null bs=65536 iflag=direct 2>/dev/null && echo through";
    let request =
        json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "memory_bytes": 16 * MIB, "disk_bytes": 32 * MIB } });
    let path = format!("/v1/sandboxes/{}", client.post("/v1/sandboxes", &request).await.expect(201)["id"].as_str().unwrap());
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    let sample = async || client.get(&format!("{path}/stats")).await.expect(200);

    let before = sample().await;
    let done = client.post(&format!("{path}/execs"), &json!({ "command": ["sh", "-c", script], "wait_ms": 60_000 })).await.expect(200);
    let after = sample().await;

    assert_eq!(done["stdout"], "through\n", "{done:#}");
    let more = |pointer: &str| number(&after, pointer) - number(&before, pointer);
    // No piece of it is counted twice, though it goes through a device of its own on its way; what the file system keeps of it comes on top.
    assert!((8 * MIB..16 * MIB).contains(&more("/io/written_bytes")), "{before:#} {after:#}");
    assert!((8 * MIB..16 * MIB).contains(&more("/io/read_bytes")), "{before:#} {after:#}");
    assert!(more("/io/writes") > 0 && more("/io/reads") > 0, "{before:#} {after:#}");
    assert_eq!(client.delete(&path).await.status, 204);
}

#[tokio::test]
async fn a_stream_tells_of_a_busy_loop_and_ends_with_the_outcome() {
    let client = shared().client();
    let id = sandbox(&client, "end=$(($(date +%s) + 3)); while [ $(date +%s) -lt $end ]; do :; done; exit 4").await;

    let mut socket = client.attach(&format!("/v1/sandboxes/{id}/stats?interval_ms=200")).await;
    let mut samples = Vec::new();
    let end = loop {
        let frame = socket.next().await.expect("a stream has an end");
        if frame.get("end").is_some() {
            break frame;
        }
        samples.push(frame);
    };

    assert!(samples.len() >= 5, "{} samples", samples.len());
    let times: Vec<u64> = samples.iter().map(|sample| number(sample, "/cpu/usage_ms")).collect();
    assert!(times.is_sorted() && times.last() > times.first(), "{times:?}");
    // Half a core, as limited; never more than a period's worth beyond.
    let busiest = samples.iter().skip(1).map(|sample| sample["cpu"]["percent"].as_f64().unwrap()).fold(0.0, f64::max);
    assert!((10.0..=105.0).contains(&busiest), "{busiest} % of {samples:#?}");
    assert!(samples.iter().any(|sample| number(sample, "/cpu/throttled_ms") > 0), "{samples:#?}");
    assert_eq!(end["end"]["exit_code"], 4);
    assert_eq!(socket.next().await, None);
}

#[tokio::test]
async fn samples_come_as_lines_and_as_events() {
    let client = shared().client();
    let id = sandbox(&client, "sleep 4").await;
    let path = format!("/v1/sandboxes/{id}/stats?interval_ms=100");
    let get = |accept: &'static str| client.request(reqwest::Method::GET, &path).header("accept", accept).send();

    let (lines, events) = tokio::join!(async { get("application/x-ndjson").await.unwrap().text().await.unwrap() }, async {
        get("text/event-stream").await.unwrap().text().await.unwrap()
    },);

    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last["end"]["reason"], "exited");
    assert!(lines.lines().count() > 3, "{lines}");
    assert!(events.starts_with("data: {\"at\"") && events.contains("data: {\"end\""), "{events}");
}

#[tokio::test]
async fn what_does_not_run_has_no_stats() {
    let client = shared().client();
    let id = sandbox(&client, "exit 0").await;
    client.until(&format!("/v1/sandboxes/{id}"), |sandbox| !sandbox["outcome"].is_null()).await;

    let refused = client.get(&format!("/v1/sandboxes/{id}/stats")).await.problem(409, "wrong_state");

    assert_eq!(refused["state"], "exited");
    client.get("/v1/sandboxes/0190b5a4-0000-7000-8000-000000000000/stats").await.problem(404, "not_found");
    assert_eq!(shared().client().get(&format!("/v1/sandboxes/{id}/stats")).await.status, 404);
    for (query, field) in
        [("interval_ms=99", "interval_ms"), ("interval_ms=60001", "interval_ms"), ("stream=perhaps", "stream"), ("x=1", "x")]
    {
        let refused = client.get(&format!("/v1/sandboxes/{id}/stats?{query}")).await.problem(422, "invalid_request");
        assert_eq!(refused["field"], field);
    }
}

#[tokio::test]
async fn a_reader_of_samples_that_vanishes_leaves_the_sandbox_alone() {
    let client = shared().client();
    let id = sandbox(&client, "while ! [ -e /tmp/go ]; do sleep 0.05; done; echo done").await;
    for _ in 0..5 {
        let mut socket = client.attach(&format!("/v1/sandboxes/{id}/stats?interval_ms=100")).await;
        socket.next().await.unwrap();
    }
    let go = format!("/v1/sandboxes/{id}/files/tmp/go");
    client.send(client.request(reqwest::Method::PUT, &go).body(""), "PUT", &go).await.expect(200);

    let frames = tokio::time::timeout(Duration::from_secs(60), client.log(&id)).await.unwrap();

    assert_eq!((frames.stdout_text().as_str(), &frames.end.unwrap()["exit_code"]), ("done\n", &json!(0)));
}
