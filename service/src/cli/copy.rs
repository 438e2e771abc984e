//! `mayfly cp`: files and folders into a sandbox and out of it, by the rules of cp(1) and `docker cp`.

mod pipe;
mod unpack;

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use futures_util::StreamExt as _;
use indicatif::ProgressBar;
use reqwest::Method;
use serde::Deserialize;

use self::unpack::Naming;
use super::{
    output::note,
    packer::{Owner, Packer},
    progress,
    remote::{Connection, Remote, code_of},
};

/// While nothing comes, how long more is waited for.
const SILENCE_MAX: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
#[command(
    override_usage = "mayfly cp [OPTIONS] SOURCE SANDBOX:PATH\n       mayfly cp [OPTIONS] SANDBOX:PATH TARGET",
    after_help = "A target that is a folder is copied into; SOURCE/. is what is in a folder, without the folder. In a sandbox everything belongs to whoever owns the folder \
                  that it is put into, here to whoever copies. Links are copied as links. `-` is an archive (tar) on standard input or output."
)]
pub(super) struct Arguments {
    /// What is copied: a path here, or SANDBOX:PATH, with a sandbox by its id or name; ./a:b is a path here
    source: OsString,
    /// Where it goes
    target: OsString,
    /// Say nothing of how far it is
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    remote: Remote,
}

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Here(PathBuf),
    /// An archive.
    Standard,
    Inside {
        sandbox: String,
        path: String,
    },
}

/// A file or folder in a sandbox, as the API tells of it.
#[derive(Debug, Deserialize)]
struct Entry {
    uid: u64,
    gid: u64,
}

/// What has a path in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Folder,
    Other,
    Nothing,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { source, target, quiet, remote } = arguments;
    let (source, target) = (End::of(source)?, End::of(target)?);
    let connection = remote.connect()?;
    let bar = |total, what: &str| if quiet { ProgressBar::hidden() } else { progress::bytes(total, what) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match (source, target) {
            (End::Here(source), End::Inside { sandbox, path }) => {
                let way = Inside { connection: &connection, sandbox: &sandbox, path: &path };
                way.put(&source, bar(Some(size_of(&source)), "copying")).await
            }
            (End::Standard, End::Inside { sandbox, path }) => {
                Inside { connection: &connection, sandbox: &sandbox, path: &path }.put_archive(bar(None, "copying")).await
            }
            (End::Inside { sandbox, path }, End::Here(target)) => {
                Inside { connection: &connection, sandbox: &sandbox, path: &path }.take(&target, bar(None, "copying")).await
            }
            (End::Inside { sandbox, path }, End::Standard) => {
                Inside { connection: &connection, sandbox: &sandbox, path: &path }.take_archive(bar(None, "copying")).await
            }
            (End::Inside { .. }, End::Inside { .. }) => bail!(
                "of source and target one is on this machine; `mayfly cp A:PATH - | mayfly cp - B:PATH` goes from one sandbox to another"
            ),
            (End::Here(_) | End::Standard, End::Here(_) | End::Standard) => bail!("of source and target one is in a sandbox: SANDBOX:PATH"),
        }
    })
}

impl End {
    fn of(text: OsString) -> anyhow::Result<Self> {
        if text == "-" {
            return Ok(Self::Standard);
        }
        let parts = text.to_str().and_then(|text| text.split_once(':'));
        match parts {
            Some((sandbox, path)) if !sandbox.is_empty() && !sandbox.contains('/') && !sandbox.starts_with('.') => {
                ensure!(!path.is_empty(), "{sandbox}: a path is needed behind the colon");
                // Where it leads only the sandbox knows; and what is copied here would be called so.
                ensure!(path.split('/').all(|name| name != ".."), "{sandbox}:{path}: a path in a sandbox has no ..");
                Ok(Self::Inside { sandbox: sandbox.to_owned(), path: format!("/{}", path.trim_start_matches('/')) })
            }
            _ => Ok(Self::Here(text.into())),
        }
    }
}

/// A path in a sandbox.
struct Inside<'a> {
    connection: &'a Connection,
    sandbox: &'a str,
    /// From its root on.
    path: &'a str,
}

