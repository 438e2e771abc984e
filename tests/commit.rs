//! A sandbox's files become an image: all of them as they are, for its tenant, as often as anybody likes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use mayfly_tests::{
    Answer, Client,
    outcome::{assert_exit, stdout},
    service::shared,
};
use reqwest::Method;
use serde_json::{Value, json};

/// Tells of everything below `/data` but what differs from file system to file system: sizes of folders and how often they are named.
const TELL: &str = "cd /data; {
    find . ! -type d | sort | while IFS= read -r name; do stat -c '%n %F %a %u:%g %h %s %Y' \"$name\"; done
    find . -type d | sort | while IFS= read -r name; do stat -c '%n %F %a %u:%g %Y' \"$name\"; done
    md5sum large file same odd-*; readlink link; tail -n 1 /etc/passwd; ls /etc/group || echo gone
    } | tr '\\377' '?'";

/// A sandbox that has done what this script does, and where it is found.
async fn prepared(client: &Client, script: &str, more: Value) -> String {
    // Of its own: what it is made of may have been prepared, too.
    let ready = format!("/ready-{}", uuid::Uuid::new_v4());
    let script = format!("set -e\n{script}\ntouch {ready}; exec sleep 1000");
    let mut request = json!({
        "image": "busybox", "command": ["sh", "-c", script], "limits": { "memory_bytes": 64 << 20, "cpu_millis": 500, "disk_bytes": 48 << 20 },
    });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = client.post("/v1/sandboxes", &request).await.expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    let look = format!("while [ ! -e {ready} ]; do sleep 0.02; done");
    let is_ready = json!({ "command": ["sh", "-c", look], "limits": { "wall_ms": 60_000 }, "wait_ms": 65_000 });
    client.until(&path, |sandbox| sandbox["state"] != "queued" && sandbox["state"] != "starting").await;
    assert_exit(&client.post(&format!("{path}/execs"), &is_ready).await.expect(200), 0);
    path
}

async fn inside(client: &Client, sandbox: &str, script: &str) -> Value {
    let asked = json!({ "command": ["sh", "-c", script], "wait_ms": 20_000 });
    client.post(&format!("{sandbox}/execs"), &asked).await.expect(200)
}

async fn commit(client: &Client, sandbox: &str, body: &Value) -> Answer {
    client.post(&format!("{sandbox}/commit"), body).await
}

async fn run(client: &Client, image: &str, script: &str) -> Value {
    client.run(&json!({ "image": image, "command": ["sh", "-c", script] })).await
}

async fn gone(client: &Client, path: &str) {
    assert_eq!(client.delete(path).await.status, 204);
}

#[tokio::test]
async fn everything_that_was_prepared_is_in_what_is_made_of_the_image() {
    let client = shared().client();
    let script = "mkdir -p /data/empty /data/deep/deeper; chmod 1770 /data/empty
        echo prepared > /data/file; chown 1000:1001 /data/file; chmod 4755 /data/file; touch -d '2020-01-02 03:04:05' /data/file
        ln /data/file /data/same; ln /data/file /data/deep/again
        ln -s ../etc//passwd /data/link; chown -h 1000 /data/link
        mkfifo /data/pipe; chmod 622 /data/pipe
        dd if=/dev/urandom of=/data/large bs=1M count=12; truncate -s 3M /data/sparse
        echo odd > \"/data/odd-$(printf '\\377')\"
        long=/data/$(printf '%0200d' 0); mkdir $long; echo far > $long/$(printf '%0200d' 1)
        echo extra:x:1234:1234::/:/bin/sh >> /etc/passwd; rm /etc/group";
    let sandbox = prepared(&client, script, json!({ "capabilities": "root_image" })).await;
    let before = inside(&client, &sandbox, TELL).await;

    let answer = commit(&client, &sandbox, &json!({ "reference": "prepared:1" })).await;

    assert_eq!(answer.header("location"), "/v1/images/prepared:1");
    let image = answer.expect(201);
    assert_eq!((&image["reference"], &image["shared"]), (&json!("prepared:1"), &json!(false)));
    assert!(image["size_bytes"].as_u64().unwrap() > 15 << 20, "{image:#}");
    assert_eq!(client.get("/v1/images/prepared:1").await.expect(200), image);
    gone(&client, &sandbox).await;
    let told = stdout(&before);
    assert!(told.contains("gone") && told.contains("4755 1000:1001 3 9 1577934245") && told.contains("fifo 622"), "{told}");
    let after = run(&client, "prepared:1", TELL).await;
    assert_eq!(stdout(&after), told);
    let of_user = client.run(&json!({ "image": "prepared:1", "command": ["id", "-u"], "user": "extra" })).await;
    assert_eq!(stdout(&of_user), "1234\n");
}

