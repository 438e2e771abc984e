//! Watches of folders of this machine, where the kernel tells what happens.

use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open};

use super::*;
use crate::tree::Notice;

/// Runs this with an empty folder, on a thread that goes into folders by itself: where a process is holds for all of its threads else.
pub(super) fn apart<T: Send>(test: impl FnOnce(&Path) -> T + Send) -> T {
    let folder = tempfile::tempdir().unwrap();
    let alone = || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        test(folder.path())
    };
    std::thread::scope(|scope| scope.spawn(alone).join().unwrap())
}

/// A place whose root is this folder.
pub(super) fn place(folder: &Path) -> Place {
    let found = |path: &Path| open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    Place { root: found(folder), proc: found(Path::new("/proc")), upper: found(folder), lower: Vec::new() }
}

pub(super) fn in_short(notice: &Notice) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match notice {
        Notice::Change { kind, path, from: None, .. } => format!("{kind:?} {}", text(path)),
        Notice::Change { kind, path, from: Some(from), .. } => format!("{kind:?} {} to {}", text(from), text(path)),
        Notice::Gap { cause, .. } => format!("{cause:?}"),
    }
}

#[test]
fn a_draft_is_known_by_its_name_and_nothing_else_is_one() {
    assert!(is_draft(format!(".mayfly-{}", uuid::Uuid::new_v4().simple()).as_bytes()));
    assert!(!is_draft(b".mayfly-notes") && !is_draft(b".mayfly-"));
    assert!(is_like_unnamed(b"#12") && !is_like_unnamed(b"#") && !is_like_unnamed(b"#1.txt") && !is_like_unnamed(b"12"));
}
