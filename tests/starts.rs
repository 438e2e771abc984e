//! Another life of a sandbox, where several decide about its layer at the same moment: who starts it, who deletes it, and who gives up what is too old.
//!
//! Each test has a service of its own, which stands still at one step: so whoever comes then comes in the middle.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use mayfly_tests::{Client, Service, outcome::assert_exit};
use serde_json::{Value, json};
use tokio::time::Instant;

/// What a sandbox takes up while it lives, and what its layer does, in bytes of memory.
const LIFE: u64 = 64 << 20;
const LAYER: u64 = 16 << 20;
/// Enough for one of them, and not for two.
const ROOM: u64 = 96 << 20;
/// Counts its lives in a file, and exits with their number.
const LIVES: &str = "n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; echo life $n; exit $n";
/// The same, but for the second, which stays.
const SECOND_STAYS: &str =
    "n=$(cat /work/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /work/n; echo life $n; [ $n = 2 ] && exec sleep 1000; exit $n";
/// When what is too old is looked for first, after the service was started.
const ROUND: Duration = Duration::from_secs(30);
/// How long after that it is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A service that does this at a step, and when it began to serve.
fn service(args: &[&str], step: &str) -> (Service, Instant) {
    let mut service = Service::start_with(args).unwrap();
    service.import("busybox").unwrap();
    service.kill();
    service.arm(step);
    service.start_again().unwrap();
    (service, Instant::now())
}

fn client(service: &Service) -> Client {
    Client::of(service.place(), "starter")
}

/// One that has had its first life, and where it is found.
async fn ended(client: &Client, script: &str) -> String {
    let limits = json!({ "memory_bytes": LIFE, "cpu_millis": 100, "disk_bytes": LAYER });
    let request = json!({ "image": "busybox", "command": ["sh", "-c", script], "keep_layer": true, "limits": limits });
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    assert_exit(&end(client, &path).await, 1);
    path
}

async fn end(client: &Client, path: &str) -> Value {
    let waited = client.get(&format!("{path}/wait?until=exited")).await.expect(200);
    assert_eq!(waited["result"], "reached");
    waited["sandbox"].clone()
}

/// What of the node's memory is promised, in bytes.
async fn committed(service: &Service) -> u64 {
    let text = reqwest::get(format!("{}/metrics", service.place().metrics_url)).await.unwrap().text().await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("sandbox_committed_memory_bytes "));
    line.expect("the metric is there").parse().unwrap()
}

/// Sends the order to start it, and goes on meanwhile.
fn starting(client: &Client, path: &str) -> tokio::task::JoinHandle<mayfly_tests::Answer> {
    let (client, path) = (client.clone(), format!("{path}/start"));
    tokio::spawn(async move { client.post(&path, &json!({})).await })
}

#[tokio::test]
async fn of_many_starts_at_once_one_begins_a_life_and_all_are_told_of_it() {
    let (service, _) = service(&["--capacity-memory-bytes", &ROOM.to_string()], "service.start.taken=1*sleep(1000)");
    let client = client(&service);
    let path = ended(&client, SECOND_STAYS).await;
    assert_eq!(committed(&service).await, LAYER);

    let answers = futures_util::future::join_all((0..32).map(|_| starting(&client, &path))).await;
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    let during = committed(&service).await;
    client.post(&format!("{path}/kill"), &json!({})).await.expect(200);
    end(&client, &path).await;
    let after = committed(&service).await;
    client.post(&format!("{path}/start"), &json!({})).await.expect(200);
    let third = end(&client, &path).await;
    let events = client.get("/v1/events?kind=sandbox.started").await.expect(200);

    for answer in answers {
        let told = answer.unwrap().expect(200);
        assert_eq!(told["starts"], 2, "{told:#}");
    }
    assert_eq!((during, after), (LIFE, LAYER));
    assert_exit(&third, 3);
    assert_eq!(third["starts"], 3);
    assert_eq!(events["items"].as_array().unwrap().len(), 2, "{events:#}");
    assert_eq!(client.delete(&path).await.status, 204);
    assert_eq!(committed(&service).await, 0);
}

#[tokio::test]
async fn a_layer_is_not_given_up_for_its_age_under_a_start() {
    // A start stands still for longer than there is between two rounds: one comes meanwhile.
    let (service, began) = service(&["--retention-hours", "0"], "service.start.taken=1*sleep(45000)");
    let client = client(&service);
    let (path, other) = (ended(&client, LIVES).await, ended(&client, LIVES).await);
    assert_eq!(committed(&service).await, 2 * LAYER);

    let start = starting(&client, &path);
    // The round has come when the other one's is given up.
    let other = other.rsplit('/').next().unwrap();
    while !service.log().lines().any(|line| line.contains("the layer of an ended sandbox is given up") && line.contains(other)) {
        assert!(began.elapsed() < ROUND + PATIENCE, "what is too old is still there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!start.is_finished(), "no round came while it was being started");
    start.await.unwrap().expect(200);
    let second = end(&client, &path).await;

    assert_exit(&second, 2);
    assert_eq!(committed(&service).await, LAYER);
}

#[tokio::test]
async fn a_start_that_meets_its_layer_being_given_up_is_told_that_it_is_lost() {
    let (service, began) = service(&["--retention-hours", "0"], "service.layer.dropped=1*sleep(3000)");
    let client = client(&service);
    let path = ended(&client, LIVES).await;
    while !service.log().contains("the layer of an ended sandbox is given up") {
        assert!(began.elapsed() < ROUND + PATIENCE, "it is never given up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let answer = starting(&client, &path).await.unwrap();

    // With its layer the sandbox itself may have become too old to be kept.
    let told = (answer.status, answer.body["code"].as_str().unwrap_or_default());
    assert!(matches!(told, (409, "layer_lost") | (404, "not_found")), "{}", answer.text);
    assert_eq!(committed(&service).await, 0);
}

#[tokio::test]
async fn a_sandbox_that_is_deleted_under_its_start_has_no_life_without_its_layer() {
    let (service, _) = service(&[], "service.start.taken=1*sleep(2000)");
    let client = client(&service);
    let path = ended(&client, SECOND_STAYS).await;

    let start = starting(&client, &path);
    // Long enough for it to have come to that step; whichever is first, both must be told what is so.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let deleted = client.delete(&path).await.status;
    let started = start.await.unwrap();

    assert_eq!(deleted, 204);
    assert!(started.status == 404 || started.status == 200, "{}", started.text);
    assert_ne!(started.body["outcome"]["reason"], "infra_error", "{}", started.text);
    client.get(&path).await.problem(404, "not_found");
    assert_eq!(committed(&service).await, 0);
}
