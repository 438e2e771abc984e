//! What the load runs: small programs whose outcome and output are known to the byte.

use mayfly_tests::random::Random;
use serde_json::{Value, json};

/// The memory that each run and sandbox of the load has. It decides how many fit on the node at a time.
pub(crate) const MEMORY_BYTES: u64 = 16 << 20;
/// More than is stored beside an outcome, so that the log's file is kept, too.
const BIG_BYTES: usize = 150_000;
/// How often the line of standard input comes.
const STDIN_LINES: usize = 200;

/// One program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Names itself on both streams and exits with this code.
    Echo(u8),
    /// The same, after a while.
    Slow(u8),
    Stdin,
    Files,
    Big,
    /// Has its writable layer on disk.
    OnDisk,
    WallLimit,
    MemoryLimit,
    OutputLimit,
    /// Prints what was made before it.
    Compiled(u8),
    /// Is not begun: what goes before it fails.
    Uncompiled,
    /// Is run with three inputs, the second of which is not what is expected.
    Judged,
    /// The same, with what was made before.
    CompiledAndJudged,
}

impl Payload {
    pub(crate) fn random(random: &mut Random) -> Self {
        let code = u8::try_from(random.below(100)).expect("below 100");
        match random.below(17) {
            0..=2 => Self::Echo(code),
            3..=5 => Self::Slow(code),
            6 => Self::Stdin,
            7 => Self::Files,
            8 => Self::Big,
            9 => Self::OnDisk,
            10 => Self::WallLimit,
            11 => Self::MemoryLimit,
            12 => Self::OutputLimit,
            13 => Self::Compiled(code),
            14 => Self::Judged,
            15 => Self::CompiledAndJudged,
            _ => Self::Uncompiled,
        }
    }

    /// The request, which the label marks.
    pub(crate) fn request(self, label: &str, image: &str, wait_ms: u64) -> Value {
        let shell = |script: String| json!(["sh", "-c", script]);
        let mut request = json!({
            "image": image, "wait_ms": wait_ms, "labels": { "crash": label }, "limits": { "memory_bytes": MEMORY_BYTES, "disk_bytes": 4 << 20 },
        });
        request["command"] = match self {
            Self::Echo(code) => shell(format!("echo {label}; echo {label} >&2; exit {code}")),
            Self::Slow(code) => shell(format!("sleep 0.4; echo {label}; echo {label} >&2; exit {code}")),
            Self::Stdin => {
                request["stdin"] = json!(format!("{label}\n").repeat(STDIN_LINES));
                json!(["cat"])
            }
            Self::Files => {
                request["files"] = json!([{ "path": "in/given", "content": label }]);
                json!(["cat", "in/given"])
            }
            Self::Big => json!(["flood", BIG_BYTES.to_string()]),
            Self::OnDisk => {
                request["limits"]["disk_bytes"] = json!(32 << 20);
                shell(format!("dd if=/dev/zero of=zeros bs=1M count=8 2>/dev/null && echo {label}"))
            }
            Self::WallLimit => {
                request["limits"]["wall_ms"] = json!(300);
                json!(["sleep", "1000"])
            }
            Self::MemoryLimit => json!(["hog", "64"]),
            Self::OutputLimit => {
                request["limits"]["output_bytes"] = json!(1000);
                request["output_policy"] = json!("kill");
                json!(["flood", "0"])
            }
            Self::Compiled(code) => {
                request["files"] = json!([{ "path": "source", "content": label }]);
                request["compile"] = step("sleep 0.1; mv source made; echo compiled");
                request["stdin"] = json!("\n");
                shell(format!("cat made - && exit {code}"))
            }
            Self::Uncompiled => {
                request["compile"] = step("echo compiled; exit 3");
                json!(["true"])
            }
            Self::Judged | Self::CompiledAndJudged => {
                request["cases"] =
                    [label, "other", label].iter().map(|line| json!({ "stdin": format!("{line}\n"), "expected_stdout": label })).collect();
                if self == Self::CompiledAndJudged {
                    request["compile"] = step("sleep 0.1; echo 'sleep 0.1; cat' > made; echo compiled");
                } else {
                    request["files"] = json!([{ "path": "made", "content": "cat" }]);
                }
                shell("sh made".to_owned())
            }
        };
        request
    }

