//! `/v1/webhooks`: where a tenant wants to be told what happens, and what became of telling it.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    App,
    account::list_limit,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    events::EventView,
    idempotency::{Keyed, keyed_uuid},
    json, query,
};
use crate::{
    outbound::URL_BYTES_MAX,
    sandbox::Invalid,
    store::{
        Act, Attempt, CreatedWebhook, Delivery, DeliveryFilter, DeliveryState, NewWebhook, Redelivery, Rotation, Told, Webhook,
        WebhookChange,
    },
    token::Scope,
};

const KINDS_MAX: usize = 32;
const _: () = assert!(KINDS_MAX == 32, "the contract of `kinds` says so too, and takes nothing but a literal");
const KIND_BYTES_MAX: usize = 64;
const KIND_PATTERN: &str = r"^[a-z_]+\.([a-z_]+|\*)$";
const DESCRIPTION_CHARS_MAX: usize = 256;
/// How long the secret before is good, in seconds.
const OVERLAP_S: u32 = 24 * 3600;
const OVERLAP_S_MAX: u32 = 7 * 24 * 3600;
/// The largest body that is sent of one event.
const BODY_BYTES_MAX: usize = 256 * 1024;

/// The routes that answer with a secret, which is kept nowhere.
pub(super) const WITH_SECRET: [&str; 2] = ["/v1/webhooks", "/v1/webhooks/{id}/rotate-secret"];
/// How a secret begins in an answer. In one that is kept nothing follows.
const SECRET: &str = r#""secret":"whsec_"#;

pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(read, change, remove))
        .routes(routes!(rotate))
        .routes(routes!(test))
        .routes(routes!(deliveries))
        .routes(routes!(delivery))
        .routes(routes!(redeliver))
}

/// A webhook that is to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewWebhook)]
pub(super) struct WebhookRequest {
    /// Where events are sent, by POST: `https`, or `http` where the operator allows it.
    #[schema(extensions(("x-schema" = json!({ "maxLength": URL_BYTES_MAX, "format": "uri" }))))]
    url: String,
    /// Which events: as in `sandbox.ended`, or `sandbox.*`. Empty or absent: all.
    #[serde(default)]
    #[schema(max_items = 32, extensions(("x-schema" = json!({ "pattern": KIND_PATTERN, "maxLength": KIND_BYTES_MAX }))))]
    kinds: Vec<String>,
    /// For people.
    #[serde(default)]
    #[schema(extensions(("x-schema" = json!({ "maxLength": DESCRIPTION_CHARS_MAX, "pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]*$" }))))]
    description: String,
    /// Whether anything is sent.
    #[serde(default = "yes")]
    #[schema(default = true)]
    active: bool,
}

/// What is to be changed; what is absent stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = WebhookChange)]
pub(super) struct WebhookPatch {
    #[schema(extensions(("x-schema" = json!({ "maxLength": URL_BYTES_MAX, "format": "uri" }))))]
    url: Option<String>,
    #[schema(max_items = 32, extensions(("x-schema" = json!({ "pattern": KIND_PATTERN, "maxLength": KIND_BYTES_MAX }))))]
    kinds: Option<Vec<String>>,
    #[schema(extensions(("x-schema" = json!({ "maxLength": DESCRIPTION_CHARS_MAX, "pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]*$" }))))]
    description: Option<String>,
    /// True also forgives what failed before.
    active: Option<bool>,
}

/// How a secret is changed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
#[schema(as = Rotation)]
pub(super) struct RotateRequest {
    /// For how many seconds what is sent is signed with the secret before, too.
    #[schema(extensions(("x-schema" = json!({ "minimum": 0, "maximum": OVERLAP_S_MAX, "default": OVERLAP_S }))))]
    overlap_s: u32,
}

/// A body that holds nothing, and may be left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

impl Default for RotateRequest {
    fn default() -> Self {
        Self { overlap_s: OVERLAP_S }
    }
}

