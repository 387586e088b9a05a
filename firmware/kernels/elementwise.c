// elementwise.c: what is done to each element on its own.
#include "kernels/kernels.h"

// The bits of a float as an integer: from 0 up they are in the order of the floats, and all others
// are negative. Integers are compared faster, above all on a core without an FPU.
typedef int32_t __attribute__((may_alias)) word;

#define SIX 0x40C00000 // the bits of 6.0f

static inline int32_t relu(int32_t x) {
    return x > 0 ? x : 0; // one instruction on Arm
}

static inline int32_t relu6(int32_t x) {
    return relu(x) - relu(relu(x) - SIX);
}

// All ones where the gradient passes, else 0. No comparison, which would take longer: the highest
// bit of -x is set, and that of x is not: it alone would let -0.0 pass.
static inline int32_t relu_mask(int32_t x) {
    const uint32_t bits = (uint32_t)x;
    return (int32_t)(-bits & ~bits) >> 31;
}

// The highest bit of x - 6 is set too; that of -0.0 - 6 is not.
static inline int32_t relu6_mask(int32_t x) {
    const uint32_t bits = (uint32_t)x;
    return (int32_t)(-bits & (bits - SIX)) >> 31;
}

// One element of eight; returns its bit in the byte of all.
static inline uint32_t forward_one(word *y, const word *x, size_t i, int six) {
    const int32_t value = x[i];
    y[i] = six ? relu6(value) : relu(value);
    return (uint32_t)(six ? relu6_mask(value) : relu_mask(value)) >> 31 << i;
}

static inline void forward_bits(word *y, uint8_t *bits, const word *x, size_t size, int six) {
    for (; size >= 8; size -= 8, y += 8, x += 8) {
        uint32_t byte = 0;
        for (size_t i = 0; i < 8; i++) {
            byte |= forward_one(y, x, i, six);
        }
        *bits++ = (uint8_t)byte;
    }
    if (size > 0) {
        uint32_t byte = 0;
#pragma GCC unroll 1 // few elements, and much code otherwise
        for (size_t i = 0; i < size; i++) {
            byte |= forward_one(y, x, i, six);
        }
        *bits = (uint8_t)byte;
    }
}

void relu_forward(float *y, const float *x, size_t size) {
    word *to = (word *)y;
    const word *from = (const word *)x;
    for (size_t i = 0; i < size; i++) {
        to[i] = relu(from[i]);
    }
}

void relu_forward_bits(float *y, uint8_t *bits, const float *x, size_t size) {
    forward_bits((word *)y, bits, (const word *)x, size, 0);
}

void relu_backward(float *d, const float *y, size_t size) {
    word *to = (word *)d;
    const word *from = (const word *)y;
    for (size_t i = 0; i < size; i++) {
        to[i] &= relu_mask(from[i]);
    }
}

void relu_backward_bits(float *d, const uint8_t *bits, size_t size) {
    word *to = (word *)d;
    for (; size >= 8; size -= 8, to += 8) {
        const uint32_t byte = *bits++;
        for (size_t i = 0; i < 8; i++) {
            to[i] &= -(int32_t)(byte >> i & 1);
        }
    }
#pragma GCC unroll 1
    for (size_t i = 0; i < size; i++) {
        to[i] &= -(int32_t)(*bits >> i & 1);
    }
}

void relu6_forward(float *y, const float *x, size_t size) {
    word *to = (word *)y;
    const word *from = (const word *)x;
    for (size_t i = 0; i < size; i++) {
        to[i] = relu6(from[i]);
    }
}

void relu6_forward_bits(float *y, uint8_t *bits, const float *x, size_t size) {
    forward_bits((word *)y, bits, (const word *)x, size, 1);
}

void relu6_backward(float *d, const float *y, size_t size) {
    word *to = (word *)d;
    const word *from = (const word *)y;
    for (size_t i = 0; i < size; i++) {
        to[i] &= relu6_mask(from[i]);
    }
}

void add_forward(float *y, const float *a, const float *b, size_t size) {
    for (size_t i = 0; i < size; i++) {
        y[i] = a[i] + b[i];
    }
}

void gradient_add(float *to, const float *from, size_t size) {
    for (size_t i = 0; i < size; i++) {
        to[i] += from[i];
    }
}

void gradient_weigh(float *g, float weight, size_t size) {
    for (size_t i = 0; i < size; i++) {
        g[i] = weight == 0 ? 0 : weight * g[i]; // 0 * NaN would stay NaN
    }
}

void normalize_forward(float *y, const uint8_t *images, const float *scale, const float *shift,
                       size_t channels, size_t area, size_t n) {
    // Upwards: image bytes at the end of y are then read before the float that covers them is
    // written (float i ends at byte 4i + 3, byte i + 1 lies at 3 * size + i + 1).
    for (size_t plane = 0; plane < n * channels; plane++) {
        const float slope = scale[plane % channels], start = shift[plane % channels];
        for (size_t i = plane * area; i < (plane + 1) * area; i++) {
            y[i] = (float)images[i] * slope + start;
        }
    }
}
