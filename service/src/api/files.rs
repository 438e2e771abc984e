//! `/v1/sandboxes/{id}/files`, `/archive`, `/diff`, `/top`: the inside of a sandbox, as its own root sees it.

mod view;

use std::sync::Arc;

use axum::{
    Json,
    body::{Body, BodyDataStream, HttpBody as _},
    extract::State,
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use futures_util::StreamExt as _;
use sandbox_core::tree::{Ask, Entry, Existing, Fault, FaultKind, Link, Owner, PAGE_ENTRIES_MAX, Reply, Span, TreePath};
use utoipa_axum::{router::OpenApiRouter, routes};
pub(super) use view::named;
use view::{ArchiveView, ChangeView, DiffView, EntryView, FileAnswer, PageView, ProcessView, TopView};

use super::{
    App,
    caller::Caller,
    contract::{
        parameter::{self, INNER_PATH, NewEntry},
        refusal,
    },
    error::ApiError,
    idempotency::Keyed,
    json, query,
};
use crate::{
    runtime::{Content, GiveError, Tree, TreeError},
    sandbox::Invalid,
    token::Scope,
};

/// The largest archive that is given out, and what one that comes in may hold.
const ARCHIVE_BYTES_MAX: u64 = 16 << 30;
const ARCHIVE_ENTRIES_MAX: u64 = 1_000_000;
/// The most differences and processes in one answer.
const CHANGES_MAX: usize = 10_000;
const PROCESSES_MAX: usize = 5000;
/// The largest id of a sandbox's own.
pub(super) const ID_MAX: u32 = 65_534;

/// They last as long as what they carry. That has bounds of its own: the body's, and those of whoever works in the sandbox.
pub(super) fn router() -> OpenApiRouter<Arc<App>> {
    let root = || get(read).put(write).delete(remove).post(change);
    OpenApiRouter::new()
        .routes(routes!(read, write, remove, change))
        // The same, of the root: the rest of a path is never empty to axum.
        .route("/v1/sandboxes/{id}/files", root())
        .route("/v1/sandboxes/{id}/files/", root())
        .routes(routes!(pack, unpack))
        .routes(routes!(diff))
        .routes(routes!(top))
}

/// What a URL names: a sandbox, and the path behind the name of the resource.
struct Target {
    /// By id or by name.
    sandbox: String,
    path: TreePath,
}

impl Target {
    /// The path is bytes: axum's own extractors take text alone.
    fn of(uri: &Uri) -> Result<Self, ApiError> {
        let rest = uri.path().strip_prefix("/v1/sandboxes/").ok_or(ApiError::NotFound)?;
        let mut parts = rest.splitn(3, '/');
        let sandbox = decoded(parts.next().unwrap_or_default()).and_then(|text| String::from_utf8(text).ok()).ok_or(ApiError::NotFound)?;
        let path =
            decoded(parts.nth(1).unwrap_or_default()).ok_or_else(|| Invalid::new("path", "a % must be followed by two hex digits"))?;
        Ok(Self { sandbox, path: self::path("path", &path)? })
    }
}

/// Without its percent-encoding (RFC 3986, section 2.1).
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first == b'%' {
            bytes.push(hex::decode(rest.get(..2)?).ok()?.first().copied()?);
            rest = &rest[2..];
        } else {
            bytes.push(*first);
        }
    }
    Some(bytes)
}

pub(super) fn path(field: &str, bytes: &[u8]) -> Result<TreePath, ApiError> {
    TreePath::parse(bytes).map_err(|error| Invalid::new(field, error.to_string()).into())
}

