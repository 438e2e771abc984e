//! What a payload wrote, as far as one answer tells it.

use std::collections::VecDeque;

use sandbox_core::log::{Kind, Record};

use super::{Engine, EngineError};
use crate::sandbox::{LogTail, SandboxId, TenantId};

/// The most of each stream that goes into one answer.
const ANSWER_STREAM_BYTES: usize = 8 * 1024 * 1024;

/// How much of what one wrote an answer tells, in bytes of each stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// Of its program's output, the last.
    pub output: usize,
    /// Of what all of its cases together wrote.
    pub cases: usize,
}

impl Shown {
    /// Where one is told of alone.
    pub const ALONE: Self = Self { output: ANSWER_STREAM_BYTES, cases: ANSWER_STREAM_BYTES };

    /// Where so many are told of by one answer: all together no more than one alone, and of the output of each no more than is stored beside its outcome. No whole log is
    /// read for a share of it.
    pub fn among(runs: usize) -> Self {
        if runs <= 1 {
            return Self::ALONE;
        }
        let share = ANSWER_STREAM_BYTES / runs;
        Self { output: share.min(LogTail::STORED_BYTES), cases: share }
    }

    /// No more bytes of output than so many are told of one with this tail.
    pub fn bytes_of(self, tail: &LogTail) -> u64 {
        let logged = tail.bytes.len() as u64 + tail.stdout_omitted_bytes + tail.stderr_omitted_bytes;
        logged.min(2 * self.output as u64)
    }
}

/// What a payload wrote, as far as one answer holds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Bytes of the kept output that stand before these.
    pub stdout_omitted_bytes: u64,
    pub stderr_omitted_bytes: u64,
}

/// Takes the records of a log one by one and keeps the last bytes of each stream, without what stands around them.
#[derive(Debug)]
struct Collector {
    stream_bytes: usize,
    stdout: Stream,
    stderr: Stream,
}

#[derive(Debug, Default)]
struct Stream {
    bytes: VecDeque<u8>,
    omitted_bytes: u64,
}

impl Engine {
    /// What the payload of an ended sandbox wrote, as far as it is shown.
    pub async fn output(&self, id: SandboxId, shown: Shown) -> Result<Output, EngineError> {
        let Some(stored) = self.store.find_log(id).await? else { return Ok(Output::default()) };
        Ok(self.output_of(id, &stored.tail, shown).await)
    }

    /// What an ended exec wrote.
    pub async fn exec_output(&self, id: SandboxId) -> Result<Output, EngineError> {
        let Some(stored) = self.store.find_exec_log(id).await? else { return Ok(Output::default()) };
        Ok(self.output_of(id, &stored.tail, Shown::ALONE).await)
    }

    /// [`Engine::output`] of one whose tail is at hand.
    pub async fn output_of(&self, id: SandboxId, tail: &LogTail, shown: Shown) -> Output {
        if tail.is_complete() || shown.output <= LogTail::STORED_BYTES {
            return Output::of(tail).last(shown.output);
        }
        match self.logs.read_into(id, Collector::new(shown.output), Collector::push).await.map(Collector::finish) {
            Ok(longer) if longer.bytes() > tail.data_bytes() => longer,
            Ok(_) => Output::of(tail),
            Err(error) => {
                tracing::warn!(sandbox.id = %id, %error, "reading a log failed");
                Output::of(tail)
            }
        }
    }

    /// No more bytes than so many are told of these of the tenant's, as far as each is shown: output, what a compile step and cases wrote, and what stands around those.
    pub async fn told_bytes(&self, tenant: &TenantId, ids: &[SandboxId], shown: Shown) -> Result<u64, EngineError> {
        Ok(self.store.told_bytes(tenant, ids, shown.output, shown.cases).await?)
    }

    /// The same of an exec.
    pub async fn exec_told_bytes(&self, id: SandboxId) -> Result<u64, EngineError> {
        Ok(self.store.exec_told_bytes(id, Shown::ALONE.output).await?)
    }
}

impl Output {
    /// What stands in this.
    pub fn of(tail: &LogTail) -> Self {
        let mut output =
            Self { stdout_omitted_bytes: tail.stdout_omitted_bytes, stderr_omitted_bytes: tail.stderr_omitted_bytes, ..Self::default() };
        for record in tail.records() {
            match record.kind {
                Kind::Stdout => output.stdout.extend_from_slice(record.data),
                Kind::Stderr => output.stderr.extend_from_slice(record.data),
                Kind::End => {}
            }
        }
        output
    }

    /// The same with at most so many bytes of each stream, the last. No character is cut in two.
    #[must_use]
    pub fn last(mut self, bytes: usize) -> Self {
        for (stream, omitted) in [(&mut self.stdout, &mut self.stdout_omitted_bytes), (&mut self.stderr, &mut self.stderr_omitted_bytes)] {
            let cut = stream.len().saturating_sub(bytes);
            if cut > 0 {
                *omitted += cut as u64;
                stream.drain(..cut);
                begin_with_a_character(stream, omitted);
            }
        }
        self
    }

