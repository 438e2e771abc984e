//! A run with a step before its program: what passes from one to the other, what each is held to, and what a death in between does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use mayfly_tests::{
    Client, Service,
    outcome::{assert_exit, assert_reason, stdout},
    service::{Place, shared},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

fn shell(script: &str) -> Value {
    json!(["sh", "-c", script])
}

/// A run in small limits whose step and whose program are these scripts.
fn request(step: &str, program: &str) -> Value {
    json!({
        "image": "busybox", "compile": { "command": shell(step), "limits": { "memory_bytes": 16 << 20 } }, "command": shell(program),
        "limits": { "memory_bytes": 16 << 20, "disk_bytes": 4 << 20 }, "wait_ms": 60_000,
    })
}

#[track_caller]
fn assert_step(run: &Value, reason: &str, code: impl Into<Value>) {
    let outcome = &run["compile"]["outcome"];
    assert_eq!((&outcome["reason"], &outcome["exit_code"]), (&json!(reason), &code.into()), "{run:#}");
}

/// The program was not begun, and says why.
#[track_caller]
fn assert_not_compiled(run: &Value) {
    assert_reason(run, "compile_failed");
    assert_eq!(
        (&run["state"], &run["started_at"], &run["outcome"]["exit_code"]),
        (&json!("failed"), &Value::Null, &Value::Null),
        "{run:#}"
    );
    assert_eq!((&run["stdout"], &run["stderr"]), (&json!(""), &json!("")), "{run:#}");
}

async fn tenant_with(place: &Place, quotas: Value) -> Client {
    let name = format!("tenant-{}", uuid::Uuid::new_v4());
    Client::admin(place).post("/v1/admin/tenants", &json!({ "id": name, "quotas": quotas })).await.expect(201);
    Client::of(place, &name)
}

#[tokio::test]
async fn the_program_is_started_on_what_the_step_left() {
    let mut request =
        request("sed s/given/made/ in/source > made; rm in/source; mkdir -p /opt/lib; echo x > /opt/lib/x", "cat made /opt/lib/x; ls in");
    request["files"] = json!([{ "path": "in/source", "content": "given\n" }]);

    let run = shared().client().run(&request).await;

    assert_step(&run, "exited", 0);
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "made\nx\n");
    assert_eq!(
        run["compile"]["command"],
        shell("sed s/given/made/ in/source > made; rm in/source; mkdir -p /opt/lib; echo x > /opt/lib/x")
    );
}

#[tokio::test]
async fn nothing_but_files_passes_from_the_step_to_the_program() {
    let step = "sleep 1000 & echo of-the-step > /dev/shm/x 2>/dev/null; echo $A; cat";
    let mut request = request(step, "echo $A; cat; ps | grep -c '[s]leep 1000'; ls /dev/shm 2>/dev/null");
    request["compile"]["env"] = json!({ "A": "step" });
    (request["env"], request["stdin"]) = (json!({ "A": "run" }), json!("typed\n"));

    let run = shared().client().run(&request).await;

    assert_eq!(run["compile"]["stdout"], "step\n", "{run:#}");
    assert_eq!(stdout(&run), "run\ntyped\n0\n", "{run:#}");
}

#[tokio::test]
async fn the_output_of_both_is_told_apart() {
    let client = shared().client();
    let run = client.run(&request("echo compiling; echo warning >&2", "echo running; echo error >&2; exit 4")).await;

    assert_exit(&run, 4);
    assert_eq!((&run["compile"]["stdout"], &run["compile"]["stderr"]), (&json!("compiling\n"), &json!("warning\n")));
    assert_eq!((stdout(&run), &run["stderr"]), ("running\n", &json!("error\n")));
    let id = run["id"].as_str().unwrap();
    assert_eq!(client.get(&format!("/v1/runs/{id}")).await.expect(200), run);
    assert_eq!(client.log(id).await.stdout_text(), "running\n");
}

#[tokio::test]
async fn a_step_that_fails_keeps_the_program_from_running() {
    let run = shared().client().run(&request("echo wrong in line 1 >&2; exit 3", "echo never")).await;

    assert_not_compiled(&run);
    assert_step(&run, "exited", 3);
    assert_eq!(run["compile"]["stderr"], "wrong in line 1\n");
    assert!(run["outcome"]["message"].as_str().unwrap().contains("exited with code 3"), "{run:#}");
}

