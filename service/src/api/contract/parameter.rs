//! Parameters that many operations have. Named in `params(…)` of an operation; their values are read by the handler.

use serde_json::{Value, json};
use utoipa::{
    IntoParams,
    openapi::{
        Required,
        path::{Parameter, ParameterBuilder, ParameterIn},
    },
};

use super::super::files::ID_MAX;
use crate::sandbox::{Bound, INTERVAL_MS, LIST_LIMIT, RUNS_MAX, TAIL_LINES, words};

macro_rules! parameters {
    ($($(#[doc = $doc:literal])+ $name:ident = [$($parameter:expr),+];)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug)]
        pub(in crate::api) enum $name {}

        impl IntoParams for $name {
            fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
                vec![$($parameter),+]
            }
        }
    )+};
}

parameters! {
    /// The id of a run, or of a sandbox where a name will not do.
    Id = [path("id", "What is no id names nothing, and is not found.")];
    /// The ids of many runs.
    RunIds = [needed(
        "ids",
        "Whose: the parameter once for each, or with commas; none is there twice. What is no run of the tenant's is not found, in its place.",
        json!({ "type": "array", "items": { "type": "string", "format": "uuid" }, "minItems": 1, "maxItems": RUNS_MAX, "uniqueItems": true })
    )];
    /// The ids of a sandbox and of one of its execs.
    Exec = [
        path("id", "Its id, or its name. What is neither names nothing, and is not found."),
        path("eid", "What is no id names nothing, and is not found.")
    ];
    /// What of a log is wanted.
    LogParameters = [
        query("follow", "Whether to stay until the end, or to stop at what is there.", json!({ "type": "boolean", "default": true })),
        query("from", "The sequence number to begin at.", json!({ "type": "integer", "minimum": 0, "maximum": u64::MAX, "default": 0 })),
        query("tail", "Of what is there, only so many lines of both streams together, the last; all that is written later follows them.", bounded(&TAIL_LINES)),
        query("since", "Only what was written at this time or later.", json!({ "type": "string", "format": "date-time" })),
        query("stream", "Only this stream.", json!({ "type": "string", "enum": ["stdout", "stderr"] })),
        query("timestamps", "In plain text, the time before each line. All other forms have it anyway.", json!({ "type": "boolean", "default": false }))
    ];
    /// What a reader of events has seen last.
    LastEventId = [header("Last-Event-ID", "The id of the last event that was seen: the log goes on behind it.", json!({ "type": "string", "pattern": "^(end|[0-9]{1,19})$" }))];
    /// How samples are taken.
    StatsParameters = [
        query("stream", "Whether samples go on coming. Without it, where a WebSocket is asked for, or `Accept` names a form of streams.", json!({ "type": "boolean" })),
        query("interval_ms", "Between two samples of a stream.", bounded(&INTERVAL_MS))
    ];
    /// What is watched.
    WatchParameters = [
        query("path", "The folder or file, from the root on.", json!({ "type": "string", "pattern": INNER_PATH, "default": "/" })),
        query("recursive", "Of a folder: with all folders below it, also those that are yet to come.", json!({ "type": "boolean", "default": false }))
    ];
    /// The id of a sandbox, or its name.
    Named = [path("id", "Its id, or its name. What is neither names nothing, and is not found.")];
    /// A sandbox, and a file or folder in it.
    File = [
        path("id", "What is no id names nothing, and is not found."),
        named("path", "From the sandbox's root on, its bytes percent-encoded. It may hold slashes, and be empty, which is the root. Through no `..`.", "^[^\\u0000]+$")
    ];
    /// The name of a tenant.
    Tenant = [path("tenant", "What names no tenant is not found.")];
    /// The names of a tenant and of one of its principals.
    Principal = [path("tenant", "What names no tenant is not found."), named("principal", "The `sub` of its tokens.", "^[A-Za-z0-9._@:|+-]{1,128}$")];
    /// The id of a node.
    Node = [path("node", "What is no id names nothing, and is not found.")];
    /// The name of an image.
    Reference = [path("reference", "May hold slashes.")];
    /// Which images.
    ImageFilter = [
        query("name", "Only those whose reference begins so.", json!({ "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,255}$" })),
        query("shared", "Only those that are for all tenants, or only the others.", json!({ "type": "boolean" })),
        query(
            "label",
            "Only those whose builder gave them all of these labels, each as `key=value`, or as `key` for whatever value.",
            json!({ "type": "array", "items": { "type": "string", "pattern": "^[^=\\u0000]+(=[^\\u0000]*)?$" } })
        )
    ];
    /// A registry.
    Registry = [path("registry", "Its host as images are named by it, with its port if that is not the usual one.")];
    /// The name of a volume.
    Volume = [path("name", "What names no volume is not found.")];
    /// The name of a pool.
    Pool = [path("name", "What names no pool is not found.")];
    /// Which of the tenant's volumes.
    VolumeFilter = [query(
        "label",
        "Only those with all of these labels, each as `key=value`, or as `key` for whatever value.",
        json!({ "type": "array", "items": { "type": "string", "pattern": "^[A-Za-z0-9._/-]{1,63}(=[^\\u0000]{0,256})?$" } })
    )];
    /// Which page of a list.
    Page = [
        query("limit", "The most entries of the page.", bounded(&LIST_LIMIT)),
        query("cursor", "The `next_cursor` of the page before.", json!({ "type": "string" }))
    ];
    /// Which of the tenant's sandboxes, in which order.
    SandboxFilter = [
        query("order", "By creation.", json!({ "type": "string", "enum": ["newest_first", "oldest_first"], "default": "newest_first" })),
        query(
            "label",
            "Only those with all of these labels, each as `key=value`, or as `key` for whatever value.",
            json!({ "type": "array", "items": { "type": "string", "pattern": "^[A-Za-z0-9._/-]{1,63}(=[^\\u0000]{0,256})?$" } })
        ),
        query("name", "Only those whose name begins so.", json!({ "type": "string", "pattern": "^[A-Za-z0-9._-]{1,63}$" })),
        query("created_after", "Only those made after this.", at()),
        query("created_before", "Only those made before this.", at()),
        query("finished_after", "Only those that ended after this.", at()),
        query("finished_before", "Only those that ended before this.", at())
    ];
    /// Whose a new file or folder is to be, and what may be done with it.
    NewEntry = [
        query("mode", "Permission bits, octal. Absent: as what was there, or 0644, and 0755 of a folder.", json!({ "type": "string", "pattern": "^[0-7]{3,4}$" })),
        query("uid", "Its owner. Absent: as what was there, or as that of `gid`.", json!({ "type": "integer", "minimum": 0, "maximum": ID_MAX })),
        query("gid", "Its group. Absent: that of `uid`.", json!({ "type": "integer", "minimum": 0, "maximum": ID_MAX }))
    ];
    /// Which usage, and by what it is told apart.
    UsageParameters = [
        query("from", "A whole hour as in `2030-01-31T15:00:00Z`, or a day of UTC as in `2030-01-31`, at which it begins. Absent: 30 days before `to`.", hour()),
        query("to", "Likewise, before which it ends. Absent: with the present hour.", hour()),
        query(
            "group_by",
            "What lines are told apart by: `day` or `hour`, `principal`, `kind`, `tenant`, with commas. Absent: by nothing.",
            json!({ "type": "string", "pattern": "^((principal|kind|tenant),)*(hour|day|principal|kind|tenant)(,(principal|kind|tenant))*$" })
        )
    ];
    /// Which events.
    EventParameters = [
        query("kind", "Only of these kinds, as in `sandbox.ended` or `sandbox.*`.", json!({ "type": "array", "items": text() })),
        query("object", "Only of this object, as in `image/python:3`.", text()),
        query("sandbox", "Only of this sandbox or run.", json!({ "type": "string", "format": "uuid" })),
        query("principal", "Only what this principal did.", text())
    ];
    /// Which part of all events.
    EventStream = [
        query("limit", "Of a page: the most entries.", bounded(&LIST_LIMIT)),
        query(
            "cursor",
            "Of a page: the `next_cursor` of the one before. Of a stream: the `cursor` of an event or a heartbeat behind which it goes on, or `oldest`, or `now`, which may begin with what came a moment before; absent: now, with `follow=false` the oldest.",
            json!({ "type": "string" })
        ),
        query("follow", "Of a stream: whether it goes on with what comes.", json!({ "type": "boolean", "default": true })),
        header("Last-Event-ID", "Of a stream: goes before `cursor`. What browsers send when they open it again.", json!({ "type": "string" }))
    ];
    /// The id of a webhook.
    Webhook = [path("id", "What is no id names nothing, and is not found.")];
    /// The ids of a webhook and of one of its deliveries.
    Delivery = [path("id", "The webhook's."), path("delivery", "The delivery's.")];
    /// One tenant of all.
    OfTenant = [query("tenant", "Only this tenant's.", text())];
}

