//! The one privileged process of a node: one thread, one loop, owner of every sandbox.
//!
//! It launches, limits, supervises and records. It knows no HTTP and no SQL, and believes neither the service nor a sandbox: requests are held
//! against the policy of `policy.rs`, and what comes from inside a sandbox is data.

mod build;
mod connection;
mod launch;
mod output;
mod parked;
mod sandbox;
mod slot;
mod store;
mod timer;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, EventData, EventFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with},
    process::pidfd_send_signal,
    time::{ClockId, clock_gettime},
};

use connection::{Asker, Connection, failed};
use output::Pumped;
use parked::Lot;
use sandbox::{Decision, Ended, Evidence, Purpose, Sandbox};
use slot::Slots;
use store::Store;
use timer::{Due, Timer};

use crate::{
    cgroup::Tree,
    ids::{self, Ranges},
    log::{self, Kind},
    protocol::{
        Answer, Call, Cause, FailureKind, Hello, ImageId, Launched, Record, Request, SandboxId, VERSION,
        init::{Order, Report},
    },
    sys, transport,
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
    /// The group id that may connect and read logs.
    pub group: u32,
    /// The programs that run inside sandboxes.
    pub init: PathBuf,
    pub unpack: PathBuf,
    /// Where locks of this machine's keepers lie.
    pub run: PathBuf,
}

/// Sandboxes of one keeper at a time. Each has an id range of its own.
const SANDBOXES_MAX: u32 = 2048;

/// The first host id that is handed out: above what distributions give to users and container engines (systemd's UIDS-GIDS document).
const FIRST_ID: u32 = 0x7000_0000;

/// How many keepers fit beside each other on one machine.
const KEEPERS_MAX: u32 = 16;

/// What every sandbox has on every kernel that a keeper starts on.
const FENCES: [&str; 9] = [
    "user_namespace",
    "mount_namespace",
    "pid_namespace",
    "network_namespace",
    "ipc_namespace",
    "cgroup",
    "capabilities",
    "seccomp",
    "no_new_privs",
];

/// How long init has for a kill of its own before all of it is killed from outside.
const FORCE_AFTER_NS: u64 = 50_000_000;
/// How long the payload may take to start.
const START_WITHIN_NS: u64 = 30_000_000_000;
/// The time between two looks at a counter or a group that is not ready yet.
const AGAIN_AFTER_NS: u64 = 1_000_000;
/// How long preparing one thing may take on a busy machine: with a deadline closer than that, none is begun.
const PREPARING_NS: u64 = 30_000_000;
/// How often a counter is looked at for an OOM that was announced.
const OOM_LOOKS_MAX: u32 = 20;
/// CPU time that a sandbox may use beyond its limit before it is noticed, over all cores.
const CPU_OVERSHOOT_NS: u64 = 8_000_000;
/// Turns of reading that empty the largest pipe (`/proc/sys/fs/pipe-max-size`, 1 MiB), with room to spare.
const PIPE_TURNS_MAX: usize = 4;
/// The time between two attempts at a cgroup that cannot be removed.
const REMOVE_AGAIN_AFTER_NS: u64 = 1_000_000_000;
/// Clients at one time: one service, its successor, a few tools.
const CONNECTIONS_MAX: usize = 64;
/// Requests that may wait for one sandbox.
const WAITERS_MAX: usize = 64;
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
}

