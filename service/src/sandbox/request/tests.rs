//! Requests that parse, and requests that name what is wrong.

use serde_json::{Value, json};

use super::*;

fn run(body: Value) -> Result<(NewSandbox, u64), Invalid> {
    serde_json::from_value::<RunRequest>(body).unwrap().parse(&Languages::read(None).unwrap())
}

#[test]
fn the_smallest_run_is_an_image() {
    let (sandbox, wait_ms) = run(json!({"image": "python"})).unwrap();
    assert_eq!(sandbox.image.as_str(), "python");
    assert_eq!(sandbox.output_policy, OutputPolicy::Truncate);
    assert_eq!(wait_ms, 30_000);
}

#[test]
fn a_language_stands_for_image_file_and_command() {
    let (sandbox, _) = run(json!({"language": "python", "source": "print(1)"})).unwrap();
    assert_eq!(sandbox.image.as_str(), "python");
    assert_eq!(sandbox.command, Some(vec!["python3".to_owned(), "main.py".to_owned()]));
    assert_eq!(sandbox.files, [File { path: "main.py".into(), mode: 0o644, content: Content("print(1)".into()) }]);
}

#[test]
fn what_a_language_has_for_limits_was_not_asked_for() {
    let own =
        "[slow]\ntitle = \"Slow\"\nversion = \"1\"\nimage = \"x\"\nfile = \"x\"\nrun = [\"x\"]\nlimits = { pids = 9, wall_ms = 700 }\n";
    let body = json!({"language": "slow", "source": "", "limits": {"wall_ms": 5}});
    let request: RunRequest = serde_json::from_value(body).unwrap();
    let (sandbox, _) = request.parse(&Languages::read(Some(own)).unwrap()).unwrap();
    assert_eq!((sandbox.limits.pids(), sandbox.limits.wall_ms()), (9, Some(5)));
    let asked: RequestedLimits = serde_json::from_value(json!({"wall_ms": 5})).unwrap();
    assert_eq!(sandbox.requested, asked);
}

#[test]
fn what_does_not_go_with_a_language_is_named() {
    let field = |body: Value| run(body).unwrap_err().field;
    assert_eq!(field(json!({})), "image");
    assert_eq!(field(json!({"image": "a", "language": "python", "source": ""})), "language");
    assert_eq!(field(json!({"image": "a", "source": ""})), "source");
    assert_eq!(field(json!({"language": "python"})), "source");
    assert_eq!(field(json!({"language": "latin", "source": ""})), "language");
    assert_eq!(field(json!({"language": "python", "source": "", "command": ["x"]})), "command");
    assert_eq!(field(json!({"language": "python", "source": "", "files": [{"path": "main.py", "content": ""}]})), "files[0].path");
    assert!(serde_json::from_value::<RunRequest>(json!({"image": null, "language": "python", "source": ""})).is_err());
}

#[test]
fn cases_are_judged_without_the_white_space_at_the_ends_unless_told_otherwise() {
    let (plain, _) =
        run(json!({"image": "a", "cases": [{}, {"stdin": "eA==", "stdin_encoding": "base64", "expected_stdout": ""}]})).unwrap();
    assert_eq!(plain.judging, Some(Judging { comparison: Comparison::Trimmed, stop_at_failure: false }));
    assert_eq!(plain.cases[0], NewCase { name: None, stdin: None, expected_stdout: None });
    let second = NewCase { name: None, stdin: Some(Content("x".into())), expected_stdout: Some(Content(vec![])) };
    assert_eq!(plain.cases[1], second);
    let (told, _) = run(json!({"image": "a", "cases": [{}], "comparison": "exact", "stop_at_failure": true})).unwrap();
    assert_eq!(told.judging, Some(Judging { comparison: Comparison::Exact, stop_at_failure: true }));
    assert_eq!(run(json!({"image": "a"})).unwrap().0.judging, None);
}

