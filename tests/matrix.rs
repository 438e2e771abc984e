//! Every operation of `openapi.yaml`, tried by who may not: without a token, without its scope, with the id of another tenant's object.
//!
//! Nothing here lists operations. One that is added to the document is tried too; if its path holds the id of something that [`make`] does not
//! know, the test fails until it does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};

use mayfly_tests::{
    Answer, Client,
    contract::{self, Operation},
    image,
    service::{Shared, shared},
    stream, token,
};
use reqwest::Method;
use serde_json::{Value, json};

/// Something of tenant A's, and what is like it but never was.
struct Made {
    id: String,
    absent: String,
}

/// Operations on a sandbox that are for one that runs; for all others it has ended.
const OF_WHAT_RUNS: [&str; 16] = [
    "/v1/sandboxes/{id}/commit",
    "/v1/sandboxes/{id}/kill",
    "/v1/sandboxes/{id}/pause",
    "/v1/sandboxes/{id}/resume",
    FILE,
    "/v1/sandboxes/{id}/archive",
    "/v1/sandboxes/{id}/diff",
    "/v1/sandboxes/{id}/top",
    "/v1/sandboxes/{id}/stats",
    "/v1/sandboxes/{id}/attach",
    "/v1/sandboxes/{id}/execs",
    "/v1/sandboxes/{id}/execs/{eid}",
    "/v1/sandboxes/{id}/execs/{eid}/attach",
    "/v1/sandboxes/{id}/execs/{eid}/kill",
    "/v1/sandboxes/{id}/execs/{eid}/logs",
    "/v1/sandboxes/{id}/execs/{eid}/resize",
];
const FILE: &str = "/v1/sandboxes/{id}/files/{path}";
/// Ends with the sandbox.
const WATCH: &str = "/v1/sandboxes/{id}/watch";

