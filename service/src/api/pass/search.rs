//! What an image is made of lies on the nodes that it came in at, and no row says which: where a node lacks it, the others are asked in turn.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{Method, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::{
    courier::{Addressee, Courier},
    need::Node,
    offer::Declined,
};
use crate::api::{App, caller::Caller, error::NotHere, json};

/// From the end of a request to the head of its answer: a push is waited for.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Whether this operation reads what an image is made of.
pub(super) fn is_of_content(method: &Method, route: &str) -> bool {
    match route {
        "/v1/image-archives/{*reference}" | "/v1/image-history/{*reference}" => matches!(*method, Method::GET | Method::HEAD),
        // A verification tells of the node that it is asked of.
        "/v1/images/push" => *method == Method::POST,
        _ => false,
    }
}

/// Answers here, or where it can be answered; if nowhere, as here.
pub(super) async fn search(app: &Arc<App>, courier: &Courier, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    // Their own refusal says more; and nothing is read for a stranger.
    let Ok(caller) = Caller::verified(&parts, app).await else { return next.run(Request::from_parts(parts, body)).await };
    parts.extensions.insert(caller);
    // A name and credentials.
    let body: Bytes = match json::bytes(body).await {
        Ok(body) => body.into(),
        Err(error) => return error.into_response(),
    };
    parts.headers.remove(header::EXPECT);
    let spare = parts.clone();
    let answer = next.run(Request::from_parts(parts, Body::from(body.clone()))).await;
    if answer.extensions().get::<NotHere>().is_none() {
        return answer;
    }
    for peer in app.engine.peers().iter() {
        let node = Node { id: peer.id, door: peer.door.clone() };
        let addressee = Addressee { gone: app.engine.peer_gone(peer.id), node };
        let request = Request::from_parts(spare.clone(), Body::from(body.clone()));
        match courier.deliver(app, addressee, request, PATIENCE).await {
            Ok(found) if found.extensions().get::<Declined>().is_none() => return found,
            Ok(_) | Err(_) => {}
        }
    }
    answer
}
