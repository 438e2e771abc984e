//! `POST /v1/images/pull`: an image from a registry, with a look at how far it has come.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    super::{
        App,
        caller::Caller,
        contract::refusal,
        error::{ApiError, Problem},
        idempotency::Keyed,
        json, observe,
        pass::Bid,
        stream::{self, EVENTS, Form, Frame, Frames, LINES},
    },
    ImageView,
};
use crate::{
    engine::Engine,
    images::{Credentials, ImageSource, ImportError, LayerProgress, Progress, Pull, Pulling, Stage},
    sandbox::{ImageReference, Invalid, NewSandbox, PullPolicy, words},
    token::Scope,
};

pub(in crate::api) const CREDENTIAL_BYTES_MAX: usize = 8192;
/// ASCII that can be seen. The first colon would end the name (RFC 7617).
pub(in crate::api) const CREDENTIAL_NAME: &str = "^[\\u0020-\\u0039\\u003b-\\u007e]*$";
pub(in crate::api) const CREDENTIAL_PASSWORD: &str = "^[\\u0020-\\u007e]*$";
/// At most so often somebody who looks on is told something.
const TELL_PAUSE: Duration = Duration::from_millis(100);

/// What is to be pulled.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PullRequest)]
pub(in crate::api) struct PullRequest {
    /// `[REGISTRY/]REPOSITORY[:TAG][@sha256:DIGEST]`. Without a registry Docker's own is meant, without a tag `latest`; a digest goes before a tag.
    #[schema(value_type = words::Reference)]
    reference: String,
    /// What the image is to be called here, instead of what `reference` says.
    #[schema(value_type = Option<words::Reference>)]
    name: Option<String>,
    /// Who pulls, to the registry. They are used for this request and not kept. Absent: as whom the tenant is known there, if it keeps that (`/v1/registries`).
    credentials: Option<GivenCredentials>,
}

/// Name and password, or name and token, that the registry knows.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RegistryCredentials)]
pub(in crate::api) struct GivenCredentials {
    #[schema(extensions(("x-schema" = json!({ "minLength": 1, "maxLength": CREDENTIAL_BYTES_MAX, "pattern": CREDENTIAL_NAME }))))]
    pub(in crate::api) username: String,
    #[schema(extensions(("x-schema" = json!({ "maxLength": CREDENTIAL_BYTES_MAX, "pattern": CREDENTIAL_PASSWORD }))))]
    pub(in crate::api) password: String,
}

impl std::fmt::Debug for GivenCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GivenCredentials")
    }
}

impl PullRequest {
    fn parse(self) -> Result<(ImageSource, ImageReference, Option<Credentials>), Invalid> {
        let reference = ImageReference::parse("reference", self.reference)?;
        let source = ImageSource::parse(reference.as_str()).map_err(|why| Invalid::new("reference", why))?;
        let name = match self.name {
            Some(name) => ImageReference::parse_new("name", name)?,
            None => ImageReference::parse_new("reference", reference.as_str().to_owned())?,
        };
        let credentials = self.credentials.map(|given| given.parse("credentials.")).transpose()?;
        Ok((source, name, credentials))
    }
}

impl GivenCredentials {
    /// `above` is what stands before its fields' names in the request.
    pub(in crate::api) fn parse(self, above: &str) -> Result<Credentials, Invalid> {
        let Self { username, password } = self;
        let is_fit = |text: &str| text.len() <= CREDENTIAL_BYTES_MAX && text.bytes().all(|b| matches!(b, b' '..=b'~'));
        // The first colon ends the name (RFC 7617).
        if !is_fit(&username) || username.is_empty() || username.contains(':') {
            let why = format!("1 to {CREDENTIAL_BYTES_MAX} characters of ASCII that can be seen, and no colon");
            return Err(Invalid::new(format!("{above}username"), why));
        }
        if !is_fit(&password) {
            let why = format!("at most {CREDENTIAL_BYTES_MAX} characters of ASCII that can be seen");
            return Err(Invalid::new(format!("{above}password"), why));
        }
        Ok(Credentials { username, password })
    }
}

