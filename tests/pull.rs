//! Images come from registries as `docker pull` would have them, past every way in which a registry can be slow, broken or hostile, and from nowhere else.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "pull/liar.rs"]
mod liar;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use liar::{Liar, Manner};
use mayfly_tests::{
    Answer, Client, Service, image,
    outcome::{assert_exit, stdout},
    registry::{Manners, PASSWORD, Registry, USER},
    service::{self, finish, mayfly},
    token,
};
use reqwest::{Method, header::CONTENT_TYPE};
use serde_json::{Value, json};
use tokio::{sync::Notify, time::Instant};

/// Long enough to notice by, and for a loaded machine.
const SOON: Duration = Duration::from_secs(30);
const PULL: &str = "/v1/images/pull";
/// What the operator of these services allows.
const OWN: [&str; 4] = ["--registry-allow", "127.0.0.0/8", "--registry-stall-s", "2"];

fn service() -> Service {
    Service::start_with(&OWN).unwrap()
}

/// One that waits as long for a registry as any test may take.
fn patient_service() -> Service {
    Service::start_with(&OWN[..2]).unwrap()
}

fn busybox() -> PathBuf {
    image::archive("busybox").unwrap()
}

fn layout(folder: &Path) -> PathBuf {
    let layout = folder.join("layout");
    image::unpack_layout(&busybox(), &layout).unwrap();
    layout
}

async fn says_hello(client: &Client, image: &str) {
    let run = client.run(&json!({ "image": image, "command": ["sh", "-c", "echo hello from here"] })).await;
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "hello from here\n");
}

/// Pulls `app:1` of a registry, as `app`.
async fn pull(client: &Client, address: &str) -> Answer {
    client.post(PULL, &json!({ "reference": format!("{address}/app:1"), "name": "app" })).await
}

/// What is said of such a pull, in lines.
async fn pull_in_lines(client: &Client, address: &str) -> Vec<Value> {
    let request = client.request(Method::POST, PULL).header("accept", "application/x-ndjson");
    let request = request.json(&json!({ "reference": format!("{address}/app:1"), "name": "app" }));
    let answer = client.send(request, "POST", PULL).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-ndjson"));
    answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A service and a registry that behaves like this, and what came of a pull.
async fn pulled_from(manner: Manner) -> (Service, Client, Liar, Answer) {
    let folder = service::folder().unwrap();
    let (service, liar) = (service(), Liar::start(&layout(folder.path()), manner).await);
    let client = service.client();
    let answer = pull(&client, &liar.address).await;
    (service, client, liar, answer)
}

#[tokio::test]
async fn an_image_is_pulled_by_tag_and_by_digest_and_runs() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    registry.push_archive(&busybox(), "team/app:1").unwrap();
    let client = service.client();
    let by_tag = format!("{}/team/app:1", registry.address);

    let first = client.post(PULL, &json!({ "reference": by_tag })).await;
    let location = first.header("location").to_owned();
    let first = first.expect(201);
    let by_digest = format!("{}/team/app@{}", registry.address, first["digest"].as_str().unwrap());
    let second = client.post(PULL, &json!({ "reference": by_digest, "name": "pinned" })).await.expect(201);

    assert_eq!((&first["reference"], &first["shared"]), (&json!(by_tag), &json!(false)));
    assert_eq!(client.get(&location).await.expect(200), first);
    assert_eq!((&second["digest"], &second["reference"]), (&first["digest"], &json!("pinned")));
    says_hello(&client, &by_tag).await;
    says_hello(&client, "pinned").await;
}

#[tokio::test]
async fn an_image_of_dockers_older_form_is_one_too() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    registry.push(&format!("oci-archive:{}", busybox().display()), "app:1", &["--format", "v2s2"]).unwrap();
    let client = service.client();

    pull(&client, &registry.address).await.expect(201);

    says_hello(&client, "app").await;
}

/// Makes an image of `$2` and sends it to `$3`, within `$1`.
const BUILD: &str = r#"set -eu; cd "$1"
    builder() { buildah --root "$PWD/storage" --runroot "$PWD/run" --storage-driver vfs "$@"; }
    container=$(builder from --quiet "oci-archive:$2")
    mkdir -p content/opt; echo packed > content/opt/told
    builder copy --quiet --chown 7:8 "$container" content /
    builder config --env GREETING=hello --user 7:8 --workingdir /made --volume /state --volume /opt --port 8000/tcp --label team=blue --stop-signal SIGINT \
        --entrypoint '["/bin/sh", "-c"]' --cmd serve "$container"
    builder commit --quiet --tls-verify=false "$container" "docker://$3""#;

#[tokio::test]
async fn what_buildah_says_of_an_image_is_honoured() {
    let (service, registry, folder) = (service(), Registry::start(Manners::default()).unwrap(), service::folder().unwrap());
    let target = format!("{}/app:1", registry.address);
    image::run(Command::new("sh").args(["-c", BUILD, "sh"]).arg(folder.path()).arg(busybox()).arg(&target)).unwrap();
    let client = service.client();

    let config = pull(&client, &registry.address).await.expect(201)["config"].clone();
    let tell = "echo $GREETING; pwd; id -u; id -g; cat /opt/told; touch /state/mine /opt/mine && stat -c '%u:%g %a' /state /opt/told";
    let run = client.run(&json!({ "image": "app", "command": [tell] })).await;

    assert_eq!((&config["user"], &config["stop_signal"], &config["workdir"]), (&json!("7:8"), &json!("SIGINT"), &json!("/made")));
    assert_eq!((&config["volumes"], &config["exposed_ports"]), (&json!(["/opt", "/state"]), &json!(["8000/tcp"])));
    assert_eq!((&config["labels"]["team"], &config["command"]), (&json!("blue"), &json!(["serve"])));
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "hello\n/made\n7\n8\npacked\n7:8 755\n7:8 644\n");
}

