//! Images that are here get names, tell how they were built and whether they are sound, and leave as archives and to registries with the digest that they came with.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mayfly_tests::{
    Client, Service, image,
    outcome::{assert_exit, stdout},
    registry::{Manners, PASSWORD, Registry, USER},
    service::{self, finish, import, mayfly, shared},
    token,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::Instant,
};

const SOON: Duration = Duration::from_secs(60);
const PUSH: &str = "/v1/images/push";
const LINES: &str = "application/x-ndjson";

/// What the operator of these services allows.
fn service() -> Service {
    let service = Service::start_with(&["--registry-allow", "127.0.0.0/8"]).unwrap();
    service.import("busybox").unwrap();
    service
}

fn name() -> String {
    format!("test-{}", uuid::Uuid::new_v4().simple())
}

/// An image of busybox's that is the tenant's own.
async fn own_image(client: &Client) -> (String, Value) {
    let name = name();
    let archive = fs::read(image::archive("busybox").unwrap()).unwrap();
    let path = format!("/v1/images/import?reference={name}");
    let image = client.post_raw(&path, "application/x-tar", archive).await.expect(201);
    (name, image)
}

async fn says_hello(client: &Client, image: &str) {
    let run = client.run(&json!({ "image": image, "command": ["sh", "-c", "echo hello from here"] })).await;
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "hello from here\n");
}

async fn export(client: &Client, reference: &str, to: &Path) {
    let path = format!("/v1/image-archives/{reference}");
    let answer = client.request(reqwest::Method::GET, &path).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["content-type"].to_str().unwrap()), (200, "application/x-tar"));
    let wanted = answer.content_length();
    let bytes = answer.bytes().await.unwrap();
    assert_eq!(wanted, Some(bytes.len() as u64));
    fs::write(to, bytes).unwrap();
}

