//! Landlock as a second fence: what a hole in the first would lead to is out of reach as well.
//!
//! Everything below the sandbox's own root is allowed, everything else is not: a descriptor of the host's that leaked, or a way out of
//! the mount namespace, opens nothing (landlock(7)). Signals and abstract unix sockets end at the sandbox, too, where the kernel can do that.

use std::{io, os::fd::BorrowedFd};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};

use crate::sys;

/// The newest version that is asked for. An older kernel gives what it has.
const NEWEST: ABI = ABI::V6;

/// Whether this kernel has Landlock, and it is switched on.
pub(crate) fn is_available() -> bool {
    sys::landlock_version().is_ok_and(|version| version > 0)
}

/// Restricts the calling process and all that it starts, for good. `no_new_privs` must already be set. The folders `listed`, and those in them, can be listed
/// by whoever has a descriptor of one.
///
/// # Errors
/// The kernel enforces nothing of it.
pub(crate) fn restrict(listed: &[BorrowedFd<'_>]) -> io::Result<()> {
    let root = PathFd::new("/").map_err(io::Error::other)?;
    let status = enforce(root, listed).map_err(io::Error::other)?;
    if status == RulesetStatus::NotEnforced { Err(io::Error::other("the kernel does not enforce it")) } else { Ok(()) }
}

fn enforce(root: PathFd, listed: &[BorrowedFd<'_>]) -> Result<RulesetStatus, RulesetError> {
    let all = AccessFs::from_all(NEWEST);
    let ruleset =
        Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?.scope(Scope::from_all(NEWEST))?.create()?;
    let ruleset = ruleset.add_rule(PathBeneath::new(root, all))?;
    let ruleset = listed.iter().try_fold(ruleset, |ruleset, folder| ruleset.add_rule(PathBeneath::new(folder, AccessFs::ReadDir)))?;
    Ok(ruleset.restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::{
        fs::{CWD, Mode, OFlags, openat},
        mount::{OpenTreeFlags, open_tree},
    };

    use super::*;

    /// Whether a file can be opened through a mount that is not below this process's root: what a leaked descriptor would be.
    fn opens(outside: impl AsFd) -> bool {
        openat(outside, "hostname", OFlags::RDONLY, Mode::empty()).is_ok()
    }

    /// Needs root and Landlock, as sandboxes do.
    #[test]
    fn what_is_not_below_the_root_cannot_be_opened_even_through_a_descriptor() {
        let outside = open_tree(CWD, "/etc", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).unwrap();
        assert!(opens(&outside), "the control: without Landlock it opens");
        // Landlock restricts a thread; this one ends with the test.
        let restricted = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict(&[]).unwrap();
            (opens(&outside), std::fs::File::open("/etc/hostname").is_ok())
        });
        assert_eq!(restricted.join().unwrap(), (false, true));
    }

    /// Whether a folder can be listed through such a mount.
    fn lists(outside: impl AsFd) -> bool {
        openat(outside, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).is_ok()
    }

    #[test]
    fn a_folder_that_may_be_listed_is_listed_and_its_files_stay_shut() {
        let outside = open_tree(CWD, "/etc", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).unwrap();
        let other = open_tree(CWD, "/usr", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).unwrap();
        let restricted = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict(&[outside.as_fd()]).unwrap();
            (lists(&outside), opens(&outside), lists(&other))
        });
        assert_eq!(restricted.join().unwrap(), (true, false, false));
    }
}
