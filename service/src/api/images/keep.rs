//! `/v1/images/…`: what is done with images that are here: further names, how they were built, whether they are sound, and the way out as archives.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::header,
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    super::{
        App,
        caller::Caller,
        contract::{parameter, refusal},
        error::ApiError,
        json,
    },
    ImageView, created, named,
};
use crate::{
    images::{DamageKind, Export, History, ImagePart, Step, StepLayer, Verified},
    sandbox::{ImageReference, words},
    store::Image,
    token::Scope,
};

/// Another name for an image.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TagRequest)]
pub(super) struct TagRequest {
    /// What it is called now.
    #[schema(value_type = words::Reference)]
    reference: String,
    /// What it is to be called, too.
    #[schema(value_type = words::Reference)]
    name: String,
}

/// Give an image another name
///
/// The name means, from now on, what the reference means to the caller now; it is another image to `image_bytes`, and stays when the other name goes. A name that named another image names this one.
/// With the scope `admin` it is for all tenants, else for the caller's own.
#[utoipa::path(
    post,
    path = "/v1/images/tag",
    operation_id = "tagImage",
    tag = "images",
    security(("bearer" = ["images:write"])),
    request_body(content = TagRequest, example = json!({ "reference": "busybox", "name": "team/busybox:stable" })),
    responses(
        (status = 201, description = "It has that name.", body = ImageView, headers(("Location" = String, description = "Where the image is found."))),
        refusal::ImageNotFound,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn tag(State(app): State<Arc<App>>, caller: Caller, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let TagRequest { reference, name } = json::read(body).await?;
    let reference = ImageReference::parse("reference", reference)?.as_str().to_owned();
    let name = ImageReference::parse_new("name", name)?;
    let tenant = (!caller.scopes.allow(Scope::Admin)).then(|| caller.tenant.clone());
    let tagged = app.images.tag(reference.clone(), name, tenant, caller.owner()).await?;
    Ok(created(tagged.ok_or(ApiError::ImageNotFound(reference))?))
}

/// How an image was built. All but digests and sizes is the word of whoever built it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageHistory)]
pub(super) struct HistoryView {
    #[schema(value_type = words::Reference)]
    reference: String,
    #[schema(value_type = words::Digest)]
    digest: String,
    #[schema(required)]
    author: Option<String>,
    #[schema(required)]
    created: Option<String>,
    /// The first one first.
    steps: Vec<StepView>,
}

/// A step of an image's building.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageStep)]
struct StepView {
    #[schema(required)]
    created: Option<String>,
    /// As in the line of a `Dockerfile`.
    #[schema(required)]
    created_by: Option<String>,
    #[schema(required)]
    comment: Option<String>,
    /// What it added to the files; null: nothing.
    #[schema(required)]
    layer: Option<LayerView>,
}

/// A layer of an image.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageLayer)]
struct LayerView {
    #[schema(value_type = words::Digest)]
    digest: String,
    /// Packed as it is.
    size_bytes: u64,
    media_type: String,
}

/// How an image was built
///
/// Step by step, with the layers that they added.
#[utoipa::path(
    get,
    path = "/v1/image-history/{*reference}",
    operation_id = "readImageHistory",
    tag = "images",
    security(("bearer" = ["images:read"])),
    params(parameter::Reference),
    responses((status = 200, description = "The steps.", body = HistoryView), refusal::ImageNotFound, refusal::Conflict),
)]
pub(super) async fn history(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(reference): Path<String>,
) -> Result<Json<HistoryView>, ApiError> {
    caller.require(Scope::ImagesRead)?;
    let image = wanted(&app, &caller, reference).await?;
    let History { steps, author, created } = app.images.history(&image).await?;
    let Image { reference, digest, .. } = image;
    Ok(Json(HistoryView { reference, digest, author, created, steps: steps.into_iter().map(StepView::from).collect() }))
}

/// The image that a path names.
async fn wanted(app: &App, caller: &Caller, reference: String) -> Result<Image, ApiError> {
    let reference = named(reference)?;
    app.store.find_image(&caller.tenant, &reference).await?.ok_or(ApiError::ImageNotFound(reference))
}

impl From<Step> for StepView {
    fn from(step: Step) -> Self {
        let Step { created, created_by, comment, layer } = step;
        let view = |StepLayer { digest, size_bytes, media_type }: StepLayer| LayerView { digest, size_bytes, media_type };
        Self { created, created_by, comment, layer: layer.map(view) }
    }
}

