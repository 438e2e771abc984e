//! The inside of a sandbox over HTTP: its files, archives of them, what it has changed, what runs in it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use futures_util::StreamExt as _;
use mayfly_tests::{Client, service::shared};
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

/// A running sandbox.
struct Inside {
    client: Client,
    id: String,
}

impl Inside {
    async fn of(client: Client, script: &str) -> Self {
        let script = format!("{script}\necho ready; exec sleep 120");
        let asked = json!({ "image": "busybox", "command": ["sh", "-c", script], "limits": { "inodes": 20_000, "cpu_millis": 500 } });
        let id = client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap().to_owned();
        let inside = Self { client, id };
        // The script is through when what it says last is there.
        tokio::time::timeout(Duration::from_secs(60), async {
            let mut log = inside.client.follow(&inside.id, "from=0").await;
            while log.next().await.is_some_and(|frame| frame["data"] != "ready\n") {}
        })
        .await
        .unwrap();
        inside
    }

    /// Leaves its room to others.
    async fn end(self) {
        assert_eq!(self.client.delete(&self.at("")).await.status, 204);
    }

    async fn new(script: &str) -> Self {
        Self::of(shared().client(), script).await
    }

    fn at(&self, rest: &str) -> String {
        format!("/v1/sandboxes/{}{rest}", self.id)
    }

    fn request(&self, method: Method, rest: &str) -> RequestBuilder {
        self.client.request(method, &self.at(rest))
    }

    async fn get(&self, rest: &str) -> Response {
        self.request(Method::GET, rest).send().await.unwrap()
    }

    async fn json(&self, rest: &str) -> Value {
        let answer = self.get(rest).await;
        assert_eq!(answer.status(), 200, "{rest}");
        answer.json().await.unwrap()
    }

    async fn content(&self, path: &str) -> Vec<u8> {
        let answer = self.get(&format!("/files{path}")).await;
        assert_eq!(answer.status(), 200, "{path}");
        answer.bytes().await.unwrap().to_vec()
    }

    async fn put(&self, path: &str, content: impl Into<reqwest::Body>) -> Response {
        self.request(Method::PUT, &format!("/files{path}")).body(content).send().await.unwrap()
    }

    async fn post(&self, path: &str) -> Response {
        self.request(Method::POST, &format!("/files{path}")).send().await.unwrap()
    }

    async fn delete(&self, path: &str) -> Response {
        self.request(Method::DELETE, &format!("/files{path}")).send().await.unwrap()
    }
}

#[track_caller]
fn header<'a>(answer: &'a Response, name: &str) -> &'a str {
    answer.headers().get(name).unwrap_or_else(|| panic!("no {name}: {answer:?}")).to_str().unwrap()
}

async fn problem(answer: Response, status: u16, code: &str) -> Value {
    let found = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    assert_eq!((found, body["code"].as_str()), (status, Some(code)), "{body:#}");
    body
}

#[tokio::test]
async fn what_is_put_is_there_for_the_program_and_comes_back() {
    let inside = Inside::new("").await;
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();

    let put = inside.put("/tmp/data%20of%20mine?mode=0640&uid=1000", content.clone()).await;

    assert_eq!(put.status(), 200);
    let entry: Value = put.json().await.unwrap();
    assert_eq!((&entry["name"], &entry["size_bytes"]), (&json!("data of mine"), &json!(3_000_000)));
    assert_eq!(
        (&entry["type"], &entry["mode"], &entry["uid"], &entry["gid"]),
        (&json!("file"), &json!("0640"), &json!(1000), &json!(1000))
    );
    assert!(inside.content("/tmp/data%20of%20mine").await == content);
    assert!(inside.content("//tmp/./data%20of%20mine").await == content);
}

