//! What webhooks are signed with: secrets that are made of one key and stored nowhere, and signatures as Standard Webhooks has them.

use std::{fmt, path::Path};

use aws_lc_rs::hmac::{self, HMAC_SHA256};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::token::Secret;

/// What the text of every secret begins with.
const PREFIX: &str = "whsec_";

/// The key that the secrets of all webhooks are made of. Who reads the database alone can sign nothing.
#[derive(Clone)]
pub struct SigningKey {
    key: hmac::Key,
    id: String,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What one webhook is signed with for a time.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookSecret([u8; 32]);

impl fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookSecret")
    }
}

impl SigningKey {
    /// The key in this file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        Ok(Self::new(Secret::read(path)?.as_bytes()))
    }

    fn new(bytes: &[u8]) -> Self {
        let digest = Sha256::new().chain_update(b"mayfly webhook key\n").chain_update(bytes).finalize();
        Self { key: hmac::Key::new(HMAC_SHA256, bytes), id: hex::encode(&digest[..8]) }
    }

    /// Tells this key from others, and says nothing of it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The secret of this webhook, the so-manieth.
    pub fn secret(&self, webhook: Uuid, version: u32) -> WebhookSecret {
        let name = format!("mayfly webhook secret\n{webhook}\n{version}");
        let mut bytes = [0; 32];
        bytes.copy_from_slice(hmac::sign(&self.key, name.as_bytes()).as_ref());
        WebhookSecret(bytes)
    }
}

impl WebhookSecret {
    /// As receivers are told it.
    pub fn text(&self) -> String {
        format!("{PREFIX}{}", BASE64.encode(self.0))
    }

    /// The signature of one attempt, for the header `webhook-signature`.
    pub fn sign(&self, id: Uuid, timestamp_s: i64, body: &str) -> String {
        let mut context = hmac::Context::with_key(&hmac::Key::new(HMAC_SHA256, &self.0));
        context.update(format!("{id}.{timestamp_s}.").as_bytes());
        context.update(body.as_bytes());
        format!("v1,{}", BASE64.encode(context.sign()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_as_the_specification_has_it() {
        // By `printf %s "$id.1700000000.{}" | openssl dgst -sha256 -mac HMAC -macopt hexkey:… -binary | base64`, with 32 bytes of 07.
        let signed = WebhookSecret([7; 32]).sign(Uuid::nil(), 1_700_000_000, "{}");
        assert_eq!(signed, "v1,ZxvsOzYV/OpNsXv3s5jH6WUZOCIv7ONToQakPTt2CAM=");
    }

    #[test]
    fn every_webhook_and_every_version_has_its_own_secret() {
        let (key, other) = (SigningKey::new(&[1; 32]), SigningKey::new(&[2; 32]));
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let secrets = [key.secret(one, 1), key.secret(one, 2), key.secret(two, 1), other.secret(one, 1)];
        let texts: std::collections::BTreeSet<_> = secrets.iter().map(WebhookSecret::text).collect();
        assert_eq!(texts.len(), 4);
        assert_eq!(key.secret(one, 1), SigningKey::new(&[1; 32]).secret(one, 1));
        assert_ne!(key.id(), other.id());
    }

    #[test]
    fn no_debug_print_shows_a_secret() {
        let key = SigningKey::new(b"correct horse battery staple, long enough");
        assert!(!format!("{key:?} {:?}", key.secret(Uuid::nil(), 1)).contains("horse"));
    }
}
