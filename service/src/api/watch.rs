//! `/v1/sandboxes/{id}/watch`: what changes in files, as it happens.

use std::sync::Arc;

use axum::{
    extract::{Path, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    http::{HeaderMap, Uri},
    response::Response,
};
use futures_util::StreamExt as _;
use sandbox_core::tree::{GapCause, Notice, NoticeKind, TreePath};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{
    App,
    caller::Caller,
    contract::{parameter, refusal},
    error::ApiError,
    files::{flag, named, path},
    query,
    stream::{Form, Frame, Frames},
};
use crate::{
    clock::at_us,
    engine::{FileWatch, FileWatchEnd, WatchError, Watched},
    token::Scope,
};

/// One piece of what is told of watched files.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum FileWatchFrame {
    /// The first: what happens from now on is told.
    #[schema(title = "Watching")]
    Watching {
        watching: WatchingView,
    },
    Change(WatchedChange),
    /// What happened here is not told: look at the files themselves.
    #[schema(title = "Gap")]
    Gap {
        gap: WatchGap,
    },
    /// The last.
    #[schema(title = "End")]
    End {
        end: WatchEndView,
    },
}

/// What is watched.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileWatch)]
pub(super) struct WatchingView {
    /// Bytes that are no UTF-8 are replaced, and `path_base64` has all of them.
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    path_base64: Option<String>,
    /// Else it is what has this name in its folder, one after the other.
    is_folder: bool,
    recursive: bool,
    /// How many are watched now.
    folders: u32,
}

/// Something that happened to a file or folder.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = WatchedChange)]
pub(super) struct WatchedChange {
    /// Rises by one with each change that is told.
    seq: u64,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    at: OffsetDateTime,
    kind: WatchedKind,
    /// From the root on, through the path that was asked for. Bytes that are no UTF-8 are replaced, and `path_base64` has all of them.
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    path_base64: Option<String>,
    /// Of what was moved: where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    from_base64: Option<String>,
    is_folder: bool,
}

/// What happened: something has this name that had none that is watched; its content, or its mode, owner, times or extended attributes are others, told once for what came at
/// about the same time; it has no name any more that is watched; it went from one such name to another.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum WatchedKind {
    Created,
    Modified,
    Attributes,
    Removed,
    Moved,
}

/// Changes that are not told.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileWatchGap)]
pub(super) struct WatchGap {
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    at: OffsetDateTime,
    cause: WatchGapCause,
}

/// `overflow`: more at once than the kernel keeps, or something in a folder in the midst of its move; `slow_reader`: more than wait for a reader; `unwatched`: from now on there are folders that are not
/// watched, since they are too many, too deep or could not be looked at.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = FileWatchGapCause)]
#[serde(rename_all = "snake_case")]
pub(super) enum WatchGapCause {
    Overflow,
    SlowReader,
    Unwatched,
}

/// Why it is over.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileWatchEnded)]
pub(super) struct WatchEndView {
    reason: FileWatchEnd,
}

/// What changes in files, as it happens
///
/// By WebSocket, as lines of JSON or as server-sent events: first `{"watching": …}`, after which nothing is missed; then a frame for each change; at last `{"end": {"reason": …}}`. Of a folder:
/// what happens to the entries of it, with `recursive` of all folders below it, 4096 at the most; what a new folder holds when it is first seen is told as `created`. A file is watched by its
/// name: removed and made again it is watched on, and what replaces it is `created`, as it is by `PUT`. Links on the way are followed, and at the end those to folders; of others the link itself is
/// watched. Not told is what is written through memory that is mapped (mmap(2)), what lies in `/proc`, and that a folder above the path has another name.
///
/// A reader that is slow misses changes, and is told so by `{"gap": …}`; one that has stopped reading is disconnected, as from a log. A paused sandbox changes nothing, and its stream goes on when it does. The files of a sandbox are watched four times at one
/// time, those of all of a tenant's 256 times at each node. Who watches is a process in the sandbox, and its memory and time are the sandbox's.
#[utoipa::path(
    get,
    path = "/v1/sandboxes/{id}/watch",
    operation_id = "watchFiles",
    tag = "sandboxes",
    security(("bearer" = ["sandboxes:read"])),
    params(parameter::Named, parameter::WatchParameters),
    responses(
        (status = 101, description = "The stream begins, over WebSocket."),
        (status = 200, description = "The frames, in the form that was asked for.", content(
            (FileWatchFrame = "application/x-ndjson"),
            (String = "text/event-stream"),
        )),
        refusal::OfFiles,
        refusal::QuotaExceeded,
    ),
)]
pub(super) async fn read(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    caller.require(Scope::SandboxesRead)?;
    let asked = Asked::of(query::pairs(&uri)?)?;
    let form = Form::asked(&headers, upgrade)?;
    let id = query::object(&app, &caller, &id).await?;
    let watch = app.engine.watch_files(&caller.tenant, id, asked.path.clone(), asked.is_recursive).await?;
    Ok(form.respond(frames(asked, watch.ok_or(ApiError::NotFound)?)))
}

#[derive(Debug, Default)]
struct Asked {
    path: TreePath,
    is_recursive: bool,
}

