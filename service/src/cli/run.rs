//! `mayfly run`: a sandbox for one program, with its output, input and exit code as if it ran here.
//!
//! Not a run of the API, which takes all of its input at once, has no terminal and hears no signals.

mod request;

use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use indicatif::{ProgressBar, ProgressFinish};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use self::request::{Limits, What};
use super::{
    frame::End,
    output::note,
    remote::{Connection, Remote, code_of},
    session::{Left, Session},
    signals::{self, Told},
    terminal,
};

/// A sandbox whose client was killed is not there for good.
const ATTACHED_TTL_MS: u64 = 86_400_000;
/// How long removing it may take; more than the service's own patience.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(30);

/// What the codes mean, for `--help`.
pub(super) const EXIT_CODES: &str = "\
Exit codes:
  the program's own, or 128 and the number of the signal that ended it; else
  124  a time limit: --wall, --cpu-time, --idle-timeout, --ttl
  125  a fault of this command, the service, or of what was asked for
  126  the program is there and cannot be executed
  127  there is no such program
  137  killed: out of memory, over its output limit, stopped by somebody

SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on; the third SIGINT or SIGTERM ends the program.";

#[derive(Debug, Args)]
#[command(override_usage = "mayfly run [OPTIONS] IMAGE [--] [COMMAND]...", after_help = EXIT_CODES)]
pub(super) struct Arguments {
    /// The image, and program and arguments instead of the image's own
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    words: Vec<String>,
    #[command(flatten)]
    interactive: Interactive,
    /// Print the id, and leave the program alone
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// Remove the sandbox when the program has ended; without --detach that is so anyway
    #[arg(long, conflicts_with = "keep")]
    rm: bool,
    /// Leave the sandbox when the program has ended, with its log; with --keep-files also what it wrote
    #[arg(long)]
    keep: bool,
    /// Keep what the program wrote after its end, for `mayfly cp`, and for starting it again
    #[arg(long, conflicts_with = "rm")]
    keep_files: bool,
    /// Print what the service sends, one JSON object a line, in place of the output; with --detach the sandbox
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    remote: Remote,
}

/// How a program is sat at.
#[derive(Debug, Args)]
pub(super) struct Interactive {
    /// Give it standard input
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Kind of terminal that it is told of
    #[arg(long, env = "TERM", value_name = "NAME", hide_env = true, default_value = "xterm", hide = true)]
    pub(super) term: String,
}

/// What of a sandbox is of interest here.
#[derive(Debug, Deserialize)]
struct Made {
    id: String,
    state: String,
    queue_position: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Waited {
    result: String,
}

/// The exit code. An error is a fault of ours or of what was asked for.
pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<u8> {
    arguments.interactive.check()?;
    let connection = std::mem::take(&mut arguments.remote).connect()?;
    let body = arguments.body()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if arguments.detach {
            return detached(&connection, &body, arguments.json).await;
        }
        attached(&connection, &body, &arguments).await
    })
}

async fn detached(connection: &Connection, body: &Value, is_json: bool) -> anyhow::Result<u8> {
    let made: Value = connection.make(&["v1", "sandboxes"], body).await?;
    if is_json {
        super::print(made.to_string())?;
    } else {
        super::print(made["id"].as_str().unwrap_or_default())?;
    }
    // It waits for room, runs, or has ended at once, which is no fault; what could not be started is one.
    if made["state"] == "failed" {
        let end: End = serde_json::from_value(made["outcome"].clone()).unwrap_or_default();
        note(&end.note().unwrap_or_default());
        return Ok(end.exit_code());
    }
    Ok(0)
}

