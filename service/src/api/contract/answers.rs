//! What operations refuse, as answers: one for each status, which names every code that it may have, and shows an example of each.

use std::collections::{BTreeMap, BTreeSet};

use yaml_serde::{Mapping, Value};

use super::{
    super::error::ApiError,
    finish::reference,
    refusal::{self, Refusal},
};

/// Stands in examples.
const REQUEST_ID: &str = "0190b5a4-5f3e-7000-8000-3c2f5b1f9d10";

/// Headers of every answer of the API, by what they are called among the components of the contract.
pub(super) const COMMON: [(&str, &str); 6] = [
    ("X-Request-Id", "RequestId"),
    ("Cache-Control", "CacheControl"),
    ("Content-Security-Policy", "ContentSecurityPolicy"),
    ("Referrer-Policy", "ReferrerPolicy"),
    ("Strict-Transport-Security", "StrictTransportSecurity"),
    ("X-Content-Type-Options", "ContentTypeOptions"),
];

/// Headers of refusals, likewise; the first name is for those that always come, the second for those that may.
const OWN: [(&str, &str, &str); 6] = [
    ("WWW-Authenticate", "Challenge", "ScopeChallenge"),
    ("Content-Range", "FileSize", "FileSize"),
    ("Retry-After", "RetryAfter", "RetryAfter"),
    ("RateLimit-Limit", "RateLimitLimit", "RateLimitLimit"),
    ("RateLimit-Remaining", "RateLimitRemaining", "RateLimitRemaining"),
    ("RateLimit-Reset", "RateLimitReset", "RateLimitReset"),
];

/// What stands around an operation, and adds headers to its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Around {
    /// The listener of its own that Prometheus reads.
    Nothing,
    All,
    /// Its answers may be those to an earlier request.
    Keys,
}

/// The refusals of all operations, laid together.
#[derive(Debug)]
pub(super) struct Refusals {
    all: Vec<Told>,
    answers: Mapping,
    examples: Mapping,
}

/// A refusal as the contract tells of it.
#[derive(Debug)]
struct Told {
    name: &'static str,
    said: &'static str,
    status: u16,
    code: String,
    /// By what they are called.
    examples: Vec<(String, Value)>,
    /// Of each example.
    headers: Vec<BTreeSet<String>>,
}

impl Refusals {
    pub(super) fn new() -> Self {
        Self { all: refusal::all().iter().map(Told::of).collect(), answers: Mapping::new(), examples: Mapping::new() }
    }

    /// Puts answers in the place of the refusals that stand among these.
    pub(super) fn settle(&mut self, answers: &mut Mapping, around: Around) {
        let mut by_status: BTreeMap<u16, Vec<&Told>> = BTreeMap::new();
        for told in &self.all {
            if answers.remove(told.name).is_some() {
                by_status.entry(told.status).or_default().push(told);
            }
        }
        for (status, all) in by_status {
            // Nobody asks for a key before there is a caller, and a body.
            let around = if [401, 408].contains(&status) && around == Around::Keys { Around::All } else { around };
            let names = all.iter().map(|told| told.name).collect::<Vec<_>>().join("Or");
            let name = match around {
                Around::Nothing => format!("{names}OfMetrics"),
                Around::All => names,
                Around::Keys => format!("{names}OfPost"),
            };
            answers.insert(status.to_string().into(), reference("responses", &name));
            if !self.answers.contains_key(&name) {
                self.examples
                    .extend(all.iter().flat_map(|told| &told.examples).map(|(name, example)| (name.clone().into(), example.clone())));
                self.answers.insert(name.into(), answer(&all, around));
            }
        }
    }

    /// The answers, and the examples that they show.
    pub(super) fn into_components(self) -> (Value, Value) {
        (self.answers.into(), self.examples.into())
    }
}

impl Told {
    fn of(refusal: &Refusal) -> Self {
        let problems =
            refusal.errors.iter().map(|error| serde_json::to_value(error.told(REQUEST_ID.to_owned())).expect("a problem is JSON"));
        let problems: Vec<_> = problems.collect();
        let code = problems[0]["code"].as_str().expect("a code is a word").to_owned();
        let status = problems[0]["status"].as_u64().and_then(|status| u16::try_from(status).ok()).expect("a status is one");
        let examples = problems.iter().enumerate().map(|(at, problem)| {
            let name = if at == 0 { format!("{status}_{code}") } else { format!("{status}_{code}_{}", at + 1) };
            let value = yaml_serde::to_value(problem).expect("what is JSON is YAML");
            (name, Mapping::from_iter([("value".into(), value)]).into())
        });
        let headers = refusal.errors.iter().map(header_names).collect();
        Self { name: refusal.name, said: refusal.said.trim(), status, examples: examples.collect(), headers, code }
    }
}

fn header_names(error: &ApiError) -> BTreeSet<String> {
    error.headers().keys().map(ToString::to_string).collect()
}

/// One answer for all refusals of a status.
fn answer(all: &[&Told], around: Around) -> Value {
    let description = all.iter().map(|told| format!("`{}`: {}", told.code, told.said)).collect::<Vec<_>>().join("\n\n");
    let examples = all.iter().flat_map(|told| &told.examples).map(|(name, _)| (name.clone().into(), reference("examples", name)));
    let content =
        Mapping::from_iter([("schema".into(), reference("schemas", "Problem")), ("examples".into(), examples.collect::<Mapping>().into())]);
    let mut headers = headers_around(around);
    let of_each: Vec<_> = all.iter().flat_map(|told| &told.headers).collect();
    for name in of_each.iter().copied().flatten().collect::<BTreeSet<_>>() {
        let is_always = of_each.iter().all(|names| names.contains(name));
        let (shown, always, sometimes) =
            OWN.iter().find(|(shown, ..)| *name == *shown.to_ascii_lowercase()).expect("every header of a refusal is described");
        headers.insert((*shown).into(), reference("headers", if is_always { always } else { sometimes }));
    }
    let mut answer = Mapping::from_iter([("description".into(), description.into())]);
    if !headers.is_empty() {
        answer.insert("headers".into(), headers.into());
    }
    let content = Mapping::from_iter([("application/problem+json".into(), content.into())]);
    answer.insert("content".into(), content.into());
    answer.into()
}

/// What any answer has there.
pub(super) fn headers_around(around: Around) -> Mapping {
    let common = COMMON.iter().filter(|_| around != Around::Nothing);
    let replayed = (around == Around::Keys).then_some(("Idempotency-Replayed", "IdempotencyReplayed"));
    common.copied().chain(replayed).map(|(name, component)| (name.into(), reference("headers", component))).collect()
}