/// The digest of the manifest that `skopeo` finds there.
fn digest_by_skopeo(source: &str, options: &[&str]) -> String {
    let output = Command::new("skopeo").args(["--insecure-policy", "inspect"]).args(options).arg(source).output().unwrap();
    assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["Digest"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_exported_image_is_read_by_skopeo_in_both_forms_and_comes_back_the_same() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let (name, image) = own_image(&client).await;
    let archive = folder.path().join("exported.tar");

    export(&client, &name, &archive).await;

    assert_eq!(digest_by_skopeo(&format!("oci-archive:{}", archive.display()), &[]), image["digest"].as_str().unwrap());
    let unpacked = folder.path().join("unpacked");
    let from_docker = format!("docker-archive:{}:{name}:latest", archive.display());
    image::run(Command::new("skopeo").args(["--insecure-policy", "copy", &from_docker, &format!("dir:{}", unpacked.display())])).unwrap();
    let path = "/v1/images/import?reference=again";
    let again = client.post_raw(path, "application/x-tar", fs::read(&archive).unwrap()).await.expect(201);
    assert_eq!((&again["digest"], &again["config"]), (&image["digest"], &image["config"]));
    says_hello(&client, "again").await;
}

#[tokio::test]
async fn an_image_of_many_layers_leaves_with_each_of_them_once() {
    let (service, folder, name) = (shared(), service::folder().unwrap(), name());
    let (layout, layer) = (folder.path().join("layout"), folder.path().join("layer.tar"));
    image::unpack_layout(&image::archive("busybox").unwrap(), &layout).unwrap();
    fs::write(folder.path().join("file"), "a layer that occurs twice\n").unwrap();
    image::run(Command::new("tar").arg("-C").arg(folder.path()).arg("-cf").arg(&layer).arg("file")).unwrap();
    for _ in 0..2 {
        let image = format!("{}:latest", layout.display());
        image::run(Command::new("umoci").args(["raw", "add-layer", "--image", &image]).arg(&layer)).unwrap();
    }
    import(&service.place, &layout, &name).unwrap();
    let client = service.client();
    let history = client.get(&format!("/v1/image-history/{name}")).await.expect(200);
    let archive = folder.path().join("exported.tar");

    export(&client, &name, &archive).await;

    let layers: Vec<_> = history["steps"].as_array().unwrap().iter().filter_map(|step| step["layer"]["digest"].as_str()).collect();
    let output = Command::new("tar").arg("-tf").arg(&archive).output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    for digest in &layers {
        let path = format!("blobs/{}", digest.replace(':', "/"));
        assert_eq!(listed.lines().filter(|line| *line == path).count(), 1, "{listed}");
    }
    assert_eq!(layers[layers.len() - 1], layers[layers.len() - 2], "{layers:?}");
    digest_by_skopeo(&format!("oci-archive:{}", archive.display()), &[]);
}

#[tokio::test]
async fn a_tag_is_a_name_of_its_own_for_the_same_image() {
    let service = shared();
    let (client, other) = (service.client(), service.client());
    let (first, image) = own_image(&client).await;
    let used = async || client.get("/v1/quota").await.expect(200)["tenant"]["used"]["image_bytes"].as_u64();
    let before = used().await;

    let answer = client.post("/v1/images/tag", &json!({ "reference": first, "name": "team/second:1" })).await;

    assert_eq!(answer.header("location"), "/v1/images/team/second:1");
    let tagged = answer.expect(201);
    assert_eq!((&tagged["digest"], &tagged["shared"]), (&image["digest"], &json!(false)));
    assert_eq!(used().await, before.map(|bytes| bytes + image["size_bytes"].as_u64().unwrap()));
    assert_eq!(client.delete(&format!("/v1/images/{first}")).await.status, 204);
    says_hello(&client, "team/second:1").await;
    let events = client.get("/v1/events?kind=image.tagged").await.expect(200);
    assert_eq!((&events["items"][0]["object"], &events["items"][0]["data"]["source"]), (&json!("image/team/second:1"), &json!(first)));
    // Nobody names what is another's, or gives it the name of a route.
    other.post("/v1/images/tag", &json!({ "reference": "team/second:1", "name": "mine" })).await.problem(404, "image_not_found");
    let refused =
        client.post("/v1/images/tag", &json!({ "reference": "team/second:1", "name": "verify" })).await.problem(422, "invalid_request");
    assert_eq!(refused["field"], "name");
}

#[tokio::test]
async fn a_tenants_tag_of_a_shared_image_counts_for_the_tenant_alone() {
    let service = shared();
    let (client, other) = (service.client(), service.client());

    let tagged = client.post("/v1/images/tag", &json!({ "reference": "busybox", "name": "mine" })).await.expect(201);

    assert_eq!(client.get("/v1/quota").await.expect(200)["tenant"]["used"]["image_bytes"], tagged["size_bytes"]);
    other.get("/v1/images/mine").await.problem(404, "image_not_found");
    let own = client.get("/v1/images?shared=false&name=mi").await.expect(200);
    assert_eq!(own["items"], json!([tagged]));
    assert_eq!(client.get("/v1/images?shared=true&name=mi").await.expect(200)["items"], json!([]));
}

#[tokio::test]
async fn how_an_image_was_built_is_told_to_who_may_use_it() {
    let service = shared();
    let (client, other) = (service.client(), service.client());
    let (name, image) = own_image(&client).await;
    let path = format!("/v1/image-history/{name}");

    let history = client.get(&path).await.expect(200);

    let layers: Vec<_> = history["steps"].as_array().unwrap().iter().map(|step| &step["layer"]).filter(|layer| !layer.is_null()).collect();
    let bytes: u64 = layers.iter().map(|layer| layer["size_bytes"].as_u64().unwrap()).sum();
    assert_eq!((&history["digest"], Some(bytes)), (&image["digest"], image["size_bytes"].as_u64()));
    for path in [path, format!("/v1/image-archives/{name}")] {
        other.get(&path).await.problem(404, "image_not_found");
    }
    other.post("/v1/images/verify", &json!({ "reference": name })).await.problem(404, "image_not_found");
    other.post(PUSH, &json!({ "reference": name, "to": "nowhere.example/a" })).await.problem(404, "image_not_found");
}

#[tokio::test]
async fn a_damaged_layer_is_found_and_another_import_mends_it() {
    let service = service();
    let admin = Client::admin(service.place());
    let verify = async || admin.post("/v1/images/verify", &json!({ "reference": "busybox" })).await.expect(200);
    let sound = verify().await;
    let history = admin.get("/v1/image-history/busybox").await.expect(200);
    let digest = history["steps"].as_array().unwrap().iter().find_map(|step| step["layer"]["digest"].as_str()).unwrap().to_owned();
    let layer = service.place().data_dir.join("blobs").join(digest.replace(':', "/"));
    let mut bytes = fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, bytes).unwrap();

    let damaged = verify().await;
    let (status, said) = finish(&mut command(&service, &["verify", "busybox"]), SOON).unwrap();
    service.import("busybox").unwrap();
    let mended = verify().await;

    assert_eq!((&sound["sound"], &sound["damaged"]), (&json!(true), &json!([])));
    assert_eq!((&damaged["sound"], &damaged["unpacked"]), (&json!(false), &json!(true)));
    assert_eq!(damaged["damaged"], json!([{ "digest": digest, "part": "layer", "kind": "changed" }]));
    assert!(!status.success() && said.contains(&format!("layer {digest} is missing")), "{said}");
    assert_eq!(mended["sound"], true);
    says_hello(&service.client(), "busybox").await;
}

