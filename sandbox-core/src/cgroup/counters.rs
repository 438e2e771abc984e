//! What a sandbox has used, read from the kernel's files.

use std::{io, os::fd::BorrowedFd};

use super::{Group, blkio::Io, read};
use crate::protocol::CgroupMode;

/// Totals since the group was made, init's share included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) cpu_us: u64,
    pub(crate) memory_peak_bytes: u64,
    /// Processes that an OOM killer killed, whoever called it.
    pub(crate) oom_kills: u64,
    /// Whether the group ever met its own memory limit: if not, the machine ran out of memory, or a group above.
    pub(crate) is_at_memory_limit: bool,
    pub(crate) pids_peak: u64,
    /// How often a fork was refused by the pids limit.
    pub(crate) pids_refused: u64,
    pub(crate) throttled_us: u64,
    pub(crate) io: Io,
}

/// The largest single request for memory that the limit may have refused: a huge page.
const NEAR_BYTES: u64 = 2 << 20;

impl Group {
    /// All counters at once.
    pub(crate) fn counters(&self) -> io::Result<Counters> {
        let (memory_peak, throttled_us) = match self.mode {
            CgroupMode::V2 => ("memory.peak", field(self.cpu(), "cpu.stat", "throttled_usec")?),
            CgroupMode::V1 | CgroupMode::Hybrid => ("memory.max_usage_in_bytes", field(self.cpu(), "cpu.stat", "throttled_time")? / 1000),
        };
        Ok(Counters {
            cpu_us: self.cpu_us()?,
            memory_peak_bytes: number(self.memory(), memory_peak)?.max(self.peak_before),
            oom_kills: self.oom_kills()?,
            is_at_memory_limit: self.is_at_memory_limit()?,
            pids_peak: number(self.pids(), "pids.peak")?,
            pids_refused: field(self.pids(), "pids.events", "max")?,
            throttled_us,
            io: self.io()?,
        })
    }

    /// CPU time of all its processes, living and dead, in microseconds.
    pub(crate) fn cpu_us(&self) -> io::Result<u64> {
        match self.mode {
            CgroupMode::V2 => field(self.cpu(), "cpu.stat", "usage_usec"),
            CgroupMode::V1 | CgroupMode::Hybrid => Ok(number(self.cpuacct(), "cpuacct.usage")? / 1000),
        }
    }

    /// The memory that it has now, in bytes, and its processes and threads.
    pub(crate) fn now(&self) -> io::Result<(u64, u64)> {
        let memory = if self.mode == CgroupMode::V2 { "memory.current" } else { "memory.usage_in_bytes" };
        Ok((number(self.memory(), memory)?, number(self.pids(), "pids.current")?))
    }

    /// Bytes of files in memory that are charged to it. They keep it, unseen, when it is removed.
    pub(crate) fn files_bytes(&self) -> io::Result<u64> {
        field(self.memory(), "memory.stat", "shmem")
    }

    fn is_at_memory_limit(&self) -> io::Result<bool> {
        match self.mode {
            CgroupMode::V2 => Ok(field(self.memory(), "memory.events", "max")? > 0),
            // There is no such counter (memory.failcnt is not kept by all kernels). Nothing but its own limit stops a group this close to it.
            CgroupMode::V1 | CgroupMode::Hybrid => {
                let (peak, limit) = (number(self.memory(), "memory.max_usage_in_bytes")?, number(self.memory(), "memory.limit_in_bytes")?);
                Ok(limit.saturating_sub(peak) <= NEAR_BYTES)
            }
        }
    }

    /// Processes that the kernel has killed because the group was out of memory.
    pub(crate) fn oom_kills(&self) -> io::Result<u64> {
        match self.mode {
            CgroupMode::V2 => field(self.memory(), "memory.events", "oom_kill"),
            CgroupMode::V1 | CgroupMode::Hybrid => field(self.memory(), "memory.oom_control", "oom_kill"),
        }
    }
}

pub(super) fn number(folder: BorrowedFd<'_>, name: &str) -> io::Result<u64> {
    let text = read(folder, name)?;
    text.trim_end().parse().map_err(|_| io::Error::other(format!("{name} says {:?}", text.trim_end())))
}

/// The value behind `key` in a file of lines `key value`.
pub(super) fn field(folder: BorrowedFd<'_>, name: &str, key: &str) -> io::Result<u64> {
    let text = read(folder, name)?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).ok_or_else(|| io::Error::other(format!("{name} has no {key}")))
}
