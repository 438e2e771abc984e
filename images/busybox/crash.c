// crash: writes to an address that is not mapped and dies of SIGSEGV.
int main(void) {
    volatile int *volatile nowhere = (int *)8; // twice volatile, or the compiler sees what comes
    *nowhere = 1;
    return 0;
}
