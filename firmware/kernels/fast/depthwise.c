// depthwise.c: the 3x3 convolution of each channel on its own, with stride 1 or 2.
//
// Nothing is shared by channels, so that all the reuse there is lies along a row: nine weights stay
// in registers while the rows of a padded copy go by. Four pixels at a time, 36 multiply-adds come
// with 10 other instructions; the last pixels of a row, and all with stride 2, go one by one.
#include "kernels/fast/band.h" // padded rows
#include "kernels/fast/fast.h"
#include "kernels/fast/span.h" // bias and its gradient

// ---- the inner loops ----

// Rows of pixels that see, or are seen by, a band through the kernel.
struct view {
    size_t rows, width, stride; // stride: pixels of the band, a pixel
    const float *band;
    size_t pitch; // floats from a row of the band to the next
};

// Four pixels see six of a row of the band through three weights.
#define SEE4(w0, w1, w2)                                                                           \
    do {                                                                                           \
        a0 += (w0)*x0;                                                                             \
        a1 += (w0)*x1;                                                                             \
        a2 += (w0)*x2;                                                                             \
        a3 += (w0)*x3;                                                                             \
        a0 += (w1)*x1;                                                                             \
        a1 += (w1)*x2;                                                                             \
        a2 += (w1)*x3;                                                                             \
        a3 += (w1)*x4;                                                                             \
        a0 += (w2)*x2;                                                                             \
        a1 += (w2)*x3;                                                                             \
        a2 += (w2)*x4;                                                                             \
        a3 += (w2)*x5;                                                                             \
    } while (0)

#define SEE1(w0, w1, w2)                                                                           \
    do {                                                                                           \
        a0 += (w0)*x0;                                                                             \
        a0 += (w1)*x1;                                                                             \
        a0 += (w2)*x2;                                                                             \
    } while (0)

// Adds what they see to the pixels, which are dense.
static void view_see(float *to, const float *weights, const struct view *v) {
    SINGLES9(w, s0, s1, s2, s3, s4, s5, s6, s7, s8);
    SINGLES4(a, s9, s10, s11, s12);
    SINGLES6(x, s13, s14, s15, s16, s17, s18);
    const size_t fours = v->stride == 1 ? v->width / 4 : 0, ones = v->width - 4 * fours;
    const ptrdiff_t pitch = (ptrdiff_t)v->pitch, stride = (ptrdiff_t)v->stride;
    const float *band = v->band;
    LOAD9(w, weights);
    for (size_t row = v->rows; row > 0; row--, band += stride * pitch) {
        const float *from = band;
        for (size_t i = fours; i > 0; i--) {
            LOAD4(a, to);
            TAKE6(x, from);
            from += pitch - 6;
            SEE4(w0, w1, w2);
            TAKE6(x, from);
            from += pitch - 6;
            SEE4(w3, w4, w5);
            TAKE6(x, from);
            from -= 2 * pitch + 2;
            SEE4(w6, w7, w8);
            PUT4(to, a);
        }
        ROLLED for (size_t i = ones; i > 0; i--) {
            a0 = *to;
            TAKE3(x, from);
            from += pitch - 3;
            SEE1(w0, w1, w2);
            TAKE3(x, from);
            from += pitch - 3;
            SEE1(w3, w4, w5);
            TAKE3(x, from);
            from += stride - 3 - 2 * pitch;
            SEE1(w6, w7, w8);
            PUT1(to, a);
        }
    }
}

// Four pixels with gradients g seen through three weights.
#define SEEN4(w0, w1, w2)                                                                          \
    do {                                                                                           \
        w0 += g0 * x0;                                                                             \
        w1 += g0 * x1;                                                                             \
        w2 += g0 * x2;                                                                             \
        w0 += g1 * x1;                                                                             \
        w1 += g1 * x2;                                                                             \
        w2 += g1 * x3;                                                                             \
        w0 += g2 * x2;                                                                             \
        w1 += g2 * x3;                                                                             \
        w2 += g2 * x4;                                                                             \
        w0 += g3 * x3;                                                                             \
        w1 += g3 * x4;                                                                             \
        w2 += g3 * x5;                                                                             \
    } while (0)

#define SEEN1(w0, w1, w2)                                                                          \
    do {                                                                                           \
        w0 += g0 * x0;                                                                             \
        w1 += g0 * x1;                                                                             \
        w2 += g0 * x2;                                                                             \
    } while (0)

// Adds to the gradients of the weights what the pixels, with gradients dy, give them.
static void view_weigh(float *dw, const float *dy, const struct view *v) {
    SINGLES9(w, s0, s1, s2, s3, s4, s5, s6, s7, s8);
    SINGLES4(g, s9, s10, s11, s12);
    SINGLES6(x, s13, s14, s15, s16, s17, s18);
    const size_t fours = v->stride == 1 ? v->width / 4 : 0, ones = v->width - 4 * fours;
    const ptrdiff_t pitch = (ptrdiff_t)v->pitch, stride = (ptrdiff_t)v->stride;
    const float *band = v->band;
    LOAD9(w, dw);
    for (size_t row = v->rows; row > 0; row--, band += stride * pitch) {
        const float *from = band;
        for (size_t i = fours; i > 0; i--) {
            TAKE4(g, dy);
            TAKE6(x, from);
            from += pitch - 6;
            SEEN4(w0, w1, w2);
            TAKE6(x, from);
            from += pitch - 6;
            SEEN4(w3, w4, w5);
            TAKE6(x, from);
            from -= 2 * pitch + 2;
            SEEN4(w6, w7, w8);
        }
        ROLLED for (size_t i = ones; i > 0; i--) {
            TAKE1(g, dy);
            TAKE3(x, from);
            from += pitch - 3;
            SEEN1(w0, w1, w2);
            TAKE3(x, from);
            from += pitch - 3;
            SEEN1(w3, w4, w5);
            TAKE3(x, from);
            from += stride - 3 - 2 * pitch;
            SEEN1(w6, w7, w8);
        }
    }
    PUT9(dw, w);
}

