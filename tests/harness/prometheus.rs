//! A real Prometheus that scrapes a service of a test.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::service;

/// How long it may take to listen on a loaded machine.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Debian's Prometheus, with a folder and a port of its own. Killed when dropped.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    url: String,
    http: reqwest::Client,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// Starts one that scrapes every second as `scrape_configs`, in YAML, says, and evaluates these rules.
    ///
    /// # Errors
    /// It is not installed, or does not take that configuration; the text holds what it said.
    pub fn start(scrape_configs: &Value, rules: &Path) -> Result<Self> {
        let folder = service::folder()?;
        let config = serde_json::json!({
            "global": { "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s" },
            "rule_files": [rules],
            "scrape_configs": scrape_configs,
        });
        let file = folder.path().join("prometheus.yml");
        // What is JSON is YAML.
        fs::write(&file, config.to_string())?;
        let mut child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg("--web.listen-address=127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting prometheus: tools/setup.sh test installs it")?;
        let log = BufReader::new(child.stderr.take().context("piped")?);
        let (said, heard) = mpsc::channel();
        // To its end: nobody else takes what it says.
        std::thread::spawn(move || log.lines().map_while(Result::ok).for_each(|line| drop(said.send(line))));
        let mut this = Self { child, url: String::new(), http: reqwest::Client::builder().no_proxy().build()?, _folder: folder };
        let mut all = Vec::new();
        while this.url.is_empty() {
            let line = heard.recv_timeout(START_DEADLINE).with_context(|| format!("it does not listen: {}", all.join("\n")))?;
            if line.contains("msg=\"Listening on\"") {
                let address = line.split_once("address=").with_context(|| line.clone())?.1;
                this.url = format!("http://{}", address.trim());
            }
            all.push(line);
        }
        Ok(this)
    }

    /// The values of this expression now; `Err` holds what Prometheus has against it.
    ///
    /// # Errors
    /// It is no expression, or Prometheus did not answer.
    pub async fn query(&self, expression: &str) -> Result<Vec<f64>> {
        let answer = self.get(&format!("/api/v1/query?query={}", encoded(expression))).await?;
        ensure!(answer["status"] == "success", "{expression}: {}", answer["error"]);
        let result = &answer["data"]["result"];
        let values = match answer["data"]["resultType"].as_str() {
            Some("vector") => result.as_array().into_iter().flatten().map(|sample| &sample["value"][1]).collect(),
            _ => vec![&result[1]],
        };
        values.into_iter().map(|value| Ok(value.as_str().context("a value is text")?.parse()?)).collect()
    }

    /// Its rules, as its API tells them.
    ///
    /// # Errors
    /// It did not answer.
    pub async fn rules(&self) -> Result<Vec<Value>> {
        let answer = self.get("/api/v1/rules").await?;
        let groups = answer["data"]["groups"].as_array().cloned().unwrap_or_default();
        Ok(groups.iter().filter_map(|group| group["rules"].as_array()).flatten().cloned().collect())
    }

    async fn get(&self, path: &str) -> Result<Value> {
        let deadline = tokio::time::Instant::now() + START_DEADLINE;
        loop {
            let answer = self.http.get(format!("{}{path}", self.url)).send().await?;
            // It listens before it has read what it stores.
            if answer.status() != reqwest::StatusCode::SERVICE_UNAVAILABLE || tokio::time::Instant::now() > deadline {
                return Ok(serde_json::from_str(&answer.text().await?)?);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // One that has ended is what we want.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// As it can stand in a query (RFC 3986, 2.1).
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
