//! `/v1/sandboxes/{id}/ports/{port}/…`: HTTP and WebSocket into a sandbox's own loopback, over a socket that its keeper opens there.
//!
//! A reverse proxy: what concerns one connection alone stays on it (RFC 9110, 7.6.1), who is asking stays with us, and what a tenant's program
//! answers must not become a page of our origin.

mod headers;
pub(super) mod relay;

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, Uri, uri::PathAndQuery},
    response::{IntoResponse as _, Response},
    routing::any,
};
use headers::Place;
use hyper::{client::conn::http1, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use relay::{Activity, Patient};
use sandbox_core::protocol::{FailureKind, Family};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::{App, caller::Caller, error::ApiError, hops, observe, query};
use crate::{
    runtime::CallError,
    sandbox::{Invalid, Kind, Sandbox, State as SandboxState},
    token::Scope,
};

/// Within one machine, without a network: who listens has accepted by then, or its queue is full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// For the head of an answer, from the request's end. Long polls are answered within it.
const ANSWER_DEADLINE: Duration = Duration::from_secs(300);
/// When the head of an answer is there at the latest, or the problem in its stead.
pub(super) const PATIENCE: Duration =
    CONNECT_DEADLINE.saturating_mul(2).saturating_add(ANSWER_DEADLINE).saturating_add(Duration::from_secs(10));
/// How long a body or a tunnel may rest.
const IDLE_DEADLINE: Duration = Duration::from_secs(600);
/// What is read of an answer's head before it is given up.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 200;

/// Whom a request came from, as the listener saw it.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub address: SocketAddr,
    pub has_tls: bool,
}

/// Why nothing came back from inside.
#[derive(Debug, thiserror::Error)]
pub enum PortFault {
    #[error("nothing listens on port {0} of the sandbox's loopback")]
    Closed(u16),
    #[error("what listens on port {port} of the sandbox did not answer as HTTP has it: {why}")]
    Broken { port: u16, why: String },
    #[error("what listens on port {0} of the sandbox did not answer in time")]
    Late(u16),
}

pub(super) fn router() -> Router<Arc<App>> {
    let path = "/v1/sandboxes/{id}/ports/{port}";
    Router::new().route(path, any(proxy)).route(&format!("{path}/"), any(proxy)).route(&format!("{path}/{{*path}}"), any(proxy))
}

/// Whatever the method. The rest of the path and the query reach the sandbox as they came.
pub(super) async fn proxy(State(app): State<Arc<App>>, caller: Caller, request: Request) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    // Not by the router's extractor: what follows the port need not be UTF-8.
    let (named, port) = {
        let part = |at| request.uri().path().split('/').nth(at).unwrap_or_default();
        (part(3).to_owned(), port(part(5)))
    };
    let id = query::object(&app, &caller, &named).await?;
    let port = port?;
    let sandbox = app.engine.find(&caller.tenant, Kind::Sandbox, id).await?.ok_or(ApiError::NotFound)?;
    // One that is paused would accept, and then say nothing.
    if sandbox.state != SandboxState::Running {
        return Err(ApiError::WrongState(sandbox.state));
    }
    let stream = connect(&app, &sandbox, port).await?;
    pass_on(app, Place { id, port }, stream, request).await
}

fn port(text: &str) -> Result<u16, ApiError> {
    let port = text.parse().ok().filter(|port| *port > 0);
    port.ok_or_else(|| Invalid::new("port", "a port is a number from 1 to 65535").into())
}

