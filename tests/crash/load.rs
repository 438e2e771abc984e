//! A mixed load of several tenants, and what its clients know of each request: what they were told, or that they do not know.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mayfly_tests::{Answer, Client, random::Random, service::Place};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinSet};

use super::payload::{MEMORY_BYTES, Payload};

/// Workers that make runs, and among them how many tenants.
const RUNNERS: u64 = 5;
const TENANTS: u64 = 3;
/// Before a client whose request failed makes the next one.
const PAUSE: Duration = Duration::from_millis(30);
/// How long a client whose request has a key sends it again.
const SEND_FOR: Duration = Duration::from_secs(30);
/// How long a client asks for the end of a run that it does not wait for.
const ASK_FOR: Duration = Duration::from_secs(20);

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    Run(Payload),
    /// A sandbox that lives until it is deleted, which its client does at once.
    Cancelled,
    /// A sandbox that writes more than is stored beside its outcome, ends by itself, and is deleted then.
    Ended,
    /// A sandbox that writes numbered lines for as long as it lives.
    Lines,
}

/// One request and what its client knows.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) label: String,
    pub(crate) asked: Asked,
    /// What the answer that accepted it said.
    pub(crate) id: Option<String>,
    /// The answer that refused it.
    pub(crate) refused: Option<String>,
    /// How often it may be tried again.
    pub(crate) retry: u64,
    /// It was seen to run.
    pub(crate) has_run: bool,
    /// Every outcome that was told.
    pub(crate) outcomes: Vec<Value>,
    /// Its deletion was asked for, and whether it was promised.
    pub(crate) deletion: Option<bool>,
    /// What its client was told and cannot be.
    pub(crate) wrong: Vec<String>,
}

/// How many clients there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowd {
    /// More than there is room for.
    Many,
    /// So few that nobody waits for room: what has ended is started again only then, and here often is.
    Few,
}

/// The workers at work.
#[derive(Debug)]
pub(crate) struct Load {
    workers: JoinSet<Vec<Known>>,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
}

#[derive(Debug, Clone)]
struct Worker {
    places: watch::Receiver<Place>,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    tenant: String,
    label: String,
    /// Of its runs.
    retry: u64,
    crowd: Crowd,
    random: Random,
}

impl Known {
    pub(crate) const fn new(label: String, asked: Asked) -> Self {
        Self { label, asked, id: None, refused: None, retry: 0, has_run: false, outcomes: Vec::new(), deletion: None, wrong: Vec::new() }
    }

    fn note(&mut self, body: &Value) {
        if let Some(id) = body["id"].as_str() {
            self.id = Some(id.to_owned());
        }
        self.has_run |= body["state"] == "running" || body["state"] == "exited";
        if !body["outcome"].is_null() && self.outcomes.last() != Some(&body["outcome"]) {
            self.outcomes.push(body["outcome"].clone());
        }
    }
}

impl Load {
    /// Begins. Labels begin with `name`; where the service is can change; runs may be tried again so often.
    pub(crate) fn start(name: &str, seed: u64, places: &watch::Receiver<Place>, archive: Arc<Vec<u8>>, retry: u64, crowd: Crowd) -> Self {
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut random = Random::new(seed);
        let mut worker = |number: u64| Worker {
            places: places.clone(),
            stop: Arc::clone(&stop),
            accepted: Arc::clone(&accepted),
            tenant: tenant(number),
            label: format!("{name}-{number}"),
            retry,
            crowd,
            random: Random::new(random.next()),
        };
        let mut workers = JoinSet::new();
        workers.spawn(worker(RUNNERS).cancel());
        workers.spawn(worker(RUNNERS + 1).cancel());
        match crowd {
            Crowd::Few => _ = workers.spawn(worker(0).run()),
            Crowd::Many => {
                for number in 0..RUNNERS {
                    workers.spawn(worker(number).run());
                }
                workers.spawn(worker(RUNNERS + 2).import(archive));
                workers.spawn(worker(RUNNERS + 3).exec());
            }
        }
        Self { workers, stop, accepted }
    }

    /// How many requests were accepted until now.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Begins nothing more, and returns what is known when every client has its answer.
    pub(crate) async fn finish(self) -> Vec<Known> {
        self.stop.store(true, Ordering::SeqCst);
        self.workers.join_all().await.into_iter().flatten().collect()
    }
}

pub(crate) fn tenant(number: u64) -> String {
    format!("crash-{}", number % TENANTS)
}

/// Makes a sandbox that writes numbered lines; `None` if that was not answered well.
pub(crate) async fn start_lines(place: &Place, label: String, number: u64) -> Known {
    let tenant = tenant(number);
    let script = format!("i=0; while :; do echo {label} $i; i=$((i+1)); sleep 0.03; done");
    let request = json!({
        "image": "busybox", "command": ["sh", "-c", script], "labels": { "crash": label },
        "limits": { "memory_bytes": MEMORY_BYTES, "disk_bytes": 4 << 20 },
    });
    let mut known = Known::new(label, Asked::Lines);
    if let Ok(answer) = Client::of(place, &tenant).try_post("/v1/sandboxes", &request).await {
        known.note(&answer.body);
        known.refused = (answer.status != 201).then_some(answer.text);
    }
    known
}

