//! What a log and an attached program send, and how an end becomes an exit code.

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Deserialize;

use crate::sandbox::Signal;

/// One frame; which of the members are there says of which kind it is.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Frame {
    pub(super) seq: Option<u64>,
    pub(super) stream: Option<Stream>,
    pub(super) at: Option<String>,
    data: Option<String>,
    data_base64: Option<String>,
    pub(super) gap: Option<Gap>,
    pub(super) stdin: Option<Taken>,
    pub(super) error: Option<Fault>,
    pub(super) end: Option<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// Pieces that cannot be had any more.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Gap {
    pub(super) from: u64,
    pub(super) to: u64,
}

/// How much input was taken, of all who give some.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Taken {
    pub(super) written_bytes: u64,
}

/// Something that was asked for and not done.
#[derive(Debug, Deserialize)]
pub(super) struct Fault {
    pub(super) code: String,
    pub(super) message: String,
}

impl Fault {
    /// Whether it may be done after all if it is asked for again.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self.code.as_str(), "keeper_unavailable" | "stdin_gap")
    }
}

/// How a program ended. Read leniently: a newer service may know more reasons.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct End {
    pub(super) reason: String,
    pub(super) exit_code: Option<i32>,
    pub(super) signal: Option<String>,
    pub(super) message: String,
    #[serde(default)]
    pub(super) truncated: Truncated,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Truncated {
    pub(super) stdout: bool,
    pub(super) stderr: bool,
}

impl Frame {
    pub(super) fn parse(json: &str) -> anyhow::Result<Self> {
        serde_json::from_str(json).with_context(|| format!("the service sent what is no frame: {}", super::table::cut(json, 200)))
    }

    /// What was written, if this is a piece of output.
    pub(super) fn output(&self) -> anyhow::Result<Option<(Stream, Vec<u8>)>> {
        let Some(stream) = self.stream else { return Ok(None) };
        let bytes = match (&self.data, &self.data_base64) {
            (Some(text), _) => text.clone().into_bytes(),
            (None, Some(text)) => BASE64.decode(text).context("the service sent output that is no base64")?,
            (None, None) => Vec::new(),
        };
        Ok(Some((stream, bytes)))
    }
}

/// Of a time limit of whatever kind, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// Our own faults, the service's, and requests that make no sense.
pub(super) const OWN_FAULT: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// 128 and SIGKILL: ended from outside the program.
const KILLED: u8 = 137;

impl End {
    /// The program's own code, or one that says what became of it instead: the table in `mayfly run --help`.
    pub(super) fn exit_code(&self) -> u8 {
        match self.reason.as_str() {
            "wall_timeout" | "cpu_timeout" | "idle_timeout" | "expired" => return TIMED_OUT,
            "start_failed" => return self.start_failure(),
            "infra_error" | "compile_failed" => return OWN_FAULT,
            "oom_killed" => return KILLED,
            _ => {}
        }
        let signal = self.signal.clone().and_then(|name| Signal::try_from(name).ok());
        match (self.exit_code, signal) {
            // As the kernel has it: the lowest eight bits (_exit(2)).
            (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            (None, Some(signal)) => u8::try_from(128 + signal.number()).unwrap_or(KILLED),
            (None, None) => KILLED,
        }
    }

    /// Of all that can be wrong with a start, shells and Docker tell two things apart. The API tells them in words alone.
    fn start_failure(&self) -> u8 {
        let says = |words: &str| self.message.contains(words);
        if !says("starting the command") {
            return OWN_FAULT;
        }
        if says("no such program") || says("no such file") || says("No such file") || says("ENOENT") { NOT_FOUND } else { NOT_EXECUTABLE }
    }

    /// What a person is told beside the code; nothing where the program ended by itself.
    pub(super) fn note(&self) -> Option<String> {
        let is_own = matches!(self.reason.as_str(), "exited" | "signaled");
        (!is_own).then(|| format!("{}: {}", self.reason, super::table::plain(&self.message)))
    }

    /// Which streams were cut.
    pub(super) fn cut(&self) -> Option<&'static str> {
        match (self.truncated.stdout, self.truncated.stderr) {
            (true, true) => Some("stdout and stderr were"),
            (true, false) => Some("stdout was"),
            (false, true) => Some("stderr was"),
            (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(reason: &str, exit_code: Option<i32>, signal: Option<&str>, message: &str) -> End {
        End { reason: reason.into(), exit_code, signal: signal.map(Into::into), message: message.into(), ..End::default() }
    }

    #[test]
    fn a_programs_own_code_passes_through() {
        assert_eq!(end("exited", Some(0), None, "").exit_code(), 0);
        assert_eq!(end("exited", Some(255), None, "").exit_code(), 255);
        assert_eq!(end("signaled", None, Some("SIGSEGV"), "").exit_code(), 139);
        assert_eq!(end("signaled", None, Some("SIGRTMIN+2"), "").exit_code(), 164);
        assert_eq!(end("exited", Some(0), None, "").note(), None);
    }

    #[test]
    fn what_ended_a_program_has_a_code_and_words() {
        for reason in ["wall_timeout", "cpu_timeout", "idle_timeout", "expired"] {
            assert_eq!(end(reason, None, Some("SIGKILL"), "").exit_code(), 124, "{reason}");
        }
        for reason in ["oom_killed", "output_limit", "stopped_by_user", "evicted", "something_new"] {
            assert_eq!(end(reason, None, Some("SIGKILL"), "").exit_code(), 137, "{reason}");
        }
        assert_eq!(end("infra_error", None, None, "").exit_code(), 125);
        assert_eq!(end("oom_killed", None, None, "memory limit").note().unwrap(), "oom_killed: memory limit");
    }

    #[test]
    fn a_start_fails_as_in_a_shell() {
        let missing = "starting the command failed on \"x\": no such program in the PATH of the image";
        let refused = "starting the command failed on \"/etc/passwd\": EACCES: Permission denied";
        assert_eq!(end("start_failed", None, None, missing).exit_code(), 127);
        assert_eq!(end("start_failed", None, None, refused).exit_code(), 126);
        assert_eq!(end("start_failed", None, None, "entering the working folder failed on /x: gone").exit_code(), 125);
    }

    #[test]
    fn output_is_bytes_whether_text_or_not() {
        let output = |json: &str| Frame::parse(json).unwrap().output().unwrap();
        assert_eq!(output(r#"{"seq":1,"stream":"stdout","at":"","data":"grün"}"#), Some((Stream::Stdout, "grün".into())));
        assert_eq!(output(r#"{"seq":1,"stream":"stderr","at":"","data_base64":"/w=="}"#), Some((Stream::Stderr, vec![0xff])));
        assert_eq!(output(r#"{"stdin":{"written_bytes":3}}"#), None);
        assert!(Frame::parse("[]x").is_err());
    }
}
