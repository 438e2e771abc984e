//! `POST /v1/sandboxes/{id}/commit`: what a sandbox's files are becomes an image.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State},
    response::Response,
};

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    images::{ImageView, created},
    json, query,
};
use crate::{
    engine::EngineError,
    sandbox::{CommitRequest, Kind},
    token::Scope,
};

/// The route, for those who must know that it is like an import.
pub(super) const COMMIT: &str = "/v1/sandboxes/{id}/commit";

/// Make an image of a sandbox
///
/// Of all files as they are now, for the tenant alone: any number of sandboxes and runs can be made of it. Owners inside the sandbox, modes, links, times in seconds and extended attributes in `user.`
/// come along; what is in memory does not, nor devices, sockets and capabilities of files. Of what is mounted — `/proc`, `/dev`, volumes — there is an empty folder. A sandbox that runs goes on: its
/// files are read one after another, so that a program which writes meanwhile may be found between two of its writes. To have them all of one moment, stop it first: one that was made with `keep_layer`
/// can be committed after its end. One that is paused cannot, nor one under gVisor; without a kept layer, one that has ended is refused with `layer_lost`. The image counts as one that is imported,
/// with all its files unpacked: at most 8 GiB and 1,000,000 entries.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/commit",
    operation_id = "commitSandbox",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write", "images:write"])),
    params(parameter::Named),
    request_body(content = CommitRequest, example = json!({ "reference": "prepared:1", "command": ["sh"] })),
    responses(
        (status = 201, description = "The image is there.", body = ImageView, headers(("Location" = String, description = "Where the image is found."))),
        refusal::OfFiles,
        refusal::LayerLost,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn commit(State(app): State<Arc<App>>, caller: Caller, Path(id): Path<String>, body: Body) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    caller.require(Scope::ImagesWrite)?;
    let asked = json::read::<CommitRequest>(body).await?.parse()?;
    let id = query::object(&app, &caller, &id).await?;
    let sandbox = app.engine.find(&caller.tenant, Kind::Sandbox, id).await?.ok_or(ApiError::NotFound)?;
    app.engine.check_shortage()?;
    let tree = match app.engine.files(&caller.tenant, id).await {
        // Its files are what it wrote, and that is gone.
        Err(EngineError::WrongState(state)) if state.is_final() => return Err(ApiError::LayerLost),
        tree => tree?.ok_or(ApiError::NotFound)?,
    };
    let actor = caller.owner();
    let commit = async {
        let reading = app.images.read_tree(tree, &sandbox.image.root, &asked, &actor);
        let read = app.engine.while_disk_lasts(reading).await??;
        Ok::<_, ApiError>(app.images.commit(read, id, asked, caller.owner()).await?)
    };
    Ok(created(app.engine.in_use(id, commit).await?))
}
