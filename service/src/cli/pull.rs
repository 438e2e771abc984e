//! `mayfly pull`: an image from a registry, for whoever asks. `mayfly image pull` is the operator's, who has the service's own secret.

use std::path::PathBuf;

use clap::Args;
use reqwest::{Method, header};
use serde_json::{Value, json};

use super::{image::pull, remote::Remote};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// What to pull, as in `debian:12`, `registry.example/team/app:1` or `registry.example/team/app@sha256:…`
    reference: String,
    /// The name that the image is to have [default: what is pulled]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Who pulls, to the registry; `mayfly image login` keeps it
    #[arg(long, value_name = "NAME", requires = "password_file")]
    username: Option<String>,
    /// File with the password for the registry; - is standard input
    #[arg(long, value_name = "PATH", requires = "username")]
    password_file: Option<PathBuf>,
    /// Print the image as the API has it, one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { reference, name, username, password_file, json: is_json, remote } = arguments;
    let connection = remote.connect()?;
    let mut request = json!({ "reference": reference });
    if let Some(name) = name {
        request["name"] = name.into();
    }
    if let (Some(username), Some(path)) = (username, password_file) {
        request["credentials"] = json!({ "username": username, "password": pull::password(&path)? });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let image: Value = runtime.block_on(async {
        let asked = connection.request(Method::POST, &["v1", "images", "pull"], &[]).header(header::ACCEPT, "application/x-ndjson");
        let response = connection.send(asked.json(&request)).await?;
        pull::follow(response, connection.url()).await
    })?;
    if is_json {
        return super::print(image.to_string());
    }
    let word = |name: &str| image[name].as_str().unwrap_or_default().to_owned();
    super::print(format!("{} {}", word("reference"), word("digest")))
}
