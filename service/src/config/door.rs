//! How the API meets its clients: encryption, origins of browsers, and how much patience it has.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail, ensure};
use axum::http::HeaderValue;
use reqwest::Url;

use super::{Options, within};

/// The files that TLS needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The service's certificate and those between it and its authority, in PEM.
    pub cert: PathBuf,
    /// In PEM.
    pub key: PathBuf,
}

/// What holds for every request to the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoorSettings {
    /// `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Pages of these origins may call the API from a browser.
    pub cors_origins: Vec<HeaderValue>,
    /// Connections at one time.
    pub connections_max: usize,
    /// How long a client may take for the head of a request, and for the handshake of TLS.
    pub head_deadline: Duration,
    /// How long for a body; it has a second more for each 16 KiB.
    pub body_deadline: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_deadline: Duration,
}

impl DoorSettings {
    pub(super) fn settle(nearer: &Options, file: &Options) -> anyhow::Result<Self> {
        let cert = nearer.tls_cert.clone().or_else(|| file.tls_cert.clone());
        let key = nearer.tls_key.clone().or_else(|| file.tls_key.clone());
        let tls = match (cert, key) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
            (None, None) => None,
            (Some(_), None) => bail!("tls-cert is given and tls-key is not"),
            (None, Some(_)) => bail!("tls-key is given and tls-cert is not"),
        };
        let origins = nearer.cors_origin.as_ref().or(file.cors_origin.as_ref());
        let connections = nearer.connections_max.or(file.connections_max).unwrap_or(4096);
        let seconds = |name, given: Option<u32>, usual, max| -> anyhow::Result<Duration> {
            Ok(Duration::from_secs(u64::from(within(name, given.unwrap_or(usual), 1, max)?)))
        };
        Ok(Self {
            tls,
            cors_origins: origins.into_iter().flatten().map(|text| origin(text)).collect::<anyhow::Result<_>>()?,
            connections_max: usize::try_from(within("connections-max", connections, 1, 1 << 20)?)?,
            head_deadline: seconds("head-timeout-s", nearer.head_timeout_s.or(file.head_timeout_s), 10, 300)?,
            body_deadline: seconds("body-timeout-s", nearer.body_timeout_s.or(file.body_timeout_s), 60, 3600)?,
            write_deadline: seconds("write-timeout-s", nearer.write_timeout_s.or(file.write_timeout_s), 60, 3600)?,
        })
    }
}

/// An origin as browsers send it (RFC 6454, 6.2). A star or a pattern is none: who may call is named.
fn origin(text: &str) -> anyhow::Result<HeaderValue> {
    let as_sent = text.parse::<Url>().map(|url| url.origin().ascii_serialization());
    ensure!(as_sent.is_ok_and(|sent| sent == text), "cors-origin: {text:?} is no origin, as in https://app.example.com");
    HeaderValue::from_str(text).context("cors-origin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_exact() {
        for good in ["https://app.example.com", "http://127.0.0.1:3000"] {
            assert!(origin(good).is_ok(), "{good}");
        }
        for bad in ["*", "null", "", "https://*.example.com/", "https://app.example.com/", "https://app.example.com:443", "app.example.com"]
        {
            assert!(origin(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_certificate_without_its_key_is_told() {
        let options = Options { tls_cert: Some("/cert".into()), ..Options::default() };
        assert!(DoorSettings::settle(&options, &Options::default()).unwrap_err().to_string().contains("tls-key"));
    }
}
