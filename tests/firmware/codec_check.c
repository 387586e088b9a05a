// codec_check.c: a firmware that codes what it is sent, for the tests on boards.
//
// A request is six numbers, u32 little endian: ENCODE or DECODE, kind, kept, elements, samples, and
// bytes a piece or samples held. Floats follow, and are answered by their code; or a code, which is
// answered by how many of its samples are good, and by floats. In front of either is its size.
#include <string.h>

#include "core/port.h"      // link
#include "protocol/bytes.h" // little endian
#include "protocol/codec.h" // what is tested

enum { ENCODE = 1, DECODE };

#define VALUES 16384u

// What is worked on lies at the end of these, so that a sanitizer sees whoever goes beyond.
static float values[VALUES];
static uint8_t code[4 * VALUES];
static uint8_t piece[4096];

static void receive(uint8_t *to, size_t size) {
    while (size > 0) {
        const size_t count = port_read(to, size);
        to += count;
        size -= count;
    }
}

static void send(const uint8_t *from, size_t size) {
    uint8_t head[4];
    bytes_put_u32(head, (uint32_t)size);
    port_write(head, sizeof head);
    port_flush();
    while (size > 0) {
        const size_t length = size < 1024 ? size : 1024; // a datagram, where the link has those
        port_write(from, length);
        port_flush();
        from += length;
        size -= length;
    }
}

static void encode(const struct coder *c, uint32_t samples, uint32_t step) {
    float *const x = values + VALUES - samples * c->elements;
    const uint32_t size = samples * codec_size(c);
    uint8_t *const to = code + sizeof code - size;
    struct codec_sample known = {0};
    receive((uint8_t *)x, samples * c->elements * sizeof(float));
    for (uint32_t first = 0; first < size; first += step) {
        const size_t length = size - first < step ? size - first : step;
        uint8_t *const end = piece + sizeof piece - length;
        codec_encode(c, &known, x, first, end, length);
        memcpy(to + first, end, length);
    }
    send(to, size);
}

static void decode(const struct coder *c, uint32_t samples, uint32_t held) {
    float *const x = values + VALUES - held * c->elements;
    uint8_t count[4];
    receive(codec_place(c, x, held), samples * codec_size(c));
    bytes_put_u32(count, codec_decode(c, x, held, samples));
    port_write(count, sizeof count);
    port_flush();
    send((const uint8_t *)x, samples * c->elements * sizeof(float));
}

int main(int argc, char **argv) {
    port_init(argc, argv);
    for (;;) {
        uint8_t head[6 * 4];
        uint32_t n[6];
        receive(head, sizeof head);
        for (size_t i = 0; i < 6; i++) {
            n[i] = bytes_get_u32(head + 4 * i);
        }
        const struct coder c = {
            .kind = (uint8_t)n[1],
            .kept = (uint16_t)n[2],
            .elements = n[3],
        };
        if (n[0] == ENCODE) {
            encode(&c, n[4], n[5]);
        } else {
            decode(&c, n[4], n[5]);
        }
    }
}
