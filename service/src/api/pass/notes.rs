//! What stands in the heads of messages between nodes.

use aws_lc_rs::constant_time;
use axum::{
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts},
    response::Response,
};

use crate::{
    api::{
        error::NotHere,
        hops::{self, set, without_hops, words},
        observe,
        ports::Peer,
    },
    sandbox::SandboxId,
    store::{NodeId, PeerDoor},
    telemetry,
};

/// Names the node that passed a request on, which then goes no further.
const FORWARDED: HeaderName = HeaderName::from_static("mayfly-forwarded");
/// What was made is called this; with it comes what proves that a node asks.
const OFFERED: HeaderName = HeaderName::from_static("mayfly-offered");
const PEER_KEY: HeaderName = HeaderName::from_static("mayfly-peer-key");
/// Stands in answers of who leaves it to the node that asked.
pub(super) const DECLINED: HeaderName = HeaderName::from_static("mayfly-declined");
/// There, where nothing else of the kind would be taken now.
pub(super) const BUSY: &str = "busy";
/// What all headers begin with that nodes alone have a use for.
const OURS: &str = "mayfly-";
/// Given to a request by the door that it came through.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Whether it came from another node, or its client says so.
pub(super) fn is_forwarded(headers: &HeaderMap) -> bool {
    headers.contains_key(FORWARDED)
}

/// Says of a request that it is an offer to the node with this door: what is made is to be called this.
pub(super) fn offer(request: &mut Request, id: SandboxId, to: &PeerDoor) {
    request.extensions_mut().insert(Offer { id, key: to.key.clone() });
}

#[derive(Clone)]
struct Offer {
    id: SandboxId,
    key: String,
}

/// Whether somebody, perhaps a node that does not know the key of the process that is here now, offers something.
pub(super) fn is_offer(headers: &HeaderMap) -> bool {
    headers.contains_key(OFFERED) || headers.contains_key(PEER_KEY)
}

/// What a node offers with this request. Whoever does not know what nodes alone read offers nothing.
pub(super) fn offered(headers: &HeaderMap, own: &PeerDoor) -> Option<SandboxId> {
    let given = headers.get(PEER_KEY)?.as_bytes();
    // In a time that says nothing of where they differ.
    constant_time::verify_slices_are_equal(given, own.key.as_bytes()).ok()?;
    headers.get(OFFERED)?.to_str().ok()?.parse().ok()
}

/// Has the node that asked know that this answer is not the only one there may be.
pub(super) fn tell_if_declined(response: &mut Response) {
    if let Some(NotHere { is_busy }) = response.extensions().get() {
        let why = if *is_busy { BUSY } else { "other" };
        response.headers_mut().insert(DECLINED, HeaderValue::from_static(why));
    }
}

/// The head of a request as the other node is to have it.
pub(super) fn onward(parts: &Parts, from: NodeId) -> HeaderMap {
    let mut headers = without_hops(&parts.headers);
    without_ours(&mut headers);
    // Answered here; and made anew from the body, and from the address.
    for name in [header::EXPECT, header::CONTENT_LENGTH, header::HOST] {
        headers.remove(name);
    }
    set(&mut headers, FORWARDED, &from.to_string());
    if let Some(Offer { id, key }) = parts.extensions.get() {
        set(&mut headers, OFFERED, &id.to_string());
        set(&mut headers, PEER_KEY, key);
    }
    set(&mut headers, REQUEST_ID, &observe::request_id(parts));
    telemetry::continue_in(&mut headers);
    // For what a sandbox serves: it hears how it was reached.
    let [by, host, scheme] = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"].map(HeaderName::from_static);
    if let Some(peer) = parts.extensions.get::<Peer>() {
        let before = words(&parts.headers, &by).map(ToOwned::to_owned);
        let all: Vec<String> = before.chain([peer.address.ip().to_string()]).collect();
        set(&mut headers, by, &all.join(", "));
        if !headers.contains_key(&scheme) {
            set(&mut headers, scheme, if peer.has_tls { "https" } else { "http" });
        }
    }
    if let (false, Some(asked)) = (headers.contains_key(&host), parts.headers.get(header::HOST)) {
        headers.insert(host, asked.clone());
    }
    if hops::wants_websocket(&parts.headers) {
        become_websocket(&mut headers);
    }
    headers
}

/// The head of an answer as the client is to have it.
pub(super) fn homeward(given: &HeaderMap, is_tunnel: bool) -> HeaderMap {
    let mut headers = without_hops(given);
    without_ours(&mut headers);
    if is_tunnel {
        become_websocket(&mut headers);
    }
    headers
}

fn become_websocket(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

fn without_ours(headers: &mut HeaderMap) {
    let ours: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with(OURS)).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn sent(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut request = Request::get("/v1/sandboxes/a");
        for (name, value) in pairs {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        onward(&parts, NodeId(uuid::Uuid::nil()))
    }

    #[test]
    fn a_token_goes_on_and_what_is_of_one_connection_does_not() {
        let headers = sent(&[
            ("authorization", "Bearer a"),
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "chunked"),
            ("content-length", "7"),
            ("expect", "100-continue"),
            ("te", "trailers"),
            ("host", "api.example"),
        ]);
        assert_eq!(
            (&headers["authorization"], &headers["x-forwarded-host"]),
            (&"Bearer a".parse().unwrap(), &"api.example".parse().unwrap())
        );
        for gone in ["connection", "x-hop", "transfer-encoding", "content-length", "expect", "te", "host", "upgrade"] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
    }

    #[test]
    fn a_client_does_not_speak_as_a_node() {
        let headers = sent(&[("mayfly-forwarded", "somebody"), ("mayfly-forwarded", "else"), ("mayfly-anything", "1")]);
        assert_eq!(headers.get_all(FORWARDED).iter().collect::<Vec<_>>(), ["00000000-0000-0000-0000-000000000000"]);
        assert!(!headers.contains_key("mayfly-anything"));
    }

    #[test]
    fn an_offer_is_one_only_with_the_key_of_who_takes_it() {
        let door = PeerDoor { address: "https://a".into(), key: "right".into() };
        let id = SandboxId(uuid::Uuid::now_v7());
        let with = |key: &str| {
            let id = id.to_string();
            let pairs = [("mayfly-offered", id.as_str()), ("mayfly-peer-key", key)];
            pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect::<HeaderMap>()
        };
        assert_eq!(offered(&with("right"), &door), Some(id));
        assert_eq!(offered(&with("wrong"), &door), None);
        assert_eq!(offered(&with(""), &door), None);
    }

    #[test]
    fn a_websocket_stays_one_and_nothing_else_changes_the_protocol() {
        let headers = sent(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "k")]);
        assert_eq!(
            (&headers["connection"], &headers["upgrade"], &headers["sec-websocket-key"]),
            (&"Upgrade".parse().unwrap(), &"websocket".parse().unwrap(), &"k".parse().unwrap())
        );
        assert!(!sent(&[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c")]).contains_key("upgrade"));
    }
}
