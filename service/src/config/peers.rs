//! Where other nodes reach this one, and how it knows them when it reaches them.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use reqwest::Url;
use tokio_rustls::rustls::pki_types::ServerName;

use super::{Options, given};

/// How nodes reach one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerSettings {
    /// Where this node's API is for the others: scheme, host and port, and nothing behind them.
    pub address: String,
    /// Whether tokens may go to other nodes by plain HTTP.
    pub is_http_allowed: bool,
    /// The only authorities that may vouch for other nodes, in PEM. `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// The name that the certificates of all nodes bear. `None`: that of its address, each.
    pub tls_name: Option<ServerName<'static>>,
}

/// `None` where this node is alone.
pub(super) fn settle(nearer: &Options, file: &Options) -> anyhow::Result<Option<PeerSettings>> {
    let Some(text) = given(nearer.peer_address.clone()).or_else(|| given(file.peer_address.clone())) else { return Ok(None) };
    let is_http_allowed = nearer.peer_http.or(file.peer_http).unwrap_or(false);
    let name = given(nearer.peer_tls_name.clone()).or_else(|| given(file.peer_tls_name.clone()));
    let tls_name = name.map(|name| ServerName::try_from(name).context("peer-tls-name: no name of a host")).transpose()?;
    Ok(Some(PeerSettings {
        address: address(&text, is_http_allowed).context("peer-address")?,
        is_http_allowed,
        ca_file: nearer.peer_ca_file.clone().or_else(|| file.peer_ca_file.clone()),
        tls_name,
    }))
}

/// A base URL that leads to one node and nowhere below it. Nodes read it out of the database, and send tokens there.
fn address(text: &str, is_http_allowed: bool) -> anyhow::Result<String> {
    // It may hold what is secret, which no error shows.
    let url: Url = text.parse().context("no URL, as in https://10.0.0.1:8080")?;
    match url.scheme() {
        "https" => {}
        "http" => ensure!(is_http_allowed, "tokens would travel by plain http: give peer-http, if nobody listens between nodes"),
        other => anyhow::bail!("{other} is neither https nor http"),
    }
    let is_bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
    ensure!(
        is_bare && url.username().is_empty() && url.password().is_none(),
        "more than a scheme, a host and a port, as in https://10.0.0.1:8080"
    );
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let is_any = host.parse().is_ok_and(|address: std::net::IpAddr| address.is_unspecified());
    ensure!(!is_any, "{host} is where a node listens, not where others reach it");
    ensure!(url.port_or_known_default() != Some(0), "no port, but 0");
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(address: &str, is_http_allowed: bool) -> anyhow::Result<Option<PeerSettings>> {
        let options = Options { peer_address: Some(address.to_owned()), peer_http: Some(is_http_allowed), ..Options::default() };
        settle(&options, &Options::default())
    }

    #[test]
    fn an_address_is_a_scheme_a_host_and_a_port() {
        assert_eq!(of("", false).unwrap(), None);
        assert_eq!(of("https://node-1.example:8443/", false).unwrap().unwrap().address, "https://node-1.example:8443");
        for bad in [
            "node-1:8080",
            "https://",
            "ftp://a",
            "https://me@a",
            "https://:pw@a",
            "https://a/below",
            "https://a/?b",
            "https://a/#c",
            "https://0.0.0.0:8080",
            "https://[::]:8080",
            "https://a:0",
        ] {
            let error = format!("{:#}", of(bad, true).unwrap_err());
            assert!(error.contains("peer-address") && !error.contains("pw"), "{bad}: {error}");
        }
    }

    #[test]
    fn tokens_go_by_plain_http_only_where_that_is_wanted() {
        assert!(format!("{:#}", of("http://10.0.0.1:8080", false).unwrap_err()).contains("peer-http"));
        assert_eq!(of("http://10.0.0.1:8080", true).unwrap().unwrap().address, "http://10.0.0.1:8080");
    }

    #[test]
    fn a_name_for_certificates_is_one() {
        let named = |name: &str| {
            let options = Options { peer_address: Some("https://a".into()), peer_tls_name: Some(name.into()), ..Options::default() };
            settle(&options, &Options::default())
        };
        assert!(named("nodes.example").unwrap().unwrap().tls_name.is_some());
        assert!(format!("{:#}", named("no name").unwrap_err()).contains("peer-tls-name"));
    }
}
