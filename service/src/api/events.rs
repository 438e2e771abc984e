//! `/v1/events`: what happened in the tenant, in pages, or as it comes: by WebSocket, as server-sent events or as lines of JSON.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{
        State, WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    http::{HeaderMap, Uri, header},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use futures_util::{SinkExt as _, StreamExt as _, stream::SplitSink};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{
    App,
    account::list_limit,
    caller::{Caller, SUBPROTOCOL},
    contract::parameter::{self, EventParameters},
    error::ApiError,
    query,
};
use crate::{
    outbox::{Beginning, EventStream, Next},
    sandbox::{Invalid, TenantId},
    store::{EventFilter, Position, Told},
    token::Scope,
};

/// A reader has nothing to say.
const READER_MESSAGE_BYTES_MAX: usize = 4096;
/// Codes of RFC 6455, section 7.4.1.
const CLOSE_NORMAL: u16 = 1000;
const CLOSE_INTERNAL: u16 = 1011;

/// Some of what happened, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventPage {
    items: Vec<EventView>,
    /// Of the page behind this one; null on the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Who did what to which object.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Event)]
pub(super) struct EventView {
    id: String,
    /// As in `sandbox.created`, `sandbox.killed`, `sandbox.ended`, `sandbox.deleted`, `image.imported`, `image.pulled`, `image.committed`, `image.tagged`, `image.removed`, `registry.login_kept`, `registry.login_removed`, `volume.created`, `volume.removed`, `pool.created`, `pool.changed`, `pool.removed`, `tenant.created`, `tenant.changed`,
    /// `tenant.suspended`, `tenant.resumed`, `principal.changed`, `principal.suspended`, `principal.resumed`, `webhook.created`, `webhook.changed`, `webhook.rotated`,
    /// `webhook.disabled`, `webhook.deleted`; new ones may come.
    #[schema(pattern = "^[a-z]+\\.[a-z_]+$")]
    kind: String,
    /// Whom it concerns. Null: all.
    #[schema(required, value_type = Option<String>)]
    tenant: Option<TenantId>,
    /// As in `sandbox/0190b5a4-…` or `image/python:3`.
    object: String,
    /// Who did it. Null: the service itself or, for a tenant's own list, an operator.
    #[schema(required)]
    actor: Option<ActorView>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    at: OffsetDateTime,
    #[schema(value_type = Object)]
    data: Value,
    /// Where a stream goes on behind it.
    cursor: String,
}

/// A principal of a tenant.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Actor)]
struct ActorView {
    tenant: String,
    principal: String,
}

/// One message of a stream of events.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = EventFrame)]
enum Frame {
    Event(Box<EventView>),
    /// The first of a stream that goes on from so long ago that not all since is kept.
    #[schema(title = "Gap")]
    Gap {
        gap: Gap,
    },
    /// The first of a stream, the last, and one whenever nothing comes for a while.
    #[schema(title = "Heartbeat")]
    Heartbeat {
        heartbeat: Heartbeat,
    },
}

/// What is missing from a stream.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = EventGap)]
struct Gap {
    /// Events up to here are missing.
    cursor: String,
}

/// How far a stream has come.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = EventHeartbeat)]
struct Heartbeat {
    /// Everything up to here was said.
    cursor: String,
}

/// How the caller wants events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Page,
    Lines,
    ServerSent,
    WebSocket,
}

/// What happened in the tenant, in pages or as it comes
///
/// Who did what to which object. By `Accept: application/json`, the default, a page, newest first. By `application/x-ndjson`, `text/event-stream` or as a WebSocket handshake
/// (subprotocol `mayfly.v1`) a stream, oldest first: every event once, in an order that never changes, also when a transaction that began earlier is committed
/// later. A stream begins and ends with a heartbeat, and has one when nothing came for 15 seconds; one that goes on from so long ago that not all since is kept begins
/// with a gap. It ends after an hour, or when the service stops, to be opened again from the last `cursor`. Of server-sent events `data` is what a line holds otherwise, and `id` its cursor.
#[utoipa::path(
    get,
    path = "/v1/events",
    operation_id = "listEvents",
    tag = "account",
    security(("bearer" = ["sandboxes:read"])),
    params(
        parameter::EventStream,
        EventParameters,
    ),
    responses(
        (status = 101, description = "The stream begins, over WebSocket: each message is an `EventFrame`."),
        (status = 200, description = "A page, or a stream.", content(
            (EventPage = "application/json"),
            (Frame = "application/x-ndjson"),
            (String = "text/event-stream"),
        )),
    ),
)]
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let pairs = query::pairs(&uri)?;
    if let Some((name, _)) = pairs.iter().find(|(name, _)| name == "tenant") {
        return Err(query::unknown(name));
    }
    let form = form(&headers);
    if form == Form::Page {
        // What is of a stream alone is held to its form all the same.
        let (of_stream, of_page): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(name, _)| name == "follow");
        for (name, text) in of_stream {
            query::value::<bool>(&name, &text)?;
        }
        let filter = filter(of_page, Some(caller.tenant.clone()))?;
        return Ok(page(&app, filter, Some(&caller.tenant)).await?.into_response());
    }
    let Asked { filter, beginning, is_following } = asked(pairs, &headers)?;
    let events = app.outbox.follow(caller.tenant, filter, beginning, is_following);
    match form {
        Form::Page | Form::Lines => Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body(events, line)).into_response()),
        Form::ServerSent => {
            // Proxies that gather what they pass on would hold events back.
            let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::HeaderName::from_static("x-accel-buffering"), "no")];
            Ok((headers, body(events, server_sent)).into_response())
        }
        Form::WebSocket => {
            let upgrade = upgrade.map_err(|error| Invalid::new("", format!("this is no WebSocket handshake: {error}")))?;
            let bounded = upgrade.max_message_size(READER_MESSAGE_BYTES_MAX).max_frame_size(READER_MESSAGE_BYTES_MAX);
            Ok(bounded.protocols([SUBPROTOCOL]).on_upgrade(|socket| serve(socket, events)))
        }
    }
}

