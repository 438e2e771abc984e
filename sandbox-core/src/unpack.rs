//! Unpacking image layers into one folder, inside a throw-away sandbox of the keeper's.
//!
//! Layers are applied in order, so whiteouts delete and nothing but the result is kept (image-spec, `layer.md`). The input is a stranger's: every
//! path is resolved below the folder (openat2(2), `RESOLVE_IN_ROOT`), devices are dropped, extended attributes are taken from `user.`
//! alone, and bytes, entries, path lengths are bounded. That it all runs with the sandbox's own ids, no network and a memory limit is the wall
//! behind these.

mod target;

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
};

use tar::{Archive, Entry, EntryType};

pub use target::Target;

use crate::protocol::Unpacked;

/// Why a layer was not unpacked: text for whoever made the image.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("layer {layer}: {source}")]
    Layer { layer: usize, source: io::Error },
    #[error("layer {layer}, entry {path:?}: {source}")]
    Entry { layer: usize, path: String, source: io::Error },
    #[error("the image has more than {0} bytes of files")]
    TooManyBytes(u64),
    #[error("the image has more than {0} entries")]
    TooManyEntries(u64),
}

/// The most that may come out, over all layers together.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub bytes: u64,
    pub entries: u64,
}

/// The longest path in an archive, in bytes (PATH_MAX less its end).
const PATH_BYTES_MAX: usize = 4095;
/// Deepest nesting of folders.
const DEPTH_MAX: usize = 256;

/// Unpacks `layers`, bottom first, into `target`, and brings everything to disk.
pub fn unpack(layers: impl Iterator<Item = File>, target: &mut Target, bounds: Bounds) -> Result<Unpacked, UnpackError> {
    let mut done = Unpacked { bytes: 0, entries: 0 };
    for (layer, file) in layers.enumerate() {
        let failed = |source| UnpackError::Layer { layer, source };
        let mut archive = Archive::new(decompress(file).map_err(failed)?);
        for entry in archive.entries().map_err(failed)? {
            apply(entry.map_err(failed)?, layer, Deletions::OfLayers, target, bounds, &mut done)?;
        }
        target.finish_layer().map_err(failed)?;
    }
    target.sync().map_err(|source| UnpackError::Layer { layer: 0, source })?;
    Ok(done)
}

/// Puts what one archive holds into `target`, as it comes. Names that mean a deletion in a layer are names like others.
pub(crate) fn unpack_archive(archive: impl Read, target: &mut Target, bounds: Bounds) -> Result<Unpacked, UnpackError> {
    let mut done = Unpacked { bytes: 0, entries: 0 };
    let failed = |source| UnpackError::Layer { layer: 0, source };
    for entry in Archive::new(archive).entries().map_err(failed)? {
        apply(entry.map_err(failed)?, 0, Deletions::None, target, bounds, &mut done)?;
    }
    target.finish_layer().map_err(failed)?;
    Ok(done)
}

/// Whether names of some forms delete what lower layers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deletions {
    /// As image-spec's `layer.md` says, «Whiteouts».
    OfLayers,
    None,
}

/// The whole life of `sandbox-unpack`: layers are the descriptors from 3 up, the folder is `/image`, the arguments are how many layers, and
/// the bounds in bytes and entries. Returns [`Unpacked`] as JSON.
pub fn unpack_inherited() -> Result<String, Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = || arguments.next().ok_or("an argument is missing")?.parse::<u64>().map_err(|e| e.to_string());
    let (layers, bytes, entries) = (number()?, number()?, number()?);
    let layers: Vec<File> =
        (3..3 + i32::try_from(layers)?).map(|number| crate::sys::inherited(number).map(File::from)).collect::<io::Result<_>>()?;
    let mut target = Target::new(File::open("/image")?.into());
    let unpacked = unpack(layers.into_iter(), &mut target, Bounds { bytes, entries })?;
    Ok(serde_json::to_string(&unpacked)?)
}

fn apply(
    mut entry: Entry<'_, impl Read>,
    layer: usize,
    deletions: Deletions,
    target: &mut Target,
    bounds: Bounds,
    done: &mut Unpacked,
) -> Result<(), UnpackError> {
    done.entries += 1;
    if done.entries + target.implied_folders() > bounds.entries {
        return Err(UnpackError::TooManyEntries(bounds.entries));
    }
    let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    let failed = |source| UnpackError::Entry { layer, path: path.clone(), source };
    let names = names(&entry.path_bytes()).map_err(failed)?;
    let kind = entry.header().entry_type();
    done.bytes = done.bytes.saturating_add(extended_bytes(&mut entry).map_err(failed)?);
    if matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse) {
        done.bytes = done.bytes.saturating_add(entry.size());
    }
    if done.bytes > bounds.bytes {
        return Err(UnpackError::TooManyBytes(bounds.bytes));
    }
    if deletions == Deletions::None && entry.path_bytes().starts_with(b"/") {
        return Err(failed(invalid("the path is absolute")));
    }
    let is_deletion = deletions == Deletions::OfLayers && names.last().is_some_and(|name| name.starts_with(b".wh."));
    if is_deletion { delete(&names, target).map_err(failed) } else { place(&mut entry, kind, &names, target).map_err(failed) }
}

