//! Two nodes on one database: each answers for what lives on the other, as if it lived on itself, and for nobody who may not ask.
//!
//! What is meant to be on a node is made there by a request that is not passed on: it says that it came from a node, as anybody may.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    time::{Duration, Instant},
};

use mayfly_tests::{
    Answer, Client, Service, host,
    outcome::{assert_exit, assert_reason, stdout},
    postgres::Database,
    service::{Place, free_port},
    stream, token,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Long enough to notice by, and for a loaded machine.
const SOON: Duration = Duration::from_secs(30);
/// A lease as short as it may be: nobody need wait for long.
const LEASE_S: &str = "2";
const TENANT: &str = "traveller";

/// A node that others reach, which takes the tokens that `tokens_of` takes, or else its own.
fn node(database: &Database, tokens_of: Option<&Service>, more: &[&str]) -> Service {
    Service::start_node(&database.url, tokens_of, &[&["--node-lease-s", LEASE_S], more].concat())
}

/// Two nodes that take the same tokens.
fn pair(database: &Database) -> (Service, Service) {
    let first = node(database, None, &[]);
    let second = node(database, Some(&first), &[]);
    (first, second)
}

fn client(service: &Service) -> Client {
    Client::of(service.place(), TENANT)
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

/// The whole machine, as far as it is this node's.
fn kill_machine(node: &mut Service) {
    let keeper = node.place().keeper_pid();
    node.kill();
    signal(keeper, Signal::SIGKILL);
}

/// Asks this node, which passes nothing on.
async fn at(client: &Client, method: Method, path: &str, body: &Value) -> Answer {
    let request = client.request(method.clone(), path).header("mayfly-forwarded", "me").json(body);
    client.send(request, method.as_str(), path).await
}

/// A sandbox on this node that runs this script, once it runs.
async fn sandbox_on(node: &Service, script: &str) -> String {
    let asked = json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": { "cpu_millis": 500 } });
    made_on(node, &asked).await
}

async fn made_on(node: &Service, asked: &Value) -> String {
    let made = at(&client(node), Method::POST, "/v1/sandboxes", asked).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    client(node).until(&path, |sandbox| sandbox["state"] == "running").await;
    path
}

/// What this node has counted of requests that were another's.
async fn forwarded(place: &Place, outcome: &str) -> f64 {
    let text = reqwest::get(format!("{}/metrics", place.metrics_url)).await.unwrap().text().await.unwrap();
    let series = format!("mayfly_forwarded_requests_total{{outcome=\"{outcome}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_else(|| panic!("{series} in {text}")).parse().unwrap()
}

fn sum(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[tokio::test]
async fn a_sandbox_is_used_and_ruled_by_way_of_the_other_node() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let path = sandbox_on(&second, "echo begun; exec sleep 1000").await;
    let other = client(&first);

    // The control: what nobody passes on is refused, as ever.
    at(&other, Method::POST, &format!("{path}/pause"), &json!({})).await.problem(503, "keeper_unavailable");
    assert_eq!(forwarded(first.place(), "answered").await, 0.0);

    let ran = other.post(&format!("{path}/execs"), &json!({ "command": ["sh", "-c", "cat; exit 3"], "stdin": "given" })).await.expect(200);
    assert_exit(&ran, 3);
    assert_eq!(stdout(&ran), "given");
    let stats = other.get(&format!("{path}/stats")).await.expect(200);
    assert!(stats["memory"]["usage_bytes"].as_u64().is_some(), "{stats:#}");
    assert!(other.get(&format!("{path}/top")).await.expect(200).to_string().contains("sleep"));
    assert_eq!(other.post(&format!("{path}/pause"), &json!({})).await.expect(200)["state"], "paused");
    assert_eq!(other.post(&format!("{path}/resume"), &json!({})).await.expect(200)["state"], "running");
    let changed = other.patch(&path, &json!({ "limits": { "memory_bytes": 50 << 20 } })).await.expect(200);
    assert_eq!(changed["limits"]["memory_bytes"], 50 << 20);
    assert_eq!(other.post(&format!("{path}/kill"), &json!({ "signal": "WINCH" })).await.expect(200)["id"], changed["id"]);
    let stopped = other.post(&format!("{path}/stop"), &json!({ "grace_ms": 100 })).await.expect(200);
    assert!(stopped["state"] == "exited", "{stopped:#}");
    assert_eq!(other.delete(&path).await.status, 204);
    client(&second).get(&path).await.problem(404, "not_found");
    assert!(forwarded(first.place(), "answered").await >= 8.0);
    assert_eq!(forwarded(second.place(), "answered").await, 0.0);
}

#[tokio::test]
async fn files_of_any_size_go_in_and_out_by_way_of_the_other_node() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let asked =
        json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "disk_bytes": 512 << 20, "memory_bytes": 768 << 20 } });
    let path = made_on(&second, &asked).await;
    let other = client(&first);
    let content: Vec<u8> = (0..48_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();

    // As one piece of a known size, and as many of which nobody knows how many there are.
    let at = |name: &str| format!("{path}/files/tmp/{name}");
    let put = other.send(other.request(Method::PUT, &at("whole")).body(content.clone()), "PUT", &at("whole")).await.expect(200);
    let pieces: Vec<_> = content.chunks(100_000).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    other.send(other.request(Method::PUT, &at("pieces")).body(body), "PUT", &at("pieces")).await.expect(200);
    let inside = other.post(&format!("{path}/execs"), &json!({ "command": ["sha256sum", "/tmp/whole", "/tmp/pieces"] })).await.expect(200);
    let back = other.request(Method::GET, &at("pieces")).send().await.unwrap();
    let length = back.content_length();
    let back = back.bytes().await.unwrap();
    let part = other.request(Method::GET, &at("whole")).header("range", "bytes=5-9").send().await.unwrap();

    assert_eq!(put["size_bytes"], content.len());
    assert_eq!(stdout(&inside), format!("{0}  /tmp/whole\n{0}  /tmp/pieces\n", sum(&content)));
    assert_eq!((length, sum(&back)), (Some(content.len() as u64), sum(&content)));
    assert_eq!((part.status().as_u16(), part.bytes().await.unwrap().as_ref()), (206, &content[5..10]));

    let archive = other.request(Method::GET, &format!("{path}/archive?path=/tmp")).send().await.unwrap();
    assert_eq!(archive.status(), 200);
    let archive = archive.bytes().await.unwrap();
    other.post(&format!("{path}/execs"), &json!({ "command": ["mkdir", "/copy"] })).await.expect(200);
    let unpack = format!("{path}/archive?path=/copy");
    let unpacked = other.request(Method::PUT, &unpack).header("content-type", "application/x-tar").body(archive).send().await.unwrap();
    assert!(unpacked.status().is_success(), "{}", unpacked.text().await.unwrap());
    let found = other
        .post(&format!("{path}/execs"), &json!({ "command": ["sh", "-c", "sha256sum < $(find /copy -name whole)"] }))
        .await
        .expect(200);
    assert_eq!(stdout(&found), format!("{}  -\n", sum(&content)));
    assert!(forwarded(first.place(), "answered").await >= 7.0);
}

