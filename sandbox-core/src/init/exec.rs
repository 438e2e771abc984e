//! Further processes in a sandbox that runs: started by init beside the payload, with no more than that has.
//!
//! What the payload could meddle with — its folders, its `/etc/passwd`, the processes of its user — is met by the new process alone, never by
//! init: that waits for nobody but the keeper and the kernel.

use std::{
    collections::VecDeque,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    monotonic_ns, next,
    payload::{self, Exec as Program, Identity, Place},
    setup,
    terminal::{self, Said},
    unexpected,
};
use crate::{
    error::{Kind, LaunchError, Step},
    protocol::init::{Exec as Order, Report, Start, WaitStatus},
    rootfs::Tree,
    sys, transport,
};
use rustix::{
    fs::{Dir, Mode, OFlags, ResolveFlags, openat, openat2},
    process::{Pid, PidfdFlags, pidfd_open},
};

/// How often the processes of a session are looked for, until none is left.
const PASSES_MAX: u32 = 32;

/// All of one sandbox, and what they are made of.
#[derive(Debug)]
pub(super) struct Execs<'a> {
    /// As the payload was started.
    payload: &'a Start,
    /// Whom that was started as: found before it ran, so that nothing of its making has a say in it.
    identity: Identity,
    place: Place<'a>,
    tree: &'a Tree,
    alive: Vec<Exec>,
}

/// One that is not reaped yet.
#[derive(Debug)]
struct Exec {
    /// The keeper's.
    number: u64,
    pid: libc::pid_t,
    process: OwnedFd,
    start: Phase,
}

#[derive(Debug)]
enum Phase {
    /// It is on its way to execve(2), at which the other end of the socket closes.
    Starting {
        socket: transport::Socket,
        terminal: Option<OwnedFd>,
    },
    Started,
    /// The keeper knows that it never was.
    Failed,
}

impl<'a> Execs<'a> {
    pub(super) fn new(payload: &'a Start, identity: Identity, place: Place<'a>, tree: &'a Tree) -> Self {
        Self { payload, identity, place, tree, alive: Vec::new() }
    }

    /// The sockets of those that start, to be watched.
    pub(super) fn starting(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.alive.iter().filter_map(|exec| match &exec.start {
            Phase::Starting { socket, .. } => Some(socket.as_fd()),
            Phase::Started | Phase::Failed => None,
        })
    }

    /// Starts one. How that went is reported when it is known.
    pub(super) fn start(&mut self, control: &OwnedFd, order: Order, descriptors: VecDeque<OwnedFd>) -> io::Result<()> {
        let number = order.number;
        match self.clone_one(order, descriptors) {
            Ok(exec) => self.alive.push(exec),
            Err(failure) => report(control, &Report::ExecFailed { number, kind: failure.kind, message: failure.to_string() }, &[])?,
        }
        Ok(())
    }

