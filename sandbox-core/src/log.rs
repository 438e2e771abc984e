//! The log file of one sandbox: what its payload wrote, in the order in which the keeper read it.
//!
//! The keeper appends, anybody reads. A record is a header of 24 bytes — length of the data (u32), [`Kind`] (u8), three zero bytes, sequence
//! number (u64), Unix time in microseconds (u64), all little-endian — and then the data. Sequence numbers start at 0 and
//! rise by one. A record is appended with one write, so a reader that stops at an incomplete record and tries again later sees
//! every record exactly once. The last record is of the kind [`Kind::End`] and has no data: nothing follows it.

use std::path::{Path, PathBuf};

use crate::protocol::SandboxId;

/// Bytes before the data of each record.
pub const HEADER_BYTES: usize = 24;

/// The most data in one record.
pub const DATA_BYTES_MAX: usize = 64 * 1024;

/// Where the log of a sandbox lies below the folder of logs.
pub fn path(folder: &Path, id: SandboxId) -> PathBuf {
    folder.join(format!("{id}.log"))
}

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    fn bytes_that_no_keeper_wrote_are_damaged() {
        assert_eq!(parse(&[0xff; 64]), Err(Damaged));
    }
}
