//! A keeper of its own for each test process, with one image made of busybox.

use std::{
    fs::File,
    io::{BufRead, BufReader, Seek, Write},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, OnceLock},
    time::{Duration, Instant},
};

use sandbox_core::{
    client::{Client, Tag},
    fence::{Fence, Fences},
    log,
    protocol::{
        Answer, Ending, Failure, Hello, ImageId, IoLimits, Isolation, KillReason, Launch, Launched, Layering, Medium, OutputPolicy, Record,
        Request, SandboxId, Stdin, Supervision, UnpackLimits, VolumeMount, WindowSize,
    },
};
use serde_json::{Value, json};

pub(crate) const KEEPER: &str = env!("CARGO_BIN_EXE_sandbox-keeper");

pub(crate) const IMAGE: &str = "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0";

/// A running keeper and its folders; both go when this is dropped.
#[derive(Debug)]
pub(crate) struct Node {
    child: Child,
    folder: tempfile::TempDir,
    disks: PathBuf,
}

impl Drop for Node {
    fn drop(&mut self) {
        // Fails for one that has ended already, which is fine.
        drop(self.child.kill());
        self.child.wait().unwrap();
    }
}

impl Node {
    pub(crate) fn start() -> Self {
        Self::start_as(Command::new(KEEPER))
    }

    pub(crate) fn start_weak() -> Self {
        Self::start_as(Command::new(weak_keeper()))
    }

    /// Starts it by a command line that ends with the keeper's program.
    pub(crate) fn start_as(keeper: Command) -> Self {
        let folder = tempfile::Builder::new().prefix("mfk").tempdir().unwrap();
        let disks = folder.path().join("disks");
        Self::start_in(keeper, folder, &disks)
    }

    /// One whose writable layers on disk are in `disks`.
    pub(crate) fn start_with_disks(disks: &Path) -> Self {
        Self::start_in(Command::new(KEEPER), tempfile::Builder::new().prefix("mfk").tempdir().unwrap(), disks)
    }

    /// The next keeper in the folders of one that was killed.
    pub(crate) fn start_after(killed: tempfile::TempDir) -> Self {
        let disks = killed.path().join("disks");
        Self::start_in(Command::new(KEEPER), killed, &disks)
    }

    pub(crate) fn start_in(mut keeper: Command, folder: tempfile::TempDir, disks: &Path) -> Self {
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("logs")).unwrap();
        let mut child = keeper
            .args(["--group", "0", "--socket"])
            .arg(at("keeper.sock"))
            .arg("--images")
            .arg(at("images"))
            .arg("--logs")
            .arg(at("logs"))
            .arg("--disks")
            .arg(disks)
            .arg("--volumes")
            .arg(at("volumes"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the keeper did not start");
        let node = Self { child, folder, disks: disks.to_owned() };
        let answer = node.unpack(IMAGE, vec![busybox_layer()]);
        assert!(matches!(answer, Answer::Unpacked(_)), "{answer:?}");
        node
    }

    /// Waits until the keeper has ended by itself, which must be without an error.
    pub(crate) fn wait_for_exit(mut self) {
        assert!(self.child.wait().unwrap().success());
    }

    /// Waits until it has died, as it was told to by a step that kills. Its folders stay until what this returns is dropped.
    #[cfg(feature = "fail-points")]
    pub(crate) fn died(mut self) -> tempfile::TempDir {
        let status = self.child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("keeper.sock")
    }

    /// What it says of itself.
    pub(crate) fn hello(&self) -> std::io::Result<Hello> {
        Client::connect(&self.folder.path().join("keeper.sock")).map(|(_, hello)| hello)
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.folder.path().join("keeper.sock")).unwrap().0
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The program that attacks, as one of the host's own: what works there and not inside is stopped by what is around it.
    pub(crate) fn attack_on_host(&self) -> PathBuf {
        let path = self.folder.path().join("attack");
        if !path.exists() {
            std::fs::write(&path, sandbox_attacks::PROGRAM).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        path
    }

    /// Where a file of an unpacked image lies on the host.
    pub(crate) fn image_path(&self, image: &str, path: &str) -> PathBuf {
        self.folder.path().join("images").join(image).join(path)
    }

    /// The folder of its writable layers on disk.
    pub(crate) fn disks(&self) -> &Path {
        &self.disks
    }

    /// The folder of its volumes.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.folder.path().join("volumes")
    }

    /// Kills it. Its folders stay until what this returns is dropped.
    pub(crate) fn kill(mut self) -> tempfile::TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }

    pub(crate) fn log_path(&self, id: SandboxId) -> PathBuf {
        log::path(&self.folder.path().join("logs"), id)
    }

