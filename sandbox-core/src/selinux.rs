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

/// Whether this kernel has SELinux, and it is switched on: its file system exists only then.
pub(crate) fn is_enabled() -> bool {
    Path::new("/sys/fs/selinux").is_dir()
        && std::fs::read_to_string("/proc/filesystems").is_ok_and(|kinds| kinds.lines().any(|line| line.ends_with("selinuxfs")))
}

/// Has the next execve(2) of the calling process run under `label`. `attributes` is `attr/exec` of its own entry in a procfs that nobody
/// else made (CVE-2025-52881), open for writing.
pub(crate) fn label_next_exec(attributes: File, label: &str) -> io::Result<()> {
    let mut attributes = attributes;
    attributes.write_all(label.as_bytes())
}
