//! Requests for what lives on another node: they go there, with their token, and the answer comes back as it is given.
//!
//! Decided around the handlers, before any of them sees the request, by who asks and where the row says that it lives. One hop: a request that came from a node goes no
//! further. Whoever says so of their own request gains nothing but that. Neither a body nor an answer is held here: both flow as their readers take them.

mod courier;
mod need;
mod notes;
mod offer;
mod search;

use std::{sync::Arc, time::Duration};

use axum::{
    RequestPartsExt as _,
    body::{Body, HttpBody as _},
    extract::{MatchedPath, RawPathParams, Request, State},
    http::{Method, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use courier::Addressee;
pub use courier::Courier;
use need::{Need, Whither, of as need_of};
pub(super) use offer::Bid;
use tokio::time::Instant;

use super::{App, caller::Caller, error::ApiError, observe, ports, query};

/// How long something that waits for a node is waited for, where what it does is to be followed: only its node can tell.
const QUEUE_PATIENCE: Duration = Duration::from_secs(10);
const QUEUE_LOOK: Duration = Duration::from_millis(100);

/// Has another node answer, where it alone can.
pub(super) async fn pass(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let (Some(courier), Some(route)) = (&app.courier, route) else { return next.run(request).await };
    let is_work = offer::is_work(request.method(), route.as_str());
    if notes::is_forwarded(request.headers()) {
        let offered = app.engine.own_door().filter(|_| is_work).and_then(|door| notes::offered(request.headers(), door));
        let mut response = match offered {
            // What is not believed is left to who offers it, who would do it as well.
            None if is_work && notes::is_offer(request.headers()) => {
                ApiError::Declined("this is offered to a process that is not here".to_owned()).into_response()
            }
            None => next.run(request).await,
            Some(id) => {
                request.extensions_mut().insert(Bid::offered(id));
                next.run(request).await
            }
        };
        notes::tell_if_declined(&mut response);
        return response;
    }
    if is_work {
        return offer::spread(&app, courier, request, next).await;
    }
    if search::is_of_content(request.method(), route.as_str()) {
        return search::search(&app, courier, request, next).await;
    }
    let Some(need) = need_of(request.method(), route.as_str()).filter(|need| *need != Need::Anybody) else {
        return next.run(request).await;
    };
    let (mut parts, body) = request.into_parts();
    match whither(&app, need, &mut parts).await {
        Err(error) => error.into_response(),
        Ok(Whither::Here | Whither::Soon) => next.run(Request::from_parts(parts, body)).await,
        Ok(Whither::Away) => {
            app.metrics.forwarded("away");
            ApiError::NodeUnavailable.into_response()
        }
        Ok(Whither::There { node, may_stay }) => {
            // What can be answered here after all is not kept from whoever asks.
            let spare = (may_stay && body.is_end_stream()).then(|| parts.clone());
            let addressee = Addressee { gone: app.engine.peer_gone(node.id), node };
            let patience = if route.as_str().contains("/ports/") { ports::PATIENCE } else { need.patience() };
            let delivered = courier.deliver(&app, addressee, Request::from_parts(parts, body), patience).await;
            match (delivered, spare) {
                (Ok(answer), _) => answer,
                (Err(_told), Some(parts)) => next.run(Request::from_parts(parts, Body::empty())).await,
                (Err(_told), None) => ApiError::NodeUnavailable.into_response(),
            }
        }
    }
}

/// Whether this operation may be refused for want of another node, as the contract names it.
pub(super) fn may_lack_node(method: &str, path: &str) -> bool {
    let method = method.to_ascii_uppercase().parse::<Method>().ok();
    method.and_then(|method| need_of(&method, path)).is_some_and(|need| !matches!(need, Need::Anybody | Need::Row))
}

/// Who is to answer. Whoever may not ask is refused here as anywhere.
async fn whither(app: &App, need: Need, parts: &mut Parts) -> Result<Whither, ApiError> {
    // Their own refusal says more.
    let Ok(caller) = Caller::verified(parts, app).await else { return Ok(Whither::Here) };
    let named = named(parts).await;
    // The handler need not ask again.
    parts.extensions.insert(caller.clone());
    let is_followed = need.is_followed(&query::pairs(&parts.uri).unwrap_or_default());
    let deadline = Instant::now() + QUEUE_PATIENCE;
    loop {
        let Some(home) = app.engine.home_elsewhere(&caller.tenant, &named).await? else { return Ok(Whither::Here) };
        observe::note_sandbox(home.id);
        let whither = need.whither(&home);
        if whither != Whither::Soon || !is_followed || Instant::now() >= deadline {
            return Ok(whither);
        }
        tokio::time::sleep(QUEUE_LOOK).await;
    }
}

/// What stands for `{id}`. Behind it there may be what is no text, which only the sandbox understands.
async fn named(parts: &mut Parts) -> String {
    let decoded = parts.extract::<RawPathParams>().await.ok();
    let id = decoded.as_ref().and_then(|all| all.iter().find(|(name, _)| *name == "id")).map(|(_, id)| id.to_owned());
    id.unwrap_or_else(|| parts.uri.path().split('/').nth(3).unwrap_or_default().to_owned())
}
