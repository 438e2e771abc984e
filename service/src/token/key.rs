//! A key that proves tokens, by one algorithm and no other.

use std::{fmt, path::Path, str::FromStr};

use anyhow::{Context, bail, ensure};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::{Map, Value};
use tokio_rustls::rustls::pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};

use super::secret::Secret;

/// The longest `kid`, in a configuration and in a token.
const KID_BYTES_MAX: usize = 256;
/// The object identifier of the curve P-256, as it stands in DER (RFC 5480, 2.1.1.1).
const P256_OID: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// What an RSA public key of 2048 bits has in DER, less its smaller numbers.
const RSA_DER_BYTES_MIN: usize = 264;

/// What a token calls the key by which it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyId(String);

impl KeyId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyId {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        ensure!((1..=KID_BYTES_MAX).contains(&text.len()), "a kid has 1 to {KID_BYTES_MAX} bytes");
        Ok(Self(text.to_owned()))
    }
}

/// A key, and the one algorithm by which it proves anything. What a token says of its algorithm chooses none: it only must be the same, so
/// that a public key is never taken for a secret (RFC 8725, 2.1).
#[derive(Clone)]
pub struct Key {
    pub(super) id: Option<KeyId>,
    pub(super) algorithm: Algorithm,
    pub(super) decoding: DecodingKey,
}

impl fmt::Debug for Key {
    /// Without the key itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

impl Key {
    /// HS256. Without an id: it proves tokens whatever they call their key.
    pub fn secret(secret: &Secret) -> Self {
        Self { id: None, algorithm: Algorithm::HS256, decoding: DecodingKey::from_secret(secret.as_bytes()) }
    }

    /// The public key in a PEM file; its kind says its algorithm: RS256, ES256 or EdDSA.
    pub fn read_public(path: &Path, id: Option<KeyId>) -> anyhow::Result<Self> {
        let pem = std::fs::read(path).with_context(|| format!("reading the public key from {}", path.display()))?;
        Self::public(&pem, id).with_context(|| path.display().to_string())
    }

    fn public(pem: &[u8], id: Option<KeyId>) -> anyhow::Result<Self> {
        let info = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| {
            anyhow::anyhow!("there is no PUBLIC KEY in PEM: `openssl pkey -pubout` writes one from a private key, `openssl x509 -pubkey -noout` from a certificate")
        })?;
        let (algorithm, decoding) = if let Ok(key) = DecodingKey::from_rsa_pem(pem) {
            let bytes = key.try_get_as_bytes().map_or(0, <[u8]>::len);
            ensure!(bytes >= RSA_DER_BYTES_MIN, "an RSA key has at least 2048 bits");
            (Algorithm::RS256, key)
        } else if let Ok(key) = DecodingKey::from_ec_pem(pem) {
            let is_p256 = info.windows(P256_OID.len()).any(|window| window == P256_OID);
            ensure!(is_p256, "of the elliptic curves there is P-256 (ES256) and Ed25519 (EdDSA)");
            (Algorithm::ES256, key)
        } else if let Ok(key) = DecodingKey::from_ed_pem(pem) {
            (Algorithm::EdDSA, key)
        } else {
            bail!("a public key is of RSA (RS256), P-256 (ES256) or Ed25519 (EdDSA)");
        };
        Ok(Self { id, algorithm, decoding })
    }

    /// Whether the token is signed by this key, by its algorithm.
    pub(super) fn proves(&self, token: &Signed<'_>) -> bool {
        self.algorithm == token.algorithm
            && jsonwebtoken::crypto::verify(token.signature, token.message.as_bytes(), &self.decoding, self.algorithm).unwrap_or(false)
    }
}

/// A token as it came (RFC 7515, 7.1). Nothing in it is believed.
#[derive(Debug, Clone)]
pub(super) struct Signed<'a> {
    algorithm: Algorithm,
    pub(super) kid: Option<String>,
    /// What is signed: the header and the claims, as they came.
    message: &'a str,
    payload: &'a str,
    signature: &'a str,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<IgnoredAny>,
}

impl<'a> Signed<'a> {
    /// `None` if this is no token, or one that wants what we do not have: another algorithm, or any extension (RFC 7515, 4.1.11).
    pub(super) fn parse(token: &'a str) -> Option<Self> {
        let (message, signature) = token.rsplit_once('.')?;
        let (header, payload) = message.split_once('.')?;
        let Header { alg, kid, crit } = json(header)?;
        let algorithm = match alg.as_str() {
            "HS256" => Algorithm::HS256,
            "RS256" => Algorithm::RS256,
            "ES256" => Algorithm::ES256,
            "EdDSA" => Algorithm::EdDSA,
            _ => return None,
        };
        let is_sound = crit.is_none() && kid.as_ref().is_none_or(|kid| kid.len() <= KID_BYTES_MAX);
        is_sound.then_some(Self { algorithm, kid, message, payload, signature })
    }

    /// What it says; to be asked only once the signature is proven.
    pub(super) fn claims(&self) -> Option<Map<String, Value>> {
        json(self.payload)
    }
}

fn json<T: DeserializeOwned>(part: &str) -> Option<T> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}
