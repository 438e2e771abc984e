//! What is brought to registries: blobs that they do not have, and the manifest that names them (distribution-spec 1.1, «Push»).

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::Stream;
use oci_spec::image::Sha256Digest;
use reqwest::{
    Method, RequestBuilder, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE},
};
use tokio::time::Instant;

use super::{
    ANYTHING, Session,
    patience::{Patience, Trouble, retry_after},
    reason, target,
};
use crate::images::ImportError;

const CHUNK_BYTES: usize = 1 << 18;
/// Between two looks at how far an upload has come.
const LOOK: Duration = Duration::from_millis(200);
/// A registry that has it all may hash it, and bring it elsewhere, before it answers.
const COMMIT: Duration = Duration::from_secs(300);

/// How a registry came to have something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::images) enum Sent {
    Now,
    WasThere,
}

impl Session<'_> {
    /// Sees to it that the registry has this blob, of which each of `open` reads the whole, and tells how far it came.
    pub(in crate::images) async fn bring_blob(
        &self,
        digest: &Sha256Digest,
        bytes: u64,
        open: impl Fn() -> anyhow::Result<File>,
        mut tell: impl FnMut(u64),
    ) -> Result<Sent, ImportError> {
        let mut patience = Patience::new(self.attempts_max);
        loop {
            tell(0);
            match self.try_to_bring(digest, bytes, &open, &mut tell).await {
                Ok(sent) => {
                    tell(bytes);
                    return Ok(sent);
                }
                Err(trouble) => self.bear(&mut patience, trouble).await?,
            }
        }
    }

    async fn try_to_bring(
        &self,
        digest: &Sha256Digest,
        bytes: u64,
        open: &impl Fn() -> anyhow::Result<File>,
        tell: &mut impl FnMut(u64),
    ) -> Result<Sent, Trouble> {
        match self.ask(Method::HEAD, &format!("blobs/sha256:{digest}"), ANYTHING, 0).await {
            Ok(_) => return Ok(Sent::WasThere),
            Err(Trouble::NotFound) => {}
            Err(trouble) => return Err(trouble),
        }
        let begun = self.ask(Method::POST, "blobs/uploads/", ANYTHING, 0).await?;
        let mut place = target(begun.url(), &begun)?;
        place.query_pairs_mut().append_pair("digest", &format!("sha256:{digest}"));
        self.registries.check_url(&place).map_err(Trouble::Refused)?;
        let sent = Arc::new(AtomicU64::new(0));
        let request = self.known_to(self.registries.client.put(place.clone()), &place);
        let request = request.header(CONTENT_TYPE, "application/octet-stream").header(CONTENT_LENGTH, bytes);
        let request = request.body(reqwest::Body::wrap_stream(pieces(open()?, bytes, Arc::clone(&sent))));
        taken(&self.watched(request, bytes, &sent, tell).await?).map(|()| Sent::Now)
    }

    /// Makes the tag of this session's source name this manifest, whose blobs are there.
    pub(in crate::images) async fn bring_manifest(&self, tag: &str, media_type: &str, manifest: &[u8]) -> Result<(), ImportError> {
        let mut patience = Patience::new(self.attempts_max);
        loop {
            match self.try_to_name(tag, media_type, manifest).await {
                Ok(()) => return Ok(()),
                Err(trouble) => self.bear(&mut patience, trouble).await?,
            }
        }
    }

    async fn try_to_name(&self, tag: &str, media_type: &str, manifest: &[u8]) -> Result<(), Trouble> {
        let url = self.url(&format!("manifests/{tag}"))?;
        self.registries.check_url(&url).map_err(Trouble::Refused)?;
        let mut has_logged_in = false;
        loop {
            let request = self.known_to(self.registries.client.put(url.clone()), &url).header(CONTENT_TYPE, media_type);
            let response = self.send(request.body(manifest.to_vec())).await?;
            if response.status() == StatusCode::UNAUTHORIZED && !has_logged_in {
                has_logged_in = true;
                self.log_in(response.headers()).await?;
                continue;
            }
            return taken(&response);
        }
    }

    /// With what the registry knows us by, if it goes there.
    fn known_to(&self, request: RequestBuilder, url: &Url) -> RequestBuilder {
        match self.authorization() {
            Some(authorization) if url.origin() == self.base.origin() => request.header(AUTHORIZATION, authorization),
            Some(_) | None => request,
        }
    }

    /// The answer to what takes as long as its body does, unless nothing of that is taken for too long.
    async fn watched(
        &self,
        request: RequestBuilder,
        bytes: u64,
        sent: &AtomicU64,
        tell: &mut impl FnMut(u64),
    ) -> Result<Response, Trouble> {
        let mut answer = std::pin::pin!(request.send());
        let (mut last, mut since) = (0, Instant::now());
        loop {
            if let Ok(answered) = tokio::time::timeout(LOOK, &mut answer).await {
                return answered.map_err(|error| reason(&error));
            }
            let now = sent.load(Ordering::Relaxed);
            if now != last {
                (last, since) = (now, Instant::now());
                tell(now);
            }
            let patience = if now == bytes { COMMIT.max(self.registries.stall) } else { self.registries.stall };
            if since.elapsed() > patience {
                return Err(Trouble::passing(format!("took nothing for {} s", patience.as_secs())));
            }
        }
    }
}

/// Whether the registry has it now.
fn taken(response: &Response) -> Result<(), Trouble> {
    match response.status() {
        StatusCode::CREATED | StatusCode::OK | StatusCode::NO_CONTENT => Ok(()),
        // What it knew us by has expired meanwhile; the next attempt asks for another.
        StatusCode::UNAUTHORIZED => Err(Trouble::passing("answered 401".to_owned())),
        StatusCode::FORBIDDEN => Err(Trouble::Denied("answered 403".to_owned())),
        StatusCode::NOT_FOUND => Err(Trouble::passing("has forgotten what was begun".to_owned())),
        status => Err(Trouble::of_status(status, retry_after(response.headers()))),
    }
}

/// A file in pieces, from its beginning on wherever somebody else reads it, and how far it has come.
fn pieces(file: File, bytes: u64, sent: Arc<AtomicU64>) -> impl Stream<Item = io::Result<Vec<u8>>> + Send + 'static {
    futures_util::stream::try_unfold((file, 0), move |(file, at)| {
        let sent = Arc::clone(&sent);
        async move {
            if at == bytes {
                return Ok(None);
            }
            let wanted = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            let read = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; wanted];
                file.read_exact_at(&mut piece, at).map(|()| (file, piece))
            });
            let (file, piece) = read.await??;
            let len = piece.len() as u64;
            sent.fetch_add(len, Ordering::Relaxed);
            Ok(Some((piece, (file, at + len))))
        }
    })
}
