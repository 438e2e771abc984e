//! Launching: from a request that passed the policy to a cloned init with its orders.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{
    Due, Keeper, Options, START_WITHIN_NS, Source,
    connection::{Asker, failed},
    monotonic_ns,
    output::{Output, Sink},
    sandbox::{Body, Init, Purpose, Sandbox},
    slot::Slot,
};
use crate::{
    cgroup::Limits,
    init::CONTROL,
    log::Kind,
    policy::Plan,
    privileges,
    protocol::{
        Answer, FailureKind, ImageId, Launch, OutputPolicy, Stdin, Supervision, UnpackLimits, Unpacked,
        init::{self, Order, Program, Setup, User},
    },
    rootfs::{base, map_layer},
    sys::{self, Child, Cloned},
    transport::Socket,
};

/// The programs that run inside sandboxes, sealed against everybody: what is executed is what was loaded at the start (CVE-2019-5736).
#[derive(Debug)]
pub(super) struct Programs {
    init: OwnedFd,
    unpack: OwnedFd,
}

impl Programs {
    pub(super) fn load(options: &Options) -> io::Result<Self> {
        Ok(Self { init: seal("sandbox-init", &options.init)?, unpack: seal("sandbox-unpack", &options.unpack)? })
    }
}

fn seal(name: &str, path: &Path) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut copy = File::from(memory);
    let mut program = File::open(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    io::copy(&mut program, &mut copy)?;
    rustix::fs::fcntl_add_seals(&copy, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    // Above the numbers that a child places its own descriptors at.
    Ok(rustix::io::fcntl_dupfd_cloexec(&copy, CONTROL + 1)?)
}

/// Gives the keeper a mount namespace of its own, with nothing shared, and stands on the folder that sandboxes build their trees on.
pub(super) fn settle(stage: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    match std::fs::create_dir(stage) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::env::set_current_dir(stage)
}

/// What differs between a payload and a program of our own.
struct Preparation {
    purpose: Purpose,
    image: OwnedFd,
    image_id: Option<ImageId>,
    target: Option<OwnedFd>,
    limits: Limits,
    supervision: Supervision,
    sink: Sink,
    hostname: String,
    capabilities: u64,
    start: init::Start,
    stdin: Option<OwnedFd>,
    /// The files, if the start says so, and what the payload inherits.
    descriptors: Vec<OwnedFd>,
    asker: Asker,
}

impl Keeper {
    /// Starts the sandbox of a request, or answers why not.
    pub(super) fn launch(&mut self, asker: Asker, launch: Launch, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let received_at_ns = monotonic_ns();
        match self.prepare(asker, launch, descriptors) {
            Ok(body) => self.spawn(body, received_at_ns),
            Err(answer) => {
                self.answer(asker, *answer);
                Ok(())
            }
        }
    }

    fn prepare(&mut self, asker: Asker, launch: Launch, descriptors: Vec<OwnedFd>) -> Result<Preparation, Box<Answer>> {
        let refused = |message: String| Box::new(failed(FailureKind::Refused, message));
        let plan = Plan::check(&launch).map_err(|e| refused(e.to_string()))?;
        let id = launch.id;
        if self.by_id.contains_key(&id) {
            return Err(refused(format!("sandbox {id} exists already")));
        }
        let mut descriptors = descriptors.into_iter();
        let mut next = |is_wanted: bool, what: &str| match (is_wanted, is_wanted.then(|| descriptors.next()).flatten()) {
            (true, None) => Err(refused(format!("the descriptor of {what} is missing"))),
            (_, descriptor) => Ok(descriptor),
        };
        let stdin = next(launch.stdin == Stdin::Descriptor, "stdin")?;
        let files = next(launch.has_files, "the files")?;
        let image = self.store.image(&launch.image).map_err(|error| {
            Box::new(if error.kind() == io::ErrorKind::NotFound {
                failed(FailureKind::Gone, format!("this node has no image {}", launch.image))
            } else {
                failed(FailureKind::Host, format!("opening image {} failed: {error}", launch.image))
            })
        })?;
        let sink = Sink::log(&self.logs, id, self.group)
            .map_err(|error| Box::new(failed(FailureKind::Host, format!("making the log file failed: {error}"))))?;
        let start = init::Start {
            program: Program::Path,
            args: plan.args,
            env: plan.env,
            cwd: plan.cwd,
            user: plan.user,
            rlimits: plan.rlimits,
            has_stdin: stdin.is_some(),
            has_files: files.is_some(),
        };
        Ok(Preparation {
            purpose: Purpose::Payload { id },
            image,
            image_id: Some(launch.image),
            target: None,
            limits: plan.limits,
            supervision: launch.supervision,
            sink,
            hostname: plan.hostname.unwrap_or_else(|| base::HOSTNAME.to_owned()),
            capabilities: 0,
            start,
            stdin,
            descriptors: files.into_iter().collect(),
            asker,
        })
    }

    /// Starts the unpacker on an image that the store does not have yet.
    pub(super) fn unpack(
        &mut self,
        asker: Asker,
        image: ImageId,
        layers: u32,
        limits: UnpackLimits,
        descriptors: Vec<OwnedFd>,
    ) -> io::Result<()> {
        if self.store.image(&image).is_ok() {
            self.answer(asker, Answer::Unpacked(Unpacked { bytes: 0, entries: 0 }));
            return Ok(());
        }
        if usize::try_from(layers) != Ok(descriptors.len()) || descriptors.is_empty() {
            self.answer(asker, failed(FailureKind::Refused, "as many descriptors as layers must come along, at least one"));
            return Ok(());
        }
        let received_at_ns = monotonic_ns();
        let (folder, target) = match self.store.begin() {
            Ok(begun) => begun,
            Err(error) => {
                self.answer(asker, failed(FailureKind::Host, format!("making a folder for the image failed: {error}")));
                return Ok(());
            }
        };
        let mut descriptors = descriptors;
        descriptors.push(rustix::io::fcntl_dupfd_cloexec(&self.programs.unpack, 0)?);
        let start = init::Start {
            program: Program::Descriptor,
            args: vec!["sandbox-unpack".to_owned(), layers.to_string(), limits.bytes.to_string(), limits.entries.to_string()],
            env: Vec::new(),
            cwd: "/".to_owned(),
            user: User::Ids { uid: 0, gid: 0, groups: Vec::new() },
            rlimits: vec![(libc::RLIMIT_CORE, 0), (libc::RLIMIT_FSIZE, limits.bytes)],
            has_stdin: false,
            has_files: false,
        };
        let body = Preparation {
            purpose: Purpose::Unpack { image, folder, asker },
            image: self.store.empty().try_clone()?,
            image_id: None,
            target: Some(target),
            limits: UNPACK_LIMITS,
            supervision: Supervision {
                wall_ms: Some(limits.wall_ms),
                cpu_ms: None,
                output_bytes: 64 * 1024,
                output_policy: OutputPolicy::Kill,
                disk_bytes: 1 << 20,
                inodes: 64,
            },
            sink: Sink::Memory { stdout: Vec::new(), stderr: Vec::new() },
            hostname: base::HOSTNAME.to_owned(),
            capabilities: privileges::OF_UNPACK,
            start,
            stdin: None,
            descriptors,
            asker,
        };
        self.spawn(body, received_at_ns)
    }

    /// Commits what the unpacker made, or discards it, and answers.
    pub(super) fn unpacked(&mut self, serial: u64) {
        let Some(sandbox) = self.sandboxes.get(&serial) else { return };
        let Purpose::Unpack { image, folder, asker } = &sandbox.purpose else { return };
        let (image, folder, asker) = (image.clone(), folder.clone(), *asker);
        let done = sandbox.unpacked().map_err(|message| (FailureKind::Refused, message)).and_then(|unpacked| {
            let committed = self.store.commit(&folder, &image).map(|()| unpacked);
            committed.map_err(|error| (FailureKind::Host, format!("keeping the unpacked image failed: {error}")))
        });
        let answer = match done {
            Ok(unpacked) => Answer::Unpacked(unpacked),
            Err((kind, message)) => {
                if let Err(error) = self.store.discard(&folder) {
                    eprintln!("sandbox-keeper: removing {folder} failed: {error}");
                }
                failed(kind, message)
            }
        };
        self.answer(asker, answer);
    }

    fn spawn(&mut self, body: Preparation, received_at_ns: u64) -> io::Result<()> {
        let asker = body.asker;
        let (slot, start) = match self.slots.take_ready() {
            Some(slot) => (slot, crate::protocol::Start::Warm),
            None => match self.slots.make() {
                Ok(Some(slot)) => (slot, crate::protocol::Start::Cold),
                Ok(None) => return self.give_up(body, failed(FailureKind::Busy, "every id range of this node is in use")),
                Err(error) => {
                    return self.give_up(body, failed(FailureKind::Host, format!("making the namespaces and cgroups failed: {error}")));
                }
            },
        };
        let launched = self.spawn_in(slot, &body);
        let (slot, spawned) = match launched {
            Ok((slot, spawned)) => (slot, spawned),
            Err(failure) => {
                let (mut slot, error) = *failure;
                slot.group.remove()?;
                self.slots.give_back(slot.id_base);
                return self.give_up(body, failed(FailureKind::Host, format!("launching the sandbox failed: {error}")));
            }
        };
        let serial = self.serial();
        let Preparation { purpose, image_id, supervision, sink, limits, .. } = body;
        let launch_asker = match &purpose {
            Purpose::Payload { id } => {
                self.by_id.insert(*id, serial);
                Some(asker)
            }
            // Only its end is told.
            Purpose::Unpack { .. } => None,
        };
        let output = Output::new(sink, supervision.output_bytes, supervision.output_policy, spawned.stdout, spawned.stderr);
        for (kind, source) in [(Kind::Stdout, Source::Stdout), (Kind::Stderr, Source::Stderr)] {
            self.watch(output.pipe(kind).expect("the pipes are new"), source, serial)?;
        }
        self.watch(spawned.child.pidfd.as_fd(), Source::Init, serial)?;
        self.watch(spawned.control.as_fd(), Source::Control, serial)?;
        if let Some(notice) = &spawned.oom_notice {
            self.watch(notice.as_fd(), Source::OutOfMemory, serial)?;
        }
        self.timer.set(received_at_ns + START_WITHIN_NS, serial, Due::Start)?;
        let init = Init { child: spawned.child, control: spawned.control, is_dead: false };
        let sandbox = Sandbox {
            purpose,
            image: image_id,
            supervision,
            cpu_millis: limits.cpu_quota_us * 1000 / limits.cpu_period_us,
            received_at_ns,
            start,
            output,
            decision: None,
            launched: None,
            started_at_ns: None,
            init_cpu_us: 0,
            ending: None,
            launch_asker,
            waiters: Vec::new(),
            body: Some(Body { slot, init, oom_notice: spawned.oom_notice }),
        };
        self.sandboxes.insert(serial, sandbox);
        Ok(())
    }

    /// Answers with a failure, leaving nothing of what was prepared.
    fn give_up(&mut self, body: Preparation, answer: Answer) -> io::Result<()> {
        match &body.purpose {
            Purpose::Payload { id } => std::fs::remove_file(crate::log::path(&self.logs, *id))?,
            Purpose::Unpack { folder, .. } => self.store.discard(folder)?,
        }
        self.answer(body.asker, answer);
        Ok(())
    }

    fn spawn_in(&self, slot: Slot, body: &Preparation) -> Result<(Slot, Spawned), Box<(Slot, io::Error)>> {
        match self.spawn_steps(&slot, body) {
            Ok(spawned) => Ok((slot, spawned)),
            Err(error) => Err(Box::new((slot, error))),
        }
    }

    fn spawn_steps(&self, slot: &Slot, body: &Preparation) -> io::Result<Spawned> {
        let at = |step: &'static str| move |error: io::Error| io::Error::new(error.kind(), format!("{step}: {error}"));
        slot.group.set_limits(body.limits).map_err(at("setting the limits"))?;
        let oom_notice = slot.group.oom_notice().map_err(at("watching the memory limit"))?;
        let tasks = slot.group.tasks().map_err(at("opening the cgroups"))?;
        let namespace = slot.user_namespace.as_fd();
        let image = map_layer(body.image.as_fd(), namespace, true).map_err(at("mapping the image"))?;
        let base = map_layer(self.store.base().as_fd(), namespace, true).map_err(at("mapping the base layer"))?;
        let target =
            body.target.as_ref().map(|target| map_layer(target.as_fd(), namespace, false)).transpose().map_err(at("mapping the target"))?;
        let (stdout, stdout_end) = output_pipe()?;
        let (stderr, stderr_end) = output_pipe()?;
        let (control, init_end) = Socket::pair()?;

        // Setup and Start wait in the socket when init looks for them.
        let setup = Order::Setup(Setup {
            id_base: slot.id_base,
            hostname: body.hostname.clone(),
            disk_bytes: body.supervision.disk_bytes,
            inodes: body.supervision.inodes,
            shm_bytes: SHM_BYTES_MAX.min(body.limits.memory_bytes),
            cgroup_hierarchies: u32::try_from(tasks.len()).map_err(io::Error::other)?,
            has_target: target.is_some(),
            payload_capabilities: body.capabilities,
            seccomp: self.seccomp.clone(),
        });
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![namespace, image.as_fd(), base.as_fd()];
        descriptors.extend(tasks.iter().map(AsFd::as_fd));
        descriptors.extend(target.iter().map(AsFd::as_fd));
        control.send(&setup, &descriptors)?;
        let mut descriptors: Vec<BorrowedFd<'_>> = body.stdin.iter().map(AsFd::as_fd).collect();
        descriptors.extend([stdout_end.as_fd(), stderr_end.as_fd()]);
        descriptors.extend(body.descriptors.iter().map(AsFd::as_fd));
        control.send(&Order::Start(Box::new(body.start.clone())), &descriptors)?;

        let child = self.slots.networks.inside(&slot.network, || self.clone_init(slot, &init_end)).map_err(at("cloning init"))?;
        Ok(Spawned { child, control, stdout, stderr, oom_notice })
    }

    /// The child has nothing of the keeper's but its end of the control socket after execve: everything else is close-on-exec.
    fn clone_init(&self, slot: &Slot, init_end: &OwnedFd) -> io::Result<Child> {
        let namespaces = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
        match sys::clone3(namespaces, true, slot.group.birthplace())? {
            Cloned::Parent(child) => Ok(child),
            Cloned::Child => {
                let failed = become_init(&self.programs.init, init_end);
                eprintln!("sandbox-keeper: starting init failed: {failed}");
                std::process::exit(1)
            }
        }
    }
}

/// Turns the clone into sandbox-init. Comes back only with a failure.
fn become_init(program: &OwnedFd, control: &OwnedFd) -> io::Error {
    let steps = || -> io::Result<std::convert::Infallible> {
        sys::place_at(control.as_fd(), CONTROL)?;
        let no_environment: [&std::ffi::CStr; 0] = [];
        Ok(nix::unistd::fexecve(program, &[c"sandbox-init"], &no_environment)?)
    };
    match steps() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// What exists once init is cloned.
struct Spawned {
    child: Child,
    control: Socket,
    stdout: OwnedFd,
    stderr: OwnedFd,
    oom_notice: Option<OwnedFd>,
}

/// What the unpacker may use: it streams, so a little memory does; page cache that it fills is given back.
const UNPACK_LIMITS: Limits = Limits { memory_bytes: 512 << 20, cpu_quota_us: 100_000, cpu_period_us: 100_000, pids: 4 };

/// The largest `/dev/shm`, as Docker has it. It is charged to the memory limit like everything else.
const SHM_BYTES_MAX: u64 = 64 << 20;

/// A pipe whose reading end, which is ours, does not block; the payload's does, as programs expect.
fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}
