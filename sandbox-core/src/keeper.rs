//! The one privileged process of a node: one thread, one loop, owner of every sandbox.
//!
//! It launches, limits, supervises and records. It knows no HTTP and no SQL, and believes neither the service nor a sandbox: requests are held
//! against the policy of `policy.rs`, and what comes from inside a sandbox is data.

mod build;
pub mod command;
mod commit;
mod connection;
mod disk;
pub(crate) mod gvisor;
mod launch;
mod output;
mod parked;
mod records;
mod recovery;
mod requests;
mod room;
mod sandbox;
mod slot;
mod store;
mod supervise;
mod timer;
mod upgrade;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    path::PathBuf,
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, EventData, EventFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    time::{ClockId, clock_gettime},
};

use commit::Commit;
use connection::{Asker, Connection};
use gvisor::Gvisor;
use parked::Lot;
use records::Records;
use room::Room;
use sandbox::{Decision, Sandbox};
use slot::Slots;
use store::Store;
use timer::{Due, Timer};
pub use upgrade::Invocation;
use upgrade::Trial;

use crate::{
    cgroup::{Device, Devices, Tree},
    disk::Disks,
    fail_point::reached,
    fence::{Fence, Fences},
    ids::{self, Ranges},
    log::{self, Kind},
    protocol::{Answer, Cause, Hello, Isolation, VERSION},
    selinux::Labels,
    sys,
};

/// How a keeper is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens.
    pub socket: PathBuf,
    /// The folder of unpacked images. Its file system must take idmapped mounts.
    pub images: PathBuf,
    /// The folder of log files.
    pub logs: PathBuf,
    /// The folder of writable layers that are on disk.
    pub disks: PathBuf,
    /// The group id that may connect and read logs.
    pub group: u32,
    /// The programs that run inside sandboxes.
    pub init: PathBuf,
    pub unpack: PathBuf,
    /// gVisor's program. `None`: the one that is installed, if any.
    pub runsc: Option<PathBuf>,
    /// Where locks of this machine's keepers lie.
    pub run: PathBuf,
    /// The SELinux labels of sandboxes. Given on a host whose SELinux does not enforce them, the keeper does not start.
    pub labels: Option<Labels>,
    /// Fences without which the keeper does not start.
    pub required: Fences,
    pub weakening: Weakening,
    /// The program that this is, for the time when another one lies there.
    pub program: Invocation,
}

/// Whether a request may leave out fences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weakening {
    Refused,
    /// For tests of what the fences are for.
    Allowed,
}

/// Sandboxes of one keeper at a time. Each has an id range of its own.
const SANDBOXES_MAX: u32 = 2048;

/// How many keepers fit beside each other on one machine.
const KEEPERS_MAX: u32 = 16;

/// How long the payload may take to start.
const START_WITHIN_NS: u64 = 30_000_000_000;
/// How long a keeper that is starting waits for the last of the one before to let go of the logs.
const LOGS_WITHIN_NS: u64 = 5_000_000_000;
/// How long preparing one thing may take on a busy machine: with a deadline closer than that, none is begun.
const PREPARING_NS: u64 = 30_000_000;
/// The keeper's nice value: what holds sandboxes to their limits must not wait for them (sched(7)).
const NICE: i32 = -11;
/// How long nothing must happen before sandboxes are prepared ahead, in milliseconds.
const IDLE_MS: i64 = 1;

/// What an event is about: the lowest byte of its number. The rest is the sandbox's or connection's serial number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Signals,
    Timer,
    Connection,
    Control,
    Init,
    Stdout,
    Stderr,
    OutOfMemory,
    Payload,
    Disk,
    Trial,
    Commit,
}

impl Source {
    const ALL: [Self; 13] = [
        Self::Listener,
        Self::Signals,
        Self::Timer,
        Self::Connection,
        Self::Control,
        Self::Init,
        Self::Stdout,
        Self::Stderr,
        Self::OutOfMemory,
        Self::Payload,
        Self::Disk,
        Self::Trial,
        Self::Commit,
    ];

    fn number(self, serial: u64) -> u64 {
        let place = Self::ALL.iter().position(|source| *source == self).expect("every source is in ALL");
        serial << 8 | place as u64
    }

    fn of(number: u64) -> Option<(Self, u64)> {
        let place = usize::try_from(number & 0xff).ok()?;
        Self::ALL.get(place).map(|source| (*source, number >> 8))
    }
}

