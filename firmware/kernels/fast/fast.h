// fast.h: faster kernels for the calls of kernels.h that cost most, held to them by the tests.
//
// They are made for a core with an FPU that loads several registers by one instruction (Cortex-M4F
// and up), and right everywhere; where vectors of floats are to be had (Cortex-M55), mve_*.c takes
// the place of the inner loops. The contracts are those of kernels.h; what they have no fast way
// for they hand to the plain kernel. Sums are taken in another order, so the last digits differ.
#ifndef FAST_H
#define FAST_H

#include "kernels/kernels.h" // struct window

// Whether every multiplication is a call of the compiler's library: convolutions are then plain,
// since that never multiplies what is padding.
#if (defined(__arm__) && !defined(__ARM_FP)) || (defined(__riscv) && !defined(__riscv_flen))
#define SOFT_FLOAT 1
#else
#define SOFT_FLOAT 0
#endif

// Scratch is room for copies with padding around them: more makes fewer pieces of the work. Twice
// as much as this saves 2 % more of the instructions, half of it costs 4 %.
#define FAST_SCRATCH_MAX 1024u

// Floats of scratch that every call with a window needs. Nothing is kept there between calls.
static inline size_t fast_conv2d_scratch(const struct window *s) {
    const size_t channels = s->in_channels > s->out_channels ? s->in_channels : s->out_channels;
    const size_t height = s->in_height + 2u * s->padding_height + 2;
    const size_t width = s->in_width + 2u * s->padding_width + 6;
    const size_t whole = channels * height * width; // one tensor with all its padding
    return whole < FAST_SCRATCH_MAX ? whole : FAST_SCRATCH_MAX;
}

// One channel of a depthwise window.
static inline struct window fast_depthwise_channel(const struct window *s) {
    struct window one = *s;
    one.in_channels = one.out_channels = 1;
    return one;
}

static inline size_t fast_depthwise_scratch(const struct window *s) {
    const struct window one = fast_depthwise_channel(s);
    return fast_conv2d_scratch(&one);
}

// conv2d.c: kernels 3x3 and 1x1, stride 1 and 2.
void fast_conv2d_forward(float *y, const float *x, const float *w, const float *b,
                         const struct window *s, size_t n, float *scratch);
void fast_conv2d_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                          const float *w, const struct window *s, size_t n, float *scratch);

// depthwise.c: each channel on its own (out_channels = in_channels, w is channels x kh x kw):
// kernel 3x3, stride 1 and, but for dx, 2.
void fast_depthwise_forward(float *y, const float *x, const float *w, const float *b,
                            const struct window *s, size_t n, float *scratch);
void fast_depthwise_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                             const float *w, const struct window *s, size_t n, float *scratch);

// linear.c
void fast_linear_forward(float *y, const float *x, const float *w, const float *b, size_t in,
                         size_t out, size_t n);
void fast_linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                          const float *w, size_t in, size_t out, size_t n);

// sgd.c
void fast_sgd_step(float *w, float *v, const float *g, float rate, float momentum, float decay,
                   size_t size);

#endif
