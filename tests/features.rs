//! A tour of what Mayfly can do: one test for each row of `docs/features.md`, as a user sees it. What lies deeper is tested where it lies.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use mayfly_tests::{
    Client, Service, image,
    outcome::{assert_exit, assert_limits_hit, assert_reason, stdout, usage},
    postgres::Database,
    sdk::Sdk,
    service::shared,
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt as _, net::TcpListener};

/// What does nothing until it is asked to do something.
const IDLE: &str = "exec sleep 1000";

/// A sandbox of this shell script, once it runs.
async fn running(client: &Client, script: &str) -> String {
    let path = format!("/v1/sandboxes/{}", client.sandbox(script).await);
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    path
}

async fn gone(client: &Client, path: &str) {
    assert_eq!(client.delete(path).await.status, 204);
}

/// An exec that is attached to, for input or a terminal.
async fn exec(client: &Client, sandbox: &str, request: Value) -> String {
    let made = client.post(&format!("{sandbox}/execs"), &request).await.expect(202);
    format!("{sandbox}/execs/{}", made["id"].as_str().unwrap())
}

/// Sends a body that is no JSON.
async fn put(client: &Client, path: &str, body: &'static str) -> Value {
    client.send(client.request(Method::PUT, path).body(body), "PUT", path).await.expect(200)
}

/// What comes in this form.
async fn read_as(client: &Client, path: &str, form: &str) -> String {
    client.send(client.request(Method::GET, path).header("accept", form), "GET", path).await.text
}

#[tokio::test]
async fn one_call_runs_a_program_and_answers_with_its_result() {
    let request = json!({
        "image": "busybox", "command": ["sh", "greet.sh"], "files": [{ "path": "greet.sh", "content": "read name; echo hello $name" }], "stdin": "you\n",
    });

    let run = shared().client().run(&request).await;

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "hello you\n");
}

#[tokio::test]
async fn a_sandbox_lives_until_it_is_deleted_and_is_found_by_its_name() {
    let client = shared().client();
    client.post("/v1/sandboxes", &json!({ "image": "busybox", "name": "worker", "command": ["sleep", "1000"] })).await.expect(201);

    let lives = client.until("/v1/sandboxes/worker", |sandbox| sandbox["state"] == "running").await;
    gone(&client, "/v1/sandboxes/worker").await;

    assert_eq!(lives["outcome"], Value::Null);
    client.get("/v1/sandboxes/worker").await.problem(404, "not_found");
}

#[tokio::test]
async fn a_further_process_in_a_sandbox_has_an_outcome_of_its_own() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;

    let done = client.post(&format!("{sandbox}/execs"), &json!({ "command": ["sh", "-c", "echo inside; exit 7"] })).await.expect(200);

    assert_exit(&done, 7);
    assert_eq!(stdout(&done), "inside\n");
    assert_eq!(client.get(&sandbox).await.expect(200)["state"], "running");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn both_streams_of_output_stay_apart() {
    let run = shared().client().shell("echo good; echo bad >&2").await;

    assert_eq!((run["stdout"].as_str(), run["stderr"].as_str()), (Some("good\n"), Some("bad\n")));
}

