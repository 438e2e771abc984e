//! The verdict, for every kind of evidence.

use super::*;
use crate::{
    keeper::output::Sink,
    protocol::{IoLimits, Medium, OutputPolicy, Start},
};

fn sandbox(decision: Option<Decision>) -> Sandbox {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap().0;
    let sink = Sink::Memory { stdout: Vec::new(), stderr: Vec::new() };
    Sandbox {
        purpose: Purpose::Payload { id: SandboxId(uuid::Uuid::nil()) },
        image: None,
        supervision: Supervision {
            wall_ms: Some(1000),
            cpu_ms: Some(500),
            output_bytes: 10,
            output_policy: OutputPolicy::Truncate,
            medium: Medium::Memory,
            disk_bytes: 1,
            inodes: 1,
            io: IoLimits::MAX,
        },
        received_at_ns: 0,
        start: Start::Cold,
        fences: Fences::everywhere(),
        processes: None,
        output: Output::new(sink, 10, OutputPolicy::Truncate, Some((pipe(), pipe()))),
        own_refusals: 0,
        decision,
        stopping: None,
        paused: Paused::No,
        pausers: Vec::new(),
        lowering: None,
        input: None,
        killed_at_ns: None,
        dead_at_ns: None,
        cpu_look: (0, 0),
        cpu_look_at_ns: 0,
        oom_looks: 0,
        launched: Some(Launched { started_at_us: 1, launch_us: 1, start: Start::Cold, fences: Fences::everywhere() }),
        started_at_ns: Some(1_000_000),
        init_cpu_us: 300,
        ending: None,
        tell_by_ns: 0,
        is_told: false,
        launch_asker: None,
        waiters: Vec::new(),
        pending: None,
        volumes: Vec::new(),
        are_volumes_given: false,
        body: None,
    }
}

const KILLED: WaitStatus = WaitStatus::Signaled { signal: libc::SIGKILL };

fn judged(sandbox: &Sandbox, status: WaitStatus, wall_ms: u64, counters: Counters) -> Ending {
    let at_ns = 1_000_000 + wall_ms * 1_000_000;
    let ended = Ended { status, at_ns, own_cpu_us: 0, is_disk_full: false, are_inodes_used_up: false };
    sandbox.judge(Evidence { ended: Some(ended), counters, now_ns: at_ns, now_us: at_ns / 1000, failure: None })
}

#[test]
fn an_exit_is_an_exit_and_inits_own_time_is_not_the_payloads() {
    let counters = Counters { cpu_us: 1300, pids_peak: 3, ..Counters::default() };
    let ending = judged(&sandbox(None), WaitStatus::Exited { code: 3 }, 20, counters);
    assert_eq!(ending.cause, Cause::Exited { code: 3 });
    assert_eq!((ending.usage.cpu_us, ending.usage.pids_peak, ending.usage.wall_us), (1000, 2, 20_000));
    assert_eq!(ending.limits_hit, []);
}

#[test]
fn a_sigkill_that_nobody_here_sent_is_the_payloads_own() {
    let ending = judged(&sandbox(None), KILLED, 20, Counters::default());
    assert_eq!(ending.cause, Cause::Signaled { signal: libc::SIGKILL });
}

#[test]
fn memory_comes_from_the_kernels_counter_even_behind_an_exit_of_zero() {
    let counters = Counters { oom_kills: 1, is_at_memory_limit: true, ..Counters::default() };
    let ending = judged(&sandbox(None), WaitStatus::Exited { code: 0 }, 20, counters);
    assert_eq!((ending.cause, ending.limits_hit), (Cause::OomKilled, vec![Limit::Memory]));
}

#[test]
fn a_kill_far_below_the_limit_is_the_machines_want_of_memory_and_not_the_payloads() {
    let counters = Counters { oom_kills: 1, ..Counters::default() };
    let ending = judged(&sandbox(None), KILLED, 20, counters);
    assert!(matches!(ending.cause, Cause::InfraError { .. }), "{:?}", ending.cause);
    assert_eq!(ending.limits_hit, []);
}

#[test]
fn a_payload_that_ended_before_the_kill_came_ended_by_itself() {
    let decided = sandbox(Some(Decision::Killed(KillReason::StoppedByUser)));
    assert_eq!(judged(&decided, WaitStatus::Exited { code: 0 }, 20, Counters::default()).cause, Cause::Exited { code: 0 });
    assert_eq!(judged(&decided, KILLED, 20, Counters::default()).cause, Cause::Killed(KillReason::StoppedByUser));
}

#[test]
fn a_log_that_could_not_be_written_hides_no_end_that_is_known() {
    let decided = sandbox(Some(Decision::LogFailed(libc::EIO)));
    assert_eq!(judged(&decided, WaitStatus::Exited { code: 3 }, 20, Counters::default()).cause, Cause::Exited { code: 3 });
    let killed = judged(&decided, KILLED, 20, Counters::default()).cause;
    assert!(matches!(&killed, Cause::InfraError { message } if message.contains("log")), "{killed:?}");
}

#[test]
fn a_limit_that_was_exceeded_is_told_even_if_the_payload_was_faster_than_the_kill() {
    let ending = judged(&sandbox(None), WaitStatus::Exited { code: 0 }, 1001, Counters::default());
    assert_eq!((ending.cause, ending.limits_hit), (Cause::WallTimeout, vec![Limit::Wall]));
    let counters = Counters { cpu_us: 500_301, ..Counters::default() };
    assert_eq!(judged(&sandbox(None), WaitStatus::Exited { code: 0 }, 20, counters).cause, Cause::CpuTimeout);
}

#[test]
fn a_limit_met_exactly_is_not_exceeded() {
    let counters = Counters { cpu_us: 500_300, ..Counters::default() };
    let ending = judged(&sandbox(None), WaitStatus::Exited { code: 0 }, 1000, counters);
    assert_eq!((ending.cause, ending.limits_hit), (Cause::Exited { code: 0 }, vec![]));
}

#[test]
fn a_refused_fork_is_told_without_ending_anything() {
    let counters = Counters { pids_refused: 9, ..Counters::default() };
    let ending = judged(&sandbox(None), WaitStatus::Exited { code: 0 }, 20, counters);
    assert_eq!((ending.cause, ending.limits_hit), (Cause::Exited { code: 0 }, vec![Limit::Pids]));
}

#[test]
fn an_end_that_init_noticed_late_is_not_charged_to_the_payload() {
    let mut sandbox = sandbox(None);
    sandbox.dead_at_ns = Some(1_000_000 + 950_000_000);
    let ending = judged(&sandbox, WaitStatus::Exited { code: 0 }, 1010, Counters::default());
    assert_eq!((ending.cause, ending.usage.wall_us), (Cause::Exited { code: 0 }, 950_000));
}

#[test]
fn an_init_that_vanished_is_our_failure_and_not_the_payloads() {
    let lost = sandbox(None).judge(Evidence { ended: None, counters: Counters::default(), now_ns: 5, now_us: 5, failure: None });
    assert!(matches!(lost.cause, Cause::InfraError { .. }), "{:?}", lost.cause);
}
