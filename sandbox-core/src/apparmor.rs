//! AppArmor as a further fence, where the host has it: one profile for all sandboxes (apparmor.d(5)).

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    process::{Command, Stdio},
};

use crate::{protocol::init::WaitStatus, sys};

/// The profile's name, as `aa-status` and `/proc/<pid>/attr/current` show it.
pub(crate) const PROFILE: &str = "mayfly-sandbox";

/// What a sandbox may do, in apparmor_parser(8)'s language.
const SOURCE: &str = include_str!("apparmor/mayfly-sandbox");

/// Where apparmor_parser(8) is looked for.
const PARSERS: [&str; 3] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/bin/apparmor_parser"];

/// Whether this kernel has AppArmor, and it is switched on.
pub(crate) fn is_enabled() -> bool {
    // securityfs need not be mounted; the module's own switch is then what can be read.
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|enabled| enabled.trim() == "Y")
}

/// Whether a profile can be loaded.
pub(crate) fn has_parser() -> bool {
    parser().is_some()
}

fn parser() -> Option<&'static Path> {
    PARSERS.into_iter().map(Path::new).find(|path| path.exists())
}

/// Compiles the profile and gives it to the kernel, and makes sure that a process of ours can enter it. Those who run under it already run
/// under the new one.
///
/// # Errors
/// `NotFound`: apparmor_parser is not installed. Else it could not load the profile, and why.
pub(crate) fn load() -> io::Result<()> {
    let program = parser().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "apparmor_parser is not installed (package apparmor)"))?;
    let mut parser = Command::new(program)
        // What this kernel can mediate is mediated, not what the parser takes for granted of all kernels.
        .args(["--replace", "--skip-cache", "--skip-read-cache", "--policy-features", FEATURES])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let source = if Path::new(FEATURES).join("ipc/posix_mqueue").exists() { SOURCE.replace(END, WITH_QUEUES) } else { SOURCE.to_owned() };
    // Dropped, and so closed, at the end of the statement: the parser reads to the end. If it ends before, it says why.
    let written = parser.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(source.as_bytes()));
    let done = parser.wait_with_output()?;
    if !done.status.success() {
        return Err(io::Error::other(format!("apparmor_parser: {}", String::from_utf8_lossy(&done.stderr).trim_end())));
    }
    written?;
    try_to_enter()
}

/// What this kernel can mediate.
const FEATURES: &str = "/sys/kernel/security/apparmor/features";

/// Where kernels mediate POSIX queues, they must be allowed; parsers for others do not know the word.
const END: &str = "}\n";
const WITH_QUEUES: &str = "  mqueue,\n}\n";

/// A keeper that is confined itself may be able to load a profile and not to enter it.
fn try_to_enter() -> io::Result<()> {
    let child = match sys::clone3(nix::sched::CloneFlags::empty(), false, None)? {
        sys::Cloned::Parent(child) => child,
        sys::Cloned::Child => {
            let entered = File::options().write(true).open("/proc/self/attr/apparmor/current").and_then(enter);
            std::process::exit(entered.err().and_then(|error| error.raw_os_error()).unwrap_or(0))
        }
    };
    match sys::reap(child.pid, true)? {
        Some((_, WaitStatus::Exited { code: 0 })) => Ok(()),
        Some((_, WaitStatus::Exited { code })) => {
            Err(io::Error::other(format!("the profile {PROFILE} cannot be entered: {}", io::Error::from_raw_os_error(code))))
        }
        Some((_, WaitStatus::Signaled { .. })) | None => Err(io::Error::other("the process that was to enter the profile is gone")),
    }
}

/// Puts the calling process under the profile, for good. `attributes` is `attr/apparmor/current` of its own entry in a procfs that nobody
/// else made (CVE-2025-52881), open for writing.
pub(crate) fn enter(attributes: File) -> io::Result<()> {
    // One write: the kernel takes a whole command or none (aa_change_profile(2)).
    let mut attributes = attributes;
    attributes.write_all(format!("changeprofile {PROFILE}").as_bytes())
}
