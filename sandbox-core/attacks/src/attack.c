/* Attacks on a sandbox from inside, one a call: `attack NAME [ARGUMENT...]`. What each proves is written in tests/keeper/attacks.rs.
 * 0: it worked. 1: something stopped it (which step and why goes to stderr). 2: no such attack. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int stopped(const char *step)
{
	fprintf(stderr, "%s: %s\n", step, strerror(errno));
	return 1;
}

/* For calls that return -1 when they are refused. */
#define TRY(call)                                                                                                              \
	do {                                                                                                                   \
		if ((call) == -1)                                                                                              \
			return stopped(#call);                                                                                 \
	} while (0)

#define ATTACK(name) static int name(int argc __attribute__((unused)), char **argv __attribute__((unused)))

/* --- namespaces and mounts --- */

ATTACK(unshare_user)
{
	TRY(unshare(CLONE_NEWUSER));
	return 0;
}

ATTACK(clone_user)
{
	long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	TRY(pid);
	if (pid == 0)
		_exit(0);
	waitpid(pid, NULL, 0);
	return 0;
}

ATTACK(clone3_user)
{
	uint64_t args[8] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD, 0, 0, 0};
	long pid = syscall(SYS_clone3, args, sizeof args);
	TRY(pid);
	if (pid == 0)
		_exit(0);
	waitpid(pid, NULL, 0);
	return 0;
}

ATTACK(mount_in_new_namespace)
{
	TRY(unshare(CLONE_NEWUSER | CLONE_NEWNS));
	TRY(mount("none", "/tmp", "tmpfs", 0, ""));
	return 0;
}

/* CVE-2022-0492: a cgroup file system of one's own, and in it release_agent. */
ATTACK(mount_cgroup)
{
	TRY(unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWCGROUP));
	if (mount("none", "/tmp", "cgroup", 0, "memory") == -1)
		TRY(mount("none", "/tmp", "cgroup2", 0, ""));
	return 0;
}

ATTACK(mount_over)
{
	TRY(mount("none", "/tmp", "tmpfs", 0, ""));
	return 0;
}

ATTACK(umount_proc)
{
	TRY(umount2("/proc", MNT_DETACH));
	return 0;
}

ATTACK(join_namespace)
{
	int fd = open("/proc/self/ns/uts", O_RDONLY);
	TRY(fd);
	TRY(setns(fd, CLONE_NEWUTS));
	return 0;
}

ATTACK(change_host_name)
{
	TRY(sethostname("changed", 7));
	return 0;
}

ATTACK(change_root)
{
	TRY(chroot("/tmp"));
	return 0;
}

ATTACK(make_device)
{
	TRY(mknod("/tmp/memory", S_IFCHR | 0666, makedev(1, 1)));
	return 0;
}

/* --- files --- */

static int open_to(const char *path, int flags)
{
	int fd = open(path, flags);
	TRY(fd);
	struct stat found;
	TRY(fstat(fd, &found));
	/* What is hidden is a null device in its place. */
	if (S_ISCHR(found.st_mode) && found.st_rdev == makedev(1, 3) && strncmp(path, "/proc/", 6) == 0) {
		fprintf(stderr, "%s is the null device\n", path);
		return 1;
	}
	return 0;
}

ATTACK(read_file)
{
	return argc == 1 ? open_to(argv[0], O_RDONLY) : 2;
}

ATTACK(write_file)
{
	return argc == 1 ? open_to(argv[0], O_WRONLY) : 2;
}

ATTACK(read_link)
{
	char target[4096];
	if (argc != 1)
		return 2;
	TRY(readlink(argv[0], target, sizeof target));
	return 0;
}

/* CVE-2024-21626: a folder of the host's that the runtime left open. */
ATTACK(open_through_leak)
{
	for (int fd = 3; fd < 1024; fd++) {
		struct stat found;
		if (fstat(fd, &found) == -1 || !S_ISDIR(found.st_mode))
			continue;
		int file = openat(fd, "etc/hostname", O_RDONLY);
		TRY(file);
		return 0;
	}
	fprintf(stderr, "no folder is open\n");
	return 1;
}

static int exec_self(const char *path, const char *what)
{
	char *args[] = {(char *)path, (char *)what, NULL};
	execv(path, args);
	return stopped(path);
}

