//! The keeper, seen from the service: every request as an async call, over one connection that heals itself.

mod tree;

use std::{
    collections::{HashMap, HashSet},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use sandbox_core::{
    fence::{Fence, Fences},
    protocol::{
        Answer, Call, Ending, Exec, Failure, FailureKind, Family, Hello, ImageId, KillReason, Launch, Launched, NewLimits, Record, Reply,
        Request, Sample, SandboxId, UnpackLimits, Unpacked, VERSION, VolumeId, WindowSize,
    },
    transport::Socket,
};
pub use tree::{Content, GiveError, Noticed, Notices, Tree, TreeError};

use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{oneshot, watch},
    time::Instant,
};
use tracing::Instrument as _;

use crate::telemetry::TRACE;

/// How long a keeper has to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Between two attempts to reach a keeper that is away: first this, then doubled up to the other.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A keeper that was away for so long does not come back.
const GONE_AFTER: Duration = Duration::from_secs(5);

/// The connection to this node's keeper. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Keeper(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    required: Fences,
    next_tag: AtomicU64,
    /// How often the connection was made anew.
    reconnects: AtomicU64,
    link: watch::Sender<Link>,
}

/// The connection as it stands now.
#[derive(Debug, Clone)]
enum Link {
    Up(Arc<Connection>),
    /// Since this instant.
    Down(Instant),
}

/// The socket, and the same one in the form that the runtime can wait for: tokio has no seqpacket sockets, but readiness is the same thing for
/// every kind, and nothing is read or written through `readiness`.
#[derive(Debug)]
struct Polled {
    socket: Socket,
    readiness: UnixStream,
}

#[derive(Debug)]
struct Connection {
    socket: Polled,
    hello: Hello,
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    answers: HashMap<u64, oneshot::Sender<(Answer, Option<OwnedFd>)>>,
    /// Nobody reads answers any more.
    is_closed: bool,
}

/// Why a call brought no answer of the kind that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection broke. What was asked may have been done or not.
    #[error("the connection to the keeper broke")]
    Lost,
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// How a launch came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaunchAnswer {
    Launched(Launched),
    /// It never ran.
    Ended(Box<Ending>),
}

impl Keeper {
    /// Connects to the keeper that listens at `path`. Fails at once if none does, or if it speaks another version.
    /// A keeper whose sandboxes lack one of the fences in `required` is refused, also one that comes later.
    pub async fn connect(path: &Path, required: Fences) -> anyhow::Result<Self> {
        let connection =
            Connection::open(path, required).await.with_context(|| format!("no keeper for this service on {}", path.display()))?;
        let connection = Arc::new(connection);
        let (link, _) = watch::channel(Link::Up(Arc::clone(&connection)));
        let inner = Inner { path: path.to_owned(), required, next_tag: AtomicU64::new(1), reconnects: AtomicU64::new(0), link };
        let keeper = Self(Arc::new(inner));
        tokio::spawn(keeper.clone().stay_connected(connection));
        Ok(keeper)
    }

    /// What the connected keeper says of itself; `None` while there is no connection.
    pub fn hello(&self) -> Option<Hello> {
        match &*self.0.link.borrow() {
            Link::Up(connection) => Some(connection.hello.clone()),
            Link::Down(_) => None,
        }
    }

