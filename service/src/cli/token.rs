//! `mayfly token`: signs a token with the secret that `serve` uses, a given one, or a private key.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;

use crate::{
    clock::Clock,
    config::Options,
    token::{Claims, KeyId, Scopes, Signer},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Whose sandboxes and images the token is good for
    #[arg(long)]
    tenant: String,
    /// The user inside the tenant
    #[arg(long)]
    sub: String,
    /// What it allows, with blanks between: runs, sandboxes:read, sandboxes:write, images:read, images:write, volumes, webhooks, metrics:read, admin (all of them)
    #[arg(long, default_value = "runs sandboxes:read sandboxes:write images:read images:write volumes webhooks metrics:read")]
    scope: Scopes,
    /// How long it is good: a number with s, m, h or d
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    ttl: u32,
    #[command(flatten)]
    key: Key,
}

/// Where the key is, and what else must be as `serve` has it.
#[derive(Debug, Default, Args)]
pub(super) struct Key {
    /// TOML file with the settings of `serve`
    #[arg(long, env = "MAYFLY_CONFIG", value_name = "PATH")]
    config: Option<PathBuf>,
    /// Data folder of `serve` [default: /var/lib/mayfly]
    #[arg(long, env = "MAYFLY_DATA_DIR", value_name = "PATH")]
    data_dir: Option<PathBuf>,
    /// File with the secret [default: jwt-secret in the data folder]
    #[arg(long, env = "MAYFLY_JWT_SECRET_FILE", value_name = "PATH")]
    jwt_secret_file: Option<PathBuf>,
    /// PEM file with a private key to sign with instead: RSA (RS256), P-256 (ES256) or Ed25519 (EdDSA), as `openssl genpkey` writes it
    #[arg(long, env = "MAYFLY_PRIVATE_KEY_FILE", value_name = "PATH", conflicts_with = "jwt_secret_file")]
    private_key_file: Option<PathBuf>,
    /// The token's `kid`: what `serve` knows the key by [default: none]
    #[arg(long, env = "MAYFLY_KID", value_name = "TEXT")]
    kid: Option<KeyId>,
    /// The token's `iss` [default: none]
    #[arg(long, env = "MAYFLY_JWT_ISSUER", value_name = "TEXT")]
    jwt_issuer: Option<String>,
    /// The token's `aud` [default: mayfly]
    #[arg(long, env = "MAYFLY_JWT_AUDIENCE", value_name = "TEXT")]
    jwt_audience: Option<String>,
    /// Name of the claim that holds the tenant [default: tenant]
    #[arg(long, env = "MAYFLY_TENANT_CLAIM", value_name = "NAME")]
    tenant_claim: Option<String>,
    /// Name of the claim that holds the user [default: sub]
    #[arg(long, env = "MAYFLY_SUBJECT_CLAIM", value_name = "NAME")]
    subject_claim: Option<String>,
    /// Name of the claim that holds the scopes [default: scope]
    #[arg(long, env = "MAYFLY_SCOPE_CLAIM", value_name = "NAME")]
    scope_claim: Option<String>,
}

impl Key {
    /// Signs these claims, for so many seconds from now.
    pub(super) fn sign(self, claims: &Claims, ttl_s: u32) -> anyhow::Result<String> {
        let options = Options {
            config: self.config,
            data_dir: self.data_dir,
            jwt_secret_file: self.jwt_secret_file,
            jwt_issuer: self.jwt_issuer,
            jwt_audience: self.jwt_audience,
            tenant_claim: self.tenant_claim,
            subject_claim: self.subject_claim,
            scope_claim: self.scope_claim,
            ..Options::default()
        };
        let settings = options.settle()?;
        let signer = match &self.private_key_file {
            Some(path) => Signer::read_private(path, self.kid, settings.token_rules)?,
            None => Signer::with_secret(&settings.keys.secret()?, self.kid, settings.token_rules),
        };
        signer.sign(claims, Clock::System.now_unix_s(), ttl_s)
    }
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { tenant, sub, scope, ttl, key } = arguments;
    super::print(key.sign(&Claims { tenant, subject: sub, scopes: scope }, ttl)?)
}

/// Seconds from a text as in `90s`, `15m`, `1h`, `7d`.
fn parse_ttl(text: &str) -> anyhow::Result<u32> {
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).unwrap_or_default();
    let unit_s: u32 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => anyhow::bail!("a number with s, m, h or d, as in 1h"),
    };
    let number: u32 = number.parse().context("a number with s, m, h or d, as in 1h")?;
    let seconds = number.checked_mul(unit_s).context("that is too long")?;
    ensure!(seconds > 0, "that is over at once");
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::{self, Keyring, Rules, Secret, Verifier};

    #[test]
    fn a_ttl_has_a_unit() {
        assert_eq!(parse_ttl("90s").unwrap(), 90);
        assert_eq!(parse_ttl("1h").unwrap(), 3600);
        assert_eq!(parse_ttl("7d").unwrap(), 604_800);
    }

    #[test]
    fn what_is_no_ttl_is_refused() {
        for text in ["", "1", "h", "-1h", "0s", "1.5h", "1 h", "99999999d", "1ü"] {
            assert!(parse_ttl(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn the_same_secret_and_folder_as_serves_make_a_good_token() {
        let folder = tempfile::tempdir().unwrap();
        let secret = Secret::create(&folder.path().join("jwt-secret"), None).unwrap().unwrap();
        let key = Key { data_dir: Some(folder.path().to_owned()), jwt_audience: Some("other".into()), ..Key::default() };
        let claims = Claims { tenant: "acme".into(), subject: "alice".into(), scopes: "runs".parse().unwrap() };
        let token = key.sign(&claims, 60).unwrap();

        let rules = Rules { audience: "other".into(), ..Rules::default() };
        let verifier = Verifier::new(Keyring::fixed(vec![token::Key::secret(&secret)]), rules);
        assert_eq!(verifier.verify(&token, Clock::System.now_unix_s()).await, Ok(claims));
    }
}
