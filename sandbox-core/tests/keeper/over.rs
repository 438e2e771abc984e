//! Fresh layers over a kept one: what is seen of it, that it stays as it is, and that it is free again.

use std::time::{Duration, Instant};

use sandbox_core::{
    protocol::{Answer, Cause, FailureKind, IoLimits, Isolation, KillReason, Layering, NewLimits, NewTime, Request, SandboxId},
    tree::{ChangeKind, Entry, Span},
};

use crate::{
    disk::{nodes, spoil_layer, wait_until_gone},
    exec::{run_exec, script},
    harness::{Node, Run, busybox_layer, kill, node, output, shell, wait, wait_for_text},
    layers::{as_user, drop_layer, files, is, launch, launch_and_kill, on_disk, run},
    leaks::Snapshot,
    tree::Files,
    upgrade::{upgrade, wait_across},
};

type On = fn(Run) -> Run;

fn in_memory(run: Run) -> Run {
    run
}

/// A layer with something of a user's, files, whiteouts, a folder in place of one of the image's, and another mode of the root.
fn base(node: &Node, on: On) -> SandboxId {
    let (first, _) = run(node, on(as_user(shell("echo mine > /tmp/mine"))), Layering::Fresh);
    let change = "mkdir /folder; echo in > /folder/in; rm /bin/seq; rm -r /home; mkdir /home; echo new > /home/new; busybox chmod 711 /";
    run(node, on(shell(change)), Layering::Of(first)).0
}

/// What is seen of that.
const LOOK: &str =
    "stat -c %u:%g /tmp/mine; stat -c %a /; cat /tmp/mine /folder/in; ls /home; [ -e /own ] && echo another; [ -e /bin/seq ] || echo gone;";
const SEEN: &str = "1000:1000\n711\nmine\nin\nnew\ngone\n";

/// One that is over the layer of `base`.
fn over(mut run: Run, base: SandboxId) -> Run {
    (run.layer, run.keeps_layer) = (Layering::Over(base), false);
    run
}

/// Launches it as soon as the layer is free, and leaves it running.
fn start(node: &Node, run: &Run) {
    let answer = launch(node, run);
    assert!(matches!(answer, Answer::Launched(_)), "{answer:?}");
}

/// Runs it to its end over that layer; what it wrote.
fn run_over(node: &Node, run: Run, base: SandboxId) -> String {
    let run = over(run, base);
    let answer = launch(node, &run);
    assert!(matches!(answer, Answer::Launched(_) | Answer::Ended(_)), "{answer:?}");
    let mut client = node.client();
    let ending = wait(&mut client, run.id);
    let (stdout, stderr) = output(&node.log_path(run.id));
    assert_eq!((ending.cause, stderr.as_str()), (Cause::Exited { code: 0 }, ""), "{stdout}");
    forget(node, run.id);
    stdout
}

fn forget(node: &Node, id: SandboxId) {
    assert_eq!(node.client().call(&Request::Forget { id }, &[]).unwrap(), Answer::Done);
}

fn end(node: &Node, id: SandboxId) {
    kill(&mut node.client(), id);
    wait_across(node, id);
    forget(node, id);
}

/// What is told of a file but for its number, which an overlay need not keep.
fn entry(files: &mut Files, path: &str) -> Entry {
    Entry { inode: 0, ..files.stat(path).unwrap() }
}

/// Many over the same, one after the other, each of which changes all that it can; and then the layer itself again.
fn each_begins_from_the_same(node: &Node, below: On, own: On) {
    let base = base(node, below);
    let state = |id| {
        let mut files = files(node, id);
        (files.changes(), entry(&mut files, "/folder/in"))
    };
    let before = state(base);
    let change = "echo own > /own; echo more >> /folder/in; rm /home/new; rm -r /folder; mkdir /folder; \
        busybox mv /tmp/mine /mine; busybox chmod 700 /; echo again > /bin/seq; rm /bin/true; \
        ls /folder; ls /home; stat -c %u:%g /mine; cat /mine /own /bin/seq";
    for _ in 0..3 {
        let seen = run_over(node, own(shell(&format!("{LOOK} {change}"))), base);
        assert_eq!(seen, format!("{SEEN}1000:1000\nmine\nown\nagain\n"));
    }

    assert_eq!(state(base), before);
    assert_eq!(files(node, base).read("/folder/in", Span::ALL).unwrap(), b"in\n");
    // The control: what does that on the layer itself changes it.
    let (last, seen) = run(node, below(shell(&format!("{LOOK} {change}"))), Layering::Of(base));
    assert_eq!(seen, format!("{SEEN}1000:1000\nmine\nown\nagain\n"));
    assert_ne!(files(node, last).changes(), before.0);
    drop_layer(&mut node.client(), last);
}

