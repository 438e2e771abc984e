//! The end of what a payload wrote, small enough to be stored beside its outcome.

use std::collections::VecDeque;

use sandbox_core::log::{self, Kind, Record};

/// The last records of each stream, in the format of [`sandbox_core::log`], in order, without the end mark.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTail {
    pub bytes: Vec<u8>,
    /// Bytes written to the stream, and kept in its log, that stand before this tail.
    pub stdout_omitted_bytes: u64,
    pub stderr_omitted_bytes: u64,
}

impl LogTail {
    /// How much of each stream is stored beside the outcome.
    pub const STORED_BYTES: usize = 64 * 1024;

    /// Whether it is the whole log.
    pub const fn is_complete(&self) -> bool {
        self.stdout_omitted_bytes == 0 && self.stderr_omitted_bytes == 0
    }

    /// The records, oldest first. Ends at the first byte that is none.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let (record, behind) = log::parse(rest).ok()??;
            rest = behind;
            Some(record)
        })
    }
}

/// Takes the records of a log one by one and keeps the last of each stream, at least `stream_bytes` where the log has them.
#[derive(Debug)]
pub struct TailCollector {
    stream_bytes: usize,
    stdout: Stream,
    stderr: Stream,
}

#[derive(Debug, Default)]
struct Stream {
    /// Whole records with their headers, and the length of their data.
    kept: VecDeque<(u64, Vec<u8>, usize)>,
    kept_bytes: usize,
    omitted_bytes: u64,
}

impl TailCollector {
    pub fn new(stream_bytes: usize) -> Self {
        Self { stream_bytes, stdout: Stream::default(), stderr: Stream::default() }
    }

    pub fn push(&mut self, record: Record<'_>) {
        let stream = match record.kind {
            Kind::Stdout => &mut self.stdout,
            Kind::Stderr => &mut self.stderr,
            Kind::End => return,
        };
        let mut bytes = Vec::with_capacity(log::HEADER_BYTES + record.data.len());
        record.append_to(&mut bytes);
        stream.kept.push_back((record.seq, bytes, record.data.len()));
        stream.kept_bytes += record.data.len();
        while let Some((_, _, oldest)) = stream.kept.front()
            && stream.kept_bytes - oldest >= self.stream_bytes
            && stream.kept.len() > 1
        {
            stream.kept_bytes -= oldest;
            stream.omitted_bytes += *oldest as u64;
            stream.kept.pop_front();
        }
    }

    pub fn finish(mut self) -> LogTail {
        let mut kept: Vec<_> = self.stdout.kept.drain(..).chain(self.stderr.kept.drain(..)).collect();
        kept.sort_unstable_by_key(|(seq, _, _)| *seq);
        LogTail {
            bytes: kept.into_iter().flat_map(|(_, bytes, _)| bytes).collect(),
            stdout_omitted_bytes: self.stdout.omitted_bytes,
            stderr_omitted_bytes: self.stderr.omitted_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail_of(stream_bytes: usize, records: &[(Kind, &[u8])]) -> LogTail {
        let mut collector = TailCollector::new(stream_bytes);
        for (seq, (kind, data)) in (0_u64..).zip(records) {
            collector.push(Record { kind: *kind, seq, at_us: 1, data });
        }
        collector.finish()
    }

    #[test]
    fn a_short_log_is_kept_whole_and_in_order() {
        let tail = tail_of(4, &[(Kind::Stdout, b"ab"), (Kind::Stderr, b"e"), (Kind::Stdout, b"cd"), (Kind::End, b"")]);
        assert!(tail.is_complete());
        let read: Vec<_> = tail.records().map(|r| (r.seq, r.data.to_vec())).collect();
        assert_eq!(read, [(0, b"ab".to_vec()), (1, b"e".to_vec()), (2, b"cd".to_vec())]);
    }

    #[test]
    fn the_head_of_a_long_stream_is_counted_and_the_other_stream_is_untouched() {
        let tail = tail_of(4, &[(Kind::Stderr, b"first"), (Kind::Stdout, b"abc"), (Kind::Stdout, b"def"), (Kind::Stdout, b"ghi")]);
        assert_eq!((tail.stdout_omitted_bytes, tail.stderr_omitted_bytes), (3, 0));
        assert_eq!(tail.records().map(|r| r.seq).collect::<Vec<_>>(), [0, 2, 3]);
    }

    #[test]
    fn a_single_record_larger_than_the_tail_is_kept() {
        let tail = tail_of(2, &[(Kind::Stdout, b"abcdef")]);
        assert!(tail.is_complete());
    }
}
