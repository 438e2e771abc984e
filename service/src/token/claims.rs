//! What a token says, and what it must say.

use serde_json::{Map, Value};

use super::{TokenError, scope::Scopes};

const NAME_BYTES_MAX: usize = 128;

/// What a token must say beside its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// One of the token's `aud` must be this.
    pub audience: String,
    /// The token's `iss` must be this. `None`: it does not matter.
    pub issuer: Option<String>,
    /// Name of the claim that holds the tenant.
    pub tenant_claim: String,
    /// Name of the claim that holds the principal.
    pub subject_claim: String,
    /// Name of the claim that holds the scopes: words in a text, or a list of them.
    pub scope_claim: String,
    /// How far the clocks of whoever signs and of this machine may be apart.
    pub leeway_s: u32,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            audience: "mayfly".to_owned(),
            issuer: None,
            tenant_claim: "tenant".to_owned(),
            subject_claim: "sub".to_owned(),
            scope_claim: "scope".to_owned(),
            leeway_s: 30,
        }
    }
}

/// What a verified token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// 1 to 128 letters, digits and `._@:|+-`.
    pub tenant: String,
    /// Of the same form.
    pub subject: String,
    pub scopes: Scopes,
}

/// A tenant or subject that no token may carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name: 1 to 128 letters, digits and ._@:|+-")]
pub struct NameInvalid(String);

impl Rules {
    /// What proven claims say, if they are for us and good at this time.
    pub(super) fn read(&self, claims: &Map<String, Value>, now_unix_s: i64) -> Result<Claims, TokenError> {
        let leeway_s = i64::from(self.leeway_s);
        let ends_at = claims.get("exp").and_then(instant).ok_or(TokenError::Refused("the token has no valid exp"))?;
        if ends_at.saturating_add(leeway_s) <= now_unix_s {
            return Err(TokenError::Refused("the token has expired"));
        }
        if let Some(nbf) = claims.get("nbf") {
            let begins_at = instant(nbf).ok_or(TokenError::Refused("the token has no valid nbf"))?;
            if begins_at.saturating_sub(leeway_s) > now_unix_s {
                return Err(TokenError::Refused("the token is not valid yet"));
            }
        }
        if !claims.get("aud").is_some_and(|audiences| is_among(audiences, &self.audience)) {
            return Err(TokenError::Refused("the token is for another audience"));
        }
        if let Some(issuer) = &self.issuer
            && claims.get("iss").and_then(Value::as_str) != Some(issuer)
        {
            return Err(TokenError::Refused("the token is from another issuer"));
        }
        let scopes = match claims.get(&self.scope_claim) {
            None => Scopes::default(),
            Some(said) => scopes(said).ok_or(TokenError::Refused("the token's scope is neither a text nor a list of texts"))?,
        };
        let tenant = name_in(claims, &self.tenant_claim).ok_or(TokenError::Refused("the token names no valid tenant"))?;
        let subject = name_in(claims, &self.subject_claim).ok_or(TokenError::Refused("the token names no valid subject"))?;
        Ok(Claims { tenant, subject, scopes })
    }
}

impl Claims {
    /// Fails if tenant or subject are names that no token may carry.
    pub(super) fn check(&self) -> Result<(), NameInvalid> {
        let invalid = [&self.tenant, &self.subject].into_iter().find(|name| !is_name(name));
        invalid.map_or(Ok(()), |name| Err(NameInvalid(name.clone())))
    }
}

/// RFC 7519, 4.1.3: one text or a list of them.
fn is_among(audiences: &Value, ours: &str) -> bool {
    match audiences {
        Value::String(one) => one == ours,
        Value::Array(all) => all.iter().any(|one| one.as_str() == Some(ours)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => false,
    }
}

/// RFC 8693 has words with blanks between; other issuers write a list (`scp`, `permissions`).
fn scopes(said: &Value) -> Option<Scopes> {
    match said {
        Value::String(words) => Some(Scopes::known_in(words.split(' '))),
        Value::Array(all) => Some(Scopes::known_in(all.iter().map(Value::as_str).collect::<Option<Vec<_>>>()?)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => None,
    }
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

/// Whether a tenant or principal may be called so.
pub fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._@:|+-".contains(&b))
}
