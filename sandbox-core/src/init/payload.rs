//! Starting the payload: its folder, its files, its user, its program.

use std::{
    collections::VecDeque,
    ffi::{CString, NulError},
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::unistd::{Gid, Uid};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};

use super::{
    never, next,
    setup::own_attribute,
    terminal::{self, Said},
};
use crate::{
    error::{Kind, LaunchError, Step},
    fence::{Fence, Fences},
    files,
    protocol::{
        WindowSize,
        init::{Program, Setup, Start},
    },
    rootfs::Tree,
    selinux, sys, transport,
};

mod user;

pub(super) use user::Identity;

/// The payload, running.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) pid: libc::pid_t,
    /// `CLOCK_MONOTONIC` when execve returned, in nanoseconds.
    pub(super) started_at_ns: u64,
    pub(super) identity: Identity,
    /// The master of its terminal, if it has one.
    pub(super) terminal: Option<OwnedFd>,
}

/// What the payload is put into.
#[derive(Debug)]
pub(super) struct Place<'a> {
    /// For a payload that is user 0, as a bit mask.
    pub(super) capabilities: u64,
    pub(super) fences: Fences,
    /// The tree and the SELinux label, where there is one.
    pub(super) label: Option<(&'a Tree, &'a str)>,
    /// The `tasks` file of a cgroup that the payload is to join: one of gVisor's kernel. The host's were joined by init.
    pub(super) tasks: Option<&'a File>,
    /// Where terminals are made.
    pub(super) terminals: Option<&'a OwnedFd>,
}

impl<'a> Place<'a> {
    /// The one that `setup` has made.
    pub(super) fn of(setup: &'a Setup, tree: &'a Tree) -> Self {
        let label = setup.labels.as_ref().map(|labels| (tree, labels.process.as_str()));
        Self { capabilities: setup.payload_capabilities, fences: setup.fences, label, tasks: None, terminals: Some(&tree.terminals) }
    }

    /// Has the next execve of this process change its SELinux domain, where there is one.
    pub(super) fn label_next_exec(&self) -> Result<(), LaunchError> {
        let Some((tree, label)) = self.label else { return Ok(()) };
        let exec = own_attribute(tree, "exec")?;
        selinux::label_next_exec(exec, label).step_on("setting the SELinux label", label)
    }
}

/// The descriptors that came with the order to start.
#[derive(Debug)]
struct Brought {
    stdio: Stdio,
    files: Option<OwnedFd>,
    inherited: Vec<OwnedFd>,
}

/// The payload's standard streams.
#[derive(Debug)]
enum Stdio {
    Given([OwnedFd; 3]),
    /// A terminal of this size, made in the devpts; its master goes through the socket.
    Terminal {
        size: WindowSize,
        to: OwnedFd,
    },
}

/// The most of a program's name that is told when it cannot be started.
const NAME_CHARS_MAX: usize = 256;

