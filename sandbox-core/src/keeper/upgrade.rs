//! Upgrading the keeper under its sandboxes: the process goes on as another program (execve(2)), which gets all that it owns.
//!
//! Asked for by SIGHUP. First a child runs the new program on a description of what would be handed over, but without any of it, and says
//! whether it can; sandboxes are looked after meanwhile. If it cannot, nothing has happened. Connections are closed: who was
//! connected comes again and asks, and has missed nothing.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, SealFlags},
    process::pidfd_send_signal,
};
use serde::{Deserialize, Serialize};

use super::{
    Keeper, Options, Source,
    exec::Exec,
    layer::Layers,
    monotonic_ns,
    parked::Lot,
    records::Records,
    sandbox::{Body, Sandbox},
    slot::Slots,
    store::Store,
    timer::{Deadlines, Due, Timer},
    volume::Volumes,
    warn,
};
use crate::{
    cgroup::Tree,
    disk::{Disks, volume::VolumeFiles},
    fail_point::reached,
    fence::Fences,
    handover, log,
    protocol::init,
    sys::{self, Child, Cloned},
};

/// Of the description. Raised by a change that an older or newer program would misread; fields that are added have defaults.
const FORMAT: u32 = 1;
/// The same of a state in which somebody has a layer over a kept one. A program that knows no such would take either for the other, keep what is to go, and remove what is kept: it
/// refuses a format that it does not know, and the program that asked goes on.
const FORMAT_OVER: u32 = 2;
/// How long a new program may take to say whether it can take over.
const TRIAL_NS: u64 = 5_000_000_000;

/// The numbers of what the program on trial gets.
const DESCRIPTION: RawFd = 3;
const ANSWER: RawFd = 4;
/// What it says if it can.
const YES: &[u8] = b"y";

/// How the new program is told what to do. One argument each, so that they can be told from those that the keeper was started with.
const TRY: &str = "--try-state";
const TAKE: &str = "--take-over=";

/// What is handed over.
#[derive(Debug, Serialize, Deserialize)]
struct State<Inner> {
    format: u32,
    /// The version of what the keeper and the inits say to each other.
    init_protocol: u32,
    inner: Inner,
}

/// The parts of a [`Keeper`] that outlive its program, borrowed for the description. The same fields as [`Taken`] has.
#[derive(Debug, Serialize)]
struct Given<'a> {
    started_at_us: u64,
    upgrades: u32,
    #[serde(with = "given")]
    listener: &'a OwnedFd,
    #[serde(with = "given")]
    lock: &'a OwnedFd,
    #[serde(with = "given")]
    logs_lock: &'a OwnedFd,
    stage: &'a PathBuf,
    deadlines: &'a Deadlines,
    sandboxes: &'a HashMap<u64, Sandbox>,
    execs: &'a HashMap<u64, Exec>,
    records: &'a Records,
    next_serial: u64,
    slots: &'a Slots,
    layers: &'a Layers,
    volumes: &'a Volumes,
    lot: &'a Lot,
    /// Found once: what a program on trial did to the host's profiles would be done to the sandboxes that run.
    fences: Fences,
    tree: &'a Tree,
    store: &'a Store,
    disks: &'a Disks,
}

/// The same, owned by the next program.
#[derive(Debug, Deserialize)]
pub(super) struct Taken {
    pub(super) started_at_us: u64,
    pub(super) upgrades: u32,
    #[serde(with = "crate::handover")]
    pub(super) listener: OwnedFd,
    #[serde(with = "crate::handover")]
    pub(super) lock: OwnedFd,
    #[serde(with = "crate::handover")]
    pub(super) logs_lock: OwnedFd,
    pub(super) stage: PathBuf,
    pub(super) deadlines: Deadlines,
    pub(super) sandboxes: HashMap<u64, Sandbox>,
    #[serde(default)]
    pub(super) execs: HashMap<u64, Exec>,
    pub(super) records: Records,
    pub(super) next_serial: u64,
    pub(super) slots: Slots,
    /// Of a program that keeps none there are none.
    #[serde(default)]
    pub(super) layers: Layers,
    #[serde(default)]
    pub(super) volumes: Volumes,
    pub(super) lot: Lot,
    /// `None` from a program that did not say.
    #[serde(default)]
    pub(super) fences: Option<Fences>,
    pub(super) tree: Tree,
    pub(super) store: Store,
    pub(super) disks: Disks,
}

