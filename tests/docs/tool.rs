//! The programs that run examples. `tools/setup.sh test` installs what they need beside what is built.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use mayfly_tests::service::{self, program};
use tempfile::TempDir;

/// A loaded machine compiles TypeScript slowly.
const DEADLINE: Duration = Duration::from_secs(180);

/// Where an example runs: a folder that is empty at first, with these variables.
#[derive(Debug)]
pub(crate) struct Desk {
    folder: TempDir,
    variables: Vec<(String, String)>,
}

impl Desk {
    pub(crate) fn new(variables: &[(&str, &str)]) -> Self {
        // Below it the modules of npm are found.
        let folder = tempfile::tempdir_in(beside_programs("docs-node")).expect("tools/setup.sh test has made it");
        Self { folder, variables: variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect() }
    }

    /// A file that is there.
    pub(crate) fn put(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).unwrap();
    }

    /// What it says on both streams; an error if it fails.
    pub(crate) fn run(&self, language: &str, text: &str) -> Result<String, String> {
        match language {
            "sh" => self.say(Command::new("bash").args(["-euo", "pipefail", "-c", text])),
            "python" => {
                self.put("example.py", text);
                self.say(Command::new(beside_programs("docs-python").join("bin/python")).arg("example.py"))
            }
            "ts" => {
                self.put("example.ts", text);
                // Its types are checked, and it becomes what Node runs.
                let rules = r#"{ "extends": "../tsconfig.json", "files": ["example.ts"] }"#;
                self.put("tsconfig.json", rules);
                let compiled = self.say(Command::new("node").arg(beside_programs("docs-node").join("node_modules/typescript/bin/tsc")))?;
                Ok(compiled + &self.say(Command::new("node").arg("example.js"))?)
            }
            _ => Err(format!("nothing runs {language:?}")),
        }
    }

    fn say(&self, command: &mut Command) -> Result<String, String> {
        let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", folder_of(&program("mayfly")).display());
        command.env_clear().env("PATH", path).env("HOME", self.folder.path()).env("PYTHONDONTWRITEBYTECODE", "1").env("TERM", "dumb");
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).current_dir(self.folder.path());
        let (status, said) = service::finish(command, DEADLINE).map_err(|error| format!("{error:#}"))?;
        if status.success() { Ok(said) } else { Err(format!("{status}: {said}")) }
    }
}

fn folder_of(file: &Path) -> &Path {
    file.parent().expect("a file lies in a folder")
}

/// What `tools/setup.sh test` installs in the target folder.
pub(crate) fn beside_programs(name: &str) -> PathBuf {
    folder_of(folder_of(&program("mayfly"))).join(name)
}
