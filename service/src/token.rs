//! Who is calling and what they may do: signed tokens (JWT), made and checked.
//!
//! A token is believed in two steps: [`Verifier`] finds the key that it names and proves its signature by that key's own algorithm; only then
//! do [`Rules`] look at what it says.

mod claims;
mod jwks;
mod key;
mod keyring;
mod scope;
mod secret;
mod signer;
mod source;

pub use claims::{Claims, NameInvalid, Rules, is_name};
pub use key::{Key, KeyId};
pub use keyring::{Freshness, Keyring};
pub use scope::{Scope, Scopes, UnknownScope};
pub use secret::Secret;
pub use signer::Signer;
pub use source::{JwksUrl, Source};

/// The longest token. Those of identity providers with many groups in them have some thousand bytes.
const TOKEN_BYTES_MAX: usize = 8192;

/// Why a token is not accepted, for people. Whoever sent it can do nothing but send another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Nobody whom we trust signed it, or nobody can tell: whoever made it up learns no more than that.
    #[error("the token is not valid")]
    Unproven,
    /// Somebody whom we trust signed it, but it does not say what it must.
    #[error("{0}")]
    Refused(&'static str),
}

/// Checks tokens against keys and rules.
#[derive(Debug)]
pub struct Verifier {
    keyring: Keyring,
    rules: Rules,
}

impl Verifier {
    pub const fn new(keyring: Keyring, rules: Rules) -> Self {
        Self { keyring, rules }
    }

    /// What the token says, if one of our keys signed it, for us, and it is valid at this time. Waits some seconds at the most, and only for a
    /// key that is not known yet.
    pub async fn verify(&self, token: &str, now_unix_s: i64) -> Result<Claims, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Unproven);
        }
        let signed = key::Signed::parse(token).ok_or(TokenError::Unproven)?;
        if !self.keyring.proves(&signed).await {
            return Err(TokenError::Unproven);
        }
        self.rules.read(&signed.claims().ok_or(TokenError::Refused("the token's claims are not a JSON object"))?, now_unix_s)
    }

    /// How old the keys are that are loaded from elsewhere.
    pub fn freshness(&self) -> Vec<Freshness> {
        self.keyring.freshness()
    }
}

#[cfg(test)]
mod tests;
