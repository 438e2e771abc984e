//! A Postgres of the machine's, as an operator would have one: over TCP, with a password. Stopped, killed, brought to a halt, and back.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{host, image, service};

/// A server of a test's own; ended when dropped.
#[derive(Debug)]
pub struct Database {
    folder: tempfile::TempDir,
    bin: String,
    port: u16,
    options: String,
    /// As a client is told.
    pub url: String,
}

impl Database {
    /// Starts one.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(service::folder().expect("a folder can be made"), "")
    }

    /// With a certificate of its own for localhost, and another one that is not its own.
    #[must_use]
    pub fn start_with_tls() -> Self {
        let folder = service::folder().expect("a folder can be made");
        let path = |name: &str| folder.path().join(name);
        for (cert, key) in [("cert.pem", "key.pem"), ("other.pem", "other-key.pem")] {
            let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a name is all it needs");
            fs::write(path(cert), certified.cert.pem()).expect("the folder is ours");
            fs::write(path(key), certified.signing_key.serialize_pem()).expect("the folder is ours");
            fs::set_permissions(path(key), fs::Permissions::from_mode(0o600)).expect("the file is ours");
        }
        run(Command::new("chown").arg("nobody").arg(path("key.pem")));
        let options = format!(" -c ssl=on -c ssl_cert_file={} -c ssl_key_file={}", path("cert.pem").display(), path("key.pem").display());
        Self::start_in(folder, &options)
    }

    fn start_in(folder: tempfile::TempDir, further: &str) -> Self {
        let bin = newest_programs();
        run(Command::new("chown").arg("nobody").arg(folder.path()));
        let password = folder.path().join("password");
        fs::write(&password, "not:so/simple").expect("the folder is root's too");
        run(Command::new("chown").arg("nobody").arg(&password));
        let port = free_port();
        let options = format!(
            "-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={} -c fsync=off{further}",
            folder.path().display()
        );
        let url = format!("postgres://mayfly:not%3Aso%2Fsimple@127.0.0.1:{port}/postgres");
        let postgres = Self { folder, bin, port, options, url };
        let mut initdb = postgres.program("initdb");
        initdb.args(["-U", "mayfly", "--auth=scram-sha-256", "--no-sync", "-D"]).arg(postgres.data());
        run(initdb.arg(format!("--pwfile={}", password.display())));
        postgres.start_again();
        postgres
    }

    /// Starts it after it was stopped or killed.
    pub fn start_again(&self) {
        let log = self.folder.path().join("log");
        run(self.program("pg_ctl").args(["-w", "-s", "-l"]).arg(log).args(["-o", &self.options, "-D"]).arg(self.data()).arg("start"));
    }

    /// Stops it as an operator would: connections are ended.
    pub fn stop(&self) {
        run(self.program("pg_ctl").args(["-w", "-s", "-m", "fast", "-D"]).arg(self.data()).arg("stop"));
    }

    /// `kill -9` of its first process. Returns when the others have noticed.
    pub fn kill(&self) {
        let all = self.processes();
        signal(all[0], Signal::SIGKILL);
        let started = Instant::now();
        while all.iter().any(|pid| works_in(*pid, &self.data())) {
            assert!(started.elapsed() < Duration::from_secs(20), "its workers are still there");
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::remove_file(self.data().join("postmaster.pid")).expect("a server that is killed leaves its lock");
    }

    /// Has all of its processes stand still: connections stay, and nothing answers.
    pub fn halt(&self) {
        for pid in self.processes() {
            signal(pid, Signal::SIGSTOP);
        }
    }

    /// Has them go on.
    pub fn go_on(&self) {
        for pid in self.processes() {
            signal(pid, Signal::SIGCONT);
        }
    }

    /// The first one, and then its children.
    fn processes(&self) -> Vec<u32> {
        let lock = fs::read_to_string(self.data().join("postmaster.pid")).expect("it runs");
        let first = lock.lines().next().and_then(|line| line.trim().parse().ok()).expect("the number of a process");
        let mut all = vec![first];
        all.extend(host::descendants(first));
        all
    }

    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Where its certificates are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Asks or tells it something by `psql`, and returns what that says.
    pub fn ask(&self, query: &str) -> String {
        let output = Command::new(format!("{}/psql", self.bin)).args([&self.url, "-Atqc", query]).output().expect("psql is there");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("our own text").trim().to_owned()
    }

    fn data(&self) -> std::path::PathBuf {
        self.folder.path().join("data")
    }

    /// One of its programs, as its user.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.current_dir("/").args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]).arg(format!("{}/{name}", self.bin));
        command
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if !self.data().join("postmaster.pid").exists() {
            return;
        }
        self.go_on();
        let stopped = image::run(self.program("pg_ctl").args(["-s", "-m", "immediate", "-D"]).arg(self.data()).arg("stop"));
        if let Err(error) = stopped {
            eprintln!("{error:#}");
        }
    }
}

#[track_caller]
fn run(command: &mut Command) {
    image::run(command).unwrap_or_else(|error| panic!("{error:#}"));
}

fn signal(pid: u32, signal: Signal) {
    // One that has ended since it was listed has nothing to hear.
    kill(Pid::from_raw(pid.cast_signed()), signal).ok();
}

fn works_in(pid: u32, folder: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder)
}

fn newest_programs() -> String {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("Postgres is installed").flatten();
    let newest = versions.filter_map(|v| v.file_name().to_str()?.parse::<u32>().ok()).max().expect("Postgres is installed");
    format!("/usr/lib/postgresql/{newest}/bin")
}

fn free_port() -> u16 {
    let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    address.expect("loopback has free ports").port()
}
