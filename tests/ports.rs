//! HTTP and WebSocket into a sandbox that has no network: what gets in, what gets out, and what does not.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use mayfly_tests::{Client, service::shared, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _, http::HeaderValue};

/// A server that tells what it was asked, and a few places that do something else. On 8080 of 127.0.0.1, and on 8081 of ::1.
const SERVER: &str = r#"
import base64, hashlib, http.server, json, socket, socketserver, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def tell(self, status, body, headers=()):
        self.send_response(status)
        for name, value in headers: self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while True:
                size = int(self.rfile.readline(), 16)
                data += self.rfile.read(size)
                self.rfile.readline()
                if size == 0: return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    def any(self):
        path = self.path.split("?")[0]
        if path == "/ws": return self.websocket()
        if path == "/last":
            self.shake(); data = self.rfile.read(); self.wfile.write(b"%d bytes" % len(data)); return
        if path == "/slow":
            self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
            for part in (b"first", b"second"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part)); self.wfile.flush(); go.wait(100)
            self.wfile.write(b"0\r\n\r\n"); return
        if path == "/go": go.set()
        if path == "/evil":
            return self.tell(418, b"<script>1</script>", [("Content-Type", "text/html"), ("Access-Control-Allow-Origin", "*"),
                ("Set-Cookie", "id=1; Path=/; Domain=example.org"), ("Clear-Site-Data", "*"), ("X-Accel-Redirect", "/etc/passwd"),
                ("Connection", "X-Hop"), ("X-Hop", "1"), ("Location", "/login")])
        if path == "/big": return self.tell(200, b"x" * (8 << 20))
        if path == "/head": return self.tell(200, b"", [("X-Long", "y" * 60000), ("X-Longer", "y" * 60000)])
        body = self.body()
        told = {"method": self.command, "path": self.path, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(),
            "headers": [[name.lower(), value] for name, value in self.headers.items()]}
        self.tell(200, json.dumps(told).encode(), [("Content-Type", "application/json")])
    def shake(self):
        accept = base64.b64encode(hashlib.sha1((self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
        self.send_response(101)
        self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept.decode()); self.end_headers()
        self.close_connection = True
    def websocket(self):
        self.shake()
        offered = (self.headers.get("Sec-WebSocket-Protocol") or "none").encode()
        self.wfile.write(bytes([0x81, len(offered)]) + offered)
        while True:
            head = self.rfile.read(2)
            if len(head) < 2: print("the tunnel ended", flush=True); return
            size, mask = head[1] & 127, None
            if size == 126: size = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(size)))
            if head[0] & 15 == 8: self.wfile.write(b"\x88\x00"); return
            length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
            self.wfile.write(bytes([head[0]]) + length + data)
    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_PROPFIND = any

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    def __init__(self, family, address):
        self.address_family = family
        super().__init__(address, Handler)

class Rude(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(1000); self.request.sendall(b"this is no HTTP\r\n\r\n")

class Silent(socketserver.BaseRequestHandler):
    def handle(self):
        while self.request.recv(1000): pass

go = threading.Event()
four = Server(socket.AF_INET, ("127.0.0.1", 8080))
six = Server(socket.AF_INET6, ("::1", 8081))
rude = socketserver.ThreadingTCPServer(("127.0.0.1", 8082), Rude)
silent = socketserver.ThreadingTCPServer(("127.0.0.1", 8083), Silent)
for server in (six, rude, silent): threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
four.serve_forever()
"#;

struct Served {
    client: Client,
    id: String,
}

impl Served {
    async fn new() -> Self {
        let client = shared().client();
        let request = json!({ "image": "python", "command": ["python3", "-c", SERVER], "limits": { "pids": 128 } });
        let id = client.post("/v1/sandboxes", &request).await.expect(201)["id"].as_str().unwrap().to_owned();
        let first = client.follow(&id, "from=0").await.next().await.unwrap();
        assert_eq!(first["data"], "ready\n", "{first}");
        Self { client, id }
    }

    fn path(&self, rest: &str) -> String {
        format!("/v1/sandboxes/{}/ports/{rest}", self.id)
    }

    fn request(&self, method: Method, rest: &str) -> reqwest::RequestBuilder {
        self.client.request(method, &self.path(rest))
    }

    async fn told(&self, request: reqwest::RequestBuilder) -> Value {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.json().await.unwrap()
    }

    async fn end(self) {
        assert_eq!(self.client.delete(&format!("/v1/sandboxes/{}", self.id)).await.status, 204);
    }
}

fn header<'a>(told: &'a Value, name: &str) -> Option<&'a str> {
    told["headers"].as_array().unwrap().iter().find(|pair| pair[0] == name).and_then(|pair| pair[1].as_str())
}

