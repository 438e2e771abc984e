//! `mayfly stop` and `mayfly rm`.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use serde_json::{Map, Value};

use super::{
    output::note,
    quantity,
    remote::{Connection, Remote},
};

/// Beyond its grace, how long an end may take to be told.
const END_PATIENCE: Duration = Duration::from_secs(60);
/// The longest grace that the API takes.
const GRACE_MAX: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
pub(super) struct Stop {
    /// Sandboxes, by id or name
    #[arg(required = true)]
    sandbox: Vec<String>,
    /// How long it has before it is killed, as in 10s [default: its own]
    #[arg(short, long, value_name = "TIME", value_parser = quantity::millis)]
    time: Option<u64>,
    /// Signal to end it by [default: its own]
    #[arg(short, long)]
    signal: Option<String>,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Args)]
pub(super) struct Remove {
    /// Sandboxes, by id or name
    #[arg(required = true)]
    sandbox: Vec<String>,
    /// Also those that have not ended
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    remote: Remote,
}

pub(super) fn stop(mut arguments: Stop) -> anyhow::Result<()> {
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    let body: Map<String, Value> = [("signal", arguments.signal.map(Value::from)), ("grace_ms", arguments.time.map(Value::from))]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect();
    each(&arguments.sandbox, async |sandbox| {
        let request = connection.post(&["v1", "sandboxes", sandbox, "stop"]).timeout(GRACE_MAX + END_PATIENCE).json(&body);
        connection.send(request).await?;
        Ok(())
    })
}

pub(super) fn remove(mut arguments: Remove) -> anyhow::Result<()> {
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    each(&arguments.sandbox, async |sandbox| remove_one(&connection, sandbox, arguments.force).await)
}

async fn remove_one(connection: &Connection, sandbox: &str, is_forced: bool) -> anyhow::Result<()> {
    if !is_forced {
        let now: Value = connection.ask(connection.get(&["v1", "sandboxes", sandbox], &[])).await?;
        if !matches!(now["state"].as_str(), Some("exited" | "failed")) {
            bail!("it is {}; `mayfly stop {sandbox}` ends it, --force removes it all the same", now["state"].as_str().unwrap_or("live"));
        }
    }
    connection.send(connection.delete(&["v1", "sandboxes", sandbox])).await?;
    Ok(())
}

/// Does it to each, and prints its name; one that fails keeps no other from it.
fn each(names: &[String], act: impl AsyncFn(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut failed = Vec::new();
    for name in names {
        match runtime.block_on(act(name)) {
            Ok(()) => super::print(name)?,
            Err(error) => failed.push(error.context(name.clone())),
        }
    }
    let Some(last) = failed.pop() else { return Ok(()) };
    for error in failed {
        note(&format!("{error:#}"));
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_fails_keeps_no_other_from_it() {
        let done = std::cell::RefCell::new(Vec::new());
        let names = ["a", "b", "c"].map(str::to_owned);

        let told = each(&names, async |name| {
            done.borrow_mut().push(name.to_owned());
            if name == "b" { bail!("no") } else { Ok(()) }
        });

        assert_eq!(*done.borrow(), ["a", "b", "c"]);
        assert_eq!(format!("{:#}", told.unwrap_err()), "b: no");
    }
}
