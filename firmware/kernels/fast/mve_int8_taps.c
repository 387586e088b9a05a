// mve_int8_taps.c: one pixel of a depthwise convolution with vectors: sixteen channels at a time,
// then four.
#include "kernels/int8_simd.h"

#if INT8_MVE

#include <arm_mve.h>

#include "kernels/fast/mve_int8_scale.h" // outputs
#include "kernels/int8_taps.h"

void int8_taps(int8_t *y, const int8_t *const *at, size_t taps, size_t channels, const int8_t *w,
               const int32_t *b, const struct int8_output *to) {
    const struct int8_output output = *to; // which y cannot change
    const mve_pred16_t all = vctp32q(4);
    size_t channel = 0;
    for (; channel + 16 <= channels; channel += 16) {
        int32x4_t sums[4];
        for (size_t i = 0; i < 4; i++) {
            sums[i] = vldrwq_s32(b + channel + 4 * i);
        }
        const int8_t *g = w + channel;
        for (size_t tap = 0; tap < taps; tap++, g += channels) {
            const int8_t *x = at[tap] + channel;
            for (size_t i = 0; i < 4; i++) {
                const int32x4_t products = vmulq_s32(vldrbq_s32(x + 4 * i), vldrbq_s32(g + 4 * i));
                sums[i] = vaddq_s32(sums[i], products);
            }
        }
        for (size_t i = 0; i < 4; i++) {
            const struct mve_factor f = mve_factor(&output, channel + 4 * i, 1, all);
            vstrbq_s32(y + channel + 4 * i, mve_put(sums[i], f, &output));
        }
    }
    for (; channel < channels; channel += 4) {
        const mve_pred16_t there = vctp32q(channels - channel);
        int32x4_t sums = vldrwq_z_s32(b + channel, there);
        const int8_t *g = w + channel;
        for (size_t tap = 0; tap < taps; tap++, g += channels) {
            const int32x4_t x = vldrbq_z_s32(at[tap] + channel, there);
            sums = vaddq_s32(sums, vmulq_s32(x, vldrbq_z_s32(g, there)));
        }
        const struct mve_factor f = mve_factor(&output, channel, 1, there);
        vstrbq_p_s32(y + channel, mve_put(sums, f, &output), there);
    }
}

#endif // INT8_MVE