impl Inside<'_> {
    /// Puts a file or folder of this machine there.
    async fn put(&self, source: &Path, bar: ProgressBar) -> anyhow::Result<()> {
        let meta = fs::symlink_metadata(source).with_context(|| source.display().to_string())?;
        let is_contents = is_contents(source);
        ensure!(!is_contents || meta.is_dir(), "{} is no folder", source.display());
        let name = || std::path::absolute(source).ok().and_then(|path| path.file_name().map(ToOwned::to_owned));
        // Into which folder, and under which name; none: what is in the source, without a name of its own.
        let (folder, name) = match self.find().await? {
            Found::Folder if is_contents => (self.path, None),
            Found::Folder => (
                self.path,
                Some(name().with_context(|| format!("{} has no name; {}/. is what is in it", source.display(), source.display()))?),
            ),
            Found::Other if meta.is_dir() => bail!("{}:{} is there, and is no folder", self.sandbox, self.path),
            Found::Other | Found::Nothing => {
                ensure!(!self.path.ends_with('/') || meta.is_dir(), "{}:{} is no folder that is there", self.sandbox, self.path);
                let (folder, name) = self.path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", self.path));
                (folder, Some(name.into()))
            }
        };
        let folder = if folder.is_empty() { "/" } else { folder };
        let owner = self.owner_of(folder).await?;
        let (writer, pieces) = pipe::writer(bar.clone());
        let packing = {
            let (source, name) = (source.to_owned(), name);
            tokio::task::spawn_blocking(move || pack(&source, name.as_deref(), owner, writer))
        };
        let request = self.connection.request(Method::PUT, &["v1", "sandboxes", self.sandbox, "archive"], &[("path", folder)]);
        let body =
            reqwest::Body::wrap_stream(futures_util::stream::unfold(pieces, async |mut pieces| Some((pieces.recv().await?, pieces))));
        let sent = self.connection.send(request.header("content-type", "application/x-tar").body(body)).await;
        bar.finish_and_clear();
        // A failure here is why the service heard no whole archive; but not hearing on is only what a refusal makes of it.
        let left_out = match (packing.await?, &sent) {
            (Err(error), Err(_)) if is_unread(&error) => Vec::new(),
            (packed, _) => packed?,
        };
        sent?;
        tell_left_out(left_out.iter().map(|path| path.display().to_string()));
        Ok(())
    }

    /// Puts what is in the archive on standard input there.
    async fn put_archive(&self, bar: ProgressBar) -> anyhow::Result<()> {
        let (mut writer, pieces) = pipe::writer(bar.clone());
        // Not joined: a read(2) that waits for someone who types ends with this process.
        std::thread::spawn(move || match io::copy(&mut io::stdin().lock(), &mut writer).and_then(|_| writer.flush()) {
            Ok(()) => {}
            Err(_) => writer.fail(),
        });
        let request = self.connection.request(Method::PUT, &["v1", "sandboxes", self.sandbox, "archive"], &[("path", self.path)]);
        let body =
            reqwest::Body::wrap_stream(futures_util::stream::unfold(pieces, async |mut pieces| Some((pieces.recv().await?, pieces))));
        let sent = self.connection.send(request.header("content-type", "application/x-tar").body(body)).await;
        bar.finish_and_clear();
        sent?;
        Ok(())
    }

    /// Takes it to this machine.
    async fn take(&self, target: &Path, bar: ProgressBar) -> anyhow::Result<()> {
        let found = self.find().await?;
        ensure!(found != Found::Nothing, "{}:{} is not there", self.sandbox, self.path);
        let is_contents = is_contents(Path::new(self.path));
        ensure!(!is_contents || found != Found::Other, "{}:{} is no folder", self.sandbox, self.path);
        let is_root = self.path.split('/').all(|part| part.is_empty() || part == ".");
        let has_slash = target.as_os_str().as_encoded_bytes().ends_with(b"/");
        // Into which folder, and under which name; none: under no name of its own.
        let (folder, name): (PathBuf, Option<OsString>) = match fs::metadata(target) {
            Ok(meta) if meta.is_dir() => {
                let own = self.path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
                (target.to_owned(), (!is_contents && !is_root).then(|| own.into()))
            }
            Ok(_) if found == Found::Folder => bail!("{} is there, and is no folder", target.display()),
            Ok(_) => place_of(target)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                ensure!(!has_slash || found != Found::Other, "{} is no folder that is there", target.display());
                place_of(target)?
            }
            Err(error) => return Err(error).with_context(|| target.display().to_string()),
        };
        let opened: OwnedFd = File::open(&folder).with_context(|| folder.display().to_string())?.into();
        let (opened, naming) = match (name, is_contents || is_root) {
            (Some(name), false) => (opened, Naming::Top(name)),
            // A folder of a new name, for what is in another.
            (Some(name), true) => {
                let target = folder.join(name);
                fs::create_dir(&target)
                    .or_else(|error| if target.is_dir() { Ok(()) } else { Err(error) })
                    .with_context(|| target.display().to_string())?;
                (File::open(&target)?.into(), if is_root { Naming::AsItIs } else { Naming::Contents })
            }
            (None, _) => (opened, if is_root { Naming::AsItIs } else { Naming::Contents }),
        };
        let (to, reader) = pipe::reader(bar.clone());
        let unpacking = tokio::task::spawn_blocking(move || unpack::unpack(reader, &opened, &naming));
        let received = self.receive(to).await;
        bar.finish_and_clear();
        let unpacked = unpacking.await?;
        received?;
        tell_left_out(unpacked?.into_iter());
        Ok(())
    }

    /// Writes it to standard output.
    async fn take_archive(&self, bar: ProgressBar) -> anyhow::Result<()> {
        let (to, mut reader) = pipe::reader(bar.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let mut stdout = io::stdout().lock();
            io::copy(&mut reader, &mut stdout).and_then(|_| stdout.flush())
        });
        let received = self.receive(to).await;
        bar.finish_and_clear();
        let written = writing.await?;
        received?;
        Ok(written?)
    }

    /// The archive, piece by piece. An error only if it did not come whole; one who does not take it knows why.
    async fn receive(&self, to: tokio::sync::mpsc::Sender<pipe::Piece>) -> anyhow::Result<()> {
        let path = self.path.trim_end_matches("/.");
        let path = if path.is_empty() { "/" } else { path };
        let request = self.connection.request(Method::GET, &["v1", "sandboxes", self.sandbox, "archive"], &[("path", path)]);
        let mut stream = self.connection.send(request).await?.bytes_stream();
        loop {
            let failed = match tokio::time::timeout(SILENCE_MAX, stream.next()).await {
                Ok(None) => return Ok(()),
                Ok(Some(Ok(bytes))) => {
                    if to.send(Ok(bytes.to_vec())).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
                Ok(Some(Err(error))) => anyhow::Error::new(error.without_url()),
                Err(_) => anyhow::anyhow!("nothing came for {} s", SILENCE_MAX.as_secs()),
            };
            // Whoever reads takes no part for the whole.
            drop(to.send(Err(io::Error::other("it broke off"))).await);
            return Err(failed.context("what came is not whole"));
        }
    }

    async fn find(&self) -> anyhow::Result<Found> {
        let query = [("list", "true"), ("limit", "1")];
        match self.connection.send(self.connection.get(&self.file(self.path), &query)).await {
            Ok(_) => Ok(Found::Folder),
            Err(error) => match code_of(&error) {
                Some("file_not_found") => Ok(Found::Nothing),
                Some("file_unfit") => Ok(Found::Other),
                _ => Err(error.context(format!("{}:{}", self.sandbox, self.path))),
            },
        }
    }

    async fn owner_of(&self, folder: &str) -> anyhow::Result<Owner> {
        let asked = self.connection.ask(self.connection.get(&self.file(folder), &[("stat", "true")])).await;
        let Entry { uid, gid } = asked.with_context(|| format!("{}:{folder}", self.sandbox))?;
        Ok(Owner { uid, gid })
    }

    fn file<'a>(&'a self, path: &'a str) -> Vec<&'a str> {
        ["v1", "sandboxes", self.sandbox, "files"]
            .into_iter()
            .chain(path.split('/').filter(|part| !part.is_empty() && *part != "."))
            .collect()
    }
}

