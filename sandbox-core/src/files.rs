//! The files that a request puts into a sandbox, as they travel from the service to init in one memfd.
//!
//! Entry after entry: length of the path (u32), mode (u32), length of the content (u64), all little-endian, then path and content.
//! There is no parser for a richer format (tar) on the privileged side, and init writes the files as the payload's user, inside the
//! sandbox's own root, so the worst that a path can do is what the payload itself could.

use std::io::{self, Read, Write};

/// The longest path, in bytes (PATH_MAX of path_resolution(7) less its end).
pub const PATH_BYTES_MAX: usize = 4095;

const HEADER_BYTES: usize = 16;

/// Appends one file. `path` is absolute or relative to the working folder; missing folders are made. `mode` holds permission bits.
pub fn write(to: &mut impl Write, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let path_len = u32::try_from(path.len()).map_err(io::Error::other)?;
    to.write_all(&path_len.to_le_bytes())?;
    to.write_all(&mode.to_le_bytes())?;
    to.write_all(&(content.len() as u64).to_le_bytes())?;
    to.write_all(path.as_bytes())?;
    to.write_all(content)
}

/// One file on its way in: its name, its permission bits, and how many bytes of content follow in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: String,
    pub mode: u32,
    pub content_bytes: u64,
}

/// The next entry, or `None` at the end. The caller then reads `content_bytes` from `from` before it asks again.
pub fn read_entry(from: &mut impl Read) -> io::Result<Option<Entry>> {
    let mut header = [0; HEADER_BYTES];
    let mut have = 0;
    while have < HEADER_BYTES {
        match from.read(&mut header[have..])? {
            0 if have == 0 => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => have += n,
        }
    }
    let [p0, p1, p2, p3, m0, m1, m2, m3, content @ ..] = header;
    let path_len = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
    if path_len == 0 || path_len > PATH_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a path is empty or longer than 4095 bytes"));
    }
    let mut path = vec![0; path_len];
    from.read_exact(&mut path)?;
    let path = String::from_utf8(path).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(Some(Entry { path, mode: u32::from_le_bytes([m0, m1, m2, m3]) & 0o7777, content_bytes: u64::from_le_bytes(content) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_read_back_in_order() {
        let mut bytes = Vec::new();
        write(&mut bytes, "main.py", 0o644, b"print(1)").unwrap();
        write(&mut bytes, "/data/empty", 0o600, b"").unwrap();
        let mut from = bytes.as_slice();

        let first = read_entry(&mut from).unwrap().unwrap();
        assert_eq!(first, Entry { path: "main.py".into(), mode: 0o644, content_bytes: 8 });
        let mut content = [0; 8];
        from.read_exact(&mut content).unwrap();
        assert_eq!(&content, b"print(1)");
        let second = read_entry(&mut from).unwrap().unwrap();
        assert_eq!(second, Entry { path: "/data/empty".into(), mode: 0o600, content_bytes: 0 });
        assert_eq!(read_entry(&mut from).unwrap(), None);
    }

    #[test]
    fn a_stream_that_ends_inside_a_header_is_an_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, "a", 0o644, b"").unwrap();
        assert!(read_entry(&mut &bytes[..10]).is_err());
    }
}