    /// Whether a run that came to its own end did so as this program does, with all its output.
    pub(crate) fn check(self, label: &str, run: &Value) -> Result<(), String> {
        let outcome = &run["outcome"];
        let line = format!("{label}\n");
        let (reason, code, stdout, stderr) = match self {
            Self::Echo(code) | Self::Slow(code) => ("exited", Some(code), line.clone(), line),
            Self::Stdin => ("exited", Some(0), line.repeat(STDIN_LINES), String::new()),
            Self::Files => ("exited", Some(0), label.to_owned(), String::new()),
            Self::OnDisk => ("exited", Some(0), line, String::new()),
            Self::Big => ("exited", Some(0), flood(BIG_BYTES), String::new()),
            Self::WallLimit => ("wall_timeout", None, String::new(), String::new()),
            Self::MemoryLimit => ("oom_killed", None, String::new(), String::new()),
            Self::OutputLimit => ("output_limit", None, flood(1000), String::new()),
            Self::Compiled(code) => ("exited", Some(code), line, String::new()),
            Self::Uncompiled => ("compile_failed", None, String::new(), String::new()),
            Self::Judged | Self::CompiledAndJudged => ("exited", Some(0), String::new(), String::new()),
        };
        if matches!(self, Self::Judged | Self::CompiledAndJudged) {
            check_cases(label, run)?;
        }
        if matches!(self, Self::Compiled(_) | Self::Uncompiled | Self::CompiledAndJudged) {
            let (step, code) = (&run["compile"], if self == Self::Uncompiled { 3 } else { 0 });
            if step["outcome"]["exit_code"] != code || step["stdout"] != "compiled\n" {
                return Err(format!("{label} {self:?} was compiled with {step}"));
            }
        }
        let wanted = (reason, code.map(u64::from));
        let found = (outcome["reason"].as_str().unwrap_or_default(), outcome["exit_code"].as_u64());
        if found != wanted {
            return Err(format!("{label} {self:?} ended with {found:?}, not {wanted:?}: {outcome}"));
        }
        for (stream, wanted) in [("stdout", stdout), ("stderr", stderr)] {
            let found = run[stream].as_str().unwrap_or_default();
            if found != wanted {
                let (has, wants) = (found.len(), wanted.len());
                return Err(format!("{label} {self:?}: {stream} has {has} bytes, not the {wants} that were written: {:.200}", found));
            }
        }
        Ok(())
    }

    /// How many bytes of output [`Self::check`] compares.
    pub(crate) const fn output_bytes(self, label: &str) -> u64 {
        let bytes = match self {
            Self::Echo(_) | Self::Slow(_) => 2 * (label.len() + 1),
            Self::Stdin => STDIN_LINES * (label.len() + 1),
            Self::Files => label.len(),
            Self::OnDisk => label.len() + 1,
            Self::Big => BIG_BYTES,
            Self::OutputLimit => 1000,
            Self::Compiled(_) => label.len() + 1,
            Self::Judged | Self::CompiledAndJudged => 2 * (label.len() + 1) + "other\n".len(),
            Self::WallLimit | Self::MemoryLimit | Self::Uncompiled => 0,
        };
        bytes as u64
    }
}

/// Whether each case came to what it must, and was given its own input.
fn check_cases(label: &str, run: &Value) -> Result<(), String> {
    let cases = run["cases"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found: Vec<_> = cases.iter().map(|case| (case["verdict"].as_str(), case["stdout"].as_str())).collect();
    let line = format!("{label}\n");
    let accepted = (Some("accepted"), Some(line.as_str()));
    let wanted = [accepted, (Some("wrong_output"), Some("other\n")), accepted];
    if found != wanted || run["verdict"] != "wrong_output" {
        return Err(format!("{label} was judged {} with {found:?}", run["verdict"]));
    }
    Ok(())
}

/// A compile step.
fn step(script: &str) -> Value {
    json!({ "command": ["sh", "-c", script], "limits": { "memory_bytes": MEMORY_BYTES } })
}

/// What `flood` writes.
fn flood(bytes: usize) -> String {
    (0..bytes).map(|n| char::from(b'a' + u8::try_from(n % 65_536 % 26).expect("below 26"))).collect()
}