/// What to do, from the query.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wish {
    is_list: bool,
    is_stat: bool,
    is_folder: bool,
    has_parents: bool,
    is_recursive: bool,
    is_exclusive: bool,
    rename: Option<TreePath>,
    path: Option<TreePath>,
    cursor: Option<Vec<u8>>,
    limit: Option<u32>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Wish {
    /// Takes the parameters in `known`, and no others.
    fn of(uri: &Uri, known: &[&str]) -> Result<Self, ApiError> {
        let mut wish = Self { has_parents: true, ..Self::default() };
        for (name, text) in query::pairs(uri)? {
            if !known.contains(&name.as_str()) {
                return Err(query::unknown(&name));
            }
            match name.as_str() {
                "list" => wish.is_list = flag(&name, &text)?,
                "stat" => wish.is_stat = flag(&name, &text)?,
                "mkdir" => wish.is_folder = flag(&name, &text)?,
                "parents" => wish.has_parents = flag(&name, &text)?,
                "recursive" => wish.is_recursive = flag(&name, &text)?,
                "exclusive" => wish.is_exclusive = flag(&name, &text)?,
                "rename" => wish.rename = Some(path("rename", text.as_bytes())?),
                "path" => wish.path = Some(path("path", text.as_bytes())?),
                "cursor" => {
                    let after = view::decode_cursor(&text).ok_or_else(|| Invalid::new("cursor", "not a cursor that a page gave"))?;
                    wish.cursor = Some(after);
                }
                "limit" => {
                    let limit = text.parse().ok().filter(|limit| (1..=PAGE_ENTRIES_MAX).contains(limit));
                    wish.limit =
                        Some(limit.ok_or_else(|| Invalid::new("limit", format!("not a whole number from 1 to {PAGE_ENTRIES_MAX}")))?);
                }
                "mode" => wish.mode = Some(mode(&text)?),
                "uid" => wish.uid = Some(owner("uid", &text)?),
                "gid" => wish.gid = Some(owner("gid", &text)?),
                _ => return Err(query::unknown(&name)),
            }
        }
        Ok(wish)
    }

    /// One id alone is the other, too.
    fn owner(&self) -> Option<Owner> {
        let uid = self.uid.or(self.gid)?;
        Some(Owner { uid, gid: self.gid.unwrap_or(uid) })
    }

    const fn existing(&self) -> Existing {
        if self.is_exclusive { Existing::Keep } else { Existing::Replace }
    }
}

/// `?list` is as good as `?list=true`.
pub(super) fn flag(name: &str, text: &str) -> Result<bool, ApiError> {
    match text {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Invalid::new(name, "true, false or nothing").into()),
    }
}

fn mode(text: &str) -> Result<u32, ApiError> {
    let is_octal = (3..=5).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| is_octal && *mode <= 0o7777);
    mode.ok_or_else(|| Invalid::new("mode", "a mode is three or four octal digits, as in 0755").into())
}

fn owner(name: &str, text: &str) -> Result<u32, ApiError> {
    let id = text.parse().ok().filter(|id| *id <= ID_MAX);
    id.ok_or_else(|| Invalid::new(name, format!("not a whole number from 0 to {ID_MAX}")).into())
}

/// Somebody who works on the files of the caller's sandbox.
async fn files(app: &App, caller: &Caller, sandbox: &str) -> Result<Tree, ApiError> {
    let id = query::object(app, caller, sandbox).await?;
    app.engine.files(&caller.tenant, id).await?.ok_or(ApiError::NotFound)
}

/// Read a file, or list a folder
///
/// The content of a file, or a part of it with `Range: bytes=…`; with `list` the entries of a folder, by name; with `stat` what there is of a file, folder or link. `HEAD`
/// tells of a file without its content. As the sandbox's own root sees it: no link leads out of it. Of stopped sandboxes too, as long as their layer is there.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/files/{*path}",
    operation_id = "readFile",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(
        parameter::File,
        ("list" = Option<bool>, Query, description = "The entries of a folder."),
        ("stat" = Option<bool>, Query, description = "What there is of it; links are not followed."),
        ("cursor" = Option<String>, Query, description = "Of a list: the `next_cursor` of the page before."),
        ("limit" = Option<u32>, Query, description = "Of a list: the most entries of the page.",
            extensions(("x-schema" = json!({ "minimum": 1, "maximum": PAGE_ENTRIES_MAX, "default": PAGE_ENTRIES_MAX })))),
    ),
    responses(
        (status = 200, description = "The content of a file, or what `list` and `stat` ask for.",
            content((serde_json::Value = "application/octet-stream"), (FileAnswer = "application/json")),
            headers(
                ("ETag" = String, description = "Of a file: changes with it."),
                ("Last-Modified" = String, description = "Of a file."),
                ("Accept-Ranges" = String, description = "Of a file: `bytes`."),
            )),
        (status = 206, description = "A part of a file.", content((serde_json::Value = "application/octet-stream")),
            headers(
                ("Content-Range" = String, description = "Which part, and of how many bytes."),
                ("ETag" = String, description = "Changes with the file."),
                ("Last-Modified" = String, description = "When the file was written last."),
                ("Accept-Ranges" = String, description = "`bytes`."),
            )),
        refusal::OfFiles,
        refusal::RangeNotSatisfiable,
    ),
)]
async fn read(State(app): State<Arc<App>>, caller: Caller, method: Method, uri: Uri, headers: HeaderMap) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let Target { sandbox, path } = Target::of(&uri)?;
    let wish = Wish::of(&uri, &["list", "stat", "cursor", "limit"])?;
    let mut tree = files(&app, &caller, &sandbox).await?;
    if wish.is_list {
        let ask = Ask::List { path, after: wish.cursor, max: wish.limit.unwrap_or(PAGE_ENTRIES_MAX) };
        let Reply::Page { entries, is_more } = tree.ask(ask).await? else { return Err(nonsense()) };
        return Ok(Json(PageView::of(entries, is_more)).into_response());
    }
    if wish.is_stat {
        let entry = tree.entry(Ask::Stat { path, link: Link::Itself }).await?;
        return Ok(Json(EntryView::from(entry)).into_response());
    }
    if method == Method::HEAD {
        let entry = tree.entry(Ask::Stat { path, link: Link::Followed }).await?;
        if entry.kind != sandbox_core::tree::EntryKind::File {
            return Err(Fault { kind: FaultKind::WrongKind, message: "it is no regular file".to_owned() }.into());
        }
        let mut response = described(&entry, Body::empty());
        response.headers_mut().insert(header::CONTENT_LENGTH, entry.size.into());
        return Ok(response);
    }
    read_content(tree, path, &headers).await
}