#[tokio::test]
async fn names_of_one_file_stay_names_of_one_file_unless_it_was_written_to_by_one_of_them() {
    let client = shared().client();
    let first = prepared(&client, "mkdir /data; echo all > /data/a; ln /data/a /data/b; ln /data/a /data/c", json!({})).await;
    commit(&client, &first, &json!({ "reference": "linked" })).await.expect(201);
    // To the overlay, what is written to by one name is another file from then on.
    let second = prepared(&client, "echo one >> /data/c", json!({ "image": "linked" })).await;

    commit(&client, &second, &json!({ "reference": "parted" })).await.expect(201);

    let tell = "cd /data; stat -c '%n %h %s' a b c; [ $(stat -c %i a) = $(stat -c %i b) ] && echo same";
    assert_eq!(stdout(&run(&client, "linked", tell).await), "a 3 4\nb 3 4\nc 3 4\nsame\n");
    assert_eq!(stdout(&run(&client, "parted", tell).await), "a 2 4\nb 2 4\nc 1 8\nsame\n");
    gone(&client, &first).await;
    gone(&client, &second).await;
}

#[tokio::test]
async fn those_that_are_made_of_one_image_do_not_see_each_other() {
    let client = shared().client();
    let first = prepared(&client, "echo common > /tmp/common", json!({})).await;
    let image = commit(&client, &first, &json!({ "reference": "fork" })).await.expect(201);
    let (one, other) = tokio::join!(
        prepared(&client, "echo one > /tmp/own", json!({ "image": "fork" })),
        prepared(&client, "echo other > /tmp/own; rm /tmp/common", json!({ "image": "fork" })),
    );

    let tell = "cat /tmp/common /tmp/own 2>/dev/null";
    let (in_first, in_one, in_other) =
        tokio::join!(inside(&client, &first, tell), inside(&client, &one, tell), inside(&client, &other, tell));

    assert_eq!((stdout(&in_first), stdout(&in_one), stdout(&in_other)), ("common\n", "common\none\n", "other\n"));
    assert_eq!(client.get(&one).await.expect(200)["image"]["digest"], image["digest"]);
    for sandbox in [first, one, other] {
        gone(&client, &sandbox).await;
    }
}

#[tokio::test]
async fn an_image_is_run_as_was_asked_and_else_as_the_one_before_it() {
    let client = shared().client();
    let sandbox = prepared(&client, "mkdir /srv; echo 'echo $1 $PATH $GREETING $PWD $(id -u)' > /srv/tell", json!({})).await;
    let asked = json!({
        "reference": "told", "entrypoint": ["sh", "/srv/tell"], "command": ["first"], "env": { "GREETING": "hello" }, "workdir": "/srv", "user": "1000:1001",
    });

    let image = commit(&client, &sandbox, &asked).await.expect(201);

    let config = &image["config"];
    assert_eq!((&config["entrypoint"], &config["command"]), (&json!(["sh", "/srv/tell"]), &json!(["first"])));
    assert_eq!((&config["workdir"], &config["user"]), (&json!("/srv"), &json!("1000:1001")));
    let env = config["env"].as_array().unwrap();
    assert!(env.contains(&json!("PATH=/bin")) && env.contains(&json!("GREETING=hello")), "{env:?}");
    assert_eq!(stdout(&client.run(&json!({ "image": "told" })).await), "first /bin hello /srv 1000\n");
    // What this sandbox itself was made with is no part of the next image.
    let second = prepared(&client, "", json!({ "image": "told", "entrypoint": [], "user": "0:0", "env": { "GREETING": "mine" } })).await;
    let image = commit(&client, &second, &json!({ "reference": "told-again", "command": ["second"] })).await.expect(201);
    assert_eq!((&image["config"]["command"], &image["config"]["user"]), (&json!(["second"]), &json!("1000:1001")));
    assert_eq!(stdout(&client.run(&json!({ "image": "told-again" })).await), "second /bin hello /srv 1000\n");
    gone(&client, &sandbox).await;
    gone(&client, &second).await;
}

