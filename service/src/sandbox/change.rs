//! What can be changed of a sandbox that is there.

use std::{collections::BTreeMap, time::Duration};

use sandbox_core::protocol::{Isolation, NewLimits, NewTime};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{Bound, IDLE_TIMEOUT_MS, Invalid, Limits, Sandbox, TTL_MS, bound_of, check_name, request::check_labels, words};

/// Body of `PATCH /v1/sandboxes/{id}`. What is absent stays as it is.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = SandboxChange)]
pub struct ChangeRequest {
    /// Null takes the name from it.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, required = false, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    name: Option<Option<String>>,
    /// A label whose value is null is taken out.
    #[schema(value_type = Option<words::LabelChanges>)]
    labels: Option<BTreeMap<String, Option<String>>>,
    #[serde(default)]
    labels_policy: LabelsPolicy,
    /// From now on; null: for good.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u64>, required = false, extensions(("x-bound" = json!(TTL_MS))))]
    ttl_ms: Option<Option<u64>>,
    /// Null: it may do nothing for as long as it likes.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<u64>, required = false, extensions(("x-bound" = json!(IDLE_TIMEOUT_MS))))]
    idle_timeout_ms: Option<Option<u64>>,
    #[serde(default)]
    limits: RequestedChange,
}

/// What becomes of labels that are not named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(default = "merge")]
enum LabelsPolicy {
    /// They stay.
    #[default]
    Merge,
    /// They go.
    Replace,
}

/// The limits that can be changed while it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LimitChanges)]
pub(super) struct RequestedChange {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("memory_bytes")))))]
    pub(super) memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("cpu_millis")))))]
    pub(super) cpu_millis: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("pids")))))]
    pub(super) pids: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("wall_ms")))))]
    pub(super) wall_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("cpu_ms")))))]
    pub(super) cpu_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("io_bytes_per_s")))))]
    pub(super) io_bytes_per_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(extensions(("x-bound" = json!(bounded("io_ops_per_s")))))]
    pub(super) io_ops_per_s: Option<u64>,
}

/// The bound of a limit, for the contract: what is absent stays as it is.
fn bounded(limit: &str) -> Option<Bound> {
    bound_of(&format!("limits.{limit}")).map(|bound| Bound { default: None, ..*bound })
}

/// A change whose every field was checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    name: Option<Option<String>>,
    labels: Option<BTreeMap<String, Option<String>>>,
    replaces_labels: bool,
    ttl_ms: Option<Option<u64>>,
    idle_timeout_ms: Option<Option<u64>>,
    limits: RequestedChange,
}

/// A field that is there, whatever it holds: null is something else than nothing.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(from).map(Some)
}

impl ChangeRequest {
    /// The change, or the first field that is wrong.
    pub fn parse(self) -> Result<Change, Invalid> {
        Ok(Change {
            name: self.name.map(|name| name.map(check_name).transpose()).transpose()?,
            labels: self.labels,
            replaces_labels: self.labels_policy == LabelsPolicy::Replace,
            ttl_ms: self.ttl_ms.map(|ms| ms.map(|ms| TTL_MS.check(ms)).transpose()).transpose()?,
            idle_timeout_ms: self.idle_timeout_ms.map(|ms| ms.map(|ms| IDLE_TIMEOUT_MS.check(ms)).transpose()).transpose()?,
            limits: self.limits,
        })
    }
}

impl Change {
    /// Whether limits are changed.
    pub fn has_limits(&self) -> bool {
        self.limits != RequestedChange::default()
    }

    /// The sandbox as it is after the change, made at this time; or what of it cannot be.
    pub fn apply(&self, sandbox: &Sandbox, now: OffsetDateTime) -> Result<Sandbox, Invalid> {
        let mut next = sandbox.clone();
        if let Some(name) = &self.name {
            next.name.clone_from(name);
        }
        if let Some(labels) = &self.labels {
            if self.replaces_labels {
                next.labels.clear();
            }
            for (key, value) in labels {
                match value {
                    Some(value) => drop(next.labels.insert(key.clone(), value.clone())),
                    None => drop(next.labels.remove(key)),
                }
            }
            check_labels(&next.labels)?;
        }
        if let Some(ttl_ms) = self.ttl_ms {
            next.ttl_ms = ttl_ms;
            // One that has ended stays as long as all that have.
            if !sandbox.state.is_final() {
                next.expires_at = ttl_ms.map(|ms| now + Duration::from_millis(ms));
            }
        }
        if let Some(idle_timeout_ms) = self.idle_timeout_ms {
            next.idle_timeout_ms = idle_timeout_ms;
        }
        next.limits = sandbox.limits.changed(self.limits)?;
        Ok(next)
    }

    /// What is asked of each field that a quota can bound; null: without limit.
    pub fn asked(&self) -> Value {
        let mut asked = match serde_json::to_value(self.limits) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) | Err(_) => Map::new(),
        };
        if let Some(ttl_ms) = self.ttl_ms {
            asked.insert("ttl_ms".to_owned(), ttl_ms.into());
        }
        Value::Object(asked)
    }

    /// What is to be known of it later: the names of what was changed, and the new limits.
    pub fn told(&self) -> Value {
        let named = [
            ("name", self.name.is_some()),
            ("labels", self.labels.is_some()),
            ("ttl_ms", self.ttl_ms.is_some()),
            ("idle_timeout_ms", self.idle_timeout_ms.is_some()),
            ("limits", self.has_limits()),
        ];
        let changed: Vec<&str> = named.into_iter().filter_map(|(name, is_changed)| is_changed.then_some(name)).collect();
        serde_json::json!({ "changed": changed, "limits": self.limits })
    }
}

