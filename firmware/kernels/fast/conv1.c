// conv1.c: the 1x1 convolution with stride 1 or 2: the loops around mix.c, products of matrices.
//
// Every pixel is on its own: with stride 1 a whole plane is taken as one long row. With stride 2
// every second pixel of every second row of x takes part.
#include "kernels/fast/conv1.h"

#include "kernels/fast/mix.h"  // the inner loops
#include "kernels/fast/span.h" // SELDOM, zeros

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

// The pixels of a tensor that take part: floats from a channel, a row, a pixel to the next.
struct pixels {
    size_t channels, plane, pitch, step;
};

// What a window comes to: rows x width pixels of x meet as many of y.
struct meeting {
    struct pixels x, y;
    size_t rows, width;
};

SELDOM static struct meeting meet(const struct window *s) {
    struct meeting m = {
        .x = {.channels = s->in_channels,
              .plane = (size_t)s->in_height * s->in_width,
              .pitch = (size_t)s->in_width * s->stride_height,
              .step = s->stride_width},
        .y = {.channels = s->out_channels,
              .plane = (size_t)s->out_height * s->out_width,
              .pitch = s->out_width,
              .step = 1},
        .rows = s->out_height,
        .width = s->out_width,
    };
    if (m.x.step == 1) { // all rows are one
        m.rows = 1;
        m.width = m.y.plane;
    }
    return m;
}

SELDOM int conv1_does(const struct window *s, size_t room) {
    return s->kernel_height == 1 && s->kernel_width == 1 && s->stride_height == s->stride_width &&
           s->stride_height <= 2 && s->padding_height == 0 && s->padding_width == 0 &&
           meet(s).width >= 4 && // for tile_row
           4 * (size_t)s->out_width <= room;
}

// The weights of one lane for mix_1 and mix_2, which lie `step` floats apart.
static void pack(float *to, const float *w, size_t step, size_t channels) {
    ROLLED for (; channels > 0; channels--, to += 4, w += step) {
        *to = *w;
    }
}

// One tensor, `from`, taken in by another, `to`, in either direction.
struct pass {
    float *to;
    const float *from;
    struct pixels to_pixels, from_pixels;
    size_t rows, width;
    const float *w;
    size_t w_lane, w_step; // floats from a channel of `to`, of `from`, to the next
};

SELDOM static void pass_run(const struct pass *p, float *scratch) {
    const size_t step = p->from_pixels.step;
    struct tiles t = {.advance = 4 * step, .plane = p->from_pixels.plane, .w = {scratch}};
    struct tile_row r = {
        .plane = p->to_pixels.plane, .step = p->to_pixels.step, .width = p->width, .padded = 0};
    for (size_t lane = 0; lane < p->to_pixels.channels; lane += 4) {
        r.lanes = least(4, p->to_pixels.channels - lane);
        for (size_t first = 0; first < p->from_pixels.channels; first += CONV1_BLOCK) {
            t.channels = least(CONV1_BLOCK, p->from_pixels.channels - first);
            for (size_t i = 0; i < 4; i++) {
                pack(scratch + i,
                     p->w + (lane + tile_lane(i, r.lanes)) * p->w_lane + first * p->w_step,
                     p->w_step, t.channels);
            }
            for (size_t row = 0; row < p->rows; row++) {
                r.to = p->to + lane * r.plane + row * p->to_pixels.pitch;
                t.from = p->from + first * t.plane + row * p->from_pixels.pitch;
                tile_row(&t, &r, step == 1 ? mix_1 : mix_2);
            }
        }
    }
}

SELDOM void conv1_forward(float *y, const float *x, const float *w, const struct window *s,
                          size_t n, float *scratch) {
    const struct meeting m = meet(s);
    struct pass p = {.to = y,
                     .from = x,
                     .to_pixels = m.y,
                     .from_pixels = m.x,
                     .rows = m.rows,
                     .width = m.width,
                     .w = w,
                     .w_lane = m.x.channels,
                     .w_step = 1};
    for (; n > 0; n--) {
        pass_run(&p, scratch);
        p.to += m.y.channels * m.y.plane;
        p.from += m.x.channels * m.x.plane;
    }
}

SELDOM void conv1_backward_input(float *dx, const float *dy, const float *w, const struct window *s,
                                 size_t n, float *scratch) {
    const struct meeting m = meet(s);
    struct pass p = {.to = dx,
                     .from = dy,
                     .to_pixels = m.x,
                     .from_pixels = m.y,
                     .rows = m.rows,
                     .width = m.width,
                     .w = w,
                     .w_lane = 1,
                     .w_step = m.x.channels};
    for (; n > 0; n--) {
        pass_run(&p, scratch);
        p.to += m.x.channels * m.x.plane;
        p.from += m.y.channels * m.y.plane;
    }
}

// One to four lanes of dw for the channels of t; dw_lane and dy_lane: floats from one to the next.
SELDOM static void products_lanes(struct products *t, size_t channels, float *dw, size_t dw_lane,
                                  const float *dy, size_t dy_lane, size_t lanes) {
    float aside[16]; // for less than four channels
    for (size_t i = 0; i < 4; i++) {
        const size_t lane = tile_lane(i, lanes);
        t->dy[i] = dy + lane * dy_lane;
        t->to[i] = channels == 4 ? dw + lane * dw_lane : aside + 4 * i;
    }
    span_fill(aside, 0, channels == 4 ? 0 : 16);
    products_add(t);
    for (size_t lane = 0; channels < 4 && lane < lanes; lane++) {
        for (size_t channel = 0; channel < channels; channel++) {
            dw[lane * dw_lane + channel] += aside[4 * lane + channel];
        }
    }
}

// Every step-th pixel of rows of them, side by side.
static void gather(float *to, const float *from, size_t rows, size_t width, size_t pitch,
                   size_t step) {
    for (; rows > 0; rows--, from += pitch) {
        ROLLED for (size_t i = 0; i < width; i++) {
            *to++ = from[i * step];
        }
    }
}

// Four channels of x and four of dy at a time; with stride 2 as many rows as fit the scratch.
SELDOM void conv1_backward_weight(float *dw, const float *dy, const float *x,
                                  const struct window *s, size_t n, float *scratch, size_t room) {
    const struct meeting m = meet(s);
    const size_t most = m.x.step == 1 ? 1 : room / (4 * m.width);
    struct products t;
    for (; n > 0; n--, dy += m.y.channels * m.y.plane, x += m.x.channels * m.x.plane) {
        for (size_t first = 0; first < m.x.channels; first += 4) {
            const size_t channels = least(4, m.x.channels - first);
            for (size_t top = 0; top < m.rows; top += most) {
                const size_t rows = least(most, m.rows - top);
                t.pixels = rows * m.width;
                for (size_t i = 0; i < 4; i++) {
                    t.x[i] = x + (first + tile_lane(i, channels)) * m.x.plane + top * m.x.pitch;
                    if (m.x.step > 1) {
                        float *to = scratch + i * t.pixels;
                        gather(to, t.x[i], rows, m.width, m.x.pitch, m.x.step);
                        t.x[i] = to;
                    }
                }
                for (size_t lane = 0; lane < m.y.channels; lane += 4) {
                    products_lanes(&t, channels, dw + lane * m.x.channels + first, m.x.channels,
                                   dy + lane * m.y.plane + top * m.y.pitch, m.y.plane,
                                   least(4, m.y.channels - lane));
                }
            }
        }
    }
}
