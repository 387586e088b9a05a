// dsp_int8_taps.c: one pixel of a depthwise convolution, four channels at a time: what they see and
// their weights are loaded and unpacked together.
#include "kernels/fast/dsp.h"

#if INT8_DSP

#include "kernels/int8_taps.h"

void int8_taps(int8_t *y, const int8_t *const *at, size_t from, size_t taps, size_t channels,
               const int8_t *w, const int32_t *b, const struct int8_output *to) {
    const struct int8_output output = *to; // which y cannot change
    const int narrow = dsp_narrow(to);
    size_t channel = 0;
    for (; channel + 4 <= channels; channel += 4) {
        int32_t s0 = b[channel], s1 = b[channel + 1], s2 = b[channel + 2], s3 = b[channel + 3];
        const int8_t *weights = w + channel;
        for (size_t tap = 0; tap < taps; tap++, weights += channels) {
            const uint32_t seen = dsp_load(at[tap] + from + channel), g = dsp_load(weights);
            const int16x2_t x02 = dsp_even(seen), x13 = dsp_odd(seen);
            const int16x2_t g02 = dsp_even(g), g13 = dsp_odd(g);
            s0 = __smlabb(x02, g02, s0);
            s1 = __smlabb(x13, g13, s1);
            s2 = __smlatt(x02, g02, s2);
            s3 = __smlatt(x13, g13, s3);
        }
        const int32_t sums[4] = {s0, s1, s2, s3};
        for (size_t i = 0; i < 4; i++) {
            const struct int8_factor f = int8_factor_of(&output, channel + i);
            y[channel + i] = dsp_put(sums[i], f, output, narrow);
        }
    }
    for (; channel < channels; channel++) {
        int32_t sum = b[channel];
        for (size_t tap = 0; tap < taps; tap++) {
            sum += w[tap * channels + channel] * at[tap][from + channel];
        }
        y[channel] = dsp_put(sum, int8_factor_of(&output, channel), output, narrow);
    }
}

#endif // INT8_DSP
