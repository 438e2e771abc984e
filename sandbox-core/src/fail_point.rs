//! Steps at which a test can have a process die, to see that nothing is lost and nothing left behind.
//!
//! Compiled in with the feature `fail-points` alone; without it a step is nothing. Which step kills, and at which time it is reached, stands in
//! the environment variable `MAYFLY_FAIL_POINTS`, in the words of the crate `fail`: `keeper.launch.cloned=2*off->1*return` kills at the third
//! time. Several are parted by semicolons.

/// Every step that there is. What a crash test goes through.
pub const STEPS: &[&str] = &[
    // A keeper starts: it has its number; what others left is gone; clients can connect.
    "keeper.start.locked",
    "keeper.start.swept",
    "keeper.start.listening",
    // A launch, from the request to the answer. What stands ready for a request was built by the steps from `slot_taken` to `cloned`, too.
    "keeper.launch.received",
    "keeper.launch.log_made",
    "keeper.launch.slot_taken",
    "keeper.launch.disk_begun",
    "keeper.launch.cloned",
    "keeper.launch.recorded",
    "keeper.launch.ready",
    "keeper.launch.limited",
    "keeper.launch.ordered",
    "keeper.launch.started",
    "keeper.launch.answered",
    "keeper.park.built",
    // An end: init has said so; the pipes are read; the counters are; the log has its last record; who waited knows; init is killed.
    "keeper.end.reported",
    "keeper.end.pumped",
    "keeper.end.counted",
    "keeper.end.logged",
    "keeper.end.answered",
    "keeper.end.killed",
    // What is done to one that runs: a stop is noted, and its signal not sent; it stands still; a lower memory limit is on its way; it has other limits.
    "keeper.control.noted",
    "keeper.control.frozen",
    "keeper.control.lowering",
    "keeper.control.changed",
    // An exec, from the request to the answer; its end: init has said so; the log has its last record; who waited knows.
    "keeper.exec.received",
    "keeper.exec.log_made",
    "keeper.exec.recorded",
    "keeper.exec.ordered",
    "keeper.exec.started",
    "keeper.exec.answered",
    "keeper.exec.reported",
    "keeper.exec.logged",
    "keeper.exec.told",
    // What is taken apart after it.
    "keeper.remove.disk",
    "keeper.remove.group",
    "keeper.remove.done",
    // The log is deleted, or sealed where it is to be kept; the record is dropped.
    "keeper.forget.unlinked",
    "keeper.forget.done",
    // An image: its folder is made; it has its name.
    "keeper.unpack.begun",
    "keeper.unpack.committed",
    // A volume: somebody is to make or remove it; he has; it is mounted for a sandbox.
    "keeper.volume.begun",
    "keeper.volume.done",
    "keeper.volume.mounted",
    // An upgrade: a child tries the new program; that says it can; the state is written down; the new program has it.
    "keeper.upgrade.trial_begun",
    "keeper.upgrade.accepted",
    "keeper.upgrade.described",
    "keeper.upgrade.taken_over",
    // A webhook answered, and nobody has noted it yet.
    "service.webhook.sent",
    // An admission: the row is there, claimed or queued; one that waited is claimed.
    "service.admit.claimed",
    "service.admit.queued",
    "service.queue.claimed",
    // One of the runs of a batch: it is accepted, and those behind it are not yet.
    "service.batch.accepted",
    // A launch: what it is given is in memory; the keeper has the order; it has answered; the row says that it runs.
    "service.launch.given",
    "service.launch.sent",
    "service.launch.answered",
    "service.running.stored",
    // An end: it is known; the log is read; the row has it, or waits for another attempt; who waited knows; the keeper has forgotten it.
    "service.settle.heard",
    "service.settle.read",
    "service.settle.stored",
    "service.settle.returned",
    "service.settle.told",
    "service.settle.forgotten",
    // And then it is removed, where that was wished for.
    "service.settle.removed",
    // A compile step: it has ended; what it wrote is given up.
    "service.compile.ended",
    "service.compile.given_up",
    // A case of a run: the keeper has it; it has ended; the row says so.
    "service.case.begun",
    "service.case.ended",
    "service.case.stored",
    // A pause, or the end of one: the keeper has done it; the row says so. An order to stop: its event is there; the keeper has it. A change: the
    // keeper holds it; the row says so.
    "service.pause.held",
    "service.pause.stored",
    "service.stop.told",
    "service.stop.ordered",
    "service.update.held",
    "service.update.stored",
    // Another life: its room is taken; its row is claimed. A layer that is given up: the keeper has it no more.
    "service.start.taken",
    "service.start.claimed",
    "service.layer.dropped",
    // A deletion: its event is there; the order is given; the row is gone; so is the log.
    "service.delete.told",
    "service.delete.ordered",
    "service.delete.stored",
    "service.delete.forgotten",
    // A start: what is there is known; it is followed.
    "service.recover.listed",
    "service.recover.taken",
    // A volume: it has its row; its file; the row says so. It has no name any more; no file.
    "service.volume.begun",
    "service.volume.made",
    "service.volume.stored",
    "service.volume.ended",
    "service.volume.removed",
    // A sandbox of a pool: it has its row, and is not launched yet; it is somebody's, and only its row says so.
    "service.pool.admitted",
    "service.pool.taken",
    // A request with an idempotency key: it is noted that what must not be done twice is begun; what it asks for is done, and its answer is not
    // kept yet.
    "service.idempotency.begun",
    "service.idempotency.worked",
    // An image is pulled: it is all here, as an archive.
    "service.pull.fetched",
    // An image comes in: its archive is here; that is read; its blobs are kept; it is unpacked; it has its row.
    "service.import.received",
    "service.import.read",
    "service.import.kept",
    "service.import.unpacked",
    "service.import.recorded",
    // A sandbox becomes an image: its tree is read.
    "service.commit.read",
    // An image goes: its row; its root.
    "service.image.unnamed",
    "service.image.removed",
];

