//! `mayfly tenant`: tenants, principals and their quotas, by way of the API.

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::api::{Api, Ready};

/// Below which the API has tenants.
const PLACE: &str = "v1/admin/tenants";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List tenants
    List(Api),
    /// Show one tenant, or one of its principals
    Get {
        #[command(flatten)]
        who: Who,
        #[command(flatten)]
        api: Api,
    },
    /// Register a tenant
    Create {
        tenant: String,
        #[command(flatten)]
        change: Change,
        #[command(flatten)]
        api: Api,
    },
    /// Change weight and quotas
    Set {
        #[command(flatten)]
        who: Who,
        #[command(flatten)]
        change: Change,
        #[command(flatten)]
        api: Api,
    },
    /// Let a tenant, or one of its principals, do nothing from now on
    Suspend {
        #[command(flatten)]
        who: Who,
        /// End what runs and what waits, too
        #[arg(long)]
        stop_sandboxes: bool,
        #[command(flatten)]
        api: Api,
    },
    /// Lift a suspension
    Resume {
        #[command(flatten)]
        who: Who,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Args)]
pub(super) struct Who {
    tenant: String,
    /// One of the tenant's principals, in place of the tenant itself
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Change {
    /// Share of a full node beside other tenants, 1 to 10000; a new tenant has 100
    #[arg(long)]
    weight: Option<u32>,
    /// A quota as NAME=VALUE, where VALUE is a number, a list with commas, `unlimited` or `default`; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_quota)]
    quota: Vec<(String, Value)>,
    /// The same for each of the tenant's principals
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_quota)]
    principal_quota: Vec<(String, Value)>,
}

#[derive(Debug, Deserialize)]
struct Page {
    items: Vec<Listed>,
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    id: String,
    weight: u32,
    suspended: bool,
    used: Map<String, Value>,
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (api, method, path, body) = match command {
            Command::List(api) => return list(api.ready()?).await,
            Command::Get { who, api } => (api, Method::GET, who.path(), None),
            Command::Create { tenant, change, api } => {
                let mut body = change.body();
                body.insert("id".to_owned(), tenant.into());
                (api, Method::POST, vec![], Some(body))
            }
            Command::Set { who, change, api } => {
                ensure!(!change.body().is_empty(), "nothing to change: give --weight, --quota or --principal-quota");
                (api, Method::PATCH, who.path(), Some(change.body()))
            }
            Command::Suspend { who, stop_sandboxes, api } => {
                let body = Map::from_iter([("stop_sandboxes".to_owned(), json!(stop_sandboxes))]);
                (api, Method::POST, [who.path(), vec!["suspend".to_owned()]].concat(), Some(body))
            }
            Command::Resume { who, api } => (api, Method::POST, [who.path(), vec!["resume".to_owned()]].concat(), None),
        };
        let answer: Value = api.ready()?.ask(method, PLACE, &path, &[], body).await?;
        super::print(serde_json::to_string_pretty(&answer)?)
    })
}

async fn list(api: Ready) -> anyhow::Result<()> {
    let mut lines = vec![format!("{:<40} {:>6} {:>9} {:>9}  ", "TENANT", "WEIGHT", "SANDBOXES", "QUEUED")];
    let mut cursor = None;
    loop {
        let query: Vec<_> = cursor.iter().map(|cursor: &String| ("cursor", cursor.as_str())).collect();
        let page: Page = api.ask(Method::GET, PLACE, &[], &query, None).await?;
        for Listed { id, weight, suspended, used } in page.items {
            let use_of = |name: &str| used.get(name).cloned().unwrap_or_default();
            let note = if suspended { "suspended" } else { "" };
            lines.push(format!("{id:<40} {weight:>6} {:>9} {:>9}  {note}", use_of("sandboxes").to_string(), use_of("queued").to_string()));
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    super::print(lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n"))
}

impl Who {
    fn path(&self) -> Vec<String> {
        let principal = self.principal.iter().flat_map(|principal| ["principals".to_owned(), principal.clone()]);
        std::iter::once(self.tenant.clone()).chain(principal).collect()
    }
}

impl Change {
    fn body(&self) -> Map<String, Value> {
        let quotas = |quotas: &[(String, Value)]| Value::Object(quotas.iter().cloned().collect());
        let parts = [
            ("weight", self.weight.map(Value::from)),
            ("quotas", (!self.quota.is_empty()).then(|| quotas(&self.quota))),
            ("principal_quotas", (!self.principal_quota.is_empty()).then(|| quotas(&self.principal_quota))),
        ];
        parts.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

fn parse_quota(text: &str) -> anyhow::Result<(String, Value)> {
    let (name, value) = text.split_once('=').context("NAME=VALUE is needed")?;
    let is_list = matches!(name, "networks" | "isolations");
    let value = match value {
        "unlimited" => Value::Null,
        "default" => "default".into(),
        list if is_list => list.split(',').filter(|word| !word.is_empty()).collect(),
        number => number.parse::<u64>().context("a whole number, `unlimited` or `default`")?.into(),
    };
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_a_number_a_list_or_a_word() {
        assert_eq!(parse_quota("sandboxes=5").unwrap(), ("sandboxes".to_owned(), json!(5)));
        assert_eq!(parse_quota("sandboxes=unlimited").unwrap().1, Value::Null);
        assert_eq!(parse_quota("sandboxes=default").unwrap().1, json!("default"));
        assert_eq!(parse_quota("networks=none,proxy").unwrap().1, json!(["none", "proxy"]));
        assert!(parse_quota("sandboxes").is_err() && parse_quota("sandboxes=many").is_err());
    }

    #[test]
    fn only_what_is_given_is_changed() {
        let change = Change { weight: None, quota: vec![("queued".into(), json!(1))], principal_quota: vec![] };
        assert_eq!(Value::Object(change.body()), json!({"quotas": {"queued": 1}}));
    }
}