impl Source {
    const ALL: [Self; 10] = [
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
    sandboxes: HashMap<u64, Sandbox>,
    by_id: HashMap<SandboxId, u64>,
    next_serial: u64,
    slots: Slots,
    lot: Lot,
    /// The keeper's own UTS namespace.
    own_uts: OwnedFd,
    tree: Tree,
    stage: PathBuf,
    store: Store,
    programs: build::Programs,
    seccomp: Vec<(u16, u8, u8, u32)>,
    has_landlock: bool,
    logs: PathBuf,
    group: u32,
    hello: Hello,
    cores: u64,
    buffer: Vec<u8>,
    shutdown: Option<Vec<Asker>>,
    /// Held as long as this keeper lives: its name and its id ranges are its own.
    _lock: OwnedFd,
}

/// Runs a keeper until it is told to stop. Needs root.
pub fn run(options: &Options, on_ready: impl FnOnce()) -> io::Result<()> {
    raise_descriptor_limit()?;
    sys::prefer_this_process(NICE)?;
    let mut keeper = Keeper::start(options)?;
    on_ready();
    keeper.serve()
}

impl Keeper {
    fn start(options: &Options) -> io::Result<Self> {
        let (number, lock) = claim_number(&options.run)?;
        sweep_dead_keepers(&options.run, number)?;
        let stage = stage_of(&options.run, number);
        build::settle(&stage)?;
        let tree = Tree::open(&name_of(number))?;
        let mode = tree.mode();
        let ranges = Ranges::new(FIRST_ID + number * SANDBOXES_MAX * ids::RANGE, SANDBOXES_MAX);
        let has_landlock = crate::landlock::is_available();
        let hello = Hello {
            version: VERSION,
            pid: std::process::id(),
            started_at_us: unix_us(),
            cgroup: mode,
            sandboxes_max: SANDBOXES_MAX,
            fences: FENCES.into_iter().chain(has_landlock.then_some("landlock")).map(str::to_owned).collect(),
        };
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
            signals.add(signal);
        }
        signals.thread_block()?;
        let program = crate::seccomp::program();
        let keeper = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener: listen_at(options)?,
            signals: SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            timer: Timer::new()?,
            connections: HashMap::new(),
            sandboxes: HashMap::new(),
            by_id: HashMap::new(),
            next_serial: 1,
            slots: Slots::new(tree.clone(), ranges)?,
            lot: Lot::default(),
            own_uts: std::fs::File::open("/proc/self/ns/uts")?.into(),
            tree,
            stage,
            store: Store::open(&options.images)?,
            programs: build::Programs::load(options)?,
            seccomp: program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect(),
            has_landlock,
            logs: options.logs.clone(),
            group: options.group,
            hello,
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64),
            buffer: vec![0; log::DATA_BYTES_MAX],
            shutdown: None,
            _lock: lock,
        };
        keeper.watch(keeper.listener.as_fd(), Source::Listener, 0)?;
        keeper.watch(keeper.signals.as_fd(), Source::Signals, 0)?;
        keeper.watch(keeper.timer.descriptor(), Source::Timer, 0)?;
        Ok(keeper)
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
        match self.park().and_then(|is_parked| if is_parked { Ok(true) } else { self.slots.refill() }) {
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
            Source::Connection => {
                warn(format_args!("disconnecting a client: {error}"));
                self.disconnect(serial);
                Ok(())
            }
            Source::Control | Source::Init | Source::Stdout | Source::Stderr | Source::OutOfMemory | Source::Payload => {
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
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            // The other side left again, or descriptors are short for the moment.
            Err(_) => return Ok(()),
        };
        let serial = self.serial();
        // Dropped, and so closed, if it is one too many or cannot be watched.
        let is_welcome = self.connections.len() < CONNECTIONS_MAX && transport::enlarge(&socket).is_ok();
        if is_welcome && self.watch(socket.as_fd(), Source::Connection, serial).is_ok() {
            self.connections.insert(serial, Connection::new(socket));
        }
        Ok(())
    }

    fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    fn on_signals(&mut self) -> io::Result<()> {
        while let Some(signal) = self.signals.read_signal()? {
            if signal.ssi_signo.cast_signed() != libc::SIGCHLD {
                self.stop(None)?;
            }
        }
        // Inits are watched by their pidfds, which stay valid; whatever else was started is simply reaped.
        while let Ok(Some(_)) = sys::reap(-1, false) {}
        Ok(())
    }

    fn on_connection(&mut self, serial: u64, flags: EventFlags) -> io::Result<()> {
        if flags.contains(EventFlags::OUT) {
            self.flush(serial)?;
        }
        // A bounded number at once, so that one busy client does not hold up the sandboxes.
        for _ in 0..16 {
            let Some(connection) = self.connections.get(&serial) else { return Ok(()) };
            match connection.receive() {
                Ok(Some(datagram)) => {
                    let Call { tag, request } = datagram.message;
                    self.on_request(Asker { connection: serial, tag }, request, datagram.descriptors)?;
                }
                Ok(None) => return Ok(()),
                Err(error) => {
                    if error.kind() != io::ErrorKind::ConnectionReset {
                        warn(format_args!("disconnecting a client: {error}"));
                    }
                    self.disconnect(serial);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn on_request(&mut self, asker: Asker, request: Request, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let answer = match request {
            Request::Hello { version } if version != VERSION => {
                failed(FailureKind::Refused, format!("this keeper speaks version {VERSION} of its protocol, not {version}"))
            }
            Request::Hello { .. } => Answer::Hello(self.hello.clone()),
            Request::Launch(_) | Request::Unpack { .. } if self.shutdown.is_some() => failed(FailureKind::Busy, "the keeper is stopping"),
            Request::Launch(launch) => return self.launch(asker, *launch, descriptors),
            Request::Unpack { image, layers, limits } => return self.unpack(asker, image, layers, limits, descriptors),
            Request::Wait { id } => match self.by_id.get(&id).and_then(|serial| self.sandboxes.get_mut(serial)) {
                None => failed(FailureKind::Gone, format!("no sandbox {id}")),
                Some(Sandbox { ending: Some(ending), .. }) => Answer::Ended(Box::new(ending.clone())),
                Some(sandbox) if sandbox.waiters.len() >= WAITERS_MAX => failed(FailureKind::Busy, "too many wait for this sandbox"),
                Some(sandbox) => {
                    sandbox.waiters.push(asker);
                    return Ok(());
                }
            },
            Request::Kill { id, reason } => match self.by_id.get(&id) {
                None => failed(FailureKind::Gone, format!("no sandbox {id}")),
                Some(&serial) => {
                    self.decide(serial, Decision::Killed(reason))?;
                    Answer::Done
                }
            },
            Request::List => Answer::Records(self.records()),
            Request::Forget { id } => self.forget(id, LogFile::Delete),
            Request::ForgetRecord { id } => self.forget(id, LogFile::Keep),
            Request::Images => match self.store.images() {
                Ok(images) => Answer::Images(images),
                Err(error) => failed(FailureKind::Host, format!("listing the images failed: {error}")),
            },
            Request::RemoveImage { image } if self.sandboxes.values().any(|s| s.body.is_some() && s.image.as_ref() == Some(&image)) => {
                failed(FailureKind::Busy, "a sandbox runs on this image")
            }
            Request::RemoveImage { image } => match self.remove_image(&image) {
                Ok(()) => Answer::Done,
                Err(error) => failed(FailureKind::Host, format!("removing the image failed: {error}")),
            },
            Request::Shutdown => return self.stop(Some(asker)),
        };
        self.answer(asker, answer);
        Ok(())
    }

    fn remove_image(&mut self, image: &ImageId) -> io::Result<()> {
        self.end_parked(|class| class.image == *image)?;
        self.store.remove(image)
    }

    /// Ends what stands ready of these classes.
    fn end_parked(&mut self, of: impl Fn(&parked::Class) -> bool) -> io::Result<()> {
        self.lot.give_up(of);
        self.lot.expire(monotonic_ns()).into_iter().try_for_each(|serial| self.kill_by_force(serial))
    }

    fn records(&self) -> Vec<Record> {
        // By id: one that is forgotten and still being dismantled is not to be told.
        let record = |(id, serial): (&SandboxId, &u64)| {
            let sandbox = self.sandboxes.get(serial)?;
            Some(Record { id: *id, launched: sandbox.launched, is_ended: sandbox.ending.is_some() })
        };
        self.by_id.iter().filter_map(record).collect()
    }

    fn forget(&mut self, id: SandboxId, log_file: LogFile) -> Answer {
        let serial = self.by_id.get(&id).copied();
        let sandbox = serial.and_then(|serial| self.sandboxes.get(&serial));
        if sandbox.is_some_and(|sandbox| sandbox.ending.is_none()) {
            return failed(FailureKind::Busy, "the sandbox has not ended");
        }
        let removed = if log_file == LogFile::Delete { std::fs::remove_file(log::path(&self.logs, id)) } else { Ok(()) };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return failed(FailureKind::Host, format!("removing the log failed: {error}"));
            }
            _ => {}
        }
        let Some(serial) = serial else { return Answer::Done };
        self.by_id.remove(&id);
        // One that is still being dismantled is dropped when it is done (`clean_up`).
        if self.sandboxes.get(&serial).is_some_and(|sandbox| sandbox.body.is_none()) {
            self.sandboxes.remove(&serial);
        }
        Answer::Done
    }

    fn answer(&mut self, asker: Asker, answer: Answer) {
        let Some(connection) = self.connections.get_mut(&asker.connection) else { return };
        let answered = match connection.answer(asker.tag, answer) {
            Ok(false) => Ok(()),
            Ok(true) => self.wait_for(asker.connection, EventFlags::IN | EventFlags::OUT),
            Err(error) => Err(error),
        };
        if let Err(error) = answered {
            warn(format_args!("disconnecting a client that does not read: {error}"));
            self.disconnect(asker.connection);
        }
    }

    fn flush(&mut self, serial: u64) -> io::Result<()> {
        match self.connections.get_mut(&serial).map(Connection::flush) {
            Some(Ok(false)) => self.wait_for(serial, EventFlags::IN),
            Some(Ok(true)) | None => Ok(()),
            Some(Err(_)) => {
                self.disconnect(serial);
                Ok(())
            }
        }
    }

    fn wait_for(&self, serial: u64, flags: EventFlags) -> io::Result<()> {
        let Some(connection) = self.connections.get(&serial) else { return Ok(()) };
        Ok(epoll::modify(&self.epoll, connection.socket.as_fd(), EventData::new_u64(Source::Connection.number(serial)), flags)?)
    }

    fn disconnect(&mut self, serial: u64) {
        self.connections.remove(&serial);
        for sandbox in self.sandboxes.values_mut() {
            sandbox.waiters.retain(|asker| asker.connection != serial);
            sandbox.launch_asker = sandbox.launch_asker.filter(|asker| asker.connection != serial);
        }
    }

    fn on_report(&mut self, serial: u64) -> io::Result<()> {
        let Some(body) = self.body(serial) else { return Ok(()) };
        let report = match body.init.control.recv::<Report>() {
            Ok(Some(datagram)) => {
                body.payload = body.payload.take().or_else(|| datagram.descriptors.into_iter().next());
                datagram.message
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Init is dead or talks nonsense; its pidfd tells the rest.
            Ok(None) | Err(_) => {
                kill_init(body)?;
                return self.unwatch(serial, |init| init.control.as_fd());
            }
        };
        match report {
            Report::Ready => match self.lot.get_mut(serial) {
                Some(parked) => {
                    parked.is_ready = true;
                    Ok(())
                }
                None => self.begin(serial),
            },
            Report::Failed { kind, message } => {
                let cause = match kind {
                    crate::error::Kind::Spec => Cause::StartFailed { message },
                    crate::error::Kind::Host => Cause::InfraError { message },
                };
                if let Some(parked) = self.lot.get_mut(serial) {
                    parked.is_doomed = true;
                    let class = parked.class.clone();
                    warn(format_args!("building a sandbox ahead failed: {cause:?}"));
                    self.lot.give_up(|given_up| *given_up == class);
                }
                self.end(serial, None, Some(cause));
                self.kill_by_force(serial)
            }
            Report::Started { at_ns, own_cpu_us } => self.on_started(serial, at_ns, own_cpu_us),
            Report::Ended { status, at_ns, own_cpu_us, is_disk_full, are_inodes_used_up } => {
                self.end(serial, Some(Ended { status, at_ns, own_cpu_us, is_disk_full, are_inodes_used_up }), None);
                self.kill_by_force(serial)
            }
        }
    }

    fn on_started(&mut self, serial: u64, at_ns: u64, own_cpu_us: u64) -> io::Result<()> {
        if let Some(payload) = self.sandboxes.get(&serial).and_then(|sandbox| sandbox.body.as_ref()?.payload.as_ref()) {
            self.watch(payload.as_fd(), Source::Payload, serial)?;
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return Ok(()) };
        let since_us = monotonic_ns().saturating_sub(at_ns) / 1000;
        let launched = Launched {
            started_at_us: unix_us().saturating_sub(since_us),
            launch_us: at_ns.saturating_sub(sandbox.received_at_ns) / 1000,
            start: sandbox.start,
        };
        sandbox.launched = Some(launched);
        sandbox.started_at_ns = Some(at_ns);
        sandbox.init_cpu_us = own_cpu_us;
        let limits = sandbox.supervision;
        let asker = sandbox.launch_asker.take();
        if let Some(wall_ms) = limits.wall_ms {
            self.timer.set(at_ns.saturating_add(wall_ms.saturating_mul(1_000_000)), serial, Due::Wall)?;
        }
        if limits.cpu_ms.is_some() {
            self.check_cpu(serial)?;
        }
        match asker {
            Some(asker) => {
                self.answer(asker, Answer::Launched(launched));
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn on_output(&mut self, serial: u64, kind: Kind) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        match sandbox.output.pump(kind, &mut self.buffer, unix_us()) {
            Ok(Pumped::More | Pumped::Empty | Pumped::Closed) if sandbox.output.is_over_limit() => {
                self.decide(serial, Decision::OutputLimit)
            }
            Ok(_) => Ok(()),
            Err(error) => self.decide(serial, Decision::LogFailed(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    fn on_oom_notice(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let Some(notice) = sandbox.body.as_ref().and_then(|body| body.oom_notice.as_ref()) else { return Ok(()) };
        // Read in any case: it stays readable otherwise.
        match rustix::io::read(notice, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        let is_being_looked_for = std::mem::replace(&mut sandbox.oom_looks, OOM_LOOKS_MAX) > 0;
        if is_being_looked_for { Ok(()) } else { self.look_for_oom(serial) }
    }

    /// The kernel announces an OOM before it kills, so the counter may still be on its way; it may also find memory after all.
    fn look_for_oom(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return Ok(()) };
        let Some(body) = &sandbox.body else { return Ok(()) };
        if body.slot.group.oom_kills()? > 0 {
            return self.decide(serial, Decision::OutOfMemory);
        }
        sandbox.oom_looks = sandbox.oom_looks.saturating_sub(1);
        if sandbox.oom_looks == 0 { Ok(()) } else { self.timer.set(monotonic_ns() + AGAIN_AFTER_NS, serial, Due::Oom) }
    }

    fn on_payload_death(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        sandbox.dead_at_ns.get_or_insert_with(monotonic_ns);
        match sandbox.body.as_ref().and_then(|body| body.payload.as_ref()) {
            Some(payload) => Ok(epoll::delete(&self.epoll, payload)?),
            None => Ok(()),
        }
    }

    fn on_timer(&mut self) -> io::Result<()> {
        // The time of this turn: what sets itself anew waits for the next one, so that the loop goes on to others in between.
        let now_ns = monotonic_ns();
        while let Some((serial, due)) = self.timer.next(now_ns)? {
            let handled = self.on_due(serial, due);
            self.contain(Source::Control, serial, handled)?;
        }
        Ok(())
    }

    fn on_due(&mut self, serial: u64, due: Due) -> io::Result<()> {
        if due == Due::Remove {
            return self.clean_up(serial);
        }
        let Some(sandbox) = self.sandboxes.get(&serial) else { return Ok(()) };
        let (is_over, is_launched) = (sandbox.ending.is_some(), sandbox.launched.is_some());
        match due {
            Due::Force => self.kill_by_force(serial),
            Due::Start if !is_launched => self.kill_by_force(serial),
            Due::Wall if !is_over => self.decide(serial, Decision::WallTimeout),
            Due::Cpu if !is_over => self.check_cpu(serial),
            Due::Oom if !is_over => self.look_for_oom(serial),
            Due::Start | Due::Wall | Due::Cpu | Due::Oom | Due::Remove => Ok(()),
        }
    }

    /// Ends a sandbox that has used up its CPU time, or comes back when it could have at the earliest: all cores busy for it.
    ///
    /// One that uses none is looked at more and more rarely, as far as the allowed overshoot goes.
    fn check_cpu(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        let (Some(limit_ms), Some(body)) = (sandbox.supervision.cpu_ms, &sandbox.body) else { return Ok(()) };
        let used_us = body.slot.group.cpu_us()?.saturating_sub(sandbox.init_cpu_us);
        let left_us = limit_ms.saturating_mul(1000).saturating_sub(used_us);
        if left_us == 0 {
            return self.decide(serial, Decision::CpuTimeout);
        }
        let (last_us, last_wait_ns) = sandbox.cpu_look;
        let floor_ns = if used_us == last_us { (last_wait_ns * 2).min(CPU_OVERSHOOT_NS / self.cores) } else { 0 };
        let wait_ns = (left_us * 1000 / self.cores).max(floor_ns).max(AGAIN_AFTER_NS);
        sandbox.cpu_look = (used_us, wait_ns);
        self.timer.set(monotonic_ns() + wait_ns, serial, Due::Cpu)
    }

    /// Notes why, then kills. The first reason stands.
    fn decide(&mut self, serial: u64, decision: Decision) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        if sandbox.ending.is_some() || sandbox.decision.is_some() {
            return Ok(());
        }
        sandbox.decision = Some(decision);
        let Some(body) = &sandbox.body else { return Ok(()) };
        // The payload at once, from here, however busy its sandbox is; what it started by init, which then reports that all are dead:
        // sooner than its own death would, with all that hangs on its namespaces.
        if let Some(payload) = &body.payload {
            match pidfd_send_signal(payload, rustix::process::Signal::KILL) {
                Ok(()) => sandbox.killed_at_ns = Some(monotonic_ns()),
                Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        body.slot.group.lift_cpu_limit()?;
        if sandbox.launched.is_some() && body.init.control.send(&Order::Kill, &[]).is_ok() {
            return self.timer.set(monotonic_ns() + FORCE_AFTER_NS, serial, Due::Force);
        }
        self.kill_by_force(serial)
    }

    /// Kills init, and with it the whole pid namespace (pid_namespaces(7)).
    fn kill_by_force(&mut self, serial: u64) -> io::Result<()> {
        self.body(serial).map_or(Ok(()), |body| kill_init(body))
    }

    /// What exists in the kernel for a sandbox, whether it has a request or not.
    fn body(&mut self, serial: u64) -> Option<&mut sandbox::Body> {
        match self.sandboxes.get_mut(&serial) {
            Some(sandbox) => sandbox.body.as_mut(),
            None => self.lot.get_mut(serial).map(|parked| &mut parked.body),
        }
    }

    /// Watches a descriptor of an init no longer; it may be so already.
    fn unwatch(&mut self, serial: u64, which: impl Fn(&sandbox::Init) -> BorrowedFd<'_>) -> io::Result<()> {
        let body = match self.sandboxes.get(&serial) {
            Some(sandbox) => sandbox.body.as_ref(),
            None => self.lot.get_mut(serial).map(|parked| &parked.body),
        };
        match body.map(|body| epoll::delete(&self.epoll, which(&body.init))) {
            None | Some(Ok(()) | Err(rustix::io::Errno::NOENT)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// The sandbox is over: reads the last output and the counters, notes the verdict, and answers. It is taken apart later.
    fn end(&mut self, serial: u64, ended: Option<Ended>, failure: Option<Cause>) {
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return };
        let Some(body) = &sandbox.body else { return };
        let mut failure = failure;
        for kind in [Kind::Stdout, Kind::Stderr] {
            // Every writer is dead or about to die; more than a pipe holds can only come from one that is not dead yet.
            for _ in 0..PIPE_TURNS_MAX {
                match sandbox.output.pump(kind, &mut self.buffer, unix_us()) {
                    Ok(Pumped::More) => {}
                    Ok(Pumped::Empty | Pumped::Closed) => break,
                    Err(error) => {
                        failure = Some(Cause::InfraError { message: format!("writing the log failed: {error}") });
                        break;
                    }
                }
            }
        }
        let counters = body.slot.group.counters().unwrap_or_else(|error| {
            failure.get_or_insert(Cause::InfraError { message: format!("reading the usage failed: {error}") });
            crate::cgroup::Counters::default()
        });
        let evidence = Evidence { ended, counters, now_ns: monotonic_ns(), now_us: unix_us(), failure };
        let ending = sandbox.judge(evidence);
        if let Err(error) = sandbox.output.finish(ending.ended_at_us) {
            warn(format_args!("ending a log failed: {error}"));
        }
        sandbox.ending = Some(ending.clone());
        let askers = sandbox.take_askers();
        if let Purpose::Payload { .. } = sandbox.purpose {
            for asker in askers {
                self.answer(asker, Answer::Ended(Box::new(ending.clone())));
            }
        } else {
            self.unpacked(serial);
        }
    }

    fn on_init_death(&mut self, serial: u64) -> io::Result<()> {
        self.on_report(serial)?;
        let Some(body) = self.body(serial) else { return Ok(()) };
        body.init.is_dead = true;
        self.unwatch(serial, |init| init.child.pidfd.as_fd())?;
        if let Some(sandbox) = self.sandboxes.get(&serial).filter(|sandbox| sandbox.ending.is_none()) {
            let is_started = sandbox.launched.is_some() || sandbox.decision.is_some();
            let never = || Cause::InfraError { message: "the sandbox's init ended before the payload started".to_owned() };
            self.end(serial, None, (!is_started).then(never));
        }
        self.clean_up(serial)
    }

    /// Takes apart what is left, off the reply path, again and again until the kernel has let go of all of it.
    fn clean_up(&mut self, serial: u64) -> io::Result<()> {
        let Some(body) = self.body(serial) else { return Ok(()) };
        if !body.init.is_dead {
            return Ok(());
        }
        let removed = match body.slot.group.remove() {
            Ok(false) => body.slot.group.kill().map(|()| false),
            other => other,
        };
        match removed {
            Ok(true) => {}
            // Again and again: what is given up here would be left behind.
            Ok(false) => return self.timer.set(monotonic_ns() + AGAIN_AFTER_NS, serial, Due::Remove),
            Err(error) => {
                warn(format_args!("removing a cgroup failed, and is tried again: {error}"));
                return self.timer.set(monotonic_ns() + REMOVE_AGAIN_AFTER_NS, serial, Due::Remove);
            }
        }
        let id_base = body.slot.id_base;
        self.slots.give_back(id_base);
        if self.lot.remove(serial).is_some() {
            return Ok(());
        }
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return Ok(()) };
        sandbox.body = None;
        sandbox.pending = None;
        let is_forgotten = match &sandbox.purpose {
            Purpose::Payload { id } => self.by_id.get(id) != Some(&serial),
            Purpose::Unpack { .. } => true,
        };
        if is_forgotten {
            self.sandboxes.remove(&serial);
        }
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
        let is_empty = self.lot.is_empty() && self.sandboxes.values().all(|sandbox| sandbox.body.is_none());
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

/// What becomes of the log of a sandbox that is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LogFile {
    Keep,
    Delete,
}

fn kill_init(body: &sandbox::Body) -> io::Result<()> {
    if body.init.is_dead {
        return Ok(());
    }
    match pidfd_send_signal(&body.init.child.pidfd, rustix::process::Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A sandbox takes about fifteen descriptors; shells and init systems allow far fewer than this machine can have.
fn raise_descriptor_limit() -> io::Result<()> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)?)
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

/// What the cgroups of keeper `number` are called.
fn name_of(number: u32) -> String {
    format!("k{number}")
}

/// Removes the cgroups and folders of keepers that were killed; their processes died with them. Lock files stay: a lock on one that
/// is deleted would be no lock.
fn sweep_dead_keepers(run: &std::path::Path, own: u32) -> io::Result<()> {
    for number in (0..KEEPERS_MAX).filter(|number| *number != own && stage_of(run, *number).exists()) {
        if let Some(_lock) = try_lock(run, number)? {
            let swept =
                Tree::open(&name_of(number)).and_then(|tree| tree.remove()).and_then(|()| std::fs::remove_dir(stage_of(run, number)));
            if let Err(error) = swept {
                // Not ours: the next keeper tries again.
                warn(format_args!("what keeper {number} left could not be removed: {error}"));
            }
        }
    }
    Ok(())
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
