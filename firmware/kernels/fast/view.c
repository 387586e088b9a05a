// view.c: the inner loops of the depthwise convolution.
//
// Nine weights stay in registers while the rows of a padded copy go by. Four pixels at a time, 36
// multiply-adds come with 10 other instructions; the last pixels of a row, and all with stride 2,
// go one by one.
#include "kernels/fast/mve.h" // whether mve_view.c takes its place

#if !MVE

#include "kernels/fast/view.h"

#include "kernels/fast/span.h" // ROLLED
#include "kernels/fast/wide.h" // registers by name

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

void view_see(float *to, const float *weights, const struct view *v) {
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

void view_weigh(float *dw, const float *dy, const struct view *v) {
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

#endif // !MVE