/// Takes the environment's word for which steps kill. At the start of a process.
#[cfg(feature = "fail-points")]
#[expect(clippy::disallowed_methods, reason = "the programs that are installed have no such variable")]
pub fn arm() {
    let asked = std::env::var("MAYFLY_FAIL_POINTS").unwrap_or_default();
    for point in asked.split(';').filter(|point| !point.is_empty()) {
        let (name, action) = point.split_once('=').expect("a step and what to do there");
        fail::cfg(name, action).expect("the crate `fail` knows what to do");
    }
}

/// Takes the environment's word for which steps kill: none, without the feature.
#[cfg(not(feature = "fail-points"))]
pub const fn arm() {}

/// Says that a step was reached: `process.area.step`, named after what has just been done.
#[cfg(feature = "fail-points")]
pub fn reached(step: &str) {
    fail::eval(step, |_| rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL));
}

/// Says that a step was reached: nothing, without the feature.
#[cfg(not(feature = "fail-points"))]
pub const fn reached(_step: &str) {}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;

    /// The names with which `reached` is called in the sources below `folder`.
    fn names_in(folder: &Path, names: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                names_in(&path, names);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let calls = text.split("reached(\"").skip(1).filter_map(|rest| rest.split('"').next());
                // What the comment at the top of this file and this test say are no calls.
                names.extend(calls.filter(|_| !path.ends_with("fail_point.rs")).map(str::to_owned));
            }
        }
    }

    #[test]
    fn the_list_has_every_step_of_the_sources_and_no_other() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut names = Vec::new();
        names_in(&here.join("src"), &mut names);
        names_in(&here.join("../service/src"), &mut names);
        let found: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(found, STEPS.iter().copied().collect::<BTreeSet<_>>());
        assert_eq!(STEPS.len(), STEPS.iter().collect::<BTreeSet<_>>().len(), "a step stands twice in the list");
    }
}
