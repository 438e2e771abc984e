//! `/v1/images`: what sandboxes can be made of, and the ways in and out.

mod keep;
mod pull;
mod push;

pub(super) use pull::{CREDENTIAL_BYTES_MAX, CREDENTIAL_NAME, CREDENTIAL_PASSWORD, GivenCredentials, pull_for};

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    query,
};
use crate::{
    images::ImportError,
    sandbox::{ImageReference, Invalid, words},
    store::Image,
    token::Scope,
};

/// The routes below `/v1/images`.
pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(import))
        .routes(routes!(pull::pull))
        .routes(routes!(push::push))
        .routes(routes!(keep::tag))
        .routes(routes!(keep::history))
        .routes(routes!(keep::export))
        .routes(routes!(keep::verify))
        .routes(routes!(read, remove))
}

/// An image as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Image)]
pub(super) struct ImageView {
    #[schema(value_type = words::Reference)]
    reference: String,
    #[schema(value_type = words::Digest)]
    digest: String,
    /// Whether it is for all tenants.
    shared: bool,
    size_bytes: u64,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    /// What it was pulled as, with its registry; null: it came in another way.
    #[schema(required)]
    pulled_from: Option<String>,
    config: ConfigView,
}

/// What a sandbox does when its request does not say otherwise.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = ImageConfig)]
struct ConfigView {
    entrypoint: Vec<String>,
    command: Vec<String>,
    env: Vec<String>,
    workdir: String,
    user: String,
    /// Null: that of every sandbox.
    #[schema(required)]
    stop_signal: Option<String>,
    /// The words of whoever built it.
    labels: BTreeMap<String, String>,
    /// Ports that it listens on, as in `80/tcp`. They are reached like all others.
    exposed_ports: Vec<String>,
    /// Folders that are meant to be kept apart. Each sandbox has them, in its own writable layer, made where the image lacks them; they outlive it where a volume stands there.
    volumes: Vec<String>,
}

/// All images that there are for a tenant.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageList)]
struct Page {
    items: Vec<ImageView>,
}

/// Bring an image in
///
/// The body is an archive: an OCI image layout in a tar, or what `docker save` writes, plain or compressed. Everything in it is checked by digest. With the scope
/// `admin` the image is for all tenants, else for the caller's own. A reference that named another image names this one from then on.
#[utoipa::path(
    post,
    // No image has this name: it could be read by no one.
    path = "/v1/images/import",
    operation_id = "importImage",
    tag = "images",
    security(("bearer" = ["images:write"])),
    params(("reference" = words::Reference, Query, description = "The name that the image is to have.")),
    request_body(description = "At most 8 GiB.", content(("application/x-tar"), ("application/gzip"), ("application/octet-stream"))),
    responses(
        (status = 201, description = "The image is there.", body = ImageView, headers(("Location" = String, description = "Where the image is found."))),
        refusal::QuotaExceeded,
        refusal::OnNode,
    ),
)]
async fn import(State(app): State<Arc<App>>, caller: Caller, uri: Uri, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let reference = reference(query::pairs(&uri)?)?;
    let tenant = (!caller.scopes.allow(Scope::Admin)).then(|| caller.tenant.clone());
    let receiving = app.images.receive(tenant.as_ref(), body.into_data_stream());
    // An operator may need the image to help that.
    let upload = if tenant.is_some() { app.engine.while_disk_lasts(receiving).await?? } else { receiving.await? };
    Ok(created(app.images.import(upload, reference, tenant, caller.owner()).await?))
}

/// The answer to whoever made an image.
pub(super) fn created(image: Image) -> Response {
    let location = format!("/v1/images/{}", image.reference);
    (StatusCode::CREATED, [(header::LOCATION, location)], Json(ImageView::from(image))).into_response()
}

