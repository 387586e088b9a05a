// net_harness.c: net.c as a process, for test_net.py: commands on stdin, answers on stdout.
//
//   R size u16, packet        takes a packet; answers kind u8, size u16 and bytes of the part
//   D size u16, content       makes a datagram; answers size u16 and the packet
//   A                         makes an announcement; answers likewise
//   S                         answers peer (Ethernet, IPv4, port u16), bad u32, fragments u32
//
// Numbers are as this machine has them. Packets are in memory of their very size, so that a
// sanitizer sees every byte that is too far. It begins with our Ethernet and IPv4 address and port.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net/net.h"

static int get(void *to, size_t size) {
    return size == 0 || fread(to, size, 1, stdin) == 1;
}

static void put(const void *bytes, size_t size) {
    if (size > 0 && fwrite(bytes, size, 1, stdout) != 1) {
        exit(2);
    }
}

static void put_sized(const uint8_t *bytes, size_t size) {
    const uint16_t count = (uint16_t)size;
    put(&count, sizeof count);
    put(bytes, size);
}

// A block with room bytes in front of what the next size and bytes on stdin are.
static uint8_t *block(size_t room, size_t *size) {
    uint16_t count = 0;
    if (!get(&count, sizeof count)) {
        exit(2);
    }
    uint8_t *const bytes = malloc(room + count + (room + count == 0));
    if (bytes == NULL || !get(bytes + room, count)) {
        exit(2);
    }
    *size = count;
    return bytes;
}

int main(void) {
    struct net net = {0};
    if (!get(net.mac, 6) || !get(net.address, 4) || !get(&net.port, 2)) {
        return 2;
    }
    char command = 0;
    size_t size = 0;
    for (; get(&command, 1); fflush(stdout)) {
        if (command == 'R') {
            struct net_part part = {NULL, 0};
            uint8_t *const packet = block(0, &size);
            const uint8_t kind = (uint8_t)net_receive(&net, packet, size, &part);
            put(&kind, 1);
            put_sized(part.bytes, part.size);
            free(packet);
        } else if (command == 'D') {
            uint8_t *const packet = block(NET_HEADERS_SIZE, &size);
            put_sized(packet, net_datagram(&net, packet, size));
            free(packet);
        } else if (command == 'A') {
            uint8_t *const packet = malloc(NET_HEADERS_SIZE);
            put_sized(packet, net_announcement(&net, packet));
            free(packet);
        } else {
            put(net.peer_mac, 6);
            put(net.peer_address, 4);
            put(&net.peer_port, 2);
            put(&net.bad, 4);
            put(&net.fragments, 4);
        }
    }
    return 0;
}