/// The keeper and all that it owns.
#[derive(Debug)]
pub struct Keeper {
    epoll: OwnedFd,
    listener: OwnedFd,
    signals: SignalFd,
    timer: Timer,
    connections: HashMap<u64, Connection>,
    commits: HashMap<u64, Commit>,
    sandboxes: HashMap<u64, Sandbox>,
    records: Records,
    next_serial: u64,
    slots: Slots,
    lot: Lot,
    /// The keeper's own UTS namespace.
    own_uts: OwnedFd,
    tree: Tree,
    stage: PathBuf,
    store: Store,
    disks: Disks,
    programs: build::Programs,
    gvisor: Option<Gvisor>,
    seccomp: Vec<(u16, u8, u8, u32)>,
    weakening: Weakening,
    labels: Option<Labels>,
    logs: PathBuf,
    group: u32,
    hello: Hello,
    cores: u64,
    /// How much may be prepared ahead at a time.
    ahead_max: usize,
    buffer: Vec<u8>,
    shutdown: Option<Vec<Asker>>,
    trial: Option<Trial>,
    program: Invocation,
    /// Held as long as this keeper lives: its name and its id ranges are its own.
    lock: OwnedFd,
    /// The folder of logs, held as long: the records in it are its own, too.
    logs_lock: OwnedFd,
}

/// What belongs to the program, and not to what it looks after: the next one loads its own.
#[derive(Debug)]
struct Means {
    programs: build::Programs,
    gvisor: Option<Gvisor>,
    seccomp: Vec<(u16, u8, u8, u32)>,
    cores: u64,
    ahead_max: usize,
    hello: Hello,
}

/// Runs a keeper until it is told to stop. Needs root.
pub fn run(options: &Options, on_ready: impl FnOnce()) -> io::Result<()> {
    // What whoever started it left open is nobody's here, and would be every child's and the next program's.
    sys::close_from(3)?;
    sys::prefer_this_process(NICE)?;
    protect_from_oom();
    let mut keeper = Keeper::start(options)?;
    on_ready();
    keeper.serve()
}

/// Goes on with everything that the program before this one had in this process, as it stands in the file `description`.
fn go_on(options: &Options, description: RawFd) -> io::Result<()> {
    Keeper::take_over(options, description)?.serve()
}

impl Means {
    fn load(options: &Options, tree: &Tree) -> io::Result<Self> {
        let Room { sandboxes_max, ahead_max } = Room::make(tree)?;
        let fences = fences(options)?;
        let gvisor = Gvisor::open(options)?;
        let hello = Hello {
            version: VERSION,
            pid: std::process::id(),
            upgrades: 0,
            started_at_us: unix_us(),
            cgroup: tree.mode(),
            sandboxes_max,
            fences,
            isolation: [Isolation::Container].into_iter().chain(gvisor.is_some().then_some(Isolation::Gvisor)).collect(),
        };
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let seccomp = crate::seccomp::program().iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect();
        Ok(Self { programs: build::Programs::load(options)?, gvisor, seccomp, cores, ahead_max, hello })
    }
}

/// The signals that the keeper reads; they are blocked from here on.
fn signals() -> io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

fn new_epoll() -> io::Result<OwnedFd> {
    Ok(epoll::create(epoll::CreateFlags::CLOEXEC)?)
}

