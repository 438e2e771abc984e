//! Folders become OCI archives: a layout as it is, a root file system as an image of one layer.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder, MediaType, Os, RootFsBuilder,
    Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::{
    super::packer::{Exactly, Packer},
    Program,
};

const BLOCK_BYTES: u64 = 512;

/// Packs the parts of an OCI image layout into a file without a name.
pub(super) fn layout(folder: &Path) -> anyhow::Result<File> {
    let mut archive = Builder::new(tempfile::tempfile()?);
    let mut names = vec!["oci-layout".to_owned(), "index.json".to_owned()];
    let blobs = folder.join("blobs/sha256");
    for entry in fs::read_dir(&blobs).with_context(|| blobs.display().to_string())? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(format!("blobs/sha256/{name}"));
        }
    }
    for name in names {
        let path = folder.join(&name);
        let mut file = File::open(&path).with_context(|| path.display().to_string())?;
        let len = file.metadata()?.len();
        archive
            .append_data(&mut plain_header(len), &name, &mut Exactly::new(&mut file, len))
            .with_context(|| path.display().to_string())?;
    }
    Ok(archive.into_inner()?)
}

/// Packs a root file system, and says what of it no image holds: devices, sockets, pipes.
pub(super) fn root(folder: &Path, program: &Program) -> anyhow::Result<(File, Vec<PathBuf>)> {
    let mut file = tempfile::tempfile()?;
    // The layer comes first and its digest, which names it, is known last: its header is written afterwards.
    file.seek(SeekFrom::Start(BLOCK_BYTES))?;
    let mut packer = Packer::new(Hashing { to: io::BufWriter::with_capacity(1 << 20, file), hasher: Sha256::new(), len: 0 }, None);
    packer.add(folder, Path::new(""))?;
    let (Hashing { to, hasher, len }, left_out) = packer.finish()?;
    let digest = digest(hasher);
    let mut file = to.into_inner()?;
    file.write_all(&vec![0; usize::try_from(len.next_multiple_of(BLOCK_BYTES) - len)?])?;
    let end = file.stream_position()?;
    file.rewind()?;
    let mut header = plain_header(len);
    header.set_path(blob_name(&digest))?;
    header.set_cksum();
    file.write_all(header.as_bytes())?;
    file.seek(SeekFrom::Start(end))?;

    let mut archive = Builder::new(file);
    let layer = Descriptor::new(MediaType::ImageLayer, len, digest);
    let config = ImageConfigurationBuilder::default()
        .architecture(Arch::default())
        .os(Os::Linux)
        .config(config(program)?)
        .rootfs(RootFsBuilder::default().typ("layers").diff_ids(vec![layer.digest().to_string()]).build()?)
        .build()?;
    let config = add_blob(&mut archive, MediaType::ImageConfig, &config)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(2_u32)
        .media_type(MediaType::ImageManifest)
        .config(config)
        .layers(vec![layer])
        .build()?;
    let manifest = add_blob(&mut archive, MediaType::ImageManifest, &manifest)?;
    let index = ImageIndexBuilder::default().schema_version(2_u32).media_type(MediaType::ImageIndex).manifests(vec![manifest]).build()?;
    add(&mut archive, "index.json", &serde_json::to_vec(&index)?)?;
    add(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok((archive.into_inner()?, left_out))
}

fn config(program: &Program) -> anyhow::Result<oci_spec::image::Config> {
    let mut config = ConfigBuilder::default();
    if !program.cmd.is_empty() {
        config = config.cmd(program.cmd.clone());
    }
    if !program.env.is_empty() {
        config = config.env(program.env.clone());
    }
    if let Some(workdir) = &program.workdir {
        config = config.working_dir(workdir);
    }
    if let Some(user) = &program.user {
        config = config.user(user);
    }
    Ok(config.build()?)
}

fn plain_header(len: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(len);
    header
}

fn add(archive: &mut Builder<File>, name: &str, content: &[u8]) -> anyhow::Result<()> {
    archive.append_data(&mut plain_header(content.len() as u64), name, content)?;
    Ok(())
}

fn add_blob(archive: &mut Builder<File>, media_type: MediaType, document: &impl Serialize) -> anyhow::Result<Descriptor> {
    let bytes = serde_json::to_vec(document)?;
    let digest = digest(Sha256::new_with_prefix(&bytes));
    add(archive, &blob_name(&digest), &bytes)?;
    Ok(Descriptor::new(media_type, bytes.len() as u64, digest))
}

fn blob_name(digest: &Sha256Digest) -> String {
    format!("blobs/sha256/{digest}")
}

fn digest(hasher: Sha256) -> Sha256Digest {
    hex::encode(hasher.finalize()).parse().expect("32 bytes are 64 hex digits")
}

/// Writes on, and remembers length and digest.
struct Hashing<W> {
    to: W,
    hasher: Sha256,
    len: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::Read as _,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    fn sample() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir(root.join("bin")).unwrap();
        fs::write(root.join("bin/tool"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(root.join("bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(root.join("bin/tool"), root.join("bin/zweit")).unwrap();
        symlink("../bin/./tool", root.join("bin/alias")).unwrap();
        symlink("x/".repeat(100), root.join("bin/far")).unwrap();
        fs::write(root.join("n".repeat(150)), "long").unwrap();
        drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
        folder
    }

    /// The entries of the layer inside a packed archive: kind, mode, content or link.
    fn entries(mut archive: File) -> BTreeMap<String, (EntryType, u32, String)> {
        archive.rewind().unwrap();
        let mut outer = tar::Archive::new(archive);
        let mut layer = Vec::new();
        let mut first = outer.entries().unwrap().next().unwrap().unwrap();
        first.read_to_end(&mut layer).unwrap();
        let mut inner = tar::Archive::new(&layer[..]);
        let entries = inner.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            if let Some(link) = entry.link_name_bytes() {
                content = String::from_utf8(link.into_owned()).unwrap();
            }
            let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            (name, (entry.header().entry_type(), entry.header().mode().unwrap(), content))
        });
        entries.collect()
    }

    #[test]
    fn a_root_file_system_keeps_modes_and_links() {
        let folder = sample();
        let (archive, left_out) = root(folder.path(), &Program::default()).unwrap();
        let entries = entries(archive);
        let get = |name: &str| entries.get(name).unwrap_or_else(|| panic!("{name} in {entries:?}")).clone();
        assert_eq!(get("bin/tool"), (EntryType::Regular, 0o4755, "#!/bin/sh\n".into()));
        assert_eq!((get("bin/zweit").0, get("bin/zweit").2), (EntryType::Link, "bin/tool".into()));
        assert_eq!((get("bin/alias").0, get("bin/alias").2), (EntryType::Symlink, "../bin/./tool".into()));
        assert_eq!(get("bin/far").2.trim_end_matches('/'), "x/".repeat(100).trim_end_matches('/'));
        assert_eq!(get(&"n".repeat(150)).2, "long");
        assert_eq!(left_out, [folder.path().join("socket")]);
    }

    #[test]
    fn the_same_folder_makes_the_same_archive() {
        let folder = sample();
        let bytes = || {
            let (mut file, _) = root(folder.path(), &Program::default()).unwrap();
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert!(bytes() == bytes());
    }

    #[test]
    fn a_packed_folder_is_what_the_service_takes() {
        let folder = sample();
        let program = Program { cmd: vec!["tool".into()], env: vec!["A=b".into()], workdir: Some("/bin".into()), user: Some("7".into()) };
        let (mut archive, _) = root(folder.path(), &program).unwrap();
        archive.rewind().unwrap();
        let config = crate::images::configuration_in(archive, "any").unwrap();
        let config = config.config().clone().unwrap();
        assert_eq!(config.cmd().as_deref(), Some(&["tool".to_owned()][..]));
        assert_eq!(config.env().as_deref(), Some(&["A=b".to_owned()][..]));
        assert_eq!((config.working_dir().as_deref(), config.user().as_deref()), (Some("/bin"), Some("7")));
    }

    #[test]
    fn a_layout_folder_is_packed_with_its_blobs() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
        for name in ["oci-layout", "index.json", "blobs/sha256/abc"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let mut file = layout(folder.path()).unwrap();
        file.rewind().unwrap();
        let mut archive = tar::Archive::new(file);
        let names: Vec<_> = archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect();
        assert_eq!(names, ["oci-layout", "index.json", "blobs/sha256/abc"].map(PathBuf::from));
    }
}
