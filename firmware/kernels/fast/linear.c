// linear.c: the fully connected layer, two outputs by eight inputs at a time.
//
// A sample uses each weight once: one load brings eight of them, and two outputs share the inputs.
#include "kernels/fast/mve.h" // whether mve_linear.c takes its place

#if !MVE

#include "kernels/fast/fast.h"
#include "kernels/fast/span.h" // eight at a time

#define DOT8(sum, w)                                                                               \
    do {                                                                                           \
        TAKE8(g, w);                                                                               \
        sum += g0 * x0;                                                                            \
        sum += g1 * x1;                                                                            \
        sum += g2 * x2;                                                                            \
        sum += g3 * x3;                                                                            \
        sum += g4 * x4;                                                                            \
        sum += g5 * x5;                                                                            \
        sum += g6 * x6;                                                                            \
        sum += g7 * x7;                                                                            \
    } while (0)

void fast_linear_forward(float *y, const float *x, const float *w, const float *b, size_t in,
                         size_t out, size_t n) {
    SINGLES8(x, s0, s1, s2, s3, s4, s5, s6, s7);
    SINGLES8(g, s8, s9, s10, s11, s12, s13, s14, s15);
    for (; n > 0; n--, x += in, y += out) {
        for (size_t o = 0; o < out; o += 2) {
            const size_t next = o + 1 < out ? o + 1 : o; // the last one again if there is none
            const float *from = x, *w0 = w + o * in, *w1 = w + next * in;
            float sum0 = 0, sum1 = 0;
            for (size_t i = in / 8; i > 0; i--) {
                TAKE8(x, from);
                DOT8(sum0, w0);
                DOT8(sum1, w1);
            }
            ROLLED for (size_t i = in % 8; i > 0; i--) {
                TAKE1(x, from);
                sum0 += *w0++ * x0;
                sum1 += *w1++ * x0;
            }
            y[o] = b ? b[o] + sum0 : sum0;
            y[next] = b ? b[next] + sum1 : sum1;
        }
    }
}

// dw += dy x, for eight weights of one output.
#define OUTER8(dw, dy)                                                                             \
    do {                                                                                           \
        LOAD8(g, dw);                                                                              \
        SPAN_ADD8(g, dy, x);                                                                       \
        PUT8(dw, g);                                                                               \
    } while (0)

// dx += w dy, for eight inputs and one output.
#define BACK8(w, dy)                                                                               \
    do {                                                                                           \
        TAKE8(g, w);                                                                               \
        SPAN_ADD8(x, dy, g);                                                                       \
    } while (0)

void fast_linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                          const float *w, size_t in, size_t out, size_t n) {
    SINGLES8(x, s0, s1, s2, s3, s4, s5, s6, s7);
    SINGLES8(g, s8, s9, s10, s11, s12, s13, s14, s15);
    for (; n > 0; n--, dy += out) {
        for (size_t o = 0; o < out; o += 2) {
            // If there is no second output, it is the first one again with no gradient.
            const size_t row = o + 1 < out ? in : 0;
            const float dy0 = dy[o], dy1 = o + 1 < out ? dy[o + 1] : 0;
            if (dw) {
                float *to0 = dw + o * in, *to1 = to0 + row;
                const float *from = x;
                for (size_t i = in / 8; i > 0; i--) {
                    TAKE8(x, from);
                    OUTER8(to0, dy0);
                    OUTER8(to1, dy1);
                }
                ROLLED for (size_t i = in % 8; i > 0; i--) {
                    TAKE1(x, from);
                    *to0++ += dy0 * x0;
                    *to1++ += dy1 * x0;
                }
            }
            if (dx) {
                const float *w0 = w + o * in, *w1 = w0 + row;
                float *to = dx;
                for (size_t i = in / 8; i > 0; i--) {
                    LOAD8(x, to);
                    BACK8(w0, dy0);
                    BACK8(w1, dy1);
                    PUT8(to, x);
                }
                ROLLED for (size_t i = in % 8; i > 0; i--) {
                    *to++ += dy0 * *w0++ + dy1 * *w1++;
                }
            }
        }
        for (size_t o = 0; db && o < out; o++) {
            db[o] += dy[o];
        }
        x = x ? x + in : x;
        dx = dx ? dx + in : dx;
    }
}

#endif // !MVE