/// Where programs are looked for when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Prepares the working folder and the files, then starts the program. When this returns, it runs.
pub(super) fn start(start: &Start, place: &Place<'_>, mut descriptors: VecDeque<OwnedFd>) -> Result<Payload, LaunchError> {
    let (stdio, master) = match start.terminal {
        None => {
            let stdin = if start.has_stdin {
                next(&mut descriptors, "stdin")?
            } else {
                File::open("/dev/null").step_on("opening", "/dev/null")?.into()
            };
            (Stdio::Given([stdin, next(&mut descriptors, "stdout")?, next(&mut descriptors, "stderr")?]), None)
        }
        Some(size) => {
            let (master, to) = transport::Socket::pair().step("making a socket")?;
            (Stdio::Terminal { size, to }, Some(master))
        }
    };
    let files = if start.has_files { Some(next(&mut descriptors, "files")?) } else { None };
    let brought = Brought { stdio, files, inherited: descriptors.drain(..).collect() };
    let identity = Identity::find(&start.user)?;
    let identity = identity.with_capabilities_of(place);
    for folder in &start.folders {
        match make_folders(CWD_ROOT, folder, Some(&identity)) {
            // Nothing was asked for but a program, which may need no such folder.
            Err(error) if has_no_place(error) => {}
            made => made.spec("making a folder of the image's", folder)?,
        }
    }
    let cwd = make_folder(&start.cwd, &identity)?;
    let exec = Exec::new(start, &identity)?;

    // The pipe closes by itself at a successful execve and carries the reason of a failed one.
    let (failed, low) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step("making a pipe")?;
    let report = rustix::io::fcntl_dupfd_cloexec(&low, first_free(&brought.inherited)).step("making a pipe")?;
    drop(low);
    // This process sleeps until the child has called execve or ended: no wake-up in between, no second message.
    let pid = match sys::clone_and_sleep().step("cloning the payload")? {
        Some(pid) => pid,
        None => {
            let failure = become_payload(start, place, &identity, &exec, &cwd, brought);
            // The parent reads it from the pipe; there is nobody else to tell.
            let text = postcard::to_stdvec(&(failure.kind, failure.to_string())).unwrap_or_default();
            let is_told = File::from(report).write_all(&text).is_ok();
            std::process::exit(if is_told { 0 } else { 1 });
        }
    };
    let started_at_ns = super::monotonic_ns();
    drop(report);
    let mut text = Vec::new();
    File::from(failed).read_to_end(&mut text).step("reading how execve went")?;
    if text.is_empty() {
        // It runs, so it has said which it is.
        let said = master.and_then(|master| master.recv::<Said>().ok().flatten());
        let terminal = said.and_then(|datagram| datagram.descriptors.into_iter().next());
        return Ok(Payload { pid, started_at_ns, identity, terminal });
    }
    let (kind, message): (Kind, String) = postcard::from_bytes(&text).map_err(io::Error::other).step("reading how execve went")?;
    Err(LaunchError { kind, step: "", target: String::new(), source: io::Error::other(message) })
}

