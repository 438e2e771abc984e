//! Watches of folders of this machine, where the kernel tells what happens.

use std::{fs, path::Path};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open};

use super::*;
use crate::{
    sys,
    tree::{Notice, read_frame},
};

/// Runs this with an empty folder, on a thread that goes into folders by itself: where a process is holds for all of its threads else.
pub(super) fn apart<T: Send>(test: impl FnOnce(&Path) -> T + Send) -> T {
    let folder = tempfile::tempdir().unwrap();
    let alone = || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        test(folder.path())
    };
    std::thread::scope(|scope| scope.spawn(alone).join().unwrap())
}

/// Has this call of this thread's fail from now on.
pub(super) fn refuse(call: libc::c_long, errno: Errno) {
    let instruction = |code: u32, jf, k| libc::sock_filter { code: u16::try_from(code).unwrap(), jt: 0, jf, k };
    let failing = libc::SECCOMP_RET_ERRNO | errno.raw_os_error().cast_unsigned();
    let program = [
        // The number of the call comes first in what a filter sees (seccomp(2)).
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, u32::try_from(call).unwrap()),
        instruction(libc::BPF_RET | libc::BPF_K, 0, failing),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    rustix::thread::set_no_new_privs(true).unwrap();
    sys::set_seccomp_filter(&program).unwrap();
}

/// A place whose root is this folder.
pub(super) fn place(folder: &Path) -> Place {
    let found = |path: &Path| open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    Place { root: found(folder), proc: found(Path::new("/proc")), upper: found(folder), lower: Vec::new() }
}

/// Watches `work` in this folder. With the other end of the socket.
fn watching(folder: &Path) -> (Watch, UnixStream) {
    let folders = Folders::watch(&place(folder), &TreePath::parse(b"work").unwrap(), true).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Watch { folders, outbox: Outbox::new(ours).unwrap(), halves: Vec::new(), is_short: false }, theirs)
}

