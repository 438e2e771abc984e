//! Every operation of `openapi.yaml`, with thousands of requests that it permits and forbids: no 5xx that is not promised, no undocumented status, nothing that breaks a schema.
//!
//! schemathesis makes the requests and judges the answers (`tests/fuzz/`); `tools/setup.sh test` installs it beside what is built.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use mayfly_tests::{
    contract,
    service::{Place, Service, program},
    token,
};
use serde_json::json;

/// Another one makes other cases. A failure is found again with the seed that it was found with.
const SEED: &str = "20261121";
/// Random requests of each operation, beside those of the other phases.
const EXAMPLES: &str = "25";
const CASES_MIN: u64 = 2000;
const DEADLINE: Duration = Duration::from_secs(420);

#[tokio::test]
async fn no_request_finds_an_answer_that_the_contract_does_not_promise() {
    let service = Service::start();
    service.import("python").expect("the image of a language is imported");
    let place = service.place();
    let tenant = format!("fuzz-{}", uuid::Uuid::new_v4().simple());
    let claims = token::claims(&tenant, &format!("{} admin", token::TENANT_SCOPES));
    let token = token::sign(&claims, &place.secret_file());
    // What is refused for a quota tries nothing.
    let admin = mayfly_tests::Client::with_token(place, Some(token.clone()));
    let quotas = json!({ "sandboxes": null, "queued": null, "log_bytes": null, "image_bytes": null, "webhooks": null, "volumes": null, "volume_bytes": 256_u64 << 20 });
    admin.get("/v1/quota").await.expect(200);
    admin.patch(&format!("/v1/admin/tenants/{tenant}"), &json!({ "quotas": quotas })).await.expect(200);
    let said = place.data_dir.parent().expect("it lies in the service's folder").join("fuzz.txt");

    let status = fuzz(place, &tenant, &token, &said);

    let said = fs::read_to_string(&said).unwrap();
    let cases = cases(&said);
    println!("seed {SEED}: {cases} cases over {} operations", contract::operations().len());
    assert!(status.is_some_and(|status| status.success()), "{}\n{said}", service.log());
    assert!(cases >= CASES_MIN, "{cases} cases are not enough\n{said}");
}

/// Tries the whole contract; `None`: it did not end in time.
fn fuzz(place: &Place, tenant: &str, token: &str, said: &Path) -> Option<ExitStatus> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let output = File::create(said).expect("a file can be made");
    let mut child = Command::new(schemathesis())
        .args([
            "--config-file",
            "schemathesis.toml",
            "run",
            "../../openapi.yaml",
            "--checks",
            "all",
            "--seed",
            SEED,
            "--max-examples",
            EXAMPLES,
        ])
        .args(["--no-color", "--output-truncate", "false", "--url", &place.url])
        .env("MAYFLY_TOKEN", token)
        .env("MAYFLY_FUZZ_TENANT", tenant)
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

/// As its summary has it: `  2741 generated, 2741 passed`.
fn cases(said: &str) -> u64 {
    let line = said.lines().find_map(|line| line.trim().split_once(" generated"));
    line.and_then(|(count, _)| count.parse().ok()).unwrap_or_default()
}

fn schemathesis() -> PathBuf {
    let profile = program("mayfly");
    profile.ancestors().nth(2).expect("programs lie in a profile's folder of the target folder").join("schemathesis/bin/schemathesis")
}
