// net.c: reads packets and writes their answers; net.h is the manual.
#include "net/net.h" // itself

#include <string.h>

// Ethernet.
#define TO 0u
#define FROM 6u
#define TYPE 12u
#define TYPE_IPV4 0x0800u
#define TYPE_ARP 0x0806u
#define ETHERNET_SIZE 14u

// ARP for IPv4 over Ethernet, behind the Ethernet header.
#define ARP_OPERATION 6u
#define ARP_REQUEST 1u
#define ARP_REPLY 2u
#define ARP_SENDER_MAC 8u
#define ARP_SENDER 14u
#define ARP_TARGET_MAC 18u
#define ARP_TARGET 24u
#define ARP_SIZE 28u

// IPv4, behind the Ethernet header.
#define IP_LENGTH 2u
#define IP_IDENTIFICATION 4u
#define IP_FRAGMENT 6u
#define IP_PART 0x3FFFu // of it: more fragments follow, or it begins elsewhere than at 0
#define IP_WHOLE 0x4000u
#define IP_HOPS 8u
#define IP_PROTOCOL 9u
#define IP_ICMP 1u
#define IP_UDP 17u
#define IP_CHECKSUM 10u
#define IP_FROM 12u
#define IP_TO 16u
#define IP_SIZE 20u // without options
#define HOPS 64u

// ICMP and UDP, behind the IPv4 header.
#define ICMP_CHECKSUM 2u
#define ICMP_SIZE 8u
#define ICMP_ECHO 8u
#define ICMP_ECHO_REPLY 0u
#define UDP_FROM 0u
#define UDP_TO 2u
#define UDP_LENGTH 4u
#define UDP_CHECKSUM 6u
#define UDP_SIZE 8u

static uint16_t get(const uint8_t *at) {
    return (uint16_t)(at[0] << 8 | at[1]);
}

