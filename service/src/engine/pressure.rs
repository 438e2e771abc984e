//! What keeps this node from taking work although room is left: an operator's word, a machine that runs short of something, no keeper.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{Engine, EngineError};

/// How long nothing is taken after the keeper found the machine short of something.
const BREATHER: Duration = Duration::from_secs(1);

/// How often the disk is looked at while something large is put on it.
const DISK_LOOK: Duration = Duration::from_millis(100);

/// The share of a disk, in percent, that is kept without an operator's word, and how many bytes of a large one.
const DISK_PERCENT: u64 = 5;
const DISK_BYTES_MAX: u64 = 2 << 30;

/// The share of the machine, in percent, that no new sandbox is started into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserves {
    pub memory_percent: u64,
    /// [`None`]: five, but at most 2 GiB.
    pub disk_percent: Option<u64>,
}

/// What this machine is short of.
#[derive(Debug)]
pub(super) struct Pressure {
    reserves: Reserves,
    /// The folder on whose disk logs, images and perhaps the database are.
    folder: PathBuf,
    /// What the last look found.
    seen: Mutex<Option<String>>,
    /// What the keeper lacked, and until when that counts.
    told: Mutex<Option<(String, Instant)>>,
}

impl Pressure {
    pub(super) fn new(reserves: Reserves, folder: PathBuf) -> Self {
        Self { reserves, folder, seen: Mutex::default(), told: Mutex::default() }
    }

    /// Looks at the machine. What cannot be read is no shortage.
    pub(super) fn look(&self) {
        let found = self.shortage().unwrap_or_else(|error| {
            tracing::warn!(%error, "how much of this machine is left cannot be read");
            None
        });
        let before = std::mem::replace(&mut *lock(&self.seen), found.clone());
        match (before, found) {
            (None, Some(shortage)) => tracing::warn!("{shortage}: no sandbox is started until that has changed"),
            (Some(shortage), None) => tracing::info!("not so any more: {shortage}"),
            (None, None) | (Some(_), Some(_)) => {}
        }
    }

    fn shortage(&self) -> io::Result<Option<String>> {
        let memory_percent = self.reserves.memory_percent;
        if let Some(shortage) = self.disk_shortage()? {
            return Ok(Some(shortage));
        }
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let kib = |name: &str| meminfo.lines().find_map(|line| line.strip_prefix(name)?.trim().trim_end_matches(" kB").parse::<u64>().ok());
        match (kib("MemAvailable:"), kib("MemTotal:")) {
            (Some(free), Some(total)) if is_below(free, total, memory_percent) => {
                Ok(Some(format!("this node has less than {memory_percent} % of its memory left")))
            }
            _ => Ok(None),
        }
    }

    fn disk_shortage(&self) -> io::Result<Option<String>> {
        let disk = rustix::fs::statvfs(&self.folder)?;
        let free_bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
        let kept_bytes = disk_kept_bytes(disk.f_blocks.saturating_mul(disk.f_frsize), self.reserves.disk_percent);
        let is_short = free_bytes < kept_bytes;
        Ok(is_short.then(|| format!("this node has {free_bytes} bytes of its disk left, and keeps {kept_bytes}")))
    }

    /// The keeper could not start a sandbox for want of something.
    pub(super) fn note(&self, message: &str) {
        *lock(&self.told) = Some((format!("this node is short of something: {message}"), Instant::now() + BREATHER));
    }

    /// What there is too little of now.
    pub(super) fn now(&self) -> Option<String> {
        let told = lock(&self.told).as_ref().filter(|(_, until)| *until > Instant::now()).map(|(message, _)| message.clone());
        told.or_else(|| lock(&self.seen).clone())
    }
}

impl Engine {
    /// Fails if this node is short of something: nothing large is put on its disk then.
    pub fn check_shortage(&self) -> Result<(), EngineError> {
        self.pressure.now().map_or(Ok(()), |shortage| Err(EngineError::Busy(shortage)))
    }

    /// Does something that puts much on this node's disk, and gives it up when that has no more left than is kept. What cannot be read is no shortage.
    pub async fn while_disk_lasts<T>(&self, work: impl Future<Output = T>) -> Result<T, EngineError> {
        while_lasts(|| self.pressure.disk_shortage().ok().flatten(), work).await
    }

