// blake2s_check.c: a firmware that hashes what RFC 7693's self-test hashes, and more, for the tests
// on boards.
//
// It writes a line for each digest, in hexadecimal, and then "end".
#include <string.h>

#include "core/port.h" // link
#include "protocol/blake2s.h"

static void write_line(const uint8_t *digest, size_t size) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < size; i++) {
        const uint8_t pair[2] = {(uint8_t)digits[digest[i] >> 4], (uint8_t)digits[digest[i] & 15]};
        port_write(pair, 2);
    }
    port_write((const uint8_t *)"\n", 1);
    port_flush();
}

// Appendix E's deterministic sequence.
static void fill(uint8_t *out, size_t size, uint32_t seed) {
    uint32_t a = 0xDEAD4BADu * seed, b = 1;
    for (size_t i = 0; i < size; i++) {
        const uint32_t t = a + b;
        a = b;
        b = t;
        out[i] = (uint8_t)(t >> 24);
    }
}

static uint8_t message[1024], digest[BLAKE2S_DIGEST_MAX], key[BLAKE2S_KEY_MAX];

// Bytes that lie at the very end of the message, where a sanitizer sees who reads on.
static const uint8_t *last(size_t size) {
    return message + sizeof message - size;
}

// Appendix E: digests and messages of several sizes, without and with a key, all hashed in turn.
static void self_test(void) {
    static const uint8_t digest_sizes[] = {16, 20, 28, 32};
    static const uint16_t sizes[] = {0, 3, 64, 65, 255, 1024};
    struct blake2s all, one;
    blake2s_init(&all, 32, NULL, 0);
    for (size_t i = 0; i < sizeof digest_sizes; i++) {
        const size_t digest_size = digest_sizes[i];
        for (size_t j = 0; j < 12; j++) {
            const size_t size = sizes[j / 2], key_size = j % 2 ? digest_size : 0;
            fill(message + sizeof message - size, size, (uint32_t)size);
            fill(key, key_size, (uint32_t)key_size);
            blake2s_init(&one, digest_size, key, key_size);
            blake2s_update(&one, last(size), size);
            blake2s_final(&one, digest);
            blake2s_update(&all, digest, digest_size);
        }
    }
    blake2s_final(&all, digest);
    write_line(digest, sizeof digest);
}

// Every length up to 300 in pieces that grow, with keys and digests of every size.
static void lengths(void) {
    struct blake2s all, one;
    blake2s_init(&all, 32, NULL, 0);
    fill(message, sizeof message, 1);
    fill(key, sizeof key, 2);
    for (size_t size = 0; size <= 300; size++) {
        const size_t key_size = size % 33, digest_size = 1 + size % 32;
        const uint8_t *const from = last(size);
        blake2s_init(&one, digest_size, key + sizeof key - key_size, key_size);
        for (size_t at = 0, piece = 0; at < size; at += piece) {
            piece = piece + 1 < size - at ? piece + 1 : size - at;
            blake2s_update(&one, from + at, piece);
        }
        blake2s_final(&one, digest + sizeof digest - digest_size);
        blake2s_update(&all, digest + sizeof digest - digest_size, digest_size);
    }
    blake2s_final(&all, digest);
    write_line(digest, sizeof digest);
}

int main(int argc, char **argv) {
    port_init(argc, argv);
    self_test();
    lengths();
    port_write((const uint8_t *)"end\n", 4);
    port_flush();
    uint8_t byte;
    for (;;) {
        (void)port_read(&byte, 1);
    }
}
