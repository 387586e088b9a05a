// conv2d.c: the convolution, tap by tap: each tap of the kernel is a shifted copy of the image.
#include "kernels/kernels.h"
#include "kernels/patch.h" // the loops over pixels

// The outputs, along one axis, whose tap k falls inside the image: returns how many, *first is the
// first one. Padding is what is left out, so no loop over pixels ever asks about it.
static size_t covered(size_t *first, size_t k, size_t in, size_t out, size_t stride,
                      size_t padding) {
    *first = k < padding ? (padding - k + stride - 1) / stride : 0;
    if (in + padding <= k) {
        return 0; // even output 0 looks beyond the end of the image
    }
    size_t stop = (in + padding - k - 1) / stride + 1;
    stop = stop < out ? stop : out;
    return stop > *first ? stop - *first : 0;
}

// One tap of the kernel: the patch of pixels it sees and where in the planes that patch begins.
struct tap {
    struct patch patch;
    size_t y, x;
};

// Returns 0 when the tap sees nothing but padding.
static int tap_covers(struct tap *tap, const struct window *s, size_t ky, size_t kx) {
    size_t row, column;
    const size_t height =
        covered(&row, ky, s->in_height, s->out_height, s->stride_height, s->padding_height);
    const size_t width =
        covered(&column, kx, s->in_width, s->out_width, s->stride_width, s->padding_width);
    if (height == 0 || width == 0) {
        return 0;
    }
    *tap = (struct tap){
        .patch = {.height = height,
                  .width = width,
                  .y_pitch = s->out_width,
                  .x_pitch = (size_t)s->stride_height * s->in_width,
                  .x_step = s->stride_width,
                  .y_lane = (size_t)s->out_height * s->out_width,
                  .w_lane = (size_t)s->in_channels * s->kernel_height * s->kernel_width},
        .y = row * s->out_width + column,
        .x = (row * s->stride_height + ky - s->padding_height) * s->in_width +
             column * s->stride_width + kx - s->padding_width,
    };
    return 1;
}

void conv2d_forward(float *y, const float *x, const float *w, const float *b,
                    const struct window *s, size_t n) {
    const size_t taps = (size_t)s->kernel_height * s->kernel_width;
    const size_t filter = s->in_channels * taps; // weights of one output channel
    const size_t x_area = (size_t)s->in_height * s->in_width;
    const size_t y_area = (size_t)s->out_height * s->out_width;
    for (size_t plane = 0; plane < n * s->out_channels; plane++) {
        const float start = b ? b[plane % s->out_channels] : 0;
        for (size_t i = 0; i < y_area; i++) {
            y[plane * y_area + i] = start;
        }
    }
    for (size_t k = 0; k < taps; k++) {
        struct tap tap;
        if (!tap_covers(&tap, s, k / s->kernel_width, k % s->kernel_width)) {
            continue;
        }
        for (size_t sample = 0; sample < n; sample++) {
            size_t lanes;
            for (size_t o = 0; o < s->out_channels; o += lanes) {
                lanes = patch_lanes(s->out_channels - o);
                float *to = y + (sample * s->out_channels + o) * y_area + tap.y;
                for (size_t c = 0; c < s->in_channels; c++) {
                    patch_spread(&tap.patch, lanes, to,
                                 x + (sample * s->in_channels + c) * x_area + tap.x,
                                 w + o * filter + c * taps + k);
                }
            }
        }
    }
}

void conv2d_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                     const float *w, const struct window *s, size_t n) {
    const size_t taps = (size_t)s->kernel_height * s->kernel_width;
    const size_t filter = s->in_channels * taps;
    const size_t x_area = (size_t)s->in_height * s->in_width;
    const size_t y_area = (size_t)s->out_height * s->out_width;
    for (size_t row = 0; db && row < n * s->out_channels * s->out_height; row++) {
        float sum = 0;
        for (size_t i = 0; i < s->out_width; i++) {
            sum += dy[row * s->out_width + i];
        }
        db[row / s->out_height % s->out_channels] += sum;
    }
    for (size_t k = 0; k < taps; k++) {
        struct tap tap;
        if (!tap_covers(&tap, s, k / s->kernel_width, k % s->kernel_width)) {
            continue;
        }
        for (size_t sample = 0; sample < n; sample++) {
            size_t lanes;
            for (size_t o = 0; o < s->out_channels; o += lanes) {
                lanes = patch_lanes(s->out_channels - o);
                const float *from = dy + (sample * s->out_channels + o) * y_area + tap.y;
                for (size_t c = 0; c < s->in_channels; c++) {
                    const size_t image = (sample * s->in_channels + c) * x_area + tap.x;
                    const size_t weight = o * filter + c * taps + k;
                    if (dw) {
                        patch_dot(&tap.patch, lanes, dw + weight, from, x + image);
                    }
                    if (dx) {
                        patch_gather(&tap.patch, lanes, dx + image, from, w + weight);
                    }
                }
            }
        }
    }
}
