//! The API as people at a terminal reach it.

use std::{os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use clap::Args;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

use super::table::plain;

/// How long an answer may take that is not waited for on purpose.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long something is asked for again of which nobody heard whether it was made, and how often.
const MAKING_PATIENCE: Duration = Duration::from_secs(60);
const MAKING_PAUSE: Duration = Duration::from_millis(300);

const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// Where the API is, and who asks.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct Remote {
    /// Where the API is [default: what the file says, or http://127.0.0.1:8080]
    #[arg(long, env = "MAYFLY_URL")]
    url: Option<Url>,
    /// Token for the API; `ps` shows it to all who are on this machine, where environment and file are nobody else's [default: what the file says]
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// TOML file with `url` and `token`, readable by its owner alone [default: ~/.config/mayfly/client.toml]
    #[arg(long, env = "MAYFLY_CLIENT_CONFIG", value_name = "PATH")]
    client_config: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    url: Option<String>,
    token: Option<String>,
}

/// A client that knows where to ask, and as whom.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    client: reqwest::Client,
    url: Url,
    token: String,
}

/// What the API refused, in its own words, and what can be done about it.
#[derive(Debug, thiserror::Error)]
#[error("{detail} ({code}){}", hint(code))]
pub(super) struct Refused {
    pub(super) status: StatusCode,
    pub(super) code: String,
    pub(super) detail: String,
}

#[derive(Debug, Deserialize)]
struct Problem {
    code: String,
    detail: String,
    /// What of the request it is about.
    field: Option<String>,
}

impl Refused {
    /// Whether it makes no sense to come again: all that is the client's to mend, but for coming too often (RFC 9110, 15.5; RFC 6585, 4).
    pub(super) fn is_final(&self) -> bool {
        self.status.is_client_error() && !matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
    }
}

impl Remote {
    /// Ready to ask; flags and environment go over the file.
    pub(super) fn connect(self) -> anyhow::Result<Connection> {
        let config = self.config()?;
        let url = match self.url {
            Some(url) => url,
            None => config.url.as_deref().unwrap_or(DEFAULT_URL).parse().context("the file's url")?,
        };
        ensure!(!url.cannot_be_a_base(), "--url: {url} has no path");
        let token = self.token.or(config.token).filter(|token| !token.is_empty()).context(
            "no token: give one with --token, MAYFLY_TOKEN or in ~/.config/mayfly/client.toml; \
             where the service runs, `mayfly token --tenant NAME --sub NAME` makes one",
        )?;
        let client = client_for(&url).connect_timeout(Duration::from_secs(10)).build()?;
        Ok(Connection { client, url, token: token.trim().to_owned() })
    }

    fn config(&self) -> anyhow::Result<Config> {
        let path = match &self.client_config {
            Some(given) => given.clone(),
            None => match std::env::home_dir() {
                Some(home) => home.join(".config/mayfly/client.toml"),
                None => return Ok(Config::default()),
            },
        };
        let shown = || path.display().to_string();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            // One that nobody named need not be there.
            Err(_) if self.client_config.is_none() && !path.is_file() => return Ok(Config::default()),
            Err(error) => return Err(error).with_context(shown),
        };
        // The library's own message shows the line, which may hold the token.
        let config: Config = toml::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {}", shown(), error.message()))?;
        let mode = std::fs::metadata(&path).with_context(shown)?.mode();
        ensure!(config.token.is_none() || mode & 0o077 == 0, "{} holds a token and is open to others: chmod 600 {}", shown(), shown());
        Ok(config)
    }
}

/// A client for what is there. A proxy knows nothing of this machine's own loopback.
pub(super) fn client_for(url: &Url) -> reqwest::ClientBuilder {
    let is_local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    let client = reqwest::Client::builder();
    if is_local { client.no_proxy() } else { client }
}

impl Connection {
    pub(super) const fn url(&self) -> &Url {
        &self.url
    }

    /// A request for what is at this path, each part of which may hold anything.
    pub(super) fn request(&self, method: Method, path: &[&str], query: &[(&str, &str)]) -> RequestBuilder {
        let mut url = self.url.clone();
        url.path_segments_mut().expect("checked where the connection was made").pop_if_empty().extend(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.client.request(method, url).bearer_auth(&self.token)
    }

    pub(super) fn get(&self, path: &[&str], query: &[(&str, &str)]) -> RequestBuilder {
        self.request(Method::GET, path, query).timeout(PATIENCE)
    }

    pub(super) fn post(&self, path: &[&str]) -> RequestBuilder {
        self.request(Method::POST, path, &[]).timeout(PATIENCE)
    }

    pub(super) fn delete(&self, path: &[&str]) -> RequestBuilder {
        self.request(Method::DELETE, path, &[]).timeout(PATIENCE)
    }

    /// The answer, if it is none of refusal ([`Refused`]).
    pub(super) async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let url = &self.url;
        let response = request.send().await.map_err(|error| {
            let is_absent = error.is_connect();
            let error = anyhow::Error::new(error.without_url());
            if is_absent {
                return error.context(format!("cannot reach {url}; is `mayfly serve` running there? --url or MAYFLY_URL says where it is"));
            }
            error.context(format!("asking {url}"))
        })?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let refused = match serde_json::from_str(&text) {
            Ok(Problem { code, detail, field }) => {
                let detail = field.map_or(detail.clone(), |field| format!("{field}: {detail}"));
                Refused { status, code, detail: plain(&detail) }
            }
            Err(_) => Refused {
                status,
                code: status.as_str().to_owned(),
                detail: format!("{url} answered {status}, which is no answer of mayfly's"),
            },
        };
        Err(refused.into())
    }

