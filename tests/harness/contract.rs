//! Holds answers against `openapi.yaml`: every status, header, body and code of a refusal that the service sends must be promised there.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, LazyLock, Mutex},
};

use anyhow::{Context, Result, bail, ensure};
use jsonschema::Validator;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
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

/// What HTTP itself has of headers, and CORS: of these the contract says nothing.
const OF_HTTP: [&str; 9] =
    ["allow", "connection", "content-length", "content-type", "date", "keep-alive", "transfer-encoding", "upgrade", "vary"];
const PROBLEM: &str = "application/problem+json";

/// Whether the answer to `method path` is one that the contract promises.
///
/// # Errors
/// The text says what is not promised: the status, the media type, the header, the code, or the place in the body.
pub fn check(method: &str, path: &str, status: u16, headers: &HeaderMap, body: &str) -> Result<()> {
    let path = path.split('?').next().unwrap_or(path);
    let content_type = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
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
    let response =
        document().pointer(&pointer).with_context(|| format!("status {status} is not promised for {method} {}", operation.template))?;
    let place = response["$ref"].as_str().map_or_else(|| format!("#{pointer}"), ToOwned::to_owned);
    let response = resolved(response)?;
    check_headers(response, &place, headers).with_context(|| format!("{method} {path}: {status}"))?;
    let Some(content) = response.get("content") else {
        ensure!(body.is_empty(), "{method} {path}: {status} is promised without a body, but has {} bytes", body.len());
        return Ok(());
    };
    ensure!(content.get(media_type).is_some(), "{method} {path}: {status} came as `{media_type}`, which is not promised");
    let schema = format!("{place}/content/{}/schema", escape(media_type));
    let checked = match media_type {
        "application/x-ndjson" => body.lines().try_for_each(|line| validate(&schema, line)),
        PROBLEM => validate(&schema, body).and_then(|()| check_code(response, status, body)),
        _ if media_type.ends_with("json") => validate(&schema, body),
        _ => Ok(()),
    };
    checked.with_context(|| format!("{method} {path}: {status}"))
}

/// Whether each header is one that the answer tells of, and none is missing of those that always come.
fn check_headers(response: &'static Value, place: &str, headers: &HeaderMap) -> Result<()> {
    let described = response["headers"].as_object();
    let described = described.into_iter().flatten().map(|(name, header)| Ok((name.to_lowercase(), name, resolved(header)?)));
    let described: Vec<_> = described.collect::<Result<_>>()?;
    for (name, value) in headers {
        if OF_HTTP.contains(&name.as_str()) || name.as_str().starts_with("access-control-") {
            continue;
        }
        let (_, shown, header) =
            described.iter().find(|(lower, ..)| lower == name.as_str()).with_context(|| format!("the header {name} is not promised"))?;
        let text = value.to_str().with_context(|| format!("{name} is no text"))?;
        let is_number = header["schema"]["type"] == "integer";
        let value = if is_number { text.parse::<u64>().map_or_else(|_| json!(text), |number| json!(number)) } else { json!(text) };
        let reference = response["headers"][shown.as_str()]["$ref"].as_str();
        let at = reference.map_or_else(|| format!("{place}/headers/{}", escape(shown)), ToOwned::to_owned);
        validate_value(&format!("{at}/schema"), &value).with_context(|| format!("the header {name}"))?;
    }
    for (lower, shown, header) in described {
        ensure!(header["required"] != true || headers.contains_key(&lower), "the header {shown} is missing");
    }
    Ok(())
}

/// Whether a refusal's code is one of those that its operation tells of for this status.
fn check_code(response: &'static Value, status: u16, body: &str) -> Result<()> {
    let problem: Value = serde_json::from_str(body)?;
    ensure!(problem["status"] == status, "the problem is of another status: {problem:#}");
    let codes = codes(response)?;
    ensure!(codes.iter().any(|code| problem["code"] == *code), "the code {} is none of {codes:?}", problem["code"]);
    Ok(())
}

/// The codes that an answer tells of, each by an example.
///
/// # Errors
/// An example leads nowhere.
pub fn codes(response: &'static Value) -> Result<Vec<&'static str>> {
    let examples = response["content"][PROBLEM]["examples"].as_object().into_iter().flatten();
    examples.map(|(name, example)| resolved(example)?["value"]["code"].as_str().with_context(|| format!("{name} has no code"))).collect()
}

/// What stands there, or where it leads.
///
/// # Errors
/// It leads nowhere.
pub fn resolved(value: &'static Value) -> Result<&'static Value> {
    let Some(reference) = value["$ref"].as_str() else { return Ok(value) };
    document().pointer(reference.trim_start_matches('#')).with_context(|| format!("{reference} leads nowhere"))
}

/// The headers of an answer that was read from a socket, up to the empty line behind them.
///
/// # Errors
/// A line is no header.
pub fn headers(head: &str) -> Result<HeaderMap> {
    let lines = head.lines().skip(1).take_while(|line| !line.is_empty());
    let pairs = lines.map(|line| {
        let (name, value) = line.split_once(':').with_context(|| format!("{line:?} is no header"))?;
        Ok((HeaderName::try_from(name)?, HeaderValue::try_from(value.trim())?))
    });
    pairs.collect()
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
