//! One way of running a program, seen from outside: start it, wait for its end, know that it was well.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::peers::{Bundle, Peer};

/// Limits that every contender is given which can have limits: the service's own defaults.
pub(crate) const MEMORY_BYTES: u64 = 256 << 20;
pub(crate) const CPU_MILLIS: u64 = 1000;
pub(crate) const PIDS: u64 = 64;

/// Something that runs one program, over and over.
#[derive(Debug, Clone)]
pub(crate) enum Contender {
    Service { http: reqwest::Client, url: String, token: String, request: Arc<Value> },
    Peer(Arc<Bundle>),
}

impl Contender {
    /// The service under test, by its API.
    pub(crate) fn service(url: &str, token: &str, image: &str, command: &[&str]) -> Result<Self> {
        let limits = json!({ "memory_bytes": MEMORY_BYTES, "cpu_millis": CPU_MILLIS, "pids": PIDS });
        let request = json!({ "image": image, "command": command, "limits": limits });
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build()?;
        Ok(Self::Service { http, url: format!("{url}/v1/runs"), token: token.to_owned(), request: Arc::new(request) })
    }

    /// Another runtime on this machine.
    pub(crate) fn peer(peer: Peer, root: &Path, command: &[&str]) -> Result<Self> {
        Ok(Self::Peer(Arc::new(Bundle::new(peer, root, command)?)))
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Service { .. } => "mayfly (HTTP, durable)",
            Self::Peer(bundle) => bundle.peer.name(),
        }
    }

    /// Runs the program once, to its end; fails if it did not end well.
    pub(crate) async fn once(&self) -> Result<()> {
        match self {
            Self::Service { http, url, token, request } => {
                let response = http.post(url).bearer_auth(token).json(&**request).send().await?;
                let status = response.status();
                let body: Value = response.json().await.context("the answer is not JSON")?;
                ensure!(status.as_u16() == 200 && body["outcome"]["exit_code"] == 0, "a run went wrong: {status} {body}");
                Ok(())
            }
            Self::Peer(bundle) => {
                let bundle = bundle.clone();
                tokio::task::spawn_blocking(move || bundle.run()).await?
            }
        }
    }
}
