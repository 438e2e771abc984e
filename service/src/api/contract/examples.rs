//! What answers look like: an example of each schema that one has, from `examples.yaml`.

use yaml_serde::{Mapping, Value};

use super::finish::{each_operation, reference};

const EXAMPLES: &str = include_str!("examples.yaml");
/// Those whose bodies are a schema's, whole or line by line.
const JSON: [&str; 2] = ["application/json", "application/x-ndjson"];

/// Has every answer of JSON show the example of its schema. That none is without one is for a test to say, which knows schemas.
pub(super) fn show(document: &mut Value) {
    let all: Mapping = yaml_serde::from_str(EXAMPLES).expect("the examples are YAML: every test of the contract reads them");
    let mut shown = Mapping::new();
    each_operation(document.get_mut("paths").expect("there are paths"), |_, _, operation| {
        let answers = operation.get_mut("responses").and_then(Value::as_mapping_mut).into_iter().flatten();
        let contents = answers.filter_map(|(_, answer)| answer.get_mut("content")?.as_mapping_mut()).flatten();
        for (_, content) in contents.filter(|(media_type, _)| JSON.iter().any(|json| **media_type == *json)) {
            let name = content["schema"].get("$ref").and_then(Value::as_str).and_then(|place| place.rsplit('/').next());
            let Some((name, example)) = name.and_then(|name| Some((name.to_owned(), all.get(name)?))) else { continue };
            content["examples"] = Mapping::from_iter([(name.clone().into(), reference("examples", &name))]).into();
            shown.insert(name.into(), Mapping::from_iter([("value".into(), example.clone())]).into());
        }
    });
    let examples = document["components"].get_mut("examples").and_then(Value::as_mapping_mut).expect("refusals have examples");
    examples.extend(shown);
}
