//! What waits to be told, within bounds, and sending it without waiting for anybody.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use crate::{
    init::nanoseconds,
    tree::{GapCause, NOTICES_AT_ONCE_MAX, NOTICES_MAX, Notice, NoticeKind, Reply, frame},
};

/// How long things are gathered: a file that is written to all the time is told of twenty times a second.
const GATHER: Duration = Duration::from_millis(50);
/// So many do not wait for that.
const MANY: usize = 512;
/// The most of paths that wait.
const BYTES_MAX: usize = 512 * 1024;
/// The most of them in one answer: far below what a frame holds.
const ANSWER_BYTES_MAX: usize = BYTES_MAX / 4;

pub(super) struct Outbox {
    socket: UnixStream,
    /// On its way, as far as the socket has taken it.
    sending: Vec<u8>,
    sent: usize,
    notices: Vec<Notice>,
    /// How much their paths are.
    bytes: usize,
    /// How many went before them.
    gone: usize,
    /// Since when the first of them waits.
    since: Option<Instant>,
    /// What was noticed of these paths since they were last made, removed or moved.
    noticed: HashMap<Vec<u8>, Noticed>,
}

#[derive(Default)]
struct Noticed {
    is_created: bool,
    is_modified: bool,
    has_attributes: bool,
}

/// The place of something that waits: how many there were before it, ever.
pub(super) struct Slot(usize);

impl Outbox {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        // That of the socket itself, whatever descriptor it has.
        socket.set_nonblocking(true)?;
        Ok(Self { socket, sending: Vec::new(), sent: 0, notices: Vec::new(), bytes: 0, gone: 0, since: None, noticed: HashMap::new() })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether the socket has still to take something.
    pub(super) fn is_waiting(&self) -> bool {
        !self.sending.is_empty()
    }

    /// How long nothing is to be sent; `None`: until the socket takes more, or something happens.
    pub(super) fn patience(&self) -> Option<Duration> {
        if self.is_waiting() { None } else { self.since.map(|since| (since + GATHER).saturating_duration_since(Instant::now())) }
    }

    /// Notes a change, unless the same is noted already. Where, if it waits by itself.
    pub(super) fn change(&mut self, kind: NoticeKind, path: Vec<u8>, is_folder: bool) -> Option<Slot> {
        if !self.has_room() {
            return None;
        }
        let noticed = self.noticed.entry(path.clone()).or_default();
        let is_old = match kind {
            NoticeKind::Created => std::mem::replace(noticed, Noticed { is_created: true, ..Noticed::default() }).is_created,
            NoticeKind::Modified => std::mem::replace(&mut noticed.is_modified, true),
            // Whoever makes something gives it its mode and owner right after.
            NoticeKind::Attributes => std::mem::replace(&mut noticed.has_attributes, true) || noticed.is_created && !noticed.is_modified,
            NoticeKind::Removed | NoticeKind::Moved => {
                *noticed = Noticed::default();
                false
            }
        };
        (!is_old).then(|| self.push(Notice::Change { at_us: now_us(), kind, path, from: None, is_folder }))
    }

    /// What was noted as removed is here now.
    pub(super) fn moved(&mut self, removed: Option<Slot>, from: Vec<u8>, path: Vec<u8>, is_folder: bool) {
        if is_folder {
            // All that is below it has other names now.
            self.noticed.clear();
        } else {
            self.noticed.remove(&path);
        }
        let Some(Slot(place)) = removed else { return };
        // Of such a one it is told that it went, and that something is missing.
        if self.bytes >= BYTES_MAX && !self.has_room() {
            return;
        }
        let index = place.checked_sub(self.gone);
        if let Some(waiting) = index.and_then(|index| self.notices.get_mut(index)) {
            let moved = Notice::Change { at_us: now_us(), kind: NoticeKind::Moved, path, from: Some(from), is_folder };
            self.bytes = self.bytes + size(&moved) - size(waiting);
            *waiting = moved;
        } else {
            // Told already.
            self.change(NoticeKind::Created, path, is_folder);
        }
    }

    pub(super) fn gap(&mut self, cause: GapCause) {
        // What goes on to be missed is told even where there is no room: that comes seldom, and has a bound of its own.
        if self.has_room() || cause == GapCause::Unwatched && self.notices.len() < 2 * NOTICES_MAX {
            self.push(Notice::Gap { at_us: now_us(), cause });
        }
    }

    /// Whether something more can wait. If not, that is what is told.
    fn has_room(&mut self) -> bool {
        if self.is_much() && !self.is_waiting() {
            // A socket that fails is found out where it is waited for.
            drop(self.send());
        }
        let is_full = self.notices.len() >= NOTICES_MAX || self.bytes >= BYTES_MAX;
        if is_full && !matches!(self.notices.last(), Some(Notice::Gap { cause: GapCause::SlowReader, .. })) {
            self.notices.push(Notice::Gap { at_us: now_us(), cause: GapCause::SlowReader });
        }
        !is_full
    }

