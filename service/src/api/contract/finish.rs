//! What holds for all operations and schemas, laid over what the code says of each.
//!
//! * Every answer has `X-Request-Id` and the headers for browsers; whatever wants a token may answer 401, 403, 500 and 503; a body may be slow, large or wrong; a POST takes an `Idempotency-Key`.
//! * `x-bound` of a field holds a [`Bound`](crate::sandbox::Bound), and becomes its minimum, maximum and default; `x-schema` holds words of JSON Schema that utoipa lacks.
//! * An object has no other members than those that are named.

use std::collections::BTreeSet;

use utoipa::{IntoResponses, openapi::OpenApi};
use yaml_serde::{Mapping, Value};

use super::{
    super::pass,
    answers::{Around, Refusals, headers_around},
    examples, refusal,
};

/// The paths of those that are served by a listener of its own, around which there is less.
const BARE: &str = "/metrics";
/// Between scopes that are needed together.
const AND: &str = "` and `";
const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];

/// What comes as server-sent events is described event by event.
const EVENTS: &str = "
schema:
  type: object
  description: One event.
  properties:
    id: { type: string, description: 'What `Last-Event-ID` goes on behind, where that can be.' }
    event: { type: string, const: message }
    data: { type: string, description: 'What stands in one line of `application/x-ndjson`.' }
  required: [data]
";

/// The document of these operations in this frame.
pub(super) fn finished(described: &OpenApi, frame: &str) -> Value {
    let described = yaml_serde::to_value(described).expect("what utoipa makes is YAML");
    let mut document: Value = yaml_serde::from_str(frame).expect("the frame is YAML: a test reads it");
    let (mut paths, schemas) = (described["paths"].clone(), described["components"]["schemas"].clone());
    let mut refusals = Refusals::new();
    each_operation(&mut paths, |path, method, operation| settle_operation(path, method, operation, &mut refusals));
    under(&mut document, "paths", unstarred(paths));
    let components = document.get_mut("components").expect("the frame has components");
    let (answers, examples) = refusals.into_components();
    under(components, "responses", answers);
    under(components, "examples", examples);
    under(components, "schemas", schemas);
    each_value(&mut document, &mut settle_extensions);
    let all = document["components"]["schemas"].clone();
    each_value(&mut document, &mut |schema| flatten(schema, &all));
    let schemas = document["components"].get_mut("schemas").and_then(Value::as_mapping_mut).expect("they were put there");
    share_bounds(schemas);
    name_items(schemas);
    name_alternatives(schemas);
    each_value(&mut document, &mut close);
    sort_answers(&mut document);
    while prune(&mut document) {}
    let mut document = with_pages_named(&document);
    examples::show(&mut document);
    document
}

/// Puts `below` at `key`, under what the frame has there already.
fn under(document: &mut Value, key: &str, mut below: Value) {
    let mapping = document.as_mapping_mut().expect("it is a mapping");
    let over = mapping.get(key).cloned().unwrap_or_else(|| Value::Mapping(Mapping::new()));
    lay(&mut below, over);
    mapping.insert(key.into(), below);
}

/// Lays one value over another: mappings member by member, all else in place of what was there.
fn lay(below: &mut Value, over: Value) {
    match (below, over) {
        (Value::Mapping(below), Value::Mapping(over)) => {
            for (key, value) in over {
                match below.get_mut(&key) {
                    Some(there) => lay(there, value),
                    None => drop(below.insert(key, value)),
                }
            }
        }
        (below, over) => *below = over,
    }
}

/// Routes end in `{*name}` where the rest of the path may hold slashes; the contract knows no such thing.
fn unstarred(paths: Value) -> Value {
    let Value::Mapping(paths) = paths else { return paths };
    paths
        .into_iter()
        .map(|(path, item)| (path.as_str().map_or(path.clone(), |path| path.replace("{*", "{").into()), item))
        .collect::<Mapping>()
        .into()
}

pub(super) fn each_operation(paths: &mut Value, mut settle: impl FnMut(&str, &str, &mut Mapping)) {
    for (path, item) in paths.as_mapping_mut().into_iter().flatten() {
        for method in METHODS {
            if let Some(operation) = item.get_mut(method).and_then(Value::as_mapping_mut) {
                settle(path.as_str().unwrap_or_default(), method, operation);
            }
        }
    }
}

