//! Files of a sandbox, worked on from inside it: what can be done, and what a payload can do about it.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use sandbox_core::{
    protocol::{Answer, Cause, FailureKind, Isolation, Limit, Request, SandboxId, VERSION},
    tree::{
        AT_ONCE_MAX, Ask, Call, ChangeKind, ContentReader, ContentWriter, DEPTH_MAX, Entry, EntryKind, Existing, Fault, FaultKind, Link,
        Owner, Reply, Span, TreePath, read_frame, write_frame,
    },
};

use crate::harness::{Done, Node, Run, command, header, kill, node, output, shell, wait, wait_for_line};

/// A running sandbox, ended when this is dropped.
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let mut client = node().client();
        kill(&mut client, self.id);
        wait(&mut client, self.id);
        client.call(&Request::Forget { id: self.id }, &[]).unwrap();
    }
}

/// Runs a script that says something when all is set up, and then goes on for a while.
pub(crate) fn running(script: &str) -> Sandbox {
    started(shell(&format!("{script}\necho ready; exec sleep 60")))
}

pub(crate) fn started(mut run: Run) -> Sandbox {
    run.supervision.inodes = 20_000;
    run.supervision.wall_ms = Some(60_000);
    let mut client = node().client();
    let answer = run.launch(&mut client);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    let sandbox = Sandbox { id: run.id };
    wait_for_line(&node().log_path(run.id));
    sandbox
}

/// Somebody who works on files.
pub(crate) struct Files(pub(crate) UnixStream);

impl Files {
    pub(crate) fn of(sandbox: &Sandbox) -> Self {
        Self::open(node(), sandbox.id).unwrap()
    }

    pub(crate) fn open(node: &Node, id: SandboxId) -> Result<Self, Answer> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let answer = node.client().call(&Request::Tree { id }, &[theirs.as_fd()]).unwrap();
        if answer == Answer::Done { Ok(Self(ours)) } else { Err(answer) }
    }

    fn send(&mut self, ask: Ask) {
        match write_frame(&mut self.0, &Call { version: VERSION, ask }) {
            // It was refused before it was read: the answer says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
    }

    fn reply(&mut self) -> Reply {
        read_frame(&mut self.0).unwrap().expect("an answer")
    }

    pub(crate) fn ask(&mut self, ask: Ask) -> Result<Reply, Fault> {
        self.send(ask);
        done(self.reply())
    }

    pub(crate) fn read(&mut self, path: &str, span: Span) -> Result<Vec<u8>, Fault> {
        self.ask(Ask::Read { path: at(path), span })?;
        let mut content = Vec::new();
        ContentReader::new(&mut self.0).read_to_end(&mut content).unwrap();
        Ok(content)
    }

    pub(crate) fn write(&mut self, path: &str, content: &[u8]) -> Result<Entry, Fault> {
        self.write_as(path, content, None, None, Existing::Replace)
    }

    fn write_as(
        &mut self,
        path: &str,
        content: &[u8],
        mode: Option<u32>,
        owner: Option<Owner>,
        existing: Existing,
    ) -> Result<Entry, Fault> {
        self.send(Ask::Write { path: at(path), mode, owner, existing });
        // Whoever refuses says so before all of it is there.
        drop(ContentWriter(&mut self.0).write_all(content));
        drop(self.0.write_all(&0_u32.to_le_bytes()));
        entry(self.reply())
    }

    pub(crate) fn stat(&mut self, path: &str) -> Result<Entry, Fault> {
        self.ask(Ask::Stat { path: at(path), link: Link::Itself }).map(|reply| entry(reply).unwrap())
    }

    fn names(&mut self, path: &str) -> Vec<String> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        loop {
            let reply = self.ask(Ask::List { path: at(path), after: names.last().cloned(), max: 700 }).unwrap();
            let Reply::Page { entries, is_more } = reply else { panic!("{reply:?}") };
            names.extend(entries.into_iter().map(|entry| entry.name));
            if !is_more {
                return names.into_iter().map(|name| String::from_utf8_lossy(&name).into_owned()).collect();
            }
        }
    }

    fn pack(&mut self, path: &str, bytes_max: u64) -> Result<Vec<u8>, String> {
        self.ask(Ask::Pack { path: at(path), bytes_max }).map_err(|fault| fault.message)?;
        let mut archive = Vec::new();
        ContentReader::new(&mut self.0).read_to_end(&mut archive).map_err(|e| e.to_string())?;
        Ok(archive)
    }

    fn unpack(&mut self, path: &str, archive: &[u8]) -> Result<Reply, Fault> {
        self.send(Ask::Unpack { path: at(path), bytes_max: 1 << 20, entries_max: 100 });
        drop(ContentWriter(&mut self.0).write_all(archive));
        drop(self.0.write_all(&0_u32.to_le_bytes()));
        done(self.reply())
    }

    pub(crate) fn changes(&mut self) -> Vec<(String, ChangeKind)> {
        let mut all = Vec::new();
        self.send(Ask::Changes);
        loop {
            let reply = self.reply();
            let Reply::Changes { changes, is_more } = reply else { panic!("{reply:?}") };
            all.extend(changes.into_iter().map(|change| (String::from_utf8(change.path).unwrap(), change.kind)));
            if !is_more {
                all.sort_by(|a, b| a.0.cmp(&b.0));
                return all;
            }
        }
    }
}