#[tokio::test]
async fn a_request_arrives_as_it_was_sent_but_for_who_sent_it() {
    let served = Served::new().await;

    let told = served
        .told(
            served
                .request(Method::from_bytes(b"PROPFIND").unwrap(), "8080/a%2Fb/c%FF?x=1&y=%20")
                .header("x-mine", "kept")
                .header("cookie", "operator=secret; mayfly-port-own=1")
                .header("connection", "x-hop")
                .header("x-hop", "dropped")
                .header("idempotency-key", "theirs"),
        )
        .await;

    assert_eq!((told["method"].as_str(), told["path"].as_str()), (Some("PROPFIND"), Some("/a%2Fb/c%FF?x=1&y=%20")));
    assert_eq!(header(&told, "x-mine"), Some("kept"));
    assert_eq!(header(&told, "cookie"), Some("own=1"));
    assert_eq!(header(&told, "idempotency-key"), Some("theirs"));
    assert_eq!(header(&told, "host"), Some("localhost:8080"));
    assert_eq!(header(&told, "x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(header(&told, "x-forwarded-prefix"), Some(served.path("8080").as_str()));
    let token = served.client.token().unwrap();
    assert!(["authorization", "x-hop", "connection"].iter().all(|name| header(&told, name).is_none()), "{told:#}");
    assert!(!told.to_string().contains(token));
    served.end().await;
}

#[tokio::test]
async fn bodies_of_both_directions_are_not_held() {
    let served = Served::new().await;
    const BYTES: usize = 32 << 20;
    let pieces = futures_util::stream::iter((0..BYTES / 65_536).map(|_| Ok::<_, std::io::Error>(vec![7_u8; 65_536])));

    // With a key, which elsewhere has a body of that size refused.
    let up = served.request(Method::POST, "8080/").header("idempotency-key", "k").body(reqwest::Body::wrap_stream(pieces));
    let told = served.told(up).await;
    let down = served.request(Method::GET, "8080/big").send().await.unwrap().bytes().await.unwrap();
    // The second part is sent when the first has come.
    let mut slow = served.request(Method::GET, "8080/slow").send().await.unwrap().bytes_stream();
    let first = tokio::time::timeout(Duration::from_secs(60), slow.next()).await.unwrap().unwrap().unwrap();
    served.told(served.request(Method::GET, "8080/go")).await;
    let rest: Vec<_> = slow.map(Result::unwrap).collect().await;

    assert_eq!(told["bytes"], BYTES);
    assert_eq!(down.len(), 8 << 20);
    assert_eq!((&first[..], rest.concat().as_slice()), (&b"first"[..], &b"second"[..]));
    served.end().await;
}

#[tokio::test]
async fn an_answer_says_nothing_for_our_origin() {
    let served = Served::new().await;

    let answer = served.request(Method::GET, "8080/evil").send().await.unwrap();

    let headers = answer.headers().clone();
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap().as_str()), (418, "<script>1</script>"));
    let policy: Vec<_> = headers.get_all("content-security-policy").iter().map(|value| value.to_str().unwrap()).collect();
    assert!(policy.len() == 1 && policy[0].starts_with("sandbox ") && !policy[0].contains("allow-same-origin"), "{policy:?}");
    assert_eq!(headers["set-cookie"], format!("mayfly-port-id=1; Path={}/", served.path("8080")).as_str());
    assert_eq!(headers["location"], served.path("8080/login").as_str());
    assert_eq!(headers["x-content-type-options"], "nosniff");
    for name in ["access-control-allow-origin", "clear-site-data", "x-accel-redirect", "x-hop"] {
        assert!(!headers.contains_key(name), "{name}");
    }
    served.end().await;
}

#[tokio::test]
async fn both_addresses_of_the_loopback_are_reached_and_nothing_else_is() {
    let served = Served::new().await;

    assert_eq!(served.told(served.request(Method::GET, "8081")).await["path"], "/");
    let closed: Value = served.request(Method::GET, "9999/").send().await.unwrap().json().await.unwrap();
    let rude = served.request(Method::GET, "8082/").send().await.unwrap();
    let long = served.request(Method::GET, "8080/head").send().await.unwrap();

    assert_eq!((closed["status"].as_u64(), closed["code"].as_str()), (Some(502), Some("port_closed")));
    assert_eq!(rude.status(), 502);
    assert_eq!(rude.json::<Value>().await.unwrap()["code"], "port_broken");
    assert_eq!(long.json::<Value>().await.unwrap()["code"], "port_broken");
    for port in ["0", "65536", "http", "-1"] {
        let refused: Value = served.request(Method::GET, &format!("{port}/")).send().await.unwrap().json().await.unwrap();
        assert_eq!((refused["code"].as_str(), refused["field"].as_str()), (Some("invalid_request"), Some("port")));
    }
    served.end().await;
}

