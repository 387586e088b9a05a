// conv3.c: the 3x3 convolution with stride 1 or 2: the loops around slide.c and dot.c.
//
// Rows of the image are copied into scratch with zeros around them, a band at a time. The gradient
// of the input is a convolution too, of dy, with the kernel turned round.
#include "kernels/fast/conv3.h"

#include "kernels/fast/band.h"  // padded rows
#include "kernels/fast/dot.h"   // dw
#include "kernels/fast/slide.h" // forward and dx
#include "kernels/fast/span.h"  // SELDOM

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

// One tensor, `from`, taken in by another, `to`, through the kernel, in either direction.
struct pass {
    float *to;
    size_t to_channels, to_height, to_width;
    const float *from;
    size_t from_channels, from_height, from_width;
    const float *w;
    size_t w_lane, w_step; // floats from a channel of `to`, of `from`, to the next
    ptrdiff_t top, left;   // the pixel of `from` that the first pixel of `to` sees first
    size_t stride;         // pixels of `from`, a pixel of `to`
    int spread;            // the other way round: two pixels of `to`, a pixel of `from`
    tile_kernel *kernel;
};

// Adds to a row of `to` what it sees through all of the kernel, or, spread, through one row of it.
SELDOM static void pass_row(const struct pass *p, struct tiles *t, const struct tile_row *row,
                            const float *from, const float *w) {
    t->from = from;
    for (size_t i = 0; i < 4; i++) {
        t->w[i] = w + tile_lane(i, row->lanes) * p->w_lane;
    }
    tile_row(t, row, p->kernel);
}

// Adds to `rows` rows of `to` from `top` on what a band gives them, whose first channel this is.
SELDOM static void pass_band(const struct pass *p, const struct band *b, const float *pixels,
                             size_t channel, size_t top, size_t rows) {
    struct tiles t = {.advance = p->spread ? 2 : 4 * p->stride,
                      .pitch = b->width,
                      .plane = b->rows * b->width,
                      .channels = b->channels,
                      .w_step = p->w_step};
    struct tile_row r = {
        .plane = p->to_height * p->to_width, .step = 1, .width = p->to_width, .padded = 1};
    for (size_t lane = 0; lane < p->to_channels; lane += 4) {
        const float *w = p->w + lane * p->w_lane + channel * p->w_step;
        r.lanes = least(4, p->to_channels - lane);
        r.to = p->to + lane * r.plane + top * p->to_width;
        for (size_t row = 0; row < rows; row++, r.to += p->to_width) {
            if (!p->spread) {
                pass_row(p, &t, &r, pixels + row * p->stride * b->width, w);
                continue;
            }
            // Every second row of the kernel meets a row of `from` here: one or two do.
            const ptrdiff_t seen = p->top + (ptrdiff_t)(top + row);
            for (ptrdiff_t ky = seen & 1; ky < 3; ky += 2) {
                const size_t met = (size_t)((seen - ky) / 2 - b->top);
                pass_row(p, &t, &r, pixels + met * b->width, w + 3 * ky);
            }
        }
    }
}

// Floats of a row of the band that a row of `to` in tiles sees.
static size_t width_seen(size_t to_width, size_t stride) {
    return ((to_width + 3) / 4 * 4 - 1) * stride + 3;
}

static size_t width_spread(size_t to_width) {
    return (to_width + 3) / 4 * 2 + 1;
}

SELDOM static void pass_run(const struct pass *p, float *scratch, size_t room) {
    struct band b = {.width =
                         p->spread ? width_spread(p->to_width) : width_seen(p->to_width, p->stride),
                     .left = p->left};
    // As many channels as there is room for, because the tiles are loaded and stored for each piece
    // of them; then as many rows, because those where two bands meet are copied twice.
    const size_t channels = least(p->from_channels, room / (3 * b.width));
    const size_t most = room / (channels * b.width); // rows of the band
    const size_t rows =
        least(p->to_height, p->spread ? 2 * (most - 2) : (most - 3) / p->stride + 1);
    for (size_t channel = 0; channel < p->from_channels; channel += channels) {
        b.channels = least(channels, p->from_channels - channel);
        for (size_t top = 0; top < p->to_height; top += rows) {
            b.top = p->spread ? (p->top + (ptrdiff_t)top) / 2 - 1
                              : p->top + (ptrdiff_t)(top * p->stride);
            const size_t count = least(rows, p->to_height - top);
            b.rows = p->spread ? count / 2 + 2 : (count - 1) * p->stride + 3;
            band_fill(scratch, &b, p->from + channel * p->from_height * p->from_width,
                      p->from_height, p->from_width);
            pass_band(p, &b, scratch, channel, top, count);
        }
    }
}

