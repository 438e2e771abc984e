//! A client for Python that openapi-python-client generates from `openapi.yaml`. `tools/setup.sh test` installs the generator beside what is built.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

use crate::{Client, service::program};

/// The generated package, until it is dropped.
#[derive(Debug)]
pub struct Sdk {
    folder: TempDir,
    /// What the generator said.
    pub said: String,
}

impl Sdk {
    /// Generates it; panics if the generator fails.
    #[must_use]
    pub fn generate() -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().expect("a folder can be made");
        let output = Command::new(tool("openapi-python-client"))
            .args(["generate", "--meta", "none"])
            .arg("--path")
            .arg(here.join("../openapi.yaml"))
            .arg("--config")
            .arg(here.join("sdk/config.yaml"))
            .arg("--output-path")
            .arg(folder.path().join("mayfly_client"))
            // Lines are not to be broken for a terminal.
            .envs([("NO_COLOR", "1"), ("COLUMNS", "400")])
            .output()
            .expect("the generator is installed: tools/setup.sh test");
        let said = said(&output);
        assert!(output.status.success(), "{said}");
        Self { folder, said }
    }

    /// What `sdk/use.py` prints, which does with it what users do, as this client; panics if that fails.
    #[must_use]
    pub fn used_by(&self, client: &Client) -> String {
        let output = Command::new(tool("python"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk/use.py"))
            .env("PYTHONPATH", self.folder.path())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("MAYFLY_URL", &client.place().url)
            .env("MAYFLY_TOKEN", client.token().expect("who uses it has a token"))
            .output()
            .expect("an environment has Python");
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// A program of the generator's environment.
fn tool(name: &str) -> PathBuf {
    let profile = program("mayfly");
    let target = profile.ancestors().nth(2).expect("programs lie in a profile's folder of the target folder");
    target.join("openapi-python-client/bin").join(name)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