impl RequestedChange {
    pub(super) const fn io_is_changed(&self) -> bool {
        self.io_bytes_per_s.is_some() || self.io_ops_per_s.is_some()
    }
}

/// These limits for a running sandbox, whatever others it may have been given, as far as they can be changed there. It had run for so long when it was asked for.
pub fn new_limits(limits: &Limits, isolation: Isolation, waited_ms: u64) -> NewLimits {
    let time = |ms: Option<u64>| ms.map_or(NewTime::Unlimited, NewTime::Ms);
    NewLimits {
        memory_bytes: Some(limits.memory_bytes()),
        cpu_millis: Some(limits.cpu_millis()),
        pids: match isolation {
            Isolation::Container => Some(limits.pids()),
            // It cannot be changed there, so it has not been.
            Isolation::Gvisor => None,
        },
        wall_ms: time(limits.wall_ms().map(|ms| ms.saturating_add(waited_ms))),
        cpu_ms: time(limits.cpu_ms()),
        io: Some(limits.io()),
    }
}

impl Change {
    /// What the keeper is told of it, which counts from the start: what was asked for, and of `limits` what goes with that. It had run for so long when it was asked for.
    pub fn for_keeper(&self, limits: &Limits, waited_ms: u64) -> NewLimits {
        let RequestedChange { memory_bytes, cpu_millis, pids, wall_ms, cpu_ms, .. } = self.limits;
        let time = |ms: Option<u64>| ms.map_or(NewTime::Same, NewTime::Ms);
        let io = self.limits.io_is_changed().then(|| limits.io());
        let wall_ms = wall_ms.map(|ms| ms.saturating_add(waited_ms));
        NewLimits { memory_bytes, cpu_millis, pids, wall_ms: time(wall_ms), cpu_ms: time(cpu_ms), io }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{sandbox::Kind, store::sandbox_for_tests};

    fn change(body: Value) -> Result<Change, Invalid> {
        serde_json::from_value::<ChangeRequest>(body).unwrap().parse()
    }

    fn changed(body: Value) -> Result<Sandbox, Invalid> {
        let sandbox = Sandbox { ttl_ms: Some(5), ..sandbox_for_tests("acme", Kind::Sandbox, Some("old")) };
        change(body)?.apply(&sandbox, OffsetDateTime::UNIX_EPOCH)
    }

    #[test]
    fn what_is_absent_stays_and_null_takes_away() {
        let same = changed(json!({})).unwrap();
        assert_eq!((same.name.as_deref(), same.ttl_ms), (Some("old"), Some(5)));
        let none = changed(json!({"name": null, "ttl_ms": null, "idle_timeout_ms": null})).unwrap();
        assert_eq!((none.name, none.ttl_ms, none.expires_at), (None, None, None));
        assert_eq!(changed(json!({"name": "new"})).unwrap().name.as_deref(), Some("new"));
        let later = changed(json!({"ttl_ms": 2000})).unwrap();
        assert_eq!(later.expires_at, Some(OffsetDateTime::UNIX_EPOCH + Duration::from_secs(2)));
    }

    #[test]
    fn labels_are_merged_or_replaced() {
        let labels = |body: Value| changed(body).unwrap().labels.into_iter().collect::<Vec<_>>();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(labels(json!({"labels": {"a": "b"}})), [pair("a", "b"), pair("exercise", "7")]);
        assert_eq!(labels(json!({"labels": {"exercise": null}})), []);
        assert_eq!(labels(json!({"labels": {"a": "b"}, "labels_policy": "replace"})), [pair("a", "b")]);
        assert_eq!(changed(json!({"labels": {"": "b"}})).unwrap_err().field, "labels");
    }

    #[test]
    fn limits_that_are_not_named_stay_and_all_are_within_their_bounds() {
        let limits = changed(json!({"limits": {"memory_bytes": 64 << 20, "io_ops_per_s": 10}})).unwrap().limits;
        assert_eq!((limits.memory_bytes(), limits.pids(), limits.io().ops_per_s), (64 << 20, 64, 10));
        assert_eq!(changed(json!({"limits": {"pids": 0}})).unwrap_err().field, "limits.pids");
        assert!(serde_json::from_value::<ChangeRequest>(json!({"limits": {"disk_bytes": 1 << 20}})).is_err());
        let asked = change(json!({"limits": {"pids": 3, "wall_ms": 7, "io_ops_per_s": 10}})).unwrap();
        assert_eq!(asked.for_keeper(&limits, 5).wall_ms, NewTime::Ms(12));
        let told = asked.for_keeper(&limits, 0);
        assert_eq!((told.wall_ms, told.cpu_ms), (NewTime::Ms(7), NewTime::Same));
        assert_eq!((told.pids, told.memory_bytes, told.io), (Some(3), None, Some(limits.io())));
        assert_eq!(asked.asked(), json!({"pids": 3, "wall_ms": 7, "io_ops_per_s": 10}));
    }

    #[test]
    fn what_a_row_has_no_limit_of_is_taken_from_a_sandbox_and_what_cannot_change_is_left_out() {
        let limits = sandbox_for_tests("acme", Kind::Sandbox, None).limits;
        let (container, gvisor) = (new_limits(&limits, Isolation::Container, 5), new_limits(&limits, Isolation::Gvisor, 5));
        assert_eq!((limits.wall_ms(), container.wall_ms, container.cpu_ms), (None, NewTime::Unlimited, NewTime::Unlimited));
        assert_eq!((container.pids, gvisor), (Some(limits.pids()), NewLimits { pids: None, ..container }));
        let walled = changed(json!({"limits": {"wall_ms": 7}})).unwrap().limits;
        assert_eq!(new_limits(&walled, Isolation::Container, 5).wall_ms, NewTime::Ms(12));
    }
}