#[tokio::test]
async fn who_may_not_ask_a_node_may_not_ask_it_by_way_of_another() {
    let database = Database::start();
    let first = node(&database, None, &[]);
    // It takes other tokens than the first.
    let second = node(&database, None, &[]);
    let path = sandbox_on(&second, "exec sleep 1000").await;
    let run = json!({ "command": ["true"] });
    let execs = format!("{path}/execs");

    let of_first_alone = client(&first).post(&execs, &run).await;
    let stranger = Client::of(first.place(), "stranger");
    let strange: Vec<u16> =
        [stranger.get(&path).await.status, stranger.post(&execs, &run).await.status, stranger.delete(&path).await.status].into();
    let strange_there = Client::of(second.place(), "stranger").post(&execs, &run).await;
    let nobody = Client::with_token(first.place(), None).post(&execs, &run).await;
    let before = forwarded(first.place(), "answered").await;
    let of_second_alone = Client::with_token(first.place(), client(&second).token().map(ToOwned::to_owned)).post(&execs, &run).await;

    // The first takes the token and passes it on, and the second does not take the first one's word for it.
    assert!(of_first_alone.problem(401, "unauthenticated")["request_id"].is_string());
    assert_eq!(before, 1.0, "only what a tenant's own sandbox needs goes on");
    of_second_alone.problem(401, "unauthenticated");
    assert_eq!(strange, [404; 3]);
    strange_there.problem(404, "not_found");
    nobody.problem(401, "unauthenticated");
    assert_eq!(forwarded(first.place(), "answered").await, 1.0);
    // The control: the second takes its own.
    assert_exit(&client(&second).post(&execs, &run).await.expect(200), 0);
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_told_of_at_once_and_one_that_died_until_its_sandboxes_are_settled() {
    let database = Database::start();
    let (first, mut second) = pair(&database);
    let path = sandbox_on(&second, "exec sleep 1000").await;
    let other = client(&first);
    other.get(&format!("{path}/stats")).await.expect(200);

    kill_machine(&mut second);
    let began = Instant::now();
    let refused = other.post(&format!("{path}/execs"), &json!({ "command": ["true"] })).await;
    let took = began.elapsed();

    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(refused.problem(503, "node_unavailable")["retryable"], true);
    assert!(took < Duration::from_secs(5), "{took:?}");
    // Those who are left tell how it ended, and what they know of it.
    let ended = other.until(&path, |sandbox| !sandbox["outcome"].is_null()).await;
    assert_reason(&ended, "infra_error");
    other.post(&format!("{path}/pause"), &json!({})).await.problem(409, "wrong_state");
    assert_eq!(other.delete(&path).await.status, 204);
}

#[tokio::test]
async fn without_an_address_for_the_others_a_node_answers_for_its_own_alone() {
    let database = Database::start();
    let first = node(&database, None, &[]);
    let secret = first.place().secret_file().display().to_string();
    let alone =
        Service::start_as(&["--database-url", &database.url, "--node-lease-s", LEASE_S, "--jwt-secret-file", &secret], Some(&first));
    let (here, there) = (sandbox_on(&first, "exec sleep 1000").await, sandbox_on(&alone, "exec sleep 1000").await);

    client(&alone).post(&format!("{here}/pause"), &json!({})).await.problem(503, "keeper_unavailable");
    client(&first).post(&format!("{there}/pause"), &json!({})).await.problem(503, "keeper_unavailable");
    assert_eq!(forwarded(first.place(), "answered").await, 0.0);
    // What stands in the database either tells.
    assert_eq!(client(&alone).get(&here).await.expect(200)["state"], "running");
}

#[tokio::test]
async fn streams_of_every_form_come_by_way_of_the_other_node() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let other = client(&first);
    let open = json!({ "image": "busybox", "command": ["sh", "-c", "while read -r line; do echo \"<$line>\"; [ \"$line\" = end ] && exit 7; done"],
        "stdin_open": true, "limits": { "cpu_millis": 500 } });
    let path = made_on(&second, &open).await;
    let id = path.rsplit('/').next().unwrap();

    // Begun before there is anything, in three forms.
    let mut followed = other.follow(id, "from=0").await;
    let events = other.request(Method::GET, &format!("{path}/logs")).header("accept", "text/event-stream").send().await.unwrap();
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    let mut attached = other.attach(&format!("{path}/attach")).await;
    attached.send(&json!({ "stdin": "one\n" })).await.unwrap();
    attached.until(|seen| seen.log.stdout_text() == "<one>\n").await;
    assert_eq!(followed.next().await.unwrap()["data"], "<one>\n", "it comes as it is written, not at the end");
    attached.send(&json!({ "stdin": "end\n" })).await.unwrap();
    let seen = attached.collect_attached().await;
    let rest = followed.collect().await;
    let events = events.text().await.unwrap();
    let lines = other.get(&format!("{path}/logs")).await.text;

    assert_eq!(seen.log.end.as_ref().unwrap()["exit_code"], 7);
    assert_eq!((rest.stdout_text().as_str(), &rest.end), ("<end>\n", &seen.log.end));
    assert!(events.contains("<one>") && events.contains("\"end\""), "{events}");
    assert!(lines.contains("<one>") && lines.trim_end().lines().last().unwrap().contains("\"end\""), "{lines}");
    // And the whole of what the node alone has, long after.
    let flood = other.post("/v1/runs", &json!({ "image": "busybox", "command": ["sh", "-c", "flood 300000"] })).await.expect(200);
    let by_first = other.log(flood["id"].as_str().unwrap()).await;
    let by_second = client(&second).log(flood["id"].as_str().unwrap()).await;
    assert_eq!((by_first.stdout.len(), by_first.gaps.len()), (300_000, 0));
    assert_eq!(by_first, by_second);
}