#[tokio::test]
async fn of_an_image_for_many_machines_this_ones_is_taken() {
    let (service, registry, folder) = (service(), Registry::start(Manners::default()).unwrap(), service::folder().unwrap());
    let others = folder.path().join("others");
    image::variant(&busybox(), &others, &["--architecture", "s390x"]).unwrap();
    registry.push_archive(&busybox(), "app:ours").unwrap();
    registry.push(&format!("oci:{}:latest", others.display()), "app:others", &[]).unwrap();
    let ours = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let (ours, others) = (described(&registry, "ours", ours).await, described(&registry, "others", "s390x").await);
    index(&registry, "1", &[&others, &ours]).await;
    index(&registry, "none", &[&others]).await;
    let client = service.client();

    let pulled = pull(&client, &registry.address).await.expect(201);
    let none = client.post(PULL, &json!({ "reference": format!("{}/app:none", registry.address) })).await.problem(422, "invalid_request");
    let alone =
        client.post(PULL, &json!({ "reference": format!("{}/app:others", registry.address) })).await.problem(422, "invalid_request");

    assert_eq!(pulled["digest"], ours["digest"]);
    says_hello(&client, "app").await;
    assert!(none["detail"].as_str().unwrap().contains("no image of it for linux/"), "{none:#}");
    assert!(alone["detail"].as_str().unwrap().contains("s390x"), "{alone:#}");
}

/// The descriptor of what a tag names.
async fn described(registry: &Registry, tag: &str, architecture: &str) -> Value {
    let url = format!("http://{}/v2/app/manifests/{tag}", registry.address);
    let answer = reqwest::Client::new().get(url).header("accept", "application/vnd.oci.image.manifest.v1+json").send().await.unwrap();
    let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    let (digest, media_type) = (header("docker-content-digest"), header(CONTENT_TYPE.as_str()));
    let size = answer.bytes().await.unwrap().len();
    json!({ "mediaType": media_type, "digest": digest, "size": size, "platform": { "os": "linux", "architecture": architecture } })
}

async fn index(registry: &Registry, tag: &str, manifests: &[&Value]) {
    let media_type = "application/vnd.oci.image.index.v1+json";
    let document = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests });
    let request = reqwest::Client::new().put(format!("http://{}/v2/app/manifests/{tag}", registry.address));
    let answer = request.header(CONTENT_TYPE, media_type).body(document.to_string()).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 201, "{}", answer.text().await.unwrap());
}

#[tokio::test]
async fn a_registry_with_a_password_is_for_who_has_it() {
    let (service, registry) = (service(), Registry::start(Manners { password: true, ..Manners::default() }).unwrap());
    registry.push_archive(&busybox(), "app:1").unwrap();
    let client = service.client();
    let with = async |password: &str| {
        let credentials = json!({ "username": USER, "password": password });
        client.post(PULL, &json!({ "reference": format!("{}/app:1", registry.address), "name": "app", "credentials": credentials })).await
    };

    pull(&client, &registry.address).await.problem(403, "registry_denied");
    with("wrong").await.problem(403, "registry_denied");
    with(PASSWORD).await.expect(201);

    says_hello(&client, "app").await;
    assert!(!service.log().contains(PASSWORD), "{}", service.log());
}

#[tokio::test]
async fn credentials_that_a_tenant_keeps_are_used_for_its_pulls_and_told_to_nobody() {
    let (service, registry) = (service(), Registry::start(Manners { password: true, ..Manners::default() }).unwrap());
    registry.push_archive(&busybox(), "app:1").unwrap();
    let (client, other) = (service.client(), service.client());
    let login = |password: &str| json!({ "registry": registry.address, "username": USER, "password": password });
    let path = format!("/v1/registries/{}", registry.address);
    let image = format!("{}/app:1", registry.address);

    client.post("/v1/registries", &login("wrong")).await.expect(201);
    pull(&client, &registry.address).await.problem(403, "registry_denied");
    let kept = client.post("/v1/registries", &login(PASSWORD)).await;
    pull(&client, &registry.address).await.expect(201);
    let run = client.run(&json!({ "image": image, "command": ["echo", "pulled"], "pull": "missing" })).await;

    assert_eq!((kept.status, kept.header("location")), (201, path.as_str()));
    assert_eq!(client.get(&path).await.expect(200), kept.body);
    assert_eq!(client.get("/v1/registries").await.expect(200)["items"], json!([kept.body]));
    assert_eq!((&kept.body["username"], stdout(&run)), (&json!(USER), "pulled\n"));
    let events = client.get("/v1/events?kind=registry.*").await;
    assert_eq!(events.body["items"].as_array().unwrap().len(), 2, "{}", events.text);
    for said in [&kept.text, &events.text, &service.log()] {
        assert!(!said.contains(PASSWORD), "{said}");
    }
    // They are this tenant's alone, and of no use when they are forgotten.
    pull(&other, &registry.address).await.problem(403, "registry_denied");
    assert_eq!(client.delete(&path).await.status, 204);
    client.get(&path).await.problem(404, "not_found");
    pull(&client, &registry.address).await.problem(403, "registry_denied");
}

#[tokio::test]
async fn the_database_alone_opens_no_password() {
    let (folder, registry) = (service::folder().unwrap(), Registry::start(Manners { password: true, ..Manners::default() }).unwrap());
    registry.push_archive(&busybox(), "app:1").unwrap();
    let mut service = service();
    let login = json!({ "registry": registry.address, "username": USER, "password": PASSWORD });
    Client::of(service.place(), "acme").post("/v1/registries", &login).await.expect(201);
    let key = service.place().data_dir.join("registry-key");
    let aside = folder.path().join("key");
    fs::copy(&key, &aside).unwrap();

    service.stop().unwrap();
    fs::remove_file(&key).unwrap();
    service.start_again().unwrap();
    let problem = pull(&Client::of(service.place(), "acme"), &registry.address).await.problem(403, "registry_denied");
    service.stop().unwrap();
    fs::copy(&aside, &key).unwrap();
    service.start_again().unwrap();

    assert!(problem["detail"].as_str().unwrap().contains("give them again"), "{problem:#}");
    pull(&Client::of(service.place(), "acme"), &registry.address).await.expect(201);
}

#[tokio::test]
async fn a_registry_with_tls_is_believed_by_the_operators_authority_alone() {
    let registry = Registry::start(Manners { tls: true, password: false }).unwrap();
    registry.push_archive(&busybox(), "app:1").unwrap();
    let certificate = registry.certificate().display().to_string();
    let (trusting, doubting) = (Service::start_with(&[&OWN[..], &["--registry-ca-file", &certificate]].concat()).unwrap(), service());
    let client = trusting.client();

    pull(&client, &registry.address).await.expect(201);
    let doubt = doubting.client().post(PULL, &json!({ "reference": format!("{}/app:1", registry.address) })).await;

    says_hello(&client, "app").await;
    doubt.problem(502, "registry_failed");
}

