//! Parameters that many operations have. Named in `params(…)` of an operation; their values are read by the handler.

use serde_json::{Value, json};
use utoipa::{
    IntoParams,
    openapi::{
        Required,
        path::{Parameter, ParameterBuilder, ParameterIn},
    },
};

use crate::sandbox::{Bound, LIST_LIMIT, words};

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
    /// The id of a sandbox or run.
    Id = [path("id", "What is no id names nothing, and is not found.")];
    /// The name of a tenant.
    Tenant = [path("tenant", "What names no tenant is not found.")];
    /// The names of a tenant and of one of its principals.
    Principal = [path("tenant", "What names no tenant is not found."), named("principal", "The `sub` of its tokens.", "^[A-Za-z0-9._@:|+-]{1,128}$")];
    /// The id of a node.
    Node = [path("node", "What is no id names nothing, and is not found.")];
    /// The name of an image.
    Reference = [path("reference", "May hold slashes.")];
    /// Which page of a list.
    Page = [
        query("limit", "The most entries of the page.", bounded(&LIST_LIMIT)),
        query("cursor", "The `next_cursor` of the page before.", json!({ "type": "string" }))
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
        query("kind", "Only of these kinds.", json!({ "type": "array", "items": text() })),
        query("sandbox", "Only of this sandbox or run.", json!({ "type": "string", "format": "uuid" })),
        query("principal", "Only what this principal did.", text())
    ];
    /// One tenant of all.
    OfTenant = [query("tenant", "Only this tenant's.", text())];
}

/// What Postgres can hold.
fn text() -> Value {
    json!({ "type": "string", "pattern": "^[^\\u0000]*$" })
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
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Query)
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