impl Asked {
    fn of(pairs: Vec<(String, String)>) -> Result<Self, ApiError> {
        let mut asked = Self::default();
        for (name, text) in pairs {
            match name.as_str() {
                "path" => asked.path = path("path", text.as_bytes())?,
                "recursive" => asked.is_recursive = flag("recursive", &text)?,
                _ => return Err(query::unknown(&name)),
            }
        }
        Ok(asked)
    }

    /// What is told by a path that begins where this one ends.
    fn full(&self, rest: &[u8]) -> Vec<u8> {
        let mut path = self.path.to_bytes();
        if !rest.is_empty() {
            if !path.ends_with(b"/") {
                path.push(b'/');
            }
            path.extend_from_slice(rest);
        }
        path
    }
}

fn frames(asked: Asked, watch: FileWatch) -> Frames {
    let (path, path_base64) = named(&asked.full(b""));
    let is_folder = watch.is_folder();
    let watching = WatchingView { path, path_base64, is_folder, recursive: asked.is_recursive && is_folder, folders: watch.folders() };
    let first = frame(&FileWatchFrame::Watching { watching });
    let rest = futures_util::stream::unfold((watch, asked, 0), async |(mut watch, asked, mut seq)| {
        let told = match watch.next().await? {
            Watched::Notice(notice) => told(&asked, notice, &mut seq),
            Watched::End(reason) => FileWatchFrame::End { end: WatchEndView { reason } },
        };
        Some((frame(&told), (watch, asked, seq)))
    });
    Box::pin(futures_util::stream::iter([first]).chain(rest).map(Ok))
}

fn told(asked: &Asked, notice: Notice, seq: &mut u64) -> FileWatchFrame {
    match notice {
        Notice::Change { at_us: at, kind, path, from, is_folder } => {
            let (path, path_base64) = named(&asked.full(&path));
            let (from, from_base64) = from.map(|from| named(&asked.full(&from))).map_or((None, None), |(text, bytes)| (Some(text), bytes));
            let kind = match kind {
                NoticeKind::Created => WatchedKind::Created,
                NoticeKind::Modified => WatchedKind::Modified,
                NoticeKind::Attributes => WatchedKind::Attributes,
                NoticeKind::Removed => WatchedKind::Removed,
                NoticeKind::Moved => WatchedKind::Moved,
            };
            let change = WatchedChange { seq: *seq, at: at_us(at), kind, path, path_base64, from, from_base64, is_folder };
            *seq += 1;
            FileWatchFrame::Change(change)
        }
        Notice::Gap { at_us: at, cause } => {
            let cause = match cause {
                GapCause::Overflow => WatchGapCause::Overflow,
                GapCause::SlowReader => WatchGapCause::SlowReader,
                GapCause::Unwatched => WatchGapCause::Unwatched,
            };
            FileWatchFrame::Gap { gap: WatchGap { at: at_us(at), cause } }
        }
    }
}

fn frame(told: &FileWatchFrame) -> Frame {
    // Without an id: nobody goes on behind what was seen, since nobody keeps it.
    Frame { json: serde_json::to_string(told).expect("a frame holds nothing that JSON cannot"), id: None }
}

impl From<WatchError> for ApiError {
    fn from(error: WatchError) -> Self {
        match error {
            WatchError::Engine(error) => error.into(),
            WatchError::Tree(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn asked(query: &str) -> Result<Asked, ApiError> {
        Asked::of(query::pairs(&format!("/x?{query}").parse().unwrap()).unwrap())
    }

    fn frame(query: &str, notice: Notice) -> Value {
        serde_json::from_str(&super::frame(&told(&asked(query).unwrap(), notice, &mut 7)).json).unwrap()
    }

    #[test]
    fn what_is_wrong_is_named() {
        let right = asked("path=/work/&recursive").unwrap();
        assert!(right.is_recursive && right.path.to_bytes() == b"/work");
        assert!(!asked("").unwrap().is_recursive);
        for (query, name) in [("path=/a/../b", "path"), ("path=a%00", "path"), ("recursive=1", "recursive"), ("follow=true", "follow")] {
            let Err(ApiError::Invalid(invalid)) = asked(query) else { panic!("{query}") };
            assert_eq!(invalid.field, name);
        }
    }

    #[test]
    fn a_change_has_its_whole_path_and_one_that_is_no_text_has_its_bytes() {
        let moved = |path: &[u8], from: &[u8]| Notice::Change {
            at_us: 1_000_000,
            kind: NoticeKind::Moved,
            path: path.into(),
            from: Some(from.into()),
            is_folder: true,
        };
        let expected =
            json!({ "seq": 7, "at": "1970-01-01T00:00:01Z", "kind": "moved", "path": "/work/b", "from": "/work/a", "is_folder": true });
        assert_eq!(frame("path=work", moved(b"b", b"a")), expected);
        let odd = frame("", moved(b"b\xff", b"a"));
        assert_eq!((&odd["path"], &odd["path_base64"], &odd["from"]), (&json!("/b\u{fffd}"), &json!("L2L/"), &json!("/a")));
        let own = Notice::Change { at_us: 0, kind: NoticeKind::Removed, path: Vec::new(), from: None, is_folder: false };
        assert_eq!(frame("path=/work/file", own)["path"], "/work/file");
    }

    #[test]
    fn a_gap_says_why() {
        let gap = Notice::Gap { at_us: 0, cause: GapCause::SlowReader };
        assert_eq!(frame("", gap), json!({ "gap": { "at": "1970-01-01T00:00:00Z", "cause": "slow_reader" } }));
    }
}
