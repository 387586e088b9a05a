// int8_taps.h: one pixel of a depthwise convolution.
#ifndef INT8_TAPS_H
#define INT8_TAPS_H

#include "kernels/int8.h"

// y[channel] = b[channel] + the sum over taps of w[tap][channel] * at[tap][from + channel], as
// output. y may be what the only tap sees.
void int8_taps(int8_t *y, const int8_t *const *at, size_t from, size_t taps, size_t channels,
               const int8_t *w, const int32_t *b, const struct int8_output *to);

#endif