static void put(uint8_t *at, size_t value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static int is(const uint8_t *at, const uint8_t *bytes, size_t size) {
    return memcmp(at, bytes, size) == 0;
}

// ---- checksums ----

// Adds up 16-bit words; 32 bits hold the sum of a packet's.
static uint32_t sum(const uint8_t *bytes, size_t size) {
    uint32_t total = 0;
    size_t i = 0;
    for (; i + 1 < size; i += 2) {
        total += get(bytes + i);
    }
    return i < size ? total + ((uint32_t)bytes[i] << 8) : total;
}

// The checksum of bytes and of whatever start is the sum of. Of bytes that contain their own it is
// 0 where that is right.
static uint16_t checksum(uint32_t start, const uint8_t *bytes, size_t size) {
    uint32_t total = start + sum(bytes, size);
    total = (total & 0xFFFFu) + (total >> 16);
    total = (total & 0xFFFFu) + (total >> 16);
    return (uint16_t)~total;
}

// The sum of what UDP's checksum covers of the IPv4 header.
static uint32_t pseudo_sum(const uint8_t *ip, size_t size) {
    return sum(ip + IP_FROM, 8) + IP_UDP + (uint32_t)size;
}

// ---- writing ----

static void put_ethernet(const struct net *net, uint8_t *packet, const uint8_t *to, uint16_t type) {
    memcpy(packet + TO, to, 6);
    memcpy(packet + FROM, net->mac, 6);
    put(packet + TYPE, type);
}

static void put_arp(const struct net *net, uint8_t *packet, uint16_t operation,
                    const uint8_t *target_mac, const uint8_t *target) {
    static const uint8_t ipv4_over_ethernet[ARP_OPERATION] = {0, 1, 8, 0, 6, 4};
    uint8_t *const arp = packet + ETHERNET_SIZE;
    memcpy(arp, ipv4_over_ethernet, sizeof ipv4_over_ethernet);
    put(arp + ARP_OPERATION, operation);
    memcpy(arp + ARP_SENDER_MAC, net->mac, 6);
    memcpy(arp + ARP_SENDER, net->address, 4);
    memcpy(arp + ARP_TARGET_MAC, target_mac, 6);
    memcpy(arp + ARP_TARGET, target, 4);
}

static void put_ip(const struct net *net, uint8_t *ip, const uint8_t *to, uint8_t protocol,
                   size_t size) {
    ip[0] = 0x45; // version 4, a header of five words
    ip[1] = 0;
    put(ip + IP_LENGTH, IP_SIZE + size);
    put(ip + IP_IDENTIFICATION, 0); // of use for fragments only: RFC 6864
    put(ip + IP_FRAGMENT, IP_WHOLE);
    ip[IP_HOPS] = HOPS;
    ip[IP_PROTOCOL] = protocol;
    put(ip + IP_CHECKSUM, 0);
    memcpy(ip + IP_FROM, net->address, 4);
    memcpy(ip + IP_TO, to, 4);
    put(ip + IP_CHECKSUM, checksum(0, ip, IP_SIZE));
}

size_t net_datagram(const struct net *net, uint8_t *packet, size_t content_size) {
    uint8_t *const ip = packet + ETHERNET_SIZE;
    uint8_t *const udp = ip + IP_SIZE;
    const size_t size = UDP_SIZE + content_size;
    if (net->peer_port == 0) {
        return 0;
    }
    put_ethernet(net, packet, net->peer_mac, TYPE_IPV4);
    put_ip(net, ip, net->peer_address, IP_UDP, size);
    put(udp + UDP_FROM, net->port);
    put(udp + UDP_TO, net->peer_port);
    put(udp + UDP_LENGTH, size);
    put(udp + UDP_CHECKSUM, 0);
    const uint16_t check = checksum(pseudo_sum(ip, size), udp, size);
    put(udp + UDP_CHECKSUM, check != 0 ? check : 0xFFFFu); // 0 says that there is none
    return NET_HEADERS_SIZE + content_size;
}

size_t net_announcement(const struct net *net, uint8_t *packet) {
    static const uint8_t everybody[6] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    static const uint8_t nobody[6];
    put_ethernet(net, packet, everybody, TYPE_ARP);
    put_arp(net, packet, ARP_REQUEST, nobody, net->address);
    return ETHERNET_SIZE + ARP_SIZE;
}

// ---- reading ----

static enum net_kind on_arp(const struct net *net, uint8_t *packet, size_t size,
                            struct net_part *part) {
    static const uint8_t request[ARP_SENDER_MAC] = {0, 1, 8, 0, 6, 4, 0, ARP_REQUEST};
    const uint8_t *const arp = packet + ETHERNET_SIZE;
    uint8_t asks_mac[6], asks[4];
    if (size < ETHERNET_SIZE + ARP_SIZE || !is(arp, request, sizeof request) ||
        !is(arp + ARP_TARGET, net->address, 4)) {
        return NET_NOTHING;
    }
    memcpy(asks_mac, arp + ARP_SENDER_MAC, 6);
    memcpy(asks, arp + ARP_SENDER, 4);
    put_ethernet(net, packet, asks_mac, TYPE_ARP);
    put_arp(net, packet, ARP_REPLY, asks_mac, asks);
    *part = (struct net_part){packet, ETHERNET_SIZE + ARP_SIZE};
    return NET_ANSWER;
}

// An echo of size bytes, with its header, behind an IPv4 header without options.
static enum net_kind on_icmp(struct net *net, uint8_t *packet, size_t size, struct net_part *part) {
    uint8_t *const ip = packet + ETHERNET_SIZE;
    uint8_t *const icmp = ip + IP_SIZE;
    uint8_t asks_mac[6], asks[4];
    if (size < ICMP_SIZE || checksum(0, icmp, size) != 0) {
        net->bad++;
        return NET_NOTHING;
    }
    if (icmp[0] != ICMP_ECHO || icmp[1] != 0) {
        return NET_NOTHING;
    }
    memcpy(asks_mac, packet + FROM, 6);
    memcpy(asks, ip + IP_FROM, 4);
    put_ethernet(net, packet, asks_mac, TYPE_IPV4);
    put_ip(net, ip, asks, IP_ICMP, size);
    icmp[0] = ICMP_ECHO_REPLY;
    put(icmp + ICMP_CHECKSUM, 0);
    put(icmp + ICMP_CHECKSUM, checksum(0, icmp, size));
    *part = (struct net_part){packet, ETHERNET_SIZE + IP_SIZE + size};
    return NET_ANSWER;
}

static enum net_kind on_udp(struct net *net, const uint8_t *packet, uint8_t *udp, size_t size,
                            struct net_part *part) {
    const uint8_t *const ip = packet + ETHERNET_SIZE;
    const size_t length = size < UDP_SIZE ? 0 : get(udp + UDP_LENGTH);
    if (length < UDP_SIZE || length > size ||
        (get(udp + UDP_CHECKSUM) != 0 && checksum(pseudo_sum(ip, length), udp, length) != 0)) {
        net->bad++;
        return NET_NOTHING;
    }
    if (get(udp + UDP_TO) != net->port) {
        return NET_NOTHING;
    }
    memcpy(net->peer_mac, packet + FROM, 6);
    memcpy(net->peer_address, ip + IP_FROM, 4);
    net->peer_port = get(udp + UDP_FROM);
    *part = (struct net_part){udp + UDP_SIZE, length - UDP_SIZE};
    return NET_DATAGRAM;
}

// Whether nobody can be answered at an IPv4 address: none, many, or this very machine.
static int is_no_sender(const uint8_t *address) {
    return address[0] == 0 || address[0] == 127 || address[0] >= 224;
}

static enum net_kind on_ip(struct net *net, uint8_t *packet, size_t size, struct net_part *part) {
    uint8_t *const ip = packet + ETHERNET_SIZE;
    const size_t room = size - ETHERNET_SIZE;
    if (room < IP_SIZE) {
        net->bad++;
        return NET_NOTHING;
    }
    const size_t header = 4 * (size_t)(ip[0] & 15);
    const size_t length = get(ip + IP_LENGTH); // what is behind it fills a short Ethernet frame
    if (ip[0] >> 4 != 4 || header < IP_SIZE || header > length || length > room ||
        checksum(0, ip, header) != 0 || is_no_sender(ip + IP_FROM)) {
        net->bad++;
        return NET_NOTHING;
    }
    if (!is(ip + IP_TO, net->address, 4)) {
        return NET_NOTHING;
    }
    if ((get(ip + IP_FRAGMENT) & IP_PART) != 0) {
        net->fragments++;
        return NET_NOTHING;
    }
    if (ip[IP_PROTOCOL] == IP_UDP) { // options mean nothing to us
        return on_udp(net, packet, ip + header, length - header, part);
    }
    if (ip[IP_PROTOCOL] == IP_ICMP && header == IP_SIZE) {
        return on_icmp(net, packet, length - header, part);
    }
    return NET_NOTHING;
}

enum net_kind net_receive(struct net *net, uint8_t *packet, size_t size, struct net_part *part) {
    if (size < ETHERNET_SIZE || (packet[FROM] & 1) != 0) { // odd: sent by a group, which nobody is
        return NET_NOTHING;
    }
    const uint16_t type = get(packet + TYPE);
    if (type == TYPE_ARP) { // to everybody, as a rule
        return on_arp(net, packet, size, part);
    }
    if (type == TYPE_IPV4 && is(packet + TO, net->mac, 6)) {
        return on_ip(net, packet, size, part);
    }
    return NET_NOTHING;
}
