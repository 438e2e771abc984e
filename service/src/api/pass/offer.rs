//! New work is spread: what comes to the door of a node that has promised much is offered to one that has promised clearly less.
//!
//! That one begins it at once, or declines, and then it is done here as if nobody had been asked. The name of what is made is given with the offer: where no answer comes, this node makes it under
//! the same name, which the database lets happen once, or finds it made and waits for it. So nothing is lost with a node that dies at that moment, and nothing done twice.

use std::{convert::Infallible, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequestParts, Request},
    http::{Method, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use uuid::Uuid;

use super::{
    courier::{Addressee, Courier, Fault},
    need::{Need, Node},
    notes,
};
use crate::{
    api::{App, caller::Caller, error::ApiError, idempotency::Keyed, json},
    engine::Making,
    sandbox::SandboxId,
};

/// What was said between nodes of a sandbox that is to be made.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::api) struct Bid {
    id: Option<SandboxId>,
    is_offered: bool,
}

/// An answer by which a node leaves it to the one that asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Declined {
    /// It takes nothing now.
    pub(super) is_busy: bool,
}

impl Bid {
    /// Another node offers this, and sees to it otherwise.
    pub(super) const fn offered(id: SandboxId) -> Self {
        Self { id: Some(id), is_offered: true }
    }

    pub(in crate::api) const fn is_offered(&self) -> bool {
        self.is_offered
    }

    /// What it is to be called.
    pub(in crate::api) const fn id(&self) -> Option<SandboxId> {
        self.id
    }

    /// What the request made already: by an earlier attempt, or at another node.
    pub(in crate::api) async fn made(&self, app: &App, caller: &Caller, keyed: &Keyed) -> Result<Option<SandboxId>, ApiError> {
        if keyed.made.is_some() {
            return Ok(keyed.made);
        }
        let Some(id) = self.id.filter(|_| !self.is_offered) else { return Ok(None) };
        Ok(app.engine.find_any(&caller.tenant, id).await?.map(|sandbox| sandbox.id))
    }

    /// How the engine is to make it.
    pub(in crate::api) fn making(&self, keyed: Keyed) -> Making {
        Making { key: keyed.key, id: self.id, is_offered: self.is_offered, ..Making::default() }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Bid {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().copied().unwrap_or_default())
    }
}

/// Whether this operation makes something that any node can make.
pub(super) fn is_work(method: &Method, route: &str) -> bool {
    *method == Method::POST && matches!(route, "/v1/runs" | "/v1/sandboxes")
}

/// Has the freest node do it, or does it here.
pub(super) async fn spread(app: &Arc<App>, courier: &Courier, request: Request, next: Next) -> Response {
    if app.engine.peers().is_empty() {
        return next.run(request).await;
    }
    let (mut parts, body) = request.into_parts();
    // Their own refusal says more.
    let Ok(caller) = Caller::verified(&parts, app).await else { return next.run(Request::from_parts(parts, body)).await };
    if parts.uri.path() == "/v1/sandboxes" && app.engine.has_ready_of(&caller.tenant) {
        // What it asks for may wait here.
        parts.extensions.insert(caller);
        return next.run(Request::from_parts(parts, body)).await;
    }
    parts.extensions.insert(caller);
    // Its reader holds it anyway.
    let body: Bytes = match json::bytes(body).await {
        Ok(body) => body.into(),
        Err(error) => return error.into_response(),
    };
    // Whoever waited to be asked for it was.
    parts.headers.remove(header::EXPECT);
    let Some(peer) = app.engine.freer_peer() else { return next.run(Request::from_parts(parts, Body::from(body))).await };
    let id = SandboxId(Uuid::now_v7());
    let mut offered = Request::from_parts(parts.clone(), Body::from(body.clone()));
    notes::offer(&mut offered, id, &peer.door);
    let node = Node { id: peer.id, door: peer.door };
    let addressee = Addressee { gone: app.engine.peer_gone(node.id), node };
    let mut here = Request::from_parts(parts, Body::from(body));
    match courier.deliver(app, addressee, offered, Need::End.patience()).await {
        Ok(answer) => match answer.extensions().get() {
            // Its own fault is not the request's. Whatever came of it has this name.
            None if answer.status().is_server_error() => {
                app.engine.note_declined(peer.id);
                here.extensions_mut().insert(Bid { id: Some(id), is_offered: false });
            }
            None => return answer,
            Some(Declined { is_busy: true }) => app.engine.note_declined(peer.id),
            Some(Declined { is_busy: false }) => {}
        },
        Err(fault) => {
            app.engine.note_declined(peer.id);
            if let Fault::Broken(..) = fault {
                here.extensions_mut().insert(Bid { id: Some(id), is_offered: false });
            }
        }
    }
    next.run(here).await
}