async fn read_content(tree: Tree, path: TreePath, headers: &HeaderMap) -> Result<Response, ApiError> {
    // Whether a part is still one of the same whole, only its validators could say (RFC 9110, 13.1.5); they are weak, so it is not.
    let span = if headers.contains_key(header::IF_RANGE) { None } else { headers.get(header::RANGE).and_then(wanted) };
    let length = |reply: &Reply| if let Reply::Content { length, .. } = reply { Some(*length) } else { None };
    let (reply, content) = tree.content(Ask::Read { path, span: span.unwrap_or(Span::ALL) }, length).await?;
    let Reply::Content { entry, offset, length } = reply else { return Err(nonsense()) };
    let size = entry.size;
    if span.is_some() && length == 0 {
        return Err(ApiError::RangeNotSatisfiable(size));
    }
    let mut response = described(&entry, body(content));
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    if span.is_some() {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        // Someone hostile may have said anything.
        let last = offset.saturating_add(length).saturating_sub(1);
        response.headers_mut().insert(header::CONTENT_RANGE, text(format!("bytes {offset}-{last}/{size}")));
    }
    Ok(response)
}

/// The one part that is asked for (RFC 9110, section 14.2). What is not understood, or is several parts, is answered with the whole.
fn wanted(range: &HeaderValue) -> Option<Span> {
    let (first, last) = range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    match (first, last) {
        ("", last) => Some(Span::Last { length: number(last)? }),
        (first, "") => Some(Span::From { offset: number(first)?, length: u64::MAX }),
        (first, last) => {
            let (offset, last) = (number(first)?, number(last)?);
            (offset <= last).then(|| Span::From { offset, length: (last - offset).saturating_add(1) })
        }
    }
}

/// A file as an answer, with what is known of it.
fn described(entry: &Entry, body: Body) -> Response {
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::ETAG, text(format!("W/\"{:x}-{:x}-{:x}\"", entry.inode, entry.size, entry.modified_ns)));
    if let Some(date) = view::http_date(entry.modified_ns) {
        headers.insert(header::LAST_MODIFIED, text(date));
    }
    response
}

fn text(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("numbers, our own words and dates are ASCII")
}

/// A failure in the middle breaks the connection: a client must not take a part for the whole.
fn body(content: Content) -> Body {
    Body::from_stream(futures_util::stream::unfold(content, async |mut content| {
        let next = content.next().await?;
        if let Err(error) = &next {
            tracing::debug!(%error, "content of a sandbox broke off");
        }
        Some((next, content))
    }))
}

