//! Holding a stream of bytes against what was expected, in as much memory as that takes, however much comes.

use super::Comparison;

/// Takes in what was written, piece by piece.
#[derive(Debug)]
pub struct Comparer {
    comparison: Comparison,
    /// As it is compared: without what does not count.
    expected: Vec<u8>,
    /// So far both are the same.
    at: usize,
    differs: bool,
    /// What came since `at` and counts only if something else follows it: ends of lines, and then white space in the last of them.
    line_ends: usize,
    blanks: usize,
    /// Whether those blanks are what is expected there.
    do_blanks_match: bool,
}

impl Comparer {
    pub fn new(comparison: Comparison, expected: &[u8]) -> Self {
        let expected = match comparison {
            Comparison::Exact => expected.to_vec(),
            Comparison::Trimmed => trimmed(expected),
        };
        Self { comparison, expected, at: 0, differs: false, line_ends: 0, blanks: 0, do_blanks_match: true }
    }

    pub fn push(&mut self, written: &[u8]) {
        match self.comparison {
            Comparison::Exact => {
                let end = self.at.saturating_add(written.len());
                self.differs |= self.expected.get(self.at..end) != Some(written);
                self.at = end;
            }
            Comparison::Trimmed => written.iter().for_each(|byte| self.push_byte(*byte)),
        }
    }

    /// Whether all that was written is what was expected.
    pub const fn is_equal(&self) -> bool {
        !self.differs && self.at == self.expected.len()
    }

    fn push_byte(&mut self, byte: u8) {
        if self.differs {
            return;
        }
        if byte == b'\n' {
            self.line_ends += 1;
            (self.blanks, self.do_blanks_match) = (0, true);
            return;
        }
        let at = self.at.saturating_add(self.line_ends).saturating_add(self.blanks);
        let is_expected = self.expected.get(at) == Some(&byte);
        if is_blank(byte) {
            self.do_blanks_match &= is_expected;
            self.blanks += 1;
            return;
        }
        let has_line_ends =
            self.expected.get(self.at..self.at.saturating_add(self.line_ends)).is_some_and(|ends| ends.iter().all(|end| *end == b'\n'));
        self.differs = !(is_expected && has_line_ends && self.do_blanks_match);
        (self.at, self.line_ends, self.blanks, self.do_blanks_match) = (at.saturating_add(1), 0, 0, true);
    }
}

/// White space within a line, as ASCII has it.
const fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | 0x0b | 0x0c)
}

/// Without white space at the ends of lines, and without empty lines at the end.
fn trimmed(text: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(text.len());
    for line in text.split(|byte| *byte == b'\n') {
        let len = line.iter().rposition(|byte| !is_blank(*byte)).map_or(0, |last| last + 1);
        kept.extend_from_slice(&line[..len]);
        kept.push(b'\n');
    }
    let len = kept.iter().rposition(|byte| *byte != b'\n').map_or(0, |last| last + 1);
    kept.truncate(len);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_equal(comparison: Comparison, expected: &str, written: &[&str]) -> bool {
        let mut comparer = Comparer::new(comparison, expected.as_bytes());
        written.iter().for_each(|piece| comparer.push(piece.as_bytes()));
        comparer.is_equal()
    }

    #[test]
    fn exact_is_byte_by_byte_however_it_comes() {
        let exact = |expected, written| is_equal(Comparison::Exact, expected, written);
        assert!(exact("one\ntwo\n", &["on", "e\ntw", "", "o\n"]));
        assert!(exact("", &[]));
        assert!(!exact("one\n", &["one"]));
        assert!(!exact("one", &["one\n"]));
        assert!(!exact("one", &["on", "x"]));
    }

    #[test]
    fn trimmed_counts_neither_the_ends_of_lines_nor_the_last_empty_ones() {
        let trimmed = |expected, written| is_equal(Comparison::Trimmed, expected, written);
        assert!(trimmed("one\ntwo", &["one  \t", "\r\ntwo\n", "\n \n"]));
        assert!(trimmed("one \ntwo\n\n\n", &["one\ntwo"]));
        assert!(trimmed("a  b\n\n\nc\n", &["a ", " b\n", "\n", " \nc"]));
        assert!(trimmed(" \n\n", &[""]));
        assert!(trimmed("", &["\n\t\n"]));
    }

    #[test]
    fn trimmed_counts_all_the_rest() {
        let trimmed = |expected, written| is_equal(Comparison::Trimmed, expected, written);
        assert!(!trimmed("one", &[" one"]));
        assert!(!trimmed("a b", &["a  b"]));
        assert!(!trimmed("a b", &["a\tb"]));
        assert!(!trimmed("a  b", &["a b"]));
        assert!(!trimmed("a\n\nb", &["a\nb"]));
        assert!(!trimmed("a\nb", &["a\n\nb"]));
        assert!(!trimmed("a\nb", &["a b"]));
        assert!(!trimmed("a", &["a\nb"]));
        assert!(!trimmed("a\nb", &["a"]));
    }
}
