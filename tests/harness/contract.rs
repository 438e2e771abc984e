//! Holds answers against `openapi.yaml`: every status and every body that the service sends must be promised there.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, LazyLock, Mutex},
};

use anyhow::{Context, Result, bail, ensure};
use jsonschema::Validator;
use serde_json::{Value, json};

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi.yaml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
});

/// The whole document.
#[must_use]
pub fn document() -> &'static Value {
    &DOCUMENT
}

/// One operation of the contract.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Upper case.
    pub method: String,
    /// As in the document: `/v1/runs/{id}`.
    pub template: String,
}

impl Operation {
    /// What the document says of it.
    #[must_use]
    pub fn definition(&self) -> &'static Value {
        &document()["paths"][&self.template][self.method.to_lowercase()]
    }

    /// The scopes that a token may need; empty if any valid token will do. `None`: it needs no token.
    #[must_use]
    pub fn scopes(&self) -> Option<Vec<&'static str>> {
        let requirements = self.definition().get("security").unwrap_or(&document()["security"]).as_array()?;
        let names = |requirement: &'static Value| requirement["bearer"].as_array().into_iter().flatten().filter_map(Value::as_str);
        (!requirements.is_empty()).then(|| requirements.iter().flat_map(names).collect())
    }

    /// The scopes of which a token needs no more: all that the first of its alternatives names.
    #[must_use]
    pub fn enough(&self) -> Vec<&'static str> {
        let requirements = self.definition().get("security").unwrap_or(&document()["security"]);
        requirements[0]["bearer"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
    }
}

/// Every operation of the contract.
#[must_use]
pub fn operations() -> Vec<Operation> {
    let paths = document()["paths"].as_object().expect("openapi.yaml has paths");
    let mut all = Vec::new();
    for (template, item) in paths {
        for method in ["get", "put", "post", "delete", "patch", "head"] {
            if item.get(method).is_some() {
                all.push(Operation { method: method.to_uppercase(), template: template.clone() });
            }
        }
    }
    all
}

/// Whether the answer to `method path` is one that the contract promises.
///
/// # Errors
/// The text says what is not promised: the status, the media type, or the place in the body.
pub fn check(method: &str, path: &str, status: u16, content_type: &str, body: &str) -> Result<()> {
    let path = path.split('?').next().unwrap_or(path);
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    let Some(operation) = find(method, path) else {
        // Not in the contract: what may be said then is that there is no such thing.
        ensure!(matches!(status, 404 | 405 | 401 | 413), "{method} {path} is not in the contract and answered {status}");
        return if method == "HEAD" { Ok(()) } else { validate("#/components/schemas/Problem", body) };
    };
    // The one answer that any request may get: its head was not read to the end.
    if status == 431 {
        return validate("#/components/schemas/Problem", body);
    }
    let pointer = format!("/paths/{}/{}/responses/{status}", escape(&operation.template), method.to_lowercase());
    let mut response =
        document().pointer(&pointer).with_context(|| format!("status {status} is not promised for {method} {}", operation.template))?;
    let mut place = format!("#{pointer}");
    if let Some(reference) = response["$ref"].as_str() {
        place = reference.to_owned();
        response = document().pointer(reference.trim_start_matches('#')).with_context(|| format!("{reference} leads nowhere"))?;
    }
    let Some(content) = response.get("content") else {
        ensure!(body.is_empty(), "{method} {path}: {status} is promised without a body, but has {} bytes", body.len());
        return Ok(());
    };
    ensure!(content.get(media_type).is_some(), "{method} {path}: {status} came as `{media_type}`, which is not promised");
    let schema = format!("{place}/content/{}/schema", escape(media_type));
    let checked = match media_type {
        "application/x-ndjson" => body.lines().try_for_each(|line| validate(&schema, line)),
        _ if media_type.ends_with("json") => validate(&schema, body),
        _ => Ok(()),
    };
    checked.with_context(|| format!("{method} {path}: {status}"))
}

fn find(method: &str, path: &str) -> Option<Operation> {
    let fits = |template: &str| {
        let (want, have): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
        let same = |(w, h): (&&str, &&str)| w == h || (w.starts_with('{') && !h.is_empty());
        // The last of these may hold slashes, and that of a file may be empty.
        let rest = ["{path}", "{reference}"].contains(want.last().unwrap_or(&""));
        match want.len().checked_sub(1) {
            Some(last) if rest => have.len() >= last && want.iter().take(last).zip(&have).all(same),
            Some(_) | None => want.len() == have.len() && want.iter().zip(&have).all(same),
        }
    };
    let mut fitting: Vec<_> = operations().into_iter().filter(|o| o.method == method && fits(&o.template)).collect();
    // The one that says most of the path.
    fitting.sort_by_key(|o| (o.template.ends_with("{path}") || o.template.ends_with("{reference}"), o.template.matches('{').count()));
    fitting.into_iter().next()
}

/// Every example of a request, with the place of the schema that it is to keep.
#[must_use]
pub fn examples() -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for operation in operations() {
        let (template, method) = (escape(&operation.template), operation.method.to_lowercase());
        for (media_type, content) in operation.definition()["requestBody"]["content"].as_object().into_iter().flatten() {
            let place = format!("#/paths/{template}/{method}/requestBody/content/{}/schema", escape(media_type));
            let named = content["examples"].as_object().into_iter().flatten().map(|(_, example)| &example["value"]);
            all.extend(content.get("example").into_iter().chain(named).map(|example| (place.clone(), example.clone())));
        }
    }
    all
}

/// Whether an example is what its schema permits.
///
/// # Errors
/// As [`check`].
pub fn check_example(schema: &str, example: &Value) -> Result<()> {
    validate_value(schema, example)
}

/// Whether a frame of a log stream is one that the contract promises.
///
/// # Errors
/// As [`check`].
pub fn check_frame(frame: &Value) -> Result<()> {
    validate_value("#/components/schemas/LogFrame", frame)
}

fn validate(schema: &str, body: &str) -> Result<()> {
    validate_value(schema, &serde_json::from_str(body).with_context(|| format!("not JSON: {body:?}"))?)
}

fn validate_value(schema: &str, body: &Value) -> Result<()> {
    let validator = validator(schema)?;
    let faults: Vec<_> = validator.iter_errors(body).map(|e| format!("{} at `{}`", e, e.instance_path())).collect();
    if !faults.is_empty() {
        bail!("breaks {schema}: {}\n{body:#}", faults.join("; "));
    }
    Ok(())
}

/// The schema at a place in the document, made ready once.
fn validator(schema: &str) -> Result<Arc<Validator>> {
    static READY: LazyLock<Mutex<HashMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);
    let mut ready = READY.lock().map_err(|_| anyhow::anyhow!("another test panicked here"))?;
    if let Some(validator) = ready.get(schema) {
        return Ok(validator.clone());
    }
    // The document itself is the schema, so that every `$ref` in it finds its target; only `$ref` at the top is looked at.
    let mut root = document().clone();
    root["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    // Braces of path templates may not stand in a URI reference as they are (RFC 3986).
    root["$ref"] = json!(schema.replace('{', "%7B").replace('}', "%7D"));
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(&root)
        .map_err(|e| anyhow::anyhow!("the schema at {schema} is not usable: {e}"))?;
    let validator = Arc::new(validator);
    ready.insert(schema.to_owned(), validator.clone());
    Ok(validator)
}

/// A key as a part of a JSON pointer that stands in a URI fragment (RFC 6901).
fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