pub(crate) fn at(path: &str) -> TreePath {
    TreePath::parse(path.as_bytes()).unwrap()
}

fn done(reply: Reply) -> Result<Reply, Fault> {
    if let Reply::Failed(fault) = reply { Err(fault) } else { Ok(reply) }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "whatever else it is, it is none")]
fn entry(reply: Reply) -> Result<Entry, Fault> {
    match reply {
        Reply::Entry(entry) => Ok(entry),
        Reply::Failed(fault) => Err(fault),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn kind<T: std::fmt::Debug>(done: Result<T, Fault>) -> FaultKind {
    done.unwrap_err().kind
}

#[test]
fn what_is_written_is_read_and_the_payload_sees_it() {
    let sandbox = running("mkdir /data");
    let mut files = Files::of(&sandbox);
    let content: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();

    let owner = Owner { uid: 1000, gid: 7 };
    let made = files.write_as("/data/a", &content, Some(0o640), Some(owner), Existing::Replace).unwrap();

    assert_eq!((made.kind, made.size, made.mode, made.uid, made.gid), (EntryKind::File, content.len() as u64, 0o640, 1000, 7));
    assert!(files.read("/data/a", Span::ALL).unwrap() == content);
    assert_eq!(files.read("data//a", Span::From { offset: 4, length: 8 }).unwrap(), content[4..12]);
    assert_eq!(files.read("/data/a", Span::Last { length: 5 }).unwrap(), content[content.len() - 5..]);
    assert_eq!(files.read("/data/a", Span::From { offset: 1 << 40, length: 1 }).unwrap(), b"");
    // Once more: mode and owner stay as they were.
    let replaced = files.write("/data/a", b"short").unwrap();
    assert_eq!((replaced.size, replaced.mode, replaced.uid, replaced.gid), (5, 0o640, 1000, 7));
    assert_eq!(files.names("/data"), ["a"], "something was left beside it");
}

#[test]
fn the_payload_reads_what_is_put_into_it_while_it_runs() {
    let mut run = shell("echo ready; while ! [ -e /tmp/go ]; do sleep 0.01; done; cat /tmp/go; stat -c %u:%a /tmp/go");
    run.supervision.wall_ms = Some(20_000);
    let mut client = node().client();
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    wait_for_line(&node().log_path(run.id));

    Files::open(node(), run.id).unwrap().write("/tmp/go", b"come in\n").unwrap();

    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node().log_path(run.id)).0, "ready\ncome in\n0:644\n");
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
}