/// What these events are told as.
fn told(watch: &mut Watch, theirs: &mut UnixStream, events: Vec<Seen>) -> Vec<String> {
    for seen in events {
        assert_eq!(watch.take(seen), None);
    }
    let mut socket = watch.outbox.socket().try_clone().unwrap();
    watch.outbox.send_rest(&mut socket).unwrap();
    let reply: Option<Reply> = read_frame(theirs).unwrap();
    let Some(Reply::Noticed { notices }) = reply else { panic!("{reply:?}") };
    notices.iter().map(in_short).collect()
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
fn what_happens_in_a_folder_in_the_midst_of_its_move_is_a_gap_behind_which_all_is_watched() {
    apart(|folder| {
        fs::create_dir_all(folder.join("work/a")).unwrap();
        let (mut watch, mut theirs) = watching(folder);
        fs::rename(folder.join("work/a"), folder.join("work/b")).unwrap();
        fs::create_dir(folder.join("work/b/in")).unwrap();
        let mut events = watch.read().unwrap();
        assert_eq!(events.len(), 3);
        // As if another processor had been as fast.
        events.swap(1, 2);

        assert_eq!(told(&mut watch, &mut theirs, events), ["Moved a to b", "Overflow"]);

        fs::write(folder.join("work/b/in/f"), "").unwrap();
        let events = watch.read().unwrap();
        assert_eq!(told(&mut watch, &mut theirs, events), ["Created b/in/f"]);
    });
}

#[test]
fn what_happens_in_a_folder_that_is_let_go_in_the_midst_of_its_move_is_a_gap() {
    apart(|folder| {
        fs::create_dir_all(folder.join("work/a")).unwrap();
        fs::write(folder.join("work/a/f"), "").unwrap();
        let (mut watch, mut theirs) = watching(folder);
        fs::rename(folder.join("work/a"), folder.join("work/b")).unwrap();
        fs::remove_file(folder.join("work/b/f")).unwrap();
        fs::create_dir(folder.join("work/c")).unwrap();
        let [from, to, removed, created] = <[Seen; 4]>::try_from(watch.read().unwrap()).ok().unwrap();

        let events = vec![from, created, removed, to];
        assert_eq!(told(&mut watch, &mut theirs, events), ["Moved a to b", "Created c", "Overflow"]);
    });
}

/// Whether a watch goes on after an overflow, if this call fails from then on.
fn goes_on_without(call: libc::c_long, errno: Errno) -> bool {
    apart(|folder| {
        fs::create_dir_all(folder.join("work/in")).unwrap();
        let (mut watch, _theirs) = watching(folder);
        refuse(call, errno);
        let overflow = Seen { watch: -1, what: ReadFlags::QUEUE_OVERFLOW, cookie: 0, name: None };
        watch.take_all(vec![overflow]).is_ok_and(|end| end.is_none())
    })
}

#[test]
fn a_watch_whose_topmost_folder_cannot_be_watched_anew_ends() {
    assert!(!goes_on_without(libc::SYS_openat, Errno::NFILE));
    assert!(!goes_on_without(libc::SYS_inotify_add_watch, Errno::NOMEM));
    // With the topmost the rest can be asked for again, and its end is heard.
    assert!(goes_on_without(libc::SYS_getdents64, Errno::IO));
    assert!(goes_on_without(libc::SYS_mkdirat, Errno::NOMEM), "the control: a call that is not made");
}

#[test]
fn a_watch_ends_that_is_deaf_since_a_folder_arrived() {
    apart(|folder| {
        fs::create_dir_all(folder.join("work/a")).unwrap();
        let (mut watch, _theirs) = watching(folder);
        fs::rename(folder.join("work/a"), folder.join("work/b")).unwrap();
        fs::create_dir(folder.join("work/b/in")).unwrap();
        let mut events = watch.read().unwrap();
        events.swap(1, 2);
        refuse(libc::SYS_inotify_add_watch, Errno::NOMEM);

        assert!(watch.take_all(events).is_err());
    });
}

#[test]
fn a_move_with_nothing_in_its_midst_is_no_gap() {
    apart(|folder| {
        fs::create_dir_all(folder.join("work/a")).unwrap();
        let (mut watch, mut theirs) = watching(folder);
        fs::rename(folder.join("work/a"), folder.join("work/b")).unwrap();
        fs::create_dir(folder.join("work/b/in")).unwrap();
        let events = watch.read().unwrap();

        assert_eq!(told(&mut watch, &mut theirs, events), ["Moved a to b", "Created b/in"]);
    });
}

#[test]
fn folders_whose_paths_outgrow_what_is_told_are_watched_no_more_and_that_is_told() {
    apart(|folder| {
        let deep = vec!["n".repeat(250); 10].join("/");
        fs::create_dir_all(folder.join("work/a").join(&deep)).unwrap();
        fs::create_dir_all(folder.join("work/b").join(&deep)).unwrap();
        let (mut watch, mut theirs) = watching(folder);
        assert_eq!(watch.folders.count(), 23);
        let below = format!("a/{deep}/b");

        fs::rename(folder.join("work/b"), folder.join("work").join(&below)).unwrap();
        let events = watch.read().unwrap();

        assert_eq!(told(&mut watch, &mut theirs, events), [format!("Moved b to {below}"), "Unwatched".to_owned()]);
        // Those of up to 2513 + 6 * 251 bytes.
        assert_eq!(watch.folders.count(), 19);
        fs::write(folder.join("work").join(&below).join("f"), "").unwrap();
        let events = watch.read().unwrap();
        assert!(told(&mut watch, &mut theirs, events).contains(&format!("Created {below}/f")));
    });
}

#[test]
fn a_draft_is_known_by_its_name_and_nothing_else_is_one() {
    assert!(is_draft(format!(".mayfly-{}", uuid::Uuid::new_v4().simple()).as_bytes()));
    assert!(!is_draft(b".mayfly-notes") && !is_draft(b".mayfly-"));
    assert!(is_like_unnamed(b"#12") && !is_like_unnamed(b"#") && !is_like_unnamed(b"#1.txt") && !is_like_unnamed(b"12"));
}
