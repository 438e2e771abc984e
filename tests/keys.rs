//! By which keys tokens are proven: each algorithm, sets that change under load, and what must never be believed.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mayfly_tests::{
    Client, Service,
    service::{self, Place, finish, mayfly},
    token,
};
use rcgen::{KeyPair, PublicKeyData as _, SignatureAlgorithm};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const KINDS: [(&SignatureAlgorithm, Algorithm); 3] = [
    (&rcgen::PKCS_RSA_SHA256, Algorithm::RS256),
    (&rcgen::PKCS_ECDSA_P256_SHA256, Algorithm::ES256),
    (&rcgen::PKCS_ED25519, Algorithm::EdDSA),
];

/// A pair of keys under a name.
struct Pair {
    kid: String,
    algorithm: Algorithm,
    keys: KeyPair,
}

impl Pair {
    fn new(kid: &str, (kind, algorithm): (&'static SignatureAlgorithm, Algorithm)) -> Self {
        Self { kid: kid.to_owned(), algorithm, keys: KeyPair::generate_for(kind).unwrap() }
    }

    fn ed(kid: &str) -> Self {
        Self::new(kid, KINDS[2])
    }

    fn sign_as(&self, kid: Option<&str>, claims: &Value) -> String {
        let pem = self.keys.serialize_pem();
        let read: fn(&[u8]) -> jsonwebtoken::errors::Result<EncodingKey> = if self.algorithm == Algorithm::RS256 {
            EncodingKey::from_rsa_pem
        } else if self.algorithm == Algorithm::ES256 {
            EncodingKey::from_ec_pem
        } else {
            EncodingKey::from_ed_pem
        };
        let key = read(pem.as_bytes());
        let header = Header { kid: kid.map(str::to_owned), ..Header::new(self.algorithm) };
        jsonwebtoken::encode(&header, claims, &key.unwrap()).unwrap()
    }

    fn token(&self) -> String {
        self.sign_as(Some(&self.kid), &claims())
    }

    /// Its public half, as issuers publish it. Only of Ed25519: its raw key is the last 32 bytes.
    fn jwk(&self) -> Value {
        json!({ "kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": self.kid, "x": BASE64_URL_SAFE_NO_PAD.encode(self.keys.der_bytes()) })
    }
}

fn claims() -> Value {
    token::claims("acme", token::TENANT_SCOPES)
}

/// The status that a token gets.
async fn status(place: &Place, token: &str) -> u16 {
    Client::with_token(place, Some(token.to_owned())).get("/v1/limits").await.status
}

#[track_caller]
fn assert_refused(answer: mayfly_tests::Answer) {
    let challenge = answer.header("www-authenticate").to_owned();
    let problem = answer.problem(401, "unauthenticated");
    assert_eq!(challenge, "Bearer realm=\"mayfly\", error=\"invalid_token\", error_description=\"the token is not valid\"");
    assert_eq!(problem["detail"], "the token is not valid", "it tells more than needed");
}

#[tokio::test]
async fn each_kind_of_key_proves_its_own_tokens_and_no_others() {
    let folder = service::folder().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let pairs = KINDS.map(|kind| Pair::new(&format!("{:?}", kind.1), kind));
    let files: Vec<_> = pairs.iter().map(|pair| write(&pair.kid, &pair.keys.public_key_pem())).collect();
    let secret = write("secret", &"s".repeat(40));
    let named = pairs.iter().zip(&files).map(|(pair, file)| format!("{}={}", pair.kid, file.display())).collect::<Vec<_>>().join(",");
    let args = ["--jwt-public-key-file", &named, "--jwt-secret-file", secret.to_str().unwrap(), "--jwt-issuer", "https://issuer"];
    let service = Service::start_with(&args).unwrap();
    let place = service.place();
    let mut claims = claims();
    claims["iss"] = json!("https://issuer");
    let send = async |token: String| Client::with_token(place, Some(token)).get("/v1/limits").await;
    let hmac = |kid: Option<&str>, secret: &[u8]| {
        let header = Header { kid: kid.map(str::to_owned), ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(secret)).unwrap()
    };

    send(hmac(None, &[b's'; 40])).await.expect(200);
    for pair in &pairs {
        send(pair.sign_as(Some(&pair.kid), &claims)).await.expect(200);
        // By the command line too.
        let private = write("private", &pair.keys.serialize_pem());
        let mut command = mayfly();
        command.args(["token", "--tenant", "acme", "--sub", "alice", "--jwt-issuer", "https://issuer", "--kid", &pair.kid]);
        let (done, said) = finish(command.arg("--private-key-file").arg(&private), Duration::from_secs(20)).unwrap();
        assert!(done.success(), "{said}");
        send(said.trim().to_owned()).await.expect(200);

        // The right key under no name, under another's, under none that there is; another key under the right name.
        let other = &pairs.iter().find(|other| other.kid != pair.kid).unwrap().kid;
        assert_refused(send(pair.sign_as(None, &claims)).await);
        assert_refused(send(pair.sign_as(Some(other), &claims)).await);
        assert_refused(send(pair.sign_as(Some("no-such-key"), &claims)).await);
        let forger = Pair { kid: pair.kid.clone(), algorithm: pair.algorithm, keys: KeyPair::generate_for(pair.keys.algorithm()).unwrap() };
        assert_refused(send(forger.sign_as(Some(&pair.kid), &claims)).await);
        // The public key, which everybody has, as the secret of an HMAC (CVE-2015-9235).
        let pem = pair.keys.public_key_pem();
        for secret in [pem.as_bytes(), pem.trim_end().as_bytes(), pair.keys.der_bytes()] {
            assert_refused(send(hmac(Some(&pair.kid), secret)).await);
            assert_refused(send(hmac(None, secret)).await);
        }
        // No signature at all.
        let header = BASE64_URL_SAFE_NO_PAD.encode(json!({ "alg": "none", "kid": pair.kid }).to_string());
        assert_refused(send(format!("{header}.{}.", BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()))).await);
        // What a trusted key signed is told apart: its bearer can do something about it.
        let mut foreign = claims.clone();
        foreign["iss"] = json!("https://another");
        let answer = send(pair.sign_as(Some(&pair.kid), &foreign)).await;
        assert!(answer.header("www-authenticate").contains("error_description=\"the token is from another issuer\""));
        answer.problem(401, "unauthenticated");
    }
}