/// What the tenant's sandboxes can be made of
///
/// By reference. A tenant's own image hides the shared one of that name.
#[utoipa::path(
    get,
    path = "/v1/images",
    operation_id = "listImages",
    tag = "images",
    security(("bearer" = ["images:read"])),
    params(parameter::ImageFilter),
    responses((status = 200, description = "The images.", body = Page)),
)]
async fn list(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<Page>, ApiError> {
    caller.require(Scope::ImagesRead)?;
    let filter = Filter::parse(query::pairs(&uri)?)?;
    let mut items = app.store.list_images(&caller.tenant).await?;
    // A tenant's own image hides the shared one of that name, here as in a run.
    items.dedup_by(|next, kept| next.reference == kept.reference);
    Ok(Json(Page { items: items.into_iter().filter(|image| filter.permits(image)).map(ImageView::from).collect() }))
}

/// One image
#[utoipa::path(
    get,
    path = "/v1/images/{*reference}",
    operation_id = "readImage",
    tag = "images",
    security(("bearer" = ["images:read"])),
    params(parameter::Reference),
    responses(
        (status = 200, description = "The image as it is now.", body = ImageView),
        refusal::ImageNotFound,
    ),
)]
async fn read(State(app): State<Arc<App>>, caller: Caller, Path(reference): Path<String>) -> Result<Json<ImageView>, ApiError> {
    caller.require(Scope::ImagesRead)?;
    let reference = named(reference)?;
    let image = app.store.find_image(&caller.tenant, &reference).await?.ok_or(ApiError::ImageNotFound(reference))?;
    Ok(Json(image.into()))
}

/// Take a reference away
///
/// Sandboxes that run on the image go on, and those that keep their layer can be started again: its content goes with the last of them. A shared image is removed with the scope `admin`.
#[utoipa::path(
    delete,
    path = "/v1/images/{*reference}",
    operation_id = "deleteImage",
    tag = "images",
    security(("bearer" = ["images:write"])),
    params(parameter::Reference),
    responses(
        (status = 204, description = "The reference names nothing any more."),
        refusal::ImageNotFound,
    ),
)]
async fn remove(State(app): State<Arc<App>>, caller: Caller, Path(reference): Path<String>) -> Result<StatusCode, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let reference = named(reference)?;
    if app.images.remove(Some(&caller.tenant), &reference, &caller.owner()).await?.is_some() {
        return Ok(StatusCode::NO_CONTENT);
    }
    // What is shared belongs to no tenant.
    if app.store.find_image(&caller.tenant, &reference).await?.is_some() {
        caller.require(Scope::Admin)?;
        if app.images.remove(None, &reference, &caller.owner()).await?.is_some() {
            return Ok(StatusCode::NO_CONTENT);
        }
    }
    Err(ApiError::ImageNotFound(reference))
}

/// The reference in a path. What cannot be one names no image.
fn named(text: String) -> Result<String, ApiError> {
    match ImageReference::parse("reference", text.clone()) {
        Ok(_) => Ok(text),
        Err(_) => Err(ApiError::ImageNotFound(text)),
    }
}

fn reference(pairs: Vec<(String, String)>) -> Result<ImageReference, ApiError> {
    let mut found = None;
    for (name, value) in pairs {
        match name.as_str() {
            "reference" if found.is_none() => found = Some(ImageReference::parse_new("reference", value)?),
            "reference" => return Err(Invalid::new("reference", "an image has one reference").into()),
            _ => return Err(query::unknown(&name)),
        }
    }
    found.ok_or_else(|| Invalid::new("reference", "this parameter is missing: the name that the image is to have").into())
}

/// Which images are wanted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Filter {
    prefix: String,
    is_shared: Option<bool>,
    /// `None`: whatever value.
    labels: Vec<(String, Option<String>)>,
}

impl Filter {
    fn parse(pairs: Vec<(String, String)>) -> Result<Self, ApiError> {
        let mut filter = Self::default();
        for (name, text) in pairs {
            match name.as_str() {
                "name" => ImageReference::parse("name", text)?.as_str().clone_into(&mut filter.prefix),
                "shared" => filter.is_shared = Some(query::value("shared", &text)?),
                "label" => match text.split_once('=') {
                    Some(("", _)) => return Err(Invalid::new("label", "a label has a key").into()),
                    Some((key, value)) => filter.labels.push((key.to_owned(), Some(value.to_owned()))),
                    None if text.is_empty() => return Err(Invalid::new("label", "a label has a key").into()),
                    None => filter.labels.push((text, None)),
                },
                _ => return Err(query::unknown(&name)),
            }
        }
        Ok(filter)
    }