fn settle_operation(path: &str, method: &str, operation: &mut Mapping, refusals: &mut Refusals) {
    let scopes = scopes(operation);
    let is_open =
        operation.get("security").and_then(Value::as_sequence).is_some_and(|all| all.iter().all(|one| one.get("bearer").is_none()));
    if is_open {
        operation.insert("security".into(), Value::Sequence(vec![]));
    }
    let needs = match scopes.as_slice() {
        [] if is_open => "",
        [] => "Any valid token will do.",
        [one] if one.contains(AND) => &format!("Needs the scopes `{one}`."),
        [one] => &format!("Needs the scope `{one}`."),
        [first, others @ ..] => &format!("Needs the scope `{first}`, or `{}`.", others.join("` or `")),
    };
    let said = operation.get("description").and_then(Value::as_str).unwrap_or_default().to_owned();
    let description = [said.trim(), needs].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n\n");
    if !description.is_empty() {
        operation.insert("description".into(), description.into());
    }
    if path == BARE {
        let answers = operation.get_mut("responses").and_then(Value::as_mapping_mut).expect("every operation has answers");
        refusals.settle(answers, Around::Nothing);
        return;
    }
    let around = if method == "post" { Around::Keys } else { Around::All };
    let has_parameters = operation.contains_key("parameters");
    let has_body = method == "post" || operation.contains_key("requestBody");
    if let Some(body) = operation.get_mut("requestBody").and_then(Value::as_mapping_mut) {
        // One that may be left out is not null for that. What is kept as it comes may be nothing, which need not be sent.
        let is_bytes = |kinds: &Mapping| kinds.keys().all(|kind| kind == "application/octet-stream");
        let mut is_needed = !body["content"].as_mapping().is_some_and(is_bytes);
        for (_, content) in body.get_mut("content").and_then(Value::as_mapping_mut).into_iter().flatten() {
            if let Some(one) = content.get("schema").and_then(nullable).cloned() {
                content["schema"] = one;
                is_needed = false;
            }
        }
        body.insert("required".into(), is_needed.into());
    }
    for parameter in operation.get_mut("parameters").and_then(Value::as_sequence_mut).into_iter().flatten() {
        settle_parameter(parameter);
    }
    if method == "post" {
        let key = reference("parameters", "IdempotencyKey");
        match operation.get_mut("parameters").and_then(Value::as_sequence_mut) {
            Some(parameters) => parameters.push(key),
            None => drop(operation.insert("parameters".into(), Value::Sequence(vec![key]))),
        }
    }
    let answers = operation.get_mut("responses").and_then(Value::as_mapping_mut).expect("every operation has answers");
    for (_, answer) in answers.iter_mut() {
        if answer.get("$ref").is_none() {
            settle_answer(answer.as_mapping_mut().expect("an answer is a mapping"), around);
        }
    }
    promise::<refusal::Internal>(answers);
    if !is_open {
        promise::<refusal::Unauthenticated>(answers);
        promise::<refusal::Suspended>(answers);
        promise::<refusal::UnknownTenant>(answers);
        promise::<refusal::DatabaseUnavailable>(answers);
    }
    if !scopes.is_empty() {
        promise::<refusal::Forbidden>(answers);
    }
    if pass::may_lack_node(method, path) {
        promise::<refusal::NodeUnavailable>(answers);
    }
    if has_body {
        promise::<refusal::SlowBody>(answers);
        promise::<refusal::PayloadTooLarge>(answers);
    }
    if has_body || has_parameters {
        promise::<refusal::InvalidRequest>(answers);
    }
    if method == "post" {
        promise::<refusal::KeyReused>(answers);
        promise::<refusal::KeyInUse>(answers);
    }
    refusals.settle(answers, around);
}

/// Has an operation refuse this, too.
fn promise<R: IntoResponses>(answers: &mut Mapping) {
    for name in R::responses().into_keys() {
        let value = reference("responses", &name);
        answers.insert(name.into(), value);
    }
}

/// The headers of an answer that is no refusal, and the form of its events.
fn settle_answer(answer: &mut Mapping, around: Around) {
    let mut headers = headers_around(around);
    let mut own = answer.remove("headers").and_then(|own| own.as_mapping().cloned()).unwrap_or_default();
    // Where it is told at all it always comes.
    for name in ["Location", "Content-Range"] {
        if let Some(header) = own.get_mut(name).and_then(Value::as_mapping_mut) {
            header.insert("required".into(), true.into());
        }
    }
    headers.extend(own);
    if let Some(events) = answer.get_mut("content").and_then(|content| content.get_mut("text/event-stream")) {
        *events = yaml_serde::from_str(EVENTS).expect("it is YAML: every test of the contract reads it");
        headers.insert("X-Accel-Buffering".into(), reference("headers", "AccelBuffering"));
    }
    answer.insert("headers".into(), headers.into());
}

