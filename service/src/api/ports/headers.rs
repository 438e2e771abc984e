//! What of the headers goes in, and what comes out.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use super::Peer;
use crate::{
    api::{
        caller::{SUBPROTOCOL, TOKEN_SUBPROTOCOL},
        hops::{set, without_hops, words},
    },
    sandbox::SandboxId,
};

/// What stands before the name of a sandbox's cookie at the client. The host has other cookies, of whatever else it serves: a sandbox hears of none of
/// them, and can set none of them.
const COOKIE_PREFIX: &str = "mayfly-port-";

/// What would say something of our whole origin, or to a proxy before us: not for a sandbox to say. `Set-Cookie` and `Location` are rewritten.
const NOT_FROM_INSIDE: [&str; 22] = [
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-allow-private-network",
    "access-control-expose-headers",
    "access-control-max-age",
    "alt-svc",
    "clear-site-data",
    "nel",
    "origin-agent-cluster",
    "public-key-pins",
    "report-to",
    "reporting-endpoints",
    "service-worker-allowed",
    "set-login",
    "strict-transport-security",
    "x-accel-buffering",
    "x-accel-redirect",
    "x-reproxy-url",
    "x-request-id",
    "x-sendfile",
];

/// Scripts and forms work, in an origin of their own: a page of a sandbox reads nothing of ours and of other sandboxes', and nobody frames it.
const PAGE_POLICY: &str = "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts; frame-ancestors 'none'";

/// Where a request goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) id: SandboxId,
    pub(super) port: u16,
}

impl Place {
    /// The path of its root at our door.
    pub(super) fn prefix(self) -> String {
        format!("/v1/sandboxes/{}/ports/{}", self.id, self.port)
    }
}

/// Whether the client would take our own subprotocol, as browsers offer it beside their token.
pub(super) fn offers_our_subprotocol(headers: &HeaderMap) -> bool {
    words(headers, &header::SEC_WEBSOCKET_PROTOCOL).any(|protocol| protocol == SUBPROTOCOL)
}

/// What the sandbox is told.
pub(super) fn inward(given: &HeaderMap, place: Place, peer: Option<Peer>, is_tunnel: bool) -> HeaderMap {
    let mut headers = without_hops(given);
    for name in [header::AUTHORIZATION, header::COOKIE, header::EXPECT, header::SEC_WEBSOCKET_PROTOCOL, header::HOST] {
        headers.remove(name);
    }
    // What nodes say to each other is nobody else's.
    let ours: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with("mayfly-")).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
    let protocols = words(given, &header::SEC_WEBSOCKET_PROTOCOL)
        .filter(|protocol| *protocol != SUBPROTOCOL && !protocol.starts_with(TOKEN_SUBPROTOCOL));
    set(&mut headers, header::SEC_WEBSOCKET_PROTOCOL, &protocols.collect::<Vec<_>>().join(", "));
    let cookies = given.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(';'));
    let own = cookies.filter_map(|cookie| cookie.trim().strip_prefix(COOKIE_PREFIX));
    set(&mut headers, header::COOKIE, &own.collect::<Vec<_>>().join("; "));
    // Many servers answer to no name but this; the one that the client used stands beside it.
    set(&mut headers, header::HOST, &format!("localhost:{}", place.port));
    let text = |name: &HeaderName| given.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let [by, host, scheme, prefix] =
        ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-prefix"].map(HeaderName::from_static);
    if let Some(peer) = peer {
        let before = words(given, &by).map(ToOwned::to_owned);
        let all: Vec<String> = before.chain([peer.address.ip().to_string()]).collect();
        set(&mut headers, by, &all.join(", "));
        if !headers.contains_key(&scheme) {
            set(&mut headers, scheme, if peer.has_tls { "https" } else { "http" });
        }
    }
    if !headers.contains_key(&host) {
        set(&mut headers, host, &text(&header::HOST));
    }
    set(&mut headers, prefix, &place.prefix());
    if is_tunnel {
        set(&mut headers, header::CONNECTION, "Upgrade");
        set(&mut headers, header::UPGRADE, "websocket");
    }
    headers
}

