//! What is typed at a terminal: a real one, of which the command is the session's first process.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    time::Instant,
};

use mayfly_tests::{
    Client,
    service::{self, program, shared},
};
use nix::sys::signal::{Signal, kill};
use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, OutputModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};

use super::{DEADLINE, pid_of, sandboxes};

/// A command at a terminal.
struct Seat {
    child: Child,
    /// Where its user types.
    keys: File,
    /// The command's side, kept open so that its settings can be looked at after the command's end.
    line: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    past: usize,
}

impl Seat {
    fn new(client: &Client, rows: u16, columns: u16, words: &[&str]) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let name = ptsname(&keys, Vec::new()).unwrap().into_string().unwrap();
        let line = File::options().read(true).write(true).custom_flags(nix::libc::O_NOCTTY | nix::libc::O_CLOEXEC).open(name).unwrap();
        resize(&keys, rows, columns);
        let end = || Stdio::from(line.try_clone().unwrap());
        // Has the terminal be that of a session of its own, as a terminal's window does.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(program("mayfly"))
            .args(words)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/nonexistent")
            .env("TERM", "vt100")
            .env("MAYFLY_URL", &client.place().url)
            .env("MAYFLY_TOKEN", client.token().unwrap())
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let mut screen = File::from(keys.try_clone().unwrap());
        let (to, from) = mpsc::channel();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut piece) {
                if to.send(piece[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keys: keys.into(), line, screen: from, seen: String::new(), past: 0 }
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    #[track_caller]
    fn until(&mut self, text: &str) {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.seen[self.past..].find(text) {
                self.past += at + text.len();
                return;
            }
            match self.screen.recv_timeout(DEADLINE.saturating_sub(begun.elapsed())) {
                Ok(piece) => self.seen += std::str::from_utf8(&piece).unwrap(),
                Err(error) => panic!("{text:?} never came ({error}), but {:?}", self.seen),
            }
        }
    }

    fn settings(&self) -> Termios {
        tcgetattr(&self.line).unwrap()
    }

    #[track_caller]
    fn code(mut self) -> (Option<i32>, Termios) {
        let status = service::wait(&mut self.child, DEADLINE).unwrap();
        if status.is_none() {
            self.child.kill().unwrap();
        }
        (status.unwrap_or_else(|| panic!("it is still there: {:?}", self.seen)).code(), self.settings())
    }
}

fn resize(keys: &OwnedFd, rows: u16, columns: u16) {
    tcsetwinsize(keys, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

fn is_raw(settings: &Termios) -> bool {
    !settings.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
        && !settings.output_modes.contains(OutputModes::OPOST)
}

fn same(one: &Termios, other: &Termios) -> bool {
    (one.input_modes, one.output_modes, one.control_modes, one.local_modes)
        == (other.input_modes, other.output_modes, other.control_modes, other.local_modes)
}

#[tokio::test]
async fn a_shell_inside_is_typed_at_as_one_here() {
    let client = shared().client();
    let id = client.sandbox("exec sleep 1000").await;
    let mut seat = Seat::new(&client, 7, 70, &["exec", "-it", "-e", "PS1=% ", &id, "sh", "-i"]);
    let resized = OwnedFd::from(seat.keys.try_clone().unwrap());

    seat.until("% ");
    assert!(is_raw(&seat.settings()), "keys are not passed on as they are");
    seat.types("stty size; echo $TERM\r");
    seat.until("7 70\r\n");
    seat.until("vt100\r\n");
    resize(&resized, 9, 90);
    // What tells of it and what is typed go the same way, in this order.
    seat.types("while [ \"$(stty size)\" != '9 90' ]; do sleep 0.05; done; echo it is $((4 + 5))\r");
    seat.until("it is 9\r\n");
    seat.types("sh -c 'echo asleep $((6 * 7)); exec sleep 1000'\r");
    seat.until("asleep 42\r\n");
    seat.types("\u{3}");
    seat.until("% ");
    seat.types("echo still $((40 + 2))\r");
    seat.until("still 42\r\n");
    seat.types("exit 3\r");
    let (code, after) = seat.code();

    assert_eq!(code, Some(3));
    assert!(!is_raw(&after), "the terminal is left as it was while it was used");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn a_terminal_is_put_back_as_it_was_however_it_ends() {
    let client = shared().client();
    let id = client.sandbox("exec sleep 1000").await;
    for ending in ["exit", "removal"] {
        let mut seat = Seat::new(&client, 24, 80, &["exec", "-it", "-e", "PS1=% ", &id, "sh", "-i"]);
        let before = {
            let fresh = Seat::new(&client, 24, 80, &["--version"]);
            fresh.code().1
        };
        seat.until("% ");
        assert!(!same(&seat.settings(), &before));
        match ending {
            "exit" => seat.types("exit\r"),
            _ => assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204),
        }
        let (_, after) = seat.code();
        assert!(same(&after, &before), "{ending}");
    }
}

#[tokio::test]
async fn a_terminal_is_put_back_when_signals_end_the_command() {
    let client = shared().client();
    let id = client.sandbox("exec sleep 1000").await;
    let script = "trap 'echo heard' TERM; echo on; while :; do sleep 0.05; done";
    let before = Seat::new(&client, 24, 80, &["--version"]).code().1;
    let mut seat = Seat::new(&client, 24, 80, &["exec", "-it", &id, "sh", "-c", script]);
    seat.until("on\r\n");
    assert!(is_raw(&seat.settings()));

    for _ in 0..2 {
        kill(pid_of(&seat.child), Signal::SIGTERM).unwrap();
        seat.until("heard\r\n");
    }
    kill(pid_of(&seat.child), Signal::SIGTERM).unwrap();
    let (code, after) = seat.code();

    assert_eq!(code, Some(143));
    assert!(same(&after, &before), "the terminal is left as it was while it was used");
    assert_eq!(client.delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
}

#[tokio::test]
async fn a_run_at_a_terminal_takes_its_sandbox_along() {
    let client = shared().client();
    let mut seat = Seat::new(&client, 24, 80, &["run", "-it", "-e", "PS1=% ", "busybox", "sh", "-i"]);

    seat.until("% ");
    seat.types("tty -s && echo at $((1 + 1)) terminals\r");
    seat.until("at 2 terminals\r\n");
    // Before the shell asks again the terminal holds lines, and the end of what is typed is lost when that changes (termios(3), VEOF).
    seat.until("% ");
    // The end of what is typed.
    seat.types("\u{4}");
    let (code, _) = seat.code();

    assert_eq!(code, Some(0));
    assert!(sandboxes(&client).await.is_empty());
}
