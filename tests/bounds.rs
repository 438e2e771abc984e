//! Every field and parameter of every request is held to the bounds that the contract names: one beyond each is refused and named, and what is at it is not refused for it.

use jsonschema::Validator;
use mayfly_tests::{Answer, Client, contract, contract::Operation, service::shared, token};
use reqwest::Method;
use serde_json::{Value, json};

const SOMEBODY_ELSES: &str = "0190b5a4-0000-7000-8000-000000000000";
/// The longest text that a body of JSON can hold is its largest body.
const BODY_BYTES_MAX: u64 = 16 << 20;
/// What entry point, command and environment have together: more than a schema can say of one of them.
const ARGS_ENV_BYTES_MAX: usize = 64 << 10;

/// A step on the way from a body to a value in it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Member(String),
    /// One of a list.
    Entry,
    /// What some member of a map is.
    Value,
    /// What some member of a map is called.
    Key,
}

/// A value in a body, and one of the schemas that it is to keep.
#[derive(Debug, Clone)]
struct Field {
    steps: Vec<Step>,
    schema: &'static Value,
}

impl Field {
    /// All of this schema that can be told from one another, itself included.
    fn all_of(schema: &'static Value, steps: Vec<Step>, all: &mut Vec<Self>) {
        let schema = contract::resolved(schema).expect("a reference leads somewhere");
        let to = |step: Step| steps.iter().cloned().chain([step]).collect::<Vec<_>>();
        for schema in ["oneOf", "anyOf"].into_iter().filter_map(|word| schema[word].as_array()).flatten() {
            Self::all_of(schema, steps.clone(), all);
        }
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            Self::all_of(schema, to(Step::Member(name.clone())), all);
        }
        // What is wrong with one run of many is told in its place, and each is a body by itself.
        if schema["items"].is_object() && steps != [Step::Member("runs".to_owned())] {
            Self::all_of(&schema["items"], to(Step::Entry), all);
        }
        if schema["additionalProperties"].is_object() {
            Self::all_of(&schema["additionalProperties"], to(Step::Value), all);
            all.push(Self { steps: to(Step::Key), schema: &schema["propertyNames"] });
        }
        all.push(Self { steps, schema });
    }

    fn is(&self, kind: &str) -> bool {
        let named = &self.schema["type"];
        named == kind || named.as_array().is_some_and(|kinds| kinds.iter().any(|one| one == kind))
    }

    /// The member that it is, or is in.
    fn member(&self) -> &str {
        self.steps.iter().rev().find_map(|step| if let Step::Member(name) = step { Some(name.as_str()) } else { None }).unwrap_or_default()
    }

    fn limit(&self, word: &str) -> Option<usize> {
        self.schema[word].as_u64().map(|limit| usize::try_from(limit).expect("a bound fits"))
    }

    /// As a problem names it; of a map it names the map at least.
    fn name(&self) -> String {
        let mut name = String::new();
        for step in &self.steps {
            match step {
                Step::Member(member) if name.is_empty() => name.clone_from(member),
                Step::Member(member) => name = format!("{name}.{member}"),
                Step::Entry => name = format!("{name}[{}]", place_in(self.member())),
                Step::Value | Step::Key => {}
            }
        }
        name
    }

    /// Whether this is the field that the problem is about, or the list or map that it stands in.
    fn is_told_by(&self, problem: &Value) -> bool {
        let told = problem["field"].as_str().unwrap_or_default();
        let (name, list) = (self.name(), self.name().split('[').next().unwrap_or_default().to_owned());
        let is_within = told.strip_prefix(&name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
        is_within || told == list
    }

    /// Whether it takes its part of what entry point, command and environment have together.
    fn shares(&self) -> bool {
        matches!(self.steps.last(), Some(Step::Entry)) && ["command", "entrypoint"].contains(&self.member())
            || matches!(self.steps.last(), Some(Step::Key | Step::Value)) && self.member() == "env"
    }

    fn text(&self) -> Text {
        Text::of(self.schema, self.member())
    }

    /// What is just beyond each of its bounds, and what is at it, where that can be told; what it is without a bound for, otherwise.
    fn cases(&self) -> Result<Vec<(Value, Option<Value>)>, &'static str> {
        let mut cases = Vec::new();
        if self.is("integer") {
            let bounds = self.schema["minimum"].as_i64().zip(self.schema["maximum"].as_i64());
            let (min, max) = bounds.ok_or("a number without an end")?;
            cases.extend([(json!(min - 1), None), (json!(max + 1), None)]);
        }
        if self.is("array") {
            let max = self.limit("maxItems").ok_or("a list without an end")?;
            let list = |length: usize| (0..length).map(|at| entry(self.member(), at)).collect::<Value>();
            cases.push((list(max + 1), Some(list(max))));
            cases.extend(self.limit("minItems").map(|min| (list(min - 1), Some(list(min)))));
        }
        if self.is("object") && self.schema["additionalProperties"].is_object() {
            let max = self.limit("maxProperties").ok_or("a map without an end")?;
            let map = |length: usize| (0..length).map(|at| (format!("k{at}"), json!("v"))).collect::<serde_json::Map<_, _>>();
            cases.push((map(max + 1).into(), Some(map(max).into())));
        }
        if self.is("string") {
            cases.extend(self.text().cases(self.shares())?);
        }
        Ok(cases)
    }
}

