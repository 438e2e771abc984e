//! The log files of sandboxes, as the keeper writes them: reading, and hearing of more.

mod lines;
mod reader;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use lines::LineFinder;
pub use lines::{Beginning, Wanted};
pub use reader::{LogItem, LogReader};
use sandbox_core::log;
use tokio::sync::watch;

use crate::sandbox::{LogTail, Records, SandboxId, TailCollector};

/// What is read of a file at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// A file of this size is read where the question is asked; reading more is left to a thread that may block.
const SMALL_FILE_BYTES: u64 = 256 * 1024;

/// The node's folder of logs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Logs {
    folder: Arc<PathBuf>,
    watched: Arc<Watched>,
}

/// One inotify instance for all readers: the kernel grants a user only 128 of them (inotify(7)).
#[derive(Debug)]
struct Watched {
    watches: Mutex<Watches>,
    files: Mutex<HashMap<WatchDescriptor, WatchedFile>>,
}

#[derive(Debug)]
struct WatchedFile {
    changed: watch::Sender<()>,
    readers: usize,
}

/// Hears of what is appended to one file, until it is dropped.
#[derive(Debug)]
pub struct Subscription {
    changed: watch::Receiver<()>,
    file: WatchDescriptor,
    watched: Arc<Watched>,
}

impl Logs {
    /// Watches over the logs in `folder`. Must be called inside the runtime.
    pub fn new(folder: &Path) -> anyhow::Result<Self> {
        let inotify = Inotify::init().context("asking for an inotify instance failed")?;
        let watched = Arc::new(Watched { watches: Mutex::new(inotify.watches()), files: Mutex::default() });
        let events = inotify.into_event_stream(vec![0; 64 * 1024])?;
        tokio::spawn(tell_readers(events, Arc::clone(&watched)));
        Ok(Self { folder: Arc::new(folder.to_owned()), watched })
    }

    /// The sandboxes that have a log here.
    pub fn list(&self) -> io::Result<Vec<SandboxId>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&*self.folder)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".log")?.parse().ok());
            found.extend(id.map(SandboxId));
        }
        Ok(found)
    }

    /// The last `stream_bytes` of each stream, as a [`TailCollector`] has them. A sandbox without a log has written nothing.
    pub async fn tail(&self, id: SandboxId, stream_bytes: usize, records: Records) -> io::Result<LogTail> {
        let file = match File::open(self.path(id)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LogTail::default()),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() <= SMALL_FILE_BYTES {
            return tail(file, stream_bytes, records);
        }
        tokio::task::spawn_blocking(move || tail(file, stream_bytes, records)).await.map_err(io::Error::other)?
    }

    /// Has every record taken in that the log has now. A sandbox without a log has written nothing.
    pub async fn read_into<T: Send + 'static>(&self, id: SandboxId, mut into: T, take: fn(&mut T, log::Record<'_>)) -> io::Result<T> {
        let file = match File::open(self.path(id)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(into),
            Err(error) => return Err(error),
        };
        let read = move || each_record(file, |record| take(&mut into, record)).map(|()| into);
        tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
    }

    /// Where the last lines of what is wanted begin, as the log is now; `None` if there is no file.
    pub async fn last_lines(&self, id: SandboxId, lines: usize, wanted: Wanted) -> io::Result<Option<Beginning>> {
        let file = match File::open(self.path(id)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let find = move || {
            let mut finder = LineFinder::new(lines, wanted);
            each_record(file, |record| finder.push(record))?;
            Ok(Some(finder.finish()))
        };
        tokio::task::spawn_blocking(find).await.map_err(io::Error::other)?
    }

    /// Reads the log from sequence number `from` on; `None` if there is no file.
    pub fn open(&self, id: SandboxId, from: u64) -> io::Result<Option<LogReader>> {
        let path = self.path(id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Heard of by path: should the file have been deleted in between, nothing more comes, and its end is in the records.
        let subscription = match self.subscribe(&path) {
            Ok(subscription) => Some(subscription),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Some(LogReader::new(file, subscription, from)))
    }

    fn subscribe(&self, path: &Path) -> io::Result<Subscription> {
        let mut files = self.watched.files.lock().unwrap_or_else(PoisonError::into_inner);
        // The same file gets the same descriptor, however often it is added.
        let file = self.watched.watches.lock().unwrap_or_else(PoisonError::into_inner).add(path, WatchMask::MODIFY)?;
        let entry = files.entry(file.clone()).or_insert_with(|| WatchedFile { changed: watch::channel(()).0, readers: 0 });
        entry.readers += 1;
        Ok(Subscription { changed: entry.changed.subscribe(), file, watched: Arc::clone(&self.watched) })
    }

    fn path(&self, id: SandboxId) -> PathBuf {
        log::path(&self.folder, id)
    }
}

impl Subscription {
    /// Returns when something may have been appended since the last return.
    async fn changed(&mut self) {
        if self.changed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut files = self.watched.files.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = files.get_mut(&self.file) else { return };
        entry.readers -= 1;
        if entry.readers == 0 {
            files.remove(&self.file);
            // A deleted file took its watch with it; then there is nothing to remove.
            drop(self.watched.watches.lock().unwrap_or_else(PoisonError::into_inner).remove(self.file.clone()));
        }
    }
}

async fn tell_readers(mut events: inotify::EventStream<Vec<u8>>, watched: Arc<Watched>) {
    while let Some(event) = events.next().await {
        let files = watched.files.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Ok(event) if !event.mask.contains(EventMask::Q_OVERFLOW) => {
                if let Some(file) = files.get(&event.wd) {
                    file.changed.send_replace(());
                }
            }
            // Something was missed, and nobody knows of which file.
            Ok(_) | Err(_) => files.values().for_each(|file| file.changed.send_replace(())),
        }
    }
}

