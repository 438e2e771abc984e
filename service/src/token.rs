//! Who is calling and what they may do: signed tokens (JWT, HS256), made and checked.

mod scope;
mod secret;

use std::fmt;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
pub use scope::{Scope, Scopes, UnknownScope};
pub use secret::Secret;
use serde_json::{Map, Value, json};

/// How far the clocks of whoever signs and of this machine may be apart, in seconds.
const LEEWAY_S: i64 = 30;

const NAME_BYTES_MAX: usize = 128;

/// What a token must say beside its signature and its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// One of the token's `aud` must be this.
    pub audience: String,
    /// The token's `iss` must be this. `None`: it does not matter.
    pub issuer: Option<String>,
    /// Name of the claim that holds the tenant.
    pub tenant_claim: String,
}

/// What a verified token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// 1 to 128 letters, digits and `._@:-`.
    pub tenant: String,
    /// Of the same form.
    pub subject: String,
    pub scopes: Scopes,
}

/// Why a token is not accepted, for people. Whoever sent it can do nothing but send another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenError(&'static str);

/// A tenant or subject that no token may carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name: 1 to 128 letters, digits and ._@:-")]
pub struct NameInvalid(String);

/// Checks tokens against one secret and one set of rules.
pub struct Verifier {
    key: DecodingKey,
    validation: Validation,
    tenant_claim: String,
}

/// Makes tokens that a [`Verifier`] with the same secret and rules accepts.
pub struct Signer {
    key: EncodingKey,
    rules: Rules,
}

impl fmt::Debug for Verifier {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("validation", &self.validation).finish_non_exhaustive()
    }
}

impl fmt::Debug for Signer {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("rules", &self.rules).finish_non_exhaustive()
    }
}

impl Verifier {
    pub fn new(secret: &Secret, rules: &Rules) -> Self {
        // The algorithm is ours to choose, never the token's.
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_audience(&[&rules.audience]);
        let mut required = vec!["exp", "aud", "sub"];
        if let Some(issuer) = &rules.issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        // The crate would read the system's clock; `verify` is told what time it is.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        Self { key: DecodingKey::from_secret(secret.as_bytes()), validation, tenant_claim: rules.tenant_claim.clone() }
    }

    /// What the token says, if it is signed with our secret, for us, and valid at this time.
    pub fn verify(&self, token: &str, now_unix_s: i64) -> Result<Claims, TokenError> {
        let data = jsonwebtoken::decode::<Map<String, Value>>(token, &self.key, &self.validation).map_err(|error| refusal(error.kind()))?;
        let claims = data.claims;
        let expires_at = claims.get("exp").and_then(instant).ok_or(TokenError("the token has no valid exp"))?;
        if expires_at.saturating_add(LEEWAY_S) <= now_unix_s {
            return Err(TokenError("the token has expired"));
        }
        if let Some(nbf) = claims.get("nbf") {
            let begins_at = instant(nbf).ok_or(TokenError("the token has no valid nbf"))?;
            if begins_at.saturating_sub(LEEWAY_S) > now_unix_s {
                return Err(TokenError("the token is not valid yet"));
            }
        }
        let scopes = match claims.get("scope") {
            None => Scopes::default(),
            Some(Value::String(words)) => Scopes::known_in(words),
            Some(_) => return Err(TokenError("the token's scope is not a text")),
        };
        let tenant = name_in(&claims, &self.tenant_claim).ok_or(TokenError("the token names no valid tenant"))?;
        let subject = name_in(&claims, "sub").ok_or(TokenError("the token has no valid sub"))?;
        Ok(Claims { tenant, subject, scopes })
    }
}

impl Signer {
    pub fn new(secret: &Secret, rules: Rules) -> Self {
        Self { key: EncodingKey::from_secret(secret.as_bytes()), rules }
    }

    /// A token that is good from now on for so long. Fails if tenant or subject are names that no token may carry.
    pub fn sign(&self, claims: &Claims, now_unix_s: i64, ttl_s: u32) -> Result<String, NameInvalid> {
        for name in [&claims.tenant, &claims.subject] {
            if !is_name(name) {
                return Err(NameInvalid(name.clone()));
            }
        }
        let mut body = json!({
            "sub": claims.subject,
            "scope": claims.scopes.to_string(),
            "aud": self.rules.audience,
            "iat": now_unix_s,
            "exp": now_unix_s.saturating_add(i64::from(ttl_s)),
        });
        if let Some(issuer) = &self.rules.issuer {
            body["iss"] = json!(issuer);
        }
        body[&self.rules.tenant_claim] = json!(claims.tenant);
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), &body, &self.key).expect("an HMAC over a JSON object cannot fail"))
    }
}

/// The library's reason in words that tell nothing of the token itself.
#[expect(clippy::wildcard_enum_match_arm, reason = "the other reasons are all of one kind, and the library adds more")]
fn refusal(kind: &ErrorKind) -> TokenError {
    TokenError(match kind {
        ErrorKind::InvalidSignature => "the token's signature is wrong",
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => "the token is signed by another algorithm than HS256",
        ErrorKind::InvalidAudience => "the token is for another audience",
        ErrorKind::InvalidIssuer => "the token is from another issuer",
        ErrorKind::MissingRequiredClaim(claim) => match claim.as_str() {
            "exp" => "the token has no valid exp",
            "aud" => "the token has no valid aud",
            "iss" => "the token has no valid iss",
            _ => "the token has no valid sub",
        },
        _ => "this is not a token",
    })
}

/// A NumericDate of RFC 7519: seconds, whole or not.
fn instant(value: &Value) -> Option<i64> {
    let Value::Number(number) = value else { return None };
    if let Some(seconds) = number.as_i64() {
        return Some(seconds);
    }
    // Beyond i64 or with a fraction; the seconds before the fraction are what counts, and a float becomes the nearest bound.
    #[expect(clippy::cast_possible_truncation, reason = "a cast from float saturates")]
    number.as_f64().map(|seconds| seconds as i64)
}

fn name_in(claims: &Map<String, Value>, claim: &str) -> Option<String> {
    claims.get(claim)?.as_str().filter(|name| is_name(name)).map(str::to_owned)
}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._@:-".contains(&b))
}

#[cfg(test)]
mod tests;
