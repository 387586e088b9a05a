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
    // is taken away before. Where nothing leaves, the carry stays that of adding nothing.
    const int32_t below = value & -shift;
    int32_t found;
    __asm__("adds %0, %1, %2, asr #31\n\t"
            "asrs %0, %0, %3\n\t"
            "adc %0, %0, %4"
            : "=&r"(found)
            : "r"(value), "r"(below), "r"(shift), "r"(more)
            : "cc");
    return found;
#else
    const int32_t mask = (int32_t)((1u << shift) - 1);
    const int32_t half = (mask >> 1) + (value < 0);
    return (value >> shift) + ((value & mask) > half) + more;
#endif
}

// sum * multiplier / 2^31 * 2^shift, and `more`.
static inline int32_t int8_multiply(int32_t sum, struct int8_factor f, int32_t more) {
    const int64_t product = (int64_t)(int32_t)((uint32_t)sum << f.left) * f.multiplier;
    return int8_shift_right((int32_t)((product + (1 << 30)) >> 31), f.right, more);
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
