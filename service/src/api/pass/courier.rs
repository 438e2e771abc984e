//! Who brings requests to other nodes, over connections that are used again.

use std::{
    convert::Infallible,
    error::Error as _,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request},
    http::{StatusCode, Uri, Version},
    response::{IntoResponse as _, Response},
};
use futures_util::future::BoxFuture;
use hyper::{
    body::{Frame, Incoming, SizeHint},
    upgrade::OnUpgrade,
};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, Error, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::time::timeout;
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tower::Service;

use super::{need::Node, notes, offer::Declined};
use crate::{
    api::{
        App, hops, observe,
        ports::relay::{self, Activity},
    },
    config::PeerSettings,
    metrics::Metrics,
};

/// From nothing to a connection, with the handshake of TLS.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// How long a connection rests before it is asked whether there is still somebody, how often that is asked again, and how many times in vain.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
const KEEPALIVES: u32 = 3;
/// How long what was sent may go unacknowledged (`TCP_USER_TIMEOUT`, tcp(7)): while something is, nobody asks whether there is somebody.
const UNHEARD_FOR: Duration = Duration::from_secs(60);
/// How long a connection without a request is kept; shorter than the other side keeps it, which would break it under a request.
const REST: Duration = Duration::from_millis(900);
/// Of connections without a request, to each node.
const RESTING_MAX: usize = 64;
/// What is read of an answer's head before it is given up.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 200;
/// How long a tunnel may rest. The services' own ends say something far more often, and those of what sandboxes serve are given up sooner.
const TUNNEL_IDLE: Duration = Duration::from_secs(900);

/// A client for other nodes, and for nothing else: it goes where their rows say, follows nobody who sends it on, and asks no proxy.
#[derive(Debug)]
pub struct Courier {
    client: Client<Patient<HttpsConnector<HttpConnector>>, Body>,
    is_http_allowed: bool,
}

/// Whom a request goes to, and what tells that they are gone.
pub(super) struct Addressee<F> {
    pub(super) node: Node,
    pub(super) gone: F,
}

/// Why no answer came.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// It did not reach the node.
    #[error("node {0} is not reached: {1}")]
    Unreached(String, String),
    /// It may have reached the node.
    #[error("node {0} did not answer: {1}")]
    Broken(String, String),
}

impl Fault {
    /// As metrics call it.
    const fn outcome(&self) -> &'static str {
        match self {
            Self::Unreached(..) => "unreached",
            Self::Broken(..) => "broken",
        }
    }
}

impl Courier {
    /// Fails where the authorities cannot be read that are to vouch for other nodes.
    pub fn new(settings: &PeerSettings) -> anyhow::Result<Self> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_DEADLINE));
        http.set_keepalive(Some(KEEPALIVE_AFTER));
        http.set_keepalive_interval(Some(KEEPALIVE_EVERY));
        http.set_keepalive_retries(Some(KEEPALIVES));
        http.set_tcp_user_timeout(Some(UNHEARD_FOR));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let only = |roots: RootCertStore| -> anyhow::Result<_> {
            let config = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
            Ok(HttpsConnectorBuilder::new().with_tls_config(config.with_root_certificates(roots).with_no_client_auth()))
        };
        let tls = match &settings.ca_file {
            Some(path) => only(authorities(path).with_context(|| format!("peer-ca-file: the certificates in {}", path.display()))?)?,
            None => match HttpsConnectorBuilder::new().with_provider_and_platform_verifier(Arc::clone(&provider)) {
                Ok(tls) => tls,
                Err(error) => {
                    // A machine without any is no reason not to serve.
                    tracing::warn!(%error, "the system's authorities cannot be read: no other node is reached by https");
                    only(RootCertStore::empty())?
                }
            },
        };
        let mut tls = tls.https_or_http();
        if let Some(name) = &settings.tls_name {
            tls = tls.with_server_name_resolver(FixedServerNameResolver::new(name.clone()));
        }
        let connector = Patient(tls.enable_http1().wrap_connector(http));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(REST)
            .pool_max_idle_per_host(RESTING_MAX)
            .http1_max_buf_size(HEAD_BYTES_MAX)
            .http1_max_headers(HEADERS_MAX)
            .build(connector);
        Ok(Self { client, is_http_allowed: settings.is_http_allowed })
    }

    /// Has the node answer, whose answer is given back as it comes. An error, which was told to the log: nothing came of it, in so much time, or while it was there.
    pub(super) async fn deliver<F>(&self, app: &Arc<App>, to: Addressee<F>, request: Request, patience: Duration) -> Result<Response, Fault>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let delivered = self.try_to_deliver(app, to, request, patience).await;
        match &delivered {
            Ok(answer) => app.metrics.forwarded(if answer.extensions().get::<Declined>().is_some() { "declined" } else { "answered" }),
            Err(fault) => {
                app.metrics.forwarded(fault.outcome());
                tracing::info!(%fault, "a request did not get through to another node");
            }
        }
        delivered
    }

    async fn try_to_deliver<F>(&self, app: &App, to: Addressee<F>, request: Request, patience: Duration) -> Result<Response, Fault>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Addressee { node, gone } = to;
        let name = node.id.to_string();
        let mut gone: BoxFuture<'static, ()> = Box::pin(gone);
        let uri = self.uri(&node, request.uri()).map_err(|why| Fault::Unreached(name.clone(), why))?;
        let (mut parts, body) = request.into_parts();
        let client = hops::wants_websocket(&parts.headers).then(|| parts.extensions.remove::<OnUpgrade>()).flatten();
        let is_programs = parts.extensions.get::<MatchedPath>().is_some_and(|path| path.as_str().contains("/ports/"));

        let (sent, is_sent) = Sent::new(body);
        let mut outgoing = Request::new(Body::new(sent));
        *outgoing.method_mut() = parts.method.clone();
        *outgoing.uri_mut() = uri;
        *outgoing.version_mut() = Version::HTTP_11;
        *outgoing.headers_mut() = notes::onward(&parts, app.engine.node());
        let answered = tokio::select! {
            answered = self.client.request(outgoing) => answered.map_err(|error| fault(&name, &error)),
            () = &mut gone => Err(Fault::Broken(name.clone(), "it is not heard of any more".to_owned())),
            () = is_late(is_sent, patience) => Err(Fault::Broken(name.clone(), format!("nothing came in {} s", patience.as_secs()))),
        };
        let mut answer = answered?;
        let tunnelled = (answer.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| hyper::upgrade::on(&mut answer));
        let (head, body) = answer.into_parts();
        let headers = notes::homeward(&head.headers, tunnelled.is_some());
        let mut response = match (client, tunnelled) {
            (Some(client), Some(node)) => {
                tokio::spawn(tunnel(client, node, gone));
                StatusCode::SWITCHING_PROTOCOLS.into_response()
            }
            (None, Some(_)) => return Err(Fault::Broken(name, "it changed the protocol unasked".to_owned())),
            (_, None) => (head.status, Body::new(Passing { body, gone, metrics: Arc::clone(&app.metrics) })).into_response(),
        };
        *response.headers_mut() = headers;
        // What a program says there is for its client.
        if let Some(why) = head.headers.get(notes::DECLINED).filter(|_| !is_programs) {
            response.extensions_mut().insert(Declined { is_busy: why == notes::BUSY });
        }
        if is_programs {
            observe::mark_as_proxied(&mut response);
        } else {
            observe::mark_as_told(&mut response);
        }
        Ok(response)
    }

    /// The same path at the node's door.
    fn uri(&self, node: &Node, asked: &Uri) -> Result<Uri, String> {
        let base: Uri = node.door.address.parse().map_err(|error| format!("its address is none: {error}"))?;
        match base.scheme_str() {
            Some("https") => {}
            Some("http") if self.is_http_allowed => {}
            Some(_) | None => return Err("its address is not https, and plain http is not permitted here".to_owned()),
        }
        let mut parts = base.into_parts();
        parts.path_and_query = asked.path_and_query().cloned();
        Uri::from_parts(parts).map_err(|error| format!("its address is none: {error}"))
    }
}

