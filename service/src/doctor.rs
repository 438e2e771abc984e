//! `mayfly doctor`: what this machine can and cannot do, and what to do about it.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use sandbox_core::probe::{self, Check, Status};
use serde::Serialize;

use crate::{
    config::{Account, Settings},
    postgres,
};

/// What was found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Whether nothing that is required is missing.
    pub(crate) ok: bool,
    checks: Vec<Check>,
}

/// Looks at everything that serving with these settings needs. The process must have one thread.
pub(crate) fn examine(settings: &Settings) -> anyhow::Result<Report> {
    let mut checks = probe::run(&settings.data_dir, settings.selinux_labels.as_ref());
    checks.extend([database(settings), user(settings)?]);
    checks.push(port("API address", settings.listen));
    checks.push(port("metrics address", settings.metrics_listen));
    Ok(Report { ok: checks.iter().all(|check| check.status != Status::Fail), checks })
}

fn check(name: &'static str, status: Status, found: impl Into<String>, advice: impl Into<String>) -> Check {
    Check { name, status, found: found.into(), advice: advice.into() }
}

fn database(settings: &Settings) -> Check {
    const NAME: &str = "Postgres";
    if settings.database_url.is_some() {
        return check(NAME, Status::Ok, "a database of yours (--database-url); its programs are not needed", "");
    }
    let held = std::fs::read_to_string(settings.data_dir.join("postgres/data/PG_VERSION")).ok();
    let found = postgres::find_programs(settings.postgres_bin_dir.as_deref(), held.as_deref().map(str::trim));
    match found.and_then(|bin| Ok((postgres::major_version(&bin)?, bin))) {
        Ok((version, bin)) => check(NAME, Status::Ok, format!("version {version} in {}", bin.display()), ""),
        Err(error) => check(NAME, Status::Fail, "no programs for the private cluster", error.to_string()),
    }
}

fn user(settings: &Settings) -> anyhow::Result<Check> {
    const NAME: &str = "service user";
    let name = &settings.user;
    Ok(match Account::find(name)? {
        Some(Account { uid: 0, .. }) => check(NAME, Status::Fail, format!("{name} is root"), "give an ordinary user with --user"),
        Some(account) => check(NAME, Status::Ok, format!("{name} ({})", account.uid), ""),
        None => check(
            NAME,
            Status::Fail,
            format!("there is no user {name}"),
            format!("useradd --system --user-group {name}, or give another --user"),
        ),
    })
}

fn port(name: &'static str, address: SocketAddr) -> Check {
    match TcpListener::bind(address) {
        Ok(_) => check(name, Status::Ok, format!("{address} is free"), ""),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            check(name, Status::Warn, format!("{address} is in use"), "well if that is mayfly; otherwise give another address")
        }
        Err(error) => check(name, Status::Fail, format!("{address}: {error}"), "give another address"),
    }
}

impl Report {
    /// For people, one check a line, its advice below it.
    pub(crate) fn text(&self, is_coloured: bool) -> String {
        let width = self.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or_default();
        let mut lines = Vec::new();
        for Check { name, status, found, advice } in &self.checks {
            let (word, colour) = match status {
                Status::Ok => ("ok  ", 32),
                Status::Warn => ("warn", 33),
                Status::Fail => ("FAIL", 31),
            };
            let word = if is_coloured { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() };
            lines.push(format!("{word}  {name:width$}  {found}"));
            if !advice.is_empty() {
                lines.push(format!("      {:width$}  → {advice}", ""));
            }
        }
        lines.push(if self.ok { "This machine can serve." } else { "This machine cannot serve yet: see FAIL above." }.to_owned());
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Options;

    fn settings() -> Settings {
        Options::default().settle().unwrap()
    }

    #[test]
    fn missing_programs_of_postgres_fail_with_what_to_install() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { postgres_bin_dir: Some(folder.path().to_owned()), data_dir: folder.path().to_owned(), ..settings() };
        let check = database(&settings);
        assert_eq!(check.status, Status::Fail);
        assert!(check.advice.contains("apt-get install postgresql"), "{}", check.advice);
    }

    #[test]
    fn a_database_of_ones_own_needs_no_programs() {
        let settings = Settings { database_url: Some("postgres://somewhere".into()), ..settings() };
        assert_eq!(database(&settings).status, Status::Ok);
    }

    #[test]
    fn a_missing_user_fails_and_root_does_too() {
        assert_eq!(user(&Settings { user: "no-such-user-of-mayfly".into(), ..settings() }).unwrap().status, Status::Fail);
        assert_eq!(user(&Settings { user: "root".into(), ..settings() }).unwrap().status, Status::Fail);
    }

    #[test]
    fn a_port_in_use_is_a_warning() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(port("x", taken.local_addr().unwrap()).status, Status::Warn);
    }

    #[test]
    fn advice_stands_below_what_it_is_about() {
        let checks = vec![check("one", Status::Ok, "there", ""), check("three", Status::Fail, "missing", "do this")];
        let text = Report { ok: false, checks }.text(false);
        assert_eq!(text.lines().take(3).collect::<Vec<_>>(), ["ok    one    there", "FAIL  three  missing", "             → do this"]);
    }
}
