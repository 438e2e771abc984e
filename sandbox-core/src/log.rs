//! The log file of one sandbox: what its payload wrote, in the order in which the keeper read it.
//!
//! The keeper appends, anybody reads. A record is a header of 24 bytes — length of the data (u32), [`Kind`] (u8), three zero bytes, sequence
//! number (u64), Unix time in microseconds (u64), all little-endian — and then the data. Sequence numbers start at 0 and
//! rise by one. A record is appended with one write, so a reader that stops at an incomplete record and tries again later sees
//! every record exactly once. The last record is of the kind [`Kind::End`], and its data is the ending ([`decode_ending`]): nothing follows it. It is
//! written before anybody is told of the end, so the ending outlives the keeper.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::protocol::{Cause, Ending, SandboxId};

/// Bytes before the data of each record.
pub const HEADER_BYTES: usize = 24;

/// The most data in one record.
pub const DATA_BYTES_MAX: usize = 64 * 1024;

/// The longest text in an [`Ending`]: escaped, with all else, it fits into [`DATA_BYTES_MAX`].
const MESSAGE_BYTES_MAX: usize = 8 * 1024;

/// Where the log of a sandbox lies below the folder of logs.
pub fn path(folder: &Path, id: SandboxId) -> PathBuf {
    folder.join(format!("{id}.log"))
}

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Stdout,
    Stderr,
    End,
}

/// One record, borrowed from the bytes it was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    pub kind: Kind,
    pub seq: u64,
    /// Unix time in microseconds at which the keeper read the data.
    pub at_us: u64,
    pub data: &'a [u8],
}

/// The bytes are not a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the log is damaged: no record starts here")]
pub struct Damaged;

impl Record<'_> {
    /// The header that stands before `data` in the file.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let len = u32::try_from(self.data.len()).expect("callers keep to DATA_BYTES_MAX");
        header[..4].copy_from_slice(&len.to_le_bytes());
        header[4] = match self.kind {
            Kind::Stdout => 1,
            Kind::Stderr => 2,
            Kind::End => 3,
        };
        header[8..16].copy_from_slice(&self.seq.to_le_bytes());
        header[16..].copy_from_slice(&self.at_us.to_le_bytes());
        header
    }

    /// Header and data, as they stand in the file.
    pub fn append_to(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.header());
        bytes.extend_from_slice(self.data);
    }
}

/// Cuts what an ending says to what a log can hold.
pub(crate) fn bound_ending(ending: &mut Ending) {
    if let Cause::StartFailed { message } | Cause::InfraError { message } = &mut ending.cause {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
    }
}

/// The data of an end record: JSON, so that later versions can add to it. The ending must be bounded ([`bound_ending`]).
pub(crate) fn encode_ending(ending: &Ending) -> Vec<u8> {
    serde_json::to_vec(ending).expect("an ending has no map, and no number that JSON lacks")
}

/// The ending in the data of an end record; `None` if there is none, as in logs of versions before it was written there.
pub fn decode_ending(data: &[u8]) -> Option<Ending> {
    serde_json::from_slice(data).ok()
}

/// The first record in `bytes` and the bytes behind it; `None` if it is not complete yet.
pub fn parse(bytes: &[u8]) -> Result<Option<(Record<'_>, &[u8])>, Damaged> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let [l0, l1, l2, l3, kind, z0, z1, z2, s0, s1, s2, s3, s4, s5, s6, s7, at @ ..] = *header;
    let kind = match (kind, z0, z1, z2) {
        (1, 0, 0, 0) => Kind::Stdout,
        (2, 0, 0, 0) => Kind::Stderr,
        (3, 0, 0, 0) => Kind::End,
        _ => return Err(Damaged),
    };
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).map_err(|_| Damaged)?;
    if len > DATA_BYTES_MAX {
        return Err(Damaged);
    }
    let Some((data, rest)) = rest.split_at_checked(len) else { return Ok(None) };
    let seq = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    Ok(Some((Record { kind, seq, at_us: u64::from_le_bytes(at), data }, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_as_it_was_written_and_the_rest_is_left() {
        let record = Record { kind: Kind::Stderr, seq: 7, at_us: 1_700_000_000_000_001, data: b"a\0\xff" };
        let mut bytes = Vec::new();
        record.append_to(&mut bytes);
        bytes.extend_from_slice(b"next");
        assert_eq!(parse(&bytes), Ok(Some((record, b"next".as_slice()))));
    }

    #[test]
    fn a_record_cut_anywhere_is_incomplete_not_damaged() {
        let mut bytes = Vec::new();
        Record { kind: Kind::Stdout, seq: 0, at_us: 1, data: b"hello" }.append_to(&mut bytes);
        for len in 0..bytes.len() {
            assert_eq!(parse(&bytes[..len]), Ok(None), "cut at {len}");
        }
    }

    #[test]
    fn an_ending_reads_back_and_fits_however_much_it_says() {
        let mut ending = Ending {
            cause: Cause::StartFailed { message: "\u{1}".repeat(1 << 20) },
            launched: None,
            ended_at_us: u64::MAX,
            usage: crate::protocol::Usage { cpu_us: u64::MAX, ..Default::default() },
            limits_hit: vec![crate::protocol::Limit::Memory, crate::protocol::Limit::Disk],
            oom_kills: 1,
            stdout_truncated: true,
            stderr_truncated: false,
        };
        bound_ending(&mut ending);
        let data = encode_ending(&ending);
        assert!(data.len() <= DATA_BYTES_MAX, "{}", data.len());
        assert_eq!(decode_ending(&data), Some(ending));
        assert_eq!(decode_ending(b""), None);
    }

    #[test]
    fn bytes_that_no_keeper_wrote_are_damaged() {
        assert_eq!(parse(&[0xff; 64]), Err(Damaged));
    }
}