#[tokio::test]
async fn a_stream_from_a_node_that_dies_ends_at_once_and_not_as_if_it_were_whole() {
    let database = Database::start();
    let (first, mut second) = pair(&database);
    let path = sandbox_on(&second, "echo begun; exec sleep 1000").await;
    let other = client(&first);
    let mut by_hand = other.get_by_hand(&format!("{path}/logs"), "accept: application/x-ndjson\r\n").await;
    let head = stream::read_until(&mut by_hand, "begun").await;
    let mut socket = other.follow(path.rsplit('/').next().unwrap(), "from=0").await;
    assert_eq!(socket.next().await.unwrap()["data"], "begun\n");

    let began = Instant::now();
    kill_machine(&mut second);
    let rest = stream::read_to_end(&mut by_hand).await;
    let closed = socket.closed().await;
    let took = began.elapsed();

    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    // The last chunk, which says that all is there, never came (RFC 9112, 7.1).
    assert!(!rest.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&rest));
    assert_eq!(closed, None);
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// It hears nothing and says nothing, and its connections stay open: nobody tells that it is gone but its lease.
#[tokio::test]
async fn a_node_that_hangs_is_not_waited_for_longer_than_its_lease() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let path = sandbox_on(&second, "echo begun; exec sleep 1000").await;
    let other = client(&first);
    let mut by_hand = other.get_by_hand(&format!("{path}/logs"), "accept: application/x-ndjson\r\n").await;
    stream::read_until(&mut by_hand, "begun").await;

    signal(second.place().pid, Signal::SIGSTOP);
    let began = Instant::now();
    let refused = other.post(&format!("{path}/execs"), &json!({ "command": ["true"] })).await;
    let rest = stream::read_to_end(&mut by_hand).await;
    let took = began.elapsed();
    signal(second.place().pid, Signal::SIGCONT);

    refused.problem(503, "node_unavailable");
    assert!(!rest.ends_with(b"0\r\n\r\n") && took < SOON, "{took:?}");
}

