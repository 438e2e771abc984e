//! The one privileged process of a node: one thread, one loop, owner of every sandbox.
//!
//! It launches, limits, supervises and records. It knows no HTTP and no SQL, and believes neither the service nor a sandbox: requests are held
//! against the policy of `policy.rs`, and what comes from inside a sandbox is data.

mod below;
mod build;
mod claim;
pub mod command;
mod commit;
mod connection;
mod control;
mod disk;
mod end;
mod exec;
pub(crate) mod gvisor;
mod launch;
mod layer;
mod lowering;
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
mod terminal;
mod timer;
mod tree;
mod upgrade;
mod volume;
mod warning;
mod worker;

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
    time::{ClockId, clock_gettime},
};

use commit::Commit;
use connection::{Asker, Connection};
use exec::Exec;
use gvisor::Gvisor;
use layer::Layers;
use parked::Lot;
use records::Records;
use room::Room;
use sandbox::{Decision, Sandbox};
use slot::Slots;
use store::Store;
use terminal::Typist;
use timer::{Due, Timer};
pub use upgrade::Invocation;
use upgrade::Trial;
use volume::Volumes;
use warning::warn;

use crate::{
    cgroup::Tree,
    disk::{Disks, volume::VolumeFiles},
    error::at,
    fail_point::reached,
    fence::Fences,
    ids::Ranges,
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
    /// The folder of volumes.
    pub volumes: PathBuf,
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

/// How long the payload may take to start.
const START_WITHIN_NS: u64 = 30_000_000_000;
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
    /// Who removes a layer that was kept.
    Layer,
    /// Who lowers a memory limit.
    Memory,
    /// What is typed at a terminal.
    Typed,
    /// Who types what ends the input of one.
    Typist,
    /// Who is at a volume.
    Volume,
    /// Who makes ready what is to lie below a layer.
    Below,
}

impl Source {
    const ALL: [Self; 19] = [
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
        Self::Layer,
        Self::Memory,
        Self::Typed,
        Self::Typist,
        Self::Volume,
        Self::Below,
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
    typists: HashMap<u64, Typist>,
    sandboxes: HashMap<u64, Sandbox>,
    execs: HashMap<u64, Exec>,
    records: Records,
    next_serial: u64,
    slots: Slots,
    layers: Layers,
    volumes: Volumes,
    volume_files: VolumeFiles,
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
    execs_max: usize,
    /// How many volumes may be in use at a time.
    volumes_max: usize,
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
    execs_max: usize,
    volumes_max: usize,
    hello: Hello,
}

/// Runs a keeper until it is told to stop. Needs root.
pub fn run(options: &Options, on_ready: impl FnOnce()) -> io::Result<()> {
    // What whoever started it left open is nobody's here, and would be every child's and the next program's.
    sys::close_from(3)?;
    sys::prefer_this_process(NICE)?;
    claim::protect_from_oom();
    let mut keeper = Keeper::start(options)?;
    on_ready();
    keeper.serve()
}

/// Goes on with everything that the program before this one had in this process, as it stands in the file `description`.
fn go_on(options: &Options, description: RawFd) -> io::Result<()> {
    Keeper::take_over(options, description)?.serve()
}

impl Means {
    /// `known`: the fences that this keeper has set up already, by the program before.
    fn load(options: &Options, tree: &Tree, known: Option<Fences>) -> io::Result<Self> {
        let Room { sandboxes_max, ahead_max, execs_max, volumes_max } = Room::make(tree)?;
        let fences = known.map_or_else(|| claim::fences(options), Ok)?;
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
        Ok(Self { programs: build::Programs::load(options)?, gvisor, seccomp, cores, ahead_max, execs_max, volumes_max, hello })
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
        let (number, lock) = claim::claim_number(&options.run)?;
        let logs_lock = claim::claim_logs(&options.logs, options.group)?;
        claim::sweep_dead_keepers(&options.run, number)?;
        reached("keeper.start.locked");
        let stage = claim::stage_of(&options.run, number);
        build::settle(&stage)?;
        let store = Store::open(&options.images)?;
        let disks = Disks::open(&options.disks, crate::cgroup::discover().mode)?;
        let volume_files = VolumeFiles::open(&options.volumes)?;
        let tree = Tree::open(&claim::name_of(number), claim::devices(options)?)?;
        let ranges = Ranges::new(claim::first_id(number), SANDBOXES_MAX);
        let Means { programs, gvisor, seccomp, cores, ahead_max, execs_max, volumes_max, hello } = Means::load(options, &tree, None)?;
        claim::sweep_disks(&disks, &options.run, number)?;
        // Only now is everything dead that could write to a log.
        let mut records = Records::default();
        recovery::recover(&options.logs, &mut records)?;
        reached("keeper.start.swept");
        if hello.sandboxes_max == 0 {
            return Err(io::Error::other("the limit of descriptors is not enough for a single sandbox"));
        }
        let mut slots = Slots::new(ranges)?;
        // A host that cannot make these never will: said now, and not to everybody who asks for a sandbox.
        slots.refill(&tree).map_err(at("making the namespaces and the cgroup of a first sandbox"))?;
        let keeper = Self {
            epoll: new_epoll()?,
            listener: claim::listen_at(options)?,
            signals: signals()?,
            timer: Timer::new()?,
            connections: HashMap::new(),
            commits: HashMap::new(),
            typists: HashMap::new(),
            sandboxes: HashMap::new(),
            execs: HashMap::new(),
            records,
            next_serial: 1,
            slots,
            layers: Layers::default(),
            volumes: Volumes::default(),
            volume_files,
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
            execs_max,
            volumes_max,
            buffer: vec![0; log::DATA_BYTES_MAX],
            shutdown: None,
            trial: None,
            program: options.program.clone(),
            lock,
            logs_lock,
        };
        if keeper.hello.sandboxes_max < SANDBOXES_MAX {
            let max = keeper.hello.sandboxes_max;
            warn(format_args!("its limit of descriptors is enough for {max} sandboxes at a time, not {SANDBOXES_MAX}"));
        }
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
            let timeout = may_refill.then(|| self.pause_before_preparing());
            rustix::io::retry_on_intr(|| epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()))?;
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

