//! The load tester against a real service: what it counts is what was, a stall is felt where it must be, and a missed target is told.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use mayfly_tests::{
    Client, Service,
    service::{self, finish, shared},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(120);

/// `loadtest run` as this client's tenant, with its report in `out`.
fn load(client: &Client, out: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(service::program("loadtest"));
    command.env_clear().env("MAYFLY_URL", &client.place().url).env("MAYFLY_TOKEN", client.token().unwrap());
    command.args(["run", "--out"]).arg(out).args(words);
    command
}

/// The report of one that ended so.
#[track_caller]
fn report(client: &Client, code: i32, words: &[&str]) -> (Value, tempfile::TempDir) {
    let out = tempfile::tempdir().unwrap();
    let (status, said) = finish(&mut load(client, out.path(), words), DEADLINE).unwrap();
    assert_eq!(status.code(), Some(code), "{said}");
    (read(out.path()), out)
}

fn read(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap()
}

/// The only shape of a report, of which every request is counted once, and none failed.
#[track_caller]
fn sound<'a>(report: &'a Value, name: &str) -> &'a Value {
    let shapes = report["shapes"].as_array().unwrap();
    assert_eq!((shapes.len(), shapes[0]["shape"].as_str()), (1, Some(name)), "{report:#}");
    let shape = &shapes[0];
    let count = |of: &Value| of.as_u64().unwrap_or_else(|| panic!("no count in {shape:#}"));
    assert!(count(&shape["sent"]) > 0, "{shape:#}");
    assert_eq!((count(&shape["failed"]), &shape["errors"]), (0, &serde_json::json!({})), "{shape:#}");
    assert_eq!(count(&shape["succeeded"]), count(&shape["sent"]), "{shape:#}");
    assert_eq!(count(&shape["latency_ms"]["count"]), count(&shape["sent"]), "{shape:#}");
    shape
}

fn ms(shape: &Value, of: &str, figure: &str) -> f64 {
    shape[of][figure].as_f64().unwrap_or_else(|| panic!("no {of}.{figure} in {shape:#}"))
}

#[test]
fn runs_one_after_another_are_all_counted_and_drawn() {
    let client = shared().client();

    let (report, out) = report(&client, 0, &["sequential", "--requests", "20"]);

    let shape = sound(&report, "sequential");
    assert_eq!((shape["sent"].as_u64(), shape["loop"].as_str()), (Some(20), Some("closed")));
    let launches: u64 = shape["launch_ms"].as_object().unwrap().values().map(|launch| launch["count"].as_u64().unwrap()).sum();
    assert_eq!(launches, 20, "{shape:#}");
    let picture = out.path().join("sequential.svg");
    let parsed = Command::new("python3")
        .args(["-c", "import sys, xml.dom.minidom as m; print(m.parse(sys.argv[1]).documentElement.tagName)"])
        .arg(&picture)
        .output();
    assert_eq!(String::from_utf8_lossy(&parsed.unwrap().stdout).trim(), "svg", "{}", fs::read_to_string(&picture).unwrap());
    assert!(fs::read_to_string(out.path().join("report.txt")).unwrap().contains("20 sent, 20 well, 0 failed"));
}

#[test]
fn a_steady_rate_is_what_was_asked_for() {
    let client = shared().client();

    let (report, _out) = report(&client, 0, &["staggered", "--rate", "10", "--duration-s", "2"]);

    let shape = sound(&report, "staggered");
    assert_eq!((shape["sent"].as_u64(), shape["loop"].as_str()), (Some(20), Some("open")));
    // The last one was due after 1.9 s, and ended later.
    assert!(shape["seconds"].as_f64().unwrap() > 1.9, "{shape:#}");
}

#[test]
fn a_burst_is_sent_as_one() {
    let client = shared().client();

    let (report, _out) = report(&client, 0, &["burst", "--burst", "20", "--bursts", "2", "--pause-s", "1"]);

    let shape = sound(&report, "burst");
    assert_eq!(shape["sent"].as_u64(), Some(40));
    let (start, slowest) = (shape["facts"]["slowest_start_ms"].as_f64().unwrap(), ms(shape, "latency_ms", "max"));
    assert!(start > 0.0 && start <= slowest, "{shape:#}");
}

#[test]
fn a_sustained_load_lasts_as_long_as_it_should() {
    let client = shared().client();

    let (report, _out) = report(&client, 0, &["sustained", "--at-once", "3", "--duration-s", "1.5"]);

    let shape = sound(&report, "sustained");
    assert!(shape["seconds"].as_f64().unwrap() >= 1.5, "{shape:#}");
    let rate = shape["rate_per_s"].as_f64().unwrap();
    assert!((rate - shape["succeeded"].as_f64().unwrap() / shape["seconds"].as_f64().unwrap()).abs() < 0.01, "{shape:#}");
}

#[test]
fn languages_take_turns_and_are_counted_apart() {
    let client = shared().client();

    let (report, _out) = report(&client, 0, &["mixed", "--languages", "python,bash", "--requests", "10", "--at-once", "2"]);

    let shape = sound(&report, "mixed");
    let counts = ["python", "bash"].map(|language| shape["by_label"][language]["count"].as_u64());
    assert_eq!(counts, [Some(5), Some(5)], "{shape:#}");
}

