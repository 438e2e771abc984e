//! What tells one request from another: sums of its target, and of its body, taken while that goes through.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::{Method, Uri},
};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};
use sha2::{Digest as _, Sha256};

use crate::{api::error::ApiError, images::ARCHIVE_BYTES_MAX, sandbox::Invalid};

/// A body that brings nothing for so long was given up.
const IDLE: Duration = Duration::from_secs(60);

pub(super) fn of_target(method: &Method, uri: &Uri) -> [u8; 32] {
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    // No method has a blank in it, no target either.
    Sha256::digest(format!("{method} {target}")).into()
}

pub(super) fn of_body(body: &[u8]) -> [u8; 32] {
    Sha256::digest(body).into()
}

/// Of a body that is read for nothing else.
pub(super) async fn of_stream(mut body: Body) -> Result<[u8; 32], ApiError> {
    let mut sum = Sha256::new();
    let mut len = 0_u64;
    loop {
        let broken = |why: String| ApiError::Invalid(Invalid::new("", why));
        let next = tokio::time::timeout(IDLE, body.frame()).await;
        let next = next.map_err(|_| broken(format!("the body brought nothing for {} s", IDLE.as_secs())))?;
        let Some(frame) = next else { return Ok(sum.finalize().into()) };
        let frame = frame.map_err(|error| broken(format!("the body could not be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        len += data.len() as u64;
        if len > ARCHIVE_BYTES_MAX {
            return Err(ApiError::PayloadTooLarge(format!("the body has more than {ARCHIVE_BYTES_MAX} bytes")));
        }
        sum.update(&data);
    }
}

/// A body whose sum is known when it was read to its end.
#[derive(Debug)]
pub(super) struct Hashed {
    body: Body,
    sum: Sha256,
    done: Sum,
}

/// See [`Hashed`].
#[derive(Debug, Clone, Default)]
pub(super) struct Sum(Arc<OnceLock<[u8; 32]>>);

impl Sum {
    pub(super) fn get(&self) -> Option<[u8; 32]> {
        self.0.get().copied()
    }
}

impl Hashed {
    pub(super) fn new(body: Body) -> Self {
        let hashed = Self { body, sum: Sha256::new(), done: Sum::default() };
        if hashed.body.is_end_stream() {
            hashed.done.0.get_or_init(|| of_body(&[]));
        }
        hashed
    }

    /// One whose sum is known beforehand, however much of it is read.
    pub(super) fn known(body: Body, sum: Option<[u8; 32]>) -> Self {
        let done = Sum(Arc::new(sum.map_or_else(OnceLock::new, OnceLock::from)));
        Self { body, sum: Sha256::new(), done }
    }

    pub(super) fn sum(&self) -> Sum {
        self.done.clone()
    }
}

impl HttpBody for Hashed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if self.done.get().is_none() {
            match &polled {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.sum.update(data);
                    }
                }
                Poll::Ready(None) => {
                    let sum = std::mem::take(&mut self.sum).finalize().into();
                    self.done.0.get_or_init(|| sum);
                }
                Poll::Ready(Some(Err(_))) | Poll::Pending => {}
            }
        }
        polled
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
    use futures_util::stream;

    use super::*;

    #[tokio::test]
    async fn a_body_goes_through_unharmed_and_its_sum_is_known_at_its_end() {
        let pieces = stream::iter(["first", "", "second"].map(Ok::<_, std::io::Error>));
        let hashed = Hashed::new(Body::from_stream(pieces));
        let sum = hashed.sum();
        assert_eq!(sum.get(), None);

        let read = Body::new(hashed).collect().await.unwrap().to_bytes();

        assert_eq!(&read[..], b"firstsecond");
        assert_eq!(sum.get(), Some(of_body(b"firstsecond")));
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_has_no_sum() {
        let pieces = stream::iter([Ok("first"), Err(std::io::Error::other("gone"))]);
        let hashed = Hashed::new(Body::from_stream(pieces));
        let sum = hashed.sum();

        assert!(Body::new(hashed).collect().await.is_err());
        assert_eq!(sum.get(), None);
    }

    #[test]
    fn method_path_and_query_tell_requests_apart() {
        let of = |method: &Method, uri: &str| of_target(method, &uri.parse().unwrap());
        assert_ne!(of(&Method::POST, "/v1/runs"), of(&Method::POST, "/v1/sandboxes"));
        assert_ne!(of(&Method::POST, "/v1/runs"), of(&Method::POST, "/v1/runs?a"));
        assert_ne!(of(&Method::POST, "/v1/runs"), of(&Method::PUT, "/v1/runs"));
    }
}
