//! Starting the service: what it needs, what it says when that is missing, and what it takes over.

use std::{fs, path::Path, process::Command, time::Duration};

use mayfly_tests::{
    Client, Service,
    outcome::assert_exit,
    postgres::Database,
    service::{self, finish, mayfly},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

#[tokio::test]
async fn without_postgres_one_line_says_what_to_install() {
    let folder = service::folder().unwrap();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let mut command = mayfly();
    command.args(["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]);
    command.arg("--data-dir").arg(folder.path().join("data")).arg("--postgres-bin-dir").arg(&empty);

    let (status, said) = finish(&mut command, SOON).unwrap();

    assert!(!status.success());
    assert!(said.contains("apt-get install postgresql"), "{said}");
    assert!(said.contains("--database-url"), "{said}");
    assert!(said.trim().lines().count() <= 2, "{said}");
}

#[tokio::test]
async fn a_real_database_is_used_when_it_is_given() {
    let database = Database::start();
    let mut service = Service::start_with(&["--database-url", &database.url]).unwrap();
    service.import("busybox").unwrap();

    let run = service.client().shell("exit 2").await;
    let rows = database.ask("select count(*) from sandboxes where state = 'exited'");

    assert_exit(&run, 2);
    assert_eq!(rows, "1");
    assert!(!service.place().data_dir.join("postgres/data").exists(), "a private cluster was made all the same");
    assert!(service.stop().unwrap().success());
}

#[tokio::test]
async fn a_database_is_reached_by_tls_and_only_if_its_certificate_is_good() {
    let database = Database::start_with_tls();
    let url = |mode: &str, root: &str| {
        let root = database.folder().join(root);
        format!("{}?sslmode={mode}&sslrootcert={}", database.url.replace("127.0.0.1", "localhost"), root.display())
    };

    let service = Service::start_with(&["--database-url", &url("verify-full", "cert.pem")]).unwrap();
    service.client().get("/v1/sandboxes").await.expect(200);
    let encrypted = database.ask(
        "select count(*) > 0 and bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid)
         where client_addr is not null and pid <> pg_backend_pid()",
    );
    drop(service);
    let required = Service::start_with(&["--database-url", &url("require", "cert.pem")]).unwrap();
    drop(required);
    let doubted = Service::start_with(&["--database-url", &url("verify-full", "other.pem")]).unwrap_err();

    assert_eq!(encrypted, "t");
    assert!(format!("{doubted:#}").contains("certificate"), "{doubted:#}");
}

#[tokio::test]
async fn a_database_that_is_not_there_is_named_without_its_password() {
    let folder = service::folder().unwrap();
    let mut command = mayfly();
    command.args(["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--data-dir"]).arg(folder.path().join("data"));
    command.args(["--database-url", "postgres://someone:very-secret@127.0.0.1:9/none"]);

    let (status, said) = finish(&mut command, Duration::from_secs(60)).unwrap();

    assert!(!status.success());
    assert!(!said.contains("very-secret"), "{said}");
    assert_eq!(mayfly_tests::host::processes_with(&folder.path().display().to_string()), Vec::<u32>::new());
}

#[test]
fn a_schema_is_brought_up_to_date_apart_from_any_service_and_once() {
    let database = Database::start();
    let migrate = |url: &str| finish(mayfly().args(["migrate", "--database-url", url]), SOON).unwrap();
    let done = || database.ask("select string_agg(version || ' ' || installed_on, ', ' order by version) from _sqlx_migrations");

    let (status, said) = migrate(&database.url);
    let first = done();
    let (again, _) = migrate(&database.url);
    let second = done();
    let (away, told) = migrate("postgres://someone:very-secret@127.0.0.1:9/none");
    let (nowhere, which) = finish(mayfly().arg("migrate"), SOON).unwrap();

    assert!(status.success() && again.success(), "{said}");
    let files = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations")).unwrap().count();
    assert_eq!(first.split(", ").count(), files);
    assert_eq!(second, first);
    assert!(!away.success() && told.contains("127.0.0.1:9") && !told.contains("very-secret"), "{told}");
    assert!(!nowhere.success() && which.contains("--database-url"), "{which}");
}

#[tokio::test]
async fn a_second_start_takes_over_all_that_there_is() {
    let mut service = Service::start();
    let tenant = Client::of(service.place(), "again");
    let run = tenant.shell("exit 9").await;
    let secret = fs::read(service.place().secret_file()).unwrap();
    assert!(service.stop().unwrap().success());

    let started = std::time::Instant::now();
    service.start_again().unwrap();
    let took = started.elapsed();
    let tenant = Client::of(service.place(), "again");

    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(fs::read(service.place().secret_file()).unwrap(), secret);
    assert_eq!(tenant.get(&format!("/v1/runs/{}", run["id"].as_str().unwrap())).await.expect(200), run);
    assert_exit(&tenant.shell("true").await, 0);
}

#[tokio::test]
async fn a_database_that_died_with_the_machine_is_started_again() {
    let mut service = Service::start();
    let run = Client::of(service.place(), "again").shell("exit 9").await;
    service.kill();
    let postmaster = fs::read_to_string(service.place().data_dir.join("postgres/data/postmaster.pid")).unwrap();
    let pid: i32 = postmaster.lines().next().unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();

    service.start_again().unwrap();
    let read = Client::of(service.place(), "again").get(&format!("/v1/runs/{}", run["id"].as_str().unwrap())).await.expect(200);

    assert_eq!(read, run);
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let service = service::shared();
    let taken = service.place.url.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let folder = service::folder().unwrap();
    let mut command = mayfly();
    command.args(["serve", "--listen", &taken, "--metrics-listen", "127.0.0.1:0", "--data-dir"]).arg(folder.path().join("data"));

    let (status, said) = finish(&mut command, Duration::from_secs(60)).unwrap();

    assert!(!status.success());
    assert!(said.contains(&taken), "{said}");
    assert_eq!(mayfly_tests::host::processes_with(&folder.path().display().to_string()), Vec::<u32>::new());
}

#[tokio::test]
async fn an_unknown_key_in_the_configuration_is_named() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("mayfly.toml");
    fs::write(&file, "listn = \"127.0.0.1:0\"\n").unwrap();

    let (status, said) = finish(mayfly().arg("serve").arg("--config").arg(&file), SOON).unwrap();

    assert!(!status.success());
    assert!(said.contains("listn"), "{said}");
}

#[tokio::test]
async fn a_flag_goes_before_the_environment_and_that_before_the_file() {
    let folder = service::folder().unwrap();
    let file = folder.path().join("mayfly.toml");
    fs::write(&file, "jwt-audience = \"from-file\"\n").unwrap();
    let audience = |command: &mut Command| {
        let (_, said) = finish(command, SOON).unwrap();
        said
    };
    // A bad value stops the start and is named: it tells which of the three was heard.
    let bad = |value: &str| format!("not-an-address-{value}");

    let file_bad = folder.path().join("bad.toml");
    fs::write(&file_bad, format!("listen = \"{}\"\n", bad("file"))).unwrap();
    let from_file = audience(mayfly().args(["serve", "--config"]).arg(&file_bad));
    let from_environment = audience(mayfly().env("MAYFLY_LISTEN", bad("environment")).args(["serve", "--config"]).arg(&file_bad));
    let from_flag =
        audience(mayfly().env("MAYFLY_LISTEN", bad("environment")).args(["serve", "--listen", &bad("flag"), "--config"]).arg(&file_bad));

    assert!(from_file.contains(&bad("file")), "{from_file}");
    assert!(from_environment.contains(&bad("environment")), "{from_environment}");
    assert!(from_flag.contains(&bad("flag")), "{from_flag}");
}

#[tokio::test]
async fn a_token_from_the_command_line_is_good() {
    let service = service::shared();
    let mut command = mayfly();
    command
        .args(["token", "--tenant", "acme", "--sub", "alice", "--scope", "runs", "--ttl", "1h", "--data-dir"])
        .arg(&service.place.data_dir);

    let (status, said) = finish(&mut command, SOON).unwrap();
    let client = Client::with_token(&service.place, Some(said.trim().to_owned()));

    assert!(status.success(), "{said}");
    assert_exit(&client.shell("true").await, 0);
}

#[tokio::test]
async fn the_doctor_finds_this_machine_fit() {
    let service = service::shared();
    let mut command = mayfly();
    command.args(["doctor", "--json", "--data-dir"]).arg(&service.place.data_dir);

    let (status, said) = finish(&mut command, SOON).unwrap();

    assert!(status.success(), "{said}");
    let report: Value = serde_json::from_str(said.trim()).unwrap();
    assert!(report.to_string().contains("cgroup"), "{report:#}");
}

#[tokio::test]
async fn the_contract_is_printed() {
    let on_disk = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi.yaml")).unwrap();

    let (status, said) = finish(mayfly().arg("openapi"), SOON).unwrap();

    assert!(status.success());
    assert_eq!(said.trim_end(), on_disk.trim_end());
}