async fn attached(connection: &Connection, body: &Value, arguments: &Arguments) -> anyhow::Result<u8> {
    // From here on, so that none comes between its creation and its removal.
    let mut signals = signals::catch()?;
    let made: Made = connection.make(&["v1", "sandboxes"], body).await?;
    let id = made.id.as_str();
    let followed = follow(connection, &made, &mut signals, arguments).await;
    let has_ended = matches!(&followed, Ok(Left::Ended(_)));
    if !arguments.keeps() {
        remove(connection, id).await;
    } else if !has_ended {
        kill(connection, id).await;
    }
    match followed? {
        Left::Ended(end) => Ok(ended(&end, arguments.json)),
        Left::Insisted(number) => Ok(128 + number),
    }
}

/// To its end, or until we are told to let go of it.
async fn follow(
    connection: &Connection,
    made: &Made,
    signals: &mut mpsc::UnboundedReceiver<Told>,
    arguments: &Arguments,
) -> anyhow::Result<Left> {
    if let Some(left) = until_started(connection, made, signals).await? {
        return Ok(left);
    }
    let session = Session {
        connection,
        place: vec!["v1", "sandboxes", &made.id],
        has_input: arguments.interactive.interactive,
        is_terminal: arguments.interactive.tty,
        is_json: arguments.json,
    };
    session.follow(signals).await
}

/// Waits for room, and tells who looks. Input is for what runs.
async fn until_started(connection: &Connection, made: &Made, signals: &mut mpsc::UnboundedReceiver<Told>) -> anyhow::Result<Option<Left>> {
    if !matches!(made.state.as_str(), "queued" | "starting") {
        return Ok(None);
    }
    let bar = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
    bar.enable_steady_tick(Duration::from_millis(120));
    let mut position = made.queue_position;
    loop {
        bar.set_message(position.map_or("starting".to_owned(), |position| format!("waiting for room, at place {position}")));
        let wait = connection.get(&["v1", "sandboxes", &made.id, "wait"], &[("until", "running"), ("timeout_ms", "2000")]);
        let waited: Waited = tokio::select! {
            waited = connection.ask(wait) => waited?,
            Some(number) = ending(signals) => return Ok(Some(Left::Insisted(number))),
        };
        if matches!(waited.result.as_str(), "reached" | "ended") {
            return Ok(None);
        }
        if waited.result == "stopping" {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let now: Made = connection.ask(connection.get(&["v1", "sandboxes", &made.id], &[])).await?;
        position = now.queue_position;
    }
}

/// The next signal that is to end what nobody runs yet.
async fn ending(signals: &mut mpsc::UnboundedReceiver<Told>) -> Option<u8> {
    loop {
        if let Some(number) = signals.recv().await?.ending() {
            return Some(number);
        }
    }
}

/// Tells a person what the code alone does not; the code.
pub(super) fn ended(end: &End, is_json: bool) -> u8 {
    if !is_json {
        if let Some(text) = end.note() {
            note(&text);
        }
        if let Some(streams) = end.cut() {
            note(&format!("{streams} cut at the limit of output; --output sets a larger one"));
        }
    }
    end.exit_code()
}

async fn remove(connection: &Connection, id: &str) {
    let removed = connection.send(connection.delete(&["v1", "sandboxes", id]).timeout(REMOVAL_PATIENCE)).await;
    if let Err(error) = removed
        && code_of(&error) != Some("not_found")
    {
        note(&format!("removing it failed: {error:#}; `mayfly rm --force {id}` does it"));
    }
}

async fn kill(connection: &Connection, id: &str) {
    let killed = connection.send(connection.post(&["v1", "sandboxes", id, "kill"]).timeout(REMOVAL_PATIENCE)).await;
    if let Err(error) = killed
        && !matches!(code_of(&error), Some("wrong_state" | "not_found"))
    {
        note(&format!("ending it failed: {error:#}; `mayfly rm --force {id}` does it"));
    }
}

impl Interactive {
    /// Whether keys can be passed on, if that is asked for.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let is_possible = !(self.tty && self.interactive) || terminal::is_typed_at();
        ensure!(is_possible, "standard input is no terminal: leave --tty away, or --interactive");
        Ok(())
    }

    /// What `tty` of a request says.
    pub(super) fn tty(&self) -> Value {
        if self.tty { terminal::size().unwrap_or(Value::Bool(true)) } else { Value::Bool(false) }
    }
}

