// half.c: IEEE 754 binary16, half the bytes of a float, for tensors that are kept or sent.
#include "kernels/kernels.h"

// Every FPU of a Cortex-M converts by one instruction. The bit of __ARM_FP that would say so is
// left out by gcc where there is no double precision.
#if defined(__ARM_FP16_FORMAT_IEEE) && defined(__ARM_FP)

void half_pack(uint16_t *h, const float *x, size_t size) {
    for (size_t i = 0; i < size; i++) {
        const union {
            __fp16 value;
            uint16_t bits;
        } half = {(__fp16)x[i]};
        h[i] = half.bits;
    }
}

void half_unpack(float *x, const uint16_t *h, size_t size) {
    for (size_t i = 0; i < size; i++) {
        const union {
            uint16_t bits;
            __fp16 value;
        } half = {h[i]};
        x[i] = half.value;
    }
}

#else

typedef uint32_t __attribute__((may_alias)) word; // the bits of a float

// Exponents stand at bit 23 of a float, biased by 127, and at bit 10 of a half, biased by 15.
#define REBIAS ((uint32_t)(127 - 15) << 23)

// bits / 2^shift to the nearest integer, of two as near the even one.
static inline uint32_t rounded(uint32_t bits, uint32_t shift) {
    const uint32_t odd = bits >> shift & 1;
    return (bits + (1u << (shift - 1)) - 1 + odd) >> shift;
}

static uint32_t pack(uint32_t magnitude) {
    if (magnitude > 0x7F800000) { // NaN: made quiet, what fits of its payload kept, as cores do
        return 0x7E00 | (magnitude >> 13 & 0x1FF);
    }
    if (magnitude >= 0x47800000) { // 65536; what is rounded up to that carries into infinity below
        return 0x7C00;
    }
    if (magnitude >= 0x38800000) { // 2^-14, the smallest normal half
        return rounded(magnitude - REBIAS, 13);
    }
    if (magnitude < 0x33000000) { // 2^-25, half of the smallest subnormal half
        return 0;
    }
    const uint32_t exponent = magnitude >> 23; // 102 to 112
    return rounded((magnitude & 0x7FFFFF) | 0x800000, 126 - exponent);
}

void half_pack(uint16_t *h, const float *x, size_t size) {
    const word *from = (const word *)x;
    for (size_t i = 0; i < size; i++) {
        h[i] = (uint16_t)((from[i] >> 16 & 0x8000) | pack(from[i] & 0x7FFFFFFF));
    }
}

static uint32_t unpack(uint32_t magnitude) {
    if (magnitude > 0x7C00) { // NaN, made quiet
        return 0x7FC00000 | magnitude << 13;
    }
    if (magnitude == 0x7C00) {
        return 0x7F800000;
    }
    if (magnitude >= 0x400) {
        return (magnitude << 13) + REBIAS;
    }
    const union {
        float value;
        uint32_t bits;
    } subnormal = {(float)magnitude * 0x1p-24f};
    return subnormal.bits;
}

void half_unpack(float *x, const uint16_t *h, size_t size) {
    word *to = (word *)x;
    for (size_t i = 0; i < size; i++) {
        to[i] = (uint32_t)(h[i] & 0x8000) << 16 | unpack(h[i] & 0x7FFF);
    }
}

#endif
