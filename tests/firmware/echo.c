// echo.c: a firmware that sends back whatever it receives, for the tests of the ports.
#include "core/port.h"

int main(int argc, char **argv) {
    static uint8_t buffer[4096];
    port_init(argc, argv);
    for (;;) {
#ifdef PAUSE_MICROS // lets received bytes pile up
        const uint32_t start = port_micros();
        while (port_micros() - start < PAUSE_MICROS) {
        }
#endif
        const size_t size = port_read(buffer, sizeof buffer);
        port_write(buffer, size);
        port_flush();
    }
}
