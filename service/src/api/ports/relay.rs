//! Bytes between a client and a sandbox, for as long as some come.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, Sleep},
};

/// What is read at once of a tunnel.
const CHUNK_BYTES: usize = 16 * 1024;

/// When something came last, in either direction. Cheap to clone.
#[derive(Clone)]
pub(in crate::api) struct Activity(Arc<Inner>);

struct Inner {
    last: Mutex<Instant>,
    idle_deadline: Duration,
    tell: Box<dyn Fn() + Send + Sync>,
}

impl Activity {
    /// `tell` is called with every sign of life.
    pub(in crate::api) fn new(idle_deadline: Duration, tell: impl Fn() + Send + Sync + 'static) -> Self {
        tell();
        Self(Arc::new(Inner { last: Mutex::new(Instant::now()), idle_deadline, tell: Box::new(tell) }))
    }

    fn note(&self) {
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        (self.0.tell)();
    }

    fn ends_at(&self) -> Instant {
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) + self.0.idle_deadline
    }

    /// Returns when nothing has come for too long.
    async fn idle(&self) {
        while Instant::now() < self.ends_at() {
            tokio::time::sleep_until(self.ends_at()).await;
        }
    }
}

/// A body that breaks off when nothing comes for too long, in either direction.
pub(super) struct Patient {
    body: Body,
    activity: Activity,
    /// There while nothing comes.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    pub(super) fn new(body: Body, activity: Activity) -> Self {
        Self { body, activity, sleep: None }
    }
}

impl HttpBody for Patient {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            self.activity.note();
            self.sleep = None;
            return Poll::Ready(frame);
        }
        loop {
            let ends_at = self.activity.ends_at();
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(ends_at)));
            if sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= self.activity.ends_at() {
                return Poll::Ready(Some(Err(axum::Error::new("nothing came for too long"))));
            }
            // Something came the other way.
            self.sleep = None;
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Copies until both have ended, one breaks, or nothing comes for too long. One that ends its half may go on reading.
pub(in crate::api) async fn both_ways(one: impl AsyncRead + AsyncWrite, other: impl AsyncRead + AsyncWrite, activity: Activity) {
    let (from_one, to_one) = tokio::io::split(one);
    let (from_other, to_other) = tokio::io::split(other);
    let pumps = async { tokio::try_join!(pump(from_one, to_other, &activity), pump(from_other, to_one, &activity)) };
    tokio::select! {
        pumped = pumps => {
            if let Err(error) = pumped {
                tracing::debug!(%error, "a tunnel broke");
            }
        }
        () = activity.idle() => tracing::debug!("a tunnel rested for too long"),
    }
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, activity: &Activity) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let read = from.read(&mut buffer).await?;
        activity.note();
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn activity() -> (Activity, Arc<AtomicU32>) {
        let told = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&told);
        (
            Activity::new(Duration::from_secs(60), move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
            told,
        )
    }

    #[tokio::test]
    async fn a_half_that_is_closed_leaves_the_other_open() {
        let (mut client, ours) = tokio::io::duplex(64);
        let (mut sandbox, theirs) = tokio::io::duplex(64);
        let (activity, told) = activity();
        let relaying = tokio::spawn(both_ways(ours, theirs, activity));

        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = Vec::new();
        sandbox.read_to_end(&mut question).await.unwrap();
        sandbox.write_all(b"answer").await.unwrap();
        drop(sandbox);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        relaying.await.unwrap();

        assert_eq!((question.as_slice(), answer.as_slice()), (&b"question"[..], &b"answer"[..]));
        assert!(told.load(Ordering::Relaxed) >= 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_that_rests_is_ended_and_one_that_talks_is_not() {
        let (mut client, ours) = tokio::io::duplex(64);
        let (sandbox, theirs) = tokio::io::duplex(1024);
        let relaying = tokio::spawn(both_ways(ours, theirs, activity().0));
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(50)).await;
            client.write_all(b".").await.unwrap();
        }
        assert!(!relaying.is_finished());
        tokio::time::timeout(Duration::from_secs(70), relaying).await.unwrap().unwrap();
        drop(sandbox);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_coming_breaks_off() {
        let never = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::convert::Infallible>>());
        assert!(axum::body::to_bytes(Body::new(Patient::new(never, activity().0)), 10).await.is_err());
    }
}