/// A webhook.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Webhook)]
pub(super) struct WebhookView {
    id: Uuid,
    url: String,
    /// Empty: all.
    kinds: Vec<String>,
    description: String,
    active: bool,
    /// Counted from one.
    secret_version: u32,
    /// Until when what is sent is signed with the secret before, too.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    former_secret_until: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    /// Since when every attempt has failed; null: the last one did not.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    failing_since: Option<OffsetDateTime>,
    /// When it was made inactive because every attempt failed.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    disabled_at: Option<OffsetDateTime>,
    /// Events of which nothing is sent because too many were waiting.
    dropped: u64,
}

/// A webhook with its secret, which is told this once.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = WebhookWithSecret)]
pub(super) struct SecretView {
    #[serde(flatten)]
    webhook: WebhookView,
    /// As Standard Webhooks has it: `whsec_` and the key in Base64.
    secret: String,
}

/// Some of the webhooks, in the order of their making.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WebhookPage {
    items: Vec<WebhookView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// What is, was, or was to be sent of one event.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Delivery)]
pub(super) struct DeliveryView {
    /// What receivers are told as `webhook-id`, the same at every attempt.
    id: Uuid,
    /// Of the event; null: it is a test.
    #[schema(required)]
    event: Option<String>,
    kind: String,
    state: DeliveryState,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    /// When it is tried next, or while it is being tried: when again should nothing be heard of that.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    next_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required, value_type = Option<String>, format = DateTime)]
    ended_at: Option<OffsetDateTime>,
    /// How many attempts were begun.
    attempt_count: u32,
    /// The last 50 of them, as far as it is known how they went.
    attempts: Vec<Attempt>,
    /// The beginning of the last answer's body, up to 1 KiB.
    #[schema(required)]
    response: Option<String>,
}

/// Some of the deliveries, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeliveryPage {
    items: Vec<DeliveryView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

const fn yes() -> bool {
    true
}

/// Have events sent somewhere
///
/// From now on each event of these kinds is sent by POST as [Standard Webhooks](https://www.standardwebhooks.com) has it: a JSON object with `type`, `timestamp` and `data`, the event as
/// `/v1/events` tells it, with the headers `webhook-id`, `webhook-timestamp` and `webhook-signature`. Only an answer of 2xx within 15 seconds is success; all else is tried again, with growing
/// pauses, for days. An event may come twice, with the same `webhook-id`, and not in order. The secret is told in this answer alone.
#[utoipa::path(
    post,
    path = "/v1/webhooks",
    operation_id = "createWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    request_body(content = WebhookRequest, description = "Where to, and what.", example = json!({ "url": "https://hooks.example/in", "kinds": ["sandbox.ended"] })),
    responses(
        (status = 201, description = "The webhook, with its secret.", body = SecretView, headers(("Location" = String, description = "Its path."))),
        refusal::QuotaExceeded,
    ),
)]
async fn create(State(app): State<Arc<App>>, caller: Caller, keyed: Keyed, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::Webhooks)?;
    let WebhookRequest { url, kinds, description, active } = json::read(body).await?;
    let now = app.clock.now();
    let new = NewWebhook {
        id: keyed_id(&app, &caller, &keyed, now).await?,
        tenant: caller.tenant.clone(),
        url: sound_url(&app, &url)?,
        kinds: sound_kinds(kinds)?,
        description: sound_description(description)?,
        is_active: active,
        key_id: app.webhooks.key.id().to_owned(),
    };
    let owner = caller.owner();
    let act = Act { actor: Some(&owner), at: now, data: json!({ "url": new.url, "kinds": new.kinds, "active": active }) };
    match app.store.create_webhook(&new, &app.engine.default_quotas().tenant, &act).await? {
        CreatedWebhook::Exceeded(exceeded) => Err(ApiError::QuotaExceeded(Box::new(exceeded))),
        CreatedWebhook::Yes(webhook) => {
            let location = format!("/v1/webhooks/{}", webhook.id);
            Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(SecretView::new(&app, *webhook))).into_response())
        }
    }
}