/// [`Logs::last_lines`] of what is left of a log.
pub fn last_lines_of(tail: &LogTail, lines: usize, wanted: Wanted) -> Beginning {
    let mut finder = LineFinder::new(lines, wanted);
    tail.records().for_each(|record| finder.push(record));
    finder.finish()
}

fn tail(file: File, stream_bytes: usize, records: Records) -> io::Result<LogTail> {
    let mut collector = TailCollector::new(stream_bytes, records);
    each_record(file, |record| collector.push(record))?;
    Ok(collector.finish())
}

/// Reads a file to its end, as it is now.
fn each_record(mut file: File, mut take: impl FnMut(log::Record<'_>)) -> io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        let read = file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut bytes)?;
        let mut rest = bytes.as_slice();
        while let Some((record, behind)) = log::parse(rest).map_err(io::Error::other)? {
            take(record);
            rest = behind;
        }
        let parsed = bytes.len() - rest.len();
        bytes.drain(..parsed);
        if read == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write as _;

    use sandbox_core::log::{Kind, Record};

    use super::*;

    pub(crate) fn append(folder: &Path, id: SandboxId, records: &[(Kind, u64, &[u8])]) {
        let mut bytes = Vec::new();
        for (kind, seq, data) in records {
            Record { kind: *kind, seq: *seq, at_us: 1, data }.append_to(&mut bytes);
        }
        let mut file = File::options().create(true).append(true).open(log::path(folder, id)).unwrap();
        file.write_all(&bytes).unwrap();
    }

    #[tokio::test]
    async fn a_sandbox_without_a_log_wrote_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path()).unwrap();
        let id = SandboxId(uuid::Uuid::nil());
        assert_eq!(logs.tail(id, 10, Records::Numbered).await.unwrap(), LogTail::default());
        assert!(logs.open(id, 0).unwrap().is_none());
    }

    #[tokio::test]
    async fn the_tail_of_a_long_log_is_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path()).unwrap();
        let id = SandboxId(uuid::Uuid::nil());
        let data = vec![b'x'; 60_000];
        for seq in 0..20 {
            append(folder.path(), id, &[(Kind::Stdout, seq, &data)]);
        }
        let tail = logs.tail(id, 60_000, Records::Numbered).await.unwrap();
        assert_eq!(tail.records().map(|record| record.seq).collect::<Vec<_>>(), [19]);
        assert_eq!(tail.stdout_omitted_bytes, 19 * 60_000);
    }
}