/// What Postgres can hold.
fn text() -> Value {
    json!({ "type": "string", "pattern": "^[^\\u0000]*$" })
}

/// What may stand in the place of a path inside a sandbox.
pub(in crate::api) const INNER_PATH: &str =
    "^/*(([^/.\\u0000][^/\\u0000]{0,60}|\\.[^/.\\u0000][^/\\u0000]{0,60}|\\.\\.[^/\\u0000]{1,60})(/+|$))*$";

/// An instant.
fn at() -> Value {
    json!({ "type": "string", "format": "date-time" })
}

fn hour() -> Value {
    json!({ "type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:00:00(Z|[+-][0-9]{2}:00))?$" })
}

/// A part of the path.
pub(in crate::api) fn path(name: &str, description: &str) -> Parameter {
    named(name, description, "^.+$")
}

/// A part of the path that has a form.
pub(in crate::api) fn named(name: &str, description: &str, pattern: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .description(Some(description))
        .schema(Some(words::schema(json!({ "type": "string", "pattern": pattern }))))
        .build()
}

/// A parameter of the query, which may be absent.
pub(in crate::api) fn query(name: &str, description: &str, schema: Value) -> Parameter {
    optional(ParameterIn::Query, name, description, schema)
}

/// A header, which may be absent.
pub(in crate::api) fn header(name: &str, description: &str, schema: Value) -> Parameter {
    optional(ParameterIn::Header, name, description, schema)
}

/// A parameter of the query that may not be absent.
fn needed(name: &str, description: &str, schema: Value) -> Parameter {
    let mut parameter = optional(ParameterIn::Query, name, description, schema);
    parameter.required = Required::True;
    parameter
}

fn optional(place: ParameterIn, name: &str, description: &str, schema: Value) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(words::schema(schema)))
        .build()
}

/// A whole number within its bound.
pub(in crate::api) fn bounded(bound: &Bound) -> Value {
    let mut schema = json!({ "type": "integer", "minimum": bound.min, "maximum": bound.max });
    if let Some(default) = bound.default {
        schema["default"] = default.into();
    }
    schema
}