/* By a copy of this program that belongs to root and has the set-user-id bit. */
ATTACK(exec_set_user_id)
{
	return exec_self("/bin/attack-set-uid", "is_root");
}

ATTACK(is_root)
{
	fprintf(stderr, "effective user id %d\n", geteuid());
	return geteuid() == 0 ? 0 : 1;
}

/* What a server of a root image does once it has its port. */
ATTACK(become_another_user)
{
	TRY(setresgid(1000, 1000, 1000));
	TRY(setresuid(1000, 1000, 1000));
	return getuid() == 1000 ? 0 : 1;
}

/* By a copy of this program that has file capabilities (capabilities(7)). */
ATTACK(exec_with_file_capabilities)
{
	return exec_self("/bin/attack-file-caps", "is_capable");
}

ATTACK(is_capable)
{
	char line[256];
	FILE *status = fopen("/proc/self/status", "r");
	unsigned long long effective = 0;
	while (status && fgets(line, sizeof line, status))
		sscanf(line, "CapEff: %llx", &effective);
	fprintf(stderr, "effective capabilities %llx\n", effective);
	return effective ? 0 : 1;
}

/* --- processes --- */

ATTACK(trace_init)
{
	TRY(ptrace(PTRACE_SEIZE, 1, 0, 0));
	return 0;
}

/* As every id there is, since one may be init's. */
ATTACK(slow_down_init)
{
	for (int id = 0; id < 65536; id++) {
		if (setresuid(id, id, 0) == -1)
			return stopped("setresuid");
		cpu_set_t first;
		CPU_ZERO(&first);
		CPU_SET(0, &first);
		struct rlimit limit;
		int reached = setpriority(PRIO_PROCESS, 1, 19) == 0 || sched_setaffinity(1, sizeof first, &first) == 0 ||
			      prlimit(1, RLIMIT_NOFILE, NULL, &limit) == 0;
		if (setresuid(0, 0, 0) == -1)
			return stopped("setresuid");
		if (reached)
			return 0;
	}
	errno = EPERM;
	return stopped("setpriority, sched_setaffinity, prlimit");
}

/* PR_SCHED_CORE_CREATE: nobody else may run on the siblings of the cores that it runs on. */
ATTACK(take_a_core)
{
	TRY(prctl(62, 1, 0, 0, 0));
	return 0;
}

ATTACK(read_childs_memory)
{
	char here = 0, there = 0;
	pid_t pid = fork();
	TRY(pid);
	if (pid == 0) {
		pause();
		_exit(0);
	}
	struct { void *base; size_t len; } local = {&here, 1}, remote = {&there, 1};
	long copied = syscall(SYS_process_vm_readv, pid, &local, 1, &remote, 1, 0);
	int error = errno;
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	errno = error;
	TRY(copied);
	return 0;
}

/* --- sockets --- */

static int make_socket(int family, int type, int protocol)
{
	TRY(socket(family, type, protocol));
	return 0;
}

ATTACK(raw_socket) { return make_socket(AF_INET, SOCK_RAW, IPPROTO_ICMP); }
ATTACK(packet_socket) { return make_socket(AF_PACKET, SOCK_RAW, 0); }
ATTACK(vsock_socket) { return make_socket(AF_VSOCK, SOCK_STREAM, 0); }
ATTACK(alg_socket) { return make_socket(AF_ALG, SOCK_SEQPACKET, 0); }

ATTACK(connect_tcp)
{
	if (argc != 1)
		return 2;
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[0])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	TRY(fd);
	TRY(connect(fd, (struct sockaddr *)&to, sizeof to));
	return 0;
}

ATTACK(connect_abstract)
{
	if (argc != 1)
		return 2;
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	memcpy(to.sun_path + 1, argv[0], strlen(argv[0]));
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	TRY(fd);
	TRY(connect(fd, (struct sockaddr *)&to, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(argv[0])));
	return 0;
}

ATTACK(listen_abstract)
{
	if (argc != 1)
		return 2;
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	memcpy(at.sun_path + 1, argv[0], strlen(argv[0]));
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	TRY(fd);
	TRY(bind(fd, (struct sockaddr *)&at, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(argv[0])));
	TRY(listen(fd, 8));
	puts("held");
	fflush(stdout);
	poll(NULL, 0, -1);
	return 0;
}

ATTACK(listen_on_port_80)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(80), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	TRY(fd);
	TRY(bind(fd, (struct sockaddr *)&at, sizeof at));
	return 0;
}

