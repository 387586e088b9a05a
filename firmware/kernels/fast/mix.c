// mix.c: the inner loops of the 1x1 convolution.
#include "kernels/fast/mve.h" // whether mve_mix.c takes its place

#if !MVE

#include "kernels/fast/mix.h"

// 16 multiply-adds come with 5 other instructions.
void mix_1(const struct tiles *t) {
    TILE;
    SINGLES4(x, s16, s17, s18, s19);
    SINGLES4(g, s20, s21, s22, s23);
    const float *first = t->from;
    TILE_PLACES;
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first, *w = t->w[0];
        LOAD_TILE;
        for (size_t channel = t->channels; channel > 0; channel--) {
            TAKE4(g, w);
            TAKE4(x, from);
            from += (ptrdiff_t)t->plane - 4;
            TAP(a, g0, x0, x1, x2, x3);
            TAP(b, g1, x0, x1, x2, x3);
            TAP(c, g2, x0, x1, x2, x3);
            TAP(d, g3, x0, x1, x2, x3);
        }
        PUT_TILE;
    }
}

void mix_2(const struct tiles *t) {
    TILE;
    SINGLES7(x, s16, s17, s18, s19, s20, s21, s22);
    SINGLES4(g, s23, s24, s25, s26);
    const float *first = t->from;
    TILE_PLACES;
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first, *w = t->w[0];
        LOAD_TILE;
        for (size_t channel = t->channels; channel > 0; channel--) {
            TAKE4(g, w);
            TAKE7(x, from);
            from += (ptrdiff_t)t->plane - 7;
            TAP(a, g0, x0, x2, x4, x6);
            TAP(b, g1, x0, x2, x4, x6);
            TAP(c, g2, x0, x2, x4, x6);
            TAP(d, g3, x0, x2, x4, x6);
        }
        PUT_TILE;
    }
}

// Two pixels in one lane.
#define PRODUCTS_LANE(a, dy)                                                                       \
    do {                                                                                           \
        TAKE2(g, dy);                                                                              \
        TAP(a, g0, p0, q0, r0, s0);                                                                \
        TAP(a, g1, p1, q1, r1, s1);                                                                \
    } while (0)

// 32 multiply-adds come with 10 other instructions.
void products_add(const struct products *t) {
    TILE;
    SINGLES2(p, s16, s17); // of each channel
    SINGLES2(q, s18, s19);
    SINGLES2(r, s20, s21);
    SINGLES2(s, s22, s23);
    SINGLES2(g, s24, s25); // of a lane
    const float *dy0 = t->dy[0], *dy1 = t->dy[1], *dy2 = t->dy[2], *dy3 = t->dy[3];
    const float *x0 = t->x[0], *x1 = t->x[1], *x2 = t->x[2], *x3 = t->x[3];
    {
        TILE_PLACES;
        LOAD_TILE;
    }
    for (size_t pair = t->pixels / 2; pair > 0; pair--) {
        TAKE2(p, x0);
        TAKE2(q, x1);
        TAKE2(r, x2);
        TAKE2(s, x3);
        PRODUCTS_LANE(a, dy0);
        PRODUCTS_LANE(b, dy1);
        PRODUCTS_LANE(c, dy2);
        PRODUCTS_LANE(d, dy3);
    }
    if (t->pixels % 2 == 1) {
        p0 = *x0;
        q0 = *x1;
        r0 = *x2;
        s0 = *x3;
        TAP(a, *dy0, p0, q0, r0, s0);
        TAP(b, *dy1, p0, q0, r0, s0);
        TAP(c, *dy2, p0, q0, r0, s0);
        TAP(d, *dy3, p0, q0, r0, s0);
    }
    TILE_PLACES;
    PUT_TILE;
}

#endif // !MVE
