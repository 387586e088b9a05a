// seal.h: what stands behind the body of a frame, by which one that is spoilt or forged is told: a
// CRC-32, or where a key is built in, 16 bytes of BLAKE2s (RFC 7693) with a key of the session.
//
// host/splitee_host/wire/seal.py is the other end.
#ifndef SEAL_H
#define SEAL_H

#include <stddef.h>
#include <stdint.h>

#define KEY_SIZE 32u
#define TO_DEVICE 0u
#define TO_HOST 1u

#ifdef KEYED
#include "protocol/blake2s.h"
#define SEAL_SIZE 16u
struct seal {
    struct blake2s hash;
};
extern const uint8_t device_key[KEY_SIZE]; // of key.c, which the host writes beside segment.c
#else
#define SEAL_SIZE 4u
struct seal {
    uint32_t crc;
};
#endif

// What a tag depends on beside the frame's bytes; a CRC-32 does not.
struct sealing {
    const uint8_t *key;
    uint8_t direction; // so that nobody is answered with his own words
    uint16_t turns;    // upper half of the number of which the frame has the lower: never twice
};

void seal_start(struct seal *seal, const struct sealing *how);
void seal_add(struct seal *seal, const uint8_t *bytes, size_t size);
void seal_end(struct seal *seal, uint8_t *end); // SEAL_SIZE bytes

// Whether size bytes have this end.
int seal_holds(const struct sealing *how, const uint8_t *bytes, size_t size, const uint8_t *end);

// CRC-32 (ISO-HDLC, as zlib.crc32): start with crc = 0 and pass the last result on.
uint32_t seal_crc32(uint32_t crc, const uint8_t *bytes, size_t size);

#endif