    /// How long nothing must happen before something is made ahead: no time where little is left of it.
    fn pause_before_preparing(&self) -> rustix::time::Timespec {
        let is_urgent = self.lot.is_short(monotonic_ns()) && self.has_time_to_prepare();
        rustix::time::Timespec { tv_sec: 0, tv_nsec: if is_urgent { 0 } else { IDLE_MS * 1_000_000 } }
    }

    /// Makes one thing that will be needed. False: there is enough, or it cannot be made now; what needs it then says why.
    fn prepare_ahead(&mut self) -> bool {
        if !self.has_time_to_prepare() {
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

    /// Making a network namespace can wait for the kernel to bury others; no limit in time waits with it.
    fn has_time_to_prepare(&self) -> bool {
        let is_alive =
            |serial| self.sandboxes.get(&serial).is_some_and(|sandbox| sandbox.ending.is_none()) || self.execs.contains_key(&serial);
        self.timer.is_free_for(monotonic_ns(), PREPARING_NS, is_alive)
    }

    /// Keeps what went wrong with one sandbox or client from the others: it is ended, the keeper goes on.
    fn contain(&mut self, source: Source, serial: u64, handled: io::Result<()>) -> io::Result<()> {
        let Err(error) = handled else { return Ok(()) };
        let is_of_one = !matches!(source, Source::Listener | Source::Signals | Source::Timer | Source::Connection);
        if is_of_one && self.execs.contains_key(&serial) {
            return self.fail_exec(serial, &error);
        }
        match source {
            Source::Listener | Source::Signals | Source::Timer => Err(error),
            Source::Commit => {
                warn(format_args!("keeping an image failed: {error}"));
                Ok(())
            }
            Source::Typist => {
                warn(format_args!("following who ends an input failed: {error}"));
                Ok(())
            }
            Source::Layer => {
                warn(format_args!("following the removal of a layer failed: {error}"));
                Ok(())
            }
            Source::Volume => {
                warn(format_args!("following a volume failed: {error}"));
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
            Source::Control
            | Source::Init
            | Source::Stdout
            | Source::Stderr
            | Source::OutOfMemory
            | Source::Payload
            | Source::Disk
            | Source::Below
            | Source::Memory
            | Source::Typed => {
                warn(format_args!("a sandbox is ended because its supervision failed: {error}"));
                if let Err(error) = self.kill_by_force(serial) {
                    warn(format_args!("killing it failed: {error}"));
                }
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
            Source::Stdout => self.on_output(serial, Kind::Stdout, flags),
            Source::Stderr => self.on_output(serial, Kind::Stderr, flags),
            Source::OutOfMemory => self.on_oom_notice(serial),
            Source::Payload => self.on_payload_death(serial),
            Source::Disk => self.on_disk(serial),
            Source::Below => self.on_below(serial),
            Source::Trial => self.on_trial(serial),
            Source::Commit => self.on_commit(serial),
            Source::Layer => self.on_layer(serial),
            Source::Memory => self.on_lowered(serial),
            Source::Typed => self.on_typed(serial),
            Source::Typist => self.on_typist(serial),
            Source::Volume => self.on_volume(serial),
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
        self.drop_layers();
        let serials: Vec<u64> = self.sandboxes.keys().copied().collect();
        serials.into_iter().try_for_each(|serial| self.decide(serial, Decision::Killed(crate::protocol::KillReason::StoppedByAdmin)))
    }

    fn is_done(&mut self) -> io::Result<bool> {
        let is_empty = self.lot.len() == 0
            && self.layers.is_empty()
            && self.volumes.is_empty()
            && self.execs.is_empty()
            && self.sandboxes.values().all(|sandbox| sandbox.body.is_none() && sandbox.is_told);
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
