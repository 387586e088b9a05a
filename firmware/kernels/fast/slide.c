// slide.c: a 3x3 kernel slides over a band of rows.
//
// The six pixels (with stride 2: nine) that a tile sees in a row of the band are loaded at once and
// serve three taps and four lanes: 144 multiply-adds come with 20 to 24 other instructions.
#include "kernels/fast/mve.h" // whether mve_slide.c takes its place

#if !MVE

#include "kernels/fast/slide.h"

#include "kernels/fast/span.h" // ROLLED

// The three taps of a row of the kernel, in one lane.
#define SLIDE_LANE(a, w)                                                                           \
    do {                                                                                           \
        TAKE3(g, w);                                                                               \
        if (stride == 2) {                                                                         \
            TAP(a, g0, x0, x2, x4, x6);                                                            \
            TAP(a, g1, x1, x3, x5, x7);                                                            \
            TAP(a, g2, x2, x4, x6, x8);                                                            \
        } else {                                                                                   \
            TAP(a, turned ? g2 : g0, x0, x1, x2, x3);                                              \
            TAP(a, g1, x1, x2, x3, x4);                                                            \
            TAP(a, turned ? g0 : g2, x2, x3, x4, x5);                                              \
        }                                                                                          \
    } while (0)

#define SLIDE_ROW(move)                                                                            \
    do {                                                                                           \
        if (stride == 2) {                                                                         \
            TAKE9(x, from);                                                                        \
        } else {                                                                                   \
            TAKE6(x, from);                                                                        \
        }                                                                                          \
        from += (move) - (stride == 2 ? 9 : 6);                                                    \
        SLIDE_LANE(a, w0);                                                                         \
        SLIDE_LANE(b, w1);                                                                         \
        SLIDE_LANE(c, w2);                                                                         \
        SLIDE_LANE(d, w3);                                                                         \
    } while (0)

// stride and turned are constants wherever this is used.
__attribute__((always_inline)) static inline void slide(const struct tiles *t, int stride,
                                                        int turned) {
    TILE;
    SINGLES9(x, s16, s17, s18, s19, s20, s21, s22, s23, s24);
    SINGLES3(g, s25, s26, s27);
    // Turned round, the kernel begins at the lowest of the three rows that it sees.
    const ptrdiff_t down = turned ? -(ptrdiff_t)t->pitch : (ptrdiff_t)t->pitch;
    const ptrdiff_t next = (ptrdiff_t)t->plane - 2 * down;
    const ptrdiff_t step = turned ? (ptrdiff_t)t->w_step - 9 : 0;
    const float *first = t->from + (turned ? 2 * t->pitch : 0);
    TILE_PLACES;
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first;
        const float *w0 = t->w[0], *w1 = t->w[1], *w2 = t->w[2], *w3 = t->w[3];
        LOAD_TILE;
        for (size_t channel = t->channels; channel > 0; channel--) {
            if (stride == 2) { // the rarer one: smaller, and 4 % slower
                ROLLED for (int ky = 0; ky < 3; ky++) {
                    SLIDE_ROW(down);
                }
                from += next - down;
            } else {
                SLIDE_ROW(down);
                SLIDE_ROW(down);
                SLIDE_ROW(next);
            }
            w0 += step;
            w1 += step;
            w2 += step;
            w3 += step;
        }
        PUT_TILE;
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

// The other direction of stride 2, one row of the kernel: the band's pixels lie at every second
// pixel of the tile, seen by the middle tap there and by the two outer taps in between.
#define SPREAD_LANE(a, w)                                                                          \
    do {                                                                                           \
        TAKE3(g, w);                                                                               \
        w += step;                                                                                 \
        a##0 += g1 * x0;                                                                           \
        a##1 += g0 * x1;                                                                           \
        a##2 += g1 * x1;                                                                           \
        a##3 += g0 * x2;                                                                           \
        a##1 += g2 * x0;                                                                           \
        a##3 += g2 * x1;                                                                           \
    } while (0)

void slide_spread(const struct tiles *t) {
    TILE;
    SINGLES3(x, s16, s17, s18);
    SINGLES3(g, s19, s20, s21);
    const ptrdiff_t next = (ptrdiff_t)t->plane - 3;
    const ptrdiff_t step = (ptrdiff_t)t->w_step - 3;
    const float *first = t->from;
    TILE_PLACES;
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first;
        const float *w0 = t->w[0], *w1 = t->w[1], *w2 = t->w[2], *w3 = t->w[3];
        LOAD_TILE;
        for (size_t channel = t->channels; channel > 0; channel--) {
            TAKE3(x, from);
            from += next;
            SPREAD_LANE(a, w0);
            SPREAD_LANE(b, w1);
            SPREAD_LANE(c, w2);
            SPREAD_LANE(d, w3);
        }
        PUT_TILE;
    }
}

#endif // !MVE