/// Makes what the last parameter of this part of a path names. `before` are the ids in front of it, `template` is the whole path.
async fn make(owner: &Client, part: &str, before: &[Made], template: &str) -> Made {
    let uuid = |body: Value| Made { id: body["id"].as_str().unwrap().to_owned(), absent: uuid::Uuid::new_v4().to_string() };
    let program = json!({ "image": "busybox", "command": ["echo", mark(owner)], "labels": { "mark": mark(owner) } });
    match (part, before) {
        ("/v1/runs/{id}", []) => uuid(owner.run(&program).await),
        ("/v1/sandboxes/{id}", []) if OF_WHAT_RUNS.contains(&template) => {
            // Small: as many are there at one time as there are operations.
            let limits = json!({ "memory_bytes": 16 << 20, "cpu_millis": 20 });
            let lasting = json!({ "image": "busybox", "command": ["sleep", "60"], "labels": { "mark": mark(owner) }, "limits": limits });
            let made = uuid(owner.post("/v1/sandboxes", &lasting).await.expect(201));
            owner.until(&format!("/v1/sandboxes/{}", made.id), |sandbox| sandbox["state"] == "running").await;
            made
        }
        ("/v1/sandboxes/{id}", []) if template == WATCH => {
            // Long enough for all that is asked of it, and shorter than a stream says nothing.
            let limits = json!({ "memory_bytes": 16 << 20, "cpu_millis": 100 });
            let brief = json!({ "image": "busybox", "command": ["sleep", "12"], "labels": { "mark": mark(owner) }, "limits": limits });
            let made = uuid(owner.post("/v1/sandboxes", &brief).await.expect(201));
            owner.until(&format!("/v1/sandboxes/{}", made.id), |sandbox| sandbox["state"] == "running").await;
            made
        }
        ("/v1/sandboxes/{id}", []) => {
            let made = uuid(owner.post("/v1/sandboxes", &program).await.expect(201));
            owner.until(&format!("/v1/sandboxes/{}", made.id), |sandbox| sandbox["state"] == "exited").await;
            made
        }
        // Whoever reads its log to the end is not kept for long.
        ("/v1/sandboxes/{id}/execs/{eid}", [sandbox]) => {
            let exec = json!({ "command": ["sleep", "4"], "tty": true, "wait_ms": 0 });
            uuid(owner.post(&format!("/v1/sandboxes/{}/execs", sandbox.id), &exec).await.expect(202))
        }
        (FILE, [sandbox]) => {
            let file = Made { id: mark(owner), absent: format!("tenant-{}", uuid::Uuid::new_v4().simple()) };
            let path = format!("/v1/sandboxes/{}/files/{}", sandbox.id, file.id);
            owner.send(owner.request(Method::PUT, &path).body("text"), "PUT", &path).await.expect(200);
            file
        }
        ("/v1/images/{reference}" | "/v1/image-history/{reference}" | "/v1/image-archives/{reference}", []) => {
            let (name, absent) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
            let made = Made { id: format!("{}-{name}", mark(owner)), absent: format!("{}-{absent}", mark(owner)) };
            let archive = std::fs::read(image::archive("busybox").unwrap()).unwrap();
            owner.post_raw(&format!("/v1/images/import?reference={}", made.id), "application/x-tar", archive).await.expect(201);
            made
        }
        ("/v1/registries/{registry}", []) => {
            let name = || format!("{}.example", uuid::Uuid::new_v4().simple());
            let made = Made { id: name(), absent: name() };
            let request = json!({ "registry": made.id, "username": mark(owner), "password": "secret" });
            owner.post("/v1/registries", &request).await.expect(201);
            made
        }
        ("/v1/pools/{name}", []) => {
            let name = || format!("p-{}", uuid::Uuid::new_v4());
            let pool = Made { id: name(), absent: name() };
            let template = json!({ "image": "busybox", "command": ["sleep", "60"], "labels": { "mark": mark(owner) } });
            owner.post("/v1/pools", &json!({ "name": pool.id, "size": 0, "template": template })).await.expect(201);
            pool
        }
        ("/v1/volumes/{name}", []) => {
            // What never was has a name of the same length.
            let name = || format!("v-{}", uuid::Uuid::new_v4());
            let volume = Made { id: name(), absent: name() };
            let request = json!({ "name": volume.id, "size_bytes": 4 << 20, "labels": { "mark": mark(owner) } });
            owner.post("/v1/volumes", &request).await.expect(201);
            volume
        }
        ("/v1/webhooks/{id}", []) => {
            let url = format!("https://{}.example/", mark(owner));
            uuid(owner.post("/v1/webhooks", &json!({ "url": url })).await.expect(201))
        }
        ("/v1/webhooks/{id}/deliveries/{delivery}", [webhook]) => {
            uuid(owner.post(&format!("/v1/webhooks/{}/test", webhook.id), &json!({})).await.expect(202))
        }
        ("/v1/admin/tenants/{tenant}", []) => {
            // A tenant and its principal are there from their first request on.
            owner.get("/v1/quota").await.expect(200);
            Made { id: mark(owner), absent: format!("tenant-{}", uuid::Uuid::new_v4().simple()) }
        }
        ("/v1/admin/tenants/{tenant}/principals/{principal}", [_]) => Made { id: "tester".to_owned(), absent: "nobody".to_owned() },
        ("/v1/admin/nodes/{node}", []) => {
            let own = std::fs::read_to_string(shared().place.data_dir.join("node-id")).unwrap();
            Made { id: own.trim().to_owned(), absent: uuid::Uuid::new_v4().to_string() }
        }
        _ => panic!("openapi.yaml has {part}, and this test does not know how to make what it names: add that to `make`"),
    }
}

/// What stands in everything that this tenant makes, and must stand in no other's answer.
fn mark(owner: &Client) -> String {
    let claims = owner.token().unwrap().split('.').nth(1).unwrap();
    let claims = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, claims).unwrap();
    serde_json::from_slice::<Value>(&claims).unwrap()["tenant"].as_str().unwrap().to_owned()
}

/// The operation's path with what it names: made by `owner`, and such as never was.
async fn paths(owner: &Client, operation: &Operation) -> (String, String) {
    let (mut made, mut part): (Vec<Made>, String) = (Vec::new(), String::new());
    for name in operation.template.split('/').skip(1) {
        part = format!("{part}/{name}");
        if name.starts_with('{') {
            made.push(make(owner, &part, &made, &operation.template).await);
        }
    }
    let filled = |pick: fn(&Made) -> &String| {
        let mut ids = made.iter().map(pick);
        let parts = operation.template.split('/').map(|name| if name.starts_with('{') { ids.next().unwrap().as_str() } else { name });
        parts.collect::<Vec<_>>().join("/")
    };
    (filled(|made| &made.id), filled(|made| &made.absent))
}