/// Whether it ends in `/.`: what is in a folder.
fn is_contents(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.ends_with(b"/.") || bytes == b"."
}

/// The folder of a path, and its name there.
fn place_of(target: &Path) -> anyhow::Result<(PathBuf, Option<OsString>)> {
    let absolute = std::path::absolute(target)?;
    let (Some(folder), Some(name)) = (absolute.parent(), absolute.file_name()) else { bail!("{} has no name", target.display()) };
    Ok((folder.to_owned(), Some(name.to_owned())))
}

/// Writes an archive of it, and says what was left out.
fn pack(source: &Path, name: Option<&std::ffi::OsStr>, owner: Owner, writer: pipe::PipeWriter) -> anyhow::Result<Vec<PathBuf>> {
    let mut packer = Packer::new(writer, Some(owner));
    let mut add = || match name {
        Some(name) => packer.add(source, Path::new(name)),
        None => {
            let mut entries: Vec<_> = fs::read_dir(source).with_context(|| source.display().to_string())?.collect::<Result<_, _>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            entries.into_iter().try_for_each(|entry| packer.add(&entry.path(), Path::new(&entry.file_name())))
        }
    };
    let added = add();
    let (mut writer, left_out) = packer.finish()?;
    match added.and_then(|()| Ok(writer.flush()?)) {
        Ok(()) => Ok(left_out),
        Err(error) => {
            writer.fail();
            Err(error)
        }
    }
}

