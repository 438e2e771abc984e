//! PID 1 under gVisor's kernel: our own program in another role. It starts the payload and says how it ended.
//!
//! It is inside the wall that gVisor is, so nothing that it says is believed beyond its own sandbox: the init on the host only passes it
//! on, and the limits are held out there.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Mode,
};
use serde::{Deserialize, Serialize};

use super::{
    payload::{self, Place},
    setup, unexpected,
};
use crate::{
    error::{Kind, LaunchError, Step},
    fence::Fences,
    ids,
    privileges::{self, limit_bounding_set},
    protocol::init::{Processes, Start, WaitStatus},
    sys, transport,
};

/// The argument that gives this program this role.
pub const ROLE: &str = "guest";

/// The descriptor of the socket to the init on the host.
const SOCKET: i32 = 0;

/// Where `runsc` mounts this program: a folder that the base layer gives every sandbox. It is empty again before the payload starts.
pub(super) const TOOLS: &str = "/image";

/// What `runsc` mounts something on unasked. Those of them that the image lacks are further arguments of this program.
pub(super) const MOUNTED_BY_RUNSC: [&str; 2] = ["/tmp", "/sys"];

/// The time between two counts of the processes.
const COUNT_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What the init on the host asks: start this. The descriptors are those of [`crate::protocol::init::Order::Start`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) start: Start,
    pub(super) hostname: String,
    /// For a payload that is user 0, as a bit mask.
    pub(super) capabilities: u64,
}

/// What it asks later, once the payload runs: this signal for its first process.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Signal(pub(super) i32);

/// What it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Said {
    /// The kernel is up, and this program waits.
    Ready,
    /// The payload's execve returned.
    Started,
    /// Nothing of the payload ever ran.
    Failed {
        kind: Kind,
        message: String,
    },
    Processes(Processes),
    /// The payload has ended. What it left is for the host to end.
    Ended(WaitStatus),
}

/// The whole life of it. What follows is the host's: it ends the kernel that this runs in.
pub fn run() -> io::Result<()> {
    let socket = sys::inherited(SOCKET)?;
    let socket = rustix::io::fcntl_dupfd_cloexec(&socket, 3)?;
    sys::close_on_exec_from(3)?;
    if let Err(failure) = live(&socket) {
        transport::send(socket.as_fd(), &Said::Failed { kind: failure.kind, message: failure.to_string() }, &[])?;
    }
    transport::recv::<Order>(socket.as_fd()).map(drop)
}

fn live(socket: &OwnedFd) -> Result<(), LaunchError> {
    let say = |said: Said| transport::send(socket.as_fd(), &said, &[]).step("reporting");
    let mut group = settle()?;
    say(Said::Ready)?;
    let datagram = transport::recv::<Order>(socket.as_fd()).step("reading the orders")?;
    let datagram = datagram.ok_or_else(unexpected).step("reading the orders")?;
    let Order { start, hostname, capabilities } = datagram.message;
    nix::unistd::sethostname(hostname).step("setting the host name")?;
    group.limit(start.pids).step("setting the pids limit")?;
    drop_privileges(capabilities)?;
    let place = Place { capabilities, fences: Fences::everywhere(), label: None, tasks: Some(&group.tasks), terminals: None };
    let payload = payload::start(&start, &place, VecDeque::from(datagram.descriptors))?;
    say(Said::Started)?;

    let children = setup::child_signals().step("watching the payload")?;
    loop {
        let mut ended = None;
        while let Some((pid, status)) = sys::reap(-1, false).step("reaping")? {
            if pid == payload.pid {
                ended = Some(status);
                break;
            }
        }
        // What is left, and itself: a program often ends because it could start no more.
        if group.count(u64::from(ended.is_some())).step("counting the processes")? {
            say(Said::Processes(group.processes))?;
        }
        if let Some(status) = ended {
            return say(Said::Ended(status));
        }
        let mut ready = [PollFd::new(&children, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut ready, Some(&COUNT_EVERY))).step("waiting for the payload")?;
        if !ready[1].revents().is_empty() {
            let datagram = transport::recv::<Signal>(socket.as_fd()).step("reading the orders")?;
            let Signal(signal) = datagram.ok_or_else(unexpected).step("reading the orders")?.message;
            // Not reaped yet, so the number is its own.
            sys::send_signal_to(payload.pid, signal).step("sending a signal")?;
        }
        while children.read_signal().step("waiting for the payload")?.is_some() {}
    }
}

