//! How fast a sandbox may use the node's disks, and what it is told to have used.

use sandbox_core::protocol::{Cause, IoLimits, Medium};

use crate::{
    disk::nodes,
    harness::{Done, Run, shell},
};

const MIB: u64 = 1 << 20;

/// A script on a layer on disk that may write and read `bytes_per_s`.
fn at_rate(script: &str, bytes_per_s: u64) -> Run {
    let mut run = shell(script);
    run.supervision.medium = Medium::Disk;
    run.supervision.disk_bytes = 64 * MIB;
    run.supervision.wall_ms = Some(60_000);
    run.supervision.io = IoLimits { bytes_per_s, ..IoLimits::MAX };
    run
}

fn ended(done: &Done) {
    assert_eq!(done.ending.cause, Cause::Exited { code: 0 }, "{done:?}");
}

/// The rate at which bytes reached the disk, in bytes a second.
fn rate(done: &Done) -> u64 {
    done.ending.usage.io_written_bytes * 1_000_000 / done.ending.usage.wall_us
}

#[test]
fn direct_writes_are_held_to_their_rate_and_counted() {
    let script = "dd if=/dev/zero of=/fill bs=64k count=96 oflag=direct 2>/dev/null";
    for node in nodes() {
        let slow = at_rate(script, 3 * MIB).run_on(&node);
        ended(&slow);
        // Six MiB at three in a second; the kernel lets a tenth of a second's worth pass at once.
        assert!(slow.ending.usage.wall_us > 1_700_000, "{slow:?}");
        let written = slow.ending.usage.io_written_bytes;
        assert!((6 * MIB..=7 * MIB).contains(&written), "{written}");
        assert!(slow.ending.usage.io_writes >= 12, "{slow:?}");
        let control = at_rate(script, IoLimits::MAX.bytes_per_s).run_on(&node);
        ended(&control);
        assert!(control.ending.usage.wall_us * 3 < slow.ending.usage.wall_us, "{control:?}");
    }
}

#[test]
fn direct_reads_are_held_to_their_rate_and_counted() {
    let script =
        "dd if=/dev/zero of=/fill bs=64k count=32 oflag=direct 2>/dev/null; dd if=/fill of=/dev/null bs=64k iflag=direct 2>/dev/null";
    let slow = at_rate(script, MIB).run();
    ended(&slow);
    assert!(slow.ending.usage.wall_us > 3_400_000, "{slow:?}");
    let read = slow.ending.usage.io_read_bytes;
    assert!((2 * MIB..=4 * MIB).contains(&read), "{read}");
    assert!(slow.ending.usage.io_reads >= 2);
}

#[test]
fn buffered_writes_are_held_to_their_rate() {
    let script = "dd if=/dev/zero of=/fill bs=64k count=768 2>/dev/null";
    for node in nodes() {
        let slow = at_rate(script, 12 * MIB).run_on(&node);
        ended(&slow);
        // Part of it may still be in memory when the writer ends, but no more than the kernel lets a group of this size hold back.
        assert!(slow.ending.usage.wall_us > 1_500_000, "{slow:?}");
        assert!(rate(&slow) < 14 * MIB, "{slow:?}");
        let control = at_rate(script, IoLimits::MAX.bytes_per_s).run_on(&node);
        ended(&control);
        assert!(control.ending.usage.wall_us * 2 < slow.ending.usage.wall_us, "{control:?}");
    }
}

#[test]
fn operations_are_held_to_their_rate() {
    let mut run = at_rate("dd if=/dev/zero of=/fill bs=4k count=100 oflag=direct 2>/dev/null", IoLimits::MAX.bytes_per_s);
    run.supervision.io.ops_per_s = 50;
    let slow = run.run();
    ended(&slow);
    assert!(slow.ending.usage.wall_us > 1_500_000, "{slow:?}");
}

#[test]
fn a_layer_in_memory_uses_no_disk() {
    let done = shell("dd if=/dev/zero of=/fill bs=1M count=8 2>/dev/null; cat /fill > /dev/null").run();
    ended(&done);
    assert_eq!(done.ending.usage.io_written_bytes, 0, "{done:?}");
}

#[test]
fn a_rate_that_nobody_can_hold_is_refused() {
    for io in [IoLimits { bytes_per_s: 0, ..IoLimits::MAX }, IoLimits { ops_per_s: 1 << 40, ..IoLimits::MAX }] {
        let mut run = shell("true");
        run.supervision.io = io;
        let answer = run.launch(&mut crate::harness::node().client());
        let sandbox_core::protocol::Answer::Failed(failure) = answer else { panic!("{answer:?}") };
        assert_eq!(failure.kind, sandbox_core::protocol::FailureKind::Refused);
    }
}