#[tokio::test]
async fn a_reader_who_takes_nothing_holds_up_nobody_else() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let asked =
        json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "disk_bytes": 256 << 20, "memory_bytes": 512 << 20 } });
    let path = made_on(&second, &asked).await;
    let other = client(&first);
    other.post(&format!("{path}/execs"), &json!({ "command": ["sh", "-c", "head -c 100000000 /dev/zero > /tmp/large"] })).await.expect(200);

    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut stream = other.get_by_hand(&format!("{path}/files/tmp/large"), "").await;
        stream::read_until(&mut stream, "200 OK").await;
        idle.push(stream);
    }
    let memory = || host::status_field(first.place().pid, "VmRSS").unwrap();
    let kib = |text: &str| text.split_whitespace().next().unwrap().parse::<u64>().unwrap();
    let before = kib(&memory());
    for _ in 0..20 {
        assert_exit(&other.post(&format!("{path}/execs"), &json!({ "command": ["true"] })).await.expect(200), 0);
    }
    let whole = other.request(Method::GET, &format!("{path}/files/tmp/large")).send().await.unwrap().bytes().await.unwrap();

    assert_eq!(whole.len(), 100_000_000);
    // What they do not take is not held here for them: eight times as much would be seen.
    assert!(kib(&memory()) < before + 100_000, "{before} and {}", memory());
    drop(idle);
}