/// A borrowed descriptor in a description.
mod given {
    use super::OwnedFd;

    pub(super) fn serialize<S: serde::Serializer>(descriptor: &&OwnedFd, to: S) -> Result<S::Ok, S::Error> {
        crate::handover::serialize(*descriptor, to)
    }
}

/// A new program that is being tried.
#[derive(Debug)]
pub(super) struct Trial {
    serial: u64,
    /// Of what it was shown.
    format: u32,
    /// Which it is, if anything lay there.
    program: Option<Version>,
    /// Somebody has asked for an upgrade since it was begun, and may have put another program there before.
    is_asked_again: bool,
    child: Child,
    answer: OwnedFd,
}

/// By what one program can be told from another that lies in its place: device, inode and size, and the time of its last change (`st_ctime`, inode(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version([u64; 3], [i64; 2]);

impl Version {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self([metadata.dev(), metadata.ino(), metadata.size()], [metadata.ctime(), metadata.ctime_nsec()]))
    }
}

impl Trial {
    /// Whether it has said something, or has ended.
    fn has_said(&self) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.answer, PollFlags::IN)], Some(&now)).is_ok_and(|count| count > 0)
    }
}

impl Keeper {
    /// Tries the program that lies where this one did when it was started.
    pub(super) fn begin_upgrade(&mut self) {
        if self.shutdown.is_some() {
            return warn(format_args!("not upgrading: it is stopping"));
        }
        if let Some(trial) = &mut self.trial {
            // What that one comes to may be told of a program that lies there no more.
            trial.is_asked_again = true;
            return;
        }
        let serial = self.serial();
        let begun = self.begin_trial(serial).and_then(|trial| {
            self.watch(trial.answer.as_fd(), Source::Trial, serial)?;
            self.timer.set(monotonic_ns() + TRIAL_NS, serial, Due::Trial)?;
            Ok(trial)
        });
        match begun {
            Ok(trial) => self.trial = Some(trial),
            Err(error) => return warn(format_args!("not upgrading: {error}")),
        }
        reached("keeper.upgrade.trial_begun");
    }

