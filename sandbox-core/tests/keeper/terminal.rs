//! Payloads and execs with a terminal.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::FileTypeExt,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, poll};
use sandbox_core::{
    client::Client,
    protocol::{Answer, Cause, Exec, FailureKind, IoLimits, Isolation, Medium, NewLimits, Request, SandboxId, WindowSize},
};

use crate::{
    exec::{arguments, begin, script},
    harness::{Done, Node, Run, failure, kill, node, output, shell, wait, wait_for_text},
    upgrade::upgrade,
};

const SIZE: WindowSize = WindowSize { rows: 33, columns: 99 };

fn at_terminal(script: &str) -> Run {
    let mut run = shell(script);
    run.terminal = Some(SIZE);
    run
}

fn done(client: &mut Client, request: &Request) {
    assert_eq!(client.call(request, &[]).unwrap(), Answer::Done, "{request:?}");
}

fn keyboard(client: &mut Client, id: SandboxId) -> File {
    let (answer, input) = client.call_with(&Request::Input { id }, &[]).unwrap();
    assert_eq!(answer, Answer::Descriptor);
    input.unwrap().into()
}

fn start(client: &mut Client, run: &Run) {
    let answer = run.launch(client);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
}

#[test]
fn a_payload_with_a_terminal_reads_and_writes_there() {
    let said = "busybox tty; busybox stty size; busybox stat -c '%u %a' $(busybox tty); echo problem >&2; echo >/dev/tty to the terminal";
    let run = at_terminal(said).with("/process/user/uid", 1000).with("/process/user/gid", 1000);
    let Done { ending, stdout, stderr, .. } = run.run();
    assert_eq!(ending.cause, Cause::Exited { code: 0 });
    assert_eq!((stdout.as_str(), stderr.as_str()), ("/dev/pts/0\r\n33 99\r\n1000 620\r\nproblem\r\nto the terminal\r\n", ""));
    // The control: without one there is none.
    assert_eq!(shell("busybox tty; : </dev/tty || echo none").run().stdout.lines().next(), Some("not a tty"));
}

#[test]
fn what_is_typed_is_read_and_keys_are_signals() {
    let mut client = node().client();
    let run = at_terminal("read line; echo \"got <$line>\"; exec sleep 100");
    start(&mut client, &run);
    let mut keys = keyboard(&mut client, run.id);
    keys.write_all(b"hello\n").unwrap();
    wait_for_text(&node().log_path(run.id), "got <hello>\r\n");
    keys.write_all(b"\x03").unwrap();
    assert_eq!(wait(&mut client, run.id).cause, Cause::Signaled { signal: 2 });
    let (stdout, _) = output(&node().log_path(run.id));
    assert!(stdout.starts_with("hello\r\ngot <hello>\r\n"), "what is typed is echoed: {stdout:?}");
    done(&mut client, &Request::Forget { id: run.id });
}

#[test]
fn the_end_of_the_input_is_what_its_user_types() {
    let mut client = node().client();
    let run = at_terminal("busybox stty -echo eof ^X; echo ready; cat; echo end");
    start(&mut client, &run);
    wait_for_text(&node().log_path(run.id), "ready\r\n");
    keyboard(&mut client, run.id).write_all(b"line\n").unwrap();
    done(&mut client, &Request::EndInput { id: run.id });
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node().log_path(run.id)).0, "ready\r\nline\r\nend\r\n");
    done(&mut client, &Request::Forget { id: run.id });
}

#[test]
fn a_terminal_that_is_resized_says_so() {
    let mut client = node().client();
    let run = at_terminal("trap 'busybox stty size; exit 5' WINCH; echo ready; while :; do sleep 0.01; done");
    start(&mut client, &run);
    wait_for_text(&node().log_path(run.id), "ready");
    done(&mut client, &Request::Resize { id: run.id, size: WindowSize { rows: 10, columns: 300 } });
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 5 });
    let (said, _) = output(&node().log_path(run.id));
    assert!(said.ends_with("10 300\r\n"), "{said:?}");
    done(&mut client, &Request::Forget { id: run.id });

    let without = shell("sleep 100");
    start(&mut client, &without);
    let refused = failure(client.call(&Request::Resize { id: without.id, size: SIZE }, &[]).unwrap());
    assert_eq!(refused.kind, FailureKind::Refused);
    kill(&mut client, without.id);
    wait(&mut client, without.id);
    done(&mut client, &Request::Forget { id: without.id });
}

