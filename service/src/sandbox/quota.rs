//! How much a tenant, or one of its principals, may have: names, values, and what is said when one is used up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use super::{Bound, Invalid, Limits, RequestedLimits, bounds, words};

/// What the largest permitted value of a numeric field is called: this and the field's name without its path.
const LARGEST: &str = "largest_";

/// Every number that a postgres `bigint` and a JSON reader with doubles both hold exactly.
const NUMBER_MAX: u64 = (1 << 53) - 1;

/// Quotas by number that are counted, with what they count. Those from `execs` on are a tenant's alone.
const COUNTED: [(&str, &str); 16] = [
    ("sandboxes", "sandboxes and runs that have not ended"),
    ("memory_bytes", "bytes of their memory limits together"),
    ("cpu_millis", "thousandths of a core of their CPU limits together"),
    ("queued", "sandboxes and runs that wait for room"),
    ("runs_per_minute", "sandboxes and runs made in a minute"),
    ("runs_per_day", "sandboxes and runs made in a day of UTC"),
    ("cpu_seconds_per_day", "seconds of CPU time used in a day of UTC"),
    ("log_bytes", "bytes of kept output"),
    ("execs", "processes in one sandbox that were started in it and have not ended"),
    ("image_bytes", "bytes of imported images"),
    ("volume_bytes", "bytes of volumes"),
    ("volumes", "volumes"),
    ("webhooks", "webhooks"),
    ("kept_layers", "sandboxes that keep their layers"),
    ("pools", "pools"),
    ("pool_sandboxes", "sandboxes that its pools are to keep ready"),
];
const TENANT_ONLY: [&str; 8] = ["execs", "image_bytes", "volume_bytes", "volumes", "webhooks", "kept_layers", "pools", "pool_sandboxes"];

/// Waits for sandboxes at one time, of one tenant, at one node: no quota, but a bound that is told like one.
pub const WAITS: &str = "waits";
pub const WAITS_MAX: u64 = 256;

/// Watches of files at one time, likewise; and so many in one sandbox, where each is a process.
pub const WATCHES: &str = "watches";
pub const WATCHES_MAX: u64 = 256;
pub const WATCHES_IN_SANDBOX_MAX: u64 = 4;

/// Quotas that are lists of what may be asked for.
const LISTS: [&str; 2] = ["networks", "isolations"];
/// Names in one of them.
const WORDS_MAX: usize = 16;
const WORD_CHARACTERS_MAX: usize = 64;
/// In place of a value: as if it had never been set.
const DEFAULT: &str = "default";

/// Quotas by name. One that is absent, or null, is no limit; absent in what differs from others, it is theirs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Quotas(BTreeMap<String, Value>);

/// Quotas of a tenant as a request changes them, for the contract.
#[derive(Debug)]
pub enum QuotaChanges {}

/// Those of a principal.
#[derive(Debug)]
pub enum PrincipalQuotaChanges {}

impl PartialSchema for Quotas {
    fn schema() -> RefOr<Schema> {
        let description = "By name; null is no limit, and so is one that is absent. Those that begin with `largest_` bound the value of the field of that name in \
                           `limits`, or `ttl_ms`.";
        of_names(QuotaScope::Tenant, description, |kind| match kind {
            Kind::Number => json!({ "type": ["integer", "null"], "minimum": 0, "maximum": NUMBER_MAX }),
            Kind::List => json!({ "type": ["array", "null"], "items": { "type": "string" } }),
        })
    }
}

impl ToSchema for Quotas {}

impl PartialSchema for QuotaChanges {
    fn schema() -> RefOr<Schema> {
        changes(QuotaScope::Tenant, "As `Quotas`; a quota that is `\"default\"` is taken out, and one that is absent stays as it is.")
    }
}

impl ToSchema for QuotaChanges {}

impl PartialSchema for PrincipalQuotaChanges {
    fn schema() -> RefOr<Schema> {
        changes(QuotaScope::Principal, "As `QuotaChanges`, without those that only a tenant has.")
    }
}

impl ToSchema for PrincipalQuotaChanges {}

fn changes(scope: QuotaScope, description: &str) -> RefOr<Schema> {
    of_names(scope, description, |kind| match kind {
        Kind::Number => json!({ "oneOf": [{ "type": ["integer", "null"], "minimum": 0, "maximum": NUMBER_MAX }, { "const": DEFAULT }] }),
        Kind::List => {
            let word = json!({ "type": "string", "maxLength": WORD_CHARACTERS_MAX, "pattern": "^[^\\u0000]*$" });
            json!({ "oneOf": [{ "type": ["array", "null"], "maxItems": WORDS_MAX, "items": word }, { "const": DEFAULT }] })
        }
    })
}