    fn begin_trial(&self, serial: u64) -> io::Result<Trial> {
        let (description, _) = self.describe()?;
        let (answer, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let keeper = nix::unistd::getpid();
        // Before the child: whatever is put there from now on is another one.
        let program = Version::of(&self.program.path);
        match sys::clone3(nix::sched::CloneFlags::empty(), false, None)? {
            Cloned::Parent(child) => Ok(Trial { serial, format: self.format(), program, is_asked_again: false, child, answer }),
            Cloned::Child => {
                let failed = self.become_trial(&description, &tell, keeper);
                warn(format_args!("{}: {failed}", self.program.path.display()));
                std::process::exit(1)
            }
        }
    }

    /// Comes back only with a failure.
    fn become_trial(&self, description: &File, tell: &OwnedFd, keeper: nix::unistd::Pid) -> io::Error {
        let steps = || -> io::Result<std::convert::Infallible> {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            if nix::unistd::getppid() != keeper {
                return Err(io::Error::other("the keeper is gone"));
            }
            // Out of the way of those two numbers. A copy of anything else would keep alive, and watched, what the keeper closes.
            let description = rustix::io::fcntl_dupfd_cloexec(description, ANSWER + 1)?;
            let tell = rustix::io::fcntl_dupfd_cloexec(tell, ANSWER + 1)?;
            sys::place_at(description.as_fd(), DESCRIPTION)?;
            sys::place_at(tell.as_fd(), ANSWER)?;
            drop((description, tell));
            sys::close_from(ANSWER.cast_unsigned() + 1)?;
            self.program.execute(TRY)
        };
        match steps() {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// The program on trial has said something, or has ended without.
    pub(super) fn on_trial(&mut self, serial: u64) -> io::Result<()> {
        let Some(trial) = self.trial.take_if(|trial| trial.serial == serial) else { return Ok(()) };
        let mut said = [0; 1];
        let len = rustix::io::retry_on_intr(|| rustix::io::read(&trial.answer, &mut said))?;
        let (shown, tried, is_asked_again) = (trial.format, trial.program, trial.is_asked_again);
        drop(trial);
        if &said[..len] != YES {
            warn(format_args!("not upgrading: {} refused, or failed", self.program.path.display()));
            if is_asked_again {
                self.begin_upgrade();
            }
            return Ok(());
        }
        reached("keeper.upgrade.accepted");
        if self.shutdown.is_some() {
            return Ok(());
        }
        // Nobody comes back from a program that refuses now: it is asked again, once, for there is no more than that to be shown.
        if self.format() > shown {
            warn(format_args!("{} agreed to less than there is to take over by now, and is tried again", self.program.path.display()));
            self.begin_upgrade();
            return Ok(());
        }
        // Nor from one that nobody has asked.
        if Version::of(&self.program.path) != tried {
            warn(format_args!("{} is another program by now than the one that agreed, and is tried itself", self.program.path.display()));
            self.begin_upgrade();
            return Ok(());
        }
        let failed = self.become_next();
        // As if nothing had happened: what was opened for the next program is this one's alone again.
        sys::close_on_exec_from(3)?;
        warn(format_args!("not upgrading: {}: {failed}", self.program.path.display()));
        Ok(())
    }

    /// The program on trial has said nothing in its time.
    pub(super) fn give_up_trial(&mut self, serial: u64) -> io::Result<()> {
        // It was the keeper that had no time: the answer waits beside this deadline, and behind it only by the order of events.
        if self.trial.as_ref().is_some_and(|trial| trial.serial == serial && trial.has_said()) {
            let heard = self.on_trial(serial);
            return self.contain(Source::Trial, serial, heard);
        }
        let Some(trial) = self.trial.take_if(|trial| trial.serial == serial) else { return Ok(()) };
        warn(format_args!("not upgrading: {} did not say in time whether it can take over", self.program.path.display()));
        let killed = match pidfd_send_signal(&trial.child.pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if trial.is_asked_again {
            self.begin_upgrade();
        }
        killed
    }

    /// Comes back only with a failure.
    fn become_next(&self) -> io::Error {
        let steps = || -> io::Result<std::convert::Infallible> {
            let (description, numbers) = self.describe()?;
            reached("keeper.upgrade.described");
            let own = description.as_raw_fd();
            numbers.into_iter().chain([own]).try_for_each(sys::keep_on_exec)?;
            self.program.execute(&format!("{TAKE}{own}"))
        };
        match steps() {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// The lowest that says all of it, so that older programs are refused no more than they must be.
    fn format(&self) -> u32 {
        let is_over = |sandbox: &Sandbox| sandbox.body.as_ref().is_some_and(|body| body.is_over);
        if self.sandboxes.values().any(is_over) { FORMAT_OVER } else { FORMAT }
    }

    /// What is handed over, in memory that nobody can change, and the numbers of the descriptors in it.
    fn describe(&self) -> io::Result<(File, Vec<RawFd>)> {
        let inner = Given {
            started_at_us: self.hello.started_at_us,
            upgrades: self.hello.upgrades,
            listener: &self.listener,
            lock: &self.lock,
            logs_lock: &self.logs_lock,
            stage: &self.stage,
            deadlines: self.timer.deadlines(),
            sandboxes: &self.sandboxes,
            execs: &self.execs,
            records: &self.records,
            next_serial: self.next_serial,
            slots: &self.slots,
            layers: &self.layers,
            volumes: &self.volumes,
            lot: &self.lot,
            fences: self.hello.fences,
            tree: &self.tree,
            store: &self.store,
            disks: &self.disks,
        };
        let (text, numbers) = handover::describe(&State { format: self.format(), init_protocol: init::VERSION, inner })?;
        let memory = rustix::fs::memfd_create("keeper", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut memory = File::from(memory);
        memory.write_all(&text)?;
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
        Ok((memory, numbers))
    }

    /// Goes on where the program before this one stopped. Nothing is swept, and nothing made anew but what belongs to the program itself.
    pub(super) fn take_over(options: &Options, description: RawFd) -> io::Result<Self> {
        // What is not in the description has been closed; what is, is this program's alone from here on.
        sys::close_on_exec_from(3)?;
        let description = File::from(sys::inherited(description)?);
        let Taken {
            started_at_us,
            upgrades,
            listener,
            lock,
            logs_lock,
            stage,
            deadlines,
            sandboxes,
            execs,
            records,
            next_serial,
            slots,
            layers,
            volumes,
            lot,
            fences,
            tree,
            store,
            disks,
        } = read(&description, handover::take_over)?;
        let means = super::Means::load(options, &tree, fences)?;
        let hello = super::Hello { started_at_us, upgrades: upgrades.saturating_add(1), ..means.hello };
        let mut keeper = Self {
            epoll: super::new_epoll()?,
            listener,
            signals: super::signals()?,
            timer: Timer::new()?,
            connections: HashMap::new(),
            // Who waits for one asks again; the process that keeps it goes on.
            commits: HashMap::new(),
            typists: HashMap::new(),
            sandboxes,
            execs,
            records,
            next_serial,
            slots,
            layers,
            volumes,
            volume_files: VolumeFiles::open(&options.volumes)?,
            lot,
            own_uts: File::open("/proc/self/ns/uts")?.into(),
            tree,
            stage,
            store,
            disks,
            programs: means.programs,
            gvisor: means.gvisor,
            seccomp: means.seccomp,
            weakening: options.weakening,
            labels: options.labels.clone(),
            logs: options.logs.clone(),
            group: options.group,
            hello,
            cores: means.cores,
            ahead_max: means.ahead_max,
            execs_max: means.execs_max,
            volumes_max: means.volumes_max,
            buffer: vec![0; log::DATA_BYTES_MAX],
            shutdown: None,
            trial: None,
            program: options.program.clone(),
            lock,
            logs_lock,
        };
        keeper.timer.take_over(deadlines)?;
        keeper.watch_own()?;
        keeper.sandboxes.iter().try_for_each(|(serial, sandbox)| keeper.watch_sandbox(*serial, sandbox))?;
        keeper.execs.iter().try_for_each(|(serial, exec)| keeper.watch_exec_again(*serial, exec))?;
        keeper.lot.bodies().try_for_each(|(serial, body)| keeper.watch_body(serial, body))?;
        keeper.volumes.workers().try_for_each(|(serial, socket)| keeper.watch(socket, Source::Volume, serial))?;
        for (serial, disk) in keeper.layers.removing() {
            disk.socket().map_or(Ok(()), |socket| keeper.watch(socket, Source::Layer, serial))?;
        }
        // Those that stand ready have the init and the filter of the program before; new ones are built.
        for serial in keeper.lot.discard() {
            if let Err(error) = keeper.kill_by_force(serial) {
                warn(format_args!("a sandbox of the program before that stood ready could not be ended: {error}"));
            }
        }
        // A child may have ended whose signal the program before this one has read.
        while let Ok(Some(_)) = sys::reap(-1, false) {}
        reached("keeper.upgrade.taken_over");
        Ok(keeper)
    }

    fn watch_sandbox(&self, serial: u64, sandbox: &Sandbox) -> io::Result<()> {
        // What waits for room is looked after by the timer.
        if sandbox.ending.is_none() && !sandbox.output.is_held() {
            self.watch_output(serial, &sandbox.output)?;
        }
        if let Some(lowering) = &sandbox.lowering {
            self.watch(lowering.socket(), Source::Memory, serial)?;
        }
        let Some(body) = &sandbox.body else { return Ok(()) };
        self.watch_body(serial, body)?;
        // One that is dead is watched no longer: it would be readable for good.
        if let Some(payload) = body.payload.as_ref().filter(|_| sandbox.launched.is_some() && sandbox.dead_at_ns.is_none()) {
            self.watch(payload.as_fd(), Source::Payload, serial)?;
        }
        Ok(())
    }

    fn watch_body(&self, serial: u64, body: &Body) -> io::Result<()> {
        if !body.init.is_dead {
            self.watch(body.init.child.pidfd.as_fd(), Source::Init, serial)?;
            self.watch(body.init.control.as_fd(), Source::Control, serial)?;
        }
        if let Some(notice) = &body.oom_notice {
            self.watch(notice.as_fd(), Source::OutOfMemory, serial)?;
        }
        if let Some(worker) = &body.below {
            self.watch(worker.as_fd(), Source::Below, serial)?;
        }
        match body.disk.as_ref().and_then(super::disk::Disk::socket) {
            Some(socket) => self.watch(socket, Source::Disk, serial),
            None => Ok(()),
        }
    }
}

/// Reads a description as `read_as` does, if this program understands it.
fn read(description: &File, read_as: impl Fn(&[u8]) -> io::Result<State<Taken>>) -> io::Result<Taken> {
    /// What every version has.
    #[derive(Deserialize)]
    struct Head {
        format: u32,
        init_protocol: u32,
    }
    let mut text = vec![0; usize::try_from(description.metadata()?.len()).map_err(io::Error::other)?];
    description.read_exact_at(&mut text, 0)?;
    let Head { format, init_protocol } = serde_json::from_slice(&text).map_err(io::Error::other)?;
    if !(FORMAT..=FORMAT_OVER).contains(&format) || init_protocol != init::VERSION {
        return Err(io::Error::other(format!(
            "the state is of format {format} with inits of protocol {init_protocol}; this program takes {FORMAT} to {FORMAT_OVER}, and {}",
            init::VERSION
        )));
    }
    Ok(read_as(&text)?.inner)
}

/// The whole life of a program on trial: says whether it could take over.
pub(super) fn try_state(options: &Options) -> io::Result<()> {
    sys::close_on_exec_from(3)?;
    let (description, answer) = (File::from(sys::inherited(DESCRIPTION)?), File::from(sys::inherited(ANSWER)?));
    let taken = read(&description, handover::try_out)?;
    super::Means::load(options, &taken.tree, taken.fences)?;
    (&answer).write_all(YES)
}

/// What this process was started as.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// Where the program lies. Another one may be put there: that is what an upgrade is.
    pub path: PathBuf,
    /// With its name.
    pub arguments: Vec<std::ffi::OsString>,
}

impl Invocation {
    /// Of the calling process, at its start, less what an upgrade has added.
    pub fn of_this_process() -> io::Result<Self> {
        let is_own = |argument: &std::ffi::OsString| !argument.as_bytes().starts_with(TAKE.as_bytes()) && argument != TRY;
        // As it was named, which may be a link that is to lead to another program one day.
        let named = std::env::args_os().next().map(PathBuf::from).filter(|path| path.is_absolute());
        let path = named.map_or_else(std::env::current_exe, Ok)?;
        // Said of a file that was replaced in the very moment of its start (proc_pid_exe(5)).
        let path = path.to_str().and_then(|text| text.strip_suffix(" (deleted)")).map(PathBuf::from).unwrap_or(path);
        Ok(Self { path, arguments: std::env::args_os().filter(is_own).collect() })
    }

    /// Becomes that program, with one more argument. Comes back only with a failure.
    fn execute(&self, argument: &str) -> io::Result<std::convert::Infallible> {
        let c_string = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::other);
        let arguments = self.arguments.iter().map(|argument| argument.as_bytes()).chain([argument.as_bytes()]);
        let arguments = arguments.map(c_string).collect::<io::Result<Vec<_>>>()?;
        Ok(nix::unistd::execv(&c_string(self.path.as_os_str().as_bytes())?, &arguments)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said to a state of this format with nothing in it.
    fn refusal_of(format: u32) -> String {
        let mut file = File::from(rustix::fs::memfd_create("state", MemfdFlags::CLOEXEC).unwrap());
        write!(file, r#"{{"format":{format},"init_protocol":{},"inner":{{}}}}"#, init::VERSION).unwrap();
        read(&file, handover::try_out).unwrap_err().to_string()
    }

    #[test]
    fn a_state_of_another_version_is_refused_by_name() {
        let refused = refusal_of(FORMAT_OVER + 1);

        assert!(refused.contains(&format!("format {}", FORMAT_OVER + 1)), "{refused}");
    }

    #[test]
    fn both_formats_are_read_on() {
        // What is missing is a matter of what is in it.
        assert!(refusal_of(FORMAT).contains("missing field"), "{}", refusal_of(FORMAT));
        assert!(refusal_of(FORMAT_OVER).contains("missing field"), "{}", refusal_of(FORMAT_OVER));
    }
}
