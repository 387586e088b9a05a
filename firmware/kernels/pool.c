// pool.c: the largest or the mean value of each window of an image.
//
// Padding is never touched: a window is cut to the taps that lie inside the image. A window of a
// max pool needs at least one such tap (padding below the kernel size sees to the left and top).
#include "kernels/kernels.h"

// The taps first..stop-1 of one window that lie inside the image, along one axis.
struct taps {
    size_t first, stop;
    size_t at; // where in the image the first of them lies
};

static struct taps taps_inside(size_t o, size_t in, size_t kernel, size_t stride, size_t padding) {
    const size_t start = o * stride, end = in + padding; // window and image, in the padded image
    const size_t first = start < padding ? padding - start : 0;
    size_t stop = start < end ? end - start : 0;
    stop = stop < kernel ? stop : kernel;
    return (struct taps){.first = first, .stop = stop, .at = start + first - padding};
}

static struct taps taps_down(const struct window *s, size_t oy) {
    return taps_inside(oy, s->in_height, s->kernel_height, s->stride_height, s->padding_height);
}

static struct taps taps_across(const struct window *s, size_t ox) {
    return taps_inside(ox, s->in_width, s->kernel_width, s->stride_width, s->padding_width);
}

void max_pool_forward(float *y, uint8_t *winner, const float *x, const struct window *s, size_t n) {
    size_t o = 0;
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        const float *image = x + plane * s->in_height * s->in_width;
        for (size_t oy = 0; oy < s->out_height; oy++) {
            const struct taps down = taps_down(s, oy);
            for (size_t ox = 0; ox < s->out_width; ox++, o++) {
                const struct taps across = taps_across(s, ox);
                const float *row = image + down.at * s->in_width + across.at;
                size_t best = down.first * s->kernel_width + across.first;
                float largest = *row;
                for (size_t ky = down.first; ky < down.stop; ky++, row += s->in_width) {
                    for (size_t kx = across.first; kx < across.stop; kx++) {
                        if (row[kx - across.first] > largest) {
                            largest = row[kx - across.first];
                            best = ky * s->kernel_width + kx;
                        }
                    }
                }
                y[o] = largest;
                winner[o] = (uint8_t)best;
            }
        }
    }
}

void max_pool_backward(float *dx, const float *dy, const uint8_t *winner, const struct window *s,
                       size_t n) {
    size_t o = 0;
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        float *image = dx + plane * s->in_height * s->in_width;
        for (size_t oy = 0; oy < s->out_height; oy++) {
            for (size_t ox = 0; ox < s->out_width; ox++, o++) {
                const size_t ky = winner[o] / s->kernel_width, kx = winner[o] % s->kernel_width;
                const size_t iy = oy * s->stride_height + ky - s->padding_height;
                const size_t ix = ox * s->stride_width + kx - s->padding_width;
                image[iy * s->in_width + ix] += dy[o];
            }
        }
    }
}

void avg_pool_forward(float *y, const float *x, const struct window *s, size_t n) {
    const float share = 1.0f / (float)(s->kernel_height * s->kernel_width);
    size_t o = 0;
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        const float *image = x + plane * s->in_height * s->in_width;
        for (size_t oy = 0; oy < s->out_height; oy++) {
            const struct taps down = taps_down(s, oy);
            for (size_t ox = 0; ox < s->out_width; ox++, o++) {
                const struct taps across = taps_across(s, ox);
                size_t at = down.at * s->in_width + across.at;
                float total = 0;
                for (size_t ky = down.first; ky < down.stop; ky++, at += s->in_width) {
                    float sum = 0; // row by row, since a window may be a whole image
                    for (size_t kx = across.first; kx < across.stop; kx++) {
                        sum += image[at + kx - across.first];
                    }
                    total += sum;
                }
                y[o] = total * share;
            }
        }
    }
}

void avg_pool_backward(float *dx, const float *dy, const struct window *s, size_t n) {
    const float share = 1.0f / (float)(s->kernel_height * s->kernel_width);
    size_t o = 0;
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        float *image = dx + plane * s->in_height * s->in_width;
        for (size_t oy = 0; oy < s->out_height; oy++) {
            const struct taps down = taps_down(s, oy);
            for (size_t ox = 0; ox < s->out_width; ox++, o++) {
                const struct taps across = taps_across(s, ox);
                const float part = dy[o] * share;
                size_t at = down.at * s->in_width + across.at;
                for (size_t ky = down.first; ky < down.stop; ky++, at += s->in_width) {
                    for (size_t kx = across.first; kx < across.stop; kx++) {
                        image[at + kx - across.first] += part;
                    }
                }
            }
        }
    }
}
