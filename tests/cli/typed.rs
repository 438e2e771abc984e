//! A command that is run: its input, both of its streams, its code.

use std::{
    io::{Read, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread::JoinHandle,
    time::Instant,
};

use mayfly_tests::service;
use nix::unistd::Pid;

use super::{DEADLINE, pid_of};

/// What came of a command.
#[derive(Debug)]
pub(crate) struct Said {
    /// `None`: a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Said {
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// A command that runs.
pub(crate) struct Begun {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<Receiver<Vec<u8>>>,
    seen: Vec<u8>,
    /// How much of it was waited for.
    past: usize,
    stderr: JoinHandle<String>,
}

impl Begun {
    pub(crate) fn new(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        let (to, from) = mpsc::channel();
        let mut stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut piece = [0; 65_536];
            while let Ok(count @ 1..) = stdout.read(&mut piece) {
                // Nobody to tell: then the pipe is closed, too.
                if to.send(piece[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut stderr = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, stdin, stdout: Some(from), seen: Vec::new(), past: 0, stderr }
    }

    pub(crate) fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    pub(crate) fn give(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Gives all of it, as far as somebody takes it, while this goes on.
    pub(crate) fn give_meanwhile(&mut self, bytes: Vec<u8>) {
        let mut stdin = self.stdin.take().unwrap();
        // Who takes none of it is told nothing.
        std::thread::spawn(move || stdin.write_all(&bytes).ok());
    }

    /// Waits for this on stdout, behind all that was waited for before.
    #[track_caller]
    pub(crate) fn until(&mut self, text: &str) {
        let begun = Instant::now();
        loop {
            let new = &self.seen[self.past..];
            if let Some(at) = new.windows(text.len()).position(|part| part == text.as_bytes()) {
                self.past += at + text.len();
                return;
            }
            match self.stdout.as_ref().unwrap().recv_timeout(DEADLINE.saturating_sub(begun.elapsed())) {
                Ok(piece) => self.seen.extend(piece),
                Err(error) => panic!("{text:?} never came ({error}), but {}", String::from_utf8_lossy(&self.seen)),
            }
        }
    }

    pub(crate) fn end_input(mut self) -> Self {
        self.stdin = None;
        self
    }

    pub(crate) fn stop_reading(mut self) -> Self {
        self.stdout = None;
        self
    }

    /// Waits for its end. Its input stays open.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Said {
        let status = service::wait(&mut self.child, DEADLINE).unwrap();
        if status.is_none() {
            self.child.kill().unwrap();
        }
        let mut seen = self.seen;
        seen.extend(self.stdout.iter().flatten().flatten());
        let stderr = self.stderr.join().unwrap();
        let Some(status) = status else { panic!("it is still there: {}{stderr}", String::from_utf8_lossy(&seen)) };
        Said { code: status.code(), stdout: seen, stderr }
    }
}

/// Runs it to its end, with this input.
#[track_caller]
pub(crate) fn said(command: &mut Command, input: &[u8]) -> Said {
    let mut begun = Begun::new(command);
    let mut stdin = begun.stdin.take().unwrap();
    let input = input.to_vec();
    // Who takes none of it is told nothing.
    let giving = std::thread::spawn(move || stdin.write_all(&input).ok());
    let said = begun.finish();
    giving.join().unwrap();
    said
}
