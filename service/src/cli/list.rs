//! `mayfly ps` and `mayfly images`: what there is, as tables or as JSON.

use clap::Args;
use serde::Deserialize;
use serde_json::Value;
use time::OffsetDateTime;

use super::{
    frame::End,
    remote::{Connection, Remote},
    table::{age, cut, size, table},
};
use crate::clock::Clock;

const COMMAND_CHARACTERS: usize = 40;
/// `sha256:` and as much of a digest as people compare.
const DIGEST_CHARACTERS: usize = 19;

#[derive(Debug, Args)]
pub(super) struct Sandboxes {
    /// Those that have ended, too
    #[arg(short, long)]
    all: bool,
    /// Ids alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Only those with this label, whatever its value or with this one; may be given several times
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,
    /// Only those whose name begins so
    #[arg(long)]
    name: Option<String>,
    /// One JSON object a line, as the API has them
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Args)]
pub(super) struct Images {
    /// References alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// One JSON object a line, as the API has them
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Deserialize)]
struct Page {
    items: Vec<Value>,
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Sandbox {
    id: String,
    name: Option<String>,
    state: String,
    image: ImageUsed,
    command: Vec<String>,
    outcome: Option<End>,
    created_at: String,
    started_at: Option<String>,
    finished_at: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ImageUsed {
    reference: String,
}

#[derive(Debug, Deserialize)]
struct Image {
    reference: String,
    digest: String,
    shared: bool,
    size_bytes: u64,
    created_at: String,
}

pub(super) fn sandboxes(mut arguments: Sandboxes) -> anyhow::Result<()> {
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let items = runtime.block_on(arguments.read(&connection))?;
    let now = Clock::System.now();
    show(items, arguments.quiet, arguments.json, "id", |items| {
        let rows = parsed::<Sandbox>(items)?.into_iter().map(|sandbox| sandbox.row(now)).collect::<Vec<_>>();
        Ok(table(["ID", "NAME", "IMAGE", "COMMAND", "STATE", "CREATED"], &rows))
    })
}

pub(super) fn images(mut arguments: Images) -> anyhow::Result<()> {
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let list: Value = runtime.block_on(connection.ask(connection.get(&["v1", "images"], &[])))?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let now = Clock::System.now();
    show(items, arguments.quiet, arguments.json, "reference", |items| {
        let rows = parsed::<Image>(items)?.into_iter().map(|image| image.row(now)).collect::<Vec<_>>();
        Ok(table(["REFERENCE", "DIGEST", "SIZE", "CREATED", "FOR"], &rows))
    })
}

fn show(
    items: Vec<Value>,
    is_quiet: bool,
    is_json: bool,
    name: &str,
    table: impl FnOnce(Vec<Value>) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let lines = |line: &dyn Fn(&Value) -> String| items.iter().map(line).collect::<Vec<_>>().join("\n");
    let text = match (is_quiet, is_json) {
        (true, _) => lines(&|item| item[name].as_str().unwrap_or_default().to_owned()),
        (false, true) => lines(&ToString::to_string),
        (false, false) => table(items.clone())?,
    };
    // Of nothing not even an empty line.
    if text.is_empty() { Ok(()) } else { super::print(text) }
}

fn parsed<T: serde::de::DeserializeOwned>(items: Vec<Value>) -> anyhow::Result<Vec<T>> {
    Ok(items.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?)
}

impl Sandboxes {
    async fn read(&self, connection: &Connection) -> anyhow::Result<Vec<Value>> {
        const LIVE: [&str; 4] = ["queued", "starting", "running", "paused"];
        let mut query = vec![("limit", "200")];
        query.extend(LIVE.iter().filter(|_| !self.all).map(|state| ("state", *state)));
        query.extend(self.label.iter().map(|label| ("label", label.as_str())));
        query.extend(self.name.iter().map(|name| ("name", name.as_str())));
        let (mut items, mut cursor) = (Vec::new(), None::<String>);
        loop {
            let query: Vec<_> = query.iter().copied().chain(cursor.iter().map(|cursor| ("cursor", cursor.as_str()))).collect();
            let page: Page = connection.ask(connection.get(&["v1", "sandboxes"], &query)).await?;
            items.extend(page.items);
            cursor = page.next_cursor;
            if cursor.is_none() {
                return Ok(items);
            }
        }
    }
}

impl Sandbox {
    fn row(self, now: OffsetDateTime) -> [String; 6] {
        let state = self.how(now);
        [
            self.id,
            self.name.unwrap_or_default(),
            self.image.reference,
            cut(&self.command.join(" "), COMMAND_CHARACTERS),
            state,
            format!("{} ago", age(&self.created_at, now)),
        ]
    }

    /// Its state, since when, and how it ended.
    fn how(&self, now: OffsetDateTime) -> String {
        let since = |at: &Option<String>| at.as_ref().map(|at| age(at, now)).unwrap_or_default();
        let Some(outcome) = &self.outcome else {
            let word = &self.state;
            return if self.started_at.is_some() { format!("{word} {}", since(&self.started_at)) } else { word.clone() };
        };
        let how = match (outcome.reason.as_str(), outcome.exit_code, &outcome.signal) {
            ("exited", Some(code), _) => format!("exited ({code})"),
            ("signaled", _, Some(signal)) => format!("signaled ({signal})"),
            (reason, ..) => reason.to_owned(),
        };
        format!("{how} {} ago", since(&self.finished_at))
    }
}

impl Image {
    fn row(self, now: OffsetDateTime) -> [String; 5] {
        [
            self.reference,
            self.digest.chars().take(DIGEST_CHARACTERS).collect(),
            size(self.size_bytes),
            format!("{} ago", age(&self.created_at, now)),
            if self.shared { "all tenants" } else { "this tenant" }.to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    fn sandbox(outcome: &Value) -> Sandbox {
        serde_json::from_value(json!({
            "id": "i", "name": null, "state": "running", "image": { "reference": "python", "digest": "" }, "command": ["sh", "-c", "x"],
            "outcome": outcome, "created_at": "2026-01-02T03:00:05Z", "started_at": "2026-01-02T03:01:05Z", "finished_at": "2026-01-02T03:04:05Z",
        }))
        .unwrap()
    }

    #[test]
    fn a_state_is_told_with_how_and_since_when() {
        let now = datetime!(2026-01-02 03:05:05 UTC);
        let how = |outcome: Value| sandbox(&outcome).how(now);
        assert_eq!(how(Value::Null), "running 4 minutes");
        assert_eq!(how(json!({ "reason": "exited", "exit_code": 3, "signal": null, "message": "" })), "exited (3) 1 minute ago");
        assert_eq!(how(json!({ "reason": "signaled", "signal": "SIGTERM", "message": "" })), "signaled (SIGTERM) 1 minute ago");
        assert_eq!(how(json!({ "reason": "oom_killed", "signal": "SIGKILL", "message": "" })), "oom_killed 1 minute ago");
        assert_eq!(sandbox(&Value::Null).row(now)[3..], ["sh -c x", "running 4 minutes", "5 minutes ago"]);
    }
}