fn authorities(path: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path)? {
        roots.add(certificate?)?;
    }
    ensure!(!roots.is_empty(), "there is none");
    Ok(roots)
}

/// What the library says, with all that is behind it.
fn fault(node: &str, error: &Error) -> Fault {
    let mut why = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        why = format!("{why}: {error}");
        cause = error.source();
    }
    if error.is_connect() { Fault::Unreached(node.to_owned(), why) } else { Fault::Broken(node.to_owned(), why) }
}

/// Returns when so much time has passed since the request went out.
async fn is_late(is_sent: tokio::sync::oneshot::Receiver<Infallible>, patience: Duration) {
    drop(is_sent.await);
    tokio::time::sleep(patience).await;
}

/// Bytes both ways until both have ended, or the node is gone.
async fn tunnel(client: OnUpgrade, node: OnUpgrade, gone: BoxFuture<'static, ()>) {
    match tokio::try_join!(client, node) {
        Ok((client, node)) => {
            let relayed = relay::both_ways(TokioIo::new(client), TokioIo::new(node), Activity::new(TUNNEL_IDLE, || {}));
            tokio::select! {
                () = relayed => {}
                () = gone => tracing::debug!("a tunnel to a node that is gone"),
            }
        }
        Err(error) => tracing::debug!(%error, "a tunnel to another node did not come to be"),
    }
}

/// A request's body, which tells when it was taken to its end.
struct Sent {
    body: Body,
    _until_sent: tokio::sync::oneshot::Sender<Infallible>,
}

impl Sent {
    fn new(body: Body) -> (Self, tokio::sync::oneshot::Receiver<Infallible>) {
        let (until_sent, is_sent) = tokio::sync::oneshot::channel();
        (Self { body, _until_sent: until_sent }, is_sent)
    }
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body, which breaks with its node: what is missing is not taken for the end.
struct Passing {
    body: Incoming,
    gone: BoxFuture<'static, ()>,
    metrics: Arc<Metrics>,
}

impl HttpBody for Passing {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let broken = match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Err(error))) => axum::Error::new(error),
            Poll::Ready(frame) => return Poll::Ready(frame.map(|frame| frame.map_err(axum::Error::new))),
            Poll::Pending => {
                if self.gone.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.gone = Box::pin(std::future::pending());
                axum::Error::new("the node is not heard of any more")
            }
        };
        self.metrics.forwarded("cut");
        Poll::Ready(Some(Err(broken)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Connects in time or not at all, the handshake of TLS included.
#[derive(Debug, Clone)]
struct Patient<C>(C);

impl<C> Service<Uri> for Patient<C>
where
    C: Service<Uri, Error = Box<dyn std::error::Error + Send + Sync>>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = BoxFuture<'static, Result<C::Response, C::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = self.0.call(to);
        Box::pin(async move { timeout(CONNECT_DEADLINE, connecting).await.unwrap_or_else(|_late| Err("no connection in time".into())) })
    }
}
