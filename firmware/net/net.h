// net.h: as much of a network as a device needs that is asked and answers: ARP, IPv4, ICMP echo and
// UDP, on packets in memory of the caller. It knows no driver and no clock.
//
// The device has one address and one UDP port. What it sends goes back the way that the last
// datagram came, to the Ethernet and IP addresses that stood in it, so there is no table of
// neighbours and no route. Nothing is fragmented, and fragments are dropped. Packets are Ethernet
// frames without their CRC; RFC 768, 791, 792, 826, 1071 and 1122 say what stands in them.
#ifndef NET_H
#define NET_H

#include <stddef.h>
#include <stdint.h>

#define NET_PACKET_MAX 1514u // an Ethernet frame
#define NET_HEADERS_SIZE 42u // Ethernet, IPv4 and UDP, in front of what a datagram carries
#define NET_CONTENT_MAX (NET_PACKET_MAX - NET_HEADERS_SIZE)

struct net {
    // Ours; the caller sets them.
    uint8_t mac[6];
    uint8_t address[4]; // IPv4
    uint16_t port;      // UDP

    // Who sent the last datagram.
    uint8_t peer_mac[6];
    uint8_t peer_address[4];
    uint16_t peer_port; // 0: nobody so far, or nobody who can be answered

    // Packets dropped.
    uint32_t bad;       // too short, miscounted, with a wrong checksum or an impossible sender
    uint32_t fragments; // of datagrams, and of what else there is
};

enum net_kind {
    NET_NOTHING, // not to us, or nothing that is answered, or dropped
    NET_ANSWER,  // the packet has become the answer to itself: send it
    NET_DATAGRAM // to our port; its sender is the peer now
};

struct net_part {
    uint8_t *bytes;
    size_t size;
};

// Takes a packet of size bytes, of any content. Sets *part for an answer (the packet) and for a
// datagram (what it carries, which may be nothing).
enum net_kind net_receive(struct net *net, uint8_t *packet, size_t size, struct net_part *part);

// Completes a datagram to the peer: what it carries stands at packet + NET_HEADERS_SIZE, at most
// NET_CONTENT_MAX bytes. Returns the packet's size, or 0 where there is nobody to send it to.
size_t net_datagram(const struct net *net, uint8_t *packet, size_t content_size);

// Writes a packet of NET_HEADERS_SIZE bytes that tells everybody our addresses; returns its size.
size_t net_announcement(const struct net *net, uint8_t *packet);

#endif