#[test]
fn what_is_in_memory_over_memory_begins_from_the_same_each_time() {
    each_begins_from_the_same(node(), in_memory, in_memory);
}

#[test]
fn what_is_on_disk_over_memory_begins_from_the_same_each_time() {
    each_begins_from_the_same(node(), in_memory, on_disk);
}

#[test]
fn what_is_in_memory_over_disk_begins_from_the_same_each_time() {
    each_begins_from_the_same(node(), on_disk, in_memory);
}

#[test]
fn what_is_on_disk_over_disk_begins_from_the_same_each_time_and_leaves_nothing() {
    for node in nodes() {
        let folder = node.disks().to_owned();
        each_begins_from_the_same(&node, on_disk, on_disk);
        wait_until_gone(&folder);
    }
}

#[test]
fn a_layer_over_another_has_a_size_of_its_own() {
    let (base, _) = run(node(), shell("dd if=/dev/zero of=/tmp/below bs=1M count=12 2>/dev/null"), Layering::Fresh);
    for on in [in_memory as On, on_disk] {
        let mut own = on(shell("dd if=/dev/zero of=/tmp/own bs=1M count=20 2>/dev/null; stat -c %s /tmp/below /tmp/own"));
        own.supervision.disk_bytes = 8 << 20;

        let seen = run_over(node(), own, base);

        let sizes: Vec<u64> = seen.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(sizes[0], 12 << 20);
        assert!((7 << 20..=8 << 20).contains(&sizes[1]), "{seen}");
    }
    drop_layer(&mut node().client(), base);
}

#[test]
fn a_layer_is_taken_while_another_is_over_it() {
    let (base, _) = run(node(), shell("echo left > /left"), Layering::Fresh);
    let first = over(shell("sleep 60"), base);
    start(node(), &first);
    let mut client = node().client();

    for layer in [Layering::Over(base), Layering::Of(base)] {
        let mut other = shell("true");
        other.layer = layer;
        assert!(is(&other.launch(&mut client), FailureKind::Busy));
    }
    assert!(matches!(Files::open(node(), base).err(), Some(answer) if is(&answer, FailureKind::Busy)));
    assert!(is(&client.call(&Request::DropLayer { id: base }, &[]).unwrap(), FailureKind::Busy));
    let Answer::Layers(kept) = client.call(&Request::Layers, &[]).unwrap() else { panic!("no layers") };
    assert!(kept.contains(&base) && !kept.contains(&first.id));

    end(node(), first.id);
    assert_eq!(run_over(node(), shell("cat /left"), base), "left\n");
    drop_layer(&mut client, base);
    assert!(is(&launch(node(), &over(shell("true"), base)), FailureKind::Gone));
}

#[test]
fn what_cannot_be_over_a_layer_is_refused() {
    let node = Node::start();
    let other_image = "c0".repeat(32);
    assert!(matches!(node.unpack(&other_image, vec![busybox_layer()]), Answer::Unpacked(_)));
    let (base, _) = run(&node, shell("echo left > /left"), Layering::Fresh);
    let bends: [fn(&mut Run); 3] =
        [|run| run.keeps_layer = true, |run| run.isolation = Isolation::Gvisor, |run| run.spec["root"]["path"] = "c0".repeat(32).into()];
    for bend in bends {
        let mut refused = over(shell("true"), base);
        bend(&mut refused);
        let answer = launch(&node, &refused);
        assert!(is(&answer, FailureKind::Refused), "{answer:?}");
    }
    let mut of_its_name = over(shell("true"), base);
    of_its_name.id = base;
    assert!(is(&launch(&node, &of_its_name), FailureKind::Refused));

    // The control.
    assert_eq!(run_over(&node, shell("cat /left"), base), "left\n");
}

