// depthwise.c: the 3x3 convolution of each channel on its own, with stride 1 or 2.
//
// Nothing is shared by channels, so that all the reuse there is lies along a row (view.c).
#include "kernels/fast/band.h" // padded rows
#include "kernels/fast/fast.h"
#include "kernels/fast/span.h" // bias and its gradient
#include "kernels/fast/view.h" // the inner loops

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
    const int fast = !SOFT_FLOAT && is_3x3(s) && fits(&p);
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
    const int fast =
        !SOFT_FLOAT && is_3x3(s) && fits(&p) && (!dx || (p.stride == 1 && fits(&back)));
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        const size_t channel = plane % s->in_channels;
        if (fast) {
            if (dw) {
                weigh_plane(&p, dw + 9 * channel, dy, x);
            }
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
            conv2d_backward(dx, dw ? dw + taps * channel : NULL, db ? db + channel : NULL, dy, x,
                            w + taps * channel, &one, 1);
        }
        dx = dx ? dx + seen_area : dx;
        dy += area;
        x = x ? x + seen_area : x;
    }
}
