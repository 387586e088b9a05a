// mve_int8_elementwise.c: what maps elements of 8 bits one by one, with vectors: four at a time.
#include "kernels/int8_simd.h"

#if INT8_MVE

#include <arm_mve.h>

#include "kernels/fast/mve_int8_scale.h" // outputs

#define WIDEN 20 // bits

void int8_rescale(int8_t *y, const int8_t *x, int8_t zero, const struct int8_output *to,
                  size_t size) {
    const struct mve_factor f = mve_factor_of_all(*to->multiplier, *to->shift);
    const struct int8_output output = *to; // which y cannot change
    for (size_t i = 0; i < size; i += 4) {
        const mve_pred16_t there = vctp32q(size - i);
        const int32x4_t values = vsubq_n_s32(vldrbq_z_s32(x + i, there), zero);
        vstrbq_p_s32(y + i, mve_put(values, f, &output), there);
    }
}

// Four elements of an addend.
static inline int32x4_t widened(const int8_t *from, int32_t zero, struct mve_factor f,
                                mve_pred16_t there) {
    const int32x4_t values = vsubq_n_s32(vldrbq_z_s32(from, there), zero);
    return mve_multiply(vshlq_n_s32(values, WIDEN), f);
}

void int8_add(int8_t *y, const int8_t *a, const struct int8_addend *of_a, const int8_t *b,
              const struct int8_addend *of_b, const struct int8_output *to, size_t size) {
    const struct mve_factor f = mve_factor_of_all(*to->multiplier, *to->shift);
    const struct mve_factor f_a = mve_factor_of_all(of_a->multiplier, of_a->shift);
    const struct mve_factor f_b = mve_factor_of_all(of_b->multiplier, of_b->shift);
    const int32_t zero_a = of_a->zero, zero_b = of_b->zero;
    const struct int8_output output = *to;
    for (size_t i = 0; i < size; i += 4) {
        const mve_pred16_t there = vctp32q(size - i);
        const int32x4_t first = widened(a + i, zero_a, f_a, there);
        const int32x4_t sums = vaddq_s32(first, widened(b + i, zero_b, f_b, there));
        vstrbq_p_s32(y + i, mve_put(sums, f, &output), there);
    }
}

#endif // INT8_MVE
