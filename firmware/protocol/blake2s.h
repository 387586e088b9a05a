// blake2s.h: BLAKE2s (RFC 7693), a hash of up to 32 bytes, with or without a key.
//
//     struct blake2s hash;
//     uint8_t tag[16];
//     blake2s_init(&hash, sizeof tag, key, key_size);
//     blake2s_update(&hash, header, header_size); // as often as there are pieces
//     blake2s_final(&hash, tag);
//
// With a key it is a message authentication code. Python's other end is hashlib.blake2s.
#ifndef BLAKE2S_H
#define BLAKE2S_H

#include <stddef.h>
#include <stdint.h>

#define BLAKE2S_DIGEST_MAX 32u
#define BLAKE2S_KEY_MAX 32u
#define BLAKE2S_BLOCK_SIZE 64u

// A hash under way. Start it with blake2s_init; it may be copied, and each copy goes on by itself.
struct blake2s {
    uint32_t chain[8];
    uint64_t count; // bytes that the chain has taken in
    uint8_t block[BLAKE2S_BLOCK_SIZE];
    uint8_t filled; // bytes of the block in use
    uint8_t digest_size;
};

// digest_size: 1 to 32 bytes; it is part of what is hashed, a shorter digest is no longer one cut
// off. key: key_size bytes, 0 to 32; not needed afterwards, and NULL will do where there are none.
void blake2s_init(struct blake2s *hash, size_t digest_size, const uint8_t *key, size_t key_size);

// Takes in size bytes; whatever the pieces, the digest is that of all of them in a row.
void blake2s_update(struct blake2s *hash, const uint8_t *bytes, size_t size);

// Writes digest_size bytes to digest; the hash is used up.
void blake2s_final(struct blake2s *hash, uint8_t *digest);

// Whether two tags are the same. How long it takes depends on size alone, so that a forger does not
// learn from it how many bytes of a guess were right.
int blake2s_same(const uint8_t *a, const uint8_t *b, size_t size);

#endif