#[test]
fn folders_are_made_listed_renamed_and_removed() {
    let sandbox = running("");
    let mut files = Files::of(&sandbox);
    let make = |path: &str, has_parents| Ask::MakeFolder { path: at(path), has_parents, mode: None, owner: None };

    assert_eq!(kind(files.ask(make("/a/b/c", false))), FaultKind::NotFound);
    assert_eq!(entry(files.ask(make("/a/b/c", true)).unwrap()).unwrap().mode, 0o755);
    assert!(files.ask(make("/a/b/c", true)).is_ok());
    assert_eq!(kind(files.ask(make("/a/b/c", false))), FaultKind::Exists);
    files.write("/a/b/x", b"x").unwrap();
    files.write("/a/y", b"y").unwrap();

    let rename = |from: &str, to: &str, existing| Ask::Rename { from: at(from), to: at(to), existing };
    assert_eq!(kind(files.ask(rename("/a/b/x", "/a/y", Existing::Keep))), FaultKind::Exists);
    assert_eq!(files.read("/a/y", Span::ALL).unwrap(), b"y");
    files.ask(rename("/a/b/x", "/a/y", Existing::Replace)).unwrap();
    assert_eq!(files.read("/a/y", Span::ALL).unwrap(), b"x");
    assert_eq!(files.names("/a"), ["b", "y"]);

    let remove = |path: &str, is_recursive| Ask::Remove { path: at(path), is_recursive };
    assert_eq!(kind(files.ask(remove("/a", false))), FaultKind::WrongKind);
    files.ask(remove("/a", true)).unwrap();
    assert_eq!(kind(files.stat("/a")), FaultKind::NotFound);
    assert_eq!(kind(files.ask(remove("/a", true))), FaultKind::NotFound);
    assert_eq!(kind(files.ask(remove("/", true))), FaultKind::Refused);
}

#[test]
fn a_name_that_is_taken_is_kept_if_that_is_asked_and_a_folder_always() {
    let sandbox = running("mkdir /data; echo old > /data/a");
    let mut files = Files::of(&sandbox);

    assert_eq!(kind(files.write_as("/data/a", b"new", None, None, Existing::Keep)), FaultKind::Exists);

    // After a refusal the connection is over: what was still under way must not be taken for a question.
    let mut files = Files::of(&sandbox);
    assert_eq!(files.read("/data/a", Span::ALL).unwrap(), b"old\n");
    assert_eq!(kind(files.write("/data", b"new")), FaultKind::WrongKind);
    assert!(Files::of(&sandbox).write_as("/data/b", b"new", None, None, Existing::Keep).is_ok());
}

#[test]
fn a_write_that_breaks_off_leaves_the_old_file_and_nothing_else() {
    let sandbox = running("mkdir /data; echo old > /data/a");
    for name in ["/data/a", "/data/b"] {
        let mut files = Files::of(&sandbox);
        files.send(Ask::Write { path: at(name), mode: None, owner: None, existing: Existing::Replace });
        ContentWriter(&mut files.0).write_all(&[b'x'; 300_000]).unwrap();
    }

    let mut files = Files::of(&sandbox);
    assert_eq!(files.read("/data/a", Span::ALL).unwrap(), b"old\n");
    assert_eq!(files.names("/data"), ["a"]);
}

#[test]
fn a_layer_that_is_full_says_so_and_keeps_the_old_file() {
    let sandbox = running("mkdir /data; echo old > /data/a");
    let mut files = Files::of(&sandbox);

    assert_eq!(kind(files.write("/data/a", &vec![1; 20 << 20])), FaultKind::Full);

    let mut files = Files::of(&sandbox);
    assert_eq!(files.read("/data/a", Span::ALL).unwrap(), b"old\n");
    files.write("/data/b", &vec![1; 8 << 20]).expect("what was written aside is given back");
}

#[test]
fn no_link_leads_out_of_the_sandbox() {
    let sandbox = running(
        "/bin/busybox ln -s / /root-link; /bin/busybox ln -s ../../../../../../../../etc/passwd /passwd; /bin/busybox ln -s /etc /tmp/etc",
    );
    let mut files = Files::of(&sandbox);
    let inside = files.read("/etc/passwd", Span::ALL).unwrap();
    let host = std::fs::read("/etc/passwd").unwrap();
    assert!(inside != host, "the control: the two can be told apart");

    for path in ["/passwd", "/root-link/etc/passwd", "/tmp/etc/passwd", "/root-link/root-link/passwd"] {
        assert_eq!(files.read(path, Span::ALL).unwrap(), inside, "{path}");
    }
    files.write("/root-link/from-inside", b"x").unwrap();
    assert!(!Path::new("/from-inside").exists());
    assert_eq!(files.read("/from-inside", Span::ALL).unwrap(), b"x");
    // A link is replaced, not followed: what it leads to stays.
    files.write("/passwd", b"x").unwrap();
    assert_eq!(files.read("/etc/passwd", Span::ALL).unwrap(), inside);
    assert_eq!(files.stat("/passwd").unwrap().kind, EntryKind::File);
    let link = files.stat("/tmp/etc").unwrap();
    assert_eq!((link.kind, link.target.as_deref()), (EntryKind::Link, Some(&b"/etc"[..])));
    files.ask(Ask::Remove { path: at("/root-link"), is_recursive: true }).unwrap();
    assert!(!files.names("/").is_empty(), "the link was followed");
}