/// The webhooks of the tenant
#[utoipa::path(
    get,
    path = "/v1/webhooks",
    operation_id = "listWebhooks",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Page),
    responses(
        (status = 200, description = "A page.", body = WebhookPage),
    ),
)]
async fn list(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<WebhookPage>, ApiError> {
    caller.require(Scope::Webhooks)?;
    let (mut limit, mut after) = (50, None);
    for (name, text) in query::pairs(&uri)? {
        match name.as_str() {
            "limit" => limit = list_limit(&text)?,
            "cursor" => after = Some(cursor(&text)?),
            _ => return Err(query::unknown(&name)),
        }
    }
    let mut items = app.store.list_webhooks(&caller.tenant, after, limit + 1).await?;
    let has_more = items.len() > usize::try_from(limit).unwrap_or(usize::MAX);
    items.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let next_cursor = items.last().filter(|_| has_more).map(|last| last.id.simple().to_string());
    Ok(Json(WebhookPage { items: items.into_iter().map(Into::into).collect(), next_cursor }))
}

/// A webhook as it is now
#[utoipa::path(
    get,
    path = "/v1/webhooks/{id}",
    operation_id = "readWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Webhook),
    responses(
        (status = 200, description = "The webhook.", body = WebhookView),
        refusal::NotFound,
    ),
)]
async fn read(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<Json<WebhookView>, ApiError> {
    caller.require(Scope::Webhooks)?;
    let webhook = app.store.find_webhook(&caller.tenant, uuid(&id)?).await?;
    Ok(Json(webhook.ok_or(ApiError::NotFound)?.into()))
}

/// Change a webhook
///
/// What is absent stays as it is.
#[utoipa::path(
    patch,
    path = "/v1/webhooks/{id}",
    operation_id = "changeWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Webhook),
    request_body(content = WebhookPatch, description = "What is to be otherwise.", example = json!({ "active": false })),
    responses(
        (status = 200, description = "The webhook as it is now.", body = WebhookView),
        refusal::NotFound,
    ),
)]
async fn change(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>, body: Body) -> Result<Json<WebhookView>, ApiError> {
    caller.require(Scope::Webhooks)?;
    let WebhookPatch { url, kinds, description, active } = json::read(body).await?;
    let change = WebhookChange {
        url: url.map(|url| sound_url(&app, &url)).transpose()?,
        kinds: kinds.map(sound_kinds).transpose()?,
        description: description.map(sound_description).transpose()?,
        is_active: active,
    };
    let owner = caller.owner();
    let data = json!({ "url": change.url, "kinds": change.kinds, "active": active });
    let act = Act { actor: Some(&owner), at: app.clock.now(), data };
    let webhook = app.store.change_webhook(&caller.tenant, uuid(&id)?, &change, &act).await?;
    Ok(Json(webhook.ok_or(ApiError::NotFound)?.into()))
}

/// Remove a webhook, with what is still to be sent
#[utoipa::path(
    delete,
    path = "/v1/webhooks/{id}",
    operation_id = "removeWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Webhook),
    responses(
        (status = 204, description = "It is gone."),
        refusal::NotFound,
    ),
)]
async fn remove(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::Webhooks)?;
    let owner = caller.owner();
    let act = Act { actor: Some(&owner), at: app.clock.now(), data: json!({}) };
    let is_gone = app.store.remove_webhook(&caller.tenant, uuid(&id)?, &act).await?;
    if is_gone { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NotFound) }
}

