// posix.c: the port for a PC: frames over stdin and stdout, or with --udp over datagrams.
//
//   device                       frames over stdin and stdout, ends at the end of stdin
//   device --udp PORT            frames in datagrams; PORT 0 takes a free one; prints
//          [--bind ADDRESS]      "udp ADDRESS:PORT" (default 127.0.0.1); ends at the end of stdin
//                                too, so that a host that crashed leaves nothing behind
//
// SIGTERM ends it with status 0. Errors go to stderr, status 2.
#define _DEFAULT_SOURCE // getentropy

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "core/port.h"

// A datagram of 1,472 bytes fits one Ethernet packet: 1,444 of body, 5 of header, up to 16 of seal,
// 6 that COBS adds to these, and the zero byte at the end.
#define UDP_BODY_MAX 1444u
#define STREAM_BODY_MAX 65536u
#define DATAGRAM_MAX 65507u

uint32_t port_send_max = STREAM_BODY_MAX;
const uint32_t port_window = 65536; // of a pipe; a socket has three times that

static int udp = -1; // the socket, or -1: stdin and stdout
static struct sockaddr_in peer;
static uint8_t incoming[DATAGRAM_MAX]; // the datagram being read
static size_t incoming_start, incoming_end;
static int begins;                     // whether what was read last is the beginning of a datagram
static uint8_t outgoing[DATAGRAM_MAX]; // the frame being written
static size_t outgoing_size;

static _Noreturn void fail(const char *what) {
    perror(what);
    exit(2);
}

static _Noreturn void usage(void) {
    fputs("usage: device [--udp PORT [--bind ADDRESS]]\n", stderr);
    exit(2);
}

static void on_terminate(int signal_number) {
    (void)signal_number;
    _exit(0);
}

static void open_udp(const char *address, const char *port) {
    char *end;
    const unsigned long number = strtoul(port, &end, 10);
    struct sockaddr_in local = {.sin_family = AF_INET};
    if (*port == '\0' || *end != '\0' || number > 65535 ||
        inet_pton(AF_INET, address, &local.sin_addr) != 1) {
        usage();
    }
    local.sin_port = htons((uint16_t)number);
    udp = socket(AF_INET, SOCK_DGRAM, 0);
    if (udp < 0 || bind(udp, (struct sockaddr *)&local, sizeof local) != 0) {
        fail("cannot bind the UDP port");
    }
    socklen_t size = sizeof local;
    if (getsockname(udp, (struct sockaddr *)&local, &size) != 0) {
        fail("getsockname");
    }
    printf("udp %s:%u\n", address, (unsigned)ntohs(local.sin_port));
    fflush(stdout);
}

void port_init(int argc, char **argv) {
    const char *udp_port = NULL;
    const char *address = NULL;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && strcmp(argv[i], "--udp") == 0) {
            udp_port = argv[i + 1];
        } else if (i + 1 < argc && strcmp(argv[i], "--bind") == 0) {
            address = argv[i + 1];
        } else {
            usage();
        }
    }
    const struct sigaction terminate = {.sa_handler = on_terminate};
    if (sigaction(SIGTERM, &terminate, NULL) != 0) {
        fail("sigaction");
    }
    if (udp_port != NULL) {
        port_send_max = UDP_BODY_MAX;
        open_udp(address != NULL ? address : "127.0.0.1", udp_port);
    } else if (address != NULL) {
        usage();
    }
}

// Reads what stdin has; its end is the end of the program.
static size_t read_stdin(uint8_t *buffer, size_t size) {
    ssize_t count;
    do {
        count = read(STDIN_FILENO, buffer, size);
    } while (count < 0 && errno == EINTR);
    if (count < 0) {
        fail("stdin");
    }
    if (count == 0) {
        exit(0);
    }
    return (size_t)count;
}

// Waits for a datagram. What comes on stdin meanwhile is thrown away: only its end matters.
static void receive_datagram(void) {
    struct pollfd wait[2] = {{.fd = udp, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    do {
        if (poll(wait, 2, -1) < 0) {
            if (errno == EINTR) {
                continue;
            }
            fail("poll");
        }
        if (wait[1].revents != 0) {
            uint8_t ignored[256];
            (void)read_stdin(ignored, sizeof ignored);
        }
    } while (wait[0].revents == 0);
    socklen_t peer_size = sizeof peer;
    const ssize_t count = recvfrom(udp, incoming, sizeof incoming, MSG_DONTWAIT,
                                   (struct sockaddr *)&peer, &peer_size);
    // There may be nothing after all: the system drops a datagram with a wrong checksum only now.
    incoming_start = 0;
    incoming_end = count < 0 ? 0 : (size_t)count;
}

size_t port_read(uint8_t *buffer, size_t size) {
    if (udp < 0) {
        return read_stdin(buffer, size);
    }
    while (incoming_start == incoming_end) {
        receive_datagram();
    }
    const size_t left = incoming_end - incoming_start;
    const size_t count = left < size ? left : size;
    memcpy(buffer, incoming + incoming_start, count);
    begins = incoming_start == 0;
    incoming_start += count;
    return count;
}

int port_begins(void) {
    return begins;
}

static void write_stdout(void) {
    size_t sent = 0;
    while (sent < outgoing_size) {
        const ssize_t count = write(STDOUT_FILENO, outgoing + sent, outgoing_size - sent);
        if (count < 0 && errno != EINTR) {
            fail("stdout");
        }
        sent += count < 0 ? 0 : (size_t)count;
    }
    outgoing_size = 0;
}

void port_write(const uint8_t *bytes, size_t size) {
    while (size > 0) {
        const size_t room = sizeof outgoing - outgoing_size;
        const size_t count = size < room ? size : room;
        memcpy(outgoing + outgoing_size, bytes, count);
        outgoing_size += count;
        bytes += count;
        size -= count;
        if (size > 0) { // full
            if (udp >= 0) {
                fputs("a frame is longer than a datagram\n", stderr);
                exit(2);
            }
            write_stdout();
        }
    }
}

void port_flush(void) {
    if (udp < 0) {
        write_stdout();
        return;
    }
    // A datagram may be lost on its way anyway: one that cannot be sent is one more.
    (void)sendto(udp, outgoing, outgoing_size, 0, (struct sockaddr *)&peer, sizeof peer);
    outgoing_size = 0;
}

uint32_t port_micros(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint32_t)now.tv_sec * 1000000u + (uint32_t)(now.tv_nsec / 1000);
}

// The system gives this process a stack, and more of it when it is full.
uint32_t port_stack_used(void) {
    return 0;
}

// The system keeps such figures for all of its programs together.
uint32_t port_dropped(void) {
    return 0;
}

int port_entropy(uint8_t *bytes, size_t size) {
    return getentropy(bytes, size) == 0;
}