/// Turns the freshly cloned child into the payload. Comes back only with a failure.
fn become_payload(start: &Start, place: &Place<'_>, identity: &Identity, exec: &Exec, cwd: &OwnedFd, brought: Brought) -> LaunchError {
    let Brought { stdio, files, inherited } = brought;
    let never_returns = || -> Result<std::convert::Infallible, LaunchError> {
        nix::unistd::setsid().step("making a session")?;
        if let Some(mut tasks) = place.tasks {
            tasks.write_all(b"0").step("joining the cgroup")?;
        }
        identity.assume()?;
        nix::unistd::fchdir(cwd).spec("entering the working folder", &start.cwd)?;
        if let Some(files) = files {
            write_files(File::from(files))?;
        }
        for (resource, value) in &start.rlimits {
            sys::set_rlimit(*resource, *value).step_on("setting a resource limit", resource)?;
        }
        match stdio {
            Stdio::Given(stdio) => {
                for (number, descriptor) in (0..).zip(&stdio) {
                    sys::place_at(descriptor.as_fd(), number).step("placing the standard streams")?;
                }
            }
            Stdio::Terminal { size, to } => {
                let terminals = place.terminals.ok_or_else(super::unexpected).step("making a terminal")?;
                terminal::take(terminals, size, to.as_fd())?;
            }
        }
        place.label_next_exec()?;
        exec.run(&inherited, place)
    };
    match never_returns() {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

/// Opens the working folder, and makes it first, owned by the payload's user, if the image lacks it (as `docker run -w` does).
fn make_folder(path: &str, identity: &Identity) -> Result<OwnedFd, LaunchError> {
    if !path.starts_with('/') {
        return Err(never("entering the working folder", path, "it must be an absolute path"));
    }
    make_folders(CWD_ROOT, path, Some(identity)).spec("making the working folder", path)?;
    open_folder(path).spec("entering the working folder", path)
}

const CWD_ROOT: &str = "/";

/// Whether a folder is impossible there (`mkdir(2)`, `openat2(2)`): a file is in its way, as a sandbox with a kept layer may have left it, or it is below a volume that is read-only, or in `/proc` or `/dev`.
const fn has_no_place(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(
        error,
        Errno::EXIST | Errno::NOTDIR | Errno::NOENT | Errno::ROFS | Errno::NAMETOOLONG | Errno::LOOP | Errno::ACCESS | Errno::PERM
    )
}

/// What this process opens while it still has capabilities never leads through `/proc/self/fd` and its like (CVE-2024-21626).
const SAFE: ResolveFlags = ResolveFlags::NO_MAGICLINKS;

/// openat2(2), which kernels that run sandboxes have. gVisor's lacks it: under it there is openat(2), and no descriptor or process of
/// the host's that a path could lead to.
fn open_safely(at: impl AsFd, path: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    match openat2(&at, path, flags, mode, SAFE) {
        Err(rustix::io::Errno::NOSYS) => openat(&at, path, flags, mode),
        other => other,
    }
}

pub(super) fn open_folder(path: &str) -> rustix::io::Result<OwnedFd> {
    open_safely(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Makes every missing folder of `path`, below `from` if it is relative; new ones belong to `owner` if one is given.
fn make_folders(from: &str, path: &str, owner: Option<&Identity>) -> rustix::io::Result<()> {
    let mut at = open_folder(if path.starts_with('/') { "/" } else { from })?;
    for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        at = match open_safely(&at, name, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => {
                make_new_folder(at.as_fd(), name, owner)?;
                open_safely(&at, name, flags, Mode::empty())?
            }
            other => other?,
        };
    }
    Ok(())
}

/// Makes a folder that belongs to `owner` from its first moment: init's own id is none that could be changed inside.
fn make_new_folder(at: BorrowedFd<'_>, name: &str, owner: Option<&Identity>) -> rustix::io::Result<()> {
    let Some(owner) = owner else { return mkdirat(at, name, Mode::from_raw_mode(0o755)) };
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    let (own_gid, own_uid) = (nix::unistd::setfsgid(gid), nix::unistd::setfsuid(uid));
    let made = mkdirat(at, name, Mode::from_raw_mode(0o755));
    // Init's own id has no number in here, so this becomes nobody's. Nothing that init does later asks for it.
    nix::unistd::setfsuid(own_uid);
    nix::unistd::setfsgid(own_gid);
    made?;
    // gVisor has no such ids; under it init's own is one that can be changed.
    let found = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if (found.st_uid, found.st_gid) == (owner.uid, owner.gid) {
        return Ok(());
    }
    let (uid, gid) = (rustix::fs::Uid::from_raw(owner.uid), rustix::fs::Gid::from_raw(owner.gid));
    rustix::fs::chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// Writes the request's files, as the payload's user, from the working folder.
fn write_files(stream: File) -> Result<(), LaunchError> {
    let mut stream = io::BufReader::new(stream);
    while let Some(entry) = files::read_entry(&mut stream).step("reading the files of the request")? {
        let path = &entry.path;
        if let Some((folder, _)) = path.rsplit_once('/') {
            make_folders(".", folder, None).spec("making the folder of a file", path)?;
        }
        // A fifo that a sandbox before left on its layer must not hold init up.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = open_safely(CWD, path, flags, Mode::from_raw_mode(entry.mode)).spec("writing a file", path)?;
        let mut file = File::from(file);
        if !file.metadata().spec("writing a file", path)?.is_file() {
            return Err(never("writing a file", path, "what is there is no file"));
        }
        io::copy(&mut (&mut stream).take(entry.content_bytes), &mut file).spec("writing a file", path)?;
        // The mode is what was asked for, whatever the umask says.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)).spec("writing a file", path)?;
    }
    Ok(())
}

/// Everything for execve, allocated before the clone.
#[derive(Debug)]
pub(super) struct Exec {
    program: Program,
    /// Where the program may be, in the order of `PATH`.
    candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Exec {
    pub(super) fn new(start: &Start, identity: &Identity) -> Result<Self, LaunchError> {
        let name = start.args.first().ok_or_else(|| never("starting the payload", "", "the command is empty"))?;
        let mut env = start.env.clone();
        let has = |name: &str, env: &[String]| env.iter().any(|line| line.split_once('=').is_some_and(|(n, _)| n == name));
        if !has("PATH", &env) {
            env.push(format!("PATH={DEFAULT_PATH}"));
        }
        if !has("HOME", &env) {
            env.push(format!("HOME={}", identity.home));
        }
        let path = env.iter().rev().find_map(|line| line.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
        let candidates: Vec<String> = if name.contains('/') {
            vec![name.clone()]
        } else {
            path.split(':').map(|folder| if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") }).collect()
        };
        let c_strings = |lines: &[String]| lines.iter().map(|line| CString::new(line.as_bytes())).collect::<Result<Vec<_>, NulError>>();
        let nul = |e: NulError| never("starting the payload", name, e.to_string());
        Ok(Self {
            program: start.program,
            candidates: c_strings(&candidates).map_err(nul)?,
            args: c_strings(&start.args).map_err(nul)?,
            env: c_strings(&env).map_err(nul)?,
        })
    }

    /// execve(2) on the first candidate that exists. Errors are those of execvp(3): a program that may not be executed is reported, unless
    /// a later folder has one that may.
    pub(super) fn run(&self, inherited: &[OwnedFd], place: &Place<'_>) -> Result<std::convert::Infallible, LaunchError> {
        // The parent reads why only when this process has ended, so it must fit the pipe.
        let name: String = self.args.first().map(|name| name.to_string_lossy().chars().take(NAME_CHARS_MAX).collect()).unwrap_or_default();
        let parked = pass_on(inherited).step("passing on descriptors")?;
        // Nothing of init's but these numbers crosses the execve (CVE-2024-21626).
        if place.fences.has(Fence::Descriptors) {
            sys::close_on_exec_from(first_free(inherited).unsigned_abs()).step("closing descriptors")?;
        }
        if matches!(self.program, Program::Descriptor) {
            let program = parked.last().ok_or_else(super::unexpected).step("starting the payload")?;
            let failed = nix::unistd::fexecve(program, &self.args, &self.env);
            return failed.spec("executing", name);
        }
        let mut refused = nix::Error::ENOENT;
        for candidate in &self.candidates {
            match nix::unistd::execve(candidate, &self.args, &self.env) {
                Err(error @ (nix::Error::ENOENT | nix::Error::ENOTDIR)) if refused == nix::Error::ENOENT => refused = error,
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
                Err(nix::Error::EACCES) => refused = nix::Error::EACCES,
                // Of all that execve(2) refuses so, nothing else is left under no_new_privs and without capabilities in files.
                Err(error @ nix::Error::EPERM) if let Some((_, label)) = place.label => {
                    return Err(error).step_on("changing the domain (process2 nnp_transition, nosuid_transition)", label);
                }
                Err(error) => return Err(error).spec("starting the command", format!("{name:?}")),
                Ok(never) => match never {},
            }
        }
        if !matches!(refused, nix::Error::ENOENT | nix::Error::ENOTDIR) {
            return Err(refused).spec("starting the command", format!("{name:?}"));
        }
        let why = if name.contains('/') { "no such file in the image" } else { "no such program in the PATH of the image" };
        Err(never("starting the command", format!("{name:?}"), why))
    }
}

/// The first number behind those that the payload inherits.
fn first_free(inherited: &[OwnedFd]) -> i32 {
    3 + i32::try_from(inherited.len()).expect("a message brings at most 253 descriptors")
}

/// Puts `inherited` at the numbers from 3 up, where the payload finds them; the returned ones are the same, out of the way of those numbers.
fn pass_on(inherited: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    let floor = first_free(inherited);
    let parked: Vec<OwnedFd> =
        inherited.iter().map(|descriptor| rustix::io::fcntl_dupfd_cloexec(descriptor, floor)).collect::<Result<_, _>>()?;
    for (number, descriptor) in (3..).zip(&parked) {
        sys::place_at(descriptor.as_fd(), number)?;
    }
    Ok(parked)
}

impl Identity {
    /// As in a root image: capabilities are for its user 0.
    pub(super) fn with_capabilities_of(self, place: &Place<'_>) -> Self {
        Self { capabilities: if self.uid == 0 { place.capabilities } else { 0 }, ..self }
    }

    /// Becomes this user, for good. A capability that is dropped here cannot come back at execve (`no_new_privs`).
    pub(super) fn assume(&self) -> Result<(), LaunchError> {
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        nix::unistd::setgroups(&groups).step("setting the groups")?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        nix::unistd::setresgid(gid, gid, gid).step_on("becoming the group", self.gid)?;
        nix::unistd::setresuid(uid, uid, uid).step_on("becoming the user", self.uid)?;
        sys::set_capabilities(self.capabilities).step("dropping capabilities")
    }
}
