//! A keeper goes on as another program, with all of its sandboxes; or, where that cannot be, as if nobody had asked.

use std::{
    collections::BTreeSet,
    fs::File,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill as send_signal},
    unistd::Pid,
};
use sandbox_core::{
    client::Client,
    protocol::{Answer, Cause, Ending, FailureKind, Isolation, KillReason, Layering, Medium, Request, SandboxId, Start},
};

use crate::{
    harness::{KEEPER, Node, Run, kill, output, records, shell, wait, wait_for_line},
    layers::{drop_layer, launch, run},
    leaks::{Snapshot, children, told},
};

const SOON: Duration = Duration::from_secs(15);

/// A keeper whose program can be replaced, and what it says.
struct Replaceable {
    node: Node,
    programs: tempfile::TempDir,
}

impl Replaceable {
    fn start() -> Self {
        Self::start_with(|_| {})
    }

    fn start_with(change: impl Fn(&mut Command)) -> Self {
        let programs = tempfile::tempdir().unwrap();
        for name in ["sandbox-keeper", "sandbox-init", "sandbox-unpack"] {
            std::fs::copy(Path::new(KEEPER).with_file_name(name), programs.path().join(name)).unwrap();
        }
        let mut keeper = Command::new(programs.path().join("sandbox-keeper"));
        keeper.stderr(File::create(programs.path().join("stderr")).unwrap());
        change(&mut keeper);
        Self { node: Node::start_as(keeper), programs }
    }

    fn program(&self) -> PathBuf {
        self.programs.path().join("sandbox-keeper")
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.programs.path().join("stderr")).unwrap()
    }

    /// Puts something else where the program was.
    fn replace(&self, with: &str) {
        let new = self.programs.path().join("new");
        std::fs::write(&new, with).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(new, self.program()).unwrap();
    }

    /// Puts something there that does `then` when it is told to.
    fn replace_with_one_that_waits(&self, then: &str) -> Waiting {
        let at = |name: &str| self.programs.path().join(name);
        let waiting = Waiting { begun: at("begun"), go: at("go") };
        let (begun, go) = (waiting.begun.display(), waiting.go.display());
        self.replace(&format!("#!/bin/sh\n: > {begun}\nwhile [ ! -e {go} ]; do sleep 0.02; done\n{then}\n"));
        waiting
    }

    fn put_back(&self) {
        let new = self.programs.path().join("new");
        std::fs::copy(KEEPER, &new).unwrap();
        std::fs::rename(new, self.program()).unwrap();
    }
}

/// A program on trial that has not said anything yet.
struct Waiting {
    begun: PathBuf,
    go: PathBuf,
}

impl Waiting {
    /// Has it be tried, and returns when it is.
    fn is_asked_by(&self, node: &Node) {
        ask_for_upgrade(node);
        until(|| self.begun.exists().then_some(()));
    }

    fn go(&self) {
        std::fs::write(&self.go, "").unwrap();
    }
}

fn ask_for_upgrade(node: &Node) {
    send_signal(Pid::from_raw(node.pid().cast_signed()), Signal::SIGHUP).unwrap();
}

/// Upgrades it, and waits until it says that it was.
pub(crate) fn upgrade(node: &Node) {
    let before = until(|| node.hello().ok()).upgrades;
    ask_for_upgrade(node);
    until(|| node.hello().ok().filter(|hello| hello.upgrades == before + 1));
}

/// What `look` finds, as soon as it finds something.
pub(crate) fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "it does not come to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The ending, asked for again and again as connections break.
pub(crate) fn wait_across(node: &Node, id: SandboxId) -> Ending {
    until(|| {
        let answer = Client::connect(&node.socket()).ok()?.0.call(&Request::Wait { id }, &[]).ok()?;
        let Answer::Ended(ending) = answer else { panic!("the keeper answered {answer:?}") };
        Some(*ending)
    })
}

fn forget(node: &Node, id: SandboxId) {
    assert_eq!(node.client().call(&Request::Forget { id }, &[]).unwrap(), Answer::Done);
}

