//! The private Postgres: a cluster in the data folder, on a unix socket alone, for whoever gives no database of their own.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::config::{Account, finish};

const DATABASE: &str = "mayfly";
const PORT: u16 = 5432;
/// Where Debian and its kin put one folder a major version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// How long a start may take, with the recovery of a cluster that crashed.
const START_S: &str = "120";
const STOP_S: &str = "30";
/// How long the workers of a server that was killed may take to notice.
const WORKERS_END: Duration = Duration::from_secs(10);
/// Beyond the service's own: for whoever looks into the database, and for a service that has not let go of its own yet.
const SPARE_CONNECTIONS: u32 = 30;
/// What `sun_path` of unix(7) holds, with its end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A cluster in a folder of ours, and the programs for it.
#[derive(Debug, Clone)]
pub struct Cluster {
    bin: PathBuf,
    /// Belongs to `account`; below it root touches nothing itself, so that no link in there can lead it astray.
    folder: PathBuf,
    account: Account,
    /// Whether it is to stay stopped. Held by whoever starts or stops it.
    is_over: Arc<Mutex<bool>>,
}

/// What became of a cluster that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revival {
    /// It was dead.
    Started,
    /// Its server is there.
    Runs,
    /// It was stopped on purpose.
    Stopping,
}

/// Whether somebody had started it before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Fresh,
    /// It ran already: its service was killed.
    Adopted,
}

impl Cluster {
    /// The cluster in `folder`, which must belong to `account`. Fails when there are no programs of Postgres, or none for the version
    /// that an existing cluster has.
    pub fn find(folder: &Path, account: &Account, bin_dir: Option<&Path>) -> anyhow::Result<Self> {
        let held = match fs::read_to_string(folder.join("data/PG_VERSION")) {
            Ok(text) => Some(text.trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| folder.join("data/PG_VERSION").display().to_string()),
        };
        let bin = find_programs(bin_dir, held.as_deref())?;
        let socket = folder.join(format!("run/.s.PGSQL.{PORT}"));
        let len = socket.as_os_str().len();
        ensure!(
            len <= SOCKET_PATH_BYTES_MAX,
            "the data folder's path is too long for a socket in it: {} bytes too many",
            len - SOCKET_PATH_BYTES_MAX
        );
        Ok(Self { bin, folder: folder.to_owned(), account: account.clone(), is_over: Arc::default() })
    }

    /// Makes the cluster if there is none, starts it — for so many connections — if it does not run, and makes sure of its database.
    pub fn start(&self, connections: u32) -> anyhow::Result<Start> {
        let start = if self.is_running() {
            Start::Adopted
        } else {
            if !self.data().join("PG_VERSION").exists() {
                self.create().context("making a private Postgres cluster")?;
            }
            self.launch(connections).with_context(|| format!("starting the private Postgres; its log is {}", self.log().display()))?;
            Start::Fresh
        };
        self.make_database()?;
        Ok(start)
    }

    /// Starts it again if its server is dead. Needs no privilege: to be its account will do.
    pub fn revive(&self, connections: u32) -> anyhow::Result<Revival> {
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_over {
            return Ok(Revival::Stopping);
        }
        if self.is_running() {
            return Ok(Revival::Runs);
        }
        self.launch(connections).with_context(|| format!("its log is {}", self.log().display()))?;
        Ok(Revival::Started)
    }

    /// Stops it: transactions in progress are rolled back, what was committed is on disk. It is not revived any more.
    pub fn stop(&self) -> anyhow::Result<()> {
        let mut is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        *is_over = true;
        if !self.is_running() {
            return Ok(());
        }
        finish(self.pg_ctl("stop").args(["-m", "fast", "-t", STOP_S])).context("stopping the private Postgres")?;
        Ok(())
    }

    /// How to connect to its database, as `account`.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.run())
            .port(PORT)
            .username(&self.account.name)
            .database(DATABASE)
            .ssl_mode(PgSslMode::Disable)
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn run(&self) -> PathBuf {
        self.folder.join("run")
    }