/// One piece of what is told of a pull or a push.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::api) enum PullFrame {
    /// How far it has come; some are left out where much happens.
    #[schema(title = "Progress")]
    Progress { progress: ProgressView },
    /// The last, if all went well.
    #[schema(title = "Image")]
    Image {
        #[schema(value_type = ImageView)]
        image: Box<ImageView>,
    },
    /// The last, if not.
    #[schema(title = "Problem")]
    Problem {
        #[schema(value_type = Problem)]
        problem: Box<Problem>,
    },
}

/// How far a pull or a push has come.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = PullProgress)]
pub(in crate::api) struct ProgressView {
    stage: PullStage,
    /// Of all layers, packed as they are: here, or of a push there, by now, and to come altogether. 0 while that is not known.
    bytes: u64,
    total_bytes: u64,
    /// Each once, the bottom one first; of a push, its configuration behind them.
    layers: Vec<LayerView>,
}

/// `resolving`: the registry is asked what there is; `downloading`: its layers are on their way; `unpacking`: all is here, and is being unpacked or waits for its turn; `uploading`: of a push, what the registry lacks is on its way there.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::api) enum PullStage {
    Resolving,
    Downloading,
    Unpacking,
    Uploading,
}

/// How far a layer has come. `bytes` shrink where a registry has to begin again.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = PullLayer)]
pub(in crate::api) struct LayerView {
    #[schema(value_type = words::Digest)]
    digest: String,
    bytes: u64,
    total_bytes: u64,
    /// Whether it need not go anywhere: the registry of a push has it, or the tenant of a pull has an image with it, or may use one.
    there: bool,
}

/// Pull an image
///
/// From any registry that speaks the protocol of OCI or Docker (version 2), over https; the operator may name the only registries that there are, and which private networks may be reached. Of an
/// image for several platforms this machine's is taken, and its `digest` is told. Every byte is checked by digest; what breaks off, stalls, or is answered 429 or 503 is asked for again, and gone on with. The image then
/// goes the way of an import, with the same limits. With the scope `admin` it is for all tenants, else for the caller's own. A reference that named another image names this one from then on.
///
/// With `Accept: application/x-ndjson` or `text/event-stream` the answer is a stream that begins at once: how far the pull has come, and in the end the image, or the problem. Such an answer is 200
/// even when the pull fails. With an `Idempotency-Key` there is one answer at the end, whatever `Accept` says. Who asks for what the same tenant is pulling already, with the same credentials, waits for that. A client that goes away changes nothing.
///
/// Refusals of registries: 403 `registry_denied`, 404 `image_not_found`, and 502 `registry_failed`, which is `retryable`, where it cannot be reached or does not send what it promised.
#[utoipa::path(
    post,
    // No image has this name.
    path = "/v1/images/pull",
    operation_id = "pullImage",
    tag = "images",
    security(("bearer" = ["images:write"])),
    request_body(content = PullRequest, example = json!({ "reference": "registry.example/team/app:1", "name": "app:1" })),
    responses(
        (status = 200, description = "How it goes on, and the end of it.", content((PullFrame = "application/x-ndjson"), (String = "text/event-stream"))),
        (status = 201, description = "The image is there.", body = ImageView, headers(("Location" = String, description = "Where the image is found."))),
        refusal::OfRegistries,
        refusal::QuotaExceeded,
        refusal::OnNode,
    ),
)]
pub(in crate::api) async fn pull(
    State(app): State<Arc<App>>,
    caller: Caller,
    keyed: Keyed,
    headers: HeaderMap,
    parts: Parts,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require(Scope::ImagesWrite)?;
    let (source, reference, credentials) = json::read::<PullRequest>(body).await?.parse()?;
    app.images.check_source(&source).map_err(|why| Invalid::new("reference", why))?;
    let credentials = match credentials {
        Some(given) => Some(given),
        None => app.images.kept_credentials(&caller.tenant, &source).await?,
    };
    let tenant = (!caller.scopes.allow(Scope::Admin)).then(|| caller.tenant.clone());
    // An operator may need the image to help that.
    if tenant.is_some() {
        app.engine.check_shortage()?;
    }
    let is_tenants = tenant.is_some();
    let pulling = app.images.pull(Pull { source, credentials, reference, tenant }, caller.owner())?;
    if is_tenants {
        watch_disk(&app.engine, &pulling);
    }
    // What is kept for a key is an answer, and has a status that tells whether it may be another later.
    let form = if keyed.key.is_some() { None } else { form(&headers) };
    if let Some(form) = form {
        return Ok(form.respond(frames(pulling, observe::request_id(&parts))));
    }
    let image = pulling.ended().await.map_err(|error| ApiError::from(&*error))?;
    let location = format!("/v1/images/{}", image.reference);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(ImageView::from(image))).into_response())
}

