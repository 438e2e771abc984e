//! `mayfly image pull`: a client of the API that has the service pull an image, and shows how far it has come.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::ProgressBar;
use reqwest::{Response, Url};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    super::{progress, remote::client_for},
    Imported, Key, Problem, operator,
};

/// The service says something at least every 20 seconds.
const SILENCE_MAX: Duration = Duration::from_secs(90);

#[derive(Debug, Args)]
pub(in crate::cli) struct Arguments {
    /// What to pull, as in `debian:12`, `registry.example/team/app:1` or `registry.example/team/app@sha256:…`
    reference: String,
    /// The name that the image is to have [default: what is pulled]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Who pulls, to the registry
    #[arg(long, value_name = "NAME", requires = "password_file")]
    username: Option<String>,
    /// File with the password for the registry; - is standard input
    #[arg(long, value_name = "PATH", requires = "username")]
    password_file: Option<PathBuf>,
    /// Where the API is
    #[arg(long, env = "MAYFLY_URL", default_value = "http://127.0.0.1:8080")]
    url: Url,
    /// Token for the API; with the scope `admin` the image is for all tenants [default: one signed with the data folder's secret]
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: Option<String>,
    #[command(flatten)]
    key: Key,
}

/// What of a line of the answer is of interest here: one of them.
#[derive(Debug, Deserialize)]
struct Line {
    progress: Option<Progress>,
    image: Option<Value>,
    problem: Option<Problem>,
}

#[derive(Debug, Deserialize)]
struct Progress {
    stage: String,
    bytes: u64,
    total_bytes: u64,
}

pub(in crate::cli) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { reference, name, username, password_file, url, token, key } = arguments;
    let mut request = json!({ "reference": reference });
    if let Some(name) = name {
        request["name"] = name.into();
    }
    ask_for(&url, "v1/images/pull", request, (username, password_file), (token, key))
}

/// Has the service pull or push, with these credentials, if any, and shows how far it has come.
pub(super) fn ask_for(
    url: &Url,
    path: &str,
    mut request: Value,
    (username, password_file): (Option<String>, Option<PathBuf>),
    (token, key): (Option<String>, Key),
) -> anyhow::Result<()> {
    if let (Some(username), Some(path)) = (username, password_file) {
        request["credentials"] = json!({ "username": username, "password": password(&path)? });
    }
    let token = match token {
        Some(given) => given,
        None => key.sign(&operator(), 3600).context("signing a token; give one with --token")?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let image = runtime.block_on(ask(url, path, &token, &request))?;
    crate::cli::print(format!("{} {}", image.reference, image.digest))
}

/// What is in this file, or for `-` in standard input, less the end of its line.
pub(in crate::cli) fn password(path: &Path) -> anyhow::Result<String> {
    let text = if path.as_os_str() == "-" { io::read_to_string(io::stdin()) } else { std::fs::read_to_string(path) };
    let text = text.with_context(|| path.display().to_string())?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

async fn ask(url: &Url, path: &str, token: &str, request: &Value) -> anyhow::Result<Imported> {
    let place = url.join(path).context("--url")?;
    let client = client_for(url).connect_timeout(Duration::from_secs(10)).read_timeout(SILENCE_MAX).build()?;
    let request = client.post(place).bearer_auth(token).header("accept", "application/x-ndjson").json(request);
    let response = request.send().await.with_context(|| format!("asking {url}"))?;
    let status = response.status();
    if status.is_success() {
        return follow(response, url).await;
    }
    let text = response.text().await.with_context(|| format!("hearing from {url}"))?;
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) => bail!("{url} answered {status}, {}: {}", problem.code, problem.detail),
        Err(_) => bail!("{url} answered {status}"),
    }
}

/// Reads line by line to the last, which has the image as the API shows it.
pub(in crate::cli) async fn follow<T: DeserializeOwned>(mut response: Response, url: &Url) -> anyhow::Result<T> {
    // There is none before it is known of how much.
    let mut bar = None;
    let mut held = Vec::new();
    loop {
        let chunk = tokio::time::timeout(SILENCE_MAX, response.chunk()).await.with_context(|| format!("{url} gives no sign of life"))?;
        let Some(chunk) = chunk.with_context(|| format!("hearing from {url}"))? else { break };
        held.extend_from_slice(&chunk);
        while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            // A sign of life.
            if line.trim_ascii().is_empty() {
                continue;
            }
            let line: Line = serde_json::from_slice(&line).with_context(|| format!("{url} answered something else than was asked for"))?;
            if let Some(progress) = line.progress {
                show(&mut bar, &progress);
            }
            if let Some(image) = line.image {
                return serde_json::from_value(image).with_context(|| format!("{url} answered something else than an image"));
            }
            if let Some(problem) = line.problem {
                bail!("{}: {}", problem.code, problem.detail);
            }
        }
    }
    bail!("{url} broke off; what was begun may go on all the same")
}

fn show(bar: &mut Option<ProgressBar>, Progress { stage, bytes, total_bytes }: &Progress) {
    let bar = bar.get_or_insert_with(|| progress::bytes(Some(*total_bytes), stage));
    bar.set_length(*total_bytes);
    bar.set_position(*bytes);
    bar.set_message(super::super::table::plain(stage));
}
