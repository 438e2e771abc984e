//! Tokens, good and bad ones.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

/// All that a tenant may do.
pub const TENANT_SCOPES: &str = "runs sandboxes:read sandboxes:write images:read images:write volumes webhooks metrics:read";

/// Seconds since 1970, as tokens have them.
#[must_use]
pub fn now_unix_s() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "tests talk to a real service, which lives in real time")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |d: Duration| d.as_secs())
}

/// The claims of a good token, to be bent by tests of bad ones.
#[must_use]
pub fn claims(tenant: &str, scope: &str) -> Value {
    let now = now_unix_s();
    json!({ "tenant": tenant, "sub": "tester", "scope": scope, "aud": "mayfly", "iat": now, "exp": now + 3600 })
}

/// Signs with the secret that the service keeps in `secret_file`.
#[must_use]
pub fn sign(claims: &Value, secret_file: &Path) -> String {
    let secret = fs::read(secret_file).unwrap_or_else(|e| panic!("{}: {e}", secret_file.display()));
    sign_with(claims, secret.trim_ascii_end(), Algorithm::HS256)
}

/// Signs with any secret, by any HMAC.
#[must_use]
pub fn sign_with(claims: &Value, secret: &[u8], algorithm: Algorithm) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret)).expect("claims are a JSON object")
}
