//! The chart's pod at work: started as the rendered objects say, from the image, on a Postgres of the machine's; its rolling update; and that each of its privileges is needed.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fs, path::Path, time::Duration};

use mayfly_tests::{
    Client,
    chart::{Answer, render},
    host::{self, status_field},
    image,
    outcome::{assert_exit, assert_reason, stdout},
    pod::{Container, Machine},
    postgres::Database,
    service::{Place, import},
};
use serde_json::{Value, json};

const SECRET: &str = "a secret of exactly as many bytes as it takes";
/// How long what lives when a pod is told to go has in these tests.
const DRAIN_S: u64 = 15;

/// An installation on one machine.
struct Cluster {
    machine: Machine,
    rendered: Answer,
    _database: Database,
}

impl Cluster {
    fn new() -> Self {
        let database = Database::start();
        let secrets = [("mayfly-database", "url", database.url.as_str()), ("mayfly-auth", "jwt-secret", SECRET)];
        let machine = Machine::new(&secrets).unwrap();
        let rendered = render(json!({ "data": { "hostPath": machine.data() }, "drainSeconds": DRAIN_S, "stopGraceSeconds": 5 }));
        Self { machine, rendered, _database: database }
    }

    fn pod(&self) -> &Value {
        &self.rendered.only("DaemonSet")["spec"]["template"]["spec"]
    }

    fn container(&self, name: &str) -> &Value {
        let mut all = ["initContainers", "containers"].into_iter().flat_map(|list| self.pod()[list].as_array().unwrap());
        all.find(|container| container["name"] == name).unwrap()
    }

    /// The hook, before anything else is there.
    fn migrate(&self) -> String {
        let pod = &self.rendered.only("Job")["spec"]["template"]["spec"];
        let (status, said) = self.machine.run(pod, &pod["containers"][0]).unwrap();
        assert!(status.success(), "{said}");
        said
    }

    fn make_folders(&self) {
        let (status, said) = self.machine.run(self.pod(), self.container("folders")).unwrap();
        assert!(status.success(), "{said}");
    }

    fn start(&self, name: &str) -> Container {
        self.machine.start(self.pod(), self.container(name)).unwrap()
    }

    /// Where the service says that it is, for clients who know the secret.
    fn place(&self, service: &Container) -> Place {
        let url = |name: &str| format!("http://{}", service.said.split_once(name).unwrap().1.split([',', '/']).next().unwrap());
        Place {
            url: url("ready on http://"),
            metrics_url: url("metrics on http://"),
            // Where the secret is.
            data_dir: self.machine.volume(self.pod(), "auth").unwrap(),
            pid: service.pid(),
            busybox_root: Path::new("").to_owned(),
        }
    }
}

async fn begin(client: &Client, path: &str, script: &str) -> String {
    let mut request = json!({ "image": "busybox", "command": ["sh", "-c", script] });
    if path == "/v1/runs" {
        request["wait_ms"] = 0.into();
    }
    let id = client.post(path, &request).await.body["id"].as_str().unwrap().to_owned();
    client.until(&format!("{path}/{id}"), |sandbox| sandbox["state"] == "running").await;
    id
}

/// The kernel's mask of these capabilities, of which this machine's root has some.
fn mask(names: &[&str], of: &str) -> u64 {
    /// In the order of capability.h.
    const ALL: [&str; 41] = [
        "chown",
        "dac_override",
        "dac_read_search",
        "fowner",
        "fsetid",
        "kill",
        "setgid",
        "setuid",
        "setpcap",
        "linux_immutable",
        "net_bind_service",
        "net_broadcast",
        "net_admin",
        "net_raw",
        "ipc_lock",
        "ipc_owner",
        "sys_module",
        "sys_rawio",
        "sys_chroot",
        "sys_ptrace",
        "sys_pacct",
        "sys_admin",
        "sys_boot",
        "sys_nice",
        "sys_resource",
        "sys_time",
        "sys_tty_config",
        "mknod",
        "lease",
        "audit_write",
        "audit_control",
        "setfcap",
        "mac_override",
        "mac_admin",
        "syslog",
        "wake_alarm",
        "block_suspend",
        "audit_read",
        "perfmon",
        "bpf",
        "checkpoint_restore",
    ];
    let has = u64::from_str_radix(&status_field(std::process::id(), of).unwrap(), 16).unwrap();
    names.iter().map(|name| 1_u64 << ALL.iter().position(|known| known == name).unwrap()).sum::<u64>() & has
}

