//! The service as its callers have it: requests, and of each what came of it, in one word if it went wrong.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reqwest::{Method, StatusCode};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{client::IntoClientRequest as _, http::HeaderValue},
};

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// A service and who we are to it.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    http: reqwest::Client,
    url: String,
    token: String,
}

/// Why a request counts as failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// A problem's `code`, how a run ended, or what broke on the way: one of few.
    pub(crate) code: String,
    /// For people.
    pub(crate) detail: String,
}

impl Failure {
    pub(crate) fn new(code: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { code: code.into(), detail: detail.into() }
    }

    fn of(error: &reqwest::Error) -> Self {
        let code = if error.is_timeout() {
            "timeout"
        } else if error.is_connect() {
            "no_connection"
        } else if error.is_decode() {
            "no_json"
        } else {
            "connection_broke"
        };
        Self::new(code, chain(error))
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for Failure {}

/// An error with what it came of: by itself it often says no more than that a request failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

#[derive(Debug, Deserialize)]
struct Problem {
    code: String,
    #[serde(default)]
    detail: String,
}

/// What is read of a run or a sandbox.
#[derive(Debug, Deserialize)]
pub(crate) struct Told {
    pub(crate) id: String,
    pub(crate) state: String,
    pub(crate) outcome: Option<Outcome>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub(crate) started_at: Option<OffsetDateTime>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Outcome {
    reason: String,
    exit_code: Option<i64>,
    message: String,
    pub(crate) phases_ms: Phases,
    /// `warm` or `cold`; nothing where it never started.
    pub(crate) launch: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Phases {
    pub(crate) launch: f64,
}

impl Service {
    pub(crate) fn new(url: &str, token: &str, timeout: Duration) -> Result<Self> {
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).timeout(timeout).build()?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned(), token: token.to_owned() })
    }

    /// Runs something to its end, which must be a good one.
    pub(crate) async fn run(&self, request: &Value) -> Result<Told, Failure> {
        let told: Told = self.ask(Method::POST, "/v1/runs", Some(request)).await?;
        let Some(outcome) = &told.outcome else {
            return Err(Failure::new("not_ended", format!("the run {} was {} when the wait for it was over", told.id, told.state)));
        };
        // A program with no exit code was killed; the reason says by what.
        match outcome.exit_code {
            Some(0) => Ok(told),
            Some(code) => Err(Failure::new("exit_code", format!("the program ended with {code}: {}", outcome.message))),
            None => Err(Failure::new(outcome.reason.clone(), outcome.message.clone())),
        }
    }

    /// Makes a sandbox and returns when it runs.
    pub(crate) async fn create(&self, request: &Value) -> Result<Told, Failure> {
        let told: Told = self.ask(Method::POST, "/v1/sandboxes", Some(request)).await?;
        if told.state == "running" {
            return Ok(told);
        }
        let why = told.outcome.as_ref().map_or_else(String::new, |outcome| format!(": {}", outcome.message));
        let failure = Failure::new(format!("sandbox_{}", told.state), format!("the sandbox {} is {}{why}", told.id, told.state));
        // What waits for room would take it later on.
        self.delete(&told.id).await?;
        Err(failure)
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<(), Failure> {
        self.send(self.request(Method::DELETE, &format!("/v1/sandboxes/{id}"))).await.map(drop)
    }

    /// Writes a file into a sandbox.
    pub(crate) async fn put(&self, id: &str, path: &str, content: &'static str) -> Result<(), Failure> {
        self.send(self.request(Method::PUT, &format!("/v1/sandboxes/{id}/files{path}")).body(content)).await.map(drop)
    }

    /// Follows a log from its beginning.
    pub(crate) async fn follow(&self, id: &str) -> Result<Socket> {
        let url = format!("{}/v1/sandboxes/{id}/logs?from=0", self.url.replacen("http", "ws", 1));
        let mut request = url.into_client_request()?;
        request.headers_mut().insert("authorization", HeaderValue::from_str(&format!("Bearer {}", self.token))?);
        let (socket, _) = tokio_tungstenite::connect_async(request).await.context("following a log")?;
        Ok(socket)
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&Value>) -> Result<T, Failure> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        self.send(request).await?.json().await.map_err(|error| Failure::of(&error))
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token)
    }

    /// Sends it; a refusal is a failure by the name that it gives itself.
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, Failure> {
        let response = request.send().await.map_err(|error| Failure::of(&error))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        match response.json::<Problem>().await {
            Ok(problem) => Err(Failure::new(problem.code, problem.detail)),
            Err(_) => Err(Failure::new(format!("http_{}", status.as_u16()), "an answer that is no problem of ours")),
        }
    }
}
