//! The keeper's door: connections, requests, answers.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    net::{SocketFlags, accept_with},
};

use super::{
    Keeper, Source,
    connection::{Asker, Connection, failed},
    monotonic_ns, parked,
    records::State,
    recovery,
    sandbox::Decision,
    timer::Due,
    warn,
};
use crate::{
    fail_point::reached,
    log,
    protocol::{Answer, Call, FailureKind, ImageId, Request, SandboxId, VERSION},
    transport,
};

/// Clients at one time: one service, its successor, a few tools.
const CONNECTIONS_MAX: usize = 64;
/// How long nobody is let in when there are no descriptors.
const ACCEPT_AGAIN_AFTER_NS: u64 = 100_000_000;
/// Requests that may wait for one sandbox.
pub(super) const WAITERS_MAX: usize = 64;

impl Keeper {
    pub(super) fn accept(&mut self) -> io::Result<()> {
        let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM | rustix::io::Errno::NOBUFS) => {
                // Who knocks goes on to, which would keep the loop turning: not looked at for a while.
                epoll::delete(&self.epoll, &self.listener)?;
                return self.timer.set(monotonic_ns() + ACCEPT_AGAIN_AFTER_NS, 0, Due::Accept);
            }
            // The other side left again.
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

    /// Looks again at who knocks, after it was given up for a while for want of descriptors.
    pub(super) fn accept_again(&mut self) -> io::Result<()> {
        match self.watch(self.listener.as_fd(), Source::Listener, 0) {
            // A new program has looked since.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => {
                warn(format_args!("nobody is let in for a while: {error}"));
                self.timer.set(monotonic_ns() + ACCEPT_AGAIN_AFTER_NS, 0, Due::Accept)
            }
            Ok(()) => Ok(()),
        }
    }

    pub(super) fn on_connection(&mut self, serial: u64, flags: EventFlags) -> io::Result<()> {
        if flags.contains(EventFlags::OUT) {
            self.flush(serial)?;
        }
        // A bounded number at once, so that one busy client does not hold up the sandboxes.
        for _ in 0..16 {
            let Some(connection) = self.connections.get(&serial) else { return Ok(()) };
            match connection.receive() {
                Ok(Some(datagram)) => {
                    let Call { tag, request } = datagram.message;
                    // Nobody waits for it any more: whoever comes after the one that asked gives it out again.
                    if matches!(request, Request::Launch(_) | Request::Exec(_) | Request::Unpack { .. }) && connection.is_left() {
                        continue;
                    }
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

    pub(super) fn on_request(&mut self, asker: Asker, request: Request, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let answer = match request {
            Request::Hello { version } if version != VERSION => {
                failed(FailureKind::Refused, format!("this keeper speaks version {VERSION} of its protocol, not {version}"))
            }
            Request::Hello { .. } => Answer::Hello(self.hello.clone()),
            Request::Launch(_) | Request::Exec(_) | Request::Unpack { .. } if self.shutdown.is_some() => {
                failed(FailureKind::Busy, "the keeper is stopping")
            }
            Request::Launch(launch) => return self.launch(asker, *launch, descriptors),
            Request::Unpack { image, layers, limits } => return self.unpack(asker, image, layers, limits, descriptors),
            Request::Wait { id } => match self.records.get(id) {
                None => failed(FailureKind::Gone, format!("no sandbox {id}")),
                Some(State::Ended(ending)) => Answer::Ended(ending.clone()),
                Some(State::Alive(serial)) => {
                    let of_sandbox = self.sandboxes.get_mut(serial).map(|sandbox| &mut sandbox.waiters);
                    match of_sandbox.or_else(|| self.execs.get_mut(serial).map(|exec| &mut exec.waiters)) {
                        None => failed(FailureKind::Gone, format!("no sandbox {id}")),
                        Some(waiters) if waiters.len() >= WAITERS_MAX => failed(FailureKind::Busy, "too many wait for this sandbox"),
                        Some(waiters) => {
                            waiters.push(asker);
                            return Ok(());
                        }
                    }
                }
            },
            Request::Kill { id, reason } => match self.records.get(id) {
                None => failed(FailureKind::Gone, format!("no sandbox {id}")),
                Some(State::Ended(_)) => Answer::Done,
                Some(&State::Alive(serial)) => {
                    self.decide(serial, Decision::Killed(reason))?;
                    Answer::Done
                }
            },
            Request::List { after } => {
                let (records, is_more) = self.records.page(after);
                Answer::Records { records, is_more }
            }
            Request::Forget { id } => self.forget(id, LogFile::Delete),
            Request::ForgetRecord { id } => self.forget(id, LogFile::Keep),
            Request::Images => match self.store.images() {
                Ok(images) => Answer::Images(images),
                Err(error) => failed(FailureKind::Host, format!("listing the images failed: {error}")),
            },
            Request::RemoveImage { image } if self.sandboxes.values().any(|s| s.body.is_some() && s.image.as_ref() == Some(&image)) => {
                failed(FailureKind::Busy, "a sandbox runs on this image")
            }
            Request::RemoveImage { image } if self.layers.is_on(&image) => {
                failed(FailureKind::Busy, "a layer is kept that belongs on this image")
            }
            Request::RemoveImage { image } => match self.remove_image(&image) {
                Ok(()) => Answer::Done,
                Err(error) => failed(FailureKind::Host, format!("removing the image failed: {error}")),
            },
            Request::Signal { id, signal } => self.signal(id, signal)?,
            Request::Stop { id, signal, grace_ms, reason } => self.stop_within(id, signal, grace_ms, reason)?,
            Request::Pause { id } => return self.pause(asker, id),
            Request::Resume { id } => self.resume(id)?,
            Request::Update { id, limits } => match self.update(asker, id, limits)? {
                Some(answer) => answer,
                None => return Ok(()),
            },
            Request::Sample { id } => self.sample(id),
            Request::Connect { id, family } => {
                let (answer, socket) = self.socket_in(id, family);
                self.answer_with(asker, answer, socket);
                return Ok(());
            }
            Request::Input { id } => {
                let (answer, input) = self.input(id);
                self.answer_with(asker, answer, input);
                return Ok(());
            }
            Request::EndInput { id } => match self.end_input(asker, id)? {
                Some(answer) => answer,
                None => return Ok(()),
            },
            Request::Resize { id, size } => self.resize(id, size),
            Request::Exec(exec) => return self.exec(asker, *exec, descriptors),
            Request::MakeVolume { volume, bytes, inodes } => {
                self.make_volume(asker, volume, bytes, inodes);
                return Ok(());
            }
            Request::RemoveVolume { volume } => {
                self.remove_volume(asker, volume);
                return Ok(());
            }
            Request::Volumes => self.list_volumes(),
            Request::Tree { .. } if self.shutdown.is_some() => failed(FailureKind::Busy, "the keeper is stopping"),
            Request::Tree { id } => return self.tree(asker, id, descriptors),
            Request::Layers => Answer::Layers(self.layers.ids()),
            Request::DropLayer { id } => self.drop_layer(id),
            Request::Shutdown => return self.stop(Some(asker)),
        };
        self.answer(asker, answer);
        Ok(())
    }

    pub(super) fn remove_image(&mut self, image: &ImageId) -> io::Result<()> {
        self.end_parked(|class| class.image == *image)?;
        self.store.remove(image)
    }

    /// Ends what stands ready of these classes, and of those that nobody asks for any more.
    pub(super) fn end_parked(&mut self, of: impl Fn(&parked::Class) -> bool) -> io::Result<()> {
        self.lot.give_up(of);
        self.lot.expire(monotonic_ns()).into_iter().try_for_each(|serial| self.kill_by_force(serial))
    }

    fn forget(&mut self, id: SandboxId, log_file: LogFile) -> Answer {
        if let Some(State::Alive(_)) = self.records.get(id) {
            return failed(FailureKind::Busy, "the sandbox has not ended");
        }
        let path = log::path(&self.logs, id);
        let done = match log_file {
            LogFile::Delete => std::fs::remove_file(path),
            LogFile::Keep => recovery::seal(&path),
        };
        match done {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return failed(FailureKind::Host, format!("forgetting the log failed: {error}"));
            }
            _ => {}
        }
        reached("keeper.forget.unlinked");
        self.records.forget(id);
        reached("keeper.forget.done");
        Answer::Done
    }

    pub(super) fn answer(&mut self, asker: Asker, answer: Answer) {
        self.answer_with(asker, answer, None);
    }

    /// [`Keeper::answer`], with a descriptor beside it.
    pub(super) fn answer_with(&mut self, asker: Asker, answer: Answer, descriptor: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&asker.connection) else { return };
        let answered = match connection.answer(asker.tag, answer, descriptor) {
            Ok(false) => Ok(()),
            Ok(true) => self.wait_for(asker.connection, EventFlags::IN | EventFlags::OUT),
            Err(error) => Err(error),
        };
        if let Err(error) = answered {
            warn(format_args!("disconnecting a client that does not read: {error}"));
            self.disconnect(asker.connection);
        }
    }

    pub(super) fn flush(&mut self, serial: u64) -> io::Result<()> {
        match self.connections.get_mut(&serial).map(Connection::flush) {
            Some(Ok(false)) => self.wait_for(serial, EventFlags::IN),
            Some(Ok(true)) | None => Ok(()),
            Some(Err(_)) => {
                self.disconnect(serial);
                Ok(())
            }
        }
    }

    pub(super) fn wait_for(&self, serial: u64, flags: EventFlags) -> io::Result<()> {
        let Some(connection) = self.connections.get(&serial) else { return Ok(()) };
        Ok(epoll::modify(&self.epoll, connection.socket.as_fd(), EventData::new_u64(Source::Connection.number(serial)), flags)?)
    }

    pub(super) fn disconnect(&mut self, serial: u64) {
        self.connections.remove(&serial);
        for sandbox in self.sandboxes.values_mut() {
            sandbox.waiters.retain(|asker| asker.connection != serial);
            sandbox.pausers.retain(|asker| asker.connection != serial);
            sandbox.launch_asker = sandbox.launch_asker.filter(|asker| asker.connection != serial);
        }
        for exec in self.execs.values_mut() {
            exec.waiters.retain(|asker| asker.connection != serial);
            exec.launch_asker = exec.launch_asker.filter(|asker| asker.connection != serial);
        }
    }
}

/// What becomes of the log of a sandbox that is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LogFile {
    Keep,
    Delete,
}
