//! Every operation of `openapi.yaml`, with thousands of requests that it permits and forbids: no 5xx that is not promised, no undocumented status, nothing that breaks a schema.
//!
//! schemathesis makes the requests and judges the answers (`tests/fuzz/`); `tools/setup.sh test` installs it beside what is built. Half of the requests name what is there:
//! sandboxes in each state, execs, files, runs, webhooks; the other half names what is not.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use mayfly_tests::{
    Client, Service, contract, image,
    registry::{Manners, Registry},
    service::{Place, program},
    token,
};
use serde_json::json;

/// Another one makes other cases. A failure is found again with the seed that it was found with.
const SEED: &str = "20261121";
/// Random requests of each operation, beside those of the other phases.
const EXAMPLES: &str = "25";
const CASES_MIN: usize = 2000;
const DEADLINE: Duration = Duration::from_secs(900);

/// How often each status was the answer, by operation.
type Answers = BTreeMap<String, BTreeMap<u16, usize>>;

#[tokio::test]
async fn no_request_finds_an_answer_that_the_contract_does_not_promise() {
    let registry = Registry::start(Manners::default()).expect("a registry starts");
    registry.push_archive(&image::archive("busybox").expect("the recipe works"), "app:1").expect("an image is pushed");
    // Whatever a request names, no other registry is asked.
    let service =
        Service::start_with(&["--registry-allow", "127.0.0.0/8", "--registry-hosts", &registry.address]).expect("the service starts");
    service.import("busybox").expect("the image is imported");
    service.import("python").expect("the image of a language is imported");
    let place = service.place();
    let bench = Bench::new(place, &registry).await;
    let started = Instant::now();

    let status = bench.fuzz(place);

    let (said, answers) = (fs::read_to_string(&bench.said).unwrap_or_default(), bench.answers());
    let cases: usize = answers.values().flat_map(BTreeMap::values).sum();
    println!("seed {SEED}: {cases} answers of {} operations in {} s", answers.len(), started.elapsed().as_secs());
    for (operation, statuses) in &answers {
        println!("  {operation:<24} {}", statuses.iter().map(|(status, count)| format!("{status}:{count}")).collect::<Vec<_>>().join(" "));
    }
    assert!(status.is_some_and(|status| status.success()), "{}\n{said}", service.log());
    assert!(cases >= CASES_MIN, "{cases} cases are not enough\n{said}");
    let is_good = |operation: &str| answers.get(operation).is_some_and(|statuses| statuses.keys().any(|status| *status < 300));
    let never: Vec<_> = operations().into_iter().filter(|operation| !is_good(operation)).collect();
    assert!(never.is_empty(), "nothing was ever answered well by {never:?}\n{said}");
}

/// All but the metrics, which have a listener of their own.
fn operations() -> Vec<&'static str> {
    let names = contract::operations().into_iter().filter_map(|operation| operation.definition()["operationId"].as_str());
    names.filter(|name| *name != "metrics").collect()
}

/// What the fuzzer is told, and where it tells.
struct Bench {
    environment: Vec<(&'static str, String)>,
    /// What it found.
    said: PathBuf,
    /// An operation and a status a line.
    calls: PathBuf,
}

impl Bench {
    async fn new(place: &Place, registry: &Registry) -> Self {
        let tenant = format!("fuzz-{}", uuid::Uuid::new_v4().simple());
        let claims = token::claims(&tenant, &format!("{} admin", token::TENANT_SCOPES));
        let token = token::sign(&claims, &place.secret_file());
        // What is refused for a quota tries nothing.
        let admin = Client::with_token(place, Some(token.clone()));
        let quotas = json!({ "sandboxes": null, "queued": null, "kept_layers": null, "log_bytes": null, "volumes": null, "volume_bytes": 256_u64 << 20, "image_bytes": null, "webhooks": null, "pools": null, "pool_sandboxes": null });
        admin.get("/v1/quota").await.expect(200);
        admin.patch(&format!("/v1/admin/tenants/{tenant}"), &json!({ "quotas": quotas })).await.expect(200);
        // A tenant and its principal, `tester`, are there from their first request on.
        let other = format!("other-{}", uuid::Uuid::new_v4().simple());
        Client::of(place, &other).get("/v1/quota").await.expect(200);
        let node = fs::read_to_string(place.data_dir.join("node-id")).expect("a node has an id");
        let folder = place.data_dir.parent().expect("it lies in the service's folder");
        let (said, calls) = (folder.join("fuzz.txt"), folder.join("fuzz-calls.txt"));
        let environment = vec![
            ("MAYFLY_TOKEN", token),
            ("MAYFLY_FUZZ_URL", place.url.clone()),
            ("MAYFLY_FUZZ_TENANT", tenant),
            ("MAYFLY_FUZZ_OTHER_TENANT", other),
            ("MAYFLY_FUZZ_NODE", node.trim().to_owned()),
            ("MAYFLY_FUZZ_ARCHIVE", image::archive("busybox").expect("the recipe works").display().to_string()),
            ("MAYFLY_FUZZ_PULLED", format!("{}/app:1", registry.address)),
            ("MAYFLY_FUZZ_CALLS", calls.display().to_string()),
        ];
        Self { environment, said, calls }
    }

    /// Tries the whole contract; `None`: it did not end in time.
    fn fuzz(&self, place: &Place) -> Option<ExitStatus> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let output = File::create(&self.said).expect("a file can be made");
        let mut child = Command::new(schemathesis())
            .args(["--config-file", "schemathesis.toml", "run", "../../openapi.yaml"])
            .args(["--seed", SEED, "--max-examples", EXAMPLES])
            .args(["--no-color", "--output-truncate", "false", "--url", &place.url])
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .current_dir(here)
            .stdout(output.try_clone().expect("a descriptor is free"))
            .stderr(output)
            .spawn()
            .expect("schemathesis is installed: tools/setup.sh test");
        let ends_at = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = child.try_wait().expect("it is a child of ours") {
                return Some(status);
            }
            if Instant::now() > ends_at {
                child.kill().expect("it is a child of ours");
                child.wait().expect("it is a child of ours");
                return None;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn answers(&self) -> Answers {
        let mut answers = Answers::new();
        for line in fs::read_to_string(&self.calls).unwrap_or_default().lines() {
            let (operation, status) = line.split_once(' ').expect("hooks.py writes two words a line");
            let status = status.parse().expect("the second is a status");
            *answers.entry(operation.to_owned()).or_default().entry(status).or_default() += 1;
        }
        answers
    }
}

fn schemathesis() -> PathBuf {
    let profile = program("mayfly");
    profile.ancestors().nth(2).expect("programs lie in a profile's folder of the target folder").join("schemathesis/bin/schemathesis")
}
