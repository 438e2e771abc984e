//! A run with cases: what each is given and judged by, what passes from one to the next, what ends them, and what a death in the middle does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use mayfly_tests::{
    Answer, Client, Service,
    outcome::{assert_exit, assert_reason, stdout},
    service::shared,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const KEPT_BYTES: usize = 64 * 1024;
/// Reads a number, and writes that many times two.
const DOUBLE: &str = "read n; echo $((n * 2))";

fn shell(script: &str) -> Value {
    json!(["sh", "-c", script])
}

/// A run of this script in small limits, with these cases.
fn request(script: &str, cases: Value) -> Value {
    json!({
        "image": "busybox", "command": shell(script), "cases": cases,
        "limits": { "memory_bytes": 16 << 20, "disk_bytes": 4 << 20 }, "wait_ms": 60_000,
    })
}

/// A compile step of this script.
fn step(script: &str) -> Value {
    json!({ "command": shell(script), "limits": { "memory_bytes": 16 << 20 } })
}

/// This of each case.
fn each<'a>(run: &'a Value, what: &str) -> Vec<&'a Value> {
    run["cases"].as_array().unwrap_or_else(|| panic!("no cases in {run:#}")).iter().map(|case| &case[what]).collect()
}

#[track_caller]
fn assert_verdicts(run: &Value, of_all: &str, of_each: &[&str]) {
    assert_eq!(each(run, "verdict"), of_each, "{run:#}");
    assert_eq!(run["verdict"], of_all, "{run:#}");
}

fn flood(bytes: usize) -> String {
    (0..bytes).map(|n| char::from(b'a' + u8::try_from(n % 65_536 % 26).unwrap())).collect()
}

#[tokio::test]
async fn each_case_is_given_its_input_and_judged_by_its_output() {
    let client = shared().client();
    let cases = json!([
        { "name": "right", "stdin": "2\n", "expected_stdout": "4\n" },
        { "name": "wrong", "stdin": "3\n", "expected_stdout": "7\n" },
        { "stdin": "x y\n", "expected_stdout": "0\n" },
        { "stdin": "Ng==", "stdin_encoding": "base64", "expected_stdout": "MTIK", "expected_stdout_encoding": "base64" },
        { "stdin": "5\n" },
    ]);

    let run = client.run(&request("read n; case $n in *' '*) echo bad >&2; exit 3;; esac; echo $((n * 2))", cases)).await;

    assert_verdicts(&run, "wrong_output", &["accepted", "wrong_output", "failed", "accepted", "accepted"]);
    assert_eq!(each(&run, "index"), [0, 1, 2, 3, 4]);
    assert_eq!(each(&run, "name"), [&json!("right"), &json!("wrong"), &Value::Null, &Value::Null, &Value::Null]);
    assert_eq!(each(&run, "stdout"), ["4\n", "6\n", "", "12\n", "10\n"]);
    assert_eq!((&run["cases"][2]["stderr"], &run["cases"][2]["outcome"]["exit_code"]), (&json!("bad\n"), &json!(3)));
    // That of the first that is not accepted.
    assert_exit(&run, 0);
    assert_eq!((&run["state"], stdout(&run), &run["stderr"]), (&json!("exited"), "", &json!("")), "{run:#}");
    assert!(run["started_at"].is_string(), "{run:#}");
    let id = run["id"].as_str().unwrap();
    assert_eq!(client.get(&format!("/v1/runs/{id}")).await.expect(200), run);
    let log = client.log(id).await;
    assert_eq!((log.stdout_text(), log.end.as_ref()), (String::new(), Some(&run["outcome"])));
}

#[tokio::test]
async fn a_run_without_cases_has_no_verdict() {
    let run = shared().client().shell("echo alone").await;

    assert_eq!((&run["cases"], &run["verdict"], stdout(&run)), (&Value::Null, &Value::Null, "alone\n"), "{run:#}");
}

