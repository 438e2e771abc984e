//! Docker Engine through its HTTP API, as a backend would use it for one run: create, start, wait, output; then remove.

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use reqwest::{Client, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::contender::{CPU_MILLIS, MEMORY_BYTES, PIDS, Program};
use crate::{service::Failure, work::Done};

pub(super) const NAME: &str = "Docker Engine (API)";
/// The host's name is not looked up: the socket decides. The version of the API is that of Debian's package.
const URL: &str = "http://docker/v1.41";
const TIMEOUT: Duration = Duration::from_secs(120);

/// An engine with the program's image.
#[derive(Debug)]
pub(super) struct Docker {
    http: Client,
    container: Value,
    pub(super) version: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Created {
    id: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Waited {
    status_code: i64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    version: String,
}

impl Docker {
    /// Gives the engine the same root folder as an image.
    pub(super) async fn new(socket: &Path, program: &Program, root: &Path) -> Result<Self> {
        let http = Client::builder().unix_socket(socket).timeout(TIMEOUT).build()?;
        let version: Version = http.get(format!("{URL}/version")).send().await.context("Docker Engine does not answer")?.json().await?;
        let tar = tokio::process::Command::new("tar").arg("-C").arg(root).args(["-c", "."]).stderr(Stdio::inherit()).output().await?;
        ensure!(tar.status.success(), "tar of {} failed", root.display());
        let import = http.post(format!("{URL}/images/create?fromSrc=-&repo=mayfly-bench&tag={}", program.image));
        let answer = import.header("content-type", "application/x-tar").body(tar.stdout).send().await?;
        ensure!(answer.status().is_success(), "Docker Engine does not import {}: {}", program.image, answer.text().await?);
        Ok(Self { http, container: container(program), version: version.version })
    }

    /// What a caller waits for is measured; the removal, which ours does after its answer, too, is not.
    pub(super) async fn once(&self) -> Result<Done, Failure> {
        let begun = Instant::now();
        let created: Created = json(self.http.post(format!("{URL}/containers/create")).json(&self.container)).await?;
        let of = format!("{URL}/containers/{}", created.id);
        send(self.http.post(format!("{of}/start"))).await?;
        let waited: Waited = json(self.http.post(format!("{of}/wait"))).await?;
        let output = send(self.http.get(format!("{of}/logs?stdout=1&stderr=1"))).await?;
        output.bytes().await.map_err(|error| failure(&error))?;
        let took = begun.elapsed();
        send(self.http.delete(of)).await?;
        if waited.status_code != 0 {
            return Err(Failure::new("exit_code", format!("the program ended with {}", waited.status_code)));
        }
        Ok(Done { took: Some(took), ..Done::default() })
    }
}

/// The limits and fences that ours has, as far as it knows them.
fn container(program: &Program) -> Value {
    json!({
        "Image": format!("mayfly-bench:{}", program.image),
        "Cmd": program.command,
        "HostConfig": {
            "NetworkMode": "none", "ReadonlyRootfs": true, "Tmpfs": { "/tmp": "size=65536k" },
            "Memory": MEMORY_BYTES, "MemorySwap": MEMORY_BYTES, "CpuPeriod": 100_000, "CpuQuota": CPU_MILLIS * 100, "PidsLimit": PIDS,
            "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"],
            "Ulimits": [{ "Name": "nofile", "Soft": 256, "Hard": 256 }],
        },
    })
}

async fn json<T: for<'a> Deserialize<'a>>(request: RequestBuilder) -> Result<T, Failure> {
    send(request).await?.json().await.map_err(|error| failure(&error))
}

async fn send(request: RequestBuilder) -> Result<Response, Failure> {
    let answer = request.send().await.map_err(|error| failure(&error))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let words = answer.text().await.map_err(|error| failure(&error))?;
    Err(Failure::new(format!("docker_{}", status.as_u16()), words))
}

fn failure(error: &reqwest::Error) -> Failure {
    Failure::new("docker", format!("{error:?}"))
}
