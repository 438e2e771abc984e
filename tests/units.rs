//! Service and keeper as systemd's units start them: two lives apart. What one does to itself, the other and the sandboxes bear.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use mayfly_tests::{
    Client, Service, image,
    keeper::Keeper,
    outcome::{assert_exit, assert_reason, stdout},
    service,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// A node of two units.
struct Node {
    service: Service,
    keeper: Option<Keeper>,
}

impl Node {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(args: &[&str]) -> Self {
        // The first start makes the folders, as a package's installation and the first start of the units do between them.
        let mut service = Service::start();
        service.stop().unwrap();
        let socket = service.place().data_dir.join("keeper.sock");
        service.add_arguments(&["--keeper-socket", socket.to_str().unwrap()]);
        service.add_arguments(args);
        let mut node = Self { service, keeper: None };
        node.start_keeper();
        node.service.start_again().unwrap();
        node
    }

    fn start_keeper(&mut self) {
        let place = self.service.place();
        let words = exec_start("mayfly-keeper.service", &place.data_dir);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        self.keeper = Some(Keeper::start_by(command, &self.service.log_path()).unwrap());
    }

    /// The same tenant, at the address that the service has now.
    fn client(&self) -> Client {
        Client::of(self.service.place(), "unit")
    }

    fn signal_keeper(&self, signal: Signal) {
        kill(Pid::from_raw(self.keeper.as_ref().unwrap().pid().cast_signed()), signal).unwrap();
    }
}

fn unit(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd").join(name)).unwrap()
}

/// The words of a unit's command, with the places of this test in the stead of an installation's.
fn exec_start(name: &str, data_dir: &Path) -> Vec<String> {
    let text = unit(name);
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let programs = service::program("mayfly").parent().unwrap().to_owned();
    let (data, programs) = (data_dir.display().to_string(), programs.display().to_string());
    let line = line.replace("/run/mayfly/keeper.sock", &format!("{data}/keeper.sock"));
    line.replace("/var/lib/mayfly", &data).replace("/usr/local/bin", &programs).split(' ').map(str::to_owned).collect()
}

async fn start(client: &Client, path: &str, script: &str) -> String {
    let request = if path == "/v1/runs" {
        json!({ "image": "busybox", "command": ["sh", "-c", script], "wait_ms": 0 })
    } else {
        json!({ "image": "busybox", "command": ["sh", "-c", script] })
    };
    let id = client.post(path, &request).await.body["id"].as_str().unwrap().to_owned();
    client.until(&format!("{path}/{id}"), |sandbox| sandbox["state"] == "running").await;
    id
}

const COUNT: &str = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 7";

fn counted() -> String {
    (0..40).map(|i| format!("line {i}\n")).collect()
}

#[test]
fn the_units_are_what_systemd_understands() {
    let folder = service::folder().unwrap();
    let mut paths: Vec<PathBuf> = Vec::new();
    for name in ["mayfly.service", "mayfly-keeper.service"] {
        let programs = service::program("mayfly").parent().unwrap().display().to_string();
        let path = folder.path().join(name);
        fs::write(&path, unit(name).replace("/usr/local/bin", &programs)).unwrap();
        paths.push(path);
    }

    let checked = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&paths).output().unwrap();
    let users = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/mayfly.sysusers");

    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && said.is_empty(), "{said}");
    image::run(Command::new("systemd-sysusers").arg("--dry-run").arg(users)).unwrap();
}

#[test]
fn the_units_name_each_others_places() {
    let data = Path::new("/data");
    let service = exec_start("mayfly.service", data);
    assert_eq!(service[1..], ["serve", "--data-dir", "/data", "--keeper-socket", "/data/keeper.sock"]);
    assert_eq!(exec_start("mayfly-keeper.service", data)[1..3], ["--socket", "/data/keeper.sock"]);
}

#[tokio::test]
async fn a_service_that_stops_leaves_its_sandboxes_to_the_next() {
    let mut node = Node::start_with(&["--stop-grace-s", "1"]);
    let id = start(&node.client(), "/v1/sandboxes", COUNT).await;
    let client = node.client();
    let request = json!({ "image": "busybox", "command": ["sh", "-c", "sleep 8; echo late; exit 5"] });
    let waiting = tokio::spawn(async move { client.post("/v1/runs", &request).await });
    let running = "/v1/admin/sandboxes?kind=run&state=running&tenant=unit";
    Client::admin(node.service.place()).until(running, |list| list["items"].as_array().is_some_and(|items| items.len() == 1)).await;

    let status = node.service.stop().unwrap();
    let answer = waiting.await.unwrap().expect(202);
    node.service.start_again().unwrap();
    let frames = node.client().log(&id).await;
    let path = format!("/v1/runs/{}", answer["id"].as_str().unwrap());
    let run = node.client().until(&path, |run| !run["outcome"].is_null()).await;

    assert!(status.success(), "{status}\n{}", node.service.log());
    assert_eq!((frames.stdout_text(), frames.gaps), (counted(), Vec::<Value>::new()));
    assert_eq!(frames.end.unwrap()["exit_code"], 7);
    assert_exit(&run, 5);
    assert_eq!(stdout(&run), "late\n");
}

#[tokio::test]
async fn a_service_outlives_its_keeper_and_goes_on_with_the_next() {
    let mut node = Node::start();
    let id = start(&node.client(), "/v1/runs", "sleep 1000").await;
    let pid = node.service.place().pid;

    node.signal_keeper(Signal::SIGKILL);
    let client = node.client();
    let down = loop {
        let ready = client.get("/readyz").await;
        if ready.status != 200 {
            break ready;
        }
    };
    let refused = client.post("/v1/runs", &json!({ "image": "busybox", "command": ["true"] })).await;
    node.start_keeper();
    let run = client.until(&format!("/v1/runs/{id}"), |run| !run["outcome"].is_null()).await;

    down.problem(503, "keeper_unavailable");
    assert_eq!(refused.problem(503, "keeper_unavailable")["retryable"], true);
    assert_reason(&run, "infra_error");
    assert_exit(&client.shell("exit 3").await, 3);
    assert!(node.service.is_running() && node.service.place().pid == pid);
}

#[tokio::test]
async fn a_reloaded_keeper_goes_on_with_everything() {
    let node = Node::start();
    let client = node.client();
    let id = start(&client, "/v1/sandboxes", COUNT).await;

    for _ in 0..3 {
        node.signal_keeper(Signal::SIGHUP);
        // Runs come and go meanwhile.
        assert_exit(&client.shell("exit 2").await, 2);
    }
    let frames = client.log(&id).await;

    assert_eq!((frames.stdout_text(), frames.gaps), (counted(), Vec::<Value>::new()));
    assert_eq!(frames.end.unwrap()["exit_code"], 7);
    let log = node.service.log();
    assert!(log.contains("upgrade") || log.contains("connected to the keeper again"), "{log}");
}
