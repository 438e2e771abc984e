//! The last lines of a log: which chunks a reader wants, and where in them its lines begin.

use std::collections::VecDeque;

use sandbox_core::log::{Kind, Record};

/// What of a log is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Nothing before this sequence number.
    pub from: u64,
    /// Nothing that was written before, in Unix microseconds.
    pub since_us: u64,
    /// Nothing but this stream.
    pub stream: Option<Kind>,
}

impl Wanted {
    /// Whether a chunk of this stream with this number and time is among it.
    pub fn holds(&self, stream: Kind, seq: u64, at_us: u64) -> bool {
        seq >= self.from && at_us >= self.since_us && self.stream.is_none_or(|wanted| wanted == stream)
    }
}

/// Where to begin: at this byte of the chunk with this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beginning {
    pub seq: u64,
    pub byte: usize,
}

/// Takes the records of a log one by one and remembers where the last lines begin. A line is of one stream; those of both count together,
/// and one without its newline counts.
#[derive(Debug)]
pub(super) struct LineFinder {
    lines: usize,
    wanted: Wanted,
    beginnings: VecDeque<Beginning>,
    next_seq: u64,
    /// Whether the last byte of stdout, of stderr, was within a line.
    is_within: [bool; 2],
}

impl LineFinder {
    pub(super) fn new(lines: usize, wanted: Wanted) -> Self {
        Self { lines, wanted, beginnings: VecDeque::new(), next_seq: wanted.from, is_within: [false; 2] }
    }

    pub(super) fn push(&mut self, record: Record<'_>) {
        let stream = match record.kind {
            Kind::Stdout => 0,
            Kind::Stderr => 1,
            Kind::End => return,
        };
        if !self.wanted.holds(record.kind, record.seq, record.at_us) {
            return;
        }
        self.next_seq = self.next_seq.max(record.seq + 1);
        for (at, byte) in record.data.iter().enumerate() {
            if !self.is_within[stream] {
                self.begin(Beginning { seq: record.seq, byte: at });
            }
            self.is_within[stream] = *byte != b'\n';
        }
    }

    fn begin(&mut self, beginning: Beginning) {
        self.beginnings.push_back(beginning);
        if self.beginnings.len() > self.lines {
            self.beginnings.pop_front();
        }
    }

    /// Where the first of the last lines begins; behind everything if none is wanted.
    pub(super) fn finish(self) -> Beginning {
        if self.lines == 0 {
            return Beginning { seq: self.next_seq, byte: 0 };
        }
        self.beginnings.front().copied().unwrap_or(Beginning { seq: self.wanted.from, byte: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(lines: usize, wanted: Wanted, records: &[(Kind, &str)]) -> (u64, usize) {
        let mut finder = LineFinder::new(lines, wanted);
        for (seq, (kind, data)) in (0..).zip(records) {
            finder.push(Record { kind: *kind, seq, at_us: seq * 10, data: data.as_bytes() });
        }
        let beginning = finder.finish();
        (beginning.seq, beginning.byte)
    }

    const OUT: Kind = Kind::Stdout;
    const ERR: Kind = Kind::Stderr;

    #[test]
    fn the_last_lines_begin_within_a_chunk() {
        let log = [(OUT, "a\nb\n"), (OUT, "c\nd"), (OUT, "d\n")];
        assert_eq!(found(1, Wanted::default(), &log), (1, 2));
        assert_eq!(found(2, Wanted::default(), &log), (1, 0));
        assert_eq!(found(3, Wanted::default(), &log), (0, 2));
        assert_eq!(found(99, Wanted::default(), &log), (0, 0));
    }

    #[test]
    fn no_lines_begin_behind_all_that_there_is() {
        assert_eq!(found(0, Wanted::default(), &[(OUT, "a\n"), (ERR, "b")]), (2, 0));
        assert_eq!(found(0, Wanted::default(), &[]), (0, 0));
    }

    #[test]
    fn a_line_of_one_stream_goes_on_behind_the_others() {
        let log = [(OUT, "first "), (ERR, "error\n"), (OUT, "half\n")];
        assert_eq!(found(1, Wanted::default(), &log), (1, 0));
        assert_eq!(found(2, Wanted::default(), &log), (0, 0));
    }

    #[test]
    fn only_lines_of_what_is_wanted_count() {
        let log = [(OUT, "a\n"), (ERR, "b\n"), (OUT, "c\n"), (ERR, "d\n")];
        assert_eq!(found(2, Wanted { stream: Some(OUT), ..Wanted::default() }, &log), (0, 0));
        assert_eq!(found(9, Wanted { since_us: 20, ..Wanted::default() }, &log), (2, 0));
        assert_eq!(found(9, Wanted { from: 3, ..Wanted::default() }, &log), (3, 0));
    }
}
