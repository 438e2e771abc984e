//! Source text in, result out: every language of the catalogue, and those of an operator.

use mayfly_tests::{
    Client, Service,
    service::{self, shared},
};
use serde_json::{Value, json};

/// A service with an image for each language that is built in.
fn service() -> Service {
    let service = Service::start_with(&[]).expect("it starts");
    for image in ["python", "node", "gcc"] {
        service.import(image).expect("the image is imported");
    }
    service
}

async fn run(client: &Client, language: &str, source: &str) -> Value {
    // All are slow beside other tests.
    let limits = json!({ "wall_ms": 60_000 });
    let mut request = json!({ "language": language, "source": source, "stdin": "41\n", "limits": limits, "wait_ms": 90_000 });
    if ["c", "cpp"].contains(&language) {
        request["compile"] = json!({ "limits": limits });
        // What is compiled needs little itself.
        request["limits"]["memory_bytes"] = json!(64 << 20);
    }
    client.post("/v1/runs", &request).await.expect(200)
}

#[tokio::test]
async fn every_language_that_is_built_in_runs_its_source() {
    let service = service();
    let client = service.client();
    let sources = [
        ("bash", "read -r n; echo $((n + 1)); echo \"${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]}\" >&2"),
        ("python", "import sys\nprint(int(input()) + 1)\nprint('%d.%d' % sys.version_info[:2], file=sys.stderr)"),
        (
            "javascript",
            "const n = require('fs').readFileSync(0, 'utf8'); console.log(+n + 1); console.error(process.versions.node.split('.')[0])",
        ),
        (
            "c",
            "#include <stdio.h>\nint main(void) { int n; scanf(\"%d\", &n); printf(\"%d\\n\", n + 1); fprintf(stderr, \"%d\", __GNUC__); }",
        ),
        ("cpp", "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n + 1 << '\\n'; std::cerr << __GNUC__; }"),
    ];

    let listed = client.get("/v1/languages").await.expect(200);
    let mut names = Vec::new();
    for language in listed["items"].as_array().unwrap() {
        let name = language["name"].as_str().unwrap();
        assert_eq!(language["available"], true, "{language:#}");
        assert_eq!(language["compile"].is_null(), !["c", "cpp"].contains(&name), "{language:#}");
        assert_eq!(language["compile"].is_null(), language["compile_limits"].is_null(), "{language:#}");
        let (_, source) = sources.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("{name} is not tried here"));
        let run = run(&client, name, source).await;
        assert_eq!((&run["outcome"]["reason"], &run["outcome"]["exit_code"]), (&json!("exited"), &json!(0)), "{name}: {run:#}");
        assert_eq!(run["stdout"], "42\n", "{name}: {run:#}");
        // What the catalogue says of its version is so, as far as this image goes: another Debian has others.
        if is_bookworm() {
            assert_eq!(run["stderr"].as_str().unwrap().trim(), language["version"], "{name}");
        }
        names.push(name.to_owned());
    }

    assert_eq!(names, ["bash", "c", "cpp", "javascript", "python"]);
}

fn is_bookworm() -> bool {
    std::fs::read_to_string("/etc/os-release").unwrap_or_default().contains("bookworm")
}

#[tokio::test]
async fn source_that_does_not_compile_is_told_by_its_compiler() {
    let service = Service::start_with(&[]).expect("it starts");
    service.import("gcc").expect("the image is imported");

    let run = run(&service.client(), "c", "int main(void) { return x; }").await;

    assert_eq!((&run["outcome"]["reason"], &run["state"]), (&json!("compile_failed"), &json!("failed")), "{run:#}");
    let compile = &run["compile"];
    assert_eq!((&compile["outcome"]["reason"], &compile["outcome"]["exit_code"]), (&json!("exited"), &json!(1)), "{run:#}");
    assert!(compile["stderr"].as_str().unwrap().contains("main.c:1:"), "{run:#}");
    assert_eq!((&run["stdout"], &run["stderr"]), (&json!(""), &json!("")));
}

#[tokio::test]
async fn a_language_without_its_image_is_not_available() {
    let service = Service::start();
    let client = service.client();

    let listed = client.get("/v1/languages").await.expect(200);

    assert!(listed["items"].as_array().unwrap().iter().all(|language| language["available"] == false), "{listed:#}");
    client.post("/v1/runs", &json!({ "language": "python", "source": "" })).await.problem(404, "image_not_found");
}

