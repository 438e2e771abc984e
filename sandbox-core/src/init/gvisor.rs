//! PID 1 of a sandbox of gVisor's: builds the tree, runs `runsc` on it, and passes orders and reports on.
//!
//! Three processes stand below it: `runsc` itself, the one that serves files (the gofer), and the one that is the payload's kernel (the
//! sentry). The last two put themselves into namespaces and roots of their own and under seccomp filters of their own. Inside that kernel
//! our own program is PID 1 again ([`super::guest`]): it starts the payload and says how it ended, over a socket that is its standard input.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        signal::{SigSet, Signal},
        signalfd::SignalFd,
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::MemfdFlags,
};
use serde_json::json;

use super::{
    Disks,
    guest::{self, Said},
    kill_all, monotonic_ns, next, own_cpu_us, receive, setup, unexpected,
};
use crate::{
    error::{Kind, LaunchError, Step},
    fence::Fence,
    ids,
    privileges::{self, limit_bounding_set},
    protocol::{
        Medium,
        init::{Order, Processes, Report, Setup, WaitStatus},
    },
    rootfs::{
        Tree,
        hull::{self, BUNDLE, Furniture, PROGRAM, ROOT, STATE, TOOLS},
    },
    sys, transport,
};

/// Where `runsc` notes the process that is the payload's kernel, before it lets that run.
const PID_FILE: &str = "/run/kernel.pid";

/// The most of what `runsc` says of a failure that is told.
const SAID_CHARS_MAX: usize = 512;

/// The life of such an init, from the first order on.
pub(super) fn live(control: &OwnedFd, setup: &Setup, disks: Disks, descriptors: &mut VecDeque<OwnedFd>) -> Result<(), LaunchError> {
    let Booting { tree, mut guest, furniture } = boot(setup, disks, descriptors)?;
    match guest.event(control, descriptors).step("starting gVisor")? {
        Event::Said(Said::Ready) => {}
        Event::Gone => return Err(guest.why_gone()),
        Event::Order(_) | Event::Said(_) => return Err(unexpected()).step("starting gVisor"),
    }
    transport::send(control.as_fd(), &Report::Ready, &[]).step("reporting that the sandbox is built")?;
    furniture.clear().step("removing the program for inside")?;
    let kernel = guest.kernel().step("finding gVisor's kernel")?;
    let begun_cpu_us = own_cpu_us();
    // What the guest says is held to this order and to these bounds, whoever speaks there: the keeper believes an init.
    let mut pids = None;
    let mut processes = None;
    let (status, at_ns) = loop {
        match guest.event(control, descriptors).step("supervising gVisor")? {
            Event::Order(Order::Start(start)) if pids.is_none() => {
                pids = Some(start.pids);
                let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
                let order = guest::Order { start: *start, hostname, capabilities: setup.payload_capabilities };
                let brought: Vec<OwnedFd> = std::mem::take(descriptors).into();
                let brought: Vec<_> = brought.iter().map(AsFd::as_fd).collect();
                guest.socket.send(&order, &brought).step("passing the start on")?;
            }
            // Noted before the kill, after which nothing of it runs any more.
            Event::Order(Order::Kill) => break (WaitStatus::Signaled { signal: libc::SIGKILL }, monotonic_ns()),
            // One that comes before the payload runs has nobody to go to.
            Event::Order(Order::Signal { signal }) if processes.is_some() => {
                match guest.socket.send(&guest::Signal(signal), &[]) {
                    // Nobody takes them inside: as signals do that are sent again before they were heeded, this one is lost.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    sent => sent.step("passing a signal on")?,
                }
            }
            Event::Order(Order::Signal { .. }) => {}
            Event::Said(Said::Started) if pids.is_some() && processes.is_none() => {
                processes = Some(Processes::default());
                // The payload's own share cannot be told from that of its kernel, so none is taken off.
                let started = Report::Started { at_ns: monotonic_ns(), own_cpu_us: 0 };
                transport::send(control.as_fd(), &started, &[kernel.as_fd()]).step("reporting the start")?;
            }
            Event::Said(Said::Processes(seen)) => {
                // Only what is new, and so no more reports than there may be processes.
                if let (Some(pids), Some(last)) = (pids, &mut processes)
                    && seen.peak > last.peak
                    && seen.peak <= pids
                {
                    *last = seen;
                    transport::send(control.as_fd(), &Report::Processes(seen), &[]).step("reporting the processes")?;
                }
            }
            Event::Said(Said::Failed { kind, message }) if processes.is_none() => {
                return Err(LaunchError { kind, step: "", target: String::new(), source: io::Error::other(message) });
            }
            Event::Said(Said::Ended(status)) if processes.is_some() => break (status, monotonic_ns()),
            Event::Gone => return Err(guest.why_gone()),
            Event::Order(
                Order::Setup(_)
                | Order::Layer
                | Order::Volumes { .. }
                | Order::Below
                | Order::Start(_)
                | Order::Exec(_)
                | Order::KillExec { .. }
                | Order::Tree,
            )
            | Event::Said(Said::Ready | Said::Started | Said::Failed { .. } | Said::Ended(_)) => {
                return Err(unexpected()).step("supervising gVisor");
            }
        }
    };
    kill_all().step("ending gVisor")?;
    guest.bury().step("ending gVisor")?;
    let space = rustix::fs::fstatfs(&tree.writable).step("reading the use of the writable layer")?;
    let ended = Report::Ended {
        status,
        at_ns,
        own_cpu_us: own_cpu_us().saturating_sub(begun_cpu_us),
        // The folder that runsc held open is gone with it, and what it took is free again: an inode, and on disk a block.
        is_disk_full: space.f_bavail <= if setup.medium == Medium::Disk { tree.of_runsc } else { 0 },
        are_inodes_used_up: space.f_ffree <= tree.of_runsc,
    };
    transport::send(control.as_fd(), &ended, &[]).step("reporting the end")?;
    receive(control, descriptors).step("waiting for the end").map(drop)
}