// ---- the loops around them ----

// A plane that sees another one, of which a band at a time is copied into scratch.
struct planes {
    size_t height, width, seen_height, seen_width;
    ptrdiff_t top, left; // the pixel of the other that its first pixel sees first
    size_t stride;
    float *scratch;
    size_t room;
};

// Copies a band for as many rows from `top` on as there is room for.
SELDOM static struct view see_band(const struct planes *p, const float *seen, size_t top) {
    const size_t pitch = (p->width - 1) * p->stride + 3;
    const size_t most = (p->room / pitch - 3) / p->stride + 1, left = p->height - top;
    const struct view v = {.rows = left < most ? left : most,
                           .width = p->width,
                           .stride = p->stride,
                           .band = p->scratch,
                           .pitch = pitch};
    const struct band b = {.channels = 1,
                           .rows = (v.rows - 1) * p->stride + 3,
                           .width = pitch,
                           .top = p->top + (ptrdiff_t)(top * p->stride),
                           .left = p->left};
    band_fill(p->scratch, &b, seen, p->seen_height, p->seen_width);
    return v;
}

SELDOM static void see_plane(const struct planes *p, float *to, const float *seen, const float *w) {
    struct view v;
    for (size_t top = 0; top < p->height; top += v.rows) {
        v = see_band(p, seen, top);
        view_see(to + top * p->width, w, &v);
    }
}

SELDOM static void weigh_plane(const struct planes *p, float *dw, const float *dy,
                               const float *seen) {
    struct view v;
    for (size_t top = 0; top < p->height; top += v.rows) {
        v = see_band(p, seen, top);
        view_weigh(dw, dy + top * p->width, &v);
    }
}

static int is_3x3(const struct window *s) {
    return s->kernel_height == 3 && s->kernel_width == 3 && s->stride_height == s->stride_width &&
           s->stride_height <= 2;
}

// x as y sees it.
static struct planes forward_planes(const struct window *s, float *scratch) {
    return (struct planes){.height = s->out_height,
                           .width = s->out_width,
                           .seen_height = s->in_height,
                           .seen_width = s->in_width,
                           .top = -s->padding_height,
                           .left = -s->padding_width,
                           .stride = s->stride_width,
                           .scratch = scratch,
                           .room = fast_depthwise_scratch(s)};
}

static int fits(const struct planes *p) {
    return 3 * ((p->width - 1) * p->stride + 3) <= p->room;
}

SELDOM void fast_depthwise_forward(float *y, const float *x, const float *w, const float *b,
                                   const struct window *s, size_t n, float *scratch) {
    const struct planes p = forward_planes(s, scratch);
    const struct window one = fast_depthwise_channel(s);
    const size_t area = p.height * p.width, seen_area = p.seen_height * p.seen_width;
    const size_t taps = (size_t)s->kernel_height * s->kernel_width;
    const int fast = is_3x3(s) && fits(&p);
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        const size_t channel = plane % s->in_channels;
        if (fast) {
            span_fill(y, b ? b[channel] : 0, area);
            see_plane(&p, y, x, w + 9 * channel);
        } else {
            conv2d_forward(y, x, w + taps * channel, b ? b + channel : NULL, &one, 1);
        }
        y += area;
        x += seen_area;
    }
}

SELDOM void fast_depthwise_backward(float *dx, float *dw, float *db, const float *dy,
                                    const float *x, const float *w, const struct window *s,
                                    size_t n, float *scratch) {
    const struct planes p = forward_planes(s, scratch);
    const struct window one = fast_depthwise_channel(s);
    const size_t area = p.height * p.width, seen_area = p.seen_height * p.seen_width;
    const size_t taps = (size_t)s->kernel_height * s->kernel_width;
    // dy as dx sees it, through the kernel turned round.
    const struct planes back = {.height = s->in_height,
                                .width = s->in_width,
                                .seen_height = s->out_height,
                                .seen_width = s->out_width,
                                .top = s->padding_height - 2,
                                .left = s->padding_width - 2,
                                .stride = 1,
                                .scratch = scratch,
                                .room = p.room};
    const int fast = is_3x3(s) && fits(&p) && (!dx || (p.stride == 1 && fits(&back)));
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        const size_t channel = plane % s->in_channels;
        if (fast) {
            weigh_plane(&p, dw + 9 * channel, dy, x);
            if (db) {
                db[channel] += span_sum(dy, area);
            }
            if (dx) {
                float turned[9];
                for (size_t i = 0; i < 9; i++) {
                    turned[i] = w[9 * channel + 8 - i];
                }
                see_plane(&back, dx, dy, turned);
            }
        } else {
            conv2d_backward(dx, dw + taps * channel, db ? db + channel : NULL, dy, x,
                            w + taps * channel, &one, 1);
        }
        dx = dx ? dx + seen_area : dx;
        dy += area;
        x += seen_area;
    }
}