#[tokio::test]
async fn what_is_compiled_once_runs_with_every_input() {
    let client = shared().client();
    let volume = volume(&client).await;
    let cases = json!([
        { "stdin": "1\n", "expected_stdout": "2" }, { "stdin": "2\n", "expected_stdout": "4" }, { "stdin": "3\n", "expected_stdout": "6" },
    ]);
    let mut request = request("sh program; rm program; ls made-by-case 2>/dev/null; touch made-by-case", cases);
    request["files"] = json!([{ "path": "source", "content": "read n; echo $((n * FACTOR))\n" }]);
    request["compile"] = step("echo compiling; echo x >> /v/compiled; sed s/FACTOR/2/ source > program");
    request["volumes"] = json!([{ "name": volume, "path": "/v" }]);

    let run = client.run(&request).await;

    // Each finds what the step left, and nothing of what the one before did to it.
    assert_verdicts(&run, "accepted", &["accepted"; 3]);
    assert_eq!(each(&run, "stdout"), ["2\n", "4\n", "6\n"]);
    assert_exit(&run, 0);
    assert_eq!(run["compile"]["stdout"], "compiling\n", "{run:#}");
    assert_eq!(written(&client, &volume, "compiled").await, "x\n");
    delete(&client, &volume).await;
}

#[tokio::test]
async fn source_is_judged_in_a_language_that_is_compiled_and_in_one_that_is_not() {
    let service = Service::start_with(&[]).unwrap();
    for image in ["gcc", "python"] {
        service.import(image).unwrap();
    }
    let judged = async |language: &str, source: &str| {
        let cases = json!([
            { "stdin": "20 22", "expected_stdout": "42" }, { "stdin": "1 1", "expected_stdout": "3" }, { "stdin": "0 0", "expected_stdout": "0" },
        ]);
        // All are slow beside other tests.
        let limits = json!({ "wall_ms": 60_000 });
        let mut request = json!({ "language": language, "source": source, "cases": cases, "limits": limits, "wait_ms": 90_000 });
        if language == "c" {
            request["compile"] = json!({ "limits": limits });
        }
        service.client().run(&request).await
    };

    let python = judged("python", "print(sum(map(int, input().split())))").await;
    let adding = "#include <stdio.h>\nint main(void) { int a, b; scanf(\"%d %d\", &a, &b); printf(\"%d\\n\", a + b); }";
    let c = judged("c", adding).await;

    for run in [&python, &c] {
        assert_verdicts(run, "wrong_output", &["accepted", "wrong_output", "accepted"]);
        assert_eq!(each(run, "stdout"), ["42\n", "2\n", "0\n"]);
    }
}

#[tokio::test]
async fn each_case_has_files_and_a_layer_of_its_own() {
    let mut request = request("cat in; rm in; ls mark 2>/dev/null; touch mark", json!([{}, {}, {}]));
    request["files"] = json!([{ "path": "in", "content": "given\n" }]);

    let run = shared().client().run(&request).await;

    assert_verdicts(&run, "accepted", &["accepted"; 3]);
    assert_eq!(each(&run, "stdout"), ["given\n"; 3]);
}

#[tokio::test]
async fn nothing_runs_where_nothing_was_compiled() {
    let mut request = request("echo never", json!([{}, {}]));
    request["compile"] = step("exit 3");

    let run = shared().client().run(&request).await;

    assert_reason(&run, "compile_failed");
    assert_verdicts(&run, "not_run", &["not_run", "not_run"]);
    assert_eq!(each(&run, "outcome"), [&Value::Null, &Value::Null]);
    assert_eq!((&run["state"], &run["started_at"]), (&json!("failed"), &Value::Null), "{run:#}");
}

