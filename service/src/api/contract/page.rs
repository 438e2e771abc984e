//! The contract as a page for people: static HTML without scripts, complete in itself, so that it can be read where there is no network but ours.

use std::fmt::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use sha2::{Digest as _, Sha256};
use yaml_serde::Value;

const STYLE: &str = include_str!("page.css");

/// The page, and what a browser may do with it.
#[derive(Debug)]
pub(in crate::api) struct Page {
    pub(in crate::api) html: String,
    /// `Content-Security-Policy`: this one style sheet, by its hash, and nothing else.
    pub(in crate::api) policy: String,
}

impl Page {
    /// The page of this document.
    pub(super) fn of(document: &Value) -> Self {
        let hash = BASE64.encode(Sha256::digest(STYLE));
        let policy = format!("default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
        Self { html: html(document), policy }
    }
}

fn html(document: &Value) -> String {
    let title = text(&document["info"]["title"]);
    let mut page = format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>{title}: the API</title>\
         <style>{STYLE}</style></head><body><nav><h1>{title} {}</h1><ul>",
        text(&document["info"]["version"]),
    );
    let (mut contents, mut operations) = (String::new(), String::new());
    for tag in sequence(&document["tags"]) {
        let name = text(&tag["name"]);
        add(&mut contents, format_args!("<li><a href=\"#tag-{name}\">{name}</a><ul>"));
        add(&mut operations, format_args!("<h2 id=\"tag-{name}\">{name}</h2>{}", prose(&tag["description"])));
        for (path, method, operation) in
            all(document).filter(|(_, _, operation)| sequence(&operation["tags"]).any(|one| *one == tag["name"]))
        {
            let id = text(&operation["operationId"]);
            add(&mut contents, format_args!("<li><a href=\"#{id}\">{}</a></li>", text(&operation["summary"])));
            operations.push_str(&section(document, path, method, operation));
        }
        contents.push_str("</ul></li>");
    }
    let mut schemas = String::from("<h2 id=schemas>Schemas</h2>");
    contents.push_str("<li><a href=#schemas>Schemas</a><ul>");
    for (name, schema) in members(&document["components"]["schemas"]) {
        let name = escaped(name);
        add(&mut contents, format_args!("<li><a href=\"#schema-{name}\">{name}</a></li>"));
        add(&mut schemas, format_args!("<article id=\"schema-{name}\"><h3>{name}</h3>{}</article>", shape(schema)));
    }
    contents.push_str("</ul></li>");
    add(&mut page, format_args!("{contents}</ul></nav><main>{}", prose(&document["info"]["description"])));
    add(&mut page, format_args!("{}", prose(&document["components"]["securitySchemes"]["bearer"]["description"])));
    page.push_str("<p>For programs: <a href=\"/openapi.yaml\">/openapi.yaml</a> (OpenAPI 3.1).</p>");
    add(&mut page, format_args!("{operations}{schemas}</main></body></html>"));
    page
}

fn all(document: &Value) -> impl Iterator<Item = (&str, &str, &Value)> {
    let paths = members(&document["paths"]);
    paths.flat_map(|(path, item)| {
        members(item).filter(|(_, one)| one.get("operationId").is_some()).map(move |(method, one)| (path, method, one))
    })
}

/// One operation.
fn section(document: &Value, path: &str, method: &str, operation: &Value) -> String {
    let mut page = format!(
        "<article id=\"{}\"><h3>{}</h3><p class=route><b>{}</b> <code>{}</code></p>{}",
        text(&operation["operationId"]),
        text(&operation["summary"]),
        method.to_uppercase(),
        escaped(path),
        prose(&operation["description"]),
    );
    let parameters: Vec<_> = sequence(&operation["parameters"]).map(|one| resolved(document, one)).collect();
    if !parameters.is_empty() {
        page.push_str("<h4>Parameters</h4><table>");
        for parameter in parameters {
            let needed = if parameter["required"] == true { ", required" } else { "" };
            add(
                &mut page,
                format_args!(
                    "<tr><td><code>{}</code><td>{}{needed}<td>{}{}</tr>",
                    text(&parameter["name"]),
                    text(&parameter["in"]),
                    kind(&parameter["schema"]),
                    prose(&parameter["description"]),
                ),
            );
        }
        page.push_str("</table>");
    }
    if let Some(body) = operation.get("requestBody") {
        add(&mut page, format_args!("<h4>Body</h4>{}", prose(&body["description"])));
        content(&mut page, document, body);
    }
    page.push_str("<h4>Answers</h4><dl>");
    for (status, answer) in members(&operation["responses"]) {
        let answer = resolved(document, answer);
        add(&mut page, format_args!("<dt>{}</dt><dd>{}", escaped(status), prose(&answer["description"])));
        let headers: Vec<_> = members(&answer["headers"]).map(|(name, _)| format!("<code>{}</code>", escaped(name))).collect();
        if !headers.is_empty() {
            add(&mut page, format_args!("<p class=headers>{}</p>", headers.join(", ")));
        }
        content(&mut page, document, answer);
        page.push_str("</dd>");
    }
    page.push_str("</dl></article>");
    page
}