/// What the keeper's command leaves itself.
fn capabilities(keeper: &Value) -> Vec<&str> {
    let words = keeper["command"].as_array().unwrap();
    let bounding = words.iter().find_map(|word| word.as_str().unwrap().strip_prefix("--bounding-set=-all,")).unwrap();
    bounding.split(',').map(|name| name.strip_prefix('+').unwrap()).collect()
}

#[tokio::test]
async fn a_rolling_update_lets_a_run_end_evicts_what_does_not_and_leaves_the_queue_to_the_next_pod() {
    let cluster = Cluster::new();
    assert!(cluster.migrate().contains("up to date"));
    cluster.make_folders();
    let mut keeper = cluster.start("keeper");
    let mut service = cluster.start("service");
    let place = cluster.place(&service);
    let client = Client::of(&place, "somebody");
    import(&place, &image::archive("busybox").unwrap(), "busybox").unwrap();
    assert_exit(&client.shell("exit 4").await, 4);
    let waits = {
        let client = Client::of(&place, "somebody");
        tokio::spawn(async move {
            client.post("/v1/runs", &json!({ "image": "busybox", "command": ["sh", "-c", "echo begun; sleep 5; echo done; exit 3"] })).await
        })
    };
    let endless = begin(&client, "/v1/sandboxes", "sleep 1000").await;
    let running = "/v1/admin/sandboxes?kind=run&state=running";
    Client::admin(&place).until(running, |list| list["items"].as_array().is_some_and(|items| !items.is_empty())).await;

    service.terminate().unwrap();
    // The API goes on to answer, for whom there is something to answer.
    while client.get("/readyz").await.status == 200 {}
    let late = client.post("/v1/runs", &json!({ "image": "busybox", "command": ["sh", "-c", "exit 6"], "wait_ms": 0 })).await.expect(202);
    let waited = waits.await.unwrap().expect(200);
    let queued = client.get(&format!("/v1/runs/{}", late["id"].as_str().unwrap())).await.expect(200);
    let still = client.get(&format!("/v1/sandboxes/{endless}")).await.expect(200);
    let status = service.wait(Duration::from_secs(DRAIN_S + 40)).unwrap();
    // Only now is the sidecar told.
    keeper.terminate().unwrap();
    let keeper_status = keeper.wait(Duration::from_secs(20)).unwrap();

    assert_exit(&waited, 3);
    assert_eq!(stdout(&waited), "begun\ndone\n");
    assert_eq!((&queued["state"], &still["state"]), (&json!("queued"), &json!("running")));
    assert!(status.success() && keeper_status.success(), "{status} {keeper_status}: {}", fs::read_to_string(&service.log).unwrap());

    cluster.make_folders();
    let _keeper = cluster.start("keeper");
    let service = cluster.start("service");
    let client = Client::of(&cluster.place(&service), "somebody");
    let late = client.until(&format!("/v1/runs/{}", late["id"].as_str().unwrap()), |run| !run["outcome"].is_null()).await;
    assert_exit(&late, 6);
    assert_reason(&client.get(&format!("/v1/sandboxes/{endless}")).await.expect(200), "evicted");
}

#[tokio::test]
async fn the_service_has_no_privilege_and_the_keeper_those_that_are_listed() {
    let cluster = Cluster::new();
    cluster.make_folders();
    let keeper = cluster.start("keeper");
    let service = cluster.start("service");

    let sets = |pid: u32| ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| status_field(pid, set).unwrap());
    assert_eq!(sets(service.pid()), ["0000000000000000"; 5]);
    assert_eq!(status_field(service.pid(), "NoNewPrivs").unwrap(), "1");
    assert_eq!(status_field(service.pid(), "Uid").unwrap(), "10001\t10001\t10001\t10001");
    let listed = capabilities(cluster.container("keeper"));
    let [inherited, permitted, effective, bounding, ambient] = sets(keeper.pid()).map(|set| u64::from_str_radix(&set, 16).unwrap());
    assert_eq!((inherited, ambient), (0, 0));
    assert_eq!([permitted, effective, bounding], [mask(&listed, "CapEff"); 3]);
    // What is the keeper's is not the service's to change, and what the image brought is nobody's.
    for place in ["/var/lib/mayfly/logs/x", "/run/mayfly-socket/x", "/usr/local/bin/x", "/etc/mayfly/auth/x", "/sys/x", "/tmp/x"] {
        let (status, said) = service.exec(cluster.container("service"), &["touch", place]).unwrap();
        assert!(!status.success(), "{place}: {said}");
    }
    let (status, said) = service.exec(cluster.container("service"), &["touch", "/var/lib/mayfly/x"]).unwrap();
    assert!(status.success(), "{said}");
    let (status, said) = service.exec(cluster.container("service"), &["ls", "/var/lib/mayfly/images"]).unwrap();
    assert!(!status.success(), "the keeper's images are not in sight: {said}");
    assert_eq!(host::descendants(service.pid()), Vec::<u32>::new());
}