/* --- what the kernel shares by user or by name --- */

/* Runs the rest of the command with a key in its session keyring. */
ATTACK(with_session_key)
{
	TRY(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL));
	TRY(syscall(SYS_add_key, "user", "mayfly-test", "secret", 6, KEY_SPEC_SESSION_KEYRING));
	TRY(syscall(SYS_keyctl, KEYCTL_SETPERM, KEY_SPEC_SESSION_KEYRING, 0x3f3f3f3f));
	execvp(argv[0], argv);
	return stopped(argv[0]);
}

ATTACK(hold_session_key)
{
	TRY(syscall(SYS_add_key, "user", "mayfly-test", "secret", 6, KEY_SPEC_SESSION_KEYRING));
	puts("held");
	fflush(stdout);
	poll(NULL, 0, -1);
	return 0;
}

ATTACK(read_session_key)
{
	char secret[16];
	long key = syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", "mayfly-test", 0);
	TRY(key);
	TRY(syscall(SYS_keyctl, KEYCTL_READ, key, secret, sizeof secret));
	return 0;
}

/* By its key: `hold` makes the segment and sleeps, `remove` removes it; else it is looked for. */
ATTACK(shared_memory)
{
	if (argc < 1)
		return 2;
	int is_holder = argc == 2 && strcmp(argv[1], "hold") == 0;
	int id = shmget(atoi(argv[0]), 4096, is_holder ? IPC_CREAT | 0666 : 0666);
	TRY(id);
	if (argc == 2 && strcmp(argv[1], "remove") == 0) {
		TRY(shmctl(id, IPC_RMID, NULL));
		return 0;
	}
	if (is_holder) {
		puts("held");
		fflush(stdout);
		poll(NULL, 0, -1);
	}
	return 0;
}

/* Takes inotify instances until there are no more; `hold` then sleeps. Works if it gets at least one. */
ATTACK(inotify_instances)
{
	int count = 0;
	while (count < 100000 && inotify_init1(IN_CLOEXEC) != -1)
		count++;
	int error = errno;
	printf("%d\n", count);
	fflush(stdout);
	if (argc == 1 && strcmp(argv[0], "hold") == 0)
		poll(NULL, 0, -1);
	errno = error;
	return count > 0 ? 0 : stopped("inotify_init1");
}

/* Locks a file of the image for writing; `hold` then sleeps. */
ATTACK(lock_file)
{
	if (argc < 1)
		return 2;
	int fd = open(argv[0], O_RDONLY);
	TRY(fd);
	TRY(flock(fd, LOCK_EX | LOCK_NB));
	puts("held");
	fflush(stdout);
	if (argc == 2 && strcmp(argv[1], "hold") == 0)
		poll(NULL, 0, -1);
	return 0;
}

/* --- standing still --- */

/* Runs in the kernel until it is killed, on memory that nobody provides: the freezer does not reach it there. */
ATTACK(never_freeze)
{
	int fault = syscall(SYS_userfaultfd, O_CLOEXEC), ends[2];
	TRY(fault);
	struct uffdio_api api = {.api = UFFD_API};
	TRY(ioctl(fault, UFFDIO_API, &api));
	size_t len = sysconf(_SC_PAGESIZE);
	char *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return stopped("mmap");
	struct uffdio_register range = {.range = {(uintptr_t)memory, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	TRY(ioctl(fault, UFFDIO_REGISTER, &range));
	TRY(pipe(ends));
	puts("stuck");
	fflush(stdout);
	TRY(write(ends[1], memory, 1));
	return 0;
}

/* --- terminals --- */

ATTACK(type_into_terminal)
{
	int zero = 0;
	char letter = 'x', name[64];
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY);
	TRY(master);
	TRY(ioctl(master, TIOCSPTLCK, &zero));
	TRY(ptsname_r(master, name, sizeof name));
	pid_t pid = fork();
	TRY(pid);
	if (pid == 0) {
		setsid();
		int terminal = open(name, O_RDWR);
		_exit(terminal == -1 || ioctl(terminal, TIOCSTI, &letter) == -1 ? errno : 0);
	}
	int status = 0;
	TRY(waitpid(pid, &status, 0));
	errno = WEXITSTATUS(status);
	return errno ? stopped("ioctl(TIOCSTI)") : 0;
}

ATTACK(allow_core_dumps)
{
	struct rlimit limit = {0, 0};
	/* Zero is more than one here: a core_pattern that starts a helper ignores it (core(5)). */
	TRY(setrlimit(RLIMIT_CORE, &limit));
	TRY(getrlimit(RLIMIT_CORE, &limit));
	fprintf(stderr, "the limit is %lld\n", (long long)limit.rlim_cur);
	return limit.rlim_cur == 1 ? 1 : 0;
}

/* --- every system call --- */

static long call(const char *abi, long number)
{
	const long bad = -1;
#ifdef __x86_64__
	if (strcmp(abi, "i386") == 0) {
		long result;
		__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(bad), "c"(bad), "d"(bad), "S"(bad), "D"(bad) : "memory", "r8", "r9", "r10", "r11");
		return result;
	}
	if (strcmp(abi, "x32") == 0)
		number |= 0x40000000;
#endif
	(void)abi;
	long result = syscall(number, bad, bad, bad, bad, bad, bad);
	return result == -1 ? -errno : result;
}

