//! Webhooks: what happens is sent, signed as receivers check it, again until it is taken; and never to where only the service could reach.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    io::{Read as _, Write as _},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use mayfly_tests::{Client, Service, client::Answer, postgres::Database, service::shared, token};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::Instant,
};

/// Long enough to notice by, and for a loaded machine.
const SOON: Duration = Duration::from_secs(30);
/// What the operator of these services allows.
const OWN: [&str; 6] = ["--webhook-allow", "127.0.0.0/8", "--webhook-http", "true", "--webhook-retry-s", "1"];

/// One request as a receiver had it.
#[derive(Debug, Clone)]
struct Received {
    path: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Received {
    fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// How a receiver behaves, by the number of the request.
#[derive(Debug, Clone, Copy)]
enum Manner {
    Takes,
    /// Answers so before it takes.
    FailsBefore(usize, &'static str),
    Hangs,
    /// Closes with a reset as soon as it was asked.
    Resets,
    /// Takes, with a body that does not end.
    Floods,
}

/// A server of our own on 127.0.0.1, which keeps what it is sent.
struct Receiver {
    url: String,
    received: Arc<Mutex<Vec<Received>>>,
    served: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.served.abort();
    }
}

impl Receiver {
    async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let received = Arc::new(Mutex::new(Vec::new()));
        let (kept, count) = (Arc::clone(&received), Arc::new(AtomicUsize::new(0)));
        let served = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, manner, Arc::clone(&kept), Arc::clone(&count)));
            }
        });
        Self { url, received, served }
    }

    fn all(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// Waits until it was asked so often.
    async fn until(&self, count: usize) -> Vec<Received> {
        let deadline = Instant::now() + SOON;
        loop {
            let all = self.all();
            if all.len() >= count {
                return all;
            }
            assert!(Instant::now() < deadline, "{} of {count} came: {all:#?}", all.len());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn serve(mut stream: TcpStream, manner: Manner, kept: Arc<Mutex<Vec<Received>>>, count: Arc<AtomicUsize>) {
    let Some(received) = read(&mut stream).await else { return };
    kept.lock().unwrap().push(received);
    let number = count.fetch_add(1, Ordering::SeqCst);
    let answer = match manner {
        Manner::FailsBefore(takes, answer) if number < takes => answer,
        Manner::Takes | Manner::FailsBefore(..) => "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nthanks\0",
        Manner::Hangs => {
            tokio::time::sleep(Duration::from_secs(600)).await;
            return;
        }
        Manner::Resets => {
            stream.set_zero_linger().unwrap();
            return;
        }
        Manner::Floods => {
            let mut chunk = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
            while stream.write_all(&chunk).await.is_ok() {
                chunk = vec![b'a'; 64 * 1024];
            }
            return;
        }
    };
    drop(stream.write_all(answer.as_bytes()).await);
    drop(stream.shutdown().await);
}

/// One request of HTTP/1.1 with its length; `None` if none came.
async fn read(stream: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let mut lines = head.lines();
            let path = lines.next()?.split(' ').nth(1)?.to_owned();
            let headers: Vec<_> =
                lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
            let length: usize = headers.iter().find(|(name, _)| name == "content-length")?.1.parse().ok()?;
            while bytes.len() < end + 4 + length {
                if stream.read_buf(&mut bytes).await.ok()? == 0 {
                    return None;
                }
            }
            let body = String::from_utf8(bytes[end + 4..end + 4 + length].to_vec()).unwrap();
            return Some(Received { path, headers, body });
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// A service whose operator lets webhooks lead to this machine, and what its tests ask of it.
struct Bench {
    service: Service,
    tenant: String,
}

impl Bench {
    fn start() -> Self {
        Self::with(&[])
    }

    fn with(further: &[&str]) -> Self {
        let service = Service::start_with(&[&OWN[..], further].concat()).unwrap();
        Self { service, tenant: format!("tenant-{}", uuid::Uuid::new_v4().simple()) }
    }

    fn client(&self) -> Client {
        Client::with_scope(self.service.place(), &self.tenant, "webhooks sandboxes:read")
    }

    async fn webhook(&self, url: &str, kinds: &[&str]) -> Value {
        ask(&self.client(), Method::POST, "/v1/webhooks", json!({ "url": url, "kinds": kinds })).await.expect(201)
    }

    /// Something happens that is told of.
    async fn happen(&self, weight: u32) {
        let path = format!("/v1/admin/tenants/{}", self.tenant);
        Client::admin(self.service.place()).patch(&path, &json!({ "weight": weight })).await.expect(200);
    }

    /// The newest deliveries of a webhook, once it is so.
    async fn deliveries(&self, webhook: &Value, is_so: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let path = format!("/v1/webhooks/{}/deliveries", id(webhook));
        let deadline = Instant::now() + SOON;
        loop {
            let page = ask(&self.client(), Method::GET, &path, Value::Null).await.expect(200);
            let items = page["items"].as_array().unwrap();
            if is_so(items) {
                return items.clone();
            }
            assert!(Instant::now() < deadline, "waited in vain: {page:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn ask(client: &Client, method: Method, path: &str, body: Value) -> Answer {
    let mut request = client.request(method.clone(), path);
    if !body.is_null() {
        request = request.json(&body);
    }
    client.send(request, method.as_str(), path).await
}

fn id(object: &Value) -> &str {
    object["id"].as_str().unwrap()
}

/// The signature as a receiver computes it, by another's implementation.
fn signature(secret: &str, received: &Received) -> String {
    let key = BASE64_STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let signed = format!("{}.{}.{}", received.header("webhook-id"), received.header("webhook-timestamp"), received.body);
    let mut openssl = Command::new("openssl")
        .args(["dgst", "-sha256", "-mac", "HMAC", "-binary", "-macopt"])
        .arg(format!("hexkey:{hex}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    openssl.stdin.take().unwrap().write_all(signed.as_bytes()).unwrap();
    format!("v1,{}", BASE64_STANDARD.encode(openssl.wait_with_output().unwrap().stdout))
}

#[tokio::test]
async fn what_happens_is_sent_once_and_signed() {
    let (bench, receiver) = (Bench::start(), Receiver::start(Manner::Takes).await);
    // The tenant is there from its first request on.
    bench.client().get("/v1/events").await.expect(200);
    bench.happen(1).await;
    let webhook = bench.webhook(&receiver.url, &["tenant.*"]).await;

    for weight in [2, 3] {
        bench.happen(weight).await;
    }

    let all = receiver.until(2).await;
    let deliveries = bench.deliveries(&webhook, |items| items.len() == 2 && items.iter().all(|item| item["state"] == "delivered")).await;
    let mut weights: Vec<_> = all.iter().map(|received| received.json()["data"]["data"]["weight"].as_u64().unwrap()).collect();
    weights.sort_unstable();
    // What was before it was made does not concern it.
    assert_eq!(weights, [2, 3]);
    for received in &all {
        assert_eq!((received.path.as_str(), received.header("content-type")), ("/hook", "application/json"));
        assert_eq!(received.header("webhook-signature"), signature(webhook["secret"].as_str().unwrap(), received));
        let sent_at: u64 = received.header("webhook-timestamp").parse().unwrap();
        assert!(token::now_unix_s().abs_diff(sent_at) < 60);
        let (body, told) = (received.json(), received.json()["data"].clone());
        assert_eq!((&body["type"], &body["timestamp"]), (&json!("tenant.changed"), &told["at"]));
        // The same object as in the list of events.
        let listed = bench.client().get("/v1/events?kind=tenant.changed").await.expect(200);
        assert!(listed["items"].as_array().unwrap().contains(&told), "{told:#} is not in {listed:#}");
    }
    let attempt = &deliveries[0]["attempts"][0];
    assert_eq!((&attempt["number"], &attempt["status"], &attempt["error"]), (&json!(1), &json!(200), &Value::Null));
    assert!(attempt["ms"].is_u64() && attempt["at"].is_string());
    // A NUL is nothing that Postgres keeps.
    assert_eq!(deliveries[0]["response"], "thanks\u{fffd}");
    let path = format!("/v1/webhooks/{}/deliveries/{}", id(&webhook), id(&deliveries[0]));
    assert_eq!(ask(&bench.client(), Method::GET, &path, Value::Null).await.expect(200), deliveries[0]);
}

#[tokio::test]
async fn what_is_not_taken_is_sent_again_until_it_is() {
    let bench = Bench::start();
    for (answer, status) in [
        ("HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", json!(500)),
        ("HTTP/1.1 302 There\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", json!(302)),
        ("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", json!(404)),
        ("nonsense\r\n\r\n", Value::Null),
        ("", Value::Null),
    ] {
        let receiver = Receiver::start(Manner::FailsBefore(2, answer)).await;
        let webhook = bench.webhook(&receiver.url, &["tenant.changed"]).await;
        bench.happen(7).await;

        let all = receiver.until(3).await;
        let deliveries = bench.deliveries(&webhook, |items| items.len() == 1 && items[0]["state"] == "delivered").await;

        let ids: Vec<_> = all.iter().map(|received| received.header("webhook-id")).collect();
        assert_eq!(ids, [id(&deliveries[0]); 3]);
        assert!(all.iter().all(|received| received.body == all[0].body));
        let attempts = deliveries[0]["attempts"].as_array().unwrap();
        let statuses: Vec<_> = attempts.iter().map(|attempt| attempt["status"].clone()).collect();
        assert_eq!(statuses, [status.clone(), status, json!(200)]);
        assert!(attempts[0]["error"].is_string() && attempts[2]["error"].is_null());
        let path = format!("/v1/webhooks/{}", id(&webhook));
        assert_eq!(ask(&bench.client(), Method::GET, &path, Value::Null).await.expect(200)["failing_since"], Value::Null);
        assert_eq!(ask(&bench.client(), Method::DELETE, &path, Value::Null).await.status, 204);
    }
}

#[tokio::test]
async fn a_slow_or_rude_receiver_holds_nobody_up() {
    let bench = Bench::start();
    let (hanging, resetting, flooding) =
        (Receiver::start(Manner::Hangs).await, Receiver::start(Manner::Resets).await, Receiver::start(Manner::Floods).await);
    let good = Receiver::start(Manner::Takes).await;
    let mut hooks = Vec::new();
    for receiver in [&hanging, &resetting, &flooding, &good] {
        hooks.push(bench.webhook(&receiver.url, &["tenant.changed"]).await);
    }

    for weight in 1..=8 {
        bench.happen(weight).await;
    }

    good.until(8).await;
    let flooded = bench.deliveries(&hooks[2], |items| items.iter().any(|item| item["state"] == "delivered")).await;
    let taken = flooded.iter().find(|item| item["state"] == "delivered").unwrap();
    assert_eq!(taken["response"].as_str().unwrap().len(), 1024);
    let reset = bench.deliveries(&hooks[1], |items| items.iter().any(|item| !item["attempts"].as_array().unwrap().is_empty())).await;
    let failed = reset.iter().find_map(|item| item["attempts"].as_array().unwrap().first().cloned()).unwrap();
    assert_eq!((&failed["status"], failed["error"].is_string()), (&Value::Null, true));
    let late = bench.deliveries(&hooks[0], |items| items.iter().any(|item| !item["attempts"].as_array().unwrap().is_empty())).await;
    let error = late.iter().find_map(|item| item["attempts"][0]["error"].as_str()).unwrap().to_owned();
    assert!(error.contains("no answer within 15 s"), "{error}");
    // So many at a time, however many wait.
    assert!(hanging.all().len() <= 8, "{}", hanging.all().len());
}

#[tokio::test]
async fn a_service_that_dies_before_it_notes_an_answer_sends_it_again_under_the_same_id() {
    let receiver = Receiver::start(Manner::Takes).await;
    let mut bench = Bench::start();
    let webhook = bench.webhook(&receiver.url, &["tenant.changed"]).await;
    bench.service.stop().unwrap();
    bench.service.arm("service.webhook.sent=return");
    bench.service.start_again().unwrap();
    // Its answer may get lost with the service.
    let admin = Client::admin(bench.service.place());
    let path = format!("/v1/admin/tenants/{}", bench.tenant);
    drop(admin.try_send(admin.request(Method::PATCH, &path).json(&json!({ "weight": 9 })), "PATCH", &path).await);
    receiver.until(1).await;
    bench.service.wait().unwrap();

    bench.service.arm("");
    bench.service.start_again().unwrap();
    // The attempt is the dead one's for a minute.
    let database = mayfly_tests::database::Database::of(&bench.service.place().data_dir).unwrap();
    let held = database.ask("select next_at > now() as is_held, attempt_count from webhook_deliveries").unwrap();
    assert_eq!(held, [json!({ "is_held": true, "attempt_count": 1 })]);
    let deadline = Instant::now() + Duration::from_secs(100);
    while receiver.all().len() < 2 {
        assert!(Instant::now() < deadline, "nobody took it up");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let deliveries = bench.deliveries(&webhook, |items| items.len() == 1 && items[0]["state"] == "delivered").await;
    let all = receiver.all();
    assert_eq!(all[0].header("webhook-id"), all[1].header("webhook-id"));
    assert_eq!((&deliveries[0]["attempt_count"], deliveries[0]["attempts"].as_array().unwrap().len()), (&json!(2), 1));
}

#[tokio::test]
async fn nodes_share_the_work_and_do_none_of_it_twice() {
    let database = Database::start();
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "0123456789abcdef0123456789abcdef").unwrap();
    std::fs::set_permissions(key.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let arguments = ["--database-url", &database.url, "--webhook-key-file", key.path().to_str().unwrap()];
    let (bench, other) = (Bench::with(&arguments), Bench::with(&arguments));
    let receiver = Receiver::start(Manner::Takes).await;
    let webhook = bench.webhook(&receiver.url, &["tenant.changed"]).await;

    for weight in 1..=50 {
        let node = if weight % 2 == 0 { &bench } else { &other };
        let path = format!("/v1/admin/tenants/{}", bench.tenant);
        Client::admin(node.service.place()).patch(&path, &json!({ "weight": weight })).await.expect(200);
    }

    let all = receiver.until(50).await;
    let mut weights: Vec<_> = all.iter().map(|received| received.json()["data"]["data"]["weight"].as_u64().unwrap()).collect();
    weights.sort_unstable();
    assert_eq!(weights, (1..=50).collect::<Vec<u64>>());
    assert_eq!(all[49].header("webhook-signature"), signature(webhook["secret"].as_str().unwrap(), &all[49]));
}

#[tokio::test]
async fn a_secret_is_changed_without_a_gap() {
    let (bench, receiver) = (Bench::start(), Receiver::start(Manner::Takes).await);
    let client = bench.client();
    let webhook = bench.webhook(&receiver.url, &["tenant.changed"]).await;
    let path = format!("/v1/webhooks/{}/rotate-secret", id(&webhook));
    let keyed = async || {
        let request = client.request(Method::POST, &path).header("idempotency-key", "once").json(&json!({}));
        client.send(request, "POST", &path).await
    };

    let rotated = keyed().await;
    let again = keyed().await;
    bench.happen(1).await;

    let received = receiver.until(1).await[0].clone();
    // The same answer, with the secret that is kept nowhere.
    assert_eq!((again.header("idempotency-replayed"), &again.text), ("true", &rotated.text));
    let rotated = rotated.expect(200);
    assert_eq!(rotated["secret_version"], 2);
    let (new, old) = (rotated["secret"].as_str().unwrap(), webhook["secret"].as_str().unwrap());
    assert_ne!(new, old);
    assert_eq!(received.header("webhook-signature"), format!("{} {}", signature(new, &received), signature(old, &received)));
    // At once, for one that is known to others.
    let last = ask(&client, Method::POST, &path, json!({ "overlap_s": 0 })).await.expect(200);
    bench.happen(2).await;
    let received = receiver.until(2).await[1].clone();
    assert_eq!(received.header("webhook-signature"), signature(last["secret"].as_str().unwrap(), &received));
    // No row and no page tells a secret again.
    let shown = ask(&client, Method::GET, &format!("/v1/webhooks/{}", id(&webhook)), Value::Null).await.text;
    let database = mayfly_tests::database::Database::of(&bench.service.place().data_dir).unwrap();
    let kept =
        ["webhooks", "webhook_deliveries", "events"].map(|table| format!("{:?}", database.ask(&format!("select * from {table}")).unwrap()));
    let answers = database.ask("select convert_from(answer, 'UTF8') as answer from idempotency_keys").unwrap();
    let all = format!("{shown} {kept:?} {answers:?} {}", bench.service.log());
    for secret in [old, new] {
        assert!(!all.contains(secret.trim_start_matches("whsec_")), "{all}");
    }
    assert!(format!("{answers:?}").contains("whsec_"), "the answer was kept at all: {answers:?}");
}

#[tokio::test]
async fn a_webhook_is_changed_tested_sent_again_and_removed() {
    let (bench, receiver) = (Bench::start(), Receiver::start(Manner::Takes).await);
    let client = bench.client();
    let webhook = bench.webhook("http://127.0.0.1:9999/nobody", &["image.*"]).await;
    let path = format!("/v1/webhooks/{}", id(&webhook));

    let change = json!({ "url": receiver.url, "kinds": ["tenant.changed"], "description": "ours", "active": false });
    let changed = ask(&client, Method::PATCH, &path, change).await.expect(200);
    assert_eq!((&changed["url"], &changed["description"], &changed["active"]), (&json!(receiver.url), &json!("ours"), &json!(false)));
    bench.happen(1).await;
    // A test comes through, whether or not anything else does.
    let test = ask(&client, Method::POST, &format!("{path}/test"), json!({})).await.expect(202);
    let received = receiver.until(1).await[0].clone();
    assert_eq!((received.header("webhook-id"), &received.json()["type"]), (id(&test), &json!("webhook.test")));
    ask(&client, Method::PATCH, &path, json!({ "active": true })).await.expect(200);
    bench.happen(2).await;
    let received = receiver.until(2).await[1].clone();
    assert_eq!(received.json()["data"]["data"]["weight"], 2);

    let deliveries = bench.deliveries(&webhook, |items| items.len() == 2 && items.iter().all(|item| item["state"] == "delivered")).await;
    let again = format!("{path}/deliveries/{}/redeliver", id(&deliveries[0]));
    assert_eq!(ask(&client, Method::POST, &again, json!({})).await.expect(202)["state"], "pending");
    let third = receiver.until(3).await[2].clone();
    assert_eq!((third.header("webhook-id"), &third.body), (received.header("webhook-id"), &received.body));
    let of_state = ask(&client, Method::GET, &format!("{path}/deliveries?state=failed"), Value::Null).await.expect(200);
    assert_eq!(of_state["items"], json!([]));

    assert_eq!(ask(&client, Method::DELETE, &path, Value::Null).await.status, 204);
    bench.happen(3).await;
    for (method, path) in [(Method::GET, path.clone()), (Method::DELETE, path.clone()), (Method::GET, format!("{path}/deliveries"))] {
        ask(&client, method, &path, Value::Null).await.problem(404, "not_found");
    }
    ask(&client, Method::POST, &again, json!({})).await.problem(404, "not_found");
    let kinds = client.get("/v1/events?kind=webhook.*").await.expect(200);
    let kinds: Vec<_> = kinds["items"].as_array().unwrap().iter().map(|event| event["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["webhook.deleted", "webhook.changed", "webhook.changed", "webhook.created"]);
    assert_eq!(receiver.all().len(), 3);
}

/// The control of the next: with the address allowed, the same is delivered.
#[tokio::test]
async fn targets_that_are_not_public_are_refused_when_given_and_when_tried() {
    let receiver = Receiver::start(Manner::Takes).await;
    let port = receiver.url.rsplit_once(':').unwrap().1.trim_end_matches("/hook").to_owned();
    let (allowed, closed) = (Bench::start(), {
        let service = Service::start_with(&["--webhook-http", "true", "--webhook-retry-s", "1"]).unwrap();
        Bench { service, tenant: format!("tenant-{}", uuid::Uuid::new_v4().simple()) }
    });

    // Literals, in whatever spelling, at once.
    for host in [
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "10.0.0.1",
        "0.0.0.0",
        "[fd00:ec2::254]",
    ] {
        let url = format!("http://{host}:{port}/hook");
        let problem = ask(&closed.client(), Method::POST, "/v1/webhooks", json!({ "url": url })).await.problem(422, "invalid_request");
        assert_eq!(problem["field"], "url", "{url}");
    }
    // Names when they are looked up, each time.
    let named = format!("http://localhost:{port}/hook");
    let refused = closed.webhook(&named, &["tenant.changed"]).await;
    closed.happen(1).await;
    let deliveries = closed.deliveries(&refused, |items| items.len() == 1 && items[0]["attempts"].as_array().unwrap().len() >= 2).await;
    for attempt in deliveries[0]["attempts"].as_array().unwrap() {
        assert_eq!((&attempt["status"], &attempt["error"]), (&Value::Null, &json!("the target's address is not a public one")));
    }
    assert!(receiver.all().is_empty());

    let control = allowed.webhook(&named, &["tenant.changed"]).await;
    allowed.happen(1).await;
    receiver.until(1).await;
    allowed.deliveries(&control, |items| items.len() == 1 && items[0]["state"] == "delivered").await;
}

#[tokio::test]
async fn a_permission_that_is_taken_back_holds_for_what_was_made_before() {
    let receiver = Receiver::start(Manner::FailsBefore(1, "HTTP/1.1 503 Later\r\ncontent-length: 0\r\n\r\n")).await;
    let mut bench = Bench::start();
    let webhook = bench.webhook(&receiver.url, &["tenant.changed"]).await;
    bench.service.stop().unwrap();
    bench.service.set_arguments(&["--webhook-allow", "10.0.0.0/8", "--webhook-http", "true", "--webhook-retry-s", "1"]);
    bench.service.start_again().unwrap();

    bench.happen(1).await;

    let deliveries = bench.deliveries(&webhook, |items| items.len() == 1 && !items[0]["attempts"].as_array().unwrap().is_empty()).await;
    assert_eq!(deliveries[0]["attempts"][0]["error"], "the target's address is not a public one");
    assert!(receiver.all().is_empty());
}

#[tokio::test]
async fn no_proxy_of_the_environment_is_asked() {
    let (proxy, receiver) = (Receiver::start(Manner::Takes).await, Receiver::start(Manner::Takes).await);
    let mut bench = Bench::start();
    bench.service.stop().unwrap();
    bench.service.set_environment("http_proxy", proxy.url.trim_end_matches("/hook"));
    bench.service.start_again().unwrap();
    bench.webhook(&receiver.url, &["tenant.changed"]).await;

    bench.happen(1).await;

    receiver.until(1).await;
    assert!(proxy.all().is_empty());
}

#[tokio::test]
async fn tls_is_checked_against_the_authorities_that_are_named() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), certified.cert.pem()).unwrap();
    std::fs::set_permissions(ca.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let (key, cert) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(key.path(), certified.signing_key.serialize_pem()).unwrap();
    std::fs::write(cert.path(), certified.cert.pem()).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut server = Command::new("openssl")
        .args(["s_server", "-quiet", "-accept", &format!("127.0.0.1:{port}"), "-cert"])
        .arg(cert.path())
        .arg("-key")
        .arg(key.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It passes on what it hears, and says what it is told: an answer, once somebody has asked.
    let (mut said, mut asked) = (server.stdin.take().unwrap(), server.stdout.take().unwrap());
    let answering = std::thread::spawn(move || {
        asked.read_exact(&mut [0; 4]).unwrap();
        said.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        said
    });
    let url = format!("https://localhost:{port}/");
    let (trusting, other) = (Bench::with(&["--webhook-ca-file", ca.path().to_str().unwrap()]), Bench::start());

    let mut attempts = Vec::new();
    for bench in [&trusting, &other] {
        let webhook = bench.webhook(&url, &["tenant.changed"]).await;
        bench.happen(1).await;
        let items = bench.deliveries(&webhook, |items| items.len() == 1 && !items[0]["attempts"].as_array().unwrap().is_empty()).await;
        attempts.push(items[0]["attempts"][0].clone());
    }

    server.kill().unwrap();
    server.wait().unwrap();
    answering.join().unwrap();
    assert_eq!(attempts[0]["status"], 204, "{attempts:#?}");
    assert!(attempts[1]["status"].is_null() && attempts[1]["error"].as_str().unwrap().contains("certificate"), "{attempts:#?}");
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_its_field() {
    let place = shared().place;
    let client = Client::with_scope(&place, "hooked", "webhooks");
    for (body, field) in [
        (json!({}), "url"),
        (json!({ "url": "https://a.example/", "secret": "mine" }), "secret"),
        (json!({ "url": "http://a.example/" }), "url"),
        (json!({ "url": "https://me:pw@a.example/" }), "url"),
        (json!({ "url": "https://a.example:22/" }), "url"),
        (json!({ "url": "https://a.example/\u{0}", "kinds": ["x"] }), "kinds[0]"),
        (json!({ "url": format!("https://a.example/{}", "a".repeat(4097)) }), "url"),
        (json!({ "url": "https://a.example/", "kinds": vec!["a.b"; 33] }), "kinds"),
        (json!({ "url": "https://a.example/", "description": "a\u{0}b" }), "description"),
        (json!({ "url": "https://a.example/", "description": "a".repeat(257) }), "description"),
    ] {
        let problem = ask(&client, Method::POST, "/v1/webhooks", body.clone()).await.problem(422, "invalid_request");
        assert_eq!(problem["field"], field, "{body}");
    }
    let made = ask(&client, Method::POST, "/v1/webhooks", json!({ "url": "https://a.example/" })).await.expect(201);
    let path = format!("/v1/webhooks/{}", id(&made));
    let over = ask(&client, Method::POST, &format!("{path}/rotate-secret"), json!({ "overlap_s": 604_801 })).await;
    assert_eq!(over.problem(422, "invalid_request")["field"], "overlap_s");
    for (method, path) in [(Method::GET, "/v1/webhooks/none".to_owned()), (Method::GET, format!("{path}/deliveries/none"))] {
        ask(&client, method, &path, Value::Null).await.problem(404, "not_found");
    }
    // Another tenant's is none.
    let other = Client::with_scope(&place, "another", "webhooks");
    for (method, path, body) in [
        (Method::GET, path.clone(), Value::Null),
        (Method::PATCH, path.clone(), json!({ "active": false })),
        (Method::DELETE, path.clone(), Value::Null),
        (Method::POST, format!("{path}/rotate-secret"), json!({})),
        (Method::POST, format!("{path}/test"), json!({})),
        (Method::GET, format!("{path}/deliveries"), Value::Null),
    ] {
        ask(&other, method, &path, body).await.problem(404, "not_found");
    }
    let stranger = Client::with_scope(&place, "hooked", "sandboxes:write sandboxes:read runs");
    ask(&stranger, Method::GET, "/v1/webhooks", Value::Null).await.problem(403, "forbidden");
    assert_eq!(ask(&client, Method::DELETE, &path, Value::Null).await.status, 204);
}

#[tokio::test]
async fn webhooks_are_counted_and_listed_in_pages() {
    let place = shared().place;
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let quotas = json!({ "id": tenant, "quotas": { "webhooks": 3 } });
    Client::admin(&place).post("/v1/admin/tenants", &quotas).await.expect(201);
    let client = Client::with_scope(&place, &tenant, "webhooks");
    let create = async |key: &str| {
        let request = client.request(Method::POST, "/v1/webhooks").header("idempotency-key", key);
        client.send(request.json(&json!({ "url": "https://a.example/" })), "POST", "/v1/webhooks").await
    };
    let first = create("one").await;
    // With the same key it is the same one, secret and all.
    assert_eq!(create("one").await.text, first.text);
    create("two").await.expect(201);
    create("three").await.expect(201);

    let refused = create("four").await.problem(429, "quota_exceeded");
    let page = ask(&client, Method::GET, "/v1/webhooks?limit=2", Value::Null).await.expect(200);
    let rest = format!("/v1/webhooks?limit=2&cursor={}", page["next_cursor"].as_str().unwrap());
    let rest = ask(&client, Method::GET, &rest, Value::Null).await.expect(200);

    assert_eq!((&refused["quota"], &refused["limit"], &refused["used"]), (&json!("webhooks"), &json!(3), &json!(3)));
    assert_eq!((page["items"].as_array().unwrap().len(), rest["items"].as_array().unwrap().len()), (2, 1));
    assert_eq!(rest["next_cursor"], Value::Null);
    assert!(page["items"][0].get("secret").is_none());
    let first = first.expect(201);
    assert_eq!(ask(&client, Method::DELETE, &format!("/v1/webhooks/{}", id(&first)), Value::Null).await.status, 204);
    create("five").await.expect(201);
}