/// Sends the operation's method with the body that the document gives as an example, or an empty object.
async fn send(client: &Client, operation: &Operation, path: &str) -> Answer {
    let method: Method = operation.method.parse().unwrap();
    // What a POST to a file is to do stands in the query. A new name is good for the file and for what there is none of.
    let query = if operation.template == FILE && method == Method::POST { "?rename=/renamed" } else { "" };
    let mut request = client.request(method, &format!("{path}{query}"));
    if let Some(content) = operation.definition()["requestBody"]["content"].as_object() {
        let (media_type, media) = content.iter().next().unwrap();
        request = request.header("content-type", media_type);
        request = match media_type.as_str() {
            // The end of an archive is two blocks of zeros (tar(5)): this one is empty.
            "application/x-tar" => request.body(vec![0; 1024]),
            _ => request.body(media.get("example").unwrap_or(&json!({})).to_string()),
        };
    }
    client.send(request, &operation.method, path).await
}

/// All of an answer but what may differ between any two: the time, the request's id, and the id that was asked for.
fn essence(answer: &Answer, path: &str, id_of: &str) -> (u16, BTreeMap<String, String>, String) {
    let ids: Vec<_> = path.split('/').zip(id_of.split('/')).filter(|(id, name)| id != name).map(|(id, _)| id).collect();
    let varying = ["date", "x-request-id"];
    let headers = answer.headers.iter().filter(|(name, _)| !varying.contains(&name.as_str()));
    let headers = headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
    let mut body = answer.body.clone();
    if let Some(body) = body.as_object_mut() {
        body.remove("request_id");
    }
    let body = if body.is_null() { answer.text.clone() } else { body.to_string() };
    (answer.status, headers, ids.iter().fold(body, |body, id| body.replace(id, "…")))
}

#[track_caller]
fn assert_same(operation: &Operation, (theirs, path): (&Answer, &str), (absent, absent_path): (&Answer, &str)) {
    // Length and content may differ by the id alone, and ids of one kind are of one length.
    assert_eq!(
        essence(theirs, path, absent_path),
        essence(absent, absent_path, path),
        "{} {}: what is another's can be told from what never was",
        operation.method,
        operation.template
    );
}

/// Operations that want a token, with the scopes of which they want one.
fn guarded() -> Vec<(Operation, Vec<&'static str>)> {
    contract::operations().into_iter().filter_map(|operation| operation.scopes().map(|scopes| (operation, scopes))).collect()
}

/// A client of `owner`'s tenant with exactly these scopes.
fn with_scopes(service: &Shared, owner: &Client, scopes: &[&str]) -> Client {
    Client::with_scope(&service.place, &mark(owner), &scopes.join(" "))
}

#[tokio::test]
async fn no_operation_answers_without_a_token_but_those_that_say_so() {
    let service = shared();
    let (owner, nobody) = (service.client(), Client::with_token(&service.place, None));
    for (operation, _) in guarded() {
        let (path, absent) = paths(&owner, &operation).await;

        let (theirs, never) = (send(&nobody, &operation, &path).await, send(&nobody, &operation, &absent).await);

        assert_eq!(theirs.header("www-authenticate"), "Bearer realm=\"mayfly\"");
        assert_same(&operation, (&theirs, &path), (&never, &absent));
        theirs.problem(401, "unauthenticated");
    }
    for operation in contract::operations().into_iter().filter(|operation| operation.scopes().is_none()) {
        let base = if operation.template == "/metrics" { &service.place.metrics_url } else { &service.place.url };
        let status = reqwest::get(format!("{base}{}", operation.template)).await.unwrap().status();
        assert_eq!(status.as_u16(), 200, "{}", operation.template);
    }
}

#[tokio::test]
async fn no_operation_answers_without_its_scope() {
    let service = shared();
    let owner = service.client();
    let mut all: BTreeSet<_> = token::TENANT_SCOPES.split(' ').collect();
    all.extend(guarded().iter().flat_map(|(_, scopes)| scopes.clone()));
    let mut scoped = 0;
    for (operation, wanted) in guarded().into_iter().filter(|(_, wanted)| !wanted.is_empty()) {
        scoped += 1;
        let others: Vec<_> = all.iter().copied().filter(|scope| !wanted.contains(scope) && *scope != "admin").collect();
        let client = with_scopes(&service, &owner, &others);
        let (path, absent) = paths(&owner, &operation).await;

        let (own, never) = (send(&client, &operation, &path).await, send(&client, &operation, &absent).await);

        let challenge = own.header("www-authenticate").to_owned();
        let named =
            wanted.iter().any(|scope| challenge == format!("Bearer realm=\"mayfly\", error=\"insufficient_scope\", scope=\"{scope}\""));
        assert!(named, "{} {} wants {wanted:?} and says {challenge}", operation.method, operation.template);
        assert_same(&operation, (&own, &path), (&never, &absent));
        own.problem(403, "forbidden");
    }
    assert!(scoped > 9, "{scoped} operations with a scope");
}