/// Whether the other end of a pipe was gone.
fn is_unread(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// How many bytes its files have; what cannot be read counts for nothing, and is told when it is copied.
fn size_of(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    if !meta.is_dir() {
        return meta.len();
    }
    fs::read_dir(path).map_or(0, |entries| entries.filter_map(Result::ok).map(|entry| size_of(&entry.path())).sum())
}

fn tell_left_out(names: impl Iterator<Item = String>) {
    for name in names {
        note(&format!("left out, no file, folder or link: {}", super::table::plain(&name)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_sandbox_before_its_colon_is_inside() {
        let inside = |sandbox: &str, path: &str| End::Inside { sandbox: sandbox.into(), path: path.into() };
        assert_eq!(End::of("web:/etc/x".into()).unwrap(), inside("web", "/etc/x"));
        assert_eq!(End::of("web:work/a:b".into()).unwrap(), inside("web", "/work/a:b"));
        assert_eq!(End::of("./a:b".into()).unwrap(), End::Here("./a:b".into()));
        assert_eq!(End::of("/a:b".into()).unwrap(), End::Here("/a:b".into()));
        assert_eq!(End::of("-".into()).unwrap(), End::Standard);
        assert!(End::of("web:".into()).is_err());
        assert!(End::of("web:/a/..".into()).is_err() && End::of("web:../b".into()).is_err());
        assert_eq!(End::of("web:/a..b".into()).unwrap(), inside("web", "/a..b"));
    }

    #[test]
    fn a_dot_at_the_end_means_what_is_in_a_folder() {
        assert!(is_contents(Path::new("a/.")) && is_contents(Path::new(".")) && is_contents(Path::new("/.")));
        assert!(!is_contents(Path::new("a/.hidden")) && !is_contents(Path::new("a.")));
    }

    #[test]
    fn a_folder_is_packed_with_or_without_its_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "1").unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        let packed = |name: Option<&str>| {
            let (writer, mut pieces) = pipe::writer(ProgressBar::hidden());
            pack(folder.path(), name.map(std::ffi::OsStr::new), Owner { uid: 7, gid: 8 }, writer).unwrap();
            let mut bytes = Vec::new();
            while let Ok(piece) = pieces.try_recv() {
                bytes.extend(piece.unwrap());
            }
            let mut archive = tar::Archive::new(&bytes[..]);
            let told = |entry: io::Result<tar::Entry<'_, &[u8]>>| {
                let entry = entry.unwrap();
                (entry.path().unwrap().display().to_string(), entry.header().uid().unwrap(), entry.header().gid().unwrap())
            };
            archive.entries().unwrap().map(told).collect::<Vec<_>>()
        };
        let names =
            |told: Vec<(String, u64, u64)>| told.into_iter().map(|(name, ..)| name.trim_end_matches('/').to_owned()).collect::<Vec<_>>();
        assert!(packed(None).iter().all(|(_, uid, gid)| (*uid, *gid) == (7, 8)));
        assert_eq!(names(packed(None)), ["a", "b"]);
        assert_eq!(names(packed(Some("c"))), ["c", "c/a", "c/b"]);
    }
}