#[test]
fn what_cases_cannot_be_is_named() {
    let field = |body: Value| run(body).unwrap_err().field;
    assert_eq!(field(json!({"image": "a", "cases": []})), "cases");
    assert_eq!(field(json!({"image": "a", "cases": vec![json!({}); 65]})), "cases");
    assert_eq!(field(json!({"image": "a", "cases": [{}], "stdin": ""})), "stdin");
    assert_eq!(field(json!({"image": "a", "cases": [{}], "output_policy": "discard"})), "output_policy");
    assert_eq!(field(json!({"image": "a", "comparison": "trimmed"})), "comparison");
    assert_eq!(field(json!({"image": "a", "stop_at_failure": false})), "stop_at_failure");
    assert_eq!(field(json!({"image": "a", "cases": [{"name": "a\u{0}"}]})), "cases[0].name");
    assert_eq!(
        field(json!({"image": "a", "cases": [{}, {"expected_stdout": "?", "expected_stdout_encoding": "base64"}]})),
        "cases[1].expected_stdout"
    );
    assert!(run(json!({"image": "a", "cases": [{"name": "ä".repeat(64)}], "isolation": "gvisor"})).is_ok());
}

#[test]
fn a_language_that_is_compiled_has_a_step_with_its_own_limits() {
    let compile = |body: Value| run(body).unwrap().0.compile;
    let step = compile(json!({"language": "c", "source": ""})).unwrap();
    assert_eq!((step.command[0].as_str(), step.limits.wall_ms(), step.limits.memory_bytes()), ("gcc", Some(30_000), 512 << 20));
    let asked = json!({"language": "c", "source": "", "compile": {"env": {"A": "b"}, "limits": {"wall_ms": 5}}, "limits": {"wall_ms": 7}});
    let (asked, _) = run(asked).unwrap();
    let step = asked.compile.unwrap();
    assert_eq!((asked.limits.wall_ms(), step.limits.wall_ms(), step.env["A"].as_str()), (Some(7), Some(5), "b"));
    assert_eq!((asked.env.len(), compile(json!({"language": "python", "source": ""}))), (0, None));
}