#[test]
fn no_byte_of_a_terminal_is_lost_however_soon_its_program_ends() {
    let numbers = (1..=20_000).map(|n| format!("{n}\r\n")).collect::<String>();
    let done = at_terminal("seq 1 20000").run();
    assert!(done.stdout == numbers, "{} bytes of {}", done.stdout.len(), numbers.len());
    assert_eq!(done.ending.usage.stdout_bytes, numbers.len() as u64);
    let (mut client, run) = (node().client(), shell("sleep 1000"));
    start(&mut client, &run);
    for n in 0..100 {
        assert_eq!(at_terminal(&format!("echo {n}")).run().stdout, format!("{n}\r\n"));
        let exec = Exec { terminal: Some(SIZE), ..script(&run, &format!("echo {n}")) };
        begin(&mut client, &exec);
        wait(&mut client, exec.id);
        assert_eq!(output(&node().log_path(exec.id)).0, format!("{n}\r\n"));
        self::done(&mut client, &Request::Forget { id: exec.id });
    }
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    self::done(&mut client, &Request::Forget { id: run.id });
}

#[test]
fn an_exec_has_a_terminal_of_its_own_and_one_that_it_leaves_behind_does_not_hold_it() {
    let mut client = node().client();
    let run = at_terminal("echo ready; sleep 1000");
    start(&mut client, &run);
    wait_for_text(&node().log_path(run.id), "ready");
    let text = "busybox tty; busybox stty size; (trap '' HUP; sleep 100) & read line; echo \"got <$line>\"; exit 4";
    let exec = Exec { terminal: Some(SIZE), ..script(&run, text) };
    begin(&mut client, &exec);
    let mut keys = keyboard(&mut client, exec.id);
    keys.write_all(b"typed\n").unwrap();
    assert_eq!(wait(&mut client, exec.id).cause, Cause::Exited { code: 4 });
    let (stdout, _) = output(&node().log_path(exec.id));
    assert!(stdout.contains("/dev/pts/1\r\n33 99\r\n") && stdout.ends_with("got <typed>\r\n"), "{stdout:?}");
    assert!(keys.write_all(b"more\n").is_ok() || keys.write_all(b"more\n").is_err(), "whoever kept it harms nobody");
    for id in [exec.id, run.id] {
        if id == run.id {
            kill(&mut client, id);
            wait(&mut client, id);
        }
        done(&mut client, &Request::Forget { id });
    }
}

/// CPU time that a process has used, in clock ticks (proc_pid_stat(5)).
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_terminal_that_its_program_lets_go_of_keeps_nobody_busy() {
    let node = Node::start();
    let mut client = node.client();
    let run = at_terminal("read line; echo ready; exec </dev/null >/dev/null 2>&1; sleep 2; exit 3");
    start(&mut client, &run);
    let mut keys = keyboard(&mut client, run.id);
    keys.write_all(b"\n").unwrap();
    wait_for_text(&node.log_path(run.id), "ready");
    let exec = Exec { terminal: Some(SIZE), ..script(&run, "read line") };
    begin(&mut client, &exec);
    let mut other = keyboard(&mut client, exec.id);
    other.write_all(b"\n").unwrap();
    wait(&mut client, exec.id);
    std::thread::sleep(Duration::from_millis(300));
    let before = ticks(node.pid());
    assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 3 });
    std::thread::sleep(Duration::from_millis(700));
    let used = ticks(node.pid()) - before;
    assert!(used < 40, "the keeper was busy for {used} ticks");
    drop((keys, other));
}

#[test]
fn whoever_types_has_a_pipe_and_no_hold_of_the_terminal() {
    let mut client = node().client();
    let run = at_terminal("read line; echo \"got <$line>\"; sleep 100");
    start(&mut client, &run);
    let mut keys = keyboard(&mut client, run.id);
    assert!(keys.metadata().unwrap().file_type().is_fifo() && !rustix::termios::isatty(&keys));
    assert!(keys.read(&mut [0; 8]).is_err(), "what is written there is the log's alone");
    rustix::io::ioctl_fionbio(&keys, false).unwrap();
    keys.write_all(b"typed\n").unwrap();
    wait_for_text(&node().log_path(run.id), "got <typed>\r\n");
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    done(&mut client, &Request::Forget { id: run.id });
}

