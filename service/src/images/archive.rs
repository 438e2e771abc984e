//! A tar archive as somebody sent it: where the files that we ask for by name lie in it, and nothing else of what it says.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Seek, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use anyhow::Context;

use super::Fault;

/// The largest archive, packed or not.
pub(crate) const ARCHIVE_BYTES_MAX: u64 = 8 << 30;
/// The largest JSON document.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// An image of the largest number of layers has some hundred files; an archive of several images a few times as many.
const ENTRIES_MAX: usize = 100_000;

/// An archive on disk, and what is where in it.
#[derive(Debug)]
pub(super) struct Archive {
    file: File,
    /// Files that lie beside it, each whole.
    beside: Vec<File>,
    files: HashMap<String, Section>,
    /// What older Dockers write for a layer that occurs twice: name and target.
    links: HashMap<String, String>,
}

/// A file inside the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Section {
    /// In the archive itself, or in one beside it.
    beside: Option<usize>,
    offset: u64,
    pub(super) bytes: u64,
}

/// Reads one [`Section`].
#[derive(Debug)]
pub(super) struct SectionReader<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Archive {
    /// Looks through an archive: tar, or tar in gzip or zstd, which is unpacked into a file without a name in `scratch`.
    pub(super) fn open(file: File, scratch: &Path) -> Result<Self, Fault> {
        let mut file = unpacked(file, scratch)?;
        file.rewind().context("reading an upload")?;
        let len = file.metadata().context("an upload's size")?.len();
        let (mut files, mut links) = (HashMap::new(), HashMap::new());
        let mut tar = tar::Archive::new(&file);
        // Raw: the library reads no extended header into memory, however long it says to be. No name that we ask for needs one.
        let entries = tar.entries_with_seek().map_err(not_a_tar)?.raw(true);
        for (count, entry) in entries.enumerate() {
            let entry = entry.map_err(not_a_tar)?;
            if count >= ENTRIES_MAX {
                return Err(Fault::Invalid(format!("the archive has more than {ENTRIES_MAX} entries")));
            }
            let path = entry.path_bytes();
            let Ok(name) = std::str::from_utf8(&path) else { continue };
            let name = name.strip_prefix("./").unwrap_or(name).to_owned();
            let kind = entry.header().entry_type();
            if kind.is_file() || kind.is_contiguous() {
                let section = Section { beside: None, offset: entry.raw_file_position(), bytes: entry.size() };
                if section.offset.checked_add(section.bytes).is_none_or(|end| end > len) {
                    return Err(Fault::Invalid(format!("the archive ends in the middle of {name:?}")));
                }
                files.insert(name, section);
            } else if kind.is_symlink() {
                let target = entry.header().link_name_bytes();
                if let Some(target) = target.and_then(|target| String::from_utf8(target.into_owned()).ok()) {
                    links.insert(name, target);
                }
            }
        }
        Ok(Self { file, beside: Vec::new(), files, links })
    }

    /// Adds a file that is here already, and has at least so many bytes.
    pub(super) fn lay_beside(&mut self, name: String, file: File, bytes: u64) {
        self.files.insert(name, Section { beside: Some(self.beside.len()), offset: 0, bytes });
        self.beside.push(file);
    }

    /// A layer by itself, in a file of its own, and where it lies in that.
    pub(super) fn of_layer(file: File) -> Result<(Self, Section), Fault> {
        let bytes = file.metadata().context("a layer's size")?.len();
        let archive = Self { file, beside: Vec::new(), files: HashMap::new(), links: HashMap::new() };
        Ok((archive, Section { beside: None, offset: 0, bytes }))
    }

    /// The file of exactly this name. Fails if there is none.
    pub(super) fn section(&self, name: &str) -> Result<Section, Fault> {
        self.find(name).ok_or_else(|| Fault::Invalid(format!("the archive lacks {name:?}")))
    }

