//! `POST /v1/images/push`: an image to a registry, with a look at how far it has come.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, request::Parts},
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    super::{App, caller::Caller, contract::refusal, error::ApiError, idempotency::Keyed, json, observe},
    ImageView,
    pull::{GivenCredentials, PullFrame, form, frames},
};
use crate::{
    images::{ImageSource, Push},
    sandbox::{ImageReference, Invalid, words},
    token::Scope,
};

/// What is to be pushed, and where to.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PushRequest)]
pub(in crate::api) struct PushRequest {
    /// What the image is called here.
    #[schema(value_type = words::Reference)]
    reference: String,
    /// `[REGISTRY/]REPOSITORY[:TAG]`, as in a pull. Absent: what `reference` says.
    #[schema(value_type = Option<words::Reference>)]
    to: Option<String>,
    /// Who pushes, to the registry. They are used for this request and not kept. Absent: as whom the tenant is known there, if it keeps that (`/v1/registries`).
    credentials: Option<GivenCredentials>,
}

/// Push an image
///
/// To any registry that speaks the protocol of OCI or Docker (version 2), over https, as far as the operator permits it. What the registry has is not sent again, what breaks off, stalls, or is answered 429 or 503 is tried again. There it
/// has the `digest` that it has here: it is sent byte for byte as it came in.
///
/// With `Accept: application/x-ndjson` or `text/event-stream` the answer is a stream, as that of a pull is. A client that goes away changes nothing.
///
/// Refusals of registries: 403 `registry_denied`, 404 `image_not_found`, which is also said of an image that is not here, and 502 `registry_failed`, which is `retryable`.
#[utoipa::path(
    post,
    // No image has this name.
    path = "/v1/images/push",
    operation_id = "pushImage",
    tag = "images",
    security(("bearer" = ["images:write"])),
    request_body(content = PushRequest, example = json!({ "reference": "python", "to": "registry.example/team/python:3" })),
    responses(
        (status = 200, description = "The registry has it; or how it goes on, and the end of it.", content((ImageView = "application/json"), (PullFrame = "application/x-ndjson"), (String = "text/event-stream"))),
        refusal::OfRegistries,
        refusal::Conflict,
        refusal::OnNode,
    ),
)]
pub(in crate::api) async fn push(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    headers: HeaderMap,
    parts: Parts,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let PushRequest { reference, to, credentials } = json::read(body).await?;
    let credentials = credentials.map(|given| given.parse("credentials.")).transpose()?;
    let reference = ImageReference::parse("reference", reference)?.as_str().to_owned();
    let (field, to) = to.map_or(("reference", reference.clone()), |to| ("to", to));
    let refused = |why| Invalid::new(field, why);
    let target = ImageSource::parse(ImageReference::parse(field, to)?.as_str()).map_err(refused)?;
    if target.tag().is_none() {
        return Err(refused("an image is pushed to a tag, not to a digest".to_owned()).into());
    }
    app.images.check_source(&target).map_err(refused)?;
    let credentials = match credentials {
        Some(given) => Some(given),
        None => app.images.kept_credentials(&caller.tenant, &target).await?,
    };
    let image = app.store.find_image(&caller.tenant, &reference).await?.ok_or(ApiError::ImageNotFound(reference))?;
    let pushing = app.images.push(image, Push { target, credentials }, &caller.owner()).await?;
    // What is kept for a key is an answer, and has a status that tells whether it may be another later.
    let form = if keyed.key.is_some() { None } else { form(&headers) };
    if let Some(form) = form {
        return Ok(form.respond(frames(pushing, observe::request_id(&parts))));
    }
    let image = pushing.ended().await.map_err(|error| ApiError::from(&*error))?;
    Ok(Json(ImageView::from(image)).into_response())
}
