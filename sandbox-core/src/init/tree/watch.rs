//! Watching files: what inotify(7) tells of folders, as whoever asked is told it.
//!
//! Folders are watched, never files: a file that is replaced by another of its name is another file, and one of the image that is written to is, below the overlay, too. What happens
//! is gathered for a moment, and then sent as far as the socket takes it without waiting: this process waits for its events alone, and whoever does not read them misses some.

mod folders;
mod outbox;

use std::{
    io::{self, Read as _},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use folders::{Folders, Unwatched};
use outbox::Outbox;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::inotify::{ReadFlags, Reader},
    io::Errno,
    time::Timespec,
};

use super::Place;
use crate::tree::{GapCause, NoticeKind, Reply, TreePath, WatchEnd, write_frame};

/// One read of events, in bytes.
const READ_BYTES: usize = 16 * 1024;
/// How long the second half of a move is waited for. The kernel queues both within a moment, but not as one (inotify(7), «Dealing with rename() events»).
const HALF_PATIENCE: Duration = Duration::from_millis(10);

/// What names that this service's own writes have for a moment begin with ([`super::draft`]).
const DRAFT: &[u8] = b".mayfly-";
const DRAFT_BYTES: usize = DRAFT.len() + 32;

/// Answers [`Ask::Watch`](crate::tree::Ask::Watch), to the end of the conversation.
pub(super) fn serve(place: &Place, socket: &mut UnixStream, path: &TreePath, is_recursive: bool) -> io::Result<()> {
    let folders = match Folders::watch(place, path, is_recursive) {
        Ok(folders) => folders,
        Err(refused) => return write_frame(socket, &Reply::Failed(refused)),
    };
    let watching = Reply::Watching { is_folder: folders.only().is_none(), folders: u32::try_from(folders.count()).unwrap_or(u32::MAX) };
    write_frame(socket, &watching)?;
    // It lives as long as somebody listens, or the sandbox does.
    nix::unistd::alarm::cancel();
    let mut watch = Watch { folders, outbox: Outbox::new(socket.try_clone()?)?, halves: Vec::new(), is_short: false };
    let end = watch.run()?;
    socket.set_nonblocking(false)?;
    if let Some(end) = end {
        watch.outbox.send_rest(socket)?;
        write_frame(socket, &Reply::WatchOver(end))?;
    }
    Err(io::ErrorKind::ConnectionAborted.into())
}

struct Watch {
    folders: Folders,
    outbox: Outbox,
    halves: Vec<Half>,
    /// That folders are not watched was told.
    is_short: bool,
}

/// The first half of a move: something had this name.
struct Half {
    cookie: u32,
    at: Instant,
    from: Left,
    /// Something happened in it since, of which nobody knows yet where.
    has_missed: bool,
}

struct Left {
    path: Vec<u8>,
    /// Where its removal waits to be told.
    place: Option<outbox::Slot>,
    /// It and all below it, as far as they are watched folders.
    watches: Vec<i32>,
}

/// An event, on its own.
struct Seen {
    watch: i32,
    what: ReadFlags,
    cookie: u32,
    name: Option<Vec<u8>>,
}

impl Watch {
    /// Until there is nothing to watch any more, or, with `None`, nobody listens.
    fn run(&mut self) -> io::Result<Option<WatchEnd>> {
        loop {
            if !self.wait()? {
                return Ok(None);
            }
            let seen = self.read()?;
            if let Some(end) = self.take_all(seen)? {
                return Ok(Some(end));
            }
            self.halves_over();
            self.outbox.send_due(!self.halves.is_empty())?;
        }
    }

    /// What these events mean; with an end after which none does. Fails where nothing would be heard any more, not even that end.
    fn take_all(&mut self, events: Vec<Seen>) -> io::Result<Option<WatchEnd>> {
        for seen in events {
            if let Some(end) = self.take(seen) {
                return Ok(Some(end));
            }
        }
        if self.folders.count() == 0 { Err(io::Error::other("not even the topmost folder can be watched anew")) } else { Ok(None) }
    }

