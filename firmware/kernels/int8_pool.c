// int8_pool.c: the mean of an image, and the largest or the mean value of each of its windows.
#include "kernels/int8.h"
#include "kernels/int8_bytes.h" // copies
#include "kernels/int8_scale.h" // outputs

void int8_mean(int8_t *y, const int8_t *x, size_t channels, size_t area, int8_t zero,
               const struct int8_output *to, size_t n) {
    const struct int8_factor f = int8_factor_of(to, 0);
    for (; n > 0; n--, x += area * channels) {
        for (size_t channel = 0; channel < channels; channel++) {
            int32_t sum = 0;
            for (size_t i = 0; i < area; i++) {
                sum += x[i * channels + channel] - zero;
            }
            *y++ = int8_put(sum, f, *to);
        }
    }
}

// What a window sees of an image.
struct view {
    const int8_t *from;
    size_t rows, columns; // taps inside the image
    size_t pitch;         // bytes from a row to the next
};

// Along one axis: returns how many taps of the window lie inside the image, *at is where the first
// of them lies.
static size_t inside(size_t *at, size_t o, size_t in, size_t kernel, size_t stride,
                     size_t padding) {
    const size_t start = o * stride, end = in + padding; // window and image, in the padded image
    const size_t first = start < padding ? padding - start : 0;
    size_t stop = start < end ? end - start : 0;
    stop = stop < kernel ? stop : kernel;
    *at = start + first - padding;
    return stop > first ? stop - first : 0;
}

static struct view look(const int8_t *image, const struct window *s, size_t oy, size_t ox) {
    size_t row, column;
    struct view v = {.pitch = (size_t)s->in_width * s->in_channels};
    v.rows = inside(&row, oy, s->in_height, s->kernel_height, s->stride_height, s->padding_height);
    v.columns =
        inside(&column, ox, s->in_width, s->kernel_width, s->stride_width, s->padding_width);
    if (v.rows == 0 || v.columns == 0) {
        v.rows = row = column = 0;
    }
    v.from = image + row * v.pitch + column * s->in_channels;
    return v;
}

// to[i] = the larger of both, which are apart: a compiler with vectors makes sixteen at a time of
// it.
static void keep_larger(int8_t *restrict to, const int8_t *restrict from, size_t size) {
    for (size_t i = 0; i < size; i++) {
        to[i] = from[i] > to[i] ? from[i] : to[i];
    }
}

void int8_max_pool(int8_t *y, const int8_t *x, const struct window *s, size_t n) {
    const size_t channels = s->in_channels;
    for (; n > 0; n--, x += (size_t)s->in_height * s->in_width * channels) {
        for (size_t pixel = 0; pixel < (size_t)s->out_height * s->out_width; pixel++) {
            const struct view v = look(x, s, pixel / s->out_width, pixel % s->out_width);
            int8_copy(y, v.from, channels);
            for (size_t row = 0; row < v.rows; row++) {
                for (size_t i = 0; i < v.columns; i++) {
                    keep_larger(y, v.from + row * v.pitch + i * channels, channels);
                }
            }
            y += channels;
        }
    }
}

// To the nearest, halves away from 0.
static int8_t divided(int32_t sum, int32_t count) {
    return (int8_t)((sum > 0 ? sum + count / 2 : sum - count / 2) / count);
}

void int8_avg_pool(int8_t *y, const int8_t *x, const struct window *s, int8_t zero, size_t n) {
    const size_t channels = s->in_channels;
    const int32_t count = s->kernel_height * s->kernel_width;
    for (; n > 0; n--, x += (size_t)s->in_height * s->in_width * channels) {
        for (size_t pixel = 0; pixel < (size_t)s->out_height * s->out_width; pixel++) {
            const struct view v = look(x, s, pixel / s->out_width, pixel % s->out_width);
            const int32_t padding = (count - (int32_t)(v.rows * v.columns)) * zero;
            for (size_t channel = 0; channel < channels; channel++) {
                int32_t sum = padding;
                for (size_t row = 0; row < v.rows; row++) {
                    const int8_t *from = v.from + row * v.pitch + channel;
                    for (size_t i = 0; i < v.columns; i++, from += channels) {
                        sum += *from;
                    }
                }
                *y++ = divided(sum, count);
            }
        }
    }
}
