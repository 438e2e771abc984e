use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
            net::UnixListener,
        },
    },
    path::Path,
};

use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags, fsetxattr, fstat, mknodat, open};

use super::*;
use crate::{
    init::tree::Place,
    unpack::{Bounds, Target, unpack, unpack_archive},
};

fn place(root: &Path) -> Place {
    let folder = |path: &Path| open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    Place { root: folder(root), proc: folder(Path::new("/proc")), upper: folder(root), lower: vec![] }
}

fn layer_of(root: &Path, bytes_max: u64, entries_max: u64) -> Result<Vec<u8>, Fault> {
    let (place, mut archive) = (place(root), Vec::new());
    place.begin_layer(entries_max)?.write_to(&mut archive, bytes_max)?;
    Ok(archive)
}

/// The same tree, as it is after it was a layer.
fn unpacked(archive: &[u8]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let mut target = Target::new(open(root.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap());
    unpack_archive(archive, &mut target, Bounds { bytes: 1 << 30, entries: 1000 }).unwrap();
    root
}

#[test]
fn names_links_modes_and_kinds_come_back_as_they_were() {
    let from = tempfile::tempdir().unwrap();
    let at = |name: &str| from.path().join(name);
    fs::create_dir_all(at("deep/empty")).unwrap();
    fs::set_permissions(at("deep/empty"), fs::Permissions::from_mode(0o1770)).unwrap();
    fs::write(at("deep/tool"), "runs").unwrap();
    fs::set_permissions(at("deep/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(at("deep/tool"), at("same")).unwrap();
    let odd = [&b"\xff"[..], &[b'n'; 150]].concat();
    fs::write(from.path().join(OsStr::from_bytes(&odd)), "odd").unwrap();
    symlink("a//b/./c", at("tidy")).unwrap();
    symlink("x/".repeat(120), at("far")).unwrap();
    mknodat(CWD, at("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    fs::set_permissions(at("pipe"), fs::Permissions::from_mode(0o622)).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::File::create(at("sparse")).unwrap().set_len(300_000).unwrap();

    let to = unpacked(&layer_of(from.path(), 1 << 30, 100).unwrap());

    let there = |name: &str| to.path().join(name);
    let mode = |name: &str| fs::symlink_metadata(there(name)).unwrap().mode() & 0o7777;
    assert_eq!(fs::read_to_string(there("same")).unwrap(), "runs");
    assert_eq!(fs::metadata(there("same")).unwrap().ino(), fs::metadata(there("deep/tool")).unwrap().ino());
    assert_eq!((mode("same"), mode("deep/empty"), mode("pipe")), (0o4755, 0o1770, 0o622));
    assert!(fs::symlink_metadata(there("pipe")).unwrap().file_type().is_fifo());
    assert_eq!(fs::read_to_string(to.path().join(OsStr::from_bytes(&odd))).unwrap(), "odd");
    assert_eq!(fs::read_link(there("tidy")).unwrap().as_os_str(), "a//b/./c");
    assert_eq!(fs::read_link(there("far")).unwrap().as_os_str(), "x/".repeat(120).as_str());
    assert_eq!(fs::read(there("sparse")).unwrap(), vec![0; 300_000]);
    assert!(!there("socket").exists(), "a socket is nothing without who made it");
    let modified = |root: &Path| fs::metadata(root.join("deep")).unwrap().mtime();
    assert_eq!(modified(from.path()), modified(to.path()));
}

#[test]
fn extended_attributes_that_tar_can_hold_come_along() {
    let from = tempfile::tempdir().unwrap();
    let file = fs::File::create(from.path().join("file")).unwrap();
    for (name, value) in [("user.plain", &b"a=b\xff"[..]), ("user.lines", b"a\nb"), ("user.odd=name", b"c")] {
        fsetxattr(&file, name, value, XattrFlags::empty()).unwrap();
    }
    fs::create_dir(from.path().join("folder")).unwrap();
    let inner = fs::File::open(from.path().join("folder")).unwrap();
    fsetxattr(&inner, "user.of-folder", b"d", XattrFlags::empty()).unwrap();

    let to = unpacked(&layer_of(from.path(), 1 << 30, 100).unwrap());

    let value = |path: &str, name: &str| {
        let mut value = [0; 16];
        let length = fgetxattr(fs::File::open(to.path().join(path)).unwrap(), name, &mut value[..])?;
        Ok::<_, Errno>(value[..length].to_vec())
    };
    assert_eq!(value("file", "user.plain").unwrap(), b"a=b\xff");
    assert_eq!(value("folder", "user.of-folder").unwrap(), b"d");
    assert_eq!((value("file", "user.lines"), value("file", "user.odd=name")), (Err(Errno::NODATA), Err(Errno::NODATA)));
}

#[test]
fn a_name_that_means_a_deletion_is_no_part_of_a_layer() {
    let from = tempfile::tempdir().unwrap();
    fs::create_dir(from.path().join("folder")).unwrap();
    fs::write(from.path().join("folder/.wh.file"), "").unwrap();

    let refused = layer_of(from.path(), 1 << 30, 100).unwrap_err();

    assert_eq!(refused.kind, FaultKind::WrongKind);
    assert!(refused.message.starts_with("/folder/.wh.file: "), "{refused}");
}

#[test]
fn no_name_makes_a_layer_look_packed() {
    let from = tempfile::tempdir().unwrap();
    // What gzip begins with.
    let name = OsStr::from_bytes(b"\x1f\x8b\x08");
    fs::write(from.path().join(name), "plain").unwrap();
    let mut layer = tempfile::tempfile().unwrap();
    layer.write_all(&layer_of(from.path(), 1 << 20, 10).unwrap()).unwrap();
    layer.rewind().unwrap();

    let to = tempfile::tempdir().unwrap();
    let mut target = Target::new(open(to.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap());
    unpack(std::iter::once(layer), &mut target, Bounds { bytes: 1 << 20, entries: 10 }).unwrap();

    assert_eq!(fs::read_to_string(to.path().join(name)).unwrap(), "plain");
}

#[test]
fn a_path_that_no_image_can_have_is_refused_before_it_is_read() {
    let from = tempfile::tempdir().unwrap();
    let mut folder = open(from.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..17 {
        rustix::fs::mkdirat(&folder, "n".repeat(250), Mode::from_raw_mode(0o755)).unwrap();
        folder = rustix::fs::openat(&folder, "n".repeat(250), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    }

    let refused = layer_of(from.path(), 1 << 30, 100).unwrap_err();

    assert_eq!(refused.kind, FaultKind::TooLarge);
    assert!(refused.message.ends_with("its path is too long for an image"), "{refused}");
}

#[test]
fn a_file_that_has_the_number_of_one_that_went_is_another() {
    let from = tempfile::tempdir().unwrap();
    let found = |name: &str| open(from.path().join(name), OFlags::PATH, Mode::empty()).unwrap();
    let made = |file: &OwnedFd| Identity::of(file.as_fd(), &fstat(file).unwrap()).unwrap().made.unwrap();
    fs::write(from.path().join("one"), "").unwrap();
    fs::hard_link(from.path().join("one"), from.path().join("of-one")).unwrap();
    let one = found("one");
    let stat = fstat(&one).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    // The kernel's clock of files goes in ticks.
    let next = loop {
        fs::write(from.path().join("next"), "").unwrap();
        let next = found("next");
        if made(&next) != made(&one) {
            break next;
        }
        assert!(std::time::Instant::now() < deadline, "its clock stands still");
        fs::remove_file(from.path().join("next")).unwrap();
    };
    let mut layer = Layer::new(&stat, 10);

    assert_eq!(layer.first_name(one.as_fd(), &stat, b"one").unwrap(), None);
    // As if it had the number, and as many names.
    assert_eq!(layer.first_name(next.as_fd(), &stat, b"next").unwrap(), None);
    assert_eq!(layer.first_name(found("of-one").as_fd(), &stat, b"of-one").unwrap().unwrap(), b"one", "the control");
}

#[test]
fn a_layer_has_as_many_entries_and_bytes_as_it_may_have_and_no_more() {
    let from = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::write(from.path().join(name), [7; 512]).unwrap();
    }
    // The root; header and content of each; and two blocks at the end.
    let bytes = 512 + 3 * 1024 + 1024;

    assert_eq!(layer_of(from.path(), bytes, 4).unwrap().len() as u64, bytes);
    assert_eq!(layer_of(from.path(), bytes, 3).unwrap_err().kind, FaultKind::TooLarge);
    assert_eq!(layer_of(from.path(), bytes - 1, 4).unwrap_err().kind, FaultKind::TooLarge);
}

#[test]
fn a_file_that_is_too_large_is_not_read() {
    let from = tempfile::tempdir().unwrap();
    fs::File::create(from.path().join("hole")).unwrap().set_len(1 << 40).unwrap();

    assert_eq!(layer_of(from.path(), 1 << 35, 10).unwrap_err().kind, FaultKind::TooLarge);
}

#[test]
fn of_what_is_mounted_the_folder_alone_is_told() {
    // What the kernel shows there is of other devices than `/`, wherever this runs.
    let proc = Path::new("/proc");
    let mut layer = Layer::new(&rustix::fs::stat(proc).unwrap(), 10);
    let elsewhere = rustix::fs::stat("/").unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o700);
    header.set_uid(7);

    assert!(layer.is_mounted(&elsewhere) && !layer.is_mounted(&rustix::fs::stat(proc).unwrap()));
    let header = plain_folder(header);
    assert_eq!((header.mode().unwrap(), header.uid().unwrap()), (0o755, 0));
    layer.admit(b"name", b"name").unwrap();
}

#[test]
fn an_archive_that_is_no_layer_is_as_plain_as_it_was() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("first"), "twice").unwrap();
    fs::hard_link(from.path().join("first"), from.path().join("second")).unwrap();
    let (place, mut archive) = (place(from.path()), Vec::new());

    place.begin_pack(&crate::tree::TreePath::default()).unwrap().write_to(&mut archive, 1 << 20).unwrap();

    let mut contents = Vec::new();
    for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
        let mut content = String::new();
        entry.unwrap().read_to_string(&mut content).unwrap();
        contents.push(content);
    }
    assert_eq!(contents, ["twice", "twice"]);
}
