//! The compiled program, evaluated for every number on every ABI, against the table it was made from.

use super::*;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const AARCH64: u32 = 0xc000_00b7;
const X32_BIT: u32 = 0x4000_0000;

/// What a kernel would do with `program` (the subset of cBPF that seccomp allows and [`compile`] emits).
fn evaluate(program: &[libc::sock_filter], abi: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend_from_slice(&number.to_le_bytes());
    data.extend_from_slice(&abi.to_le_bytes());
    data.extend_from_slice(&0_u64.to_le_bytes());
    arguments.iter().for_each(|argument| data.extend_from_slice(&argument.to_le_bytes()));
    let (mut at, mut accumulator) = (0_usize, 0_u32);
    loop {
        let i = program[at];
        at += 1;
        let code = u32::from(i.code);
        let offset = i.k as usize;
        match code & 0x07 {
            libc::BPF_LD => accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap()),
            libc::BPF_ALU => accumulator &= i.k,
            libc::BPF_RET => return i.k,
            libc::BPF_JMP => {
                at += match code & 0xf0 {
                    libc::BPF_JA => i.k as usize,
                    libc::BPF_JEQ => usize::from(if accumulator == i.k { i.jt } else { i.jf }),
                    libc::BPF_JGE => usize::from(if accumulator >= i.k { i.jt } else { i.jf }),
                    other => panic!("unknown jump {other:#x}"),
                }
            }
            other => panic!("unknown class {other:#x}"),
        }
    }
}

fn native(number: libc::c_long, arguments: [u64; 6]) -> u32 {
    evaluate(&program(), NATIVE_ABI, u32::try_from(number).unwrap(), arguments)
}

/// An int as a register holds it.
fn argument(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}

const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;
const fn refused(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()
}

#[test]
fn every_number_gets_what_the_table_says() {
    let rules = rules();
    let program = program();
    let highest = rules.iter().flat_map(|rule| &rule.calls).map(|call| call.number).max().unwrap();
    for number in 0..1024 {
        let found = evaluate(&program, NATIVE_ABI, number, [0; 6]);
        let rule = rules.iter().find(|rule| rule.calls.iter().any(|call| call.number == number));
        let expected = match rule.map(|rule| &rule.check) {
            Some(Check::Always(verdict)) => verdict.code(),
            Some(Check::Cases { cases, otherwise }) => {
                let zero_matches = |tests: &[Test]| tests.iter().all(|test| test.value == 0);
                cases.iter().find(|(tests, _)| zero_matches(tests)).map_or(*otherwise, |(_, verdict)| *verdict).code()
            }
            None if number > highest => refused(libc::ENOSYS),
            None => refused(libc::EPERM),
        };
        assert_eq!(found, expected, "system call {number}");
    }
}

#[test]
fn a_call_stands_in_one_rule() {
    let mut seen = std::collections::HashMap::new();
    for rule in rules() {
        for call in rule.calls {
            assert_eq!(seen.insert(call.number, call.name), None, "{} is there twice", call.name);
        }
    }
}

