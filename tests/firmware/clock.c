// clock.c: holds port_micros against another clock of the MPS2 board, for the test of its port.
//
// For every byte received it watches both for a while and sends three u32, little endian: how long
// port_micros says it was, how often it went back, and how often it leapt by 5 ms or more.
#include "core/port.h"

#define WATCHED 150u // turns of the board's counter of hundredths of a second
#define HUNDREDTHS (*(volatile const uint32_t *)0x40028014u)

static uint32_t next_hundredth(uint32_t last) {
    while (HUNDREDTHS == last) {
    }
    return last + 1;
}

int main(int argc, char **argv) {
    uint8_t byte;
    port_init(argc, argv);
    for (;;) {
        port_read(&byte, 1);
        const uint32_t first = next_hundredth(HUNDREDTHS);
        const uint32_t start = port_micros();
        uint32_t last = start, back = 0, leaps = 0;
        while (HUNDREDTHS - first < WATCHED) {
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