/// The image as an archive
///
/// An OCI image layout and what `docker save` writes, over the same files, in one tar: `docker load`, `skopeo`, `podman` and the import of this service read it. Its manifest has the digest that the image has here.
#[utoipa::path(
    get,
    path = "/v1/image-archives/{*reference}",
    operation_id = "exportImage",
    tag = "images",
    security(("bearer" = ["images:read"])),
    params(parameter::Reference),
    responses(
        (status = 200, description = "The archive; it breaks off if something goes wrong.", content((serde_json::Value = "application/x-tar"))),
        refusal::ImageNotFound,
        refusal::Conflict,
        refusal::NoCapacity,
    ),
)]
pub(super) async fn export(State(app): State<Arc<App>>, caller: Caller, Path(reference): Path<String>) -> Result<Response, ApiError> {
    caller.require(Scope::ImagesRead)?;
    let image = wanted(&app, &caller, reference).await?;
    let export = app.images.export(&image, &caller.tenant).await?;
    let head = [(header::CONTENT_TYPE, "application/x-tar".to_owned()), (header::CONTENT_LENGTH, export.bytes.to_string())];
    let pieces = futures_util::stream::unfold(export, async |mut export: Export| Some((export.next().await?, export)));
    Ok((head, Body::from_stream(pieces)).into_response())
}

/// An image that is to be looked through.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = VerifyRequest)]
pub(super) struct VerifyRequest {
    #[schema(value_type = words::Reference)]
    reference: String,
}

/// What was found.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageVerified)]
pub(super) struct VerifiedView {
    #[schema(value_type = words::Reference)]
    reference: String,
    #[schema(value_type = words::Digest)]
    digest: String,
    /// Whether nothing is damaged and its root is there.
    sound: bool,
    /// Whether the root is there that sandboxes are made of. It is not compared with the layers.
    unpacked: bool,
    /// How many were read.
    bytes: u64,
    damaged: Vec<DamageView>,
}

/// A part of an image that is not what it was.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageDamage)]
struct DamageView {
    #[schema(value_type = words::Digest)]
    digest: String,
    part: ImagePartView,
    kind: DamageKindView,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ImagePart)]
enum ImagePartView {
    Manifest,
    Config,
    Layer,
}

/// `changed`: it has other bytes than its digest says; `unreadable`: the disk does not give it out, and it is left there.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ImageDamageKind)]
enum DamageKindView {
    Missing,
    Changed,
    Unreadable,
}

/// Look whether an image is what it was
///
/// Everything that it is made of is read and held against its digest. What is damaged is told; what has other bytes is put away, too, so that another import or pull of the image brings it as it was. Sandboxes that are made of the image's root go on
/// being made. The `digest` stays the same.
#[utoipa::path(
    post,
    path = "/v1/images/verify",
    operation_id = "verifyImage",
    tag = "images",
    security(("bearer" = ["images:write"])),
    request_body(content = VerifyRequest, example = json!({ "reference": "busybox" })),
    responses((status = 200, description = "What was found.", body = VerifiedView), refusal::ImageNotFound, refusal::Conflict, refusal::OnNode),
)]
pub(super) async fn verify(State(app): State<Arc<App>>, caller: Caller, body: Body) -> Result<Json<VerifiedView>, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let VerifyRequest { reference } = json::read(body).await?;
    let reference = ImageReference::parse("reference", reference)?.as_str().to_owned();
    let image = app.store.find_image(&caller.tenant, &reference).await?.ok_or(ApiError::ImageNotFound(reference))?;
    let Verified { bytes, damaged, is_unpacked } = app.images.verify(image.clone(), &caller.tenant).await?;
    let Image { reference, digest, .. } = image;
    let sound = damaged.is_empty() && is_unpacked;
    let damaged = damaged.into_iter().map(|damage| DamageView {
        digest: damage.digest,
        part: match damage.part {
            ImagePart::Manifest => ImagePartView::Manifest,
            ImagePart::Config => ImagePartView::Config,
            ImagePart::Layer => ImagePartView::Layer,
        },
        kind: match damage.kind {
            DamageKind::Missing => DamageKindView::Missing,
            DamageKind::Changed => DamageKindView::Changed,
            DamageKind::Unreadable => DamageKindView::Unreadable,
        },
    });
    Ok(Json(VerifiedView { reference, digest, sound, unpacked: is_unpacked, bytes, damaged: damaged.collect() }))
}
