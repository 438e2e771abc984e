//! Standing still: every process of a group, for as long as it is wanted.
//!
//! Where there is a cgroup2 tree its groups freeze, and a kill reaches what is frozen (cgroup-v2, `cgroup.freeze`). The freezer of v1 holds a kill
//! back until the thaw (cgroup-v1/freezer-subsystem), so whoever ends a group thaws it first, in both.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use super::{Group, counters::field, read, write};

/// Who freezes a group.
enum Freezer<'a> {
    V1(BorrowedFd<'a>),
    V2(BorrowedFd<'a>),
}

impl Group {
    /// Whether this machine can freeze one.
    pub(crate) fn can_freeze(&self) -> bool {
        self.freezer().is_some()
    }

    /// Begins to freeze; [`Group::is_frozen`] tells when all of it stands still.
    pub(crate) fn freeze(&self) -> io::Result<()> {
        match self.freezer() {
            Some(Freezer::V2(folder)) => write(folder, "cgroup.freeze", "1"),
            Some(Freezer::V1(folder)) => write(folder, "freezer.state", "FROZEN"),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Lets it go on. No error if it was not frozen.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        match self.freezer() {
            Some(Freezer::V2(folder)) => write(folder, "cgroup.freeze", "0"),
            Some(Freezer::V1(folder)) => write(folder, "freezer.state", "THAWED"),
            None => Ok(()),
        }
    }

    pub(crate) fn is_frozen(&self) -> io::Result<bool> {
        match self.freezer() {
            Some(Freezer::V2(folder)) => Ok(field(folder, "cgroup.events", "frozen")? == 1),
            // Reading is what has it look again.
            Some(Freezer::V1(folder)) => Ok(read(folder, "freezer.state")?.trim_end() == "FROZEN"),
            None => Ok(false),
        }
    }

    fn freezer(&self) -> Option<Freezer<'_>> {
        let of_v1 = || self.places.freezer.and_then(|index| self.folders.get(index)).map(|folder| Freezer::V1(folder.as_fd()));
        self.birthplace().map(Freezer::V2).or_else(of_v1)
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::{
        super::{Devices, Tree, discover},
        *,
    };

    fn wait_for(mut what: impl FnMut() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !what() {
            assert!(std::time::Instant::now() < deadline, "it does not come to that");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Freezes, thaws and ends a process of its own in a group of `found`.
    fn assert_freezes(found: &super::super::Found, name: &str) {
        let tree = Tree::open_in(found, name, Devices::default()).unwrap();
        let group = tree.make("frozen".to_owned()).unwrap();
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        for folder in &group.folders {
            write(folder.as_fd(), "cgroup.procs", &child.id().to_string()).unwrap();
        }
        assert!(group.can_freeze() && !group.is_frozen().unwrap());
        group.freeze().unwrap();
        wait_for(|| group.is_frozen().unwrap());
        group.thaw().unwrap();
        wait_for(|| !group.is_frozen().unwrap());
        // What a keeper left frozen that was killed: the next one of its name ends it.
        group.freeze().unwrap();
        wait_for(|| group.is_frozen().unwrap());
        let next = Tree::open_in(found, name, Devices::default()).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        next.remove().unwrap();
    }

    /// Needs root and cgroups, as sandboxes do.
    #[test]
    fn a_group_stands_still_until_it_is_thawed() {
        let found = discover();
        assert_freezes(&found, &format!("test-freezer-{}", std::process::id()));
    }

    #[test]
    fn so_does_one_of_a_machine_without_cgroup2() {
        let mut found = discover();
        let freezer = std::path::Path::new("/sys/fs/cgroup/freezer");
        // The other world has no such machine in it.
        if found.mode == crate::protocol::CgroupMode::V2 || !freezer.join("tasks").exists() {
            return;
        }
        found.mode = crate::protocol::CgroupMode::V1;
        found.unified = None;
        found.freezer = Some(freezer.to_owned());
        assert_freezes(&found, &format!("test-freezer-v1-{}", std::process::id()));
    }
}
