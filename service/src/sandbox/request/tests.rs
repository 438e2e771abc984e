//! Requests that parse, and requests that name what is wrong.

use serde_json::{Value, json};

use super::*;

fn run(body: Value) -> Result<(NewSandbox, u64), Invalid> {
    serde_json::from_value::<RunRequest>(body).unwrap().parse()
}

#[test]
fn the_smallest_run_is_an_image() {
    let (sandbox, wait_ms) = run(json!({"image": "python"})).unwrap();
    assert_eq!(sandbox.image.as_str(), "python");
    assert_eq!(sandbox.output_policy, OutputPolicy::Truncate);
    assert_eq!(wait_ms, 30_000);
}

#[test]
fn a_file_in_base64_holds_the_decoded_bytes() {
    let body = json!({"image": "a", "files": [{"path": "x", "content": "/w==", "encoding": "base64", "mode": "0755"}]});
    let (sandbox, _) = run(body).unwrap();
    assert_eq!(sandbox.files, [File { path: "x".into(), mode: 0o755, content: Content(vec![0xff]) }]);
}

#[test]
fn a_path_that_climbs_is_refused_by_its_index() {
    let error = run(json!({"image": "a", "files": [{"path": "ok", "content": ""}, {"path": "a/../../b", "content": ""}]})).unwrap_err();
    assert_eq!(error.field, "files[1].path");
}

#[test]
fn setuid_is_no_mode() {
    let error = run(json!({"image": "a", "files": [{"path": "x", "content": "", "mode": "4755"}]})).unwrap_err();
    assert_eq!(error.field, "files[0].mode");
}

#[test]
fn an_unknown_field_does_not_parse() {
    assert!(serde_json::from_value::<RunRequest>(json!({"image": "a", "imagee": "b"})).is_err());
    assert!(serde_json::from_value::<RunRequest>(json!({"image": "a", "limits": {"memory": 1}})).is_err());
}

#[test]
fn a_network_that_we_do_not_give_does_not_parse() {
    assert!(serde_json::from_value::<RunRequest>(json!({"image": "a", "network": "open"})).is_err());
}

#[test]
fn an_empty_command_names_no_program() {
    assert_eq!(run(json!({"image": "a", "command": []})).unwrap_err().field, "command");
    assert_eq!(run(json!({"image": "a", "command": [""]})).unwrap_err().field, "command");
    assert_eq!(run(json!({"image": "a", "command": ["a", "b\0"]})).unwrap_err().field, "command[1]");
}

#[test]
fn a_variable_with_an_equals_sign_in_its_name_is_refused() {
    assert_eq!(run(json!({"image": "a", "env": {"A=B": "c"}})).unwrap_err().field, "env");
}

#[test]
fn too_much_environment_is_refused_before_it_is_sent() {
    let error = run(json!({"image": "a", "env": {"A": "x".repeat(ARGS_ENV_BYTES_MAX)}})).unwrap_err();
    assert_eq!(error.field, "env");
}

#[test]
fn a_wait_beyond_its_bound_is_refused_with_the_bound() {
    let error = run(json!({"image": "a", "wait_ms": 300_001})).unwrap_err();
    assert_eq!((error.field.as_str(), error.bound), ("wait_ms", Some(&WAIT_MS)));
}

#[test]
fn a_reference_with_a_space_is_no_reference() {
    assert_eq!(run(json!({"image": "a b"})).unwrap_err().field, "image");
    assert_eq!(run(json!({"image": ""})).unwrap_err().field, "image");
}

#[test]
fn a_debug_print_shows_no_content() {
    let (sandbox, _) = run(json!({"image": "a", "stdin": "secret"})).unwrap();
    assert!(!format!("{sandbox:?}").contains("secret"));
}