#[tokio::test]
async fn a_compiler_that_is_not_there_is_told() {
    let mut request = request("", "echo never");
    request["compile"]["command"] = json!(["/no/such/compiler"]);

    let run = shared().client().run(&request).await;

    assert_not_compiled(&run);
    assert_step(&run, "start_failed", Value::Null);
    assert!(run["outcome"]["message"].as_str().unwrap().contains("/no/such/compiler"), "{run:#}");
}

#[tokio::test]
async fn each_has_its_own_time() {
    let client = shared().client();
    let within = |(step, step_ms): (&str, u64), (program, program_ms): (&str, u64)| {
        let mut request = request(step, program);
        request["compile"]["limits"]["wall_ms"] = json!(step_ms);
        request["limits"]["wall_ms"] = json!(program_ms);
        request
    };
    let slow_step = client.run(&within(("sleep 3.5", 30_000), ("true", 3_000))).await;
    let late_step = client.run(&within(("sleep 60", 400), ("true", 30_000))).await;
    let slow_program = client.run(&within(("true", 3_000), ("sleep 3.5", 30_000))).await;
    let late_program = client.run(&within(("true", 30_000), ("sleep 60", 400))).await;

    assert_exit(&slow_step, 0);
    assert_not_compiled(&late_step);
    assert_step(&late_step, "wall_timeout", Value::Null);
    assert_exit(&slow_program, 0);
    assert_reason(&late_program, "wall_timeout");
    let limits = (&slow_program["compile"]["limits"]["wall_ms"], &slow_program["limits"]["wall_ms"]);
    assert_eq!(limits, (&json!(3_000), &json!(30_000)));
}

#[tokio::test]
async fn each_has_its_own_memory() {
    let client = shared().client();
    let hogging = |step: &str, program: &str, step_mib: u64, program_mib: u64| {
        let mut request = request(step, program);
        request["compile"]["limits"]["memory_bytes"] = json!(step_mib << 20);
        request["limits"]["memory_bytes"] = json!(program_mib << 20);
        request
    };
    let large_step = client.run(&hogging("hog 48", "true", 96, 16)).await;
    let small_step = client.run(&hogging("exec hog 48", "true", 16, 96)).await;
    let large_program = client.run(&hogging("true", "hog 48", 16, 96)).await;

    assert_step(&large_step, "exited", 0);
    assert_exit(&large_step, 0);
    assert_not_compiled(&small_step);
    assert_step(&small_step, "oom_killed", Value::Null);
    assert_exit(&large_program, 0);
}

#[tokio::test]
async fn of_what_a_step_writes_the_beginning_is_kept() {
    let mut long = request("", "echo done");
    long["compile"]["command"] = json!(["flood", "150000"]);
    long["output_policy"] = json!("discard");

    let run = shared().client().run(&long).await;

    assert_exit(&run, 0);
    let (kept, step) = (run["compile"]["stdout"].as_str().unwrap(), &run["compile"]["outcome"]);
    assert_eq!((kept.len(), &run["compile"]["stdout_omitted_bytes"]), (64 * 1024, &json!(0)));
    assert!(kept.starts_with("abcdef"), "{kept:.20}");
    assert_eq!((&step["truncated"]["stdout"], &step["usage"]["stdout_bytes"]), (&json!(true), &json!(150_000)), "{step:#}");
}

#[tokio::test]
async fn a_layer_that_is_larger_than_memory_passes_too() {
    let mut request = request("dd if=/dev/zero of=zeros bs=1M count=20 2>/dev/null; echo x >> zeros", "wc -c < zeros");
    request["limits"]["disk_bytes"] = json!(32 << 20);

    let run = shared().client().run(&request).await;

    assert_eq!(stdout(&run).trim(), ((20 << 20) + 2).to_string(), "{run:#}");
    let medium = (&run["limits"]["disk_medium"], &run["compile"]["limits"]["disk_medium"]);
    assert_eq!(medium, (&json!("disk"), &json!("disk")));
}

