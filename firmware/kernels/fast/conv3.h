// conv3.h: the 3x3 convolution with stride 1 or 2, in both directions.
#ifndef CONV3_H
#define CONV3_H

#include "kernels/kernels.h" // struct window

// Whether the functions below compute this window with room floats of scratch; the second one is
// for conv3_backward_input, and asked only where the first one says yes.
int conv3_does(const struct window *s, size_t room);
int conv3_does_input(const struct window *s, size_t room);

// All add to their first argument.
void conv3_forward(float *y, const float *x, const float *w, const struct window *s, size_t n,
                   float *scratch, size_t room);
void conv3_backward_input(float *dx, const float *dy, const float *w, const struct window *s,
                          size_t n, float *scratch, size_t room);
void conv3_backward_weight(float *dw, const float *dy, const float *x, const struct window *s,
                           size_t n, float *scratch, size_t room);

#endif
