// int8_check.c: a firmware that makes the calls of cases.h and holds their outputs to what stands
// there, for the tests on boards.
//
// At the first byte that it reads it writes a line for each case whose output differs and for each
// after which a byte beside the output or the scratch has changed, then how many cases there were,
// then "end".
#include <string.h>

#include "bench/text.h"   // words and numbers
#include "core/port.h"    // link
#include "kernels/int8.h" // what is checked

struct check {
    const char *name;
    void (*call)(int8_t *y, int8_t *scratch);
    const int8_t *expected;
    size_t size, scratch;
};

// The argument AT_EDGE is to end at EDGE, behind which the board has no memory: who reads on
// faults.
#ifdef EDGE
static const void *placed(const void *array, size_t size) {
    return memcpy((uint8_t *)EDGE - size, array, size);
}
#define PLACED(argument, array) ((argument) == AT_EDGE ? placed(array, sizeof array) : array)
#else
#define PLACED(argument, array) array
#endif

#include "cases.h" // checks: written by int8_firmware.py

#define GUARD 32
#define GUARD_BYTE 0x5A

static int8_t output[4096 + 2 * GUARD];
static _Alignas(16) int8_t scratch[4096 + 2 * GUARD];

static int holds(const int8_t *array, size_t size) {
    size_t changed = 0;
    for (size_t i = 0; i < GUARD; i++) {
        changed += array[i] != GUARD_BYTE;
        changed += array[GUARD + size + i] != GUARD_BYTE;
    }
    return changed == 0;
}

static void report(const char *name, const char *what) {
    write_text(name);
    write_text(what);
    port_flush();
}

int main(int argc, char **argv) {
    port_init(argc, argv);
    uint8_t byte;
    (void)port_read(&byte, 1); // a datagram port knows then where to write to
    const size_t count = sizeof checks / sizeof checks[0];
    for (size_t i = 0; i < count; i++) {
        const struct check *c = &checks[i];
        memset(output, GUARD_BYTE, sizeof output);
        memset(scratch, GUARD_BYTE, sizeof scratch);
        c->call(output + GUARD, scratch + GUARD);
        if (memcmp(output + GUARD, c->expected, c->size) != 0) {
            report(c->name, ": differs\n");
        }
        if (!holds(output, c->size) || !holds(scratch, c->scratch)) {
            report(c->name, ": wrote beside\n");
        }
    }
    write_text("cases");
    write_number((uint32_t)count);
    write_text("\nend\n");
    port_flush();
    for (;;) {
        (void)port_read(&byte, 1);
    }
}
