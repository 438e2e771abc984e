//! The input of a payload or an exec that stays open, shared by all who write to it.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sandbox_core::protocol::FailureKind;
use tokio::{
    net::unix::pipe,
    sync::{Mutex as AsyncMutex, watch},
    time::Instant,
};

use super::Engine;
use crate::{
    runtime::{CallError, Keeper},
    sandbox::SandboxId,
};

/// How long the start of a program is waited for that is to be given input.
const START_PATIENCE: Duration = Duration::from_secs(10);
const START_PAUSE: Duration = Duration::from_millis(20);

/// The inputs that somebody has written to, of whatever lives.
#[derive(Debug, Default)]
pub(super) struct Inputs(Mutex<HashMap<SandboxId, Arc<OpenInput>>>);

/// One input. Writers take turns: what one gives at once is not mixed with another's.
#[derive(Debug)]
pub struct OpenInput {
    keeper: Keeper,
    id: SandboxId,
    way: AsyncMutex<Way>,
    /// Bytes that the kernel has taken, of all writers together.
    written: watch::Sender<u64>,
}

#[derive(Debug)]
enum Way {
    /// Nobody has written yet.
    Unknown,
    /// A pipe, behind which the keeper may have a terminal.
    Open(pipe::Sender),
    /// Ended by us, or nobody reads any more.
    Closed,
}

/// Why input was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InputFault {
    #[error("there is no input, it has ended, or nobody reads it any more")]
    Closed,
    #[error("the keeper of this node is not available")]
    KeeperUnavailable,
    #[error("what stands before it in the input has not arrived")]
    Gap,
}

impl Engine {
    /// The input of a payload or an exec.
    pub fn input_of(&self, id: SandboxId) -> Arc<OpenInput> {
        let mut all = self.inputs.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get(&id) {
            return Arc::clone(known);
        }
        // Those of what has ended are of no use any more.
        all.retain(|id, input| Arc::strong_count(input) > 1 || self.live.get(*id).is_some() || self.execs.get(*id).is_some());
        let input = Arc::new(OpenInput::new(self.keeper.clone(), id));
        all.insert(id, Arc::clone(&input));
        input
    }
}

impl OpenInput {
    fn new(keeper: Keeper, id: SandboxId) -> Self {
        Self { keeper, id, way: AsyncMutex::new(Way::Unknown), written: watch::channel(0).0 }
    }

    /// How many bytes have been taken, by the kernel if not by the program, from all writers since this service follows it.
    pub fn written(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    /// Returns when all of it is taken, which lasts until the program reads. Given up in between, [`OpenInput::written`] says how far it came.
    ///
    /// `at` is where it stands in all of the input; of what has that place already nothing is taken again.
    pub async fn write(&self, at: Option<u64>, mut bytes: &[u8]) -> Result<(), InputFault> {
        let mut way = self.way.lock().await;
        if matches!(*way, Way::Unknown) {
            *way = self.open().await?;
        }
        // By whom is all the same: over a connection that broke it may have come only now.
        if let Some(at) = at {
            let known = self.written.borrow().checked_sub(at).ok_or(InputFault::Gap)?;
            bytes = bytes.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default();
        }
        while !bytes.is_empty() {
            let Way::Open(sender) = &*way else { return Err(InputFault::Closed) };
            let taken = match sender.writable().await {
                Ok(()) => sender.try_write(bytes),
                Err(error) => Err(error),
            };
            match taken {
                Ok(taken) => {
                    self.written.send_modify(|written| *written += taken as u64);
                    bytes = &bytes[taken..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!(sandbox.id = %self.id, %error, "an input is closed");
                    *way = Way::Closed;
                }
            }
        }
        Ok(())
    }

    /// End of file, once what was written is read. At a terminal it is what its user types, and more may follow.
    ///
    /// `at` is where the input ends: before all of that was taken it has no end, and goes on.
    pub async fn end(&self, at: Option<u64>, is_terminal: bool) -> Result<(), InputFault> {
        let mut way = self.way.lock().await;
        if at.is_some_and(|at| at > *self.written.borrow()) {
            return Err(InputFault::Gap);
        }
        let ended = self.keeper.end_input(self.id).await.map_err(|error| fault(&error));
        // It is read only when everybody has let go. While the keeper is away nothing has ended.
        if !is_terminal && ended != Err(InputFault::KeeperUnavailable) {
            *way = Way::Closed;
        }
        ended
    }

    async fn open(&self) -> Result<Way, InputFault> {
        let deadline = Instant::now() + START_PATIENCE;
        let descriptor = loop {
            match self.keeper.input(self.id).await {
                Ok(descriptor) => break descriptor,
                // It is being started.
                Err(CallError::Failed(failure)) if failure.kind == FailureKind::Busy && Instant::now() < deadline => {
                    tokio::time::sleep(START_PAUSE).await;
                }
                Err(error) => return Err(fault(&error)),
            }
        };
        pipe::Sender::from_owned_fd_unchecked(descriptor).map(Way::Open).map_err(|error| {
            tracing::warn!(sandbox.id = %self.id, %error, "an input cannot be waited for");
            InputFault::Closed
        })
    }
}

fn fault(error: &CallError) -> InputFault {
    match error {
        CallError::Failed(failure) if failure.kind != FailureKind::Host => InputFault::Closed,
        CallError::Failed(_) | CallError::Lost => InputFault::KeeperUnavailable,
    }
}
