//! Postgres goes away, is killed, hangs, breaks off in the middle of an answer, and comes back: nothing piles up, nothing is lost, and nobody
//! waits for long.
//!
//! Every test here has a service and a Postgres of its own.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use mayfly_tests::{
    Answer, Client, Service, host,
    outcome::{assert_exit, assert_reason},
    postgres::Database,
    stream::Frames,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};

/// How long a refusal may take while the database is known to be away.
const AT_ONCE: Duration = Duration::from_secs(3);
/// How long it may take until the service knows that the database hangs, or is back.
const NOTICED: Duration = Duration::from_secs(10);
/// How long anybody may wait for a database that hangs.
const AT_THE_LATEST: Duration = Duration::from_secs(20);

fn service_with(postgres: &Database) -> Service {
    let service = Service::start_with(&["--database-url", &postgres.url]).unwrap();
    service.import("busybox").unwrap();
    service
}

fn shell(script: &str) -> Value {
    json!({ "image": "busybox", "command": ["sh", "-c", script] })
}

async fn readiness(client: &Client) -> Answer {
    client.get("/readyz").await
}

/// Waits until the service says that it is ready, or that it is not.
async fn until_ready_is(client: &Client, status: u16) -> Answer {
    let started = Instant::now();
    loop {
        let answer = readiness(client).await;
        if answer.status == status {
            return answer;
        }
        assert!(started.elapsed() < NOTICED, "still {}: {}", answer.status, answer.text);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[track_caller]
fn assert_refused(answer: Answer, took: Duration) {
    assert!(took < AT_ONCE, "it took {took:?}");
    assert_eq!(answer.header("retry-after"), "1");
    assert_eq!(answer.problem(503, "database_unavailable")["retryable"], true);
}

/// Asks for a run that is to be refused, and says how that went.
async fn try_run(client: &Client) -> (Answer, Duration) {
    let asked_at = Instant::now();
    let answer = client.post("/v1/runs", &shell("true")).await;
    (answer, asked_at.elapsed())
}

/// What holds through any outage that is seen at once.
async fn goes_on_through(outage: fn(&Database)) {
    let postgres = Database::start();
    let service = service_with(&postgres);
    let client = Client::of(service.place(), "survivor");
    let script = "i=0; while [ $i -lt 25 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 7";
    let id = client.post("/v1/sandboxes", &shell(script)).await.expect(201)["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}");
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    let mut stream = client.follow(&id, "from=0").await;
    let mut frames = Frames::default();
    frames.add(&stream.next().await.unwrap());

    outage(&postgres);
    // From the first moment on.
    for _ in 0..20 {
        let (answer, took) = try_run(&client).await;
        assert_refused(answer, took);
    }
    until_ready_is(&client, 503).await.problem(503, "database_unavailable");
    let asked_at = Instant::now();
    assert_refused(client.get(&path).await, asked_at.elapsed());
    assert_eq!(client.get("/healthz").await.status, 200);
    // The stream needs no database, and the sandbox ends while there is none.
    while !frames.stdout_text().contains("line 24\n") {
        frames.add(&stream.next().await.unwrap());
    }
    let (answer, took) = try_run(&client).await;
    assert_refused(answer, took);

    postgres.start_again();
    until_ready_is(&client, 200).await;
    let sandbox = client.until(&path, |sandbox| sandbox["state"] == "exited").await;
    while let Some(frame) = stream.next().await {
        frames.add(&frame);
    }

    assert_exit(&sandbox, 7);
    assert_eq!(frames.stdout_text(), (0..25).map(|i| format!("line {i}\n")).collect::<String>());
    assert_eq!(frames.end.as_ref(), Some(&sandbox["outcome"]));
    assert_eq!(client.log(&id).await.stdout_text(), frames.stdout_text());
    assert_exit(&client.shell("exit 3").await, 3);
    assert_eq!(service.log().matches("the database is away").count(), 1, "{}", service.log());
    assert_eq!(service.log().matches("the database is back").count(), 1, "{}", service.log());
}

#[tokio::test]
async fn running_work_goes_on_and_new_work_is_refused_at_once_while_postgres_is_stopped() {
    goes_on_through(Database::stop).await;
}

#[tokio::test]
async fn running_work_goes_on_and_new_work_is_refused_at_once_while_postgres_is_dead() {
    goes_on_through(Database::kill).await;
}

/// Threads and descriptors of a process.
fn held_by(pid: u32) -> (usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    (count("task"), count("fd"))
}

#[tokio::test]
async fn two_hundred_requests_to_a_postgres_that_hangs_are_all_answered_and_pile_up_nowhere() {
    let postgres = Database::start();
    let service = service_with(&postgres);
    let client = Client::of(service.place(), "patient");
    let sandbox = client.post("/v1/sandboxes", &shell("sleep 5; echo meanwhile; exit 5")).await.expect(201);
    let path = format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
    client.until(&path, |sandbox| sandbox["state"] == "running").await;
    assert_exit(&client.shell("true").await, 0);
    let before = held_by(service.place().pid);

    postgres.halt();
    let asking: Vec<_> = (0..200)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { try_run(&client).await })
        })
        .collect();
    until_ready_is(&client, 503).await.problem(503, "database_unavailable");
    let (answer, took) = try_run(&client).await;
    assert_refused(answer, took);
    for asked in asking {
        let (answer, took) = asked.await.unwrap();
        assert!(took < AT_THE_LATEST, "it took {took:?}");
        answer.problem(503, "database_unavailable");
    }
    let after = held_by(service.place().pid);
    // Blocking work has threads of its own, which rest for a while; connections of clients rest too, 200 of them.
    assert!(after.0 < before.0 + 20 && after.1 < before.1 + 250, "threads and descriptors: {before:?}, {after:?}");

    postgres.go_on();
    until_ready_is(&client, 200).await;
    assert_exit(&client.shell("exit 3").await, 3);
    let sandbox = client.until(&path, |sandbox| sandbox["state"] == "exited").await;
    assert_exit(&sandbox, 5);
    let connected = "select count(*) from pg_stat_activity where backend_type = 'client backend'";
    let started = Instant::now();
    // 16, the one that watches, and ours.
    while postgres.ask(connected).parse::<u32>().unwrap() > 18 {
        assert!(started.elapsed() < NOTICED, "{} are connected", postgres.ask(connected));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Whatever was not answered well was not run, or says so.
    let running = "select count(*) from sandboxes where state in ('queued', 'starting', 'running')";
    while postgres.ask(running) != "0" {
        assert!(started.elapsed() < Duration::from_secs(60), "{} are not over", postgres.ask(running));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn connections_give_up_a_statement_that_takes_too_long() {
    let postgres = Database::start();
    let service = service_with(&postgres);
    let client = Client::of(service.place(), "stuck");
    assert_exit(&client.shell("true").await, 0);
    let lock = {
        let url = &postgres.url;
        let mut psql = std::process::Command::new("psql");
        psql.args([url, "-qc", "begin; select * from tenants where id = 'stuck' for update; select pg_sleep(30)"]);
        psql.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    while postgres.ask("select count(*) from pg_stat_activity where query like '%pg_sleep(30)' and pid <> pg_backend_pid()") == "0" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let (answer, took) = try_run(&client).await;

    assert!((5..20).contains(&took.as_secs()), "{took:?}");
    answer.problem(503, "database_unavailable");
    // It is one row that is locked, not the database that is away.
    assert_eq!(readiness(&client).await.status, 200);
    assert_exit(&Client::of(service.place(), "other").shell("true").await, 0);
    let mut lock = lock;
    lock.kill().unwrap();
    lock.wait().unwrap();
}

/// As a crash of Postgres leaves it that comes before the flush: what was admitted, and nobody was told of, has never been.
#[tokio::test]
async fn a_run_that_a_crash_of_postgres_took_is_neither_told_as_ended_nor_waited_for_without_end() {
    let postgres = Database::start();
    let service = service_with(&postgres);
    let client = Client::of(service.place(), "survivor");
    assert_exit(&client.shell("exit 3").await, 3);
    let (run, asked_at) = (shell("sleep 1"), Instant::now());
    let asked = client.post("/v1/runs", &run);
    let lost = async {
        while postgres.ask("delete from sandboxes where state in ('starting', 'running') returning id").is_empty() {
            assert!(asked_at.elapsed() < NOTICED);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (answer, ()) = tokio::join!(asked, lost);
    assert_eq!(answer.problem(409, "outcome_unknown")["retryable"], false);
    assert!(asked_at.elapsed() < NOTICED);
    assert_exit(&client.shell("exit 4").await, 4);
}

fn postmaster(service: &Service) -> u32 {
    let lock = fs::read_to_string(service.place().data_dir.join("postgres/data/postmaster.pid")).unwrap();
    lock.lines().next().unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn a_private_postgres_that_dies_is_started_again_while_the_service_goes_on() {
    let mut service = Service::start();
    let client = Client::of(service.place(), "survivor");
    let id = client.post("/v1/sandboxes", &shell("sleep 2; echo through; exit 6")).await.expect(201)["id"].as_str().unwrap().to_owned();
    for round in 1..=2 {
        let dead = postmaster(&service);
        kill(Pid::from_raw(dead.cast_signed()), Signal::SIGKILL).unwrap();
        let started = Instant::now();
        while client.get("/v1/quota").await.status != 200 || postmaster(&service) == dead {
            assert!(started.elapsed() < Duration::from_secs(30), "{}", service.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        until_ready_is(&client, 200).await;
        assert_exit(&client.shell("exit 3").await, 3);
        // It can be there again before that is said.
        while service.log().matches("it was started again").count() < round {
            assert!(started.elapsed() < Duration::from_secs(30), "{}", service.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(service.log().matches("it was started again").count(), round, "{}", service.log());
    }
    let sandbox = client.until(&format!("/v1/sandboxes/{id}"), |sandbox| sandbox["state"] == "exited").await;
    assert_exit(&sandbox, 6);
    assert_eq!(client.log(&id).await.stdout_text(), "through\n");

    let last = postmaster(&service);
    assert!(service.stop().unwrap().success(), "{}", service.log());
    // One that nobody buried yet has no arguments any more.
    assert_eq!(host::command_line(last), "", "it was not stopped with the service");
}

/// Stands between a service and its Postgres. On the first connection that carries these marks, one after the other, it lets Postgres do what is asked with the last, and then cuts the
/// connection before the answer.
struct Cutter {
    port: u16,
    has_cut: Arc<AtomicBool>,
}

impl Cutter {
    fn before(postgres: &Database, marks: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, to) = (listener.local_addr().unwrap().port(), postgres.port());
        let has_cut = Arc::new(AtomicBool::new(false));
        let cut = Arc::clone(&has_cut);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let is_doomed = Arc::new(AtomicBool::new(false));
                let (cut, doomed) = (Arc::clone(&cut), Arc::clone(&is_doomed));
                let (from, into) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    let mut ahead = marks;
                    carry(from, into, |bytes| {
                        if let [mark, behind @ ..] = ahead
                            && bytes.windows(mark.len()).any(|window| window == mark.as_bytes())
                        {
                            ahead = behind;
                            if behind.is_empty() && !cut.swap(true, Ordering::SeqCst) {
                                doomed.store(true, Ordering::SeqCst);
                            }
                        }
                        true
                    });
                });
                std::thread::spawn(move || carry(server, client, |_| !is_doomed.load(Ordering::SeqCst)));
            }
        });
        Self { port, has_cut }
    }

    /// A service of this Postgres, behind this.
    fn service(&self, postgres: &Database) -> Service {
        let url = postgres.url.replace(&format!(":{}/", postgres.port()), &format!(":{}/", self.port));
        let service = Service::start_with(&["--database-url", &format!("{url}?sslmode=disable")]).unwrap();
        service.import("busybox").unwrap();
        service
    }
}

/// Carries bytes until either side is gone, or `may_pass` says no; then both are cut.
fn carry(mut from: TcpStream, mut into: TcpStream, mut may_pass: impl FnMut(&[u8]) -> bool) {
    let mut buffer = vec![0; 1 << 20];
    while let Ok(len) = from.read(&mut buffer) {
        if len == 0 || !may_pass(&buffer[..len]) || into.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    // Either may be gone already.
    from.shutdown(Shutdown::Both).ok();
    into.shutdown(Shutdown::Both).ok();
}

#[tokio::test]
async fn an_admission_whose_answer_was_lost_is_undone_and_its_key_starts_another() {
    const MARK: &str = "the-answer-to-this-is-lost";
    let postgres = Database::start();
    let cutter = Cutter::before(&postgres, &[MARK]);
    let service = cutter.service(&postgres);
    let client = Client::of(service.place(), "unclear");
    // The statement is prepared, so that its parameters and the order to do it come at one time.
    assert_exit(&client.shell("true").await, 0);
    let mut request = shell("cat /proc/sys/kernel/random/uuid");
    request["labels"] = json!({ "mark": MARK });
    let post = async || {
        let asked = client.request(Method::POST, "/v1/runs").header("idempotency-key", "only").json(&request);
        client.send(asked, "POST", "/v1/runs").await
    };

    let first = post().await;
    assert!(cutter.has_cut.load(Ordering::SeqCst), "nothing was cut");
    first.problem(503, "database_unavailable");
    let made = "select count(*) from sandboxes where labels ? 'mark'";
    assert_eq!(postgres.ask(made), "1");
    let never_began = "select count(*) from sandboxes where labels ? 'mark' and state = 'failed' and reason = 'infra_error'";
    let started = Instant::now();
    while postgres.ask(never_began) == "0" || postgres.ask("select count(*) from idempotency_keys") != "0" {
        assert!(started.elapsed() < NOTICED, "{}", service.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let second = post().await;
    let third = post().await;

    assert_eq!((second.status, second.header("idempotency-replayed")), (200, ""), "{}", second.text);
    assert_eq!((&third.text, third.header("idempotency-replayed")), (&second.text, "true"));
    assert_reason(&second.body, "exited");
    assert_eq!(postgres.ask(made), "2");
    assert_eq!(postgres.ask("select live from tenants where id = 'unclear'"), "0");
}

/// A run whose first case has ended comes back to the queue, as the second was not begun, and whether it is claimed then is not clear.
#[tokio::test]
async fn what_was_stored_of_cases_is_counted_where_the_answer_to_a_later_claim_was_lost() {
    let postgres = Database::start();
    let cutter = Cutter::before(&postgres, &["from picked where sandboxes.id = picked.id", "commit\0"]);
    let mut service = cutter.service(&postgres);
    let client = |service: &Service| Client::of(service.place(), "unclear");
    service.kill();
    service.arm("service.case.stored=1*return");
    service.start_again().unwrap();
    let mut request = shell("read n; echo $n");
    (request["cases"], request["wait_ms"]) = (json!([{ "stdin": "12\n" }, { "stdin": "345\n" }]), json!(0));

    // It may die before it has answered.
    drop(client(&service).try_post("/v1/runs", &request).await);
    service.wait().unwrap();
    let id = postgres.ask("select id from sandboxes where tenant = 'unclear'");
    service.arm("");
    service.start_again().unwrap();
    let client = client(&service);
    let run = client.until(&format!("/v1/runs/{id}"), |run| !run["outcome"].is_null()).await;
    let used = client.get("/v1/usage").await.expect(200);

    assert!(cutter.has_cut.load(Ordering::SeqCst), "nothing was cut");
    assert_reason(&run, "infra_error");
    assert!(run["outcome"]["message"].as_str().unwrap().contains("taken from the queue"), "{run:#}");
    assert_eq!((&run["cases"][0]["stdout"], &run["cases"][1]["verdict"]), (&json!("12\n"), &json!("not_run")), "{run:#}");
    assert_eq!((&used["total"]["output_bytes"], &used["total"]["log_bytes"]), (&json!(3), &json!(3)), "{used:#}");
    assert_eq!(postgres.ask("select log_bytes from tenants where id = 'unclear'"), "3");
    assert!(run["started_at"].is_string(), "{run:#}");
}

#[tokio::test]
async fn a_row_that_nobody_can_read_is_ended_and_holds_up_nobody() {
    let postgres = Database::start();
    let room_for_one = (300_u64 << 20).to_string();
    let mut service = Service::start_with(&["--database-url", &postgres.url, "--capacity-memory-bytes", &room_for_one]).unwrap();
    service.import("busybox").unwrap();
    let client = Client::of(service.place(), "damaged");
    let first = client.post("/v1/sandboxes", &shell("sleep 100")).await.expect(201);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/runs", &shell("true")).await }
    });
    let queued = "select count(*) from sandboxes where state = 'queued'";
    let started = Instant::now();
    while postgres.ask(queued) != "1" {
        assert!(started.elapsed() < NOTICED, "it does not wait");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let behind = tokio::spawn({
        let client = client.clone();
        async move { client.post("/v1/runs", &shell("exit 4")).await }
    });
    while postgres.ask(queued) != "2" {
        assert!(started.elapsed() < NOTICED, "the other does not wait");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    postgres.ask("update sandboxes set program = '{}' where id = (select min(id::text)::uuid from sandboxes where state = 'queued')");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{}", first["id"].as_str().unwrap())).await.status, 204);

    let damaged = waiting.await.unwrap().expect(200);
    let sound = behind.await.unwrap().expect(200);

    assert_eq!(damaged["state"], "failed");
    assert_reason(&damaged, "infra_error");
    let message = damaged["outcome"]["message"].as_str().unwrap();
    assert!(message.contains("a program that cannot be read"), "{message}");
    assert_exit(&sound, 4);
    assert_eq!(postgres.ask("select live + queued from tenants where id = 'damaged'"), "0");

    // Nor does one that lives keep a service from starting.
    let lives = client.post("/v1/sandboxes", &shell("sleep 100")).await.expect(201);
    service.kill();
    postgres.ask(&format!("update sandboxes set program = '{{}}' where id = '{}'", lives["id"].as_str().unwrap()));
    service.start_again().unwrap();
    assert_exit(&Client::of(service.place(), "damaged").shell("exit 5").await, 5);
    assert_eq!(postgres.ask("select live + queued from tenants where id = 'damaged'"), "0");
}

#[tokio::test]
async fn a_case_that_nobody_can_read_ends_its_run_and_holds_up_no_order() {
    let postgres = Database::start();
    let mut service = service_with(&postgres);
    let client = |service: &Service| Client::of(service.place(), "damaged");
    let cases = json!([{ "stdin": "0\n" }, { "stdin": "1000\n" }, {}]);
    let request = |name: &str, retry: u64| {
        let mut request = shell("read n; sleep $n");
        (request["cases"], request["wait_ms"], request["retry"], request["labels"]) =
            (cases.clone(), json!(0), json!(retry), json!({ "name": name }));
        request
    };
    let mut paths = Vec::new();
    for (name, retry) in [("ended", 0), ("retried", 1)] {
        let run = client(&service).post("/v1/runs", &request(name, retry)).await.expect(202);
        paths.push(format!("/v1/runs/{}", run["id"].as_str().unwrap()));
    }
    let started = Instant::now();
    while postgres.ask("select count(*) from run_cases where verdict is not null") != "2" {
        assert!(started.elapsed() < AT_THE_LATEST, "the first of their cases do not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    service.kill();
    postgres.ask("update run_cases set outcome = '{\"reason\": \"of another version\"}' where verdict is not null");
    service.start_again().unwrap();
    let client = client(&service);
    let ended = client.until(&paths[0], |run| !run["outcome"].is_null()).await;
    // What an attempt left is gone with it.
    client.until(&paths[1], |run| run["attempt"] == 2 && run["cases"][0]["verdict"] == "accepted").await;
    let cancelled = client.delete(&paths[1]).await.expect(200);

    assert_reason(&ended, "infra_error");
    let message = ended["outcome"]["message"].as_str().unwrap();
    assert!(message.contains("the outcome of a case cannot be read"), "{message}");
    let verdicts: Vec<_> = ended["cases"].as_array().unwrap().iter().map(|case| case["verdict"].clone()).collect();
    assert_eq!((verdicts, &ended["state"]), (vec![json!("accepted"), json!("not_run"), json!("not_run")], &json!("failed")), "{ended:#}");
    assert_eq!(client.get(&paths[0]).await.expect(200), ended);
    assert_reason(&cancelled, "stopped_by_user");
    assert_eq!(postgres.ask("select live + queued from tenants where id = 'damaged'"), "0");
}