/// An object with every quota that there is in this scope.
fn of_names(scope: QuotaScope, description: &str, schema: impl Fn(Kind) -> Value) -> RefOr<Schema> {
    let mut properties = Map::new();
    let mut add = |name: &str, kind: Kind, description: &str| {
        let mut schema = schema(kind);
        schema["description"] = description.into();
        properties.insert(name.to_owned(), schema);
    };
    for (name, counted) in COUNTED.into_iter().filter(|(name, _)| Kind::of(scope, name).is_some()) {
        let whose = if TENANT_ONLY.contains(&name) { ". Only a tenant has this one." } else { "." };
        add(name, Kind::Number, &format!("{}{}{whose}", counted[..1].to_uppercase(), &counted[1..]));
    }
    for bound in bounds().into_iter().filter(|bound| is_limited(bound)) {
        add(&format!("{LARGEST}{}", leaf(bound.field)), Kind::Number, &format!("The largest `{}` that may be asked for.", bound.field));
    }
    add("networks", Kind::List, "Networks that may be asked for.");
    add("isolations", Kind::List, "Classes of isolation that may be asked for.");
    words::schema(json!({ "type": "object", "additionalProperties": false, "description": description, "properties": properties }))
}

/// What differs for whoever has no quotas of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultQuotas {
    pub tenant: Quotas,
    pub principal: Quotas,
}

/// Whose quotas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum QuotaScope {
    Tenant,
    Principal,
}

impl QuotaScope {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Principal => "principal",
        }
    }
}

/// A quota that a request would have gone beyond.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    pub scope: QuotaScope,
    pub quota: String,
    /// A number or a list.
    pub limit: Value,
    /// What was used before, or what was asked for where nothing is counted.
    pub used: Value,
    /// When the same request may do. `None`: never, with this quota.
    pub retry_after_s: Option<u64>,
}

impl Default for DefaultQuotas {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        let tenant = [
            ("sandboxes", 1000),
            ("queued", 1000),
            ("log_bytes", 10 * GIB),
            ("image_bytes", 32 * GIB),
            ("volume_bytes", 32 * GIB),
            ("volumes", 256),
            ("webhooks", 16),
            ("kept_layers", 16),
            ("pools", 16),
            ("pool_sandboxes", 64),
        ];
        Self {
            tenant: Quotas(tenant.into_iter().map(|(name, number)| (name.to_owned(), number.into())).collect()),
            principal: Quotas::default(),
        }
    }
}

impl Quotas {
    /// Quotas from a JSON object, where null is no limit. `field` is its path in the request.
    pub fn parse(field: &str, scope: QuotaScope, given: Map<String, Value>) -> Result<Self, Invalid> {
        let mut quotas = Self::default();
        quotas.change(field, scope, given)?;
        Ok(quotas)
    }

    /// Takes over what is given; `"default"` takes a quota out.
    pub fn change(&mut self, field: &str, scope: QuotaScope, given: Map<String, Value>) -> Result<(), Invalid> {
        for (name, value) in given {
            let field = if field.is_empty() { name.clone() } else { format!("{field}.{name}") };
            let kind = Kind::of(scope, &name).ok_or_else(|| Invalid::new(&*field, "there is no such quota here"))?;
            if value == DEFAULT {
                self.0.remove(&name);
                continue;
            }
            let is_sound = match (&value, kind) {
                (Value::Null, _) => true,
                (Value::Number(number), Kind::Number) => whole(number).is_some_and(|number| number <= NUMBER_MAX),
                (Value::Array(words), Kind::List) => words.len() <= WORDS_MAX && words.iter().all(is_word),
                _ => false,
            };
            if !is_sound {
                let wanted = match kind {
                    Kind::Number => "a whole number, null for no limit",
                    Kind::List => "a list of names, null for no limit",
                };
                return Err(Invalid::new(field, format!("a quota is {wanted}, or \"default\"")));
            }
            let value = value.as_number().and_then(whole).map_or(value, Value::from);
            self.0.insert(name, value);
        }
        Ok(())
    }

    /// These, and the other's where these say nothing.
    #[must_use]
    pub fn over(&self, base: &Self) -> Self {
        let mut all = base.clone();
        all.0.extend(self.0.clone());
        all
    }