/// Where the content of this digest is kept.
fn blob(service: &Service, digest: &Value) -> PathBuf {
    service.place().data_dir.join("blobs").join(digest.as_str().unwrap().replace(':', "/"))
}

/// Of the only layer of busybox's.
async fn layer_of(client: &Client, image: &str) -> Value {
    let history = client.get(&format!("/v1/image-history/{image}")).await.expect(200);
    history["steps"].as_array().unwrap().iter().map(|step| &step["layer"]["digest"]).find(|digest| digest.is_string()).unwrap().clone()
}

/// Opens a named pipe for writing once somebody has it open, or waits, for reading.
async fn pipe_to_a_reader(path: &Path) -> fs::File {
    let deadline = Instant::now() + SOON;
    loop {
        // Without a reader that is refused (fifo(7)).
        match fs::OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(path) {
            Ok(pipe) => return pipe,
            Err(error) => assert!(Instant::now() < deadline, "nobody reads it: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_verification_that_nobody_waits_for_takes_its_tenants_place_until_it_ends() {
    const VERIFY: &str = "/v1/images/verify";
    let service = service();
    let client = service.client();
    let (name, _) = own_image(&client).await;
    let asked = json!({ "reference": name });
    let layer = blob(&service, &layer_of(&client, &name).await);
    // Whoever reads it waits for who writes it.
    fs::remove_file(&layer).unwrap();
    nix::unistd::mkfifo(&layer, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(&layer, fs::Permissions::from_mode(0o644)).unwrap();
    let waiting = tokio::spawn(client.request(reqwest::Method::POST, VERIFY).json(&asked).send());
    let pipe = pipe_to_a_reader(&layer).await;

    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    for _ in 0..50 {
        let refused = client.post(VERIFY, &asked).await.problem(503, "no_capacity");
        assert!(refused["detail"].as_str().unwrap().contains("of this tenant"), "{refused:#}");
    }

    // Now it has read it, to its end.
    drop(pipe);
    let deadline = Instant::now() + SOON;
    let next = loop {
        let answer = client.post(VERIFY, &asked).await;
        if answer.status == 200 {
            break answer.body;
        }
        assert!(Instant::now() < deadline, "{}", answer.text);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(next["damaged"][0]["kind"], "missing", "{next:#}");
    assert!(!layer.exists());
}

#[tokio::test]
async fn what_lost_a_part_is_told_as_that_until_another_import_brings_it() {
    let (service, folder) = (service(), service::folder().unwrap());
    let client = service.client();
    let image = client.get("/v1/images/busybox").await.expect(200);
    let (archive, history) = ("/v1/image-archives/busybox", "/v1/image-history/busybox");
    let push = json!({ "reference": "busybox", "to": "127.0.0.1:1025/app:1" });

    fs::remove_file(blob(&service, &layer_of(&client, "busybox").await)).unwrap();
    let exported = client.get(archive).await.problem(409, "conflict");
    let pushed = client.post(PUSH, &push).await.problem(409, "conflict");
    client.get(history).await.expect(200);
    fs::remove_file(blob(&service, &image["digest"])).unwrap();
    let read = client.get(history).await.problem(409, "conflict");
    service.import("busybox").unwrap();

    for told in [exported, pushed, read] {
        assert!(told["detail"].as_str().unwrap().contains("import or pull it again") && told["retryable"] == false, "{told:#}");
    }
    client.get(history).await.expect(200);
    export(&client, "busybox", &folder.path().join("out.tar")).await;
}

#[tokio::test]
async fn a_removal_that_waits_for_an_import_holds_up_no_export_and_no_tag() {
    let (service, folder) = (service(), service::folder().unwrap());
    let client = service.client();
    let (removed, _) = own_image(&client).await;
    let (layout, out) = (folder.path().join("other"), folder.path().join("out.tar"));
    image::variant(&image::archive("busybox").unwrap(), &layout, &["--config.env", "WHICH=other"]).unwrap();
    let blobs = service.place().data_dir.join("blobs/sha256");
    let count = || fs::read_dir(&blobs).unwrap().filter(|entry| entry.as_ref().unwrap().file_name().len() == 64).count();
    let (before, deadline) = (count(), Instant::now() + SOON);
    let keeper = Pid::from_raw(service.place().keeper_pid().cast_signed());

    // What is to be unpacked is not, for a while.
    kill(keeper, Signal::SIGSTOP).unwrap();
    let place = service.place().clone();
    let importing = tokio::task::spawn_blocking(move || import(&place, &layout, "other"));
    while count() == before {
        assert!(Instant::now() < deadline && !importing.is_finished(), "{}", service.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (remover, path) = (client.clone(), format!("/v1/images/{removed}"));
    let removing = tokio::spawn(async move { remover.delete(&path).await.status });
    while client.get(&format!("/v1/images/{removed}")).await.status != 404 {
        assert!(Instant::now() < deadline, "{}", service.log());
    }
    for tag in 0..20 {
        tokio::time::timeout(SOON, export(&client, "busybox", &out)).await.unwrap();
        let tagged = json!({ "reference": "busybox", "name": format!("tagged:{tag}") });
        tokio::time::timeout(SOON, client.post("/v1/images/tag", &tagged)).await.unwrap().expect(201);
    }
    let is_over = (importing.is_finished(), removing.is_finished());
    kill(keeper, Signal::SIGCONT).unwrap();

    assert_eq!(is_over, (false, false));
    importing.await.unwrap().unwrap();
    assert_eq!(removing.await.unwrap(), 204);
}

/// A command of the operator's.
fn command(service: &Service, arguments: &[&str]) -> Command {
    let admin = token::sign(&token::claims("operator", "admin"), &service.place().secret_file());
    let mut command = mayfly();
    command.arg("image").args(arguments).args(["--url", &service.place().url, "--token", &admin]);
    command
}

#[tokio::test]
async fn a_pushed_image_has_its_digest_at_the_registry_and_is_pulled_as_it_was() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    let (client, other) = (service.client(), service.client());
    let (name, image) = own_image(&client).await;
    let target = format!("{}/team/app:1", registry.address);

    let pushed = client.post(PUSH, &json!({ "reference": name, "to": target })).await.expect(200);
    // What is there already is not sent again.
    let again = client.post(PUSH, &json!({ "reference": name, "to": format!("{}/team/app:2", registry.address) })).await.expect(200);
    let pulled = other.post("/v1/images/pull", &json!({ "reference": target, "name": "app" })).await.expect(201);

    assert_eq!((&pushed, &again), (&image, &image));
    assert_eq!(digest_by_skopeo(&format!("docker://{target}"), &["--tls-verify=false"]), image["digest"].as_str().unwrap());
    assert_eq!((&pulled["digest"], &pulled["pulled_from"]), (&image["digest"], &json!(target)));
    says_hello(&other, "app").await;
}

#[tokio::test]
async fn a_push_is_with_credentials_where_the_registry_wants_them() {
    let (service, registry) = (service(), Registry::start(Manners { password: true, ..Manners::default() }).unwrap());
    let client = service.client();
    let to = format!("{}/team/app:1", registry.address);
    let with = async |password: &str| {
        let credentials = json!({ "username": USER, "password": password });
        client.post(PUSH, &json!({ "reference": "busybox", "to": to, "credentials": credentials })).await
    };

    client.post(PUSH, &json!({ "reference": "busybox", "to": to })).await.problem(403, "registry_denied");
    with("wrong").await.problem(403, "registry_denied");
    with(PASSWORD).await.expect(200);
    let login = json!({ "registry": registry.address, "username": USER, "password": PASSWORD });
    client.post("/v1/registries", &login).await.expect(201);
    let second = format!("{}/team/app:2", registry.address);
    client.post(PUSH, &json!({ "reference": "busybox", "to": second })).await.expect(200);

    client.post("/v1/images/pull", &json!({ "reference": second, "name": "app" })).await.expect(201);
    assert!(!service.log().contains(PASSWORD), "{}", service.log());
}

#[tokio::test]
async fn a_push_goes_by_tls_to_who_is_vouched_for_and_to_nobody_else() {
    let registry = Registry::start(Manners { tls: true, password: true }).unwrap();
    let certificate = registry.certificate().display().to_string();
    let own = ["--registry-allow", "127.0.0.0/8", "--registry-stall-s", "2"];
    let trusting = Service::start_with(&[&own[..], &["--registry-ca-file", &certificate]].concat()).unwrap();
    let doubting = Service::start_with(&own).unwrap();
    let credentials = json!({ "username": USER, "password": PASSWORD });
    let asked = json!({ "reference": "busybox", "to": format!("{}/app:1", registry.address), "credentials": credentials });
    for service in [&trusting, &doubting] {
        service.import("busybox").unwrap();
    }

    let pushed = trusting.client().post(PUSH, &asked).await.expect(200);
    let doubt = doubting.client().post(PUSH, &asked).await;

    doubt.problem(502, "registry_failed");
    let pull = json!({ "reference": format!("{}/app:1", registry.address), "name": "app", "credentials": credentials });
    let pulled = trusting.client().post("/v1/images/pull", &pull).await.expect(201);
    assert_eq!(pulled["digest"], pushed["digest"]);
}

#[tokio::test]
async fn a_push_tells_how_far_it_has_come_and_ends_with_the_image_or_a_problem() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    let client = service.client();
    let lines = async |to: &str| -> Vec<Value> {
        let request =
            client.request(reqwest::Method::POST, PUSH).header("accept", LINES).json(&json!({ "reference": "busybox", "to": to }));
        let answer = client.send(request, "POST", PUSH).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, LINES));
        answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };

    let good = lines(&format!("{}/app:1", registry.address)).await;
    drop(registry);
    let service_of_none = lines("127.0.0.1:1025/app:1").await;

    assert_eq!(good.last().unwrap()["image"], client.get("/v1/images/busybox").await.expect(200));
    assert!(good.iter().any(|line| line["progress"]["stage"] == "uploading") || good.len() == 2, "{good:#?}");
    assert_eq!(service_of_none.last().unwrap()["problem"]["code"], "registry_failed", "{service_of_none:#?}");
}

/// What stands in front of a registry: it lets one request a connection through, and answers the first so many of those that bring a blob itself.
async fn gate(registry: &Registry, refusals: usize, answer: &'static str) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (behind, brought) = (registry.address.clone(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&brought);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (behind, count) = (behind.clone(), Arc::clone(&count));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    // TLS, which is tried first, is not spoken here.
                    let Ok(byte) = stream.read_u8().await else { return };
                    if head.is_empty() && !byte.is_ascii_uppercase() {
                        return;
                    }
                    head.push(byte);
                }
                let text = String::from_utf8(head).unwrap();
                if text.starts_with("PUT ") && text.contains("/blobs/uploads/") && count.fetch_add(1, Ordering::SeqCst) < refusals {
                    let answer = format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                    drop(stream.write_all(answer.as_bytes()).await);
                    // Unread, its body would have the answer overtaken by a reset.
                    drop(tokio::time::timeout(Duration::from_secs(5), tokio::io::copy(&mut stream, &mut tokio::io::sink())).await);
                    return;
                }
                let mut through = TcpStream::connect(&behind).await.unwrap();
                let head = text.replacen("\r\n", "\r\nconnection: close\r\n", 1);
                drop(through.write_all(head.as_bytes()).await);
                drop(tokio::io::copy_bidirectional(&mut stream, &mut through).await);
            });
        }
    });
    (address, brought)
}

