//! Launching: from a request that passed the policy to a sandbox that has its payload.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    fs::FileType,
};

use super::{
    Due, Keeper, START_WITHIN_NS, Source,
    build::{Blueprint, BuildError},
    connection::{Asker, failed, failed_at},
    control::{Paused, input_pipe},
    gvisor,
    layer::{Lent, Origin, Shape, Wish, supervision_of_visit},
    monotonic_ns,
    output::{Output, Sink},
    parked::Class,
    sandbox::{Body, Pending, Purpose, Sandbox},
};
use crate::{
    cgroup::Limits,
    error::at,
    fail_point::reached,
    fence::{Fence, Fences},
    network,
    policy::Plan,
    privileges,
    protocol::{
        Answer, Cause, FailureKind, ImageId, IoLimits, Isolation, Launch, Medium, OutputPolicy, SandboxId, Stdin, Supervision,
        UnpackLimits, Unpacked, VolumeMount,
        init::{self, Order, Program, User},
    },
    rootfs::base,
};

/// What differs between a payload and a program of our own.
struct Preparation {
    purpose: Purpose,
    image: OwnedFd,
    image_id: Option<ImageId>,
    layer: Wish,
    volumes: Vec<VolumeMount>,
    target: Option<OwnedFd>,
    limits: Limits,
    supervision: Supervision,
    sink: Sink,
    hostname: String,
    capabilities: u64,
    isolation: Isolation,
    fences: Fences,
    start: init::Start,
    stdin: Option<OwnedFd>,
    /// The writing end of that, if it is ours.
    input: Option<OwnedFd>,
    /// The files, if the start says so, and what the payload inherits.
    descriptors: Vec<OwnedFd>,
    asker: Asker,
}

