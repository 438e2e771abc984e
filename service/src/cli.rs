//! The command line: what can be asked of the binary, and how it answers.

mod api;
mod image;
mod node;
mod tenant;
mod token;

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

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
    /// Serve the API until SIGTERM or SIGINT
    Serve(Box<Options>),
    /// Make a token for the API and print it
    Token(Box<token::Arguments>),
    /// Work with images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Work with tenants, their quotas and their principals
    #[command(subcommand)]
    Tenant(Box<tenant::Command>),
    /// Work with the machines that run sandboxes
    #[command(subcommand)]
    Node(Box<node::Command>),
    /// Say what this machine can and cannot do, and what to do about it
    Doctor {
        /// Print a JSON object instead of text
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: Box<Options>,
    },
    /// Print the API's contract (OpenAPI 3.1, YAML)
    Openapi,
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

/// Does what the command line says. An error is one line on stderr and a failure.
pub fn run() -> ExitCode {
    sandbox_core::fail_point::arm();
    let done = match Line::parse().command {
        Command::Serve(options) => options.settle().and_then(serve::run),
        Command::Token(arguments) => token::run(*arguments),
        Command::Image(ImageCommand::Import(arguments)) => image::run(*arguments),
        Command::Image(ImageCommand::Pull(arguments)) => image::pull::run(*arguments),
        Command::Image(ImageCommand::Push(arguments)) => image::push::run(*arguments),
        Command::Image(ImageCommand::Kept(command)) => image::kept::run(*command),
        Command::Tenant(command) => tenant::run(*command),
        Command::Node(command) => node::run(*command),
        Command::Doctor { json, options } => match examine(*options, json) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
        Command::Openapi => print(crate::api::openapi()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where stderr is closed nobody hears it; the exit code says it too.
            drop(writeln!(io::stderr(), "mayfly: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing is missing that serving needs.
fn examine(options: Options, is_json: bool) -> anyhow::Result<bool> {
    let report = doctor::examine(&options.settle()?)?;
    print(if is_json { serde_json::to_string_pretty(&report)? } else { report.text(io::stdout().is_terminal()) })?;
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
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Line::command().debug_assert();
    }
}
