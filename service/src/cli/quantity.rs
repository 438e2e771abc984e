//! Sizes, times and pairs as people type them.

use anyhow::{Context as _, bail, ensure};

/// Bytes from `65536`, `64k`, `64KiB`, `1.5g`: each unit is 1024 of the one before, as with Docker.
pub(super) fn bytes(text: &str) -> anyhow::Result<u64> {
    let (number, unit) = split(text);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => bail!("a size is a number with k, m, g or t, as in 64m"),
    };
    scaled(number, factor).context("a size is a number with k, m, g or t, as in 64m")
}

/// Milliseconds from `10s`, `500ms`, `1.5m`, `2h`, `7d`; a number alone is seconds.
pub(super) fn millis(text: &str) -> anyhow::Result<u64> {
    let (number, unit) = split(text);
    let factor: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => bail!("a time is a number with ms, s, m, h or d, as in 90s"),
    };
    scaled(number, factor).context("a time is a number with ms, s, m, h or d, as in 90s")
}

/// Thousandths of a core from `0.5`, `2`.
pub(super) fn cpu_millis(text: &str) -> anyhow::Result<u64> {
    scaled(text, 1000).context("a number of cores, as in 0.5")
}

/// `NAME=VALUE`.
pub(super) fn pair(text: &str) -> anyhow::Result<(String, String)> {
    let (name, value) = text.split_once('=').context("NAME=VALUE is needed")?;
    ensure!(!name.is_empty(), "NAME=VALUE is needed");
    Ok((name.to_owned(), value.to_owned()))
}

/// `NAME=VALUE`, or `NAME` for what our own environment has.
pub(super) fn variable(text: &str) -> anyhow::Result<(String, String)> {
    if text.contains('=') {
        return pair(text);
    }
    #[expect(clippy::disallowed_methods, reason = "it is no configuration of ours: the program in the sandbox is to have what we have")]
    let value = std::env::var(text).with_context(|| format!("{text} is no variable here; NAME=VALUE gives one"))?;
    Ok((text.to_owned(), value))
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..at], text[at..].trim_start())
}

/// A number with a point, times a factor, in whole numbers: no rounding but of what is less than one.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let is_number =
        (!whole.is_empty() || !part.is_empty()) && part.len() <= 9 && [whole, part].concat().bytes().all(|b| b.is_ascii_digit());
    if !is_number {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let parts: u64 = if part.is_empty() { 0 } else { part.parse().ok()? };
    let scale = 10_u128.pow(u32::try_from(part.len()).ok()?);
    let behind = u64::try_from(u128::from(parts) * u128::from(factor) / scale).ok()?;
    whole.checked_mul(factor)?.checked_add(behind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        let sizes = ["65536", "64k", "64KiB", "1.5g", "10 MB", "0.5k"].map(|text| bytes(text).unwrap());
        assert_eq!(sizes, [65_536, 65_536, 65_536, 3 << 29, 10 << 20, 512]);
        for text in ["", "m", "-1", "1x", "1.2.3", "99999999999999999999", "99999999t"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        assert_eq!(["2", "500ms", "1.5m", "2h", "7d"].map(|text| millis(text).unwrap()), [2000, 500, 90_000, 7_200_000, 604_800_000]);
        for text in ["", "s", "1y", "-1s"] {
            assert!(millis(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cores_and_pairs() {
        assert_eq!(cpu_millis("0.25").unwrap(), 250);
        assert_eq!(cpu_millis("2").unwrap(), 2000);
        assert!(cpu_millis("two").is_err());
        assert_eq!(pair("a=b=c").unwrap(), ("a".into(), "b=c".into()));
        assert!(pair("=b").is_err() && pair("a").is_err());
        assert!(variable("THERE_IS_NO_SUCH_VARIABLE").is_err());
    }
}
