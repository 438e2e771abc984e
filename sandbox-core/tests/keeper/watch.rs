//! Watching files of a sandbox: what is told, and what a payload and a reader can do about it.

use std::{
    io::ErrorKind,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use sandbox_core::{
    protocol::{Answer, Request},
    tree::{AT_ONCE_MAX, Ask, Existing, Fault, FaultKind, Notice, Reply, TreePath, WATCHED_FOLDERS_MAX, WatchEnd, read_frame},
};

use crate::{
    fenced::attack,
    harness::{kill, node, wait},
    tree::{Files, Sandbox, at, kind, running, started},
};

/// Somebody who watches.
struct Watcher {
    files: Files,
    is_folder: bool,
    folders: u32,
}

impl Watcher {
    fn of(sandbox: &Sandbox, path: &str, is_recursive: bool) -> Result<Self, Fault> {
        Self::of_path(sandbox, at(path), is_recursive)
    }

    fn of_path(sandbox: &Sandbox, path: TreePath, is_recursive: bool) -> Result<Self, Fault> {
        let mut files = Files::of(sandbox);
        let reply = files.ask(Ask::Watch { path, is_recursive })?;
        let Reply::Watching { is_folder, folders } = reply else { panic!("{reply:?}") };
        Ok(Self { files, is_folder, folders })
    }

    /// What is told up to this, with it. That a new folder is given its mode may be told with it or a moment later.
    fn until(&mut self, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|told| told != last) {
            match read_frame(&mut self.files.0) {
                // What is told together may go on behind it.
                Ok(Some(Reply::Noticed { notices })) => {
                    let told = notices.iter().map(in_short);
                    seen.extend(told.filter(|told| !(told.starts_with("Attributes ") && told.ends_with('/'))));
                }
                other => panic!("{other:?} after {seen:?}, without {last}"),
            }
            if let Some(place) = seen.iter().position(|told| told == last) {
                assert_eq!(place + 1, seen.len(), "there is more behind {last}: {seen:?}");
            }
        }
        seen
    }

    /// The next so many, or a few more.
    fn some(&mut self, count: usize) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.len() < count {
            match read_frame(&mut self.files.0) {
                Ok(Some(Reply::Noticed { notices })) => seen.extend(notices.iter().map(in_short)),
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        seen
    }

    /// How it ends, whatever is told before.
    fn end(mut self) -> WatchEnd {
        loop {
            match read_frame(&mut self.files.0).unwrap() {
                Some(Reply::Noticed { .. }) => {}
                Some(Reply::WatchOver(end)) => return end,
                other => panic!("{other:?}"),
            }
        }
    }
}

fn in_short(notice: &Notice) -> String {
    let text = |path: &[u8], is_folder| format!("{}{}", String::from_utf8_lossy(path), if is_folder { "/" } else { "" });
    match notice {
        Notice::Change { kind, path, from: None, is_folder, .. } => format!("{kind:?} {}", text(path, *is_folder)),
        Notice::Change { kind, path, from: Some(from), is_folder, .. } => {
            format!("{kind:?} {} to {}", text(from, *is_folder), text(path, *is_folder))
        }
        Notice::Gap { cause, .. } => format!("Gap {cause:?}"),
    }
}

fn make(files: &mut Files, path: &str) {
    files.ask(Ask::MakeFolder { path: at(path), has_parents: true, mode: None, owner: None }).unwrap();
}

fn rename(files: &mut Files, from: &str, to: &str) {
    files.ask(Ask::Rename { from: at(from), to: at(to), existing: Existing::Replace }).unwrap();
}

fn remove(files: &mut Files, path: &str) {
    files.ask(Ask::Remove { path: at(path), is_recursive: true }).unwrap();
}

/// A script that goes on when there is a file `/tmp/go`, and says `done` in `/tmp/done`.
fn waiting(before: &str, script: &str) -> Sandbox {
    running(&format!("{before}\n(while ! [ -e /tmp/go ]; do sleep 0.01; done; {script}\n: > /tmp/done) &"))
}

fn wait_for_file(files: &mut Files, path: &str) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while files.stat(path).is_err() {
        assert!(Instant::now() < deadline, "there never was {path}");
        // Whoever looks takes the time of whoever is waited for.
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_a_program_does_in_a_folder_is_told_in_its_order() {
    let sandbox = waiting(
        "mkdir /work",
        "cd /work; echo x > a; /bin/busybox chmod 600 a; /bin/busybox mv a b; mkdir d; echo y > d/unseen; rm b; rm -r d; : > last",
    );
    let mut watcher = Watcher::of(&sandbox, "/work", false).unwrap();
    assert_eq!((watcher.is_folder, watcher.folders), (true, 1));

    Files::of(&sandbox).write("/tmp/go", b"").unwrap();

    let expected = ["Created a", "Modified a", "Attributes a", "Moved a to b", "Created d/", "Removed b", "Removed d/", "Created last"];
    assert_eq!(watcher.until("Created last"), expected);
}

#[test]
fn folders_that_come_and_go_are_watched_as_long_as_they_are_there() {
    let sandbox = running("mkdir -p /work/old /elsewhere");
    let mut files = Files::of(&sandbox);
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();
    assert_eq!(watcher.folders, 2);

    files.write("/work/old/a", b"").unwrap();
    assert_eq!(watcher.until("Created old/a"), ["Created old/a"]);
    make(&mut files, "/work/x/y/z");
    let made = watcher.until("Created x/y/z/");
    assert_eq!(made.iter().filter(|told| told.starts_with("Created")).count(), 3, "{made:?}");
    files.write("/work/x/y/z/f", b"").unwrap();
    watcher.until("Created x/y/z/f");
    rename(&mut files, "/work/x", "/work/w");
    assert_eq!(watcher.until("Moved x/ to w/"), ["Moved x/ to w/"]);
    files.write("/work/w/y/z/g", b"").unwrap();
    assert_eq!(watcher.until("Created w/y/z/g"), ["Created w/y/z/g"]);
    rename(&mut files, "/work/w", "/elsewhere/w");
    assert_eq!(watcher.until("Removed w/"), ["Removed w/"]);
    files.write("/elsewhere/w/y/z/h", b"").unwrap();
    files.write("/work/still", b"").unwrap();
    assert_eq!(watcher.until("Created still"), ["Created still"], "what lies elsewhere is nobody's");
    rename(&mut files, "/elsewhere/w", "/work/back");
    let mut back = watcher.some(6);
    back.sort();
    assert_eq!(
        back,
        ["Created back/", "Created back/y/", "Created back/y/z/", "Created back/y/z/f", "Created back/y/z/g", "Created back/y/z/h"]
    );
    remove(&mut files, "/work/back/y");
    let gone = watcher.until("Removed back/y/");
    assert!(gone.contains(&"Removed back/y/z/f".to_owned()) && gone.contains(&"Removed back/y/z/".to_owned()), "{gone:?}");
}

#[test]
fn a_folder_that_was_away_for_a_moment_is_watched_again() {
    let sandbox = waiting("mkdir -p /work/a/in /elsewhere", "mv /work/a /elsewhere/a && mv /elsewhere/a /work/b; : > /work/gone-and-back");
    let mut files = Files::of(&sandbox);
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();

    files.write("/tmp/go", b"").unwrap();
    watcher.until("Created gone-and-back");
    // Longer than the second half of a move is waited for.
    files.write("/work/later", b"").unwrap();
    watcher.until("Created later");
    files.write("/work/b/in/new", b"").unwrap();

    assert_eq!(watcher.until("Created b/in/new"), ["Created b/in/new"]);
}

#[test]
fn a_folder_is_watched_whatever_its_name_is_like() {
    let sandbox = running("mkdir /work");
    let mut files = Files::of(&sandbox);
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();
    let name = format!(".mayfly-{}", "0".repeat(32));

    make(&mut files, &format!("/work/{name}"));
    watcher.until(&format!("Created {name}/"));
    files.write(&format!("/work/{name}/inside"), b"").unwrap();

    watcher.until(&format!("Created {name}/inside"));
}

#[test]
fn a_file_is_watched_by_its_name_whatever_becomes_of_it() {
    let sandbox = running("mkdir /work; echo old > /work/a; echo b > /work/b");
    let mut files = Files::of(&sandbox);
    let mut watcher = Watcher::of(&sandbox, "/work/a", true).unwrap();
    assert_eq!((watcher.is_folder, watcher.folders), (false, 1));

    files.write("/work/c", b"of nobody's interest").unwrap();
    files.write("/work/a", b"new").unwrap();
    assert_eq!(watcher.until("Created "), ["Created "], "it was replaced, and by that alone");
    remove(&mut files, "/work/a");
    assert_eq!(watcher.until("Removed "), ["Removed "]);
    rename(&mut files, "/work/b", "/work/a");
    assert_eq!(watcher.until("Created "), ["Created "]);
    // It may even be a folder for a while.
    remove(&mut files, "/work/a");
    make(&mut files, "/work/a");
    rename(&mut files, "/work/a", "/work/d");
    assert_eq!(watcher.until("Removed /"), ["Removed ", "Created /", "Removed /"]);
    files.write("/work/a", b"again").unwrap();
    assert_eq!(watcher.until("Created "), ["Created "]);
    remove(&mut files, "/work");
    assert_eq!(watcher.end(), WatchEnd::Removed);
}

#[test]
fn a_file_of_the_image_that_is_written_to_is_told_of() {
    let sandbox = waiting("", "echo x >> /etc/group; rm /etc/passwd; : > /etc/last");
    let mut watcher = Watcher::of(&sandbox, "/etc", false).unwrap();

    Files::of(&sandbox).write("/tmp/go", b"").unwrap();

    assert_eq!(watcher.until("Created last"), ["Modified group", "Removed passwd", "Created last"]);
}

#[test]
fn no_link_leads_a_watch_out_of_the_sandbox_or_elsewhere_in_it() {
    let sandbox = running("mkdir /work; /bin/busybox ln -s ../../../../../../.. /up; /bin/busybox ln -s /etc /work/link");
    let mut files = Files::of(&sandbox);
    let mut up = Watcher::of(&sandbox, "/up/tmp", false).unwrap();
    let mut work = Watcher::of(&sandbox, "/work", true).unwrap();
    let mut link = Watcher::of(&sandbox, "/work/link", false).unwrap();
    assert_eq!(work.folders, 1);

    let outside = Path::new("/tmp").join(format!("watched-{}", sandbox.id));
    std::fs::write(&outside, "").unwrap();
    std::fs::remove_file(&outside).unwrap();
    files.write("/tmp/inside", b"").unwrap();
    files.write("/etc/new", b"").unwrap();
    files.write("/work/last", b"").unwrap();

    assert_eq!(up.until("Created inside"), ["Created inside"]);
    assert_eq!(work.until("Created last"), ["Created last"], "a link below is not followed");
    assert_eq!(link.until("Created new"), ["Created new"], "one that is asked for is");
}

#[test]
fn what_is_not_there_or_not_to_be_watched_is_refused() {
    let sandbox = running("mkdir /work; /bin/busybox ln -s nowhere /work/dangling");
    let refused = |path: &str| Watcher::of(&sandbox, path, true).map(|_| ()).unwrap_err().kind;

    assert_eq!(refused("/work/none"), FaultKind::NotFound);
    assert_eq!(refused("/work/none/deeper"), FaultKind::NotFound);
    assert_eq!(refused("/work/dangling"), FaultKind::NotFound);
    assert_eq!(refused("/proc"), FaultKind::WrongKind);
    assert!(matches!(refused("/proc/self/root/etc"), FaultKind::WrongKind | FaultKind::Denied));
    assert!(Watcher::of(&sandbox, "/", true).unwrap().folders > 3, "the root is watched, but for what lies in /proc");
}

#[test]
fn a_folder_that_is_removed_or_renamed_ends_its_watch() {
    let sandbox = running("mkdir -p /work/a /work/b /work/held; (cd /work/held; exec sleep 60) &");
    let mut files = Files::of(&sandbox);
    let [a, b, held] = ["/work/a", "/work/b", "/work/held"].map(|path| Watcher::of(&sandbox, path, true).unwrap());

    remove(&mut files, "/work/a");
    rename(&mut files, "/work/b", "/work/c");
    // Somebody is in it: the kernel keeps the folder itself.
    remove(&mut files, "/work/held");

    assert_eq!((a.end(), b.end(), held.end()), (WatchEnd::Removed, WatchEnd::Removed, WatchEnd::Removed));
}

#[test]
fn names_are_told_as_their_bytes() {
    let sandbox = waiting("mkdir /work", "cd /work; : > \"$(printf 'b\\377')\"");
    let mut watcher = Watcher::of_path(&sandbox, at("/work"), false).unwrap();

    Files::of(&sandbox).write("/tmp/go", b"").unwrap();

    let reply: Option<Reply> = read_frame(&mut watcher.files.0).unwrap();
    let Some(Reply::Noticed { notices }) = reply else { panic!("{reply:?}") };
    assert!(matches!(&notices[0], Notice::Change { path, .. } if path == b"b\xff"), "{notices:?}");
}

#[test]
fn a_file_that_is_written_to_all_the_time_is_told_of_now_and_then() {
    let sandbox = waiting("mkdir /work; : > /work/a", "cd /work; for n in $(seq 20000); do echo $n; done > a; : > last");
    let mut watcher = Watcher::of(&sandbox, "/work", false).unwrap();

    Files::of(&sandbox).write("/tmp/go", b"").unwrap();

    let seen = watcher.until("Created last");
    // Twenty times a second, for whatever time it takes.
    assert!((2..2000).contains(&seen.len()), "{} told", seen.len());
    assert!(seen[..seen.len() - 1].iter().all(|told| told == "Modified a"), "{seen:?}");
}

#[test]
fn a_reader_that_is_slow_misses_some_and_is_told_so() {
    let long = "n".repeat(240);
    let sandbox = waiting("mkdir /work", &format!("cd /work; n=10000; while [ $n -lt 16000 ]; do : > {long}$n; n=$((n+1)); done"));
    let mut files = Files::of(&sandbox);
    let others = workers(&mut files);
    let mut watcher = Watcher::of(&sandbox, "/work", false).unwrap();
    let watching = worker_beside(&mut files, &others);

    files.write("/tmp/go", b"").unwrap();
    wait_for_file(&mut files, "/tmp/done");
    // It may lag behind, and then a reader that begins now is as fast as it is. Where it sleeps, it has taken in all that happened.
    let deadline = Instant::now() + Duration::from_secs(60);
    while state_of(watching) != Some('S') {
        assert!(Instant::now() < deadline, "it never comes to rest");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut seen = Vec::new();
    while !seen.contains(&"Gap SlowReader".to_owned()) {
        seen.extend(watcher.some(1));
    }
    files.write("/work/after", b"").unwrap();
    while seen.last().is_none_or(|told| told != "Created after") {
        seen.extend(watcher.some(1));
    }

    assert!((100..6000).contains(&seen.len()), "{} were told", seen.len());
    assert!(seen.iter().all(|told| told.starts_with("Created ") || told == "Gap SlowReader"));
}

#[test]
fn more_at_once_than_the_kernel_keeps_is_a_gap_behind_which_all_folders_are_watched() {
    let script = "cd /work; mkdir -p new/deep; n=0; while [ $n -lt 12000 ]; do : > a; : > b; n=$((n+1)); done; rm -r gone";
    let sandbox = waiting("mkdir -p /work/gone; : > /work/a; : > /work/b", script);
    let mut files = Files::of(&sandbox);
    let others = workers(&mut files);
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();
    let watching = worker_beside(&mut files, &others);
    let signal = |name: &str| {
        let sent = Command::new("kill").args([&format!("-{name}"), &watching.to_string()]).status().unwrap();
        assert!(sent.success());
    };

    signal("STOP");
    files.write("/tmp/go", b"").unwrap();
    wait_for_file(&mut files, "/tmp/done");
    signal("CONT");

    let deadline = Instant::now() + Duration::from_secs(60);
    let mut seen = Vec::new();
    while !seen.contains(&"Gap Overflow".to_owned()) {
        assert!(Instant::now() < deadline, "{seen:?}");
        seen.extend(watcher.some(1));
    }
    files.write("/work/new/deep/f", b"").unwrap();
    while !seen.contains(&"Created new/deep/f".to_owned()) {
        assert!(Instant::now() < deadline, "{seen:?}");
        seen.extend(watcher.some(1));
    }
}

/// The sandbox's init and its children that work on files, by the host's numbers.
fn workers(files: &mut Files) -> Vec<u32> {
    let mark = format!("/tmp/mark-{}", uuid::Uuid::new_v4().simple());
    files.write(&mark, b"").unwrap();
    let is_one = |pid: &u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains("sandbox-init") && Path::new(&format!("/proc/{pid}/root{mark}")).exists()
    };
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(is_one).collect()
}

/// The one that came to these others.
fn worker_beside(files: &mut Files, others: &[u32]) -> u32 {
    let new: Vec<u32> = workers(files).into_iter().filter(|pid| !others.contains(pid)).collect();
    let [worker] = new[..] else { panic!("one works beside the others, and not {new:?}") };
    worker
}

/// The third word of proc_pid_stat(5): `S` while a process waits for something that happens.
fn state_of(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

#[test]
fn more_folders_than_can_be_watched_are_refused_at_first_and_told_of_later() {
    // With the topmost one too many. Folders take their time in an emulated machine: one set of them, by one process.
    let sandbox = running(&format!("mkdir /work; cd /work; mkdir $(seq {WATCHED_FOLDERS_MAX})"));
    let mut files = Files::of(&sandbox);

    assert_eq!(kind(Watcher::of(&sandbox, "/work", true).map(|_| ())), FaultKind::TooLarge);
    assert_eq!(Watcher::of(&sandbox, "/work", false).unwrap().folders, 1);
    remove(&mut files, "/work/2");
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();
    assert_eq!(watcher.folders as usize, WATCHED_FOLDERS_MAX);
    make(&mut files, "/work/one-more");
    let told = watcher.until("Gap Unwatched");
    assert_eq!(told.first().map(String::as_str), Some("Created one-more/"));
    remove(&mut files, "/work/1");
    watcher.until("Removed 1/");
    make(&mut files, "/work/in-its-place/x");
    let told = watcher.some(2);
    assert_eq!(told.first().map(String::as_str), Some("Created in-its-place/"), "{told:?}");
}

#[test]
fn whoever_goes_leaves_room_for_the_next() {
    let sandbox = running("mkdir /work");
    let watchers: Vec<_> = (0..AT_ONCE_MAX).map(|_| Watcher::of(&sandbox, "/work", true).unwrap()).collect();
    assert_eq!(kind(Watcher::of(&sandbox, "/work", true).map(|_| ())), FaultKind::Busy);

    drop(watchers);

    let deadline = Instant::now() + Duration::from_secs(10);
    while Watcher::of(&sandbox, "/work", true).is_err() {
        assert!(Instant::now() < deadline, "their places were never free");
    }
}

#[test]
fn a_payload_that_uses_up_its_inotify_instances_is_named_as_the_reason() {
    // More files than the kernel gives a user instances.
    let hog = attack(&["inotify_instances", "hold"]).with("/process/rlimits/0/soft", 10_000).with("/process/rlimits/0/hard", 10_000);
    let sandbox = started(hog);

    let refused = Watcher::of(&sandbox, "/", false).map(|_| ()).unwrap_err();

    assert_eq!((refused.kind, refused.message.contains("inotify")), (FaultKind::Busy, true), "{refused:?}");
    // The control: another sandbox has its own.
    assert!(Watcher::of(&running(""), "/", false).is_ok());
}

#[test]
fn a_folder_that_takes_the_place_of_another_is_watched_there() {
    let sandbox = running("mkdir -p /work/full/in /work/empty");
    let mut files = Files::of(&sandbox);
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();

    // The name is taken by an empty folder, which goes.
    rename(&mut files, "/work/full", "/work/empty");
    assert_eq!(watcher.until("Moved full/ to empty/"), ["Moved full/ to empty/"]);
    files.write("/work/empty/in/a", b"").unwrap();

    assert_eq!(watcher.until("Created empty/in/a"), ["Created empty/in/a"]);
}

#[test]
fn one_that_is_paused_is_watched_on_when_it_goes_on() {
    let sandbox = running("mkdir /work");
    let id = sandbox.id;
    let mut watcher = Watcher::of(&sandbox, "/work", false).unwrap();

    assert_eq!(node().client().call(&Request::Pause { id }, &[]).unwrap(), Answer::Done);
    assert_eq!(node().client().call(&Request::Resume { id }, &[]).unwrap(), Answer::Done);
    Files::of(&sandbox).write("/work/after", b"").unwrap();

    assert_eq!(watcher.until("Created after"), ["Created after"]);
}

#[test]
fn a_watch_ends_with_the_sandbox_and_nothing_else_is_told() {
    let sandbox = running("mkdir /work");
    let mut watcher = Watcher::of(&sandbox, "/work", true).unwrap();

    kill(&mut node().client(), sandbox.id);
    wait(&mut node().client(), sandbox.id);

    let left = read_frame::<Reply>(&mut watcher.files.0);
    assert!(matches!(&left, Ok(None)) || left.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{left:?}");
}