/// Where one entry is put that is tried: behind the program, of arguments.
fn place_in(list: &str) -> usize {
    usize::from(["command", "entrypoint"].contains(&list))
}

/// What may stand in this list, at this place.
fn entry(list: &str, at: usize) -> Value {
    match list {
        "command" | "entrypoint" => json!(if at == 0 { "true" } else { "" }),
        "files" => json!({ "path": format!("f{at}"), "content": "" }),
        "cases" => json!({}),
        "volumes" => json!({ "name": format!("v{at}"), "path": format!("/v{at}") }),
        "runs" => json!({ "image": "no-such-image", "command": ["true"], "wait_ms": 0 }),
        "kinds" => json!("image.imported"),
        "networks" => json!("none"),
        "isolations" => json!("container"),
        other => panic!("what stands in {other}?"),
    }
}

/// What a text may be, and texts to try it with.
struct Text {
    schema: &'static Value,
    pattern: Option<Validator>,
    member: String,
}

impl Text {
    fn of(schema: &'static Value, member: &str) -> Self {
        let pattern = schema["pattern"].as_str().map(|pattern| json!({ "type": "string", "pattern": pattern }));
        let pattern = pattern.map(|schema| jsonschema::validator_for(&schema).expect("a pattern is one"));
        Self { schema, pattern, member: member.to_owned() }
    }

    fn is_like(&self, text: &str) -> bool {
        self.pattern.as_ref().is_none_or(|pattern| pattern.is_valid(&json!(text)))
    }

    /// A text of this length that is like it.
    fn of_length(&self, length: usize) -> Option<String> {
        let beginning = |beginning: &str| Some(format!("{beginning}{}", "a".repeat(length.checked_sub(beginning.len())?)));
        let folders = || (0..length).map(|at| if at % 100 == 0 && at + 1 < length { '/' } else { 'a' }).collect::<String>();
        let of_member = match self.member.as_str() {
            "path" | "workdir" => Some(folders()),
            "url" => beginning("https://hooks.example/"),
            // Names with a dot between them, none of which is long (RFC 1035, 2.3.4).
            "registry" => Some((0..length).map(|at| if at % 60 == 59 && at + 1 < length { '.' } else { 'a' }).collect()),
            _ => None,
        };
        let others = [beginning(""), Some(folders()), beginning("a."), Some("7".repeat(length))];
        of_member.into_iter().chain(others.into_iter().flatten()).find(|text| self.is_like(text))
    }

