//! Deadlines of all sandboxes, on one timer descriptor.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use serde::{Deserialize, Serialize};

/// What is due for a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Due {
    /// The payload should run by now.
    Start,
    Wall,
    /// The grace of a stop is over.
    Grace,
    /// Look whether a sandbox stands still.
    Freeze,
    /// A lower memory limit should be set by now.
    Lowering,
    /// What ends the input of a terminal should be typed by now.
    Typist,
    /// Look at the CPU time used.
    Cpu,
    /// The kernel announced an OOM; look whether it killed something.
    Oom,
    /// An init that was asked to kill its sandbox has not said that it did.
    Force,
    /// Try again to remove the cgroups.
    Remove,
    /// Try again to write what the disk of the logs had no room for.
    Room,
    /// Try again to take connections, for which there were no descriptors.
    Accept,
    /// A new program on trial should have said whether it can take over.
    Trial,
}

impl Due {
    /// Whether it is a limit in time that somebody was promised.
    const fn is_limit(self) -> bool {
        matches!(self, Self::Wall | Self::Grace | Self::Cpu)
    }
}

/// In `CLOCK_MONOTONIC` nanoseconds, with the serial number of the sandbox; the earliest first.
pub(super) type Deadlines = BTreeSet<(u64, u64, Due)>;

/// Deadlines. One that no longer matters is ignored when it comes.
#[derive(Debug)]
pub(super) struct Timer {
    descriptor: OwnedFd,
    deadlines: Deadlines,
}

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { descriptor: timerfd_create(TimerfdClockId::Monotonic, flags)?, deadlines: Deadlines::new() })
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// What is to be handed to the next program.
    pub(super) fn deadlines(&self) -> &Deadlines {
        &self.deadlines
    }

    /// Goes on with the deadlines of the program before: those that have passed come up at once.
    pub(super) fn take_over(&mut self, deadlines: Deadlines) -> io::Result<()> {
        self.deadlines = deadlines;
        self.arm()
    }

    /// Has `due` come up for the sandbox `serial` at `at_ns`.
    pub(super) fn set(&mut self, at_ns: u64, serial: u64, due: Due) -> io::Result<()> {
        let is_first = self.deadlines.first().is_none_or(|(first, ..)| at_ns < *first);
        self.deadlines.insert((at_ns, serial, due));
        if is_first { self.arm() } else { Ok(()) }
    }

    /// The next of those that have come up; `None` when the rest lie in the future, for which the timer is then set.
    pub(super) fn next(&mut self, now_ns: u64) -> io::Result<Option<(u64, Due)>> {
        match self.deadlines.first() {
            Some((at_ns, serial, due)) if *at_ns <= now_ns => {
                let next = (*serial, *due);
                self.deadlines.pop_first();
                Ok(Some(next))
            }
            _ => self.arm().map(|()| None),
        }
    }

    /// Whether no limit is due for at least `span_ns` from now, of those whose `serial` still matters.
    pub(super) fn is_free_for(&self, now_ns: u64, span_ns: u64, matters: impl Fn(u64) -> bool) -> bool {
        let until_ns = now_ns.saturating_add(span_ns);
        let mut near = self.deadlines.iter().take_while(|(at_ns, ..)| *at_ns <= until_ns);
        !near.any(|(_, serial, due)| due.is_limit() && matters(*serial))
    }

    fn arm(&mut self) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let at = self.deadlines.first().map_or(Ok(zero), |(at_ns, ..)| {
            // A value of zero would switch the timer off (timerfd_create(2)).
            let at_ns = (*at_ns).max(1);
            let tv_sec = i64::try_from(at_ns / 1_000_000_000).map_err(io::Error::other)?;
            let tv_nsec = i64::try_from(at_ns % 1_000_000_000).map_err(io::Error::other)?;
            Ok::<_, io::Error>(Timespec { tv_sec, tv_nsec })
        })?;
        timerfd_settime(&self.descriptor, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: zero, it_value: at })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_up_in_order_and_not_before_their_time() {
        let mut timer = Timer::new().unwrap();
        timer.set(300, 3, Due::Wall).unwrap();
        timer.set(100, 1, Due::Wall).unwrap();
        timer.set(200, 2, Due::Cpu).unwrap();
        assert_eq!(timer.next(50).unwrap(), None);
        assert!(timer.is_free_for(50, 49, |_| true) && !timer.is_free_for(50, 50, |_| true));
        // What is no limit, or of what is over, keeps nobody.
        assert!(timer.is_free_for(50, 149, |serial| serial != 1) && !timer.is_free_for(50, 150, |serial| serial != 1));
        timer.set(260, 4, Due::Remove).unwrap();
        assert!(timer.is_free_for(50, 249, |serial| serial > 2));
        assert_eq!(timer.next(250).unwrap(), Some((1, Due::Wall)));
        assert_eq!(timer.next(250).unwrap(), Some((2, Due::Cpu)));
        assert_eq!(timer.next(250).unwrap(), None);
    }
}