impl Arguments {
    fn keeps(&self) -> bool {
        self.keep || self.keep_files
    }

    fn body(&self) -> anyhow::Result<Value> {
        let Some((image, command)) = self.words.split_first() else { anyhow::bail!("an image is needed") };
        // The first one is no word of the program's; all that follow are.
        let command = command.strip_prefix(&["--".to_owned()]).unwrap_or(command);
        let mut body = self.what.members()?;
        body.extend(self.limits.members());
        body.insert("image".into(), json!(image));
        if self.interactive.tty {
            let env = body.entry("env").or_insert_with(|| json!({}));
            if env["TERM"].is_null() {
                env["TERM"] = json!(self.interactive.term);
            }
        }
        if !self.detach && !self.keeps() {
            body.entry("ttl_ms").or_insert(ATTACHED_TTL_MS.into());
        }
        let others = [
            ("command", (!command.is_empty()).then(|| json!(command))),
            ("auto_remove", (self.detach && self.rm).then_some(Value::Bool(true))),
            ("keep_layer", self.keep_files.then_some(Value::Bool(true))),
            ("stdin_open", self.interactive.interactive.then_some(Value::Bool(true))),
            ("tty", self.interactive.tty.then(|| self.interactive.tty())),
        ];
        body.extend(others.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        Ok(body.into())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: Arguments,
    }

    fn parsed(words: &[&str]) -> Result<Arguments, clap::Error> {
        let own = ["mayfly run", "--token", "t"];
        Line::try_parse_from(own.iter().chain(words)).map(|line| line.run)
    }

    fn body(words: &[&str]) -> Value {
        parsed(words).unwrap().body().unwrap()
    }

    #[test]
    fn what_stands_behind_the_image_is_the_programs() {
        for words in [
            &["python", "--", "python3", "-c", "print(1)", "--", "-i"][..],
            &["python", "python3", "-c", "print(1)", "--", "-i"],
            &["--", "python", "python3", "-c", "print(1)", "--", "-i"],
        ] {
            let body = body(words);
            assert_eq!(body["image"], "python", "{words:?}");
            assert_eq!(body["command"], json!(["python3", "-c", "print(1)", "--", "-i"]), "{words:?}");
            assert_eq!(body["stdin_open"], Value::Null);
        }
        assert_eq!(body(&["python"])["command"], Value::Null);
        assert!(parsed(&["--no-such-flag", "python"]).is_err());
        assert!(parsed(&[]).is_err());
    }

    #[test]
    fn flags_become_fields() {
        let body = body(&[
            "-e",
            "A=b=c",
            "-m",
            "64m",
            "--cpus",
            "0.5",
            "--wall",
            "2s",
            "-v",
            "cache:/cache:ro",
            "-l",
            "k=v",
            "--entrypoint",
            "",
            "image",
        ]);
        assert_eq!(body["env"], json!({ "A": "b=c" }));
        assert_eq!(body["limits"], json!({ "memory_bytes": 64 << 20, "cpu_millis": 500, "wall_ms": 2000 }));
        assert_eq!(body["volumes"], json!([{ "name": "cache", "path": "/cache", "read_only": true }]));
        assert_eq!((&body["labels"], &body["entrypoint"]), (&json!({ "k": "v" }), &json!([])));
    }

    #[test]
    fn what_is_sat_at_is_not_there_for_good() {
        assert_eq!(body(&["image"])["ttl_ms"], ATTACHED_TTL_MS);
        assert_eq!(body(&["--ttl", "1h", "image"])["ttl_ms"], 3_600_000);
        assert_eq!(body(&["--keep", "image"])["ttl_ms"], Value::Null);
        let detached = body(&["-d", "--rm", "image"]);
        assert_eq!((&detached["ttl_ms"], &detached["auto_remove"]), (&Value::Null, &json!(true)));
    }
}