#[tokio::test]
async fn white_space_at_the_ends_counts_where_that_is_asked_for() {
    let client = shared().client();
    let cases = json!([{ "expected_stdout": "a  b\nc" }, { "expected_stdout": "a  b \nc\n\n" }, { "expected_stdout": "a b\nc\n" }]);
    let mut request = request("printf 'a  b \\nc\\n\\n'", cases);
    let trimmed = client.run(&request).await;
    request["comparison"] = json!("exact");
    let exact = client.run(&request).await;

    assert_verdicts(&trimmed, "wrong_output", &["accepted", "accepted", "wrong_output"]);
    assert_verdicts(&exact, "wrong_output", &["wrong_output", "accepted", "wrong_output"]);
}

#[tokio::test]
async fn a_failure_is_the_last_that_is_run_where_that_is_asked_for() {
    let cases = json!([{ "stdin": "1\n" }, { "stdin": "1\n", "expected_stdout": "3" }, { "stdin": "1\n" }]);
    let mut request = request(DOUBLE, cases);
    request["stop_at_failure"] = json!(true);

    let run = shared().client().run(&request).await;

    assert_verdicts(&run, "wrong_output", &["accepted", "wrong_output", "not_run"]);
    assert_eq!(run["cases"][2]["outcome"], Value::Null);
}

#[tokio::test]
async fn each_case_has_the_whole_limits() {
    let cases = json!([{ "stdin": "0.8\n" }, { "stdin": "60\n" }, { "stdin": "0.8\n" }, { "stdin": "0.8\n" }]);
    let mut request = request("read n; sleep $n; dd if=/dev/zero of=zeros bs=1M count=3 2>/dev/null && echo done", cases);
    request["limits"]["wall_ms"] = json!(2000);

    let run = shared().client().run(&request).await;

    assert_verdicts(&run, "failed", &["accepted", "failed", "accepted", "accepted"]);
    assert_reason(&run, "wall_timeout");
    assert_eq!(run["cases"][1]["outcome"]["reason"], "wall_timeout");
}

#[tokio::test]
async fn a_program_that_is_not_there_fails_every_case() {
    let mut request = request("", json!([{}, {}]));
    request["command"] = json!(["/no/such/program"]);

    let run = shared().client().run(&request).await;

    assert_verdicts(&run, "failed", &["failed", "failed"]);
    assert_reason(&run, "start_failed");
    assert_eq!((&run["state"], &run["started_at"]), (&json!("failed"), &Value::Null), "{run:#}");
}

#[tokio::test]
async fn all_of_the_output_is_compared_and_its_beginning_kept() {
    let client = shared().client();
    let (all, len) = (flood(150_000), 150_000);
    let expected = [all.clone(), format!("{}?", &all[1..]), format!("{all}x")];
    let mut request = request("", json!(expected.map(|expected| json!({ "expected_stdout": expected }))));
    (request["command"], request["comparison"]) = (json!(["flood", len.to_string()]), json!("exact"));
    let whole = client.run(&request).await;
    request["limits"]["output_bytes"] = json!(1000);
    request["cases"] = json!([{ "expected_stdout": flood(1000) }]);
    let cut = client.run(&request).await;

    assert_verdicts(&whole, "wrong_output", &["accepted", "wrong_output", "wrong_output"]);
    let first = &whole["cases"][0];
    assert_eq!(first["stdout"].as_str().unwrap(), flood(KEPT_BYTES));
    assert_eq!((&first["stdout_omitted_bytes"], &first["outcome"]["truncated"]["stdout"]), (&json!(len - KEPT_BYTES), &json!(false)));
    // More was written than may be: whatever it was, that is not what was expected.
    assert_verdicts(&cut, "wrong_output", &["wrong_output"]);
    assert_eq!(cut["cases"][0]["outcome"]["truncated"]["stdout"], true);
}