#[tokio::test]
async fn the_hosts_own_loopback_is_another() {
    let served = Served::new().await;
    // A control: the service itself listens there, on the host's.
    let port = served.client.place().url.rsplit(':').next().unwrap().to_owned();

    let answer: Value = served.request(Method::GET, &format!("{port}/healthz")).send().await.unwrap().json().await.unwrap();

    assert_eq!(reqwest::get(format!("{}/healthz", served.client.place().url)).await.unwrap().status(), 200);
    assert_eq!(answer["code"], "port_closed");
    served.end().await;
}

#[tokio::test]
async fn only_its_tenant_with_the_scope_gets_in_and_only_while_it_runs() {
    let served = Served::new().await;
    let url = format!("{}{}", served.client.place().url, served.path("8080/"));
    let status = async |client: &Client| client.request(Method::GET, &served.path("8080/")).send().await.unwrap().status().as_u16();
    let reader = Client::with_scope(served.client.place(), "nobody", "sandboxes:read");

    assert_eq!(reqwest::get(&url).await.unwrap().status(), 401);
    assert_eq!(status(&shared().client()).await, 404);
    assert_eq!(status(&reader).await, 403);
    assert_eq!(status(&served.client).await, 200);

    let id = served.client.sandbox("exit 0").await;
    served.client.until(&format!("/v1/sandboxes/{id}"), |sandbox| !sandbox["outcome"].is_null()).await;
    let ended: Value =
        served.client.request(Method::GET, &format!("/v1/sandboxes/{id}/ports/8080/")).send().await.unwrap().json().await.unwrap();
    assert_eq!((ended["code"].as_str(), ended["state"].as_str()), (Some("wrong_state"), Some("exited")));
    served.end().await;
}

#[tokio::test]
async fn a_websocket_is_tunnelled_without_the_token() {
    let served = Served::new().await;
    let url = format!("{}{}", served.client.place().url.replacen("http", "ws", 1), served.path("8080/ws"));
    let mut request = url.into_client_request().unwrap();
    let protocols = format!("mayfly.v1, mayfly.bearer.{}", served.client.token().unwrap());
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_str(&protocols).unwrap());

    let (mut socket, response) = tokio_tungstenite::connect_async(request).await.unwrap();
    let offered = socket.next().await.unwrap().unwrap();
    let payload = vec![0xff_u8; 20_000];
    socket.send(Message::binary(payload.clone())).await.unwrap();
    let echoed = socket.next().await.unwrap().unwrap();
    socket.close(None).await.unwrap();

    assert_eq!(response.headers()["sec-websocket-protocol"], "mayfly.v1");
    assert_eq!(offered, Message::text("none"));
    assert_eq!(echoed, Message::binary(payload));
    served.end().await;
}

#[tokio::test]
async fn a_client_that_closes_its_side_of_a_tunnel_still_hears_the_answer_and_is_then_let_go() {
    let served = Served::new().await;
    let mut tunnel = served.client.get_by_hand(&served.path("8080/last"), stream::HANDSHAKE).await;
    let head = stream::read_until(&mut tunnel, "\r\n\r\n").await;
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));

    // Whoever answers does so when it has read all of it.
    tunnel.write_all(&vec![7; 1 << 20]).await.unwrap();
    tunnel.shutdown().await.unwrap();
    let answer = stream::read_to_end(&mut tunnel).await;

    assert_eq!(String::from_utf8_lossy(&answer), "1048576 bytes");
    stream::until_let_go(&tunnel).await;
    served.end().await;
}

#[tokio::test]
async fn a_client_that_closes_its_side_within_a_request_is_let_go() {
    let served = Served::new().await;
    for (path, lines) in [("8080/slow", ""), ("8080/", "content-length: 100\r\n"), ("8083/", "")] {
        let mut client = served.client.get_by_hand(&served.path(path), lines).await;
        if path == "8080/slow" {
            stream::read_until(&mut client, "first").await;
        }
        client.shutdown().await.unwrap();
        stream::read_to_end(&mut client).await;
        stream::until_let_go(&client).await;
    }

    assert_eq!(served.told(served.request(Method::GET, "8080/")).await["method"], "GET");
    served.end().await;
}

#[tokio::test]
async fn a_client_that_vanishes_ends_its_tunnel_and_nothing_else() {
    let served = Served::new().await;
    // After the handshake, within a long answer, and within a body.
    for (path, more) in [("8080/ws", stream::HANDSHAKE), ("8080/slow", ""), ("8080/", "content-length: 100\r\n")] {
        let mut stream = served.client.get_by_hand(&served.path(path), more).await;
        if more != "content-length: 100\r\n" {
            let mut some = [0; 12];
            stream.read_exact(&mut some).await.unwrap();
        }
    }

    let mut log = served.client.follow(&served.id, "from=0").await;
    let told = async { while log.next().await.unwrap()["data"] != "the tunnel ended\n" {} };
    tokio::time::timeout(Duration::from_secs(20), told).await.unwrap();
    assert_eq!(served.told(served.request(Method::GET, "8080/")).await["method"], "GET");
    served.end().await;
}
