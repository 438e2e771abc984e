//! Where this service connects to on a tenant's word, for webhooks and registries: public addresses, and networks that the operator names.
//!
//! A tenant chooses the target, and this service stands where tenants do not: beside its own database, the metadata of its cloud, other people's
//! printers. What a name leads to is looked up by us, for each attempt anew, and the connection goes to the very address that was looked at: a name
//! that leads elsewhere a moment later gains nothing. Redirects are not followed, and no proxy is asked.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};

/// The longest URL of a webhook's target.
pub const URL_BYTES_MAX: usize = 2048;

/// IPv4 that is not public: IANA's special-purpose registry (RFC 6890 and its successors), multicast, and reserved.
const CLOSED_V4: [(Ipv4Addr, u8); 18] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Link-local, with the metadata of most clouds.
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 31, 196, 0), 24),
    (Ipv4Addr::new(192, 52, 193, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(192, 175, 48, 0), 24),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    // Multicast, reserved and broadcast.
    (Ipv4Addr::new(224, 0, 0, 0), 3),
    // Public by its number, and yet what Azure answers its own machines with.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
];

/// What is not public of the one IPv6 block that is (2000::/3): protocol assignments with Teredo and ORCHID, documentation, 6to4.
const CLOSED_V6: [(Ipv6Addr, u8); 5] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0), 48),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Decides which targets are taken.
#[derive(Debug, Clone)]
pub struct Targets(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    allowed: Vec<IpNet>,
    is_http_allowed: bool,
}

/// A name led nowhere that we go to. Which address it was is not the tenant's to learn.
#[derive(Debug, thiserror::Error)]
#[error("the target's address is not a public one")]
pub(crate) struct NotPublic;

impl Targets {
    /// Public addresses, and these.
    pub fn new(allowed: Vec<IpNet>, is_http_allowed: bool) -> Self {
        Self(Arc::new(Rules { allowed, is_http_allowed }))
    }

    /// A webhook's target as it will be called. The error says what is wrong with it.
    pub fn check(&self, text: &str) -> Result<Url, String> {
        if text.len() > URL_BYTES_MAX {
            return Err(format!("a URL has at most {URL_BYTES_MAX} bytes"));
        }
        let url: Url = text.parse().map_err(|error| format!("not a URL: {error}"))?;
        match url.scheme() {
            "https" => {}
            "http" if self.0.is_http_allowed => {}
            _ => return Err(format!("a target is https{}", if self.0.is_http_allowed { " or http" } else { "" })),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("a target holds no name and no password: what is sent is signed".to_owned());
        }
        if url.fragment().is_some() {
            return Err("a target has no fragment".to_owned());
        }
        let port = url.port_or_known_default().unwrap_or_default();
        if !matches!(port, 80 | 443 | 1024..) {
            return Err("a target's port is 80, 443, or 1024 and more".to_owned());
        }
        if url.as_str().len() > URL_BYTES_MAX {
            return Err(format!("a URL has at most {URL_BYTES_MAX} bytes"));
        }
        self.check_literal(&url).map_err(|error| error.to_string())?;
        Ok(url)
    }

    /// Addresses in the place of names are looked up by nobody; whatever their spelling, the URL's parser has made numbers of them.
    pub(crate) fn check_literal(&self, url: &Url) -> Result<(), NotPublic> {
        let host = url.host_str().ok_or(NotPublic)?;
        let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse() else { return Ok(()) };
        if self.permit(address) { Ok(()) } else { Err(NotPublic) }
    }

    /// Whether this address may be connected to.
    fn permit(&self, address: IpAddr) -> bool {
        // `::ffff:127.0.0.1` is 127.0.0.1.
        let address = address.to_canonical();
        is_public(address) || self.0.allowed.iter().any(|network| network.contains(&address))
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !CLOSED_V4.iter().any(|(network, length)| u32::from(address) >> (32 - length) == u32::from(*network) >> (32 - length))
        }
        IpAddr::V6(address) => {
            let begins_with =
                |network: Ipv6Addr, length: u8| u128::from(address) >> (128 - length) == u128::from(network) >> (128 - length);
            begins_with(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3)
                && !CLOSED_V6.iter().any(|(network, length)| begins_with(*network, *length))
        }
    }
}

impl Resolve for Targets {
    /// The permitted ones of a name's addresses.
    fn resolve(&self, name: Name) -> Resolving {
        let targets = self.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let permitted: Vec<SocketAddr> = found.filter(|address| targets.permit(address.ip())).collect();
            if permitted.is_empty() {
                return Err(NotPublic.into());
            }
            Ok(Box::new(permitted.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(allowed: &[&str]) -> Targets {
        Targets::new(allowed.iter().map(|network| network.parse().unwrap()).collect(), true)
    }

    #[test]
    fn nothing_that_is_not_public_is_connected_to() {
        let closed = [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ];
        for address in closed {
            assert!(!targets(&[]).permit(address.parse().unwrap()), "{address}");
        }
        for address in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450::1",
            "::ffff:1.1.1.1",
        ] {
            assert!(targets(&[]).permit(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn what_the_operator_names_is_permitted_and_nothing_beside_it() {
        let targets = targets(&["127.0.0.0/8", "fd00::/16"]);
        for (address, is_permitted) in
            [("127.0.0.1", true), ("::ffff:127.9.9.9", true), ("fd00::1", true), ("10.0.0.1", false), ("::1", false)]
        {
            assert_eq!(targets.permit(address.parse().unwrap()), is_permitted, "{address}");
        }
    }

    #[test]
    fn addresses_are_known_in_every_spelling() {
        for host in [
            "127.0.0.1",
            "127.1",
            "0x7f000001",
            "2130706433",
            "017700000001",
            "0x7f.0.0.1",
            "[::1]",
            "[::ffff:7f00:1]",
            "[0:0:0:0:0:0:0:1]",
            "0",
        ] {
            let url = format!("https://{host}/");
            assert_eq!(targets(&[]).check(&url).unwrap_err(), NotPublic.to_string(), "{url}");
        }
        assert_eq!(targets(&["127.0.0.0/8"]).check("http://0x7f000001:8080/a?b").unwrap().as_str(), "http://127.0.0.1:8080/a?b");
    }

    #[test]
    fn a_target_is_a_plain_url_of_a_port_for_such() {
        for bad in [
            "",
            "/hook",
            "ftp://a.example/",
            "file:///etc/passwd",
            "https://me@a.example/",
            "https://:pw@a.example/",
            "https://a.example/#x",
            "https://a.example:25/",
            "https://a.example:22/",
            "http://a.example:0/",
            "unix:/run/a",
            "javascript:1",
        ] {
            assert!(targets(&[]).check(bad).is_err(), "{bad}");
        }
        assert!(Targets::new(vec![], false).check("http://a.example/").is_err());
        assert!(Targets::new(vec![], false).check("https://a.example:8443/hook?x=1").is_ok());
        assert!(targets(&[]).check(&format!("https://a.example/{}", "a".repeat(URL_BYTES_MAX))).is_err());
    }

    #[tokio::test]
    async fn a_name_that_leads_home_is_refused_at_its_lookup() {
        let lookup = async |targets: Targets| targets.resolve("localhost".parse().unwrap()).await.map(|found| found.count());
        assert_eq!(lookup(targets(&[])).await.unwrap_err().to_string(), NotPublic.to_string());
        assert!(lookup(targets(&["127.0.0.0/8", "::1/128"])).await.unwrap() > 0);
    }
}
