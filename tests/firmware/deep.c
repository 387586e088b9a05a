// deep.c: a firmware that uses more and more stack once it receives a byte, for the tests of the
// ports.
#include "core/port.h"

static unsigned dig(unsigned depth) {
    volatile uint8_t hole[256];
    hole[depth % sizeof hole] = 1;
    return depth == 0 ? 0 : dig(depth - 1) + hole[depth % sizeof hole];
}

int main(int argc, char **argv) {
    uint8_t byte;
    port_init(argc, argv);
    port_read(&byte, 1);
    byte = (uint8_t)dig(1000000);
    port_write(&byte, 1);
    port_flush();
    for (;;) {
    }
}
