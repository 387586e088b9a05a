// clock.c: holds port_micros against another clock of its board, for the tests of the ports.
//
// For every byte received it watches both for a while and sends three u32, little endian: how long
// port_micros says it was, how often it went back, and how often it leapt by 5 ms or more.
#include "core/port.h"

#define WATCHED 150u // hundredths of a second

#ifdef __riscv // the real-time clock of QEMU's board: nanoseconds in two words, low first
static uint32_t hundredths(void) {
    volatile const uint32_t *const clock = (volatile const uint32_t *)0x00101000u;
    const uint32_t low = clock[0]; // keeps the high word of this moment
    return (uint32_t)(((uint64_t)clock[1] << 32 | low) / 10000000);
}
#else
#include "ports/mps2/machine.h"
static uint32_t hundredths(void) {
    return *(volatile const uint32_t *)(FPGAIO_ADDRESS + 0x14u);
}
#endif

static uint32_t next_hundredth(uint32_t last) {
    while (hundredths() == last) {
    }
    return last + 1;
}

int main(int argc, char **argv) {
    uint8_t byte;
    port_init(argc, argv);
    for (;;) {
        port_read(&byte, 1);
        const uint32_t first = next_hundredth(hundredths());
        const uint32_t start = port_micros();
        uint32_t last = start, back = 0, leaps = 0;
        while (hundredths() - first < WATCHED) {
            const uint32_t now = port_micros();
            back += (now - last) >> 31;
            leaps += now - last >= 5000;
            last = now;
        }
        const uint32_t answers[] = {last - start, back, leaps};
        for (size_t i = 0; i < 3; i++) {
            for (unsigned shift = 0; shift < 32; shift += 8) {
                byte = (uint8_t)(answers[i] >> shift);
                port_write(&byte, 1);
            }
        }
        port_flush();
    }
}
