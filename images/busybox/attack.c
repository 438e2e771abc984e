// attack NAME: tries one thing that a sandbox must not be able to do, prints `done` or the error's name, and exits 0 if it was done.
// Run outside as root it succeeds, which proves that inside it is the sandbox that stops it.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static long try_unshare_user(void) { return unshare(CLONE_NEWUSER); }
static long try_unshare_mount(void) { return unshare(CLONE_NEWNS); }
static long try_unshare_net(void) { return unshare(CLONE_NEWNET); }

// A process of its own, because it would otherwise change the namespaces of what follows.
static long try_mount_tmpfs(void) {
    if (unshare(CLONE_NEWNS) == 0) mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL);
    return mount("none", "/tmp", "tmpfs", 0, NULL);
}

static long try_clone_user(void) {
    long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) _exit(0);
    return pid;
}

static long try_clone3_user(void) {
    struct { unsigned long long v[11]; } args = {{CLONE_NEWUSER, 0, 0, 0, SIGCHLD}};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) _exit(0);
    return pid;
}

static long try_open_tree(void) { return syscall(SYS_open_tree, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */); }
static long try_fsopen(void) { return syscall(SYS_fsopen, "tmpfs", 0); }
static long try_make_device(void) { long rc = mknod("/tmp/attack-device", S_IFCHR | 0600, makedev(1, 3)); int error = errno; unlink("/tmp/attack-device"); errno = error; return rc; }
static long try_chroot(void) { return chroot("/tmp"); }
static long try_sethostname(void) { char n[65] = ""; gethostname(n, 64); return sethostname(n, strlen(n)); }
static long try_set_clock(void) { struct timeval t; gettimeofday(&t, NULL); return settimeofday(&t, NULL); }
static long try_nice_up(void) { return setpriority(PRIO_PROCESS, 0, -5); }

static long try_load_bpf(void) {
    union bpf_attr a;
    memset(&a, 0, sizeof a);
    a.map_type = BPF_MAP_TYPE_ARRAY, a.key_size = 4, a.value_size = 4, a.max_entries = 1;
    return syscall(SYS_bpf, BPF_MAP_CREATE, &a, sizeof a);
}

static long try_perf(void) {
    struct perf_event_attr a;
    memset(&a, 0, sizeof a);
    a.size = sizeof a, a.type = PERF_TYPE_SOFTWARE, a.config = PERF_COUNT_SW_CPU_CLOCK;
    return syscall(SYS_perf_event_open, &a, 0, -1, -1, 0);
}

static long try_io_uring(void) { struct io_uring_params p; memset(&p, 0, sizeof p); return syscall(SYS_io_uring_setup, 1, &p); }
static long try_add_key(void) { return syscall(SYS_add_key, "user", "mayfly-attack", "x", 1, -1 /* thread keyring */); }
static long try_userfault(void) { return syscall(SYS_userfaultfd, 0); }
static long try_handle_at(void) {
    struct { unsigned bytes; int type; char data[128]; } h = {.bytes = 128};
    int mount_id;
    if (syscall(SYS_name_to_handle_at, AT_FDCWD, "/", &h, &mount_id, 0) < 0) return -1;
    int at = open("/", O_RDONLY);
    return syscall(SYS_open_by_handle_at, at, &h, O_RDONLY);
}

static long try_ptrace_child(void) {
    pid_t pid = fork();
    if (pid == 0) { pause(); _exit(0); }
    long rc = ptrace(PTRACE_ATTACH, pid, NULL, NULL);
    int error = errno;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, __WALL);
    errno = error;
    return rc;
}

static long try_ptrace_init(void) { return ptrace(PTRACE_SEIZE, 1, NULL, NULL); }
static long try_read_init_memory(void) { return open("/proc/1/mem", O_RDONLY); }
static long try_packet_socket(void) { return socket(AF_PACKET, SOCK_RAW, 0); }
static long try_raw_socket(void) { return socket(AF_INET, SOCK_RAW, 1); }
static long try_alg_socket(void) { return socket(38 /* AF_ALG */, SOCK_SEQPACKET, 0); }
static long try_vsock_socket(void) { return socket(AF_VSOCK, SOCK_STREAM, 0); }
static long try_write_sysctl(void) { return open("/proc/sys/kernel/core_pattern", O_WRONLY); }
static long try_read_kmsg(void) { return syscall(SYS_syslog, 3, (char[16]){0}, 16); }
static long try_join_namespace(void) { return setns(open("/proc/1/ns/mnt", O_RDONLY), 0); }

// The kernel refuses everybody a wrong magic number, but only after it has asked for CAP_SYS_BOOT.
static long try_reboot(void) { long rc = syscall(SYS_reboot, 1, 2, 3, 0); return rc < 0 && errno == EINVAL ? 0 : rc; }

#define ATTACKS \
    A(unshare_user) A(unshare_mount) A(unshare_net) A(mount_tmpfs) A(clone_user) A(clone3_user) A(open_tree) A(fsopen) A(make_device) \
    A(chroot) A(sethostname) A(set_clock) A(nice_up) A(load_bpf) A(perf) A(io_uring) A(add_key) A(userfault) A(handle_at) \
    A(ptrace_child) A(ptrace_init) A(read_init_memory) A(packet_socket) A(raw_socket) A(alg_socket) A(vsock_socket) A(write_sysctl) \
    A(read_kmsg) A(join_namespace) A(reboot)

int main(int argc, char **argv) {
    const char *wanted = argc > 1 ? argv[1] : "";
#define A(name) if (strcmp(wanted, #name) == 0) { errno = 0; long rc = try_##name(); puts(rc < 0 ? strerrorname_np(errno) : "done"); return rc < 0; }
    ATTACKS
#undef A
    fprintf(stderr, "no such attack: %s\n", wanted);
    return 2;
}
