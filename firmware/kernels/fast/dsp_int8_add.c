// dsp_int8_add.c: adds elements of 8 bits by SMMULR: the rounded upper half of a product is one
// instruction where the factor has been doubled before, for which there is room here.
#include "kernels/fast/dsp.h"

#if INT8_DSP

#include "kernels/fast/dsp_int8_add.h"

#define WIDEN 21 // bits: twice 2^20

static inline int32_t upper(int32_t doubled, int32_t multiplier) {
    int32_t found;
    __asm__("smmulr %0, %1, %2" : "=r"(found) : "r"(doubled), "r"(multiplier));
    return found;
}

// (value - zero) * 2^21; from is zero * 2^21.
static inline int32_t widened(int32_t value, int32_t from) {
    return (int32_t)((uint32_t)value << WIDEN) - from;
}

void dsp_int8_add(int8_t *y, const int8_t *a, const struct int8_addend *of_a, const int8_t *b,
                  const struct int8_addend *of_b, const struct int8_output *to, size_t size) {
    const struct int8_output output = *to; // which y cannot change
    const int narrow = dsp_narrow(to);
    const int32_t multiplier = *to->multiplier;
    const int32_t multiplier_a = of_a->multiplier, multiplier_b = of_b->multiplier;
    const int right = -*to->shift, right_a = -of_a->shift, right_b = -of_b->shift;
    const int32_t zero_a = of_a->zero * (1 << WIDEN), zero_b = of_b->zero * (1 << WIDEN);
    for (size_t i = 0; i < size; i++) {
        const int32_t high_a = upper(widened(a[i], zero_a), multiplier_a);
        const int32_t high_b = upper(widened(b[i], zero_b), multiplier_b);
        const int32_t sum = int8_shift_right(high_b, right_b, int8_shift_right(high_a, right_a, 0));
        const int32_t high = upper(2 * sum, multiplier);
        y[i] = dsp_clamp(int8_shift_right(high, right, output.zero), output, narrow);
    }
}

#endif // INT8_DSP
