// int8_taps.c: one pixel of a depthwise convolution, in plain C.
#include "kernels/int8_taps.h"

#include "kernels/int8_simd.h" // whether there is something faster

#if !INT8_DSP && !INT8_MVE

#include "kernels/int8_scale.h" // outputs

void int8_taps(int8_t *y, const int8_t *const *at, size_t from, size_t taps, size_t channels,
               const int8_t *w, const int32_t *b, const struct int8_output *to) {
    for (size_t channel = 0; channel < channels; channel++) {
        int32_t sum = b[channel];
        for (size_t tap = 0; tap < taps; tap++) {
            sum += w[tap * channels + channel] * at[tap][from + channel];
        }
        y[channel] = int8_put(sum, int8_factor_of(to, channel), *to);
    }
}

#endif
