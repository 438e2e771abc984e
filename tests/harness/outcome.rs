//! Reading figures out of an answer, with the answer itself in every failure.

use serde_json::Value;

/// A whole number of the outcome's `usage`.
#[must_use]
#[track_caller]
pub fn usage(answer: &Value, name: &str) -> u64 {
    answer["outcome"]["usage"][name].as_u64().unwrap_or_else(|| panic!("no usage.{name} in {answer:#}"))
}

/// Checks why the payload ended.
#[track_caller]
pub fn assert_reason(answer: &Value, reason: &str) {
    assert_eq!(answer["outcome"]["reason"], reason, "{answer:#}");
}

/// Checks that the payload ended by itself with this code.
#[track_caller]
pub fn assert_exit(answer: &Value, code: i64) {
    assert_reason(answer, "exited");
    assert_eq!(answer["outcome"]["exit_code"], code, "{answer:#}");
}

/// Checks that a figure lies where the known program must have brought it.
#[track_caller]
pub fn assert_within(answer: &Value, name: &str, range: std::ops::RangeInclusive<u64>) {
    let value = usage(answer, name);
    assert!(range.contains(&value), "usage.{name} is {value}, not in {range:?}: {answer:#}");
}

/// Checks which limits were reached.
#[track_caller]
pub fn assert_limits_hit(answer: &Value, names: &[&str]) {
    let hit: Vec<_> = answer["outcome"]["limits_hit"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    assert_eq!(hit, names, "{answer:#}");
}

/// What was printed, which must be text.
#[must_use]
#[track_caller]
pub fn stdout(answer: &Value) -> &str {
    assert_eq!(answer["stdout_encoding"], "utf-8", "{answer:#}");
    answer["stdout"].as_str().unwrap_or_else(|| panic!("no stdout in {answer:#}"))
}
