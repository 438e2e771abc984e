//! A further process in a running sandbox: what may be asked for it, and what becomes of it.

use std::collections::BTreeMap;

use sandbox_core::{
    files::PATH_BYTES_MAX,
    protocol::{OutputPolicy, SandboxId, WindowSize},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{
    Bound, Invalid, Outcome, State, TenantId, User, WAIT_MS,
    limits::{EXEC_OUTPUT_BYTES, EXEC_WALL_MS},
    request::{
        BODY_BYTES_MAX, Content, Encoding, TTY_COLUMNS, TTY_ROWS, TtyRequest, USER_PATTERN, command, env, fit, object, stdin, truncate,
        workdir,
    },
    words,
};

/// What a terminal is told that it is.
const ROWS: Bound = Bound { field: "rows", default: None, ..TTY_ROWS };
const COLUMNS: Bound = Bound { field: "columns", default: None, ..TTY_COLUMNS };

/// How many processes may live in one sandbox that were started so. The keeper's bound.
pub const EXECS_MAX: u64 = 64;

/// A process to be started in a sandbox.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The program and its arguments.
    #[schema(value_type = words::Command)]
    command: Vec<String>,
    /// Over the sandbox's own.
    #[serde(default)]
    #[schema(value_type = words::Env)]
    env: BTreeMap<String, String>,
    /// Absolute; without it, where the sandbox's own program was started.
    #[schema(pattern = "^/[^\\u0000]*$", extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX }))))]
    workdir: Option<String>,
    /// Without it, whom the sandbox's own program was started as.
    #[schema(extensions(("x-schema" = json!({ "pattern": USER_PATTERN }))))]
    user: Option<String>,
    /// Read by it at once, to its end.
    #[schema(extensions(("x-schema" = json!({ "maxLength": BODY_BYTES_MAX }))))]
    stdin: Option<String>,
    #[serde(default)]
    stdin_encoding: Encoding,
    /// Whether its input stays open, for whoever attaches.
    #[serde(default)]
    stdin_open: bool,
    /// Whether it has a terminal, or which size that has.
    #[serde(default)]
    tty: TtyRequest,
    #[serde(default, deserialize_with = "object")]
    limits: ExecLimitsRequest,
    #[serde(default = "truncate")]
    #[schema(value_type = words::OutputPolicy)]
    output_policy: OutputPolicy,
    /// How long to wait for its end. Without it 30 s; no time for one whose input is open or a terminal.
    #[schema(extensions(("x-bound" = json!(Bound { default: None, ..WAIT_MS }))))]
    wait_ms: Option<u64>,
}

/// What it may use; the rest it shares with its sandbox.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ExecLimitsRequest {
    /// Real time from its start. Absent, it may go on as long as its sandbox.
    #[schema(extensions(("x-bound" = json!(EXEC_WALL_MS))))]
    wall_ms: Option<u64>,
    /// Of stdout, and as many of stderr.
    #[schema(extensions(("x-bound" = json!(EXEC_OUTPUT_BYTES))))]
    output_bytes: Option<u64>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TerminalSizeRequest)]
pub struct SizeRequest {
    #[schema(extensions(("x-bound" = json!(ROWS))))]
    rows: u64,
    #[schema(extensions(("x-bound" = json!(COLUMNS))))]
    columns: u64,
}

/// An exec as asked for, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewExec {
    pub plan: ExecPlan,
    pub stdin: Option<Content>,
}

/// What is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecPlan {
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    pub has_open_stdin: bool,
    pub terminal: Option<WindowSize>,
    pub wall_ms: Option<u64>,
    pub output_bytes: u64,
    pub output_policy: OutputPolicy,
}

/// Where an exec stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExecState {
    Starting,
    Running,
    /// Its outcome says how.
    Exited,
    /// It never ran, or nobody knows what became of it.
    Failed,
}

/// One exec as Postgres holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Exec {
    /// Its own: the keeper knows it by this.
    pub id: SandboxId,
    pub sandbox: SandboxId,
    pub tenant: TenantId,
    pub principal: String,
    pub state: ExecState,
    pub plan: ExecPlan,
    pub created_at: OffsetDateTime,
    pub started_at: Option<OffsetDateTime>,
    pub finished_at: Option<OffsetDateTime>,
    pub outcome: Option<Outcome>,
}

impl ExecState {
    pub const ALL: [Self; 4] = [Self::Starting, Self::Running, Self::Exited, Self::Failed];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Failed => "failed",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }

    pub const fn is_final(self) -> bool {
        matches!(self, Self::Exited | Self::Failed)
    }
}