#[test]
fn what_has_changed_over_a_layer_is_what_differs_from_it() {
    let base = base(node(), in_memory);
    let change =
        "echo s > /bin/seq; rm /folder/in; echo x > /folder/new; echo again > /home/of-another; echo own > /own; echo ready; exec sleep 60";
    let own = over(shell(change), base);
    start(node(), &own);
    wait_for_text(&node().log_path(own.id), "ready");

    let mut files_of_own = Files::open(node(), own.id).unwrap();
    let (added, changed, deleted) = (ChangeKind::Added, ChangeKind::Changed, ChangeKind::Deleted);
    // What the layer below had removed, or hidden behind a folder of its own, was not there.
    let expected = [
        ("/bin", changed),
        ("/bin/seq", added),
        ("/folder", changed),
        ("/folder/in", deleted),
        ("/folder/new", added),
        ("/home", changed),
        ("/home/of-another", added),
        ("/own", added),
    ];
    assert_eq!(files_of_own.changes(), expected.map(|(path, kind)| (path.to_owned(), kind)));
    files_of_own.write("/put", b"put").unwrap();
    assert_eq!(files_of_own.read("/tmp/mine", Span::ALL).unwrap(), b"mine\n");
    let (ending, stdout, _) = run_exec(node(), &mut node().client(), &script(&own, "cat /put /home/new; echo exec > /folder/new"));
    assert_eq!((ending.cause, stdout.as_str()), (Cause::Exited { code: 0 }, "putnew\n"));
    assert_eq!(files_of_own.read("/folder/new", Span::ALL).unwrap(), b"exec\n");
    drop(files_of_own);
    end(node(), own.id);

    assert!(files(node(), base).stat("/put").is_err());
    assert_eq!(files(node(), base).read("/folder/in", Span::ALL).unwrap(), b"in\n");
    drop_layer(&mut node().client(), base);
}

#[test]
fn a_layer_below_outlives_starts_that_are_stopped_at_once() {
    for below in [in_memory as On, on_disk] {
        for own in [in_memory as On, on_disk] {
            let (base, _) = run(node(), below(shell("echo left > /left")), Layering::Fresh);
            for _ in 0..5 {
                let next = over(own(shell("echo other > /left; sleep 100")), base);
                let answer = launch_and_kill(&next);
                let is_stopped = matches!(&answer, Answer::Ended(ending) if ending.cause == Cause::Killed(KillReason::StoppedByUser));
                assert!(is_stopped, "{answer:?}");
                forget(node(), next.id);
            }

            assert_eq!(run_over(node(), own(shell("cat /left")), base), "left\n");
            assert_eq!(files(node(), base).read("/left", Span::ALL).unwrap(), b"left\n");
            drop_layer(&mut node().client(), base);
        }
    }
}

#[test]
fn a_start_that_fails_leaves_the_layer_below_as_it_is() {
    let (base, _) = run(node(), shell("echo left > /left"), Layering::Fresh);
    let broken = over(crate::harness::command(&["/no/such/program"]), base);

    let answer = launch(node(), &broken);

    assert!(matches!(&answer, Answer::Ended(ending) if matches!(ending.cause, Cause::StartFailed { .. })), "{answer:?}");
    forget(node(), broken.id);
    assert_eq!(run_over(node(), shell("cat /left"), base), "left\n");
    drop_layer(&mut node().client(), base);
}