    fn lock(&self) -> PathBuf {
        self.data().join("postmaster.pid")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// Whether the process that the lock file names is this cluster's server: a server works in its data folder. After a crash of
    /// the machine the number may be anybody's.
    fn is_running(&self) -> bool {
        let lock = fs::read_to_string(self.lock());
        let pid = lock.ok().and_then(|lock| lock.lines().next()?.trim().parse().ok());
        pid.is_some_and(|pid| self.works_here(pid))
    }

    /// Waits for the workers of a server that was killed, and removes its locks. Postgres itself goes by the process number in them,
    /// which may be another program's by now, or that of a corpse that nobody has buried.
    fn remove_locks(&self) -> anyhow::Result<()> {
        let pids = || fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut waited = Duration::ZERO;
        while let Some(pid) = pids().find(|pid| self.works_here(*pid)) {
            ensure!(waited < WORKERS_END, "process {pid} of a server that was killed still works in {}", self.data().display());
            std::thread::sleep(Duration::from_millis(50));
            waited += Duration::from_millis(50);
        }
        let socket = self.run().join(format!(".s.PGSQL.{PORT}.lock"));
        finish(self.account.command("rm").args(["-f", "--"]).arg(self.lock()).arg(socket))?;
        Ok(())
    }

    fn works_here(&self, pid: u32) -> bool {
        let folder = fs::read_link(format!("/proc/{pid}/cwd"));
        folder.is_ok_and(|folder| fs::canonicalize(self.data()).is_ok_and(|data| data == folder))
    }

    /// Under another name first, so that an interrupted `initdb` is never taken for a cluster.
    fn create(&self) -> anyhow::Result<()> {
        let new = self.folder.join("new");
        finish(self.account.command("rm").arg("-rf").arg("--").arg(&new))?;
        let mut initdb = self.account.command(self.bin.join("initdb"));
        initdb.arg("-D").arg(&new).args(["-U", &self.account.name, "--auth-local=peer", "--auth-host=reject"]);
        initdb.args(["--data-checksums", "--encoding=UTF8", "--locale=C.UTF-8"]);
        finish(&mut initdb)?;
        finish(self.account.command("mv").arg("-T").arg("--").arg(&new).arg(self.data()))?;
        Ok(())
    }

    fn launch(&self, connections: u32) -> anyhow::Result<()> {
        finish(self.account.command("mkdir").args(["-p", "-m", "700", "--"]).arg(self.run()))?;
        if self.lock().exists() {
            self.remove_locks()?;
        }
        let mut options = OsString::from("-c unix_socket_directories=");
        options.push(quote_for_shell(&quote_for_list(self.run().as_os_str())));
        options.push(format!(" -c port={PORT} -c max_connections={}", connections + SPARE_CONNECTIONS));
        for setting in SETTINGS {
            options.push(" -c ");
            options.push(setting);
        }
        finish(self.pg_ctl("start").args(["-t", START_S, "-l"]).arg(self.log()).arg("-o").arg(options))?;
        Ok(())
    }

    fn make_database(&self) -> anyhow::Result<()> {
        let mut ask = self.client("psql");
        ask.args(["-X", "-A", "-t", "-q", "-d", "postgres", "-c", &format!("select 1 from pg_database where datname = '{DATABASE}'")]);
        let is_there = finish(&mut ask).context("asking the private Postgres for its databases")? == "1";
        if !is_there {
            finish(self.client("createdb").arg(DATABASE))?;
        }
        Ok(())
    }

    fn pg_ctl(&self, action: &str) -> std::process::Command {
        let mut command = self.account.command(self.bin.join("pg_ctl"));
        command.args([action, "-s", "-w", "-D"]).arg(self.data());
        command
    }

    fn client(&self, program: &str) -> std::process::Command {
        let mut command = self.account.command(self.bin.join(program));
        command.arg("-h").arg(self.run()).args(["-p", &PORT.to_string(), "-w", "-U", &self.account.name]);
        command
    }
}

/// What we set beside the defaults. Nothing here trades durability for speed.
const SETTINGS: &[&str] = &[
    "listen_addresses=''",
    "unix_socket_permissions=0700",
    // A run is answered when its outcome is on disk.
    "synchronous_commit=on",
    "fsync=on",
    "full_page_writes=on",
    // Fewer checkpoints, so fewer whole pages in the log, on a table that is written all the time.
    "max_wal_size=2GB",
    "checkpoint_timeout=15min",
    "wal_compression=on",
    // Our statements take a fraction of the time that compiling them would.
    "jit=off",
    // Rows live shortly in their first states: dead versions are cleared away before they slow the hot indexes.
    "autovacuum_vacuum_scale_factor=0.02",
    "autovacuum_naptime=20s",
    "max_logical_replication_workers=0",
    // A statement that fails is reported by the service; a tenant cannot fill this log.
    "log_min_messages=log",
    "log_checkpoints=off",
];

/// The folder of Postgres's programs: the one given, else the one for the version `held`, else the newest.
pub fn find_programs(given: Option<&Path>, held: Option<&str>) -> anyhow::Result<PathBuf> {
    const MISSING: &str = "Postgres is not installed here: apt-get install postgresql (Debian), or give --database-url";
    let installed = || -> Vec<PathBuf> {
        let mut versions: Vec<(u32, PathBuf)> = fs::read_dir(VERSIONS)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
            .collect();
        versions.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
        let elsewhere = ["/usr/local/pgsql/bin", "/usr/local/bin", "/usr/bin"].map(PathBuf::from);
        versions.into_iter().map(|(_, bin)| bin).chain(elsewhere).collect()
    };
    let candidates = given.map_or_else(installed, |bin| vec![bin.to_owned()]);
    let mut found = candidates.into_iter().filter(|bin| bin.join("initdb").exists() && bin.join("pg_ctl").exists()).peekable();
    let Some(newest) = found.peek().cloned() else { bail!(MISSING) };
    let Some(held) = held else { return Ok(newest) };
    for bin in found {
        if major_version(&bin)? == held {
            return Ok(bin);
        }
    }
    bail!(
        "the data folder holds a cluster of Postgres {held}, but here is Postgres {}: apt-get install postgresql-{held} (Debian), \
         or move it with pg_upgrade, or give --database-url",
        major_version(&newest)?
    )
}

/// The major version of these programs, as in `15`.
pub fn major_version(bin: &Path) -> anyhow::Result<String> {
    // «postgres (PostgreSQL) 15.14 (Debian …)»
    let said = finish(std::process::Command::new(bin.join("postgres")).arg("--version"))?;
    let version = said.split_whitespace().nth(2).and_then(|version| version.split(|c: char| !c.is_ascii_digit()).next());
    Ok(version.with_context(|| format!("postgres --version said {said:?}"))?.to_owned())
}

/// One element of a list in Postgres's own configuration syntax.
fn quote_for_list(text: &OsStr) -> OsString {
    surround(text, b'"', b"\"\"")
}

/// One word for the shell that `pg_ctl` starts the server with.
fn quote_for_shell(text: &OsStr) -> OsString {
    surround(text, b'\'', b"'\\''")
}

fn surround(text: &OsStr, quote: u8, inner: &[u8]) -> OsString {
    let mut quoted = vec![quote];
    for byte in text.as_bytes() {
        if *byte == quote {
            quoted.extend_from_slice(inner);
        } else {
            quoted.push(*byte);
        }
    }
    quoted.push(quote);
    OsStr::from_bytes(&quoted).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_quotes_stays_one_word() {
        assert_eq!(quote_for_shell(OsStr::new("/a'b c")), "'/a'\\''b c'");
        assert_eq!(quote_for_list(OsStr::new("/a\"b,c")), "\"/a\"\"b,c\"");
    }

    #[test]
    fn a_folder_without_programs_is_answered_with_what_to_install() {
        let folder = tempfile::tempdir().unwrap();
        let error = find_programs(Some(folder.path()), None).unwrap_err().to_string();
        assert!(error.contains("apt-get install postgresql") && error.contains("--database-url"), "{error}");
    }

    #[test]
    fn a_cluster_of_another_version_is_named_with_both() {
        let error = find_programs(None, Some("9")).unwrap_err().to_string();
        assert!(error.contains("Postgres 9") && error.contains("postgresql-9"), "{error}");
    }

    #[test]
    fn a_data_folder_too_deep_for_a_socket_is_refused_before_anything_is_made() {
        let folder = Path::new("/").join("x".repeat(200));
        let error = Cluster::find(&folder, &Account::current().unwrap(), None).unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }

    /// As root through an ordinary user, as the service does it.
    #[test]
    fn a_cluster_is_made_adopted_restarted_after_a_crash_and_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let account =
            if rustix::process::geteuid().is_root() { Account::find("nobody").unwrap().unwrap() } else { Account::current().unwrap() };
        std::os::unix::fs::chown(folder.path(), Some(account.uid), Some(account.gid)).unwrap();
        let cluster = Cluster::find(folder.path(), &account, None).unwrap();

        assert_eq!(cluster.start(10).unwrap(), Start::Fresh);
        assert_eq!(cluster.start(10).unwrap(), Start::Adopted);
        let lock = fs::read_to_string(cluster.lock()).unwrap();
        let pid = rustix::process::Pid::from_raw(lock.lines().next().unwrap().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        while cluster.is_running() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(cluster.start(10).unwrap(), Start::Fresh);
        cluster.stop().unwrap();
        assert!(!cluster.is_running());
    }
}