/// What the kernel makes up in `/proc` leads to roots, folders and files of processes: to this process's own, were it followed.
#[test]
fn what_proc_leads_to_is_not_followed() {
    let sandbox = running("cat /proc/self/root/etc/hostname >&2");
    let mut files = Files::of(&sandbox);

    for path in ["/proc/self/root/etc/hostname", "/proc/self/cwd/etc/hostname", "/proc/self/fd/3", "/proc/self/exe", "/proc/1/root/etc"] {
        let refused = kind(files.read(path, Span::ALL));
        assert!(matches!(refused, FaultKind::WrongKind | FaultKind::Denied), "{path}: {refused:?}");
    }
    assert_eq!(kind(files.read("/proc/version", Span::ALL)), FaultKind::WrongKind);
    assert_eq!(kind(files.read("/proc/self/mem", Span::ALL)), FaultKind::WrongKind);
    assert!(files.write("/proc/self/oom_score_adj", b"0").is_err());
}

#[test]
fn a_race_of_links_leads_nowhere_else() {
    let sandbox = running(
        "mkdir /real; cd /; (while :; do mkdir swap; rm -r swap; /bin/busybox ln -s /../../../../.. swap; rm swap; done) 2>/dev/null &",
    );
    let mark = format!("raced-{}", sandbox.id);
    for round in 0..300 {
        // Whatever comes of each: it must not come of the host's.
        drop(Files::of(&sandbox).write(&format!("/swap/{mark}-{}", round % 3), b"x"));
    }

    for round in 0..3 {
        assert!(!Path::new(&format!("/{mark}-{round}")).exists());
    }
    let names = Files::of(&sandbox).names("/");
    assert!(names.iter().any(|name| name.starts_with(&mark)), "the control: the link was never followed: {names:?}");
}

#[test]
fn another_name_of_a_file_keeps_its_content() {
    let sandbox = running("mkdir /data; cd /data; echo old > a; /bin/busybox ln a b");
    let mut files = Files::of(&sandbox);

    files.write("/data/b", b"new").unwrap();

    assert_eq!(files.read("/data/a", Span::ALL).unwrap(), b"old\n");
    assert_eq!(files.read("/data/b", Span::ALL).unwrap(), b"new");
}

#[test]
fn nothing_waits_for_a_fifo_or_a_device() {
    let sandbox = running("/bin/busybox mkfifo /fifo; (cat /fifo; echo read) &");
    let mut files = Files::of(&sandbox);
    let began = Instant::now();

    for path in ["/fifo", "/dev/zero", "/dev/tty", "/dev/null", "/dev/ptmx", "/bin"] {
        assert_eq!(kind(files.read(path, Span::ALL)), FaultKind::WrongKind, "{path}");
    }
    assert!(files.pack("/fifo", 1 << 20).is_ok());

    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(files.stat("/fifo").unwrap().kind, EntryKind::Fifo);
    assert_eq!(files.stat("/dev/zero").unwrap().kind, EntryKind::Device);
    assert!(files.write("/dev/x", b"").is_err(), "/dev is read-only");
}

#[test]
fn a_huge_file_of_holes_is_read_in_parts_and_not_packed() {
    let sandbox = running("dd if=/dev/zero of=/huge bs=1 count=1 seek=1099511627776 2>/dev/null");
    let mut files = Files::of(&sandbox);

    assert_eq!(files.stat("/huge").unwrap().size, (1 << 40) + 1);
    assert_eq!(files.read("/huge", Span::Last { length: 3 }).unwrap(), [0, 0, 0]);
    assert_eq!(files.read("/huge", Span::From { offset: 1 << 39, length: 2 }).unwrap(), [0, 0]);
    let refused = files.pack("/huge", 1 << 20).unwrap_err();
    assert!(refused.contains("larger than 1048576 bytes"), "{refused}");
}

#[test]
fn ten_thousand_entries_come_each_once_in_order() {
    let sandbox = running("mkdir /many; cd /many; for n in $(seq 10000); do : > f$n; done");
    let mut files = Files::of(&sandbox);

    let names = files.names("/many");

    assert_eq!(names.len(), 10_000);
    assert!(names.is_sorted());
    files.ask(Ask::Remove { path: at("/many"), is_recursive: true }).unwrap();
    assert_eq!(kind(files.stat("/many")), FaultKind::NotFound);
}

