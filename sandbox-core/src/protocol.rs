//! What the service and the keeper say to each other: one message a datagram, over a unix seqpacket socket.
//!
//! A request carries a `tag` of the caller's choosing and is answered by exactly one [`Reply`] with that tag, at once or —
//! [`Request::Wait`] — when the sandbox ends. The keeper pushes nothing: what it knows of a sandbox stays in its records until
//! [`Request::Forget`], so a service that was killed asks again and has missed nothing. Endings are in the logs (`log.rs`) before they are told, so
//! the keeper that comes after one that was killed has them, too.
//!
//! Messages are encoded with postcard; the description of a sandbox inside them is the standard's `config.json`
//! (OCI runtime-spec, `config.md`). Descriptors travel beside the message (`SCM_RIGHTS`, unix(7)).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::fence::Fences;

pub mod init;

/// Version of this protocol. Both sides refuse another one.
pub const VERSION: u32 = 3;

/// The largest message either side may send, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 384 * 1024;

/// The most descriptors that go with one message (the kernel's own bound, `SCM_MAX_FD`, is 253).
pub const DESCRIPTORS_MAX: usize = 130;

/// Names one sandbox, everywhere and for good.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SandboxId(pub Uuid);

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SandboxId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// Names the unpacked root of an image in the keeper's store: the image's digest, 64 lower-case hex digits.
///
/// Holding one proves the form, so it is safe as a file name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(String);

/// The text was not 64 lower-case hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an image id is 64 lower-case hex digits")]
pub struct ImageIdInvalid;

impl TryFrom<String> for ImageId {
    type Error = ImageIdInvalid;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (text.len() == 64 && is_hex).then_some(Self(text)).ok_or(ImageIdInvalid)
    }
}

impl FromStr for ImageId {
    type Err = ImageIdInvalid;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.to_owned().try_into()
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the service asks of the keeper, with the number that its answer will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub tag: u64,
    pub request: Request,
}