/// Media types with their schemas and examples.
fn content(page: &mut String, document: &Value, of: &Value) {
    for (media_type, content) in members(&of["content"]) {
        add(page, format_args!("<p><code>{}</code> {}</p>", escaped(media_type), content.get("schema").map(kind).unwrap_or_default()));
        let named = members(&content["examples"]).map(|(_, example)| resolved(document, example));
        let named = named.map(|example| (example.get("summary").map(text).unwrap_or_default(), &example["value"]));
        // Of refusals, which are the same everywhere, the description of each code says enough.
        let shown = content.get("example").map(|example| (String::new(), example)).into_iter().chain(named);
        for (summary, example) in shown.filter(|_| media_type != "application/problem+json") {
            let json = serde_json::to_string_pretty(example).unwrap_or_default();
            add(page, format_args!("<figure><figcaption>{summary}</figcaption><pre>{}</pre></figure>", escaped(&json)));
        }
    }
}

/// What a schema is, in full.
fn shape(schema: &Value) -> String {
    let mut page = prose(&schema["description"]);
    let required: Vec<_> = sequence(&schema["required"]).collect();
    if schema.get("properties").is_none() {
        add(&mut page, format_args!("<p>{}</p>", kind(schema)));
    } else {
        page.push_str("<table>");
        for (name, property) in members(&schema["properties"]) {
            let needed = if required.iter().any(|one| *one == name) { "always" } else { "" };
            add(
                &mut page,
                format_args!(
                    "<tr><td><code>{}</code><td>{needed}<td>{}{}</tr>",
                    escaped(name),
                    kind(property),
                    prose(&property["description"])
                ),
            );
        }
        page.push_str("</table>");
    }
    page
}

/// What a value may be, in a line.
fn kind(schema: &Value) -> String {
    if let Some(place) = schema.get("$ref").and_then(Value::as_str) {
        let name = escaped(place.rsplit('/').next().unwrap_or(place));
        return format!("<a href=\"#schema-{name}\">{name}</a>");
    }
    for choice in ["oneOf", "anyOf"] {
        if schema.get(choice).is_some() {
            return sequence(&schema[choice]).map(one_of).collect::<Vec<_>>().join(" or ");
        }
    }
    let mut words = match schema["type"].as_sequence() {
        Some(kinds) => kinds.iter().map(text).collect::<Vec<_>>().join(" or "),
        None => text(&schema["type"]),
    };
    if let Some(items) = schema.get("items") {
        add(&mut words, format_args!(" of {}", kind(items)));
    }
    if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_mapping()) {
        add(&mut words, format_args!(" of {}", kind(values)));
    }
    if schema.get("enum").is_some() {
        let values: Vec<_> = sequence(&schema["enum"]).map(|one| format!("<code>{}</code>", text(one))).collect();
        add(&mut words, format_args!(": {}", values.join(", ")));
    }
    const FACTS: [(&str, &str); 14] = [
        ("const", "always"),
        ("format", "as"),
        ("minimum", "from"),
        ("maximum", "to"),
        ("minLength", "at least, in characters,"),
        ("maxLength", "at most, in characters,"),
        ("minItems", "at least, in entries,"),
        ("maxItems", "at most, in entries,"),
        ("maxProperties", "at most, in members,"),
        ("pattern", "like"),
        ("contentEncoding", "as"),
        ("uniqueItems", "each once:"),
        ("default", "default"),
        ("title", "called"),
    ];
    for (key, word) in FACTS {
        if let Some(value) = schema.get(key) {
            add(&mut words, format_args!(", {word} <code>{}</code>", text(value)));
        }
    }
    words
}

/// One of several things that a value may be; an object is told with its members.
fn one_of(schema: &Value) -> String {
    if schema.get("properties").is_some() { shape(schema) } else { kind(schema) }
}

fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let Some(place) = value.get("$ref").and_then(Value::as_str) else { return value };
    place.trim_start_matches("#/").split('/').try_fold(document, |value, key| value.get(key)).unwrap_or(value)
}

fn sequence(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_sequence().into_iter().flatten()
}

fn members(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_mapping().into_iter().flatten().filter_map(|(key, value)| Some((key.as_str()?, value)))
}

/// Paragraphs, with what stands between backquotes as code.
fn prose(value: &Value) -> String {
    let Some(said) = value.as_str() else { return String::new() };
    let mut page = String::new();
    for paragraph in said.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
        page.push_str("<p>");
        for (at, part) in paragraph.split('`').enumerate() {
            let part = escaped(part);
            if at % 2 == 1 { add(&mut page, format_args!("<code>{part}</code>")) } else { page.push_str(&part) }
        }
        page.push_str("</p>");
    }
    page
}

/// A scalar for HTML.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => escaped(text),
        Value::Null => "null".to_owned(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Sequence(_) | Value::Mapping(_) | Value::Tagged(_)) => {
            escaped(&serde_json::to_string(other).unwrap_or_default())
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn add(page: &mut String, arguments: std::fmt::Arguments<'_>) {
    page.write_fmt(arguments).expect("a string takes all that is written to it");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_every_operation_and_schema_and_loads_nothing() {
        let document = &*super::super::DOCUMENT;
        let page = Page::of(document);
        for (_, _, operation) in all(document) {
            assert!(page.html.contains(&format!("<article id=\"{}\">", text(&operation["operationId"]))), "{operation:?}");
        }
        for (name, _) in members(&document["components"]["schemas"]) {
            assert!(page.html.contains(&format!("<article id=\"schema-{name}\">")), "{name}");
        }
        assert!(!page.html.contains("<script") && !page.html.contains("src=") && !page.html.contains("href=\"http"));
    }

    #[test]
    fn what_is_told_is_no_markup() {
        assert_eq!(prose(&"a <b> `c<d>`".into()), "<p>a &lt;b&gt; <code>c&lt;d&gt;</code></p>");
    }
}