#[test]
fn a_foreign_abi_is_killed_whatever_the_number() {
    let program = program();
    for abi in [I386, X86_64, AARCH64].into_iter().filter(|abi| *abi != NATIVE_ABI) {
        for number in 0..600 {
            assert_eq!(evaluate(&program, abi, number, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS, "{abi:#x} {number}");
        }
    }
}

#[test]
fn x32_numbers_do_not_exist() {
    let program = program();
    for number in 0..600 {
        assert_eq!(evaluate(&program, NATIVE_ABI, number | X32_BIT, [0; 6]), refused(libc::ENOSYS), "{number}");
    }
}

#[test]
fn clone_makes_threads_but_no_namespace() {
    let threads = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_FILES;
    assert_eq!(native(libc::SYS_clone, [argument(threads), 0, 0, 0, 0, 0]), ALLOWED);
    let namespaces = [
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWNS,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWCGROUP,
    ];
    for namespace in namespaces {
        assert_eq!(native(libc::SYS_clone, [argument(namespace | libc::SIGCHLD), 0, 0, 0, 0, 0]), refused(libc::EPERM), "{namespace:#x}");
    }
    assert_eq!(native(libc::SYS_clone3, [0; 6]), refused(libc::ENOSYS));
}

#[test]
fn sockets_are_local_tcp_udp_and_route_only() {
    let socket = |family: i32, kind: i32, protocol: u64| native(libc::SYS_socket, [argument(family), argument(kind), protocol, 0, 0, 0]);
    assert_eq!(socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0), ALLOWED);
    assert_eq!(socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0), ALLOWED);
    assert_eq!(socket(libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0), ALLOWED);
    assert_eq!(socket(libc::AF_NETLINK, libc::SOCK_RAW, 0), ALLOWED);
    for (family, kind, protocol) in [
        (libc::AF_INET, libc::SOCK_RAW, 1),
        (libc::AF_INET6, libc::SOCK_RAW, 58),
        (libc::AF_NETLINK, libc::SOCK_RAW, 12),
        (libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
        (libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        (libc::AF_PACKET, libc::SOCK_RAW, 0),
        (libc::AF_KEY, libc::SOCK_RAW, 2),
        (libc::AF_XDP, libc::SOCK_RAW, 0),
        (libc::AF_BLUETOOTH, libc::SOCK_RAW, 0),
    ] {
        assert_eq!(socket(family, kind, protocol), refused(libc::EAFNOSUPPORT), "family {family}");
    }
}

#[test]
fn no_protocol_but_tcp_and_udp_is_loaded() {
    for (kind, protocol) in
        [(libc::SOCK_STREAM, libc::IPPROTO_SCTP), (libc::SOCK_STREAM, 262), (libc::SOCK_DGRAM, 115), (libc::SOCK_DGRAM, 136)]
    {
        let socket = native(libc::SYS_socket, [argument(libc::AF_INET), argument(kind), argument(protocol), 0, 0, 0]);
        assert_eq!(socket, refused(libc::EAFNOSUPPORT), "protocol {protocol}");
    }
    assert_eq!(native(libc::SYS_socket, [argument(libc::AF_INET6), argument(libc::SOCK_STREAM), 6, 0, 0, 0]), ALLOWED);
}

#[test]
fn the_size_of_a_core_can_be_read_but_not_changed() {
    let core = u64::from(libc::RLIMIT_CORE);
    let prlimit = |resource: u64, new: u64| native(libc::SYS_prlimit64, [0, resource, new, 0x7000, 0, 0]);
    assert_eq!(prlimit(core, 0), ALLOWED);
    let said_to_be_done = refused(0);
    assert_eq!(prlimit(core, 0x7fff_0000_1000), said_to_be_done);
    // A pointer whose low half is zero is a pointer.
    assert_eq!(prlimit(core, 0x1_0000_0000), said_to_be_done);
    assert_eq!(prlimit(u64::from(libc::RLIMIT_NOFILE), 0x7fff_0000_1000), ALLOWED);
}

#[test]
fn nobody_else_is_kept_off_a_core() {
    assert_eq!(native(libc::SYS_prctl, [argument(libc::PR_SET_NAME), 0x1000, 0, 0, 0, 0]), ALLOWED);
    assert_eq!(native(libc::SYS_prctl, [argument(libc::PR_SCHED_CORE), 1, 0, 0, 0, 0]), refused(libc::EPERM));
}

#[test]
fn the_hosts_huge_pages_are_out_of_reach() {
    let flags = |flags: i32| native(libc::SYS_mmap, [0, 4096, 3, argument(flags), u64::MAX, 0]);
    assert_eq!(flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS), ALLOWED);
    assert_eq!(flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB), refused(libc::ENOMEM));
}

#[test]
fn an_argument_is_compared_as_the_kernel_reads_it() {
    // The kernel takes an int: high bits of the register change nothing for it, so they must not for the filter.
    let high = 0xdead_beef_0000_0000_u64;
    assert_eq!(native(libc::SYS_ioctl, [0, high | 0x5412, 0, 0, 0, 0]), refused(libc::EPERM));
    assert_eq!(native(libc::SYS_socket, [high | argument(libc::AF_ALG), 5, 0, 0, 0, 0]), refused(libc::EAFNOSUPPORT));
}

#[test]
fn the_program_fits_the_kernels_bound() {
    let len = program().len();
    assert!(len < 1024, "{len} instructions");
}