#[tokio::test]
async fn what_all_cases_use_is_counted_as_one_run() {
    let service = shared();
    let client = Client::of(&service.place, &format!("tenant-{}", uuid::Uuid::new_v4()));

    let run = client.run(&request("read n; burn 100; echo $n", json!([{ "stdin": "12\n" }, { "stdin": "345\n" }]))).await;
    let used = client.get("/v1/usage").await.expect(200);

    assert_verdicts(&run, "accepted", &["accepted", "accepted"]);
    let total = &used["total"];
    assert_eq!((&total["runs"], &total["output_bytes"], &total["log_bytes"]), (&json!(1), &json!(7), &json!(7)), "{used:#}");
    let sum: u64 = each(&run, "outcome").iter().map(|outcome| outcome["usage"]["cpu_ms"].as_u64().unwrap()).sum();
    assert!(sum >= 200 && total["cpu_ms"].as_u64().unwrap().abs_diff(sum) <= 2, "{sum} ms in {used:#}");
}

#[tokio::test]
async fn who_cancels_ends_the_case_that_runs_and_those_behind_it() {
    let client = shared().client();
    let volume = volume(&client).await;
    let cases = json!([{ "stdin": "0\n" }, { "stdin": "1000\n" }, { "stdin": "0\n" }]);
    let mut request = request("read n; echo $n >> /v/begun; sleep $n", cases);
    request["volumes"] = json!([{ "name": volume, "path": "/v" }]);
    request["wait_ms"] = json!(0);
    let run = client.post("/v1/runs", &request).await.expect(202);
    assert_eq!((run["cases"].as_array().unwrap().len(), &run["verdict"]), (3, &Value::Null), "{run:#}");
    let path = format!("/v1/runs/{}", run["id"].as_str().unwrap());
    until_written(&client, &volume, "begun", "0\n1000\n").await;

    let cancelled = client.delete(&path).await.expect(200);

    assert_verdicts(&cancelled, "failed", &["accepted", "failed", "not_run"]);
    assert_reason(&cancelled, "stopped_by_user");
    assert_eq!(cancelled["cases"][1]["outcome"]["reason"], "stopped_by_user");
    assert_eq!(client.get(&path).await.expect(200), cancelled);
    delete(&client, &volume).await;
}

#[tokio::test]
async fn what_cases_cannot_be_is_refused_by_its_field() {
    let client = shared().client();
    let field = async |change: &dyn Fn(&mut Value)| {
        let mut body = request("true", json!([{}, {}]));
        change(&mut body);
        client.post("/v1/runs", &body).await.problem(422, "invalid_request")["field"].clone()
    };

    assert_eq!(field(&|body| body["cases"] = json!([])).await, "cases");
    assert_eq!(field(&|body| body["cases"] = json!(vec![json!({}); 65])).await, "cases");
    assert_eq!(field(&|body| body["cases"][1] = json!({ "expected": "x" })).await, "cases[1].expected");
    assert_eq!(field(&|body| body["cases"][0]["name"] = json!("ä".repeat(65))).await, "cases[0].name");
    assert_eq!(field(&|body| body["cases"][1] = json!({ "stdin": "?", "stdin_encoding": "base64" })).await, "cases[1].stdin");
    assert_eq!(field(&|body| body["stdin"] = json!("")).await, "stdin");
    assert_eq!(field(&|body| body["comparison"] = json!("loose")).await, "comparison");
    assert_eq!(field(&|body| body["output_policy"] = json!("discard")).await, "output_policy");
    let without = |name: &'static str, value: Value| {
        move |body: &mut Value| {
            body.as_object_mut().unwrap().remove("cases");
            body[name] = value.clone();
        }
    };
    assert_eq!(field(&without("comparison", json!("exact"))).await, "comparison");
    assert_eq!(field(&without("stop_at_failure", json!(true))).await, "stop_at_failure");
    let large = "x".repeat(9 << 20);
    let body = request("true", json!([{ "stdin": large }, { "expected_stdout": large }]));
    client.post("/v1/runs", &body).await.problem(413, "payload_too_large");
}

#[tokio::test]
async fn sixty_four_cases_with_names_of_sixty_four_characters_are_run() {
    let cases = vec![json!({ "name": "ä".repeat(64), "expected_stdout": "" }); 64];

    let run = shared().client().run(&request("true", json!(cases))).await;

    assert_verdicts(&run, "accepted", &["accepted"; 64]);
}