/// Give a webhook another secret
///
/// For a while what is sent has two signatures, by the new one and by the one before. The secret is told in this answer alone.
#[utoipa::path(
    post,
    path = "/v1/webhooks/{id}/rotate-secret",
    operation_id = "rotateWebhookSecret",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Webhook),
    request_body(content = Option<RotateRequest>, description = "For how long the one before is good.", example = json!({ "overlap_s": 3600 })),
    responses(
        (status = 200, description = "The webhook, with its new secret.", body = SecretView),
        refusal::NotFound,
    ),
)]
async fn rotate(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SecretView>, ApiError> {
    caller.require(Scope::Webhooks)?;
    let RotateRequest { overlap_s } = json::read_or_default(body).await?;
    if overlap_s > OVERLAP_S_MAX {
        return Err(Invalid::new("overlap_s", format!("at most {OVERLAP_S_MAX} seconds")).into());
    }
    let now = app.clock.now();
    let request = keyed.key.as_ref().map(|held| format!("{}/{}", held.name.owner.principal, held.name.key));
    let rotation = Rotation {
        former_until: now + Duration::seconds(i64::from(overlap_s)),
        key_id: app.webhooks.key.id(),
        request: request.as_deref(),
    };
    let owner = caller.owner();
    let act = Act { actor: Some(&owner), at: now, data: json!({ "overlap_s": overlap_s }) };
    let webhook = app.store.rotate_webhook_secret(&caller.tenant, uuid(&id)?, rotation, &act).await?;
    Ok(Json(SecretView::new(&app, webhook.ok_or(ApiError::NotFound)?)))
}

/// Send a test
///
/// One attempt with an event of the kind `webhook.test`, also of a webhook that is not active. How it went is told by the delivery.
#[utoipa::path(
    post,
    path = "/v1/webhooks/{id}/test",
    operation_id = "testWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Webhook),
    request_body(content = Option<Nothing>, description = "Nothing.", example = json!({})),
    responses(
        (status = 202, description = "What will be sent.", body = DeliveryView),
        refusal::NotFound,
    ),
)]
async fn test(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::Webhooks)?;
    let Nothing {} = json::read_or_default(body).await?;
    let (id, now) = (uuid(&id)?, app.clock.now());
    let object = format!("webhook/{id}");
    let data = json!({ "kind": "webhook.test", "tenant": caller.tenant, "object": object, "at": text_of(now), "data": {} });
    let body = json!({ "type": "webhook.test", "timestamp": text_of(now), "data": data }).to_string();
    let delivery = app.store.make_test_delivery(&caller.tenant, id, &body, now).await?.ok_or(ApiError::NotFound)?;
    app.webhooks.note_delivery();
    Ok((StatusCode::ACCEPTED, Json(DeliveryView::from(delivery))).into_response())
}

/// What was sent and is to be sent, newest first
///
/// Kept for seven days after its end.
#[utoipa::path(
    get,
    path = "/v1/webhooks/{id}/deliveries",
    operation_id = "listDeliveries",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Webhook, parameter::Page, ("state" = Option<DeliveryState>, Query, description = "Only of this state.")),
    responses(
        (status = 200, description = "A page.", body = DeliveryPage),
        refusal::NotFound,
    ),
)]
async fn deliveries(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>, uri: Uri) -> Result<Json<DeliveryPage>, ApiError> {
    caller.require(Scope::Webhooks)?;
    let id = uuid(&id)?;
    let mut filter = DeliveryFilter { limit: 50, ..DeliveryFilter::default() };
    for (name, text) in query::pairs(&uri)? {
        match name.as_str() {
            "limit" => filter.limit = list_limit(&text)?,
            "cursor" => filter.before = Some(cursor(&text)?),
            "state" => {
                let state = DeliveryState::named(&text);
                filter.state = Some(state.ok_or_else(|| Invalid::new("state", "a state is pending, delivered or failed"))?);
            }
            _ => return Err(query::unknown(&name)),
        }
    }
    app.store.find_webhook(&caller.tenant, id).await?.ok_or(ApiError::NotFound)?;
    let asked = DeliveryFilter { limit: filter.limit + 1, ..filter };
    let mut items = app.store.list_deliveries(&caller.tenant, id, &asked).await?;
    let has_more = items.len() > usize::try_from(filter.limit).unwrap_or(usize::MAX);
    items.truncate(usize::try_from(filter.limit).unwrap_or(usize::MAX));
    let next_cursor = items.last().filter(|_| has_more).map(|last| last.id.simple().to_string());
    Ok(Json(DeliveryPage { items: items.into_iter().map(Into::into).collect(), next_cursor }))
}

type DeliveryPath = Path<(String, String)>;

/// One delivery with its attempts
#[utoipa::path(
    get,
    path = "/v1/webhooks/{id}/deliveries/{delivery}",
    operation_id = "readDelivery",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Delivery),
    responses(
        (status = 200, description = "The delivery.", body = DeliveryView),
        refusal::NotFound,
    ),
)]
async fn delivery(State(app): State<Arc<App>>, caller: Caller, Path((id, delivery)): DeliveryPath) -> Result<Json<DeliveryView>, ApiError> {
    caller.require(Scope::Webhooks)?;
    let found = app.store.find_delivery(&caller.tenant, uuid(&id)?, uuid(&delivery)?).await?;
    Ok(Json(found.ok_or(ApiError::NotFound)?.into()))
}

