//! The API's contract (OpenAPI 3.1), made from the code: what each handler says of itself, and what holds for all of them.

mod answers;
mod examples;
mod finish;
mod page;
pub(super) mod parameter;
pub(super) mod refusal;

use std::sync::LazyLock;

use utoipa::{
    IntoResponses as _, OpenApi,
    openapi::{
        self,
        path::{Operation, PathItem},
    },
};
use yaml_serde::Value;

use super::error::Problem;

/// What is there once for all operations: information, headers.
const FRAME: &str = include_str!("contract/frame.yaml");

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let mut described = Refused::openapi();
    described.merge(super::described());
    finish::finished(&described, FRAME)
});

/// What no operation names for itself.
#[derive(Debug, OpenApi)]
#[openapi(components(schemas(Problem)))]
struct Refused;

/// The contract, as it is committed and served.
pub fn openapi() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let text = yaml_serde::to_string(&*DOCUMENT).expect("a document of ours is YAML");
        format!("# Made from the code by `make openapi`: change it there.\n{text}")
    });
    &TEXT
}

/// The contract for people: a page that needs nothing else, and the policy under which a browser shows it.
pub(super) fn page() -> &'static page::Page {
    static PAGE: LazyLock<page::Page> = LazyLock::new(|| page::Page::of(&DOCUMENT));
    &PAGE
}

/// Has every operation of these promise that it may take too long.
pub(super) fn promise_timeout(openapi: &mut openapi::OpenApi) {
    for item in openapi.paths.paths.values_mut() {
        for operation in operations(item) {
            operation.responses.responses.extend(refusal::Timeout::responses());
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, options, head, patch, trace, .. } = item;
    [get, put, post, delete, options, head, patch, trace].into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every `$ref` below `value`.
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Mapping(mapping) => {
                found.extend(mapping.get("$ref").and_then(Value::as_str).map(ToOwned::to_owned));
                mapping.iter().for_each(|(_, member)| references(member, found));
            }
            Value::Sequence(all) => all.iter().for_each(|one| references(one, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Tagged(_) => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let mut found = BTreeSet::new();
        references(&DOCUMENT, &mut found);
        let lost = |place: &&String| place.trim_start_matches("#/").split('/').try_fold(&*DOCUMENT, |value, key| value.get(key)).is_none();
        assert!(!found.is_empty());
        assert_eq!(found.iter().filter(lost).collect::<Vec<_>>(), Vec::<&String>::new());
    }

    #[test]
    fn every_component_is_used() {
        let mut found = BTreeSet::new();
        references(&DOCUMENT, &mut found);
        let mut idle = Vec::new();
        for section in ["schemas", "responses", "examples", "parameters", "headers"] {
            for (name, _) in DOCUMENT["components"][section].as_mapping().unwrap() {
                let place = format!("#/components/{section}/{}", name.as_str().unwrap());
                if !found.contains(&place) {
                    idle.push(place);
                }
            }
        }
        assert_eq!(idle, Vec::<String>::new());
    }

    #[test]
    fn nothing_of_the_scaffold_is_left() {
        assert!(
            !openapi().contains("x-bound") && !openapi().contains("x-schema") && !openapi().contains("{*") && !openapi().contains("Page_")
        );
    }

    #[test]
    fn a_bound_of_the_contract_is_the_one_that_is_held() {
        let wait = &DOCUMENT["components"]["schemas"]["RunRequest"]["properties"]["wait_ms"];
        assert_eq!(wait["maximum"].as_u64(), Some(crate::sandbox::WAIT_MS.max));
        let memory = &DOCUMENT["components"]["schemas"]["Limits"]["properties"]["memory_bytes"];
        assert_eq!(memory["minimum"].as_u64(), crate::sandbox::bound_of("limits.memory_bytes").map(|bound| bound.min));
    }

    #[test]
    fn every_operation_says_what_it_is() {
        for (path, item) in DOCUMENT["paths"].as_mapping().unwrap() {
            for (method, operation) in item.as_mapping().unwrap().iter().filter(|(key, _)| *key != "servers") {
                let has = |key: &str| operation.get(key).and_then(Value::as_str).is_some_and(|text| !text.is_empty());
                assert!(has("operationId") && has("summary"), "{method:?} {path:?}");
                assert!(operation.get("tags").is_some() && operation.get("security").is_some(), "{method:?} {path:?}");
            }
        }
    }
}
