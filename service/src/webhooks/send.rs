//! One attempt at a delivery.

use std::{error::Error as _, path::Path, time::Duration};

use anyhow::Context as _;
use reqwest::{Certificate, Client, ClientBuilder, Response, StatusCode, redirect};
use tokio::time::Instant;
use uuid::Uuid;

use super::secret::WebhookSecret;
use crate::outbound::{NotPublic, Targets};

/// From the name's lookup to the head of the answer.
pub(super) const DEADLINE: Duration = Duration::from_secs(15);
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// What is read of an answer's body, and for how long: it decides nothing.
const RESPONSE_BYTES_MAX: usize = 1024;
const RESPONSE_DEADLINE: Duration = Duration::from_secs(2);
const ERROR_BYTES_MAX: usize = 256;

/// Sends to targets that are permitted.
#[derive(Debug)]
pub(super) struct Sender {
    targets: Targets,
    client: Client,
}

/// What is sent.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) url: &'a str,
    pub(super) id: Uuid,
    pub(super) timestamp_s: i64,
    pub(super) body: String,
    /// Each signs it: the one that is good, and for a time the one before.
    pub(super) secrets: Vec<WebhookSecret>,
}

/// How an attempt went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) took: Duration,
    /// Of the answer, if there was one.
    pub(super) status: Option<u16>,
    /// Why it did not do; `None`: it was taken.
    pub(super) error: Option<String>,
    /// The beginning of the answer's body.
    pub(super) response: Option<String>,
}

impl Sender {
    pub(super) fn new(targets: Targets, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let mut authorities = Vec::new();
        if let Some(path) = ca_file {
            let shown = || format!("webhook-ca-file: the certificates in {}", path.display());
            let pem = std::fs::read(path).with_context(shown)?;
            authorities = Certificate::from_pem_bundle(&pem).with_context(shown)?;
        }
        let client = client(&targets).tls_certs_merge(authorities.clone()).build().or_else(|error| {
            // A machine without any is no reason not to serve.
            tracing::warn!(%error, "the system's authorities cannot be read: no webhook can be sent by https that they vouch for");
            client(&targets).tls_certs_only(authorities).build()
        });
        Ok(Self { client: client.context("a client for webhooks")?, targets })
    }

    pub(super) async fn send(&self, message: Message<'_>) -> Sent {
        let began_at = Instant::now();
        let answered = tokio::time::timeout(DEADLINE, self.ask(message)).await;
        let took = began_at.elapsed();
        match answered {
            Ok(Ok(response)) => {
                let status = response.status();
                Sent { took, status: Some(status.as_u16()), error: refusal(status), response: Some(beginning_of(response).await) }
            }
            Ok(Err(error)) => Sent { took, status: None, error: Some(storable(&error, ERROR_BYTES_MAX)), response: None },
            Err(_late) => Sent { took, status: None, error: Some(format!("no answer within {} s", DEADLINE.as_secs())), response: None },
        }
    }

    /// The head of the answer, or why there is none.
    async fn ask(&self, message: Message<'_>) -> Result<Response, String> {
        let Message { url, id, timestamp_s, body, secrets } = message;
        // What is permitted may have changed since the target was given.
        let url = self.targets.check(url)?;
        let signatures: Vec<_> = secrets.iter().map(|secret| secret.sign(id, timestamp_s, &body)).collect();
        let request = self
            .client
            .post(url)
            .header("content-type", "application/json")
            .header("webhook-id", id.hyphenated().to_string())
            .header("webhook-timestamp", timestamp_s)
            .header("webhook-signature", signatures.join(" "))
            .body(body);
        request.send().await.map_err(|error| reason(&error))
    }
}

fn client(targets: &Targets) -> ClientBuilder {
    Client::builder()
        .dns_resolver(targets.clone())
        // The environment's proxy would connect for us, to wherever it is told.
        .no_proxy()
        .redirect(redirect::Policy::none())
        .referer(false)
        .http1_only()
        .http1_max_headers(64)
        // Each attempt looks its target up anew.
        .pool_max_idle_per_host(0)
        .connect_timeout(CONNECT_DEADLINE)
        .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")))
}

/// Why an answer with this status does not do; `None`: it does.
fn refusal(status: StatusCode) -> Option<String> {
    if status.is_success() {
        return None;
    }
    let why = if status.is_redirection() { ": redirects are not followed" } else { "" };
    Some(format!("answered {}{why}", status.as_u16()))
}

/// The innermost cause, which names neither our resolver nor an address.
fn reason(error: &reqwest::Error) -> String {
    let mut cause = error.source();
    let mut innermost = None;
    while let Some(inner) = cause {
        if inner.is::<NotPublic>() {
            return NotPublic.to_string();
        }
        innermost = Some(inner.to_string());
        cause = inner.source();
    }
    if error.is_timeout() {
        return format!("no connection within {} s", CONNECT_DEADLINE.as_secs());
    }
    innermost.unwrap_or_else(|| "the request failed".to_owned())
}

async fn beginning_of(mut response: Response) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while bytes.len() < RESPONSE_BYTES_MAX
            && let Ok(Some(chunk)) = response.chunk().await
        {
            bytes.extend_from_slice(&chunk);
        }
    };
    // What came until then is what is kept.
    drop(tokio::time::timeout(RESPONSE_DEADLINE, read).await);
    storable(&String::from_utf8_lossy(&bytes), RESPONSE_BYTES_MAX)
}

/// So much of a stranger's text as Postgres takes: no NUL.
fn storable(text: &str, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_2xx_is_taken() {
        for (status, is_taken) in
            [(200, true), (204, true), (299, true), (301, false), (304, false), (404, false), (410, false), (500, false)]
        {
            assert_eq!(refusal(StatusCode::from_u16(status).unwrap()).is_none(), is_taken, "{status}");
        }
    }

    #[test]
    fn what_is_kept_of_strangers_text_is_short_and_without_nul() {
        assert_eq!(storable("a\0ü", 3), "a\u{fffd}");
        assert_eq!(storable("aüb", 9), "aüb");
    }
}
