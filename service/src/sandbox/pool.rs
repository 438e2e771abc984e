//! Pools: what may be asked for, and which requests one of their sandboxes will do for.

use std::collections::BTreeMap;

use sandbox_core::protocol::OutputPolicy;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Bound, Invalid, NewSandbox, PullPolicy, RequestedLimits, TenantId, WhenFull,
    request::{TemplateRequest, check_name},
};

/// How many sandboxes a pool keeps ready.
pub const POOL_SIZE: Bound = Bound { field: "size", unit: "sandboxes", min: 0, default: None, max: 256 };
/// How long a sandbox of a pool has until it is ready.
pub const READY_WITHIN_MS: Bound = Bound { field: "ready_within_ms", unit: "milliseconds", min: 100, default: Some(60_000), max: 600_000 };
const READY_OUTPUT_BYTES_MAX: usize = 1024;

/// Names a pool for good; another one of the same name has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub Uuid);

/// Body of `POST /v1/pools`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewPool)]
pub struct PoolRequest {
    /// Given once to a tenant.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    name: String,
    /// How many sandboxes are kept ready, as far as there is room that nobody else asks for.
    #[schema(extensions(("x-bound" = json!(POOL_SIZE))))]
    size: u64,
    /// What each of them is.
    template: TemplateRequest,
    /// A sandbox is ready as soon as its program has written this, to whichever stream; absent, as soon as it runs. Not with `"output_policy": "discard"`.
    #[schema(extensions(("x-schema" = json!({ "minLength": 1, "maxLength": READY_OUTPUT_BYTES_MAX, "pattern": "^[^\\u0000]*$" }))))]
    ready_output: Option<String>,
    /// How long it has for that, in milliseconds, before it is given up.
    #[schema(extensions(("x-bound" = json!(READY_WITHIN_MS))))]
    ready_within_ms: Option<u64>,
}

/// Body of `PATCH /v1/pools/{name}`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PoolChange)]
pub struct PoolSizeRequest {
    #[schema(extensions(("x-bound" = json!(POOL_SIZE))))]
    size: u64,
}

/// A pool as asked for, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPool {
    pub name: String,
    pub size: u32,
    pub template: NewSandbox,
    pub readiness: Readiness,
}

/// When a sandbox of a pool is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// As soon as this was written; [`None`]: as soon as it runs.
    pub output: Option<String>,
    pub within_ms: u64,
}

/// A pool that there is.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    pub id: PoolId,
    pub tenant: TenantId,
    pub principal: String,
    pub name: String,
    pub size: u32,
    /// JSON, as it was asked for.
    pub template: Vec<u8>,
    pub readiness: Readiness,
    pub ready: u64,
    pub starting: u64,
    pub taken: u64,
    pub missed: u64,
    pub failures: u64,
    pub last_failure: Option<PoolFailure>,
    pub created_at: OffsetDateTime,
}

/// Why one of a pool's sandboxes was not there to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolFailure {
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = String, format = DateTime)]
    pub at: OffsetDateTime,
    /// How it ended, as the `reason` of an outcome; `not_ready`: not in time; or the `code` of the problem for which it was not made.
    pub reason: String,
    /// For people. May change.
    pub message: String,
    /// The end of what it wrote to stderr.
    pub stderr: String,
}

/// From which pool a sandbox was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FromPool {
    pub name: String,
    /// For how long its program had run by then.
    pub waited_ms: u64,
}

/// What a sandbox gets when it is made of a pool's template, or taken from there: all that may differ from the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Personal {
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub ttl_ms: Option<u64>,
    pub idle_timeout_ms: Option<u64>,
}

/// What `POST /v1/sandboxes` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Anything that is like this.
    Like(Box<NewSandbox>),
    /// One of this pool's, or else a new one of its template.
    OfPool { pool: String, personal: Personal, when_full: WhenFull },
}

/// What two requests have in common for which the same sandbox will do: everything that cannot be given to it later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    common: NewSandbox,
    /// Of its files and its input, which may be large.
    input: [u8; 32],
}

