//! One way of running a program to its end, seen from outside.

use std::{path::Path, sync::Arc};

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    docker::{self, Docker},
    peer::{Bundle, Peer},
};
use crate::{
    service::{Failure, Service},
    work::{Done, Runs, Work},
};

/// Limits that every contender is given which can have limits: the service's own defaults.
pub(super) const MEMORY_BYTES: u64 = 256 << 20;
pub(super) const CPU_MILLIS: u64 = 1000;
pub(super) const PIDS: u64 = 64;

pub(super) const OURS: &str = "mayfly (HTTP, durable)";

/// What is run.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) image: &'static str,
    pub(super) command: &'static [&'static str],
    pub(super) one_in: u32,
}

/// Something that runs one program, over and over.
#[derive(Debug)]
pub(super) enum Contender {
    Ours(Runs),
    Peer(Arc<Bundle>),
    Docker(Docker),
}

pub(super) fn request(program: &Program) -> Value {
    let limits = json!({ "memory_bytes": MEMORY_BYTES, "cpu_millis": CPU_MILLIS, "pids": PIDS });
    json!({ "image": program.image, "command": program.command, "limits": limits })
}

impl Contender {
    /// Everybody, ready to run this program from this root.
    pub(super) async fn all(service: &Service, program: &Program, root: &Path, docker: &Path) -> Result<Vec<Arc<Self>>> {
        let mut all = vec![Arc::new(Self::Ours(Runs::of(service, request(program))))];
        for peer in [Peer::Bubblewrap, Peer::Crun, Peer::Runc, Peer::Runsc] {
            all.push(Arc::new(Self::Peer(Arc::new(Bundle::new(peer, root, program.command)?))));
        }
        all.push(Arc::new(Self::Docker(Docker::new(docker, program, root).await?)));
        Ok(all)
    }

    /// The one with the least to do, as a measure of how fast the machine is at the moment.
    pub(super) fn bubblewrap(program: &Program, root: &Path) -> Result<Arc<Self>> {
        Ok(Arc::new(Self::Peer(Arc::new(Bundle::new(Peer::Bubblewrap, root, program.command)?))))
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Ours(_) => OURS,
            Self::Peer(bundle) => bundle.peer.name(),
            Self::Docker(_) => docker::NAME,
        }
    }

    /// As it tells of itself.
    pub(super) fn version(&self) -> String {
        match self {
            Self::Ours(_) => env!("CARGO_PKG_VERSION").to_owned(),
            Self::Peer(bundle) => bundle.peer.version(),
            Self::Docker(docker) => docker.version.clone(),
        }
    }

    /// A slower one is run less often: one run in so many.
    pub(super) fn one_in(&self) -> u32 {
        match self {
            Self::Ours(_) => 1,
            Self::Peer(bundle) => bundle.peer.one_in(),
            Self::Docker(_) => 10,
        }
    }
}

impl Work for Contender {
    async fn once(&self, number: u64) -> Result<Done, Failure> {
        match self {
            Self::Ours(runs) => runs.once(number).await,
            Self::Docker(docker) => docker.once().await,
            Self::Peer(bundle) => {
                let bundle = bundle.clone();
                let ran = tokio::task::spawn_blocking(move || bundle.run()).await;
                let ran = ran.map_err(|error| Failure::new("panic", error.to_string()))?;
                ran.map(|()| Done::default()).map_err(|error| Failure::new("peer", format!("{error:#}")))
            }
        }
    }
}
