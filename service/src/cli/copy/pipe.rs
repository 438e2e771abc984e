//! Bytes between what waits for the network and what waits for a disk.

use std::io::{self, Read, Write};

use indicatif::ProgressBar;
use tokio::sync::mpsc;

/// Pieces on their way.
const DEPTH: usize = 4;
const PIECE_BYTES: usize = 256 * 1024;

pub(super) type Piece = io::Result<Vec<u8>>;

/// Where a thread writes; each piece is counted when it goes.
pub(super) struct PipeWriter {
    to: mpsc::Sender<Piece>,
    piece: Vec<u8>,
    bar: ProgressBar,
}

/// Where a thread reads; each piece is counted when it comes.
pub(super) struct PipeReader {
    from: mpsc::Receiver<Piece>,
    piece: io::Cursor<Vec<u8>>,
    bar: ProgressBar,
}

pub(super) fn writer(bar: ProgressBar) -> (PipeWriter, mpsc::Receiver<Piece>) {
    let (to, from) = mpsc::channel(DEPTH);
    (PipeWriter { to, piece: Vec::new(), bar }, from)
}

pub(super) fn reader(bar: ProgressBar) -> (mpsc::Sender<Piece>, PipeReader) {
    let (to, from) = mpsc::channel(DEPTH);
    (to, PipeReader { from, piece: io::Cursor::new(Vec::new()), bar })
}

impl PipeWriter {
    /// Has the reader fail, so that it takes no part for the whole.
    pub(super) fn fail(self) {
        // One that is gone needs no telling.
        drop(self.to.blocking_send(Err(io::Error::other("what is sent cannot be read"))));
    }
}

impl Write for PipeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.piece);
        self.bar.inc(piece.len() as u64);
        self.to.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            let Some(piece) = self.from.blocking_recv() else { return Ok(0) };
            let piece = piece?;
            self.bar.inc(piece.len() as u64);
            self.piece = io::Cursor::new(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_failure_is_no_end() {
        let (to, mut reader) = reader(ProgressBar::hidden());
        to.blocking_send(Ok(b"ab".to_vec())).unwrap();
        to.blocking_send(Ok(Vec::new())).unwrap();
        to.blocking_send(Ok(b"c".to_vec())).unwrap();
        to.blocking_send(Err(io::Error::other("broken"))).unwrap();
        drop(to);
        let mut seen = Vec::new();
        assert_eq!(reader.read_to_end(&mut seen).unwrap_err().to_string(), "broken");
        assert_eq!(seen, b"abc");
    }

    #[test]
    fn what_is_small_goes_when_it_is_flushed() {
        let (mut writer, mut from) = writer(ProgressBar::hidden());
        writer.write_all(b"small").unwrap();
        assert!(from.try_recv().is_err());
        writer.flush().unwrap();
        assert_eq!(from.try_recv().unwrap().unwrap(), b"small");
        drop(from);
        writer.write_all(b"x").unwrap();
        assert_eq!(writer.flush().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