const SERVER: &str = r#"
import base64, hashlib, http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        told = (self.path + " " + str(len(body)) + " " + self.headers.get("X-Forwarded-Host", "") + " " + str(self.headers.get("Authorization"))).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(told))); self.end_headers(); self.wfile.write(told)
    def do_GET(self):
        self.send_response(101)
        accept = base64.b64encode(hashlib.sha1((self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
        self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept.decode()); self.end_headers()
        self.wfile.write(b"\x81\x05hello")
        self.rfile.read(1); self.close_connection = True
print("ready", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"#;

#[tokio::test]
async fn what_a_sandbox_serves_is_reached_by_way_of_the_other_node() {
    let database = Database::start();
    let (first, second) = pair(&database);
    second.import("python").unwrap();
    let path = made_on(&second, &json!({ "image": "python", "command": ["python3", "-c", SERVER] })).await;
    let other = client(&first);
    let mut log = other.follow(path.rsplit('/').next().unwrap(), "from=0").await;
    assert_eq!(log.next().await.unwrap()["data"], "ready\n");

    let url = format!("{path}/ports/8080/a%2Fb?c=d");
    let answer = other.request(Method::POST, &url).body(vec![b'x'; 3_000_000]).send().await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    let mut socket = other.attach(&format!("{path}/ports/8080/ws")).await;
    let said = socket.next_message().await.unwrap();
    let closed = other.request(Method::GET, &format!("{path}/ports/9/")).send().await.unwrap();

    let host = first.place().url.trim_start_matches("http://");
    assert_eq!((status.as_u16(), text), (200, format!("/a%2Fb?c=d 3000000 {host} None")));
    assert_eq!(said.into_text().unwrap().as_str(), "hello");
    assert_eq!(closed.status(), 502);
}

#[tokio::test]
async fn a_key_has_one_effect_through_whichever_node_it_comes_and_outlives_the_node_that_held_it() {
    let database = Database::start();
    let (first, mut second) = pair(&database);
    let path = sandbox_on(&second, "exec sleep 1000").await;
    let keyed = async |node: &Service, path: &str, key: &str, body: &Value| {
        let client = client(node);
        let request = client.request(Method::POST, path).header("idempotency-key", key).json(body);
        client.send(request, "POST", path).await
    };
    let script = json!({ "command": ["sh", "-c", "echo x >> /tmp/effects; cat /tmp/effects"] });
    let execs = format!("{path}/execs");

    let once = keyed(&first, &execs, "exec", &script).await;
    let again = keyed(&second, &execs, "exec", &script).await;
    let once_more = keyed(&first, &execs, "exec", &script).await;

    assert_eq!(stdout(&once.clone().expect(200)), "x\n");
    for replayed in [again, once_more] {
        assert_eq!((replayed.header("idempotency-replayed"), &replayed.body), ("true", &once.body));
    }

    // Held by a node that dies while it works.
    let run = json!({ "image": "busybox", "command": ["sh", "-c", "exec sleep 30"], "wait_ms": 20_000 });
    let held = {
        let (client, run) = (client(&second), run.clone());
        tokio::spawn(async move {
            let request =
                client.request(Method::POST, "/v1/runs").header("idempotency-key", "run").header("mayfly-forwarded", "me").json(&run);
            client.try_send(request, "POST", "/v1/runs").await
        })
    };
    client(&first).until("/v1/quota", |quota| quota["tenant"]["used"]["sandboxes"] == 2).await;
    kill_machine(&mut second);
    assert!(held.await.unwrap().is_err());
    let began = Instant::now();
    let told = keyed(&first, "/v1/runs", "run", &run).await.expect(200);

    assert_reason(&told, "infra_error");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(database.ask("select count(*) from sandboxes where kind = 'run'"), "1");
}

#[tokio::test]
async fn what_an_image_is_made_of_is_had_by_way_of_a_node_that_lacks_it() {
    let database = Database::start();
    let (first, second) = pair(&database);
    second.import("python").unwrap();
    let archive = async |node: &Service, header: &str| {
        let request = client(node).request(Method::GET, "/v1/image-archives/python").header(header, "me");
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), sum(&answer.bytes().await.unwrap()))
    };

    let (by_first, by_second) = (archive(&first, "x-nothing").await, archive(&second, "x-nothing").await);
    let history = client(&first).get("/v1/image-history/python").await.expect(200);

    assert_eq!((by_first.0, &by_first), (200, &by_second));
    assert_eq!(history, client(&second).get("/v1/image-history/python").await.expect(200));
    // The control: the first has none of it.
    assert_eq!(archive(&first, "mayfly-forwarded").await.0, 409);
}

fn node_id(node: &Service) -> String {
    fs::read_to_string(node.place().data_dir.join("node-id")).unwrap().trim().to_owned()
}

/// Two nodes of a gigabyte each, of which the first has promised most of it.
async fn busy_and_free(database: &Database) -> (Service, Service) {
    let size = ["--capacity-memory-bytes", "1073741824", "--capacity-cpu-millis", "16000"];
    let first = node(database, None, &size);
    let second = node(database, Some(&first), &size);
    // The control: where none is clearly freer, work stays where it comes.
    for _ in 0..3 {
        let stays = client(&first).shell("true").await;
        assert_eq!(place_of(database, &stays), node_id(&first));
    }
    let large = json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "memory_bytes": 640 << 20, "cpu_millis": 500 } });
    made_on(&first, &large).await;
    // Known to the first with its next look.
    let deadline = Instant::now() + SOON;
    while place_of(database, &client(&first).shell("true").await) != node_id(&second) {
        assert!(Instant::now() < deadline, "nothing goes to the freer node: {}", first.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    (first, second)
}

fn place_of(database: &Database, made: &Value) -> String {
    database.ask(&format!("select node from sandboxes where id = '{}'", made["id"].as_str().unwrap()))
}

#[tokio::test]
async fn work_goes_to_the_freer_node_and_its_answer_comes_back_with_all_that_it_wrote() {
    let database = Database::start();
    let (first, second) = busy_and_free(&database).await;
    let other = client(&first);

    let run = other.run(&json!({ "image": "busybox", "command": ["sh", "-c", "cat; flood 5000; exit 3"], "stdin": "given\n" })).await;
    let made = other.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sleep", "1000"] })).await;
    let location = made.header("location").to_owned();
    let made = made.expect(201);

    assert_exit(&run, 3);
    assert!(stdout(&run).starts_with("given\n") && stdout(&run).len() == 5006, "{}", stdout(&run).len());
    assert_eq!((place_of(&database, &run), place_of(&database, &made)), (node_id(&second), node_id(&second)));
    assert_eq!((location, &made["state"]), (format!("/v1/sandboxes/{}", made["id"].as_str().unwrap()), &json!("running")));
    // Each counts once.
    assert_eq!(other.get("/v1/quota").await.expect(200)["tenant"]["used"]["sandboxes"], 2);

    // What the freer one cannot do is done where it was asked for.
    first.import("python").unwrap();
    let asked = json!({ "image": "python", "command": ["python3", "-c", "print(6 * 7)"] });
    let kept = other.run(&asked).await;
    assert_eq!((stdout(&kept), place_of(&database, &kept)), ("42\n", node_id(&first)));
    assert!(forwarded(first.place(), "declined").await >= 1.0);
    other
        .post("/v1/runs", &json!({ "image": "busybox", "command": ["true"], "limits": { "memory_bytes": 1 } }))
        .await
        .problem(422, "invalid_request");
}

#[tokio::test]
async fn no_work_is_lost_or_done_twice_when_the_freer_node_dies_over_it() {
    let database = Database::start();
    let (first, mut second) = busy_and_free(&database).await;
    let runs: Vec<_> = (0..24)
        .map(|number| {
            let client = client(&first);
            let asked = json!({ "image": "busybox", "command": ["sh", "-c", format!("sleep 0.2; echo {number}")], "retry": 3, "wait_ms": 60_000,
                "labels": { "number": number.to_string() }, "limits": { "memory_bytes": 32 << 20, "cpu_millis": 250 } });
            tokio::spawn(async move { (number, client.run(&asked).await) })
        })
        .collect();
    let on_second =
        format!("select count(*) from sandboxes where node = '{}' and state <> 'queued' and labels ? 'number'", node_id(&second));
    let deadline = Instant::now() + SOON;
    while database.ask(&on_second) == "0" {
        assert!(Instant::now() < deadline, "nothing goes to the freer node");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    kill_machine(&mut second);

    for run in runs {
        let (number, run) = run.await.unwrap();
        assert_exit(&run, 0);
        assert_eq!(stdout(&run), format!("{number}\n"));
    }
    assert_eq!(database.ask("select count(*), count(distinct labels ->> 'number') from sandboxes where labels ? 'number'"), "24|24");
}

/// It may have begun what it was offered, or begin it yet: the same name lets that happen once.
#[tokio::test]
async fn what_was_offered_to_a_node_that_hangs_is_done_once() {
    let database = Database::start();
    let (first, second) = busy_and_free(&database).await;
    signal(second.place().pid, Signal::SIGSTOP);
    let began = Instant::now();
    let asked = json!({ "image": "busybox", "command": ["echo", "done"], "labels": { "offered": "once" } });
    let run = client(&first).run(&asked).await;
    let took = began.elapsed();
    signal(second.place().pid, Signal::SIGCONT);
    // It has caught up when it answers again.
    client(&second).get("/v1/quota").await.expect(200);
    client(&second).shell("true").await;

    assert_eq!((stdout(&run), place_of(&database, &run)), ("done\n", node_id(&first)));
    assert!(took < SOON, "{took:?}");
    assert_eq!(database.ask("select count(*) from sandboxes where labels ? 'offered'"), "1");
}

#[tokio::test]
async fn who_speaks_as_a_node_gains_nothing() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let path = sandbox_on(&second, "exec sleep 1000").await;
    let chosen = uuid::Uuid::now_v7().to_string();
    let mine = client(&first);
    let asked = json!({ "image": "busybox", "command": ["true"] });
    let key = database.ask(&format!("select peer_key from nodes where id = '{}'", node_id(&first)));
    let spoken = |forwarded: &str, key: &str| {
        let request = mine.request(Method::POST, "/v1/runs").json(&asked);
        request.header("mayfly-forwarded", forwarded).header("mayfly-offered", &chosen).header("mayfly-peer-key", key)
    };

    // It is left to whoever offers it: the answer is between nodes, and in no contract with clients.
    let guessed = spoken(&node_id(&second), "0123456789abcdef").send().await.unwrap();
    assert_eq!((guessed.status().as_u16(), guessed.headers().contains_key("mayfly-declined")), (503, true));
    assert_eq!(mine.get(&format!("/v1/runs/{chosen}")).await.status, 404);
    // The control: with what nodes alone know it would be heard.
    let known = mine.send(spoken(&node_id(&second), &key), "POST", "/v1/runs").await.expect(200);

    assert_eq!(known["id"], json!(chosen));
    for value in [node_id(&second), node_id(&first), String::from("x")] {
        let request = mine.request(Method::POST, &format!("{path}/pause")).header("mayfly-forwarded", value).json(&json!({}));
        mine.send(request, "POST", &format!("{path}/pause")).await.problem(503, "keeper_unavailable");
    }
}

/// A certificate for this name, of an authority of its own: the authority's, its own, and its key, as files.
fn certify(folder: &std::path::Path, prefix: &str, name: &str) -> [String; 3] {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let authority = rcgen::CertifiedIssuer::self_signed(parameters, authority_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let own = rcgen::CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let files = ["ca", "cert", "key"].map(|kind| folder.join(format!("{prefix}-{kind}.pem")));
    for (file, content) in files.iter().zip([authority.pem(), own.pem(), key.serialize_pem()]) {
        fs::write(file, content).unwrap();
    }
    files.map(|file| file.display().to_string())
}

#[tokio::test]
async fn nodes_speak_tls_with_those_alone_whom_their_authority_vouches_for() {
    let folder = mayfly_tests::service::folder().unwrap();
    let [ca, cert, key] = certify(folder.path(), "own", "nodes.example");
    let [strange_ca, ..] = certify(folder.path(), "strange", "nodes.example");
    let database = Database::start();
    let http = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([reqwest::Certificate::from_pem(&fs::read(&ca).unwrap()).unwrap()])
        .build()
        .unwrap();
    let start = |secret: Option<&str>, ca: &str, name: &str| {
        let address = format!("127.0.0.1:{}", free_port());
        let url = format!("https://{address}");
        let mut args = vec!["--database-url", &database.url, "--node-lease-s", LEASE_S, "--listen", &address, "--peer-address", &url];
        args.extend(["--tls-cert", &cert, "--tls-key", &key, "--peer-ca-file", ca, "--peer-tls-name", name]);
        args.extend(secret.iter().flat_map(|secret| ["--jwt-secret-file", secret]));
        Service::start_with(&args).unwrap()
    };
    let first = start(None, &ca, "nodes.example");
    let secret = first.place().secret_file().display().to_string();
    let second = start(Some(&secret), &ca, "nodes.example");
    let misnamed = start(Some(&secret), &ca, "others.example");
    let distrustful = start(Some(&secret), &strange_ca, "nodes.example");
    let token = |tenant: &str, scope: &str| token::sign(&token::claims(tenant, scope), first.place().secret_file().as_path());
    let import = http.post(format!("{}/v1/images/import?reference=busybox", second.place().url)).bearer_auth(token("operator", "admin"));
    let archive = fs::read(mayfly_tests::image::archive("busybox").unwrap()).unwrap();
    let imported = import.header("content-type", "application/x-tar").body(archive).send().await.unwrap();
    assert_eq!(imported.status(), 201, "{}", imported.text().await.unwrap());
    let mine = token(TENANT, token::TENANT_SCOPES);
    let ask = async |node: &Service, path: &str, body: Value| {
        let request = http.post(format!("{}{path}", node.place().url)).bearer_auth(&mine).json(&body);
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let asked = json!({ "image": "busybox", "command": ["sleep", "1000"], "limits": { "cpu_millis": 500 } });
    let (status, made) = ask(&second, "/v1/sandboxes", asked).await;
    assert_eq!(status, 201, "{made:#}");
    let execs = format!("/v1/sandboxes/{}/execs", made["id"].as_str().unwrap());

    let (_, ran) = ask(&first, &execs, json!({ "command": ["echo", "hello"] })).await;
    assert_eq!(stdout(&ran), "hello\n", "{ran:#}");
    for other in [&misnamed, &distrustful] {
        let (status, refused) = ask(other, &execs, json!({ "command": ["true"] })).await;
        assert_eq!((status, &refused["code"]), (503, &json!("node_unavailable")), "{refused:#}");
    }
}

#[tokio::test]
async fn an_address_that_tokens_must_not_go_to_stops_the_start() {
    for (address, word) in
        [("http://127.0.0.1:1", "peer-http"), ("https://0.0.0.0:1", "0.0.0.0"), ("https://me:pw@127.0.0.1:1", "host and a port")]
    {
        let refused = format!("{:#}", Service::start_with(&["--peer-address", address]).unwrap_err());
        assert!(refused.contains("peer-address") && refused.contains(word), "{refused}");
    }
}

/// Says this to everybody who comes. Returns where, and what came.
async fn says(answer: &'static str) -> (String, tokio::sync::mpsc::UnboundedReceiver<String>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (tell, heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 16 << 10];
            let read = stream.read(&mut head).await.unwrap_or(0);
            tell.send(String::from_utf8_lossy(&head[..read]).into_owned()).ok();
            stream.write_all(answer.as_bytes()).await.ok();
        }
    });
    (url, heard)
}