impl Keeper {
    fn start(options: &Options) -> io::Result<Self> {
        let (number, lock) = claim_number(&options.run)?;
        let logs_lock = claim_logs(&options.logs, options.group)?;
        sweep_dead_keepers(&options.run, number)?;
        reached("keeper.start.locked");
        let stage = stage_of(&options.run, number);
        build::settle(&stage)?;
        let store = Store::open(&options.images)?;
        let disks = Disks::open(&options.disks, crate::cgroup::discover().mode)?;
        let tree = Tree::open(&name_of(number), devices(options)?)?;
        let ranges = Ranges::new(first_id(number), SANDBOXES_MAX);
        let Means { programs, gvisor, seccomp, cores, ahead_max, hello } = Means::load(options, &tree)?;
        sweep_disks(&disks, &options.run, number)?;
        // Only now is everything dead that could write to a log.
        let mut records = Records::default();
        recovery::recover(&options.logs, &mut records)?;
        reached("keeper.start.swept");
        let keeper = Self {
            epoll: new_epoll()?,
            listener: listen_at(options)?,
            signals: signals()?,
            timer: Timer::new()?,
            connections: HashMap::new(),
            commits: HashMap::new(),
            sandboxes: HashMap::new(),
            records,
            next_serial: 1,
            slots: Slots::new(ranges)?,
            lot: Lot::default(),
            own_uts: std::fs::File::open("/proc/self/ns/uts")?.into(),
            tree,
            stage,
            store,
            disks,
            programs,
            gvisor,
            seccomp,
            weakening: options.weakening,
            labels: options.labels.clone(),
            logs: options.logs.clone(),
            group: options.group,
            hello,
            cores,
            ahead_max,
            buffer: vec![0; log::DATA_BYTES_MAX],
            shutdown: None,
            trial: None,
            program: options.program.clone(),
            lock,
            logs_lock,
        };
        keeper.watch_own()?;
        reached("keeper.start.listening");
        Ok(keeper)
    }

    fn watch_own(&self) -> io::Result<()> {
        self.watch(self.listener.as_fd(), Source::Listener, 0)?;
        self.watch(self.signals.as_fd(), Source::Signals, 0)?;
        self.watch(self.timer.descriptor(), Source::Timer, 0)
    }

    fn watch(&self, descriptor: BorrowedFd<'_>, source: Source, serial: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, EventData::new_u64(source.number(serial)), EventFlags::IN)?)
    }

    /// The loop. One turn handles what is ready, sandboxes before new requests.
    fn serve(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(256);
        let mut may_refill = true;
        loop {
            if self.is_done()? {
                return Ok(());
            }
            events.clear();
            let idle = rustix::time::Timespec { tv_sec: 0, tv_nsec: IDLE_MS * 1_000_000 };
            let timeout = may_refill.then_some(&idle);
            rustix::io::retry_on_intr(|| epoll::wait(&self.epoll, spare_capacity(&mut events), timeout))?;
            if events.is_empty() {
                may_refill = self.shutdown.is_none() && self.prepare_ahead();
                continue;
            }
            for event in &events {
                if let Some((source, serial)) = Source::of(event.data.u64()) {
                    let handled = self.handle(source, serial, event.flags);
                    self.contain(source, serial, handled)?;
                    may_refill = true;
                }
            }
        }
    }

    /// Makes one thing that will be needed. False: there is enough, or it cannot be made now; what needs it then says why.
    fn prepare_ahead(&mut self) -> bool {
        // Making a network namespace can wait for the kernel to bury others; no limit in time waits with it.
        if !self.timer.is_free_for(monotonic_ns(), PREPARING_NS) {
            return true;
        }
        let prepared = self.end_parked(|_| false).and_then(|()| {
            if self.lot.len() + self.slots.ready() >= self.ahead_max {
                return Ok(false);
            }
            if self.park()? { Ok(true) } else { self.slots.refill(&self.tree) }
        });
        match prepared {
            Ok(is_more) => is_more,
            Err(error) => {
                warn(format_args!("preparing a sandbox ahead failed: {error}"));
                false
            }
        }
    }

    /// Keeps what went wrong with one sandbox or client from the others: it is ended, the keeper goes on.
    fn contain(&mut self, source: Source, serial: u64, handled: io::Result<()>) -> io::Result<()> {
        let Err(error) = handled else { return Ok(()) };
        match source {
            Source::Listener | Source::Signals | Source::Timer => Err(error),
            Source::Commit => {
                warn(format_args!("keeping an image failed: {error}"));
                Ok(())
            }
            Source::Trial => {
                warn(format_args!("not upgrading: {error}"));
                Ok(())
            }
            Source::Connection => {
                warn(format_args!("disconnecting a client: {error}"));
                self.disconnect(serial);
                Ok(())
            }
            Source::Control | Source::Init | Source::Stdout | Source::Stderr | Source::OutOfMemory | Source::Payload | Source::Disk => {
                warn(format_args!("a sandbox is ended because its supervision failed: {error}"));
                self.kill_by_force(serial)?;
                self.end(serial, None, Some(Cause::InfraError { message: format!("supervising the sandbox failed: {error}") }));
                Ok(())
            }
        }
    }