fn form(headers: &HeaderMap) -> Form {
    if headers.contains_key(header::UPGRADE) {
        return Form::WebSocket;
    }
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let types = accepted.flat_map(|value| value.split(',')).map(|range| range.split(';').next().unwrap_or("").trim());
    let forms = types.filter_map(|name| match name.to_ascii_lowercase().as_str() {
        "application/x-ndjson" => Some(Form::Lines),
        "text/event-stream" => Some(Form::ServerSent),
        "application/json" => Some(Form::Page),
        _ => None,
    });
    forms.into_iter().next().unwrap_or(Form::Page)
}

/// A page of events as `reader` may see them; `None`: an administrator.
pub(super) async fn page(app: &App, filter: EventFilter, reader: Option<&TenantId>) -> Result<Json<EventPage>, ApiError> {
    let mut items = app.store.list_events(&EventFilter { limit: filter.limit + 1, ..filter.clone() }).await?;
    let limit = usize::try_from(filter.limit).unwrap_or(usize::MAX);
    let has_more = items.len() > limit;
    items.truncate(limit);
    let next_cursor = if has_more { items.last().map(|last| cursor(last.position)) } else { None };
    Ok(Json(EventPage { items: items.into_iter().map(|told| EventView::new(told, reader)).collect(), next_cursor }))
}

/// What a query asks of a page of events.
pub(super) fn filter(pairs: Vec<(String, String)>, tenant: Option<TenantId>) -> Result<EventFilter, ApiError> {
    let mut filter = EventFilter { tenant, limit: 50, ..EventFilter::default() };
    for (name, text) in pairs {
        match name.as_str() {
            "limit" => filter.limit = list_limit(&text)?,
            "cursor" => filter.before = Some(position(&text)?),
            "tenant" => filter.tenant = Some(TenantId::proven(text)),
            _ => take(&mut filter, &name, text)?,
        }
    }
    Ok(filter)
}

/// What a query and `Last-Event-ID` ask of a stream.
struct Asked {
    filter: EventFilter,
    beginning: Beginning,
    is_following: bool,
}

fn asked(pairs: Vec<(String, String)>, headers: &HeaderMap) -> Result<Asked, ApiError> {
    let (mut filter, mut is_following, mut given) = (EventFilter::default(), true, None);
    for (name, text) in pairs {
        match name.as_str() {
            "follow" => is_following = query::value("follow", &text)?,
            "cursor" => given = Some(text),
            // Of a page alone.
            "limit" => {
                list_limit(&text)?;
            }
            _ => take(&mut filter, &name, text)?,
        }
    }
    // A reader that comes again says there where it was; its URL still says where it began.
    if let Some(last) = headers.get("last-event-id") {
        given = Some(last.to_str().unwrap_or_default().to_owned());
    }
    let beginning = match given.as_deref() {
        None if is_following => Beginning::Now,
        Some("now") => Beginning::Now,
        None | Some("oldest") => Beginning::Behind(Position::OLDEST),
        Some(text) => Beginning::Behind(position(text)?),
    };
    Ok(Asked { filter, beginning, is_following })
}

fn take(filter: &mut EventFilter, name: &str, text: String) -> Result<(), ApiError> {
    match name {
        "kind" => filter.kinds.push(text),
        "object" => filter.object = Some(text),
        "sandbox" => filter.sandbox = Some(query::value("sandbox", &text)?),
        "principal" => filter.principal = Some(text),
        _ => return Err(query::unknown(name)),
    }
    Ok(())
}

fn cursor(at: Position) -> String {
    BASE64.encode([at.xact.to_be_bytes(), at.id.to_be_bytes()].concat())
}

fn position(text: &str) -> Result<Position, ApiError> {
    let bytes = BASE64.decode(text).ok().and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(u128::from_be_bytes);
    let halves = bytes.and_then(|both| Some((u64::try_from(both >> 64).ok()?, u64::try_from(both & u128::from(u64::MAX)).ok()?)));
    let position = halves.map(|(xact, id)| Position { xact, id });
    position.ok_or_else(|| Invalid::new("cursor", "not a cursor that an answer gave").into())
}