/// What can be asked of a keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First on every connection. Answered by [`Answer::Hello`].
    Hello { version: u32 },
    /// Start a sandbox. Answered by [`Answer::Launched`] when the payload's program has replaced init's child (execve(2)
    /// returned in it), or by [`Answer::Ended`] when it never came to that.
    /// Descriptors: the payload's stdin if `stdin` is [`Stdin::Descriptor`], then the files if `has_files`.
    Launch(Box<Launch>),
    /// Answered by [`Answer::Ended`] when the sandbox is over, at once if it is already; `Gone` if it is not known.
    Wait { id: SandboxId },
    /// End a sandbox. The reason is recorded before the kill. Answered by [`Answer::Done`]; no error if it is already over.
    Kill { id: SandboxId, reason: KillReason },
    /// The records that were not forgotten yet and have changed after number `after` (0: all). Answered by [`Answer::Records`], as many as fit; for
    /// the rest, ask again after the last one's number. Numbers are those of one keeper ([`Hello::started_at_us`]).
    List { after: u64 },
    /// Drop the record of an ended sandbox and delete its log file. The service says this once it has both in safety.
    /// Answered by [`Answer::Done`], also if there is no record; `Busy` if it has not ended.
    Forget { id: SandboxId },
    /// Send a signal (signal(7)) to the first process of a payload or an exec, and to nothing else. Answered by [`Answer::Done`], also if it is over; `Gone` if
    /// there is no such sandbox or exec, `Busy` if it does not run yet, has not taken earlier ones, or is paused under gVisor (but for SIGKILL).
    Signal { id: SandboxId, signal: i32 },
    /// Ask for the end of a sandbox or an exec: this signal now and, `grace_ms` later, a [`Request::Kill`], whoever is connected by then. The reason is recorded before the signal. Answered
    /// by [`Answer::Done`] when the signal is sent.
    Stop { id: SandboxId, signal: i32, grace_ms: u64, reason: KillReason },
    /// Freeze every process of a sandbox (cgroup freezer); its limits in real time go on. Answered by [`Answer::Done`] when they stand still; no error if they did.
    Pause { id: SandboxId },
    /// Let them go on. Answered by [`Answer::Done`].
    Resume { id: SandboxId },
    /// Hold a sandbox to other limits from now on: all of them, or none if one is refused. Answered by [`Answer::Done`]; `Refused` if the node's policy or the
    /// kernel does not take one, as memory that is in use already and is not given back within a second; `Busy` while others are being set.
    Update { id: SandboxId, limits: NewLimits },
    /// What a sandbox uses now. Answered by [`Answer::Sample`].
    Sample { id: SandboxId },
    /// A new TCP socket of this family in the network namespace of a sandbox, not connected. Answered by [`Answer::Descriptor`] with it.
    Connect { id: SandboxId, family: Family },
    /// The writing end of what a payload or an exec reads that has [`Stdin::Held`] or a terminal. Answered by [`Answer::Descriptor`] with it: a pipe,
    /// not blocking. `Gone` once the input has ended or nobody has the terminal open, `Busy` before there is one.
    Input { id: SandboxId },
    /// Ends that input: the keeper lets go of its end. End of file is read when everybody who was given it has done so, too; at a terminal it is what
    /// its user types (termios(3), `VEOF`), behind what was written before. Answered by [`Answer::Done`]; `Busy` while a terminal does not take it.
    EndInput { id: SandboxId },
    /// The size of the terminal of a payload or an exec. Answered by [`Answer::Done`]; `Refused` if it has none.
    Resize { id: SandboxId, size: WindowSize },
    /// Start a further process in a running sandbox. Answered like a launch. The exec is then known by its own id: it is waited for, killed, signalled, listed and
    /// forgotten like a sandbox, has a log and an ending of its own, and ends with its sandbox. Descriptor: its stdin if that is [`Stdin::Descriptor`].
    Exec(Box<Exec>),
    /// Work on the files of a sandbox, from inside its own tree and as its own root ([`crate::tree`]). Descriptor: a connected stream socket, on which the rest is said. Works on one
    /// that has ended, too, while its layer is kept. Answered by [`Answer::Done`] once somebody listens there.
    Tree { id: SandboxId },
    /// Give up the writable layer that an ended sandbox kept. Answered by [`Answer::Done`], also if there is none; `Busy` while a sandbox runs on it.
    DropLayer { id: SandboxId },
    /// Whose writable layers are kept, or will be. Answered by [`Answer::Layers`].
    Layers,
    /// Make a volume of this size. Answered by [`Answer::Done`], also if it is there already with this size.
    MakeVolume { volume: VolumeId, bytes: u64, inodes: u64 },
    /// Delete a volume. Answered by [`Answer::Done`], also if there is none; `Busy` while a sandbox has it.
    RemoveVolume { volume: VolumeId },
    /// Which volumes there are. Answered by [`Answer::Volumes`].
    Volumes,
    /// Drop the record of an ended sandbox but keep its log file, for a later [`Request::Forget`]. Answered like that.
    ForgetRecord { id: SandboxId },
    /// Unpack layers, bottom first, into the image store, inside a throw-away sandbox. Descriptors: one readable regular file a
    /// layer (tar; plain, gzip or zstd). Answered by [`Answer::Unpacked`]; at once if the store already has this image.
    Unpack { image: ImageId, layers: u32, limits: UnpackLimits },
    /// Which unpacked images the store holds. Answered by [`Answer::Images`].
    Images,
    /// Delete an unpacked image. Answered by [`Answer::Done`], also if there is none; `Busy` while a sandbox runs on it, or a layer is kept that belongs
    /// on it.
    RemoveImage { image: ImageId },
    /// Kill every sandbox, clean up, exit. Answered by [`Answer::Done`] before the keeper exits.
    Shutdown,
}

/// The answer to the [`Call`] with the same tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    pub tag: u64,
    pub answer: Answer,
}