    /// The file of exactly this name, or the one that a link of this name points at.
    pub(super) fn find(&self, name: &str) -> Option<Section> {
        let at = |name: &str| self.files.get(name).copied();
        at(name).or_else(|| at(&beside(name, self.links.get(name)?)))
    }

    /// The whole content of a small file.
    pub(super) fn document(&self, name: &str, section: Section) -> Result<Vec<u8>, Fault> {
        if section.bytes > DOCUMENT_BYTES_MAX {
            return Err(Fault::Invalid(format!("{name} has {} bytes; at most {DOCUMENT_BYTES_MAX}", section.bytes)));
        }
        let mut bytes = Vec::new();
        self.reader(section).read_to_end(&mut bytes).context("reading an upload")?;
        Ok(bytes)
    }

    pub(super) fn reader(&self, section: Section) -> SectionReader<'_> {
        let file = section.beside.map_or(&self.file, |place| &self.beside[place]);
        SectionReader { file, offset: section.offset, left: section.bytes }
    }
}

impl Read for SectionReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let have = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += have as u64;
        self.left -= have as u64;
        Ok(have)
    }
}

/// How the bytes of a layer or of an archive are packed, by what they begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    pub(super) fn of(mut reader: impl Read) -> io::Result<Self> {
        let mut magic = [0; 4];
        let mut have = 0;
        while have < magic.len() {
            match reader.read(&mut magic[have..])? {
                0 => break,
                n => have += n,
            }
        }
        Ok(match magic {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            _ => Self::None,
        })
    }
}

fn unpacked(file: File, scratch: &Path) -> Result<File, Fault> {
    let whole = SectionReader { file: &file, offset: 0, left: u64::MAX };
    let packing = Packing::of(whole).context("reading an upload")?;
    let whole = BufReader::with_capacity(1 << 16, SectionReader { file: &file, offset: 0, left: u64::MAX });
    let from: Box<dyn Read + '_> = match packing {
        Packing::None => return Ok(file),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Packing::Zstd => Box::new(zstd::Decoder::with_buffer(whole).context("a decoder")?),
    };
    unpack(from, scratch)
}

fn unpack(mut from: impl Read, scratch: &Path) -> Result<File, Fault> {
    let mut to = tempfile::tempfile_in(scratch).with_context(|| scratch.display().to_string())?;
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        let have = match from.read(&mut buffer) {
            Ok(0) => return Ok(to),
            Ok(have) => have,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Invalid(format!("the archive cannot be decompressed: {error}"))),
        };
        total += have as u64;
        if total > ARCHIVE_BYTES_MAX {
            return Err(Fault::Invalid(format!("the archive decompresses to more than {ARCHIVE_BYTES_MAX} bytes")));
        }
        to.write_all(&buffer[..have]).context("decompressing an upload")?;
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn not_a_tar(error: io::Error) -> Fault {
    Fault::Invalid(format!("this is not a tar archive, or a damaged one: {error}"))
}

/// Where a link's relative target lies, as a name in the archive. One that climbs out of it is a name that no file has.
fn beside(link: &str, target: &str) -> String {
    let mut parts: Vec<&str> = link.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "." | "" => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_resolved_within_the_archive() {
        assert_eq!(beside("abc/layer.tar", "../def.tar"), "def.tar");
        assert_eq!(beside("abc/layer.tar", "../def/layer.tar"), "def/layer.tar");
        assert_eq!(beside("a/layer.tar", "../../../etc/passwd"), "../../etc/passwd");
    }

    #[test]
    fn a_packing_is_known_by_its_first_bytes() {
        assert_eq!(Packing::of(&[0x1f, 0x8b, 8, 0][..]).unwrap(), Packing::Gzip);
        assert_eq!(Packing::of(&[0x28, 0xb5, 0x2f, 0xfd, 1][..]).unwrap(), Packing::Zstd);
        assert_eq!(Packing::of(&b"x"[..]).unwrap(), Packing::None);
    }
}
