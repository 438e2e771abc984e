//! `/v1/languages`: what a run can be asked for by name.

use std::{collections::BTreeSet, sync::Arc};

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{App, caller::Caller, error::ApiError};
use crate::sandbox::{Language, Limits, words};

/// All languages.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LanguageList)]
pub(super) struct LanguagesView {
    items: Vec<LanguageView>,
}

/// A language that a run can be asked for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Language)]
struct LanguageView {
    /// What a request says.
    name: String,
    /// For people.
    title: String,
    /// Of its compiler or interpreter, as the operator states it.
    version: String,
    #[schema(value_type = words::Reference)]
    image: String,
    /// Whether that image is there now, for the caller.
    available: bool,
    /// Where the source text is put, relative to the image's working folder.
    file: String,
    /// Program and arguments of the compile step; null where there is none.
    #[schema(required, min_items = 1)]
    compile: Option<Vec<String>>,
    /// Program and arguments.
    #[schema(min_items = 1)]
    run: Vec<String>,
    /// Those of a run that asks for none.
    limits: Limits,
    /// Those of its compile step.
    #[schema(required)]
    compile_limits: Option<Limits>,
}

/// What a run can be written in
///
/// By name.
#[utoipa::path(
    get,
    path = "/v1/languages",
    operation_id = "listLanguages",
    tag = "runs",
    security(("bearer" = [])),
    responses((status = 200, description = "The languages.", body = LanguagesView)),
)]
pub(super) async fn list(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<LanguagesView>, ApiError> {
    let images: BTreeSet<_> = app.store.list_images(&caller.tenant).await?.into_iter().map(|image| image.reference).collect();
    let view = |(name, language): (&str, &Language)| {
        let (limits, compile_limits) = language.limits_in_force()?;
        let Language { title, version, image, file, compile, run, .. } = language.clone();
        let available = images.contains(&image);
        Ok(LanguageView { name: name.to_owned(), title, version, available, image, file, compile, run, limits, compile_limits })
    };
    Ok(Json(LanguagesView { items: app.languages.iter().map(view).collect::<Result<_, ApiError>>()? }))
}