/// Builds the tree, starts `runsc` in it, and keeps no more privilege than it takes to end that.
///
/// The order is that of [`setup::enter`]. Landlock and the filter of system calls are left out: the one forbids every mount, the other
/// most of what a kernel in user space is made of. `runsc` has fences of its own in their place.
fn boot(setup: &Setup, disks: Disks, descriptors: &mut VecDeque<OwnedFd>) -> Result<Booting, LaunchError> {
    // While there is a /proc that has it: this very program, as it was sealed by the keeper.
    let own_program = std::fs::read("/proc/self/exe").step("reading the program for inside")?;
    let (tree, user_namespace) = setup::build(setup, disks, descriptors)?;
    let runsc = next(descriptors, "gVisor's program")?;
    let furniture = hull::furnish(&own_program, config(setup).as_bytes(), setup.id_base)?;
    drop(own_program);

    setns(user_namespace.as_fd(), CloneFlags::CLONE_NEWUSER).step("entering the user namespace")?;
    drop(user_namespace);
    limit_bounding_set(privileges::OF_RUNSC | privileges::KILL).step("limiting the bounding set")?;
    setgroups(&[]).step("leaving all groups")?;
    let (uid, gid) = (Uid::from_raw(ids::OF_GUEST), Gid::from_raw(ids::OF_GUEST));
    setresgid(gid, gid, gid).step("becoming init's group")?;
    setresuid(uid, uid, uid).step("becoming init's user")?;
    if setup.fences.has(Fence::SessionKeyring) {
        sys::join_new_session_keyring().step("making a session keyring")?;
    }
    sys::set_capabilities(privileges::OF_RUNSC | privileges::KILL).step("dropping capabilities")?;
    rustix::thread::set_no_new_privs(true).step("setting no_new_privs")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).step("binding this life to the keeper's")?;
    nix::sys::prctl::set_dumpable(false).step("forbidding traces")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    setup::default_signals().step("resetting signals")?;
    for (resource, soft, hard) in setup::RESOURCES {
        sys::bound_rlimit(resource, soft, hard).step_on("setting a resource limit", resource)?;
    }
    let guest = Guest::start(&runsc)?;
    sys::set_capabilities(privileges::KILL).step("dropping capabilities")?;
    Ok(Booting { tree, guest, furniture })
}

