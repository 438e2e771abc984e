//! What the keeper has to say to whoever keeps its log. He may have stopped reading: sandboxes and their limits do not wait for him.

use std::{
    cell::Cell,
    fmt::Arguments,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::event::{PollFd, PollFlags, poll};

/// The most of what is said at once. A pipe that takes anything takes that much without waiting (`PIPE_BUF` of pipe(7)); a socket and a terminal do, too.
const BYTES_MAX: usize = 2048;

thread_local! {
    /// Messages that nobody took, since the last one that somebody did.
    static LOST: Cell<u64> = const { Cell::new(0) };
}

/// Says something to whoever keeps the keeper's log. If nobody reads it any more, then not; if somebody does not read now, the next message that he takes
/// says how many are missing.
pub(super) fn warn(message: Arguments<'_>) {
    LOST.set(say(io::stderr().as_fd(), LOST.get(), message));
}

/// Says it, and that `lost` were not said. Returns how many that are now.
fn say(to: BorrowedFd<'_>, lost: u64, message: Arguments<'_>) -> u64 {
    // What is open here belongs to others, too: it cannot be made one that does not block.
    if !takes_more(to) {
        return lost.saturating_add(1);
    }
    let mut text = match lost {
        0 => format!("sandbox-keeper: {message}"),
        _ => format!("sandbox-keeper: {lost} messages are missing here, which nobody took\nsandbox-keeper: {message}"),
    };
    text.truncate(text.floor_char_boundary(BYTES_MAX - 1));
    text.push('\n');
    match rustix::io::retry_on_intr(|| rustix::io::write(to, text.as_bytes())) {
        Err(rustix::io::Errno::AGAIN) => lost.saturating_add(1),
        // Who has left for good misses nothing.
        Ok(_) | Err(_) => 0,
    }
}

fn takes_more(to: BorrowedFd<'_>) -> bool {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut looked_at = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    poll(&mut looked_at, Some(&now)).is_ok() && looked_at[0].revents().contains(PollFlags::OUT)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    /// All that is in a pipe.
    fn read(from: &OwnedFd) -> String {
        let mut text = vec![0; 1 << 20];
        let len = rustix::io::read(from, &mut text).unwrap();
        String::from_utf8_lossy(&text[..len]).into_owned()
    }

    #[test]
    fn who_does_not_read_is_not_waited_for_and_hears_later_how_many_he_missed() {
        let (from, to) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&to, true).unwrap();
        for len in [4096, 1] {
            while rustix::io::write(&to, &vec![b'x'; len]).is_ok() {}
        }
        rustix::io::ioctl_fionbio(&to, false).unwrap();

        let lost = (0..3).fold(0, |lost, n| say(to.as_fd(), lost, format_args!("message {n}")));

        assert_eq!(lost, 3);
        assert!(read(&from).bytes().all(|byte| byte == b'x'));
        assert_eq!(say(to.as_fd(), lost, format_args!("another")), 0);
        assert_eq!(read(&from), "sandbox-keeper: 3 messages are missing here, which nobody took\nsandbox-keeper: another\n");
    }

    #[test]
    fn a_long_message_is_cut_and_is_one_line() {
        let (from, to) = rustix::pipe::pipe().unwrap();
        assert_eq!(say(to.as_fd(), 0, format_args!("{}", "ä".repeat(BYTES_MAX))), 0);
        let said = read(&from);
        assert!(said.len() <= BYTES_MAX && said.ends_with("ä\n"), "{} bytes", said.len());
    }

    #[test]
    fn who_has_left_misses_nothing() {
        let (from, to) = rustix::pipe::pipe().unwrap();
        drop(from);
        assert_eq!(say(to.as_fd(), 2, format_args!("message")), 0);
    }
}
