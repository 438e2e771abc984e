//! The secret that tokens are signed with, and the file that keeps it.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use anyhow::{Context, ensure};

/// An HMAC is as strong as its key, up to its own length (RFC 7518, 3.2).
const BYTES_MIN: usize = 32;

/// A secret that is long enough.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Takes these bytes, without blanks and line ends behind them. Fails if they are fewer than 32.
    pub fn new(bytes: &[u8]) -> anyhow::Result<Self> {
        Self::exactly(bytes.trim_ascii_end().to_vec())
    }

    /// Takes these bytes and no others: what looks like a line end may be one of a key's.
    pub(super) fn exactly(bytes: Vec<u8>) -> anyhow::Result<Self> {
        ensure!(bytes.len() >= BYTES_MIN, "a secret has at least {BYTES_MIN} bytes; this one has {}", bytes.len());
        Ok(Self(bytes))
    }

    /// Reads a secret from its file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("reading the secret from {}", path.display()))?;
        Self::new(&bytes).with_context(|| path.display().to_string())
    }

    /// Makes a secret and its file, which only `owner` can read; or `None` if there is a file of that name already.
    pub fn create(path: &Path, owner: Option<(u32, u32)>) -> anyhow::Result<Option<Self>> {
        let written = write_new(path, owner);
        match written {
            Ok(secret) => Ok(Some(secret)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error).with_context(|| format!("making a secret in {}", path.display())),
        }
    }

    /// What is signed with.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Under another name first: a secret that is cut short by a crash would lock everybody out.
fn write_new(path: &Path, owner: Option<(u32, u32)>) -> io::Result<Secret> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.try_exists()? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let mut random = [0; 32];
    File::open("/dev/urandom").and_then(|mut source| io::Read::read_exact(&mut source, &mut random))?;
    let text = hex::encode(random);
    let unfinished = path.with_extension("new");
    fs::remove_file(&unfinished).or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    writeln!(file, "{text}")?;
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
    }
    file.sync_all()?;
    // A link, unlike a rename, never replaces a secret that somebody else made meanwhile.
    let linked = fs::hard_link(&unfinished, path);
    fs::remove_file(&unfinished)?;
    linked?;
    File::open(folder)?.sync_all()?;
    Ok(Secret(text.into_bytes()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_of_31_bytes_is_too_short() {
        assert!(Secret::new(&[7; 31]).is_err());
        assert!(Secret::new(&[7; 32]).is_ok());
    }

    #[test]
    fn line_ends_are_no_part_of_a_secret() {
        assert_eq!(Secret::new(b"0123456789abcdef0123456789abcdef\r\n").unwrap().0.len(), 32);
        assert!(Secret::new(b"short                                        \n").is_err());
    }

    #[test]
    fn a_made_secret_reads_back_and_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwt-secret");
        let made = Secret::create(&path, None).unwrap().unwrap();
        assert_eq!(Secret::read(&path).unwrap(), made);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_secret_that_is_there_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jwt-secret");
        let first = Secret::create(&path, None).unwrap().unwrap();
        assert!(Secret::create(&path, None).unwrap().is_none());
        assert_eq!(Secret::read(&path).unwrap(), first);
    }

    #[test]
    fn a_debug_print_shows_no_secret() {
        let secret = Secret::new(b"correct horse battery staple, long enough").unwrap();
        assert!(!format!("{secret:?}").contains("horse"));
    }
}