    fn push(&mut self, notice: Notice) -> Slot {
        self.bytes += size(&notice);
        self.since.get_or_insert_with(Instant::now);
        self.notices.push(notice);
        Slot(self.gone + self.notices.len() - 1)
    }

    /// Sends what has waited long enough, or is too much, as far as the socket takes it. `is_half`: the second half of a move may come.
    pub(super) fn send_due(&mut self, is_half: bool) -> io::Result<()> {
        let is_due = self.since.is_some_and(|since| since.elapsed() >= GATHER) && !is_half;
        if self.is_waiting() || is_due || self.is_much() { self.send() } else { Ok(()) }
    }

    fn is_much(&self) -> bool {
        self.notices.len() >= MANY || self.bytes >= ANSWER_BYTES_MAX
    }

    /// All that waits, to somebody who is waited for.
    pub(super) fn send_rest(&mut self, socket: &mut UnixStream) -> io::Result<()> {
        loop {
            socket.write_all(&self.sending[self.sent..])?;
            self.fill()?;
            if self.sending.is_empty() {
                return Ok(());
            }
        }
    }

    /// One answer, as far as the socket takes it.
    fn send(&mut self) -> io::Result<()> {
        if self.sending.is_empty() {
            self.fill()?;
        }
        while self.sent < self.sending.len() {
            match (&self.socket).write(&self.sending[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.sending.clear();
        self.sent = 0;
        Ok(())
    }

    /// What waits becomes what is sent, as much of it as goes into an answer. The rest is as old as what goes, so that it is due next.
    fn fill(&mut self) -> io::Result<()> {
        (self.sending, self.sent) = (Vec::new(), 0);
        // What is told twice of the rest harms nobody; what happens again to what goes has to be told.
        self.noticed.clear();
        let mut bytes = 0;
        let fitting = self.notices.iter().take(NOTICES_AT_ONCE_MAX).take_while(|notice| {
            bytes += size(notice);
            bytes <= ANSWER_BYTES_MAX
        });
        // One always fits, whatever it is.
        let count = fitting.count().max(1).min(self.notices.len());
        let notices: Vec<_> = self.notices.drain(..count).collect();
        self.bytes -= notices.iter().map(size).sum::<usize>();
        self.gone += count;
        if self.notices.is_empty() {
            self.since = None;
        }
        if !notices.is_empty() {
            self.sending = frame(&Reply::Noticed { notices })?;
        }
        Ok(())
    }
}

/// How much its paths are.
fn size(notice: &Notice) -> usize {
    match notice {
        Notice::Change { path, from, .. } => path.len() + from.as_ref().map_or(0, Vec::len),
        Notice::Gap { .. } => 0,
    }
}

fn now_us() -> u64 {
    nanoseconds(rustix::time::ClockId::Realtime) / 1000
}

#[cfg(test)]
mod tests {
    use super::{super::tests::in_short, *};
    use crate::tree::read_frame;

    fn outbox() -> (Outbox, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (Outbox::new(ours).unwrap(), theirs)
    }

    /// What is told, in short.
    fn told(from: &mut UnixStream) -> Vec<String> {
        let reply: Option<Reply> = read_frame(from).unwrap();
        let Some(Reply::Noticed { notices }) = reply else { panic!("{reply:?}") };
        notices.iter().map(in_short).collect()
    }

    /// All that is still told, by the answers that it comes in.
    fn rest(mut outbox: Outbox, mut theirs: UnixStream) -> Vec<Vec<Notice>> {
        let reader = std::thread::spawn(move || {
            let mut answers = Vec::new();
            while let Some(Reply::Noticed { notices }) = read_frame::<Reply>(&mut theirs).unwrap() {
                answers.push(notices);
            }
            answers
        });
        let mut socket = outbox.socket.try_clone().unwrap();
        socket.set_nonblocking(false).unwrap();
        outbox.send_rest(&mut socket).unwrap();
        drop((socket, outbox));
        reader.join().unwrap()
    }

    fn of_bytes(path_bytes: usize) -> Notice {
        Notice::Change { at_us: 0, kind: NoticeKind::Created, path: vec![b'n'; path_bytes], from: None, is_folder: false }
    }

    #[test]
    fn what_is_written_a_thousand_times_is_told_once_and_again_after_it_was_sent() {
        let (mut outbox, mut theirs) = outbox();
        outbox.change(NoticeKind::Created, b"a".to_vec(), false);
        for _ in 0..1000 {
            outbox.change(NoticeKind::Modified, b"a".to_vec(), false);
            outbox.change(NoticeKind::Attributes, b"a".to_vec(), false);
        }
        outbox.send().unwrap();
        outbox.change(NoticeKind::Modified, b"a".to_vec(), false);
        outbox.change(NoticeKind::Removed, b"a".to_vec(), false);
        outbox.change(NoticeKind::Created, b"a".to_vec(), false);
        outbox.change(NoticeKind::Modified, b"a".to_vec(), false);
        outbox.send().unwrap();
        assert_eq!(told(&mut theirs), ["Created a", "Modified a", "Attributes a"]);
        assert_eq!(told(&mut theirs), ["Modified a", "Removed a", "Created a", "Modified a"]);
    }

    #[test]
    fn two_halves_are_one_move_and_one_that_comes_too_late_is_told_by_itself() {
        let (mut outbox, mut theirs) = outbox();
        let removed = outbox.change(NoticeKind::Removed, b"a".to_vec(), false);
        outbox.moved(removed, b"a".to_vec(), b"b".to_vec(), false);
        let removed = outbox.change(NoticeKind::Removed, b"c".to_vec(), false);
        outbox.send().unwrap();
        outbox.moved(removed, b"c".to_vec(), b"d".to_vec(), false);
        outbox.send().unwrap();
        assert_eq!(told(&mut theirs), ["Moved a to b", "Removed c"]);
        assert_eq!(told(&mut theirs), ["Created d"]);
    }

    #[test]
    fn what_another_folder_of_the_name_holds_is_told_anew() {
        let (mut outbox, mut theirs) = outbox();
        outbox.change(NoticeKind::Modified, b"d/f".to_vec(), false);
        for (from, to) in [(b"d", b"o"), (b"n", b"d")] {
            let removed = outbox.change(NoticeKind::Removed, from.to_vec(), true);
            outbox.moved(removed, from.to_vec(), to.to_vec(), true);
        }
        outbox.change(NoticeKind::Modified, b"d/f".to_vec(), false);
        outbox.send().unwrap();
        assert_eq!(told(&mut theirs), ["Modified d/f", "Moved d to o", "Moved n to d", "Modified d/f"]);
    }

    #[test]
    fn somebody_who_does_not_read_is_waited_for_by_nobody_and_told_of_the_gap() {
        let (mut outbox, theirs) = outbox();
        let name = |number: u32| format!("{number:0200}").into_bytes();
        for number in 0..50_000 {
            outbox.change(NoticeKind::Created, name(number), false);
        }
        assert!(outbox.is_waiting(), "the control: the socket took all of it");
        let seen = rest(outbox, theirs).concat();
        assert!(matches!(seen.last(), Some(Notice::Gap { cause: GapCause::SlowReader, .. })), "{:?}", seen.last());
        assert!(seen.len() < 20_000, "{} were kept", seen.len());
    }

    #[test]
    fn no_answer_is_larger_than_whoever_reads_it_allows() {
        let (mut outbox, theirs) = outbox();
        // More than a frame holds, and then more than are let in at once.
        let gaps = (0..2 * NOTICES_AT_ONCE_MAX as u64).map(|at_us| Notice::Gap { at_us, cause: GapCause::Unwatched });
        let waiting: Vec<_> = (0..300).map(|more| of_bytes(4000 + more)).chain(gaps).collect();
        for notice in &waiting {
            outbox.push(notice.clone());
        }
        assert_eq!(outbox.bytes, waiting.iter().map(size).sum::<usize>());

        let answers = rest(outbox, theirs);

        assert!(answers.concat() == waiting, "not all of it, or not in its order");
        let largest = answers.iter().map(|answer| answer.iter().map(size).sum::<usize>()).max().unwrap();
        assert!((ANSWER_BYTES_MAX / 2..=ANSWER_BYTES_MAX).contains(&largest), "{largest} bytes");
        let most = answers.iter().map(Vec::len).max().unwrap();
        assert!((NOTICES_MAX..=NOTICES_AT_ONCE_MAX).contains(&most), "{most} at once");
    }

    #[test]
    fn a_move_is_told_as_one_behind_what_went_before_it() {
        let (mut outbox, theirs) = outbox();
        for _ in 0..40 {
            outbox.push(of_bytes(4000));
        }
        let removed =
            outbox.push(Notice::Change { at_us: 0, kind: NoticeKind::Removed, path: b"a".to_vec(), from: None, is_folder: false });
        outbox.fill().unwrap();
        assert!(outbox.is_waiting() && outbox.since.is_some() && outbox.notices.len() > 1, "the control: a part went");

        outbox.moved(Some(removed), b"a".to_vec(), b"b".to_vec(), false);

        assert_eq!(outbox.bytes, outbox.notices.iter().map(size).sum::<usize>());
        let told = rest(outbox, theirs).concat();
        assert_eq!((told.len(), told.last().map(in_short).as_deref()), (41, Some("Moved a to b")));
    }
}