    const fn bytes(&self) -> u64 {
        self.stdout.len() as u64 + self.stderr.len() as u64
    }
}

/// Of bytes that others stood before.
fn begin_with_a_character(stream: &mut Vec<u8>, omitted_bytes: &mut u64) {
    // UTF-8 has at most three bytes behind the first of a character.
    let cut = stream.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count();
    stream.drain(..cut);
    *omitted_bytes += cut as u64;
}

impl Collector {
    fn new(stream_bytes: usize) -> Self {
        Self { stream_bytes, stdout: Stream::default(), stderr: Stream::default() }
    }

    fn push(&mut self, record: Record<'_>) {
        match record.kind {
            Kind::Stdout => self.stdout.push(record.data, self.stream_bytes),
            Kind::Stderr => self.stderr.push(record.data, self.stream_bytes),
            Kind::End => {}
        }
    }

    fn finish(self) -> Output {
        let (stdout, stdout_omitted_bytes) = self.stdout.finish();
        let (stderr, stderr_omitted_bytes) = self.stderr.finish();
        Output { stdout, stderr, stdout_omitted_bytes, stderr_omitted_bytes }
    }
}

impl Stream {
    fn push(&mut self, data: &[u8], most: usize) {
        let (early, last) = data.split_at(data.len().saturating_sub(most));
        let late = (self.bytes.len() + last.len()).saturating_sub(most);
        self.bytes.drain(..late);
        self.omitted_bytes += early.len() as u64 + late as u64;
        let (len, room) = (self.bytes.len() + last.len(), self.bytes.capacity());
        if len > room {
            // Twice as much, as any list would have, but never more than is ever needed: a ring comes to use all of its room.
            self.bytes.reserve_exact((room * 2).clamp(len, most) - self.bytes.len());
        }
        self.bytes.extend(last);
    }

    fn finish(self) -> (Vec<u8>, u64) {
        let (mut bytes, mut omitted_bytes) = (Vec::from(self.bytes), self.omitted_bytes);
        if omitted_bytes > 0 {
            begin_with_a_character(&mut bytes, &mut omitted_bytes);
        }
        (bytes, omitted_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_an_output_begins_with_a_whole_character() {
        let output = Output { stdout: "aüb".into(), stderr: b"xyz".to_vec(), stdout_omitted_bytes: 7, stderr_omitted_bytes: 0 };

        let last = output.last(2);

        assert_eq!((last.stdout, last.stdout_omitted_bytes), (b"b".to_vec(), 10));
        assert_eq!((last.stderr, last.stderr_omitted_bytes), (b"yz".to_vec(), 1));
    }

    fn collected(stream_bytes: usize, records: &[(Kind, &str)]) -> Output {
        let mut collector = Collector::new(stream_bytes);
        for (seq, (kind, data)) in (0_u64..).zip(records) {
            collector.push(Record { kind: *kind, seq, at_us: 1, data: data.as_bytes() });
        }
        collector.finish()
    }

    #[test]
    fn of_a_long_log_the_last_bytes_of_each_stream_are_collected() {
        let all = collected(4, &[(Kind::Stderr, "err"), (Kind::Stdout, "ab"), (Kind::Stdout, "cd"), (Kind::Stdout, "e"), (Kind::End, "x")]);
        assert_eq!((all.stdout, all.stdout_omitted_bytes), (b"bcde".to_vec(), 1));
        assert_eq!((all.stderr, all.stderr_omitted_bytes), (b"err".to_vec(), 0));

        let large = collected(4, &[(Kind::Stdout, "ab"), (Kind::Stdout, "cdefgh")]);
        assert_eq!((large.stdout, large.stdout_omitted_bytes), (b"efgh".to_vec(), 4));
    }

    #[test]
    fn what_is_collected_begins_with_a_whole_character() {
        let cut = collected(2, &[(Kind::Stdout, "ü"), (Kind::Stdout, "b")]);
        assert_eq!((cut.stdout, cut.stdout_omitted_bytes), (b"b".to_vec(), 2));

        let whole = collected(2, &[(Kind::Stdout, "ü")]);
        assert_eq!((whole.stdout, whole.stdout_omitted_bytes), ("ü".into(), 0));
    }

    #[test]
    fn no_more_memory_is_taken_than_is_kept() {
        let mut stream = Stream::default();
        for _ in 0..100 {
            stream.push(&[7; 30], 1000);
        }
        assert_eq!((stream.bytes.len(), stream.omitted_bytes), (1000, 2000));
        assert!(stream.bytes.capacity() <= 1000, "{}", stream.bytes.capacity());
    }

    #[test]
    fn many_are_shown_no_more_than_one_alone() {
        assert_eq!(Shown::among(1), Shown::ALONE);
        for runs in [2, 7, 100] {
            let shown = Shown::among(runs);
            assert!(shown.output <= LogTail::STORED_BYTES && shown.output * runs <= ANSWER_STREAM_BYTES, "{runs}");
            assert!(shown.cases * runs <= ANSWER_STREAM_BYTES, "{runs}");
        }
    }
}