#[tokio::test]
async fn a_huge_token_is_refused_unread() {
    let service = service::shared();
    let mut claims = claims();
    claims["groups"] = json!("x".repeat(10_000));
    let huge = token::sign(&claims, &service.place.secret_file());

    assert_refused(Client::with_token(&service.place, Some(huge)).get("/v1/limits").await);
}

#[tokio::test]
async fn claims_may_have_other_names_and_scopes_may_be_a_list() {
    let args = ["--tenant-claim", "org_id", "--scope-claim", "permissions", "--jwt-leeway-s", "0"];
    let service = Service::start_with(&args).unwrap();
    let now = token::now_unix_s();
    let good = json!({ "org_id": "acme", "sub": "auth0|1", "permissions": ["openid", "runs"], "aud": ["mayfly", "x"], "exp": now + 60 });
    let sign = |claims: &Value| token::sign(claims, &service.place().secret_file());
    let mut over = good.clone();
    over["exp"] = json!(now - 1);
    let client = Client::with_token(service.place(), Some(sign(&good)));

    client.get("/v1/runs/none").await.problem(404, "not_found");
    client.get("/v1/sandboxes").await.problem(403, "forbidden");
    assert_eq!(status(service.place(), &sign(&over)).await, 401, "within the usual leeway, and there is none");
}

/// An issuer that publishes keys on loopback.
struct Issuer {
    url: String,
    answer: Arc<Mutex<String>>,
    fetches: Arc<AtomicUsize>,
    served: tokio::task::JoinHandle<()>,
}

