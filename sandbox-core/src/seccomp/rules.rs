//! The allow-list: every system call that a payload may make, with the reason beside it.
//!
//! Stricter than the Docker default profile. What is absent is refused. Notably absent, and why:
//! mount, umount2, fsopen … mount_setattr, statmount, listmount, pivot_root, chroot (the tree is ours); unshare, setns (new user
//! namespaces are the door to most kernel escalations, CVE-2022-0492 among them); bpf, perf_event_open, io_uring_* (creates sockets past this
//! filter), userfaultfd, vmsplice (kernel attack surface); add_key, keyctl, request_key (keyrings are not namespaced); ptrace, process_vm_*, kcmp,
//! pidfd_getfd, process_madvise (other processes' memory); open_by_handle_at, name_to_handle_at (past the mount tree); fanotify_*,
//! quotactl, syslog, acct, swap*, reboot, kexec_*, *_module, iopl, ioperm, settimeofday, clock_settime, adjtimex (the host's); mincore, cachestat
//! (page-cache side channel across sandboxes that share a layer); mbind, set_mempolicy, move_pages (NUMA of the host);
//! modify_ldt, uselib, remap_file_pages, sysfs, ustat, lookup_dcookie, nfsservctl, memfd_secret, process_mrelease (old or needless).

use super::Verdict;

/// A system call by name and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    pub name: &'static str,
    pub number: u32,
}

/// Calls that are decided alike, and why.
#[derive(Debug, Clone)]
pub struct Rule {
    pub calls: Vec<Call>,
    pub check: Check,
    pub reason: &'static str,
}

/// How a call is decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    Always(Verdict),
    /// The first case whose tests all hold decides.
    Cases {
        cases: Vec<(Vec<Test>, Verdict)>,
        otherwise: Verdict,
    },
}

impl Check {
    pub(super) const fn is_plain(&self) -> bool {
        matches!(self, Self::Always(_))
    }
}

/// One half of an argument, masked, is equal to a value. What is an `int` to the kernel is tested by its low half alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Test {
    pub argument: u8,
    /// Which half of the argument.
    pub half: Half,
    pub mask: u32,
    pub value: u32,
}

/// Half of a 64-bit argument, as BPF loads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    Low,
    High,
}

const fn is(argument: u8, value: u32) -> Test {
    Test { argument, half: Half::Low, mask: u32::MAX, value }
}

const fn has_none_of(argument: u8, bits: u32) -> Test {
    Test { argument, half: Half::Low, mask: bits, value: 0 }
}

/// Together with [`is`] of 0: a null pointer.
const fn has_no_high_half(argument: u8) -> Test {
    Test { argument, half: Half::High, mask: u32::MAX, value: 0 }
}

macro_rules! calls {
    ($($name:ident)*) => { paste_calls(&[$((stringify!($name), libc::$name)),*]) };
}

