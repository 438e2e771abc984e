//! A Postgres server of a test's own, reached by TCP as in production.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use crate::{image, service};

/// A Postgres of the machine's, as an operator would have one: over TCP, with a password.
#[derive(Debug)]
pub struct Database {
    folder: tempfile::TempDir,
    bin: String,
    pub url: String,
}

impl Database {
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(service::folder().unwrap(), "")
    }

    /// With a certificate of its own for localhost, and another one that is not its own.
    #[must_use]
    pub fn start_with_tls() -> Self {
        let folder = service::folder().unwrap();
        let path = |name: &str| folder.path().join(name);
        for (cert, key) in [("cert.pem", "key.pem"), ("other.pem", "other-key.pem")] {
            let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            fs::write(path(cert), certified.cert.pem()).unwrap();
            fs::write(path(key), certified.signing_key.serialize_pem()).unwrap();
            fs::set_permissions(path(key), fs::Permissions::from_mode(0o600)).unwrap();
        }
        image::run(Command::new("chown").arg("nobody").arg(path("key.pem"))).unwrap();
        let options = format!(" -c ssl=on -c ssl_cert_file={} -c ssl_key_file={}", path("cert.pem").display(), path("key.pem").display());
        Self::start_in(folder, &options)
    }

    fn start_in(folder: tempfile::TempDir, further: &str) -> Self {
        let bin = newest_postgres();
        image::run(Command::new("chown").arg("nobody").arg(folder.path())).unwrap();
        let data = folder.path().join("data");
        let password = folder.path().join("password");
        fs::write(&password, "not:so/simple").unwrap();
        image::run(Command::new("chown").arg("nobody").arg(&password)).unwrap();
        let port = free_port();
        let options = format!(
            "-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={} -c fsync=off{further}",
            folder.path().display()
        );
        image::run(
            as_nobody(&format!("{bin}/initdb"))
                .args(["-U", "mayfly", "--auth=scram-sha-256", "--no-sync", "-D"])
                .arg(&data)
                .arg(format!("--pwfile={}", password.display())),
        )
        .unwrap();
        image::run(
            as_nobody(&format!("{bin}/pg_ctl"))
                .args(["-w", "-s", "-l"])
                .arg(folder.path().join("log"))
                .args(["-o", &options, "-D"])
                .arg(&data)
                .arg("start"),
        )
        .unwrap();
        let url = format!("postgres://mayfly:not%3Aso%2Fsimple@127.0.0.1:{port}/postgres");
        Self { folder, bin, url }
    }

    /// Where its files lie: certificates too.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What a query of one value answers.
    #[must_use]
    pub fn ask(&self, query: &str) -> String {
        let output = Command::new(format!("{}/psql", self.bin)).args([&self.url, "-Atqc", query]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let stop = image::run(
            as_nobody(&format!("{}/pg_ctl", self.bin))
                .args(["-s", "-m", "immediate", "-D"])
                .arg(self.folder.path().join("data"))
                .arg("stop"),
        );
        if let Err(error) = stop {
            eprintln!("{error:#}");
        }
    }
}

fn as_nobody(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.current_dir("/").args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--", program]);
    command
}

fn newest_postgres() -> String {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap().flatten();
    let newest = versions.filter_map(|v| v.file_name().to_str()?.parse::<u32>().ok()).max().expect("Postgres is installed");
    format!("/usr/lib/postgresql/{newest}/bin")
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
