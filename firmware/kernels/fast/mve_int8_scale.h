// mve_int8_scale.h: int8_scale.h with vectors: four sums become outputs at once.
#ifndef MVE_INT8_SCALE_H
#define MVE_INT8_SCALE_H

#include <arm_mve.h>

#include "kernels/int8.h"

// The factors of four channels, or one of them four times.
struct mve_factor {
    int32x4_t multiplier, left, right; // a shift to the right is less than 0 here
};

static inline struct mve_factor mve_split(int32x4_t multiplier, int32x4_t shift) {
    const int32x4_t none = vdupq_n_s32(0);
    return (struct mve_factor){multiplier, vmaxq_s32(shift, none), vminq_s32(shift, none)};
}

static inline struct mve_factor mve_factor_of_all(int32_t multiplier, int shift) {
    return mve_split(vdupq_n_s32(multiplier), vdupq_n_s32(shift));
}

// Those of the channels that are there, from `first` on; step 0: all of them have one.
static inline struct mve_factor mve_factor(const struct int8_output *to, size_t first, size_t step,
                                           mve_pred16_t there) {
    if (step == 0) {
        return mve_factor_of_all(*to->multiplier, *to->shift);
    }
    return mve_split(vldrwq_z_s32(to->multiplier + first, there),
                     vldrbq_z_s32(to->shift + first, there));
}

// sum * multiplier / 2^31 * 2^shift. Halves below 0 are to go down, after the shift to the right,
// which rounds up: there 1 is taken away before.
static inline int32x4_t mve_multiply(int32x4_t sums, struct mve_factor f) {
    const int32x4_t high = vqrdmulhq_s32(vshlq_s32(sums, f.left), f.multiplier);
    const int32x4_t below = vshrq_n_s32(vandq_s32(high, f.right), 31);
    return vrshlq_s32(vaddq_s32(high, below), f.right);
}

static inline int32x4_t mve_clamp(int32x4_t values, const struct int8_output *to) {
    return vminq_s32(vmaxq_s32(values, vdupq_n_s32(to->min)), vdupq_n_s32(to->max));
}

static inline int32x4_t mve_put(int32x4_t sums, struct mve_factor f, const struct int8_output *to) {
    return mve_clamp(vaddq_n_s32(mve_multiply(sums, f), to->zero), to);
}

#endif