    fn handle(&mut self, source: Source, serial: u64, flags: EventFlags) -> io::Result<()> {
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.on_signals(),
            Source::Timer => self.on_timer(),
            Source::Connection => self.on_connection(serial, flags),
            Source::Control => self.on_report(serial),
            Source::Init => self.on_init_death(serial),
            Source::Stdout => self.on_output(serial, Kind::Stdout),
            Source::Stderr => self.on_output(serial, Kind::Stderr),
            Source::OutOfMemory => self.on_oom_notice(serial),
            Source::Payload => self.on_payload_death(serial),
            Source::Disk => self.on_disk(serial),
            Source::Trial => self.on_trial(serial),
            Source::Commit => self.on_commit(serial),
        }
    }

    fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    fn on_signals(&mut self) -> io::Result<()> {
        while let Some(signal) = self.signals.read_signal()? {
            match signal.ssi_signo.cast_signed() {
                libc::SIGCHLD => {}
                libc::SIGHUP => self.begin_upgrade(),
                _ => self.stop(None)?,
            }
        }
        // Inits are watched by their pidfds, which stay valid; whatever else was started is simply reaped.
        while let Ok(Some(_)) = sys::reap(-1, false) {}
        Ok(())
    }

    /// Kills every sandbox; the loop ends when all are gone.
    fn stop(&mut self, asker: Option<Asker>) -> io::Result<()> {
        self.shutdown.get_or_insert_default().extend(asker);
        self.end_parked(|_| true)?;
        let serials: Vec<u64> = self.sandboxes.keys().copied().collect();
        serials.into_iter().try_for_each(|serial| self.decide(serial, Decision::Killed(crate::protocol::KillReason::StoppedByAdmin)))
    }

    fn is_done(&mut self) -> io::Result<bool> {
        let is_empty = self.lot.len() == 0 && self.sandboxes.values().all(|sandbox| sandbox.body.is_none() && sandbox.is_told);
        let Some(askers) = self.shutdown.take_if(|_| is_empty) else { return Ok(false) };
        self.slots.drain()?;
        self.tree.remove()?;
        std::fs::remove_dir(&self.stage)?;
        for asker in askers {
            self.answer(asker, Answer::Done);
        }
        Ok(true)
    }
}

/// The fences that sandboxes on this host have, once they are set up.
fn fences(options: &Options) -> io::Result<Fences> {
    let mut fences = Fences::everywhere();
    let mut missing = String::new();
    if crate::landlock::is_available() {
        fences = fences.with(Fence::Landlock);
    }
    if crate::apparmor::is_enabled() {
        match crate::apparmor::load() {
            Ok(()) => fences = fences.with(Fence::Apparmor),
            Err(error) => {
                warn(format_args!("sandboxes run without AppArmor: {error}"));
                missing = format!(" ({error})");
            }
        }
    }
    if let Some(labels) = &options.labels {
        crate::selinux::check(labels)?;
        fences = fences.with(Fence::Selinux);
    }
    let lacking = options.required.without(fences);
    if lacking.is_empty() {
        return Ok(fences);
    }
    let names: Vec<&str> = lacking.iter().map(Fence::name).collect();
    Err(io::Error::other(format!("this host lacks a fence that it must have: {}{missing}", names.join(", "))))
}

/// What the kernel is to kill last when the machine runs out of memory (proc_pid_oom_score_adj(5)): with the keeper, every sandbox would go.
const OOM_SCORE_ADJ: &str = "-999";

/// Protects the keeper where it may: lowering the value takes CAP_SYS_RESOURCE.
fn protect_from_oom() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        warn(format_args!("the kernel may kill the keeper for want of memory like anybody else: lowering oom_score_adj failed: {error}"));
    }
}

/// Takes that protection from a child that is no keeper. No error where there is none to take.
fn expose_to_oom() {
    drop(std::fs::write("/proc/self/oom_score_adj", "0"));
}

/// Says something to whoever keeps the keeper's log; if nobody reads it any more, then not.
fn warn(message: std::fmt::Arguments<'_>) {
    use std::io::Write;
    drop(writeln!(io::stderr(), "sandbox-keeper: {message}"));
}

/// The lowest number that no living keeper of this machine has. The lock goes with the process.
fn claim_number(run: &std::path::Path) -> io::Result<(u32, OwnedFd)> {
    std::fs::create_dir_all(run)?;
    for number in 0..KEEPERS_MAX {
        if let Some(lock) = try_lock(run, number)? {
            return Ok((number, lock));
        }
    }
    Err(io::Error::other(format!("{KEEPERS_MAX} keepers run on this machine already")))
}