/// Send a delivery again
///
/// As if it were new, under the same `webhook-id`. One that is being tried anyway goes on.
#[utoipa::path(
    post,
    path = "/v1/webhooks/{id}/deliveries/{delivery}/redeliver",
    operation_id = "redeliver",
    tag = "webhooks",
    security(("bearer" = ["webhooks"])),
    params(parameter::Delivery),
    request_body(content = Option<Nothing>, description = "Nothing.", example = json!({})),
    responses(
        (status = 202, description = "What will be sent.", body = DeliveryView),
        refusal::NotFound,
        refusal::Conflict,
    ),
)]
async fn redeliver(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path((id, delivery)): DeliveryPath,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::Webhooks)?;
    let Nothing {} = json::read_or_default(body).await?;
    let (id, delivery, now) = (uuid(&id)?, uuid(&delivery)?, app.clock.now());
    let give_up_at = now + app.webhooks.settings.retry_for;
    match app.store.redeliver(&caller.tenant, id, delivery, now, give_up_at).await?.ok_or(ApiError::NotFound)? {
        Redelivery::Begun | Redelivery::Pending => {}
        Redelivery::Inactive => return Err(ApiError::Conflict("the webhook is not active".to_owned())),
    }
    app.webhooks.note_delivery();
    let begun = app.store.find_delivery(&caller.tenant, id, delivery).await?.ok_or(ApiError::NotFound)?;
    Ok((StatusCode::ACCEPTED, Json(DeliveryView::from(begun))).into_response())
}

/// What is sent of an event: what Standard Webhooks wants of every payload, around the event as its tenant has it from `/v1/events`.
pub(crate) fn webhook_body(told: Told) -> String {
    let (kind, at) = (told.kind.clone(), text_of(told.at));
    let tenant = told.tenant.clone();
    let view = EventView::new(told, tenant.as_ref());
    let body = json!({ "type": kind, "timestamp": at, "data": view }).to_string();
    if body.len() <= BODY_BYTES_MAX {
        return body;
    }
    json!({ "type": kind, "timestamp": at, "data": view.without_data() }).to_string()
}

/// The body of an answer as it is kept: without its secret.
pub(super) fn without_secret(body: &[u8]) -> Vec<u8> {
    let parts = std::str::from_utf8(body).ok().and_then(|text| {
        let (before, secret) = text.split_once(SECRET)?;
        Some([before, SECRET, &secret[secret.find('"')?..]].concat())
    });
    parts.map_or_else(|| body.to_vec(), String::into_bytes)
}

/// The body of an answer that was kept, with its secret again.
pub(super) fn with_secret(app: &App, body: Vec<u8>) -> Vec<u8> {
    #[derive(Deserialize)]
    struct Named {
        id: Uuid,
        secret_version: u32,
    }
    let Ok(Named { id, secret_version }) = serde_json::from_slice(&body) else { return body };
    let secret = app.webhooks.key.secret(id, secret_version).text();
    String::from_utf8_lossy(&body).replacen(SECRET, &format!("\"secret\":\"{secret}"), 1).into_bytes()
}

/// The id of a webhook that this request makes. A second attempt with the same key makes the same one.
async fn keyed_id(app: &App, caller: &Caller, keyed: &Keyed, now: OffsetDateTime) -> Result<Uuid, ApiError> {
    let Some(id) = keyed_uuid(caller, keyed) else { return Ok(Uuid::now_v7()) };
    // Made by a request of so long ago that its key is forgotten: the key is a new one.
    let earlier = app.store.find_webhook(&caller.tenant, id).await?;
    let is_forgotten = earlier.is_some_and(|earlier| earlier.created_at + app.idempotency.retention() < now);
    Ok(if is_forgotten { Uuid::now_v7() } else { id })
}

fn sound_url(app: &App, text: &str) -> Result<String, ApiError> {
    app.webhooks.targets.check(text).map(Into::into).map_err(|why| Invalid::new("url", why).into())
}

