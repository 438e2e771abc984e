//! What one service and its keeper hold at a moment, counted by kind: what must be the same before and after, whatever died in between.
//!
//! Taken at rest: no sandbox lives, and no image is there for which the keeper could have some stand ready. What may differ then, by rule:
//!
//! * The service's connections to Postgres are a pool that grows and shrinks: they are left out, and of its other descriptors there may be
//!   fewer than before (one that starts anew has not asked for all of them yet).
//! * Postgres' own files and processes are Postgres' business.
//! * A log that its row still speaks of is kept on purpose (`has_log_file`).
//! * Corpses that nobody has waited for yet hold nothing; those of the keeper's own children count.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
};

use anyhow::{Context, Result};

use crate::{database::Database, host, service::Place};

/// Ids of sandboxes: keeper `n` has so many of 65,536 from here on, and one for each init.
const FIRST_ID: u64 = 0x7000_0000;
const FIRST_INIT_ID: u64 = 0x6ffe_0000;
const SANDBOXES_OF_KEEPER: u64 = 2048;
const IDS_OF_SANDBOX: u64 = 65_536;

/// Kinds of which there may be fewer than before.
const AT_MOST: &str = "descriptor of the service";

/// Of what is new or gone, so many are named.
const SHOWN: usize = 6;

/// Things by kind: how many, and which.
#[derive(Debug, Clone, Default)]
pub struct Snapshot(BTreeMap<String, Vec<String>>);

/// What a keeper has made for sandboxes, used or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stock {
    /// Sandboxes' cgroups in each hierarchy.
    pub groups: usize,
    pub inits: usize,
}

impl Stock {
    /// # Errors
    /// The keeper is gone.
    pub fn of(keeper: u32) -> Result<Self> {
        let number = host::try_keeper_number(keeper).context("the keeper is gone")?;
        let own = format!("/memory/mayfly/k{number}/");
        let unified = format!("/cgroup/mayfly/k{number}/");
        let is_group =
            |path: &str| path.split_once(&own).or_else(|| path.split_once(&unified)).is_some_and(|(_, name)| !name.contains('/'));
        let groups = host::cgroups().iter().filter(|path| is_group(&path.to_string_lossy())).count();
        let inits = host::descendants(keeper).into_iter().filter(|pid| host::is_alive(*pid)).count();
        Ok(Self { groups, inits })
    }
}

/// The keepers that a service had, by their numbers and what their cgroups were: another's keeper may have a number next, and die in its own test.
#[derive(Debug, Default)]
pub struct Keepers(BTreeMap<String, BTreeSet<(u64, u64)>>);

impl Keepers {
    /// Notes a keeper that runs.
    pub fn meet(&mut self, number: String) {
        let groups = host::groups_of_keeper(&number);
        self.0.entry(number).or_default().extend(groups);
    }

    /// Whether the keeper of this number is dead, and was one of these.
    fn is_left(&self, number: &str) -> bool {
        self.0.get(number).is_some_and(|met| !met.is_disjoint(&host::groups_of_keeper(number))) && !host::is_keeper_alive(number)
    }
}

impl Snapshot {
    /// Of a service, of its keeper and of the keepers that it had before.
    ///
    /// # Errors
    /// One of them is gone, or its Postgres does not answer.
    pub fn take(place: &Place, database: &Database, former: &Keepers) -> Result<Self> {
        let keeper = place.try_keeper_pid().context("no keeper runs")?;
        let number = host::try_keeper_number(keeper).context("the keeper is gone")?;
        let mut snapshot = Self::default();
        snapshot.add_cgroups(&number, former);
        snapshot.add_mounts(keeper, &place.data_dir, &number)?;
        snapshot.add_processes(keeper, &number, former);
        snapshot.add_descriptors("keeper", keeper, &place.data_dir)?;
        snapshot.add_descriptors("service", place.pid, &place.data_dir)?;
        for _client in 0..database.clients()? {
            snapshot.0.entry(format!("{AT_MOST}: socket")).or_default().pop();
        }
        snapshot.add_loop_devices(&place.data_dir);
        snapshot.add_files(&place.data_dir, database)?;
        for row in database.ask("select id, state from sandboxes where state not in ('exited', 'failed')")? {
            snapshot.add("row that is not final", row.to_string());
        }
        for row in database.ask("select sandbox from inputs")? {
            snapshot.add("row of inputs", row.to_string());
        }
        Ok(snapshot)
    }

    /// What there is more or less of than `before`, with what is there now; empty if it is the same.
    #[must_use]
    pub fn differences(&self, before: &Self) -> Vec<String> {
        let kinds: BTreeSet<&String> = self.0.keys().chain(before.0.keys()).collect();
        let none = Vec::new();
        let mut differences = Vec::new();
        for kind in kinds {
            let (was, is) = (before.0.get(kind).unwrap_or(&none), self.0.get(kind).unwrap_or(&none));
            if was.len() == is.len() || (kind.starts_with(AT_MOST) && is.len() < was.len()) {
                continue;
            }
            let mut text = format!("{kind}: {} before, {} now", was.len(), is.len());
            let new: Vec<_> = is.iter().filter(|one| !was.contains(one)).take(SHOWN).collect();
            let gone: Vec<_> = was.iter().filter(|one| !is.contains(one)).take(SHOWN).collect();
            write!(text, "; new: {new:?}; gone: {gone:?}").expect("a String takes everything");
            differences.push(text);
        }
        differences
    }

    fn add(&mut self, kind: impl Into<String>, what: impl Into<String>) {
        self.0.entry(kind.into()).or_default().push(what.into());
    }

