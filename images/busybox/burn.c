// burn MS [THREADS]: uses that much CPU time in each of so many processes (default 1) and exits. `burn 0` never ends.
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long used_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int main(int argc, char **argv) {
    long ms = atol(argc > 1 ? argv[1] : "100");
    for (int more = atoi(argc > 2 ? argv[2] : "1") - 1; more > 0; more--)
        if (fork() == 0) break;
    while (ms == 0 || used_ms() < ms) {}
    while (wait(NULL) > 0) {}
    return 0;
}