#[tokio::test]
async fn parts_of_a_file_come_as_parts() {
    let inside = Inside::new("printf 0123456789 > /tmp/ten; : > /tmp/empty").await;
    let part = async |range: &str| inside.request(Method::GET, "/files/tmp/ten").header("range", range).send().await.unwrap();

    let whole = inside.get("/files/tmp/ten").await;
    assert_eq!((header(&whole, "accept-ranges"), header(&whole, "content-length")), ("bytes", "10"));
    assert!(header(&whole, "etag").starts_with("W/\"") && header(&whole, "last-modified").ends_with(" GMT"));
    let middle = part("bytes=2-4").await;
    assert_eq!((middle.status().as_u16(), header(&middle, "content-range"), header(&middle, "content-length")), (206, "bytes 2-4/10", "3"));
    assert_eq!(middle.text().await.unwrap(), "234");
    assert_eq!(part("bytes=7-").await.text().await.unwrap(), "789");
    assert_eq!(part("bytes=-2").await.text().await.unwrap(), "89");
    let behind = part("bytes=10-").await;
    assert_eq!(header(&behind, "content-range"), "bytes */10");
    problem(behind, 416, "range_not_satisfiable").await;
    let several = part("bytes=0-1,3-4").await;
    assert_eq!((several.status().as_u16(), several.text().await.unwrap().as_str()), (200, "0123456789"));
    let empty = inside.request(Method::GET, "/files/tmp/empty").header("range", "bytes=0-").send().await.unwrap();
    problem(empty, 416, "range_not_satisfiable").await;
}

#[tokio::test]
async fn a_head_tells_of_the_file_without_it() {
    let inside = Inside::new("printf 0123456789 > /tmp/ten").await;

    let head = inside.request(Method::HEAD, "/files/tmp/ten").send().await.unwrap();
    let absent = inside.request(Method::HEAD, "/files/tmp/none").send().await.unwrap();

    assert_eq!((head.status().as_u16(), header(&head, "content-length"), header(&head, "accept-ranges")), (200, "10", "bytes"));
    assert_eq!(absent.status(), 404);
}