#[tokio::test]
async fn what_is_another_tenants_is_as_if_it_never_was() {
    let service = shared();
    let owner = service.client();
    let mut tried = 0;
    // An administrator's operations are for all tenants' objects; who is none is refused above.
    for (operation, _) in guarded().into_iter().filter(|(operation, wanted)| operation.template.contains('{') && *wanted != ["admin"]) {
        tried += 1;
        let stranger = service.client();
        let (path, absent) = paths(&owner, &operation).await;

        let (theirs, never) = (send(&stranger, &operation, &path).await, send(&stranger, &operation, &absent).await);
        let handshakes = if operation.definition()["responses"].get("101").is_some() {
            let open = async |path: &str| {
                let url = format!("{}{path}", service.place.url);
                format!("{:#}", stream::open(&url, stranger.token()).await.expect_err("no stream is for strangers"))
            };
            Some((open(&path).await, open(&absent).await))
        } else {
            None
        };
        // The control, and the proof that the stranger changed nothing: the owner, with no more scopes than the document names.
        let owner = with_scopes(&service, &owner, &operation.enough());
        let is_socket_alone =
            operation.definition()["responses"].get("101").is_some() && operation.definition()["responses"].get("200").is_none();
        if is_socket_alone {
            stream::open(&format!("{}{path}", service.place.url), owner.token()).await.expect("its owner may attach");
        }
        let own = send(&owner, &operation, &path).await;

        assert_eq!(theirs.status, 404, "{} {}: {}", operation.method, operation.template, theirs.text);
        assert_same(&operation, (&theirs, &path), (&never, &absent));
        if let Some((theirs, never)) = handshakes {
            assert!(theirs.contains("404") && theirs == never, "{theirs} / {never}");
        }
        assert!(
            (200..300).contains(&own.status) || is_socket_alone,
            "{} {} by its owner: {}",
            operation.method,
            operation.template,
            own.text
        );
    }
    assert!(tried > 4, "{tried} operations with ids");
}

#[tokio::test]
async fn no_list_shows_what_is_another_tenants() {
    let service = shared();
    let (owner, stranger) = (service.client(), service.client());
    let mark = mark(&owner);
    let templates: Vec<_> = contract::operations().into_iter().map(|operation| operation.template).collect();
    for (operation, _) in guarded().into_iter().filter(|(o, wanted)| o.method == "GET" && !o.template.contains('{') && *wanted != ["admin"])
    {
        let member = templates.iter().find(|template| {
            template.strip_prefix(&operation.template).is_some_and(|rest| rest.starts_with("/{") && !rest[1..].contains('/'))
        });
        let mut path = operation.template.clone();
        if let Some(member) = member {
            let made = make(&owner, member, &[], member).await;
            // Of runs there is no list but of those that are named.
            if operation.template == "/v1/runs" {
                path = format!("/v1/runs?ids={}", made.id);
            }
            let own = send(&owner, &operation, &path).await;
            assert!(own.text.contains(&mark), "the control failed: {} shows not even its owner what it has", operation.template);
        }

        let theirs = send(&stranger, &operation, &path).await;

        assert_eq!(theirs.status, 200, "{}: {}", operation.template, theirs.text);
        assert!(!theirs.text.contains(&mark), "{}: {}", operation.template, theirs.text);
    }
}

#[tokio::test]
async fn a_name_that_another_tenant_has_is_free() {
    let service = shared();
    let named = json!({ "image": "busybox", "command": ["true"], "name": "the-same-name" });

    let first = service.client().post("/v1/sandboxes", &named).await.expect(201);
    let second = service.client().post("/v1/sandboxes", &named).await.expect(201);

    assert_ne!(first["id"], second["id"]);
}

#[tokio::test]
async fn an_image_that_another_tenant_has_cannot_be_run() {
    let service = shared();
    let (owner, stranger) = (service.client(), service.client());
    let made = make(&owner, "/v1/images/{reference}", &[], "").await;
    let run = |reference: &str| json!({ "image": reference, "command": ["true"] });

    let theirs = stranger.post("/v1/runs", &run(&made.id)).await;
    let never = stranger.post("/v1/runs", &run(&made.absent)).await;

    assert_eq!(essence(&theirs, &made.id, &made.absent), essence(&never, &made.absent, &made.id));
    theirs.problem(404, "image_not_found");
    owner.post("/v1/runs", &run(&made.id)).await.expect(200);
}
