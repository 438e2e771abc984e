// forkbomb [MS]: every process forks as fast as it can for that long (default 1000); the first then ends them all and says it survived.
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int main(int argc, char **argv) {
    long until = now_ms() + atol(argc > 1 ? argv[1] : "1000");
    pid_t first = getpid();
    long refused = 0;
    setpgid(0, 0);
    while (now_ms() < until) {
        if (fork() < 0) {
            refused++;
            usleep(1000);
        }
    }
    if (getpid() != first) _exit(0);
    signal(SIGTERM, SIG_IGN);
    kill(0, SIGTERM);
    while (wait(NULL) > 0 || errno == EINTR) {}
    printf("survived, %s\n", refused > 0 ? "refused" : "never refused");
    return refused > 0 ? 0 : 1;
}
