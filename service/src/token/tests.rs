//! Tokens that must be refused, and the few that must not.

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde_json::{Value, json};

use super::*;

const NOW: i64 = 1_800_000_000;
const UNPROVEN: Result<Claims, TokenError> = Err(TokenError::Unproven);

fn secret() -> Secret {
    Secret::new(&[b's'; 32]).unwrap()
}

fn verifier(keys: Vec<Key>, rules: Rules) -> Verifier {
    Verifier::new(Keyring::fixed(keys), rules)
}

/// What a service with our secret says. It has nothing to wait for, so it answers at once.
fn verify_by(rules: Rules, token: &str) -> Result<Claims, TokenError> {
    futures_util::FutureExt::now_or_never(verifier(vec![Key::secret(&secret())], rules).verify(token, NOW)).unwrap()
}

fn verify(token: &str) -> Result<Claims, TokenError> {
    verify_by(Rules::default(), token)
}

fn refused(why: &'static str) -> Result<Claims, TokenError> {
    Err(TokenError::Refused(why))
}

fn good() -> Value {
    json!({ "tenant": "acme", "sub": "alice", "scope": "runs", "aud": "mayfly", "exp": NOW + 60 })
}

fn sign_by(claims: &Value, algorithm: Algorithm, secret: &[u8]) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret)).unwrap()
}

fn sign(claims: &Value) -> String {
    sign_by(claims, Algorithm::HS256, &[b's'; 32])
}

fn with(name: &str, value: Value) -> Result<Claims, TokenError> {
    let mut claims = good();
    claims[name] = value;
    verify(&sign(&claims))
}

fn without(name: &str) -> Result<Claims, TokenError> {
    let mut claims = good();
    claims.as_object_mut().unwrap().remove(name);
    verify(&sign(&claims))
}

/// A pair of keys, its public half in a file.
fn pair(kind: &'static rcgen::SignatureAlgorithm) -> (KeyPair, tempfile::NamedTempFile) {
    let pair = KeyPair::generate_for(kind).unwrap();
    let public = written(&pair.public_key_pem());
    (pair, public)
}