/// Bytes of the extended attributes and long names that come with an entry: they are stored, too.
fn extended_bytes(entry: &mut Entry<'_, impl Read>) -> io::Result<u64> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(0) };
    extensions.map(|extension| Ok(extension?.value_bytes().len() as u64)).sum()
}

/// Does what a whiteout says.
fn delete(names: &[Vec<u8>], target: &mut Target) -> io::Result<()> {
    let Some((name, folders)) = names.split_last() else { return Ok(()) };
    if name == b".wh..wh..opq" {
        return target.clear(folders);
    }
    // Other names of this form are AUFS's own (image-spec, «Whiteouts»); one that names nothing hides nothing.
    match name.strip_prefix(b".wh.").unwrap_or_default() {
        b"" => Ok(()),
        b"." | b".." => Err(invalid("a whiteout of a folder by its dots")),
        other if other.starts_with(b".wh.") => Ok(()),
        hidden => target.remove(folders, hidden),
    }
}

/// Puts one entry where it belongs.
#[expect(clippy::wildcard_enum_match_arm, reason = "tar has more types than an image may have, and the enum is open")]
fn place(entry: &mut Entry<'_, impl Read>, kind: EntryType, names: &[Vec<u8>], target: &mut Target) -> io::Result<()> {
    let attributes = attributes(entry)?;
    let Some((name, folders)) = names.split_last() else {
        // The root itself: only its attributes.
        return if kind == EntryType::Directory { target.folder_attributes(&[], attributes) } else { Ok(()) };
    };
    match kind {
        EntryType::Directory => target.folder(folders, name, attributes),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => target.file(folders, name, attributes, (entry.size(), entry)),
        EntryType::Symlink => target.symlink(folders, name, &link_name(entry)?, &attributes),
        EntryType::Link => {
            let to = self::names(&link_name(entry)?)?;
            let (to_name, to_folders) = to.split_last().ok_or_else(|| invalid("a hard link to the root"))?;
            target.link(folders, name, to_folders, to_name)
        }
        EntryType::Fifo => target.fifo(folders, name, attributes),
        // No sandbox may have a device from an image; every tool that unpacks without privilege leaves them out.
        EntryType::Char | EntryType::Block | EntryType::XGlobalHeader => Ok(()),
        other => Err(invalid(format!("entries of type {:?} are not supported", char::from(other.as_byte())))),
    }
}

/// Owner, mode, time and extended attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    pub uid: u32,
    pub gid: u32,
    /// Permission and set-id bits.
    pub mode: u32,
    /// Seconds since 1970.
    pub modified_s: u64,
    /// Names in `user.`, and values.
    pub extended: Vec<(String, Vec<u8>)>,
}

fn attributes(entry: &mut Entry<'_, impl Read>) -> io::Result<Attributes> {
    let mut extended = Vec::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            let name = extension.key().ok().and_then(|key| key.strip_prefix("SCHILY.xattr.")).filter(|name| name.starts_with("user."));
            // overlayfs reads `user.overlay.` in some mounts; nothing else of its own may come from an image.
            if let Some(name) = name.filter(|name| !name.starts_with("user.overlay.")) {
                extended.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    let header = entry.header();
    let id =
        |id: u64| u32::try_from(id).ok().filter(|id| *id < crate::ids::RANGE).ok_or_else(|| invalid(format!("the id {id} is above 65535")));
    Ok(Attributes {
        uid: id(header.uid()?)?,
        gid: id(header.gid()?)?,
        mode: header.mode()? & 0o7777,
        modified_s: header.mtime()?,
        extended,
    })
}

fn link_name(entry: &Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
    let name = entry.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default();
    if name.is_empty() || name.len() > PATH_BYTES_MAX || name.contains(&0) {
        return Err(invalid("a link to nowhere"));
    }
    Ok(name)
}

/// The parts of a path, below the root whatever it says: a leading slash and `.` mean nothing, `..` is refused.
fn names(path: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    if path.len() > PATH_BYTES_MAX {
        return Err(invalid("the path is longer than 4095 bytes"));
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
        if name == b".." || name.contains(&0) || name.len() > 255 {
            return Err(invalid("a part of the path is \"..\", longer than 255 bytes, or has a zero byte"));
        }
        names.push(name.to_vec());
    }
    if names.len() > DEPTH_MAX {
        return Err(invalid("the path is deeper than 256 folders"));
    }
    Ok(names)
}

/// Tells the compression by its first bytes, as the media type of a docker-save layer does not.
fn decompress(file: File) -> io::Result<Box<dyn Read>> {
    let mut file = BufReader::with_capacity(128 * 1024, file);
    let start = file.fill_buf()?;
    if start.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(file)))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Ok(Box::new(zstd::Decoder::with_buffer(file)?))
    } else {
        Ok(Box::new(file))
    }
}

fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

#[cfg(test)]
mod tests;