/// What a stream says, each in the form that is asked for. A failure in the middle ends it.
fn body(events: EventStream, form: fn(&Frame) -> String) -> Body {
    Body::from_stream(futures_util::stream::unfold((events, form), async |(mut events, form)| {
        let next = events.next().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "following events failed");
            None
        });
        let frame = Frame::new(next?, &events);
        Some((Ok::<_, Infallible>(Bytes::from(form(&frame))), (events, form)))
    }))
}

fn line(frame: &Frame) -> String {
    format!("{}\n", json(frame))
}

/// As WHATWG's HTML, 9.2.6, has it. What has no data is no event, but its id is remembered all the same.
fn server_sent(frame: &Frame) -> String {
    match frame {
        Frame::Event(event) => format!("id: {}\ndata: {}\n\n", event.cursor, json(frame)),
        // Under a name, so that who only waits for events does not take it for one.
        Frame::Gap { gap } => format!("id: {}\nevent: gap\ndata: {}\n\n", gap.cursor, json(frame)),
        Frame::Heartbeat { heartbeat } => format!(": nothing came\nid: {}\n\n", heartbeat.cursor),
    }
}

fn json(frame: &Frame) -> String {
    serde_json::to_string(frame).expect("a frame holds nothing that JSON cannot")
}

/// Sends until the end, or until the reader goes away.
async fn serve(socket: WebSocket, mut events: EventStream) {
    let (mut sender, mut receiver) = socket.split();
    // What a reader sends is of no interest, but must be read: pings, and the close.
    let listen = async { while let Some(Ok(_)) = receiver.next().await {} };
    tokio::select! {
        code = send_all(&mut sender, &mut events) => {
            let Some(code) = code else { return };
            let reason = if code == CLOSE_NORMAL { "" } else { "the events cannot be read" };
            // A reader that is gone already has no use for it.
            drop(sender.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await);
        }
        () = listen => {}
    }
}

/// Answers how to close; `None`: the reader is gone.
async fn send_all(sender: &mut SplitSink<WebSocket, Message>, events: &mut EventStream) -> Option<u16> {
    loop {
        match events.next().await {
            Ok(Some(next)) => sender.send(Message::Text(json(&Frame::new(next, events)).into())).await.ok()?,
            Ok(None) => return Some(CLOSE_NORMAL),
            Err(error) => {
                tracing::warn!(%error, "following events failed");
                return Some(CLOSE_INTERNAL);
            }
        }
    }
}

impl Frame {
    fn new(next: Next, events: &EventStream) -> Self {
        match next {
            Next::Event(told) => Self::Event(Box::new(EventView::new(*told, Some(events.tenant())))),
            Next::Gap(at) => Self::Gap { gap: Gap { cursor: cursor(at) } },
            Next::Nothing(at) => Self::Heartbeat { heartbeat: Heartbeat { cursor: cursor(at) } },
        }
    }
}

impl EventView {
    /// A tenant does not learn the names of others: what an operator or the service did has no actor there.
    pub(super) fn new(told: Told, reader: Option<&TenantId>) -> Self {
        let is_known = |tenant: &String| reader.is_none_or(|reader| reader.as_str() == tenant);
        let actor = told.actor_tenant.filter(is_known).zip(told.actor);
        Self {
            id: told.position.id.to_string(),
            kind: told.kind,
            tenant: told.tenant,
            object: told.object,
            actor: actor.map(|(tenant, principal)| ActorView { tenant, principal }),
            at: told.at,
            data: told.data,
            cursor: cursor(told.position),
        }
    }

    /// The same without what is particular to its kind.
    pub(super) fn without_data(self) -> Self {
        Self { data: Value::Object(serde_json::Map::new()), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepting(value: &'static str) -> Form {
        form(&HeaderMap::from_iter([(header::ACCEPT, header::HeaderValue::from_static(value))]))
    }

    #[test]
    fn the_first_form_that_we_have_is_the_one_that_is_sent() {
        assert_eq!(form(&HeaderMap::new()), Form::Page);
        assert_eq!(accepting("*/*"), Form::Page);
        assert_eq!(accepting("text/event-stream"), Form::ServerSent);
        assert_eq!(accepting("text/html, application/x-ndjson;q=0.9"), Form::Lines);
    }

    #[test]
    fn a_cursor_reads_back_and_what_is_none_is_refused() {
        let at = Position { xact: 7, id: u64::MAX };
        assert_eq!(position(&cursor(at)).unwrap(), at);
        for bad in ["", "now?", "AAAAAAAAAAA", &"A".repeat(44)] {
            assert!(matches!(position(bad), Err(ApiError::Invalid(invalid)) if invalid.field == "cursor"), "{bad}");
        }
    }

    #[test]
    fn what_a_browser_is_sent_again_begins_where_it_was() {
        let last = cursor(Position { xact: 9, id: 3 });
        let headers = HeaderMap::from_iter([(header::HeaderName::from_static("last-event-id"), last.parse().unwrap())]);
        let asked = asked(vec![("cursor".into(), "oldest".into())], &headers).unwrap();
        assert_eq!(asked.beginning, Beginning::Behind(Position { xact: 9, id: 3 }));
    }
}