#[tokio::test]
async fn a_registry_that_does_not_take_it_at_once_is_asked_again() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    let client = service.client();
    let blobs = {
        let history = client.get("/v1/image-history/busybox").await.expect(200);
        let layers: BTreeSet<_> = history["steps"].as_array().unwrap().iter().filter_map(|step| step["layer"]["digest"].as_str()).collect();
        // Its configuration is one, too.
        layers.len() + 1
    };
    for (answer, tag) in [("503 Service Unavailable", "1"), ("429 Too Many Requests\r\nretry-after: 1", "2")] {
        let (address, brought) = gate(&registry, 2, answer).await;
        // Of its own: what a registry has is not brought again.
        let to = format!("{address}/app-{tag}:1");

        client.post(PUSH, &json!({ "reference": "busybox", "to": to })).await.expect(200);

        assert_eq!(brought.load(Ordering::SeqCst), blobs + 2, "{answer}");
    }
    let image = client.get("/v1/images/busybox").await.expect(200);
    assert_eq!(
        digest_by_skopeo(&format!("docker://{}/app-2:1", registry.address), &["--tls-verify=false"]),
        image["digest"].as_str().unwrap()
    );
}

#[tokio::test]
async fn nothing_is_pushed_to_where_the_operator_does_not_say_so() {
    let (private, registry) = (shared(), Registry::start(Manners::default()).unwrap());
    let client = private.client();
    let push = async |to: &str| client.post(PUSH, &json!({ "reference": "busybox", "to": to })).await.problem(422, "invalid_request");

    let refused = push(&format!("{}/app:1", registry.address)).await;
    let digest = push(&format!("registry.example/app@sha256:{}", "a".repeat(64))).await;
    let none = push("registry.example/UPPER").await;

    assert_eq!([&refused["field"], &digest["field"], &none["field"]], [&json!("to"); 3]);
    // The control.
    let service = service();
    service.client().post(PUSH, &json!({ "reference": "busybox", "to": format!("{}/app:1", registry.address) })).await.expect(200);
}

