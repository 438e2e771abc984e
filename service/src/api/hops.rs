//! What of a message concerns one connection alone, and must not be passed on to another.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

/// Of one connection alone (RFC 9110, 7.6.1), beside what `Connection` names. `Expect` is answered by us.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Whether it would become a WebSocket.
pub(super) fn wants_websocket(headers: &HeaderMap) -> bool {
    let upgrades = words(headers, &header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade"));
    upgrades && words(headers, &header::UPGRADE).any(|word| word.eq_ignore_ascii_case("websocket"))
}

/// The headers of a message that may go on over another connection.
pub(super) fn without_hops(given: &HeaderMap) -> HeaderMap {
    let mut headers = given.clone();
    for name in words(given, &header::CONNECTION) {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers
}

/// The members of a header that is a list.
pub(super) fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lists = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).map(str::trim).filter(|word| !word.is_empty())
}

/// Sets it, if there is something to say.
pub(super) fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text)
        && !text.is_empty()
    {
        headers.insert(name, value);
    }
}
