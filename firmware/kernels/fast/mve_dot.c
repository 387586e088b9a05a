// mve_dot.c: dot.c with vectors: each weight's gradient is a vector of four lanes.
//
// A row of the kernel at a time, down strips of eight pixels (with stride 2: four): 24 (12)
// instructions are four multiply-adds each, and 12 (8) others come with them.
#include "kernels/fast/mve.h"

#if MVE

#include "kernels/fast/dot.h"

// A pixel with its gradient in each lane: three taps see one pixel of the band each.
#define PIXEL(i, p0, p1, p2)                                                                       \
    do {                                                                                           \
        const float32x4_t g = LANES_GET(dy, i);                                                    \
        a = vfmaq_n_f32(a, g, p0);                                                                 \
        b = vfmaq_n_f32(b, g, p1);                                                                 \
        c = vfmaq_n_f32(c, g, p2);                                                                 \
    } while (0)

// Adds to four lanes of the kernel. `stride` is a constant wherever this is used: 2, or 1 for any.
__attribute__((always_inline)) static inline void
dot_lanes(const struct taps *t, uint32x4_t dw, const uint32x4_t dy_first, const int stride) {
    CORES10(x, r1, r2, r3, r4, r5, r6, r8, r9, r10, r11);
    const size_t unit = stride == 2 ? 4 : 8, down = t->stride * t->pitch;
    const float *first = t->x;
    for (size_t ky = 0; ky < 3; ky++, first += t->pitch) {
        float32x4_t a = LANES_GET(dw, 0), b = LANES_GET(dw, 1), c = LANES_GET(dw, 2);
        const float *strip = first;
        uint32x4_t dy_strip = dy_first;
        size_t left = t->width;
        for (; left >= unit; left -= unit, strip += 8) {
            const float *from = strip;
            uint32x4_t dy = dy_strip;
            for (size_t row = t->rows; row > 0; row--, from += down) {
                if (stride == 2) {
                    CORE_LOAD9(x, from);
                    PIXEL(0, x0, x1, x2);
                    PIXEL(1, x2, x3, x4);
                    PIXEL(2, x4, x5, x6);
                    PIXEL(3, x6, x7, x8);
                } else {
                    CORE_LOAD10(x, from);
                    PIXEL(0, x0, x1, x2);
                    PIXEL(1, x1, x2, x3);
                    PIXEL(2, x2, x3, x4);
                    PIXEL(3, x3, x4, x5);
                    PIXEL(4, x4, x5, x6);
                    PIXEL(5, x5, x6, x7);
                    PIXEL(6, x6, x7, x8);
                    PIXEL(7, x7, x8, x9);
                }
                LANES_MOVE(dy, t->width);
            }
            LANES_MOVE(dy_strip, unit);
        }
        for (; left > 0; left--, strip += t->stride) {
            const float *from = strip;
            uint32x4_t dy = dy_strip;
            for (size_t row = t->rows; row > 0; row--, from += down) {
                CORE_LOAD3(x, from);
                PIXEL(0, x0, x1, x2);
                LANES_MOVE(dy, t->width);
            }
            LANES_MOVE(dy_strip, 1);
        }
        LANES_PUT(dw, 0, a);
        LANES_PUT(dw, 1, b);
        LANES_PUT(dw, 2, c);
        LANES_MOVE(dw, 3);
    }
}

void dot_add(const struct taps *t) {
    for (size_t lane = 0; lane < t->lanes; lane += 4) {
        // A lane that is not there is the last one again: it stores the same.
        const size_t lanes = t->lanes - lane;
        const uint32x4_t dw = lanes_apart(t->dw + lane * t->dw_lane, t->dw_lane, lanes);
        const uint32x4_t dy = lanes_apart(t->dy + lane * t->dy_lane, t->dy_lane, lanes);
        if (t->stride == 2) {
            dot_lanes(t, dw, dy, 2);
        } else {
            dot_lanes(t, dw, dy, 1);
        }
    }
}

#endif // MVE