/// What the keeper answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Hello(Hello),
    Launched(Launched),
    Ended(Box<Ending>),
    /// In the order of [`Record::seq`].
    Records {
        records: Vec<Record>,
        is_more: bool,
    },
    Unpacked(Unpacked),
    Images(Vec<ImageId>),
    Sample(Box<Sample>),
    /// With one descriptor.
    Descriptor,
    Volumes(Vec<VolumeId>),
    Layers(Vec<SandboxId>),
    Done,
    Failed(Failure),
}

/// What a keeper says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version: u32,
    pub pid: u32,
    /// How often it has gone on as a new program since it started, with all its sandboxes.
    pub upgrades: u32,
    /// Unix time in microseconds when this keeper started: another value means another keeper. Of the sandboxes of the one before it has the records, as ended.
    pub started_at_us: u64,
    pub cgroup: CgroupMode,
    /// How many sandboxes this keeper can run at once: it has id ranges and descriptors for so many.
    pub sandboxes_max: u32,
    /// The fences that every sandbox on this node has.
    pub fences: Fences,
    /// What a [`Launch`] may ask for here. [`Isolation::Container`] is always among them.
    pub isolation: Vec<Isolation>,
}

/// The node's cgroup world (cgroups(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CgroupMode {
    V1,
    Hybrid,
    V2,
}

/// What stands between a payload and the host's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// The fences of [`Fence`](crate::fence::Fence): the payload's system calls go to the host's kernel, as far as they may.
    #[default]
    Container,
    /// A kernel of its own, gVisor's, in user space: the payload's system calls never reach the host's. On nodes that have `runsc`.
    Gvisor,
}

/// All that the keeper needs to start a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub id: SandboxId,
    pub image: ImageId,
    /// An `oci_spec::runtime::Spec` as JSON. The keeper accepts what `policy.rs` names and nothing else.
    pub spec: Vec<u8>,
    pub isolation: Isolation,
    pub supervision: Supervision,
    pub stdin: Stdin,
    /// With a terminal of this size the payload reads and writes there: it has no other stdin, and its stderr goes where its stdout does.
    pub terminal: Option<WindowSize>,
    /// Whether a file with [`crate::files`] entries comes along.
    pub has_files: bool,
    pub layer: Layering,
    /// Whether the writable layer stays when it ends, until [`Request::DropLayer`] or the end of this keeper.
    pub keeps_layer: bool,
    /// At most [`VOLUMES_MAX`]. None under gVisor.
    pub volumes: Vec<VolumeMount>,
}

/// What the writable layer of a new sandbox holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layering {
    /// Nothing.
    Fresh,
    /// What the ended sandbox of this name left in its own, which is then this one's. `Gone` if it is not kept any more.
    Of(SandboxId),
    /// Nothing, above what the ended sandbox of this name left in its own: that is seen, and stays as it is. Its image must be the same; room and place need not be.
    /// Such a sandbox keeps no layer. `Busy` while somebody has the layer below, `Gone` if it is not kept any more.
    Over(SandboxId),
}

/// Names one volume, everywhere and for good.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(pub Uuid);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for VolumeId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// The most volumes of one sandbox.
pub const VOLUMES_MAX: usize = 16;

/// The most folders that a sandbox's spec names as mounts without a source.
pub const FOLDERS_MAX: usize = 64;

/// Where a volume stands in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    pub volume: VolumeId,
    /// Absolute, of folders between single slashes, none of them `.` or `..`; not below `/proc`, `/sys` or `/dev`, and not within another volume's. Made if it is
    /// not there; a link on the way is refused.
    pub path: String,
    pub is_read_only: bool,
}

/// A process that is started in a running sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Its own.
    pub id: SandboxId,
    pub sandbox: SandboxId,
    pub args: Vec<String>,
    /// `NAME=value`, over the payload's own.
    pub env: Vec<String>,
    /// Absolute. `None`: where the payload was started.
    pub cwd: Option<String>,
    /// As in a request. `None`: whom the payload was started as.
    pub user: Option<String>,
    pub stdin: Stdin,
    pub terminal: Option<WindowSize>,
    /// Real time from its start to its end, in milliseconds.
    pub wall_ms: Option<u64>,
    /// The most bytes kept of stdout, and as many of stderr.
    pub output_bytes: u64,
    /// [`OutputPolicy::Kill`] ends the exec, not the sandbox.
    pub output_policy: OutputPolicy,
}

