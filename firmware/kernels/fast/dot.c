// dot.c: the gradient of a 3x3 kernel: each weight's is the dot product of what it sees and of dy.
#include "kernels/fast/mve.h" // whether mve_dot.c takes its place

#if !MVE

#include "kernels/fast/dot.h"

#include "kernels/fast/span.h" // ROLLED
#include "kernels/fast/wide.h" // registers by name

// One pixel with gradient g: the three taps of a row of the kernel see one pixel of the band each.
#define PIXEL(t0, t1, t2, g, p0, p1, p2)                                                           \
    do {                                                                                           \
        t0 += (g) * (p0);                                                                          \
        t1 += (g) * (p1);                                                                          \
        t2 += (g) * (p2);                                                                          \
    } while (0)

// Four pixels, in one lane.
#define FOUR_PIXELS(t0, t1, t2, g)                                                                 \
    do {                                                                                           \
        PIXEL(t0, t1, t2, g##0, x0, x1, x2);                                                       \
        PIXEL(t0, t1, t2, g##1, x1, x2, x3);                                                       \
        PIXEL(t0, t1, t2, g##2, x2, x3, x4);                                                       \
        PIXEL(t0, t1, t2, g##3, x3, x4, x5);                                                       \
    } while (0)

// Two lanes of nine taps stay in registers for the whole band. With four pixels of dy in each lane
// and six of the band that fills all 32: 72 multiply-adds come with 10 other instructions. The last
// pixels of a row, and all with another stride than 1, go one by one: 18 with 10.
void dot_add(const struct taps *t) {
    SINGLES9(a, s0, s1, s2, s3, s4, s5, s6, s7, s8);
    SINGLES9(b, s9, s10, s11, s12, s13, s14, s15, s16, s17);
    SINGLES6(x, s18, s19, s20, s21, s22, s23);
    SINGLES4(g, s24, s25, s26, s27);
    SINGLES4(h, s28, s29, s30, s31);
    const size_t fours = t->stride == 1 ? t->width / 4 : 0, ones = t->width - 4 * fours;
    const ptrdiff_t pitch = (ptrdiff_t)t->pitch, stride = (ptrdiff_t)t->stride;
    const ptrdiff_t skip = stride * (pitch - (ptrdiff_t)t->width); // to the next row of dy
    float *dw0 = t->dw;
    const float *dy = t->dy;
    for (size_t lane = 0; lane < t->lanes; lane += 2) {
        // A lane that is not there is the last one again: it stores the same.
        const int both = lane + 1 < t->lanes;
        float *dw1 = both ? dw0 + t->dw_lane : dw0;
        const float *dy0 = dy, *dy1 = both ? dy + t->dy_lane : dy;
        const float *from = t->x;
        LOAD9(a, dw0);
        LOAD9(b, dw1);
        for (size_t row = t->rows; row > 0; row--) {
            for (size_t i = fours; i > 0; i--) {
                TAKE4(g, dy0);
                TAKE4(h, dy1);
                TAKE6(x, from);
                from += pitch - 6;
                FOUR_PIXELS(a0, a1, a2, g);
                FOUR_PIXELS(b0, b1, b2, h);
                TAKE6(x, from);
                from += pitch - 6;
                FOUR_PIXELS(a3, a4, a5, g);
                FOUR_PIXELS(b3, b4, b5, h);
                TAKE6(x, from);
                from -= 2 * pitch + 2;
                FOUR_PIXELS(a6, a7, a8, g);
                FOUR_PIXELS(b6, b7, b8, h);
            }
            ROLLED for (size_t i = ones; i > 0; i--) {
                TAKE1(g, dy0);
                TAKE1(h, dy1);
                TAKE3(x, from);
                from += pitch - 3;
                PIXEL(a0, a1, a2, g0, x0, x1, x2);
                PIXEL(b0, b1, b2, h0, x0, x1, x2);
                TAKE3(x, from);
                from += pitch - 3;
                PIXEL(a3, a4, a5, g0, x0, x1, x2);
                PIXEL(b3, b4, b5, h0, x0, x1, x2);
                TAKE3(x, from);
                from += stride - 3 - 2 * pitch;
                PIXEL(a6, a7, a8, g0, x0, x1, x2);
                PIXEL(b6, b7, b8, h0, x0, x1, x2);
            }
            from += skip;
        }
        PUT9(dw0, a);
        PUT9(dw1, b);
        dw0 += 2 * t->dw_lane - 9;
        dy += 2 * t->dy_lane;
    }
}

#endif // !MVE
