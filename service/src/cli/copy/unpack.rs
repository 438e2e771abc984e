//! What an archive out of a sandbox holds, put below a folder of this machine. A stranger made it: whatever it says, nothing of it leads out of that folder.
//!
//! Each name is opened from the folder above it without following links, be they of the archive or there before (openat(2), `O_NOFOLLOW`), so that none has to be believed.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, fchmod, futimens, mkdirat, openat, symlinkat, unlinkat},
    io::Errno,
};
use tar::{Archive, EntryType};

/// What becomes of the first part of each name, which is that of what was packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Naming {
    /// It is this.
    Top(OsString),
    /// It is left out: what was packed is the folder itself.
    Contents,
    /// The archive has no such part: it is of the root.
    AsItIs,
}

/// A folder that gets its mode and time last: before that it has to be written to.
struct Folder {
    names: Vec<Vec<u8>>,
    mode: u32,
    modified_s: u64,
}

/// Puts it there, and says what was left out: what is no file, folder or link.
pub(super) fn unpack(archive: impl Read, folder: &OwnedFd, naming: &Naming) -> anyhow::Result<Vec<String>> {
    let (mut folders, mut left_out) = (Vec::new(), Vec::new());
    for entry in Archive::new(archive).entries()? {
        let mut entry = entry.context("reading the archive")?;
        let path = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&path).into_owned();
        let Some(names) = named(&path, naming).with_context(|| shown.clone())? else { continue };
        let Some((name, above)) = names.split_last() else { continue };
        let (mode, modified_s) = (entry.header().mode()? & 0o777, entry.header().mtime()?);
        let kind = entry.header().entry_type();
        if !matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::Directory | EntryType::Symlink) {
            left_out.push(shown);
            continue;
        }
        let parent = open_folders(folder, above).with_context(|| shown.clone())?;
        let done = if kind == EntryType::Directory {
            make_folder(&parent, name).map(|_| folders.push(Folder { names: names.clone(), mode, modified_s }))
        } else if kind == EntryType::Symlink {
            let target = entry.link_name_bytes().context("a link that leads nowhere")?.into_owned();
            make_way(&parent, name).and_then(|()| Ok(symlinkat(OsStr::from_bytes(&target), &parent, OsStr::from_bytes(name))?))
        } else {
            write_file(&parent, name, &mut entry, mode, modified_s)
        };
        done.with_context(|| shown.clone())?;
    }
    // The innermost first: one that may not be entered any more has nothing left to be done in it.
    for Folder { names, mode, modified_s } in folders.into_iter().rev() {
        let opened = open_folders(folder, &names)?;
        fchmod(&opened, Mode::from_raw_mode(mode))?;
        set_time(&opened, modified_s)?;
    }
    Ok(left_out)
}

/// The parts of a name below the folder; `None` if it is the folder itself.
fn named(path: &[u8], naming: &Naming) -> anyhow::Result<Option<Vec<Vec<u8>>>> {
    let mut names: Vec<Vec<u8>> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).collect();
    ensure!(names.iter().all(|name| name != b".." && !name.contains(&0)), "the archive holds a name that leads elsewhere");
    match (naming, names.first_mut()) {
        (Naming::Top(name), Some(first)) => *first = name.as_bytes().to_vec(),
        (Naming::Contents, Some(_)) => drop(names.remove(0)),
        (Naming::AsItIs, _) | (_, None) => {}
    }
    Ok((!names.is_empty()).then_some(names))
}

/// The innermost of these folders. Missing ones are made.
fn open_folders(folder: &OwnedFd, names: &[Vec<u8>]) -> anyhow::Result<OwnedFd> {
    let mut opened = folder.try_clone()?;
    for name in names {
        opened = make_folder(&opened, name)?;
    }
    Ok(opened)
}

/// A folder that is there now, and was perhaps before.
fn make_folder(parent: &OwnedFd, name: &[u8]) -> anyhow::Result<OwnedFd> {
    let name = OsStr::from_bytes(name);
    match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).with_context(|| format!("making the folder {}", name.display())),
    }
    match openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(opened) => Ok(opened),
        Err(Errno::NOTDIR | Errno::LOOP) => bail!("{} is there, and is no folder", name.display()),
        Err(error) => Err(error).with_context(|| format!("opening the folder {}", name.display())),
    }
}

/// Takes away what has this name, unless it is a folder.
fn make_way(parent: &OwnedFd, name: &[u8]) -> anyhow::Result<()> {
    match unlinkat(parent, OsStr::from_bytes(name), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => bail!("there is a folder of that name"),
        Err(error) => Err(error.into()),
    }
}

/// A new file in the place of what was there; whoever has that open keeps it. Without the bits that have it run as its owner, who is now somebody else.
fn write_file(parent: &OwnedFd, name: &[u8], content: &mut impl Read, mode: u32, modified_s: u64) -> anyhow::Result<()> {
    make_way(parent, name)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(parent, OsStr::from_bytes(name), flags, Mode::from_raw_mode(0o600))?);
    io::copy(content, &mut file)?;
    fchmod(&file, Mode::from_raw_mode(mode))?;
    let file = OwnedFd::from(file);
    set_time(&file, modified_s)
}