SELDOM int conv3_does(const struct window *s, size_t room) {
    return s->kernel_height == 3 && s->kernel_width == 3 && s->stride_height == s->stride_width &&
           s->stride_height <= 2 && 3 * width_seen(s->out_width, s->stride_width) <= room;
}

SELDOM int conv3_does_input(const struct window *s, size_t room) {
    // With stride 2 a tile has to begin under the middle of the kernel.
    return s->stride_width == 1
               ? 3 * width_seen(s->in_width, 1) <= room
               : s->padding_width % 2 == 1 && 3 * width_spread(s->in_width) <= room;
}

SELDOM void conv3_forward(float *y, const float *x, const float *w, const struct window *s,
                          size_t n, float *scratch, size_t room) {
    struct pass p = {
        .to = y,
        .to_channels = s->out_channels,
        .to_height = s->out_height,
        .to_width = s->out_width,
        .from = x,
        .from_channels = s->in_channels,
        .from_height = s->in_height,
        .from_width = s->in_width,
        .w = w,
        .w_lane = 9 * (size_t)s->in_channels,
        .w_step = 9,
        .top = -s->padding_height,
        .left = -s->padding_width,
        .stride = s->stride_width,
        .kernel = s->stride_width == 1 ? slide_1 : slide_2,
    };
    for (; n > 0; n--) {
        pass_run(&p, scratch, room);
        p.to += p.to_channels * p.to_height * p.to_width;
        p.from += p.from_channels * p.from_height * p.from_width;
    }
}

SELDOM void conv3_backward_input(float *dx, const float *dy, const float *w, const struct window *s,
                                 size_t n, float *scratch, size_t room) {
    const int spread = s->stride_width == 2;
    struct pass p = {
        .to = dx,
        .to_channels = s->in_channels,
        .to_height = s->in_height,
        .to_width = s->in_width,
        .from = dy,
        .from_channels = s->out_channels,
        .from_height = s->out_height,
        .from_width = s->out_width,
        .w = w,
        .w_lane = 9,
        .w_step = 9 * (size_t)s->in_channels,
        .top = spread ? s->padding_height : s->padding_height - 2,
        .left = spread ? (s->padding_width - 1) / 2 : s->padding_width - 2,
        .stride = 1,
        .spread = spread,
        .kernel = spread ? slide_spread : slide_turned,
    };
    for (; n > 0; n--) {
        pass_run(&p, scratch, room);
        p.to += p.to_channels * p.to_height * p.to_width;
        p.from += p.from_channels * p.from_height * p.from_width;
    }
}

SELDOM void conv3_backward_weight(float *dw, const float *dy, const float *x,
                                  const struct window *s, size_t n, float *scratch, size_t room) {
    const size_t stride = s->stride_width;
    const size_t x_area = (size_t)s->in_height * s->in_width;
    const size_t y_area = (size_t)s->out_height * s->out_width;
    struct band b = {
        .channels = 1, .width = (s->out_width - 1u) * stride + 3, .left = -s->padding_width};
    const size_t rows = least(s->out_height, (room / b.width - 3) / stride + 1);
    struct taps t = {.dw_lane = 9 * (size_t)s->in_channels,
                     .lanes = s->out_channels,
                     .dy_lane = y_area,
                     .width = s->out_width,
                     .stride = stride,
                     .x = scratch,
                     .pitch = b.width};
    for (; n > 0; n--, dy += s->out_channels * y_area) {
        for (size_t channel = 0; channel < s->in_channels; channel++, x += x_area) {
            t.dw = dw + 9 * channel;
            for (size_t top = 0; top < s->out_height; top += rows) {
                t.dy = dy + top * s->out_width;
                t.rows = least(rows, s->out_height - top);
                b.top = (ptrdiff_t)(top * stride) - s->padding_height;
                b.rows = (t.rows - 1) * stride + 3;
                band_fill(scratch, &b, x, s->in_height, s->in_width);
                dot_add(&t);
            }
        }
    }
}
