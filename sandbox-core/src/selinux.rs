//! An SELinux label for sandboxes, where the node is configured with one.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

/// The labels of all sandboxes of a node (`user:role:type:level`), as `process.selinuxLabel` and `linux.mountLabel` of the OCI runtime spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// Of every payload, from its execve on.
    pub process: String,
    /// Of the files in a sandbox's tree; none: what the policy gives to overlay and tmpfs.
    pub mount: Option<String>,
}

/// Where selinuxfs, the kernel's interface to its policy, is mounted.
const SELINUXFS: &str = "/sys/fs/selinux";

/// Whether this kernel has SELinux, and it is switched on: its file system exists only then.
pub(crate) fn is_enabled() -> bool {
    Path::new(SELINUXFS).is_dir()
        && std::fs::read_to_string("/proc/filesystems").is_ok_and(|kinds| kinds.lines().any(|line| line.ends_with("selinuxfs")))
}

/// Fails, with the label's name, unless the policy of this host has these labels and is enforced: who names a label relies on it.
pub(crate) fn check(labels: &Labels) -> io::Result<()> {
    let label = &labels.process;
    if !is_enabled() {
        return Err(io::Error::other(format!("this host has no SELinux for the label {label}")));
    }
    let enforce = std::fs::read_to_string(format!("{SELINUXFS}/enforce"));
    if enforce.map_err(|error| asking("enforce", label, &error))?.trim() != "1" {
        return Err(io::Error::other(format!("SELinux is permissive on this host: the label {label} would deny nothing")));
    }
    [Some(&labels.process), labels.mount.as_ref()].into_iter().flatten().try_for_each(|label| check_context(label))
}

fn check_context(label: &str) -> io::Result<()> {
    let told = File::options().write(true).open(format!("{SELINUXFS}/context")).and_then(|mut file| file.write_all(label.as_bytes()));
    told.map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => io::Error::other(format!("the SELinux policy of this host does not have the label {label}")),
        _ => asking("context", label, &error),
    })
}

fn asking(file: &str, label: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("asking {SELINUXFS}/{file} about the label {label} failed: {error}"))
}

/// Has the next execve(2) of the calling process run under `label`. `attributes` is `attr/exec` of its own entry in a procfs that nobody
/// else made (CVE-2025-52881), open for writing.
pub(crate) fn label_next_exec(attributes: File, label: &str) -> io::Result<()> {
    let mut attributes = attributes;
    attributes.write_all(label.as_bytes())
}