/// What stands when `runsc` was started.
#[derive(Debug)]
struct Booting {
    tree: Tree,
    guest: Guest,
    furniture: Furniture,
}

/// What `runsc` is to run, as the OCI runtime spec has it: our own program, from the folder that it lies in, on the sandbox's tree.
fn config(setup: &Setup) -> String {
    let capabilities = names(privileges::OF_GUEST);
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let mut arguments = vec![format!("{}/{PROGRAM}", guest::TOOLS), guest::ROLE.to_owned()];
    // What the image lacks and runsc mounts something on is to be gone again before the payload looks.
    arguments.extend(
        guest::MOUNTED_BY_RUNSC
            .iter()
            .filter(|folder| Path::new(&format!("{ROOT}{folder}")).symlink_metadata().is_err())
            .map(|folder| (*folder).to_owned()),
    );
    let shm = ["nosuid".to_owned(), "nodev".to_owned(), "noexec".to_owned(), "mode=1777".to_owned(), format!("size={}", setup.shm_bytes)];
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(1 << 20);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": arguments,
            "env": [],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": files, "hard": files }],
        },
        "root": { "path": ROOT, "readonly": false },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": shm },
            { "destination": guest::TOOLS, "type": "bind", "source": TOOLS, "options": ["bind", "ro"] },
        ],
        "linux": { "namespaces": namespaces },
    })
    .to_string()
}