#[tokio::test]
async fn what_is_no_answer_is_a_node_that_does_not_answer_and_nobody_is_followed_elsewhere() {
    let database = Database::start();
    let (first, second) = pair(&database);
    let path = sandbox_on(&second, "exec sleep 1000").await;
    let other = client(&first);
    let stats = format!("{path}/stats");
    let moved = |url: &str| {
        database.ask(&format!("update nodes set peer_address = '{url}' where id = '{}'", node_id(&second)));
    };

    let (nonsense, _) = says("this is no HTTP\r\n\r\n").await;
    moved(&nonsense);
    other.get(&stats).await.problem(503, "node_unavailable");
    let (early, _) = says("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{").await;
    moved(&early);
    let cut = other.request(Method::GET, &stats).send().await.unwrap();
    assert!(cut.text().await.is_err(), "the part was taken for the whole");
    let (elsewhere, mut heard_elsewhere) = says("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let sends_on =
        Box::leak(format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {elsewhere}/\r\ncontent-length: 0\r\n\r\n").into_boxed_str());
    let (sender, mut heard) = says(sends_on).await;
    moved(&sender);
    let unfollowed = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let answer = unfollowed
        .get(format!("{}{stats}", first.place().url))
        .bearer_auth(other.token().unwrap())
        .header("connection", "x-hop")
        .header("x-hop", "1")
        .send()
        .await
        .unwrap();

    assert_eq!(answer.status().as_u16(), 307);
    let head = heard.recv().await.unwrap().to_ascii_lowercase();
    // The control: it is what a token goes to, with all that is not of one connection alone.
    assert!(head.contains("authorization: bearer ") && head.contains("mayfly-forwarded: ") && head.contains("x-request-id: "), "{head}");
    assert!(!head.contains("x-hop"), "{head}");
    assert!(heard_elsewhere.try_recv().is_err());
    // By plain http only where that was permitted.
    moved("ftp://127.0.0.1:1");
    other.get(&stats).await.problem(503, "node_unavailable");
}