#[test]
fn a_layer_on_disk_that_cannot_be_made_ready_is_gone_with_whoever_was_to_lie_over_it() {
    for node in nodes() {
        let folder = node.disks().to_owned();
        for own in [in_memory as On, on_disk] {
            let (base, _) = run(&node, on_disk(shell("echo left > /left")), Layering::Fresh);
            spoil_layer(&folder);

            let next = over(own(shell("cat /left")), base);
            let answer = launch(&node, &next);

            let Answer::Ended(ending) = answer else { panic!("{answer:?}") };
            assert!(
                matches!(&ending.cause, Cause::InfraError { message } if message.contains("making the layer below ready failed")),
                "{ending:?}"
            );
            forget(&node, next.id);
            wait_until_gone(&folder);
            assert!(is(&launch(&node, &over(shell("true"), base)), FailureKind::Gone));
        }
        // The control: it was that layer, not the keeper.
        let (base, _) = run(&node, on_disk(shell("echo left > /left")), Layering::Fresh);
        assert_eq!(run_over(&node, on_disk(shell("cat /left")), base), "left\n");
    }
}

#[test]
fn one_over_a_layer_passes_to_the_next_program_and_so_does_the_layer() {
    let node = Node::start();
    for below in [in_memory as On, on_disk] {
        for own in [in_memory as On, on_disk] {
            let (base, _) = run(&node, below(shell("echo left > /left")), Layering::Fresh);
            let mut first = over(own(shell("cat /left; echo mine > /left; exec sleep 60")), base);
            first.supervision.wall_ms = Some(60_000);
            start(&node, &first);
            wait_for_text(&node.log_path(first.id), "left\n");

            upgrade(&node);

            let deadline = Instant::now() + Duration::from_secs(10);
            let mut of_first = Files::open(&node, first.id).unwrap();
            while of_first.read("/left", Span::ALL).unwrap() != b"mine\n" {
                assert!(Instant::now() < deadline, "it does not write");
            }
            drop(of_first);
            assert!(matches!(Files::open(&node, base).err(), Some(answer) if is(&answer, FailureKind::Busy)));
            end(&node, first.id);
            assert_eq!(run_over(&node, own(shell("cat /left")), base), "left\n");
            assert_eq!(run(&node, below(shell("cat /left")), Layering::Of(base)).1, "left\n");
        }
    }
    assert_eq!(node.client().call(&Request::Shutdown, &[]).unwrap(), Answer::Done);
    node.wait_for_exit();
}

#[test]
fn a_keeper_that_is_killed_leaves_nothing_of_either_layer() {
    for node in nodes() {
        let folder = node.disks().to_owned();
        let (base, _) = run(&node, on_disk(shell("echo left > /left")), Layering::Fresh);
        start(&node, &over(on_disk(shell("sleep 100")), base));

        let kept = node.kill();

        // What has names is swept by the next keeper that takes this number.
        let successor = Node::start_with_disks(&folder);
        wait_until_gone(&folder);
        drop((successor, kept));
    }
}

#[test]
fn those_over_a_layer_leave_nothing_behind_and_do_not_wear_it() {
    let node = Node::start();
    let (base, _) = run(&node, shell("echo left > /left"), Layering::Fresh);
    let at_rest = || {
        // As many as it takes for the keeper to have as many sandboxes ready as it ever has.
        (0..30).for_each(|_| drop(shell("true").run_on(&node)));
        Snapshot::at_rest(&node)
    };
    let before = at_rest();

    // More than may write to it.
    for n in 0..70 {
        let own: On = if n % 10 == 0 { on_disk } else { in_memory };
        assert_eq!(run_over(&node, own(shell("cat /left; echo own > /own; echo more >> /left")), base), "left\n");
        if n % 7 == 0 {
            let killed = over(own(shell("sleep 100")), base);
            start(&node, &killed);
            end(&node, killed.id);
        }
    }

    assert_eq!(files(&node, base).read("/left", Span::ALL).unwrap(), b"left\n");
    assert_eq!(at_rest(), before);
    assert_eq!(run(&node, shell("cat /left"), Layering::Of(base)).1, "left\n");
}