/// Write a file
///
/// Missing folders are made. What was there is replaced at once when all has come; whoever has it open keeps the old content.
#[utoipa::path(
    put,
    path = "/v1/sandboxes/{id}/files/{*path}",
    operation_id = "writeFile",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(
        parameter::File,
        NewEntry,
        ("exclusive" = Option<bool>, Query, description = "Refuse with `file_exists` if there is something of that name."),
    ),
    request_body(description = "The content.", content(("application/octet-stream"))),
    responses(
        (status = 200, description = "The file as it is now.", body = EntryView),
        refusal::OfChange,
    ),
)]
async fn write(State(app): State<Arc<App>>, caller: Caller, uri: Uri, body: Body) -> Result<Json<EntryView>, ApiError> {
    let mut content = body.into_data_stream();
    let written = async {
        caller.require(Scope::SandboxesWrite)?;
        let Target { sandbox, path } = Target::of(&uri)?;
        let wish = Wish::of(&uri, &["mode", "uid", "gid", "exclusive"])?;
        let tree = files(&app, &caller, &sandbox).await?;
        let ask = Ask::Write { path, mode: wish.mode, owner: wish.owner(), existing: wish.existing() };
        let Reply::Entry(entry) = tree.give(ask, &mut content).await? else { return Err(nonsense()) };
        Ok(Json(entry.into()))
    };
    let written = written.await;
    heard(written, &mut content).await
}

/// Has a client hear that it is refused: one that is still sending would not, so what it sends is read, up to a point.
async fn heard<T>(done: Result<T, ApiError>, content: &mut BodyDataStream) -> Result<T, ApiError> {
    let mut left = json::DRAIN_BYTES_MAX;
    while done.is_err()
        && left > 0
        && let Some(Ok(bytes)) = content.next().await
    {
        left = left.saturating_sub(bytes.len());
    }
    done
}

/// Remove a file or a folder
#[utoipa::path(
    delete,
    path = "/v1/sandboxes/{id}/files/{*path}",
    operation_id = "deleteFile",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(
        parameter::File,
        ("recursive" = Option<bool>, Query, description = "A folder with all that is in it; else only an empty one."),
    ),
    responses(
        (status = 204, description = "It is gone."),
        refusal::OfChange,
    ),
)]
async fn remove(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<StatusCode, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let Target { sandbox, path } = Target::of(&uri)?;
    let wish = Wish::of(&uri, &["recursive"])?;
    let mut tree = files(&app, &caller, &sandbox).await?;
    tree.ask(Ask::Remove { path, is_recursive: wish.is_recursive }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a folder, or rename
///
/// One of `mkdir` and `rename` says which. Where nobody heard how a rename went, or the making of a folder without `parents`, the answer is 409 (`outcome_unknown`), also to a request that is
/// sent again with its `Idempotency-Key`: the file tells.
#[utoipa::path(
    post,
    path = "/v1/sandboxes/{id}/files/{*path}",
    operation_id = "changeFile",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(
        parameter::File,
        NewEntry,
        ("mkdir" = Option<bool>, Query, description = "Make this folder."),
        ("parents" = Option<bool>, Query, description = "With missing ones above it; then it may be there already.", extensions(("x-schema" = json!({ "default": true })))),
        ("rename" = Option<String>, Query, description = "Where it goes, from the sandbox's root on.", extensions(("x-schema" = json!({ "pattern": INNER_PATH })))),
        ("exclusive" = Option<bool>, Query, description = "Of a rename: refuse with `file_exists` if there is something of that name."),
    ),
    responses(
        (status = 200, description = "It has its new name.", body = EntryView),
        (status = 201, description = "The folder is there.", body = EntryView),
        refusal::OfChange,
        refusal::OutcomeUnknown,
    ),
)]
async fn change(State(app): State<Arc<App>>, caller: Caller, keyed: Keyed, uri: Uri) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesWrite)?;
    let Target { sandbox, path } = Target::of(&uri)?;
    let mut wish = Wish::of(&uri, &["mkdir", "parents", "mode", "uid", "gid", "rename", "exclusive"])?;
    // Done again, a rename or a new folder that must not be there would find what they did themselves.
    let (ask, status, is_done_once) = match (wish.is_folder, wish.rename.take()) {
        (true, None) => {
            let ask = Ask::MakeFolder { path, has_parents: wish.has_parents, mode: wish.mode, owner: wish.owner() };
            (ask, StatusCode::CREATED, !wish.has_parents)
        }
        (false, Some(to)) => (Ask::Rename { from: path, to, existing: wish.existing() }, StatusCode::OK, true),
        (true, Some(_)) | (false, None) => return Err(Invalid::new("", "one of mkdir and rename says what is to be done").into()),
    };
    if is_done_once {
        keyed.begin(&app).await?;
    }
    let mut tree = files(&app, &caller, &sandbox).await?;
    let entry = match tree.entry(ask).await {
        Err(TreeError::Lost(error)) if is_done_once => {
            tracing::debug!(%error, "the process that worked on a sandbox's files went away");
            return Err(ApiError::OutcomeUnknown);
        }
        entry => entry?,
    };
    Ok((status, Json(EntryView::from(entry))).into_response())
}