#[tokio::test]
async fn a_service_that_dies_while_a_case_runs_loses_none_and_runs_none_twice() {
    is_judged_through_a_death_at("service.case.begun").await;
}

#[tokio::test]
async fn a_service_that_dies_when_a_case_has_ended_loses_none_and_runs_none_twice() {
    is_judged_through_a_death_at("service.case.ended").await;
}

#[tokio::test]
async fn a_service_that_dies_when_the_end_of_a_case_is_stored_loses_none_and_runs_none_twice() {
    is_judged_through_a_death_at("service.case.stored").await;
}

#[tokio::test]
async fn a_keeper_that_dies_in_the_middle_fails_the_case_that_ran_and_a_retry_begins_with_the_first() {
    let mut service = Service::start();
    let survivor = |service: &Service| Client::of(service.place(), "survivor");
    let volume = volume(&survivor(&service)).await;
    let script = "read n; echo $n >> /v/ran; if [ $n = 2 ] && [ ! -e /v/again ]; then touch /v/again; sleep 1000; fi; echo $n";
    let mut body = request(script, json!([{ "stdin": "1\n" }, { "stdin": "2\n" }, { "stdin": "3\n" }]));
    body["volumes"] = json!([{ "name": volume, "path": "/v" }]);
    body["wait_ms"] = json!(0);
    let die_in_the_second = async |service: &mut Service, body: &Value, ran: &str| {
        let client = survivor(service);
        let run = client.post("/v1/runs", body).await.expect(202);
        until_written(&client, &volume, "ran", ran).await;
        kill(Pid::from_raw(service.place().keeper_pid().cast_signed()), Signal::SIGKILL).unwrap();
        service.wait().unwrap();
        service.start_again().unwrap();
        survivor(service).until(&format!("/v1/runs/{}", run["id"].as_str().unwrap()), |run| !run["outcome"].is_null()).await
    };

    let lost = die_in_the_second(&mut service, &body, "1\n2\n").await;
    let reset = json!({ "image": "busybox", "command": shell("rm /v/again"), "volumes": body["volumes"] });
    assert_exit(&survivor(&service).run(&reset).await, 0);
    body["retry"] = json!(1);
    let retried = die_in_the_second(&mut service, &body, "1\n2\n1\n2\n").await;

    assert_reason(&lost, "infra_error");
    assert_verdicts(&lost, "failed", &["accepted", "failed", "not_run"]);
    assert_eq!((&lost["cases"][0]["stdout"], &lost["cases"][1]["outcome"]["reason"]), (&json!("1\n"), &json!("infra_error")));
    assert_verdicts(&retried, "accepted", &["accepted"; 3]);
    assert_eq!(retried["attempt"], 2, "{retried:#}");
    assert_eq!(written(&survivor(&service), &volume, "ran").await, "1\n2\n1\n2\n1\n2\n3\n");
    delete(&survivor(&service), &volume).await;
}

#[tokio::test]
async fn a_case_that_its_keeper_cannot_forget_ends_its_run_and_says_why() {
    let service = Service::start();
    let client = service.client();
    let undeletable = AppendOnly::begin(&service.place().data_dir.join("logs"));

    let run = client.run(&request("cat", json!([{ "stdin": "1\n" }, {}, {}]))).await;
    drop(undeletable);

    assert_reason(&run, "infra_error");
    let message = run["outcome"]["message"].as_str().unwrap();
    assert!(message.contains("case 0 cannot be dropped: ") && message.contains("not permitted"), "{message}");
    assert_verdicts(&run, "not_run", &["accepted", "not_run", "not_run"]);
    assert_eq!(run["cases"][0]["stdout"], "1\n");
    assert_verdicts(&client.run(&request("cat", json!([{}, {}, {}]))).await, "accepted", &["accepted"; 3]);
}

/// A folder from which nothing can be deleted (chattr(1)); as it was when this is dropped.
struct AppendOnly(PathBuf);

