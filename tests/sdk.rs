//! `openapi.yaml` is all that a generator of clients needs. What such a client does is shown in `tests/features.rs`.

use std::collections::BTreeSet;

use mayfly_tests::sdk::Sdk;

/// Bodies that are bytes, and the document itself, which is YAML: of them the generator makes nothing. All else is JSON.
const STREAMS: [&str; 6] = [
    "GET /openapi.yaml",
    "GET /v1/image-archives/{reference}",
    "GET /v1/sandboxes/{id}/archive",
    "POST /v1/images/import",
    "PUT /v1/sandboxes/{id}/archive",
    "PUT /v1/sandboxes/{id}/files/{path}",
];

#[test]
fn a_client_is_generated_from_the_contract_of_all_but_streams_of_bytes() {
    let said = Sdk::generate().said;

    // `WARNING parsing GET /v1/… within …`
    let warned: BTreeSet<_> = said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("WARNING parsing "))
        .map(|line| line.split_once(" within ").map_or(line, |(operation, _)| operation))
        .collect();
    assert_eq!(warned, BTreeSet::from(STREAMS), "{said}");
    assert!(!said.contains("Unable to parse"), "{said}");
}
