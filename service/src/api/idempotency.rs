//! `Idempotency-Key`: a POST that is sent again has one effect and one answer, after draft-ietf-httpapi-idempotency-key-header.
//!
//! One layer around every route, so that an operation that is added has this too. An operation that makes a sandbox takes [`Keyed`] among its
//! arguments: the sandbox is tied to the key in the transaction that admits it. So does one that must not be done twice: it says when it begins
//! ([`Keyed::begin`]). Every other operation must be fit to be done again, for a key that a process left behind when it died is taken over.

mod at_work;
mod fingerprint;

use std::{convert::Infallible, sync::Arc, time::Duration};

use at_work::AtWork;
use axum::{
    body::{Body, Bytes},
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use fingerprint::Hashed;
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;

use super::{
    App, QUICK_DEADLINE, STOP_DEADLINE, caller::Caller, commit::COMMIT, error::ApiError, execs, json, observe, runs, runs::batch,
    sandboxes, webhooks,
};
use crate::{
    sandbox::{Invalid, SandboxId, WAIT_MS},
    store::{Fingerprint, HeldKey, Kept, KeyName, KeyState, Left, NodeId, StoreError, Taking},
    token::Scope,
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const KEY_BYTES_MAX: usize = 255;
/// The route by which execs are made, and that of many runs.
const EXECS: &str = "/v1/sandboxes/{id}/execs";
const BATCH: &str = "/v1/runs/batch";

/// The largest body that is kept of an answer that can be told again from its sandbox, and of one that cannot.
const TOLD_BYTES_MAX: usize = 64 * 1024;
const KEPT_BYTES_MAX: usize = 1024 * 1024;

/// Between two looks at a key that another process holds, and at one that this process holds, whose end is heard.
const LOOK: Duration = Duration::from_millis(250);
const LOOK_HERE: Duration = Duration::from_secs(5);
/// Longer than any import takes whose client goes on sending, and any pull.
const IMPORT_DEADLINE: Duration = Duration::from_secs(3600);
/// How far two nodes' clocks may be apart.
const CLOCKS_APART: Duration = Duration::from_secs(60);

/// What the layer knows.
#[derive(Debug)]
pub struct Idempotency {
    node: NodeId,
    process: Uuid,
    retention: Duration,
    at_work: AtWork,
}

impl Idempotency {
    /// Keeps answers for this long. What an earlier process of this node left is taken over.
    pub fn new(node: NodeId, retention: Duration) -> Self {
        Self { node, process: Uuid::new_v4(), retention, at_work: AtWork::default() }
    }

    /// For how long a key is known.
    pub(super) const fn retention(&self) -> Duration {
        self.retention
    }
}

/// What an operation that makes a sandbox is to know of the key that its request came with.
#[derive(Debug, Clone, Default)]
pub(super) struct Keyed {
    pub(super) key: Option<HeldKey>,
    /// Made by an attempt that is over: to be answered with.
    pub(super) made: Option<SandboxId>,
    /// By an attempt that is over, and of which nobody knows how far it came.
    pub(super) is_begun: bool,
}

impl Keyed {
    /// To be awaited in front of what must not be done twice: an error where it may have been done already.
    pub(super) async fn begin(&self, app: &App) -> Result<(), ApiError> {
        if self.is_begun {
            return Err(ApiError::OutcomeUnknown);
        }
        let Some(key) = &self.key else { return Ok(()) };
        if !app.store.begin_keyed(key).await? {
            return Err(ApiError::KeyInUse);
        }
        sandbox_core::fail_point::reached("service.idempotency.begun");
        Ok(())
    }
}

impl Keyed {
    /// The same for one part of the request, which may make a sandbox of its own: whoever holds the key of the whole holds those of its parts, and nobody
    /// else works on them. `body` is what the part asks for: at the same place of another request something else is another part.
    pub(super) async fn part(&self, app: &App, place: usize, body: &[u8]) -> Result<Self, ApiError> {
        let Some(HeldKey { name, holder }) = &self.key else { return Ok(Self::default()) };
        let sum = fingerprint::of_body(body);
        let part = Sha256::new().chain_update(format!("{place} {}\n", name.key)).chain_update(sum).finalize();
        let name = KeyName { owner: name.owner.clone(), key: format!("part:{}", hex::encode(part)) };
        let key = HeldKey { name, holder: *holder };
        let target = Sha256::digest("a part of a request").into();
        let Idempotency { node, process, retention, .. } = &app.idempotency;
        let now = app.clock.now();
        let expires_at = now + *retention;
        // Whenever it was taken, that was by an attempt that is over; the admission sees to it if it is not.
        let taking = Taking { node: *node, process: *process, now, expires_at, orphaned_before: Some(expires_at) };
        match app.store.take_key(&key, &Fingerprint { target, body: Some(sum) }, &taking).await? {
            Some((KeyState::Ours { made, is_begun }, _)) => Ok(Self { key: Some(key), made, is_begun }),
            Some((KeyState::Theirs | KeyState::Reused | KeyState::Answered(_), _)) | None => Err(ApiError::KeyInUse),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Keyed {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().cloned().unwrap_or_default())
    }
}

/// The id of what a request with a key makes, so that it is the same however often the work is done.
pub(super) fn keyed_uuid(caller: &Caller, keyed: &Keyed) -> Option<Uuid> {
    let held = keyed.key.as_ref()?;
    let name = [caller.tenant.as_str(), &caller.principal, &held.name.key].join("\n");
    let digest = Sha256::digest(name.as_bytes());
    Some(uuid::Builder::from_custom_bytes(digest[..16].try_into().expect("a digest has 32 bytes")).into_uuid())
}

/// Sees to it that a POST with a key has one effect and one answer. One without is none of its business.
pub(super) async fn once(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    match route {
        Some(route) if request.method() == Method::POST && request.headers().contains_key(IDEMPOTENCY_KEY) => {
            Keying { app, route: Route(route) }.answer(request, next).await.unwrap_or_else(IntoResponse::into_response)
        }
        Some(_) | None => next.run(request).await,
    }
}

/// Where a request goes, and what the layer must know of that.
#[derive(Clone)]
struct Route(MatchedPath);

impl Route {
    /// What its answers may be told to. Of an area that is new here: to nobody who may not do everything.
    fn scope(&self) -> Scope {
        let below = |area: &str| self.0.as_str().strip_prefix(area).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        match () {
            // Its answers tell of images.
            () if self.0.as_str() == COMMIT => Scope::ImagesWrite,
            () if below("/v1/runs") => Scope::Runs,
            () if below("/v1/sandboxes") || below("/v1/pools") => Scope::SandboxesWrite,
            () if below("/v1/images") || below("/v1/registries") => Scope::ImagesWrite,
            () if below("/v1/volumes") => Scope::Volumes,
            () if below("/v1/webhooks") => Scope::Webhooks,
            () => Scope::Admin,
        }
    }

    /// Whether its bodies are too large to be held.
    fn is_streamed(&self) -> bool {
        self.0.as_str() == "/v1/images/import"
    }

    /// How long it may take.
    fn deadline(&self) -> Duration {
        match self.0.as_str() {
            "/v1/runs" | BATCH | EXECS => Duration::from_millis(WAIT_MS.max) + QUICK_DEADLINE,
            "/v1/sandboxes/{id}/stop" => STOP_DEADLINE,
            COMMIT | "/v1/images/pull" | "/v1/images/push" | "/v1/images/verify" => IMPORT_DEADLINE,
            _ if self.is_streamed() => IMPORT_DEADLINE,
            _ => QUICK_DEADLINE,
        }
    }

    /// Whether its requests may hold a password, of which no sum is kept that passwords could be tried with.
    fn holds_password(&self) -> bool {
        ["/v1/images/pull", "/v1/images/push", "/v1/registries"].contains(&self.0.as_str())
    }

    /// Whether its answers hold what must not be kept.
    fn has_secret(&self) -> bool {
        webhooks::WITH_SECRET.contains(&self.0.as_str())
    }

    /// What is kept of the body of an answer.
    fn kept(&self, body: &[u8]) -> Vec<u8> {
        match () {
            () if self.has_secret() => webhooks::without_secret(body),
            () if self.is_batch() && body.len() > TOLD_BYTES_MAX => batch::without_runs(body),
            () => body.to_vec(),
        }
    }

    /// Whether its answers can be told again, run by run.
    fn is_batch(&self) -> bool {
        self.0.as_str() == BATCH
    }

    /// Whether what it does not find is an image, which may be brought to where it was looked for: here, or to a registry.
    fn looks_for_image(&self) -> bool {
        matches!(
            self.0.as_str(),
            "/v1/runs" | "/v1/sandboxes" | "/v1/pools" | "/v1/images/pull" | "/v1/images/push" | "/v1/images/tag" | "/v1/images/verify"
        )
    }

    /// Whether it makes sandboxes or execs, of which its answers can be told again.
    fn makes_sandboxes(&self) -> bool {
        matches!(self.0.as_str(), "/v1/runs" | "/v1/sandboxes" | EXECS)
    }
}

/// How long a key that made nothing is kept after it was given back.
const GIVEN_BACK_FOR: Duration = Duration::from_secs(600);

/// What becomes of a key when an attempt is over.
enum Settled {
    /// With the sum of the body that it answers.
    Answered(Kept, [u8; 32]),
    GivenBack(Left),
}

/// One request with a key.
#[derive(Clone)]
struct Keying {
    app: Arc<App>,
    route: Route,
}

impl Keying {
    async fn answer(self, request: Request, next: Next) -> Result<Response, ApiError> {
        let (mut parts, body) = request.into_parts();
        let caller = Caller::verified(&parts, &self.app).await?;
        caller.require(self.route.scope())?;
        let name = KeyName { owner: caller.owner(), key: key_in(&parts.headers)? };
        let target = fingerprint::of_target(&parts.method, &parts.uri);
        // The handler need not ask again.
        parts.extensions.insert(caller.clone());
        let attempt = HeldKey { name, holder: Uuid::new_v4() };
        if self.route.is_streamed() {
            return self.answer_streamed(attempt, target, (parts, body), next).await;
        }
        let body = Bytes::from(json::bytes(body).await?);
        self.answer_held(attempt, target, (parts, body), next).await
    }

    async fn answer_held(
        self,
        attempt: HeldKey,
        target: [u8; 32],
        (parts, body): (Parts, Bytes),
        next: Next,
    ) -> Result<Response, ApiError> {
        let sum = if self.route.holds_password() { self.app.images.sum_of(&body) } else { fingerprint::of_body(&body) };
        let fingerprint = Fingerprint { target, body: Some(sum) };
        let deadline = Instant::now() + self.route.deadline();
        loop {
            match self.take(&attempt, &fingerprint).await? {
                KeyState::Ours { made, is_begun } => {
                    let body = Hashed::known(Body::from(body), fingerprint.body);
                    let keyed = Keyed { key: Some(attempt.clone()), made, is_begun };
                    return self.work((attempt, keyed), (parts, body), next).await;
                }
                KeyState::Answered(kept) => return self.replay(&attempt.name, kept).await,
                KeyState::Reused => return Err(ApiError::KeyReused),
                KeyState::Theirs => self.wait(&attempt.name, deadline).await?,
            }
        }
    }

    /// The body goes through as it comes; what it was is known behind it.
    async fn answer_streamed(
        self,
        attempt: HeldKey,
        target: [u8; 32],
        (parts, body): (Parts, Body),
        next: Next,
    ) -> Result<Response, ApiError> {
        let mut state = self.take(&attempt, &Fingerprint { target, body: None }).await?;
        if let KeyState::Ours { made, is_begun } = state {
            let keyed = Keyed { key: Some(attempt.clone()), made, is_begun };
            return self.work((attempt, keyed), (parts, Hashed::new(body)), next).await;
        }
        if state == KeyState::Reused {
            // What is still on its way is not read: nothing may follow it on this connection (RFC 9112, section 9.3).
            let mut refused = ApiError::KeyReused.into_response();
            refused.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return Ok(refused);
        }
        let fingerprint = Fingerprint { target, body: Some(fingerprint::of_stream(body).await?) };
        let deadline = Instant::now() + self.route.deadline();
        loop {
            // Given back meanwhile: this request's body is gone, so that it cannot do the work.
            let looked = self.app.store.look_at_key(&attempt.name, &fingerprint, self.app.clock.now()).await?;
            state = looked.ok_or(ApiError::KeyInUse)?;
            match state {
                KeyState::Answered(kept) => return self.replay(&attempt.name, kept).await,
                KeyState::Reused => return Err(ApiError::KeyReused),
                KeyState::Theirs | KeyState::Ours { .. } => self.wait(&attempt.name, deadline).await?,
            }
        }
    }

    /// Takes the key, if it can be had. In a task of its own: a client who goes away meanwhile must not leave a key that nobody works for.
    async fn take(&self, attempt: &HeldKey, fingerprint: &Fingerprint) -> Result<KeyState, ApiError> {
        let (keying, attempt, fingerprint) = (self.clone(), attempt.clone(), *fingerprint);
        let (give, mut got) = tokio::sync::oneshot::channel();
        let taking = async move {
            let taken = keying.take_now(&attempt, &fingerprint).await;
            let is_lost = matches!(&taken, Err(ApiError::DatabaseUnavailable));
            let is_ours = matches!(&taken, Ok(KeyState::Ours { .. }));
            // Nobody waits for it any more, or nobody knows whether it was taken.
            if (give.send(taken).is_err() && is_ours) || is_lost {
                keying.settle_later(&attempt, &Settled::GivenBack(Left::Undone)).await;
            }
        };
        tokio::spawn(taking.in_current_span());
        (&mut got).await.unwrap_or_else(|_panic| Err(ApiError::panicked()))
    }

    async fn take_now(&self, attempt: &HeldKey, fingerprint: &Fingerprint) -> Result<KeyState, ApiError> {
        let Self { app, route } = self;
        let Idempotency { node, process, retention, at_work } = &app.idempotency;
        let now = app.clock.now();
        let orphaned_before = now - route.deadline() - CLOCKS_APART;
        let taking = Taking {
            node: *node,
            process: *process,
            now,
            expires_at: now + *retention,
            orphaned_before: at_work.end_of(&attempt.name).is_none().then_some(orphaned_before),
        };
        let Some((state, is_suspended)) = app.store.take_key(attempt, fingerprint, &taking).await? else { return Ok(KeyState::Theirs) };
        // Who holds the key hears it of the operation itself.
        if is_suspended && !matches!(state, KeyState::Ours { .. }) {
            return Err(ApiError::Suspended);
        }
        Ok(state)
    }

    /// Waits for news of a key that another attempt holds; an error after the deadline.
    async fn wait(&self, name: &KeyName, deadline: Instant) -> Result<(), ApiError> {
        if Instant::now() >= deadline {
            return Err(ApiError::KeyInUse);
        }
        match self.app.idempotency.at_work.end_of(name) {
            // It is dropped when the work is over, which is all that it says.
            Some(mut end) => drop(tokio::time::timeout_at(deadline.min(Instant::now() + LOOK_HERE), end.changed()).await),
            None => tokio::time::sleep_until(deadline.min(Instant::now() + LOOK)).await,
        }
        Ok(())
    }

    /// Does the work, in a task of its own: a client who goes away changes nothing.
    async fn work(self, (attempt, keyed): (HeldKey, Keyed), (mut parts, body): (Parts, Hashed), next: Next) -> Result<Response, ApiError> {
        let request_id = observe::request_id(&parts);
        let end = self.app.idempotency.at_work.begin(&attempt.name);
        let is_made = keyed.made.is_some();
        parts.extensions.insert(keyed);
        let sum = body.sum();
        let request = Request::from_parts(parts, Body::new(body));
        let work = async move {
            let response = next.run(request).await;
            let (mut response, kept) = match self.told(response, &request_id).await {
                Ok(told) => told,
                Err(error) => {
                    self.settle_later(&attempt, &Settled::GivenBack(Left::Unknown)).await;
                    return Err(error);
                }
            };
            // An answer to a body that nobody read to its end is an answer to anything.
            let settled = match kept.zip(sum.get()) {
                Some((kept, body)) => Settled::Answered(kept, body),
                None => Settled::GivenBack(left_after(response.status())),
            };
            sandbox_core::fail_point::reached("service.idempotency.worked");
            let stored = self.settle(&attempt, &settled).await;
            if is_made {
                mark_as_replayed(&mut response);
            }
            if let Err(error) = stored {
                // The answer is true all the same.
                tracing::warn!(%error, "an answer could not be kept; it is tried again");
                tokio::spawn(async move {
                    self.settle_later(&attempt, &settled).await;
                    drop(end);
                });
            }
            Ok(response)
        };
        tokio::spawn(work.in_current_span()).await.unwrap_or_else(|_panic| Err(ApiError::panicked()))
    }

    /// The answer with its body as the client will have it, and what is to be kept of it.
    async fn told(&self, mut response: Response, request_id: &str) -> Result<(Response, Option<Kept>), ApiError> {
        let is_retryable = observe::is_retryable(&response);
        response = observe::with_problem(response, request_id);
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| ApiError::Internal(error.into()))?.to_bytes();
        let text = |name| parts.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(ToOwned::to_owned);
        let can_be_told_again = self.route.makes_sandboxes() && parts.status.is_success();
        let kept = Kept {
            status: parts.status.as_u16(),
            content_type: text(header::CONTENT_TYPE),
            location: text(header::LOCATION),
            body: (!can_be_told_again || body.len() <= TOLD_BYTES_MAX).then(|| self.route.kept(&body)),
            made: None,
        };
        let kept_bytes = kept.body.as_ref().map_or(0, Vec::len);
        let is_passing = self.route.looks_for_image() && parts.status == StatusCode::NOT_FOUND;
        let is_kept = !is_retryable && !is_passing && is_kept(parts.status) && kept_bytes <= KEPT_BYTES_MAX;
        let mut response = Response::from_parts(parts, Body::from(body));
        observe::mark_as_told(&mut response);
        Ok((response, is_kept.then_some(kept)))
    }

    async fn settle(&self, attempt: &HeldKey, settled: &Settled) -> Result<(), StoreError> {
        match settled {
            Settled::Answered(kept, body) => self.app.store.keep_answer(attempt, Some(*body), kept).await,
            Settled::GivenBack(left) => self.app.store.give_key_back(attempt, *left, self.app.clock.now() + GIVEN_BACK_FOR).await,
        }
    }

    /// Until it works, or the key counts as an orphan's anyway.
    async fn settle_later(&self, attempt: &HeldKey, settled: &Settled) {
        const PAUSE_MAX: Duration = Duration::from_secs(5);
        let deadline = Instant::now() + self.route.deadline();
        let mut pause = Duration::from_millis(100);
        while Instant::now() < deadline {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            if self.settle(attempt, settled).await.is_ok() {
                return;
            }
        }
    }

    /// The answer that was given before.
    async fn replay(&self, name: &KeyName, kept: Kept) -> Result<Response, ApiError> {
        let Kept { status, content_type, location, body, made } = kept;
        let mut response = match (body, made) {
            (Some(body), _) if self.route.has_secret() => Body::from(webhooks::with_secret(&self.app, body)).into_response(),
            (Some(body), _) if self.route.is_batch() => batch::told_again(&self.app, &name.owner.tenant, body).await?,
            (Some(body), _) => Body::from(body).into_response(),
            (None, Some(id)) if self.route.0.as_str() == EXECS => execs::told_again(&self.app, &name.owner.tenant, id).await?,
            (None, Some(id)) if self.route.scope() == Scope::Runs => runs::told_again(&self.app, &name.owner.tenant, id).await?,
            (None, Some(id)) => sandboxes::told_again(&self.app, &name.owner.tenant, id).await?,
            (None, None) => return Err(ApiError::Internal(anyhow::anyhow!("an answer was kept without its body"))),
        };
        *response.status_mut() = StatusCode::from_u16(status).map_err(|error| ApiError::Internal(error.into()))?;
        for (name, value) in [(header::CONTENT_TYPE, content_type), (header::LOCATION, location)] {
            response.headers_mut().remove(&name);
            if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
                response.headers_mut().insert(name, value);
            }
        }
        mark_as_replayed(&mut response);
        observe::mark_as_told(&mut response);
        Ok(response)
    }
}

fn mark_as_replayed(response: &mut Response) {
    response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
}

/// What an attempt with this answer leaves: one that was cut off, or went wrong, says nothing of what it had begun.
/// Of a part of a request that was refused: what it made, if anything, is tied to the key all the same. Where that fails the key is kept for longer.
pub(super) async fn give_back(app: &App, key: &HeldKey) {
    if let Err(error) = app.store.give_key_back(key, Left::Undone, app.clock.now() + GIVEN_BACK_FOR).await {
        tracing::warn!(%error, "the key of a refused part is not given back");
    }
}

const fn left_after(status: StatusCode) -> Left {
    match status {
        StatusCode::INTERNAL_SERVER_ERROR | StatusCode::GATEWAY_TIMEOUT => Left::Unknown,
        _ => Left::Undone,
    }
}

/// Whether a later attempt would hear the same.
pub(super) fn is_kept(status: StatusCode) -> bool {
    const PASSING: [StatusCode; 5] = [
        StatusCode::UNAUTHORIZED,
        StatusCode::FORBIDDEN,
        StatusCode::REQUEST_TIMEOUT,
        StatusCode::TOO_EARLY,
        StatusCode::TOO_MANY_REQUESTS,
    ];
    status.as_u16() < 500 && !PASSING.contains(&status)
}

/// The one key of the request.
fn key_in(headers: &HeaderMap) -> Result<String, ApiError> {
    let mut given = headers.get_all(IDEMPOTENCY_KEY).iter();
    let key = given.next().filter(|_| given.next().is_none()).map(HeaderValue::as_bytes).unwrap_or_default();
    let is_sound = (1..=KEY_BYTES_MAX).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic);
    let refused = || Invalid::new("Idempotency-Key", format!("one key of 1 to {KEY_BYTES_MAX} visible ASCII characters")).into();
    std::str::from_utf8(key).ok().filter(|_| is_sound).map(ToOwned::to_owned).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(keys: &[&[u8]]) -> Result<String, ApiError> {
        let mut headers = HeaderMap::new();
        for key in keys {
            headers.append(IDEMPOTENCY_KEY, HeaderValue::from_bytes(key).unwrap());
        }
        key_in(&headers)
    }

    #[test]
    fn a_key_is_visible_ascii_and_there_is_one() {
        assert_eq!(parsed(&[b"\"8e03978e-40d5\""]).unwrap(), "\"8e03978e-40d5\"");
        assert_eq!(parsed(&[&[b'k'; 255]]).unwrap().len(), 255);
        for bad in [&[&b""[..]][..], &[b"a b"], &[b"a\xff"], &[&[b'k'; 256]], &[b"a", b"a"]] {
            assert!(matches!(parsed(bad), Err(ApiError::Invalid(invalid)) if invalid.field == "Idempotency-Key"), "{bad:?}");
        }
    }

    #[test]
    fn what_may_be_answered_otherwise_later_is_not_kept() {
        for status in [200, 201, 202, 204, 404, 409, 413, 422] {
            assert!(is_kept(StatusCode::from_u16(status).unwrap()), "{status}");
        }
        for status in [401, 403, 408, 425, 429, 500, 503, 504] {
            assert!(!is_kept(StatusCode::from_u16(status).unwrap()), "{status}");
        }
    }
}