impl Worker {
    fn client(&self) -> Client {
        Client::of(&self.places.borrow(), &self.tenant)
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Sends the request that makes a run or sandbox, and notes the answer; false if it was not accepted, as far as is known.
    async fn make(&self, path: &str, request: &Value, known: &mut Known) -> bool {
        let post = self.client().request(Method::POST, path).json(request);
        self.note(self.client().try_send(post, "POST", path).await.ok(), known).await
    }

    /// The same with a key, sent again for as long as the answer is lost or says that it may come later.
    async fn make_surely(&self, path: &str, request: &Value, known: &mut Known) -> bool {
        let deadline = tokio::time::Instant::now() + SEND_FOR;
        loop {
            let client = self.client();
            let post = client.request(Method::POST, path).header("idempotency-key", &known.label).json(request);
            let answer = client.try_send(post, "POST", path).await.ok();
            let is_final = answer.as_ref().is_some_and(|answer| answer.body["retryable"] != true);
            if self.note(answer, known).await {
                known.refused = None;
                return true;
            }
            if is_final || tokio::time::Instant::now() > deadline {
                return false;
            }
        }
    }

    async fn note(&self, answer: Option<Answer>, known: &mut Known) -> bool {
        match answer {
            Some(answer) if answer.status < 300 => {
                known.note(&answer.body);
                self.accepted.fetch_add(1, Ordering::SeqCst);
                return true;
            }
            // It may have been made, and may have run: that is no refusal, but as little as a lost answer.
            Some(answer) if answer.body["code"] == "outcome_unknown" => {}
            Some(answer) => known.refused = Some(answer.text),
            None => {}
        }
        tokio::time::sleep(PAUSE).await;
        false
    }

    /// Runs that it waits for, and runs that it asks for.
    async fn run(mut self) -> Vec<Known> {
        let mut all = Vec::new();
        while !self.is_over() {
            let payload = Payload::random(&mut self.random);
            let mut known = Known::new(format!("{}-{}", self.label, all.len()), Asked::Run(payload));
            known.retry = self.retry;
            let mut request = payload.request(&known.label, "busybox", *self.random.pick(&[0, 0, 100, 20_000]));
            request["retry"] = json!(self.retry);
            let is_accepted = match self.random.below(2) {
                0 => self.make("/v1/runs", &request, &mut known).await,
                _ => self.make_surely("/v1/runs", &request, &mut known).await,
            };
            if is_accepted && known.outcomes.is_empty() {
                self.ask_for_end(&mut known, "/v1/runs").await;
            }
            all.push(known);
        }
        all
    }

    async fn ask_for_end(&self, known: &mut Known, of: &str) {
        let deadline = tokio::time::Instant::now() + ASK_FOR;
        let path = format!("{of}/{}", known.id.as_deref().unwrap_or_default());
        while known.outcomes.is_empty() && !self.is_over() && tokio::time::Instant::now() < deadline {
            if let Ok(answer) = self.client().try_get(&path).await
                && answer.status == 200
            {
                known.note(&answer.body);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Sandboxes that are deleted soon after they were made: while they wait, while they start, while they run.
    async fn cancel(mut self) -> Vec<Known> {
        let mut all = Vec::new();
        while !self.is_over() {
            let asked = *self.random.pick(&[Asked::Cancelled, Asked::Cancelled, Asked::Ended]);
            let mut known = Known::new(format!("{}-{}", self.label, all.len()), asked);
            let command =
                if asked == Asked::Ended { json!(["flood", "150000"]) } else { json!(["sh", "-c", "echo begun; exec sleep 1000"]) };
            let is_removed = asked == Asked::Ended && self.random.below(2) == 0;
            let request = json!({
                "image": "busybox", "command": command, "labels": { "crash": known.label }, "auto_remove": is_removed, "keep_layer": asked == Asked::Cancelled,
                "limits": { "memory_bytes": MEMORY_BYTES, "disk_bytes": 4 << 20 },
            });
            // It goes by itself, and nobody promises when.
            known.deletion = is_removed.then_some(false);
            if self.make("/v1/sandboxes", &request, &mut known).await && !is_removed {
                if asked == Asked::Ended {
                    self.ask_for_end(&mut known, "/v1/sandboxes").await;
                } else {
                    tokio::time::sleep(Duration::from_millis(self.random.below(120))).await;
                }
                let path = format!("/v1/sandboxes/{}", known.id.as_deref().unwrap_or_default());
                if asked == Asked::Cancelled {
                    let is_started_again = self.order(&path).await;
                    // A start that a crash interrupts is told as lost.
                    known.has_run &= !is_started_again;
                }
                known.deletion = Some(self.client().try_delete(&path).await.is_ok_and(|answer| answer.status == 204));
            }
            all.push(known);
        }
        all
    }

    /// What a sandbox may be told while it is there. Whatever it answers: the state of its row and its keeper's must agree in the end.
    /// Whether it was told to start again.
    async fn order(&mut self, path: &str) -> bool {
        let change = json!({ "labels": { "changed": "yes" }, "limits": { "memory_bytes": MEMORY_BYTES - (1 << 20), "pids": 32 } });
        let mut is_started_again = false;
        let orders = self.random.below(4);
        for order in 0..orders {
            let what = match self.crowd {
                Crowd::Few if order == 0 => {
                    // What never ran leaves nothing on which it could go on.
                    let _unread = self.client().try_get(&format!("{path}/wait?until=running&timeout_ms=3000")).await;
                    0
                }
                Crowd::Few | Crowd::Many => self.random.below(6),
            };
            let (method, of, body) = match what {
                0 => {
                    // Only what has ended is started again.
                    let stop = format!("{path}/stop");
                    let client = self.client();
                    let request = client.request(Method::POST, &stop).json(&json!({ "grace_ms": 0 }));
                    let _unread = client.try_send(request, "POST", &stop).await;
                    let _unread = client.try_get(&format!("{path}/wait?until=exited&timeout_ms=3000")).await;
                    (Method::POST, "/start", json!({}))
                }
                1 => (Method::POST, "/pause", json!({})),
                2 => (Method::POST, "/resume", json!({})),
                3 => (Method::PATCH, "", change.clone()),
                _ => (Method::POST, "/stop", json!({ "grace_ms": 50 })),
            };
            is_started_again |= of == "/start";
            let path = format!("{path}{of}");
            let client = self.client();
            let request = client.request(method.clone(), &path).json(&body);
            let _unread = client.try_send(request, method.as_str(), &path).await;
        }
        is_started_again
    }

    /// Sandboxes in which it starts one process after the other.
    async fn exec(mut self) -> Vec<Known> {
        let mut all = Vec::new();
        while !self.is_over() {
            let mut known = Known::new(format!("{}-{}", self.label, all.len()), Asked::Cancelled);
            let request = json!({
                "image": "busybox", "command": ["sleep", "1000"], "labels": { "crash": known.label },
                "limits": { "memory_bytes": MEMORY_BYTES, "disk_bytes": 4 << 20 },
            });
            if self.make("/v1/sandboxes", &request, &mut known).await {
                let path = format!("/v1/sandboxes/{}", known.id.as_deref().unwrap_or_default());
                for _ in 0..4 + self.random.below(8) {
                    self.exec_in(&path, &mut known).await;
                }
                known.deletion = Some(self.client().try_delete(&path).await.is_ok_and(|answer| answer.status == 204));
            }
            all.push(known);
        }
        all
    }

    /// One process, whose sandbox may not run yet, or no more. What is told of its end is told once, and is true if it came to its own.
    async fn exec_in(&self, path: &str, known: &mut Known) {
        let path = format!("{path}/execs");
        let command = format!("echo {}; exit 3", known.label);
        let post = self.client().request(Method::POST, &path).json(&json!({ "command": ["sh", "-c", command], "wait_ms": 5000 }));
        let told = match self.client().try_send(post, "POST", &path).await {
            Ok(answer) if answer.status == 200 => answer.body,
            Ok(_) | Err(_) => return tokio::time::sleep(PAUSE).await,
        };
        let outcome = &told["outcome"];
        if outcome["reason"] == "exited" {
            known.has_run = true;
            if outcome["exit_code"] != 3 || told["stdout"] != format!("{}\n", known.label) {
                known.wrong.push(format!("an exec in {} ended otherwise than its program does: {told}", known.label));
            }
        }
        let path = format!("{path}/{}", told["id"].as_str().unwrap_or_default());
        if let Ok(now) = self.client().try_get(&path).await
            && now.status == 200
            && now.body["outcome"] != *outcome
        {
            known.wrong.push(format!("an exec in {} was told {outcome} and is {}", known.label, now.body["outcome"]));
        }
    }

    /// An image that comes and goes, with a run in between; until the service is lost, so that nothing is made up for.
    async fn import(mut self, archive: Arc<Vec<u8>>) -> Vec<Known> {
        let mut all = Vec::new();
        while !self.is_over() {
            let client = Client::admin(&self.places.borrow());
            match import(&client, "other", archive.to_vec()).await {
                Some(true) => {}
                Some(false) => tokio::time::sleep(PAUSE * 10).await,
                None => break,
            }
            let payload = Payload::Echo(u8::try_from(self.random.below(100)).expect("below 100"));
            let mut known = Known::new(format!("{}-{}", self.label, all.len()), Asked::Run(payload));
            self.make("/v1/runs", &payload.request(&known.label, "other", 20_000), &mut known).await;
            all.push(known);
            let client = Client::admin(&self.places.borrow());
            if client.try_delete("/v1/images/other").await.is_err() {
                break;
            }
        }
        all
    }
}

/// Imports an archive for all tenants. `None` if no answer came, else whether it was taken.
pub(crate) async fn import(client: &Client, reference: &str, archive: Vec<u8>) -> Option<bool> {
    let path = format!("/v1/images/import?reference={reference}");
    let request = client.request(Method::POST, &path).header("content-type", "application/x-tar").body(archive);
    client.try_send(request, "POST", &path).await.ok().map(|answer| answer.status == 201)
}