#[test]
fn folders_nested_too_deep_are_refused_and_do_no_harm() {
    let depth = DEPTH_MAX + 50;
    let script = format!("nest() {{ mkdir $1; cd $1; n=0; while [ $n -lt {depth} ]; do mkdir d; cd d; n=$((n+1)); done; cd /; }}; nest /a");
    let sandbox = running(&script);
    let mut files = Files::of(&sandbox);

    assert!(files.pack("/a", 1 << 30).unwrap_err().contains("nested"));
    assert_eq!(kind(files.ask(Ask::Remove { path: at("/a"), is_recursive: true })), FaultKind::TooLarge);
    let longest = format!("/a{}", "/d".repeat(depth));
    assert_eq!(files.stat(&longest).unwrap().kind, EntryKind::Folder);
    files.ask(Ask::Remove { path: at(&format!("/a{}", "/d".repeat(100))), is_recursive: true }).unwrap();
    files.ask(Ask::Remove { path: at("/a"), is_recursive: true }).unwrap();
}

#[test]
fn names_are_bytes() {
    let sandbox = running("mkdir /data; cd /data; : > \"$(printf 'b\\377')\"; : > 'a\nb'");
    let mut files = Files::of(&sandbox);

    let reply = files.ask(Ask::List { path: at("/data"), after: None, max: 10 }).unwrap();

    let Reply::Page { entries, .. } = reply else { panic!("{reply:?}") };
    assert_eq!(entries.iter().map(|entry| entry.name.as_slice()).collect::<Vec<_>>(), [&b"a\nb"[..], b"b\xff"]);
    let path = TreePath::parse(b"/data/b\xff").unwrap();
    assert!(files.ask(Ask::Stat { path, link: Link::Itself }).is_ok());
}

/// A tar with one entry whose path is as it stands, for what a builder refuses to write.
fn tar_of(path: &[u8], kind: tar::EntryType, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = header(kind, 0o644);
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    if !link.is_empty() {
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    }
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, content).unwrap();
    archive.into_inner().unwrap()
}

#[test]
fn a_folder_goes_out_and_in_as_tar() {
    let sandbox = running(
        "mkdir -p /data/deep; cd /data; echo one > a; echo two > deep/b; /bin/busybox ln -s a link; /bin/busybox chmod 750 deep; mkdir /copy",
    );
    let mut files = Files::of(&sandbox);

    files.write_as("/data/a", b"one\n", None, Some(Owner { uid: 5, gid: 6 }), Existing::Replace).unwrap();

    let archive = files.pack("/data", 1 << 20).unwrap();
    let unpacked = files.unpack("/copy", &archive).unwrap();

    assert!(matches!(unpacked, Reply::Unpacked { entries: 5, bytes: 8 }), "{unpacked:?}");
    assert_eq!(files.read("/copy/data/deep/b", Span::ALL).unwrap(), b"two\n");
    let (one, deep, link) =
        (files.stat("/copy/data/a").unwrap(), files.stat("/copy/data/deep").unwrap(), files.stat("/copy/data/link").unwrap());
    assert_eq!((one.uid, one.gid, deep.mode), (5, 6, 0o750));
    assert_eq!(link.target.as_deref(), Some(&b"a"[..]));
}

#[test]
fn a_layer_is_all_of_the_tree_but_what_is_mounted_in_it() {
    let sandbox = running("mkdir /data; echo all > /data/a; /bin/busybox ln /data/a /data/b; echo hidden > /dev/shm/hidden");
    let mut files = Files::of(&sandbox);

    files.ask(Ask::Layer { bytes_max: 1 << 30, entries_max: 100_000 }).unwrap();
    let mut layer = Vec::new();
    ContentReader::new(&mut files.0).read_to_end(&mut layer).unwrap();

    let mut archive = tar::Archive::new(layer.as_slice());
    let (mut kinds, mut links) = (std::collections::BTreeMap::new(), Vec::new());
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        links.extend(entry.link_name_bytes().filter(|_| entry.header().entry_type() == tar::EntryType::Link).map(|to| to.into_owned()));
        kinds.insert(name, (entry.header().entry_type(), entry.header().mode().unwrap()));
    }
    assert_eq!((kinds["proc"], kinds["dev"]), ((tar::EntryType::Directory, 0o755), (tar::EntryType::Directory, 0o755)));
    assert!(!kinds.keys().any(|name| name.starts_with("proc/") || name.starts_with("dev/")), "{:?}", kinds.keys());
    assert!(kinds.contains_key("bin/busybox") && kinds.contains_key("etc/hostname"), "{:?}", kinds.keys());
    // Which of the two is the first is the file system's order.
    let [to] = links.as_slice() else { panic!("{links:?}") };
    let mut pair = [kinds["data/a"].0, kinds["data/b"].0].map(|kind| kind.as_byte());
    pair.sort_unstable();
    assert_eq!(pair, [tar::EntryType::Regular, tar::EntryType::Link].map(|kind| kind.as_byte()));
    assert!([&b"data/a"[..], b"data/b"].contains(&to.as_slice()));
}

