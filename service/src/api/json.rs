//! Bodies of requests: bounded, and told field by field what is wrong with them.

use axum::body::Body;
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::ApiError;
use crate::sandbox::{BODY_BYTES_MAX, Invalid, bound_of, whole};

/// The largest that is read once more for the sake of its numbers: as values it takes many times its size.
const REREAD_BYTES_MAX: usize = 256 * 1024;
/// How much of a body that is too large is read all the same: a client that is still sending would not hear the answer.
pub(super) const DRAIN_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Reads a whole body and what it says. The error names the field by its dotted path, and its bound where it has one.
pub async fn read<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    let bytes = bytes(body).await?;
    parse(&bytes).map_err(ApiError::Invalid)
}

/// [`read`] of a body that may be empty.
pub(super) async fn read_or_default<T: DeserializeOwned + Default>(body: Body) -> Result<T, ApiError> {
    let bytes = bytes(body).await?;
    if bytes.is_empty() { Ok(T::default()) } else { parse(&bytes).map_err(ApiError::Invalid) }
}

/// A whole body, as it came.
pub(super) async fn bytes(mut body: Body) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut total = 0_usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Invalid::new("", format!("the body could not be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        total = total.saturating_add(data.len());
        if total <= BODY_BYTES_MAX {
            bytes.extend_from_slice(&data);
        } else if total > DRAIN_BYTES_MAX {
            break;
        }
    }
    if total > BODY_BYTES_MAX {
        return Err(ApiError::PayloadTooLarge(format!("the body is larger than {BODY_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// What the bytes say. To JSON Schema, and to clients that know one kind of number, 10.0 is a whole number too.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Invalid> {
    // A list would do for serde, too: of the fields' values in their order.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(Invalid::new("", "the body is a list, and must be an object"));
    }
    parse_strictly(bytes).or_else(|fault| {
        if bytes.len() > REREAD_BYTES_MAX {
            return Err(fault);
        }
        let mut value: Value = serde_json::from_slice(bytes).map_err(|_| fault.clone())?;
        if !make_whole(&mut value) {
            return Err(fault);
        }
        parse_strictly(value.to_string().as_bytes())
    })
}

/// Has numbers without a fraction be written as whole ones, as far as a double is exact; says whether there were any.
pub(super) fn make_whole(value: &mut Value) -> bool {
    match value {
        Value::Number(number) => {
            let Some(whole) = whole(number).filter(|_| number.is_f64()) else { return false };
            *number = whole.into();
            true
        }
        Value::Array(all) => all.iter_mut().map(make_whole).filter(|is_changed| *is_changed).count() > 0,
        Value::Object(members) => members.values_mut().map(make_whole).filter(|is_changed| *is_changed).count() > 0,
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

fn parse_strictly<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Invalid> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if !inner.is_data() {
            return Invalid::new("", format!("the body is not JSON: {inner}"));
        }
        let path = if path == "." { String::new() } else { path };
        let detail = inner.to_string();
        let field = match unknown_field(&detail) {
            Some(name) if path.is_empty() => name.to_owned(),
            Some(name) if !path.ends_with(name) => format!("{path}.{name}"),
            _ => missing_field(&detail)
                .map_or_else(|| path.clone(), |name| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }),
        };
        let bound = bound_of(&field);
        let detail = bound.map_or(detail, |bound| format!("not a whole number from {} to {} {}", bound.min, bound.max, bound.unit));
        Invalid { bound, field, detail }
    })?;
    json.end().map_err(|error| Invalid::new("", format!("something follows the body's JSON: {error}")))?;
    Ok(value)
}

fn unknown_field(detail: &str) -> Option<&str> {
    detail.strip_prefix("unknown field `")?.split('`').next()
}

fn missing_field(detail: &str) -> Option<&str> {
    detail.strip_prefix("missing field `")?.split('`').next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{Languages, PoolRequest, RunRequest};

    fn fault(body: &str) -> Invalid {
        parse::<RunRequest>(body.as_bytes()).unwrap_err()
    }

    #[test]
    fn an_unknown_field_is_named_where_it_stands() {
        assert_eq!(fault(r#"{"image":"a","comand":[]}"#).field, "comand");
        assert_eq!(fault(r#"{"image":"a","limits":{"memory":1}}"#).field, "limits.memory");
        assert_eq!(fault(r#"{"image":"a","files":[{"path":"a","content":"","x":1}]}"#).field, "files[0].x");
    }

    #[test]
    fn a_missing_field_is_named() {
        assert_eq!(parse::<PoolRequest>(br#"{"name":"a","size":1}"#).unwrap_err().field, "template");
        assert_eq!(fault(r#"{"image":"a","files":[{"path":"a"}]}"#).field, "files[0].content");
    }

    #[test]
    fn a_value_of_the_wrong_type_names_field_and_bound() {
        let error = fault(r#"{"image":"a","limits":{"wall_ms":-1}}"#);
        assert_eq!(error.field, "limits.wall_ms");
        assert_eq!(error.bound.map(|bound| bound.min), Some(1));
        assert_eq!(fault(r#"{"image":"a","limits":{"cpu_millis":"many"}}"#).field, "limits.cpu_millis");
        assert_eq!(fault(r#"{"image":"a","command":"x"}"#).field, "command");
    }

    #[test]
    fn a_list_of_values_is_no_object() {
        assert_eq!(fault(" [\"a\"]").detail, "the body is a list, and must be an object");
    }

    #[test]
    fn a_number_without_a_fraction_is_a_whole_one() {
        let parsed = |wait_ms: &str| {
            parse::<RunRequest>(format!(r#"{{"image":"a","wait_ms":{wait_ms}}}"#).as_bytes())
                .map(|run| run.parse(&Languages::read(None).unwrap()).unwrap().1)
        };
        assert_eq!(parsed("250.0").unwrap(), 250);
        assert_eq!(parsed("2.5e2").unwrap(), 250);
        assert_eq!(parsed("250.5").unwrap_err().field, "wait_ms");
        assert_eq!(parsed("-250.0").unwrap_err().field, "wait_ms");
        assert_eq!(parsed("1e300").unwrap_err().field, "wait_ms");
    }

    #[test]
    fn what_is_no_json_is_told_without_a_field() {
        let error = fault(r#"{"image":"#);
        assert!(error.field.is_empty() && error.detail.starts_with("the body is not JSON"));
        assert!(fault("").detail.starts_with("the body is not JSON"));
        assert!(fault(r#"{"image":"a"} x"#).detail.starts_with("something follows"));
    }

    #[tokio::test]
    async fn a_body_of_the_largest_size_is_taken_and_one_more_byte_is_not() {
        let largest = bytes(Body::from(vec![b' '; BODY_BYTES_MAX])).await;
        let larger = bytes(Body::from(vec![b' '; BODY_BYTES_MAX + 1])).await;
        assert_eq!(largest.unwrap().len(), BODY_BYTES_MAX);
        assert!(matches!(larger, Err(ApiError::PayloadTooLarge(_))));
    }
}
