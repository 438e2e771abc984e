//! The API as commands for operators reach it.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use reqwest::{Method, Response, Url};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{remote::client_for, token::Key};
use crate::token::{Claims, Scope};

/// Where the API is, and who asks.
#[derive(Debug, Args)]
pub(super) struct Api {
    /// Where the API is
    #[arg(long, env = "MAYFLY_URL", default_value = "http://127.0.0.1:8080")]
    url: Url,
    /// Token for the API, with the scope `admin` [default: one signed with the data folder's secret]
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: Option<String>,
    #[command(flatten)]
    key: Key,
}

#[derive(Debug, Deserialize)]
struct Problem {
    code: String,
    detail: String,
}

/// A client and what it needs.
pub(super) struct Ready {
    client: reqwest::Client,
    url: Url,
    token: String,
}

impl Api {
    /// Ready to ask.
    pub(super) fn ready(self) -> anyhow::Result<Ready> {
        self.ready_within(Duration::from_secs(60))
    }

    /// Ready to ask what is answered, to its last byte, within this time.
    pub(super) fn ready_within(self, deadline: Duration) -> anyhow::Result<Ready> {
        let operator = Claims { tenant: "operator".into(), subject: "operator".into(), scopes: [Scope::Admin].into_iter().collect() };
        let token = match self.token {
            Some(given) => given,
            None => self.key.sign(&operator, 300).context("signing a token; give one with --token")?,
        };
        let client = client_for(&self.url).timeout(deadline).build()?;
        Ok(Ready { client, url: self.url, token })
    }
}

impl Ready {
    /// The answer to a request for what is at `path` below `place`, where there is none that of nothing; an error that says why it was refused.
    pub(super) async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        place: &str,
        path: &[String],
        query: &[(&str, &str)],
        body: Option<Map<String, Value>>,
    ) -> anyhow::Result<T> {
        let response = self.sent(method, place, path, query, body).await?;
        let url = &self.url;
        let text = response.text().await.with_context(|| format!("hearing from {url}"))?;
        let text = if text.is_empty() { "null" } else { &text };
        serde_json::from_str(text).with_context(|| format!("{url} answered something else than was asked for"))
    }

    /// The same, of which the content is yet to come.
    pub(super) async fn open(&self, method: Method, place: &str, path: &[String]) -> anyhow::Result<Response> {
        self.sent(method, place, path, &[], None).await
    }

    async fn sent(
        &self,
        method: Method,
        place: &str,
        path: &[String],
        query: &[(&str, &str)],
        body: Option<Map<String, Value>>,
    ) -> anyhow::Result<Response> {
        let mut place = self.url.join(place).context("--url")?;
        place.path_segments_mut().map_err(|()| anyhow::anyhow!("--url: {} has no path", self.url))?.extend(path);
        if !query.is_empty() {
            place.query_pairs_mut().extend_pairs(query);
        }
        let request = self.client.request(method, place).bearer_auth(&self.token);
        let request = if let Some(body) = body { request.json(&body) } else { request };
        let url = &self.url;
        let response = request.send().await.with_context(|| format!("asking {url}"))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.with_context(|| format!("hearing from {url}"))?;
        match serde_json::from_str::<Problem>(&text) {
            Ok(problem) => bail!("{url} answered {status}, {}: {}", problem.code, problem.detail),
            Err(_) => bail!("{url} answered {status}"),
        }
    }
}