    /// Unpacks layers, bottom first.
    pub(crate) fn unpack(&self, image: &str, layers: Vec<Vec<u8>>) -> Answer {
        let files: Vec<File> = layers.iter().map(|layer| memory(layer)).collect();
        let limits = UnpackLimits { bytes: 64 << 20, entries: 10_000, wall_ms: 20_000 };
        let request = Request::Unpack { image: image.parse().unwrap(), layers: u32::try_from(files.len()).unwrap(), limits };
        let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.client().call(&request, &descriptors).unwrap()
    }
}

/// What a keeper says that is to refuse to start.
pub(crate) fn refusal(arguments: &[&str]) -> String {
    refusal_with_logs(tempfile::tempdir().unwrap().path(), arguments)
}

/// The same, with its folder of logs.
pub(crate) fn refusal_with_logs(logs: &Path, arguments: &[&str]) -> String {
    refusal_of(Command::new(KEEPER), logs, arguments)
}

/// The same, of one that is started by a command line that ends with the keeper's program.
pub(crate) fn refusal_of(mut keeper: Command, logs: &Path, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    keeper.args(["--group", "0", "--socket"]).arg(folder.path().join("keeper.sock"));
    keeper.arg("--images").arg(folder.path().join("images")).arg("--logs").arg(logs);
    keeper.arg("--disks").arg(folder.path().join("disks")).args(arguments);
    let done = keeper.output().unwrap();
    assert!(!done.status.success(), "the keeper started: {}", String::from_utf8_lossy(&done.stdout));
    String::from_utf8_lossy(&done.stderr).into_owned()
}

/// The keeper that tests share which leave it as it was: the one that is installed.
pub(crate) fn node() -> &'static Node {
    static NODE: OnceLock<Node> = OnceLock::new();
    static STOP: Mutex<Option<u32>> = Mutex::new(None);
    shared(&NODE, &STOP, Node::start)
}

/// The same, under a keeper with which requests may leave out fences.
pub(crate) fn weak_node() -> &'static Node {
    static NODE: OnceLock<Node> = OnceLock::new();
    static STOP: Mutex<Option<u32>> = Mutex::new(None);
    shared(&NODE, &STOP, Node::start_weak)
}

/// `examples/weak_keeper.rs`, which cargo builds with the tests.
pub(crate) fn weak_keeper() -> PathBuf {
    let path = Path::new(KEEPER).with_file_name("examples").join("weak_keeper");
    assert!(path.exists(), "{} is not built: cargo build -p sandbox-core --examples", path.display());
    path
}

