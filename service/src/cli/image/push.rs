//! `mayfly image push`: a client of the API that has the service push an image, and shows how far it has come.

use std::path::PathBuf;

use clap::Args;
use reqwest::Url;
use serde_json::json;

use super::{Key, pull};

#[derive(Debug, Args)]
pub(in crate::cli) struct Arguments {
    /// The image as it is called here
    reference: String,
    /// Where to, as in `registry.example/team/app:1` [default: where its name says]
    #[arg(long, value_name = "TARGET")]
    to: Option<String>,
    /// Who pushes, to the registry
    #[arg(long, value_name = "NAME", requires = "password_file")]
    username: Option<String>,
    /// File with the password for the registry; - is standard input
    #[arg(long, value_name = "PATH", requires = "username")]
    password_file: Option<PathBuf>,
    /// Where the API is
    #[arg(long, env = "MAYFLY_URL", default_value = "http://127.0.0.1:8080")]
    url: Url,
    /// Token for the API [default: one signed with the data folder's secret]
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: Option<String>,
    #[command(flatten)]
    key: Key,
}

pub(in crate::cli) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { reference, to, username, password_file, url, token, key } = arguments;
    let mut request = json!({ "reference": reference });
    if let Some(to) = to {
        request["to"] = to.into();
    }
    pull::ask_for(&url, "v1/images/push", request, (username, password_file), (token, key))
}
