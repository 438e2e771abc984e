//! The system calls that a payload may make: data in [`rules()`], compiled here to one small cBPF program.
//!
//! The program checks the ABI, then finds the call's number in a balanced tree of number ranges, then — for the few calls whose
//! arguments matter — checks those (seccomp(2)). Everything that is not allowed fails with an error number; only a call through a
//! foreign ABI kills, because no honest program of this architecture makes one.

mod rules;

use std::ops::RangeInclusive;

pub use rules::{Call, Check, Half, Rule, Test, rules};

/// What the filter decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    /// The call returns this error number, or 0 for "done" without doing it.
    Errno(i32),
    Kill,
}

impl Verdict {
    fn code(self) -> u32 {
        match self {
            Self::Allow => libc::SECCOMP_RET_ALLOW,
            Self::Errno(errno) => libc::SECCOMP_RET_ERRNO | errno.cast_unsigned() & libc::SECCOMP_RET_DATA,
            Self::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

/// `AUDIT_ARCH_*` of the ABI that this program was built for (linux/audit.h).
#[cfg(target_arch = "x86_64")]
pub const NATIVE_ABI: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
pub const NATIVE_ABI: u32 = 0xc000_00b7;

/// Offsets in `struct seccomp_data` (seccomp(2)).
const AT_NUMBER: u32 = 0;
const AT_ABI: u32 = 4;
const AT_ARGUMENTS: u32 = 16;

/// The program for [`rules()`]. Numbers that the table does not name get `EPERM` where the table knows the neighbourhood, and `ENOSYS`
/// above its highest number, so that a libc newer than this table falls back instead of failing.
pub fn program() -> Vec<libc::sock_filter> {
    compile(&rules())
}

/// One contiguous range of numbers with one check.
#[derive(Debug, Clone)]
struct Segment {
    numbers: RangeInclusive<u32>,
    check: Check,
}

fn compile(rules: &[Rule]) -> Vec<libc::sock_filter> {
    let mut program = vec![load(AT_ABI), jump(libc::BPF_JEQ, NATIVE_ABI, 1, 0), ret(Verdict::Kill), load(AT_NUMBER)];
    program.extend(tree(&segments(rules)));
    program
}

/// The whole number space, cut into ranges, lowest first.
fn segments(rules: &[Rule]) -> Vec<Segment> {
    let mut calls: Vec<(u32, Check)> =
        rules.iter().flat_map(|rule| rule.calls.iter().map(|call| (call.number, rule.check.clone()))).collect();
    calls.sort_by_key(|(number, _)| *number);
    let mut segments: Vec<Segment> = Vec::new();
    let mut next = 0;
    let mut push = |numbers: RangeInclusive<u32>, check: Check| match segments.last_mut() {
        Some(last) if last.check == check && last.check.is_plain() => last.numbers = *last.numbers.start()..=*numbers.end(),
        _ => segments.push(Segment { numbers, check }),
    };
    for (number, check) in calls {
        if number > next {
            push(next..=number - 1, Check::Always(Verdict::Errno(libc::EPERM)));
        }
        push(number..=number, check);
        next = number + 1;
    }
    push(next..=u32::MAX, Check::Always(Verdict::Errno(libc::ENOSYS)));
    segments
}

/// Code that decides for the number in the accumulator.
fn tree(segments: &[Segment]) -> Vec<libc::sock_filter> {
    let [segment] = segments else {
        let (low, high) = segments.split_at(segments.len() / 2);
        let pivot = *high[0].numbers.start();
        let (low, high) = (tree(low), tree(high));
        // A conditional jump reaches 255 instructions; an unconditional one reaches any.
        let mut code = match u8::try_from(low.len()) {
            Ok(distance) => vec![jump(libc::BPF_JGE, pivot, distance, 0)],
            Err(_) => {
                let distance = u32::try_from(low.len()).expect("a program has at most 4096 instructions");
                vec![jump(libc::BPF_JGE, pivot, 0, 1), instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, distance)]
            }
        };
        code.extend(low);
        code.extend(high);
        return code;
    };
    leaf(&segment.check)
}

/// Code for one check: each case that matches decides, the last line decides for the rest.
fn leaf(check: &Check) -> Vec<libc::sock_filter> {
    match check {
        Check::Always(verdict) => vec![ret(*verdict)],
        Check::Cases { cases, otherwise } => {
            let mut code = Vec::new();
            for (tests, verdict) in cases {
                // Every test that fails skips what is left of this case: 2 or 3 instructions a test, and the verdict.
                let lengths: Vec<usize> = tests.iter().map(|test| if test.mask == u32::MAX { 2 } else { 3 }).collect();
                for (i, test) in tests.iter().enumerate() {
                    let half = if test.half == Half::High { 4 } else { 0 };
                    code.push(load(AT_ARGUMENTS + 8 * u32::from(test.argument) + half));
                    if test.mask != u32::MAX {
                        code.push(instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, test.mask));
                    }
                    let rest: usize = lengths[i + 1..].iter().sum::<usize>() + 1;
                    code.push(jump(libc::BPF_JEQ, test.value, 0, u8::try_from(rest).expect("a case has a handful of tests")));
                }
                code.push(ret(*verdict));
            }
            code.push(ret(*otherwise));
            code
        }
    }
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn jump(condition: u32, value: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | condition | libc::BPF_K, if_true, if_false, value)
}

fn ret(verdict: Verdict) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, verdict.code())
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).expect("BPF opcodes have 16 bits"), jt, jf, k }
}

#[cfg(test)]
mod tests;