#[test]
fn an_archive_leads_nowhere_else_and_brings_no_device() {
    let sandbox = running("mkdir /into; echo kept > /kept");
    use tar::EntryType::{Char, Link as HardLink, Regular, Symlink};

    for path in [&b"../kept"[..], b"/kept", b"a/../../kept", b"/into/x"] {
        assert_eq!(kind(Files::of(&sandbox).unpack("/into", &tar_of(path, Regular, "", b"bad"))), FaultKind::Refused, "{path:?}");
    }
    Files::of(&sandbox).unpack("/into", &tar_of(b"out", Symlink, "/", b"")).unwrap();
    // To this archive's entries the folder is the root: that is where the link leads.
    Files::of(&sandbox).unpack("/into", &tar_of(b"out/kept", Regular, "", b"bad")).unwrap();
    assert!(Files::of(&sandbox).unpack("/into", &tar_of(b"hard", HardLink, "../kept", b"")).is_err());
    let device = Files::of(&sandbox).unpack("/into", &tar_of(b"device", Char, "", b"")).unwrap();

    assert!(matches!(device, Reply::Unpacked { .. }));
    let mut files = Files::of(&sandbox);
    assert_eq!(files.read("/kept", Span::ALL).unwrap(), b"kept\n");
    assert_eq!(files.names("/into"), ["kept", "out"]);
    assert_eq!(
        kind(files.unpack("/into", b"this is no archive, and long enough to be taken for a header if nobody looked".repeat(20).as_slice())),
        FaultKind::Refused
    );
}

#[test]
fn an_archive_has_bounds() {
    let sandbox = running("mkdir /into");
    let mut many = tar::Builder::new(Vec::new());
    for number in 0..101 {
        many.append_data(&mut header(tar::EntryType::Regular, 0o644), format!("f{number}"), &[][..]).unwrap();
    }
    let large = tar_of(b"large", tar::EntryType::Regular, "", &vec![0; (1 << 20) + 1]);

    assert_eq!(kind(Files::of(&sandbox).unpack("/into", &many.into_inner().unwrap())), FaultKind::TooLarge);
    assert_eq!(kind(Files::of(&sandbox).unpack("/into", &large)), FaultKind::TooLarge);
}

#[test]
fn what_differs_from_the_image_is_told() {
    let sandbox = running(
        "echo x > /new; mkdir /folder; echo x > /folder/in; echo x >> /etc/group; rm /etc/passwd; rm -r /home; mkdir /home; echo x > /home/mine; rm /bin/seq; mkdir /bin/seq",
    );

    let changes = Files::of(&sandbox).changes();

    use ChangeKind::{Added, Changed, Deleted};
    let expected = [
        ("/bin", Changed),
        ("/bin/seq", Changed),
        ("/etc", Changed),
        ("/etc/group", Changed),
        ("/etc/passwd", Deleted),
        ("/folder", Added),
        ("/folder/in", Added),
        ("/home", Changed),
        ("/home/mine", Added),
        ("/home/of-another", Deleted),
        ("/new", Added),
    ];
    assert_eq!(changes, expected.map(|(path, kind)| (path.to_owned(), kind)));
    assert_eq!(Files::of(&running("")).changes(), []);
}