/// What a keeper with these capabilities cannot do; empty: all of it can be done.
async fn failures(cluster: &Cluster, listed: &[&str], without: Option<&str>) -> Vec<String> {
    let kept: String = listed.iter().filter(|name| Some(**name) != without).map(|name| format!(",+{name}")).collect();
    let change = |word: &str| if word.starts_with("--bounding-set=") { format!("--bounding-set=-all{kept}") } else { word.to_owned() };
    let _keeper = match cluster.machine.start_changed(cluster.pod(), cluster.container("keeper"), change) {
        Ok(keeper) => keeper,
        Err(error) => return vec![format!("{error:#}")],
    };
    let service = match cluster.machine.start(cluster.pod(), cluster.container("service")) {
        Ok(service) => service,
        Err(error) => return vec![format!("{error:#}")],
    };
    let place = cluster.place(&service);
    let client = Client::of(&place, "somebody");
    let mut failed = Vec::new();
    if client.get("/v1/images").await.expect(200)["items"].as_array().unwrap().is_empty()
        && let Err(error) = import(&place, &image::archive("busybox").unwrap(), "busybox")
    {
        return vec![format!("{error:#}")];
    }
    // On the disk: there is more of it than of memory.
    let limits = json!({ "memory_bytes": 32 << 20, "disk_bytes": 64 << 20 });
    let runs = [
        json!({ "image": "busybox", "command": ["sh", "-c", "id; touch /tmp/a"], "user": "1000:1000" }),
        json!({ "image": "busybox", "command": ["cat", "file"], "files": [{ "path": "file", "content": "x" }] }),
        json!({ "image": "busybox", "command": ["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=5"], "limits": limits }),
        json!({ "image": "busybox", "command": ["sh", "-c", "touch /a && chown 3 /a"], "capabilities": "root_image" }),
    ];
    for request in runs {
        let run = client.run(&request).await;
        if run["outcome"]["exit_code"] != 0 {
            failed.push(run["outcome"].to_string());
        }
    }
    if !failed.is_empty() {
        return failed;
    }
    // What is committed keeps its bits.
    let script = "touch /m; chown 7:7 /m; chmod 6755 /m; touch /done; sleep 1000";
    let made = client
        .post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sh", "-c", script], "capabilities": "root_image" }))
        .await
        .expect(201);
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    while client.get(&format!("{path}/files/done")).await.status != 200 {}
    let committed = client.post(&format!("{path}/commit"), &json!({ "reference": format!("c{}", uuid::Uuid::new_v4().simple()) })).await;
    let look = json!({ "image": committed.body["reference"], "command": ["stat", "-c", "%a:%u:%g", "/m"] });
    let run = client.run(&look).await;
    if stdout(&run) != "6755:7:7\n" {
        failed.push(format!("the committed file is {}", stdout(&run)));
    }
    client.delete(&path).await;
    failed
}

#[tokio::test]
async fn each_capability_of_the_keeper_is_needed() {
    /// What is needed for what this machine may lack: the kernel lets only CAP_SYS_RESOURCE lower a score below what it was born with, and AppArmor takes profiles of CAP_MAC_ADMIN alone.
    const ELSEWHERE: [&str; 2] = ["sys_resource", "mac_admin"];
    let cluster = Cluster::new();
    cluster.make_folders();
    let listed = capabilities(cluster.container("keeper"));

    let all = failures(&cluster, &listed, None).await;
    let mut idle = Vec::new();
    for name in listed.iter().filter(|name| !ELSEWHERE.contains(*name)) {
        if failures(&cluster, &listed, Some(name)).await.is_empty() {
            idle.push(*name);
        }
    }

    assert_eq!(all, Vec::<String>::new());
    assert_eq!(idle, Vec::<&str>::new(), "nobody misses these");
}

#[test]
fn each_capability_of_the_folders_maker_is_needed() {
    let cluster = Cluster::new();
    let maker = cluster.container("folders");
    let added: Vec<String> =
        maker["securityContext"]["capabilities"]["add"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    for without in &added {
        let mut weaker = maker.clone();
        weaker["securityContext"]["capabilities"]["add"] = added.iter().filter(|name| *name != without).map(|name| json!(name)).collect();
        let (status, said) = cluster.machine.run(cluster.pod(), &weaker).unwrap();
        assert!(!status.success(), "nobody misses {without}: {said}");
    }
    // Done twice, as with each pod after the first.
    cluster.make_folders();
    cluster.make_folders();
}