impl From<ExecState> for State {
    /// As a sandbox's is called.
    fn from(state: ExecState) -> Self {
        match state {
            ExecState::Starting => Self::Starting,
            ExecState::Running => Self::Running,
            ExecState::Exited => Self::Exited,
            ExecState::Failed => Self::Failed,
        }
    }
}

impl ExecRequest {
    /// The exec and how long to wait for its end, in milliseconds; or the first field that is wrong.
    pub fn parse(self) -> Result<(NewExec, u64), Invalid> {
        let terminal = self.tty.parse()?;
        let is_interactive = self.stdin_open || terminal.is_some();
        if is_interactive && self.stdin.is_some() {
            return Err(Invalid::new("stdin", "an input that is given at once is not kept open, and is no terminal"));
        }
        let wait_ms = match self.wait_ms {
            Some(ms) => WAIT_MS.check(ms)?,
            None if is_interactive => 0,
            None => 30_000,
        };
        let command = command(Some(self.command))?.unwrap_or_default();
        let plan = ExecPlan {
            command,
            env: env(self.env)?,
            workdir: workdir(self.workdir)?,
            user: self.user.map(|user| User::parse("user", &user)).transpose()?.map(|user| user.text()),
            has_open_stdin: self.stdin_open,
            terminal,
            wall_ms: self.limits.wall_ms.map(|ms| EXEC_WALL_MS.check(ms)).transpose()?,
            output_bytes: EXEC_OUTPUT_BYTES.check(self.limits.output_bytes.unwrap_or(1 << 20))?,
            output_policy: self.output_policy,
        };
        fit("", [None, Some(&plan.command)], &plan.env)?;
        Ok((NewExec { plan, stdin: stdin(self.stdin, self.stdin_encoding)? }, wait_ms))
    }
}

impl SizeRequest {
    pub fn parse(self) -> Result<WindowSize, Invalid> {
        let character = |bound: &'static Bound, value| bound.check(value).map(|value| u16::try_from(value).unwrap_or(u16::MAX));
        Ok(WindowSize { rows: character(&ROWS, self.rows)?, columns: character(&COLUMNS, self.columns)? })
    }
}

impl ExecPlan {
    /// `NAME=value`, as programs have it.
    pub fn environment(&self) -> Vec<String> {
        self.env.iter().map(|(key, value)| format!("{key}={value}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Result<(NewExec, u64), Invalid> {
        serde_json::from_str::<ExecRequest>(json).unwrap().parse()
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let (exec, wait_ms) = parsed(r#"{"command":["true"]}"#).unwrap();
        assert_eq!((wait_ms, exec.plan.wall_ms, exec.plan.output_bytes, exec.plan.terminal), (30_000, None, 1 << 20, None));
        assert_eq!(parsed(r#"{"command":["sh"],"tty":true}"#).unwrap().1, 0);
        assert_eq!(parsed(r#"{"command":["cat"],"stdin_open":true,"wait_ms":5}"#).unwrap().1, 5);
    }

    #[test]
    fn a_terminal_has_the_size_that_is_asked_for() {
        let terminal = |json: &str| parsed(json).map(|(exec, _)| exec.plan.terminal);
        assert_eq!(terminal(r#"{"command":["sh"],"tty":{"rows":2,"columns":3}}"#).unwrap(), Some(WindowSize { rows: 2, columns: 3 }));
        assert_eq!(terminal(r#"{"command":["sh"],"tty":{"rows":0,"columns":3}}"#).unwrap_err().field, "tty.rows");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (json, field) in [
            (r#"{"command":[]}"#, "command"),
            (r#"{"command":["a\u0000"]}"#, "command[0]"),
            (r#"{"command":["a"],"env":{"":"x"}}"#, "env"),
            (r#"{"command":["a"],"workdir":"relative"}"#, "workdir"),
            (r#"{"command":["a"],"user":"a b"}"#, "user"),
            (r#"{"command":["a"],"stdin":"x","stdin_open":true}"#, "stdin"),
            (r#"{"command":["a"],"stdin":"x","tty":true}"#, "stdin"),
            (r#"{"command":["a"],"limits":{"wall_ms":0}}"#, "limits.wall_ms"),
            (r#"{"command":["a"],"limits":{"output_bytes":99999999999}}"#, "limits.output_bytes"),
            (r#"{"command":["a"],"wait_ms":300001}"#, "wait_ms"),
        ] {
            assert_eq!(parsed(json).unwrap_err().field, field, "{json}");
        }
        let long = format!(r#"{{"command":["{}"]}}"#, "a".repeat(70_000));
        assert_eq!(parsed(&long).unwrap_err().field, "command");
    }
}
