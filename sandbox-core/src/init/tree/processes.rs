//! The payload's processes, as the sandbox's own `/proc` tells of them.

use std::{
    fs::File,
    io::{Read, Write},
};

use nix::unistd::{SysconfVar, sysconf};
use rustix::fs::{Mode, OFlags, openat};

use super::{Place, fault, files::names, io_fault, refused};
use crate::tree::{COMMAND_BYTES_MAX, Fault, Process, Reply, write_frame};

/// Processes in one answer: with [`COMMAND_BYTES_MAX`] each, far below what a frame holds.
const ANSWER_MAX: usize = 256;
/// What the kernel counts CPU time in, for programs (`USER_HZ`), is 10 ms on every architecture that is left.
const TICK_MS: u64 = 10;
/// The most of a file of `/proc` that is read.
const FILE_BYTES_MAX: u64 = 8192;

impl Place {
    /// All of them, but for the last answer, which is returned. Those that have gone meanwhile are left out, and so are ours: they are in no session of the
    /// sandbox's, as whoever descends from a payload is.
    pub(super) fn processes(&self, mut to: impl Write) -> Result<Reply, Fault> {
        let folder = openat(&self.proc, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(fault)?;
        let page_bytes = page_bytes()?;
        let mut processes = Vec::new();
        for name in names(&folder).map_err(fault)? {
            let name = name.map_err(fault)?;
            let Some(pid) = std::str::from_utf8(&name).ok().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let Some(process) = self.process(pid, page_bytes) else { continue };
            processes.push(process);
            if processes.len() >= ANSWER_MAX {
                let reply = Reply::Processes { processes: std::mem::take(&mut processes), is_more: true };
                write_frame(&mut to, &reply).map_err(|e| io_fault(&e))?;
            }
        }
        Ok(Reply::Processes { processes, is_more: false })
    }

    fn process(&self, pid: u32, page_bytes: u64) -> Option<Process> {
        let stat = self.read(pid, "stat", FILE_BYTES_MAX)?;
        let status = self.read(pid, "status", FILE_BYTES_MAX)?;
        let mut process = parse(pid, &stat, page_bytes)?;
        process.uid = uid(&status)?;
        let command = self.read(pid, "cmdline", COMMAND_BYTES_MAX as u64).unwrap_or_default();
        let command = command.strip_suffix(b"\0").unwrap_or(&command);
        if !command.is_empty() {
            process.command = command.to_vec();
        }
        Some(process)
    }

    fn read(&self, pid: u32, name: &str, bytes_max: u64) -> Option<Vec<u8>> {
        let file = openat(&self.proc, format!("{pid}/{name}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut bytes = Vec::new();
        File::from(file).take(bytes_max).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }
}

/// The C library knows it from the start. rustix would ask `/proc/self/auxv` where the kernel is older than 6.4, and we must not open that here.
fn page_bytes() -> Result<u64, Fault> {
    let bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| u64::try_from(bytes).ok());
    bytes.ok_or_else(|| refused("the size of a page is not known"))
}

/// A line of proc_pid_stat(5). The name in it is the payload's to choose, parentheses and all. `None` for a process of ours.
fn parse(pid: u32, line: &[u8], page_bytes: u64) -> Option<Process> {
    let end = line.iter().rposition(|byte| *byte == b')')?;
    let start = line.iter().position(|byte| *byte == b'(')?;
    let name = line.get(start + 1..end)?;
    let rest = std::str::from_utf8(line.get(end + 1..)?).ok()?;
    // The first of them is the third of the line.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |place: usize| fields.get(place - 3)?.parse::<u64>().ok();
    let session = number(6)?;
    if session == 0 {
        return None;
    }
    Some(Process {
        pid,
        parent: u32::try_from(number(4)?).ok()?,
        uid: 0,
        state: *fields.first()?.as_bytes().first()?,
        threads: u32::try_from(number(20)?).ok()?,
        cpu_ms: (number(14)? + number(15)?).saturating_mul(TICK_MS),
        resident_bytes: number(24)?.saturating_mul(page_bytes),
        command: [b"[", name, b"]"].concat(),
    })
}

/// The real user id in proc_pid_status(5).
fn uid(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    std::str::from_utf8(line).ok()?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] =
        b"7 (a) S 1 (b) R 3 7 7 0 -1 4194560 109 0 0 0 12 3 0 0 20 0 4 0 8181 4620288 250 18446744073709551615 1 1 0 0 0 0 0 0 0";

    #[test]
    fn a_name_with_parentheses_deceives_nobody() {
        let process = parse(7, LINE, 4096).unwrap();
        assert_eq!((process.state, process.parent, process.threads), (b'R', 3, 4));
        assert_eq!((process.cpu_ms, process.resident_bytes), (150, 250 * 4096));
        assert_eq!(process.command, b"[a) S 1 (b]");
    }

    #[test]
    fn what_is_in_no_session_is_ours() {
        let ours = String::from_utf8(LINE.to_vec()).unwrap().replace("R 3 7 7", "R 3 0 0");
        assert_eq!(parse(7, ours.as_bytes(), 4096), None);
        assert_eq!(parse(7, b"7 (cut", 4096), None);
    }

    #[test]
    fn the_user_is_the_real_one() {
        assert_eq!(uid(b"Name:\tx\nUid:\t1000\t0\t0\t0\nGid:\t1\n"), Some(1000));
        assert_eq!(uid(b"Name:\tx\n"), None);
    }
}