/* Makes each call of stdin (a number a line) in a process of its own, with arguments that no call can do anything with: `number errno` or
 * `number signal N`. */
ATTACK(make_calls)
{
	long number;
	if (argc != 1)
		return 2;
	while (scanf("%ld", &number) == 1) {
		fflush(stdout);
		pid_t pid = fork();
		TRY(pid);
		if (pid == 0) {
			alarm(1);
			long result = call(argv[0], number);
			_exit(result < 0 && result > -255 ? (int)-result : 0);
		}
		int status = 0;
		TRY(waitpid(pid, &status, 0));
		if (WIFSIGNALED(status))
			printf("%ld signal %d\n", number, WTERMSIG(status));
		else
			printf("%ld %d\n", number, WEXITSTATUS(status));
	}
	return 0;
}

/* --- hogs: each takes more and more until something stops it --- */

static void touch(char *memory, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += 4096)
		memory[at] = 1;
}

ATTACK(hog_memory)
{
	for (;;) {
		char *memory = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (memory == MAP_FAILED)
			return stopped("mmap");
		touch(memory, 1 << 20);
	}
}

static int deeper(int depth)
{
	volatile char frame[64 << 10];
	frame[0] = (char)depth;
	return depth < 0 ? 0 : deeper(depth + 1) + frame[0];
}

ATTACK(hog_stack)
{
	return deeper(0);
}

ATTACK(hog_memfd)
{
	static char block[1 << 20];
	memset(block, 1, sizeof block);
	int fd = memfd_create("hog", 0);
	TRY(fd);
	for (;;)
		TRY(write(fd, block, sizeof block));
}

ATTACK(hog_shared_memory)
{
	for (;;) {
		int id = shmget(IPC_PRIVATE, 1 << 20, 0600);
		TRY(id);
		char *memory = shmat(id, NULL, 0);
		if (memory == (char *)-1)
			return stopped("shmat");
		touch(memory, 1 << 20);
		/* Left behind on purpose: it is the namespace that ends it. */
		shmdt(memory);
	}
}

/* A page of page table for each page of memory. */
ATTACK(hog_page_tables)
{
	for (;;) {
		char *memory = mmap(NULL, 1 << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (memory == MAP_FAILED)
			return stopped("mmap");
		madvise(memory, 1 << 30, MADV_NOHUGEPAGE);
		for (size_t at = 0; at < 1 << 30; at += 2 << 20)
			memory[at] = 1;
	}
}

ATTACK(hog_sockets)
{
	static char block[64 << 10];
	for (int pairs = 0;; pairs++) {
		int ends[2];
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == -1) {
			fprintf(stderr, "%d pairs\n", pairs);
			return stopped("socketpair");
		}
		int size = 8 << 20;
		for (int end = 0; end < 2; end++) {
			setsockopt(ends[end], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
			while (write(ends[end], block, sizeof block) > 0)
				;
		}
	}
}

ATTACK(hog_pipes)
{
	static char block[64 << 10];
	for (;;) {
		int ends[2];
		TRY(pipe2(ends, O_NONBLOCK));
		fcntl(ends[1], F_SETPIPE_SZ, 1 << 20);
		while (write(ends[1], block, sizeof block) > 0)
			;
	}
}

static void *sleep_for_ever(void *nothing)
{
	poll(NULL, 0, -1);
	return nothing;
}

ATTACK(hog_threads)
{
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 16 << 10);
	for (int threads = 1;; threads++) {
		pthread_t thread;
		if ((errno = pthread_create(&thread, &small, sleep_for_ever, NULL)) != 0) {
			printf("%d\n", threads);
			return stopped("pthread_create");
		}
	}
}