/// A connection to whoever listens on the port, by either of the loopback's addresses.
async fn connect(app: &App, sandbox: &Sandbox, port: u16) -> Result<TcpStream, ApiError> {
    let addresses =
        [(Family::V4, SocketAddr::from((Ipv4Addr::LOCALHOST, port))), (Family::V6, SocketAddr::from((Ipv6Addr::LOCALHOST, port)))];
    for (family, address) in addresses {
        let socket = match app.keeper.socket(sandbox.id, family).await {
            Ok(socket) => socket,
            Err(CallError::Failed(failure)) => match failure.kind {
                FailureKind::Gone | FailureKind::Busy => return Err(ApiError::WrongState(SandboxState::Exited)),
                FailureKind::Refused => return Err(ApiError::Conflict(failure.message)),
                // A kernel without IPv6, as a rule.
                FailureKind::Host if family == Family::V6 => continue,
                FailureKind::Host => return Err(ApiError::Internal(failure.into())),
            },
            Err(CallError::Lost) => return Err(ApiError::KeeperUnavailable),
        };
        match timeout(CONNECT_DEADLINE, join(socket, address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => tracing::debug!(sandbox.id = %sandbox.id, %error, %address, "nothing there"),
            Err(_late) => return Err(PortFault::Late(port).into()),
        }
    }
    Err(PortFault::Closed(port).into())
}

async fn join(socket: OwnedFd, address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = StdTcpStream::from(socket);
    socket.set_nonblocking(true)?;
    let stream = TcpSocket::from_std_stream(socket).connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends the request over the connection and brings its answer, bodies as they come.
async fn pass_on(app: Arc<App>, place: Place, stream: TcpStream, mut request: Request) -> Result<Response, ApiError> {
    let peer = request.extensions().get::<Peer>().copied();
    let is_tunnel = hops::wants_websocket(request.headers());
    let offers_ours = headers::offers_our_subprotocol(request.headers());
    let client = is_tunnel.then(|| hyper::upgrade::on(&mut request));
    let activity = Activity::new(IDLE_DEADLINE, move || app.engine.touch(place.id));

    let (parts, body) = request.into_parts();
    let mut outgoing = Request::new(Body::new(Patient::new(body, activity.clone())));
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() = inner_uri(&parts.uri);
    *outgoing.headers_mut() = headers::inward(&parts.headers, place, peer, is_tunnel);

    let broken = |error: hyper::Error| PortFault::Broken { port: place.port, why: error.to_string() };
    let mut http = http1::Builder::new();
    http.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    let (mut sender, connection) = http.handshake::<_, Body>(TokioIo::new(stream)).await.map_err(broken)?;
    // Ends with the answer's body, with the tunnel, or with whoever drops either.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection into a sandbox broke");
        }
    });
    let answer = timeout(ANSWER_DEADLINE, sender.send_request(outgoing)).await.map_err(|_late| PortFault::Late(place.port))?;
    let mut answer = answer.map_err(broken)?;
    let sandbox = (answer.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| hyper::upgrade::on(&mut answer));
    let (parts, body) = answer.into_parts();
    let mut response = match (client, sandbox) {
        (Some(client), Some(sandbox)) => {
            tokio::spawn(tunnel(client, sandbox, activity));
            StatusCode::SWITCHING_PROTOCOLS.into_response()
        }
        // Nobody asked for it to become something else.
        (None, Some(_)) => return Err(PortFault::Broken { port: place.port, why: "it changed the protocol unasked".to_owned() }.into()),
        (_, None) => (parts.status, Body::new(Patient::new(Body::new(body), activity))).into_response(),
    };
    let is_tunnelled = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = headers::outward(&parts.headers, place, is_tunnelled, offers_ours);
    observe::mark_as_proxied(&mut response);
    Ok(response)
}

/// What follows the port, as it came.
fn inner_uri(uri: &Uri) -> Uri {
    let path = uri.path().splitn(7, '/').nth(6).unwrap_or_default();
    let text = uri.query().map_or_else(|| format!("/{path}"), |query| format!("/{path}?{query}"));
    text.parse::<PathAndQuery>().map(Uri::from).expect("a part of a path with a slash before it is a path")
}

async fn tunnel(client: OnUpgrade, sandbox: OnUpgrade, activity: Activity) {
    match tokio::try_join!(client, sandbox) {
        Ok((client, sandbox)) => relay::both_ways(TokioIo::new(client), TokioIo::new(sandbox), activity).await,
        Err(error) => tracing::debug!(%error, "a tunnel did not come to be"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::SandboxId;

    #[test]
    fn the_rest_of_the_path_is_left_as_it_came() {
        let of = |text: &str| inner_uri(&text.parse().unwrap()).to_string();
        assert_eq!(of("/v1/sandboxes/x/ports/80"), "/");
        assert_eq!(of("/v1/sandboxes/x/ports/80/"), "/");
        assert_eq!(of("/v1/sandboxes/x/ports/80/a%2Fb//../c?d=%20&e"), "/a%2Fb//../c?d=%20&e");
        assert_eq!(of("/v1/sandboxes/x/ports/80?d"), "/?d");
    }

    #[test]
    fn a_port_is_a_port() {
        assert_eq!(port("65535").unwrap(), 65_535);
        for text in ["0", "65536", "-1", "+", "http", ""] {
            assert!(matches!(port(text), Err(ApiError::Invalid(invalid)) if invalid.field == "port"), "{text}");
        }
    }

    #[test]
    fn the_id_of_a_place_is_its_sandboxes() {
        let place = Place { id: SandboxId(uuid::Uuid::nil()), port: 8080 };
        assert_eq!(place.prefix(), "/v1/sandboxes/00000000-0000-0000-0000-000000000000/ports/8080");
    }
}
