//! Writable layers that outlive their sandbox: what the next one on them finds, and what becomes of them.

use std::time::{Duration, Instant};

use sandbox_core::{
    client::Client,
    protocol::{Answer, Cause, FailureKind, KillReason, Layering, Limit, Medium, Request, SandboxId},
    tree::{ChangeKind, Span},
};

use crate::{
    harness::{IMAGE, Node, Run, kill, node, output, records, shell, wait},
    tree::Files,
};

/// Runs it to its end, with its layer kept and its record forgotten; what it wrote.
pub(crate) fn run(node: &Node, mut run: Run, layer: Layering) -> (SandboxId, String) {
    (run.layer, run.keeps_layer) = (layer, true);
    let mut client = node.client();
    let answer = launch(node, &run);
    assert!(matches!(answer, Answer::Launched(_) | Answer::Ended(_)), "{answer:?}");
    let ending = wait(&mut client, run.id);
    assert_eq!(ending.cause, Cause::Exited { code: 0 }, "{ending:?}");
    let (stdout, stderr) = output(&node.log_path(run.id));
    assert_eq!(stderr, "");
    assert_eq!(client.call(&Request::Forget { id: run.id }, &[]).unwrap(), Answer::Done);
    (run.id, stdout)
}

/// Launches it as soon as nobody has the layer any more that it is to have.
pub(crate) fn launch(node: &Node, run: &Run) -> Answer {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = run.launch(&mut node.client());
        if !is(&answer, FailureKind::Busy) || Instant::now() > deadline {
            return answer;
        }
        std::thread::yield_now();
    }
}

pub(crate) fn is(answer: &Answer, kind: FailureKind) -> bool {
    matches!(answer, Answer::Failed(failure) if failure.kind == kind)
}

/// Somebody who works on the files that a sandbox left, as soon as it is gone.
pub(crate) fn files(node: &Node, id: SandboxId) -> Files {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Files::open(node, id) {
            Ok(files) => return files,
            Err(answer) => assert!(is(&answer, FailureKind::Busy) && Instant::now() < deadline, "{answer:?}"),
        }
    }
}

pub(crate) fn drop_layer(client: &mut Client, id: SandboxId) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = client.call(&Request::DropLayer { id }, &[]).unwrap();
        if answer == Answer::Done {
            return;
        }
        assert!(is(&answer, FailureKind::Busy) && Instant::now() < deadline, "{answer:?}");
    }
}

pub(crate) fn as_user(run: Run) -> Run {
    run.with("/process/user/uid", 1000).with("/process/user/gid", 1000)
}

pub(crate) fn on_disk(mut run: Run) -> Run {
    run.supervision.medium = Medium::Disk;
    run
}

/// What one leaves the next one finds, with its owners, and so do those after it.
fn lives_on(on: fn(Run) -> Run) {
    let (first, _) = run(node(), on(as_user(shell("echo mine > /tmp/mine; mkdir /tmp/folder"))), Layering::Fresh);
    let change = "stat -c %u:%g /tmp/mine; cat /tmp/mine; rm -r /tmp/folder; echo more >> /tmp/mine";
    let (second, seen) = run(node(), on(as_user(shell(change))), Layering::Of(first));
    assert_eq!(seen, "1000:1000\nmine\n");
    let (third, seen) = run(node(), on(shell("cat /tmp/mine; ls /tmp; rm -r /home; mkdir /home; rm /bin/seq")), Layering::Of(second));
    assert_eq!(seen, "mine\nmore\nmine\n");
    // A folder that replaces one of the image, and what was deleted of the image, too.
    let (fourth, seen) = run(node(), on(shell("ls /home; [ -e /bin/seq ] || echo gone")), Layering::Of(third));

    assert_eq!(seen, "gone\n");
    // It is the last one's alone.
    for before in [first, second, third] {
        let mut run = on(shell("true"));
        run.layer = Layering::Of(before);
        assert!(is(&run.launch(&mut node().client()), FailureKind::Gone));
    }
    drop_layer(&mut node().client(), fourth);
    assert!(matches!(Files::open(node(), fourth).err(), Some(answer) if is(&answer, FailureKind::Gone)));
    drop_layer(&mut node().client(), fourth);
}

#[test]
fn a_layer_in_memory_lives_on() {
    lives_on(|run| run);
}

#[test]
fn a_layer_on_disk_lives_on() {
    lives_on(on_disk);
}

