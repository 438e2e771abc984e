//! The private Postgres of a service, asked directly: what the rows say, whatever the service says.

use std::{
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::unistd::{Uid, User};
use serde_json::Value;

/// The cluster in a service's data folder.
#[derive(Debug, Clone)]
pub struct Database {
    folder: PathBuf,
    user: String,
    uid: u32,
    gid: u32,
}

impl Database {
    /// The one of the service over `data_dir`.
    ///
    /// # Errors
    /// There is none.
    pub fn of(data_dir: &Path) -> Result<Self> {
        let folder = data_dir.join("postgres");
        let owner = fs::metadata(&folder).with_context(|| folder.display().to_string())?;
        let (uid, gid) = (owner.uid(), owner.gid());
        let user = User::from_uid(Uid::from_raw(uid))?.with_context(|| format!("no user has the number {uid}"))?.name;
        Ok(Self { folder, user, uid, gid })
    }

    /// The server's first process.
    ///
    /// # Errors
    /// There is none.
    pub fn postmaster(&self) -> Result<u32> {
        let lock = self.folder.join("data/postmaster.pid");
        let text = fs::read_to_string(&lock).with_context(|| lock.display().to_string())?;
        Ok(text.lines().next().context("an empty lock")?.trim().parse()?)
    }

    /// A process of the server's that serves a client of ours.
    ///
    /// # Errors
    /// There is none, or the server does not answer.
    pub fn backend(&self) -> Result<u32> {
        let rows = self.ask("select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()")?;
        let pid = rows.first().and_then(|row| row["pid"].as_u64()).context("nobody is connected")?;
        Ok(u32::try_from(pid)?)
    }

    /// How many clients are connected beside the one that asks.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn clients(&self) -> Result<u64> {
        let query = "select count(*) as n from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
        self.ask(query)?.first().and_then(|row| row["n"].as_u64()).context("a count")
    }

    /// The rows of a query's answer, as objects.
    ///
    /// # Errors
    /// The server does not answer, or not well.
    pub fn ask(&self, query: &str) -> Result<Vec<Value>> {
        let query = format!("select coalesce(json_agg(answer), '[]') from ({query}) as answer");
        let mut psql = Command::new("psql");
        psql.uid(self.uid).gid(self.gid).current_dir("/").stdin(Stdio::null());
        psql.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("PGCONNECT_TIMEOUT", "10");
        psql.arg("-h").arg(self.folder.join("run")).args([
            "-U",
            &self.user,
            "-d",
            "mayfly",
            "-XAtqw",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            &query,
        ]);
        let output = psql.output().context("psql")?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Whether the server answers.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.ask("select 1 as one").is_ok()
    }
}
