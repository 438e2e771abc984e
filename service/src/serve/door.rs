//! The connections of one listener: bounded in their number, in the time that the head of a request may take, in its size, and in how long a client may take nothing
//! of what is sent to it.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::Router;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service as _;

use crate::api::ports::Peer;

/// What is read of a head before it is refused unheard. The API itself refuses smaller ones, with a problem that says so.
const HEAD_BYTES_MAX: usize = 256 * 1024;

/// What a listener's clients may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Whoever is one too many waits in the kernel's queue.
    pub(super) connections: usize,
    /// For the handshake of TLS, and for the head of each request, from the connection's beginning or from the answer before it: also how
    /// long a connection may rest.
    pub(super) head_deadline: Duration,
    /// How long a client may take nothing while there is something for it: then the connection is broken, whatever it has become — an answer, a stream, a WebSocket, a
    /// tunnel. The kernel counts it (`TCP_USER_TIMEOUT`, tcp(7)), from the last time that the other side acknowledged something or opened its window: who is slow has all
    /// the time, who has stopped, or has vanished, holds what others need.
    pub(super) write_deadline: Duration,
}

/// Serves until `stopping`, and then until the requests in progress have ended. A connection that became a WebSocket is not waited for.
/// Without `tls` it is plain HTTP.
pub(super) async fn serve(listener: TcpListener, router: Router, bounds: Bounds, tls: Option<TlsAcceptor>, stopping: CancellationToken) {
    let room = Arc::new(Semaphore::new(bounds.connections));
    let open = TaskTracker::new();
    loop {
        let counted = tokio::select! {
            counted = accept(&listener, &room, bounds.write_deadline) => counted,
            () = stopping.cancelled() => break,
        };
        open.spawn(attend(counted, tls.clone(), router.clone(), bounds.head_deadline, stopping.clone()));
    }
    drop(listener);
    open.close();
    open.wait().await;
}

/// The next connection, when there is room for one.
async fn accept(listener: &TcpListener, room: &Arc<Semaphore>, write_deadline: Duration) -> Counted {
    /// Until descriptors or memory may be there again.
    const PAUSE: Duration = Duration::from_secs(1);
    let permit = Arc::clone(room).acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                // An answer of two packets would otherwise wait for the client's delayed acknowledgement, 40 ms.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection without TCP_NODELAY");
                }
                let write_deadline_ms = u32::try_from(write_deadline.as_millis()).unwrap_or(u32::MAX);
                if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(&stream, write_deadline_ms) {
                    tracing::warn!(%error, "a connection that may be held without being read from: setting TCP_USER_TIMEOUT failed");
                }
                return Counted { stream, address, _permit: permit };
            }
            Err(error) if is_the_clients(&error) => tracing::debug!(%error, "a client went away before it was accepted"),
            Err(error) => {
                tracing::error!(%error, "accepting a connection failed");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

async fn attend(counted: Counted, tls: Option<TlsAcceptor>, router: Router, head_deadline: Duration, stopping: CancellationToken) {
    let peer = Peer { address: counted.address, has_tls: tls.is_some() };
    let Some(tls) = tls else { return talk(counted, router, peer, head_deadline, stopping).await };
    let handshake = tokio::select! {
        shaken = timeout(head_deadline, tls.accept(counted)) => shaken,
        () = stopping.cancelled() => return,
    };
    match handshake {
        Ok(Ok(stream)) => talk(stream, router, peer, head_deadline, stopping).await,
        Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
        Err(_) => tracing::debug!("a handshake took too long"),
    }
}

async fn talk<S>(stream: S, router: Router, peer: Peer, head_deadline: Duration, stopping: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_deadline).max_buf_size(HEAD_BYTES_MAX);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        // A router is always ready.
        router.clone().call(request)
    });
    let connection = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = pin!(connection);
    let served = tokio::select! {
        served = &mut connection => served,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection broke");
    }
}