    /// The length at which its pattern ends, if it does; `None`: it is one of so many words.
    fn longest_by_pattern(&self) -> Result<Option<usize>, &'static str> {
        // Longer than any pattern of ours that ends; and far beyond.
        const LONGEST: usize = 300;
        if self.of_length(10 * LONGEST).is_some() {
            return Err("a text without an end");
        }
        Ok((1..=LONGEST).rev().find(|length| self.of_length(*length).is_some()))
    }

    fn cases(&self, shares: bool) -> Result<Vec<(Value, Option<Value>)>, &'static str> {
        let mut cases = Vec::new();
        if self.schema["enum"].is_array() || !self.schema["const"].is_null() {
            // A quota may also be a word, and of a word nothing else is.
            return Ok(if self.schema["enum"].is_array() { vec![(json!("no-such-word"), None)] } else { vec![] });
        }
        if self.pattern.is_some() {
            let unlike = ["\0", "\u{7f}", " ", "é", "", "A=B"].into_iter().find(|text| !self.is_like(text));
            cases.extend(unlike.map(|text| (json!(text), None)));
        }
        if self.schema["format"] == "uri" {
            cases.push((json!("no url"), None));
        }
        if self.schema["minLength"].as_u64() == Some(1) {
            cases.push((json!(""), None));
        }
        let text = |length: usize| self.of_length(length).map(Value::from);
        if shares {
            // Alone it is a little less than all that there is of it.
            let too_long = text(ARGS_ENV_BYTES_MAX).ok_or("no text of that length is known")?;
            cases.push((too_long, text(ARGS_ENV_BYTES_MAX - 4096)));
            return Ok(cases);
        }
        let max = match self.schema["maxLength"].as_u64() {
            // With what stands around it the body is too large before.
            Some(BODY_BYTES_MAX) => return Ok(cases),
            Some(max) => Some(usize::try_from(max).expect("a bound fits")),
            None => self.longest_by_pattern()?,
        };
        if let Some(max) = max {
            let at_bound = text(max).ok_or("no text of that length is known")?;
            // Which languages there are, nobody but the service knows.
            let at_bound = Some(at_bound).filter(|_| self.member != "language");
            cases.push((text(max + 1).unwrap_or_else(|| json!("a".repeat(max + 1))), at_bound));
        }
        Ok(cases)
    }
}

/// Puts a value there, with what it needs around it.
fn put(body: &mut Value, steps: &[Step], list: &str, value: Value) {
    let Some((step, rest)) = steps.split_first() else {
        *body = value;
        return;
    };
    match step {
        Step::Member(name) => {
            if !body[name.as_str()].is_object() && !rest.is_empty() {
                // A step is nothing without its program.
                body[name.as_str()] = if name == "compile" { json!({ "command": ["true"] }) } else { json!({}) };
            }
            match name.as_str() {
                // It has both of its sizes, and no input that is given at once.
                "tty" => {
                    body["tty"] = json!({ "rows": 24, "columns": 80 });
                    body["stdin"] = Value::Null;
                }
                // Each case has its own input.
                "cases" => body["stdin"] = Value::Null,
                // Neither is without the other.
                "credentials" => body["credentials"] = json!({ "username": "robot", "password": "a token" }),
                // In place of an image, and with its own command.
                "language" | "source" => *body = json!({ "language": "bash", "source": "", "wait_ms": 0 }),
                _ => {}
            }
            put(&mut body[name.as_str()], rest, name, value);
        }
        Step::Entry => {
            let place = place_in(list);
            *body = (0..=place).map(|at| entry(list, at)).collect();
            put(&mut body[place], rest, list, value);
        }
        Step::Value => *body = json!({ "key": value }),
        Step::Key => *body = json!({ value.as_str().expect("a name is a text"): "v" }),
    }
}