    /// Whether nothing is started here because the machine lacks memory or disk.
    pub fn is_short(&self) -> bool {
        self.pressure.now().is_some()
    }

    /// Why this node takes no work now; `None` if it does.
    pub(super) fn hindrance(&self) -> Option<String> {
        if self.is_draining() || self.is_closing() {
            return Some("this node is stopping".to_owned());
        }
        if self.tenure.orders().is_drained {
            return Some("this node is drained".to_owned());
        }
        if self.keeper.hello().is_none() {
            return Some("the keeper of this node is away".to_owned());
        }
        self.pressure.now()
    }
}

/// Looks again and again, first of all too, until the work is done or something is short.
async fn while_lasts<T>(look: impl Fn() -> Option<String>, work: impl Future<Output = T>) -> Result<T, EngineError> {
    let mut work = std::pin::pin!(work);
    loop {
        if let Some(shortage) = look() {
            return Err(EngineError::Busy(shortage));
        }
        if let Ok(done) = tokio::time::timeout(DISK_LOOK, &mut work).await {
            return Ok(done);
        }
    }
}

/// What is kept of a disk.
fn disk_kept_bytes(total_bytes: u64, percent: Option<u64>) -> u64 {
    let share = |percent| total_bytes / 100 * percent;
    percent.map_or_else(|| share(DISK_PERCENT).min(DISK_BYTES_MAX), share)
}

/// Whether less than `percent` of `total` is left.
fn is_below(left: u64, total: u64, percent: u64) -> bool {
    u128::from(left) * 100 < u128::from(total) * u128::from(percent)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn pressure(memory_percent: u64, disk_percent: u64) -> Pressure {
        Pressure::new(Reserves { memory_percent, disk_percent: Some(disk_percent) }, std::env::temp_dir())
    }

    #[test]
    fn a_share_is_kept_exactly() {
        assert!(!is_below(5, 100, 5) && is_below(4, 100, 5));
        assert!(!is_below(0, 100, 0));
        assert!(!is_below(u64::MAX, u64::MAX, 100));
    }

    #[test]
    fn a_large_disk_keeps_no_more_than_it_needs_unless_told_to() {
        assert_eq!(disk_kept_bytes(10 << 30, None), (10 << 30) / 100 * 5);
        assert_eq!(disk_kept_bytes(1 << 40, None), DISK_BYTES_MAX);
        assert_eq!(disk_kept_bytes(1000, Some(50)), 500);
    }

    #[test]
    fn a_machine_that_keeps_nothing_back_is_never_short() {
        let pressure = pressure(0, 0);
        pressure.look();
        assert_eq!(pressure.now(), None);
    }

    #[test]
    fn what_is_short_is_named() {
        for (memory, disk, word) in [(100, 0, "memory"), (0, 100, "disk")] {
            let pressure = pressure(memory, disk);
            pressure.look();
            assert!(pressure.now().unwrap().contains(word));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_fills_the_disk_is_given_up_when_that_is_short_and_not_before() {
        let (looks, is_done) = (Cell::new(0), Cell::new(false));
        let look = |short_after: u32| {
            looks.set(looks.get() + 1);
            (looks.get() > short_after).then(|| "full".to_owned())
        };
        let work = async || {
            tokio::time::sleep(Duration::from_secs(1)).await;
            is_done.set(true);
        };

        let given_up = while_lasts(|| look(5), work()).await;

        assert!(matches!(given_up, Err(EngineError::Busy(why)) if why == "full"));
        assert!(!is_done.get());
        looks.set(0);
        while_lasts(|| look(u32::MAX), work()).await.unwrap();
        assert!(is_done.get() && looks.get() > 5, "{}", looks.get());
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_keeper_lacked_counts_for_a_moment() {
        let pressure = pressure(0, 0);
        pressure.note("process ids");
        assert!(pressure.now().unwrap().contains("process ids"));
        assert!(pressure.now().is_some());
        tokio::time::advance(BREATHER * 2).await;
        assert_eq!(pressure.now(), None);
    }
}
