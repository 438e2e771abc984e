//! A stranger's layer is unpacked over another one beside a secret: whatever it holds, nothing outside of its folder changes, and no more comes out than may.
#![no_main]

use std::{
    fs::{self, File},
    io::{Seek as _, Write as _},
    path::Path,
};

use libfuzzer_sys::fuzz_target;
use sandbox_core::unpack::{Bounds, Target, unpack};

const BOUNDS: Bounds = Bounds { bytes: 1 << 20, entries: 200 };

fuzz_target!(|layers: (&[u8], &[u8])| {
    let outer = tempfile::tempdir().expect("a folder can be made");
    let (root, secret) = (outer.path().join("root"), outer.path().join("secret"));
    fs::create_dir(&root).expect("a folder can be made");
    fs::write(&secret, "secret").expect("a file can be written");
    let mut target = Target::new(File::open(&root).expect("it is there").into());

    let unpacked = unpack([layers.0, layers.1].into_iter().map(file), &mut target, BOUNDS);

    assert_eq!(fs::read_to_string(&secret).expect("it stays"), "secret");
    assert_eq!(fs::read_dir(outer.path()).expect("it stays").count(), 2);
    if let Ok(unpacked) = unpacked {
        assert!(unpacked.bytes <= BOUNDS.bytes && unpacked.entries <= BOUNDS.entries);
    }
    open_up(&root);
});

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file can be made");
    file.write_all(bytes).and_then(|()| file.rewind()).expect("it can be written");
    file
}

/// Folders that nobody may enter could not be removed by who is not root.
fn open_up(folder: &Path) {
    drop(fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o700)));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}