/// The names in `config.json` of the capabilities in `mask`.
fn names(mask: u64) -> Vec<&'static str> {
    const NAMES: [(u64, &str); 10] = [
        (privileges::CHOWN, "CAP_CHOWN"),
        (privileges::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
        (privileges::FOWNER, "CAP_FOWNER"),
        (privileges::FSETID, "CAP_FSETID"),
        (privileges::KILL, "CAP_KILL"),
        (privileges::SETGID, "CAP_SETGID"),
        (privileges::SETUID, "CAP_SETUID"),
        (privileges::SETPCAP, "CAP_SETPCAP"),
        (privileges::NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"),
        (privileges::SYS_ADMIN, "CAP_SYS_ADMIN"),
    ];
    NAMES.into_iter().filter(|(bit, _)| mask & bit != 0).map(|(_, name)| name).collect()
}

/// `runsc` and what is below it.
#[derive(Debug)]
struct Guest {
    /// Our program inside, at the other end.
    socket: transport::Socket,
    /// Whether that end is still open.
    is_open: bool,
    runsc: libc::pid_t,
    /// What `runsc` wrote to its standard error.
    said: File,
    children: SignalFd,
}

/// What happens to a guest.
#[derive(Debug)]
enum Event {
    Order(Order),
    Said(Said),
    /// `runsc` has ended, and with it the kernel that it ran.
    Gone,
}

impl Guest {
    fn start(program: &OwnedFd) -> Result<Self, LaunchError> {
        let (socket, inside) = transport::Socket::pair().step("making gVisor's socket")?;
        let said = rustix::fs::memfd_create("runsc", MemfdFlags::CLOEXEC).step("making a file for what gVisor says")?;
        let runsc = match sys::clone_and_sleep().step("cloning gVisor")? {
            Some(pid) => pid,
            None => {
                let failed = become_runsc(program, &inside, &said);
                // Whoever starts it reads this, in place of what it would have said itself.
                let is_told = writeln!(File::from(said), "{failed}").is_ok();
                std::process::exit(if is_told { 1 } else { 2 });
            }
        };
        let children = setup::child_signals().step("watching gVisor")?;
        Ok(Self { socket, is_open: true, runsc, said: File::from(said), children })
    }

    /// Waits for what happens next. What was said before the end comes before the end.
    fn event(&mut self, control: &OwnedFd, descriptors: &mut VecDeque<OwnedFd>) -> io::Result<Event> {
        loop {
            let mut ready =
                [PollFd::new(control, PollFlags::IN), PollFd::new(&self.children, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
            let watched = if self.is_open { 3 } else { 2 };
            rustix::io::retry_on_intr(|| poll(&mut ready[..watched], None))?;
            let [is_ordered, is_child, is_said] = [0, 1, 2].map(|n| !ready[n].revents().is_empty());
            if is_ordered {
                match receive(control, descriptors)? {
                    Some(order) => return Ok(Event::Order(order)),
                    // The keeper is gone. Without it nothing holds this sandbox to its limits.
                    None => std::process::exit(1),
                }
            }
            if is_said {
                match self.socket.recv::<Said>()? {
                    Some(datagram) => return Ok(Event::Said(datagram.message)),
                    None => self.is_open = false,
                }
            }
            if is_child && !is_said {
                while self.children.read_signal()?.is_some() {}
                while let Some((pid, _)) = sys::reap(-1, false).or_else(no_child)? {
                    if pid == self.runsc {
                        return Ok(Event::Gone);
                    }
                }
            }
        }
    }

    /// The process that is the payload's kernel: its death is that of the payload.
    fn kernel(&self) -> io::Result<OwnedFd> {
        let text = std::fs::read_to_string(PID_FILE)?;
        // It runs, since our program inside has just said so, and nothing else of the sandbox starts processes.
        let pid = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw).ok_or_else(unexpected)?;
        Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
    }

    /// Waits until everything in the sandbox but this process is dead.
    fn bury(&self) -> io::Result<()> {
        while sys::reap(-1, true).or_else(no_child)?.is_some() {}
        Ok(())
    }

    /// An error with the last line that `runsc` said.
    fn why_gone(&mut self) -> LaunchError {
        let mut said = Vec::new();
        let read = self.said.rewind().and_then(|()| (&mut self.said).take(1 << 20).read_to_end(&mut said));
        let text = String::from_utf8_lossy(&said);
        let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it ended without a word");
        let source = read.err().unwrap_or_else(|| io::Error::other(line.chars().take(SAID_CHARS_MAX).collect::<String>()));
        LaunchError { kind: Kind::Host, step: "running gVisor", target: String::new(), source }
    }
}

/// No child at all is none that is dead.
fn no_child<T>(error: io::Error) -> io::Result<Option<T>> {
    if error.raw_os_error() == Some(libc::ECHILD) { Ok(None) } else { Err(error) }
}

/// Turns the clone into `runsc`, as the sandbox's own root. Comes back only with a failure.
fn become_runsc(program: &OwnedFd, inside: &OwnedFd, said: &OwnedFd) -> io::Error {
    let steps = || -> io::Result<std::convert::Infallible> {
        nix::unistd::setsid()?;
        SigSet::all().thread_unblock()?;
        let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        sys::set_capabilities(privileges::OF_RUNSC)?;
        // The last use of standard input, output and error as /dev/null was init's; of these three the guest gets the first.
        sys::place_at(inside.as_fd(), 0)?;
        sys::place_at(said.as_fd(), 2)?;
        let state = format!("--root={STATE}");
        let bundle = format!("--bundle={BUNDLE}");
        let pid_file = format!("--pid-file={PID_FILE}");
        let arguments = [
            "runsc",
            &state,
            // Needs no device and no right of the host's, and runs inside virtual machines too.
            "--platform=ptrace",
            // Loopback alone, inside the guest's own network stack.
            "--network=none",
            // It is in the sandbox's cgroups already.
            "--ignore-cgroups",
            // The writable layer is ours, of limited size, below what it serves.
            "--overlay2=none",
            "run",
            &bundle,
            &pid_file,
            "sandbox",
        ];
        let arguments = arguments.map(std::ffi::CString::new).into_iter().collect::<Result<Vec<_>, _>>()?;
        // What Go's os.TempDir and its programs look at.
        Ok(nix::unistd::fexecve(program, &arguments, &[c"PATH=/", c"TMPDIR=/tmp"])?)
    };
    match steps() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}
