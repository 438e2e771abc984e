//! Everything that the API refuses, as `application/problem+json` (RFC 9457).

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use sandbox_core::tree::{Fault, FaultKind};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{
    ToSchema,
    openapi::{RefOr, Schema},
};

use super::{observe, ports::PortFault};
use crate::{
    engine::EngineError,
    metrics::Metrics,
    runtime::CallError,
    sandbox::{Bound, Exceeded, Invalid, QuotaScope, State, words},
    store::StoreError,
    token::{Scope, TokenError},
};

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Without a token, or with one that is not accepted.
    #[error("{}", .0.map_or_else(|| "a token is needed: `Authorization: Bearer …`".to_owned(), |error| error.to_string()))]
    Unauthenticated(Option<TokenError>),
    #[error("the token lacks the scope {}", .0.as_str())]
    Forbidden(Scope),
    #[error("there is no such thing here")]
    NotFound,
    #[error("there is no image {0}")]
    ImageNotFound(String),
    #[error("this resource does not have that method")]
    MethodNotAllowed,
    #[error("{0}")]
    Conflict(String),
    /// It is in this state, in which that cannot be done to it.
    #[error("it is {}", .0.as_str())]
    WrongState(State),
    /// It cannot go on from what it wrote before.
    #[error("what it wrote is not kept any more; with `fresh` it can be started without that")]
    LayerLost,
    #[error("there is no volume {0}")]
    VolumeNotFound(String),
    #[error("there is no pool {0}")]
    PoolNotFound(String),
    #[error("there is a pool {0}")]
    PoolExists(String),
    /// A sandbox has it.
    #[error("{0}")]
    VolumeInUse(String),
    /// It is on a node that cannot do what is asked for.
    #[error("{0}")]
    VolumeElsewhere(String),
    #[error("the Idempotency-Key was used for another request")]
    KeyReused,
    /// By an attempt that was cut off, and of which nobody heard how far it came.
    #[error("this may have been done, or not: nobody heard how it went; look before it is asked for again, with another Idempotency-Key")]
    OutcomeUnknown,
    /// An attempt with the same key goes on.
    #[error("a request with this Idempotency-Key is still being worked on")]
    KeyInUse,
    #[error("{0}")]
    PayloadTooLarge(String),
    /// Of a file in a sandbox.
    #[error("{0}")]
    File(Fault),
    #[error("the file has {0} bytes")]
    RangeNotSatisfiable(u64),
    #[error("target and headers of the request are larger than {0} bytes together")]
    HeadTooLarge(usize),
    #[error("the body of the request came too slowly")]
    SlowBody,
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// More than the tenant or the principal may have.
    #[error("{0}")]
    QuotaExceeded(Box<Exceeded>),
    #[error("the tenant or the principal is suspended")]
    Suspended,
    #[error("the tenant is not registered here")]
    UnknownTenant,
    /// Larger than all that there is: it will never work here.
    #[error("{0}")]
    NoCapacity(String),
    /// There is no room now.
    #[error("{0}")]
    Busy(String),
    /// Another node asked, and does it itself.
    #[error("{0}")]
    Declined(String),
    /// The same, for want of room.
    #[error("{0}")]
    Engaged(String),
    /// Of an image that has a name. Another node may have it.
    #[error("{0}")]
    ContentMissing(String),
    /// The registry wants other credentials.
    #[error("{0}")]
    RegistryDenied(String),
    /// Nothing of use came from the registry.
    #[error("{0}")]
    RegistryFailed(String),
    /// Nothing came back from inside a sandbox.
    #[error(transparent)]
    Port(#[from] PortFault),
    #[error("the database is not available")]
    DatabaseUnavailable,
    #[error("the keeper of this node is not available")]
    KeeperUnavailable,
    /// What is asked for is on another node, of which no answer came.
    #[error("the node that it is on does not answer")]
    NodeUnavailable,
    #[error("the request took too long")]
    Timeout,
    /// The cause is logged, never sent.
    #[error("something went wrong on our side")]
    Internal(#[source] anyhow::Error),
}

/// An answer of this node that may be another one's to give.
#[derive(Debug, Clone, Copy)]
pub(super) struct NotHere {
    /// Nothing else of the kind would be taken here now.
    pub(super) is_busy: bool,
}

/// What went wrong, for programs. A promise: new ones may come, none changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ProblemCode)]
pub enum Code {
    Unauthenticated,
    Forbidden,
    NotFound,
    ImageNotFound,
    MethodNotAllowed,
    Conflict,
    WrongState,
    LayerLost,
    VolumeNotFound,
    PoolNotFound,
    PoolExists,
    VolumeInUse,
    VolumeElsewhere,
    IdempotencyKeyReused,
    IdempotencyKeyInUse,
    OutcomeUnknown,
    FileNotFound,
    FileExists,
    FileDenied,
    FileUnfit,
    DiskFull,
    RangeNotSatisfiable,
    PayloadTooLarge,
    HeadersTooLarge,
    Timeout,
    InvalidRequest,
    RateLimited,
    QuotaExceeded,
    Suspended,
    UnknownTenant,
    NoCapacity,
    RegistryDenied,
    RegistryFailed,
    PortClosed,
    PortBroken,
    PortTimeout,
    DatabaseUnavailable,
    KeeperUnavailable,
    NodeUnavailable,
    Internal,
}

/// What the caller is sent, but for the request's id, which is known further out.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(description = "Why a request was not done (RFC 9457).")]
pub(super) struct Problem {
    #[schema(extensions(("x-schema" = json!({ "const": ABOUT_BLANK }))))]
    r#type: &'static str,
    title: &'static str,
    #[schema(extensions(("x-schema" = json!({ "minimum": 400, "maximum": 599 }))))]
    pub(super) status: u16,
    code: Code,
    /// For people. May change.
    detail: String,
    pub(super) request_id: String,
    /// Whether the same request may be answered otherwise later.
    pub(super) retryable: bool,
    /// Dotted path of the field that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    field: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Bound)]
    bound: Option<&'static Bound>,
    /// Of what has another state than the request needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = State)]
    state: Option<State>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    quota: Option<QuotaView>,
}

impl Problem {
    /// Counts that somebody was refused like this.
    pub(super) fn count(&self, metrics: &Metrics) {
        // Its name is the promise that callers have, too.
        let code = serde_json::to_value(self.code).ok();
        metrics.problem(code.as_ref().and_then(Value::as_str).unwrap_or("unknown"));
        if let Some(QuotaView { quota, scope, .. }) = &self.quota {
            metrics.quota_refused(*scope, quota);
        }
    }
}

/// The `type` of a problem of which its status and `code` say everything (RFC 9457, section 4.2.1).
const ABOUT_BLANK: &str = "about:blank";

/// Which quota, what it allows and what was used of it.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ProblemQuota)]
struct QuotaView {
    /// The quota that the request would go beyond. With it come `scope`, `limit` and `used`.
    quota: String,
    /// Whose quota it is.
    scope: QuotaScope,
    #[schema(schema_with = limit_schema)]
    limit: Value,
    #[schema(schema_with = used_schema)]
    used: Value,
}

fn limit_schema() -> RefOr<Schema> {
    let description = "Its value: a number, or the list of what may be asked for.";
    words::schema(json!({ "type": ["integer", "array"], "items": { "type": "string" }, "description": description }))
}

fn used_schema() -> RefOr<Schema> {
    let description = "What was in use before. Where nothing is counted, what was asked for; null stands for no limit.";
    words::schema(json!({ "type": ["integer", "string", "null"], "description": description }))
}

impl From<&Exceeded> for QuotaView {
    fn from(exceeded: &Exceeded) -> Self {
        let Exceeded { scope, quota, limit, used, .. } = exceeded.clone();
        Self { quota, scope, limit, used }
    }
}

impl ApiError {
    fn parts(&self) -> (StatusCode, Code, &'static str) {
        match self {
            Self::Unauthenticated(_) => (StatusCode::UNAUTHORIZED, Code::Unauthenticated, "No valid token"),
            Self::Forbidden(_) => (StatusCode::FORBIDDEN, Code::Forbidden, "Not allowed"),
            Self::NotFound => (StatusCode::NOT_FOUND, Code::NotFound, "Not found"),
            Self::ImageNotFound(_) => (StatusCode::NOT_FOUND, Code::ImageNotFound, "Image not found"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, Code::MethodNotAllowed, "Method not allowed"),
            Self::Conflict(_) | Self::ContentMissing(_) => (StatusCode::CONFLICT, Code::Conflict, "Conflict"),
            Self::WrongState(_) => (StatusCode::CONFLICT, Code::WrongState, "Wrong state"),
            Self::LayerLost => (StatusCode::CONFLICT, Code::LayerLost, "Layer lost"),
            Self::VolumeNotFound(_) => (StatusCode::NOT_FOUND, Code::VolumeNotFound, "Volume not found"),
            Self::PoolNotFound(_) => (StatusCode::NOT_FOUND, Code::PoolNotFound, "Pool not found"),
            Self::PoolExists(_) => (StatusCode::CONFLICT, Code::PoolExists, "Pool exists"),
            Self::VolumeInUse(_) => (StatusCode::CONFLICT, Code::VolumeInUse, "Volume in use"),
            Self::VolumeElsewhere(_) => (StatusCode::CONFLICT, Code::VolumeElsewhere, "Volume elsewhere"),
            Self::KeyReused => (StatusCode::CONFLICT, Code::IdempotencyKeyReused, "Key reused"),
            Self::OutcomeUnknown => (StatusCode::CONFLICT, Code::OutcomeUnknown, "Outcome unknown"),
            Self::KeyInUse => (StatusCode::CONFLICT, Code::IdempotencyKeyInUse, "Key in use"),
            Self::PayloadTooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, Code::PayloadTooLarge, "Payload too large"),
            Self::File(fault) => file_parts(fault.kind),
            Self::RangeNotSatisfiable(_) => (StatusCode::RANGE_NOT_SATISFIABLE, Code::RangeNotSatisfiable, "No such part"),
            Self::HeadTooLarge(_) => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, Code::HeadersTooLarge, "Headers too large"),
            Self::SlowBody => (StatusCode::REQUEST_TIMEOUT, Code::Timeout, "Timeout"),
            Self::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, Code::InvalidRequest, "Invalid request"),
            Self::QuotaExceeded(exceeded) if exceeded.is_rate() => (StatusCode::TOO_MANY_REQUESTS, Code::RateLimited, "Too many requests"),
            Self::QuotaExceeded(_) => (StatusCode::TOO_MANY_REQUESTS, Code::QuotaExceeded, "Quota exceeded"),
            Self::Suspended => (StatusCode::FORBIDDEN, Code::Suspended, "Suspended"),
            Self::UnknownTenant => (StatusCode::FORBIDDEN, Code::UnknownTenant, "Unknown tenant"),
            Self::NoCapacity(_) | Self::Busy(_) | Self::Declined(_) | Self::Engaged(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, Code::NoCapacity, "No capacity")
            }
            Self::RegistryDenied(_) => (StatusCode::FORBIDDEN, Code::RegistryDenied, "Refused by the registry"),
            Self::RegistryFailed(_) => (StatusCode::BAD_GATEWAY, Code::RegistryFailed, "Registry failed"),
            Self::Port(PortFault::Closed(_)) => (StatusCode::BAD_GATEWAY, Code::PortClosed, "Nothing listens"),
            Self::Port(PortFault::Broken { .. }) => (StatusCode::BAD_GATEWAY, Code::PortBroken, "Not an answer"),
            Self::Port(PortFault::Late(_)) => (StatusCode::GATEWAY_TIMEOUT, Code::PortTimeout, "No answer in time"),
            Self::DatabaseUnavailable => (StatusCode::SERVICE_UNAVAILABLE, Code::DatabaseUnavailable, "Database unavailable"),
            Self::KeeperUnavailable => (StatusCode::SERVICE_UNAVAILABLE, Code::KeeperUnavailable, "Keeper unavailable"),
            Self::NodeUnavailable => (StatusCode::SERVICE_UNAVAILABLE, Code::NodeUnavailable, "Node unavailable"),
            Self::Timeout => (StatusCode::GATEWAY_TIMEOUT, Code::Timeout, "Timeout"),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, Code::Internal, "Internal error"),
        }
    }

    /// Whether the same request may be answered otherwise later.
    fn is_retryable(&self) -> bool {
        match self {
            Self::Busy(_)
            | Self::Declined(_)
            | Self::Engaged(_)
            | Self::KeyInUse
            | Self::DatabaseUnavailable
            | Self::KeeperUnavailable
            | Self::NodeUnavailable
            | Self::SlowBody
            | Self::Timeout
            | Self::RegistryFailed(_)
            | Self::Port(PortFault::Closed(_) | PortFault::Late(_))
            | Self::Internal(_) => true,
            Self::QuotaExceeded(exceeded) => exceeded.retry_after_s.is_some(),
            Self::Unauthenticated(_)
            | Self::Suspended
            | Self::UnknownTenant
            | Self::Forbidden(_)
            | Self::NotFound
            | Self::ImageNotFound(_)
            | Self::MethodNotAllowed
            | Self::Conflict(_)
            | Self::ContentMissing(_)
            | Self::WrongState(_)
            | Self::LayerLost
            | Self::VolumeNotFound(_)
            | Self::PoolNotFound(_)
            | Self::PoolExists(_)
            | Self::VolumeInUse(_)
            | Self::VolumeElsewhere(_)
            | Self::KeyReused
            | Self::OutcomeUnknown
            | Self::PayloadTooLarge(_)
            | Self::File(_)
            | Self::RangeNotSatisfiable(_)
            | Self::HeadTooLarge(_)
            | Self::Invalid(_)
            | Self::RegistryDenied(_)
            | Self::Port(PortFault::Broken { .. })
            | Self::NoCapacity(_) => false,
        }
    }

    const fn state(&self) -> Option<State> {
        if let Self::WrongState(state) = self { Some(*state) } else { None }
    }

    fn exceeded(&self) -> Option<&Exceeded> {
        if let Self::QuotaExceeded(exceeded) = self { Some(exceeded) } else { None }
    }

    /// What RFC 6750, 3, has a refused client hear of tokens.
    #[expect(clippy::wildcard_enum_match_arm, reason = "all others have nothing to do with tokens")]
    fn challenge(&self) -> Option<HeaderValue> {
        let text = match self {
            Self::Unauthenticated(None) => "Bearer realm=\"mayfly\"".to_owned(),
            Self::Unauthenticated(Some(error)) => {
                format!("Bearer realm=\"mayfly\", error=\"invalid_token\", error_description=\"{error}\"")
            }
            Self::Forbidden(scope) => format!("Bearer realm=\"mayfly\", error=\"insufficient_scope\", scope=\"{scope}\""),
            _ => return None,
        };
        Some(HeaderValue::try_from(text).expect("our own words and the names of scopes are ASCII without quotes"))
    }

    /// What the caller of this request is sent. A cause that is not sent is logged.
    pub(super) fn problem(&self, request_id: String) -> Problem {
        if let Self::Internal(cause) = self {
            tracing::error!(cause = format!("{cause:#}"), "a request failed");
        }
        self.told(request_id)
    }

    /// The same, where nobody was refused: an example.
    pub(super) fn told(&self, request_id: String) -> Problem {
        let (status, code, title) = self.parts();
        let (field, bound, detail) = if let Self::Invalid(Invalid { field, bound, detail }) = self {
            (Some(field.clone()).filter(|field| !field.is_empty()), *bound, detail.clone())
        } else {
            (None, None, self.to_string())
        };
        Problem {
            r#type: ABOUT_BLANK,
            title,
            status: status.as_u16(),
            code,
            detail,
            request_id,
            retryable: self.is_retryable(),
            field,
            bound,
            state: self.state(),
            quota: self.exceeded().map(QuotaView::from),
        }
    }

    /// What is said beside the problem.
    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(exceeded) = self.exceeded() {
            rate_limit_headers(exceeded, &mut headers);
        }
        if let Some(challenge) = self.challenge() {
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        if let Self::RangeNotSatisfiable(size) = self {
            headers.insert(header::CONTENT_RANGE, HeaderValue::try_from(format!("bytes */{size}")).expect("a number is ASCII"));
        }
        if matches!(self.parts().0, StatusCode::SERVICE_UNAVAILABLE | StatusCode::CONFLICT) && self.is_retryable() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        headers
    }

    /// A handler panicked; the panic itself is in the log.
    pub(super) fn panicked() -> Self {
        Self::Internal(anyhow::anyhow!("a handler panicked"))
    }

    /// What stands for an answer with this status that no handler of ours gave; `None` if it needs no other.
    pub(super) fn of_status(status: StatusCode) -> Option<Self> {
        match status {
            StatusCode::NOT_FOUND => Some(Self::NotFound),
            StatusCode::METHOD_NOT_ALLOWED => Some(Self::MethodNotAllowed),
            StatusCode::PAYLOAD_TOO_LARGE => Some(Self::PayloadTooLarge("the body is too large".to_owned())),
            StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT => Some(Self::Timeout),
            status if status.is_client_error() => Some(Self::Invalid(Invalid::new("", "the request cannot be read"))),
            status if status.is_server_error() => Some(Self::Internal(anyhow::anyhow!("answered {status}"))),
            _ => None,
        }
    }
}