/* Every process forks as long as it can; ends with the first. */
ATTACK(hog_processes)
{
	struct timespec start, now;
	clock_gettime(CLOCK_MONOTONIC, &start);
	pid_t first = getpid();
	do {
		pid_t pid = fork();
		if (pid == 0 && getpid() == first)
			_exit(0);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec - start.tv_sec < 1);
	return 0;
}

/* Daemons that ignore every signal that can be ignored; every other one stops itself. */
ATTACK(leave_daemons)
{
	int ready[2];
	TRY(pipe(ready));
	for (int n = 0; n < 8; n++) {
		if (fork() == 0) {
			setsid();
			pid_t daemon = fork();
			if (daemon != 0) {
				/* Stopped, or about to sleep: then it is said. */
				if (n % 2)
					waitpid(daemon, NULL, WUNTRACED);
				TRY(write(ready[1], "ready\n", 6));
				_exit(0);
			}
			for (int signal_number = 1; signal_number < 32; signal_number++)
				signal(signal_number, SIG_IGN);
			close(0);
			close(1);
			close(2);
			if (n % 2)
				kill(getpid(), SIGSTOP);
			for (;;)
				pause();
		}
	}
	while (wait(NULL) > 0)
		;
	close(ready[1]);
	char said[64];
	ssize_t len = read(ready[0], said, sizeof said);
	TRY(len);
	TRY(write(1, said, len));
	return 0;
}

/* A child that is stopped under its tracer, which does not wait for it. */
ATTACK(trace_and_sleep)
{
	pid_t pid = fork();
	TRY(pid);
	if (pid == 0)
		for (;;)
			pause();
	TRY(ptrace(PTRACE_SEIZE, pid, 0, 0));
	TRY(ptrace(PTRACE_INTERRUPT, pid, 0, 0));
	puts("traced");
	fflush(stdout);
	for (;;)
		pause();
}

ATTACK(hog_folders)
{
	int depth = 0;
	while (mkdir("d", 0700) == 0 && chdir("d") == 0)
		depth++;
	printf("%d\n", depth);
	return stopped("mkdir");
}

ATTACK(hog_links)
{
	char name[32];
	int fd = open("first", O_CREAT | O_WRONLY, 0600);
	TRY(fd);
	for (int n = 0;; n++) {
		snprintf(name, sizeof name, "link%d", n);
		if (link("first", name) == -1) {
			printf("%d\n", n);
			return stopped("link");
		}
	}
}

/* A file of nearly 8 EiB that holds one byte. */
ATTACK(sparse_file)
{
	int fd = open("sparse", O_CREAT | O_RDWR, 0600);
	TRY(fd);
	TRY(ftruncate(fd, INT64_MAX));
	TRY(pwrite(fd, "x", 1, INT64_MAX - 4096));
	return 0;
}

/* Page NUMBER of the file PATH, through a mapping: in memory, where there is a hole, the kernel makes a page for whoever only reads. */
ATTACK(read_hole)
{
	if (argc != 2)
		return 2;
	int fd = open(argv[0], O_RDONLY);
	TRY(fd);
	volatile char *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, atol(argv[1]) * 4096);
	if (page == MAP_FAILED)
		return stopped("mmap");
	return page[0] == 0 ? 0 : 1;
}

ATTACK(hog_output)
{
	static char block[1 << 20];
	memset(block, 'x', sizeof block);
	for (;;)
		TRY(write(1, block, sizeof block));
}

ATTACK(hog_processor)
{
	for (volatile int busy = 1; busy;)
		;
	return 0;
}

/* --- a neighbour --- */

static int by_value(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return x < y ? -1 : x > y;
}

/* Wakes every 5 ms as often as it is told, does a little of everything, and prints by how many microseconds it was late: median, 19 of 20,
 * worst. */
