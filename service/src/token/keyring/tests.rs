//! Sets that change while tokens come. Time is tokio's, and stands still but where something waits for it.

use std::path::Path;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn token(kid: Option<&str>, secret: u8) -> String {
    let header = Header { kid: kid.map(str::to_owned), ..Header::new(Algorithm::HS256) };
    jsonwebtoken::encode(&header, &json!({}), &EncodingKey::from_secret(&[secret; 33])).unwrap()
}

/// Publishes keys of these ids.
fn publish(path: &Path, keys: &[(Option<&str>, u8)]) {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let keys: Vec<_> =
        keys.iter().map(|(kid, secret)| json!({ "kty": "oct", "kid": kid, "k": URL_SAFE_NO_PAD.encode([*secret; 33]) })).collect();
    std::fs::write(path, json!({ "keys": keys }).to_string()).unwrap();
}

async fn proves(keyring: &Keyring, kid: Option<&str>, secret: u8) -> bool {
    keyring.proves(&Signed::parse(&token(kid, secret)).unwrap()).await
}

async fn following(keys: &[(Option<&str>, u8)], refresh: Duration) -> (Arc<Keyring>, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    publish(file.path(), keys);
    let keyring = Keyring::follow(Vec::new(), vec![Source::File(file.path().to_owned())], refresh).await.unwrap();
    (Arc::new(keyring), file)
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_new_is_found_by_the_first_token_that_names_it() {
    let (keyring, file) = following(&[(Some("a"), 1)], HOUR).await;
    publish(file.path(), &[(Some("b"), 2)]);
    assert!(proves(&keyring, Some("a"), 1).await, "nobody has looked yet");
    assert!(proves(&keyring, Some("b"), 2).await);
    assert!(!proves(&keyring, Some("a"), 1).await, "it was taken away");
}

#[tokio::test(start_paused = true)]
async fn made_up_ids_cause_one_load_in_five_seconds() {
    let (keyring, _file) = following(&[(Some("a"), 1)], HOUR).await;
    let began_at = tokio::time::Instant::now();
    let mut storm = tokio::task::JoinSet::new();
    for lane in 0..100 {
        let keyring = Arc::clone(&keyring);
        storm.spawn(async move {
            for number in 0.. {
                if began_at.elapsed() > Duration::from_secs(21) {
                    return;
                }
                assert!(!proves(&keyring, Some(&format!("{lane}-{number}")), 1).await);
            }
        });
    }
    storm.join_all().await;
    let loads = keyring.freshness()[0].loads;
    assert!((4..=7).contains(&loads), "{loads} loads in 21 to 26 s");
}

#[tokio::test(start_paused = true)]
async fn who_cannot_wait_any_more_is_refused_at_once() {
    let (keyring, _file) = following(&[(Some("a"), 1)], HOUR).await;
    let places: Vec<_> = (0..WAITING_MAX).map(|_| keyring.waiting.try_acquire().unwrap()).collect();
    let began_at = tokio::time::Instant::now();
    assert!(!proves(&keyring, Some("b"), 1).await);
    assert!(proves(&keyring, Some("a"), 1).await);
    assert_eq!(began_at.elapsed(), Duration::ZERO);
    drop(places);
}

#[tokio::test(start_paused = true)]
async fn a_set_is_loaded_again_after_its_time() {
    let (keyring, file) = following(&[(Some("a"), 1)], Duration::from_secs(60)).await;
    publish(file.path(), &[(Some("b"), 2)]);
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(!proves(&keyring, Some("a"), 1).await);
}

#[tokio::test(start_paused = true)]
async fn keys_stay_when_a_load_fails() {
    let (keyring, file) = following(&[(Some("a"), 1)], Duration::from_secs(60)).await;
    std::fs::write(file.path(), "<html>").unwrap();
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(proves(&keyring, Some("a"), 1).await);
    let Freshness { loads, failures, age, .. } = keyring.freshness()[0];
    // At 60 s, then after 5, 10, 20, 40 and 60 s.
    assert_eq!((loads, failures), (1, 6));
    assert!(age.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_key_without_an_id_proves_tokens_of_any_and_waits_for_none() {
    let (keyring, _file) = following(&[(None, 1)], HOUR).await;
    let began_at = tokio::time::Instant::now();
    assert!(proves(&keyring, Some("any"), 1).await);
    assert!(proves(&keyring, None, 1).await);
    assert!(!proves(&keyring, None, 2).await);
    assert_eq!(began_at.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn a_file_that_is_not_there_stops_the_start() {
    assert!(Keyring::follow(Vec::new(), vec![Source::File("/nowhere/keys.json".into())], HOUR).await.is_err());
}
