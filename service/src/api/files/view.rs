//! Files, differences and processes as the API shows them. Names are bytes; such as are no text come as base64, too.

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD},
};
use sandbox_core::tree::{Change, ChangeKind, Entry, EntryKind, Process};
use serde::Serialize;
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};
use utoipa::ToSchema;

use crate::sandbox::words;

/// A file, folder or whatever else has a name.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileEntry)]
pub(super) struct EntryView {
    /// In its folder. Bytes that are no UTF-8 are replaced, and `name_base64` has all of them.
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    name_base64: Option<String>,
    #[schema(value_type = words::EntryType)]
    r#type: &'static str,
    size_bytes: u64,
    /// Four octal digits.
    #[schema(pattern = "^[0-7]{4}$")]
    mode: String,
    uid: u32,
    gid: u32,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    modified_at: OffsetDateTime,
    /// Where a symbolic link leads, as it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    target_base64: Option<String>,
}

/// Entries of a folder in the order of their names as bytes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FilePage)]
pub(super) struct PageView {
    items: Vec<EntryView>,
    /// Null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// What `list` and `stat` are answered with.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "the one or the other is sent; the contract names both")]
pub(super) enum FileAnswer {
    Page(PageView),
    Entry(EntryView),
}

/// What came of an archive.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ArchiveResult)]
pub(super) struct ArchiveView {
    pub(super) entries: u64,
    /// Of content.
    pub(super) bytes: u64,
}

/// A difference to the image.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileChange)]
pub(super) struct ChangeView {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String)]
    path_base64: Option<String>,
    #[schema(value_type = words::ChangeType)]
    kind: &'static str,
}

/// All differences to the image, in the order of their paths.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileChanges)]
pub(super) struct DiffView {
    pub(super) items: Vec<ChangeView>,
    /// Whether there are more.
    pub(super) truncated: bool,
}

/// A process, as the sandbox's own `/proc` has it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Process)]
pub(super) struct ProcessView {
    /// Inside the sandbox, where 1 is ours.
    pid: u32,
    parent_pid: u32,
    uid: u32,
    /// A letter of proc_pid_stat(5).
    state: String,
    threads: u32,
    cpu_ms: u64,
    memory_bytes: u64,
    /// Cut after a kilobyte; of a process without arguments its name in brackets.
    command: Vec<String>,
}

/// Processes, the first of the sandbox first.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Processes)]
pub(super) struct TopView {
    pub(super) items: Vec<ProcessView>,
}

/// Text, and all bytes if they are none.
pub(in crate::api) fn named(bytes: &[u8]) -> (String, Option<String>) {
    let is_text = std::str::from_utf8(bytes).is_ok();
    (String::from_utf8_lossy(bytes).into_owned(), (!is_text).then(|| BASE64.encode(bytes)))
}

impl From<Entry> for EntryView {
    fn from(entry: Entry) -> Self {
        let (name, name_base64) = named(&entry.name);
        let (target, target_base64) = entry.target.as_deref().map(named).map_or((None, None), |(text, bytes)| (Some(text), bytes));
        Self {
            name,
            name_base64,
            r#type: match entry.kind {
                EntryKind::File => "file",
                EntryKind::Folder => "folder",
                EntryKind::Link => "link",
                EntryKind::Fifo => "fifo",
                EntryKind::Socket => "socket",
                EntryKind::Device => "device",
            },
            size_bytes: entry.size,
            mode: format!("{:04o}", entry.mode & 0o7777),
            uid: entry.uid,
            gid: entry.gid,
            modified_at: instant(entry.modified_ns),
            target,
            target_base64,
        }
    }
}

impl PageView {
    pub(super) fn of(entries: Vec<Entry>, is_more: bool) -> Self {
        let next_cursor = entries.last().filter(|_| is_more).map(|entry| URL_SAFE_NO_PAD.encode(&entry.name));
        Self { items: entries.into_iter().map(EntryView::from).collect(), next_cursor }
    }
}

/// The name that a page ended with.
pub(super) fn decode_cursor(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok().filter(|name| (1..=sandbox_core::tree::NAME_BYTES_MAX).contains(&name.len()))
}

impl From<Change> for ChangeView {
    fn from(change: Change) -> Self {
        let (path, path_base64) = named(&change.path);
        let kind = match change.kind {
            ChangeKind::Added => "added",
            ChangeKind::Changed => "changed",
            ChangeKind::Deleted => "deleted",
        };
        Self { path, path_base64, kind }
    }
}

impl From<Process> for ProcessView {
    fn from(process: Process) -> Self {
        Self {
            pid: process.pid,
            parent_pid: process.parent,
            uid: process.uid,
            state: char::from(process.state).to_string(),
            threads: process.threads,
            cpu_ms: process.cpu_ms,
            memory_bytes: process.resident_bytes,
            command: process.command.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect(),
        }
    }
}

/// Whatever a file says its time is, within the years that four digits write.
fn instant(modified_ns: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(modified_ns)).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// As RFC 9110, section 5.6.7, writes it.
pub(super) fn http_date(modified_ns: i64) -> Option<String> {
    const FORMAT: &[BorrowedFormatItem<'_>] =
        format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
    instant(modified_ns).format(FORMAT).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_text_come_as_bytes_too() {
        assert_eq!(named("grün".as_bytes()), ("grün".to_owned(), None));
        assert_eq!(named(b"a\xff"), ("a\u{fffd}".to_owned(), Some("Yf8=".to_owned())));
    }

    #[test]
    fn a_time_is_written_as_http_has_it() {
        assert_eq!(http_date(784_111_777 * 1_000_000_000).as_deref(), Some("Sun, 06 Nov 1994 08:49:37 GMT"));
        assert!(http_date(i64::MIN).is_some() && http_date(i64::MAX).is_some());
    }

    #[test]
    fn a_cursor_is_a_name() {
        assert_eq!(decode_cursor(&URL_SAFE_NO_PAD.encode(b"b\xff")).as_deref(), Some(&b"b\xff"[..]));
        assert_eq!(decode_cursor(""), None);
        assert_eq!(decode_cursor("!"), None);
    }
}
