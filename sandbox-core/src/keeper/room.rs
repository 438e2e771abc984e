//! What the keeper itself can run out of: descriptors, terminals, and the disk below its logs. A launch that would is refused; what runs goes on.

use std::{io, os::fd::AsFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Keeper, SANDBOXES_MAX, warn};
use crate::{
    cgroup::Tree,
    disk,
    protocol::{OutputPolicy, SandboxId, Supervision},
    rootfs::TERMINALS_MAX,
};

/// Descriptors of a sandbox besides its groups': two namespaces; init and its socket; two pipes and the log; the writing end of its input; a layer on disk, or the
/// two of who makes it, and its second mount, and one more if it lies over a kept one; before the payload starts, the four that it will have, and afterwards no more, of the payload, of the memory limit, and of who lowers
/// that. A terminal is three in place of the pipes and the writing end.
const OF_SANDBOX: u64 = 16;
/// Of an exec: two pipes and the log; the process; the writing end of its input; the three that it will have, until init has them.
const OF_EXEC: u64 = 8;
/// Execs of one keeper at a time, and what part of the descriptors is theirs where there are few.
const EXECS_MAX: u64 = 4096;
const PART_OF_EXECS: u64 = 16;
/// Of a volume in use: its mount, or the two of who is at it, and the two of who removes it.
const OF_VOLUME: u64 = 4;
/// Volumes in use at a time, and what part of the descriptors is theirs where there are few.
const VOLUMES_MAX: u64 = 1024;
const PART_OF_VOLUMES: u64 = 32;
/// For connections, for what a message brings along, for files that are open for a moment, for the keeper's own.
const RESERVE: u64 = 64 + 130 + 62;
/// The most sandboxes, and parts of such, that are prepared ahead.
const AHEAD_MAX: u64 = 80;

/// How many sandboxes the descriptors of this process are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) sandboxes_max: u32,
    /// How many may be prepared ahead at a time, whole or in part.
    pub(super) ahead_max: usize,
    /// How many execs there may be in all sandboxes together.
    pub(super) execs_max: usize,
    /// How many volumes may be in use at a time.
    pub(super) volumes_max: usize,
}

impl Room {
    /// Raises the limit of descriptors as far as it takes and this process may.
    pub(super) fn make(tree: &Tree) -> io::Result<Self> {
        let each = OF_SANDBOX + tree.hierarchies();
        let wanted = RESERVE + (u64::from(SANDBOXES_MAX) + AHEAD_MAX) * each + EXECS_MAX * OF_EXEC + VOLUMES_MAX * OF_VOLUME;
        let found = getrlimit(Resource::Nofile);
        let hard = found.maximum.unwrap_or(u64::MAX);
        // Shells and init systems allow far fewer than this machine can have; more than the hard limit takes a capability (setrlimit(2)).
        let raised = hard < wanted && setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: Some(wanted) }).is_ok();
        if !raised {
            setrlimit(Resource::Nofile, Rlimit { current: found.maximum, maximum: found.maximum })?;
        }
        let room = Self::of(if raised { wanted } else { hard }, each);
        if let Err(error) = raise_terminals(room.sandboxes_max) {
            warn(format_args!("a few sandboxes may take all terminals that this machine has for them: {error}"));
        }
        Ok(room)
    }

    fn of(descriptors: u64, each: u64) -> Self {
        let descriptors = descriptors.saturating_sub(RESERVE);
        // What sandboxes need at the most leaves the rest to execs.
        let volumes = (descriptors / PART_OF_VOLUMES / OF_VOLUME).min(VOLUMES_MAX);
        let descriptors = descriptors - volumes * OF_VOLUME;
        let of_sandboxes = (u64::from(SANDBOXES_MAX) + AHEAD_MAX) * each;
        let execs = descriptors.saturating_sub(of_sandboxes).max(descriptors / PART_OF_EXECS) / OF_EXEC;
        let execs = execs.min(EXECS_MAX);
        let fitting = (descriptors - execs * OF_EXEC) / each;
        let ahead = (fitting / 4).min(AHEAD_MAX);
        let sandboxes = (fitting - ahead).min(u64::from(SANDBOXES_MAX));
        Self {
            sandboxes_max: u32::try_from(sandboxes).unwrap_or(SANDBOXES_MAX),
            ahead_max: usize::try_from(ahead).unwrap_or(0),
            execs_max: usize::try_from(execs).unwrap_or(0),
            volumes_max: usize::try_from(volumes).unwrap_or(0),
        }
    }
}