/// The operations that take a body of JSON, with its schema and an example of it.
fn with_json() -> Vec<(Operation, &'static Value, Value)> {
    let examples = contract::examples();
    let example_of = |operation: &Operation| {
        let place = format!("#/paths/{}/{}/", operation.template.replace('~', "~0").replace('/', "~1"), operation.method.to_lowercase());
        examples.iter().find(|(schema, _)| schema.starts_with(&place)).map(|(_, example)| example.clone())
    };
    let schema_of = |operation: &Operation| {
        let content = &operation.definition()["requestBody"]["content"]["application/json"];
        (!content.is_null()).then(|| &content["schema"])
    };
    contract::operations()
        .into_iter()
        .filter_map(|operation| Some((schema_of(&operation)?, example_of(&operation)?, operation)))
        .map(|(schema, example, operation)| (operation, schema, example))
        .collect()
}

/// What there is for requests to be about: whose sandbox, and whose exec, is looked at before what is asked of it.
struct There {
    client: Client,
    sandbox: String,
    exec: String,
}

impl There {
    async fn new() -> Self {
        let service = shared();
        let tenant = format!("tenant-{}", uuid::Uuid::new_v4().simple());
        let client = Client::with_scope(&service.place, &tenant, &format!("{} admin", token::TENANT_SCOPES));
        let sandbox = client.sandbox("exec sleep 1000").await;
        let exec = json!({ "command": ["sleep", "1000"], "tty": true, "wait_ms": 0 });
        let exec =
            client.post(&format!("/v1/sandboxes/{sandbox}/execs"), &exec).await.expect(202)["id"].as_str().expect("an id").to_owned();
        Self { client, sandbox, exec }
    }

    fn path(&self, operation: &Operation) -> String {
        let parts = operation.template.split('/').map(|part| match part {
            "{id}" => self.sandbox.as_str(),
            "{eid}" => self.exec.as_str(),
            _ if part.starts_with('{') => SOMEBODY_ELSES,
            _ => part,
        });
        parts.collect::<Vec<_>>().join("/")
    }

    async fn ask(&self, operation: &Operation, body: &Value) -> Answer {
        self.send(operation, &self.path(operation), Some(&fresh(operation, body.clone()))).await
    }

    /// The same of what is to be taken, and so that as little as can be comes of it.
    async fn ask_in_vain(&self, operation: &Operation, body: &Value, field: &Field) -> Answer {
        let mut body = body.clone();
        if field.member() != "image" && body["image"].is_string() {
            body["image"] = json!("no-such-image");
        }
        match operation.template.as_str() {
            "/v1/admin/tenants" if field.member() != "id" => body["id"] = json!(format!("bounds-{}", uuid::Uuid::new_v4().simple())),
            "/v1/pools" if body["template"]["image"].is_string() && field.member() != "image" => {
                body["template"]["image"] = json!("no-such-image");
            }
            "/v1/volumes" if field.member() != "name" => body["name"] = json!(format!("bounds-{}", uuid::Uuid::new_v4().simple())),
            _ => {}
        }
        let body = fresh(operation, body);
        // Nothing is stopped or signaled for it. Where a sandbox is looked at before all of the request is, there is one.
        let path = self.path(operation);
        let path = if changes_sandbox(operation) || path.ends_with("/execs") { path } else { path.replace(&self.sandbox, SOMEBODY_ELSES) };
        let answer = self.send(operation, &path, Some(&body)).await;
        if answer.status == 201 && ["/v1/volumes", "/v1/webhooks"].contains(&operation.template.as_str()) {
            let gone = self.client.delete(answer.header("location")).await;
            assert_eq!(gone.status, 204, "{}", gone.text);
        }
        answer
    }

    async fn send(&self, operation: &Operation, path: &str, body: Option<&Value>) -> Answer {
        let method: Method = operation.method.parse().expect("the contract names methods");
        let request = self.client.request(method, path);
        let request = if let Some(body) = body { request.json(body) } else { request };
        self.client.send(request, &operation.method, path).await
    }