impl Keeper {
    /// Starts the sandbox of a request, or answers why not.
    pub(super) fn launch(&mut self, asker: Asker, launch: Launch, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let received_at_ns = monotonic_ns();
        reached("keeper.launch.received");
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
        let mut plan = Plan::check(&launch, self.weakening).map_err(|e| refused(e.to_string()))?;
        gvisor::check(&launch, &self.hello.isolation, plan.limits.memory_bytes).map_err(refused)?;
        let pids = plan.limits.pids;
        if launch.isolation == Isolation::Gvisor {
            plan.limits.pids = gvisor::host_pids(pids);
        }
        let id = launch.id;
        if self.records.get(id).is_some() {
            return Err(refused(format!("sandbox {id} exists already")));
        }
        let mut descriptors = descriptors.into_iter();
        let mut next = |is_wanted: bool, what: &str| match (is_wanted, is_wanted.then(|| descriptors.next()).flatten()) {
            (true, None) => Err(refused(format!("the descriptor of {what} is missing"))),
            (_, descriptor) => Ok(descriptor),
        };
        let stdin = next(launch.stdin == Stdin::Descriptor, "stdin")?;
        // A folder of the host's would be a way out for path look-ups (CVE-2024-21626), a device more than policy allows.
        if let Some(stdin) = &stdin
            && !is_stream(stdin).unwrap_or(false)
        {
            return Err(refused("stdin must be a regular file or a pipe".to_owned()));
        }
        let files = next(launch.has_files, "the files")?;
        let (stdin, input) = if launch.terminal.is_some() {
            (None, None)
        } else if launch.stdin == Stdin::Held {
            let (theirs, ours) = input_pipe().map_err(|error| Box::new(failed_at("making a pipe for the input", &error)))?;
            (Some(theirs), Some(ours))
        } else {
            (stdin, None)
        };
        let layer = self.check_layer(&launch)?;
        self.check_volumes(&launch)?;
        let image = self.store.image(&launch.image).map_err(|error| {
            Box::new(if error.kind() == io::ErrorKind::NotFound {
                failed(FailureKind::Gone, format!("this node has no image {}", launch.image))
            } else {
                failed_at("opening the image", &error)
            })
        })?;
        match self.check_room(&launch.supervision, layer.lent()) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Err(Box::new(failed(FailureKind::Busy, why))),
            Err(error) => return Err(Box::new(failed_at("looking for room", &error))),
        }
        let sink = Sink::log(&self.logs, id, self.group).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                // It ran, and its record is forgotten: whoever sends the order again must not get a second payload.
                refused(format!("sandbox {id} was started before: its log exists"))
            } else {
                Box::new(failed_at("making the log file", &error))
            }
        })?;
        reached("keeper.launch.log_made");
        let start = init::Start {
            program: Program::Path,
            args: plan.args,
            env: plan.env,
            cwd: plan.cwd,
            folders: plan.folders,
            user: plan.user,
            rlimits: plan.rlimits,
            pids,
            has_stdin: stdin.is_some(),
            has_files: files.is_some(),
            terminal: launch.terminal,
        };
        Ok(Preparation {
            purpose: Purpose::Payload { id },
            image,
            image_id: Some(launch.image),
            layer,
            volumes: launch.volumes,
            target: None,
            limits: plan.limits,
            supervision: launch.supervision,
            sink,
            hostname: plan.hostname.unwrap_or_else(|| base::HOSTNAME.to_owned()),
            capabilities: plan.capabilities,
            isolation: launch.isolation,
            fences: match launch.isolation {
                Isolation::Container => self.hello.fences.without(plan.without),
                Isolation::Gvisor => gvisor::fences(self.hello.fences),
            },
            start,
            stdin,
            input,
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
        if let Err(why) = self.check_number(None) {
            self.answer(asker, failed(FailureKind::Busy, why));
            return Ok(());
        }
        let received_at_ns = monotonic_ns();
        let (folder, target) = match self.store.begin() {
            Ok(begun) => begun,
            Err(error) => {
                self.answer(asker, failed_at("making a folder for the image", &error));
                return Ok(());
            }
        };
        reached("keeper.unpack.begun");
        let mut descriptors = descriptors;
        descriptors.push(rustix::io::fcntl_dupfd_cloexec(&self.programs.unpack, 0)?);
        let start = init::Start {
            program: Program::Descriptor,
            args: vec!["sandbox-unpack".to_owned(), layers.to_string(), limits.bytes.to_string(), limits.entries.to_string()],
            env: Vec::new(),
            cwd: "/".to_owned(),
            folders: Vec::new(),
            user: User::Ids { uid: 0, gid: 0, groups: Vec::new() },
            rlimits: vec![(libc::RLIMIT_FSIZE, limits.bytes), (libc::RLIMIT_NOFILE, 256)],
            pids: UNPACK_LIMITS.pids,
            has_stdin: false,
            has_files: false,
            terminal: None,
        };
        let body = Preparation {
            purpose: Purpose::Unpack { image, folder, asker },
            image: self.store.empty().try_clone()?,
            image_id: None,
            layer: Wish::NONE,
            volumes: Vec::new(),
            target: Some(target),
            limits: UNPACK_LIMITS,
            supervision: Supervision {
                wall_ms: Some(limits.wall_ms),
                cpu_ms: None,
                output_bytes: 64 * 1024,
                output_policy: OutputPolicy::Kill,
                medium: Medium::Memory,
                disk_bytes: 1 << 20,
                inodes: 64,
                io: IoLimits::MAX,
            },
            sink: Sink::Memory { stdout: Vec::new(), stderr: Vec::new() },
            hostname: base::HOSTNAME.to_owned(),
            capabilities: privileges::OF_UNPACK,
            isolation: Isolation::Container,
            // A domain that may write images would be no fence around payloads. What this one writes has the label of the images' folder.
            fences: self.hello.fences.without([Fence::Selinux].into_iter().collect()),
            start,
            stdin: None,
            input: None,
            descriptors,
            asker,
        };
        self.spawn(body, received_at_ns)
    }

    /// Keeps what the unpacker made and then answers, or discards it.
    pub(super) fn unpacked(&mut self, serial: u64) {
        let Some(sandbox) = self.sandboxes.get(&serial) else { return };
        let Purpose::Unpack { image, folder, asker } = &sandbox.purpose else { return };
        let (image, folder, asker) = (image.clone(), folder.clone(), *asker);
        match sandbox.unpacked() {
            Ok(unpacked) => self.commit(folder, &image, unpacked, asker),
            Err(message) => {
                self.discard(&folder);
                self.answer(asker, failed(FailureKind::Refused, message));
            }
        }
    }

    /// Gives the payload to a sandbox that stands ready for it, or to a new one.
    fn spawn(&mut self, asked: Preparation, received_at_ns: u64) -> io::Result<()> {
        // First, because from the next line on there is something to clean up.
        let (pipes, ends) = match asked.start.terminal.map_or_else(output_pipes, |_| Ok((None, Vec::new()))) {
            Ok(made) => made,
            Err(error) => return self.give_up(&asked, BuildError::Host(error)),
        };
        let parked = asked.class().and_then(|class| self.lot.take(&class, received_at_ns));
        let (serial, body, start) = match parked {
            Some((serial, body)) => (serial, body, crate::protocol::Start::Warm),
            None => {
                let lent = asked.layer.lent().and_then(|of| Some((of, self.layers.lend(of)?)));
                match (self.build(&asked.blueprint(lent.as_ref().map(|(_, lent)| lent))), lent) {
                    (Ok((serial, body)), _) => (serial, body, crate::protocol::Start::Cold),
                    (Err(failure), lent) => {
                        if let Some((of, lent)) = lent {
                            self.layers.take_back(of, lent);
                        }
                        return self.give_up(&asked, failure);
                    }
                }
            }
        };
        self.note_layer(&asked, serial, body.slot.id_base);
        let Preparation {
            purpose,
            image_id,
            volumes,
            supervision,
            sink,
            limits,
            hostname,
            isolation,
            fences,
            start: program,
            stdin,
            input,
            descriptors,
            asker,
            ..
        } = asked;
        let launch_asker = match &purpose {
            Purpose::Payload { id } => {
                self.records.accept(*id, serial);
                Some(asker)
            }
            // Only its end is told.
            Purpose::Unpack { .. } | Purpose::Visit { .. } => None,
        };
        let output = Output::new(sink, supervision.output_bytes, supervision.output_policy, pipes);
        let descriptors = stdin.into_iter().chain(ends).chain(descriptors).collect();
        let sandbox = Sandbox {
            purpose,
            image: image_id,
            supervision,
            received_at_ns,
            start,
            fences,
            processes: (isolation == Isolation::Gvisor).then_some(init::Processes { peak: 1, is_at_limit: false }),
            output,
            own_refusals: 0,
            decision: None,
            stopping: None,
            paused: Paused::No,
            pausers: Vec::new(),
            lowering: None,
            input,
            killed_at_ns: None,
            dead_at_ns: None,
            cpu_look: (0, 0),
            cpu_look_at_ns: 0,
            oom_looks: 0,
            launched: None,
            started_at_ns: None,
            init_cpu_us: 0,
            ending: None,
            tell_by_ns: 0,
            is_told: false,
            launch_asker,
            waiters: Vec::new(),
            pending: Some(Pending { start: program, descriptors, limits, hostname }),
            volumes,
            are_volumes_given: false,
            body: Some(body),
        };
        self.sandboxes.insert(serial, sandbox);
        reached("keeper.launch.recorded");
        // What fails from here on is the sandbox's end, and is cleaned up like any other.
        let watched = self.watch_new(serial, received_at_ns).and_then(|()| self.use_volumes(serial));
        if let Err(error) = watched {
            return self.contain(Source::Control, serial, Err(error));
        }
        if start == crate::protocol::Start::Warm { self.begin(serial) } else { Ok(()) }
    }

    /// Says whose the layer is that was taken, or begun, for this.
    fn note_layer(&mut self, asked: &Preparation, serial: u64, id_base: u32) {
        match (&asked.purpose, &asked.image_id) {
            (Purpose::Payload { .. }, _) if let Some(over) = asked.layer.over => self.layer_visited(over, serial),
            (Purpose::Payload { id }, Some(image)) if !asked.layer.is_none() => {
                let shape = Shape { image: image.clone(), supervision: asked.supervision, limits: asked.limits, id_base };
                self.layer_taken(serial, *id, asked.layer, shape);
            }
            (Purpose::Visit { id, .. }, _) => self.layer_visited(*id, serial),
            (Purpose::Payload { .. } | Purpose::Unpack { .. }, _) => {}
        }
    }

    /// Starts a sandbox without a payload on the layer that one left behind, for whoever speaks on this socket.
    pub(super) fn visit(&mut self, asker: Asker, id: SandboxId, shape: Shape, socket: OwnedFd) -> io::Result<()> {
        let image = match self.store.image(&shape.image) {
            Ok(image) => image,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.answer(asker, failed(FailureKind::Gone, format!("this node has no image {} any more", shape.image)));
                return Ok(());
            }
            Err(error) => {
                self.answer(asker, failed_at("opening the image", &error));
                return Ok(());
            }
        };
        let start = init::Start {
            program: Program::Path,
            args: Vec::new(),
            env: Vec::new(),
            cwd: "/".to_owned(),
            folders: Vec::new(),
            user: User::Ids { uid: 0, gid: 0, groups: Vec::new() },
            rlimits: Vec::new(),
            pids: shape.limits.pids,
            has_stdin: false,
            has_files: false,
            terminal: None,
        };
        let asked = Preparation {
            purpose: Purpose::Visit { id, sent: 0, waiting: vec![socket] },
            image,
            image_id: Some(shape.image),
            layer: Wish { of: Some(id), over: None, is_kept: true },
            volumes: Vec::new(),
            target: None,
            limits: shape.limits,
            supervision: supervision_of_visit(&shape.supervision),
            sink: Sink::Memory { stdout: Vec::new(), stderr: Vec::new() },
            hostname: base::HOSTNAME.to_owned(),
            capabilities: 0,
            isolation: Isolation::Container,
            fences: self.hello.fences,
            start,
            stdin: None,
            input: None,
            descriptors: Vec::new(),
            asker,
        };
        self.spawn(asked, monotonic_ns())
    }

    fn watch_new(&mut self, serial: u64, received_at_ns: u64) -> io::Result<()> {
        self.timer.set(received_at_ns + START_WITHIN_NS, serial, Due::Start)?;
        let Some(sandbox) = self.sandboxes.get(&serial) else { return Ok(()) };
        self.watch_output(serial, &sandbox.output)
    }

    /// Sets the limits and gives init, which waits, its payload.
    pub(super) fn begin(&mut self, serial: u64) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(&serial).filter(|sandbox| sandbox.ending.is_none()) else { return Ok(()) };
        if matches!(sandbox.purpose, Purpose::Visit { .. }) {
            return self.begin_visit(serial);
        }
        let (Some(body), Some(pending)) = (&mut sandbox.body, sandbox.pending.take()) else { return Ok(()) };
        if sandbox.processes.is_some() {
            // gVisor's kernel is up: what it took to start is not the payload's.
            sandbox.init_cpu_us = body.slot.group.cpu_us()?;
        }
        let (limits, io, wall_ms) = (pending.limits, sandbox.supervision.io, sandbox.supervision.wall_ms);
        let is_payload = matches!(sandbox.purpose, Purpose::Payload { .. });
        let begun = begin_in(body, pending, io, &self.own_uts);
        let watched = match &body.oom_notice {
            Some(notice) => epoll::add(&self.epoll, notice, EventData::new_u64(Source::OutOfMemory.number(serial)), EventFlags::IN),
            None => Ok(()),
        };
        if let Err(error) = begun.and(watched.map_err(io::Error::from)) {
            self.end(serial, None, Some(Cause::InfraError { message: format!("starting the payload failed: {error}") }));
            return self.kill_by_force(serial);
        }
        if is_payload {
            self.slots.expect(io, limits);
        }
        match wall_ms {
            // It ends no sooner than that. Until it is known when it began, nothing is to be begun here that lasts longer.
            Some(wall_ms) => self.timer.set(monotonic_ns().saturating_add(wall_ms.saturating_mul(1_000_000)), serial, Due::Wall),
            None => Ok(()),
        }
    }

    /// Answers with a failure, leaving nothing of what was prepared.
    fn give_up(&mut self, asked: &Preparation, failure: BuildError) -> io::Result<()> {
        match &asked.purpose {
            Purpose::Payload { id } => std::fs::remove_file(crate::log::path(&self.logs, *id))?,
            Purpose::Unpack { folder, .. } => self.store.discard(folder)?,
            Purpose::Visit { .. } => {}
        }
        let answer = match failure {
            BuildError::Full => failed(FailureKind::Busy, "every id range of this node is in use"),
            BuildError::Host(error) => failed_at("building the sandbox", &error),
        };
        self.answer(asked.asker, answer);
        Ok(())
    }
}