fn paste_calls(calls: &[(&'static str, libc::c_long)]) -> Vec<Call> {
    let call = |&(name, number): &(&'static str, libc::c_long)| Call {
        name: name.strip_prefix("SYS_").unwrap_or(name),
        number: u32::try_from(number).expect("system call numbers are small and positive"),
    };
    calls.iter().map(call).collect()
}

/// All rules. A call stands in exactly one.
pub fn rules() -> Vec<Rule> {
    let mut rules = plain();
    rules.extend(with_conditions());
    rules
}

fn plain() -> Vec<Rule> {
    let allow = |reason, calls| Rule { calls, check: Check::Always(Verdict::Allow), reason };
    vec![
        allow(
            "files by descriptor: what may be opened is decided by the mount tree, ids and modes",
            calls!(SYS_read SYS_write SYS_pread64 SYS_pwrite64 SYS_readv SYS_writev SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2 SYS_close
                SYS_close_range SYS_lseek SYS_dup SYS_dup3 SYS_fcntl SYS_flock SYS_ftruncate SYS_fallocate SYS_fadvise64 SYS_readahead
                SYS_fsync SYS_fdatasync SYS_sync_file_range SYS_syncfs SYS_sendfile SYS_splice SYS_tee SYS_copy_file_range SYS_fstat SYS_fstatfs
                SYS_fchmod SYS_fchown SYS_fchdir SYS_getdents64 SYS_fsetxattr SYS_fgetxattr SYS_flistxattr SYS_fremovexattr),
        ),
        allow(
            "files by path, inside the sandbox's own tree",
            calls!(SYS_openat SYS_openat2 SYS_newfstatat SYS_statx SYS_statfs SYS_truncate SYS_mkdirat SYS_mknodat SYS_unlinkat SYS_renameat SYS_renameat2
                SYS_linkat SYS_symlinkat SYS_readlinkat SYS_fchmodat SYS_fchmodat2 SYS_fchownat SYS_faccessat SYS_faccessat2 SYS_utimensat
                SYS_chdir SYS_getcwd SYS_umask SYS_setxattr SYS_lsetxattr SYS_getxattr SYS_lgetxattr SYS_listxattr SYS_llistxattr SYS_removexattr
                SYS_lremovexattr),
        ),
        allow(
            "memory of its own, counted by the memory limit",
            calls!(SYS_munmap SYS_mprotect SYS_mremap SYS_madvise SYS_msync SYS_brk SYS_mlock SYS_mlock2 SYS_munlock SYS_mlockall
                SYS_munlockall SYS_membarrier SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_mseal),
        ),
        allow(
            "processes of its own pid namespace, counted by the pids limit",
            calls!(SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_getpid SYS_getppid SYS_gettid SYS_getpgid SYS_setpgid
                SYS_getsid SYS_setsid SYS_set_tid_address SYS_set_robust_list SYS_get_robust_list SYS_rseq SYS_futex SYS_futex_waitv SYS_pidfd_open
                SYS_pidfd_send_signal SYS_getrusage SYS_times SYS_getpriority SYS_setpriority SYS_getrlimit
                SYS_restart_syscall SYS_capget SYS_capset),
        ),
        allow(
            "scheduling of its own processes; real-time classes need a capability that nobody has",
            calls!(SYS_sched_yield SYS_sched_getaffinity SYS_sched_setaffinity SYS_sched_getparam SYS_sched_setparam SYS_sched_getscheduler
                SYS_sched_setscheduler SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_rr_get_interval SYS_sched_getattr
                SYS_sched_setattr SYS_ioprio_get SYS_ioprio_set SYS_getcpu),
        ),
        allow(
            "signals, inside its pid namespace",
            calls!(SYS_kill SYS_tkill SYS_tgkill SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigpending SYS_rt_sigqueueinfo SYS_rt_tgsigqueueinfo
                SYS_rt_sigreturn SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_sigaltstack SYS_signalfd4),
        ),
        allow(
            "time: reading and waiting; setting clocks is absent",
            calls!(SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday SYS_getitimer SYS_setitimer SYS_timer_create
                SYS_timer_settime SYS_timer_gettime SYS_timer_getoverrun SYS_timer_delete SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime),
        ),
        allow(
            "waiting for descriptors",
            calls!(SYS_ppoll SYS_pselect6 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2 SYS_pipe2 SYS_inotify_init1
                SYS_inotify_add_watch SYS_inotify_rm_watch ),
        ),
        allow(
            "ids: changing them needs capabilities that the payload has not; init uses these to become its user",
            calls!(SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups SYS_setuid SYS_setgid SYS_setreuid SYS_setregid
                SYS_setresuid SYS_setresgid SYS_setgroups SYS_setfsuid SYS_setfsgid),
        ),
        allow(
            "sockets once made; which can be made is decided below",
            calls!(SYS_bind SYS_listen SYS_accept SYS_accept4 SYS_connect SYS_shutdown SYS_sendto SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg
                SYS_recvmmsg SYS_getsockname SYS_getpeername SYS_setsockopt SYS_getsockopt),
        ),
        allow(
            "System V and POSIX IPC of its own ipc namespace",
            calls!(SYS_shmget SYS_shmat SYS_shmdt SYS_shmctl SYS_semget SYS_semop SYS_semtimedop SYS_semctl SYS_msgget SYS_msgsnd SYS_msgrcv
                SYS_msgctl SYS_mq_open SYS_mq_unlink SYS_mq_timedsend SYS_mq_timedreceive SYS_mq_notify SYS_mq_getsetattr),
        ),
        allow("facts: names and numbers without secrets; random numbers", calls!(SYS_uname SYS_sysinfo SYS_getrandom)),
        allow("a program may fence itself further", calls!(SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self)),
        #[cfg(target_arch = "x86_64")]
        allow(
            "older forms of the calls above",
            calls!(SYS_open SYS_creat SYS_stat SYS_lstat SYS_access SYS_mkdir SYS_rmdir SYS_mknod SYS_unlink SYS_rename SYS_link SYS_symlink SYS_readlink
                SYS_chmod SYS_chown SYS_lchown SYS_utime SYS_utimes SYS_futimesat SYS_getdents SYS_dup2 SYS_pipe SYS_poll SYS_select SYS_epoll_create
                SYS_epoll_wait SYS_eventfd SYS_signalfd SYS_inotify_init SYS_alarm SYS_pause SYS_fork SYS_vfork SYS_getpgrp SYS_time SYS_arch_prctl),
        ),
    ]
}

fn with_conditions() -> Vec<Rule> {
    let eperm = Verdict::Errno(libc::EPERM);
    let done = Verdict::Errno(0);
    let cases = |cases: &[(&[Test], Verdict)], otherwise| Check::Cases {
        cases: cases.iter().map(|(tests, verdict)| (tests.to_vec(), *verdict)).collect(),
        otherwise,
    };
    let unsigned = |value: libc::c_int| value.cast_unsigned();
    let namespaces = unsigned(
        libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET,
    );
    const SOCK_TYPE: u32 = 0xf;
    let type_is = |value: libc::c_int| Test { argument: 1, half: Half::Low, mask: SOCK_TYPE, value: unsigned(value) };
    let internet =
        |family: libc::c_int, kind: libc::c_int, protocol: libc::c_int| [is(0, unsigned(family)), type_is(kind), is(2, unsigned(protocol))];
    let core = libc::RLIMIT_CORE;
    vec![
        Rule {
            calls: calls!(SYS_mmap),
            check: cases(&[(&[has_none_of(3, unsigned(libc::MAP_HUGETLB))], Verdict::Allow)], Verdict::Errno(libc::ENOMEM)),
            reason: "memory of its own; the host's pool of huge pages is not counted by the memory limit",
        },
        Rule {
            calls: calls!(SYS_memfd_create),
            check: cases(&[(&[has_none_of(1, libc::MFD_HUGETLB)], Verdict::Allow)], Verdict::Errno(libc::ENOMEM)),
            reason: "files in memory, counted by the memory limit, which huge pages are not",
        },
        Rule {
            calls: calls!(SYS_prlimit64),
            check: cases(&[(&[is(1, core), is(2, 0), has_no_high_half(2)], Verdict::Allow), (&[is(1, core)], done)], Verdict::Allow),
            reason: "limits of its own; the size of a core stays 1, at which the kernel starts no core_pattern helper on the host (core(5)). Programs that must \
                     have none, such as gpg-agent, take an error for a reason to stop, so it says done",
        },
        Rule { calls: calls!(SYS_setrlimit), check: cases(&[(&[is(0, core)], done)], Verdict::Allow), reason: "as prlimit64" },
        Rule {
            calls: calls!(SYS_io_setup SYS_io_destroy SYS_io_submit SYS_io_cancel SYS_io_getevents),
            check: Check::Always(Verdict::Errno(libc::ENOSYS)),
            reason: "the host has one number of asynchronous requests for all (fs.aio-max-nr), which one sandbox could take; programs fall back",
        },
        Rule {
            calls: calls!(SYS_clone),
            check: cases(&[(&[has_none_of(0, namespaces)], Verdict::Allow)], eperm),
            reason: "threads and processes, but no new namespaces",
        },
        Rule {
            calls: calls!(SYS_clone3),
            check: Check::Always(Verdict::Errno(libc::ENOSYS)),
            reason: "its flags are behind a pointer, which a filter cannot read; libc falls back to clone",
        },
        Rule {
            calls: calls!(SYS_socket),
            check: cases(
                &[
                    (&[is(0, unsigned(libc::AF_UNIX))], Verdict::Allow),
                    (&internet(libc::AF_INET, libc::SOCK_STREAM, 0), Verdict::Allow),
                    (&internet(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP), Verdict::Allow),
                    (&internet(libc::AF_INET, libc::SOCK_DGRAM, 0), Verdict::Allow),
                    (&internet(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP), Verdict::Allow),
                    (&internet(libc::AF_INET6, libc::SOCK_STREAM, 0), Verdict::Allow),
                    (&internet(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP), Verdict::Allow),
                    (&internet(libc::AF_INET6, libc::SOCK_DGRAM, 0), Verdict::Allow),
                    (&internet(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP), Verdict::Allow),
                    (&[is(0, unsigned(libc::AF_NETLINK)), is(2, unsigned(libc::NETLINK_ROUTE))], Verdict::Allow),
                ],
                Verdict::Errno(libc::EAFNOSUPPORT),
            ),
            reason: "local, TCP and UDP sockets, and the list of interfaces; not SCTP, L2TP and whatever else loads a module, AF_ALG (CVE-2026-31431), AF_VSOCK (reaches the hypervisor, not namespaced), \
                     AF_PACKET, raw sockets",
        },
        Rule {
            calls: calls!(SYS_socketpair),
            check: cases(&[(&[is(0, unsigned(libc::AF_UNIX))], Verdict::Allow)], Verdict::Errno(libc::EAFNOSUPPORT)),
            reason: "the one family that has pairs and is allowed",
        },
        Rule {
            calls: calls!(SYS_ioctl),
            check: cases(
                &[
                    (&[is(1, 0x5412)], eperm), // TIOCSTI: types into the terminal of whoever shares it
                    (&[is(1, 0x541c)], eperm), // TIOCLINUX: the same through the console's selection
                ],
                Verdict::Allow,
            ),
            reason: "devices are the sandbox's own six and its terminals; two terminal controls reach out of it (ioctl_tty(2))",
        },
        Rule {
            calls: calls!(SYS_prctl),
            check: cases(&[(&[is(0, unsigned(libc::PR_SCHED_CORE))], eperm)], Verdict::Allow),
            reason: "names, death signals and fences of its own; but not cores whose siblings then stand idle for everybody else (core-scheduling)",
        },
        Rule {
            calls: calls!(SYS_personality),
            check: cases(&[(&[is(0, 0)], Verdict::Allow), (&[is(0, u32::MAX)], Verdict::Allow)], eperm),
            reason: "reading it, and the ordinary one; others switch off address randomisation and other defences",
        },
        Rule {
            calls: calls!(SYS_seccomp),
            check: cases(
                // SECCOMP_FILTER_FLAG_NEW_LISTENER
                &[(&[has_none_of(1, 1 << 3)], Verdict::Allow)],
                eperm,
            ),
            reason: "a program may fence itself further; a listener would decide for others",
        },
        Rule {
            calls: calls!(SYS_sync),
            check: Check::Always(Verdict::Errno(0)),
            reason: "says done and does nothing: the sandbox's files are gone with it, and a real one flushes the whole host's disks",
        },
    ]
}
