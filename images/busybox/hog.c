// hog MIB: takes that much memory, page by page, says so and exits. Under a smaller limit it never comes to say it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int main(int argc, char **argv) {
    size_t bytes = (size_t)atol(argc > 1 ? argv[1] : "16") << 20;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) { perror("mmap"); return 1; }
    memset(memory, 1, bytes);
    printf("took %zu MiB\n", bytes >> 20);
    return 0;
}