fn begin_in(body: &mut Body, pending: Pending, io: IoLimits, own_uts: &OwnedFd) -> io::Result<()> {
    body.slot.group.set_limits(pending.limits).map_err(at("setting the limits"))?;
    body.slot.group.limit_io(io).map_err(at("setting the limits of input and output"))?;
    reached("keeper.launch.limited");
    body.watch_memory()?;
    network::set_host_name(&body.init.child.pidfd, own_uts, &pending.hostname).map_err(at("setting the host name"))?;
    let descriptors: Vec<BorrowedFd<'_>> = pending.descriptors.iter().map(AsFd::as_fd).collect();
    body.init.control.send(&Order::Start(Box::new(pending.start)), &descriptors)?;
    reached("keeper.launch.ordered");
    Ok(())
}

impl Preparation {
    fn blueprint<'a>(&'a self, lent: Option<&'a Lent>) -> Blueprint<'a> {
        let (layer, below) = match lent {
            Some(lent) if self.layer.over.is_some() => (Origin::Own, Some(lent)),
            Some(lent) => (Origin::Used(lent), None),
            None if self.layer.is_kept => (Origin::New, None),
            None => (Origin::Own, None),
        };
        Blueprint {
            layer,
            below,
            image: &self.image,
            target: self.target.as_ref(),
            medium: self.supervision.medium,
            disk_bytes: self.supervision.disk_bytes,
            inodes: self.supervision.inodes,
            capabilities: self.capabilities,
            isolation: self.isolation,
            fences: self.fences,
            volumes: &self.volumes,
        }
    }