#[test]
fn other_limits_hold_for_one_that_is_over_a_layer() {
    for below in [in_memory as On, on_disk] {
        let (base, _) = run(node(), below(shell("echo left > /left")), Layering::Fresh);
        for own in [in_memory as On, on_disk] {
            let mut long = over(own(shell("cat /left; sleep 100")), base);
            long.supervision.wall_ms = Some(60_000);
            start(node(), &long);
            let limits = NewLimits {
                memory_bytes: Some(48 << 20),
                cpu_millis: Some(500),
                pids: Some(16),
                wall_ms: NewTime::Ms(700),
                cpu_ms: NewTime::Same,
                io: Some(IoLimits { bytes_per_s: 4 << 20, ops_per_s: 1000 }),
            };
            let mut client = node().client();
            assert_eq!(client.call(&Request::Update { id: long.id, limits }, &[]).unwrap(), Answer::Done);

            assert_eq!(wait(&mut client, long.id).cause, Cause::WallTimeout);

            forget(node(), long.id);
            assert_eq!(run_over(node(), own(shell("cat /left")), base), "left\n");
        }
        drop_layer(&mut node().client(), base);
    }
}

#[test]
fn whoever_fills_holes_of_the_layer_below_wears_it() {
    let (base, _) = run(node(), shell("busybox truncate -s 1M /holes"), Layering::Fresh);
    for page in 0..64 {
        run_over(node(), shell(&format!("/bin/attack read_hole /holes {page}")), base);
    }

    let mut next = shell("true");
    next.layer = Layering::Of(base);
    let answer = launch(node(), &next);

    assert!(is(&answer, FailureKind::Refused), "{answer:?}");
    // It can still lie below others, and be read.
    assert_eq!(run_over(node(), shell("stat -c %s /holes"), base), "1048576\n");
    assert_eq!(files(node(), base).stat("/holes").unwrap().size, 1 << 20);
    drop_layer(&mut node().client(), base);
}

#[test]
fn from_inside_no_way_leads_to_writing_the_layer_below() {
    let base = base(node(), in_memory);
    let before = entry(&mut files(node(), base), "/folder/in");
    // What the table of mounts names is nowhere to be found, and there is no mount more than in any other sandbox.
    let fresh = shell("cat /proc/self/mountinfo").run().stdout;
    let table = run_over(node(), shell("cat /proc/self/mountinfo"), base);
    assert_eq!(table.lines().count(), fresh.lines().count(), "{table}");
    let names = "for name in merged base upper work; do [ -e /$name ] && echo found $name; done; ls /proc/self/fd;";
    let ways = "for way in /proc/self/fd/* /proc/1/fd/* /proc/1/root /proc/1/cwd /proc/self/cwd/..; do \
        for file in $way/in $way/folder/in $way/upper/folder/in; do (echo bad >> $file) 2>/dev/null && echo wrote $file; done; done;";
    let remount = "for how in rw,remount remount,bind,rw; do mount -o $how / 2>/dev/null && echo remounted; done;";
    // What goes the way of the overlay is a copy, whichever call it is.
    let copies = "busybox ln /folder/in /linked && echo bad >> /linked; busybox chmod 600 /folder/in; touch -d '2001-01-01 00:00:00' /folder/in; \
        echo bad | dd of=/folder/in conv=notrunc 2>/dev/null; busybox truncate -s 0 /folder/in; true";

    let seen = run_over(node(), shell(&format!("{names} {ways} {remount} {copies}")), base);

    assert!(!seen.contains("found") && !seen.contains("remounted"), "{seen}");
    assert!(seen.starts_with("0\n1\n2\n3\n"), "{seen}");
    assert!(!seen.contains("wrote /proc/self/fd") && !seen.contains("wrote /proc/1"), "{seen}");
    let mut of_base = files(node(), base);
    assert_eq!(entry(&mut of_base, "/folder/in"), before);
    assert_eq!(of_base.read("/folder/in", Span::ALL).unwrap(), b"in\n");
    drop(of_base);
    // The control: in a sandbox that has the layer for its own the same calls change it.
    let (last, _) = run(node(), shell(copies), Layering::Of(base));
    assert_ne!(files(node(), last).read("/folder/in", Span::ALL).unwrap(), b"in\n");
    drop_layer(&mut node().client(), last);
}
