// int8_elementwise.c: what maps elements of 8 bits one by one.
#include "kernels/int8_simd.h" // whether there is something faster

#if !INT8_MVE

#include "kernels/fast/dsp_int8_add.h" // one of them
#include "kernels/int8.h"
#include "kernels/int8_scale.h" // outputs

#define MANY 512 // elements: for as many a table of all 256 values has paid

void int8_rescale(int8_t *y, const int8_t *x, int8_t zero, const struct int8_output *to,
                  size_t size) {
    const struct int8_factor f = int8_factor_of(to, 0);
    const struct int8_output output = *to; // which y cannot change
    if (size < MANY) {
        for (size_t i = 0; i < size; i++) {
            y[i] = int8_put(x[i] - zero, f, output);
        }
        return;
    }
    int8_t table[1 << 8]; // by the value as an unsigned one
    for (int32_t value = INT8_MIN; value <= INT8_MAX; value++) {
        table[(uint8_t)value] = int8_put(value - zero, f, output);
    }
    for (size_t i = 0; i < size; i++) {
        y[i] = table[(uint8_t)x[i]];
    }
}

#define WIDEN (1 << 20)

void int8_add(int8_t *y, const int8_t *a, const struct int8_addend *of_a, const int8_t *b,
              const struct int8_addend *of_b, const struct int8_output *to, size_t size) {
    if (INT8_DSP && *to->shift <= 0) {
        dsp_int8_add(y, a, of_a, b, of_b, to, size);
        return;
    }
    const struct int8_factor f = int8_factor_of(to, 0);
    const struct int8_factor f_a = int8_factor(of_a->multiplier, of_a->shift);
    const struct int8_factor f_b = int8_factor(of_b->multiplier, of_b->shift);
    const int32_t zero_a = of_a->zero, zero_b = of_b->zero;
    const struct int8_output output = *to;
    for (size_t i = 0; i < size; i++) {
        const int32_t first = int8_multiply((a[i] - zero_a) * WIDEN, f_a, 0);
        y[i] = int8_put(int8_multiply((b[i] - zero_b) * WIDEN, f_b, first), f, output);
    }
}

#endif
