//! `mayfly exec`: a further program in a sandbox that runs.

use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    output::note,
    quantity,
    remote::{Connection, Remote, code_of},
    run::{self, EXIT_CODES, Interactive},
    session::{Left, Session},
    signals,
};

const KILL_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
#[command(override_usage = "mayfly exec [OPTIONS] SANDBOX [--] COMMAND...", after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// The sandbox, by id or name; the program, and its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_names = ["SANDBOX", "COMMAND"])]
    words: Vec<String>,
    #[command(flatten)]
    interactive: Interactive,
    /// Print the id, and leave the program alone
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// A variable of the environment; NAME alone: as it is here; may be given several times
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = quantity::variable)]
    env: Vec<(String, String)>,
    /// Folder to start in
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// User to run as: name or number, with a group behind a colon if need be
    #[arg(short, long)]
    user: Option<String>,
    /// Real time that it has
    #[arg(long, value_name = "TIME", value_parser = quantity::millis)]
    wall: Option<u64>,
    /// Output, of each stream; what is more is dropped
    #[arg(long, value_name = "SIZE", value_parser = quantity::bytes)]
    output: Option<u64>,
    /// Print what the service sends, one JSON object a line, in place of the output; with --detach the exec
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Deserialize)]
struct Made {
    id: String,
    sandbox_id: String,
}

/// The exit code. An error is a fault of ours or of what was asked for.
pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<u8> {
    arguments.interactive.check()?;
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    let Some((sandbox, command)) = arguments.words.split_first() else { anyhow::bail!("a sandbox is needed") };
    let command = command.strip_prefix(&["--".to_owned()]).unwrap_or(command);
    anyhow::ensure!(!command.is_empty(), "what is to be run in {sandbox}? `mayfly exec {sandbox} COMMAND...`");
    let body = arguments.body(command);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let place = ["v1", "sandboxes", sandbox, "execs"];
        if arguments.detach {
            let made: Value = connection.make(&place, &body).await?;
            super::print(if arguments.json { made.to_string() } else { made["id"].as_str().unwrap_or_default().to_owned() })?;
            return Ok(0);
        }
        let mut signals = signals::catch()?;
        let Made { id, sandbox_id } = connection.make(&place, &body).await?;
        let session = Session {
            connection: &connection,
            place: vec!["v1", "sandboxes", &sandbox_id, "execs", &id],
            has_input: arguments.interactive.interactive,
            is_terminal: arguments.interactive.tty,
            is_json: arguments.json,
        };
        match session.follow(&mut signals).await {
            Ok(Left::Ended(end)) => Ok(run::ended(&end, arguments.json)),
            Ok(Left::Insisted(number)) => {
                kill(&connection, &sandbox_id, &id).await;
                Ok(128 + number)
            }
            Err(error) => {
                kill(&connection, &sandbox_id, &id).await;
                Err(error)
            }
        }
    })
}

/// What nobody follows any more does not go on.
async fn kill(connection: &Connection, sandbox: &str, id: &str) {
    let killed = connection.send(connection.post(&["v1", "sandboxes", sandbox, "execs", id, "kill"]).timeout(KILL_PATIENCE)).await;
    if let Err(error) = killed
        && !matches!(code_of(&error), Some("wrong_state" | "not_found"))
    {
        note(&format!("ending the program failed: {error:#}"));
    }
}

impl Arguments {
    fn body(&self, command: &[String]) -> Value {
        let mut env: Map<String, Value> = self.env.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
        if self.interactive.tty {
            env.entry("TERM").or_insert_with(|| self.interactive.term.clone().into());
        }
        let limits: Map<String, Value> = [("wall_ms", self.wall), ("output_bytes", self.output)]
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.into())))
            .collect();
        let mut body = json!({
            "command": command,
            "env": env,
            "limits": limits,
            "stdin_open": self.interactive.interactive,
            "tty": self.interactive.tty(),
            "wait_ms": 0,
        });
        for (name, value) in [("workdir", &self.workdir), ("user", &self.user)] {
            if let Some(value) = value {
                body[name] = json!(value);
            }
        }
        body
    }
}