impl Issuer {
    async fn start(pairs: &[&Pair]) -> Self {
        Self::start_at("127.0.0.1:0", pairs).await
    }

    async fn start_at(address: &str, pairs: &[&Pair]) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let (answer, fetches) = (Arc::new(Mutex::new(String::new())), Arc::new(AtomicUsize::new(0)));
        let (published, counted) = (Arc::clone(&answer), Arc::clone(&fetches));
        let served = tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match client.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                counted.fetch_add(1, Ordering::SeqCst);
                let answer = published.lock().unwrap().clone();
                // A client that went away is no fault of ours.
                client.write_all(answer.as_bytes()).await.ok();
            }
        });
        let issuer = Self { url, answer, fetches, served };
        issuer.publish(pairs);
        issuer
    }

    fn publish(&self, pairs: &[&Pair]) {
        let body = json!({ "keys": pairs.iter().map(|pair| pair.jwk()).collect::<Vec<_>>() }).to_string();
        self.answer("200 OK", "", &body);
    }

    fn answer(&self, status: &str, header: &str, body: &str) {
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{header}\r\n", body.len());
        *self.answer.lock().unwrap() = format!("{head}{body}");
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.served.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_change_under_load_and_no_good_request_fails() {
    let mut pair = Arc::new(Pair::ed("key-0"));
    let issuer = Issuer::start(&[&pair]).await;
    let service = Service::start_with(&["--jwt-jwks-url", &issuer.url]).unwrap();
    let (current, is_over) = (Arc::new(Mutex::new(pair.token())), Arc::new(AtomicBool::new(false)));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (place, current, is_over) = (service.place().clone(), Arc::clone(&current), Arc::clone(&is_over));
            tokio::spawn(async move {
                let mut good = 0;
                while !is_over.load(Ordering::SeqCst) {
                    let token = current.lock().unwrap().clone();
                    assert_eq!(status(&place, &token).await, 200, "after {good} good ones");
                    good += 1;
                }
                good
            })
        })
        .collect();

    // Each new key is published beside the old one, signs at once, and stands alone when nothing signed by the old one is on its way.
    for number in 1..4 {
        let next = Arc::new(Pair::ed(&format!("key-{number}")));
        tokio::time::sleep(Duration::from_millis(500)).await;
        issuer.publish(&[&pair, &next]);
        *current.lock().unwrap() = next.token();
        assert_eq!(status(service.place(), &next.token()).await, 200);
        tokio::time::sleep(Duration::from_millis(500)).await;
        issuer.publish(&[&next]);
        pair = next;
    }
    // Then the issuer is gone, and its keys are kept.
    drop(issuer);
    assert_eq!(status(service.place(), &Pair::ed("of-nobody").token()).await, 401);
    tokio::time::sleep(Duration::from_millis(500)).await;
    is_over.store(true, Ordering::SeqCst);
    let mut good = 0;
    for client in clients {
        good += client.await.expect("a good request failed");
    }

    assert!(good > 80, "{good} requests are no load");
    let metrics = reqwest::get(format!("{}/metrics", service.place().metrics_url)).await.unwrap().text().await.unwrap();
    let figure = |series: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series} is not in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(figure("mayfly_jwks_age_seconds{source=\"url\"}") > 0.0);
    assert!(figure("mayfly_jwks_loads_total{result=\"ok\",source=\"url\"}") >= 2.0);
    assert!(figure("mayfly_jwks_loads_total{result=\"failed\",source=\"url\"}") >= 1.0);
    assert!(service.log().contains("the keys for tokens stay as they were"), "{}", service.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_unknown_keys_fetches_once_in_five_seconds() {
    let good = Pair::ed("good");
    let issuer = Issuer::start(&[&good]).await;
    let service = Service::start_with(&["--jwt-jwks-url", &issuer.url]).unwrap();
    let (before, began_at) = (issuer.fetches(), Instant::now());
    let storm: Vec<_> = (0..40)
        .map(|lane| {
            let place = service.place().clone();
            tokio::spawn(async move {
                let forger = Pair::ed("none");
                for number in 0.. {
                    if began_at.elapsed() > Duration::from_secs(8) {
                        return;
                    }
                    assert_eq!(status(&place, &forger.sign_as(Some(&format!("{lane}-{number}")), &claims())).await, 401);
                }
            })
        })
        .collect();

    while began_at.elapsed() < Duration::from_secs(8) {
        assert_eq!(status(service.place(), &good.token()).await, 200, "the storm is no good request's concern");
    }
    for lane in storm {
        lane.await.unwrap();
    }

    let most = began_at.elapsed().as_secs() / 5 + 1;
    let fetches = issuer.fetches() - before;
    assert!((1..=usize::try_from(most).unwrap()).contains(&fetches), "{fetches} fetches in {:?}", began_at.elapsed());
}

#[tokio::test]
async fn an_issuer_that_is_not_there_at_the_start_is_asked_again() {
    let pair = Pair::ed("late");
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let service = Service::start_with(&["--jwt-jwks-url", &format!("http://{address}/keys")]).unwrap();
    let is_without = service.log().contains("no keys for tokens yet");
    let issuer = Issuer::start_at(&address, &[&pair]).await;

    assert!(is_without, "the control failed: {}", service.log());
    assert_eq!(status(service.place(), &pair.token()).await, 200, "the first token that names a key has it fetched");
    assert!(issuer.fetches() > 0);
}

#[tokio::test]
async fn an_issuer_is_not_followed_elsewhere_and_not_heard_for_ever() {
    let pair = Pair::ed("elsewhere");
    let (elsewhere, issuer) = (Issuer::start(&[&pair]).await, Issuer::start(&[]).await);
    issuer.answer("302 Found", &format!("location: {}\r\n", elsewhere.url), "");
    let service = Service::start_with(&["--jwt-jwks-url", &issuer.url]).unwrap();

    let redirected = status(service.place(), &pair.token()).await;
    let padded = json!({ "keys": [pair.jwk()], "padding": "x".repeat(300_000) });
    issuer.answer("200 OK", "", &padded.to_string());
    let large = status(service.place(), &pair.token()).await;
    issuer.publish(&[&pair]);
    let control = status(service.place(), &pair.token()).await;

    assert_eq!((redirected, large, control), (401, 401, 200), "{}", service.log());
    assert_eq!(elsewhere.fetches(), 0);
}

#[tokio::test]
async fn an_issuer_is_known_by_the_authority_that_is_configured() {
    let (pair, folder) = (Pair::ed("private"), service::folder().unwrap());
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let write = |name: &str, text: String| -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let cert = write("cert.pem", certified.cert.pem());
    let key = write("key.pem", certified.signing_key.serialize_pem());
    // With this option openssl sends the file as it is.
    write("keys", format!("HTTP/1.0 200 OK\r\n\r\n{}", json!({ "keys": [pair.jwk()] })));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut issuer = Command::new("openssl")
        .current_dir(folder.path())
        .args(["s_server", "-quiet", "-HTTP", "-accept", &port, "-cert"])
        .arg(&cert)
        .arg("-key")
        .arg(&key)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let url = format!("https://localhost:{port}/keys");

    let trusting = Service::start_with(&["--jwt-jwks-url", &url, "--jwt-jwks-ca-file", cert.to_str().unwrap()]).unwrap();
    let trusted = status(trusting.place(), &pair.token()).await;
    drop(trusting);
    let doubting = Service::start_with(&["--jwt-jwks-url", &url]).unwrap();
    let doubted = status(doubting.place(), &pair.token()).await;
    issuer.kill().unwrap();
    issuer.wait().unwrap();

    assert_eq!((trusted, doubted), (200, 401));
}
