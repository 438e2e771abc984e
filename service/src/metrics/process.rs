//! What this process takes of its machine, under the names that every exporter gives it.

use std::fs;

use prometheus::{Counter, Gauge, IntGauge};

use super::shelf::Shelf;

/// Read from `/proc` whenever somebody asks (proc_pid_stat(5)).
#[derive(Debug)]
pub(super) struct Process {
    cpu_seconds: Counter,
    resident_memory_bytes: IntGauge,
    virtual_memory_bytes: IntGauge,
    threads: IntGauge,
    open_fds: IntGauge,
    max_fds: IntGauge,
    start_time_seconds: Gauge,
}

impl Process {
    pub(super) fn new(shelf: &Shelf) -> anyhow::Result<Self> {
        Ok(Self {
            cpu_seconds: shelf.seconds("process_cpu_seconds_total", "CPU time of the service, in user and kernel")?,
            resident_memory_bytes: shelf.gauge("process_resident_memory_bytes", "Memory of the service that is in RAM")?,
            virtual_memory_bytes: shelf.gauge("process_virtual_memory_bytes", "Address space of the service")?,
            threads: shelf.gauge("process_threads", "Threads of the service")?,
            open_fds: shelf.gauge("process_open_fds", "Descriptors that the service has open")?,
            max_fds: shelf.gauge("process_max_fds", "Descriptors that the service may have open")?,
            start_time_seconds: shelf.fraction("process_start_time_seconds", "When the service started, in Unix time")?,
        })
    }

    /// Looks again. What cannot be read stays as it was.
    pub(super) fn look(&self) {
        if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
            self.cpu_seconds.inc_by((stat.cpu_seconds - self.cpu_seconds.get()).max(0.0));
            self.resident_memory_bytes.set(stat.resident_memory_bytes);
            self.virtual_memory_bytes.set(stat.virtual_memory_bytes);
            self.threads.set(stat.threads);
            let booted_at = fs::read_to_string("/proc/stat").ok().and_then(|text| booted_at(&text));
            if let Some(booted_at) = booted_at {
                self.start_time_seconds.set(booted_at + stat.started_after_seconds);
            }
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // The folder itself is open while it is read.
            self.open_fds.set(i64::try_from(entries.count()).unwrap_or(i64::MAX) - 1);
        }
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        self.max_fds.set(i64::try_from(most).unwrap_or(i64::MAX));
    }
}

#[derive(Debug, PartialEq)]
struct Stat {
    cpu_seconds: f64,
    threads: i64,
    started_after_seconds: f64,
    virtual_memory_bytes: i64,
    resident_memory_bytes: i64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name of a program may hold anything, blanks and parentheses too; what follows the last is numbers.
        let (_, numbers) = text.rsplit_once(')')?;
        let fields: Vec<&str> = numbers.split_whitespace().collect();
        // The first of these is field 3 of the manual page.
        let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
        let ticks = |number: usize| Some(seconds(field(number)?, rustix::param::clock_ticks_per_second()));
        Some(Self {
            cpu_seconds: ticks(14)? + ticks(15)?,
            threads: field(20)?,
            started_after_seconds: ticks(22)?,
            virtual_memory_bytes: field(23)?,
            resident_memory_bytes: field(24)?.saturating_mul(i64::try_from(rustix::param::page_size()).unwrap_or(4096)),
        })
    }
}

/// When the machine started, in Unix time (proc_stat(5), `btime`).
fn booted_at(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}

fn seconds(ticks: i64, per_second: u64) -> f64 {
    let thousandths = u64::try_from(ticks).unwrap_or(0).saturating_mul(1000) / per_second.max(1);
    std::time::Duration::from_millis(thousandths).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_program_misleads_nobody() {
        let line = "7 (a) b) (c) S 1 7 7 0 -1 4194560 9 0 0 0 250 150 0 0 20 0 5 0 300 4096 2 18446744073709551615 1 1";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.threads, stat.virtual_memory_bytes), (5, 4096));
        assert_eq!(stat.resident_memory_bytes, 2 * i64::try_from(rustix::param::page_size()).unwrap());
        let per_second = rustix::param::clock_ticks_per_second();
        assert!((stat.cpu_seconds - seconds(400, per_second)).abs() < 0.002);
    }

    #[test]
    fn what_is_told_is_of_this_process() {
        let shelf = Shelf::default();
        let process = Process::new(&shelf).unwrap();
        process.look();
        assert!(process.resident_memory_bytes.get() > 0 && process.open_fds.get() > 0 && process.threads.get() > 0);
        assert!(process.start_time_seconds.get() > 1e9);
    }
}
