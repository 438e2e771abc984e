//! A backup as docs/operations.md has it, restored as it says, brings back what the service knew; and without one there is no way back over a migration.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "docs/block.rs"]
mod block;

use std::{path::Path, process::Command, time::Duration};

use mayfly_tests::{Client, Service, postgres::Database, service};
use serde_json::json;

/// How long a loaded machine may take to pack, or to unpack.
const DEADLINE: Duration = Duration::from_secs(120);

/// What the page has for a shell that begins with this.
fn commands(begin: &str) -> String {
    let page = include_str!("../docs/operations.md");
    let found = block::blocks(page).into_iter().find(|block| block.language == "sh" && block.text.starts_with(begin));
    found.unwrap_or_else(|| panic!("no fence begins with {begin}")).text
}

/// Types this in `desk` about the service in this data folder.
#[track_caller]
fn type_in(desk: &Path, commands: &str, data_dir: &Path) {
    let text = commands.replace("/var/lib/mayfly", data_dir.to_str().unwrap());
    let mut bash = Command::new("bash");
    let (status, said) = service::finish(bash.args(["-euo", "pipefail", "-c", &text]).current_dir(desk), DEADLINE).unwrap();
    assert!(status.success(), "{text}\n{said}");
}

#[tokio::test]
async fn what_was_backed_up_is_there_on_another_machine() {
    let desk = service::folder().unwrap();
    let mut first = Service::start();
    let client = first.client();
    let run = client.shell("echo kept").await;
    client.post("/v1/volumes", &json!({ "name": "cache", "size_bytes": 8 << 20 })).await.expect(201);
    let on_volume =
        |command: &str| json!({ "image": "busybox", "command": ["sh", "-c", command], "volumes": [{ "name": "cache", "path": "/cache" }] });
    client.run(&on_volume("echo in a volume > /cache/file")).await;
    let usage = client.get("/v1/usage").await.expect(200);
    type_in(desk.path(), &commands("runuser -u mayfly -- pg_dump"), &first.place().data_dir);
    assert!(first.stop().unwrap().success());

    let mut second = Service::start_with(&[]).unwrap();
    type_in(desk.path(), &commands("runuser -u mayfly -- pg_restore"), &second.place().data_dir);
    second.stop().unwrap();
    second.start_again().unwrap();

    let client = Client::with_token(second.place(), client.token().map(ToOwned::to_owned));
    let found = client.get(&format!("/v1/runs/{}", run["id"].as_str().unwrap())).await.expect(200);
    assert_eq!((&found["stdout"], &found["outcome"]), (&json!("kept\n"), &run["outcome"]));
    assert_eq!(client.get("/v1/usage").await.expect(200), usage);
    assert_eq!(client.run(&on_volume("cat /cache/file")).await["stdout"], "in a volume\n");
}

#[tokio::test]
async fn without_its_images_a_restored_service_runs_what_is_imported_again() {
    let desk = service::folder().unwrap();
    let mut first = Service::start();
    let client = first.client();
    client.shell("echo kept").await;
    let of_database = commands("runuser -u mayfly -- pg_dump").lines().next().unwrap().to_owned();
    type_in(desk.path(), &of_database, &first.place().data_dir);
    assert!(first.stop().unwrap().success());

    let mut second = Service::start_with(&[]).unwrap();
    let of_database = commands("runuser -u mayfly -- pg_restore").lines().next().unwrap().to_owned();
    type_in(desk.path(), &of_database, &second.place().data_dir);
    second.stop().unwrap();
    second.start_again().unwrap();
    second.import("busybox").unwrap();

    assert_eq!(second.client().shell("echo again").await["stdout"], "again\n");
}

#[tokio::test]
async fn a_service_leaves_a_schema_alone_that_is_newer_than_it_knows() {
    let postgres = Database::start();
    let mut service = Service::start_with(&["--database-url", &postgres.url]).unwrap();
    service.stop().unwrap();
    // What the next release would have written.
    postgres.ask(
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time) \
         select max(version) + 1, 'of the next release', true, ''::bytea, 0 from _sqlx_migrations",
    );
    let tables = "select count(*), md5(string_agg(table_name || column_name, ',' order by table_name, column_name)) \
                  from information_schema.columns where table_schema = 'public'";
    let before = postgres.ask(tables);

    let refusal = service.start_again().unwrap_err().to_string();

    assert!(refusal.contains("migration"), "{refusal}");
    assert_eq!(postgres.ask(tables), before);
}
