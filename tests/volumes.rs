//! Volumes: what is written there outlives sandboxes, services and keepers, is nobody else's, and is gone when it is deleted.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{path::Path, time::Duration};

use mayfly_tests::{
    Answer, Client, Service, host,
    outcome::{assert_exit, assert_reason, stdout},
    postgres::Database,
    service::shared,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};

const SIZE: u64 = 16 << 20;
const SOON: Duration = Duration::from_secs(60);

async fn make(client: &Client, name: &str) -> Value {
    client.post("/v1/volumes", &json!({ "name": name, "size_bytes": SIZE })).await.expect(201)
}

/// A run of this script with these volumes.
async fn run(client: &Client, script: &str, volumes: Value) -> Value {
    client.run(&json!({ "image": "busybox", "command": ["sh", "-c", script], "volumes": volumes })).await
}

fn at(name: &str, path: &str) -> Value {
    json!([{ "name": name, "path": path }])
}

async fn send(client: &Client, key: &str, body: &Value) -> Answer {
    let request = client.request(Method::POST, "/v1/volumes").header("idempotency-key", key).json(body);
    client.send(request, "POST", "/v1/volumes").await
}

/// Names of the files of volumes that a node has.
fn files(data_dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(data_dir.join("volumes")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until it is so.
async fn until(what: &str, is_it: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + SOON;
    while !is_it() {
        assert!(tokio::time::Instant::now() < deadline, "{what}: waited in vain");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Deletes it as soon as nobody holds it.
async fn delete(client: &Client, name: &str) {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        let answer = client.delete(&format!("/v1/volumes/{name}")).await;
        if answer.status == 204 {
            return;
        }
        answer.problem(409, "volume_in_use");
        assert!(tokio::time::Instant::now() < deadline, "{name} is held for good");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn one_is_made_shared_read_and_deleted() {
    let client = shared().client();
    let made = client.post("/v1/volumes", &json!({ "name": "cache", "size_bytes": SIZE, "labels": { "of": "builds" } })).await;
    assert_eq!(made.header("location"), "/v1/volumes/cache");
    let made = made.expect(201);
    assert_eq!((&made["name"], &made["size_bytes"], &made["labels"]), (&json!("cache"), &json!(SIZE), &json!({ "of": "builds" })));
    assert_eq!(made["used_by"], json!([]));

    // One that lives, one that reads alone, and one of another user.
    let lasting = json!({ "image": "busybox", "command": ["sh", "-c", "while [ ! -e /data/stop ]; do sleep 0.05; done; cat /data/said"],
        "volumes": [{ "name": "cache", "path": "/data" }] });
    let lasting = client.post("/v1/sandboxes", &lasting).await.expect(201);
    assert_eq!(lasting["volumes"], json!([{ "name": "cache", "path": "/data", "read_only": false }]));
    let writer = json!({ "image": "busybox", "command": ["sh", "-c", "echo hello > /a/b/said; stat -c %u:%g /a/b/said"], "user": "1000:1000",
        "volumes": [{ "name": "cache", "path": "/a/b" }] });
    assert_eq!(stdout(&client.run(&writer).await), "1000:1000\n");
    let script = "cat /r/said; stat -c %u:%g /r/said; touch /r/new 2>/dev/null || echo read-only";
    let reader = run(&client, script, json!([{ "name": "cache", "path": "/r", "read_only": true }])).await;
    assert_eq!(stdout(&reader), "hello\n1000:1000\nread-only\n");

    let now = client.get("/v1/volumes/cache").await.expect(200);
    assert_eq!(now["used_by"], json!([lasting["id"]]), "whoever has ended holds nothing");
    let problem = client.delete("/v1/volumes/cache").await.problem(409, "volume_in_use");
    assert!(problem["detail"].as_str().unwrap().contains(lasting["id"].as_str().unwrap()));
    run(&client, "touch /data/stop", at("cache", "/data")).await;
    let path = format!("/v1/sandboxes/{}", lasting["id"].as_str().unwrap());
    assert_exit(&client.until(&path, |sandbox| sandbox["state"] == "exited").await, 0);

    delete(&client, "cache").await;
    client.get("/v1/volumes/cache").await.problem(404, "volume_not_found");
    client.delete("/v1/volumes/cache").await.problem(404, "volume_not_found");
    let gone = client.post("/v1/runs", &json!({ "image": "busybox", "command": ["true"], "volumes": at("cache", "/data") })).await;
    gone.problem(404, "volume_not_found");
    let events = client.get("/v1/events?kind=volume.*").await.expect(200);
    let kinds: Vec<_> = events["items"].as_array().unwrap().iter().map(|event| (&event["kind"], &event["object"])).collect();
    let (created, removed, object) = (json!("volume.created"), json!("volume.removed"), json!("volume/cache"));
    assert!(kinds.contains(&(&created, &object)) && kinds.contains(&(&removed, &object)), "{events}");
    // Its name is free, and what it held is gone.
    make(&client, "cache").await;
    assert_eq!(stdout(&run(&client, "ls -A /data", at("cache", "/data")).await), "");
    delete(&client, "cache").await;
}

#[tokio::test]
async fn another_tenants_is_as_if_it_never_was() {
    let service = shared();
    let (owner, stranger) = (service.client(), service.client());
    make(&owner, "mine").await;

    stranger.get("/v1/volumes/mine").await.problem(404, "volume_not_found");
    stranger.delete("/v1/volumes/mine").await.problem(404, "volume_not_found");
    assert_eq!(stranger.get("/v1/volumes").await.expect(200)["items"], json!([]));
    let body = json!({ "image": "busybox", "command": ["true"], "volumes": at("mine", "/data") });
    for path in ["/v1/runs", "/v1/sandboxes"] {
        stranger.post(path, &body).await.problem(404, "volume_not_found");
    }
    // The control, and a name that another tenant has is free.
    assert_exit(&owner.run(&body).await, 0);
    make(&stranger, "mine").await;
    for client in [&owner, &stranger] {
        delete(client, "mine").await;
    }
}

#[tokio::test]
async fn they_are_counted_by_number_and_by_bytes() {
    let place = shared().place;
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let quotas = json!({ "id": tenant, "quotas": { "volumes": 3, "volume_bytes": 3 * SIZE } });
    Client::admin(&place).post("/v1/admin/tenants", &quotas).await.expect(201);
    let client = Client::of(&place, &tenant);
    let create = |name: &'static str, size: u64| {
        let client = client.clone();
        async move { client.post("/v1/volumes", &json!({ "name": name, "size_bytes": size })).await }
    };
    create("a", SIZE).await.expect(201);
    let too_large = create("b", 2 * SIZE + 1).await.problem(429, "quota_exceeded");
    assert_eq!((&too_large["quota"], &too_large["used"]), (&json!("volume_bytes"), &json!(SIZE)));
    create("b", SIZE).await.expect(201);
    create("c", 4 << 20).await.expect(201);
    assert_eq!(create("d", 4 << 20).await.problem(429, "quota_exceeded")["quota"], "volumes");
    create("c", 4 << 20).await.problem(409, "conflict");
    let used = &client.get("/v1/quota").await.expect(200)["tenant"]["used"];
    assert_eq!((&used["volumes"], &used["volume_bytes"]), (&json!(3), &json!(2 * SIZE + (4 << 20))));

    // At once, no more than fit.
    delete(&client, "c").await;
    let names = ["e", "f", "g", "h"];
    let answers = futures_util::future::join_all(names.map(|name| create(name, 4 << 20))).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1, "{answers:#?}");
    for name in ["a", "b"].into_iter().chain(names) {
        if client.get(&format!("/v1/volumes/{name}")).await.status == 200 {
            delete(&client, name).await;
        }
    }
    assert_eq!(client.get("/v1/quota").await.expect(200)["tenant"]["used"]["volumes"], 0);
}

#[tokio::test]
async fn they_are_listed_by_name_and_label_in_pages() {
    let client = shared().client();
    for (name, labels) in [("b", json!({ "a": "1" })), ("a", json!({ "a": "2" })), ("c", json!({ "a": "1", "x": "" }))] {
        let body = json!({ "name": name, "size_bytes": 4 << 20, "labels": labels });
        client.post("/v1/volumes", &body).await.expect(201);
    }
    let names = async |query: &str| {
        let page = client.get(&format!("/v1/volumes{query}")).await.expect(200);
        let names: Vec<_> = page["items"].as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect();
        (names.join(""), page["next_cursor"].as_str().map(ToOwned::to_owned))
    };

    assert_eq!(names("").await, ("abc".to_owned(), None));
    assert_eq!(names("?label=a%3D1").await.0, "bc");
    assert_eq!(names("?label=a&label=x").await.0, "c");
    let (first, cursor) = names("?limit=2").await;
    assert_eq!((first.as_str(), names(&format!("?limit=2&cursor={}", cursor.unwrap())).await), ("ab", ("c".to_owned(), None)));
    client.get("/v1/volumes?colour=red").await.problem(422, "invalid_request");
    for name in ["a", "b", "c"] {
        delete(&client, name).await;
    }
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_its_field() {
    let client = shared().client();
    for (body, field) in [
        (json!({ "size_bytes": SIZE }), "name"),
        (json!({ "name": "a" }), "size_bytes"),
        (json!({ "name": "../a", "size_bytes": SIZE }), "name"),
        (json!({ "name": "a\u{0}", "size_bytes": SIZE }), "name"),
        (json!({ "name": "a".repeat(64), "size_bytes": SIZE }), "name"),
        (json!({ "name": "a", "size_bytes": 4095 }), "size_bytes"),
        (json!({ "name": "a", "size_bytes": (1_u64 << 40) + 1 }), "size_bytes"),
        (json!({ "name": "a", "size_bytes": SIZE, "labels": { "=": "" } }), "labels"),
        (json!({ "name": "a", "size_bytes": SIZE, "driver": "nfs" }), "driver"),
    ] {
        assert_eq!(client.post("/v1/volumes", &body).await.problem(422, "invalid_request")["field"], field, "{body}");
    }
    make(&client, "a").await;
    let many: Vec<_> = (0..17).map(|n| json!({ "name": "a", "path": format!("/v{n}") })).collect();
    let twice = |first: &str, second: &str| json!([{ "name": "a", "path": first }, { "name": "a", "path": second }]);
    for (volumes, field) in [
        (at("a", "/"), "volumes[0].path"),
        (at("a", "data"), "volumes[0].path"),
        (at("a", "/a/../b"), "volumes[0].path"),
        (at("a", "/a\u{0}"), "volumes[0].path"),
        (at("a", &"/a".repeat(2049)), "volumes[0].path"),
        (at("a", "/proc"), "volumes[0].path"),
        (at("a", "/sys/fs"), "volumes[0].path"),
        (at("a", "/dev/shm"), "volumes[0].path"),
        (at("/etc", "/data"), "volumes[0].name"),
        (twice("/data", "/data"), "volumes[1].path"),
        (twice("/data", "/data/below"), "volumes[1].path"),
        (twice("/data/below", "/data"), "volumes[1].path"),
        (json!(many), "volumes"),
    ] {
        for path in ["/v1/runs", "/v1/sandboxes"] {
            let body = json!({ "image": "busybox", "command": ["true"], "volumes": volumes });
            assert_eq!(client.post(path, &body).await.problem(422, "invalid_request")["field"], field, "{volumes}");
        }
    }
    let of_gvisor = json!({ "image": "busybox", "command": ["true"], "isolation": "gvisor", "volumes": at("a", "/data") });
    assert_eq!(client.post("/v1/runs", &of_gvisor).await.problem(422, "invalid_request")["field"], "volumes");
    delete(&client, "a").await;
}

#[tokio::test]
async fn a_full_one_is_told_inside_and_is_nobody_elses_concern() {
    let client = shared().client();
    make(&client, "small").await;
    let script = "dd if=/dev/zero of=/data/fill bs=1M count=20 2>/dev/null || echo full; echo fits > /tmp/fits; cat /tmp/fits";

    let run = run(&client, script, at("small", "/data")).await;

    assert_eq!(stdout(&run), "full\nfits\n");
    assert_eq!(run["outcome"]["limits_hit"], json!([]));
    delete(&client, "small").await;
}

#[tokio::test]
async fn one_that_a_kept_sandbox_may_need_again_stays() {
    let client = shared().client();
    make(&client, "kept").await;
    let body = json!({ "image": "busybox", "command": ["sh", "-c", "echo x >> /data/starts; cat /data/starts"], "keep_layer": true, "volumes": at("kept", "/data") });
    let id = client.post("/v1/sandboxes", &body).await.expect(201)["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}");
    client.until(&path, |sandbox| sandbox["state"] == "exited").await;

    client.delete("/v1/volumes/kept").await.problem(409, "volume_in_use");
    client.post(&format!("{path}/start"), &json!({})).await.expect(200);
    client.until(&path, |sandbox| sandbox["state"] == "exited" && sandbox["starts"] == 2).await;
    assert!(client.log(&id).await.stdout_text().ends_with("x\nx\n"));
    assert_eq!(client.delete(&path).await.status, 204);

    delete(&client, "kept").await;
}

#[tokio::test]
async fn a_request_that_is_sent_again_makes_one() {
    let client = shared().client();
    let body = json!({ "name": "once", "size_bytes": SIZE });
    let first = send(&client, "the-key", &body).await;
    let second = send(&client, "the-key", &body).await;
    assert_eq!((second.header("idempotency-replayed"), &second.text), ("true", &first.text));
    send(&client, "the-key", &json!({ "name": "other", "size_bytes": SIZE })).await.problem(409, "idempotency_key_reused");
    first.expect(201);
    delete(&client, "once").await;
}

#[tokio::test]
async fn what_is_in_one_outlives_service_and_keeper() {
    let mut service = Service::start();
    let client = |service: &Service| Client::of(service.place(), "survivor");
    make(&client(&service), "kept").await;
    run(&client(&service), "echo first > /data/first", at("kept", "/data")).await;
    let lasting =
        json!({ "image": "busybox", "command": ["sh", "-c", "echo held > /data/held; sleep 600"], "volumes": at("kept", "/data") });
    let lasting = client(&service).post("/v1/sandboxes", &lasting).await.expect(201)["id"].as_str().unwrap().to_owned();

    service.kill();
    service.start_again().unwrap();
    let path = format!("/v1/sandboxes/{lasting}");
    client(&service).until(&path, |sandbox| sandbox["state"] == "running").await;
    client(&service).delete("/v1/volumes/kept").await.problem(409, "volume_in_use");
    assert_eq!(stdout(&run(&client(&service), "cat /data/*", at("kept", "/data")).await), "first\nheld\n");

    // The whole machine, as far as it is theirs.
    let keeper = service.place().keeper_pid();
    service.kill();
    kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGKILL).unwrap();
    service.start_again().unwrap();
    assert_reason(&client(&service).until(&path, |sandbox| !sandbox["outcome"].is_null()).await, "infra_error");
    assert_eq!(stdout(&run(&client(&service), "cat /data/*", at("kept", "/data")).await), "first\nheld\n");

    delete(&client(&service), "kept").await;
    until("its file", || files(&service.place().data_dir).is_empty()).await;
    until("its loop device", || host::loop_devices_of(&service.place().data_dir).is_empty()).await;
    service.stop().unwrap();
}

#[tokio::test]
async fn a_service_that_dies_at_any_step_leaves_neither_a_row_nor_a_file_alone() {
    let mut service = Service::start();
    let client = |service: &Service| Client::of(service.place(), "survivor");
    let body = json!({ "name": "tried", "size_bytes": SIZE });
    for step in ["begun", "made", "stored", "ended", "removed"] {
        service.stop().unwrap();
        service.arm(&format!("service.volume.{step}=1*return"));
        service.start_again().unwrap();
        let asked = client(&service);
        let key = format!("key-{step}");
        let request = asked.request(Method::POST, "/v1/volumes").header("idempotency-key", &key).json(&body);
        let made = asked.try_send(request, "POST", "/v1/volumes").await;
        if made.is_ok() {
            asked.try_delete("/v1/volumes/tried").await.expect_err("it was to die");
        }
        service.wait().unwrap();
        service.arm("");
        service.start_again().unwrap();

        let client = client(&service);
        if made.is_ok() {
            // Its deletion was promised to nobody, but was begun.
            client.get("/v1/volumes/tried").await.problem(404, "volume_not_found");
            until(step, || files(&service.place().data_dir).is_empty()).await;
            assert_eq!(client.get("/v1/quota").await.expect(200)["tenant"]["used"]["volumes"], 0, "{step}");
            make(&client, "tried").await;
        } else {
            // The same request has one effect, however far it came.
            send(&client, &key, &body).await.expect(201);
            assert_eq!(client.get("/v1/quota").await.expect(200)["tenant"]["used"]["volumes"], 1, "{step}");
            assert_eq!(files(&service.place().data_dir).len(), 1, "{step}");
        }
        assert_eq!(stdout(&run(&client, "echo whole > /data/a; cat /data/a", at("tried", "/data")).await), "whole\n", "{step}");
        delete(&client, "tried").await;
        until(step, || files(&service.place().data_dir).is_empty()).await;
    }
}

#[tokio::test]
async fn a_sandbox_runs_where_its_volumes_are() {
    let database = Database::start();
    let node = || {
        let service = Service::start_with(&["--database-url", &database.url, "--node-lease-s", "2"]).unwrap();
        service.import("busybox").unwrap();
        service
    };
    let (mut first, second) = (node(), node());
    let client = |service: &Service| Client::of(service.place(), "traveller");
    let made = make(&client(&first), "here").await;
    make(&client(&second), "there").await;
    run(&client(&first), "echo first > /data/a", at("here", "/data")).await;

    // Asked for at the other node, it runs at the one that has it.
    assert_eq!(stdout(&run(&client(&second), "cat /data/a", at("here", "/data")).await), "first\n");
    let both = json!([{ "name": "here", "path": "/a" }, { "name": "there", "path": "/b" }]);
    let body = json!({ "image": "busybox", "command": ["true"], "volumes": both });
    client(&second).post("/v1/runs", &body).await.problem(409, "volume_elsewhere");
    assert_eq!(files(&first.place().data_dir), [format!("{}.ext4", made["id"].as_str().unwrap())]);
    // Deleted at the other node, it is removed from the one that has it.
    delete(&client(&second), "here").await;
    client(&first).get("/v1/volumes/here").await.problem(404, "volume_not_found");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !files(&first.place().data_dir).is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "it is not removed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // Nobody waits for a node that is away.
    make(&client(&first), "away").await;
    let keeper = first.place().keeper_pid();
    first.kill();
    kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGKILL).unwrap();
    let body = json!({ "image": "busybox", "command": ["true"], "volumes": at("away", "/data"), "wait_ms": 0 });
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        let answer = client(&second).post("/v1/runs", &body).await;
        if answer.status == 409 {
            answer.problem(409, "volume_elsewhere");
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{}", answer.text);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