#[test]
fn a_layer_keeps_its_size_whoever_runs_on_it() {
    let (first, _) = run(node(), shell("dd if=/dev/zero of=/tmp/a bs=1M count=12 2>/dev/null"), Layering::Fresh);
    let mut second = shell("dd if=/dev/zero of=/tmp/b bs=1M count=12 2>/dev/null; stat -c %s /tmp/b");
    (second.layer, second.keeps_layer) = (Layering::Of(first), false);
    assert!(matches!(launch(node(), &second), Answer::Launched(_)));

    let ending = wait(&mut node().client(), second.id);

    let (stdout, _) = output(&node().log_path(second.id));
    assert!(stdout.trim().parse::<u64>().unwrap() <= 4 << 20, "{stdout}");
    assert!(ending.limits_hit.contains(&Limit::Disk), "{ending:?}");
    node().client().call(&Request::Forget { id: second.id }, &[]).unwrap();
    // It did not say that it keeps it.
    assert!(matches!(Files::open(node(), second.id).err(), Some(answer) if is(&answer, FailureKind::Gone)));
}

#[test]
fn the_files_of_one_that_ended_are_worked_on() {
    let (id, _) = run(node(), shell("echo left > /left"), Layering::Fresh);

    let mut one = files(node(), id);
    let mut other = files(node(), id);
    assert_eq!(one.read("/left", Span::ALL).unwrap(), b"left\n");
    other.write("/put", b"put").unwrap();
    assert_eq!(one.changes(), [("/left".to_owned(), ChangeKind::Added), ("/put".to_owned(), ChangeKind::Added)]);
    // Somebody has it.
    let mut next = shell("cat /put");
    next.layer = Layering::Of(id);
    assert!(is(&next.launch(&mut node().client()), FailureKind::Busy));
    drop((one, other));

    let (next, seen) = run(node(), shell("cat /put"), Layering::Of(id));
    assert_eq!(seen, "put");
    assert_eq!(files(node(), next).read("/put", Span::ALL).unwrap(), b"put");
    drop_layer(&mut node().client(), next);
}

#[test]
fn a_layer_stays_on_its_image_in_its_place_and_of_its_size() {
    let (id, _) = run(node(), shell("true"), Layering::Fresh);
    files(node(), id).stat("/").unwrap();
    for bend in [
        |run: &mut Run| run.supervision.disk_bytes += 4096,
        |run: &mut Run| run.supervision.inodes += 1,
        |run: &mut Run| run.supervision.medium = Medium::Disk,
    ] {
        let mut other = shell("true");
        other.layer = Layering::Of(id);
        bend(&mut other);
        let answer = launch(node(), &other);
        assert!(is(&answer, FailureKind::Refused), "{answer:?}");
    }
    drop_layer(&mut node().client(), id);
}

#[test]
fn one_that_is_killed_and_one_that_never_starts_keep_theirs_too() {
    let mut client = node().client();
    let mut killed = shell("echo left > /left; sleep 60");
    killed.keeps_layer = true;
    assert!(matches!(killed.launch(&mut client), Answer::Launched(_)));
    let deadline = Instant::now() + Duration::from_secs(10);
    while Files::open(node(), killed.id).unwrap().stat("/left").is_err() {
        assert!(Instant::now() < deadline);
    }
    kill(&mut client, killed.id);
    wait(&mut client, killed.id);
    let mut broken = crate::harness::command(&["/no/such/program"]);
    (broken.layer, broken.keeps_layer) = (Layering::Of(killed.id), true);
    assert!(matches!(launch(node(), &broken), Answer::Ended(_)));

    assert_eq!(files(node(), broken.id).read("/left", Span::ALL).unwrap(), b"left\n");

    drop_layer(&mut client, broken.id);
    for id in [killed.id, broken.id] {
        client.call(&Request::Forget { id }, &[]).unwrap();
    }
}

#[test]
fn a_layer_in_memory_is_written_to_by_so_many_sandboxes_and_no_more() {
    let (mut id, _) = run(node(), shell("echo 0 > /0"), Layering::Fresh);
    for n in 1..64 {
        if n % 20 == 0 {
            // Who only reads leaves nothing behind.
            (id, _) = run(node(), shell("cat /0"), Layering::Of(id));
        }
        (id, _) = run(node(), shell(&format!("echo {n} > /{n}")), Layering::Of(id));
    }
    files(node(), id).stat("/").unwrap();

    let mut next = shell("true");
    next.layer = Layering::Of(id);
    let answer = launch(node(), &next);

    assert!(is(&answer, FailureKind::Refused), "{answer:?}");
    assert_eq!(files(node(), id).read("/63", Span::ALL).unwrap(), b"63\n");
    drop_layer(&mut node().client(), id);
}

/// Launches it, and has it killed before anything of it can be there.
pub(crate) fn launch_and_kill(run: &Run) -> Answer {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut client = node().client();
        let launch = run.begin_launch(&mut client);
        let kill = client.send(&Request::Kill { id: run.id, reason: KillReason::StoppedByUser }, &[]).unwrap();
        let answer = client.receive(launch).unwrap();
        client.receive(kill).unwrap();
        if !is(&answer, FailureKind::Busy) || Instant::now() > deadline {
            return answer;
        }
    }
}