/// A connection that counts for as long as its descriptor is open, whatever it becomes.
#[derive(Debug)]
struct Counted {
    stream: TcpStream,
    address: SocketAddr,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpSocket,
        task::JoinHandle,
        time::timeout,
    };

    use tokio_rustls::{
        TlsConnector,
        rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs},
    };

    use super::{super::tls::Certificate, *};
    use crate::config::TlsFiles;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    const SOON: Duration = Duration::from_secs(5);

    /// More than the kernel takes on of an answer that nobody reads (`tcp_wmem` and `tcp_rmem` of both sides).
    const LARGE: usize = 64 * 1024 * 1024;
    const BOUNDS: Bounds = Bounds { connections: 9, head_deadline: Duration::from_secs(20), write_deadline: Duration::from_secs(20) };

    async fn open(bounds: Bounds) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
        open_with(bounds, None).await
    }

    async fn open_with(bounds: Bounds, tls: Option<TlsAcceptor>) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stopping) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new().route("/", get(async || "hello")).route("/large", get(async || vec![b'x'; LARGE]));
        (address, stopping.clone(), tokio::spawn(serve(listener, router, bounds, tls, stopping)))
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_ends_the_connection() {
        let (address, ..) = open(Bounds { head_deadline: Duration::from_millis(50), ..BOUNDS }).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
        let mut answer = Vec::new();
        timeout(SOON, client.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn one_connection_too_many_waits_for_another_to_end() {
        let (address, ..) = open(Bounds { connections: 1, ..BOUNDS }).await;
        let first = TcpStream::connect(address).await.unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        second.write_all(REQUEST).await.unwrap();
        assert!(timeout(Duration::from_millis(100), second.readable()).await.is_err());
        drop(first);
        let mut answer = [0; 12];
        timeout(SOON, second.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }

    #[tokio::test]
    async fn a_stop_ends_connections_that_rest() {
        let (address, stopping, served) = open(BOUNDS).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(REQUEST).await.unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).await.unwrap();
        stopping.cancel();
        timeout(SOON, served).await.unwrap().unwrap();
    }

    const LARGE_REQUEST: &[u8] = b"GET /large HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

    async fn asking(address: SocketAddr) -> TcpStream {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(LARGE_REQUEST).await.unwrap();
        client
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_disconnected() {
        let (address, ..) = open(Bounds { connections: 1, write_deadline: Duration::from_millis(300), ..BOUNDS }).await;
        let mut client = asking(address).await;
        // There is room for another as soon as the first is gone.
        let mut next = TcpStream::connect(address).await.unwrap();
        next.write_all(REQUEST).await.unwrap();
        let mut answer = [0; 12];
        timeout(SOON, next.read_exact(&mut answer)).await.unwrap().unwrap();
        let mut read = Vec::new();
        let ended = timeout(SOON, client.read_to_end(&mut read)).await.unwrap();
        assert!(ended.is_err() || read.len() < LARGE, "{ended:?}");
    }

    /// Both sides of TLS, for localhost.
    fn tls() -> (TlsAcceptor, TlsConnector) {
        let folder = tempfile::tempdir().unwrap();
        let files = TlsFiles { cert: folder.path().join("cert.pem"), key: folder.path().join("key.pem") };
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&files.cert, certified.cert.pem()).unwrap();
        std::fs::write(&files.key, certified.signing_key.serialize_pem()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certified.cert.der().clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider())).with_safe_default_protocol_versions();
        let config = config.unwrap().with_root_certificates(roots).with_no_client_auth();
        (Certificate::follow(&files).unwrap().acceptor().unwrap(), TlsConnector::from(Arc::new(config)))
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_disconnected_below_tls() {
        let (acceptor, connector) = tls();
        let bounds = Bounds { connections: 1, write_deadline: Duration::from_millis(300), ..BOUNDS };
        let (address, ..) = open_with(bounds, Some(acceptor)).await;
        let connect = async || {
            let stream = TcpStream::connect(address).await.unwrap();
            connector.connect("localhost".try_into().unwrap(), stream).await.unwrap()
        };
        let mut client = connect().await;
        client.write_all(LARGE_REQUEST).await.unwrap();
        // It shakes hands as soon as the first is gone.
        let _next = timeout(SOON, connect()).await.unwrap();
        let mut read = Vec::new();
        let ended = timeout(SOON, client.read_to_end(&mut read)).await.unwrap();
        assert!(ended.is_err() || read.len() < LARGE, "{ended:?}");
    }

    /// By the first of them the kernel would say for more than the deadline that nothing can be written: it does so until a third of what waits to be sent is gone (tcp(7), `tcp_wmem`).
    #[tokio::test]
    async fn a_client_that_is_slow_is_sent_all_however_long_it_takes() {
        const PIECE: usize = 64 * 1024;
        let write_deadline = Duration::from_secs(3);
        let (address, ..) = open(Bounds { write_deadline, ..BOUNDS }).await;
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        let mut client = socket.connect(address).await.unwrap();
        client.write_all(LARGE_REQUEST).await.unwrap();
        let (began_at, mut total, mut piece) = (std::time::Instant::now(), 0, vec![0; PIECE]);
        loop {
            let read = client.read(&mut piece).await.unwrap();
            total += read;
            if read == 0 {
                break;
            }
            if began_at.elapsed() < write_deadline * 4 {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        assert!(total > LARGE && began_at.elapsed() > write_deadline * 4, "{total} bytes in {:?}", began_at.elapsed());
    }
}
