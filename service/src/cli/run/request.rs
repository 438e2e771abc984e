//! What `mayfly run` asks of the API: the sandbox and its limits, from flags.

use anyhow::Context as _;
use clap::{ArgAction, Args};
use serde_json::{Map, Value, json};

use super::super::{files, quantity};

#[derive(Debug, Args)]
#[command(next_help_heading = "Sandbox")]
pub(super) struct What {
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
pub(super) struct Limits {
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

impl What {
    /// What a request says of it.
    pub(super) fn members(&self) -> anyhow::Result<Map<String, Value>> {
        let Self { name, env, file, workdir, user, entrypoint, label, volume, capabilities, isolation, stop_signal, stop_grace, no_wait } =
            self;
        let entrypoint = entrypoint.as_ref().map(|program| if program.is_empty() { json!([]) } else { json!([program]) });
        let object = |pairs: &[(String, String)]| {
            let members: Map<String, Value> = pairs.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
            (!members.is_empty()).then_some(Value::Object(members))
        };
        let text = |given: &Option<String>| given.as_ref().map(|text| json!(text));
        let all = [
            ("name", text(name)),
            ("env", object(env)),
            ("files", (!file.is_empty()).then(|| files::read(file)).transpose()?.map(Value::Array)),
            ("workdir", text(workdir)),
            ("user", text(user)),
            ("entrypoint", entrypoint),
            ("labels", object(label)),
            ("volumes", (!volume.is_empty()).then(|| json!(volume))),
            ("capabilities", text(capabilities)),
            ("isolation", text(isolation)),
            ("stop_signal", text(stop_signal)),
            ("stop_grace_ms", stop_grace.map(Value::from)),
            ("when_full", no_wait.then(|| json!("refuse"))),
        ];
        Ok(given(all))
    }
}

impl Limits {
    /// What a request says of them.
    pub(super) fn members(&self) -> Map<String, Value> {
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
        given([
            ("limits", Some(given(limits.map(|(name, value)| (name, value.map(Value::from)))).into())),
            ("output_policy", self.kill_at_output.then(|| json!("kill"))),
            ("idle_timeout_ms", self.idle_timeout.map(Value::from)),
            ("ttl_ms", self.ttl.map(Value::from)),
        ])
    }
}

/// What is there of these.
fn given<const N: usize>(all: [(&str, Option<Value>); N]) -> Map<String, Value> {
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
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
    use super::*;

    #[test]
    fn folders_of_this_machine_are_no_volumes() {
        assert!(parse_volume("/home:/home").is_err());
        assert!(parse_volume("cache").is_err());
    }
}
