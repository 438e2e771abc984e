// Does nothing, successfully: what remains is the price of the sandbox.
int main(void) { return 0; }