#[test]
fn the_processes_are_the_payloads_and_nobody_elses() {
    let sandbox = started(
        shell("x=$(head -c 1000000 /dev/zero | tr '\\0' x); sleep 61 & (exec sleep 62) & echo ready; wait")
            .with("/process/user/uid", 1000)
            .with("/process/user/gid", 1000),
    );
    let mut files = Files::of(&sandbox);
    let _another = Files::of(&sandbox);

    let deadline = Instant::now() + Duration::from_secs(10);
    let mut processes = loop {
        let reply = files.ask(Ask::Processes).unwrap();
        let Reply::Processes { processes, is_more: false } = reply else { panic!("{reply:?}") };
        if processes.iter().filter(|process| process.command.starts_with(b"sleep")).count() == 2 {
            break processes;
        }
        assert!(Instant::now() < deadline, "{processes:?}");
    };

    processes.sort_by_key(|process| process.pid);
    assert_eq!(processes.len(), 3, "{processes:?}");
    assert!(processes.iter().all(|process| process.uid == 1000 && process.threads == 1));
    assert!(processes[0].command.starts_with(b"/bin/sh\0-c\0"));
    assert_eq!((processes[0].parent, processes[1].parent), (1, processes[0].pid));
    // Before Linux 6.2 each thread holds up to 64 pages back from the count (proc_pid_stat(5) calls it inaccurate).
    assert!((700_000..20_000_000).contains(&processes[0].resident_bytes), "{processes:?}");
}

#[test]
fn so_many_work_at_once_and_when_one_goes_another_may_come() {
    let sandbox = running("");
    let mut workers: Vec<Files> = (0..AT_ONCE_MAX).map(|_| Files::of(&sandbox)).collect();
    workers.iter_mut().for_each(|files| drop(files.stat("/").unwrap()));

    let refused = || entry(Files::of(&sandbox).reply());
    assert_eq!(kind(refused()), FaultKind::Busy);

    workers.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut files = Files::of(&sandbox);
        // Whoever is refused hears so at once, and the others nothing until they ask.
        files.0.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        if read_frame::<Reply>(&mut files.0).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            files.0.set_read_timeout(None).unwrap();
            return drop(files.stat("/").unwrap());
        }
        assert!(Instant::now() < deadline, "its place was never free");
    }
}