/// Has this machine have all the terminals that so many sandboxes may take, beside those that it keeps for itself (the kernel's admin-guide/sysctl/kernel, `pty`). Whoever is set higher
/// stays so. A number costs nothing: a terminal takes memory of whoever opens it.
fn raise_terminals(sandboxes: u32) -> io::Result<()> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/kernel/pty/{name}"))?;
        text.trim().parse::<u64>().map_err(io::Error::other)
    };
    let wanted = read("reserve")? + u64::from(sandboxes) * TERMINALS_MAX;
    if read("max")? >= wanted { Ok(()) } else { std::fs::write("/proc/sys/kernel/pty/max", wanted.to_string()) }
}

impl Keeper {
    /// Why there can be no sandbox more, for people. One `on_kept` layer takes the place of that.
    pub(super) fn check_number(&self, on_kept: Option<SandboxId>) -> Result<(), String> {
        let max = self.hello.sandboxes_max;
        if self.sandboxes.len() + self.layers.idle() - usize::from(on_kept.is_some_and(|id| self.layers.is_idle(id)))
            < usize::try_from(max).unwrap_or(usize::MAX)
        {
            return Ok(());
        }
        Err(format!("this keeper has id ranges and descriptors for {max} sandboxes and kept layers at a time"))
    }

    /// Why there is no room for a sandbox like this, for people. What others may still write does not count: most never do, and who
    /// finds no room waits for some.
    pub(super) fn check_room(&self, supervision: &Supervision, on_kept: Option<SandboxId>) -> io::Result<Result<(), String>> {
        if let Err(why) = self.check_number(on_kept) {
            return Ok(Err(why));
        }
        self.check_log_room(supervision.output_policy, supervision.output_bytes)
    }

    /// The same for the log of something that may write so much to each of its streams.
    pub(super) fn check_log_room(&self, policy: OutputPolicy, output_bytes: u64) -> io::Result<Result<(), String>> {
        let own = match policy {
            OutputPolicy::Discard => 0,
            OutputPolicy::Truncate | OutputPolicy::Kill => output_bytes.saturating_mul(2),
        };
        let space = disk::Space::of(self.logs_lock.as_fd())?;
        Ok(if space.leaves_enough(own) {
            Ok(())
        } else {
            let (folder, free, kept) = (self.logs.display(), space.free_bytes, space.kept_bytes());
            Err(format!("the disk of {folder} has {free} bytes free: {kept} are kept, and this sandbox may write {own}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_sandboxes_can_have_open_is_within_the_limit() {
        for descriptors in [0, 256, 512, 1024, 20_000, 1 << 20] {
            let room = Room::of(descriptors, 19);
            let taken = (u64::from(room.sandboxes_max) + room.ahead_max as u64) * 19 + room.execs_max as u64 * OF_EXEC;
            let taken = taken + room.volumes_max as u64 * OF_VOLUME;
            assert!(taken == 0 || taken + RESERVE <= descriptors, "{descriptors}: {room:?}");
            assert!(room.sandboxes_max as usize >= room.ahead_max);
        }
        assert_eq!(Room::of(1 << 20, 19).sandboxes_max, SANDBOXES_MAX);
        assert!(Room::of(1024, 19).sandboxes_max > 25 && Room::of(1024, 19).execs_max >= 5);
        assert_eq!(Room::of(1 << 20, 19).execs_max as u64, EXECS_MAX);
    }
}
