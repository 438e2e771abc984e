//! Terminals: each is made by the process that is to have it, as its own user, in the sandbox's devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Kind, LaunchError, Step},
    protocol::WindowSize,
    sys, transport,
};

/// What a process on its way to its program says to init.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    /// It has a terminal. Descriptor: the master.
    Terminal,
    /// It will never have that program.
    Failed { kind: Kind, message: String },
}

/// Makes a terminal, makes it the controlling one of this process, which leads a session without one, and its standard streams. The master goes
/// through the socket `to`.
///
/// Nothing is looked up by a path that a payload could have had a hand in: `terminals` is the devpts that init mounted, and the other side is
/// opened through the master (TIOCGPTPEER of ioctl_tty(2)).
pub(super) fn take(terminals: &OwnedFd, size: WindowSize, to: BorrowedFd<'_>) -> Result<(), LaunchError> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let master = openat2(terminals, "ptmx", flags, Mode::empty(), resolve).step("making a terminal")?;
    unlockpt(&master).step("unlocking the terminal")?;
    tcsetwinsize(&master, of(size)).step("sizing the terminal")?;
    let terminal =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).step("opening the terminal")?;
    transport::send(to, &Said::Terminal, &[master.as_fd()]).step("handing the terminal over")?;
    drop(master);
    ioctl_tiocsctty(&terminal).step("taking the terminal")?;
    for number in 0..3 {
        sys::place_at(terminal.as_fd(), number).step("placing the standard streams")?;
    }
    Ok(())
}

/// As the kernel has it. Pixels are nobody's here.
pub(crate) const fn of(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}