    /// The number of this name, if it is limited.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name).and_then(Value::as_u64)
    }

    /// The names in the list of this name, if it is limited.
    pub fn list(&self, name: &str) -> Option<Vec<&str>> {
        self.0.get(name)?.as_array().map(|words| words.iter().filter_map(Value::as_str).collect())
    }

    /// Every quota that there is in this scope, null where there is no limit.
    #[must_use]
    pub fn in_full(&self, scope: QuotaScope) -> Self {
        let names = COUNTED.iter().map(|(name, _)| *name).chain(LISTS).filter(|name| Kind::of(scope, name).is_some());
        let mut all: BTreeMap<String, Value> = names.map(|name| (name.to_owned(), Value::Null)).collect();
        all.extend(self.0.clone());
        Self(all)
    }

    /// The largest permitted value of a numeric field with this dotted path.
    pub fn largest(&self, field: &str) -> Option<u64> {
        self.number(&format!("{LARGEST}{}", leaf(field)))
    }
}

/// Whether this may stand in a quota that is a list.
fn is_word(value: &Value) -> bool {
    value.as_str().is_some_and(|word| word.chars().count() <= WORD_CHARACTERS_MAX && !word.contains('\0'))
}

/// The number, if it has no fraction and no sign, however it is written, as far as a double is exact.
pub fn whole(number: &Number) -> Option<u64> {
    let from_double = || {
        let text = format!("{:.0}", number.as_f64().filter(|double| double.fract() == 0.0)?);
        text.parse().ok().filter(|whole| *whole <= NUMBER_MAX)
    };
    number.as_u64().or_else(from_double)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Number,
    List,
}

impl Kind {
    fn of(scope: QuotaScope, name: &str) -> Option<Self> {
        if LISTS.contains(&name) {
            return Some(Self::List);
        }
        let is_largest =
            name.strip_prefix(LARGEST).is_some_and(|field| bounds().iter().any(|bound| is_limited(bound) && leaf(bound.field) == field));
        let is_counted = COUNTED.iter().any(|(known, _)| *known == name) && (scope == QuotaScope::Tenant || !TENANT_ONLY.contains(&name));
        (is_largest || is_counted).then_some(Self::Number)
    }
}

/// Whether a quota can bound the field: those of what a sandbox takes, not those of how an answer is read.
fn is_limited(bound: &Bound) -> bool {
    bound.field.starts_with("limits.") || bound.field == "ttl_ms"
}

fn leaf(field: &str) -> &str {
    field.rsplit('.').next().unwrap_or(field)
}

/// The bound as it is for whoever has these quotas; `None` stands for no such quota.
pub fn bound_within(bound: &Bound, quotas: &Quotas) -> Bound {
    // What holds for a run holds for its compile step.
    let is_bounded = is_limited(bound) || bound.field.starts_with("compile.limits.");
    let Some(largest) = quotas.largest(bound.field).filter(|_| is_bounded) else { return *bound };
    let max = bound.max.min(largest);
    Bound { max, default: bound.default.map(|default| default.min(max)), ..*bound }
}

/// What a request asks of each field that a quota can bound; null: without limit.
pub fn asked(limits: &Limits, ttl_ms: Option<Option<u64>>) -> Value {
    let mut asked = serde_json::to_value(limits).expect("limits are numbers with names");
    if let (Value::Object(fields), Some(ttl_ms)) = (&mut asked, ttl_ms) {
        fields.insert("ttl_ms".to_owned(), ttl_ms.into());
    }
    asked
}

/// The same of a run and of its compile step, if it has one: of each field the larger.
pub fn asked_of_steps(limits: &Limits, compile: Option<&Limits>) -> Value {
    let mut larger = asked(limits, None);
    let Some(Value::Object(others)) = compile.map(|compile| asked(compile, None)) else { return larger };
    for (name, other) in others {
        let is_larger = match (larger[&name].as_u64(), other.as_u64()) {
            (Some(own), Some(other)) => other > own,
            // Nothing is larger than no limit.
            (_, None) => other.is_null(),
            (None, Some(_)) => false,
        };
        if is_larger {
            larger[&name] = other;
        }
    }
    larger
}

/// The requested limits with what was not asked for set to the largest value that these quotas permit, where the default is larger.
pub fn defaults_within(asked: RequestedLimits, in_force: &Limits, quotas: &Quotas) -> RequestedLimits {
    let Ok(Value::Object(mut fields)) = serde_json::to_value(asked) else { return asked };
    let Ok(Value::Object(defaults)) = serde_json::to_value(in_force) else { return asked };
    for (name, value) in &mut fields {
        if let (Value::Null, Some(largest)) = (&*value, quotas.largest(name))
            && defaults.get(name).is_some_and(|default| default.as_u64().is_none_or(|default| default > largest))
        {
            *value = largest.into();
        }
    }
    serde_json::from_value(Value::Object(fields)).unwrap_or(asked)
}