    /// Which parked sandboxes will do; none for our own programs, which are rare, none that would set space on disk aside unasked or has
    /// volumes, and none under gVisor, whose kernel takes memory while it waits.
    fn class(&self) -> Option<Class> {
        let is_small = self.supervision.medium == Medium::Memory
            && self.isolation == Isolation::Container
            && self.layer.is_none()
            && self.volumes.is_empty();
        let image = self.image_id.clone().filter(|_| is_small)?;
        let Supervision { disk_bytes, inodes, .. } = self.supervision;
        Some(Class { image, disk_bytes, inodes, capabilities: self.capabilities, fences: self.fences })
    }
}

/// What the unpacker may use: it streams, so a little memory does; page cache that it fills is given back.
const UNPACK_LIMITS: Limits = Limits { memory_bytes: 512 << 20, cpu_quota_us: 100_000, cpu_period_us: 100_000, pids: 4 };

pub(super) fn is_stream(descriptor: &OwnedFd) -> io::Result<bool> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(descriptor)?.st_mode);
    Ok(matches!(kind, FileType::RegularFile | FileType::Fifo))
}

/// What is read of stdout and stderr, unless a terminal comes in their stead, and the ends that go in.
type Pipes = (Option<(OwnedFd, OwnedFd)>, Vec<OwnedFd>);

fn output_pipes() -> io::Result<Pipes> {
    let ((stdout, stdout_end), (stderr, stderr_end)) = (output_pipe()?, output_pipe()?);
    Ok((Some((stdout, stderr)), vec![stdout_end, stderr_end]))
}

/// A pipe whose reading end, which is ours, does not block; the payload's does, as programs expect.
pub(super) fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    // Programs open /dev/stdout and /dev/stderr, which is this pipe, as whatever user they are: for writing alone.
    rustix::fs::fchmod(&theirs, rustix::fs::Mode::from_raw_mode(0o222))?;
    Ok((ours, theirs))
}
