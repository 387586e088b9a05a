// main.c: waits for bytes and hands them to the device.
#include "core/device.h" // requests
#include "core/port.h"   // link

int main(int argc, char **argv) {
    static uint8_t bytes[256];
    port_init(argc, argv);
    device_init();
    for (;;) {
        const size_t size = port_read(bytes + 1, sizeof bytes - 1);
        // A frame begins with a datagram, whoever sent half a frame before: a zero byte ends that.
        const size_t from = port_begins() ? 0 : 1;
        device_receive(bytes + from, size + 1 - from);
    }
}