impl AppendOnly {
    fn begin(folder: &Path) -> Self {
        let this = Self(folder.to_owned());
        assert!(this.change("+a"), "the file system of {} has append-only folders", folder.display());
        this
    }

    fn change(&self, attribute: &str) -> bool {
        Command::new("chattr").arg(attribute).arg(&self.0).status().unwrap().success()
    }
}

impl Drop for AppendOnly {
    fn drop(&mut self) {
        self.change("-a");
    }
}

/// The same request is sent before the death, in the second of three cases, and after it: with what is compiled, and without.
async fn is_judged_through_a_death_at(point: &str) {
    let mut service = Service::start();
    let volume = volume(&Client::of(service.place(), "survivor")).await;
    for is_compiled in [true, false] {
        service.kill();
        service.arm(&format!("{point}=1*off->1*return"));
        service.start_again().unwrap();
        let cases = json!([
            { "stdin": "1\n", "expected_stdout": "2" }, { "stdin": "2\n", "expected_stdout": "5" }, { "stdin": "3\n", "expected_stdout": "6" },
        ]);
        let marks = format!("ran-{is_compiled}");
        let mut body = request(&format!("read n; echo $n >> /v/{marks}; . ./factor; echo $((n * factor))"), cases);
        body["volumes"] = json!([{ "name": volume, "path": "/v" }]);
        if is_compiled {
            body["compile"] = step("echo factor=2 > factor");
        } else {
            body["files"] = json!([{ "path": "factor", "content": "factor=2\n" }]);
        }
        let key = format!("{point}-{is_compiled}");

        send(&Client::of(service.place(), "survivor"), &key, &body).await.expect_err("the service died before it could answer");
        service.wait().unwrap();
        service.arm("");
        service.start_again().unwrap();
        let client = Client::of(service.place(), "survivor");
        let run = send(&client, &key, &body).await.unwrap().expect(200);

        assert_verdicts(&run, "wrong_output", &["accepted", "wrong_output", "accepted"]);
        assert_eq!(each(&run, "stdout"), ["2\n", "4\n", "6\n"]);
        assert_eq!((&run["attempt"], written(&client, &volume, &marks).await), (&json!(1), "1\n2\n3\n".to_owned()), "{run:#}");
        assert_eq!(send(&client, &key, &body).await.unwrap().expect(200), run);
    }
    delete(&Client::of(service.place(), "survivor"), &volume).await;
    let footprint = service.place().footprint();
    service.stop().unwrap();
    assert_eq!(footprint.wait_until_gone(SOON), Vec::<String>::new());
}

async fn send(client: &Client, key: &str, body: &Value) -> reqwest::Result<Answer> {
    let request = client.request(Method::POST, "/v1/runs").header("idempotency-key", key).json(body);
    client.try_send(request, "POST", "/v1/runs").await
}

/// A volume, by its name: what is done there outlives every sandbox.
async fn volume(client: &Client) -> String {
    let name = format!("marks-{}", uuid::Uuid::new_v4().simple());
    client.post("/v1/volumes", &json!({ "name": name, "size_bytes": 16 << 20 })).await.expect(201);
    name
}

/// What stands in this file of the volume; nothing if there is none.
async fn written(client: &Client, volume: &str, file: &str) -> String {
    let script = format!("cat /v/{file} 2>/dev/null || true");
    let volumes = json!([{ "name": volume, "path": "/v", "read_only": true }]);
    stdout(&client.run(&json!({ "image": "busybox", "command": shell(&script), "volumes": volumes })).await).to_owned()
}

async fn until_written(client: &Client, volume: &str, file: &str, wanted: &str) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let found = written(client, volume, file).await;
        if found == wanted {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{file} holds {found:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Deletes it as soon as nobody holds it.
async fn delete(client: &Client, volume: &str) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let answer = client.delete(&format!("/v1/volumes/{volume}")).await;
        if answer.status == 204 {
            return;
        }
        answer.problem(409, "volume_in_use");
        assert!(tokio::time::Instant::now() < deadline, "{volume} is held for good");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