#[tokio::test]
async fn a_folder_is_listed_page_by_page() {
    let inside = Inside::new("mkdir /many; cd /many; for n in $(seq 250); do : > f$n; done; ln -s f1 link; mkdir folder").await;
    let (mut names, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = inside.json(&format!("/files/many?list&limit=100{cursor}")).await;
        names.extend(page["items"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }

    assert_eq!(names.len(), 252);
    assert!(names.is_sorted());
    let root = inside.json("/files?list").await;
    assert!(root["items"].as_array().unwrap().iter().any(|entry| entry["name"] == "many" && entry["type"] == "folder"));
    let link = inside.json("/files/many/link?stat").await;
    assert_eq!((&link["type"], &link["target"]), (&json!("link"), &json!("f1")));
}

#[tokio::test]
async fn folders_are_made_files_renamed_and_all_of_it_removed() {
    let inside = Inside::new("").await;

    let made = inside.post("/a/b/c?mkdir&mode=0700").await;
    assert_eq!(made.status(), 201);
    assert_eq!(made.json::<Value>().await.unwrap()["mode"], "0700");
    problem(inside.post("/x/y?mkdir&parents=false").await, 404, "file_not_found").await;
    problem(inside.post("/a/b?mkdir&parents=false").await, 409, "file_exists").await;
    assert_eq!(inside.put("/a/b/one", "1").await.status(), 200);
    assert_eq!(inside.put("/a/two", "2").await.status(), 200);
    problem(inside.post("/a/b/one?rename=/a/two&exclusive").await, 409, "file_exists").await;
    assert_eq!(inside.post("/a/b/one?rename=/a/two").await.status(), 200);
    assert_eq!(inside.content("/a/two").await, b"1");
    problem(inside.put("/a/two?exclusive", "3").await, 409, "file_exists").await;
    problem(inside.delete("/a").await, 409, "file_unfit").await;
    assert_eq!(inside.delete("/a?recursive").await.status(), 204);
    problem(inside.delete("/a?recursive").await, 404, "file_not_found").await;
    problem(inside.post("/a?mkdir&rename=/b").await, 422, "invalid_request").await;
    problem(inside.post("/a").await, 422, "invalid_request").await;
}

#[tokio::test]
async fn an_archive_goes_out_and_in() {
    let inside = Inside::new("mkdir -p /data/deep /copy; echo one > /data/a; echo two > /data/deep/b").await;

    let out = inside.get("/archive?path=/data").await;
    assert_eq!(header(&out, "content-type"), "application/x-tar");
    let archive = out.bytes().await.unwrap();
    let into = inside.request(Method::PUT, "/archive?path=/copy").body(archive).send().await.unwrap();

    assert_eq!(into.status(), 200);
    assert_eq!(into.json::<Value>().await.unwrap(), json!({ "entries": 4, "bytes": 8 }));
    assert_eq!(inside.content("/copy/data/deep/b").await, b"two\n");
    let nonsense = inside.request(Method::PUT, "/archive?path=/copy").body("no archive".repeat(200)).send().await.unwrap();
    problem(nonsense, 422, "invalid_request").await;
    problem(inside.request(Method::PUT, "/archive?path=/copy").send().await.unwrap(), 422, "invalid_request").await;
    problem(inside.get("/archive?path=/none").await, 404, "file_not_found").await;
}

#[tokio::test]
async fn what_changed_and_what_runs_is_told() {
    let inside = Inside::new("echo x > /new; rm /etc/group").await;

    let diff = inside.json("/diff").await;
    let top = inside.json("/top").await;

    let kinds: Vec<_> = diff["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|change| (change["path"].as_str().unwrap(), change["kind"].as_str().unwrap()))
        .collect();
    assert!(kinds.contains(&("/new", "added")) && kinds.contains(&("/etc/group", "deleted")), "{kinds:?}");
    assert_eq!(diff["truncated"], false);
    let processes = top["items"].as_array().unwrap();
    assert_eq!(processes.len(), 1, "{processes:?}");
    assert_eq!((&processes[0]["command"], &processes[0]["parent_pid"]), (&json!(["sleep", "120"]), &json!(1)));
}

#[tokio::test]
async fn paths_that_could_lead_elsewhere_are_refused() {
    let inside = Inside::new("").await;
    let url = |path: &str| format!("{}{}", inside.client.place().url, inside.at(path));
    let long = format!("/files/{}", "a/".repeat(2048));
    for path in [
        "/files/%2e%2e/etc/passwd",
        "/files/a/%2E%2E/%2E%2E/b",
        "/files/a%00b",
        "/files/%zz",
        &long,
        &format!("/files/{}", "n".repeat(256)),
    ] {
        // As it stands: clients tidy paths up.
        let answer = raw(&url(path), inside.client.token().unwrap()).await;
        assert!(answer.starts_with("HTTP/1.1 422") && answer.contains("\"field\":\"path\""), "{path}: {answer}");
    }
    let dots = raw(&url("/files/../../../etc/passwd"), inside.client.token().unwrap()).await;
    assert!(dots.starts_with("HTTP/1.1 422"), "{dots}");
}

/// The answer to a GET of exactly this URL.
async fn raw(url: &str, token: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_name_that_is_no_text_comes_as_bytes_too() {
    let inside = Inside::new("mkdir /bytes").await;

    let put = inside.put("/bytes/b%ff", "x").await;

    assert_eq!(put.status(), 200);
    let listed = inside.json("/files/bytes?list").await;
    assert_eq!(listed["items"][0]["name_base64"], "Yv8=");
    assert_eq!(inside.content("/bytes/b%ff").await, b"x");
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_nothing_half_written() {
    let inside = Inside::new("mkdir /data; echo old > /data/a").await;
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let body =
        reqwest::Body::wrap_stream(futures_util::stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver))));
    let sending = tokio::spawn(inside.request(Method::PUT, "/files/data/a").body(body).send());
    for _ in 0..20 {
        sender.send(Ok(vec![b'x'; 64 * 1024])).await.unwrap();
    }

    sending.abort();
    drop(sending.await);

    let listed = inside.json("/files/data?list").await;
    assert_eq!(listed["items"].as_array().unwrap().len(), 1, "{listed:#}");
    assert_eq!(inside.content("/data/a").await, b"old\n");
}

#[tokio::test]
async fn a_path_is_as_long_as_the_system_takes_it_and_no_longer_wherever_it_stands() {
    let inside = Inside::new("").await;
    let long = "d/".repeat(2048) + "f";
    assert_eq!(long.len(), 4097);

    for answer in [
        inside.get(&format!("/files/{long}")).await,
        inside.put(&format!("/{long}"), "x").await,
        inside.delete(&format!("/{long}")).await,
        inside.post(&format!("/{long}?mkdir")).await,
    ] {
        assert_eq!(problem(answer, 422, "invalid_request").await["field"], "path");
    }
    assert_eq!(problem(inside.post(&format!("/tmp?rename=/{long}")).await, 422, "invalid_request").await["field"], "rename");
    assert_eq!(problem(inside.get(&format!("/archive?path=/{long}")).await, 422, "invalid_request").await["field"], "path");
    problem(inside.get(&format!("/files/{}", &long[2..])).await, 404, "file_not_found").await;
    inside.end().await;
}

/// Gives the head of an entry the sum of its bytes.
fn sum_up(head: &mut [u8]) {
    head[148..156].copy_from_slice(b"        ");
    let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// An archive of so many empty files.
fn archive_of(count: usize) -> Vec<u8> {
    let mut archive = Vec::with_capacity((count + 2) * 512);
    for number in 0..count {
        let mut head = [0_u8; 512];
        let name = format!("f{number:05}");
        head[..name.len()].copy_from_slice(name.as_bytes());
        head[100..108].copy_from_slice(b"0000644\0");
        head[108..116].copy_from_slice(b"0000000\0");
        head[116..124].copy_from_slice(b"0000000\0");
        head[124..136].copy_from_slice(b"00000000000\0");
        head[136..148].copy_from_slice(b"00000000000\0");
        head[156] = b'0';
        head[257..265].copy_from_slice(b"ustar\x0000");
        sum_up(&mut head);
        archive.extend(head);
    }
    archive.extend([0; 1024]);
    archive
}

#[tokio::test]
async fn ten_thousand_files_go_in_are_listed_and_come_out() {
    let inside = Inside::new("mkdir /many").await;

    let into = inside.request(Method::PUT, "/archive?path=/many").body(archive_of(10_000)).send().await.unwrap();
    assert_eq!((into.status().as_u16(), into.json::<Value>().await.unwrap()["entries"].as_u64()), (200, Some(10_000)));
    let (mut count, mut cursor) = (0, String::new());
    loop {
        let page = inside.json(&format!("/files/many?list&limit=1000{cursor}")).await;
        count += page["items"].as_array().unwrap().len();
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    let out = inside.get("/archive?path=/many").await.bytes().await.unwrap();

    assert_eq!(count, 10_000);
    assert_eq!(out.windows(5).filter(|bytes| bytes == b"ustar").count(), 10_001);
    inside.end().await;
}

#[tokio::test]
async fn clients_that_vanish_from_an_archive_or_a_download_leave_nothing_at_work() {
    let inside = Inside::new("mkdir /data; dd if=/dev/zero of=/big bs=1048576 count=32 2>/dev/null").await;
    let archive = archive_of(1000);
    for length in [1, 511, 513, archive.len() / 2, archive.len() - 1025] {
        let half = archive[..length].to_vec();
        let body = futures_util::stream::iter([Ok::<_, std::io::Error>(half)]).chain(futures_util::stream::pending());
        let sending = inside.request(Method::PUT, "/archive?path=/data").body(reqwest::Body::wrap_stream(body)).send();
        // What it waits for will not come.
        assert!(tokio::time::timeout(Duration::from_millis(300), sending).await.is_err());
    }
    for path in ["/files/big", "/archive?path=/big"] {
        let mut download = inside.get(path).await.bytes_stream();
        assert!(!download.next().await.unwrap().unwrap().is_empty(), "{path}");
    }

    // Whoever worked in there for them is gone: what is left is the sandbox's own.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let processes = inside.json("/top").await["items"].as_array().unwrap().len();
        if processes == 1 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{processes} processes");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(inside.put("/data/after", "still there").await.status(), 200);
    assert_eq!(inside.content("/data/after").await, b"still there");
    inside.end().await;
}

/// So many mebibytes, whose length nobody says before they come.
fn unmeasured(mebibytes: usize) -> reqwest::Body {
    reqwest::Body::wrap_stream(futures_util::stream::iter((0..mebibytes).map(|_| Ok::<_, std::io::Error>(vec![1; 1 << 20]))))
}

#[tokio::test]
async fn a_full_disk_is_told_and_the_old_file_stays() {
    let client = shared().client();
    let asked = json!({ "image": "busybox", "command": ["sleep", "120"], "limits": { "disk_bytes": 4 << 20 } });
    let id = client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap().to_owned();
    let inside = Inside { client, id };
    assert_eq!(inside.put("/a", "old").await.status(), 200);

    problem(inside.put("/a", vec![1; 8 << 20]).await, 507, "disk_full").await;
    problem(inside.put("/a", unmeasured(32)).await, 507, "disk_full").await;

    assert_eq!(inside.content("/a").await, b"old");
    // What was taken of them is given back.
    let listed = inside.json("/files?list").await;
    let names: Vec<_> = listed["items"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"a") && !names.iter().any(|name| name.starts_with('.')), "{names:?}");
    assert_eq!(inside.put("/b", vec![1; 3 << 20]).await.status(), 200);
    inside.end().await;
}

#[tokio::test]
async fn an_archive_of_more_than_is_taken_is_refused_as_soon_as_it_says_so() {
    const TAKEN: u64 = 16 << 30;
    let inside = Inside::new("mkdir /into; echo old > /into/f00000").await;
    let path = inside.at("/archive?path=/into");
    // One file, of which no more than a mebibyte comes.
    let said = |bytes: u64| {
        let mut archive = archive_of(1);
        archive.truncate(512);
        archive[124..136].copy_from_slice(&[&[0x80, 0, 0, 0][..], &bytes.to_be_bytes()].concat());
        sum_up(&mut archive);
        archive.resize(1 << 20, 0);
        archive
    };
    let send = async |body: reqwest::Body| inside.client.send(inside.client.request(Method::PUT, &path).body(body), "PUT", &path).await;

    let measured = send(said(TAKEN + 1).into()).await;
    let pieces = [said(TAKEN + 1)].into_iter().chain((0..31).map(|_| vec![0; 1 << 20])).map(Ok::<_, std::io::Error>);
    let unmeasured = send(reqwest::Body::wrap_stream(futures_util::stream::iter(pieces))).await;
    let left = inside.content("/into/f00000").await;
    let control = send(said(TAKEN).into()).await;

    let told = measured.problem(413, "payload_too_large");
    assert!(told["detail"].as_str().unwrap().contains(&TAKEN.to_string()), "{told:#}");
    unmeasured.problem(413, "payload_too_large");
    assert_eq!(left, b"old\n");
    // Of that no more than its end is missing, and of a file nobody has half.
    control.problem(422, "invalid_request");
    problem(inside.get("/files/into/f00000").await, 404, "file_not_found").await;
    assert_eq!(inside.json("/top").await["items"].as_array().unwrap().len(), 1);
    assert_eq!(inside.put("/into/f00000", "new").await.status(), 200);
    assert_eq!(inside.content("/into/f00000").await, b"new");
    inside.end().await;
}

#[tokio::test]
async fn what_is_no_file_is_not_read() {
    let inside = Inside::new("mkfifo /tmp/fifo").await;
    for path in ["/tmp/fifo", "/dev/zero", "/tmp", "/proc/self/root/etc/passwd", "/proc/version"] {
        problem(inside.get(&format!("/files{path}")).await, 409, "file_unfit").await;
    }
    problem(inside.get("/files/none").await, 404, "file_not_found").await;
    problem(inside.put("/dev/x", "").await, 403, "file_denied").await;
    problem(inside.put("/none/x", "").await, 404, "file_not_found").await;
    problem(inside.get("/files/tmp?list&colour=red").await, 422, "invalid_request").await;
}

#[tokio::test]
async fn the_files_of_another_tenant_are_not_there() {
    let inside = Inside::new("echo secret > /tmp/secret").await;
    let other = Inside { client: shared().client(), id: inside.id.clone() };

    for rest in ["/files/tmp/secret", "/files?list", "/archive", "/diff", "/top"] {
        problem(other.get(rest).await, 404, "not_found").await;
    }
    problem(other.put("/tmp/secret", "x").await, 404, "not_found").await;
    problem(other.delete("/tmp/secret").await, 404, "not_found").await;
    assert_eq!(inside.content("/tmp/secret").await, b"secret\n");
}

#[tokio::test]
async fn reading_takes_one_scope_and_writing_another() {
    let inside = Inside::new("echo x > /tmp/x").await;
    let claims = inside.client.token().unwrap().split('.').nth(1).unwrap();
    let claims = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, claims).unwrap();
    let tenant = serde_json::from_slice::<Value>(&claims).unwrap()["tenant"].as_str().unwrap().to_owned();
    let with = |scope: &str| Inside { client: Client::with_scope(inside.client.place(), &tenant, scope), id: inside.id.clone() };

    let (reader, writer) = (with("sandboxes:read"), with("sandboxes:write"));

    assert_eq!(reader.content("/tmp/x").await, b"x\n");
    problem(reader.put("/tmp/x", "y").await, 403, "forbidden").await;
    problem(reader.delete("/tmp/x").await, 403, "forbidden").await;
    problem(reader.post("/tmp/y?mkdir").await, 403, "forbidden").await;
    problem(writer.get("/files/tmp/x").await, 403, "forbidden").await;
    assert_eq!(writer.put("/tmp/x", "y").await.status(), 200);
}

#[tokio::test]
async fn a_sandbox_is_found_by_its_name_and_not_while_it_is_paused() {
    let inside = Inside::new("echo x > /tmp/x").await;
    let name = format!("files-{}", inside.id);
    inside.client.patch(&inside.at(""), &json!({ "name": name })).await.expect(200);
    let named = Inside { client: inside.client.clone(), id: name };

    assert_eq!(named.content("/tmp/x").await, b"x\n");
    inside.client.post(&inside.at("/pause"), &json!({})).await.expect(200);
    let refused = problem(named.get("/files/tmp/x").await, 409, "wrong_state").await;
    assert_eq!(refused["state"], "paused");
    inside.client.post(&inside.at("/resume"), &json!({})).await.expect(200);
    assert_eq!(named.content("/tmp/x").await, b"x\n");
}

#[tokio::test]
async fn one_that_has_ended_without_its_layer_says_its_state() {
    let client = shared().client();
    let asked = json!({ "image": "busybox", "command": ["true"] });
    let id = client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap().to_owned();
    client.until(&format!("/v1/sandboxes/{id}"), |sandbox| sandbox["state"] == "exited").await;
    let inside = Inside { client, id };

    let refused = problem(inside.get("/files/etc/passwd").await, 409, "wrong_state").await;

    assert_eq!(refused["state"], "exited");
}
