//! By which keys tokens are proven: read once, or followed.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use reqwest::Url;

use super::{Options, within};
use crate::token::{JwksUrl, Key, KeyId, Rules, Secret, Source};

/// A clock that is wrong by more than this is to be set, not to be borne with.
const LEEWAY_S_MAX: u32 = 300;

/// Where the keys for tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySettings {
    secret_file: PathBuf,
    /// Nothing is configured: the secret is the data folder's own.
    is_own_secret: bool,
    has_secret: bool,
    public_key_files: Vec<(Option<KeyId>, PathBuf)>,
    jwks_file: Option<PathBuf>,
    jwks_url: Option<Url>,
    jwks_ca_file: Option<PathBuf>,
    pub jwks_refresh: Duration,
}

impl KeySettings {
    pub(super) fn settle(nearer: &Options, file: &Options, data_dir: &Path) -> anyhow::Result<Self> {
        let secret_file = nearer.jwt_secret_file.clone().or_else(|| file.jwt_secret_file.clone());
        let public_keys = nearer.jwt_public_key_file.as_ref().or(file.jwt_public_key_file.as_ref());
        let jwks_file = nearer.jwt_jwks_file.clone().or_else(|| file.jwt_jwks_file.clone());
        let jwks_url = match nearer.jwt_jwks_url.as_ref().or(file.jwt_jwks_url.as_ref()) {
            Some(text) => Some(url(text)?),
            None => None,
        };
        let jwks_ca_file = nearer.jwt_jwks_ca_file.clone().or_else(|| file.jwt_jwks_ca_file.clone());
        ensure!(jwks_ca_file.is_none() || jwks_url.is_some(), "jwt-jwks-ca-file is for jwt-jwks-url, which is not given");
        let refresh_s = nearer.jwt_jwks_refresh_s.or(file.jwt_jwks_refresh_s).unwrap_or(300);
        let public_key_files = public_keys.into_iter().flatten().map(|text| named(text)).collect::<anyhow::Result<Vec<_>>>()?;
        let is_own_secret = secret_file.is_none() && public_key_files.is_empty() && jwks_file.is_none() && jwks_url.is_none();
        Ok(Self {
            has_secret: is_own_secret || secret_file.is_some(),
            secret_file: secret_file.unwrap_or_else(|| data_dir.join("jwt-secret")),
            is_own_secret,
            public_key_files,
            jwks_file,
            jwks_url,
            jwks_ca_file,
            jwks_refresh: Duration::from_secs(u64::from(within("jwt-jwks-refresh-s", refresh_s, 1, 86400)?)),
        })
    }

    /// Where the secret is, or will be made.
    pub fn secret_file(&self) -> &Path {
        &self.secret_file
    }

    /// Whether `serve` makes the secret when it is not there.
    pub const fn is_own_secret(&self) -> bool {
        self.is_own_secret
    }

    /// The secret that `serve` uses. Fails if it uses none, or if there is none yet.
    pub fn secret(&self) -> anyhow::Result<Secret> {
        let shown = self.secret_file.display();
        ensure!(self.has_secret, "tokens are proven by public keys here: give --private-key-file");
        let is_missing = self.is_own_secret && matches!(self.secret_file.try_exists(), Ok(false));
        ensure!(!is_missing, "there is no {shown} yet: `mayfly serve` makes it, or give --jwt-secret-file");
        Secret::read(&self.secret_file)
    }

    /// The keys that are read once.
    pub fn fixed(&self) -> anyhow::Result<Vec<Key>> {
        let mut keys = Vec::new();
        if self.has_secret {
            keys.push(Key::secret(&self.secret()?));
        }
        for (id, path) in &self.public_key_files {
            keys.push(Key::read_public(path, id.clone())?);
        }
        Ok(keys)
    }

    /// The sets that are followed.
    pub fn sources(&self) -> anyhow::Result<Vec<Source>> {
        let mut sources = Vec::new();
        sources.extend(self.jwks_file.clone().map(Source::File));
        if let Some(url) = &self.jwks_url {
            sources.push(Source::Url(JwksUrl::new(url.clone(), self.jwks_ca_file.as_deref())?));
        }
        Ok(sources)
    }
}

/// What tokens must say.
pub(super) fn rules(nearer: &Options, file: &Options) -> anyhow::Result<Rules> {
    let usual = Rules::default();
    let leeway_s = nearer.jwt_leeway_s.or(file.jwt_leeway_s).unwrap_or(usual.leeway_s);
    let text = |nearer: &Option<String>, file: &Option<String>| nearer.clone().or_else(|| file.clone());
    Ok(Rules {
        audience: text(&nearer.jwt_audience, &file.jwt_audience).unwrap_or(usual.audience),
        issuer: text(&nearer.jwt_issuer, &file.jwt_issuer),
        tenant_claim: text(&nearer.tenant_claim, &file.tenant_claim).unwrap_or(usual.tenant_claim),
        subject_claim: text(&nearer.subject_claim, &file.subject_claim).unwrap_or(usual.subject_claim),
        scope_claim: text(&nearer.scope_claim, &file.scope_claim).unwrap_or(usual.scope_claim),
        leeway_s: within("jwt-leeway-s", leeway_s, 0, LEEWAY_S_MAX)?,
    })
}

/// `PATH`, or `KID=PATH`: no path that begins with a slash is taken for the latter.
fn named(text: &str) -> anyhow::Result<(Option<KeyId>, PathBuf)> {
    match text.split_once('=') {
        Some((kid, path)) if !kid.contains('/') => {
            Ok((Some(kid.parse().with_context(|| format!("jwt-public-key-file: {text}"))?), path.into()))
        }
        _ => Ok((None, text.into())),
    }
}

/// The error does not repeat the text, which may hold a password.
fn url(text: &str) -> anyhow::Result<Url> {
    let url: Url = text.parse().context("jwt-jwks-url")?;
    ensure!(["http", "https"].contains(&url.scheme()), "jwt-jwks-url: {} is neither http nor https", url.scheme());
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(options: Options) -> anyhow::Result<KeySettings> {
        KeySettings::settle(&options, &Options::default(), Path::new("/data"))
    }

    #[test]
    fn a_secret_is_made_only_where_no_key_is_configured() {
        assert!(settle(Options::default()).unwrap().is_own_secret());
        let public = settle(Options { jwt_jwks_url: Some("https://issuer/keys".into()), ..Options::default() }).unwrap();
        assert!(!public.is_own_secret());
        assert!(public.secret().unwrap_err().to_string().contains("--private-key-file"));
    }

    #[test]
    fn a_public_key_may_have_an_id() {
        assert_eq!(named("k1=/etc/key.pem").unwrap(), (Some("k1".parse().unwrap()), "/etc/key.pem".into()));
        assert_eq!(named("/etc/a=b.pem").unwrap(), (None, "/etc/a=b.pem".into()));
        assert!(named("=/etc/key.pem").is_err());
    }

    #[test]
    fn an_issuer_is_asked_by_http_or_https() {
        for bad in ["ftp://issuer/keys", "issuer/keys", ""] {
            let options = Options { jwt_jwks_url: Some(bad.into()), ..Options::default() };
            assert!(settle(options).unwrap_err().to_string().contains("jwt-jwks-url"), "{bad}");
        }
    }

    #[test]
    fn a_clock_may_not_be_wrong_by_any_time() {
        let options = Options { jwt_leeway_s: Some(301), ..Options::default() };
        assert!(rules(&options, &Options::default()).unwrap_err().to_string().contains("0 to 300"));
    }
}