#[test]
fn logs_are_read_whole_and_their_speed_is_told() {
    let client = shared().client();

    let (report, _out) = report(&client, 0, &["logs", "--log-mib", "4", "--streams", "2"]);

    let shape = sound(&report, "logs");
    assert_eq!(shape["sent"].as_u64(), Some(2));
    assert!(shape["facts"]["log_mb_per_s"].as_f64().unwrap() > 0.0, "{shape:#}");
}

#[tokio::test]
async fn idle_sandboxes_are_made_looked_at_and_taken_away() {
    let client = shared().client();
    let data_dir = client.place().data_dir.display().to_string();

    let (report, _out) = report(&client, 0, &["idle", "--sandboxes", "5", "--requests", "10", "--data-dir", &data_dir]);

    let shape = sound(&report, "idle");
    assert_eq!((shape["sent"].as_u64(), shape["facts"]["sandboxes"].as_f64()), (Some(10), Some(5.0)));
    for process in ["service_mib", "keeper_mib"] {
        assert!(shape["facts"][process].as_f64().unwrap() > 0.1, "{shape:#}");
    }
    assert_eq!(client.get("/v1/sandboxes").await.expect(200)["items"], serde_json::json!([]));
}

#[test]
fn what_is_refused_is_counted_by_its_code() {
    let client = shared().client();
    let words = ["sequential", "--requests", "5", "--warm-up", "0", "--image", "no-such-image"];

    let (refused, _out) = report(&client, 1, &words);
    let (allowed, _out) = report(&client, 0, &[&words[..], &["--max-errors", "5"]].concat());

    for report in [&refused, &allowed] {
        let shape = &report["shapes"][0];
        assert_eq!((shape["sent"].as_u64(), shape["failed"].as_u64(), shape["succeeded"].as_u64()), (Some(5), Some(5), Some(0)));
        assert_eq!(shape["errors"]["image_not_found"]["count"].as_u64(), Some(5), "{shape:#}");
    }
    assert_eq!((refused["is_met"].as_bool(), allowed["is_met"].as_bool()), (Some(false), Some(true)));
}

#[test]
fn a_missed_target_is_an_exit_status_and_a_met_one_is_none() {
    let client = shared().client();
    let words = |target: &'static str, bound: &'static str| ["sequential", "--requests", "5", target, bound];

    for (target, missed, met) in [("--p50-ms", "0.001", "60000"), ("--p99-ms", "0.001", "60000"), ("--min-rate", "1000000", "0.001")] {
        let (missed, _out) = report(&client, 1, &words(target, missed));
        let (met, _out) = report(&client, 0, &words(target, met));

        assert_eq!((missed["is_met"].as_bool(), met["is_met"].as_bool()), (Some(false), Some(true)), "{target}");
    }
}

/// For so long the service stands still, in the middle of so long a load at such a rate.
const STALL: Duration = Duration::from_millis(1500);
const LASTING_S: &str = "5";
const PER_SECOND: u64 = 20;

/// What a shape told of a service that stood still meanwhile.
async fn stalled(service: &Service, words: &[&str]) -> Value {
    let client = service.client();
    let out = tempfile::tempdir().unwrap();
    let mut begun = load(&client, out.path(), words).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    // Past the warm-up, in the middle of what is measured.
    until_runs(&client, &mut begun, 10 + 20).await;
    let pid = Pid::from_raw(service.place().pid.cast_signed());
    kill(pid, Signal::SIGSTOP).unwrap();
    tokio::time::sleep(STALL).await;
    kill(pid, Signal::SIGCONT).unwrap();
    let status = service::wait(&mut begun, DEADLINE).unwrap().expect("the load ends");
    assert_eq!(status.code(), Some(0));
    read(out.path())
}

/// Waits until so many runs of this tenant's have ended.
async fn until_runs(client: &Client, load: &mut Child, wanted: u64) {
    let started = Instant::now();
    loop {
        let usage = client.get("/v1/usage").await.expect(200);
        let runs = usage["total"]["runs"].as_u64().unwrap();
        if runs >= wanted {
            return;
        }
        assert!(load.try_wait().unwrap().is_none() && started.elapsed() < DEADLINE, "{runs} runs: {usage:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_open_loop_counts_everybody_who_would_have_waited_for_a_stalled_service() {
    let service = Service::start();
    let rate = PER_SECOND.to_string();

    let open = stalled(&service, &["staggered", "--rate", &rate, "--duration-s", LASTING_S]).await;
    let closed = stalled(&service, &["sequential", "--duration-s", LASTING_S]).await;

    let (open, closed) = (sound(&open, "staggered"), sound(&closed, "sequential"));
    let stall_ms = STALL.as_secs_f64() * 1e3;
    assert!(ms(open, "latency_ms", "max") >= stall_ms * 0.9 && ms(closed, "latency_ms", "max") >= stall_ms * 0.9, "{open:#} {closed:#}");
    // Of a hundred arrivals thirty fell into the stall, and ten of them into its first third.
    assert!(ms(open, "latency_ms", "p90") >= stall_ms * 0.5, "{open:#}");
    // The control: who waits for one answer before the next question meets a stall once.
    assert!(ms(closed, "latency_ms", "p90") < stall_ms * 0.5, "{closed:#}");
    // The schedule was kept meanwhile.
    assert_eq!(open["sent"].as_u64(), Some(100), "{open:#}");
    assert!(ms(open, "late_ms", "p99") < stall_ms * 0.2, "{open:#}");
}
