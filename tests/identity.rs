//! Who a program runs as, what it may do as root, and what is said to stand around it.

use std::time::Duration;

use mayfly_tests::{
    outcome::{assert_exit, assert_reason, stdout},
    service::{self, finish, mayfly, shared},
};
use serde_json::{Value, json};

async fn run_with(field: &str, value: Value, script: &str) -> Value {
    let mut request = json!({ "image": "busybox", "command": ["sh", "-c", script] });
    request[field] = value;
    shared().client().run(&request).await
}

#[tokio::test]
async fn the_user_of_a_request_goes_before_the_images() {
    let run = run_with("user", json!("1234:56"), "id -u; id -g").await;
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "1234\n56\n");
    let run = run_with("user", json!("root"), "id -u").await;
    assert_eq!(stdout(&run), "0\n");
}

#[tokio::test]
async fn a_user_that_the_image_lacks_is_a_failed_start_that_names_it() {
    let run = run_with("user", json!("nobody-here"), "true").await;
    assert_reason(&run, "start_failed");
    assert!(run["outcome"]["message"].as_str().unwrap().contains("nobody-here"), "{run}");
    assert_eq!(run["fences"], Value::Null);
}

#[tokio::test]
async fn a_user_that_is_none_is_refused_by_its_field() {
    for user in ["a/b", ":group", "65535", "0:65535", "-1 "] {
        let answer = shared().client().post("/v1/runs", &json!({ "image": "busybox", "user": user })).await;
        assert_eq!(answer.problem(422, "invalid_request")["field"], "user", "{user}");
    }
}

#[tokio::test]
async fn a_root_image_can_change_owners_and_others_cannot() {
    let script = "touch /tmp/a && chown 7:8 /tmp/a && stat -c %u:%g /tmp/a";
    let run = run_with("capabilities", json!("root_image"), script).await;
    assert_exit(&run, 0);
    assert_eq!(stdout(&run), "7:8\n");
    let control = run_with("capabilities", json!("none"), script).await;
    assert_exit(&control, 1);
}

#[tokio::test]
async fn a_sandbox_says_which_fences_stand_around_it() {
    let client = shared().client();
    let run = run_with("user", Value::Null, "grep -c '^Seccomp:.2' /proc/self/status").await;
    let fences: Vec<&str> = run["fences"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for always in ["user_namespace", "capabilities", "no_new_privs", "seccomp", "cgroup"] {
        assert!(fences.contains(&always), "{always} is missing in {fences:?}");
    }
    assert_eq!(stdout(&run), "1\n");
    let has_landlock = std::fs::read_to_string("/sys/kernel/security/lsm").map_or(true, |lsm| lsm.contains("landlock"));
    assert_eq!(fences.contains(&"landlock"), has_landlock, "{fences:?}");

    let request = json!({ "image": "busybox", "command": ["sleep", "60"], "user": "1000", "capabilities": "root_image" });
    let created = client.post("/v1/sandboxes", &request).await.expect(201);
    let path = format!("/v1/sandboxes/{}", created["id"].as_str().unwrap());
    let running = client.until(&path, |sandbox| sandbox["state"] == "running").await;
    assert_eq!(running["fences"], run["fences"]);
    assert_eq!((&running["user"], &running["capabilities"]), (&json!("1000"), &json!("root_image")));
    client.delete(&path).await.expect(204);
}

#[tokio::test]
async fn a_node_that_lacks_a_fence_it_must_have_does_not_start() {
    let folder = service::folder().unwrap();
    let mut command = mayfly();
    command.args(["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--require-fence", "seccomp,selinux"]);
    command.arg("--data-dir").arg(folder.path().join("data"));
    let (status, said) = finish(&mut command, Duration::from_secs(20)).unwrap();
    assert!(!status.success());
    assert!(said.contains("lacks a fence that it must have: selinux"), "{said}");
}

#[tokio::test]
async fn a_kernel_of_its_own_runs_the_same_program_and_says_so() {
    let client = shared().client();
    let request = |isolation: &str| {
        json!({
            "image": "busybox", "command": ["sh", "-c", "cat /proc/version; exit 3"], "isolation": isolation,
            "limits": { "wall_ms": 60_000 },
        })
    };
    let own = client.run(&request("gvisor")).await;
    assert_exit(&own, 3);
    let nodes = client.run(&request("container")).await;
    assert_exit(&nodes, 3);
    let version = std::fs::read_to_string("/proc/version").unwrap();
    assert_eq!(stdout(&nodes), version);
    assert_ne!(stdout(&own), version);
    let answer = client.post("/v1/runs", &json!({ "image": "busybox", "isolation": "vm" })).await;
    answer.problem(422, "invalid_request");
}