#[test]
fn whoever_works_on_files_is_out_of_the_payloads_reach() {
    // It lists what is pid 1's child and none of its own, and tries everything that reaches a process.
    let script = "sleep 60 & own=$!
        (exec sleep 60) & other=$!
        echo ready
        while ! [ -e /tmp/go ]; do sleep 0.01; done
        for p in /proc/[0-9]*; do p=${p#/proc/}
            [ $p = 1 ] && continue; [ $p = $$ ] && continue
            case \"$(cat /proc/$p/cmdline | head -c 12)\" in sandbox-init) ;; *) continue;; esac
            echo found
            kill -9 $p 2>/dev/null && echo killed
            cat /proc/$p/environ >/dev/null 2>&1 && echo environ
            head -c 1 /proc/$p/mem >/dev/null 2>&1 && echo mem
            ls /proc/$p/fd/ 2>/dev/null | head -1
            ls /proc/$p/root/ >/dev/null 2>&1 && echo root
        done
        cat /proc/$own/environ >/dev/null && ls /proc/$own/root/ >/dev/null && kill -9 $own && echo control
        kill -9 -1
        touch /tmp/tried
        exec sleep 60";
    let sandbox = started(shell(script));
    let mut files = Files::of(&sandbox);
    files.write("/tmp/go", b"").unwrap();

    let deadline = Instant::now() + Duration::from_secs(20);
    while files.stat("/tmp/tried").is_err() {
        assert!(Instant::now() < deadline, "the payload has not come to its end");
    }

    files.stat("/etc").expect("it still answers");
    let id = sandbox.id;
    kill(&mut node().client(), id);
    wait(&mut node().client(), id);
    let (stdout, _) = output(&node().log_path(id));
    assert_eq!(stdout, "ready\nfound\ncontrol\n");
}

#[test]
fn it_ends_with_the_sandbox() {
    let run = shell("echo ready; exec sleep 60");
    let mut client = node().client();
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    wait_for_line(&node().log_path(run.id));
    let mut files = Files::open(node(), run.id).unwrap();
    files.stat("/").unwrap();

    kill(&mut client, run.id);
    wait(&mut client, run.id);

    assert!(read_frame::<Reply>(&mut files.0).unwrap_or(None).is_none());
    let answer = Files::open(node(), run.id).err().unwrap();
    assert!(matches!(&answer, Answer::Failed(failure) if failure.kind == FailureKind::Gone), "{answer:?}");
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
    assert!(matches!(Files::open(node(), run.id).err(), Some(Answer::Failed(failure)) if failure.kind == FailureKind::Gone));
}

#[test]
fn one_that_is_paused_is_left_alone_until_it_goes_on() {
    let sandbox = running("");
    let id = sandbox.id;
    assert_eq!(node().client().call(&Request::Pause { id }, &[]).unwrap(), Answer::Done);

    let refused = Files::open(node(), id).err();

    assert!(matches!(&refused, Some(Answer::Failed(failure)) if failure.kind == FailureKind::Busy), "{refused:?}");
    assert_eq!(node().client().call(&Request::Resume { id }, &[]).unwrap(), Answer::Done);
    Files::of(&sandbox).stat("/").unwrap();
}

#[test]
fn nothing_but_a_connected_stream_is_passed_in() {
    let sandbox = running("");
    let (seqpacket, _other) = rustix_pair();
    let folder: OwnedFd = std::fs::File::open("/").unwrap().into();
    let lonely: OwnedFd = std::os::unix::net::UnixListener::bind(tempfile::tempdir().unwrap().path().join("s")).unwrap().into();
    for descriptor in [seqpacket, folder, lonely] {
        let answer = node().client().call(&Request::Tree { id: sandbox.id }, &[descriptor.as_fd()]).unwrap();
        assert!(matches!(&answer, Answer::Failed(failure) if failure.kind == FailureKind::Refused), "{answer:?}");
    }
    let answer = node().client().call(&Request::Tree { id: sandbox.id }, &[]).unwrap();
    assert!(matches!(&answer, Answer::Failed(failure) if failure.kind == FailureKind::Refused), "{answer:?}");
}

fn rustix_pair() -> (OwnedFd, OwnedFd) {
    let (ours, theirs) = sandbox_core::transport::Socket::pair().unwrap();
    (ours.as_fd().try_clone_to_owned().unwrap(), theirs)
}

#[test]
fn nonsense_ends_the_conversation_and_nothing_else() {
    let sandbox = running("");
    let large = u32::MAX.to_le_bytes();
    let version = sandbox_core::tree::frame(&Call { version: VERSION + 1, ask: Ask::Changes }).unwrap();
    for nonsense in [&large[..], &[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[1, 0, 0], &version] {
        let mut files = Files::of(&sandbox);
        files.0.write_all(nonsense).unwrap();
        files.0.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = Vec::new();
        drop(files.0.read_to_end(&mut said));
        let reply: Option<Reply> = read_frame(&mut said.as_slice()).unwrap();
        assert!(matches!(&reply, None | Some(Reply::Failed(_))), "{reply:?}");
    }
    Files::of(&sandbox).stat("/").unwrap();
}

/// The control is the payload that reaches the limit itself.
#[test]
fn a_sandbox_without_room_for_a_process_says_so_and_is_not_blamed() {
    let fill = "for n in 1 2 3; do sleep 60 & done; echo ready; ";
    let full = || shell(&format!("{fill}wait")).with("/linux/resources/pids/limit", 4);
    let run = full();
    let mut client = node().client();
    assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    wait_for_line(&node().log_path(run.id));

    let mut files = Files::open(node(), run.id).unwrap();
    let refused = entry(files.reply()).unwrap_err();

    assert_eq!(refused.kind, FaultKind::Busy, "{refused}");
    kill(&mut client, run.id);
    let ending = wait(&mut client, run.id);
    assert!(!ending.limits_hit.contains(&Limit::Pids), "{ending:?}");
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
    let Done { ending, .. } = shell(&format!("{fill} (true); true")).with("/linux/resources/pids/limit", 4).run();
    assert!(ending.limits_hit.contains(&Limit::Pids), "{ending:?}");
}

#[test]
fn under_gvisor_it_is_refused() {
    let node = node();
    if !node.hello().unwrap().isolation.contains(&Isolation::Gvisor) {
        return;
    }
    let mut run =
        command(&["/bin/sleep", "30"]).with("/linux/resources/memory", serde_json::json!({ "limit": 256 << 20, "swap": 256 << 20 }));
    run.isolation = Isolation::Gvisor;
    let mut client = node.client();
    let answer = run.launch(&mut client);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");

    let refused = Files::open(node, run.id).err();

    assert!(matches!(&refused, Some(Answer::Failed(failure)) if failure.kind == FailureKind::Refused), "{refused:?}");
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    client.call(&Request::Forget { id: run.id }, &[]).unwrap();
}
