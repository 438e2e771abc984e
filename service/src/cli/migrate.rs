//! `mayfly migrate`: brings the schema of a database up to this version, once for all nodes, before services of it start.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use crate::{config::Options, serve};

/// What `serve` is told of the database.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// TOML file with the settings of `serve`
    #[arg(long, env = "MAYFLY_CONFIG", value_name = "PATH")]
    config: Option<PathBuf>,
    /// URL of the Postgres database (also DATABASE_URL)
    #[arg(long, env = "MAYFLY_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
    #[arg(long, env = "DATABASE_URL", hide = true, hide_env_values = true)]
    usual_database_url: Option<String>,
}

/// What is done already is not done again, and others who do the same at one time wait for it.
pub(super) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { config, database_url, usual_database_url } = arguments;
    let settings = Options { config, database_url, usual_database_url, ..Options::default() }.settle()?;
    let url = settings.database_url.context("no database is named: give --database-url; a private one is migrated by its service")?;
    serve::migrate(&url)?;
    super::print("the schema is up to date")
}
