//! The API's door: TLS, browsers of other origins, heads and bodies that are too large or too slow, and what is never logged.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use mayfly_tests::{
    Client, Service, contract,
    service::{self, shared},
    stream, token,
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// Longer than any deadline that these tests set, shorter than those that they do not.
const SOON: Duration = Duration::from_secs(30);

fn address(url: &str) -> SocketAddr {
    url.split("//").nth(1).unwrap().parse().unwrap()
}

/// A certificate for localhost and its key, as files in a folder. Returns it in PEM.
fn certify(folder: &Path) -> String {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    // The key first: the pair does not fit until the certificate is there too, and then the old one must stay.
    fs::write(folder.join("key.pem"), certified.signing_key.serialize_pem()).unwrap();
    fs::write(folder.join("cert.pem"), certified.cert.pem()).unwrap();
    certified.cert.pem()
}

/// The status of the service's health, to a client that trusts this certificate alone.
async fn health(url: &str, cert: &str, bend: fn(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> Result<u16, reqwest::Error> {
    let builder = reqwest::Client::builder().no_proxy().tls_certs_only([reqwest::Certificate::from_pem(cert.as_bytes()).unwrap()]);
    let response = bend(builder).build().unwrap().get(format!("{url}/healthz")).send().await?;
    assert_eq!(response.headers()["strict-transport-security"], "max-age=31536000");
    Ok(response.status().as_u16())
}

#[tokio::test]
async fn the_api_speaks_tls_and_takes_a_new_certificate() {
    let folder = service::folder().unwrap();
    let first = certify(folder.path());
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name).display().to_string());
    let service = Service::start_with(&["--tls-cert", &cert, "--tls-key", &key]).unwrap();
    let url = service.place().url.clone();
    let as_is = |builder| builder;

    assert!(url.starts_with("https://"), "{url}");
    assert_eq!(health(&url, &first, as_is).await.unwrap(), 200);
    let tls12 = |builder: reqwest::ClientBuilder| builder.max_tls_version(reqwest::tls::Version::TLS_1_2);
    assert_eq!(health(&url, &first, tls12).await.unwrap(), 200);
    // Who speaks plain HTTP, or says nothing, is heard no further.
    let mut plain = TcpStream::connect(address(&url)).await.unwrap();
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut said = Vec::new();
    timeout(SOON, plain.read_to_end(&mut said)).await.unwrap().ok();
    assert!(!said.starts_with(b"HTTP"), "{said:?}");

    fs::write(&cert, "half a certificate").unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(health(&url, &first, as_is).await.unwrap(), 200, "the old one stays while the new one is none");
    let second = certify(folder.path());
    let deadline = Instant::now() + SOON;
    while health(&url, &second, as_is).await.is_err() {
        assert!(Instant::now() < deadline, "the new certificate is not taken: {}", service.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(health(&url, &first, as_is).await.is_err(), "the control failed: any certificate is good");
}

#[tokio::test]
async fn sighup_has_the_certificate_read_at_once() {
    let folder = service::folder().unwrap();
    certify(folder.path());
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name).display().to_string());
    let service = Service::start_with(&["--tls-cert", &cert, "--tls-key", &key]).unwrap();
    let pid = nix::unistd::Pid::from_raw(service.place().pid.cast_signed());

    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();

    let deadline = Instant::now() + SOON;
    while !service.log().contains("the certificate was read again") {
        assert!(Instant::now() < deadline, "{}", service.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_certificate_that_is_none_stops_the_start() {
    let folder = service::folder().unwrap();
    certify(folder.path());
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name).display().to_string());

    let swapped = Service::start_with(&["--tls-cert", &key, "--tls-key", &cert]).unwrap_err();

    assert!(format!("{swapped:#}").contains("key.pem"), "{swapped:#}");
}

/// The headers of the answer to a preflight, and of one to a request, from a page of this origin.
async fn from_page(url: &str, origin: &str) -> [reqwest::header::HeaderMap; 2] {
    let http = reqwest::Client::new();
    let preflight = http.request(Method::OPTIONS, format!("{url}/v1/runs")).header("origin", origin);
    let preflight = preflight.header("access-control-request-method", "POST").header("access-control-request-headers", "authorization");
    let refused = http.post(format!("{url}/v1/runs")).header("origin", origin);
    [preflight.send().await.unwrap().headers().clone(), refused.send().await.unwrap().headers().clone()]
}

#[tokio::test]
async fn only_pages_of_configured_origins_may_call() {
    let service = Service::start_with(&["--cors-origin", "https://app.example.com,http://127.0.0.1:3000"]).unwrap();
    let url = &service.place().url;
    let [preflight, answer] = from_page(url, "https://app.example.com").await;

    assert_eq!(preflight["access-control-allow-origin"], "https://app.example.com");
    assert!(preflight["access-control-allow-headers"].to_str().unwrap().contains("authorization"));
    assert!(preflight["access-control-allow-methods"].to_str().unwrap().contains("POST"));
    assert_eq!(answer["access-control-allow-origin"], "https://app.example.com");
    assert!(answer["access-control-expose-headers"].to_str().unwrap().contains("x-request-id"));
    assert!(!preflight.contains_key("access-control-allow-credentials") && !answer.contains_key("access-control-allow-credentials"));
    for stranger in ["https://evil.example.com", "https://app.example.com.evil.org", "http://app.example.com", "null"] {
        for headers in from_page(url, stranger).await {
            assert!(!headers.contains_key("access-control-allow-origin"), "{stranger}");
        }
    }
}

#[tokio::test]
async fn without_origins_no_page_may_call() {
    let service = shared();

    for headers in from_page(&service.place.url, "https://app.example.com").await {
        assert!(headers.keys().all(|name| !name.as_str().starts_with("access-control")), "{headers:?}");
    }
}

#[tokio::test]
async fn every_answer_is_safe_for_browsers() {
    let service = shared();
    for path in ["/healthz", "/v1/limits", "/no/such/thing", "/openapi.yaml"] {
        let answer = reqwest::get(format!("{}{path}", service.place.url)).await.unwrap();

        assert_eq!(answer.headers()["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(answer.headers()["cache-control"], "no-store", "{path}");
        assert_eq!(answer.headers()["content-security-policy"], "default-src 'none'; frame-ancestors 'none'", "{path}");
    }
}

#[tokio::test]
async fn a_browsers_handshake_is_answered_without_its_token() {
    let client = shared().client();
    let run = client.shell("true").await;
    let token = client.token().unwrap();
    let url = format!("{}/v1/sandboxes/{}/logs", client.place().url, run["id"].as_str().unwrap());
    let handshake = reqwest::Client::new()
        .get(url)
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("sec-websocket-protocol", format!("mayfly.v1, mayfly.bearer.{token}"));

    let answer = handshake.send().await.unwrap();

    assert_eq!(answer.status(), 101);
    assert_eq!(answer.headers()["sec-websocket-protocol"], "mayfly.v1");
    assert!(answer.headers().values().all(|value| !value.to_str().unwrap().contains(token)));
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused_as_a_problem() {
    let client = shared().client();
    let send = async |request: reqwest::RequestBuilder| client.send(request, "GET", "/v1/limits").await;
    let request = || client.request(Method::GET, "/v1/limits");

    send(request().header("x-padding", "x".repeat(20_000))).await.expect(200);
    send(request().header("x-padding", "x".repeat(40_000))).await.problem(431, "headers_too_large");
    let long = client.request(Method::GET, &format!("/v1/limits?{}", "x".repeat(40_000)));
    send(long).await.problem(431, "headers_too_large");
    let beyond = request().header("x-padding", "x".repeat(300_000)).send().await;
    assert!(beyond.is_err() || beyond.unwrap().status() == 431);
}

/// Sends a beginning, then a byte every so often, until the service answers or closes. What it said, and when.
async fn trickle(url: &str, beginning: &str, byte: &[u8]) -> (String, Duration) {
    let (mut client, began_at) = (TcpStream::connect(address(url)).await.unwrap(), Instant::now());
    client.write_all(beginning.as_bytes()).await.unwrap();
    let (mut answers, mut asks) = client.split();
    let drip = async {
        while asks.write_all(byte).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        std::future::pending::<()>().await;
    };
    let mut said = Vec::new();
    let hear = timeout(SOON, answers.read_to_end(&mut said));
    tokio::select! {
        // A reset is an end too.
        heard = hear => drop(heard.expect("the service went on listening")),
        () = drip => {}
    }
    (String::from_utf8_lossy(&said).into_owned(), began_at.elapsed())
}

#[tokio::test]
async fn slow_clients_are_not_waited_for() {
    let service = Service::start_with(&["--head-timeout-s", "1", "--body-timeout-s", "2"]).unwrap();
    let (place, client) = (service.place(), service.client());
    let token = client.token().unwrap();
    let post = |path: &str| format!("POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-length: 1000\r\n\r\n{{");

    let (head, after) = trickle(&place.url, "GET /healthz HTTP/1.1\r\nx-slow: ", b"x").await;
    assert!(!head.starts_with("HTTP/1.1 200") && after < Duration::from_secs(8), "{after:?}: {head}");
    for path in ["/v1/runs", "/v1/sandboxes", "/v1/images/import?reference=slow"] {
        let (body, after) = trickle(&place.url, &post(path), b" ").await;
        assert!(body.starts_with("HTTP/1.1 408"), "{path}: {body}");
        assert!((Duration::from_millis(1900)..Duration::from_secs(8)).contains(&after), "{path}: {after:?}");
        let (head, problem) = body.split_once("\r\n\r\n").unwrap();
        contract::check("POST", path, 408, &contract::headers(head).unwrap(), problem).unwrap();
        assert_eq!(serde_json::from_str::<Value>(problem).unwrap()["code"], "timeout");
    }
    client.get("/v1/limits").await.expect(200);
}

#[tokio::test]
async fn whoever_still_sends_when_it_is_answered_gets_the_answer_and_the_next_one() {
    const BYTES: usize = 32 << 20;
    let service = shared();
    let mut client = TcpStream::connect(address(&service.place.url)).await.unwrap();
    let head = format!("POST /v1/images/import?reference=a HTTP/1.1\r\nhost: a\r\ncontent-length: {BYTES}\r\n\r\n");
    client.write_all(head.as_bytes()).await.unwrap();
    // As many clients do: nothing is read before all of it is sent. More than both sides of a connection hold.
    timeout(SOON, client.write_all(&vec![0; BYTES])).await.unwrap().unwrap();
    client.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();

    let mut said = String::new();
    timeout(SOON, client.read_to_string(&mut said)).await.unwrap().unwrap();
    let (refused, next) = said.split_at(said.rfind("HTTP/1.1").unwrap());
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains("application/problem+json"), "{said}");
    assert!(next.starts_with("HTTP/1.1 200"), "{said}");

    // Whoever asks whether it is to send is told not to.
    let mut client = TcpStream::connect(address(&service.place.url)).await.unwrap();
    client.write_all(head.replace("\r\n\r\n", "\r\nexpect: 100-continue\r\n\r\n").as_bytes()).await.unwrap();
    let mut said = String::new();
    timeout(SOON, client.read_to_string(&mut said)).await.unwrap().unwrap();
    assert!(said.starts_with("HTTP/1.1 401") && !said.contains("100 Continue"), "{said}");

    // Who was told to send, and is refused in the midst of it, still hears that.
    let mut client = TcpStream::connect(address(&service.place.url)).await.unwrap();
    let head = format!(
        "POST /v1/runs HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {}\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n",
        service.client().token().unwrap()
    );
    client.write_all(head.as_bytes()).await.unwrap();
    stream::read_until(&mut client, "100 Continue\r\n\r\n").await;
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    for _ in 0..BYTES >> 20 {
        timeout(SOON, client.write_all(&chunk)).await.unwrap().unwrap();
    }
    client.write_all(b"0\r\n\r\n").await.unwrap();
    stream::read_until(&mut client, "payload_too_large").await;
}

#[tokio::test]
async fn one_connection_too_many_waits_and_the_metrics_have_their_own() {
    let service = Service::start_with(&["--connections-max", "4", "--head-timeout-s", "5"]).unwrap();
    let place = service.place();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(TcpStream::connect(address(&place.url)).await.unwrap());
    }
    let began_at = Instant::now();

    let metrics = reqwest::get(format!("{}/metrics", place.metrics_url)).await.unwrap().status();
    let early = began_at.elapsed();
    let late = reqwest::get(format!("{}/healthz", place.url)).await.unwrap().status();

    assert_eq!((metrics.as_u16(), late.as_u16()), (200, 200));
    assert!(early < Duration::from_secs(4) && began_at.elapsed() > Duration::from_secs(4), "{early:?}, {:?}", began_at.elapsed());
}

#[tokio::test]
async fn no_token_body_or_output_is_in_the_log() {
    let mut service = Service::start_logging("mayfly=trace,tower_http=trace,info");
    let place = service.place().clone();
    let secret = format!("payload-{}", uuid::Uuid::new_v4().simple());
    let client = service.client();
    let mut tokens = vec![client.token().unwrap().to_owned()];
    let full = json!({
        "image": "busybox", "command": ["sh", "-c", format!("cat; echo {secret} $SECRET; cat {secret}; echo {secret} >&2")], "stdin": secret,
        "env": { "SECRET": secret }, "files": [{ "path": secret, "content": secret }], "labels": { "a": secret },
    });

    for _ in 0..5 {
        let run = client.run(&full).await;
        assert!(run["stdout"].as_str().unwrap().contains(&secret), "the control failed");
        client.log(run["id"].as_str().unwrap()).await;
    }
    let sandbox = client.post("/v1/sandboxes", &full).await.expect(201);
    client.delete(&format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())).await.expect(204);
    let mut absent = full.clone();
    absent["command"] = json!([format!("/no/such/{secret}")]);
    client.post("/v1/runs", &absent).await.expect(200);
    let mut unknown = full.clone();
    unknown["image"] = json!(secret);
    client.post("/v1/runs", &unknown).await.problem(404, "image_not_found");
    client.post("/v1/runs", &json!({ "image": "busybox", secret.as_str(): secret })).await.problem(422, "invalid_request");
    client.post_raw("/v1/runs", "application/json", format!("{{{secret}")).await.problem(422, "invalid_request");
    client.post_raw("/v1/images/import?reference=junk", "application/x-tar", secret.repeat(999)).await.problem(422, "invalid_request");
    client.get(&format!("/v1/limits?access_token={}", tokens[0])).await;
    client.get(&format!("/v1/no/{secret}")).await.problem(404, "not_found");
    let mut over = token::claims("acme", "runs");
    over["exp"] = json!(1);
    tokens.push(token::sign(&over, &place.secret_file()));
    tokens.push(token::sign_with(&token::claims("acme", "runs"), secret.as_bytes(), jsonwebtoken::Algorithm::HS256));
    tokens.push(format!("{secret}.{secret}.{secret}"));
    for token in &tokens[1..] {
        Client::with_token(&place, Some(token.clone())).post("/v1/runs", &full).await.problem(401, "unauthenticated");
        stream::open(&format!("{}/v1/sandboxes/x/logs", place.url), Some(token)).await.unwrap_err();
    }
    assert!(service.stop().unwrap().success());

    let log = service.log();
    assert!(log.contains("answered"), "the control failed: nothing is logged of requests: {log}");
    let metadata = fs::read_to_string(place.secret_file()).unwrap();
    for line in log.lines() {
        let found = tokens.iter().chain([&secret, &metadata.trim().to_owned()]).any(|text| line.contains(text.as_str()));
        assert!(!found && !line.contains("eyJ"), "{line}");
    }
}
