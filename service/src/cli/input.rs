//! What is given to a program, kept until the service says that it has taken it.

use std::{collections::VecDeque, io::Read as _};

use anyhow::bail;
use tokio::sync::mpsc;

/// In one message; the API takes up to 256 KiB.
const CHUNK_BYTES: usize = 32 * 1024;
/// Behind this much that is not taken nothing more is read. It fits into what lies between us and a service that does not read, so that sending never waits.
const UNDER_WAY_BYTES_MAX: usize = 128 * 1024;

/// Standard input as it comes, read by a thread of its own: nothing else ends a read(2) of a terminal.
pub(super) fn read() -> mpsc::Receiver<Vec<u8>> {
    let (to, from) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        // A failure is an end: there is nothing more to come.
        while let Ok(count @ 1..) = stdin.read(&mut buffer) {
            if to.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    from
}

/// Input that was sent and not yet taken.
#[derive(Debug, Default)]
pub(super) struct UnderWay {
    bytes: VecDeque<u8>,
    /// As the service counts, for all who give input to the same program.
    taken: u64,
    /// The service was heard of this connection.
    is_counted: bool,
    was_counted: bool,
}

impl UnderWay {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    pub(super) fn has_room(&self) -> bool {
        self.bytes.len() < UNDER_WAY_BYTES_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// A new connection begins: what of it arrived over the last is told first.
    pub(super) fn begin_connection(&mut self) {
        self.is_counted = false;
    }

    /// The service has taken so many bytes. Answers what is to be sent again, if that is the first word of a connection.
    pub(super) fn take(&mut self, written_bytes: u64) -> anyhow::Result<Vec<Vec<u8>>> {
        let is_first = !std::mem::replace(&mut self.is_counted, true);
        if !std::mem::replace(&mut self.was_counted, true) {
            self.taken = written_bytes;
        }
        if written_bytes < self.taken {
            // A service that was started again counts anew.
            if !self.bytes.is_empty() {
                bail!("the service was started again while input was on its way: nobody knows how much of it arrived");
            }
            self.taken = written_bytes;
        }
        let more = usize::try_from(written_bytes - self.taken).unwrap_or(usize::MAX).min(self.bytes.len());
        self.bytes.drain(..more);
        self.taken = written_bytes;
        Ok(if is_first { self.bytes.make_contiguous().chunks(CHUNK_BYTES).map(<[u8]>::to_vec).collect() } else { Vec::new() })
    }

    /// Nobody takes any more.
    pub(super) fn give_up(&mut self) {
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_a_new_connection_goes_what_did_not_arrive() {
        let mut under_way = UnderWay::default();
        assert_eq!(under_way.take(5).unwrap(), Vec::<Vec<u8>>::new(), "others gave those");
        under_way.add(b"abcdef");
        assert!(under_way.take(7).unwrap().is_empty());

        under_way.begin_connection();
        assert_eq!(under_way.take(8).unwrap(), [b"def"]);
        assert!(under_way.take(11).unwrap().is_empty());
        under_way.begin_connection();
        assert!(under_way.take(11).unwrap().is_empty());
    }

    #[test]
    fn a_service_that_counts_anew_makes_only_input_under_way_uncertain() {
        let mut under_way = UnderWay::default();
        under_way.take(0).unwrap();
        under_way.add(b"abc");
        under_way.take(3).unwrap();
        under_way.begin_connection();
        assert!(under_way.take(0).unwrap().is_empty());
        under_way.add(b"d");
        under_way.take(1).unwrap();

        under_way.add(b"e");
        under_way.begin_connection();
        assert!(under_way.take(0).is_err());
    }

    #[test]
    fn no_more_is_read_than_is_taken() {
        let mut under_way = UnderWay::default();
        under_way.take(0).unwrap();
        under_way.add(&vec![0; UNDER_WAY_BYTES_MAX]);
        assert!(!under_way.has_room());
        under_way.take(1).unwrap();
        assert!(under_way.has_room());
    }
}