/// A file or a folder with all that is in it, as tar
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/archive",
    operation_id = "readArchive",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(
        parameter::Id,
        ("path" = Option<String>, Query, description = "What is packed, from the root on.", extensions(("x-schema" = json!({ "pattern": INNER_PATH, "default": "/" })))),
    ),
    responses(
        (status = 200, description = "The archive; it breaks off if something goes wrong.", content((serde_json::Value = "application/x-tar"))),
        refusal::OfFiles,
    ),
)]
async fn pack(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let sandbox = Target::of(&uri)?.sandbox;
    let path = Wish::of(&uri, &["path"])?.path.unwrap_or_default();
    let tree = files(&app, &caller, &sandbox).await?;
    let length = |reply: &Reply| (*reply == Reply::Archive).then_some(ARCHIVE_BYTES_MAX);
    let (_, content) = tree.content(Ask::Pack { path, bytes_max: ARCHIVE_BYTES_MAX }, length).await?;
    Ok(([(header::CONTENT_TYPE, "application/x-tar")], body(content)).into_response())
}

/// What a tar holds, into a folder
///
/// Nothing of it leads out of the folder.
#[utoipa::path(
    put,
    path = "/v1/sandboxes/{id}/archive",
    operation_id = "writeArchive",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:write"])),
    params(
        parameter::Id,
        ("path" = Option<String>, Query, description = "The folder, from the root on.", extensions(("x-schema" = json!({ "pattern": INNER_PATH, "default": "/" })))),
    ),
    request_body(description = "A tar archive.", content(("application/x-tar"))),
    responses(
        (status = 200, description = "It is there.", body = ArchiveView),
        refusal::OfChange,
    ),
)]
async fn unpack(State(app): State<Arc<App>>, caller: Caller, uri: Uri, body: Body) -> Result<Json<ArchiveView>, ApiError> {
    let is_missing = body.is_end_stream();
    let mut content = body.into_data_stream();
    let unpacked = async {
        caller.require(Scope::SandboxesWrite)?;
        let sandbox = Target::of(&uri)?.sandbox;
        let path = Wish::of(&uri, &["path"])?.path.unwrap_or_default();
        let tree = files(&app, &caller, &sandbox).await?;
        if is_missing {
            return Err(ApiError::Invalid(Invalid::new("", "the body is missing: an archive")));
        }
        let ask = Ask::Unpack { path, bytes_max: ARCHIVE_BYTES_MAX, entries_max: ARCHIVE_ENTRIES_MAX };
        let Reply::Unpacked { entries, bytes } = tree.give(ask, &mut content).await? else { return Err(nonsense()) };
        Ok(Json(ArchiveView { entries, bytes }))
    };
    let unpacked = unpacked.await;
    heard(unpacked, &mut content).await
}

/// What differs from the image
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/diff",
    operation_id = "readDiff",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Id),
    responses(
        (status = 200, description = "The differences.", body = DiffView),
        refusal::OfFiles,
    ),
)]
async fn diff(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<DiffView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let sandbox = Target::of(&uri)?.sandbox;
    Wish::of(&uri, &[])?;
    let (changes, is_truncated) = files(&app, &caller, &sandbox).await?.changes(CHANGES_MAX).await?;
    Ok(Json(DiffView { items: changes.into_iter().map(ChangeView::from).collect(), truncated: is_truncated }))
}

/// The program's processes
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/top",
    operation_id = "readProcesses",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Id),
    responses(
        (status = 200, description = "The processes.", body = TopView),
        refusal::OfFiles,
    ),
)]
async fn top(State(app): State<Arc<App>>, caller: Caller, uri: Uri) -> Result<Json<TopView>, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let sandbox = Target::of(&uri)?.sandbox;
    Wish::of(&uri, &[])?;
    let processes = files(&app, &caller, &sandbox).await?.processes(PROCESSES_MAX).await?;
    Ok(Json(TopView { items: processes.into_iter().map(ProcessView::from).collect() }))
}

