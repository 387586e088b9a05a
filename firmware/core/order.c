// order.c: Fisher-Yates over a 32-bit xorshift generator.
#include "core/order.h" // itself

// Marsaglia, "Xorshift RNGs" (2003): period 2^32 - 1 for any state but 0.
static uint32_t xorshift(uint32_t *state) {
    uint32_t x = *state;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    *state = x;
    return x;
}

// The finaliser of MurmurHash3 (public domain): spreads neighbouring seeds over all 32 bits.
static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    x ^= x >> 16;
    return x;
}

void order_draw(uint16_t *order, size_t size, uint32_t seed, uint32_t epoch) {
    uint32_t state = mix(seed ^ mix(epoch + 1u));
    if (state == 0) {
        state = 1;
    }
    for (size_t i = 0; i < size; i++) {
        order[i] = (uint16_t)i;
    }
    for (size_t i = size; i > 1; i--) {
        // the high word of a product maps 32 random bits to 0..i-1 without a division
        const size_t j = (size_t)(((uint64_t)xorshift(&state) * i) >> 32);
        const uint16_t swap = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swap;
    }
}