fn long(script: &str) -> Run {
    let mut run = shell(script);
    run.supervision.wall_ms = Some(60_000);
    run.supervision.output_bytes = 32 << 20;
    run
}

#[test]
fn twenty_upgrades_lose_no_byte_of_sandboxes_that_write() {
    let node = Node::start();
    let mut client = node.client();
    let slow = "i=0; while [ $i -lt 500 ]; do echo line $i; echo error $i >&2; i=$((i+1)); sleep 0.01; done; exit 3";
    let fast = "i=0; while [ $i -lt 40 ]; do seq 1 5000; i=$((i+1)); sleep 0.1; done; exit 4";
    let runs = [long(slow), long(fast), long(slow), long(fast)];
    for run in &runs {
        assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    }
    let before = node.hello().unwrap();
    (0..20).for_each(|_| upgrade(&node));
    let after = node.hello().unwrap();
    assert_eq!((after.pid, after.started_at_us, after.upgrades), (before.pid, before.started_at_us, 20));

    let lines = |line: &dyn Fn(u32) -> String, count| (0..count).map(line).collect::<String>();
    let numbers = (1..=5000).map(|n| format!("{n}\n")).collect::<String>();
    for (n, run) in runs.iter().enumerate() {
        let ending = wait_across(&node, run.id);
        let (stdout, stderr) = output(&node.log_path(run.id));
        if n % 2 == 0 {
            assert_eq!(ending.cause, Cause::Exited { code: 3 });
            assert_eq!(stdout, lines(&|i| format!("line {i}\n"), 500));
            assert_eq!(stderr, lines(&|i| format!("error {i}\n"), 500));
        } else {
            assert_eq!(ending.cause, Cause::Exited { code: 4 });
            assert!(stdout == numbers.repeat(40), "{} bytes", stdout.len());
        }
        assert_eq!(ending.usage.stdout_bytes, stdout.len() as u64);
        forget(&node, run.id);
    }
}

#[test]
fn upgrades_leave_nothing_open_and_nothing_behind() {
    let node = Node::start();
    for _ in 0..30 {
        shell("true").run_on(&node);
    }
    let mut client = node.client();
    let running = long("sleep 1000");
    assert!(matches!(running.launch(&mut client), Answer::Launched(_)));
    drop(client);
    // As many launches as there were in the last second are expected. When it is over, an upgrade leaves one that stands ready.
    std::thread::sleep(Duration::from_secs(1));
    upgrade(&node);
    let before = Snapshot::at_rest(&node);
    upgrade(&node);
    upgrade(&node);
    assert_eq!(Snapshot::at_rest(&node), before);
    kill(&mut node.client(), running.id);
    wait_across(&node, running.id);
    forget(&node, running.id);
    for _ in 0..30 {
        shell("true").run_on(&node);
    }
    assert_eq!(node.client().call(&Request::Shutdown, &[]).unwrap(), Answer::Done);
    node.wait_for_exit();
}

#[test]
fn sandboxes_in_every_state_are_as_they_were() {
    let node = Node::start();
    let ended = shell("echo over; exit 9");
    let mut client = node.client();
    ended.launch(&mut client);
    let ending = wait(&mut client, ended.id);
    let running = long("cat; echo done");
    let (read, write) = rustix::pipe::pipe().unwrap();
    assert!(matches!(running.launch_with_stdin(&mut client, std::os::fd::AsFd::as_fd(&read)), Answer::Launched(_)));
    drop(read);
    // The keeper has come to rest with as many parked as it wants.
    Snapshot::at_rest(&node);
    let standing: BTreeSet<String> = children(&node).into_iter().collect();
    assert!(standing.len() > 1, "nothing is parked");
    let listed = records(&mut client);

    upgrade(&node);

    let mut client = node.client();
    assert_eq!(records(&mut client), listed);
    assert_eq!(wait(&mut client, ended.id), ending);
    // The one that runs is as it was; those that stood ready were built by the program before, and are built anew.
    until(|| (standing.intersection(&children(&node).into_iter().collect()).count() == 1).then_some(()));
    Snapshot::at_rest(&node);
    assert!(children(&node).len() > 1, "nothing is parked");
    let Answer::Launched(warm) = shell("true").launch(&mut client) else { panic!() };
    assert_eq!(warm.start, Start::Warm);
    rustix::io::write(&write, b"through\n").unwrap();
    drop(write);
    assert_eq!(wait(&mut client, running.id).cause, Cause::Exited { code: 0 });
    assert_eq!(output(&node.log_path(running.id)).0, "through\ndone\n");
    let Answer::Failed(twice) = running.launch(&mut client) else { panic!() };
    assert_eq!(twice.kind, FailureKind::Refused);
}

