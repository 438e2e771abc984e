//! How words and names stand in the API's contract whose Rust types are another crate's, or plain text.
//!
//! Nothing here is ever made: each type stands in a `#[schema(value_type = …)]` for the one that is.

use sandbox_core::{
    fence::Fence,
    protocol::{self, Limit},
};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, extensions::Extensions, schema::SchemaType},
};

use super::request::{ARGS_MAX, ENV_MAX, LABEL_VALUE_BYTES_MAX, LABELS_MAX};

/// A schema by its JSON, which the contract takes over word for word.
pub fn schema(json: Value) -> RefOr<Schema> {
    let extensions = Extensions::from_iter([("x-schema", json)]);
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).extensions(Some(extensions)).into()
}

/// Each of these values as JSON has it.
fn each<T: Serialize>(values: &[T]) -> Value {
    json!(values)
}

macro_rules! described {
    ($($(#[doc = $doc:literal])+ $name:ident = $schema:expr;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug)]
        pub enum $name {}

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let mut described = $schema;
                described["description"] = Value::from(concat!($($doc),+).trim());
                schema(described)
            }
        }

        impl ToSchema for $name {}
    )+};
}

described! {
    /// Name of an image, the tenant's own or a shared one.
    Reference = json!({ "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,255}$" });
    /// What an image is, whatever it is called.
    Digest = json!({ "type": "string", "pattern": "^sha256:[0-9a-f]{64}$" });
    /// Program and arguments, in place of the image's entry point and command. With `env` and `entrypoint` at most 64 KiB.
    Command = json!({
        "type": "array",
        "minItems": 1,
        "maxItems": ARGS_MAX,
        "prefixItems": [{ "type": "string", "minLength": 1, "pattern": "^[^\\u0000]*$" }],
        "items": { "type": "string", "pattern": "^[^\\u0000]*$" },
    });
    /// In place of the image's entry point; an empty list: none. With `env` and `command` at most 64 KiB.
    Entrypoint = json!({
        "type": "array",
        "maxItems": ARGS_MAX,
        "prefixItems": [{ "type": "string", "minLength": 1, "pattern": "^[^\\u0000]*$" }],
        "items": { "type": "string", "pattern": "^[^\\u0000]*$" },
    });
    /// What is to become of labels: null takes one out.
    LabelChanges = json!({
        "type": "object",
        "maxProperties": LABELS_MAX,
        "propertyNames": { "type": "string", "pattern": "^[A-Za-z0-9._/-]{1,63}$" },
        "additionalProperties": { "type": ["string", "null"], "maxLength": LABEL_VALUE_BYTES_MAX, "pattern": "^[^\\u0000]*$" },
    });
    /// A signal by its name, as in `SIGTERM`, `TERM` or `SIGRTMIN+1`, or by its number.
    SignalGiven = json!({
        "oneOf": [
            { "type": "integer", "minimum": 1, "maximum": 64 },
            { "type": "string", "pattern": super::signal::pattern() },
        ],
    });
    /// The size of a terminal, in characters.
    TerminalSize = json!({
        "type": "object",
        "required": ["rows", "columns"],
        "properties": { "rows": { "type": "integer", "minimum": 1, "maximum": 65535 }, "columns": { "type": "integer", "minimum": 1, "maximum": 65535 } },
    });
    /// What an entry of a folder is.
    EntryType = json!({ "type": "string", "enum": ["file", "folder", "link", "fifo", "socket", "device"] });
    /// How something differs from the image.
    ChangeType = json!({ "type": "string", "enum": ["added", "changed", "deleted"] });
    /// Variables over those of the image. With `command` and `entrypoint` at most 64 KiB.
    Env = json!({
        "type": "object",
        "maxProperties": ENV_MAX,
        "propertyNames": { "type": "string", "pattern": "^[^=\\u0000]+$" },
        "additionalProperties": { "type": "string", "pattern": "^[^\\u0000]*$" },
    });
    /// The caller's own marks.
    Labels = json!({
        "type": "object",
        "maxProperties": LABELS_MAX,
        "propertyNames": { "type": "string", "pattern": "^[A-Za-z0-9._/-]{1,63}$" },
        "additionalProperties": { "type": "string", "maxLength": LABEL_VALUE_BYTES_MAX, "pattern": "^[^\\u0000]*$" },
    });
    /// What stands between the program and the node's kernel. `container`: namespaces, filters and limits of that kernel. `gvisor`: a kernel of its own in user
    /// space, where the node has gVisor; a start then takes some 150 ms, and its memory counts against `memory_bytes`, which must be at least 64 MiB.
    Isolation = json!({
        "type": "string", "enum": each(&[protocol::Isolation::Container, protocol::Isolation::Gvisor]), "default": protocol::Isolation::Container,
    });
    /// What happens to a program that writes more than `output_bytes` to a stream: `truncate` keeps the first bytes and lets it go on, `kill` keeps them and ends
    /// it with `output_limit`, `discard` keeps nothing and counts.
    OutputPolicy = json!({
        "type": "string",
        "enum": each(&[protocol::OutputPolicy::Truncate, protocol::OutputPolicy::Kill, protocol::OutputPolicy::Discard]),
        "default": protocol::OutputPolicy::Truncate,
    });
    /// A piece of what stands around a program, by its name in docs/security.md.
    FenceName = json!({ "type": "string", "enum": each(&Fence::ALL) });
    /// Where a writable layer is kept.
    Medium = json!({ "type": "string", "enum": each(&[protocol::Medium::Memory, protocol::Medium::Disk]) });
    /// A limit that a program can reach.
    LimitHit = json!({
        "type": "string",
        "enum": each(&[
            Limit::Memory, Limit::Pids, Limit::Cpu, Limit::Wall, Limit::Disk, Limit::Inodes, Limit::Output, Limit::OpenFiles, Limit::FileSize,
        ]),
    });
    /// One of the two streams that a program writes.
    StreamName = json!({ "type": "string", "enum": ["stdout", "stderr"] });
    /// Whether a sandbox was started in parts that were prepared ahead.
    Start = json!({ "type": "string", "enum": each(&[protocol::Start::Warm, protocol::Start::Cold]) });
}
