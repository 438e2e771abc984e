//! What a request may be before any handler looks at it: the size of its head, and the time of its body.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use futures_util::StreamExt as _;
use hyper::{
    body::{Frame, SizeHint},
    header,
};
use tokio::time::{Instant, Sleep};

use super::error::ApiError;

/// Target, names and values together. The longest that has a use is a token, four times.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// What a body must bring beyond the first moments: somebody who sends a byte now and then holds a connection, and a place for an upload.
const BODY_BYTES_PER_S_MIN: u64 = 16 * 1024;

/// Refuses a head that is too large.
pub(super) async fn bound_head(request: Request, next: Next) -> Response {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let fields: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if target + fields > HEAD_BYTES_MAX {
        return ApiError::HeadTooLarge(HEAD_BYTES_MAX).into_response();
    }
    next.run(request).await
}

/// How long what comes of a body is still taken, and dropped, when the answer was given without it.
const LINGER: Duration = Duration::from_secs(10);

/// Ends a body that does not come: it has `patience`, and a second more for each 16 KiB.
///
/// Whoever is answered before all of the body has come may still be sending. A socket that is closed while something comes in is reset, and the answer on its way is lost (RFC 9112, section 9.6); so
/// the rest is read for a while.
pub(super) async fn bound_body(State(patience): State<Duration>, request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let is_late = Arc::new(AtomicBool::new(false));
    let began_at = Instant::now();
    // Whoever waits to be asked for it is not asked, unless somebody here did.
    let lingers = !request.headers().contains_key(header::EXPECT);
    let request =
        request.map(|body| Body::new(Timed { body, began_at, patience, bytes: 0, sleep: None, is_late: Arc::clone(&is_late), lingers }));
    let response = next.run(request).await;
    // Whatever the handler made of the broken body, this is why it broke.
    if is_late.load(Ordering::Relaxed) && !response.status().is_success() {
        return ApiError::SlowBody.into_response();
    }
    response
}

/// A body that breaks off when it is too slow.
struct Timed {
    body: Body,
    began_at: Instant,
    patience: Duration,
    bytes: u64,
    /// There while nothing comes.
    sleep: Option<Pin<Box<Sleep>>>,
    is_late: Arc<AtomicBool>,
    /// Whether the rest is read when nobody wants it any more.
    lingers: bool,
}

impl Drop for Timed {
    fn drop(&mut self) {
        if self.lingers && !self.is_end_stream() {
            let mut rest = std::mem::take(&mut self.body).into_data_stream();
            tokio::spawn(tokio::time::timeout(LINGER, async move { while let Some(Ok(_)) = rest.next().await {} }));
        }
    }
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        // That asks for it, by 100 (Continue).
        self.lingers = true;
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(Ok(frame)) = &frame {
                self.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
            } else {
                self.lingers = false;
            }
            self.sleep = None;
            return Poll::Ready(frame);
        }
        let ends_at = self.began_at + self.patience + Duration::from_secs(self.bytes / BODY_BYTES_PER_S_MIN);
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(ends_at)));
        if sleep.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        self.is_late.store(true, Ordering::Relaxed);
        self.lingers = false;
        Poll::Ready(Some(Err(axum::Error::new("the body comes too slowly"))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::{Router, middleware, routing::post};
    use futures_util::stream;
    use tower::ServiceExt as _;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// The status that a body of pieces of this size gets, one a second.
    async fn answer(piece: usize, pieces: usize) -> u16 {
        let count = async |body: Body| {
            axum::body::to_bytes(body, usize::MAX).await.map(|bytes| bytes.len().to_string()).map_err(|_| ApiError::NotFound)
        };
        let router = Router::new().route("/", post(count)).layer(middleware::from_fn_with_state(PATIENCE, bound_body));
        let pieces = stream::iter(0..pieces).then(move |_| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, Infallible>(vec![0; piece])
        });
        let request = Request::post("/").body(Body::from_stream(pieces)).unwrap();
        router.oneshot(request).await.unwrap().status().as_u16()
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_ended() {
        assert_eq!(answer(1, 100).await, 408);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_flows_is_taken_however_long_it_is() {
        assert_eq!(answer(20_000, 100).await, 200);
        assert_eq!(answer(1, 9).await, 200);
    }
}
