//! `mayfly node`: the machines that run sandboxes, by way of the API.

use clap::Subcommand;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::api::Api;

/// Below which the API has nodes.
const PLACE: &str = "v1/admin/nodes";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List nodes
    List(Api),
    /// Show one node
    Get {
        node: String,
        #[command(flatten)]
        api: Api,
    },
    /// Have a node take no more work; what runs there goes on
    Drain {
        node: String,
        /// End what still runs there after so many seconds
        #[arg(long, value_name = "SECONDS")]
        evict_after_s: Option<u64>,
        #[command(flatten)]
        api: Api,
    },
    /// Have a node take work again
    Resume {
        node: String,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Deserialize)]
struct Nodes {
    items: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    id: String,
    name: String,
    state: String,
    live: u64,
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (api, method, path, body) = match command {
            Command::List(api) => return list(api).await,
            Command::Get { node, api } => (api, Method::GET, vec![node], None),
            Command::Drain { node, evict_after_s, api } => {
                let evict_after_ms = evict_after_s.map(|seconds| seconds.saturating_mul(1000));
                let body = Map::from_iter([("evict_after_ms".to_owned(), json!(evict_after_ms))]);
                (api, Method::POST, vec![node, "drain".to_owned()], Some(body))
            }
            Command::Resume { node, api } => (api, Method::POST, vec![node, "resume".to_owned()], None),
        };
        let answer: Value = api.ready()?.ask(method, PLACE, &path, &[], body).await?;
        super::print(serde_json::to_string_pretty(&answer)?)
    })
}

async fn list(api: Api) -> anyhow::Result<()> {
    let nodes: Nodes = api.ready()?.ask(Method::GET, PLACE, &[], &[], None).await?;
    let mut lines = vec![format!("{:<36} {:<8} {:>6}  NAME", "NODE", "STATE", "LIVE")];
    lines.extend(nodes.items.iter().map(|Listed { id, name, state, live }| format!("{id:<36} {state:<8} {live:>6}  {name}")));
    super::print(lines.join("\n"))
}
