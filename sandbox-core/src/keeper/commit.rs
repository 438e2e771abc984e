//! Keeping an image that was unpacked: by a process of its own, since its name must be on disk before anybody is told, and the keeper waits for no disk.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    Keeper, Source,
    connection::{Asker, failed, failed_at},
    store::Place,
    warn,
};
use crate::{
    fail_point::reached,
    protocol::{Answer, FailureKind, ImageId, Unpacked},
    sys::{self, Cloned},
};

/// An image that is on its way to its name.
#[derive(Debug)]
pub(super) struct Commit {
    folder: String,
    unpacked: Unpacked,
    asker: Asker,
    /// Says how it went.
    said: OwnedFd,
}

/// What the process says if it went well. Anything else is the error.
const DONE: &[u8] = b"y";
/// The longest error that is read.
const SAID_BYTES_MAX: usize = 1024;

impl Keeper {
    /// Answers `asker` when what was unpacked into `folder` is the image for good.
    pub(super) fn commit(&mut self, folder: String, image: &ImageId, unpacked: Unpacked, asker: Asker) {
        let serial = self.serial();
        let begun = begin(&self.store.place(&folder, image)).and_then(|said| {
            self.watch(said.as_fd(), Source::Commit, serial)?;
            Ok(said)
        });
        match begun {
            Ok(said) => drop(self.commits.insert(serial, Commit { folder, unpacked, asker, said })),
            Err(error) => {
                self.discard(&folder);
                self.answer(asker, failed_at("keeping the unpacked image", &error));
            }
        }
    }

    pub(super) fn on_commit(&mut self, serial: u64) -> io::Result<()> {
        let Some(Commit { folder, unpacked, asker, said }) = self.commits.remove(&serial) else { return Ok(()) };
        let mut text = [0; SAID_BYTES_MAX];
        let len = rustix::io::retry_on_intr(|| rustix::io::read(&said, &mut text))?;
        let answer = if &text[..len] == DONE {
            reached("keeper.unpack.committed");
            Answer::Unpacked(unpacked)
        } else {
            self.discard(&folder);
            failed(FailureKind::Host, format!("keeping the unpacked image failed: {}", String::from_utf8_lossy(&text[..len])))
        };
        self.answer(asker, answer);
        Ok(())
    }

    /// Removes a folder that did not become an image.
    pub(super) fn discard(&mut self, folder: &str) {
        match self.store.discard(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => warn(format_args!("removing {folder} failed: {error}")),
            _ => {}
        }
    }
}

/// Starts the process, and returns where it will say how it went.
fn begin(place: &Place) -> io::Result<OwnedFd> {
    let keeper = nix::unistd::getpid();
    let (said, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match sys::clone3(nix::sched::CloneFlags::empty(), false, None)? {
        // Reaped by the keeper's loop at its SIGCHLD.
        Cloned::Parent(_) => Ok(said),
        Cloned::Child => {
            super::claim::expose_to_oom();
            let told = run(place, tell.as_fd(), keeper);
            std::process::exit(if told.is_ok() { 0 } else { 1 })
        }
    }
}

fn run(place: &Place, tell: BorrowedFd<'_>, keeper: nix::unistd::Pid) -> io::Result<()> {
    const TELL: i32 = 3;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    if nix::unistd::getppid() != keeper {
        return Ok(());
    }
    // A copy of a descriptor that the keeper closes would keep it alive, and watched.
    let tell = rustix::io::fcntl_dupfd_cloexec(tell, TELL + 1)?;
    sys::place_at(tell.as_fd(), TELL)?;
    drop(tell);
    sys::close_from(TELL.cast_unsigned() + 1)?;
    let mut tell = File::from(sys::inherited(TELL)?);
    match place.take() {
        Ok(()) => tell.write_all(DONE),
        Err(error) => {
            let mut text = error.to_string();
            text.truncate(text.floor_char_boundary(SAID_BYTES_MAX));
            tell.write_all(text.as_bytes())
        }
    }
}