fn shared(node: &'static OnceLock<Node>, stop: &Mutex<Option<u32>>, start: fn() -> Node) -> &'static Node {
    let node = node.get_or_init(start);
    // Statics are not dropped: the keeper is ended when the test process is.
    stop.lock().unwrap().get_or_insert_with(|| {
        stop_at_exit(node.pid());
        node.pid()
    });
    node
}

/// Ends the process `pid` when this one has ended, whatever the reason.
fn stop_at_exit(pid: u32) {
    let script = format!("while kill -0 {me} 2>/dev/null; do sleep 0.1; done; kill {pid}", me = std::process::id());
    let mut watcher = Command::new("setsid");
    watcher.args(["--fork", "sh", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(watcher.status().unwrap().success());
}

pub(crate) fn memory(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

/// What every image of these tests is made of.
pub(crate) fn busybox_layer() -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    for (folder, mode) in [("bin", 0o755), ("etc", 0o755), ("home", 0o755), ("tmp", 0o1777)] {
        let mut header = header(tar::EntryType::Directory, mode);
        layer.append_data(&mut header, folder, &[][..]).unwrap();
    }
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    append(&mut layer, "bin/busybox", 0o755, &busybox);
    append(&mut layer, "etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home:/bin/sh\n");
    append(&mut layer, "etc/group", 0o644, b"root:x:0:\nann:x:1000:\naudio:x:29:ann\n");
    let mut owned = header(tar::EntryType::Regular, 0o4751);
    owned.set_uid(1000);
    owned.set_gid(42);
    layer.append_data(&mut owned, "home/of-another", &[][..]).unwrap();
    append(&mut layer, "bin/not-executable", 0o644, b"#!/bin/sh\n");
    append(&mut layer, "bin/set-uid", 0o4755, &busybox);
    append(&mut layer, "bin/attack", 0o755, sandbox_attacks::PROGRAM);
    append(&mut layer, "bin/attack-set-uid", 0o4755, sandbox_attacks::PROGRAM);
    append(&mut layer, "bin/attack-file-caps", 0o755, sandbox_attacks::PROGRAM);
    for applet in [
        "sh", "true", "cat", "ls", "id", "sleep", "mount", "umount", "hostname", "unshare", "chroot", "dd", "yes", "head", "stat", "mknod",
        "touch", "mkdir", "rm", "seq", "chown",
    ] {
        let mut header = header(tar::EntryType::Symlink, 0o777);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox").unwrap();
    }
    layer.into_inner().unwrap()
}

pub(crate) fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn append(layer: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, content: &[u8]) {
    let mut header = header(tar::EntryType::Regular, mode);
    header.set_size(content.len() as u64);
    layer.append_data(&mut header, path, content).unwrap();
}

/// A request, to be changed as a test needs it.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) id: SandboxId,
    pub(crate) spec: Value,
    pub(crate) isolation: Isolation,
    pub(crate) supervision: Supervision,
    pub(crate) stdin: Option<Vec<u8>>,
    /// Whether the keeper holds the writing end of its standard input.
    pub(crate) is_held: bool,
    pub(crate) terminal: Option<WindowSize>,
    pub(crate) layer: Layering,
    pub(crate) keeps_layer: bool,
    pub(crate) volumes: Vec<VolumeMount>,
    pub(crate) files: Vec<u8>,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) launched: Option<Launched>,
    pub(crate) ending: Ending,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A shell script under limits that suit a test.
pub(crate) fn shell(script: &str) -> Run {
    command(&["/bin/sh", "-c", script])
}

pub(crate) fn command(args: &[&str]) -> Run {
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": IMAGE },
        "process": { "user": { "uid": 0, "gid": 0 }, "args": args, "env": [], "cwd": "/", "noNewPrivileges": true,
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 256, "hard": 256 }] },
        "linux": { "resources": {
            "memory": { "limit": 64 << 20, "swap": 64 << 20 },
            "cpu": { "quota": 100_000, "period": 100_000 },
            "pids": { "limit": 32 },
        } },
    });
    let supervision = Supervision {
        wall_ms: Some(10_000),
        cpu_ms: None,
        output_bytes: 1 << 20,
        output_policy: OutputPolicy::Truncate,
        medium: Medium::Memory,
        disk_bytes: 16 << 20,
        inodes: 1024,
        io: IoLimits::MAX,
    };
    Run {
        id: SandboxId(uuid::Uuid::new_v4()),
        spec,
        isolation: Isolation::Container,
        supervision,
        stdin: None,
        is_held: false,
        terminal: None,
        layer: Layering::Fresh,
        keeps_layer: false,
        volumes: Vec::new(),
        files: Vec::new(),
    }
}

impl Run {
    /// Sets a field of the spec by its path (RFC 6901).
    pub(crate) fn with(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        self.spec.pointer_mut(parent).unwrap()[name] = value.into();
        self
    }

    /// Leaves out some of the fences.
    pub(crate) fn without(mut self, fences: &[Fence]) -> Self {
        let names: Vec<&str> = fences.iter().map(|fence| fence.name()).collect();
        if !names.is_empty() {
            self.spec["annotations"] = json!({ "without": names.join(",") });
        }
        self
    }

    pub(crate) fn launch(&self, client: &mut Client) -> Answer {
        let stdin = self.stdin.as_deref().map(memory);
        self.launch_with(client, stdin.as_ref().map(AsFd::as_fd))
    }

    /// Asks for it without waiting for the answer.
    pub(crate) fn begin_launch(&self, client: &mut Client) -> Tag {
        client.send(&self.request(Stdin::Null, false), &[]).unwrap()
    }

    /// Asks for it, if the connection still stands.
    pub(crate) fn try_launch(&self, client: &mut Client) -> bool {
        client.send(&self.request(Stdin::Null, false), &[]).is_ok()
    }

    /// Launches it with a descriptor of the test's own as its standard input.
    pub(crate) fn launch_with_stdin(&self, client: &mut Client, stdin: BorrowedFd<'_>) -> Answer {
        self.launch_with(client, Some(stdin))
    }

    fn launch_with(&self, client: &mut Client, stdin: Option<BorrowedFd<'_>>) -> Answer {
        let files = (!self.files.is_empty()).then(|| memory(&self.files));
        let from = match stdin {
            Some(_) => Stdin::Descriptor,
            None if self.is_held => Stdin::Held,
            None => Stdin::Null,
        };
        let request = self.request(from, files.is_some());
        let descriptors: Vec<_> = stdin.into_iter().chain(files.iter().map(AsFd::as_fd)).collect();
        client.call(&request, &descriptors).unwrap()
    }