#[test]
fn what_a_compile_step_cannot_be_is_named() {
    let field = |body: Value| run(body).unwrap_err().field;
    assert_eq!(field(json!({"image": "a", "compile": {}})), "compile.command");
    assert_eq!(field(json!({"image": "a", "compile": {"command": []}})), "compile.command");
    assert_eq!(field(json!({"image": "a", "compile": {"command": ["a"], "env": {"A=B": "c"}}})), "compile.env");
    assert_eq!(field(json!({"image": "a", "compile": {"command": ["a".repeat(70_000)]}})), "compile.command");
    assert_eq!(field(json!({"image": "a", "compile": {"command": ["a"], "limits": {"wall_ms": 0}}})), "compile.limits.wall_ms");
    assert_eq!(field(json!({"image": "a", "compile": {"command": ["a"]}, "isolation": "gvisor"})), "isolation");
    assert_eq!(field(json!({"language": "c", "source": "", "compile": {"command": ["cc"]}})), "compile.command");
    assert_eq!(field(json!({"language": "python", "source": "", "compile": {}})), "compile");
    assert!(
        serde_json::from_value::<RunRequest>(json!({"image": "a", "compile": {"command": ["a"], "limits": {"disk_bytes": 1 << 20}}}))
            .is_err()
    );
    assert!(run(json!({"image": "a", "compile": {"command": ["a"]}})).is_ok());
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
fn of_what_is_too_much_together_the_largest_part_is_named() {
    let long = "x".repeat(ARGS_ENV_BYTES_MAX / 2);
    let fault = |request| run(request).unwrap_err().field;
    assert_eq!(fault(json!({"image": "a", "entrypoint": [long, "b"], "command": [long]})), "entrypoint");
    assert_eq!(fault(json!({"image": "a", "entrypoint": [long], "command": [long, "b"]})), "command");
    assert_eq!(fault(json!({"image": "a", "command": ["a", long], "env": {"A": long, "B": "c"}})), "env");
    assert!(run(json!({"image": "a", "command": ["a".repeat(ARGS_ENV_BYTES_MAX - 1)]})).is_ok());
}

#[test]
fn arguments_and_variables_are_counted() {
    let args = |count: usize| json!({"image": "a", "command": vec!["x"; count], "entrypoint": vec!["y"; count]});
    let env = |count: usize| json!({"image": "a", "env": (0..count).map(|at| (format!("v{at}"), "x")).collect::<BTreeMap<_, _>>()});
    assert!(run(args(ARGS_MAX)).is_ok() && run(env(ENV_MAX)).is_ok());
    assert_eq!(run(args(ARGS_MAX + 1)).unwrap_err().field, "entrypoint");
    assert_eq!(run(env(ENV_MAX + 1)).unwrap_err().field, "env");
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

fn sandbox(body: Value) -> Result<NewSandbox, Invalid> {
    serde_json::from_value::<SandboxRequest>(body).unwrap().parse().map(|wanted| match wanted {
        Wanted::Like(asked) => *asked,
        Wanted::OfPool { pool, .. } => panic!("it names the pool {pool}"),
    })
}

#[test]
fn beside_a_pool_stands_only_what_is_ones_own() {
    let parse = |body: Value| serde_json::from_value::<SandboxRequest>(body).unwrap().parse();
    let own = json!({"pool": "p", "name": "n", "labels": {"a": "b"}, "ttl_ms": 5000, "idle_timeout_ms": 6000, "when_full": "refuse", "limits": {}, "tty": false});
    let Ok(Wanted::OfPool { pool, personal, when_full }) = parse(own) else { panic!("it is a pool's") };
    assert_eq!((pool.as_str(), personal.name.as_deref(), personal.ttl_ms), ("p", Some("n"), Some(5000)));
    assert_eq!((personal.idle_timeout_ms, when_full), (Some(6000), WhenFull::Refuse));
    for (field, body) in [
        ("image", json!({"pool": "p", "image": "a"})),
        ("pool", json!({"pool": "p", "command": ["a"]})),
        ("pool", json!({"pool": "p", "limits": {"pids": 5}})),
        ("pool", json!({"pool": "p", "pull": "always"})),
        ("pool", json!({"pool": "no name"})),
        ("ttl_ms", json!({"pool": "p", "ttl_ms": 1})),
        ("image", json!({})),
    ] {
        assert_eq!(parse(body.clone()).unwrap_err().field, field, "{body}");
    }
}

#[test]
fn a_terminal_is_of_the_size_that_is_asked_for_or_the_usual_one() {
    let terminal = |tty: Value| sandbox(json!({"image": "a", "tty": tty})).map(|sandbox| sandbox.terminal);
    assert_eq!(terminal(json!(false)), Ok(None));
    assert_eq!(terminal(json!(true)), Ok(Some(WindowSize { rows: 24, columns: 80 })));
    assert_eq!(terminal(json!({"rows": 1, "columns": 1000})), Ok(Some(WindowSize { rows: 1, columns: 1000 })));
    assert_eq!(terminal(json!({"rows": 0, "columns": 1})).unwrap_err().field, "tty.rows");
    assert_eq!(terminal(json!({"rows": 1, "columns": 1001})).unwrap_err().field, "tty.columns");
}

#[test]
fn input_is_either_given_or_kept_open() {
    for (field, body) in
        [("stdin_open", json!({"image": "a", "stdin": "x", "stdin_open": true})), ("tty", json!({"image": "a", "stdin": "x", "tty": true}))]
    {
        assert_eq!(sandbox(body).unwrap_err().field, field);
    }
    assert!(sandbox(json!({"image": "a", "stdin_open": true, "tty": true})).unwrap().stdin_open);
}

#[test]
fn a_name_that_could_be_an_id_is_refused() {
    for name in ["0190b5a4-0000-7000-8000-000000000000", "0190b5a4000070008000000000000000", "0190B5A4000070008000000000000000"] {
        assert_eq!(sandbox(json!({"image": "a", "name": name})).unwrap_err().field, "name", "{name}");
    }
    assert_eq!(sandbox(json!({"image": "a", "name": "0190b5a4"})).unwrap().name.as_deref(), Some("0190b5a4"));
}

#[test]
fn how_it_stops_and_when_it_is_idle_is_bounded() {
    let asked = json!({"image": "a", "stop_signal": "int", "stop_grace_ms": 0, "idle_timeout_ms": 1000, "auto_remove": true});
    let parsed = sandbox(asked).unwrap();
    assert_eq!(parsed.stop_signal.map(Signal::number), Some(2));
    assert_eq!((parsed.stop_grace_ms, parsed.idle_timeout_ms, parsed.auto_remove), (0, Some(1000), true));
    for (field, body) in [
        ("stop_signal", json!({"image": "a", "stop_signal": "nope"})),
        ("stop_grace_ms", json!({"image": "a", "stop_grace_ms": 300_001})),
        ("idle_timeout_ms", json!({"image": "a", "idle_timeout_ms": 999})),
        ("entrypoint", json!({"image": "a", "entrypoint": [""]})),
        ("entrypoint[1]", json!({"image": "a", "entrypoint": ["a", "\0"]})),
    ] {
        assert_eq!(sandbox(body).unwrap_err().field, field);
    }
}
