//! A set of keys as issuers publish it: JSON Web Key Set (RFC 7517, RFC 8037).

use anyhow::{Context, ensure};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

use super::{key::Key, secret::Secret};

/// More keys than any issuer has at one time. Each that has no id is tried on each token.
const KEYS_MAX: usize = 64;
const RSA_MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;
const COORDINATE_BYTES: usize = 32;

/// Whether a set may hold secrets beside public keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Secrets {
    Taken,
    /// What is published is not secret.
    PassedOver,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

/// What of a key is of interest here.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    r#use: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    kid: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

/// The keys of a set that can prove a token. Others in it, for encryption or of other algorithms, are passed over. Fails if none is left: an
/// issuer without keys is one that is out of order.
pub(super) fn parse(json: &[u8], secrets: Secrets) -> anyhow::Result<Vec<Key>> {
    let set: Set = serde_json::from_slice(json).context("this is no JSON Web Key Set")?;
    ensure!(set.keys.len() <= KEYS_MAX, "the set has {} keys; at most {KEYS_MAX}", set.keys.len());
    let keys: Vec<_> = set.keys.into_iter().filter_map(|value| key(serde_json::from_value(value).ok()?, secrets)).collect();
    ensure!(!keys.is_empty(), "the set has no key for HS256, RS256, ES256 or EdDSA that may be used here");
    Ok(keys)
}

fn key(jwk: Jwk, secrets: Secrets) -> Option<Key> {
    let is_for_signatures = jwk.r#use.as_deref().is_none_or(|purpose| purpose == "sig")
        && jwk.key_ops.as_ref().is_none_or(|operations| operations.iter().any(|operation| operation == "verify"));
    if !is_for_signatures {
        return None;
    }
    let (name, algorithm, decoding) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", None) => {
            let (n, e) = (bytes(jwk.n.as_deref()?)?, bytes(jwk.e.as_deref()?)?);
            RSA_MODULUS_BYTES.contains(&n.len()).then_some(())?;
            ("RS256", Algorithm::RS256, DecodingKey::from_rsa_raw_components(&n, &e))
        }
        ("EC", Some("P-256")) => {
            let (x, y) = (coordinate(jwk.x.as_deref()?)?, coordinate(jwk.y.as_deref()?)?);
            // An uncompressed point (SEC 1, 2.3.3).
            ("ES256", Algorithm::ES256, DecodingKey::from_ec_der(&[&[4], x.as_slice(), y.as_slice()].concat()))
        }
        ("OKP", Some("Ed25519")) => {
            let x = coordinate(jwk.x.as_deref()?)?;
            ("EdDSA", Algorithm::EdDSA, DecodingKey::from_ed_der(&x))
        }
        ("oct", None) if secrets == Secrets::Taken => {
            let secret = Secret::exactly(bytes(jwk.k.as_deref()?)?).ok()?;
            ("HS256", Algorithm::HS256, DecodingKey::from_secret(secret.as_bytes()))
        }
        _ => return None,
    };
    // RFC 9864 gave Ed25519 a name of its own.
    let is_its_algorithm = jwk.alg.as_deref().is_none_or(|alg| alg == name || (alg, name) == ("Ed25519", "EdDSA"));
    let id = jwk.kid.map(|kid| kid.parse()).transpose().ok()?;
    is_its_algorithm.then_some(Key { id, algorithm, decoding })
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

fn coordinate(text: &str) -> Option<Vec<u8>> {
    bytes(text).filter(|bytes| bytes.len() == COORDINATE_BYTES)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ed() -> Value {
        json!({ "kty": "OKP", "crv": "Ed25519", "kid": "a", "x": URL_SAFE_NO_PAD.encode([7; 32]) })
    }

    fn with(name: &str, value: Value) -> Value {
        let mut key = ed();
        key[name] = value;
        key
    }

    fn parsed(keys: &[Value], secrets: Secrets) -> anyhow::Result<Vec<Key>> {
        parse(json!({ "keys": keys }).to_string().as_bytes(), secrets)
    }

    #[test]
    fn what_cannot_prove_a_token_is_passed_over() {
        let odd = [
            with("use", json!("enc")),
            with("key_ops", json!(["sign"])),
            with("alg", json!("ES256")),
            with("crv", json!("Ed448")),
            with("x", json!("AAAA")),
            with("kid", json!("")),
            json!({ "kty": "RSA", "n": URL_SAFE_NO_PAD.encode([7; 128]), "e": "AQAB" }),
            json!({ "kty": "RSA", "alg": "RS512", "n": URL_SAFE_NO_PAD.encode([7; 256]), "e": "AQAB" }),
            json!({ "kty": "EC", "crv": "secp256k1", "x": URL_SAFE_NO_PAD.encode([7; 32]), "y": URL_SAFE_NO_PAD.encode([7; 32]) }),
            json!("no key at all"),
        ];
        for key in odd {
            assert!(parsed(std::slice::from_ref(&key), Secrets::Taken).is_err(), "{key}");
            assert_eq!(parsed(&[key, ed()], Secrets::Taken).unwrap().len(), 1);
        }
    }

    #[test]
    fn a_secret_is_taken_from_a_file_and_not_from_the_network() {
        let secret = json!({ "kty": "oct", "kid": "s", "k": URL_SAFE_NO_PAD.encode([b'\n'; 32]) });
        assert_eq!(parsed(std::slice::from_ref(&secret), Secrets::Taken).unwrap()[0].algorithm, Algorithm::HS256);
        assert!(parsed(&[secret], Secrets::PassedOver).is_err());
        let short = json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode([7; 31]) });
        assert!(parsed(&[short], Secrets::Taken).is_err());
    }

    #[test]
    fn a_set_without_keys_or_with_too_many_is_none() {
        assert!(parsed(&[], Secrets::Taken).is_err());
        assert!(parsed(&vec![ed(); KEYS_MAX], Secrets::Taken).is_ok());
        assert!(parsed(&vec![ed(); KEYS_MAX + 1], Secrets::Taken).is_err());
        assert!(parse(b"<html>", Secrets::Taken).is_err());
    }
}