/// Sees to it that the image is here that a sandbox is to be made of, as far as its creator asks for that.
pub(in crate::api) async fn pull_for(app: &App, caller: &Caller, asked: &NewSandbox, bid: &Bid) -> Result<(), ApiError> {
    let is_wanted = match asked.pull {
        PullPolicy::Never => false,
        PullPolicy::Missing => match app.store.find_image(&caller.tenant, asked.image.as_str()).await? {
            None => true,
            // Another node may have pulled it. What came otherwise is no registry's to replace.
            Some(image) => match ImageSource::parse(asked.image.as_str()) {
                Ok(source) => app.images.is_elsewhere(&image, &source).await?,
                Err(_) => false,
            },
        },
        PullPolicy::Always => true,
    };
    if !is_wanted {
        return Ok(());
    }
    if bid.is_offered() {
        return Err(ApiError::Declined("the image would have to be pulled".to_owned()));
    }
    caller.require(Scope::ImagesWrite)?;
    // Else it is looked at when the sandbox is admitted, which is too late.
    app.engine.check_standing(&caller.owner(), caller.scopes.allow(Scope::Admin)).await?;
    let refused = |why| Invalid::new("image", why);
    let reference = ImageReference::parse_new("image", asked.image.as_str().to_owned())?;
    let source = ImageSource::parse(reference.as_str()).map_err(refused)?;
    app.images.check_source(&source).map_err(refused)?;
    app.engine.check_shortage()?;
    let credentials = app.images.kept_credentials(&caller.tenant, &source).await?;
    let pull = Pull { source, credentials, reference, tenant: Some(caller.tenant.clone()) };
    let pulling = app.images.pull(pull, caller.owner())?;
    watch_disk(&app.engine, &pulling);
    pulling.ended().await.map_err(|error| ApiError::from(&*error))?;
    Ok(())
}

/// Ends a pull for which this node's disk does not last, whoever waits for it.
fn watch_disk(engine: &Arc<Engine>, pulling: &Pulling) {
    let (engine, pulling) = (Arc::clone(engine), pulling.clone());
    tokio::spawn(async move {
        if engine.while_disk_lasts(pulling.clone().ended()).await.is_err() {
            pulling.give_up();
        }
    });
}

/// As a stream, for whom that is the best.
pub(super) fn form(headers: &HeaderMap) -> Option<Form> {
    match stream::preferred(headers, &["application/json", LINES, EVENTS]) {
        Some(LINES) => Some(Form::Lines),
        Some(EVENTS) => Some(Form::Events),
        Some(_) | None => None,
    }
}

/// What is told of it, to its end.
pub(super) fn frames(pulling: Pulling, request_id: String) -> Frames {
    Box::pin(futures_util::stream::unfold(Some((pulling, None)), move |state| {
        let request_id = request_id.clone();
        async move {
            let (mut pulling, told) = state?;
            let frame = next(&mut pulling, told.as_ref(), request_id).await;
            let json = serde_json::to_string(&frame).expect("a frame holds nothing that JSON cannot");
            let state = if let PullFrame::Progress { progress } = frame { Some((pulling, Some(progress))) } else { None };
            Some((Ok(Frame { json, id: None }), state))
        }
    }))
}

/// The end, or else something that was not told yet.
async fn next(pulling: &mut Pulling, told: Option<&ProgressView>, request_id: String) -> PullFrame {
    if told.is_some() {
        tokio::time::sleep(TELL_PAUSE).await;
    }
    loop {
        let progress = ProgressView::from(&pulling.progress());
        match pulling.outcome() {
            Some(Ok(image)) => return PullFrame::Image { image: Box::new(image.into()) },
            Some(Err(error)) => return PullFrame::Problem { problem: Box::new(ApiError::from(&*error).problem(request_id)) },
            None if told != Some(&progress) => return PullFrame::Progress { progress },
            None => pulling.changed().await,
        }
    }
}