fn outlives_starts_that_are_stopped(on: fn(Run) -> Run) {
    let (mut id, _) = run(node(), on(shell("echo left > /left")), Layering::Fresh);
    for _ in 0..5 {
        let mut next = on(shell("sleep 100"));
        (next.layer, next.keeps_layer) = (Layering::Of(id), true);
        let answer = launch_and_kill(&next);
        assert!(matches!(&answer, Answer::Ended(ending) if ending.cause == Cause::Killed(KillReason::StoppedByUser)), "{answer:?}");
        node().client().call(&Request::Forget { id: next.id }, &[]).unwrap();
        id = next.id;
    }

    let (last, seen) = run(node(), on(shell("cat /left")), Layering::Of(id));

    assert_eq!(seen, "left\n");
    drop_layer(&mut node().client(), last);
}

#[test]
fn a_layer_in_memory_outlives_starts_that_are_stopped_at_once() {
    outlives_starts_that_are_stopped(|run| run);
}

#[test]
fn a_layer_on_disk_outlives_starts_that_are_stopped_at_once() {
    outlives_starts_that_are_stopped(on_disk);
}

/// Whose payload never ran: one that is killed a moment later than wanted is not it.
fn ended_before_it_ran(on: fn(Run) -> Run) -> SandboxId {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut run = on(shell("sleep 100"));
        run.keeps_layer = true;
        let answer = launch_and_kill(&run);
        let mut client = node().client();
        wait(&mut client, run.id);
        client.call(&Request::Forget { id: run.id }, &[]).unwrap();
        if matches!(&answer, Answer::Ended(ending) if ending.launched.is_none()) {
            return run.id;
        }
        assert!(Instant::now() < deadline, "{answer:?}");
        drop_layer(&mut client, run.id);
    }
}

#[test]
fn a_new_layer_whose_sandbox_is_ended_before_it_runs_is_not_kept() {
    for on in [(|run| run) as fn(Run) -> Run, on_disk] {
        let mut next = on(shell("true"));
        next.layer = Layering::Of(ended_before_it_ran(on));

        let answer = launch(node(), &next);

        assert!(is(&answer, FailureKind::Gone), "{answer:?}");
    }
}

#[test]
fn a_layer_is_kept_once_under_a_name_and_its_image_with_it() {
    let node = Node::start();
    let mut client = node.client();
    let (id, _) = run(&node, shell("echo left > /left"), Layering::Fresh);
    let mut again = shell("true");
    (again.id, again.keeps_layer) = (id, true);
    assert!(is(&launch(&node, &again), FailureKind::Refused));
    let image = || Request::RemoveImage { image: IMAGE.parse().unwrap() };
    assert!(is(&client.call(&image(), &[]).unwrap(), FailureKind::Busy));

    // On its own layer it may go on under its own name.
    let mut next = shell("cat /left");
    next.id = id;
    assert_eq!(run(&node, next, Layering::Of(id)).1, "left\n");
    drop_layer(&mut client, id);
    assert_eq!(client.call(&image(), &[]).unwrap(), Answer::Done);
}

#[test]
fn a_fifo_that_was_left_in_the_place_of_a_file_holds_nobody_up() {
    let (id, _) = run(node(), shell("busybox mkfifo /given"), Layering::Fresh);
    let mut next = shell("true");
    (next.layer, next.keeps_layer) = (Layering::Of(id), true);
    sandbox_core::files::write(&mut next.files, "given", 0o644, b"content").unwrap();

    let answer = launch(node(), &next);

    let Answer::Ended(ending) = answer else { panic!("{answer:?}") };
    assert!(matches!(&ending.cause, Cause::StartFailed { message } if message.contains("given")), "{ending:?}");
    let mut client = node().client();
    client.call(&Request::Forget { id: next.id }, &[]).unwrap();
    drop_layer(&mut client, next.id);
}

#[test]
fn kept_layers_pass_to_the_next_program_and_end_with_the_keeper() {
    let node = Node::start();
    let (id, _) = run(&node, shell("echo left > /left"), Layering::Fresh);
    let (disk, _) = run(&node, on_disk(shell("echo left > /left")), Layering::Fresh);
    let before = node.hello().unwrap().upgrades;

    let pid = rustix::process::Pid::from_raw(i32::try_from(node.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !node.hello().is_ok_and(|hello| hello.upgrades > before) {
        assert!(Instant::now() < deadline, "it did not go on as the next program");
        std::thread::sleep(Duration::from_millis(5));
    }

    for id in [id, disk] {
        assert_eq!(files(&node, id).read("/left", Span::ALL).unwrap(), b"left\n");
    }
    assert_eq!(run(&node, shell("cat /left"), Layering::Of(id)).1, "left\n");
    assert!(records(&mut node.client()).is_empty());
    assert_eq!(node.client().call(&Request::Shutdown, &[]).unwrap(), Answer::Done);
    node.wait_for_exit();
}