/// Writes until nothing more is taken for a while. How much that was.
fn fill(keys: &mut File, bytes: &[u8]) -> usize {
    let pause = rustix::time::Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
    let mut taken = 0;
    while taken < bytes.len() {
        let mut ready = [PollFd::new(&*keys, PollFlags::OUT)];
        if poll(&mut ready, Some(&pause)).unwrap() == 0 {
            break;
        }
        match keys.write(&bytes[taken..]) {
            Ok(len) => taken += len,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    taken
}

#[test]
fn what_is_typed_waits_for_its_reader_and_holds_up_nobody_else() {
    const BYTES: usize = 1_000_000;
    let node = Node::start();
    let mut client = node.client();
    let script = format!(
        "busybox stty raw -echo; trap 'go=1' USR1; echo ready; while [ -z \"$go\" ]; do sleep 0.01; done; head -c {BYTES} | busybox md5sum; sleep 100"
    );
    let mut run = at_terminal(&script);
    run.supervision.wall_ms = Some(60_000);
    start(&mut client, &run);
    wait_for_text(&node.log_path(run.id), "ready");
    let typed: Vec<u8> = (0..BYTES).map(|n| b'a' + u8::try_from(n % 251 % 26).unwrap()).collect();
    let mut keys = keyboard(&mut client, run.id);
    let taken = fill(&mut keys, &typed);
    assert!((10_000..BYTES).contains(&taken), "{taken}");
    let busy = failure(client.call(&Request::EndInput { id: run.id }, &[]).unwrap());
    assert_eq!(busy.kind, FailureKind::Busy, "{busy:?}");
    // What waits there passes to the next program, too.
    upgrade(&node);
    let mut client = node.client();
    let before = ticks(node.pid());
    std::thread::sleep(Duration::from_millis(300));
    assert!(ticks(node.pid()) - before < 15, "a terminal that takes no more keeps the keeper busy");

    done(&mut client, &Request::Signal { id: run.id, signal: 10 });

    assert_eq!(fill(&mut keys, &typed[taken..]), BYTES - taken);
    let expected = std::process::Command::new("busybox")
        .args(["sh", "-c"])
        .arg(format!("head -c {BYTES} | busybox md5sum"))
        .stdin(crate::harness::memory(&typed))
        .output()
        .unwrap();
    wait_for_text(&node.log_path(run.id), String::from_utf8(expected.stdout).unwrap().trim());
}

#[test]
fn a_terminal_that_somebody_left_behind_holds_holds_up_nobody_else() {
    let mut client = node().client();
    let mut run = shell("dd if=/dev/zero of=/slow bs=1M count=2 conv=fsync 2>/dev/null; echo ready; sleep 100");
    run.supervision.medium = Medium::Disk;
    run.supervision.wall_ms = Some(60_000);
    start(&mut client, &run);
    wait_for_text(&node().log_path(run.id), "ready");
    // A page takes it four seconds.
    let io = Some(IoLimits { bytes_per_s: 1024, ops_per_s: 1000 });
    done(&mut client, &Request::Update { id: run.id, limits: NewLimits { io, ..NewLimits::default() } });
    let exec = Exec { terminal: Some(SIZE), wall_ms: None, ..arguments(&run, &["/bin/attack", "hold_terminal", "/slow"]) };
    begin(&mut client, &exec);

    let ending = wait(&mut client, exec.id);

    let begun = Instant::now();
    assert_eq!(ending.cause, Cause::Exited { code: 0 }, "{ending:?}");
    node().hello().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    kill(&mut client, run.id);
    wait(&mut client, run.id);
    done(&mut client, &Request::Forget { id: exec.id });
    done(&mut client, &Request::Forget { id: run.id });
}

#[test]
fn a_terminal_is_handed_over() {
    let node = Node::start();
    let mut client = node.client();
    let run = at_terminal("read line; echo \"got <$line>\"; exit 6");
    start(&mut client, &run);
    let exec = Exec { terminal: Some(SIZE), ..script(&run, "read line; busybox stty size; exit 7") };
    begin(&mut client, &exec);
    upgrade(&node);
    let mut client = node.client();
    done(&mut client, &Request::Resize { id: exec.id, size: WindowSize { rows: 5, columns: 6 } });
    for (id, code, said) in [(exec.id, 7, "5 6\r\n"), (run.id, 6, "got <typed>\r\n")] {
        keyboard(&mut client, id).write_all(b"typed\n").unwrap();
        assert_eq!(wait(&mut client, id).cause, Cause::Exited { code });
        assert!(output(&node.log_path(id)).0.ends_with(said));
    }
}

#[test]
fn a_sandbox_has_a_few_terminals_and_the_machine_enough_for_all() {
    let held = shell("f() { { f $(($1 + 1)); } 3<>/dev/ptmx || echo $1; }; f 0 2>/dev/null").run();
    assert_eq!(held.stdout, "16\n", "{held:?}");
    let setting = |name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/sys/kernel/pty/{name}")).unwrap();
        text.trim().parse().unwrap()
    };
    let wanted = setting("reserve") + u64::from(node().hello().unwrap().sandboxes_max) * 16;
    assert!(setting("max") >= wanted, "{} of {wanted}", setting("max"));
}

#[test]
fn there_is_no_terminal_under_gvisor() {
    let mut run = at_terminal("true").with("/linux/resources/memory", serde_json::json!({ "limit": 256 << 20, "swap": 256 << 20 }));
    run.isolation = Isolation::Gvisor;
    let refused = failure(run.launch(&mut node().client()));
    assert_eq!(refused.kind, FailureKind::Refused, "{refused:?}");
}