#[tokio::test]
async fn what_a_registry_does_not_have_is_not_found() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    let client = service.client();

    let problem = pull(&client, &registry.address).await.problem(404, "image_not_found");

    assert!(problem["detail"].as_str().unwrap().contains(&registry.address), "{problem:#}");
}

#[tokio::test]
async fn a_tenants_pulled_image_is_that_tenants_alone_and_an_admins_is_for_all() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    registry.push_archive(&busybox(), "app:1").unwrap();
    let (mine, other) = (service.client(), service.client());

    pull(&mine, &registry.address).await.expect(201);
    let before = other.get("/v1/images/app").await;
    let run = other.post("/v1/runs", &json!({ "image": "app" })).await;
    let shared = pull(&Client::admin(service.place()), &registry.address).await.expect(201);

    before.problem(404, "image_not_found");
    run.problem(404, "image_not_found");
    assert_eq!(shared["shared"], true);
    says_hello(&other, "app").await;
}

#[tokio::test]
async fn progress_is_told_in_lines_or_events_and_ends_with_the_image() {
    let (folder, go_on) = (service::folder().unwrap(), Arc::new(Notify::new()));
    let layout = layout(folder.path());
    let (service, slow) = (patient_service(), Liar::start(&layout, Manner::Waits(Arc::clone(&go_on))).await);
    let (client, quick) = (service.client(), Liar::start(&layout, Manner::Honest).await);
    let request = client.request(Method::POST, PULL).header("accept", "application/x-ndjson");
    let request = request.json(&json!({ "reference": format!("{}/app:1", slow.address), "name": "app" }));

    let mut answer = request.send().await.unwrap();
    let mut text = String::new();
    while !text.contains("\"downloading\"") {
        let chunk = tokio::time::timeout(SOON, answer.chunk()).await.expect("something is told").unwrap().expect("more is told");
        text += std::str::from_utf8(&chunk).unwrap();
    }
    let halfway: Value = serde_json::from_str(text.lines().next_back().unwrap()).unwrap();
    go_on.notify_one();
    let rest = answer.text().await.unwrap();
    let request = client.request(Method::POST, PULL).header("accept", "text/event-stream");
    let request = request.json(&json!({ "reference": format!("{}/app:1", quick.address), "name": "again" }));
    let events = client.send(request, "POST", PULL).await;

    let last: Value = serde_json::from_str(rest.lines().next_back().unwrap()).unwrap();
    assert_eq!(last["image"], client.get("/v1/images/app").await.expect(200));
    assert!(halfway["progress"]["bytes"].as_u64() < halfway["progress"]["total_bytes"].as_u64(), "{halfway:#}");
    assert_eq!(halfway["progress"]["layers"].as_array().unwrap().len(), layers_of(&layout), "{halfway:#}");
    assert_eq!(events.header("content-type"), "text/event-stream");
    assert!(
        events.text.starts_with("data: {\"progress\"") && events.text.trim_end().lines().next_back().unwrap().contains("\"image\""),
        "{}",
        events.text
    );
}

/// How many layers the image has.
fn layers_of(layout: &Path) -> usize {
    let read = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let index = read(&layout.join("index.json"));
    let digest = index["manifests"][0]["digest"].as_str().unwrap().trim_start_matches("sha256:");
    read(&layout.join("blobs/sha256").join(digest))["layers"].as_array().unwrap().len()
}

