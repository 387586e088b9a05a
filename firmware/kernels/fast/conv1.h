// conv1.h: the 1x1 convolution with stride 1 or 2.
#ifndef CONV1_H
#define CONV1_H

#include "kernels/kernels.h" // struct window

// Whether the functions below compute this window with room floats of scratch.
int conv1_does(const struct window *s, size_t room);

// Channels whose weights are packed at once: they need four floats of scratch each, at most.
#define CONV1_BLOCK 64u

// All add to their first argument.
void conv1_forward(float *y, const float *x, const float *w, const struct window *s, size_t n,
                   float *scratch);
void conv1_backward_input(float *dx, const float *dy, const float *w, const struct window *s,
                          size_t n, float *scratch);
void conv1_backward_weight(float *dw, const float *dy, const float *x, const struct window *s,
                           size_t n, float *scratch, size_t room);

#endif