/// Makes what `runsc` mounts by itself the image's own again, and the group that the payload is counted in.
fn settle() -> Result<Group, LaunchError> {
    // Its own standard streams: none of them is the payload's.
    let null = File::options().read(true).write(true).open("/dev/null").step_on("opening", "/dev/null")?;
    for number in 0..=2 {
        sys::place_at(null.as_fd(), number).step_on("opening", "/dev/null")?;
    }
    umount2(TOOLS, MntFlags::MNT_DETACH).step_on("unmounting", TOOLS)?;
    // A tmpfs, where the image's own folder is empty or missing; and sysfs, of which other sandboxes have none.
    for folder in MOUNTED_BY_RUNSC {
        match umount2(folder, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => return Err(error).step_on("unmounting", folder),
        }
    }
    for folder in std::env::args().skip(2) {
        std::fs::remove_dir(&folder).step_on("removing", &folder)?;
    }
    Group::make().step("making the group of the payload")
}

/// Keeps what PID 1 needs, over the guest's own processes and files (`setup::enter` does the same on the host). There is no way here to take
/// privileges from user id 0 as such (`PR_SET_SECUREBITS`); the bounding set leaves it none.
fn drop_privileges(capabilities: u64) -> Result<(), LaunchError> {
    limit_bounding_set(capabilities).step("limiting the bounding set")?;
    setgroups(&[]).step("leaving all groups")?;
    nix::sys::prctl::set_keepcaps(true).step("keeping capabilities")?;
    let (uid, gid) = (Uid::from_raw(ids::OF_GUEST), Gid::from_raw(ids::OF_GUEST));
    setresgid(gid, gid, gid).step("becoming init's group")?;
    setresuid(uid, uid, uid).step("becoming init's user")?;
    sys::set_capabilities(privileges::OF_INIT | capabilities).step("dropping capabilities")?;
    rustix::thread::set_no_new_privs(true).step("setting no_new_privs")?;
    nix::sys::prctl::set_dumpable(false).step("forbidding traces")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    setup::default_signals().step("resetting signals")
}

/// The payload's cgroup in gVisor's kernel, whose pids controller knows how many there are and how many there may be.
#[derive(Debug)]
struct Group {
    tasks: File,
    max: File,
    current: File,
    pids: u64,
    processes: Processes,
}

impl Group {
    /// Mounts the controller for a moment: payloads see nothing of it.
    fn make() -> io::Result<Self> {
        mount(Some("cgroup"), TOOLS, Some("cgroup"), MsFlags::empty(), Some("pids"))?;
        let folder = Path::new(TOOLS).join("payload");
        std::fs::create_dir(&folder)?;
        let group = Self {
            tasks: File::options().write(true).open(folder.join("cgroup.procs"))?,
            max: File::options().write(true).open(folder.join("pids.max"))?,
            current: File::open(folder.join("pids.current"))?,
            pids: 0,
            processes: Processes::default(),
        };
        umount2(TOOLS, MntFlags::MNT_DETACH)?;
        Ok(group)
    }

    fn limit(&mut self, pids: u64) -> io::Result<()> {
        self.pids = pids;
        io::Write::write_all(&mut self.max, pids.to_string().as_bytes())
    }

    /// Looks how many there are, besides `more`. Whether that is more than ever before.
    fn count(&mut self, more: u64) -> io::Result<bool> {
        let mut text = String::new();
        self.current.rewind()?;
        self.current.read_to_string(&mut text)?;
        let now = (text.trim().parse::<u64>().map_err(io::Error::other)? + more).min(self.pids);
        if now <= self.processes.peak {
            return Ok(false);
        }
        self.processes = Processes { peak: now, is_at_limit: now >= self.pids };
        Ok(true)
    }
}
