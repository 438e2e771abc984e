//! Where sets of keys come from that may change while the service runs: a file, or an issuer's URL.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use reqwest::{Certificate, Client, StatusCode, Url, redirect};

use super::{
    jwks::{self, Secrets},
    key::Key,
};

/// The largest set that is read: keys with long certificate chains have some kilobytes each.
const SET_BYTES_MAX: usize = 256 * 1024;
/// From the name's lookup to the body's last byte.
const FETCH_DEADLINE: Duration = Duration::from_secs(5);

/// A set of keys that is read again and again.
#[derive(Debug)]
pub enum Source {
    File(PathBuf),
    Url(JwksUrl),
}

/// An issuer's published set, and a client for nothing else.
#[derive(Debug)]
pub struct JwksUrl {
    url: Url,
    client: Client,
}

impl JwksUrl {
    /// With `ca_file`, only what a certificate in it vouches for is taken for the issuer.
    pub fn new(url: Url, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let mut builder = Client::builder()
            // Who may redirect the request may choose the keys.
            .redirect(redirect::Policy::none())
            .timeout(FETCH_DEADLINE)
            .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = ca_file {
            let shown = || format!("the certificates in {}", path.display());
            let pem = std::fs::read(path).with_context(shown)?;
            let certificates = Certificate::from_pem_bundle(&pem).with_context(shown)?;
            ensure!(!certificates.is_empty(), "{}: there is none", path.display());
            builder = builder.tls_certs_only(certificates);
        }
        Ok(Self { url, client: builder.build().context("a client for the issuer's keys")? })
    }

    async fn fetch(&self) -> anyhow::Result<Vec<u8>> {
        let mut response = self.client.get(self.url.clone()).header("accept", "application/json").send().await?;
        ensure!(response.status() == StatusCode::OK, "the issuer answered {}", response.status());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            ensure!(body.len() + chunk.len() <= SET_BYTES_MAX, "the set has more than {SET_BYTES_MAX} bytes");
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

impl Source {
    /// The keys that are there now.
    pub(super) async fn load(&self) -> anyhow::Result<Vec<Key>> {
        match self {
            Self::File(path) => {
                let set = read(path).with_context(|| format!("reading {}", path.display()))?;
                jwks::parse(&set, Secrets::Taken).with_context(|| path.display().to_string())
            }
            Self::Url(source) => {
                // The URL may hold a password; whoever reads the log knows which issuer is configured.
                let set = source.fetch().await.map_err(without_url).context("asking the issuer for its keys")?;
                jwks::parse(&set, Secrets::PassedOver).context("the issuer's keys")
            }
        }
    }

    /// As metrics and the log call it.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Url(_) => "url",
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut set = Vec::new();
    let bound = u64::try_from(SET_BYTES_MAX)? + 1;
    File::open(path)?.take(bound).read_to_end(&mut set)?;
    ensure!(set.len() <= SET_BYTES_MAX, "the set has more than {SET_BYTES_MAX} bytes");
    Ok(set)
}

fn without_url(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<reqwest::Error>() {
        Ok(error) => error.without_url().into(),
        Err(error) => error,
    }
}