/// The size of a terminal, in characters (tty_ioctl(4), `TIOCSWINSZ`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

/// A family of internet addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    V4,
    V6,
}

/// Other limits for a running sandbox. `None`: as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewLimits {
    pub memory_bytes: Option<u64>,
    /// Thousandths of a core.
    pub cpu_millis: Option<u64>,
    pub pids: Option<u64>,
    /// From the payload's start, as at its launch.
    pub wall_ms: NewTime,
    pub cpu_ms: NewTime,
    pub io: Option<IoLimits>,
}

/// Another limit in time for a running sandbox, which it may also be without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewTime {
    /// It is as it was.
    #[default]
    Same,
    /// There is none from now on.
    Unlimited,
    /// So many milliseconds.
    Ms(u64),
}

impl NewTime {
    /// The limit from now on, where it was `before`.
    #[must_use]
    pub const fn over(self, before: Option<u64>) -> Option<u64> {
        match self {
            Self::Same => before,
            Self::Unlimited => None,
            Self::Ms(ms) => Some(ms),
        }
    }
}

/// What a sandbox uses at one time, from its cgroups and its network namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Unix time, in microseconds.
    pub at_us: u64,
    pub cpu_us: u64,
    pub throttled_us: u64,
    pub memory_bytes: u64,
    pub memory_peak_bytes: u64,
    /// Processes and threads, without our own init.
    pub pids: u64,
    pub pids_peak: u64,
    /// As in [`Usage`].
    pub io_read_bytes: u64,
    pub io_written_bytes: u64,
    pub io_reads: u64,
    pub io_writes: u64,
    /// Over all interfaces but loopback; 0 where there is none.
    pub network_received_bytes: u64,
    pub network_sent_bytes: u64,
    /// When the payload last wrote something, kept or not; while what it wrote waits for room on the node's disk, now. `None`: it never did.
    pub output_at_us: Option<u64>,
    pub is_paused: bool,
}

/// Where the payload's standard input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdin {
    /// `/dev/null` of the sandbox.
    Null,
    /// The descriptor that comes with the request: a sealed memfd, or the reading end of a pipe.
    Descriptor,
    /// A pipe whose writing end the keeper holds, and gives out ([`Request::Input`]): it stays open whoever comes and goes.
    Held,
}

/// The limits that the OCI runtime spec has no place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervision {
    /// Real time from the payload's start to its end, in milliseconds. `None`: no such limit (long-lived sandboxes).
    pub wall_ms: Option<u64>,
    /// CPU time of all processes together, in milliseconds.
    pub cpu_ms: Option<u64>,
    /// The most bytes kept of stdout, and as many of stderr.
    pub output_bytes: u64,
    pub output_policy: OutputPolicy,
    /// Where the writable layer is kept.
    pub medium: Medium,
    /// Size of the writable layer, in bytes.
    pub disk_bytes: u64,
    /// The most files, folders and links in the writable layer.
    pub inodes: u64,
    pub io: IoLimits,
}

/// Where a writable layer is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Medium {
    /// In memory: as fast as that, and charged to the memory limit.
    Memory,
    /// On the node's disk, with its space set aside before the payload starts.
    Disk,
}

/// How fast a sandbox may read from the node's disks, and as fast again write to them. Each of them, by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IoLimits {
    pub bytes_per_s: u64,
    pub ops_per_s: u64,
}

impl IoLimits {
    /// As fast as any disk: the largest values that a keeper accepts.
    pub const MAX: Self = Self { bytes_per_s: 1 << 40, ops_per_s: 1 << 31 };
}

/// What happens to a payload that writes more than `output_bytes` to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputPolicy {
    /// The first `output_bytes` are kept, the rest is read and dropped; the payload goes on.
    Truncate,
    /// The sandbox is ended with `output_limit`; the first `output_bytes` are kept.
    Kill,
    /// Nothing is kept; bytes are only counted.
    Discard,
}