impl Exceeded {
    /// Whether it is about how often, not about how much.
    pub fn is_rate(&self) -> bool {
        self.quota == "runs_per_minute"
    }
}

impl std::fmt::Display for Exceeded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let whose = match self.scope {
            QuotaScope::Tenant => "the tenant",
            QuotaScope::Principal => "the principal",
        };
        let Self { quota, limit, used, .. } = self;
        match COUNTED.iter().find(|(name, _)| name == quota) {
            Some((_, unit)) => write!(f, "{whose} may have {limit} {unit}; {used} are used"),
            None if quota == WAITS => write!(f, "{whose} may wait for {limit} sandboxes at one time; {used} are waited for"),
            None if quota == WATCHES => write!(f, "{whose} may watch files {limit} times at one time; {used} do"),
            None if used.is_null() => write!(f, "{whose} may ask for {limit} in {quota} at the most, and no limit was asked for"),
            None => write!(f, "{whose} may ask for {limit} in {quota}; {used} was asked for"),
        }
    }
}

impl std::str::FromStr for Quotas {
    type Err = anyhow::Error;
    /// A JSON object of a tenant's quotas, as settings have it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self::parse("", QuotaScope::Tenant, serde_json::from_str(text)?)?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox::Kind as SandboxKind;

    fn quotas(value: Value) -> Quotas {
        serde_json::from_value(value).unwrap()
    }

    fn object(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_is_given_goes_before_what_was_there_and_a_default_takes_it_out() {
        let mut own = quotas(json!({"sandboxes": 5, "queued": 7}));
        own.change("quotas", QuotaScope::Tenant, object(json!({"sandboxes": null, "queued": "default", "largest_pids": 9}))).unwrap();
        assert_eq!(own, quotas(json!({"sandboxes": null, "largest_pids": 9})));
        let base = quotas(json!({"sandboxes": 1, "queued": 2}));
        assert_eq!(own.over(&base), quotas(json!({"sandboxes": null, "queued": 2, "largest_pids": 9})));
    }

    #[test]
    fn a_quota_that_is_none_is_named() {
        for (name, value) in [
            ("sandbox", json!(1)),
            ("sandboxes", json!(-1)),
            ("sandboxes", json!([])),
            ("largest_wait_ms", json!(1)),
            ("networks", json!(1)),
        ] {
            let error = Quotas::parse("quotas", QuotaScope::Tenant, object(json!({name: value}))).unwrap_err();
            assert_eq!(error.field, format!("quotas.{name}"));
        }
        assert!(Quotas::parse("", QuotaScope::Principal, object(json!({"image_bytes": 1}))).is_err());
    }

    #[test]
    fn a_bound_is_the_nearer_of_ours_and_the_quotas() {
        let quotas = quotas(json!({"largest_pids": 10, "largest_memory_bytes": 1_u64 << 60, "largest_wall_ms": 10}));
        let of = |field| bound_within(crate::sandbox::bound_of(field).unwrap(), &quotas);
        assert_eq!((of("limits.pids").max, of("limits.pids").default), (10, Some(10)));
        assert_eq!(of("limits.memory_bytes").max, 4 << 30);
        assert_eq!(of("compile.limits.wall_ms").default, Some(10));
    }

    #[test]
    fn a_run_and_its_compile_step_ask_for_the_larger_of_both() {
        let limits = |value| Limits::of(SandboxKind::Run, serde_json::from_value(value).unwrap()).unwrap();
        let run = limits(json!({"memory_bytes": 64 << 20, "pids": 9, "cpu_ms": 5, "wall_ms": 7}));
        let compile = limits(json!({"memory_bytes": 128 << 20, "pids": 8}));
        let larger = asked_of_steps(&run, Some(&compile));
        assert_eq!((&larger["memory_bytes"], &larger["pids"]), (&json!(128 << 20), &json!(9)));
        assert_eq!((&larger["cpu_ms"], &larger["wall_ms"]), (&Value::Null, &json!(10_000)));
        assert_eq!(asked_of_steps(&run, None), asked(&run, None));
    }

    #[test]
    fn only_what_was_not_asked_for_is_lowered() {
        let asked: RequestedLimits = serde_json::from_value(json!({"memory_bytes": 256 << 20})).unwrap();
        let in_force = Limits::of(SandboxKind::Sandbox, asked).unwrap();
        let within =
            defaults_within(asked, &in_force, &quotas(json!({"largest_memory_bytes": 1, "largest_pids": 3, "largest_wall_ms": 5})));
        let expected: RequestedLimits = serde_json::from_value(json!({"memory_bytes": 256 << 20, "pids": 3, "wall_ms": 5})).unwrap();
        assert_eq!(within, expected);
    }
}