fn set_time(file: &OwnedFd, modified_s: u64) -> anyhow::Result<()> {
    let at = Timespec { tv_sec: i64::try_from(modified_s).unwrap_or(i64::MAX), tv_nsec: 0 };
    // A file system that knows no such time is no reason to give up the content.
    futimens(file, &Timestamps { last_access: at, last_modification: at }).ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
        path::Path,
    };

    use tar::{Builder, Header};

    use super::*;

    /// An archive of entries: kind, name, mode, and content or where a link leads. Names are as they are, however bad.
    fn archive(entries: &[(EntryType, &str, u32, &str)]) -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        for (kind, name, mode, text) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(*mode);
            header.set_mtime(1_700_000_000);
            let is_file = *kind == Regular;
            header.set_size(if is_file { text.len() as u64 } else { 0 });
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            if !is_file {
                header.set_link_name_literal(text).unwrap();
            }
            header.set_cksum();
            archive.append(&header, if is_file { text.as_bytes() } else { &[] }).unwrap();
        }
        archive.into_inner().unwrap()
    }

    fn unpacked(to: &Path, naming: &Naming, entries: &[(EntryType, &str, u32, &str)]) -> anyhow::Result<Vec<String>> {
        unpack(&archive(entries)[..], &OwnedFd::from(File::open(to).unwrap()), naming)
    }

    use EntryType::{Directory, Fifo, Regular, Symlink};

    #[test]
    fn files_folders_and_links_come_out_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let entries = [
            (Directory, "data", 0o750, ""),
            (Directory, "data/shut", 0o500, ""),
            (Regular, "data/shut/tool", 0o4755, "#!/bin/sh\n"),
            (Symlink, "data/link", 0o777, "../elsewhere"),
            (Fifo, "data/pipe", 0o644, ""),
        ];

        let left_out = unpacked(folder.path(), &Naming::Top("copy".into()), &entries).unwrap();

        let at = |name: &str| folder.path().join("copy").join(name);
        assert_eq!(fs::read_to_string(at("shut/tool")).unwrap(), "#!/bin/sh\n");
        let mode = |name: &str| fs::metadata(at(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("shut/tool"), mode("shut"), mode("")), (0o755, 0o500, 0o750));
        assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("../elsewhere"));
        assert_eq!(left_out, ["data/pipe"]);
        assert_eq!(
            fs::metadata(at("shut/tool")).unwrap().modified().unwrap(),
            std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000)
        );
    }

    #[test]
    fn the_top_is_renamed_left_out_or_not_there() {
        for (naming, path) in [(Naming::Top("b".into()), "b/f"), (Naming::Contents, "f"), (Naming::AsItIs, "a/f")] {
            let folder = tempfile::tempdir().unwrap();
            unpacked(folder.path(), &naming, &[(Directory, "a", 0o755, ""), (Regular, "a/f", 0o644, "x")]).unwrap();
            assert_eq!(fs::read_to_string(folder.path().join(path)).unwrap(), "x", "{naming:?}");
        }
    }

    #[test]
    fn no_link_leads_out() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().to_str().unwrap();
        // One of the archive's own, one that was there before, as a folder and as a file.
        let folder = tempfile::tempdir().unwrap();
        symlink(target, folder.path().join("before")).unwrap();
        for entries in [
            &[(Symlink, "out", 0o777, target), (Regular, "out/x", 0o644, "bad")][..],
            &[(Regular, "before/x", 0o644, "bad")],
            &[(Directory, "before", 0o700, "")],
            &[(Symlink, "deep", 0o777, target), (Directory, "deep/er", 0o755, "")],
        ] {
            assert!(unpacked(folder.path(), &Naming::AsItIs, entries).is_err(), "{entries:?}");
        }
        fs::write(outside.path().join("file"), "good").unwrap();
        let link = outside.path().join("file");
        let entries = [(Symlink, "f", 0o777, link.to_str().unwrap()), (Regular, "f", 0o644, "new")];
        unpacked(folder.path(), &Naming::AsItIs, &entries).unwrap();

        assert_eq!(fs::read_to_string(&link).unwrap(), "good");
        assert_eq!(fs::read_to_string(folder.path().join("f")).unwrap(), "new");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn no_name_leads_out() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();

        assert!(unpacked(&inner, &Naming::AsItIs, &[(Regular, "../x", 0o644, "bad")]).is_err());
        assert!(unpacked(&inner, &Naming::Contents, &[(Regular, "a/../../x", 0o644, "bad")]).is_err());
        unpacked(&inner, &Naming::AsItIs, &[(Regular, "/y", 0o644, "below")]).unwrap();

        assert!(!folder.path().join("x").exists());
        assert_eq!(fs::read_to_string(inner.join("y")).unwrap(), "below");
    }

    #[test]
    fn a_folder_gives_way_to_no_file() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        assert!(unpacked(folder.path(), &Naming::AsItIs, &[(Regular, "a", 0o644, "")]).is_err());
        fs::write(folder.path().join("b"), "old").unwrap();
        assert!(unpacked(folder.path(), &Naming::AsItIs, &[(Directory, "b", 0o755, "")]).is_err());
        unpacked(folder.path(), &Naming::AsItIs, &[(Regular, "b", 0o644, "new")]).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("b")).unwrap(), "new");
    }
}
