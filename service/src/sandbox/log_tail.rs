//! The end of what a payload wrote, small enough to be stored beside its outcome.

use sandbox_core::log::{self, DATA_BYTES_MAX, Kind, Record};

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
    /// In how many records at the most: one for each byte would take up 25 times as much.
    const RECORDS_MAX: usize = 8192;

    /// Whether it is the whole log.
    pub const fn is_complete(&self) -> bool {
        self.stdout_omitted_bytes == 0 && self.stderr_omitted_bytes == 0
    }

    /// Bytes of output in it.
    pub fn data_bytes(&self) -> u64 {
        self.records().map(|record| record.data.len() as u64).sum()
    }

    /// The records, oldest first. Ends at the first byte that is none.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let (record, behind) = first(rest)?;
            rest = behind;
            Some(record)
        })
    }
}

/// What becomes of the records of a log in its tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Records {
    /// They stay as they are: a reader goes on by their numbers. Of each stream there are no more than 8192, so that what a program wrote in pieces of less than eight bytes is cut earlier.
    Numbered,
    /// Those of each stream are made one, or few: nobody asks for them by their numbers.
    Joined,
}

/// Takes the records of a log one by one and keeps the last of each stream, at least `stream_bytes` where the log has them, or as many records as may be.
#[derive(Debug)]
pub struct TailCollector {
    stream_bytes: usize,
    records: Records,
    stdout: Stream,
    stderr: Stream,
}

/// One buffer for all records: a payload that writes byte by byte would else cost an allocation a byte.
#[derive(Debug, Default)]
struct Stream {
    /// Whole records with their headers; those before `begin` are dropped.
    bytes: Vec<u8>,
    begin: usize,
    /// Data of the records from `begin` on, without headers.
    data_bytes: usize,
    /// How many there are from `begin` on.
    count: usize,
    omitted_bytes: u64,
}

impl TailCollector {
    pub fn new(stream_bytes: usize, records: Records) -> Self {
        Self { stream_bytes, records, stdout: Stream::default(), stderr: Stream::default() }
    }

    pub fn push(&mut self, record: Record<'_>) {
        let records_max = match self.records {
            Records::Numbered => LogTail::RECORDS_MAX,
            Records::Joined => usize::MAX,
        };
        match record.kind {
            Kind::Stdout => self.stdout.push(record, self.stream_bytes, records_max),
            Kind::Stderr => self.stderr.push(record, self.stream_bytes, records_max),
            Kind::End => {}
        }
    }

    pub fn finish(self) -> LogTail {
        let (stdout, stderr) = (self.stdout.bytes(), self.stderr.bytes());
        LogTail {
            bytes: match self.records {
                Records::Numbered => merged(stdout, stderr),
                Records::Joined => merged(&joined(stdout), &joined(stderr)),
            },
            stdout_omitted_bytes: self.stdout.omitted_bytes,
            stderr_omitted_bytes: self.stderr.omitted_bytes,
        }
    }
}

impl Stream {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.begin..]
    }

    fn push(&mut self, record: Record<'_>, stream_bytes: usize, records_max: usize) {
        record.append_to(&mut self.bytes);
        self.data_bytes += record.data.len();
        self.count += 1;
        while let Some((oldest, behind)) = first(self.bytes())
            && (self.data_bytes - oldest.data.len() >= stream_bytes || self.count > records_max)
            && !behind.is_empty()
        {
            let (dropped, left) = (oldest.data.len(), behind.len());
            self.data_bytes -= dropped;
            self.count -= 1;
            self.omitted_bytes += dropped as u64;
            self.begin = self.bytes.len() - left;
        }
        // Moved together when as much is dropped as is kept, so that a byte is moved about once.
        if self.begin > self.bytes.len() / 2 {
            self.bytes.drain(..self.begin);
            self.begin = 0;
        }
    }
}

/// The records of both, by their sequence numbers.
fn merged(mut left: &[u8], mut right: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(left.len() + right.len());
    while let Some((record, behind)) = first(left) {
        while let Some((earlier, rest)) = first(right)
            && earlier.seq < record.seq
        {
            earlier.append_to(&mut bytes);
            right = rest;
        }
        record.append_to(&mut bytes);
        left = behind;
    }
    bytes.extend_from_slice(right);
    bytes
}

/// The records of one stream in as few as there can be, each with number and time of the first that went into it.
fn joined(mut rest: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some((Record { kind, seq, at_us, data }, mut behind)) = first(rest) {
        let mut all = data.to_vec();
        while let Some((next, further)) = first(behind)
            && all.len() + next.data.len() <= DATA_BYTES_MAX
        {
            all.extend_from_slice(next.data);
            behind = further;
        }
        Record { kind, seq, at_us, data: &all }.append_to(&mut bytes);
        rest = behind;
    }
    bytes
}

fn first(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    log::parse(bytes).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail_of(stream_bytes: usize, records: &[(Kind, &[u8])]) -> LogTail {
        collected(stream_bytes, Records::Numbered, records)
    }

    fn collected(stream_bytes: usize, kept: Records, records: &[(Kind, &[u8])]) -> LogTail {
        let mut collector = TailCollector::new(stream_bytes, kept);
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
    fn many_small_records_are_kept_in_order_and_the_rest_is_counted() {
        let records: Vec<(Kind, &[u8])> = std::iter::repeat_n((Kind::Stdout, b"x".as_slice()), 10_000).collect();
        let tail = tail_of(100, &records);
        assert_eq!(tail.records().map(|r| r.seq).collect::<Vec<_>>(), (9_900..10_000).collect::<Vec<_>>());
        assert_eq!(tail.stdout_omitted_bytes, 9_900);
    }

    #[test]
    fn a_single_record_larger_than_the_tail_is_kept() {
        let tail = tail_of(2, &[(Kind::Stdout, b"abcdef")]);
        assert!(tail.is_complete());
    }

    #[test]
    fn a_tail_of_the_smallest_records_is_no_multiple_of_what_they_hold() {
        let records: Vec<(Kind, &[u8])> = std::iter::repeat_n((Kind::Stderr, b"x".as_slice()), 100_000).collect();

        let tail = tail_of(LogTail::STORED_BYTES, &records);
        assert_eq!((tail.records().count(), tail.stderr_omitted_bytes), (8192, 100_000 - 8192));
        assert!(tail.bytes.len() <= 4 * LogTail::STORED_BYTES, "{}", tail.bytes.len());

        let joined = collected(LogTail::STORED_BYTES, Records::Joined, &records);
        assert_eq!((joined.records().count(), joined.data_bytes()), (1, LogTail::STORED_BYTES as u64));
    }

    #[test]
    fn joined_records_of_two_streams_stay_apart() {
        let tail =
            collected(100, Records::Joined, &[(Kind::Stdout, b"a"), (Kind::Stderr, b"x"), (Kind::Stdout, b"b"), (Kind::Stderr, b"y")]);
        let read: Vec<_> = tail.records().map(|r| (r.kind, r.seq, r.data.to_vec())).collect();
        assert_eq!(read, [(Kind::Stdout, 0, b"ab".to_vec()), (Kind::Stderr, 1, b"xy".to_vec())]);
        assert!(tail.is_complete());
    }
}