#[tokio::test]
async fn output_comes_while_the_program_runs_by_websocket_as_events_and_as_lines() {
    let client = shared().client();
    let id = client.sandbox("echo first; exec sleep 1000").await;
    let path = format!("/v1/sandboxes/{id}/logs");

    let mut socket = client.follow(&id, "").await;
    let while_it_runs = socket.next().await.unwrap();
    gone(&client, &format!("/v1/sandboxes/{id}")).await;
    let ended = client.shell("echo over").await;
    let path_of_ended = path.replace(&id, ended["id"].as_str().unwrap());
    let events = read_as(&client, &path_of_ended, "text/event-stream").await;
    let lines = read_as(&client, &path_of_ended, "application/x-ndjson").await;

    assert_eq!(while_it_runs["data"], "first\n");
    assert!(events.starts_with("id: ") && events.contains(r#""data":"over\n""#), "{events}");
    assert!(lines.lines().last().unwrap().starts_with(r#"{"end":"#), "{lines}");
}

#[tokio::test]
async fn input_is_given_while_the_program_runs_and_has_an_end() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;
    let exec = exec(&client, &sandbox, json!({ "command": ["cat"], "stdin_open": true })).await;
    let mut socket = client.attach(&format!("{exec}/attach")).await;

    socket.send(&json!({ "stdin": "one\n" })).await.unwrap();
    socket.until(|seen| seen.log.stdout == b"one\n").await;
    socket.send(&json!({ "stdin_end": true })).await.unwrap();
    let seen = socket.collect_attached().await;

    assert_eq!(seen.log.end.unwrap()["exit_code"], 0);
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_terminal_has_the_size_that_it_is_given_later() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;
    let script = "stty size; trap 'stty size; exit' WINCH; echo on; while :; do sleep 0.05; done";
    let exec = exec(&client, &sandbox, json!({ "command": ["sh", "-c", script], "tty": { "rows": 10, "columns": 20 } })).await;
    let mut socket = client.attach(&format!("{exec}/attach")).await;

    socket.until(|seen| seen.log.stdout_text() == "10 20\r\non\r\n").await;
    socket.send(&json!({ "resize": { "rows": 30, "columns": 40 } })).await.unwrap();
    let rest = socket.collect_attached().await;

    assert_eq!(rest.log.stdout_text(), "30 40\r\n");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_reader_goes_on_at_the_number_where_it_stopped() {
    let client = shared().client();
    let run = client.shell("echo a; sleep 1; echo b").await;
    let id = run["id"].as_str().unwrap();
    let all = client.log(id).await;

    let rest = client.follow(id, &format!("from={}", all.seqs[0] + 1)).await.collect().await;

    assert_eq!((all.stdout_text().as_str(), rest.stdout_text().as_str()), ("a\nb\n", "b\n"));
}

#[tokio::test]
async fn files_go_in_and_come_out() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;

    put(&client, &format!("{sandbox}/files/tmp/in"), "put from outside\n").await;
    let seen =
        client.post(&format!("{sandbox}/execs"), &json!({ "command": ["sh", "-c", "cat /tmp/in; echo made inside > /tmp/out"] })).await;
    let part = client.request(Method::GET, &format!("{sandbox}/files/tmp/out")).header("range", "bytes=5-10").send().await.unwrap();
    let part = (part.status().as_u16(), part.text().await.unwrap());
    let archive = client.request(Method::GET, &format!("{sandbox}/archive?path=/tmp")).send().await.unwrap().bytes().await.unwrap();

    assert_eq!(stdout(&seen.expect(200)), "put from outside\n");
    assert_eq!(part, (206, "inside".to_owned()));
    assert!(archive.windows(7).any(|name| name == b"tmp/out"));
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn what_changes_in_a_folder_is_told_as_it_happens() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;

    let mut changes = client.attach(&format!("{sandbox}/watch?path=/tmp&recursive=true")).await;
    let stands = changes.next().await.unwrap();
    put(&client, &format!("{sandbox}/files/tmp/in"), "put from outside\n").await;
    let change = changes.next().await.unwrap();

    assert_eq!(stands["watching"]["path"], "/tmp");
    assert_eq!((&change["kind"], &change["path"], &change["seq"]), (&json!("created"), &json!("/tmp/in"), &json!(0)));
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_server_inside_is_reached_though_it_has_no_network() {
    let client = shared().client();
    let server = ["python3", "-u", "-m", "http.server", "8080", "--bind", "127.0.0.1", "--directory", "/etc"];
    let made = client.post("/v1/sandboxes", &json!({ "image": "python", "command": server })).await.expect(201);
    let id = made["id"].as_str().unwrap();
    // It says so when it listens.
    client.follow(id, "").await.next().await.unwrap();

    let answer = client.request(Method::GET, &format!("/v1/sandboxes/{id}/ports/8080/passwd")).send().await.unwrap();

    assert_eq!((answer.status().as_u16(), &made["network"]), (200, &json!("none")));
    assert!(answer.text().await.unwrap().starts_with("root:"));
    gone(&client, &format!("/v1/sandboxes/{id}")).await;
}

#[tokio::test]
async fn a_paused_sandbox_goes_on_when_it_is_resumed() {
    let client = shared().client();
    let sandbox = running(&client, "while :; do echo .; sleep 0.02; done").await;
    let id = sandbox.rsplit('/').next().unwrap();
    let written = async || client.follow(id, "from=0&follow=false").await.collect().await.stdout_text().len();
    let nothing_ends = async || client.get(&format!("{sandbox}/wait?until=exited&timeout_ms=300")).await.expect(200)["result"].clone();

    let paused = client.post(&format!("{sandbox}/pause"), &json!({})).await.expect(200);
    // What was written before may still be on its way.
    nothing_ends().await;
    let (before, waited, after) = (written().await, nothing_ends().await, written().await);
    let resumed = client.post(&format!("{sandbox}/resume"), &json!({})).await.expect(200);
    let deadline = Instant::now() + Duration::from_secs(30);
    while written().await == after {
        assert!(Instant::now() < deadline, "it stands still");
    }

    assert_eq!((&paused["state"], &resumed["state"], waited), (&json!("paused"), &json!("running"), json!("timed_out")));
    assert_eq!(before, after, "it went on while it was paused");
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn a_sandbox_of_a_pool_ran_before_it_was_asked_for() {
    let client = shared().client();
    let template = json!({ "image": "busybox", "command": ["sh", "-c", "echo warm; exec sleep 1000"] });
    let pool = json!({ "name": "warm", "size": 1, "template": template, "ready_output": "warm" });
    client.post("/v1/pools", &pool).await.expect(201);
    client.until("/v1/pools/warm", |pool| pool["ready"] == 1).await;

    let taken = client.post("/v1/sandboxes", &template).await.expect(201);

    assert_eq!((&taken["from_pool"]["name"], &taken["state"]), (&json!("warm"), &json!("running")));
    assert_eq!(client.delete("/v1/pools/warm").await.status, 204);
    gone(&client, &format!("/v1/sandboxes/{}", taken["id"].as_str().unwrap())).await;
}

#[tokio::test]
async fn a_volume_outlives_the_sandbox_that_wrote_to_it() {
    let client = shared().client();
    client.post("/v1/volumes", &json!({ "name": "kept", "size_bytes": 4 << 20 })).await.expect(201);
    let with = async |script: &str, read_only: bool| {
        let volumes = json!([{ "name": "kept", "path": "/kept", "read_only": read_only }]);
        client.run(&json!({ "image": "busybox", "command": ["sh", "-c", script], "volumes": volumes })).await
    };

    with("echo from the first > /kept/file", false).await;
    let second = with("cat /kept/file; touch /kept/new 2>/dev/null || echo read-only", true).await;

    assert_eq!(stdout(&second), "from the first\nread-only\n");
}

#[tokio::test]
async fn a_prepared_sandbox_becomes_an_image_of_which_there_are_any_number() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;
    put(&client, &format!("{sandbox}/files/prepared"), "once\n").await;

    client.post(&format!("{sandbox}/commit"), &json!({ "reference": "prepared:1", "command": ["cat", "/prepared"] })).await.expect(201);
    gone(&client, &sandbox).await;
    let forks = [
        json!({ "image": "prepared:1", "command": ["sh", "-c", "echo mine >> /prepared; cat /prepared"] }),
        json!({ "image": "prepared:1" }),
    ];
    let (first, second) = tokio::join!(client.run(&forks[0]), client.run(&forks[1]));

    assert_eq!((stdout(&first), stdout(&second)), ("once\nmine\n", "once\n"));
}

#[tokio::test]
async fn an_archive_becomes_an_image_that_runs() {
    let client = shared().client();
    let archive = std::fs::read(image::archive("busybox").unwrap()).unwrap();

    let imported = client.post_raw("/v1/images/import?reference=mine:1", "application/x-tar", archive).await.expect(201);
    let listed = client.get("/v1/images").await.expect(200);
    let run = client.run(&json!({ "image": "mine:1", "command": ["echo", "from it"] })).await;
    let tagged = client.post("/v1/images/tag", &json!({ "reference": "mine:1", "name": "mine:2" })).await.expect(201);
    let history = client.get("/v1/image-history/mine:2").await.expect(200);
    let verified = client.post("/v1/images/verify", &json!({ "reference": "mine:2" })).await.expect(200);
    let archive = client.get("/v1/image-archives/mine:2").await;
    let removed = client.delete("/v1/images/mine:1").await;

    assert!(listed["items"].as_array().unwrap().contains(&imported), "{listed:#}");
    assert_eq!((stdout(&run), &run["image"]["digest"]), ("from it\n", &imported["digest"]));
    assert_eq!((&tagged["digest"], &history["digest"], &verified["sound"]), (&imported["digest"], &imported["digest"], &json!(true)));
    assert_eq!((archive.status, archive.header("content-type")), (200, "application/x-tar"));
    assert_eq!(removed.status, 204);
}

#[tokio::test]
async fn a_program_has_no_network_and_no_other_can_be_asked_for() {
    let client = shared().client();

    let run = client.shell("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '; wget -q -T 2 -O- http://192.0.2.1/ && echo reached").await;
    let refused = client.post("/v1/runs", &json!({ "image": "busybox", "network": "open" })).await.problem(422, "invalid_request");

    assert_eq!(stdout(&run), "lo\n");
    assert_eq!(refused["field"], "network");
}

#[tokio::test]
async fn limits_are_given_with_each_request_and_told_with_each_answer() {
    let limits = json!({ "memory_bytes": 32 << 20, "cpu_millis": 500, "pids": 5, "wall_ms": 5000, "cpu_ms": 1000, "open_files": 20 });
    let client = shared().client();

    let run = client.run(&json!({ "image": "busybox", "command": ["sh", "-c", "ulimit -n"], "limits": limits })).await;
    let bounds = client.get("/v1/limits").await.expect(200);

    assert_eq!(stdout(&run), "20\n");
    for (name, value) in limits.as_object().unwrap() {
        assert_eq!(&run["limits"][name], value, "{name}");
        assert!(bounds.to_string().contains(name), "{bounds:#}");
    }
}

#[tokio::test]
async fn cpu_time_and_peak_memory_are_told_of_every_run() {
    let run = shared()
        .client()
        .shell("dd if=/dev/zero of=/tmp/kept bs=1048576 count=20 2>/dev/null; i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done")
        .await;

    assert_exit(&run, 0);
    assert!(usage(&run, "cpu_ms") > 0 && usage(&run, "wall_ms") > 0 && usage(&run, "pids_peak") > 1, "{run:#}");
    assert!(usage(&run, "memory_peak_bytes") > 20 << 20, "{run:#}");
}

#[tokio::test]
async fn why_a_program_ended_is_one_word_for_each_cause() {
    let client = shared().client();
    let of = async |command: &[&str], limits: Value| client.run(&json!({ "image": "busybox", "command": command, "limits": limits })).await;

    let killed = of(&["sh", "-c", "kill -SEGV $$"], json!({})).await;
    let late = of(&["sleep", "100"], json!({ "wall_ms": 300 })).await;
    let busy = of(&["sh", "-c", "while :; do :; done"], json!({ "cpu_ms": 200 })).await;
    let hungry = of(&["hog", "200"], json!({ "memory_bytes": 64 << 20 })).await;
    let missing = of(&["no-such-program"], json!({})).await;

    assert_reason(&killed, "signaled");
    assert_eq!(killed["outcome"]["signal"], "SIGSEGV");
    assert_reason(&late, "wall_timeout");
    assert_reason(&busy, "cpu_timeout");
    assert_reason(&hungry, "oom_killed");
    assert_reason(&missing, "start_failed");
}

#[tokio::test]
async fn output_beyond_its_limit_is_told() {
    let client = shared().client();
    let with = async |policy: &str| {
        let request =
            json!({ "image": "busybox", "command": ["flood", "9000"], "output_policy": policy, "limits": { "output_bytes": 5000 } });
        client.run(&request).await
    };

    let (cut, ended) = (with("truncate").await, with("kill").await);

    assert_exit(&cut, 0);
    assert_eq!((stdout(&cut).len(), &cut["outcome"]["truncated"]["stdout"]), (5000, &json!(true)));
    assert_reason(&ended, "output_limit");
    assert_limits_hit(&ended, &["output"]);
}

#[tokio::test]
async fn what_is_compiled_once_is_run_with_every_case_and_judged() {
    let step = json!({ "command": ["sh", "-c", "echo compiling; sed s/x/2/ source > program"] });
    let files = json!([{ "path": "source", "content": "read n; echo $((n * x))" }]);
    let cases = json!([{ "stdin": "3", "expected_stdout": "6" }, { "stdin": "21", "expected_stdout": "42" }]);
    let request = json!({ "image": "busybox", "files": files, "compile": step, "command": ["sh", "program"], "cases": cases });

    let run = shared().client().run(&request).await;

    assert_eq!((&run["verdict"], &run["compile"]["stdout"]), (&json!("accepted"), &json!("compiling\n")), "{run:#}");
    assert_eq!((&run["cases"][0]["stdout"], &run["cases"][1]["stdout"]), (&json!("6\n"), &json!("42\n")));
}

#[tokio::test]
async fn every_case_is_judged_by_its_output() {
    let cases = json!([
        { "name": "right", "stdin": "3", "expected_stdout": "6" },
        { "name": "wrong", "stdin": "4", "expected_stdout": "9" },
        { "name": "broken", "stdin": "x" },
    ]);
    let script = "read n; test $n = x && exit 3; echo $((n * 2))";
    let request = json!({ "image": "busybox", "command": ["sh", "-c", script], "cases": cases });

    let run = shared().client().run(&request).await;

    let verdicts: Vec<_> = run["cases"].as_array().unwrap().iter().map(|case| case["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["accepted", "wrong_output", "failed"]);
    assert_eq!(run["verdict"], "wrong_output");
}

#[tokio::test]
async fn what_happens_is_sent_to_a_webhook_with_a_signature() {
    let service = Service::start_with(&["--webhook-allow", "127.0.0.0/8", "--webhook-http", "true"]).unwrap();
    let receiver = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, url) = (Client::of(service.place(), "told"), format!("http://{}/hook", receiver.local_addr().unwrap()));

    let webhook = client.post("/v1/webhooks", &json!({ "url": url, "kinds": ["tenant.*"] })).await.expect(201);
    Client::admin(service.place()).patch("/v1/admin/tenants/told", &json!({ "weight": 2 })).await.expect(200);
    let mut sent = String::new();
    let receive = async {
        let (mut stream, _) = receiver.accept().await.unwrap();
        while !sent.contains(r#""weight":2"#) {
            let mut bytes = Vec::new();
            assert!(stream.read_buf(&mut bytes).await.unwrap() > 0, "{sent}");
            sent.push_str(&String::from_utf8_lossy(&bytes));
        }
    };
    tokio::time::timeout(Duration::from_secs(30), receive).await.unwrap();

    let head = sent.to_lowercase();
    assert!(head.starts_with("post /hook "), "{sent}");
    assert!(["webhook-id: ", "webhook-timestamp: ", "webhook-signature: v1,"].iter().all(|name| head.contains(name)), "{sent}");
    assert!(webhook["secret"].as_str().unwrap().starts_with("whsec_"));
}

#[tokio::test]
async fn a_request_that_is_sent_twice_with_a_key_makes_one_sandbox() {
    let client = shared().client();
    let body = json!({ "image": "busybox", "command": ["sleep", "1000"] });
    let send = async || {
        let request = client.request(Method::POST, "/v1/sandboxes").header("idempotency-key", "the-same").json(&body);
        client.send(request, "POST", "/v1/sandboxes").await.expect(201)
    };

    let (first, second) = (send().await, send().await);
    let listed = client.get("/v1/sandboxes").await.expect(200);

    assert_eq!(first["id"], second["id"]);
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    gone(&client, &format!("/v1/sandboxes/{}", first["id"].as_str().unwrap())).await;
}

#[tokio::test]
async fn many_runs_are_asked_for_at_once_and_each_is_answered_for_itself() {
    let client = shared().client();
    let echo = |text: &str| json!({ "image": "busybox", "command": ["echo", text] });
    let request = json!({ "runs": [echo("one"), { "image": "no-such-image" }, echo("three")] });

    let answer = client.post("/v1/runs/batch", &request).await.expect(200);
    let ids = [0, 2].map(|place| answer["items"][place]["run"]["id"].as_str().unwrap());
    let again = client.get(&format!("/v1/runs?ids={},{}", ids[0], ids[1])).await.expect(200);

    assert_eq!((stdout(&answer["items"][0]["run"]), stdout(&answer["items"][2]["run"])), ("one\n", "three\n"));
    assert_eq!(answer["items"][1]["problem"]["code"], "image_not_found");
    assert_eq!([&again["items"][0], &again["items"][1]], [&answer["items"][0], &answer["items"][2]]);
}

#[tokio::test]
async fn whoever_waits_for_a_state_is_answered_when_it_is_reached() {
    let client = shared().client();
    let sandbox = running(&client, "sleep 4; exit 5").await;

    let not_yet = client.get(&format!("{sandbox}/wait?until=exited&timeout_ms=50")).await.expect(200);
    let ended = client.get(&format!("{sandbox}/wait?until=exited&timeout_ms=20000")).await.expect(200);

    assert_eq!((&not_yet["result"], &ended["result"]), (&json!("timed_out"), &json!("reached")));
    assert_exit(&ended["sandbox"], 5);
}

#[tokio::test]
async fn lists_come_in_pages_and_by_filter() {
    let client = shared().client();
    for number in 0..3 {
        client
            .post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["true"], "labels": { "number": number.to_string() } }))
            .await
            .expect(201);
    }

    let first = client.get("/v1/sandboxes?limit=2").await.expect(200);
    let rest = client.get(&format!("/v1/sandboxes?limit=2&cursor={}", first["next_cursor"].as_str().unwrap())).await.expect(200);
    let filtered = client.get("/v1/sandboxes?label=number%3D1").await.expect(200);

    let count = |page: &Value| page["items"].as_array().unwrap().len();
    assert_eq!((count(&first), count(&rest), &rest["next_cursor"]), (2, 1, &Value::Null));
    assert_eq!((count(&filtered), &filtered["items"][0]["labels"]["number"]), (1, &json!("1")));
}

#[tokio::test]
async fn a_token_says_whose_tenant_and_what_it_may_do() {
    let service = shared();
    let (mine, theirs) = (service.client(), service.client());
    let run = mine.shell("echo secret").await;
    let path = format!("/v1/runs/{}", run["id"].as_str().unwrap());

    mine.get(&path).await.expect(200);
    theirs.get(&path).await.problem(404, "not_found");
    Client::with_scope(&service.place, "somebody", "images:read").get(&path).await.problem(403, "forbidden");
    Client::with_token(&service.place, None).get(&path).await.problem(401, "unauthenticated");
}

#[tokio::test]
async fn a_tenant_has_as_much_as_its_quota_and_is_told_so() {
    let service = shared();
    let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
    let request = json!({ "id": tenant, "quotas": { "sandboxes": 1 } });
    Client::admin(&service.place).post("/v1/admin/tenants", &request).await.expect(201);
    let client = Client::of(&service.place, &tenant);
    let sandbox = running(&client, IDLE).await;

    let refused = client.post("/v1/runs", &json!({ "image": "busybox" })).await.problem(429, "quota_exceeded");
    let quota = client.get("/v1/quota").await.expect(200);

    assert_eq!((&refused["quota"], &refused["limit"], &refused["used"]), (&json!("sandboxes"), &json!(1), &json!(1)));
    assert_eq!(quota["tenant"]["used"]["sandboxes"], 1);
    gone(&client, &sandbox).await;
}

#[tokio::test]
async fn any_node_answers_for_a_sandbox_of_another() {
    let database = Database::start();
    let first = Service::start_node(&database.url, None, &[]);
    let second = Service::start_node(&database.url, Some(&first), &[]);
    let tenant = "traveller";
    let path = running(&Client::of(first.place(), tenant), "echo begun; exec sleep 1000").await;
    let elsewhere = Client::of(second.place(), tenant);

    let ran = elsewhere.post(&format!("{path}/execs"), &json!({ "command": ["echo", "by way of the other"] })).await.expect(200);
    let log = elsewhere.get(&format!("{path}/logs?follow=false")).await.text;

    assert_eq!(stdout(&ran), "by way of the other\n");
    assert!(log.contains("begun"), "{log}");
    gone(&elsewhere, &path).await;
}

#[tokio::test]
async fn who_did_what_is_kept_as_events() {
    let client = shared().client();
    let sandbox = running(&client, IDLE).await;
    gone(&client, &sandbox).await;

    let events = client.get("/v1/events?kind=sandbox.deleted").await.expect(200);

    let event = &events["items"][0];
    assert_eq!(event["object"], sandbox.replace("/v1/sandboxes/", "sandbox/"));
    assert_eq!(event["actor"]["principal"], "tester");
}

#[tokio::test]
async fn prometheus_is_told_of_every_run() {
    let service = shared();
    service.client().shell("true").await;

    let text = reqwest::get(format!("{}/metrics", service.place.metrics_url)).await.unwrap().text().await.unwrap();

    assert!(text.contains("# TYPE ") && text.contains("reason=\"exited\""), "{text}");
}

#[tokio::test]
async fn a_generated_client_for_python_runs_programs_and_is_told_typed_problems() {
    let client = shared().client();

    let done = Sdk::generate().used_by(&client);

    assert_eq!(done, "a run\na limit\na batch\na sandbox\na problem\n");
}

#[tokio::test]
async fn the_contract_is_served_for_programs_and_for_people() {
    let service = shared();
    let get = async |path: &str| reqwest::get(format!("{}{path}", service.place.url)).await.unwrap().text().await.unwrap();

    let (contract, page) = (get("/openapi.yaml").await, get("/docs").await);

    assert!(contract.contains("\nopenapi: 3.1"), "{contract:.100}");
    assert!(page.contains("/v1/runs") && !page.contains("<script"), "{page:.100}");
}

/// One row of the table: what it is called, whether there is it, and the test that shows it.
#[derive(Debug)]
struct Row<'a> {
    name: &'a str,
    is_there: &'a str,
    test: Option<&'a str>,
}

/// The rows of the table in `docs/features.md`: feature, ours, endpoint, test.
fn rows(page: &str) -> Vec<Row<'_>> {
    let lines = page.lines().filter_map(|line| line.strip_prefix("| ")).skip(1);
    lines
        .map(|line| {
            let cells: Vec<_> = line.trim_end_matches('|').split('|').map(str::trim).collect();
            let [name, is_there, _, test] = cells[..] else { panic!("not four cells: {line}") };
            Row { name, is_there, test: test.strip_prefix('`').and_then(|test| test.strip_suffix('`')) }
        })
        .collect()
}