#[tokio::test]
async fn the_command_line_does_all_of_it() {
    let (service, registry, folder) = (service(), Registry::start(Manners::default()).unwrap(), service::folder().unwrap());
    let archive: PathBuf = folder.path().join("out.tar");
    let to = format!("{}/app:1", registry.address);
    let run = |arguments: &[&str]| {
        let (status, said) = finish(&mut command(&service, arguments), SOON).unwrap();
        assert!(status.success(), "{arguments:?}: {said}");
        said
    };

    let tagged = run(&["tag", "busybox", "team/box:1"]);
    let listed = run(&["list", "--name", "team/"]);
    let history = run(&["history", "team/box:1"]);
    let inspected = run(&["inspect", "team/box:1"]);
    let exported = run(&["export", "team/box:1", "--output", archive.to_str().unwrap()]);
    let pushed = run(&["push", "team/box:1", "--to", &to]);
    let verified = run(&["verify", "team/box:1"]);
    run(&["remove", "team/box:1"]);
    let password = folder.path().join("password");
    fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    run(&["login", "registry.example", "--username", USER, "--password-file", password.to_str().unwrap()]);
    let kept = Client::admin(service.place()).get("/v1/registries/registry.example").await.expect(200);
    run(&["logout", "registry.example"]);
    let forgotten = Client::admin(service.place()).get("/v1/registries/registry.example").await;
    let (again, why) = finish(&mut command(&service, &["export", "busybox", "--output", archive.to_str().unwrap()]), SOON).unwrap();

    assert!(tagged.starts_with("team/box:1 sha256:") && pushed.starts_with("team/box:1 sha256:"), "{tagged}{pushed}");
    assert!(
        listed.contains("team/box:1") && history.contains("STEP") && inspected.contains("\"entrypoint\""),
        "{listed}{history}{inspected}"
    );
    assert!(exported.contains("bytes") && verified.contains("is sound"), "{exported}{verified}");
    digest_by_skopeo(&format!("oci-archive:{}", archive.display()), &[]);
    assert!(!again.success() && why.contains("is there already"), "{why}");
    assert_eq!((&kept["username"], forgotten.status), (&json!(USER), 404));
    service.client().get("/v1/images/team/box:1").await.problem(404, "image_not_found");
}
