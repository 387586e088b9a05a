// blake2s.c: RFC 7693's compression, with the names that it uses, and the blocks that it is fed;
// blake2s.h is the manual.
#include "protocol/blake2s.h" // itself

#include <string.h> // memcpy, memset

#include "protocol/bytes.h" // little endian

#define ROUNDS 10

// Section 2.6: the fractions of the square roots of the first eight primes, as in SHA-256.
static const uint32_t iv[8] = {
    0x6A09E667u, 0xBB67AE85u, 0x3C6EF372u, 0xA54FF53Au,
    0x510E527Fu, 0x9B05688Cu, 0x1F83D9ABu, 0x5BE0CD19u,
};

// Section 2.7: the order in which each round takes the words of the message.
static const uint8_t sigma[ROUNDS][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

static inline uint32_t rotate(uint32_t x, unsigned right) {
    return x >> right | x << (32 - right);
}

// Section 3.1: mixes two words of the message into four of the state.
static inline void mix(uint32_t *v, unsigned a, unsigned b, unsigned c, unsigned d, uint32_t x,
                       uint32_t y) {
    v[a] += v[b] + x;
    v[d] = rotate(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = rotate(v[b] ^ v[c], 12);
    v[a] += v[b] + y;
    v[d] = rotate(v[d] ^ v[a], 8);
    v[c] += v[d];
    v[b] = rotate(v[b] ^ v[c], 7);
}

// Section 3.2: takes in the block, of which size bytes count.
static void compress(struct blake2s *hash, size_t size, int last) {
    uint32_t v[16], m[16];
    hash->count += size;
    for (size_t i = 0; i < 16; i++) {
        m[i] = bytes_get_u32(hash->block + 4 * i);
    }
    memcpy(v, hash->chain, sizeof hash->chain);
    memcpy(v + 8, iv, sizeof iv);
    v[12] ^= (uint32_t)hash->count;
    v[13] ^= (uint32_t)(hash->count >> 32);
    v[14] = last ? ~v[14] : v[14];
    for (size_t round = 0; round < ROUNDS; round++) {
        const uint8_t *s = sigma[round];
        mix(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
        mix(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
        mix(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
        mix(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
        mix(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
        mix(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
        mix(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
        mix(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
    }
    for (size_t i = 0; i < 8; i++) {
        hash->chain[i] ^= v[i] ^ v[i + 8];
    }
}

void blake2s_init(struct blake2s *hash, size_t digest_size, const uint8_t *key, size_t key_size) {
    memcpy(hash->chain, iv, sizeof iv);
    hash->chain[0] ^= 0x01010000u ^ (uint32_t)key_size << 8 ^ (uint32_t)digest_size;
    hash->count = 0;
    hash->filled = 0;
    hash->digest_size = (uint8_t)digest_size;
    if (key_size > 0) { // section 3.3: a key is a first block of its own
        memset(hash->block, 0, sizeof hash->block);
        memcpy(hash->block, key, key_size);
        hash->filled = BLAKE2S_BLOCK_SIZE;
    }
}

void blake2s_update(struct blake2s *hash, const uint8_t *bytes, size_t size) {
    while (size > 0) {
        // A full block waits for the next byte: the last one is compressed in another way.
        if (hash->filled == BLAKE2S_BLOCK_SIZE) {
            compress(hash, BLAKE2S_BLOCK_SIZE, 0);
            hash->filled = 0;
        }
        const size_t room = BLAKE2S_BLOCK_SIZE - hash->filled;
        const size_t count = size < room ? size : room;
        memcpy(hash->block + hash->filled, bytes, count);
        hash->filled = (uint8_t)(hash->filled + count);
        bytes += count;
        size -= count;
    }
}

void blake2s_final(struct blake2s *hash, uint8_t *digest) {
    memset(hash->block + hash->filled, 0, BLAKE2S_BLOCK_SIZE - hash->filled);
    compress(hash, hash->filled, 1);
    for (size_t i = 0; i < hash->digest_size; i++) {
        digest[i] = (uint8_t)(hash->chain[i / 4] >> 8 * (i % 4));
    }
}

int blake2s_same(const uint8_t *a, const uint8_t *b, size_t size) {
    uint8_t differs = 0;
    for (size_t i = 0; i < size; i++) {
        // volatile: a compiler that sees the loop's purpose could end it at the first difference
        const volatile uint8_t ours = a[i], theirs = b[i];
        differs = (uint8_t)(differs | (ours ^ theirs));
    }
    return differs == 0;
}
