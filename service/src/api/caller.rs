//! Who calls: a handler that names [`Caller`] cannot be reached without a valid token.

use std::sync::Arc;

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};

use super::{App, error::ApiError, observe};
use crate::{
    engine::Owner,
    sandbox::TenantId,
    token::{Scope, Scopes},
};

/// The subprotocol that the service speaks over WebSocket.
pub(super) const SUBPROTOCOL: &str = "mayfly.v1";
/// What a browser, which cannot set headers on a WebSocket, puts before its token among the subprotocols.
pub(super) const TOKEN_SUBPROTOCOL: &str = "mayfly.bearer.";

/// A verified caller.
#[derive(Debug, Clone)]
pub struct Caller {
    pub tenant: TenantId,
    pub principal: String,
    pub scopes: Scopes,
}

impl Caller {
    /// Fails, naming the scope, unless the token has it.
    pub fn require(&self, scope: Scope) -> Result<(), ApiError> {
        if self.scopes.allow(scope) { Ok(()) } else { Err(ApiError::Forbidden(scope)) }
    }

    pub fn owner(&self) -> Owner {
        Owner { tenant: self.tenant.clone(), principal: self.principal.clone() }
    }
}

/// A caller whose token is valid, and whose standing is yet to be looked at: by the transaction that does what they ask for.
#[derive(Debug, Clone)]
pub(super) struct Creator(pub(super) Caller);

impl FromRequestParts<Arc<App>> for Creator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        Caller::verified(parts, app).await.map(Self)
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let caller = Self::verified(parts, app).await?;
        app.engine.check_standing(&caller.owner(), caller.scopes.allow(Scope::Admin)).await?;
        Ok(caller)
    }
}

impl Caller {
    /// Who the request's token says is calling. Whether they may call at all now is not the token's to say.
    pub(super) async fn verified(parts: &Parts, app: &App) -> Result<Self, ApiError> {
        // Asked before, further out.
        if let Some(caller) = parts.extensions.get::<Self>() {
            return Ok(caller.clone());
        }
        let token = token_in(&parts.headers).ok_or(ApiError::Unauthenticated(None))?;
        let claims = app.verifier.verify(token, app.clock.now_unix_s()).await?;
        let tenant = TenantId::proven(claims.tenant);
        observe::note_tenant(&tenant);
        Ok(Self { tenant, principal: claims.subject, scopes: claims.scopes })
    }
}

fn token_in(headers: &HeaderMap) -> Option<&str> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    if let Some(value) = given.next() {
        // Of two one would be believed here, and perhaps the other by a proxy before us.
        if given.next().is_some() {
            return None;
        }
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| token.trim());
    }
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    offered.flat_map(|value| value.split(',')).find_map(|protocol| protocol.trim().strip_prefix(TOKEN_SUBPROTOCOL))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn a_token_stands_in_its_header() {
        assert_eq!(token_in(&headers(header::AUTHORIZATION, "Bearer abc")), Some("abc"));
        assert_eq!(token_in(&headers(header::AUTHORIZATION, "bearer abc")), Some("abc"));
        assert_eq!(token_in(&headers(header::AUTHORIZATION, "Basic abc")), None);
        assert_eq!(token_in(&HeaderMap::new()), None);
    }

    #[test]
    fn of_two_tokens_none_is_taken() {
        let two = ["Bearer a", "Bearer b"].map(|value| (header::AUTHORIZATION, value.parse().unwrap()));
        assert_eq!(token_in(&HeaderMap::from_iter(two)), None);
    }

    #[test]
    fn a_browsers_token_stands_among_the_subprotocols() {
        assert_eq!(token_in(&headers(header::SEC_WEBSOCKET_PROTOCOL, "mayfly.v1, mayfly.bearer.a.b.c")), Some("a.b.c"));
        assert_eq!(token_in(&headers(header::SEC_WEBSOCKET_PROTOCOL, "mayfly.v1")), None);
    }
}