#[tokio::test]
async fn one_that_runs_goes_on() {
    let client = shared().client();
    let script = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.01; done) &
        while [ ! -e /tmp/count ]; do sleep 0.01; done";
    let sandbox = prepared(&client, script, json!({})).await;
    let count = async || stdout(&inside(&client, &sandbox, "cat /tmp/count").await).trim().parse::<u64>().unwrap();
    let before = count().await;

    commit(&client, &sandbox, &json!({ "reference": "count" })).await.expect(201);

    let (after, kept) = (count().await, run(&client, "count", "cat /tmp/count").await);
    let kept = stdout(&kept).trim().parse::<u64>().unwrap();
    assert!(before <= kept && kept <= after, "{before} {kept} {after}");
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
    while count().await <= after {
        assert!(tokio::time::Instant::now() < deadline, "it stands still");
    }
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn one_that_has_ended_can_be_committed_as_long_as_its_layer_is_kept() {
    let client = shared().client();
    let end = async |more: Value| {
        let mut request = json!({ "image": "busybox", "command": ["sh", "-c", "echo left > /tmp/left"] });
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let made = client.post("/v1/sandboxes", &request).await.expect(201);
        let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
        client.until(&path, |sandbox| sandbox["state"] == "exited").await;
        path
    };
    let (kept, lost) = (end(json!({ "keep_layer": true })).await, end(json!({})).await);

    commit(&client, &kept, &json!({ "reference": "left" })).await.expect(201);
    commit(&client, &lost, &json!({ "reference": "lost" })).await.problem(409, "layer_lost");

    assert_eq!(stdout(&run(&client, "left", "cat /tmp/left").await), "left\n");
    client.get("/v1/images/lost").await.problem(404, "image_not_found");
    // It can still be started again.
    client.post(&format!("{kept}/start"), &json!({})).await.expect(200);
    gone(&client, &kept).await;
    assert_eq!(stdout(&run(&client, "left", "cat /tmp/left").await), "left\n");
}

#[tokio::test]
async fn one_whose_files_cannot_be_read_is_not_committed() {
    let client = shared().client();
    let paused = prepared(&client, "", json!({})).await;
    client.post(&format!("{paused}/pause"), &json!({})).await.expect(200);
    let gvisor = json!({ "image": "busybox", "command": ["sleep", "1000"], "isolation": "gvisor" });
    let gvisor = client.post("/v1/sandboxes", &gvisor).await.expect(201);
    let gvisor = format!("/v1/sandboxes/{}", gvisor["id"].as_str().unwrap());
    client.until(&gvisor, |sandbox| sandbox["state"] == "running").await;

    let refused = commit(&client, &paused, &json!({ "reference": "still" })).await.problem(409, "wrong_state");
    let of_gvisor = commit(&client, &gvisor, &json!({ "reference": "still" })).await;

    assert_eq!(refused["state"], "paused");
    of_gvisor.problem(409, "conflict");
    client.get("/v1/images/still").await.problem(404, "image_not_found");
    client.post(&format!("{paused}/resume"), &json!({})).await.expect(200);
    commit(&client, &paused, &json!({ "reference": "still" })).await.expect(201);
    gone(&client, &paused).await;
    gone(&client, &gvisor).await;
}