#[test]
fn the_page_of_features_says_what_the_tests_here_show() {
    let page = include_str!("../docs/features.md");
    let rows = rows(page);
    let shown: BTreeSet<_> =
        include_str!("features.rs").split("#[tokio::test]\nasync fn ").skip(1).map(|test| test.split('(').next().unwrap()).collect();

    let named: BTreeSet<_> = rows.iter().filter_map(|row| row.test).collect();
    let names: Vec<_> = rows.iter().map(|row| row.name).collect();

    assert_eq!(named, shown);
    assert_eq!(names, COMPARED);
    for row in &rows {
        let is_told = matches!((row.is_there, row.test), ("yes" | "partly", Some(_)) | ("not yet", None));
        assert!(is_told, "{row:?}");
    }
}

/// By what services of this kind are compared, in the words of the comparison: what is not here yet has a row, too.
const COMPARED: [&str; 35] = [
    "run-once call",
    "long-lived sandbox",
    "exec in running",
    "stdout / stderr apart",
    "streaming",
    "stdin while running",
    "TTY + resize",
    "resume stream by offset",
    "file upload/download",
    "file watch",
    "port exposure / proxy",
    "pause / resume",
    "snapshot / fork",
    "warm pools",
    "volumes",
    "images",
    "network policy",
    "limits per request",
    "reports CPU time / peak memory",
    "machine-readable kill reason",
    "output limit reported",
    "test-case judging",
    "compile once, run many",
    "batch",
    "webhooks",
    "idempotent create",
    "wait for state",
    "pagination / filters",
    "tenancy / auth",
    "quotas",
    "several machines behind one address",
    "audit log",
    "Prometheus / Grafana",
    "SDKs",
    "OpenAPI published",
];
