// pump.c: a program that takes or gives bytes as fast as its link carries them, and does nothing
// else: what an exchange with frames and acknowledgements is compared with.
//
// splitee_host/goodput.py builds it around a port and talks to it. A command says what to do:
//   'd', each u8, size u16, total u32    takes total bytes; gives one back at the end, or for each
//                                        piece of that size
//   'u', each u8, size u16, total u32    gives total bytes in pieces of that size; waits for a byte
//                                        at the beginning, or before each of them
// Little endian; each is 1 or 0. Nothing may be lost: nothing is sent twice.
#include "core/port.h"      // link
#include "protocol/bytes.h" // numbers

static uint8_t piece[1472]; // a datagram that fits one Ethernet packet

// Reads size bytes into piece, over and over where they are more.
static void take(uint32_t size) {
    uint32_t at = 0;
    while (size > 0) {
        at = at < sizeof piece ? at : 0;
        const uint32_t room = (uint32_t)sizeof piece - at;
        const uint32_t count = (uint32_t)port_read(piece + at, size < room ? size : room);
        at += count;
        size -= count;
    }
}

static void give(uint32_t size) {
    port_write(piece, size);
    port_flush();
}

int main(int argc, char **argv) {
    port_init(argc, argv);
    for (;;) {
        take(8);
        const uint8_t what = piece[0];
        const int each = piece[1] != 0;
        const uint32_t size = bytes_get_u16(piece + 2);
        uint32_t left = bytes_get_u32(piece + 4);
        for (int first = 1; left > 0; first = 0) {
            const uint32_t part = left < size ? left : size;
            left -= part;
            if (what == 'd') {
                take(part);
                if (left == 0 || each) {
                    give(1);
                }
            } else {
                if (first || each) {
                    take(1);
                }
                give(part);
            }
        }
    }
}
