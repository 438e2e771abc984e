//! What is asked of a sandbox that is to become an image, and how that image is run.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use sandbox_core::files::PATH_BYTES_MAX;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    ImageReference, Invalid, User,
    request::{USER_PATTERN, command, entrypoint, env, fit, workdir},
    words,
};

/// Body of `POST /v1/sandboxes/{id}/commit`. What is absent is as the image has it that the sandbox was made of, whatever the sandbox itself was made with.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewCommit)]
pub struct CommitRequest {
    /// The name that the image is to have. If it named another of the tenant's, it names this one from then on.
    #[schema(value_type = words::Reference)]
    reference: String,
    /// In place of the image's, whose command goes with it; an empty list: none.
    #[schema(value_type = Option<words::Entrypoint>)]
    entrypoint: Option<Vec<String>>,
    /// Arguments of the entry point; without one, program and arguments.
    #[schema(value_type = Option<words::Command>)]
    command: Option<Vec<String>>,
    #[serde(default)]
    #[schema(value_type = words::Env)]
    env: BTreeMap<String, String>,
    /// Absolute path.
    #[schema(pattern = "^/[^\\u0000]*$", extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX }))))]
    workdir: Option<String>,
    /// Whom to run as: a name or a number, and a group behind a colon.
    #[schema(extensions(("x-schema" = json!({ "pattern": USER_PATTERN }))))]
    user: Option<String>,
}

/// The same, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub reference: ImageReference,
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    env: BTreeMap<String, String>,
    workdir: Option<String>,
    user: Option<User>,
}

impl CommitRequest {
    /// What is to be done, or the first field that is wrong.
    pub fn parse(self) -> Result<Commit, Invalid> {
        let commit = Commit {
            reference: ImageReference::parse_new("reference", self.reference)?,
            entrypoint: entrypoint(self.entrypoint)?,
            command: command(self.command)?,
            env: env(self.env)?,
            workdir: workdir(self.workdir)?,
            user: self.user.map(|user| User::parse("user", &user)).transpose()?,
        };
        fit("", [commit.entrypoint.as_deref(), commit.command.as_deref()], &commit.env)?;
        Ok(commit)
    }
}

impl Commit {
    /// Puts what was asked for over the configuration of the image that the sandbox was made of. When and how that one was built is no
    /// part of it.
    pub fn over(&self, mut configuration: ImageConfiguration) -> ImageConfiguration {
        let mut config = configuration.config().clone().unwrap_or_default();
        if let Some(entrypoint) = &self.entrypoint {
            config.set_entrypoint(Some(entrypoint.clone()).filter(|args| !args.is_empty()));
            // It was written for the entry point that there was.
            config.set_cmd(None);
        }
        if let Some(command) = &self.command {
            config.set_cmd(Some(command.clone()));
        }
        if let Some(workdir) = &self.workdir {
            config.set_working_dir(Some(workdir.clone()));
        }
        if let Some(user) = &self.user {
            config.set_user(Some(user.text()));
        }
        let mut env = config.env().clone().unwrap_or_default();
        env.retain(|entry| !entry.split_once('=').is_some_and(|(name, _)| self.env.contains_key(name)));
        env.extend(self.env.iter().map(|(name, value)| format!("{name}={value}")));
        config.set_env(Some(env).filter(|env| !env.is_empty()));
        configuration.set_config(Some(config));
        configuration.set_created(None);
        configuration.set_history(None);
        configuration
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn committed(asked: Value) -> ImageConfiguration {
        let config = json!({
            "Entrypoint": ["python3"], "Cmd": ["-i"], "Env": ["PATH=/bin", "LANG=C"], "WorkingDir": "/srv", "User": "app", "StopSignal": "SIGINT",
        });
        let base: ImageConfiguration = serde_json::from_value(json!({
            "created": "2026-01-31T12:00:00Z", "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] }, "config": config,
            "history": [{ "created_by": "somebody" }],
        }))
        .unwrap();
        serde_json::from_value::<CommitRequest>(asked).unwrap().parse().unwrap().over(base)
    }

    #[test]
    fn what_is_not_asked_for_is_as_the_image_has_it() {
        let configuration = committed(json!({ "reference": "a" }));

        let config = configuration.config().as_ref().unwrap();
        assert_eq!((config.entrypoint().as_deref(), config.cmd().as_deref()), (Some(&["python3".into()][..]), Some(&["-i".into()][..])));
        assert_eq!(config.env().as_deref(), Some(&["PATH=/bin".into(), "LANG=C".into()][..]));
        assert_eq!((config.working_dir().as_deref(), config.user().as_deref()), (Some("/srv"), Some("app")));
        assert_eq!(config.stop_signal().as_deref(), Some("SIGINT"));
        assert_eq!((configuration.created(), configuration.history()), (&None, &None));
    }

    #[test]
    fn what_is_asked_for_stands_in_place_of_what_the_image_has() {
        let asked = json!({
            "reference": "a", "entrypoint": ["sh"], "env": { "LANG": "C.UTF-8", "NEW": "a=b" }, "workdir": "/work", "user": "1000:100",
        });
        let configuration = committed(asked);

        let config = configuration.config().as_ref().unwrap();
        assert_eq!((config.entrypoint().as_deref(), config.cmd()), (Some(&["sh".into()][..]), &None));
        assert_eq!(config.env().as_deref(), Some(&["PATH=/bin".into(), "LANG=C.UTF-8".into(), "NEW=a=b".into()][..]));
        assert_eq!((config.working_dir().as_deref(), config.user().as_deref()), (Some("/work"), Some("1000:100")));
    }

    #[test]
    fn a_command_goes_with_the_entry_point_that_there_is() {
        let with_entrypoint = committed(json!({ "reference": "a", "command": ["-c", "1"] }));
        let without = committed(json!({ "reference": "a", "entrypoint": [], "command": ["sh"] }));

        let config = with_entrypoint.config().as_ref().unwrap();
        assert_eq!((config.entrypoint().as_ref().unwrap().len(), config.cmd().as_ref().unwrap().len()), (1, 2));
        let config = without.config().as_ref().unwrap();
        assert_eq!((config.entrypoint(), config.cmd().as_deref()), (&None, Some(&["sh".into()][..])));
    }

    #[test]
    fn what_no_image_can_have_is_named() {
        let field = |asked: Value| serde_json::from_value::<CommitRequest>(asked).unwrap().parse().unwrap_err().field;

        assert_eq!(field(json!({ "reference": "import" })), "reference");
        assert_eq!(field(json!({ "reference": "a b" })), "reference");
        assert_eq!(field(json!({ "reference": "a", "command": [""] })), "command");
        assert_eq!(field(json!({ "reference": "a", "entrypoint": ["a\u{0}"] })), "entrypoint[0]");
        assert_eq!(field(json!({ "reference": "a", "env": { "A=B": "" } })), "env");
        assert_eq!(field(json!({ "reference": "a", "workdir": "here" })), "workdir");
        assert_eq!(field(json!({ "reference": "a", "user": "65535" })), "user");
    }

    #[test]
    fn there_is_no_other_field() {
        assert!(serde_json::from_value::<CommitRequest>(json!({ "reference": "a", "pause": true })).is_err());
    }
}
