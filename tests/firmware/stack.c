// stack.c: a firmware that needs DEPTH bytes of stack once, before it listens, and answers every
// byte with the most that it ever used: a u32, little endian. For the tests of the ports.
#include "core/port.h"

__attribute__((noinline)) static void go_deep(void) {
    volatile uint8_t hole[DEPTH];
    for (size_t i = 0; i < sizeof hole; i++) {
        hole[i] = 0;
    }
}

int main(int argc, char **argv) {
    uint8_t byte;
    go_deep(); // while nothing interrupts
    port_init(argc, argv);
    for (;;) {
        port_read(&byte, 1);
        const uint32_t used = port_stack_used();
        for (unsigned shift = 0; shift < 32; shift += 8) {
            byte = (uint8_t)(used >> shift);
            port_write(&byte, 1);
        }
        port_flush();
    }
}