    fn permits(&self, image: &Image) -> bool {
        let labels = image.config.config().as_ref().and_then(|config| config.labels().as_ref());
        let has = |(key, wanted): &(String, Option<String>)| {
            labels.and_then(|labels| labels.get(key)).is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
        };
        image.reference.starts_with(&self.prefix)
            && self.is_shared.is_none_or(|is_shared| is_shared == image.is_shared)
            && self.labels.iter().all(has)
    }
}

impl From<Image> for ImageView {
    fn from(image: Image) -> Self {
        let config = image.config.config().as_ref().map_or_else(ConfigView::default, |config| ConfigView {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            command: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            workdir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            stop_signal: config.stop_signal().clone(),
            labels: config.labels().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect(),
            exposed_ports: sorted(config.exposed_ports().as_ref()),
            volumes: sorted(config.volumes().as_ref()),
        });
        let Image { reference, digest, size_bytes, created_at, is_shared, pulled_from, .. } = image;
        Self { reference, digest, shared: is_shared, size_bytes, created_at, pulled_from, config }
    }
}

/// An image has them in no order.
fn sorted(names: Option<&Vec<String>>) -> Vec<String> {
    let names: BTreeSet<_> = names.into_iter().flatten().cloned().collect();
    names.into_iter().collect()
}

impl From<ImportError> for ApiError {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Tree(error) => error.into(),
            ImportError::Store(error) => error.into(),
            ImportError::Internal(cause) => Self::Internal(cause),
            ImportError::Invalid(_)
            | ImportError::TooLarge
            | ImportError::Busy(_)
            | ImportError::QuotaExceeded(_)
            | ImportError::NotAtRegistry(_)
            | ImportError::RegistryDenied(_)
            | ImportError::RegistryFailed(_)
            | ImportError::PartMissing
            | ImportError::KeeperUnavailable => (&error).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(query: &str) -> Result<ImageReference, ApiError> {
        reference(query::pairs(&format!("/v1/images/import?{query}").parse().unwrap())?)
    }

    #[test]
    fn a_reference_may_be_encoded() {
        assert_eq!(parsed("reference=library%2Fpython%3A3").unwrap().as_str(), "library/python:3");
    }

    #[test]
    fn a_path_that_can_be_no_reference_names_no_image() {
        assert!(matches!(named("a\0b".into()), Err(ApiError::ImageNotFound(_))));
        assert_eq!(named("library/python:3".into()).unwrap(), "library/python:3");
    }

    #[test]
    fn filters_add_up_and_what_is_wrong_is_named() {
        let parsed = |query: &str| Filter::parse(query::pairs(&format!("/v1/images?{query}").parse().unwrap())?);
        let image = |reference: &str, is_shared: bool| {
            Image {
            reference: reference.to_owned(),
            digest: String::new(),
            root: "a".repeat(64).try_into().unwrap(),
            config: serde_json::from_value(serde_json::json!({
                "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] }, "config": { "Labels": { "of": "team=a" } },
            }))
            .unwrap(),
            size_bytes: 0,
            created_at: OffsetDateTime::UNIX_EPOCH,
            is_shared,
            pulled_from: None,
        }
        };
        let permits = |query: &str, image: &Image| parsed(query).unwrap().permits(image);
        assert!(permits("", &image("a", true)) && permits("name=py&label=of", &image("python", false)));
        assert!(permits("label=of%3Dteam%3Da&shared=true", &image("a", true)));
        assert!(!permits("name=py", &image("busybox", true)) && !permits("shared=false", &image("a", true)));
        assert!(!permits("label=of%3Dteam", &image("a", true)) && !permits("label=of&label=by", &image("a", true)));
        for (query, field) in [
            ("name=%20", "name"),
            ("name=", "name"),
            ("shared=maybe", "shared"),
            ("label=", "label"),
            ("label=%3Dx", "label"),
            ("colour=red", "colour"),
        ] {
            assert!(matches!(parsed(query), Err(ApiError::Invalid(invalid)) if invalid.field == field), "{query}");
        }
    }

    #[test]
    fn a_missing_or_unsound_reference_is_named() {
        for query in ["", "reference=", "reference=a%20b", "reference=import", "reference=pull", "reference=a&reference=b"] {
            assert!(matches!(parsed(query), Err(ApiError::Invalid(invalid)) if invalid.field == "reference"), "{query}");
        }
        assert!(matches!(parsed("reference=a&colour=red"), Err(ApiError::Invalid(invalid)) if invalid.field == "colour"));
    }
}