fn written(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn what_we_sign_we_accept() {
    let claims = Claims { tenant: "acme".into(), subject: "a@b.c:1".into(), scopes: "runs images:read".parse().unwrap() };
    let token = Signer::with_secret(&secret(), None, Rules::default()).sign(&claims, NOW, 60).unwrap();
    assert_eq!(verify(&token), Ok(claims));
}

#[test]
fn a_token_of_another_secret_is_refused() {
    let forged = sign_by(&good(), Algorithm::HS256, &[b'x'; 32]);
    assert_eq!(verify(&forged), UNPROVEN);
}

#[test]
fn a_token_whose_claims_were_changed_is_refused() {
    let (ours, theirs) = (sign(&good()), sign_by(&json!({ "tenant": "other" }), Algorithm::HS256, &[b'x'; 32]));
    let [ours, theirs] = [&ours, &theirs].map(|token| token.split('.').collect::<Vec<_>>());
    let mixed = [ours[0], theirs[1], ours[2]].join(".");
    assert_eq!(verify(&mixed), UNPROVEN);
}

#[test]
fn another_algorithm_with_our_secret_is_refused() {
    let signed = sign_by(&good(), Algorithm::HS512, &[b's'; 32]);
    assert_eq!(verify(&signed), UNPROVEN);
}

#[test]
fn a_token_that_wants_no_signature_is_refused() {
    let signed = sign(&good());
    let payload = signed.split('.').nth(1).unwrap();
    // {"alg":"none","typ":"JWT"}
    assert!(verify(&format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.")).is_err());
}

#[test]
fn bytes_that_are_no_token_are_refused() {
    assert!(verify("").is_err());
    assert!(verify("a.b.c").is_err());
    assert!(verify("....").is_err());
}

#[test]
fn a_token_is_good_until_its_end_and_half_a_minute() {
    assert!(with("exp", json!(NOW - 29)).is_ok());
    assert_eq!(with("exp", json!(NOW - 30)), refused("the token has expired"));
}

#[test]
fn a_token_is_good_from_half_a_minute_before_its_beginning() {
    assert!(with("nbf", json!(NOW + 30)).is_ok());
    assert_eq!(with("nbf", json!(NOW + 31)), refused("the token is not valid yet"));
}

#[test]
fn times_may_have_fractions_but_must_be_numbers() {
    assert!(with("exp", json!(1_800_000_001.5)).is_ok());
    assert!(with("exp", json!("2099-01-01")).is_err());
    assert!(with("nbf", json!("yesterday")).is_err());
    assert!(with("exp", json!(-1)).is_err());
}

#[test]
fn a_token_without_an_end_is_refused() {
    assert_eq!(without("exp"), refused("the token has no valid exp"));
}

#[test]
fn a_token_for_others_is_refused() {
    assert_eq!(with("aud", json!("another")), refused("the token is for another audience"));
    assert_eq!(without("aud"), refused("the token is for another audience"));
    assert!(with("aud", json!(["another", "mayfly"])).is_ok());
}

#[test]
fn an_issuer_is_wanted_once_it_is_configured() {
    let verify = |claims: &Value| verify_by(Rules { issuer: Some("https://issuer".into()), ..Rules::default() }, &sign(claims));
    let mut claims = good();
    assert_eq!(verify(&claims), refused("the token is from another issuer"));
    claims["iss"] = json!("https://another");
    assert_eq!(verify(&claims), refused("the token is from another issuer"));
    claims["iss"] = json!(["https://issuer"]);
    assert_eq!(verify(&claims), refused("the token is from another issuer"));
    claims["iss"] = json!("https://issuer");
    assert!(verify(&claims).is_ok());
}

#[test]
fn claims_have_the_names_that_are_configured() {
    let names = ["org", "user", "permissions"].map(str::to_owned);
    let [tenant_claim, subject_claim, scope_claim] = names;
    let rules = Rules { tenant_claim, subject_claim, scope_claim, ..Rules::default() };
    let mut claims = good();
    assert!(verify_by(rules.clone(), &sign(&claims)).is_err());
    claims["org"] = json!("acme-org");
    claims["user"] = json!("auth0|5f7c");
    claims["permissions"] = json!(["openid", "images:read"]);
    let expected = Claims { tenant: "acme-org".into(), subject: "auth0|5f7c".into(), scopes: "images:read".parse().unwrap() };
    assert_eq!(verify_by(rules, &sign(&claims)), Ok(expected));
}

#[test]
fn another_leeway_can_be_configured() {
    let rules = Rules { leeway_s: 0, ..Rules::default() };
    let mut claims = good();
    claims["exp"] = json!(NOW);
    assert_eq!(verify_by(rules, &sign(&claims)), refused("the token has expired"));
}

#[test]
fn names_that_no_row_can_hold_are_refused() {
    assert!(with("tenant", json!("")).is_err());
    assert!(with("tenant", json!("a b")).is_err());
    assert!(with("tenant", json!("x".repeat(129))).is_err());
    assert!(with("tenant", json!(7)).is_err());
    assert!(with("sub", json!("a/b")).is_err());
    assert!(with("sub", json!("x".repeat(128))).is_ok());
    assert!(without("sub").is_err());
}

#[test]
fn a_token_without_a_scope_allows_nothing() {
    assert_eq!(without("scope").unwrap().scopes, Scopes::default());
    assert!(with("scope", json!(7)).is_err());
    assert!(with("scope", json!(["runs", 7])).is_err());
    assert_eq!(with("scope", json!([])).unwrap().scopes, Scopes::default());
}

#[test]
fn nothing_is_signed_that_would_not_be_accepted() {
    let claims = Claims { tenant: "not a name".into(), subject: "alice".into(), scopes: Scopes::default() };
    assert!(Signer::with_secret(&secret(), None, Rules::default()).sign(&claims, NOW, 60).is_err());
}

#[test]
fn each_kind_of_key_proves_what_its_private_half_signed() {
    for kind in [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519] {
        let (private, public) = pair(kind);
        let signer = Signer::read_private(written(&private.serialize_pem()).path(), None, Rules::default()).unwrap();
        let token = signer.sign(&Claims { tenant: "a".into(), subject: "b".into(), scopes: Scopes::default() }, NOW, 60).unwrap();
        let verify = |key| futures_util::FutureExt::now_or_never(verifier(vec![key], Rules::default()).verify(&token, NOW)).unwrap();

        assert!(verify(Key::read_public(public.path(), None).unwrap()).is_ok(), "{kind:?}");
        assert_eq!(verify(Key::read_public(pair(kind).1.path(), None).unwrap()), UNPROVEN);
        assert_eq!(verify(Key::secret(&secret())), UNPROVEN);
    }
}

#[test]
fn a_public_key_is_no_secret() {
    let (_, public) = pair(&rcgen::PKCS_RSA_SHA256);
    let pem = std::fs::read(public.path()).unwrap();
    let keys = vec![Key::read_public(public.path(), None).unwrap()];
    for secret in [pem.as_slice(), pem.trim_ascii_end()] {
        let token = sign_by(&good(), Algorithm::HS256, secret);
        assert_eq!(futures_util::FutureExt::now_or_never(verifier(keys.clone(), Rules::default()).verify(&token, NOW)), Some(UNPROVEN));
    }
}

#[test]
fn a_key_with_an_id_proves_only_tokens_that_name_it() {
    let (private, public) = pair(&rcgen::PKCS_ED25519);
    let key = Key::read_public(public.path(), Some("a".parse().unwrap())).unwrap();
    let private = written(&private.serialize_pem());
    let verify = |kid: Option<&str>| {
        let signer = Signer::read_private(private.path(), kid.map(|kid| kid.parse().unwrap()), Rules::default()).unwrap();
        let token = signer.sign(&Claims { tenant: "a".into(), subject: "b".into(), scopes: Scopes::default() }, NOW, 60).unwrap();
        futures_util::FutureExt::now_or_never(verifier(vec![key.clone()], Rules::default()).verify(&token, NOW)).unwrap()
    };
    assert!(verify(Some("a")).is_ok());
    assert_eq!(verify(Some("b")), UNPROVEN);
    assert_eq!(verify(None), UNPROVEN);
}

#[test]
fn keys_of_other_kinds_are_refused_when_they_are_read() {
    let (private, _) = pair(&rcgen::PKCS_ED25519);
    let (_, p384) = pair(&rcgen::PKCS_ECDSA_P384_SHA384);
    let told = |file: &tempfile::NamedTempFile| format!("{:#}", Key::read_public(file.path(), None).unwrap_err());
    assert!(told(&p384).contains("P-256"), "{}", told(&p384));
    assert!(told(&written(&private.serialize_pem())).contains("openssl pkey -pubout"));
    assert!(told(&written("nonsense")).contains("no PUBLIC KEY"));
}

#[test]
fn a_token_that_is_too_long_or_wants_an_extension_is_refused() {
    let mut claims = good();
    claims["groups"] = json!("x".repeat(5000));
    assert!(verify(&sign(&claims)).is_ok());
    claims["groups"] = json!("x".repeat(7000));
    assert_eq!(verify(&sign(&claims)), UNPROVEN);

    let key = EncodingKey::from_secret(&[b's'; 32]);
    let header = Header { crit: Some(vec!["exp".into()]), ..Header::new(Algorithm::HS256) };
    assert_eq!(verify(&jsonwebtoken::encode(&header, &good(), &key).unwrap()), UNPROVEN);
}
