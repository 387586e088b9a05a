// main.c: waits for bytes and hands them to the device.
#include "core/device.h" // requests
#include "core/port.h"   // link

int main(int argc, char **argv) {
    static uint8_t bytes[256];
    port_init(argc, argv);
    device_init();
    for (;;) {
        device_receive(bytes, port_read(bytes, sizeof bytes));
    }
}