ATTACK(beat)
{
	if (argc != 1)
		return 2;
	int beats = atoi(argv[0]);
	int64_t *late = calloc(beats, sizeof *late);
	struct timespec due, now;
	clock_gettime(CLOCK_MONOTONIC, &due);
	for (int beat = 0; beat < beats; beat++) {
		due.tv_nsec += 5000000;
		if (due.tv_nsec >= 1000000000) {
			due.tv_nsec -= 1000000000;
			due.tv_sec++;
		}
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
		int fd = open("beat", O_CREAT | O_WRONLY | O_TRUNC, 0600);
		TRY(fd);
		TRY(write(fd, &beat, sizeof beat));
		close(fd);
		pid_t pid = fork();
		TRY(pid);
		if (pid == 0)
			_exit(0);
		TRY(waitpid(pid, NULL, 0));
		clock_gettime(CLOCK_MONOTONIC, &now);
		late[beat] = (now.tv_sec - due.tv_sec) * 1000000LL + (now.tv_nsec - due.tv_nsec) / 1000;
		/* What was missed is missed: being late once is not to be counted twice. */
		if (late[beat] > 5000)
			due = now;
	}
	/* Its own memory is there, too. */
	touch(malloc(16 << 20), 16 << 20);
	qsort(late, beats, sizeof *late, by_value);
	printf("%lld %lld %lld\n", (long long)late[beats / 2], (long long)late[beats * 19 / 20], (long long)late[beats - 1]);
	return 0;
}

/* Leaves somebody behind who stands in the middle of a write to the terminal for as long as a slow disk takes to bring what is written. */
ATTACK(hold_terminal)
{
	if (argc != 1)
		return 2;
	const size_t len = 1 << 20;
	char byte = 0;
	int begun[2], fd = open(argv[0], O_RDONLY);
	TRY(fd);
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	char *slow = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
	if (slow == MAP_FAILED)
		return stopped("mmap");
	TRY(madvise(slow, len, MADV_RANDOM));
	TRY(pipe(begun));
	pid_t pid = fork();
	TRY(pid);
	if (pid == 0) {
		signal(SIGHUP, SIG_IGN);
		/* The first may come at once, and every other one takes its time. */
		for (size_t at = 0; at < len; at += 4096)
			if (write(1, slow + at, 1) != 1 || write(begun[1], &byte, 1) != 1)
				_exit(1);
		_exit(0);
	}
	TRY(read(begun[0], &byte, 1));
	return 0;
}

#define NAMED(name) {#name, name}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(int, char **);
	} attacks[] = {
		NAMED(unshare_user), NAMED(clone_user), NAMED(clone3_user), NAMED(mount_in_new_namespace), NAMED(mount_cgroup), NAMED(mount_over),
		NAMED(umount_proc), NAMED(join_namespace), NAMED(change_host_name), NAMED(change_root), NAMED(make_device), NAMED(read_file),
		NAMED(write_file), NAMED(read_link), NAMED(open_through_leak), NAMED(exec_set_user_id), NAMED(is_root), NAMED(become_another_user),
		NAMED(exec_with_file_capabilities), NAMED(is_capable), NAMED(trace_init), NAMED(slow_down_init), NAMED(take_a_core), NAMED(listen_abstract), NAMED(hold_session_key), NAMED(read_childs_memory), NAMED(raw_socket),
		NAMED(packet_socket), NAMED(vsock_socket), NAMED(alg_socket), NAMED(connect_tcp), NAMED(connect_abstract),
		NAMED(listen_on_port_80), NAMED(with_session_key), NAMED(read_session_key), NAMED(shared_memory), NAMED(inotify_instances),
		NAMED(lock_file), NAMED(never_freeze), NAMED(type_into_terminal), NAMED(allow_core_dumps), NAMED(make_calls), NAMED(hog_memory), NAMED(hog_stack),
		NAMED(hog_memfd), NAMED(hog_shared_memory), NAMED(hog_page_tables), NAMED(hog_sockets), NAMED(hog_pipes), NAMED(hog_threads),
		NAMED(hog_processes), NAMED(leave_daemons), NAMED(trace_and_sleep), NAMED(hog_folders), NAMED(hog_links), NAMED(sparse_file), NAMED(read_hole),
		NAMED(hog_output), NAMED(hog_processor), NAMED(beat), NAMED(hold_terminal),
	};
	for (size_t n = 0; argc > 1 && n < sizeof attacks / sizeof *attacks; n++)
		if (strcmp(argv[1], attacks[n].name) == 0)
			return attacks[n].run(argc - 2, argv + 2);
	fprintf(stderr, "no such attack\n");
	return 2;
}