    async fn end(self) {
        assert_eq!(self.client.delete(&format!("/v1/sandboxes/{}", self.sandbox)).await.status, 204);
    }
}

fn changes_sandbox(operation: &Operation) -> bool {
    operation.method == "PATCH" && operation.template == "/v1/sandboxes/{id}"
}

/// Whether it says which registry is asked: there is one at most that is.
fn names_registry(operation: &Operation, field: &Field) -> bool {
    match operation.template.as_str() {
        "/v1/images/pull" => field.member() == "reference",
        "/v1/images/push" => field.member() == "to",
        _ => false,
    }
}

/// The same body, of which what was tried before changes nothing: that is none of the sandbox's labels.
fn fresh(operation: &Operation, mut body: Value) -> Value {
    if changes_sandbox(operation) && body["labels_policy"].is_null() {
        body["labels_policy"] = json!("replace");
    }
    body
}

/// Whether this is a refusal of that field.
fn is_refused(answer: &Answer, field: &Field) -> bool {
    answer.status == 422 && field.is_told_by(&answer.body)
}

/// A value without what would fill the page.
fn shown(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

#[tokio::test]
async fn every_field_of_every_request_is_held_to_the_bounds_that_the_contract_names() {
    let there = There::new().await;
    let (mut tried, mut taken, mut faults) = (0, 0, Vec::new());

    for (operation, schema, example) in with_json() {
        let mut fields = Vec::new();
        Field::all_of(schema, vec![], &mut fields);
        for field in fields {
            let at = format!("{} {}: {}", operation.method, operation.template, field.name());
            let cases = field.cases().unwrap_or_else(|fault| {
                faults.push(format!("{at} {:?} is {fault}", field.steps.last()));
                vec![]
            });
            for (beyond, at_bound) in cases {
                let mut body = example.clone();
                put(&mut body, &field.steps, "", beyond.clone());
                let answer = there.ask(&operation, &body).await;
                tried += 1;
                let bound = &answer.body["bound"];
                let limits = (&field.schema["minimum"], &field.schema["maximum"]);
                if !is_refused(&answer, &field) || !bound.is_null() && (&bound["min"], &bound["max"]) != limits {
                    faults.push(format!("{at} of {}: {}", shown(&beyond), answer.text));
                }
                let Some(at_bound) = at_bound.filter(|_| !names_registry(&operation, &field)) else { continue };
                let mut body = example.clone();
                put(&mut body, &field.steps, "", at_bound.clone());
                let answer = there.ask_in_vain(&operation, &body, &field).await;
                taken += 1;
                if is_refused(&answer, &field) || answer.status == 413 {
                    faults.push(format!("{at} of {} is refused: {}", shown(&at_bound), answer.text));
                }
            }
        }
    }

    assert!(faults.is_empty(), "{faults:#?}");
    assert!(tried > 250 && taken > 60, "only {tried} were tried, and {taken} at the bound");
    there.end().await;
}

#[tokio::test]
async fn every_text_that_may_be_as_long_as_the_body_is_refused_with_it() {
    let there = There::new().await;
    let (mut tried, mut faults) = (0, Vec::new());

    for (operation, schema, example) in with_json() {
        let mut fields = Vec::new();
        Field::all_of(schema, vec![], &mut fields);
        for field in fields.into_iter().filter(|field| field.schema["maxLength"].as_u64() == Some(BODY_BYTES_MAX)) {
            let mut body = example.clone();
            put(&mut body, &field.steps, "", json!("a".repeat((16 << 20) + 1)));
            let answer = there.ask(&operation, &body).await;
            tried += 1;
            if answer.status != 413 || answer.body["code"] != "payload_too_large" {
                faults.push(format!("{} {}: {}: {}", operation.method, operation.template, field.name(), answer.text));
            }
        }
    }

    assert!(faults.is_empty(), "{faults:#?}");
    assert!(tried > 5, "only {tried} were tried");
    there.end().await;
}

#[tokio::test]
async fn every_request_is_refused_for_a_field_that_there_is_not() {
    let there = There::new().await;
    let (mut tried, mut faults) = (0, Vec::new());

    for (operation, _, mut body) in with_json() {
        body["colour"] = json!("red");
        let answer = there.ask(&operation, &body).await;
        tried += 1;
        if answer.status != 422 || answer.body["field"] != "colour" {
            faults.push(format!("{} {}: {}", operation.method, operation.template, answer.text));
        }
    }

    assert!(faults.is_empty(), "{faults:#?}");
    assert!(tried > 15, "only {tried} were tried");
    there.end().await;
}

/// Queries that break what the contract says of this parameter.
fn broken(schema: &'static Value, member: &str) -> Vec<Vec<String>> {
    let schema = contract::resolved(schema).expect("a reference leads somewhere");
    let one = |text: &str| vec![text.to_owned()];
    let mut queries: Vec<Vec<String>> = match schema["type"].as_str() {
        Some("integer") => {
            let (min, max) = (schema["minimum"].as_i64(), schema["maximum"].as_i64());
            let beyond = min.map(|min| min - 1).into_iter().chain(max.map(|max| max + 1)).map(|number| one(&number.to_string()));
            beyond.chain([one("many"), one("1.5")]).collect()
        }
        Some("boolean") => vec![one("perhaps")],
        Some("array") => {
            let max = schema["maxItems"].as_u64().map(|max| (0..=max).map(|_| uuid::Uuid::new_v4().to_string()).collect());
            let twice = (schema["uniqueItems"] == true).then(|| vec![SOMEBODY_ELSES.to_owned(); 2]);
            broken(&schema["items"], member).into_iter().chain(max).chain(twice).collect()
        }
        _ => vec![],
    };
    if schema["enum"].is_array() {
        queries.push(one("no-such-word"));
    }
    if schema["format"].is_string() {
        queries.push(one("no-such-thing"));
    }
    if schema["pattern"].is_string() {
        let text = Text::of(schema, member);
        queries.extend(["\u{7f}", " ", "", "\0"].into_iter().find(|unlike| !text.is_like(unlike)).map(one));
        // Of a path in a sandbox the contract promises less than is taken: each name in it may be longer.
        let is_path = ["path", "rename"].contains(&member);
        let longest = text.longest_by_pattern().ok().flatten().filter(|_| !is_path);
        queries.extend(longest.map(|longest| one(&"a".repeat(longest + 1))).filter(|query| !text.is_like(&query[0])));
    }
    queries
}

#[tokio::test]
async fn every_parameter_of_every_query_is_held_to_what_the_contract_says_of_it() {
    let there = There::new().await;
    let (mut tried, mut faults) = (0, Vec::new());

    for operation in contract::operations() {
        let parameters = operation.definition()["parameters"].as_array().into_iter().flatten();
        let parameters = parameters.map(|parameter| contract::resolved(parameter).expect("a reference leads somewhere"));
        for parameter in parameters.filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().expect("a parameter has a name");
            for values in broken(&parameter["schema"], name) {
                let query: Vec<_> = values.iter().map(|value| format!("{name}={}", encoded(value))).collect();
                let path = format!("{}?{}", there.path(&operation), query.join("&"));
                let answer = there.send(&operation, &path, None).await;
                tried += 1;
                // Of a text that no database holds, the database says so.
                let is_named = answer.body["field"] == name || values == ["\0"];
                if answer.status != 422 || !is_named {
                    faults.push(format!("{} {path:.200}: {}", operation.method, answer.text));
                }
            }
        }
    }

    assert!(faults.is_empty(), "{faults:#?}");
    assert!(tried > 100, "only {tried} were tried");
    there.end().await;
}

/// As a part of a query.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() || b"-._".contains(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }
            },
        )
        .collect()
}