    /// Waits for something to do. False: whoever listened is gone, or breaks the silence, which ends it, too.
    fn wait(&self) -> io::Result<bool> {
        let half = self.halves.first().map(|half| (half.at + HALF_PATIENCE).saturating_duration_since(Instant::now()));
        let patience = half.or_else(|| self.outbox.patience()).and_then(|patience| Timespec::try_from(patience).ok());
        let wanted = if self.outbox.is_waiting() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut ready = [PollFd::from_borrowed_fd(self.folders.as_fd(), PollFlags::IN), PollFd::new(self.outbox.socket(), wanted)];
        rustix::io::retry_on_intr(|| poll(&mut ready, patience.as_ref()))?;
        let [_, socket] = &ready;
        if !socket.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            return Ok(true);
        }
        // What was said is read, or closing the socket would take along what was sent.
        let mut socket = self.outbox.socket();
        drop(socket.read(&mut [0; 256]));
        Ok(false)
    }

    fn read(&self) -> io::Result<Vec<Seen>> {
        let mut buffer = [MaybeUninit::uninit(); READ_BYTES];
        let mut reader = Reader::new(&self.folders, &mut buffer);
        let mut all = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => all.push(Seen {
                    watch: event.wd(),
                    what: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| name.to_bytes().to_vec()),
                }),
                Err(Errno::AGAIN | Errno::INTR) => return Ok(all),
                Err(errno) => return Err(errno.into()),
            }
            if reader.is_buffer_empty() {
                return Ok(all);
            }
        }
    }

    /// What an event means; with an end after which none does.
    fn take(&mut self, seen: Seen) -> Option<WatchEnd> {
        if seen.what.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.overflown();
        }
        if self.folders.is_own_end(seen.watch, seen.what, seen.name.as_deref()) {
            return Some(WatchEnd::Removed);
        }
        let folder = self.folders.path(seen.watch)?.to_vec();
        let is_top = folder.is_empty();
        if seen.what.contains(ReadFlags::UNMOUNT) && is_top {
            return Some(WatchEnd::Unmounted);
        }
        if seen.what.contains(ReadFlags::IGNORED) {
            self.folders.forget(seen.watch);
            return is_top.then_some(WatchEnd::Removed);
        }
        // It went to where nobody watches, or else the word of where is yet to come. The kernel queues the halves of a move one by one, and others' doings between them.
        if let Some(half) = self.halves.iter_mut().find(|half| half.from.watches.contains(&seen.watch)) {
            half.has_missed |= seen.name.is_some();
            return None;
        }
        let Some(name) = seen.name else {
            // Of a folder below, the one above it tells.
            if is_top && self.folders.only().is_none() && seen.what.contains(ReadFlags::ATTRIB) {
                self.outbox.change(NoticeKind::Attributes, Vec::new(), true);
            }
            return None;
        };
        let path = match self.folders.only() {
            Some(only) if *only != *name => return None,
            Some(_) => Vec::new(),
            None => folders::join(&folder, &name),
        };
        // What is done to a file that has no name is told as if it had one, though it cannot be looked up.
        let is_touched = seen.what.intersects(ReadFlags::MODIFY | ReadFlags::ATTRIB);
        let is_file = !seen.what.contains(ReadFlags::ISDIR);
        let is_passing = is_file && is_draft(&name) || is_touched && is_like_unnamed(&name) && !self.folders.has(&path);
        self.changed(seen.what, seen.cookie, path, is_passing);
        None
    }

    fn changed(&mut self, what: ReadFlags, cookie: u32, path: Vec<u8>, is_passing: bool) {
        let is_folder = what.contains(ReadFlags::ISDIR);
        let plain = [
            (ReadFlags::MODIFY, NoticeKind::Modified),
            (ReadFlags::ATTRIB, NoticeKind::Attributes),
            (ReadFlags::DELETE, NoticeKind::Removed),
        ];
        if is_passing {
            // Nobody asked for it, and in a moment it has another name, or none.
        } else if what.contains(ReadFlags::MOVED_FROM) {
            self.left(cookie, path, is_folder);
        } else if what.contains(ReadFlags::CREATE) {
            self.came(path, is_folder);
        } else if what.contains(ReadFlags::MOVED_TO) {
            self.arrived(cookie, path, is_folder);
        } else if let Some((_, kind)) = plain.into_iter().find(|(flag, _)| what.contains(*flag)) {
            self.outbox.change(kind, path, is_folder);
        }
    }

    /// Something new, with all that is in it by now.
    fn came(&mut self, path: Vec<u8>, is_folder: bool) {
        self.outbox.change(NoticeKind::Created, path.clone(), is_folder);
        if is_folder {
            self.let_go();
            let Self { folders, outbox, .. } = self;
            let watched = folders.follow(&path, |path, is_folder| {
                outbox.change(NoticeKind::Created, path, is_folder);
            });
            self.note(watched);
        }
    }

    fn left(&mut self, cookie: u32, path: Vec<u8>, is_folder: bool) {
        let place = self.outbox.change(NoticeKind::Removed, path.clone(), is_folder);
        let watches = if is_folder { self.folders.below(&path) } else { Vec::new() };
        self.halves.push(Half { cookie, at: Instant::now(), from: Left { path, place, watches }, has_missed: false });
    }

    /// Folders that went may be what comes, by another way: that is watched anew.
    fn let_go(&mut self) {
        for half in &mut self.halves {
            let watches = std::mem::take(&mut half.from.watches);
            // What happened in them meanwhile is not heard any more, should their other half come yet.
            half.has_missed |= !watches.is_empty();
            watches.into_iter().for_each(|watch| self.folders.unwatch(watch));
        }
    }

    fn arrived(&mut self, cookie: u32, path: Vec<u8>, is_folder: bool) {
        let half = self.halves.iter().position(|half| half.cookie == cookie).map(|place| self.halves.remove(place));
        let Some(Half { from: Left { path: from, place, watches }, has_missed, .. }) = half else {
            return self.came(path, is_folder);
        };
        // Another folder that has this name still was replaced, or changed places with this one (renameat2(2)).
        let is_taken = is_folder && !self.folders.below(&path).is_empty();
        let renamed = self.folders.rename(&watches, &from, &path);
        self.outbox.moved(place, from, path.clone(), is_folder);
        // It may have gone before it was watched, and what is in it was not told.
        if is_folder {
            let Self { folders, outbox, .. } = self;
            let watched = folders.follow(&path, |path, is_folder| {
                outbox.change(NoticeKind::Created, path, is_folder);
            });
            self.note(renamed.and(watched));
        }
        if has_missed {
            self.outbox.gap(GapCause::Overflow);
        }
        if is_taken || has_missed {
            let watched = self.folders.anew();
            self.note(watched);
        }
    }

    /// Whose second half has not come was moved to where nobody watches.
    fn halves_over(&mut self) {
        let is_late = |half: &Half| half.at.elapsed() >= HALF_PATIENCE;
        for half in self.halves.extract_if(.., |half| is_late(half)) {
            half.from.watches.iter().for_each(|watch| self.folders.unwatch(*watch));
        }
    }

    /// Which folders there are is not known any more.
    fn overflown(&mut self) -> Option<WatchEnd> {
        self.outbox.gap(GapCause::Overflow);
        self.halves.clear();
        if !self.folders.is_there() {
            return Some(WatchEnd::Removed);
        }
        let watched = self.folders.anew();
        self.note(watched);
        None
    }

    /// Says once that folders are not watched, until all are.
    fn note(&mut self, watched: Result<(), Unwatched>) {
        match watched {
            Ok(()) => self.is_short &= self.folders.is_full(),
            Err(Unwatched) => {
                if !std::mem::replace(&mut self.is_short, true) {
                    self.outbox.gap(GapCause::Unwatched);
                }
            }
        }
    }
}

fn is_draft(name: &[u8]) -> bool {
    name.len() == DRAFT_BYTES && name.strip_prefix(DRAFT).is_some_and(|rest| rest.iter().all(u8::is_ascii_hexdigit))
}

/// What the kernel calls a file that was made with `O_TMPFILE`: by its inode's number.
fn is_like_unnamed(name: &[u8]) -> bool {
    name.strip_prefix(b"#").is_some_and(|rest| !rest.is_empty() && rest.iter().all(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests;