fn sound_kinds(kinds: Vec<String>) -> Result<Vec<String>, ApiError> {
    if kinds.len() > KINDS_MAX {
        return Err(Invalid::new("kinds", format!("at most {KINDS_MAX}")).into());
    }
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let is_sound = |kind: &String| {
        kind.len() <= KIND_BYTES_MAX && kind.split_once('.').is_some_and(|(area, what)| is_word(area) && (what == "*" || is_word(what)))
    };
    match kinds.iter().position(|kind| !is_sound(kind)) {
        Some(at) => Err(Invalid::new(format!("kinds[{at}]"), "a kind is as in `sandbox.ended` or `sandbox.*`").into()),
        None => Ok(kinds),
    }
}

fn sound_description(text: String) -> Result<String, ApiError> {
    let is_sound = text.chars().count() <= DESCRIPTION_CHARS_MAX && !text.chars().any(char::is_control);
    let detail = format!("at most {DESCRIPTION_CHARS_MAX} characters, and no control characters");
    if is_sound { Ok(text) } else { Err(Invalid::new("description", detail).into()) }
}

/// The id in a path. What is no id names nothing.
fn uuid(text: &str) -> Result<Uuid, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound)
}

fn cursor(text: &str) -> Result<Uuid, ApiError> {
    Uuid::parse_str(text).map_err(|_| Invalid::new("cursor", "not a cursor that a page gave").into())
}

fn text_of(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

impl SecretView {
    fn new(app: &App, webhook: Webhook) -> Self {
        let secret = app.webhooks.key.secret(webhook.id, webhook.secret_version).text();
        Self { webhook: webhook.into(), secret }
    }
}

impl From<Webhook> for WebhookView {
    fn from(webhook: Webhook) -> Self {
        Self {
            id: webhook.id,
            url: webhook.url,
            kinds: webhook.kinds,
            description: webhook.description,
            active: webhook.is_active,
            secret_version: webhook.secret_version,
            former_secret_until: webhook.former_secret_until,
            created_at: webhook.created_at,
            failing_since: webhook.failing_since,
            disabled_at: webhook.disabled_at,
            dropped: webhook.dropped,
        }
    }
}

impl From<Delivery> for DeliveryView {
    fn from(delivery: Delivery) -> Self {
        Self {
            id: delivery.id,
            event: delivery.event.map(|id| id.to_string()),
            kind: delivery.kind,
            state: delivery.state,
            created_at: delivery.created_at,
            next_at: delivery.next_at,
            ended_at: delivery.ended_at,
            attempt_count: delivery.attempt_count,
            attempts: delivery.attempts,
            response: delivery.response,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_words_with_a_dot_or_areas() {
        let sound = |kind: &str| sound_kinds(vec![kind.to_owned()]).is_ok();
        for kind in ["sandbox.ended", "sandbox.*", "image.made_again"] {
            assert!(sound(kind), "{kind}");
        }
        for kind in ["", "*", "sandbox", "sandbox.", ".ended", "Sandbox.ended", "sandbox.ended.now", "*.ended", "sandbox.**", "a\0.b"] {
            assert!(!sound(kind), "{kind}");
        }
        assert!(sound_kinds(vec!["a.b".to_owned(); KINDS_MAX + 1]).is_err());
    }

    #[test]
    fn an_answer_is_kept_without_its_secret() {
        let body = br#"{"id":"x","secret":"whsec_AAAA","z":1}"#;
        assert_eq!(without_secret(body), br#"{"id":"x","secret":"whsec_","z":1}"#);
        assert_eq!(without_secret(b"{}"), b"{}");
    }

    #[test]
    fn what_is_sent_of_an_event_is_bounded() {
        let told = |data| Told {
            position: crate::store::Position { xact: 1, id: 2 },
            tenant: None,
            kind: "sandbox.ended".into(),
            object: "sandbox/1".into(),
            actor_tenant: None,
            actor: None,
            at: OffsetDateTime::UNIX_EPOCH,
            data,
        };
        let body: serde_json::Value = serde_json::from_str(&webhook_body(told(json!({"a": 1})))).unwrap();
        assert_eq!((&body["type"], &body["timestamp"]), (&json!("sandbox.ended"), &json!("1970-01-01T00:00:00Z")));
        assert_eq!((&body["data"]["id"], &body["data"]["data"]), (&json!("2"), &json!({"a": 1})));
        let large = webhook_body(told(json!({"a": "x".repeat(BODY_BYTES_MAX)})));
        assert!(large.len() < 1024 && large.contains("\"data\":{}"), "{large}");
    }
}