/// Cold ones whose layer is being made on disk, warm ones, ends and clean-ups: whatever is under way at the moment of the change.
#[test]
fn launches_that_are_under_way_come_to_their_end() {
    /// What it takes, many times over: what hangs is to say where.
    const PATIENCE: Duration = Duration::from_secs(180);
    let node = Arc::new(Node::start());
    let (tell, told) = std::sync::mpsc::channel();
    let test = std::thread::spawn({
        let node = Arc::clone(&node);
        move || launch_across_upgrades(&node, |step| tell.send(step).unwrap())
    });
    let (deadline, mut steps) = (Instant::now() + PATIENCE, Vec::new());
    while !test.is_finished() {
        steps.extend(told.recv_timeout(Duration::from_millis(100)));
        if Instant::now() >= deadline {
            let last = steps.len().saturating_sub(5);
            let where_it_is = waits_in(node.pid());
            // Whoever waits for it waits no longer, and what is left of it does not stand in the way of other tests.
            send_signal(Pid::from_raw(node.pid().cast_signed()), Signal::SIGKILL).unwrap();
            panic!("it hangs behind {:?}; the keeper and its children: {where_it_is}", &steps[last..]);
        }
    }
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What a keeper and each of its children wait in, as far as the kernel says (proc_pid_wchan(5), proc_pid_syscall(5)), and what memory there is: where that is short, everything
/// waits.
fn waits_in(pid: u32) -> String {
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    let task = format!("/proc/{pid}/task/{pid}");
    let children = read(format!("{task}/children"));
    let all = std::iter::once(pid.to_string()).chain(children.split_whitespace().map(str::to_owned));
    let of_one = |pid: String| {
        let waits = ["wchan", "syscall"].map(|file| read(format!("/proc/{pid}/{file}")));
        format!("{}\nin {waits:?}", told(&pid))
    };
    let memory: Vec<String> = read("/proc/meminfo".to_owned()).lines().take(5).map(str::to_owned).collect();
    format!("{}\n{memory:?}", all.map(of_one).collect::<String>())
}

fn launch_across_upgrades(node: &Node, at: impl Fn(String)) {
    let mut sent: Vec<Run> = Vec::new();
    for turn in 0..6_u32 {
        let mut client = node.client();
        ask_for_upgrade(node);
        for n in 0..40 {
            let mut run = long(&format!("echo {turn} {n}"));
            if n % 3 == 0 {
                (run.supervision.medium, run.supervision.disk_bytes) = (Medium::Disk, 4 << 20);
            }
            at(format!("sending {n} of turn {turn}"));
            let is_sent = run.try_launch(&mut client);
            sent.push(run);
            if !is_sent {
                break;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        at(format!("upgrading in turn {turn}"));
        until(|| node.hello().ok().filter(|hello| hello.upgrades == turn + 1));
    }
    let known: BTreeSet<SandboxId> = records(&mut node.client()).into_iter().map(|record| record.id).collect();
    assert!(known.len() > 12, "hardly any launch was under way: {}", known.len());
    for run in &sent {
        if known.contains(&run.id) {
            at(format!("waiting for {}", run.id));
            let ending = wait_across(node, run.id);
            assert_eq!(ending.cause, Cause::Exited { code: 0 }, "{ending:?}");
        } else {
            // It was never read, and has left no trace: who sent it sends it again.
            assert!(!node.log_path(run.id).exists());
            let mut client = node.client();
            at(format!("launching {} again", run.id));
            let answer = run.launch(&mut client);
            assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
            assert_eq!(wait(&mut client, run.id).cause, Cause::Exited { code: 0 });
        }
        at(format!("forgetting {}", run.id));
        output(&node.log_path(run.id));
        forget(node, run.id);
    }
}

#[test]
fn limits_in_time_hold_across_upgrades() {
    let node = Node::start();
    let mut client = node.client();
    let walls: Vec<Run> = (0..8_u64)
        .map(|n| {
            let mut run = shell("sleep 100");
            run.supervision.wall_ms = Some(400 + 70 * n);
            run
        })
        .collect();
    let mut busy = long("while :; do :; done");
    busy.supervision.cpu_ms = Some(700);
    for run in walls.iter().chain([&busy]) {
        assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
    }
    (0..5).for_each(|_| upgrade(&node));
    for run in &walls {
        let ending = wait_across(&node, run.id);
        assert_eq!(ending.cause, Cause::WallTimeout);
        let over_us = ending.usage.wall_us - run.supervision.wall_ms.unwrap() * 1000;
        assert!(over_us < 250_000, "{over_us} µs too long");
    }
    let ending = wait_across(&node, busy.id);
    assert_eq!(ending.cause, Cause::CpuTimeout);
    assert!((700_000..800_000).contains(&ending.usage.cpu_us), "{:?}", ending.usage);
}

#[test]
fn a_program_that_cannot_take_over_changes_nothing() {
    let keeper = Replaceable::start();
    let node = &keeper.node;
    let mut client = node.client();
    let running = long("echo here; sleep 1000");
    assert!(matches!(running.launch(&mut client), Answer::Launched(_)));
    wait_for_line(&node.log_path(running.id));
    let mut refusals = 0;
    let mut refused = |said: &str| {
        ask_for_upgrade(node);
        refusals += 1;
        until(|| (keeper.said().matches("not upgrading").count() == refusals).then_some(()));
        assert!(keeper.said().lines().any(|line| line.contains(said)), "{}", keeper.said());
        assert_eq!(node.hello().unwrap().upgrades, 0);
    };
    keeper.replace("#!/bin/sh\necho no thanks >&2\nexit 1\n");
    refused("refused, or failed");
    assert!(keeper.said().contains("no thanks"));
    keeper.replace("#!/bin/sh\nkill -SEGV $$\n");
    refused("refused, or failed");
    keeper.replace("no program at all");
    refused("Exec format error");
    std::fs::remove_file(keeper.program()).unwrap();
    refused("No such file");
    keeper.replace("#!/bin/sh\nexec sleep 1000\n");
    ask_for_upgrade(node);
    // While it is waited for, everything goes on.
    let begun = Instant::now();
    assert_eq!(shell("exit 2").run_on(node).ending.cause, Cause::Exited { code: 2 });
    assert!(begun.elapsed() < Duration::from_secs(3));
    until(|| keeper.said().contains("did not say in time").then_some(()));

    // Nobody was disconnected.
    assert_eq!(records(&mut client).len(), 1);
    keeper.put_back();
    upgrade(node);
    kill(&mut node.client(), running.id);
    assert!(matches!(wait_across(node, running.id).cause, Cause::Killed(_)));
    assert_eq!(output(&node.log_path(running.id)).0, "here\n");
}

#[test]
fn a_program_that_knows_no_layers_over_others_is_told_of_another_format_while_there_are_such() {
    let keeper = Replaceable::start();
    let node = &keeper.node;
    // Looks at the beginning of what it is to take over, as an older one does, and refuses.
    keeper.replace("#!/bin/sh\nhead -c 11 /proc/$$/fd/3 >&2\necho >&2\nexit 1\n");
    let told = || {
        let refusals = || keeper.said().matches("refused, or failed").count();
        let before = refusals();
        ask_for_upgrade(node);
        until(|| (refusals() > before).then_some(()));
        keeper.said().lines().rfind(|line| line.starts_with("{\"format\":")).map(str::to_owned).unwrap()
    };
    let (base, _) = run(node, shell("echo left > /left"), Layering::Fresh);
    assert_eq!(told(), "{\"format\":1");
    let mut over = long("exec sleep 1000");
    (over.layer, over.keeps_layer) = (Layering::Over(base), false);
    assert!(matches!(launch(node, &over), Answer::Launched(_)));

    assert_eq!(told(), "{\"format\":2");

    kill(&mut node.client(), over.id);
    wait_across(node, over.id);
    // Nothing is left of who had it when it can be given up.
    drop_layer(&mut node.client(), base);
    assert_eq!(told(), "{\"format\":1");
}

#[test]
fn what_begins_under_a_trial_and_was_not_shown_to_the_program_is_shown_before_it_is_handed_over() {
    let keeper = Replaceable::start();
    let node = &keeper.node;
    let (base, _) = run(node, shell("echo left > /left"), Layering::Fresh);
    // Agrees when it is told to, and could not take over.
    let waiting = keeper.replace_with_one_that_waits("printf y >&4");
    let pid = node.pid();
    waiting.is_asked_by(node);
    let mut over = long("exec sleep 1000");
    (over.layer, over.keeps_layer) = (Layering::Over(base), false);
    assert!(matches!(launch(node, &over), Answer::Launched(_)));

    // What is tried again could.
    keeper.put_back();
    waiting.go();
    until(|| node.hello().ok().filter(|hello| hello.upgrades == 1));

    assert!(keeper.said().contains("agreed to less than there is"), "{}", keeper.said());
    assert_eq!(node.pid(), pid);
    kill(&mut node.client(), over.id);
    assert_eq!(wait_across(node, over.id).cause, Cause::Killed(KillReason::StoppedByUser));
}

#[test]
fn a_program_that_is_put_there_under_the_trial_of_another_is_tried_itself() {
    let keeper = Replaceable::start();
    let node = &keeper.node;
    let running = long("exec sleep 1000");
    assert!(matches!(running.launch(&mut node.client()), Answer::Launched(_)));
    let waiting = keeper.replace_with_one_that_waits("printf y >&4");
    waiting.is_asked_by(node);
    // Whoever became this one would end there, with all sandboxes.
    keeper.replace("#!/bin/sh\nexit 1\n");

    waiting.go();

    until(|| keeper.said().contains("refused, or failed").then_some(()));
    assert!(keeper.said().contains("is another program by now"), "{}", keeper.said());
    assert_eq!(node.hello().unwrap().upgrades, 0);
    kill(&mut node.client(), running.id);
    assert_eq!(wait_across(node, running.id).cause, Cause::Killed(KillReason::StoppedByUser));
}

#[test]
fn who_asks_while_a_program_is_tried_that_refuses_has_the_next_one_tried() {
    let keeper = Replaceable::start();
    let node = &keeper.node;
    let waiting = keeper.replace_with_one_that_waits("exit 1");
    waiting.is_asked_by(node);
    keeper.put_back();
    ask_for_upgrade(node);
    // The keeper sees to its signals first.
    assert_eq!(node.hello().unwrap().upgrades, 0);

    waiting.go();

    until(|| node.hello().ok().filter(|hello| hello.upgrades == 1));
    assert!(keeper.said().contains("refused, or failed"), "{}", keeper.said());
}

/// Its deadline comes up and its answer is there before the keeper, which has been busy, gets to either; the deadline first.
#[cfg(feature = "fail-points")]
#[test]
fn a_program_that_agreed_in_time_is_not_given_up_because_the_keeper_was_busy() {
    const WALL: Duration = Duration::from_secs(3);
    let keeper = Replaceable::start_with(|keeper| {
        keeper.env("MAYFLY_FAIL_POINTS", "keeper.launch.received=1*off->1*sleep(9000)");
    });
    let node = &keeper.node;
    let mut client = node.client();
    let mut first = long("exec sleep 1000");
    first.supervision.wall_ms = Some(WALL.as_millis().try_into().unwrap());
    assert!(matches!(first.launch(&mut client), Answer::Launched(_)));
    let launched = Instant::now();
    let waiting = keeper.replace_with_one_that_waits("printf y >&4");
    waiting.is_asked_by(node);
    keeper.put_back();
    let busy = long("exit 3");
    busy.begin_launch(&mut client);
    // The timer has come up for the first one, and waits for the keeper: whatever comes from here on is behind it.
    std::thread::sleep(WALL.saturating_sub(launched.elapsed()) + Duration::from_millis(10));

    waiting.go();

    until(|| node.hello().ok().filter(|hello| hello.upgrades == 1));
    assert!(!keeper.said().contains("did not say in time"), "{}", keeper.said());
    assert_eq!(wait_across(node, first.id).cause, Cause::WallTimeout);
    assert_eq!(wait_across(node, busy.id).cause, Cause::Exited { code: 3 });
}

#[test]
fn what_runs_then_is_what_lies_there_then() {
    let keeper = Replaceable::start();
    let running = |of: &Node| std::fs::read_link(format!("/proc/{}/exe", of.pid())).unwrap();
    keeper.put_back();
    assert!(running(&keeper.node).to_str().unwrap().ends_with("(deleted)"));
    upgrade(&keeper.node);
    assert_eq!(running(&keeper.node), keeper.program());
    upgrade(&keeper.node);
    assert_eq!(shell("exit 2").run_on(&keeper.node).ending.cause, Cause::Exited { code: 2 });
}

#[test]
fn a_link_is_followed_to_where_it_leads_then() {
    let folder = tempfile::tempdir().unwrap();
    let versions = ["one", "two"].map(|name| folder.path().join(name));
    for version in &versions {
        std::fs::create_dir(version).unwrap();
        for name in ["sandbox-keeper", "sandbox-init", "sandbox-unpack"] {
            std::fs::copy(Path::new(KEEPER).with_file_name(name), version.join(name)).unwrap();
        }
    }
    let (link, next) = (folder.path().join("sandbox-keeper"), folder.path().join("next"));
    std::os::unix::fs::symlink(versions[0].join("sandbox-keeper"), &link).unwrap();
    let node = Node::start_as(Command::new(&link));
    std::os::unix::fs::symlink(versions[1].join("sandbox-keeper"), &next).unwrap();
    std::fs::rename(next, link).unwrap();
    upgrade(&node);
    assert_eq!(std::fs::read_link(format!("/proc/{}/exe", node.pid())).unwrap(), versions[1].join("sandbox-keeper"));
    assert_eq!(shell("exit 2").run_on(&node).ending.cause, Cause::Exited { code: 2 });
}

#[test]
fn a_sandbox_under_gvisor_goes_on() {
    let node = Node::start();
    assert!(node.hello().unwrap().isolation.contains(&Isolation::Gvisor), "runsc is not installed");
    let mut client = node.client();
    let mut run = long("echo before; sleep 3; echo after; exit 5").with("/linux/resources/memory/limit", 256 << 20);
    run = run.with("/linux/resources/memory/swap", 256 << 20);
    run.isolation = Isolation::Gvisor;
    let answer = run.launch(&mut client);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
    wait_for_line(&node.log_path(run.id));
    upgrade(&node);
    assert_eq!(wait_across(&node, run.id).cause, Cause::Exited { code: 5 });
    assert_eq!(output(&node.log_path(run.id)).0, "before\nafter\n");
}

#[cfg(feature = "fail-points")]
#[test]
fn a_keeper_killed_at_any_step_of_an_upgrade_leaves_records_that_have_ended() {
    for step in ["keeper.upgrade.trial_begun", "keeper.upgrade.accepted", "keeper.upgrade.described", "keeper.upgrade.taken_over"] {
        let keeper = Replaceable::start_with(|keeper| {
            keeper.env("MAYFLY_FAIL_POINTS", format!("{step}=1*return"));
        });
        let mut client = keeper.node.client();
        let run = long("echo here; sleep 1000");
        assert!(matches!(run.launch(&mut client), Answer::Launched(_)));
        wait_for_line(&keeper.node.log_path(run.id));
        ask_for_upgrade(&keeper.node);
        let next = Node::start_after(keeper.node.died());
        let ending = wait(&mut next.client(), run.id);
        assert!(matches!(&ending.cause, Cause::InfraError { message } if message.contains("keeper was killed")), "{step}: {ending:?}");
        assert_eq!(output(&next.log_path(run.id)).0, "here\n", "{step}");
    }
}
