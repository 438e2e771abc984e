//! The unprivileged user that the service is, or becomes.

use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, bail, ensure};

/// A user of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    /// Its own group.
    pub gid: u32,
}

impl Account {
    /// The user of this name or number, whichever source the machine has its users from. `None` if there is none.
    pub fn find(user: &str) -> anyhow::Result<Option<Self>> {
        let output = Command::new("getent").args(["passwd", "--", user]).stdin(Stdio::null()).output().context("running getent")?;
        match output.status.code() {
            Some(0) => Self::parse(&String::from_utf8_lossy(&output.stdout)).map(Some),
            Some(2) => Ok(None),
            _ => bail!("getent passwd {user}: {}", last_words(&output)),
        }
    }

    /// Who this process is. A user id without an entry has its number for a name.
    pub fn current() -> anyhow::Result<Self> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let known = Self::find(&uid.to_string())?;
        Ok(Self { name: known.map_or_else(|| uid.to_string(), |account| account.name), uid, gid })
    }

    /// A line of passwd(5).
    fn parse(line: &str) -> anyhow::Result<Self> {
        let fields: Vec<_> = line.trim_end().split(':').collect();
        let [name, _, uid, gid, ..] = fields[..] else { bail!("getent said {line:?}") };
        Ok(Self { name: name.to_owned(), uid: uid.parse().context("a user id")?, gid: gid.parse().context("a group id")? })
    }

    /// A command that runs as this user, with nothing of our environment but `PATH`. To be this user already, or root, is required.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
        if rustix::process::geteuid().as_raw() != self.uid {
            // Setting a user id makes the standard library drop all further groups too.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }
}

/// Runs a command to its end and returns what it wrote to stdout; an error holds what it said on stderr.
pub(crate) fn finish(command: &mut Command) -> anyhow::Result<String> {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("running {}", Path::new(command.get_program()).display()))?;
    ensure!(output.status.success(), "{name} failed: {}", last_words(&output));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a program that failed said, in one line.
fn last_words(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(3);
    if lines.is_empty() { output.status.to_string() } else { lines[from..].join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_by_name_and_by_number() {
        let by_name = Account::find("root").unwrap().unwrap();
        assert_eq!((by_name.uid, by_name.gid), (0, 0));
        assert_eq!(Account::find("0").unwrap().unwrap(), by_name);
    }

    #[test]
    fn a_user_that_is_not_there_is_none() {
        assert_eq!(Account::find("no-such-user-of-mayfly").unwrap(), None);
    }

    #[test]
    fn a_name_that_looks_like_an_option_is_a_name() {
        assert_eq!(Account::find("--help").unwrap(), None);
    }

    #[test]
    fn what_a_failed_program_said_is_in_the_error() {
        let error = finish(Command::new("sh").args(["-c", "echo the reason >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh failed: the reason");
    }
}