impl PoolRequest {
    /// The pool, or the first field that is wrong.
    pub fn parse(self) -> Result<NewPool, Invalid> {
        let template = self.template.parse().map_err(in_template)?;
        if let Some(text) = &self.ready_output {
            if !(1..=READY_OUTPUT_BYTES_MAX).contains(&text.len()) || text.contains('\0') {
                return Err(Invalid::new("ready_output", "what tells that one is ready is 1 to 1024 bytes, none of them zero"));
            }
            if template.output_policy == OutputPolicy::Discard {
                return Err(Invalid::new("ready_output", "of what is discarded nobody reads it"));
            }
        }
        Ok(NewPool {
            name: check_name(self.name)?,
            size: size(self.size)?,
            template,
            readiness: Readiness {
                output: self.ready_output,
                within_ms: self.ready_within_ms.map_or(Ok(60_000), |ms| READY_WITHIN_MS.check(ms))?,
            },
        })
    }
}

impl PoolSizeRequest {
    pub fn parse(self) -> Result<u32, Invalid> {
        size(self.size)
    }
}

fn size(asked: u64) -> Result<u32, Invalid> {
    POOL_SIZE.check(asked).map(|size| u32::try_from(size).unwrap_or(u32::MAX))
}

/// The same fault, where it stands in a request for a pool.
pub fn in_template(invalid: Invalid) -> Invalid {
    Invalid { field: format!("template.{}", invalid.field).trim_end_matches('.').to_owned(), ..invalid }
}

impl Pool {
    /// What each of its sandboxes is asked for as.
    ///
    /// # Errors
    /// It was written by a later version.
    pub fn asked(&self) -> Result<NewSandbox, Invalid> {
        let template: TemplateRequest =
            serde_json::from_slice(&self.template).map_err(|error| Invalid::new("template", error.to_string()))?;
        template.parse().map_err(in_template)
    }
}

impl NewSandbox {
    /// The same of its own: over what a template says for all.
    #[must_use]
    pub fn with(self, personal: Personal) -> Self {
        let Personal { name, labels, ttl_ms, idle_timeout_ms } = personal.over(&self);
        Self { name, labels, ttl_ms, idle_timeout_ms, ..self }
    }

    /// What of it can be given to a sandbox that runs already.
    pub fn personal(&self) -> Personal {
        let Self { name, labels, ttl_ms, idle_timeout_ms, .. } = self.clone();
        Personal { name, labels, ttl_ms, idle_timeout_ms }
    }

    /// Whether a sandbox that was started before it was asked for can be what is asked for here: nothing of it depends on when, and for whom, it is started.
    pub fn can_wait(&self) -> bool {
        self.volumes.is_empty() && !self.keep_layer
    }
}

impl Personal {
    /// These, and what the template says where they say nothing.
    #[must_use]
    pub fn over(self, template: &NewSandbox) -> Self {
        let mut labels = template.labels.clone();
        labels.extend(self.labels);
        Self {
            name: self.name,
            labels,
            ttl_ms: self.ttl_ms.or(template.ttl_ms),
            idle_timeout_ms: self.idle_timeout_ms.or(template.idle_timeout_ms),
        }
    }
}

impl Template {
    pub fn of(asked: &NewSandbox) -> Self {
        let mut input = Sha256::new();
        // Lengths first, so that no two ways to cut the same bytes are alike.
        for file in &asked.files {
            input.update(format!("{} {:o} {}\n{}", file.path.len(), file.mode, file.content.0.len(), file.path));
            input.update(&file.content.0);
        }
        input.update(format!("{:?}\n", asked.stdin.as_ref().map(|stdin| stdin.0.len())));
        input.update(asked.stdin.as_ref().map_or(&[][..], |stdin| &stdin.0));
        // Each field by its name: of one that is added it is to be decided here whether it may differ.
        let common = NewSandbox {
            kind: asked.kind,
            image: asked.image.clone(),
            entrypoint: asked.entrypoint.clone(),
            command: asked.command.clone(),
            compile: asked.compile.clone(),
            workdir: asked.workdir.clone(),
            user: asked.user.clone(),
            capabilities: asked.capabilities,
            isolation: asked.isolation,
            cases: asked.cases.clone(),
            judging: asked.judging,
            stdin_open: asked.stdin_open,
            terminal: asked.terminal,
            stop_signal: asked.stop_signal,
            stop_grace_ms: asked.stop_grace_ms,
            env: asked.env.clone(),
            limits: asked.limits,
            output_policy: asked.output_policy,
            auto_remove: asked.auto_remove,
            keep_layer: asked.keep_layer,
            volumes: asked.volumes.clone(),
            retries: asked.retries,
            // Told by their sum.
            files: Vec::new(),
            stdin: None,
            // Given later.
            name: None,
            labels: BTreeMap::new(),
            ttl_ms: None,
            idle_timeout_ms: None,
            // What is in force counts, however it was asked for.
            requested: RequestedLimits::default(),
            defaults: RequestedLimits::default(),
            // The request's, not the sandbox's.
            pull: PullPolicy::Never,
            when_full: WhenFull::Queue,
        };
        Self { common, input: input.finalize().into() }
    }