#[tokio::test]
async fn who_does_not_wait_hears_of_it_while_it_is_compiled_and_can_cancel_it() {
    let client = shared().client();
    let mut request = request("echo begun; sleep 1000", "echo never");
    request["wait_ms"] = json!(0);
    let asked_at = Instant::now();

    let run = client.post("/v1/runs", &request).await.expect(202);
    assert!(asked_at.elapsed() < SOON, "it waited for {:?}", asked_at.elapsed());
    assert_eq!((&run["state"], &run["compile"]["outcome"]), (&json!("starting"), &Value::Null));
    let path = format!("/v1/runs/{}", run["id"].as_str().unwrap());
    let cancelled = client.delete(&path).await.expect(200);

    assert_reason(&cancelled, "stopped_by_user");
    assert_eq!((&cancelled["state"], &cancelled["started_at"]), (&json!("failed"), &Value::Null), "{cancelled:#}");
    assert_eq!(client.get(&path).await.expect(200)["stdout"], "");
}

#[tokio::test]
async fn what_both_use_is_counted() {
    let client = tenant_with(&shared().place, json!({})).await;

    let run = client.run(&request("echo 12; burn 200", "echo 345; burn 100")).await;
    let used = client.get("/v1/usage").await.expect(200);

    assert_exit(&run, 0);
    let of = |outcome: &Value, name: &str| outcome["usage"][name].as_u64().unwrap();
    let both = |name: &str| of(&run["outcome"], name) + of(&run["compile"]["outcome"], name);
    assert_eq!((&used["total"]["runs"], &used["total"]["output_bytes"]), (&json!(1), &json!(7)), "{used:#}");
    assert_eq!(used["total"]["log_bytes"], 7);
    assert!(both("cpu_ms") >= 300, "{run:#}");
    for name in ["cpu_ms", "wall_ms"] {
        assert!(used["total"][name].as_u64().unwrap().abs_diff(both(name)) <= 2, "{name} of {run:#} in {used:#}");
    }
}

#[tokio::test]
async fn a_step_is_held_to_quotas_and_its_defaults_give_way_to_them() {
    let service = shared();
    let client = tenant_with(&service.place, json!({ "largest_memory_bytes": 64 << 20, "memory_bytes": 64 << 20 })).await;
    let mut small = request("true", "true");
    small["compile"]["limits"] = json!({});
    let mut large = request("true", "true");
    large["compile"]["limits"]["memory_bytes"] = json!(65 << 20);

    let run = client.run(&small).await;
    let problem = client.post("/v1/runs", &large).await.problem(429, "quota_exceeded");
    let told = client.get("/v1/limits").await.expect(200);

    assert_exit(&run, 0);
    assert_eq!(run["compile"]["limits"]["memory_bytes"], 64 << 20);
    assert_eq!((&problem["quota"], &problem["used"]), (&json!("largest_memory_bytes"), &json!(65 << 20)), "{problem:#}");
    let bound = told["fields"].as_array().unwrap().iter().find(|bound| bound["field"] == "compile.limits.memory_bytes").unwrap();
    assert_eq!((&bound["max"], &bound["default"]), (&json!(64 << 20), &json!(64 << 20)));
}

#[tokio::test]
async fn what_a_step_cannot_be_is_refused_by_its_field() {
    let client = shared().client();
    let field = async |change: &dyn Fn(&mut Value)| {
        let mut body = request("true", "true");
        change(&mut body);
        client.post("/v1/runs", &body).await.problem(422, "invalid_request")["field"].clone()
    };

    assert_eq!(field(&|body| body["compile"] = json!({})).await, "compile.command");
    assert_eq!(field(&|body| body["compile"]["limits"]["output_bytes"] = json!(65_537)).await, "compile.limits.output_bytes");
    assert_eq!(field(&|body| body["compile"]["limits"]["pids"] = json!(0)).await, "compile.limits.pids");
    assert_eq!(field(&|body| body["isolation"] = json!("gvisor")).await, "isolation");
}

/// Starts the service that died anew, and returns the run as it ends.
async fn told_after_death(service: &mut Service, id: &str) -> Value {
    service.arm("");
    service.start_again().unwrap();
    Client::of(service.place(), "survivor").until(&format!("/v1/runs/{id}"), |run| !run["outcome"].is_null()).await
}

/// What every run of these tests leaves: nothing.
fn assert_nothing_is_left(service: &mut Service) {
    let footprint = service.place().footprint();
    service.stop().unwrap();
    assert_eq!(footprint.wait_until_gone(SOON), Vec::<String>::new());
}

