//! A WebSocket to the service: over the same client, and so the same proxies and certificates, as all else.

use anyhow::ensure;
use reqwest::{Method, header};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::{client::generate_key, derive_accept_key},
        protocol::Role,
    },
};

use super::remote::Connection;

pub(super) type Socket = WebSocketStream<reqwest::Upgraded>;

/// Opens what is at this path (RFC 6455, section 4.1). A refusal is [`super::remote::Refused`].
pub(super) async fn open(connection: &Connection, path: &[&str], query: &[(&str, &str)]) -> anyhow::Result<Socket> {
    let key = generate_key();
    let request = connection
        .request(Method::GET, path, query)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key);
    let response = connection.send(request).await?;
    let accepted = response.headers().get(header::SEC_WEBSOCKET_ACCEPT).map(header::HeaderValue::as_bytes);
    ensure!(
        accepted == Some(derive_accept_key(key.as_bytes()).as_bytes()),
        "what answered is no service of mayfly's: it does not speak WebSocket"
    );
    Ok(WebSocketStream::from_raw_socket(response.upgrade().await?, Role::Client, None).await)
}
