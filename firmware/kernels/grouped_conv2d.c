// grouped_conv2d.c: the convolution of channels in groups: each group is a convolution of its own.
#include "kernels/kernels.h"

// One group of one sample; groups of several samples do not lie next to each other.
static struct window window_of_group(const struct window *s, size_t groups) {
    struct window part = *s;
    part.in_channels = (uint16_t)(s->in_channels / groups);
    part.out_channels = (uint16_t)(s->out_channels / groups);
    return part;
}

void grouped_conv2d_forward(float *y, const float *x, const float *w, const float *b,
                            const struct window *s, size_t groups, size_t n) {
    const struct window part = window_of_group(s, groups);
    const size_t x_size = (size_t)part.in_channels * s->in_height * s->in_width;
    const size_t y_size = (size_t)part.out_channels * s->out_height * s->out_width;
    const size_t w_size =
        (size_t)part.out_channels * part.in_channels * s->kernel_height * s->kernel_width;
    for (size_t i = 0; i < n * groups; i++) {
        const size_t group = i % groups;
        conv2d_forward(y + i * y_size, x + i * x_size, w + group * w_size,
                       b ? b + group * part.out_channels : NULL, &part, 1);
    }
}

void grouped_conv2d_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                             const float *w, const struct window *s, size_t groups, size_t n) {
    const struct window part = window_of_group(s, groups);
    const size_t x_size = (size_t)part.in_channels * s->in_height * s->in_width;
    const size_t y_size = (size_t)part.out_channels * s->out_height * s->out_width;
    const size_t w_size =
        (size_t)part.out_channels * part.in_channels * s->kernel_height * s->kernel_width;
    for (size_t i = 0; i < n * groups; i++) {
        const size_t group = i % groups;
        conv2d_backward(dx ? dx + i * x_size : NULL, dw ? dw + group * w_size : NULL,
                        db ? db + group * part.out_channels : NULL, dy + i * y_size,
                        x ? x + i * x_size : NULL, w + group * w_size, &part, 1);
    }
}