/// The lock of keeper `number`, if none is alive that holds it.
fn try_lock(run: &std::path::Path, number: u32) -> io::Result<Option<OwnedFd>> {
    let file = std::fs::File::options().create(true).append(true).open(run.join(format!("keeper-{number}.lock")))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The folder of logs, made if it is missing, for this keeper alone: another one that found logs without an end there would take their sandboxes for dead.
fn claim_logs(logs: &std::path::Path, group: u32) -> io::Result<OwnedFd> {
    match std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o750).create(logs) {
        Ok(()) => std::os::unix::fs::chown(logs, None, Some(group))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", logs.display()))),
    }
    let folder = std::fs::File::open(logs).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", logs.display())))?;
    let deadline = monotonic_ns() + LOGS_WITHIN_NS;
    loop {
        match rustix::fs::flock(&folder, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder.into()),
            // A keeper that was killed a moment ago may have a child left that dies of it.
            Err(rustix::io::Errno::WOULDBLOCK) if monotonic_ns() < deadline => std::thread::sleep(std::time::Duration::from_millis(5)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::other(format!("another keeper writes its logs to {}", logs.display())));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The first host id of the ranges of keeper `number`.
fn first_id(number: u32) -> u32 {
    ids::FIRST + number * SANDBOXES_MAX * ids::RANGE
}

/// What the cgroups of keeper `number` are called.
fn name_of(number: u32) -> String {
    format!("k{number}")
}

/// Removes the cgroups and folders of keepers that were killed; their processes died with them. Lock files stay: a lock on one that
/// is deleted would be no lock.
fn sweep_dead_keepers(run: &std::path::Path, own: u32) -> io::Result<()> {
    for number in (0..KEEPERS_MAX).filter(|number| *number != own && stage_of(run, *number).exists()) {
        if let Some(_lock) = try_lock(run, number)? {
            let swept = Tree::open(&name_of(number), Devices::default())
                .and_then(|tree| tree.remove())
                .and_then(|()| std::fs::remove_dir(stage_of(run, number)));
            if let Err(error) = swept {
                // Not ours: the next keeper tries again.
                warn(format_args!("what keeper {number} left could not be removed: {error}"));
            }
        }
    }
    Ok(())
}

/// Removes what is left of writable layers of keeper `own`, and of those that no living keeper has.
fn sweep_disks(disks: &Disks, run: &std::path::Path, own: u32) -> io::Result<()> {
    for number in 0..KEEPERS_MAX {
        let first = first_id(number);
        let is_of_number = |id: u32| (first..first_id(number + 1)).contains(&id);
        let left = disks.left(is_of_number)?;
        let lock = if number == own || left.is_empty() { None } else { try_lock(run, number)? };
        if number == own || lock.is_some() {
            left.iter().try_for_each(|folder| store::remove_in_background(folder))?;
        }
    }
    Ok(())
}

/// The disks below the folders that sandboxes reach.
fn devices(options: &Options) -> io::Result<Devices> {
    let of = |folder: &std::path::Path| {
        let device = Device::of(folder)?;
        if device.is_none() {
            warn(format_args!("{} is on no block device: what sandboxes read and write there has no limit of rate", folder.display()));
        }
        Ok::<_, io::Error>(device)
    };
    Ok(Devices { images: of(&options.images)?, disks: of(&options.disks)? })
}

/// The empty folder that the sandboxes of keeper `number` build their trees on.
fn stage_of(run: &std::path::Path, number: u32) -> PathBuf {
    run.join(format!("stage-{number}"))
}

/// A listening socket that root and the service's group may connect to. One that a dead keeper left is replaced.
fn listen_at(options: &Options) -> io::Result<OwnedFd> {
    match std::fs::remove_file(&options.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = bind(&socket, &SocketAddrUnix::new(&options.socket)?);
    rustix::process::umask(old);
    bound?;
    std::os::unix::fs::chown(&options.socket, None, Some(options.group))?;
    std::fs::set_permissions(&options.socket, std::os::unix::fs::PermissionsExt::from_mode(0o660))?;
    listen(&socket, 64)?;
    Ok(socket)
}

fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

fn unix_us() -> u64 {
    nanoseconds(ClockId::Realtime) / 1000
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
