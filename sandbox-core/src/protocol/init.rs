//! What the keeper and one sandbox's init say to each other.
//!
//! The keeper sends [`Order::Setup`] and [`Order::Start`], then perhaps [`Order::Kill`]; init answers with [`Report`]s. What init
//! says is believed about its own sandbox only, and is small and of fixed shape.

use serde::{Deserialize, Serialize};

use crate::{
    error::Kind,
    fence::Fences,
    protocol::{Isolation, Medium, WindowSize},
    selinux::Labels,
};

/// Version of this protocol. A keeper that takes over sandboxes from one of another version could not talk to their inits, so it does not.
pub const VERSION: u32 = 2;

/// What the keeper tells init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Build the sandbox and give up all privilege. Descriptors: user namespace, image, base layer, then the `tasks` file of each
    /// cgroup v1 hierarchy, then the folder to be mounted on `/image` if `has_target`, then gVisor's program if `isolation` says so.
    Setup(Setup),
    /// The writable layer, if the setup says that it comes. Descriptor: a detached mount, with [`crate::rootfs::FOLDERS`] in it.
    Layer,
    /// Start the payload. Descriptors, but for the first three if it has a terminal: stdin if `has_stdin` (else it is the sandbox's `/dev/null`), stdout, stderr, the files if `has_files`, then those that the payload inherits from number 3 up;
    /// the last of them is its program if `program` is [`Program::Descriptor`].
    Start(Box<Start>),
    /// Kill everything but yourself and report.
    Kill,
    /// Under gVisor, whose processes the host does not know: send the payload's first process a signal.
    Signal { signal: i32 },
    /// Work on files, beside the payload or, if it comes before that, in its stead: as whoever speaks on this socket asks ([`crate::tree`]). Descriptor: the socket.
    Tree,
    /// Start a further process. Descriptors, if it has no terminal: stdin if `has_stdin`, stdout, stderr. Answered by [`Report::ExecStarted`] or
    /// [`Report::ExecFailed`], unless the payload has ended.
    Exec(Box<Exec>),
    /// Kill such a process and all that is in its session.
    KillExec { number: u64 },
    /// The volumes, if the setup has places for some: for each, in that order, the number of the loop device that it is behind. Before or after [`Order::Layer`].
    Volumes { devices: Vec<u32> },
    /// What lies below the writable layer and above the image, if the setup says that it comes; in any order with those two. Descriptor: a detached read-only mount.
    Below,
}

/// Where a volume is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// As in [`crate::protocol::VolumeMount`].
    pub path: String,
    pub is_read_only: bool,
}

/// The sandbox, but for what it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    pub isolation: Isolation,
    /// Host id that is 0 inside; 65,536 ids follow.
    pub id_base: u32,
    pub medium: Medium,
    pub layer: Layer,
    /// Whether what another sandbox left lies below that.
    pub has_below: bool,
    pub disk_bytes: u64,
    pub inodes: u64,
    /// Size of `/dev/shm`, in bytes.
    pub shm_bytes: u64,
    pub cgroup_hierarchies: u32,
    pub has_target: bool,
    pub volumes: Vec<Place>,
    /// Capabilities that the payload may have, as a bit mask.
    pub payload_capabilities: u64,
    /// What is to stand around the payload. One of them that cannot be set up is a failed start.
    pub fences: Fences,
    /// Given if SELinux is among the fences.
    pub labels: Option<Labels>,
    /// The seccomp program, as (code, jt, jf, k).
    pub seccomp: Vec<(u16, u8, u8, u32)>,
}

/// Where the writable layer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layer {
    /// Init makes it, in memory.
    Own,
    /// It comes by [`Order::Layer`], with exactly the room that was promised.
    New,
    /// The same, but it may have been another sandbox's before.
    Kept,
}

/// What runs in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub program: Program,
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub cwd: String,
    /// Made for `user` where they are missing, as `cwd` is.
    pub folders: Vec<String>,
    pub user: User,
    /// Resource (setrlimit(2)) and value.
    pub rlimits: Vec<(u32, u64)>,
    /// The most processes and threads, for a kernel of gVisor's; the host's is told by cgroup.
    pub pids: u64,
    pub has_stdin: bool,
    pub has_files: bool,
    pub terminal: Option<WindowSize>,
}

/// A further process: the payload's start, but for what is said here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// By which the reports name it.
    pub number: u64,
    pub args: Vec<String>,
    /// `NAME=value`, over the payload's.
    pub env: Vec<String>,
    pub cwd: Option<String>,
    pub user: Option<User>,
    pub has_stdin: bool,
    pub terminal: Option<WindowSize>,
}

/// Where the payload's program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    /// `args[0]`, looked for in `PATH` if it has no slash.
    Path,
    Descriptor,
}

/// Whom the payload runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    Ids {
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
    },
    /// `name`, `uid`, or either with `:group` or `:gid`, looked up in the image's own `/etc/passwd` and `/etc/group`.
    Named(String),
}

/// What init tells the keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The sandbox is built; init waits for [`Order::Start`].
    Ready,
    /// Nothing of the payload ever ran.
    Failed { kind: Kind, message: String },
    /// The payload's execve returned. Descriptors: the payload, as of pidfd_open(2), and its terminal's master if it has one.
    Started {
        /// `CLOCK_MONOTONIC`, in nanoseconds.
        at_ns: u64,
        /// CPU time that init itself spent since it joined the cgroups, in microseconds: not the payload's.
        own_cpu_us: u64,
    },
    /// Nobody works on files any more in a sandbox without a payload. So many orders to do that were followed or refused by then.
    TreesOver { served: u64 },
    /// The kernel refused a process that was to work on files: its counter of refusals is one higher for it, through no doing of the payload's.
    TreeRefused,
    /// The execve of a further process returned. Descriptors as with [`Report::Started`].
    ExecStarted {
        number: u64,
        /// `CLOCK_MONOTONIC`, in nanoseconds.
        at_ns: u64,
    },
    /// It never ran, and is no more.
    ExecFailed { number: u64, kind: Kind, message: String },
    /// It has ended. What it started and did not wait for may live on.
    ExecEnded {
        number: u64,
        status: WaitStatus,
        /// `CLOCK_MONOTONIC`, in nanoseconds.
        at_ns: u64,
        /// Of itself and the children that it waited for, in microseconds.
        cpu_us: u64,
    },
    /// What gVisor's kernel says of its processes; the last one counts.
    Processes(Processes),
    /// The payload has ended and every other process but init is dead too.
    Ended {
        status: WaitStatus,
        /// `CLOCK_MONOTONIC` of the payload's own end, in nanoseconds.
        at_ns: u64,
        /// CPU time that init spent since [`Report::Started`], in microseconds.
        own_cpu_us: u64,
        is_disk_full: bool,
        are_inodes_used_up: bool,
    },
}

/// Processes and threads in a kernel of gVisor's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// The most that were seen at one time.
    pub peak: u64,
    /// Whether that is as many as there may be.
    pub is_at_limit: bool,
}

/// How a process ended (wait(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitStatus {
    Exited { code: i32 },
    Signaled { signal: i32 },
}

impl WaitStatus {
    /// From the number that waitpid(2) stores.
    pub(crate) fn from_raw(status: i32) -> Self {
        if libc::WIFSIGNALED(status) {
            Self::Signaled { signal: libc::WTERMSIG(status) }
        } else {
            Self::Exited { code: libc::WEXITSTATUS(status) }
        }
    }
}
