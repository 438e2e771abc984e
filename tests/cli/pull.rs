//! `mayfly pull`, from a registry of one's own.

use mayfly_tests::{
    Service, image,
    registry::{Manners, PASSWORD, Registry, USER},
    service,
};
use serde_json::Value;

use super::{cli, typed::said};

#[tokio::test]
async fn an_image_is_pulled_runs_and_is_nobody_elses() {
    let service = Service::start_with(&["--registry-allow", "127.0.0.0/8"]).unwrap();
    let registry = Registry::start(Manners { password: true, ..Manners::default() }).unwrap();
    registry.push_archive(&image::archive("busybox").unwrap(), "app:1").unwrap();
    let (client, other, folder) = (service.client(), service.client(), service::folder().unwrap());
    let (password, reference) = (folder.path().join("password"), format!("{}/app:1", registry.address));
    std::fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    let known = ["--username", USER, "--password-file", password.to_str().unwrap()];
    let pull = |words: &[&str]| said(&mut cli(&client, &[&["pull", &reference, "--name", "app"], words].concat()), b"");

    let refused = pull(&[]);
    let pulled = pull(&known);
    let again = pull(&[&known[..], &["--json"]].concat());
    let run = said(&mut cli(&client, &["run", "app", "echo", "hello"]), b"");
    let others = said(&mut cli(&other, &["run", "app", "echo", "hello"]), b"");

    assert!(refused.code == Some(1) && refused.stderr.contains("registry_denied"), "{:?} {}", refused.code, refused.stderr);
    assert!(pulled.code == Some(0) && pulled.text().starts_with("app sha256:"), "{} {}", pulled.text(), pulled.stderr);
    assert_eq!(pulled.stderr, "", "a bar where nobody looks");
    let image: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((image["reference"].as_str(), image["shared"].as_bool()), (Some("app"), Some(false)));
    assert_eq!((run.code, run.text()), (Some(0), "hello\n"), "{}", run.stderr);
    assert!(others.code == Some(125) && others.stderr.contains("mayfly pull"), "{:?} {}", others.code, others.stderr);
}
