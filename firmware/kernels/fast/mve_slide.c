// mve_slide.c: slide.c with vectors: a tile is a vector of its four lanes for each pixel.
//
// The pixels that a tile sees in a row of the band are loaded at once into core registers; each of
// the three weights of that row is a vector. 144 multiply-adds are 36 instructions; 17 others come
// with them.
#include "kernels/fast/mve.h"

#if MVE

#include "kernels/fast/slide.h"

#define SEE(tap, p0, p1, p2, p3)                                                                   \
    do {                                                                                           \
        const float32x4_t g = LANES_GET(w, tap);                                                   \
        TAP_LANES(g, p0, p1, p2, p3);                                                              \
    } while (0)

// A row of the kernel whose first weight is `tap`; turned round its last row is the first one.
#define SLIDE_ROW(tap)                                                                             \
    do {                                                                                           \
        if (stride == 2) {                                                                         \
            CORE_LOAD9(x, from);                                                                   \
            SEE(tap, x0, x2, x4, x6);                                                              \
            SEE(tap + 1, x1, x3, x5, x7);                                                          \
            SEE(tap + 2, x2, x4, x6, x8);                                                          \
        } else {                                                                                   \
            CORE_LOAD6(x, from);                                                                   \
            SEE(turned ? 8 - (tap) : tap, x0, x1, x2, x3);                                         \
            SEE(turned ? 7 - (tap) : tap + 1, x1, x2, x3, x4);                                     \
            SEE(turned ? 6 - (tap) : tap + 2, x2, x3, x4, x5);                                     \
        }                                                                                          \
    } while (0)

// stride and turned are constants wherever this is used.
__attribute__((always_inline)) static inline void slide(const struct tiles *t, int stride,
                                                        int turned) {
    CORES9(x, r1, r2, r3, r4, r5, r6, r8, r9, r10);
    const ptrdiff_t down = (ptrdiff_t)t->pitch, next = (ptrdiff_t)t->plane - 2 * down;
    const float *first = t->from;
    uint32x4_t to = lanes_at(t->to);
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first;
        uint32x4_t w = lanes_at(t->w);
        TILE_LANES(to);
        for (size_t channel = t->channels; channel > 0; channel--) {
            SLIDE_ROW(0);
            from += down;
            SLIDE_ROW(3);
            from += down;
            SLIDE_ROW(6);
            from += next;
            LANES_MOVE(w, t->w_step);
        }
        PUT_LANES(to);
    }
}

void slide_1(const struct tiles *t) {
    slide(t, 1, 0);
}

void slide_2(const struct tiles *t) {
    slide(t, 2, 0);
}

void slide_turned(const struct tiles *t) {
    slide(t, 1, 1);
}

void slide_spread(const struct tiles *t) {
    CORES3(x, r4, r5, r6);
    const float *first = t->from;
    uint32x4_t to = lanes_at(t->to);
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first;
        uint32x4_t w = lanes_at(t->w);
        TILE_LANES(to);
        for (size_t channel = t->channels; channel > 0; channel--) {
            CORE_LOAD3(x, from);
            from += t->plane;
            const float32x4_t g0 = LANES_GET(w, 0), g1 = LANES_GET(w, 1), g2 = LANES_GET(w, 2);
            LANES_MOVE(w, t->w_step);
            a = vfmaq_n_f32(a, g1, x0);
            b = vfmaq_n_f32(b, g0, x1);
            c = vfmaq_n_f32(c, g1, x1);
            d = vfmaq_n_f32(d, g0, x2);
            b = vfmaq_n_f32(b, g2, x0);
            d = vfmaq_n_f32(d, g2, x1);
        }
        PUT_LANES(to);
    }
}

#endif // MVE