/// What is wrong with a file, as status, code and title.
const fn file_parts(kind: FaultKind) -> (StatusCode, Code, &'static str) {
    match kind {
        FaultKind::NotFound => (StatusCode::NOT_FOUND, Code::FileNotFound, "No such file"),
        FaultKind::Exists => (StatusCode::CONFLICT, Code::FileExists, "File exists"),
        FaultKind::Denied => (StatusCode::FORBIDDEN, Code::FileDenied, "Not for this sandbox"),
        FaultKind::Full => (StatusCode::INSUFFICIENT_STORAGE, Code::DiskFull, "Disk full"),
        // Of what is broken in a sandbox none is on our side. Others have variants of their own.
        FaultKind::WrongKind | FaultKind::Failed | FaultKind::Refused | FaultKind::TooLarge | FaultKind::Busy => {
            (StatusCode::CONFLICT, Code::FileUnfit, "Not a file for that")
        }
    }
}

impl IntoResponse for ApiError {
    /// Status and problem; the body is written where the request's id is known, in [`super::observe`].
    fn into_response(self) -> Response {
        let mut response = self.parts().0.into_response();
        response.headers_mut().extend(self.headers());
        response.extensions_mut().insert(self.problem(String::new()));
        if matches!(self, Self::Declined(_) | Self::Engaged(_) | Self::ContentMissing(_)) {
            response.extensions_mut().insert(NotHere { is_busy: matches!(self, Self::Engaged(_)) });
            observe::mark_as_passing(&mut response);
        }
        response
    }
}

