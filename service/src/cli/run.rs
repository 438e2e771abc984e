//! `mayfly run`: a sandbox for one program, with its output, input and exit code as if it ran here.
//!
//! Not a run of the API, which takes all of its input at once, has no terminal and hears no signals.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{ArgAction, Args};
use indicatif::{ProgressBar, ProgressFinish};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::{
    files,
    frame::End,
    output::note,
    quantity,
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

#[derive(Debug, Args)]
#[command(next_help_heading = "Sandbox")]
struct What {
    /// A name of its own
    #[arg(long)]
    name: Option<String>,
    /// A variable of the environment; NAME alone: as it is here; may be given several times
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = quantity::variable)]
    env: Vec<(String, String)>,
    /// A file or folder of this machine to begin with, SOURCE:PATH, or SOURCE for one of that name in the working folder; may be given several times
    #[arg(long, value_name = "SOURCE[:PATH]")]
    file: Vec<String>,
    /// Folder to start in
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// User to run as: name or number, with a group behind a colon if need be
    #[arg(short, long)]
    user: Option<String>,
    /// In place of the image's entry point; empty: none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// A label; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = quantity::pair)]
    label: Vec<(String, String)>,
    /// A volume and where it stands; may be given several times
    #[arg(short, long, value_name = "NAME:PATH[:ro]", value_parser = parse_volume)]
    volume: Vec<Value>,
    /// What user 0 may do: none, or what images expect that are built to run as root
    #[arg(long, value_parser = ["none", "root_image"])]
    capabilities: Option<String>,
    /// What stands between it and the kernel
    #[arg(long, value_parser = ["container", "gvisor"])]
    isolation: Option<String>,
    /// What it is told when it is stopped [default: the image's, or SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// How long it then has
    #[arg(long, value_name = "TIME", value_parser = quantity::millis)]
    stop_grace: Option<u64>,
    /// Fail when there is no room, instead of waiting for it
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits (sizes as in 64m, times as in 90s; `GET /v1/limits` has bounds and defaults)")]
struct Limits {
    /// Memory, with the files that are kept in it
    #[arg(short, long, value_name = "SIZE", value_parser = quantity::bytes)]
    memory: Option<u64>,
    /// Cores, as in 0.5
    #[arg(long, value_name = "NUMBER", value_parser = quantity::cpu_millis)]
    cpus: Option<u64>,
    /// Processes and threads
    #[arg(long, value_name = "NUMBER")]
    pids: Option<u64>,
    /// Real time
    #[arg(long, value_name = "TIME", value_parser = quantity::millis)]
    wall: Option<u64>,
    /// CPU time, of all processes together
    #[arg(long, value_name = "TIME", value_parser = quantity::millis)]
    cpu_time: Option<u64>,
    /// Output, of each stream; what is more is dropped
    #[arg(long, value_name = "SIZE", value_parser = quantity::bytes)]
    output: Option<u64>,
    /// What it may write to files
    #[arg(long, value_name = "SIZE", value_parser = quantity::bytes)]
    disk: Option<u64>,
    /// Files, folders and links
    #[arg(long, value_name = "NUMBER")]
    inodes: Option<u64>,
    /// Open files of one process
    #[arg(long, value_name = "NUMBER")]
    open_files: Option<u64>,
    /// Size of one file
    #[arg(long, value_name = "SIZE", value_parser = quantity::bytes)]
    file_size: Option<u64>,
    /// Reading from and writing to the node's disks, a second
    #[arg(long, value_name = "SIZE", value_parser = quantity::bytes)]
    io_bytes: Option<u64>,
    /// The same, in operations
    #[arg(long, value_name = "NUMBER")]
    io_ops: Option<u64>,
    /// End it when it has done nothing for so long
    #[arg(long, value_name = "TIME", value_parser = quantity::millis)]
    idle_timeout: Option<u64>,
    /// End it so long after its creation [default: a day; with --detach or --keep none]
    #[arg(long, value_name = "TIME", value_parser = quantity::millis)]
    ttl: Option<u64>,
    /// End it when it writes more than --output
    #[arg(long, action = ArgAction::SetTrue)]
    kill_at_output: bool,
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
    let made: Value = connection.ask(connection.post(&["v1", "sandboxes"]).json(body)).await?;
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
    let made: Made = connection.ask(connection.post(&["v1", "sandboxes"]).json(body)).await?;
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
        let What { name, env, file, workdir, user, entrypoint, label, volume, capabilities, isolation, stop_signal, stop_grace, no_wait } =
            &self.what;
        let mut env: Map<String, Value> = env.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
        if self.interactive.tty {
            env.entry("TERM").or_insert_with(|| self.interactive.term.clone().into());
        }
        let entrypoint = entrypoint.as_ref().map(|program| if program.is_empty() { json!([]) } else { json!([program]) });
        let ttl_ms = self.limits.ttl.or_else(|| (!self.detach && !self.keeps()).then_some(ATTACHED_TTL_MS));
        let fields = [
            ("image", Some(json!(image))),
            ("command", (!command.is_empty()).then(|| json!(command))),
            ("name", name.as_ref().map(|name| json!(name))),
            ("env", (!env.is_empty()).then(|| json!(env))),
            ("files", (!file.is_empty()).then(|| files::read(file)).transpose()?.map(Value::Array)),
            ("workdir", workdir.as_ref().map(|path| json!(path))),
            ("user", user.as_ref().map(|user| json!(user))),
            ("entrypoint", entrypoint),
            ("labels", (!label.is_empty()).then(|| label.iter().map(|(name, value)| (name.clone(), json!(value))).collect())),
            ("volumes", (!volume.is_empty()).then(|| json!(volume))),
            ("capabilities", capabilities.as_ref().map(|word| json!(word))),
            ("isolation", isolation.as_ref().map(|word| json!(word))),
            ("stop_signal", stop_signal.as_ref().map(|signal| json!(signal))),
            ("stop_grace_ms", stop_grace.map(Value::from)),
            ("when_full", no_wait.then(|| json!("refuse"))),
            ("limits", Some(self.limits.body())),
            ("output_policy", self.limits.kill_at_output.then(|| json!("kill"))),
            ("idle_timeout_ms", self.limits.idle_timeout.map(Value::from)),
            ("ttl_ms", ttl_ms.map(Value::from)),
            ("auto_remove", (self.detach && self.rm).then_some(Value::Bool(true))),
            ("keep_layer", self.keep_files.then_some(Value::Bool(true))),
            ("stdin_open", self.interactive.interactive.then_some(Value::Bool(true))),
            ("tty", self.interactive.tty.then(|| self.interactive.tty())),
        ];
        Ok(fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
    }
}

