// udp.c: frames in datagrams over the Ethernet of an MPS2 or MPS3 board; the board's link is "udp".
//
// Each frame is a datagram to whoever sent the last one, as in the posix port. What comes waits in
// the chip until port_read asks for it, while the device computes as well.
#include <string.h>

#include "core/port.h"          // what this file and mps2.c implement
#include "net/net.h"            // packets
#include "ports/mps2/lan9118.h" // the chip
#include "ports/mps2/machine.h" // its interrupt
#include "ports/mps2/mps2.h"    // what mps2.c needs of a link
#include "protocol/frame.h"     // what is around a body

// The packet that carries a frame, with the CRC behind it, in whole words.
#define PACKET_SIZE(body) ((NET_HEADERS_SIZE + FRAME_CODED_SIZE(body) + 4 + 3) / 4 * 4)

#define SEND_MAX 1444u // with the seal of a key, it fills an Ethernet packet
_Static_assert(FRAME_CODED_SIZE(SEND_MAX) <= NET_CONTENT_MAX, "a frame does not fit a datagram");
_Static_assert(FRAME_CODED_SIZE(RECEIVE_MAX) <= NET_CONTENT_MAX, "a frame does not fit a datagram");
uint32_t port_send_max = SEND_MAX;
// How much the chip keeps, the host finds out by itself: what is too much is lost, and sent again.
const uint32_t port_window = UINT16_MAX;

static struct net net = {.address = {UDP_ADDRESS}, .port = UDP_PORT};
static uint8_t incoming[PACKET_SIZE(RECEIVE_MAX)]; // the packet being read
static struct net_part unread;                     // of the datagram in it
static int begins;                                 // whether nothing of it had been read before
static uint8_t outgoing[PACKET_SIZE(SEND_MAX)];    // the frame being written
static size_t written;

void mps2_link_init(void) {
    // A locally administered address, which is nobody's; different wherever the IPv4 address is.
    net.mac[0] = 0x02;
    memcpy(net.mac + 2, net.address, 4);
    lan9118_init(net.mac);
    mps2_enable(ETHERNET_INTERRUPT);
    lan9118_send(outgoing, net_announcement(&net, outgoing));
}

void mps2_link_interrupt(void) {
    lan9118_interrupt();
}

// Waits for a packet; returns its size.
static size_t receive(void) {
    size_t size;
    while ((size = lan9118_receive(incoming, sizeof incoming)) == 0) {
        mps2_mask();
        lan9118_expect();
        if (lan9118_is_empty()) {
            mps2_sleep();
        }
        mps2_unmask();
    }
    return size;
}

size_t port_read(uint8_t *buffer, size_t size) {
    begins = unread.size == 0;
    while (unread.size == 0) {
        struct net_part part;
        switch (net_receive(&net, incoming, receive(), &part)) {
        case NET_ANSWER:
            lan9118_send(part.bytes, part.size);
            break;
        case NET_DATAGRAM:
            unread = part;
            break;
        case NET_NOTHING:
            break;
        }
    }
    const size_t count = unread.size < size ? unread.size : size;
    memcpy(buffer, unread.bytes, count);
    unread.bytes += count;
    unread.size -= count;
    return count;
}

int port_begins(void) {
    return begins;
}

void port_write(const uint8_t *bytes, size_t size) {
    if (size > sizeof outgoing - NET_HEADERS_SIZE - written) {
        __builtin_trap(); // a frame is longer than a datagram
    }
    memcpy(outgoing + NET_HEADERS_SIZE + written, bytes, size);
    written += size;
}

void port_flush(void) {
    const size_t size = net_datagram(&net, outgoing, written);
    if (size > 0) {
        lan9118_send(outgoing, size);
    }
    written = 0;
}

uint32_t port_dropped(void) {
    return lan9118_dropped() + net.bad + net.fragments;
}