    fn clone_one(&self, order: Order, descriptors: VecDeque<OwnedFd>) -> Result<Exec, LaunchError> {
        let (socket, tell) = transport::Socket::pair().step("making a socket")?;
        let number = order.number;
        // Without a wait: between its becoming the user and its execve the payload can stop it.
        let pid = match sys::fork() {
            Ok(Some(pid)) => pid,
            Ok(None) => {
                drop(socket);
                let failure = self.become_exec(order, descriptors, &tell);
                let failed = Said::Failed { kind: failure.kind, message: failure.to_string() };
                let is_told = transport::send(tell.as_fd(), &failed, &[]).is_ok();
                std::process::exit(if is_told { 0 } else { 1 });
            }
            // Of its own limit.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                return Err(error).spec("cloning the process", "the sandbox has as many processes as it may");
            }
            Err(error) => return Err(error).step("cloning the process"),
        };
        // Not reaped yet, so the number is its own.
        let process = Pid::from_raw(pid).ok_or_else(unexpected).step("finding the process")?;
        let process = match pidfd_open(process, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(error) => {
                // Nobody could end it.
                sys::send_signal_to(pid, libc::SIGKILL).step("ending the process")?;
                return Err(error).step("finding the process");
            }
        };
        Ok(Exec { number, pid, process, start: Phase::Starting { socket, terminal: None } })
    }

    /// Turns the freshly cloned child into the process that was asked for. Comes back only with a failure.
    fn become_exec(&self, order: Order, descriptors: VecDeque<OwnedFd>, tell: &OwnedFd) -> LaunchError {
        match self.never_returns(order, descriptors, tell) {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn never_returns(
        &self,
        order: Order,
        mut descriptors: VecDeque<OwnedFd>,
        tell: &OwnedFd,
    ) -> Result<std::convert::Infallible, LaunchError> {
        // Init's own blocked signals are not for it.
        setup::default_signals().step("resetting signals")?;
        nix::unistd::setsid().step("making a session")?;
        let identity = match &order.user {
            None => self.identity.clone(),
            Some(user) => Identity::find(user)?.with_capabilities_of(&self.place),
        };
        let program = Program::new(&self.start_of(&order), &identity)?;
        let cwd = order.cwd.as_deref().unwrap_or(&self.payload.cwd);
        identity.assume()?;
        // As its user, who may go where he may go; the folder is there or it is not.
        let folder = payload::open_folder(cwd).spec("entering the working folder", cwd)?;
        nix::unistd::fchdir(&folder).spec("entering the working folder", cwd)?;
        for (resource, value) in &self.payload.rlimits {
            sys::set_rlimit(*resource, *value).step_on("setting a resource limit", resource)?;
        }
        match order.terminal {
            Some(size) => terminal::take(&self.tree.terminals, size, tell.as_fd())?,
            None => {
                // Without one of its own it is init's, the sandbox's /dev/null.
                if order.has_stdin {
                    sys::place_at(next(&mut descriptors, "stdin")?.as_fd(), 0).step("placing the standard streams")?;
                }
                for (number, what) in [(1, "stdout"), (2, "stderr")] {
                    sys::place_at(next(&mut descriptors, what)?.as_fd(), number).step("placing the standard streams")?;
                }
            }
        }
        self.place.label_next_exec()?;
        program.run(&[], &self.place)
    }

    /// The payload's start with what this one has otherwise.
    fn start_of(&self, order: &Order) -> Start {
        let name = |line: &str| line.split_once('=').map_or(line, |(name, _)| name).to_owned();
        let own: Vec<String> = order.env.iter().map(|line| name(line)).collect();
        let inherited = self.payload.env.iter().filter(|line| !own.contains(&name(line)));
        let env = inherited.chain(&order.env).cloned().collect();
        Start { args: order.args.clone(), env, ..self.payload.clone() }
    }

    /// Takes what those that start have said.
    pub(super) fn listen(&mut self, control: &OwnedFd) -> io::Result<()> {
        self.alive.iter_mut().try_for_each(|exec| exec.listen(control))
    }

    /// Notes and reports the end of a process, if it is one of these.
    pub(super) fn ended(&mut self, control: &OwnedFd, pid: libc::pid_t, status: WaitStatus, cpu_us: u64) -> io::Result<()> {
        let at_ns = monotonic_ns();
        let Some(place) = self.alive.iter().position(|exec| exec.pid == pid) else { return Ok(()) };
        let mut exec = self.alive.swap_remove(place);
        // It is dead, so all that it had to say is there.
        exec.listen(control)?;
        let number = exec.number;
        match exec.start {
            Phase::Failed => Ok(()),
            Phase::Started => report(control, &Report::ExecEnded { number, status, at_ns, cpu_us }, &[]),
            Phase::Starting { .. } => {
                let message = "the process was ended before its program started".to_owned();
                report(control, &Report::ExecFailed { number, kind: Kind::Spec, message }, &[])
            }
        }
    }

    /// SIGKILL to one of these and to all that is left in its session. What has left that is the sandbox's.
    pub(super) fn kill(&self, number: u64) -> io::Result<()> {
        let Some(exec) = self.alive.iter().find(|exec| exec.number == number) else { return Ok(()) };
        kill(exec.process.as_fd())?;
        for _ in 0..PASSES_MAX {
            if !self.kill_session(exec.pid)? {
                break;
            }
        }
        Ok(())
    }

    /// Whether there was anybody to be killed.
    fn kill_session(&self, session: libc::pid_t) -> io::Result<bool> {
        let mut was_any = false;
        // The mount's own descriptor is of no use for reading.
        let folder = openat(&self.tree.proc, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for entry in Dir::new(folder)? {
            let Some(pid) = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else { continue };
            if !self.is_alive_in(pid, session) {
                continue;
            }
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
            // The number may have become another's before it was opened.
            if self.is_alive_in(pid, session) {
                was_any = true;
                kill(process.as_fd())?;
            }
        }
        Ok(was_any)
    }

    /// Whether a process is one of this session and not dead (proc_pid_stat(5): the state, and the session three further).
    fn is_alive_in(&self, pid: Pid, session: libc::pid_t) -> bool {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let path = format!("{}/stat", pid.as_raw_nonzero());
        let mut text = Vec::new();
        let read = openat2(&self.tree.proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), resolve)
            .map_err(io::Error::from)
            .and_then(|stat| std::fs::File::from(stat).read_to_end(&mut text));
        // The name before it holds what its owner likes, but no field behind has a parenthesis.
        let text = String::from_utf8_lossy(&text);
        let Some((_, fields)) = read.ok().and_then(|_| text.rsplit_once(") ")) else { return false };
        let mut fields = fields.split(' ');
        let is_dead = matches!(fields.next(), None | Some("Z" | "X"));
        !is_dead && fields.nth(2) == Some(session.to_string().as_str())
    }
}

impl Exec {
    fn listen(&mut self, control: &OwnedFd) -> io::Result<()> {
        while let Phase::Starting { socket, terminal } = &mut self.start {
            match socket.recv::<Said>() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(Some(datagram)) => match datagram.message {
                    Said::Terminal => *terminal = datagram.descriptors.into_iter().next(),
                    Said::Failed { kind, message } => {
                        self.start = Phase::Failed;
                        report(control, &Report::ExecFailed { number: self.number, kind, message }, &[])?;
                    }
                },
                // Closed by execve; or by its death, if somebody inside was quick to kill it.
                Ok(None) | Err(_) => {
                    let brought: Vec<BorrowedFd<'_>> =
                        [Some(self.process.as_fd()), terminal.as_ref().map(AsFd::as_fd)].into_iter().flatten().collect();
                    report(control, &Report::ExecStarted { number: self.number, at_ns: monotonic_ns() }, &brought)?;
                    self.start = Phase::Started;
                }
            }
        }
        Ok(())
    }
}

fn report(control: &OwnedFd, report: &Report, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    transport::send(control.as_fd(), report, descriptors)
}

fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    match sys::send_signal(process, libc::SIGKILL) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        sent => sent,
    }
}
