// flood BYTES [1|2]: writes that many bytes (0: without end) to stdout or stderr, a counting pattern, so that loss shows.
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv) {
    static char block[65536];
    long left = atol(argc > 1 ? argv[1] : "0");
    int endless = left == 0, fd = atoi(argc > 2 ? argv[2] : "1");
    for (unsigned i = 0; i < sizeof block; i++) block[i] = (char)('a' + i % 26);
    for (long at = 0; endless || left > 0;) {
        // The pattern goes on where it stopped: byte n of the stream is always 'a' + n % 65536 % 26.
        long room = (long)sizeof block - at % (long)sizeof block;
        long want = !endless && left < room ? left : room;
        ssize_t n = write(fd, block + at % (long)sizeof block, (size_t)want);
        if (n < 0) return 1;
        at += n;
        left -= n;
    }
    return 0;
}