#[tokio::test]
async fn of_what_is_mounted_there_is_an_empty_folder() {
    let client = shared().client();
    client.post("/v1/volumes", &json!({ "name": "store", "size_bytes": 4 << 20 })).await.expect(201);
    let script = "echo secret > /mnt/store/secret; echo secret > /dev/shm/secret";
    let sandbox = prepared(&client, script, json!({ "volumes": [{ "name": "store", "path": "/mnt/store" }] })).await;

    commit(&client, &sandbox, &json!({ "reference": "bare" })).await.expect(201);

    let tell = "ls -A /mnt/store; ls -A /dev/shm; stat -c '%F %a %u:%g' /mnt/store; cat /proc/self/comm; echo > /dev/null && echo written";
    assert_eq!(stdout(&run(&client, "bare", tell).await), "directory 755 0:0\ncat\nwritten\n");
    let mounted =
        json!({ "image": "bare", "command": ["cat", "/mnt/store/secret"], "volumes": [{ "name": "store", "path": "/mnt/store" }] });
    assert_eq!(stdout(&client.run(&mounted).await), "secret\n");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_name_that_would_delete_in_an_image_is_told_and_nothing_is_made() {
    let client = shared().client();
    let sandbox = prepared(&client, "mkdir /tmp/a; touch /tmp/a/.wh.b", json!({})).await;

    let refused = commit(&client, &sandbox, &json!({ "reference": "whiteout" })).await.problem(409, "file_unfit");

    assert!(refused["detail"].as_str().unwrap().contains("/tmp/a/.wh.b"), "{refused:#}");
    client.get("/v1/images/whiteout").await.problem(404, "image_not_found");
    inside(&client, &sandbox, "rm /tmp/a/.wh.b").await;
    commit(&client, &sandbox, &json!({ "reference": "whiteout" })).await.expect(201);
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn what_is_larger_than_an_image_may_be_is_refused_before_it_is_read() {
    let client = shared().client();
    let limits = json!({ "memory_bytes": 64 << 20, "file_size_bytes": 16_u64 << 30 });
    let sandbox = prepared(&client, "truncate -s 9G /tmp/sparse", json!({ "limits": limits })).await;

    let began = std::time::Instant::now();
    commit(&client, &sandbox, &json!({ "reference": "huge" })).await.problem(413, "payload_too_large");

    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}: it was read", began.elapsed());
    // So is what no launch could carry, and before that.
    let env = json!({ "reference": "huge", "env": { "A": "x".repeat(70_000) } });
    let refused = commit(&client, &sandbox, &env).await.problem(422, "invalid_request");
    assert!(refused["detail"].as_str().unwrap().contains("at most 65536"), "{refused:#}");
    client.get("/v1/images/huge").await.problem(404, "image_not_found");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn an_image_is_held_to_its_tenants_quota() {
    let service = shared();
    let name = format!("tenant-{}", uuid::Uuid::new_v4());
    Client::admin(&service.place)
        .post("/v1/admin/tenants", &json!({ "id": name, "quotas": { "image_bytes": 24 << 20 } }))
        .await
        .expect(201);
    let client = Client::of(&service.place, &name);
    let sandbox = prepared(&client, "dd if=/dev/zero of=/tmp/zeros bs=1M count=12", json!({})).await;

    let first = commit(&client, &sandbox, &json!({ "reference": "one" })).await.expect(201);
    let refused = commit(&client, &sandbox, &json!({ "reference": "two" })).await.problem(429, "quota_exceeded");
    // In its own place there is room for it.
    commit(&client, &sandbox, &json!({ "reference": "one" })).await.expect(201);

    assert_eq!(
        (&refused["quota"], &refused["limit"], &refused["used"], &refused["scope"]),
        (&json!("image_bytes"), &json!(24 << 20), &first["size_bytes"], &json!("tenant"))
    );
    client.get("/v1/images/two").await.problem(404, "image_not_found");
    let quota = client.get("/v1/quota").await.expect(200);
    assert_eq!(quota["tenant"]["used"]["image_bytes"], client.get("/v1/images/one").await.expect(200)["size_bytes"]);
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn an_image_is_its_tenants_alone_whoever_asks_and_whatever_it_is_called() {
    let service = shared();
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4());
    let (client, stranger) = (Client::of(&service.place, &tenant), service.client());
    let with = |scope: &str| Client::with_scope(&service.place, &tenant, scope);
    let sandbox = prepared(&client, "echo mine > /tmp/mine", json!({})).await;
    let asked = json!({ "reference": "busybox" });
    let shared_one = stranger.get("/v1/images/busybox").await.expect(200);

    commit(&stranger, &sandbox, &asked).await.problem(404, "not_found");
    for (scope, lacks) in
        [("sandboxes:write", "images:write"), ("images:write", "sandboxes:write"), ("sandboxes:read images:read", "sandboxes:write")]
    {
        let refused = commit(&with(scope), &sandbox, &asked).await.problem(403, "forbidden");
        assert!(refused["detail"].as_str().unwrap().contains(lacks), "{scope}: {refused:#}");
    }
    // An operator who imports does so for all; what is in a sandbox is for its tenant.
    let made = commit(&with("admin"), &sandbox, &asked).await.expect(201);

    assert_eq!(made["shared"], false);
    assert_eq!(stdout(&run(&client, "busybox", "cat /tmp/mine").await), "mine\n");
    assert_eq!(stranger.get("/v1/images/busybox").await.expect(200), shared_one);
    assert_eq!(client.delete("/v1/images/busybox").await.status, 204);
    commit(&with("sandboxes:write images:write"), &sandbox, &json!({ "reference": "own" })).await.expect(201);
    stranger.post("/v1/runs", &json!({ "image": "own", "command": ["true"] })).await.problem(404, "image_not_found");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn what_cannot_be_asked_for_is_named() {
    let client = shared().client();
    let sandbox = prepared(&client, "", json!({})).await;
    let field = async |body: Value| commit(&client, &sandbox, &body).await.problem(422, "invalid_request")["field"].clone();

    assert_eq!(field(json!({})).await, "reference");
    assert_eq!(field(json!({ "reference": "a b" })).await, "reference");
    assert_eq!(field(json!({ "reference": "import" })).await, "reference");
    assert_eq!(field(json!({ "reference": "a", "pause": true })).await, "pause");
    assert_eq!(field(json!({ "reference": "a", "command": [] })).await, "command");
    assert_eq!(field(json!({ "reference": "a", "user": "no one" })).await, "user");
    client.post("/v1/sandboxes/none/commit", &json!({ "reference": "a" })).await.problem(404, "not_found");
    let a_run = client.run(&json!({ "image": "busybox", "command": ["true"] })).await;
    let of_a_run = format!("/v1/sandboxes/{}", a_run["id"].as_str().unwrap());
    commit(&client, &of_a_run, &json!({ "reference": "a" })).await.problem(404, "not_found");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_commit_is_told_and_is_one_however_often_it_is_sent_with_its_key() {
    let client = shared().client();
    let sandbox = prepared(&client, "echo first > /tmp/state", json!({})).await;
    let path = format!("{sandbox}/commit");
    let send = async |reference: &str| {
        let request = client.request(Method::POST, &path).header("idempotency-key", "once").json(&json!({ "reference": reference }));
        client.send(request, "POST", &path).await
    };

    let first = send("keyed").await;
    inside(&client, &sandbox, "echo second > /tmp/state").await;
    let second = send("keyed").await;
    let reused = send("other").await;

    let image = first.clone().expect(201);
    assert_eq!((second.header("idempotency-replayed"), &second.text), ("true", &first.text));
    reused.problem(409, "idempotency_key_reused");
    assert_eq!(stdout(&run(&client, "keyed", "cat /tmp/state").await), "first\n");
    let events = client.get("/v1/events?kind=image.committed").await.expect(200);
    let [event] = events["items"].as_array().unwrap().as_slice() else { panic!("{events:#}") };
    assert_eq!((&event["object"], &event["actor"]["principal"]), (&json!("image/keyed"), &json!("tester")));
    assert_eq!(
        event["data"],
        json!({ "digest": image["digest"], "size_bytes": image["size_bytes"], "sandbox": sandbox.rsplit('/').next().unwrap() })
    );
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn an_image_outlives_what_it_was_made_of() {
    let client = shared().client();
    let first = prepared(&client, "", json!({})).await;
    commit(&client, &first, &json!({ "reference": "base" })).await.expect(201);
    gone(&client, &first).await;
    let sandbox = prepared(&client, "echo there > /tmp/there", json!({ "image": "base" })).await;
    // The sandbox goes on, and is committed, without a name for its image, which no other has.
    gone(&client, "/v1/images/base").await;

    let image = commit(&client, &sandbox, &json!({ "reference": "later" })).await.expect(201);

    assert_eq!(image["config"]["workdir"], "/work");
    gone(&client, &sandbox).await;
    assert_eq!(stdout(&run(&client, "later", "cat /tmp/there").await), "there\n");
    gone(&client, "/v1/images/later").await;
    client.post("/v1/runs", &json!({ "image": "later" })).await.problem(404, "image_not_found");
}
