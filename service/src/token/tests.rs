//! Tokens that must be refused, and the few that must not.

use serde_json::json;

use super::*;

const NOW: i64 = 1_800_000_000;

fn rules() -> Rules {
    Rules { audience: "mayfly".into(), issuer: None, tenant_claim: "tenant".into() }
}

fn secret() -> Secret {
    Secret::new(&[b's'; 32]).unwrap()
}

fn verify(token: &str) -> Result<Claims, TokenError> {
    Verifier::new(&secret(), &rules()).verify(token, NOW)
}

fn good() -> Value {
    json!({ "tenant": "acme", "sub": "alice", "scope": "runs", "aud": "mayfly", "exp": NOW + 60 })
}

fn sign_by(claims: &Value, algorithm: Algorithm, secret: &[u8]) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret)).unwrap()
}

fn sign(claims: &Value) -> String {
    sign_by(claims, Algorithm::HS256, secret().as_bytes())
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

#[test]
fn what_we_sign_we_accept() {
    let claims = Claims { tenant: "acme".into(), subject: "a@b.c:1".into(), scopes: "runs images:read".parse().unwrap() };
    let token = Signer::new(&secret(), rules()).sign(&claims, NOW, 60).unwrap();
    assert_eq!(verify(&token), Ok(claims));
}

#[test]
fn a_token_of_another_secret_is_refused() {
    let forged = sign_by(&good(), Algorithm::HS256, &[b'x'; 32]);
    assert_eq!(verify(&forged), Err(TokenError("the token's signature is wrong")));
}

#[test]
fn a_token_whose_claims_were_changed_is_refused() {
    let (ours, theirs) = (sign(&good()), sign_by(&json!({ "tenant": "other" }), Algorithm::HS256, &[b'x'; 32]));
    let [ours, theirs] = [&ours, &theirs].map(|token| token.split('.').collect::<Vec<_>>());
    let mixed = [ours[0], theirs[1], ours[2]].join(".");
    assert_eq!(verify(&mixed), Err(TokenError("the token's signature is wrong")));
}

#[test]
fn another_algorithm_with_our_secret_is_refused() {
    let signed = sign_by(&good(), Algorithm::HS512, secret().as_bytes());
    assert_eq!(verify(&signed), Err(TokenError("the token is signed by another algorithm than HS256")));
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
    assert_eq!(with("exp", json!(NOW - 30)), Err(TokenError("the token has expired")));
}

#[test]
fn a_token_is_good_from_half_a_minute_before_its_beginning() {
    assert!(with("nbf", json!(NOW + 30)).is_ok());
    assert_eq!(with("nbf", json!(NOW + 31)), Err(TokenError("the token is not valid yet")));
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
    assert_eq!(without("exp"), Err(TokenError("the token has no valid exp")));
}

#[test]
fn a_token_for_others_is_refused() {
    assert_eq!(with("aud", json!("another")), Err(TokenError("the token is for another audience")));
    assert_eq!(without("aud"), Err(TokenError("the token has no valid aud")));
    assert!(with("aud", json!(["another", "mayfly"])).is_ok());
}

#[test]
fn an_issuer_is_wanted_once_it_is_configured() {
    let verifier = Verifier::new(&secret(), &Rules { issuer: Some("https://issuer".into()), ..rules() });
    let mut claims = good();
    assert_eq!(verifier.verify(&sign(&claims), NOW), Err(TokenError("the token has no valid iss")));
    claims["iss"] = json!("https://another");
    assert_eq!(verifier.verify(&sign(&claims), NOW), Err(TokenError("the token is from another issuer")));
    claims["iss"] = json!("https://issuer");
    assert!(verifier.verify(&sign(&claims), NOW).is_ok());
}

#[test]
fn the_tenants_claim_has_the_name_that_is_configured() {
    let verifier = Verifier::new(&secret(), &Rules { tenant_claim: "org".into(), ..rules() });
    let mut claims = good();
    assert!(verifier.verify(&sign(&claims), NOW).is_err());
    claims["org"] = json!("acme-org");
    assert_eq!(verifier.verify(&sign(&claims), NOW).unwrap().tenant, "acme-org");
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
    assert!(with("scope", json!(["runs"])).is_err());
}

#[test]
fn nothing_is_signed_that_would_not_be_accepted() {
    let claims = Claims { tenant: "not a name".into(), subject: "alice".into(), scopes: Scopes::default() };
    assert!(Signer::new(&secret(), rules()).sign(&claims, NOW, 60).is_err());
}
