// conv2d.c: the convolution: bias here, the rest in conv3.c, conv1.c or the plain kernel.
#include "kernels/fast/conv1.h"
#include "kernels/fast/conv3.h"
#include "kernels/fast/fast.h"
#include "kernels/fast/span.h" // bias and its gradient

SELDOM void fast_conv2d_forward(float *y, const float *x, const float *w, const float *b,
                                const struct window *s, size_t n, float *scratch) {
    const size_t room = fast_conv2d_scratch(s);
    const int does1 = conv1_does(s, room);
    if (SOFT_FLOAT || (!does1 && !conv3_does(s, room))) {
        conv2d_forward(y, x, w, b, s, n);
        return;
    }
    const size_t area = (size_t)s->out_height * s->out_width;
    for (size_t plane = 0; plane < n * s->out_channels; plane++) {
        span_fill(y + plane * area, b ? b[plane % s->out_channels] : 0, area);
    }
    if (does1) {
        conv1_forward(y, x, w, s, n, scratch);
    } else {
        conv3_forward(y, x, w, s, n, scratch, room);
    }
}

SELDOM void fast_conv2d_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                                 const float *w, const struct window *s, size_t n, float *scratch) {
    const size_t room = fast_conv2d_scratch(s);
    const int does1 = conv1_does(s, room);
    if (SOFT_FLOAT || (!does1 && (!conv3_does(s, room) || (dx && !conv3_does_input(s, room))))) {
        conv2d_backward(dx, dw, db, dy, x, w, s, n);
        return;
    }
    const size_t area = (size_t)s->out_height * s->out_width;
    for (size_t plane = 0; db && plane < n * s->out_channels; plane++) {
        db[plane % s->out_channels] += span_sum(dy + plane * area, area);
    }
    if (dw && does1) {
        conv1_backward_weight(dw, dy, x, s, n, scratch, room);
    } else if (dw) {
        conv3_backward_weight(dw, dy, x, s, n, scratch, room);
    }
    if (dx && does1) {
        conv1_backward_input(dx, dy, w, s, n, scratch);
    } else if (dx) {
        conv3_backward_input(dx, dy, w, s, n, scratch, room);
    }
}
