//! Makes tokens: for operators at the command line, and for whoever has no issuer of their own.

use std::{fmt, path::Path};

use anyhow::{Context, bail};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;

use super::{
    claims::{Claims, Rules},
    key::KeyId,
    secret::Secret,
};

/// Makes tokens that a verifier with the same rules, and the secret or the public half of the key, accepts.
pub struct Signer {
    algorithm: Algorithm,
    key: EncodingKey,
    kid: Option<KeyId>,
    rules: Rules,
}

impl fmt::Debug for Signer {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("algorithm", &self.algorithm)
            .field("kid", &self.kid)
            .field("rules", &self.rules)
            .finish_non_exhaustive()
    }
}

impl Signer {
    pub fn with_secret(secret: &Secret, kid: Option<KeyId>, rules: Rules) -> Self {
        Self { algorithm: Algorithm::HS256, key: EncodingKey::from_secret(secret.as_bytes()), kid, rules }
    }

    /// With the private key in a PEM file; its kind says its algorithm: RS256, ES256 or EdDSA.
    pub fn read_private(path: &Path, kid: Option<KeyId>, rules: Rules) -> anyhow::Result<Self> {
        let pem = std::fs::read(path).with_context(|| format!("reading the private key from {}", path.display()))?;
        let (algorithm, key) = private(&pem).with_context(|| path.display().to_string())?;
        Ok(Self { algorithm, key, kid, rules })
    }

    /// A token that is good from now on for so long. Fails if tenant or subject are names that no token may carry, or the key is none that its
    /// algorithm takes.
    pub fn sign(&self, claims: &Claims, now_unix_s: i64, ttl_s: u32) -> anyhow::Result<String> {
        claims.check()?;
        let mut body = json!({
            "aud": self.rules.audience,
            "iat": now_unix_s,
            "exp": now_unix_s.saturating_add(i64::from(ttl_s)),
        });
        if let Some(issuer) = &self.rules.issuer {
            body["iss"] = json!(issuer);
        }
        body[&self.rules.scope_claim] = json!(claims.scopes.to_string());
        body[&self.rules.subject_claim] = json!(claims.subject);
        body[&self.rules.tenant_claim] = json!(claims.tenant);
        let header = Header { kid: self.kid.as_ref().map(|kid| kid.as_str().to_owned()), ..Header::new(self.algorithm) };
        jsonwebtoken::encode(&header, &body, &self.key)
            .context("signing by this key: RSA has at least 2048 bits, and the curve of EC is P-256")
    }
}

fn private(pem: &[u8]) -> anyhow::Result<(Algorithm, EncodingKey)> {
    const TAGS: [&str; 2] = ["-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----"];
    let is_private = std::str::from_utf8(pem).is_ok_and(|text| TAGS.iter().any(|tag| text.contains(tag)));
    if is_private {
        // The library would take an RSA key for another's: the order matters for none of the others.
        if let Ok(key) = EncodingKey::from_ec_pem(pem) {
            return Ok((Algorithm::ES256, key));
        }
        if let Ok(key) = EncodingKey::from_ed_pem(pem) {
            return Ok((Algorithm::EdDSA, key));
        }
        if let Ok(key) = EncodingKey::from_rsa_pem(pem) {
            return Ok((Algorithm::RS256, key));
        }
    }
    bail!("there is no PRIVATE KEY of RSA, P-256 or Ed25519 in PEM: `openssl pkcs8 -topk8 -nocrypt` makes one of most others")
}
