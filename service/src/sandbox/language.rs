//! Languages by name: which image, which file, which command. Built in, and extended or replaced by an operator's TOML file.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use sandbox_core::files::PATH_BYTES_MAX;
use serde::Deserialize;

use super::{ImageReference, Invalid, Limits, RequestedCompileLimits, RequestedLimits};

const BUILT_IN: &str = include_str!("languages.toml");

/// How source text in one language becomes a program that runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Language {
    /// Its name for people.
    pub title: String,
    /// Of its compiler or interpreter, as the operator states it: the image decides.
    pub version: String,
    /// What it runs in.
    pub image: String,
    /// Where the source text is put, relative to the image's working folder.
    pub file: String,
    /// Program and arguments of the compile step, if there is one.
    #[serde(default)]
    pub compile: Option<Vec<String>>,
    /// Program and arguments.
    pub run: Vec<String>,
    /// Limits of its runs where a request names none, as far as they differ from those of other runs.
    #[serde(default)]
    pub limits: RequestedLimits,
    /// The same of its compile step.
    #[serde(default)]
    pub compile_limits: RequestedCompileLimits,
}

/// All languages, each proven to be sound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Languages(BTreeMap<String, Language>);

impl Languages {
    /// Those that are built in, under those of an operator's file, if there is one. Fails naming the language and the field that will not do.
    pub fn read(operators: Option<&str>) -> anyhow::Result<Self> {
        let mut all = parse(BUILT_IN).expect("a test reads what is built in");
        all.extend(operators.map(parse).transpose()?.unwrap_or_default());
        Ok(Self(all))
    }

    pub fn get(&self, name: &str) -> Option<&Language> {
        self.0.get(name)
    }

    /// By name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Language)> {
        self.0.iter().map(|(name, language)| (name.as_str(), language))
    }

    /// The names, for people.
    pub fn names(&self) -> String {
        self.0.keys().cloned().collect::<Vec<_>>().join(", ")
    }
}

fn parse(text: &str) -> anyhow::Result<BTreeMap<String, Language>> {
    let all: BTreeMap<String, Language> = toml::from_str(text)?;
    for (name, language) in &all {
        language.check(name).with_context(|| format!("the language {name}"))?;
    }
    Ok(all)
}

impl Language {
    fn check(&self, name: &str) -> anyhow::Result<()> {
        let is_named = (1..=32).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-".contains(&b));
        ensure!(is_named, "its name is 1 to 32 of a-z, 0-9, + and -, beginning with a letter");
        ImageReference::parse("image", self.image.clone())?;
        let is_file = (1..=PATH_BYTES_MAX).contains(&self.file.len())
            && self.file.split('/').all(|part| !matches!(part, "" | "." | ".."))
            && !self.file.contains('\0');
        ensure!(is_file, "file: a relative path through no `..`");
        for (field, command) in [("run", Some(&self.run)), ("compile", self.compile.as_ref())] {
            let Some(command) = command else { continue };
            ensure!(command.first().is_some_and(|program| !program.is_empty()), "{field}: a program, and its arguments");
            ensure!(command.iter().all(|arg| !arg.contains('\0')), "{field}: no argument can hold a zero byte");
        }
        self.limits_in_force()?;
        Ok(())
    }

    /// Limits of a run that asks for none, and of its compile step.
    pub fn limits_in_force(&self) -> Result<(Limits, Option<Limits>), Invalid> {
        Limits::of_steps(self.limits, self.compile.as_ref().map(|_| self.compile_limits.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        format!("{:#}", Languages::read(Some(text)).unwrap_err())
    }

    #[test]
    fn what_is_built_in_is_sound() {
        let languages = Languages::read(None).unwrap();
        assert!(languages.get("python").is_some_and(|python| python.file == "main.py"));
    }

    #[test]
    fn an_operators_language_goes_before_the_built_in_one_and_the_others_stay() {
        let own = "[python]\ntitle = \"Python\"\nversion = \"4\"\nimage = \"own\"\nfile = \"a.py\"\nrun = [\"python4\", \"a.py\"]\n";
        let languages = Languages::read(Some(own)).unwrap();
        assert_eq!(languages.get("python").map(|python| python.version.as_str()), Some("4"));
        assert!(languages.get("bash").is_some());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let language = |field: &str, value: &str| {
            let mut fields =
                BTreeMap::from([("title", "\"X\""), ("version", "\"1\""), ("image", "\"x\""), ("file", "\"main.x\""), ("run", "[\"x\"]")]);
            fields.insert(field, value);
            fields.iter().fold("[x]\n".to_owned(), |text, (field, value)| format!("{text}{field} = {value}\n"))
        };
        assert!(Languages::read(Some(&language("version", "\"2\""))).is_ok(), "the control failed");
        for (field, value) in [("image", "\"a b\""), ("file", "\"../x\""), ("file", "\"/x\""), ("run", "[]"), ("run", "[\"\"]")] {
            let fault = fault(&language(field, value));
            assert!(fault.contains("the language x") && fault.contains(field), "{field} = {value}: {fault}");
        }
        assert!(fault(&language("limits", "{ wall_ms = 0 }")).contains("limits.wall_ms"));
        assert!(fault(&language("compile", "[]")).contains("compile: a program"));
        let compiled = language("compile", "[\"cc\"]");
        assert!(Languages::read(Some(&compiled)).is_ok(), "the control failed");
        assert!(fault(&format!("{compiled}compile_limits = {{ pids = 0 }}\n")).contains("compile.limits.pids"));
        assert!(fault(&format!("{compiled}compile_limits = {{ disk_bytes = 65536 }}\n")).contains("disk_bytes"));
        assert!(fault(&language("colour", "\"red\"")).contains("colour"));
        assert!(fault(&language("version", "\"1\"").replace("[x]", "[\"X Y\"]")).contains("its name"));
        assert!(fault("[x]").contains("missing field"));
    }
}