    fn add_cgroups(&mut self, number: &str, former: &Keepers) {
        for path in host::cgroups() {
            let text = path.display().to_string();
            let Some((hierarchy, below)) = text.split_once("/mayfly/k") else { continue };
            let (owner, below) = below.split_once('/').unwrap_or((below, ""));
            if owner == number {
                self.add(format!("cgroup in {hierarchy}"), below);
            } else if former.is_left(owner) {
                self.add("cgroup of a dead keeper", text);
            }
        }
    }

    fn add_mounts(&mut self, keeper: u32, data_dir: &Path, number: &str) -> Result<()> {
        let marker = data_dir.display().to_string();
        let stage = format!("/stage-{number} ");
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines().filter(|line| line.contains(&marker) || line.contains(&stage)) {
            self.add("mount of the host", line);
        }
        for line in fs::read_to_string(format!("/proc/{keeper}/mountinfo"))?.lines() {
            self.add("mount of the keeper", line);
        }
        Ok(())
    }

    fn add_processes(&mut self, keeper: u32, number: &str, former: &Keepers) {
        let mut namespaces = BTreeSet::new();
        for pid in host::descendants(keeper) {
            let name = host::status_field(pid, "Name").unwrap_or_default();
            let is_alive = host::is_alive(pid);
            self.add(if is_alive { "process below the keeper" } else { "corpse below the keeper" }, name);
            for entry in fs::read_dir(format!("/proc/{pid}/ns")).into_iter().flatten().flatten() {
                namespaces.extend(fs::read_link(entry.path()).map(|link| link.display().to_string()));
            }
        }
        let own: BTreeSet<_> = fs::read_dir(format!("/proc/{keeper}/ns"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()))
            .collect();
        for namespace in namespaces.difference(&own) {
            self.add("namespace of a process", namespace);
        }
        for pid in host::pids().filter(|pid| host::is_alive(*pid)) {
            let ids = host::status_field(pid, "Uid").unwrap_or_default();
            let owner = ids.split_whitespace().find_map(|id| keeper_of_id(id.parse().ok()?));
            let Some(owner) = owner.map(|owner| owner.to_string()) else { continue };
            if owner == number || former.is_left(&owner) {
                self.add("process with ids of sandboxes", format!("{pid} {} {ids}", host::command_line(pid)));
            }
        }
    }

    fn add_descriptors(&mut self, whose: &str, pid: u32, data_dir: &Path) -> Result<()> {
        let mut namespaces = BTreeSet::new();
        let folder = format!("/proc/{pid}/fd");
        for entry in fs::read_dir(&folder).with_context(|| folder.clone())?.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let text = target.display().to_string();
            let kind = kind_of(&text, data_dir);
            if kind.starts_with("namespace") {
                namespaces.insert(text.clone());
            }
            self.add(format!("descriptor of the {whose}: {kind}"), text);
        }
        for namespace in namespaces {
            self.add(format!("namespace held by the {whose}"), namespace);
        }
        Ok(())
    }

    fn add_loop_devices(&mut self, data_dir: &Path) {
        for device in host::loop_devices_of(data_dir) {
            self.add("loop device", device);
        }
    }

    fn add_files(&mut self, data_dir: &Path, database: &Database) -> Result<()> {
        let kept: BTreeSet<String> = database
            .ask("select id from sandboxes where has_log_file")?
            .iter()
            .filter_map(|row| row["id"].as_str().map(|id| format!("{id}.log")))
            .collect();
        for entry in fs::read_dir(data_dir).with_context(|| data_dir.display().to_string())?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            self.add("file in the data folder", &name);
            match name.as_str() {
                "postgres" => {}
                // What is in an image is the image's.
                "images" => names_in(&entry.path()).into_iter().for_each(|file| self.add("file in images", file)),
                "logs" => {
                    for file in names_in(&entry.path()).into_iter().filter(|file| !kept.contains(file)) {
                        self.add("file in logs", file);
                    }
                }
                _ => files_below(&entry.path()).into_iter().for_each(|file| self.add(format!("file in {name}"), file)),
            }
        }
        Ok(())
    }
}

/// The number of the keeper whose sandboxes have this user id.
fn keeper_of_id(id: u64) -> Option<u64> {
    let number = match id {
        FIRST_INIT_ID..FIRST_ID => (id - FIRST_INIT_ID) / SANDBOXES_OF_KEEPER,
        _ => id.checked_sub(FIRST_ID)? / (SANDBOXES_OF_KEEPER * IDS_OF_SANDBOX),
    };
    // Sixteen keepers fit on a machine; what is above is nobody's.
    (number < 16).then_some(number)
}

/// What a descriptor is, without what is different each time.
fn kind_of(target: &str, data_dir: &Path) -> String {
    if let Ok(below) = Path::new(target).strip_prefix(data_dir) {
        let first = below.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
        return format!("file in {}", first.unwrap_or_default());
    }
    if target.starts_with("/sys/fs/cgroup") {
        return "cgroup".to_owned();
    }
    if target.contains("/keeper-") && target.ends_with(".lock") {
        return "lock".to_owned();
    }
    match target.split_once(":[") {
        Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
        Some((kind, _)) => format!("namespace {kind}"),
        None => target.split(" (deleted)").next().unwrap_or(target).to_owned(),
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// All files and folders below a folder, with the length of files.
fn files_below(path: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let length = entry.metadata().map(|metadata| metadata.size()).unwrap_or_default();
        found.push(format!("{} ({length} bytes)", entry.path().display()));
        found.extend(files_below(&entry.path()));
    }
    found
}