    /// What its image is called.
    pub fn image(&self) -> &str {
        self.common.image.as_str()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::sandbox::SandboxRequest;

    fn pool(body: Value) -> Result<NewPool, Invalid> {
        serde_json::from_value::<PoolRequest>(body).unwrap().parse()
    }

    fn like(body: Value) -> NewSandbox {
        match serde_json::from_value::<SandboxRequest>(body).unwrap().parse().unwrap() {
            Wanted::Like(asked) => *asked,
            Wanted::OfPool { .. } => panic!("it names a pool"),
        }
    }

    #[test]
    fn what_is_wrong_with_a_template_is_named_there() {
        let of = |template: Value| pool(json!({ "name": "p", "size": 1, "template": template }));
        assert_eq!(of(json!({ "image": "a", "limits": { "pids": 0 } })).unwrap_err().field, "template.limits.pids");
        assert_eq!(pool(json!({ "name": "p", "size": 257, "template": { "image": "a" } })).unwrap_err().field, "size");
        let unread = json!({ "name": "p", "size": 1, "template": { "image": "a", "output_policy": "discard" }, "ready_output": "x" });
        assert_eq!(pool(unread).unwrap_err().field, "ready_output");
        // What a sandbox cannot have while nobody has it.
        for field in ["name", "volumes", "keep_layer", "pull", "when_full", "pool"] {
            let body = json!({ "name": "p", "size": 1, "template": { "image": "a", field: Value::Null } });
            assert!(serde_json::from_value::<PoolRequest>(body).unwrap_err().to_string().contains("unknown field"), "{field}");
        }
    }

    #[test]
    fn only_what_can_be_given_later_may_differ() {
        let file = |content: &str| json!([{ "path": "a", "content": content }]);
        let base = json!({ "image": "a", "command": ["b"], "files": file("x") });
        let with = |more: Value| {
            let mut body = base.clone();
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            Template::of(&like(body))
        };
        let template = with(json!({}));
        let alike = json!({ "name": "n", "labels": { "a": "b" }, "ttl_ms": 5000, "idle_timeout_ms": 5000, "limits": { "pids": 64 }, "when_full": "refuse" });
        assert_eq!(with(alike), template);
        for other in [
            json!({ "files": file("y") }),
            json!({ "files": [{ "path": "a", "content": "x", "mode": "0755" }] }),
            json!({ "stdin": "" }),
            json!({ "command": ["c"] }),
            json!({ "env": { "A": "b" } }),
            json!({ "limits": { "pids": 65 } }),
            json!({ "limits": { "wall_ms": 5000 } }),
            json!({ "auto_remove": true }),
            json!({ "keep_layer": true }),
            json!({ "volumes": [{ "name": "v", "path": "/v" }] }),
        ] {
            assert_ne!(with(other.clone()), template, "{other}");
        }
    }

    #[test]
    fn ones_own_goes_over_the_templates() {
        let template = like(json!({ "image": "a", "labels": { "a": "1", "b": "2" }, "ttl_ms": 5000 }));
        let own = Personal { labels: BTreeMap::from([("a".into(), "3".into())]), ttl_ms: Some(9000), ..Personal::default() };
        let made = template.clone().with(own);
        assert_eq!((made.labels["a"].as_str(), made.labels["b"].as_str(), made.ttl_ms), ("3", "2", Some(9000)));
        assert_eq!(template.clone().with(Personal::default()), template);
    }
}