    fn request(&self, stdin: Stdin, has_files: bool) -> Request {
        Request::Launch(Box::new(Launch {
            id: self.id,
            image: self.spec["root"]["path"].as_str().unwrap().parse::<ImageId>().unwrap(),
            spec: serde_json::to_vec(&self.spec).unwrap(),
            isolation: self.isolation,
            supervision: self.supervision,
            stdin,
            has_files,
            terminal: self.terminal,
            layer: self.layer,
            keeps_layer: self.keeps_layer,
            volumes: self.volumes.clone(),
        }))
    }

    /// Runs it on the shared keeper, to its end, and forgets it.
    pub(crate) fn run(self) -> Done {
        let is_weakened = self.spec.get("annotations").is_some();
        self.run_on(if is_weakened { weak_node() } else { node() })
    }

    pub(crate) fn run_on(self, node: &Node) -> Done {
        let mut client = node.client();
        let answer = self.launch(&mut client);
        let launched = if let Answer::Launched(launched) = answer { Some(launched) } else { None };
        assert!(launched.is_some() || matches!(answer, Answer::Ended(_)), "the keeper answered {answer:?}");
        let ending = wait(&mut client, self.id);
        let (stdout, stderr) = output(&node.log_path(self.id));
        assert_eq!(client.call(&Request::Forget { id: self.id }, &[]).unwrap(), Answer::Done);
        Done { launched, ending, stdout, stderr }
    }
}

/// The fences that this node's sandboxes have.
pub(crate) fn fences(node: &Node) -> Fences {
    Client::connect(&node.folder.path().join("keeper.sock")).unwrap().1.fences
}

/// Waits until a log has something in it.
pub(crate) fn wait_for_line(log: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !log::parse(&std::fs::read(log).unwrap()).is_ok_and(|record| record.is_some()) {
        assert!(Instant::now() < deadline, "nothing is written to the log");
        std::thread::yield_now();
    }
}

pub(crate) fn wait(client: &mut Client, id: SandboxId) -> Ending {
    let answer = client.call(&Request::Wait { id }, &[]).unwrap();
    let Answer::Ended(ending) = answer else { panic!("the keeper answered {answer:?}") };
    *ending
}

pub(crate) fn kill(client: &mut Client, id: SandboxId) {
    assert_eq!(client.call(&Request::Kill { id, reason: KillReason::StoppedByUser }, &[]).unwrap(), Answer::Done);
}

/// Waits until what was written to a log so far holds `text`, and returns all of its standard output.
pub(crate) fn wait_for_text(log: &Path, text: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let said = written(log);
        if said.contains(text) {
            return said;
        }
        assert!(Instant::now() < deadline, "{text:?} does not come: {said:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The standard output in a log that may have no end yet.
pub(crate) fn written(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap();
    let (mut rest, mut stdout) = (bytes.as_slice(), Vec::new());
    while let Some((record, behind)) = log::parse(rest).unwrap() {
        if record.kind == log::Kind::Stdout {
            stdout.extend_from_slice(record.data);
        }
        rest = behind;
    }
    String::from_utf8_lossy(&stdout).into_owned()
}

/// What a request that is refused says.
pub(crate) fn failure(answer: Answer) -> Failure {
    let Answer::Failed(failure) = answer else { panic!("the keeper answered {answer:?}") };
    failure
}

/// Every record, page by page.
pub(crate) fn records(client: &mut Client) -> Vec<Record> {
    let mut all: Vec<Record> = Vec::new();
    loop {
        let after = all.last().map_or(0, |record| record.seq);
        let answer = client.call(&Request::List { after }, &[]).unwrap();
        let Answer::Records { records, is_more } = answer else { panic!("the keeper answered {answer:?}") };
        all.extend(records);
        if !is_more {
            return all;
        }
    }
}

/// Both streams of a finished log, which must end with its end record.
pub(crate) fn output(path: &Path) -> (String, String) {
    let bytes = std::fs::read(path).unwrap();
    let (mut rest, mut stdout, mut stderr, mut is_ended) = (bytes.as_slice(), Vec::new(), Vec::new(), false);
    let mut expected_seq = 0;
    while let Some((record, behind)) = log::parse(rest).unwrap() {
        assert_eq!(record.seq, expected_seq);
        assert!(!is_ended, "a record behind the end");
        match record.kind {
            log::Kind::Stdout => stdout.extend_from_slice(record.data),
            log::Kind::Stderr => stderr.extend_from_slice(record.data),
            log::Kind::End => is_ended = true,
        }
        expected_seq += 1;
        rest = behind;
    }
    assert!(is_ended && rest.is_empty(), "the log has no end");
    (String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned())
}
