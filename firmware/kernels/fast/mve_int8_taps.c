// mve_int8_taps.c: one pixel of a depthwise convolution with vectors: sixteen channels at a time,
// then four.
#include "kernels/int8_simd.h"

#if INT8_MVE

#include <arm_mve.h>

#include "kernels/fast/mve_int8_scale.h" // outputs
#include "kernels/int8_taps.h"

// Sums of every fourth channel, from the first, second, third and fourth on: products of bytes come
// apart into even and odd channels, and so do wider ones. Narrowing puts them together again.
static inline void sixteen(int8_t *y, const int8_t *const *at, size_t from, size_t taps,
                           size_t channels, const int8_t *w, const int32_t *b,
                           const struct int8_output *to, size_t channel) {
    const uint32x4_t fourth = vidupq_n_u32(0, 4);
    const int32x4x4_t biases = vld4q_s32(b + channel);
    int32x4_t s0 = biases.val[0], s1 = biases.val[1], s2 = biases.val[2], s3 = biases.val[3];
    from += channel;
    w += channel;
    for (size_t tap = 0; tap < taps; tap++, w += channels) {
        const int8x16_t x = vldrbq_s8(at[tap] + from), g = vldrbq_s8(w);
        const int16x8_t even = vmullbq_int_s8(x, g), odd = vmulltq_int_s8(x, g);
        s0 = vaddq_s32(s0, vmovlbq_s16(even));
        s2 = vaddq_s32(s2, vmovltq_s16(even));
        s1 = vaddq_s32(s1, vmovlbq_s16(odd));
        s3 = vaddq_s32(s3, vmovltq_s16(odd));
    }
    const int32x4x4_t multipliers = vld4q_s32(to->multiplier + channel);
    const int8_t *shift = to->shift + channel;
#define SCALED(i)                                                                                  \
    mve_multiply(s##i, mve_split(multipliers.val[i], vldrbq_gather_offset_s32(shift + i, fourth)))
    int16x8_t even = vqmovnbq_s32(vuninitializedq_s16(), SCALED(0));
    int16x8_t odd = vqmovnbq_s32(vuninitializedq_s16(), SCALED(1));
    even = vqaddq_n_s16(vqmovntq_s32(even, SCALED(2)), to->zero);
    odd = vqaddq_n_s16(vqmovntq_s32(odd, SCALED(3)), to->zero);
#undef SCALED
    int8x16_t all = vqmovntq_s16(vqmovnbq_s16(vuninitializedq_s8(), even), odd);
    all = vminq_s8(vmaxq_s8(all, vdupq_n_s8(to->min)), vdupq_n_s8(to->max));
    vstrbq_s8(y + channel, all);
}

void int8_taps(int8_t *y, const int8_t *const *at, size_t from, size_t taps, size_t channels,
               const int8_t *w, const int32_t *b, const struct int8_output *to) {
    const struct int8_output output = *to; // which y cannot change
    size_t channel = 0;
    for (; channel + 16 <= channels; channel += 16) {
        sixteen(y, at, from, taps, channels, w, b, &output, channel);
    }
    for (; channel < channels; channel += 4) {
        const mve_pred16_t there = vctp32q(channels - channel);
        int32x4_t sums = vldrwq_z_s32(b + channel, there);
        const int8_t *g = w + channel;
        for (size_t tap = 0; tap < taps; tap++, g += channels) {
            const int32x4_t x = vldrbq_z_s32(at[tap] + from + channel, there);
            sums = vaddq_s32(sums, vmulq_s32(x, vldrbq_z_s32(g, there)));
        }
        const struct mve_factor f = mve_factor(&output, channel, 1, there);
        vstrbq_p_s32(y + channel, mve_put(sums, f, &output), there);
    }
}

#endif // INT8_MVE
