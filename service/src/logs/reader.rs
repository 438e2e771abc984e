//! One reader of one log file, at its own pace.

use std::{fs::File, io, os::unix::fs::FileExt as _, sync::Arc};

use sandbox_core::log::{self, Kind, Record};

use super::{CHUNK_BYTES, Subscription};
use crate::sandbox::LogTail;

/// Something to show to whoever reads a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogItem {
    Chunk {
        /// Stdout or stderr.
        kind: Kind,
        seq: u64,
        at_us: u64,
        data: Vec<u8>,
    },
    /// These records cannot be had any more.
    Gap { from: u64, to: u64 },
}

/// Turns records into items, from a sequence number on, and shows where some are missing.
#[derive(Debug)]
struct Sequence {
    next: u64,
}

/// Reads a log from the beginning of its file to its end mark.
#[derive(Debug)]
pub struct LogReader {
    file: Arc<File>,
    offset: u64,
    /// Read, not parsed yet: less than one record.
    rest: Vec<u8>,
    sequence: Sequence,
    subscription: Option<Subscription>,
    has_ended: bool,
}

impl LogReader {
    pub(super) fn new(file: File, subscription: Option<Subscription>, from: u64) -> Self {
        let sequence = Sequence { next: from };
        Self { file: Arc::new(file), offset: 0, rest: Vec::new(), sequence, subscription, has_ended: false }
    }

    /// What has come since the last call, some of it at least; empty if nothing has. May be given up and called again.
    pub async fn read(&mut self) -> io::Result<Vec<LogItem>> {
        let mut items = Vec::new();
        while items.is_empty() && !self.has_ended {
            let (file, offset) = (Arc::clone(&self.file), self.offset);
            let read = tokio::task::spawn_blocking(move || {
                let mut chunk = vec![0; CHUNK_BYTES];
                file.read_at(&mut chunk, offset).map(|len| {
                    chunk.truncate(len);
                    chunk
                })
            });
            let chunk = read.await.map_err(io::Error::other)??;
            if chunk.is_empty() {
                break;
            }
            self.offset += chunk.len() as u64;
            self.rest.extend_from_slice(&chunk);
            self.parse(&mut items)?;
        }
        Ok(items)
    }

    /// Whether the end mark was read: nothing follows.
    pub const fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Returns when there may be more to read.
    pub async fn changed(&mut self) {
        match &mut self.subscription {
            Some(subscription) => subscription.changed().await,
            None => std::future::pending().await,
        }
    }

    /// The sequence number that would come next.
    pub const fn next_seq(&self) -> u64 {
        self.sequence.next
    }

    fn parse(&mut self, items: &mut Vec<LogItem>) -> io::Result<()> {
        let mut rest = self.rest.as_slice();
        while let Some((record, behind)) = log::parse(rest).map_err(io::Error::other)? {
            self.has_ended |= record.kind == Kind::End;
            self.sequence.take(record, items);
            rest = behind;
        }
        let parsed = self.rest.len() - rest.len();
        self.rest.drain(..parsed);
        Ok(())
    }
}

impl LogItem {
    /// What is left of a log, from this sequence number on.
    pub fn of_tail(tail: &LogTail, from: u64) -> Vec<Self> {
        let mut sequence = Sequence { next: from };
        let mut items = Vec::new();
        for record in tail.records() {
            sequence.take(record, &mut items);
        }
        items
    }
}

impl Sequence {
    fn take(&mut self, record: Record<'_>, items: &mut Vec<LogItem>) {
        if record.seq < self.next || record.kind == Kind::End {
            return;
        }
        if record.seq > self.next {
            items.push(LogItem::Gap { from: self.next, to: record.seq - 1 });
        }
        self.next = record.seq + 1;
        items.push(LogItem::Chunk { kind: record.kind, seq: record.seq, at_us: record.at_us, data: record.data.to_vec() });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        logs::{Logs, tests::append},
        sandbox::SandboxId,
    };

    const ID: SandboxId = SandboxId(uuid::Uuid::nil());

    fn seqs(items: &[LogItem]) -> Vec<u64> {
        let seq = |item: &LogItem| match item {
            LogItem::Chunk { seq, .. } => Some(*seq),
            LogItem::Gap { .. } => None,
        };
        items.iter().filter_map(seq).collect()
    }

    #[tokio::test]
    async fn a_late_reader_gets_everything_from_where_it_asks() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path()).unwrap();
        append(folder.path(), ID, &[(Kind::Stdout, 0, b"a"), (Kind::Stderr, 1, b"b"), (Kind::Stdout, 2, b"c"), (Kind::End, 3, b"")]);
        let mut all = logs.open(ID, 0).unwrap().unwrap();
        let mut later = logs.open(ID, 2).unwrap().unwrap();
        assert_eq!(seqs(&all.read().await.unwrap()), [0, 1, 2]);
        assert_eq!(seqs(&later.read().await.unwrap()), [2]);
        assert!(all.has_ended() && later.has_ended());
    }

    #[tokio::test]
    async fn what_is_appended_wakes_every_reader() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path()).unwrap();
        append(folder.path(), ID, &[(Kind::Stdout, 0, b"a")]);
        let mut first = logs.open(ID, 0).unwrap().unwrap();
        let mut second = logs.open(ID, 0).unwrap().unwrap();
        first.read().await.unwrap();
        second.read().await.unwrap();

        append(folder.path(), ID, &[(Kind::Stdout, 1, b"b")]);
        let both = async { tokio::join!(first.changed(), second.changed()) };
        tokio::time::timeout(Duration::from_secs(5), both).await.unwrap();
        assert_eq!(seqs(&first.read().await.unwrap()), [1]);
        assert_eq!(seqs(&second.read().await.unwrap()), [1]);
    }

    #[tokio::test]
    async fn a_log_without_its_beginning_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path()).unwrap();
        append(folder.path(), ID, &[(Kind::Stdout, 3, b"a"), (Kind::Stdout, 9, b"b")]);
        let items = logs.open(ID, 0).unwrap().unwrap().read().await.unwrap();
        assert_eq!(items[0], LogItem::Gap { from: 0, to: 2 });
        assert_eq!(items[2], LogItem::Gap { from: 4, to: 8 });
    }

    #[tokio::test]
    async fn reading_goes_on_after_the_file_is_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path()).unwrap();
        append(folder.path(), ID, &[(Kind::Stdout, 0, b"a"), (Kind::End, 1, b"")]);
        let mut reader = logs.open(ID, 0).unwrap().unwrap();
        std::fs::remove_file(log::path(folder.path(), ID)).unwrap();
        assert_eq!(seqs(&reader.read().await.unwrap()), [0]);
        assert!(reader.has_ended());
    }
}