    /// What the keeper says of itself, as soon as there is a connection.
    pub async fn connected(&self) -> Hello {
        let mut link = self.0.link.subscribe();
        loop {
            if let Link::Up(connection) = &*link.borrow_and_update() {
                return connection.hello.clone();
            }
            if link.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns when the keeper was away for too long to come back.
    pub async fn gone(&self) {
        let mut link = self.0.link.subscribe();
        loop {
            let state = link.borrow_and_update().clone();
            match state {
                Link::Up(_) => drop(link.changed().await),
                Link::Down(since) => {
                    if tokio::time::timeout_at(since + GONE_AFTER, link.changed()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// How often the connection broke and was made again.
    pub fn reconnects(&self) -> u64 {
        self.0.reconnects.load(Ordering::Relaxed)
    }

    /// Starts a sandbox; `descriptors` are those that the launch speaks of. Returns when the order is sent: await the inner future for
    /// the answer, so that a [`Keeper::wait`] can follow at once.
    pub async fn launch(
        &self,
        launch: Launch,
        descriptors: &[OwnedFd],
    ) -> Result<impl Future<Output = Result<LaunchAnswer, CallError>> + use<>, CallError> {
        let answer = self.send(Request::Launch(Box::new(launch)), descriptors).await?;
        Ok(async move { launched(received(answer).await?) })
    }

    /// Starts a further process in a running sandbox, as [`Keeper::launch`] starts a payload. `stdin` goes with [`Stdin::Descriptor`](sandbox_core::protocol::Stdin::Descriptor).
    pub async fn exec(&self, exec: Exec, stdin: Option<OwnedFd>) -> Result<LaunchAnswer, CallError> {
        let descriptors: Vec<OwnedFd> = stdin.into_iter().collect();
        launched(self.call(Request::Exec(Box::new(exec)), &descriptors).await?)
    }

    /// Sends a signal to the first process of a payload or an exec.
    pub async fn signal(&self, id: SandboxId, signal: i32) -> Result<(), CallError> {
        self.done(Request::Signal { id, signal }).await
    }

    /// Asks for the end: with a signal, and after a while with a kill.
    pub async fn stop(&self, id: SandboxId, signal: i32, grace: Duration, reason: KillReason) -> Result<(), CallError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.done(Request::Stop { id, signal, grace_ms, reason }).await
    }

    /// Freezes a sandbox.
    pub async fn pause(&self, id: SandboxId) -> Result<(), CallError> {
        self.done(Request::Pause { id }).await
    }

    /// Lets it go on.
    pub async fn resume(&self, id: SandboxId) -> Result<(), CallError> {
        self.done(Request::Resume { id }).await
    }

    /// Holds a running sandbox to other limits: to all of them, or to none.
    pub async fn update(&self, id: SandboxId, limits: NewLimits) -> Result<(), CallError> {
        self.done(Request::Update { id, limits }).await
    }

    /// What a sandbox uses now.
    pub async fn sample(&self, id: SandboxId) -> Result<Sample, CallError> {
        let answer = self.call(Request::Sample { id }, &[]).await?;
        let Answer::Sample(sample) = answer else { return Err(unexpected(answer)) };
        Ok(*sample)
    }

    /// A TCP socket inside a sandbox's network namespace, not connected yet.
    pub async fn socket(&self, id: SandboxId, family: Family) -> Result<OwnedFd, CallError> {
        self.descriptor(Request::Connect { id, family }).await
    }

    /// The writing end of what a payload or an exec reads. It does not block.
    pub async fn input(&self, id: SandboxId) -> Result<OwnedFd, CallError> {
        self.descriptor(Request::Input { id }).await
    }

    /// Ends what a payload or an exec reads, once everybody who was given it lets go.
    pub async fn end_input(&self, id: SandboxId) -> Result<(), CallError> {
        self.done(Request::EndInput { id }).await
    }

    /// Tells a payload or an exec with a terminal how large that is.
    pub async fn resize(&self, id: SandboxId, size: WindowSize) -> Result<(), CallError> {
        self.done(Request::Resize { id, size }).await
    }

    /// Has somebody inside a sandbox's own tree listen on `socket` (`sandbox_core::tree`).
    pub async fn tree(&self, id: SandboxId, socket: OwnedFd) -> Result<(), CallError> {
        let answer = self.call(Request::Tree { id }, &[socket]).await?;
        if answer == Answer::Done { Ok(()) } else { Err(unexpected(answer)) }
    }

    /// Gives up the writable layer that an ended sandbox kept.
    pub async fn drop_layer(&self, id: SandboxId) -> Result<(), CallError> {
        self.done(Request::DropLayer { id }).await
    }

    /// Whose writable layers are kept, or will be.
    pub async fn layers(&self) -> Result<HashSet<SandboxId>, CallError> {
        let answer = self.call(Request::Layers, &[]).await?;
        let Answer::Layers(layers) = answer else { return Err(unexpected(answer)) };
        Ok(layers.into_iter().collect())
    }

    /// Makes a volume, if it is not there.
    pub async fn make_volume(&self, volume: VolumeId, bytes: u64, inodes: u64) -> Result<(), CallError> {
        self.done(Request::MakeVolume { volume, bytes, inodes }).await
    }

    /// Deletes a volume that no sandbox has.
    pub async fn remove_volume(&self, volume: VolumeId) -> Result<(), CallError> {
        self.done(Request::RemoveVolume { volume }).await
    }

    /// Which volumes there are.
    pub async fn volumes(&self) -> Result<Vec<VolumeId>, CallError> {
        let answer = self.call(Request::Volumes, &[]).await?;
        let Answer::Volumes(volumes) = answer else { return Err(unexpected(answer)) };
        Ok(volumes)
    }

    /// Asks for the end of a sandbox. Returns when the question is sent; the inner future ends with the sandbox.
    pub async fn wait(&self, id: SandboxId) -> Result<impl Future<Output = Result<Box<Ending>, CallError>> + use<>, CallError> {
        let answer = self.send(Request::Wait { id }, &[]).await?;
        Ok(async move {
            let answer = received(answer).await?;
            let Answer::Ended(ending) = answer else { return Err(unexpected(answer)) };
            Ok(ending)
        })
    }

    /// Ends a sandbox for this reason.
    pub async fn kill(&self, id: SandboxId, reason: KillReason) -> Result<(), CallError> {
        self.done(Request::Kill { id, reason }).await
    }

    /// Every record that was not forgotten, each once, in the order of their latest change.
    pub async fn list(&self) -> Result<Vec<Record>, CallError> {
        let mut all: Vec<Record> = Vec::new();
        // All pages from one keeper: each counts for itself.
        let connection = self.connection()?;
        loop {
            // One that changes meanwhile comes again, later, as it is then.
            let after = all.last().map_or(0, |record| record.seq);
            let answer = received(self.send_by(&connection, Request::List { after }, &[]).await?).await?;
            let Answer::Records { records, is_more } = answer else { return Err(unexpected(answer)) };
            let is_stuck = records.is_empty();
            all.extend(records);
            if !is_more || is_stuck {
                let latest: HashMap<SandboxId, Record> = all.into_iter().map(|record| (record.id, record)).collect();
                let mut records: Vec<Record> = latest.into_values().collect();
                records.sort_unstable_by_key(|record| record.seq);
                return Ok(records);
            }
        }
    }

    /// Drops the record and the log of a sandbox that ended.
    pub async fn forget(&self, id: SandboxId) -> Result<(), CallError> {
        self.done(Request::Forget { id }).await
    }

    /// Drops the record of a sandbox that ended, but not its log.
    pub async fn forget_record(&self, id: SandboxId) -> Result<(), CallError> {
        self.done(Request::ForgetRecord { id }).await
    }

    /// Unpacks layers, bottom first, into the root of this image.
    pub async fn unpack(&self, image: ImageId, layers: Vec<OwnedFd>, limits: UnpackLimits) -> Result<Unpacked, CallError> {
        let count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
        let answer = self.call(Request::Unpack { image, layers: count, limits }, &layers).await?;
        let Answer::Unpacked(unpacked) = answer else { return Err(unexpected(answer)) };
        Ok(unpacked)
    }

    /// Which unpacked roots there are.
    pub async fn images(&self) -> Result<Vec<ImageId>, CallError> {
        let answer = self.call(Request::Images, &[]).await?;
        let Answer::Images(images) = answer else { return Err(unexpected(answer)) };
        Ok(images)
    }

    /// Deletes an unpacked root.
    pub async fn remove_image(&self, image: ImageId) -> Result<(), CallError> {
        self.done(Request::RemoveImage { image }).await
    }

    /// Ends every sandbox and the keeper itself.
    pub async fn shutdown(&self) -> Result<(), CallError> {
        self.done(Request::Shutdown).await
    }

    async fn done(&self, request: Request) -> Result<(), CallError> {
        let answer = self.call(request, &[]).await?;
        if answer == Answer::Done { Ok(()) } else { Err(unexpected(answer)) }
    }

    async fn descriptor(&self, request: Request) -> Result<OwnedFd, CallError> {
        match self.send(request, &[]).await?.await {
            Ok((Answer::Descriptor, Some(descriptor))) => Ok(descriptor),
            Ok((answer, _)) => Err(unexpected(answer)),
            Err(_closed) => Err(CallError::Lost),
        }
    }

    async fn call(&self, request: Request, descriptors: &[OwnedFd]) -> Result<Answer, CallError> {
        let span = tracing::debug_span!(target: TRACE, "keeper", keeper.request = name_of(&request));
        async { received(self.send(request, descriptors).await?).await }.instrument(span).await
    }

    async fn send(&self, request: Request, descriptors: &[OwnedFd]) -> Result<oneshot::Receiver<(Answer, Option<OwnedFd>)>, CallError> {
        let connection = self.connection()?;
        self.send_by(&connection, request, descriptors).await
    }

    fn connection(&self) -> Result<Arc<Connection>, CallError> {
        match &*self.0.link.borrow() {
            Link::Up(connection) => Ok(Arc::clone(connection)),
            Link::Down(_) => Err(CallError::Lost),
        }
    }

    async fn send_by(
        &self,
        connection: &Connection,
        request: Request,
        descriptors: &[OwnedFd],
    ) -> Result<oneshot::Receiver<(Answer, Option<OwnedFd>)>, CallError> {
        let tag = self.0.next_tag.fetch_add(1, Ordering::Relaxed);
        connection.send(&Call { tag, request }, descriptors).await
    }

    /// Reads answers until the connection breaks, makes it anew, and so on for good.
    async fn stay_connected(self, mut connection: Arc<Connection>) {
        loop {
            let error = connection.read_answers().await;
            connection.close();
            tracing::warn!(%error, keeper.socket = %self.0.path.display(), "the connection to the keeper broke");
            self.0.link.send_replace(Link::Down(Instant::now()));
            drop(connection);
            let mut pause = RETRY_MIN;
            connection = loop {
                match Connection::open(&self.0.path, self.0.required).await {
                    Ok(connection) => break Arc::new(connection),
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => tracing::error!(%error, "the keeper is not to be used"),
                    Err(error) => tracing::debug!(%error, "the keeper does not answer"),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            };
            self.0.reconnects.fetch_add(1, Ordering::Relaxed);
            tracing::info!(keeper.pid = connection.hello.pid, "connected to the keeper again");
            self.0.link.send_replace(Link::Up(Arc::clone(&connection)));
        }
    }
}

impl Connection {
    async fn open(path: &Path, required: Fences) -> io::Result<Self> {
        let socket = Polled::connect(path)?;
        let hello = tokio::time::timeout(HELLO_DEADLINE, greet(&socket)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        let lacking: Vec<&str> = required.without(hello.fences).iter().map(Fence::name).collect();
        if !lacking.is_empty() {
            let why = format!("sandboxes of this keeper lack a fence that they must have: {}", lacking.join(", "));
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Ok(Self { socket, hello, pending: Mutex::default() })
    }

    /// Sends a call whose answer will come through the receiver. The order of sending is the order of this function's return.
    async fn send(&self, call: &Call, descriptors: &[OwnedFd]) -> Result<oneshot::Receiver<(Answer, Option<OwnedFd>)>, CallError> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.is_closed {
                return Err(CallError::Lost);
            }
            pending.answers.insert(call.tag, sender);
        }
        if let Err(error) = send(&self.socket, call, descriptors).await {
            self.pending.lock().unwrap_or_else(PoisonError::into_inner).answers.remove(&call.tag);
            if error.kind() == io::ErrorKind::InvalidInput {
                // It is the message that is wrong, not the connection.
                return Err(Failure { kind: FailureKind::Refused, message: error.to_string() }.into());
            }
            tracing::debug!(%error, "a message to the keeper could not be sent");
            // Who asks again at once would do so, as fast as a processor can, until the other end of this connection is read.
            tokio::time::sleep(RETRY_MIN).await;
            return Err(CallError::Lost);
        }
        Ok(receiver)
    }

    /// Hands answers to who waits for them, until the connection breaks.
    async fn read_answers(&self) -> io::Error {
        loop {
            let (reply, descriptors) = match recv::<Reply>(&self.socket).await {
                Ok(received) => received,
                Err(error) => return error,
            };
            let waiting = self.pending.lock().unwrap_or_else(PoisonError::into_inner).answers.remove(&reply.tag);
            // Who asked may have gone away; the answer is in the keeper's records.
            drop(waiting.map(|sender| sender.send((reply.answer, descriptors.into_iter().next()))));
        }
    }

    /// Lets every caller know that no answer comes.
    fn close(&self) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.is_closed = true;
        pending.answers.clear();
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "whatever else it is, it is no answer to a launch")]
fn launched(answer: Answer) -> Result<LaunchAnswer, CallError> {
    match answer {
        Answer::Launched(launched) => Ok(LaunchAnswer::Launched(launched)),
        Answer::Ended(ending) => Ok(LaunchAnswer::Ended(ending)),
        other => Err(unexpected(other)),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "whatever else it is, it is no hello")]
async fn greet(socket: &Polled) -> io::Result<Hello> {
    send(socket, &Call { tag: 0, request: Request::Hello { version: VERSION } }, &[]).await?;
    match recv::<Reply>(socket).await?.0.answer {
        Answer::Hello(hello) if hello.version == VERSION => Ok(hello),
        Answer::Hello(hello) => Err(io::Error::other(format!("the keeper speaks version {}, this service {VERSION}", hello.version))),
        Answer::Failed(failure) => Err(io::Error::other(failure)),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the keeper answered something else than hello: {other:?}"))),
    }
}

impl Polled {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::connect(path)?;
        let readiness = UnixStream::from_std(StdUnixStream::from(socket.as_fd().try_clone_to_owned()?))?;
        Ok(Self { socket, readiness })
    }
}

async fn send(polled: &Polled, call: &Call, descriptors: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    loop {
        match polled.readiness.try_io(Interest::WRITABLE, || polled.socket.send(call, &borrowed)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => polled.readiness.writable().await?,
            sent => return sent,
        }
    }
}

async fn recv<T: serde::de::DeserializeOwned>(polled: &Polled) -> io::Result<(T, Vec<OwnedFd>)> {
    loop {
        match polled.readiness.try_io(Interest::READABLE, || polled.socket.recv()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => polled.readiness.readable().await?,
            received => {
                let datagram = received?.ok_or(io::ErrorKind::UnexpectedEof)?;
                return Ok((datagram.message, datagram.descriptors));
            }
        }
    }
}

/// What is asked, for people.
const fn name_of(request: &Request) -> &'static str {
    match request {
        Request::Hello { .. } => "hello",
        Request::Launch(_) => "launch",
        Request::Wait { .. } => "wait",
        Request::Kill { .. } => "kill",
        Request::List { .. } => "list",
        Request::Forget { .. } => "forget",
        Request::Signal { .. } => "signal",
        Request::Stop { .. } => "stop",
        Request::Pause { .. } => "pause",
        Request::Resume { .. } => "resume",
        Request::Update { .. } => "update",
        Request::Sample { .. } => "sample",
        Request::Connect { .. } => "connect",
        Request::Input { .. } => "input",
        Request::EndInput { .. } => "end_input",
        Request::Resize { .. } => "resize",
        Request::Exec(_) => "exec",
        Request::Tree { .. } => "tree",
        Request::DropLayer { .. } => "drop_layer",
        Request::Layers => "layers",
        Request::MakeVolume { .. } => "make_volume",
        Request::RemoveVolume { .. } => "remove_volume",
        Request::Volumes => "volumes",
        Request::ForgetRecord { .. } => "forget_record",
        Request::Unpack { .. } => "unpack",
        Request::Images => "images",
        Request::RemoveImage { .. } => "remove_image",
        Request::Shutdown => "shutdown",
    }
}

async fn received(answer: oneshot::Receiver<(Answer, Option<OwnedFd>)>) -> Result<Answer, CallError> {
    answer.await.map(|(answer, _)| answer).map_err(|_closed| CallError::Lost)
}

fn unexpected(answer: Answer) -> CallError {
    let Answer::Failed(failure) = answer else {
        let message = format!("the keeper gave an answer that fits no question: {answer:?}");
        return CallError::Failed(Failure { kind: FailureKind::Host, message });
    };
    CallError::Failed(failure)
}

#[cfg(test)]
mod tests;
