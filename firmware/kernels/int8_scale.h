// int8_scale.h: brings a sum to the scale of an output, rounding as TensorFlow Lite does.
//
// MultiplyByQuantizedMultiplier of TensorFlow Lite with both of its roundings: the upper half of
// the doubled product to the nearest, halves up; then the shift to the right, halves away from 0.
#ifndef INT8_SCALE_H
#define INT8_SCALE_H

#include "kernels/int8.h"

// A multiplier whose shift is apart: to the left goes what is multiplied, to the right the product.
struct int8_factor {
    int32_t multiplier;
    int left, right;
};

static inline struct int8_factor int8_factor(int32_t multiplier, int shift) {
    const int left = shift > 0 ? shift : 0;
    return (struct int8_factor){.multiplier = multiplier, .left = left, .right = left - shift};
}

// value / 2^shift to the nearest, halves away from 0, and `more`. shift is 0 ... 31.
static inline int32_t int8_shift_right(int32_t value, int shift, int32_t more) {
#if defined(__thumb2__)
    // The last bit that leaves is the carry, and rounds up. Halves below 0 are to go down: there 1
    // is taken away before. Where nothing leaves, the carry is that of taking away, and undoes it.
    int32_t found;
    __asm__("adds %0, %1, %1, asr #31\n\t"
            "asrs %0, %0, %2\n\t"
            "adc %0, %0, %3"
            : "=&r"(found)
            : "r"(value), "r"(shift), "rI"(more)
            : "cc");
    return found;
#else
    const int32_t mask = (int32_t)((1u << shift) - 1);
    const int32_t half = (mask >> 1) + (value < 0);
    return (value >> shift) + ((value & mask) > half) + more;
#endif
}

// The upper half of the doubled product to the nearest, halves up.
static inline int32_t int8_upper(int32_t a, int32_t b) {
#if defined(__thumb2__)
    int32_t upper, lower;
    __asm__("smull %1, %0, %2, %3\n\t"
            "lsls %1, %1, #1\n\t"
            "adc %0, %0, %0\n\t"
            "add %0, %0, %1, lsr #31"
            : "=&r"(upper), "=&r"(lower)
            : "r"(a), "r"(b)
            : "cc");
    return upper;
#else
    return (int32_t)(((int64_t)a * b + (1 << 30)) >> 31);
#endif
}

// sum * multiplier / 2^31 * 2^shift, and `more`.
static inline int32_t int8_multiply(int32_t sum, struct int8_factor f, int32_t more) {
    const int32_t shifted = (int32_t)((uint32_t)sum << f.left);
    return int8_shift_right(int8_upper(shifted, f.multiplier), f.right, more);
}

// Into min ... max.
static inline int8_t int8_clamp(int32_t value, struct int8_output to) {
    value = value < to.min ? to.min : value;
    return (int8_t)(value > to.max ? to.max : value);
}

// The output of a sum.
static inline int8_t int8_put(int32_t sum, struct int8_factor f, struct int8_output to) {
    return int8_clamp(int8_multiply(sum, f, to.zero), to);
}

// The factor of multiplier i.
static inline struct int8_factor int8_factor_of(const struct int8_output *to, size_t i) {
    return int8_factor(to->multiplier[i], to->shift[i]);
}

#endif
