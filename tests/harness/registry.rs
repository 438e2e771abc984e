//! A registry of one's own: Debian's `docker-registry` on loopback, filled by `skopeo`.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{image, service};

const START_DEADLINE: Duration = Duration::from_secs(30);
/// Who may use one that does not take everybody. Its hash is bcrypt's, with the fewest rounds that there are.
pub const USER: &str = "tester";
pub const PASSWORD: &str = "open sesame";
const HTPASSWD: &str = "tester:$2b$04$6sV0nIB6Q7IIUBuP7MFmJOhAGseRGJvyEOhCpZhB0bmtST.6MRh.6\n";

/// One that runs until this is dropped.
#[derive(Debug)]
pub struct Registry {
    /// As in `127.0.0.1:5000`.
    pub address: String,
    folder: tempfile::TempDir,
    child: Child,
}

/// How a registry is spoken to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manners {
    /// By TLS, with a certificate that [`Registry::certificate`] vouches for.
    pub tls: bool,
    /// Only by who has [`PASSWORD`].
    pub password: bool,
}

impl Registry {
    /// Starts an empty one on any free port.
    ///
    /// # Errors
    /// It is not installed, or did not come to listen.
    pub fn start(manners: Manners) -> Result<Self> {
        let folder = service::folder()?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut config = format!(
            "version: 0.1\nlog: {{ level: info, formatter: text }}\nstorage: {{ filesystem: {{ rootdirectory: '{}' }} }}\nhttp:\n  addr: '127.0.0.1:0'\n",
            path("content")
        );
        if manners.tls {
            let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
            fs::write(path("cert.pem"), certified.cert.pem())?;
            fs::write(path("key.pem"), certified.signing_key.serialize_pem())?;
            writeln!(config, "  tls: {{ certificate: '{}', key: '{}' }}", path("cert.pem"), path("key.pem"))?;
        }
        if manners.password {
            fs::write(path("htpasswd"), HTPASSWD)?;
            writeln!(config, "auth: {{ htpasswd: {{ realm: tests, path: '{}' }} }}", path("htpasswd"))?;
        }
        fs::write(path("config.yml"), config)?;
        let mut child = Command::new("docker-registry")
            .args(["serve", &path("config.yml")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("docker-registry is installed: tools/setup.sh test")?;
        let stderr = child.stderr.take().context("piped")?;
        let mut registry = Self { address: String::new(), folder, child };
        registry.address = listening(stderr)?;
        Ok(registry)
    }

    /// What vouches for it.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.folder.path().join("cert.pem")
    }

    /// Puts an image there, under `to` as in `app:1`; `source` is in the words of `skopeo`, as are further options of its `copy`.
    ///
    /// # Errors
    /// `skopeo` says why.
    pub fn push(&self, source: &str, to: &str, options: &[&str]) -> Result<()> {
        let target = format!("docker://{}/{to}", self.address);
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--dest-tls-verify=false", "--dest-creds", &format!("{USER}:{PASSWORD}")]);
        image::run(command.args(options).args([source, &target]))
    }

    /// [`Self::push`] of an archive.
    ///
    /// # Errors
    /// `skopeo` says why.
    pub fn push_archive(&self, archive: &Path, to: &str) -> Result<()> {
        self.push(&format!("oci-archive:{}", archive.display()), to, &[])
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // One that has ended by itself is what we want.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The address in its log, which is read to its end: it is not to wait for us.
fn listening(log: impl std::io::Read + Send + 'static) -> Result<String> {
    let (lines, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            // Whoever wanted the address has it.
            lines.send(line).ok();
        }
    });
    let mut all = String::new();
    while let Ok(line) = said.recv_timeout(START_DEADLINE) {
        if let Some((_, rest)) = line.split_once("listening on ") {
            let end = rest.find([',', '"', ' ']).unwrap_or(rest.len());
            return Ok(rest[..end].to_owned());
        }
        writeln!(all, "{line}")?;
    }
    anyhow::bail!("docker-registry did not come to listen: {all}")
}
