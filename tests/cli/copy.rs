//! `mayfly cp`, both ways.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
};

use mayfly_tests::{
    Client,
    outcome::stdout,
    service::{self, shared},
};
use serde_json::json;

use super::{cli, typed::said};

/// What a script in the sandbox says.
async fn inside(client: &Client, id: &str, script: &str) -> String {
    let body = json!({ "command": ["sh", "-c", script], "wait_ms": 30_000 });
    stdout(&client.post(&format!("/v1/sandboxes/{id}/execs"), &body).await.expect(200)).to_owned()
}

async fn running(client: &Client) -> String {
    let id = client.sandbox("exec sleep 1000").await;
    client.until(&format!("/v1/sandboxes/{id}"), |sandbox| sandbox["state"] == "running").await;
    id
}

async fn remove(client: &Client, id: &str) {
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

fn tree(at: &Path) {
    fs::create_dir_all(at.join("deep/er")).unwrap();
    fs::write(at.join("deep/er/file"), "content\n").unwrap();
    fs::write(at.join("tool"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(at.join("tool"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("deep/er/file", at.join("link")).unwrap();
    fs::write(at.join("large"), vec![7; 3 << 20]).unwrap();
}

#[tokio::test]
async fn a_folder_goes_in_and_comes_out_as_it_was() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let id = running(&client).await;
    let (source, target) = (folder.path().join("tree"), folder.path().join("back"));
    tree(&source);

    let into = said(&mut cli(&client, &["cp", source.to_str().unwrap(), &format!("{id}:/work")]), b"");
    let seen = inside(&client, &id, "cd /work/tree; stat -c '%a %u' tool; readlink link; cat deep/er/file; wc -c < large").await;
    let out = said(&mut cli(&client, &["cp", &format!("{id}:/work/tree"), target.to_str().unwrap()]), b"");

    assert_eq!((into.code, into.stderr.as_str()), (Some(0), ""));
    assert_eq!(seen, "750 0\ndeep/er/file\ncontent\n3145728\n");
    assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""));
    assert_eq!(fs::read_to_string(target.join("link")).unwrap(), "content\n");
    assert_eq!(fs::read(target.join("large")).unwrap(), vec![7; 3 << 20]);
    assert_eq!(fs::metadata(target.join("tool")).unwrap().permissions().mode() & 0o7777, 0o750);
    remove(&client, &id).await;
}

#[tokio::test]
async fn a_target_that_is_a_folder_is_copied_into_and_one_that_is_not_is_a_name() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let id = running(&client).await;
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let cp = |from: &str, to: &str| said(&mut cli(&client, &["cp", from, to]), b"");
    fs::write(at("file"), "one\n").unwrap();
    fs::create_dir(at("tree")).unwrap();
    fs::write(at("tree/inner"), "two\n").unwrap();
    fs::create_dir(at("target")).unwrap();

    for (from, to) in [
        (at("file"), format!("{id}:/tmp")),
        (at("file"), format!("{id}:/tmp/renamed")),
        (at("tree"), format!("{id}:/tmp/tree2")),
        (format!("{}/.", at("tree")), format!("{id}:/tmp")),
        (format!("{id}:/tmp/renamed"), at("target")),
        (format!("{id}:/tmp/renamed"), at("named")),
        (format!("{id}:/tmp/tree2/."), at("target")),
        (format!("{id}:/tmp/tree2"), at("target")),
    ] {
        let copied = cp(&from, &to);
        assert_eq!((copied.code, copied.stderr.as_str()), (Some(0), ""), "{from} {to}");
    }

    let seen = inside(&client, &id, "cd /tmp; cat file renamed tree2/inner inner").await;
    assert_eq!(seen, "one\none\ntwo\ntwo\n");
    for (name, content) in [("target/renamed", "one\n"), ("named", "one\n"), ("target/inner", "two\n"), ("target/tree2/inner", "two\n")] {
        assert_eq!(fs::read_to_string(at(name)).unwrap(), content, "{name}");
    }
    remove(&client, &id).await;
}

#[tokio::test]
async fn what_cannot_be_copied_says_why() {
    let (client, folder) = (shared().client(), service::folder().unwrap());
    let id = running(&client).await;
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("file"), "one\n").unwrap();
    fs::create_dir(at("tree")).unwrap();

    for (from, to, words) in [
        (at("none"), format!("{id}:/tmp"), "none"),
        (at("file"), format!("{id}:/no/such/folder"), "/no/such"),
        (at("file"), format!("{id}:/tmp/none/"), "no folder"),
        (at("tree"), format!("{id}:/etc/passwd"), "no folder"),
        (at("file"), "no-such-sandbox:/tmp".to_owned(), "no-such-sandbox"),
        (format!("{id}:/no/such/file"), at("out"), "/no/such/file"),
        (format!("{id}:/etc"), at("file"), "no folder"),
        (at("file"), at("other"), "SANDBOX:PATH"),
    ] {
        let failed = said(&mut cli(&client, &["cp", &from, &to]), b"");
        assert!(failed.code == Some(1) && failed.stderr.contains(words), "{from} {to}: {:?} {}", failed.code, failed.stderr);
    }
    remove(&client, &id).await;
}

#[tokio::test]
async fn an_archive_goes_from_one_sandbox_to_another() {
    let client = shared().client();
    let (one, other) = (running(&client).await, running(&client).await);
    inside(&client, &one, "mkdir /work/a; echo content > /work/a/b").await;

    let archive = said(&mut cli(&client, &["cp", &format!("{one}:/work/a"), "-"]), b"");
    let put = said(&mut cli(&client, &["cp", "-", &format!("{other}:/tmp")]), &archive.stdout);

    assert_eq!((put.code, put.stderr.as_str()), (Some(0), ""));
    assert_eq!(inside(&client, &other, "cat /tmp/a/b").await, "content\n");
    for id in [one, other] {
        remove(&client, &id).await;
    }
}
