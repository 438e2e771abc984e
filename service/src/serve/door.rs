//! The connections of one listener: bounded in their number, in the time that the head of a request may take, and in its size.

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
}

/// Serves until `stopping`, and then until the requests in progress have ended. A connection that became a WebSocket is not waited for.
/// Without `tls` it is plain HTTP.
pub(super) async fn serve(listener: TcpListener, router: Router, bounds: Bounds, tls: Option<TlsAcceptor>, stopping: CancellationToken) {
    let room = Arc::new(Semaphore::new(bounds.connections));
    let open = TaskTracker::new();
    loop {
        let counted = tokio::select! {
            counted = accept(&listener, &room) => counted,
            () = stopping.cancelled() => break,
        };
        open.spawn(attend(counted, tls.clone(), router.clone(), bounds.head_deadline, stopping.clone()));
    }
    drop(listener);
    open.close();
    open.wait().await;
}

/// The next connection, when there is room for one.
async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> Counted {
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
        task::JoinHandle,
        time::timeout,
    };

    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    const SOON: Duration = Duration::from_secs(5);

    async fn open(bounds: Bounds) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stopping) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new().route("/", get(async || "hello"));
        (address, stopping.clone(), tokio::spawn(serve(listener, router, bounds, None, stopping)))
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_ends_the_connection() {
        let (address, ..) = open(Bounds { connections: 9, head_deadline: Duration::from_millis(50) }).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
        let mut answer = Vec::new();
        timeout(SOON, client.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn one_connection_too_many_waits_for_another_to_end() {
        let (address, ..) = open(Bounds { connections: 1, head_deadline: SOON * 4 }).await;
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
        let (address, stopping, served) = open(Bounds { connections: 9, head_deadline: SOON * 4 }).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(REQUEST).await.unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).await.unwrap();
        stopping.cancel();
        timeout(SOON, served).await.unwrap().unwrap();
    }
}