/// The alternatives; where one is several scopes, all of them together.
fn scopes(operation: &Mapping) -> Vec<String> {
    let requirements = operation.get("security").and_then(Value::as_sequence).into_iter().flatten();
    let named = requirements.filter_map(|requirement| requirement.get("bearer")?.as_sequence());
    let together = named.map(|scopes| scopes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(AND));
    together.filter(|scopes| !scopes.is_empty()).collect()
}

/// In a path or a query nothing is null: what is not there is absent. Words of JSON Schema belong into the schema.
fn settle_parameter(parameter: &mut Value) {
    let Some(parameter) = parameter.as_mapping_mut() else { return };
    let moved: Vec<_> = ["x-schema", "x-bound"].into_iter().filter_map(|key| Some((key, parameter.remove(key)?))).collect();
    let Some(schema) = parameter.get_mut("schema") else { return };
    if let Some(types) = schema.get("type").and_then(Value::as_sequence) {
        let rest: Vec<_> = types.iter().filter(|one| *one != "null").cloned().collect();
        if let [one] = rest.as_slice() {
            schema["type"] = one.clone();
        }
    }
    if let Some(one) = nullable(schema).cloned() {
        *schema = one;
    }
    if let Some(schema) = schema.as_mapping_mut() {
        schema.extend(moved.into_iter().map(|(key, value)| (key.into(), value)));
    }
}

/// What this may be, if that is one thing or null.
fn nullable(schema: &Value) -> Option<&Value> {
    let [first, second] = schema.get("oneOf")?.as_sequence()?.as_slice() else { return None };
    if first["type"] == "null" { Some(second) } else { (second["type"] == "null").then_some(first) }
}

fn each_value(value: &mut Value, settle: &mut impl FnMut(&mut Mapping)) {
    match value {
        Value::Mapping(mapping) => {
            settle(mapping);
            mapping.iter_mut().for_each(|(_, member)| each_value(member, settle));
        }
        Value::Sequence(all) => all.iter_mut().for_each(|one| each_value(one, settle)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Tagged(_) => {}
    }
}

fn settle_extensions(schema: &mut Mapping) {
    // The width of a number here is no promise.
    if schema.get("format").is_some_and(|format| ["int32", "int64", "double", "float"].iter().any(|width| format == *width)) {
        schema.remove("format");
    }
    if let Some(bound) = schema.remove("x-bound") {
        for (key, from) in [("minimum", "min"), ("maximum", "max"), ("default", "default")] {
            if let Some(value) = bound.get(from).filter(|value| !value.is_null()) {
                schema.insert(key.into(), value.clone());
            }
        }
    }
    if let Some(words) = schema.remove("x-schema") {
        let mut below = Value::Mapping(std::mem::take(schema));
        lay(&mut below, words);
        if let Value::Mapping(laid) = below {
            *schema = laid;
        }
    }
}

/// Makes one object of several that are all of it, as `serde(flatten)` does.
fn flatten(object: &mut Mapping, all: &Value) {
    let Some(parts) = object.get("allOf").and_then(Value::as_sequence).cloned() else { return };
    // What is only a condition on the members stays one.
    let has_members = |part: &Value| {
        let part = target(nullable(part).unwrap_or(part), all);
        part.get("properties").is_some() || part.get("allOf").is_some()
    };
    if !parts.iter().all(has_members) {
        return;
    }
    object.remove("allOf");
    object.entry("type".into()).or_insert_with(|| "object".into());
    for part in parts {
        let (part, is_sure) = nullable(&part).map_or((&part, true), |one| (one, false));
        let Some(mut part) = target(part, all).as_mapping().cloned() else { continue };
        flatten(&mut part, all);
        if let Some(properties) = part.remove("properties") {
            let own = object.entry("properties".into()).or_insert_with(|| Value::Mapping(Mapping::new()));
            lay(own, properties);
        }
        let required = part.remove("required").filter(|_| is_sure);
        if let Some(Value::Sequence(required)) = required {
            let own = object.entry("required".into()).or_insert_with(|| Value::Sequence(vec![]));
            if let Value::Sequence(own) = own {
                own.extend(required);
            }
        }
    }
}

fn target<'a>(schema: &'a Value, all: &'a Value) -> &'a Value {
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|place| place.strip_prefix("#/components/schemas/"));
    name.and_then(|name| all.get(name)).unwrap_or(schema)
}

