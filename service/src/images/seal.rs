//! Passwords for registries, sealed with a key that the database does not have.

use std::{fmt, path::Path, sync::Arc};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hmac::{self, HMAC_SHA256},
};

use crate::{sandbox::TenantId, token::Secret};

/// The key that passwords are sealed with. Who reads the database alone can log in nowhere.
#[derive(Clone)]
pub struct SealingKey {
    key: Arc<RandomizedNonceKey>,
    sums: hmac::Key,
    id: String,
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealingKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Whose password it is, and where. What was sealed for one opens for no other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) tenant: &'a TenantId,
    pub(super) registry: &'a str,
    pub(super) username: &'a str,
}

impl Place<'_> {
    fn bytes(self) -> Vec<u8> {
        serde_json::json!([self.tenant.as_str(), self.registry, self.username]).to_string().into_bytes()
    }
}

impl SealingKey {
    /// The key in this file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        Self::new(Secret::read(path)?.as_bytes())
    }

    fn new(bytes: &[u8]) -> anyhow::Result<Self> {
        let key = hmac::Key::new(HMAC_SHA256, bytes);
        let (sealing, name) = (hmac::sign(&key, b"mayfly registry passwords\n"), hmac::sign(&key, b"mayfly registry key's name\n"));
        let sums = hmac::Key::new(HMAC_SHA256, hmac::sign(&key, b"mayfly sums of what holds passwords\n").as_ref());
        let sealing = RandomizedNonceKey::new(&AES_256_GCM, sealing.as_ref()).map_err(|_| anyhow::anyhow!("AES has no such key"))?;
        Ok(Self { key: Arc::new(sealing), sums, id: hex::encode(&name.as_ref()[..8]) })
    }

    /// Tells what holds a password from anything else, to nobody who has not this key: a plain sum of it would let passwords be tried.
    pub(super) fn sum(&self, text: &[u8]) -> [u8; 32] {
        let mut sum = [0; 32];
        sum.copy_from_slice(hmac::sign(&self.sums, text).as_ref());
        sum
    }

    /// Tells this key from others, and says nothing of it.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The nonce, which is random, and behind it what AES-256-GCM makes of the password.
    pub(super) fn seal(&self, place: Place<'_>, password: &str) -> anyhow::Result<Vec<u8>> {
        let mut text = password.as_bytes().to_vec();
        let nonce = self.key.seal_in_place_append_tag(Aad::from(place.bytes()), &mut text);
        let nonce = nonce.map_err(|_| anyhow::anyhow!("a password could not be sealed"))?;
        Ok([&nonce.as_ref()[..], &text].concat())
    }

    /// The password; `None`: it was sealed with another key, or for another place, or is damaged.
    pub(super) fn open(&self, place: Place<'_>, sealed: &[u8]) -> Option<String> {
        let (nonce, text) = sealed.split_at_checked(NONCE_LEN)?;
        let mut text = text.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let opened = self.key.open_in_place(nonce, Aad::from(place.bytes()), &mut text).ok()?;
        String::from_utf8(opened.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_at_its_place_and_nowhere_else() {
        let (key, other) = (SealingKey::new(&[1; 32]).unwrap(), SealingKey::new(&[2; 32]).unwrap());
        let (acme, evil) = (TenantId::proven("acme".into()), TenantId::proven("evil".into()));
        let place = Place { tenant: &acme, registry: "registry.example", username: "me" };

        let sealed = key.seal(place, "correct horse").unwrap();

        assert_eq!(SealingKey::new(&[1; 32]).unwrap().open(place, &sealed).as_deref(), Some("correct horse"));
        assert_ne!(key.seal(place, "correct horse").unwrap(), sealed, "nobody sees that two are the same");
        assert_eq!(other.open(place, &sealed), None);
        assert_eq!(key.open(Place { tenant: &evil, ..place }, &sealed), None);
        assert_eq!(key.open(Place { registry: "other.example", ..place }, &sealed), None);
        assert_eq!(key.open(Place { username: "you", ..place }, &sealed), None);
        assert_eq!(key.open(place, &sealed[..sealed.len() - 1]), None);
        assert_eq!(key.open(place, b"short"), None);
        assert!(!sealed.windows(5).any(|part| part == b"horse"));
        assert_ne!(key.id(), other.id());
        assert_eq!(key.sum(b"a"), SealingKey::new(&[1; 32]).unwrap().sum(b"a"));
        assert!(key.sum(b"a") != other.sum(b"a") && key.sum(b"a") != key.sum(b"b"));
    }
}