impl From<&Progress> for ProgressView {
    fn from(progress: &Progress) -> Self {
        let view = |layer: &LayerProgress| {
            let LayerProgress { digest, bytes, total_bytes, is_there } = layer.clone();
            LayerView { digest, bytes, total_bytes, there: is_there }
        };
        let layers: Vec<_> = progress.layers.iter().map(view).collect();
        Self {
            stage: match progress.stage {
                Stage::Resolving => PullStage::Resolving,
                Stage::Downloading => PullStage::Downloading,
                Stage::Unpacking => PullStage::Unpacking,
                Stage::Uploading => PullStage::Uploading,
            },
            bytes: layers.iter().map(|layer| layer.bytes).sum(),
            total_bytes: layers.iter().map(|layer| layer.total_bytes).sum(),
            layers,
        }
    }
}

impl From<&ImportError> for ApiError {
    /// For each of those who waited for it.
    fn from(error: &ImportError) -> Self {
        match error {
            ImportError::Invalid(why) => Invalid::new("", why.clone()).into(),
            ImportError::TooLarge => Self::PayloadTooLarge(error.to_string()),
            ImportError::Busy(why) => Self::Busy(why.clone()),
            ImportError::QuotaExceeded(exceeded) => Self::QuotaExceeded(exceeded.clone()),
            ImportError::NotAtRegistry(what) => Self::ImageNotFound(what.clone()),
            ImportError::RegistryDenied(why) => Self::RegistryDenied(why.clone()),
            ImportError::RegistryFailed(why) => Self::RegistryFailed(why.clone()),
            ImportError::PartMissing => Self::ContentMissing(error.to_string()),
            ImportError::KeeperUnavailable => Self::KeeperUnavailable,
            ImportError::Store(error) if error.is_unavailable() => Self::DatabaseUnavailable,
            ImportError::Tree(_) | ImportError::Store(_) | ImportError::Internal(_) => Self::Internal(anyhow::anyhow!("{error:#}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(request: serde_json::Value) -> String {
        serde_json::from_value::<PullRequest>(request).unwrap().parse().unwrap_err().field
    }

    #[test]
    fn what_is_wrong_with_a_request_is_named() {
        assert_eq!(refused(serde_json::json!({ "reference": "a b" })), "reference");
        assert_eq!(refused(serde_json::json!({ "reference": "a.example:22/b" })), "reference");
        assert_eq!(refused(serde_json::json!({ "reference": "a", "name": "pull" })), "name");
        assert_eq!(
            refused(serde_json::json!({ "reference": "a", "credentials": { "username": "a:b", "password": "" } })),
            "credentials.username"
        );
        assert_eq!(
            refused(serde_json::json!({ "reference": "a", "credentials": { "username": "a", "password": "ü" } })),
            "credentials.password"
        );
    }

    #[test]
    fn an_image_is_called_what_it_was_asked_for_by_or_by_its_own_name() {
        let name = |request: serde_json::Value| serde_json::from_value::<PullRequest>(request).unwrap().parse().unwrap().1;
        assert_eq!(name(serde_json::json!({ "reference": "a.example/b:1" })).as_str(), "a.example/b:1");
        assert_eq!(name(serde_json::json!({ "reference": "a.example/b:1", "name": "b", "credentials": null })).as_str(), "b");
    }

    #[test]
    fn a_stream_is_for_whom_it_is_the_best() {
        let of = |accept: &'static str| form(&HeaderMap::from_iter([(header::ACCEPT, header::HeaderValue::from_static(accept))]));
        assert!(matches!(of("application/x-ndjson"), Some(Form::Lines)));
        assert!(matches!(of("text/event-stream, application/json;q=0.5"), Some(Form::Events)));
        assert!(of("*/*").is_none() && of("application/json, application/x-ndjson").is_none());
    }
}