/// Limits in force are within the bounds of those that can be asked for.
fn share_bounds(schemas: &mut Mapping) {
    let Some(asked) = schemas.get("RequestedLimits").cloned() else { return };
    let in_force = schemas.get_mut("Limits").and_then(|limits| limits.get_mut("properties")).and_then(Value::as_mapping_mut);
    for (name, property) in in_force.into_iter().flatten() {
        for key in ["minimum", "maximum"] {
            if let (Some(value), Some(property)) = (asked["properties"][name.clone()].get(key), property.as_mapping_mut()) {
                property.insert(key.into(), value.clone());
            }
        }
    }
}

/// What a page holds stands there by its name.
fn name_items(schemas: &mut Mapping) {
    for (name, page) in schemas.iter_mut() {
        if let Some(of) = name.as_str().and_then(|name| name.strip_prefix("Page_")) {
            page["properties"]["items"]["items"] = reference("schemas", of);
        }
    }
}

/// Gives an alternative that is an object with a title a name of its own: that of the whole, and its title. Generators of clients make types of what has a name.
fn name_alternatives(schemas: &mut Mapping) {
    let mut named = Vec::new();
    for (name, schema) in schemas.iter_mut() {
        for one in schema.get_mut("oneOf").and_then(Value::as_sequence_mut).into_iter().flatten() {
            let Some(object) = one.as_mapping_mut().filter(|one| one.get("type").is_some_and(|kind| kind == "object")) else { continue };
            let Some(title) = object.remove("title") else { continue };
            let own = format!("{}{}", name.as_str().unwrap_or_default(), title.as_str().unwrap_or_default().replace(' ', ""));
            named.push((own.clone().into(), std::mem::replace(one, reference("schemas", &own))));
        }
    }
    schemas.extend::<Vec<(Value, Value)>>(named);
}

/// Takes away schemas that nothing names; says whether there were any.
fn prune(document: &mut Value) -> bool {
    let mut named = BTreeSet::new();
    each_value(document, &mut |mapping| named.extend(mapping.get("$ref").and_then(Value::as_str).map(ToOwned::to_owned)));
    let schemas = document["components"].get_mut("schemas").and_then(Value::as_mapping_mut).expect("there are schemas");
    let before = schemas.len();
    schemas.retain(|name, _| name.as_str().is_some_and(|name| named.contains(&format!("#/components/schemas/{name}"))));
    schemas.len() < before
}

/// Nothing but what is named.
fn close(schema: &mut Mapping) {
    let is_object = schema.get("type").is_some_and(|kind| kind == "object") && schema.contains_key("properties");
    if is_object && !schema.contains_key("additionalProperties") {
        schema.insert("additionalProperties".into(), false.into());
    }
}

fn sort_answers(document: &mut Value) {
    each_operation(document.get_mut("paths").expect("there are paths"), |_, _, operation| {
        let Some(answers) = operation.get_mut("responses").and_then(Value::as_mapping_mut) else { return };
        let mut sorted: Vec<_> = std::mem::take(answers).into_iter().collect();
        sorted.sort_by(|(a, _), (b, _)| a.as_str().cmp(&b.as_str()));
        answers.extend(sorted);
    });
}

/// A page of tenants is a `TenantPage`; utoipa names it `Page_Tenant`.
fn with_pages_named(document: &Value) -> Value {
    match document {
        Value::Mapping(mapping) => {
            mapping.iter().map(|(key, value)| (with_pages_named(key), with_pages_named(value))).collect::<Mapping>().into()
        }
        Value::Sequence(all) => Value::Sequence(all.iter().map(with_pages_named).collect()),
        Value::String(text) => {
            let (place, name) = text.rsplit_once('/').map_or(("", text.as_str()), |(place, name)| (place, name));
            match name.strip_prefix("Page_") {
                Some(of) if place.is_empty() => format!("{of}Page").into(),
                Some(of) => format!("{place}/{of}Page").into(),
                None => text.clone().into(),
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Tagged(_) => document.clone(),
    }
}

pub(super) fn reference(section: &str, name: &str) -> Value {
    Mapping::from_iter([("$ref".into(), format!("#/components/{section}/{name}").into())]).into()
}