/// `RateLimit-*` for what is counted, and when to come again if that helps.
fn rate_limit_headers(exceeded: &Exceeded, headers: &mut HeaderMap) {
    if let (Some(limit), Some(used)) = (exceeded.limit.as_u64(), exceeded.used.as_u64())
        && let Some(retry_after_s) = exceeded.retry_after_s
    {
        headers.insert("ratelimit-limit", limit.into());
        headers.insert("ratelimit-remaining", limit.saturating_sub(used).into());
        headers.insert("ratelimit-reset", retry_after_s.into());
    }
    if let Some(retry_after_s) = exceeded.retry_after_s {
        headers.insert(header::RETRY_AFTER, retry_after_s.max(1).into());
    }
}

impl From<TokenError> for ApiError {
    fn from(error: TokenError) -> Self {
        Self::Unauthenticated(Some(error))
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            // That it is away was said once, when it went.
            StoreError::Unreached(cause) => {
                tracing::debug!(%cause, "the database is out of reach");
                Self::DatabaseUnavailable
            }
            StoreError::Unavailable(cause) => {
                tracing::warn!(%cause, "the database is not available");
                Self::DatabaseUnavailable
            }
            StoreError::NameTaken => Self::Conflict("the name is taken".to_owned()),
            StoreError::MadeAlready => Self::Conflict(error.to_string()),
            StoreError::ZeroByte => Self::Invalid(Invalid::new("", error.to_string())),
            StoreError::Damaged(_) => Self::Internal(error.into()),
            StoreError::Other(cause) => Self::Internal(cause),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::ImageNotFound(reference) => Self::ImageNotFound(reference),
            EngineError::Invalid(invalid) => Self::Invalid(invalid),
            EngineError::NoCapacity(why) => Self::NoCapacity(why),
            EngineError::Busy(why) => Self::Busy(why),
            EngineError::QuotaExceeded(exceeded) => Self::QuotaExceeded(exceeded),
            EngineError::Suspended => Self::Suspended,
            EngineError::UnknownTenant => Self::UnknownTenant,
            EngineError::NameTaken => StoreError::NameTaken.into(),
            EngineError::PoolExists(name) => Self::PoolExists(name),
            EngineError::WrongState(state) => Self::WrongState(state),
            EngineError::LayerLost => Self::LayerLost,
            EngineError::VolumeNotFound(name) => Self::VolumeNotFound(name),
            EngineError::VolumeInUse(why) => Self::VolumeInUse(why),
            EngineError::VolumeElsewhere(why) => Self::VolumeElsewhere(why),
            EngineError::Refused(why) => Self::Conflict(why),
            EngineError::KeyLost => Self::KeyInUse,
            EngineError::MadeAlready => StoreError::MadeAlready.into(),
            EngineError::Declined(why) => Self::Declined(why),
            EngineError::Engaged(why) => Self::Engaged(why),
            EngineError::OutcomeUnknown => Self::OutcomeUnknown,
            EngineError::KeeperUnavailable => Self::KeeperUnavailable,
            EngineError::Store(error) => error.into(),
        }
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Lost => Self::KeeperUnavailable,
            CallError::Failed(failure) => Self::Internal(failure.into()),
        }
    }
}

impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        Self::Internal(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_work_later_says_when_to_come_again() {
        let larger = ApiError::NoCapacity("larger".into()).into_response();
        let busy = ApiError::Busy("busy".into()).into_response();
        assert_eq!((larger.status(), busy.status()), (StatusCode::SERVICE_UNAVAILABLE, StatusCode::SERVICE_UNAVAILABLE));
        assert!(!larger.headers().contains_key(header::RETRY_AFTER));
        assert!(busy.headers().contains_key(header::RETRY_AFTER));
    }
}