#[tokio::test]
async fn a_pull_that_fails_is_told_as_a_problem_in_the_stream() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());

    let lines = pull_in_lines(&service.client(), &registry.address).await;

    let problem = &lines.last().unwrap()["problem"];
    assert_eq!((&problem["status"], &problem["code"]), (&json!(404), &json!("image_not_found")), "{lines:#?}");
    assert!(!problem["request_id"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn who_pulls_the_same_image_at_one_time_shares_one_download() {
    let (folder, go_on) = (service::folder().unwrap(), Arc::new(Notify::new()));
    let (service, liar) = (patient_service(), Liar::start(&layout(folder.path()), Manner::Waits(Arc::clone(&go_on))).await);
    let client = service.client();
    let ask = async |client: &Client| {
        let request = client.request(Method::POST, PULL).header("accept", "application/x-ndjson");
        // The head comes when the pull was begun, or joined.
        request.json(&json!({ "reference": format!("{}/app:1", liar.address), "name": "app" })).send().await.unwrap()
    };

    let (first, second) = (ask(&client).await, ask(&client).await);
    let deadline = Instant::now() + SOON;
    while liar.asked_for_layer().is_empty() {
        assert!(Instant::now() < deadline, "nobody asked for the layer: {:?}", liar.asked());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    go_on.notify_one();
    let (first, second) = (first.text().await.unwrap(), second.text().await.unwrap());

    let image = |text: &str| serde_json::from_str::<Value>(text.lines().next_back().unwrap()).unwrap()["image"].clone();
    assert_eq!((image(&first), image(&first)["reference"].clone()), (image(&second), json!("app")), "{first}\n{second}");
    assert_eq!(liar.asked_for_layer().len(), 1, "{:#?}", liar.asked());
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_end_its_pull() {
    let (folder, go_on) = (service::folder().unwrap(), Arc::new(Notify::new()));
    let (service, liar) = (patient_service(), Liar::start(&layout(folder.path()), Manner::Waits(Arc::clone(&go_on))).await);
    let client = service.client();
    let request = client.request(Method::POST, PULL).header("accept", "application/x-ndjson");
    let request = request.json(&json!({ "reference": format!("{}/app:1", liar.address), "name": "app" }));

    drop(request.send().await.unwrap());
    go_on.notify_one();

    let deadline = Instant::now() + SOON;
    while client.get("/v1/images/app").await.status != 200 {
        assert!(Instant::now() < deadline, "the image did not come: {}", service.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn a_registry_that_is_busy_is_asked_again_when_it_says() {
    let (_service, client, liar, answer) = pulled_from(Manner::Answers(1, "429 Too Many Requests\r\nretry-after: 3")).await;

    answer.expect(201);
    let asked = liar.asked_for_layer();
    assert_eq!(asked.len(), 2, "{asked:#?}");
    assert!(asked[1].at - asked[0].at >= Duration::from_secs(3), "{asked:#?}");
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn a_registry_that_is_away_for_a_moment_is_asked_again() {
    let (_service, client, liar, answer) = pulled_from(Manner::Answers(2, "503 Service Unavailable")).await;

    answer.expect(201);
    assert_eq!(liar.asked_for_layer().len(), 3, "{:#?}", liar.asked());
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn a_layer_that_breaks_off_is_gone_on_with() {
    let (_service, client, liar, answer) = pulled_from(Manner::Resets).await;

    answer.expect(201);
    let asked = liar.asked_for_layer();
    assert_eq!((asked.len(), asked[0].header("range")), (2, ""), "{asked:#?}");
    assert!(asked[1].header("range").starts_with("bytes=") && asked[1].header("range") != "bytes=0-", "{asked:#?}");
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn a_layer_that_stalls_is_gone_on_with() {
    let (_service, client, liar, answer) = pulled_from(Manner::Stalls).await;

    answer.expect(201);
    assert_eq!(liar.asked_for_layer().len(), 2, "{:#?}", liar.asked());
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn a_layer_that_can_only_begin_again_does_so() {
    let (_service, client, liar, answer) = pulled_from(Manner::StartsOver).await;

    answer.expect(201);
    assert_eq!(liar.asked_for_layer().len(), 2, "{:#?}", liar.asked());
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn a_layer_that_is_refused_from_the_middle_on_is_begun_again() {
    let (_service, client, liar, answer) = pulled_from(Manner::RefusesRanges).await;

    answer.expect(201);
    let asked = liar.asked_for_layer();
    let ranges: Vec<_> = asked.iter().map(|asked| asked.header("range")).collect();
    assert!(matches!(ranges[..], ["", middle, ""] if middle.starts_with("bytes=")), "{ranges:?}");
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn content_of_another_digest_is_refused_and_leaves_nothing() {
    let (service, client, _liar, answer) = pulled_from(Manner::OtherContent).await;

    let problem = answer.problem(502, "registry_failed");

    assert!(problem["detail"].as_str().unwrap().contains("digest"), "{problem:#}");
    client.get("/v1/images/app").await.problem(404, "image_not_found");
    assert_eq!(blobs(&service), 0);
    assert_eq!(fs::read_dir(service.place().data_dir.join("uploads")).unwrap().count(), 0);
}

#[tokio::test]
async fn content_of_another_size_is_refused_as_soon_as_that_is_seen() {
    for manner in [Manner::Shorter, Manner::Endless] {
        let (service, _client, liar, answer) = pulled_from(manner.clone()).await;

        let problem = answer.problem(502, "registry_failed");

        assert!(problem["detail"].as_str().unwrap().contains("bytes"), "{manner:?}: {problem:#}");
        assert_eq!((liar.asked_for_layer().len(), blobs(&service)), (1, 0), "{manner:?}");
    }
}

/// How many are kept.
fn blobs(service: &Service) -> usize {
    fs::read_dir(service.place().data_dir.join("blobs/sha256")).unwrap().count()
}

#[tokio::test]
async fn a_token_is_fetched_with_the_credentials_and_told_to_nobody_else() {
    let (service, folder) = (service(), service::folder().unwrap());
    let layout = layout(folder.path());
    let storage = Liar::start(&layout, Manner::Honest).await;
    // `me:secret`
    let manner = Manner::WantsToken { basic: "bWU6c2VjcmV0", storage: format!("http://{}/{}", storage.address, storage_path(&layout)) };
    let liar = Liar::start(&layout, manner).await;
    let client = service.client();
    let pull_with = async |address: &str, password: &str| {
        let credentials = json!({ "username": "me", "password": password });
        client.post(PULL, &json!({ "reference": format!("{address}/app:1"), "name": "app", "credentials": credentials })).await
    };

    pull_with(&liar.address, "wrong").await.problem(403, "registry_denied");
    pull_with(&liar.address, "secret").await.expect(201);

    let token = liar.asked().into_iter().rfind(|asked| asked.path.starts_with("/token")).unwrap();
    assert!(token.path.contains("service=liar") && token.path.contains("scope=repository%3Aapp%3Apull"), "{token:?}");
    assert_eq!(storage.asked_for_layer().len(), 1);
    assert!(storage.asked().iter().all(|asked| asked.header("authorization").is_empty()), "{:#?}", storage.asked());
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn what_a_registry_denies_to_whom_it_gave_a_token_may_not_be_there() {
    let (_service, client, liar, answer) = pulled_from(Manner::KnowsNobody).await;

    let problem = answer.problem(403, "registry_denied");

    assert!(problem["detail"].as_str().unwrap().contains("has no app, or not for these credentials"), "{problem:#}");
    assert_eq!(liar.asked().iter().filter(|asked| asked.header("authorization") == "Bearer right").count(), 1, "{:#?}", liar.asked());
    client.get("/v1/images/app").await.problem(404, "image_not_found");
}

/// Where a storage has the largest layer.
fn storage_path(layout: &Path) -> String {
    let largest = fs::read_dir(layout.join("blobs/sha256")).unwrap().flatten().max_by_key(|blob| blob.metadata().unwrap().len()).unwrap();
    format!("storage/sha256:{}", largest.file_name().to_str().unwrap())
}

#[tokio::test]
async fn no_registry_leads_us_to_where_only_we_can_reach() {
    let (service, folder) = (service(), service::folder().unwrap());
    let (client, layout) = (service.client(), layout(folder.path()));
    for target in [
        "http://169.254.169.254/latest",
        "https://10.0.0.1/secret",
        "https://[fd00::1]/secret",
        "http://registry.example/a",
        "https://127.0.0.1:22/a",
        "file:///etc/passwd",
    ] {
        for manner in [Manner::Redirects(target.to_owned()), Manner::SendsForToken(target)] {
            let liar = Liar::start(&layout, manner).await;

            pull(&client, &liar.address).await.problem(422, "invalid_request");
        }
    }
}

#[tokio::test]
async fn a_private_registry_is_asked_only_where_the_operator_says_so() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let port = liar.address.rsplit(':').next().unwrap();
    let nothing_said = Service::start_with(&[]).unwrap();
    let client = nothing_said.client();
    let names = [
        liar.address.clone(),
        format!("localhost:{port}"),
        format!("0x7f.1:{port}"),
        "169.254.169.254".to_owned(),
        "10.0.0.1:5000".to_owned(),
    ];
    for name in names {
        let problem =
            client.post(PULL, &json!({ "reference": format!("{name}/app:1"), "name": "app" })).await.problem(422, "invalid_request");

        assert!(problem["detail"].as_str().unwrap().contains("public"), "{name}: {problem:#}");
    }
    assert!(liar.asked().is_empty(), "{:#?}", liar.asked());
    drop(nothing_said);

    // The control.
    let service = service();
    pull(&service.client(), &liar.address).await.expect(201);
}

#[tokio::test]
async fn of_registries_only_those_are_asked_that_the_operator_names() {
    let folder = service::folder().unwrap();
    let layout = layout(folder.path());
    let (named, other) = (Liar::start(&layout, Manner::Honest).await, Liar::start(&layout, Manner::Honest).await);
    let service = Service::start_with(&[&OWN[..], &["--registry-hosts", &named.address]].concat()).unwrap();
    let client = service.client();

    let refused = pull(&client, &other.address).await.problem(422, "invalid_request");
    let usual = client.post(PULL, &json!({ "reference": "python" })).await.problem(422, "invalid_request");
    pull(&client, &named.address).await.expect(201);

    assert_eq!((refused["field"].as_str(), usual["field"].as_str()), (Some("reference"), Some("reference")));
    assert!(other.asked().is_empty());
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_the_registry_for_what_it_lacks() {
    let (folder, mirror) = (service::folder().unwrap(), Registry::start(Manners::default()).unwrap());
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let both = format!("{}={}", liar.address, mirror.address);
    let service = Service::start_with(&[&OWN[..], &["--registry-mirror", &both]].concat()).unwrap();
    let client = service.client();

    pull(&client, &liar.address).await.expect(201);
    let without = liar.asked_for_layer().len();
    mirror.push_archive(&busybox(), "app:1").unwrap();
    let request = json!({ "reference": format!("{}/app:1", liar.address), "name": "from-the-mirror" });
    client.post(PULL, &request).await.expect(201);

    assert_eq!((without, liar.asked_for_layer().len()), (1, 1), "{:#?}", liar.asked());
    says_hello(&client, "from-the-mirror").await;
}

#[tokio::test]
async fn a_mirror_that_answers_what_is_no_image_is_passed_over() {
    let folder = service::folder().unwrap();
    let layout = layout(folder.path());
    let (mirror, liar) = (Liar::start(&layout, Manner::Page).await, Liar::start(&layout, Manner::Honest).await);
    let both = format!("{}={}", liar.address, mirror.address);
    let service = Service::start_with(&[&OWN[..], &["--registry-mirror", &both]].concat()).unwrap();
    let client = service.client();

    pull(&client, &liar.address).await.expect(201);

    assert!(mirror.asked().iter().any(|asked| asked.path.contains("/manifests/")), "{:#?}", mirror.asked());
    says_hello(&client, "app").await;
    // The control: of the registry itself that is an answer.
    pull(&client, &mirror.address).await.problem(422, "invalid_request");
}

#[tokio::test]
async fn what_was_pulled_goes_for_room_when_nothing_uses_it_and_nothing_else_does() {
    let folder = service::folder().unwrap();
    // What an imported image is, too, stays for that.
    image::variant(&busybox(), &folder.path().join("used"), &["--config.env", "WHICH=used"]).unwrap();
    let liar = Liar::start(&folder.path().join("used"), Manner::Honest).await;
    // To this service the disk is always full.
    let full = ["--image-gc-high-water", "0", "--image-gc-idle-hours", "0"];
    let service = Service::start_with(&[&OWN[..], &full].concat()).unwrap();
    service.import("busybox").unwrap();
    let client = service.client();
    let image = format!("{}/app:1", liar.address);
    let asked = json!({ "image": image, "command": ["sleep", "1000"], "pull": "missing" });
    let sandbox = client.post("/v1/sandboxes", &asked).await.expect(201)["id"].as_str().unwrap().to_owned();
    pull(&client, &liar.address).await.expect(201);
    client.until(&format!("/v1/sandboxes/{sandbox}"), |sandbox| sandbox["state"] == "running").await;

    // A further image that nothing is made of goes: somebody has looked.
    let other = service::folder().unwrap();
    image::variant(&busybox(), other.path(), &["--config.env", "WHICH=other"]).unwrap();
    let second = Liar::start(other.path(), Manner::Honest).await;
    client.post(PULL, &json!({ "reference": format!("{}/app:1", second.address), "name": "idle" })).await.expect(201);
    let gone = async |name: &str| {
        let deadline = Instant::now() + 3 * SOON;
        while client.get(&format!("/v1/images/{name}")).await.status != 404 {
            assert!(Instant::now() < deadline, "{name} stays: {}", service.log());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    gone("idle").await;
    let used = client.get("/v1/images/app").await.status;
    assert_eq!(client.delete(&format!("/v1/sandboxes/{sandbox}")).await.status, 204);
    gone("app").await;

    assert_eq!(used, 200);
    says_hello(&client, "busybox").await;
    let events = client.get("/v1/events?kind=image.removed").await.expect(200);
    let reasons: Vec<_> = events["items"].as_array().unwrap().iter().filter(|event| event["data"]["reason"] == "unused").collect();
    assert_eq!(reasons.len(), 3, "{events:#}");
    let metrics = reqwest::get(format!("{}/metrics", service.place().metrics_url)).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("mayfly_images_collected_total 3"), "{metrics}");
}

#[tokio::test]
async fn a_pulled_image_that_an_imported_one_holds_on_to_does_not_go_for_room() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let full = ["--image-gc-high-water", "0", "--image-gc-idle-hours", "0"];
    let service = Service::start_with(&[&OWN[..], &full].concat()).unwrap();
    service.import("busybox").unwrap();
    let client = service.client();
    let pulled = pull(&client, &liar.address).await.expect(201);
    let imported = client.get("/v1/images/busybox").await.expect(200);

    // Somebody looks, and finds another one.
    let other = folder.path().join("other");
    image::variant(&busybox(), &other, &["--config.env", "WHICH=other"]).unwrap();
    let second = Liar::start(&other, Manner::Honest).await;
    client.post(PULL, &json!({ "reference": format!("{}/app:1", second.address), "name": "idle" })).await.expect(201);
    let deadline = Instant::now() + 3 * SOON;
    while client.get("/v1/images/idle").await.status != 404 {
        assert!(Instant::now() < deadline, "it stays: {}", service.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    assert_eq!(pulled["digest"], imported["digest"]);
    assert_eq!(client.get("/v1/images/app").await.expect(200), pulled);
}

#[tokio::test]
async fn what_a_node_has_no_files_of_is_pulled_there_again() {
    let folder = service::folder().unwrap();
    let (service, liar) = (service(), Liar::start(&layout(folder.path()), Manner::Honest).await);
    let client = service.client();
    let image = format!("{}/app:1", liar.address);
    let request = json!({ "reference": image });
    let first = client.post(PULL, &request).await.expect(201);
    let root = service.place().data_dir.join("images").join(first["digest"].as_str().unwrap().trim_start_matches("sha256:"));
    // As on a node that did not pull it.
    let lose = |to: &str| fs::rename(&root, root.with_file_name(to)).unwrap();

    lose("trash-one");
    let run = client.run(&json!({ "image": image, "command": ["echo", "pulled"], "pull": "missing" })).await;
    let after_run = root.exists();
    lose("trash-two");
    let second = client.post(PULL, &request).await.expect(201);
    let after_pull = root.exists();
    let third = client.post(PULL, &request).await.expect(201);

    assert_eq!((stdout(&run), after_run, after_pull), ("pulled\n", true, true), "{run:#}");
    assert_eq!((&second["digest"], &third["digest"]), (&first["digest"], &first["digest"]));
    // Of what is here it is known that somebody wants it.
    assert_ne!(third["created_at"], second["created_at"]);
    says_hello(&client, &image).await;
}

#[tokio::test]
async fn a_disk_that_is_short_takes_no_pulled_image_but_an_operators() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let service = Service::start_with(&[&OWN[..], &["--disk-reserve-percent", "100"]].concat()).unwrap();
    let image = format!("{}/app:1", liar.address);

    let refused = pull(&service.client(), &liar.address).await.problem(503, "no_capacity");
    service.client().post("/v1/runs", &json!({ "image": image, "pull": "missing" })).await.problem(503, "no_capacity");
    let untouched = liar.asked().is_empty();
    pull(&Client::admin(service.place()), &liar.address).await.expect(201);

    assert!(untouched && refused["detail"].as_str().unwrap().contains("disk"), "{refused:#}");
}

#[tokio::test]
async fn a_pulled_image_counts_against_the_quota() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let service = Service::start_with(&[&OWN[..], &["--tenant-quotas", r#"{"image_bytes": 1000}"#]].concat()).unwrap();

    let problem = pull(&service.client(), &liar.address).await.problem(429, "quota_exceeded");

    assert_eq!(problem["quota"], "image_bytes");
    assert_eq!(blobs(&service), 0);
}

#[tokio::test]
async fn a_pull_with_a_key_has_one_effect_and_one_answer() {
    let folder = service::folder().unwrap();
    let (service, liar) = (service(), Liar::start(&layout(folder.path()), Manner::Honest).await);
    let client = service.client();
    let ask = async || {
        // One answer at the end, whatever is accepted.
        let request = client.request(Method::POST, PULL).header("idempotency-key", "one").header("accept", "application/x-ndjson");
        let request = request.json(&json!({ "reference": format!("{}/app:1", liar.address), "name": "app" }));
        client.send(request, "POST", PULL).await
    };

    let (first, second) = (ask().await, ask().await);

    assert_eq!(second.header("idempotency-replayed"), "true");
    assert_eq!(first.expect(201), second.expect(201));
    assert_eq!(liar.asked_for_layer().len(), 1);
}

#[tokio::test]
async fn a_pull_that_found_nothing_finds_what_was_pushed_since_under_the_same_key() {
    let (service, registry) = (service(), Registry::start(Manners::default()).unwrap());
    let client = service.client();
    let ask = async || {
        let request = client.request(Method::POST, PULL).header("idempotency-key", "one");
        let request = request.json(&json!({ "reference": format!("{}/app:1", registry.address), "name": "app" }));
        client.send(request, "POST", PULL).await
    };

    ask().await.problem(404, "image_not_found");
    registry.push_archive(&busybox(), "app:1").unwrap();
    let (second, third) = (ask().await, ask().await);

    assert_eq!((second.header("idempotency-replayed"), third.header("idempotency-replayed")), ("", "true"));
    assert_eq!(second.expect(201), third.expect(201));
}

#[tokio::test]
async fn a_run_has_its_image_pulled_where_it_asks_for_that() {
    let folder = service::folder().unwrap();
    let (service, liar) = (service(), Liar::start(&layout(folder.path()), Manner::Honest).await);
    let (client, other) = (service.client(), service.client());
    let image = format!("{}/app:1", liar.address);
    let asked = |pull: &str| json!({ "image": image, "command": ["echo", "pulled"], "pull": pull });
    let runs_alone = Client::with_scope(service.place(), "no-images", "runs images:read");

    client.post("/v1/runs", &asked("never")).await.problem(404, "image_not_found");
    runs_alone.post("/v1/runs", &asked("missing")).await.problem(403, "forbidden");
    let untouched = liar.asked().is_empty();
    let first = client.run(&asked("missing")).await;
    let after_first = liar.asked_for_layer().len();
    let second = client.run(&asked("missing")).await;
    let after_second = liar.asked().len();
    let third = client.run(&asked("always")).await;

    assert!(untouched);
    for run in [&first, &second, &third] {
        assert_eq!(stdout(run), "pulled\n", "{run:#}");
    }
    // Whoever pulls always asks what there is, and fetches nothing that is here under that name.
    assert_eq!((after_first, liar.asked_for_layer().len()), (1, 1));
    assert!(liar.asked().len() > after_second, "{:#?}", liar.asked());
    other.get(&format!("/v1/images/{image}")).await.problem(404, "image_not_found");
}

#[tokio::test]
async fn a_start_from_a_pulled_image_costs_what_one_from_an_imported_image_does() {
    let folder = service::folder().unwrap();
    let changed = folder.path().join("changed");
    image::variant(&busybox(), &changed, &["--config.env", "WHICH=pulled"]).unwrap();
    let (service, liar) = (service(), Liar::start(&changed, Manner::Honest).await);
    service.import("busybox").unwrap();
    let client = service.client();
    let pulled = pull(&client, &liar.address).await.expect(201);
    assert_ne!(pulled["digest"], client.get("/v1/images/busybox").await.expect(200)["digest"], "they would have one root");
    let launch = async |image: &str| {
        let run = client.run(&json!({ "image": image, "command": ["true"] })).await;
        run["outcome"]["phases_ms"]["launch"].as_f64().unwrap()
    };
    // The first one of each may find nothing ready.
    launch("busybox").await;
    launch("app").await;

    let (mut of_imported, mut of_pulled) = (Vec::new(), Vec::new());
    // One after the other, so that whatever else the machine does is borne by both.
    for _ in 0..40 {
        of_imported.push(launch("busybox").await);
        of_pulled.push(launch("app").await);
    }

    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (imported, pulled) = (median(&mut of_imported), median(&mut of_pulled));
    assert!(pulled < 1.5 * imported + 1.0, "{pulled} ms from a pulled image, {imported} ms from an imported one");
}

#[tokio::test]
async fn what_a_tenant_may_use_anyway_is_not_fetched_again_and_what_another_has_is() {
    let (folder, other_folder) = (service::folder().unwrap(), service::folder().unwrap());
    let layout = layout(folder.path());
    let changed = other_folder.path().join("changed");
    image::variant(&busybox(), &changed, &["--config.env", "WHICH=second"]).unwrap();
    let (service, first) = (service(), Liar::start(&layout, Manner::Honest).await);
    // The same layers with another configuration, elsewhere: to whom they are known, it does not matter from where.
    let second = Liar::start(&changed, Manner::Honest).await;
    let (client, other, admin) = (service.client(), service.client(), Client::admin(service.place()));
    let from_second = async |client: &Client| {
        let request = client.request(Method::POST, PULL).header("accept", "application/x-ndjson");
        let request = request.json(&json!({ "reference": format!("{}/app:1", second.address), "name": "second" }));
        client.send(request, "POST", PULL).await
    };

    pull(&client, &first.address).await.expect(201);
    let own = from_second(&client).await;
    let after_own = second.asked_for_layer().len();
    // Nobody else's, also not for all.
    from_second(&admin).await;
    let after_admins = second.asked_for_layer().len();
    let shared = from_second(&other).await;

    assert_eq!((after_own, after_admins, second.asked_for_layer().len()), (0, 1, 1), "{:#?}", second.asked());
    for text in [&own.text, &shared.text] {
        assert!(text.trim_end().lines().next_back().unwrap().contains("\"image\""), "{text}");
    }
    let env = client.run(&json!({ "image": "second", "command": ["sh", "-c", "echo $WHICH"] })).await;
    assert_eq!(stdout(&env), "second\n");
    // Of a tenant that has neither: there is a shared one now, so only the control tells that it would be fetched.
    let stranger = Service::start_with(&OWN).unwrap();
    let control = stranger.client().post(PULL, &json!({ "reference": format!("{}/app:1", second.address), "name": "second" })).await;
    control.expect(201);
    assert_eq!(second.asked_for_layer().len(), 2);
}

#[tokio::test]
async fn a_tenants_layer_is_no_other_tenants() {
    let folder = service::folder().unwrap();
    let (service, liar) = (service(), Liar::start(&layout(folder.path()), Manner::Honest).await);
    let (client, other) = (service.client(), service.client());

    pull(&client, &liar.address).await.expect(201);
    pull(&other, &liar.address).await.expect(201);

    assert_eq!(liar.asked_for_layer().len(), 2, "{:#?}", liar.asked());
}

#[tokio::test]
async fn a_tag_that_moved_is_followed_by_who_pulls_always_and_by_nobody_else() {
    let (service, registry, folder) = (service(), Registry::start(Manners::default()).unwrap(), service::folder().unwrap());
    let changed = folder.path().join("changed");
    image::variant(&busybox(), &changed, &["--config.env", "WHICH=second"]).unwrap();
    registry.push_archive(&busybox(), "app:1").unwrap();
    let client = service.client();
    let which = async |pull: &str| {
        let image = format!("{}/app:1", registry.address);
        let run = client.run(&json!({ "image": image, "command": ["sh", "-c", "echo ${WHICH:-first}"], "pull": pull })).await;
        stdout(&run).to_owned()
    };

    let first = which("missing").await;
    registry.push(&format!("oci:{}:latest", changed.display()), "app:1", &[]).unwrap();
    let missing = which("missing").await;
    let always = which("always").await;

    assert_eq!((first.as_str(), missing.as_str(), always.as_str()), ("first\n", "first\n", "second\n"));
}

#[tokio::test]
async fn a_sandbox_has_its_image_pulled_and_one_of_many_runs_does_not() {
    let folder = service::folder().unwrap();
    let (service, liar) = (service(), Liar::start(&layout(folder.path()), Manner::Honest).await);
    let client = service.client();
    let asked = json!({ "image": format!("{}/app:1", liar.address), "command": ["sleep", "60"], "pull": "missing" });

    let refused = client.post("/v1/runs/batch", &json!({ "runs": [asked] })).await.expect(200);
    client.post("/v1/sandboxes", &asked).await.expect(201);
    let private =
        client.post("/v1/sandboxes", &json!({ "image": "10.0.0.1:5000/app", "pull": "always" })).await.problem(422, "invalid_request");

    assert_eq!(refused["items"][0]["problem"]["field"], "runs[0].pull");
    assert_eq!((liar.asked_for_layer().len(), private["field"].as_str()), (1, Some("image")));
}

#[tokio::test]
async fn the_command_line_pulls_for_all_tenants_and_says_why_it_does_not() {
    let (service, registry) = (service(), Registry::start(Manners { password: true, ..Manners::default() }).unwrap());
    registry.push_archive(&busybox(), "app:1").unwrap();
    let folder = service::folder().unwrap();
    let password = folder.path().join("password");
    fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    let admin = token::sign(&token::claims("operator", "admin"), &service.place().secret_file());
    let image = format!("{}/app:1", registry.address);
    let command = || {
        let mut command = mayfly();
        command.args(["image", "pull", &image, "--name", "app", "--url", &service.place().url, "--token", &admin]);
        command
    };

    let (refused, why) = finish(&mut command(), SOON).unwrap();
    let (pulled, said) = finish(command().args(["--username", USER, "--password-file"]).arg(&password), SOON).unwrap();

    assert!(!refused.success() && why.contains("registry_denied"), "{why}");
    assert!(pulled.success() && said.starts_with("app sha256:"), "{said}");
    says_hello(&service.client(), "app").await;
}

#[tokio::test]
async fn a_service_that_dies_in_a_pull_leaves_nothing_and_can_pull_again() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let mut service = service();
    let tenant = "tenant-of-a-service-that-dies";
    service.stop().unwrap();
    service.arm("service.pull.fetched=return");
    service.start_again().unwrap();
    let body = json!({ "reference": format!("{}/app:1", liar.address), "name": "app" });

    let cut_off = Client::of(service.place(), tenant).try_post(PULL, &body).await;
    service.wait().unwrap();
    service.arm("");
    service.start_again().unwrap();
    let left = blobs(&service);
    let asked_before = liar.asked_for_layer().len();
    let client = Client::of(service.place(), tenant);
    let before = client.get("/v1/images/app").await;
    client.post(PULL, &body).await.expect(201);

    assert!(cut_off.is_err(), "{cut_off:?}");
    before.problem(404, "image_not_found");
    assert_eq!(left, 0);
    // What had come to its end need not come again.
    assert_eq!((asked_before, liar.asked_for_layer().len(), parts(&service)), (1, 1, Vec::new()));
    says_hello(&client, "app").await;
}

/// What is kept of layers on their way, by its length.
fn parts(service: &Service) -> Vec<u64> {
    let entries = fs::read_dir(service.place().data_dir.join("pulls")).unwrap().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).collect()
}

#[tokio::test]
async fn a_layer_that_a_killed_service_was_fetching_is_gone_on_with_by_its_successor() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Stalls).await;
    let mut service = patient_service();
    let tenant = "tenant-of-a-service-that-is-killed";
    let body = json!({ "reference": format!("{}/app:1", liar.address), "name": "app" });
    let cut_off = tokio::spawn({
        let (client, body) = (Client::of(service.place(), tenant), body.clone());
        async move { client.try_post(PULL, &body).await.is_err() }
    });
    let deadline = Instant::now() + SOON;
    while parts(&service).iter().max().is_none_or(|bytes| *bytes < 1 << 20) {
        assert!(Instant::now() < deadline, "nothing is kept: {:?}", parts(&service));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    service.kill();
    assert!(cut_off.await.unwrap());
    service.start_again().unwrap();
    let stranger = Client::of(service.place(), "another-tenant");
    stranger.post(PULL, &body).await.expect(201);
    let client = Client::of(service.place(), tenant);
    client.post(PULL, &body).await.expect(201);

    let ranges: Vec<_> = liar.asked_for_layer().iter().map(|asked| asked.header("range").to_owned()).collect();
    // Another tenant's beginning is nobody else's.
    assert_eq!((ranges.len(), ranges[0].as_str(), ranges[1].as_str()), (3, "", ""), "{ranges:?}");
    assert!(ranges[2].starts_with("bytes=") && ranges[2] != "bytes=0-", "{ranges:?}");
    assert_eq!(parts(&service), Vec::<u64>::new());
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn what_was_kept_of_a_layer_and_is_damaged_is_fetched_anew() {
    let folder = service::folder().unwrap();
    let liar = Liar::start(&layout(folder.path()), Manner::Honest).await;
    let mut service = service();
    let tenant = "tenant-of-a-bad-disk";
    service.stop().unwrap();
    service.arm("service.pull.fetched=return");
    service.start_again().unwrap();
    let body = json!({ "reference": format!("{}/app:1", liar.address), "name": "app" });
    assert!(Client::of(service.place(), tenant).try_post(PULL, &body).await.is_err());
    service.wait().unwrap();
    let largest = fs::read_dir(service.place().data_dir.join("pulls")).unwrap().flatten().max_by_key(|part| part.metadata().unwrap().len());
    let largest = largest.expect("a part is kept").path();
    let mut bytes = fs::read(&largest).unwrap();
    bytes[1000] ^= 1;
    bytes.truncate(bytes.len() - 1);
    fs::write(&largest, bytes).unwrap();
    service.arm("");
    service.start_again().unwrap();
    let client = Client::of(service.place(), tenant);

    client.post(PULL, &body).await.expect(201);

    assert_eq!(liar.asked_for_layer().len(), 3, "{:#?}", liar.asked());
    says_hello(&client, "app").await;
}

#[tokio::test]
async fn two_images_of_a_tenant_at_one_repository_share_the_layers_that_are_fetched() {
    let (folder, go_on) = (service::folder().unwrap(), Arc::new(Notify::new()));
    let (service, liar) = (patient_service(), Liar::start(&layout(folder.path()), Manner::Waits(Arc::clone(&go_on))).await);
    let client = service.client();
    let ask = async |tag: &str| {
        let request = client.request(Method::POST, PULL).header("accept", "application/x-ndjson");
        // The head comes when the pull was begun.
        request.json(&json!({ "reference": format!("{}/app:{tag}", liar.address), "name": tag })).send().await.unwrap()
    };

    let (first, second) = (ask("one").await, ask("two").await);
    let deadline = Instant::now() + SOON;
    while liar.asked().iter().filter(|asked| asked.path.contains("/manifests/")).count() < 2 || liar.asked_for_layer().is_empty() {
        assert!(Instant::now() < deadline, "both are not under way: {:?}", liar.asked());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    go_on.notify_one();
    let (first, second) = (first.text().await.unwrap(), second.text().await.unwrap());

    assert!(first.contains("\"image\"") && second.contains("\"image\""), "{first}\n{second}");
    assert_eq!(liar.asked_for_layer().len(), 1, "{:#?}", liar.asked());
    says_hello(&client, "one").await;
    says_hello(&client, "two").await;
}