/// Who ends a sandbox, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KillReason {
    StoppedByUser,
    StoppedByAdmin,
    Expired,
    IdleTimeout,
    Evicted,
}

/// The payload runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launched {
    /// Unix time, in microseconds.
    pub started_at_us: u64,
    /// From the keeper's receipt of the request to the payload's execve, in microseconds.
    pub launch_us: u64,
    pub start: Start,
    /// The fences that stand around this one.
    pub fences: Fences,
}

/// Whether the parts of a sandbox that can be prepared ahead were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    Warm,
    Cold,
}

/// How a sandbox ended, with what it used. Final: two questions about one sandbox get the same answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    pub cause: Cause,
    /// `None`: the payload never ran.
    pub launched: Option<Launched>,
    /// Unix time, in microseconds.
    pub ended_at_us: u64,
    pub usage: Usage,
    /// Every limit that was reached, whether or not it ended the payload. In the order of [`Limit`], each once.
    pub limits_hit: Vec<Limit>,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: u64,
    pub stdout_truncated: bool,
    pub stderr_truncated: bool,
}

/// Why a sandbox ended. What we did is recorded before it is done; memory comes from the kernel's counter; nothing is guessed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    Exited {
        code: i32,
    },
    Signaled {
        signal: i32,
    },
    OomKilled,
    CpuTimeout,
    WallTimeout,
    OutputLimit,
    Killed(KillReason),
    /// It can never work: no such program, no such folder, not executable. The text names it.
    StartFailed {
        message: String,
    },
    /// This node could not do it, or lost it. Another try may work.
    InfraError {
        message: String,
    },
}

/// A limit by the name it has in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    Memory,
    Pids,
    Cpu,
    Wall,
    Disk,
    Inodes,
    Output,
    /// Never told: a refused open (`EMFILE`) leaves no trace in the kernel that anybody but the process itself could see.
    OpenFiles,
    /// The payload's first process was ended by SIGXFSZ. A process that ignores the signal, or a child, is told by its own error alone.
    FileSize,
}

/// What a sandbox used, from the kernel's counters for its cgroups and the keeper's for its pipes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From the payload's execve to its exit.
    pub wall_us: u64,
    pub cpu_us: u64,
    pub memory_peak_bytes: u64,
    /// The most processes and threads at one time, without our own init. Under [`Isolation::Gvisor`] the most that were seen: its kernel
    /// keeps no such counter, so they are counted every tenth of a second and when the payload ends.
    pub pids_peak: u64,
    /// How long the CPU rate limit held it back.
    pub throttled_us: u64,
    /// Bytes written by the payload, kept or not.
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    /// What reached the node's disks: that of the images and that of writable layers. What the page cache answered is not in it, and on
    /// cgroup v1 neither is what the kernel wrote back from it on its own (it then does not know for whom).
    pub io_read_bytes: u64,
    pub io_written_bytes: u64,
    pub io_reads: u64,
    pub io_writes: u64,
}

/// What the keeper knows of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub id: SandboxId,
    /// Given anew whenever the record changes — accepted, launched, ended — and larger than any before.
    pub seq: u64,
    /// `None`: the payload does not run yet.
    pub launched: Option<Launched>,
    /// Whether it is over. [`Request::Wait`] then answers at once, with the ending.
    pub is_ended: bool,
}

/// What an image may be at the most, unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpackLimits {
    pub bytes: u64,
    pub entries: u64,
    pub wall_ms: u64,
}

/// What came out of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// Bytes of file content.
    pub bytes: u64,
    pub entries: u64,
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

/// What a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The request breaks the protocol or the node's policy, or what another one asked for undid it. Repeated as it is, it is no use.
    Refused,
    /// No such sandbox or image here.
    Gone,
    /// Not now: out of something, which the message names, or the sandbox has not ended.
    Busy,
    /// This machine failed. The message says at which step.
    Host,
}