fn nonsense() -> ApiError {
    ApiError::Busy("the process that worked on the sandbox's files gave an answer that fits no question".to_owned())
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        match fault.kind {
            FaultKind::Refused => Invalid::new("", fault.message).into(),
            FaultKind::TooLarge => Self::PayloadTooLarge(fault.message),
            FaultKind::Busy => Self::Busy(fault.message),
            FaultKind::NotFound | FaultKind::Exists | FaultKind::WrongKind | FaultKind::Denied | FaultKind::Full | FaultKind::Failed => {
                Self::File(fault)
            }
        }
    }
}

impl From<TreeError> for ApiError {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::Fault(fault) => fault.into(),
            // Its own process went: with the sandbox, by its payload, for want of memory. None of it is ours, and all of it may be otherwise next time.
            TreeError::Lost(error) => {
                tracing::debug!(%error, "the process that worked on a sandbox's files went away");
                Self::Busy("the process that worked on the sandbox's files went away, perhaps with the sandbox".to_owned())
            }
        }
    }
}

impl From<GiveError<axum::Error>> for ApiError {
    fn from(error: GiveError<axum::Error>) -> Self {
        match error {
            GiveError::Tree(error) => error.into(),
            GiveError::Content(error) => Invalid::new("", format!("the body could not be read: {error}")).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0190b5a4-0000-7000-8000-000000000000";

    fn target(path: &str) -> Result<Target, ApiError> {
        Target::of(&format!("/v1/sandboxes/{ID}{path}").parse().unwrap())
    }

    fn field_of<T>(done: Result<T, ApiError>) -> String {
        match done {
            Err(ApiError::Invalid(invalid)) => invalid.field,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was taken"),
        }
    }

    #[test]
    fn a_path_is_bytes() {
        assert_eq!(target("/files/a/b%20c%ff").unwrap().path.to_bytes(), b"/a/b c\xff");
        assert_eq!(target("/files").unwrap().path, TreePath::default());
        assert_eq!(target("/files//a/").unwrap().path.to_bytes(), b"/a");
        assert_eq!(target("/files/a%2Fb").unwrap().path.to_bytes(), b"/a/b");
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        for path in ["/files/../x", "/files/%2e%2e/x", "/files/a%00", "/files/%zz", "/files/a%2", &format!("/files/{}", "a/".repeat(2048))]
        {
            assert_eq!(field_of(target(path)), "path", "{path}");
        }
    }

    #[test]
    fn a_part_is_asked_for_in_three_ways() {
        let wanted = |text: &str| wanted(&HeaderValue::from_str(text).unwrap());
        assert_eq!(wanted("bytes=2-5"), Some(Span::From { offset: 2, length: 4 }));
        assert_eq!(wanted("bytes=2-"), Some(Span::From { offset: 2, length: u64::MAX }));
        assert_eq!(wanted("bytes=-5"), Some(Span::Last { length: 5 }));
        assert_eq!(wanted("bytes=0-18446744073709551615"), Some(Span::From { offset: 0, length: u64::MAX }));
        for other in ["bytes=5-2", "bytes=1-2,4-5", "bytes=", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=+1-2"] {
            assert_eq!(wanted(other), None, "{other}");
        }
    }

    #[test]
    fn parameters_are_known_and_bounded() {
        let wish = |query: &str| Wish::of(&format!("/x?{query}").parse().unwrap(), &["list", "limit", "mode", "uid", "gid", "cursor"]);
        assert!(wish("list").unwrap().is_list && wish("list=true").unwrap().is_list && !wish("list=false").unwrap().is_list);
        assert_eq!(wish("mode=0755").unwrap().mode, Some(0o755));
        assert_eq!(wish("uid=7").unwrap().owner(), Some(Owner { uid: 7, gid: 7 }));
        assert_eq!(wish("uid=7&gid=8").unwrap().owner(), Some(Owner { uid: 7, gid: 8 }));
        for (query, field) in [
            ("list=maybe", "list"),
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("mode=99", "mode"),
            ("mode=+755", "mode"),
            ("mode=77777", "mode"),
            ("uid=65535", "uid"),
            ("gid=-1", "gid"),
            ("cursor=%00", "cursor"),
            ("rename=x", "rename"),
        ] {
            assert_eq!(field_of(wish(query)), field, "{query}");
        }
    }
}