/// What the client is told.
pub(super) fn outward(given: &HeaderMap, place: Place, is_tunnel: bool, offers_ours: bool) -> HeaderMap {
    let mut headers = without_hops(given);
    for name in NOT_FROM_INSIDE {
        headers.remove(name);
    }
    let cookies: Vec<HeaderValue> = given.get_all(header::SET_COOKIE).iter().filter_map(|value| cookie_outward(value, place)).collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
    for name in [header::LOCATION, header::CONTENT_LOCATION] {
        if let Some(inner) = given.get(&name).and_then(|value| value.to_str().ok()) {
            let outer = location_outward(inner, place);
            set(&mut headers, name, &outer);
        }
    }
    // Beside what it says itself: of several policies each holds (CSP 3, 4.2).
    headers.append(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    if is_tunnel {
        set(&mut headers, header::CONNECTION, "Upgrade");
        set(&mut headers, header::UPGRADE, "websocket");
        // A browser that offered protocols takes no answer without one.
        if offers_ours && !headers.contains_key(header::SEC_WEBSOCKET_PROTOCOL) {
            set(&mut headers, header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL);
        }
    }
    headers
}

/// A cookie under a name that is the sandbox's own, for its own paths.
fn cookie_outward(value: &HeaderValue, place: Place) -> Option<HeaderValue> {
    let mut parts = value.to_str().ok()?.split(';');
    let pair = parts.next()?.trim();
    let is_elsewhere = |part: &&str| {
        let name = part.split('=').next().unwrap_or_default().trim();
        !["domain", "path"].iter().any(|known| name.eq_ignore_ascii_case(known))
    };
    let kept: String = parts.filter(is_elsewhere).map(|part| format!("; {}", part.trim())).collect();
    HeaderValue::try_from(format!("{COOKIE_PREFIX}{pair}; Path={}/{kept}", place.prefix())).ok()
}

/// A place on the sandbox's server as a client finds it at our door; another server's is left as it is.
fn location_outward(inner: &str, place: Place) -> String {
    let own = [format!("http://localhost:{}", place.port), format!("http://127.0.0.1:{}", place.port)];
    let path = own.iter().find_map(|own| inner.strip_prefix(own.as_str())).unwrap_or(inner);
    match path {
        "" => format!("{}/", place.prefix()),
        path if path.starts_with('/') && !path.starts_with("//") => format!("{}{path}", place.prefix()),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;

    const PLACE: Place = Place { id: SandboxId(uuid::Uuid::nil()), port: 8080 };
    const PREFIX: &str = "/v1/sandboxes/00000000-0000-0000-0000-000000000000/ports/8080";

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    fn in_with(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let peer = Peer { address: SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 1)), has_tls: true };
        inward(&map(pairs), PLACE, Some(peer), false)
    }

    fn out_with(pairs: &[(&'static str, &str)]) -> HeaderMap {
        outward(&map(pairs), PLACE, false, false)
    }

    #[test]
    fn who_asks_is_not_told() {
        let headers = in_with(&[
            ("authorization", "Bearer secret"),
            ("cookie", "session=ours; mayfly-port-a=1; mayfly-port-b=2"),
            ("sec-websocket-protocol", "mayfly.v1, mayfly.bearer.secret, chat"),
        ]);
        assert!(!headers.contains_key("authorization"));
        assert_eq!(headers["cookie"], "a=1; b=2");
        assert_eq!(headers["sec-websocket-protocol"], "chat");
    }

    #[test]
    fn what_is_of_one_connection_stays_there() {
        let headers =
            in_with(&[("connection", "close, X-Secret"), ("x-secret", "1"), ("te", "trailers"), ("upgrade", "h2c"), ("x-other", "2")]);
        assert!(["connection", "x-secret", "te", "upgrade"].iter().all(|name| !headers.contains_key(*name)));
        assert_eq!(headers["x-other"], "2");
        assert!(!out_with(&[("connection", "x-hop"), ("x-hop", "1")]).contains_key("x-hop"));
    }

    #[test]
    fn a_server_inside_hears_how_it_was_reached() {
        let headers = in_with(&[("host", "api.example"), ("x-forwarded-for", "198.51.100.7")]);
        assert_eq!(headers["host"], "localhost:8080");
        assert_eq!(headers["x-forwarded-host"], "api.example");
        assert_eq!(headers["x-forwarded-for"], "198.51.100.7, 192.0.2.1");
        assert_eq!((&headers["x-forwarded-proto"], &headers["x-forwarded-prefix"]), (&"https".parse().unwrap(), &PREFIX.parse().unwrap()));
    }

    #[test]
    fn a_cookie_from_inside_is_for_its_own_paths_under_its_own_name() {
        let headers = out_with(&[("set-cookie", "id=1; Domain=example; path=/; HttpOnly")]);
        assert_eq!(headers["set-cookie"], format!("mayfly-port-id=1; Path={PREFIX}/; HttpOnly"));
    }

    #[test]
    fn a_redirect_stays_inside() {
        let of = |inner: &str| out_with(&[("location", inner)])["location"].to_str().unwrap().to_owned();
        assert_eq!(of("/login?a"), format!("{PREFIX}/login?a"));
        assert_eq!(of("http://localhost:8080/x"), format!("{PREFIX}/x"));
        assert_eq!(of("relative"), "relative");
        assert_eq!(of("https://elsewhere.example/"), "https://elsewhere.example/");
    }

    #[test]
    fn nothing_from_inside_speaks_for_our_origin() {
        let headers = out_with(&[
            ("access-control-allow-origin", "*"),
            ("clear-site-data", "\"*\""),
            ("x-accel-redirect", "/etc/passwd"),
            ("content-security-policy", "default-src *"),
        ]);
        let policies: Vec<_> = headers.get_all("content-security-policy").iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(policies, ["default-src *", PAGE_POLICY]);
        assert_eq!(headers.len(), 2);
    }

    #[test]
    fn a_browser_that_offered_its_token_alone_gets_our_protocol() {
        let tunnel = outward(&HeaderMap::new(), PLACE, true, true);
        assert_eq!(tunnel["sec-websocket-protocol"], SUBPROTOCOL);
        let theirs = outward(&map(&[("sec-websocket-protocol", "chat")]), PLACE, true, true);
        assert_eq!(theirs["sec-websocket-protocol"], "chat");
    }
}