#[tokio::test]
async fn an_operators_language_is_added_and_its_limits_hold() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("languages.toml");
    let own = "[shell]\ntitle = \"Shell\"\nversion = \"1\"\nimage = \"busybox\"\nfile = \"main.sh\"\nrun = [\"sh\", \"main.sh\"]\nlimits = { wall_ms = 300 }\n";
    std::fs::write(&file, own).unwrap();
    let service = Service::start_with(&["--languages", file.to_str().unwrap()]).unwrap();
    service.import("busybox").unwrap();
    let client = service.client();

    let quick = client.post("/v1/runs", &json!({ "language": "shell", "source": "echo hello" })).await.expect(200);
    let slow = client.post("/v1/runs", &json!({ "language": "shell", "source": "sleep 60" })).await.expect(200);
    let asked =
        client.post("/v1/runs", &json!({ "language": "shell", "source": "echo hello", "limits": { "wall_ms": 5000 } })).await.expect(200);
    let listed = client.get("/v1/languages").await.expect(200);

    assert_eq!((&quick["stdout"], &quick["limits"]["wall_ms"]), (&json!("hello\n"), &json!(300)));
    assert_eq!(slow["outcome"]["reason"], "wall_timeout");
    assert_eq!(asked["limits"]["wall_ms"], 5000);
    let shell = listed["items"].as_array().unwrap().iter().find(|language| language["name"] == "shell").expect("it is listed");
    assert_eq!((&shell["available"], &shell["limits"]["wall_ms"]), (&json!(true), &json!(300)));
}

#[tokio::test]
async fn a_quota_below_what_a_language_has_for_limits_lowers_them() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("languages.toml");
    let own = "[shell]\ntitle = \"Shell\"\nversion = \"1\"\nimage = \"busybox\"\nfile = \"main.sh\"\nrun = [\"sh\", \"main.sh\"]\nlimits = { pids = 90, wall_ms = 7000 }\n";
    std::fs::write(&file, own).unwrap();
    let service = Service::start_with(&["--languages", file.to_str().unwrap()]).unwrap();
    service.import("busybox").unwrap();
    let client = Client::of(service.place(), "modest");
    client.get("/v1/quota").await.expect(200);
    let quotas = json!({ "quotas": { "largest_pids": 20 } });
    Client::admin(service.place()).patch("/v1/admin/tenants/modest", &quotas).await.expect(200);

    let run = client.post("/v1/runs", &json!({ "language": "shell", "source": "echo hello" })).await.expect(200);
    let asked = client.post("/v1/runs", &json!({ "language": "shell", "source": "", "limits": { "pids": 90 } })).await;

    assert_eq!(run["stdout"], "hello\n");
    assert_eq!((&run["limits"]["pids"], &run["limits"]["wall_ms"]), (&json!(20), &json!(7000)));
    assert_eq!(asked.problem(429, "quota_exceeded")["quota"], "largest_pids");
}

#[tokio::test]
async fn a_language_that_will_not_do_keeps_the_service_from_starting() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("languages.toml");
    std::fs::write(&file, "[x]\ntitle = \"X\"\nversion = \"1\"\nimage = \"x\"\nfile = \"../x\"\nrun = [\"x\"]\n").unwrap();

    let error = Service::start_with(&["--languages", file.to_str().unwrap()]).unwrap_err();

    let said = format!("{error:#}");
    assert!(said.contains("languages.toml") && said.contains("the language x") && said.contains("`..`"), "{said}");
}

#[tokio::test]
async fn what_does_not_go_with_a_language_is_refused_by_its_field() {
    let client = shared().client();
    let field = async |body: Value| client.post("/v1/runs", &body).await.problem(422, "invalid_request")["field"].clone();

    assert_eq!(field(json!({})).await, "image");
    assert_eq!(field(json!({ "language": "latin", "source": "" })).await, "language");
    assert_eq!(field(json!({ "language": "python", "source": "", "image": "python" })).await, "language");
    assert_eq!(field(json!({ "language": "python" })).await, "source");
    assert_eq!(field(json!({ "language": "python", "source": "", "command": ["x"] })).await, "command");
    assert_eq!(field(json!({ "language": "python", "source": "", "compile": {} })).await, "compile");
    assert_eq!(field(json!({ "language": "c", "source": "", "compile": { "command": ["cc"] } })).await, "compile.command");
    assert_eq!(
        field(json!({ "language": "python", "source": "", "files": [{ "path": "main.py", "content": "" }] })).await,
        "files[0].path"
    );
    assert_eq!(field(json!({ "image": null, "language": "python", "source": "" })).await, "image");
}
