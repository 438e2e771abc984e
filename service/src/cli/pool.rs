//! `mayfly pool`: sandboxes that are ready before they are asked for, by way of the API.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::api::{Api, Ready};

/// Below which the API has pools.
const PLACE: &str = "v1/pools";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List pools
    List(Api),
    /// Show one pool
    Get {
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// Make a pool
    Create {
        name: String,
        /// How many sandboxes it keeps ready
        #[arg(long)]
        size: u64,
        /// What each of them is: a file of JSON, as the `template` of POST /v1/pools
        #[arg(long, value_name = "PATH")]
        template: PathBuf,
        /// What its program writes when it is ready [default: it is as soon as it runs]
        #[arg(long, value_name = "TEXT")]
        ready_output: Option<String>,
        #[command(flatten)]
        api: Api,
    },
    /// Give a pool another size
    Resize {
        name: String,
        size: u64,
        #[command(flatten)]
        api: Api,
    },
    /// Remove a pool, with what waits in it
    Remove {
        name: String,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Deserialize)]
struct Page {
    items: Vec<Listed>,
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    size: u64,
    ready: u64,
    taken: u64,
    missed: u64,
    last_failure: Option<Failure>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    message: String,
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (api, method, path, body) = match command {
            Command::List(api) => return list(&api.ready()?).await,
            Command::Get { name, api } => (api, Method::GET, vec![name], None),
            Command::Create { name, size, template, ready_output, api } => {
                let text = fs::read(&template).with_context(|| format!("reading {}", template.display()))?;
                let template: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", template.display()))?;
                let parts = [("name", json!(name)), ("size", json!(size)), ("template", template), ("ready_output", json!(ready_output))];
                let body: Map<String, Value> = parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
                (api, Method::POST, vec![], Some(body))
            }
            Command::Resize { name, size, api } => {
                (api, Method::PATCH, vec![name], Some(Map::from_iter([("size".to_owned(), json!(size))])))
            }
            Command::Remove { name, api } => {
                let _nothing: Value = api.ready()?.ask(Method::DELETE, PLACE, &[name], &[], None).await?;
                return Ok(());
            }
        };
        let answer: Value = api.ready()?.ask(method, PLACE, &path, &[], body).await?;
        super::print(serde_json::to_string_pretty(&answer)?)
    })
}

async fn list(api: &Ready) -> anyhow::Result<()> {
    let mut lines = vec![format!("{:<40} {:>5} {:>5} {:>7} {:>7}  WHY IT DOES NOT FILL", "POOL", "SIZE", "READY", "TAKEN", "MISSED")];
    let mut cursor = None;
    loop {
        let query: Vec<_> = cursor.iter().map(|cursor: &String| ("cursor", cursor.as_str())).collect();
        let page: Page = api.ask(Method::GET, PLACE, &[], &query, None).await?;
        for Listed { name, size, ready, taken, missed, last_failure } in page.items {
            let why = last_failure.filter(|_| ready < size).map(|failure| failure.message).unwrap_or_default();
            lines.push(format!("{name:<40} {size:>5} {ready:>5} {taken:>7} {missed:>7}  {why}"));
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    super::print(lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n"))
}