    /// Has something be made, once, and says what. Where an answer is lost it is asked for again: what was made is not left behind unknown.
    pub(super) async fn make<T: DeserializeOwned>(&self, path: &[&str], body: &Value) -> anyhow::Result<T> {
        let (key, begun) = (Uuid::new_v4().to_string(), Instant::now());
        let mut may_be_made = false;
        loop {
            let error = match self.ask(self.post(path).header("idempotency-key", &key).json(body)).await {
                Ok(made) => return Ok(made),
                Err(error) => error,
            };
            let is_refused = match error.downcast_ref::<Refused>() {
                Some(refused) => refused.is_final() && refused.code != "idempotency_key_in_use",
                None => {
                    may_be_made |= was_sent(&error);
                    false
                }
            };
            if is_refused || !may_be_made || begun.elapsed() > MAKING_PATIENCE {
                return Err(error);
            }
            tokio::time::sleep(MAKING_PAUSE).await;
        }
    }

    /// What an answer holds.
    pub(super) async fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> anyhow::Result<T> {
        let bytes = self.send(request).await?.bytes().await.with_context(|| format!("hearing from {}", self.url))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} answered something else than was asked for", self.url))
    }
}

/// Whether a request may have arrived whose answer did not.
fn was_sent(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<reqwest::Error>()).any(|error| !error.is_connect() && !error.is_builder())
}

/// The code of a refusal.
pub(super) fn code_of(error: &anyhow::Error) -> Option<&str> {
    error.downcast_ref::<Refused>().map(|refused| refused.code.as_str())
}

/// What a person can do about a refusal, where its own words do not say.
fn hint(code: &str) -> &'static str {
    match code {
        "unauthenticated" => "; `mayfly token` makes a new one, --token or MAYFLY_TOKEN takes it",
        "not_found" => "; `mayfly ps --all` lists what there is",
        "image_not_found" => "; `mayfly images` lists what there is, `mayfly pull` and `mayfly image import` bring others in",
        "quota_exceeded" => "; `mayfly ps` lists what takes it up",
        "payload_too_large" => "; what is large goes in by `mayfly cp` or a volume",
        "pool_not_found" => "; `mayfly pool list` lists what there is",
        "volume_not_found" => "; volumes are made by POST /v1/volumes",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn with_file(text: &str, mode: u32) -> (tempfile::TempDir, Remote) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.toml");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (folder, Remote { client_config: Some(path), ..Remote::default() })
    }

    #[test]
    fn flags_go_over_the_file() {
        let (_folder, remote) = with_file("url = \"http://there:1\"\ntoken = \"of-the-file\"\n", 0o600);
        let connection = remote.clone().connect().unwrap();
        assert_eq!((connection.url.as_str(), connection.token.as_str()), ("http://there:1/", "of-the-file"));

        let connection =
            Remote { token: Some("given\n".into()), url: Some("http://here:2/below/".parse().unwrap()), ..remote }.connect().unwrap();
        assert_eq!(connection.token, "given");
        let request = connection.get(&["v1", "sandboxes", "a/b c"], &[("path", "/x y")]).build().unwrap();
        assert_eq!(request.url().as_str(), "http://here:2/below/v1/sandboxes/a%2Fb%20c?path=%2Fx+y");
    }

    #[test]
    fn a_token_that_others_can_read_is_refused_and_none_is_shown() {
        let (_folder, remote) = with_file("token = \"secret\"", 0o640);
        assert!(remote.connect().unwrap_err().to_string().contains("chmod 600"));
        let (_folder, remote) = with_file("token = \"secret\" oops", 0o600);
        assert!(!format!("{:#}", remote.connect().unwrap_err()).contains("secret"));
        let (_folder, remote) = with_file("url = \"http://a\"", 0o644);
        assert!(remote.connect().unwrap_err().to_string().contains("mayfly token"));
    }

    #[test]
    fn whoever_comes_too_often_may_come_again() {
        let is_final = |status: StatusCode| Refused { status, code: String::new(), detail: String::new() }.is_final();
        assert!(is_final(StatusCode::NOT_FOUND) && is_final(StatusCode::UNAUTHORIZED));
        assert!(!is_final(StatusCode::TOO_MANY_REQUESTS) && !is_final(StatusCode::SERVICE_UNAVAILABLE));
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let refused = Refused { status: StatusCode::NOT_FOUND, code: "image_not_found".into(), detail: "there is no image \"x\"".into() };
        assert_eq!(
            refused.to_string(),
            "there is no image \"x\" (image_not_found); `mayfly images` lists what there is, `mayfly pull` and `mayfly image import` bring others in"
        );
    }
}