#[tokio::test]
async fn a_service_that_is_killed_while_it_is_compiled_leaves_a_run_that_is_compiled_anew() {
    let mut service = Service::start();
    let client = Client::of(service.place(), "survivor");
    let mut request = request("cat in > out; sleep 0.7; echo compiled", "cat out -");
    (request["files"], request["stdin"], request["wait_ms"]) = (json!([{ "path": "in", "content": "file " }]), json!("input"), json!(0));
    let run = client.post("/v1/runs", &request).await.expect(202);

    service.kill();
    let run = told_after_death(&mut service, run["id"].as_str().unwrap()).await;

    assert_exit(&run, 0);
    assert_eq!((stdout(&run), &run["compile"]["stdout"], &run["attempt"]), ("file input", &json!("compiled\n"), &json!(1)), "{run:#}");
    assert_nothing_is_left(&mut service);
}

#[tokio::test]
async fn of_runs_whose_keeper_dies_while_they_are_compiled_that_is_told_and_those_that_may_are_tried_again() {
    let mut service = Service::start();
    let client = Client::of(service.place(), "bereaved");
    let mut runs = Vec::new();
    for retries in [0, 1, 0, 1] {
        let mut body = request("sleep 3", "true");
        (body["wait_ms"], body["retry"]) = (json!(0), json!(retries));
        // All of them at once, whatever the node has.
        (body["limits"]["cpu_millis"], body["compile"]["limits"]["cpu_millis"]) = (json!(100), json!(100));
        runs.push(client.post("/v1/runs", &body).await.expect(202)["id"].as_str().unwrap().to_owned());
    }
    for id in &runs {
        client.until(&format!("/v1/runs/{id}"), |run| run["state"] == "starting").await;
    }

    kill(Pid::from_raw(service.place().keeper_pid().cast_signed()), Signal::SIGKILL).unwrap();
    service.wait().unwrap();
    service.start_again().unwrap();
    let client = Client::of(service.place(), "bereaved");
    let mut told = Vec::new();
    for id in &runs {
        told.push(client.until(&format!("/v1/runs/{id}"), |run| !run["outcome"].is_null()).await);
    }

    for lost in [&told[0], &told[2]] {
        assert_reason(lost, "infra_error");
    }
    for retried in [&told[1], &told[3]] {
        assert_exit(retried, 0);
        assert_eq!(retried["attempt"], 2, "{retried:#}");
    }
}

#[tokio::test]
async fn a_service_that_dies_between_the_step_and_the_program_begins_anew_too() {
    let mut service = Service::start();
    service.kill();
    service.arm("service.compile.ended=return");
    service.start_again().unwrap();
    let client = Client::of(service.place(), "survivor");
    let mut request = request("echo compiled > out", "cat out -");
    (request["stdin"], request["wait_ms"]) = (json!("input"), json!(0));
    let lost = client.try_post("/v1/runs", &request).await;
    service.wait().unwrap();

    // Whoever hears nothing of it finds it by what it was told before, or not at all: so does this test.
    let id = lost.ok().and_then(|answer| answer.body["id"].as_str().map(ToOwned::to_owned));
    service.arm("");
    service.start_again().unwrap();
    let client = Client::of(service.place(), "survivor");
    let ended = client.until("/v1/events?kind=sandbox.ended", |events| !events["items"].as_array().unwrap().is_empty()).await;
    let found = ended["items"][0]["object"].as_str().and_then(|object| object.strip_prefix("sandbox/")).unwrap();
    assert!(id.is_none_or(|id| id == found));
    let run = client.get(&format!("/v1/runs/{found}")).await.expect(200);

    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "compiled\ninput");
    assert_nothing_is_left(&mut service);
}

#[tokio::test]
async fn a_program_that_outlives_the_service_is_told_with_its_step() {
    let mut service = Service::start();
    let client = Client::of(service.place(), "survivor");
    let mut request = request("echo compiled", "sleep 3; echo ran");
    request["wait_ms"] = json!(0);
    let id = client.post("/v1/runs", &request).await.expect(202)["id"].as_str().unwrap().to_owned();
    let running = client.until(&format!("/v1/runs/{id}"), |run| run["state"] == "running").await;
    assert_eq!(running["compile"]["stdout"], "compiled\n", "{running:#}");

    service.kill();
    let run = told_after_death(&mut service, &id).await;

    assert_exit(&run, 0);
    assert_eq!((stdout(&run), &run["attempt"]), ("ran\n", &json!(1)));
    assert_step(&run, "exited", 0);
    assert_eq!(run["compile"]["stdout"], "compiled\n");
    assert_nothing_is_left(&mut service);
}