impl Limits {
    fn body(&self) -> Value {
        let limits = [
            ("memory_bytes", self.memory),
            ("cpu_millis", self.cpus),
            ("pids", self.pids),
            ("wall_ms", self.wall),
            ("cpu_ms", self.cpu_time),
            ("output_bytes", self.output),
            ("disk_bytes", self.disk),
            ("inodes", self.inodes),
            ("open_files", self.open_files),
            ("file_size_bytes", self.file_size),
            ("io_bytes_per_s", self.io_bytes),
            ("io_ops_per_s", self.io_ops),
        ];
        limits.into_iter().filter_map(|(name, value)| Some((name.to_owned(), Value::from(value?)))).collect()
    }
}

fn parse_volume(text: &str) -> anyhow::Result<Value> {
    let (text, is_read_only) = text.strip_suffix(":ro").map_or((text, false), |rest| (rest, true));
    let (name, path) = text
        .split_once(':')
        .filter(|(name, _)| !name.contains('/'))
        .context("NAME:PATH is needed; NAME is that of a volume: folders of this machine cannot be had inside, files come in by --file")?;
    Ok(json!({ "name": name, "path": path, "read_only": is_read_only }))
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

    #[test]
    fn folders_of_this_machine_are_no_volumes() {
        assert!(parse_volume("/home:/home").is_err());
        assert!(parse_volume("cache").is_err());
    }
}
