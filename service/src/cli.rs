//! The command line: what can be asked of the binary, and how it answers.

mod api;
mod copy;
mod exec;
mod files;
mod frame;
mod image;
mod input;
mod life;
mod list;
mod logs;
mod migrate;
mod node;
mod output;
mod packer;
mod pool;
mod progress;
mod pull;
mod quantity;
mod remote;
mod run;
mod session;
mod signals;
mod socket;
mod table;
mod tenant;
mod terminal;
mod token;

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::{config::Options, doctor, serve};

/// Runs strangers' code in short-lived, strictly limited Linux containers, over HTTP.
#[derive(Debug, Parser)]
#[command(name = "mayfly", version)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program in a sandbox of its own, as if it ran here
    Run(Box<run::Arguments>),
    /// Run a further program in a sandbox
    Exec(Box<exec::Arguments>),
    /// List sandboxes
    Ps(list::Sandboxes),
    /// Show what a sandbox or run wrote
    Logs(Box<logs::Arguments>),
    /// Copy files and folders into a sandbox, or out of it
    Cp(copy::Arguments),
    /// Ask sandboxes to end, and wait for it
    Stop(life::Stop),
    /// Remove sandboxes
    Rm(life::Remove),
    /// List images
    Images(list::Images),
    /// Have an image pulled from a registry
    Pull(pull::Arguments),
    /// Serve the API until SIGTERM or SIGINT
    Serve(Box<Options>),
    /// Bring the schema of a database up to this version, before services of it start
    Migrate(migrate::Arguments),
    /// Make a token for the API and print it
    Token(Box<token::Arguments>),
    /// Work with images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Work with tenants, their quotas and their principals
    #[command(subcommand)]
    Tenant(Box<tenant::Command>),
    /// Work with pools: sandboxes that are ready before they are asked for
    #[command(subcommand)]
    Pool(Box<pool::Command>),
    /// Work with the machines that run sandboxes
    #[command(subcommand)]
    Node(Box<node::Command>),
    /// Say what this machine can and cannot do, and what to do about it
    Doctor {
        /// Print a JSON object instead of text
        #[arg(long)]
        json: bool,
        /// As <https://no-color.org> has it: whatever it is, if it is anything
        #[arg(long, env = "NO_COLOR", hide = true, default_value = "", hide_env = true)]
        no_color: String,
        #[command(flatten)]
        options: Box<Options>,
    },
    /// Print the API's contract (OpenAPI 3.1, YAML)
    Openapi,
    /// Print what a shell needs to complete these commands
    #[command(after_help = "As in: mayfly completions bash > /etc/bash_completion.d/mayfly")]
    Completions { shell: Shell },
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Import an image: an OCI archive, what `docker save` wrote, an OCI layout folder, or the folder of a root file system
    Import(Box<image::Arguments>),
    /// Have the service pull an image from a registry
    Pull(Box<image::pull::Arguments>),
    /// Have the service push an image to a registry
    Push(Box<image::push::Arguments>),
    #[command(flatten)]
    Kept(Box<image::kept::Command>),
}

/// Does what the command line says. An error is one line on stderr and a failure; `run` and `exec` pass on the program's exit code, and have one for
/// failures of their own.
pub fn run() -> ExitCode {
    sandbox_core::fail_point::arm();
    let line = match Line::try_parse() {
        Ok(line) => line,
        Err(error) => return unparsed(&error),
    };
    let done = match line.command {
        Command::Run(arguments) => return passed_on(run::run(*arguments)),
        Command::Exec(arguments) => return passed_on(exec::run(*arguments)),
        Command::Ps(arguments) => list::sandboxes(arguments),
        Command::Logs(arguments) => logs::run(*arguments),
        Command::Cp(arguments) => copy::run(arguments),
        Command::Stop(arguments) => life::stop(arguments),
        Command::Rm(arguments) => life::remove(arguments),
        Command::Images(arguments) => list::images(arguments),
        Command::Pull(arguments) => pull::run(arguments),
        Command::Serve(options) => options.settle().and_then(serve::run),
        Command::Migrate(arguments) => migrate::run(arguments),
        Command::Token(arguments) => token::run(*arguments),
        Command::Image(ImageCommand::Import(arguments)) => image::run(*arguments),
        Command::Image(ImageCommand::Pull(arguments)) => image::pull::run(*arguments),
        Command::Image(ImageCommand::Push(arguments)) => image::push::run(*arguments),
        Command::Image(ImageCommand::Kept(command)) => image::kept::run(*command),
        Command::Tenant(command) => tenant::run(*command),
        Command::Pool(command) => pool::run(*command),
        Command::Node(command) => node::run(*command),
        Command::Doctor { json, no_color, options } => match examine(*options, json, no_color.is_empty() && io::stdout().is_terminal()) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
        Command::Openapi => print(crate::api::openapi()),
        Command::Completions { shell } => print(completions(shell)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

/// What a program's end was, or ours.
fn passed_on(code: anyhow::Result<u8>) -> ExitCode {
    match code {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(&error, frame::OWN_FAULT),
    }
}

fn failed(error: &anyhow::Error, code: u8) -> ExitCode {
    /// 128 and SIGPIPE: what ends other programs whose output nobody reads.
    const UNREAD: u8 = 141;
    let is_unread = error.is::<output::OutputClosed>()
        || error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
    if is_unread {
        return ExitCode::from(UNREAD);
    }
    // Some of it a stranger may have written, as the names in an archive.
    let text: Vec<String> = format!("{error:#}").lines().map(table::plain).collect();
    // Where stderr is closed nobody hears it; the exit code says it too.
    drop(writeln!(io::stderr(), "mayfly: {}", text.join("\n")));
    ExitCode::from(code)
}

/// Help, or what is wrong with the command line. What runs programs has a code for that which is none of theirs.
fn unparsed(error: &clap::Error) -> ExitCode {
    const USAGE: u8 = 2;
    // As above.
    drop(error.print());
    let runs_programs = std::env::args_os().nth(1).is_some_and(|word| word == "run" || word == "exec");
    ExitCode::from(match (error.use_stderr(), runs_programs) {
        (false, _) => 0,
        (true, true) => frame::OWN_FAULT,
        (true, false) => USAGE,
    })
}

fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Line::command(), "mayfly", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Whether nothing is missing that serving needs.
fn examine(options: Options, is_json: bool, is_coloured: bool) -> anyhow::Result<bool> {
    let report = doctor::examine(&options.settle()?)?;
    print(if is_json { serde_json::to_string_pretty(&report)? } else { report.text(is_coloured) })?;
    Ok(report.ok)
}

/// Writes a line to stdout.
fn print(text: impl AsRef<str>) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", text.as_ref().trim_end())?;
    Ok(stdout.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Line::command().debug_assert();
    }
}
